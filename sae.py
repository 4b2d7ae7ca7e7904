"""The base sparse autoencoder (SAE), every method that a variant may override, and the files
between the scripts.

    pre   = (x - b_dec) W_enc + b_enc        pre-activations of a batch of rows x      [B, d_sae]
    acts  = activation(pre)                  latent activations, sparse and >= 0       [B, d_sae]
    x_hat = acts W_dec + b_dec               reconstruction; rows of W_dec are unit    [B, d_in]

Units: x = (activation - mean) * scale, so that E||x|| = sqrt(d_in). The reconstruction error is a
mean over d_in, so an error of 1 is about the size of the data. `encode` and `reconstruct` take raw
activations.

A variant is a subclass in variants/NAME.py that overrides the method its idea is about. A public
class attribute that is a number, word or switch is a setting, changed by --set name=value.
"""
import argparse
import ast
import contextlib
import difflib
import errno
import importlib
import inspect
import json
import math
import os
import re
import secrets
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import filelock
import safetensors.torch
import torch
import xxhash
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parent
FORMAT = 2                   # of every file written here; a reader refuses another one


class Out(NamedTuple):
    """What one forward pass gives; penalties and surgery read it."""
    x: torch.Tensor          # [B, d_in]   normalised activations
    pre: torch.Tensor        # [B, d_sae]  before the activation function
    acts: torch.Tensor       # [B, d_sae]  sparse, >= 0
    x_hat: torch.Tensor      # [B, d_in]   reconstruction


def unit(w):
    """Rows of w [n, d] scaled to length 1; a zero row stays zero."""
    return w / w.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def generator(*key, device="cpu"):
    """A random generator that depends on `key` alone, so that a resumed run draws the same
    numbers."""
    return torch.Generator(device).manual_seed(xxhash.xxh3_64_intdigest(repr(key).encode()) >> 1)


def kth_smallest(x, k, dim=-1):
    """The k-th smallest value of x along dim, k from 1."""
    if x.is_cuda:            # kthvalue is made for few rows: 20 times as slow as sorting
        return x.sort(dim).values.select(dim, k - 1)
    return x.kthvalue(k, dim).values


class choice(str):
    """A setting with a fixed list of values, the first one the default: `rule = choice("phi",
    "random")`."""

    def __new__(cls, *options):
        found = super().__new__(cls, options[0])
        found.options = options
        return found


# ---- the sparse product: what fires is found once, and products touch nothing else ---------------
#
# Of a step's five matrix products only the encoder's needs all of [B, d_sae]. Where few latents
# fire, activate() notes which (Fired), and the decoder's product and all gradients are made from
# these. `acts` itself is an ordinary dense tensor. Tests hold both paths to the same numbers.


class Fired(NamedTuple):
    """The non-zeros of acts [B, d_sae], row after row."""
    acts: torch.Tensor       # the dense tensor that they are the non-zeros of
    values: torch.Tensor     # [n]
    rows: torch.Tensor       # [n]
    latents: torch.Tensor    # [n]
    starts: torch.Tensor     # [B + 1]  row b has the values starts[b] : starts[b + 1]


def rows_and_latents(at, d_sae):
    """The (rows, latents) [n] of flat indices `at` [n] into a tensor [B, d_sae]."""
    rows = at.div(d_sae, rounding_mode="floor")
    return rows, at - rows * d_sae


def row_starts(rows, n):
    """Where each of n rows starts in the ascending list `rows`, and where the last one ends [n +
    1]."""
    return torch.searchsorted(rows, torch.arange(n + 1, dtype=rows.dtype, device=rows.device))


def sparse_matmul(values, columns, starts, W):
    """S @ W for a sparse S whose row b has values[starts[b]:starts[b + 1]] in `columns`."""
    return F.embedding_bag(columns, W, starts, mode="sum", per_sample_weights=values.to(W.dtype),
                           include_last_offset=True)


def sparse_matmul_t(values, rows, columns, n, W):
    """S.T @ W [n, d] for a sparse S with `values` at (rows, columns)."""
    columns, order = columns.int().sort(stable=True)     # stable: the same sums, the same bits
    return sparse_matmul(values[order], rows[order], row_starts(columns, n), W)


class Decode(torch.autograd.Function):
    """acts @ W from the non-zeros of acts."""

    @staticmethod
    def forward(ctx, values, W, rows, latents, starts):
        ctx.save_for_backward(values, W, rows, latents, starts)
        return sparse_matmul(values, latents, starts, W)

    @staticmethod
    def backward(ctx, grad):
        values, W, rows, latents, starts = ctx.saved_tensors
        grad = grad.contiguous().to(W.dtype)
        to_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, W, latents, starts, rows, 0)
        to_W = sparse_matmul_t(values, rows, latents, len(W), grad)
        return to_values, to_W, None, None, None


class Encode(torch.autograd.Function):
    """(x - b_dec) W_enc + b_enc; b_dec's gradient costs a vector, and x mostly needs none."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec):
        x = x - b_dec
        ctx.save_for_backward(x, W_enc)
        return torch.addmm(b_enc, x, W_enc)

    @staticmethod
    def backward(ctx, grad):
        x, W_enc = ctx.saved_tensors
        if grad.is_sparse:   # from Pick: of the entries that fired
            (rows, latents), values = grad._indices(), grad._values()
            to_W = sparse_matmul_t(values, rows, latents, W_enc.shape[1], x.to(W_enc.dtype)).T
            to_b = W_enc.new_zeros(W_enc.shape[1]).index_add(0, latents, values.to(W_enc.dtype))
        else:                # .T twice: the gradient comes in W_enc's memory order
            to_W = (grad.T @ x.to(grad.dtype)).T
            to_b = grad.sum(0).to(W_enc.dtype)
        to_x = grad.to(W_enc.dtype) @ W_enc.T if ctx.needs_input_grad[0] else None
        return to_x, to_W, to_b, -(W_enc @ to_b)


class Pick(torch.autograd.Function):
    """pre.flatten()[at] for ascending or any `at` [n]; a gradient for Encode stays sparse."""

    @staticmethod
    def forward(ctx, pre, at):
        ctx.save_for_backward(at)
        ctx.shape = pre.shape
        ctx.sparse = isinstance(pre.grad_fn, Encode._backward_cls)
        return pre.take(at)

    @staticmethod
    def backward(ctx, grad):
        at, = ctx.saved_tensors
        if not ctx.sparse:
            return grad.new_zeros(ctx.shape.numel()).scatter_add(0, at, grad).view(ctx.shape), None
        index = torch.stack(rows_and_latents(at, ctx.shape[1]))
        return torch.sparse_coo_tensor(index, grad, ctx.shape, check_invariants=False), None


def above(pre, cut):
    """Flat indices of the entries of pre [B, d_sae] above `cut`, ascending; NaN counts, to be
    noticed."""
    mask = (pre <= cut).logical_not_().flatten()
    if mask.is_cuda:
        return mask.nonzero()[:, 0]
    return torch.from_numpy(mask.numpy().nonzero()[0])     # a third of torch's time


def highest(pre, k):
    """The latents of the k highest entries of each row of pre [B, d_sae], in any order [B, k].

    Few are looked for in the k of d_sae / 8 groups with the highest maxima: half of topk's time on
    a CPU.
    """
    if pre.is_cuda or pre.shape[1] % 8 or 32 * k > pre.shape[1]:
        return pre.topk(k, sorted=False).indices
    groups = pre.unflatten(1, (8, -1)).amax(1)             # group g: latents g, g + d_sae / 8, ...
    inside = highest(groups, k)[:, :, None] + groups.shape[1] * torch.arange(8)
    inside = inside.flatten(1)
    return inside.gather(1, pre.gather(1, inside).topk(k, sorted=False).indices)


# ---- the four sparsifiers ------------------------------------------------------------------------


class ReLU:
    """acts = relu(pre) under an L1 penalty, its weight steered until L0 is l0 (Bricken 2023)."""

    steered = True           # a penalty's weight holds L0

    def __init__(self, sae):
        self.sae = sae

    def start(self, pre, rank):
        """Set biases at which each latent fires on all but `rank` of the sample's rows; pre [n,
        d_sae]."""
        self.sae.b_enc.sub_(kth_smallest(pre, rank, dim=0))

    def rescale(self, factor):
        """The encoder was multiplied by `factor`: so is what is compared with pre."""

    def select(self, pre):
        """Flat indices of the entries that may fire, and perhaps others."""
        return above(pre, 0)

    def fire(self, pre, latents):
        """acts of the entries `pre`, which belong to `latents`."""
        return pre.relu()

    def dense(self, pre):
        """acts [B, d_sae] of pre [B, d_sae]."""
        return self.fire(pre, slice(None))

    def penalty(self, out):
        """sum of acts ||d_i|| / sqrt(d_in), mean over rows; ||d_i|| is 1 (Conerly 2024)."""
        return self.sae.row_sums(out.acts).mean() / self.sae.d_in ** 0.5

    def after_step(self, out):
        """Follow what the step did."""
        fired = self.sae.firing(out.acts).sum() * len(out.x)
        self.size = self.sae.row_sums(out.acts).sum() / fired.clamp_min(1)

    def nudge(self, error):
        """Move the cut so that log L0 falls by about `error`: acts fall off like an exponential,
        whose mean, the mean act that fires, says how much lies just above the cut."""
        self.sae.b_enc.sub_(error * self.size)


class TopK(ReLU):
    """acts = the round(l0) highest positive entries of each row (Gao 2024)."""

    steered = False

    def start(self, pre, rank):
        pass

    def after_step(self, out):
        pass

    def select(self, pre):
        latents = highest(pre, round(self.sae.wanted_l0()))
        rows = torch.arange(len(pre), device=pre.device)[:, None]
        return (latents + pre.shape[1] * rows).sort(dim=1).values.flatten()

    def dense(self, pre):
        top = pre.relu().topk(round(self.sae.wanted_l0()), sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


class BatchTopK(ReLU):
    """acts = the round(l0 B) highest positive entries of the batch; at inference those above a
    threshold, the moving average of the batches' cuts (Bussmann 2024). On a GPU, where pre is
    bfloat16, those that tie with the lowest are left out: 1 to 2 % of them."""

    steered = False

    def __init__(self, sae):
        super().__init__(sae)
        sae.register_buffer("threshold", torch.zeros(()))
        self.cut = None      # of the last batch, until after_step() takes it

    def start(self, pre, rank):
        self.sae.threshold.copy_(self.batch_cut(pre[:256]))

    def rescale(self, factor):
        self.sae.threshold.mul_(factor)

    def batch_cut(self, pre):
        """The value that round(wanted_l0 B) entries of pre exceed; 0 if fewer are positive."""
        keep = min(round(self.sae.wanted_l0() * len(pre)), pre.numel() - 1)
        for share in (0.95, 0.8, math.nan):  # the last threshold says where to look; NaN: all
            near = pre.take(above(pre, share * self.sae.threshold))
            if len(near) > keep:
                return kth_smallest(near, len(near) - keep).clamp_min(0)

    def select(self, pre):
        self.cut = self.batch_cut(pre)
        return above(pre, self.cut)

    def dense(self, pre):
        if self.sae.training:
            self.cut = self.batch_cut(pre.detach())
            return pre * (pre > self.cut)
        return pre * (pre > self.sae.threshold)

    def after_step(self, out):
        sae = self.sae
        if self.cut is None or sae.micro_batches > 1:  # activate() is a variant's own, or saw parts
            self.cut = self.batch_cut(out.pre)
        sae.threshold.lerp_(self.cut.float(), sae.memory(0.02))
        self.cut = None


class JumpReLU(ReLU):
    """acts = pre above each latent's learned threshold, L0 driven to l0 (Rajamanoharan 2024b)."""

    def __init__(self, sae):
        super().__init__(sae)
        sae.log_threshold = nn.Parameter(torch.zeros(sae.d_sae))
        sae.latents["log_threshold"] = (0, None)

    def start(self, pre, rank):
        self.sae.log_threshold.copy_(kth_smallest(pre, rank, dim=0).clamp_min(1e-3).log())

    def rescale(self, factor):
        self.sae.log_threshold.add_(factor.log())

    def select(self, pre):
        cut = self.sae.log_threshold.exp() - self.sae.bandwidth / 2      # zeros near it move it
        return above(pre, cut.masked_fill(cut < 0, -torch.inf))

    def fire(self, pre, latents):
        return Jump.apply(pre, self.sae.log_threshold.exp()[latents], self.sae.bandwidth)

    def nudge(self, error):
        threshold = self.sae.log_threshold.exp()
        excess = (self.size - threshold.mean()).clamp_min(0)
        self.sae.log_threshold.copy_((threshold + error * excess).clamp_min(1e-3).log())

    def penalty(self, out):
        """L0 / l0, mean over rows."""
        fired = self.sae.fired
        if fired is not None and out.acts is fired.acts:
            pre = out.pre.detach().take(fired.rows * self.sae.d_sae + fired.latents)
            threshold = self.sae.log_threshold.exp().index_select(0, fired.latents)
        else:
            pre, threshold = out.pre, self.sae.log_threshold.exp()
        return Step.apply(pre, threshold, self.sae.bandwidth).sum() / len(out.x) / self.sae.l0


class Jump(torch.autograd.Function):
    """pre where pre > threshold > 0, else 0; the threshold's gradient by a rectangle kernel over
    relu(pre) (Rajamanoharan 2024b, eq. 11). Masks are made in place: where() costs more on a
    CPU."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre - threshold.to(pre.dtype)).gt_(0).mul_(pre)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        cut = threshold.to(pre.dtype)
        near = pre.relu().sub_(cut).abs_().lt_(ctx.bandwidth / 2).mul_(grad)
        to_threshold = -threshold / ctx.bandwidth * near.sum_to_size(threshold.shape)
        return (pre - cut).gt_(0).mul_(grad), to_threshold, None


class Step(torch.autograd.Function):
    """1 where pre > threshold, else 0; a gradient for the threshold alone (Rajamanoharan 2024b, eq.
    12)."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre - threshold.to(pre.dtype)).gt_(0)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold.to(pre.dtype)).abs_().lt_(ctx.bandwidth / 2).mul_(grad)
        return None, -near.sum_to_size(threshold.shape) / ctx.bandwidth, None


SPARSIFIERS = {"relu": ReLU, "topk": TopK, "batch_topk": BatchTopK, "jumprelu": JumpReLU}


# ---- the SAE -------------------------------------------------------------------------------------


class SAE(nn.Module):
    """The base: ReLU with an L1 penalty, or another activation. Every activation reaches the same
    l0."""

    activation = choice("relu", "topk", "batch_topk", "jumprelu")
    d_sae = 1024              # latents
    l0 = 16.0                 # active latents per row, on average, that training ends at
    lr = 3e-3  # Adam; for runs of some hundred steps; 3e-4 is usual from 50 M tokens on
    lr_warmup = 0.05          # fraction of the run
    lr_decay = 0.2            # fraction of the run over which lr falls linearly to 0, at its end
    clip = 1.0                # gradient norm
    batch_size = 2048         # rows
    micro_batches = 1         # a batch is worked on in this many parts
    sparsity_start = 1.0      # training starts at this multiple of l0 ...
    sparsity_warmup = 0.2     # ... and comes to l0 over this fraction of the run
    sparsity_weight = 0.2     # relu, jumprelu: at first; a controller then holds L0 at l0
    sparsity_gain = 0.8       # share of an error of log L0 that a step takes off the cut ...
    sparsity_memory = 0.004   # ... and fraction of the run over which it takes it off the weight
    bandwidth = 0.5  # jumprelu: width of the kernel that stands in for the step's derivative
    threshold_lr = 10.0       # jumprelu: learning rate of the thresholds over lr; 1 is too slow
    aux_weight = 1 / 32       # dead latents reconstruct the residual (AuxK, Gao 2024)
    dead_after = 0.1          # dead: silent for this fraction of the run

    off = {}                  # a variant: the settings that switch its idea off
    fixed = {}                # a variant: a parent's settings that its idea replaces -> why
    counts = ()               # a variant: names in stats that tell what its mechanism did
    totals = ()               # a variant: those of them that add up over the run, kept as buffers
    paired = True             # False: the variant draws its own batches

    def __init__(self, d_in, steps, seed=0, **settings):
        super().__init__()
        self.d_in, self.steps, self.seed = d_in, steps, seed
        self.step = 0
        self.stats = {}               # a variant writes what it wants logged: name -> number
        self.row_weight = None        # how much each row of the batch counts [B]; None: all alike
        self.part = slice(None)       # the rows of the batch in work, when it is worked on in parts
        self.latents = {}  # parameter or buffer -> (its latent axis, a fresh latent's value)
        self.memories = {}            # what track() follows -> the fraction of the run it remembers
        self.fired = None             # what activate() last found to fire, on the sparse path
        for name, value in settings.items():
            setattr(self, name, value)
        self.check({name: getattr(self, name) for name in self.settings()})
        self.build()
        self.totals = [name for c in self.chain() for name in vars(c).get("totals", ())]
        for name in self.totals:
            self.register_buffer(name, torch.zeros(()))

    @property
    def progress(self):
        """Fraction of training done, 0..1; 1 for a loaded SAE."""
        return self.step / max(1, self.steps)

    def forward(self, x):
        """Normalised rows x [B, d_in] -> Out."""
        pre = self.pre_acts(x)
        acts = self.activate(pre)
        return Out(x, pre, acts, self.decode(acts))

    @torch.no_grad()
    def encode(self, x):
        """Raw activations [..., d_in] -> latent activations [..., d_sae] in raw units. Set eval()
        first."""
        acts = self(self.normalise(x)).acts / self.scale
        return acts.reshape(*x.shape[:-1], self.d_sae)

    @torch.no_grad()
    def reconstruct(self, x):
        """Raw activations [..., d_in] -> their reconstruction, same shape. Set eval() first."""
        x_hat = self(self.normalise(x)).x_hat / self.scale + self.mean
        return x_hat.reshape(x.shape)

    def normalise(self, x):
        """Raw activations [..., d_in] -> rows [n, d_in] as training sees them."""
        return (x.reshape(-1, self.d_in).float() - self.mean) * self.scale

    # ---- what a variant may override, in the order in which training calls it --------------------

    def build(self):
        """Add parameters and buffers. A variant calls super().build() first: same seed, same
        start."""
        W_dec = unit(torch.randn(self.d_sae, self.d_in, generator=generator(self.seed, "W_dec")))
        self.W_enc = nn.Parameter(W_dec.clone().T)  # [d_in, d_sae]; in memory latent after latent
        self.W_dec = nn.Parameter(W_dec)               # [d_sae, d_in]
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))
        self.latents |= {"W_enc": (1, None), "W_dec": (0, None), "b_enc": (0, 0.0)}
        self.register_buffer("mean", torch.zeros(self.d_in))       # of raw activations
        self.register_buffer("scale", torch.ones(()))
        self.track("rate", fresh=self.l0 / self.d_sae)             # how often a latent fires
        self.register_buffer("silent", torch.zeros(self.d_sae))    # steps since it fired
        self.latents["silent"] = (0, 0.0)
        self.sparsifier = SPARSIFIERS[self.activation](self)
        if self.sparsifier.steered:
            self.register_buffer("sparsity_scale", torch.ones(()))     # on sparsity_weight

    def make_optimizer(self):
        named = dict(self.named_parameters())
        threshold = named.pop("log_threshold", None)           # of jumprelu
        groups = [{"params": list(named.values())}]
        if threshold is not None:
            groups.append({"params": [threshold], "lr": self.threshold_lr * self.lr})
        return torch.optim.Adam(groups, lr=self.lr, betas=(0.9, 0.999), fused=True)

    @torch.no_grad()
    def init_from_data(self, x):
        """Start from a sample of rows x [n, d_in]: b_dec is their mean, latents fire at the wanted
        rate, and the encoder is scaled to reconstruct best (least squares)."""
        self.b_dec.copy_(x.mean(0))
        rate = min(0.5, self.wanted_l0() / self.d_sae)
        self.sparsifier.start(self.pre_acts(x), round(len(x) * (1 - rate)))
        self.scale_encoder(x)

    def choose_batch(self, n_rows, rng):
        """The rows of the shard in memory (n_rows, shuffled when written) that make this step's
        batch: a slice or indices. `self.position` is where the batch that all other runs take
        starts."""
        return slice(self.position, self.position + self.batch_size)

    def pre_acts(self, x):
        """x [B, d_in] -> [B, d_sae]."""
        return Encode.apply(x, self.W_enc, self.b_enc, self.b_dec)

    def activate(self, pre):
        """pre [B, d_sae] -> acts [B, d_sae], sparse and >= 0. In eval mode each row by itself."""
        if not (self.training and self.path == "sparse"):
            self.fired = None
            return self.sparsifier.dense(pre)
        at = self.sparsifier.select(pre.detach())
        rows, latents = rows_and_latents(at, self.d_sae)
        values = self.sparsifier.fire(Pick.apply(pre, at), latents)
        acts = values.new_zeros(pre.numel()).scatter(0, at, values).view(pre.shape)
        self.fired = Fired(acts, values, rows, latents, row_starts(rows, len(pre)))
        return acts

    def decode(self, acts):
        """acts [B, d_sae] -> [B, d_in]."""
        if not (self.training and self.path == "sparse"):
            return torch.addmm(self.b_dec, acts, self.W_dec)
        _, values, rows, latents, starts = self.nonzeros(acts)
        return Decode.apply(values, self.W_dec, rows, latents, starts) + self.b_dec

    def recon_error(self, out):
        """Squared error of each row, mean over d_in [B]."""
        return F.mse_loss(out.x_hat, out.x, reduction="none").mean(-1)

    def penalties(self, out):
        """{name: value before its weight}. The weight is the setting NAME_weight times
        penalty_scale(NAME); one of weight 0 is left out. If there is a setting NAME_warmup, the
        weight comes up from 0 over this fraction of the run. Units: fractions of E||x||^2 / d_in.
        """
        found = {}
        if self.sparsifier.steered:
            found["sparsity"] = self.sparsity(out)
        if self.aux_weight and self.dead().any():
            found["aux"] = self.aux(out)
        return found

    def penalty_scale(self, name):
        """Factor on a penalty's weight now: for warm-ups and controllers."""
        if name == "sparsity":
            return self.sparsity_scale
        return self.ramp(getattr(self, f"{name}_warmup", 0.0))

    def lr_scale(self):
        """Factor on every learning rate now: linear warm-up, constant, linear decay to 0."""
        up = (self.step + 1) / max(1, self.lr_warmup * self.steps)
        return min(1.0, up, self.decay())

    def accept(self, loss):
        """Whether to take the step, bool or tensor; a refused one is counted and changes no
        weight."""
        return loss.isfinite()

    @torch.no_grad()
    def before_step(self, opt):
        """Edit gradients: what would only lengthen a decoder row goes; the rest is clipped."""
        grad, W = self.W_dec.grad, self.W_dec
        grad.addcmul_(W, (grad * W).sum(-1, keepdim=True), value=-1)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.stats["grad_norm"] = norm = norm.cpu()  # the loop asks whether it is finite, anyway
        if not norm <= self.clip:  # a factor of 1 would cost a pass over all
            nn.utils.clip_grads_with_norm_(self.parameters(), self.clip, norm)

    @torch.no_grad()
    def after_step(self, opt, out):
        """Keep decoder rows unit, follow what fires, hold L0, restart latents."""
        self.W_dec.copy_(unit(self.W_dec))
        fires = self.firing(out.acts)
        self.silent.copy_(torch.where(fires > 0, 0.0, self.silent + 1))
        self.follow("rate", fires)
        self.sparsifier.after_step(out)
        if self.sparsifier.steered:
            self.steer_sparsity(fires.sum())
        which, directions = self.restart(out)
        if len(which):
            self.reset_latents(opt, which, directions, out.x)
        self.stats |= {name: getattr(self, name) for name in self.totals}
        self.fired = None

    def restart(self, out):
        """(which latents [n] begin anew after this step, at which directions [n, d_in])."""
        return torch.empty(0, dtype=torch.long, device=out.x.device), out.x[:0]

    # ---- tools for variants ----------------------------------------------------------------------

    def ramp(self, until):
        """0 .. 1 over the fraction `until` of the run; 1 at once if it is 0."""
        return min(1.0, self.progress / until) if until else 1.0

    def decay(self):
        """1, falling linearly to 0 over the last `lr_decay` of the run."""
        return min(1.0, (self.steps - self.step) / max(1, self.lr_decay * self.steps))

    def due(self, fraction):
        """Whether something done once every `fraction` of the run is due after this step; 0:
        never."""
        return fraction > 0 and (self.step + 1) % max(1, round(fraction * self.steps)) == 0

    def memory(self, fraction):
        """The newest value's weight in a moving average over `fraction` of the run; a mean at
        first."""
        return max(1 / (self.step + 1), min(1.0, 1 / max(1e-9, fraction * self.steps)))

    def track(self, name, fresh=None, memory=0.02, start=0.0):
        """Add a buffer [d_sae] that follow() averages over `memory` of the run, from `start`. A
        restarted latent's value is `fresh`; None: it keeps its own."""
        self.register_buffer(name, torch.full((self.d_sae,), float(start)))
        self.latents[name] = (0, fresh)
        self.memories[name] = memory

    def follow(self, name, value):
        """Move a tracked buffer towards `value` [d_sae]."""
        getattr(self, name).lerp_(value.float(), self.memory(self.memories[name]))

    def generator(self, salt=""):
        """A generator on the SAE's device for this step's random numbers."""
        return generator(self.seed, self.step, salt, device=self.b_dec.device)

    @property
    def path(self):
        """"sparse" or "dense": how products with acts are made in training, by a fixed rule.

        CPU, measured at 96 x 1,024 to 512 x 16,384: a sparse step wins below about 5 % of the
        latents. GPU, measured at 768 x 6,144 to 2,304 x 65,536: it never wins.
        """
        l0 = max(self.l0, self.l0 * self.sparsity_start)
        return "dense" if self.b_dec.is_cuda or l0 >= 0.05 * self.d_sae - 4 else "sparse"

    def nonzeros(self, acts):
        """Fired of acts [B, d_sae]: as activate() found it, or looked for if a method changed
        acts."""
        if self.fired is not None and acts is self.fired.acts:
            return self.fired
        at = above(acts.detach(), 0)
        rows, latents = rows_and_latents(at, self.d_sae)
        return Fired(acts, Pick.apply(acts, at), rows, latents, row_starts(rows, len(acts)))

    def row_sums(self, acts, weights=None):
        """Sum of each row of acts [B]; weights: each latent's factor on its acts [d_sae]."""
        if not (self.training and self.path == "sparse"):
            return (acts if weights is None else acts * weights).sum(-1)
        fired = self.nonzeros(acts)
        values = fired.values
        if weights is not None:
            values = values * weights.index_select(0, fired.latents)
        return values.new_zeros(len(acts)).index_add(0, fired.rows, values)

    def firing(self, acts):
        """The share of the rows of acts [B, d_sae] in which each latent fires [d_sae]."""
        if self.fired is not None and acts is self.fired.acts:
            fires = (self.fired.values > 0).float()
            total = fires.new_zeros(self.d_sae).index_add_(0, self.fired.latents, fires)
            return total / len(acts)
        if acts.is_cuda:
            return (acts > 0).float().mean(0)
        fires = (acts.detach() > 0).numpy().sum(0)         # a third of torch's time
        return torch.from_numpy(fires) / len(acts)

    def wanted_l0(self):
        """The L0 that training wants now, geometrically from sparsity_start * l0 to l0."""
        start = self.sparsity_start ** (1 - self.ramp(self.sparsity_warmup))
        return min(self.l0 * start, self.d_sae / 2)

    def sparsity(self, out):
        """The sparsity penalty before its weight, mean over rows."""
        return self.sparsifier.penalty(out)

    def steer_sparsity(self, l0):
        """Hold L0, `l0` in this batch, at wanted_l0(): a step moves the cut by a part of the error,
        less towards the end, as a batch's L0 is noisy; and the weight, until the cut need not
        move."""
        error = (l0.clamp_min(1e-3) / self.wanted_l0()).log()
        self.sparsifier.nudge(self.sparsity_gain * self.decay() * error.clamp(-1, 1))
        growth = (error / (self.sparsity_memory * self.steps)).clamp(-0.2, 0.2)
        self.sparsity_scale.mul_(growth.exp())

    def scale_encoder(self, x):
        """Multiply the encoder by the factor that makes the latents reconstruct x [n, d_in]
        best."""
        read = self.decode(self.activate(self.pre_acts(x))) - self.b_dec
        factor = ((x - self.b_dec) * read).sum() / read.pow(2).sum().clamp_min(1e-12)
        self.W_enc.mul_(factor)
        self.b_enc.mul_(factor)
        self.sparsifier.rescale(factor)

    def losses(self, out):
        """Named scalars: recon and each penalty times its weight. Training minimises their sum."""
        terms = {"recon": self.recon_error(out).mean()}
        for name, value in self.penalties(out).items():
            weight = getattr(self, f"{name}_weight")
            if weight:
                terms[name] = weight * self.penalty_scale(name) * value
        return terms

    def dead(self):
        """Mask [d_sae] of the latents that have been silent for `dead_after` of the run."""
        return self.silent > self.dead_after * self.steps

    def aux(self, out):
        """AuxK: what of the residual the d_in / 2 highest dead latents leave, over the residual's
        variance (Gao 2024, A.2)."""
        dead = self.dead().nonzero().flatten()
        k = min(len(dead), max(1, self.d_in // 2))
        # softplus, not relu: a dead latent's pre is mostly negative
        if self.path == "dense":
            pre = out.pre.index_select(1, dead)
            top = pre.topk(k, sorted=False)
            values = F.softplus(top.values)
            acts = values.new_zeros(pre.shape).scatter(1, top.indices, values)
            guess = acts @ self.W_dec.index_select(0, dead)
        else:
            chosen = out.pre.detach().index_select(1, dead).topk(k, sorted=False).indices
            latents = dead[chosen].flatten()
            rows = torch.arange(len(out.x), device=dead.device).repeat_interleave(k)
            values = F.softplus(Pick.apply(out.pre, rows * self.d_sae + latents))
            starts = row_starts(rows, len(out.x))
            guess = Decode.apply(values, self.W_dec, rows, latents, starts)
        residual = (out.x - out.x_hat).detach()
        variance = residual.var(0, correction=0).mean().clamp_min(1e-12)
        return (residual - guess).pow(2).mean() / variance

    def column_cosines(self, acts, latents):
        """Cosines between the columns of acts [B, d_sae] of `latents` [n]: who fires together [n,
        n]."""
        columns = acts.index_select(1, latents).float()
        norm = columns.norm(dim=0)
        # a silent latent has no gradient either: jumprelu would multiply it by 1 / norm
        columns = torch.where(norm > 1e-6, columns / norm.clamp_min(1e-6), 0.0)
        return columns.T @ columns

    @torch.no_grad()
    def near_pairs(self, threshold):
        """Latents that have a more frequent one near: (rarer [n], their nearest more frequent one
        [n]). Near: cosine of decoder rows above `threshold`."""
        order = self.rate.argsort(descending=True, stable=True)
        W = unit(self.W_dec[order])
        rarer, nearest = [], []
        for i in range(0, self.d_sae, 1024):
            cos = (W[i:i + 1024] @ W[:i + 1024].T).tril(i - 1)     # with all that fire more often
            best = cos.max(1)
            near = (best.values > threshold).nonzero().flatten()
            rarer.append(order[i + near])
            nearest.append(order[best.indices[near]])
        return torch.cat(rarer), torch.cat(nearest)

    def bad_rows(self, out, n):
        """Indices of n rows of the batch, drawn by the square of their squared error, as in Bricken
        2023; n <= B."""
        error = (out.x - out.x_hat).float().pow(2).sum(-1)
        drawn = error.pow(2).multinomial(max(1, n), generator=self.generator("bad_rows"))
        return drawn[:n]

    @torch.no_grad()
    def reset_latents(self, opt, which, directions, x, encoder=1.0):
        """Restart latents `which` [n] at `directions` [n, d_in]: unit decoder rows, encoder columns
        of `encoder` times the others' mean norm, with relu and jumprelu firing on the rows x
        [B, d_in] at the wanted rate. Exactly their optimizer moments are cleared."""
        others = torch.ones(self.d_sae, dtype=torch.bool, device=which.device)
        others[which] = False
        norm = self.W_enc.norm(dim=0)[others if others.any() else which].mean()
        directions = unit(directions.to(self.W_dec.dtype))
        self.W_dec[which] = directions
        self.W_enc[:, which] = directions.T * norm * encoder
        for name, (axis, fresh) in self.latents.items():
            tensor = getattr(self, name)
            if fresh is not None:
                tensor.data.index_fill_(axis, which, fresh)
            for moment in opt.state.get(tensor, {}).values():
                if torch.is_tensor(moment) and moment.shape == tensor.shape:
                    moment.index_fill_(axis, which, 0.0)
        rank = round(len(x) * (1 - min(0.5, self.l0 / self.d_sae)))
        cut = kth_smallest(self.pre_acts(x)[:, which], max(1, rank), dim=0)
        if self.activation == "relu":
            self.b_enc[which] -= cut
        if self.activation == "jumprelu":
            self.log_threshold[which] = cut.clamp_min(1e-3).log()

    # ---- SAELens' format -------------------------------------------------------------------------

    def saelens_weights(self):
        """(SAELens' architecture, its weights for raw activations). A variant that SAELens has
        under another name overrides this."""
        for method in ("forward", "pre_acts", "activate", "decode"):
            if getattr(type(self), method) is not getattr(SAE, method):
                raise Refuse(f"{type(self).__module__} overrides {method}(): SAELens has no such "
                             "architecture")
        weights = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc / self.scale,
                   "b_dec": self.b_dec / self.scale + self.mean}
        # x - b_dec = (raw - mean) * scale - b_dec, which is (raw - raw b_dec) * scale
        if self.activation == "jumprelu":
            return "jumprelu", weights | {"threshold": self.log_threshold.exp() / self.scale}
        if self.activation == "batch_topk":                # at inference a fixed threshold
            threshold = (self.threshold / self.scale).expand(self.d_sae)
            return "jumprelu", weights | {"threshold": threshold}
        return {"relu": "standard", "topk": "topk"}[self.activation], weights

    def to_saelens(self, folder, model_name=None, hook_name=None):
        """Write `folder` so that sae_lens.SAE.load_from_disk(folder) gives the same on raw
        activations."""
        architecture, weights = self.saelens_weights()
        config = {"architecture": architecture, "d_in": self.d_in, "d_sae": self.d_sae,
                  "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
                  "normalize_activations": "none", "reshape_activations": "none",
                  "metadata": {"sae_lens_version": "6.54.12", "model_name": model_name,
                               "hook_name": hook_name}}
        if architecture == "topk":
            config |= {"k": round(self.l0), "rescale_acts_by_decoder_norm": False}
        tensors = {k: v.detach().float().cpu().contiguous() for k, v in weights.items()}
        write_file(Path(folder) / "sae_weights.safetensors", safetensors.torch.save(tensors))
        write_file(Path(folder) / "cfg.json", json.dumps(config, indent=1).encode())

    @staticmethod
    def from_saelens(folder):
        """The SAE, in eval mode, of a folder in SAELens' format: standard, topk or jumprelu. Any
        field that would change the reconstruction and is not understood is refused."""
        config = json.loads((Path(folder) / "cfg.json").read_text(encoding="utf-8"))
        weights = safetensors.torch.load((Path(folder) / "sae_weights.safetensors").read_bytes())
        known = ("architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input",
                 "rescale_acts_by_decoder_norm", "metadata", "device", "dtype")
        unknown = ", ".join(f"{name}={value}" for name, value in config.items()
                            if name not in known and value not in ("none", None))
        architecture = config["architecture"]
        if architecture not in ("standard", "topk", "jumprelu") or unknown:
            raise Refuse(f"{folder}: SAELens architecture {architecture} {unknown}: can't be read "
                         "here; want standard, topk or jumprelu without these")
        weights = {name: w.float() for name, w in weights.items()}
        if not config.get("apply_b_dec_to_input", True):
            weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
        if config.get("rescale_acts_by_decoder_norm"):  # acts count in units of decoder rows
            norm = weights["W_dec"].norm(dim=-1)
            weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norm, weights["b_enc"] * norm
            weights["W_dec"] = unit(weights["W_dec"])
        activation = "relu" if architecture == "standard" else architecture
        settings = {"activation": activation, "d_sae": config["d_sae"],
                    "l0": float(config.get("k") or 1)}
        sae = SAE(config["d_in"], 1, **settings)
        if architecture == "jumprelu":
            weights["log_threshold"] = weights.pop("threshold").clamp_min(0).log()
        sae.load_state_dict(weights, strict=False)
        sae.step = sae.steps
        return sae.eval()

    # ---- settings --------------------------------------------------------------------------------

    @classmethod
    def chain(cls):
        """The classes that make this one, base first."""
        return [c for c in reversed(cls.__mro__) if issubclass(c, SAE)]

    @classmethod
    def settings(cls):
        """All settings with their defaults: the public bool, int, float and str class
        attributes."""
        found = {}
        for c in cls.chain():
            for name, value in vars(c).items():
                if isinstance(value, (bool, int, float, str)) and not name.startswith("_"):
                    found[name] = getattr(cls, name)
        return found

    @classmethod
    def options(cls, name):
        """The values that setting `name` may have, or None if any of its type will do."""
        for c in cls.__mro__:
            default = vars(c).get(name)
            if isinstance(default, choice):
                return default.options
        return None

    @classmethod
    def check(cls, settings):
        """Refuse settings that no run can have; `settings` has them all."""
        inf, few = math.inf, 1 if settings["activation"] == "topk" else 1e-9
        for name, low, high in (("d_sae", 1, 2 ** 24), ("l0", few, max(1, settings["d_sae"] / 2)),
                                ("lr", 1e-12, inf), ("lr_warmup", 0, 1), ("lr_decay", 0, 1),
                                ("clip", 1e-12, inf), ("batch_size", 1, 2 ** 24),
                                ("micro_batches", 1, max(1, settings["batch_size"] // 16)),
                                ("sparsity_start", 1e-9, inf), ("sparsity_warmup", 0, 1),
                                ("dead_after", 0, 1)):
            if not low <= settings[name] <= high:
                raise Refuse(f"--set {name}={settings[name]}: want {low:g} to {high:g}", 2)
        for name, value in settings.items():
            options = cls.options(name)
            if options and value not in options:
                raise Refuse(f"--set {name}={value}: want {' or '.join(options)}", 2)

    @classmethod
    def sources(cls):
        """{file: its text} of the class chain, base first."""
        files = [Path(inspect.getfile(c)) for c in cls.chain()]
        return {file: file.read_text(encoding="utf-8") for file in files}

    @classmethod
    def source(cls):
        """What runs, in one text: the source files of the class chain, base first."""
        return "\n\n".join(f"# ---- {f.name}\n\n{text}" for f, text in cls.sources().items())

    @classmethod
    def code_checksum(cls):
        """Changes when code that trains or runs this SAE does, not when a comment or docstring
        does."""
        # sae.py's second half trains nothing
        texts = [text.split("\n# ==== ")[0] for text in cls.sources().values()]
        return checksum("\n".join(code_of(text) for text in texts).encode())


def code_of(text):
    """Python source without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).replace("'", '"')             # Python 3.12 quotes f-strings otherwise


# ==== variants and runs: what follows finds, reads and writes, and trains nothing =================


def variant_names():
    return ["baseline"] + sorted(p.stem for p in (ROOT / "variants").glob("[a-z]*.py"))


def nearest(word, known):
    """The end of an error message about a mistyped word: the known one that is most like it."""
    near = difflib.get_close_matches(word, known, 1)
    return f", did you mean {near[0]}?" if near else ""


def load_variant(name):
    """The class that variants/NAME.py defines; `baseline` is the base itself."""
    if name == "baseline":
        return SAE
    if name not in variant_names():
        raise Refuse(f"no variant {name!r} in variants/{nearest(name, variant_names())} "
                     "(02_train.py --list shows all)", 2)
    try:
        variant = importlib.import_module(f"variants.{name}").Variant
    except Exception as e:
        raise Refuse(f"variants/{name}.py does not load: {type(e).__name__}: {e}", 5) from e
    if not (isinstance(variant, type) and issubclass(variant, SAE)):
        raise Refuse(f"variants/{name}.py: Variant is no subclass of SAE", 5)
    return variant


def docstring_line(name):
    """The first docstring line of a variant, `NAME = PARENT + what`."""
    if name == "baseline":
        return "baseline = ReLU with an L1 penalty (the class SAE in sae.py)"
    return (ROOT / "variants" / f"{name}.py").read_text(encoding="utf-8").split("\n")[0].strip('"')


def parent_of(name):
    """The variant of the row before, the last base class; None for the baseline."""
    cls = load_variant(name)
    if cls is SAE:
        return None
    parent = cls.__bases__[-1]
    return "baseline" if parent is SAE else parent.__module__.split(".")[-1]


def parse_settings(cls, pairs):
    """['l0=32', 'clip=0.5'] -> {'l0': 32.0, 'clip': 0.5}: settings of `cls`, of their types."""
    known, found = cls.settings(), {}
    del known["paired"]                    # says something of the variant's batches
    idle = {name: why for c in cls.chain() for name, why in c.fixed.items()}
    variant = cls.__module__.split(".")[-1]
    for pair in pairs:
        key, _, text = pair.partition("=")
        if not key or not text:
            raise Refuse(f"--set {pair!r}: want name=value", 2)
        if key not in known:
            raise Refuse(f"--set {key}: {variant} has no such setting{nearest(key, known)}", 2)
        if key in idle:
            raise Refuse(f"--set {key}: has no effect in {variant}: {idle[key]}", 2)
        if key in found:
            raise Refuse(f"--set {key}: given twice", 2)
        found[key] = parse_value(key, text, known[key])
    return found


def parse_value(key, text, default):
    """`text` as a value of the type of `default`; numbers are finite."""
    kind = str if isinstance(default, str) else type(default)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            number = float(text)
            if math.isfinite(number) and (kind is float or number.is_integer()):
                return kind(number)
    if kind is str and re.fullmatch(r"\w[\w.-]{0,59}", text, re.ASCII):
        return text
    raise Refuse(f"--set {key}={text}: want {kind.__name__}", 2)


def load_run(folder):
    """(SAE in eval mode, config) of a finished run; Refuse if the variant's code changed since."""
    folder = Path(folder)
    config = read_json(folder / "config.json", "status", "variant", "acts", "settings")
    if config["status"] != "done":
        raise Refuse(f"{folder} is not finished (status {config['status']}): run 02_train.py again",
                     5)
    cls = load_variant(config["variant"])
    if cls.code_checksum() != config["code_checksum"]:
        raise Refuse(f"{folder}: the code of {config['variant']} changed since (what ran is in its "
                     "code.py): train it again", 5)
    sae = cls(config["d_in"], config["steps"], config["seed"], **config["settings"])
    sae.load_state_dict(read_tensors(folder / "sae.safetensors", config["sae_checksum"])[0])
    sae.step = sae.steps
    return sae.eval(), config


def run_folders(folders):
    """Folders of runs: those given, or all under runs/."""
    where = "among the folders given" if folders else "under runs/"
    folders = folders or sorted(path.parent for path in Path("runs").glob("*/config.json"))
    found = [Path(folder) for folder in folders if not Path(folder).name.startswith("controls-")]
    if not found:
        raise Refuse(f"no runs {where}: run 02_train.py first")
    for folder in found:
        if not (folder / "config.json").exists():
            raise Refuse(f"{folder} is not a run: {folder}/config.json does not exist", 2)
    return list(dict.fromkeys(found))


def read_log(folder, config):
    """The lines of a run's metrics.jsonl; Refuse if a finished run's is not as the run left it."""
    path = Path(folder) / "metrics.jsonl"
    blob = path.read_bytes() if path.exists() else b""
    if config.get("log_checksum", checksum(blob)) != checksum(blob):
        raise Refuse(f"{path} is damaged, cut short or edited: delete {folder}, train it again")
    return [json.loads(line) for line in blob.split(b"\n")[:-1]]  # what follows is being written


# ---- language models: loading, and where a hook sits ---------------------------------------------


def model_files(path):
    """(folder or hub name, {"gguf_file": name} if its weights are a .gguf file) of a model."""
    path = Path(path)
    found = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if found and found[0].is_file() and not (path / "config.json").is_file():
        if len(found) > 1:
            raise Refuse(f"model {path}: the folder has {len(found)} .gguf files: name one", 2)
        return str(found[0].parent), {"gguf_file": found[0].name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise Refuse(f"model {path}: the folder has no config.json, so it is not a model", 2)
    return str(path), {}


def model_config(path, **extra):
    """The configuration of a causal language model, read whole.

    Version 4 of transformers would take its own rotary base for the `rope_parameters` that version
    5 writes, without a word: Refuse what the installed one does not read.
    """
    import transformers
    folder, gguf = model_files(path)
    config = transformers.AutoConfig.from_pretrained(folder, **gguf, **extra)
    if config.is_encoder_decoder:
        raise Refuse(f"model {path} is an encoder-decoder: want a causal language model")
    if gguf:
        return config
    extra.pop("trust_remote_code", None)
    written, _ = transformers.PretrainedConfig.get_config_dict(folder, **extra)
    version = written.get("transformers_version", "unknown")
    unread = unread_keys(config, written, version)
    unread |= unread_keys(config.get_text_config(), written.get("text_config") or {}, version)
    if unread:
        raise Refuse(f"model {path} was written by transformers {version}, and its config.json has "
                     f"{', '.join(sorted(unread))}, which transformers {transformers.__version__} "
                     "does not read: install the newer one")
    return config


def unread_keys(config, written, version):
    """The keys of `written`, by this version of transformers, that the installed one ignores."""
    import transformers
    blank = type(config)()
    unread = {key for key in written if written[key] is not None and not hasattr(blank, key)}
    unread.discard("auto_map")                             # of --trust-remote-code
    if release(version) <= release(transformers.__version__):
        unread &= {"rope_parameters"}                      # the rest is a model's own remarks
    if "rope_parameters" in unread and translate_rope(config, written["rope_parameters"]):
        unread.remove("rope_parameters")
    return unread


def translate_rope(config, rope):
    """Set the rotary settings of version 5 under their names of version 4; whether all have one."""
    named = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in named}
    if scaling != {"rope_type": "default"}:
        named["rope_scaling"] = scaling
    takes = inspect.signature(type(config).__init__).parameters
    if "rope_theta" not in rope or not set(named) <= set(takes):
        return False                                       # such as a base for each kind of layer
    for key, value in named.items():
        setattr(config, key, value)
    return True


def release(version):
    """[5, 2] of "5.2.0"."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def model_tokenizer(path, **extra):
    """The tokenizer of a language model, a hub name, folder or .gguf file."""
    import transformers
    folder, gguf = model_files(path)
    files = " ".join(file.name for file in Path(folder).glob("*"))
    if Path(folder).is_dir() and not gguf and not re.search(r"tokenizer|vocab|\.model\b", files):
        raise Refuse(f"model {path}: the folder has no tokenizer: save the model's there too")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **gguf, **extra)
    except ValueError as e:
        if "TokenizersBackend" not in str(e):
            raise
        raise Refuse(f"model {path}: its tokenizer was written by transformers 5, which "
                     f"{transformers.__version__} does not read: install the newer one") from e


def language_model(path, dtype, **extra):
    """The causal language model of a hub name, folder or .gguf file, in eval mode.

    Weights in pickle files are read only if remote code is trusted.
    """
    import transformers
    folder, gguf = model_files(path)
    config = model_config(path, **extra)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        extra["attn_implementation"] = "eager"             # Gemma-2: sdpa leaves the soft cap out
    if not extra.get("trust_remote_code") and not gguf:
        extra["use_safetensors"] = True
    if not gguf:
        extra["config"] = config
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    size *= dtype.itemsize / (config.dtype or torch.float32).itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise Refuse(f"model {path} needs {size / 1e9:,.0f} GB as {dtype}, this machine has "
                     f"{memory / 1e9:,.0f} GB of memory: take a smaller model", 4)
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **gguf, **extra)
    except OSError as e:
        if not re.search("no file named .*safetensors|not appear to have a file named", str(e)):
            raise
        raise Refuse(f"model {path} has no weights in safetensors files: save them so, or add "
                     "--trust-remote-code (pickle files can run code)") from e
    if lacking := sorted(found["missing_keys"]):           # which transformers makes at random
        raise Refuse(f"model {path}: its files lack {len(lacking)} of its weights, as "
                     f"{lacking[0]}: save the model again, under the names of its class")
    # stage 1's hook ends a pass early, and what collects these for the output would stay in place
    for part in (model.config, model.config.get_text_config()):
        for given in ("hidden_states", "attentions", "router_logits"):
            setattr(part, f"output_{given}", False)
    return model.eval()


ABSENT = ("is neither on the hub (or private: set HF_TOKEN) nor a file or folder here", 2)
UNREACHABLE = ("cannot be fetched, the hub is not reachable: check the network, set "
               "HF_HUB_OFFLINE=1 if it was fetched before, or give a local folder", 4)
HUB_ERRORS = {       # class in the chain of causes, or HTTP status -> (what to say, exit code)
    "GatedRepoError": ("is gated: accept its terms on https://huggingface.co/{page}, then "
                       "`hf auth login` or set HF_TOKEN", 4),
    "OfflineModeIsEnabled": ("is not in the local cache and HF_HUB_OFFLINE is set: unset it, or "
                             "give a local folder", 4),
    "RepositoryNotFoundError": ABSENT,
    "DatasetNotFoundError": ABSENT,
    "HFValidationError": ABSENT,
    "LocalEntryNotFoundError": ("is not in the local cache and the hub is not reachable: check "
                                "the network, or give a local folder", 4),
    "ConnectionError": UNREACHABLE,
    "TransportError": UNREACHABLE,                         # of httpx: also a hub that is too slow
    "Timeout": UNREACHABLE,
    "RevisionNotFoundError": ("no longer has the revision that was cached: cache again", 3),
    "EntryNotFoundError": ("lacks a file that is needed", 3),
    "HTTP 401": ("cannot be fetched, the hub does not know the token: `hf auth login` again", 4),
    "HfHubHTTPError": ("cannot be fetched: the hub answers {status}: try again later", 4),
}


@contextlib.contextmanager
def hub_errors(kind, name):
    """Turns what transformers, datasets and the hub raise into one line, by the chain of causes."""
    try:
        yield
    except Exception as e:
        if isinstance(e, Refuse) or is_out_of_memory(e):
            raise
        chain, cause, status = [], e, None
        while cause:
            status = getattr(getattr(cause, "response", None), "status_code", status)
            chain += [parent.__name__ for parent in type(cause).__mro__] + [f"HTTP {status}"]
            cause = cause.__cause__ or cause.__context__
        unknown = (f"does not load: {type(e).__name__}: {first_lines(e)}", 3)
        said, code = next((HUB_ERRORS[c] for c in HUB_ERRORS if c in chain), unknown)
        page = f"datasets/{name}" if kind == "data set" else str(name)
        said = said.replace("{page}", page).replace("{status}", str(status))
        raise Refuse(f"{kind} {name} {said}", code) from e


def first_lines(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or "no message"


def decoder_layers(model, n_layers, name):
    """The decoder layers: the outermost ModuleList with one entry per layer."""
    lists = [(path.count("."), path, m) for path, m in model.named_modules()
             if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise Refuse(f"{name}: found no list of {n_layers} decoder layers to hook")
    return min(lists)[2]


def hook_point(layer, hook, name):
    """The module of a decoder layer whose output is `hook`, as TransformerLens names the hooks."""
    if hook == "resid_post":
        return layer
    if hasattr(layer, "post_feedforward_layernorm"):       # Gemma-2, OLMo-2: its output is added
        names = ["post_attention_layernorm" if hook == "attn_out" else "post_feedforward_layernorm"]
    elif hook == "attn_out":                               # the first two are of GLM-4, as above
        names = ["post_self_attn_layernorm", "self_attn", "attention", "attn", "self_attention"]
    else:
        names = ["post_mlp_layernorm", "mlp", "feed_forward", "block_sparse_moe"]
    found = [getattr(layer, n) for n in names if hasattr(layer, n)]
    if not found:
        there = ", ".join(n for n, _ in layer.named_children())
        raise Refuse(f"{name}: its layers have no {hook} (none of {', '.join(names)}), only "
                     f"{there}")
    return found[0]


MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".py", ".gguf")


def model_checksum(folder):
    """Of all that makes the language model in a folder."""
    folder = Path(folder)
    there = [folder] if folder.suffix == ".gguf" else sorted(folder.iterdir())
    return files_checksum([path for path in there if path.suffix in MODEL_FILES])


# ---- command lines -------------------------------------------------------------------------------


class Refuse(Exception):
    """What is wrong, where, and what to do, in one line.

    code: 2 usage, 3 data, 4 environment, 5 a run went wrong, 6 busy.
    """

    def __init__(self, message, code=3):
        super().__init__(message)
        self.code = code


def run_script(main):
    """Run a script's main(), and exit with its code.

    What it refuses, or what the machine lacks, ends in one line on stderr and an exit code that is
    not 0; anything else is a bug and shows its traceback. SIGTERM is Ctrl-C.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code, said = main() or 0, None
        sys.stdout.flush()
    except KeyboardInterrupt:
        code, said = 130, "interrupted: the same command goes on from what is saved"
    except Refuse as e:
        code, said = e.code, f"error: {e}"
    except BrokenPipeError:                                # `| head -1` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, said = 0, None
    except OSError as e:
        code, said = 4, f"error: {e.filename or 'the machine'}: {e.strerror or e}"
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        code, said = 4, f"error: out of memory: {first_lines(e)}"
    if said:
        print(" ".join(said.split()), file=sys.stderr)
    sys.exit(code)


def is_out_of_memory(e):
    """Whether an exception says so; for a CPU's memory torch raises a plain RuntimeError."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)


class Parser(argparse.ArgumentParser):
    """argparse with the docstring as it stands, no abbreviated flags, and errors in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise Refuse(f"{message} (--help lists the flags)", 2)


def positive_int(text):
    """A whole number above 0; 2_000_000 is fine."""
    if not re.fullmatch(r"[1-9](_?\d){0,17}", text, re.ASCII):
        raise argparse.ArgumentTypeError("want a whole number above 0, such as 2_000_000, not "
                                         f"{text!r}")
    return int(text)


def natural(text):
    """A whole number, 0 too."""
    return 0 if text == "0" else positive_int(text)


def ranks():
    """(rank, processes): which of torchrun's processes this is; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name=None):
    """The device called `name`. Default: a GPU, under torchrun this process' own, else the CPU."""
    if name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    if name is None:
        if torch.version.cuda and Path("/proc/driver/nvidia").exists():
            print("WARNING: this torch finds no GPU although a driver is there: running on the "
                  f"CPU. Does the driver fit CUDA {torch.version.cuda}?", file=sys.stderr)
        name = "cpu"
    if name not in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        raise Refuse(f"--device {name}: want cpu, or cuda where there is a GPU", 2)
    return torch.device(name)


def check_name(flag, name, also=""):
    """The name, which becomes a folder's: no path, not hidden, not too long. also: characters."""
    if not re.fullmatch(rf"[\w+][\w.+{also}-]{{0,199}}", name, re.ASCII):
        raise Refuse(f"{flag} {name!r}: want a name of at most 200 letters, digits and "
                     ". _ + -", 2)
    return name


# ---- files: written whole or not at all, and checked when read -----------------------------------


def checksum(data):
    """xxh3-128 of bytes, in hex; against accidents, not against attackers."""
    return xxhash.xxh3_128_hexdigest(data)


def files_checksum(files):
    """xxh3-128 over the names, sizes and contents of files."""
    total = xxhash.xxh3_128()
    for path in files:
        total.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as f:
            while block := f.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def write_file(path, *blocks):
    """Write bytes so that `path` holds either all of them, on disk, or what it held before."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.writelines(blocks)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Refuse(f"disk full while writing {path}: free some space, then run the same "
                         "command again", 4) from e
        raise Refuse(f"cannot write {path}: {e.strerror}", 4) from e
    finally:
        with contextlib.suppress(OSError):                 # it is renamed, or never could be made
            temporary.unlink()


def lock(folder, wait=False):
    """Hold `folder`, made if need be, until the returned lock is released or the process ends.

    What a killed process left half-written is removed. wait: for its holder; else Refuse if it is
    held.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(Path(folder) / ".lock", timeout=-1 if wait else 0)
        held.acquire()
    except filelock.Timeout:
        raise Refuse(f"{folder} is in use by another process: wait for it, or stop it", 6) from None
    except OSError as e:
        raise Refuse(f"cannot write {folder}/.lock: {e.strerror}", 4) from e
    for leftover in [*Path(folder).glob(".*.tmp"), *Path(folder).glob("*/.*.tmp")]:
        leftover.unlink()
    return held


def write_json(path, value):
    """Strict JSON (no NaN), with a checksum of itself."""
    value = {k: v for k, v in value.items() if k != "checksum"}
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    value["checksum"] = checksum(text.encode())
    write_file(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def read_json(path, *keys):
    """What write_json wrote; Refuse if it is missing, damaged, edited, or lacks one of `keys`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        said = value.pop("checksum")
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except FileNotFoundError:
        raise Refuse(f"{path} is missing: run the stage before this one") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise Refuse(f"{path} is damaged ({type(e).__name__}): delete it and run the stage that "
                     "makes it") from e
    if said != checksum(text.encode()):
        raise Refuse(f"{path} is damaged or was edited (its checksum differs): run the stage that "
                     "makes it again")
    missing = sorted(set(keys) - set(value))
    if missing:
        raise Refuse(f"{path} is another file or of another version (no {' or '.join(missing)}): "
                     "run the stage that makes it again")
    return value


BLANK = b"0" * 32            # stands in the file for its checksum while that is computed


# in the order in which safetensors stores them
DTYPES = {"I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
          "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def write_tensors(path, tensors, meta=None):
    """Write {name: tensor} and `meta` as one safetensors file; returns the checksum in it.

    By hand: safetensors.torch.save() copies all data, which is half of the host's time in stage 1.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    about = {"checksum": BLANK.decode(), "format": FORMAT, **(meta or {})}
    header = {"__metadata__": {"meta": json.dumps(about, allow_nan=False)}}
    end, blocks = 0, []
    for _, name in sorted((list(codes).index(t.dtype), name) for name, t in tensors.items()):
        tensor = tensors[name].detach().cpu().contiguous()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
        flat = tensor.as_strided((tensor.numel(),), (1,))      # one value may have another stride
        blocks.append(flat.view(torch.uint8).numpy())
    header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    hashed = xxhash.xxh3_128(header)
    for block in blocks:
        hashed.update(block)
    written = hashed.hexdigest()
    write_file(path, header.replace(BLANK, written.encode(), 1), *blocks)
    return written


def read_tensors(path, expected=None, buffer=None):
    """({name: tensor}, meta) of a file by write_tensors.

    Refuse if any byte changed or its checksum is not `expected`. buffer: a uint8 tensor to read
    into and to keep, which the tensors are then views of.
    """
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            if buffer is None or len(buffer) < size:
                buffer = torch.empty(size, dtype=torch.uint8)
            blob = memoryview(buffer.numpy())[:size]
            f.readinto(blob[:8])
            start = 8 + int.from_bytes(blob[:8], "little")
            f.readinto(blob[8:start])
            header = json.loads(bytes(blob[8:start]))
            meta = json.loads(header.pop("__metadata__")["meta"])
            written = meta["checksum"].encode()
            hashed = xxhash.xxh3_128(bytes(blob[:start]).replace(written, BLANK, 1))
            for first in range(start, size, 1 << 20):      # a CPU's cache holds a block
                block = blob[first:first + (1 << 20)]
                f.readinto(block)
                hashed.update(block)
        if hashed.hexdigest() != meta["checksum"]:
            raise ValueError("its checksum differs")
        tensors = {}
        for name, entry in header.items():
            first, end = (start + offset for offset in entry["data_offsets"])
            tensors[name] = buffer[first:end].view(DTYPES[entry["dtype"]]).view(entry["shape"])
    except FileNotFoundError:
        raise Refuse(f"{path} is missing: run the stage before this one") from None
    except (ValueError, KeyError, TypeError, RecursionError, MemoryError, OverflowError,
            RuntimeError) as e:
        raise Refuse(f"{path} is damaged or not ours ({type(e).__name__}: {first_lines(e)}): "
                     "delete it and run the stage that makes it again") from e
    if expected and meta["checksum"] != expected:
        raise Refuse(f"{path} belongs to another cache or run (not the listed checksum): make it "
                     "again")
    return tensors, meta


class Acts:
    """Cached activations, the folder acts/NAME that 01_cache_acts.py writes.

    meta.json lists the shards. A shard holds `acts` [rows, d_in], `tokens`, `context` and
    `position` [rows]; its rows were shuffled across the whole cache, so that reading in order is
    random.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            there = sorted(p.parent.name for p in self.folder.parent.glob("*/meta.json"))
            hint = f"there are {', '.join(there)}" if there else "run 01_cache_acts.py first"
            raise Refuse(f"no activations in {folder}: {hint}", 2)
        self.meta = read_json(self.folder / "meta.json", "format", "complete", "d_in", "dtype",
                              "shards", "val")
        if self.meta["format"] != FORMAT:
            raise Refuse(f"{self.folder}/meta.json has format {self.meta['format']}, this is "
                         f"{FORMAT}: cache again")
        if not self.meta["complete"]:
            raise Refuse(f"{self.folder} is not finished: run the same 01_cache_acts.py again")
        self.d_in, self.shards = self.meta["d_in"], self.meta["shards"]
        self.mean, self.scale = torch.tensor(self.meta["mean"]), self.meta["scale"]
        self.norm_limit = self.meta["norm_limit"]
        self.rows = sum(shard["rows"] for shard in self.shards)
        self.checksum = checksum(json.dumps([shard["checksum"] for shard in self.shards]).encode())

    def shard(self, i, buffer=None):
        """The tensors of shard i, checked. buffer: see read_tensors()."""
        entry = self.shards[i]
        path = self.folder / entry["file"]
        tensors, _ = read_tensors(path, entry["checksum"], buffer)
        acts = tensors.get("acts", torch.empty(0))
        wanted = (entry["rows"], self.d_in), getattr(torch, self.meta["dtype"])
        if (tuple(acts.shape), acts.dtype) != wanted:
            raise Refuse(f"{path} has {list(acts.shape)} of {acts.dtype}, not {list(wanted[0])} of "
                         f"{wanted[1]}: cache again")
        if not all(bound.isfinite() for bound in torch.aminmax(acts)):
            raise Refuse(f"{path} has activations that are not finite: cache again, in bfloat16 or "
                         "float32")
        return tensors

    def val(self):
        """The held-out part: `tokens` [n, ctx]; of synthetic data `acts` and the true features."""
        return read_tensors(self.folder / self.meta["val"]["file"], self.meta["val"]["checksum"])[0]

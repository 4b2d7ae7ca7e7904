"""The base sparse autoencoder (SAE): every method that a variant may override, and the files that the scripts pass on.

    pre   = (x - b_dec) W_enc + b_enc        pre-activations of a batch of rows x        [B, d_sae]
    acts  = activation(pre)                  latent activations, sparse and >= 0         [B, d_sae]
    x_hat = acts W_dec + b_dec               reconstruction; the rows of W_dec are unit  [B, d_in]

Units: x is an activation times `scale`, so that E||x|| = sqrt(d_in); the reconstruction error is a mean over d_in, so an error of
1 is about the size of the data. `encode` and `reconstruct` take and give raw activations.

A variant is a subclass in variants/NAME.py that overrides the one method its idea is about (see the methods below the rule line,
which stand in the order in which training calls them). A public class attribute is a setting, changed by --set name=value.
"""
from __future__ import annotations      # the kernels' name Triton, which is loaded on a GPU alone

import argparse
import ast
import contextlib
import ctypes
import difflib
import errno
import fcntl
import functools
import importlib
import inspect
import json
import math
import os
import re
import secrets
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import nn

ROOT = Path(__file__).parent
SPARSE_BELOW = 0.05          # codes are sparse (see Codes) where fewer than this share of the latents, less 4, fire
FORMAT = 1                   # of every file written here; a reader refuses another one


class Out(NamedTuple):
    """What one forward pass gives; penalties and surgery read it."""
    x: torch.Tensor          # [B, d_in]   normalised activations
    pre: torch.Tensor        # [B, d_sae]  before the activation function
    acts: torch.Tensor       # [B, d_sae]  sparse, >= 0
    x_hat: torch.Tensor      # [B, d_in]   reconstruction


def unit(w):
    """Rows of w [n, d] scaled to length 1; a zero row stays zero."""
    return w / w.norm(dim=-1, keepdim=True).clamp_min(1e-12)


class Adam(torch.optim.Adam):
    """PyTorch's fused Adam, which goes through memory without a look at strides: where a gradient or a moment has another memory order than
    its parameter, the result is wrong and no error says so. Here they get the same one first."""

    def __init__(self, groups, **settings):
        super().__init__(groups, **settings, fused=True)

    def _init_group(self, group, params, grads, *others):
        for p in group["params"]:
            if p.grad is not None:
                p.grad = like(p, p.grad)
                self.state[p].update({name: like(p, value) for name, value in self.state[p].items()})
        found = super()._init_group(group, params, grads, *others)
        for tensors in (params, grads, *others[:2]):                             # others: both moments, ...
            tensors[:] = [t.T if t.ndim == 2 and not t.is_contiguous() else t for t in tensors]      # a transposed gradient would be copied, in vain
        return found


def like(p, tensor):
    """tensor; in the memory order of p where it has its shape."""
    return tensor if tensor.shape != p.shape or tensor.stride() == p.stride() else torch.empty_like(p).copy_(tensor)


def generator(*key, device="cpu"):
    """A random generator that depends on `key` alone, so that randomness is a function of (seed, step) and resuming is exact."""
    return torch.Generator(device).manual_seed(xxhash.xxh3_64_intdigest(repr(key).encode()) >> 1)


class JumpReLU(torch.autograd.Function):
    """pre where pre > threshold (> 0), else 0; the threshold's gradient by a rectangle kernel over relu(pre) (Rajamanoharan 2024b, eq. 11).

    Masks are numbers made in place (gt_ and lt_ give 1 or 0): where() and products with a bool cost a multiple of it on a CPU."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre - threshold.to(pre.dtype)).gt_(0).mul_(pre)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        cut = threshold.to(pre.dtype)
        near = pre.relu().sub_(cut).abs_().lt_(ctx.bandwidth / 2).mul_(grad).sum_to_size(threshold.shape)
        return (pre - cut).gt_(0).mul_(grad), -threshold / ctx.bandwidth * near, None


class Step(torch.autograd.Function):
    """1 where pre > threshold, else 0; gradient to the threshold alone (Rajamanoharan 2024b, eq. 12)."""

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


# ---- sparse codes: products touch the latents that fire, not the zeros ---------------------------------------------------------------
#
# Of a training step's five matrix products only the encoder's, which decides what fires, needs all of [B, d_sae]. Where few latents
# fire (SAE.sparse_pays), activate() gives acts as Codes. For whoever reads them they are a tensor like any other; but acts @ W touches
# the non-zeros alone, forwards and backwards, and so does the encoder's gradient, which reaches Encode as a sparse tensor.
# Nothing else changes: the dense form is what you get by computing with Codes.dense(), and tests compare the two.
#
# CPU time of a dense over a sparse step, one thread (topk; relu in brackets), where this share of the latents fires:
#     d_in x d_sae    batch                0.6 %        1.6 %        3.1 %   6.2 %        12.5 %
#     512 x 16,384      512   bfloat16     2.3                       1.3     0.8          0.6
#     512 x 4,096     1,024   bfloat16     2.5 (2.2)                 1.8     1.1 (1.0)    0.7 (0.6)
#     96 x 1,024      2,048   fp32                      2.0 (2.0)            1.2 (0.9)
#     96 x 1,024        512   fp32                      1.5 (1.4)    1.4     1.0 (0.9)
#     32 x 64           256   fp32                                           0.7
# jumprelu, by the share of entries near or above a threshold: 512 x 16,384: 1.3 (3.5 %), 0.3 (23 %); 512 x 4,096: 1.8 (3.1 %), 1.0 (9.5 %);
# 96 x 1,024, batch 2,048: 2.1 (3.1 %), 1.0 (10.4 %).
# Hence SPARSE_BELOW. On a GPU it is found out at the start: see kernels_pay().


class Codes(torch.Tensor):
    """acts [B, d_sae] as their non-zeros: `values` [n] of `latents` [n] in `rows` [n], row after row; row b starts at starts[b].

    `acts @ W`, addmm(b, acts, W) and acts[:, i:j] are sparse; every other use as a tensor is one of dense(), made once, when asked for.
    The tensor underneath is a NaN of the right shape: code that goes round PyTorch's functions gets no wrong zeros."""

    def __new__(cls, values, rows, latents, shape):
        return values.detach().new_full((1, 1), torch.nan).expand(shape).as_subclass(cls)

    def __init__(self, values, rows, latents, shape):
        self.values, self.rows, self.latents, self.full, self.whole = values, rows, latents, shape, None
        self.starts = starts(rows, shape[0])

    @classmethod
    def of(cls, pre, at, activation):
        """activation(values) at the flat indices `at` of pre, ascending in their row."""
        rows = at.div(pre.shape[1], rounding_mode="floor")
        return cls(activation(Pick.apply(pre, at)), rows, at - rows * pre.shape[1], pre.shape)

    def at(self):
        """Flat indices of the values [n]."""
        return self.rows * self.full[1] + self.latents

    def dense(self):
        """The same [B, d_sae] as an ordinary tensor, with the gradient that it should have."""
        if self.whole is None:
            flat = self.values.new_zeros(self.full.numel())
            self.whole = flat.scatter_add(0, self.at(), self.values).view(self.full)
        return self.whole

    def times(self, W):
        """acts @ W for W [d_sae, n] or [d_sae]."""
        if W.ndim == 1:
            return self.times(W[:, None])[:, 0]
        return Product.apply(self.values.to(W.dtype), W, self.rows, self.latents, self.starts)

    def block(self, start, stop):
        """The Codes of latents start .. stop - 1."""
        at = ((self.latents >= start) & (self.latents < stop)).nonzero()[:, 0]
        return Codes(self.values[at], self.rows[at], self.latents[at] - start, torch.Size((len(self), max(0, stop - start))))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        a = args[0]
        if func in SHAPE_OF:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        if func is torch.Tensor.detach:
            return Codes(a.values.detach(), a.rows, a.latents, a.full)
        if func in (torch.Tensor.matmul, torch.matmul) and type(a) is Codes and type(args[1]) is not Codes:
            return a.times(args[1])
        if func is torch.addmm and type(args[1]) is Codes and type(args[2]) is not Codes and not kwargs:
            return args[1].times(args[2]).add_(a)
        if func is torch.Tensor.__getitem__ and type(args[1]) is tuple and args[1][:1] == (slice(None),) and type(args[1][-1]) is slice:
            start, stop, step = args[1][-1].indices(a.full[1])
            if step == 1 and len(args[1]) == 2:
                return a.block(start, stop)
        dense = lambda v: v.dense() if isinstance(v, Codes) else type(v)(map(dense, v)) if type(v) in (list, tuple) else v
        return func(*dense(args), **{k: dense(v) for k, v in (kwargs or {}).items()})


SHAPE_OF = {torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.ndim.__get__, torch.Tensor.__len__}


def starts(sorted_rows, n):
    """Where each of n rows starts in a list of row numbers, ascending, and where the last one ends [n + 1]."""
    if sorted_rows.is_cuda:                                                      # where bincount would wait for the GPU, twice
        return torch.searchsorted(sorted_rows, torch.arange(n + 1, dtype=sorted_rows.dtype, device=sorted_rows.device))
    return nn.functional.pad(sorted_rows.bincount(minlength=n).cumsum(0), (1, 0))


def bag(values, columns, starts, W):
    """S @ W for a sparse S whose row b has values[starts[b]:starts[b + 1]] in `columns`."""
    if by_kernel(W):
        return bag_by_kernel(values, columns, starts, W)
    return nn.functional.embedding_bag(columns, W, starts, mode="sum", per_sample_weights=values.to(W.dtype), include_last_offset=True)


def bag_transposed(values, rows, columns, n, W):
    """S.T @ W [n, ...] for a sparse S with `values` at (rows, columns): one stable sort by column, so that bits don't depend on chance."""
    columns, order = columns.int().sort(stable=True)                             # int64 takes 2 to 4 times as long
    return bag(values[order], rows[order], starts(columns, n), W)


def dots(G, W, rows, columns, starts):
    """G[rows[i]] . W[columns[i]] for all i; rows ascend, and row b starts at starts[b]."""
    if by_kernel(W):
        return dots_by_kernel(G, W, rows, columns)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(G, W, columns, starts, rows, 0)


class Product(torch.autograd.Function):
    """acts @ W from the non-zeros of acts. Under autocast kernels read what a dense product would, bfloat16, and add in fp32."""

    @staticmethod
    def forward(ctx, values, W, rows, latents, starts):
        if by_kernel(W) and torch.is_autocast_enabled(W.device.type):
            W = W.to(torch.get_autocast_dtype(W.device.type))
        ctx.save_for_backward(values, W, rows, latents, starts)
        return bag(values, latents, starts, W)

    @staticmethod
    def backward(ctx, grad):
        values, W, rows, latents, starts = ctx.saved_tensors
        grad = grad.contiguous().to(W.dtype)
        to_values = dots(grad, W, rows, latents, starts)
        to_W = bag_transposed(values, rows, latents, len(W), grad) if ctx.needs_input_grad[1] else None
        return to_values, to_W, None, None, None


class Pick(torch.autograd.Function):
    """pre.flatten()[at]; the gradient is sparse where pre comes from Encode."""

    @staticmethod
    def forward(ctx, pre, at):
        ctx.save_for_backward(at)
        ctx.shape, ctx.sparse = pre.shape, isinstance(pre.grad_fn, Encode._backward_cls)
        return pre.take(at)

    @staticmethod
    def backward(ctx, grad):
        at, = ctx.saved_tensors
        if not ctx.sparse:
            return grad.new_zeros(ctx.shape.numel()).scatter_add(0, at, grad).view(ctx.shape), None
        rows = at.div(ctx.shape[1], rounding_mode="floor")
        return torch.sparse_coo_tensor(torch.stack([rows, at - rows * ctx.shape[1]]), grad, ctx.shape, check_invariants=False), None


class Encode(torch.autograd.Function):
    """(x - b_dec) W_enc + b_enc, with a gradient that costs one product: b_dec's is a vector's, and x is data."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec):
        x = x - b_dec
        ctx.save_for_backward(x, W_enc)
        return torch.addmm(b_enc, x, W_enc)

    @staticmethod
    def backward(ctx, grad):
        x, W_enc = ctx.saved_tensors
        x = x if grad.is_sparse and not grad.is_cuda else x.to(grad.dtype)       # embedding_bag would add in bfloat16
        if grad.is_sparse:
            (rows, latents), values = grad._indices(), grad._values()
            to_W = bag_transposed(values, rows, latents, W_enc.shape[1], x).T
            to_b = W_enc.new_zeros(len(to_W.T)).index_add(0, latents, values.to(W_enc.dtype))
        else:
            to_W, to_b = (grad.T @ x).T, grad.sum(0).to(W_enc.dtype)             # in W_enc's memory order, as above: it need not be copied
        to_x = grad.to(W_enc.dtype) @ W_enc.T if ctx.needs_input_grad[0] else None
        return to_x, to_W, to_b, -(W_enc @ to_b)


def above(pre, cut):
    """Flat indices of the entries of pre [B, d_sae] above `cut`, ascending; NaN counts as above, so that it is not overlooked."""
    mask = (pre.detach() <= cut).logical_not_().flatten()
    return mask.nonzero()[:, 0] if mask.is_cuda else torch.from_numpy(mask.numpy().nonzero()[0])      # numpy's is the faster one


def highest(pre, k):
    """The latents of the k highest entries of each row of pre [B, d_sae], in any order [B, k]. Where they are few, they are looked for in the
    k of d_sae / 8 groups with the highest maxima, where all of them are: 0.5 to 0.9 of the CPU time of topk alone."""
    if pre.is_cuda or pre.shape[1] % 8 or 32 * k > pre.shape[1]:
        return pre.topk(k, sorted=False).indices
    groups = pre.unflatten(1, (8, -1)).amax(1)                                   # group g: latents g, g + d_sae / 8, g + 2 d_sae / 8 ...
    inside = highest(groups, k)[:, :, None] + groups.shape[1] * torch.arange(8)
    inside = inside.flatten(1)
    return inside.gather(1, pre.gather(1, inside).topk(k, sorted=False).indices)


def nonzeros(acts):
    """The values among which all non-zeros of acts are: of Codes without making them dense."""
    return acts.values if isinstance(acts, Codes) else acts


def in_blocks(*tensors):
    """The same rows of each [n, d], some at a time, so few that they stay in a CPU's cache from one operation to the next."""
    return zip(*(t.split(max(1, 2 ** 16 // t.shape[1])) for t in tensors))


def firing(acts):
    """How often each latent fires: the share of the rows of acts [B, d_sae] where it is above 0 [d_sae]."""
    if isinstance(acts, Codes):
        return acts.values.new_zeros(acts.shape[1], dtype=torch.float32).index_add_(0, acts.latents, (acts.values > 0).float()) / len(acts)
    if not acts.is_cuda:
        return torch.from_numpy((acts > 0).numpy().sum(0)) / len(acts)           # a third of torch's time
    return (acts > 0).float().mean(0)


# ---- on a GPU: Triton kernels ----------------------------------------------------------------------------------------------------------
#
# Two do the sparse products of bag() and dots(), two what is done to the rows of W_dec around the optimizer, where by_kernel() says so.
# Each adds in a fixed order, in fp32, whatever it reads. No GPU has run them yet: tests run them by Triton's interpreter, on a CPU, and
# compile them for sm_80 and sm_90.
#
# What to expect, derived from rates and not measured: a row with k codes gathers k d_in numbers four times (decode, gradient of the
# values, of W_dec, of W_enc), the first two from memory, the others from the cache that holds the batch; dense it is four products of
# 2 d_sae d_in operations and some eight passes over [B, d_sae]. With 600 TFLOP/s and 3.4 TB/s (cache 7 TB/s) the two are equal, in
# bfloat16, where k is 0.9 % of d_sae (d_in 2,304: k 140 of 16,384, 570 of 65,536). kernels_pay() times both.

tl = None                    # triton.language, once compiled() was called: it takes long to load and is not wanted on a CPU


def gather_sum(out, values, columns, starts, W, d, N: tl.constexpr, D: tl.constexpr):
    """out[row] = sum of values[i] W[columns[i]], i from starts[row] to starts[row + 1]. A program has a row and D of its d columns."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * D + tl.arange(0, D)
    first, end = tl.load(starts + row), tl.load(starts + row + 1)
    sums = tl.zeros([N, D], tl.float32)
    for start in range(first, end, N):
        i = start + tl.arange(0, N)
        value, column = tl.load(values + i, i < end, 0.0).to(tl.float32), tl.load(columns + i, i < end, 0)
        w = tl.load(W + column[:, None] * d + at[None, :], (i < end)[:, None] & (at < d)[None, :], 0.0)
        sums += value[:, None] * w.to(tl.float32)
    tl.store(out + row * d + at, tl.sum(sums, 0), at < d)


def gather_dot(out, G, W, rows, columns, n, d, N: tl.constexpr, D: tl.constexpr):
    """out[i] = G[rows[i]] . W[columns[i]]. A program has N of the n places i."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    g, w = G + tl.load(rows + i, i < n, 0)[:, None] * d, W + tl.load(columns + i, i < n, 0)[:, None] * d
    sums = tl.zeros([N, D], tl.float32)
    for start in range(0, d, D):
        at = start + tl.arange(0, D)[None, :]
        inside = (i < n)[:, None] & (at < d)
        sums += tl.load(g + at, inside, 0.0).to(tl.float32) * tl.load(w + at, inside, 0.0).to(tl.float32)
    tl.store(out + i, tl.sum(sums, 1), i < n)


def project_rows(grad, W, d, D: tl.constexpr):
    """Take from each row of grad what is parallel to that row of W, whose rows are unit. A program has a row, of d <= D columns."""
    at = tl.arange(0, D)
    place, inside = tl.program_id(0).to(tl.int64) * d + at, at < d
    g, w = tl.load(grad + place, inside, 0.0).to(tl.float32), tl.load(W + place, inside, 0.0).to(tl.float32)
    tl.store(grad + place, g - w * tl.sum(g * w, 0), inside)


def unit_rows(W, d, D: tl.constexpr):
    """Scale each row of W to length 1. A program has a row, of d <= D columns."""
    at = tl.arange(0, D)
    place, inside = tl.program_id(0).to(tl.int64) * d + at, at < d
    w = tl.load(W + place, inside, 0.0).to(tl.float32)
    tl.store(W + place, w / tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-12), inside)


@functools.cache
def compiled(kernel):
    global tl
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")                       # Triton 3.9 warns where nothing is said
    import triton
    import triton.language as tl
    return triton.jit(kernel, do_not_specialize=["n"])


def tile(d):
    """(N, D): a program looks at 2,048 numbers at a time, D columns of N rows."""
    D = min(256, 1 << (d - 1).bit_length())
    return min(128, 2048 // D), D


def bag_by_kernel(values, columns, starts, W):
    (N, D), d = tile(W.shape[1]), W.shape[1]
    out = W.new_empty(len(starts) - 1, d, dtype=torch.float32)
    with torch.cuda.device_of(W):
        compiled(gather_sum)[len(out), -(-d // D)](out, values.contiguous(), columns, starts, W.contiguous(), d, N, D)
    return out


def dots_by_kernel(G, W, rows, columns):
    (N, D), d = tile(W.shape[1]), W.shape[1]
    out = W.new_empty(len(rows), dtype=torch.float32)
    with torch.cuda.device_of(W):
        compiled(gather_dot)[-(-len(out) // N),](out, G, W.contiguous(), rows, columns, len(out), d, N, D)
    return out


def rows_by_kernel(kernel, W, *others):
    """Change the rows of W [n, d] in place."""
    D = 1 << (W.shape[1] - 1).bit_length()
    with torch.cuda.device_of(W):
        compiled(kernel)[len(W),](W, *others, W.shape[1], D, num_warps=max(1, min(16, D // 512)))


def by_kernel(*tensors):
    """Whether what is to be done with these is done by kernels: on a GPU where they work."""
    return all(t.is_cuda and t.dtype != torch.float64 and t.is_contiguous() for t in tensors) and kernels_work(tensors[0].device)


@functools.cache
def kernels_work(device):
    """Whether Triton is there and the kernels compile, run and agree with PyTorch on a few random numbers: tried once; told if not."""
    g = generator("kernels", device=device)
    W, G, values = (torch.randn(size, generator=g, device=device) for size in ((30, 300), (20, 300), (200,)))
    rows, latents = (torch.randint(n, (200,), generator=g, device=device) for n in (20, 30))
    rows, S = rows.sort().values, W.new_zeros(20, 30, dtype=torch.float64)
    S, exact, towards = S.index_put((rows, latents), values.double(), accumulate=True), W.double(), unit(W[:20].double())
    wanted = S @ exact, (G.double() @ exact.T)[rows, latents], unit(exact), G - (G * towards).sum(1, keepdim=True) * towards
    try:
        found = bag_by_kernel(values, latents, starts(rows, 20), W), dots_by_kernel(G, W, rows, latents), W, G
        rows_by_kernel(unit_rows, W)
        rows_by_kernel(project_rows, G, W[:20])
        said = None if all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(found, wanted)) else "wrong results"
    except Exception as e:
        said = f"{type(e).__name__}: {first_lines(e)}"
    if said:
        print(f"note: the Triton kernels do not work on {device} ({said}): PyTorch's operations are used, and codes are dense")
    return not said


@functools.cache
def kernels_pay(device, rows, d_in, d_sae, k):
    """Whether a product of codes, k of d_sae a row, with a decoder and its gradients take less time by the kernels than dense, in bfloat16:
    tried on this GPU, once a size, and told in one line."""
    if not kernels_work(device):
        return False
    g, seconds = generator("kernels", device=device), {}
    random = lambda *size: torch.rand(size, generator=g, device=device)
    owners, latents = torch.arange(rows, device=device).repeat_interleave(k), torch.randint(d_sae, (rows * k,), generator=g, device=device)
    try:
        values, W, G = random(rows * k).bfloat16().requires_grad_(), random(d_sae, d_in).requires_grad_(), random(rows, d_in)
        for way in ("sparse", "dense"):
            for _ in range(4):                                                   # the first one compiles, the last one counts
                started = time.perf_counter()
                with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                    codes = Codes(values, owners, latents, torch.Size((rows, d_sae)))
                    product = (codes if way == "sparse" else codes.dense()) @ W
                torch.autograd.grad(product, [values, W], G.to(product.dtype))[1][0, 0].item()      # waits for the GPU
                seconds[way] = time.perf_counter() - started
    except torch.OutOfMemoryError:
        seconds = {"sparse": math.inf, "dense": math.inf}
    pays = seconds["sparse"] < seconds["dense"]
    print(f"codes of {d_in:,} x {d_sae:,}, {k} a row, are {'sparse' if pays else 'dense'} "
          f"({seconds['sparse'] * 1e3:.2f} ms by kernels, {seconds['dense'] * 1e3:.2f} ms dense)")
    return pays


class SAE(nn.Module):
    """The base: ReLU with an L1 penalty on acts weighted by the decoder's norm (Bricken 2023, Conerly 2024), or, by the setting
    `activation`, TopK (Gao 2024), BatchTopK (Bussmann 2024) or JumpReLU (Rajamanoharan 2024b). All reach the same `l0`."""

    activation = "relu"       # relu | topk | batch_topk | jumprelu
    d_sae = 1024              # latents
    l0 = 16.0                 # average number of active latents per row that training ends at, for every activation
    lr = 3e-3                 # Adam; good for runs of some hundred steps, 3e-4 is usual from 50 M tokens on
    lr_warmup = 0.05          # fraction of the run
    lr_decay = 0.2            # fraction of the run over which lr falls linearly to 0, at its end
    clip = 1.0                # gradient norm
    spike = 20.0              # a step on a row this many times the usual length is refused; a cache keeps rows of up to 10 x the median
    batch_size = 2048         # rows
    micro_batches = 1         # a batch is worked on in this many parts, to save memory
    sparsity_start = 1.0      # training starts at this multiple of `l0` ...
    sparsity_warmup = 0.2     # ... and comes down to `l0` over this fraction of the run
    sparsity_weight = 0.03    # relu, jumprelu: first weight of the penalty; a controller then moves it so that L0 stays at `l0`
    sparsity_gain = 2.0       # relu, jumprelu: how strongly that controller answers a change of L0
    bandwidth = 0.5           # jumprelu: width of the kernel that stands in for the step's derivative
    threshold_lr = 10.0       # jumprelu: learning rate of the thresholds over lr; at 1 they are too slow to hold L0
    aux_weight = 1 / 32       # dead latents reconstruct the residual (AuxK, Gao 2024)
    dead_after = 0.1          # dead: silent for this fraction of the run

    def __init__(self, d_in, steps, seed=0, **settings):
        super().__init__()
        self.d_in, self.steps, self.seed = d_in, steps, seed
        self.step = 0
        self.stats = {}               # a variant writes what it wants logged: name -> number
        self.row_weight = None        # how much each row of the batch counts [B], where choose_batch draws some more often than others
        self.cut = None               # batch_topk: what a latent had to exceed in the last activate() of this step
        self.part = slice(None)       # the rows of the batch that are in work, where it is worked on in several parts
        self.latents = {}             # parameter or buffer -> (its latent axis, the value of a fresh latent or None)
        for name, value in settings.items():
            setattr(self, name, value)
        self.check({k: getattr(self, k) for k in self.settings()})
        self.build()

    @property
    def progress(self):
        """Fraction of training done, 0..1; 1 for a loaded SAE."""
        return self.step / max(1, self.steps)

    def due(self, fraction):
        """Whether something done once every `fraction` of the run is to be done after this step; never, if the fraction is 0."""
        return fraction > 0 and (self.step + 1) % max(1, round(fraction * self.steps)) == 0

    def generator(self, salt=""):
        """A generator on the SAE's device for this step's random numbers."""
        return generator(self.seed, self.step, salt, device=self.b_dec.device)

    def forward(self, x):
        pre = self.pre_acts(x)
        acts = self.activate(pre)
        return Out(x, pre, acts, self.decode(acts))

    @torch.no_grad()
    def encode(self, x):
        """Raw activations [..., d_in] -> latent activations [..., d_sae], in the same units. Set eval() first."""
        flat = x.reshape(-1, self.d_in).float() * self.scale
        return (self(flat).acts / self.scale).reshape(*x.shape[:-1], self.d_sae)

    @torch.no_grad()
    def reconstruct(self, x):
        """Raw activations [..., d_in] -> their reconstruction, the same shape and units. Set eval() first."""
        flat = x.reshape(-1, self.d_in).float() * self.scale
        return (self(flat).x_hat / self.scale).reshape(x.shape)

    # ---- what a variant may override, in the order in which training calls it ------------------------------------------------

    def build(self):
        """Add parameters and buffers. A variant calls super().build() first: same seed, same starting weights as its parent."""
        W_dec = unit(torch.randn(self.d_sae, self.d_in, generator=generator(self.seed, "W_dec")))
        self.W_enc = nn.Parameter(W_dec.clone().T)                           # [d_in, d_sae]; in memory latent after latent, as its gradient comes
        self.W_dec = nn.Parameter(W_dec)                                     # [d_sae, d_in]
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))
        self.register_buffer("scale", torch.ones(()))                        # raw activations * scale = x
        self.register_buffer("silent", torch.zeros(self.d_sae))              # steps since the latent fired
        self.register_buffer("rate", torch.zeros(self.d_sae))                # how often it fires, moving average
        self.latents |= {"W_enc": (1, None), "W_dec": (0, None), "b_enc": (0, 0.0), "silent": (0, 0.0), "rate": (0, None)}
        if self.activation in ("relu", "jumprelu"):
            self.register_buffer("weight_now", torch.tensor(self.sparsity_weight))   # of the sparsity penalty
            self.register_buffer("l0_now", torch.tensor(self.l0 * self.sparsity_start))   # L0, moving average over a few batches
        if self.activation == "batch_topk":
            self.register_buffer("threshold", torch.zeros(()))               # what a latent must exceed, at inference
        if self.activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.zeros(self.d_sae))
            self.latents["log_threshold"] = (0, None)

    def make_optimizer(self):
        thresholds = [self.log_threshold] if self.activation == "jumprelu" else []
        others = [p for p in self.parameters() if all(p is not t for t in thresholds)]
        groups = [{"params": others}, *({"params": [t], "lr": self.threshold_lr * self.lr} for t in thresholds)]
        return Adam(groups, lr=self.lr, betas=(0.9, 0.999))

    @torch.no_grad()
    def init_from_data(self, x):
        """Start from a sample of normalised rows x [n, d_in]: b_dec is their mean; relu and jumprelu get biases or thresholds with
        which every latent fires at the wanted rate; the encoder is scaled to reconstruct best (least squares)."""
        self.b_dec.copy_(x.mean(0))
        rank = round(len(x) * (1 - min(0.5, self.wanted_l0() / self.d_sae)))
        if self.activation == "relu":
            self.b_enc.copy_(-self.pre_acts(x).kthvalue(rank, dim=0).values)
        if self.activation == "jumprelu":
            self.log_threshold.copy_(self.pre_acts(x).kthvalue(rank, dim=0).values.clamp_min(1e-3).log())
        if self.activation == "batch_topk":
            self.threshold.copy_(self.batch_threshold(self.pre_acts(x[:256])))      # so that the first batches, too, look at few entries
        out = self(x)
        read = out.x_hat - self.b_dec
        factor = ((x - self.b_dec) * read).sum() / read.pow(2).sum().clamp_min(1e-12)
        self.W_enc.mul_(factor)
        self.b_enc.mul_(factor)
        if self.activation == "jumprelu":
            self.log_threshold.add_(factor.log())
        if self.activation == "batch_topk":
            self.threshold.mul_(factor)

    def choose_batch(self, n_rows, rng):
        """Rows of the shard in memory (n_rows of them, shuffled when written) that make this step's batch: a slice or a tensor of
        indices. `self.position` is where the slice starts that every other run of the call takes."""
        return slice(self.position, self.position + self.batch_size)

    def pre_acts(self, x):
        """x [B, d_in] -> [B, d_sae]."""
        return Encode.apply(x, self.W_enc, self.b_enc, self.b_dec)

    def activate(self, pre):
        """pre [B, d_sae] -> acts [B, d_sae], sparse and >= 0. In eval mode a row's acts depend on that row alone."""
        if self.training and self.sparse_pays(pre):
            return self.codes(pre)
        if self.activation == "topk":
            top = pre.relu().topk(round(self.wanted_l0()), sorted=False)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        if self.activation == "batch_topk":
            if self.training:
                self.cut = self.batch_threshold(pre.detach())
            return pre * (pre > (self.cut if self.training else self.threshold))
        if self.activation == "jumprelu":
            return JumpReLU.apply(pre, self.log_threshold.exp(), self.bandwidth)
        return pre.relu()

    def codes(self, pre):
        """What the rest of activate() gives in training, as Codes; jumprelu's are so where there are few entries near the thresholds."""
        if self.activation == "topk":
            top = highest(pre.detach(), round(self.wanted_l0()))
            return Codes.of(pre, (top + self.d_sae * torch.arange(len(pre), device=pre.device)[:, None]).flatten(), torch.relu)
        if self.activation == "batch_topk":
            self.cut, at, values = self.batch_cut(pre.detach())
            return Codes.of(pre, at[(values <= self.cut).logical_not_()], torch.relu)
        if self.activation == "jumprelu":
            threshold = self.log_threshold.exp()
            cut = threshold.detach() - self.bandwidth / 2          # above it are also the zeros whose gradient moves a threshold
            at = above(pre, cut.masked_fill(cut < 0, -torch.inf))
            if not self.sparse_pays(pre, len(at) / len(pre)) if pre.is_cuda else len(at) > 1.5 * SPARSE_BELOW * pre.numel():
                return JumpReLU.apply(pre, threshold, self.bandwidth)
            return Codes.of(pre, at, lambda values: JumpReLU.apply(values, threshold.index_select(0, at % self.d_sae), self.bandwidth))
        return Codes.of(pre, above(pre, 0), torch.relu)

    def decode(self, acts):
        """acts [B, d_sae] -> [B, d_in]."""
        return torch.addmm(self.b_dec, acts, self.W_dec)

    def recon_error(self, out):
        """Squared error of each row, mean over d_in [B]."""
        return nn.functional.mse_loss(out.x_hat, out.x, reduction="none").mean(-1)      # half of the passes of a difference's pow(2)

    def losses(self, out):
        """Named scalars; training minimises their sum and logs each. Units: fractions of E||x||^2 / d_in."""
        terms = {"recon": self.recon_error(out).mean()}
        if self.activation in ("relu", "jumprelu"):
            terms["sparsity"] = self.weight_now * self.sparsity(out)
        if self.aux_weight:
            terms["aux"] = self.aux_weight * self.aux(out)
        return terms

    def lr_scale(self):
        """Factor on every learning rate now: linear warm-up, constant, linear decay to 0."""
        up = (self.step + 1) / max(1, self.lr_warmup * self.steps)
        down = (self.steps - self.step) / max(1, self.lr_decay * self.steps)
        return min(1.0, up, down)

    def accept(self, loss):
        """Whether to take the step, a bool or a tensor with one; a refused one is counted and leaves the weights alone. loss: the scalar of
        this batch. A tensor spares a wait for the GPU."""
        return loss.isfinite()

    @torch.no_grad()
    def before_step(self, opt):
        """Edit gradients: what would only lengthen a decoder row is removed, the rest is clipped to norm `clip`."""
        if by_kernel(self.W_dec.grad, self.W_dec):
            rows_by_kernel(project_rows, self.W_dec.grad, self.W_dec)
        else:
            for grad, W in in_blocks(self.W_dec.grad, self.W_dec):
                grad.addcmul_(W, (grad * W).sum(-1, keepdim=True), value=-1)
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.stats["grad_norm"] = norm = nn.utils.get_total_norm(grads).cpu()      # train_step() asks whether it is finite, anyway
        if not norm <= self.clip:                                           # a factor of 1 would cost a pass over all of them
            nn.utils.clip_grads_with_norm_(self.parameters(), self.clip, norm)

    @torch.no_grad()
    def after_step(self, opt, out):
        """Keep decoder rows unit, follow which latents fire, and steer the sparsity. Surgery on weights belongs here."""
        if by_kernel(self.W_dec):
            rows_by_kernel(unit_rows, self.W_dec)
        else:
            for W, in in_blocks(self.W_dec):
                W.div_(W.norm(dim=-1, keepdim=True).clamp_min(1e-12))           # unit(), in place
        fires = firing(out.acts)
        self.silent.copy_(torch.where(fires > 0, 0.0, self.silent + 1))
        self.rate.lerp_(fires, self.memory(0.02))
        if self.activation in ("relu", "jumprelu"):
            self.steer_sparsity(fires.sum())
        if self.activation == "batch_topk":
            known = self.cut is not None and self.micro_batches == 1           # else activate() is a variant's own, or saw the batch in parts
            self.threshold.lerp_((self.cut if known else self.batch_threshold(out.pre)).float(), self.memory(0.02))
            self.cut = None

    # ---- tools for variants ----------------------------------------------------------------------------------------------------

    def usual(self, x):
        """Which normalised rows x [n, d_in] are no spikes, and finite [n]."""
        return x.norm(dim=-1) < self.spike * self.d_in ** 0.5

    def sparse_pays(self, pre, l0=None):
        """Whether so few latents fire, l0 a row, that Codes are faster than dense products: by measurement, once for all on a CPU (SPARSE_BELOW),
        at the start on a GPU, for the next of the values 1, 1.2, 1.4, 1.7, 2, 2.4 ..."""
        if l0 is None:                                             # as it is now; but to read l0_now would wait for the GPU
            l0 = self.l0_now if self.activation in ("relu", "jumprelu") and not pre.is_cuda else self.wanted_l0()
        few = l0 < SPARSE_BELOW * self.d_sae - 4
        k = round(2 ** (math.ceil(4 * math.log2(max(1, l0))) / 4)) if few and pre.is_cuda else None
        return few and (k is None or kernels_pay(pre.device, min(2048, self.batch_size), self.d_in, self.d_sae, k))

    def memory(self, fraction):
        """The weight of the newest value in a moving average that remembers `fraction` of the run (its plain mean at first)."""
        return max(1 / (self.step + 1), min(1.0, 1 / (fraction * self.steps)))

    def wanted_l0(self):
        """The L0 that training wants now: from sparsity_start * l0 down to l0, geometrically, over the first sparsity_warmup."""
        done = min(1.0, self.progress / max(1e-9, self.sparsity_warmup))
        return min(self.l0 * self.sparsity_start ** (1 - done), self.d_sae / 2)

    def sparsity(self, out):
        """The penalty before its weight, mean over rows. relu: sum_i acts_i ||d_i|| / sqrt(d_in); jumprelu: L0 / l0."""
        if self.activation == "relu":
            return (out.acts @ self.W_dec.norm(dim=-1)).mean() / self.d_in ** 0.5
        pre, threshold = out.pre, self.log_threshold.exp()
        if isinstance(out.acts, Codes):
            pre, threshold = pre.detach().take(out.acts.at()), threshold.index_select(0, out.acts.latents)
        return Step.apply(pre, threshold, self.bandwidth).sum() / len(out.x) / self.l0

    def steer_sparsity(self, l0):
        """Move the penalty's weight so that the L0 of the batches, `l0` of this one, stays at wanted_l0(): a controller on the
        logarithms, proportional to L0's change (sparsity_gain) and, summed over 5 % of the run, to its error (1)."""
        before = self.l0_now.clamp_min(1e-3)
        self.l0_now.lerp_(l0, 0.5)
        now = self.l0_now.clamp_min(1e-3)
        change, error = (now / before).log(), (now / self.wanted_l0()).log()
        self.weight_now.mul_((self.sparsity_gain * change + error / (0.05 * self.steps)).clamp(-0.2, 0.2).exp())

    def batch_threshold(self, pre):
        """The value that round(wanted_l0 * B) entries of pre exceed (0 if fewer are positive)."""
        return self.batch_cut(pre)[0]

    def batch_cut(self, pre):
        """(batch_threshold, flat indices of entries of pre among which are all above it, these entries). Exact: the carried threshold
        only narrows the entries that are looked at."""
        keep = min(round(self.wanted_l0() * len(pre)), pre.numel() - 1)
        for share in (0.95, 0.8, torch.nan):                       # NaN: all entries are looked at
            at = above(pre, share * self.threshold)
            if len(at) > keep:
                break
        near = pre.take(at)
        return near.kthvalue(len(near) - keep).values.clamp_min(0), at, near

    def dead(self):
        """Mask [d_sae] of the latents that have been silent for `dead_after` of the run."""
        return self.silent > self.dead_after * self.steps

    def aux(self, out):
        """AuxK: how much of the residual the d_in / 2 highest dead latents leave, over the residual's variance (Gao 2024, A.2)."""
        dead = self.dead().nonzero().flatten()
        if not len(dead):
            return out.x.new_zeros(())
        pre = nn.functional.softplus(out.pre.index_select(1, dead))      # not relu: a dead latent's pre is mostly negative
        top = pre.topk(min(len(dead), max(1, self.d_in // 2)), sorted=False)
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        residual = (out.x - out.x_hat).detach()
        left = (residual - acts @ self.W_dec.index_select(0, dead)).pow(2).mean()
        return left / residual.var(0, correction=0).mean().clamp_min(1e-12)

    @torch.no_grad()
    def reset_latents(self, opt, which, directions, encoder=0.2, x=None):
        """Restart latents `which` (indices [n] or mask [d_sae]) at `directions` [n, d_in], and clear exactly their optimizer
        moments. Their encoder columns get `encoder` times the mean norm of the others' (Bricken 2023). With normalised rows x they
        fire at the wanted rate from the start; without, a ReLU latent's bias is 0, so that it fires on half of the rows."""
        which = which.nonzero().flatten() if which.dtype == torch.bool else which
        if not len(which):
            return
        others = torch.ones(self.d_sae, dtype=torch.bool, device=which.device)
        others[which] = False
        norm = self.W_enc.norm(dim=0)[others].mean() if others.any() else self.W_enc.norm(dim=0).mean()
        directions = unit(directions.to(self.W_dec.dtype))
        self.W_dec[which] = directions
        self.W_enc[:, which] = directions.T * norm * encoder
        self.rate[which] = self.l0 / self.d_sae                    # fresh, not rare
        for name, (axis, fresh) in self.latents.items():
            tensor = getattr(self, name)
            if fresh is not None:
                tensor.data.index_fill_(axis, which, fresh)
            for moment in opt.state.get(tensor, {}).values():
                if torch.is_tensor(moment) and moment.shape == tensor.shape:
                    moment.index_fill_(axis, which, 0.0)
        if x is not None and self.activation in ("relu", "jumprelu"):
            cut = self.pre_acts(x)[:, which].kthvalue(round(len(x) * (1 - min(0.5, self.l0 / self.d_sae))), dim=0).values
            if self.activation == "relu":
                self.b_enc[which] -= cut
            else:
                self.log_threshold[which] = cut.clamp_min(1e-3).log()

    # ---- SAELens' format -------------------------------------------------------------------------------------------------------------

    def saelens_weights(self):
        """(SAELens architecture, its weights for raw activations). A variant that SAELens has under another name overrides this."""
        for method in ("forward", "pre_acts", "activate", "decode"):
            if getattr(type(self), method) is not getattr(SAE, method):
                raise Refuse(f"{type(self).__module__} overrides {method}(): SAELens has no such architecture")
        weights = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc / self.scale, "b_dec": self.b_dec / self.scale}
        if self.activation == "jumprelu":
            return "jumprelu", weights | {"threshold": self.log_threshold.exp() / self.scale}
        if self.activation == "batch_topk":                        # at inference a fixed threshold
            return "jumprelu", weights | {"threshold": (self.threshold / self.scale).expand(self.d_sae)}
        return {"relu": "standard", "topk": "topk"}[self.activation], weights

    def to_saelens(self, folder, model_name=None, hook_name=None):
        """Write `folder` so that sae_lens.SAE.load_from_disk(folder) gives these latents and reconstructions of raw activations."""
        architecture, weights = self.saelens_weights()
        config = {"architecture": architecture, "d_in": self.d_in, "d_sae": self.d_sae, "dtype": "float32", "device": "cpu",
                  "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
                  **({"k": round(self.l0), "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
                  "metadata": {"sae_lens_version": "6.54.12", "model_name": model_name, "hook_name": hook_name}}
        blob = safetensors.torch.save({k: v.detach().float().cpu().contiguous() for k, v in weights.items()})
        write_file(Path(folder) / "sae_weights.safetensors", blob)
        write_file(Path(folder) / "cfg.json", json.dumps(config, indent=1).encode())

    @staticmethod
    def from_saelens(folder):
        """The SAE, in eval mode, of a folder in SAELens' format: architectures standard, topk and jumprelu without input normalisation."""
        config = json.loads((Path(folder) / "cfg.json").read_text())
        weights = safetensors.torch.load((Path(folder) / "sae_weights.safetensors").read_bytes())
        architecture = config["architecture"]
        if architecture not in ("standard", "topk", "jumprelu") or config.get("normalize_activations", "none") != "none":
            raise Refuse(f"{folder}: architecture {architecture} with normalize_activations={config.get('normalize_activations')}: "
                         "want standard, topk or jumprelu without normalisation")
        if not config.get("apply_b_dec_to_input", True):
            weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
        settings = {"activation": {"standard": "relu"}.get(architecture, architecture), "d_sae": config["d_sae"]}
        sae = SAE(config["d_in"], 1, **settings, **({"l0": float(config["k"])} if architecture == "topk" else {}))
        if architecture == "jumprelu":
            weights["log_threshold"] = weights.pop("threshold").log()
        sae.load_state_dict(weights, strict=False)
        sae.step = sae.steps
        return sae.eval()

    # ---- settings and sources -----------------------------------------------------------------------------------------------------

    @classmethod
    def settings(cls):
        """All settings with their defaults: the public bool, int, float and str attributes of the class chain, base first."""
        chain = {k: v for c in reversed(cls.__mro__) if issubclass(c, SAE) for k, v in vars(c).items()}
        return {k: getattr(cls, k) for k, v in chain.items() if type(v) in (bool, int, float, str) and not k.startswith("_")}

    @staticmethod
    def check(settings):
        """Refuse settings that no run can have; `settings` has them all."""
        for name, low, high in (("d_sae", 1, 2**24), ("l0", 0, settings["d_sae"]), ("lr", 0, None), ("batch_size", 1, 2**24), ("clip", 0, None),
                                ("spike", 0, None), ("micro_batches", 1, settings["batch_size"]), ("sparsity_start", 0, None),
                                ("lr_warmup", 0, 1), ("lr_decay", 0, 1), ("dead_after", 0, 1)):
            value, above = settings[name], name in ("l0", "lr", "clip", "spike", "sparsity_start")
            if value < low or (above and value == low) or (high is not None and value > high):
                raise Refuse(f"--set {name}={value}: want {'above' if above else 'at least'} {low}" + ("" if high is None else f" and at most {high}"), 2)
        if settings["activation"] not in ("relu", "topk", "batch_topk", "jumprelu"):
            raise Refuse(f"--set activation={settings['activation']}: want relu, topk, batch_topk or jumprelu", 2)

    @classmethod
    def chain(cls):
        """The classes that make this one, base first."""
        return [c for c in reversed(cls.__mro__) if issubclass(c, SAE)]

    @classmethod
    def source(cls):
        """What runs, in one text: the source files of the class chain, base first."""
        return "\n\n".join(f"# ---- {Path(inspect.getfile(c)).name}\n\n{Path(inspect.getfile(c)).read_text()}" for c in cls.chain())

    @classmethod
    @functools.cache
    def code_checksum(cls):
        """Changes when the code of the class chain does, not when a comment or docstring does."""
        parts = [unit, Adam, like, generator, JumpReLU, Step, Codes, starts, bag, bag_transposed, dots, Product, Pick, Encode, above, highest,
                 nonzeros, in_blocks, firing, gather_sum, gather_dot, project_rows, unit_rows, compiled, tile, bag_by_kernel, dots_by_kernel,
                 rows_by_kernel, by_kernel, kernels_work, kernels_pay]
        return checksum("\n".join(code_of(part) for part in cls.chain() + parts).encode())


@functools.cache
def code_of(part):
    """The code of a class or function as a syntax tree in text, without comments and docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:]
    return ast.dump(tree)


def load_variant(name):
    """The class that variants/NAME.py defines; `baseline` is the base itself. Refuses a name that is not a file there."""
    if name == "baseline":
        return SAE
    names = variant_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 3)
        raise Refuse(f"no variant {shorten(name)!r} in variants/: " + (f"did you mean {' or '.join(near)}?" if near else "02_train.py --list shows all"), 2)
    try:
        variant = importlib.import_module(f"variants.{name}").Variant
    except Exception as e:
        raise Refuse(f"variants/{name}.py does not load: {type(e).__name__}: {e}", 5) from e
    if not (isinstance(variant, type) and issubclass(variant, SAE)):
        raise Refuse(f"variants/{name}.py: Variant is no subclass of SAE", 5)
    return variant


def load_run(folder):
    """(SAE, config) of a finished run, the SAE in eval mode. Refuses if the variant's code is not the one that was trained."""
    folder = Path(folder)
    config = read_json(folder / "config.json", "status", "variant", "acts", "settings")
    if config["status"] != "done":
        raise Refuse(f"{folder} is not finished (status {config['status']}): run 02_train.py again", 5)
    check_name(f"{folder}/config.json: acts", config["acts"])
    cls = load_variant(config["variant"])
    if cls.code_checksum() != config["code_checksum"]:
        raise Refuse(f"{folder}: the code of {config['variant']} changed since (what ran is in its code.py): train it again", 5)
    sae = cls(config["d_in"], config["steps"], config["seed"], **config["settings"])
    sae.load_state_dict(read_tensors(folder / "sae.safetensors", config["sae_checksum"])[0])
    sae.step = sae.steps
    return sae.eval(), config


def run_folders(folders):
    """Folders of runs: those given, or all under runs/."""
    found = [Path(f) for f in folders] or sorted(p.parent for p in Path("runs").glob("*/config.json"))
    if not found:
        raise Refuse("no runs under runs/: run 02_train.py first")
    for folder in found:
        if not (folder / "config.json").exists():
            raise Refuse(f"{folder} {'has no config.json' if folder.exists() else 'does not exist'}, so it is not a run", 2)
    return list(dict.fromkeys(found))


def read_log(folder, config):
    """The lines of a run's metrics.jsonl; of a finished run Refuse if the file is not as the run left it."""
    path = folder / "metrics.jsonl"
    blob = path.read_bytes() if path.exists() else b""
    if config.get("log_checksum", checksum(blob)) != checksum(blob):
        raise Refuse(f"{path} is damaged, cut short or edited (its checksum differs): delete {folder} and train the run again")
    try:
        return [json.loads(line) for line in blob.split(b"\n")[:-1]]      # what follows the last line end is being written
    except ValueError as e:
        raise Refuse(f"{path} is damaged: delete {folder} and train the run again") from e


def variant_names():
    return ["baseline"] + sorted(p.stem for p in (ROOT / "variants").glob("[a-z]*.py"))


def docstring_line(name):
    """The first docstring line of a variant, `NAME = PARENT + what`; read as text, so that a file that doesn't load is listed too."""
    if name == "baseline":
        return "baseline = ReLU + L1 weighted by the decoder's norm"
    return (ROOT / "variants" / f"{name}.py").read_text().split("\n")[0].strip('"')


def parse_settings(cls, pairs):
    """['l0=32', 'clip=0.5'] -> {'l0': 32.0, 'clip': 0.5}, each a setting of `cls` and of its type, else Refuse."""
    known, found = cls.settings(), {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals or not text:
            raise Refuse(f"--set {pair!r}: want name=value", 2)
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise Refuse(f"--set {key}: {cls.__module__.split('.')[-1]} has no such setting" + (f", did you mean {near[0]}?" if near else ""), 2)
        if key in found:
            raise Refuse(f"--set {key}: given twice", 2)
        found[key] = parse_value(key, text, type(known[key]))
    return found


def parse_value(key, text, kind):
    """`text` as a value of the type that setting `key` has; numbers are plain and finite."""
    number = re.fullmatch(r"[+-]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII)
    if kind is bool and text in ("True", "False", "true", "false"):
        return text.lower() == "true"
    if kind is float and number and math.isfinite(float(text)):
        return float(text)
    if kind is int and number and math.isfinite(float(text)) and float(text).is_integer():
        return int(float(text))
    if kind is str and re.fullmatch(r"\w[\w.-]{0,59}", text, re.ASCII):        # it becomes part of a folder's name
        return text
    raise Refuse(f"--set {key}={shorten(text)}: want {kind.__name__}", 2)


# ---- language models: where a hook sits ------------------------------------------------------------------------------------------


def language_model(path, dtype, **extra):
    """The causal language model of a hub name or folder, in eval mode. Weights in pickle files are read only where remote code is trusted."""
    import transformers
    config = transformers.AutoConfig.from_pretrained(path, **extra).get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        extra["attn_implementation"] = "eager"                   # Gemma-2: transformers' sdpa leaves the soft cap out
    if not extra.get("trust_remote_code"):
        extra["use_safetensors"] = True
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **extra).eval()


HUB_ERRORS = {       # class in the chain of causes, or HTTP status -> (what to say, exit code); the first that fits
    "GatedRepoError": ("is gated: accept its terms on its page, https://huggingface.co/{page}, then `hf auth login` or set HF_TOKEN to a token "
                       "of the account that accepted them", 4),
    "OfflineModeIsEnabled": ("is not in the local cache and HF_HUB_OFFLINE is set: unset it, or give a local folder", 4),
    "RepositoryNotFoundError": ("is neither on the hub (or it is private: set HF_TOKEN) nor a folder here", 2),
    "DatasetNotFoundError": ("is neither on the hub (or it is private: set HF_TOKEN) nor a file or folder here", 2),
    "HFValidationError": ("is neither a name on the hub nor a folder here", 2),
    "LocalEntryNotFoundError": ("is not in the local cache and the hub is not reachable (or HF_HUB_OFFLINE is set): check the network, "
                                "`hf download` it where there is one, or give a local folder", 4),
    "ConnectionError": ("cannot be fetched, the hub is not reachable: check the network, set HF_HUB_OFFLINE=1 if it was fetched before, or give a local folder", 4),
    "TransportError": ("cannot be fetched, the hub is not reachable: check the network, or give a local folder", 4),
    "Timeout": ("cannot be fetched, the hub does not answer: check the network, set HF_HUB_OFFLINE=1 if it was fetched before, or give a local folder", 4),
    "RevisionNotFoundError": ("no longer has the revision that was cached: cache again", 3),
    "EntryNotFoundError": ("lacks a file that is needed", 3),
    "HTTP 401": ("cannot be fetched, the hub does not know the token: `hf auth login` again, or correct HF_TOKEN", 4),
    "HfHubHTTPError": ("cannot be fetched: the hub answers {status}: try again later", 4),
}


@contextlib.contextmanager
def hub_errors(kind, name):
    """Turns what transformers, datasets and the hub raise into one line, by the classes in the chain of causes."""
    try:
        yield
    except (Refuse, GeneratorExit):
        raise
    except Exception as e:
        if is_out_of_memory(e):
            raise
        chain, cause, status = [], e, None
        while cause:
            status = getattr(getattr(cause, "response", None), "status_code", status)
            chain += [*(c.__name__ for c in type(cause).__mro__), f"HTTP {status}"]
            cause = cause.__cause__ or cause.__context__
        choose = "; --config and --split choose a part of it, --trust-remote-code runs the code of one that has some" if kind == "data set" else ""
        said, code = next((HUB_ERRORS[c] for c in HUB_ERRORS if c in chain), (f"does not load: {type(e).__name__}: {first_lines(e)}{choose}", 3))
        page = f"datasets/{name}" if kind == "data set" else name
        raise Refuse(f"{kind} {name} {said.replace('{page}', page).replace('{status}', str(status))}", code) from e


def first_lines(error):
    return " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2]) or "no message"


def blocks_of(model, n_layers, name):
    """The decoder layers: the outermost ModuleList with one entry per layer."""
    lists = [(path.count("."), path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise Refuse(f"{name}: found no list of {n_layers} decoder layers, so there is nothing to hook")
    return min(lists)[2]


def hook_point(block, hook, name):
    """The module of a decoder layer whose output is TransformerLens' hook_resid_post, hook_attn_out or hook_mlp_out."""
    if hook == "resid_post":
        return block
    if hasattr(block, "post_feedforward_layernorm"):      # Gemma-2 and -3, OLMo-2: what is added to the stream is normed after the part
        names = ["post_attention_layernorm" if hook == "attn_out" else "post_feedforward_layernorm"]
    else:
        names = ["self_attn", "attention", "attn"] if hook == "attn_out" else ["mlp"]
    found = [getattr(block, n) for n in names if hasattr(block, n)]
    if not found:
        raise Refuse(f"--hook {hook}: {name}'s layers have none of {', '.join(names)}, only {', '.join(n for n, _ in block.named_children())}")
    return found[0]


MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".py")


def model_checksum(folder):
    """Of all that makes the language model in a folder."""
    return files_checksum(sorted(p for p in Path(folder).iterdir() if p.suffix in MODEL_FILES))


def files_checksum(files):
    """xxh3-128 over the names and contents of files."""
    total = xxhash.xxh3_128()
    for path in files:
        total.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as f:
            while block := f.read(1 << 24):
                total.update(block)
    return total.hexdigest()


# ---- files: written whole or not at all, and checked when read -------------------------------------------------------------------


class Refuse(Exception):
    """What is wrong, where, and what to do, in one line. code: 2 usage, 3 data, 4 environment, 5 a run went wrong, 6 busy."""

    def __init__(self, message, code=3):
        super().__init__(message)
        self.code = code


def run_script(main):
    """Run a script's main(); what it refuses, or what the machine lacks, ends in one line on stderr and an exit code that is not 0.
    SIGTERM is Ctrl-C. Anything else is a bug and shows its traceback."""
    try:
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(sign, interrupt)
        sys.unraisablehook = lambda dropped: dropped.exc_type is KeyboardInterrupt or sys.__unraisablehook__(dropped)
        if share()[1] > 1 and sys.platform == "linux":       # where torchrun is killed, what it started ends too
            end_with_parent()
        code, said = main() or 0, None
    except (Exception, KeyboardInterrupt) as e:
        if interrupt.came or isinstance(e, KeyboardInterrupt):
            code, said = 130, "interrupted: the same command goes on where this one stopped"
        elif isinstance(e, Refuse):
            code, said = e.code, f"error: {e}"
        elif is_out_of_memory(e):
            code, said = 4, f"error: out of memory: {e}"
        elif is_disk_full(e):
            code, said = 4, f"error: {cannot_write(getattr(e, 'filename', None) or 'a file', e)}"
        elif isinstance(e, OSError):
            code, said = 4, f"error: {e.filename or 'the machine'}: {e.strerror or e}"
        else:
            raise
    signal.setitimer(signal.ITIMER_REAL, 0)
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_DFL)                  # while Python ends, a Ctrl-C just ends it
    if said:
        print(" ".join(said.split()), file=sys.stderr)
    sys.exit(code)


def end_with_parent():
    """From now on this process gets a SIGTERM when the one that started it dies; on Linux."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)               # PR_SET_PDEATHSIG


def interrupt(*_):
    """Ctrl-C. Where it meets a library's C code or a destructor, another exception may come of it or none, so run_script() asks whether
    it came, and it comes again every half second until then."""
    interrupt.came = True
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    raise KeyboardInterrupt


interrupt.came = False


@contextlib.contextmanager
def loads(name):
    """Decorates a function that imports the library `name`: an import that fails is one line with its first cause."""
    try:
        yield
    except (ImportError, RuntimeError) as e:
        cause = e
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        if not isinstance(e, ImportError) and "torchvision" not in str(cause):
            raise
        raise Refuse(f"{name} does not load ({type(cause).__name__}: {str(cause).splitlines()[0]}): install requirements.txt again; "
                     f"torchvision must be built for torch {torch.__version__}", 4) from e


def is_out_of_memory(e):
    """Whether an exception says so; torch raises a plain RuntimeError where the CPU's memory ends."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as it stands, no abbreviated flags, and errors in one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise Refuse(f"{message} (--help lists the flags)", 2)


LARGEST = 10 ** 15           # of a number on the command line; what is above it is a slip


def whole(text):
    """A positive whole number; 2_000_000 is fine."""
    if not re.fullmatch(r"\d{1,30}(_\d{1,30}){0,9}", text, re.ASCII) or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"want a whole number above 0 and up to 10**15, such as 2_000_000, not {shorten(text)!r}")
    return int(text)


def number(text):
    """A whole number; 0 too."""
    return 0 if text == "0" else whole(text)


def shorten(text):
    return text if len(text) <= 60 else f"{text[:60]}..."


def share():
    """(rank, processes): which of the processes that torchrun started this is, and how many they are; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name):
    """The device called `name`; without a name the GPU, under torchrun this process' own one, or the CPU where there is none."""
    name = name if name is not None else f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name, re.ASCII)
    if not found or name != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise Refuse(f"--device {shorten(name)}: want cpu, or cuda where there is a GPU", 2)
    return torch.device(name)


def check_name(flag, name, also=""):
    """A name that becomes a folder's: no path, not hidden, not too long. Refuse otherwise."""
    if not re.fullmatch(rf"[\w+][\w.+{also}-]{{0,199}}", name, re.ASCII):
        raise Refuse(f"{flag} {shorten(name)!r}: want a name of at most 200 letters, digits and . _ + -", 2)
    return name


def checksum(data):
    """xxh3-128 of bytes, in hex; against accidents, not against attackers."""
    return xxhash.xxh3_128_hexdigest(data)


def write_file(path, data):
    """Write bytes so that `path` holds either all of them, on disk, or what it held before."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        raise cannot_write(path, e) from e
    finally:
        with contextlib.suppress(OSError):                   # it is not there, or never could be
            temporary.unlink()


def is_disk_full(e):
    """Whether an exception says so; of torch.save() it is a RuntimeError about where it is in the file."""
    return isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or isinstance(e, RuntimeError) and "unexpected pos" in str(e)


def cannot_write(path, e):
    """The Refuse for an OSError met while writing."""
    if is_disk_full(e):
        return Refuse(f"disk full while writing {path}: free some space, then run the same command again", 4)
    return Refuse(f"cannot write {path}: {e.strerror}", 4)


def take_lock(folder, wait=False):
    """Hold a folder, which is made if need be, until the returned file is closed; the kernel frees it when the process dies, however it
    dies. What a killed process left half-written is removed. wait: for whoever holds it; without, Refuse."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    except BlockingIOError:
        file.seek(0)
        raise Refuse(f"{folder} is in use by another process ({file.read(20) or 'just started'}): wait for it, or stop it", 6) from None
    except OSError as e:
        raise cannot_write(folder / ".lock", e) from e
    for leftover in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        leftover.unlink()
    return file


def write_json(path, value):
    """Strict JSON (no NaN), with a checksum of itself."""
    value = {k: v for k, v in value.items() if k != "checksum"}
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    write_file(path, json.dumps({**value, "checksum": checksum(text.encode())}, indent=1, allow_nan=False).encode() + b"\n")


def read_json(path, *keys):
    """What write_json wrote; Refuse if it is missing, damaged or edited, or if it is another file that lacks one of `keys`."""
    try:
        value = json.loads(Path(path).read_text())
        said = value.pop("checksum")
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except FileNotFoundError:
        raise Refuse(f"{path} is missing: run the stage before this one") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as e:
        raise Refuse(f"{path} is damaged ({type(e).__name__}): delete it and run the stage that makes it again") from e
    if said != checksum(text.encode()):
        raise Refuse(f"{path} is damaged or was edited (its checksum differs): run the stage that makes it again")
    if not set(keys) <= set(value):
        raise Refuse(f"{path} is another file or of another version (no {' or '.join(sorted(set(keys) - set(value)))}): run the stage that makes it again")
    return value


BLANK = b"0" * 32            # stands in the file for its checksum while that is computed


def write_tensors(path, tensors, meta=None):
    """Write {name: tensor} and a JSON-able `meta` as one safetensors file; returns its checksum, which the file also holds."""
    header = json.dumps({"checksum": BLANK.decode(), "format": FORMAT, **(meta or {})}, sort_keys=False, allow_nan=False)
    blob = bytearray(safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"meta": header}))
    at, said = blob.index(BLANK), checksum(bytes(blob))
    blob[at:at + 32] = said.encode()
    write_file(path, blob)
    return said


def read_tensors(path, expected=None):
    """({name: tensor}, meta) of a file by write_tensors; Refuse if any byte changed or its checksum is not `expected`."""
    try:
        blob = Path(path).read_bytes()
        length = int.from_bytes(blob[:8], "little")
        meta = json.loads(json.loads(blob[8:8 + length])["__metadata__"]["meta"])
        said, at = meta["checksum"], blob.index(meta["checksum"].encode())
        hashed = xxhash.xxh3_128(blob[:at])
        hashed.update(BLANK)
        hashed.update(memoryview(blob)[at + 32:])
        intact = hashed.hexdigest() == said
        tensors = safetensors.torch.load(blob) if intact else None
    except FileNotFoundError:
        raise Refuse(f"{path} is missing: run the stage before this one") from None
    except (ValueError, KeyError, TypeError, RecursionError, MemoryError, OverflowError, SafetensorError, OSError) as e:
        raise Refuse(f"{path} is damaged or not ours ({type(e).__name__}): delete it and run the stage that makes it again") from e
    if not intact:
        raise Refuse(f"{path} is damaged (its checksum differs): delete it and run the stage that makes it again")
    if expected and said != expected:
        raise Refuse(f"{path} belongs to another cache or run (its checksum is not the listed one): make it again")
    return tensors, meta


class Acts:
    """Cached activations, the folder acts/NAME that 01_cache_acts.py writes.

    meta.json lists the shards; a shard holds `acts` [rows, d_in], `tokens`, `context` and `position` [rows]. Rows were shuffled
    across the whole cache when written, so that reading in order is random; with `window` across so many tokens. The shards of a
    `ring` come while it is read, and go when they have been: `sizes` lists the rows of all that there will be."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            there = sorted(p.parent.name for p in self.folder.parent.glob("*/meta.json"))
            raise Refuse(f"no activations in {folder}" + (f": there are {', '.join(there)}" if there else ": run 01_cache_acts.py first"), 2)
        self.meta = read_json(self.folder / "meta.json", "complete", "d_in", "dtype", "shards", "val")
        if self.meta.get("format") != FORMAT:
            raise Refuse(f"{self.folder}/meta.json has format {self.meta.get('format')}, this is {FORMAT}: cache again")
        self.window, self.ring = self.meta.get("window"), self.meta.get("ring")
        if not self.meta["complete"] and not (self.ring and self.meta["shards"]):
            raise Refuse(f"{self.folder} is not finished: run the same 01_cache_acts.py again, it goes on where it stopped"
                         + (", and come back when it has the first window" if self.ring else ""))
        self.d_in, self.shards, self.scale = self.meta["d_in"], self.meta["shards"], self.meta["scale"]
        self.sizes = [self.meta["rows_per_shard"]] * self.meta["promised"] if self.window and not self.meta["complete"] else [s["rows"] for s in self.shards]
        self.rows = sum(self.sizes)
        for file in [s["file"] for s in self.shards] + [self.meta["val"]["file"]]:
            if not re.fullmatch(r"\w+\.safetensors", file, re.ASCII):
                raise Refuse(f"{self.folder}/meta.json names {file!r}, which no cache has: cache again")
        self.reads = 0                            # shards read so far
        self.stopped = False                      # set to end a wait for the next shard of a ring
        self.checksum = checksum(json.dumps([s["checksum"] for s in self.shards] if not self.window else     # of what is known when the first window is
                                            [self.shards[0]["checksum"], self.sizes]).encode())

    waiting = False                               # 02_train.py: whether it waits for such a shard

    def wait_for(self, i):
        """Until 01_cache_acts.py has written shard i of a ring; a wait of more than 10 s is told once."""
        tell = time.monotonic() + 10
        while i >= len(self.shards):
            self.meta = read_json(self.folder / "meta.json")
            self.shards = self.meta["shards"]
            if i >= len(self.shards) and (self.stopped or self.meta["complete"]):
                raise Refuse(f"{self.folder}: the text ended after {sum(s['rows'] for s in self.shards):,} of {self.rows:,} rows: "
                             "delete that folder and give 01_cache_acts.py so many --tokens")
            if time.monotonic() > tell:
                print(f"\nwaiting for shard {i + 1} of {len(self.sizes)} of {self.folder}: "
                      "if 01_cache_acts.py, which makes it, was stopped, start the same command again", flush=True)
                tell = float("inf")
            time.sleep(0.2 if i >= len(self.shards) else 0)

    def ends_window(self, i):
        """Whether shard i is the last one of its window; False in a cache that was shuffled as a whole."""
        return bool(self.window) and (i + 1 >= len(self.shards) or self.shards[i + 1]["window"] != self.shards[i]["window"])

    def shard(self, i):
        """The tensors of shard i, checked; activations in the dtype of the cache (int8 caches: float32)."""
        self.wait_for(i)
        entry = self.shards[i]
        self.reads += 1
        path = self.folder / entry["file"]
        if self.ring and not path.exists():
            raise Refuse(f"{path} was read and deleted: the shards of a --ring can be read once, by runs that start together; cache again")
        tensors, _ = read_tensors(path, entry["checksum"])
        if "acts" not in tensors:
            raise Refuse(f"{path} holds {', '.join(tensors) or 'nothing'}, not activations: cache again")
        acts = tensors["acts"]
        if acts.shape != (entry["rows"], self.d_in) or acts.dtype != getattr(torch, self.meta["dtype"], None):
            raise Refuse(f"{path} has shape {list(acts.shape)} of {acts.dtype}, not {[entry['rows'], self.d_in]} of {self.meta['dtype']}: cache again")
        if acts.dtype == torch.int8:
            tensors["acts"] = acts = acts * tensors["row_scale"][:, None] * tensors["dim_std"] + tensors["dim_mean"]
        low, high = torch.aminmax(acts)
        if not (low.isfinite() and high.isfinite()):
            raise Refuse(f"{path} has activations that are not finite: cache again, in bfloat16 or float32")
        return tensors

    def val(self):
        """The held-out part: `tokens` [n, ctx] for a language model; `acts` and the true features for synthetic data."""
        return read_tensors(self.folder / self.meta["val"]["file"], self.meta["val"]["checksum"])[0]

"""Evaluate trained SAEs on held-out contexts; the runs of a cache share each pass of the model.

    python 03_eval.py                                        every finished run under runs/
    python 03_eval.py runs/topk-s0 runs/topk-s1 --eval core  these runs, this evaluation
    python 03_eval.py --controls                             also SAEs that have learned nothing

Reads runs/NAME (02_train.py), acts/NAME (01_cache_acts.py) and the language model. Writes
runs/NAME/eval/EVAL.json, and for controls runs/controls-ACTS/KIND/eval/EVAL.json:

    core        reconstruction, sparsity, the language model's loss with the SAE spliced in, the
                truth of synthetic data, and the guards; rates.safetensors: how often latents fire
    geometry    coherence, rank, condition numbers, correlations, random projections
    stability   which latents the other seeds of the same settings find again
    features    for some latents the contexts in which they fire most
    absorption, sparse_probing, scr, tpp, unlearning: SAEBench's
    forget      the language model's loss on text to forget and to keep, latents clamped as there

A result that belongs to the same weights, activations and settings is left alone, unless --force.
Numbers are in fp32, sums in fp64.
"""
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import random
import re
import string
import sys
import tempfile
import textwrap
import time
import unittest.mock
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median_high, median_low
from typing import Callable, NamedTuple

import numpy
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F
from tqdm import tqdm

from sae import (SAE, Acts, Parser, Refuse, checksum, decoder_layers, files_checksum, generator,
                 hook_point, hub_errors, language_model, load_run, lock,
                 model_checksum, model_tokenizer, pick_device, read_json, read_log, read_tensors,
                 run_folders, run_script, unit, write_file, write_json, write_tensors)

VERSION = 8                  # of the evaluations here; a result of another version is made again
LOADED = 2 ** 33             # bytes of SAEs that are in memory at the same time, or one SAE
CODES = 2 ** 25              # entries of [rows, d_sae] that are made at a time
LOGITS = {"cpu": 2 ** 22, "cuda": 2 ** 28}     # entries of [tokens, vocabulary] at a time


class Run:
    """What is evaluated: a run of 02_train.py, or a control."""

    def __init__(self, folder, config, sae):
        self.folder, self.name, self.config = folder, folder.name, config
        self.sae = sae.requires_grad_(False)     # in eval mode; None when no longer needed
        self.is_control = "control" in config


class Evaluation(NamedTuple):
    """An entry of EVALS, the table of all evaluations below."""
    make: Callable           # (acts, model, runs, settings) -> yields (run, result or error)
    settings: Callable = lambda acts: {}   # what results depend on besides weights, activations
    inputs: Callable = lambda run: {}      # ... and what other files of this run or of its siblings
    of_controls: bool = True               # whether it says something of a control
    of_synthetic: bool = False             # whether it says something of synthetic data


class Unfit(Exception):
    """An evaluation can say nothing of these activations; no run has failed."""


def attempt(failed, run, step, *args):
    """step(*args), or the error that ended this step or an earlier one of the run.

    Other runs go on; evaluate() reports the error, which it gets in place of a result.
    """
    if run not in failed:
        try:
            return step(*args)
        except Exception as error:
            failed[run] = error
    return failed[run]


def each(name, runs, evaluate, *more):
    """Yield (run, evaluate(run, *more) or the error that it raised)."""
    for run in tqdm(runs, desc=name, disable=None):
        if run.sae.W_dec.any():
            yield run, attempt({}, run, evaluate, run, *more)
        else:                                # the control that predicts the mean
            yield run, {"metrics": {}, "guards": find_guards({"no_latents": "none"})}


# ---- the language model --------------------------------------------------------------------------


class Reached(Exception):
    """Ends a forward pass at the hook."""


class LanguageModel:
    """The language model in fp32, read at stage 1's hook and run on with other values there.

    Loaded when it is first needed, so that evaluations that need none do without it."""

    def __init__(self, acts, device, trust_remote_code=False):
        self.meta, self.device = acts.meta, device
        self.path, self.revision = (acts.meta["model"][key] for key in ("path", "revision"))
        self.is_local = Path(self.path).exists()
        self.extra = {} if self.is_local else {"revision": self.revision}
        self.extra["trust_remote_code"] = trust_remote_code

    @functools.cached_property
    def model(self):
        if self.is_local and self.revision not in (None, model_checksum(self.path)):
            raise Refuse(f"the language model in {self.path} has changed since its activations "
                         "were cached: put it back, or cache again")
        with hub_errors("model", self.path):
            model = language_model(self.path, torch.float32, **self.extra)
        return model.to(self.device).requires_grad_(False)

    @functools.cached_property
    def point(self):
        """The module whose output was cached."""
        layers = decoder_layers(self.model.base_model, self.meta["model"]["n_layers"], self.path)
        return hook_point(layers[self.meta["layer"]], self.meta["hook"], self.path)

    @functools.cached_property
    def tokenizer(self):
        with hub_errors("model", self.path):
            tokenizer = model_tokenizer(self.path, add_bos_token=True, padding_side="right",
                                        **self.extra)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
        return tokenizer

    @property
    def unembedding(self):
        """[vocabulary, d_model]"""
        return self.model.get_output_embeddings().weight

    def at_once(self, ctx):
        """How many contexts of ctx tokens the memory for logits holds."""
        return max(1, LOGITS[self.device.type] // (ctx * len(self.unembedding)))

    def activations(self, tokens, mask=None):
        """What the hook sees of tokens [n, ctx]: [n, ctx, d_in]. mask [n, ctx]: 0 at padding.
        The layers after the hook do not run."""
        def stop(module, args, out):
            raise Reached(hidden_of(out))

        try:
            with self.point.register_forward_hook(stop):
                self.run(tokens, mask)
        except Reached as reached:
            return reached.args[0]

    def logits(self, tokens, mask=None, replace=lambda hidden: hidden):
        """Logits [n, ctx, vocabulary] of tokens [n, ctx]. replace: function from the hook's output
        [n, ctx, d_in] to what takes its place."""
        def splice(module, args, out):
            hidden = replace(hidden_of(out))
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        with self.point.register_forward_hook(splice):
            return self.run(tokens, mask).logits.float()

    def run(self, tokens, mask):
        """The forward pass."""
        if mask is None:         # without one transformers looks for several texts in a context,
            mask = torch.ones_like(tokens)                 # which takes a fifth of a pass
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=False)


def hidden_of(out):
    """The hidden state [n, ctx, d] in a layer's output, which some models wrap in a tuple."""
    return out[0] if isinstance(out, tuple) else out


class Predictions:
    """The language model on one batch of contexts: clean, and with other activations at the hook.

    Positions are counted in two ways. Ours: rows, which are neither BOS, EOS and padding (mask) nor
    above the cache's norm limit; a prediction counts from a row, of a row. SAEBench's: all of mask,
    and of what follows there padding alone is left out, which packed contexts don't have.
    """

    def __init__(self, model, tokens, mask, norm_limit, packed=True):
        def keep(hidden):
            self.hidden = hidden
            return hidden

        self.model, self.tokens, self.mask = model, tokens, mask
        self.followed = mask[:, :-1] if packed else mask[:, :-1] & mask[:, 1:]
        log_p = model.logits(tokens, replace=keep).log_softmax(-1)
        self.p = log_p.exp()
        self.entropy = -torch.linalg.vecdot(self.p, log_p)
        self.rows = mask & (self.hidden.norm(dim=-1) <= norm_limit)
        self.outliers = mask & ~self.rows
        self.counted = self.rows[:, :-1] & self.rows[:, 1:]
        self.clean = next_token_loss(log_p, tokens)

    def spliced(self, hidden):
        """Loss [n, ctx - 1] and divergence from the clean prediction [n, ctx], with `hidden` at the
        hook."""
        log_q = self.model.logits(self.tokens, replace=lambda _: hidden).log_softmax(-1)
        divergence = -self.entropy - torch.linalg.vecdot(self.p, log_q)
        return next_token_loss(log_q, self.tokens), divergence

    def with_rows(self, x):
        """The activations at the hook with x [rows, d_in] in place of the rows."""
        hidden = self.hidden.clone()
        hidden[self.rows] = x
        return hidden

    def our_sums(self, name, ce, kl):
        """Summed over the predictions from a row, of a row."""
        return {f"ce_{name}": total(ce[self.counted]),
                f"kl_{name}": total(kl[:, :-1][self.counted])}

    def saebench_sums(self, name, ce, kl):
        """Summed as SAEBench does: all that is predicted from a token of `mask`; the loss has no
        last position."""
        return {f"ce_loss_with_{name}": total(ce[self.followed]),
                f"kl_div_with_{name}": total(kl[self.mask])}


def next_token_loss(log_p, tokens):
    """Loss of each next token [n, ctx - 1]."""
    return -log_p[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)


def total(tensor):
    """Sum in fp64."""
    return tensor.sum(dtype=torch.float64).item()


class Batch(NamedTuple):
    """A part of the held-out data."""
    x: torch.Tensor                    # rows [n, d_in], fp32
    features: torch.Tensor | None      # synthetic data: the true features' sizes [n, n_features]
    predictions: Predictions | None    # of a language model


def held_out(acts, model, device):
    """Yield the held-out part of a cache in Batches."""
    val = acts.val()
    first = next(iter(val.values()))
    size = model.at_once(first.shape[1]) if model else 4096
    for start in tqdm(range(0, len(first), size), desc="core", disable=None):
        part = {name: tensor[start:start + size].to(device) for name, tensor in val.items()}
        if model is None:
            yield Batch(part["acts"].float(), part.get("features"), None)
        elif part["mask"].any():
            found = Predictions(model, part["tokens"].long(), part["mask"], acts.norm_limit,
                                acts.meta.get("pack", True))
            yield Batch(found.hidden[found.rows], None, found)


def training_rows(acts, n, device):
    """The first n rows [n, d_in] of the cache; it was shuffled when it was written."""
    return acts.shard(0)["acts"][:n].float().to(device)


def forward_in_blocks(sae, x):
    """Yield (rows of raw x, Out) for blocks of rows that bound the memory of [rows, d_sae]."""
    for part in x.split(max(1, CODES // sae.d_sae)):
        yield part, sae(sae.normalise(part))


# ---- core: reconstruction, sparsity, the language model's loss -----------------------------------


def evaluate_core(acts, model, runs, settings):
    """Core metrics and guards of all runs from one pass over the held-out data."""
    device = runs[0].sae.b_dec.device
    failed, data, truth = {}, Data(acts, device), load_truth(acts, device)
    scores = {run: attempt(failed, run, Score, run.sae, truth) for run in runs}
    for batch in held_out(acts, model, device):
        data.add(batch)
        for run in runs:
            attempt(failed, run, Score.add, scores[run], batch)
    for run in runs:
        yield run, attempt(failed, run, core_result, run, scores[run], data, acts)


def core_result(run, score, data, acts):
    """The result of one run, from the sums of its Score and of Data."""
    metrics, rate = score.metrics(data), score.fires / data.n
    return {"metrics": metrics, "guards": find_guards(gather_facts(run, metrics, acts)),
            "details": {"density": density(rate)}, "rows": data.n, "rates": rate.float().cpu()}


class Data:
    """Sums over the held-out rows that depend on no SAE."""

    def __init__(self, acts, device):
        self.d_in, self.n, self.norm = acts.d_in, 0, 0.0
        self.sum = torch.zeros(acts.d_in, dtype=torch.float64, device=device)
        self.square = torch.zeros(acts.d_in, acts.d_in, dtype=torch.float64, device=device)
        self.sample = training_rows(acts, 16_384, device)
        self.language = Counter()

    def add(self, batch):
        x = batch.x.double()
        self.n += len(x)
        self.norm += total(x.norm(dim=-1))
        self.sum += x.sum(0)
        self.square += x.T @ x
        if batch.predictions:
            self.add_language(batch.predictions)

    def add_language(self, found):
        """Losses clean, with zeros for the rows (ours) and with zeros everywhere (SAEBench's)."""
        zeros = torch.zeros_like(found.hidden)
        self.language.update({
            "predictions": found.counted.sum().item(),
            "saebench_ce": found.followed.sum().item(),
            "saebench_kl": found.mask.sum().item(),
            "ce_clean": total(found.clean[found.counted]),
            "ce_loss_without_sae": total(found.clean[found.followed]),
            **found.our_sums("zero", *found.spliced(found.with_rows(0.0))),
            **found.saebench_sums("ablation", *found.spliced(zeros))})

    @property
    def variance(self):
        """Sum of the squared distances to the mean."""
        return (self.square.trace() - self.sum.square().sum() / self.n).item()

    @functools.cached_property
    def pca(self):
        """Explained variance of these rows by the first 0, 1 ... d_in principal components of the
        training rows."""
        sample = self.sample.double()
        mean = sample.mean(0)
        axes = torch.linalg.eigh(torch.cov(sample.T)).eigenvectors.flip(1)
        cross = torch.outer(self.sum, mean)
        about_mean = self.square - cross - cross.T + self.n * torch.outer(mean, mean)
        captured = F.pad(((about_mean @ axes) * axes).sum(0).cumsum(0), (1, 0))
        return (1 - (about_mean.trace() - captured) / self.variance).tolist()


COUNTED_BY = {               # sum of losses or divergences -> over how many predictions
    "ce_clean": "predictions", "ce_zero": "predictions", "ce_sae": "predictions",
    "kl_zero": "predictions", "kl_sae": "predictions",
    "ce_loss_without_sae": "saebench_ce", "ce_loss_with_ablation": "saebench_ce",
    "ce_loss_with_sae": "saebench_ce",
    "kl_div_with_ablation": "saebench_kl", "kl_div_with_sae": "saebench_kl",
}


class Score:
    """Sums over the held-out rows for one SAE."""

    def __init__(self, sae, truth):
        self.sae, self.sums = sae, Counter()
        self.fires = torch.zeros(sae.d_sae, dtype=torch.float64, device=sae.b_dec.device)
        self.truth = TruthScore(truth, sae) if truth else None

    def add(self, batch):
        reconstructed, start = [], 0
        for x, out in forward_in_blocks(self.sae, batch.x):
            x_hat = out.x_hat / self.sae.scale + self.sae.mean
            self.add_rows(x.double(), x_hat.double(), out.acts)
            if self.truth:
                self.truth.add(out.acts > 0, batch.features[start:start + len(x)] > 0)
            start += len(x)
            reconstructed.append(x_hat)
        if batch.predictions:
            self.add_language(batch.predictions, torch.cat(reconstructed))

    def add_rows(self, x, x_hat, acts):
        fires = acts > 0
        self.fires += fires.sum(0)
        self.sums.update({
            "error": total((x - x_hat).square()),
            "dot": total(x * x_hat),
            "norm": total(x_hat.norm(dim=-1)),
            "square": total(x_hat.square()),
            "cosine": total(torch.cosine_similarity(x, x_hat, dim=-1)),
            "l1": total(acts) / self.sae.scale.item(),
            "silent_rows": total(~fires.any(-1))})

    def add_language(self, found, x_hat):
        """One spliced pass for ours and SAEBench's figures; a second one where rows above the norm
        limit are left alone by ours and reconstructed by SAEBench's."""
        hidden = found.with_rows(x_hat)
        ours = saebench = found.spliced(hidden)
        if found.outliers.any():
            hidden[found.outliers] = self.sae.reconstruct(found.hidden[found.outliers])
            saebench = found.spliced(hidden)
        self.sums.update(found.our_sums("sae", *ours))
        self.sums.update(found.saebench_sums("sae", *saebench))

    def metrics(self, data):
        s, n, rate = self.sums, data.n, self.fires / data.n
        l0, dense, W_dec = rate.sum().item(), rate > 0.1, self.sae.W_dec
        explained = 1 - s["error"] / data.variance
        found = {
            "explained_variance": explained,
            "mse": s["error"] / n / data.d_in,
            "cosine": s["cosine"] / n,
            "l2_ratio": s["norm"] / data.norm,              # ||x_hat|| / ||x||
            "slope": s["dot"] / max(s["square"], 1e-30),    # of x on x_hat
            "l0": l0,
            "l1": s["l1"] / n,
            "dead": (rate == 0).double().mean().item(),     # share that never fires here
            "dense": dense.double().mean().item(),          # ... on a tenth of all rows
            "dense_share": (rate[dense].sum() / max(l0, 1e-30)).item(),    # of L0
            "silent_rows": s["silent_rows"] / n,
            "decoder_norm_error": (W_dec.norm(dim=-1) - 1).abs().max().item(),
            "explained_variance_pca": data.pca[min(round(l0), data.d_in)],   # of rank L0
            "skip_share": skip_share(self.sae, data.sample[:4096]),
        }
        if data.language:
            found |= self.language_metrics(data.language)
        return found | (self.truth.metrics() if self.truth else {})

    def language_metrics(self, shared):
        sums = {**shared, **self.sums}
        m = {name: sums[name] / sums[count] for name, count in COUNTED_BY.items()}
        m["ce_recovered"] = (m["ce_zero"] - m["ce_sae"]) / (m["ce_zero"] - m["ce_clean"])
        m["kl_recovered"] = 1 - m["kl_sae"] / m["kl_zero"]
        m["ce_loss_score"] = ((m["ce_loss_with_ablation"] - m["ce_loss_with_sae"])
                              / (m["ce_loss_with_ablation"] - m["ce_loss_without_sae"]))
        m["kl_div_score"] = 1 - m["kl_div_with_sae"] / m["kl_div_with_ablation"]
        return m


def density(rate, lowest=-6, bins=24):
    """Histogram of log10 of the firing rates [d_sae]; latents that never fire are counted apart."""
    log = rate[rate > 0].log10().clamp(lowest, 0).cpu().numpy()
    counts, edges = numpy.histogram(log, bins, (lowest, 0))
    silent = int((rate == 0).sum())
    return {"log10_edges": edges.tolist(), "counts": counts.tolist(), "silent": silent}


def skip_share(sae, x):
    """How much of what an SAE explains of raw rows x [n, d_in] comes around its latents.

    With all acts at zero x_hat may not depend on the row. The variance that it explains all the
    same, about its mean error, over the SAE's explained variance; 0 without such a path.
    """
    def explained(x_hat):
        error = (x - x_hat).double()
        return 1 - ((error - error.mean(0)).square().sum() / (x - x.mean(0)).square().sum()).item()

    with_acts = explained(sae.reconstruct(x))
    sae.activate = torch.zeros_like        # hides the method until it is deleted
    try:
        without_acts = explained(sae.reconstruct(x))
    finally:
        del sae.activate
    return max(0.0, without_acts) / max(with_acts, without_acts, 1e-3)


# ---- truth: synthetic data, whose features are known ---------------------------------------------


NEAR = 0.8                   # a latent with this cosine to a feature is the feature's
RELATED = 0.3                # ... and with this one to parent and child it may stand for both
PAIR_ROWS = 10               # rows on which parent and child are both on, for a pair to count


class Truth(NamedTuple):
    """The features that made synthetic data."""
    directions: torch.Tensor               # unit [n_features, d_in]
    parent: torch.Tensor                   # of each (parent, child) pair [pairs]
    child: torch.Tensor                    # [pairs]


def load_truth(acts, device):
    """The Truth of a cache, or None."""
    if "truth" not in acts.meta:
        return None
    entry = acts.meta["truth"]
    tensors, _ = read_tensors(acts.folder / entry["file"], entry["checksum"])
    child = (tensors["parent"] >= 0).nonzero().flatten()
    parent = tensors["parent"][child].long()
    directions = unit(tensors["dictionary"].float())
    return Truth(directions.to(device), parent.to(device), child.to(device))


class TruthScore:
    """How the latents of one SAE agree with the true features."""

    def __init__(self, truth, sae):
        self.truth, self.sums = truth, Counter()
        self.cosine = truth.directions @ unit(sae.W_dec).T            # [n_features, d_sae]
        # one latent for each feature, so that the sum of cosines is highest
        matched = linear_sum_assignment(self.cosine.abs().cpu().numpy(), maximize=True)
        self.features, self.latents = (torch.as_tensor(i).to(self.cosine.device) for i in matched)
        self.near = (self.cosine > NEAR).float()
        related = (self.cosine > RELATED).float()
        self.related = related[truth.parent] * related[truth.child]            # [pairs, d_sae]

    def add(self, fires, on):
        """fires [n, d_sae]: latents that fire. on [n, n_features]: features that are on."""
        parent, child = self.truth.parent, self.truth.child
        mine, true, parents = fires[:, self.latents], on[:, self.features], parent.unique()
        seen = fires.float() @ self.near.T > 0             # [n, n_features]: a latent near it fires
        stands_in = fires.float() @ self.related.T > 0     # [n, pairs]
        both = on[:, parent] & on[:, child]
        counts = {"hit": mine & true, "fired": mine, "true": true, "both": both,
                  "absorbed": both & ~seen[:, parent] & stands_in,
                  "parent": on[:, parents], "recalled": on[:, parents] & seen[:, parents]}
        self.sums.update({name: count.sum(0) for name, count in counts.items()})

    def metrics(self):
        """mcc: mean |cosine| of features and their latents. uniqueness: features that are some
        latent's nearest one, per latent. absorption: of the rows with parent and child on, the
        share where every latent near the parent is silent and one related to both fires; mean of
        the pairs."""
        s = {name: value.double() for name, value in self.sums.items()}
        absolute, pairs = self.cosine.abs(), s["both"] >= PAIR_ROWS
        f1 = 2 * s["hit"] / (s["fired"] + s["true"])
        return {"mcc": absolute[self.features, self.latents].mean().item(),
                "coverage": (absolute.amax(1) > 0.9).double().mean().item(),
                "uniqueness": len(absolute.argmax(0).unique()) / absolute.shape[1],
                "f1": mean(f1[s["true"] > 0]),
                "absorption": mean((s["absorbed"] / s["both"])[pairs]),
                "parent_recall": mean((s["recalled"] / s["parent"])[s["parent"] > 0]),
                "features_seen": int((s["true"] > 0).sum()), "pairs": int(pairs.sum())}


def mean(values):
    """The mean of a tensor; None of an empty one."""
    return values.double().mean().item() if len(values) else None


# ---- guards: what makes a run's numbers invalid or doubtful --------------------------------------


INVALID, CAVEAT = "invalid", "caveat"


class Guard(NamedTuple):
    """Fires if the number `fact` is below or above a bound, or if the text `fact` is not empty."""
    name: str
    level: str
    fact: str
    why: str
    below: float = -math.inf
    above: float = math.inf

    def fires(self, value):
        if value is None:
            return False
        return value != "" if isinstance(value, str) else value < self.below or value > self.above


# Of each name the first one that fires counts.
GUARDS = [
    Guard("not finite", INVALID, "not_finite", "not finite: {not_finite}"),
    Guard("void", INVALID, "void", "{void}"),
    Guard("silent", INVALID, "silent_rows",
          "no latent fires on {silent_rows:.0%} of the rows", above=0.5),
    Guard("zero output", INVALID, "l2_ratio",
          "x_hat is {l2_ratio:.3f} times as long as x", below=0.1),
    Guard("worse than the mean", INVALID, "explained_variance",
          "explained variance {explained_variance:.3f}", below=0.0),
    Guard("worse than zeros", INVALID, "ce_recovered",
          "the model's loss is higher than with zeros: recovered {ce_recovered:.3f}", below=0.0),
    Guard("worse than zeros", INVALID, "kl_recovered",
          "predictions are further off than with zeros: {kl_recovered:.3f}", below=0.0),
    Guard("around the latents", INVALID, "skip_share",
          "{skip_share:.0%} of the explained variance comes without a latent", above=0.5),
    Guard("around the latents", CAVEAT, "skip_share",
          "{skip_share:.1%} of the explained variance comes without a latent", above=0.001),
    Guard("untrained", INVALID, "control", "a control: {control}"),
    Guard("untrained", INVALID, "rows_per_latent",
          "{rows_per_latent:.0f} training rows for each latent", below=60),
    Guard("untrained", INVALID, "cosine_with_start",
          "mean cosine of its weights with their start {cosine_with_start:.4f}", above=0.99),
    Guard("short run", CAVEAT, "rows_per_latent",
          "{rows_per_latent:.0f} training rows for each latent", below=300),
    Guard("not sparse", INVALID, "l0_share",
          "{l0_share:.0%} of the latents fire on a row", above=0.25),
    Guard("not sparse", INVALID, "l0_per_dimension",
          "L0 is {l0_per_dimension:.2f} of the dimensions", above=1.0),
    Guard("no better than PCA", CAVEAT, "gain_over_pca",
          "as many principal components explain {explained_variance_pca:.3f}", below=0.0),
    Guard("not unit", INVALID, "decoder_norm_error",
          "decoder rows are not of length 1: off by up to {decoder_norm_error:.2g}", above=0.01),
    Guard("stale", INVALID, "differs", "trained on another {differs} than {acts} has now"),
    Guard("stale", CAVEAT, "changed", "{changed} was cached again since training"),
    Guard("dead latents", CAVEAT, "dead", "{dead:.0%} of the latents never fire", above=0.1),
    Guard("dense latents", CAVEAT, "dense_share",
          "latents that fire on a tenth of the rows make {dense_share:.0%} of L0", above=0.2),
    Guard("dense latents", CAVEAT, "dense",
          "{dense:.1%} of the latents fire on a tenth of the rows", above=0.01),
    Guard("shrinkage", CAVEAT, "l2_ratio",
          "x_hat is {l2_ratio:.3f} times as long as x", below=0.9),
    Guard("shrinkage", CAVEAT, "slope",
          "x is {slope:.3f} times as long as x_hat along it", above=1.05),
    Guard("penalty dominates", CAVEAT, "dominant", "over the reconstruction error: {dominant}"),
    Guard("penalty idle", CAVEAT, "idle", "below 1 % of the reconstruction error: {idle}"),
    # of SAEBench's metrics and forget
    Guard("no latents", INVALID, "no_latents", ""),
    Guard("absorption is vacuous", INVALID, "vacuous",
          "nothing is absorbed, as no latent knows a letter (median F1 {vacuous})"),
    Guard("out of scope", CAVEAT, "scope", "absorption on {scope}"),
    Guard("probes at chance", INVALID, "above_chance",
          "the probes on its latents see a constant", below=0.02),
    Guard("unreliable metric", CAVEAT, "most_ablated",            # arXiv 2605.18229
          "figures with 50 and more ablated latents say little", above=49),
    Guard("no bias", CAVEAT, "bias_cost",
          "the bias costs the probes {bias_cost:.3f}: there is little to remove", below=0.05),
    Guard("nothing clamped", CAVEAT, "clamped",
          "no latent fires on the topic and rarely on other text", below=1),
]


def find_guards(facts):
    """The guards that fire: [{name, level, why}], at most one of each name."""
    found = {}
    for guard in GUARDS:
        if guard.name not in found and guard.fires(facts.get(guard.fact)):
            why = guard.why.format(**facts)
            found[guard.name] = {"name": guard.name, "level": guard.level, "why": why}
    return list(found.values())


def gather_facts(run, metrics, acts):
    """What guards ask: the metrics and what the run's files say. None: not known."""
    sae, config = run.sae, run.config
    broken = [name for name, value in metrics.items() if not math.isfinite(value or 0.0)]
    broken += [name for name, value in sae.named_parameters() if not value.isfinite().all()]
    facts = {**metrics, "not_finite": ", ".join(broken), "control": config.get("control", ""),
             "l0_share": metrics["l0"] / sae.d_sae, "l0_per_dimension": metrics["l0"] / sae.d_in,
             "gain_over_pca": metrics["explained_variance"] - metrics["explained_variance_pca"]}
    if run.is_control:
        return facts
    rows = config["steps"] * config["settings"]["batch_size"]
    differs = [key for key in ("model", "layer", "hook_name") if config[key] != acts.meta[key]]
    changed = str(acts.folder) if config["acts_checksum"] != acts.checksum else ""
    ratios = late_ratios(run)
    dominant = [f"{name} {ratio:.2g}" for name, ratio in ratios.items() if ratio > 1]
    idle = [f"{name} {ratio:.2g}" for name, ratio in ratios.items()
            if ratio < 0.01 and name != "aux"]
    return facts | {"cosine_with_start": cosine_with_start(run), "acts": str(acts.folder),
                    "differs": ", ".join(differs), "changed": changed,
                    "rows_per_latent": rows / sae.d_sae, "void": "; ".join(config["void"]),
                    "dominant": ", ".join(dominant), "idle": ", ".join(idle)}


def cosine_with_start(run):
    """The lower of the decoder's and the encoder's mean cosine with what training started from."""
    start, _ = read_tensors(run.folder / "start.safetensors", run.config["start_checksum"])
    sae, device = run.sae, run.sae.b_dec.device
    pairs = ((start["W_dec"], sae.W_dec), (start["W_enc"].T, sae.W_enc.T))
    return min(F.cosine_similarity(old.to(device), new).mean().item() for old, new in pairs)


def late_ratios(run):
    """{penalty: its mean ratio to the reconstruction error in the second half of training}."""
    log = pd.DataFrame(read_log(run.folder, run.config))
    if log.empty:
        return {}
    means = log[log.step > run.config["steps"] / 2].filter(regex="^ratio_").mean().dropna()
    return {name.removeprefix("ratio_"): value for name, value in means.items()}


# ---- geometry: how decoder rows lie, and which latents fire together -----------------------------


GEOMETRY_ROWS = 4096         # training rows on which firing is seen
GEOMETRY_LATENTS = 2048      # latents that are looked at in pairs, at random where there are more
JL_DIMENSIONS = (32, 64, 128, 256, 512)
TOP_PAIRS = 0.001            # share of all pairs that a batch selects, as in topk_ortho_r1
PAIR_BATCHES = (256, 1024, 2048)       # rows
GROUP, SETS = 32, 64         # latents in a group, and how many groups and active sets are looked at


def evaluate_geometry(acts, model, runs, settings):
    """Geometry of each run, and `null`: the same of random directions, and of activations that were
    shifted against each other."""
    x = training_rows(acts, GEOMETRY_ROWS, runs[0].sae.b_dec.device)
    yield from each("geometry", runs, geometry_of, x)


@functools.cache
def random_geometry(n, d, device):
    """(random unit rows [n, d], their decoder_geometry(), their projections())."""
    W = random_directions(n, d, "geometry").to(device)
    return W, decoder_geometry(W), projections(W)


def random_directions(n, d, *key):
    """Unit rows [n, d] in random directions."""
    return unit(torch.randn(n, d, generator=generator("directions", n, d, *key)))


def geometry_of(run, x):
    """The result of one SAE on raw rows x [n, d_in]."""
    W, code = unit(run.sae.W_dec), encode_sample(run.sae, x)
    chance, null, null_projections = random_geometry(*W.shape, W.device)
    metrics = decoder_geometry(W) | sparsity(code) | {"correlation": mean_correlation(code.acts)}
    null = null | {"correlation": mean_correlation(shift_columns(code.acts))}
    condition = {}
    for kind, sets in (("active", code.active), ("group", cofiring_groups(code))):
        metrics[f"condition_{kind}"] = condition_number(W, sets)
        condition[kind] = {"null": {"median": condition_number(chance, sets)}}
    jl = {"dimensions": JL_DIMENSIONS, "run": projections(W), "null": null_projections}
    percentiles = numpy.percentile(code.l0.double().cpu(), range(101), method="nearest")
    details = {"l0_of_rows": percentiles.tolist(), "condition": condition, "jl": jl,
               "pairs": pair_stability(code), "null": null}
    return {"rows": len(x), "latents": len(code.latents), "metrics": metrics, "guards": [],
            "details": details}


def decoder_geometry(W, block=1024):
    """Metrics of unit rows W [n, d]; never all pairs at once.

    coherence: largest |cosine| of two rows. mean_max_cosine: mean cosine of a row with the nearest
    other one. effective_rank: exp of the entropy of the squared singular values' shares, which is
    also the Vendi score (Friedman 2022).
    """
    n = len(W)
    absolute, largest, nearest = 0.0, 0.0, []
    for start in range(0, n, block):
        cosine = W[start:start + block] @ W.T
        cosine.diagonal(start).zero_()
        absolute += total(cosine.abs())
        largest = max(largest, cosine.abs().max().item())
        cosine.diagonal(start).fill_(-2.0 if n > 1 else 0.0)
        nearest.append(cosine.amax(-1))
    power = torch.linalg.eigvalsh((W.T @ W).double()).clamp_min(0)
    return {"coherence": largest, "mean_max_cosine": torch.cat(nearest).mean().item(),
            "mean_abs_cosine": absolute / max(1, n * (n - 1)),
            "effective_rank": torch.special.entr(power / power.sum()).sum().exp().item()}


def projections(W):
    """How well k random orthonormal axes keep the cosines of unit rows W [n, d] (Johnson and
    Lindenstrauss 1984), for each k of JL_DIMENSIONS; from k = d on all is kept.

    error_sd: standard deviation of the cosines' error. recall: share of the n closest pairs that
    are among the n closest in the projection.
    """
    g = generator("projections")
    W = W[torch.randperm(len(W), generator=g)[:GEOMETRY_LATENTS].to(W.device)]
    axes = torch.linalg.qr(torch.randn(W.shape[1], W.shape[1], generator=g))[0].to(W)
    once = torch.ones(len(W), len(W), dtype=torch.bool, device=W.device).triu(1)       # each pair
    exact = (W @ W.T)[once]
    n = min(len(W), len(exact))
    found = {"error_sd": [], "recall": []}
    for k in JL_DIMENSIONS:
        low = unit(W @ axes[:, :k])
        rough = (low @ low.T)[once]
        found["error_sd"].append(finite((rough - exact).square().mean().sqrt().item()))
        kept = torch.isin(exact.topk(n).indices, rough.topk(n).indices)
        found["recall"].append(finite(kept.double().mean().item()))
    return found


class Code(NamedTuple):
    """What an SAE makes of a sample of rows."""
    l0: torch.Tensor         # [rows]
    hoyer: torch.Tensor      # [rows]  of the rows that fire
    rate: torch.Tensor       # [d_sae] how often each latent fires
    active: list             # of SETS rows: the latents that fire together, two or more
    latents: torch.Tensor    # [m]     the latents that are looked at in pairs; all of them fire
    acts: torch.Tensor       # [rows, m]
    pre: torch.Tensor        # [rows, m]


def encode_sample(sae, x):
    """Code of raw rows x [n, d_in]."""
    l0, hoyer, active, fires, root = [], [], [], 0, sae.d_sae ** 0.5
    for _, out in forward_in_blocks(sae, x):
        on = out.acts > 0
        l0.append(on.sum(-1))
        fires = fires + on.sum(0)
        active += [row.nonzero().flatten() for row in on[:SETS - len(active)]]
        # Hoyer 2004: 1 for a single latent, 0 if all fire alike
        ratio = out.acts.sum(-1) / out.acts.norm(dim=-1).clamp_min(1e-12)
        hoyer.append(((root - ratio) / max(root - 1, 1e-12))[on.any(-1)])
    firing = fires.nonzero().flatten()
    some = torch.randperm(len(firing), generator=generator("latents"))[:GEOMETRY_LATENTS]
    latents = firing[some.to(firing.device)].sort().values
    columns = [(out.acts[:, latents], out.pre[:, latents]) for _, out in forward_in_blocks(sae, x)]
    acts, pre = (torch.cat(parts).float() for parts in zip(*columns))
    active = [row for row in active if len(row) > 1]
    return Code(torch.cat(l0), torch.cat(hoyer), fires / len(x), active, latents, acts, pre)


def sparsity(code):
    """hoyer: mean over the rows that fire; gini: of the firing rates, 0 if all are alike."""
    rate = code.rate.double().sort().values
    n, place = len(rate), torch.arange(1, len(rate) + 1, device=rate.device)
    gini = None
    if rate.sum() > 0:
        gini = (2 * (place * rate).sum() / (n * rate.sum()) - (n + 1) / n).item()
    return {"hoyer": mean(code.hoyer), "gini": gini}


def cofiring_groups(code):
    """Groups of GROUP latents: a random one and those whose firing correlates most with its own."""
    n = len(code.latents)
    if n < 2:
        return []
    fires = standardise((code.acts > 0).float())
    seeds = torch.randperm(n, generator=generator("groups"))[:SETS].to(fires.device)
    phi = fires[:, seeds].T @ fires                        # 1 with itself: it is in its own group
    return [code.latents[near] for near in phi.topk(min(GROUP, n)).indices]


def condition_number(W, sets):
    """Median condition number of the rows W[set], over the sets; None if it is infinite.

    A set with dependent rows, as any of more than d rows, counts as infinite.
    """
    found = []
    for latents in sets:
        s = torch.linalg.svdvals(W[latents].double())
        independent = len(latents) <= W.shape[1] and s[-1] > 1e-6 * s[0]
        found.append((s[0] / s[-1]).item() if independent else math.inf)
    return finite(median_high(found)) if found else None


def finite(number):
    """The number; None if it is not finite, which JSON has no word for."""
    return number if number is not None and math.isfinite(number) else None


def standardise(columns):
    """Columns [n, m] with mean 0 and length 1: products are correlations; constant ones are 0."""
    return unit((columns - columns.mean(0)).T).T


def correlations(columns):
    """[m, m] of the columns of [n, m]."""
    columns = standardise(columns)
    return columns.T @ columns


def mean_correlation(columns):
    """Mean |correlation| of two columns of [n, m]; None of fewer than two."""
    m = columns.shape[1]
    if m < 2:
        return None
    return correlations(columns).fill_diagonal_(0).abs().sum().item() / (m * (m - 1))


def shift_columns(columns):
    """Each column of [n, m] rotated by a random number of rows, so that columns share nothing."""
    n, m = columns.shape
    by = torch.randint(n, (m,), generator=generator("shift")).to(columns.device)
    return columns.gather(0, (torch.arange(n, device=columns.device)[:, None] + by) % n)


PAIR_RULES = {               # as in topk_ortho_r1: acts, pre of a batch [rows, m] -> scores [m, m]
    "coactivation": lambda acts, pre: acts.T @ acts,
    "phi": lambda acts, pre: correlations((acts > 0).float()),
    "preact": lambda acts, pre: correlations(pre),
}


def pair_stability(code):
    """How many of the TOP_PAIRS that a batch selects the next one selects too: the mean Jaccard
    index of successive batches, by rule and rows in a batch; `null`: by chance."""
    n, m = code.acts.shape
    count = round(TOP_PAIRS * m * (m - 1) / 2)
    if not count:
        return None
    sizes = [size for size in PAIR_BATCHES if 2 * size <= n]
    found = {"pairs": count, "rows": sizes, "null": [TOP_PAIRS / (2 - TOP_PAIRS)] * len(sizes)}
    for rule, score in PAIR_RULES.items():
        found[rule] = {"jaccard": []}
        for size in sizes:
            batches = list(zip(code.acts.split(size), code.pre.split(size)))[:min(n // size, 4)]
            chosen = [top_pairs(score(acts, pre), count) for acts, pre in batches]
            indices = [len(a & b) / max(1, len(a | b)) for a, b in itertools.pairwise(chosen)]
            found[rule]["jaccard"].append(sum(indices) / len(indices))
    return found


def top_pairs(score, count):
    """The set of the `count` pairs i < j with the highest positive scores [m, m], as flat
    indices."""
    top = score.triu(1).flatten().topk(count)
    return set(top.indices[top.values > 0].tolist())


# ---- stability: which latents another seed finds again -------------------------------------------


def siblings(run):
    """{name: checksum of its SAE} of the finished runs that differ from `run` in the seed alone."""
    same = ("variant", "acts_checksum", "steps", "settings", "code_checksum", "status")
    stem = run.name.rsplit("-s", 1)[0]
    found = {}
    for path in sorted(run.folder.parent.glob(f"{stem}-s*/config.json")):
        with contextlib.suppress(Refuse):  # its training was killed at its start, or it is damaged
            config, name = read_json(path), path.parent.name
            if name != run.name and all(config.get(key) == run.config.get(key) for key in same):
                found[name] = config["sae_checksum"]
    return found


def evaluate_stability(acts, model, runs, settings):
    """The latents of each run against those of its siblings, matched one-to-one by decoder rows.
    `null`: the same of two random dictionaries."""
    decoders = {run.folder: unit(run.sae.W_dec) for run in runs}
    yield from each("stability", runs, stability_of, decoders)


def stability_of(run, decoders):
    """The result of one run. decoders: {folder: unit decoder rows}, to which siblings are added."""
    W, others = decoders[run.folder], {}
    for name in siblings(run):
        folder = run.folder.parent / name
        if folder not in decoders:
            sae, _ = load_run(folder)
            decoders[folder] = unit(sae.W_dec.data).to(W)
        others[name] = compare(W, decoders[folder])
    metrics = pd.DataFrame(others).mean(axis=1).to_dict()
    if others:
        metrics["null"] = match_random(*W.shape)
    return {"metrics": metrics, "guards": [], "details": {"others": others}}


@functools.cache
def match_random(n, d):
    """The mean cosine that match() finds in two random dictionaries."""
    one, other = (random_directions(n, d, key) for key in ("one", "other"))
    return match(one, other).mean().item()


def match(W, V):
    """Cosines of the rows of W [n, d], at most GEOMETRY_LATENTS of them, with one row of V [m, d]
    each, so that their sum is highest. Signed: a latent's opposite is another feature."""
    some = torch.randperm(len(W), generator=generator("match"))[:GEOMETRY_LATENTS].to(W.device)
    cosine = (W[some] @ V.T).cpu()
    return cosine[linear_sum_assignment(cosine.numpy(), maximize=True)]


def compare(W, V):
    """How unit decoder rows W [n, d] are found again in V [m, d]. matched: mean cosine one-to-one;
    again: share of matches above 0.7; best: mean of the highest cosines, not one-to-one."""
    cosine = match(W, V)
    best = torch.cat([(part @ V.T).amax(-1) for part in W.split(1024)])
    return {"matched": cosine.mean().item(), "again": (cosine > 0.7).double().mean().item(),
            "best": best.mean().item()}


# ---- SAEBench's metrics ----
#
# Data sets, prompts, probes, defaults and output classes are sae_bench's, called as functions. Ours
# is the order: the language model reads a text once (kept in acts/NAME/eval_cache), an SAE encodes
# it once. If sae_bench wants a model or an SAE, it gets one that hands out what is known already.


LABELLED = Path("labelled")  # NAME/SPLIT.jsonl: SAEBench's data sets in its columns, own tasks
SEED = 42                    # sae_bench's own
KEPT = 2 ** 31               # bytes of codes that are kept in memory for the next evaluation
TEXTS_A_FILE = 512
MIN_LETTERS = 20             # below these three absorption is out of its published scope
MIN_LATENTS = 16_384
MIN_PARAMETERS = 10 ** 9
RETAIN = 0.01                # forget: share by which the loss on other text may rise

# Settings that differ from sae_bench's defaults. The file labelled/settings.json, in the same form,
# goes before these; its "dataset_names" choose among the data sets.
BENCH_SETTINGS = {
    "absorption": {"words": 0},            # how many words of the vocabulary; 0: all
    "sparse_probing": {"k_values": [1, 2, 5, 20]},
}
FEW_TEXTS = {"context_length": 64, "train_set_size": 200, "test_set_size": 200,
             "n_values": [2, 5, 10, 20],
             "probe_lr": 1e-2}             # 1e-3 leaves probes on few texts at their random start
CORPUS_SETTINGS = {                        # of tasks that are made from the cached corpus itself
    "sparse_probing": {"context_length": 64, "probe_train_set_size": 200,
                       "probe_test_set_size": 200, "k_values": [1, 5, 20],
                       "lower_vram_usage": True},      # so that no probe on all latents is trained
    "scr": FEW_TEXTS,
    "tpp": FEW_TEXTS,
}


def bench_settings(acts, name):
    """The settings of an evaluation that differ from sae_bench's."""
    file = LABELLED / "settings.json"
    try:
        asked = json.loads(file.read_text("utf-8")) if file.exists() else {}
    except ValueError as error:
        raise Refuse(f"{file} is not JSON: {error}", 2) from error
    if not isinstance(asked, dict) or not all(isinstance(v, dict) for v in asked.values()):
        raise Refuse(f"{file}: want {{evaluation: {{setting: value}}}}", 2)
    unknown = ", ".join(set(asked) - set(EVALS))
    if unknown:
        raise Refuse(f"{file}: there is no evaluation {unknown}, only {', '.join(EVALS)}", 2)
    corpus = CORPUS_SETTINGS.get(name, {}) if corpus_tasks(acts) else {}
    return {**BENCH_SETTINGS.get(name, {}), **corpus, **asked.get(name, {})}


@functools.lru_cache(maxsize=1)
def bench_of(acts, model):
    """The Bench of a cache, the same for all evaluations."""
    return Bench(acts, model)


class Bench:
    """What all runs of a cache share: the language model, its tokenizer, what is kept."""

    def __init__(self, acts, model):
        if not importlib.util.find_spec("sae_bench"):
            raise Unfit("sae_bench is not installed")
        if acts.meta["hook"] != "resid_post":
            raise Unfit(f"SAEBench reads the stream after a layer, these are {acts.meta['hook']}")
        self.acts, self.model, self.device = acts, model, model.device
        self.name = acts.meta["model"]["name"]
        self.tokenizer = model.tokenizer
        self.bos = ""                                # to go before a text if no BOS comes by itself
        if not self.tokenizer("")["input_ids"] and self.tokenizer.bos_token:
            self.bos = self.tokenizer.bos_token
        self.texts = {}                              # (data set, context length) -> Texts
        self.room = KEPT
        self.versions = [importlib.metadata.version(p) for p in ("sae-bench", "transformers")]

    def kept(self, name, key, make):
        """(tensors, meta) of the file in eval_cache for `key`, made by make() if it isn't there."""
        meta = self.acts.meta
        key = {**key, "model": meta["model"], "layer": meta["layer"], "dtype": meta["dtype"],
               "version": VERSION, "seed": SEED, "versions": self.versions}
        digest = text_hash(json.dumps(key, sort_keys=True))[:16]
        path = self.acts.folder / "eval_cache" / f"{name}-{digest}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_tensors(path, *make())
        return read_tensors(path)

    def read(self, texts, ctx=None, batch=32):
        """Yield (ids [n, longest], attention mask, activations at the hook [n, longest, d_in]) of
        `batch` texts at a time, each cut after ctx tokens."""
        cut = {"truncation": True, "max_length": ctx} if ctx else {}
        starts = range(0, len(texts), batch)
        for start in tqdm(starts, desc="texts", file=sys.__stderr__, disable=None, leave=False):
            part = [self.bos + text for text in texts[start:start + batch]]
            found = self.tokenizer(part, padding=True, return_tensors="pt", **cut)
            ids, mask = found["input_ids"], found["attention_mask"]
            acts = self.model.activations(ids.to(self.device), mask.to(self.device))
            yield ids, mask, acts.cpu()

    def codes(self, run, x):
        """Acts [n, d_sae] of raw activations x [n, d_in], in host memory."""
        return torch.cat([run.sae.encode(part.to(self.device).float()).cpu()
                          for part in x.split(1024)])

    def output(self, kind, run, config, metrics, details, **more):
        """A result in the form of sae_bench's output class `kind`, as a dict."""
        from sae_bench import sae_bench_utils
        made = kind(
            eval_config=config, eval_result_metrics=metrics, eval_result_details=details,
            eval_id=sae_bench_utils.get_eval_uuid(), datetime_epoch_millis=int(time.time() * 1000),
            sae_bench_commit_hash=self.versions[0],
            sae_lens_id="custom_sae", sae_lens_release_id=run.name,
            sae_lens_version=sae_bench_utils.get_sae_lens_version(),
            sae_cfg_dict=BenchSAE(self, run).cfg.to_dict(), **more)
        return json.loads(made.to_json())


class BenchSAE:
    """A run in the form of sae_bench's BaseSAE, with its own `encode` or another."""

    def __init__(self, bench, run, encode=None):
        from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig
        sae, meta = run.sae, bench.acts.meta
        self.encode = encode or sae.encode
        self.W_enc, self.W_dec = sae.W_enc, sae.W_dec
        self.b_dec = sae.b_dec / sae.scale + sae.mean
        self.device, self.dtype = sae.W_dec.device, torch.float32
        self.cfg = CustomSAEConfig(
            bench.name, sae.d_in, sae.d_sae, meta["layer"], meta["hook_name"], dtype="float32",
            architecture=run.config.get("variant", "control"), context_size=meta["ctx"])

    def decode(self, acts):
        return acts @ self.W_dec + self.b_dec

    def to(self, **_):
        return self


@contextlib.contextmanager
def quiet():
    """Inside, sae_bench's prints are dropped and every generator starts from SEED; afterwards grad
    mode is as before."""
    import threadpoolctl
    with (open(os.devnull, "w") as null, contextlib.redirect_stdout(null),
          contextlib.redirect_stderr(null), warnings.catch_warnings(action="ignore"),
          threadpoolctl.threadpool_limits(1, "blas"),        # faster in small fits
          torch.enable_grad()):
        random.seed(SEED)
        numpy.random.seed(SEED)
        torch.manual_seed(SEED)
        yield


def text_hash(text):
    return checksum(text.encode())


# ---- absorption ----


def evaluate_absorption(acts, model, runs, settings):
    """First-letter absorption, both scores."""
    bench, settings = bench_of(acts, model), dict(settings)
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
    words = settings.pop("words")
    if words:                              # few rows in large batches leave probes as they started
        settings.setdefault("k_sparse_probe_batch_size", max(16, words // 8))
    config = AbsorptionEvalConfig(model_name=bench.name, llm_dtype="float32",
                                  precalc_k_sparse_probe_sae_acts=True, **settings)
    key = {"words": words, "template": config.prompt_template, "position": config.prompt_token_pos}
    make = functools.partial(letters_in_prompts, bench, config, words)
    with quiet():
        letters = Letters(*bench.kept("letters", key, make))
    known = [a for a, f1 in letters.probe_f1.items() if f1 > config.min_GT_probe_f1]
    if len(known) < 2:
        raise Unfit(f"probes find {len(known)} first letters in the model's activations")
    yield from each("absorption", runs, absorption_of, bench, letters, known, config)


class Letters:
    """Words' activations and the probes of their first letters, the same for all SAEs.

    weight [26, d_in], bias [26]: the probes. rows: of words to train and to test them [n, d_in],
    with labels. again: rows of the test words that the probe of their letter finds, letter after
    letter, in which absorption is looked for. words: what these are, {letter: [word]}.
    """

    def __init__(self, tensors, meta):
        from sklearn.metrics import f1_score
        self.weight, self.bias, self.again = (tensors[k] for k in ("weight", "bias", "again"))
        self.rows = {split: tensors[split] for split in ("train", "test")}
        self.labels = {split: tensors[f"{split}_y"] for split in ("train", "test")}
        self.words = meta["words"]
        self.present = self.labels["train"].unique().tolist()
        found = self.rows["test"] @ self.weight.T + self.bias > 0
        self.probe_f1 = {string.ascii_lowercase[i]: f1_score(self.labels["test"] == i, found[:, i])
                         for i in self.present}


def letters_in_prompts(bench, config, n_words):
    """(tensors, meta) of Letters: words of the vocabulary in prompts that ask for first letters."""
    from sae_bench.evals.absorption import probing, prompting, vocab
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
    words = sorted(vocab.get_alpha_tokens(bench.tokenizer))      # a tokenizer's own order changes
    if n_words:
        words = sorted(random.Random(SEED).sample(words, min(n_words, len(words))))

    # rows to train and test the probes
    template, position = config.prompt_template, config.prompt_token_pos
    formatter, rows, labels = prompting.first_letter_formatter(), {}, {}
    made = probing.create_dataset_probe_training(words, formatter, 1, template)
    for split, data in zip(("train", "test"), made):
        prompts, y = zip(*data)
        rows[split] = prompt_rows(bench, prompts, position)
        labels[split] = torch.tensor(y)
    tensors, hits = train_letter_probes(rows, labels)

    # rows of the test words that they find, in other prompts
    calculator = FeatureAbsorptionCalculator(None, words, max_icl_examples=10,
                                             base_template=template, word_token_pos=position)
    found = {letter: [] for letter in string.ascii_lowercase}
    for prompt, i, hit in zip(prompts, y, hits):
        if hit:
            word = bench.tokenizer.convert_tokens_to_string([prompt.word])
            found[string.ascii_lowercase[i]].append(word)
    random.seed(SEED)
    again = [prompt_rows(bench, calculator._build_prompts(some), position)
             for some in found.values()]
    return {**tensors, "again": torch.cat(again)}, {"words": found}


def prompt_rows(bench, prompts, position):
    """The activations at `position` of each prompt, counted from its end [n, d_in]."""
    rows = [torch.zeros(0, bench.acts.d_in)]
    for _, mask, acts in bench.read([prompt.base for prompt in prompts], batch=64):
        rows.append(acts[torch.arange(len(acts)), mask.sum(1) + position].float())
    return torch.cat(rows)


def train_letter_probes(rows, labels):
    """(tensors of Letters but `again`, which test rows the probe of their own letter finds [n])."""
    from sae_bench.evals.absorption.probing import train_linear_probe_for_task
    letters = labels["train"].unique()     # the others are left out: they would make the loss NaN
    index = torch.zeros(26, dtype=torch.long).index_put_((letters,), torch.arange(len(letters)))
    tables = [pd.DataFrame({"answer_class": index[labels[split]].numpy()}) for split in rows]
    probe, _ = train_linear_probe_for_task(
        *tables, torch.device("cpu"), rows["train"].numpy(), rows["test"].numpy(),
        num_classes=len(letters), batch_size=64)
    weight, bias = torch.zeros(26, rows["train"].shape[1]), torch.full((26,), -1.0)
    weight[letters], bias[letters] = probe.weights.detach(), probe.biases.detach()
    y = labels["test"]
    hits = (rows["test"] * weight[y]).sum(1) + bias[y] > 0
    tensors = {"weight": weight, "bias": bias, **rows, "train_y": labels["train"], "test_y": y}
    return tensors, hits


class Replay:
    """Stands for the model in sae_bench's calculator: hands out rows that were read, in order."""
    tokenizer = "none is needed"

    def __init__(self, rows):
        self.rows, self.at = rows, 0

    def to_tokens(self, _):
        return torch.zeros(1, 1)

    def run_with_cache(self, prompts, names_filter):
        start, self.at = self.at, self.at + len(prompts)
        return None, {names_filter[0]: self.rows[start:self.at, None]}


@quiet()
def absorption_of(run, bench, letters, known, config):
    """The result of one SAE. known: the letters that the probes on the model find."""
    from sae_bench.evals.absorption import eval_output
    split, main_f1 = split_latents(run, bench, letters, config)
    scores = word_scores(run, bench, letters, split)
    scores = scores[scores.letter.isin(known)]
    details = scores.rename(columns={"letter": "first_letter",
                                     "num_split_feats": "num_split_features"})
    summary = {}
    for name, column in (("absorption_fraction_score", scores.mean_absorption_fraction),
                         ("full_absorption_score", scores.full_absorption_rate),
                         ("num_split_features", scores.num_split_feats)):
        summary |= {f"mean_{name}": float(column.mean()), f"std_dev_{name}": float(column.std())}
    output = bench.output(eval_output.AbsorptionEvalOutput, run, config, {"mean": summary},
                          details.to_dict("records"))
    metrics = {**summary, "letters": len(scores),
               "median_main_latent_f1": float(numpy.median([main_f1[a] for a in scores.letter]))}
    guards = find_guards(absorption_facts(run, bench, metrics))
    return {**output, "metrics": metrics, "guards": guards}


def split_latents(run, bench, letters, config):
    """({letter: latents that stand for it}, {letter: F1 of the first}).

    sae_bench's choice: the best latents of a probe with an L1 penalty, as many as each raise the F1
    of a probe on them alone by more than f1_jump_threshold. It fits all sizes, we stop there."""
    from sae_bench.evals.absorption.k_sparse_probing import train_sparse_multi_probe
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    train, test = (bench.codes(run, letters.rows[split]) for split in ("train", "test"))
    one_hot = letters.labels["train"][:, None] == torch.tensor(letters.present)
    probe = train_sparse_multi_probe(
        train, one_hot.long(), bench.device, l1_decay=config.k_sparse_probe_l1_decay,
        batch_size=config.k_sparse_probe_batch_size, num_epochs=config.k_sparse_probe_num_epochs,
        show_progress=False)
    weights = probe.weights.detach().cpu()
    split, main_f1 = {a: [] for a in string.ascii_lowercase}, {}
    for row, i in zip(weights, letters.present):
        letter, reached = string.ascii_lowercase[i], -100.0
        y, test_y = (letters.labels[part] == i for part in ("train", "test"))
        for k in range(1, config.max_k_value + 1):
            best = row.topk(min(k, len(row))).indices
            fit = LogisticRegression(max_iter=500, class_weight="balanced")
            fit.fit(train[:, best].numpy(), y.numpy())
            f1 = f1_score(test_y, fit.predict(test[:, best].numpy()))
            main_f1.setdefault(letter, f1)
            if f1 <= reached + config.f1_jump_threshold:
                break
            reached, split[letter] = f1, best.tolist()
    return split, main_f1


def word_scores(run, bench, letters, split):
    """sae_bench's table of both absorption scores, a row a letter."""
    from sae_bench.evals.absorption import feature_absorption as published
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
    from sae_bench.evals.absorption.main import _aggregate_results_df
    from sae_bench.evals.absorption.probing import LinearProbe
    stats = {a: published.StatsAndLikelyFalseNegativeResults(len(words), 0, split[a], words)
             for a, words in letters.words.items()}
    probe = LinearProbe(bench.acts.d_in, 26)
    probe.load_state_dict({"fc.weight": letters.weight, "fc.bias": letters.bias})
    calculator = FeatureAbsorptionCalculator(
        Replay(letters.again.to(bench.device)), [], max_icl_examples=0, word_token_pos=0,
        batch_size=1024, topk_feats=min(10, run.sae.d_sae))    # else the published defaults
    return _aggregate_results_df(published.calculate_projection_and_cos_sims(
        calculator, BenchSAE(bench, run), probe, bench.acts.meta["layer"], stats))


def absorption_facts(run, bench, metrics):
    """What makes absorption void, and what puts it out of the scope that its authors state."""
    f1, vacuous, scope = metrics["median_main_latent_f1"], "", []
    unsplit = metrics["mean_num_split_features"] == 1
    if metrics["mean_full_absorption_score"] <= 0.005 and unsplit and f1 < 0.6:
        vacuous = f"{f1:.2f}"
    parameters = bench.model.model.num_parameters()
    if metrics["letters"] < MIN_LETTERS:
        scope.append(f"{metrics['letters']} letters, not {MIN_LETTERS}")
    if run.sae.d_sae < MIN_LATENTS:
        scope.append(f"{run.sae.d_sae} latents, not {MIN_LATENTS}")
    if parameters < MIN_PARAMETERS:
        scope.append(f"{parameters / 1e6:.3g} M parameters, not {MIN_PARAMETERS / 1e6:.0f} M")
    return {"vacuous": vacuous, "scope": ", ".join(scope)}


# ---- labelled text: the cached corpus, own tasks, SAEBench's data sets ----


HUB_TASKS = {                # evaluation -> SAEBench's tasks
    "sparse_probing": [
        "LabHC/bias_in_bios_class_set1", "LabHC/bias_in_bios_class_set2",
        "LabHC/bias_in_bios_class_set3", "canrager/amazon_reviews_mcauley_1and5",
        "canrager/amazon_reviews_mcauley_1and5_sentiment", "codeparrot/github-code",
        "fancyzhx/ag_news", "Helsinki-NLP/europarl"],
    "scr": ["LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"],
    "tpp": ["LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"]}
RUNS_CODE = "codeparrot/github-code"       # a script on the hub: only from labelled/
BIOS = "LabHC/bias_in_bios"  # own tasks go through sae_bench's code in the columns of this data set
MOST_CLASSES, MOST_PAIRS = 6, 2            # of an own task
SCIENCE = ("numpy", "sympy", "networkx")
KEYWORD = re.compile(r"\s*(from|def|class|if|for|while|with|return|raise|assert)\s+(.{12,})")
PASSAGE, LONG = 200, 768     # characters: about 64 tokens; surely 128 tokens


@functools.lru_cache
def corpus_tasks(acts):
    """The folder of labelled texts of the cached corpus, or None if its records have no labels.

    TASK/{train,test}.jsonl have text, label and group. package: which package documents itself;
    group: is there a doctest. kind: code, comment or docstring; group: is the package scientific.
    statement: the keyword that a line of code began with, cut off; group: the same. forget and
    retain: long documentation of one package, and of the others."""
    file = Path(acts.meta.get("data", {}).get("name", "")) / "train.jsonl"
    if not file.is_file():
        return None
    read = functools.partial(pd.read_json, file, lines=True, dtype=False, encoding="utf-8-sig")
    if not {"text", "package", "module", "kind"} <= set(read(nrows=1)):
        return None
    folder = acts.folder / "eval_cache" / f"labelled-{files_checksum([file])[:16]}"
    if not (folder / "retain" / "test.jsonl").exists():
        for task, table in label_corpus(read()).items():
            table = table.drop_duplicates("text")
            table = table.iloc[table.text.map(text_hash).argsort()]        # in a fixed random order
            in_test = table.source.map(text_hash).str[0] < "4"            # a quarter of the modules
            for split, part in (("train", table[~in_test]), ("test", table[in_test])):
                part = part.groupby(["label", "group"]).head(400)[["text", "label", "group"]]
                blob = part.to_json(orient="records", lines=True, force_ascii=False)
                write_file(folder / task / f"{split}.jsonl", blob.encode())
    return folder


def label_corpus(records):
    """{task: table of text, label, group, source} of the records of a corpus."""
    rows = []                              # task, text, label, group, source
    for record in records.itertuples():
        package, module = record.package, record.module
        field = "science" if package in SCIENCE else "library"
        if record.kind == "doc":
            for text in passages(record.text.splitlines()):
                group = "doctest" if ">>>" in text else "plain"
                rows.append(("package", text, package, group, module))
            if len(record.text) > LONG:
                rows.append(("long", record.text, package, "long", module))
        elif record.kind == "code":
            lines = kinds_of_line(record.text)
            for kind, found in lines.items():
                rows += [("kind", text, kind, field, module) for text in passages(found)]
            for match in filter(None, map(KEYWORD.match, lines["code"])):
                rows.append(("statement", match[2], match[1], field, module))
    table = pd.DataFrame(rows, columns=["task", "text", "label", "group", "source"])
    is_long = table.task == "long"
    is_topic = table.label == table.label[is_long].mode().get(0)
    table.loc[is_long, "task"] = is_topic.map({True: "forget", False: "retain"})
    return dict(iter(table.groupby("task")))


def passages(lines):
    """Lines in a row, joined until they are long enough; a rest at the end is not used."""
    held = []
    for line in lines:
        held.append(line)
        if sum(map(len, held)) >= PASSAGE:
            yield "\n".join(held)[:3 * PASSAGE]
            held = []


def kinds_of_line(source):
    """{kind: lines} of Python source; strings of three quotes count as docstrings."""
    found, inside = {"code": [], "comment": [], "docstring": []}, False
    for line in source.splitlines():
        quotes = line.count('"""') + line.count("'''")
        if inside or quotes:
            found["docstring"].append(line)
            inside ^= quotes % 2 == 1
        elif line.strip():
            found["comment" if line.lstrip().startswith("#") else "code"].append(line)
    return found


def own_tasks(acts, name):
    """{task: folder} of the labelled corpus and of labelled/NAME. SCR and TPP take of a corpus the
    task whose groups can be confounded with its classes."""
    found, folder = sorted(LABELLED.glob("*/train.jsonl")), corpus_tasks(acts)
    if folder:
        tasks = "*" if name == "sparse_probing" else "package"
        found = sorted(folder.glob(f"{tasks}/train.jsonl")) + found
    return {p.parent.name: p.parent for p in found if p.parent.name not in ("forget", "retain")}


@functools.lru_cache
def labelled_settings(name, acts):
    """What a result of sparse_probing, scr or tpp depends on: versions of data sets, settings."""
    config, own, data = bench_settings(acts, name), own_tasks(acts, name), {}
    tasks = [*own] if corpus_tasks(acts) else [*HUB_TASKS[name], *own]
    for task in config.pop("dataset_names", tasks):
        folder = own.get(task, LABELLED / data_set_of(task))
        files = sorted(folder.rglob("*.jsonl"))
        version = files_checksum(files) if files else hub_version(data_set_of(task))
        if version:
            data[task] = version
        else:
            print(f"note: {acts.folder}: {name} without {task}, which is neither in {LABELLED}/ "
                  "nor within reach on the hub")
    return {"data": data, "config": config}


def data_set_of(task):
    return task.split("_class_set")[0].removesuffix("_sentiment")


@functools.lru_cache
def hub_version(name):
    """The commit of a data set on the hub; None if it is out of reach."""
    import huggingface_hub
    if name != RUNS_CODE:
        with contextlib.suppress(Refuse), hub_errors("data set", name):
            return huggingface_hub.HfApi().dataset_info(name, timeout=10).sha


@contextlib.contextmanager
def local_data():
    """Inside, sae_bench's loaders look for NAME[/CONFIG]/SPLIT.jsonl in labelled/ before the hub.
    No other function of sae_bench is ever replaced."""
    import datasets
    root = LABELLED.resolve()

    def load_dataset(name, config=None, split=None, streaming=False, **_):
        files = {p.stem: str(p) for p in sorted((root / name / (config or "")).glob("*.jsonl"))}
        if files:
            return datasets.load_dataset("json", data_files=files, split=split, streaming=streaming)
        return datasets.load_dataset(name, config, split=split, streaming=streaming)

    with contextlib.ExitStack() as stack:
        for module in ("sae_bench_utils.dataset_utils", "evals.scr_and_tpp.dataset_creation",
                       "evals.unlearning.utils.feature_activation",
                       "evals.unlearning.utils.metrics"):
            name = f"sae_bench.{module}.load_dataset"
            stack.enter_context(unittest.mock.patch(name, load_dataset))
        yield


class Texts:
    """The texts of a data set, numbered; their activations are kept on disk.

    length [n]: tokens that are neither BOS, EOS nor padding. mean [n, d_in]: of their activations.
    """

    def __init__(self, bench, ctx):
        self.bench, self.ctx, self.number, self.chunks = bench, ctx, {}, []
        self.codes_kept = {}                         # (checksum of an SAE, chunk) -> codes
        self.length = torch.zeros(0, dtype=torch.long)
        self.mean = torch.zeros(0, bench.acts.d_in)

    def add(self, split):
        """{class: texts} -> {class: their numbers}. The language model reads texts that are new."""
        texts = dict.fromkeys(itertools.chain(*split.values()))
        new = [text for text in texts if text not in self.number]
        for start in range(0, len(new), TEXTS_A_FILE):
            chunk = new[start:start + TEXTS_A_FILE]
            self.number |= dict(zip(chunk, itertools.count(len(self.number))))
            self.chunks.append(chunk)
            part = self.part(chunk)
            self.length = torch.cat([self.length, part["length"]])
            self.mean = torch.cat([self.mean, part["mean"]])
        return {label: torch.tensor([self.number[text] for text in found])
                for label, found in split.items()}

    def part(self, chunk):
        """Of a chunk of texts: activations `rows`, text after text, their `length` and `mean`."""
        key = {"texts": text_hash(json.dumps(chunk)), "ctx": self.ctx}
        return self.bench.kept("texts", key, functools.partial(self.read, chunk))[0]

    def read(self, chunk):
        """({rows, length, mean}, meta) of a chunk, read by the language model."""
        from sae_bench.sae_bench_utils.activation_collection import get_bos_pad_eos_mask
        rows, length = [], []
        for ids, mask, acts in self.bench.read(chunk, self.ctx):
            real = get_bos_pad_eos_mask(ids, self.bench.tokenizer) & mask.bool()
            rows.append(acts[real].to(getattr(torch, self.bench.acts.meta["dtype"])))
            length.append(real.sum(1))
        rows, length = torch.cat(rows), torch.cat(length)
        return {"rows": rows, "length": length, "mean": text_means(rows.float(), length)}, {}

    def codes(self, run):
        """The mean acts of each text [n, d_sae]."""
        return torch.cat([self.codes_of(run, i) for i in range(len(self.chunks))])

    def codes_of(self, run, i):
        """... of chunk i, made once for all evaluations if memory allows."""
        key = run.config["sae_checksum"], i
        if key in self.codes_kept:
            return self.codes_kept[key]
        part, found = self.part(self.chunks[i]), []
        texts = part["rows"].split(part["length"].tolist())
        few = max(1, 1024 // self.ctx)               # texts whose acts a cache may hold
        for start in range(0, len(texts), few):
            acts = self.bench.codes(run, torch.cat(texts[start:start + few]))
            found.append(text_means(acts, part["length"][start:start + few]))
        found = torch.cat(found)
        if found.nbytes <= self.bench.room:
            self.bench.room -= found.nbytes
            self.codes_kept[key] = found
        return found


def text_means(rows, length):
    """Means [n, d] of consecutive rows, length [n] of them each; 0 of a text without rows."""
    of = torch.arange(len(length)).repeat_interleave(length)
    sums = torch.zeros(len(length), rows.shape[1]).index_add_(0, of, rows)
    return sums / length.clamp_min(1)[:, None]


class Case(NamedTuple):
    """One task of an evaluation: of each class, the numbers of its texts."""
    name: str
    texts: Texts
    train: dict
    test: dict

    def of(self, split, values):
        """{class: its rows of `values` [texts, ...]}"""
        return {label: values[numbers] for label, numbers in getattr(self, split).items()}


def labelled_cases(bench, name, settings):
    """(config, [Case]) of sparse_probing, scr or tpp."""
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    given = dict(model_name=bench.name, llm_dtype="float32", random_seed=SEED, llm_batch_size=32,
                 dataset_names=list(settings["data"]), **settings["config"])
    if name == "sparse_probing":
        config = SparseProbingEvalConfig(**given)
        sizes = config.probe_train_set_size, config.probe_test_set_size
    else:
        config = ScrAndTppEvalConfig(perform_scr=name == "scr", **given)
        sizes = config.train_set_size, config.test_set_size
    cases = []
    for task in config.dataset_names:
        found = cases_of(bench, name, config, sizes, task)
        cases += found
        if not found:
            print(f"note: {name} without {task}: too few texts of two classes", file=sys.__stderr__)
    if not cases:
        raise Unfit(f"neither the corpus, {LABELLED}/ nor the hub has enough labelled texts")
    return config, cases


def cases_of(bench, name, config, sizes, task):
    """[Case] of one data set or own task, of SCR one for each pair of classes."""
    own, pairs, cases = own_tasks(bench.acts, name), [None], []
    tables = read_own_task(own[task]) if task in own else None
    if name == "scr":
        pairs = confounded_pairs(tables, sizes) if tables else config.column1_vals_lookup[task]
        config.column1_vals_lookup[task] = pairs
    for pair in pairs:
        splits = own_texts(tables, sizes, pair) if tables else hub_texts(task, sizes, pair)
        if len(splits[0]) > 1:
            place = data_set_of(task), config.context_length
            texts = bench.texts.setdefault(place, Texts(bench, config.context_length))
            suffix = {"scr": "_scr_" + "_".join(pair or []), "tpp": "_tpp"}.get(name, "")
            cases.append(Case(task + suffix, texts, *map(texts.add, splits)))
    return cases


def hub_texts(task, sizes, pair):
    """[{class: texts} to train, ... to test] of a task of SAEBench; pair: SCR's classes."""
    from sae_bench.evals.scr_and_tpp import dataset_creation, main
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils
    groups = main.COLUMN2_VALS_LOOKUP[task] if pair else None
    with local_data():
        splits = dataset_creation.get_train_test_data(task, bool(pair), *sizes, SEED, pair, groups)
    if pair:
        return splits
    classes = dataset_info.chosen_classes_per_dataset[task]
    return [dataset_utils.filter_dataset(split, classes) for split in splits]


def read_own_task(folder):
    """Its tables to train and to test, in the columns of BIOS."""
    columns = {"text": "hard_text", "label": "profession", "group": "gender"}
    tables = []
    for split in ("train", "test"):
        table = pd.read_json(folder / f"{split}.jsonl", lines=True, dtype=False)
        if not {"text", "label"} <= set(table.columns):
            raise Refuse(f"{folder}/{split}.jsonl: its records need text and label")
        table = table.astype({"label": str}).drop_duplicates("text")
        tables.append(table.rename(columns=columns))
    return tables


def confounded_pairs(tables, sizes):
    """Pairs of classes with enough texts for SCR in either of two groups."""
    fit = set(tables[0].profession)
    for table, size in zip(tables, sizes):
        if "gender" not in table or table.gender.nunique() != 2:
            return []
        counts = table.groupby(["profession", "gender"]).size().unstack(fill_value=0)
        fit &= set(counts.index[(counts > size // 4 * 2).all(axis=1)])
    return list(itertools.combinations(sorted(fit), 2))[:MOST_PAIRS]


def own_texts(tables, sizes, pair):
    """As hub_texts, of an own task."""
    from sae_bench.evals.scr_and_tpp.dataset_creation import get_spurious_corr_data
    from sae_bench.sae_bench_utils import dataset_utils
    splits = []
    for table, size in zip(tables, sizes):
        if pair:
            coded = table[table.profession.isin(pair)]
            coded = coded.assign(profession=coded.profession.map({pair[0]: 21, pair[1]: 13}),
                                 gender=(coded.gender != table.gender.min()).astype(int))
            splits.append(get_spurious_corr_data(
                coded, ("professor", "nurse"), ("male", "female"), BIOS, size // 4, SEED))
        elif "gender" in table:
            splits.append(dataset_utils.get_balanced_dataset(table, BIOS, size // 4, SEED))
        else:
            counts = table.profession.value_counts()
            classes = list(counts.index[counts >= size // 2])
            splits.append(dataset_utils.gather_dataset_from_df(
                table, classes, size // 2, "profession", "hard_text", SEED))
    splits = dataset_utils.ensure_shared_keys(*splits)
    if pair:
        return splits
    classes = sorted(splits[0])[:MOST_CLASSES]
    return [dataset_utils.filter_dataset(split, classes) for split in splits]


def evaluate_labelled(name, acts, model, runs, settings):
    """Sparse probing, SCR or TPP, as `name` says, on labelled texts."""
    of_model, of_run = model_probes, ablation_of
    if name == "sparse_probing":
        of_model, of_run = model_accuracies, probing_of
    bench = bench_of(acts, model)
    with quiet():
        config, cases = labelled_cases(bench, name, settings)
    of_cases = [of_model(bench, config, case) for case in cases]
    yield from each(name, runs, of_run, bench, config, cases, of_cases)


# ---- sparse probing: accuracy of probes on the k best latents ----


@quiet()
def model_accuracies(bench, config, case):
    """probe_accuracies() of the model's own activations."""
    return probe_accuracies("llm", config, case, case.texts.mean)


def probe_accuracies(who, config, case, values):
    """{name of the metric: {class: accuracy}} of probes on all columns of `values` [texts, d], and
    on the k best of them."""
    from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations
    train, test = case.of("train", values), case.of("test", values)
    if who == "sae" and config.lower_vram_usage:
        found = {"sae_test_accuracy": {"-1": -1}}        # sae_bench's word for not measured
    else:
        _, accuracies = train_probe_on_activations(train, test, use_sklearn=False, batch_size=250,
                                                   epochs=100, lr=1e-2)
        found = {f"{who}_test_accuracy": accuracies}
    for k in config.k_values:
        _, accuracies = train_probe_on_activations(train, test, select_top_k=k)
        found[f"{who}_top_{k}_test_accuracy"] = accuracies
    return found


@quiet()
def probing_of(run, bench, config, cases, of_model):
    """The result of one SAE."""
    from sae_bench.evals.sparse_probing import eval_output
    from sae_bench.sae_bench_utils.general_utils import average_results_dictionaries
    per_class, results = {}, {}
    for case, accuracies in zip(cases, of_model):
        codes = case.texts.codes(run).to(bench.device)
        accuracies = accuracies | probe_accuracies("sae", config, case, codes)
        name = f"{case.name}_results"
        per_class[name] = accuracies
        results[name] = {key: sum(of.values()) / len(of) for key, of in accuracies.items()}
    means = average_results_dictionaries(results, [case.name for case in cases])
    llm, sae = ({k: v for k, v in means.items() if k.startswith(who)} for who in ("llm", "sae"))
    details = [{"dataset_name": name, **found} for name, found in results.items()]
    output = bench.output(eval_output.SparseProbingEvalOutput, run, config,
                          {"llm": llm, "sae": sae}, details, eval_result_unstructured=per_class)
    above_chance = max(abs(value - 0.5) for key, value in sae.items() if "_top_" in key)
    metrics = {key: value for key, value in means.items() if value != -1}
    return {**output, "metrics": metrics, "guards": find_guards({"above_chance": above_chance})}


# ---- spurious correlation removal (SCR) and targeted probe perturbation (TPP) ----
#
# SCR: how much of a planted bias goes with the latents that carry it. TPP: how much of a class, and
# of that class alone, goes with its latents.


def classes_of(config, case):
    """The classes whose probes are looked at."""
    from sae_bench.sae_bench_utils.dataset_info import PAIRED_CLASS_KEYS
    return list(PAIRED_CLASS_KEYS if config.perform_scr else case.train)


@quiet()
def model_probes(bench, config, case):
    """({class: probe on the model's activations}, {what is told apart: accuracy})."""
    from sae_bench.evals.scr_and_tpp.main import get_probe_test_accuracy
    from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations
    train, test = (case.of(split, case.texts.mean) for split in ("train", "test"))
    probes, _ = train_probe_on_activations(
        train, test, use_sklearn=False, batch_size=config.probe_train_batch_size,
        epochs=config.probe_epochs, lr=config.probe_lr, perform_scr=config.perform_scr,
        early_stopping_patience=config.early_stopping_patience, l1_penalty=config.probe_l1_penalty)
    clean = get_probe_test_accuracy(probes, classes_of(config, case), test,
                                    config.probe_test_batch_size, config.perform_scr)
    return {label: probe.to(bench.device) for label, probe in probes.items()}, clean


@quiet()
def ablation_of(run, bench, config, cases, probes):
    """The result of one SAE."""
    from sae_bench.evals.scr_and_tpp import eval_output, main
    from sae_bench.sae_bench_utils.general_utils import average_results_dictionaries
    fit = [n for n in config.n_values if n <= run.sae.d_sae]
    config = dataclasses.replace(config, n_values=fit)
    results, more, gaps = {}, {}, []
    for case, (probe, clean) in zip(cases, probes):
        ablated = ablated_accuracies(run, bench, config, case, probe)
        if config.perform_scr:
            found = main.get_scr_plotting_dict(ablated, clean)
            biased = clean["male_professor / female_nurse probe on professor / nurse data"]
            gaps.append(clean["professor / nurse"] - biased)
        else:
            found, per_class = main.create_tpp_plotting_dict(ablated, clean)
            of_task = more.setdefault("eval_result_unstructured", {})
            of_task[case.name.removesuffix("_tpp")] = per_class
        results[f"{case.name}_results"] = found
    means = average_results_dictionaries(results, [case.name for case in cases])
    details = [{"dataset_name": name, **found} for name, found in results.items()]
    if config.perform_scr:
        kind, category = eval_output.ScrEvalOutput, "scr_metrics"
    else:
        kind, category = eval_output.TppEvalOutput, "tpp_metrics"
    output = bench.output(kind, run, config, {category: means}, details, **more)
    facts = {"most_ablated": max(fit), "bias_cost": sum(gaps) / len(gaps) if gaps else None}
    return {**output, "metrics": means, "guards": find_guards(facts)}


def ablated_accuracies(run, bench, config, case, probes):
    """sae_bench's {ablated class: {number of latents: {class: accuracy of its probe}}}.

    To its code a text is one token here. Choosing latents, the token is the text's number and its
    act the text's mean act. Ablating them, the token is the text's mean activation, as ablation is
    linear. sae_bench ablates at masked positions too, where SAEs see zeros; so do these codes."""
    from sae_bench.evals.scr_and_tpp import main
    texts, batch = case.texts, config.sae_batch_size
    codes = texts.codes(run)
    at_zero = bench.codes(run, torch.zeros(1, bench.acts.d_in))
    masked = (texts.ctx - texts.length) / texts.length.clamp_min(1)
    with_masked = (codes + masked[:, None] * at_zero).to(bench.device)
    codes, means = codes.to(bench.device), texts.mean.to(bench.device)
    place = {row.numpy().tobytes(): i for i, row in enumerate(texts.mean)}

    def encode_numbers(x):
        return codes[x[..., 0].long() - 1]

    def encode_means(x):
        at = [place[row.numpy().tobytes()] for row in x[:, 0].cpu()]
        return with_masked[at][:, None]

    numbers = torch.arange(1.0, len(codes) + 1, device=bench.device)[:, None, None]
    with torch.no_grad():
        effects = main.get_all_node_effects_for_one_sae(
            BenchSAE(bench, run, encode_numbers), probes, classes_of(config, case),
            config.perform_scr, case.of("train", numbers), batch)
        return main.perform_feature_ablations(
            probes, BenchSAE(bench, run, encode_means), batch, case.of("test", means[:, None]),
            effects, config.n_values, classes_of(config, case), config.probe_test_batch_size,
            config.perform_scr)


# ---- forget: what clamping a topic's latents costs on its text, and on other text ----


class ForgetConfig(NamedTuple):
    """As sae_bench's classes of settings: a mistyped one is refused."""
    texts: int = 16                        # of either kind, to choose latents by and to score
    context_length: int = 128
    retain_threshold: float = 0.01         # chosen latents fire more rarely on other text
    n_features: tuple = (10,)              # latents that are clamped
    multiples: tuple = (0.5, 2.0)          # to minus so many times the mean norm of a row


def forget_settings(acts):
    folder = corpus_tasks(acts) or LABELLED
    files = sorted(folder.glob("forget/*.jsonl")) + sorted(folder.glob("retain/*.jsonl"))
    data = files_checksum(files) if len(files) == 4 else None
    return {"data": data, "config": bench_settings(acts, "forget")}


def evaluate_forget(acts, model, runs, settings):
    """Losses on text of a topic and on other text, with the topic's latents clamped.

    Latents are chosen and clamped as in SAEBench's unlearning. No questions are asked, so that the
    two can't be compared."""
    bench, config = bench_of(acts, model), ForgetConfig(**settings["config"])
    if settings["data"] is None:
        raise Unfit(f"neither the corpus nor {LABELLED}/ has text to forget and to retain")
    folder = corpus_tasks(acts) or LABELLED
    with quiet():
        topics = {name: Topic(bench, folder / name, config) for name in ("forget", "retain")}
    yield from each("forget", runs, forget_of, bench, topics, config)


class Topic:
    """Texts to choose latents by (train), and texts on which losses are measured (test)."""

    def __init__(self, bench, folder, config):
        self.bench = bench
        chosen, scored = [pd.read_json(folder / f"{split}.jsonl", lines=True, dtype=False).text
                          .head(config.texts).tolist() for split in ("train", "test")]
        ctx = config.context_length
        self.rows = Texts(bench, ctx).read(chosen)[0]["rows"]
        self.scored = list(bench.read(scored, ctx, batch=bench.model.at_once(ctx)))
        self.clean = self.loss(lambda x: x)

    def rates(self, run):
        """How often each latent fires on the texts to choose by [d_sae]."""
        return (self.bench.codes(run, self.rows) > 0).float().mean(0).numpy()

    def loss(self, change):
        """The mean loss on the other texts with change(x) in place of the hook's x [n, ctx,
        d_in]."""
        losses = []
        for ids, mask, _ in self.scored:
            ids, mask = ids.to(self.bench.device), mask.to(self.bench.device)
            log_p = self.bench.model.logits(ids, mask, change).log_softmax(-1)
            losses.append(next_token_loss(log_p, ids)[mask[:, 1:].bool()])
        return torch.cat(losses).double().mean().item()


@quiet()
def forget_of(run, bench, topics, config):
    """The result of one SAE: what costs the topic most, of settings that cost other text little."""
    from sae_bench.evals.unlearning.utils.feature_activation import get_top_features
    top = get_top_features(topics["forget"].rates(run), topics["retain"].rates(run),
                           config.retain_threshold)
    clean = {name: topic.clean for name, topic in topics.items()}
    tried = []
    for n, multiple in itertools.product(config.n_features, config.multiples):
        size = max(1.0, multiple * bench.acts.meta["mean_norm"])
        change = functools.partial(clamp, run.sae, top[:n].tolist(), size)
        losses = {name: topic.loss(change) for name, topic in topics.items()}
        tried.append({"n_features": len(top[:n]), "multiplier": size, **losses})
    fit = [losses for losses in tried if losses["retain"] <= (1 + RETAIN) * clean["retain"]]
    best = max([clean, *fit], key=lambda losses: losses["forget"])
    metrics = {}
    for name in topics:
        metrics |= {f"{name}_clean": clean[name], f"{name}_added": best[name] - clean[name]}
    return {"metrics": metrics, "guards": find_guards({"clamped": len(top)}),
            "details": {"settings": tried}}


def clamp(sae, latents, size, x):
    """Raw activations x [n, ctx, d_in] with those of `latents` that fire set to minus `size`, but
    for the first position, as SAEBench's unlearning does."""
    acts = sae.encode(x)[..., latents]
    change = torch.where(acts > 0, -size - acts, 0.0)
    change[:, 0] = 0.0
    return x + change @ sae.W_dec[latents]


# ---- unlearning: SAEBench's own call, on questions that only its data and a large model have ----


FORGET_CORPUS = LABELLED / "cais" / "wmdp-corpora" / "bio-forget-corpus.jsonl"     # gated


def unlearning_settings(acts):
    data = files_checksum([FORGET_CORPUS]) if FORGET_CORPUS.exists() else None
    return {"data": data, "config": bench_settings(acts, "unlearning")}


def evaluate_unlearning(acts, model, runs, settings):
    """How many questions on biology (WMDP) go wrong while others (MMLU) stay right. sae_bench asks
    them itself, of TransformerLens' copy of the model."""
    from sae_bench.evals.unlearning import eval_config, main
    bench = bench_of(acts, model)
    known = re.search(r"gemma-2-\d+b-it", bench.name)
    if not known:
        raise Unfit("SAEBench has prompts for gemma-2-2b-it and gemma-2-9b-it alone")
    if settings["data"] is None:
        raise Unfit(f"{FORGET_CORPUS} is missing, which its authors give on request")
    config = eval_config.UnlearningEvalConfig(
        model_name=known[0], llm_dtype="float32", random_seed=SEED,
        **{"llm_batch_size": 4, **settings["config"]})
    saes = [(run.name, BenchSAE(bench, run)) for run in runs]
    answered = (acts.folder / "eval_cache" / "questions").resolve()    # right by the model alone
    answered.mkdir(parents=True, exist_ok=True)
    links = {Path("sae_bench/evals/unlearning/data") / FORGET_CORPUS.name: FORGET_CORPUS.resolve(),
             Path("artifacts/unlearning") / known[0] / "data": answered}
    with tempfile.TemporaryDirectory() as place, local_data(), contextlib.chdir(place), quiet():
        for link, target in links.items():
            link.parent.mkdir(parents=True)
            link.symlink_to(target)
        results = main.run_eval(config, saes, str(bench.device), "results")
    for run in runs:
        found = json.loads(json.dumps(results[f"{run.name}_custom_sae"], default=str))
        yield run, {**found, "metrics": found["eval_result_metrics"]["unlearning"], "guards": []}


# ---- features: what latents fire on --------------------------------------------------------------


TOP_CONTEXTS = 8             # of each latent
SHOWN = {"random": 20, "frequent": 5, "rare": 5}      # latents of each kind


def evaluate_features(acts, model, runs, settings):
    """For some latents of each run: the contexts in which it fires most, the tokens that its
    decoder row promotes through the unembedding, and the latents nearest to it."""
    failed, tops, val = {}, defaultdict(list), acts.val()
    chosen = {run: attempt(failed, run, choose_latents, run) for run in runs}
    size = model.at_once(val["tokens"].shape[1])
    for start in tqdm(range(0, len(val["tokens"]), size), desc="features", disable=None):
        tokens, mask = (val[name][start:start + size].to(model.device)
                        for name in ("tokens", "mask"))
        hidden = model.activations(tokens.long())
        rows = mask & (hidden.norm(dim=-1) <= acts.norm_limit)
        for run in runs:
            tops[run].append(attempt(failed, run, highest_in_context, run.sae, hidden, rows,
                                     chosen[run]))
    for run in runs:
        yield run, attempt(failed, run, describe_latents, run, model, val["tokens"], chosen[run],
                           tops[run])


def choose_latents(run):
    """[{latent, why, rate}]: random latents that fire, and the most and the least frequent ones."""
    path = run.folder / "eval" / "rates.safetensors"
    tensors, meta = read_tensors(path) if path.exists() else ({}, {})
    if meta.get("sae_checksum") != run.config["sae_checksum"]:
        raise Refuse(f"{path} is missing or of other weights: run --eval core first")
    rate, firing = tensors["rate"], tensors["rate"].nonzero().flatten()
    order = firing[rate[firing].argsort(descending=True, stable=True)]
    shuffled = firing[torch.randperm(len(firing), generator=generator("features", run.name))]
    why = defaultdict(list)
    for kind, latents in (("random", shuffled), ("frequent", order), ("rare", order.flip(0))):
        for latent in latents[:SHOWN[kind]].tolist():
            why[latent].append(kind)
    return [{"latent": latent, "why": why[latent], "rate": rate[latent].item()}
            for latent in sorted(why)]


def highest_in_context(sae, hidden, rows, chosen):
    """The highest activation of each chosen latent in each context and its position: both [n, k],
    in host memory."""
    latents = [entry["latent"] for entry in chosen]
    acts = [out.acts[:, latents] for _, out in forward_in_blocks(sae, hidden[rows])]
    full = hidden.new_zeros(*rows.shape, len(latents))
    full[rows] = torch.cat(acts) / sae.scale
    return [tensor.cpu() for tensor in full.max(1)]


def describe_latents(run, model, tokens, chosen, tops):
    """The result of one run: the chosen latents with what stage 4's browser shows of each.

    tops: what highest_in_context() gives for each batch of the contexts `tokens`.
    """
    best, where = (torch.cat(parts) for parts in zip(*tops))
    decode, W_dec = model.tokenizer.decode, run.sae.W_dec
    rows = unit(W_dec)
    for i, entry in enumerate(chosen):
        latent, contexts = entry["latent"], []
        for c in best[:, i].topk(min(TOP_CONTEXTS, len(best))).indices.tolist():
            if best[c, i] > 0:
                text = marked(decode, tokens[c], where[c, i].item())
                contexts.append({"activation": best[c, i].item(), **text})
        promoted = (model.unembedding @ W_dec[latent]).topk(8).indices.tolist()
        cosine = rows @ rows[latent]
        cosine[latent] = -2.0
        near = cosine.topk(min(4, len(rows) - 1)).indices.tolist()
        neighbours = [{"latent": j, "cosine": cosine[j].item()} for j in near]
        entry |= {"promotes": [decode([t]) for t in promoted], "neighbours": neighbours,
                  "contexts": contexts}
    return {"metrics": {}, "guards": [], "latents": chosen}


def marked(decode, tokens, at, before=16, after=4):
    """The token at position `at` of a context and the text around it, the token in << >>."""
    token = decode(tokens[at:at + 1])
    left, right = decode(tokens[max(0, at - before):at]), decode(tokens[at + 1:at + 1 + after])
    return {"token": token, "text": f"{left}<<{token}>>{right}"}


# ---- controls: SAEs that have learned nothing ----------------------------------------------------


def make_controls(acts, runs):
    """Controls as sparse as the runs were to be (medians): an untrained SAE and random directions,
    as wide as they; PCA; the mean of the training rows."""
    device = runs[0].sae.b_dec.device
    rows = training_rows(acts, 16_384, device)
    d_sae, l0 = (median_low(run.config["settings"][key] for run in runs) for key in ("d_sae", "l0"))
    l0 = max(1, round(l0))
    rank = min(l0, acts.d_in)
    made = []
    for kind, activation, width, l0 in (("untrained", "relu", d_sae, l0),
                                        ("random", "topk", d_sae, l0),
                                        ("pca", "relu", 2 * rank, rank), ("mean", "relu", 1, 1)):
        settings = {"activation": activation, "d_sae": width, "l0": float(l0)}
        sae = SAE(acts.d_in, 0, 0, **settings).to(device).eval().requires_grad_(False)
        sae.mean.copy_(acts.mean)
        sae.scale.fill_(acts.scale)
        x = sae.normalise(rows)
        if kind == "untrained":
            sae.init_from_data(x)
        if kind == "pca":                # a latent for either sign of each component
            axes = torch.linalg.eigh(torch.cov(x.T.double())).eigenvectors.flip(1)[:, :rank].T
            sae.W_dec.copy_(torch.cat([axes, -axes]))
            sae.W_enc.copy_(sae.W_dec.T)
        if kind == "mean":
            sae.W_dec.zero_()
            sae.W_enc.zero_()
        weights = b"".join(value.cpu().numpy().tobytes() for value in sae.state_dict().values())
        config = {"control": kind, "settings": SAE.settings() | settings,
                  "sae_checksum": checksum(weights + json.dumps(settings).encode())}
        beside = runs[0].folder.parent / f"controls-{acts.folder.name}"
        made.append(Run(beside / kind, config, sae))
    return made


# ---- results -------------------------------------------------------------------------------------


EVALS = {                                  # in the order in which they run
    "core": Evaluation(evaluate_core, of_synthetic=True),
    "geometry": Evaluation(evaluate_geometry, of_controls=False, of_synthetic=True),
    "stability": Evaluation(evaluate_stability, inputs=siblings, of_controls=False,
                            of_synthetic=True),
    "absorption": Evaluation(
        evaluate_absorption, functools.partial(bench_settings, name="absorption")),
    **{name: Evaluation(functools.partial(evaluate_labelled, name),
                        functools.partial(labelled_settings, name))
       for name in ("sparse_probing", "scr", "tpp")},
    "forget": Evaluation(evaluate_forget, forget_settings),
    "unlearning": Evaluation(evaluate_unlearning, unlearning_settings, of_controls=False),
    "features": Evaluation(evaluate_features, of_controls=False),
}


DEFAULT = ["core", "geometry", "stability", "sparse_probing", "features"]      # what takes minutes


def identity(name, run, acts):
    """What a result belongs to; one that differs in any of these is made again."""
    return {"name": name, "version": VERSION, "run": run.name, "control": run.is_control,
            "sae_checksum": run.config["sae_checksum"], "acts": acts.folder.name,
            "acts_checksum": acts.checksum, "val": acts.meta["val"]["checksum"], "d_in": acts.d_in,
            **{key: acts.meta[key] for key in ("model", "layer", "hook_name")},
            "d_sae": run.config["settings"]["d_sae"],
            "settings": EVALS[name].settings(acts), "inputs": EVALS[name].inputs(run)}


def stored(name, run, acts):
    """The result in the run's folder if it is this very one, else None."""
    try:
        result = read_json(run.folder / "eval" / f"{name}.json", "metrics", "guards")
    except Refuse:                         # missing, damaged or older: it is made again
        return None
    return result if identity(name, run, acts).items() <= result.items() else None


def save(name, run, acts, result):
    """Write a result, and core's firing rates beside it."""
    if "rates" in result:
        meta = {"sae_checksum": run.config["sae_checksum"], "rows": result["rows"]}
        rates = {"rate": result.pop("rates")}
        write_tensors(run.folder / "eval" / "rates.safetensors", rates, meta)
    metrics = {key: finite(value) for key, value in result["metrics"].items()}
    write_json(run.folder / "eval" / f"{name}.json",
               {**identity(name, run, acts), **result, "metrics": metrics, "versions": versions()})


def versions():
    there = filter(importlib.util.find_spec, ("torch", "transformers", "sae_bench"))
    return {name: importlib.metadata.version(name) for name in there}


def evaluate(name, acts, model, runs, failures):
    """Make and save one evaluation of the runs. What fails is said and put into failures."""
    left, evaluation = set(runs), EVALS[name]
    try:
        for run, result in evaluation.make(acts, model, runs, evaluation.settings(acts)):
            left.discard(run)
            if not isinstance(result, Exception):
                result = attempt({}, run, save, name, run, acts, result)
            if result:
                report(f"{run.folder}: {name}", result, failures)
    except Unfit as reason:
        print(f"{acts.folder}: no {name}: {reason}")
    except Exception as error:             # the other evaluations go on
        report(f"{name} of {len(left)} of {len(runs)} runs", error, failures)


def report(what, error, failures):
    """Say on one line what failed, and count it."""
    reason = str(error) if isinstance(error, Refuse) else f"{type(error).__name__}: {error}"
    failures.append(what)
    said = reason if reason.startswith(what) else f"{what}: {reason}"
    print("error: " + " ".join(said.split()), file=sys.stderr)


# ---- the script ----------------------------------------------------------------------------------


COLUMNS = {                                # title -> (metric of core, format)
    "L0": ("l0", ".2f"), "EV": ("explained_variance", ".4f"), "CE rec.": ("ce_recovered", ".4f"),
    "KL": ("kl_sae", ".4f"), "dead": ("dead", ".1%"), "MCC": ("mcc", ".3f"), "F1": ("f1", ".3f"),
    "absorb.": ("absorption", ".3f"),
}


def print_table(runs, acts):
    """Print core's metrics of each run and its guards in words: those that make it invalid, with !,
    and the reasons below; else its caveats."""
    results = {run: stored("core", run, acts) for run in runs}
    results = {run: result for run, result in results.items() if result}
    names = short_names([run.name for run in results if not run.is_control])
    rows, reasons = [], []
    for run, result in results.items():
        name = f"control: {run.name}" if run.is_control else names[run.name]
        rows.append({"run": name, **table_row(result)})
        if not run.is_control:
            reasons += [f"{run.name}: invalid, {guard['name']}: {guard['why']}"
                        for guard in result["guards"] if guard["level"] == INVALID]
    if rows:
        print("\n".join(["", str(acts.folder), *table_lines(pd.DataFrame(rows)), *reasons]))


def table_row(result):
    """{title: cell} of a result of core."""
    row = {}
    for title, (metric, form) in COLUMNS.items():
        if result["metrics"].get(metric) is not None:
            row[title] = format(result["metrics"][metric], form)
    invalid = [guard["name"] + "!" for guard in result["guards"] if guard["level"] == INVALID]
    words = invalid or [guard["name"] for guard in result["guards"]]
    return {**row, "guards": ", ".join(words) or "-"}


def short_names(names, room=34):
    """{name: the name}; without the parts that all names share, where one is longer than `room`."""
    parts = {name: name.split("-") for name in names}
    if max(map(len, names), default=0) <= room:
        return {name: name for name in names}
    shared = set.intersection(*map(set, parts.values()))
    return {name: "-".join([first, *(part for part in rest if part not in shared)])
            for name, (first, *rest) in parts.items()}


def table_lines(table):
    """The lines of print_table's table, `run` on the left and `guards` in what is left of 100
    columns."""
    table = table[[title for title in ("run", *COLUMNS, "guards") if title in table]]
    guards = ["guards", *table.pop("guards")]
    width = table["run"].str.len().max()
    table["run"] = table["run"].str.ljust(width)
    table = table.rename(columns={"run": "run".ljust(width)})
    lines = table.to_string(index=False, na_rep="-").split("\n")
    room = max(10, 98 - len(lines[0]))
    return [f"{line}  {textwrap.shorten(text, room, placeholder=' ...')}"
            for line, text in zip(lines, guards)]


def portions(folders):
    """The folders in order, in lists whose SAEs together have at most LOADED bytes, or one SAE."""
    lists, room = [], 0
    for folder in folders:
        weights = folder / "sae.safetensors"
        size = weights.stat().st_size if weights.exists() else 0   # load_runs() says what is lost
        if size > room:
            lists.append([])
            room = LOADED
        lists[-1].append(folder)
        room -= size
    return lists


def load_runs(folders, acts, device, failures):
    """The Runs of folders on the device; those that can't be evaluated are said."""
    runs = []
    for folder in folders:
        try:
            sae, config = load_run(folder)
            if sae.d_in != acts.d_in:
                raise Refuse(f"another width: trained on rows of {sae.d_in}, {acts.folder} has "
                             f"rows of {acts.d_in}: train it again")
            runs.append(Run(folder, config, sae.to(device)))
        except Refuse as error:
            report(str(folder), error, failures)
    return runs


def finished(folders, failures):
    """{cache: [folder]} of the runs that are finished; the others are said."""
    found = defaultdict(list)
    for folder in folders:
        try:
            config = read_json(folder / "config.json", "status", "acts")
        except Refuse as error:
            report(str(folder), error, failures)
            continue
        if config["status"] == "done":
            found[config["acts"]].append(folder)
        else:
            why = f" ({config['reason']})" if "reason" in config else ""
            print(f"{folder}: skipped, its training has not ended well: {config['status']}{why}")
    return found


def fitting(names, acts, asked):
    """The evaluations of `names` that say something of a cache; without `asked`, those that take
    minutes."""
    if acts.meta["source"] != "model":
        left_out = [name for name in names if not EVALS[name].of_synthetic]
        if asked and left_out:
            print(f"{acts.folder}: no {', '.join(left_out)}, which need a language model")
        names = [name for name in names if name not in left_out]
    elif not asked and acts.meta["model"]["name"] != "tiny":
        names = [name for name in names if name != "sparse_probing"]   # large data sets, on the hub
    return names


def missing(name, acts, runs, force):
    """The runs that the evaluation says something of and that have no result of it yet."""
    runs = [run for run in runs if EVALS[name].of_controls or not run.is_control]
    return [run for run in runs if force or not stored(name, run, acts)]


def evaluate_cache(acts, folders, args, names, device, failures):
    """Make what is missing of the named evaluations for the runs of a cache; print the table."""
    locks = [lock(folder) for folder in folders]
    model, seen = None, []
    if acts.meta["source"] == "model":
        model = LanguageModel(acts, device, args.trust_remote_code)
    for portion in portions(folders):
        runs = load_runs(portion, acts, device, failures)
        if args.controls and runs and not any(run.is_control for run in seen):
            controls = make_controls(acts, runs)
            locks += [lock(run.folder, wait=True) for run in controls]
            runs += controls
        for name in fitting(names, acts, args.eval):
            todo = missing(name, acts, runs, args.force)
            if todo:
                evaluate(name, acts, model, todo, failures)
        seen += runs
        for run in runs:                   # the next portion needs the memory
            run.sae = None
    print_table(seen, acts)
    for held in locks:
        held.release()
    bench_of.cache_clear()                 # the next cache's language model needs the memory


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", help="folders (default: all under runs/)")
    parser.add_argument("--eval", nargs="+", choices=[*EVALS, "all"], metavar="NAME",
                        help=f"which: {', '.join(EVALS)}, all (default: {' '.join(DEFAULT)}, but "
                        "sparse_probing for the embedded model only)")
    parser.add_argument("--controls", action="store_true",
                        help="also SAEs that have learned nothing, as sparse as the runs")
    parser.add_argument("--force", action="store_true", help="evaluate again what is there already")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run code that comes with the model, and read its pickle files")
    args = parser.parse_args()
    device, failures = pick_device(args.device), []

    asked = args.eval or DEFAULT
    names = [name for name in EVALS if name in asked or "all" in asked]
    for acts_name, folders in finished(run_folders(args.runs), failures).items():
        try:
            acts = Acts(Path("acts") / acts_name)
            evaluate_cache(acts, folders, args, names, device, failures)
        except Refuse as error:            # the other caches go on
            report(f"runs of acts/{acts_name}", error, failures)
    return 5 if failures else 0


if __name__ == "__main__":
    run_script(main)

"""Evaluate trained SAEs on held-out contexts: all runs of a cache share each pass of the language model.

    python 03_eval.py                                            every finished run under runs/
    python 03_eval.py runs/topk-s0 runs/topk-s1 --eval core      these runs, this evaluation
    python 03_eval.py --controls                                 also what has learned nothing: untrained, random, PCA, mean

Reads runs/NAME/{config.json, sae.safetensors, metrics.jsonl} (02_train.py), acts/NAME/{meta.json, val.safetensors} and the start of its
first shard (01_cache_acts.py), the language model, and for SAEBench on models of the hub labelled/NAME/SPLIT.jsonl. Writes
    runs/NAME/eval/core.json           reconstruction, sparsity, the model's loss with the SAE spliced in, the truth if known, guards
    runs/NAME/eval/rates.safetensors   how often each latent fires
    runs/NAME/eval/features.json       for some latents the contexts in which they fire most
    runs/NAME/eval/geometry.json       coherence, rank, condition numbers, correlations, random projections, beside a random dictionary
    runs/NAME/eval/structure.json      what decoder rows are made of, which latents contain which, where thresholds lie, what bfloat16 costs
    runs/NAME/eval/training.json       the same metrics for the snapshots that training kept, on few contexts
    runs/NAME/eval/stability.json      which latents the other seeds of the same settings find again, beside random dictionaries
    runs/NAME/eval/saebench_core.json  and one file for every other evaluation of SAEBench: its own schema, with ours beside it
    acts/NAME/eval_cache/              what SAEBench's evaluations of all runs share; may be deleted
    runs/controls-ACTS/KIND/eval/     core.json of the controls, and SAEBench's
A result that belongs to the same weights, activations and number of contexts is left alone (--force makes it again).
"""
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # a Ctrl-C while libraries load just ends it; run_script() takes over
os.environ.setdefault("GOMP_SPINCOUNT", "1000")         # before torch loads: waiting threads that spin for long cost 2 to 5 x on a busy
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # machine, and those that sleep at once a fifth on an idle one

import contextlib
import copy
import functools
import gc
import glob
import importlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing.connection
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy
import torch
import xxhash
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from sae import (SAE, SPARSE_BELOW, Acts, Codes, Parser, Refuse, above, blocks_of, checksum, end_with_parent, generator, highest, hook_point,
                 hub_errors, interrupt, is_disk_full, is_out_of_memory, language_model, load_run, loads, model_checksum, pick_device, read_json,
                 read_log, read_tensors, run_folders, run_script, take_lock, unit, whole, write_file, write_json, write_tensors)

VERSION = 4                      # of the evaluations here; results of another one are made again
SAMPLE_ROWS = 16_384             # training rows that PCA, the mean and the controls are fitted on
ON_DEVICE = 2**33                # bytes of SAEs that are on the device together with the language model, or one SAE
BUFFER = 2**33                   # bytes of a GPU for all that is worked on beside these; LOGITS and CODES are so few that it suffices
LOGITS, CODES = BUFFER // 32, BUFFER // 128          # numbers at once: predictions, latent activations
DENSE = 0.1                      # a latent that fires on more than this share of rows is dense

# What a guard calls invalid or doubtful. Published values are for SAEs with 16,384 latents and more; token counts are per latent here.
UNTRAINED_TOKENS = 60            # training tokens per latent below which a run is not trained at all (1 M for 16,384 latents)
SHORT_TOKENS = 300               # ... and below which it is too short for a claim (5 M for 16,384 latents)
SAME_WEIGHTS = 0.99              # mean cosine of the decoder with its own start
NOT_SPARSE = 0.1                 # L0 / d_sae; a code that uses more than this of the dictionary is not sparse ...
NOT_SPARSE_SMALL = 0.25          # ... in a dictionary of fewer than SMALL latents
SMALL = 1024
DEAD = 0.1                       # share of latents that never fire
SHRINKAGE = 0.9                  # ||x_hat|| / ||x||
HELPS = 0.3                      # absorption: cosine with the parent from which on another latent stands in for the parent's
PAIR_ROWS = 10                   # absorption: rows on which parent and child are both on, for a pair to count


class Run:
    """What is evaluated: a run of 02_train.py, or a control."""

    def __init__(self, folder, sae, config):
        self.folder, self.name, self.sae, self.config = folder, folder.name, sae, config


# ---- the held-out data ------------------------------------------------------------------------------------------------------------


class LanguageModel:
    """The language model in fp32, read at the hook, and run again from there with other activations at the hook."""

    def __init__(self, meta, device):
        path = meta["model"]["path"]
        local = Path(path).exists()
        if local and meta["model"]["revision"] not in (None, model_checksum(path)):
            raise Refuse(f"the language model in {path} has changed since its activations were cached: put it back, or cache again")
        self.extra = {} if local else {"revision": meta["model"]["revision"]}
        with hub_errors("model", path):
            self.model = language_model(path, torch.float32, **self.extra)
        self.model.to(device)
        blocks = blocks_of(self.model.base_model, meta["model"]["n_layers"], path)
        self.point = hook_point(blocks[meta["layer"]], meta["hook"], path)
        self.earlier = list(blocks[:meta["layer"]])
        self.path, self.vocab = path, self.model.get_output_embeddings().weight.shape[0]

    def tokenizer(self):
        import transformers
        with hub_errors("model", self.path):
            return transformers.AutoTokenizer.from_pretrained(self.path, **self.extra)

    @torch.no_grad()
    def read(self, tokens, mask, logits=True):
        """The clean pass over tokens [n, ctx]: the activations at the hook that count as rows, [rows, d_in].

        As in the cache, BOS, padding (mask) and tokens of more than 10 x the median norm are no rows; no pass changes them."""
        handles = [self.point.register_forward_hook(lambda module, args, out: setattr(self, "clean", first(out)))]
        if self.earlier:
            handles.append(self.earlier[-1].register_forward_hook(lambda module, args, out: setattr(self, "before", out)))
        try:
            out = (self.model if logits else self.model.base_model)(tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        norm = self.clean.norm(dim=-1)
        self.tokens, self.rows = tokens, mask & (norm <= 10 * norm[mask].median())
        self.counts = self.rows[:, :-1] & self.rows[:, 1:]                    # predictions from a row, of a row
        self.targets = tokens[:, 1:][self.counts]
        self.at = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand_as(self.counts)[self.counts]      # of each prediction
        self.eighth = torch.nn.functional.one_hot(8 * self.at // (tokens.shape[1] - 1), 8).double()
        if logits:
            log_p = self.log_probs(out.logits)
            self.p, self.clean_loss = log_p.exp(), self.loss(log_p)
            self.negative_entropy = torch.linalg.vecdot(self.p, log_p).sum(dtype=torch.float64).item()
        return self.clean[self.rows]

    @torch.no_grad()
    def splice(self, x):
        """Loss and divergence from the clean pass with x [rows, d_in] in place of the rows, summed over the predictions: the loss for each
        eighth of the context [8], the divergence for all."""
        hidden = self.clean.clone()
        hidden[self.rows] = x
        handle = self.point.register_forward_hook(lambda module, args, out: (hidden, *out[1:]) if isinstance(out, tuple) else hidden)
        for block in self.earlier:
            block.forward = lambda *args, **kwargs: self.before               # known from the clean pass
        try:
            log_q = self.log_probs(self.model(self.tokens, use_cache=False).logits)
        finally:
            handle.remove()
            for block in self.earlier:
                del block.forward
        return self.loss(log_q), self.negative_entropy - torch.linalg.vecdot(self.p, log_q).sum(dtype=torch.float64).item()

    def log_probs(self, logits):
        return logits[:, :-1][self.counts].float().log_softmax(-1)

    def loss(self, log_p):
        return -log_p.gather(-1, self.targets[:, None]).double()[:, 0] @ self.eighth


def first(out):
    return out[0] if isinstance(out, tuple) else out


class HeldOut:
    """The held-out part of a cache in batches of rows; a language model reads them from `contexts` contexts (all, if None)."""

    def __init__(self, acts, device, contexts=None):
        self.acts, self.device, self.parts = acts, device, 1     # parts: into how many a batch was cut because it did not fit in memory
        self.val = acts.val()
        self.model = LanguageModel(acts.meta, device) if acts.meta["source"] == "model" else None
        self.n = n_contexts(acts, contexts)
        sample = acts.shard(0)["acts"][:SAMPLE_ROWS].double()
        self.sample, self.mean = sample.float(), sample.mean(0)
        self.truth = None
        if "truth" in acts.meta:
            self.truth = Truth(read_tensors(acts.folder / acts.meta["truth"]["file"], acts.meta["truth"]["checksum"])[0], device)

    def batches(self, description, logits=True):
        """Yields (rows [n, d_in] float32, true features [n, n_features] or None, index of the first context)."""
        per_batch = self.per_batch()
        with tqdm(total=self.n, desc=description, unit="context" if self.model else "row", disable=None, mininterval=1) as bar:
            for start in range(0, self.n, per_batch):
                part = slice(start, min(start + per_batch, self.n))
                tensors = {k: v[part].to(self.device) for k, v in self.val.items()}
                if not self.model:
                    yield tensors["acts"].float(), tensors.get("features"), start
                elif tensors["mask"].any():
                    yield self.model.read(tensors["tokens"].long(), tensors["mask"], logits), None, start
                bar.update(part.stop - part.start)

    def per_batch(self):
        """Contexts (rows, of synthetic data) that are worked on at a time."""
        logits_at_once = LOGITS if self.device.type == "cuda" else 2**22       # on a CPU small blocks are reused, large ones cost page faults
        return max(1, (logits_at_once // (self.val["tokens"].shape[1] * self.model.vocab) if self.model else 4096) // self.parts)

    def halve(self):
        """Smaller batches, after one did not fit in memory."""
        if self.per_batch() == 1:
            raise Refuse("out of memory with one context at a time: evaluate fewer runs in a call", 4)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.parts *= 2
        print(f"note: out of memory: going on with {self.per_batch()} at a time", file=sys.stderr)


def n_contexts(acts, wanted):
    """How many held-out contexts are used: `wanted`, or all; of synthetic data always all rows."""
    there = acts.meta["val"]["contexts"]
    return min(wanted or there, there) if acts.meta["source"] == "model" else there


# ---- core: reconstruction, sparsity, the model's loss, the truth ----------------------------------------------------------------------


def evaluate_core(held_out, runs, failures):
    """Core metrics of all runs from one pass over the held-out data -> {run: {metrics, guards, rates, n_rows}}."""
    data, scores, model = Data(held_out), {run: Score(run.sae, held_out) for run in runs}, held_out.model
    for x, features, _ in held_out.batches("core"):
        data.add(x)
        if model:
            data.language["ce_clean"] += model.clean_loss
            data.language["predictions"] += model.eighth.sum(0)
            data.language["position"] += model.at.double() @ model.eighth
            for name, fill in (("zero", torch.zeros_like(x)), ("mean", held_out.mean.to(x).expand_as(x))):
                ce, kl = model.splice(fill)
                data.language[f"ce_{name}"] += ce
                data.language[f"kl_{name}"] += kl
        for run in alive(runs, failures):
            with blamed(run, failures):
                scores[run].add(x, features, model)
    results, pca = {}, data.pca(held_out.sample)
    for run in alive(runs, failures):
        with blamed(run, failures):
            metrics = {k: plain(v) for k, v in scores[run].metrics(data, pca).items()}
            results[run] = {"metrics": metrics, "guards": guards(metrics, run, data, held_out.acts), "n_rows": data.n,
                            "rates": scores[run].rates()}
    return results


class Data:
    """What the metrics need to know of the rows themselves; sums in fp64."""

    def __init__(self, held_out):
        self.scale, self.d_in = held_out.acts.scale, held_out.acts.d_in
        self.n, self.norm, self.sum, self.square = 0, 0.0, 0, 0
        self.language = defaultdict(float)

    def add(self, x):
        exact = x.double()
        self.n += len(x)
        self.norm += exact.norm(dim=-1).sum().item()
        self.sum = self.sum + exact.sum(0)
        self.square = self.square + exact.T @ exact

    @property
    def total(self):
        """Sum of squared distances to the mean."""
        return (self.square.trace() - self.sum.square().sum() / self.n).item()

    def pca(self, sample):
        """Explained variance of the first 0, 1 ... d_in principal components of the training sample on these rows."""
        sample = sample.to(self.sum)
        mean = sample.mean(0)
        axes = torch.linalg.eigh((sample - mean).T @ (sample - mean)).eigenvectors.flip(1)
        cross = torch.outer(self.sum, mean)
        about = self.square - cross - cross.T + self.n * torch.outer(mean, mean)
        captured = ((about @ axes) * axes).sum(0).cumsum(0)
        left = about.trace() - torch.cat([captured.new_zeros(1), captured])
        return (1 - left / self.total).tolist()


class Score:
    """Sums over the held-out rows for one SAE."""

    def __init__(self, sae, held_out):
        self.sae, self.sums, self.fires = sae, defaultdict(float), torch.zeros(sae.d_sae, dtype=torch.float64, device=held_out.device)
        self.truth = TruthScore(held_out.truth, sae) if held_out.truth else None

    @torch.no_grad()
    def add(self, x, features, model):
        sae, s, whole = self.sae, self.sums, []
        at = 0
        for part in x.split(max(1, CODES // sae.d_sae)):                      # bounds the memory that [rows, d_sae] takes
            out = sae(part * sae.scale)
            x_hat, exact, on = out.x_hat / sae.scale, part.double(), out.acts > 0
            guess = x_hat.double()
            s["error"] += (exact - guess).square().sum().item()
            s["dot"] += (exact * guess).sum().item()
            s["norm"] += guess.norm(dim=-1).sum().item()
            s["square"] += guess.square().sum().item()
            s["cosine"] += torch.cosine_similarity(exact, guess, dim=-1).sum().item()
            s["l1"] += (out.acts.sum(dtype=torch.float64) / sae.scale).item()
            s["silent_rows"] += (~on.any(-1)).sum().item()
            self.fires += on.sum(0)
            if self.truth:
                self.truth.add(on, features[at:at + len(part)] > 0)
            at += len(part)
            whole.append(x_hat)
        if model:
            ce, kl = model.splice(torch.cat(whole))
            s["ce"] += ce
            s["kl"] += kl

    def rates(self):
        return (self.fires / max(1, self.n)).float().cpu()

    def metrics(self, data, pca):
        self.n, s = data.n, self.sums
        n, rate, l0 = data.n, self.fires / data.n, self.fires.sum().item() / data.n
        dense = rate > DENSE
        m = {"explained_variance": 1 - s["error"] / data.total, "mse": s["error"] / n / data.d_in, "cosine": s["cosine"] / n,
             "l0": l0, "l1": s["l1"] / n, "l2_ratio": s["norm"] / data.norm, "slope": s["dot"] / max(s["square"], 1e-30),
             "dead": (rate == 0).double().mean().item(), "dense": dense.double().mean().item(),
             "dense_share": (rate[dense].sum() / max(l0, 1e-30)).item(), "silent_rows": s["silent_rows"] / n,
             "decoder_max_cosine": max_cosine(self.sae.W_dec.detach()).mean().item(),
             "decoder_norm_error": (self.sae.W_dec.detach().norm(dim=-1) - 1).abs().max().item(),
             "explained_variance_zero": 1 - data.square.trace().item() / data.total,
             "explained_variance_pca": pca[min(int(l0), data.d_in)] if math.isfinite(l0) else math.nan, "density": density(rate)}
        if data.language:
            sums = {**data.language, "ce_sae": s["ce"], "kl_sae": s["kl"]}
            count, position = sums.pop("predictions"), sums.pop("position")
            m |= {k: float(torch.as_tensor(v).sum() / count.sum()) for k, v in sums.items()}
            m["ce_recovered"] = (m["ce_zero"] - m["ce_sae"]) / (m["ce_zero"] - m["ce_clean"])
            m["kl_recovered"] = 1 - m["kl_sae"] / m["kl_zero"]
            recovered = (sums["ce_zero"] - s["ce"]) / (sums["ce_zero"] - sums["ce_clean"])
            parts = {"at": position / count, "ce_clean": sums["ce_clean"] / count, "ce_sae": s["ce"] / count, "ce_recovered": recovered}
            m["by_position"] = {k: [plain(x) for x in v.tolist()] for k, v in parts.items()}        # eighths of the context; at: their mean position
        return m | (self.truth.metrics() if self.truth else {})


def max_cosine(W_dec, block=1024):
    """The highest cosine of each latent's decoder row with another one's [d_sae], 0 of a single one; never all pairs at once."""
    rows, highest = unit(W_dec), []
    for start in range(0, len(rows), block):
        cosine = rows[start:start + block] @ rows.T
        cosine.diagonal(start).fill_(-2.0 if len(rows) > 1 else 0.0)
        highest.append(cosine.amax(-1))
    return torch.cat(highest)


def density(rate, low=-6.0, width=0.25):
    """Histogram of log10 firing rates: how many latents fall between edges; those that never fire stand apart."""
    log = rate[rate > 0].log10().clamp(low, 0).cpu()
    bins = round(-low / width)
    counts = torch.histc(log.float(), bins, low, 0.0).long().tolist()
    return {"log10_edges": [low + width * i for i in range(bins + 1)], "counts": counts, "silent": int((rate == 0).sum())}


class Truth:
    """The features that made synthetic data: directions, and which feature is the parent of which."""

    def __init__(self, tensors, device):
        self.dictionary = unit(tensors["dictionary"].float().to(device))                    # [n_features, d_in]
        self.child = (tensors["parent"] >= 0).nonzero().flatten().to(device)                # of each (parent, child) pair
        self.parent = tensors["parent"].to(device)[self.child].long()


class TruthScore:
    """How one SAE's latents agree with the true features, each of which has one latent by the best one-to-one matching."""

    def __init__(self, truth, sae):
        self.t = truth
        cosine = truth.dictionary @ unit(sae.W_dec.detach()).T                              # [n_features, d_sae]
        features, latents = linear_sum_assignment(cosine.abs().cpu().numpy(), maximize=True)
        self.features, self.latents = (torch.as_tensor(i, device=cosine.device) for i in (features, latents))
        self.mcc = cosine[self.features, self.latents].abs().mean().item()
        self.coverage = (cosine.abs().amax(-1) > 0.9).double().mean().item()
        latent_of = torch.full((len(cosine),), -1, device=cosine.device)
        latent_of[self.features] = self.latents
        has = latent_of[truth.parent] >= 0                                                  # a small dictionary can't match all
        self.parent, self.child = truth.parent[has], truth.child[has]
        self.parents, self.which = self.parent.unique(return_inverse=True)
        self.main = latent_of[self.parents]                                                 # the parents' own latents
        self.helps = (cosine[self.parents] > HELPS).scatter(1, self.main[:, None], False).float()
        self.sums = defaultdict(int)

    def add(self, on, true):
        """on [n, d_sae]: latents that fire; true [n, n_features]: features that are on."""
        fires, real, s = on[:, self.latents], true[:, self.features], self.sums
        s["hit"] = s["hit"] + (fires & real).sum(0)
        s["fired"] = s["fired"] + fires.sum(0)
        s["real"] = s["real"] + real.sum(0)
        silent = ~on[:, self.main]
        absorbed = silent & (on.float() @ self.helps.T > 0)
        both = true[:, self.parent] & true[:, self.child]
        s["both"] = s["both"] + both.sum(0)
        s["absorbed"] = s["absorbed"] + (both & absorbed[:, self.which]).sum(0)
        s["parent"] = s["parent"] + true[:, self.parents].sum(0)
        s["recalled"] = s["recalled"] + (true[:, self.parents] & ~silent).sum(0)

    def metrics(self):
        s = {k: v.double() for k, v in self.sums.items()}
        seen, pairs, parents = s["real"] > 0, s["both"] >= PAIR_ROWS, s["parent"] > 0
        mean = lambda values: values.mean().item() if len(values) else None
        return {"mcc": self.mcc, "coverage": self.coverage, "f1": mean((2 * s["hit"] / (s["fired"] + s["real"]))[seen]),
                "absorption": mean((s["absorbed"] / s["both"])[pairs]), "parent_recall": mean((s["recalled"] / s["parent"])[parents]),
                "features_seen": int(seen.sum()), "pairs": int(pairs.sum())}


def guards(m, run, data, acts):
    """What makes a run's numbers invalid (fatal: it is left out of every comparison) or doubtful (warn), each with the number."""
    config, sae, found = run.config, run.sae, []
    settings, get = config["settings"], lambda key: math.nan if m.get(key) is None else m[key]

    def flag(bad, guard, level, message):
        if bad:
            found.append({"id": guard, "level": level, "message": message})

    ev, l0, d_sae = get("explained_variance"), get("l0"), sae.d_sae
    not_finite = [k for k, v in m.items() if v is None and k not in ("absorption", "f1", "parent_recall")]
    flag(l0 == 0 or get("silent_rows") > 0.5, "G01", "fatal", f"degenerate: L0 {l0:.3g}, no latent fires on {get('silent_rows'):.0%} of rows")
    flag(ev <= 0, "G02", "fatal", f"worse than the mean: explained variance {ev:.3f}")
    flag(abs(ev - m["explained_variance_zero"]) < 0.02 or get("l2_ratio") < 0.1, "G03", "fatal",
         f"zero output: explained variance {ev:.3f}, that of zero {m['explained_variance_zero']:.3f}, l2 ratio {get('l2_ratio'):.3f}")
    flag(not_finite or not all(v.isfinite().all() for v in sae.state_dict().values()), "G04", "fatal",
         f"not finite: {', '.join(not_finite) or 'weights'}")
    flag(config.get("void"), "G36", "fatal", f"void since training: {', '.join(config.get('void', []))}")
    per_latent = config["steps"] * settings["batch_size"] / d_sae
    flag(per_latent < UNTRAINED_TOKENS, "G05", "fatal", f"untrained: {config['steps']} steps, {per_latent:.0f} tokens per latent")
    flag(UNTRAINED_TOKENS <= per_latent < SHORT_TOKENS, "G05", "warn", f"short run: {per_latent:.0f} tokens per latent")
    start = type(sae)(sae.d_in, sae.steps, sae.seed, **settings).W_dec.detach().to(sae.W_dec.device)
    moved = torch.cosine_similarity(start, sae.W_dec.detach(), dim=-1).mean().item()
    flag(moved > SAME_WEIGHTS, "G06", "fatal", f"no learning: mean cosine of the decoder with its start {moved:.3f}")
    log = read_log(run.folder, config)
    stuck = len(log) >= 10 and len({line["loss"] for line in log[-10:]}) == 1
    flag(stuck, "G06", "fatal", f"no learning: the same loss {log[-1]['loss'] if stuck else 0} in the last 10 logs")
    flag(abs(l0 / d_sae - 0.5) < 0.05 and abs(get("cosine")) < 0.05, "G07", "fatal",
         f"untrained ReLU: L0 is {l0 / d_sae:.2f} of d_sae, cosine {get('cosine'):.3f}")
    share = NOT_SPARSE if d_sae >= SMALL else NOT_SPARSE_SMALL
    flag(l0 > sae.d_in / 2 or l0 > share * d_sae, "G08", "fatal", f"not sparse: L0 {l0:.1f} of {d_sae} latents in {sae.d_in} dimensions")
    flag(ev <= get("explained_variance_pca"), "G08", "fatal",
         f"no better than PCA: explained variance {ev:.3f}, {int(l0) if l0 == l0 else 0} components {get('explained_variance_pca'):.3f}")
    differs = [k for k in ("model", "layer", "hook_name") if k in config and config[k] != acts.meta[k]]
    flag(differs, "G10", "fatal", f"mismatch: trained on another {', '.join(differs)}")
    flag(not differs and config.get("acts_checksum", acts.checksum) != acts.checksum, "G10", "warn",
         "the cache has changed or grown since training")
    flag(m["dead"] > DEAD, "G18", "warn", f"dead: {m['dead']:.0%} of latents never fire on {data.n} rows")
    flag(m["dense_share"] > 0.2 or m["dense"] > 0.01, "G19", "warn",
         f"dense: {m['dense']:.1%} of latents fire on more than {DENSE:.0%} of rows and make {m['dense_share']:.0%} of L0")
    usual = data.norm / data.n * data.scale / data.d_in ** 0.5
    flag(not 0.95 < usual < 1.05, "G20", "warn", f"held-out rows differ from the training rows: mean norm {usual:.3f} of theirs")
    off = m["decoder_norm_error"]
    flag(off > 1e-4, "G23", "fatal" if off > 1e-2 else "warn", f"decoder rows are not unit: off by up to {off:.2g}")
    flag(get("l2_ratio") < SHRINKAGE or get("slope") > 1.05, "G24", "warn", f"shrinkage: l2 ratio {get('l2_ratio'):.3f}, slope {get('slope'):.3f}")
    late = [line for line in log if line["step"] > 0.5 * config["steps"]]
    for name in sorted({k for line in late for k in line if k.startswith("ratio_")}):
        values = [line[name] for line in late if line.get(name) is not None]
        ratio = sum(values) / len(values) if values else math.nan
        flag(ratio > 1, "G27", "warn", f"{name[6:]} dominates: {ratio:.2g} x the reconstruction error")
        flag(ratio < 0.01 and name not in ("ratio_aux", "ratio_sparsity"), "G27", "warn",
             f"{name[6:]} is inactive: {ratio:.2g} x the reconstruction error")
    flag(get("ce_recovered") < 0 or get("kl_recovered") < 0, "G34", "fatal",
         f"worse than zero ablation: CE recovered {get('ce_recovered'):.3f}, KL recovered {get('kl_recovered'):.3f}")
    return found


# ---- features: what latents fire on -----------------------------------------------------------------------------------------------------


def evaluate_features(held_out, runs, failures, n_latents=20, n_contexts=8, before=16, after=4):
    """For random latents that fire, the most and the least frequent ones and those whose letters are absorbed most: the contexts in which each
    fires most, the token marked << >>, the tokens that its decoder direction promotes through the unembedding (the final norm left out), and
    the latents with the nearest decoder rows. Only of a language model, and of runs, not of controls."""
    runs = [r for r in runs if "control" not in r.config]
    if not held_out.model or not runs:
        return {}
    tokenizer = held_out.model.tokenizer()
    chosen, reasons, rates, best, where = {}, {}, {}, {}, {}
    for run in runs:
        with blamed(run, failures):
            tensors, meta = read_tensors(run.folder / "eval" / "rates.safetensors")
            if meta["sae_checksum"] != run.config["sae_checksum"]:
                raise Refuse(f"{run.folder}/eval/rates.safetensors is of other weights: run --eval core first")
            rates[run], firing = tensors["rate"], tensors["rate"].nonzero().flatten()
            order = rates[run][firing].argsort(descending=True, stable=True)
            groups = {"random": firing[torch.randperm(len(firing), generator=generator("features", run.name))[:n_latents]].tolist(),
                      "frequent": firing[order[:n_latents // 4]].tolist(), "rare": firing[order.flip(0)[:n_latents // 4]].tolist(),
                      "absorbed": absorbed_latents(run)[:n_latents // 4]}
            reasons[run] = {latent: [why for why, them in groups.items() if latent in them] for latent in sorted(set().union(*groups.values()))}
            chosen[run] = torch.tensor(list(reasons[run]), dtype=torch.long)
            best[run] = torch.zeros(held_out.n, len(chosen[run]))
            where[run] = torch.zeros(held_out.n, len(chosen[run]), dtype=torch.long)
    for x, _, start in held_out.batches("features", logits=False):
        rows = held_out.model.rows
        for run in alive(runs, failures):
            with blamed(run, failures), torch.no_grad():
                sae, pick = run.sae, chosen[run].to(x.device)
                acts = torch.cat([sae(part * sae.scale).acts[:, pick] for part in x.split(max(1, CODES // sae.d_sae))]) / sae.scale
                full = acts.new_zeros(*rows.shape, len(pick))
                full[rows] = acts
                top = full.max(1)
                best[run][start:start + len(full)], where[run][start:start + len(full)] = top.values.cpu(), top.indices.cpu()
    tokens, text = held_out.val["tokens"], lambda ids: tokenizer.decode(ids)
    unembed = held_out.model.model.get_output_embeddings().weight.detach()
    results = {}
    for run in alive(runs, failures):
        latents, W_dec = [], unit(run.sae.W_dec.detach())
        for i, latent in enumerate(chosen[run].tolist()):
            contexts = []
            for c in best[run][:, i].topk(min(n_contexts, held_out.n)).indices.tolist():
                at, row = where[run][c, i].item(), tokens[c]
                if best[run][c, i] > 0:
                    contexts.append({"activation": best[run][c, i].item(), "token": text(row[at:at + 1]),
                                     "text": f"{text(row[max(0, at - before):at])}<<{text(row[at:at + 1])}>>{text(row[at + 1:at + 1 + after])}"})
            promoted = (unembed @ run.sae.W_dec[latent].detach()).topk(8).indices.tolist()
            near = (W_dec @ W_dec[latent]).index_fill(0, torch.tensor(latent, device=W_dec.device), -2.0).topk(min(4, len(W_dec) - 1))
            latents.append({"latent": latent, "why": reasons[run][latent], "rate": rates[run][latent].item(), "promotes": [text([t]) for t in promoted],
                            "neighbours": [{"latent": j, "cosine": c} for c, j in zip(near.values.tolist(), near.indices.tolist())], "contexts": contexts})
        results[run] = {"latents": latents}
    return results


def absorbed_latents(run):
    """The main latents of the first letters that are absorbed most (full score, then fraction), if --eval absorption has a result of this run."""
    path = run.folder / "eval" / "absorption.json"
    result = read_json(path) if path.exists() else {}
    if result.get("sae_checksum") != run.config["sae_checksum"]:
        return []
    rate = {d["first_letter"]: (d["full_absorption_rate"], d["mean_absorption_fraction"]) for d in result["eval_result_details"]}
    letters = sorted((e for e in result["letters"] if max(rate[e["letter"]]) > 0), key=lambda e: rate[e["letter"]], reverse=True)
    return list(dict.fromkeys(e["main_latent"] for e in letters))


# ---- geometry: how the decoder's directions lie, and which latents fire together -----------------------------------------------------------


GEOMETRY_ROWS = 8192             # held-out rows on which co-firing is seen
GEOMETRY_LATENTS = 2048          # latents that are looked at in pairs: all, or as many of them at random
JL_DIMENSIONS = (32, 64, 128, 256, 512)
JL_ABOVE = (0.05, 0.1, 0.2, 0.4)     # cosines above which pairs are looked for, in the projection and in truth
TOP_PAIRS = 0.001                # share of all pairs that a batch selects, as in topk_ortho_r1
PAIR_BATCHES = (256, 1024, 4096)     # rows
GROUP, GROUPS = 32, 64           # latents in a group, and how many groups are looked at


def evaluate_geometry(held_out, runs, failures):
    """What the training metrics don't say of a run: coherence and rank of its decoder, condition numbers of latents that fire together, how
    well random projections keep its cosines, correlations of its latents, how stable a batch's choice of pairs is, sparsity of the code.
    `null`: the same of random directions, as many in as many dimensions, and of activations shifted against each other. Not of controls."""
    runs, nulls, results = [r for r in runs if "control" not in r.config], {}, {}
    x = some_rows(held_out) if runs else None
    for run in tqdm(runs, desc="geometry", unit="run", disable=None):
        with blamed(run, failures), torch.no_grad():
            g = lambda name: generator("geometry", name)
            W, code = unit(run.sae.W_dec.float()), Code(run.sae, x, g("latents"))
            n, d = W.shape
            if (n, d) not in nulls:
                chance = unit(torch.randn(n, d, generator=g("chance"))).to(W)
                nulls[n, d] = chance, directions(chance), projections(chance, g("jl"))
            chance, null, null_jl = nulls[n, d]
            sets = code.sets(g("sets"))
            results[run] = {
                "rows": len(x), "latents": len(code.latents), "metrics": directions(W) | code.metrics(),
                "null": null | {"welch": max(0.0, (n - d) / (d * max(1, n - 1))), "correlation": mean_correlation(shifted(code.acts, g("shift")))},
                "condition": {kind: {"run": condition(W, latents), "null": condition(chance, latents), "marchenko_pastur": marchenko_pastur(latents, d)}
                              for kind, latents in sets.items()},
                "jl": {"dimensions": JL_DIMENSIONS, "run": projections(W, g("jl")), "null": null_jl}, "pairs": pair_stability(code)}
    return results


def some_rows(held_out):
    """The first GEOMETRY_ROWS held-out rows [n, d_in]."""
    rows = []
    for x, _, _ in held_out.batches("rows", logits=False):
        rows.append(x)
        if sum(map(len, rows)) >= GEOMETRY_ROWS:
            break
    return torch.cat(rows)[:GEOMETRY_ROWS]


def directions(W, block=1024):
    """Coherence and spectrum of unit rows W [n, d]; never all pairs at once.

    coherence: largest absolute cosine of two rows; unique: share of rows whose nearest other one has a cosine below 0.2; mean_square_cosine
    can't fall below Welch's (n - d) / (d (n - 1)); effective_rank: exp of the entropy of the squared singular values' shares, which is also
    the Vendi score of the cosines (Friedman 2022); frame_ratio: largest over d-th singular value, null where the rows don't span all d."""
    n, d = W.shape
    absolute = square = lowest = 0.0
    above, highest = dict.fromkeys(("0.3", "0.5", "0.9"), 0), []
    for start in range(0, n, block):
        cosine = W[start:start + block] @ W.T
        cosine.diagonal(start).zero_()
        absolute += cosine.abs().sum(dtype=torch.float64).item()
        square += cosine.square().sum(dtype=torch.float64).item()
        above = {k: count + (cosine > float(k)).sum().item() for k, count in above.items()}      # each pair twice
        lowest = min(lowest, cosine.min().item())
        cosine.diagonal(start).fill_(-1)
        highest.append(cosine.amax(-1))
    highest, pairs = torch.cat(highest), max(1, n * (n - 1))
    power = torch.linalg.eigvalsh((W.T @ W).double()).clamp_min(0)
    return {"coherence": max(highest.max().item(), -lowest), "mean_max_cosine": highest.mean().item(), "mean_abs_cosine": absolute / pairs,
            "mean_square_cosine": square / pairs, "pairs_above": {k: count // 2 for k, count in above.items()},
            "unique": (highest < 0.2).double().mean().item(), "effective_rank": torch.special.entr(power / power.sum()).sum().exp().item(),
            "frame_ratio": (power[-1] / power[0]).sqrt().item() if power[0] > 1e-10 * power[-1] else None, "nearest_cosine": quantiles(highest)}


def quantiles(values, n=100):
    """n + 1 quantiles of `values`, from the lowest to the highest; None of none."""
    values = values.double().sort().values.cpu()
    return values[torch.linspace(0, len(values) - 1, n + 1).round().long()].tolist() if len(values) else None


def condition(W, sets):
    """Condition numbers (largest over smallest singular value) of the rows W[set], over the sets: median, 10th and 90th percentile.
    A set with dependent rows, as any of more than d rows, has none: it counts as infinite, and an infinite percentile is null."""
    found = []
    for latents in sets:
        s = torch.linalg.svdvals(W[latents].double())
        found.append((s[0] / s[-1]).item() if len(latents) <= W.shape[1] and s[-1] > 1e-6 * s[0] else math.inf)
    at = lambda q: plain(sorted(found)[round(q * (len(found) - 1))]) if found else None
    return {"median": at(0.5), "low": at(0.1), "high": at(0.9), "sets": len(found), "infinite": found.count(math.inf)}


def marchenko_pastur(sets, d):
    """(1 + sqrt(m / d)) / (1 - sqrt(m / d)): what m random directions tend to, for the median size m of the sets; null from m = d on."""
    root = math.sqrt(sorted(map(len, sets))[len(sets) // 2] / d) if sets else 1
    return (1 + root) / (1 - root) if root < 1 else None


def projections(W, g):
    """How well k random orthonormal axes (d, if less, which is exact) keep what unit rows W [n, d] say of each other (Johnson and
    Lindenstrauss 1984), for each k of JL_DIMENSIONS, on GEOMETRY_LATENTS rows: standard deviation and largest size of the cosines' error,
    which of the n closest pairs are still among the n closest (share), and the share of the rows' squared length that the axes hold. above: of
    the pairs with a cosine above each of JL_ABOVE the share that has one in the projection too (recall; null of none), and the reverse
    (precision)."""
    W = W[torch.randperm(len(W), generator=g)[:GEOMETRY_LATENTS].to(W.device)]
    axes = torch.linalg.qr(torch.randn(W.shape[1], W.shape[1], generator=g))[0].to(W)
    above = torch.ones(len(W), len(W), dtype=torch.bool, device=W.device).triu(1)                # each pair once
    exact = (W @ W.T)[above]
    closest = lambda cosine: cosine.topk(min(len(W), len(exact))).indices
    true, found = closest(exact), defaultdict(list)
    share = lambda of, among: (of & among).sum().item() / among.sum().item() if among.any() else None
    over = {str(tau): {"recall": [], "precision": []} for tau in JL_ABOVE}
    for k in JL_DIMENSIONS:
        low = W @ axes[:, :k]
        rough = (unit(low) @ unit(low).T)[above]
        found["error_sd"].append((rough - exact).square().mean().sqrt().item())
        found["error_max"].append((rough - exact).abs().max().item())
        found["recall"].append(torch.isin(true, closest(rough)).double().mean().item())
        found["reconstruction"].append((low.square().sum() / W.square().sum()).item())
        for tau, kept in over.items():
            kept["recall"].append(share(rough > float(tau), exact > float(tau)))
            kept["precision"].append(share(exact > float(tau), rough > float(tau)))
    return {**found, "above": over}


class Code:
    """What an SAE makes of rows x [n, d_in]: sparsity, and the activations of GEOMETRY_LATENTS latents that fire, drawn by generator g."""

    def __init__(self, sae, x, g):
        parts, rows = x.split(max(1, CODES // sae.d_sae)), []
        self.d_in, self.fires, self.active = sae.d_in, 0, []
        for part in parts:
            out = sae(part * sae.scale)
            on, root = out.acts > 0, sae.d_sae ** 0.5
            self.fires = self.fires + on.sum(0)
            self.active += [latents.nonzero().flatten() for latents in on[:GROUPS - len(self.active)]]
            hoyer = (root - out.acts.sum(-1) / out.acts.norm(dim=-1).clamp_min(1e-12)) / max(root - 1, 1e-12)
            x_hat = out.x_hat / sae.scale
            rows.append(torch.stack([on.sum(-1), hoyer, part.norm(dim=-1), (part - x_hat).square().sum(-1), x_hat.norm(dim=-1),
                                     (part * x_hat).sum(-1)], -1).double())
        self.l0, self.hoyer, self.norm, self.error, self.norm_hat, self.dot = torch.cat(rows).unbind(-1)      # of each row
        self.variance = (x - x.mean(0)).double().square().sum(-1)
        firing = self.fires.nonzero().flatten()
        self.latents = firing[torch.randperm(len(firing), generator=g)[:GEOMETRY_LATENTS].to(firing.device)].sort().values
        chosen = [(out.acts[:, self.latents], out.pre[:, self.latents]) for out in (sae(part * sae.scale) for part in parts)]
        self.acts, self.pre = (torch.cat(columns).float() for columns in zip(*chosen))       # [n, latents]

    def metrics(self):
        """hoyer: (sqrt(d) - L1 / L2) / (sqrt(d) - 1) of a row's activations, 1 for a single latent (Hoyer 2004), mean over rows that fire;
        gini of the latents' firing rates, 0 if all fire alike; correlation: mean absolute correlation of two latents' activations; and by
        tenths of the rows' norm L0, explained variance, and what is lost in length: l2_ratio (x_hat's to x's) and slope (of x on x_hat)."""
        rate = (self.fires.double() / len(self.l0)).sort().values
        n, rank = len(rate), torch.arange(1, len(rate) + 1, device=rate.device)
        gini = (2 * (rank * rate).sum() / (n * rate.sum()) - (n + 1) / n).item() if rate.sum() else None
        tenths = self.norm.argsort().tensor_split(10)
        fires = self.l0 > 0
        return {"hoyer": self.hoyer[fires].mean().item() if fires.any() else None, "gini": gini, "correlation": mean_correlation(self.acts),
                "l0_of_rows": quantiles(self.l0), "tenths": {
                    "norm": [self.norm[t].mean().item() for t in tenths], "l0": [self.l0[t].mean().item() for t in tenths],
                    "explained_variance": [1 - (self.error[t].sum() / self.variance[t].sum()).item() for t in tenths],
                    "l2_ratio": [plain((self.norm_hat[t].sum() / self.norm[t].sum()).item()) for t in tenths],
                    "slope": [plain((self.dot[t].sum() / self.norm_hat[t].square().sum()).item()) for t in tenths]}}

    def sets(self, g):
        """Sets of latents. `group`: a latent and those whose firing correlates most with its own; `across`: as many at random (GROUP, or
        d_in / 4 if that is less); `active`: those that fire on a row. GROUPS of each."""
        n, m = len(self.latents), min(GROUP, self.d_in // 4, len(self.latents))
        if m < 2:
            return {"group": [], "across": [], "active": []}
        fires, seeds = standard((self.acts > 0).float()), torch.randperm(n, generator=g)[:GROUPS]
        phi = fires[:, seeds].T @ fires
        phi[torch.arange(len(seeds)), seeds] = math.inf
        return {"group": [self.latents[near] for near in phi.topk(m).indices],
                "across": [self.latents[torch.randperm(n, generator=g)[:m]] for _ in seeds], "active": [a for a in self.active if len(a) > 1]}


def standard(columns):
    """Columns [n, m] with mean 0 and length 1, so that their products are correlations; a constant column becomes 0."""
    return unit((columns - columns.mean(0)).T).T


def mean_correlation(columns):
    """Mean absolute correlation of two columns of [n, m]; None of fewer than two."""
    m, columns = columns.shape[1], standard(columns)
    return ((columns.T @ columns).fill_diagonal_(0).abs().sum().item() / (m * (m - 1))) if m > 1 else None


def shifted(columns, g):
    """Each column of [n, m] rotated by a random number of rows: what the columns have in common is gone, each alone is as it was."""
    n, m = columns.shape
    by = torch.randint(n, (m,), generator=g).to(columns.device)
    return columns.gather(0, (torch.arange(n, device=columns.device)[:, None] + by) % n)


def pair_stability(code):
    """How much the TOP_PAIRS of all pairs that a batch selects are those that the next batch selects, at fixed weights: mean Jaccard index and
    rank-biased overlap over successive batches, per rule (those of topk_ortho_r1) and number of rows; `dense`: the share of the pairs that
    involve one of the 1 % most frequent latents. `null`: the Jaccard index of chance; `null_dense`: the share among all pairs."""
    n, m = code.acts.shape
    count = round(TOP_PAIRS * m * (m - 1) / 2)
    if not count:
        return None
    densest = (code.acts > 0).sum(0).topk(math.ceil(m / 100)).indices
    rare = m - len(densest)
    result = {"pairs": count, "rows": [b for b in PAIR_BATCHES if 2 * b <= n], "null": TOP_PAIRS / (2 - TOP_PAIRS),
              "null_dense": 1 - rare * (rare - 1) / (m * (m - 1))}
    score = {"coactivation": lambda acts, pre: coactivation(acts), "phi": lambda acts, pre: correlations((acts > 0).float()),
             "preact": lambda acts, pre: correlations(pre)}
    for rule, f in score.items():
        result[rule] = {"jaccard": [], "rbo": [], "dense": []}
        for b in result["rows"]:
            chosen = [top_pairs(f(code.acts[at:at + b], code.pre[at:at + b]), count) for at in range(0, min(n // b, 4) * b, b)]
            pairs = torch.cat(chosen)
            result[rule]["dense"].append((torch.isin(pairs // m, densest) | torch.isin(pairs % m, densest)).double().mean().item())
            for name, f_pair in (("jaccard", jaccard), ("rbo", rank_biased_overlap)):
                values = [f_pair(a, c) for a, c in zip(chosen, chosen[1:])]
                result[rule][name].append(sum(values) / len(values))
    return result


def coactivation(acts):
    return acts.T @ acts


def correlations(columns):
    return standard(columns).T @ standard(columns)


def top_pairs(score, count):
    """Flat indices i m + j, i < j, of the `count` highest scores [m, m], highest first."""
    return score.masked_fill(torch.ones_like(score, dtype=torch.bool).tril(), -math.inf).flatten().topk(count).indices


def jaccard(a, b):
    """Size of the intersection of two sets of unique indices over that of their union."""
    both = torch.isin(a, b).sum().item()
    return both / (len(a) + len(b) - both)


def rank_biased_overlap(a, b, p=0.98):
    """Overlap of two rankings of equal length without repeats, the top weighing most: the shares that the first 1, 2 ... have in common,
    averaged with weights p^(depth - 1) (Webber 2010); 1 for equal rankings."""
    place = {item: i for i, item in enumerate(b.tolist())}
    meet = torch.tensor([max(i, place.get(item, len(a))) for i, item in enumerate(a.tolist())])       # depth from which both have the item
    depth = torch.arange(len(a))
    weight = p ** depth.double()
    shared = torch.bincount(meet[meet < len(a)], minlength=len(a)).cumsum(0) / (depth + 1)
    return ((weight * shared).sum() / weight.sum()).item()


# ---- structure: what latents are made of, which contain which, and where they begin to fire ---------------------------------------------------


META_STEPS = 1500                # of the SAE that is trained on decoder rows ...
META_STEPS_SMALL = 500           # ... of up to SMALL latents: within 0.008 of what 1,500 steps explain on the default job's, a third of the time
FEW_ROWS = 20                    # rows on which a latent must fire for its parents to be looked for
CONTAINED = 0.8                  # P(parent | child) above chance from which on a latent contains another one
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PRECISION_CONTEXTS = 32          # held-out contexts (rows of synthetic data: 64 times as many) on which rounding is tried
TREES, TREE = 5, 12              # trees of latents that are kept as examples, and latents of each


def evaluate_structure(held_out, runs, failures):
    """Composition of the decoder, hierarchy, interference and diversity of the latents, their thresholds, L0 by position, what rounding to bfloat16 changes, and, of synthetic
    data, missed parents by depth. `null`: the same of random directions, and of firing shifted against each other. On training rows, which are
    shuffled over the whole cache: as many held-out ones are of a few contexts, whose means differ. Not of controls."""
    runs, nulls, results, few = [r for r in runs if "control" not in r.config], {}, {}, copy.copy(held_out)
    few.n = min(held_out.n, PRECISION_CONTEXTS * (1 if held_out.model else 64))
    x = held_out.sample[:GEOMETRY_ROWS].to(held_out.device)
    where = {k: v[:len(x)].to(x.device) for k, v in held_out.acts.shard(0).items() if k in ("tokens", "position") and held_out.model}
    for run in tqdm(runs, desc="structure", unit="run", disable=None):
        with blamed(run, failures), torch.no_grad():
            W, code = unit(run.sae.W_dec.float()), Code(run.sae, x, generator("structure", "latents"))
            chance = unit(torch.randn(W.shape, generator=generator("structure", "chance"))).to(W)
            if W.shape not in nulls:
                nulls[W.shape] = composition(chance)
            mixed = shifted(code.acts, generator("structure", "shift"))
            results[run] = {
                "rows": len(x), "latents": len(code.latents), "composition": {"run": composition(W), "null": nulls[W.shape]},
                "hierarchy": hierarchy(code.acts > 0, code.latents, W), "hierarchy_null": hierarchy(mixed > 0, code.latents, chance),
                "interference": interference(code.acts, W[code.latents]) | {"null": interference(mixed, chance[code.latents])},
                "diversity": diversity(code, W[code.latents], where.get("tokens")),
                **({"position": by_position(code, where["position"])} if "position" in where else {}),
                "thresholds": thresholds(code, run.sae.d_sae), "precision": precision(few, run, failures),
                **({"missed": missed(held_out, run.sae)} if held_out.truth else {})}
    return results


@torch.enable_grad()
def composition(W):
    """Explained variance of the unit rows W [n, d] by an SAE that is trained on them (MetaSAE: Leask 2025, Bussmann 2025): n / 4 latents,
    BatchTopK, 4 of them a row. High: rows are sums of few common parts. None for fewer than 16 rows."""
    n, d = W.shape
    if n < 16:
        return None
    x, steps = W * d ** 0.5, META_STEPS if n > SMALL else META_STEPS_SMALL
    sae = SAE(d, steps, 0, activation="batch_topk", d_sae=n // 4, l0=4.0, batch_size=min(n, 2048)).to(W.device)
    sae.init_from_data(x)
    opt = sae.make_optimizer()
    for sae.step in range(steps):
        out = sae(x[torch.randperm(n, generator=generator("composition", sae.step))[:sae.batch_size].to(x.device)])
        opt.zero_grad()
        sum(sae.losses(out).values()).backward()
        for group in opt.param_groups:
            group["lr"] = sae.lr * sae.lr_scale()
        sae.before_step(opt)
        opt.step()
        sae.after_step(opt, out)
    with torch.no_grad():
        x_hat = torch.cat([sae.eval()(part).x_hat for part in x.split(2048)])
        return 1 - ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


def hierarchy(fires, latents, W):
    """Which latents contain which: fires [rows, m] of `latents` [m], whose decoder rows are among W [d_sae, d].

    i contains j if i fires at least twice as often, and wherever j does: (P(i | j) - P(i)) / (1 - P(i)) > CONTAINED. The rarest latent that
    contains j is its parent. containment: of each latent that fires on FEW_ROWS rows in whatever contains it most (quantiles); contained: share
    of these with a parent; asymmetry: mean of P(parent | child) - P(child | parent); cosine: of parent and child, mean; depths: share of the
    latents that have so many ancestors; by_place: by tenths of the dictionary mean rate and share of the latents that are parents; trees: the
    largest ones, each latent with its parent, P(parent | it) and rate."""
    seen = fires.sum(0) >= FEW_ROWS
    fires, latents = fires[:, seen].float(), latents[seen]
    m, count = fires.shape[1], fires.sum(0)
    if m < 2:
        return None
    rate, given = count / len(fires), fires.T @ fires / count                  # given[i, j]: P(i | j)
    above = ((given - rate[:, None]) / (1 - rate[:, None]).clamp_min(1e-9)).masked_fill(count[:, None] < 2 * count, 0.0)
    best, holds = above.amax(0), above > CONTAINED
    parent = torch.where(holds.any(0), torch.where(holds, rate[:, None], math.inf).argmin(0), -1)
    child = (parent >= 0).nonzero().flatten()
    mean = lambda values: values.double().mean().item() if len(values) else None
    up, down = given[parent[child], child], given[child, parent[child]]
    is_parent = torch.zeros(m, dtype=torch.bool, device=fires.device).index_fill(0, parent[child], True)
    tenths = [(10 * latents // len(W) == t).nonzero().flatten() for t in range(10)]
    return {"latents": m, "contained": len(child) / m, "parents": mean(is_parent), "containment": quantiles(best), "asymmetry": mean(up - down),
            "cosine": mean(torch.linalg.vecdot(W[latents[parent[child]]], W[latents[child]])),
            "depths": (torch.bincount(depths(parent)) / m).tolist(),
            "by_place": {"rate": [mean(rate[t]) for t in tenths], "parents": [mean(is_parent[t]) for t in tenths]},
            "trees": trees(parent, latents.tolist(), rate.tolist(), given)}


def depths(parent):
    """How many ancestors each node has; parent [n]: its index, or -1."""
    depth, up = torch.zeros_like(parent), parent
    while (up >= 0).any():
        depth, up = depth + (up >= 0), torch.where(up >= 0, parent[up], -1)
    return depth


def trees(parent, latents, rate, given):
    """The TREES largest trees, roots first: of each, TREE latents at most as {latent, parent, given: P(parent | latent), rate}."""
    root = parent.clone()
    while (parent[root[root >= 0]] >= 0).any():
        root = torch.where(root >= 0, torch.where(parent[root] >= 0, parent[root], root), -1)
    found = []
    for top, _ in Counter(root[root >= 0].tolist()).most_common(TREES):
        below = sorted((root == top).nonzero().flatten().tolist(), key=lambda j: -rate[j])[:TREE - 1]
        found.append([{"latent": latents[top], "parent": None, "given": None, "rate": rate[top]},
                      *({"latent": latents[j], "parent": latents[parent[j]], "given": given[parent[j], j].item(), "rate": rate[j]} for j in below)])
    return found


def interference_load(acts, W):
    """What the others put on each latent's direction, in units of its own activation [m]: sum over j of |cos(d_i, d_j)| E[f_j] / E[f_i].
    acts [rows, m]; W [m, d]: the latents' unit decoder rows."""
    usual = acts.mean(0)
    return ((W @ W.T).abs() @ usual - usual) / usual.clamp_min(1e-12)


def interference(acts, W):
    """by_rate: interference_load(), median in ten equal parts of the latents, rarest first; captured: share of the covariance of acts [rows, m]
    in its first RANKS directions."""
    load = interference_load(acts, W)
    parts = [part for part in (acts > 0).sum(0).argsort().tensor_split(10) if len(part)]
    power = torch.linalg.eigvalsh(torch.cov(acts.double().T).reshape(len(load), len(load))).flip(0).clamp_min(0)
    return {"by_rate": [load[part].median().item() for part in parts], "ranks": RANKS,
            "captured": [(power[:r].sum() / power.sum().clamp_min(1e-30)).item() for r in RANKS]}


def diversity(code, W, tokens):
    """clusters: into how many groups the latents fall whose unit decoder rows W [m, d] are linked by cosines above 0.7, per latent (1: none is linked);
    token_entropy: in nats, of the tokens [n] of the FEW_ROWS rows on which a latent fires most, mean over latents that fire on as many (0: always the
    same token)."""
    links = (W @ W.T > 0.7).cpu().numpy()
    found = {"clusters": connected_components(links, directed=False)[0] / len(W) if len(W) else None}
    often = (code.acts > 0).sum(0) >= FEW_ROWS
    if tokens is not None and often.any():
        top = tokens[code.acts[:, often].topk(FEW_ROWS, dim=0).indices]                                # [FEW_ROWS, latents]
        same = torch.stack([(top == row).double().mean(0) for row in top])                             # how frequent each row's token is
        found["token_entropy"] = -same.log().mean().item()
    return found


def by_position(code, position):
    """L0 and explained variance of the rows at an eighth of the positions each, first ones first; at: their mean position in the context."""
    parts = position.long().argsort(stable=True).tensor_split(8)
    return {"at": [round(position[part].double().mean().item()) for part in parts], "l0": [code.l0[part].mean().item() for part in parts],
            "explained_variance": [1 - (code.error[part].sum() / code.variance[part].sum()).item() for part in parts]}


def thresholds(code, d_sae):
    """Where latents begin to fire, on the scale of their own pre-activations, and what one z for all (note 003's rule) would make of it.

    threshold: the pre-activation that a latent exceeds as often as it fires, which is its threshold where it has one; z: (threshold - mean) / std,
    by tenths of the latents, rarest first; rule: mean + z* std with d_sae Q(z*) = L0, Q the normal's tail; ratio: L0 over the sum of Q(z), 1 if
    pre-activations are normal; kurtosis: their excess kurtosis (quantiles). Threshold and rule of up to 256 latents, of scaled data."""
    n, fires = len(code.pre), (code.acts > 0).sum(0)
    some = (fires > 0) & (fires < n)
    pre, fires = code.pre[:, some].double(), fires[some]
    if not len(fires):
        return None
    falling, mean, std = pre.sort(0, descending=True).values, pre.mean(0), pre.std(0, correction=0).clamp_min(1e-12)
    at = falling.gather(0, torch.stack([fires - 1, fires])).mean(0)           # between the lowest that fires and the highest that does not
    z, tail = (at - mean) / std, lambda z: torch.special.erfc(z / 2 ** 0.5) / 2
    rule = statistics.NormalDist().inv_cdf(1 - min(0.5, max(1e-9, code.l0.mean().item() / d_sae)))
    every = slice(None, None, math.ceil(len(at) / 256))
    return {"rule": rule, "ratio": ((fires / n).sum() / tail(z).sum().clamp_min(1e-30)).item(), "z": z.mean().item(),
            "z_by_rate": [z[part].mean().item() for part in fires.argsort().tensor_split(10) if len(part)],
            "kurtosis": quantiles(((pre - mean) / std).pow(4).mean(0) - 3),
            "threshold": at[every].tolist(), "by_rule": (mean + rule * std)[every].tolist()}


def precision(few, run, failures):
    """Core metrics on few contexts in fp32, with weights rounded to bfloat16, and with activations rounded as well; and the recovered share of the
    loss if only the losses themselves are rounded, as an evaluation in bfloat16 does."""
    made = {kind: Run(run.folder, copy.deepcopy(run.sae), run.config) for kind in ("fp32", "weights", "weights_acts")}
    for kind in ("weights", "weights_acts"):
        for value in made[kind].sae.state_dict().values():
            value.copy_(value.bfloat16() if value.is_floating_point() else value)
    rough = made["weights_acts"].sae
    rough.activate = lambda pre, own=rough.activate: own(pre).bfloat16().float()
    core = evaluate_core(few, list(made.values()), failures)
    found = {kind: {k: core[one]["metrics"].get(k) for k in PRECISE if k in core[one]["metrics"]} for kind, one in made.items() if one in core}
    exact = found["fp32"]
    if "ce_sae" in exact:
        clean, zero, ours = (torch.tensor(exact[f"ce_{k}"]).bfloat16().item() for k in ("clean", "zero", "sae"))
        found["losses"] = {"ce_clean": clean, "ce_zero": zero, "ce_sae": ours, "ce_recovered": (zero - ours) / (zero - clean)}
    return found


PRECISE = ("l0", "explained_variance", "mse", "cosine", "l2_ratio", "dead", "ce_clean", "ce_zero", "ce_sae", "ce_recovered", "kl_sae", "mcc", "f1", "absorption")


def missed(held_out, sae):
    """Share of the held-out rows with parent and child on where the parent's latent is silent, mean over the pairs at each depth of the child in
    its tree (1: a root's child; null where no pair is seen on PAIR_ROWS rows), and how many pairs."""
    truth, both, silent = held_out.truth, 0, 0
    score = TruthScore(truth, sae)
    for x, features, _ in held_out.batches("missed parents"):
        pairs = (features[:, score.parent] > 0) & (features[:, score.child] > 0)
        both = both + pairs.sum(0)
        silent = silent + (pairs & (sae(x * sae.scale).acts[:, score.main][:, score.which] <= 0)).sum(0)
    parent = torch.full((len(truth.dictionary),), -1, device=held_out.device).index_copy(0, truth.child, truth.parent)
    depth, share = depths(parent)[score.child], silent / both.clamp_min(1)
    at = [(depth == k) & (both >= PAIR_ROWS) for k in range(1, int(depth.max()) + 1)] if len(depth) else []
    return {"depth": list(range(1, len(at) + 1)), "missed": [share[k].mean().item() if k.any() else None for k in at], "pairs": [int(k.sum()) for k in at]}


# ---- stability: which latents another seed finds again --------------------------------------------------------------------------------------


def evaluate_stability(held_out, runs, failures):
    """The latents of a run against those of each other seed of the same variant, settings, data and code: one-to-one by decoder direction.
    `null`: the same of two random dictionaries. Fewer than two seeds leave `others` empty."""
    results, nulls, loaded = {}, {}, {}
    x = some_rows(held_out) if any(siblings(r) for r in runs) else None
    for run in tqdm([r for r in runs if "control" not in r.config], desc="stability", unit="run", disable=None):
        with blamed(run, failures), torch.no_grad():
            n, d = run.sae.W_dec.shape
            if (n, d) not in nulls and siblings(run):
                chance = lambda name: unit(torch.randn(n, d, generator=generator("stability", name))).to(run.sae.W_dec)
                nulls[n, d] = match(chance("a"), chance("b"))[2]
            others = {}
            for folder in siblings(run):
                if folder not in loaded:
                    loaded[folder] = Run(folder, *load_run(folder))
                with on_device(held_out.device, [loaded[folder]]):
                    others[folder.name] = compare(run.sae, loaded[folder].sae, x)
            null = nulls.get((n, d))
            results[run] = {"others": others} | ({"null": {"matched": null.mean().item(), "cosines": quantiles(null)}} if others else {})
    return results


def siblings(run):
    """{folder: checksum of its SAE} of the finished runs that differ from `run` in nothing but the seed."""
    same = ("variant", "acts_checksum", "steps", "settings", "code_checksum", "status")
    found = {}
    for folder in sorted(run.folder.parent.glob(re.sub(r"-s\d+$", "", glob.escape(run.name)) + "-s*")):
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        if config.get("seed") != run.config["seed"] and all(config.get(k) == run.config.get(k) for k in same):
            found[folder] = config["sae_checksum"]
    return found


def acts_of(sae, x, latents):
    """Activations [n, k] of some latents on rows x [n, d_in]."""
    return torch.cat([sae(part * sae.scale).acts[:, latents] for part in x.split(max(1, CODES // sae.d_sae))])


def match(W, V):
    """Each of the unit rows of W [n, d] (or of GEOMETRY_LATENTS of them at random) with another one of the rows of V [m, d], m >= n, so that
    the sum of cosines is highest (Hungarian) -> indices into W, into V, and the cosines. Signed: a latent's opposite is another feature."""
    rows = torch.randperm(len(W), generator=generator("match"))[:GEOMETRY_LATENTS].sort().values.to(W.device)
    cosine = W[rows] @ V.T
    picked, columns = (torch.as_tensor(i, device=W.device) for i in linear_sum_assignment(cosine.cpu().numpy(), maximize=True))
    return rows[picked], columns, cosine[picked, columns]


def compare(sae, other, x):
    """How the latents of `sae` are found again in `other`; on rows x [n, d_in].

    matched: mean cosine of the matched decoder rows; encoder: of their encoder columns; again: share of matches above 0.7, 0.8, 0.9; best:
    mean over latents of the highest cosine with any of the other's, not one-to-one; activations: mean correlation of the activations of matched
    latents that fire in both; by_rate: mean cosine and share above 0.7 (again_by_rate) in ten equal parts, rarest first; pairs: Jaccard index of
    the TOP_PAIRS that fire together; unmatched: whether those not above 0.7 lie in the same subspace() nevertheless."""
    W, V = unit(sae.W_dec.float()), unit(other.W_dec.float())
    mine, theirs, cosine = match(W, V)
    encoder = (unit(sae.W_enc.T[mine].float()) * unit(other.W_enc.T[theirs].float())).sum(-1)
    a, b = acts_of(sae, x, mine), acts_of(other, x, theirs)
    fire = (a > 0).any(0) & (b > 0).any(0)
    together = (standard(a[:, fire]) * standard(b[:, fire])).sum(0)
    rarest = (a > 0).sum(0).argsort().tensor_split(10)
    count = round(TOP_PAIRS * len(mine) * (len(mine) - 1) / 2)
    return {"matched": cosine.mean().item(), "encoder": encoder.mean().item(), "cosines": quantiles(cosine), "latents": len(mine),
            "again": {k: (cosine > float(k)).double().mean().item() for k in ("0.7", "0.8", "0.9")},
            "best": torch.cat([(part @ V.T).amax(-1) for part in W.split(1024)]).mean().item(),
            "activations": together.mean().item() if len(together) else None,
            "by_rate": [cosine[part].mean().item() for part in rarest if len(part)],
            "again_by_rate": [(cosine[part] > 0.7).double().mean().item() for part in rarest if len(part)],
            "unmatched": subspace(W[mine[cosine <= 0.7]], V[theirs[cosine <= 0.7]]),
            "pairs": jaccard(top_pairs(coactivation(a), count), top_pairs(coactivation(b), count)) if count else None}


def subspace(U, V):
    """Mean squared cosine of the principal angles between the subspaces of U's and of V's rows [k, d]: of their GROUP leading right singular
    vectors (k, or d / 4, if that is less). `null`: what random subspaces of the same size have on average. None of fewer than two rows."""
    size = min(GROUP, U.shape[1] // 4, len(U))
    if size < 2:
        return None
    a, b = (torch.linalg.eigh((M.T @ M).double()).eigenvectors[:, -size:] for M in (U, V))
    return {"rows": len(U), "size": size, "cosine": ((a.T @ b).square().sum() / size).item(), "null": size / U.shape[1]}


# ---- training: how a run came about ---------------------------------------------------------------------------------------------------------


TRAINING_CONTEXTS = 64           # held-out contexts (rows of synthetic data: 64 times as many) on which snapshots are evaluated
STAGE_METRICS = ("explained_variance", "mse", "l0", "l1", "l2_ratio", "dead", "ce_recovered", "kl_recovered", "kl_sae", "mcc", "absorption")


def evaluate_training(held_out, runs, failures):
    """Core metrics and geometry of each snapshot that training kept, and of its end, on few contexts, the same for all. Beside them, `same`: mean
    cosine of the decoder rows with the final ones; `pairs`: Jaccard index of the TOP_PAIRS that fire together with those at the end
    (pair_half_life: how many tokens before the end it was one half); `revived`: how many latents were ever revived; revived_cosine: of their
    decoder rows with the nearest other one, mean; the survival() of latents; and what share of those that fire at a stage are dead or revived
    at the next one, in ten equal parts by interference_load(), least first (deaths). No snapshots leave `stages` empty."""
    runs, results, few = [r for r in runs if "control" not in r.config], {}, copy.copy(held_out)
    few.n = min(held_out.n, TRAINING_CONTEXTS * (1 if held_out.model else 64))
    x = some_rows(held_out) if any((r.folder / "snapshots").exists() for r in runs) else None
    for run in runs:
        with blamed(run, failures), torch.no_grad():
            stages = [snapshot(run, path) for path in sorted((run.folder / "snapshots").glob("*.safetensors"))]
            stages += [run] if stages else []
            core = evaluate_core(few, stages, failures) if stages else {}
            if run.folder in failures:
                continue
            end = run.sae
            latents = torch.randperm(end.d_sae, generator=generator("training"))[:GEOMETRY_LATENTS].to(end.W_dec.device)
            count = round(TOP_PAIRS * len(latents) * (len(latents) - 1) / 2)
            final = top_pairs(coactivation(acts_of(end, x, latents)), count) if stages and count else None
            results[run], fate = {"contexts_used": few.n, "stages": []}, []
            for stage, after in zip(stages, [*stages[1:], None]):
                sae, geometry, acts = stage.sae, directions(unit(stage.sae.W_dec.float())), acts_of(stage.sae, x, latents)
                revived, fires = revived_at(sae) > 0, (acts > 0).any(0)
                if after:
                    lost = after.sae.dead() | (revived_at(after.sae) != revived_at(sae))
                    load = interference_load(acts, unit(sae.W_dec[latents].float()))
                    fate.append(torch.stack([load[fires], lost[latents][fires].float()]))
                results[run]["stages"].append({
                    "step": sae.step, "tokens": sae.step * sae.batch_size, "revived": int(revived.sum()),
                    "revived_cosine": max_cosine(sae.W_dec)[revived].mean().item() if revived.any() else None,
                    "same": torch.linalg.vecdot(unit(sae.W_dec), unit(end.W_dec)).mean().item(),
                    "pairs": jaccard(top_pairs(coactivation(acts), count), final) if count else None,
                    **{k: geometry[k] for k in ("effective_rank", "mean_max_cosine", "unique")},
                    **{k: core[stage]["metrics"][k] for k in STAGE_METRICS if k in core[stage]["metrics"]}})
            if stages:
                made = results[run]["stages"]
                results[run] |= {"deaths": deaths(*torch.cat(fate, 1)), "survival": survival([stage.sae for stage in stages]),
                                 "pair_half_life": half_life([s["tokens"] for s in made], [s["pairs"] for s in made]) if count else None}
    return results


def deaths(load, lost):
    """Mean of `lost` [n] (1 or 0) in ten equal parts by `load` [n], least first; empty for fewer than 10."""
    return [lost[part].mean().item() for part in load.argsort().tensor_split(10)] if len(load) >= 10 else []


def half_life(tokens, share):
    """How long before the end the share, which is 1 there, was one half, linear between the stages; None if it was never less."""
    below = [i for i, s in enumerate(share) if s < 0.5]
    if not below:
        return None
    i = below[-1]
    return tokens[-1] - (tokens[i] + (0.5 - share[i]) / (share[i + 1] - share[i]) * (tokens[i + 1] - tokens[i]))


def revived_at(sae):
    """After which step each latent was last revived [d_sae], 0 where never."""
    return getattr(sae, "revived_at", torch.zeros_like(sae.silent))


def survival(saes, points=40):
    """How long latents fire, by Kaplan and Meier's estimate (1958): the share that still does `tokens` after the run began, of all latents
    (`start`), and after they were revived (`revived`, null without any). saes: a run's SAE at its stages, the end last.

    The last stage that sees a life tells how it ends: where the latent fired last, if it is dead() there; else at its next revival; else, at
    the end of the run, not yet. A life between two stages, begun and ended by a revival, is not seen."""
    lives = {"start": [], "revived": []}                                       # (steps, whether that is the end) of each life
    for sae, after in zip(saes, [*saes[1:], None]):
        born = revived_at(sae)
        over = revived_at(after) != born if after else torch.ones_like(born, dtype=torch.bool)
        dead, until = sae.dead(), revived_at(after) if after else torch.full_like(born, sae.step)
        length = (torch.where(dead, sae.step - sae.silent, until) - born).clamp_min(0)
        ended = dead | (after is not None)
        for name, which in (("start", over & (born == 0)), ("revived", over & (born > 0))):
            lives[name].append(torch.stack([length[which], ended[which].float()]))
    end, grid = saes[-1], [i / points for i in range(points + 1)]
    found = {name: torch.cat(parts, 1) for name, parts in lives.items()}
    return {"tokens": [f * end.step * end.batch_size for f in grid],
            **{name: kaplan_meier(*them, [f * end.step for f in grid]) if them.numel() else None for name, them in found.items()}}


def kaplan_meier(length, ended, at):
    """The share of lives longer than each of `at`: the product, over the lengths [n] at which lives ended [n] (1; 0: seen no longer), of the
    share of those seen as long that went on. None beyond the longest."""
    times, count = length[ended > 0].unique(return_counts=True)
    seen = len(length) - torch.searchsorted(length.sort().values, times)
    share = 1 - count.double() / seen
    return [share[times <= t].prod().item() if t <= length.max() else None for t in at]


def snapshot(run, path):
    """The run as it was when training kept this file."""
    tensors, meta = read_tensors(path)
    if meta["identity"] != run.config["identity"]:
        raise Refuse(f"{path} is of another run of this name: delete {path.parent}")
    sae = copy.deepcopy(run.sae)
    sae.load_state_dict(tensors)
    sae.step = meta["step"]
    return Run(run.folder, sae, run.config)


EVALS = {"core": evaluate_core, "features": evaluate_features, "geometry": evaluate_geometry, "structure": evaluate_structure,
         "stability": evaluate_stability, "training": evaluate_training}                          # name -> f(held_out, runs, failures) -> {run: part of its JSON file}


# ---- SAEBench: its own evaluations, called as a library --------------------------------------------------------------------------------


class Unfit(Exception):
    """Why an evaluation makes no sense for the model or the data at hand; it is left out, and said so."""


class BenchEval(NamedTuple):
    """One evaluation of SAEBench."""
    output: str              # module:class of its result
    settings: Callable       # f(acts) -> everything that its numbers depend on beside model and SAE, as JSON; Unfit where it makes no sense
    evaluate: Callable       # f(bench, runs, settings, failures) -> yields (run, SAEBench's result as a dict, {"metrics": ..., "guards": ...})
    columns: tuple = ()      # (title, key in "metrics") of what the table at the end shows
    details: str = "eval_result_details"     # where its result holds what the metrics are the means of


class Bench:
    """What SAEBench's evaluations of the runs of one cache share: the language model, and folders for what depends on no SAE. d_sae: of the
    widest SAE."""

    def __init__(self, acts, device, d_sae=0):
        self.acts, self.device, self.layer, self.hook_name = acts, device, acts.meta["layer"], acts.meta["hook_name"]
        self.model, self.weights = hooked_transformer(acts, device)
        self.name = self.model.cfg.model_name
        self.dtype, self.started = "float32", time.time()
        self.d_sae, self.share = d_sae, 1.0                                   # share of what is usually worked on at once; halved when memory is short
        self.room, self.texts, self.unfit = KEPT, Texts(self), set()          # bytes left for what is kept in memory; evaluations that make no sense

    @functools.cached_property
    def labelled(self):
        """Where the labelled data of the cache's own corpus are."""
        return corpus_tasks(self.acts)[0]

    def key(self, name, settings):
        """What the work kept for evaluation `name` depends on."""
        return {"eval": name, "version": VERSION, "settings": settings, "model": self.weights, "layer": self.layer, "hook": self.hook_name,
                "acts": self.acts.meta["val"]["checksum"], "dtype": self.dtype, "device": self.device.type,
                "versions": {k: importlib.metadata.version(k) for k in ("torch", "transformers", "transformer_lens", "sae_lens", "sae_bench")}}

    def folder(self, name, settings):
        """The folder for work that all runs share; one of its own for every key, so that nothing in it can be stale."""
        key = self.key(name, settings)
        folder = self.acts.folder / "eval_cache" / f"{name}-{checksum(json.dumps(key, sort_keys=True).encode())[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "key.json", key)
        return folder.resolve()

    def at_once(self, ctx, on_cpu=2**21):
        """Contexts of ctx tokens whose logits and codes are worked on at a time; on a CPU small blocks stay in its cache."""
        rows = min(LOGITS / self.model.cfg.d_vocab, CODES / max(1, self.d_sae)) if self.device.type == "cuda" else on_cpu / self.model.cfg.d_vocab
        return max(1, int(self.share * rows / ctx))

    def at_hook(self, tokens):
        """The activations at the hook [n, ctx, d_model] of tokens [n, ctx]."""
        return self.through(tokens.to(self.device), stop_at_layer=self.layer + 1, prepend_bos=False)

    def behind(self, x):
        """The stream behind the last layer [n, ctx, d_model] with x [n, ctx, d_in] at the hook."""
        return self.through(x, start_at_layer=self.layer + 1, stop_at_layer=self.model.cfg.n_layers)

    def through(self, x, **layers):
        """Nothing looks inside these layers, so that PyTorch's attention stands for TransformerLens' where it computes the same, in two thirds of
        the time."""
        cfg, model = self.model.cfg, self.model
        same = (cfg.positional_embedding_type in ("standard", "rotary") and cfg.attention_dir == "causal" and cfg.attn_scores_soft_cap <= 0
                and not cfg.n_key_value_heads)
        with contextlib.ExitStack() as stack:
            for block in model.blocks if same else ():
                stack.enter_context(replaced(block.attn, "forward", functools.partial(attend, block.attn)))
            return model(x, **layers)

    def logits(self, stream):
        """The next token's logits [rows, d_vocab] for rows of the stream behind the last layer [rows, d_model], and what they are linear in: what
        the final norm makes of these rows, or, where they are capped, the logits themselves."""
        normed, cap = self.model.ln_final(stream[None])[0], self.model.cfg.output_logits_soft_cap
        logits = self.model.unembed(normed[None])[0]
        return (logits, normed) if cap <= 0 else (logits.div_(cap).tanh_().mul_(cap),) * 2

    def blocks(self, *rows):
        """The same rows [n, ...] of each, so few at a time that a CPU's cache holds their logits."""
        return zip(*(x.split(self.at_once(1, 2**19)) for x in rows))

    def label(self, run):
        """The name of a run in SAEBench's files; it carries the weights' checksum."""
        return f"{run.name}-{run.config['sae_checksum'][:8]}"

    @contextlib.contextmanager
    def seams(self, seed, data=None, log=None):
        """For the duration of a call into SAEBench: our model stands for its name, `data` says where a data set is (name -> folder with
        SPLIT.jsonl or CONFIG/SPLIT.jsonl, or the revision on the hub), every generator starts from `seed`, and what it prints goes to the file `log`.
        Afterwards the modules, the generators and the grad mode are as before."""
        import jaxtyping
        import threadpoolctl
        import transformer_lens

        def from_pretrained(name, *args, **kwargs):
            if name != self.name or kwargs.get("dtype", torch.float32) not in (torch.float32, self.dtype):
                raise Refuse(f"SAEBench asked for the model {name} in {kwargs.get('dtype')}, there is {self.name} in {self.dtype}")
            return self.model

        def load_dataset(name, config=None, split=None, streaming=False, **_):
            if name not in (data or {}):
                raise Refuse(f"SAEBench asked for the data set {name}, which is not there: only {', '.join(data or {}) or 'none'}")
            if isinstance(data[name], str):
                import datasets
                return datasets.load_dataset(name, config, split=split, streaming=streaming, revision=data[name])
            return local_dataset(Path(data[name]) / (config or ""), split)

        before = random.getstate(), numpy.random.get_state(), torch.is_grad_enabled()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(None if self.device.type == "cuda" else []))
            stack.enter_context(warnings.catch_warnings(action="ignore", category=FutureWarning))     # sklearn's, of how SAEBench calls it
            stack.enter_context(replaced(gc, "collect", lambda *_: 0))            # a walk through all that was ever imported, for each SAE
            stack.enter_context(replaced(jaxtyping.config, "jaxtyping_disable", True))      # checks of every shape, at every call
            stack.enter_context(threadpoolctl.threadpool_limits(1, "blas"))       # small fits: numpy's threads wait more than they work
            stack.enter_context(replaced(transformer_lens.HookedTransformer, "from_pretrained_no_processing", staticmethod(from_pretrained)))
            for module in LOADERS:
                stack.enter_context(replaced(importlib.import_module(module), "load_dataset", load_dataset))
            if log:
                out = stack.enter_context(open(log, "a"))
                stack.enter_context(contextlib.redirect_stdout(out))
                if not sys.stderr.isatty():                                       # its progress bars
                    stack.enter_context(contextlib.redirect_stderr(out))
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(seed)
            try:
                yield
            finally:
                random.setstate(before[0])
                numpy.random.set_state(before[1])
                torch.set_grad_enabled(before[2])


def attend(attn, query_input, key_input, value_input, attention_mask=None, **_):
    """The output [n, ctx, d_model] of an attention of TransformerLens."""
    if attention_mask is not None:                                            # of a tokenizer that pads on the left
        return type(attn).forward(attn, query_input, key_input, value_input, attention_mask=attention_mask)
    q, k, v = attn.calculate_qkv_matrices(query_input, key_input, value_input)                # [n, ctx, heads, d_head]
    if attn.cfg.positional_embedding_type == "rotary":
        q, k = attn.apply_rotary(q), attn.apply_rotary(k)
    mask = attn.mask[-q.shape[1]:, -q.shape[1]:]
    z = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), attn_mask=mask, scale=1 / attn.attn_scale)
    return torch.nn.functional.linear(z.transpose(1, 2).flatten(2), attn.W_O.flatten(0, 1).T, attn.b_O)


LOADERS = ["sae_bench.sae_bench_utils.dataset_utils", "sae_bench.evals.scr_and_tpp.dataset_creation",
           "sae_bench.evals.unlearning.utils.feature_activation", "sae_bench.evals.unlearning.utils.metrics"]    # they import load_dataset


@contextlib.contextmanager
def replaced(target, name, value):
    """target.name is `value` inside, and as before afterwards."""
    there, before = name in vars(target), vars(target).get(name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before) if there else delattr(target, name)


def local_dataset(folder, split=None):
    """The records of folder/SPLIT.jsonl as a data set, or all splits of the folder by name."""
    import datasets
    files = {p.stem: p for p in sorted(folder.glob("*.jsonl")) if split in (None, p.stem)}
    if not files:
        raise Refuse(f"{folder}/{split or '*'}.jsonl is missing")
    found = {k: datasets.Dataset.from_list([json.loads(line) for line in p.read_text().splitlines()]) for k, p in files.items()}
    return found[split] if split else found


def hooked_transformer(acts, device):
    """(the cache's language model as TransformerLens' HookedTransformer in fp32, nothing folded; a checksum of its weights).

    Checked against the Hugging Face model on held-out contexts: the activations at the hook and the log-probabilities."""
    import transformer_lens
    from transformer_lens import loading_from_pretrained as loading
    meta, tokens = acts.meta, acts.val()["tokens"][:2].long()
    original = LanguageModel(meta, torch.device("cpu"))         # beside the other one it would take a GPU's memory twice
    config = original.model.config
    config.architectures = [type(original.model).__name__]
    if config.model_type == "gpt2":
        config.n_ctx = config.n_positions                       # its name in the configurations that TransformerLens was written for
    hashed = xxhash.xxh3_128()
    for weight in original.model.state_dict().values():
        hashed.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    weights = hashed.hexdigest()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            config.save_pretrained("model")                     # TransformerLens goes by the words in a path: one that says nothing
            cfg = hooked_config(loading, config, device)
            state = loading.get_pretrained_state_dict("model", cfg, original.model)
    except (ValueError, KeyError, NotImplementedError, AttributeError) as e:
        raise Unfit(f"TransformerLens has no {config.architectures}, which SAEBench needs ({type(e).__name__}: {e})") from e
    cfg.model_name = f"{meta['model']['name'].replace('/', '_')}-{weights[:8]}"
    model = transformer_lens.HookedTransformer(cfg, original.tokenizer())
    model.load_and_process_state_dict(state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    model.to(device, print_details=False).eval().requires_grad_(False)
    with torch.no_grad():
        kept = {}
        handle = original.point.register_forward_hook(lambda module, args, out: kept.update(x=first(out)))
        log_p = original.model(tokens, use_cache=False).logits.float().log_softmax(-1)
        handle.remove()
        logits, cache = model.run_with_cache(tokens.to(device), prepend_bos=False, names_filter=[meta["hook_name"]])
        off = {"activations": (cache[meta["hook_name"]].cpu() - kept["x"]).abs().max() / kept["x"].abs().max(),
               "log-probabilities": (logits.log_softmax(-1).cpu() - log_p).abs().max() / log_p.abs().max()}
    wrong = {k: float(v) for k, v in off.items() if not v < 1e-3}
    if wrong:
        raise Refuse(f"TransformerLens' {meta['model']['name']} is not the Hugging Face model: {wrong} of the largest value apart")
    return model, weights


def hooked_config(loading, config, device):
    """TransformerLens' configuration of a Hugging Face model. It knows the sizes of Gemma-2 by name alone, so they are filled in."""
    if config.architectures[0] != "Gemma2ForCausalLM":
        return loading.get_pretrained_model_config("model", hf_cfg=config.to_dict(), device=device, dtype=torch.float32)
    known = loading.get_pretrained_model_config("google/gemma-2-2b", device=device, dtype=torch.float32).to_dict()
    sizes = dict(d_model=config.hidden_size, d_head=config.head_dim, n_heads=config.num_attention_heads, d_mlp=config.intermediate_size,
                 n_layers=config.num_hidden_layers, n_ctx=min(8192, config.max_position_embeddings), eps=config.rms_norm_eps, d_vocab=config.vocab_size,
                 d_vocab_out=config.vocab_size, n_key_value_heads=config.num_key_value_heads, window_size=config.sliding_window,
                 rotary_base=config.rope_theta, rotary_dim=config.head_dim, attn_scale=config.query_pre_attn_scalar ** 0.5,
                 attn_scores_soft_cap=config.attn_logit_softcapping, output_logits_soft_cap=config.final_logit_softcapping)
    return loading.HookedTransformerConfig.from_dict({**known, **sizes})


class BenchSAE(torch.nn.Module):
    """A run as SAEBench's BaseSAE: raw activations in and out, fp32 inside whatever dtype an evaluation moves it to.

    W_enc, W_dec and the biases are those of raw activations. Where x_hat is more than decode(acts) (a variant with a forward of its own),
    `decode` is the forward pass of the rows encoded last with the given acts in place of its own."""

    def __init__(self, bench, run):
        from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig
        super().__init__()
        sae, scale = run.sae, run.sae.scale
        self.holds = [sae.requires_grad_(False)]                                # a list: .to() of this module leaves it alone
        for name, value in (("W_enc", sae.W_enc), ("W_dec", sae.W_dec), ("b_enc", sae.b_enc / scale), ("b_dec", sae.b_dec / scale)):
            self.register_buffer(name, value.detach())
        self.composed = type(sae).forward is not SAE.forward
        self.linear = not self.composed and type(sae).decode is SAE.decode
        self.device, self.dtype = sae.W_dec.device, torch.float32
        self.cfg = CustomSAEConfig(bench.name, sae.d_in, sae.d_sae, bench.layer, bench.hook_name, architecture=run.config.get("variant", "control"),
                                   dtype=bench.dtype, device=str(self.device), context_size=bench.acts.meta["ctx"])

    @torch.no_grad()
    def encode(self, x):
        """x [..., d_in] -> acts [..., d_sae]."""
        self.x, sae = x, self.holds[0]
        if self.composed:
            return sae.encode(x).to(self.dtype)
        flat = x.reshape(-1, sae.d_in).float() * sae.scale                       # without the decoder, which SAE.encode runs as well
        real = (flat != 0).any(-1)
        if real.float().mean() > 0.9:
            acts = sae.activate(sae.pre_acts(flat))
        else:                                                                   # masked positions are all zero: they are encoded once
            acts = sae.activate(sae.pre_acts(flat[:1] * 0)).repeat(len(flat), 1)
            acts[real] = sae.activate(sae.pre_acts(flat[real]))
        return (acts / sae.scale).reshape(*x.shape[:-1], sae.d_sae).to(self.dtype)

    @torch.no_grad()
    def codes(self, x):
        """encode() of rows x [n, d_in], as Codes where few latents fire, on a CPU."""
        sae = self.holds[0]
        if self.composed or x.is_cuda:
            return self.encode(x)
        pre, base = sae.pre_acts(x.float() * sae.scale), type(sae).activate is SAE.activate
        if base and sae.activation == "topk":
            fires = highest_at(pre, round(sae.wanted_l0()))
        else:
            pre = sae.activate(pre) if not base or sae.activation == "jumprelu" else pre
            fires = above(pre, sae.threshold if base and sae.activation == "batch_topk" else 0.0)
        if len(fires) > SPARSE_BELOW * pre.numel():
            return self.encode(x)
        rows, values = fires.div(sae.d_sae, rounding_mode="floor"), pre.flatten().index_select(0, fires).relu()
        return Codes(values / sae.scale, rows, fires - rows * sae.d_sae, pre.shape)

    def decode(self, acts):
        """acts [..., d_sae] -> x_hat [..., d_in], with a gradient to acts where one is asked for (RAVEL trains a mask on them)."""
        sae = self.holds[0]
        if isinstance(acts, Codes):
            return sae.decode(Codes(acts.values * sae.scale, acts.rows, acts.latents, acts.full)) / sae.scale
        flat = acts.reshape(-1, acts.shape[-1]).float() * sae.scale
        if not self.composed:
            x_hat = sae.decode(flat) / sae.scale
        elif self.x.shape[:-1] != acts.shape[:-1]:
            raise ValueError(f"acts of {list(acts.shape[:-1])} rows to decode, but rows {list(self.x.shape[:-1])} were encoded last")
        else:
            sae.activate = lambda pre: flat
            try:
                x_hat = sae(self.x.reshape(-1, sae.d_in).float() * sae.scale).x_hat / sae.scale
            finally:
                del sae.activate
        return x_hat.reshape(*acts.shape[:-1], -1).to(self.dtype)

    def forward(self, x):
        return self.decode(self.encode(x))

    def to(self, *args, **kwargs):
        super().to(*args, **kwargs)
        self.dtype = self.W_dec.dtype
        return self


def highest_at(pre, k):
    """Flat indices of the k highest entries of each row of pre [n, d_sae], on a CPU, row after row. As highest() finds them, but by sorting and
    comparing, which numpy does for many entries at once: a third to a half of its time. Where entries tie, by highest() itself."""
    n, d_sae = pre.shape
    if d_sae % 8 == 0 and 8 * k <= d_sae:
        groups = pre.unflatten(1, (8, -1)).amax(1).numpy()                       # group g: latents g, g + d_sae / 8, g + 2 d_sae / 8 ...
        at = numpy.flatnonzero(groups >= numpy.sort(groups)[:, -k, None])
        if len(at) == n * k:
            first = at.reshape(n, 1, k) + (d_sae - d_sae // 8) * numpy.arange(n)[:, None, None]
            inside = (first + d_sae // 8 * numpy.arange(8)[:, None]).reshape(n, 8 * k)
            values = pre.numpy().ravel()[inside]
            at = inside.ravel()[numpy.flatnonzero(values >= numpy.sort(values)[:, -k, None])]
            if len(at) == n * k:
                return torch.from_numpy(at)
    return (highest(pre, k) + d_sae * torch.arange(n)[:, None]).flatten()


@loads("SAEBench")
def evaluate_saebench(acts, runs, names, force, device, failures):
    """Make SAEBench's results that are not there yet, each checked and written as soon as it is made; of controls those that are cheap."""
    try:
        if acts.meta["source"] != "model":
            raise Unfit("there is no language model")
        if acts.meta["hook"] != "resid_post":
            raise Unfit(f"it reads the residual stream after a layer, these are {acts.meta['hook']}")
        if not any(Path(acts.meta["model"]["path"]).glob("tokenizer*")) and Path(acts.meta["model"]["path"]).exists():
            raise Unfit("the language model has no tokenizer")
        plans = {}
        for name in names:
            try:
                settings = {"sae_bench": importlib.metadata.version("sae-bench"), **BENCH[name].settings(acts)}
                fit = [r for r in runs if "control" not in r.config or (name not in ASKED and r.sae.W_dec.any())]     # the mean has no latents
                plans[name] = settings, [r for r in fit if force or not stored(name, r, acts, settings=settings)]
            except Unfit as e:
                print(f"{acts.folder}: {name} left out: {e}")
        if not any(todo for _, todo in plans.values()):
            return
        bench = Bench(acts, device, max(run.sae.d_sae for _, todo in plans.values() for run in todo))
    except Unfit as e:
        print(f"{acts.folder}: SAEBench left out: {e}")
        return
    here, shares, n = plans, [], min(torch.get_num_threads(), len(runs))
    if device.type == "cpu" and sys.platform == "linux" and n > 1 and torch.get_num_threads() <= 2 * n:      # two threads hardly help one small SAE
        here = {name: plans[name] for name in plans if name in ASKED}                         # a model or a server of their own
        usual = {name: plans[name] for name in plans if name not in ASKED}
        for name, (settings, todo) in usual.items():
            if todo:
                list(outcomes(bench, name, settings, [], failures))                           # what all runs share
        shares = [{name: (settings, [r for r in todo if r in runs[i::n]]) for name, (settings, todo) in usual.items()} for i in range(n)]
    with tqdm(total=sum(len(todo) for _, todo in plans.values()), desc="SAEBench", unit="result", disable=None, file=sys.stderr) as bar:
        for name in itertools.chain(in_processes(bench, shares, failures), saebench_results(bench, here, failures)):
            bar.set_description(name)
            bar.update()


def saebench_results(bench, plans, failures):
    """Makes the results of plans {evaluation: (settings, runs)}; yields the evaluation's name after each."""
    for name, (settings, todo) in plans.items():
        for run, result, more, seconds in outcomes(bench, name, settings, todo, failures) if todo else ():
            with blamed(run, failures, name):
                check_saebench(result, run, bench, BENCH[name])
                write_json(run.folder / "eval" / f"{name}.json", {**result, **envelope(name, run, bench.acts, settings=settings), **more,
                                                                  "seconds": seconds, "versions": versions()})
            yield name


def in_processes(bench, shares, failures):
    """saebench_results() of each of several plans in a process of one thread, which has all that is in memory here: SAEBench's code keeps what
    it works on in modules and generators, so that threads would meet there. What one process can't go on with ends the others."""
    fork, started, going = multiprocessing.get_context("fork"), {}, []
    try:
        for plans in shares:
            pipe, end = fork.Pipe(duplex=False)
            started[pipe] = fork.Process(target=process_share, args=(bench, plans, len(shares), end), daemon=True)
            started[pipe].start()
            going.append(pipe)
            end.close()
        while going:
            for pipe in multiprocessing.connection.wait(going):
                try:
                    said, found = pipe.recv()
                except EOFError:
                    raise Refuse("a process of this evaluation was killed: if memory is short, evaluate fewer runs in a call", 4) from None
                for which in found.keys() - failures.keys():
                    report(which, failures, found[which])
                if isinstance(said, BaseException):
                    raise said
                if said is None:
                    going.remove(pipe)
                    started[pipe].join()
                else:
                    yield said
    finally:
        for pipe in going:
            started[pipe].terminate()
            started[pipe].join()


def process_share(bench, plans, of, pipe):
    """A process of in_processes(): sends (name of what it made, failures) after each result, then (None or what stopped it, failures)."""
    end_with_parent()
    torch.set_num_threads(1)
    bench.room //= of
    failures, sys.stdout, sys.stderr = {}, open(os.devnull, "w"), open(os.devnull, "w")
    try:
        for name in saebench_results(bench, plans, failures):
            pipe.send((name, failures))
        pipe.send((None, failures))
    except BaseException as e:
        pipe.send((e, failures))


def saebench_table(runs, acts):
    """One line per run with a result of these weights: the headline figures of SAEBench's evaluations, void ones in brackets."""
    lines, seen = [], set()
    for run in runs:
        found = {}
        for name in BENCH:
            with contextlib.suppress(Refuse):
                result = read_json(run.folder / "eval" / f"{name}.json")
                if (result.get("sae_checksum"), result.get("acts")) == (run.config["sae_checksum"], acts.folder.name):
                    seen.add(name)
                    void = any(g["level"] == "fatal" for g in result["guards"])
                    found[name] = {k: f"({v:.4f})" if void else f"{v:.4f}" for k, v in result["metrics"].items() if v is not None}
        if found:
            lines.append((label(run), found))
    columns = [(name, *c) for name, spec in BENCH.items() for c in spec.columns if name in seen]
    lines = [(name, [found.get(of, {}).get(key, "-") for of, _, key in columns]) for name, found in lines]
    width = max([3, *(len(name) for name, _ in lines)])
    lines = [f"{'run':{width}}" + "".join(f"  {title:>9}" for _, title, _ in columns)] + \
            [f"{name:{width}}" + "".join(f"  {cell:>9}" for cell in cells) for name, cells in lines]
    return "SAEBench\n" + "\n".join(lines) if len(lines) > 1 else ""


def outcomes(bench, name, settings, todo, failures):
    """The results of one evaluation, each with the seconds it took; of no runs, what all share is made. What goes wrong for all runs ends this
    evaluation alone; where memory does not suffice, it goes on with half as much at once."""
    while name not in bench.unfit:
        started = time.perf_counter()
        try:
            for run, result, more in BENCH[name].evaluate(bench, todo, settings, failures):
                yield run, result, more, time.perf_counter() - started
                todo, started = [r for r in todo if r is not run], time.perf_counter()
            return
        except Unfit as e:
            print(f"{bench.acts.folder}: {name} left out: {e}")
            bench.unfit.add(name)
            return
        except Exception as e:
            if is_machines(e):
                raise
            if not is_out_of_memory(e) or bench.share < 1 / 64:
                for run in [r for r in todo if (r.folder, name) not in failures]:
                    blame(run, failures, name, e)
                return
        bench.share /= 2                                                      # outside of `except`, which keeps the tensors alive


def check_saebench(result, run, bench, spec):
    """Refuse a result that is not what SAEBench's class of it wants, not of this run, not finite or empty."""
    import pydantic
    module, cls = spec.output.split(":")
    pydantic.TypeAdapter(getattr(importlib.import_module(module), cls)).validate_python(result)
    of = {k: result["sae_cfg_dict"][k] for k in ("model_name", "hook_layer", "hook_name", "d_in", "d_sae")}
    want = {"model_name": bench.name, "hook_layer": bench.layer, "hook_name": bench.hook_name, "d_in": run.sae.d_in, "d_sae": run.sae.d_sae}
    if of != want or result["sae_lens_release_id"] != bench.label(run):
        raise Refuse(f"the result is of {result['sae_lens_release_id']} {of}, not of {bench.label(run)} {want}", 5)
    if result["datetime_epoch_millis"] < bench.started * 1000:
        raise Refuse("the result is an older one", 5)
    if not result[spec.details]:
        raise Refuse("the result has no details: nothing was evaluated", 5)
    json.dumps(result, allow_nan=False)


# ---- SAEBench's core: what the language model alone decides is computed once ------------------------------------------------------------

KEPT = 2**31                     # bytes of activations that are kept on disk and in memory; what exceeds them is computed again


def core_settings(acts):
    """All held-out contexts, for losses and for rows alike; of the embedded model the first 256. Special tokens keep their activations,
    as in SAEBench's own published runs."""
    there, ctx = acts.meta["val"]["contexts"], acts.val()["tokens"].shape[1]
    contexts = min(there, 256) if acts.meta["model"]["name"] == "tiny" else there
    batch = max(1, min(16, 2048 // ctx, contexts))                            # its 16 contexts of 128 tokens: [2048, d_sae] is in memory a few times
    return {"batch_size_prompts": batch, "batches": contexts // batch, "context_size": ctx,
            "exclude_special_tokens_from_reconstruction": True}


def bench_core(bench, runs, settings, failures):
    """SAEBench's core metrics by its own code, which is handed the kept tokens, activations and losses in place of a language model."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    shared = CoreShared(bench, settings)
    saes = {run: BenchSAE(bench, run) for run in runs}
    if saes or not shared.kept:
        shared.splice(saes, failures)
    n = settings["batches"]
    config = CoreEvalConfig(model_name=bench.name, llm_dtype=bench.dtype, batch_size_prompts=settings["batch_size_prompts"],
                            n_eval_reconstruction_batches=n, n_eval_sparsity_variance_batches=n, dataset=str(bench.acts.folder), context_size=settings["context_size"], compute_kl=True,
                            compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
                            compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
                            exclude_special_tokens_from_reconstruction=True)
    for run, sae in saes.items():
        if (run.folder, "saebench_core") not in failures:
            made = []
            with blamed(run, failures, "saebench_core"), bench.seams(42):
                made = [core_result(bench, run, sae, shared, config)]
            yield from ((run, *m) for m in made)


def core_result(bench, run, sae, shared, config):
    """(SAEBench's result, our part) of one SAE that is already spliced in."""
    import pydantic
    from sae_bench.evals.core import main as core
    shared.start(run)
    core.general_utils.load_and_format_sae(bench.label(run), sae, str(bench.device))
    with (replaced(core, "get_recons_loss", shared.losses), replaced(sae, "encode", functools.partial(shared.encode, sae)),
          replaced(sae, "decode", functools.partial(shared.decode, sae))):
        metrics, latents = core.run_evals(sae, shared, shared, config, ignore_tokens=shared.ignored)
    metrics["misc_metrics"] = core.calculate_misc_metrics(latents)
    of, made = {"sae_id": "custom_sae", "sae_set": bench.label(run), "eval_cfg": config, "metrics": metrics, "feature_metrics": latents}, []
    with replaced(core.CoreEvalOutput, "to_json_file", lambda output, _: made.append(output)):
        core.save_single_eval_result(core.replace_nans_with_negative_one(of), core.get_eval_uuid(), core.get_sae_lens_version(),
                                     core.get_sae_bench_version(), "", sae)
    result = pydantic.TypeAdapter(core.CoreEvalOutput).dump_python(made[0], mode="json")
    scalars = {k: v for part in metrics.values() for k, v in part.items()}
    scalars["explained_variance_about_mean"] = shared.explained_variance[run]
    return result, {"metrics": {k: plain(v) for k, v in scalars.items()}, "guards": core_guards(scalars)}


def core_guards(m):
    """What makes a core result void."""
    lost, ce, kl = [k for k, v in m.items() if not math.isfinite(v)], m["ce_loss_score"], m["kl_div_score"]
    found = [("G01", m["l0"] == 0, "degenerate: L0 0"),
             ("G03", m["l2_ratio"] < 0.1, f"zero output: l2 ratio {m['l2_ratio']:.3f}"),
             ("G04", lost, f"not finite: {', '.join(lost)} (SAEBench writes -1)"),
             ("G34", min(ce, kl) < 0, f"worse than zero ablation: CE score {ce:.3f}, KL score {kl:.3f}")]
    return [{"id": guard, "level": "fatal", "message": message} for guard, bad, message in found if bad]


class CoreShared:
    """What core needs of the language model: tokens, its stream at the hook and behind the last layer, losses clean and with zeros at the hook.

    Made once and kept in the shared folder. Also stands in for SAELens' ActivationsStore and for the model in SAEBench's code, to which
    it gives batch after batch of what is kept."""

    def __init__(self, bench, settings):
        self.bench, self.model = bench, bench.model
        self.store_batch_size_prompts, self.context_size = settings["batch_size_prompts"], settings["context_size"]
        self.tokens = bench.acts.val()["tokens"][:settings["batches"] * settings["batch_size_prompts"]].long()
        tokenizer = bench.model.tokenizer
        self.ignored = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
        self.special = torch.isin(self.tokens, torch.tensor([i for i in self.ignored if i is not None]))
        self.at_once = bench.at_once(self.context_size)
        self.kept_contexts = min(len(self.tokens), KEPT // (4 * self.context_size * (3 * bench.model.cfg.d_model + 1)))
        self.path = bench.folder("saebench_core", settings) / "clean.safetensors"
        self.kept = read_tensors(self.path)[0] if self.path.exists() else {}
        self.codes, self.room = {}, bench.room

    def parts(self, start=0, stop=None):
        """Slices of the contexts start .. stop: SAEBench's batches, in as many pieces as the logits' memory asks for."""
        batch = self.store_batch_size_prompts
        return [slice(i, min(i + self.at_once, at + batch)) for at in range(start, stop or len(self.tokens), batch)
                for i in range(at, at + batch, self.at_once)]

    def is_kept(self, part):
        return part.stop <= self.kept_contexts and bool(self.kept)

    @torch.no_grad()
    def clean(self, name, part):
        """"acts" at the hook or the "stream" behind the last layer [n, ctx, d_model] of a slice of contexts: what is kept, or read from the model."""
        if self.is_kept(part):
            return self.kept[name][part].to(self.bench.device)
        return self.bench.at_hook(self.tokens[part]) if name == "acts" else self.bench.behind(self.clean("acts", part))

    @torch.no_grad()
    def splice(self, saes, failures):
        """Losses and divergences with each SAE's reconstruction at the hook, and, where they are not kept yet, with the activations as they
        are and with zeros, which give the same in every context. One clean pass for all SAEs, whose codes are kept for SAEBench's own pass."""
        bench, ctx, errors, mean, square, n = self.bench, self.context_size, defaultdict(float), 0, 0.0, 0
        making, linear, d_model = not self.kept, bench.model.cfg.output_logits_soft_cap <= 0, bench.model.cfg.d_model
        targets = self.tokens.roll(-1, 1).flatten()                                    # a context's last token predicts nothing
        found = {key: torch.zeros(2, self.tokens.numel()) for key in (*saes, *(("clean", "zero") if making else ()))}     # loss and divergence
        names = ("acts", "stream", "under_p", "entropy") if linear else ("acts", "stream")
        made = {name: torch.zeros(self.kept_contexts * ctx, 1 if name == "entropy" else d_model) for name in names if making}
        zero = bench.logits(bench.behind(self.clean("acts", slice(0, 1)) * 0)[0]) if making else ()
        for part in tqdm(self.parts(), desc="saebench_core: losses", disable=None):
            x, special, streams = self.clean("acts", part), self.special[part].to(bench.device), {}
            clean = bench.behind(x) if making else self.clean("stream", part)
            rows = x[~special].double()
            mean, square, n = mean + rows.sum(0), square + rows.square().sum().item(), n + len(rows)
            for run, sae in saes.items():
                if (run.folder, "saebench_core") not in failures:
                    with blamed(run, failures, "saebench_core"):
                        acts = sae.encode(x) if sae.composed else sae.codes(x.flatten(0, 1))
                        x_hat = sae.decode(acts).view_as(x)
                        self.keep(run, part, acts, x_hat)
                        x_hat = torch.where(special[..., None], x, x_hat)
                        errors[run] += (rows - x_hat[~special].double()).square().sum().item()
                        streams[run] = bench.behind(x_hat).flatten(0, 1)
            numbers = torch.arange(part.start * ctx, part.stop * ctx)
            for number, at_hook, rows, *spliced in bench.blocks(numbers, x.flatten(0, 1), clean.flatten(0, 1), *streams.values()):
                target, given = targets[number].to(bench.device)[:, None], ((run, *bench.logits(rows)) for run, rows in zip(streams, spliced))
                if linear and self.is_kept(part):
                    under_p, entropy = (self.kept[name].flatten(0, 1)[number].to(bench.device) for name in ("under_p", "entropy"))
                else:
                    predicted = bench.logits(rows)
                    under_p, entropy = self.predictions(*predicted)
                    if making:
                        given = itertools.chain(given, [("clean", *predicted), ("zero", *(z[number % ctx] for z in zero))])
                for to, value in zip(made.values(), (at_hook, rows, under_p, entropy)):
                    to[number[0]:number[-1] + 1] = value[:max(0, len(to) - number[0])].cpu()
                for key, logits, basis in given:
                    log_q = logits.log_softmax(-1)
                    kl = entropy[:, 0] + logits[:, 0] - log_q[:, 0] - torch.linalg.vecdot(basis, under_p)     # see predictions()
                    found[key][:, number] = torch.stack([-log_q.gather(-1, target)[:, 0], kl]).cpu()
        found = {key: {"ce": ce.view(-1, ctx)[:, :-1].contiguous(), "kl": kl.view(-1, ctx)} for key, (ce, kl) in found.items()}
        if making:
            self.kept = {**{name: value.unflatten(0, (-1, ctx)) for name, value in made.items()},
                         "ce_clean": found["clean"]["ce"], "ce_zero": found["zero"]["ce"], "kl_zero": found["zero"]["kl"]}
            write_tensors(self.path, self.kept)
        total = square - (mean / n).square().sum().item() * n
        self.spliced, self.explained_variance = found, {run: 1 - errors[run] / total for run in saes}

    def predictions(self, logits, basis):
        """What KL(p || q) = sum p log p - sum p logits(q) + logsumexp(logits(q)) needs of the clean predictions p: the sum of p logits(q) is a
        product of what logits(q) are linear in with its counterpart under p (of the unembedding's columns, the mean; of its bias, a number).
        Where that has d_model entries it is kept, and no second SAE needs p. -> ([rows, d_model or d_vocab], sum p log p less the number [rows, 1])"""
        log_p, unembed = logits.log_softmax(-1), self.model.unembed
        p = log_p.exp()
        entropy = torch.linalg.vecdot(p, log_p)[:, None]
        return (p, entropy) if basis is logits else (p @ unembed.W_U.T, entropy - (p @ unembed.b_U)[:, None])

    def keep(self, run, part, acts, x_hat):
        """What encode() and decode() give back to SAEBench, as far as memory allows."""
        size = x_hat.nbytes + 20 * len(acts.values) if isinstance(acts, Codes) else self.room    # bytes of a value, its row and its latent
        if size < self.room:
            self.room -= size
            self.codes[run, part.start] = acts, x_hat

    def encode(self, sae, x):
        """The codes of the batch that SAEBench is at."""
        self.found = [self.codes.pop((self.run, part.start), None) for part in self.parts(self.part.start, self.part.stop)]
        if None in self.found:
            return type(sae).encode(sae, x)
        return torch.cat([codes.dense() for codes, _ in self.found]).view(*x.shape[:-1], -1)

    def decode(self, sae, acts):
        """The reconstruction of the batch that SAEBench has encoded."""
        return type(sae).decode(sae, acts) if None in self.found else torch.cat([x_hat for _, x_hat in self.found])

    # ---- what SAEBench's code asks of a store and of a model

    def start(self, run):
        self.run, self.at = run, 0

    def reset_input_dataset(self):
        self.at = 0

    def get_batch_tokens(self, n):
        self.part = slice(self.at, self.at + n)
        self.at += n
        return self.tokens[self.part].to(self.bench.device)

    def run_with_cache(self, tokens, names_filter, **_):
        return None, {names_filter[0]: self.clean("acts", self.part)}

    def losses(self, *_, **__):
        kept, spliced, device = self.kept, self.spliced[self.run], self.bench.device
        found = {"kl_div_with_sae": spliced["kl"], "kl_div_with_ablation": kept["kl_zero"], "ce_loss_with_sae": spliced["ce"],
                 "ce_loss_without_sae": kept["ce_clean"], "ce_loss_with_ablation": kept["ce_zero"]}
        return {k: v[self.part].to(device) for k, v in found.items()}


# ---- SAEBench's absorption: probes, prompts and activations are made once for all SAEs ---------------------------------------------------

LETTERS = 26
WORDS, READINGS = 5, 20          # own position: words per letter, and places in the held-out contexts at which each is read


def absorption_settings(acts):
    """SAEBench's defaults: every word of the vocabulary in a prompt that asks for the first letters of ten others. The embedded model does
    not spell, so that such prompts find no letter in it: its words are read where they stand in the held-out contexts."""
    own = acts.meta["model"]["name"] == "tiny"
    return {"random_seed": 42, "min_letters": 20, "min_probe_f1": 0.6, "f1_jump": 0.03, "max_k": 10,
            "probe_batch": 64 if own else 4096,               # few rows in large batches leave k-sparse probes near their random start
            "prompt_template": "{word}" if own else "{word} has the first letter:", "prompt_token_pos": -1 if own else -6, "own_position": own}


def bench_absorption(bench, runs, settings, failures):
    """First-letter absorption, both scores, equal to SAEBench's: its probes and prompts, shared by all SAEs; its k-sparse probes, as far as
    they decide the split latents; its two scores for all words at once."""
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
    path = bench.folder("absorption", settings) / "letters.safetensors"
    if not path.exists():
        with bench.seams(settings["random_seed"], log=path.parent / "log.txt"):
            write_tensors(path, (read_words if settings["own_position"] else read_prompts)(bench, settings))
    letters = {k: v if k == "rng" else v.to(bench.device) for k, v in read_tensors(path)[0].items()}
    config = AbsorptionEvalConfig(model_name=bench.name, random_seed=settings["random_seed"], f1_jump_threshold=settings["f1_jump"],
                                  max_k_value=settings["max_k"], prompt_template=settings["prompt_template"], llm_dtype=bench.dtype,
                                  prompt_token_pos=settings["prompt_token_pos"], min_GT_probe_f1=settings["min_probe_f1"],
                                  min_feats_for_eval=settings["min_letters"], k_sparse_probe_batch_size=settings["probe_batch"],
                                  precalc_k_sparse_probe_sae_acts=True)
    letters["valid"] = [a for a in letters["rows_y"].unique().tolist()
                        if letter_f1(letters["scores"][:, a], letters["test_y"] == a) > config.min_GT_probe_f1]
    if len(letters["valid"]) < 2:
        raise Unfit(f"probes find {len(letters['valid'])} first letters in the language model's activations (G14)")
    for run in runs:
        made = []
        with blamed(run, failures, "absorption"), bench.seams(settings["random_seed"], log=path.parent / "log.txt"):
            made = [absorption_result(bench, run, letters, config)]
        yield from ((run, *m) for m in made)


def read_prompts(bench, settings):
    """Probes of the first letter and the rows they are trained and tested on, then the rows of the words that absorption is looked for in
    (of each letter the test words that its probe finds), by SAEBench's code and in its order of random numbers."""
    from sae_bench.evals.absorption import common, feature_absorption_calculator
    model, hook, template, pos = bench.model, bench.hook_name, settings["prompt_template"], settings["prompt_token_pos"]
    if len({word.strip()[0].lower() for word in alpha_tokens(model.tokenizer)}) < 2:
        raise Unfit("the tokenizer's vocabulary has no words of two first letters")
    stopping = functools.partial(model.run_with_cache, stop_at_layer=bench.layer + 1)       # no later layer is read
    faster, ordered = replaced(model, "run_with_cache", stopping), replaced(common, "get_alpha_tokens", alpha_tokens)
    with tempfile.TemporaryDirectory() as folder, faster, ordered:
        where = {"layer": bench.layer, "probes_dir": folder, "dtype": torch.float32}
        probe = common.load_or_train_probe(model, template, pos, device=str(bench.device), **where)
        splits = {split: common.load_probe_data_split(model, split=split, device="cpu", **where) for split in ("train", "test")}
        rng = torch.get_rng_state()                                             # from which SAEBench trains its first SAE's k-sparse probes
        labels = {k: torch.tensor([y for _, y in words]) for k, (_, words) in splits.items()}
        found = letter_tensors(probe, {k: x for k, (x, _) in splits.items()}, labels)
        calculator = feature_absorption_calculator.FeatureAbsorptionCalculator(
            model, alpha_tokens(model.tokenizer), max_icl_examples=10, base_template=template, word_token_pos=pos)
        rows = [torch.zeros(0, model.cfg.d_model)]
        for letter in range(LETTERS):
            words = [splits["test"][1][i][0] for i in (found["hit"] & (found["test_y"] == letter)).nonzero().flatten().tolist()]
            prompts = calculator._build_prompts(words)
            calculator._validate_prompts_are_same_length(prompts)
            rows += [stopping([p.base for p in part], names_filter=[hook])[1][hook][:, pos].cpu()
                     for part in batched(prompts, max(1, int(64 * bench.share)))]
    return {**found, "rows": torch.cat(rows), "rows_y": found["test_y"][found["hit"]].sort(stable=True).values, "rng": rng}


def alpha_tokens(tokenizer):
    """SAEBench's words in a fixed order: a tokenizer's vocabulary comes in another one every time, and no seed helps."""
    from sae_bench.evals.absorption import vocab
    return sorted(vocab.get_alpha_tokens(tokenizer))


@torch.no_grad()
def read_words(bench, settings):
    """As read_prompts, but the rows are those of words as they stand in the held-out contexts: of each letter the WORDS tokens that occur
    most often, each in READINGS places, half for training the probe, a quarter for testing, a quarter for absorption."""
    from sae_bench.evals.absorption import probing
    val, tokenizer = bench.acts.val(), bench.model.tokenizer
    tokens, mask = val["tokens"].long(), val["mask"]
    counts = torch.bincount(tokens[mask], minlength=len(tokenizer))
    words = defaultdict(list)
    for token in counts.argsort(descending=True, stable=True).tolist():
        text = tokenizer.decode([token]).strip(" ")
        if counts[token] >= READINGS and text.isascii() and text.isalpha() and len(words[ord(text[0].lower()) - 97]) < WORDS:
            words[ord(text[0].lower()) - 97].append(token)
    order, at, y = generator(settings["random_seed"], "words"), [], []
    for letter in sorted(words):
        for token in words[letter]:
            places = ((tokens == token) & mask).nonzero()
            at.append(places[torch.randperm(len(places), generator=order)[:READINGS]])
            y.append(letter)
    at, y = torch.stack(at), torch.tensor(y)                                    # [words, READINGS, 2], [words]
    x = torch.zeros(*at.shape[:2], bench.model.cfg.d_model)
    for part in batched(range(len(tokens)), 64):
        read = bench.at_hook(tokens[part[0]:part[-1] + 1]).cpu()
        here = (at[..., 0] >= part[0]) & (at[..., 0] <= part[-1])
        x[here] = read[at[here][:, 0] - part[0], at[here][:, 1]]
    half, quarter = READINGS // 2, READINGS // 4
    parts = {"train": x[:, :half], "test": x[:, half:half + quarter], "again": x[:, half + quarter:half + 2 * quarter]}
    labels = {k: y[:, None].expand(v.shape[:2]).flatten() for k, v in parts.items()}
    parts = {k: v.flatten(0, 1) for k, v in parts.items()}
    with torch.enable_grad():
        probe = probing.train_multi_probe(parts["train"].to(bench.device), torch.nn.functional.one_hot(labels["train"], LETTERS), batch_size=64,
                                          num_epochs=50, lr=1e-2, weight_decay=1e-4, device=bench.device)
    found = letter_tensors(probe, parts, labels)
    return {**found, "rows": parts["again"][found["hit"]], "rows_y": found["test_y"][found["hit"]], "rng": torch.get_rng_state()}


@torch.no_grad()
def letter_tensors(probe, rows, labels):
    """The probe, its rows and labels, and `hit`: which test rows the probe of their own letter finds."""
    scores = probe.cpu()(rows["test"])
    return {"weight": probe.weights.detach(), "train": rows["train"], "test": rows["test"], "train_y": labels["train"], "test_y": labels["test"],
            "scores": scores, "hit": scores.gather(1, labels["test"][:, None]).squeeze(1) > 0}


def batched(items, n):
    return [items[i:i + n] for i in range(0, len(items), n)]


def absorption_result(bench, run, letters, config):
    """(SAEBench's result, our part) of one SAE."""
    from sae_bench.evals.absorption import eval_output as schema
    from sae_bench.sae_bench_utils import get_eval_uuid, get_sae_bench_version, get_sae_lens_version
    sae = BenchSAE(bench, run)
    valid = letters["valid"]
    ids, main_f1 = split_latents(sae, letters, config)
    details, found = [], defaultdict(list)
    for a in valid:
        fraction, full = absorption_scores(sae, letters["rows"][letters["rows_y"] == a], letters["weight"][a], ids[a])
        n, hits = len(full), int(full.sum())
        details.append(schema.AbsorptionResultDetail(first_letter=chr(97 + a), mean_absorption_fraction=fraction.double().mean().item(),
                                                     full_absorption_rate=hits / n, num_full_absorption=hits, num_probe_true_positives=n, num_split_features=len(ids[a])))
        found["interval"].append(wilson(hits, n))
        found["fraction"].append(details[-1].mean_absorption_fraction)
        found["full"].append(details[-1].full_absorption_rate)
        found["split"].append(details[-1].num_split_features)
    summary = {f"{kind}_{name}": f(found[key]) for kind, f in (("mean", statistics.mean), ("std_dev", statistics.stdev))
               for name, key in (("absorption_fraction_score", "fraction"), ("full_absorption_score", "full"), ("num_split_features", "split"))}
    output = schema.AbsorptionEvalOutput(
        eval_config=config, eval_id=get_eval_uuid(), datetime_epoch_millis=int(time.time() * 1000),
        eval_result_metrics=schema.AbsorptionMetricCategories(mean=schema.AbsorptionMeanMetrics(**summary)), eval_result_details=details,
        sae_bench_commit_hash=get_sae_bench_version(), sae_lens_id="custom_sae", sae_lens_release_id=bench.label(run),
        sae_lens_version=get_sae_lens_version(), sae_cfg_dict=sae.cfg.to_dict())
    metrics = {**summary, "letters": len(valid), "median_main_latent_f1": statistics.median(main_f1[a] for a in valid)}
    per_letter = [{"letter": chr(97 + a), "main_latent": ids[a][0], "main_latent_f1": main_f1[a], "full_absorption_95": interval}
                  for a, interval in zip(valid, found["interval"])]
    return json.loads(output.to_json()), {"metrics": metrics, "letters": per_letter, "guards": absorption_guards(bench, sae, metrics, config)}


def split_latents(sae, letters, config):
    """SAEBench's main latents of each letter: those of the k-sparse probe with the largest k up to which every k adds more than f1_jump to
    the F1 on the test words; -> (latents of each letter, F1 of its first one). Probes of larger k decide nothing and are not trained."""
    from sklearn.linear_model import LogisticRegression
    rows, y = letters["train"], letters["train_y"]
    precalc = len(rows) * sae.cfg.d_sae * 4 <= KEPT
    torch.set_rng_state(letters["rng"])
    probe = train_sparse_probes(encode_rows(sae, rows) if precalc else rows, torch.nn.functional.one_hot(y, LETTERS), sae.cfg.d_sae,
                                config.k_sparse_probe_l1_decay, config.k_sparse_probe_batch_size, config.k_sparse_probe_num_epochs,
                                (lambda acts: acts) if precalc else sae.encode)
    best = probe.weights.topk(config.max_k_value).indices                                 # [26, max_k]
    used, place = best.unique(return_inverse=True)
    train, test = (encode_rows(sae, letters[k], used).cpu().float() for k in ("train", "test"))
    y, test_y, place, chosen, first_f1 = y.cpu(), letters["test_y"].cpu(), place.cpu(), [], []
    for a in range(LETTERS):
        reached, chosen_k = -100.0, 0
        for k in range(1, config.max_k_value + 1) if (y == a).any() else ():
            at = place[a, :k]
            fit = LogisticRegression(max_iter=500, class_weight="balanced").fit(train[:, at].numpy(), (y == a).numpy())
            f1 = letter_f1(test[:, at] @ torch.tensor(fit.coef_[0]).float() + float(fit.intercept_[0]), test_y == a)
            first_f1 += [f1] if k == 1 else []
            if f1 <= reached + config.f1_jump_threshold:
                break
            reached, chosen_k = f1, k
        chosen.append(best[a, :chosen_k].tolist())
        first_f1 += [math.nan] if not (y == a).any() else []
    return chosen, first_f1


@torch.no_grad()
def train_sparse_probes(rows, y, dim, l1_decay, batch_size, epochs, encode):
    """SAEBench's train_sparse_multi_probe, bit for bit, without autograd, its optimizer's bookkeeping and a DataLoader that takes row by row:
    linear probes of encode(rows) [n, dim] for labels y [n, classes] by Adam, its rate from 0.01 down to 1e-5, with an L1 penalty on their
    weights and 1e-6 of L2."""
    from sae_bench.evals.absorption.probing import LinearProbe
    y, draw = y.to(rows.dtype), lambda: torch.empty((), dtype=torch.int64).random_().item()
    probe, heavier = LinearProbe(dim, y.shape[1]).to(rows.device, rows.dtype), (len(y) - y.sum(0)) / y.sum(0)
    parts = [AdamState(p) for p in (probe.weights, probe.biases)]
    lr, falls, push = 0.01, math.exp(math.log(1e-5 / 0.01) / epochs), (torch.tensor(l1_decay) / y.shape[1]).item()
    for _ in range(epochs):
        draw()                                                                 # a DataLoader draws a seed for workers that it does not have
        for at in torch.randperm(len(rows), generator=torch.Generator().manual_seed(draw())).split(batch_size):
            x, hit = encode(rows.index_select(0, at.to(rows.device))), y[at]   # a quarter of the time of rows[at]
            score, missed = probe(x).sigmoid(), heavier * hit
            slope = ((missed + 1 - hit) * score - missed) / score.numel()
            to_weight = (slope.T @ x).add_(probe.weights.sign(), alpha=push)
            for part, gradient in zip(parts, (to_weight, slope.sum(0))):
                part.step(gradient.add_(part.value, alpha=1e-6), lr)
        lr *= falls
    return probe


class AdamState:
    """Adam on a parameter, without an optimizer's bookkeeping: to the bits of torch's own."""

    def __init__(self, parameter):
        self.value, self.steps = parameter.data, 0
        self.mean, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def step(self, gradient, lr):
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        self.value.addcdiv_(self.mean, (self.square.sqrt() / (1 - 0.999 ** self.steps) ** 0.5).add_(1e-8), value=-lr / (1 - 0.9 ** self.steps))


def encode_rows(sae, rows, latents=slice(None)):
    """Latent activations [n, latents] of rows [n, d_in], a few thousand rows at a time."""
    return torch.cat([sae.encode(part)[:, latents] for part in rows.split(4096)])


def letter_f1(score, is_letter):
    """F1 of score > 0 as a classifier; 0 where nothing is found."""
    guess = score > 0
    return 2 * (guess & is_letter).sum().item() / max(1, guess.sum().item() + is_letter.sum().item())


@torch.no_grad()
def absorption_scores(sae, rows, direction, main):
    """(absorption fraction, whether fully absorbed) of each of the rows [n, d_in] of a letter's words, with SAEBench's thresholds.

    direction [d_in]: the letter's probe; main: its main latents. What a latent gives to the probe's projection is its activation times
    the cosine of its decoder row. Full: no main latent fires, and the latent that gives most stands in. Fraction: the share that up to
    three latents that stand in have in what they and the main latents give."""
    from sae_bench.evals.absorption import feature_absorption as at
    direction = direction / direction.norm()
    cosine = torch.nn.functional.cosine_similarity(direction, sae.W_dec, dim=-1)
    acts, whole = sae.encode(rows), rows @ direction
    gives = acts * cosine
    mains = gives[:, main].sum(-1)
    able = cosine >= at.ABSORPTION_FRACTION_PROBE_COS_THRESHOLD
    able[main] = False
    others = (gives * able).clamp_min(0).topk(min(at.ABSORPTION_FRACTION_MAX_ABSORBING_LATENTS, gives.shape[1])).values.sum(-1)
    stand_in = torch.minimum(others, whole - mains)
    fraction = torch.where(mains <= 0, 1.0, (stand_in / (stand_in + mains)).clamp(0, 1))
    fraction[(mains >= whole) | (others / whole < at.ABSORPTION_PROBE_PROJECTION_PROPORTION_THRESHOLD)] = 0.0
    top, most = gives.max(-1)
    full = ((acts[:, main] < 1e-8).all(-1) & (cosine[most] >= at.FULL_ABSORPTION_PROBE_COS_THRESHOLD) & (whole >= 0)
            & (top / whole >= at.ABSORPTION_PROBE_PROJECTION_PROPORTION_THRESHOLD))
    return fraction, full


def wilson(hits, n, z=1.96):
    """The 95 % interval of a rate (Wilson 1927)."""
    middle, spread = (hits + z * z / 2) / (n + z * z), z * math.sqrt(hits * (n - hits) / n + z * z / 4) / (n + z * z)
    return [max(0.0, middle - spread), min(1.0, middle + spread)]


def absorption_guards(bench, sae, m, config):
    """What makes absorption void, and what puts it out of the scope that SAEBench's authors state."""
    found, low = [], m["mean_full_absorption_score"] <= 0.005 and m["mean_num_split_features"] == 1
    if low and m["median_main_latent_f1"] < 0.6:
        found.append({"id": "G13", "level": "fatal", "message": f"vacuous: nothing is absorbed, but the main latents do not know their letter either "
                                                                f"(median F1 {m['median_main_latent_f1']:.2f})"})
    parameters = bench.acts.meta["model"].get("n_parameters") or sum(p.numel() for p in bench.model.parameters())
    scope = [f"{m['letters']} letters, not {config.min_feats_for_eval}"] if m["letters"] < config.min_feats_for_eval else []
    scope += [f"{sae.cfg.d_sae} latents, not 16384"] if sae.cfg.d_sae < 16384 else []
    scope += [f"a model of {parameters / 1e6:.3g} M parameters, not 1000 M"] if parameters < 1e9 else []
    scope += ["the model does not spell"] if config.prompt_template == "{word}" else []
    if scope:
        found.append({"id": "G14", "level": "warn", "message": f"out of scope: {', '.join(scope)}"})
    return found


BENCH = {"saebench_core": BenchEval("sae_bench.evals.core.eval_output:CoreEvalOutput", core_settings, bench_core,
                                    (("CE score", "ce_loss_score"), ("KL score", "kl_div_score"))),
         "absorption": BenchEval("sae_bench.evals.absorption.eval_output:AbsorptionEvalOutput", absorption_settings, bench_absorption,
                                 (("abs.full", "mean_full_absorption_score"), ("abs.frac", "mean_absorption_fraction_score")))}


# ---- labelled text for SAEBench: of the corpus itself where its records carry labels, else its own data sets ----------------------------

LABELLED = Path("labelled")      # labelled/NAME/SPLIT.jsonl, in the columns and by the name that the data set has on the hub
EMBEDDED = dict(train=400, test=200, ctx=64)    # of what is made from a corpus: texts a probe, tokens a text (SAEBench: 4000, 1000, 128)
MOST_CLASSES, PASSAGE = 6, 200   # classes of a task; characters of a passage, about 64 tokens
SCIENCE = ("numpy", "sympy", "networkx")
SCR_PAIRS = (("transformers", "sympy"), ("transformers", "stdlib"), ("sympy", "torch"))    # told apart while doctests mislead
STATEMENT = re.compile(r"\s*(from|def|class|if|for|while|with|return|raise|assert)\s+(.{12,})")
OWN_TASKS = {f"corpus/{task}_bias_in_bios": task for task in ("package", "kind", "statement", "letter")}    # SAEBench's loaders go by names
HUB_TASKS = {"sparse_probing": ("LabHC/bias_in_bios_class_set1", "LabHC/bias_in_bios_class_set2", "LabHC/bias_in_bios_class_set3",
                                "canrager/amazon_reviews_mcauley_1and5", "canrager/amazon_reviews_mcauley_1and5_sentiment",
                                "codeparrot/github-code", "fancyzhx/ag_news", "Helsinki-NLP/europarl"),
             "scr": ("LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"),
             "tpp": ("LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5")}
RUNS_CODE = {"codeparrot/github-code"}          # on the hub a script: only from labelled/


def label_corpus(records):
    """Labelled rows of a corpus whose records carry package, module and kind -> {task: [{text, label, group, test}]}.

    package    which package a passage of documentation is from; group: has it a doctest
    kind       a passage of source: code, comment or docstring; group: scientific package or not
    statement  which keyword a line of source began with, the keyword cut off; group: as before
    letter     the first letter of a common word; group: with or without a space before it
    topic      documentation long enough to fill a context: text to forget, and to retain
    All passages of a module, and both spellings of a word, are in the same part, training or test."""
    rows, words = defaultdict(dict), Counter()

    def add(task, text, label, group, source):
        rows[task].setdefault(text, dict(text=text, label=label, group=group, test=int(checksum(source.encode()), 16) % 4 == 0))

    for r in records:
        field = "science" if r["package"] in SCIENCE else "library"
        if r["kind"] == "doc":
            words.update(re.findall(r"\b[a-z]{3,12}\b", r["text"]))
            add("topic", r["text"], r["package"], "", r["module"])
            for text in passages(r["text"].splitlines()):
                add("package", text, r["package"], "doctest" if ">>>" in text else "plain", r["module"])
        elif r["kind"] == "code":
            for kind, lines in kinds_of_line(r["text"]).items():
                for text in passages(lines):
                    add("kind", text, kind, field, r["module"])
                for match in map(STATEMENT.match, lines if kind == "code" else ()):
                    if match:
                        add("statement", match[2], match[1], field, r["module"])
    for word in sorted(w for w, n in words.items() if n > 2):
        for space in ("", " "):
            add("letter", space + word, word[0], "space" if space else "bare", word)
    return {task: sorted(found.values(), key=lambda row: checksum(row["text"].encode())) for task, found in rows.items()}


def passages(lines):
    """Lines in a row, joined until they are long enough; what is left over at the end is not used."""
    held = []
    for line in lines:
        held.append(line)
        if sum(map(len, held)) >= PASSAGE:
            yield "\n".join(held)[:3 * PASSAGE]
            held = []


def kinds_of_line(source):
    """The lines of Python source by what they are; strings of three quotes count as docstrings."""
    found, inside = {"code": [], "comment": [], "docstring": []}, False
    for line in source.splitlines():
        quotes = line.count('"""') + line.count("'''")
        if inside or quotes:
            found["docstring"].append(line)
            inside ^= quotes % 2 == 1
        elif line.strip():
            found["comment" if line.lstrip().startswith("#") else "code"].append(line)
    return found


def corpus_tasks(acts):
    """(folder, index) of the labelled data of the cache's own corpus, made if they are not there; None if it carries no labels.

    index: {task: {"classes": [...], "groups": [...]}, "pairs": SCR's, "forget": package}. Classes with too few texts are left out."""
    file = Path(acts.meta["data"]["name"]) / "train.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else ()
    if not lines or not {"package", "module", "kind"} <= json.loads(lines[0]).keys():
        return None
    key = checksum(json.dumps([VERSION, EMBEDDED, checksum(file.read_bytes())]).encode())
    folder = acts.folder / "eval_cache" / f"labelled-{key[:12]}"
    if not (folder / "index.json").exists():
        tasks, index = label_corpus(map(json.loads, lines)), {"version": key}
        for task in OWN_TASKS.values():
            index[task] = write_task(folder / task, tasks.get(task, []))
        sizes = {c: quadrants([r for r in tasks["package"] if r["label"] == c]) for c in index["package"]["classes"]}
        index["pairs"] = [pair for pair in SCR_PAIRS if all(p in sizes for p in pair)
                          and all(enough(sizes[c].get(g, (0, 0)), 2.1) for c, g in zip(pair, ("doctest", "plain")))]
        long = [r for r in tasks["topic"] if len(r["text"]) > 6 * 128]                              # surely fills a context of 128 tokens
        index["forget"] = max(sorted({r["label"] for r in long}), key=lambda c: (c == "transformers", sum(r["label"] == c for r in long)))
        for name, keep in (("forget", True), ("retain", False)):
            for split in ("train", "test"):
                chosen = [{"text": r["text"]} for r in long if (r["label"] == index["forget"]) == keep and r["test"] == (split == "test")]
                write_file(folder / name / f"{split}.jsonl", "".join(json.dumps(r) + "\n" for r in chosen[:200]).encode())
        write_json(folder / "index.json", index)
    return folder, read_json(folder / "index.json")


def quadrants(rows):
    """{group: (texts to train, texts to test)}."""
    found = defaultdict(lambda: [0, 0])
    for r in rows:
        found[r["group"]][r["test"]] += 1
    return dict(found)


def enough(sizes, factor=1.0):
    return sizes[0] >= factor * EMBEDDED["train"] // 4 and sizes[1] >= factor * EMBEDDED["test"] // 4


def write_task(folder, rows):
    """The classes with enough texts in both groups, the fullest first, to folder/{train,test}.jsonl."""
    groups = sorted({r["group"] for r in rows})
    sizes = {c: quadrants([r for r in rows if r["label"] == c]) for c in sorted({r["label"] for r in rows})}
    fit = [c for c, q in sizes.items() if len(q) == 2 and all(map(enough, q.values()))]
    classes = sorted(sorted(fit, key=lambda c: -min(sum(q) for q in sizes[c].values()))[:MOST_CLASSES])
    for split in ("train", "test"):
        left, kept = Counter(), []
        for r in rows:
            quadrant = r["label"], r["group"]
            if r["label"] in classes and r["test"] == (split == "test") and left[quadrant] < 0.75 * EMBEDDED[split]:
                left[quadrant] += 1
                kept.append(json.dumps({k: r[k] for k in ("text", "label", "group")}) + "\n")
        write_file(folder / f"{split}.jsonl", "".join(kept).encode())
    return {"classes": classes, "groups": groups}


def on_disk_or_hub(names):
    """{data set: its version} of those that are in labelled/ or can be had from the hub."""
    import huggingface_hub
    import requests
    found, reachable = {}, True
    for name in dict.fromkeys(base_name(n) for n in names):
        files = sorted((LABELLED / name).rglob("*.json*"))
        if files:
            found[name] = checksum(b"".join(f.read_bytes() for f in files))
        elif reachable and name not in RUNS_CODE:
            try:
                found[name] = huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
            except huggingface_hub.errors.HfHubHTTPError as e:
                print(f"{name}: {str(e).splitlines()[0]}")
            except (requests.ConnectionError, requests.Timeout, huggingface_hub.errors.OfflineModeIsEnabled):
                reachable = False
    return found


def base_name(task):
    """The data set that a task of SAEBench reads."""
    return task.split("_class_set")[0].removesuffix("_sentiment")


def labelled_settings(name, own, prefix, always={}, **more):
    """f(acts) -> the data, tasks and SAEBench's settings that differ from its defaults, of one evaluation of labelled text.

    own: which tasks of a corpus it takes; prefix: of its settings for the numbers of texts; always: its other settings; more: those on a corpus."""
    def settings(acts):
        found = corpus_tasks(acts)
        if found:
            index = found[1]
            tasks = [task for task, key in OWN_TASKS.items() if key in own and index[key]["classes"]]
            if not tasks or (name == "scr" and not index["pairs"]):
                raise Unfit("the corpus has too few texts of any class")
            return {"data": {task: index["version"] for task in tasks}, "tasks": tasks, "index": index,
                    "config": {"context_length": EMBEDDED["ctx"], "sae_batch_size": 32, f"{prefix}train_set_size": EMBEDDED["train"],
                               f"{prefix}test_set_size": EMBEDDED["test"], **always, **more}}
        data = on_disk_or_hub(HUB_TASKS[name])
        tasks = [task for task in HUB_TASKS[name] if base_name(task) in data]
        if not tasks:
            raise Unfit(f"no labelled data: the corpus has no labels, {LABELLED}/ has none of {', '.join(HUB_TASKS[name])}, the hub is out of reach")
        return {"data": data, "tasks": tasks, "index": None, "config": dict(always)}
    return settings


@contextlib.contextmanager
def labelled_tasks(bench, settings):
    """SAEBench knows the tasks inside; yields where their data sets are: {name: folder, or the version on the hub}."""
    from sae_bench.evals.scr_and_tpp import main as scr
    from sae_bench.sae_bench_utils import dataset_info as info
    index = settings["index"]
    if not index:
        yield {name: LABELLED / name if (LABELLED / name).exists() else version for name, version in settings["data"].items()}
        return
    folder = bench.labelled
    about = {task: index[OWN_TASKS[task]] for task in settings["tasks"]}
    columns = {task: {"text_column_name": "text", "column1_name": "label", "column2_name": "group", "column2_autointerp_name": "group",
                      "column1_mapping": {c: c for c in a["classes"]}, "column2_mapping": {g: g for g in a["groups"]}}
               for task, a in about.items()}
    classes, groups = {task: a["classes"] for task, a in about.items()}, {task: tuple(a["groups"]) for task, a in about.items()}
    with (replaced(info, "dataset_metadata", {**info.dataset_metadata, **columns}),
          replaced(info, "chosen_classes_per_dataset", {**info.chosen_classes_per_dataset, **classes}),
          replaced(scr, "COLUMN2_VALS_LOOKUP", {**scr.COLUMN2_VALS_LOOKUP, **groups})):
        yield {task: folder / OWN_TASKS[task] for task in settings["tasks"]}


# ---- SAEBench's sparse probing, SCR and TPP: the model's activations and the probes on them are made once for all SAEs -------------------

SEED, LLM_BATCH = 42, 32         # SAEBench's own seed; contexts in a pass of the language model
N_FIELDS = (1, 2, 5, 10, 20, 50, 100, 500)       # numbers of latents for which its results have a field
CHANCE = 0.02                    # probes nearer to 0.5 than this see a constant
NO_GAP = 0.05                    # SCR: what the biased probe loses must be more than this to be recovered


def bench_labelled(name, module, config_class, fixed, counts, watch):
    """f(bench, runs, settings, failures) for an evaluation whose run_eval keeps what depends on no SAE in its artifacts folder.

    SAEBench fills that folder with the first SAE of a call, and by drawing random numbers that later SAEs don't draw. So it is filled with
    an SAE of eight latents before; then every run starts from the same generators and the same folder, whatever ran before it. All of a data
    set's activations are in host memory then, and so are that SAE and the probes: on a GPU they may take tens of GB."""
    def evaluate(bench, runs, settings, failures):
        from sae_bench.evals.scr_and_tpp import main as scr
        main, folder = importlib.import_module(module), bench.folder(name, settings)

        def call(label, sae, artifacts, seam=contextlib.nullcontext()):
            """(SAEBench's result, of SCR the probes' accuracies before ablation of each pair)."""
            config = labelled_config(bench, settings, config_class, fixed, counts, sae)
            clean, plot = [], scr.get_scr_plotting_dict

            def watched(accuracies, before):
                clean.append(before)
                return plot(accuracies, before)

            with (tempfile.TemporaryDirectory() as results, labelled_tasks(bench, settings) as data,
                  bench.seams(SEED, data, folder / "log.txt"), replaced(scr, "get_scr_plotting_dict", watched), seam):
                found = main.run_eval(config, [(label, sae)], str(sae.device), results, force_rerun=True, artifacts_path=str(artifacts))
            return json.loads(json.dumps(found[f"{label}_custom_sae"])), clean

        with take_lock(folder / "making", wait=True):                         # a second call waits for what the first one makes
            if not (folder / "shared").exists():
                print(f"{bench.acts.folder}: {name}: activations and probes that all runs share")
                shutil.rmtree(folder / "making" / name, ignore_errors=True)
                call("none", BenchSAE(bench, few_latents(bench, "cpu")), folder / "making" / name, in_host_memory(bench))
                (folder / "making" / name).rename(folder / "shared")
        for run in runs:
            made = []
            with blamed(run, failures, name):
                sae = BenchSAE(bench, run)
                result, clean = call(bench.label(run), sae, folder / "shared", bench.texts.seen_by(run, sae))
                metrics = {k: v for part in result["eval_result_metrics"].values() for k, v in part.items() if v is not None}
                if not metrics or -1 in metrics.values():
                    raise Refuse(f"SAEBench gives no figure for {', '.join(k for k, v in metrics.items() if v == -1) or 'anything'}")
                made = [(result, {"metrics": metrics, "guards": watch(metrics, clean)})]
            yield from ((run, *m) for m in made)
    return evaluate


def labelled_config(bench, settings, config_class, fixed, counts, sae):
    """SAEBench's settings for one SAE: its defaults, less the numbers of latents that the SAE does not have or the results have no field for."""
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    cls = {"ScrAndTppEvalConfig": ScrAndTppEvalConfig, "SparseProbingEvalConfig": SparseProbingEvalConfig}[config_class]
    chosen = {**settings["config"], **fixed}
    if settings["index"] and fixed.get("perform_scr"):
        chosen["column1_vals_lookup"] = {task: settings["index"]["pairs"] for task in settings["tasks"]}
    config = cls(**chosen, random_seed=SEED, model_name=bench.name, llm_dtype=bench.dtype, dataset_names=settings["tasks"],
                 llm_batch_size=max(1, int(LLM_BATCH * bench.share)))
    config.sae_batch_size = max(1, int(config.sae_batch_size * bench.share))
    setattr(config, counts, [n for n in getattr(config, counts) if n in N_FIELDS and n <= sae.W_dec.shape[0]])
    return config


@contextlib.contextmanager
def in_host_memory(bench):
    """Inside, the activations that SAEBench reads of tokens there are there as well."""
    from sae_bench.sae_bench_utils import activation_collection as collected
    on_device = collected.get_llm_activations

    def read(tokens, model, batch_size, *where):
        return torch.cat([on_device(part.to(bench.device), model, batch_size, *where, show_progress=False).cpu() for part in tokens.split(batch_size)])

    with replaced(collected, "get_llm_activations", read):
        yield


def few_latents(bench, device):
    """A stand-in for a run, with which the shared work is made."""
    sae = SAE(bench.acts.d_in, 0, 0, activation="relu", d_sae=8, l0=4.0).to(device).eval()
    return Run(Path("none"), sae, {"variant": "baseline", "sae_checksum": ""})


class Texts:
    """The texts of SAEBench's kept activations: an SAE encodes each once, whatever the classes, pairs and evaluations that it is in.

    SAEBench's code then sees a text as one token, whose activation is the text's number (from 1) and whose code is the mean of the text's."""

    def __init__(self, bench):
        self.bench, self.files, self.means = bench, {}, defaultdict(dict)

    @contextlib.contextmanager
    def seen_by(self, run, seen):
        """For the duration of SAEBench's evaluation of `run`, which goes by the BenchSAE `seen`."""
        from sae_bench.evals.scr_and_tpp import main as scr
        from sae_bench.evals.sparse_probing import probe_training as probing
        from sae_bench.sae_bench_utils import activation_collection as collected
        sae, slow, read = BenchSAE(self.bench, run), scr.ablated_precomputed_activations, torch.load
        zero, best = sae.encode(torch.zeros(1, sae.cfg.d_in, device=sae.device)).cpu(), probing.get_top_k_mean_diff_mask

        def load(path, **more):
            if not isinstance(path, str):                                      # of a tensor in a pickle of probes
                return read(path, **more)
            self.file = self.read(path, read)
            self.mean = self.mean_codes(run, sae)
            return {k: dict(v) for k, v in self.file.data.items()}             # SAEBench empties them

        def codes(numbers):
            return self.mean.index_select(0, numbers.flatten().long().cpu() - 1).to(sae.device)

        def encode(numbers):
            return codes(numbers).view(*numbers.shape[:2], -1)

        def numbers_of(numbers, *_):
            """What probing draws, joins and shuffles in place of all latents of the texts."""
            return {name: x[:, 0] for name, x in numbers.items()}

        def train(x, y, test_x, test_y, **more):
            return train_probe(codes(x), y, codes(test_x), test_y, **{**more, "dim": sae.cfg.d_sae})

        @torch.no_grad()
        def ablated(numbers, _, which, batch_size):
            """The decoder is linear, so that the mean activation without some latents is the mean less these latents' mean acts through their
            rows. Acts of masked positions, the SAE's answer to zeros, count here as well, and the mean is over the positions not masked."""
            file, at = self.file, numbers[:, 0, 0].long().cpu() - 1
            if not sae.linear:
                x = [file.rows[file.of == i] for i in at.tolist()]
                x = torch.nn.utils.rnn.pad_sequence([*x, file.rows.new_zeros(file.width, sae.cfg.d_in)], batch_first=True)[:-1]
                return slow(x.to(sae.device), sae, which, batch_size)
            which = which.nonzero()[:, 0].cpu()
            masked = (file.width / file.length[at] - 1)[:, None] * zero[:, which]
            return file.mean[at].to(sae.device) - (self.mean[at[:, None], which] + masked).to(sae.device) @ sae.W_dec[which]

        with (replaced(torch, "load", load), replaced(seen, "encode", encode), replaced(scr, "ablated_precomputed_activations", ablated),
              replaced(collected, "get_sae_meaned_activations", numbers_of), replaced(probing, "train_probe_gpu", train),
              replaced(probing, "test_probe_gpu", lambda x, y, _, probe: accuracy(x, y, probe.net.weight.to(x), probe.net.bias.to(x))),
              replaced(probing, "get_top_k_mean_diff_mask", lambda x, y, k: best(codes(x), y, k)),
              replaced(probing, "apply_topk_mask_reduce_dim", lambda x, masked: codes(x)[:, ~masked])):
            yield

    def read(self, path, read):
        """SAEBench's file of activations with numbers of texts in their place, and the texts: their unmasked rows, one text after another."""
        if path in self.files:
            return self.files[path]
        data, number, rows = read(path), {}, []
        for split in ("train", "test"):
            for name, x in data[split].items():                                # [texts, tokens, d_in]; masked tokens are zero
                at = []
                for text, real in zip(x, x.sum(-1) != 0):
                    key = xxhash.xxh3_128_digest(text.numpy())
                    if key not in number:
                        number[key] = len(number) + 1
                        rows.append(text[real])
                    at.append(number[key])
                data[split][name] = torch.tensor(at, dtype=x.dtype, device=self.bench.device)[:, None, None]
        length = torch.tensor([len(text) for text in rows])
        of = torch.arange(len(rows)).repeat_interleave(length)                 # whose each row is
        file = SimpleNamespace(data=data, keys=list(number), rows=torch.cat(rows), of=of, width=x.shape[1])
        sums = torch.zeros(len(rows), x.shape[2]).index_add_(0, file.of, file.rows)
        file.length, file.mean = length, sums / length[:, None]
        if file.rows.nbytes < self.bench.room:
            self.files[path] = file
            self.bench.room -= file.rows.nbytes
        return file

    @torch.no_grad()
    def mean_codes(self, run, sae):
        """Mean acts [texts, d_sae] over each text of self.file; those of texts that were in another file are known already."""
        file, known, n = self.file, self.means[run], sae.cfg.d_sae
        new = torch.tensor([key not in known for key in file.keys])
        sums = torch.zeros(int(new.sum()), n)
        at, chosen = (new.cumsum(0) - 1)[file.of], new[file.of].nonzero()[:, 0]
        step = max(1, int(self.bench.share * (CODES if sae.device.type == "cuda" else 2**19) // n))
        for part in chosen.split(step):
            acts, to = sae.codes(file.rows.index_select(0, part).to(sae.device)), at.index_select(0, part)
            if isinstance(acts, Codes):
                sums.view(-1).index_add_(0, to.index_select(0, acts.rows) * n + acts.latents, acts.values)
            else:
                few = sums[to[0]:to[-1] + 1]                                   # of the texts that these rows are of
                few += torch.zeros_like(few, device=sae.device).index_add_(0, (to - to[0]).to(sae.device), acts).cpu()
        made = sums / file.length[new][:, None]
        found = known | dict(zip(itertools.compress(file.keys, new.tolist()), made))
        if made.nbytes < self.bench.room:
            self.means[run] = found
            self.bench.room -= made.nbytes
        return torch.stack([found[key] for key in file.keys])


@torch.no_grad()
def train_probe(x, y, test_x, test_y, dim, batch_size, epochs, lr, verbose, early_stopping_patience, l1_penalty):
    """SAEBench's train_probe_gpu, bit for bit, without autograd, its optimizer's bookkeeping and the accuracy on x, which nobody reads: a
    probe of x [n, dim] for labels y [n] by AdamW, and its accuracy on the test rows, at the epoch at which that is highest."""
    from sae_bench.evals.sparse_probing.probe_training import Probe
    assert not l1_penalty
    probe, best, worse = Probe(dim, x.dtype).to(x.device), (0.0, None), 0
    parts = weight, bias = [AdamState(p) for p in probe.parameters()]
    for epoch in range(epochs):
        for at in torch.randperm(len(x)).split(batch_size):
            rows = x.index_select(0, at.to(x.device))                          # a quarter of the time of x[at]
            slope = (torch.nn.functional.linear(rows, weight.value, bias.value).sigmoid() - y[at][:, None]) / len(at)
            for part, gradient in zip(parts, (slope.T @ rows, slope.sum(0))):
                part.value.mul_(1 - lr * 0.01)
                part.step(gradient, lr)
        right = accuracy(test_x, test_y, weight.value, bias.value)
        worse += 1
        if right > best[0]:
            best, worse = (right, [part.value.clone() for part in parts]), 0
        if worse >= early_stopping_patience:
            break
    for part, value in zip(parts, best[1]):
        part.value.copy_(value)
    return probe, best[0]


@torch.no_grad()
def accuracy(x, y, weight, bias):
    """SAEBench's test_probe_gpu, without the loss, which nobody reads."""
    return ((torch.nn.functional.linear(x, weight, bias)[:, 0] > 0) == y.bool()).float().mean().item()


def probing_guards(metrics, _):
    seen = [v for k, v in metrics.items() if re.fullmatch(r"sae_top_\d+_test_accuracy", k)]
    dead = all(abs(v - 0.5) < CHANCE for v in seen)
    return [{"id": "G12", "level": "fatal", "message": "dead SAE: the probes on its latents see a constant"}] if dead else []


def scr_guards(metrics, clean):
    """clean: the probes' accuracies before ablation, of each pair."""
    gap = statistics.mean(c["professor / nurse"] - c["male_professor / female_nurse probe on professor / nurse data"] for c in clean)
    nothing = f"SCR has little to remove: the biased probes lose {gap:.3f}"
    return unreliable("SCR", metrics) + ([{"id": "G33", "level": "warn", "message": nothing}] if gap < NO_GAP else [])


def tpp_guards(metrics, _):
    return unreliable("TPP", metrics)


def unreliable(name, metrics):
    """Published doubts about the metric itself (arXiv 2605.18229): most of all where many latents are ablated."""
    many = sorted({int(n) for k in metrics for n in re.findall(r"threshold_(\d+)", k) if int(n) >= 50})
    least = f", least of all with {many} latents" if many else ""
    return [{"id": "G33", "level": "warn", "message": f"{name} is no primary metric{least}"}]


OWN_SCR = {"n_values": [2, 5, 10, 20], "probe_lr": 1e-2}     # 1e-3 leaves probes on so small activations at their random start
SCR_MAIN, SCR_OUTPUT = "sae_bench.evals.scr_and_tpp.main", "sae_bench.evals.scr_and_tpp.eval_output"
BENCH |= {
    "sparse_probing": BenchEval(
        "sae_bench.evals.sparse_probing.eval_output:SparseProbingEvalOutput", labelled_settings("sparse_probing", OWN_TASKS.values(), "probe_", {"k_values": [1, 2, 5, 20]}),
        bench_labelled("sparse_probing", "sae_bench.evals.sparse_probing.main", "SparseProbingEvalConfig", {}, "k_values", probing_guards),
        [("probe@1", "sae_top_1_test_accuracy"), ("probe@5", "sae_top_5_test_accuracy")]),
    "scr": BenchEval(
        f"{SCR_OUTPUT}:ScrEvalOutput", labelled_settings("scr", ["package"], "", **OWN_SCR),
        bench_labelled("scr", SCR_MAIN, "ScrAndTppEvalConfig", {"perform_scr": True}, "n_values", scr_guards),
        [("SCR@20", "scr_metric_threshold_20")]),
    "tpp": BenchEval(
        f"{SCR_OUTPUT}:TppEvalOutput", labelled_settings("tpp", ["package"], "", **OWN_SCR),
        bench_labelled("tpp", SCR_MAIN, "ScrAndTppEvalConfig", {"perform_scr": False}, "n_values", tpp_guards),
        [("TPP@20", "tpp_threshold_20_total_metric")])}


# ---- SAEBench's unlearning: latents of a topic are clamped, and what that costs on the topic and elsewhere is measured -------------------

MULTIPLES = (0.4, 0.8, 2.0)      # latents are clamped to minus these times the mean norm of a row, a whole number of at least 1
FORGETTING = dict(retain_thresholds=[0.01], n_features_list=[5, 10, 20])
SELECT, SCORE = 48, 32           # contexts of either topic on which latents are chosen, and others on which the losses are measured
FEW_QUESTIONS = 50               # a subject with fewer is doubtful: one question is 2 % of it, twice what retaining may cost
DEEP = 0.7                       # from this share of the layers on unlearning is expected to do nothing


FORGET = LABELLED / "cais" / "wmdp-corpora" / "bio-forget-corpus.jsonl"      # gated: asked for by a form, see the README
QUESTIONS = ("cais/wmdp", "cais/mmlu", "wikitext")


def unlearning_settings(acts):
    """SAEBench's questions where its forget corpus is there and the model is one of those whose prompts it has; else the corpus' own topics."""
    instructed = re.search("gemma.*-it", acts.meta["model"]["name"].lower())
    if instructed and FORGET.exists():
        data = on_disk_or_hub(QUESTIONS)
        missing = [name for name in QUESTIONS if name not in data]
        if missing:
            raise Unfit(f"{FORGET} is there, but not {', '.join(missing)}: copy them to {LABELLED}, or reach the hub")
        return {"data": {**data, str(FORGET): checksum(FORGET.read_bytes())}, "questions": True, "config": {}}
    found = corpus_tasks(acts)
    if not found:
        raise Unfit("no text to forget: the corpus carries no labels, and SAEBench's questions are "
                    + (f"asked only where {FORGET} is" if instructed else "for Gemma's instructed models"))
    multipliers = list(dict.fromkeys(max(1, round(m * acts.meta["mean_norm"])) for m in MULTIPLES))
    return {"data": {"corpus/forget": found[1]["version"]}, "forget": found[1]["forget"], "select": SELECT, "score": SCORE,
            "config": {**FORGETTING, "multipliers": multipliers, "dataset_size": SELECT, "seq_len": min(128, acts.meta["ctx"])}}


def bench_unlearning(bench, runs, settings, failures):
    """SAEBench's choice of latents and its clamping, scored by losses, because a small model answers no questions.

    What the model knows of a text is how far its loss is below that of a unigram model. The score is the largest share of it that is gone
    on the topic (documentation of one package) among settings that leave 99 % of it on the other packages (SAEBench: the largest share
    of wrong answers among settings that leave 99 % right elsewhere). Latents are chosen and scored on different modules."""
    if settings.get("questions"):
        yield from bench_questions(bench, runs, settings, failures)
        return
    from sae_bench.evals.unlearning import eval_config, eval_output
    from sae_bench.sae_bench_utils import general_utils, get_eval_uuid, get_sae_bench_version, get_sae_lens_version
    texts = ForgetRetain(bench, settings)
    config = eval_config.UnlearningEvalConfig(
        random_seed=SEED, model_name=bench.name, llm_dtype=bench.dtype, llm_batch_size=LLM_BATCH, target_metric="loss",
        dataset_names=[f"forget {settings['forget']}", "retain the rest"], **settings["config"])
    for run in runs:
        made = []
        with blamed(run, failures, "unlearning"), bench.seams(SEED), torch.no_grad():
            sae = BenchSAE(bench, run)
            general_utils.load_and_format_sae(bench.label(run), sae, str(bench.device))
            tried = texts.clamp(sae, settings["config"])
            metrics = {"unlearning_score": best(tried, 0.99), "unlearning_score_retain_095": best(tried, 0.95),
                       **{f"{part}_{k}": v for part in ("forget", "retain") for k, v in texts.losses[part].items()}}
            score = eval_output.UnlearningMetrics(unlearning_score=metrics["unlearning_score"])
            result = eval_output.UnlearningEvalOutput(
                eval_config=config, eval_id=get_eval_uuid(), datetime_epoch_millis=int(time.time() * 1000), eval_result_details=[],
                eval_result_metrics=eval_output.UnlearningMetricCategories(unlearning=score), sae_bench_commit_hash=get_sae_bench_version(),
                sae_lens_id="custom_sae", sae_lens_release_id=bench.label(run), sae_lens_version=get_sae_lens_version(),
                sae_cfg_dict=sae.cfg.to_dict())
            made = [({**json.loads(result.to_json()), "eval_result_details": tried}, {"metrics": metrics, "guards": unlearning_guards(bench, tried)})]
        yield from ((run, *m) for m in made)


def bench_questions(bench, runs, settings, failures):
    """SAEBench's own unlearning: multiple-choice questions on biology (WMDP) are to go wrong, those on four other subjects (MMLU) are to stay
    right. Which questions the model answers right in every order of the choices is found once."""
    from sae_bench.evals.unlearning import eval_config, main
    from sae_bench.evals.unlearning.utils import metrics
    folder = bench.folder("unlearning", settings)
    config = eval_config.UnlearningEvalConfig(random_seed=SEED, model_name=bench.name, llm_dtype=bench.dtype,
                                              **{"llm_batch_size": max(1, int(4 * bench.share)), **settings["config"]})
    data = {name: (LABELLED / name).resolve() if (LABELLED / name).exists() else settings["data"][name] for name in QUESTIONS}
    gemma = lambda: replaced(bench.model.cfg, "model_name", "gemma-2-2b-it")   # its prompts go by this name
    forget = {"sae_bench/evals/unlearning/data/bio-forget-corpus.jsonl": FORGET.resolve()}
    if not (folder / "shared").exists():
        print(f"{bench.acts.folder}: unlearning: which questions the model answers right")
        shutil.rmtree(folder / "making", ignore_errors=True)
        with gemma(), bench.seams(SEED, data, folder / "log.txt"), torch.no_grad():
            for name in config.dataset_names:
                metrics.save_target_question_ids(bench.model, 2 * config.llm_batch_size, str(folder / "making"), name)
                ids = folder / "making" / "data" / "question_ids" / "all" / f"{question_file(name)}_correct.csv"
                if not ids.read_text().strip():
                    raise Unfit(f"the model answers no question of {name} right in every order of the choices")
                metrics.get_baseline_metrics(bench.model, 2 * config.llm_batch_size, str(folder / "making"), name,
                                             {"target_metric": "correct", "verbose": False})
        (folder / "making").rename(folder / "shared")
    asked = {name: len((folder / "shared" / "data" / "question_ids" / "all" / f"{question_file(name)}_correct.csv").read_text().split())
             for name in config.dataset_names}
    for run in runs:
        made, tried, scores = [], [], main.get_unlearning_scores

        def watched(table):
            """All settings that were tried, each with the share of right answers of every subject."""
            score = scores(table)
            tried.extend(table.to_dict("records"))
            return score

        with (blamed(run, failures, "unlearning"), workplace({**forget, f"artifacts/unlearning/{bench.name}/data": folder / "shared" / "data"}),
              gemma(), bench.seams(SEED, data, folder / "log.txt"), replaced(main, "get_unlearning_scores", watched)):
            result = only(main.run_eval(config, [(bench.label(run), BenchSAE(bench, run))], str(bench.device), "results"), bench, run)
            found = {**result["eval_result_metrics"]["unlearning"], **{f"questions_{name}": n for name, n in asked.items()}}
            made = [({**result, "eval_result_details": tried}, {"metrics": found, "guards": question_guards(bench, asked)})]
        yield from ((run, *m) for m in made)


def question_file(name):
    return name if name == "wmdp-bio" else f"mmlu-{name.replace('_', '-')}"


def question_guards(bench, asked):
    few = {name: n for name, n in asked.items() if n < FEW_QUESTIONS}
    depth = (bench.layer + 1) / bench.acts.meta["model"]["n_layers"]
    parameters = bench.acts.meta["model"].get("n_parameters") or sum(p.numel() for p in bench.model.parameters())
    found = [("G14", few, f"few questions are answered right: {', '.join(f'{n} of {name}' for name, n in few.items())}"),
             ("G14", parameters < 2e9, f"unlearning out of scope: a model of {parameters / 1e6:.3g} M parameters, not 2000 M"),
             ("G32", depth >= DEEP, f"expected to be about 0 at this layer, {depth:.0%} deep")]
    return [{"id": guard, "level": "warn", "message": message} for guard, bad, message in found if bad]


def best(tried, keep):
    """The largest share forgotten among the settings that keep so much of the rest; 0 if none does. All is gone where a unigram model knows more."""
    return max([0.0, *(min(1.0, 1 - t["forget_known"]) for t in tried if t["retain_known"] >= keep)])


def unlearning_guards(bench, tried):
    found = [{"id": "G14", "level": "warn", "message": "unlearning out of scope: measured by losses on text of the corpus, not by questions to a "
                                                       "model of 2 B parameters; compare it with nothing published"}]
    depth = (bench.layer + 1) / bench.acts.meta["model"]["n_layers"]
    if depth >= DEEP:
        found.append({"id": "G32", "level": "warn", "message": f"expected to be about 0 at this layer, {depth:.0%} deep"})
    if not any(t["n_features"] for t in tried):
        found.append({"id": "G14", "level": "warn", "message": "no latent fires on the topic and rarely elsewhere: nothing was clamped"})
    return found


class ForgetRetain:
    """Contexts of the topic and of the rest, {topic}_{part} [n, ctx], to choose latents on and to score; their activations, and losses."""

    def __init__(self, bench, settings):
        self.bench = bench
        path = bench.folder("unlearning", settings) / "clean.safetensors"
        if not path.exists():
            write_tensors(path, self.read(settings))
        self.kept = read_tensors(path)[0]
        unigram = self.kept["unigram"].log()
        self.losses, self.clean = {}, {}                                     # clean: of each prediction [n, ctx - 1], batch after batch
        for topic in ("forget", "retain"):
            tokens, known = self.kept[f"{topic}_score_tokens"], {}
            known["unigram_loss"] = -unigram[tokens[:, 1:]].mean().item()
            self.clean[topic] = [self.predict(x, t, t[:, 1:] >= 0).view(len(t), -1) for x, t in self.batches(topic, "score")]
            known["clean_loss"] = torch.cat(self.clean[topic]).mean().item()
            if not known["clean_loss"] < known["unigram_loss"]:
                raise Refuse(f"the model does not know the {topic} text: loss {known['clean_loss']:.2f}, a unigram model {known['unigram_loss']:.2f}")
            self.losses[topic] = known

    @torch.no_grad()
    def read(self, settings):
        bench, model, found = self.bench, self.bench.model, {}
        ctx, folder = settings["config"]["seq_len"], bench.labelled
        for topic, (part, split, n) in itertools.product(("forget", "retain"), (("select", "train", settings["select"]), ("score", "test", settings["score"]))):
            texts = (json.loads(line)["text"] for line in (folder / topic / f"{split}.jsonl").read_text().splitlines())
            rows = (model.tokenizer(text, truncation=True, max_length=ctx)["input_ids"] for text in texts)
            rows = list(itertools.islice((ids for ids in rows if len(ids) == ctx), n))
            if len(rows) < n:
                raise Refuse(f"{folder}/{topic}/{split}.jsonl has {len(rows)} texts of {ctx} tokens, {n} are wanted")
            tokens = torch.tensor(rows)
            found |= {f"{topic}_{part}_tokens": tokens, f"{topic}_{part}_acts": torch.cat([bench.at_hook(t).cpu() for t in tokens.split(LLM_BATCH)])}
        counts = torch.bincount(bench.acts.shard(0)["tokens"].long(), minlength=model.cfg.d_vocab) + 1.0
        return {**found, "unigram": counts / counts.sum()}

    def batches(self, topic, part):
        n = self.bench.at_once(self.kept[f"{topic}_{part}_tokens"].shape[1], 2**22)
        for x, tokens in zip(*(self.kept[f"{topic}_{part}_{k}"].split(n) for k in ("acts", "tokens"))):
            yield x.to(self.bench.device), tokens.to(self.bench.device)

    @torch.no_grad()
    def predict(self, x, tokens, which):
        """Losses [number of `which`] of those of the predictions [n, ctx - 1] that are asked for, with x [n, ctx, d_in] at the hook."""
        stream = self.bench.behind(x)[:, :-1][which]
        found = [-self.bench.logits(rows)[0].log_softmax(-1).gather(-1, target)
                 for rows, target in self.bench.blocks(stream, tokens[:, 1:][which][:, None])]
        return torch.cat(found)[:, 0]

    def rates(self, sae, topic):
        """How often each latent fires, on tokens that are not special (SAEBench's get_feature_activation_sparsity)."""
        special = torch.tensor([i for i in set(self.bench.model.tokenizer.all_special_ids)], device=self.bench.device)
        fires, n = 0, 0
        for x, tokens in self.batches(topic, "select"):
            real = ~torch.isin(tokens, special)
            acts, n = sae.codes(x[real]), n + real.sum()
            fires = fires + (acts.latents[acts.values > 0].bincount(minlength=sae.cfg.d_sae) if isinstance(acts, Codes) else (acts > 0).sum(0))
        return (fires / n).cpu().numpy()

    def clamp(self, sae, config):
        """[{multiplier, n_features, retain_threshold, and of either topic the loss and the share known}] of all settings."""
        from sae_bench.evals.unlearning.utils.feature_activation import get_top_features
        from sae_bench.evals.unlearning.utils.intervention import anthropic_clamp_resid_SAE_features
        forget, retain = self.rates(sae, "forget"), self.rates(sae, "retain")
        tried = []
        for threshold in config["retain_thresholds"]:
            top = get_top_features(forget, retain, threshold)
            tried += [{"retain_threshold": threshold, "latents": [int(i) for i in top[:n]], "n_features": len(top[:n]), "multiplier": m}
                      for n in config["n_features_list"] for m in config["multipliers"]]
        for topic in ("forget", "retain"):
            more = [0.0] * len(tried)
            for (x, tokens), clean in zip(self.batches(topic, "score"), self.clean[topic]):
                acts = sae.encode(x)                                          # once for all settings
                for few, settings in itertools.groupby(range(len(tried)), lambda i: tried[i]["latents"]):
                    own, names = acts[..., few], few
                    seen = SimpleNamespace(encode=lambda _: acts.clone(), decode=sae.decode)
                    if sae.linear:                                            # all other latents give the same to x and to y
                        rows, names = sae.W_dec[few], list(range(len(few)))
                        seen = SimpleNamespace(encode=lambda _: own.clone(), decode=lambda f: f @ rows)
                    fires = (own > 0).any(-1)
                    fires[:, 0] = False                                       # SAEBench leaves the first token alone
                    later = (fires.cumsum(1) > 0)[:, :-1]                     # other predictions know of no clamped token
                    for i in settings:
                        y = anthropic_clamp_resid_SAE_features(x, None, seen, names, float(tried[i]["multiplier"])) if few else x
                        more[i] += (self.predict(y, tokens, later) - clean[later]).sum().item()
            known = self.losses[topic]
            for t, rise in zip(tried, more):
                t[f"{topic}_loss"] = known["clean_loss"] + rise / self.kept[f"{topic}_score_tokens"][:, 1:].numel()
                t[f"{topic}_known"] = (known["unigram_loss"] - t[f"{topic}_loss"]) / (known["unigram_loss"] - known["clean_loss"])
        return tried


BENCH["unlearning"] = BenchEval("sae_bench.evals.unlearning.eval_output:UnlearningEvalOutput", unlearning_settings, bench_unlearning,
                                [("unlearn.", "unlearning_score")])


# ---- SAEBench's RAVEL, autointerp and sae-probes: they take long, or money, and run where --eval names them ------------------------------

ASKED = ("ravel", "autointerp", "sae_probes")
RAVEL = "adamkarvonen/ravel_prompts"             # its data set: ravel_ENTITY_{attribute_to_prompts,entity_attributes,...}.json
RAVEL_BATCH = 8                                  # SAEBench's own for Gemma-2-2B; a mask's training depends on it
JUDGE = "gpt-4o-mini"                            # whom SAEBench asks
LATENTS = 1000                                   # how many latents are judged, two questions each


@contextlib.contextmanager
def workplace(links):
    """A temporary working folder with links {path in it: target}: SAEBench's relative paths lead there, and its configs keep its own."""
    with tempfile.TemporaryDirectory() as folder:
        for path, target in links.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).symlink_to(target)
        with contextlib.chdir(folder):
            yield Path(folder)


def only(found, bench, run):
    """The one result that a call of SAEBench's run_eval gave, as JSON has it."""
    return json.loads(json.dumps(found[f"{bench.label(run)}_custom_sae"]))


def probes_settings(acts):
    from sae_probes import DATASETS
    return {"sae_probes": importlib.metadata.version("sae-probes"), "datasets": list(DATASETS)}


def bench_sae_probes(bench, runs, settings, failures):
    """Probes on the latents at the last token of a text, on the 113 data sets that the package sae-probes carries (Kantamneni 2025). The
    model's activations and the probes on them are made once, with an SAE of few latents."""
    from sae_bench.evals.sparse_probing_sae_probes import SparseProbingSaeProbesEvalConfig, main
    from sae_probes import generate_model_activations as reading
    folder, tokenizer = bench.folder("sae_probes", settings), bench.model.tokenizer
    real, model_acts, baselines = reading._process_activations, "sparse_probing_sae_probes--model_acts_cache", f"baseline_results_{bench.name}"

    def read(**asked):
        """Texts longer than the model's context lose their start, as texts of more than 1,024 tokens do there."""
        return real(**{**asked, "max_seq_len": min(asked["max_seq_len"], bench.model.cfg.n_ctx), "batch_size": max(1, int(LLM_BATCH * bench.share))})

    def call(run):
        config = SparseProbingSaeProbesEvalConfig(model_name=bench.name, random_seed=SEED, dataset_names=settings["datasets"])
        with (bench.seams(SEED, log=folder / "log.txt"), replaced(reading, "_process_activations", read),
              replaced(tokenizer, "padding_side", "right"), replaced(tokenizer, "truncation_side", "left")):
            return only(main.run_eval(config, [(bench.label(run), BenchSAE(bench, run))], str(bench.device), "results"), bench, run)

    if not (folder / "shared").exists():
        print(f"{bench.acts.folder}: sae_probes: activations and probes that all runs share")
        shutil.rmtree(folder / "making", ignore_errors=True)
        (folder / "making").mkdir()
        with contextlib.chdir(folder / "making"):
            call(few_latents(bench, bench.device))
        (folder / "making").rename(folder / "shared")
    shared = folder / "shared" / "artifacts"
    for run in runs:
        made = []
        with blamed(run, failures, "sae_probes"), workplace({
                f"artifacts/{model_acts}": shared / model_acts,
                f"artifacts/sparse_probing_sae_probes/{baselines}": shared / "sparse_probing_sae_probes" / baselines}):
            result = call(run)
            missing = set(settings["datasets"]) - {d["dataset_name"] for d in result["eval_result_details"]}
            if missing:
                raise Refuse(f"sae-probes gives no figure for {', '.join(sorted(missing))}")
            metrics = {k: v for part in result["eval_result_metrics"].values() for k, v in part.items() if v is not None}
            made = [(result, {"metrics": metrics, "guards": probing_guards(metrics, None)})]
        yield from ((run, *m) for m in made)


def ravel_settings(acts):
    from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
    data = on_disk_or_hub([RAVEL])
    if not data:
        raise Unfit(f"no prompts: {LABELLED / RAVEL} is missing, the hub is out of reach")
    return {"data": data, "config": {"llm_batch_size": RAVEL_BATCH, "entity_attribute_selection": RAVELEvalConfig().entity_attribute_selection}}


def bench_ravel(bench, runs, settings, failures):
    """Whether latents of a city's country are others than those of its language: a mask of latents is trained so that exchanging them between
    two prompts changes one attribute and leaves the others (Huang 2024). The model's own answers are made once; SAEBench's code for it takes
    the Hugging Face model, which is loaded beside."""
    import transformers
    from sae_bench.evals.ravel import eval_config, instance, main
    from sae_bench.sae_bench_utils import activation_collection
    folder, selection = bench.folder("ravel", settings), settings["config"]["entity_attribute_selection"]
    bench.model.to("cpu", print_details=False)                                # one model at a time in a GPU's memory
    language = LanguageModel(bench.acts.meta, bench.device)
    model = language.model.requires_grad_(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench.acts.meta["model"]["path"])
    config = lambda **more: eval_config.RAVELEvalConfig(model_name=bench.name, llm_dtype=bench.dtype, random_seed=SEED, **{**settings["config"], **more})
    always = lambda thing: SimpleNamespace(from_pretrained=lambda *_, **__: thing)
    try:
        with contextlib.ExitStack() as stack:
            for target, name, value in ((main, "AutoModelForCausalLM", always(model)), (main, "AutoTokenizer", always(tokenizer)),
                                        (main, "LLM_NAME_MAP", {bench.name: bench.name}), (model, "train", lambda mode=True: model),     # no dropout
                                        (activation_collection, "get_module", lambda *_: Tupled(language.point))):
                stack.enter_context(replaced(target, name, value))
            if not (folder / "shared").exists():
                print(f"{bench.acts.folder}: ravel: what the model answers, which all runs share")
                shutil.rmtree(folder / "making", ignore_errors=True)
                (folder / "making" / "base").mkdir(parents=True)
                ravel_prompts(folder / "making" / "base", selection, settings["data"][RAVEL])
                with bench.seams(SEED, log=folder / "log.txt"), torch.no_grad():
                    for entity, attributes in selection.items():
                        full = instance.RAVELInstance.create_from_files(
                            config(llm_batch_size=8 * RAVEL_BATCH, artifact_dir=str(folder / "making")), entity, str(folder / "making"),
                            tokenizer, model, bench.name, attributes)
                        known = {a: [p.attribute_label for p in full.prompts if p.attribute_type == a] for a in attributes}
                        few = [f"{len(labels)} prompts and {len(set(labels))} answers of {a}" for a, labels in known.items() if len(set(labels)) < 2]
                        if few:
                            raise Unfit(f"of {entity} the model knows only {', '.join(few)}")
                        full.create_and_save_filtered_dataset(str(folder / "making"), config().top_n_entities)
                (folder / "making").rename(folder / "shared")
            for run in runs:
                made = []
                with blamed(run, failures, "ravel"), workplace({"artifacts/ravel": folder / "shared"}), bench.seams(SEED, log=folder / "log.txt"):
                    result = only(main.run_eval(config(), [(bench.label(run), BenchSAE(bench, run))], str(bench.device), "results"), bench, run)
                    metrics = result["eval_result_metrics"]["ravel"]
                    if not all(map(math.isfinite, metrics.values())):
                        raise Refuse(f"too few prompts are known for a score: {metrics}")
                    made = [(result, {"metrics": metrics, "guards": []})]
                yield from ((run, *m) for m in made)
    finally:
        del language, model
        bench.model.to(bench.device, print_details=False)


def ravel_prompts(folder, selection, version):
    """RAVEL's files of these entities into `folder`, from labelled/ or the hub."""
    here = LABELLED / RAVEL
    if not here.exists():
        import huggingface_hub
        huggingface_hub.snapshot_download(RAVEL, repo_type="dataset", revision=version, local_dir=folder, allow_patterns="*.json")
        return
    for name in (f"ravel_{entity}_{part}.json" for entity in selection
                 for part in ("attribute_to_prompts", "prompt_to_split", "entity_attributes", "entity_to_split")):
        if not (here / name).exists():
            raise Refuse(f"{here / name} is missing: copy all of the data set {RAVEL}")
        shutil.copy(here / name, folder / name)


class Tupled:
    """A module whose forward hooks see a tuple, as SAEBench's do, whatever it returns."""

    def __init__(self, module):
        self.module = module

    def register_forward_hook(self, hook):
        return self.module.register_forward_hook(
            lambda module, args, out: hook(module, args, out) if isinstance(out, tuple) else hook(module, args, (out,))[0])


def autointerp_settings(acts):
    if not os.environ.get("OPENAI_API_KEY"):
        raise Unfit("it asks a language model of OpenAI's about each latent, and there is no OPENAI_API_KEY")
    contexts, ctx = acts.val()["tokens"].shape
    return {"judge": [JUDGE, os.environ.get("OPENAI_BASE_URL", "OpenAI")],
            "config": {"n_latents": LATENTS, "llm_context_size": ctx, "total_tokens": contexts * ctx, "dataset_name": str(acts.folder)}}


def bench_autointerp(bench, runs, settings, failures):
    """A language model names what a latent fires on, and says from the name alone in which other texts it fires (Paulo 2024). The texts are the
    held-out contexts. It is asked through OpenAI's own client, which OPENAI_API_KEY and OPENAI_BASE_URL configure."""
    from sae_bench.evals.autointerp import eval_config, main
    folder, tokens = bench.folder("autointerp", settings), bench.acts.val()["tokens"].long()
    for run in runs:
        made = []
        with (blamed(run, failures, "autointerp"), workplace({}), bench.seams(SEED, log=folder / "log.txt"),
              replaced(main.dataset_utils, "load_and_tokenize_dataset", lambda *_: tokens)):
            config = eval_config.AutoInterpEvalConfig(model_name=bench.name, llm_dtype=bench.dtype, random_seed=SEED,
                                                      llm_batch_size=max(1, int(LLM_BATCH * bench.share)), **settings["config"])
            found = main.run_eval(config, [(bench.label(run), BenchSAE(bench, run))], str(bench.device), os.environ["OPENAI_API_KEY"], "results")
            result = only(found, bench, run)
            judged, metrics = len(result["eval_result_unstructured"]), result["eval_result_metrics"]["autointerp"]
            if judged < 2:
                raise Refuse(f"{judged} latents could be judged: too few fire, or {JUDGE} answers in other words than it is asked to")
            few = [{"id": "G11", "level": "warn", "message": f"{judged} latents judged, not {LATENTS}"}] if judged < LATENTS else []
            made = [(result, {"metrics": {**metrics, "latents": judged}, "guards": few})]
        yield from ((run, *m) for m in made)


BENCH |= {
    "ravel": BenchEval("sae_bench.evals.ravel.eval_output:RAVELEvalOutput", ravel_settings, bench_ravel,
                       [("RAVEL", "disentanglement_score")], "eval_result_unstructured"),
    "autointerp": BenchEval("sae_bench.evals.autointerp.eval_output:AutoInterpEvalOutput", autointerp_settings, bench_autointerp,
                            [("autoint.", "autointerp_score")], "eval_result_unstructured"),
    "sae_probes": BenchEval("sae_bench.evals.sparse_probing_sae_probes.eval_output:SparseProbingSaeProbesEvalOutput", probes_settings, bench_sae_probes,
                            [("s.probe@1", "sae_top_1_test_accuracy"), ("s.probe@5", "sae_top_5_test_accuracy")])}


# ---- controls ---------------------------------------------------------------------------------------------------------------------------


def controls(acts, runs, device):
    """SAEs that have learned nothing, as wide and as sparse as the runs (median of their L0 on training rows), to be evaluated as they are.

    untrained: the start of the base with ReLU; random: random directions, the encoder their transpose, TopK; pca: that many principal
    components, a latent for either sign of each; mean: the mean of the training rows. Seed 0."""
    sample = acts.shard(0)["acts"][:SAMPLE_ROWS].to(device).float() * acts.scale
    with torch.no_grad():
        l0s = []
        for run in runs:
            with on_device(device, [run]):
                l0s.append(sum((run.sae(part).acts > 0).sum().item() for part in sample[:4096].split(512)) / len(sample[:4096]))
        l0 = max(1, round(torch.tensor(l0s).median().item()))
        d_sae, mean = int(torch.tensor([r.sae.d_sae for r in runs]).median()), sample.mean(0)
        rank = min(l0, acts.d_in)
        plans = {"untrained": dict(activation="relu", d_sae=d_sae, l0=float(l0)), "random": dict(activation="topk", d_sae=d_sae, l0=float(l0)),
                 "pca": dict(activation="relu", d_sae=2 * rank, l0=float(rank)), "mean": dict(activation="relu", d_sae=1, l0=1.0)}
        made = []
        for kind, settings in plans.items():
            sae = SAE(acts.d_in, 0, 0, **settings).to(device)
            sae.scale.fill_(acts.scale)
            sae.b_dec.copy_(mean)
            if kind == "untrained":
                sae.init_from_data(sample)
            if kind == "pca":
                centred = (sample - mean).double()
                axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :rank].T.to(sample)
                sae.W_dec.copy_(torch.cat([axes, -axes]))
                sae.W_enc.copy_(sae.W_dec.T)
            if kind == "mean":
                sae.W_dec.zero_()
                sae.W_enc.zero_()
            weights = b"".join(v.cpu().numpy().tobytes() for v in sae.state_dict().values())
            config = {"control": kind, "steps": 0, "seed": 0, "d_in": acts.d_in, "settings": {**SAE.settings(), **settings},
                      "sae_checksum": checksum(weights)}
            made.append(Run(Path("runs") / f"controls-{acts.folder.name}" / kind, sae.eval().cpu(), config))
    return made


# ---- results ----------------------------------------------------------------------------------------------------------------------------


def envelope(name, run, acts, contexts=None, settings=None):
    """What a result belongs to; a result whose envelope differs in any of these is made again."""
    return {"eval": name, "version": VERSION, "run": run.name, "control": "control" in run.config, "sae_checksum": run.config["sae_checksum"],
            "acts": acts.folder.name, "acts_checksum": acts.checksum, "model": acts.meta["model"], "layer": acts.meta["layer"],
            "hook_name": acts.meta["hook_name"], "d_in": acts.d_in, "d_sae": run.sae.d_sae,
            **({"siblings": {folder.name: said for folder, said in siblings(run).items()}} if name == "stability" else {}),
            **({"settings": settings} if settings else {"contexts": contexts})}


def stored(name, run, acts, contexts=None, settings=None):
    """The result in the run's folder if it is this very one, else None."""
    with contextlib.suppress(Refuse):
        result = read_json(run.folder / "eval" / f"{name}.json")
        if all(result.get(k) == v for k, v in envelope(name, run, acts, contexts, settings).items()):
            return result


def plain(value):
    """A metric as strict JSON takes it: what is not finite is null (and guard G04)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def alive(runs, failures):
    return [r for r in runs if r.folder not in failures]


@contextlib.contextmanager
def blamed(run, failures, name=None):
    """What goes wrong with one run ends its evaluation alone; with a name, that evaluation alone."""
    try:
        yield
    except Exception as e:
        if is_out_of_memory(e) or is_machines(e):
            raise
        blame(run, failures, name, e)


def is_machines(e):
    """Whether it is no run's fault: a full disk, a file that can't be written, or a Ctrl-C."""
    return is_disk_full(e) or isinstance(e, Refuse) and e.code == 4 or interrupt.came


def blame(run, failures, name, e):
    reason = str(e) if isinstance(e, Refuse) else f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}"
    report((run.folder, name) if name else run.folder, failures, reason)


def report(which, failures, reason):
    """which: a run's folder, or (folder, evaluation)."""
    failures[which] = reason
    print("error: " + (f"{which[0]}: {which[1]} failed: " if isinstance(which, tuple) else f"{which}: ") + reason, file=sys.stderr)


def load(folders, failures):
    """The finished runs of `folders`, in host memory; the others are named, with the reason."""
    runs = []
    for folder in folders:
        try:
            config = read_json(folder / "config.json")
            if config["status"] != "done":
                print(f"{folder}: skipped, " + (f"failed: {config['reason']}" if config["status"] == "failed" else "its training is not finished"))
                continue
            runs.append(Run(folder, *load_run(folder)))
        except Refuse as e:
            failures[folder] = str(e)
            print(f"error: {e}", file=sys.stderr)
    return runs


def portions(runs):
    """The runs in order, in lists whose SAEs together have up to ON_DEVICE bytes: these are on the device at the same time."""
    lists, room = [], 0
    for run in runs:
        size = sum(v.nbytes for v in run.sae.state_dict().values())
        if size > room:
            lists.append([])
            room = ON_DEVICE
        lists[-1].append(run)
        room -= size
    return lists


@contextlib.contextmanager
def on_device(device, runs):
    """Inside, the runs' SAEs are on the device."""
    for run in runs:
        run.sae.to(device)
    try:
        yield
    finally:
        for run in runs:
            run.sae.to("cpu")


def evaluate(acts, runs, names, force, contexts, device, failures):
    """Make the results that are not there yet, one pass over the held-out data per evaluation for all runs."""
    n = n_contexts(acts, contexts)
    todo = {name: [r for r in runs if force or not stored(name, r, acts, n)] for name in names}
    if not any(todo.values()):
        return
    held_out = HeldOut(acts, device, contexts)
    for name in names:
        started = time.perf_counter()
        results = in_memory(EVALS[name], held_out, alive(todo[name], failures), failures) if todo[name] else {}
        seconds = time.perf_counter() - started
        for run, result in results.items():
            with take_lock(run.folder, wait=True) if "control" in run.config else contextlib.nullcontext():    # other calls write it too
                if "rates" in result:
                    meta = {"sae_checksum": run.config["sae_checksum"], "rows": result["n_rows"]}
                    write_tensors(run.folder / "eval" / "rates.safetensors", {"rate": result.pop("rates")}, meta)
                write_json(run.folder / "eval" / f"{name}.json", {**envelope(name, run, acts, n), "seconds": seconds, "shared_by": len(results),
                                                                  "versions": versions(), **result})


def in_memory(evaluation, held_out, runs, failures):
    """The evaluation's results; begun again in smaller batches for as long as memory does not suffice."""
    while True:
        try:
            return evaluation(held_out, runs, failures)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
        held_out.halve()                                                      # outside of `except`, which keeps the tensors alive


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__,
            **{name: importlib.metadata.version(name) for name in ("transformers", "sae_lens", "sae_bench", "transformer_lens") if name in sys.modules}}


COLUMNS = [("L0", "l0", ".2f"), ("expl.var", "explained_variance", ".4f"), ("cosine", "cosine", ".4f"), ("l2ratio", "l2_ratio", ".3f"),
           ("dead", "dead", ".1%"), ("CE rec.", "ce_recovered", ".4f"), ("KL", "kl_sae", ".4f"), ("MCC", "mcc", ".3f"), ("F1", "f1", ".3f"),
           ("absorb.", "absorption", ".3f")]


def table(runs, acts, contexts):
    """One line per run and control with a core result: its metrics and the guards that fired (! where they make it invalid); "" if none has."""
    results = [(run, stored("core", run, acts, contexts)) for run in runs]
    results = [(run, r) for run, r in results if r]
    if not results:
        return ""
    columns = [c for c in COLUMNS if any(c[1] in r["metrics"] for _, r in results)]
    width = max([3, *(len(label(run)) for run, _ in results)])
    lines = [f"{'run':{width}}" + "".join(f"  {title:>8}" for title, *_ in columns) + "  guards"]
    for run, r in results:
        cells = (r["metrics"].get(key) for _, key, _ in columns)
        fired = " ".join(dict.fromkeys(g["id"] + "!" * (g["level"] == "fatal") for g in r["guards"])) or "-"
        shown = "".join(f"  {'-' if v is None else format(v, spec):>8}" for v, (_, _, spec) in zip(cells, columns))
        lines.append(f"{label(run):{width}}{shown}  {fired}")
    fatal = [f"{label(run)}: invalid, {g['id']} {g['message']}" for run, r in results if "control" not in run.config
             for g in r["guards"] if g["level"] == "fatal"]
    return "\n".join(lines + fatal)


def label(run):
    return f"control: {run.name}" if "control" in run.config else run.name


def main():
    p = Parser(__doc__)
    p.add_argument("runs", nargs="*", help="folders (default: all under runs/)")
    usual = [name for name in BENCH if name not in ASKED]
    p.add_argument("--eval", nargs="+", choices=[*EVALS, *BENCH], default=[*EVALS, *usual], metavar="NAME",
                   help=f"which evaluations (default: all that fit the model): {', '.join(EVALS)}, and SAEBench's {', '.join(usual)}; "
                        f"only if named: {', '.join(ASKED)}")
    p.add_argument("--controls", action="store_true", help="evaluate what has learned nothing as well, as wide and sparse as the runs")
    p.add_argument("--contexts", type=whole, metavar="N", help="held-out contexts to use (default: all)")
    p.add_argument("--force", action="store_true", help="evaluate again what is there already")
    p.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    args = p.parse_args()
    device = pick_device(args.device)
    asked = lambda names: [n for n in args.eval if n in names]

    failures = {}
    runs = load(run_folders(args.runs), failures)
    for name in dict.fromkeys(r.config["acts"] for r in runs):
        acts = Acts(Path("acts") / name)
        group = [r for r in runs if r.config["acts"] == name]
        for run in [r for r in group if r.sae.d_in != acts.d_in]:
            failures[run.folder] = f"trained on rows of {run.sae.d_in}, {acts.folder} has rows of {acts.d_in} (G10)"
            print(f"error: {run.folder}: {failures[run.folder]}", file=sys.stderr)
        group = alive(group, failures)
        locks = [take_lock(run.folder) for run in group]                      # before the language model is loaded
        group += controls(acts, group, device) if args.controls and group else []
        for part in portions(group):
            with on_device(device, part):
                evaluate(acts, part, asked(EVALS.keys() - {"features"}), args.force, args.contexts, device, failures)
                evaluate_saebench(acts, alive(part, failures), asked(BENCH), args.force, device, failures)
                evaluate(acts, alive(part, failures), asked(["features"]), args.force, args.contexts, device, failures)     # shows the absorbed
        del locks
        n = n_contexts(acts, args.contexts)
        if shown := table(group, acts, n):
            print(f"\n{acts.folder}, {n} held-out {'contexts' if acts.meta['source'] == 'model' else 'rows'}\n{shown}")
        if shown := saebench_table(group, acts):
            print(f"\n{shown}")
    return 5 if failures else 0


if __name__ == "__main__":
    run_script(main)

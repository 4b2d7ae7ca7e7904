"""Draw and tabulate runs: from the run folders alone, without the model or the data.

    python 04_plot.py                                    all runs under runs/
    python 04_plot.py runs/topk-s0 runs/baseline-s0 --out plots/two
    python 04_plot.py --metric absorption_full           verdicts about this metric, not explained variance

Reads runs/NAME/{config.json, metrics.jsonl, eval/*} and the controls beside them, runs/controls-ACTS/KIND/eval/core.json. Writes
    plots/report.html             all of it on one page, with a sortable table and what latents fire on; needs no network
    plots/results.md              one row per variant and setting: mean +- sd over seeds, paired differences, verdict, guards; also printed
    plots/verdicts.png            the differences to the baseline and to the parent with their intervals
    plots/pareto.png              explained variance and recovered loss against L0
    plots/ablation.png            quality against each swept setting
    plots/NAME.png                training, sparsity, absorption, probing, geometry, stability ...: the table NOTES in this file says what is in which
A row of panels per cache of activations. Runs that a guard calls invalid stand in the table, marked, and nowhere else.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # a Ctrl-C while libraries load just ends it; run_script() takes over

import base64
import functools
import html
import io
import json
import math
import re
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sae import Parser, Refuse, check_name, read_json, read_log, read_tensors, run_folders, run_script, take_lock, write_file

SAME_L0 = 0.05               # runs are compared if their L0 differs by no more than this share
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C9A"]      # told apart by the colour-blind (Okabe and Ito)
MARKERS = "osD^vP*X<>"
STYLES = ["-", "--", ":", "-."]
STYLE = {"figure.dpi": 110, "savefig.dpi": 160, "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E5E5E5", "grid.linewidth": 0.6,
         "axes.axisbelow": True, "axes.edgecolor": "#666666", "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False}


# ---- statistics: is a difference more than chance? ----------------------------------------------------------------------------------
# numpy only; `deltas` [..., n] are paired differences, one a seed; every function works on a whole stack of experiments at once

LEVEL = 0.05                 # share of experiments without a true difference in which one is called
MIN_SEEDS = 3                # fewer give no interval worth the name: with 2 it is 12.7 standard errors wide to either side
CLAIM_SEEDS = 5              # fewer are a screening: what they find is to be confirmed
FLIP_SEEDS = 6               # from here on the exact sign-flip test can reach 5 %, and must agree


def t_tail(t, df):
    """P(|T| > t) of Student's t with df degrees of freedom (a whole number): the finite series of Abramowitz and
    Stegun, 26.7.3 and 26.7.4."""
    angle = np.arctan2(np.abs(t), math.sqrt(df))
    term, total = np.cos(angle) if df % 2 else np.ones_like(angle), 0.0
    for k in range(df % 2, df - 1, 2):
        total = total + term
        term = term * (k + 1) / (k + 2) * np.cos(angle) ** 2
    inside = 2 / math.pi * (angle + np.sin(angle) * total) if df % 2 else np.sin(angle) * total
    return np.clip(1 - inside, 0, 1)


@functools.cache
def t_quantile(df, level=LEVEL):
    """The t with P(|T| > t) = level, by bisection; 12.71, 4.30, 2.78 for 1, 2, 4 degrees of freedom at 5 %."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > level else (low, middle)
    return high


def t_interval(deltas, level=LEVEL):
    """(mean, low, high): the interval that holds the true mean with probability 1 - level if the deltas are normal; infinite for one."""
    deltas = np.asarray(deltas, float)
    n, mean = deltas.shape[-1], deltas.mean(-1)
    half = t_quantile(n - 1, level) * deltas.std(-1, ddof=1) / math.sqrt(n) if n > 1 else np.full_like(mean, np.inf)
    return mean, mean - half, mean + half


def t_test(deltas):
    """Two-sided p of no true difference, if the deltas are normal; 1 for one seed, and where all deltas are the same (inert seeds)."""
    deltas = np.asarray(deltas, float)
    n, mean = deltas.shape[-1], deltas.mean(-1)
    error = deltas.std(-1, ddof=1) / math.sqrt(n) if n > 1 else np.zeros_like(mean)
    varies = error > 1e-12 * np.abs(mean)
    return np.where(varies, t_tail(mean / np.where(varies, error, 1), max(n - 1, 1)), 1.0)


def sign_flip(deltas):
    """Exact two-sided p of no true difference: the share of the 2^n ways to flip the deltas' signs whose mean is as far from 0 or further.
    It assumes nothing but that a delta is as likely as its negative. The smallest p is 2 / 2^n: 0.25 for 3 seeds, 0.031 for 6."""
    deltas = np.asarray(deltas, float)
    sums = np.zeros(deltas.shape[:-1] + (1,))
    for i in range(deltas.shape[-1]):
        d = deltas[..., i:i + 1]
        sums = np.concatenate([sums + d, sums - d], -1)
    seen = np.abs(deltas.sum(-1, keepdims=True))
    return (np.abs(sums) >= seen - 1e-12 * np.abs(deltas).sum(-1, keepdims=True)).mean(-1)


def p_value(deltas):
    """The p that a verdict rests on: the t test's, from MIN_SEEDS on. From FLIP_SEEDS on the exact sign-flip test must agree (p <= LEVEL,
    not corrected for the number of variants: 2 / 2^n could never pass that), else p is at least its. With fewer seeds nothing checks that
    the deltas are normal, and evenly spread ones would be called in 8 % of experiments at 3 seeds, 7 % at 5: p is doubled, which makes
    that 4 %."""
    deltas = np.asarray(deltas, float)
    n = deltas.shape[-1]
    if n < MIN_SEEDS:
        return np.ones(deltas.shape[:-1])
    p = t_test(deltas)
    if FLIP_SEEDS <= n <= 20:                                                 # beyond, 2^n sums; the mean of so many is normal enough
        flip = sign_flip(deltas)
        p = np.where(flip > LEVEL, np.maximum(p, flip), p)
    return np.minimum(1, 2 * p) if n < FLIP_SEEDS else p


def holm(p):
    """Adjusted p [..., m] of m comparisons made together (Holm 1979): called at 5 %, there is a false one among them in at most 5 %."""
    p = np.asarray(p, float)
    m, order = p.shape[-1], np.argsort(p, -1)
    adjusted = np.minimum(1, np.maximum.accumulate(np.take_along_axis(p, order, -1) * np.arange(m, 0, -1), -1))
    return np.take_along_axis(adjusted, np.argsort(order, -1), -1)


@functools.cache
def detectable(n, tried=1):
    """The true difference, in standard deviations of the deltas over seeds, that is called in at least 80 % of experiments of n seeds, at
    the strictest step of Holm's correction for `tried` variants. By simulation (82 % of 4,000 draws); infinite below MIN_SEEDS."""
    if n < MIN_SEEDS:
        return math.inf
    draws, low, high = np.random.default_rng(0).standard_normal((4000, n)), 0.0, 200.0
    test = p_value if n <= 8 else t_test                                      # with more seeds the sign-flip test agrees, and costs 2^n
    while high > 1.001 * low:
        middle = (low + high) / 2
        found = (test(draws + middle) * tried <= LEVEL).mean() >= 0.82
        low, high = (low, middle) if found else (middle, high)
    return high


def bootstrap(units, draws=2000):
    """95 % interval of the mean of `units` [n seeds, m units], differences for each letter or data set: seeds are drawn with replacement,
    and the units, the same ones for all seeds."""
    units = np.asarray(units, float)
    (n, m), rng = units.shape, np.random.default_rng(0)
    seeds = rng.multinomial(n, np.full(n, 1 / n), draws) / n
    letters = rng.multinomial(m, np.full(m, 1 / m), draws) / m
    return tuple(np.quantile((seeds @ units * letters).sum(-1), [LEVEL / 2, 1 - LEVEL / 2]).tolist())


def word(mean, low, high, p, n, worth, better=1):
    """What can be said of a difference: better | worse | no difference seen | cannot tell.

    mean, low, high: its 95 % interval; p: adjusted; n: seeds; worth: the smallest difference that would matter; better: 1 if more is
    better, else -1. `no difference seen` is a finding: the whole interval is smaller than what would matter. One that holds both 0 and
    what would matter says nothing."""
    if p <= LEVEL and (low > 0 or high < 0):
        return ("better" if mean * better > 0 else "worse") + (f" ({n} seeds: screening)" if n < CLAIM_SEEDS else "")
    if n >= MIN_SEEDS and -worth < low and high < worth:
        return "no difference seen"
    return f"cannot tell ({n} seed{'s' * (n != 1)})"


# ---- runs -------------------------------------------------------------------------------------------------------------------------


class Run:
    """A run folder, or a control's: its config, what its evaluations measured (`metrics`, and `units`: the same for each letter or data
    set), why an evaluation has no numbers (`gaps`; `missing` for core), and the guards that fired."""

    def __init__(self, folder):
        self.folder = folder
        control = not (folder / "config.json").exists()
        self.core, self.missing = None, "not evaluated"
        if (folder / "eval" / "core.json").exists():
            self.core = read_json(folder / "eval" / "core.json", "acts", "metrics", "guards", "sae_checksum")
        self.config = {} if control else read_json(folder / "config.json", "acts", "variant", "status", "seed", "settings")
        self.acts = check_name(f"{folder}: acts", self.core["acts"] if control else self.config["acts"])
        self.variant = f"control: {folder.name}" if control else self.config["variant"]
        self.seed, self.settings = self.config.get("seed"), self.config.get("settings", {})
        self.name = self.variant if control else self.config["name"].removesuffix(f"-s{self.seed}")
        self.overrides = {k: v for k, v in self.settings.items() if f"-{k}={v}-" in f"{self.name}-"}     # by --set and --sweep, as its name says
        self.status = "done" if control else self.config["status"]
        if self.status != "done":
            self.core, self.missing = None, {"failed": "training failed"}.get(self.status, "training not finished")
        elif self.core and not control and self.core["sae_checksum"] != self.config["sae_checksum"]:
            self.core, self.missing = None, "evaluation is of older weights"
        if self.config.get("void") and not self.core:
            self.missing = f"void: {', '.join(self.config['void'])}"
        self.metrics, self.units, self.gaps = dict(self.core["metrics"]) if self.core else {}, {}, {}
        self.guards = list(self.core["guards"]) if self.core else []
        if self.status == "done":
            read_benchmarks(self)
        if not control and self.status == "done":
            if self.config.get("seconds") and self.config["steps"]:
                self.metrics["seconds"] = self.config["seconds"] * 1e6 / (self.config["steps"] * self.settings["batch_size"])
            judge(self)

    @property
    def fatal(self):
        return sorted({g["id"] for g in self.guards if g["level"] == "fatal"})

    @property
    def warned(self):
        return sorted({g["id"] for g in self.guards if g["level"] == "warn"})

    @property
    def valid(self):
        return bool(self.core) and not self.fatal

    def get(self, metric):
        return self.metrics.get(metric)

    def flag(self, bad, guard, level, message):
        """Record a guard, unless 03_eval.py did so already."""
        if bad and (guard, level) not in {(g["id"], g["level"]) for g in self.guards}:
            self.guards.append({"id": guard, "level": level, "message": message})


def find_runs(folders):
    """(runs, controls of their caches) from the folders given, or from all under runs/."""
    runs = [Run(f) for f in run_folders(folders)]
    for acts in {r.acts for r in runs}:
        mine = [r for r in runs if r.acts == acts]
        judge_together(mine)
        shorten_names(mine)
    places = sorted({r.folder.parent / f"controls-{r.acts}" for r in runs})
    return runs, [Run(p.parent.parent) for place in places for p in sorted(place.glob("*/eval/core.json"))]


def in_common(runs):
    """The settings that all runs have from --set, as their names say them."""
    return sorted(set.intersection(*({f"{k}={v}" for k, v in r.overrides.items()} for r in runs)))


def shorten_names(runs):
    """Leave out of the names of a cache's runs what the heading above them says: the cache, and the settings that all have in common."""
    said = in_common(runs)
    for r in runs:
        r.name = "-".join([r.variant, *(f"{k}={v}" for k, v in sorted(r.overrides.items()) if f"{k}={v}" not in said)])


def heading(acts, runs):
    return " ".join([acts] + ["with"] * bool(in_common(runs)) + in_common(runs))


def grouped(runs):
    """{name: the runs that differ in nothing but their seed} of one cache, baseline first, then by name and L0."""
    groups = {}
    for r in sorted(runs, key=lambda r: (r.variant != "baseline", natural(r.variant), r.settings.get("l0", 0), r.name, r.seed)):
        groups.setdefault(r.name, []).append(r)
    return groups


def swept(runs):
    """{(variant, setting): {the other settings in which the lines differ, in words: {value: runs}}} for the settings that take several values
    among a variant's runs, nothing else differing: a line for each combination of the others (--sweep of two settings)."""
    found = {}
    for variant in dict.fromkeys(r.variant for r in runs):
        mine = [r for r in runs if r.variant == variant]
        for key in dict.fromkeys(k for r in mine for k in r.overrides):
            lines = {}
            for r in (r for r in mine if key in r.settings):                  # a run from before the setting was added has no value
                others = tuple(sorted((k, v) for k, v in r.overrides.items() if k != key))
                lines.setdefault(others, {}).setdefault(r.settings[key], []).append(r)
            lines = [values for values in lines.values() if len(values) > 1]
            one = lambda values: next(iter(values.values()))[0].settings
            differ = [k for k in sorted({k for r in mine for k in r.overrides} - {key}) if len({str(one(values).get(k)) for values in lines}) > 1]
            lines.sort(key=lambda values: [(isinstance(v, str), v is None, v or 0) for v in map(one(values).get, differ)])
            if lines:
                found[variant, key] = {" ".join(f"{k}={one(values).get(k)}" for k in differ): values for values in lines}
    return found


# sae_bench's result files: metric -> (file, path to the mean, name of a unit in the details, its value there)
BENCHMARKS = {
    "absorption_full": ("absorption", ("mean", "mean_full_absorption_score"), "first_letter", "full_absorption_rate"),
    "absorption_fraction": ("absorption", ("mean", "mean_absorption_fraction_score"), "first_letter", "mean_absorption_fraction"),
    **{f"probe_{k}": ("sparse_probing", ("sae", f"sae_top_{k}_test_accuracy"), "dataset_name", f"sae_top_{k}_test_accuracy") for k in (1, 5, 20)},
    "scr": ("scr", ("scr_metrics", "scr_metric_threshold_20"), "dataset_name", "scr_metric_threshold_20"),
    "tpp": ("tpp", ("tpp_metrics", "tpp_threshold_20_total_metric"), "dataset_name", "tpp_threshold_20_total_metric"),
    "unlearning": ("unlearning", ("unlearning", "unlearning_score"), None, None),
}


def read_benchmarks(run):
    """Put what sae_bench measured into run.metrics and run.units; what is stale or was never measured becomes a word in run.gaps."""
    run.benchmarks = {}
    for name in dict.fromkeys(name for name, *_ in BENCHMARKS.values()):
        path = run.folder / "eval" / f"{name}.json"
        result = read_json(path) if path.exists() else None
        details = (result.get("eval_result_details") or result.get("eval_result_unstructured")) if result else None
        if result is None:
            run.gaps[name] = "no eval"
        elif (made := (run.config or run.core).get("sae_checksum")) and result.get("sae_checksum", made) != made:       # a control has no config
            run.gaps[name] = "stale"
        elif not details:
            run.gaps[name] = "not run (G11)"                                  # a score without what it is the mean of was not measured
        else:
            run.benchmarks[name] = result
            run.guards += result.get("guards", [])
    for metric, (name, path, unit, key) in BENCHMARKS.items():
        if name in run.benchmarks:
            value = functools.reduce(lambda d, k: d.get(k) or {}, path[:-1], run.benchmarks[name]["eval_result_metrics"]).get(path[-1])
            if value is not None and math.isfinite(value) and value != -1:    # sae_bench writes -1 for NaN
                run.metrics[metric] = value
                details = run.benchmarks[name].get("eval_result_details") or []
                run.units[metric] = {d[unit]: d[key] for d in details if unit and d.get(key) is not None}


# ---- guards: what makes a run's numbers invalid, as far as the run folders tell ------------------------------------------------------------
# 03_eval.py, which also sees weights and data, has recorded its own; here are those of the evaluations, those between runs, and a second
# reading of the recorded numbers with 03_eval.py's limits, so that figures that come from elsewhere are judged as well.

UNTRAINED_TOKENS = 60
NOT_SPARSE, NOT_SPARSE_SMALL, SMALL = 0.1, 0.25, 1024
FINGERPRINT = ["explained_variance", "mse", "cosine", "l0", "l1", "l2_ratio", "slope", "ce_recovered", "kl_recovered", "kl_sae",
               "decoder_max_cosine"]                    # two runs that agree in five of these to 6 digits are one


def judge(run):
    """The guards of one run (FATAL: it is left out of every comparison, ranking and scale)."""
    c, s, m, log = run.config, run.settings, run.metrics, read_log(run.folder, run.config)
    get = lambda key: math.nan if m.get(key) is None else m[key]
    ev, l0, d_in, d_sae = get("explained_variance"), get("l0"), c.get("d_in", math.inf), s["d_sae"]
    tokens, losses = c["steps"] * s["batch_size"], [line.get("loss") for line in log]
    run.flag(c.get("void"), "G36", "fatal", f"void since training: {', '.join(c.get('void', []))}")
    run.flag(l0 == 0, "G01", "fatal", "degenerate: L0 is 0")
    run.flag(ev <= 0, "G02", "fatal", f"worse than the mean: explained variance {ev:.3f}")
    run.flag(abs(ev - get("explained_variance_zero")) < 0.02 or get("l2_ratio") < 0.1, "G03", "fatal",
             f"zero output: l2 ratio {get('l2_ratio'):.3f}")
    not_finite = [k for k in FINGERPRINT if k in m and m[k] is None and not (k.startswith(("ce_", "kl_")) and "ce_clean" not in m)]
    run.flag(run.core and not_finite, "G04", "fatal", f"not finite: {', '.join(not_finite)}")
    run.flag(tokens / d_sae < UNTRAINED_TOKENS, "G05", "fatal", f"untrained: {c['steps']} steps, {tokens / d_sae:.0f} tokens per latent")
    stuck = len(losses) >= 10 and len(set(losses[-10:])) == 1 and losses[-1] is not None
    run.flag(stuck, "G06", "fatal", f"no learning: the same loss {losses[-1] if stuck else 0:g} in the last 10 logs")
    run.flag(len(log) >= 10 and all(line.get("grad_norm") == 0 for line in log[-10:]), "G06", "fatal", "no learning: the gradient is 0")
    run.flag(abs(l0 / d_sae - 0.5) < 0.05 and abs(get("cosine")) < 0.05, "G07", "fatal", f"untrained ReLU: L0 is {l0 / d_sae:.2f} of d_sae")
    share = NOT_SPARSE if d_sae >= SMALL else NOT_SPARSE_SMALL
    run.flag(l0 > d_in / 2 or l0 > share * d_sae, "G08", "fatal", f"not sparse: L0 {l0:.1f} of {d_sae} latents in {d_in} dimensions")
    run.flag(ev <= get("explained_variance_pca"), "G08", "fatal", f"no better than PCA of rank L0: {get('explained_variance_pca'):.3f}")
    lost = {k: get(k) for k in ("ce_recovered", "kl_recovered") if get(k) < 0}
    run.flag(lost, "G34", "fatal", f"worse than zero ablation: {', '.join(f'{k} {v:.3f}' for k, v in lost.items())}")
    for name, result in (({"core": run.core} if run.core else {}) | run.benchmarks).items():
        theirs = result.get("sae_cfg_dict") or {}
        want = {"d_in": d_in, "d_sae": d_sae, "layer": c.get("layer"), "hook_name": c.get("hook_name")}
        said = {k: result.get(k, theirs.get("hook_layer" if k == "layer" else k, v)) for k, v in want.items()}
        wrong = [f"{k} {v}" for k, v in said.items() if v != want[k]]
        run.flag(wrong, "G10", "fatal", f"mismatch: {name} was evaluated at {', '.join(wrong)}")
    run.flag("not run (G11)" in run.gaps.values(), "G11", "warn", f"not run: {', '.join(k for k, v in run.gaps.items() if 'G11' in v)}")
    accuracies = run.benchmarks["sparse_probing"]["eval_result_metrics"]["sae"] if "sparse_probing" in run.benchmarks else {}
    probes = [v for k, v in accuracies.items() if "top" in k and v]
    blind = bool(probes) and all(abs(v - 0.5) <= 0.02 for v in probes)
    run.flag(blind, "G12", "fatal", "probes see a constant: every k-sparse accuracy is 0.5")
    if "absorption" in run.benchmarks:
        letters = run.benchmarks["absorption"]["eval_result_details"]
        unsplit = all(d.get("num_split_features") == 1 for d in letters)
        run.flag(get("absorption_full") <= 0.005 and unsplit and (get("dead") > 0.5 or blind or l0 == 0), "G13", "fatal",
                 "absorption is vacuous: silent latents absorb nothing")
        small = [f"{len(letters)} letters"] * (len(letters) < 20) + [f"{d_sae} latents"] * (d_sae < 16384)
        size = (c.get("model") or {}).get("n_parameters") or math.inf
        small += [f"a model of {size / 1e6:.0f} M parameters"] * (size < 1e9)
        run.flag(small, "G14", "warn", f"absorption is out of its scope: {', '.join(small)}")
    depth = (c.get("layer") or 0) / ((c.get("model") or {}).get("n_layers") or math.inf)
    run.flag("unlearning" in m and depth >= 0.7, "G32", "warn", "unlearning is expected to be about 0 so late in the model")
    if log and c["steps"]:
        highest = max(line.get("lr") or 0 for line in log)
        run.flag(highest > 1.001 * s["lr"] or log[-1]["step"] != c["steps"], "G31", "fatal",
                 f"the log is of another run: {log[-1]['step']} steps of {c['steps']}, lr up to {highest:g} of {s['lr']:g}")
    if s.get("zscore_threshold") and s.get("zscore_gain") == 0 and s.get("zscore_start"):
        normal = d_sae * statistics.NormalDist().cdf(-s["zscore_start"])
        run.flag(0.9 < l0 / normal < 1.3, "G35", "warn", f"L0 is set by the rule, not learned: the normal's tail gives {normal:.1f}")


def judge_together(runs):
    """The guards that take several runs of a cache. G09: a run whose numbers are another's, to 6 digits, was not measured (or its idea does nothing);
    the earlier one in the order of the table keeps them. A run whose idea was switched off by hand may equal its parent: only a warning."""
    seen = []
    for run in [r for members in grouped(runs).values() for r in members if r.core]:
        numbers = {k: f"{run.get(k):.6g}" for k in FINGERPRINT if run.get(k)}
        for other, theirs in seen:
            same = [k for k in numbers if numbers[k] == theirs.get(k)]
            if len(same) >= 5 or run.config["sae_checksum"] == other.config["sae_checksum"]:
                off = run.seed == other.seed and bool(run.overrides.keys() - other.settings.keys())
                what = f"{len(same)} numbers equal to those of" if len(same) >= 5 else "the same weights as"
                run.flag(True, "G09", "warn" if off else "fatal", f"duplicate: {what} {other.config['name']}: a stale result, or an idea that never acted")
                break
        seen.append((run, numbers))
    took = {}
    for run in runs:
        for name, result in run.benchmarks.items() if run.status == "done" else ():
            took.setdefault(name, []).append((result.get("seconds"), run))
    for name, pairs in took.items():
        known = [(seconds, run) for seconds, run in pairs if seconds]
        for seconds, run in known:
            if seconds < 5 and statistics.median(s for s, _ in known) > 60:
                run.flag(True, "G11", "warn", f"not run: {name} took {seconds:.1f} s, minutes elsewhere")
                run.gaps[name] = "not run (G11)"
                for metric in [k for k, (file, *_) in BENCHMARKS.items() if file == name]:
                    run.metrics.pop(metric, None)


# ---- comparisons: paired by seed, at the same L0 ----------------------------------------------------------------------------------------


class Metric(NamedTuple):
    key: str
    title: str
    digits: int
    better: int = 0          # 1: more is better, -1: less; 0: described, not compared
    worth: float = 0.0       # the smallest difference that would matter ...
    relative: bool = False   # ... as a share of what it is compared with
    noise: float = 0.0       # standard deviation when the same SAE is evaluated again


METRICS = [
    Metric("l0", "L0", 2),
    Metric("explained_variance", "EV", 4, 1, 0.01),
    Metric("ce_recovered", "CE rec.", 4, 1, 0.01),                  # SAEBench's own tolerance; architectures differ by 0.006
    Metric("kl_sae", "KL", 4, -1, 0.1, True),
    Metric("dead", "dead", 3),
    Metric("mcc", "MCC", 3, 1, 0.02),
    Metric("f1", "F1", 3, 1, 0.02),
    Metric("absorption", "absorption (true)", 3, -1, 0.25, True),
    Metric("absorption_full", "absorption (full)", 4, -1, 0.25, True, 0.0008),        # noise as measured on Pythia-160M, 4k latents
    Metric("absorption_fraction", "absorption (fraction)", 4, -1, 0.25, True, 0.0005),
    Metric("probe_1", "probe top-1", 3, 1, 0.02),
    Metric("probe_5", "probe top-5", 3, 1, 0.02),
    Metric("probe_20", "probe top-20", 3, 1, 0.02),
    Metric("scr", "SCR@20", 3, 1, 0.05),
    Metric("tpp", "TPP@20", 3, 1, 0.25, True),
    Metric("unlearning", "unlearning", 3, 1, 0.02),
    Metric("decoder_max_cosine", "max cos", 3),
    Metric("seconds", "s / M tokens", 1),
]
PRIMARY = "explained_variance"
WIDEST_GAP = 4.0             # two L0s of a curve that differ by more than this factor are not interpolated between


class Difference(NamedTuple):
    """How a group of runs differs from others in a metric: one delta a seed, or none and why."""
    why: str = ""
    deltas: list = []
    mean: float = math.nan
    low: float = -math.inf   # 95 % interval: Student's t over seeds; for letters and data sets the wider one of t and the bootstrap
    high: float = math.inf
    p: float = 1.0           # before Holm's correction
    worth: float = 0.0
    gap: float = 0.0         # the share by which the L0s still differ (mean over seeds)
    holm: float = 1.0        # p after Holm's correction
    units: list = []         # the same for each letter or data set: one {name: delta} a seed


def reference(run, others, metric):
    """What `run` is to be compared with, as {run: weight}, or why there is nothing: valid runs of the same seed, data, length and width,
    with the least different other settings; at its own L0, interpolated in log L0 between two of them, or, where they don't enclose it,
    the nearest one within 5 %. Never extrapolated."""
    if not any(o.valid for o in others):
        return "nothing valid to compare with" if others else "not run"
    same = [o for o in others if o.valid and o is not run and (o.acts, o.config.get("acts_checksum"), o.seed, o.config["steps"]) ==
            (run.acts, run.config.get("acts_checksum"), run.seed, run.config["steps"])]
    wide = [o for o in same if o.settings["d_sae"] == run.settings["d_sae"]]
    if same and not wide:
        return "G17"
    there = [o for o in wide if o.get(metric) is not None]
    if not there:
        return "-" if wide else "no run of the same seed and length"
    l0, kind = run.get("l0"), lambda o: o.settings["activation"]
    nearest = min(there, key=lambda o: (unlike(run, o), kind(o) != kind(run), abs(math.log(l0 / o.get("l0")))))
    curve = sorted((o for o in there if not unlike(nearest, o) and kind(o) == kind(nearest)), key=lambda o: o.get("l0"))
    below, above = [o for o in curve if o.get("l0") <= l0], [o for o in curve if o.get("l0") > l0]
    if below and above and above[0].get("l0") / below[-1].get("l0") <= WIDEST_GAP:
        low, high = below[-1], above[0]
        share = math.log(l0 / low.get("l0")) / math.log(high.get("l0") / low.get("l0"))
        return {low: 1 - share, high: share}
    other = min(curve, key=lambda o: abs(math.log(l0 / o.get("l0"))))
    return {other: 1.0} if abs(l0 / other.get("l0") - 1) <= SAME_L0 else "G16"


def unlike(a, b):
    """How many settings that both have differ, but for those that make the sparsifier."""
    return sum(a.settings[k] != b.settings[k] for k in a.settings.keys() & b.settings.keys() - {"activation", "l0"})


def difference(members, others, metric):
    """The Difference of a group's valid runs from `others` in a Metric, paired by seed."""
    deltas, units, levels, gaps, why = [], [], [], [], []
    for r in [r for r in members if r.valid and r.get(metric.key) is not None]:
        pair = reference(r, others, metric.key)
        if isinstance(pair, str):
            why.append(pair)
            continue
        levels.append(sum(w * o.get(metric.key) for o, w in pair.items()))
        gaps.append(0.0 if len(pair) == 2 else r.get("l0") / next(iter(pair)).get("l0") - 1)
        mine, theirs = r.units.get(metric.key, {}), [(o.units.get(metric.key, {}), w) for o, w in pair.items()]
        units.append({u: v - sum(w * t[u] for t, w in theirs) for u, v in mine.items() if all(u in t for t, _ in theirs)})
        both = units[-1].values()                                             # the letters or data sets that both have
        deltas.append(statistics.mean(both) if both else r.get(metric.key) - levels[-1])
    if not deltas:
        return Difference(sorted(why)[0] if why else "-")
    mean, low, high = (float(v) for v in t_interval(deltas))
    shared = sorted(set.intersection(*map(set, units)))
    if len(shared) > 1:
        b_low, b_high = bootstrap([[u[name] for name in shared] for u in units])
        low, high = (min(low, b_low), max(high, b_high))
    worth = metric.worth * (abs(statistics.mean(levels)) if metric.relative else 1)
    p = float(p_value(deltas)) if abs(mean) > 2 * metric.noise and (low > 0 or high < 0) else 1.0
    return Difference("", deltas, mean, low, high, p, worth, statistics.mean(gaps), units=units)


def compare(runs, primary):
    """({(group, whose, metric key): (Difference, verdict)}, number of variants tried) of one cache; whose: baseline or parent.

    Holm's correction: over the variants tried for the primary metric; over variants and metrics for all others, which are exploratory."""
    groups = {name: members for name, members in grouped(runs).items() if members[0].variant != "baseline"}
    measured = [m for m in METRICS if m.key == primary or (m.better and any(r.get(m.key) is not None for r in runs))]
    found = {}
    for whose in ("baseline", "parent"):
        for family in ([m for m in measured if m.key == primary], [m for m in measured if m.key != primary]):
            cells = [(name, m) for name in groups for m in family]
            differ = []
            for name, m in cells:
                wanted = ["baseline"] if whose == "baseline" else groups[name][0].config["parents"]
                wanted = [v for v in wanted if any(r.variant == v for r in runs)][:1]      # of two parents the first that was run
                differ.append(difference(groups[name], [r for r in runs if r.variant in wanted], m))
            adjusted = holm([d.p for d in differ]).tolist() if differ else []
            for (name, m), d, p in zip(cells, differ, adjusted):
                found[name, whose, m.key] = d._replace(holm=p), said_of(groups[name], d, p, m, whose)
    return found, len(groups)


def said_of(members, d, p, metric, whose):
    """The verdict in words: better, worse, no difference seen, cannot tell (why), invalid (why)."""
    if not any(r.valid for r in members):
        broken = sorted({g for r in members for g in r.fatal}) or \
            sorted({r.missing for r in members if r.missing in ("training failed", "evaluation is of older weights")})
        return f"invalid ({' '.join(broken)})" if broken else f"cannot tell ({members[0].missing})"
    if d.why:
        why = f"{whose} not run" if d.why == "not run" else d.why
        return f"invalid ({why})" if why.startswith("G") else "-" if why == "-" else f"cannot tell ({why})"
    return word(d.mean, d.low, d.high, p, len(d.deltas), d.worth, metric.better)


# ---- results.md --------------------------------------------------------------------------------------------------------------------


WORDS = {"G16": "L0 differs", "G17": "width differs"}


def mean_sd(values, digits, sign=""):
    """'0.865 +- 0.002', or '0.865' of one value, or '-' of none."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def interval(d, digits):
    """'+0.010 [+0.002, +0.018] (n=3)', '+0.010 (n=1)', or why there is no difference."""
    if d.why:
        return WORDS.get(d.why, d.why)
    span = f" [{d.low:+.{digits}f}, {d.high:+.{digits}f}]" if math.isfinite(d.low) else ""
    return f"{d.mean:+.{digits}f}{span} (n={len(d.deltas)})"


def measured(members, metric):
    """A group's cell in a metric's column: what it measured, even if invalid, or in a word why there is nothing."""
    scored = [r for r in members if r.valid] or members
    words = sorted({r.gaps.get(BENCHMARKS[metric.key][0]) or "-" for r in members}) if metric.key in BENCHMARKS else ["-"]
    cell = mean_sd([r.get(metric.key) for r in scored], metric.digits)
    return words[-1] if cell == "-" else cell


def table(runs, controls, found, primary):
    """(header, rows) of one cache: a row per group, controls last."""
    columns = [m for m in METRICS if any(m.key in r.metrics for r in runs + controls)]
    main, blind = next(m for m in METRICS if m.key == primary), uninformative(runs, controls)
    header = ["run", "verdict", "parent", "seeds"] + [m.title + "*" * (m.key in blind) for m in columns] + \
             [f"{main.title} - baseline", "p (Holm)", "p (sign-flip)", f"{main.title} - parent", "guards"]
    rows = []
    for name, members in [*grouped(runs).items(), *((c.name, [c]) for c in controls)]:
        one, control = members[0], members[0] in controls
        cells = [found.get((name, whose, primary)) for whose in ("baseline", "parent")]
        row = [name, cells[0][1] if cells[0] else ""]
        row += ["", ""] if control else [", ".join(one.config["parents"]) or "-", str(len(members))]
        row += [measured(members, m) for m in columns]
        d = cells[0][0] if cells[0] else Difference()
        tests = [f"{d.holm:.3g}", f"{float(sign_flip(d.deltas)):.3g}"] if len(d.deltas) >= MIN_SEEDS else [""] * 2
        row += [interval(d, main.digits) if cells[0] else "", *tests, interval(cells[1][0], main.digits) if cells[1] else ""]
        if cells[1] and not cells[1][0].why:
            row[-1] = "the same" if one.config["parents"] == ["baseline"] else f"{row[-1]}: {cells[1][1]}"
        rows.append(row + [guards_said(members, control, found, name)])
    return header, rows


def others_table(runs, found, primary):
    """(header, rows) of the differences in every other metric, a row for each group and metric; None without any."""
    columns = [m for m in METRICS if m.better and m.key != primary and any(key == m.key for _, _, key in found)]
    rows = []
    for name, members in grouped(runs).items():
        for m in columns if members[0].variant != "baseline" and any(r.valid for r in members) else ():
            row = [name, m.title]
            for whose in ("baseline", "parent"):
                d, said = found[name, whose, m.key]
                same = whose == "parent" and members[0].config["parents"] == ["baseline"]
                row += ["the same", ""] if same else [interval(d, m.digits), "" if d.why else said]
            rows.append(row)
    return (["variant", "metric", "to baseline", "verdict", "to parent", "verdict to parent"], rows) if rows else None


def precision_table(runs):
    """(header, rows): what rounding to bfloat16 changes in a metric, mean over the seeds of a group; None without any eval/structure.json."""
    names = {"explained_variance": ("EV", 5), "l0": ("L0", 3), "ce_recovered": ("CE rec.", 5), "kl_sae": ("KL", 5), "mcc": ("MCC", 5), "absorption": ("absorption (true)", 4)}
    kinds = {"weights": "weights in bf16", "weights_acts": "weights and activations", "losses": "losses alone"}
    rows = []
    for name, members in grouped([r for r in runs if r.valid]).items():
        measured = [p for p in (look_up(r, "structure/precision") for r in members) if p]
        for key, (title, digits) in names.items():
            exact = [p["fp32"].get(key) for p in measured]
            if exact and None not in exact:
                shifts = [[p.get(kind, {}).get(key) for p in measured] for kind in kinds]
                shifts = [mean_sd([v - e for v, e in zip(values, exact)], digits, "+") if None not in values else "-" for values in shifts]
                rows.append([name, title, f"{statistics.mean(exact):.{digits}f}", *shifts])
    return (["run", "metric", "fp32", *kinds.values()], rows) if rows else None


def guards_said(members, control, found, name):
    """What guards and gaps say of a group, in words."""
    said = []
    invalid = [r for r in members if r.fatal]
    if invalid:
        fatal = " ".join(sorted({g for r in invalid for g in r.fatal}))
        said.append(fatal if control else f"INVALID {fatal}" if len(invalid) == len(members) else
                    f"{len(invalid)} of {len(members)} left out as invalid: {fatal}")
    for missing in sorted({r.missing for r in members if not r.core}):
        which = ", ".join(str(r.seed) for r in members if not r.core and r.missing == missing)
        said.append(missing + f" (seed {which})" * (len(members) > 1))
    warned = {g for r in members for g in r.warned}
    full, fraction = (found.get((name, "baseline", f"absorption_{kind}"), [Difference()])[0].mean for kind in ("full", "fraction"))
    if full * fraction < 0:
        warned.add("G15")
    return "; ".join(said + [f"warns {' '.join(sorted(warned))}"] * bool(warned)) or "-"


def uninformative(runs, controls):
    """{metric key: the controls that do at least as well as the baseline}, or as the median run where there is no baseline."""
    found = {}
    for m in [m for m in METRICS if m.better]:
        there = [r for r in runs if r.valid and r.get(m.key) is not None]
        there = [r for r in there if r.variant == "baseline"] or there
        middle = statistics.median(r.get(m.key) for r in there) if there else math.nan
        as_good = [c for c in controls if c.get(m.key) is not None and (c.get(m.key) - middle) * m.better >= 0]
        if as_good:
            found[m.key] = as_good, middle, "the baseline" if there[0].variant == "baseline" else "the median run"
    return found


def notes(runs, controls, found, tried, primary):
    """Sentences under a table: how much was tried and could be seen, what guards say in full, and which metrics a control does well in."""
    main, lines = next(m for m in METRICS if m.key == primary), []
    differ = [d for (_, whose, key), (d, _) in found.items() if (whose, key) == ("baseline", primary) and len(d.deltas) >= MIN_SEEDS]
    lines.append(f"The verdict is about {main.title} - baseline; {tried} variants and settings were tried, Holm's correction is for as many.")
    if differ:
        n, spread = round(statistics.median(len(d.deltas) for d in differ)), statistics.median(statistics.stdev(d.deltas) for d in differ)
        needed = detectable(n, tried)
        lines.append(f"With {n} seeds and {tried} tried, a difference of {needed:.1f} standard deviations over seeds is called in 4 of 5 "
                     f"experiments: here, at the median one of {spread:.{main.digits + 1}f}, {needed * spread:.{main.digits}f}; "
                     f"with {n + 2} seeds it would be {detectable(n + 2, tried) * spread:.{main.digits}f}.")
    elif tried:
        lines.append(f"Fewer than {MIN_SEEDS} seeds have no interval worth the name: train with --seed 0 1 2, or 0 1 2 3 4 for a claim.")
    for (name, whose, key), (d, verdict) in found.items():
        if (whose, key) == ("baseline", primary) and abs(d.gap) > 0.01 and verdict.startswith(("better", "worse")):
            lines.append(f"{name}: its L0 is {d.gap:+.1%} of the baseline's; a baseline at several l0 (--sweep l0=...) takes that out.")
    if primary in ("scr", "tpp"):
        lines.append(f"G33: {main.title} is not reliable enough for a verdict: on SCR an oracle ranks below a third of SAEs (2605.18229).")
    sizes, versions = {r.core["contexts"] for r in runs + controls if r.core}, {r.core.get("version") for r in runs + controls if r.core}
    if len(sizes) > 1:
        shown = ", ".join(map(str, sorted(sizes)))
        lines.append(f"Rows were evaluated on different numbers of held-out contexts ({shown}): run 03_eval.py again.")
    if len(versions) > 1:
        lines.append("G26: rows were evaluated by different versions of 03_eval.py: run it again.")
    for r in runs:
        lines += [f"{r.config['name']} is invalid: {g['id']} {g['message']}." for g in r.guards if g["level"] == "fatal"]
        if r.status == "failed":
            lines.append(f"{r.config['name']} failed in training: {r.config.get('reason', 'no reason given')}.")
    warned = {}
    for r in runs:
        for g in {(g["id"], g["message"].split(":")[0]): g for g in r.guards if g["level"] == "warn"}.values():      # several evaluations may warn
            warned.setdefault((g["id"], g["message"].split(":")[0]), []).append((r.config["name"], g["message"]))
    for (guard, _), them in sorted(warned.items()):
        lines.append(f"{guard} warns at {len(them)} run{'s' * (len(them) > 1)}: {them[0][0]}: {them[0][1]}.")
    for m in METRICS:
        if m.key in uninformative(runs, controls):
            as_good, middle, whose = uninformative(runs, controls)[m.key]
            lines.append(f"{m.title} says nothing by itself here: {whose} has {middle:.{m.digits}f}, "
                         + ", ".join(f"{c.name} {c.get(m.key):.{m.digits}f}" for c in as_good) + ".")
    return lines


PRECISION = "What bfloat16 changes (the same few contexts for all; not for comparison with the tables above)"
ABOUT = f"""Mean +- standard deviation over seeds, on held-out contexts. L0: active latents per row; EV: explained variance about the mean;
CE rec.: share of the loss that zeroing the activations costs which the reconstruction avoids; KL: from the clean model, nats per token;
dead: share of latents that never fire; absorption, probing, SCR, TPP and unlearning: SAEBench's, or of the true features; max cos: mean
over latents of the highest cosine with another one's decoder row; a star: a control does as well as the baseline, so that the metric
says nothing by itself.

Differences are paired by seed (same start, same batches) at the same length and width and the same L0: interpolated in log L0 between
two of the other's runs, or to one within {SAME_L0:.0%}; never extrapolated. Of two parents the first that was run counts. In brackets the 95 %
interval: Student's t over seeds; for letters and data sets the wider one of it and a bootstrap over seeds and letters.

Verdict: *better* or *worse*, if the t interval excludes 0 after Holm's correction for the number tried, and, from {FLIP_SEEDS} seeds on, the
exact sign-flip test agrees; with fewer than {FLIP_SEEDS} seeds that test can't reach 5 % and nothing checks that the differences are normal, so
t's p is doubled; fewer than {CLAIM_SEEDS} seeds are a screening. *No difference seen*: the whole interval is smaller than what would matter.
*Cannot tell*: it holds both 0 and what would matter, or there are fewer than {MIN_SEEDS} seeds. *Invalid*: a guard fired. Rows are in order
of name, not of merit."""


def results(caches, compared, primary):
    """(markdown, aligned text) of all caches."""
    worth = ", ".join(f"{m.title} {f'{m.worth:.0%} of it' if m.relative else f'{m.worth:g}'}" for m in METRICS if m.better)
    md, text = ["# Results", "", ABOUT, "", f"What would matter: {worth}.", ""], []
    for acts, (runs, controls) in caches.items():
        found, tried = compared[acts]
        tables = [table(runs, controls, found, primary), others_table(runs, found, primary), precision_table(runs)]
        said = notes(runs, controls, found, tried, primary)
        md += [f"## {heading(acts, runs)}", ""]
        at = len(text)                                                        # printed, the table comes last
        for title, (header, rows) in [(t, made) for t, made in zip(("", "Other metrics (exploratory)", PRECISION), tables) if made]:
            md += [f"### {title}", ""] * bool(title)
            md += ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] * len(header)) + "|"]
            md += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows] + [""]
            widths = [max(map(len, column)) for column in zip(header, *rows)]
            aligned = [[f"{c:<{w}}" if i < 3 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))] for row in [header, *rows]]
            text[at:at] = [f"\n{acts}: {title.lower()}" if title else f"\n{heading(acts, runs)}", *("  ".join(row).rstrip() for row in aligned),
                           *([] if title else said)] if title != PRECISION else []
            if not title:
                md += [f"* {line}" for line in said] + [""]
    return "\n".join(md).rstrip() + "\n", "\n".join(text).lstrip()


# ---- published figures, beside the runs' --------------------------------------------------------------------------------------------

# Loss recovered as L0:score, of SAEBench's SAEs (500 M tokens of the Pile, context 1024, release of January 2025): what SAEBench v0.6.0 gives when
# run on them again, within 0.0045 of the published values. From meowmaryexe/SAEBench-Reliability, branch alor/core-baseline-cache.
SAEBENCH = {
    ("gemma-2-2b", 12): {
        "baseline": ("46:.925 85:.951 138:.963 292:.978 491:.985 701:.990", "58:.959 111:.976 185:.982 401:.989 680:.993 981:.995",
                     "64:.974 127:.984 215:.989 475:.993 843:.995 1274:.996"),
        "p_anneal": ("51:.954 80:.967 155:.979 420:.991 659:.995 1038:.998", "56:.976 86:.982 158:.987 420:.994 678:.996 1095:.998",
                     "49:.982 74:.986 121:.989 304:.994 498:.995 1062:.998"),
        "gated": ("45:.968 73:.976 144:.987 354:.995 635:.998 1066:.999", "53:.982 87:.988 173:.993 414:.996 692:.998 1235:.999",
                  "54:.986 89:.990 177:.994 414:.997 670:.998 1161:.999"),
        "jumprelu": ("21:.947 42:.966 84:.981 170:.989 347:.994 692:.998", "21:.965 43:.980 86:.988 173:.993 354:.996 710:.999",
                     "22:.975 43:.985 86:.991 163:.994 306:.997 605:.998"),
        "topk": ("20:.943 40:.965 80:.978 160:.988 320:.993 640:.997", "20:.966 40:.980 80:.988 160:.992 320:.995 640:.998",
                 "20:.974 40:.985 80:.991 160:.994 320:.9966 640:.998"),
        "batch_topk": ("20:.948 40:.965 81:.980 165:.989 339:.994 671:.997", "21:.969 42:.981 84:.988 168:.993 340:.996 703:.998",
                       "21:.977 42:.986 85:.992 170:.995 339:.997 695:.998"),
        "matryoshka": ("20:.941 40:.963 80:.977 161:.987 324:.992 650:.996", "20:.964 41:.979 82:.987 164:.992 331:.995 663:.998",
                       "21:.974 41:.985 83:.991 167:.994 337:.996 673:.998")},
    ("pythia-160m", 8): {
        "baseline": ("43:.907 458:.985", "52:.938 97:.957 157:.967 313:.979", "56:.957 108:.970"),
        "p_anneal": ("30:.929 45:.944 82:.962 214:.983 336:.992", "28:.948 42:.959", "26:.955 38:.964"),
        "gated": ("29:.947 45:.961 87:.975 210:.989 336:.995", "31:.962 49:.972 96:.983", "31:.969 49:.978 96:.985"),
        "jumprelu": ("19:.928 39:.956 78:.973 157:.986 316:.995", "20:.944 39:.966 72:.977 154:.987", "20:.954 38:.971 75:.981"),
        "topk": ("20:.935 40:.958 80:.973 160:.985 320:.995 640:.999", "20:.956 40:.971 80:.981 160:.989 320:.996",
                 "20:.966 40:.979 80:.987 160:.991 320:.996"),
        "batch_topk": ("19:.936 38:.959 76:.974 155:.986 312:.995 629:.999", "19:.954 38:.970 77:.981 157:.990 315:.996",
                       "19:.962 39:.976 78:.985 158:.991"),
        "matryoshka": ("19:.927 38:.953 76:.970 153:.984 309:.993 630:.999", "19:.948 38:.966 76:.978 153:.988 310:.995",
                       "19:.958 38:.975 76:.984 155:.990")}}
SAEBENCH_WIDTHS = (4096, 16384, 65536)

# The TopK baseline of note 004 (Gemma-2-2B layer 19, 65,536 latents, k 320, lr 1e-4, 4,882 steps of 2,048), evaluated with SAEBench commit 87197ce
# (January 2025), in bfloat16: (what, the note's figure, ours: f(core metrics) or a key of SAEBench's results). A figure of this list can be compared
# with one of the right column if the formula is the same; absorption and explained variance changed theirs since.
NOTE004 = [
    ("L0", 320.0, lambda m: m["l0"]),
    ("explained variance about the mean", None, lambda m: m["explained_variance"]),
    ("explained variance about zero (SAEBench from March 2025)", None,
     lambda m: 1 - (1 - m["explained_variance"]) / (1 - m["explained_variance_zero"])),
    ("explained variance, mean of ratios (SAEBench before, 'legacy')", 0.824, "explained_variance_legacy"),
    ("squared error, mean over dimensions", 4.6875, lambda m: m["mse"]),
    ("cosine", 0.945, lambda m: m["cosine"]),
    ("norm ratio, x_hat to x", 0.949, lambda m: m["l2_ratio"]),
    ("CE with the SAE, nats", 3.03125, lambda m: m["ce_sae"]),
    ("CE recovered", 0.9901, lambda m: m["ce_recovered"]),
    ("KL from the clean model, nats", 0.1035, lambda m: m["kl_sae"]),
    ("KL recovered", 0.9897, lambda m: m["kl_recovered"]),
    ("absorption, full (24 letters)", 0.00876, "mean_full_absorption_score"),
    ("absorption, fraction (SAEBench from January 2025)", None, "mean_absorption_fraction_score"),
    ("split features", 1.167, "mean_num_split_features"),
    ("sparse probing top-1", 0.853, "sae_top_1_test_accuracy"), ("sparse probing top-5", 0.901, "sae_top_5_test_accuracy"),
    ("sparse probing, all latents", 0.960, "sae_test_accuracy"),
    ("SCR, 20 latents", 0.322, "scr_metric_threshold_20"), ("SCR, 100 latents", 0.400, "scr_metric_threshold_100"),
    ("unlearning (the note's 0.0 was not measured: empty details)", None, "unlearning_score")]


def published_table(name, runs):
    """(markdown, text) of a table that puts published figures beside the runs' own."""
    title, said, header, rows = {"saebench": saebench, "note004": note004}[name]([r for r in runs if r.core])
    markdown = [f"## {title}", "", said, "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    text = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in [header, *rows]]
    return "\n".join(["", *markdown, ""]), "\n".join([f"\n{title}: {said}", *text])


def saebench(runs):
    """Loss recovered of each run beside that of SAEBench's SAE of the same model, layer, kind and width at the same L0, between its neighbours in log L0."""
    rows = []
    for r in runs:
        model = next((known for known in SAEBENCH if known[0] in r.config["model"]["name"].lower() and known[1] == r.config["layer"]), None)
        kind, width, l0 = r.settings["activation"] if r.variant == "baseline" else r.variant, r.settings["d_sae"], r.get("l0")
        kind = "baseline" if kind == "relu" else kind
        said = "published for Gemma-2-2B layer 12 and Pythia-160M layer 8" if not model else \
            "no such kind" if kind not in SAEBENCH[model] else f"widths {', '.join(map(str, SAEBENCH_WIDTHS))}" if width not in SAEBENCH_WIDTHS else None
        points = [] if said else [tuple(map(float, p.split(":"))) for p in SAEBENCH[model][kind][SAEBENCH_WIDTHS.index(width)].split()]
        published = at_l0(points, l0) if points else None
        if points and published is None:
            said = f"L0 {points[0][0]:g} to {points[-1][0]:g} only"
        mine = r.get("ce_recovered")
        rows.append([r.config["name"], f"{l0:.1f}", f"{r.config['final']['tokens'] / 1e6:,.1f} M", "-" if mine is None else f"{mine:.4f}",
                     said or f"{published:.4f}", "-" if said or mine is None else f"{mine - published:+.4f}"])
    return ("Loss recovered beside SAEBench's SAEs",
            "500 M tokens each, release of January 2025, evaluated with SAEBench v0.6.0 by SAEBench-Reliability, within 0.0045 of the published values.",
            ["run", "L0", "tokens", "CE recovered", "published at this L0", "difference"], rows)


def at_l0(points, l0):
    """The score at `l0` between neighbouring (L0, score) points, linear in log L0; at 5 % outside them that of the last one; None beyond."""
    if not points[0][0] / (1 + SAME_L0) <= l0 <= points[-1][0] * (1 + SAME_L0):
        return None
    for (a, low), (b, high) in zip(points, points[1:]):
        if l0 <= b:
            return low + (high - low) * max(0.0, math.log(l0 / a) / math.log(b / a))
    return points[-1][1]


def note004(runs):
    """Each figure of note 004's baseline beside that of the runs of its model, layer, kind and width."""
    runs = [r for r in runs if "gemma-2-2b" in r.config["model"]["name"].lower() and r.config["layer"] == 19 and r.settings["activation"] == "topk"
            and r.settings["d_sae"] == 65536]
    rows = []
    for what, published, ours in NOTE004:
        values = []
        for r in runs:
            try:
                values.append(ours(r.core["metrics"]) if callable(ours) else stored_figure(r.folder, ours))
            except KeyError:                                                  # a figure that its core metrics lack
                values.append(None)
        rows.append([what, "-" if published is None else f"{published:g}", *("-" if v is None else f"{v:.4f}" for v in values)])
    return ("Note 004's TopK baseline",
            "Gemma-2-2B layer 19, 65,536 latents, k 320, 10.0 M tokens, SAEBench commit 87197ce in bfloat16; '-' was not measured, or not by this formula."
            + ("" if runs else " There is no run of this kind on this layer."), ["", "note 004", *(r.config["name"] for r in runs)], rows)


def stored_figure(folder, key):
    """The first number called `key` in a run's SAEBench results, or None."""
    def look(value):
        if isinstance(value, dict):
            if isinstance(value.get(key), (int, float)):
                return value[key]
            return next((found for found in map(look, value.values()) if found is not None), None)
    return next((found for path in sorted((folder / "eval").glob("*.json")) if (found := look(read_json(path))) is not None), None)


# ---- figures -----------------------------------------------------------------------------------------------------------------------


def looks(runs):
    """{variant: (colour, marker, line style)}, the same in every figure; the baseline is black."""
    variants = sorted({r.variant for r in runs if r.variant != "baseline"}, key=natural)
    return {"baseline": ("#222222", "o", "-")} | {v: nth_look(i) for i, v in enumerate(variants)}


def nth_look(i):
    return COLOURS[i % len(COLOURS)], MARKERS[(i + 1) % len(MARKERS)], STYLES[i // len(COLOURS) % len(STYLES)]


def natural(name):
    """Sorts idea_r2 before idea_r10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def panels(rows, columns, width=4.6, height=3.5):
    return plt.subplots(rows, columns, figsize=(width * columns + 2.2, height * rows + 0.4), squeeze=False, layout="constrained")


def legend(figure, handles):
    """One legend for the whole figure, on its right, in as many columns as it takes."""
    if handles:
        per_column = max(8, int(figure.get_figheight() * 6))
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7.5,
                      ncols=math.ceil(len(handles) / per_column), handlelength=2.2)


def margin(names):
    """Inches that the names of rows take at 7 points, no fewer than the usual ones do."""
    return max(2.2, 0.3 + 0.057 * max(map(len, names), default=0))


def say(axis, words):
    """A gap with a word instead of an empty panel."""
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", color="#777777")


def footnote(figure, words):
    figure.supxlabel(words, fontsize=8, color="#555555")


def save(figure, path):
    png, large = io.BytesIO(), figure.get_figwidth() * figure.get_figheight() > 150      # square inches; the report holds all figures
    figure.savefig(png, format="png", dpi=110 if large else None)
    plt.close(figure)
    write_file(path, png.getvalue())


def draw_pareto(caches, look, path, specs=()):
    """Quality (or each of the Panels `specs`) against sparsity: a marker per group with the seeds' standard deviation; settings of a variant
    that differ in l0 are joined."""
    if specs and not any(look_up(r, spec.y) is not None for runs, _ in caches.values() for r in runs if r.valid for spec in specs):
        return lacking(specs)
    rows = [(acts, title, [r for members in groups.values() for r in members], controls)
            for acts, (runs, controls) in caches.items() for title, groups in studies([r for r in runs if r.valid] or runs, lambda r: r.variant)]
    figure, axes = panels(len(rows), len(specs) or 2)
    handles = {}
    for row, (acts, title, runs, controls) in zip(axes, rows):
        language = any("ce_recovered" in r.core["metrics"] for r in caches[acts][0] if r.core)
        second = Panel("ce_recovered", "cross-entropy recovered") if language else Panel("mcc", "MCC with the true features")
        for axis, (metric, label, null, words, *_) in zip(row, specs or (Panel("explained_variance", "explained variance"), second)):
            lines = {}
            for name, members in grouped([r for r in runs if r.valid and look_up(r, metric) is not None and r.get("l0")]).items():
                xs, ys = [r.get("l0") for r in members], [look_up(r, metric) for r in members]
                point = statistics.mean(xs), statistics.mean(ys), sd(xs), sd(ys), members[0].variant
                rest = sorted((k, v) for k, v in members[0].overrides.items() if k != "l0")
                lines.setdefault((members[0].variant, str(rest)), []).append(point)
            for series in lines.values():
                colour, marker, style = look[series[0][4]]
                x, y, x_sd, y_sd, _ = zip(*sorted(series))
                axis.errorbar(x, y, y_sd, x_sd, color=colour, ls="none", elinewidth=1, capsize=2)
                line, = axis.plot(x, y, marker, color=colour, ls=style if len(x) > 1 else "none", ms=6, lw=1.2, alpha=0.9)
                handles.setdefault(series[0][4], line)
            nulls = sorted((r.get("l0"), v) for r in runs if r.valid and r.get("l0") and null and (v := look_up(r, null)) is not None)
            if nulls:
                handles[words], = axis.plot(*zip(*nulls), "_", color="#777777", ms=9, mew=1.5)
            if not lines:
                say(axis, "no valid run with this metric")
            axis.set(xscale="log", xlabel="L0 (active latents per row)", ylabel=label)
            axis.set_title(": ".join(filter(None, (acts, title, label))), fontsize=9)
            if lines:
                points = [(y - e, y + e) for series in lines.values() for _, y, _, e, _ in series] + [(y, y) for _, y in nulls]
                draw_controls(axis, controls, metric, min(low for low, _ in points), max(high for _, high in points), handles)
                plain_ticks(axis, [x for series in lines.values() for x, *_ in series])
    legend(figure, handles)
    footnote(figure, "mean over seeds; bars: standard deviation, where there are several")
    save(figure, path)


def sd(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def draw_controls(axis, controls, metric, low, high, handles):
    """Hollow markers. What lies further below the runs than they differ (and 0.1) would squeeze them together: it is named instead."""
    shown = [c for c in controls if c.get(metric) is not None and c.get("l0")]
    floor = low - max(high - low, 0.1)
    below = [c for c in shown if c.get(metric) < floor]
    for c, marker in zip(shown, MARKERS):
        if c not in below:
            handles[c.name] = axis.plot(c.get("l0"), c.get(metric), marker, mfc="none", mec="#777777", ms=7, mew=1.2, ls="none")[0]
            low, high = min(low, c.get(metric)), max(high, c.get(metric))
    margin = max(0.1 * (high - low), 0.005)
    axis.set_ylim(low - margin * (2.5 if below else 1), high + margin)
    if below:
        words = ", ".join(f"{c.folder.name} {c.get(metric):.2f}" for c in below)
        axis.text(0.02, 0.02, f"controls below: {words}", transform=axis.transAxes, fontsize=6.5, color="#777777")


def plain_ticks(axis, xs):
    """A log axis around the values xs with numbers such as 8, 16, 32 instead of powers of ten."""
    low, high = min(xs) / 1.15, max(xs) * 1.15
    ticks = [2.0 ** n for n in range(-4, 15) if low <= 2.0 ** n <= high]
    if len(ticks) < 3:
        ticks = [t for t in matplotlib.ticker.MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()


SAID = {"better": ("#0072B2", "o"), "worse": ("#D55E00", "o"), "no difference seen": ("#222222", "o"), "cannot tell": ("#999999", "o")}


def draw_verdicts(caches, compared, primary, path):
    """Forest plot: each group's difference to the baseline and to its parent with its 95 % interval, a dot per seed, the verdict in words.
    Invalid groups are named with the guard and have no mark, so they are in no scale."""
    groups = {acts: [name for name, one in grouped(runs).items() if one[0].variant != "baseline"] for acts, (runs, _) in caches.items()}
    groups = {acts: names for acts, names in groups.items() if names}
    if not groups:
        return "nothing but the baseline"
    heights = [max(2.0, 0.21 * len(names) + 0.7) for names in groups.values()]
    wide = 13.3 + margin({name for names in groups.values() for name in names})
    figure, axes = plt.subplots(len(groups), 3, figsize=(wide, sum(heights) + 0.5), squeeze=False, layout="constrained",
                                height_ratios=heights)
    for row, (acts, names) in zip(axes, groups.items()):
        found, tried = compared[acts]
        others = [k for k in ("ce_recovered", "mcc", "explained_variance") if k != primary and (names[0], "baseline", k) in found]
        second = others[0] if others else None
        columns = [(primary, "baseline"), (primary, "parent"), (second, "baseline")]
        for axis, (key, whose) in zip(row, columns):
            metric = next((m for m in METRICS if m.key == key), None)
            if not metric:
                axis.set_axis_off()
                continue
            points = [0.0]
            for y, name in enumerate(names):
                d, said = found[name, whose, key]
                kind = next((k for k in SAID if said.startswith(k)), None)
                if d.deltas and kind:
                    colour, marker = SAID[kind]
                    if math.isfinite(d.low):
                        axis.plot([d.low, d.high], [y, y], color=colour, lw=1.6, solid_capstyle="butt", zorder=2)
                    axis.plot(d.mean, y, marker, color=colour, ms=5, mfc="white" if kind == "cannot tell" else colour, zorder=3)
                    axis.plot(d.deltas, [y + 0.28] * len(d.deltas), "|", color=colour, ms=4, mew=0.8)
                    points += d.deltas
                axis.text(1.01, y, "" if said == "-" else said, transform=axis.get_yaxis_transform(), va="center", fontsize=7,
                          color=SAID.get(kind, ("#777777",))[0])
            reach = 1.25 * max(map(abs, points)) or metric.worth or 1
            axis.axvline(0, color="#444444", lw=1)
            if not metric.relative:
                axis.axvspan(-metric.worth, metric.worth, color="#EEEEEE", zorder=0)
            axis.set(xlim=(-reach, reach), ylim=(len(names) - 0.4, -0.6),
                     xlabel=f"difference in {metric.title} ({'more' if metric.better > 0 else 'less'} is better)",
                     title=f"{acts}: {metric.title} - {whose}" + f"; {tried} tried" * (axis is row[0]))
            axis.set_yticks(range(len(names)), names if axis is row[0] else [""] * len(names), fontsize=7.5)
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
            axis.grid(axis="y", visible=False)
    footnote(figure, "line: 95 % interval of this one difference (it may leave the panel); ticks below it: seeds; grey band: too small to matter; "
                     "the words are after Holm's correction")
    save(figure, path)


def draw_ablation(caches, look, path, keys="(?!l0$)", metrics=("explained_variance", "ce_recovered|mcc", "l0", "dead")):
    """Panels for each swept setting (--sweep) that `keys` matches: metrics against its values, a line for each combination of the other swept
    settings, the baseline as a line. metrics: keys of METRICS (a|b: a, or b if nothing has a) or Panels."""
    series = [(acts, runs, variant, key, lines) for acts, (runs, _) in caches.items() for (variant, key), lines in swept(runs).items()
              if re.match(keys, key)]
    if not series:
        return "no such setting was swept (02_train.py --sweep NAME=V1,V2)"
    titles = {m.key: m.title for m in METRICS}
    specs = [[m] if isinstance(m, Panel) else [Panel(key, titles[key]) for key in m.split("|")] for m in metrics]
    wide = min(4, len(specs))
    high = math.ceil(len(specs) / wide)
    figure, axes = panels(high * len(series), wide, width=3.4, height=2.6)
    for row, (acts, runs, variant, key, lines) in zip(axes.reshape(len(series), -1), series):
        values, handles = sorted({v for line in lines.values() for v in line}, key=lambda v: (isinstance(v, str), v)), {}
        one, bases = next(iter(next(iter(lines.values())).values()))[0], [r for r in runs if r.variant == "baseline"]
        nearest = min(bases, key=lambda r: (unlike(one, r), abs(math.log(r.settings["l0"] / one.settings["l0"]))), default=one)
        beside = [r for r in bases if r.name == nearest.name and r.settings["d_sae"] == one.settings["d_sae"]]
        for axis, options in zip(row, specs):
            spec = next((spec for spec in options if any(r.valid and look_up(r, spec.y) is not None for r in runs)), options[0])
            measured = lambda them: [v for v in (look_up(r, spec.y) for r in them if r.valid) if v is not None]
            for which, (others, line) in enumerate(lines.items()):
                colour, marker, style = look[variant] if len(lines) == 1 else nth_look(which)
                aside = 0.07 * (which - (len(lines) - 1) / 2)                 # so that lines do not hide each other's bars
                shown = [(i + aside, ys) for i, v in enumerate(values) if (ys := measured(line.get(v, [])))]
                for i, ys in shown:
                    axis.plot([i] * len(ys), ys, ".", color=colour, ms=3, alpha=0.5)
                if shown:
                    handles[others or variant] = axis.errorbar(
                        [i for i, _ in shown], [statistics.mean(ys) for _, ys in shown], [sd(ys) for _, ys in shown],
                        color=colour, marker=marker, ls=style, ms=5, lw=1.2, capsize=2)
            base = measured(beside)
            if base:
                handles["baseline (grey: its seeds)"] = axis.axhline(statistics.mean(base), color=look["baseline"][0], lw=1)
                axis.axhspan(min(base), max(base), color="#DDDDDD", zorder=0)
            axis.set(xlabel=key, ylabel=spec.label, title=f"{acts}: {variant}" if axis is row[0] else "", xlim=(-0.5, len(values) - 0.5))
            names = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
            axis.set_xticks(range(len(values)), names, fontsize=7.5, rotation=20 if max(map(len, names)) > 7 else 0)
            axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
            low, high = axis.get_ylim()
            if high - low < 1e-9:                                             # all the same, such as no dead latents
                axis.set_ylim(low - 0.05, high + 0.05)
            if not any(measured(them) for line in lines.values() for them in line.values()):
                axis.set_yticks([])
                say(axis, "no valid run with this metric")
        for axis in row[len(specs):]:
            axis.set_axis_off()
        row[wide - 1].legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=7, handlelength=2.4)
    footnote(figure, "mean over seeds; bars: standard deviation; dots: seeds; steps on the x axis are not to scale")
    save(figure, path)


def rates_of(run):
    """(firing rates [d_sae], on how many rows) beside a run's core result, if they are of the same weights; else ([], 0)."""
    path = run.folder / "eval" / "rates.safetensors"
    tensors, meta = read_tensors(path) if run.config and path.exists() else ({}, {})
    return (tensors["rate"].tolist(), meta["rows"]) if meta and meta["sae_checksum"] == run.config["sae_checksum"] else ([], 0)


# ---- the notes' plots: a few ways of drawing, and tables of what is drawn -----------------------------------------------------------------
# What is drawn stands at a path: `l0` is a metric; `log/-1/tau` is in the last line of the training log; `geometry/metrics/gini` in
# eval/geometry.json. A * is every entry of a list (a list again) or of a dict (their mean; of lists place by place).


class Panel(NamedTuple):
    """One panel. dots: `y` is the path of a number; curves: `x` and `y` are paths of lists. Either may be f(run) instead."""
    y: object
    label: str                  # with units
    null: object = None         # the same of what has learned nothing, drawn in grey
    null_label: str = "null: random"
    x: object = "log/*/tokens"
    x_label: str = "training tokens"
    scale: str = "linear"


def result(run, name):
    """A file of the run's eval folder, or its training log; None where it is missing or of other weights. Read once."""
    kept = vars(run).setdefault("results", {})
    if name not in kept:
        path = run.folder / "eval" / f"{name}.json"
        kept[name] = read_log(run.folder, run.config) if name == "log" else read_json(path) if path.exists() else None
        if name != "log" and kept[name] and run.config and kept[name]["sae_checksum"] != run.config["sae_checksum"]:
            kept[name] = None
    return kept[name]


def look_up(run, path):
    """What stands at a path of a run, or what f(run) gives; None where there is nothing."""
    if callable(path):
        return path(run)
    name, *keys = path.split("/")
    return descend(result(run, name), keys) if keys else run.get(name)


def descend(value, keys):
    if not keys or value is None or value == []:
        return value if not keys else None
    key, *rest = keys
    if key == "*" and isinstance(value, dict):
        found = [v for v in (descend(v, rest) for v in value.values()) if v is not None]
        if found and isinstance(found[0], list):
            return [statistics.mean(them) for them in zip(*found)]
        return statistics.mean(found) if found else None
    if key == "*":
        return [descend(v, rest) for v in value]
    if isinstance(value, list):
        return descend(value[int(key)] if int(key) < len(value) else None, rest)
    return descend(value.get(key), rest)


NEEDS = {"stability": " with two seeds or more", "training": " on runs that kept snapshots", "structure/missed": ", of synthetic data"}


def lacking(specs):
    """In a word why a figure has nothing to show."""
    paths = [s.y.split("/") for s in specs if isinstance(s.y, str)]
    names = dict.fromkeys(keys[0] if len(keys) > 1 else BENCHMARKS.get(keys[0], ["core"])[0] for keys in paths if keys[0] != "log")
    asked = " ".join(names) + "".join(NEEDS.get(n, "") for n in [*names, *("/".join(keys[:2]) for keys in paths[:1])])
    return f"not measured: 03_eval.py --eval {asked}" if names else "nothing to show: not evaluated, or not logged in training"


def draw_dots(*specs, columns=4, lines=("baseline",)):
    """A row per variant and setting, a panel per spec; hollow dots are seeds, the full one their mean, bars their standard deviation.
    lines: variants whose mean is a line through the panel."""
    def draw(caches, look, path):
        shown = [s for s in specs if any(look_up(r, s.y) is not None for runs, _ in caches.values() for r in runs)]
        if not shown:
            return lacking(specs)
        blocks = [(acts, grouped(runs), shown[at:at + columns]) for acts, (runs, _) in caches.items() for at in range(0, len(shown), columns)]
        heights, wide = [0.9 + 0.17 * len(groups) for _, groups, _ in blocks], min(columns, len(shown))
        names = {name for _, groups, _ in blocks for name in groups}
        figure, axes = plt.subplots(len(blocks), wide, figsize=(margin(names) + 3.2 * wide, sum(heights) + 0.3), squeeze=False, layout="constrained",
                                    height_ratios=heights, sharey="row")
        for row, (acts, groups, part) in zip(axes, blocks):
            for axis, spec in zip(row, part):
                dots(axis, groups, look, spec, acts, lines)
            row[0].set_yticks(range(len(groups)), groups, fontsize=7)
            row[0].set_ylim(len(groups) - 0.4, -0.6)
            for axis in row[len(part):]:
                axis.set_axis_off()
        drawn = [v for v in lines if any(m[0].variant == v for _, groups, _ in blocks for m in groups.values())]
        footnote(figure, "hollow: seeds; full: mean, bars: standard deviation" + "\nline: mean of " * bool(drawn) + "; dashed: of ".join(drawn))
        save(figure, path)
    return draw


def dots(axis, groups, look, spec, acts, lines):
    drawn, null = False, None
    for y, members in enumerate(groups.values()):
        values = [v for v in (look_up(r, spec.y) for r in members if r.valid) if v is not None]
        if not values:
            axis.annotate(gap(members, spec.y), (0.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=6.5, color="#888888",
                          bbox={"fc": "white", "ec": "none", "pad": 0.5})
            continue
        drawn, (colour, marker, _) = True, look[members[0].variant]
        axis.plot(values, [y] * len(values), "o", mfc="none", mec=colour, ms=3, mew=0.6, alpha=0.7)
        axis.errorbar(statistics.mean(values), y, xerr=sd(values), fmt=marker, color=colour, ms=4.5, elinewidth=1, capsize=2)
        nulls = [v for v in (look_up(r, spec.null) for r in members if r.valid and spec.null) if v is not None]
        if nulls:
            null, = axis.plot(statistics.mean(nulls), y, "|", color="#777777", ms=9, mew=1.5)
    there = [v for v in lines if any(m[0].variant == v for m in groups.values())]
    for name, style in zip(there, STYLES):
        one = min((m for m in groups.values() if m[0].variant == name), key=lambda m: len(m[0].overrides), default=[])
        values = [v for v in (look_up(r, spec.y) for r in one if r.valid) if v is not None]
        if values:
            axis.axvline(statistics.mean(values), color=look[name][0], ls=style, lw=1, zorder=1)
    axis.set(xscale=spec.scale if drawn else "linear", xlabel=spec.label)
    axis.xaxis.label.set_size(8)
    axis.set_title(acts, fontsize=8)
    if null:
        axis.legend([null], [spec.null_label], fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.995), borderpad=0, handletextpad=0.2)
    axis.tick_params(axis="x", labelsize=7)
    if drawn and spec.scale == "linear":
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if not drawn:
        axis.set_xticks([])


def gap(members, metric=None):
    """Why a group has no value to show."""
    invalid = sorted({g for r in members for g in r.fatal})
    why = members[0].gaps.get(BENCHMARKS[metric][0]) if metric in BENCHMARKS else None
    return f"invalid {' '.join(invalid)}" if invalid else next((r.missing for r in members if not r.core), why or "not measured")


class Seeds(NamedTuple):
    """A heat map among panels: a row per variant and setting, a column per pair of seeds. y: path of {other seed's run: {key: number}}."""
    y: str
    key: str
    label: str


def draw_curves(*specs, pick=lambda runs: runs, beside=None):
    """A line per variant and setting, mean over seeds in a band of their standard deviation; a panel per spec. More than 10 lines are split into
    a row of panels per study, the baseline (black) in each. pick(runs): which of a cache's runs to draw; beside: {control: line style} of those
    to draw in grey, out of the scale."""
    def draw(caches, look, path):
        rows = [(acts, title, groups) for acts, (runs, _) in caches.items() for title, groups in studies(pick([r for r in runs if not r.fatal]))]
        lines = [s for s in specs if isinstance(s, Panel)]
        rows = [row for row in rows if any(curve(members, s, s.y)[0] for members in row[2].values() for s in lines)]
        if not rows:
            return lacking(specs)
        wide = min(len(specs), 5 if len(rows) > 1 or len(specs) > 9 else 2 if len(specs) == 4 else 3)
        high = math.ceil(len(specs) / wide) * len(rows)
        names = {name for *_, groups in rows for name in groups}
        figure, axes = plt.subplots(high, wide, figsize=(4.2 * wide + margin(names), 2.9 * high + 0.2), squeeze=False, layout="constrained")
        for row, (acts, title, groups) in zip(axes.reshape(len(rows), -1), rows):
            handles = {}
            for axis, spec in zip(row, specs):
                if isinstance(spec, Seeds):
                    seeds(axis, groups, spec)
                    continue
                curves(axis, groups, look, spec, handles)
                for c in (c for c in caches[acts][1] if c.folder.name in (beside or {}) and look_up(c, spec.y)):
                    handles[c.name], = axis.plot(look_up(c, spec.x), look_up(c, spec.y), color="#999999", ls=beside[c.folder.name], lw=1)
                axis.set_title(": ".join(filter(None, (acts, title))), fontsize=8)
            for axis in row[len(specs):]:
                axis.set_axis_off()
            absent = {f"{name}: {gap(members)}": plt.Line2D([], [], ls="none") for name, members in groups.items() if name not in handles}
            handles |= absent                                                 # a gap with a word
            row[wide - 1].legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=7, handlelength=2.4)
        footnote(figure, "mean over seeds, band: standard deviation" + "; the start may leave the panel" * ("tokens" in specs[0].x_label))
        save(figure, path)
    return draw


def seeds(axis, groups, spec):
    """One heat map of a Seeds panel; both directions of a pair are averaged."""
    found = {name: {} for name in groups}
    for name, members in groups.items():
        for r, (other, values) in ((r, item) for r in members for item in (look_up(r, spec.y) or {}).items()):
            found[name].setdefault(tuple(sorted((r.seed, int(other.rsplit("-s", 1)[1])))), []).append(values.get(spec.key))
    pairs = sorted({pair for them in found.values() for pair in them})
    axis.set_title(spec.label, fontsize=8)
    if not pairs:
        axis.set(xticks=[], yticks=[])
        return say(axis, lacking([spec]).replace(": ", ":\n"))
    mean = lambda values: statistics.mean(values) if values and None not in values else math.nan
    heat_map(axis, [[mean(them.get(pair)) for pair in pairs] for them in found.values()], list(groups), [f"{a}, {b}" for a, b in pairs])
    axis.set_xlabel("pair of seeds")


def heat_map(axis, cells, rows, columns, gaps=()):
    """Numbers `cells` [rows][columns] as colours and in digits, - for nan; a row with a word in `gaps` says it instead."""
    image = axis.imshow(np.ma.masked_invalid(cells), cmap="cividis", aspect="auto", vmin=0)
    for y, (row, why) in enumerate(zip(cells, gaps or [""] * len(rows))):
        if why:
            axis.text(-0.4, y, why, va="center", fontsize=6.5, color="#888888")
        for x, value in enumerate([] if why else row):
            axis.text(x, y, "-" if math.isnan(value) else f"{value:.2f}".removeprefix("0"), ha="center", va="center", fontsize=5.5,
                      color="#666666" if math.isnan(value) else "white" if value < image.get_clim()[1] * 0.6 else "black")
    axis.set_xticks(range(len(columns)), columns, fontsize=7)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    axis.grid(False)
    return image


MANY = 10                    # lines that can be told apart in a panel


def studies(runs, line=lambda r: r.name):
    """[(title, groups of runs)]: all in one, or where that makes more than MANY lines (what has the same line(run) is one): by study (the name
    before _r1, _r2 ...; the rest are yardsticks), a swept variant by itself, no more than MANY in each beside the baseline's."""
    groups = grouped(runs)
    of = {name: line(members[0]) for name, members in groups.items()}
    if len(set(of.values())) <= MANY:
        return [("", groups)]
    usual = min((name for name, m in groups.items() if m[0].variant == "baseline"), key=lambda name: len(groups[name][0].overrides), default="")
    base, found = {name: members for name, members in groups.items() if of[name] == of.get(usual)}, {}
    settings = {v: len({of[name] for name, m in groups.items() if m[0].variant == v}) for v in {m[0].variant for m in groups.values()}}
    for name, (one, *_) in ((name, m) for name, m in groups.items() if name not in base):
        idea = re.fullmatch(r"(.+)_r\d+", one.variant)
        study = one.variant if settings[one.variant] > 3 else idea[1] if idea else "yardsticks"
        found.setdefault(study, {}).setdefault(of[name], []).append(name)
    parts = []
    for study in sorted(found, key=lambda t: (t == "yardsticks", natural(t))):
        lines = list(found[study].values())
        for at in range(0, len(lines), MANY):
            title = study + f" ({at // MANY + 1})" * (len(lines) > MANY)
            parts.append((title, base | {name: groups[name] for names in lines[at:at + MANY] for name in names}))
    return parts


def curve(members, spec, path):
    """(xs, mean over the seeds that have the curve, their standard deviation) at the xs that all of them have."""
    found = [{x: y for x, y in zip(look_up(r, spec.x) or [], look_up(r, path) or []) if x is not None and y is not None} for r in members]
    found = [f for f in found if f]
    shared = sorted(set.intersection(*map(set, found))) if found else []
    return shared, [statistics.mean(f[x] for f in found) for x in shared], [sd([f[x] for f in found]) for x in shared]


def curves(axis, groups, look, spec, handles):
    late, spread, drawn = [], [], []
    alone = len({members[0].variant for members in groups.values()} - {"baseline"}) == 1
    for name, members in groups.items():
        x, y, width = curve(members, spec, spec.y)
        drawn.append(members[0].variant)
        if x:
            colour, marker, style = look[members[0].variant]
            which = drawn.count(members[0].variant) - 1                       # a variant's further settings: paler, with marks of their own, or, ...
            colour = matplotlib.colors.to_hex([1 - (1 - c) * 0.85 ** which for c in matplotlib.colors.to_rgb(colour)])
            marker = MARKERS[(MARKERS.index(marker) + which) % len(MARKERS)]
            if alone and drawn[-1] != "baseline":                             # ... if there is no other variant, in colours of their own
                colour, marker, style = nth_look(which)
            low, high = [a - b for a, b in zip(y, width)], [a + b for a, b in zip(y, width)]
            handles[name], = axis.plot(x, y, color=colour, ls=style, lw=1.2, alpha=0.9, marker=marker if len(x) < 12 or which else None, ms=3.5,
                                       markevery=max(1, len(x) // 10))
            if any(width):
                axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            late += y[len(y) // 20:] if "tokens" in spec.x_label else y       # the start of training may leave the panel
            spread += [high[-1], low[-1]]
        null = curve(members, spec, spec.null) if spec.null else ([], [], [])
        if null[0] and spec.null_label not in handles:
            handles[spec.null_label], = axis.plot(*null[:2], color="#777777", ls=(0, (1, 1)), lw=1.6)
            late += null[1]
    if not late:
        there = any(look_up(r, spec.x) for members in groups.values() for r in members)
        say(axis, "no such value in these runs" if there else lacking([spec]).replace(": ", ":\n").replace(" on ", "\non "))
    elif spec.scale == "log":
        positive = [v for v in late + spread if v > 0]
        axis.set(yscale="log" if positive else "linear")
        if positive:
            axis.set_ylim(max(min(positive) / 1.1, max(positive) / 1e4), max(positive) * 1.1)
            axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(10, (1, 2, 5)))
            axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    else:
        low, high = min(late + spread), max(late + spread)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        axis.set_ylim(low - margin if low < 0 or low > margin else -0.05 * margin, high + margin)
        axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))      # as many at any size, so that labels keep their place
    axis.set(xlabel=spec.x_label, ylabel=textwrap.fill(spec.label, 40, break_on_hyphens=False))
    axis.yaxis.label.set_size(8)
    format_x = matplotlib.ticker.EngFormatter(sep="") if "tokens" in spec.x_label else matplotlib.ticker.FormatStrFormatter("%g")
    xs = sorted({x for line in axis.lines for x in line.get_xdata()})
    if not late:
        axis.set_xticks([])
        axis.set_yticks([])
    elif len(xs) < 12 and xs[0] > 0 and xs[-1] / xs[0] >= 8 and xs[-1] / xs[-2] > 1.3:      # a few points such as 32, 64 ... 512
        axis.set_xscale("log")
        axis.set_xticks(xs, [matplotlib.ticker.EngFormatter(sep="", places=0)(x) if "tokens" in spec.x_label else f"{x:g}" for x in xs])
        axis.minorticks_off()
    else:
        few = len(xs) < 5 and all(float(x).is_integer() for x in xs)          # 0, 1, 2: nothing between them
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=few))
        axis.xaxis.set_major_formatter(format_x)


def draw_losses(caches, look, path):
    """The terms of each run's last logged loss as stacked bars, mean over seeds, and the reconstruction alone."""
    finals = {acts: {name: [look_up(r, "log/-1") for r in members if look_up(r, "log/-1") and not r.fatal] for name, members in grouped(runs).items()}
              for acts, (runs, _) in caches.items()}
    terms = sorted({k for groups in finals.values() for lines in groups.values() for line in lines for k in line if k.startswith("loss_")},
                   key=lambda k: (k != "loss_recon", k != "loss_sparsity", k))
    if not terms:
        return "no training log"
    heights = [0.9 + 0.17 * len(groups) for groups in finals.values()]
    names = {name for groups in finals.values() for name in groups}
    figure, axes = plt.subplots(len(finals), 1, figsize=(6.3 + margin(names), sum(heights) + 0.3), squeeze=False, layout="constrained",
                                height_ratios=heights)
    hatches = ["", "", "", "", "", "", "", "//", "..", "xx", "\\\\", "--"]
    for axis, (acts, groups) in zip(axes[:, 0], finals.items()):
        for y, lines in enumerate(groups.values()):
            left = 0.0
            for i, term in enumerate(terms):
                width = statistics.mean(line.get(term) or 0.0 for line in lines) if lines else 0.0
                if width:
                    axis.barh(y, width, 0.7, left, color=COLOURS[i % len(COLOURS)], hatch=hatches[i % len(hatches)], ec="white", lw=0.3)
                left += width
            if lines:
                axis.errorbar(left, y, xerr=sd([sum(line.get(t) or 0.0 for t in terms) for line in lines]), color="#222222", elinewidth=1, capsize=2)
            else:
                absent = [r for r in caches[acts][0] if r.name == list(groups)[y]]
                axis.annotate(gap(absent), (0.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=6.5, color="#888888")
        axis.set_yticks(range(len(groups)), groups, fontsize=7)
        axis.set(ylim=(len(groups) - 0.4, -0.6),
                 xlabel="loss at the end, by term (fractions of E||x||^2 / d_in)\nsums of different terms can't be compared; bar's end: standard deviation over seeds")
        axis.set_title(acts, fontsize=8)
    bars = [plt.Rectangle((0, 0), 1, 1, fc=COLOURS[i % len(COLOURS)], hatch=hatches[i % len(hatches)], ec="white") for i in range(len(terms))]
    figure.legend(bars, [t.removeprefix("loss_") for t in terms], loc="outside right upper", fontsize=7.5)
    save(figure, path)


CHEAP = 0.001                # explained variance lost below which absorption removed per point is a division by noise
FEW = 20                     # probe true positives of a letter below which its rate is not shown


def draw_letters(caches, look, path):
    """Full absorption by first letter. A heat map of variants by letters, mean over seeds; under each letter how many words it rests on. Below
    it a forest plot per variant: each letter's difference to the baseline."""
    metric, blocks = next(m for m in METRICS if m.key == "absorption_full"), {}
    for acts, (runs, _) in caches.items():
        groups = {name: {} for name in grouped(runs)}
        for r in [r for r in runs if r.valid]:
            for d in descend(result(r, "absorption"), ["eval_result_details"]) or []:
                groups[r.name].setdefault(d["first_letter"], []).append(d)
        if any(groups.values()):
            base = [r for r in runs if r.variant == "baseline"]
            ideas = {name: members for name, members in grouped(runs).items() if groups[name] and members[0].variant != "baseline"}
            blocks[acts] = groups, {name: difference(members, base, metric) for name, members in ideas.items()}
    if not blocks:
        return lacking([Panel("absorption/x", "")])
    rows = {acts: math.ceil(len(differ) / 6) for acts, (_, differ) in blocks.items()}
    heights = [height for acts, (groups, _) in blocks.items() for height in (1.2 + 0.19 * len(groups), 3.1 * rows[acts]) if height]
    names = {name for groups, _ in blocks.values() for name in groups}
    figure = plt.figure(figsize=(9 + margin(names), sum(heights) + 0.5), layout="constrained")
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    for acts, (groups, differ) in blocks.items():
        letters = sorted({letter for found in groups.values() for letter in found})
        words = {c: statistics.mean(d["num_probe_true_positives"] for found in groups.values() for d in found.get(c, [])) for c in letters}
        mean = lambda found, c, key: statistics.mean(d[key] for d in found[c]) if c in found else math.nan
        enough = lambda found, c: mean(found, c, "num_probe_true_positives") >= FEW
        rates = {name: [mean(found, c, "full_absorption_rate") if enough(found, c) else math.nan for c in letters] for name, found in groups.items()}
        gaps = ["" if found else gap([r for r in caches[acts][0] if r.name == name], "absorption_full") for name, found in groups.items()]
        part = next(parts)
        axis = part.subplots()
        image = heat_map(axis, list(rates.values()), list(groups), [f"{c}\n{words[c]:.0f}" for c in letters], gaps)
        axis.set(xlabel=f"first letter, and on how many words its rate rests (mean; - where fewer than {FEW})")
        axis.set_title(acts, fontsize=8)
        part.colorbar(image, ax=axis, label="full absorption rate", pad=0.01, fraction=0.03, anchor=(0, 1), shrink=min(1, 15 / len(groups)))
        axes = next(parts).subplots(rows[acts], 6, squeeze=False, sharey=True).flat if differ else ()
        for axis in axes[len(differ):]:
            axis.set_axis_off()
        for axis, (name, d) in zip(axes, differ.items()):
            letter_forest(axis, letters, rates[name], words, d, look[next(r.variant for r in caches[acts][0] if r.name == name)])
            worst = sorted((x for x in rates[name] if x > 0), reverse=True)
            said = f"5 worst letters: {sum(worst[:5]) / sum(worst):.0%} of all" if worst else "nothing absorbed"
            axis.set_title(f"{textwrap.fill(name, 26)}\n{said}", fontsize=7)
    footnote(figure, "below: full absorption rate - the baseline's, by letter (left: less is absorbed); line: 95 % interval, the wider one of the\n"
                     "words' (Wilson, Newcombe) and of Student's t over seeds; ticks: seeds")
    save(figure, path)


def letter_forest(axis, letters, rates, words, d, style):
    """One variant's differences to the baseline by letter. rates: its own [letters]; d: their Difference, of which d.units is used."""
    if d.why:
        say(axis, f"{WORDS.get(d.why, d.why)}: no difference")
    drawn = [0.01]
    for y, (c, rate) in enumerate(zip(letters, rates)):
        deltas = [u[c] for u in d.units if c in u]
        if not deltas or math.isnan(rate):
            continue
        middle, low, high = newcombe(rate, rate - statistics.mean(deltas), words[c])
        if len(deltas) >= MIN_SEEDS:
            _, t_low, t_high = t_interval(deltas)
            low, high = min(low, t_low), max(high, t_high)
        axis.plot([low, high], [y, y], color=style[0], lw=1)
        axis.plot(middle, y, style[1], color=style[0], ms=3.5)
        axis.plot(deltas, [y + 0.3] * len(deltas), "|", color=style[0], ms=3, mew=0.6)
        drawn += [abs(low), abs(high)]
    axis.axvline(0, color="#222222", lw=0.8)
    axis.set(ylim=(len(letters) - 0.4, -0.6), xlim=(-1.05 * max(drawn), 1.05 * max(drawn)))
    axis.set_yticks(range(len(letters)), letters, fontsize=5.5)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axis.tick_params(axis="x", labelsize=7)


def newcombe(p, q, n, z=1.96):
    """(p - q, low, high): the 95 % interval of the difference of two rates of n words each, from Wilson's of both (Newcombe 1998, method 10)."""
    spread = lambda rate: z * math.sqrt(max(0.0, rate * (1 - rate) / n + z * z / (4 * n * n))) / (1 + z * z / n)
    middle = lambda rate: (rate + z * z / (2 * n)) / (1 + z * z / n)
    down, up = (lambda rate: rate - (middle(rate) - spread(rate))), (lambda rate: middle(rate) + spread(rate) - rate)
    return p - q, p - q - math.hypot(down(p), up(q)), p - q + math.hypot(up(p), down(q))


def draw_efficiency(caches, look, path):
    """How much absorption a variant takes off the baseline's, and what it costs: arrows from the baseline in the planes of explained variance
    and absorption and of time and absorption, and the relative reduction per percentage point of explained variance lost, paired by seed at the
    same L0 (time: a ratio of means)."""
    metric = {m.key: m for m in METRICS}
    rows = []
    for acts, (runs, _) in caches.items():
        key = next((k for k in ("absorption_full", "absorption") if any(r.valid and r.get(k) is not None for r in runs)), None)
        if key:
            base = [r for r in runs if r.variant == "baseline"]
            deltas = {name: (members, difference(members, base, metric["explained_variance"]), difference(members, base, metric[key]))
                      for name, members in grouped(runs).items() if members[0].variant != "baseline"}
            usual = {k: [r.get(k) for r in base if r.valid and r.get(k) is not None] for k in (key, "seconds")}
            rows.append((acts, metric[key].title, *(statistics.mean(values) if values else math.nan for values in usual.values()), deltas))
    if not rows:
        return "not measured: 03_eval.py --eval absorption, or synthetic data"
    heights = [max(3.4, 0.9 + 0.17 * len(deltas)) for *_, deltas in rows]
    names = {name for *_, deltas in rows for name in deltas}
    figure, axes = plt.subplots(len(rows), 3, figsize=(12.6 + margin(names), sum(heights) + 0.2), squeeze=False, layout="constrained",
                                height_ratios=heights)
    for (plane, clock, bars), (acts, title, level, seconds, deltas) in zip(axes, rows):
        for y, (name, (members, ev, absorbed)) in enumerate(deltas.items()):
            colour, marker, _ = look[members[0].variant]
            said = absorbed.why or ev.why
            if not said:
                plane.annotate("", (100 * ev.mean, absorbed.mean), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1})
                plane.plot(100 * ev.mean, absorbed.mean, marker, color=colour, ms=4)
                took = [r.get("seconds") / seconds for r in members if r.valid and r.get("seconds")]
                clock.plot(statistics.mean(took) if took else math.nan, absorbed.mean, marker, color=colour, ms=4)
                bars.plot(1.02, y, marker, color=colour, ms=4, transform=bars.get_yaxis_transform(), clip_on=False)   # the arrow's mark
                cheap = "costs no explained variance" if ev.mean >= 0 else f"costs less than {100 * CHEAP:g} points in a seed: no ratio"
                said = "the baseline has none" if level <= 0 else cheap if max(ev.deltas) > -CHEAP else ""
                ratios = [-b / level / (-100 * a) for a, b in zip(ev.deltas, absorbed.deltas)] if not said else []
                if not said:
                    bars.plot([100 * r for r in ratios], [y] * len(ratios), "o", mfc="none", mec=colour, ms=3, mew=0.6)
                    bars.errorbar(100 * statistics.mean(ratios), y, xerr=100 * sd(ratios), fmt=marker, color=colour, ms=4.5, capsize=2)
            if said:
                said = {"G16": "L0 differs from the baseline's", "G17": "width differs", "-": gap(members)}.get(said, said)
                bars.annotate(said, (0.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=6.5, color="#888888")
        plane.plot(0, 0, "o", color="#222222")
        plane.annotate("baseline", (0, 0), (4, 4), textcoords="offset points", fontsize=7)
        plane.set(xlabel="explained variance - baseline's (percentage points)", ylabel=f"{title} - baseline's")
        plane.set_title(f"{acts}: down is less absorption, right is better reconstruction", fontsize=8)
        clock.plot(1, 0, "o", color="#222222")
        clock.set(xlabel="training time per token (times the baseline's)", ylabel=f"{title} - baseline's")
        bars.axvline(0, color="#222222", lw=0.8)
        bars.set_yticks(range(len(deltas)), deltas, fontsize=7)
        bars.set(ylim=(len(deltas) - 0.4, -0.6), xlabel="reduction (% of the baseline's) per point lost\nright edge: marks of the arrows")
        bars.set_title(f"{acts}: {title} removed per point of explained variance", fontsize=8)
    save(figure, path)


def draw_absorption_law(caches, look, path):
    """Absorption against L0 on log scales, a mark per run, and where a variant has three L0s or more the line ln A = a + s ln L0 that fits them
    best, no further than they reach; in the legend its slope s and its A at an L0 that all lines reach (80 if they do)."""
    rows = []
    for acts, (runs, _) in caches.items():
        for key in ("absorption_full", "absorption_fraction", "absorption"):
            series, said = {}, in_common(runs)
            for r in [r for r in runs if r.valid and (r.get(key) or 0) > 0 and r.get("l0")]:
                rest = "".join(f" {k}={v}" for k, v in sorted(r.overrides.items()) if k != "l0" and f"{k}={v}" not in said)
                series.setdefault((r.variant, rest), []).append(r)
            series = {name: rs for name, rs in series.items() if len({r.settings["l0"] for r in rs}) >= 3}
            if series:
                rows.append((acts, key, series))
    if not rows:
        return "no variant has its absorption measured at three L0s (02_train.py --sweep l0=8,16,32)"
    figure, axes = plt.subplots(len(rows), 1, figsize=(9.5, 3.9 * len(rows) + 0.2), squeeze=False, layout="constrained")
    for axis, (acts, key, series) in zip(axes[:, 0], rows):
        low = max(min(r.get("l0") for r in rs) for rs in series.values())
        high = min(max(r.get("l0") for r in rs) for rs in series.values())
        at = 80.0 if low <= 80 <= high else math.sqrt(low * high) if low <= high else None
        for (variant, rest), rs in series.items():
            colour, marker, style = look[variant]
            xs, ys = [r.get("l0") for r in rs], [r.get(key) for r in rs]
            slope, level = law(xs, ys)
            by_seed = [[r for r in rs if r.seed == seed] for seed in {r.seed for r in rs}]
            each = [law([r.get("l0") for r in mine], [r.get(key) for r in mine])[0] for mine in by_seed if len({r.settings["l0"] for r in mine}) >= 3]
            label = f"{variant}{rest}: slope {mean_sd(each or [slope], 2)}" + (f", {math.exp(level + slope * math.log(at)):.3f} at L0 {at:.3g}" if at else "")
            axis.plot(xs, ys, marker, color=colour, ms=4.5, alpha=0.8)
            ends = [min(xs), max(xs)]
            axis.plot(ends, [math.exp(level + slope * math.log(x)) for x in ends], marker=marker, markevery=[], color=colour, ls=style, lw=1.2, label=label)
        title = next(m.title for m in METRICS if m.key == key)
        axis.set(xscale="log", yscale="log", xlabel="L0 (active latents per row)", ylabel=f"{title} (share; lower is better)")
        axis.set_title(f"{acts}: {title} against L0", fontsize=9)
        plain_ticks(axis, [r.get("l0") for rs in series.values() for r in rs])
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(10, (1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=7, handlelength=2.4)
    footnote(figure, "a mark per run; line: least squares of ln A on ln L0; slope: mean over seeds +- standard deviation")
    save(figure, path)


def law(xs, ys):
    """(s, a) of ln y = a + s ln x by least squares."""
    return np.polyfit(np.log(xs), np.log(ys), 1).tolist()


def draw_thresholds(caches, look, path):
    """Each latent's threshold against what one z for all would make of it, for the variants whose latents have thresholds of their own; a panel each."""
    shown = [(acts, name, one) for acts, (runs, _) in caches.items() for name, members in grouped(runs).items()
             if (one := next((r for r in members if r.valid and look_up(r, "structure/thresholds/threshold")), None))
             and (one.settings["activation"] == "jumprelu" or one.settings.get("zscore_threshold"))]
    if not shown:
        return "not measured, or no run with thresholds of its own (jumprelu, zscore_r1 ...): 03_eval.py --eval structure"
    wide = min(5, len(shown))
    high = math.ceil(len(shown) / wide)
    figure, axes = plt.subplots(high, wide, figsize=(max(5, 2.7 * wide), 2.75 * high + 0.5), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown):]:
        axis.set_axis_off()
    for axis, (acts, name, one) in zip(axes.flat, shown):
        x, y = look_up(one, "structure/thresholds/by_rule"), look_up(one, "structure/thresholds/threshold")
        ends = [min(x + y), max(x + y)]
        axis.plot(ends, ends, color="#777777", lw=1, ls=(0, (1, 1)))
        axis.plot(x, y, ".", color=look[one.variant][0], ms=3, alpha=0.6)
        axis.set_title(f"{textwrap.fill(f'{acts}: {name}', 34)}\nL0 / normal tails' {look_up(one, 'structure/thresholds/ratio'):.2f}", fontsize=7.5)
        axis.tick_params(labelsize=7)
        for which in (axis.xaxis, axis.yaxis):
            which.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    figure.supxlabel("note 003's rule: mean + z x standard deviation of the latent's\npre-activations, one z for all (scaled data); one seed each; dotted: equal", fontsize=8)
    figure.supylabel("the latent's threshold (scaled data)", fontsize=8)
    save(figure, path)


def tail_ratio(run):
    """L0 over d_sae Q(z), Q the normal's tail, over training, of runs that log their z."""
    tail = lambda z: 1 - statistics.NormalDist().cdf(z)
    return [line["l0"] / (run.settings["d_sae"] * max(tail(line["z"]), 1e-9)) if line.get("z") is not None and line.get("l0") is not None else None
            for line in result(run, "log")]


def every(step, path):
    """f(run): 0, step, 2 step ... as long as what stands at the path."""
    return lambda run: [step * i for i in range(len(look_up(run, path) or []))]


def before_end(run):
    tokens = look_up(run, "training/stages/*/tokens") or []
    return [tokens[-1] - t for t in tokens]


def one_half(run):
    return [0.5] * len(before_end(run))


def share_of_zeros(run):
    return [None if line.get("l0") is None else 1 - line["l0"] / run.settings["d_sae"] for line in result(run, "log")]


def usage(run):
    """(place in the dictionary in percent, firing rate) of the latents that fire, most frequent first; about 400 of them."""
    rates, _ = rates_of(run)
    found = sorted((r for r in rates if r > 0), reverse=True)
    return [(100 * (i + 1) / len(rates), found[i]) for i in range(0, len(found), max(1, len(rates) // 400))] if found else []


def zipf(run):
    """The s of rate = c / rank^s by least squares on log scales, ranks weighted by 1 / rank, so that each factor of ranks counts the same; of
    the latents that fire on 10 rows or more."""
    rates, rows = rates_of(run)
    rates = sorted((r for r in rates if r * rows >= 9.5), reverse=True)
    rank = np.arange(1, len(rates) + 1)
    return -np.polyfit(np.log(rank), np.log(rates), 1, w=rank ** -0.5)[0] if len(rates) >= 10 else None


def penalty_ratio(run):
    """The penalties of the variant's idea over the reconstruction error, at the end of training."""
    ratios = {k: v for k, v in (look_up(run, "log/-1") or {}).items() if k.startswith("ratio_") and v is not None}
    found = [v for k, v in ratios.items() if k not in ("ratio_aux", "ratio_sparsity")]
    return sum(found) if found else None


def density(run):
    """Share of the latents whose rate falls between two edges, in percent; silent ones in none."""
    bins = run.get("density")
    return [100 * c / (sum(bins["counts"]) + bins["silent"]) for c in bins["counts"]] if bins else []


def density_at(run):
    edges = (run.get("density") or {}).get("log10_edges", [])
    return [(a + b) / 2 for a, b in zip(edges, edges[1:])]


def tau_of(run):
    """The threshold tau over training: logged where it moves, else the setting."""
    log = result(run, "log")
    return [line.get("tau", run.settings.get("ortho_tau")) if "pair_cos" in line else None for line in log]


def with_and_without(runs):
    """Runs that revive dead latents, and their parents and baseline, which don't."""
    revive = [r for r in runs if look_up(r, "log/-1/revived") is not None]
    parents = {"baseline", *(p for r in revive for p in r.config["parents"])}
    return [r for r in runs if r in revive or r.variant in parents] if revive else []


def l0_grid(run):
    """The L0s at which the share of rows with as many is drawn."""
    found = look_up(run, "geometry/metrics/l0_of_rows")
    return list(range(0, int(found[-1]) + 2, max(1, run.settings["d_sae"] // 1024))) if found else []


def at_least(run):
    """Share of rows with at least as many active latents."""
    return [sum(l0 >= x for l0 in look_up(run, "geometry/metrics/l0_of_rows")) / 101 for x in l0_grid(run)]


SHAPE, NULL, RANDOM = "geometry/metrics/", "geometry/null/", "null: random directions"
PLACE = "structure/hierarchy/by_place/"
TENTHS, BY_NORM = "geometry/metrics/tenths/", {"x": "geometry/metrics/tenths/norm", "x_label": "norm of the row (mean of a tenth)"}
BY_POSITION = {"x": "structure/position/at", "x_label": "position in the context (mean of an eighth)"}
STAGE, STAGES = "training/stages/*/", {"x": "training/stages/*/tokens"}
EFFECTS = ("explained_variance", "ce_recovered|mcc", "absorption_full|absorption", "absorption_fraction", "decoder_max_cosine", "dead", "l0",
           Panel(penalty_ratio, "penalty / reconstruction error"))
ABSORPTION = (Panel("absorption_full", "full absorption (share of words; lower is better)"),
              Panel("absorption_fraction", "absorption fraction (lower is better)"),
              Panel("absorption", "true absorption, synthetic data (lower is better)"))
EV = Panel("log/*/explained_variance", "explained variance (training)")
MSE = Panel("log/*/mse", "mse (fraction of E||x||^2 / d_in)", scale="log")
L0 = Panel("log/*/l0", "L0 (active latents per row)", scale="log")
L1 = Panel("log/*/l1", "L1 (row's activations, of scaled data)", scale="log")
DEAD = Panel("log/*/dead", "dead latents (share)")
RECON = Panel("log/*/loss_recon", "reconstruction loss", scale="log")
CE = Panel(STAGE + "ce_recovered", "cross-entropy recovered (held-out)", **STAGES)
KL = Panel(STAGE + "kl_recovered", "KL score: 1 - KL / zeroing's (held-out)", **STAGES)
CONDITION = [Panel(f"geometry/condition/{kind}/run/median", f"condition number, {words}", f"geometry/condition/{kind}/null/median",
                   "the same sets of random directions")
             for kind, words in (("group", "32 latents that fire together"), ("across", "32 latents at random"), ("active", "a row's active latents"))]
NOTES = {
    "absorption_scores": draw_dots(*ABSORPTION),
    "feature_splits": draw_dots(Panel("absorption/eval_result_metrics/mean/mean_num_split_features", "split features per letter")),
    "training_curves": draw_curves(Panel("log/*/loss", "loss, all terms (no comparison)", scale="log"), RECON, L0, EV, DEAD),
    "final_losses": draw_losses,
    "letter_absorption": draw_letters,
    "jl_quality": draw_curves(*(Panel(f"geometry/jl/run/{key}", label, f"geometry/jl/null/{key}", "null: random directions", "geometry/jl/dimensions",
                                      "dimensions of the projection")
                                for key, label in (("error_sd", "cosine error (standard deviation)"), ("error_max", "cosine error (largest)"),
                                                   ("recall", "recall of the closest pairs"), ("reconstruction", "squared length kept (share)"),
                                                   *((f"above/{tau}/recall", f"recall of the pairs above {tau}") for tau in ("0.05", "0.1", "0.2", "0.4")),
                                                   *((f"above/{tau}/precision", f"precision of the pairs above {tau}") for tau in ("0.05", "0.4"))))),
    "activation_sparsity": draw_curves(
        Panel(at_least, "rows with at least so many (share)", x=l0_grid, x_label="active latents of a row"),
        Panel(TENTHS + "l0", "L0 (active latents per row)", **BY_NORM), Panel("structure/position/l0", "L0 (active latents per row)", **BY_POSITION)),
    "shrinkage": draw_curves(
        Panel(TENTHS + "explained_variance", "explained variance", **BY_NORM), Panel(TENTHS + "l2_ratio", "L2 ratio ||x_hat|| / ||x||", **BY_NORM),
        Panel(TENTHS + "slope", "slope of x on x_hat (1: no shrinkage)", **BY_NORM),
        Panel("structure/position/explained_variance", "explained variance", **BY_POSITION),
        Panel("core/metrics/by_position/ce_recovered", "cross-entropy recovered", x="core/metrics/by_position/at",
              x_label=BY_POSITION["x_label"])),
    "sparsity_indices": draw_dots(Panel("geometry/metrics/hoyer", "Hoyer index of a row's activations (1: one latent)"),
                                  Panel("geometry/metrics/gini", "Gini index of the firing rates (0: all alike)"),
                                  Panel("dead", "dead latents (share)"), Panel("dense", "latents firing on > 10 % of rows (share)"),
                                  Panel(zipf, "Zipf exponent of the firing rates\n(rate = c / rank^s; 0: all alike)"), columns=3),
    "condition_numbers": draw_dots(*CONDITION),
    "coherence": draw_dots(
        Panel(SHAPE + "mean_max_cosine", "cosine with the nearest other decoder row (mean)", NULL + "mean_max_cosine", RANDOM),
        Panel(SHAPE + "coherence", "largest absolute cosine of two decoder rows", NULL + "coherence", RANDOM),
        Panel(SHAPE + "pairs_above/0.5", "pairs of decoder rows with a cosine above 0.5", NULL + "pairs_above/0.5", RANDOM),
        Panel(SHAPE + "mean_square_cosine", "squared cosine (mean over pairs)", NULL + "welch", "Welch's lower bound"),
        Panel(SHAPE + "effective_rank", "effective rank of the decoder", NULL + "effective_rank", RANDOM),
        Panel(SHAPE + "frame_ratio", "frame ratio: largest / d_in-th singular value", NULL + "frame_ratio", RANDOM), columns=3),
    "geometry_l0": functools.partial(draw_pareto, specs=[
        Panel(SHAPE + "mean_abs_cosine", "mean |cosine| of two decoder rows", NULL + "mean_abs_cosine", RANDOM),
        Panel("geometry/condition/active/run/median", "condition number of active latents", "geometry/condition/active/marchenko_pastur", RANDOM)]),
    "cosine_distributions": draw_curves(
        Panel(SHAPE + "nearest_cosine", "cosine with the nearest other decoder row", NULL + "nearest_cosine", RANDOM,
              every(1, SHAPE + "nearest_cosine"), "latents (%, lowest first)"),
        Panel("stability/others/*/cosines", "cosine with its match in another seed", "stability/null/cosines", RANDOM,
              every(1, "stability/others/*/cosines"), "latents (%, lowest first)"),
        Panel("stability/others/*/again_by_rate", "matched above 0.7 (share)", x=every(10, "stability/others/*/again_by_rate"),
              x_label="latents (%, rarest first)")),
    "alpha_ablation": functools.partial(draw_ablation, keys=".*(alpha|coef|(ortho|ortsae|con)_(weight|share))", metrics=EFFECTS),
    "topk_ablation": functools.partial(draw_ablation, keys="pair_", metrics=EFFECTS),
    "tau_ablation": functools.partial(draw_ablation, keys=".*tau", metrics=EFFECTS),
    "unlearning": draw_dots(Panel("unlearning", "unlearning score (higher is better)"), lines=("baseline", "fixed_ortho")),
    "feature_usage": draw_curves(
        Panel(lambda run: [rate for _, rate in usage(run)], "firing rate (share of rows)", x=lambda run: [place for place, _ in usage(run)],
              x_label="latents, most frequent first (% of the dictionary)", scale="log"),
        Panel(density, "latents (%; silent ones left out)", x=density_at, x_label="log10 firing rate"), beside={"random": "--", "untrained": ":"}),
    "sparsity_evolution": draw_curves(Panel(share_of_zeros, "activations that are 0 (share)")),
    "feature_correlations": draw_dots(Panel("geometry/metrics/correlation", "correlation of two latents' activations (mean absolute)",
                                            "geometry/null/correlation", "null: activations shifted in time"),
                                      Panel("geometry/metrics/mean_abs_cosine", "cosine of two decoder rows (mean absolute)",
                                            "geometry/null/mean_abs_cosine", "null: random directions")),
    "tau_fixed_adaptive": draw_curves(Panel(tau_of, "threshold tau of a pair's cosine"), Panel("log/*/pair_cos", "mean cosine of the selected pairs"),
                                      Panel("log/*/pair_over", "selected pairs above tau (share)"),
                                      Panel("log/*/ratio_ortho", "penalty / reconstruction error", scale="log"), EV,
                                      pick=lambda runs: [r for r in runs if look_up(r, "log/-1/pair_cos") is not None]),
    "pair_stability": draw_curves(
        *(Panel(f"geometry/pairs/{rule}/{key}", label, x="geometry/pairs/rows", x_label=f"rows in a batch, pairs by {words}")
          for rule, words, key, label in (("coactivation", "co-activation", "jaccard", "pairs of successive batches (Jaccard)"),
                                          ("coactivation", "co-activation", "rbo", "the same (rank-biased overlap)"),
                                          ("preact", "pre-activation", "jaccard", "pairs of successive batches (Jaccard)"))),
        Panel(STAGE + "pairs", "pairs now and at the end (Jaccard)", one_half, "one half", before_end, "training tokens before the end"),
        Seeds("stability/others", "pairs", "top co-firing pairs shared by two seeds (Jaccard)")),
    "pair_selection": draw_dots(Panel("geometry/pairs/coactivation/dense/-1", "top pairs with one of the 1 % most\nfrequent latents (share)",
                                      "geometry/pairs/null_dense", "null: all pairs"),
                                Panel("training/pair_half_life", "the final top pairs were half there so\nmany training tokens before the end")),
    "absorption_efficiency": draw_efficiency,
    "absorption_l0": draw_absorption_law,
    "missed_parents": draw_dots(*(Panel(f"structure/missed/missed/{k - 1}", f"parent's latent silent, child at depth {k}\n(share of rows with both; synthetic data)")
                                  for k in range(1, 5))),
    "composition": draw_dots(
        Panel("structure/composition/run", "decoder rows explained by a quarter as many\ndirections, 4 a row (MetaSAE; share of variance)", "structure/composition/null", RANDOM),
        Panel("geometry/metrics/unique", "latents whose nearest other row has\na cosine below 0.2 (share)", "geometry/null/unique", RANDOM),
        Panel("structure/hierarchy/cosine", "cosine of a latent with one that contains it\n(mean over parent and child)"),
        Panel("structure/diversity/clusters", "groups of latents linked by cosines\nabove 0.7 (per latent; 1: none is linked)"),
        Panel("structure/diversity/token_entropy", "entropy of the tokens that a latent\nfires most on (nats, mean; 20 rows each)"), columns=3),
    "hierarchy": draw_curves(
        Panel("structure/hierarchy/containment", "fires only with a more frequent latent\n(P(it | latent) above chance)", "structure/hierarchy_null/containment",
              "null: firing shifted in time", every(1, "structure/hierarchy/containment"), "latents (%, least contained first)"),
        Panel("structure/hierarchy/depths", "latents (share)", x=every(1, "structure/hierarchy/depths"), x_label="ancestors of the latent", scale="log"),
        Panel(PLACE + "parents", "parents among the latents (share)", x=every(10, PLACE + "parents"), x_label="place in the dictionary (%)"),
        Panel(PLACE + "rate", "firing rate (mean share of rows)", x=every(10, PLACE + "rate"), x_label="place in the dictionary (%)", scale="log")),
    "thresholds": draw_thresholds,
    "threshold_dynamics": draw_curves(
        Panel("structure/thresholds/z_by_rate", "threshold: standard deviations above the\nmean of the latent's pre-activations",
              lambda run: [look_up(run, "structure/thresholds/rule")] * 10 if look_up(run, "structure/thresholds/rule") else None,
              "note 003's rule: one z for all", every(10, "structure/thresholds/z_by_rate"), "latents (%, rarest first)"),
        Panel("structure/thresholds/kurtosis", "excess kurtosis of pre-activations (normal: 0)", x=every(1, "structure/thresholds/kurtosis"), x_label="latents (%, lowest first)"),
        Panel(tail_ratio, "L0 / (d_sae Q(z)) (1: set by the rule)")),
    "interference": draw_curves(
        Panel("structure/interference/by_rate", "others' load on a latent's direction\n(times its own activation, median)", "structure/interference/null/by_rate",
              "null: random directions", every(10, "structure/interference/by_rate"), "latents (%, rarest first)", "log"),
        Panel("structure/interference/captured", "activations' covariance held (share)", "structure/interference/null/captured", "null: random directions",
              "structure/interference/ranks", "directions"),
        Panel("training/deaths", "fire at a stage of the training, dead or\nrevived at the next one (share)", x=every(10, "training/deaths"),
              x_label="latents (%, least load first)")),
    "explained_variance_evolution": draw_curves(EV), "mse_evolution": draw_curves(MSE), "l0_evolution": draw_curves(L0), "l1_evolution": draw_curves(L1),
    "kl_div_score_evolution": draw_curves(KL), "ce_loss_score_evolution": draw_curves(CE),
    "l2_ratio_evolution": draw_curves(Panel(STAGE + "l2_ratio", "L2 ratio ||x_hat|| / ||x|| (held-out)", **STAGES)),
    "key_metrics_combined": draw_curves(EV, L0, CE, KL),
    "reactivation": draw_curves(DEAD, Panel("log/*/revived", "latents revived so far"),
                                Panel("training/survival/start", "latents still firing since the start\n(Kaplan-Meier, share)", x="training/survival/tokens"),
                                Panel("training/survival/revived", "revived latents still firing\n(Kaplan-Meier, share)", x="training/survival/tokens",
                                      x_label="training tokens since the revival"),
                                EV, Panel(STAGE + "effective_rank", "effective rank of the decoder", **STAGES),
                                Panel(STAGE + "unique", "latents whose nearest other row has\na cosine below 0.2 (share)", **STAGES),
                                Panel(STAGE + "mean_max_cosine", "cosine with the nearest row (mean)", **STAGES),
                                Panel(STAGE + "revived_cosine", "the same, of revived latents", **STAGES), pick=with_and_without),
    "metrics_comparison": draw_dots(
        Panel("explained_variance", "explained variance (higher is better)"), Panel("kl_sae", "KL divergence (nats per token; lower is better)"),
        Panel("l0", "L0 (active latents per row)"), Panel("l1", "L1 (row's activations, in units of the data)"), columns=2),
    "absorption_rates": draw_dots(*ABSORPTION, Panel("parent_recall", "true parents found, synthetic data (share)")),
    "probing_accuracy": draw_dots(
        *(Panel(f"probe_{k}", f"top-{k} probing accuracy", f"sparse_probing/eval_result_metrics/llm/llm_top_{k}_test_accuracy",
                f"top {k} of the model's own dimensions") for k in (1, 5, 20))),
    "feature_stability": draw_dots(Panel("stability/others/*/matched", "cosine of matched decoder rows of two seeds (mean)", "stability/null/matched",
                                         "null: random directions"),
                                   Panel("stability/others/*/encoder", "cosine of their encoder columns (mean)"),
                                   Panel("stability/others/*/again/0.7", "matched above 0.7 (share of latents)"),
                                   Panel("stability/others/*/activations", "correlation of matched latents' activations"),
                                   Panel("stability/others/*/pairs", "top co-firing pairs shared (Jaccard)"),
                                   Panel("stability/others/*/unmatched/cosine", "leading subspaces of the rest: squared cosine\nof the principal angles (mean)",
                                         "stability/others/*/unmatched/null", "null: random subspaces"), columns=3),
}


# ---- report.html: one page with everything in it -----------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Sparse autoencoders: what the runs say</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1rem; max-width: 1400px; }
h1 { font-size: 1.35rem; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 1.6rem 0 .4rem; } h3 { font-size: 1rem; margin: .8rem 0 .2rem; }
p, li { max-width: 75em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid #ddd; max-height: 75vh; } .wide:focus { outline: 2px solid #0072B2; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { position: sticky; top: 0; background: #f4f4f4; z-index: 1; }
th:first-child, td:first-child { position: sticky; left: 0; text-align: left; background: #fff; }
th:nth-child(2), td:nth-child(2) { text-align: left; } th:first-child { background: #f4f4f4; z-index: 2; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus { outline: 2px solid #0072B2; }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
tr.better td { background: #e3f0f9; } tr.worse td { background: #fbe8dc; } tr.invalid td { color: #767676; }
figure { margin: .5rem 0 1.5rem; } figure div { overflow-x: auto; } img { max-width: 100%; height: auto; } figcaption { font-weight: 600; }
pre { font: 12px/1.4 ui-monospace, monospace; overflow-x: auto; margin: .2rem 0; } select, input { font: inherit; max-width: 100%; } mark { background: #ffd54a; font-weight: 600; }
#browser { display: grid; grid-template-columns: 17rem 1fr; gap: 1rem; } #latents { max-height: 32rem; overflow-y: auto; border: 1px solid #ddd; }
#latents button { all: unset; display: block; box-sizing: border-box; width: 100%; padding: .25rem .5rem; cursor: pointer; font-size: 13px; }
#latents button:focus { outline: 2px solid #0072B2; outline-offset: -2px; } #latents button[aria-pressed=true] { background: #e3f0f9; }
.context { font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border-bottom: 1px solid #eee; padding: .2rem 0; }
.token { font: 12.5px ui-monospace, monospace; white-space: pre; background: #f0f0f0; padding: 0 .3em; margin-right: .35em; display: inline-block; }
@media (max-width: 700px) { body { padding: .6rem; } #browser { grid-template-columns: minmax(0, 1fr); } #latents { max-height: 12rem; }
  td:first-child { max-width: 38vw; overflow: hidden; text-overflow: ellipsis; } img { max-width: none; width: 900px; } }
</style></head><body>
<h1>What the runs say</h1>
__BODY__
<script type="application/json" id="features">__FEATURES__</script>
<script>
const value = text => { const number = parseFloat(text); return Number.isNaN(number) ? null : number; };
for (const table of document.querySelectorAll("table")) for (const head of table.tHead.rows[0].cells) {
  head.firstChild.addEventListener("click", () => {
    const falling = head.getAttribute("aria-sort") !== "descending", at = head.cellIndex;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = row => row.cells[at].textContent, rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [value(key(a)), value(key(b))], out = (a.className === "invalid") - (b.className === "invalid");
      if (out) return out;                                           // invalid rows and controls are in no ranking: always last
      if ((x === null) !== (y === null)) return (x === null) - (y === null);
      return (x === null ? key(a).localeCompare(key(b)) : x - y) * (falling ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  });
}
const runs = JSON.parse(document.getElementById("features").textContent), choice = document.getElementById("run");
const seen = token => token.trim() ? token : JSON.stringify(token);       // a newline or a space that fires can be seen
const reasons = ["absorbed", "frequent", "rare", "random"], first = latent => reasons.findIndex(r => (latent.why ?? []).includes(r));
const make = (tag, text, name) => { const e = document.createElement(tag); e.textContent = text ?? ""; if (name) e.className = name; return e; };
function show(latent, button) {
  for (const other of document.querySelectorAll("#latents button")) other.setAttribute("aria-pressed", other === button);
  const panel = document.getElementById("latent");
  panel.replaceChildren(make("h3", `latent ${latent.latent}: fires on ${(100 * latent.rate).toPrecision(3)} % of rows`));
  const line = (title, tokens) => { const p = make("p", title); for (const t of tokens) p.append(make("span", seen(t), "token")); panel.append(p); };
  line("promotes: ", latent.promotes);
  if (latent.neighbours) line("nearest decoder rows: ", latent.neighbours.map(n => `${n.latent} (cosine ${n.cosine.toFixed(2)})`));
  for (const context of latent.contexts) {
    const row = make("div", `${context.activation.toFixed(2).padStart(6)}  `, "context");
    const mark = `<<${context.token}>>`, at = context.text.indexOf(mark);
    row.append(context.text.slice(0, at), make("mark", seen(context.token)), context.text.slice(at + mark.length));
    panel.append(row);
  }
}
function list() {
  const box = document.getElementById("latents"), word = document.getElementById("find").value.toLowerCase();
  box.replaceChildren();
  const found = runs[choice.value].filter(l => JSON.stringify(l).toLowerCase().includes(word));
  for (const latent of found.sort((a, b) => first(a) - first(b) || b.rate - a.rate)) {
    const parts = [latent.latent, `${(100 * latent.rate).toPrecision(2)} %`, (latent.why ?? []).join(", "), seen(latent.contexts[0]?.token ?? "")];
    const button = make("button", parts.join("  "));
    button.addEventListener("click", () => show(latent, button));
    box.append(button);
  }
  document.getElementById("latent").replaceChildren();
  box.firstChild?.click();
}
if (choice) { choice.addEventListener("change", list); document.getElementById("find").addEventListener("input", list); list(); }
</script></body></html>
"""


def html_table(header, rows, verdict=None):
    """A table whose columns sort; `verdict`: the column that colours the rows. Rows that are in no ranking stay last."""
    def kind(row):
        words = "invalid" if row[0].startswith("control") else row[verdict] if verdict is not None else ""
        return next((k for k in ("better", "worse", "invalid") if words.startswith(k)), "")

    head = "".join(f"<th scope=col><button>{html.escape(title)}</button></th>" for title in header)
    body = "".join(f"<tr class='{kind(row)}'>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def report(caches, compared, primary, pictures):
    """The page. pictures: {name: path of a PNG, or in a word why there is none}. Nothing in it is fetched; all text is escaped."""
    body = []
    for acts, (runs, controls) in caches.items():
        found, tried = compared[acts]
        header, rows = table(runs, controls, found, primary)
        body += [f"<h2>{html.escape(heading(acts, runs))}</h2>", html_table(header, rows, header.index("verdict")), "<ul>",
                 *(f"<li>{html.escape(line)}</li>" for line in notes(runs, controls, found, tried, primary)), "</ul>"]
        others = others_table(runs, found, primary)
        if others:
            body += ["<details><summary>Other metrics (exploratory)</summary>", html_table(*others), "</details>"]
        rounded = precision_table(runs)
        if rounded:
            body += [f"<details><summary>{PRECISION}</summary>", html_table(*rounded), "</details>"]
    body += ["<details><summary>How to read this</summary>", *(f"<p>{html.escape(part)}</p>" for part in ABOUT.split("\n\n")), "</details>",
             "<h2>Latents</h2>"]
    features = {r.config["name"]: latents for runs, _ in caches.values() for r in runs if (latents := read_features(r))}
    if features:
        options = "".join(f"<option>{html.escape(name)}</option>" for name in features)
        body += [f"<p><label>Run <select id=run>{options}</select></label>",
                 "<label>Find <input id=find type=search placeholder='a word or token'></label></p>",
                 "<div id=browser><div id=latents aria-label=Latents></div><div id=latent aria-live=polite></div></div>"]
    else:
        body.append("<p>No run has eval/features.json (03_eval.py --eval features, of a language model).</p>")
    forests = {r.config["name"]: look_up(r, "structure/hierarchy/trees") for runs, _ in caches.values() for r in runs if r.valid}
    if any(forests.values()):
        body += ["<details><summary>Trees: latents that fire only with another one (the largest; share of their firing with it)</summary>",
                 *(f"<h3>{html.escape(name)}</h3><pre>{html.escape(drawn_trees(found))}</pre>" for name, found in forests.items() if found), "</details>"]
    body.append("<h2>Plots</h2>")
    for name, picture in pictures.items():
        if isinstance(picture, Path):
            data = base64.b64encode(picture.read_bytes()).decode()
            body.append(f"<figure><figcaption>{name}</figcaption><div><img alt='{name}' src='data:image/png;base64,{data}'></div></figure>")
    gaps = [f"<li>{name}: {html.escape(word)}</li>" for name, word in pictures.items() if not isinstance(word, Path)]
    body += ["<details><summary>Plots that there is no data for</summary><ul>", *gaps, "</ul></details>"] if gaps else []
    data = json.dumps(features).replace("<", "\\u003c")                       # so that no text in it ends the script
    start, middle, end = re.split("__BODY__|__FEATURES__", PAGE)
    return "".join([start, "\n".join(body), middle, data, end])


def drawn_trees(found):
    """Trees of eval/structure.json as indented text, a latent a line."""
    lines = []
    for tree in found:
        below = lambda latent: [t for t in tree if t["parent"] == latent]

        def draw(t, depth):
            lines.append("  " * depth + f"{t['latent']}: on {t['rate']:.2%} of rows" + (f", {t['given']:.0%} of them with {t['parent']}" if depth else ""))
            for child in below(t["latent"]):
                draw(child, depth + 1)

        draw(tree[0], 0)
    return "\n".join(lines)


def read_features(run):
    """The latents of eval/features.json, if it is of the run's present weights."""
    path = run.folder / "eval" / "features.json"
    result = read_json(path) if path.exists() and run.config else {}
    return result["latents"] if result.get("sae_checksum") == run.config.get("sae_checksum") and result else []


PLOTS = {                                     # file name -> f(caches, looks, path) that draws it, or returns in a word why there is nothing to draw
    "pareto": draw_pareto,
    "ablation": draw_ablation,
    **NOTES,
}


def main():
    p = Parser(__doc__)
    p.add_argument("runs", nargs="*", help="folders (default: all under runs/)")
    p.add_argument("--out", default="plots", help="folder to write to (default: %(default)s)")
    p.add_argument("--metric", choices=[m.key for m in METRICS if m.better], default=PRIMARY,
                   help="what the verdict is about; choose it before you look (default: %(default)s)")
    p.add_argument("--reference", nargs="+", choices=["saebench", "note004"], default=[], help="published figures to put beside the runs'")
    args = p.parse_args()
    if not args.out or Path(args.out).exists() and not Path(args.out).is_dir():
        raise Refuse(f"--out {args.out!r}: want a folder", 2)

    runs, controls = find_runs(args.runs)
    caches = {acts: ([r for r in runs if r.acts == acts], [c for c in controls if c.acts == acts]) for acts in dict.fromkeys(r.acts for r in runs)}
    look, out = looks(runs), Path(args.out)
    lock = take_lock(out)                                                     # held to the end
    compared = {acts: compare(members, args.metric) for acts, (members, _) in caches.items()}
    markdown, text = results(caches, compared, args.metric)
    for name in args.reference:
        more_markdown, more_text = published_table(name, runs)
        markdown, text = markdown + more_markdown, text + "\n" + more_text
    print(text + "\n")
    write_file(out / "results.md", markdown.encode())
    plt.rcParams.update(STYLE)
    pictures, plots = {}, {"verdicts": lambda caches, look, path: draw_verdicts(caches, compared, args.metric, path), **PLOTS}
    for name, draw in plots.items():
        pictures[name] = draw(caches, look, out / f"{name}.png") or out / f"{name}.png"
        if pictures[name] != out / f"{name}.png":
            (out / f"{name}.png").unlink(missing_ok=True)                     # of an earlier call, on other runs
        print(f"{out / name}.png: {'drawn' if isinstance(pictures[name], Path) else pictures[name]}")
    write_file(out / "report.html", report(caches, compared, args.metric, pictures).encode())
    print(f"{out}/report.html: all of it on one page")


if __name__ == "__main__":
    run_script(main)

"""Say what the runs show: a table with verdicts, plots and a page, from the run folders alone.

    python 04_plot.py                               all runs under runs/
    python 04_plot.py runs/topk-s* runs/baseline-s* --out plots/two
    python 04_plot.py --metric absorption_full      verdicts about it; choose before you look

Reads runs/NAME/{config.json, metrics.jsonl, eval/*} and controls, runs/controls-ACTS/KIND/eval/*.
Writes
    plots/results.md     a row per variant and setting: every metric, differences, verdicts, caveats
    plots/report.html    the same on one page, with all plots and the latents; needs no network
    plots/NAME.png       one for each row of the table PLOTS that has data

A run that a guard of core calls invalid stands in the table and is in no plot or comparison; a
guard of another evaluation takes that evaluation's numbers out.
"""
import base64
import html
import io
import itertools
import json
import math
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from scipy import stats

from sae import (Parser, Refuse, lock, read_json, read_log, read_tensors, run_folders, run_script,
                 write_file)


class Metric(NamedTuple):
    title: str               # in tables
    digits: int
    better: int = 0          # 1: more is better, -1: less is, 0: described and not compared
    worth: float = 0.0       # the smallest difference that matters ...
    relative: bool = False   # ... as a share of what it is compared with


METRICS = {
    "l0": Metric("L0", 1),
    "explained_variance": Metric("EV", 4, 1, 0.01),
    "ce_recovered": Metric("CE rec.", 4, 1, 0.01),
    "kl_sae": Metric("KL", 4, -1, 0.1, relative=True),
    "ce_loss_score": Metric("CE loss score", 4, 1, 0.01),
    "kl_div_score": Metric("KL div. score", 4, 1, 0.01),
    "dead": Metric("dead", 3),
    "mcc": Metric("MCC", 3, 1, 0.02),
    "f1": Metric("F1", 3, 1, 0.02),
    "absorption": Metric("absorption", 3, -1, 0.25, relative=True),
    "absorption_full": Metric("absorption (full)", 4, -1, 0.25, relative=True),
    "absorption_fraction": Metric("absorption (fraction)", 4, -1, 0.25, relative=True),
    "probe_1": Metric("top-1 probing accuracy", 3, 1, 0.02),
    "probe_5": Metric("top-5 probing accuracy", 3, 1, 0.02),
    "probe_20": Metric("top-20 probing accuracy", 3, 1, 0.02),
    "scr": Metric("SCR@20", 3, 1, 0.05),
    "tpp": Metric("TPP@20", 3, 1, 0.25, relative=True),
    "unlearning": Metric("unlearning score", 3, 1, 0.02),
    "seconds": Metric("s / M tokens", 1),
}

# ---- statistics: is a difference real, and does it matter? ---------------------------------------

LEVEL = 0.05                 # false better or worse in at most this share of experiments
MIN_SEEDS = 3                # two seeds have an interval of 12.7 standard errors to either side
SAME_L0 = 0.05               # runs whose L0 differs by no more than this share may be compared
WIDEST = 2.0                 # two L0s further apart than this factor are not interpolated between
RULE = """A difference is taken between runs of the same seed, batches, length, width and base code,
evaluated on the same data, and at the same L0: interpolated in log L0 between two runs of the other
variant at most a factor of 2 apart, or to one run within 5 %, never extrapolated. *Better* and
*worse* ask for two things: a p of at most 5 % (twice that of the paired t test, for so few seeds
can't show that they are normal, and after Holm's correction for all variants and settings tried)
and a mean difference of at least what matters. *No difference seen* is a finding: the whole 95 %
interval is smaller than what matters. *Cannot tell* is all else, fewer than 3 seeds included; seeds
that were lost are counted in the verdict, "better (5 of 8 seeds)". *Invalid* runs are in no
comparison, and a variant that draws its own batches is compared by Welch's test, because its seeds
are not paired."""


def mean_difference(mine, theirs, paired=True):
    """(mean, low, high, p) of mine - theirs [..., seeds]: its 95 % interval, and a doubled p.

    p is doubled because so few seeds can't show whether the differences are normal. Below
    MIN_SEEDS seeds the interval is nan and p is 1.
    """
    mine, theirs = np.asarray(mine, float), np.asarray(theirs, float)
    deltas = mine - theirs
    mean = deltas.mean(-1)
    # Seeds that change nothing are no evidence: their t is infinite.
    inert = np.ptp(deltas, -1) <= 1e-9 * np.abs(deltas).max(-1)
    few = deltas.shape[-1] < MIN_SEEDS
    if few or inert.all():
        end = np.where(few | (mean != 0), np.nan, 0.0)       # the same bits are no difference
        return mean, end, end, np.ones_like(mean)
    if paired:
        test = stats.ttest_rel(mine, theirs, axis=-1)
    else:
        test = stats.ttest_ind(mine, theirs, axis=-1, equal_var=False)
    interval = test.confidence_interval(1 - LEVEL)
    return mean, interval.low, interval.high, np.minimum(1, 2 * test.pvalue)


def holm(p):
    """Adjusted p [..., m] of m comparisons made together (Holm 1979)."""
    p = np.asarray(p, float)
    order = np.argsort(p, -1)
    steps = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.minimum(1, np.maximum.accumulate(steps, -1))
    return np.take_along_axis(adjusted, np.argsort(order, -1), -1)


def call(mean, low, high, p, worth, better=1):
    """Whether differences are better, worse, no difference seen, or cannot be told; as words [...].

    p: adjusted; worth: the smallest difference that matters; better: -1 where less is better.
    """
    gain = np.multiply(mean, better)
    real = (p <= LEVEL) & (abs(gain) >= worth)
    small = (low >= -worth) & (high <= worth)        # also of what is 0 in all runs
    words = ["better", "worse", "no difference seen"]
    return np.select([real & (gain > 0), real & (gain < 0), small], words, "cannot tell")


# ---- runs and curves: two tables of everything that was measured ---------------------------------

# SAEBench's own names of its means -> ours
SAEBENCH = {
    "mean_full_absorption_score": "absorption_full",
    "mean_absorption_fraction_score": "absorption_fraction",
    "mean_num_split_features": "splits",
    "sae_top_1_test_accuracy": "probe_1",
    "sae_top_5_test_accuracy": "probe_5",
    "sae_top_20_test_accuracy": "probe_20",
    "scr_metric_threshold_20": "scr",
    "tpp_threshold_20_total_metric": "tpp",
    "unlearning_score": "unlearning",
}
# Lists of an evaluation whose x is another list: prefix -> name of that list. Others: percent.
AXES = {"geometry.jl.": "geometry.jl.dimensions", "geometry.pairs.": "geometry.pairs.rows",
        "density.counts": "density.log10_edges"}


def read_evaluation(name, result):
    """({metric: number}, [(metric, x, y)]) of a file eval/NAME.json.

    Core's metrics and those of METRICS go by their own names, all others by NAME.KEY, the keys of
    nested dicts joined by dots.
    """
    numbers, lists = {}, {}
    for part in (result["metrics"], result.get("details") or {}):
        for key, (value,) in pd.json_normalize(part).items():
            key = SAEBENCH.get(key, key)
            if name != "core" and key not in METRICS:
                key = f"{name}.{key}"
            if isinstance(value, list) and value and isinstance(value[0], (int, float)):
                lists[key] = value
            elif isinstance(value, (int, float)) and value != -1:        # SAEBench's nan
                numbers[key] = value

    # a list is a curve; SAEBench's details are curves over letters or data sets
    curves = []
    for key, ys in lists.items():
        xs = next((lists[a] for start, a in AXES.items() if key.startswith(start)),
                  np.linspace(0, 100, len(ys)))
        if len(xs) > len(ys):                # edges of bins: their middles
            xs = np.convolve(xs, [0.5, 0.5], "valid")
        curves.append((key, xs, ys))
    details = pd.DataFrame(result.get("eval_result_details") or [])
    for key in details.select_dtypes("number"):
        curves.append((f"{name}.{key}", details.select_dtypes("object").iloc[:, 0], details[key]))
    return numbers, curves


def read_log_curves(log, settings):
    """[(metric, x, y)] of a training log, x in tokens, and {metric: last value}."""
    log = pd.DataFrame(log).select_dtypes("number")
    log["zeros"] = 1 - log["l0"] / settings["d_sae"]
    if "pair_cos" in log and "tau" not in log:
        log["tau"] = settings["ortho_tau"]                   # fixed
    curves = [(f"log.{key}", list(log["tokens"]), list(log[key])) for key in log]
    return curves, log.iloc[-1].add_prefix("final.").to_dict()


MEASURED_ON = ("version", "acts_checksum", "val", "settings")       # keys of a file eval/NAME.json


def read_evaluations(folder, row):
    """[(metric, x, y)] of the folder's evaluations; their numbers and guards are added to `row`.

    An evaluation of older weights or one that its own guard calls invalid counts for nothing.
    """
    curves = []
    for path in sorted((folder / "eval").glob("*.json"), key=lambda p: (p.stem != "core", p.stem)):
        result = read_json(path, "metrics", "guards", "sae_checksum")
        is_core = path.stem == "core"
        if result["sae_checksum"] != row["sae_checksum"]:
            row["stale"].append(path.stem)
            continue

        # guards
        for guard in result["guards"]:
            row["whys"].append((guard["name"], guard["why"]))
            is_out = is_core and guard["level"] == "invalid"
            row["invalid" if is_out else "caveats"].append(guard["name"])
        invalid = any(guard["level"] == "invalid" for guard in result["guards"])
        if invalid and not is_core:
            continue

        # numbers, and what they were measured on
        numbers, more = read_evaluation(path.stem, result)
        if is_core and not invalid and not {"l0", "explained_variance"} <= numbers.keys():
            raise Refuse(f"{path} lacks explained_variance or l0: 03_eval.py --eval core --force")
        on = json.dumps([result.get(key) for key in MEASURED_ON], sort_keys=True)
        row["measured_on"] |= dict.fromkeys(numbers, on)
        row |= numbers
        curves += more
    return curves


def read_run(folder):
    """(row of `runs`, [(metric, x, y)]) of the folder of a run or of a control.

    row["problem"]: in a few words why it is in no comparison; "" if it is.
    """
    control = not (folder / "config.json").exists()
    needed = ("name", "variant", "acts", "seed", "settings", "status", "parent", "steps")
    if control:
        config = read_json(folder / "eval" / "core.json", "acts", "sae_checksum")
    else:
        config = read_json(folder / "config.json", *needed)
    settings = config.get("settings") or {}
    row = {key: config.get(key) for key in needed}
    row |= {key: config.get(key, "") for key in
            ("acts_checksum", "sae_checksum", "weights_checksum", "code_checksum",
             "base_checksum", "acted")}
    row |= {key: settings.get(key) for key in ("d_sae", "batch_size")}
    row |= {"folder": folder, "control": control, "paired": config.get("paired", True),
            "invalid": ["void"] * bool(config.get("void")), "caveats": [], "whys": [], "stale": [],
            "measured_on": {}, "l0": math.nan}
    curves = read_evaluations(folder, row)

    # what training logged, and how often each latent fires
    if row["status"] == "done":
        log_curves, final = read_log_curves(read_log(folder, config), settings)
        curves += log_curves
        row |= final
        rows = config["steps"] * settings["batch_size"]
        row["seconds"] = config.get("seconds", math.nan) * 1e6 / rows
    usage = folder / "eval" / "rates.safetensors"
    if usage.exists() and "core" not in row["stale"]:
        rates, places = read_tensors(usage)[0]["rate"].numpy(), np.linspace(0, 100, 201)
        curves.append(("usage", places, np.percentile(rates, 100 - places)))
    row["problem"] = problem(row)
    row["caveats"] += [f"{name} is of older weights" for name in row["stale"]]
    return row, curves


def problem(row):
    """In a few words why a run is in no comparison, or ''."""
    if row["status"] not in ("done", None):
        return "training failed" if row["status"] == "failed" else "training not finished"
    if row["invalid"]:
        return "invalid: " + ", ".join(sorted(set(row["invalid"])))
    if "core" in row["stale"]:
        return "evaluated before its last training"
    return "not evaluated" if math.isnan(row["l0"]) else ""


class Data(NamedTuple):
    runs: pd.DataFrame       # a row per run: config, metrics, guards; `group`: all but its seed
    controls: pd.DataFrame   # the same of the controls
    curves: pd.DataFrame     # folder (of the run), metric, x, y
    found: pd.DataFrame      # a row per group and other: difference and verdict
    metric: str              # what the verdicts are about

    @property
    def valid(self):
        return self.runs[self.runs.problem == ""]


def read_runs(folders):
    """(runs, controls, curves) of the folders, and of the controls of their caches."""
    folders = [Path(f) for f in run_folders(folders)]
    cores = {path for f in folders for path in f.parent.glob("controls-*/*/eval/core.json")}
    rows, parts = [], []
    for folder in folders + sorted(path.parent.parent for path in cores):
        row, curves = read_run(folder)
        rows.append(row)
        parts += [(folder, *curve) for curve in curves]
    table = pd.DataFrame(rows)
    curves = pd.DataFrame(parts, columns=["folder", "metric", "x", "y"]).explode(["x", "y"])
    curves = curves.astype({"y": float})
    runs, controls = table[~table.control].copy(), table[table.control]
    name_groups(runs)
    order = sorted(runs.index, key=lambda i: (runs.acts[i], natural(runs.group[i]), runs.seed[i]))
    runs = runs.loc[order].reset_index(drop=True)
    mark_other_code(runs)
    mark_same_weights(runs)
    return runs, controls[controls.acts.isin(runs.acts)], curves


def natural(name):
    """Sorts idea_r2 before idea_r10, and the baseline first."""
    parts = [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
    return [name.split("-")[0] != "baseline", *parts]


def name_groups(runs):
    """Add overrides, usual, group and study to `runs`.

    overrides: settings from --set and --sweep, which a run's name shows; usual: those that more
    than half of a cache's runs have; group: variant and its other overrides; study: the name
    before _r1 ...
    """
    # a run's length is in its name like a setting
    runs["settings"] = [{**run.settings, "steps": run.steps} for run in runs.itertuples()]
    runs["overrides"] = [shown_settings(run) for run in runs.itertuples()]
    usual = {acts: usual_settings(shown) for acts, shown in runs.overrides.groupby(runs.acts)}
    runs["usual"] = runs.acts.map(usual)
    runs["group"] = [name_group(run) for run in runs.itertuples()]
    runs["study"] = runs.variant.str.extract(r"(.+)_r\d+$")[0].fillna("yardsticks")


def shown_settings(run):
    """{setting: value as text} that a run's name shows."""
    return {k: str(v) for k, v in run.settings.items() if f"-{k}={v}-" in f"{run.name}-"}


def mark_other_code(runs):
    """Take out the runs that ran other code than most seeds of their group; without a majority
    all."""
    for _, members in runs[runs.problem == ""].groupby(["acts", "group"]):
        counts = members.code_checksum.value_counts()
        usual = counts.index[0] if counts.iloc[0] > len(members) / 2 else None
        odd = members.index[members.code_checksum != usual]
        runs.loc[odd, "problem"] = "other code than its other seeds: train them again"


def mark_same_weights(runs):
    """Take out the copies of a run, and say of an idea with its parent's weights that it never
    acted."""
    for _, same in runs[runs.problem == ""].groupby(["acts", "group", "sae_checksum"]):
        for i in same.index[1:]:
            runs.at[i, "problem"] = "invalid: duplicate"
            runs.whys[i].append(("duplicate", f"a copy of {runs.folder[same.index[0]]}"))
    known = runs[(runs.problem == "") & (runs.weights_checksum != "")]   # not of an older stage 2
    # l0: some ideas act on what fires alone
    for _, same in known.groupby(["acts", "weights_checksum", "l0"]):
        for i in same.index[same.parent.isin(same.variant)]:
            runs.caveats[i].append("never acted")
            runs.whys[i].append(("never acted", f"it has the weights of {runs.parent[i]}"))


def usual_settings(overrides):
    """{setting: value} that more than half of the runs override alike."""
    counts = Counter(setting for mine in overrides for setting in mine.items())
    return {key: value for (key, value), n in counts.items() if n > len(overrides) / 2}


def name_group(run):
    """A run's variant and its unusual settings: 'topk-l0=32.0'."""
    known = run.overrides.keys() | run.usual.keys() & run.settings.keys()
    unusual = [f"{key}={run.settings[key]}" for key in sorted(known)
               if str(run.settings[key]) != run.usual.get(key)]
    return "-".join([run.variant, *unusual])


# ---- comparisons: the same seed at the same L0 ---------------------------------------------------


class NoMatch(Exception):
    """Why a run has none to be compared with, in a few words."""


MUST_MATCH = {               # column of `runs` -> what is said if it differs
    "steps": "no run of the same length on the same data",
    "acts_checksum": "no run of the same length on the same data",
    "d_sae": "another width",
    "batch_size": "another batch size",
    "base_checksum": "trained by another sae.py",
}


def twins(run, other, others, l0):
    """The runs of `others`, those of the variant `other`, that `run` may be compared with, by L0.

    Of those that match the group with the least different settings, the fewest settings in its name
    and the L0 nearest to l0, and all that differ from it in l0 alone; of these what is valid and of
    the run's seed. So each seed gets the same group, and none gets another in place of one that
    failed. l0: the median of the run's seeds. NoMatch if there are none.
    """
    if others.empty:
        raise NoMatch(f"{other} was not run")
    if (others.problem != "").all():
        whys = others.problem.str.removeprefix("invalid: ").unique()
        raise NoMatch(f"{other} is out: {', '.join(whys)}")
    for column, words in MUST_MATCH.items():
        unknown = (others[column] == "") | (run[column] == "")       # to an older stage 2
        others = others[unknown | (others[column] == run[column])]
        if others.empty:
            raise NoMatch(words)

    # the group: the same for all seeds of the run
    unlike = others.settings.map(lambda settings: count_unlike(settings, run.settings))
    alike = others[unlike == unlike.min()]
    off = (alike.groupby("group").l0.transform("median") / l0 - 1).abs().fillna(0)
    named = alike.overrides.map(lambda shown: len(shown.keys() - {"l0"}))
    nearest = alike.assign(named=named, off=off).sort_values(["named", "off", "group"]).iloc[0]

    # its runs at any l0
    curve = alike.settings.map(lambda settings: count_unlike(settings, nearest.settings) == 0)
    curve = alike[curve & (alike.seed == run.seed) & (alike.problem == "")]
    if curve.empty:
        raise NoMatch("no valid run of the same seed")
    return curve.sort_values("l0")


def count_unlike(a, b):
    """How many settings that both have differ, except l0; the sparsifier counts less than one."""
    differ = [k for k in a.keys() & b.keys() - {"l0"} if a[k] != b[k]]
    return len(differ) - 0.5 * ("activation" in differ)


def value_at_l0(curve, run, metric):
    """A metric of `curve`, runs sorted by L0, at the L0 of `run`; NoMatch if there is none."""
    on = run.measured_on[metric]
    curve = curve[[found.get(metric) == on for found in curve.measured_on]]
    if curve.empty:
        raise NoMatch("not evaluated alike: 03_eval.py again")
    xs, ys = curve.l0.to_numpy(float), curve[metric].to_numpy(float)
    above = np.searchsorted(xs, run.l0, side="right")
    if 0 < above < len(xs) and xs[above] <= WIDEST * xs[above - 1]:
        return np.interp(np.log(run.l0), np.log(xs), ys)
    nearest = np.argmin(np.abs(np.log(xs / run.l0)))
    if abs(run.l0 / xs[nearest] - 1) > SAME_L0:
        raise NoMatch("its L0 differs")
    return ys[nearest]


def difference(members, other, others, metric):
    """A group's difference in a metric to the runs `others` of the variant `other`, as a dict with
    mean, low, high, p, worth, used, seeds, lost, deltas, against.

    lost: why seeds are missing, {words: how many}; against: the groups whose names differ from
    `other` in more than l0.
    """
    mine, theirs, lost, groups = [], [], Counter(), set()
    l0 = members.l0[members.problem == ""].quantile()
    for _, run in members.iterrows():
        try:
            if run.problem:
                raise NoMatch(run.problem)
            if pd.isna(run.get(metric)):
                raise NoMatch("not measured")
            curve = twins(run, other, others, l0)
            theirs.append(value_at_l0(curve, run, metric))
            mine.append(run[metric])
            groups.update(curve.group.str.replace(r"-l0=[^-]+", "", regex=True))
        except NoMatch as why:
            lost[str(why)] += 1

    mean, low, high, p, worth = math.nan, math.nan, math.nan, 1.0, math.nan
    if mine:
        paired = members.paired.all() and others.paired.all()
        mean, low, high, p = mean_difference(mine, theirs, paired)
        level = abs(np.mean(theirs)) if METRICS[metric].relative else 1
        worth = METRICS[metric].worth * level
    return {"mean": mean, "low": low, "high": high, "p": p, "worth": worth, "used": len(mine),
            "seeds": len(members), "lost": lost, "deltas": np.subtract(mine, theirs).tolist(),
            "against": ", ".join(sorted(groups - {other}))}


def compare(runs, metric):
    """`found`: a row per cache, group and other run (the baseline, the parent) with a verdict.

    The parent is the row before. Holm's correction is over all groups of a cache.
    """
    rows = []
    ideas = runs[runs.variant != "baseline"].groupby(["acts", "group"], sort=False)
    for (acts, group), members in ideas:
        for whose, other in (("baseline", "baseline"), ("parent", members.parent.iloc[0])):
            others = runs[(runs.variant == other) & (runs.acts == acts)]
            about = {"acts": acts, "group": group, "whose": whose, "other": other, "metric": metric}
            rows.append(about | difference(members, other, others, metric))
    columns = ["acts", "group", "whose", "other", "metric", "mean", "low", "high", "p", "worth",
               "used", "seeds", "lost", "deltas", "against"]
    found = pd.DataFrame(rows, columns=columns)
    found["holm"] = found.groupby(["acts", "whose"]).p.transform(holm)
    found["verdict"] = [verdict(row) for _, row in found.iterrows()]
    return found


def verdict(row):
    """A verdict in words, with its seeds: 'better (5 of 8 seeds)', 'invalid (untrained)'."""
    if row.used == 0:
        word = "cannot tell"
        if all(words.startswith("invalid: ") for words in row.lost):
            word = "invalid"
        lost = dict.fromkeys(words.removeprefix("invalid: ") for words in row.lost)
        return f"{word} ({', '.join(lost)})"
    about = METRICS[row.metric]
    word = call(row["mean"], row.low, row.high, row.holm, row.worth, about.better)
    of = f" of {row.seeds}" * (row.used < row.seeds)
    return f"{word} ({row.used}{of} seed{'s' * (row.seeds > 1)})"


# ---- tables --------------------------------------------------------------------------------------


def mean_sd(values, digits):
    """'0.865 ± 0.002', or '0.865' of one value, or '-' of none."""
    values = values.dropna()
    if values.empty:
        return "-"
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def show_interval(row, digits):
    """'+0.010 [+0.002, +0.018]', '+0.010', or '-'."""
    if math.isnan(row["mean"]):
        return "-"
    interval = "" if math.isnan(row.low) else f" [{row.low:+.{digits}f}, {row.high:+.{digits}f}]"
    return f"{row['mean']:+.{digits}f}{interval}"


def measured(runs, metrics):
    """Those of `metrics` that a run has."""
    return [m for m in metrics if m in runs and runs[m].notna().any()]


def entries(data, acts):
    """Yield (name, runs to average, all runs, {whose: row of `found`}), controls last."""
    for group, members in data.runs[data.runs.acts == acts].groupby("group", sort=False):
        mine = data.found[(data.found.acts == acts) & (data.found.group == group)]
        told = {row.whose: row for _, row in mine.iterrows()}
        valid = members[members.problem == ""]
        yield group, valid if len(valid) else members, members, told
    for i, control in data.controls[data.controls.acts == acts].iterrows():
        row = data.controls.loc[[i]]
        yield f"control: {control.folder.name}", row, row, {}


def remarks(members, told):
    """What stands beside a group's verdict: its caveats, and seeds that are not in the verdict."""
    if members.control.any():
        return []                # they are made to trip the guards
    said = Counter(word for words in members.caveats for word in dict.fromkeys(words))
    if not told:
        said.update(words for words in members.problem if words)
    elif told["baseline"].used:
        said.update(told["baseline"].lost)
    n = len(members)
    if told and told["baseline"].against:
        said[f"against {told['baseline'].against}"] = n
    return [word + f" ({count} of {n} seeds)" * (count < n) for word, count in said.items()]


def results_table(data, acts):
    """The full table of one cache as a data frame: a row per group, controls last."""
    metrics = measured(data.runs[data.runs.acts == acts], METRICS)
    blind, main, rows = uninformative(data, acts), METRICS[data.metric], []
    for name, scored, members, told in entries(data, acts):
        row = {"run": name}
        if told:
            base, parent = told["baseline"], told["parent"]
            row |= {"verdict": base.verdict,
                    f"{main.title} - baseline's": show_interval(base, main.digits),
                    "p": f"{base.holm:.3g}",
                    "parent": parent.other,
                    "against its parent": parent.verdict,
                    f"{main.title} - parent's": show_interval(parent, main.digits)}
        elif members.problem.str.startswith("invalid").all() and not members.control.any():
            row["verdict"] = "invalid"       # of the baseline; the page ranks no such row
        for m in metrics:
            row[METRICS[m].title + "*" * (m in blind)] = mean_sd(scored[m], METRICS[m].digits)
        row["seeds"] = "" if members.control.any() else str(len(members))
        row["its mechanism did"] = show_acted(members)
        row["remarks"] = "; ".join(remarks(members, told))
        rows.append(row)
    return pd.DataFrame(rows, columns=list(max(rows, key=len))).fillna("")


def show_acted(members):
    """What a group's mechanism counted in training, mean over seeds: 'revived 12, pairs 340'."""
    counts = pd.DataFrame([counted for counted in members.acted if counted])
    return ", ".join(f"{name} {value:.4g}" for name, value in counts.mean().items())


def uninformative(data, acts):
    """{metric: the controls that do at least as well as the median run}."""
    valid, controls = data.valid[data.valid.acts == acts], data.controls[data.controls.acts == acts]
    found, sparse = {}, controls.l0 <= (1 + SAME_L0) * valid.l0.quantile()
    for metric, about in METRICS.items():
        if about.better and metric in valid and metric in controls:
            on = {on.get(metric) for on in valid.measured_on}
            alike = controls.measured_on.map(lambda theirs: theirs.get(metric) in on)
            gain = about.better * (controls[metric] - valid[metric].quantile())
            as_good = sparse & alike & (gain >= 0)
            if as_good.any():
                found[metric] = [folder.name for folder in controls.folder[as_good]]
    return found


def notes(data, acts):
    """Sentences under a table: what was found, what controls do as well, why runs are invalid."""
    runs = data.runs[data.runs.acts == acts]
    lines = [summary(data, acts)]
    for metric, controls in uninformative(data, acts).items():
        lines.append(f"{METRICS[metric].title} says nothing by itself here: {join_names(controls)} "
                     "(controls) do at least as well as the median run.")
    whys = {}
    for name, said in zip(runs.group + "-s" + runs.seed.map("{:.0f}".format), runs.whys):
        for guard, why in said:
            whys.setdefault(guard, {}).setdefault(name, why)
    for guard, by_run in whys.items():
        first, why = next(iter(by_run.items()))
        lines.append(f"{guard}: {len(by_run)} run{'s' * (len(by_run) > 1)}, as {first} ({why})")
    return lines


def printed_table(data, acts, width=100):
    """The short table of one cache as lines of at most `width` columns."""
    main = METRICS[data.metric]
    wanted = dict.fromkeys(["l0", "explained_variance", "ce_recovered", "mcc", data.metric])
    wanted = measured(data.runs[data.runs.acts == acts], wanted)
    rows = [["run", *(METRICS[m].title for m in wanted), f"{main.title} - baseline's", "verdict"]]
    for name, scored, members, told in entries(data, acts):
        cells = [mean_sd(scored[[m]].mean(), min(3, METRICS[m].digits)) for m in wanted]
        cells.append(show_interval(told["baseline"], 3) if told else "")
        words = [told["baseline"].verdict] if told else []
        rows.append([name, *cells, "; ".join(words + remarks(members, told))])
    return align(rows, width)


def align(rows, width):
    """Rows of cells as lines of at most `width` columns; headings and the last column are wrapped.

    A name that is wider than a quarter of the line has a line of its own.
    """
    names, *columns, _ = zip(*rows)
    widths = [min(width // 4, max(map(len, names)))]
    for heading, *cells in columns:
        widths.append(max(map(len, [*textwrap.wrap(heading, 15), *cells])))
    widths.append(max(10, width - sum(widths) - 2 * len(widths)))
    lines = []
    for name, *cells in rows:
        if len(name) > widths[0]:
            lines.append(name)
            name = ""
        wrapped = [textwrap.wrap(cell, w) for cell, w in zip([name, *cells], widths)]
        for name, *numbers, words in itertools.zip_longest(*wrapped, fillvalue=""):
            numbers = [f"{cell:>{w}}" for cell, w in zip(numbers, widths[1:])]
            lines.append("  ".join([name.ljust(widths[0]), *numbers, words]).rstrip())
    return lines


FINDINGS = {                 # verdict -> what is said of one and of several
    "better": ("is better than the baseline", "are better than the baseline"),
    "worse": ("is worse", "are worse"),
    "no difference seen": ("makes no difference that matters", "make no difference that matters"),
    "cannot tell": ("is undecided", "are undecided"),
    "invalid": ("is invalid", "are invalid"),
}


def summary(data, acts):
    """What was found against the baseline, in one plain sentence."""
    found = data.found[(data.found.acts == acts) & (data.found.whose == "baseline")]
    if found.empty:
        return "There is nothing but the baseline: nothing to compare."
    words = found.verdict.str.split(" \\(").str[0]
    parts = []
    for word, (one, many) in FINDINGS.items():
        names = list(found.group[words == word])
        if names:
            named = str(len(names)) if word in ("cannot tell", "invalid") else join_names(names)
            parts.append(f"{named} {one if len(names) == 1 else many}")
    said = f"In {METRICS[data.metric].title}, {'; '.join(parts)}."
    if found.seeds.max() < MIN_SEEDS:
        said += " Verdicts need three seeds: 02_train.py --seed 0 1 2."
    elif found.used.max() < MIN_SEEDS:
        said += f" Most often: {sum(found.lost, Counter()).most_common(1)[0][0]}."
    return said


def join_names(names):
    """'a', 'a and b', 'a, b and c'; of many five, and how many more."""
    if len(names) > 6:
        names = [*names[:5], f"{len(names) - 5} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def heading(data, acts):
    """A cache's name, and the settings that a group has unless its name says otherwise."""
    usual = data.runs.usual[data.runs.acts == acts].iloc[0]
    settings = " ".join(f"{key}={value}" for key, value in sorted(usual.items()))
    return f"{acts} with {settings}" if usual else acts


def results_markdown(data):
    """The text of results.md."""
    lines = ["# Results", "", *textwrap.wrap(" ".join(RULE.split()), 100), "", worth_in_words()]
    for acts in data.runs.acts.unique():
        lines += ["", f"## {heading(data, acts)}", "", *markdown(results_table(data, acts)), ""]
        lines += [f"* {line}" for line in notes(data, acts)]
    return "\n".join(lines) + "\n"


def markdown(table):
    """A data frame as the lines of a Markdown table."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.values.tolist()]
    return ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows]


def worth_in_words():
    """'What matters: EV 0.01, KL 10 % of it ...'"""
    parts = [f"{m.title} {m.worth:.0%} of it" if m.relative else f"{m.title} {m.worth:g}"
             for m in METRICS.values() if m.better]
    return "What matters: " + ", ".join(parts) + "."


# ---- plots: a few ways to draw, then one table of what is drawn ----------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C9A", "#8C6D46"]
DASHES = ["-", "--", "-."]
MARKERS = "osD^vP*"          # one fewer than colours, so that 56 pairs differ
STYLE = {"figure.dpi": 100, "savefig.dpi": 130, "font.size": 9, "axes.titlesize": 9,
         "axes.labelsize": 8.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#E5E5E5", "axes.axisbelow": True, "legend.framealpha": 0.7,
         "legend.edgecolor": "none", "legend.fontsize": 7, "xtick.labelsize": 7.5,
         "ytick.labelsize": 7.5, "axes.formatter.min_exponent": 5,
         "axes.prop_cycle": plt.cycler(color=COLOURS)}
MANY = 15                    # lines of a panel that can be told apart, without the baseline's

LABELS = {                   # what stands beside an axis; METRICS has the others
    "explained_variance": "explained variance",
    "mse": "mean squared error",
    "l0": "L0 (active latents per row)",
    "l1": "L1 of a row's activations",
    "l2_ratio": "L2 ratio ||x_hat|| / ||x||",
    "ce_recovered": "cross-entropy recovered",
    "kl_sae": "KL divergence (nats)",
    "dead": "dead latents (share)",
    "absorption": "absorption of true features",
    "absorption.splits": "split features per letter",
    "forget.forget_added": "loss added on the topic to forget (nats)",
    "forget.retain_added": "loss added on other text (nats)",
    "geometry.correlation": "mean |correlation| of latents",
    "geometry.mean_abs_cosine": "mean |cosine| of decoder rows",
    "geometry.effective_rank": "effective rank of the decoder",
    "geometry.mean_max_cosine": "cosine with nearest decoder row",
    "geometry.coherence": "largest cosine of decoder rows",
    "geometry.hoyer": "Hoyer index of a row (1: one latent)",
    "geometry.gini": "Gini index of firing rates",
    "geometry.condition_group": "condition number, latents that fire together",
    "geometry.condition_active": "condition number, a row's latents",
    "geometry.jl.run.error_sd": "cosine error (sd)",
    "geometry.jl.run.recall": "recall of the closest pairs",
    "geometry.pairs.coactivation.jaccard": "co-activation pairs kept (Jaccard)",
    "geometry.pairs.preact.jaccard": "pre-activation pairs kept (Jaccard)",
    "geometry.l0_of_rows": "L0 of a row",
    "stability.matched": "cosine of latents matched across seeds",
    "stability.again": "latents matched above 0.7 (share)",
    "stability.best": "cosine with any latent of another seed",
    "log.loss": "loss, all terms",
    "log.loss_recon": "reconstruction loss",
    "log.explained_variance": "explained variance (training)",
    "log.dead": "dead latents (share)",
    "log.zeros": "activations that are 0 (share)",
    "log.tau": "threshold tau",
    "log.pair_cos": "mean cosine of the pairs",
    "log.pair_over": "pairs above tau (share)",
    "log.revived": "latents revived so far",
    "usage": "firing rate",
    "density.counts": "latents",
}
NULLS = {                    # the same figure without an SAE: by chance, or of the model, in grey
    "geometry.correlation": "geometry.null.correlation",
    "geometry.mean_abs_cosine": "geometry.null.mean_abs_cosine",
    "geometry.effective_rank": "geometry.null.effective_rank",
    "geometry.mean_max_cosine": "geometry.null.mean_max_cosine",
    "geometry.coherence": "geometry.null.coherence",
    "geometry.condition_group": "geometry.condition.group.null.median",
    "geometry.condition_active": "geometry.condition.active.null.median",
    "geometry.jl.run.error_sd": "geometry.jl.null.error_sd",
    "geometry.jl.run.recall": "geometry.jl.null.recall",
    "geometry.pairs.coactivation.jaccard": "geometry.pairs.null",
    "geometry.pairs.preact.jaccard": "geometry.pairs.null",
    "stability.matched": "stability.null",
    "probe_1": "sparse_probing.llm_top_1_test_accuracy",
    "probe_5": "sparse_probing.llm_top_5_test_accuracy",
    "probe_20": "sparse_probing.llm_top_20_test_accuracy",
}
X_LABELS = {"log.": "training tokens", "geometry.jl.": "dimensions of the projection",
            "geometry.pairs.": "rows in a batch", "density.": "log10 firing rate",
            "usage": "latents, most frequent first (%)", "geometry.l0": "rows, sparsest first (%)"}


def label(metric):
    """What stands beside the axis of a metric."""
    return textwrap.fill(LABELS.get(metric) or METRICS[metric].title, 30)


def panels(runs, with_swept=False):
    """[(title, runs)]: a panel for each cache or, of more than MANY lines, for each study.

    The baseline is in each; a study of more than MANY lines is cut in parts. Settings that were
    swept have plots of their own: without with_swept a variant's usual settings stand for it.
    """
    found = []
    for acts, of_cache in runs.groupby("acts", sort=False):
        if not with_swept:
            plain = of_cache.group == of_cache.variant
            only_swept = ~of_cache.variant.isin(of_cache.variant[plain])
            of_cache = of_cache[plain | only_swept]
        drawn = "variant" if with_swept else "group"       # what has a line
        if of_cache[drawn].nunique() <= MANY:
            found.append((f"{acts}: all runs", of_cache))
            continue
        is_base = of_cache.variant == "baseline"
        room = max(1, MANY + 1 - of_cache[is_base][drawn].nunique())
        for study, members in of_cache[~is_base].groupby("study"):
            names = members[drawn].unique()
            for at in range(0, len(names), room):
                part = members[drawn].isin(names[at:at + room])
                found.append((f"{acts}: {study}", pd.concat([of_cache[is_base], members[part]])))
    return found


def grid(shown, things):
    """(figure, [(axes, title, runs)]): for each (title, runs) of `shown` an axis for each thing."""
    n, across = len(shown) * len(things), len(things)
    if across == 1:
        across = min(3, n)
    elif len(shown) == 1 and across == 4:
        across = 2
    down = math.ceil(n / across)
    figure, axes = plt.subplots(down, across, figsize=(4.3 * across, 3.1 * down), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    rows = axes.flat[:n].reshape(len(shown), -1)
    for axes, (title, _) in zip(rows, shown):
        for axis in axes:
            axis.set_title(title)
    return figure, [(axes, *panel) for axes, panel in zip(rows, shown)]


def add_legend(axes):
    """Say beside the last of a row of axes what all of them show."""
    found = {}
    for axis in axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    axes[-1].legend(found.values(), found.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.02))


def looks(names):
    """{name: {color, ls, marker}} of the lines of a panel; the baseline is black."""
    found = {"baseline": {"color": "#222222", "ls": "-", "marker": "o"}}
    for i, name in enumerate(name for name in names if name != "baseline"):
        found[name] = {"color": COLOURS[i % len(COLOURS)], "ls": DASHES[i // len(COLOURS) % 3],
                       "marker": MARKERS[i % len(MARKERS)]}
    return found


def name_runs(axis, title, names):
    """Put the runs' names on the x axis; in a study's panel r1, r2 ... are enough."""
    study = title.split(": ")[-1]
    short = [name.removeprefix(f"{study}_") for name in names]
    axis.set_xticks(range(len(short)), short, rotation=40, ha="right", rotation_mode="anchor")
    axis.grid(axis="x", visible=False)
    axis.set(xlabel="", xlim=(-0.6, len(short) - 0.4))


def by_run(*metrics, bars=False, beside=("baseline",)):
    """A final metric against the run: baseline, r1, r2 ...; mean and sd over seeds.

    bars: instead of points, where a note has them. beside: variants whose mean is a line through
    each panel.
    """
    def draw(data):
        shown = measured(data.valid, metrics)
        if not shown:
            return None
        having = data.valid[shown].notna().any(axis=1)
        figure, cells = grid(panels(data.valid[having]), shown)
        for axes, title, runs in cells:
            joined = not title.endswith((" all runs", " yardsticks"))
            of_cache = data.valid[data.valid.acts.isin(runs.acts) & data.valid.group.isin(beside)]
            for axis, metric in zip(axes, shown):
                if runs[metric].isna().all():
                    axis.set_axis_off()
                    continue
                draw_by_run(axis, runs, metric, bars, joined)
                for (name, members), style in zip(of_cache.groupby("group"), ("--", ":")):
                    axis.axhline(members[metric].mean(), color="#222222", lw=0.8, ls=style,
                                 label=name, zorder=1)
                name_runs(axis, title, runs.group.unique())
                axis.set_ylabel(label(metric))
            add_legend(axes)
        return figure
    return draw


def draw_by_run(axis, runs, metric, bars, joined):
    """One panel of by_run: means, seeds, and what chance gives."""
    sns.stripplot(runs, x="group", y=metric, color="#999999", size=2.5, jitter=False, ax=axis)
    about = dict(data=runs, x="group", y=metric, errorbar="sd", err_kws={"lw": 1}, ax=axis)
    if bars:
        sns.barplot(**about, color="#9CC4DE", width=0.65, zorder=0)
    else:
        sns.pointplot(**about, color=COLOURS[0], ms=4, lw=1, linestyle="-" if joined else "none")
    if NULLS.get(metric) in runs:
        level = runs.groupby("group", sort=False)[NULLS[metric]].mean()
        what = "the model's own" if metric.startswith("probe") else "chance"
        axis.plot(range(len(level)), level, "_", color="#888888", ms=10, mew=1.5, label=what)


def lines(*metrics, scale="linear"):
    """Curves of the groups that have the first metric, and of the baseline; mean and sd."""
    def draw(data):
        runs, wanted = data.valid, [*metrics, *map(NULLS.get, metrics)]
        curves = data.curves[data.curves.metric.isin(wanted)].astype({"x": float})
        curves = runs[["folder", "group"]].merge(curves)
        shown = [m for m in metrics if (curves.metric == m).any()]
        having = runs.folder.isin(curves.folder[curves.metric == metrics[0]])
        if not having.any():
            return None
        having |= (runs.variant == "baseline") & runs.acts.isin(runs.acts[having])
        figure, cells = grid(panels(runs[having]), shown)
        for axes, _, part in cells:
            mine = curves[curves.folder.isin(part.folder)]
            styles = looks(part.group.unique())
            for axis, metric in zip(axes, shown):
                draw_lines(axis, mine[mine.metric == metric], metric, scale, styles)
                null = mine[mine.metric == NULLS.get(metric)]
                if len(null):
                    axis.plot(null.groupby("x").y.mean(), ":", color="#888888", lw=1.6,
                              label="chance")
            add_legend(axes)
        return figure
    return draw


def draw_lines(axis, curves, metric, scale, styles):
    """One panel of lines: a mean over seeds in a band of their standard deviation."""
    if metric.startswith("log."):
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        if scale == "linear":    # the first steps would squeeze all that follows
            curves = curves[curves.x > 0.05 * curves.x.max()]
    for name, part in curves.groupby("group", sort=False):
        table = part.groupby("x").y.agg(["mean", "std"]).fillna(0)
        low, high = table["mean"] - table["std"], table["mean"] + table["std"]
        axis.plot(table["mean"], **styles[name] | {"marker": ""}, lw=1.2, label=name)
        axis.fill_between(table.index, low, high, color=styles[name]["color"], alpha=0.15, lw=0)
    axis.set(xlabel=next(text for start, text in X_LABELS.items() if metric.startswith(start)),
             ylabel=label(metric), yscale=scale)


def final_losses(data):
    """The terms of each run's last logged loss, stacked; mean over seeds."""
    if data.valid.empty:
        return None
    terms = [c for c in data.valid if c.startswith("final.loss_")]
    names = [term.removeprefix("final.loss_") for term in terms]
    colours = dict(zip(names, [*COLOURS, *sns.color_palette("tab20b")]))     # in all panels
    figure, cells = grid(panels(data.valid), ["loss"])
    for axes, title, runs in cells:
        table = runs.groupby("group", sort=False)[terms].mean().fillna(0).set_axis(names, axis=1)
        table = table.loc[:, table.any()]
        table.plot.bar(stacked=True, ax=axes[0], width=0.65, legend=False, rot=0, color=colours)
        name_runs(axes[0], title, table.index)
        axes[0].set_ylabel("last loss (x_hat = 0 has 1)")
        add_legend(axes)
    return figure


def letter_absorption(data):
    """A map of groups by first letters; mean over seeds."""
    curves = data.curves[data.curves.metric == "absorption.full_absorption_rate"]
    curves = data.valid.merge(curves, on="folder")
    if curves.empty:
        return None
    table = curves.pivot_table("y", ["acts", "group"], "x", sort=False).sort_index(axis=1)
    if data.valid.acts.nunique() == 1:
        table = table.droplevel("acts")
    figure, axis = plt.subplots(figsize=(4 + 0.36 * table.shape[1], 1.4 + 0.2 * len(table)),
                                layout="constrained")
    sns.heatmap(table, vmin=0, cmap="cividis", annot=True, fmt=".2f", annot_kws={"size": 5.5},
                yticklabels=True, cbar_kws={"shrink": 0.5, "aspect": 40}, ax=axis)
    axis.set(title="full absorption rate by first letter", xlabel="", ylabel="")
    return figure


EFFECTS = ["explained_variance", "ce_recovered", "mcc", "absorption_full", "absorption", "dead"]


def sweep(pattern):
    """The effects of swept settings whose name matches; a line per combination of the others."""
    def draw(data):
        metrics, shown = measured(data.valid, EFFECTS), list(swept(data.valid, pattern))
        if not shown or not metrics:
            return None
        figure, cells = grid(shown, metrics)
        for axes, title, runs in cells:
            base = data.valid[data.valid.acts.isin(runs.acts) & (data.valid.group == "baseline")]
            for axis, metric in zip(axes, metrics):
                sns.pointplot(runs, x="value", y=metric, hue="others", errorbar="sd", ms=4, lw=1.2,
                              err_kws={"lw": 1}, ax=axis)
                axis.axhline(base[metric].mean(), color="#222222", lw=0.8, ls="--",
                             label="baseline")
                axis.set(xlabel=title.split(": ")[1], ylabel=label(metric))
                axis.get_legend().remove()
            add_legend(axes)
        return figure
    return draw


def swept(runs, pattern):
    """Yield ('variant: setting', runs) of settings that take several values (--sweep) and whose
    name matches.

    The runs have the columns value (of the setting, as text) and others (the other overrides).
    """
    for (_, variant), members in runs.groupby(["acts", "variant"], sort=False):
        for key in sorted({key for shown in members.overrides for key in shown}):
            values = members.settings.map(lambda settings: settings.get(key))
            if re.fullmatch(pattern, key) and values.astype(str).nunique() > 1:
                others = members.group.str.replace(rf"-{key}=[^=]+(?=-\w+=|$)", "", regex=True)
                part = members.assign(number=values, value=values.astype(str), others=others)
                yield f"{variant}: {key}", part.sort_values("number")


def scatter(*pairs):
    """A metric against another one: a mark per group with its sd, a variant's settings joined."""
    def draw(data):
        shown = [(x, y) for x, y in pairs if len(measured(data.valid, [x, y])) == 2]
        if not shown:
            return None
        having = data.valid[[y for _, y in shown]].notna().any(axis=1)
        figure, cells = grid(panels(data.valid[having], with_swept=True), shown)
        for axes, _, panel in cells:
            styles = looks(panel.variant.unique())
            for axis, (x, y) in zip(axes, shown):
                runs = panel.dropna(subset=[x, y])
                if runs.empty:
                    axis.set_axis_off()
                    continue
                for variant, members in runs.groupby("variant", sort=False):
                    table = members.groupby("group")[[x, y]].agg(["mean", "std"])
                    table = table.sort_values((x, "mean"))
                    axis.errorbar(table[x, "mean"], table[y, "mean"], table[y, "std"],
                                  table[x, "std"], **styles[variant], ms=5, lw=1.2, elinewidth=1,
                                  capsize=2, label=variant)
                axis.set(xlabel=label(x), ylabel=label(y))
            add_legend(axes)
        return figure
    return draw


def controls(data):
    """What controls reach beside the baseline and all other runs; a panel per metric."""
    metrics = [m for m in measured(data.controls, METRICS) if METRICS[m].better and m in data.valid]
    if not metrics:
        return None
    names = data.controls.folder.map(lambda folder: f"control: {folder.name}")
    which = data.valid.variant.where(data.valid.variant == "baseline", "other runs")
    both = pd.concat([data.controls.assign(which=names), data.valid.assign(which=which)])
    shown = [(acts, (runs, metric)) for acts, runs in both.groupby("acts", sort=False)
             for metric in metrics if runs[metric].notna().any()]
    figure, cells = grid(shown, [None])
    for (axis,), _, (runs, metric) in cells:
        sns.stripplot(runs, x=metric, y="which", color=COLOURS[0], alpha=0.7, jitter=False, ax=axis)
        axis.set(xlabel=label(metric), ylabel="")
    return figure


VERDICT_COLOURS = {"better": "#0072B2", "worse": "#D55E00", "no difference seen": "#222222"}


def verdicts(data):
    """A forest plot: each group's difference to the baseline and to its parent, with intervals."""
    if not data.found.used.any():
        return None
    about = METRICS[data.metric]
    found = data.found.groupby(["acts", "whose"], sort=False)
    counts = found.size()[::2]
    height = 0.22 * counts.sum() + 1.2 * len(counts)
    figure, axes = plt.subplots(len(counts), 2, figsize=(15, height), squeeze=False,
                                layout="constrained", height_ratios=counts + 3)
    for axis, ((acts, whose), rows) in zip(axes.flat, found):
        draw_forest(axis, rows, about)
        names = rows.group if whose == "baseline" else "its parent: " + rows.other
        axis.set_yticks(range(len(rows)), names)
        axis.set_title(f"{acts}: {about.title} - {whose}'s")
    figure.supxlabel("line: 95 % interval of this one difference; ticks: seeds; "
                     "grey: too small to matter", fontsize=8)
    return figure


def draw_forest(axis, rows, about):
    """One panel of verdicts."""
    for y, (_, row) in enumerate(rows.iterrows()):
        colour = VERDICT_COLOURS.get(row.verdict.split(" (")[0], "#999999")
        axis.barh(y, 2 * row.worth, 1, -row.worth, color="#EEEEEE", zorder=0)
        axis.plot([row.low, row.high], [y, y], color=colour, lw=1.6)
        axis.plot(row["mean"], y, "o", color=colour, ms=4.5)
        axis.plot(row.deltas, [y + 0.3] * len(row.deltas), "|", color=colour, ms=4, mew=0.8)
        axis.text(1.01, y, row.verdict, transform=axis.get_yaxis_transform(), va="center",
                  fontsize=7, color=colour)
    # an interval of three seeds may leave the panel
    reach = 1.3 * rows.deltas.explode().abs().max()
    axis.axvline(0, color="#444444", lw=0.8)
    axis.set(xlim=(-reach, reach) if reach > 0 else None, ylim=(len(rows) - 0.4, -0.6),
             xlabel=f"{about.title} ({'more' if about.better > 0 else 'less'} is better)")
    axis.grid(axis="y", visible=False)


PLOTS = {
    # ours
    "verdicts": verdicts,
    "pareto": scatter(("l0", "explained_variance"), ("l0", "ce_recovered"), ("l0", "mcc")),
    "controls": controls,
    # note 000
    "absorption_scores": by_run("absorption_full", "absorption_fraction", "absorption", bars=True),
    "feature_splits": by_run("absorption.splits", bars=True),
    "final_losses": final_losses,
    "letter_absorption": letter_absorption,
    "jl_quality": lines("geometry.jl.run.error_sd", "geometry.jl.run.recall"),
    "sparsity_distributions": lines("density.counts", "geometry.l0_of_rows"),
    "sparsity_indices": by_run("geometry.hoyer", "geometry.gini", "dead"),
    # note 001
    "condition_numbers": by_run("geometry.condition_group", "geometry.condition_active"),
    "alpha_ablation": sweep(".*_(alpha|coef|weight|share)"),
    "unlearning": by_run("unlearning", "forget.forget_added", "forget.retain_added",
                         beside=("baseline", "fixed_ortho")),
    # note 002
    "training_curves": lines("log.loss", "log.loss_recon", scale="log"),
    "sparsity_evolution": lines("log.zeros"),
    "feature_correlations": by_run("geometry.correlation", "geometry.mean_abs_cosine", bars=True),
    "feature_usage": lines("usage", scale="log"),
    "tau_fixed_adaptive": lines("log.tau", "log.pair_cos", "log.pair_over",
                                "log.explained_variance"),
    "topk_ablation": sweep("pair_(fraction|rule)"),
    "pair_stability": lines("geometry.pairs.coactivation.jaccard", "geometry.pairs.preact.jaccard"),
    "absorption_efficiency": scatter(
        ("explained_variance", "absorption_full"), ("seconds", "absorption_full"),
        ("explained_variance", "absorption"), ("seconds", "absorption")),
    # note 003: a final metric against the run number
    "explained_variance_evolution": by_run("explained_variance"),
    "mse_evolution": by_run("mse"),
    "l0_evolution": by_run("l0"),
    "l1_evolution": by_run("l1"),
    "kl_div_score_evolution": by_run("kl_div_score"),
    "ce_loss_score_evolution": by_run("ce_loss_score"),
    "l2_ratio_evolution": by_run("l2_ratio"),
    "key_metrics_combined": by_run("explained_variance", "l0", "kl_div_score"),
    "reactivation": lines("log.revived", "log.dead", "log.explained_variance"),
    "diversity": by_run("geometry.effective_rank", "geometry.mean_max_cosine",
                        "geometry.coherence"),
    # note 004
    "metrics_comparison": by_run("explained_variance", "kl_sae", "l0", "l1"),
    "absorption_rates": by_run("absorption_full", "absorption"),
    "probing_accuracy": by_run("probe_1", "probe_5", "probe_20"),
    "feature_stability": by_run("stability.matched", "stability.again", "stability.best"),
    # all other swept settings
    "ablation": sweep("(?!l0$|pair_(fraction|rule)$|.*_(alpha|coef|weight|share)$).*"),
}


def draw_plots(data, out):
    """Write the plots that there are data for; their paths by name. Older ones of other runs go."""
    drawn = {}
    with plt.rc_context(STYLE):
        for name, draw in PLOTS.items():
            path, figure = out / f"{name}.png", draw(data)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            png = io.BytesIO()
            figure.savefig(png, format="png")
            plt.close(figure)
            write_file(path, png.getvalue())
            drawn[name] = path
    return drawn


# ---- report.html: one page with everything in it -------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
  script-src 'unsafe-inline'">
<title>Sparse autoencoders: what the runs say</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1rem;
  max-width: 1400px; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.15rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 75em; }
.wide { overflow: auto; border: 1px solid #ddd; max-height: 75vh; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .55rem; text-align: right; white-space: nowrap; border: 0 solid #eee; }
td { border-bottom-width: 1px; }
th { position: sticky; top: 0; background: #f4f4f4; cursor: pointer; }
td:first-child { position: sticky; left: 0; background: #fff; }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
tr.better td { background: #e3f0f9; } tr.worse td { background: #fbe8dc; }
tr.last td { color: #767676; } img { max-width: 100%; height: auto; }
figure { margin: .5rem 0 1.5rem; } figcaption { font-weight: 600; }
select, input { font: inherit; } mark { background: #ffd54a; }
#browser { display: grid; grid-template-columns: 19rem 1fr; gap: 1rem; }
#latents { max-height: 32rem; overflow-y: auto; border: 1px solid #ddd; }
#latents button { all: unset; display: block; width: 100%; padding: .25rem .5rem; cursor: pointer;
  font-size: 13px; box-sizing: border-box; }
#latents button:focus, #latents button[aria-pressed=true] { background: #e3f0f9; }
.context { font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap;
  border-bottom: 1px solid #eee; }
@media (max-width: 700px) { #browser { grid-template-columns: 1fr; } }
</style></head><body>
<h1>What the runs say</h1>
__BODY__
<script type="application/json" id="features">__FEATURES__</script>
<script>
// tables: a click on a heading sorts; controls and invalid runs are in no ranking and stay last
for (const table of document.querySelectorAll("table")) {
  const text = (row, at) => row.cells[at].textContent, rows = [...table.tBodies[0].rows];
  for (const row of rows) {
    const word = text(row, 1).split(" (")[0];
    row.className = text(row, 0).startsWith("control: ") || word === "invalid" ? "last" : word;
  }
  for (const head of table.tHead.rows[0].cells) head.onclick = () => {
    const at = head.cellIndex, sign = head.dataset.down ? 1 : -1;
    head.dataset.down = head.dataset.down ? "" : "yes";
    const order = (a, b) => {
      const [x, y] = [text(a, at), text(b, at)], [p, q] = [parseFloat(x), parseFloat(y)];
      const last = (a.className === "last") - (b.className === "last");
      const empty = isNaN(p) - isNaN(q);
      return last || empty || sign * (isNaN(p) ? x.localeCompare(y) : p - q);
    };
    table.tBodies[0].append(...rows.sort(order));
  };
}
// latents: a list by run and word, and what the chosen one fires on
const runs = JSON.parse(document.getElementById("features").textContent);
const choice = document.getElementById("run"), word = document.getElementById("find");
const visible = token => token.trim() ? token : JSON.stringify(token);
const make = (tag, text, name) => {
  const e = document.createElement(tag);
  e.textContent = text;
  e.className = name ?? "";
  return e;
};
function show(latent, button) {
  for (const other of document.querySelectorAll("#latents button"))
    other.setAttribute("aria-pressed", other === button);
  const panel = document.getElementById("latent");
  const near = latent.neighbours.map(n => `${n.latent} (cosine ${n.cosine.toFixed(2)})`).join(", ");
  panel.replaceChildren(
    make("h3", `latent ${latent.latent}: fires on ${(100 * latent.rate).toPrecision(3)} % of rows`),
    make("p", "promotes: " + latent.promotes.map(visible).join("  ")),
    make("p", "nearest decoder rows: " + near));
  for (const context of latent.contexts) {
    const row = make("div", context.activation.toFixed(2).padStart(8) + "  ", "context");
    const [before, after] = context.text.split(`<<${context.token}>>`);
    row.append(before, make("mark", visible(context.token)), after ?? "");
    panel.append(row);
  }
}
function list() {
  const box = document.getElementById("latents"), asked = word.value.toLowerCase();
  box.replaceChildren();
  const found = runs[choice.value].filter(l => JSON.stringify(l).toLowerCase().includes(asked));
  for (const latent of found) {
    const parts = [latent.latent, `${(100 * latent.rate).toPrecision(2)} %`, latent.why.join(", "),
                   visible(latent.contexts[0]?.token ?? "")];
    const button = make("button", parts.join("  "));
    button.onclick = () => show(latent, button);
    box.append(button);
  }
  box.firstChild?.click();
}
if (choice) { choice.onchange = word.oninput = list; list(); }
</script></body></html>
"""


def report(data, drawn):
    """The page. Nothing in it is fetched, and all text is escaped."""
    body = []
    for acts in data.runs.acts.unique():
        body += [f"<h2>{html.escape(heading(data, acts))}</h2>",
                 "<div class=wide>",
                 results_table(data, acts).to_html(index=False, border=0),
                 "</div>",
                 "<ul>", *(f"<li>{html.escape(line)}</li>" for line in notes(data, acts)), "</ul>"]
    body += ["<details><summary>How to read this</summary>", f"<p>{html.escape(RULE)}</p>",
             f"<p>{html.escape(worth_in_words())}</p></details>", "<h2>Latents</h2>"]
    features = read_features(data.runs)
    if features:
        options = "".join(f"<option>{html.escape(name)}</option>" for name in features)
        body += [f"<p>Run <select id=run>{options}</select> Find <input id=find type=search></p>",
                 "<div id=browser><div id=latents></div><div id=latent></div></div>"]
    else:
        body.append("<p>No run has eval/features.json (03_eval.py --eval features).</p>")
    body.append("<h2>Plots</h2>")
    for name, path in drawn.items():
        picture = base64.b64encode(path.read_bytes()).decode()
        body.append(f"<figure><figcaption>{name}</figcaption>"
                    f"<img alt={name} src='data:image/png;base64,{picture}'></figure>")
    # no text of the data can end the script or stand for a place of the page
    text = json.dumps(features).replace("<", "\\u003c")
    start, middle, end = re.split("__BODY__|__FEATURES__", PAGE)
    return start + "\n".join(body) + middle + text + end


def read_features(runs):
    """{run: latents of eval/features.json}, of the runs that have one of their present weights."""
    found = {}
    for run in runs.itertuples():
        path = run.folder / "eval" / "features.json"
        result = read_json(path, "latents") if path.exists() else {}
        if result.get("sae_checksum") == run.sae_checksum and result:
            found[run.name] = result["latents"]
    return found


def main():
    p = Parser(__doc__)
    p.add_argument("runs", nargs="*", help="folders (default: all under runs/)")
    p.add_argument("--metric", choices=[m for m, about in METRICS.items() if about.better],
                   default="explained_variance",
                   help="what the verdicts are about (default: %(default)s)")
    p.add_argument("--out", default="plots", help="folder to write to (default: %(default)s)")
    args = p.parse_args()
    out = Path(args.out)
    if not args.out or out.exists() and not out.is_dir():
        raise Refuse(f"--out {args.out!r}: want a folder", 2)
    runs, at_controls, curves = read_runs(args.runs)
    data = Data(runs, at_controls, curves, compare(runs, args.metric), args.metric)
    held = lock(out)
    write_file(out / "results.md", results_markdown(data).encode())
    drawn = draw_plots(data, out)
    write_file(out / "report.html", report(data, drawn).encode())
    held.release()

    for acts in runs.acts.unique():
        print(f"\n{heading(data, acts)}", *printed_table(data, acts), sep="\n")
        print()
        for note in notes(data, acts):
            print(textwrap.fill(note, 100))
    print(f"\n{len(drawn)} plots in {out}; all on one page: {out}/report.html")


if __name__ == "__main__":
    run_script(main)

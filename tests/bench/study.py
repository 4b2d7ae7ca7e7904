"""Run the study that STUDIES.md reports, and write its tables.

    python tests/bench/smollm2.py                   first: the language model and the text
    python tests/bench/study.py                     print the commands of all parts
    python tests/bench/study.py synthetic           a part: synthetic, yardsticks, ideas,
                                                    exploratory, seeds, figures, larger
    python tests/bench/study.py tables              write the tables of STUDIES.md from the runs

All of them in one working folder, which needs 20 GB. What is finished is left alone, and the same
call goes on where an interrupted one stopped.
"""

import argparse
import importlib
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
plot = importlib.import_module("04_plot")
from sae import variant_names

STUDIES = Path(__file__).with_name("STUDIES.md")
YARDSTICKS = ["baseline", "topk", "batch_topk", "jumprelu", "gated", "p_anneal", "matryoshka",
              "fixed_ortho", "ortsae", "revive"]         # the last: the row before zscore_r1
IDEAS = sorted((name for name in variant_names() if re.search(r"_r\d+$", name)), key=plot.natural)
SWEPT = YARDSTICKS[:3]       # what the others are compared with at their own L0
REAL, TOY = "smollm2-135m_l10", "synthetic"              # folders under acts/
CHECKED = "hierarchical|zscore_r[1-4]$|contrastive_r[12347]$|adaptive_ortho_r[16]$|topk_ortho_r1$"
LARGER = {                   # four times as many rows, in batches of 2,048, at two layers
    "smollm2-1m_l10": [*SWEPT, *filter(re.compile(CHECKED).match, IDEAS)],
    "smollm2-1m_l20": [*SWEPT, "contrastive_r4", "hierarchical_r1", "zscore_r2"]}
SEEDS = {REAL: range(3), TOY: range(5), **dict.fromkeys(LARGER, range(3))}
# what looked better or worse on the real model, and the row before it
TOLD = "zscore|hierarchical|contrastive_r([3-9]|10)|adaptive_ortho_r[5-9]|topk_ortho_r[7-9]"
AGAIN = ["baseline", "revive", *filter(re.compile(TOLD).match, IDEAS)]
MORE_SEEDS = range(3, 5)
SETTINGS = {REAL: ["d_sae=2304", "batch_size=512"], TOY: ["d_sae=320", "batch_size=1024"],
            **dict.fromkeys(LARGER, ["d_sae=2304"])}
L0 = {REAL: "40", TOY: "5", **dict.fromkeys(LARGER, "40")}
# neighbours are at most a factor of 2 apart
SWEEP = {REAL: "22,72", TOY: "3,8", "smollm2-1m_l10": "22,72"}
FIGURES = {                  # study -> the plots that its note names
    "contrastive": ["absorption_scores", "feature_splits", "final_losses", "letter_absorption"],
    "topk_ortho": ["training_curves", "sparsity_evolution", "feature_correlations",
                   "feature_usage"],
    "zscore": [*(f"{metric}_evolution" for metric in (
        "explained_variance", "mse", "l0", "l1", "kl_div_score", "ce_loss_score", "l2_ratio")),
        "key_metrics_combined"],
    "hierarchical": ["metrics_comparison", "absorption_rates", "probing_accuracy"],
}


# ---- the commands --------------------------------------------------------------------------------


def commands(part):
    """Yield the commands of a part as lists of words: stage and arguments."""
    if part == "synthetic":
        yield ["01_cache_acts.py", "--model", "synthetic", "--tokens", "250_000"]
        yield from yardsticks(TOY)
        yield from train(TOY, IDEAS, f"l0={L0[TOY]}")
        yield evaluate(TOY, "core")
    elif part == "yardsticks":
        yield ["01_cache_acts.py", "--model", "models/smollm2-135m", "--layer", "10",
               "--ctx", "128", "--data", "texts/smollm2", "--tokens", "256_000",
               "--val-tokens", "3_072"]
        yield from yardsticks(REAL)
        yield evaluate(REAL, "core")
    elif part == "ideas":
        for study, ideas in itertools.groupby(IDEAS, lambda name: name.rsplit("_r", 1)[0]):
            yield from train(REAL, list(ideas), f"l0={L0[REAL]}")
            yield evaluate(REAL, "core")
    elif part == "exploratory":
        yield evaluate(REAL, "sparse_probing", "absorption")
    elif part == "seeds":
        yield from train(REAL, AGAIN, f"l0={L0[REAL]}", MORE_SEEDS)
        yield from train(REAL, ["baseline"], f"l0={SWEEP[REAL]}", MORE_SEEDS)
        yield evaluate(REAL, "core")
    elif part == "figures":
        baseline = f"runs/baseline-{REAL}-*l0={L0[REAL]}.0-s*"
        yield ["03_eval.py", baseline, f"runs/topk_ortho_*-{REAL}-*", "--eval", "geometry"]
        for study in FIGURES:
            yield ["04_plot.py", baseline, f"runs/{study}_*-{REAL}-*", "--out", f"plots/{study}"]
    elif part == "larger":
        yield ["01_cache_acts.py", "--model", "models/smollm2-135m", "--layer", "10", "20",
               "--ctx", "128", "--data", "texts/smollm2", "--tokens", "1_024_000",
               "--val-tokens", "6_144", "--name", "smollm2-1m"]
        for acts, variants in LARGER.items():
            yield from train(acts, variants, f"l0={L0[acts]}")
            if acts in SWEEP:
                yield from train(acts, ["baseline"], f"l0={SWEEP[acts]}")
            yield evaluate(acts, "core")


def yardsticks(acts):
    """Yield the commands that train the yardsticks and the sweeps of L0."""
    yield from train(acts, YARDSTICKS, f"l0={L0[acts]}")
    yield from train(acts, SWEPT, f"l0={SWEEP[acts]}")


def evaluate(acts, *names):
    """The command that evaluates all runs of a cache and its controls."""
    return ["03_eval.py", f"runs/*-{acts}-*", "--eval", *names, "--controls"]


def train(acts, variants, l0, seeds=None):
    """Yield a command for each three variants, so that whole groups are finished early."""
    for i in range(0, len(variants), 3):
        yield ["02_train.py", "--acts", acts, "--variant", *variants[i:i + 3],
               "--seed", *map(str, seeds or SEEDS[acts]), "--set", *SETTINGS[acts], "--sweep", l0]


def run(part):
    """Run the commands of a part; a stage that says that a run went wrong (5) stops nothing."""
    for script, *words in commands(part):
        print("$ python", shlex.join([script, *words]), flush=True)
        words = [path for word in words for path in (expand(word) if "*" in word else [word])]
        code = subprocess.run([sys.executable, ROOT / script, *words]).returncode
        if code not in (0, 5):
            sys.exit(code)


def expand(pattern):
    """The folders of a pattern such as runs/*-synthetic-*."""
    return sorted(str(path.parent) for path in Path().glob(f"{pattern}/config.json"))


def keep_figures():
    """Copy the plots that the notes name to this folder, smaller: of 256 colours."""
    for study, names in FIGURES.items():
        folder = STUDIES.parent / "figures" / study
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            drawn = Image.open(f"plots/{study}/{name}.png").convert("RGB")
            drawn.quantize(256).save(folder / f"{name}.png", optimize=True)


# ---- the tables ----------------------------------------------------------------------------------


PRIMARY = {REAL: "explained_variance", TOY: "absorption",        # what verdicts are about
           **dict.fromkeys(LARGER, "explained_variance")}
EXPLORED = {REAL: ["absorption_fraction", "probe_1"], TOY: ["explained_variance", "mcc", "f1"],
            **dict.fromkeys(LARGER, [])}
SHOWN = {REAL: ["l0", "explained_variance", "ce_recovered", "dead", "absorption_fraction",
                "probe_1"],
         TOY: ["l0", "explained_variance", "mcc", "f1", "absorption", "dead"],
         **dict.fromkeys(LARGER, ["l0", "explained_variance", "ce_recovered", "kl_sae", "dead"])}
EXPLORED_WORDS = {"better": " better", "worse": " worse", "no difference seen": " same"}
TABLE = re.compile(r"<!-- table (\S+) (\S+) -->.*?<!-- end -->", re.DOTALL)


def write_tables():
    """Put the tables in the places of STUDIES.md that are marked for them."""
    found, explored = {}, {}
    for acts, about in PRIMARY.items():
        if folders := expand(f"runs/*-{acts}-*"):
            runs, controls, curves = plot.read_runs(folders)
            found[acts] = plot.Data(runs, controls, curves, plot.compare(runs, about), about)
            explored[acts] = {m: plot.compare(runs, m) for m in EXPLORED[acts]}

    def table(match):
        acts, study = match.groups()
        if acts not in found:
            return match[0]              # its runs are elsewhere
        if study == "summary":
            lines = summarise(found[acts], acts)
        else:
            lines = describe(found[acts], explored[acts], acts, study)
        return "\n".join([f"<!-- table {acts} {study} -->", *lines, "<!-- end -->"])

    STUDIES.write_text(TABLE.sub(table, STUDIES.read_text("utf-8")), "utf-8")


def summarise(data, acts):
    """The lines that stand above the tables of a cache."""
    wanted = len(SEEDS[acts]) * (len(YARDSTICKS + IDEAS) + 2 * len(SWEPT))
    if acts == REAL:
        wanted += len(MORE_SEEDS) * (len(AGAIN) + 2)
    main = plot.METRICS[data.metric].title
    others = ", ".join(plot.METRICS[metric].title for metric in EXPLORED[acts])
    return [f"Of {wanted} runs {sum(data.runs.status == 'done')} are trained, and "
            f"{len(data.valid)} are evaluated and valid. All are on {plot.heading(data, acts)}, "
            "unless a name says otherwise. Cells are means ± standard deviations over seeds.", "",
            f"Verdicts and differences are about {main}. A word beside {others} is a verdict "
            "against the baseline, too, but exploratory; without a word it can't be told.", "",
            *(f"* {note}" for note in plot.notes(data, acts))]


def describe(data, explored, acts, study):
    """The lines of the table of a study or of "all": a row per group of runs; the controls are
    yardsticks."""
    rows = []
    for name, scored, members, told in plot.entries(data, acts):
        is_control = members.control.any()
        if study in ("all", "yardsticks" if is_control else members.study.iloc[0]):
            rows.append(row(name, scored, members, told, acts, explored))
    if not rows:
        return ["No run yet."]
    return plot.markdown(pd.DataFrame(rows).fillna(""))


def row(name, scored, members, told, acts, explored):
    """{column: cell} of a group of runs or of a control."""
    cells = {"run": name}
    for metric in SHOWN[acts]:
        about = plot.METRICS[metric]
        cell = plot.mean_sd(scored[metric], about.digits) if metric in scored else "-"
        if metric in explored and told:
            found = explored[metric]
            mine = found[(found.acts == acts) & (found.group == name) & (found.whose == "baseline")]
            cell += EXPLORED_WORDS.get(mine.verdict.iloc[0].split(" (")[0], "")
        cells[about.title] = cell
    cells["against the baseline"] = show_verdict(told["baseline"]) if told else ""
    cells["against its parent"] = ""         # where that is the baseline
    if told and told["parent"].other != "baseline":
        cells["against its parent"] = f"{told['parent'].other}: {show_verdict(told['parent'])}"
    cells["its mechanism did"] = plot.show_acted(members)
    cells["remarks"] = "; ".join(plot.remarks(members, told))
    return cells


def show_verdict(found):
    """'better (5 seeds) +0.010 [+0.002, +0.018]'"""
    interval = plot.show_interval(found, plot.METRICS[found.metric].digits)
    return f"{found.verdict} {interval}" if found.used else found.verdict


def main():
    parts = ["synthetic", "yardsticks", "ideas", "exploratory", "seeds", "figures", "larger"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=[*parts, "tables"])
    part = parser.parse_args().part
    if part == "tables":
        write_tables()
    elif part:
        run(part)
        if part == "figures":
            keep_figures()
    else:
        for name in parts:
            print(f"# {name}", *map(shlex.join, commands(name)), sep="\n")


if __name__ == "__main__":
    main()

"""Draw and tabulate runs: from the run folders alone, without the model or the data.

    python 04_plot.py                                    all runs under runs/
    python 04_plot.py runs/topk-s0 runs/baseline-s0 --out plots/two

Reads runs/NAME/{config.json, metrics.jsonl, eval/core.json, eval/rates.safetensors} and the controls beside them,
runs/controls-ACTS/KIND/eval/core.json. Writes
    plots/results.md              one row per variant and setting: mean +- sd over seeds, paired differences, guards; also printed
    plots/pareto.png              explained variance and recovered loss against L0
    plots/training_curves.png     reconstruction loss, L0, explained variance and dead latents over training
    plots/feature_usage.png       how often latents fire
A row of panels per cache of activations. Runs that a guard calls invalid stand in the table, marked, and nowhere else.
"""
import argparse
import io
import json
import math
import re
import statistics
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sae import read_json, read_tensors, run_folders, run_script, write_file

SAME_L0 = 0.05               # runs are compared if their L0 differs by no more than this share
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C9A"]      # told apart by the colour-blind (Okabe and Ito)
MARKERS = "osD^vP*X<>"
STYLES = ["-", "--", ":", "-."]
STYLE = {"figure.dpi": 110, "savefig.dpi": 160, "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E5E5E5", "grid.linewidth": 0.6,
         "axes.axisbelow": True, "axes.edgecolor": "#666666", "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False}


class Run:
    """A run folder, or a control's: its config, its core result (None with `missing` in a word), and which guards made it invalid."""

    def __init__(self, folder):
        self.folder = folder
        control = not (folder / "config.json").exists()
        self.core, self.missing = None, "not evaluated"
        if (folder / "eval" / "core.json").exists():
            self.core = read_json(folder / "eval" / "core.json")
        self.config = {} if control else read_json(folder / "config.json")
        self.acts = self.core["acts"] if control else self.config["acts"]
        self.variant = f"control: {folder.name}" if control else self.config["variant"]
        self.seed, self.settings = self.config.get("seed"), self.config.get("settings", {})
        self.name = self.variant if control else self.config["name"].removesuffix(f"-s{self.seed}")
        self.status = "done" if control else self.config["status"]
        if self.status != "done":
            self.core, self.missing = None, {"failed": "training failed"}.get(self.status, "training not finished")
        elif self.core and not control and self.core["sae_checksum"] != self.config["sae_checksum"]:
            self.core, self.missing = None, "evaluation is of older weights"
        self.fatal = sorted({g["id"] for g in self.core["guards"] if g["level"] == "fatal"}) if self.core else []
        self.warned = sorted({g["id"] for g in self.core["guards"] if g["level"] == "warn"}) if self.core else []
        self.valid = bool(self.core) and not self.fatal

    def get(self, metric):
        return self.core["metrics"].get(metric) if self.core else None


def find_runs(folders):
    """(runs, controls of their caches) from the folders given, or from all under runs/."""
    runs = [Run(f) for f in run_folders(folders)]
    places = sorted({r.folder.parent / f"controls-{r.acts}" for r in runs})
    return runs, [Run(p.parent.parent) for place in places for p in sorted(place.glob("*/eval/core.json"))]


def grouped(runs):
    """{name: the runs that differ in nothing but their seed}, baseline first, then by name and L0."""
    groups = {}
    for r in sorted(runs, key=lambda r: (r.acts, r.variant != "baseline", natural(r.variant), r.settings.get("l0", 0), r.name, r.seed)):
        groups.setdefault((r.acts, r.name), []).append(r)
    return {name: members for (_, name), members in groups.items()}


# ---- results.md --------------------------------------------------------------------------------------------------------------------


METRICS = [("L0", "l0", 2), ("EV", "explained_variance", 4), ("CE rec.", "ce_recovered", 4), ("KL", "kl_sae", 4),
           ("dead", "dead", 3), ("MCC", "mcc", 3), ("F1", "f1", 3), ("absorption", "absorption", 3)]
COMPARED = ["explained_variance", "ce_recovered", "mcc", "absorption"]


def mean_sd(values, digits, sign=""):
    """'0.865 +- 0.002', or '0.865' of one value, or '-' of none."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def difference(members, others, metric, digits):
    """Mean paired difference to the runs `others` with the same seed, length, width and L0, or why there is none."""
    deltas, unmatched = [], False
    for r in members:
        same = [o for o in others if o.valid and (o.acts, o.seed, o.config["steps"], o.settings["d_sae"]) ==
                (r.acts, r.seed, r.config["steps"], r.settings["d_sae"])]
        close = [o for o in same if abs(r.get("l0") / o.get("l0") - 1) <= SAME_L0]
        unmatched |= bool(same) and not close
        if close:
            other = min(close, key=lambda o: (unlike(r, o), abs(math.log(r.get("l0") / o.get("l0")))))
            if r.get(metric) is not None and other.get(metric) is not None:
                deltas.append(r.get(metric) - other.get(metric))
    if not deltas:
        return "L0 differs" if unmatched else "-"
    return mean_sd(deltas, digits, "+") + f" (n={len(deltas)})"


def unlike(a, b):
    """How many settings that both have differ, but for those that make the sparsifier."""
    return sum(a.settings[k] != b.settings[k] for k in a.settings.keys() & b.settings.keys() - {"activation", "l0"})


def table(runs, controls):
    """(header, rows) of one cache: a row per group, controls last."""
    everyone = runs + controls
    columns = [m for m in METRICS if any(m[1] in r.core["metrics"] for r in everyone if r.core)]
    compared = [m for m in columns if m[1] in COMPARED]
    header = ["run", "parent", "seeds"] + [title for title, *_ in columns] + \
             [f"{title} - {whose}" for whose in ("baseline", "parent") for title, *_ in compared] + ["guards"]
    rows = []
    for name, members in [*grouped(runs).items(), *((c.name, [c]) for c in controls)]:
        one = members[0]
        scored = [r for r in members if r.valid] or [r for r in members if r.core]       # an invalid group shows what it measured, marked
        row = [name, "" if one in controls else ", ".join(one.config["parents"]) or "-", str(len(members)) if one not in controls else ""]
        row += [mean_sd([r.get(metric) for r in scored], digits) for _, metric, digits in columns]
        valid = [r for r in scored if r.valid and r not in controls]
        for variants in (["baseline"], one.config.get("parents", [])):
            others = [r for r in runs if r.variant in variants]
            row += ["" if one in controls or one.variant in variants or not variants else
                    difference(valid, others, metric, digits) if valid else "-" for _, metric, digits in compared]
        rows.append(row + [verdict(members, one in controls)])
    return header, rows


def verdict(members, control):
    """What guards and gaps say of a group, in words."""
    said = []
    invalid = [r for r in members if r.fatal]
    if invalid:
        fatal = " ".join(sorted({g for r in invalid for g in r.fatal}))
        said.append(fatal if control else f"INVALID {fatal}" if len(invalid) == len(members) else
                    f"{len(invalid)} of {len(members)} left out as invalid: {fatal}")
    for word in sorted({r.missing for r in members if not r.core}):
        said.append(word + (f" (seed {', '.join(str(r.seed) for r in members if not r.core and r.missing == word)})" if len(members) > 1 else ""))
    warned = " ".join(sorted({g for r in members for g in r.warned}))
    return "; ".join(said + [f"warns {warned}"] * bool(warned)) or "-"


def notes(runs, controls):
    """Sentences under a table: what guards say in full, and which metrics can't tell these runs from a control."""
    lines, sizes = [], {r.core["contexts"] for r in runs + controls if r.core}
    if len(sizes) > 1:
        lines.append(f"Rows were evaluated on different numbers of held-out contexts ({', '.join(map(str, sorted(sizes)))}): run 03_eval.py again.")
    for r in runs:
        lines += [f"{r.config['name']} is invalid: {g['id']} {g['message']}." for g in (r.core["guards"] if r.core else []) if g["level"] == "fatal"]
        if r.status == "failed":
            lines.append(f"{r.config['name']} failed in training: {r.config.get('reason', 'no reason given')}.")
    for title, metric, digits in METRICS[1:]:
        values = [r.get(metric) for r in runs if r.valid and r.get(metric) is not None]
        low = metric in ("kl_sae", "absorption")
        middle = statistics.median(values) if values else math.nan
        as_good = [c for c in controls if c.get(metric) is not None and (c.get(metric) <= middle if low else c.get(metric) >= middle)]
        if as_good and metric != "dead":
            lines.append(f"{title} says nothing by itself here: the median run has {middle:.{digits}f}, "
                         + ", ".join(f"{c.name} {c.get(metric):.{digits}f}" for c in as_good) + ".")
    return lines


def results(caches):
    """(markdown, aligned text) of all caches."""
    md, text = ["# Results", "", "Mean +- standard deviation over seeds, on held-out contexts. "
                "L0: active latents per row; EV: explained variance about the mean; "
                "CE rec.: share of the loss that zeroing the activations costs which the reconstruction avoids; KL: from the clean model, nats per token; "
                "dead: share of latents that never fire. Differences to the baseline and to the parent are paired by seed, at the same L0 (within "
                f"{SAME_L0:.0%}), length and width; with fewer than 3 seeds they are no claim. Rows are in order of name, not of merit.", ""], []
    for acts, (runs, controls) in caches.items():
        header, rows = table(runs, controls)
        escape = lambda cell: cell.replace("|", "\\|")
        md += [f"## {acts}", "", "| " + " | ".join(header) + " |", "|" + "|".join(["---"] * 2 + ["---:"] * (len(header) - 3) + ["---"]) + "|"]
        md += ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
        said = notes(runs, controls)
        md += [""] + [f"* {line}" for line in said] + [""] * bool(said)
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        text += [f"\n{acts}"]
        text += ["  ".join(f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))) for row in [header, *rows]]
        text += said
    return "\n".join(md).rstrip() + "\n", "\n".join(text).lstrip()


# ---- figures -----------------------------------------------------------------------------------------------------------------------


def looks(runs):
    """{variant: (colour, marker, line style)}, the same in every figure; the baseline is black."""
    variants = sorted({r.variant for r in runs if r.variant != "baseline"}, key=natural)
    return {"baseline": ("#222222", "o", "-")} | {
        v: (COLOURS[i % len(COLOURS)], MARKERS[(i + 1) % len(MARKERS)], STYLES[i // len(COLOURS) % len(STYLES)]) for i, v in enumerate(variants)}


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


def say(axis, words):
    """A gap with a word instead of an empty panel."""
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", color="#777777")


def save(figure, path):
    png = io.BytesIO()
    figure.savefig(png, format="png")
    plt.close(figure)
    write_file(path, png.getvalue())


def draw_pareto(caches, look, path):
    """Quality against sparsity: a marker per group with the seeds' standard deviation; settings of a variant that differ in l0 are joined."""
    figure, axes = panels(len(caches), 2)
    handles = {}
    for row, (acts, (runs, controls)) in zip(axes, caches.items()):
        language = any("ce_recovered" in r.core["metrics"] for r in runs if r.core)
        for axis, (metric, label) in zip(row, [("explained_variance", "explained variance"),
                                               ("ce_recovered", "cross-entropy recovered") if language else ("mcc", "MCC with the true features")]):
            lines = {}
            for name, members in grouped([r for r in runs if r.valid and r.get(metric) is not None and r.get("l0")]).items():
                xs, ys = [r.get("l0") for r in members], [r.get(metric) for r in members]
                point = statistics.mean(xs), statistics.mean(ys), sd(xs), sd(ys), members[0].variant
                lines.setdefault(re.sub(r"-l0=[^-]+", "", name), []).append(point)
            for series in lines.values():
                colour, marker, style = look[series[0][4]]
                x, y, x_sd, y_sd, _ = zip(*sorted(series))
                axis.errorbar(x, y, y_sd, x_sd, color=colour, ls="none", elinewidth=1, capsize=2)
                line, = axis.plot(x, y, marker, color=colour, ls=style if len(x) > 1 else "none", ms=6, lw=1.2, alpha=0.9)
                handles.setdefault(series[0][4], line)
            if not lines:
                say(axis, "no valid run with this metric")
            axis.set(xscale="log", xlabel="L0 (active latents per row)", ylabel=label, title=f"{acts}: {label}")
            if lines:
                points = [(y - e, y + e) for series in lines.values() for _, y, _, e, _ in series]
                draw_controls(axis, controls, metric, min(low for low, _ in points), max(high for _, high in points), handles)
                plain_ticks(axis, [x for series in lines.values() for x, *_ in series])
    legend(figure, handles)
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
        axis.text(0.02, 0.02, f"controls below: {words}", transform=axis.transAxes, fontsize=7.5, color="#777777")


def plain_ticks(axis, xs):
    """A log axis around the values xs with numbers such as 8, 16, 32 instead of powers of ten."""
    low, high = min(xs) / 1.15, max(xs) * 1.15
    ticks = [2.0 ** n for n in range(-4, 15) if low <= 2.0 ** n <= high]
    if len(ticks) < 3:
        ticks = [t for t in matplotlib.ticker.MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()


CURVES = [("loss_recon", "reconstruction loss (training's own)", "log"), ("l0", "L0 (active latents per row)", "log"),
          ("explained_variance", "explained variance", "linear"), ("dead", "dead latents (share)", "linear")]


def draw_training(caches, look, path):
    """Metrics during training, mean over seeds; two rows of panels per cache."""
    figure, axes = panels(2 * len(caches), 2, height=2.9)
    axes = axes.reshape(-1, len(CURVES))
    handles = {}
    for row, (acts, (runs, _)) in zip(axes, caches.items()):
        logs = {name: [read_log(r.folder) for r in members] for name, members in grouped([r for r in runs if not r.fatal]).items()}
        variant = {name: members[0].variant for name, members in grouped(runs).items()}
        for axis, (metric, label, scale) in zip(row, CURVES):
            lowest = []
            for name, seeds in logs.items():
                x, y = mean_curve(seeds, metric)
                if x:
                    colour, _, style = look[variant[name]]
                    handles.setdefault(variant[name], axis.plot(x, y, color=colour, ls=style, lw=1.2, alpha=0.9)[0])
                    lowest += y[len(y) // 20:]
            if not lowest:
                say(axis, "no training log")
            elif metric == "dead":
                axis.set_ylim(0, max(0.02, 1.1 * max(lowest)))
            elif metric == "explained_variance":
                axis.set_ylim(max(min(lowest) - 0.05, -0.1), min(1.0, max(lowest) + 0.05))
            axis.set(yscale=scale if lowest else "linear", xlabel="training tokens", ylabel=label, title=f"{acts}: {label.split(' (')[0]}")
            axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
            if scale == "log" and lowest:
                axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(10, (1, 2, 5)))
                axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
                axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    legend(figure, handles)
    save(figure, path)


def read_log(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def mean_curve(logs, metric):
    """(tokens, mean over the logs) where all logs have a value."""
    by_tokens = [{line["tokens"]: line[metric] for line in log if line.get(metric) is not None} for log in logs if log]
    shared = sorted(set.intersection(*map(set, by_tokens))) if by_tokens else []
    return shared, [statistics.mean(values[t] for values in by_tokens) for t in shared]


DICTIONARIES = {"random": "--", "untrained": ":"}      # the controls with as many latents as the runs


def draw_usage(caches, look, path):
    """Firing rates of each group's first seed: sorted, and as a histogram of their logarithm."""
    figure, axes = panels(len(caches), 2)
    handles = {}
    for row, (acts, (runs, controls)) in zip(axes, caches.items()):
        drawn, highest = False, 0
        for name, members in grouped([r for r in runs if r.valid]).items():
            colour, _, style = look[members[0].variant]
            rates = rates_of(members[0])
            if rates is not None:
                drawn = True
                alive = sorted((r for r in rates.tolist() if r > 0), reverse=True)
                share = [100 * (i + 1) / len(rates) for i in range(len(alive))]
                handles.setdefault(members[0].variant, row[0].plot(share, alive, color=colour, ls=style, lw=1.3)[0])
                bars = histogram(row[1], members[0], color=colour, ls=style, lw=1.3)
                highest = max(highest, *bars.get_data().values)
        for c in (c for c in controls if c.folder.name in DICTIONARIES and c.get("density")):
            handles[c.name] = histogram(row[1], c, color="#999999", ls=DICTIONARIES[c.folder.name], lw=1)
        if drawn:
            row[1].set_ylim(0, 1.15 * highest)                              # controls stay out of the scale
        else:
            say(row[0], "no firing rates")
            say(row[1], "no firing rates")
        row[0].set(yscale="log" if drawn else "linear", xlabel="latents, most frequent first (% of the dictionary)", ylabel="firing rate (share of rows)",
                   title=f"{acts}: sorted firing rates", xlim=(0, 101))
        row[1].set(xlabel="log10 firing rate", ylabel="latents (% of the dictionary)", title=f"{acts}: density; silent ones left out")
    legend(figure, handles)
    save(figure, path)


def histogram(axis, run, **how):
    bins = run.get("density")
    counts, edges, total = bins["counts"], bins["log10_edges"], sum(bins["counts"]) + bins["silent"]
    first = max(0, next((i for i, c in enumerate(counts) if c), 0) - 1)
    return axis.stairs([100 * c / total for c in counts[first:]], edges[first:], baseline=None, **how)


def rates_of(run):
    """Firing rates [d_sae] beside the run's core result, if they are of the same weights."""
    path = run.folder / "eval" / "rates.safetensors"
    if not path.exists():
        return None
    tensors, meta = read_tensors(path)
    return tensors["rate"] if meta["sae_checksum"] == run.config["sae_checksum"] else None


PLOTS = {                                     # file name -> f(caches, looks, path) that draws it, or returns in a word why there is nothing to draw
    "pareto": draw_pareto,
    "training_curves": draw_training,
    "feature_usage": draw_usage,
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("runs", nargs="*", help="folders (default: all under runs/)")
    p.add_argument("--out", default="plots", help="folder to write to (default: %(default)s)")
    args = p.parse_args()

    runs, controls = find_runs(args.runs)
    caches = {acts: ([r for r in runs if r.acts == acts], [c for c in controls if c.acts == acts]) for acts in dict.fromkeys(r.acts for r in runs)}
    look, out = looks(runs), Path(args.out)
    markdown, text = results(caches)
    print(text + "\n")
    write_file(out / "results.md", markdown.encode())
    plt.rcParams.update(STYLE)
    for name, draw in PLOTS.items():
        missing = draw(caches, look, out / f"{name}.png")
        if missing:
            (out / f"{name}.png").unlink(missing_ok=True)                     # of an earlier call, on other runs
        print(f"{out / name}.png: {missing or 'drawn'}")


if __name__ == "__main__":
    run_script(main)

"""Promises of 04_plot.py: it reads run folders alone, its numbers are those of the JSON files, gaps are words, invalid runs stay out."""
import contextlib
import importlib
import io
import json
import math
import re
import statistics
import subprocess
import sys
import time
import warnings

import pytest
import torch

from sae import ROOT, Refuse, write_json, write_tensors

sys.path.insert(0, str(ROOT))
plot = importlib.import_module("04_plot")
plot.plt.rcParams.update(plot.STYLE)
SETTINGS = {"activation": "topk", "d_sae": 64, "l0": 4.0, "batch_size": 100, "lr": 1e-3}


def run(root, variant, seed=0, acts="tiny", status="done", parents=("baseline",), steps=100, log=True, **settings):
    """A run folder as 02_train.py leaves it, without an evaluation."""
    parts = [variant, *([acts] if acts != "tiny" else []), *(f"{k}={v}" for k, v in settings.items()), f"s{seed}"]
    folder = root / "-".join(parts)
    write_json(folder / "config.json", {"name": folder.name, "variant": variant, "parents": list(parents) if variant != "baseline" else [], "acts": acts,
                                        "seed": seed, "steps": steps, "settings": SETTINGS | settings, "status": status, "sae_checksum": f"{folder.name}",
                                        **({"reason": "it broke"} if status == "failed" else {})})
    if log:
        lines = [{"step": s, "tokens": 100 * s, "loss_recon": 1 / s, "l0": 4.0, "explained_variance": 1 - 1 / s, "dead": 0.0} for s in range(1, 101)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluated(folder, guards=(), acts="tiny", rates=True, checksum=None, contexts=100, **metrics):
    """Its core result, and rates."""
    counts = [0] * 23 + [64]
    m = {"l0": 4.0, "explained_variance": 0.8, "dead": 0.0, "density": {"log10_edges": [-6 + 0.25 * i for i in range(25)], "counts": counts, "silent": 0}}
    m |= {"ce_recovered": 0.9, "kl_sae": 0.1, "by_position": {"at": [8, 24, 40], "ce_recovered": [0.8, 0.85, 0.9]}} if acts == "tiny" else {"mcc": 0.7, "f1": 0.6, "absorption": 0.3}
    m |= metrics
    said = checksum or folder.name
    write_json(folder / "eval" / "core.json", {"eval": "core", "run": folder.name, "acts": acts, "sae_checksum": said, "contexts": contexts, "metrics": m,
                                               "guards": [{"id": g, "level": level, "message": "because"} for g, level in guards]})
    if rates:
        write_tensors(folder / "eval" / "rates.safetensors", {"rate": torch.linspace(0, 0.3, 64)}, {"sae_checksum": said, "rows": 1000})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def draw(*flags, png=False):
    """04_plot.py in this folder -> (printed text, rows of results.md: {run: {column: cell}}). png: write the figures too, which takes seconds."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", ["04_plot.py", *flags])
        if not png:
            patch.setattr(plot, "save", lambda figure, path: plot.plt.close(figure))
            patch.setattr(plot, "report", lambda *about: "")
        plot.main()
    folder = flags[flags.index("--out") + 1] if "--out" in flags else "plots"
    rows = {}
    for line in open(f"{folder}/results.md").read().splitlines():
        if line.startswith("### "):
            header = None                                                     # the other metrics: not in these rows
        cells = [c.strip() for c in line.strip("|").split("|")]
        if line.startswith("| run |"):
            header = cells
        elif line.startswith("| ") and header:
            rows[cells[0]] = dict(zip(header, cells))
    for path in re.findall(r"^(\S+\.png): drawn$", out.getvalue(), re.M) if png else ():
        with open(path, "rb") as f:
            assert f.read(8) == b"\x89PNG\r\n\x1a\n"
    return out.getvalue(), rows


def test_the_tables_numbers_are_those_of_the_files(here):
    ours, theirs = [0.81, 0.83, 0.88], [0.80, 0.80, 0.82]
    for seed, (a, b) in enumerate(zip(ours, theirs)):
        evaluated(run(here, "idea", seed, parents=["topk"]), explained_variance=a, l0=4.1)
        evaluated(run(here, "baseline", seed), explained_variance=b)
    text, rows = draw()
    row = rows["idea"]
    assert row["EV"] == f"{statistics.mean(ours):.4f} +- {statistics.stdev(ours):.4f}" and row["seeds"] == "3" and row["L0"] == "4.10 +- 0.00"
    deltas = [a - b for a, b in zip(ours, theirs)]
    half = 4.302653 * statistics.stdev(deltas) / 3 ** 0.5                     # Student's t at 95 %, 2 degrees of freedom
    low, high = statistics.mean(deltas) - half, statistics.mean(deltas) + half
    assert row["EV - baseline"] == f"{statistics.mean(deltas):+.4f} [{low:+.4f}, {high:+.4f}] (n=3)"
    assert row["EV - parent"] == "not run" and rows["baseline"]["EV - baseline"] == ""
    assert row["EV"] in text and row["EV - baseline"] in text


def test_differences_pair_the_same_seed_only(here):
    evaluated(run(here, "baseline", 0), explained_variance=0.5)
    evaluated(run(here, "baseline", 7), explained_variance=0.1)
    evaluated(run(here, "idea", 0), explained_variance=0.6)
    evaluated(run(here, "idea", 1), explained_variance=0.9)
    assert draw()[1]["idea"]["EV - baseline"] == "+0.1000 (n=1)"


@pytest.mark.parametrize("l0, said", [(4.19, "+0.1000 (n=1)"), (4.3, "L0 differs")])
def test_runs_are_compared_at_the_same_l0_only(here, l0, said):
    evaluated(run(here, "baseline"), explained_variance=0.5)
    evaluated(run(here, "idea"), explained_variance=0.6, l0=l0)
    assert draw()[1]["idea"]["EV - baseline"] == said


def test_of_several_baselines_the_one_at_the_same_l0_and_settings_counts(here):
    evaluated(run(here, "baseline"), explained_variance=0.5)
    evaluated(run(here, "baseline", lr=0.01), explained_variance=0.3)
    evaluated(run(here, "baseline", l0=8.0), explained_variance=0.7, l0=8.0)
    evaluated(run(here, "idea", l0=8.0), explained_variance=0.75, l0=8.1)
    evaluated(run(here, "idea", lr=0.01), explained_variance=0.5)
    rows = draw()[1]
    assert rows["idea-l0=8.0"]["EV - baseline"] == "+0.0500 (n=1)" and rows["idea-lr=0.01"]["EV - baseline"] == "+0.2000 (n=1)"


def test_invalid_runs_are_marked_and_stay_out_of_means_differences_and_figures(here):
    evaluated(run(here, "baseline", 0), explained_variance=0.5)
    evaluated(run(here, "idea", 0), explained_variance=0.6)
    evaluated(run(here, "idea", 1), explained_variance=-5.0, guards=[("G02", "fatal")])
    evaluated(run(here, "void", 0), explained_variance=0.99, guards=[("G08", "fatal"), ("G24", "warn")])
    text, rows = draw()
    assert rows["idea"]["EV"] == "0.6000" and "1 of 2 left out as invalid: G02" in rows["idea"]["guards"]
    assert rows["void"]["guards"] == "INVALID G08; warns G24" and rows["void"]["EV - baseline"] == "-"
    assert "void-s0 is invalid: G08 because." in text
    shown = figures(here)
    assert "void" not in [t.get_text() for t in shown["pareto"].legends[0].get_texts()]
    for axis in shown["pareto"].axes:
        low, high = axis.get_ylim()
        assert low > 0 and high < 0.99


def figures(here):
    """The figures before they are written, by name."""
    runs, controls = plot.find_runs([])
    caches = {acts: ([r for r in runs if r.acts == acts], [c for c in controls if c.acts == acts]) for acts in dict.fromkeys(r.acts for r in runs)}
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "save", lambda figure, path: (plot.plt.close(figure), kept.update({path: figure})))
        for name, f in (("pareto", plot.draw_pareto), ("training", plot.PLOTS["training_curves"]), ("usage", plot.PLOTS["feature_usage"])):
            f(caches, plot.looks(runs), name)
    return kept


def test_gaps_are_words(here):
    run(here, "baseline")                                                     # never evaluated
    run(here, "idea", status="failed", log=False)
    run(here, "late", status="training")
    evaluated(run(here, "old"), checksum="of other weights")
    half = run(here, "half")
    evaluated(half, rates=False, ce_recovered=None)
    text, rows = draw()
    said = {name: row["guards"] for name, row in rows.items()}
    assert said == {"baseline": "not evaluated", "idea": "training failed", "late": "training not finished", "old": "evaluation is of older weights", "half": "-"}
    assert rows["old"]["EV"] == "-" and rows["half"]["CE rec."] == "-" and rows["half"]["EV"] == "0.8000"
    assert "idea-s0 failed in training: it broke." in text
    assert any("no valid run" in t.get_text() for axis in figures(here)["pareto"].axes for t in axis.texts)


def test_nothing_evaluated_still_draws(here):
    run(here, "baseline", log=False)
    text, rows = draw(png=True)
    assert rows["baseline"]["guards"] == "not evaluated" and "plots/pareto.png: drawn" in text and "plots/training_curves.png: nothing to show" in text


def test_controls_stand_in_the_table_and_are_drawn_hollow(here):
    evaluated(run(here, "baseline"), kl_sae=0.2)
    evaluated(here / "controls-tiny" / "random", guards=[("G05", "fatal")], rates=False, explained_variance=0.2, kl_sae=0.1)
    evaluated(here / "controls-other" / "random", acts="other", rates=False)
    text, rows = draw()
    assert rows["control: random"]["EV"] == "0.2000" and rows["control: random"]["EV - baseline"] == "" and len(rows) == 2
    assert "KL says nothing by itself here: the baseline has 0.2000, control: random 0.1000." in text and "EV says nothing" not in text
    ev, ce = figures(here)["pareto"].axes
    hollow = lambda axis: [line for line in axis.lines if line.get_markerfacecolor() == "none"]
    assert len(hollow(ce)) == 1 and not hollow(ev)                            # 0.2 would squeeze the runs at 0.8
    assert [t.get_text() for t in ev.texts] == ["controls below: random 0.20"]


def test_swept_l0s_are_joined_by_a_line(here):
    for l0 in (4.0, 8.0, 16.0):
        evaluated(run(here, "idea", l0=l0), l0=l0, explained_variance=l0 / 20)
    lines = [line.get_xydata().tolist() for line in figures(here)["pareto"].axes[0].lines if line.get_linestyle() == "-"]
    assert [[4.0, 0.2], [8.0, 0.4], [16.0, 0.8]] in lines


def test_forty_five_variants_have_looks_of_their_own_and_the_legend_names_them_all(here):
    names = [f"idea_{i}" for i in range(44)]
    for name in ["baseline", *names]:
        evaluated(run(here, name, log=False), rates=False)
    looks = plot.looks([plot.Run(p) for p in here.iterdir()])
    assert len({look[:2] for look in looks.values()}) == 45
    figure = figures(here)["pareto"]
    assert len(figure.legends[0].get_texts()) == 45
    figure.savefig(io.BytesIO())                                              # lays it out
    box = figure.legends[0].get_window_extent()
    assert box.height <= figure.bbox.height and all(axis.get_window_extent().x1 <= box.x0 for axis in figure.axes)


def test_evaluations_of_different_size_are_pointed_out(here):
    evaluated(run(here, "baseline"))
    assert "different numbers" not in draw()[0]
    evaluated(run(here, "idea"), contexts=5)
    assert "different numbers of held-out contexts (5, 100)" in draw()[0]


def test_caches_have_panels_and_tables_of_their_own(here):
    evaluated(run(here, "topk"))
    evaluated(run(here, "topk", acts="synthetic"), acts="synthetic", absorption=None)
    text, _ = draw("--out", "elsewhere", png=True)
    md = open("elsewhere/results.md").read()
    assert "## tiny" in md and "## synthetic" in md and md.count("| run | verdict |") == 2 and "MCC" in md.split("## synthetic")[1]
    assert {axis.get_title(loc="left") for axis in figures(here)["pareto"].axes} >= {"tiny: explained variance", "synthetic: MCC with the true features"}


def test_bad_input_is_refused(here):
    with pytest.raises(Refuse, match="run 02_train.py first"):
        plot.find_runs([])
    with pytest.raises(Refuse, match="is not a run"):
        plot.find_runs(["runs/none"])


def test_neither_the_model_nor_the_data_is_needed():
    code = "import sys, importlib; importlib.import_module('04_plot'); print(sorted({'transformers', 'sae_bench', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"


# ---- the notes' plots -------------------------------------------------------------------------------------------------------------------


LETTERS = "abcdefghijklmnoprstuvw"


def analysed(folder, seed=0, others=(), level=0.0, language=True, revived=False):
    """All the files that 03_eval.py would leave in a run's folder, with numbers around `level`."""
    said, jitter = {"sae_checksum": folder.name}, 0.01 * seed + level
    condition = {"run": {"median": 3.0 + jitter}, "null": {"median": 2.0}, "marchenko_pastur": 2.1}
    batches = {"jaccard": [0.1, 0.2 + jitter, 0.4], "rbo": [0.1, 0.3, 0.5], "dense": [0.3, 0.25, 0.2 + jitter]}
    projected = {"error_sd": [0.2, 0.1, 0.05, 0.02, 0.0], "recall": [0.1 + jitter, 0.3, 0.6, 0.9, 1.0], "reconstruction": [0.1, 0.2, 0.4, 0.8, 1.0],
                 "error_max": [0.5, 0.3, 0.2, 0.1, 0.0], "above": {tau: {"recall": [0.5, 0.6, 0.8, 0.9, 1.0], "precision": [None, 0.1, 0.3, 0.6, 1.0]}
                                                                   for tau in ("0.05", "0.1", "0.2", "0.4")}}
    shape = {"mean_max_cosine": 0.3 + jitter, "mean_square_cosine": 0.01, "mean_abs_cosine": 0.08, "effective_rank": 20.0, "frame_ratio": 3.0, "unique": 0.4,
             "coherence": 0.9, "pairs_above": {"0.5": 30}, "nearest_cosine": [0.1 + i / 125 for i in range(101)]}
    survived = [None if i > 30 else 1 - i / 100 - jitter for i in range(41)]
    files = {
        "geometry": {"metrics": shape | {"hoyer": 0.9, "gini": 0.4 + jitter, "correlation": 0.02, "l0_of_rows": [float(i // 10) for i in range(101)],
                                         "tenths": {"norm": [1 + i / 10 for i in range(10)], "l0": [3 + i / 10 for i in range(10)], "explained_variance": [0.8] * 10,
                                                    "l2_ratio": [0.9 + i / 100 for i in range(10)], "slope": [1.05 - i / 200 for i in range(10)]}},
                     "null": shape | {"welch": 0.007, "correlation": 0.01}, "condition": {"group": condition, "across": condition, "active": condition},
                     "jl": {"dimensions": [32, 64, 128, 256, 512], "run": projected, "null": projected},
                     "pairs": {"pairs": 20, "rows": [256, 1024, 4096], "coactivation": batches, "phi": batches, "preact": batches, "null_dense": 0.02}},
        "structure": {
            "composition": {"run": 0.6 + jitter, "null": 0.5}, "diversity": {"clusters": 0.9, "token_entropy": 1.5 + jitter},
            "position": {"at": [8, 24, 40, 56, 72, 88, 104, 120], "l0": [4.0] * 8, "explained_variance": [0.8 + i / 100 for i in range(8)]},
            "hierarchy": {"containment": [i / 200 for i in range(101)], "contained": 0.1, "cosine": 0.2 + jitter, "depths": [0.9, 0.1],
                          "by_place": {"rate": [0.1 - i / 200 for i in range(10)], "parents": [0.2 - i / 50 for i in range(10)]}, "trees": []},
            "hierarchy_null": {"containment": [i / 1000 for i in range(101)]},
            "interference": {"by_rate": [100.0 / (i + 1) for i in range(10)], "ranks": [1, 2, 4, 8, 16, 32, 64, 128, 256], "captured": [i / 10 for i in range(1, 10)],
                             "null": {"by_rate": [90.0 / (i + 1) for i in range(10)], "captured": [i / 12 for i in range(1, 10)]}},
            "thresholds": {"rule": 2.0, "ratio": 1.1 + jitter, "z_by_rate": [2.2 - i / 20 for i in range(10)], "kurtosis": [i / 50 for i in range(101)],
                           "threshold": [0.1, 0.5, 0.9], "by_rule": [0.0, 0.5, 1.0]},
            "precision": {"fp32": {"l0": 4.0, "explained_variance": 0.8}, "weights": {"l0": 4.01, "explained_variance": 0.8 + jitter / 10},
                          "weights_acts": {"l0": 4.01, "explained_variance": 0.8}},
            **({} if language else {"missed": {"depth": [1, 2], "missed": [0.3 + jitter, None], "pairs": [12, 0]}})},
        "stability": {"others": {o: {"matched": 0.5 + jitter, "again": {"0.7": 0.4}, "activations": 0.6, "pairs": 0.3 + jitter,
                                     "cosines": [i / 100 for i in range(101)], "again_by_rate": [0.1 + i / 20 for i in range(10)],
                                     "encoder": 0.45, "unmatched": {"cosine": 0.4 + jitter, "null": 0.25}} for o in others},
                      "null": {"matched": 0.3, "cosines": [0.2 + i / 400 for i in range(101)]}},
        "training": {"stages": [{"tokens": 100 * n, "ce_recovered": 0.5 + n / 200, "kl_recovered": 0.4 + n / 200, "l2_ratio": 0.9, "pairs": n / 100,
                                 "effective_rank": 10.0, "mean_max_cosine": 0.3, "unique": 0.4, "revived_cosine": 0.2 if revived and n > 6 else None}
                                for n in (3, 6, 12, 25, 50, 100)], "pair_half_life": 5000 + 1000 * jitter, "deaths": [i / 50 for i in range(10)],
                     "survival": {"tokens": [250 * i for i in range(41)], "start": [1 - i / 200 for i in range(41)], "revived": survived if revived else None}}}
    if language:
        files |= {
            "absorption": {"eval_result_metrics": {"mean": {"mean_absorption_fraction_score": 0.05 + jitter, "mean_full_absorption_score": 0.1 + jitter, "mean_num_split_features": 1.2}},
                           "eval_result_details": [{"first_letter": c, "mean_absorption_fraction": 0.05, "full_absorption_rate": 0.1 + jitter, "num_full_absorption": 3,
                                                    "num_probe_true_positives": 5 if c == "w" else 40 + i, "num_split_features": 1} for i, c in enumerate(LETTERS)]},
            "sparse_probing": {"eval_result_metrics": {"sae": {f"sae_top_{k}_test_accuracy": 0.7 + 0.01 * k + jitter for k in (1, 5, 20)},
                                                       "llm": {f"llm_top_{k}_test_accuracy": 0.65 + 0.01 * k for k in (1, 5, 20)}},
                               "eval_result_details": [{"dataset_name": "one", **{f"sae_top_{k}_test_accuracy": 0.7 + jitter for k in (1, 5, 20)}}]},
            "unlearning": {"eval_result_metrics": {"unlearning": {"unlearning_score": 0.05 + jitter}}, "eval_result_unstructured": {"settings": 16}}}
    for name, content in files.items():
        write_json(folder / "eval" / f"{name}.json", said | content)


def logged(folder, revived=False, tau=None):
    """A training log with all that the curves show."""
    lines = [{"step": s, "tokens": 100 * s, "loss": 1.1 / s, "loss_recon": 1 / s, "loss_sparsity": 0.1 / s, "ratio_sparsity": 0.1, "mse": 1 / s, "l0": 4.0, "l1": 2.0, "explained_variance": 1 - 1 / s,
              "dead": 0.0, **({"revived": s, "z": 1.5} if revived else {}), **({"pair_cos": 0.1, "pair_over": 0.3, "ratio_ortho": 0.05, "tau": tau} if tau else {})} for s in range(1, 101)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def everything(root, variants, seeds=3, acts="tiny"):
    """Runs of all variants with everything measured."""
    name = lambda v, s: "-".join([v, *([acts] if acts != "tiny" else []), f"s{s}"])
    for i, v in enumerate(variants):
        for s in range(seeds):
            folder = run(root, v, s, acts=acts)
            logged(folder, revived="zscore" in v, tau=0.1 + i / 100 if "topk_ortho" in v else None)
            part = i + s / 10                                                    # no two runs measure the same
            evaluated(folder, acts=acts, explained_variance=0.8 + 0.001 * part, kl_sae=0.1 + 0.01 * part, l1=5.0 + 0.01 * part, mse=0.01 + 0.0001 * part,
                      decoder_max_cosine=0.3 + 0.001 * part, cosine=0.9 - 0.001 * part, l0=4 + 0.001 * part, **({"ce_recovered": 0.9 + 0.0001 * part} if acts == "tiny" else {}))
            analysed(folder, s, [name(v, o) for o in range(seeds) if o != s], level=0.003 * i, language=acts == "tiny", revived="zscore" in v)


MANY = ["baseline", "topk", "batch_topk", "jumprelu", "gated", *(f"{study}_r{i}" for study in ("contrastive", "adaptive_ortho", "topk_ortho", "zscore") for i in range(1, 11))]


def drawn(name, here):
    """(what main prints of the figure NAME.png, the figure)"""
    runs, controls = plot.find_runs([])
    caches = {acts: ([r for r in runs if r.acts == acts], [c for c in controls if c.acts == acts]) for acts in dict.fromkeys(r.acts for r in runs)}
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "save", lambda figure, path: (plot.plt.close(figure), kept.append(figure)))
        missing = plot.PLOTS[name](caches, plot.looks(runs), here / f"{name}.png")
    return missing, kept[0] if kept else None


def test_every_plot_is_drawn_where_everything_was_measured(here):
    everything(here, ["baseline", "topk", "topk_ortho_r1", "zscore_r1"])
    everything(here, ["baseline", "topk"], acts="synthetic")
    for weight in (0.0, 0.1):
        for variant, settings in (("ortsae", {"ortsae_weight": weight}), ("topk_ortho_r3", {"pair_fraction": weight}), ("topk_ortho_r4", {"ortho_tau": weight})):
            evaluated(run(here, variant, **settings), explained_variance=0.7 + weight, mse=0.3 - weight, cosine=0.5 + weight, l0=3.9 + weight)
    for l0 in (2.0, 8.0, 16.0):
        evaluated(run(here, "topk", acts="synthetic", l0=l0), acts="synthetic", l0=l0, absorption=1 / l0, mse=l0, cosine=l0 / 20)
    evaluated(run(here, "jumprelu", activation="jumprelu"), mse=0.5, cosine=0.2)
    analysed(here / "jumprelu-activation=jumprelu-s0")
    missing = {name: drawn(name, here)[0] for name in plot.PLOTS}
    assert {name: why for name, why in missing.items() if why} == {}


def test_a_missing_evaluation_is_named_and_no_file_is_left(here):
    run(here, "baseline", log=False)
    for name in set(plot.PLOTS) - {"pareto"}:
        why, figure = drawn(name, here)
        assert figure is None and ("03_eval.py --eval" in why or "02_train.py --sweep" in why or "log" in why), name
    assert drawn("feature_stability", here)[0] == "not measured: 03_eval.py --eval stability with two seeds or more"


def marks(axis, color="#777777"):
    """x of the marks of a colour, by row."""
    return {line.get_ydata()[0]: line.get_xdata()[0] for line in axis.lines if line.get_color() == color and line.get_marker() == "|"}


def words(axis):
    return [t.get_text() for t in axis.texts]


def test_dots_are_the_files_numbers_seeds_and_null_beside_the_mean(here):
    everything(here, ["baseline", "idea"])
    figure = drawn("feature_correlations", here)[1]
    stability = drawn("feature_stability", here)[1].axes[0]
    assert stability.containers[0].lines[0].get_xdata()[0] == pytest.approx(statistics.mean([0.5, 0.51, 0.52])) and marks(stability) == {0: 0.3, 1: 0.3}
    hollow = [line for line in stability.lines if line.get_markerfacecolor() == "none"]
    assert hollow[0].get_xdata().tolist() == pytest.approx([0.5, 0.51, 0.52])
    bars = stability.containers[0].lines[2][0].get_segments()[0]
    assert (bars[1][0] - bars[0][0]) / 2 == pytest.approx(statistics.stdev([0.5, 0.51, 0.52]))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["baseline", "idea"]


def test_a_group_without_a_number_gets_a_word_in_its_row(here):
    everything(here, ["baseline"], seeds=2)
    run(here, "never")
    evaluated(run(here, "half"), cosine=0.1, mse=0.1)
    evaluated(run(here, "void"), explained_variance=-1.0, guards=[("G02", "fatal")])
    analysed(here / "void-s0", 0, ["x"])
    axis = drawn("feature_stability", here)[1].axes[0]
    rows = dict(zip(["baseline", "half", "never", "void"], range(4)))
    assert {t.xy[1]: t.get_text() for t in axis.texts} == {rows["half"]: "not measured", rows["never"]: "not evaluated", rows["void"]: "invalid G02"}


def test_stale_evaluations_are_not_drawn(here):
    everything(here, ["baseline"], seeds=2)
    for seed in (0, 1):
        path = here / f"baseline-s{seed}" / "eval" / "geometry.json"
        write_json(path, json.loads(path.read_text()) | {"sae_checksum": "older"})
    assert drawn("condition_numbers", here)[0] == "not measured: 03_eval.py --eval geometry"


def test_curves_are_means_over_seeds_at_the_steps_they_share(here):
    for seed, level, steps in ((0, 0.4, range(1, 101)), (1, 0.6, range(2, 101, 2))):
        folder = run(here, "baseline", seed)
        lines = [{"step": s, "tokens": 100 * s, "loss": 1 / s, "loss_recon": 1 / s, "l0": level * s} for s in steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    axis = drawn("sparsity_evolution", here)[1].axes[0]
    line, = axis.lines
    assert len(line.get_xdata()) == 50 and line.get_ydata()[4] == pytest.approx(1 - 0.5 * 10 / 64)
    assert len(axis.collections) == 1                                         # the band of their standard deviation


def test_a_run_without_a_curve_is_named_in_the_legend_with_the_reason(here):
    everything(here, ["baseline", "idea", "half"], seeds=1)
    (here / "half-s0" / "eval" / "geometry.json").unlink()
    run(here, "never")
    legend = drawn("jl_quality", here)[1].axes[4].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["baseline", "null: random directions", "idea", "half: not measured", "never: not evaluated"]


def test_many_curves_are_split_by_study_with_the_baseline_in_each(here):
    for name in ["baseline", "topk", *(f"idea_r{i}" for i in range(1, 7)), *(f"other_r{i}" for i in range(1, 5))]:
        run(here, name)
    figure = drawn("explained_variance_evolution", here)[1]
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["tiny: idea", "tiny: other", "tiny: yardsticks"]
    assert [[t.get_text() for t in axis.get_legend().get_texts()][0] for axis in figure.axes] == ["baseline"] * 3
    assert [len(axis.lines) for axis in figure.axes] == [7, 5, 2]


def test_letters_with_few_words_are_dashes(here):
    everything(here, ["baseline", "idea"])
    axis = drawn("letter_absorption", here)[1].axes[0]
    assert words(axis).count("-") == 2 and ".11" in words(axis)               # w, of both; (0.10 + 0.11 + 0.12) / 3
    assert [t.get_text() for t in axis.get_xticklabels()][0] == "a\n40"


def test_each_letter_has_its_difference_with_an_interval_that_the_words_and_the_seeds_allow(here):
    everything(here, ["baseline", "idea"])
    forest = drawn("letter_absorption", here)[1].axes[-6]                     # the first of six, after the heat map and its colours
    assert forest.get_title(loc="left") == "idea\n5 worst letters: 24% of all"
    lines = {line.get_ydata()[0]: line for line in forest.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]}
    assert len(lines) == 21                                                   # not w, which has five words
    rate, base, n = 0.113, 0.11, 40                                           # a's, means over seeds; no seed differs from another in what the idea adds
    assert lines[0].get_xdata().tolist() == pytest.approx(list(plot.newcombe(rate, base, n)[1:]))
    assert max(abs(x) for line in lines.values() for x in line.get_xdata()) <= forest.get_xlim()[1]


def test_newcombes_interval_of_two_rates_is_the_papers():
    assert plot.newcombe(56 / 70, 48 / 80, 1e9)[0] == pytest.approx(0.2)
    assert plot.newcombe(0.5, 0.5, 100)[1:] == pytest.approx((-0.1360, 0.1360), abs=5e-4)      # Wilson: 0.4038 to 0.5962, 0.0962 x sqrt 2
    assert plot.newcombe(0.0, 0.0, 10)[1:] == pytest.approx((-0.2775, 0.2775), abs=5e-4)       # table II (h) of Newcombe 1998: 0 of 10 and 0 of 10


def test_pairs_of_seeds_are_a_heat_map_by_variant(here):
    everything(here, ["baseline", "idea"])
    run(here, "never")
    axis = next(a for a in drawn("pair_stability", here)[1].axes if a.images)
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0, 1", "0, 2", "1, 2"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["baseline", "idea", "never"]
    cells = axis.images[0].get_array()
    assert cells[0].tolist() == pytest.approx([0.305, 0.31, 0.315]) and cells.mask[2].all()    # both directions of a pair, averaged


def test_a_grid_of_two_settings_is_a_line_for_each_value_of_the_other(here):
    for seed in range(2):
        evaluated(run(here, "baseline", seed))
        for fraction in (0.001, 0.01, 0.1):
            for rule in ("phi", "random"):
                evaluated(run(here, "topk_ortho_r1", seed, pair_fraction=fraction, pair_rule=rule), explained_variance=fraction + len(rule) / 100 + seed / 1000)
        evaluated(run(here, "topk_ortho_r1", seed, pair_fraction=0.5, pair_rule="decoder"))     # no second value: no line
        evaluated(run(here, "baseline", seed, l0=8.0))                        # not beside lines at L0 4
    figure = drawn("topk_ablation", here)[1]
    by_fraction, by_rule = (a for a in figure.axes if a.get_legend())
    said = lambda axis: [t.get_text() for t in axis.get_legend().get_texts()]
    assert said(by_fraction) == ["pair_rule=phi", "pair_rule=random", "baseline (grey: its seeds)"]
    assert said(by_rule)[:3] == ["pair_fraction=0.001", "pair_fraction=0.01", "pair_fraction=0.1"]
    first = figure.axes[0].containers
    assert [line.get_ydata()[0] for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]] == [0.8]     # the baseline
    assert [line.lines[0].get_ydata().tolist() for line in first] == [pytest.approx([f + n / 100 + 0.0005 for f in (0.001, 0.01, 0.1)]) for n in (3, 6)]


def test_what_the_penalty_weighs_beside_the_error_is_drawn_where_it_is_logged(here):
    for weight in (0.0, 0.1):
        folder = run(here, "ortsae", ortsae_weight=weight)
        evaluated(folder, explained_variance=0.5 + weight)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 100, "loss": 1.0, "lr": 1e-3, "ratio_ortho": weight, "ratio_aux": 9.0, "ratio_sparsity": 9.0}) + "\n")
    figure = drawn("alpha_ablation", here)[1]
    assert [a.get_ylabel() for a in figure.axes if a.lines] == ["EV", "CE rec.", "dead", "L0", "penalty / reconstruction error"]      # nothing has the others
    last = [a for a in figure.axes if a.lines][-1]
    assert last.containers[0].lines[0].get_ydata().tolist() == [0.0, 0.1]


def test_the_zipf_exponent_is_that_of_planted_rates(here):
    folder = run(here, "baseline")
    evaluated(folder, rates=False)
    for s in (0.0, 0.5, 1.2):
        rate = 0.5 * torch.arange(1, 2001).double() ** -s
        write_tensors(folder / "eval" / "rates.safetensors", {"rate": rate}, {"sae_checksum": folder.name, "rows": 1_000_000})
        assert plot.zipf(plot.Run(folder)) == pytest.approx(s, abs=1e-6)
    write_tensors(folder / "eval" / "rates.safetensors", {"rate": rate}, {"sae_checksum": folder.name, "rows": 100})
    assert plot.zipf(plot.Run(folder)) is None                                # on so few rows only three fire ten times


def test_a_caption_names_the_lines_that_are_there(here):
    everything(here, ["baseline", "idea"])
    assert drawn("unlearning", here)[1].get_supxlabel().endswith("line: mean of baseline")
    everything(here, ["fixed_ortho"])
    assert drawn("unlearning", here)[1].get_supxlabel().endswith("line: mean of baseline; dashed: of fixed_ortho")


def test_long_names_leave_room_for_the_panels(here):
    long = {f"pair_{key}": value for key, value in (("rule_of_selection", "coactivation"), ("fraction_of_all", 0.001), ("latents_at_most", 123456), ("ortho_weight", 0.25))}
    for v in ("baseline", "idea"):
        folder = run(here, v, **(long if v == "idea" else {}))
        logged(folder)
        evaluated(folder, explained_variance=len(v) / 10, mse=len(v) / 10)
        analysed(folder, level=len(v) / 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("final_losses", "probing_accuracy", "absorption_efficiency", "letter_absorption", "key_metrics_combined"):
            drawn(name, here)[1].savefig(io.BytesIO())


def test_names_leave_out_what_all_runs_of_a_cache_have_in_common_and_the_heading_says_it(here):
    for acts, ev in (("tiny", 0.8), ("other", 0.6)):
        for variant, settings in (("baseline", {}), ("idea", {}), ("idea", {"lr": 0.1})):
            evaluated(run(here, variant, acts=acts, d_sae=128, l0=8.0, **settings), acts=acts, explained_variance=ev)
    evaluated(run(here, "baseline", acts="tiny", d_sae=128), explained_variance=0.7)                       # at another L0, so that this is not in common
    said, _ = draw()
    markdown = (here.parent / "plots" / "results.md").read_text()
    for text in (said, markdown):
        assert "other with d_sae=128 l0=8.0\n" in text and "tiny with d_sae=128\n" in text
    other, tiny = (next(part for part in markdown.split("\n## ") if part.startswith(acts)).split("\n### ")[0] for acts in ("other", "tiny"))
    names = lambda part: {line.split(" | ")[0].removeprefix("| ") for line in part.splitlines() if line.startswith("| ")} - {"run"}
    assert names(other) == {"baseline", "idea", "idea-lr=0.1"} and names(tiny) == {"baseline-l0=8.0", "baseline", "idea-l0=8.0", "idea-l0=8.0-lr=0.1"}
    assert "0.6000" in other and "0.6000" not in tiny


def test_more_lines_than_can_be_told_apart_are_parted_and_a_sweep_stands_by_itself(here):
    for name in ["baseline", *(f"idea_r{i}" for i in range(1, 4))]:
        run(here, name)
    for l0 in range(1, 14):
        run(here, "topk", l0=float(l0))
    run(here, "baseline", l0=8.0)
    runs, _ = plot.find_runs([])
    parts = plot.studies(runs)
    assert [(title, len(groups)) for title, groups in parts] == [("idea", 4), ("topk (1)", 11), ("topk (2)", 4), ("yardsticks", 2)]
    assert all("baseline" in groups for _, groups in parts) and list(parts[3][1]) == ["baseline", "baseline-l0=8.0"]
    assert [title for title, _ in plot.studies(runs, lambda r: r.variant)] == [""]


def test_efficiency_is_the_reduction_per_point_lost_and_has_words_where_it_has_no_meaning(here):
    base = run(here, "baseline")
    write_json(base / "config.json", json.loads((base / "config.json").read_text()) | {"seconds": 10.0})
    evaluated(base, explained_variance=0.80)
    analysed(base, level=0.0)                                                 # full absorption 0.10
    for name, ev, level, l0 in (("pays", 0.78, -0.05, 4.0), ("gains", 0.81, -0.05, 4.0), ("sparse", 0.78, -0.05, 3.0), ("thrifty", 0.7995, -0.05, 4.0)):
        folder = run(here, name)
        write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | {"seconds": 30.0})
        evaluated(folder, explained_variance=ev, l0=l0, mse=len(name), cosine=len(name))
        analysed(folder, level=level)
    plane, clock, bars = drawn("absorption_efficiency", here)[1].axes
    rows = [t.get_text() for t in bars.get_yticklabels()]
    assert {rows[t.xy[1]]: t.get_text() for t in bars.texts} == {
        "gains": "costs no explained variance", "sparse": "L0 differs from the baseline's", "thrifty": "costs less than 0.1 points in a seed: no ratio"}
    line = next(line for line in bars.lines if line.get_markerfacecolor() == "none")
    assert rows[line.get_ydata()[0]] == "pays" and line.get_xdata()[0] == pytest.approx(50 / 2)     # half of it for two points
    assert any(line.get_xydata()[0].tolist() == pytest.approx([-2.0, -0.05]) for line in plane.lines)
    assert any(line.get_xydata()[0].tolist() == pytest.approx([3.0, -0.05]) for line in clock.lines)                     # three times as slow


def test_the_fit_of_absorption_to_l0_is_the_planted_law_and_ends_where_the_l0s_end(here):
    for seed, factor in ((0, 2.0), (1, 4.0)):
        for l0 in (20.0, 40.0, 100.0):
            evaluated(run(here, "topk", seed, acts="synthetic", l0=l0, d_sae=512, steps=400, log=False), acts="synthetic", l0=l0, absorption=factor * l0 ** -(1.2 + 0.2 * seed), mse=l0, cosine=seed + l0 / 999)
    for l0 in (20.0, 40.0):
        evaluated(run(here, "idea", acts="synthetic", l0=l0, d_sae=256, steps=400, log=False), acts="synthetic", l0=l0, absorption=0.5)
    axis, = drawn("absorption_l0", here)[1].axes
    said, = [t.get_text() for t in axis.get_legend().get_texts()]
    pooled = (2 * 80 ** -1.2 * 4 * 80 ** -1.4) ** 0.5                         # the geometric mean of both seeds' laws
    assert said == f"topk d_sae=512: slope -1.30 +- 0.14, {pooled:.3f} at L0 80"
    line = axis.lines[-1]
    assert line.get_xdata().tolist() == [20.0, 100.0]
    assert drawn("absorption_l0", here)[0] is None and plot.law([1, 10, 100], [3.0, 0.3, 0.03]) == pytest.approx([-1, math.log(3)])


def test_two_l0s_are_no_law(here):
    for l0 in (2.0, 4.0):
        evaluated(run(here, "topk", acts="synthetic", l0=l0), acts="synthetic", l0=l0, absorption=1 / l0)
    assert "--sweep l0=8,16,32" in drawn("absorption_l0", here)[0]


def test_the_table_of_bfloat16_has_a_row_for_each_metric_and_the_changes_in_it(here):
    everything(here, ["baseline", "idea"])
    runs, _ = plot.find_runs([])
    header, rows = plot.precision_table(runs)
    assert header[2:] == ["fp32", "weights in bf16", "weights and activations", "losses alone"]
    assert [row[:4] for row in rows if row[0] == "baseline"] == [["baseline", "EV", "0.80000", "+0.00100 +- 0.00100"], ["baseline", "L0", "4.000", "+0.010 +- 0.000"]]
    assert rows[0][5] == "-" and plot.PRECISION in plot.results({"tiny": (runs, [])}, {"tiny": plot.compare(runs, "explained_variance")}, "explained_variance")[0]


def test_losses_are_stacked_by_term(here):
    run(here, "baseline")
    logged(here / "baseline-s0")
    axis = drawn("final_losses", here)[1].axes[0]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0.01, 0.001])


def test_reviving_runs_are_drawn_beside_what_they_extend_only(here):
    for name, revived, parents in (("baseline", False, []), ("zscore_r1", True, ["skip"]), ("skip", False, ["baseline"]), ("other", False, ["baseline"])):
        logged(run(here, name, parents=parents), revived=revived)
    labels = [t.get_text() for axis in drawn("reactivation", here)[1].axes if axis.get_legend() for t in axis.get_legend().get_texts()]
    assert sorted(labels) == ["baseline", "skip", "zscore_r1"]


def test_forty_five_variants_and_three_seeds_take_seconds_a_plot(here):
    assert len(MANY) == 45
    everything(here, MANY)
    runs, controls = plot.find_runs([])
    caches, looks = {"tiny": (runs, controls)}, plot.looks(runs)
    for name in ("key_metrics_combined", "probing_accuracy", "letter_absorption", "reactivation"):
        started = time.process_time()
        plot.PLOTS[name](caches, looks, here / f"{name}.png")
        assert time.process_time() - started < 20, name
        assert (here / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

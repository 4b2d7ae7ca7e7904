"""Promises of 04_plot.py: it reads run folders alone, its numbers are the files'."""
import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from sae import ROOT, write_json, write_tensors

sys.path.insert(0, str(ROOT))
plot = importlib.import_module("04_plot")
SETTINGS = {"activation": "topk", "d_sae": 64, "l0": 16.0, "batch_size": 100, "lr": 0.001}
CORE = {"l0": 16.0, "explained_variance": 0.8, "ce_recovered": 0.9, "kl_sae": 0.1, "mse": 0.4,
        "l1": 30.0, "l2_ratio": 0.9, "kl_div_score": 0.95, "ce_loss_score": 0.96, "dead": 0.02}
DENSITY = {"log10_edges": [-3.0, -2.0, -1.0], "counts": [40, 20], "silent": 4}


def make_run(root, variant, seed=0, parent="baseline", sets=None, core=None, evals=None, guards=(),
             log=(), **config):
    """A run's folder as stages 2 and 3 leave it, written by the project's own writers.

    core: metrics of core.json that differ from CORE (None: not evaluated); evals: {NAME: its rest};
    log: what each line of the log has besides the usual.
    """
    acts = config.get("acts", "tiny")
    shown = [f"{k}={v}" for k, v in sorted((sets or {}).items())]
    folder = root / "-".join([variant, *[acts] * (acts != "tiny"), *shown, f"s{seed}"])
    about = {"name": folder.name, "variant": variant, "acts": acts, "acts_checksum": "a",
             "seed": seed, "parent": None if variant == "baseline" else parent,
             "steps": 100, "status": "done",
             "settings": SETTINGS | (sets or {}), "sae_checksum": folder.name, "seconds": 10.0,
             "paired": True, "acted": {}}
    write_json(folder / "config.json", about | config)
    lines = [{"step": s, "tokens": 100 * s, "loss": 1 / s + 0.1, "loss_recon": 1 / s,
              "l0": 64 / s**0.3, "loss_sparsity": 0.1, "explained_variance": 1 - 1 / s,
              "dead": 0.0, **dict(log)}
             for s in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = {"version": 1, "sae_checksum": folder.name, "acts": acts, "d_sae": 64, "guards": []}
    if core is not None:
        found = [{"name": name, "level": level, "why": f"{name} because"} for name, level in guards]
        write_json(folder / "eval/core.json", said | {
            "name": "core", "metrics": CORE | core, "guards": found,
            "details": {"density": DENSITY}})
    for name, rest in (evals or {}).items():
        write_json(folder / f"eval/{name}.json", said | {"name": name, "metrics": {}} | rest)
    return folder


def make_control(root, kind, acts="tiny", **metrics):
    write_json(root / f"controls-{acts}/{kind}/eval/core.json", {
        "name": "core", "version": 1, "sae_checksum": kind, "acts": acts, "d_sae": 64, "guards": [],
        "metrics": metrics})


def everything(rng, shift=0.0):
    """Evaluations of one run that feed every plot, but core."""
    letters = [{"first_letter": c, "full_absorption_rate": float(rng.random() / 5),
                "num_split_features": 1} for c in "abcdefghij"]
    means = {"mean_full_absorption_score": 0.1 - shift + 0.01 * rng.random(),
             "mean_absorption_fraction_score": 0.05, "mean_num_split_features": 1.2}
    jl = {"error_sd": [0.2, 0.15, 0.1], "recall": [0.2, 0.5, 0.9]}
    pairs = {"jaccard": [0.1, 0.3 + shift, 0.5]}
    directions = {"correlation": 0.02, "mean_abs_cosine": 0.1, "effective_rank": 30.0,
                  "mean_max_cosine": 0.5, "coherence": 0.9}
    metrics = {k: v * (1 + 0.1 * float(rng.random())) for k, v in directions.items()}
    metrics |= {"hoyer": 0.8, "gini": 0.4, "condition_group": 3.0, "condition_active": 2.0}
    probing = {f"sae_top_{k}_test_accuracy": 0.7 + k / 100 + shift for k in (1, 5, 20)}
    model = {f"llm_top_{k}_test_accuracy": 0.65 + k / 100 for k in (1, 5, 20)}
    return {
        "absorption": {"metrics": means, "eval_result_details": letters},
        "geometry": {"metrics": metrics, "details": {
            "l0_of_rows": list(range(101)), "null": directions,
            "jl": {"dimensions": [32, 64, 128], "run": jl, "null": jl},
            "condition": {"group": {"null": {"median": 2.5}}},
            "pairs": {"rows": [256, 1024, 4096], "null": [0.01] * 3, "coactivation": pairs,
                      "preact": pairs}}},
        "sparse_probing": {"metrics": {**probing, **model},
                           "eval_result_details": [
                               {"dataset_name": "kind_results", **probing, **model}]},
        "forget": {"metrics": {"forget_added": 0.5 + shift, "retain_added": 0.01}},
        "stability": {"metrics": {"matched": 0.7, "again": 0.5, "best": 0.8, "null": 0.3}},
        "features": {"latents": [{
            "latent": 7, "rate": 0.01, "why": ["random"], "promotes": ["</script>"],
            "neighbours": [{"latent": 3, "cosine": 0.5}],
            "contexts": [{"activation": 2.5, "token": "<b>", "text": "a <<<b>>> c"}]}]},
    }


def read_data(root, primary="explained_variance"):
    runs, controls, curves = plot.read_runs(sorted(p.parent for p in root.glob("*/config.json")))
    return plot.Data(runs, controls, curves, plot.compare(runs, primary), primary)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def call_main(monkeypatch):
    """04_plot.py with these flags, in this process."""
    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["04_plot.py", *flags])
        plot.main()
    return call


# ---- tables --------------------------------------------------------------------------------------


def test_the_tables_numbers_are_those_of_the_files(root):
    values = {"baseline": [0.80, 0.80, 0.82], "topk": [0.84, 0.85, 0.89]}
    for variant, evs in values.items():
        for seed, ev in enumerate(evs):
            make_run(root, variant, seed, core={"explained_variance": ev},
                     acted={"revived": 10 + seed})
    table = plot.results_table(read_data(root), "tiny").set_index("run")
    mean, sd = np.mean(values["topk"]), np.std(values["topk"], ddof=1)
    assert table.EV["topk"] == f"{mean:.4f} ± {sd:.4f}"
    assert table["EV - baseline's"]["topk"].startswith("+0.0533 [") and table.seeds["topk"] == "3"
    assert table["its mechanism did"]["topk"] == "revived 11"
    assert table.parent["topk"] == "baseline" and table["s / M tokens"]["topk"] == "1000.0 ± 0.0"


def test_the_printed_table_fits_100_columns_whatever_the_names_and_caveats(root):
    for seed in range(3):
        make_run(root, "baseline", seed, core={"explained_variance": 0.8 + seed / 1000})
        for rule in ("decoder", "preact"):
            make_run(root, "topk_ortho_r1", seed, core={"explained_variance": 0.85 + seed / 900},
                     sets={"pair_fraction": 0.0001, "pair_rule": rule, "a_setting": "with_a_value"},
                     guards=[("penalty dominates", "caveat"), ("dead latents", "caveat")])
    lines = plot.printed_table(read_data(root), "tiny")
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 100
    assert "pair_rule=decoder" in text and "dead" in text and "+0.050 [" in text


@pytest.mark.parametrize("metric", ["probe_1", "absorption_fraction", "unlearning"])
def test_the_printed_table_fits_100_columns_whatever_the_metric(root, metric):
    result = everything(np.random.default_rng(0))
    evals = {name: result[name] for name in ("absorption", "sparse_probing")}
    evals["unlearning"] = {"metrics": {"unlearning_score": 0.1}}
    for seed in range(3):
        for variant in ("baseline", "adaptive_ortho_r10"):
            make_run(root, variant, seed, core={}, evals=evals)
    lines = plot.printed_table(read_data(root, metric), "tiny")
    assert max(map(len, lines)) <= 100
    assert plot.METRICS[metric].title.split()[0] in lines[0]


def test_guards_are_words_beside_the_verdict_and_said_in_full_below(root):
    make_run(root, "baseline", core={})
    make_run(root, "skip", core={}, guards=[("around the latents", "invalid")])
    make_run(root, "gated", core={}, guards=[("shrinkage", "caveat")])
    data = read_data(root)
    table = plot.results_table(data, "tiny").set_index("run")
    assert table.verdict["skip"] == "invalid (around the latents)"
    assert table.remarks["gated"] == "shrinkage"
    said = plot.notes(data, "tiny")
    assert "shrinkage: 1 run, as gated-s0 (shrinkage because)" in said
    assert "around the latents: 1 run, as skip-s0 (around the latents because)" in said


def test_one_plain_sentence_says_what_was_found(root):
    noise = [0.0003, -0.0002, 0.0001]
    for seed in range(3):
        for variant, effect in (("baseline", 0), ("topk", 0.05), ("batch_topk", 0.05),
                                ("gated", -0.05), ("prune", 0.0005)):
            ev = 0.8 + effect + (noise[seed] if effect else 0)
            make_run(root, variant, seed, core={"explained_variance": ev})
    make_run(root, "skip", core={})
    assert plot.summary(read_data(root), "tiny") == (
        "In EV, batch_topk and topk are better than the baseline; gated is worse; prune makes no "
        "difference that matters; 1 is undecided.")


def test_a_missing_evaluation_is_a_dash_and_never_a_zero(root):
    make_run(root, "baseline", core={"absorption": 0.3})
    make_run(root, "topk", core={})
    make_run(root, "gated")
    table = plot.results_table(read_data(root), "tiny").set_index("run")
    assert table["absorption"]["topk"] == "-" and table.EV["gated"] == "-"
    assert table.verdict["gated"] == "cannot tell (not evaluated)"


def test_an_invalid_evaluation_counts_for_nothing_and_the_rest_of_the_run_does(root):
    result = everything(np.random.default_rng(0))["sparse_probing"]
    result["guards"] = [{"name": "probes at chance", "level": "invalid", "why": "all at 0.5"}]
    make_run(root, "baseline", core={}, evals={"sparse_probing": result})
    runs = read_data(root).runs
    assert "probe_1" not in runs and runs.problem[0] == ""
    assert runs.caveats[0] == ["probes at chance"]


def test_sae_benchs_minus_one_and_results_of_older_weights_are_not_numbers(root):
    tpp = {"metrics": {"tpp_threshold_20_total_metric": -1}}
    scr = {"metrics": {"scr_metric_threshold_20": 0.3}, "sae_checksum": "old"}
    make_run(root, "topk", core={}, evals={"tpp": tpp, "scr": scr})
    runs = read_data(root).runs
    assert "tpp" not in runs and "scr" not in runs
    assert runs.caveats[0] == ["scr is of older weights"]


def test_the_models_own_probes_are_never_taken_for_the_saes(root):
    make_run(root, "topk", core={}, evals=everything(np.random.default_rng(0)))
    runs = read_data(root).runs
    assert runs.probe_1[0] == pytest.approx(0.71)
    assert runs["sparse_probing.llm_top_1_test_accuracy"][0] == pytest.approx(0.66)


def test_names_leave_out_the_usual_settings_and_the_heading_says_them(root):
    for variant in ("baseline", "gated", "topk"):
        make_run(root, variant, core={}, sets={"l0": 32.0})
    make_run(root, "skip", core={})
    make_run(root, "topk", core={}, sets={"l0": 64.0})
    data = read_data(root)
    assert list(data.runs.group) == ["baseline", "gated", "skip-l0=16.0", "topk", "topk-l0=64.0"]
    assert plot.heading(data, "tiny") == "tiny with l0=32.0"
    # so that the baseline of a sweep has its line in the plots
    axis = plot.PLOTS["mse_evolution"](data).axes[0]
    assert "baseline" in axis.get_legend_handles_labels()[1]


# ---- plots ---------------------------------------------------------------------------------------


FROM_THE_NOTES = """absorption_scores feature_splits final_losses letter_absorption training_curves
    sparsity_evolution feature_correlations feature_usage explained_variance_evolution mse_evolution
    l0_evolution l1_evolution kl_div_score_evolution ce_loss_score_evolution l2_ratio_evolution
    key_metrics_combined metrics_comparison absorption_rates probing_accuracy jl_quality
    sparsity_distributions condition_numbers alpha_ablation tau_fixed_adaptive absorption_efficiency
    pair_stability topk_ablation reactivation feature_stability unlearning pareto verdicts
    controls""".split()


def test_a_run_has_one_colour_in_a_figure_and_the_legend_says_it(root):
    """Also where one panel of the figure lacks a run that another has."""
    both = {"tau": 0.3, "pair_cos": 0.2}
    make_run(root, "baseline", core={})
    make_run(root, "contrastive_r2", core={}, log={"tau": 0.3})
    make_run(root, "topk_ortho_r1", core={}, log=both, settings=SETTINGS | {"ortho_tau": 0.1})
    axes = plot.PLOTS["tau_fixed_adaptive"](read_data(root)).axes
    seen = {(line.get_label(), line.get_color()) for axis in axes for line in axis.get_lines()}
    assert sorted(name for name, _ in seen) == ["baseline", "contrastive_r2", "topk_ortho_r1"]
    legend = next(axis.get_legend() for axis in axes if axis.get_legend())
    said = {(text.get_text(), line.get_color())
            for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert said == seen


def test_a_variant_has_one_colour_in_a_row_of_scatter_plots_and_the_legend_says_it(root):
    """Also where one panel of the row lacks a variant that another has."""
    for variant in ("baseline", "gated", "topk"):
        make_run(root, variant, core={"mcc": 0.5} if variant != "gated" else {})
    axes = plot.PLOTS["pareto"](read_data(root)).axes
    assert len(axes) == 3
    seen = [{bars.get_label(): bars.lines[0].get_color() for bars in axis.containers}
            for axis in axes]
    assert seen[2] == {name: seen[0][name] for name in ("baseline", "topk")}
    (legend,) = filter(None, [axis.get_legend() for axis in axes])
    assert [text.get_text() for text in legend.get_texts()] == ["baseline", "gated", "topk"]


def test_everything_that_the_notes_name_is_drawn_and_on_the_page(root, call_main, capsys,
                                                                 monkeypatch):
    monkeypatch.setitem(plot.STYLE, "savefig.dpi", 30)       # it is the drawing that takes time
    rng = np.random.default_rng(0)
    pairs = {"pair_cos": 0.2, "pair_over": 0.1}
    for seed in range(2):
        runs = [("baseline", None, ()), ("fixed_ortho", None, ()), ("revive", None, {"revived": 3}),
                ("topk_ortho_r1", None, pairs), ("topk_ortho_r2", None, {**pairs, "tau": 0.3})]
        runs += [("topk_ortho_r1", {"pair_fraction": f}, pairs) for f in (0.01, 0.1)]
        runs += [("fixed_ortho", {"fixed_ortho_weight": w}, ()) for w in (0.1, 1.0)]
        for variant, sets, log in runs:
            usual = {"ortho_tau": 0.1, "pair_fraction": 0.001, "fixed_ortho_weight": 0.03}
            folder = make_run(root, variant, seed, sets=sets, log=log, evals=everything(rng),
                              core={"explained_variance": 0.8 + rng.normal(0, 0.001)},
                              settings=SETTINGS | usual | (sets or {}))
            write_tensors(folder / "eval/rates.safetensors", {"rate": torch.linspace(0, 0.3, 64)})
    make_control(root, "pca", l0=16.0, explained_variance=0.75)
    call_main()
    assert capsys.readouterr().err == ""
    drawn = {p.stem for p in (root.parent / "plots").glob("*.png")}
    assert set(FROM_THE_NOTES) <= drawn
    page = (root.parent / "plots/report.html").read_text()
    assert page.count("data:image/png;base64,") == len(drawn)

    # the page needs no network, and no text of the data is code
    assert not re.search(r"(src|href)=['\"]?(http|//)", page) and page.count("</script>") == 2
    latents = json.loads(re.search(r'id="features">(.*)</script>', page)[1])
    assert latents["baseline-s0"][0]["promotes"] == ["</script>"]


def test_note_003s_plots_show_final_metrics_against_the_run_number(root):
    for run, ev in enumerate((0.70, 0.72, 0.74, 0.71)):
        for seed in range(2):
            variant = f"zscore_r{run}" if run else "baseline"
            make_run(root, variant, seed, core={"explained_variance": ev + seed / 100})
    axis = plot.PLOTS["explained_variance_evolution"](read_data(root)).axes[0]
    names = [t.get_text() for t in axis.get_xticklabels()]
    assert names == ["baseline", "zscore_r1", "zscore_r2", "zscore_r3"]
    means = next(line for line in axis.lines if len(line.get_ydata()) == 4)
    assert means.get_ydata() == pytest.approx([0.705, 0.725, 0.745, 0.715])


def test_curves_are_means_over_seeds_in_a_band(root):
    for seed, shift in enumerate((0.0, 0.2)):
        make_run(root, "baseline", seed, core={}, log={"dead": 0.1 + shift, "revived": 1})
    axis = plot.PLOTS["reactivation"](read_data(root)).axes[1]
    # the first twentieth of training is left out
    assert axis.lines[0].get_ydata() == pytest.approx([0.2] * 19) and len(axis.collections) == 1


def test_an_invalid_run_is_in_no_plot(root):
    make_run(root, "baseline", core={"explained_variance": 0.8})
    make_run(root, "topk", core={"explained_variance": 0.81})
    make_run(root, "skip", core={"explained_variance": 0.99}, guards=[("not sparse", "invalid")])
    data = read_data(root)
    for name in ("explained_variance_evolution", "pareto"):
        assert plot.PLOTS[name](data).axes[0].get_ylim()[1] < 0.9


def test_many_runs_are_a_panel_for_each_study_with_the_baseline_in_each(root):
    ideas = [f"{study}_r{i}" for study in ("zscore", "contrastive") for i in range(1, 8)]
    for variant in ["baseline", "topk", *ideas]:
        make_run(root, variant, core={})
    make_run(root, "zscore_r1", core={}, sets={"lr": 0.01})
    runs = read_data(root).valid
    shown = plot.panels(runs)
    titles = [title for title, _ in shown]
    assert titles == ["tiny: contrastive", "tiny: yardsticks", "tiny: zscore"]
    assert all(part.group.iloc[0] == "baseline" for _, part in shown)
    # swept settings have plots of their own
    assert "zscore_r1-lr=0.01" not in set(shown[2][1].group)
    assert "zscore_r1-lr=0.01" in set(plot.panels(runs, with_swept=True)[2][1].group)


def test_a_line_has_its_own_look_in_every_panel_however_many_there_are(root):
    for name in ["baseline", *(f"idea{i}" for i in range(20))]:
        make_run(root, name, core={})
    for name in ("baseline", "topk", "gated", "skip", "revive", "ortsae"):
        for l0 in (8.0, 16.0, 32.0):
            make_run(root, name, core={}, acts="other", sets={"l0": l0})
    data = read_data(root)
    with plot.plt.rc_context(plot.STYLE):
        figure = plot.PLOTS["training_curves"](data)
    drawn = {axis: [(line.get_color(), line.get_linestyle()) for line in axis.lines]
             for axis in figure.axes if axis.lines}
    assert len(drawn) == 8 and all(len(set(looks)) == len(looks) for looks in drawn.values())
    plot.plt.close(figure)


def test_panels_without_data_are_empty_and_a_swept_setting_is_in_one_plot(root):
    make_run(root, "baseline", core={"mcc": 0.5})
    make_run(root, "baseline", acts="other", core={})
    for value in (256, 512):
        make_run(root, "topk", core={}, sets={"pair_latents": value})
    data = read_data(root)
    figure = plot.PLOTS["pareto"](data)
    assert [axis.axison for axis in figure.axes].count(False) == 1
    figure = plot.by_run("mcc")(data)                        # one of two caches has it
    assert [axis.get_title() for axis in figure.axes] == ["tiny: all runs"]
    figure = plot.by_run("mcc", "l0")(data)
    assert sorted(axis.axison for axis in figure.axes) == [False, True, True, True]
    drawn = {name for name in ("topk_ablation", "alpha_ablation", "ablation")
             if plot.PLOTS[name](data)}
    assert drawn == {"ablation"}
    plot.plt.close("all")


def test_a_sentence_says_why_nothing_can_be_told(root):
    for seed in range(3):
        for name in ("baseline", "topk"):
            make_run(root, name, seed, core={"explained_variance": 0.8 + 0.01 * seed})
    data = read_data(root, "absorption_full")
    assert plot.summary(data, "tiny").endswith("Most often: not measured.")


def test_many_combinations_of_swept_settings_have_a_colour_each(root):
    for i in range(12):
        for value in (1, 2):
            make_run(root, "topk", core={}, sets={"lr": i / 100, "pair_latents": value})
    with plot.plt.rc_context(plot.STYLE):
        figure = plot.PLOTS["ablation"](read_data(root))
    axis = next(axis for axis in figure.axes if axis.get_xlabel() == "pair_latents")
    names = [name for name in axis.get_legend_handles_labels()[1] if name != "baseline"]
    colours = {tuple(line.get_color()) for line in axis.lines if len(line.get_xdata()) == 2}
    assert len(names) == 12 and len(colours) >= 12
    plot.plt.close(figure)


def test_runs_that_are_not_evaluated_by_core_are_no_traceback(root, call_main):
    for seed in range(3):
        make_run(root, "topk", seed, evals=everything(np.random.default_rng(seed)))
    call_main()
    plots = root.parent / "plots"
    assert (plots / "report.html").exists() and not (plots / "letter_absorption.png").exists()


def test_a_histogram_is_drawn_at_the_middles_of_its_bins(root):
    make_run(root, "topk", core={})
    curves = read_data(root).curves
    assert list(curves[curves.metric == "density.counts"].x) == [-2.5, -1.5]


def test_each_term_of_the_loss_has_a_colour(root):
    for name in ("baseline", "topk"):
        make_run(root, name, core={}, log={f"loss_term{i}": 0.1 for i in range(9)}.items())
    with plot.plt.rc_context(plot.STYLE):
        figure = plot.PLOTS["final_losses"](read_data(root))
    bars = figure.axes[0].containers
    assert len(bars) == 11 == len({bar[0].get_facecolor() for bar in bars})
    plot.plt.close(figure)


def test_swept_settings_are_drawn_in_the_order_of_their_values(root):
    for fraction in (0.1, 0.002, 0.03):
        make_run(root, "topk_ortho_r1", core={"explained_variance": fraction},
                 sets={"pair_fraction": fraction})
    axis = plot.PLOTS["topk_ablation"](read_data(root)).axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0.002", "0.03", "0.1"]
    assert axis.lines[0].get_ydata() == pytest.approx([0.002, 0.03, 0.1])


# ---- bad input -----------------------------------------------------------------------------------


def test_a_user_error_is_one_line_and_an_exit_code(root):
    root.mkdir()
    done = subprocess.run([sys.executable, ROOT / "04_plot.py", "runs/none"], capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "does not exist" in done.stderr


@pytest.mark.parametrize("flags, words", [
    (["--metric", "l0"], "invalid choice"),
    (["--out", "runs/baseline-s0/config.json"], "want a folder")])
def test_wrong_flags_are_refused(root, call_main, flags, words):
    make_run(root, "baseline", core={})
    with pytest.raises(plot.Refuse, match=words):
        call_main(*flags)


def test_a_damaged_or_incomplete_result_is_refused_by_name(root):
    make_run(root, "baseline", core={})
    broken = root / "baseline-s0/eval/core.json"
    write_json(broken, {"metrics": {}, "guards": [], "acts": "tiny", "d_sae": 64,
                        "sae_checksum": "baseline-s0"})
    with pytest.raises(plot.Refuse, match="lacks explained_variance or l0: "
                                          "03_eval.py --eval core --force"):
        read_data(root)
    broken.write_text("{}")
    with pytest.raises(plot.Refuse, match="core.json is damaged"):
        read_data(root)


def test_runs_that_were_never_evaluated_have_a_table_and_older_plots_go(root):
    make_run(root, "baseline")
    make_run(root, "topk", status="failed")
    data = read_data(root)
    assert "training failed" in "\n".join(plot.printed_table(data, "tiny"))
    plot.write_file(root / "pareto.png", b"of other runs")
    assert plot.draw_plots(data, root) == {}
    assert not (root / "pareto.png").exists()
    make_run(root, "topk", status="training")
    assert plot.summary(read_data(root), "tiny").startswith("In EV, 1 is undecided.")

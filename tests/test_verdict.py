"""Promises of 04_plot.py's verdicts: planted effects get the right word, chance gets none, and what was never measured is invalid."""
import html.parser
import importlib
import json
import math
import sys

import numpy as np
import pytest
from scipy import stats

from sae import ROOT, write_json

sys.path.insert(0, str(ROOT))
plot = importlib.import_module("04_plot")
SETTINGS = {"activation": "topk", "d_sae": 64, "l0": 4.0, "batch_size": 100, "lr": 1e-3}


def run(root, variant, seed=0, parents=("baseline",), steps=100, guards=(), contexts=100, checksum=None, log=(), config=(), bench=(), core=True, **measured):
    """A run folder with a core result, through the project's own writer; settings in `measured` (they are known by name) go into the config."""
    known = {**SETTINGS, "d_in": 32, "matryoshka_prefixes": 0, "ortho_alpha": 0.0, "zscore_threshold": False, "zscore_gain": 1.0, "zscore_start": 0.0}
    own = {k: measured.pop(f"set_{k}") for k in list(known) if f"set_{k}" in measured}
    d_in = own.pop("d_in", 32)
    folder = root / "-".join([variant, *(f"{k}={v}" for k, v in sorted(own.items())), f"s{seed}"])
    about = {"name": folder.name, "variant": variant, "parents": list(parents) if variant != "baseline" else [], "acts": "toy", "acts_checksum": "x",
             "seed": seed, "steps": steps, "d_in": d_in, "layer": 1, "hook_name": "blocks.1.hook_resid_post", "settings": SETTINGS | own, "status": "done",
             "sae_checksum": folder.name, "seconds": 10.0}
    write_json(folder / "config.json", about | dict(config))
    metrics = {"l0": 4.0, "explained_variance": 0.8, "dead": 0.0} | {k: v for k, v in measured.items() if k in plot.FINGERPRINT + ["absorption", "dead", "explained_variance_zero"]}
    said = {"sae_checksum": checksum or folder.name, "acts": "toy"}
    if core:
        write_json(folder / "eval" / "core.json", {**said, "version": 1, "contexts": contexts, "metrics": metrics,
                                                   "guards": [{"id": g, "level": "fatal", "message": "because"} for g in guards]})
    for name, result in dict(bench).items():
        write_json(folder / "eval" / f"{name}.json", {**said, **result})
    if log:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def seeds(root, variant, values, l0=4.0, seed_sd=0.02, **more):
    """One run a seed: its explained variance is a start that all variants of the seed share, plus the variant's own value."""
    for seed, value in enumerate(values):
        shared = np.random.default_rng(seed).normal(0, seed_sd)
        run(root, variant, seed, explained_variance=0.8 + shared + value, l0=l0, **more)


def verdicts(root, metric="explained_variance", whose="baseline", controls=False):
    """{row: verdict} of the runs under root, as main() has them."""
    runs, there = plot.find_runs(sorted(p.parent for p in root.glob("*/config.json")))
    found, tried = plot.compare(runs, metric)
    _, rows = plot.table(runs, there, found, metric)
    return {row[0]: found[row[0], whose, metric][1] for row in rows if (row[0], whose, metric) in found}


def fired(root):
    """{run name: fatal guards}"""
    runs, _ = plot.find_runs(sorted(p.parent for p in root.glob("*/config.json")))
    return {r.config["name"]: set(r.fatal) for r in runs}


# ---- planted answers ------------------------------------------------------------------------------------------------------------------------


def test_a_real_gain_is_better_and_a_real_loss_worse_to_baseline_and_parent(tmp_path):
    seeds(tmp_path, "baseline", [0.0] * 5)
    seeds(tmp_path, "good", [0.020, 0.022, 0.019, 0.021, 0.018])
    seeds(tmp_path, "bad", [0.0, 0.001, 0.002, -0.001, 0.001], parents=["good"])
    assert verdicts(tmp_path) == {"good": "better", "bad": "no difference seen"}
    assert verdicts(tmp_path, whose="parent") == {"good": "better", "bad": "worse"}


def test_the_table_shows_the_interval_and_both_tests(tmp_path):
    seeds(tmp_path, "baseline", [0.0] * 6)
    deltas = [0.020, 0.022, 0.019, 0.021, 0.018, 0.020]
    seeds(tmp_path, "good", deltas)
    seeds(tmp_path, "other", [0.001, -0.001, 0.002, -0.002, 0.0005, 0.0])
    runs, _ = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    found, _ = plot.compare(runs, "explained_variance")
    header, rows = plot.table(runs, [], found, "explained_variance")
    row, test = dict(zip(header, rows[1])), stats.ttest_1samp(deltas, 0)
    low, high = test.confidence_interval(0.95)
    assert row["EV - baseline"] == f"+0.0200 [{low:+.4f}, {high:+.4f}] (n=6)" and row["verdict"] == "better" and row["EV - parent"] == "the same"
    assert (row["p (Holm)"], row["p (sign-flip)"]) == (f"{2 * test.pvalue:.3g}", "0.0312")      # two were tried


def test_three_seeds_are_a_screening(tmp_path):
    seeds(tmp_path, "baseline", [0.0] * 3)
    seeds(tmp_path, "good", [0.020, 0.021, 0.019])
    assert verdicts(tmp_path) == {"good": "better (3 seeds: screening)"}


def test_a_null_is_no_difference_seen_where_the_interval_is_small_and_cannot_tell_where_it_is_not(tmp_path):
    seeds(tmp_path, "baseline", [0.0] * 5)
    seeds(tmp_path, "same", [0.001, -0.001, 0.002, -0.002, 0.0005])
    seeds(tmp_path, "noisy", [0.03, -0.03, 0.02, -0.025, 0.001])
    assert verdicts(tmp_path) == {"same": "no difference seen", "noisy": "cannot tell (5 seeds)"}


def test_one_seed_and_two_seeds_cannot_tell_however_large_the_difference(tmp_path):
    seeds(tmp_path, "baseline", [0.0] * 2)
    seeds(tmp_path, "one", [0.15])
    seeds(tmp_path, "two", [0.15, 0.1501])
    assert verdicts(tmp_path) == {"one": "cannot tell (1 seed)", "two": "cannot tell (2 seeds)"}


def test_seeds_that_change_nothing_are_no_evidence(tmp_path):
    for seed in range(5):
        run(tmp_path, "baseline", seed, explained_variance=0.8)
        run(tmp_path, "good", seed, explained_variance=0.85)
    assert verdicts(tmp_path) == {"good": "cannot tell (5 seeds)"}


def curve(l0):
    return 0.1 * math.log(l0 / 4)


def test_a_gain_that_a_higher_l0_fakes_is_refused_or_vanishes_on_the_baselines_curve(tmp_path):
    seeds(tmp_path, "baseline", [0.0] * 5)
    small = [0.001, -0.001, 0.0005, -0.0005, 0.0002]
    seeds(tmp_path, "denser", [curve(6) + e for e in small], l0=6.0)
    seeds(tmp_path, "beyond", [curve(12) + e for e in small], l0=12.0)
    seeds(tmp_path, "really", [curve(6) + 0.02 + e for e in small], l0=6.0)
    assert verdicts(tmp_path) == {"denser": "invalid (G16)", "beyond": "invalid (G16)", "really": "invalid (G16)"}
    seeds(tmp_path, "baseline", [curve(8)] * 5, l0=8.0, set_l0=8.0)
    assert verdicts(tmp_path) == {"denser": "no difference seen", "beyond": "invalid (G16)", "really": "better"}


def test_an_l0_within_five_percent_is_compared_as_it_is_and_the_rest_of_the_gap_is_named(tmp_path):
    seeds(tmp_path, "baseline", [0.0] * 5)
    seeds(tmp_path, "denser", [curve(4.16) + e for e in (1e-4, -1e-4, 2e-4, -2e-4, 0)], l0=4.16)
    runs, _ = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    found, tried = plot.compare(runs, "explained_variance")
    assert any("denser: its L0 is +4.0% of the baseline's" in line for line in plot.notes(runs, [], found, tried, "explained_variance"))
    seeds(tmp_path, "baseline", [curve(6)] * 5, l0=6.0, set_l0=6.0)           # with a curve the gap is gone
    assert verdicts(tmp_path) == {"denser": "no difference seen"}


def test_a_curve_is_of_runs_that_differ_in_l0_alone_and_of_one_parent(tmp_path):
    seeds(tmp_path, "baseline", [0.0] * 5)
    seeds(tmp_path, "baseline", [curve(8) - 0.2] * 5, l0=8.0, set_l0=8.0, set_lr=0.1)      # trained badly: not a point of the baseline's curve
    seeds(tmp_path, "idea", [curve(6)] * 5, l0=6.0)
    seeds(tmp_path, "both", [0.03, 0.033, 0.029, 0.031, 0.0305], l0=4.1, parents=["good", "idea"])
    seeds(tmp_path, "good", [0.0, 0.001, -0.001, 0.0, 0.0005], l0=4.0, parents=["baseline"])
    assert verdicts(tmp_path)["idea"] == "invalid (G16)"
    assert verdicts(tmp_path, whose="parent")["both"] == "better"            # than good at L0 4, not than a line from good to idea at L0 6


def test_a_baseline_of_another_width_or_length_is_none(tmp_path):
    seeds(tmp_path, "baseline", [0.0] * 5)
    seeds(tmp_path, "wide", [0.1] * 5, set_d_sae=128)
    seeds(tmp_path, "long", [0.1] * 5, steps=200)
    assert verdicts(tmp_path) == {"wide-d_sae=128": "invalid (G17)", "long": "cannot tell (no run of the same seed and length)"}


def test_an_untrained_run_is_invalid_though_it_absorbs_least_and_a_metric_that_a_control_wins_is_marked(tmp_path):
    for seed in range(5):
        run(tmp_path, "baseline", seed, absorption=0.5 + 0.01 * seed, mcc=0.7)
        run(tmp_path, "idle", seed, absorption=0.05, steps=30)
    write_json(tmp_path / "controls-toy" / "untrained" / "eval" / "core.json", {
        "acts": "toy", "sae_checksum": "u", "version": 1, "contexts": 100, "guards": [], "metrics": {"l0": 4.0, "explained_variance": 0.1, "absorption": 0.08}})
    runs, controls = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    found, tried = plot.compare(runs, "absorption")
    header, rows = plot.table(runs, controls, found, "absorption")
    assert fired(tmp_path)["idle-s0"] == {"G05"} and rows[1][header.index("verdict")] == "invalid (G05)"
    assert "absorption (true)*" in header and "EV" in header
    assert any("absorption (true) says nothing by itself here: the baseline has 0.520, control: untrained 0.080" in line
               for line in plot.notes(runs, controls, found, tried, "absorption"))


def test_a_benchmark_that_a_control_wins_is_marked_unless_its_result_is_of_other_weights(tmp_path):
    tpp = lambda value, **said: {"eval_result_metrics": {"tpp_metrics": {"tpp_threshold_20_total_metric": value}}, "eval_result_details": [{}], **said}
    run(tmp_path, "baseline", bench={"tpp": tpp(0.1)})
    for kind, made_of in (("random", "u"), ("pca", "older")):
        folder = tmp_path / "controls-toy" / kind / "eval"
        write_json(folder / "core.json", {"acts": "toy", "sae_checksum": "u", "version": 1, "contexts": 100, "guards": [], "metrics": {"l0": 4.0}})
        write_json(folder / "tpp.json", tpp(0.3, sae_checksum=made_of))
    runs, controls = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    assert {c.name: c.get("tpp") for c in controls} == {"control: pca": None, "control: random": 0.3}
    assert plot.uninformative(runs, controls)["tpp"][0] == [c for c in controls if c.name == "control: random"]


def test_duplicated_numbers_are_invalid_and_the_first_keeps_them(tmp_path):
    numbers = dict(explained_variance=0.81, mse=0.0123, cosine=0.91, l1=7.7, l2_ratio=0.95)
    run(tmp_path, "baseline", **numbers)
    run(tmp_path, "copy", **numbers)
    run(tmp_path, "copy", seed=1, **numbers)
    run(tmp_path, "near", **{**numbers, "mse": 0.0124})
    assert fired(tmp_path) == {"baseline-s0": set(), "copy-s0": {"G09"}, "copy-s1": {"G09"}, "near-s0": {"G09"}}      # 5 of 6 equal, L0 among them
    assert verdicts(tmp_path)["copy"] == "invalid (G09)"


def test_an_idea_that_is_switched_off_by_hand_may_equal_its_parent(tmp_path):
    numbers = dict(explained_variance=0.81, mse=0.0123, cosine=0.91, l1=7.7, l2_ratio=0.95)
    run(tmp_path, "baseline", **numbers)
    run(tmp_path, "idea", set_ortho_alpha=0.0, **numbers)
    runs, _ = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    assert [(r.variant, r.fatal, r.warned) for r in runs] == [("baseline", [], []), ("idea", [], ["G09"])]


def test_a_stale_evaluation_counts_for_nothing(tmp_path):
    seeds(tmp_path, "baseline", [0.0] * 5)
    seeds(tmp_path, "good", [0.05] * 5, checksum="of other weights")
    assert verdicts(tmp_path) == {"good": "invalid (evaluation is of older weights)"}
    letters = {"eval_result_metrics": {"mean": {"mean_full_absorption_score": 0.0}}, "eval_result_details": [{"first_letter": "a", "full_absorption_rate": 0.0}]}
    folder = run(tmp_path, "late", bench={"absorption": {**letters, "sae_checksum": "of other weights"}})
    late = plot.Run(folder)
    assert late.valid and late.get("absorption_full") is None and late.gaps["absorption"] == "stale"


# ---- letters and data sets ---------------------------------------------------------------------------------------------------------------------


def letters(rates, splits=2):
    details = [{"first_letter": chr(97 + i), "full_absorption_rate": r, "mean_absorption_fraction": r / 2, "num_full_absorption": round(100 * r),
                "num_probe_true_positives": 100, "num_split_features": splits} for i, r in enumerate(rates)]
    mean = float(np.mean(rates))
    return {"absorption": {"eval_result_metrics": {"mean": {"mean_full_absorption_score": mean, "mean_absorption_fraction_score": mean / 2,
                                                            "mean_num_split_features": splits}}, "eval_result_details": details}}


def test_absorption_that_falls_at_every_letter_is_better_and_one_that_falls_at_a_single_letter_is_not(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(5):
        base = 0.2 + 0.05 * rng.random(26)
        lucky = base.copy()
        lucky[0] -= 0.2                                                       # one letter carries all of it
        run(tmp_path, "baseline", seed, bench=letters(base))
        run(tmp_path, "good", seed, bench=letters(base * (0.5 + 0.02 * rng.random(26))))
        run(tmp_path, "lucky", seed, bench=letters(lucky + 0.002 * rng.random(26) - 0.001))
    assert verdicts(tmp_path, "absorption_full") == {"good": "better", "lucky": "no difference seen"}     # half of it: above the 25 % that matter; 4 %: below


def test_a_mean_of_letters_that_both_have_is_compared(tmp_path):
    both = letters([0.1, 0.2, 0.3])
    run(tmp_path, "baseline", bench=both)
    fewer = letters([0.05, 0.15])
    run(tmp_path, "idea", bench=fewer)
    runs, _ = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    d = plot.difference([r for r in runs if r.variant == "idea"], runs, next(m for m in plot.METRICS if m.key == "absorption_full"))
    assert d.deltas == pytest.approx([-0.05])                                 # of a and b, not 0.1 - 0.2


def test_sae_benchs_results_are_read_by_its_own_schema_and_the_llm_column_is_never_taken_for_the_saes(tmp_path):
    probing = {"eval_result_metrics": {"llm": {"llm_top_1_test_accuracy": 0.7}, "sae": {"sae_top_1_test_accuracy": 0.85, "sae_top_5_test_accuracy": 0.9}},
               "eval_result_details": [{"dataset_name": "x", "sae_top_1_test_accuracy": 0.85, "llm_top_1_test_accuracy": 0.7}]}
    scr = {"eval_result_metrics": {"scr_metrics": {"scr_metric_threshold_20": 0.3, "scr_dir1_threshold_20": 0.1}}, "eval_result_details": [{"dataset_name": "x"}]}
    tpp = {"eval_result_metrics": {"tpp_metrics": {"tpp_threshold_20_total_metric": -1}}, "eval_result_details": [{"dataset_name": "x"}]}
    r = plot.Run(run(tmp_path, "topk", bench={"sparse_probing": probing, "scr": scr, "tpp": tpp, "unlearning": {
        "eval_result_metrics": {"unlearning": {"unlearning_score": 0.02}}, "eval_result_details": [], "eval_result_unstructured": [{"multiplier": 1}]}}))
    assert (r.get("probe_1"), r.get("probe_5"), r.get("probe_20"), r.get("scr"), r.get("tpp"), r.get("unlearning")) == (0.85, 0.9, None, 0.3, None, 0.02)
    assert r.units["probe_1"] == {"x": 0.85} and r.gaps == {"absorption": "no eval"}
    for module, cls, path in (("absorption", "AbsorptionMeanMetrics", "absorption_full"), ("sparse_probing", "SparseProbingSaeMetrics", "probe_5"),
                              ("scr_and_tpp", "ScrMetrics", "scr"), ("scr_and_tpp", "TppMetrics", "tpp"), ("unlearning", "UnlearningMetrics", "unlearning")):
        fields = vars(importlib.import_module(f"sae_bench.evals.{module}.eval_output"))[cls].__dataclass_fields__
        assert plot.BENCHMARKS[path][1][-1] in fields


def test_an_evaluation_that_is_not_there_is_a_word_in_the_table_and_never_a_zero(tmp_path):
    run(tmp_path, "baseline", bench=letters([0.1, 0.2]))
    run(tmp_path, "bare")
    run(tmp_path, "void", bench={"absorption": {"eval_result_metrics": {"mean": {"mean_full_absorption_score": 0.0}}, "eval_result_details": []}})
    runs, _ = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    found, _ = plot.compare(runs, "explained_variance")
    header, rows = plot.table(runs, [], found, "explained_variance")
    assert {row[0]: row[header.index("absorption (full)")] for row in rows} == {"baseline": "0.1500", "bare": "no eval", "void": "not run (G11)"}
    assert "probe top-1" not in header and found["bare", "baseline", "absorption_full"][1] == "-"


def test_every_guard_that_a_line_in_the_table_names_is_said_in_full_below_it(tmp_path):
    run(tmp_path, "baseline", bench=letters([0.1, 0.2]))
    run(tmp_path, "void", guards=["G02"])
    runs, _ = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    found, tried = plot.compare(runs, "explained_variance")
    said = "\n".join(plot.notes(runs, [], found, tried, "explained_variance"))
    assert "void-s0 is invalid: G02 because." in said and "G14 warns at 1 run: baseline-s0: absorption is out of its scope: 2 letters, 64 latents." in said
    assert "1 variants and settings were tried" in said


def test_two_evaluations_that_warn_by_the_same_guard_are_both_heard(tmp_path):
    warns = lambda message: {"eval_result_details": [{}], "eval_result_metrics": {}, "guards": [{"id": "G14", "level": "warn", "message": message}]}
    for variant in ("baseline", "idea"):
        run(tmp_path, variant, bench={"scr": warns("out of scope: 20 letters"), "unlearning": warns("unlearning out of scope: no questions")})
    runs, _ = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    said = plot.notes(runs, [], *plot.compare(runs, "explained_variance"), "explained_variance")
    assert {"G14 warns at 2 runs: baseline-s0: out of scope: 20 letters.",
            "G14 warns at 2 runs: baseline-s0: unlearning out of scope: no questions."} <= set(said)


# ---- the notes' own figures ----------------------------------------------------------------------------------------------------------------------

GEMMA = dict(set_d_sae=2304, set_d_in=2304, set_batch_size=2048)
PROBES = {"sparse_probing": {"eval_result_metrics": {"sae": {f"sae_top_{k}_test_accuracy": 0.5 for k in (1, 2, 5, 10, 20, 50)}},
                             "eval_result_details": [{"dataset_name": "LabHC/bias_in_bios_class_set1"}]}}


def figures(ev=None, mse=None, cosine=None, l2=None, l0=0.0, l1=0.0, kl=None, ce=None):
    return dict(explained_variance=ev, mse=mse, cosine=cosine, l2_ratio=l2, l0=l0, l1=l1, kl_recovered=kl, ce_recovered=ce, explained_variance_zero=-0.78515625)


def ceiling(steps=48):
    return [{"step": s + 1, "loss": 1e6, "lr": 1e-4} for s in range(steps)]


def test_note_000_is_invalid_for_it_was_never_trained_and_evaluated_at_another_layer(tmp_path):
    vacuous = letters([0.0] * 24, splits=1)
    vacuous["absorption"]["sae_cfg_dict"] = {"hook_layer": 5, "hook_name": "blocks.5.hook_resid_post", "d_in": 2304, "d_sae": 2304}
    for n in range(11):
        run(tmp_path, "baseline" if n == 0 else f"contrastive_r{n}", steps=0, core=False, bench={**vacuous, **PROBES}, config={"layer": 19}, **GEMMA)
    assert set(map(frozenset, fired(tmp_path).values())) == {frozenset({"G05", "G10", "G12", "G13"})}
    assert all(v.startswith("invalid") for v in verdicts(tmp_path).values())


def test_note_001_is_invalid_silent_not_finite_stuck_at_its_ceiling_and_copied(tmp_path):
    stuck = figures(-1.671875, 70.5, -0.0032196, 0.69921875, 1150.32568359375, 5856.0, -0.5527950310559007, -0.5986842105263158)
    normed = figures(-0.80859375, 48.0, -0.003204345703125, 0.11181640625, 1154.838134765625, 920.0, -0.7142857142857143, -0.7828947368421053)
    rows = [("adaptive_ortho_r1", 0, figures(-0.78515625, 47.25, None, 0.0, 0.0, 0.0, -0.52795, -0.58553), ()),
            ("adaptive_ortho_r2", 48, figures(None), [{"step": s + 1, "loss": None, "lr": 3e-4} for s in range(48)]),
            ("adaptive_ortho_r3", 48, figures(-4.3125, 140.0, -0.00311279, 1.3984375, 1150.35205078125, 8256.0, -0.63975, -0.69079), ceiling()),
            *((f"adaptive_ortho_r{n}", 48, stuck, ceiling()) for n in (4, 5, 6, 7)), *((f"adaptive_ortho_r{n}", 48, normed, ceiling()) for n in (8, 9))]
    for name, steps, numbers, log in rows:
        run(tmp_path, name, steps=steps, log=log, **GEMMA, **numbers)
    untrained = {"G02", "G05", "G06", "G07", "G08", "G34"} - {"G34"}
    found = {name.removesuffix(f"-batch_size=2048-d_sae=2304-s0"): guards for name, guards in fired(tmp_path).items()}
    assert found["adaptive_ortho_r1"] == {"G01", "G02", "G03", "G04", "G05", "G34"} and found["adaptive_ortho_r2"] >= {"G01", "G04", "G05"}
    assert found["adaptive_ortho_r3"] == untrained | {"G34"} and found["adaptive_ortho_r4"] == untrained | {"G34"}
    assert all(found[f"adaptive_ortho_r{n}"] == untrained | {"G09", "G34"} for n in (5, 6, 7, 9)) and "G09" not in found["adaptive_ortho_r8"]
    assert all(v.startswith("invalid") for v in verdicts(tmp_path).values())


def test_note_002_is_invalid_for_no_step_was_taken(tmp_path):
    for n in range(1, 10):
        run(tmp_path, f"topk_ortho_r{n}", steps=0, core=False, **GEMMA)
    assert all(guards == {"G05"} for guards in fired(tmp_path).values())
    assert set(verdicts(tmp_path).values()) == {"invalid (G05)"}


def test_note_003_is_invalid_worse_than_the_mean_and_its_l0_was_set_by_the_rule(tmp_path):
    repeated = figures(-0.98046875, 53.0, None, 0.324, 77.038, 868.0, -0.503, -0.559)
    rows = [figures(-0.78515625, 47.25, None, 0.0, 0.0, 0.0, -0.5279, None), *[repeated] * 4, figures(-0.7890625, 47.5, None, 0.048, 56.639, 103.0, -0.360, -0.401),
            figures(-0.7890625, 47.5, None, 0.0354, 60.024, 78.5, -0.286, -0.329), figures(-0.7890625, 47.5, None, 0.0378, 64.132, 85.0, -0.342, -0.388),
            figures(-0.80078125, 47.75, None, 0.0918, 87.03, 239.0, -0.49, -0.546)]
    rule = {"set_zscore_threshold": True, "set_zscore_gain": 0.0, "set_zscore_start": 2.0}
    for n, numbers in enumerate(rows, 1):
        run(tmp_path, f"zscore_r{n}", steps=48, **GEMMA, **rule, **{k: v for k, v in numbers.items() if v is not None})
    runs, _ = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    found = {int(r.variant.rsplit("_r")[-1]): (set(r.fatal), set(r.warned)) for r in runs}
    assert found[1][0] == {"G01", "G02", "G03", "G05", "G34"} and found[2][0] == {"G02", "G05", "G34"}
    assert all(found[n][0] == {"G02", "G05", "G09", "G34"} for n in (3, 4, 5))
    assert all(found[n][0] == {"G02", "G03", "G05", "G34"} for n in (6, 7, 8, 9))
    assert {n for n in found if "G35" in found[n][1]} == {6, 7, 8}
    assert all(v.startswith("invalid") for v in verdicts(tmp_path).values())


def test_note_004_is_invalid_not_sparse_of_another_width_and_unlearning_was_never_run(tmp_path):
    run(tmp_path, "baseline", steps=4882, set_d_sae=65536, set_d_in=2304, set_batch_size=2048, set_lr=1e-4, log=[{"step": 4882, "loss": 7932.06, "lr": 3e-4}],
        explained_variance=0.824, cosine=0.945, mse=4.6875, l0=320.0, l1=1784.0,
        bench={"unlearning": {"eval_result_metrics": {"unlearning": {"unlearning_score": 0.0}}, "eval_result_details": []}})
    for n, numbers in {1: dict(explained_variance=0.918, l0=1782.0, l1=29184.0),
                       2: dict(explained_variance=0.902, mse=2.656, cosine=0.969, ce_recovered=0.995, l0=1734.95, l1=28544.0),
                       4: dict(explained_variance=0.902, mse=2.656, cosine=0.969, ce_recovered=0.995, l0=1735.0, l1=28544.0),
                       5: dict(explained_variance=0.902, mse=2.656, cosine=0.969, ce_recovered=0.995, l0=1735.52, l1=28544.0)}.items():
        run(tmp_path, f"hierarchical_r{n}", steps=4882, **GEMMA, **numbers)
    runs, _ = plot.find_runs(sorted(p.parent for p in tmp_path.glob("*/config.json")))
    found = {r.variant: (set(r.fatal), set(r.warned)) for r in runs}
    assert found == {"baseline": ({"G31"}, {"G11"}), "hierarchical_r1": ({"G08"}, set()), "hierarchical_r2": ({"G08"}, set()),
                     "hierarchical_r4": ({"G08", "G09"}, set()), "hierarchical_r5": ({"G08", "G09"}, set())}
    assert runs[0].get("unlearning") is None and all(v.startswith("invalid") for v in verdicts(tmp_path).values())


# ---- chance ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_seeds", [3, 5, 6, 8])
def test_of_1000_null_experiments_of_nine_variants_at_most_5_percent_have_a_verdict(n_seeds):
    rng = np.random.default_rng(n_seeds)
    baseline, variants = rng.normal(size=(1000, 1, n_seeds)), rng.normal(size=(1000, 9, n_seeds))
    called = plot.holm(plot.p_value(variants - baseline)) <= plot.LEVEL
    assert called.any(-1).sum() <= 50


@pytest.mark.parametrize("n_seeds", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", ["normal", "uniform", "standard_t"])
def test_a_single_comparison_is_wrong_in_less_than_5_percent_whatever_the_shape_of_the_differences(n_seeds, shape):
    draw = {"normal": lambda rng, size: rng.normal(size=size), "uniform": lambda rng, size: rng.uniform(-1, 1, size),
            "standard_t": lambda rng, size: rng.standard_t(3, size)}[shape]
    wrong = (plot.p_value(draw(np.random.default_rng(7), (40_000, n_seeds))) <= plot.LEVEL).mean()
    assert wrong < 0.05


@pytest.mark.parametrize("n_seeds", [3, 5, 6, 8])
@pytest.mark.parametrize("tried", [1, 9])
def test_a_difference_as_large_as_promised_is_called_in_80_percent(n_seeds, tried):
    rng = np.random.default_rng(n_seeds)
    deltas = rng.normal(size=(1000, tried, n_seeds))
    deltas[:, 0] += plot.detectable(n_seeds, tried)
    assert (plot.holm(plot.p_value(deltas))[:, 0] <= plot.LEVEL).mean() >= 0.8


def test_the_sign_flip_test_vetoes_what_only_a_normal_distribution_would_allow():
    deltas = [1.0, 1.1, 0.9, 1.0, 1.05, -0.02]                                # t: p < 0.01; two of 64 flips, and two more, are as far from 0
    assert stats.ttest_1samp(deltas, 0).pvalue < 0.01 and plot.sign_flip(deltas) == 4 / 64 and plot.p_value(deltas) == 4 / 64


# ---- the tests themselves, against known values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 30])
def test_students_t_is_scipys(df):
    for t in (0.0, 0.3, 2.5, 12.0):
        assert plot.t_tail(t, df) == pytest.approx(2 * stats.t.sf(t, df), abs=1e-12)
    assert plot.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df))


def test_the_interval_and_the_p_value_are_scipys():
    deltas = [0.3, -0.1, 0.5, 0.2]
    theirs = stats.ttest_1samp(deltas, 0)
    assert plot.t_interval(deltas) == pytest.approx((np.mean(deltas), *theirs.confidence_interval(0.95)))
    assert plot.t_test(deltas) == pytest.approx(theirs.pvalue) and plot.t_test([[0.3]]) == 1.0


def test_sign_flips_are_counted_exactly():
    theirs = stats.permutation_test(([0.3, -0.1, 0.5, 0.2, 0.05, 0.4],), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert plot.sign_flip([0.3, -0.1, 0.5, 0.2, 0.05, 0.4]) == pytest.approx(theirs.pvalue)
    assert [plot.sign_flip(np.ones(n)) for n in (1, 3, 5, 6)] == [1.0, 0.25, 0.0625, 0.03125]


def test_holm_is_the_textbooks():
    assert plot.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert plot.holm([[0.5, 0.9], [0.01, 0.02]]) == pytest.approx(np.array([[1.0, 1.0], [0.02, 0.02]]))


def test_wilsons_interval_of_a_letter_is_scipys():
    evaluation = importlib.import_module("03_eval")
    for hits, total in ((0, 20), (16, 455), (455, 455), (122, 2803)):
        low, high = stats.binomtest(hits, total).proportion_ci(method="wilson")
        assert evaluation.wilson(hits, total) == pytest.approx([low, high], abs=1e-4)


def test_the_bootstrap_covers_what_varies():
    assert plot.bootstrap(np.full((5, 26), 0.3)) == pytest.approx((0.3, 0.3))
    rng = np.random.default_rng(0)
    low, high = plot.bootstrap(rng.normal(size=(1, 400)))                     # one seed: the data sets' spread alone, 1.96 / 20
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_the_limits_are_those_of_the_evaluation():
    evaluation = importlib.import_module("03_eval")
    for name in ("UNTRAINED_TOKENS", "NOT_SPARSE", "NOT_SPARSE_SMALL", "SMALL"):
        assert getattr(plot, name) == getattr(evaluation, name)


# ---- figures ------------------------------------------------------------------------------------------------------------------------------------


def drawn(root, draw, monkeypatch):
    """What `draw(caches, looks, path)` makes of the runs under root: (its answer, the figure)."""
    kept = []
    monkeypatch.setattr(plot, "save", lambda figure, path: (plot.plt.close(figure), kept.append(figure)))
    runs, there = plot.find_runs(sorted(p.parent for p in root.glob("*/config.json")))
    caches = {"toy": (runs, there)}
    return draw(caches, {"toy": plot.compare(runs, "explained_variance")}, plot.looks(runs)), kept[0] if kept else None


def test_an_invalid_run_is_named_in_the_forest_plot_and_in_no_scale(tmp_path, monkeypatch):
    seeds(tmp_path, "baseline", [0.0] * 5)
    seeds(tmp_path, "good", [0.020, 0.022, 0.019, 0.021, 0.018])
    seeds(tmp_path, "void", [9.0] * 5, guards=["G03"])
    _, figure = drawn(tmp_path, lambda caches, compared, looks: plot.draw_verdicts(caches, compared, "explained_variance", "x"), monkeypatch)
    axis = figure.axes[0]
    assert axis.get_xlim()[1] < 0.1 and [t.get_text() for t in axis.get_yticklabels()] == ["good", "void"]
    assert {"better", "invalid (G03)"} <= {t.get_text() for t in axis.texts}


def test_a_swept_setting_is_recognised_and_drawn_in_order_with_its_seeds(tmp_path, monkeypatch):
    nothing, _ = drawn_after(tmp_path, monkeypatch, [])
    assert "setting was swept" in nothing
    _, figure = drawn_after(tmp_path, monkeypatch, [0.3, 0.01, 1e-5, 0.0])
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "1e-05", "0.01", "0.3"] and axis.get_xlabel() == "ortho_alpha"
    mean = axis.containers[0].lines[0].get_ydata()
    assert len(mean) == 4 and list(mean) == sorted(mean)                      # planted: the more, the better
    assert len(figure.axes) == 4


def drawn_after(root, monkeypatch, values):
    seeds(root, "baseline", [0.0] * 3)
    for value in values:
        seeds(root, "ortho", [value / 10] * 3, set_ortho_alpha=value)
    for l0 in (4.0, 8.0):
        seeds(root, "topk", [curve(l0)] * 3, l0=l0, set_l0=l0)                # the Pareto plot's business
    return drawn(root, lambda caches, compared, looks: plot.draw_ablation(caches, looks, "x"), monkeypatch)


# ---- report.html ----------------------------------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a browser would see: the tags with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.cells, self.open = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open = tag
        if tag == "script":
            self.scripts.append("")
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open == "script":
            self.scripts[-1] += data
        if self.open == "td":
            self.cells[-1] += data


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)> & <<token>> '\"\u2028"


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    seeds(runs, "baseline", [0.0] * 3)
    seeds(runs, "good", [0.020, 0.022, 0.019])
    seeds(runs, "void", [0.5] * 3, guards=["G02"])
    run(runs, "odd", 0, config={"parents": [EVIL], "name": EVIL}, explained_variance=0.7)
    for name, said in (("good-s0", "good-s0"), ("good-s1", "of other weights"), ("odd-s0", "odd-s0")):
        write_json(runs / name / "eval" / "features.json", {"sae_checksum": said, "latents": [
            {"latent": 3, "rate": 0.01, "why": ["random"], "promotes": [EVIL], "neighbours": [{"latent": 1, "cosine": 0.5}],
             "contexts": [{"activation": 1.5, "token": EVIL, "text": f"before <<{EVIL}>> after"}]}]})
    monkeypatch.setattr(sys, "argv", ["04_plot.py"])
    plot.main()
    return (tmp_path / "plots" / "report.html").read_text()


def test_the_page_needs_no_network_and_no_text_in_it_is_code(page):
    seen = Page(page)
    for tag, attributes in seen.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert all(not name.startswith("on") for name in attributes)
        assert all(attributes[name].startswith("data:image/png;base64,") for name in ("src", "href", "srcset", "action") if name in attributes)
    assert "http:" not in page and "https:" not in page and "@import" not in page and "url(" not in page
    assert len(seen.scripts) == 2 and sum(tag == "img" for tag, _ in seen.tags) >= 4
    assert EVIL in seen.cells                      # as text
    latents = json.loads(seen.scripts[0])
    assert sorted(latents) == [EVIL, "good-s0"] and latents["good-s0"][0]["contexts"][0]["token"] == EVIL      # a stale one is not shown


def test_the_page_has_the_table_the_plots_and_what_keeps_invalid_runs_out_of_its_ranking(page):
    seen = Page(page)
    classes = [attributes["class"] for tag, attributes in seen.tags if tag == "tr" and "class" in attributes]
    assert classes[:4] == ["", "better", "", "invalid"] and "invalid (G02)" in seen.cells
    assert {attributes["alt"] for tag, attributes in seen.tags if tag == "img"} >= {"verdicts", "pareto"}
    assert "<li>ablation: no " in page and 'a.className === "invalid"' in page


def test_the_latents_of_the_most_absorbed_letters_are_browsed(tmp_path):
    evaluation = importlib.import_module("03_eval")
    found = letters([0.0, 0.3, 0.1])
    found["absorption"]["letters"] = [{"letter": letter, "main_latent": latent} for letter, latent in (("a", 5), ("b", 7), ("c", 9))]
    folder = run(tmp_path, "topk", bench=found)
    of = lambda said: evaluation.absorbed_latents(evaluation.Run(folder, None, {"sae_checksum": said}))
    assert of("topk-s0") == [7, 9] and of("other") == []

"""Promises of 04_plot.py's verdicts: planted effects get the right word, chance and L0 none."""
import importlib
import math
import sys

import numpy as np
import pytest
from scipy import stats
from test_plot import make_control, make_run, plot, read_data

from sae import ROOT, read_json, write_json

sys.path.insert(0, str(ROOT / "tests" / "bench"))
nulls = importlib.import_module("nulls")
# the seeds' noise
SMALL = [0.0003, -0.0003, 0.0002, -0.0002, 0.0001, -0.0001, 0.00015, -0.00015]


def curve(l0):
    """Explained variance against L0, with the slope measured on the embedded model."""
    return 0.8 + 0.066 * math.log(l0 / 16)


def plant(root, variant, effects, l0=16.0, metric="explained_variance", level=None, **more):
    """A run a seed: what its seed shares, on the curve over L0, plus the variant's effect."""
    for seed, effect in enumerate(effects):
        shared = np.random.default_rng(seed).normal(0, 0.003)
        value = (curve(l0) if level is None else level) + shared + effect
        make_run(root, variant, seed, core={"l0": l0, metric: value}, **more)


def judge(root, metric="explained_variance", whose="baseline"):
    """{group: row of `found`} of the runs under root."""
    found = read_data(root, metric).found
    rows = found[(found.whose == whose) & (found.metric == metric)]
    return {row.group: row for _, row in rows.iterrows()}


def verdicts(root, *args, **more):
    return {group: row.verdict for group, row in judge(root, *args, **more).items()}


# ---- the rule ------------------------------------------------------------------------------------


def test_a_gain_above_the_margin_is_better_and_a_loss_is_worse(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 5)
    plant(tmp_path, "topk", [0.02 + e for e in SMALL[:5]])
    plant(tmp_path, "gated", [-0.02 + e for e in SMALL[:5]])
    plant(tmp_path, "skip", SMALL[:5])
    assert verdicts(tmp_path) == {"topk": "better (5 seeds)", "gated": "worse (5 seeds)",
                                  "skip": "no difference seen (5 seeds)"}


def test_a_difference_that_is_certain_and_too_small_to_matter_is_never_called(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 8)
    plant(tmp_path, "topk", [0.006 + e for e in SMALL])
    row = judge(tmp_path)["topk"]
    assert row.holm < 1e-6 and row.verdict == "no difference seen (8 seeds)"


def test_a_difference_that_may_or_may_not_matter_cannot_be_told(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 5)
    plant(tmp_path, "topk", [0.03, -0.02, 0.025, -0.015, 0.02])
    assert verdicts(tmp_path) == {"topk": "cannot tell (5 seeds)"}


@pytest.mark.parametrize("seeds, said", [(1, "1 seed"), (2, "2 seeds")])
def test_fewer_than_three_seeds_tell_nothing_however_large_the_difference(tmp_path, seeds, said):
    plant(tmp_path, "baseline", [0.0] * seeds)
    plant(tmp_path, "topk", [0.15, 0.1501][:seeds])
    assert verdicts(tmp_path) == {"topk": f"cannot tell ({said})"}


def test_seeds_that_change_nothing_are_no_evidence(tmp_path):
    for seed in range(5):
        make_run(tmp_path, "baseline", seed, core={"explained_variance": 0.8})
        make_run(tmp_path, "topk", seed, core={"explained_variance": 0.85})
    assert verdicts(tmp_path) == {"topk": "cannot tell (5 seeds)"}
    for seed in range(5):
        make_run(tmp_path, "topk", seed, core={"explained_variance": 0.8})
    assert verdicts(tmp_path) == {"topk": "no difference seen (5 seeds)"}        # the same bits
    assert plot.call(0.0, 0.0, 0.0, 1.0, worth=0.0) == "no difference seen"      # 0 in all runs


def test_less_is_better_where_the_metric_says_so_and_its_margin_is_a_share(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 5, metric="kl_sae", level=1.0)
    plant(tmp_path, "topk", [-0.2 + e for e in SMALL[:5]], metric="kl_sae", level=1.0)
    plant(tmp_path, "gated", [-0.05 + e for e in SMALL[:5]], metric="kl_sae", level=1.0)
    said = {"topk": "better (5 seeds)", "gated": "no difference seen (5 seeds)"}
    assert verdicts(tmp_path, "kl_sae") == said


def test_the_interval_and_p_are_scipys_and_p_is_doubled_at_every_number_of_seeds():
    rng = np.random.default_rng(0)
    for n in (3, 5, 8, 12):
        mine, theirs = rng.normal(0.8, 1, n), rng.normal(0, 1, n)
        mean, low, high, p = plot.mean_difference(mine, theirs)
        test = stats.ttest_1samp(mine - theirs, 0)
        assert p == pytest.approx(min(1, 2 * test.pvalue))
        assert mean == pytest.approx((mine - theirs).mean())
        assert (low, high) == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_seeds_that_are_not_paired_are_compared_by_welchs_test(tmp_path):
    mine, theirs = [0.84, 0.85, 0.83], [0.80, 0.79, 0.82]
    for seed, (a, b) in enumerate(zip(mine, theirs)):
        make_run(tmp_path, "contrastive_r8", seed, core={"explained_variance": a}, paired=False)
        make_run(tmp_path, "baseline", seed, core={"explained_variance": b})
    welch = stats.ttest_ind(mine, theirs, equal_var=False)
    row = judge(tmp_path)["contrastive_r8"]
    assert row.p == pytest.approx(2 * welch.pvalue)
    assert row.p != pytest.approx(2 * stats.ttest_rel(mine, theirs).pvalue)
    assert row.low == pytest.approx(welch.confidence_interval(0.95).low)


def test_holm_is_the_textbooks():
    assert plot.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_each_variant_that_was_tried_makes_the_others_harder_to_call(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3)
    plant(tmp_path, "topk", [0.019, 0.021, 0.02])
    alone = judge(tmp_path)["topk"]
    for name in ("gated", "skip", "prune"):
        plant(tmp_path, name, SMALL[:3])
    together = judge(tmp_path)["topk"]
    assert together.p == alone.p and together.holm == pytest.approx(4 * alone.holm)


# ---- the same L0 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline_l0", [16.3, 16.7])
@pytest.mark.parametrize("metric, slope", [("explained_variance", 0.066), ("ce_recovered", 0.03),
                                           ("kl_sae", -0.02)])
def test_an_l0_gap_alone_is_never_called(tmp_path, baseline_l0, metric, slope):
    """Issue 17: the baseline at L0 16.3 and 16.7 against "variants" that are the baseline at 16."""
    level = {"explained_variance": 0.8, "ce_recovered": 0.9, "kl_sae": 0.1}[metric]
    for name, l0 in (("baseline", baseline_l0), ("copy", 16.0)):
        noise = SMALL[:6] if name == "copy" else [0.0] * 6
        plant(tmp_path, name, noise, l0, metric, level=level + slope * math.log(l0 / 16))
    row = judge(tmp_path, metric)["copy"]
    assert row.verdict == "no difference seen (6 seeds)" and abs(row["mean"]) > 0.0003


def test_a_higher_l0_is_taken_out_where_the_baseline_has_runs_on_both_sides(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3)
    plant(tmp_path, "baseline", [0.0] * 3, l0=32.0, sets={"l0": 32.0})
    plant(tmp_path, "same", SMALL[:3], l0=22.0)
    plant(tmp_path, "topk", [0.02 + e for e in SMALL[:3]], l0=22.0)
    rows = judge(tmp_path)
    assert rows["same"]["mean"] == pytest.approx(np.mean(SMALL[:3]), abs=1e-6)      # in log L0
    assert rows["same"].verdict == "no difference seen (3 seeds)"
    assert rows["topk"].verdict == "better (3 seeds)"


def test_nothing_is_interpolated_across_more_than_a_factor_of_two(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3, l0=8.0, sets={"l0": 8.0})
    plant(tmp_path, "baseline", [0.0] * 3, l0=32.0, sets={"l0": 32.0})
    plant(tmp_path, "topk", [0.05 + e for e in SMALL[:3]])
    assert verdicts(tmp_path) == {"topk": "cannot tell (its L0 differs)"}


@pytest.mark.parametrize("l0, said", [
    (16.7, "better (3 seeds)"), (17.0, "cannot tell (its L0 differs)"),
    (15.3, "better (3 seeds)"), (12.0, "cannot tell (its L0 differs)")])
def test_outside_the_other_runs_an_l0_counts_within_five_percent(tmp_path, l0, said):
    """And nothing is extrapolated."""
    plant(tmp_path, "baseline", [0.0] * 3)
    plant(tmp_path, "baseline", [0.0] * 3, l0=16.05, sets={"l0": 16.05})
    plant(tmp_path, "topk", [0.05 + e for e in SMALL[:3]], l0=l0)
    assert verdicts(tmp_path) == {"topk": said}


def test_a_curve_over_l0_is_of_runs_that_differ_in_nothing_else(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3)
    plant(tmp_path, "baseline", [-0.2] * 3, l0=24.0, sets={"l0": 24.0, "lr": 0.1})  # badly
    plant(tmp_path, "topk", [0.05] * 3, l0=20.0)
    assert verdicts(tmp_path) == {"topk": "cannot tell (its L0 differs)"}


def test_runs_that_differ_in_another_setting_are_not_interpolated_between(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3, l0=15.4, sets={"lr": 0.01})
    plant(tmp_path, "baseline", [-0.2] * 3, l0=16.2, sets={"lr": 0.1})
    plant(tmp_path, "topk", SMALL[:3])
    assert judge(tmp_path)["topk"]["mean"] == pytest.approx(0.2, abs=0.002)      # the nearest L0's


def test_invalid_seeds_do_not_choose_the_group_that_is_nearest_in_l0(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 7, l0=15.4, sets={"lr": 0.01})
    plant(tmp_path, "baseline", [-0.2] * 7, l0=16.2, sets={"lr": 0.1})
    plant(tmp_path, "topk", SMALL[:7])
    for seed in range(4):
        make_run(tmp_path, "topk", seed, core={"l0": 0.0}, void=["no latent fires"])
    assert judge(tmp_path)["topk"]["mean"] == pytest.approx(0.2, abs=0.002)


def test_each_seed_is_compared_with_the_same_settings(tmp_path):
    for seed, (a, b) in enumerate([(15.9, 16.2), (16.3, 16.1), (15.9, 16.2)]):
        for lr, l0, value in ((0.01, a, 0.7), (0.1, b, 0.8)):
            make_run(tmp_path, "baseline", seed, sets={"lr": lr},
                     core={"l0": l0, "explained_variance": value})
        make_run(tmp_path, "topk", seed, core={"l0": 16.0, "explained_variance": 0.85 + seed / 1e4})
    row = judge(tmp_path)["topk"]
    assert row["mean"] == pytest.approx(0.15, abs=0.01)
    assert max(row.deltas) - min(row.deltas) < 0.02


# ---- with whom -----------------------------------------------------------------------------------


def test_only_runs_of_the_same_seed_length_and_width_are_compared(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3)
    plant(tmp_path, "wide", [0.1] * 3, sets={"d_sae": 128})
    plant(tmp_path, "long", [0.1] * 3, steps=200)
    plant(tmp_path, "other", [0.1] * 3, acts_checksum="b")
    for seed in (7, 8, 9):
        make_run(tmp_path, "seeds", seed, core={})
    none = "cannot tell (no run of the same length on the same data)"
    assert verdicts(tmp_path) == {"wide-d_sae=128": "cannot tell (another width)", "long": none,
                                  "other": none, "seeds": "cannot tell (no valid run of the same "
                                                          "seed)"}


def test_a_baseline_that_is_lost_is_not_replaced_by_one_of_other_settings(tmp_path):
    """What an idea on ReLU is held against says nothing of the same idea on JumpReLU."""
    sets = {"activation": "jumprelu"}
    for name in ("baseline", "topk", "gated"):
        plant(tmp_path, name, [0.0] * 3)
    plant(tmp_path, "baseline", [0.05] * 3, sets=sets)
    plant(tmp_path, "skip", [0.05 + e for e in SMALL[:3]], sets=sets)
    name = "skip-activation=jumprelu"
    row = judge(tmp_path)[name]
    assert row.verdict == "no difference seen (3 seeds)"
    assert row.against == "baseline-activation=jumprelu"
    lost = tmp_path / "baseline-activation=jumprelu-s2/config.json"
    write_json(lost, read_json(lost) | {"status": "training"})
    row = judge(tmp_path)[name]
    assert (row.used, dict(row.lost)) == (2, {"no valid run of the same seed": 1})


def test_another_baseline_changes_no_verdict_of_runs_that_the_plain_one_fits_as_well(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3, l0=16.2)
    plant(tmp_path, "batch_topk", [0.05 + e for e in SMALL[:3]], sets={"activation": "batch_topk"})
    for _ in range(2):
        (row,) = [row for name, row in judge(tmp_path).items() if name.startswith("batch_topk")]
        assert (row.verdict, row.against) == ("better (3 seeds)", "")
        plant(tmp_path, "baseline", [0.05] * 3, sets={"activation": "jumprelu"})   # a nearer L0


def test_a_copied_run_is_no_seed_of_its_own(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 4)
    plant(tmp_path, "topk", [0.05 + e for e in SMALL[:4]])
    original = read_json(tmp_path / "topk-s0/config.json")["sae_checksum"]
    for file in ("config.json", "eval/core.json"):
        path = tmp_path / "topk-s3" / file
        write_json(path, read_json(path) | {"sae_checksum": original})
    assert verdicts(tmp_path) == {"topk": "better (3 of 4 seeds)"}


def test_an_idea_that_never_acted_is_called_so(tmp_path):
    for name, effect, weights in (("baseline", 0, "a"), ("topk", 0.05, "b"), ("revive", 0, "a")):
        plant(tmp_path, name, [effect + e for e in SMALL[:3]])
        for seed in range(3):
            path = tmp_path / f"{name}-s{seed}/config.json"
            write_json(path, read_json(path) | {"weights_checksum": f"{weights}{seed}"})
    assert verdicts(tmp_path)["revive"] == "no difference seen (3 seeds)"
    remarks = plot.results_table(read_data(tmp_path), "tiny").set_index("run").remarks
    assert remarks.to_dict() == {"baseline": "", "topk": "", "revive": "never acted"}


def test_guards_that_differ_between_seeds_are_each_named_once(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3)
    for seed, guards in enumerate((["void"], ["void"], ["untrained"])):
        make_run(tmp_path, "topk", seed, core={}, guards=[(name, "invalid") for name in guards])
    assert verdicts(tmp_path) == {"topk": "invalid (void, untrained)"}


def test_runs_of_another_batch_size_or_base_are_not_compared(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3, base_checksum="one")
    plant(tmp_path, "topk", [0.1] * 3, sets={"batch_size": 64}, base_checksum="one")
    plant(tmp_path, "gated", [0.1] * 3, base_checksum="two")
    plant(tmp_path, "skip", [0.05 + e for e in SMALL[:3]], base_checksum="one")
    plant(tmp_path, "older", [0.05 + e for e in SMALL[:3]])              # its base is not known
    assert verdicts(tmp_path) == {"topk-batch_size=64": "cannot tell (another batch size)",
                                  "gated": "cannot tell (trained by another sae.py)",
                                  "skip": "better (3 seeds)", "older": "better (3 seeds)"}


def test_a_seed_that_ran_other_code_is_out(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 4)
    plant(tmp_path, "topk", [0.05 + e for e in SMALL[:4]], code_checksum="old")
    make_run(tmp_path, "topk", 0, core={"explained_variance": 0.1}, code_checksum="new")
    row = judge(tmp_path)["topk"]
    assert row.verdict == "better (3 of 4 seeds)"
    assert list(row.lost) == ["other code than its other seeds: train them again"]
    make_run(tmp_path, "topk", 1, core={"explained_variance": 0.1}, code_checksum="new")
    assert verdicts(tmp_path)["topk"].startswith("cannot tell (other code")    # two against two


def test_a_metric_measured_on_other_data_or_otherwise_is_not_compared(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3)
    plant(tmp_path, "topk", [0.05 + e for e in SMALL[:3]])
    assert verdicts(tmp_path) == {"topk": "better (3 seeds)"}
    for path in tmp_path.glob("topk-s*/eval/core.json"):
        write_json(path, read_json(path) | {"val": "another"})
    assert verdicts(tmp_path)["topk"].startswith("cannot tell (not evaluated alike")


def test_a_variant_is_also_compared_with_the_row_before(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3)
    plant(tmp_path, "latent_l1", [0.05 + e for e in SMALL[:3]])
    plant(tmp_path, "hierarchical_r2", [0.02 + e for e in SMALL[:3]])
    plant(tmp_path, "hierarchical_r3", [0.02 - e for e in SMALL[:3]], parent="hierarchical_r2")
    row = judge(tmp_path, whose="parent")["hierarchical_r3"]
    assert row.other == "hierarchical_r2"                    # not the mixin
    assert row.verdict == "no difference seen (3 seeds)"


def test_a_parent_that_was_not_run_or_is_invalid_is_named_and_no_other_is_taken(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3)
    plant(tmp_path, "latent_l1", [0.05] * 3)
    plant(tmp_path, "hierarchical_r3", SMALL[:3], parent="hierarchical_r2")
    said = judge(tmp_path, whose="parent")["hierarchical_r3"].verdict
    assert said == "cannot tell (hierarchical_r2 was not run)"
    plant(tmp_path, "hierarchical_r2", [0.0] * 3, guards=[("untrained", "invalid")])
    said = judge(tmp_path, whose="parent")["hierarchical_r3"].verdict
    assert said == "cannot tell (hierarchical_r2 is out: untrained)"


# ---- what is left out ----------------------------------------------------------------------------


def test_seeds_that_were_lost_are_counted_in_the_verdict(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 8)
    plant(tmp_path, "topk", [0.02 + e for e in SMALL])
    make_run(tmp_path, "topk", 0, core={"l0": 0.0}, void=["no latent fires"])
    make_run(tmp_path, "topk", 1, core={"l0": 20.0})
    make_run(tmp_path, "topk", 2, core={}, status="failed")
    row = judge(tmp_path)["topk"]
    assert row.verdict == "better (5 of 8 seeds)"
    assert dict(row.lost) == {"invalid: void": 1, "its L0 differs": 1, "training failed": 1}


def test_an_invalid_run_is_in_no_comparison_and_its_guard_is_named(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3)
    plant(tmp_path, "skip", [0.1] * 3, guards=[("around the latents", "invalid")])
    plant(tmp_path, "topk", [0.02 + e for e in SMALL[:3]], guards=[("shrinkage", "caveat")])
    said = {"skip": "invalid (around the latents)", "topk": "better (3 seeds)"}
    assert verdicts(tmp_path) == said


def test_an_invalid_baseline_is_called_so_in_the_table(tmp_path):
    plant(tmp_path, "baseline", [0.1] * 3, guards=[("not sparse", "invalid")])
    plant(tmp_path, "topk", [0.0] * 3)
    table = plot.results_table(read_data(tmp_path), "tiny").set_index("run")
    assert table.verdict["baseline"] == "invalid"          # the page ranks by this word


def test_an_evaluation_of_older_weights_counts_for_nothing(tmp_path):
    plant(tmp_path, "baseline", [0.0] * 3)
    plant(tmp_path, "topk", [0.05] * 3)
    for seed in range(3):
        make_run(tmp_path, "topk", seed, sae_checksum="trained again")
    assert verdicts(tmp_path) == {"topk": "cannot tell (evaluated before its last training)"}


def test_a_metric_that_a_control_does_as_well_in_is_printed_as_such(tmp_path):
    for seed in range(3):
        make_run(tmp_path, "baseline", seed, core={"absorption": 0.2})
    make_control(tmp_path, "untrained", l0=16.0, explained_variance=0.1, absorption=0.05)
    data = read_data(tmp_path)
    assert plot.uninformative(data, "tiny") == {"absorption": ["untrained"]}
    assert "absorption*" in plot.results_table(data, "tiny")
    make_control(tmp_path, "pca", l0=64.0, explained_variance=0.93, absorption=0.3)
    assert "explained_variance" not in plot.uninformative(read_data(tmp_path), "tiny")
    path = tmp_path / "controls-tiny/untrained/eval/core.json"
    write_json(path, read_json(path) | {"acts_checksum": "of an older cache"})
    assert plot.uninformative(read_data(tmp_path), "tiny") == {}


# ---- simulated experiments; all of them in tests/bench/nulls.py ----------------------------------


@pytest.mark.parametrize("kind", nulls.NOISES)
@pytest.mark.parametrize("sd", [0.001, 0.01])
def test_of_experiments_without_a_difference_at_most_five_percent_have_a_verdict(kind, sd):
    for tried, seeds in ((1, 3), (9, 5), (43, 8)):
        for gap in (0, 0.04):
            # 5 %, and what chance adds in so few experiments
            assert nulls.false_calls(tried, seeds, kind, sd, gap, n=1000) <= 0.06


def test_an_unpaired_comparison_is_as_rarely_wrong():
    assert nulls.false_calls(9, 5, "unequal", 0.01, paired=False, n=1000) <= 0.06


def test_a_difference_of_twice_the_margin_is_found_with_three_seeds():
    assert nulls.power(1, 3, n=1000) >= 0.8 and nulls.power(9, 3, n=1000) >= 0.75
    assert nulls.power(9, 5, n=1000) >= 0.95

"""Each row of study 5 (hierarchical) does what it says and moves what it is meant to move,
against the row before it, or itself with one mechanism off, on the same rows at the same L0."""
import functools

import pytest
import torch

from sae import Refuse, generator, load_variant, unit
from toys import absorption, build, cosines, evaluate, gini, hierarchy, mixture, steps, train

MUTANTS = ["hierarchical_r1:linear_start=1.0", "hierarchical_r1:linear_until=0.0",
           "hierarchical_r1:linear_form=weight", "hierarchical_r1:-wanted_l0",
           "hierarchical_r1:-steer_sparsity", "hierarchical_r1:-after_step",
           "hierarchical_r2:revive_every=0.0", "hierarchical_r2:revive_silent=2.0",
           "hierarchical_r3:latent_l1_power=0.0", "hierarchical_r3:-l1_weights",
           "hierarchical_r3:-after_step", "hierarchical_r4:l1_power=0.0",
           "hierarchical_r4:l1_power=1.0", "hierarchical_r4:l1_per=batch", "hierarchical_r4:-cost",
           "hierarchical_r4:-penalties", "hierarchical_r5:merge_every=0.0",
           "hierarchical_r5:-restart", "hierarchical_r5:merge_threshold=2.0"]
R = "hierarchical_r"
STEPS = 300
X = mixture()[0]
TRAIN, HELD_OUT = X[:-8192], X[-8192:]


def own(number):
    """The study's own settings where toys.TOY has others: here no latent falls silent by itself."""
    found = load_variant(f"{R}{number}").settings()
    names = ("revive_every", "revive_silent", "merge_threshold")
    return {name: found[name] for name in names if name in found}


@functools.cache
def run(number, **settings):
    """A trained SAE; and for each step (L0, L0 wanted, weight of the sparsity penalty)."""
    log = []

    def each(sae, out, terms):
        weight = float(sae.sparsity_scale) if sae.activation == "relu" else 0.0
        log.append((float((out.acts > 0).sum() / len(out.acts)), sae.wanted_l0(), weight))
    sae = train(f"{R}{number}", TRAIN, STEPS, each=each, **{**own(number), **settings})
    return sae, torch.tensor(log)


@functools.cache
def measured(number, **settings):
    """(explained variance, L0, acts) on rows held out."""
    return evaluate(run(number, **settings)[0], HELD_OUT)


# ---- r1: linear sparsity -------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "batch_topk", "jumprelu"])
def test_l0_rises_as_scheduled_within_five_percent_and_ends_at_l0(activation):
    l0, wanted, _ = run(1, activation=activation)[1].T
    scheduled = [4 * min(1, 0.5 + step / STEPS) for step in range(STEPS)]
    assert wanted.tolist() == pytest.approx(scheduled)
    parts = (l0 / wanted).view(10, 30).mean(1)             # a tenth of the run each
    assert (parts - 1).abs().max() < 0.05, parts
    assert measured(1, activation=activation)[1] == pytest.approx(4, rel=0.05)


def test_without_the_schedule_l0_is_there_from_the_start():
    l0 = run(1, linear_start=1.0)[1][:, 0]
    assert l0[:15].mean() == pytest.approx(4, rel=0.05)


def test_a_schedule_may_fall_or_end_at_once():
    falling = run(1, linear_start=4.0, activation="batch_topk")[1]
    assert falling[:15, 0].mean() > 14 and falling[-1, 0] == pytest.approx(4, abs=0.01)
    sae, _ = build(f"{R}1", TRAIN, linear_until=0.0)
    assert sae.wanted_l0() == 4


def test_the_weight_of_the_note_falls_to_zero_and_l0_ends_where_it_may():
    weight = run(1, linear_form="weight")[1][:, 2]
    wanted = [(1 - step / STEPS) / 64 ** 0.5 for step in range(STEPS)]
    assert weight.tolist() == pytest.approx(wanted, rel=0.01)
    assert measured(1, linear_form="weight")[1] > 1.5 * 4
    sae, _ = build(f"{R}1", TRAIN, linear_form="weight")
    assert sae.penalty_scale("sparsity") == pytest.approx(1 / 64 ** 0.5)       # of the first step


def test_the_weight_of_the_note_needs_a_penalty():
    with pytest.raises(Refuse, match="activation=topk"):
        build(f"{R}1", TRAIN, linear_form="weight", activation="topk")


@pytest.mark.parametrize("settings", [{"linear_start": 0.0}, {"activation": "topk", "l0": 1.0}])
def test_a_start_at_which_nothing_fires_is_refused(settings):
    with pytest.raises(Refuse, match="linear_start"):
        build(f"{R}1", TRAIN, **settings)


def test_the_window_is_a_mean_over_its_rows():
    fired = []

    def keep(sae, out, terms):
        fired.append((out.acts > 0).float().mean(0))
    long = train(f"{R}1", TRAIN, 40, each=keep, linear_window=1e9)
    assert torch.allclose(long.window, torch.stack(fired[-40:]).mean(0), atol=1e-5)
    short = train(f"{R}1", TRAIN, 40, each=keep, linear_window=1.0)    # 64 rows: less than a batch
    assert torch.allclose(short.window, fired[-1], atol=1e-6)


# ---- r2: resampling ------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_after_a_bad_start_resampling_leaves_no_latent_dead_and_explains_more(activation):
    found = []
    for settings in (own(2), {"revive_every": 0.0}):
        sae, opt = build(f"{R}2", TRAIN, STEPS, activation=activation, aux_weight=0.0, **settings)
        with torch.no_grad():
            sae.b_enc[32:] -= 30                           # half of the latents never fire
        steps(sae, opt, TRAIN)
        sae.step = sae.steps
        ev, l0, acts = evaluate(sae.eval(), HELD_OUT)
        found.append((ev, float((acts.sum(0) == 0).float().mean())))
        assert l0 == pytest.approx(4, rel=0.05)
    (ev, dead), (ev_off, dead_off) = found
    assert dead < 0.1 and dead_off >= 0.4
    assert ev > ev_off


# ---- r3: adaptive targets ------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_adaptive_targets_narrow_the_spread_of_rates_at_the_same_l0(activation):
    on = measured(3, activation=activation)
    off = measured(3, activation=activation, latent_l1_power=0.0)
    assert gini((on[2] > 0).float().mean(0)) < 0.95 * gini((off[2] > 0).float().mean(0))
    assert on[1] == pytest.approx(off[1], rel=0.05)


def test_a_latents_l1_weight_is_its_rate_over_its_target():
    sae, _ = run(3, target_memory=1e-9)                    # no memory: what it moves to
    target = (sae.window * sae.window.mean()).sqrt()       # halfway, on the logarithms
    assert torch.allclose(sae.l1_of, sae.window / target, atol=1e-5)
    out = sae(HELD_OUT)
    assert torch.allclose(sae.sparsity(out), (out.acts * sae.l1_of).sum(1).mean() / 32 ** 0.5)


@pytest.mark.slow
def test_equal_rates_are_the_opposite_of_a_hierarchy():
    """A parent fires more often than its children: made to fire as rarely, it is absorbed more."""
    x, on, directions, parent = hierarchy(50_000)
    found = []
    for power in (0.5, 0.0):
        sae = train(f"{R}3", x[:-8192], 1500, d_sae=24, l0=1.75, latent_l1_power=power, **own(3))
        assert evaluate(sae, x[-8192:])[1] == pytest.approx(1.75, rel=0.05)
        found.append(absorption(sae, x[-8192:], on[-8192:], directions, parent))
    assert found[0] > found[1] + 0.05


# ---- r4: adaptive L1 -----------------------------------------------------------------------------


def distance(**settings):
    """Mean distance of a row's error from the target, in fractions of the variance."""
    sae = run(4, **settings)[0]
    assert measured(4, **settings)[1] == pytest.approx(4, rel=0.05)
    with torch.no_grad():
        error = sae.recon_error(sae(HELD_OUT)) / HELD_OUT.var(0, correction=0).mean()
    return float((error - 0.45).abs().mean())


def test_rows_end_nearer_the_target_error_and_the_notes_power_takes_them_farther():
    off = distance(l1_power=0.0)
    assert distance() < 0.99 * off
    assert distance(l1_power=1.0) > 1.01 * off


def test_for_the_whole_batch_the_factor_is_undone_by_what_holds_l0():
    assert distance(l1_per="batch") == pytest.approx(distance(l1_power=0.0), rel=0.02)


def test_a_rows_factor_is_its_clamped_ratio_to_the_power():
    sae, _ = run(4)
    out = sae(HELD_OUT)
    ratio = sae.recon_error(out) / (0.45 * out.x.var(0, correction=0).mean())
    assert ratio.min() < 0.3 and ratio.max() > 2           # the clamp and what is between are seen
    plain = (out.acts * sae.l1_of).sum(1) / 32 ** 0.5
    assert torch.allclose(sae.sparsity(out), (plain / ratio.clamp(0.1, 2)).mean())
    sae.l1_per = "batch"
    factors = sae.row_factor(out)
    sae.l1_per = "row"
    assert factors.shape == (8192,) and factors.unique().numel() == 1


def test_where_no_penalty_is_badly_reconstructed_rows_are_paid_by_the_others():
    sae, _ = build(f"{R}4", TRAIN, activation="topk")
    out = sae(HELD_OUT)
    factor = sae.row_factor(out)
    paid = (factor - factor.mean()) * out.acts.sum(1) / 32 ** 0.5
    assert torch.allclose(sae.penalties(out)["row_l1"], paid.mean(), atol=1e-6)


# ---- r5: clustering ------------------------------------------------------------------------------



def doubles(sae):
    """Pairs of latents whose decoders are near-parallel."""
    return int((cosines(sae) > 0.9).sum()) // 2


def doubled(**settings):
    """A start at which each of 32 latents is there twice, nearly."""
    sae, opt = build(f"{R}5", TRAIN, 500, **{**own(5), **settings})
    with torch.no_grad():
        sae.W_enc[:, 32:], sae.b_enc[32:] = sae.W_enc[:, :32], sae.b_enc[:32]
        noise = torch.randn(32, 32, generator=generator("noise"))
        sae.W_dec[32:] = unit(sae.W_dec[:32] + 0.05 * noise)
    assert doubles(sae) == 32
    return sae, opt


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_near_duplicates_are_gone_after_the_first_merging_and_stay_away(activation):
    counts = []
    for settings in ({}, {"merge_every": 0.0}):
        sae, opt = doubled(activation=activation, **settings)
        seen = []
        steps(sae, opt, TRAIN, stop=60, each=lambda sae, out, terms: seen.append(doubles(sae)))
        counts.append(seen)
    merged, left = counts
    assert merged[9] == 0 and max(merged[9:]) <= 1         # merging comes every 2 % = 10 steps
    assert left[9] == 32 and sum(left) > 2 * sum(merged)


def test_merging_counts_and_restarts_the_freed_at_bad_rows():
    sae, opt = doubled()
    sae.step = 9
    out = sae(TRAIN[:256])
    residuals = unit(out.x - out.x_hat)
    with torch.no_grad():
        _, directions = sae.restart(out)
    assert sae.merged == len(directions) == 32
    assert ((unit(directions) @ residuals.T).amax(1) > 0.999).all()
    sae, opt = doubled()
    steps(sae, opt, TRAIN, stop=10)
    assert (cosines(sae).max(1).values < 0.9).all()


def test_merging_averages_by_rate_and_touches_nobody_else():
    sae, opt = build(f"{R}5", TRAIN, 100, **own(5))
    steps(sae, opt, TRAIN, stop=1)
    with torch.no_grad():
        sae.W_dec.copy_(unit(torch.randn(64, 32, generator=generator("rows"))))
        sae.W_dec[7] = sae.W_dec[3]
        sae.W_dec[9] = -sae.W_dec[5]                       # opposite, not near
        sae.rate.fill_(0.05)
        sae.rate[3], sae.rate[7] = 0.06, 0.02
    freed, kept = sae.merging_pairs(torch.empty(0, dtype=torch.long))
    assert (freed.tolist(), kept.tolist()) == ([7], [3])
    before, W_dec = sae.W_enc.detach().clone(), sae.W_dec.detach().clone()
    with torch.no_grad():
        sae.merge(freed, kept)
    assert torch.allclose(sae.W_enc[:, 3], 0.75 * before[:, 3] + 0.25 * before[:, 7], atol=1e-6)
    assert torch.allclose(sae.W_dec[3], W_dec[3], atol=1e-6)
    others = [i for i in range(64) if i != 3]
    assert torch.equal(sae.W_enc[:, others], before[:, others])


def test_in_a_chain_of_near_latents_nobody_is_merged_into_one_that_is_freed():
    sae, _ = build(f"{R}5", TRAIN, 100, **own(5))
    angle = torch.tensor([0.0, 0.4, 0.8])                  # neighbours: cosine 0.92, the ends 0.70
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(32).repeat(2, 1))
        sae.W_dec[32:] *= -1
        sae.W_dec[:3] = 0
        sae.W_dec[:3, 0], sae.W_dec[:3, 1] = angle.cos(), angle.sin()
        sae.W_dec[33:35] = -sae.W_dec[1:3]
        sae.rate.copy_(torch.linspace(0.9, 0.1, 64))
    freed, kept = sae.merging_pairs(torch.empty(0, dtype=torch.long))
    assert (1, 0) in zip(freed.tolist(), kept.tolist()) and 2 not in freed.tolist()
    assert not set(freed.tolist()) & set(kept.tolist())


def test_a_revived_latent_and_a_freed_one_restart_from_different_rows():
    sae, opt = doubled()
    steps(sae, opt, TRAIN, stop=2)
    sae.silent[:4], sae.step = 1e9, 99                     # both are due after the hundredth step
    with torch.no_grad():
        which, directions = sae.restart(sae(TRAIN[:256]))
    assert len(which) > 4 and sae.revived == 4
    cos = unit(directions) @ unit(directions).T
    assert cos.fill_diagonal_(0).max() < 0.999

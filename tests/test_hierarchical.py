"""Study 5: each row moves what it is meant to move, against its own switched-off run: same seed, same batches, same L0."""
import functools

import pytest
import torch

from toys import SEEDS, absorption, build, cosines, evaluate, hierarchy, mixture, steps, train

QUIET = {"revive_every": 0.2, "revive_silent": 0.1}      # the study's own; here nothing falls silent: only the row under test acts


@functools.cache
def data(seed):
    """(rows to train on, rows held out)."""
    x = mixture(seed=seed)[0]
    return x[:-8192], x[-8192:]


@functools.cache
def run(name, seed, **settings):
    """A trained SAE and, for every step, (L0, wanted L0, L1 weight)."""
    log = []
    sae = train(name, data(seed)[0], 300, seed, each=lambda sae, out, _: log.append(
        ((out.acts > 0).sum(1).float().mean(), sae.wanted_l0(), sae.weight_now.item() if sae.activation == "relu" else 0)), **settings)
    return sae, torch.tensor(log).view(10, 30, 3).mean(1)                       # means over tenths of the run


# ---- 1: linear sparsity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
@pytest.mark.parametrize("seed", SEEDS)
def test_l0_rises_through_training_as_scheduled_and_ends_at_l0(activation, seed):
    sae, log = run("hierarchical_r1", seed, activation=activation, linear_start=0.5, linear_until=0.5)
    flat_sae, flat = run("hierarchical_r1", seed, activation=activation, linear_start=1.0)
    assert log[0, 1] == pytest.approx(2.2, abs=0.05) and log[2, 1] == pytest.approx(3.0, abs=0.05) and log[5:, 1].eq(4).all()
    assert (log[:, 0] / log[:, 1] - 1).abs().mean() < (0.12 if activation == "relu" else 0.01)
    assert log[0, 0] < 0.65 * log[-1, 0] and flat[0, 0] > 0.95 * flat[-1, 0]
    for s in (sae, flat_sae):
        assert evaluate(s, data(seed)[1])[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_once_it_holds_l0_the_weight_falls_while_l0_rises(seed):
    _, log = run("hierarchical_r1", seed, linear_start=0.5, linear_until=0.5)
    _, flat = run("hierarchical_r1", seed, linear_start=1.0)
    assert log[3, 2] > 1.1 * log[7, 2] and flat[3, 2] < flat[7, 2]


def test_above_one_the_schedule_runs_the_other_way():
    sae, log = run("hierarchical_r1", 0, activation="batch_topk", linear_start=4.0, linear_until=0.5)
    assert (log[1:6, 0] < log[:5, 0]).all() and evaluate(sae, data(0)[1])[1] == pytest.approx(4, rel=0.05)


def test_the_weight_of_the_note_falls_to_zero_and_ends_far_from_l0():
    sae, log = run("hierarchical_r1", 0, linear_form="weight")
    assert log[:, 2].tolist() == pytest.approx([0.03 / 8 * (1 - 0.05 - 0.1 * i) for i in range(10)], rel=0.1)
    assert evaluate(sae, data(0)[1])[1] > 1.5 * 4


def test_the_window_is_a_mean_over_its_rows():
    fired = []
    keep = lambda sae, out, _: fired.append((out.acts > 0).float().mean(0))
    long = train("hierarchical_r1", data(0)[0], 40, each=keep, linear_window=1e9)
    assert torch.allclose(long.window, torch.stack(fired).mean(0), atol=1e-5)
    short = train("hierarchical_r1", data(0)[0], 40, each=keep, linear_window=1.0)    # 64 rows, less than a batch
    assert torch.allclose(short.window, fired[-1], atol=1e-6)


# ---- 2: resampling ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_after_a_bad_start_resampling_leaves_fewer_dead_latents_and_explains_more(activation):
    """With ReLU, whose L1 term takes most of what latents could explain, the gain is small (0.000 to 0.020): its mean is told apart."""
    gain = []
    for seed in SEEDS:
        found = []
        for settings in (QUIET, {"revive_every": 0.0}):
            sae, opt = build("hierarchical_r2", data(seed)[0], 300, seed, activation=activation, **settings)
            with torch.no_grad():
                sae.b_enc[32:] -= 30                                            # half of the latents never fire
            steps(sae, opt, data(seed)[0])
            sae.step = sae.steps
            ev, l0, acts = evaluate(sae.eval(), data(seed)[1])
            found.append((float((acts.sum(0) == 0).float().mean()), ev))
        assert found[0][0] < 0.1 and found[1][0] >= 0.45
        gain.append(found[0][1] - found[1][1])
    if activation == "batch_topk":
        assert min(gain) > 0.02                                                 # measured 0.044 to 0.096
    assert sum(gain) / len(gain) > 0.004                                        # ReLU: measured 0.012


# ---- 3: adaptive targets ------------------------------------------------------------------------------------------------------------


def gini(rate):
    """0: all latents fire equally often; 1: one fires alone."""
    n, rate = len(rate), rate.sort().values
    return float(((2 * torch.arange(1, n + 1) - n - 1) * rate).sum() / (n * rate.sum()))


@pytest.mark.parametrize("seed", SEEDS)
def test_adaptive_targets_narrow_the_spread_of_rates_at_the_same_l0(seed):
    spread, l0s = [], []
    for pull in (0.0, 0.5, 1.0):
        sae, _ = run("hierarchical_r3", seed, latent_l1_power=pull, **QUIET)
        _, l0, acts = evaluate(sae, data(seed)[1])
        spread.append(gini((acts > 0).float().mean(0)))
        l0s.append(l0)
    assert spread[1] < 0.8 * spread[0] and spread[2] < spread[1]
    assert max(l0s) < 1.05 * min(l0s)


@pytest.mark.parametrize("activation", ["relu", "topk", "batch_topk", "jumprelu"])
def test_a_weight_for_each_latent_narrows_the_spread_of_rates_on_every_activation(activation):
    for seed in SEEDS:
        on, off = (evaluate(run("latent_l1", seed, activation=activation, latent_l1_power=power)[0], data(seed)[1]) for power in (0.5, 0.0))
        assert gini((on[2] > 0).float().mean(0)) < 0.95 * gini((off[2] > 0).float().mean(0))
        assert on[1] == pytest.approx(off[1], rel=0.05)


def test_where_no_penalty_is_frequent_latents_pay_the_rare_ones():
    sae, _ = build("latent_l1", data(0)[0], activation="topk", d_sae=4, l0=2.0, sparsity_weight=1.0, latent_l1_power=1.0)
    sae.rate.copy_(torch.tensor([0.4, 0.2, 0.2, 0.0]))                           # weights 2, 1, 1, 0: less their mean 1, 0, 0, -1
    out = sae(data(0)[1][:64])
    paid = (out.acts[:, 0] - out.acts[:, 3]).mean() / 32 ** 0.5
    assert torch.allclose(sae.losses(out)["latent_l1"], paid, atol=1e-5)


def test_a_latents_l1_weight_is_its_rate_over_its_target():
    sae, _ = run("hierarchical_r3", 0, latent_l1_power=0.5, target_memory=1e-9, **QUIET)      # no memory: what it moves to
    target = (sae.window * sae.window.mean()).sqrt()                                       # halfway, on the logarithms
    assert torch.allclose(sae.l1_of, sae.window / target, atol=1e-5)
    out = sae(data(0)[1])
    assert torch.allclose(sae.sparsity(out), (out.acts * sae.l1_of).sum(1).mean() / 32 ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_equal_rates_are_the_opposite_of_a_hierarchy(seed):
    """A parent fires more often than its children: made to fire as rarely, it is absorbed more."""
    x, on, directions, parent = hierarchy(50_000, seed=seed)
    found = []
    for pull in (0.5, 0.0):
        sae = train("hierarchical_r3", x[:-8192], 1500, seed, d_sae=24, l0=1.75, batch_size=512, latent_l1_power=pull, **QUIET)
        assert evaluate(sae, x[-8192:])[1] == pytest.approx(1.75, rel=0.05)
        found.append(absorption(sae, x[-8192:], on[-8192:], directions, parent))
    assert found[0] > found[1] + 0.05


# ---- 4: adaptive L1 -----------------------------------------------------------------------------------------------------------------


def distance(seed, **settings):
    """Mean distance of a row's error from the target, in fractions of the variance; and L0."""
    x = data(seed)[1]
    sae, _ = run("hierarchical_r4", seed, l1_target=0.45, **QUIET, **settings)
    with torch.no_grad():
        error = sae.recon_error(sae(x)) / x.var(0, correction=0).mean()
    return float((error - 0.45).abs().mean()), evaluate(sae, x)[1]


def test_rows_end_nearer_the_target_error_and_the_notes_sign_takes_them_farther():
    found = torch.tensor([[distance(seed, l1_power=p) for p in (0.0, -1.0, 1.0)] for seed in SEEDS])
    off, ours, note = found[..., 0].unbind(1)
    assert (ours < 0.98 * off).all() and (note > 1.02 * off).all()
    assert (found[..., 1] / 4 - 1).abs().max() < 0.05


def test_for_the_whole_batch_the_factor_is_undone_by_what_holds_l0():
    for seed in SEEDS:
        off, batch = distance(seed, l1_power=0.0)[0], distance(seed, l1_power=-1.0, l1_per="batch")[0]
        assert batch == pytest.approx(off, rel=0.01)


def test_the_factor_is_the_clamped_ratio_to_the_power():
    sae, _ = run("hierarchical_r4", 0, l1_target=0.45, l1_power=-1.0, **QUIET)
    out = sae(data(0)[1])
    ratio = sae.recon_error(out) / (0.45 * out.x.var(0, correction=0).mean())
    assert ratio.min() < 0.3 and ratio.max() > 2                                # so that the clamp and what is between are both seen
    plain = (out.acts * sae.l1_of).sum(1) / 32 ** 0.5
    assert torch.allclose(sae.sparsity(out), (plain / ratio.clamp(0.1, 2)).mean())


# ---- 5: clustering ------------------------------------------------------------------------------------------------------------------


def near(sae):
    """Pairs of latents whose decoders are near-parallel."""
    return int((cosines(sae) > 0.9).sum()) // 2


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
@pytest.mark.parametrize("seed", SEEDS)
def test_near_duplicates_are_gone_after_the_first_merging_and_stay_away(activation, seed):
    counts = []
    for settings in ({}, {"merge_every": 0.0}):
        sae, opt = build("hierarchical_r5", data(seed)[0], 500, seed, activation=activation, merge_threshold=0.9, **QUIET, **settings)
        with torch.no_grad():
            sae.W_enc[:, 32:], sae.b_enc[32:] = sae.W_enc[:, :32], sae.b_enc[:32]
            sae.W_dec[32:] = sae.W_dec[:32] + 0.05 * torch.randn(32, 32, generator=torch.Generator().manual_seed(seed))
            sae.W_dec.copy_(sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True))
        assert near(sae) == 32
        seen = []
        steps(sae, opt, data(seed)[0], each=lambda sae, out, _: seen.append(near(sae)))
        counts.append(seen)
        assert evaluate(sae.eval(), data(seed)[1])[1] == pytest.approx(4, rel=0.1)
    merged, off = counts
    assert merged[9] == 0 and max(merged[9:]) <= 1                              # merging comes every 2 % = 10 steps
    assert off[9] == 32 and sum(off) > 1000 > 320 >= sum(merged[:10])


def test_merging_averages_by_rate_and_clears_the_freed_latent_alone():
    sae, opt = build("hierarchical_r5", data(0)[0], 100, merge_threshold=0.9, **QUIET)
    steps(sae, opt, data(0)[0], stop=1)                                          # step 2 of 100 is the first that merges
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0))))
        sae.W_dec[7] = sae.W_dec[3]
        sae.W_dec[9] = -sae.W_dec[5]                                             # opposite, not near
        sae.rate.fill_(0.05)
        sae.rate[3], sae.rate[7] = 0.06, 0.02
    freed, kept = sae.pairs()
    assert (freed.tolist(), kept.tolist()) == ([7], [3])
    before, W_dec = sae.W_enc.detach().clone(), sae.W_dec.detach().clone()
    moments = opt.state[sae.W_enc]["exp_avg"]
    sae.merge(freed, kept)
    assert torch.allclose(sae.W_enc[:, 3], 0.75 * before[:, 3] + 0.25 * before[:, 7], atol=1e-6)
    assert torch.allclose(sae.W_dec[3], W_dec[3], atol=1e-6)
    others = [i for i in range(64) if i != 3]
    assert torch.equal(sae.W_enc[:, others], before[:, others]) and moments[:, 3].abs().sum() > 0


def test_in_a_chain_of_near_latents_nobody_is_merged_into_one_that_is_freed():
    sae, _ = build("hierarchical_r5", data(0)[0], 100, merge_threshold=0.9, **QUIET)
    angle = torch.tensor([0.0, 0.4, 0.8])                                        # neighbours have cosine 0.92, the ends 0.70
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(32).repeat(2, 1) * torch.tensor([1.0] * 32 + [-1.0] * 32)[:, None])
        sae.W_dec[:3] = 0
        sae.W_dec[:3, 0], sae.W_dec[:3, 1] = angle.cos(), angle.sin()
        sae.W_dec[1 + 32:3 + 32] = -sae.W_dec[1:3]
        sae.rate.copy_(torch.linspace(0.9, 0.1, 64))
    freed, kept = sae.pairs()
    assert (1, 0) in zip(freed.tolist(), kept.tolist()) and 2 not in freed.tolist()
    assert not set(freed.tolist()) & set(kept.tolist())

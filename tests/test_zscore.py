"""What each row of the study zscore does, on toys with known answers."""

import functools
from statistics import NormalDist

import pytest
import torch

from sae import SAE, Refuse, generator, load_variant, unit
from toys import D_IN, build, cosines, evaluate, gini, mixture, normalised, steps, train

MUTANTS = [
    "zscore_r1:zscore_threshold=False", "zscore_r1:zscore_start=1.0", "zscore_r1:zscore_gain=0.0",
    "zscore_r1:zscore_memory=1.0", "zscore_r1:interference_weight=0.0",
    "zscore_r1:interference_tau=0.9", "zscore_r1:interference_among=8",
    "zscore_r1:revive_interference=0.0", "zscore_r1:revive_every=0.0", "zscore_r1:-saelens_weights",
    "zscore_r1:-after_step", "zscore_r1:-reset_latents", "zscore_r2:zscore_init=False",
    "zscore_r2:interference_warmup=0.0", "zscore_r2:-reset_latents",
    "zscore_r3:interference_weight=0.1", "zscore_r3:plateau_factor=1.0", "zscore_r3:-lr_scale",
    "zscore_r4:skip_scale=0.0", "zscore_r5:worth_power=0.0", "zscore_r5:worth_l1_weight=0.0",
    "zscore_r5:latent_lr_high=1.0", "zscore_r5:-after_step", "zscore_r5:-reset_latents",
    "zscore_r6:layernorm_strength=0.0", "zscore_r6:layernorm_eps=100.0",
    "zscore_r7:blend_learned=False", "zscore_r8:attend=False", "zscore_r9:multiscale=False",
    "zscore_r9:multiscale_power4=1.0"]


@functools.cache
def data(kind="mixture"):
    """Rows: a mixture; the same with lengths that differ; normal rows, which have no features."""
    if kind == "normal":
        return normalised(torch.randn(20_000, D_IN, generator=generator("normal")))
    x = mixture()[0]
    if kind == "lengths":
        return normalised(x * (0.5 * torch.randn(len(x), 1, generator=generator("lengths"))).exp())
    return x


def rows(kind="mixture"):
    return data(kind)[-8192:]


@functools.cache
def trained(variant, seed=0, **settings):
    return train(variant, data(), seed=seed, **settings)


def after(variant, n, kind="mixture", **settings):
    """A variant after its first n of 300 steps."""
    sae, opt = build(variant, data(kind), **settings)
    steps(sae, opt, data(kind), stop=n)
    return sae.eval()


def rates(sae):
    return (evaluate(sae, rows())[2] > 0).float().mean(0)


def l0_of(sae, kind="mixture"):
    return evaluate(sae, rows(kind))[1]


def tail(z):
    """Share of a normal distribution above z."""
    return 1 - NormalDist().cdf(z)


# ---- r1: the threshold ---------------------------------------------------------------------------


@pytest.mark.parametrize("z", [1.8, 2.5])
def test_at_the_start_l0_is_the_normal_tail_beyond_z(z):
    sae, _ = build("zscore_r1", data("normal"), zscore_start=z, d_sae=256, l0=16.0)
    assert abs(l0_of(sae, "normal") / (256 * tail(z)) - 1) < 0.05


def test_z_starts_where_the_normal_tail_gives_l0():
    sae, _ = build("zscore_r1", data("normal"))
    assert abs(64 * tail(float(sae.z)) - 4) < 1e-3
    assert abs(l0_of(sae, "normal") - 4) < 0.2


def test_the_sparse_and_the_dense_path_fire_the_same_latents():
    sae, _ = build("zscore_r1", data(), d_sae=256)
    assert sae.path == "sparse"
    with torch.no_grad():
        sparse, dense = sae.train()(rows()[:256]), sae.eval()(rows()[:256])
    assert torch.equal(sparse.acts, dense.acts) and (dense.acts > 0).any()
    assert torch.allclose(sparse.x_hat, dense.x_hat, atol=1e-5)


def test_it_is_a_jumprelu_in_saelens_format(tmp_path):
    sae = after("zscore_r1", 30)
    sae.scale.fill_(3.0)
    sae.mean.fill_(0.5)
    sae.to_saelens(tmp_path)
    again = SAE.from_saelens(tmp_path)
    raw = rows()[:256] / 3 + 0.5
    assert torch.allclose(again.encode(raw), sae.encode(raw), atol=1e-4)
    assert (sae.encode(raw) > 0).any()


def test_z_brings_l0_to_its_target_from_anywhere_and_left_alone_does_not():
    for start in (0.5, 3.5):
        assert abs(l0_of(after("zscore_r1", 60, zscore_start=start)) / 4 - 1) < 0.1
    left = [l0_of(after("zscore_r1", 60, zscore_start=2.0, zscore_gain=0.0, l0=l0))
            for l0 in (2.0, 6.0)]
    assert abs(left[0] / left[1] - 1) < 0.1


def test_a_latent_fires_above_its_own_mean_and_spread_of_late():
    sae = trained("zscore_r1")
    with torch.no_grad():
        out = sae(rows())
    std, mean = torch.std_mean(out.pre, 0)
    assert torch.allclose(sae.pre_std, std, rtol=0.1) and torch.allclose(sae.pre_mean, mean,
                                                                         atol=0.1)
    fires = (out.pre > sae.pre_mean + sae.z * sae.pre_std) & (out.pre > 0)
    assert torch.equal(out.acts, out.pre.where(fires, torch.zeros(())))


def test_latents_fire_about_equally_often_and_none_beyond_cantellis_bound():
    sae = trained("zscore_r1")
    assert gini(rates(sae)) < 0.5 * gini(rates(trained("batch_topk")))
    assert rates(sae).max() < 1 / (1 + float(sae.z) ** 2)


def test_an_activation_with_a_threshold_of_its_own_is_refused():
    with pytest.raises(Refuse, match="activation=topk: want relu"):
        build("zscore_r1", data(), activation="topk")


# ---- r1: interference ----------------------------------------------------------------------------


def nearest(sae):
    """Mean over the latents of the cosine with the nearest other."""
    return float(cosines(sae).max(1).values.mean())


def test_interference_is_the_cost_of_all_pairs():
    sae, _ = build("zscore_r1", data())
    cos = sae.W_dec @ sae.W_dec.T - torch.eye(64)
    assert torch.isclose(sae.interference(None), ((cos - 0.1).relu() * cos**2).sum(1).mean(),
                         rtol=1e-3)
    assert torch.isclose(sae.stats["overlaps"], (cos > 0.1).sum(1).float().mean())


def test_some_latents_stand_for_all():
    """The estimate from 32 of 64 latents is right on average, up to the n / (n - 1) of pairs."""
    sae, _ = build("zscore_r1", data())
    every, sae.interference_among, found = sae.interference(None).item(), 32, []
    for sae.step in range(200):
        found.append(sae.interference(None).item())
    assert abs(sum(found) / 200 / every - 1) < 0.05


@pytest.mark.parametrize("rule", ["coactivation", "product"])
def test_firing_together_is_averaged_over_the_last_batches_with_this_ones_gradient(rule):
    sae, opt = build("zscore_r1", data(), interference_rule=rule, interference_tau=0.0)
    steps(sae, opt, data(), stop=20)
    out = sae.eval()(rows())
    acts = out.acts.detach()
    size = acts.norm(dim=0).clamp_min(1e-6)
    by = size * size[:, None] if rule == "coactivation" else size.square().mean()
    known = acts.T @ acts / by
    off_diagonal = ~torch.eye(64, dtype=torch.bool)
    both = torch.stack([sae.together[off_diagonal], known[off_diagonal]])
    assert torch.corrcoef(both)[0, 1] > 0.8
    assert abs(sae.together.diag().mean() / known.diag().mean() - 1) < 0.15
    cos = (sae.W_dec @ sae.W_dec.T).detach()
    cost = sae.interference(out)
    assert torch.isclose(cost.detach(), (sae.together * cos**2)[off_diagonal].sum() / 64, rtol=1e-4)
    assert torch.autograd.grad(cost, sae.W_enc)[0].abs().sum() > 0
    sae.interference_tau = load_variant("zscore_r1").interference_tau
    assert sae.interference(out) > 0


def test_a_restarted_latent_starts_like_the_others_and_is_worth_as_much():
    sae, opt = build("zscore_r5", data())
    steps(sae, opt, data(), stop=20)
    which = torch.arange(8)
    directions = torch.randn(8, data().shape[1], generator=generator("restart"))
    with torch.no_grad():
        sae.reset_latents(opt, which, directions, data()[:4096])
    assert (sae.b_enc[which] == 0).all()
    assert (sae.worth[which] == sae.worth[0]).all() and 0.5 < sae.move_scale()[0] < 2
    rate = sae.firing(sae.eval()(data()[:4096]).acts)[which]
    assert 0.5 * 4 / 64 < rate.mean() < 2 * 4 / 64


def test_of_the_silent_latents_those_that_overlap_with_living_ones_restart():
    sae, _ = build("zscore_r1", data(), d_sae=32)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(32))
        sae.W_dec[7] = unit(torch.eye(32)[7] + torch.eye(32)[8])  # two living ones overlap a little
        sae.W_dec[0] = torch.eye(32)[5]  # silent, on top of a living one
    sae.silent[:2] = 1000.0  # 1 is silent and in nobody's way
    assert sae.to_revive().nonzero().flatten().tolist() == [0]
    sae.revive_interference = 0.0
    assert sae.to_revive().nonzero().flatten().tolist() == [0, 1]


def test_the_penalty_makes_latents_overlap_less():
    free = trained("zscore_r1", interference_weight=0.0)
    assert nearest(trained("zscore_r1")) < nearest(free) - 0.05


def test_dead_copies_come_to_life_and_the_dictionary_becomes_more_diverse():
    saes = []
    for settings in ({}, {"revive_every": 0.0}):
        sae, opt = build("zscore_r1", data(), aux_weight=0.0, interference_weight=0.0, **settings)
        with torch.no_grad():
            sae.W_dec[:16] = sae.W_dec[16:32]
            sae.b_enc[:16] = -100.0
            sae.sparsifier.measure(sae.pre_acts(data()[:8192]))
        steps(sae, opt, data())
        saes.append(sae.eval())
    revived, left = saes
    assert revived.revived >= 16
    assert (rates(revived) == 0).sum() == 0 and (rates(left) == 0).sum() == 16
    assert nearest(revived) < nearest(left) - 0.05


@pytest.mark.parametrize("variant", ["zscore_r1", "zscore_r2", "zscore_r8"])
def test_restarted_latents_fire_at_about_the_wanted_rate(variant):
    sae, opt = build(variant, data())
    steps(sae, opt, data(), stop=20)
    directions = torch.randn(8, D_IN, generator=generator("restart"))
    with torch.no_grad():
        sae.reset_latents(opt, torch.arange(8), directions, data()[:2048])
    rate = rates(sae.eval())[:8]
    assert (rate - 4 / 64).abs().max() < 0.04


def test_captured_is_the_share_of_the_first_directions():
    sae, opt = build("zscore_r1", data(), interference_rank=8)
    acts = torch.randn(2000, 64, generator=generator("acts")) * torch.linspace(1, 0.1, 64) ** 6
    spectrum = torch.linalg.svdvals(acts - acts.mean(0)) ** 2
    state = torch.get_rng_state()
    assert torch.isclose(sae.captured(acts), spectrum[:8].sum() / spectrum.sum(), atol=0.01)
    assert torch.equal(torch.get_rng_state(), state)
    seen = []
    steps(sae, opt, data(), stop=6,
          each=lambda sae, out, terms: seen.append("captured" in sae.stats))
    assert seen == [False] * 5 + [True]  # every 2 % of 300 steps


# ---- r2 to r5 ------------------------------------------------------------------------------------


def test_r2_a_start_for_the_threshold_raises_explained_variance_early():
    early = evaluate(after("zscore_r2", 30), rows())[0]
    assert early > evaluate(after("zscore_r2", 30, zscore_init=False), rows())[0] + 0.05


def test_r2_the_penalty_comes_up_from_zero():
    sae, _ = build("zscore_r2", data())
    for sae.step, share in ((0, 0.0), (30, 0.5), (60, 1.0), (299, 1.0)):
        assert sae.penalty_scale("interference") == share
    assert sae.penalty_scale("aux") == 1


def test_r3_the_penalty_counts_less():
    saes = [build(name, data(), interference_warmup=0.0)[0] for name in ("zscore_r2", "zscore_r3")]
    full, less = (sae.losses(sae(rows()[:256]))["interference"] for sae in saes)
    assert 0 < less < 0.5 * full


def test_r3_the_learning_rate_halves_on_a_plateau():
    sae, _ = build("zscore_r3", data(), 100, lr_decay=0.0, lr_warmup=0.0)

    def see(first, end, loss):
        for sae.step in range(first, end):
            sae.accept(torch.tensor(loss**sae.step))

    see(0, 5, 0.95)
    assert sae.lr_scale() == 1
    see(5, 40, 1.0)
    low = sae.lr_scale()
    assert low <= 0.25
    see(40, 80, 0.9)  # it falls again
    assert sae.lr_scale() == low


def test_r4_the_path_adds_a_tenth_of_the_row():
    sae, _ = build("zscore_r4", data())
    x = rows()[:64]
    with torch.no_grad():
        out = sae(x)
        assert torch.allclose(out.x_hat - sae.decode(out.acts), 0.1 * (x - sae.b_dec), atol=1e-5)


def moves(**settings):
    """How far each decoder row moves in the second step, if the worth of latent 0 is double."""
    sae, opt = build("zscore_r5", data(), worth_l1_weight=0.0, **settings)
    steps(sae, opt, data(), stop=1)
    sae.worth.fill_(1.0)
    sae.worth[0] = 2.0
    before = sae.W_dec.detach().clone()
    steps(sae, opt, data(), start=1, stop=2)
    return (sae.W_dec.detach() - before).norm(dim=1)


def test_r5_a_latent_of_double_worth_moves_twice_as_far():
    usual = moves(latent_lr_low=1.0, latent_lr_high=1.0)
    assert torch.isclose(moves()[0] / usual[0], torch.tensor(2 / (65 / 64)), rtol=0.1)
    assert torch.allclose(moves()[1:] / usual[1:], torch.tensor(64 / 65), rtol=0.1)


def test_r5_a_latent_of_double_worth_pays_half():
    sae, _ = build("zscore_r5", data())
    out = sae(rows()[:256])
    sae.worth[0] = 2.0
    price = torch.full((64,), 65 / 64)
    price[0] /= 2
    paid = 0.01 * (out.acts * price).sum(1).mean() / D_IN**0.5
    assert torch.isclose(sae.losses(out)["worth_l1"], paid)


def test_r5_worth_is_the_mean_act():
    sae = after("zscore_r5", 60)
    acts = evaluate(sae, rows())[2]
    assert torch.corrcoef(torch.stack([sae.worth, acts.mean(0)]))[0, 1] > 0.8


# ---- r6 to r9: what the encoder reads, and attention ---------------------------------------------


def test_r6_a_rows_length_does_not_matter_unless_it_is_below_eps():
    sae, _ = build("zscore_r6", data())
    x = rows()[:64]
    with torch.no_grad():
        acts = sae(x).acts
        assert (acts > 0).any() and torch.allclose(sae(3 * x).acts, acts, atol=1e-4)
        assert (sae(1e-9 * x).acts - acts).abs().max() > 0.1
        assert torch.allclose(sae(3 * x).x_hat - 0.3 * x, 3 * (sae(x).x_hat - 0.1 * x), rtol=1e-3,
                              atol=0.05)


def reads(sae, x):
    """What the encoder reads of rows x."""
    shift, size = sae.row_norm(x)
    return (x - shift) / size


def test_r7_the_encoder_reads_the_blend_and_its_share_is_learned():
    sae = after("zscore_r7", 100, "lengths")
    x, g = rows("lengths"), sae.blend.sigmoid()
    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.norm(dim=1, keepdim=True) / D_IN**0.5)
    assert torch.allclose(reads(sae, x), g * normed + (1 - g) * x, atol=1e-4)
    assert abs(g - 0.95) > 0.003


def attended(sae, acts):
    """The formula of zscore_r8, row by row."""
    found = torch.zeros_like(acts)
    for b, row in enumerate(acts):
        on = row.nonzero().flatten()
        query = (row[on, None] * sae.W_query[on]).sum(0) / row[on].sum()
        context = (sae.W_key[on] @ query).softmax(0) @ sae.W_value[on]
        found[b, on] = row[on] * (1 + sae.attend_scale.tanh() * (sae.W_read[on] @ context).tanh())
    return found


@pytest.mark.parametrize("d_sae", [64, 256])  # the dense and the sparse path
def test_r8_what_fires_is_weighed_by_its_row_and_nothing_else_fires(d_sae):
    sae, _ = build("zscore_r8", data(), d_sae=d_sae)
    sae.attend_scale.data.fill_(1.0)
    with torch.no_grad():
        pre = sae.pre_acts(reads(sae, rows()[:64]))
        found, sae.attend = sae.activate(pre), False
        plain = sae.activate(pre)
        assert torch.allclose(found, attended(sae, plain), atol=1e-5)
    assert torch.equal(found > 0, plain > 0) and (found / plain)[plain > 0].std() > 0.03


def test_r8_the_scale_of_attention_is_learned():
    assert after("zscore_r8", 100).attend_scale.abs() > 0.02


def test_r9_the_encoder_reads_four_powers_and_their_weights_are_learned():
    sae = after("zscore_r9", 100, "lengths")
    x = rows("lengths")
    w, kept = sae.power_logits.softmax(0), sae.power_kept.sigmoid()
    assert w.std() > 0.01
    sae.multiscale = False
    shift, size = sae.row_norm(x)
    sae.multiscale = True
    known = sum(w[i] * ((1 - kept[i]) * (x - shift) / size**p + kept[i] * x)
                for i, p in enumerate((0.1, 0.5, 1.0, 2.0)))
    assert torch.allclose(reads(sae, x), known, atol=1e-3)

"""Each row of the contrastive study, and each mix-in that it is made of, does what it says and
moves what it is meant to move, against the row before it on the same seed."""
import functools

import pytest
import torch

from sae import Out, Refuse, generator, load_variant, unit
from toys import (D_IN, build, cosines, evaluate, gini, mixture, normalised, orthonormal, steps,
                  train, train_py)

MUTANTS = [
    "grad_balance:balance_strength=0.0", "grad_balance:balance_eps=1e-9",
    "grad_balance:-before_step", "latent_lr:latent_lr_power=0.0", "latent_lr:latent_lr_high=1.0",
    "latent_lr:-after_step", "latent_l1:latent_l1_power=0.0", "latent_l1:-sparsity",
    "latent_l1:-penalties", "prune:prune_every=0.0", "prune:prune_threshold=2.0",
    "prune:prune_near=0", "revive:revive_every=0.0", "revive:revive_from=random",
    "revive:revive_silent=2.0", "contrastive_r1:contrast_weight=0.0",
    "contrastive_r1:con_rule=note", "contrastive_r1:jl_dim=9999", "contrastive_r1:con_nearest=1",
    "contrastive_r2:con_tau_end=0.4", "contrastive_r2:-tau", "contrastive_r3:-l1_weights",
    "contrastive_r3:lambda_low_end=0.02", "contrastive_r3:lambda_high_end=1.0",
    "contrastive_r4:diversity_weight=0.0", "contrastive_r4:div_product=batch",
    "contrastive_r4:diversity_warmup=0.0", "contrastive_r5:gs_strength=0.0",
    "contrastive_r5:gs_every=0.0", "contrastive_r5:gs_eps=1e-6", "contrastive_r5:-init_from_data",
    "contrastive_r6:balance_strength=0.0", "contrastive_r7:group_share=1.0",
    "contrastive_r7:group_lasso_weight=0.0", "contrastive_r7:group_cosine_weight=0.0",
    "contrastive_r7:group_cosine_warmup=0.0", "contrastive_r7:-penalty_scale",
    "contrastive_r7:-after_step",
    "contrastive_r8:sample_strength=0.0", "contrastive_r8:sample_unbias=0.0",
    "contrastive_r8:sample_momentum=0.0", "contrastive_r8:-move_scale",
    "contrastive_r8:-recon_error", "contrastive_r8:-cost", "contrastive_r8:-wanted_l0",
    "contrastive_r8:-after_step", "contrastive_r9:wta_strength=0.0",
    "contrastive_r9:competition_weight=0.0", "contrastive_r9:wta_gated=False",
    "contrastive_r9:wta_hot=0.2", "contrastive_r9:wta_silent=0.0", "contrastive_r9:wta_radius=1",
    "contrastive_r10:hard_block=0", "contrastive_r10:decorrelation_weight=0.0",
    "contrastive_r10:prune_every=0.0", "contrastive_r10:revive_every=0.0",
    "contrastive_r10:-before_step", "contrastive_r10:-after_step", "contrastive_r10:-reset_latents"]

X = mixture()[0]
CORRELATED = mixture(correlated=0.8)[0]


@functools.cache
def trained(name, seed=0, correlated=False, **settings):
    """A trained SAE, and its acts on the last rows."""
    x = CORRELATED if correlated else X
    sae = train(name, x, 300, seed, **settings)
    return sae, evaluate(sae, x[-8192:])[2]


def pair(measure, child, parent, **settings):
    """measure(sae, acts) of the child and of its parent, which reach the same L0."""
    found = [trained(name, **settings) for name in (child, parent)]
    l0 = [float((acts > 0).sum() / len(acts)) for _, acts in found]
    assert abs(l0[0] / l0[1] - 1) < 0.05
    return [float(measure(sae, acts)) for sae, acts in found]


def start(name, x=X, **settings):
    """An untrained variant in which all latents fire equally often, and its optimizer."""
    sae, opt = build(name, x, **settings)
    sae.rate.fill_(0.1)
    return sae, opt


def out_of(acts):
    """Out of given acts; all else is 0."""
    zeros = torch.zeros(len(acts), D_IN)
    return Out(zeros, acts, acts, zeros)


def rates(acts):
    return (acts > 0).float().mean(0)


def unevenness(_, acts):
    return gini(rates(acts))


def used(acts, n=32):
    return rates(acts).topk(n).indices


def double(sae, copies, originals):
    """Make latents `copies` the doubles of `originals`, but for a trace."""
    noise = 0.02 * torch.randn(len(copies), D_IN, generator=generator("double"))
    with torch.no_grad():
        sae.W_dec[copies] = unit(sae.W_dec[originals] + noise)
        sae.W_enc[:, copies] = sae.W_enc[:, originals] + sae.W_enc.norm(dim=0).mean() * noise.T


# ---- grad_balance --------------------------------------------------------------------------------


def move_spread(name, **settings):
    """Longest over median move of the encoder's columns, mean over some steps."""
    sae, opt = build(name, X, **settings)
    before = [sae.W_enc.detach().clone()]
    spread = []

    def watch(sae, *_):
        length = (sae.W_enc.detach() - before[0]).norm(dim=0)
        spread.append(length.max() / length.median())
        before[0] = sae.W_enc.detach().clone()

    steps(sae, opt, X, each=watch, stop=40)
    return float(torch.stack(spread[10:]).mean())


@pytest.mark.parametrize("name", ["grad_balance", "contrastive_r6"])
def test_balanced_latents_move_by_one_length(name):
    assert move_spread(name) < 1.05 < 1.2 < move_spread(name, balance_strength=0.0)


def test_no_move_is_lengthened_more_than_one_over_eps_times():
    sae, _ = start("grad_balance")
    lengths = torch.tensor([[1.0, 2.0, 3.0, 0.0, 1e-6, 6.0]])
    balanced = lengths * sae.balance_factor(lengths, 0)
    assert torch.allclose(balanced, torch.tensor([[2.0, 2, 2, 0, 1e-5, 2]]))


def test_the_note_s_form_balances_gradients():
    for of, most in (("gradient", 1.001), ("move", 100.0)):
        sae, opt = start("grad_balance", balance_of=of)
        for p in sae.parameters():
            p.grad = torch.randn(p.shape, generator=generator("grad"))
        sae.W_enc.grad[:, 3] *= 5
        sae.before_step(opt)
        norms = sae.W_enc.grad.norm(dim=0)
        assert norms.max() / norms.min() < most
        assert of == "gradient" or norms[3] > 2 * norms.median()


# ---- latent_lr -----------------------------------------------------------------------------------


def first_moves(rate, **settings):
    """Lengths of the encoder columns' moves in a first step at given rates [d_sae]."""
    sae, opt = build("latent_lr", X, **settings)
    sae.rate.copy_(rate)
    before = sae.W_enc.detach().clone()
    steps(sae, opt, X, stop=1)
    return (sae.W_enc.detach() - before).norm(dim=0)


def test_a_rare_latent_moves_more_within_bounds():
    rate = torch.full((64,), 0.1)
    rate[:4] = torch.tensor([0.4, 0.025, 0.0, 0.1])
    moved = first_moves(rate) / first_moves(rate, **load_variant("latent_lr").off)
    factor = (rate.mean() / rate[:2]).sqrt()
    assert torch.allclose(moved[:4], torch.tensor([factor[0], factor[1], 10.0, 1.0]), rtol=0.02)


# ---- latent_l1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation,tuned", [("relu", "b_enc"), ("jumprelu", "log_threshold")])
def test_a_latent_pays_by_the_root_of_its_rate(activation, tuned):
    pull = []
    for settings in ({}, {"latent_l1_power": 0.0}):
        sae, _ = start("latent_l1", activation=activation, **settings)
        sae.rate[:32] = 0.4                                    # mean 0.25
        term = sae.losses(sae(X[:512]))["sparsity"]
        pull.append(torch.autograd.grad(term, getattr(sae, tuned))[0])
    weights = torch.cat([torch.full((32,), 1.6 ** 0.5), torch.full((32,), 0.4 ** 0.5)])
    assert torch.allclose(pull[0], weights * pull[1], rtol=1e-3)


def test_on_topk_kinds_the_frequent_pay_the_rare():
    sae, _ = start("latent_l1", activation="topk")
    sae.rate[:32] = 0.4
    out = sae(X[:512])
    paid, = torch.autograd.grad(sae.losses(out)["latent_l1"], out.acts)
    assert (paid[:, :32] > 0).all() and (paid[:, 32:] < 0).all()
    assert paid.sum().abs() < 1e-4 * paid.abs().sum()


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_latents_are_used_more_evenly(activation):
    child, parent = pair(unevenness, "latent_l1", "baseline", activation=activation)
    assert child < parent - 0.015


# ---- prune ---------------------------------------------------------------------------------------


def test_of_two_parallel_latents_the_rarer_restarts_beside_its_neighbours():
    sae, _ = start("prune", prune_threshold=load_variant("prune").prune_threshold)
    double(sae, torch.tensor([5]), torch.tensor([3]))
    with torch.no_grad():
        sae.W_dec[9] = -sae.W_dec[7]                           # antiparallel: no double
    sae.rate[3], sae.rate[5] = 0.2, 0.1
    out = sae(X[:256])
    sae.step = 4
    assert len(sae.restart(out)[0]) == 0                       # it is not due
    sae.step = 5
    which, directions = sae.restart(out)
    assert which.tolist() == [5] and sae.pruned == 1
    survivors = sae.W_dec[torch.arange(64) != 5]
    near = (unit(directions) @ survivors.T).abs()
    assert near.max() < 0.5 and (near < 1e-5).sum() == 8       # a random direction's 8 nearest


def test_pruning_leaves_no_doubles():
    left = {}
    for name in ("prune", "baseline"):
        sae, opt = start(name)
        double(sae, torch.arange(32, 48), torch.arange(16))
        steps(sae, opt, X, stop=30)
        left[name] = int((cosines(sae) > 0.8).sum())
    assert left["prune"] == 0 and left["baseline"] > 10


# ---- revive --------------------------------------------------------------------------------------


def test_silent_latents_restart_at_residuals_of_badly_reconstructed_rows():
    sae, _ = start("revive")
    x = X[:256].clone()
    x[7] *= 10
    out = sae(x)
    sae.silent[:3] = 0.1 * sae.steps
    sae.silent[3] = 0.1 * sae.steps - 1
    sae.step = 60 - 1
    which, directions = sae.restart(out)
    assert which.tolist() == [0, 1, 2] and sae.revived == 3
    residuals = out.x - out.x_hat
    rows = (unit(directions) @ unit(residuals).T).argmax(1)
    assert torch.allclose(directions, residuals[rows])
    assert 7 in rows and len(rows.unique()) == 3               # at most one latent a row
    sae.step = sae.steps - 1
    assert len(sae.restart(out)[0]) == 0                       # no time left to learn


def dead_after_a_bad_start(name, **settings):
    """Share of dead latents at the end if a third starts with biases that no row overcomes."""
    sae, opt = build(name, X, 200, aux_weight=0.0, **settings)
    sae.b_enc.data[::3] = -20.0
    steps(sae, opt, X)
    sae.step = sae.steps
    return float((rates(evaluate(sae.eval(), X[-8192:])[2]) == 0).float().mean())


def test_revived_latents_fire():
    assert dead_after_a_bad_start("revive") < 0.05
    assert dead_after_a_bad_start("revive", revive_every=0.0) > 0.3


# ---- r1, r2: the contrastive term ----------------------------------------------------------------


def largest_cosine(sae, acts):
    """Of each much used latent with another, mean over latents."""
    return cosines(sae, used(acts)).abs().amax(1).mean()


def test_r1_used_decoder_directions_come_apart():
    child, parent = pair(largest_cosine, "contrastive_r1", "baseline")
    assert child < parent - 0.04


def test_r1_the_term_is_the_excess_of_the_near_pair_alone():
    sae, _ = start("contrastive_r1", d_sae=4, l0=1.0, jl_dim=D_IN)
    e = orthonormal(4)
    sae.W_dec.data = torch.stack([e[0], 0.8 * e[0] + 0.6 * e[1], e[2], -e[3]])
    term = sae.losses(sae(X[:64]))["contrast"]
    assert term.item() == pytest.approx(2 * (0.8 - 0.4) ** 2 / 4, rel=1e-4)
    assert sae.stats["con_pairs"] == 1 and sae.stats["jl_error"] < 1e-6
    to_W, = torch.autograd.grad(term, sae.W_dec)
    assert (to_W[:2].norm(dim=1) > 0.01).all() and not to_W[2:].any()
    sae.rate.copy_(torch.tensor([0.4, 0.1, 0.0, 0.3]))         # v = sqrt(rate / mean), mean 0.2
    assert sae.contrast().item() == pytest.approx(2 * (2 * 0.5) ** 0.5 * 0.4 ** 2 / 4, rel=1e-4)
    sae.con_rule = "note"
    assert sae.contrast().item() == pytest.approx(2 * 0.4 * 0.1 * 0.4 ** 2 / 12, rel=1e-4)


def test_r1_all_near_latents_of_one_are_found():
    sae, _ = start("contrastive_r1", d_sae=4, l0=1.0, jl_dim=D_IN)
    e = orthonormal(4)
    sae.W_dec.data = unit(e[0] + 0.3 * e)
    sae.contrast()
    assert sae.stats["con_pairs"] == 6


@pytest.mark.parametrize("d_in,k,given", [(128, 32, {}), (1024, 128, {}), (512, 32, {"jl_dim": 32}),
                                           (64, 64, {"jl_dim": 512})])
def test_r1_the_projection_s_cosines_are_off_by_the_known_amount(d_in, k, given):
    """Their variance is 1 / k - 1 / d_in; k is a quarter of d_in, at most 128, unless given."""
    x = torch.randn(512, d_in, generator=generator("rows"))
    sae, _ = start("contrastive_r1", x, d_sae=1024, **given)
    sae.contrast()
    expected = (1 / k - 1 / d_in) ** 0.5
    assert float(sae.stats["jl_error"]) == pytest.approx(expected, rel=0.15, abs=1e-5)
    P = sae.projection()
    assert torch.allclose(P.T @ P, d_in / k * torch.eye(k), atol=1e-3)


def test_r1_believes_no_rough_cosine_and_the_note_s_form_does():
    x = torch.randn(512, 512, generator=generator("rows"))
    pairs = {}
    for rule in ("nearest", "note"):
        sae, _ = start("contrastive_r1", x, d_sae=1024, con_rule=rule, con_tau=0.25)
        W = sae.W_dec.data
        W[1::2] = unit(W[::2] + W[1::2])                       # 512 pairs of a cosine of about 0.7
        sae.contrast()
        pairs[rule] = int(sae.stats["con_pairs"])
    assert 0.99 * 512 <= pairs["nearest"] <= 512 < 1.5 * 512 < pairs["note"]


def test_r1_no_near_pair_is_missed_for_good():
    """In 8 of 32 dimensions one projection finds some of the pairs, the next finds others."""
    sae, _ = start("contrastive_r1", con_nearest=1, con_tau=0.5)
    W = sae.W_dec.data
    W[1::2] = unit(W[::2] + W[1::2])
    pushed = []
    for sae.step in range(8):
        to_W, = torch.autograd.grad(sae.contrast(), sae.W_dec)
        pushed.append(to_W.norm(dim=1) > 0)
    pushed = torch.stack(pushed)
    assert pushed.any(0).float().mean() > 0.95 > 0.8 > pushed.float().mean()


def test_r2_used_decoder_directions_come_apart_further():
    child, parent = pair(largest_cosine, "contrastive_r2", "contrastive_r1")
    assert child < parent - 0.06


def test_r2_tau_goes_from_its_start_to_its_end_by_a_cosine():
    sae, _ = start("contrastive_r2")
    taus = []
    for sae.step in (0, 75, 150, 300):
        taus.append(sae.tau())
    assert taus == pytest.approx([0.4, 0.2 + 0.2 * (1 + 0.5 ** 0.5) / 2, 0.3, 0.2])


# ---- r3, r4: who fires, and together with whom ---------------------------------------------------


def test_r3_latents_are_used_more_evenly():
    child, parent = pair(unevenness, "contrastive_r3", "contrastive_r2")
    assert child < parent - 0.05


def test_r3_lambda_is_relative_use_within_bounds_that_shrink():
    sae, _ = start("contrastive_r3", d_sae=4, l0=1.0)
    sae.rate.copy_(torch.tensor([0.32, 0.06, 0.0, 0.02]))      # mean 0.1
    assert torch.allclose(sae.l1_weights(), torch.tensor([1.0, 0.3, 0.02, 0.1]))
    sae.step = sae.steps
    assert torch.allclose(sae.l1_weights(), torch.tensor([0.5, 0.3, 0.01, 0.1]))


def share_with_a_double(sae, acts):
    """Share of the used latents that another one nearly always fires with."""
    return (sae.column_cosines(acts, used(acts)).fill_diagonal_(0) > 0.5).any(1).float().mean()


def test_r4_fewer_latents_have_one_that_fires_with_them():
    """Where pairs of features fire together two latents for both can be told apart."""
    child, parent = pair(share_with_a_double, "contrastive_r4", "contrastive_r3", correlated=True,
                         activation="batch_topk")
    assert child < 0.75 * parent


def diversity(acts, **settings):
    """The term on given acts, all latents alike, after its warm-up."""
    sae, _ = start("contrastive_r4", d_sae=acts.shape[1], l0=1.0, **settings)
    sae.step = sae.steps // 2
    return float(sae.losses(out_of(acts))["diversity"] / sae.diversity_weight)


def test_r4_the_term_is_the_product_of_the_halves_cosines():
    acts = torch.zeros(4, 4)
    acts[:, 0], acts[:, 1] = torch.tensor([1.0, 1, 1, 1]), torch.tensor([2.0, 1, 0, 0])
    assert diversity(acts) == pytest.approx(2 * 0.5 / 4, rel=1e-4)         # 0.707 in both halves
    acts[1, 1] = 0
    assert diversity(acts) == pytest.approx(0, abs=1e-6)           # together in one half alone


def test_r4_firing_together_by_chance_costs_nothing_but_in_the_note_s_form():
    acts = (torch.rand(256, 64, generator=generator("fires")) < 0.03).float()
    assert abs(diversity(acts)) < 0.25 * diversity(acts, div_product="batch")


def test_r4_a_latent_that_is_silent_in_a_half_does_not_blow_up_jumprelus_gradient():
    norms = []
    train("contrastive_r4", X, 80, activation="jumprelu", micro_batches=2,
          each=lambda sae, *_: norms.append(float(sae.stats["grad_norm"])))
    assert max(norms) < 10


def test_r4_the_weight_rises_over_half_of_the_run():
    sae, _ = start("contrastive_r4")
    scales = []
    for sae.step in (0, 75, 150, 300):
        scales.append(sae.penalty_scale("diversity"))
    assert scales == [0, 0.5, 1, 1]


# ---- r5: Gram-Schmidt ----------------------------------------------------------------------------


def raw_coherence(sae, acts):
    """Mean |cosine| of two latents' learned encoder columns, weighted by how often both fire."""
    W = unit(sae.W_enc.detach().T)
    both = ((acts > 0).float().T @ (acts > 0).float()).fill_diagonal_(0)
    return ((W @ W.T).abs() * both).sum() / both.sum()


def test_r5_latents_that_fire_together_learn_to_listen_apart():
    """Not only what Gram-Schmidt makes of the columns: the columns themselves."""
    child, parent = pair(raw_coherence, "contrastive_r5", "contrastive_r4")
    assert child < parent - 0.004


def test_r5_a_block_is_what_modified_gram_schmidt_gives():
    sae, _ = start("contrastive_r5", gs_eps=0.0)
    sae.step = sae.steps
    W, found = sae.W_enc.detach().T, sae.encoder().detach().T
    for block in sae.gs_order.view(-1, sae.gs_block):
        rows = unit(W[block])
        for i in range(len(rows)):
            rows[i] = unit(rows[i])
            rows[i + 1:] -= (rows[i + 1:] @ rows[i])[:, None] * rows[i]
        assert torch.allclose(unit(found[block]) @ rows.T, torch.eye(sae.gs_block), atol=1e-4)
    assert sorted(sae.gs_order.tolist()) == list(range(64))
    sae.step = 0
    assert torch.equal(sae.encoder(), sae.W_enc)               # it begins gently


def test_r5_pre_activations_are_made_with_these_columns():
    sae, _ = start("contrastive_r5")
    sae.step = sae.steps
    x = X[:64]
    made = (x - sae.b_dec) @ sae.encoder() + sae.b_enc
    assert torch.allclose(sae.pre_acts(x), made, atol=1e-4)
    assert (sae.encoder() - sae.W_enc).norm() > 0.1 * sae.W_enc.norm()


def test_r5_the_second_of_two_equal_columns_fades():
    sae, _ = start("contrastive_r5")
    sae.step = sae.steps
    first, second = sae.gs_order[:2]
    sae.W_enc.data[:, second] = sae.W_enc.data[:, first]
    norms = (sae.encoder().norm(dim=0) / sae.W_enc.norm(dim=0)).detach()
    assert norms[first] == pytest.approx(1.01 ** -0.5, rel=1e-4)
    assert 0.05 < norms[second] < 0.15


def test_r5_blocks_hold_latents_that_fire_together():
    sae, opt = start("contrastive_r5")
    assert sae.gs_order.tolist() != list(range(64))            # they come from the first sample
    fires = (torch.rand(4096, 8, generator=generator("fires")) < 0.2).float()
    team = torch.randperm(64, generator=generator("team")) % 8
    sae.form_blocks(fires[:, team])
    assert all(len(team[block].unique()) == 1 for block in sae.gs_order.view(-1, 8))
    steps(sae, opt, X, start=28, stop=29)                      # not yet due
    before = sae.gs_order.clone()
    steps(sae, opt, X, start=29, stop=30)
    assert not torch.equal(sae.gs_order, before)


# ---- r7: groups ----------------------------------------------------------------------------------


def group_energy(acts, n_groups=8):
    return acts.pow(2).unflatten(1, (n_groups, -1)).sum(-1)


def groups_per_row(_, acts):
    return (group_energy(acts) > 0).sum(1).float().mean()


def test_r7_a_row_uses_fewer_groups():
    child, parent = pair(groups_per_row, "contrastive_r7", "contrastive_r6")
    assert child < parent - 0.5


def test_r7_only_the_strongest_groups_of_a_row_fire():
    sae, _ = start("contrastive_r7")
    x = X[:256]
    assert (group_energy(sae.pre_acts(x).relu()) > 0).sum(1).max() > 2     # all may at first
    sae.step = sae.steps
    sae.group_energy.copy_(torch.rand(8, generator=generator("energy")) + 0.5)
    whole = super(type(sae), sae).pre_acts(x)
    score = group_energy(whole.relu()) / sae.group_energy
    fires = group_energy(sae.pre_acts(x).relu()) > 0
    assert fires.sum(1).max() == 2
    assert (score.where(fires, torch.inf).amin(1) >= score.where(~fires, 0).amax(1)).all()


def test_r7_a_group_s_usual_energy_is_followed():
    sae, acts = trained("contrastive_r7")
    assert torch.allclose(sae.group_energy, group_energy(acts).mean(0), rtol=0.3)


def test_r7_penalties_have_known_values_and_follow_the_sparsity_weight():
    sae, _ = start("contrastive_r7", d_sae=16, l0=1.0)
    acts = torch.zeros(2, 16)
    acts[0, :2], acts[1, 2:4], acts[:, 4] = torch.tensor([3.0, 4]), torch.tensor([6.0, 8]), 5.0
    for sae.step, share in ((0, 0.0), (sae.steps // 4, 0.5), (sae.steps // 2, 1.0)):
        sae.sparsity_scale.fill_(0.5)
        terms = sae.losses(out_of(acts))
        lasso = sae.group_lasso_weight * 0.5 * (5 + 10 + 2 * 5) / 2 / D_IN ** 0.5
        cosine = sae.group_cosine_weight * 0.5 * 2 * 0.5 ** 0.5 / 28
        assert terms["group_lasso"].item() == pytest.approx(lasso, rel=1e-4)
        assert terms["group_cosine"].item() == pytest.approx(share * cosine, rel=0.03, abs=1e-7)


def test_r7_in_the_note_s_form_a_group_has_one_length_on_all_rows():
    sae, _ = start("contrastive_r7", group_norm="forward")
    sae.step = sae.steps
    sae.group_length.data.copy_(1 + torch.arange(8))
    lengths = group_energy(sae.pre_acts(X[:64]).relu()).sqrt()
    expected = (1 + torch.arange(8.0)).expand(64, 8)
    assert torch.allclose(lengths[lengths > 0], expected[lengths > 0], rtol=1e-3)
    assert ((lengths > 0).sum(1) == 2).all()


def test_r7_no_number_of_groups_ends_in_a_raw_error():
    for n in (1, 8, 64):
        sae, opt = start("contrastive_r7", n_groups=n)
        steps(sae, opt, X, start=250, stop=251)
    with pytest.raises(Refuse, match="n_groups"):
        start("contrastive_r7", n_groups=65)


# ---- r8: rates of groups, rows by their error ----------------------------------------------------


@functools.cache
def rare(seed):
    """4,096 rows, one in a hundred of a kind of its own, with much longer features; 8,192 more."""
    x = mixture(n_rows=4096 + 8192, features=32, l0=3.0, seed=seed)[0]
    g = generator("rare", seed)
    directions = unit(torch.randn(8, D_IN, generator=g))
    of_this_kind = torch.rand(len(x), 1, generator=g) < 0.01
    on = (torch.rand(len(x), 8, generator=g) < 0.5).float()
    size = 8 / 3 * (D_IN / 8) ** 0.5 * (1 + torch.rand(len(x), 8, generator=g))
    x = normalised(x + of_this_kind * ((on * size) @ directions))
    return x[:4096], x[4096:]


def worst_decile(seed, **settings):
    """Mean error of the worst tenth of held-out rows, after three passes over the others."""
    x, held_out = rare(seed)
    sae = train("contrastive_r8", x, 400, seed, batch_size=32, activation="topk", **settings)
    with torch.no_grad():
        return float(sae.recon_error(sae(held_out)).topk(len(held_out) // 10).values.mean())


def test_r8_the_worst_rows_are_reconstructed_better_where_hard_ones_are_rare():
    for seed in (0, 1):
        assert worst_decile(seed) < 0.98 * worst_decile(seed, sample_strength=0.0)


def sampled(**settings):
    """r8 with all rows of a shard of 1,000 seen, ten of them with ten times the error."""
    sae, opt = start("contrastive_r8", **settings)
    sae.shard, sae.position = 3, 0
    sae.row_shard.fill_(3)
    sae.row_error[:1000] = 0.1
    sae.row_error[:10] = 1.0
    return sae, opt


def draws(sae, times=200):
    """How often each of 1,000 rows is drawn, and its weights' sum, as shares of all draws."""
    counts, weighted = torch.zeros(1000), torch.zeros(1000)
    for sae.step in range(times):
        chosen = sae.choose_batch(1000, None)
        if isinstance(chosen, slice):
            chosen = torch.arange(1000)[chosen]
        weight = torch.ones(len(chosen)) if sae.row_weight is None else sae.row_weight
        counts += torch.bincount(chosen, minlength=1000)
        weighted += torch.bincount(chosen, weight, minlength=1000)
    return counts / (256 * times), weighted / (256 * times)


def test_r8_rows_of_large_error_come_more_often_and_count_less():
    sae, _ = sampled()
    drawn, weight = draws(sae)
    q = 0.5 / 1000 + 0.5 * 1.0 / (10 * 1.0 + 990 * 0.1)
    assert float(drawn[:10].mean()) == pytest.approx(q, rel=0.05)
    assert float(weight[:10].mean()) == pytest.approx(1 / 1000, rel=0.05)      # unbiased
    assert float(weight[10:].mean()) == pytest.approx(1 / 1000, rel=0.01)
    assert sae.stats["rows_known"] == 1 and sae.stats["drawn_error"] > 1.15
    assert not load_variant("contrastive_r8").paired


def test_r8_errors_are_of_the_rows_of_the_shard_in_memory():
    sae, _ = sampled(sample_rows=500)
    assert len(sae.row_error) == 500
    drawn, weight = draws(sae)                                 # the other 500 count as the mean
    assert float(drawn[500:].mean() / drawn[10:500].mean()) == pytest.approx(1.07, abs=0.05)
    assert float(weight[500:].mean()) == pytest.approx(1 / 1000, rel=0.02)
    sae.shard = 4                                      # other rows: nothing is known of them
    drawn, weight = draws(sae)
    assert sae.stats["rows_known"] == 0
    assert float(drawn[:10].mean()) == pytest.approx(1 / 1000, rel=0.1)
    assert torch.allclose(sae.row_weight, torch.ones(256))


@pytest.mark.parametrize("parts", [1, 4])
def test_r8_errors_are_remembered_and_all_that_a_row_costs_is_weighted(parts):
    sae, opt = sampled(micro_batches=parts)
    chosen = sae.choose_batch(1000, None)
    weights = sae.l1_weights()
    out, terms, _ = train_py.train_step(sae, opt, X[:1000][chosen])
    error = (out.x - out.x_hat).pow(2).mean(1)
    l1 = (out.acts * weights).sum(1) / D_IN ** 0.5
    assert float(terms["recon"]) == pytest.approx(float((error * sae.row_weight).mean()), rel=1e-5)
    paid = float((l1 * sae.row_weight).mean()) * sae.sparsity_weight
    assert float(terms["sparsity"]) == pytest.approx(paid, rel=1e-4)
    for row, new in zip(chosen.tolist(), error.tolist()):
        old = 1.0 if row < 10 else 0.1
        assert float(sae.row_error[row]) == pytest.approx((old + new) / 2, rel=1e-4)


def test_r8_the_l0_that_is_held_is_that_of_the_data_and_not_of_the_rows_drawn():
    loud = torch.rand(len(X), 1, generator=generator("loud")) < 0.1
    x = normalised(torch.where(loud, 3 * X, X))                # more latents fire there
    sae = train("contrastive_r8", x, 200)
    assert float(sae.l0_ratio) > 1.08
    assert evaluate(sae, x[-8192:])[1] == pytest.approx(sae.l0, rel=0.05)


def test_r8_a_group_of_little_energy_moves_more_and_all_its_latents_alike():
    sae, _ = start("contrastive_r8")
    sae.group_energy.copy_(torch.cat([torch.full((7,), 0.04), torch.tensor([0.01])]))
    scale = sae.move_scale().view(8, 8)
    assert torch.equal(scale, scale[:, :1].expand(8, 8))
    assert float(scale[7, 0] / scale[0, 0]) == pytest.approx(2.0)


# ---- r9: winner takes all ------------------------------------------------------------------------


def neighbours_together(sae, acts):
    """Pairs of latents at most 2 apart that fire on the same row, mean over rows."""
    fires = (acts > 0).float()
    return sum((fires[:, :-d] * fires[:, d:]).sum(1).mean() for d in (1, 2))


def test_r9_neighbours_fire_together_less():
    child, parent = pair(neighbours_together, "contrastive_r9", "contrastive_r8")
    assert child < 0.7 * parent


def competing(pre, step=300, **settings):
    """What r9 makes of pre-activations that latents 10 .. have on every row; the others have -1."""
    sae, _ = start("contrastive_r9", group_share=1.0, gs_strength=0.0, **settings)
    sae.step = step
    sae.W_enc.data.zero_()
    sae.b_enc.data.fill_(-1.0)
    sae.b_enc.data[10:10 + len(pre)] = torch.tensor(pre)
    return sae


def answer(sae, n=5):
    found = sae.pre_acts(torch.zeros(1, D_IN))[0]
    assert (found[:10] == -1).all()
    return found[10:10 + n]


def test_r9_a_winner_keeps_its_value_a_close_loser_fades_and_a_far_one_falls_silent():
    sae = competing([2.0, 1.8, 0.2, 1.0, -1.0], wta_radius=1)
    fade = torch.tensor(-0.1 / 0.2).exp()
    assert torch.allclose(answer(sae), torch.tensor([2.0, 1.8 * fade, 0.0, 1.0, -1.0]))
    assert sae.stats["silenced"] == 1


def test_r9_a_latent_competes_within_the_radius_alone():
    spread = [2.0, -1.0, 0.2, -1.0, -1.0, 0.2]                 # 2 and 5 apart; 64 / (8 x 4) = 2
    assert (answer(competing(spread), 6)[[2, 5]] > 0).tolist() == [False, True]
    assert (answer(competing(spread, wta_radius=5), 6)[[2, 5]] > 0).tolist() == [False, False]


def test_r9_the_competition_is_mild_at_first():
    values = [2.0, 0.2]
    assert answer(competing(values, step=0), 2)[1] > 0.05
    assert answer(competing(values, step=45), 2)[1] == 0       # three quarters of the way
    assert competing(values, step=0).temperature() == pytest.approx(1.0)
    assert competing(values, step=60).temperature() == pytest.approx(0.2)


def test_r9_a_gate_decides_who_wins_and_is_learned():
    sae = competing([2.0, 1.8])
    sae.gate.data[11] = 1.0                                    # a factor of 1.46 on its score
    first, second = answer(sae, 2)
    assert second.item() == pytest.approx(1.8) and first < 1.0
    assert trained("contrastive_r9")[0].gate.std() > 0.01


def test_r9_a_losers_gradient_fades_as_its_value_does_and_its_winner_is_not_pushed_down():
    sae = competing([2.0, 1.8], wta_radius=1)
    sae.pre_acts(torch.zeros(1, D_IN))[0, 11].backward()       # of the loser's value
    fade = torch.tensor(-0.1 / 0.2).exp()
    assert torch.allclose(sae.b_enc.grad[10:12], torch.tensor([0.0, fade]))


def test_r9_competition_is_what_neighbours_do_beside_each_other():
    acts = torch.zeros(2, 64)
    acts[0, 20], acts[0, 22], acts[0, 30] = 2.0, 3.0, 5.0
    sae, _ = start("contrastive_r9")
    term = sae.losses(out_of(acts))["competition"]
    assert term.item() == pytest.approx(0.1 * 2 * 2 * 3 / 2 / D_IN, rel=1e-4)


# ---- r10: hard orthogonality ---------------------------------------------------------------------


def off_identity(rows):
    """Largest difference between the Gram matrix of rows [..., n, d_in] and the identity."""
    return float((rows @ rows.mT - torch.eye(rows.shape[-2])).abs().max())


def blocks(sae):
    return sae.W_dec.detach().view(-1, 16, D_IN)


def test_r10_blocks_of_the_decoder_are_orthonormal_after_every_step():
    sae, opt = start("contrastive_r10")
    assert off_identity(blocks(sae)) < 1e-5                    # from the start
    worst = []
    steps(sae, opt, X, start=100, stop=110,
          each=lambda sae, *_: worst.append(off_identity(blocks(sae))))
    assert max(worst) < 1e-4
    sae, opt = start("contrastive_r9")
    assert off_identity(blocks(sae)) > 0.1


def test_r10_a_dictionary_that_fits_is_orthonormal_throughout():
    sae = train("contrastive_r10", X, 30, d_sae=32, l0=3.0)
    assert off_identity(sae.W_dec.detach()) < 1e-4


def test_r10_gradients_stay_tangent_to_the_orthonormal_frames():
    sae, opt = start("contrastive_r10")
    for p in sae.parameters():
        p.grad = torch.randn(p.shape, generator=generator("grad"))
    sae.before_step(opt)
    G = sae.W_dec.grad.view(-1, 16, D_IN)
    across = G @ blocks(sae).mT
    assert (across + across.mT).abs().max() < 1e-4 * G.norm() < across.abs().max()


def test_r10_a_restarted_latent_leaves_the_others_of_its_block_where_they_are():
    sae, opt = start("contrastive_r10")
    before = sae.W_dec.detach().clone()
    direction = unit(torch.randn(1, D_IN, generator=generator("direction")))
    with torch.no_grad():
        sae.reset_latents(opt, torch.tensor([5]), direction, X[:256])
    others = torch.arange(64) != 5
    assert torch.allclose(sae.W_dec[others], before[others], atol=1e-5)
    block = before[[i for i in range(16) if i != 5]]
    assert torch.allclose(sae.W_dec[5], unit(direction - direction @ block.T @ block)[0], atol=1e-5)
    assert off_identity(blocks(sae)) < 1e-5


@pytest.mark.parametrize("block", [24, 64])
def test_r10_a_block_that_does_not_fit_is_refused(block):
    with pytest.raises(Refuse, match="hard_block"):
        start("contrastive_r10", hard_block=block)


def test_r10_decorrelation_is_of_what_varies():
    sae, _ = start("contrastive_r10", d_sae=4, l0=1.0, hard_block=2, n_groups=2)
    g = generator("acts")
    acts = torch.zeros(4096, 4)
    acts[:, 0] = 1 + torch.rand(4096, generator=g)
    acts[:, 1] = 1 + torch.rand(4096, generator=g)             # always on, but not together with 0
    varies = sae.losses(out_of(acts))["decorrelation"]
    acts[:, 1] = 2 * acts[:, 0]
    together = sae.losses(out_of(acts))["decorrelation"]
    assert together.item() == pytest.approx(0.03 * 2 / 4, rel=1e-3)
    assert abs(varies.item()) < 0.02 * together.item()


def test_r10_of_two_parallel_latents_in_different_blocks_one_restarts():
    sae, _ = start("contrastive_r10", prune_threshold=0.8)
    with torch.no_grad():
        sae.W_dec[20] = sae.W_dec[3]
    sae.rate[3], sae.step = 0.2, 5
    which, _ = sae.restart(sae(X[:256]))
    assert which.tolist() == [20]


def test_r10_latents_that_started_dead_fire_at_the_end():
    assert dead_after_a_bad_start("contrastive_r10") < 0.1
    assert dead_after_a_bad_start("contrastive_r9") > 0.3

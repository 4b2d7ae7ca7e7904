"""Each row of the contrastive study moves what it is meant to move, against its parent on the same seeds and batches (a row that is
switched off is its parent bit for bit, as test_variants.py shows), and its mechanism gives known answers."""
import functools
from types import SimpleNamespace

import pytest
import torch

from sae import Out, Refuse, generator, unit
from toys import SEEDS, D_IN, build, cosines, evaluate, mixture, normalised, orthonormal, steps, train, train_py



@functools.cache
def rows(data="mixture"):
    return {"mixture": mixture, "correlated": lambda: mixture(correlated=0.8)}[data]()[0]


@functools.cache
def trained(name, seed, data="mixture", **settings):
    """A trained SAE and its acts on the last rows."""
    sae = train(name, rows(data), 300, seed, **settings)
    return sae, evaluate(sae, rows(data)[-8192:])[2]


def both(measure, child, parent, **settings):
    """measure(sae, acts) of the child and of its parent [2, seeds]."""
    return torch.tensor([[float(measure(*trained(name, seed, **settings))) for seed in SEEDS] for name in (child, parent)])


def l0_kept(child, parent, **settings):
    l0 = both(mean_l0, child, parent, **settings).mean(1)
    return abs(l0[0] / l0[1] - 1) < 0.1


def mean_l0(sae, acts):
    return (acts > 0).sum(1).float().mean()


def used(acts, n=32):
    return (acts > 0).float().mean(0).topk(n).indices


def latents(name, seed=0, d_sae=64, d_in=D_IN, **settings):
    """An untrained variant in which all latents fire equally often."""
    sae = build(name, torch.randn(4096, d_in, generator=generator("rows")), 100, seed, d_sae=d_sae, **settings)[0]
    if hasattr(sae, "util"):
        sae.util.fill_(0.1)
    return sae


def out_of(acts):
    return Out(torch.zeros(len(acts), D_IN), acts, acts, torch.zeros(len(acts), D_IN))


# ---- gradient balancing ----------------------------------------------------------------------------------------------------------


def move_spread(variant, seed, **settings):
    """Largest over median length of the encoder's moves, mean over the steps of a run."""
    sae, opt = build(variant, rows(), 300, seed, **settings)
    spread, before = [], [sae.W_enc.detach().clone()]

    def watch(sae, *_):
        length = (sae.W_enc.detach() - before[0]).norm(dim=0)
        spread.append(length.max() / length.median())
        before[0] = sae.W_enc.detach().clone()

    steps(sae, opt, rows(), each=watch, stop=150)
    return float(torch.stack(spread[20:]).mean())


@pytest.mark.parametrize("variant", ["grad_balance", "contrastive_r6"])
def test_balanced_latents_move_by_one_length(variant):
    for seed in SEEDS:
        assert move_spread(variant, seed) < 1.05 < 1.3 < move_spread(variant, seed, balance_strength=0.0)


def test_balancing_brings_lengths_to_their_mean_and_lengthens_by_no_more_than_one_over_eps():
    sae = latents("grad_balance", balance_eps=0.1)
    lengths = torch.tensor([[1.0, 2.0, 3.0, 0.0, 1e-6, 6.0]])
    assert torch.allclose(lengths * sae.balance_factor(lengths, 0), torch.tensor([[2.0, 2, 2, 0, 1e-5, 2]]))
    sae.balance_strength = 0.5
    halfway = (2 * lengths).sqrt()
    halfway[0, 4] = 1e-6 * 10 ** 0.5
    assert torch.allclose(lengths * sae.balance_factor(lengths, 0), halfway)


def test_the_note_s_form_balances_gradients_before_they_are_clipped():
    sae = latents("grad_balance", balance_of="gradient")
    for p in sae.parameters():
        p.grad = torch.randn(p.shape, generator=generator("grad"))
    sae.before_step(None)
    norms = sae.W_enc.grad.norm(dim=0)
    assert norms.max() / norms.min() < 1.001
    with pytest.raises(Refuse):
        latents("grad_balance", balance_of="both")


@pytest.mark.parametrize("row", range(1, 11))
def test_every_row_works_on_batch_topk(row):
    sae, acts = trained(f"contrastive_r{row}", 0, activation="batch_topk")
    assert abs(float(mean_l0(sae, acts)) / sae.l0 - 1) < 0.1
    assert evaluate(sae, rows()[-8192:])[0] > 0.5


# ---- r1, r2: the contrastive term ------------------------------------------------------------------------------------------------


def largest_cosine(sae, acts):
    """Of each much used latent with another, mean over latents."""
    return cosines(sae, used(acts)).abs().amax(1).mean()


def test_r1_used_decoder_directions_come_apart():
    for data in ("mixture", "correlated"):
        child, parent = both(largest_cosine, "contrastive_r1", "baseline", data=data)
        assert (child < parent - 0.03).all()
        assert l0_kept("contrastive_r1", "baseline", data=data)


def test_r1_the_term_is_the_excess_of_the_near_pair_alone():
    sae = latents("contrastive_r1", d_sae=4)
    e = orthonormal(4)
    sae.W_dec.data = torch.stack([e[0], 0.8 * e[0] + 0.6 * e[1], e[2], -e[3]])
    term = sae.contrast()
    assert term.item() == pytest.approx(2 * (0.8 - 0.4) ** 2 / 4, rel=1e-4)
    assert sae.stats["con_pairs"] == 1 and sae.stats["jl_error"] < 1e-6
    term.backward()
    assert (sae.W_dec.grad[:2].norm(dim=1) > 0.01).all() and not sae.W_dec.grad[2:].any()
    sae.util.copy_(torch.tensor([0.4, 0.1, 0.0, 0.3]))                       # v = sqrt(u / mean u), mean 0.2
    assert sae.contrast().item() == pytest.approx(2 * (2 * 0.5) ** 0.5 * 0.4 ** 2 / 4, rel=1e-4)
    sae.con_rule = "note"
    assert sae.contrast().item() == pytest.approx(2 * 0.4 * 0.1 * 0.4 ** 2 / 12, rel=1e-4)


@pytest.mark.parametrize("jl_dim", [32, 128, 512])
def test_r1_the_projection_s_cosines_are_off_by_the_known_amount(jl_dim):
    """The variance of a projected cosine is about 1 / jl_dim - 1 / d_in: nothing when the projection is a rotation."""
    sae = latents("contrastive_r1", d_sae=1024, d_in=512, jl_dim=jl_dim)
    sae.contrast()
    assert float(sae.stats["jl_error"]) == pytest.approx((1 / jl_dim - 1 / 512) ** 0.5, rel=0.15, abs=1e-5)
    assert torch.allclose(sae.jl.T @ sae.jl, 512 / jl_dim * torch.eye(jl_dim), atol=1e-3)


def test_r1_a_rough_projection_finds_pairs_whose_cosines_are_then_exact():
    """Near pairs are among the nearest after a projection to 128 of 512 dimensions, and the term is the same as without one; the note's
    form, which believes the projection, sees pairs that are not there."""
    terms = {}
    for jl_dim in (128, 512):
        for rule in ("nearest", "note"):
            sae = latents("contrastive_r1", d_sae=1024, d_in=512, jl_dim=jl_dim, con_rule=rule, con_tau=0.25)
            W = sae.W_dec.data
            W[1::2] = unit(W[::2] + W[1::2])                                # neighbours have a cosine of about 0.7
            sae.contrast()
            terms[jl_dim, rule] = int(sae.stats["con_pairs"])
    assert terms[512, "nearest"] == terms[512, "note"] == 512
    assert terms[128, "nearest"] >= 0.99 * 512
    assert terms[128, "note"] > 1.5 * 512


def pairs_above(sae, acts):
    return (cosines(sae, used(acts, 24)).abs() > 0.25).float().mean()


def test_r2_fewer_pairs_stay_close_than_with_a_fixed_threshold():
    child, parent = both(pairs_above, "contrastive_r2", "contrastive_r1")
    assert (child < 0.5 * parent).all()
    assert l0_kept("contrastive_r2", "contrastive_r1")


def test_r2_tau_goes_from_its_start_to_its_end_by_a_cosine():
    sae = latents("contrastive_r2", con_tau_end=0.05)
    taus = []
    for sae.step in (0, 25, 50, 100):
        taus.append(sae.tau())
    assert taus == pytest.approx([0.4, 0.05 + 0.35 * (1 + 0.5 ** 0.5) / 2, 0.225, 0.05])


# ---- r3, r4: who fires, and together with whom -----------------------------------------------------------------------------------


def gini(sae, acts):
    """Of how often latents fire: 0 all alike, 1 one does it all."""
    u = (acts > 0).float().mean(0).sort().values
    n = len(u)
    return ((2 * torch.arange(1, n + 1) - n - 1) * u).sum() / (n * u.sum())


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_r3_latents_are_used_more_evenly(activation):
    child, parent = both(gini, "contrastive_r3", "contrastive_r2", activation=activation)
    assert (child < parent - 0.01).all()
    assert l0_kept("contrastive_r3", "contrastive_r2", activation=activation)


def test_r3_lambda_is_relative_use_within_bounds_that_shrink():
    sae = latents("contrastive_r3", d_sae=4)
    sae.util.copy_(torch.tensor([0.3, 0.06, 0.0, 0.04]))                    # mean 0.1
    assert torch.allclose(sae.l1_weights(), torch.tensor([1.0, 0.6, 0.02, 0.4]))
    sae.step = sae.steps
    assert torch.allclose(sae.l1_weights(), torch.tensor([0.5, 0.5, 0.01, 0.4]))


def together(sae, acts):
    """Mean cosine of two much used latents' activations over the rows."""
    columns = acts[:, used(acts)]
    columns = columns / columns.norm(dim=0).clamp_min(1e-6)
    return (columns.T @ columns).fill_diagonal_(0).sum() / (32 * 31)


def with_a_double(sae, acts):
    """Share of the used latents that another one nearly always fires with: a cosine of their activations above 0.5."""
    columns = acts[:, used(acts)]
    columns = columns / columns.norm(dim=0).clamp_min(1e-6)
    return ((columns.T @ columns).fill_diagonal_(0) > 0.5).any(1).float().mean()


def test_r4_used_latents_are_less_often_active_together():
    """Where pairs of features fire together: two latents for each pair, both of which say both, can be told apart without loss of L0."""
    where = {"data": "correlated", "activation": "batch_topk"}
    child, parent = both(together, "contrastive_r4", "contrastive_r3", **where)
    assert (child < parent).all() and (parent - child).mean() > 0.007           # measured 0.009 to 0.021 on six seeds
    child, parent = both(with_a_double, "contrastive_r4", "contrastive_r3", **where)
    assert (child < 0.75 * parent).all()                                        # measured 0.1 to 0.5 of it
    assert l0_kept("contrastive_r4", "contrastive_r3", **where)


def test_r4_similarity_is_the_cosine_of_the_columns():
    sae = latents("contrastive_r4")
    acts = torch.zeros(3, 64)
    acts[:, 5], acts[:, 9], acts[:, 11] = torch.tensor([1.0, 1, 0]), torch.tensor([0.0, 2, 0]), torch.tensor([0.0, 0, 3])
    similar = sae.similarity(acts, torch.tensor([5, 9, 11, 20]))
    expected = torch.zeros(4, 4)
    expected[0, 1] = expected[1, 0] = 0.5 ** 0.5
    assert torch.allclose(similar, expected)


# ---- r5: Gram-Schmidt ------------------------------------------------------------------------------------------------------------


def encoder_coherence(sae, acts):
    """Mean |cosine| of the encoder directions in force of two latents, weighted by how often they fire together."""
    W = unit((sae.encoder() if hasattr(sae, "encoder") else sae.W_enc).detach().T)
    both_fire = ((acts > 0).float().T @ (acts > 0).float()).fill_diagonal_(0)
    return ((W @ W.T).abs() * both_fire).sum() / both_fire.sum()


def test_r5_encoder_directions_of_latents_that_fire_together_are_less_alike():
    child, parent = both(encoder_coherence, "contrastive_r5", "contrastive_r4")
    assert (child < parent - 0.005).all()
    assert l0_kept("contrastive_r5", "contrastive_r4")


def test_r5_a_block_is_what_modified_gram_schmidt_gives():
    sae = latents("contrastive_r5", gs_eps=0.0)
    sae.step = sae.steps
    W, found = sae.W_enc.detach().T, sae.encoder().detach().T
    for block in sae.gs_order.view(-1, sae.gs_block):
        rows = unit(W[block])
        for i in range(len(rows)):
            rows[i] = unit(rows[i])
            rows[i + 1:] -= (rows[i + 1:] @ rows[i])[:, None] * rows[i]
        cos = unit(found[block]) @ rows.T
        assert torch.allclose(cos, torch.eye(sae.gs_block), atol=1e-4)
    assert sorted(sae.gs_order.tolist()) == list(range(64))


def test_r5_the_second_of_two_equal_columns_fades():
    sae = latents("contrastive_r5")
    sae.step = sae.steps
    first, second = sae.gs_order[:2]
    sae.W_enc.data[:, second] = sae.W_enc.data[:, first]
    norms = (sae.encoder().norm(dim=0) / sae.W_enc.norm(dim=0)).detach()
    assert norms[first] == pytest.approx(1.01 ** -0.5, rel=1e-4) and norms[second] < 0.1


def test_r5_blocks_hold_latents_that_fire_together():
    sae = latents("contrastive_r5")
    fires = (torch.rand(4096, 8, generator=generator("fires")) < 0.2).float()
    team = torch.randperm(64, generator=generator("team")) % 8
    sae.form_blocks(fires[:, team])
    assert all(len(team[block].unique()) == 1 for block in sae.gs_order.view(-1, 8))


# ---- r7: groups ------------------------------------------------------------------------------------------------------------------


def group_energy(sae, acts):
    return acts.pow(2).view(len(acts), 16, -1).sum(-1)


def top_group_share(sae, acts):
    energy = group_energy(sae, acts)
    return (energy.amax(1) / energy.sum(1).clamp_min(1e-9)).mean()


def groups_per_row(sae, acts):
    return (group_energy(sae, acts) > 0).sum(1).float().mean()


def test_r7_a_row_s_energy_gathers_in_fewer_groups():
    child, parent = both(top_group_share, "contrastive_r7", "contrastive_r6")
    assert (child - parent).mean() > 0.003
    child, parent = both(groups_per_row, "contrastive_r7", "contrastive_r6")
    assert (child - parent).mean() < -0.02
    assert l0_kept("contrastive_r7", "contrastive_r6")


def test_r7_only_the_strongest_groups_of_a_row_fire():
    sae = latents("contrastive_r7", group_top=3)
    sae.step = sae.steps
    sae.group_energy.copy_(torch.rand(16, generator=generator("energy")) + 0.5)
    x = torch.randn(256, D_IN, generator=generator("x"))
    whole = super(type(sae), sae).pre_acts(x)
    score = group_energy(sae, whole.relu()) / sae.group_energy
    fires = group_energy(sae, sae.pre_acts(x).relu()) > 0
    assert fires.sum(1).max() == 3
    assert (score.where(fires, torch.inf).amin(1) >= score.where(~fires, 0).amax(1)).all()


# ---- r8: learning rates of groups, rows by their error ---------------------------------------------------------------------------


@functools.cache
def rare(seed):
    """4,096 rows of a mixture of which one in a hundred is of a kind of its own, with much longer features; and 8,192 rows more."""
    x = mixture(n_rows=4096 + 8192, features=32, l0=3.0, seed=seed)[0]
    g = generator("rare", seed)
    directions = unit(torch.randn(8, D_IN, generator=g))
    rare = torch.rand(len(x), 1, generator=g) < 0.01
    on = (torch.rand(len(x), 8, generator=g) < 0.5).float() * (1 + torch.rand(len(x), 8, generator=g))
    x = normalised(x + rare * (8 / 3 * (D_IN / 8) ** 0.5 * on @ directions))
    return x[:4096], x[4096:]


def worst_decile(seed, **settings):
    """Mean error of the worst tenth of the held-out rows, after a training that sees each row three times."""
    x, held_out = rare(seed)
    sae = train("contrastive_r8", x, 400, seed, batch_size=32, activation="topk", **settings)
    with torch.no_grad():
        return float(sae.recon_error(sae(held_out)).topk(len(held_out) // 10).values.mean())


def test_r8_the_worst_rows_are_reconstructed_better_where_hard_ones_are_rare():
    for seed in SEEDS:
        assert worst_decile(seed) < 0.98 * worst_decile(seed, sample_strength=0.0)


def sampled(**settings):
    """r8, all rows of a shard of 1000 seen, ten of them with ten times the error."""
    sae = latents("contrastive_r8", batch_size=256, **settings)
    sae.first_row, sae.position = 5000, 0
    sae.row_error[5000:6000] = 0.1
    sae.row_error[5000:5010] = 1.0
    return sae


def test_r8_rows_of_large_error_come_more_often_and_count_less():
    sae = sampled()
    counts, weighted = torch.zeros(1000), torch.zeros(1000)
    for sae.step in range(400):
        chosen = sae.choose_batch(1000, None)
        assert len(chosen) == 256 and chosen.max() < 1000
        counts += torch.bincount(chosen, minlength=1000)
        weighted += torch.bincount(chosen, sae.row_weight, minlength=1000)
    q = 0.5 / 1000 + 0.5 * 1.0 / (10 * 1.0 + 990 * 0.1)
    assert float(counts[:10].mean() / (400 * 256)) == pytest.approx(q, rel=0.05)
    assert float(weighted[:10].mean() / 400 / 256) == pytest.approx(1 / 1000, rel=0.05)     # unbiased
    assert float(weighted[10:].mean() / 400 / 256) == pytest.approx(1 / 1000, rel=0.01)


def test_r8_remembers_each_row_s_error_and_a_batch_in_parts_gets_its_own_weights():
    sae = sampled(micro_batches=4)
    opt = sae.make_optimizer()
    x = torch.randn(1000, D_IN, generator=generator("x"))
    chosen = sae.choose_batch(1000, None)
    out, terms, _ = train_py.train_step(sae, opt, x[chosen])
    error = (out.x - out.x_hat).pow(2).mean(1)
    assert float(terms["recon"]) == pytest.approx(float((error * sae.row_weight).mean()), rel=1e-5)
    for slot, new in zip((5000 + chosen).tolist(), error.tolist()):
        old = 1.0 if slot < 5010 else 0.1
        assert float(sae.row_error[slot]) == pytest.approx((old + new) / 2, rel=1e-4)


def test_r8_what_is_logged_is_of_the_data_and_not_of_the_rows_drawn():
    sae = sampled()
    x = torch.randn(1000, D_IN, generator=generator("x"))
    x[:10] *= 5                                                              # those with the large errors; more latents fire there
    logged, plain = SimpleNamespace(sae=sae, window={}), SimpleNamespace(sae=latents("baseline"), window={})
    with torch.no_grad():
        for sae.step in range(200):
            out = sae(x[sae.choose_batch(1000, None)])
            for run in (logged, plain):
                train_py.Run.watch(run, out.x, out, {})
        data = SimpleNamespace(sae=plain.sae, window={})
        train_py.Run.watch(data, x, sae(x), {})
    for key in ("mse", "variance", "l0", "l1"):
        drawn, said, true = (float(run.window[key] / run.window["n"]) for run in (plain, logged, data))
        assert said == pytest.approx(true, rel=0.02) and drawn > 1.02 * true, key


def test_r8_a_group_of_little_energy_moves_more_and_all_its_latents_alike():
    sae = latents("contrastive_r8")
    sae.group_energy.copy_(torch.cat([torch.full((15,), 0.04), torch.tensor([0.01])]))
    scale = sae.move_scale().view(16, 4)
    assert torch.equal(scale, scale[:, :1].expand(16, 4))
    assert float(scale[15, 0] / scale[0, 0]) == pytest.approx(2.0)


# ---- r9: winner takes all --------------------------------------------------------------------------------------------------------


def neighbours_together(sae, acts):
    """Pairs of latents at most 2 apart that fire on the same row, mean over rows."""
    fires = (acts > 0).float()
    return sum((fires[:, :-d] * fires[:, d:]).sum(1).mean() for d in (1, 2))


def test_r9_neighbours_fire_together_less():
    child, parent = both(neighbours_together, "contrastive_r9", "contrastive_r8")
    assert (child < 0.7 * parent).all()
    assert l0_kept("contrastive_r9", "contrastive_r8")


def test_r9_a_winner_keeps_its_value_a_close_loser_fades_and_a_far_one_falls_silent():
    sae = latents("contrastive_r9", wta_radius=1, group_top=16, wta_cold=0.2)
    sae.step = sae.steps
    sae.W_enc.data.zero_()
    sae.b_enc.data.fill_(-1.0)
    sae.b_enc.data[10:15] = torch.tensor([2.0, 1.8, 0.2, 1.0, -1.0])
    pre = sae.pre_acts(torch.zeros(1, D_IN))[0]
    fade = torch.tensor(-0.1 / 0.2).exp()
    assert torch.allclose(pre[10:15], torch.tensor([2.0, 1.8 * fade, 0.0, 1.0, -1.0]))
    assert (pre[:10] == -1).all()


# ---- r10: hard orthogonality -----------------------------------------------------------------------------------------------------


def off_identity(sae, rows_):
    gram = rows_ @ rows_.mT
    return float((gram - torch.eye(gram.shape[-1])).abs().max())


def test_r10_blocks_of_the_decoder_are_orthonormal():
    for seed in SEEDS:
        sae = trained("contrastive_r10", seed)[0]
        W, before = sae.W_dec.detach().view(-1, 16, D_IN), trained("contrastive_r9", seed)[0].W_dec.detach().view(-1, 16, D_IN)
        assert off_identity(sae, W) < 1e-4 and off_identity(sae, before) > 0.1


def test_r10_a_dictionary_that_fits_is_orthonormal_throughout():
    sae = train("contrastive_r10", rows(), 100, d_sae=32, l0=3.0)
    assert off_identity(sae, sae.W_dec.detach()) < 1e-4


def test_r10_a_restarted_latent_leaves_the_others_of_its_block_where_they_are():
    sae = latents("contrastive_r10")
    opt, before = sae.make_optimizer(), sae.W_dec.detach().clone()
    direction = unit(torch.randn(1, D_IN, generator=generator("direction")))
    sae.reset_latents(opt, torch.tensor([5]), direction)
    others = torch.arange(64) != 5
    assert torch.allclose(sae.W_dec[others], before[others], atol=1e-5)
    block = before[[i for i in range(16) if i != 5]]
    assert torch.allclose(sae.W_dec[5], unit(direction - direction @ block.T @ block)[0], atol=1e-5)
    assert off_identity(sae, sae.W_dec.detach().view(-1, 16, D_IN)) < 1e-5


def test_r10_fewer_latents_are_dead_after_a_bad_start():
    """A third of the latents starts with biases so low that none of their rows can wake them."""
    dead = {}
    for name in ("contrastive_r9", "contrastive_r10"):
        for seed in SEEDS:
            sae, opt = build(name, rows(), 300, seed, aux_weight=0.0)
            sae.b_enc.data[::3] = -20.0
            steps(sae, opt, rows())
            sae.step = sae.steps
            dead[name, seed] = float((~(evaluate(sae.eval(), rows()[-8192:])[2] > 0).any(0)).float().mean())
    for seed in SEEDS:
        assert dead["contrastive_r9", seed] > 0.3 and dead["contrastive_r10", seed] < 0.1

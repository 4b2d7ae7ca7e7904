"""Each row of study 2 (adaptive_ortho) does what it says and moves what it is meant to move,
against the row before it, or itself with one mechanism off, on the same rows."""
import functools

import pytest
import torch

from sae import Refuse, generator, unit
from toys import D_IN, build, evaluate, mixture, steps, train

MUTANTS = ["adaptive_ortho_r1:ortho_share=0.0", "adaptive_ortho_r1:ortho_update=0.0",
           "adaptive_ortho_r1:ortsae_weight=0.0", "adaptive_ortho_r1:-pair_weight",
           "adaptive_ortho_r1:-ortho", "adaptive_ortho_r2:loop_fix=sound",
           "adaptive_ortho_r2:loop_fix=none", "adaptive_ortho_r2:loop_taken=0.0",
           "adaptive_ortho_r2:-init_from_data", "adaptive_ortho_r2:-lr_scale",
           "adaptive_ortho_r2:-accept", "adaptive_ortho_r3:spike_factor=0.0",
           "adaptive_ortho_r3:spike_quantile=0.0", "adaptive_ortho_r3:-accept",
           "adaptive_ortho_r3:-before_step", "adaptive_ortho_r4:weight_norm=False",
           "adaptive_ortho_r4:-pre_acts", "adaptive_ortho_r4:-init_from_data",
           "adaptive_ortho_r4:-lr_scale", "adaptive_ortho_r5:latent_lr_power=0.0",
           "adaptive_ortho_r5:micro_batches=1", "adaptive_ortho_r5:-move_scale",
           "adaptive_ortho_r6:skip_scale=0.0", "adaptive_ortho_r6:latent_dropout=0.0",
           "adaptive_ortho_r6:-decode", "adaptive_ortho_r6:-init_from_data",
           "adaptive_ortho_r7:curriculum_start=1.0", "adaptive_ortho_r7:curriculum_ramp=0.0",
           "adaptive_ortho_r7:-penalty_scale", "adaptive_ortho_r8:layernorm_strength=0.0",
           "adaptive_ortho_r8:gentle_warmup=0.0", "adaptive_ortho_r8:gentle_lr=1.0",
           "adaptive_ortho_r8:gentle_losses=all", "adaptive_ortho_r8:-penalty_scale",
           "adaptive_ortho_r8:-lr_scale", "adaptive_ortho_r9:unlock_start=1.0",
           "adaptive_ortho_r9:unlock_growth=0.0", "adaptive_ortho_r9:unlock_checkpoint=False",
           "adaptive_ortho_r9:-restart", "adaptive_ortho_r9:-init_from_data",
           "adaptive_ortho_r9:-pre_acts", "adaptive_ortho_r10:kwta_norm=0.0",
           "adaptive_ortho_r10:-activate", "adaptive_ortho_r10:-after_step"]
R = "adaptive_ortho_r"
STEPS = 300


@functools.cache
def rows(correlated=0.0):
    """(training rows, held-out rows) of sparse features, which fire in pairs if correlated."""
    x = mixture(correlated=correlated)[0]
    return x[:-8192], x[-8192:]


@functools.cache
def trained(name, correlated=0.0, **settings):
    """(SAE, one dict a step: loss terms, what the variant logs, L0, each latent's move)."""
    log, before = [], {}

    def each(sae, out, terms):
        now = sae.W_dec.detach().clone()
        line = {key: float(value) for key, value in {**terms, **sae.stats}.items()}
        line["l0"] = float((out.acts > 0).sum() / len(out.acts))
        line["moves"] = (now - before.get("W_dec", now)).norm(dim=1)
        line["loss"] = float(sum(terms.values()))
        log.append(line)
        before["W_dec"] = now
    return train(name, rows(correlated)[0], STEPS, each=each, **settings), log


def run(number, **settings):
    return trained(f"{R}{number}", **settings)


def mean_of(log, key, first=0, last=STEPS):
    return sum(line[key] for line in log[first:last]) / (last - first)


@torch.no_grad()
def explained(sae, lost=0.0):
    """Explained variance of held-out rows if each act is lost with this chance."""
    x = rows()[1]
    out = sae(x)
    kept = torch.rand(out.acts.shape, generator=generator("lost")) >= lost
    x_hat = out.x_hat + sae.decode(out.acts * kept) - sae.decode(out.acts)
    return float(1 - (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


# ---- r1: ortho -----------------------------------------------------------------------------------


def same_group(sae):
    """Masks of the pairs of latents inside a group and across groups."""
    same = sae.group[:, None] == sae.group
    return same & ~torch.eye(sae.d_sae, dtype=torch.bool), ~same


def squared_cosines(sae):
    """Mean of relu(cosine)^2 of the pairs (inside a group, across groups)."""
    W = unit(sae.W_dec.detach())
    inside, across = same_group(sae)
    squares = (W @ W.T).relu().square()
    return float(squares[inside].mean()), float(squares[across].mean())


def test_r1_groups_hold_latents_that_fire_together():
    sae, _ = run(1, correlated=0.8)
    fires = (evaluate(sae, rows(0.8)[1])[2] > 0).float()
    together = torch.corrcoef(fires.T).nan_to_num()
    inside, across = same_group(sae)
    assert together[inside].mean() > 0.02 + 2 * together[across].mean().clamp_min(0)


def test_r1_separates_across_groups_and_shares_inside_them():
    on = squared_cosines(run(1, correlated=0.8)[0])
    everywhere = squared_cosines(run(1, correlated=0.8, ortho_share=0.0)[0])
    nothing = squared_cosines(run(1, correlated=0.8, ortsae_weight=0.0)[0])
    assert on[1] < 0.8 * nothing[1]                        # across: apart
    assert on[1] / nothing[1] < 0.9 * on[0] / nothing[0]   # inside: less so
    assert on[0] > 1.2 * everywhere[0]                     # what sharing gives back


@pytest.mark.parametrize("form", ["max", "mean"])
def test_r1_charges_a_tenth_inside_a_group(form):
    sae, _ = build(f"{R}1", rows()[0], ortho_form=form)
    cos = (unit(sae.W_dec) @ unit(sae.W_dec).T).fill_diagonal_(0)
    weight = torch.where(sae.group[:, None] == sae.group, 0.1, 1.0)
    if form == "max":
        wanted = (weight * cos.relu().square()).max(1).values.mean()
    else:
        wanted = D_IN * (weight * cos.square()).sum() / (64 * 63)
    assert torch.allclose(sae.ortho(), wanted, rtol=1e-4)


# ---- r2: loop_fix --------------------------------------------------------------------------------


def test_r2_starts_where_most_rows_are_although_some_are_enormous():
    x = rows()[0] + 1
    far = torch.rand(len(x), generator=generator("which")) < 0.01
    x[far] += 30 * D_IN ** 0.5 * unit(torch.randn(1, D_IN, generator=generator("where")))
    middle = x[:8192][~far[:8192]].mean(0)
    fixed, plain = build(f"{R}2", x)[0], build(f"{R}1", x)[0]
    assert (fixed.b_dec - middle).norm() < 0.2 * (plain.b_dec - middle).norm()
    assert torch.allclose(fixed.pre_acts(x), plain.pre_acts(x), atol=1e-2)     # the biases follow


def test_r2_none_is_the_notes_loop_without_start_and_warm_up():
    sae, _ = build(f"{R}2", rows()[0] + 1, loop_fix="none")
    assert sae.b_dec.eq(0).all() and sae.lr_scale() == 1.0
    sae.step = sae.steps - 1
    assert sae.lr_scale() < 0.1                            # it still ends


def test_r2_counts_its_steps_and_fails_a_run_with_too_few():
    assert run(2)[0].steps_taken == STEPS
    x = rows()[0].clone()
    x[40 * 256::5 * 256] = torch.nan          # one row in every fifth batch, from the 40th
    sae, opt = build(f"{R}2", x, 120)
    with pytest.raises(Refuse, match="only 104 of 120 steps"):
        steps(sae, opt, x)


# ---- r3: grad_stable -----------------------------------------------------------------------------


def spiked():
    """Rows with one batch in twelve a hundred times as large, one NaN, one infinite; and which."""
    x, large = rows()[0].clone(), [*range(35, 120, 12)]
    for batch in large:
        x[batch * 256:(batch + 1) * 256] *= 100
    x[40 * 256], x[52 * 256] = torch.nan, torch.inf
    return x, sorted([*large, 40, 52])


def test_r3_no_spike_reaches_the_weights_and_each_is_counted():
    x, bad = spiked()
    sae, opt = build(f"{R}3", x, 120)
    before, held = [sae.W_enc.detach().clone()], []

    def each(sae, out, terms):
        if torch.equal(before[0], sae.W_enc):
            held.append(sae.step)
        before[0] = sae.W_enc.detach().clone()
    steps(sae, opt, x, each=each)
    assert held == bad
    assert sae.spikes == len(bad) - 2                      # what is not finite the base refuses


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_r3_under_spikes_explains_more_at_its_l0(activation):
    """Unguarded a spike throws off what follows the batches: L0's controller, the threshold."""
    x = spiked()[0]
    on, off = (evaluate(train(f"{R}{n}", x, 120, activation=activation), rows()[1]) for n in (3, 2))
    assert abs(on[1] - 4) < 0.3
    assert on[0] > off[0] + 0.03 or abs(off[1] - 4) > 1


def test_r3_a_new_level_of_the_loss_is_usual_before_ten_refusals_end_the_run():
    sae, _ = build(f"{R}3", rows()[0], 600)
    for sae.step in range(400):
        sae.accept(torch.tensor(1.0 if sae.step < 300 else 9.0))
    assert 1 <= sae.spikes < 10


def test_r3_refuses_nothing_where_there_are_no_spikes_and_clips_about_half():
    sae, _ = run(3)
    assert sae.spikes == 0 and 0.2 * STEPS < sae.clipped < 0.8 * STEPS


def test_r3_no_gradient_is_longer_than_the_usual_one():
    sae, opt = build(f"{R}3", rows()[0])
    norms = []

    def step(_):
        grads = [p.grad for p in sae.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        assert norms[-1] <= 1.01 * float(sae.recent_norms.nanquantile(0.5))
    before = sae.before_step
    sae.before_step = lambda opt: (before(opt), step(opt))
    steps(sae, opt, rows()[0], stop=40)
    assert len(norms) == 40


# ---- r4: weight_norm -----------------------------------------------------------------------------


def test_r4_the_length_of_an_encoder_column_is_its_gain_alone():
    sae, plain = build(f"{R}4", rows()[0])[0], build(f"{R}3", rows()[0])[0]
    x = rows()[1][:64]
    before = sae.pre_acts(x)
    assert torch.allclose(before, plain.pre_acts(x), atol=1e-4)        # the start is the parent's
    sae.W_enc.data *= 7
    assert torch.allclose(sae.pre_acts(x), before, atol=1e-4)
    sae.gain.data *= 2
    assert torch.allclose(sae.pre_acts(x) - sae.b_enc, 2 * (before - sae.b_enc), atol=1e-4)


def test_r4_gains_are_learned_and_reconstructions_a_little_longer():
    def length(sae):
        with torch.no_grad():
            return float(sae(rows()[1]).x_hat.norm(dim=1).mean())
    assert run(4)[1][-1]["gain_spread"] > 0.01
    assert length(run(4)[0]) > length(run(3)[0])


def test_r4_lowers_every_learning_rate_if_told_to():
    sae, _ = build(f"{R}4", rows()[0], weight_norm_lr=0.33)
    sae.step = 100
    assert sae.lr_scale() == pytest.approx(0.33)


# ---- r5: adaptive_lr -----------------------------------------------------------------------------


def test_r5_makes_the_latents_updates_alike():
    def spread(log):
        return float(torch.stack([line["moves"] for line in log]).sum(0).log().std())
    on, off = spread(run(5)[1]), spread(run(4)[1])
    assert on < 0.5 * off


def test_r5_works_on_four_parts_of_a_batch():
    sae, opt = build(f"{R}5", rows()[0])
    seen, forward = [], sae.forward
    sae.forward = lambda x: seen.append(len(x)) or forward(x)
    steps(sae, opt, rows()[0], stop=1)
    assert seen == [64, 64, 64, 64]


# ---- r6: skip_dropout ----------------------------------------------------------------------------


def test_r6_the_path_explains_more_and_dropout_less_also_when_acts_are_lost():
    """What the row is meant to improve, explained variance under ablation, the path improves and
    the dropout worsens: it narrows the loss by ablation, by shortening the whole reconstruction."""
    plain = run(5)[0]
    path, dropout = (run(6, **off)[0] for off in ({"latent_dropout": 0.0}, {"skip_scale": 0.0}))
    assert explained(path, lost=0.3) > explained(plain, lost=0.3) + 0.03
    assert explained(dropout, lost=0.3) < explained(plain, lost=0.3)

    def cost(sae):
        return explained(sae) - explained(sae, lost=0.3)
    assert cost(dropout) < 0.95 * cost(plain)
    assert cost(run(6)[0]) < 0.95 * cost(path)             # at the defaults too


def test_r6_drops_acts_in_training_alone_and_keeps_their_mean():
    sae, _ = build(f"{R}6", rows()[0])
    acts = torch.ones(4096, 64)
    sae.b_dec.data.zero_()
    with torch.no_grad():
        dropped, whole = sae.train().decode(acts), sae.eval().decode(acts)
    assert torch.equal(whole, torch.addmm(sae.b_dec, acts, sae.W_dec))
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.allclose(dropped.mean(0), whole[0], atol=0.1)


def test_r6_each_micro_batch_has_a_mask_of_its_own():
    sae, _ = build(f"{R}6", rows()[0])
    acts = torch.ones(64, 64)
    sae.part = slice(0, 64)
    first, again = sae.decode(acts), sae.decode(acts)
    sae.part = slice(64, 128)
    assert torch.equal(first, again) and not torch.equal(first, sae.decode(acts))


def test_r6_the_start_is_fitted_without_dropout():
    sae, plain = build(f"{R}6", rows()[0])[0], build(f"{R}5", rows()[0])[0]
    assert torch.allclose(sae.W_enc, plain.W_enc, atol=1e-5) and sae.training


# ---- r7: curriculum ------------------------------------------------------------------------------


def test_r7_the_penalty_rises_from_a_tenth_to_all_of_it_by_half_of_the_run():
    sae, log = run(7)
    wanted = [0.1 + 0.9 * min(1.0, step / (0.5 * STEPS)) for step in range(STEPS)]
    assert [line["curriculum"] for line in log] == pytest.approx(wanted)
    ortho = sae.ortho().item()
    sae.step = 0
    first = sae.losses(sae(rows()[1]))["ortsae"].item()
    sae.step = sae.steps
    assert first == pytest.approx(0.25 * 0.1 * ortho, rel=0.2)


def test_r7_reconstructs_better_early_and_ends_as_orthogonal():
    assert mean_of(run(7)[1], "recon", 0, 100) < mean_of(run(6)[1], "recon", 0, 100)
    assert run(7)[0].ortho().item() < 1.2 * run(6)[0].ortho().item()


@pytest.mark.parametrize("number", [7, 8, 9, 10])
def test_the_penalty_may_be_off_and_the_ramp_at_once(number):
    sae, opt = build(f"{R}{number}", rows()[0], 20, ortsae_weight=0.0, curriculum_ramp=0.0)
    seen = []
    steps(sae, opt, rows()[0], stop=2, each=lambda sae, out, terms: seen.append(terms))
    assert "ortsae" not in seen[0]


# ---- r8: layernorm_warmup ------------------------------------------------------------------------


def test_r8_losses_and_learning_rate_come_up_over_four_tenths_of_the_run():
    sae, _ = build(f"{R}8", rows()[0], 1000)
    plain, _ = build(f"{R}7", rows()[0], 1000)
    for sae.step in (0, 100, 200, 400, 700):
        plain.step, done = sae.step, min(1.0, sae.step / 400)
        assert sae.penalty_scale("ortsae") == pytest.approx(plain.penalty_scale("ortsae") * done)
        assert sae.lr_scale() == pytest.approx(plain.lr_scale() * (0.1 + 0.9 * done))
        assert sae.penalty_scale("sparsity") == plain.penalty_scale("sparsity")


def test_r8_all_constraints_come_up_in_the_notes_form():
    sae, _ = build(f"{R}8", rows()[0], 1000, gentle_losses="all")
    sae.step = 100
    assert sae.penalty_scale("sparsity") == pytest.approx(0.25)


def test_r8_the_latents_do_not_see_how_long_a_row_is():
    sae, x = run(8)[0], rows()[1][:64]
    with torch.no_grad():
        assert torch.allclose(sae(3 * x + 0.7).acts, sae(x).acts, atol=1e-4)


def test_r8_the_loss_is_steadier_at_first_and_not_because_it_falls_more_slowly():
    """Its variance would fall with any slow start: so the changes of its slope are measured."""
    def roughness(log):
        loss = torch.tensor([line["loss"] for line in log[:STEPS // 10]])
        return float((loss[2:] - 2 * loss[1:-1] + loss[:-2]).std())
    assert roughness(run(8)[1]) < roughness(run(7)[1])
    assert roughness(run(7, lr_warmup=0.4)[1]) > roughness(run(7)[1])      # a slow start alone


# ---- r9: unlocking -------------------------------------------------------------------------------


def test_r9_the_usable_latents_follow_the_schedule():
    usable = [line["unlocked"] for line in run(9)[1]]
    wanted = [16, 16, 22, 22, 28, 40, 58, 64, 64]
    assert [usable[step] for step in (0, 13, 14, 28, 29, 59, 104, 119, 299)] == wanted
    sae, _ = build(f"{R}9", rows()[0])
    out = sae(rows()[1])
    assert (out.acts[:, 16:] == 0).all() and (out.acts[:, :16] > 0).any()


def test_r9_l0_is_held_from_the_start_while_latents_are_unlocked():
    assert all(mean_of(run(9)[1], "l0", first, first + 15) == pytest.approx(4, rel=0.05)
               for first in range(0, STEPS, 15))


def test_r9_a_newcomer_fires_at_the_wanted_rate():
    sae, opt = build(f"{R}9", rows()[0])
    rates = {}

    def each(sae, out, terms):
        if sae.step == 14:
            rates["new"] = sae.firing(sae(out.x).acts)[16:22]
    steps(sae, opt, rows()[0], stop=15, each=each)
    assert (rates["new"] - 4 / 64).abs().max() < 0.02


def test_r9_early_latents_are_denser_than_late_ones():
    def early_over_late(sae):
        rate = (evaluate(sae, rows()[1])[2] > 0).float().mean(0)
        return float(rate[:16].mean() / rate[-16:].mean())
    assert early_over_late(run(9)[0]) > 1.3 > 1.15 > early_over_late(run(8)[0])


def test_r9_nothing_is_unlocked_after_the_last_step():
    sae, _ = build(f"{R}9", rows()[0])
    sae.step = STEPS - 1
    sae.restart(sae(rows()[0][:256]))
    assert sae.unlocked.sum() == 16


def test_r9_without_locking_the_sparse_path_has_its_parents_bits():
    small = {"d_sae": 192, "batch_size": 512, "micro_batches": 1}
    off = {"unlock_start": 1.0, "unlock_checkpoint": False}
    parent, child = (train(f"{R}{n}", rows()[0], 2, **small, **more)
                     for n, more in ((8, {}), (9, off)))
    assert parent.path == "sparse"
    weights = dict(child.named_parameters())
    assert all(torch.equal(weights[k], v) for k, v in parent.named_parameters())


def test_r9_of_two_latents_one_is_unlocked_at_first():
    assert build(f"{R}9", rows()[0], d_sae=2, l0=1.0)[0].unlocked.tolist() == [1, 0]


def test_r9_checkpointing_changes_memory_and_no_bit():
    results, kept, x = [], [], rows()[0][:256].clone()
    for settings in ({}, {"unlock_checkpoint": False}):
        sae, opt = build(f"{R}9", rows()[0], **settings)
        saved = {}            # what the forward pass keeps for the gradient, by its place

        def keep(t):
            return saved.setdefault((t.untyped_storage().data_ptr(), t.nbytes), t)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = sae.train()(x)
        kept.append(sum(t.nbytes for t in saved.values()))
        del out
        steps(sae, opt, rows()[0], stop=20)
        results.append(sae.state_dict())
    assert all(torch.equal(results[0][key], value) for key, value in results[1].items())
    assert kept[0] < 0.5 * kept[1], kept


# ---- r10: kwta -----------------------------------------------------------------------------------


def test_r10_exactly_k_latents_win_also_while_latents_are_unlocked():
    assert min(line["l0"] for line in run(10)[1]) > 3.9
    acts = evaluate(run(10)[0], rows()[1])[2]
    assert ((acts > 0).sum(1) == 4).float().mean() > 0.999


def test_r10_a_winner_is_high_for_itself():
    sae, _ = build(f"{R}10", rows()[0], d_sae=3, l0=1.0)
    sae.usual_pre.copy_(torch.tensor([100.0, 1.0, 1.0]))
    assert sae.activate(torch.tensor([[5.0, 2.0, 1.0]])).tolist() == [[0.0, 2.0, 0.0]]


def test_r10_a_latents_usual_size_follows_its_pre_and_not_while_it_is_locked():
    sae, opt = build(f"{R}10", rows()[0])
    steps(sae, opt, rows()[0], stop=10)
    assert sae.usual_pre[16:].eq(1).all() and (sae.usual_pre[:16] - 1).abs().min() > 1e-3


def test_r10_rates_differ_less_than_with_topk():
    def spread(sae):
        rate = (evaluate(sae, rows()[1])[2] > 0).float().mean(0)
        return float(rate.std() / rate.mean())
    assert spread(run(10)[0]) < 0.7 * spread(run(10, kwta_norm=0.0)[0])
    assert run(10)[1][-1]["upsets"] > 0.02


def test_r10_is_refused_on_another_activation():
    with pytest.raises(Refuse, match="activation=relu"):
        build(f"{R}10", rows()[0], activation="relu")

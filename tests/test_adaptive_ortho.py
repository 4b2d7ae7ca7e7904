"""What each run of study 2 (adaptive_ortho) is meant to move moves, against the run before it (its own switched-off run, bit for bit:
tests/test_variants.py) on the same seed, rows and L0; and the mechanisms that it shares with other studies."""
import functools

import pytest
import torch
from toys import SEEDS, D_IN, absorption, build, evaluate, generator, hierarchy, mixture, steps, train, train_py

from sae import Refuse, unit

STEPS = 300
R = "adaptive_ortho_r"


@functools.cache
def rows(seed=0, correlated=0.0):
    """(training rows, held-out rows) of sums of sparse features; `correlated` pairs of them fire together."""
    x = mixture(seed=seed, correlated=correlated)[0]
    return x[:-8192], x[-8192:]


@functools.cache
def trained(name, seed, correlated=0.0, **settings):
    """(SAE, one dict a step: loss terms, what the variant logs, and each latent's move)."""
    log, before = [], [None]

    def each(sae, out, terms):
        line = {k: float(v) for k, v in {**terms, **sae.stats}.items()}
        now = sae.W_dec.detach().clone()
        moves = torch.zeros(sae.d_sae) if before[0] is None else (now - before[0]).norm(dim=1)
        log.append(line | {"loss": float(sum(terms.values())), "moves": moves})
        before[0] = now
    return train(name, rows(seed, correlated)[0], STEPS, seed=seed, each=each, **settings), log


def difference(measure, on, off):
    """Mean over the seeds of measure(on) - measure(off), and its standard error; `on` and `off` take a seed."""
    found = torch.tensor([measure(*on(s)) - measure(*off(s)) for s in SEEDS])
    return float(found.mean()), float(found.std() / len(SEEDS) ** 0.5)


def falls(measure, on, off):
    mean, error = difference(measure, on, off)
    return mean < -2 * error and mean < 0


def rises(measure, on, off):
    return falls(lambda *run: -measure(*run), on, off)


def run(number, **settings):
    return lambda seed: trained(f"{R}{number}", seed, **settings)


def squared_cosines(sae):
    """(mean over pairs inside a group, mean over pairs across groups) of relu(cosine)^2."""
    cos = (unit(sae.W_dec) @ unit(sae.W_dec).T).detach().relu().square()
    same = sae.group[:, None] == sae.group
    return float(cos[same & ~torch.eye(len(same), dtype=torch.bool)].mean()), float(cos[~same].mean())


def explained(sae, x, x_hat):
    return float(1 - (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


# ---- the shared mechanisms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [64, 16])
def test_ortsae_takes_the_largest_cosine_of_each_latent_in_its_chunk(chunk):
    sae, _ = build("ortsae", rows()[0], ortsae_chunk=chunk)
    order = torch.randperm(64, generator=sae.generator("ortsae"))
    largest = []
    for part in order.split(chunk):
        cos = sae.W_dec[part] @ sae.W_dec[part].T - 2 * torch.eye(len(part))
        largest.append(cos.max(1).values.relu())
    assert torch.allclose(sae.ortho(), torch.cat(largest).square().mean(), atol=1e-6)


def test_ortsae_compares_other_latents_in_every_step():
    sae, _ = build("ortsae", rows()[0], ortsae_chunk=16)
    first = sae.nearest()
    sae.step = 1
    assert not torch.equal(first, sae.nearest())


def test_fixed_ortho_is_the_mean_over_all_pairs():
    sae, _ = build("fixed_ortho", rows()[0])
    cos = sae.W_dec @ sae.W_dec.T
    pairs = cos[~torch.eye(64, dtype=torch.bool)]
    assert torch.allclose(sae.ortho(), D_IN * pairs.square().mean(), rtol=1e-4)


@pytest.mark.parametrize("name", ["ortsae", "fixed_ortho"])
def test_orthogonality_lowers_absorption(name):
    """Twenty-four latents for twenty-four features in trees, on BatchTopK below the true L0 (FAIR_TESTS 3.2, shortened)."""
    def run_on_trees(name):
        def at(seed):
            x, on, directions, parent = hierarchy(n_rows=20_000, seed=seed)
            weight = {"ortsae_weight": 1.0} if name == "ortsae" else {}
            sae = train(name, x, STEPS, seed=seed, activation="batch_topk", d_sae=24, l0=1.75, **weight)
            return sae, (x[-4096:], on[-4096:], directions, parent)
        return functools.cache(at)
    assert falls(lambda sae, data: absorption(sae, *data), run_on_trees(name), run_on_trees("baseline"))


def test_the_skip_path_starts_at_nothing_and_stays_within_its_bound():
    sae, _ = build("skip", rows()[0])
    parent, _ = build("baseline", rows()[0])
    x = rows()[1]
    assert torch.equal(sae(x).x_hat, parent(x).x_hat)
    sae.skip_raw.data.fill_(100.0)
    assert torch.allclose(sae(x).x_hat, parent(x).x_hat + 0.1 * (x - parent.b_dec), atol=1e-5)


def test_the_skip_path_opens():
    assert all(trained("skip", s)[1][-1]["skip"] > 0.02 for s in SEEDS)


def test_with_layer_norm_the_latents_do_not_see_a_rows_length_or_mean():
    sae, _ = trained("layernorm", 0)
    x = rows()[1][:64]
    with torch.no_grad():
        out, longer = sae(x), sae(3 * x + 0.7)
    assert torch.allclose(longer.acts, out.acts, atol=1e-4)
    assert torch.allclose(longer.x_hat, 3 * out.x_hat + 0.7, atol=1e-3)


def test_a_latents_factor_scales_its_move_and_no_other():
    x = rows()[0]
    slow, opt = build("latent_lr", x)
    slow.move_scale = lambda: torch.where(torch.arange(64) < 32, 0.5, 1.0)
    start = slow.state_dict() | {k: v.clone() for k, v in slow.state_dict().items()}
    steps(slow, opt, x, stop=1)
    plain, opt = build("baseline", x)
    steps(plain, opt, x, stop=1)
    for name, axis in (("W_enc", 1), ("b_enc", 0)):
        ours, theirs = ((s.state_dict()[name] - start[name]).movedim(axis, 0) for s in (slow, plain))
        assert torch.allclose(ours[:32], theirs[:32] / 2, atol=1e-6) and torch.equal(ours[32:], theirs[32:])


def test_rare_latents_move_further_within_the_bounds():
    sae, _ = build("latent_lr", rows()[0])
    sae.rate.copy_(torch.logspace(-6, -0.5, 64))
    assert (sae.move_scale().diff() < 0).all()
    spread = lambda low, high: trained("latent_lr", 0, latent_lr_low=low, latent_lr_high=high)[1][-1]["latent_lr_spread"]
    assert spread(1.0, 1.0) == 0 < spread(0.9, 1.1) < spread(0.1, 10.0)


# ---- r1 .. r10 ----------------------------------------------------------------------------------------------------------------------


def test_r1_groups_hold_latents_that_fire_together():
    for s in SEEDS:
        sae, _ = trained(f"{R}1", s, correlated=0.8)
        fires = (evaluate(sae, rows(s, 0.8)[1])[2] > 0).float()
        c = torch.corrcoef(fires.T).nan_to_num()
        same = sae.group[:, None] == sae.group
        assert c[same & ~torch.eye(64, dtype=torch.bool)].mean() > 2 * c[~same].mean()


def test_r1_separates_across_groups_and_shares_inside_them():
    on, same_everywhere, nothing = (run(1, correlated=0.8, **s) for s in ({}, {"ortho_share": 0.0}, {"ortsae_weight": 0.0}))
    across, inside = lambda sae, _: squared_cosines(sae)[1], lambda sae, _: squared_cosines(sae)[0]
    assert falls(across, on, nothing)
    assert falls(across, on, same_everywhere) and rises(inside, on, same_everywhere)     # against its switched-off run, ortsae
    for s in SEEDS:
        (in_on, across_on), (in_off, across_off) = squared_cosines(on(s)[0]), squared_cosines(nothing(s)[0])
        assert across_on / across_off < 0.7 and across_on / across_off < in_on / in_off      # inside less


def test_r1_in_its_mean_form_weighs_every_pair():
    sae, _ = build(f"{R}1", rows()[0], ortho_form="mean")
    cos = sae.W_dec @ sae.W_dec.T
    weight = torch.where(sae.group[:, None] == sae.group, 1 - sae.ortho_share, 1.0).fill_diagonal_(0)
    assert torch.allclose(sae.ortho(), D_IN * (weight * cos.square()).sum() / (64 * 63), rtol=1e-4)


def with_outliers(seed):
    """Rows of which one in a hundred is thirty times as long, in one direction; and which these are."""
    x = rows(seed)[0].clone()
    far = torch.rand(len(x), generator=generator("outliers", seed)) < 0.01
    x[far] += 30 * D_IN ** 0.5 * unit(torch.randn(1, D_IN, generator=generator("far", seed)))
    return x, far


def test_r2_starts_where_most_rows_are_and_takes_every_step():
    for s in SEEDS:
        x, far = with_outliers(s)
        middle = x[:8192][~far[:8192]].mean(0)
        fixed, opt = build(f"{R}2", x, 40, seed=s, spike=1e6)
        plain, _ = build(f"{R}1", x, 40, seed=s, spike=1e6)
        assert torch.allclose(fixed.pre_acts(x), plain.pre_acts(x), atol=1e-2)                  # the biases follow
        assert (fixed.b_dec - middle).norm() < 0.5 * (plain.b_dec - middle).norm()
        log = []
        steps(fixed, opt, x, each=lambda sae, out, terms: log.append(float(sum(terms.values()))))
        assert fixed.steps_taken == 40 and len(log) == 40 and all(v == v and v < 1e4 for v in log)


def test_r2_without_its_pieces_starts_worse():
    early = lambda sae, log: sum(line["recon"] for line in log[:30]) / 30
    assert rises(early, run(2, loop_fix="none"), run(2, loop_fix="sound"))


def test_r2_fails_a_run_that_ends_with_too_few_steps():
    x = rows()[0].clone()
    x[40 * 256::5 * 256] = torch.nan                              # one row in every fifth batch after the sample that training starts from
    sae, opt = build(f"{R}2", x, 120)
    with pytest.raises(Refuse, match="only 104 of 120 steps"):
        steps(sae, opt, x)


def spiked(seed):
    """Rows of which one batch in twelve is a hundred times as large, one NaN and one infinite; and which batches these are."""
    x, batches = rows(seed)[0].clone(), [*range(35, 120, 12)]
    for b in batches:
        x[b * 256:(b + 1) * 256] *= 100
    x[40 * 256], x[52 * 256] = torch.nan, torch.inf
    return x, sorted([*batches, 40, 52])


def test_r3_no_spike_reaches_the_weights_and_each_is_counted():
    for s in SEEDS:
        x, bad = spiked(s)
        sae, opt = build(f"{R}3", x, 120, seed=s, spike=1e6)                  # the base, which looks at the rows, lets them pass
        before, held = [sae.W_enc.detach().clone()], []

        def each(sae, out, terms):
            if torch.equal(before[0], sae.W_enc):
                held.append(sae.step)
            before[0] = sae.W_enc.detach().clone()
        steps(sae, opt, x, each=each)
        assert held == bad and sae.spikes == len(bad)
        assert all(p.isfinite().all() for p in sae.parameters())


def test_r3_under_spikes_keeps_its_l0_and_its_latents():
    """Unguarded, a spike throws the controller of L0 off (relu) and puts the threshold out of every latent's reach (batch_topk)."""
    def at(name, activation):
        return functools.cache(lambda seed: evaluate(train(name, spiked(seed)[0], 120, seed=seed, activation=activation, spike=1e6), rows(seed)[1]))
    off_target = lambda ev, l0, acts: abs(l0 - 4.0)
    assert falls(off_target, at(f"{R}3", "relu"), at(f"{R}2", "relu"))
    assert rises(lambda ev, l0, acts: ev, at(f"{R}3", "batch_topk"), at(f"{R}2", "batch_topk"))


def test_r3_refuses_nothing_where_there_are_no_spikes():
    assert all(trained(f"{R}3", s)[0].spikes == 0 for s in SEEDS)


def length_ratio(sae, log):
    x = rows(sae.seed)[1]
    with torch.no_grad():
        return float(sae(x).x_hat.norm(dim=1).mean() / x.norm(dim=1).mean())


def test_r4_brings_the_reconstructions_length_nearer_to_the_rows():
    assert all(length_ratio(*trained(f"{R}3", s)) < 1 for s in SEEDS)
    assert difference(length_ratio, run(4), run(3))[0] > 0.0005                # by 0.0005 to 0.0032 in each of six seeds


def test_r4_the_length_of_an_encoder_column_is_its_gain_alone():
    sae, _ = build(f"{R}4", rows()[0])
    x = rows()[1][:64]
    before = sae.pre_acts(x)
    sae.W_enc.data *= 7
    assert torch.allclose(sae.pre_acts(x), before, atol=1e-4)
    sae.gain.data *= 2
    assert torch.allclose(sae.pre_acts(x) - sae.b_enc, 2 * (before - sae.b_enc), atol=1e-4)


def test_r5_makes_the_latents_updates_alike():
    spread = lambda sae, log: float(torch.stack([line["moves"] for line in log]).sum(0).log().std())
    assert falls(spread, run(5), run(4))
    assert all(spread(*trained(f"{R}5", s)) < 0.5 * spread(*trained(f"{R}4", s)) for s in SEEDS)


def ablated(sae, log, chance=0.3):
    """Explained variance when every act is lost with this chance."""
    x = rows(sae.seed)[1]
    with torch.no_grad():
        out = sae(x)
        kept = torch.rand(out.acts.shape, generator=generator("ablated")) >= chance
        return explained(sae, x, out.x_hat + sae.decode(out.acts * kept) - sae.decode(out.acts))


def test_r6_reconstructs_better_when_random_latents_are_lost():
    assert rises(ablated, run(6), run(5))
    lost = lambda sae, log: evaluate(sae, rows(sae.seed)[1])[0] - ablated(sae, log)
    assert falls(lost, run(6), run(5)) and falls(lost, run(6), run(6, latent_dropout=0.0))      # the dropout's own part


def test_r6_drops_acts_in_training_alone_and_keeps_their_mean():
    sae, _ = build(f"{R}6", rows()[0])
    acts = torch.ones(4096, 64)
    sae.b_dec.data.zero_()
    with torch.no_grad():
        dropped, whole = sae.train().decode(acts), sae.eval().decode(acts)
    assert torch.equal(whole, torch.addmm(sae.b_dec, acts, sae.W_dec))
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.allclose(dropped.mean(0), whole[0], atol=0.1)


def test_r7_reconstructs_better_early_and_is_as_orthogonal_in_the_end():
    early = lambda sae, log: sum(line["recon"] for line in log[:100]) / 100
    assert falls(early, run(7), run(6))
    mean, _ = difference(lambda sae, log: float(sae.ortho().detach()), run(7), run(6))
    assert mean < 0.1 * float(trained(f"{R}6", 0)[0].ortho().detach())


def test_r8_the_loss_varies_less_in_the_first_tenth():
    variance = lambda sae, log: float(torch.tensor([line["loss"] for line in log[:STEPS // 10]]).var().log())       # seeds differ threefold
    assert falls(variance, run(8), run(7))


def test_r9_the_usable_latents_follow_the_schedule():
    _, log = trained(f"{R}9", 0)
    usable = [line["unlocked"] for line in log]
    assert [usable[i] for i in (0, 13, 14, 29, 59, 104, 119, 299)] == [16, 16, 23, 29, 42, 61, 64, 64]
    sae, opt = build(f"{R}9", rows()[0])
    out = sae(rows()[1])
    assert (out.acts[:, 16:] == 0).all() and (out.acts[:, :16] > 0).any()


def test_r9_early_latents_are_denser_than_late_ones():
    def early_minus_late(sae, log):
        rate = (evaluate(sae, rows(sae.seed)[1])[2] > 0).float().mean(0)
        return float(rate[:16].mean() - rate[-16:].mean())
    assert rises(early_minus_late, run(9), run(8))


def test_r9_checkpointing_changes_memory_and_no_bit():
    results, kept = [], []
    x = rows()[0][:256].clone()
    for on in (True, False):
        sae, opt = build(f"{R}9", rows()[0], unlock_checkpoint=on)
        saved = {}                                                # what the forward pass keeps for the gradient, by its place in memory
        keep = lambda t: saved.setdefault((t.untyped_storage().data_ptr(), t.nbytes), t)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = sae.train()(x)
        kept.append(sum(t.nbytes for t in saved.values()))
        steps(sae, opt, rows()[0], stop=20)
        results.append(sae.state_dict())
    assert all(torch.equal(results[0][k], v) for k, v in results[1].items())
    assert kept[0] < 0.5 * kept[1], kept


def test_r10_exactly_k_latents_win():
    for s in SEEDS:
        acts = evaluate(trained(f"{R}10", s)[0], rows(s)[1])[2]
        assert ((acts > 0).sum(1) == 4).float().mean() > 0.999


def test_r10_a_winner_is_high_for_itself():
    sae, _ = build(f"{R}10", rows()[0], d_sae=3, l0=1.0)
    sae.usual_pre.copy_(torch.tensor([100.0, 1.0, 1.0]))
    assert sae.activate(torch.tensor([[5.0, 2.0, 1.0]])).tolist() == [[0.0, 2.0, 0.0]]


def test_r10_k_latents_win_in_every_step_also_when_others_are_unlocked():
    """A locked latent's pre is 0, which must not become its scale: it would win against all others, with an act of 0."""
    l0 = []
    train(f"{R}10", rows()[0], STEPS, each=lambda sae, out, terms: l0.append(float((out.acts > 0).sum(1).float().mean())))
    assert min(l0) > 3.9, l0

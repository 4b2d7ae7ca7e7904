"""What each row of the study topk_ortho does, on toys with known answers.

A training is compared with the row's own switched-off one: same seed, same batches, same L0.
"""

import functools

import pytest
import torch

from sae import load_variant, unit
from toys import build, cosines, evaluate, hierarchy, mixture, steps, train

MUTANTS = [
    "topk_ortho_r1:ortho_weight=0.0", "topk_ortho_r1:pair_rule=random",
    "topk_ortho_r1:pair_fraction=1.0", "topk_ortho_r1:pair_latents=8",
    "topk_ortho_r1:ortho_tau=0.9", "topk_ortho_r2:tau_rate=0.0", "topk_ortho_r2:tau_rule=note",
    "topk_ortho_r3:pairs_std=0.0", "topk_ortho_r3:pairs_memory=0.0",
    "topk_ortho_r4:prune_every=0.0", "topk_ortho_r5:importance_protects=0.0",
    "topk_ortho_r5:-after_step", "topk_ortho_r5:-spare", "topk_ortho_r6:l1_gain=0.0",
    "topk_ortho_r6:l1_form=global",
    "topk_ortho_r7:inhibition_strength=0.0", "topk_ortho_r7:inhibition_form=scale",
    "topk_ortho_r7:-init_from_data", "topk_ortho_r7:-after_step",
    "topk_ortho_r8:neighbours_every=0.0", "topk_ortho_r8:-after_step",
    "topk_ortho_r9:revive_every=0.0", "topk_ortho_r9:-to_revive", "topk_ortho_r9:revive_from=error"]
SEEDS = [0, 1]
TREES = {"l0": 2.4}  # the hierarchy's own L0


@functools.cache
def data(kind, seed=0):
    return (hierarchy if kind == "trees" else mixture)(seed=seed)


def rows(kind, seed=0):
    return data(kind, seed)[0][-8192:]


@functools.cache
def run(name, kind, seed, **settings):
    """A trained variant, and what it logged in every step."""
    log = []

    def each(sae, out, terms):
        log.append({k: float(v) for k, v in {**sae.stats, **terms}.items()})

    return train(name, data(kind, seed)[0], seed=seed, each=each, **settings), log


def off(name):
    return load_variant(name).off


def late(log, key):
    """Mean over the last third of a run."""
    return sum(line[key] for line in log[-100:]) / 100


# ---- r1: which pairs, and what they pay ----------------------------------------------------------


@pytest.mark.parametrize("rule", ["coactivation", "phi", "preact", "decoder"])
def test_a_score_is_what_the_rule_says(rule):
    x = rows("trees")[:256]
    sae, _ = build("topk_ortho_r1", x, pair_rule=rule, d_sae=6, l0=2.0)
    out = sae(x)
    i, j = 1, 4
    acts, pre, fires = out.acts[:, [i, j]], out.pre[:, [i, j]], (out.acts[:, [i, j]] > 0).float()
    known = {"coactivation": acts.prod(1).mean(), "phi": torch.corrcoef(fires.T)[0, 1],
             "preact": torch.corrcoef(pre.T)[0, 1], "decoder": sae.W_dec[i] @ sae.W_dec[j]}
    score = sae.score_pairs(out, torch.arange(6), sae.W_dec @ sae.W_dec.T)
    assert torch.isclose(score[i, j], known[rule], atol=1e-5)


def test_only_the_best_pairs_of_firing_latents_pay_and_each_once():
    x = rows("trees")[:256]
    sae, _ = build("topk_ortho_r1", x, pair_rule="decoder", d_sae=20, pair_fraction=0.05,
                   pair_latents=10)
    out = sae(x)
    cos = unit(sae.W_dec[(out.acts > 0).sum(0).topk(10).indices])
    cos = (cos @ cos.T)[torch.ones(10, 10, dtype=torch.bool).triu(1)]
    best = cos.sort(descending=True).values[:2]  # 5 % of 45 pairs
    assert torch.isclose(sae.ortho(out), (best - 0.1).relu().square().mean())
    assert len(sae.pairs[0]) == 2
    for tau, over in ((best[0] + 0.01, 0), (best.mean(), 0.5), (best[1] - 0.01, 1)):
        sae.ortho_tau = tau.item()
        sae.ortho(out)
        assert sae.stats["pair_over"] == over


def test_by_default_a_thousandth_of_all_pairs_pays():
    sae = load_variant("topk_ortho_r1")(32, 300, d_sae=256, l0=16.0)
    sae.init_from_data(rows("trees"))
    sae.ortho(sae(rows("trees")[:2048]))
    assert len(sae.pairs[0]) == round(0.001 * 256 * 255 / 2)


def true_share(sae, rule, seed):
    """Share of the pairs selected in eight batches that stand for a feature and its parent. A
    latent stands for the feature whose firing it tells best."""
    x, on, _, parent = data("trees", seed)
    x, on = x[-8192:], on[-8192:].float()
    fires = (evaluate(sae, x)[2] > 0).float()
    f1 = 2 * (on.T @ fires) / (on.sum(0)[:, None] + fires.sum(0)).clamp_min(1)
    feature = f1.argmax(0)
    sae.pair_rule = rule
    found = []
    for sae.step, batch in enumerate(x.split(1024)):
        with torch.no_grad():
            sae.ortho(sae(batch))
        a, b = (feature[side] for side in sae.pairs)
        found.append((parent[a] == b) | (parent[b] == a))
    return float(torch.cat(found).float().mean())


def test_every_rule_finds_parents_and_children_more_often_than_chance():
    """24 latents for 24 features at too small an L0: parents are absorbed into their children."""
    absorbing = {"activation": "batch_topk", "l0": 1.75, "d_sae": 24, "pair_fraction": 0.05,
                 "ortho_weight": 0.0}
    saes = [run("topk_ortho_r1", "trees", seed, **absorbing)[0] for seed in SEEDS]

    def share(rule):
        return sum(true_share(sae, rule, seed) for seed, sae in zip(SEEDS, saes)) / len(SEEDS)

    chance = share("random")
    assert share("coactivation") > 1.4 * chance and share("phi") > 2 * chance
    assert share("preact") > 4 * chance and share("decoder") > 4 * chance


def selected_squares(sae, seed):
    """Mean squared cosine of the pairs selected on held-out rows."""
    with torch.no_grad():
        sae.ortho(sae(rows("trees", seed)[:2048]))
    i, j = sae.pairs
    return float((sae.W_dec[i] * sae.W_dec[j]).sum(1).square().mean())


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_the_selected_pairs_part_and_all_pairs_much_less(activation):
    for seed in SEEDS:
        on = run("topk_ortho_r1", "trees", seed, **TREES, activation=activation)[0]
        free = run("topk_ortho_r1", "trees", seed, **TREES, activation=activation,
                   **off("topk_ortho_r1"))[0]
        selected = selected_squares(on, seed) / selected_squares(free, seed)
        every = cosines(on).square().mean() / cosines(free).square().mean()
        assert selected < 0.2 and every > 2 * selected


def test_the_pairs_of_65536_latents_fit_in_memory():
    x = rows("trees")[:128]
    sae, opt = build("topk_ortho_r3", x, steps=50, d_sae=65_536, l0=1024.0, batch_size=64,
                     pair_latents=512)
    steps(sae, opt, x, stop=2)
    assert sae.pairs[0].max() >= 512 and sae.W_dec.isfinite().all()


# ---- r2, r3: tau and the number of pairs ---------------------------------------------------------


@pytest.mark.parametrize("settings, sign", [({}, -1), ({"tau_rule": "note"}, 1)])
def test_r2_tau_falls_while_the_pairs_are_too_parallel_and_by_the_notes_rule_rises(settings, sign):
    sae, opt = build("topk_ortho_r2", rows("trees"), tau_target=-1.0, **settings)
    steps(sae, opt, rows("trees"), stop=1)
    assert torch.isclose(sae.tau, (0.1 + sign * 0.1 * (sae.pair_cos + 1)).clamp(0.01, 0.5))


def test_r2_tau_brings_the_pairs_mean_cosine_nearer_to_its_target():
    for seed in SEEDS:
        on = run("topk_ortho_r2", "trees", seed, **TREES, activation="batch_topk")[1]
        fixed = run("topk_ortho_r1", "trees", seed, **TREES, activation="batch_topk")[1]
        assert abs(late(on, "pair_cos") - 0.1) < 0.5 * abs(late(fixed, "pair_cos") - 0.1)


def spread(kind):
    """Scores of 200 latents' pairs."""
    g = torch.Generator().manual_seed(0)
    score = {"uniform": torch.rand(200, 200, generator=g),
             "normal": torch.randn(200, 200, generator=g),
             "two values": (torch.rand(200, 200, generator=g) < 0.04).float()}[kind]
    return score.masked_fill(~torch.ones(200, 200, dtype=torch.bool).triu(1), -torch.inf)


@pytest.mark.parametrize(
    "kind, pairs", [("uniform", 10), ("normal", 0.0228 * 19900), ("two values", 0.04 * 19900)])
def test_r3_the_number_of_pairs_follows_how_the_scores_are_spread(kind, pairs):
    sae, _ = build("topk_ortho_r3", rows("trees"))
    assert abs(len(sae.select_pairs(spread(kind))) - pairs) < 0.15 * pairs


def test_r3_random_pairs_are_as_many_as_chosen_ones():
    sae, _ = build("topk_ortho_r3", rows("trees"), pair_rule="random")
    out = sae(rows("trees")[:256])
    sae.ortho(out)
    among = int((sae.firing(out.acts) > 0).sum())
    assert 0.01 < len(sae.pairs[0]) / (among * (among - 1) / 2) < 0.04


def test_r3_the_threshold_remembers_the_last_batches():
    """One batch of other scores moves it by a part of the difference only."""
    sae, _ = build("topk_ortho_r3", rows("trees"), steps=1000)
    sae.select_pairs(spread("normal"))
    first = sae.pair_threshold.clone()
    sae.step = 500
    sae.select_pairs(spread("normal") + 1)
    assert torch.isclose(sae.pair_threshold, first + 1 / 20, atol=1e-4)


def test_r3_the_threshold_moves_once_a_step_whatever_the_micro_batches():
    moved = []
    for parts in (1, 4):
        sae, opt = build("topk_ortho_r3", data("mixture")[0], 1000, micro_batches=parts)
        sae.pair_threshold.fill_(10.0)
        steps(sae, opt, data("mixture")[0], start=500, stop=501)
        moved.append(float(sae.pair_threshold))
    assert 9 < min(moved) < 9.9 and abs(moved[0] - moved[1]) < 0.1
    assert moved[0] != moved[1]                            # of the first part alone


# ---- r4, r5: pruning -----------------------------------------------------------------------------


def test_r4_hardly_any_near_parallel_pair_is_left():
    near = []
    for extra in ({}, off("topk_ortho_r4")):
        sae, _ = run("topk_ortho_r4", "trees", SEEDS[0], **TREES, ortho_weight=0.0, **extra)
        near.append(int((cosines(sae) > 0.5).sum()))
    assert near[1] > 10 and near[0] < 0.3 * near[1]


def with_doubles():
    """A topk_ortho_r5 before a pruning step; latents 5 and 6 double the more frequent 9 and 10."""
    x = data("trees")[0]
    sae, opt = build("topk_ortho_r5", x, prune_threshold=0.95)
    with torch.no_grad():
        sae.W_dec[[5, 6]] = sae.W_dec[[9, 10]]
    sae.rate[[9, 10]] = 1.0
    sae.step = 5  # the sixth of 300 is the first that prunes
    return sae, sae(x[:256])


def test_r5_an_important_double_is_spared():
    sae, out = with_doubles()
    sae.importance.fill_(1.0)
    sae.importance[5], sae.importance[6] = 2.0, 0.0
    assert sae.restart(out)[0].tolist() == [6]
    assert sae.spared == 1


def test_r5_importance_is_the_mean_act_and_0_for_a_fresh_latent():
    sae, opt = build("topk_ortho_r5", data("mixture")[0], prune_every=0.0)
    steps(sae, opt, data("mixture")[0], stop=60)
    acts = evaluate(sae, rows("mixture"))[2]
    assert torch.corrcoef(torch.stack([sae.importance, acts.mean(0)]))[0, 1] > 0.8
    sae.reset_latents(opt, torch.tensor([63]), torch.ones(1, 32), rows("mixture")[:256])
    assert sae.importance[63] == 0


# ---- r6: L1 by the latent ------------------------------------------------------------------------


def test_r6_latents_fire_nearer_to_the_wanted_rate():
    for seed in SEEDS[:1]:
        on = run("topk_ortho_r6", "mixture", seed)[1]
        free = run("topk_ortho_r6", "mixture", seed, **off("topk_ortho_r6"))[1]
        assert late(on, "rate_error") < 0.5 * late(free, "rate_error")


def test_r6_the_notes_form_has_one_weight_for_all():
    x = data("mixture")[0]
    sae, opt = build("topk_ortho_r6", x, l1_form="global", prune_every=0.0)
    steps(sae, opt, x, stop=20)
    assert sae.l1_scale.std() == 0 and sae.l1_scale[0] != 1


# ---- r7, r8: competition -------------------------------------------------------------------------


@pytest.mark.parametrize("settings, left",
                         [({}, 4 - 0.3 * 6), ({"inhibition_form": "scale"}, 4 - 0.3 * 4)])
def test_r7_a_weaker_neighbour_loses_a_share_of_the_winner_or_by_the_notes_form_of_itself(settings,
                                                                                          left):
    x = rows("mixture")
    sae, _ = build("topk_ortho_r7", x, inhibition_radius=2, **settings)
    sae.usual_max.fill_(10.0)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.zero_()
        sae.b_enc[[10, 12, 13, 30, 31]] = torch.tensor([6.0, 4.0, 4.0, 4.0, 3.0])
        acts = sae(x[:1]).acts[0]
    # 12 loses to 10; 13 is too far from it; 30 is stronger than 31, but not strong
    assert torch.allclose(acts[[10, 12, 13, 30, 31]], torch.tensor([6.0, left, 4.0, 4.0, 3.0]))


def test_r7_a_winner_is_strong_by_what_rows_reach_now():
    x = data("mixture")[0]
    sae, opt = build("topk_ortho_r7", x)
    at_start = sae.usual_max.clone()
    assert at_start.isfinite()
    steps(sae, opt, x, stop=60)
    highest = sae(rows("mixture")).pre.amax(1).mean()
    assert torch.isclose(sae.usual_max, highest, rtol=0.1) and not torch.isclose(at_start, highest,
                                                                                 rtol=0.1)


def together(sae, seed):
    """How often two latents fire together [d_sae, d_sae]."""
    fires = (evaluate(sae, rows("mixture", seed))[2] > 0).float()
    return fires.T @ fires / len(fires)


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_r7_neighbours_fire_together_less_and_others_as_before(activation):
    distance = (torch.arange(64)[:, None] - torch.arange(64)).abs()
    near, far = (distance > 0) & (distance <= 4), distance > 4
    for seed in SEEDS:
        on, free = (together(run("topk_ortho_r7", "mixture", seed, activation=activation,
                                 **extra)[0], seed) for extra in ({}, off("topk_ortho_r7")))
        assert on[near].mean() / on[far].mean() < 0.9 * free[near].mean() / free[far].mean()


def neighbourhoods(sae):
    """Mask [d_sae, d_sae] of each latent's neighbours."""
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[sae.neighbours[:, :1], sae.neighbours[:, 1:]] = True
    return mask.fill_diagonal_(False)


def test_r8_neighbours_are_those_that_fire_together_and_do_so_less_once_they_inhibit():
    for seed in SEEDS[:1]:
        free = run("topk_ortho_r8", "mixture", seed, inhibition_strength=0.0)[0]
        held = run("topk_ortho_r8", "mixture", seed)[0]
        near = neighbourhoods(free)
        before = together(free, seed)
        assert before[near].mean() > 2 * before[~near & ~torch.eye(64, dtype=torch.bool)].mean()
        assert together(held, seed)[neighbourhoods(held)].mean() < 0.85 * before[near].mean()


def test_r8_a_latent_that_fires_with_more_others_has_more_neighbours():
    sae, _ = build("topk_ortho_r8", rows("mixture"), d_sae=8, l0=2.0, inhibition_radius=2)
    products = torch.eye(8)
    for i, j in ((0, 1), (0, 2), (0, 3), (0, 4), (5, 6)):
        products[i, j] = products[j, i] = 0.5
    sae.together.copy_(products)
    sae.choose_neighbours()
    found = [sorted(set(row[1:].tolist()) - {i}) for i, row in enumerate(sae.neighbours)]
    assert found[0] == [1, 2, 3, 4] and found[5] == [6] and found[7] == []


# ---- r9: reallocation ----------------------------------------------------------------------------


def test_r9_the_latents_that_hardly_fire_restart_in_random_directions():
    x = data("mixture")[0]
    sae, _ = build("topk_ortho_r9", x, prune_every=0.0)
    sae.step = 59  # of 300: a fifth is done
    sae.rate.fill_(4 / 64)
    sae.rate[[3, 8]] = 0.009 * 4 / 64
    out = sae(x[:256])
    which, directions = sae.restart(out)
    assert which.tolist() == [3, 8]
    assert (unit(directions) @ unit(out.x - out.x_hat).T).amax(1).max() < 0.99  # no row's residual


def test_r9_dead_latents_come_to_life():
    x = data("mixture")[0]
    for settings, dead in (({}, 0), (off("topk_ortho_r9"), 16)):
        sae, opt = build("topk_ortho_r9", x, aux_weight=0.0, prune_every=0.0, **settings)
        with torch.no_grad():
            sae.b_enc[:16] = -100.0
        steps(sae, opt, x)
        fires = (evaluate(sae.eval(), rows("mixture"))[2] > 0).any(0)
        assert int((~fires).sum()) == dead

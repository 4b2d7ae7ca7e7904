"""Each row of the study topk_ortho, and the shared revive and prune, move what they are meant to, on toys with known answers.

Every comparison is with the variant's own switched-off run: same seed, same batches, same L0."""
import functools
import re

import pytest
import torch

from sae import ROOT, load_variant, unit
from toys import SEEDS, build, cosines, evaluate, hierarchy, mixture, steps, train

RULES = ["coactivation", "phi", "preact", "decoder", "random"]
TREES = {"l0": 2.4, "pair_fraction": 0.02}      # on the hierarchy, true L0 2.4
TREES_BTK = {"activation": "batch_topk", "l0": 1.75, "d_sae": 24, "pair_fraction": 0.05}      # a latent a feature, too sparse: it absorbs


@functools.cache
def data(kind, seed):
    return (hierarchy if kind == "trees" else mixture)(seed=seed)


@functools.cache
def run(name, seed, kind, **settings):
    """A trained variant, what it logged in every step, and the pairs of latents of every step."""
    log, pairs = [], []

    def each(sae, out, terms):
        log.append({k: float(v) for k, v in {**sae.stats, **terms}.items()})
        if "ortho" in terms:
            i, j, counts = sae.pairs
            pairs.append((i[counts], j[counts]))
    return train(load_variant(name), data(kind, seed)[0], seed=seed, each=each, **settings), log, pairs


def on_and_off(name, kind, figure, **settings):
    """[seeds] figure(sae, log, x) with the row's idea and without it."""
    off = load_variant(name).off
    x = [data(kind, seed)[0][-8192:] for seed in SEEDS]
    return [torch.tensor([float(figure(*run(name, seed, kind, **{**settings, **extra})[:2], x[seed])) for seed in SEEDS])
            for extra in ({}, off)]


def last(key, n=100):
    return lambda sae, log, x: sum(line[key] for line in log[-n:]) / n


# ---- the pairs ---------------------------------------------------------------------------------------------------------------------


def true_share(sae, pairs, seed):
    """Share of the pairs whose latents stand for a feature and its parent; a latent stands for the feature whose firing it tells best."""
    x, on, _, parent = (t[-8192:] if len(t) > 1000 else t for t in data("trees", seed))
    fires = (evaluate(sae, x)[2] > 0).float()
    f1 = 2 * (on.T.float() @ fires) / (on.sum(0)[:, None] + fires.sum(0)[None]).clamp_min(1)
    feature = f1.argmax(0)
    a, b = (feature[torch.cat(side)] for side in zip(*pairs))
    return float(((parent[a] == b) | (parent[b] == a)).float().mean())


def mean_share(rule, settings):
    """Over the last third of a training that the penalty does not touch (its weight is next to nothing), mean of the seeds."""
    runs = [run("topk_ortho_r1", seed, "trees", **settings, pair_rule=rule, ortho_weight=1e-9) for seed in SEEDS]
    return sum(true_share(sae, pairs[-100:], seed) for seed, (sae, _, pairs) in zip(SEEDS, runs)) / len(runs)


@pytest.mark.parametrize("rule, times", [("coactivation", 1.5), ("phi", 3), ("preact", 5), ("decoder", 5)])
def test_a_rule_selects_true_parent_child_pairs_more_often_than_chance(rule, times):
    assert mean_share(rule, TREES_BTK) > times * mean_share("random", TREES_BTK)


def test_the_docstring_tells_each_rules_share():
    text = (ROOT / "variants" / "topk_ortho_r1.py").read_text()
    for rule in RULES:
        said = re.search(rf"^ *{rule} +(\d\.\d\d)", text, re.M)
        assert said and abs(float(said[1]) - mean_share(rule, TREES_BTK)) < 0.05, rule


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_what_the_rule_says(rule):
    x = data("trees", 0)[0][:256]
    sae, _ = build("topk_ortho_r1", x, pair_rule=rule, d_sae=6, l0=2.0)
    out = sae(x)
    score = sae.score_pairs(out, torch.arange(6), sae.W_dec @ sae.W_dec.T)
    i, j = 1, 4
    a, b, p, q = out.acts[:, i], out.acts[:, j], out.pre[:, i], out.pre[:, j]
    known = {"coactivation": (a * b).mean(), "phi": torch.corrcoef(torch.stack([a > 0, b > 0]).float())[0, 1],
             "preact": torch.corrcoef(torch.stack([p, q]))[0, 1], "decoder": sae.W_dec[i] @ sae.W_dec[j], "random": score[i, j]}[rule]
    assert torch.isclose(score[i, j], known, atol=1e-5)


def test_only_the_best_pairs_of_firing_latents_are_pushed_and_each_once():
    x = data("trees", 0)[0][:256]
    sae, _ = build("topk_ortho_r1", x, pair_rule="decoder", d_sae=20, l0=2.0, pair_fraction=0.05, pair_latents=10, ortho_weight=1.0)
    out = sae(x)
    terms = sae.losses(out)
    candidates = (out.acts > 0).sum(0).topk(10).indices
    W = sae.W_dec[candidates]
    upper = (W @ W.T)[torch.ones(10, 10, dtype=torch.bool).triu(1)].sort(descending=True).values[:2]       # 5 % of 45 pairs
    assert torch.isclose(terms["ortho"], (upper - 0.1).relu().square().mean())
    assert len(sae.pairs[0]) == 2 and int(sae.stats["pairs"]) == 2
    for tau, share in ((upper[0] + 0.01, 0), (upper.mean(), 0.5), (upper[1] - 0.01, 1)):                  # of the selected, above tau
        sae.ortho_tau = float(tau)
        sae.losses(out)
        assert sae.stats["pair_over"] == share


def test_it_runs_with_65536_latents():
    x = data("trees", 0)[0][:128]
    sae, opt = build("topk_ortho_r3", x, steps=50, d_sae=65_536, l0=1024.0, batch_size=64, pair_latents=512)      # fires on 2 rows of 128
    steps(sae, opt, x, stop=2)
    assert sae.pairs[0].max() >= 512 and sae.W_dec.isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_the_selected_pairs_come_apart_and_the_others_much_less(activation):
    """Mean squared cosine of the pairs that the rule selects at the end, over that of the switched-off run; likewise of all pairs."""
    def squares(sae, log, x):
        sae.ortho_weight = 1.0
        with torch.no_grad():
            sae.losses(sae(x[-2048:]))
        i, j, _ = sae.pairs
        sae.ortho_weight = type(sae).ortho_weight
        return (sae.W_dec[i] * sae.W_dec[j]).sum(1).square().mean().detach()
    on, off = on_and_off("topk_ortho_r1", "trees", squares, **TREES, activation=activation)
    all_on, all_off = on_and_off("topk_ortho_r1", "trees", lambda sae, log, x: cosines(sae).square().mean(), **TREES, activation=activation)
    assert (on < 0.2 * off).all()
    assert (all_on / all_off > 2 * on / off).all()


def test_the_penalty_has_the_size_at_which_it_acts():
    for activation in ("relu", "batch_topk"):
        for seed in SEEDS:
            log = run("topk_ortho_r1", seed, "trees", **{**TREES, "activation": activation})[1]
            assert 0.02 < sum(line["ortho"] / line["recon"] for line in log) / len(log) < 0.3


def test_tau_brings_the_pairs_mean_cosine_nearer_to_its_target():
    on, off = on_and_off("topk_ortho_r2", "trees", last("pair_cos"), **TREES, activation="batch_topk")
    assert ((on - 0.1).abs() < 0.5 * (off - 0.1).abs()).all()


def test_tau_falls_while_the_pairs_are_too_parallel_and_with_the_notes_sign_rises():
    x = data("trees", 0)[0]
    for rule, sign in (("hinge", -1), ("note", 1)):
        sae, opt = build("topk_ortho_r2", x, tau_rule=rule, tau_target=-1.0)
        steps(sae, opt, x, stop=1)
        assert torch.isclose(sae.tau, (0.1 + sign * 0.1 * (sae.pair_cos + 1)).clamp(0.01, 0.5))


def test_the_number_of_pairs_follows_how_the_scores_are_spread():
    x = data("trees", 0)[0]
    g = torch.Generator().manual_seed(0)
    pair = torch.ones(200, 200, dtype=torch.bool).triu(1)
    found = {}
    for kind, score in (("uniform", torch.rand(200, 200, generator=g)), ("normal", torch.randn(200, 200, generator=g)),
                        ("two kinds", (torch.rand(200, 200, generator=g) < 0.04).float())):
        sae, _ = build("topk_ortho_r3", x)
        found[kind] = int(sae.select_pairs(score.masked_fill(~pair, -torch.inf))[1].sum())
    assert found["uniform"] == 10                                                    # none is 2 std above the mean: the least there is
    assert abs(found["normal"] - 0.0228 * 19900) < 50
    assert abs(found["two kinds"] - 0.04 * 19900) < 100


def test_the_number_of_pairs_is_not_fixed_in_training():
    for seed in SEEDS:
        counts = [line["pairs"] for line in run("topk_ortho_r3", seed, "trees", **TREES)[1]]
        assert min(counts) >= 10 and len(set(counts)) > 10
        assert {line["pairs"] for line in run("topk_ortho_r3", seed, "trees", **TREES, **load_variant("topk_ortho_r3").off)[1]} == {40}


# ---- pruning -----------------------------------------------------------------------------------------------------------------------


def parallel(sae, log, x):
    return (cosines(sae).abs() > 0.8).sum() / 2


@pytest.mark.parametrize("name, extra", [("prune", {}), ("topk_ortho_r4", {"ortho_weight": 0.0})])
def test_pruning_leaves_no_parallel_pair(name, extra):
    """r4 without its penalty, which alone leaves no such pair."""
    on, off = on_and_off(name, "trees", parallel, **({"l0": 2.4} if name == "prune" else TREES), prune_threshold=0.8, **extra)
    assert (on == 0).all() and (off >= 3).all()


def test_of_two_parallel_latents_the_rarer_is_the_double():
    x = data("trees", 0)[0]
    sae, _ = build("prune", x, d_sae=2100, prune_threshold=0.95)                     # more latents than one block
    with torch.no_grad():
        sae.W_dec[2050] = sae.W_dec[3]
        sae.W_dec[7] = -sae.W_dec[1500]
    sae.rate[[2050, 3, 7, 1500]] = torch.tensor([0.5, 0.1, 0.2, 0.3])
    assert {3, 7} <= set(sae.doubles().nonzero().flatten().tolist())
    assert not {2050, 1500} & set(sae.doubles().nonzero().flatten().tolist())


def test_a_fresh_direction_is_orthogonal_to_the_survivors_near_it():
    x = data("trees", 0)[0]
    sae, _ = build("prune", x)
    survivors = unit(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)))
    fresh = unit(sae.fresh_directions(survivors, 5))
    assert ((fresh @ survivors.T).abs() < 1e-5).sum(1).tolist() == [sae.prune_near] * 5


def test_a_pruned_latent_starts_at_the_survivors_norm_without_moments_and_fires_at_the_wanted_rate():
    x = data("trees", 0)[0]
    sae, opt = build("prune", x, prune_threshold=0.8, prune_every=0.02)
    steps(sae, opt, x, stop=5)
    with torch.no_grad():
        sae.W_dec[5] = sae.W_dec[9]
    sae.rate[5], sae.rate[9] = 0.0, 1.0
    sae.step, sae.position = 5, 5 * 256                                              # the sixth step of 300 is the first that prunes
    with torch.no_grad():
        out = sae(x[1280:1536])
        sae.after_step(opt, out)
        again = sae(x[1280:1536])
    others = torch.arange(64) != 5
    assert int(sae.pruned) == 1
    assert torch.isclose(sae.W_enc[:, 5].norm(), sae.W_enc[:, others].norm(dim=0).mean(), rtol=1e-4)
    assert opt.state[sae.W_dec]["exp_avg"][5].abs().sum() == 0 and opt.state[sae.W_dec]["exp_avg"][9].abs().sum() > 0
    assert abs(float((again.acts[:, 5] > 0).float().mean()) - sae.l0 / sae.d_sae) < 0.01


def pruned_importance(seed, **settings):
    """Mean importance, over the mean of all latents, of those that a training prunes."""
    base, found = load_variant("topk_ortho_r5"), []

    class Watched(base):
        def reset_latents(self, opt, which, *args, **kwargs):
            found.extend((self.importance[which] / self.importance.mean()).tolist())
            super().reset_latents(opt, which, *args, **kwargs)
    train(Watched, data("trees", seed)[0], seed=seed, **TREES, ortho_weight=0.0, prune_threshold=0.5, **settings)
    return sum(found) / len(found)


def test_pruned_latents_are_less_important_where_importance_protects():
    assert all(pruned_importance(seed) < 0.7 * pruned_importance(seed, **load_variant("topk_ortho_r5").off) for seed in SEEDS)


def test_the_most_important_half_is_protected_and_a_fresh_latent_has_no_importance():
    x = data("trees", 0)[0]
    sae, opt = build("topk_ortho_r5", x)
    sae.importance.copy_(torch.arange(64.0))
    assert sae.protected().nonzero().flatten().tolist() == list(range(32, 64))
    sae.reset_latents(opt, torch.tensor([63]), torch.ones(1, 32))
    assert sae.importance[63] == 0


# ---- sparsity and competition ------------------------------------------------------------------------------------------------------


def test_latents_fire_nearer_to_the_target_rate():
    on, off = on_and_off("topk_ortho_r6", "mixture", last("rate_error", 30))
    assert (on < 0.5 * off).all()


def together(sae, x):
    """How often two latents fire together [d_sae, d_sae]."""
    fires = (evaluate(sae, x)[2] > 0).float()
    return fires.T @ fires / len(fires)


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_neighbours_in_index_fire_together_less(activation):
    distance = (torch.arange(64)[:, None] - torch.arange(64)).abs()
    near = (distance > 0) & (distance <= 4)
    inside, inside_off, outside, outside_off = (
        value for mask in (near, distance > 4)
        for value in on_and_off("topk_ortho_r7", "mixture", lambda sae, log, x: together(sae, x)[mask].mean(), activation=activation))
    assert (inside / outside < 0.95 * inside_off / outside_off).all()


def test_a_weaker_neighbour_loses_a_share_of_the_winner():
    x = data("mixture", 0)[0]
    for form, left in (("subtract", 4 - 0.3 * 6), ("scale", 4 - 0.3 * 4)):
        sae, _ = build("topk_ortho_r7", x, inhibition_form=form, inhibition_radius=2)
        sae.inhibition_scale.fill_(10.0)
        with torch.no_grad():
            sae.W_enc.zero_()
            sae.b_enc.zero_()
            sae.b_enc[[10, 12, 13, 30, 31]] = torch.tensor([6.0, 4.0, 4.0, 4.0, 3.0])
            acts = sae(x[:1]).acts[0]
        assert torch.allclose(acts[[10, 12, 13, 30, 31]], torch.tensor([6.0, left, 4.0, 4.0, 3.0]))        # 13 is too far; 4 is no winner


def chosen(sae):
    """Mask [d_sae, d_sae] of a latent's neighbours."""
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[sae.neighbours[:, :1], sae.neighbours[:, 1:]] = True
    return mask.fill_diagonal_(False)


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_neighbours_fire_together_more_than_others_and_less_once_they_inhibit(activation):
    for seed in SEEDS:
        settings = {"activation": activation}
        free, held = (run("topk_ortho_r8", seed, "mixture", **settings, **extra)[0] for extra in ({"inhibition_strength": 0.0}, {}))
        x = data("mixture", seed)[0][-8192:]
        before, after = together(free, x)[chosen(free)].mean(), together(held, x)[chosen(held)].mean()
        others = ~chosen(free) & ~torch.eye(64, dtype=torch.bool)
        assert before > 2 * together(free, x)[others].mean()
        assert after < 0.85 * before


def test_a_latent_that_fires_with_more_others_has_more_neighbours():
    x = data("mixture", 0)[0]
    sae, _ = build("topk_ortho_r8", x, d_sae=8, l0=2.0, inhibition_radius=2)
    together = torch.eye(8)
    for i, j in ((0, 1), (0, 2), (0, 3), (0, 4), (5, 6)):
        together[i, j] = together[j, i] = 0.5
    sae.coactivation.copy_(together)
    sae.choose_neighbours()
    found = [sorted(set(row[1:].tolist()) - {i}) for i, row in enumerate(sae.neighbours)]
    assert found[0] == [1, 2, 3, 4] and found[5] == [6] and found[7] == []


# ---- dead latents ------------------------------------------------------------------------------------------------------------------


def dead_after(name, seed, activation, **settings):
    """How many latents never fire after a training that half of them start dead."""
    x = data("mixture", seed)[0]
    sae, opt = build(name, x, seed=seed, activation=activation, **settings)
    with torch.no_grad():
        sae.b_enc[:32] = -20.0
    steps(sae, opt, x)
    sae.step = sae.steps
    return int((evaluate(sae.eval(), x[-8192:])[2] > 0).any(0).logical_not().sum())


@pytest.mark.parametrize("name, activation, settings", [("revive", "relu", {"revive_silent": 0.1}),
                                                        ("revive", "batch_topk", {"revive_silent": 0.1}),
                                                        ("topk_ortho_r9", "relu", {"reallocate_below": 0.01})])
def test_dead_latents_come_to_life(name, activation, settings):
    for seed in SEEDS:
        off = dead_after(name, seed, activation, **{**settings, **load_variant(name).off})
        assert off >= 16 and dead_after(name, seed, activation, **settings, revive_every=0.2) < 0.25 * off


def test_only_silent_latents_restart_and_none_in_the_last_fifth():
    x = data("mixture", 0)[0]
    sae, opt = build("revive", x, revive_every=0.2, revive_silent=0.1)
    sae.silent[:5], sae.silent[5:] = 30.0, 29.0
    assert sae.to_revive().nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    with torch.no_grad():
        out = sae(x[:256])
        for step, revived in ((59, 5), (299, 5), (60, 5)):
            sae.step = step
            out = out._replace(acts=torch.zeros_like(out.acts)) if step != 59 else out
            sae.silent[:5] = 60.0
            out.acts[:, :5] = 0
            sae.after_step(opt, out)
            assert int(sae.revived) == revived


def test_a_revived_latent_points_along_a_badly_reconstructed_row():
    x = data("mixture", 0)[0]
    sae, opt = build("revive", x, revive_every=0.2, revive_silent=0.1)
    with torch.no_grad():
        out = sae(x[:256])
        out.acts[:, :4] = 0
        sae.silent[:4] = 30.0
        sae.step = 59
        residual = unit(out.x - out.x_hat)
        sae.after_step(opt, out)
    rows = (sae.W_dec[:4] @ residual.T).max(1)
    assert torch.allclose(rows.values, torch.ones(4), atol=1e-5) and len(set(rows.indices.tolist())) == 4


@pytest.mark.parametrize("row", range(1, 10))
def test_it_also_reaches_its_l0_on_batch_topk(row):
    sae, log, _ = run(f"topk_ortho_r{row}", 0, "mixture", activation="batch_topk")
    ev, l0, _ = evaluate(sae, data("mixture", 0)[0][-8192:])
    assert ev > 0.3 and abs(l0 - sae.l0) < 0.1 * sae.l0

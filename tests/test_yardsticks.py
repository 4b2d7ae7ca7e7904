"""What is known of the published SAEs, seen on toy data with known answers, three seeds each. A tool that can't show these differences
can't judge a new idea either."""
import functools

import pytest
import torch

from sae import Refuse
from toys import SEEDS, absorption, build, evaluate, hierarchy, mixture, steps, train



@functools.cache
def mixed(seed):
    """(rows to train on, rows held out)."""
    x = mixture(seed=seed)[0]
    return x[:-8192], x[-8192:]


@functools.cache
def mixed_sae(name, seed, l0=4.0):
    return train(name, mixed(seed)[0], 300, seed, l0=l0)


def slope(sae, x):
    """By what the reconstruction should be multiplied to fit best; above 1: it is shrunk."""
    with torch.no_grad():
        read = sae(x).x_hat - sae.b_dec
        return float(((x - sae.b_dec) * read).sum() / read.pow(2).sum())


@functools.cache
def trees(seed):
    return hierarchy(50_000, seed=seed)


@functools.cache
def on_trees(name, seed, l0=1.75, n_steps=1500):
    """Trained on the first rows, measured on the last: (explained variance, L0, absorption, mean best F1 over features)."""
    x, on, directions, parent = trees(seed)
    nested = {"matryoshka_prefixes": 3} if name == "matryoshka" else {}          # 6, 12, 24: one for each tree, and so on
    sae, opt = build(name, x, n_steps, seed, d_sae=24, l0=l0, batch_size=128, **nested)
    if n_steps:
        steps(sae, opt, x[:-8192])
    else:
        sae.threshold.copy_(sae.batch_threshold(sae(x[:8192]).pre))              # untrained, at the wanted L0
    sae.eval()
    x, on = x[-8192:], on[-8192:]
    ev, reached, acts = evaluate(sae, x)
    fires = (acts > 0).float()
    f1 = 2 * on.T.float() @ fires / (on.sum(0)[:, None] + fires.sum(0)).clamp_min(1)
    return ev, reached, absorption(sae, x, on, directions, parent), float(f1.max(1).values.mean())


# ---- L0 ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["baseline", "jumprelu", "gated", "p_anneal"])
@pytest.mark.parametrize("seed", SEEDS)
def test_penalties_hold_l0_within_five_percent(name, seed):
    assert evaluate(mixed_sae(name, seed), mixed(seed)[1])[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_topk_has_exactly_k_active_latents_in_every_row(seed):
    acts = evaluate(mixed_sae("topk", seed), mixed(seed)[1])[2]
    assert ((acts > 0).sum(1) == 4).all()


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_threshold_of_batch_topk_gives_the_same_l0_at_inference(name, seed):
    sae, x = mixed_sae(name, seed), mixed(seed)[1]
    assert evaluate(sae, x)[1] == pytest.approx(4, rel=0.05)
    with torch.no_grad():
        in_training = (sae.train()(x).acts > 0).sum(1).float()
    sae.eval()
    assert in_training.sum() == 4 * len(x) and in_training.std() > 0.5           # exact over the batch, not per row


# ---- what each is known for ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jumprelu", "gated", "p_anneal", "topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("seed", SEEDS)
def test_each_explains_more_than_relu_at_the_same_l0_and_shrinks_less(name, seed):
    relu, sae, x = mixed_sae("baseline", seed), mixed_sae(name, seed), mixed(seed)[1]
    assert evaluate(sae, x)[0] > evaluate(relu, x)[0] + 0.05
    assert abs(slope(sae, x) - 1) < 0.5 * (slope(relu, x) - 1)
    if name not in ("p_anneal", "matryoshka"):                                   # no penalty on sizes, nothing is shrunk
        assert slope(sae, x) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("seed", SEEDS)
def test_batch_topk_explains_more_than_topk(seed):
    assert evaluate(mixed_sae("batch_topk", seed), mixed(seed)[1])[0] > evaluate(mixed_sae("topk", seed), mixed(seed)[1])[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_matryoshka_absorbs_less_than_batch_topk_at_the_same_l0_and_pays_in_explained_variance(seed):
    flat, nested = on_trees("batch_topk", seed), on_trees("matryoshka", seed)
    assert nested[1] == pytest.approx(flat[1], rel=0.06)
    assert flat[2] > 0.55 and nested[2] < 0.75 * flat[2]
    assert nested[0] < flat[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_raising_l0_removes_absorption_and_the_features_with_it(seed):
    """So two SAEs are compared at the same L0 or not at all."""
    sparse, dense = on_trees("batch_topk", seed), on_trees("batch_topk", seed, l0=12.0)
    assert dense[2] < 0.1 and dense[0] > sparse[0]
    assert sparse[3] > 0.8 and dense[3] < 0.6


@pytest.mark.parametrize("seed", SEEDS)
def test_an_untrained_sae_shows_little_absorption_too(seed):
    ev, l0, absorbed, f1 = on_trees("batch_topk", seed, n_steps=0)
    assert l0 == pytest.approx(1.75, rel=0.1)
    assert absorbed < 0.25 and ev < 0.3 and f1 < 0.6


# ---- known answers ------------------------------------------------------------------------------------------------------------------


def small(name, **settings):
    """Four latents on four axes, no biases, as if it were at the end of its training; and a row that fires the first two."""
    sae, _ = build(name, torch.randn(512, 4, generator=torch.Generator().manual_seed(0)), 100, d_sae=4, l0=2.0, aux_weight=0.0, **settings)
    with torch.no_grad():
        for p in (sae.W_enc, sae.W_dec):
            p.copy_(torch.eye(4))
        for p in (sae.b_enc, sae.b_dec):
            p.zero_()
    sae.step = 100
    return sae, torch.tensor([[3.0, 1.0, -1.0, -2.0]])


def test_a_silent_jumprelu_latent_gets_no_gradient_and_a_threshold_only_near_its_edge():
    sae, x = small("jumprelu", bandwidth=0.5)
    with torch.no_grad():
        sae.log_threshold.copy_(torch.tensor([1.0, 1.2, 1.0, 1.0]).log())
    out = sae(x)
    assert out.acts.tolist() == [[3, 0, 0, 0]]
    sae.recon_error(out).sum().backward()
    assert sae.W_enc.grad[:, 1:].eq(0).all() and sae.b_enc.grad[1:].eq(0).all()
    # d error / d acts_1 = 2 (x_hat_1 - x_1) / d_in = -0.5; times -threshold / bandwidth = -2.4, times threshold for its logarithm
    assert sae.log_threshold.grad.tolist() == pytest.approx([0, 0.5 * 2.4 * 1.2, 0, 0])


def test_the_gate_of_gated_decides_what_fires_and_nothing_else():
    sae, x = small("gated")
    with torch.no_grad():
        sae.r_mag.fill_(torch.tensor(2.0).log())
        sae.b_mag.fill_(0.5)
        sae.b_enc.copy_(torch.tensor([-2.0, -2.0, 0.0, 3.0]))                   # open gates: 1 and 4
    out = sae(x)
    assert out.acts.tolist()[0] == pytest.approx([2 * 3 + 0.5, 0, 0, 0])         # latent 4: open, but its size is relu(2 * -2 + 0.5)
    sae.recon_error(out).sum().backward()
    assert sae.b_enc.grad.abs().max() < 1e-6                                     # the step passes nothing on
    assert sae.b_mag.grad[0] != 0
    assert sae.sparsity(out).item() == pytest.approx((1 + 1) / 2)                # relu(pre) = 1, 0, 0, 1, over sqrt(d_in)


def test_the_auxiliary_loss_of_gated_teaches_the_gate_and_not_the_decoder():
    sae, x = small("gated")
    with torch.no_grad():
        sae.W_enc.mul_(2)
    loss = sae.losses(sae(x))["gated"]
    assert loss.item() == pytest.approx((3 ** 2 + 1 + 1 + 4) / 4)                # the gate alone gives (6, 2, 0, 0) for (3, 1, -1, -2)
    loss.backward()
    assert sae.W_enc.grad[:, :2].abs().min(1).values[0] > 0 and sae.b_enc.grad.tolist() == pytest.approx([1.5, 0.5, 0, 0])
    assert sae.W_dec.grad is None and sae.r_mag.grad is None and sae.b_mag.grad is None


def test_the_penalty_of_p_anneal_goes_from_l1_to_a_count():
    sae, x = small("p_anneal", p_anneal_eps=1e-9)
    out = sae(x)
    for progress, p in ((0.0, 1.0), (0.4, 0.6), (0.8, 0.2), (1.0, 0.2)):
        sae.step = round(progress * sae.steps)
        assert sae.sparsity(out).item() == pytest.approx((3 ** p + 1) / 2, rel=0.02)


def test_p_anneal_refuses_an_activation_that_has_no_such_penalty():
    with pytest.raises(Refuse, match="batch_topk"):
        build("p_anneal", mixed(0)[0], activation="batch_topk")


def test_a_row_of_matryoshka_costs_the_mean_over_its_prefixes():
    sae, x = small("matryoshka", matryoshka_prefixes=3)
    with torch.no_grad():
        sae.threshold.zero_()
    sae.eval()
    # latents 1 | 1, 2 | all four, of which the first two fire: what is left of (3, 1, -1, -2)
    assert sae.recon_error(sae(x)).item() == pytest.approx(((1 + 1 + 4) + (1 + 4) + (1 + 4)) / 4 / 3)


def test_gated_in_saelens_gives_the_same_latents(tmp_path):
    saelens = pytest.importorskip("sae_lens")
    sae = train("gated", mixed(0)[0], 50)
    sae.scale.fill_(0.7)
    sae.to_saelens(tmp_path)
    theirs, raw = saelens.SAE.load_from_disk(tmp_path), mixed(0)[1][:256] / 0.7
    assert torch.allclose(theirs.encode(raw), sae.encode(raw), atol=1e-4)
    assert torch.allclose(theirs(raw), sae.reconstruct(raw), atol=1e-4)

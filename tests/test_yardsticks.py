"""What is known of the published SAEs, and of the mix-ins skip and layernorm, on toy data with
known answers. A tool that can't show these differences can't judge a new idea either."""
import functools

import pytest
import torch

from sae import Refuse, generator
from toys import (D_IN, absorption, build, cosines, evaluate, hierarchy, mixture, train)

MUTANTS = ["topk:activation=relu", "batch_topk:activation=relu", "jumprelu:activation=relu",
           "gated:gated_sizes=False", "gated:gated_weight=0.0", "gated:-penalties",
           "gated:-sparsity", "gated:-after_step", "p_anneal:p_anneal_end=1.0",
           "p_anneal:p_anneal_until=0.0", "p_anneal:p_anneal_eps=0.0",
           "matryoshka:matryoshka_prefixes=1", "matryoshka:-recon_error",
           "fixed_ortho:fixed_ortho_weight=0.0", "ortsae:ortsae_weight=0.0", "skip:skip_scale=0.0",
           "skip:skip_learned=False", "skip:-forward", "layernorm:layernorm_strength=0.0",
           "layernorm:layernorm_eps=0.0", "layernorm:-init_from_data", "layernorm:-reset_latents",
           "layernorm:-aux"]
X = mixture()[0]
TRAIN, HELD_OUT = X[:-8192], X[-8192:]


@functools.cache
def trained(name, **settings):
    return train(name, TRAIN, **settings)


@functools.cache
def measured(name, **settings):
    """(explained variance, L0, acts) on rows held out."""
    return evaluate(trained(name, **settings), HELD_OUT)


@torch.no_grad()
def shrinkage(sae, x):
    """By what the reconstruction should be multiplied to fit best; above 1: it is too short."""
    read = sae(x).x_hat - sae.b_dec
    return float(((x - sae.b_dec) * read).sum() / read.pow(2).sum())


@functools.cache
def on_trees(name, l0=1.75, n_steps=600, **settings):
    """(explained variance, L0, absorption) on rows held out, of data in which absorption pays."""
    x, on, directions, parent = hierarchy(50_000)
    sae = train(name, x[:-8192], n_steps, d_sae=24, l0=l0, batch_size=128, **settings)
    x, on = x[-8192:], on[-8192:]
    ev, reached, _ = evaluate(sae, x)
    return ev, reached, absorption(sae, x, on, directions, parent)


# ---- L0 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["baseline", "jumprelu", "gated", "p_anneal"])
def test_penalties_hold_l0_within_five_percent(name):
    assert measured(name)[1] == pytest.approx(4, rel=0.05)


def test_gated_holds_l0_throughout_by_the_gates_own_acts():
    l0 = []

    def each(sae, out, terms):
        l0.append((out.acts > 0).sum(1).float().mean())
    train("gated", TRAIN, 150, each=each)
    parts = torch.stack(l0).view(5, 30).mean(1)
    assert (parts[1:] / 4 - 1).abs().max() < 0.05, parts


def test_topk_has_exactly_k_active_latents_in_every_row():
    assert ((measured("topk")[2] > 0).sum(1) == 4).all()


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_the_threshold_of_batch_topk_gives_the_same_l0_at_inference(name):
    assert measured(name)[1] == pytest.approx(4, rel=0.05)
    sae = trained(name).train()
    with torch.no_grad():
        used = (sae(HELD_OUT).acts > 0).sum(1).float()
    sae.eval()
    assert used.sum() == 4 * len(HELD_OUT) and used.std() > 0.5        # of the batch, not of a row


# ---- what each is known for ----------------------------------------------------------------------


BETTER = ["jumprelu", "gated", "p_anneal", "topk", "batch_topk", "matryoshka"]


@pytest.mark.parametrize("name", BETTER)
def test_each_explains_more_than_relu_at_the_same_l0_and_shrinks_less(name):
    assert measured(name)[0] > measured("baseline")[0] + 0.03
    relu, ours = shrinkage(trained("baseline"), HELD_OUT), shrinkage(trained(name), HELD_OUT)
    assert abs(ours - 1) < 0.6 * (relu - 1)
    if name not in ("p_anneal", "matryoshka"):             # no penalty on sizes
        assert ours == pytest.approx(1, abs=0.04)


def test_batch_topk_explains_more_than_topk():
    assert measured("batch_topk")[0] > measured("topk")[0] + 0.02


def test_matryoshka_absorbs_less_than_batch_topk_at_the_same_l0_and_explains_less():
    flat, nested = on_trees("batch_topk"), on_trees("matryoshka", matryoshka_prefixes=3)
    assert nested[1] == pytest.approx(flat[1], rel=0.06)
    assert flat[2] > 0.5 and nested[2] < 0.75 * flat[2]
    assert nested[0] < flat[0]


@pytest.mark.parametrize("name, weight", [("ortsae", 1.0), ("fixed_ortho", 0.5)])
def test_orthogonality_lowers_absorption(name, weight):
    """At these weights; a tenth of it, on so few steps, hardly."""
    settings = {f"{name}_weight": weight, "activation": "batch_topk"}
    plain, apart = on_trees("batch_topk"), on_trees(name, **settings)
    assert apart[2] < 0.85 * plain[2] and apart[1] == pytest.approx(plain[1], rel=0.06)


@pytest.mark.parametrize("name", ["ortsae", "fixed_ortho"])
def test_orthogonality_lowers_the_largest_cosines(name):
    plain, apart = (cosines(trained(n)).max(1).values.mean() for n in ("baseline", name))
    assert apart < 0.85 * plain


# ---- known answers -------------------------------------------------------------------------------


def small(name, **settings):
    """Four latents on four axes, no biases, after training; and a row that fires the first two."""
    x = torch.randn(512, 4, generator=generator("small"))
    sae, _ = build(name, x, 100, d_sae=4, l0=2.0, aux_weight=0.0, **settings)
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
    # d error / d acts_1 = 2 (x_hat_1 - x_1) / d_in = -0.5; times -threshold / bandwidth = -2.4;
    # times the threshold, for its logarithm
    assert sae.log_threshold.grad.tolist() == pytest.approx([0, 0.5 * 2.4 * 1.2, 0, 0])


def test_the_gate_of_gated_decides_what_fires_and_nothing_else():
    sae, x = small("gated")
    with torch.no_grad():
        sae.r_mag.fill_(torch.tensor(2.0).log())
        sae.b_mag.fill_(0.5)
        sae.b_enc.copy_(torch.tensor([-2.0, -2.0, 0.0, 3.0]))          # open gates: first and last
    out = sae(x)
    assert out.acts.tolist()[0] == pytest.approx([2 * 3 + 0.5, 0, 0, 0])   # last: relu(2 * -2 + .5)
    sae.recon_error(out).sum().backward()
    assert sae.b_enc.grad.abs().max() < 1e-6                           # the step passes nothing on
    assert sae.b_mag.grad[0] != 0


def test_the_penalty_of_gated_falls_on_the_gate():
    sae, x = small("gated")
    with torch.no_grad():
        sae.r_mag.fill_(1.0)
    assert sae.sparsity(sae(x)).item() == pytest.approx((3 + 1) / 2)   # relu(pre) over sqrt(d_in)


def test_the_auxiliary_loss_of_gated_teaches_the_gate_and_not_the_decoder():
    sae, x = small("gated")
    with torch.no_grad():
        sae.W_enc.mul_(2)
    loss = sae.losses(sae(x))["gated"]   # the gate says 6, 2, 0, 0 for 3, 1, -1, -2
    assert loss.item() == pytest.approx((3 ** 2 + 1 + 1 + 4) / 4)
    loss.backward()
    assert sae.W_enc.grad[:, :2].abs().sum(0).gt(0).all()
    assert sae.b_enc.grad.tolist() == pytest.approx([1.5, 0.5, 0, 0])
    assert sae.W_dec.grad is None and sae.r_mag.grad is None and sae.b_mag.grad is None


def test_the_penalty_of_p_anneal_goes_from_l1_to_a_count():
    sae, x = small("p_anneal")
    sae.p_anneal_eps = 1e-9
    out = sae(x)
    for progress, p in ((0.0, 1.0), (0.4, 0.6), (0.8, 0.2), (1.0, 0.2)):
        sae.step = round(progress * sae.steps)
        assert sae.sparsity(out).item() == pytest.approx((3 ** p + 1) / 2, rel=0.02)


def test_the_slope_of_p_anneal_is_finite_where_an_act_is_zero():
    sae, x = small("p_anneal")
    acts = torch.zeros(1, 4, requires_grad=True)
    sae.sparsity(sae(x)._replace(acts=acts)).backward()
    assert acts.grad.isfinite().all()


def test_p_anneal_refuses_an_activation_that_has_no_such_penalty():
    with pytest.raises(Refuse, match="activation=batch_topk"):
        build("p_anneal", X, activation="batch_topk")


def test_p_anneal_may_anneal_at_once():
    sae, x = small("p_anneal", p_anneal_until=0.0)
    sae.step = 0
    sae.sparsity(sae(x))
    assert sae.stats["p"] == pytest.approx(0.2)


def test_a_row_of_matryoshka_costs_the_mean_over_its_prefixes():
    sae, x = small("matryoshka", matryoshka_prefixes=3)
    sae.threshold.zero_()
    sae.eval()
    # prefixes of 1, 2 and all 4 latents, the first two fire: what is left of (3, 1, -1, -2)
    left = ((1 + 1 + 4) + (1 + 4) + (1 + 4)) / 4 / 3
    assert sae.recon_error(sae(x)).item() == pytest.approx(left)


def test_matryoshka_has_five_prefixes():
    sae, _ = build("matryoshka", X)
    out = sae(HELD_OUT[:64])
    prefixes = [out.acts[:, :n] @ sae.W_dec[:n] + sae.b_dec for n in (4, 8, 16, 32, 64)]
    errors = torch.stack([(out.x - x_hat).pow(2).mean(-1) for x_hat in prefixes])
    assert torch.allclose(sae.recon_error(out), errors.mean(0), atol=1e-5)


def test_fixed_ortho_is_the_mean_over_all_pairs():
    sae, _ = build("fixed_ortho", X)
    assert torch.allclose(sae.ortho(), D_IN * cosines(sae).square().mean(), rtol=1e-4)


@pytest.mark.parametrize("chunk", [64, 16])
def test_ortsae_takes_the_largest_cosine_of_each_latent_in_its_chunk(chunk):
    sae, _ = build("ortsae", X, ortsae_chunk=chunk)
    largest = []
    for part in torch.randperm(64, generator=sae.generator("ortsae")).split(chunk):
        largest.append(cosines(sae, part).max(1).values.relu())
    assert torch.allclose(sae.ortho(), torch.cat(largest).square().mean(), atol=1e-6)


def test_ortsae_compares_other_latents_in_every_step():
    sae, _ = build("ortsae", X, ortsae_chunk=16)
    sae.ortho()
    first = sae.nearest
    sae.ortho()
    assert sae.nearest is first                            # once a step
    sae.step = 1
    sae.ortho()
    assert not torch.equal(sae.nearest, first)


# ---- skip ----------------------------------------------------------------------------------------


def test_the_skip_path_starts_at_nothing_and_stays_within_its_bound():
    sae, plain = build("skip", TRAIN)[0], build("baseline", TRAIN)[0]
    assert torch.equal(sae(HELD_OUT).x_hat, plain(HELD_OUT).x_hat)
    sae.skip_raw.data.fill_(100.0)
    path = 0.1 * (HELD_OUT - plain.b_dec)
    assert torch.allclose(sae(HELD_OUT).x_hat, plain(HELD_OUT).x_hat + path, atol=1e-5)


def test_the_skip_path_opens_and_explains():
    assert trained("skip").skip() > 0.02
    assert measured("skip")[0] > measured("baseline")[0] + 0.02


def test_the_latents_start_as_if_there_were_no_path():
    sae, plain = build("skip", TRAIN, skip_learned=False)[0], build("baseline", TRAIN)[0]
    assert torch.equal(sae.W_enc, plain.W_enc) and torch.equal(sae.b_enc, plain.b_enc)


# ---- layernorm -----------------------------------------------------------------------------------


def uneven(x):
    """Rows of very different lengths."""
    return x * torch.randn(len(x), 1, generator=generator("lengths")).exp()


def test_with_layer_norm_the_latents_do_not_see_a_rows_length_or_mean():
    sae, x = trained("layernorm"), HELD_OUT[:64]
    with torch.no_grad():
        out, longer = sae(x), sae(3 * x + 0.7)
    assert torch.allclose(longer.acts, out.acts, atol=1e-4)
    assert torch.allclose(longer.x_hat, 3 * out.x_hat + 0.7, atol=1e-3)


def test_a_row_without_length_does_no_harm():
    assert trained("layernorm")(torch.full((1, D_IN), 0.5)).x_hat.isfinite().all()


def test_latents_start_and_restart_firing_at_the_wanted_rate_on_normed_rows():
    x = uneven(TRAIN[:8192])
    sae, opt = build("layernorm", x)
    assert (sae.firing(sae(x).acts) - 4 / 64).abs().max() < 0.002
    which = torch.arange(8)
    sae.reset_latents(opt, which, torch.randn(8, D_IN, generator=generator("restart")), x)
    assert (sae.firing(sae(x).acts)[which] - 4 / 64).abs().max() < 0.002


def test_under_layer_norm_a_rows_length_does_not_change_what_dead_latents_are_asked_for():
    sae, x = trained("layernorm"), HELD_OUT[:64]
    sae.silent[:8] = 1e9
    with torch.no_grad():
        assert torch.isclose(sae.aux(sae(x)), sae.aux(sae(4 * x)), rtol=1e-3)
    sae.silent[:8] = 0

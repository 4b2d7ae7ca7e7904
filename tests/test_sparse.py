"""Promises of the sparse path: the same numbers as the dense one, whatever reads the codes, and no dense codes unless asked for."""
import os
import statistics
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae as sae_py
from sae import ROOT, SAE, Codes, Encode, Pick, above, firing, generator, highest
from toys import build, evaluate, mixture, steps, train, train_py

KINDS = ["relu", "topk", "batch_topk", "jumprelu"]


@pytest.fixture
def path(monkeypatch):
    """path(True): codes are sparse whatever their size; path(False): never."""
    return lambda sparse: monkeypatch.setattr(sae_py, "SPARSE_BELOW", 1e9 if sparse else 0.0)


X = mixture()[0]


def random_sae(activation, d_in, d_sae, l0, seed):
    """Random weights, biases that leave some rows and some latents empty, in float64; at the end of training's sparsity schedule."""
    g = generator("weights", seed)
    sae = SAE(d_in, 1, activation=activation, d_sae=d_sae, l0=l0).double()
    sae.step = 1
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
        sae.b_enc.sub_(3 * (torch.rand(d_sae, generator=g) < 0.3))
    return sae


def both(sae, x, path, loss):
    """(Out, loss, gradients) of the sparse and of the dense path."""
    results = []
    for sparse in (True, False):
        path(sparse)
        sae.zero_grad()
        out = sae.train()(x)
        assert isinstance(out.acts, Codes) == sparse
        value = loss(sae, out)
        value.backward()
        results.append((out, value.detach(), {k: p.grad.clone() if p.grad is not None else None for k, p in sae.named_parameters()}))
    return results


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6))
def test_sparse_and_dense_agree_in_values_and_gradients(activation, rows, d_in, d_sae, share, seed):
    """Odd sizes, empty rows, k from 1 to d_sae / 2 (all that wanted_l0 gives); a loss that reads the codes sparsely, densely and by pre."""
    sae = random_sae(activation, d_in, d_sae, 1 + share * (d_sae - 1), seed)
    x = torch.randn(rows, d_in, generator=generator("x", seed), dtype=torch.float64)
    x[::3] = sae.b_dec.detach()                                              # rows in which next to nothing fires
    weights = torch.randn(rows, d_sae, generator=generator("w", seed), dtype=torch.float64)

    def loss(sae, out):
        penalty = sae.sparsity(out) if activation in ("relu", "jumprelu") else 0
        return (out.x - out.x_hat).pow(3).sum() + penalty + (out.acts * weights).pow(2).sum() + (out.pre * weights).sum()

    with pytest.MonkeyPatch.context() as m:
        path = lambda sparse: m.setattr(sae_py, "SPARSE_BELOW", 1e9 if sparse else 0.0)
        (a, la, ga), (b, lb, gb) = both(sae, x, path, loss)
    assert close(a.acts.dense(), b.acts) and close(a.x_hat, b.x_hat) and close(la, lb)
    assert all(close(ga[k], gb[k]) for k in ga)
    assert torch.equal(firing(a.acts), firing(b.acts))


def random_codes(rows, d_sae, n, seed):
    """n values at random places, sorted by row: rows without any, latents in several rows, and the same place twice."""
    g = generator("codes", seed)
    row = torch.randint(rows, (n,), generator=g).sort().values
    values = torch.randn(n, generator=g, dtype=torch.float64, requires_grad=True)
    return Codes(values, row, torch.randint(d_sae, (n,), generator=g), torch.Size((rows, d_sae)))


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 30), st.integers(0, 10**6))
def test_the_sparse_product_is_the_dense_one(rows, d_sae, n_out, n, seed):
    codes = random_codes(rows, d_sae, n, seed)
    W = torch.randn(d_sae, n_out, generator=generator("W", seed), dtype=torch.float64, requires_grad=True)
    b = torch.randn(n_out, generator=generator("b", seed), dtype=torch.float64)
    weights = torch.randn(rows, n_out, generator=generator("g", seed), dtype=torch.float64)
    dense = codes.dense()
    for product in (lambda a: a @ W, lambda a: torch.matmul(a, W), lambda a: torch.addmm(b, a, W), lambda a: (a @ W[:, 0])[:, None]):
        sparse_grads, dense_grads = (torch.autograd.grad((product(a) * weights[:, :product(a).shape[1]]).sum(), [codes.values, W], retain_graph=True)
                                     for a in (codes, dense))
        assert close(product(codes), product(dense)) and all(map(close, sparse_grads, dense_grads))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), max_size=4), st.integers(1, 9), st.integers(0, 30), st.integers(0, 10**6))
def test_a_block_of_codes_is_the_dense_block(blocks, rows, n, seed):
    """Empty blocks and negative ends too; the same products and gradients."""
    codes, results = random_codes(rows, 8, n, seed), []
    W = torch.randn(8, 3, generator=generator("W", seed), dtype=torch.float64, requires_grad=True)
    for whole in (codes, codes.dense()):
        parts = [whole[:, i:j] for i, j in blocks] + [whole[:, :4], whole[:, 4:]]
        assert all(isinstance(p, Codes) == isinstance(whole, Codes) for p in parts)
        products = [p @ w for p, w in zip(parts, [W[i:j] for i, j in blocks] + [W[:4], W[4:]])]
        results.append([*products, *torch.autograd.grad(sum((p ** 3).sum() for p in products), [codes.values, W], retain_graph=True)])
    assert all(map(close, *results))


@settings(deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 63, 64, 100, 128, 192, 648, 1024]), st.integers(1, 16), st.booleans(), st.integers(0, 10**6))
def test_the_highest_are_those_of_topk(rows, d_sae, k, ties, seed):
    pre = torch.randn(rows, d_sae, generator=generator("pre", seed))
    pre, k = pre.round() if ties else pre, min(k, d_sae)
    pre[0, seed % d_sae] = torch.nan
    at = highest(pre, k)
    assert all(len(set(row)) == k for row in at.tolist()) and at[0].eq(seed % d_sae).any()
    assert torch.equal(pre.gather(1, at).sort().values.nan_to_num(9.0), pre.topk(k).values.flip(1).sort().values.nan_to_num(9.0))


@pytest.mark.parametrize("k", [1, 3, 17])
def test_every_row_may_hold_one_code_or_all(k):
    """k = 1 and k = d_sae, against autograd in float64 by finite differences."""
    at = torch.cat([torch.arange(17)[:k] + 17 * row for row in range(5)])
    x = torch.randn(5, 4, generator=generator("x"), dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(s, generator=generator(s), dtype=torch.float64, requires_grad=True) for s in ((4, 17), (17,), (4,), (17, 6))]

    def forward(x, W_enc, b_enc, b_dec, W_dec):
        codes = Codes.of(Encode.apply(x, W_enc, b_enc, b_dec), at, lambda v: v)
        return torch.addmm(torch.zeros(6, dtype=torch.float64), codes, W_dec)

    assert torch.autograd.gradcheck(forward, (x, *weights))


def test_a_gradient_is_sparse_at_the_encoder_and_dense_elsewhere():
    x, at = torch.randn(3, 4, generator=generator("x")), torch.tensor([0, 7, 7, 14])
    weights = [torch.randn(s, generator=generator(s), requires_grad=True) for s in ((4, 5), (5,), (4,))]
    seen, plain = [], (x - weights[2]) @ weights[0] + weights[1]
    for pre in (Encode.apply(x, *weights), 2 * Encode.apply(x, *weights), plain):
        pre.grad_fn.register_prehook(lambda grads: seen.append(grads[0].layout))
        Pick.apply(pre, at).pow(2).sum().backward()
    assert seen == [torch.sparse_coo, torch.strided, torch.strided]


def test_codes_are_a_tensor_like_any_other():
    codes = random_codes(6, 8, 12, 1)
    dense = codes.dense().detach()
    for use in (lambda a: a > 0, lambda a: a.sum(0), lambda a: a[:, 2:5:2], lambda a: a[1:, 2:5], lambda a: a[:, 2:5, None], lambda a: 3 - a, lambda a: torch.cat([a, a]), lambda a: a.T @ a, lambda a: a * a,
                lambda a: torch.stack([a, 2 * a]), lambda a: torch.nn.functional.avg_pool1d(a[:, None], 3), lambda a: a.clone(), lambda a: a.topk(2).values,
                lambda a: torch.where(a > 0, a, 1.0), lambda a: torch.ones_like(a), lambda a: a.double().index_select(1, torch.tensor([3])),
                lambda a: a.max(dim=1).values, lambda a: torch.ones(3, 6, dtype=a.dtype) @ a, lambda a: torch.einsum("bm,bn->mn", a, a)):
        got = use(random_codes(6, 8, 12, 1))
        assert torch.equal(got, use(dense)) and not isinstance(got, Codes)
    assert torch.is_tensor(codes) and codes.dtype == torch.float64 and len(codes) == 6 and codes.size(1) == 8


def test_detached_codes_stay_sparse_and_pass_no_gradient():
    codes = random_codes(6, 8, 12, 1)
    again = codes.detach()
    assert isinstance(again, Codes) and again.shape == (6, 8) and again.whole is None and codes.whole is None
    assert not again.dense().requires_grad and codes.dense().requires_grad and torch.equal(again.dense(), codes.dense())


@pytest.mark.parametrize("variant, activation", [*(("baseline", a) for a in KINDS), ("matryoshka", "batch_topk")])
def test_a_step_never_makes_the_codes_dense(variant, activation, path):
    path(True)
    sae, opt = build(variant, X, activation=activation)
    made = []
    steps(sae, opt, X, stop=5, each=lambda sae, out, terms: made.append(out.acts))
    assert all(isinstance(a, Codes) and a.whole is None for a in made)


def test_the_path_is_chosen_by_size_and_not_in_evaluation():
    sizes = {(1024, 16.0): True, (1024, 60.0): False, (64, 4.0): False, (64, 1.0): False, (8192, 32.0): True, (8192, 500.0): False}
    below, sae_py.SPARSE_BELOW = sae_py.SPARSE_BELOW, 0.05
    try:
        for (d_sae, l0), sparse in sizes.items():
            for activation in ("relu", "topk", "batch_topk"):
                sae = SAE(4, 1, activation=activation, d_sae=d_sae, l0=l0)
                sae.step = 1
                assert isinstance(sae.activate(torch.randn(3, d_sae)), Codes) == sparse
                assert not isinstance(sae.eval().activate(torch.randn(3, d_sae)), Codes)
    finally:
        sae_py.SPARSE_BELOW = below


def test_jumprelu_takes_the_sparse_path_where_few_entries_are_near_the_thresholds(monkeypatch):
    monkeypatch.setattr(sae_py, "SPARSE_BELOW", 0.05)
    sae, pre = SAE(4, 1, activation="jumprelu", d_sae=1024, l0=16.0), torch.randn(64, 1024, generator=generator("pre"))
    for shift, sparse in ((0, False), (-2, True)):                         # 23 % and 0.3 % of pre are above 0.75, a threshold less half the bandwidth
        acts = sae.activate(pre + shift)
        assert isinstance(acts, Codes) == sparse and torch.equal(acts.dense() if sparse else acts, sae.eval().activate(pre + shift))
        sae.train()


@pytest.mark.parametrize("activation", KINDS)
def test_a_number_that_is_not_finite_is_not_overlooked(activation, path):
    path(True)
    sae = SAE(4, 1, activation=activation, d_sae=16, l0=2.0)
    pre = torch.randn(8, 16, generator=generator("pre"))
    pre[3, 5] = torch.nan
    assert not (sae.activate(pre) @ sae.W_dec).isfinite().all()


def test_above_gives_what_is_above():
    pre = torch.tensor([[1.0, torch.nan, -1.0], [0.0, torch.inf, 2.0]])
    assert above(pre, 0.0).tolist() == [0, 1, 4, 5] and above(pre, 5.0).tolist() == [1, 4] and len(above(-pre.abs().nan_to_num(1.0), 0.0)) == 0


@pytest.mark.parametrize("activation", KINDS)
def test_same_seed_same_bits(activation, path):
    path(True)
    a, b = (train("baseline", X, 40, activation=activation) for _ in range(2))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("activation", KINDS)
def test_the_first_steps_are_those_of_the_dense_path(activation, path):
    """Rounding is all that differs; later it is amplified as any rounding is, so the end is compared by what it reaches (slow test)."""
    saes = []
    for sparse in (True, False):
        path(sparse)
        sae, opt = build("baseline", X, activation=activation)
        steps(sae, opt, X, stop=10)
        saes.append(sae)
    for (k, a), b in zip(saes[0].state_dict().items(), saes[1].state_dict().values()):
        assert torch.allclose(a, b, atol=1e-4), k


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("activation", KINDS)
def test_in_bfloat16_a_step_reaches_what_it_reaches_in_fp32(activation, sparse, path, monkeypatch):
    """As big runs are trained on a CPU with units for it. The same bits twice; the wanted L0; weights and moments in fp32."""
    path(sparse)
    reached, seen = {}, set()
    for dtype, start in ((torch.float32, 1e30), (torch.bfloat16, 0), (torch.bfloat16, 0)):
        monkeypatch.setattr(train_py, "BF16_FROM", start)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        sae = train("baseline", X, 200, each=lambda sae, out, terms: seen.add((dtype, out.pre.dtype)), activation=activation)
        assert all(v.dtype == torch.float32 for v in sae.state_dict().values())
        reached.setdefault(dtype, []).append((evaluate(sae, X[-8192:]), sae.state_dict()))
    assert seen == {(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)}
    ((ev, l0, _), _), ((ev16, l016, _), a), (_, b) = *reached[torch.float32], *reached[torch.bfloat16]
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert abs(ev16 - ev) < 0.02 and abs(l016 - l0) < 0.03 * l0


@pytest.mark.slow
@pytest.mark.parametrize("activation", KINDS)
def test_loss_curves_agree_within_the_seeds_spread(activation, path):
    """2,000 steps, 3 seeds: the paths differ by less than seeds do, all along the curve and in what is reached."""
    curves, reached = {}, {}
    for sparse in (True, False):
        path(sparse)
        for seed in range(3):
            curve = curves[sparse, seed] = []
            sae = train("baseline", X, 2000, seed, each=lambda sae, out, terms: curve.append(float(terms["recon"])), activation=activation)
            path(False)
            reached[sparse, seed] = evaluate(sae, X[-8192:])[0]
            path(sparse)
    piece = lambda sparse, seed, i: statistics.mean(curves[sparse, seed][i:i + 200])
    for at in [lambda sparse, seed, i=i: piece(sparse, seed, i) for i in range(0, 2000, 200)] + [lambda sparse, seed: reached[sparse, seed]]:
        spread = max(at(False, s) for s in range(3)) - min(at(False, s) for s in range(3))
        apart = abs(statistics.mean(at(True, s) for s in range(3)) - statistics.mean(at(False, s) for s in range(3)))
        assert apart < spread, (apart, spread)


@pytest.mark.slow
def test_every_promise_of_the_variants_holds_on_the_sparse_path():
    env = {**os.environ, "SPARSE_BELOW": "1"}
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_variants.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]

"""Promises of the Triton kernels: the sparse products of any codes, and what is done to a decoder's rows. They run on a GPU where there is one, else, slowly, by Triton's
interpreter on the CPU (conftest.py asks for it), which shows that they compute the right thing and not that they are fast."""
import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae as sae_py
from sae import (ROOT, Codes, bag, bag_transposed, dots, generator, kernels_pay, kernels_work, project_rows, rows_by_kernel, starts, unit,
                 unit_rows, variant_names)
from toys import build, mixture, steps, train_py

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
X = mixture()[0].to(DEVICE)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """kernels(False): the same products by PyTorch's own operations; sparse codes whatever their size."""
    monkeypatch.setattr(sae_py, "SPARSE_BELOW", 1e9)
    monkeypatch.setattr(sae_py, "kernels_pay", lambda *size: True)
    use = lambda on: monkeypatch.setattr(sae_py, "by_kernel", lambda *tensors: on)
    use(True)
    return use


def random_codes(rows, d_sae, n, seed):
    """Values of n random places: rows and latents without any, and the same place several times."""
    g = generator("codes", seed)
    owners, latents = torch.randint(rows, (n,), generator=g).sort().values, torch.randint(d_sae, (n,), generator=g)
    return torch.randn(n, generator=g).to(DEVICE), owners.to(DEVICE), latents.to(DEVICE)


def close(a, b):
    """Sums in fp32 against sums in fp64 of the same numbers."""
    return a.dtype == torch.float32 and a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max().clamp_min(1) if a.numel() else a.shape == b.shape


def check(values, owners, latents, rows, d_sae, d, dtype):
    """All four products against dense ones in fp64."""
    W, G = (torch.randn(s, d, generator=generator(s, d)).to(DEVICE, dtype) for s in (d_sae, rows))
    dense = torch.zeros(rows, d_sae, dtype=torch.float64, device=DEVICE).index_put((owners, latents), values.double(), accumulate=True)
    assert close(bag(values, latents, starts(owners, rows), W), dense @ W.double())
    assert close(bag_transposed(values, owners, latents, d_sae, G), dense.T @ G.double())
    assert close(dots(G, W, owners, latents, starts(owners, rows)), (G.double() @ W.double().T)[owners, latents])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([1, 2, 3, 16, 31, 257, 300]), st.integers(0, 40), st.booleans(), st.integers(0, 10**6))
def test_the_products_are_the_dense_ones(rows, d_sae, d, n, half, seed):
    """Odd sizes, empty rows and latents, repeated places, weights in bfloat16 and float32."""
    check(*random_codes(rows, d_sae, n, seed), rows, d_sae, d, torch.bfloat16 if half else torch.float32)


@pytest.mark.parametrize("k", [1, 13])
def test_a_row_may_hold_one_code_or_all(k):
    owners, latents = torch.arange(3).repeat_interleave(k), torch.arange(13)[:k].repeat(3)
    check(torch.randn(3 * k).to(DEVICE), owners.to(DEVICE), latents.to(DEVICE), 3, 13, 40, torch.float32)


def test_one_latent_may_fire_in_every_row_and_one_row_hold_everything():
    zeros, all_ = torch.zeros(300, dtype=torch.long, device=DEVICE), torch.arange(300, device=DEVICE)
    check(torch.randn(300).to(DEVICE), all_, zeros, 300, 2, 5, torch.float32)
    check(torch.randn(300).to(DEVICE), zeros, all_, 2, 300, 5, torch.float32)


def test_numbers_that_are_not_finite_stay_in_their_rows():
    W = torch.ones(4, 3, device=DEVICE)
    W[2] = torch.nan
    columns, at = torch.tensor([0, 1, 2, 3], device=DEVICE), torch.tensor([0, 1, 2, 4, 4], device=DEVICE)
    assert bag(torch.ones(4, device=DEVICE), columns, at, W).isfinite().all(1).tolist() == [True, True, False, True]


def same_steps(kernels, variant, **settings):
    """-> the codes of two steps by kernels; they end where the same steps without kernels do."""
    kernels(False)                                                      # the start looks at 8,192 rows
    start, ends, codes = build(variant, X.cpu(), batch_size=16, **settings)[0].to(DEVICE), [], []
    for on in (True, False):
        kernels(on)
        sae = copy.deepcopy(start)
        steps(sae, sae.make_optimizer(), X, stop=2, each=lambda sae, out, terms: codes.append(out.acts))
        ends.append(sae.state_dict())
    if DEVICE.type == "cpu":                                           # in bfloat16 two ways to add may choose other latents
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*(e.values() for e in ends))), variant
    assert all(v.isfinite().all() for v in ends[0].values()), variant
    return codes[:2]


@pytest.mark.parametrize("variant, activation", [*(("baseline", a) for a in ("relu", "topk", "batch_topk", "jumprelu")), ("matryoshka", "batch_topk")])
def test_training_steps_are_those_without_kernels(variant, activation, kernels):
    assert all(isinstance(a, Codes) for a in same_steps(kernels, variant, activation=activation))


@pytest.mark.slow
@pytest.mark.parametrize("variant", variant_names())
def test_every_variants_steps_are_those_without_kernels(variant, kernels):
    same_steps(kernels, variant)


def test_under_autocast_products_are_as_near_to_fp32_as_dense_ones(kernels):
    values, owners, latents = random_codes(64, 40, 500, 1)
    W, G = torch.randn(40, 96, device=DEVICE, requires_grad=True), torch.randn(64, 96, device=DEVICE)
    values.requires_grad_()

    def products(dense, enabled):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            codes = Codes(values, owners, latents, torch.Size((64, 40)))
            out = (codes.dense() if dense else codes) @ W
        return out, *torch.autograd.grad(out, [values, W], G.to(out.dtype))

    exact, ours, theirs = products(True, False), products(False, True), products(True, True)
    apart = lambda a, b: float((a.detach().float() - b.detach()).norm() / b.detach().norm())
    assert all(a.dtype == torch.float32 for a in ours) and theirs[0].dtype == torch.bfloat16
    for a, b, c in zip(ours, theirs, exact):
        assert 0 < apart(a, c) < max(0.004, 1.2 * apart(b, c))           # bfloat16 rounds by up to 0.4 %


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])         # where no two latents compete: ties in bfloat16 are broken in any way
def test_a_step_under_autocast_has_the_dense_gradients(activation, monkeypatch, kernels):
    """As on a GPU: pre-activations in bfloat16, weights and their gradients in fp32."""
    kernels(False)
    start, gradients = build("baseline", X.cpu(), activation=activation)[0].to(DEVICE), []
    kernels(True)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: autocast(device, dtype))
    for below in (1e9, 0.0):
        monkeypatch.setattr(sae_py, "SPARSE_BELOW", below)
        sae = copy.deepcopy(start)
        out, _ = train_py.backward(sae, sae.make_optimizer(), X[:64], check=False)
        assert out.pre.dtype == torch.bfloat16 and isinstance(out.acts, Codes) == (below > 0)
        gradients.append({k: p.grad for k, p in sae.named_parameters()})
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.05 * theirs.norm(), name


def test_the_same_numbers_give_the_same_bits():
    values, owners, latents = random_codes(50, 30, 400, 2)
    G = torch.randn(50, 70, device=DEVICE)
    assert torch.equal(*(bag_transposed(values, owners, latents, 30, G) for _ in range(2)))


@pytest.mark.parametrize("d", [1, 3, 300, 520])
def test_rows_are_made_unit_and_gradients_orthogonal_to_them(d):
    W, grad = (torch.randn(7, d, generator=generator(d, i)).to(DEVICE) for i in range(2))
    W[3] = 0                                                             # a row of zeros stays one
    wanted = unit(W)
    rows_by_kernel(unit_rows, W)
    torch.testing.assert_close(W, wanted)
    wanted = grad - (grad * W).sum(1, keepdim=True) * W
    rows_by_kernel(project_rows, grad, W)
    torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bag_by_kernel", "dots_by_kernel", "rows_by_kernel"])
def test_kernels_that_fail_or_are_wrong_are_not_used(name, capsys, monkeypatch):
    """One line says so, once; without a fault there is none."""
    real, answers = getattr(sae_py, name), []
    wrong = lambda *a: (real(*a), a[1].mul_(1.001))[0] if name == "rows_by_kernel" else real(*a) * 1.001
    for fault, said in ((real, ""), (lambda *a: 1 / 0, "ZeroDivisionError"), (wrong, "wrong results")):
        kernels_work.cache_clear()
        monkeypatch.setattr(sae_py, name, fault)
        answers += [kernels_work(DEVICE), kernels_work(DEVICE)]
        out = capsys.readouterr().out
        assert said in out and out.count("\n") == bool(said), out
    kernels_work.cache_clear()
    assert answers == [True, True, False, False, False, False]


def test_the_faster_way_is_taken_and_told_once(capsys):
    kernels_pay.cache_clear()
    with torch.no_grad():
        pays = [kernels_pay(DEVICE, 4, 8, 16, 2) for _ in range(2)]
    out = capsys.readouterr().out
    assert pays[0] == pays[1] == ("are sparse" in out) and "ms by kernels" in out and out.count("\n") == 1, out


COMPILE = """
import warnings, triton
from sae import compiled, gather_dot, gather_sum, project_rows, tile, unit_rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for d in (2304, 1):
    N, D = tile(d)
    for weights in ("fp32", "bf16"):
        for kernel, kinds in ((gather_sum, f"out:*fp32 values:*{weights} columns:*i64 starts:*i64 W:*{weights} d:i32"),
                              (gather_dot, f"out:*fp32 G:*{weights} W:*{weights} rows:*i64 columns:*i64 n:i32 d:i32"),
                              (project_rows, f"grad:*{weights} W:*{weights} d:i32"), (unit_rows, f"W:*{weights} d:i32")):
            sizes = {"N": N, "D": D} if kernel in (gather_sum, gather_dot) else {"D": 1 << (d - 1).bit_length()}
            signature = dict(kind.split(":") for kind in kinds.split())
            aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name == "d" and d % 16 == 0}
            source = ASTSource(fn=compiled(kernel), signature=signature | dict.fromkeys(sizes, "constexpr"), constexprs=sizes, attrs=aligned)
            for chip in (80, 90):
                made = triton.compile(source, target=GPUTarget("cuda", chip, 32))
                wide = "v4.b32" in made.asm["ptx"]
                print(chip, kernel.__name__, weights, d, len(made.asm["cubin"]), made.metadata.shared, "wide" if wide else "narrow")
"""


def test_they_compile_for_the_a100_and_the_h100(tmp_path):
    """To machine code, with loads of 16 bytes where the rows' length allows it, in little shared memory."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 32
    for _, _, _, d, code, shared, loads in lines:
        assert int(code) > 1000 and int(shared) < 48_000 and loads == ("wide" if d == "2304" else loads)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the real one takes ten minutes")
def test_the_gpus_benchmark_runs_through(tmp_path):
    """Its rehearsal on a CPU: every part, and nothing in it failed."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "bench" / "gpu.py", "--steps", "1", "--json", tmp_path / "all.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "all.json").read_text())
    assert set(found) == {"rates", "train", "profile", "stage1", "ideas"} and "failed" not in done.stdout.lower()

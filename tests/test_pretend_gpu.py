"""Promises on a GPU that a machine without one can check: devices, and operators started there."""
import contextlib
import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from pretend_gpu import HERE, pretended

from sae import SAE, read_json, variant_names
from toys import build, mixture, steps, train_py, write_cache

cache_py = importlib.import_module("01_cache_acts")
X = mixture(4096)[0]


def test_it_refuses_what_a_gpu_refuses():
    with pretended():
        x = torch.rand(2, 3)
        there = x.to("cuda")
        assert there.is_cuda and not x.is_cuda and torch.equal((there + 1).cpu(), x + 1)
        assert {
            t.device for t in (there @ there.T, torch.zeros(2, device="cuda"), there.new_ones(3))
        } == {HERE}
        for wrong in (lambda: x + there, lambda: there @ x.T, lambda: x[there > 0], there.numpy,
                      lambda: torch.rand(2, generator=torch.Generator(), device="cuda")):
            with pytest.raises((RuntimeError, TypeError),
                               match="same device|generator|convert cuda"):
                wrong()
    assert torch.rand(2).device.type == "cpu"


@pytest.mark.parametrize("name", variant_names())
def test_every_variant_trains_there_as_on_the_cpu(name):
    """All tensors are on the GPU; losses are the CPU's but for bfloat16."""
    losses = {}
    for where, device in ("cpu", contextlib.nullcontext()), ("cuda", pretended()):
        with device:
            sae, _ = build(name, X, 40)
            sae = sae.to(where)
            log = losses[where] = []
            steps(sae, sae.make_optimizer(), X.to(where), stop=8,
                  each=lambda sae, out, terms: log.append(float(sum(terms.values()))))
            assert {p.device.type for p in [*sae.parameters(), *sae.buffers()]} == {where}
    wide = 0.05 if sae.paired else 0.15              # rows drawn by their errors are other rows
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=wide)


@pytest.mark.parametrize("activation, most",
                         [("relu", 110), ("topk", 80), ("batch_topk", 85), ("jumprelu", 155)])
def test_a_step_starts_few_kernels_and_no_more_in_a_wide_dictionary(activation, most):
    counts = []
    for d_sae in (256, 2304):
        with pretended() as launched:
            sae, _ = build("baseline", X, 400, d_sae=d_sae, activation=activation)
            sae = sae.to("cuda")
            opt = sae.make_optimizer()
            steps(sae, opt, X.to("cuda"), stop=3)
            launched.clear()
            steps(sae, opt, X.to("cuda"), start=3, stop=4)
        assert not any(
            "kthvalue" in name or "bincount" in name for name in launched
        )  # slow, or they wait for the GPU
        counts.append(len(launched))
    assert counts[0] == counts[1] < most


def test_stage_2_runs_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "acts" / "tiny", mixture(n_rows=20_000)[0])
    final = {}
    for device in ("cpu", "cuda"):
        words = ["--variant", "baseline", "batch_topk", "--seed", "0", "--device", device, "--set",
                 "d_sae=64", "l0=4", "batch_size=256"]
        monkeypatch.setattr(sys, "argv", ["02_train.py", *words])
        with pretended():
            assert train_py.main() == 0
        configs = [read_json(path) for path in sorted(Path("runs").glob("*/config.json"))]
        assert all(config["device"].startswith(device) for config in configs)
        assert torch.are_deterministic_algorithms_enabled() == (device == "cpu")
        final[device] = [config["final"]["explained_variance"] for config in configs]
        shutil.rmtree("runs")
    assert final["cuda"] == pytest.approx(final["cpu"], abs=0.02)


def test_a_gpu_takes_the_dense_path():
    """Measured: there no sparse step is faster."""
    with pretended():
        sae = SAE(32, 10, d_sae=2**16, l0=9.0)
        assert sae.path == "sparse" and sae.to("cuda").path == "dense"


def test_aux_on_a_gpu_makes_dense_products():
    with pretended() as launched:
        sae, _ = build("baseline", X)
        sae = sae.to("cuda")
        sae.silent[:24] = 1e9
        terms = {}
        steps(sae, sae.make_optimizer(), X.to("cuda"), stop=1,
              each=lambda sae, out, found: terms.update(found))
    assert terms["aux"] > 0 and launched
    assert not any("embedding_bag" in name or "sparse" in name for name in launched)


def test_a_part_is_copied_from_there_whole_and_in_order():
    """Stage 1: the rows that are kept, as they were on the GPU when the copy was asked for."""
    kept = torch.tensor([5, 0, 3])
    with pretended():
        there = X.to("cuda")
        rows = cache_py.to_host(there, kept)
        there.zero_()                                # the model goes on
        assert torch.equal(rows(0, 3), X[kept]) and torch.equal(rows(1, 2), X[[0]])
        assert not rows(0, 3).is_cuda

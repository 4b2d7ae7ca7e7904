"""Promises about a GPU; where there is none a pretended one, see pretend_gpu.py. What they compare with is the CPU, on which all other tests run."""
import contextlib
import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch

import sae as sae_py
from pretend_gpu import pretended
from sae import ROOT, Acts, generator, read_json, variant_names
from test_cache import save, texts, write_jsonl
from toys import D_IN, build, evaluate, mixture, steps, train_py, write_cache

pytestmark = pytest.mark.gpu

GPU, REAL = "cuda", torch.cuda.is_available()
ACTIVATIONS = ["relu", "topk", "batch_topk", "jumprelu"]
RICH = mixture(features=96, l0=8.0, zipf=0.3)[0]


@pytest.fixture(autouse=True)
def a_gpu():
    with contextlib.nullcontext() if REAL else pretended():
        yield


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch):
    """Codes are sparse, and their products the kernels', whatever their size; or never."""
    monkeypatch.setattr(sae_py, "SPARSE_BELOW", 1e9 if request.param == "sparse" else 0.0)
    monkeypatch.setattr(sae_py, "kernels_pay", lambda *size: True)
    return request.param


def on_gpu(variant, x, n_steps, **settings):
    """An SAE that was started from data on the CPU, moved to the GPU, and its optimizer there."""
    sae, _ = build(variant, x, n_steps, **settings)
    sae = sae.to(GPU)
    return sae, sae.make_optimizer()


def mostly_equal(a, b):
    """Nine of ten elements agree to 1e-4 of the largest. Not all: where two pre-activations are equal up to rounding, another latent fires."""
    return float(((a.detach().cpu() - b.detach().cpu()).abs() <= 1e-4 * b.detach().abs().max().cpu()).float().mean()) > 0.9


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_step_in_fp32_is_the_cpus(activation, monkeypatch, path):
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())      # the step as it is, without bfloat16
    on_cpu, opt = build("baseline", RICH, 100, activation=activation, l0=5.0)
    there = copy.deepcopy(on_cpu).to(GPU)
    opt_there, before = there.make_optimizer(), copy.deepcopy(on_cpu.state_dict())
    out, terms, stepped = train_py.train_step(on_cpu, opt, RICH[:2048])
    out_there, terms_there, stepped_there = train_py.train_step(there, opt_there, RICH[:2048].to(GPU))
    assert stepped and stepped_there and terms.keys() == terms_there.keys()
    for name in terms:
        assert float(terms_there[name]) == pytest.approx(float(terms[name]), rel=1e-3, abs=1e-6), name
    for part in ("pre", "x_hat"):
        assert mostly_equal(getattr(out_there, part), getattr(out, part)), part
    gradients = dict(there.named_parameters())
    for name, p in on_cpu.named_parameters():
        assert mostly_equal(gradients[name].grad, p.grad), f"gradient of {name}"
    after = there.state_dict()
    for name, value in on_cpu.state_dict().items():
        if value.is_floating_point() and value.numel() > 1:
            assert mostly_equal(after[name], value), name
    assert not torch.equal(on_cpu.W_dec, before["W_dec"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_trains_fp32_weights_to_the_l0_that_was_asked_for(activation, path):
    sae, opt = on_gpu("baseline", RICH, 400 if REAL else 120, activation=activation, l0=5.0)
    seen, x = [], RICH.to(GPU)
    steps(sae, opt, x, each=lambda sae, out, terms: seen.append((out.x_hat.dtype, float(sum(terms.values())))))
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert {m.dtype for s in opt.state.values() for m in s.values() if torch.is_tensor(m)} == {torch.float32}
    assert all(abs(loss) < float("inf") for _, loss in seen)
    sae.step = sae.steps
    ev, l0, _ = evaluate(sae.eval(), x)
    assert abs(l0 - 5) < 0.1 * 5 and ev > 0.3
    on_the_cpu = evaluate(copy.deepcopy(sae).cpu(), RICH)
    assert (ev, l0) == (pytest.approx(on_the_cpu[0], abs=1e-3), pytest.approx(on_the_cpu[1], rel=1e-2))


@pytest.mark.parametrize("variant", variant_names())
def test_every_variant_trains(variant, path):
    x = RICH.to(GPU)
    n = 30 if REAL else 10
    sae, opt = on_gpu(variant, RICH, n)
    losses = []
    steps(sae, opt, x, each=lambda sae, out, terms: losses.append(float(sum(terms.values()))))
    assert len(losses) == n and all(abs(loss) < float("inf") for loss in losses)
    assert all(v.isfinite().all() for v in sae.state_dict().values()) and all(v.device.type == GPU for v in sae.state_dict().values())


@pytest.mark.skipif(not REAL, reason="no GPU, and a pretended one is not waited for")
@pytest.mark.parametrize("activation, waits", [("topk", 3), ("relu", 4), ("batch_topk", 8)])
def test_a_step_waits_for_the_gpu_only_to_refuse_to_count_and_to_look_for_the_dead(activation, waits, path):
    """Once for the loss and the rows, once for the gradient's norm, once for AuxK's dead latents, once where the number of codes is not known
    before; BatchTopK looks for its cut up to three times, as far off the carried threshold is, and keeps what is above it."""
    sae, opt = on_gpu("baseline", RICH, 100, activation=activation, l0=5.0)
    x, seen = RICH.to(GPU), []
    steps(sae, opt, x, stop=3)                                                  # the first ones compile
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            steps(sae, opt, x, start=3, stop=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchroniz" in str(w.message)]) <= waits, [f"{w.filename}:{w.lineno}" for w in seen]


def test_a_checkpoint_goes_on_where_it_was():
    x = RICH.to(GPU)
    sae, opt = on_gpu("topk", RICH, 40)
    steps(sae, opt, x, stop=20)
    tensors, plain = train_py.pack(sae, opt)
    tensors = {k: v.cpu().clone() for k, v in tensors.items()}           # as it comes from a file
    again, opt_again = on_gpu("topk", RICH, 40)
    train_py.unpack(again, opt_again, tensors, plain)
    ends = []
    for s, o in ((sae, opt), (again, opt_again)):
        steps(s, o, x, start=20, stop=21)
        ends.append(s.W_enc.detach().cpu())
    assert mostly_equal(ends[1], ends[0])


def test_activations_stay_on_the_gpu_for_several_epochs_if_they_fit(tmp_path, monkeypatch):
    """One pass reads each shard once, so that there is nothing to keep."""
    acts = Acts(write_cache(tmp_path / "acts" / "a", torch.randn(3 * 1024 + 64, D_IN), rows_per_shard=1024, val=64))
    plan = train_py.plan_steps(acts, 256, epochs=3)
    rows = [r for _, _, r, _ in train_py.stream(acts, plan, torch.device(GPU), 0)]
    assert len(rows) == 36 and acts.reads == 3 and {r.device.type for r in rows} == {GPU}
    assert len({r.data_ptr() for r in rows}) == 3
    assert torch.equal(rows[0].cpu(), acts.shard(plan[0][1])["acts"])
    monkeypatch.setattr(train_py, "free_memory", lambda device: acts.rows * D_IN * 2)      # not twice what they take
    acts.reads = 0
    assert len(list(train_py.stream(acts, plan, torch.device(GPU), 0))) == 36 and acts.reads == 9


def script(folder, name, *argv):
    pretend = [] if REAL else [ROOT / "tests" / "pretend_gpu.py"]
    done = subprocess.run([sys.executable, *pretend, ROOT / name, *map(str, argv)], cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


def test_the_four_scripts_from_text_to_plots(tmp_path):
    save(tmp_path / "m", "gpt_neox")
    write_jsonl(tmp_path / "t.jsonl", texts(n=1200, length=40))
    ask = ["--model", "m", "--layer", 0, 1, "--data", "t.jsonl", "--ctx", 16, "--tokens", 40_000 if REAL else 16_000, "--val-tokens", 2_000, "--rows-per-shard", 4096]
    script(tmp_path, "01_cache_acts.py", *ask, "--device", GPU)
    assert Acts(tmp_path / "acts" / "m_l1").meta["model"]["dtype"] == "bfloat16"
    for name, device in (("gpu", GPU), ("cpu", "cpu")):
        script(tmp_path, "01_cache_acts.py", *ask, "--device", device, "--model-dtype", "float32", "--dtype", "float32", "--name", name)
    first, second = (Acts(tmp_path / "acts" / f"{name}_l1").shard(0) for name in ("gpu", "cpu"))
    assert torch.equal(first["tokens"], second["tokens"])
    torch.testing.assert_close(first["acts"], second["acts"], rtol=1e-2, atol=1e-2)
    script(tmp_path, "02_train.py", "--acts", "m_l1", "--variant", "baseline", "topk", "batch_topk", "--set", "d_sae=48", "l0=4", "batch_size=256",
           "--epochs", 2, "--device", GPU)
    script(tmp_path, "03_eval.py", "--controls", "--eval", "core", "geometry", "stability", "training", "features", "--device", GPU)
    assert "topk" in script(tmp_path, "04_plot.py")
    for run in (tmp_path / "runs").glob("*-s0"):
        config, metrics = read_json(run / "config.json"), read_json(run / "eval" / "core.json")["metrics"]
        assert config["status"] == "done" and config["device"].startswith(GPU) and config["epochs"] == 2
        assert 0.3 < metrics["explained_variance"] < 1 and abs(metrics["l0"] - 4) < 0.8
    assert (tmp_path / "plots" / "pareto.png").stat().st_size > 5_000

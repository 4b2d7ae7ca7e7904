"""Promises that every file in variants/ keeps, each on one short training that all checks of the variant share."""
import functools
import re
import resource
import sys
from pathlib import Path

import pytest
import torch

from sae import SAE, ROOT, Refuse, docstring_line, generator, load_variant, read_tensors, variant_names, write_tensors
from toys import build, evaluate, mixture, steps, train, train_py

NAMES = variant_names()
CHILDREN = [n for n in NAMES if n != "baseline"]
STEPS = 300


@functools.cache
def data():
    return mixture()[0]


@functools.cache
def trained(name, **_):
    """A trained variant, and the loss terms of every step."""
    log = []
    sae = train(name, data(), STEPS, each=lambda sae, out, terms: log.append({k: float(v) for k, v in terms.items()}))
    return sae, log


def parents(cls):
    return [b for b in cls.__bases__ if issubclass(b, SAE)]


@functools.cache
def trained_parent(cls):
    return train(cls, data(), STEPS)


def rows():
    return data()[-8192:]


@pytest.mark.parametrize("name", NAMES)
def test_training_is_finite_and_falls(name):
    sae, log = trained(name)
    assert all(v == v and abs(v) < 1e6 for line in log for v in line.values())
    recon = [line["recon"] for line in log]
    assert sum(recon[-30:]) < sum(recon[:30])
    assert all(p.isfinite().all() for p in sae.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_it_reconstructs_at_the_l0_it_was_asked_for(name):
    sae, _ = trained(name)
    ev, l0, acts = evaluate(sae, rows())
    assert ev > 0.3
    assert abs(l0 - sae.l0) < 0.1 * sae.l0
    assert (acts > 0).any(0).float().mean() > 0.5            # fewer than half of the latents are dead


@pytest.mark.parametrize("name", CHILDREN)
def test_it_trains_differently_from_each_parent(name):
    sae, _ = trained(name)
    for parent in parents(type(sae)):
        other = trained_parent(parent)
        start, _ = build(parent, data(), STEPS)
        assert (sae.W_dec - other.W_dec).norm() > 0.01 * (other.W_dec - start.W_dec).norm()


@pytest.mark.parametrize("name", CHILDREN)
def test_switched_off_it_is_its_parent_bit_for_bit(name):
    cls = load_variant(name)
    assert "off" in vars(cls), "a variant names the settings that switch its idea off: off = {...}"
    off, parent = train(cls, data(), STEPS, **cls.off), trained_parent(parents(cls)[-1])
    for key, value in parent.state_dict().items():
        assert torch.equal(off.state_dict()[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_encoded_alone(name):
    sae, _ = trained(name)
    x = rows()[:512]
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, shuffled, few = sae(x), sae(x[order]), sae(x[:7])
        assert torch.equal(whole.acts, sae(x).acts)           # deterministic
    for a, b in ((whole.acts[order], shuffled.acts), (whole.acts[:7], few.acts), (whole.x_hat[order], shuffled.x_hat), (whole.x_hat[:7], few.x_hat)):
        assert torch.allclose(a, b, atol=1e-4), (a - b).abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_acts_are_sparse_and_not_negative(name):
    sae, _ = trained(name)
    acts = evaluate(sae, rows())[2]
    assert acts.min() >= 0 and acts.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_decoding_the_latents_gives_the_reconstruction(name):
    sae, _ = trained(name)
    if type(sae).forward is not SAE.forward:
        pytest.skip("it adds a path around the latents")
    with torch.no_grad():
        out = sae(rows()[:64])
        assert torch.equal(sae.decode(out.acts), out.x_hat)


@pytest.mark.parametrize("name", NAMES)
def test_decoder_rows_are_unit(name):
    sae, _ = trained(name)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_gives_the_same_bits(name, tmp_path):
    sae, _ = trained(name)
    write_tensors(tmp_path / "sae.safetensors", sae.state_dict())
    again, _ = build(name, data(), STEPS, seed=1)             # another start: everything must come from the file
    again.load_state_dict(read_tensors(tmp_path / "sae.safetensors")[0])
    again.step = again.steps
    again.eval()
    with torch.no_grad():
        a, b = sae(rows()[:64]), again(rows()[:64])
    assert all(torch.equal(u, v) for u, v in zip(a, b))


@pytest.mark.parametrize("name", NAMES)
def test_stopped_and_resumed_it_gives_the_same_bits(name, tmp_path):
    stop = STEPS // 2 + 7
    first, opt = build(name, data(), STEPS)
    steps(first, opt, data(), stop=stop)
    tensors, plain = train_py.pack(first, opt)
    write_tensors(tmp_path / "checkpoint.safetensors", tensors)
    second, opt = build(name, data(), STEPS)
    train_py.unpack(second, opt, read_tensors(tmp_path / "checkpoint.safetensors")[0], plain)
    steps(second, opt, data(), start=stop)
    straight, _ = trained(name)
    for key, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_under_bf16_autocast(name):
    """As on a GPU, where 02_train.py casts: the forward pass and the losses in bf16, weights and surgery in fp32."""
    sae, opt = build(name, data(), 20)
    for sae.step in range(20):
        sae.first_row, sae.position = 0, sae.step * 256
        x = data()[sae.choose_batch(len(data()), generator(sae.step))]
        with torch.autocast("cpu", torch.bfloat16):
            out = sae.train()(x)
            loss = sum(sae.losses(out).values())
        opt.zero_grad()
        loss.backward()
        sae.before_step(opt)
        opt.step()
        with torch.no_grad():
            sae.after_step(opt, out._replace(**{k: v.detach() for k, v in out._asdict().items()}))
    assert loss.isfinite() and all(p.isfinite().all() for p in sae.parameters())
    assert all(v.dtype != torch.bfloat16 for v in sae.state_dict().values())


@functools.cache
def trained_on(activation, cls):
    return train(cls, data(), 150 if activation == "batch_topk" else 400, activation=activation)     # L0 is steered by the others' controllers


def choices(name):
    """The activations that the idea is open to; itself a sparsifier, it refuses the others."""
    if name.startswith("zscore_r") or name == "p_anneal":
        return ["relu"]
    return ["topk"] if name == "adaptive_ortho_r10" else ["relu", "topk", "batch_topk", "jumprelu"]


@pytest.mark.parametrize("activation", ["batch_topk", *(pytest.param(a, marks=pytest.mark.slow) for a in ("relu", "topk", "jumprelu"))])
@pytest.mark.parametrize("name", [n for n in CHILDREN if load_variant(n).off != {"activation": "relu"}])
def test_on_every_activation_it_acts_and_reaches_its_l0_or_is_refused(name, activation):
    """No idea silently does nothing on an activation that leaves it no room."""
    cls = load_variant(name)
    if activation not in choices(name):
        with pytest.raises(Refuse, match=f"activation={activation}"):
            build(name, data(), activation=activation)
        return
    sae, start = trained_on(activation, cls), build(name, data(), activation=activation)[0]
    ev, l0, acts = evaluate(sae, rows())
    assert ev > 0.3 and acts.isfinite().all()
    assert abs(l0 - sae.l0) < 0.1 * sae.l0
    for parent in parents(cls):
        if activation in choices(parent.__module__.split(".")[-1]):
            other = trained_on(activation, parent)
            assert (sae.W_dec - other.W_dec).norm() > 0.01 * (other.W_dec - start.W_dec).norm()


@pytest.mark.parametrize("d_sae", [256, pytest.param(65_536, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_dictionary_may_be_small_or_huge(name, d_sae):
    """Four steps with whatever surgery the variant does. At d_sae 65,536 they may take 3 GB; a mask [d_sae, d_sae] would take 4.3."""
    cls = load_variant(name)
    soon = {key: 0.5 for key in cls.settings() if key.endswith(("_every", "_update", "_redraw"))}       # twice in the run
    soon |= {key: value for key, value in {"revive_silent": 0.25, "loop_taken": 0.5}.items() if key in cls.settings()}
    x = torch.randn(256, 16, generator=generator("rows"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 3 * 10**9, before[1]))
    try:
        sae, opt = build(name, x, 4, d_sae=d_sae, l0=d_sae / 64, batch_size=32, **soon)
        steps(sae, opt, x)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert all(p.isfinite().all() for p in sae.parameters())
    surgery = [getattr(sae, counter) for counter in ("pruned", "revived", "merged") if hasattr(sae, counter)]
    assert not surgery or sum(surgery) > 0


@pytest.mark.parametrize("name", CHILDREN)
def test_the_first_docstring_line_names_parent_and_idea(name):
    line = docstring_line(name)
    assert re.fullmatch(rf"{name} = .+", line) and len(line) < 160
    for parent in parents(load_variant(name)):
        assert (parent.__module__.split(".")[-1] if parent is not SAE else "baseline") in line


@pytest.mark.parametrize("name", CHILDREN)
def test_the_docstring_ends_with_the_costs_that_were_measured(name):
    said = re.search(r"\nCosts: time (\d+\.\d), memory (\d\.\d\d) of the base's\.\n$", sys.modules[load_variant(name).__module__].__doc__)
    assert said, f"measure it: python tests/bench/variant_cost.py {name}, and again with --memory"
    assert f"| {name} | {said[1]} | {said[2]}" in (ROOT / "tests" / "bench" / "RESULTS.md").read_text()
    assert float(said[2]) < 3


def test_a_setting_has_one_home():
    """No two files introduce the same setting: a child may change a setting of its parents, not give it a second meaning."""
    home = {}
    for name in NAMES:
        cls = load_variant(name)
        inherited = set().union(*(b.settings() for b in parents(cls))) if cls is not SAE else set()
        for key in set(cls.settings()) - inherited:
            assert key not in home, f"{key}: in {home[key]} and in {name}"
            home[key] = name


def test_variants_hold_settings_and_methods_only():
    for path in (ROOT / "variants").glob("*.py"):
        assert not re.search(r"\b(pickle|torch\.load|eval\(|exec\(|except\b)", path.read_text()), path.name

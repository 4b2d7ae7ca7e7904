"""Promises that every file in variants/ keeps, on one short training that all checks of a variant
share."""
import functools
import re

import pytest
import torch

from sae import (SAE, ROOT, Refuse, docstring_line, generator, load_variant, parent_of,
                 parse_settings, read_tensors, variant_names, write_tensors)
from toys import build, evaluate, mixture, steps, train, train_py

# r9 before r10: a parent is trained before its child
NAMES = sorted(variant_names(), key=lambda name: re.sub(r"\d+", lambda n: f"{int(n[0]):02}", name))
CHILDREN = [n for n in NAMES if n != "baseline"]
STEPS, SHORT = 300, 100                 # all schedules are fractions of a run
# "module": all tests of a variant one after another, so that one process trains it for all
every_file = pytest.mark.parametrize("name", NAMES, scope="module")
every_child = pytest.mark.parametrize("name", CHILDREN, scope="module")


@functools.cache
def data():
    return mixture()[0]


@functools.cache
def trained(name):
    """A trained variant, and the loss terms of every step."""
    log = []

    def each(sae, out, terms):
        log.append({k: float(v) for k, v in terms.items()})

    return train(name, data(), STEPS, each=each), log


@functools.cache
def trained_shortly(name):
    return train(name, data(), SHORT)


def rows():
    return data()[-8192:]


@every_file
def test_training_is_finite_and_falls(name):
    sae, log = trained(name)
    assert all(v == v and abs(v) < 1e6 for line in log for v in line.values())
    recon = [line["recon"] for line in log]
    assert sum(recon[-30:]) < sum(recon[:30])
    assert all(p.isfinite().all() for p in sae.state_dict().values())


@every_file
def test_it_reconstructs_at_the_l0_it_was_asked_for(name):
    sae, _ = trained(name)
    ev, l0, acts = evaluate(sae, rows())
    assert ev > 0.3
    assert abs(l0 - sae.l0) < 0.1 * sae.l0
    assert (acts > 0).any(0).float().mean() > 0.5  # fewer than half of the latents are dead


@every_child
def test_it_trains_differently_from_its_parent(name):
    sae, parent = trained(name)[0], trained(parent_of(name))[0]
    if name == "revive":                             # no latent dies here: all restart once
        sae = train(name, data(), STEPS, revive_every=0.5, revive_silent=0.0)
    start, _ = build(parent_of(name), data(), STEPS)
    assert (sae.W_dec - parent.W_dec).norm() > 0.01 * (parent.W_dec - start.W_dec).norm()


@every_child
def test_switched_off_it_is_its_parent_bit_for_bit(name):
    cls = load_variant(name)
    assert "off" in vars(cls), "a variant names the settings that switch its idea off: off = {...}"
    off, parent = train(name, data(), SHORT, **cls.off), trained_shortly(parent_of(name))
    for key, value in parent.state_dict().items():
        assert torch.equal(off.state_dict()[key], value), key


@every_file
def test_a_row_is_encoded_alone(name):
    sae, _ = trained(name)
    x = rows()[:512]
    order = torch.randperm(512, generator=generator("order"))
    with torch.no_grad():
        whole, shuffled, few = sae(x), sae(x[order]), sae(x[:7])
        assert torch.equal(whole.acts, sae(x).acts)           # deterministic
    for a, b in ((whole.acts[order], shuffled.acts), (whole.acts[:7], few.acts),
                 (whole.x_hat[order], shuffled.x_hat), (whole.x_hat[:7], few.x_hat)):
        assert torch.allclose(a, b, atol=1e-4), (a - b).abs().max()


@every_file
def test_acts_are_sparse_and_not_negative(name):
    acts = evaluate(trained(name)[0], rows())[2]
    assert acts.min() >= 0 and acts.isfinite().all()


@every_file
def test_decoder_rows_are_unit(name):
    assert torch.allclose(trained(name)[0].W_dec.norm(dim=1), torch.ones(64), atol=1e-5)


@every_file
def test_saved_and_loaded_it_gives_the_same_bits(name, tmp_path):
    sae, _ = trained(name)
    write_tensors(tmp_path / "sae.safetensors", sae.state_dict())
    again, _ = build(name, data(), STEPS, seed=1)  # another start: all must come from the file
    again.load_state_dict(read_tensors(tmp_path / "sae.safetensors")[0])
    again.step = again.steps
    again.eval()
    with torch.no_grad():
        a, b = sae(rows()[:64]), again(rows()[:64])
    assert all(torch.equal(u, v) for u, v in zip(a, b))


@every_file
def test_stopped_and_resumed_it_gives_the_same_bits(name, tmp_path):
    stop = SHORT // 2 + 7
    first, opt = build(name, data(), SHORT)
    steps(first, opt, data(), stop=stop)
    tensors, plain = train_py.pack(first, opt)
    write_tensors(tmp_path / "checkpoint.safetensors", tensors)
    second, opt = build(name, data(), SHORT)
    train_py.unpack(second, opt, read_tensors(tmp_path / "checkpoint.safetensors")[0], plain)
    steps(second, opt, data(), start=stop)
    for key, value in trained_shortly(name).state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@every_file
def test_the_sparse_path_trains_as_the_dense_one(name, monkeypatch):
    """Six steps on each; the last bits differ, and where a rounding decides who restarts nothing is
    said."""
    errors = {}
    for path in ("sparse", "dense"):
        monkeypatch.setattr(SAE, "path", property(lambda self: path))
        sae, opt = build(name, data(), STEPS)
        log = []
        steps(sae, opt, data(), stop=6,
              each=lambda sae, out, terms: log.append(float(sum(terms.values()))))
        errors[path] = torch.tensor(log)
    assert torch.allclose(errors["sparse"], errors["dense"], rtol=2e-3)


@every_child
def test_every_fixed_setting_is_an_inherited_one_and_is_refused(name):
    cls = load_variant(name)
    inherited = set().union(*(base.settings() for base in cls.__bases__))
    for key in (key for c in cls.chain() for key in c.fixed):
        assert key in inherited
        with pytest.raises(Refuse, match="no effect"):
            parse_settings(cls, [f"{key}=1"])


@every_file
def test_a_value_that_a_setting_does_not_have_is_refused(name):
    cls = load_variant(name)
    for key in filter(cls.options, cls.settings()):
        with pytest.raises(Refuse, match=f"{key}=typo: want"):
            build(name, data(), **{key: "typo"})


@every_child
def test_every_setting_that_switches_off_is_a_setting(name):
    cls = load_variant(name)
    assert set(cls.off) <= set(cls.settings())
    cls.check({**cls.settings(), **cls.off})


@every_child
def test_what_a_mechanism_did_is_counted(name):
    """Each counter that a file names is in the log of a short training."""
    seen = set()
    train(name, data(), 60, each=lambda sae, out, terms: seen.update(sae.stats))
    assert set(load_variant(name).counts) <= seen


@pytest.mark.slow
@every_file
def test_a_dictionary_may_be_huge(name):
    """Four steps with 65,536 latents: a [d_sae, d_sae] of floats would take 17 GB."""
    cls = load_variant(name)
    soon = {key: 0.5 for key in cls.settings() if key.endswith(("_every", "_update", "_redraw"))}
    x = torch.randn(256, 16, generator=generator("rows"))
    sae, opt = build(name, x, 4, d_sae=65_536, l0=64.0, batch_size=32, **soon)
    steps(sae, opt, x)
    assert all(p.isfinite().all() for p in sae.parameters())


@every_child
def test_the_first_docstring_line_names_parent_and_idea(name):
    line = docstring_line(name)
    assert re.fullmatch(rf"{name} = .+", line) and len(line) <= 100
    for base in load_variant(name).__bases__:
        assert (base.__module__.split(".")[-1] if base is not SAE else "baseline") in line


def test_a_setting_has_one_home():
    """No two files introduce the same setting: a child may change a parent's, not give it a second
    meaning."""
    home = {}
    for name in NAMES:
        cls = load_variant(name)
        inherited = set().union(*(b.settings() for b in cls.__bases__ if issubclass(b, SAE)))
        for key in set(cls.settings()) - inherited:
            assert key not in home, f"{key}: in {home[key]} and in {name}"
            home[key] = name


def test_variants_catch_nothing_and_run_no_text():
    for path in (ROOT / "variants").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"\b(pickle|torch\.load|eval\(|exec\(|except\b)", text), path.name
        assert max(map(len, text.splitlines())) <= 100, path.name

"""Promises of the base SAE: what it learns, what it keeps unit, what a reset touches, how it is saved and exported."""
import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae import (SAE, JumpReLU, Out, Refuse, Step, generator, load_variant, parse_settings, read_json, read_tensors, unit, write_file, write_json,
                 write_tensors)
from toys import D_IN, build, cosines, evaluate, mixture, orthonormal, normalised, steps, train

X = mixture()[0]
RICH = mixture(features=96, l0=8.0, zipf=0.3)[0]         # more features than the 64 latents, 8 of them in a row
KINDS = ["relu", "topk", "batch_topk", "jumprelu"]


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("l0", [2.0, 5.0, 7.0])         # the data have 8: more than there are no penalty can ask for
def test_every_activation_ends_at_the_l0_it_was_asked_for(activation, l0):
    sae = train("baseline", RICH, 400, activation=activation, l0=l0)
    ev, reached, _ = evaluate(sae, RICH[-8192:])
    assert abs(reached - l0) < 0.05 * l0
    assert ev > 0.25


def test_a_sparse_dictionary_is_recovered():
    directions = orthonormal(16)
    g = generator("recover")
    on = torch.rand(30_000, 16, generator=g) < 0.12
    x = normalised((on * (1 + torch.rand(30_000, 16, generator=g))) @ directions)
    sae = train("topk", x, 600, d_sae=16, l0=2.0)
    assert (directions @ sae.W_dec.T).max(1).values.mean() > 0.95


def test_topk_keeps_the_highest_pre_activations():
    sae = SAE(D_IN, 10, activation="topk", d_sae=64, l0=5.0).eval()
    out = sae(X[:32])
    for pre, acts in zip(out.pre, out.acts):
        top = pre.topk(5).indices
        assert set(acts.nonzero().flatten().tolist()) <= set(top.tolist())
        assert torch.equal(acts[top], pre[top].relu())


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 10_000))
def test_batch_topk_keeps_exactly_the_highest_of_the_batch(rows, d_sae, seed):
    l0 = min(3.0, d_sae)
    sae = SAE(4, 10, activation="batch_topk", d_sae=d_sae, l0=l0)
    pre = torch.randn(rows, d_sae, generator=generator(seed))
    sae.threshold.fill_(float(generator(seed, "t").initial_seed() % 300) / 100)       # a carried threshold, right or wrong
    acts = sae.train().activate(pre)
    keep = min(round(min(l0, d_sae / 2) * rows), pre.numel() - 1)
    highest = pre.flatten().topk(keep).values.clamp_min(0)
    assert torch.equal(acts.flatten().sort(descending=True).values[:keep], highest)
    assert (acts > 0).sum() <= keep


def test_jumprelu_gradients_are_the_published_ones():
    pre = torch.tensor([[0.3, 0.9, 1.1, 2.0]], requires_grad=True)
    threshold = torch.ones(4, requires_grad=True)
    JumpReLU.apply(pre, threshold, 0.4).sum().backward()
    assert pre.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    assert torch.allclose(threshold.grad, torch.tensor([0.0, -2.5, -2.5, 0.0]))            # -theta / bandwidth inside the kernel
    threshold.grad = None
    Step.apply(pre, threshold, 0.4).sum().backward()
    assert torch.allclose(threshold.grad, torch.tensor([0.0, -2.5, -2.5, 0.0]))
    low = torch.tensor([0.1], requires_grad=True)
    JumpReLU.apply(torch.tensor([[-3.0], [0.2]]), low, 0.4).sum().backward()
    assert torch.allclose(low.grad, torch.tensor([-0.5]))                                 # a negative pre counts as 0, which is near


def test_the_encoder_form_without_gradient_through_the_input_has_the_plain_gradients():
    sae = SAE(D_IN, 10, d_sae=64)
    with torch.no_grad():
        sae.b_dec.add_(X.mean(0))
    pre = sae.pre_acts(X[:64])
    plain = (X[:64] - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert torch.allclose(pre, plain, atol=1e-4)
    weights = torch.randn(pre.shape, generator=generator("w"))
    for a, b in zip(torch.autograd.grad((pre * weights).sum(), [sae.W_enc, sae.b_enc, sae.b_dec]),
                    torch.autograd.grad((plain * weights).sum(), [sae.W_enc, sae.b_enc, sae.b_dec])):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_the_decoder_gradient_has_no_part_along_its_rows():
    sae, opt = build("topk", X)
    sum(sae.losses(sae(X[:256])).values()).backward()
    sae.before_step(opt)
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-6


def test_aux_gradient_reaches_exactly_the_dead_latents():
    sae, _ = build("topk", X)
    sae.silent[:10] = 1e9
    out = sae(X[:256])
    sae.aux(out).backward()
    moved = sae.W_dec.grad.abs().sum(1) > 0
    assert moved[:10].any() and not moved[10:].any()
    assert (sae.W_enc.grad.abs().sum(0) > 0)[10:].sum() == 0


@pytest.mark.parametrize("activation", KINDS)
def test_aux_revives_dead_latents(activation):
    """Latents that start shut come back with the auxiliary loss and stay dead without it. There are features for all of them."""
    dead = {}
    for weight in (0.0, 1 / 32):
        sae, opt = build("baseline", RICH, 400, activation=activation, l0=8.0, aux_weight=weight, dead_after=0.02)
        with torch.no_grad():
            sae.b_enc[:32] -= 12.0
        steps(sae, opt, RICH)
        dead[weight] = float((evaluate(sae.eval(), RICH[-8192:])[2] > 0).any(0)[:32].logical_not().float().mean())
    assert dead[0.0] > 0.9 and dead[1 / 32] < 0.5


def test_a_reset_touches_these_latents_and_nobody_else():
    sae, opt = build("jumprelu", X)
    steps(sae, opt, X, stop=20)
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    moments = {name: {k: v.clone() for k, v in opt.state[p].items()} for name, p in sae.named_parameters()}
    which = torch.tensor([3, 40])
    sae.reset_latents(opt, which, torch.randn(2, D_IN, generator=generator("new")))
    others = [i for i in range(64) if i not in (3, 40)]
    for name, axis in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0), ("log_threshold", 0)):
        parameter = getattr(sae, name)
        assert torch.equal(parameter.index_select(axis, torch.tensor(others)), before[name].index_select(axis, torch.tensor(others)))
        for key in ("exp_avg", "exp_avg_sq"):
            moment = opt.state[parameter][key]
            assert moment.index_select(axis, which).abs().sum() == 0
            assert torch.equal(moment.index_select(axis, torch.tensor(others)), moments[name][key].index_select(axis, torch.tensor(others)))
            assert moments[name][key].index_select(axis, which).abs().sum() > 0
    assert torch.equal(sae.b_dec, before["b_dec"]) and torch.equal(opt.state[sae.b_dec]["exp_avg"], moments["b_dec"]["exp_avg"])
    assert not torch.equal(sae.W_dec[which], before["W_dec"][which]) and torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize("below", [0.0, 1e9])
def test_the_encoders_gradient_comes_in_the_memory_order_of_its_weights(activation, below, monkeypatch):
    """Dense and sparse, so that it need not be copied."""
    monkeypatch.setattr(importlib.import_module("sae"), "SPARSE_BELOW", below)
    sae, _ = build("baseline", X, activation=activation)
    gradient, = torch.autograd.grad(sae.recon_error(sae.train()(X[:256])).mean(), sae.W_enc)
    assert gradient.stride() == sae.W_enc.stride() == (1, X.shape[1])


def test_a_step_is_the_same_in_whatever_memory_order_moments_and_gradients_come():
    """From a file, or from a variant, they may come in another one than that of W_enc, which lies in memory latent by latent."""
    ends, way = [], {"as training left them": lambda t: t, "contiguous": torch.Tensor.contiguous, "transposed": lambda t: t.T.contiguous().T}
    for turn in way.values():
        sae, opt = build("topk", X)
        steps(sae, opt, X, stop=3)
        for W in (sae.W_enc, sae.W_dec):
            W.grad = turn(W.grad)
            opt.state[W] = {k: turn(v) if v.ndim else v for k, v in opt.state[W].items()}
        plain = [p.detach().clone().requires_grad_() for p in sae.parameters()]
        usual = torch.optim.Adam(plain, lr=opt.param_groups[0]["lr"], foreach=False)
        for p, q in zip(sae.parameters(), plain):
            q.grad, usual.state[q] = p.grad.clone(), {k: v.clone() for k, v in opt.state[p].items()}
        opt.step()
        usual.step()
        for p, q in zip(sae.parameters(), plain):
            assert torch.allclose(p, q, atol=1e-6)
            assert {p.stride()} == {t.stride() for t in (p.grad, opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"])}
        ends.append(sae.state_dict())
    assert all(torch.equal(v, end[k]) for end in ends for k, v in ends[0].items())


def test_a_reset_finds_the_latent_axis_where_d_sae_equals_d_in():
    sae, opt = build("baseline", X, d_sae=D_IN)
    steps(sae, opt, X, stop=5)
    kept_row, kept_column = opt.state[sae.W_enc]["exp_avg"][2].clone(), opt.state[sae.W_enc]["exp_avg"][:, 3].clone()
    sae.reset_latents(opt, torch.tensor([2]), torch.ones(1, D_IN))
    moment = opt.state[sae.W_enc]["exp_avg"]
    assert moment[:, 2].abs().sum() == 0 and torch.equal(moment[:, 3], kept_column)
    assert torch.equal(moment[2, 3:], kept_row[3:])


def test_the_learning_rate_warms_up_and_ends_at_zero():
    sae = SAE(4, 1000)
    scales = []
    for sae.step in range(1000):
        scales.append(sae.lr_scale())
    assert scales[0] == pytest.approx(1 / 50) and max(scales) == 1.0 and scales[500] == 1.0 and scales[-1] == pytest.approx(1 / 200)


def test_a_step_that_is_not_finite_leaves_the_weights_alone():
    sae, opt = build("topk", X)
    steps(sae, opt, X, stop=3)
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    spiked = X[:4096].clone()
    spiked[7] = float("inf")
    sae.step, sae.position = 3, 0
    from toys import train_py
    _, _, stepped = train_py.train_step(sae, opt, spiked[:256])
    assert not stepped
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("own", [False, True])
def test_the_threshold_of_batch_topk_is_the_whole_batchs_also_in_parts_and_beside_a_variants_own_activate(own, micro_batches):
    class Variant(SAE):
        def activate(self, pre):
            return pre.relu() * (pre > 0.5) if own else super().activate(pre)

    sae, opt = build(Variant, X, 100, activation="batch_topk", micro_batches=micro_batches)
    for step in (0, 1):                                        # where the newest value has weight 1 and 1 / 2
        before = sae.threshold.clone()
        seen = []
        steps(sae, opt, X, start=step, stop=step + 1, each=lambda sae, out, terms: seen.append(out.pre))
        assert torch.allclose(sae.threshold, before.lerp(sae.batch_threshold(seen[0]), 1 / (step + 1)), rtol=1e-5)


def test_micro_batches_give_the_same_training():
    a, b = train("topk", X, 30), train("topk", X, 30, micro_batches=4)
    assert torch.allclose(a.W_dec, b.W_dec, atol=1e-4)


def test_same_seed_same_bits_and_another_seed_another_start():
    a, b, c = train("batch_topk", X, 50), train("batch_topk", X, 50), train("batch_topk", X, 50, seed=1)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not torch.equal(a.W_dec, c.W_dec)


@pytest.mark.parametrize("activation", KINDS)
def test_raw_activations_in_raw_activations_out(activation):
    """Trained on x = raw * scale, the SAE codes raw activations: same reconstruction, latents in raw units, decoder rows unit."""
    sae = train("baseline", X, 100, activation=activation)
    sae.scale.fill_(0.01)
    raw = X[:100] / 0.01
    with torch.no_grad():
        out = sae(X[:100])
    assert torch.allclose(sae.reconstruct(raw), out.x_hat / 0.01, rtol=1e-4, atol=1e-3)      # of values of about 100, some of them near 0
    assert torch.allclose(sae.encode(raw) @ sae.W_dec + sae.b_dec / sae.scale, sae.reconstruct(raw), rtol=1e-3, atol=1e-2)
    assert sae.encode(raw.view(4, 25, -1)).shape == (4, 25, sae.d_sae)


@pytest.mark.parametrize("variant", ["baseline", "topk", "batch_topk", "jumprelu", "matryoshka"])
def test_sae_lens_reproduces_an_exported_sae(variant, tmp_path):
    import sae_lens
    sae = train(variant, X, 100)
    sae.scale.fill_(0.5)
    sae.to_saelens(tmp_path, "toy", "blocks.0.hook_resid_post")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    raw = X[:200] / 0.5
    with torch.no_grad():
        assert torch.allclose(theirs.encode(raw), sae.encode(raw), atol=1e-4)
        assert torch.allclose(theirs(raw), sae.reconstruct(raw), atol=1e-3)
    again = SAE.from_saelens(tmp_path)
    assert torch.allclose(again.reconstruct(raw), sae.reconstruct(raw), atol=1e-3)
    assert torch.allclose(again.encode(raw), sae.encode(raw), atol=1e-4)


def test_an_sae_that_sae_lens_does_not_have_is_not_exported(tmp_path):
    class Doubled(SAE):
        def decode(self, acts):
            return 2 * super().decode(acts)
    with pytest.raises(Refuse, match="decode"):
        Doubled(4, 1, d_sae=8, l0=2.0).to_saelens(tmp_path)


# ---- settings

@pytest.mark.parametrize("pair, says", [
    ("lr", "name=value"), ("lr=", "name=value"), ("=3", "name=value"), ("lrr=1", "did you mean lr"), ("batchsize=1", "did you mean batch_size"),
    ("__class__=1", "no such setting"), ("lr=nan", "want float"), ("lr=inf", "want float"), ("lr=abc", "want float"), ("d_sae=3.5", "want int"),
    ("d_sae=0x10", "want int"), ("d_sae=1e400", "want int"), ("d_sae=٣", "want int"), ("activation=../x", "want str"), ("chain=1", "no such setting")])
def test_a_bad_setting_is_refused_with_a_reason(pair, says):
    with pytest.raises(Refuse, match=says) as e:
        parse_settings(SAE, [pair])
    assert e.value.code == 2 and "\n" not in str(e.value)


@pytest.mark.parametrize("bad", [{"l0": 0.0}, {"l0": 99.0}, {"d_sae": 0}, {"lr": -1.0}, {"batch_size": 0}, {"activation": "tanh"}, {"micro_batches": 0}])
def test_a_setting_out_of_range_is_refused(bad):
    with pytest.raises(Refuse, match=next(iter(bad))):
        SAE(4, 1, **{"d_sae": 64, **bad})


def test_good_settings_have_their_types():
    assert parse_settings(SAE, ["l0=64", "d_sae=4e3", "lr=3e-4", "activation=topk"]) == {"l0": 64.0, "d_sae": 4000, "lr": 3e-4, "activation": "topk"}


@given(st.text(max_size=30))
def test_any_text_is_a_setting_or_refused(text):
    try:
        assert set(parse_settings(SAE, [text])) <= set(SAE.settings())
    except Refuse:
        pass


@pytest.mark.parametrize("name", ["topkk", "../sae", "..", "/etc/passwd", "topk/../topk", "topk.py", "__init__", "", "CON", "topk\n", "a" * 300])
def test_a_variant_is_a_file_in_variants(name):
    with pytest.raises(Refuse) as e:
        load_variant(name)
    assert e.value.code == 2
    if name == "topkk":
        assert "did you mean topk" in str(e.value)


# ---- files

def tensors():
    return {"a": torch.randn(7, 3, generator=generator("a")), "b": torch.arange(5, dtype=torch.int32)}


def test_tensors_come_back_with_their_meta(tmp_path):
    said = write_tensors(tmp_path / "x.safetensors", tensors(), {"k": [1, "two"]})
    back, meta = read_tensors(tmp_path / "x.safetensors", said)
    assert all(torch.equal(back[k], v) for k, v in tensors().items()) and meta["k"] == [1, "two"]
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 != 0o600        # readable as the user's umask says
    assert write_tensors(tmp_path / "y.safetensors", tensors(), {"k": [1, "two"]}) == said


@given(st.integers(0, 10**9), st.integers(0, 7))
def test_any_flipped_bit_is_noticed(at, bit):
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, tensors(), {"k": 1})
        blob = bytearray(path.read_bytes())
        blob[at % len(blob)] ^= 1 << bit
        path.write_bytes(blob)
        with pytest.raises(Refuse, match="x.safetensors"):
            read_tensors(path)


@given(st.integers(0, 10**9))
def test_a_cut_file_is_noticed(at):
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, tensors())
        blob = path.read_bytes()
        path.write_bytes(blob[:at % len(blob)])
        with pytest.raises(Refuse):
            read_tensors(path)


def test_another_files_checksum_is_refused(tmp_path):
    said = write_tensors(tmp_path / "x", tensors())
    write_tensors(tmp_path / "x", {"a": torch.zeros(1)})
    with pytest.raises(Refuse, match="another cache"):
        read_tensors(tmp_path / "x", said)


def test_json_comes_back_and_an_edit_is_noticed(tmp_path):
    write_json(tmp_path / "x.json", {"lr": 0.5, "n": None})
    assert read_json(tmp_path / "x.json") == {"lr": 0.5, "n": None}
    (tmp_path / "x.json").write_text((tmp_path / "x.json").read_text().replace("0.5", "0.6"))
    with pytest.raises(Refuse, match="edited"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError):
        write_json(tmp_path / "y.json", {"nan": math.nan})
    assert not (tmp_path / "y.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "{}", '{"checksum": 3}', "[" * 100_000, "\x00"])
def test_json_that_is_not_ours_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(Refuse):
        read_json(tmp_path / "x.json")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_file(tmp_path / "x", b"old")
    with pytest.raises(Refuse):
        write_file(tmp_path / "x" / "below", b"new")
    assert (tmp_path / "x").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_generator_depends_on_its_key_alone():
    assert torch.equal(torch.rand(4, generator=generator(1, "a")), torch.rand(4, generator=generator(1, "a")))
    assert not torch.equal(torch.rand(4, generator=generator(1, "a")), torch.rand(4, generator=generator(1, "b")))


def test_unit_rows():
    assert torch.allclose(unit(torch.randn(5, 3, generator=generator(0))).norm(dim=1), torch.ones(5))
    assert cosines(SAE(4, 1, d_sae=8, l0=2.0)).shape == (8, 7)
    assert Out._fields == ("x", "pre", "acts", "x_hat")

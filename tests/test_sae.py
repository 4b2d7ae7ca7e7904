"""Promises of the base SAE: what it learns, what it keeps unit, what a reset touches, how it is
exported."""
import pytest
import torch

import sae as sae_py
from sae import SAE, Jump, Refuse, Step, choice, generator, parse_settings, unit
from toys import D_IN, build, evaluate, mixture, normalised, orthonormal, steps, train

MUTANTS = ["gated:-saelens_weights"]
X = mixture()[0]
RICH = mixture(features=96, l0=8.0, zipf=0.3)[0]     # more features than the 64 latents, 8 in a row
KINDS = ["relu", "topk", "batch_topk", "jumprelu"]
steered = pytest.mark.parametrize("activation", ["relu", "jumprelu"])
all_kinds = pytest.mark.parametrize("activation", KINDS)


@all_kinds
@pytest.mark.parametrize("l0", [2.0, 7.0])           # the data have 8: no penalty can ask for more
def test_every_activation_ends_at_the_l0_it_was_asked_for(activation, l0):
    sae = train("baseline", RICH, activation=activation, l0=l0)
    ev, reached, _ = evaluate(sae, RICH[-8192:])
    assert abs(reached - l0) < 0.05 * l0
    assert ev > 0.25


@steered
@pytest.mark.parametrize("start", [1.0, 2.0])
def test_l0_stays_within_5_percent_of_its_schedule(activation, start):
    """After the learning rate's warm-up, averaged over 10 batches; without the controller it is far
    off."""
    ratio = {}
    for gain in (0.0, SAE.sparsity_gain):
        followed = []

        def follow(sae, out, terms):
            followed.append(float((out.acts > 0).sum() / 512 / sae.wanted_l0()))

        train("baseline", RICH, 400, activation=activation, l0=6.0, sparsity_start=start,
              batch_size=512, sparsity_gain=gain, sparsity_memory=0.004 if gain else 1e9,
              each=follow)
        ratio[gain] = torch.tensor(followed[20:]).unfold(0, 10, 10).mean(1)
    assert (ratio[SAE.sparsity_gain] - 1).abs().max() < 0.05
    assert (ratio[0.0] - 1).abs().max() > 0.2


def test_a_sparse_dictionary_is_recovered():
    directions = orthonormal(16)
    g = generator("recover")
    on = torch.rand(30_000, 16, generator=g) < 0.12
    x = normalised((on * (1 + torch.rand(30_000, 16, generator=g))) @ directions)
    sae = train("topk", x, 600, d_sae=16, l0=2.0)
    assert (directions @ sae.W_dec.T).max(1).values.mean() > 0.95


@pytest.mark.parametrize("carried", [0.0, 0.7, 9.0])
@pytest.mark.parametrize("rows, d_sae", [(1, 5), (40, 50), (7, 33)])
def test_batch_topk_keeps_exactly_the_highest_of_the_batch(rows, d_sae, carried):
    sae = SAE(4, 10, activation="batch_topk", d_sae=d_sae, l0=2.0)
    pre = torch.randn(rows, d_sae, generator=generator(rows))
    sae.threshold.fill_(carried)                     # of the batch before, right or wrong
    acts = sae.train().activate(pre)
    keep = 2 * rows
    highest = pre.flatten().topk(keep).values.clamp_min(0)
    assert torch.equal(acts.flatten().sort(descending=True).values[:keep], highest)
    assert (acts > 0).sum() <= keep


def test_jumprelu_gradients_are_the_published_ones():
    pre = torch.tensor([[0.3, 0.9, 1.1, 2.0]], requires_grad=True)
    threshold = torch.ones(4, requires_grad=True)
    Jump.apply(pre, threshold, 0.4).sum().backward()
    assert pre.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    inside = torch.tensor([0.0, -2.5, -2.5, 0.0])    # -theta / bandwidth inside the kernel
    assert torch.allclose(threshold.grad, inside)
    threshold.grad = None
    Step.apply(pre, threshold, 0.4).sum().backward()
    assert torch.allclose(threshold.grad, inside)


def test_the_encoder_has_the_plain_gradients():
    sae = SAE(D_IN, 10, d_sae=64)
    with torch.no_grad():
        sae.b_dec.add_(0.3)
    pre = sae.pre_acts(X[:64])
    plain = (X[:64] - sae.b_dec) @ sae.W_enc + sae.b_enc
    weights = torch.randn(pre.shape, generator=generator("w"))
    found = torch.autograd.grad((pre * weights).sum(), [sae.W_enc, sae.b_enc, sae.b_dec])
    wanted = torch.autograd.grad((plain * weights).sum(), [sae.W_enc, sae.b_enc, sae.b_dec])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(found, wanted))


# ---- the sparse path -----------------------------------------------------------------------------


def on_path(monkeypatch, path):
    monkeypatch.setattr(SAE, "path", property(lambda self: path))


@all_kinds
def test_the_sparse_path_gives_the_dense_ones_values_and_gradients(activation, monkeypatch):
    found = {}
    for path in ("sparse", "dense"):
        on_path(monkeypatch, path)
        sae, _ = build("baseline", X, activation=activation)
        sae.silent[:24] = 1e9                        # so that AuxK acts, on the 16 highest of them
        out = sae.train()(X[:256])
        assert (sae.fired is not None) == (path == "sparse")
        sum(sae.losses(out).values()).backward()
        found[path] = [out.acts, out.x_hat] + [p.grad for p in sae.parameters()]
    for a, b in zip(found["sparse"], found["dense"]):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_a_method_that_changes_acts_still_gets_its_gradient_on_the_sparse_path(monkeypatch):
    class Scaled(SAE):
        def activate(self, pre):
            return super().activate(pre) * 1.5

    grads = {}
    for path in ("sparse", "dense"):
        on_path(monkeypatch, path)
        sae, _ = build(Scaled, X)
        sum(sae.losses(sae.train()(X[:256])).values()).backward()
        grads[path] = [p.grad for p in sae.parameters()]
    for a, b in zip(grads["sparse"], grads["dense"]):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


@all_kinds
def test_the_encoders_gradient_stays_sparse_also_with_dead_latents(activation, monkeypatch):
    """What Encode gets has as many entries as fired (and AuxK's), not B d_sae."""
    on_path(monkeypatch, "sparse")
    seen = []
    plain = sae_py.Encode.backward
    monkeypatch.setattr(sae_py.Encode, "backward",
                        staticmethod(lambda ctx, g: (seen.append(g.is_sparse), plain(ctx, g))[1]))
    sae, _ = build("baseline", X, activation=activation)
    sae.silent[:8] = 1e9
    sum(sae.losses(sae.train()(X[:256])).values()).backward()
    assert seen == [True]


def test_the_path_is_a_fixed_rule_of_sizes():
    assert SAE(D_IN, 10, d_sae=1024, l0=16.0).path == "sparse"
    assert SAE(D_IN, 10, d_sae=1024, l0=64.0).path == "dense"
    assert SAE(D_IN, 10, d_sae=1024, l0=16.0, sparsity_start=4.0).path == "dense"


@pytest.mark.parametrize("k, d_sae", [(1, 64), (2, 64), (3, 128), (5, 40)])
def test_the_highest_are_those_of_topk(k, d_sae):
    pre = torch.randn(50, d_sae, generator=generator(k))
    found = pre.gather(1, sae_py.highest(pre, k)).sort(1).values
    assert torch.equal(found, pre.topk(k).values.sort(1).values)


def test_a_number_that_is_not_finite_is_not_overlooked():
    pre = torch.randn(4, 8)
    pre[2, 3] = torch.nan
    assert 2 * 8 + 3 in sae_py.above(pre, 100.0).tolist()


# ---- a step --------------------------------------------------------------------------------------


def test_the_decoder_gradient_has_no_part_along_its_rows():
    sae, opt = build("topk", X)
    sum(sae.losses(sae(X[:256])).values()).backward()
    sae.before_step(opt)
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-6


def test_aux_gradient_reaches_exactly_the_dead_latents():
    sae, _ = build("topk", X)
    sae.silent[:10] = 1e9
    sae.aux(sae(X[:256])).backward()
    moved = sae.W_dec.grad.abs().sum(1) > 0
    assert moved[:10].any() and not moved[10:].any()
    assert (sae.W_enc.grad.abs().sum(0) > 0)[10:].sum() == 0


@all_kinds
def test_aux_revives_dead_latents(activation):
    """Latents that start shut come back with AuxK and stay dead without it."""
    dead = {}
    for weight in (0.0, SAE.aux_weight):
        sae, opt = build("baseline", RICH, 240, activation=activation, l0=8.0, aux_weight=weight,
                         dead_after=0.02)
        with torch.no_grad():
            sae.b_enc[:32] -= 12.0
        steps(sae, opt, RICH)
        fires = (evaluate(sae.eval(), RICH[-8192:])[2] > 0).any(0)
        dead[weight] = 1 - float(fires[:32].float().mean())
    assert dead[0.0] > 0.9 and dead[SAE.aux_weight] < 0.5


def test_a_reset_touches_these_latents_and_nobody_else():
    sae, opt = build("jumprelu", X)
    steps(sae, opt, X, stop=20)
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    moments = {name: {k: v.clone() for k, v in opt.state[p].items()}
               for name, p in sae.named_parameters()}
    which = torch.tensor([3, 40])
    directions = torch.randn(2, D_IN, generator=generator("d"))
    sae.reset_latents(opt, which, directions, X[:256])
    others = torch.ones(64, dtype=torch.bool)
    others[which] = False
    assert torch.allclose(sae.W_dec[which], unit(directions), atol=1e-6)
    for name, (axis, _) in sae.latents.items():
        now, old = getattr(sae, name).movedim(axis, 0), before[name].movedim(axis, 0)
        assert torch.equal(now[others], old[others]), name
    for name, p in sae.named_parameters():
        axis = sae.latents.get(name, (None,))[0]
        for key, old in moments[name].items():
            now = opt.state[p][key]
            if axis is None or now.shape != p.shape:
                assert torch.equal(now, old)
            else:
                now, old = now.movedim(axis, 0), old.movedim(axis, 0)
                assert torch.equal(now[others], old[others])
                assert not now[which].any()
                assert old[which].any()


@all_kinds
def test_a_restarted_latent_fires_at_the_wanted_rate(activation):
    sae, opt = build("baseline", X, activation=activation)
    steps(sae, opt, X, stop=100)
    sae.reset_latents(opt, torch.arange(8), torch.randn(8, D_IN, generator=generator("d")),
                      X[:2048])
    rate = (sae.eval()(X[2048:6144]).acts > 0).float().mean(0)[:8]
    assert (rate < 0.3).all()
    if activation in ("relu", "jumprelu"):
        assert (rate - 4 / 64).abs().max() < 0.04


def test_the_learning_rate_warms_up_and_ends_at_zero():
    sae = SAE(D_IN, 1000)
    scale = []
    for sae.step in range(1000):
        scale.append(sae.lr_scale())
    assert scale[0] < 0.05 and max(scale) == 1.0 and scale[500] == 1.0 and scale[-1] < 0.01


def test_a_ramp_of_no_length_is_done_at_once_and_a_task_is_due_as_often_as_it_says():
    sae = SAE(D_IN, 100)
    assert sae.ramp(0) == 1.0 and sae.ramp(0.5) == 0.0
    done = []
    for sae.step in range(100):
        done.append(sae.due(0.2))
        assert not sae.due(0.0)
    assert sum(done) == 5


def test_a_step_that_is_not_finite_leaves_every_state_alone():
    sae, opt = build("baseline", X)
    steps(sae, opt, X, stop=3)
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    bad = X[:256].clone()
    bad[0, 0] = torch.inf
    steps(sae, opt, bad, start=3, stop=4)
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())
    sae.W_enc.register_hook(lambda grad: grad * torch.nan)           # of a loss that is finite
    steps(sae, opt, X, start=3, stop=4)
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())


def test_micro_batches_give_the_same_training():
    norms = {1: [], 3: []}                           # three parts are not equal
    one, three = (train("topk", X, 30, micro_batches=n,
                        each=lambda sae, *_: norms[n].append(float(sae.stats["grad_norm"])))
                  for n in norms)
    assert torch.allclose(one.W_dec, three.W_dec, atol=1e-3)
    assert norms[1] == pytest.approx(norms[3], rel=1e-3)


@all_kinds
def test_raw_activations_in_raw_activations_out(activation):
    sae = train("baseline", X, 50, activation=activation)
    sae.mean.fill_(2.0)
    sae.scale.fill_(0.25)
    raw = (X[:60] / 0.25 + 2.0).view(3, 20, D_IN)
    out = sae(X[:60])
    assert torch.allclose(sae.encode(raw).view(60, 64), out.acts / 0.25, atol=1e-3)
    assert torch.allclose(sae.reconstruct(raw).view(60, D_IN), out.x_hat / 0.25 + 2.0, atol=1e-3)


# ---- SAELens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant",
                         ["baseline", "topk", "batch_topk", "jumprelu", "gated", "matryoshka"])
def test_sae_lens_reproduces_an_exported_sae(variant, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    sae = train(variant, X, 60)
    sae.mean.copy_(torch.linspace(-3, 3, D_IN))
    sae.scale.fill_(0.2)
    raw = X[:200] / 0.2 + sae.mean
    sae.to_saelens(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path), device="cpu")
    assert torch.allclose(theirs(raw), sae.reconstruct(raw), atol=1e-3)
    assert torch.allclose(theirs.encode(raw), sae.encode(raw), atol=1e-3)
    if variant != "gated":
        assert torch.allclose(SAE.from_saelens(tmp_path).reconstruct(raw), sae.reconstruct(raw),
                              atol=1e-3)


def test_a_saelens_threshold_below_0_is_none(tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    write_saelens(tmp_path, architecture="jumprelu", threshold=-0.1, n=16)       # a narrow one
    x = torch.randn(300, 16, generator=generator("x"))
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path), device="cpu")
    assert torch.allclose(SAE.from_saelens(tmp_path).reconstruct(x), theirs(x), atol=1e-4)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_saelens_topk_reconstructs_as_sae_lens_does(rescale, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    write_saelens(tmp_path, rescale_acts_by_decoder_norm=rescale)
    x = torch.randn(300, 16, generator=generator("x"))
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path), device="cpu")
    assert torch.allclose(SAE.from_saelens(tmp_path).reconstruct(x), theirs(x), atol=1e-4)


def test_a_saelens_field_that_is_not_understood_is_refused(tmp_path):
    write_saelens(tmp_path, normalize_activations="layer_norm")
    with pytest.raises(Refuse, match="normalize_activations=layer_norm"):
        SAE.from_saelens(tmp_path)


def write_saelens(folder, architecture="topk", threshold=None, n=64, **fields):
    """A folder in SAELens' format, of n latents with decoder rows that are not unit."""
    import json

    import safetensors.torch
    g = generator("saelens")
    d = torch.randn(n, 16, generator=g)
    config = {"architecture": architecture, "d_in": 16, "d_sae": n, "dtype": "float32",
              "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
              "reshape_activations": "none", "metadata": {}, **fields}
    tensors = {"W_enc": d.T.contiguous(), "W_dec": d * (0.5 + 3 * torch.rand(n, 1, generator=g)),
               "b_enc": torch.zeros(n), "b_dec": torch.zeros(16)}
    if architecture == "topk":
        config["k"] = 8
    else:
        tensors["threshold"] = torch.full((n,), threshold)
    (folder / "cfg.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")


def test_an_sae_that_sae_lens_does_not_have_is_not_exported(tmp_path):
    with pytest.raises(Refuse, match="SAELens has no such"):
        build("layernorm", X)[0].to_saelens(tmp_path)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair, says",
    [("bandwith=3", "no such setting, did you mean bandwidth"), ("l0=abc", "want float"),
     ("d_sae=1.5", "want int"), ("l0=", "want name=value"), ("l0=inf", "want float"),
     ("=3", "want name=value")],
)
def test_a_bad_setting_is_refused_with_a_reason(pair, says):
    with pytest.raises(Refuse, match=says) as refused:
        parse_settings(SAE, [pair])
    assert refused.value.code == 2


@pytest.mark.parametrize(
    "bad", [{"d_sae": 0}, {"l0": 2000.0}, {"lr": 0.0}, {"activation": "rleu"}, {"lr_warmup": 2.0},
            {"micro_batches": 256}])                       # AuxK's variance needs rows
def test_a_setting_out_of_range_is_refused(bad):
    with pytest.raises(Refuse, match=f"--set {next(iter(bad))}=.*: want"):
        SAE(D_IN, 10, **bad)


def test_good_settings_have_their_types():
    assert parse_settings(SAE, ["l0=32", "d_sae=2_048", "activation=topk"]) == {
        "l0": 32.0, "d_sae": 2048, "activation": "topk"}


def test_a_choice_has_its_options_also_where_a_child_changed_the_default():
    class Parent(SAE):
        rule = choice("phi", "random")

    class Child(Parent):
        rule = "random"
        fixed = {"clip": "nothing is clipped here"}

    assert Child.options("rule") == ("phi", "random") and Child(D_IN, 10).rule == "random"
    with pytest.raises(Refuse, match="want phi or random"):
        Child(D_IN, 10, rule="jaccard")
    with pytest.raises(Refuse, match="no effect in .*: nothing is clipped here"):
        parse_settings(Child, ["clip=2"])


def test_a_code_checksum_is_of_the_code_and_not_of_its_comments():
    a = "def f(x):\n    '''One.'''\n    return x + 1   # why\n"
    b = "def f(x):\n    '''Two.'''\n\n    return x+1\n"
    assert sae_py.code_of(a) == sae_py.code_of(b) != sae_py.code_of(a.replace("+ 1", "+ 2"))
    nested = """print(f"{x['a']} {'b'}", 'c')"""              # in any version of Python
    assert sae_py.code_of(nested) == nested.replace("'", '"')

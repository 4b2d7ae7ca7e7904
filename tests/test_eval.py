"""Promises of 03_eval.py: its numbers are those of a plain recomputation, planted answers are found, and no result outlives its run."""
import contextlib
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from toys import hierarchy, orthonormal

from sae import SAE, Acts, Refuse, generator, load_run, load_variant, read_json, read_tensors, run_script, unit, write_json, write_tensors

ev = importlib.import_module("03_eval")
VOCAB, CTX, D = 50, 12, 16
CPU = torch.device("cpu")


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_positions=CTX, n_embd=D, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0))


def gpt_neox():
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=3, num_attention_heads=2,
                                                                      intermediate_size=32, max_position_embeddings=CTX, bos_token_id=0, eos_token_id=0))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=3, num_attention_heads=2,
                                                                  intermediate_size=32, max_position_embeddings=CTX, bos_token_id=0, eos_token_id=0))


@torch.no_grad()
def language_cache(folder, make=gpt2, layer=1, hook="resid_post", contexts=20):
    """acts/toy of a random language model with large weights, so that its predictions depend on the hooked activations; contexts of
    different lengths, the first position left out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape) * 0.4)
    model.save_pretrained(folder / "model")
    tokens = torch.randint(1, VOCAB, (contexts + 100, CTX), generator=generator("tokens"), dtype=torch.int32)
    mask = torch.arange(CTX)[None] < torch.randint(6, CTX + 1, (len(tokens), 1), generator=generator("lengths"))
    mask[:, 0] = False
    kept = {}
    point = ev.hook_point(ev.blocks_of(model.base_model, 3, "toy")[layer], hook, "toy")
    handle = point.register_forward_hook(lambda module, args, out: kept.update(x=ev.first(out)))
    model(tokens.long(), use_cache=False)
    handle.remove()
    rows = kept["x"][contexts:][mask[contexts:]]
    said = write_tensors(folder / "train_00000.safetensors", {"acts": rows})
    held = write_tensors(folder / "val.safetensors", {"tokens": tokens[:contexts], "mask": mask[:contexts]})
    write_meta(folder, rows, said, {"file": "val.safetensors", "checksum": held, "contexts": contexts}, source="model", layer=layer, hook=hook,
               hook_name=f"blocks.{layer}.hook_{hook}", model={"name": "toy", "path": str(folder / "model"), "revision": None, "n_layers": 3})
    return model, tokens[:contexts].long(), mask[:contexts]


def truth_cache(folder, n=4000):
    """acts/toy of orthonormal features in trees of a parent and exclusive children, without noise or mean; -> directions, parent."""
    x, on, directions, parent = hierarchy(2 * n, trees=4, noise=0.0)
    said = write_tensors(folder / "train_00000.safetensors", {"acts": x[n:]})
    held = write_tensors(folder / "val.safetensors", {"acts": x[:n], "features": (x[:n] @ directions.T) * on[:n]})
    truth = write_tensors(folder / "truth.safetensors", {"dictionary": directions, "probability": on.float().mean(0), "parent": parent.int()})
    write_meta(folder, x[n:], said, {"file": "val.safetensors", "checksum": held, "contexts": n}, source="synthetic", layer=None, hook=None,
               hook_name="synthetic", model={"name": "synthetic"}, truth={"file": "truth.safetensors", "checksum": truth})
    return directions, parent


def write_meta(folder, rows, said, val, **rest):
    norm = rows.norm(dim=-1).mean().item()
    write_json(folder / "meta.json", {"format": 1, "complete": True, "d_in": rows.shape[1], "dtype": "float32", "rows": len(rows), "scale": rows.shape[1] ** 0.5 / norm,
                                      "shards": [{"file": "train_00000.safetensors", "rows": len(rows), "bytes": 0, "checksum": said}], "val": val, **rest})


def as_run(sae, name="run", **config):
    """An SAE in eval mode as something to evaluate, without files; 960 steps unless said."""
    config = {"steps": 960, "seed": 0, "d_in": sae.d_in, "settings": {k: getattr(sae, k) for k in type(sae).settings()}, "sae_checksum": name, **config}
    return ev.Run(Path("nowhere") / name, sae.eval(), config)


def finished_run(folder, acts, name="topk-s0", variant="topk", seed=0, **settings):
    """A run folder as 02_train.py leaves it, of an SAE that was trained for one step."""
    cls = load_variant(variant)
    settings = {**cls.settings(), "d_sae": 32, "l0": 3.0, "batch_size": 100, **settings}
    sae = cls(acts.d_in, 960, seed, **settings)
    sae.scale.fill_(acts.scale)
    sae.init_from_data(acts.shard(0)["acts"] * acts.scale)
    with torch.no_grad():
        sae.W_dec.copy_(unit(sae.W_dec + 0.1 * torch.randn(sae.W_dec.shape, generator=generator("moved", seed))))
    said = write_tensors(folder / name / "sae.safetensors", sae.state_dict(), {})
    write_json(folder / name / "config.json", {"format": 1, "name": name, "variant": variant, "acts": acts.folder.name, "acts_checksum": acts.checksum,
                                               "model": acts.meta["model"], "layer": acts.meta["layer"], "hook_name": acts.meta["hook_name"], "d_in": acts.d_in,
                                               "seed": seed, "steps": 960, "settings": settings, "code_checksum": cls.code_checksum(), "status": "done",
                                               "parents": ["baseline"], "sae_checksum": said})
    return folder / name


@torch.no_grad()
def some_sae(acts, seed=0, activation="topk", d_sae=32, l0=3.0):
    sae = SAE(acts.d_in, 960, seed, activation=activation, d_sae=d_sae, l0=l0)
    sae.scale.fill_(acts.scale)
    sae.init_from_data(acts.shard(0)["acts"] * acts.scale)
    return sae.eval()


@torch.no_grad()
def with_decoder(acts, directions, encoder=None):
    """A ReLU SAE without biases whose decoder rows are `directions` and whose encoder is their transpose (or `encoder`)."""
    sae = SAE(acts.d_in, 960, 0, activation="relu", d_sae=len(directions), l0=2.0)
    sae.scale.fill_(acts.scale)
    sae.W_dec.copy_(directions)
    sae.W_enc.copy_(directions.T if encoder is None else encoder)
    return sae.eval()


def identity(acts):
    return with_decoder(acts, torch.cat([torch.eye(acts.d_in), -torch.eye(acts.d_in)]))


def core(folder, runs):
    """{name: {metrics, guards, ...}} of evaluate_core."""
    failures = {}
    results = ev.evaluate_core(ev.HeldOut(Acts(folder), CPU), runs, failures)
    assert not failures
    return {run.name: result for run, result in results.items()}


def fired(result, level="fatal"):
    return {g["id"] for g in result["guards"] if g["level"] == level}


def script(cwd, *flags):
    """03_eval.py in folder `cwd` -> its exit code and output, in this process: importing transformers anew takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["03_eval.py", "--device", "cpu", *flags])
        run_script(ev.main)
    return SimpleNamespace(returncode=end.value.code, stdout=out.getvalue(), stderr=re.sub(r".*\r", "", err.getvalue()))


# ---- known answers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, gpt_neox, llama])
@pytest.mark.parametrize("hook", ["resid_post", "mlp_out", "attn_out"])
def test_an_identity_recovers_everything_and_zero_nothing(tmp_path, make, hook):
    language_cache(tmp_path, make, hook=hook)
    acts = Acts(tmp_path)
    zero = with_decoder(acts, torch.zeros(4, D))
    found = core(tmp_path, [as_run(identity(acts), "identity"), as_run(zero, "zero")])
    same, nothing = found["identity"]["metrics"], found["zero"]["metrics"]
    assert same["explained_variance"] == pytest.approx(1, abs=1e-6) and same["l0"] == pytest.approx(D)
    assert same["ce_recovered"] == pytest.approx(1, abs=1e-4) and same["kl_sae"] == pytest.approx(0, abs=1e-5) and same["cosine"] == pytest.approx(1)
    assert nothing["ce_recovered"] == pytest.approx(0, abs=1e-6) and nothing["kl_recovered"] == pytest.approx(0, abs=1e-6)
    assert nothing["l2_ratio"] == 0 and nothing["dead"] == 1
    assert nothing["ce_sae"] == pytest.approx(nothing["ce_zero"]) and abs(nothing["ce_zero"] - nothing["ce_clean"]) > 1e-3
    assert {"G01", "G03"} <= fired(found["zero"])
    assert fired(found["identity"]) == {"G08"}                   # it is not sparse


@pytest.mark.parametrize("make", [gpt2, gpt_neox, llama])
@pytest.mark.parametrize("layer, hook", [(0, "resid_post"), (1, "resid_post"), (2, "resid_post"), (1, "mlp_out"), (2, "attn_out")])
def test_metrics_equal_a_plain_recomputation(tmp_path, make, layer, hook):
    model, tokens, mask = language_cache(tmp_path, make, layer, hook)
    acts = Acts(tmp_path)
    sae = some_sae(acts)
    m = core(tmp_path, [as_run(sae)])["run"]["metrics"]

    kept = {}
    point = ev.hook_point(ev.blocks_of(model.base_model, 3, "toy")[layer], hook, "toy")

    def run(replacement=None):
        def swap(module, args, out):
            kept["x"] = hidden = ev.first(out).clone()
            if replacement is not None:
                hidden[mask] = replacement
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden
        handle = point.register_forward_hook(swap)
        with torch.no_grad():
            log_p = model(tokens, use_cache=False).logits.double().log_softmax(-1)
        handle.remove()
        return log_p

    clean = run()
    x = kept["x"][mask]
    x_hat, latents = sae.reconstruct(x), sae.encode(x)
    counted = mask[:, :-1] & mask[:, 1:]
    ce = lambda log_p: -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0][counted].mean().item()
    kl = lambda log_q: (clean.exp() * (clean - log_q)).sum(-1)[:, :-1][counted].mean().item()
    spliced, zero, mean = run(x_hat), run(torch.zeros_like(x)), run(acts.shard(0)["acts"].mean(0))
    if hook == "resid_post" and layer < 2:
        with torch.no_grad():
            assert torch.equal(x, model(tokens, output_hidden_states=True).hidden_states[layer + 1][mask])
    exact, guess = x.double(), x_hat.double()
    plain = {"explained_variance": 1 - (exact - guess).square().sum() / (exact - exact.mean(0)).square().sum(), "mse": (exact - guess).square().mean(),
             "cosine": torch.cosine_similarity(exact, guess, dim=-1).mean(), "l0": (latents > 0).sum(-1).double().mean(), "l1": latents.double().sum(-1).mean(),
             "l2_ratio": guess.norm(dim=-1).mean() / exact.norm(dim=-1).mean(), "dead": (latents == 0).all(0).double().mean(),
             "dense": ((latents > 0).double().mean(0) > 0.1).double().mean(), "ce_clean": ce(clean), "ce_sae": ce(spliced), "ce_zero": ce(zero),
             "ce_mean": ce(mean), "kl_sae": kl(spliced), "kl_zero": kl(zero), "ce_recovered": (ce(zero) - ce(spliced)) / (ce(zero) - ce(clean))}
    assert {k: m[k] for k in plain} == pytest.approx({k: float(v) for k, v in plain.items()}, rel=1e-4, abs=1e-6)
    part = torch.arange(CTX - 1).mul(8).floor_divide(CTX - 1).expand_as(counted)                           # 11 predictions: positions 0 and 1, 2, 3 and 4 ...
    for i in range(8):
        counted = mask[:, :-1] & mask[:, 1:] & (part == i)
        if counted.any():
            assert m["by_position"]["ce_sae"][i] == pytest.approx(ce(spliced), rel=1e-4)
            assert m["by_position"]["ce_recovered"][i] == pytest.approx((ce(zero) - ce(spliced)) / (ce(zero) - ce(clean)), rel=1e-3)
            assert m["by_position"]["at"][i] == pytest.approx(counted.nonzero()[:, 1].double().mean().item())


def test_pca_of_all_components_explains_everything_and_of_none_nothing(tmp_path):
    language_cache(tmp_path)
    held_out = ev.HeldOut(Acts(tmp_path), CPU)
    data = ev.Data(held_out)
    rows = [x for x, *_ in held_out.batches("core")]
    for x in rows:
        data.add(x)
    pca = data.pca(held_out.sample)
    x, sample = torch.cat(rows).double(), held_out.sample.double()
    axes = torch.linalg.svd(sample - sample.mean(0)).Vh[:5]
    left = (x - sample.mean(0)) - (x - sample.mean(0)) @ axes.T @ axes
    assert pca[5] == pytest.approx(1 - (left.square().sum() / (x - x.mean(0)).square().sum()).item())
    assert pca[-1] == pytest.approx(1) and pca[0] < 0.05 and sorted(pca) == pca


def test_the_decoders_highest_cosines_are_found_in_blocks():
    w = torch.randn(50, 8, generator=generator("w"))
    cosine = unit(w) @ unit(w).T
    cosine.fill_diagonal_(-2)
    assert torch.allclose(ev.max_cosine(w, block=7), cosine.amax(1)) and ev.max_cosine(w[:1]).tolist() == [0]


def test_every_latent_is_in_the_density_histogram_or_silent():
    d = ev.density(torch.tensor([0, 0, 1e-9, 1e-6, 0.003, 0.5, 1.0], dtype=torch.float64))
    assert d["silent"] == 2 and sum(d["counts"]) == 5 and d["counts"][0] == 2 and len(d["log10_edges"]) == len(d["counts"]) + 1


# ---- truth ---------------------------------------------------------------------------------------------------------------------


def test_the_planted_dictionary_scores_perfectly(tmp_path):
    directions, _ = truth_cache(tmp_path)
    acts = Acts(tmp_path)
    sae = with_decoder(acts, directions)
    sae.b_enc.data -= 1e-3                                    # the orthonormal encoder reads 0 up to rounding
    m = core(tmp_path, [as_run(sae)])["run"]["metrics"]
    assert m["mcc"] == pytest.approx(1, abs=1e-5) and m["f1"] == pytest.approx(1, abs=0.01) and m["coverage"] == 1
    assert m["absorption"] == 0 and m["parent_recall"] == pytest.approx(1, abs=0.01) and m["pairs"] == 12 and m["features_seen"] == 16


def test_planted_absorption_is_found(tmp_path):
    """Children's latents carry their parent too, and the parent's latent is silent when a child is on."""
    directions, parent = truth_cache(tmp_path)
    acts = Acts(tmp_path)
    child = parent >= 0
    absorbing = directions.clone()
    absorbing[child] = unit(directions[child] + 0.6 * directions[parent[child]])
    encoder = directions.clone()
    for c in child.nonzero().flatten():
        encoder[parent[c]] -= 5 * directions[c]
    sae = with_decoder(acts, absorbing, encoder.T)
    sae.b_enc.data -= 1e-3
    found = core(tmp_path, [as_run(sae, "absorbing"), as_run(with_decoder(acts, directions), "sound")])
    m = found["absorbing"]["metrics"]
    assert m["absorption"] > 0.97 and m["parent_recall"] == pytest.approx(0.4, abs=0.05)       # P(child | parent) is 0.6
    assert m["f1"] < 0.95 and found["sound"]["metrics"]["absorption"] == 0


def test_mcc_is_that_of_sae_lens(tmp_path):
    synthetic = pytest.importorskip("sae_lens.synthetic")
    directions, _ = truth_cache(tmp_path)
    acts = Acts(tmp_path)
    truth = ev.HeldOut(acts, CPU).truth
    for seed, d_sae in ((0, 64), (1, 8)):                                # wider and narrower than the truth
        sae = some_sae(acts, seed, d_sae=d_sae, l0=2.0)
        assert ev.TruthScore(truth, sae).mcc == pytest.approx(synthetic.mean_correlation_coefficient(directions, sae.W_dec.detach()), abs=1e-5)


# ---- guards --------------------------------------------------------------------------------------------------------------------


def test_an_untrained_sae_is_invalid(tmp_path):
    truth_cache(tmp_path)
    acts = Acts(tmp_path)
    found = core(tmp_path, [as_run(some_sae(acts), "start"), as_run(some_sae(acts), "no_steps", steps=0)])
    assert "G06" in fired(found["start"]) and {"G05", "G06"} <= fired(found["no_steps"])


def test_a_code_that_is_not_finite_is_invalid_and_still_strict_json(tmp_path):
    truth_cache(tmp_path)
    acts = Acts(tmp_path)
    broken = some_sae(acts)
    broken.b_dec.data[0] = float("nan")
    found = core(tmp_path, [as_run(broken, "broken"), as_run(some_sae(acts), "fine")])
    assert "G04" in fired(found["broken"]) and found["broken"]["metrics"]["explained_variance"] is None
    assert "G04" not in fired(found["fine"])
    json.dumps(found["broken"]["metrics"], allow_nan=False)


def test_dense_dead_and_shrunken_latents_are_doubtful(tmp_path):
    directions, _ = truth_cache(tmp_path)
    acts = Acts(tmp_path)
    weak = with_decoder(acts, torch.cat([directions, -directions]), 0.5 * torch.cat([directions, -directions]).T)
    weak.b_enc.data -= 1e-3
    assert {"G18", "G19", "G24"} <= fired(core(tmp_path, [as_run(weak)])["run"], "warn")


def test_decoder_rows_that_are_not_unit_are_doubtful_and_far_from_it_invalid(tmp_path):
    directions, _ = truth_cache(tmp_path)
    acts, both = Acts(tmp_path), torch.cat([directions, -directions])
    found = core(tmp_path, [as_run(with_decoder(acts, both * factor, both.T), str(factor)) for factor in (1.0, 1.001, 1.5)])
    said = {name: [g["level"] for g in result["guards"] if g["id"] == "G23"] for name, result in found.items()}
    assert said == {"1.0": [], "1.001": ["warn"], "1.5": ["fatal"]}


def test_penalties_that_dominate_or_do_nothing_are_named(tmp_path):
    truth_cache(tmp_path / "acts" / "toy")
    acts = Acts(tmp_path / "acts" / "toy")
    folder = finished_run(tmp_path / "runs", acts)
    lines = [{"step": s, "loss": 1 / s, "ratio_ortho": 3.0, "ratio_push": 1e-4, "ratio_aux": 0.0} for s in range(1, 960, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = core(acts.folder, [ev.Run(folder, *load_run(folder))])["topk-s0"]
    said = [g["message"] for g in result["guards"] if g["id"] == "G27"]
    assert len(said) == 2 and "ortho dominates: 3" in said[0] and "push is inactive" in said[1]


def test_a_run_of_another_layer_is_invalid(tmp_path):
    truth_cache(tmp_path)
    sae = some_sae(Acts(tmp_path))
    assert "G10" in fired(core(tmp_path, [as_run(sae, layer=5)])["run"])


# ---- sharing ---------------------------------------------------------------------------------------------------------------------


def test_runs_evaluated_together_are_evaluated_as_alone(tmp_path):
    language_cache(tmp_path)
    acts = Acts(tmp_path)
    runs = [as_run(some_sae(acts, seed, kind), str(seed)) for seed, kind in enumerate(("topk", "relu", "jumprelu"))]
    together = core(tmp_path, runs)
    for run in runs:
        alone = core(tmp_path, [run])[run.name]
        assert alone["metrics"] == together[run.name]["metrics"] and torch.equal(alone["rates"], together[run.name]["rates"])


def test_the_clean_pass_runs_once_for_all_runs(tmp_path, monkeypatch):
    language_cache(tmp_path)
    acts, clean, spliced = Acts(tmp_path), [], []
    read, splice = ev.LanguageModel.read, ev.LanguageModel.splice
    monkeypatch.setattr(ev.LanguageModel, "read", lambda self, *a: clean.append(1) or read(self, *a))
    monkeypatch.setattr(ev.LanguageModel, "splice", lambda self, *a: spliced.append(1) or splice(self, *a))
    core(tmp_path, [as_run(some_sae(acts, seed), str(seed)) for seed in range(3)])
    assert len(clean) == 1 and len(spliced) == 2 + 3                       # zero, mean, and each run


def test_earlier_layers_are_not_run_again_and_the_model_is_left_as_it_was(tmp_path):
    _, tokens, mask = language_cache(tmp_path, layer=2)
    model = ev.HeldOut(Acts(tmp_path), CPU).model
    calls = []
    model.earlier[0].mlp.register_forward_hook(lambda *a: calls.append(1))
    x = model.read(tokens, mask)
    ce, kl = model.splice(x)
    assert len(calls) == 1 and kl == pytest.approx(0, abs=1e-6) and ce == pytest.approx(model.clean_loss)
    assert torch.equal(model.read(tokens, mask), x) and len(calls) == 2


def test_outliers_are_no_rows_and_stay_as_they_are(tmp_path):
    language_cache(tmp_path)
    model = ev.HeldOut(Acts(tmp_path), CPU).model
    _, tokens, mask = language_cache(tmp_path)
    handle = model.point.register_forward_hook(lambda module, args, out: scaled(out))

    def scaled(out):
        hidden = ev.first(out).clone()
        hidden[0, 2] *= 1000
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    x = model.read(tokens, mask)
    handle.remove()
    assert not model.rows[0, 2] and len(x) == mask.sum() - 1 and mask[0, 2]


# ---- the script ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two caches, five runs and controls, evaluated once by the script; (folder, its output)."""
    place = tmp_path_factory.mktemp("place")
    language_cache(place / "acts" / "toy", llama)
    truth_cache(place / "acts" / "true")
    runs, toy = place / "runs", Acts(place / "acts" / "toy")
    for seed in (0, 1):
        finished_run(runs, toy, f"topk-s{seed}", seed=seed)
    finished_run(runs, Acts(place / "acts" / "true"), "topk-true-s0")
    unfinished = finished_run(runs, toy, "topk-l0=4.0-s0")
    write_json(unfinished / "config.json", {**read_json(unfinished / "config.json"), "status": "training"})
    older = finished_run(runs, toy, "topk-s2", seed=2)
    write_json(older / "config.json", {**read_json(older / "config.json"), "code_checksum": "0" * 32})
    return place, script(place, "--controls", "--eval", "core")


def test_the_script_evaluates_what_is_sound_and_says_what_is_not(place):
    folder, done = place
    assert done.returncode == 5 and "topk-s2: the code of topk changed" in done.stderr and "Traceback" not in done.stderr
    assert "topk-l0=4.0-s0: skipped, its training is not finished" in done.stdout
    there = sorted(str(p.relative_to(folder / "runs")) for p in folder.glob("runs/**/core.json"))
    kinds = ("mean", "pca", "random", "untrained")
    assert there == sorted([f"controls-{acts}/{kind}/eval/core.json" for acts in ("toy", "true") for kind in kinds]
                           + [f"{name}/eval/core.json" for name in ("topk-s0", "topk-s1", "topk-true-s0")])
    assert "control: pca" in done.stdout and "MCC" in done.stdout and "CE rec." in done.stdout


def test_a_result_says_what_it_belongs_to(place):
    folder, _ = place
    result, config = read_json(folder / "runs/topk-s0/eval/core.json"), read_json(folder / "runs/topk-s0/config.json")
    for key in ("sae_checksum", "acts", "acts_checksum", "model", "layer", "hook_name", "d_in"):
        assert result[key] == config[key]
    assert (result["eval"], result["run"], result["d_sae"], result["contexts"]) == ("core", "topk-s0", 32, 20)
    rates, meta = read_tensors(folder / "runs/topk-s0/eval/rates.safetensors")
    assert meta["sae_checksum"] == config["sae_checksum"] and meta["rows"] == result["n_rows"]
    assert rates["rate"].sum().item() == pytest.approx(result["metrics"]["l0"], rel=1e-5)


def test_controls_are_what_they_are_called(place):
    folder, _ = place
    result = {kind: read_json(folder / f"runs/controls-toy/{kind}/eval/core.json") for kind in ("mean", "pca", "random", "untrained")}
    m = {kind: r["metrics"] for kind, r in result.items()}
    assert all(r["control"] for r in result.values())
    assert m["mean"]["l0"] == 0 and m["mean"]["explained_variance"] == pytest.approx(0, abs=0.05)
    assert m["mean"]["ce_sae"] == pytest.approx(m["mean"]["ce_mean"], rel=1e-5)
    assert m["pca"]["l0"] == pytest.approx(3) and m["pca"]["explained_variance"] == pytest.approx(m["pca"]["explained_variance_pca"], abs=1e-5)
    assert m["random"]["l0"] == 3 and m["untrained"]["l0"] == pytest.approx(3, rel=0.2)
    assert all("G05" in fired(r) for r in result.values())


def test_saes_go_to_the_device_in_portions_and_give_the_same_results(place, tmp_path, monkeypatch):
    folder = shutil.copytree(place[0], tmp_path / "copy")
    monkeypatch.chdir(folder)
    runs = ev.load([Path("runs/topk-s0"), Path("runs/topk-s1"), Path("runs/topk-true-s0")], {})
    size = sum(v.nbytes for v in runs[0].sae.state_dict().values())
    for room, names in ((1, [["topk-s0"], ["topk-s1"], ["topk-true-s0"]]), (2 * size, [["topk-s0", "topk-s1"], ["topk-true-s0"]]),
                        (2**33, [["topk-s0", "topk-s1", "topk-true-s0"]])):
        monkeypatch.setattr(ev, "ON_DEVICE", room)
        assert [[run.name for run in part] for part in ev.portions(runs)] == names
    monkeypatch.setattr(ev, "ON_DEVICE", 1)
    monkeypatch.setattr(sys, "argv", ["03_eval.py", "--controls", "--force", "--eval", "core", "--device", "cpu"])
    assert ev.main() == 5                                                    # the run whose code changed
    for path in place[0].glob("runs/**/core.json"):
        first, again = read_json(path), read_json(folder / path.relative_to(place[0]))
        assert again["metrics"] == first["metrics"] and again["guards"] == first["guards"] and again["shared_by"] == 1


def test_results_are_reused_only_if_they_are_of_this_run(place):
    folder, _ = place
    path = folder / "runs/topk-s0/eval/core.json"
    first = path.stat().st_mtime_ns
    evaluate = lambda *flags: script(folder, "runs/topk-s0", "--eval", "core", *flags)
    assert evaluate().returncode == 0 and path.stat().st_mtime_ns == first
    for stale in ({"sae_checksum": "0" * 32}, {"acts_checksum": "0" * 32}, {"version": 0}, {"contexts": 3}):
        write_json(path, {**read_json(path), **stale, "metrics": {"l0": -1.0}})
        done = evaluate()
        assert done.returncode == 0 and read_json(path)["metrics"]["l0"] == pytest.approx(3, abs=0.2)
    now = path.stat().st_mtime_ns
    assert evaluate("--force").returncode == 0 and path.stat().st_mtime_ns > now
    assert evaluate("--contexts", "5").returncode == 0 and read_json(path)["contexts"] == 5


def test_bad_input_is_one_line(tmp_path):
    for flags, words in (((), "run 02_train.py first"), (("runs/none",), "is not a run"), (("--device", "tpu"), "--device tpu")):
        done = script(tmp_path, *flags)
        assert done.returncode != 0 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_variant_that_breaks_leaves_the_others_evaluated(tmp_path, capsys):
    truth_cache(tmp_path)
    acts = Acts(tmp_path)

    class Broken(SAE):
        def decode(self, acts):
            raise ValueError("no decoder here")

    failures = {}
    runs = [as_run(Broken(acts.d_in, 960, 0, d_sae=32, l0=2.0), "broken"), as_run(some_sae(acts), "fine")]
    results = ev.evaluate_core(ev.HeldOut(acts, CPU), runs, failures)
    assert [r.name for r in results] == ["fine"] and "no decoder here" in failures[Path("nowhere/broken")] and "no decoder here" in capsys.readouterr().err


def test_load_run_refuses_what_is_damaged(tmp_path):
    truth_cache(tmp_path / "acts" / "toy")
    folder = finished_run(tmp_path / "runs", Acts(tmp_path / "acts" / "toy"))
    sae, config = load_run(folder)
    assert sae.progress == 1 and not sae.training and sae.d_sae == config["settings"]["d_sae"] == 32
    blob = bytearray((folder / "sae.safetensors").read_bytes())
    blob[-5] ^= 1
    (folder / "sae.safetensors").write_bytes(blob)
    with pytest.raises(Refuse, match="damaged"):
        load_run(folder)


# ---- features ----------------------------------------------------------------------------------------------------------------------


def test_features_show_the_contexts_in_which_a_latent_fires_most(tmp_path):
    from tokenizers import Tokenizer, decoders, models
    _, tokens, mask = language_cache(tmp_path / "acts" / "toy")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "acts" / "toy" / "model")
    acts = Acts(tmp_path / "acts" / "toy")
    folder = finished_run(tmp_path / "runs", acts)
    run, held_out, failures = ev.Run(folder, *load_run(folder)), ev.HeldOut(acts, CPU), {}
    rates = ev.evaluate_core(held_out, [run], failures)[run]["rates"]
    write_tensors(folder / "eval" / "rates.safetensors", {"rate": rates}, {"sae_checksum": run.config["sae_checksum"], "rows": 1})
    latents = ev.evaluate_features(held_out, [run], failures)[run]["latents"]
    x = held_out.model.read(tokens, mask)
    dense = torch.zeros(*mask.shape, run.sae.d_sae)
    dense[mask] = run.sae.encode(x)
    assert not failures and 0 < len(latents) <= 20 + 5 + 5 + 5
    assert sum("random" in latent["why"] for latent in latents) == min(20, int((rates > 0).sum()))
    order = [latent["rate"] for latent in sorted(latents, key=lambda latent: latent["rate"])]
    assert all(latent["rate"] >= order[-5] for latent in latents if "frequent" in latent["why"]) and order[-1] == rates.max()
    assert order[0] == rates[rates > 0].min()
    cosine = torch.nn.functional.cosine_similarity(run.sae.W_dec[:, None], run.sae.W_dec, dim=-1).fill_diagonal_(-2)
    for latent in latents:
        near = latent["neighbours"][0]
        assert near["latent"] == int(cosine[latent["latent"]].argmax()) and near["cosine"] == pytest.approx(float(cosine[latent["latent"]].max()), abs=1e-5)
        per_context = dense[..., latent["latent"]].amax(1)
        want = per_context[per_context > 0].sort(descending=True).values[:8]
        assert [c["activation"] for c in latent["contexts"]] == pytest.approx(want.tolist(), rel=1e-4)
        best = int(per_context.argmax())
        top = f"w{tokens[best, int(dense[best, :, latent['latent']].argmax())]}"
        assert latent["contexts"][0]["token"] == top and f"<<{top}>>" in latent["contexts"][0]["text"] and latent["rate"] > 0

"""Promises of 03_eval.py: its numbers are those of a plain recomputation, planted answers are
found, what is no result is called so, and no result outlives its run."""
import contextlib
import io
import math

import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from evaluation import (CPU, CTX, D, LAYERS, VOCAB, build, configurations, core, eval_py, evaluate,
                        fired, identity, language_cache, truth_cache, with_decoder, write_run)
from toys import orthonormal

from sae import (SAE, Acts, generator, read_json, read_tensors, run_script, unit,
                 variant_names, write_file, write_json)


# ---- the language model --------------------------------------------------------------------------


@pytest.mark.parametrize("name", configurations())
def test_any_causal_model_is_read_and_run_on_exactly(tmp_path, name):
    hf, tokens, _ = language_cache(tmp_path, name)
    model = eval_py.LanguageModel(Acts(tmp_path), CPU)
    with torch.no_grad():
        plain = hf(tokens, output_hidden_states=True)
    seen = []

    def same(hidden):
        seen.append(hidden)
        return hidden

    assert torch.equal(model.activations(tokens), plain.hidden_states[2])
    assert torch.equal(model.logits(tokens, replace=same), plain.logits)
    assert torch.equal(seen[0], plain.hidden_states[2])
    zeros = model.logits(tokens, replace=torch.zeros_like)
    assert (zeros - plain.logits).abs().max() > 0.01
    assert torch.equal(model.logits(tokens), plain.logits)           # the hook is gone again


def test_padding_is_masked(tmp_path):
    _, tokens, _ = language_cache(tmp_path)
    model = eval_py.LanguageModel(Acts(tmp_path), CPU)
    mask = torch.ones_like(tokens)
    mask[:, :4] = 0                                                  # padding on the left
    other = tokens.clone()
    other[:, :4] = 7
    one, two = (model.logits(t, mask)[:, 4:] for t in (tokens, other))
    assert torch.allclose(one, two, atol=1e-5)
    one, two = (model.activations(t, mask)[:, 4:] for t in (tokens, other))
    assert torch.allclose(one, two, atol=1e-5)


def test_layers_after_the_hook_are_not_run_for_activations(tmp_path):
    _, tokens, _ = language_cache(tmp_path)
    model = eval_py.LanguageModel(Acts(tmp_path), CPU)
    calls = []
    model.model.model.layers[LAYERS - 1].register_forward_hook(lambda *a: calls.append(1))
    model.activations(tokens)
    assert not calls
    model.logits(tokens)
    assert calls


def test_a_language_model_that_changed_since_is_refused(tmp_path):
    language_cache(tmp_path)
    meta = read_json(tmp_path / "meta.json")
    meta["model"]["revision"] = eval_py.model_checksum(tmp_path / "model")
    write_json(tmp_path / "meta.json", meta)
    assert eval_py.LanguageModel(Acts(tmp_path), CPU).model
    language_cache(tmp_path / "other", "llama, tied")
    shutil.copytree(tmp_path / "other" / "model", tmp_path / "model", dirs_exist_ok=True)
    with pytest.raises(eval_py.Refuse, match="has changed"):
        eval_py.LanguageModel(Acts(tmp_path), CPU).model


def test_a_pickle_is_read_if_remote_code_is_trusted_as_in_stage_1(tmp_path):
    _, tokens, _ = language_cache(tmp_path)
    before = eval_py.LanguageModel(Acts(tmp_path), CPU)
    torch.save(before.model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    meta = read_json(tmp_path / "meta.json")
    meta["model"]["revision"] = eval_py.model_checksum(tmp_path / "model")
    write_json(tmp_path / "meta.json", meta)
    with pytest.raises(eval_py.Refuse, match="--trust-remote-code"):
        eval_py.LanguageModel(Acts(tmp_path), CPU).model
    after = eval_py.LanguageModel(Acts(tmp_path), CPU, trust_remote_code=True)
    assert torch.equal(after.activations(tokens), before.activations(tokens))
    with pytest.raises(eval_py.Refuse, match="the folder has no tokenizer"):
        after.tokenizer                                    # found as stage 1 finds it


def test_the_flag_that_trusts_remote_code_reaches_the_model(place, monkeypatch):
    seen = []
    monkeypatch.setattr(eval_py, "LanguageModel", lambda acts, device, trust: seen.append(trust))
    for flags in ((), ("--trust-remote-code",)):
        script(place[0], "runs/topk-s0", "--eval", "core", "--force", *flags)
    assert seen == [False, True]


# ---- core ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama"])
@pytest.mark.parametrize("hook", ["resid_post", "mlp_out", "attn_out"])
def test_an_identity_recovers_everything_and_zero_nothing(tmp_path, name, hook):
    language_cache(tmp_path, name, hook=hook)
    acts = Acts(tmp_path)
    found = core(acts, identity=identity(acts), zero=with_decoder(acts, torch.zeros(4, D)))
    same, nothing = found["identity"]["metrics"], found["zero"]["metrics"]
    assert same["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert same["l0"] == pytest.approx(D) and same["cosine"] == pytest.approx(1)
    for score in ("ce_recovered", "kl_recovered", "ce_loss_score", "kl_div_score"):
        assert same[score] == pytest.approx(1, abs=1e-4)
    for score in ("ce_recovered", "kl_recovered"):                    # the same positions are zero
        assert nothing[score] == pytest.approx(0, abs=1e-3)
    assert nothing["l2_ratio"] < 1e-6 and nothing["dead"] == 1
    assert fired(found["identity"], "invalid") == {"not sparse"}
    assert {"silent", "zero output"} <= fired(found["zero"], "invalid")


@pytest.mark.parametrize("layer, hook", [(0, "resid_post"), (1, "mlp_out"), (2, "attn_out")])
@pytest.mark.parametrize("outliers", [False, True])
def test_metrics_equal_a_plain_recomputation(tmp_path, layer, hook, outliers):
    model, tokens, mask = language_cache(tmp_path, "llama", layer, hook)
    if outliers:                         # a limit that a tenth of the rows exceed
        norms = eval_py.LanguageModel(Acts(tmp_path), CPU).activations(tokens).norm(dim=-1)
        language_cache(tmp_path, "llama", layer, hook, norm_limit=norms.quantile(0.9).item())
    acts = Acts(tmp_path)
    sae = build(acts)
    m = core(acts, run=sae)["run"]["metrics"]
    block = model.model.layers[layer]
    point = {"resid_post": block, "mlp_out": block.mlp, "attn_out": block.self_attn}[hook]
    kept = {}

    def log_p(change=None):
        """Log probabilities with change(hidden) done at the hook."""
        def swap(module, args, out):
            kept["x"] = hidden = (out[0] if isinstance(out, tuple) else out).clone()
            if change:
                change(hidden)
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handle = point.register_forward_hook(swap)
        with torch.no_grad():
            found = model(tokens, use_cache=False).logits.double().log_softmax(-1)
        handle.remove()
        return found

    clean = log_p()
    hidden = kept["x"]
    rows = mask & (hidden.norm(dim=-1) <= acts.norm_limit)
    assert (rows.sum() < mask.sum()) == outliers
    x, latents = hidden[rows].double(), sae.encode(hidden[rows])
    x_hat = sae.reconstruct(hidden[rows]).double()

    def put(where, what):
        def change(h):
            h[where] = what(h[where])
        return log_p(change)

    everywhere = torch.ones_like(mask)
    ours = put(rows, sae.reconstruct), put(rows, torch.zeros_like)
    theirs = put(mask, sae.reconstruct), put(everywhere, torch.zeros_like)

    def ce(log_q, counted):
        return -log_q[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0][counted].mean().item()

    def kl(log_q, counted):
        return (clean.exp() * (clean - log_q)).sum(-1)[counted].mean().item()

    predictions = rows[:, :-1] & rows[:, 1:]
    padded = torch.cat([predictions, torch.zeros(len(mask), 1, dtype=torch.bool)], 1)
    spliced, zero = (ce(log_q, predictions) for log_q in ours)
    sae_bench, ablated = (ce(log_q, mask[:, :-1]) for log_q in theirs)
    kl_sae, kl_zero = (kl(log_q, padded) for log_q in ours)
    kl_bench, kl_ablated = (kl(log_q, mask) for log_q in theirs)
    base, bench = ce(clean, predictions), ce(clean, mask[:, :-1])
    error, about = (x - x_hat).square(), (x - x.mean(0)).square()
    rate = (latents > 0).double().mean(0)
    wanted = {
        "explained_variance": 1 - error.sum() / about.sum(), "mse": error.mean(), "l0": rate.sum(),
        "cosine": torch.cosine_similarity(x, x_hat, dim=-1).mean(),
        "l1": latents.double().sum(-1).mean(),
        "l2_ratio": x_hat.norm(dim=-1).mean() / x.norm(dim=-1).mean(),
        "dead": (rate == 0).double().mean(),
        "dense": (rate > 0.1).double().mean(), "ce_clean": base, "ce_sae": spliced, "ce_zero": zero,
        "ce_recovered": (zero - spliced) / (zero - base), "kl_sae": kl_sae, "kl_zero": kl_zero,
        "kl_recovered": 1 - kl_sae / kl_zero, "ce_loss_with_sae": sae_bench,
        "ce_loss_without_sae": bench, "ce_loss_with_ablation": ablated,
        "ce_loss_score": (ablated - sae_bench) / (ablated - bench),
        "kl_div_score": 1 - kl_bench / kl_ablated}
    wanted = {key: float(value) for key, value in wanted.items()}
    assert {key: m[key] for key in wanted} == pytest.approx(wanted, rel=2e-4, abs=1e-6)


def test_all_runs_share_the_passes_that_depend_on_no_sae(tmp_path, monkeypatch):
    language_cache(tmp_path)
    acts, calls, logits = Acts(tmp_path), [], eval_py.LanguageModel.logits

    def counted(self, *args, **kwargs):
        calls.append(1)
        return logits(self, *args, **kwargs)

    monkeypatch.setattr(eval_py.LanguageModel, "logits", counted)
    core(acts, **{f"s{seed}": build(acts, seed=seed) for seed in range(4)})
    assert len(calls) == 3 + 4           # clean, rows zeroed, all zeroed; one for each run


def test_small_batches_of_rows_and_contexts_change_nothing(tmp_path, monkeypatch):
    language_cache(tmp_path)
    acts = Acts(tmp_path)
    whole = core(acts, run=build(acts))["run"]["metrics"]
    monkeypatch.setitem(eval_py.LOGITS, "cpu", 3 * CTX * VOCAB)
    monkeypatch.setattr(eval_py, "CODES", 5 * 32)
    assert core(acts, run=build(acts))["run"]["metrics"] == pytest.approx(whole, rel=1e-4, abs=1e-6)


# ---- truth ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """(cache, directions [16, 32], parent [16]) of known features."""
    folder = tmp_path_factory.mktemp("known")
    directions, parent = truth_cache(folder)
    return Acts(folder), directions, parent


def truth_metrics(known, directions, encoder=None, bias=-1e-3):
    acts = known[0]
    return core(acts, run=with_decoder(acts, directions, encoder, bias))["run"]["metrics"]


def test_the_planted_dictionary_scores_perfectly(known):
    m = truth_metrics(known, known[1])
    assert m["mcc"] == pytest.approx(1, abs=1e-5) and m["f1"] == pytest.approx(1, abs=0.01)
    assert m["coverage"] == m["uniqueness"] == 1 and m["absorption"] == 0
    assert m["parent_recall"] == pytest.approx(1, abs=0.01)
    assert m["pairs"] == 12 and m["features_seen"] == 16


def absorbing(known):
    """Children's latents that carry their parent too."""
    _, directions, parent = known
    child = parent >= 0
    carried = directions.clone()
    carried[child] = unit(directions[child] + 0.6 * directions[parent[child]])
    return carried


def silenced(known):
    """An encoder in which each parent's latent is silent where a child is on."""
    _, directions, parent = known
    encoder = directions.clone()
    for child in (parent >= 0).nonzero().flatten():
        encoder[parent[child]] -= 5 * directions[child]
    return encoder


def test_absorption_is_found(known):
    m = truth_metrics(known, absorbing(known), silenced(known))
    assert m["absorption"] == 1 and m["f1"] < 0.95
    assert m["parent_recall"] == pytest.approx(0.4, abs=0.05)         # P(child | parent) is 0.6


def test_a_parent_without_any_latent_is_absorbed(known):
    _, directions, parent = known
    child = parent >= 0
    m = truth_metrics(known, absorbing(known)[child], directions[child])
    assert m["absorption"] == 1 and m["parent_recall"] == 0


def test_a_silent_parent_whose_children_do_not_carry_it_is_missed_and_not_absorbed(known):
    m = truth_metrics(known, known[1], silenced(known))
    assert m["absorption"] == 0 and m["parent_recall"] < 0.5


@pytest.mark.parametrize("how", ["at random", "by size", "by context"])
def test_a_split_parent_is_not_an_absorbed_one(known, how):
    """Two latents for each parent, of which one or the other fires; the children's carry it too."""
    acts, directions, parent = known
    root, features = parent < 0, acts.val()["features"]
    on, size = features > 0, features[:, root]
    first = {"at random": torch.rand(size.shape, generator=generator("coin")) < 0.5,
             "by size": size < size[size > 0].median(),
             "by context": on[:, ~root].unflatten(1, (4, 3)).any(2)}[how]
    fires = torch.cat([on[:, root] & first, on[:, root] & ~first, on[:, ~root]], 1)
    aside = 0.3 * orthonormal(32)[16:20]                 # two latents are never quite the same
    split = unit(torch.cat([directions[root] + aside, directions[root] - aside]))
    sae = SimpleNamespace(W_dec=torch.cat([split, absorbing(known)[~root]]))
    score = eval_py.TruthScore(eval_py.load_truth(acts, CPU), sae)
    score.add(fires, on)
    m = score.metrics()
    assert m["absorption"] == 0 and m["parent_recall"] == 1
    score.sums.clear()
    score.add(fires & (torch.arange(20) >= 8), on)       # neither of the two fires
    assert score.metrics()["absorption"] == 1


def test_recovery_and_uniqueness_are_those_of_sae_lens(known):
    synthetic = pytest.importorskip("sae_lens.synthetic")
    acts, directions, _ = known
    truth = eval_py.load_truth(acts, CPU)
    for seed, d_sae in ((0, 64), (1, 8)):                # wider and narrower than the truth
        sae = build(acts, seed=seed, d_sae=d_sae, l0=2.0)
        score = eval_py.TruthScore(truth, sae)
        score.add(torch.ones(20, d_sae, dtype=torch.bool), torch.ones(20, 16, dtype=torch.bool))
        m, W_dec = score.metrics(), sae.W_dec.detach()
        wanted = synthetic.mean_correlation_coefficient(directions, W_dec)
        assert m["mcc"] == pytest.approx(wanted, abs=1e-5)
        assert m["uniqueness"] == pytest.approx(synthetic.feature_uniqueness(W_dec, directions))


# ---- guards --------------------------------------------------------------------------------------


def weights(sae):
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    return {name: getattr(sae, name).detach().clone() for name in names}


def test_weights_as_they_started_are_untrained_also_after_init_from_data(known, tmp_path):
    """A decoder that starts at rows of the data explains a lot, and lr 1e-12 changes nothing."""
    acts, directions, _ = known
    sae = with_decoder(acts, directions)
    still = write_run(tmp_path / "still", sae, acts, start=weights(sae))
    moved = weights(sae)
    step = torch.randn(moved["W_dec"].shape, generator=generator("moved"))
    moved["W_dec"] = unit(moved["W_dec"] + 0.1 * step)
    trained = write_run(tmp_path / "trained", sae, acts, start=moved)
    no_steps = write_run(tmp_path / "no_steps", sae, acts, steps=0)
    found = evaluate("core", acts, [still, trained, no_steps])
    assert found["still"]["metrics"]["explained_variance"] > 0.9
    assert "untrained" in fired(found["still"], "invalid")
    assert "untrained" in fired(found["no_steps"], "invalid")
    assert "untrained" not in fired(found["trained"])


class Residual(SAE):
    """Half of what the latents leave is given back."""
    share = 0.5

    def forward(self, x):
        out = super().forward(x)
        return out._replace(x_hat=out.x_hat + self.share * (x - out.x_hat))


def test_what_reconstructs_around_its_latents_is_invalid(known):
    acts = known[0]
    skip = {"skip_learned": False, "activation": "topk"}
    found = core(acts, residual=build(acts, Residual, activation="topk"), sound=build(acts),
                 half=build(acts, "skip", skip_scale=0.9, **skip),
                 tenth=build(acts, "skip", skip_scale=0.1, **skip))
    for name in ("residual", "half"):
        assert found[name]["metrics"]["explained_variance"] > 0.7
        assert "around the latents" in fired(found[name], "invalid")
    tenth = found["tenth"]
    assert "around the latents" in fired(tenth, "caveat") and tenth["metrics"]["skip_share"] > 0.1
    assert found["sound"]["metrics"]["skip_share"] < 1e-5
    assert "around the latents" not in fired(found["sound"])


def test_of_all_variants_only_those_with_a_path_have_one(known):
    acts = known[0]
    x = acts.shard(0)["acts"][:500]
    share = {name: eval_py.skip_share(build(acts, name), x) for name in variant_names()}
    # that of adaptive_ortho_r6 and its children starts at 0
    paths = {name for name, value in share.items() if value > 0.001}
    assert paths == {f"zscore_r{n}" for n in range(4, 10)}
    dead = build(acts, "baseline", activation="relu")
    torch.nn.init.constant_(dead.b_enc, -100.0)
    assert eval_py.skip_share(dead, x) < 0.001             # it explains nothing in either way


def test_published_sparse_codes_are_sparse_and_a_code_of_all_latents_is_not(known):
    def guards(l0, d_sae, d_in):
        metrics = {"l0": l0, "explained_variance": 0.97, "explained_variance_pca": 0.99}
        config = {"steps": 10 ** 6, "settings": {"batch_size": 4096, "d_sae": d_sae}}
        run = SimpleNamespace(is_control=True, sae=build(known[0]), config=config)
        run.sae.d_sae, run.sae.d_in = d_sae, d_in
        facts = eval_py.gather_facts(run, metrics, known[0])
        return {g["name"]: g["level"] for g in eval_py.find_guards(facts)}

    assert guards(640, 4096, 768) == {"no better than PCA": "caveat"}
    assert guards(640, 4096, 2304) == {"no better than PCA": "caveat"}
    assert guards(1735, 2304, 2304)["not sparse"] == "invalid"
    assert guards(900, 16384, 768)["not sparse"] == "invalid"


def test_a_code_that_is_not_finite_is_invalid_and_still_strict_json(known, tmp_path):
    acts = known[0]
    broken = build(acts)
    broken.b_dec.data[0] = float("nan")
    run = write_run(tmp_path / "broken", broken, acts)
    result = evaluate("core", acts, [run])["broken"]
    assert "not finite" in fired(result, "invalid")
    eval_py.save("core", run, acts, result)
    metrics = read_json(tmp_path / "broken" / "eval" / "core.json")["metrics"]
    assert metrics["explained_variance"] is None


def test_dense_dead_and_shrunken_latents_are_doubtful(known):
    acts, directions, _ = known
    both = torch.cat([directions, -directions])
    result = core(acts, run=with_decoder(acts, both, 0.5 * both))["run"]
    assert {"dead latents", "dense latents", "shrinkage"} <= fired(result, "caveat")


@pytest.mark.parametrize("factor, levels", [(1.0, set()), (1.5, {"not unit"})])
def test_decoder_rows_that_are_not_unit_are_invalid(known, factor, levels):
    acts, directions, _ = known
    result = core(acts, run=with_decoder(acts, factor * directions, directions))["run"]
    assert fired(result, "invalid") == levels


def test_what_reconstructs_worse_than_the_mean_is_invalid(known):
    acts, directions, _ = known
    result = core(acts, run=with_decoder(acts, directions, -directions))["run"]
    assert result["metrics"]["explained_variance"] < 0
    assert "worse than the mean" in fired(result, "invalid")


def test_penalties_that_dominate_or_do_nothing_are_named(known, tmp_path):
    acts, directions, _ = known
    ratios = {"ratio_ortho": 3.0, "ratio_push": 1e-4, "ratio_sparsity": 1e-6, "ratio_aux": 0.0}
    log = [{"step": step, **ratios} for step in range(1, 960, 10)]
    run = write_run(tmp_path / "run", with_decoder(acts, directions), acts, log=log)
    why = {g["name"]: g["why"] for g in evaluate("core", acts, [run])["run"]["guards"]}
    assert "ortho 3" in why["penalty dominates"] and "push 0.0001" in why["penalty idle"]
    assert "sparsity" in why["penalty idle"] and "aux" not in why["penalty idle"]


def test_a_run_of_another_layer_is_stale_and_a_void_one_is_invalid(known, tmp_path):
    acts, directions, _ = known
    sae = with_decoder(acts, directions)
    runs = [write_run(tmp_path / "layer" / "a", sae, acts, layer=5),
            write_run(tmp_path / "void" / "b", sae, acts, void=["L0 16.3 where 8 was wanted"]),
            write_run(tmp_path / "cache" / "c", sae, acts, acts_checksum="0" * 32)]
    found = evaluate("core", acts, runs)
    assert "stale" in fired(found["a"], "invalid") and "void" in fired(found["b"], "invalid")
    assert "stale" in fired(found["c"], "caveat") and not fired(found["c"], "invalid")


# ---- the script ----------------------------------------------------------------------------------


def script(cwd, *flags):
    """03_eval.py in folder `cwd`, in this process -> its exit code and output."""
    out, err = io.StringIO(), io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["03_eval.py", "--device", "cpu", *flags])
        run_script(eval_py.main)
    errors = re.sub(r".*\r", "", err.getvalue())         # without progress bars
    return SimpleNamespace(code=end.value.code, out=out.getvalue(), err=errors)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(a folder with two caches, runs and controls, evaluated once by the script; its output)."""
    place = tmp_path_factory.mktemp("place")
    language_cache(place / "acts" / "toy")
    truth_cache(place / "acts" / "true")
    toy, runs = Acts(place / "acts" / "toy"), place / "runs"
    for seed in (0, 1):
        write_run(runs / f"topk-s{seed}", build(toy, seed=seed), toy, seed=seed)
    true = Acts(place / "acts" / "true")
    write_run(runs / "topk-true-s0", build(true), true)
    write_run(runs / "topk-l0=4.0-s0", build(toy, seed=5), toy, status="training")
    write_run(runs / "topk-s2", build(toy, seed=2), toy, seed=2, code_checksum="0" * 32)
    return place, script(place, "--controls", "--eval", "core")


def test_the_script_evaluates_what_is_sound_and_says_what_is_not(place):
    folder, done = place
    assert done.code == 5 and "topk-s2: the code of topk changed" in done.err
    assert "Traceback" not in done.err and "topk-l0=4.0-s0: skipped" in done.out
    runs = folder / "runs"
    there = {str(path.relative_to(runs).parent.parent) for path in runs.glob("**/core.json")}
    controls = {f"controls-{acts}/{kind}" for acts in ("toy", "true")
                for kind in ("mean", "pca", "random", "untrained")}
    assert there == controls | {"topk-s0", "topk-s1", "topk-true-s0"}


def test_the_table_is_narrow_and_says_guards_in_words(place):
    lines = place[1].out.splitlines()
    assert all(len(line) <= 100 for line in lines if "invalid" not in line)
    assert any("CE rec." in line for line in lines) and any("MCC" in line for line in lines)
    row = next(line for line in lines if line.startswith("control: untrained"))
    assert "untrained!" in row


def test_long_names_lose_what_all_of_them_share():
    names = [f"{idea}-synthetic-batch_size=1024-d_sae=320-l0={l0}-s{seed}"
             for idea in ("topk", "batch_topk") for l0 in (3.0, 5.0) for seed in (0, 1)]
    short = eval_py.short_names(names)
    assert short[names[-1]] == "batch_topk-l0=5.0-s1" and len(set(short.values())) == 8
    assert eval_py.short_names(["topk-s0", "topk-s1"]) == {"topk-s0": "topk-s0",
                                                           "topk-s1": "topk-s1"}
    table = eval_py.pd.DataFrame(
        {"run": short.values(), "L0": "5.00", "guards": "dense latents, shrinkage, short run"})
    assert all(len(line) <= 100 for line in eval_py.table_lines(table))


def test_a_result_says_what_it_belongs_to(place):
    run = place[0] / "runs/topk-s0"
    result, config = read_json(run / "eval/core.json"), read_json(run / "config.json")
    for key in ("sae_checksum", "acts", "acts_checksum", "model", "layer", "hook_name", "d_in"):
        assert result[key] == config[key]
    assert (result["name"], result["run"], result["d_sae"]) == ("core", "topk-s0", 32)
    rates, meta = read_tensors(run / "eval/rates.safetensors")
    assert meta["sae_checksum"] == config["sae_checksum"] and meta["rows"] == result["rows"]
    assert rates["rate"].sum().item() == pytest.approx(result["metrics"]["l0"], rel=1e-5)


def test_controls_are_what_they_are_called(place):
    folder = place[0] / "runs/controls-toy"
    found = {path.parent.parent.name: read_json(path) for path in folder.glob("*/eval/core.json")}
    m = {kind: result["metrics"] for kind, result in found.items()}
    assert all(result["control"] and "untrained" in fired(result) for result in found.values())
    assert not any("short run" in fired(result) for result in found.values())
    assert m["mean"]["l0"] == 0 and m["mean"]["explained_variance"] == pytest.approx(0, abs=0.05)
    pca = m["pca"]
    assert pca["l0"] == pytest.approx(3)
    assert pca["explained_variance"] == pytest.approx(pca["explained_variance_pca"], abs=1e-4)
    assert m["random"]["l0"] == 3 and m["untrained"]["l0"] == pytest.approx(3, rel=0.3)


def test_a_control_at_another_l0_is_another_control(known, tmp_path):
    acts, checksums = known[0], []
    for l0 in (3.0, 4.0):
        run = write_run(tmp_path / f"topk-l0={l0}-s0", build(acts, l0=l0), acts)
        controls = eval_py.make_controls(acts, [run])
        checksums += [c.config["sae_checksum"] for c in controls if c.name != "mean"]
        assert {c.folder.parent for c in controls} == {tmp_path / f"controls-{acts.folder.name}"}
    assert len(set(checksums)) == 6


def test_results_are_reused_only_if_they_are_of_this_run(place):
    folder, path = place[0], place[0] / "runs/topk-s0/eval/core.json"

    def again(*flags):
        return script(folder, "runs/topk-s0", "--eval", "core", *flags).code

    first = path.stat().st_mtime_ns
    assert again() == 0 and path.stat().st_mtime_ns == first
    for stale in ({"sae_checksum": "0" * 32}, {"acts_checksum": "0" * 32}, {"version": 0},
                  {"settings": {"contexts": 3}}, {"val": "0" * 32}):
        write_json(path, {**read_json(path), **stale, "metrics": {"l0": -1.0}})
        assert again() == 0 and read_json(path)["metrics"]["l0"] == pytest.approx(3, abs=0.2)
    now = path.stat().st_mtime_ns
    assert again("--force") == 0 and path.stat().st_mtime_ns > now


def test_a_result_that_is_cut_short_or_lacks_a_key_is_made_again(place):
    folder, path = place[0], place[0] / "runs/topk-s1/eval/core.json"
    kept = read_json(path)
    path.write_bytes(path.read_bytes()[:100])
    assert script(folder, "runs/topk-s1", "--eval", "core").code == 0
    assert read_json(path)["metrics"] == kept["metrics"]
    del kept["guards"]
    write_json(path, kept)
    assert script(folder, "runs/topk-s1", "--eval", "core").code == 0
    assert "guards" in read_json(path)


def test_portions_that_fit_in_memory_give_the_same_results(place, tmp_path, monkeypatch):
    folder = shutil.copytree(place[0], tmp_path / "copy")
    monkeypatch.chdir(folder)
    names = [folder / "runs" / name for name in ("topk-s0", "topk-s1", "topk-true-s0")]
    size = (names[0] / "sae.safetensors").stat().st_size
    assert [len(part) for part in eval_py.portions(names)] == [3]
    monkeypatch.setattr(eval_py, "LOADED", 2 * size)
    assert [len(part) for part in eval_py.portions(names)] == [2, 1]
    monkeypatch.setattr(eval_py, "LOADED", 1)
    assert [len(part) for part in eval_py.portions(names)] == [1, 1, 1]
    assert script(folder, "--force", "--eval", "core").code == 5          # one run's code changed
    for name in names:
        before = read_json(place[0] / name.relative_to(folder) / "eval/core.json")
        after = read_json(name / "eval/core.json")
        assert after["metrics"] == before["metrics"] and after["guards"] == before["guards"]


def test_one_run_that_breaks_leaves_the_others_evaluated(known, tmp_path, monkeypatch, capsys):
    class Broken(SAE):
        def decode(self, acts):
            raise ValueError("no decoder here")

    acts, failures = known[0], []
    broken, fine = build(acts), build(acts, seed=1)
    broken.decode = Broken.decode.__get__(broken)
    runs = [write_run(tmp_path / "broken", broken, acts), write_run(tmp_path / "fine", fine, acts)]
    eval_py.evaluate("core", acts, None, runs, failures)
    assert "broken: core: ValueError: no decoder here" in capsys.readouterr().err
    assert len(failures) == 1 and not (tmp_path / "broken" / "eval").exists()
    assert (tmp_path / "fine" / "eval" / "core.json").exists()


def test_weights_that_are_not_finite_leave_the_others_evaluated(tmp_path, capsys):
    truth_cache(tmp_path / "acts/true")
    acts, failures = Acts(tmp_path / "acts/true"), []
    runs = [write_run(tmp_path / name, build(acts, seed=i), acts) for i, name in enumerate("ab")]
    runs[0].sae.W_dec.data.fill_(math.nan)
    for name in ("core", "geometry"):
        eval_py.evaluate(name, acts, None, runs, failures)
        assert (tmp_path / "b" / "eval" / f"{name}.json").exists()
    assert len(failures) == 2 and capsys.readouterr().err.count("error: ") == 2


def test_a_result_that_can_not_be_written_leaves_the_others_written(known, tmp_path, monkeypatch):
    acts, failures = known[0], []
    runs = [write_run(tmp_path / name, build(acts, seed=i), acts) for i, name in enumerate("ab")]

    def half_finite(acts, model, runs, settings):
        for run in runs:
            value = math.nan if run.name == "a" else 1.0
            yield run, {"metrics": {}, "guards": [], "details": {"value": value}}

    monkeypatch.setitem(eval_py.EVALS, "geometry", eval_py.Evaluation(half_finite))
    eval_py.evaluate("geometry", acts, None, runs, failures)
    assert len(failures) == 1 and (tmp_path / "b/eval/geometry.json").exists()


def test_one_language_model_is_in_memory_at_a_time(place, monkeypatch):
    """What SAEBench's evaluations keep of a cache goes with it."""
    seen = []
    monkeypatch.setitem(eval_py.EVALS, "tpp", eval_py.Evaluation(
        lambda acts, model, runs, settings: seen.append(eval_py.bench_of(acts, model)) or []))
    monkeypatch.setattr(eval_py, "Bench", lambda acts, model: model)
    script(place[0], "runs/topk-s0", "--eval", "tpp", "--force")
    assert seen[0] is not None and eval_py.bench_of.cache_info().currsize == 0


def test_a_run_that_lost_its_weights_leaves_the_others_evaluated(place, tmp_path):
    shutil.copytree(place[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs/topk-s1/sae.safetensors").unlink()
    done = script(tmp_path, "runs/topk-s0", "runs/topk-s1", "--eval", "core", "--force")
    assert done.code == 5 and "topk-s1" in done.err and done.err.count("\n") == 1
    assert read_json(tmp_path / "runs/topk-s0/eval/core.json")


def test_padding_is_no_target_of_saebenchs_loss(tmp_path):
    language_cache(tmp_path)                                 # contexts of several lengths
    counted = {}
    for pack in (True, False):
        write_json(tmp_path / "meta.json", read_json(tmp_path / "meta.json") | {"pack": pack})
        acts = Acts(tmp_path)
        found = next(eval_py.held_out(acts, eval_py.LanguageModel(acts, CPU), CPU)).predictions
        data = eval_py.Data(acts, CPU)
        data.add_language(found)
        counted[pack] = data.language["saebench_ce"]
        ends = found.mask.sum(1) + 1                         # the first token is no row
    assert counted[True] - counted[False] == (ends < found.mask.shape[1]).sum()


def test_an_evaluation_that_fails_is_named_and_the_others_go_on(place, tmp_path, monkeypatch):
    folder = shutil.copytree(place[0], tmp_path / "copy")

    def broken(acts, model, runs, settings):
        raise KeyError("words")
        yield

    monkeypatch.setitem(eval_py.EVALS, "geometry", eval_py.Evaluation(broken))
    done = script(folder, "runs/topk-s0", "--eval", "geometry", "stability")
    assert done.code == 5 and "geometry" in done.err and "KeyError" in done.err
    assert done.err.count("\n") == 1 and (folder / "runs/topk-s0/eval/stability.json").exists()


def test_without_sae_bench_its_evaluations_are_left_out_and_the_others_made(place, monkeypatch):
    find = eval_py.importlib.util.find_spec
    monkeypatch.setattr(eval_py.importlib.util, "find_spec",
                        lambda name: None if name == "sae_bench" else find(name))
    done = script(place[0], "runs/topk-s0", "--eval", "core", "tpp", "--force")
    assert done.code == 0 and "no tpp: sae_bench is not installed" in done.out
    assert "sae_bench" not in read_json(place[0] / "runs/topk-s0/eval/core.json")["versions"]


def test_what_needs_a_language_model_is_left_out_for_synthetic_data(place):
    done = script(place[0], "runs/topk-true-s0", "--eval", "core", "features")
    assert done.code == 0 and not (place[0] / "runs/topk-true-s0/eval/features.json").exists()
    assert "acts/true: no features, which need a language model" in done.out


def test_all_evaluations_are_made_if_others_are_named_too(place):
    script(place[0], "runs/topk-true-s0", "--eval", "core", "all")
    assert (place[0] / "runs/topk-true-s0/eval/geometry.json").exists()


def test_a_cache_that_is_gone_does_not_keep_the_others_from_being_evaluated(place, tmp_path):
    shutil.copytree(place[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "acts" / "toy")
    done = script(tmp_path, "--eval", "core", "--force")
    assert done.code == 5 and "no activations in acts/toy" in done.err
    assert "acts/true\n" in done.out and "topk-true-s0" in done.out


def test_without_the_language_model_the_rest_is_evaluated(place, tmp_path):
    shutil.copytree(place[0], tmp_path, dirs_exist_ok=True)
    meta = read_json(tmp_path / "acts/toy/meta.json")
    meta["model"]["path"] = str(tmp_path / "gone")
    write_json(tmp_path / "acts/toy/meta.json", meta)
    done = script(tmp_path, "runs/topk-s0", "runs/topk-s1", "--eval", "core", "geometry")
    assert done.code == 5 and done.err.count("error:") == 1 and "gone" in done.err
    assert read_json(tmp_path / "runs/topk-s0/eval/geometry.json")["metrics"]["coherence"] > 0


def test_a_seed_that_was_killed_at_its_start_is_no_sibling(place, tmp_path):
    shutil.copytree(place[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs/topk-s7").mkdir()
    write_file(tmp_path / "runs/topk-s8/config.json", b"no run")
    done = script(tmp_path, "runs/topk-s0", "runs/topk-s1", "--eval", "stability")
    assert done.code == 0
    others = read_json(tmp_path / "runs/topk-s0/eval/stability.json")["details"]["others"]
    assert list(others) == ["topk-s1"]


def test_a_run_of_another_width_is_said_in_one_line(place, tmp_path):
    folder = shutil.copytree(place[0], tmp_path / "copy")
    config = read_json(folder / "runs/topk-true-s0/config.json")
    write_json(folder / "runs/topk-true-s0/config.json", {**config, "acts": "toy"})
    done = script(folder, "runs/topk-true-s0", "runs/topk-s0", "--eval", "core")
    assert done.code == 5 and "another width" in done.err and done.err.count("\n") == 1


def test_bad_input_is_one_line(tmp_path):
    for flags, words in (((), "run 02_train.py first"), (("runs/none",), "is not a run"),
                         (("--device", "tpu"), "--device tpu"), (("--eval", "nothing"), "nothing")):
        done = script(tmp_path, *flags)
        assert done.code != 0 and words in done.err and done.err.count("\n") == 1


# ---- features ------------------------------------------------------------------------------------


def save_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_features_show_the_contexts_in_which_a_latent_fires_most(tmp_path):
    _, tokens, mask = language_cache(tmp_path / "acts" / "toy")
    save_tokenizer(tmp_path / "acts" / "toy" / "model")
    acts = Acts(tmp_path / "acts" / "toy")
    run = write_run(tmp_path / "runs" / "topk-s0", build(acts), acts)
    eval_py.evaluate("core", acts, eval_py.LanguageModel(acts, CPU), [run], [])
    rates = read_tensors(run.folder / "eval" / "rates.safetensors")[0]["rate"]
    latents = evaluate("features", acts, [run])["topk-s0"]["latents"]
    dense = torch.zeros(*mask.shape, run.sae.d_sae)
    hidden = eval_py.LanguageModel(acts, CPU).activations(tokens)
    dense[mask] = run.sae.encode(hidden[mask])

    assert sum("random" in latent["why"] for latent in latents) == min(20, int((rates > 0).sum()))
    frequent = [latent["rate"] for latent in latents if "frequent" in latent["why"]]
    rare = [latent["rate"] for latent in latents if "rare" in latent["why"]]
    assert max(frequent) == rates.max() and min(rare) == rates[rates > 0].min()
    W_dec = unit(run.sae.W_dec.detach())
    cosine = (W_dec @ W_dec.T).fill_diagonal_(-2)
    for latent in latents:
        i, near = latent["latent"], latent["neighbours"][0]
        assert near["latent"] == int(cosine[i].argmax())
        per_context = dense[..., i].amax(1)
        wanted = per_context[per_context > 0].sort(descending=True).values[:8]
        shown = latent["contexts"]
        assert [c["activation"] for c in shown] == pytest.approx(wanted.tolist(), rel=1e-4)
        best = int(per_context.argmax())
        top = f"w{tokens[best, int(dense[best, :, i].argmax())]}"
        assert shown[0]["token"] == top and f"<<{top}>>" in shown[0]["text"]


def test_features_ask_for_core_first(tmp_path):
    language_cache(tmp_path / "acts" / "toy")
    acts = Acts(tmp_path / "acts" / "toy")
    run = write_run(tmp_path / "runs" / "topk-s0", build(acts), acts)
    with pytest.raises(eval_py.Refuse, match="rates.safetensors"):
        evaluate("features", acts, [run])

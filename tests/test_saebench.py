"""Promises of SAEBench inside 03_eval.py: its numbers field by field, planted answers found, nothing stale, nothing silent.

The language model is a small Llama with random weights whose word embeddings are planted: a direction for the first letter, which a probe
finds, and for a third of each letter's words a direction of their own."""
import contextlib
import errno
import functools
import http.server
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import tokenizers
import torch
import transformers

from sae import SAE, Acts, Codes, Refuse, checksum, generator, read_json, unit, write_json, write_tensors

ev = importlib.import_module("03_eval")
CPU = torch.device("cpu")
D, CTX, CONTEXTS, LAYER = 144, 24, 40, 1
SPECIAL = ["<pad>", "<bos>", "<eos>"]
OWN = [f"{c}{d}" for c in string.ascii_lowercase for d in "bcdf"]            # words with a direction of their own
PLAIN = [f"{c}{d}" for c in string.ascii_lowercase for d in "ghjkmnpq"] + list(string.ascii_uppercase) + ["has", "the", "first", "letter"]
WORDS = {w: i for i, w in enumerate(SPECIAL + [":", "?"] + OWN + PLAIN)}


def make_tokenizer(folder):
    """One token per word; spaces and newlines only separate."""
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="?"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    t.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", WORDS["<bos>"])])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="?")
    fast.save_pretrained(folder)


def axes():
    """(directions of the 26 letters [26, D], of the words of OWN [104, D]), all orthonormal."""
    q = torch.linalg.qr(torch.randn(D, D, generator=generator("axes")))[0]
    return q[:26], q[26:26 + len(OWN)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """acts/toy with its model, and a place for runs; the working folder for this module."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    with contextlib.chdir(folder):
        yield Acts("acts/toy")


def make_world(folder):
    letters, own = axes()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=len(WORDS), hidden_size=D, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
                                          max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for word, i in WORDS.items():
                row = 0.02 * torch.randn(D)
                if word[0].isalpha():
                    row += letters[ord(word[0].lower()) - 97] + (0.8 * own[OWN.index(word)] if word in OWN else 0)
                model.model.embed_tokens.weight[i] = row
            model.lm_head.weight.mul_(20)                                     # its predictions depend on the stream
    model.save_pretrained(folder / "model")
    make_tokenizer(folder / "model")
    tokens, g = torch.ones(CONTEXTS, 1, dtype=torch.long), generator("tokens")
    with torch.no_grad():
        for _ in range(CTX - 1):                                              # it predicts what it says itself
            p = model(tokens).logits[:, -1, 3:].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=g) + 3], 1)
    tokens = tokens.int()
    tokens[::3, 11] = 2
    write_cache(folder / "acts" / "toy", model, tokens)
    write_cache(folder / "acts" / "bare", model, tokens.clamp_min(5))          # without special tokens


@torch.no_grad()
def write_cache(acts, model, tokens):
    acts.mkdir(parents=True)
    mask = tokens > 2
    rows = model(tokens.long(), output_hidden_states=True).hidden_states[LAYER + 1][mask]
    said = write_tensors(acts / "train_00000.safetensors", {"acts": rows})
    held = write_tensors(acts / "val.safetensors", {"tokens": tokens, "mask": mask})
    write_json(acts / "meta.json", {
        "format": 1, "complete": True, "d_in": D, "dtype": "float32", "rows": len(rows), "scale": D ** 0.5 / rows.norm(dim=-1).mean().item(), "ctx": CTX,
        "shards": [{"file": "train_00000.safetensors", "rows": len(rows), "bytes": 0, "checksum": said}], "source": "model", "layer": LAYER,
        "hook": "resid_post", "hook_name": f"blocks.{LAYER}.hook_resid_post", "val": {"file": "val.safetensors", "checksum": held, "contexts": CONTEXTS},
        "model": {"name": "toy", "path": "model", "revision": None, "n_layers": 3, "n_parameters": 300_000}})


@pytest.fixture(scope="module")
def bench(world):
    return ev.Bench(world, CPU)


def make_run(name, sae):
    """A run of hand-made weights, as 03_eval.py holds it."""
    weights = b"".join(v.detach().numpy().tobytes() for v in sae.state_dict().values())
    return ev.Run(Path("runs") / name, sae.eval(), {"variant": name, "steps": 100, "settings": sae.settings(), "sae_checksum": checksum(weights)})


def random_sae(world, seed=0, d_sae=200, **settings):
    """Random directions, a tenth of which fire."""
    sae = SAE(D, 100, seed, d_sae=d_sae, activation="topk", l0=20.0, **settings)
    with torch.no_grad():
        sae.scale.fill_(world.scale)
        sae.b_enc.normal_(0, 0.1, generator=generator("b_enc", seed))
        sae.b_dec.normal_(0, 0.1, generator=generator("b_dec", seed))
    return sae


def relu_sae(world, W_enc, W_dec, b_enc, b_dec=0.0):
    """A ReLU SAE of the given weights, which are those of raw activations."""
    sae = SAE(D, 100, 0, d_sae=len(W_dec), activation="relu", l0=10.0)
    with torch.no_grad():
        sae.scale.fill_(world.scale)
        for parameter, value in ((sae.W_enc, W_enc), (sae.W_dec, W_dec), (sae.b_enc, b_enc * world.scale), (sae.b_dec, b_dec * world.scale)):
            parameter.copy_(torch.as_tensor(value).expand_as(parameter))
    return sae


def identity_sae(world):
    """x = relu(x) - relu(-x)."""
    eye = torch.eye(D)
    return relu_sae(world, torch.cat([eye, -eye], 1), torch.cat([eye, -eye]), torch.tensor(0.0))


def evaluate(world, runs, *names, force=False):
    failures = {}
    ev.evaluate_saebench(world, runs, names, force, CPU, failures)
    return failures


def result(run, name):
    return read_json(run.folder / "eval" / f"{name}.json")


def seed_all(seed):
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def same(ours, theirs, path="", rtol=2e-5, atol=2e-6):
    """Every field equal, numbers to fp32."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        for k in theirs:
            same(ours[k], theirs[k], f"{path}.{k}", rtol, atol)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), path
        for i, (a, b) in enumerate(zip(ours, theirs)):
            same(a, b, f"{path}[{i}]", rtol, atol)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=rtol, abs=atol), path
    else:
        assert ours == theirs, path


# ---- the frame -----------------------------------------------------------------------------------------------------------------------


def test_the_run_that_saebench_sees_encodes_and_decodes_as_the_run(world, bench):
    x = world.shard(0)["acts"][:64]
    for name in ("baseline", "skip", "layernorm"):
        sae = ev.load_run.__globals__["load_variant"](name)(D, 100, 0, d_sae=64)
        sae.init_from_data(x * world.scale)
        with torch.no_grad():
            sae.scale.fill_(world.scale)
            sae.b_dec.normal_(generator=generator("b"))
        if name == "skip":
            sae.skip_raw.data.fill_(0.5)
        seen = ev.BenchSAE(bench, make_run(name, sae))
        assert torch.allclose(seen.encode(x), sae.encode(x), atol=1e-6)
        assert torch.allclose(seen(x), sae.reconstruct(x), atol=1e-5)
        acts = seen.encode(x.view(4, 16, D))
        acts[..., 0] += 1.0                                                   # an edited code keeps what the code does not carry
        moved = seen.decode(acts) - sae.reconstruct(x).view(4, 16, D)
        assert torch.allclose(unit(moved), sae.W_dec[0].expand_as(moved), atol=1e-3)
        seen.to(dtype=torch.bfloat16)
        assert seen.encode(x).dtype == seen.W_dec.dtype == torch.bfloat16 and sae.W_dec.dtype == torch.float32


@pytest.mark.parametrize("activation", ["relu", "topk", "batch_topk", "jumprelu", "own"])
def test_sparse_codes_are_what_the_run_encodes(world, bench, activation):
    own = type("Own", (SAE,), {"activate": lambda sae, pre: (pre - 0.05).relu()})                # a variant's own rule
    sae = own(D, 100, 0, d_sae=400, l0=8.0) if activation == "own" else SAE(D, 100, 0, d_sae=400, activation=activation, l0=8.0)
    x = world.shard(0)["acts"][:64]
    with torch.no_grad():
        sae.scale.fill_(world.scale)
        sae.b_enc.sub_(sae.pre_acts(x * world.scale).flatten().quantile(0.96))                   # 4 % are positive
        if activation == "batch_topk":
            sae.threshold.fill_(0.05)
        if activation == "jumprelu":
            sae.log_threshold.fill_(-3.0)
    seen = ev.BenchSAE(bench, make_run(activation, sae))
    codes, acts = seen.codes(x), seen.encode(x)
    assert isinstance(codes, Codes) and 0 < (acts > 0).float().mean() < 0.05
    assert torch.allclose(codes.dense(), acts, atol=1e-6) and torch.allclose(seen.decode(codes), seen.decode(acts), atol=1e-5)


def test_the_highest_entries_are_found_where_they_share_a_group_and_where_they_tie():
    pre = torch.randn(300, 256, generator=generator("highest"))
    pre[:100, ::32] += 9                                                       # the highest are all of one group of eight
    for rows in (pre, pre.round()):
        at = ev.highest_at(rows, 16).view(300, 16)
        assert (at // 256 == torch.arange(300)[:, None]).all() and all(len(row.unique()) == 16 for row in at)
        assert torch.equal(rows.flatten()[at].sort(1).values, rows.topk(16).values.flip(1))


def test_the_highest_entries_are_found_by_sorting_where_none_tie(monkeypatch):
    monkeypatch.delattr(ev, "highest")
    pre = torch.randn(300, 256, generator=generator("highest"))
    assert torch.equal(pre.flatten()[ev.highest_at(pre, 16).view(300, 16)].sort(1).values, pre.topk(16).values.flip(1))


def test_a_call_into_saebench_leaves_no_trace(bench):
    import transformer_lens
    before = random.random, transformer_lens.HookedTransformer.__dict__["from_pretrained_no_processing"], torch.is_grad_enabled()
    seed_all(5)
    want = random.random(), numpy.random.rand(), torch.rand(1)
    seed_all(5)
    with bench.seams(42):
        torch.set_grad_enabled(False)
        assert transformer_lens.HookedTransformer.from_pretrained_no_processing(bench.name, device="cpu", dtype=torch.float32) is bench.model
        with pytest.raises(Refuse, match="asked for the model gemma"):
            transformer_lens.HookedTransformer.from_pretrained_no_processing("gemma-2-2b")
        torch.rand(7), random.random(), numpy.random.rand()
    assert before == (random.random, transformer_lens.HookedTransformer.__dict__["from_pretrained_no_processing"], torch.is_grad_enabled())
    assert (random.random(), numpy.random.rand(), torch.rand(1)) == want


def test_a_call_on_a_cpu_leaves_gpus_alone_which_a_forked_process_could_not_touch(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: throw(RuntimeError("Cannot re-initialize CUDA in forked subprocess")))
    with bench.seams(42):
        torch.rand(1)


def test_warnings_of_how_saebench_calls_sklearn_stay_inside(bench):
    with warnings.catch_warnings(record=True, action="always") as seen:
        with bench.seams(42):
            warnings.warn("'penalty' was deprecated", FutureWarning)
        assert not seen
        warnings.warn("ours", FutureWarning)
    assert [str(w.message) for w in seen] == ["ours"]


def test_a_table_without_results_is_none(world):
    assert ev.table([make_run("without", random_sae(world))], world, 8) == ""


def test_a_seed_decides_what_every_generator_draws_in_a_call(bench):
    def drawn(seed):
        with bench.seams(seed):
            return random.random(), numpy.random.rand(), torch.rand(1).item()
    first = drawn(1)
    assert first == drawn(1) and all(a != b for a, b in zip(first, drawn(2)))


def test_folders_of_shared_work_differ_with_every_setting(bench):
    a, b = bench.folder("core", {"seed": 0}), bench.folder("core", {"seed": 1})
    assert a != b and a == bench.folder("core", {"seed": 0})
    assert read_json(a / "key.json")["model"] == bench.weights


def test_a_model_that_transformer_lens_gets_wrong_is_refused(world, monkeypatch):
    from transformer_lens import loading_from_pretrained as loading
    real = loading.get_pretrained_state_dict

    def other(*args, **kwargs):
        state = real(*args, **kwargs)
        return {**state, "blocks.0.mlp.W_out": state["blocks.0.mlp.W_out"] * 1.5}
    monkeypatch.setattr(loading, "get_pretrained_state_dict", other)
    with pytest.raises(Refuse, match="is not the Hugging Face model"):
        ev.hooked_transformer(world, CPU)


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "Gemma2", "Qwen2"])
def test_transformer_lens_is_given_models_of_many_kinds(world, tmp_path, kind):
    small = {"GPT2": dict(n_positions=64, n_embd=32, n_layer=3, n_head=2),
             "Gemma2": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48,
                            query_pre_attn_scalar=16, sliding_window=64)}.get(
        kind, dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2, pad_token_id=0, **small)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama-gemma")      # words that mislead TransformerLens
    make_tokenizer(tmp_path / "llama-gemma")
    acts = Acts("acts/toy")
    acts.meta = {**world.meta, "model": {"name": kind, "path": str(tmp_path / "llama-gemma"), "revision": None, "n_layers": 3}}
    bench = ev.Bench(acts, CPU)                                               # which compares it with the Hugging Face model
    assert bench.model.cfg.d_model == 32
    x = torch.randn(3, 16, 32, generator=generator(kind))
    log_p = bench.model(x, start_at_layer=bench.layer + 1).log_softmax(-1).flatten(0, 1)
    assert torch.allclose(torch.cat([bench.logits(rows)[0].log_softmax(-1) for rows, in bench.blocks(bench.behind(x).flatten(0, 1))]), log_p, atol=1e-5)
    tokens = torch.randint(5, 20, (3, 16), generator=generator(kind, "tokens"))
    tokens[0, :4] = bench.model.tokenizer.pad_token_id
    for side in ("right", "left"):
        with ev.replaced(bench.model.tokenizer, "padding_side", side):
            read = bench.model.run_with_cache(tokens, prepend_bos=False, names_filter=[bench.hook_name])[1][bench.hook_name]
            assert torch.allclose(bench.at_hook(tokens), read, atol=1e-5), side
    calls, attend = [], ev.attend
    with ev.replaced(ev, "attend", lambda *args, **more: calls.append(kind) or attend(*args, **more)):
        bench.behind(x)
    assert bool(calls) == (kind in ("GPT2", "GPTNeoX"))                       # the others' attention is not PyTorch's


# ---- core -----------------------------------------------------------------------------------------------------------------------------


def plain_core(acts, bench, runs, settings, folder):
    """SAEBench's own call on the same contexts -> its result of each run."""
    from sae_bench.evals.core import main as core
    from sae_lens.training import activations_store
    n, batch = settings["batches"], settings["batch_size_prompts"]
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text("\n".join(json.dumps({"tokens": row}) for row in acts.val()["tokens"][:n * batch].tolist()))
    on_the_hub = ev.replaced(activations_store, "validate_pretokenized_dataset_tokenizer", lambda **_: None)      # asks the hub about the folder
    with bench.seams(42), on_the_hub:
        core.multiple_evals([(bench.label(r), ev.BenchSAE(bench, r)) for r in runs], n, n, batch, compute_featurewise_density_statistics=True,
                            compute_featurewise_weight_based_metrics=True, exclude_special_tokens_from_reconstruction=True, dataset=str(folder / "data"),
                            context_size=settings["context_size"], output_folder=str(folder / "out"), dtype="float32", device="cpu", force_rerun=True)
    return [json.loads(next((folder / "out").glob(f"{bench.label(r)}_*.json")).read_text()) for r in runs]


def test_core_is_saebenchs_own_field_by_field(world, bench, tmp_path):
    runs = [make_run("core-a", random_sae(world, 0)), make_run("core-b", random_sae(world, 1))]
    assert not evaluate(world, runs, "saebench_core")
    for run, theirs in zip(runs, plain_core(world, bench, runs, ev.core_settings(world), tmp_path)):
        ours = result(run, "saebench_core")
        for key in ("eval_result_metrics", "eval_result_details", "sae_cfg_dict", "eval_type_id"):
            same(ours[key], theirs[key], key)


@pytest.mark.parametrize("cap", [-1.0, 2.0])
def test_core_is_saebenchs_own_where_logits_are_capped_too_and_the_same_bits_once_it_is_kept(world, bench, tmp_path, monkeypatch, cap):
    monkeypatch.setattr(bench.model.cfg, "output_logits_soft_cap", cap)
    monkeypatch.setattr(ev, "VERSION", f"capped at {cap}")                    # a folder of its own
    run, settings = make_run("capped", random_sae(world, 8)), ev.core_settings(world)
    first, again = ([made for _, made, *_ in ev.outcomes(bench, "saebench_core", settings, [run], {})] for _ in range(2))
    theirs = plain_core(world, bench, [run], settings, tmp_path)
    for key in ("eval_result_metrics", "eval_result_details"):
        same(first[0][key], theirs[0][key], key)
        assert first[0][key] == again[0][key]


def test_identity_recovers_the_loss_and_zero_output_is_void(world):
    identity = make_run("identity", identity_sae(world))
    zero = make_run("zero", relu_sae(world, torch.eye(D), torch.eye(D), torch.tensor(-1e6)))
    assert not evaluate(Acts("acts/bare"), [identity, zero], "saebench_core")
    m = result(identity, "saebench_core")["metrics"]
    assert m["ce_loss_score"] == pytest.approx(1, abs=1e-4) and m["kl_div_score"] == pytest.approx(1, abs=1e-4)
    assert m["explained_variance_about_mean"] == pytest.approx(1, abs=1e-6) and not result(identity, "saebench_core")["guards"]
    void = result(zero, "saebench_core")
    assert void["metrics"]["ce_loss_score"] == pytest.approx(0, abs=1e-6)
    assert {"G01", "G03", "G04"} <= {g["id"] for g in void["guards"] if g["level"] == "fatal"}
    assert void["metrics"]["cossim"] is None


def test_what_exceeds_the_memory_is_computed_again(world, bench, monkeypatch):
    runs = [make_run("again", random_sae(world, 3))]
    evaluate(world, runs, "saebench_core")
    first = result(runs[0], "saebench_core")["eval_result_metrics"]
    monkeypatch.setattr(ev, "KEPT", 5 * 4 * CTX * (3 * D + 1))                         # five contexts
    monkeypatch.setattr(ev, "VERSION", 99)
    evaluate(world, runs, "saebench_core")
    same(result(runs[0], "saebench_core")["eval_result_metrics"], first)


# ---- absorption -----------------------------------------------------------------------------------------------------------------------


def letter_sae(world, repaired):
    """A latent for each letter and one for each word of OWN. Planted absorption: the letter's latent is silent on those words, whose own
    latents carry the letter's direction; repaired: it fires on them, and they carry none of it."""
    letters, own = axes()
    of = torch.tensor([ord(w[0]) - 97 for w in OWN])
    parents, children = letters.clone(), 1.4 * own
    if not repaired:
        parents -= 1.5 * torch.zeros_like(letters).index_add_(0, of, own)
    decoders = own if repaired else unit(letters[of] + 0.8 * own)
    b_enc = torch.cat([torch.full((26,), -0.2), torch.full((len(OWN),), -0.5 if repaired else -0.2)])
    return relu_sae(world, torch.cat([parents, children]).T, torch.cat([letters, decoders]), b_enc)


def plain_absorption(acts, bench, runs, settings, folder):
    """SAEBench's own call: its probes, prompts, k-sparse probes and scores -> its result of each run."""
    from sae_bench.evals.absorption import common, feature_absorption
    from sae_bench.evals.absorption import main as absorption
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
    config = AbsorptionEvalConfig(model_name=bench.name, min_GT_probe_f1=settings["min_probe_f1"], min_feats_for_eval=settings["min_letters"],
                                  precalc_k_sparse_probe_sae_acts=True)
    there = {"experiment_dir": folder / "probing", "probes_dir": folder / "probes"}        # else next to the installed package
    probing = functools.partial(absorption.run_k_sparse_probing_experiment, **there)
    scoring = functools.partial(absorption.run_feature_absortion_experiment, experiment_dir=folder / "scores", probes_dir=there["probes_dir"],
                                sparse_probing_experiment_dir=there["experiment_dir"])
    (folder / "out").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        for module, name, value in ((absorption, "run_k_sparse_probing_experiment", probing), (absorption, "run_feature_absortion_experiment", scoring),
                                    (common, "get_alpha_tokens", ev.alpha_tokens), (feature_absorption, "get_alpha_tokens", ev.alpha_tokens)):
            stack.enter_context(ev.replaced(module, name, value))
        with bench.seams(settings["random_seed"]):
            absorption.run_eval(config, [(bench.label(r), ev.BenchSAE(bench, r)) for r in runs], "cpu", str(folder / "out"), force_rerun=True)
    return [json.loads(next((folder / "out").glob(f"{bench.label(r)}_*.json")).read_text()) for r in runs]


@pytest.mark.parametrize("name", ["planted", pytest.param("random", marks=pytest.mark.slow)])
def test_absorption_is_saebenchs_own_field_by_field(world, bench, tmp_path, name):
    run = make_run(name, letter_sae(world, repaired=False) if name == "planted" else random_sae(world, 2))
    assert not evaluate(world, [run], "absorption")
    ours, theirs = result(run, "absorption"), plain_absorption(world, bench, [run], ev.absorption_settings(world), tmp_path)[0]
    for key in ("eval_result_metrics", "eval_result_details", "sae_cfg_dict", "eval_type_id", "eval_config"):
        same(ours[key], theirs[key], key)


def with_settings(monkeypatch, world, name, **changed):
    settings = {**ev.BENCH[name].settings(world), **changed}
    monkeypatch.setitem(ev.BENCH, name, ev.BENCH[name]._replace(settings=lambda acts: settings))


def test_planted_absorption_is_found_and_the_repaired_sae_is_free_of_it(world, monkeypatch):
    with_settings(monkeypatch, world, "absorption", probe_batch=16)           # for 344 words
    planted, repaired = make_run("absorbing", letter_sae(world, False)), make_run("repaired", letter_sae(world, True))
    assert not evaluate(world, [planted, repaired], "absorption")
    bad, good = result(planted, "absorption"), result(repaired, "absorption")
    assert bad["metrics"]["mean_full_absorption_score"] > 0.15 and bad["metrics"]["mean_absorption_fraction_score"] > 0.15
    assert good["metrics"]["mean_full_absorption_score"] == 0 and good["metrics"]["mean_absorption_fraction_score"] < 0.01
    for of in bad["letters"]:
        assert of["main_latent"] == ord(of["letter"]) - 97
    for of, detail in zip(bad["letters"], bad["eval_result_details"]):
        low, high = of["full_absorption_95"]
        assert low <= detail["full_absorption_rate"] <= high and high - low > 0.1
    assert [g["id"] for g in bad["guards"]] == ["G14"] and "0.3 M parameters" in bad["guards"][0]["message"]


def test_words_are_read_where_they_stand_if_the_model_does_not_spell(world, monkeypatch):
    with_settings(monkeypatch, world, "absorption", prompt_template="{word}", prompt_token_pos=-1, own_position=True)
    monkeypatch.setattr(ev, "READINGS", 4)
    run = make_run("own-position", letter_sae(world, False))
    assert not evaluate(world, [run], "absorption")
    found = result(run, "absorption")
    assert "does not spell" in found["guards"][-1]["message"] and found["metrics"]["letters"] >= 10


def test_absorption_is_left_out_where_the_model_knows_no_letters(world, monkeypatch, capsys):
    with_settings(monkeypatch, world, "absorption", min_probe_f1=1.0)         # which no probe exceeds
    run = make_run("letterless", random_sae(world))
    assert not evaluate(world, [run], "absorption") and not (run.folder / "eval" / "absorption.json").exists()
    assert "probes find 0 first letters" in capsys.readouterr().out


def test_what_is_out_of_the_published_scope_is_marked(bench):
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
    model = {**bench.acts.meta["model"], "n_layers": 10}

    def guards(of, *args, layer=5, parameters=2e9):
        meta = {"model": {**model, "n_parameters": parameters}}
        return {g["id"]: g["message"] for g in of(SimpleNamespace(acts=SimpleNamespace(meta=meta), layer=layer), *args)}

    def absorption(letters=20, d_sae=16384, parameters=1e9):
        m = {"letters": letters, "mean_full_absorption_score": 0.1, "mean_num_split_features": 1.0, "median_main_latent_f1": 0.9}
        return guards(ev.absorption_guards, SimpleNamespace(cfg=SimpleNamespace(d_sae=d_sae)), m, AbsorptionEvalConfig(model_name="m"), parameters=parameters)
    assert absorption() == {}
    assert absorption(letters=19)["G14"] == "out of scope: 19 letters, not 20"
    assert "8192 latents" in absorption(d_sae=8192)["G14"] and "900 M parameters" in absorption(parameters=9e8)["G14"]
    asked = dict.fromkeys(SUBJECTS, 50)
    assert guards(ev.question_guards, asked) == {} and guards(ev.question_guards, asked, layer=6).keys() == {"G32"}       # 7 of 10 layers: too deep
    assert "G14" in guards(ev.question_guards, {**asked, "wmdp-bio": 49}) and "G14" in guards(ev.question_guards, asked, parameters=1.9e9)
    assert guards(ev.unlearning_guards, [{"n_features": 5}], layer=6).keys() == {"G14", "G32"}


def test_wilson_intervals_are_those_of_the_books():
    assert ev.wilson(0, 10) == pytest.approx([0, 0.2775], abs=1e-3)           # Brown, Cai and DasGupta 2001
    assert ev.wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-3)


# ---- results: nothing stale, nothing silent, nothing lost -----------------------------------------------------------------------------


def written(run, name="saebench_core"):
    return (run.folder / "eval" / f"{name}.json").stat().st_mtime_ns


def test_a_result_is_kept_until_weights_settings_or_code_change(world, monkeypatch):
    run = make_run("kept", random_sae(world, 4))
    evaluate(world, [run], "saebench_core")
    first = written(run)
    evaluate(world, [run], "saebench_core")
    assert written(run) == first
    other = make_run("kept", random_sae(world, 5))                            # the same name, other weights
    evaluate(world, [other], "saebench_core")
    second = written(run)
    assert second != first and result(run, "saebench_core")["sae_checksum"] == other.config["sae_checksum"]
    evaluate(world, [other], "saebench_core", force=True)
    third = written(run)
    assert third != second
    with_settings(monkeypatch, world, "saebench_core", batches=1)
    evaluate(world, [other], "saebench_core")
    assert written(run) != third


def test_one_failing_run_or_evaluation_does_not_stop_the_others(world, monkeypatch, capsys):
    good, broken = make_run("good", random_sae(world, 6)), make_run("broken", random_sae(world, 7))
    monkeypatch.setattr(broken.sae, "activate", lambda pre: (_ for _ in ()).throw(ValueError("no latents today")), raising=False)
    assert evaluate(world, [broken, good], "saebench_core").keys() == {(broken.folder, "saebench_core")}
    assert result(good, "saebench_core") and not (broken.folder / "eval" / "saebench_core.json").exists()
    assert "saebench_core failed: ValueError: no latents today" in capsys.readouterr().err
    monkeypatch.setitem(ev.BENCH, "absorption", ev.BENCH["absorption"]._replace(evaluate=lambda *_: 1 / 0))
    failures = evaluate(world, [good], "absorption", "saebench_core", force=True)
    assert failures == {(good.folder, "absorption"): "ZeroDivisionError: division by zero"}


def test_an_interrupted_evaluation_goes_on_with_the_runs_that_are_left(world, monkeypatch):
    runs = [make_run(f"resume{i}", random_sae(world, 10 + i)) for i in range(3)]
    real, calls = ev.core_result, []

    def stop(bench, run, *rest):
        calls.append(run.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(bench, run, *rest)
    monkeypatch.setattr(ev, "core_result", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(world, runs, "saebench_core")
    evaluate(world, runs, "saebench_core")
    assert calls == ["resume0", "resume1", "resume1", "resume2"] and all(result(r, "saebench_core") for r in runs)


@pytest.fixture
def processes(monkeypatch, tmp_path):
    """Two threads, so that two runs and more are evaluated in two processes; -> whose result was made in which, with room for how many bytes."""
    real, made = ev.check_saebench, tmp_path / "made"

    def check(result, run, bench, spec):
        with open(made, "a") as f:
            f.write(f"{run.name} {os.getpid()} {bench.room}\n")
        return real(result, run, bench, spec)
    monkeypatch.setattr(ev, "check_saebench", check)
    torch.set_num_threads(2)
    yield lambda: [(name, int(pid), int(room)) for name, pid, room in map(str.split, made.read_text().splitlines())]
    torch.set_num_threads(1)
    assert not multiprocessing.active_children()


forks = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@forks
def test_as_many_runs_as_threads_are_evaluated_side_by_side_to_the_same_figures(labelled, processes, capsys):
    names, runs = [n for n in ev.BENCH if n not in ev.ASKED], [make_run(f"side{i}", random_sae(labelled, 20 + i)) for i in range(3)]
    torch.set_num_threads(1)
    assert not evaluate(labelled, runs, *names)
    alone = {(r.name, n): result(r, n) for r in runs for n in names}
    assert {pid for _, pid, _ in processes()} == {os.getpid()} and processes()[0][2] == ev.KEPT
    shutil.rmtree(labelled.folder / "eval_cache")
    torch.set_num_threads(2)
    assert not evaluate(labelled, runs, *names, force=True)
    made = processes()[len(alone):]
    pids = {r.name: {pid for name, pid, _ in made if name == r.name} for r in runs}
    assert os.getpid() not in set.union(*pids.values()) and pids["side0"] == pids["side2"] != pids["side1"] and len(pids["side1"]) == 1
    assert made[0][2] == ev.KEPT // 2
    assert capsys.readouterr().out.count("activations and probes that all runs share") == 6                     # three evaluations, once each
    for (name, evaluation), want in alone.items():
        ours = read_json(Path("runs") / name / "eval" / f"{evaluation}.json")
        for key in ("metrics", "guards", "eval_result_details"):
            same(ours[key], want[key], f"{name} {evaluation} {key}", rtol=1e-6, atol=1e-9)


@forks
@pytest.mark.parametrize("threads, n, others", [(2, 1, 0), (1, 2, 0), (4, 2, 2), (5, 2, 0), (2, 3, 2)])
def test_there_are_as_many_processes_as_threads_or_runs_if_these_are_half_as_many_at_least(world, processes, threads, n, others):
    torch.set_num_threads(threads)
    assert not evaluate(world, [make_run(f"count{i}", random_sae(world, 60 + i)) for i in range(n)], "absorption", force=True)
    assert len({pid for _, pid, _ in processes()} - {os.getpid()}) == others


@forks
def test_which_one_failed_is_told_once_and_the_others_go_on(world, processes, monkeypatch, capfd):
    runs = [make_run(f"aside{i}", random_sae(world, 30 + i)) for i in range(3)]
    monkeypatch.setattr(runs[1].sae, "activate", lambda pre: throw(ValueError("no latents today")), raising=False)
    assert evaluate(world, runs, "saebench_core", "absorption").keys() == {(runs[1].folder, "saebench_core"), (runs[1].folder, "absorption")}
    said = capfd.readouterr()
    assert said.err.count("aside1: saebench_core failed: ValueError: no latents today") == said.err.count("aside1: absorption failed") == 1
    assert all(result(r, n) for r in (runs[0], runs[2]) for n in ("saebench_core", "absorption"))


@forks
def test_what_makes_no_sense_for_the_model_is_found_once_for_all_processes(world, processes, monkeypatch, tmp_path, capsys):
    def unfit(*_):
        with open(tmp_path / "asked", "a") as f:
            f.write("once ")
        raise ev.Unfit("no letters")
    monkeypatch.setitem(ev.BENCH, "absorption", ev.BENCH["absorption"]._replace(evaluate=unfit))
    assert not evaluate(world, [make_run(f"unfit{i}", random_sae(world, 50 + i)) for i in range(3)], "absorption")
    assert (tmp_path / "asked").read_text() == "once " and capsys.readouterr().out.count("absorption left out: no letters") == 1


@forks
@pytest.mark.parametrize("end, told", [(lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed"),
                                       (lambda: throw(OSError(errno.ENOSPC, "No space left")), "No space"), (lambda: throw(KeyboardInterrupt), None)])
def test_what_ends_one_process_ends_all_and_the_next_call_goes_on(world, processes, monkeypatch, end, told):
    runs, real = [make_run(f"ended{i}", random_sae(world, 40 + i)) for i in range(4)], ev.core_result
    with monkeypatch.context() as patch, pytest.raises((ev.Refuse, OSError, KeyboardInterrupt), match=told):
        patch.setattr(ev, "core_result", lambda bench, run, *rest: end() if run is runs[3] else real(bench, run, *rest))
        evaluate(world, runs, "saebench_core", force=True)
    assert not multiprocessing.active_children()
    assert not evaluate(world, runs, "saebench_core") and all(result(r, "saebench_core") for r in runs)


@forks
def test_they_end_with_the_process_that_started_them(tmp_path):
    code = ("import importlib, os, pathlib, time, types; ev = importlib.import_module('03_eval')\n"
            "def sleep(*_): pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)\n"
            "ev.saebench_results = sleep\n"
            "list(ev.in_processes(types.SimpleNamespace(room=1), [{}], {}))")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(ev.__file__).parent)})
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = (tmp_path / "pid").read_text()
    parent.kill()
    parent.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def throw(e):
    raise e


def wait_for(what, seconds=60):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_short_memory_is_met_with_smaller_batches(world, monkeypatch):
    run = make_run("memory", random_sae(world, 9))
    real, shares = ev.CoreShared.splice, []

    def splice(shared, *args):
        shares.append(shared.bench.share)
        if shared.at_once > 10:
            raise torch.OutOfMemoryError("a GPU says so")
        return real(shared, *args)
    evaluate(world, [run], "saebench_core")
    roomy = result(run, "saebench_core")["eval_result_metrics"]
    monkeypatch.setattr(ev.CoreShared, "splice", splice)
    assert not evaluate(world, [run], "saebench_core", force=True)
    assert shares[0] == 1 and shares[-1] < 1
    same(result(run, "saebench_core")["eval_result_metrics"], roomy)


def test_controls_are_evaluated_as_runs_are_and_the_mean_that_has_no_latents_is_not(world):
    run = make_run("beside", random_sae(world, 6))
    made = ev.controls(world, [run], CPU)
    assert not evaluate(world, [run, *made], "saebench_core", "autointerp")
    there = {c.name for c in made if (c.folder / "eval" / "saebench_core.json").exists()}
    assert there == {"untrained", "random", "pca"} and not list(Path("runs").glob("controls-*/*/eval/autointerp.json"))
    pca = result(next(c for c in made if c.name == "pca"), "saebench_core")
    assert pca["control"] and 0 < pca["metrics"]["explained_variance_about_mean"] < 1
    assert "control: pca" in ev.saebench_table([run, *made], world)


@pytest.mark.parametrize("what", ["another run", "another layer", "another width", "another model", "empty", "old", "nan", "a field missing"])
def test_a_result_that_is_not_sound_is_refused(world, monkeypatch, what):
    run = make_run("unsound", random_sae(world, 8))
    real = ev.core_result

    def spoilt(*args):
        made, more = real(*args)
        made |= {"another run": {"sae_lens_release_id": "other"}, "another layer": {"sae_cfg_dict": {**made["sae_cfg_dict"], "hook_layer": 2}},
                 "another width": {"sae_cfg_dict": {**made["sae_cfg_dict"], "d_sae": 201}},
                 "another model": {"sae_cfg_dict": {**made["sae_cfg_dict"], "model_name": "toy"}},
                 "empty": {"eval_result_details": []}, "old": {"datetime_epoch_millis": 1}, "nan": {"eval_result_unstructured": {"x": float("nan")}},
                 "a field missing": {"eval_result_metrics": {}}}[what]
        return made, more
    monkeypatch.setattr(ev, "core_result", spoilt)
    failures = evaluate(world, [run], "saebench_core", force=True)
    assert (run.folder, "saebench_core") in failures and not (run.folder / "eval" / "saebench_core.json").exists()


def test_our_own_evaluations_import_no_sae_bench():
    late = "import importlib, sys; importlib.import_module('03_eval'); print(sorted({'sae_bench', 'sae_lens', 'transformer_lens'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", late], cwd=Path(ev.__file__).parent, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_what_does_not_fit_is_said_and_left_out(world, capsys):
    acts = Acts("acts/toy")
    for key, value, reason in (("source", "synthetic", "no language model"), ("hook", "mlp_out", "residual stream")):
        acts.meta = {**world.meta, key: value}
        assert not evaluate(acts, [make_run("unfit", random_sae(world))], "absorption")
        assert reason in capsys.readouterr().out


# ---- labelled text: sparse probing, SCR, TPP, unlearning --------------------------------------------------------------------------------

MARKS = {"transformers": "p", "sympy": "q", "stdlib": "r"}                     # the letter that words of this package alone start with


@functools.cache
def said(first, n, seed):
    """n texts that the toy model says in words of the letters `first`, with as many words as fill a context."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained("model"), transformers.AutoModelForCausalLM.from_pretrained("model").eval()
    allowed = torch.tensor([w[0] in first and len(w) == 2 for w in WORDS])
    tokens, g = torch.ones(n, 1, dtype=torch.long), generator("said", seed)
    with torch.no_grad():
        for _ in range(CTX):
            p = model(tokens).logits[:, -1].masked_fill(~allowed, -torch.inf).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=g)], 1)
    return [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in tokens[:, 1:].tolist()]


@pytest.fixture(scope="module")
def labelled(world):
    """A corpus on the toy model: three packages have words of their own, and half of their passages say >>> and words with z where the others
    say words with y; two more have long documents in different letters. Fewer texts than the embedded model's."""
    before = dict(ev.EMBEDDED)
    ev.EMBEDDED.update(FEWER)
    yield make_corpus(world)
    ev.EMBEDDED.update(before)


FEWER = dict(train=80, test=40, ctx=32)


def make_corpus(world):
    g, words = random.Random(0), {c: [w for w in PLAIN if w[0] == c and len(w) == 2] for c in string.ascii_lowercase}
    common = [w for c in "abcdefghijklm" for w in words[c]]
    records = []
    for package, mark in MARKS.items():
        for i in range(240):
            kinds = [words[mark]] * 2 + [words["zy"[i % 2 == 0]]] * 4 + [common] * 4
            text = " ".join([">>>"] * (i % 2) + [g.choice(g.choice(kinds)) for _ in range(75)])
            records.append(dict(text=text, package=package, module=f"{package}.{i}", kind="doc"))
    for package, letters, n in (("topic", "nopq", 400), ("rest", "abcd", 170)):
        records += [dict(text=text + " : " * 300, package=package, module=f"{package}.{i}", kind="doc") for i, text in enumerate(said(letters, n, package))]
    Path("corpus").mkdir()
    Path("corpus/train.jsonl").write_text("\n".join(map(json.dumps, records)))
    folder, toy = Path("acts/labelled"), Path("acts/toy")
    folder.mkdir()
    (folder / "val.safetensors").write_bytes((toy / "val.safetensors").read_bytes())
    rows = world.shard(0)["acts"]
    tokens = world.val()["tokens"][world.val()["mask"]]
    checked = write_tensors(folder / "train_00000.safetensors", {"acts": rows, "tokens": tokens})
    meta = {k: v for k, v in read_json(toy / "meta.json").items() if k != "checksum"}
    meta["shards"][0]["checksum"] = checked
    write_json(folder / "meta.json", {**meta, "data": {"name": "corpus"}, "mean_norm": rows.norm(dim=-1).mean().item()})
    return Acts(folder)


def alphabet_sae(world, order=string.ascii_lowercase, b_dec=0.0):
    """One latent for each letter, which fires on words that start with it and then takes the whole letter out."""
    W = axes()[0][[string.ascii_lowercase.index(c) for c in order]]
    return relu_sae(world, W.T / 0.6, W, torch.tensor(-0.4 / 0.6), b_dec)


def test_labelled_text_keeps_modules_apart_and_classes_balanced(labelled):
    folder, index = ev.corpus_tasks(labelled)
    assert index["package"] == {"classes": ["stdlib", "sympy", "transformers"], "groups": ["doctest", "plain"]}
    assert index["kind"]["classes"] == [] and index["forget"] == "topic"     # a corpus without code has no kinds of line
    assert ["transformers", "sympy"] in index["pairs"]
    rows = {split: [json.loads(line) for line in (folder / "package" / f"{split}.jsonl").read_text().splitlines()] for split in ("train", "test")}
    assert not {r["text"] for r in rows["train"]} & {r["text"] for r in rows["test"]}
    assert all((r["group"] == "doctest") == (">>>" in r["text"]) for r in rows["train"])
    assert {r["label"] for r in rows["test"]} == set(MARKS)


def test_source_is_sorted_into_code_comments_and_docstrings():
    found = ev.kinds_of_line('def f():\n    """One\n    two."""\n    # why\n    return 1\n\nx = """a"""\n')
    assert found == {"code": ["def f():", "    return 1"], "comment": ["    # why"], "docstring": ['    """One', '    two."""', 'x = """a"""']}
    rows = ev.label_corpus([dict(text="for name in names_of_all:\n" * 20, package="numpy", module="numpy.a", kind="code")])
    assert rows["statement"] == [{**rows["statement"][0], "text": "name in names_of_all:", "label": "for", "group": "science"}]


def test_latents_that_are_class_indicators_are_found_by_top_1_probing(labelled):
    planted, other = make_run("planted", alphabet_sae(labelled)), make_run("random", random_sae(labelled))
    assert not evaluate(labelled, [planted, other], "sparse_probing")
    m = {run.name: result(run, "sparse_probing")["metrics"] for run in (planted, other)}
    assert m["planted"]["sae_top_1_test_accuracy"] > 0.93 and m["planted"]["sae_top_5_test_accuracy"] > 0.95
    assert m["random"]["sae_top_1_test_accuracy"] < 0.9 and m["planted"]["llm_test_accuracy"] == m["random"]["llm_test_accuracy"] > 0.95
    assert not torch.is_grad_enabled() ^ True


def test_permuting_the_decoder_leaves_probing_as_it_is(labelled):
    sae = alphabet_sae(labelled)
    runs = [make_run("straight", sae), make_run("permuted", alphabet_sae(labelled))]
    with torch.no_grad():
        runs[1].sae.W_dec.copy_(sae.W_dec.roll(1, 0))
    evaluate(labelled, runs, "sparse_probing")
    straight, permuted = (result(run, "sparse_probing") for run in runs)
    for key in ("eval_result_metrics", "eval_result_details", "eval_result_unstructured"):
        assert straight[key] == permuted[key]


def test_small_fits_have_one_thread_and_others_as_many_as_before(labelled):
    import threadpoolctl
    bench = ev.Bench(labelled, CPU)
    threads = lambda: {lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"}
    with threadpoolctl.threadpool_limits(2, "blas"):
        with bench.seams(1):
            inside = threads()
        assert inside == {1} and threads() == {2}


def test_what_a_ctrl_c_became_is_no_runs_fault(labelled, monkeypatch):
    run, failures = make_run("interrupted", alphabet_sae(labelled)), {}
    monkeypatch.setattr(ev.interrupt, "came", True)
    with pytest.raises(ValueError), ev.blamed(run, failures, "tpp"):
        raise ValueError("could not determine the shape of object type")
    assert not failures


def test_a_dead_sae_is_void_in_probing_and_its_reason_told(labelled):
    run = make_run("dead", relu_sae(labelled, axes()[0].T, axes()[0], torch.tensor(-1e6)))
    evaluate(labelled, [run], "sparse_probing")
    assert [g["id"] for g in result(run, "sparse_probing")["guards"]] == ["G12"]


def count_rows(monkeypatch):
    """-> list of how many rows each call to encode one of BenchSAE's SAEs had."""
    rows = []
    for name in ("encode", "codes"):
        real = getattr(ev.BenchSAE, name)
        monkeypatch.setattr(ev.BenchSAE, name, lambda sae, x, real=real: (rows.append(x.numel() // x.shape[-1]), real(sae, x))[1])
    return rows


def sparse_sae(world, seed):
    sae = SAE(D, 100, seed, d_sae=400, activation="topk", l0=8.0)
    sae.scale.fill_(world.scale)
    return sae


def test_core_encodes_a_context_once(world, monkeypatch):
    evaluate(world, [make_run("first", sparse_sae(world, 1))], "saebench_core")
    rows, run = count_rows(monkeypatch), make_run("second", sparse_sae(world, 2))
    assert not evaluate(world, [run], "saebench_core")
    store = result(run, "saebench_core")["eval_config"]
    assert sum(rows) == store["n_eval_reconstruction_batches"] * store["batch_size_prompts"] * store["context_size"]


def test_a_call_on_another_sae_runs_no_layer_on_clean_contexts_again(world, monkeypatch):
    evaluate(world, [make_run("fills-core", sparse_sae(world, 3))], "saebench_core")
    calls, behind = [], ev.Bench.behind
    monkeypatch.setattr(ev.Bench, "behind", lambda bench, x: calls.append(len(x)) or behind(bench, x))
    monkeypatch.delattr(ev.Bench, "at_hook")
    monkeypatch.delattr(ev.CoreShared, "predictions")
    run = make_run("finds-core", sparse_sae(world, 4))
    assert not evaluate(world, [run], "saebench_core")
    store = result(run, "saebench_core")["eval_config"]
    assert sum(calls) == store["n_eval_reconstruction_batches"] * store["batch_size_prompts"]         # the spliced ones


def test_probing_scr_and_tpp_encode_a_text_once_together(labelled, monkeypatch):
    names = ("sparse_probing", "scr", "tpp")
    evaluate(labelled, [make_run("fills", sparse_sae(labelled, 1))], *names)
    rows, lengths, read = count_rows(monkeypatch), {}, ev.Texts.read

    def noting(texts, *args):
        file = read(texts, *args)
        lengths.update(zip(file.keys, file.length.tolist()))
        return file

    monkeypatch.setattr(ev.Texts, "read", noting)
    assert not evaluate(labelled, [make_run("counts", sparse_sae(labelled, 2))], *names)
    each = len(names) + len(ev.corpus_tasks(labelled))                         # a row of zeros now and then
    assert sum(lengths.values()) <= sum(rows) <= sum(lengths.values()) + each


def test_a_figure_that_saebench_writes_as_minus_one_is_no_result(labelled, monkeypatch):
    run = make_run("minus-one", alphabet_sae(labelled))
    few = {**ev.BENCH["sparse_probing"].settings(labelled)["config"], "lower_vram_usage": True}       # where it leaves out a probe, and writes -1
    with_settings(monkeypatch, labelled, "sparse_probing", config=few)
    failures = evaluate(labelled, [run], "sparse_probing", force=True)
    assert failures == {(run.folder, "sparse_probing"): "SAEBench gives no figure for sae_test_accuracy"}
    assert not (run.folder / "eval" / "sparse_probing.json").exists()


def plain_call(labelled, bench, run, name, folder):
    """SAEBench's run_eval on an empty folder of artifacts, with an SAE of few latents first, and its own ablation."""
    settings = {"sae_bench": "", **ev.BENCH[name].settings(labelled)}
    main = importlib.import_module("sae_bench.evals." + ("sparse_probing" if name == "sparse_probing" else "scr_and_tpp") + ".main")
    fixed, counts = ({}, "k_values") if name == "sparse_probing" else ({"perform_scr": name == "scr"}, "n_values")
    first, second = ev.BenchSAE(bench, ev.few_latents(bench, CPU)), ev.BenchSAE(bench, run)
    config = ev.labelled_config(bench, settings, "SparseProbingEvalConfig" if name == "sparse_probing" else "ScrAndTppEvalConfig", fixed, counts, first)
    found = {}
    with ev.labelled_tasks(bench, settings) as data, bench.seams(ev.SEED, data, folder / "log.txt"):
        main.run_eval(config, [("first", first)], "cpu", str(folder / "out"), artifacts_path=str(folder / "artifacts"))
        config = ev.labelled_config(bench, settings, type(config).__name__, fixed, counts, second)
        found = main.run_eval(config, [("second", second)], "cpu", str(folder / "out"), artifacts_path=str(folder / "artifacts"))
    return json.loads(json.dumps(found["second_custom_sae"]))


@pytest.mark.parametrize("name", ["sparse_probing", "scr", "tpp"])
def test_probing_scr_and_tpp_are_saebenchs_own_field_by_field(labelled, name, tmp_path):
    run, bench = make_run(f"parity-{name}", alphabet_sae(labelled, b_dec=0.05)), ev.Bench(labelled, CPU)
    assert not evaluate(labelled, [make_run("before", random_sae(labelled, 4)), run], name)      # the order of runs has no influence
    ours, theirs = result(run, name), plain_call(labelled, bench, run, name, tmp_path)
    for key in ("eval_config", "eval_result_metrics", "eval_result_details", "eval_result_unstructured", "sae_cfg_dict", "eval_type_id"):
        same(ours[key], theirs[key], key, atol=1e-6)


@pytest.mark.parametrize("kept", [ev.KEPT, 0])                                # bytes of texts and codes in memory
def test_a_text_that_is_encoded_once_gives_saebenchs_means_effects_and_ablations(labelled, tmp_path, monkeypatch, kept):
    from sae_bench.evals.scr_and_tpp import main as scr
    from sae_bench.evals.sparse_probing.probe_training import Probe
    from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations
    monkeypatch.setattr(ev, "KEPT", kept)
    bench, path = ev.Bench(labelled, CPU), str(tmp_path / "activations.pt")
    x = labelled.shard(0)["acts"][:160].view(8, 20, D).clone()
    x[:, 0] = 0                                                               # masked positions
    x[2, 9:] = 0
    x[7] = x[1]                                                               # one text in two classes
    real = {"a": x[:4], "b": x[4:]}
    torch.save({"train": real, "test": dict(real), "llm_results": {}}, path)
    skip = ev.load_run.__globals__["load_variant"]("skip")(D, 100, 0, d_sae=64)
    with torch.no_grad():
        skip.skip_raw.fill_(0.5)
    for i, sae in enumerate((alphabet_sae(labelled, b_dec=0.1), random_sae(labelled), skip)):
        run, which = make_run(f"any{i}", sae), torch.arange(sae.d_sae) % 5 == 0
        plain, seen, slow = ev.BenchSAE(bench, run), ev.BenchSAE(bench, run), scr.ablated_precomputed_activations
        probe = Probe(D, torch.float32)
        effects = lambda sae, texts: scr.get_effects_per_class_precomputed_acts(sae, probe, "a", texts, False, 3)
        with bench.texts.seen_by(run, seen):
            numbers = torch.load(path)["test"]
            assert numbers["a"].shape == (4, 1, 1) and numbers["b"][3] == numbers["a"][1]
            for name in real:
                assert torch.allclose(get_sae_meaned_activations(numbers, seen, 3)[name], get_sae_meaned_activations(real, plain, 3)[name], atol=1e-5)
                assert torch.allclose(scr.ablated_precomputed_activations(numbers[name], seen, which, 3), slow(real[name], plain, which, 3), atol=1e-5)
            assert torch.allclose(effects(seen, numbers), effects(plain, real), atol=1e-5)


def test_probes_are_trained_to_saebenchs_bits_and_draw_the_same_numbers():
    from sae_bench.evals.sparse_probing import probe_training as probing
    g = generator("probes")
    for n, dim in ((400, 300), (130, 20)):
        x, y = torch.rand(n, dim, generator=g).round(decimals=1), torch.randint(2, (n,), generator=g, dtype=torch.int32)
        test_x, test_y = torch.rand(50, dim, generator=g), torch.randint(2, (50,), generator=g, dtype=torch.int32)
        settings = dict(dim=dim, batch_size=250, epochs=30, lr=1e-2, verbose=False, early_stopping_patience=10, l1_penalty=None)
        made = []
        for train in (ev.train_probe, probing.train_probe_gpu):
            seed_all(3)
            made.append((*train(x, y, test_x, test_y, **settings), torch.rand(1)))
        (ours, accuracy, after), (theirs, their_accuracy, their_after) = made
        assert torch.equal(ours.net.weight, theirs.net.weight) and torch.equal(ours.net.bias, theirs.net.bias)
        assert accuracy == their_accuracy and after == their_after


def test_sparse_probes_of_letters_are_trained_to_saebenchs_bits_and_draw_the_same_numbers():
    from sae_bench.evals.absorption.k_sparse_probing import train_sparse_multi_probe
    g, made = generator("letters"), []
    x, encoder = torch.rand(130, D, generator=g).round(decimals=1), torch.randn(D, 300, generator=g)
    y, encode = torch.nn.functional.one_hot(torch.randint(26, (130,), generator=g), 26), lambda x: (x @ encoder).relu()
    for rows, dim, map_acts in ((encode(x), 300, None), (x, 300, encode)):
        for train in (lambda: ev.train_sparse_probes(rows, y, dim, 0.01, 61, 30, map_acts or (lambda acts: acts)),
                      lambda: train_sparse_multi_probe(rows, y, CPU, l1_decay=0.01, batch_size=61, num_epochs=30, show_progress=False, map_acts=map_acts, probe_dim=dim)):
            seed_all(3)
            made.append((train(), torch.rand(1)))
    for (ours, after), (theirs, their_after) in zip(made[::2], made[1::2]):
        assert torch.equal(ours.weights, theirs.weights) and torch.equal(ours.biases, theirs.biases) and after == their_after


def planted_text(config, g):
    """{class or pair of classes: activations [texts, tokens, D]} in which letters stand for classes; of SCR, z and y for the misleading group,
    which is said twice as often as the class."""
    letters = axes()[0]

    def texts(*said):
        x = 0.02 * torch.randn(len(said), 12, D, generator=g)
        for i, word in enumerate(said):
            for c in word:
                x[i, torch.rand(12, generator=g) < (0.8 if c in "yz" else 0.4)] += letters[ord(c) - 97]
        return x

    n = config.train_set_size // 2
    if not config.perform_scr:
        return {package: texts(*[mark] * n) for package, mark in MARKS.items()}
    return {"male / female": texts(*["pz", "qz"] * (n // 2)), "female_data_only": texts(*["py", "qy"] * (n // 2)),
            "professor / nurse": texts(*["pz", "py"] * (n // 2)), "nurse_data_only": texts(*["qz", "qy"] * (n // 2)),
            "male_professor / female_nurse": texts(*["pz"] * n), "female_nurse_data_only": texts(*["qy"] * n)}


def test_ablating_planted_latents_removes_the_bias_and_one_class_alone(labelled, monkeypatch):
    from sae_bench.evals.scr_and_tpp import main
    g = generator("planted")
    monkeypatch.setattr(main, "get_dataset_activations", lambda name, config, *_: (planted_text(config, g), planted_text(config, g)))
    monkeypatch.setattr(ev, "VERSION", 98)                                    # not the shared work of the other tests
    planted, other = make_run("planted", alphabet_sae(labelled)), make_run("random", random_sae(labelled))
    assert not evaluate(labelled, [planted, other], "scr", "tpp")
    scr, tpp = ({run.name: result(run, name)["metrics"] for run in (planted, other)} for name in ("scr", "tpp"))
    assert scr["planted"]["scr_metric_threshold_2"] > 0.5 and scr["random"]["scr_metric_threshold_2"] < 0.1
    assert tpp["planted"]["tpp_threshold_2_intended_diff_only"] > 0.3 > 0.05 > tpp["planted"]["tpp_threshold_2_unintended_diff_only"]
    assert tpp["random"]["tpp_threshold_2_total_metric"] < 0.1
    assert result(planted, "scr")["eval_config"]["n_values"] == [2, 5, 10, 20] and "G33" in {g["id"] for g in result(planted, "scr")["guards"]}


def test_clamping_planted_latents_costs_the_topic_and_not_the_rest(labelled):
    planted, without = make_run("planted", alphabet_sae(labelled)), make_run("without", alphabet_sae(labelled, "abcdefghijklm"))
    assert not evaluate(labelled, [planted, without], "unlearning")
    m, tried = result(planted, "unlearning")["metrics"], result(planted, "unlearning")["eval_result_details"]
    assert m["unlearning_score"] > 0.3
    strongest = max(tried, key=lambda t: t["multiplier"])
    assert strongest["forget_loss"] > m["forget_clean_loss"] + 0.1 and strongest["retain_loss"] == pytest.approx(m["retain_clean_loss"], abs=1e-5)
    void = result(without, "unlearning")
    assert void["metrics"]["unlearning_score"] == 0 and any("nothing was clamped" in g["message"] for g in void["guards"])


def test_unlearnings_rates_and_losses_are_those_of_saebenchs_hooks(labelled):
    from sae_bench.evals.unlearning.utils import metrics
    from sae_bench.sae_bench_utils.activation_collection import get_feature_activation_sparsity
    bench, settings = ev.Bench(labelled, CPU), ev.BENCH["unlearning"].settings(labelled)
    texts, sae = ev.ForgetRetain(bench, settings), ev.BenchSAE(bench, make_run("any", random_sae(labelled)))
    tokens = texts.kept["forget_select_tokens"]
    want = get_feature_activation_sparsity(tokens, bench.model, sae, 16, LAYER, bench.hook_name, True)
    assert texts.rates(sae, "forget") == pytest.approx(want.numpy(), abs=1e-6)
    one = next(t for t in texts.clamp(sae, {**settings["config"], "retain_thresholds": [0.5]}) if t["n_features"] == 20)
    metrics.modify_model(bench.model, sae, intervention_method="clamp_feature_activation", features_to_ablate=one["latents"], multiplier=float(one["multiplier"]))
    with torch.no_grad():
        want = bench.model(texts.kept["retain_score_tokens"], return_type="loss", prepend_bos=False).item()
    bench.model.reset_hooks()
    assert one["retain_loss"] == pytest.approx(want, rel=1e-5) and want > texts.losses["retain"]["clean_loss"]


def test_short_memory_in_probing_is_met_with_smaller_batches(labelled, monkeypatch):
    run = make_run("little_memory", alphabet_sae(labelled))
    assert not evaluate(labelled, [run], "sparse_probing")
    roomy, real, rows = result(run, "sparse_probing")["eval_result_metrics"], ev.BenchSAE.codes, []

    def codes(sae, x):
        rows.append(len(x))
        if rows[-1] > 1000:
            raise torch.OutOfMemoryError("a GPU says so")
        return real(sae, x)
    monkeypatch.setattr(ev.BenchSAE, "codes", codes)
    assert not evaluate(labelled, [run], "sparse_probing", force=True)
    assert rows[0] > 1000 >= rows[-1]
    same(result(run, "sparse_probing")["eval_result_metrics"], roomy)


def test_an_evaluation_that_fails_is_told_and_the_others_go_on(labelled, monkeypatch, capsys):
    from sae_bench.evals.sparse_probing import main
    run = make_run("half", alphabet_sae(labelled))
    monkeypatch.setattr(main, "run_eval_single_sae", lambda *args, **kwargs: 1 / 0)
    failures = evaluate(labelled, [run], "sparse_probing", "tpp", force=True)
    assert list(failures) == [(run.folder, "sparse_probing")] and "ZeroDivisionError" in failures[run.folder, "sparse_probing"]
    assert (run.folder / "eval" / "tpp.json").exists() and not (run.folder / "eval" / "sparse_probing.json").exists()
    assert "half: sparse_probing failed: ZeroDivisionError" in capsys.readouterr().err


def test_text_without_labels_leaves_these_evaluations_out(world, capsys, monkeypatch):
    monkeypatch.setattr(ev, "on_disk_or_hub", lambda names: {})
    Path("plain").mkdir()
    Path("plain/train.jsonl").write_text(json.dumps({"text": "aa bb"}))
    acts = Acts("acts/toy")
    acts.meta["data"] = {"name": "plain"}
    assert not evaluate(acts, [make_run("any", random_sae(world))], "sparse_probing", "unlearning")
    out = capsys.readouterr().out
    assert "sparse_probing left out: no labelled data" in out and "unlearning left out: no text to forget" in out


def test_saebenchs_own_data_sets_are_those_we_name():
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    assert list(ev.HUB_TASKS["sparse_probing"]) == SparseProbingEvalConfig().dataset_names
    assert list(ev.HUB_TASKS["scr"]) == list(ev.HUB_TASKS["tpp"]) == ScrAndTppEvalConfig().dataset_names


def test_data_sets_in_the_labelled_folder_are_used_and_their_content_is_the_key(world, bench, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from sae_bench.sae_bench_utils import dataset_utils
    folder = Path("labelled/fancyzhx/ag_news")
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {i}", "label": i % 4}) + "\n" for i in range(40)))
    acts = Acts("acts/toy")
    acts.meta["data"] = {"name": "of/the/hub"}
    settings = ev.BENCH["sparse_probing"].settings(acts)
    assert settings["tasks"] == ["fancyzhx/ag_news"] and settings["config"] == {"k_values": [1, 2, 5, 20]}      # sizes are SAEBench's own
    with ev.labelled_tasks(bench, settings) as data, bench.seams(ev.SEED, data):
        train, test = dataset_utils.get_multi_label_train_test_data("fancyzhx/ag_news", 16, 8, 42)
    assert sorted(train) == ["0", "1", "2", "3"] and len(train["0"]) == 8 and all(text.startswith("test") for text in test["3"])
    with open(folder / "test.jsonl", "a") as f:
        f.write(json.dumps({"text": "more", "label": 0}) + "\n")
    assert ev.BENCH["sparse_probing"].settings(acts)["data"] != settings["data"]


SUBJECTS = ["wmdp-bio", "high_school_us_history"]


@pytest.fixture
def exam(world, monkeypatch):
    """SAEBench's data in its layout: a forget corpus, text to retain, and questions; of a model of random weights every answer counts as known
    that it gives right in a quarter of the orders. The model goes by the name of one that SAEBench has prompts for."""
    from sae_bench.evals.unlearning.utils import metrics
    g = random.Random(1)
    text = lambda letters: " ".join(g.choice([w for w in OWN if w[0] in letters]) for _ in range(60))
    ask = lambda: {"question": text("abc")[:30], "choices": [g.choice(OWN) for _ in range(4)], "answer": g.randrange(4)}
    for path, rows in (("cais/wmdp-corpora/bio-forget-corpus.jsonl", [{"text": text("nopq")} for _ in range(40)]),
                       ("wikitext/wikitext-2-raw-v1/test.jsonl", [{"text": text("abcd")} for _ in range(40)]),
                       ("cais/wmdp/wmdp-bio/test.jsonl", [ask() for _ in range(8)]),
                       (f"cais/mmlu/{SUBJECTS[1]}/test.jsonl", [ask() for _ in range(8)])):
        (ev.LABELLED / path).parent.mkdir(parents=True, exist_ok=True)
        (ev.LABELLED / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(metrics, "_find_all_permutation_correct_ans", lambda found: numpy.where(found["is_correct"].reshape(-1, 24).sum(1) >= 6)[0])
    acts = Acts("acts/toy")
    acts.meta = {**acts.meta, "model": {**acts.meta["model"], "name": "toy-gemma-it"}}
    settings = ev.unlearning_settings(acts)
    few = {"dataset_names": SUBJECTS, "dataset_size": 30, "seq_len": CTX, "multipliers": [1, 5], "n_features_list": [2, 5], "retain_thresholds": [0.1]}
    monkeypatch.setitem(ev.BENCH, "unlearning", ev.BENCH["unlearning"]._replace(settings=lambda acts: {**settings, "config": {**few, "llm_batch_size": 4}}))
    yield acts
    shutil.rmtree(ev.LABELLED / "cais")


def test_saebenchs_questions_are_asked_where_they_are_and_scored_as_by_itself(exam, tmp_path, capsys):
    from sae_bench.evals.unlearning import eval_config, main
    run = make_run("examined", alphabet_sae(exam))
    assert not evaluate(exam, [run], "unlearning")
    bench, ours, settings = ev.Bench(exam, CPU), result(run, "unlearning"), ev.BENCH["unlearning"].settings(exam)
    data = {name: (ev.LABELLED / name).resolve() for name in ev.QUESTIONS}
    place = tmp_path / "sae_bench" / "evals" / "unlearning" / "data"
    place.mkdir(parents=True)
    (place / "bio-forget-corpus.jsonl").symlink_to(ev.FORGET.resolve())
    config = eval_config.UnlearningEvalConfig(model_name=bench.name, llm_dtype="float32", **settings["config"])
    with contextlib.chdir(tmp_path), ev.replaced(bench.model.cfg, "model_name", "gemma-2-2b-it"), bench.seams(ev.SEED, data):
        theirs = ev.only(main.run_eval(config, [(bench.label(run), ev.BenchSAE(bench, run))], "cpu", "out"), bench, run)
        table = main.get_metrics_df(f"artifacts/unlearning/{bench.name}/{bench.label(run)}_custom_sae/results/metrics")
    for key in ("eval_config", "eval_result_metrics", "sae_cfg_dict", "eval_type_id"):
        same(ours[key], theirs[key], key)
    key = lambda row: (row["multiplier"], row["n_features"])
    details = [{k: v for k, v in row.items() if k in table} for row in ours["eval_result_details"]]
    same(sorted(details, key=key), sorted(table.to_dict("records"), key=key))
    said = " ".join(g["message"] for g in ours["guards"])
    assert len({key(row) for row in details}) == 4 and "few questions are answered right" in said and "unlearning out of scope" in said


def test_without_the_forget_corpus_the_questions_are_not_asked_and_it_is_said(world, capsys):
    acts = Acts("acts/toy")
    acts.meta = {**world.meta, "data": {"name": "none"}, "model": {**world.meta["model"], "name": "gemma-2-2b-it"}}
    assert not evaluate(acts, [make_run("any", random_sae(world))], "unlearning")
    assert "asked only where labelled/cais/wmdp-corpora/bio-forget-corpus.jsonl is" in capsys.readouterr().out


# ---- what runs only if asked for: RAVEL, autointerp, sae-probes --------------------------------------------------------------------------


def test_what_was_not_asked_for_is_not_run():
    said = subprocess.run([sys.executable, "03_eval.py", "--help"], cwd=Path(ev.__file__).parent, capture_output=True, text=True, check=True).stdout
    assert "only if named: ravel, autointerp, sae_probes" in " ".join(said.split())


def test_sae_probes_is_saebenchs_own_field_by_field(world, bench, tmp_path, monkeypatch):
    from sae_bench.evals.sparse_probing_sae_probes import SparseProbingSaeProbesEvalConfig, main
    names = ["119_us_state_TX", "87_glue_cola"]
    with_settings(monkeypatch, world, "sae_probes", datasets=names)
    run = make_run("probed", random_sae(world))
    assert not evaluate(world, [run], "sae_probes")
    with contextlib.chdir(tmp_path), bench.seams(ev.SEED, log=tmp_path / "log.txt"):
        config = SparseProbingSaeProbesEvalConfig(model_name=bench.name, random_seed=ev.SEED, dataset_names=names)
        theirs = ev.only(main.run_eval(config, [(bench.label(run), ev.BenchSAE(bench, run))], "cpu", "out"), bench, run)
    ours = result(run, "sae_probes")
    for key in ("eval_config", "eval_result_metrics", "eval_result_details", "sae_metrics_by_k", "sae_cfg_dict", "eval_type_id"):
        same(ours[key], theirs[key], key)
    assert {d["dataset_name"] for d in ours["eval_result_details"]} == set(names)


TEMPLATES = {"Country": ["the first letter : %s"], "Language": ["letter the %s has"]}       # attributes of the entity word


@pytest.fixture(scope="module")
def neox(world):
    """acts/neox: a GPT-NeoX of random weights, of the kind that SAEBench's RAVEL knows, and RAVEL's files with what it says itself as the truth."""
    folder, attributes = Path("acts/neox"), {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPTNeoXConfig(vocab_size=len(WORDS), hidden_size=D, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
                                            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2, rotary_pct=0.5)
        model = transformers.GPTNeoXForCausalLM(config).eval()
    model.save_pretrained("neox")
    make_tokenizer("neox")
    write_cache(folder, model, torch.randint(3, len(WORDS), (CONTEXTS, CTX), generator=generator("neox")).int())
    meta = {k: v for k, v in read_json(folder / "meta.json").items() if k != "checksum"}
    write_json(folder / "meta.json", {**meta, "model": {**meta["model"], "name": "neox", "path": "neox"}})
    tokenizer = transformers.AutoTokenizer.from_pretrained("neox")
    for kind, (template,) in TEMPLATES.items():
        prompts = torch.tensor([tokenizer.encode(template % word) for word in OWN[:40]])
        with torch.no_grad():
            for word, i in zip(OWN[:40], model(prompts).logits[:, -1].argmax(-1).tolist()):
                attributes.setdefault(word, {})[kind] = tokenizer.decode([i])
    prompts = ev.LABELLED / ev.RAVEL
    prompts.mkdir(parents=True)
    for part, content in (("attribute_to_prompts", TEMPLATES), ("entity_attributes", attributes), ("entity_to_split", dict.fromkeys(OWN[:40], "train")),
                          ("prompt_to_split", {template: "train" for (template,) in TEMPLATES.values()})):
        (prompts / f"ravel_word_{part}.json").write_text(json.dumps(content))
    return Acts(folder)


def test_ravel_is_saebenchs_own_field_by_field(neox, tmp_path, monkeypatch):
    from sae_bench.evals.ravel import eval_config, main
    words = {"llm_batch_size": 8, "entity_attribute_selection": {"word": list(TEMPLATES)}}
    with_settings(monkeypatch, neox, "ravel", config=words)
    run = make_run("ravel-random", random_sae(neox))
    assert not evaluate(neox, [run], "ravel")
    bench, ours = ev.Bench(neox, CPU), result(run, "ravel")
    (tmp_path / "artifacts" / "ravel").mkdir(parents=True)
    (tmp_path / "artifacts" / "ravel" / "base").symlink_to((ev.LABELLED / ev.RAVEL).resolve())
    config = eval_config.RAVELEvalConfig(model_name="neox", llm_dtype="float32", **words)
    with ev.replaced(main, "LLM_NAME_MAP", {"neox": str(Path("neox").resolve())}), contextlib.chdir(tmp_path), bench.seams(ev.SEED):
        theirs = ev.only(main.run_eval(config, [(bench.label(run), ev.BenchSAE(bench, run))], "cpu", "out"), bench, run)
    for key in ("eval_result_metrics", "eval_result_unstructured", "sae_cfg_dict", "eval_type_id"):
        same(ours[key], theirs[key], key)
    assert set(ours["eval_result_unstructured"]["word_results"]) == {"word_Country", "word_Language"}


def test_ravel_is_left_out_without_prompts_or_without_knowledge(world, neox, monkeypatch, capsys):
    run = make_run("unknown", random_sae(world))
    with_settings(monkeypatch, neox, "ravel", config={"llm_batch_size": 8, "entity_attribute_selection": {"word": list(TEMPLATES)}})
    assert not evaluate(world, [run], "ravel")                                # another model, which says other things
    assert "of word the model knows only" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(ev, "on_disk_or_hub", lambda names: {})
    assert not evaluate(world, [run], "ravel")
    assert "ravel left out: no prompts" in capsys.readouterr().out and not (run.folder / "eval" / "ravel.json").exists()


class Judge(http.server.BaseHTTPRequestHandler):
    """Speaks OpenAI's chat completions: names a latent by the letter that the first word it fires on starts with, and then picks the texts that have it."""
    asked = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][1]["content"]
        self.asked.append((self.path, body["model"], self.headers["Authorization"]))
        if "Here is the explanation" in question:
            letter, texts = re.search(r"fires on (\w)", question)[1], question.split("Here are the examples:")[1]
            said = ", ".join(n for n, text in re.findall(r"(\d+)\. (.*)", texts) if letter in text.lower()) or "None"
        else:
            said = f"activates on {re.search(r'<<(.+?)>>', question)[1].strip()[0].lower()}"
        answer = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    Judge.asked.clear()
    yield Judge.asked
    server.shutdown()
    server.server_close()


def test_autointerp_asks_the_judge_and_is_saebenchs_own(world, bench, judge, tmp_path, monkeypatch):
    from sae_bench.evals.autointerp import eval_config, main
    few = {**ev.BENCH["autointerp"].settings(world)["config"], "n_latents": 12, "dead_latent_threshold": 15, "buffer": 2, "n_top_ex_for_generation": 4}
    with_settings(monkeypatch, world, "autointerp", config=few)
    run, dead = make_run("judged", alphabet_sae(world)), make_run("unjudged", relu_sae(world, axes()[0].T, axes()[0], torch.tensor(-1e6)))
    assert evaluate(world, [dead, run], "autointerp").keys() == {(dead.folder, "autointerp")}
    ours, calls = result(run, "autointerp"), len(judge)
    assert set(judge) == {("/v1/chat/completions", "gpt-4o-mini", "Bearer sk-secret")} and calls == 2 * ours["metrics"]["latents"]
    assert "sk-secret" not in (run.folder / "eval" / "autointerp.json").read_text()
    tokens, config = world.val()["tokens"].long(), eval_config.AutoInterpEvalConfig(model_name=bench.name, llm_dtype="float32", llm_batch_size=32, **few)
    (tmp_path / "autointerp").mkdir()
    torch.save(tokens, tmp_path / "autointerp" / f"{bench.name}_{tokens.numel()}_tokens_{CTX}_ctx.pt")
    with bench.seams(ev.SEED):
        theirs = ev.only(main.run_eval(config, [(bench.label(run), ev.BenchSAE(bench, run))], "cpu", "sk-secret", str(tmp_path / "out"),
                                       artifacts_path=str(tmp_path)), bench, run)
    for latent in [*ours["eval_result_unstructured"].values(), *theirs["eval_result_unstructured"].values()]:
        latent.pop("logs")                                            # a prompt gives random numbers as an example, drawn in threads
    for key in ("eval_config", "eval_result_metrics", "eval_result_unstructured", "sae_cfg_dict", "eval_type_id"):
        same(ours[key], theirs[key], key)
    clear = [r["score"] for r in ours["eval_result_unstructured"].values() if r["explanation"] not in "bcdfghjkmnpq"]     # second letters of words
    assert len(clear) > 2 and sum(clear) / len(clear) > 0.85                  # a latent for a letter, which the judge's rule finds


def test_autointerp_is_left_out_without_a_key_and_a_judge_that_refuses_is_told(world, judge, monkeypatch, capsys):
    run = make_run("refused", alphabet_sae(world))
    with_settings(monkeypatch, world, "autointerp")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert evaluate(world, [run], "autointerp").keys() == {(run.folder, "autointerp")}
    assert "autointerp failed: APIConnectionError" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert not evaluate(world, [run], "autointerp") and "no OPENAI_API_KEY" in capsys.readouterr().out

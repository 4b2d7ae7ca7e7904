"""SAEBench's metrics in 03_eval.py: those of sae_bench's own run_eval, and planted answers found.

The language model is a small Llama of random weights whose word embeddings are planted: a direction
for the first letter, which probes find, and for a third of each letter's words one of their own.
"""
import collections
import contextlib
import functools
import importlib
import itertools
import json
import random
import shutil
import string
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pandas
import pytest
import tokenizers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from sae import (FORMAT, SAE, Acts, checksum, generator, unit, write_json,  # noqa: E402
                 write_tensors)

pytest.importorskip("sae_bench")               # requirements.txt leaves it out on Python 3.13
ev = importlib.import_module("03_eval")
CPU = torch.device("cpu")
D, CTX, CONTEXTS, LAYER = 144, 24, 40, 1
SPECIAL = ["<pad>", "<bos>", "<eos>"]
LETTERS = string.ascii_lowercase
OWN = [f"{c}{d}" for c in LETTERS for d in "bcdf"]        # words with a direction of their own
PLAIN = [f"{c}{d}" for c in LETTERS for d in "ghjkmnpq"] + list(LETTERS.upper())
PLAIN += ["has", "the", "first", "letter"]
WORDS = {w: i for i, w in enumerate(SPECIAL + [":", "?"] + OWN + PLAIN)}
SIZE = dict(vocab_size=len(WORDS), hidden_size=D, num_hidden_layers=3, num_attention_heads=4,
            bos_token_id=1, eos_token_id=2, pad_token_id=0)
OF_LETTER = {c: [w for w in PLAIN if w[0] == c and len(w) == 2] for c in string.ascii_lowercase}


class Tokenizer(transformers.PreTrainedTokenizerFast):
    """Its vocabulary in a fixed order, as sae_bench's results depend on it."""
    @property
    def vocab(self):
        return dict(sorted(super().get_vocab().items()))


def save_tokenizer(folder, bos=True):
    """One token per word; spaces and newlines only separate. bos: BOS comes by itself."""
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="?"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if bos:
        t.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", WORDS["<bos>"])])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "?"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, **special).save_pretrained(folder)


def axes():
    """(directions of the 26 letters [26, D], of the words of OWN [104, D]), all orthonormal."""
    q = torch.linalg.qr(torch.randn(D, D, generator=generator("axes")))[0]
    return q[:26], q[26:26 + len(OWN)]


def save_model(folder):
    letters, own = axes()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **SIZE, intermediate_size=96, max_position_embeddings=128, tie_word_embeddings=False))
        for word, i in WORDS.items():
            row = 0.02 * torch.randn(D)
            if word[0].isalpha():
                row += letters[ord(word[0].lower()) - 97]
            if word in OWN:
                row += 0.8 * own[OWN.index(word)]
            model.model.embed_tokens.weight[i] = row
        model.lm_head.weight.mul_(20)                  # its predictions depend on the stream
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    return model


@torch.no_grad()
def speak(model, n, length, allowed=None, *key):
    """Tokens [n, length] that the model says, of the `allowed` ones [vocabulary]."""
    if allowed is None:
        allowed = torch.arange(len(WORDS)) > 2
    tokens, g = torch.ones(n, 1, dtype=torch.long), generator("speak", *key)
    for _ in range(length - 1):
        p = model(tokens).logits[:, -1].masked_fill(~allowed, -torch.inf).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=g)], 1)
    return tokens


@torch.no_grad()
def save_cache(acts, model, tokens, data="none", name="toy", path="model"):
    """A finished cache in float32, so that its texts are what sae_bench reads to the last bits."""
    mask = tokens > 2
    rows = model(tokens.long(), output_hidden_states=True).hidden_states[LAYER + 1][mask]
    train = {"acts": rows, "tokens": tokens[mask].int()}
    shard = write_tensors(acts / "train_00000.safetensors", train)
    val = write_tensors(acts / "val.safetensors", {"tokens": tokens.int(), "mask": mask})
    centred = rows - rows.mean(0)
    write_json(acts / "meta.json", {
        "format": FORMAT, "complete": True, "d_in": D, "dtype": "float32", "rows": len(rows),
        "ctx": CTX,
        "mean": rows.mean(0).tolist(), "scale": D ** 0.5 / centred.norm(dim=-1).mean().item(),
        "norm_limit": 10 * rows.norm(dim=-1).median().item(),
        "mean_norm": rows.norm(dim=-1).mean().item(),
        "shards": [{"file": "train_00000.safetensors", "rows": len(rows), "bytes": 0,
                    "checksum": shard}],
        "val": {"file": "val.safetensors", "checksum": val, "contexts": len(tokens)},
        "source": "model", "layer": LAYER, "hook": "resid_post", "data": {"name": data},
        "hook_name": f"blocks.{LAYER}.hook_resid_post",
        "model": {"name": name, "path": path, "revision": None, "n_layers": 3}})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """acts/toy and acts/labelled with their model; this module's working folder."""
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        model = save_model(Path("model"))
        tokens = speak(model, CONTEXTS, CTX)
        save_cache(Path("acts/toy"), model, tokens)
        write_corpus(model)
        save_cache(Path("acts/labelled"), model, tokens, data="corpus")
        write_data_sets()
        yield SimpleNamespace(toy=Acts("acts/toy"), model=ev.LanguageModel(Acts("acts/toy"), CPU))


MARKS = {"transformers": "t", "sympy": "s", "stdlib": "l"}


def write_corpus(model):
    """Three packages have words of their own, and half of their passages say >>> and words with z,
    where the others say words with y; two more have long documents in different letters."""
    g, records = random.Random(0), []
    common = [w for c in "abcdefghijklm" for w in OF_LETTER[c]]
    for package, mark in MARKS.items():
        for i in range(240):
            kinds = [OF_LETTER[mark]] * 2 + [OF_LETTER["zy"[i % 2 == 0]]] * 4 + [common] * 4
            text = " ".join([">>>"] * (i % 2) + [g.choice(g.choice(kinds)) for _ in range(75)])
            records.append((text, package, i))
    for package, letters, n in (("topic", "nopq", 400), ("rest", "abcd", 170)):
        allowed = torch.tensor([w[0] in letters and len(w) == 2 for w in WORDS])
        for i, row in enumerate(speak(model, n, CTX + 1, allowed, package)[:, 1:].tolist()):
            text = " ".join(list(WORDS)[t] for t in row) + " : " * 300
            records.append((text, package, i))
    write_lines(Path("corpus/train.jsonl"), [
        {"text": text, "package": package, "module": f"{package}.{i}", "kind": "doc"}
        for text, package, i in records])


def sentence(g, *kinds, n=20):
    return " ".join(g.choice(OF_LETTER[g.choice(kinds)]) for _ in range(n))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data_sets():
    """Two of sae_bench's data sets under labelled/, and a task of our own."""
    g = random.Random(0)
    for split, n in (("train", 45), ("test", 25)):
        bios = []
        for profession, gender, _ in itertools.product((0, 1, 2, 6, 9, 13, 21), (0, 1), range(n)):
            kinds = [string.ascii_lowercase[profession % 13], *2 * "yz"[gender], *"nopqrsuv"]
            text = sentence(g, *kinds, n=g.randrange(8, 30))
            bios.append({"hard_text": text, "profession": profession, "gender": gender})
        write_lines(Path(f"labelled/LabHC/bias_in_bios/{split}.jsonl"), bios)
        news = [{"text": sentence(g, "abcd"[i % 4], *"mnopqrst"), "label": i % 4}
                for i in range(160)]
        write_lines(Path(f"labelled/fancyzhx/ag_news/{split}.jsonl"), news)
        own = [{"text": sentence(g, "ab"[i % 2], *"mn"), "label": "ab"[i % 2]} for i in range(160)]
        write_lines(Path(f"labelled/letters/{split}.jsonl"), own)


# ---- SAEs ----


def make_run(name, sae):
    """A run of hand-made weights, as 03_eval.py holds it."""
    weights = b"".join(v.detach().numpy().tobytes() for v in sae.state_dict().values())
    config = {"variant": name, "settings": sae.settings(), "sae_checksum": checksum(weights)}
    return ev.Run(Path("runs") / name, config, sae.eval())


@torch.no_grad()
def random_sae(acts, seed=0, d_sae=200):
    """Random directions, a tenth of which fire."""
    sae = SAE(D, 100, seed, d_sae=d_sae, activation="topk", l0=min(20.0, d_sae / 2))
    sae.scale.fill_(acts.scale)
    sae.mean.copy_(acts.mean)
    sae.b_enc.normal_(0, 0.1, generator=generator("b_enc", seed))
    sae.b_dec.normal_(0, 0.1, generator=generator("b_dec", seed))
    return sae


@torch.no_grad()
def relu_sae(acts, W_enc, W_dec, b_enc):
    """A ReLU SAE of the given weights, which are those of raw activations."""
    sae = SAE(D, 100, 0, d_sae=len(W_dec), activation="relu", l0=10.0)
    sae.scale.fill_(acts.scale)
    sae.W_enc.copy_(W_enc)
    sae.W_dec.copy_(W_dec)
    sae.b_enc.copy_((b_enc * acts.scale).expand(sae.d_sae))
    return sae


def letter_sae(acts, repaired):
    """A latent for each letter and each word of OWN. Planted absorption: the letter's latent
    is silent on those words, whose own latents carry its direction. Repaired: it fires on them."""
    letters, own = axes()
    of = torch.tensor([ord(w[0]) - 97 for w in OWN])
    parents, children = letters.clone(), 1.4 * own
    if not repaired:
        parents -= 1.5 * torch.zeros_like(letters).index_add_(0, of, own)
    decoders = own if repaired else unit(letters[of] + 0.8 * own)
    b_enc = torch.full((26 + len(OWN),), -0.2)
    b_enc[26:] = -0.5 if repaired else -0.2
    return relu_sae(acts, torch.cat([parents, children]).T, torch.cat([letters, decoders]), b_enc)


def alphabet_sae(acts):
    """A latent for each letter: it fires on words that start with it, and takes the letter out."""
    W = axes()[0]
    return relu_sae(acts, W.T / 0.6, W, torch.tensor(-0.4 / 0.6))


def results(name, acts, model, runs, **settings):
    """What 03_eval.py finds of each run under these settings."""
    write_lines(Path("labelled/settings.json"), [{name: settings}])
    acts = Acts(f"acts/{acts}")                    # settings are read once for a cache
    spec = ev.EVALS[name]
    found = dict(spec.make(acts, model, runs, spec.settings(acts)))
    for result in found.values():
        if isinstance(result, Exception):
            raise result
    return [found[run] for run in runs]


# ---- sae_bench's own calls ----


class PlainSAE:
    """A run in the form of sae_bench's BaseSAE."""

    def __init__(self, acts, run):
        from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig
        self.run, sae = run, run.sae
        self.W_enc, self.W_dec = sae.W_enc.detach(), sae.W_dec.detach()
        self.b_dec = sae.b_dec.detach() / sae.scale + sae.mean
        self.device, self.dtype = CPU, torch.float32
        meta = acts.meta
        self.cfg = CustomSAEConfig(
            meta["model"]["name"], sae.d_in, sae.d_sae, meta["layer"], meta["hook_name"],
            dtype="float32", architecture=run.config["variant"], context_size=meta["ctx"])

    def encode(self, x):
        return self.run.sae.encode(x)

    def decode(self, acts):
        return acts @ self.W_dec + self.b_dec

    def to(self, **_):
        return self


def hooked_llama(folder):
    """The Llama in `folder` as TransformerLens' HookedTransformer, nothing folded."""
    import transformer_lens
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    original = transformers.AutoModelForCausalLM.from_pretrained(folder)
    c = original.config
    d_head = c.hidden_size // c.num_attention_heads
    cfg = transformer_lens.HookedTransformerConfig(
        d_model=c.hidden_size, n_layers=c.num_hidden_layers, n_heads=c.num_attention_heads,
        d_head=d_head, d_mlp=c.intermediate_size, n_ctx=128, d_vocab=c.vocab_size, act_fn="silu",
        normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=d_head,
        rotary_adjacent_pairs=False, rotary_base=10_000, eps=c.rms_norm_eps, final_rms=True,
        gated_mlp=True, model_name="toy", original_architecture="LlamaForCausalLM", device="cpu",
        default_prepend_bos=True)
    tokenizer = Tokenizer.from_pretrained(folder, add_bos_token=True)
    model = transformer_lens.HookedTransformer(cfg, tokenizer)
    model.load_and_process_state_dict(
        convert_llama_weights(original, cfg), fold_ln=False, center_writing_weights=False,
        center_unembed=False, fold_value_biases=False)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def hooked(world):
    return hooked_llama("model")


@pytest.fixture
def bench_model(hooked, monkeypatch):
    """sae_bench gets `hooked` by its name."""
    import transformer_lens
    monkeypatch.setattr(transformer_lens.HookedTransformer, "from_pretrained_no_processing",
                        staticmethod(lambda *args, **kwargs: hooked))
    return hooked


def seed_all():
    random.seed(ev.SEED)
    numpy.random.seed(ev.SEED)
    torch.manual_seed(ev.SEED)


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


FIELDS = ("eval_config", "eval_result_metrics", "eval_result_details", "sae_cfg_dict",
          "eval_type_id")


# ---- absorption ----


FEW_K = {"max_k_value": 3, "k_sparse_probe_num_epochs": 10}


def plain_absorption(acts, run, folder, monkeypatch):
    """sae_bench's own call -> its result. Its probes exist before, as for all but its first SAE."""
    from sae_bench.evals.absorption import common, main
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
    config = AbsorptionEvalConfig(model_name="toy", llm_dtype="float32",
                                  precalc_k_sparse_probe_sae_acts=True, **FEW_K)
    places = {"experiment_dir": folder / "probing",            # else beside the package
              "probes_dir": folder / "probes"}
    monkeypatch.setattr(main, "run_k_sparse_probing_experiment",
                        functools.partial(main.run_k_sparse_probing_experiment, **places))
    monkeypatch.setattr(main, "run_feature_absortion_experiment", functools.partial(
        main.run_feature_absortion_experiment, experiment_dir=folder / "scores",
        probes_dir=folder / "probes", sparse_probing_experiment_dir=folder / "probing"))
    with contextlib.chdir(folder):
        model = main.HookedTransformer.from_pretrained_no_processing()
        seed_all()
        common.load_or_train_probe(model, config.prompt_template, config.prompt_token_pos, LAYER,
                                   folder / "probes", torch.float32, "cpu")
        seed_all()
        found = main.run_eval(config, [(run.name, PlainSAE(acts, run))], "cpu", str(folder))
    return json.loads(json.dumps(found[f"{run.name}_custom_sae"], default=str))


@pytest.mark.parametrize("kind", ["planted", pytest.param("random", marks=pytest.mark.slow)])
def test_absorption_is_saebenchs_own(world, bench_model, tmp_path, monkeypatch, kind):
    sae = letter_sae(world.toy, False) if kind == "planted" else random_sae(world.toy, 2)
    run = make_run(kind, sae)
    ours = results("absorption", "toy", world.model, [run], **FEW_K)[0]
    theirs = plain_absorption(world.toy, run, tmp_path, monkeypatch)
    for field in FIELDS:
        same(ours[field], theirs[field], field)


def test_planted_absorption_is_found_and_the_repaired_sae_is_free_of_it(world):
    runs = [make_run(f"repaired-{on}", letter_sae(world.toy, on)) for on in (False, True)]
    planted, repaired = results("absorption", "toy", world.model, runs, max_k_value=3,
                                k_sparse_probe_batch_size=16)
    assert planted["metrics"]["mean_full_absorption_score"] > 0.2
    assert planted["metrics"]["mean_absorption_fraction_score"] > 0.2
    assert repaired["metrics"]["mean_full_absorption_score"] < 0.01
    assert repaired["metrics"]["median_main_latent_f1"] > 0.9


def test_absorption_out_of_its_scope_and_without_a_latent_that_knows_letters_is_marked(world):
    silent = letter_sae(world.toy, False)
    torch.nn.init.constant_(silent.b_enc, -100.0)
    result = results("absorption", "toy", world.model, [make_run("silent", silent)], **FEW_K)[0]
    guards = {guard["name"]: guard for guard in result["guards"]}
    assert guards["out of scope"]["level"] == "caveat"
    assert "130 latents, not 16384" in guards["out of scope"]["why"]
    assert "M parameters, not 1000 M" in guards["out of scope"]["why"]
    planted = make_run("planted", letter_sae(world.toy, False))
    blind = ev.find_guards(ev.absorption_facts(planted, ev.bench_of(world.toy, world.model), {
        "letters": 26, "mean_full_absorption_score": 0.0, "mean_num_split_features": 1,
        "median_main_latent_f1": 0.3}))
    assert blind[0]["level"] == "invalid" and "no latent knows" in blind[0]["why"]


def test_absorption_of_fewer_latents_than_it_compares(world):
    run = make_run("few", random_sae(world.toy, d_sae=8))
    results("absorption", "toy", world.model, [run], **FEW_K)


def test_absorption_is_left_out_if_the_model_knows_no_letters(world):
    with pytest.raises(ev.Unfit, match="probes find 0 first letters"):
        results("absorption", "toy", world.model, [], **FEW_K, min_GT_probe_f1=1.1)


# ---- probing, SCR, TPP ----


BIOS = "LabHC/bias_in_bios_class_set1"
PROBING = {"dataset_names": [BIOS, "fancyzhx/ag_news"], "context_length": 24, "k_values": [1, 2, 5],
           "probe_train_set_size": 80, "probe_test_set_size": 40}
ABLATION = {"dataset_names": [BIOS], "context_length": 24, "train_set_size": 80,
            "test_set_size": 40, "n_values": [2, 5, 20], "probe_lr": 0.01, "sae_batch_size": 30}
SETTINGS = {"sparse_probing": PROBING, "tpp": ABLATION,
            "scr": ABLATION | {"column1_vals_lookup": {BIOS: [["professor", "nurse"]]}}}
FEW_TEXTS = {"train_set_size": 80, "test_set_size": 40, "context_length": 32}
CORPUS = {"sparse_probing": {"probe_train_set_size": 80, "probe_test_set_size": 40,
                             "context_length": 32, "dataset_names": ["package"]},
          **dict.fromkeys(["scr", "tpp"], {**FEW_TEXTS, "dataset_names": ["package"]})}


def plain_call(name, acts, run, folder):
    """sae_bench's own call for one SAE. What depends on no SAE was made before, task by task."""
    from sae_bench.evals.scr_and_tpp import main as ablation
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
    from sae_bench.evals.sparse_probing import main as probing
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    settings = {"model_name": "toy", "llm_dtype": "float32", "llm_batch_size": 32, **SETTINGS[name]}
    if name == "sparse_probing":
        main, config = probing, SparseProbingEvalConfig(**settings)
    else:
        main, config = ablation, ScrAndTppEvalConfig(perform_scr=name == "scr", **settings)
    first = make_run("first", random_sae(acts, 9, d_sae=50))
    with ev.local_data():
        for task in settings["dataset_names"]:
            config.dataset_names = [task]
            main.run_eval(config, [("first", PlainSAE(acts, first))], "cpu", str(folder / "first"),
                          force_rerun=True, artifacts_path=str(folder / "artifacts"))
        config.dataset_names = settings["dataset_names"]
        found = main.run_eval(config, [(run.name, PlainSAE(acts, run))], "cpu", str(folder / "out"),
                              artifacts_path=str(folder / "artifacts"))
    torch.set_grad_enabled(True)
    return json.loads(json.dumps(found[f"{run.name}_custom_sae"], default=str))


@pytest.mark.parametrize("name", ["sparse_probing", "scr", "tpp"])
def test_probing_scr_and_tpp_are_saebenchs_own(world, bench_model, name, tmp_path):
    run = make_run("random", random_sae(world.toy, 2))
    ours = results(name, "toy", world.model, [run], **SETTINGS[name])[0]
    theirs = plain_call(name, world.toy, run, tmp_path)
    for field in FIELDS + ("eval_result_unstructured",):
        same(ours[field], theirs[field], field)


def test_latents_that_are_class_indicators_are_found_by_top_1_probing(world):
    runs = [make_run("planted", alphabet_sae(world.toy)), make_run("random", random_sae(world.toy))]
    planted, other = results("sparse_probing", "labelled", world.model, runs,
                             **CORPUS["sparse_probing"])
    assert planted["metrics"]["sae_top_1_test_accuracy"] > 0.93
    assert other["metrics"]["sae_top_1_test_accuracy"] < 0.9
    assert planted["metrics"]["llm_test_accuracy"] == other["metrics"]["llm_test_accuracy"] > 0.95
    assert [d["dataset_name"] for d in planted["eval_result_details"]] == ["package_results"]
    assert torch.is_grad_enabled()


def test_probes_that_see_a_constant_make_probing_invalid(world):
    dead = alphabet_sae(world.toy)
    torch.nn.init.constant_(dead.b_enc, -100.0)
    result = results("sparse_probing", "labelled", world.model, [make_run("dead", dead)],
                     **CORPUS["sparse_probing"])[0]
    assert [(g["name"], g["level"]) for g in result["guards"]] == [("probes at chance", "invalid")]


def test_a_probe_on_all_latents_that_is_not_trained_is_no_metric(world):
    run = make_run("random", random_sae(world.toy))
    settings = CORPUS["sparse_probing"] | {"lower_vram_usage": True}
    result = results("sparse_probing", "labelled", world.model, [run], **settings)[0]
    assert result["eval_result_metrics"]["sae"]["sae_test_accuracy"] == -1
    assert "sae_test_accuracy" not in result["metrics"] and "llm_test_accuracy" in result["metrics"]


def test_ablating_planted_latents_removes_the_bias_and_one_class_alone(world):
    runs = [make_run("planted", alphabet_sae(world.toy)), make_run("random", random_sae(world.toy))]
    few = FEW_TEXTS | {"n_values": [2], "dataset_names": ["package"]}
    scr = [result["metrics"]["scr_metric_threshold_2"]
           for result in results("scr", "labelled", world.model, runs, **few)]
    tpp = [result["metrics"]["tpp_threshold_2_total_metric"]
           for result in results("tpp", "labelled", world.model, runs, **few)]
    assert scr[0] > 0.2 > 0.1 > scr[1]
    assert tpp[0] > 0.1 > 0.05 > tpp[1]


@pytest.mark.parametrize("name", ["scr", "tpp"])
def test_scr_and_tpp_with_fifty_latents_are_called_unreliable(world, name):
    run = make_run("random", random_sae(world.toy))
    few, many = (results(name, "labelled", world.model, [run], **FEW_TEXTS, n_values=n)[0]
                 for n in ([2, 20], [2, 50]))
    few, many = ({guard["name"] for guard in result["guards"]} for result in (few, many))
    assert many - few == {"unreliable metric"}


def test_the_model_reads_and_an_sae_encodes_each_text_once(world, monkeypatch):
    """Probing, TPP and SCR of two SAEs, from an empty cache."""
    shutil.rmtree("acts/labelled/eval_cache", ignore_errors=True)
    read, encoded = [], collections.Counter()
    activations, encode = ev.LanguageModel.activations, SAE.encode

    def read_and_count(self, tokens, mask=None):
        read.extend(map(tuple, tokens.tolist()))
        return activations(self, tokens, mask)

    def encode_and_count(self, x):
        encoded[id(self)] += len(x)
        return encode(self, x)

    monkeypatch.setattr(ev.LanguageModel, "activations", read_and_count)
    monkeypatch.setattr(SAE, "encode", encode_and_count)
    acts = Acts("acts/labelled")
    Path("labelled/settings.json").write_text(json.dumps(CORPUS))
    for name in ("sparse_probing", "tpp", "scr"):
        runs = [make_run(f"random-{seed}", random_sae(world.toy, seed)) for seed in (0, 1)]
        for run in runs:
            run.sae.name = run.name
        list(ev.EVALS[name].make(acts, world.model, runs, ev.EVALS[name].settings(acts)))
    assert len(read) == len(set(read)) > 300
    real = sum(sum(t > 2 for t in text) for text in read)
    assert sum(encoded.values()) == 2 * (real + 3)        # and rows of zeros, in SCR and TPP


def test_only_load_dataset_is_replaced_and_only_inside(world):
    from sae_bench.sae_bench_utils import dataset_utils
    before = dataset_utils.load_dataset
    with pytest.raises(ZeroDivisionError), ev.local_data():
        assert dataset_utils.load_dataset("fancyzhx/ag_news")["train"][0]["label"] == 0
        raise ZeroDivisionError
    assert dataset_utils.load_dataset is before


def test_tasks_that_share_their_first_texts_are_probed_on_their_own(world, capfd):
    """Also: a data set that can't be had and a task with too few texts are said."""
    g, run = random.Random(1), make_run("random", random_sae(world.toy))
    for split in ("train", "test"):
        shared = [{"text": sentence(g, *"amn"), "label": "a"} for _ in range(80)]
        for other in "bc":
            rows = [{"text": sentence(g, other, *"mn"), "label": other} for _ in range(80)]
            write_lines(Path(f"labelled/a_or_{other}/{split}.jsonl"), shared + rows)
        write_lines(Path(f"labelled/few/{split}.jsonl"), shared + rows[:9])
    tasks = {"dataset_names": ["a_or_b", "a_or_c", "few", "nobody/nothing"]}
    both = results("sparse_probing", "toy", world.model, [run], **PROBING | tasks)[0]
    said = capfd.readouterr()
    assert "sparse_probing without nobody/nothing" in said.out
    assert "sparse_probing without few: too few" in said.err and "a_or" not in said.err
    tasks = {"dataset_names": ["a_or_c"]}
    alone = results("sparse_probing", "toy", world.model, [run], **PROBING | tasks)[0]
    assert both["eval_result_details"][1] == alone["eval_result_details"][0]
    assert both["eval_result_details"][0] != both["eval_result_details"][1]
    for task in ("a_or_b", "a_or_c", "few"):
        shutil.rmtree(f"labelled/{task}")


def test_settings_that_are_no_json_are_one_line(world):
    Path("labelled/settings.json").write_text('{"scr": {},}')
    with pytest.raises(ev.Refuse, match="settings.json is not JSON"):
        ev.EVALS["absorption"].settings(Acts("acts/toy"))
    for text in ('{"scr": ["package"]}', "5"):
        Path("labelled/settings.json").write_text(text)
        with pytest.raises(ev.Refuse, match="want {evaluation"):
            ev.EVALS["scr"].settings(Acts("acts/toy"))


def test_a_mistyped_name_in_the_settings_is_refused(world):
    write_lines(Path("labelled/settings.json"), [{"sparse_probng": PROBING}])
    with pytest.raises(ev.Refuse, match="no evaluation sparse_probng"):
        ev.EVALS["absorption"].settings(Acts("acts/toy"))
    with pytest.raises(TypeError, match="n_feature"):
        results("forget", "labelled", world.model, [], n_feature=[4])


def test_a_data_folder_that_is_not_the_embedded_corpus_is_not_read_whole(world):
    """Of a large one that would take all memory; here: what pandas can't read."""
    Path("data").mkdir()
    for head in ("\ufeff", ""):               # with a byte-order mark, which stage 1 reads too
        Path("data/train.jsonl").write_text(head + '{"text": "one"}\nno json\n', "utf-8")
        acts = Acts("acts/toy")
        acts.meta["data"] = {"name": "data"}
        assert ev.corpus_tasks(acts) is None


def test_a_result_depends_on_what_the_labelled_files_hold(world):
    name = "sparse_probing"
    write_lines(Path("labelled/settings.json"), [{name: PROBING}])
    before = ev.EVALS[name].settings(Acts("acts/toy"))
    path = Path("labelled/fancyzhx/ag_news/test.jsonl")
    kept = path.read_text()
    path.write_text(kept + json.dumps({"text": "one more", "label": 0}) + "\n")
    after = ev.EVALS[name].settings(Acts("acts/toy"))
    path.write_text(kept)
    assert before["data"].keys() == after["data"].keys() == set(PROBING["dataset_names"])
    assert before["data"][BIOS] == after["data"][BIOS]
    assert before["data"]["fancyzhx/ag_news"] != after["data"]["fancyzhx/ag_news"]


def test_own_tasks_stand_beside_those_of_the_corpus(world):
    write_lines(Path("labelled/own/train.jsonl"), [{"text": "one", "label": "a"}])
    for name in ("sparse_probing", "tpp"):
        assert {"package", "own"} <= ev.own_tasks(Acts("acts/labelled"), name).keys()
    shutil.rmtree("labelled/own")


def test_labelled_text_keeps_modules_apart(world):
    records = pandas.read_json("corpus/train.jsonl", lines=True)
    records.module = records.package + "." + (records.index // 4).astype(str)    # of several texts
    write_lines(Path("modules/train.jsonl"), records.to_dict("records"))
    acts = Acts("acts/labelled")
    acts.meta["data"] = {"name": "modules"}
    folder = ev.corpus_tasks(acts)
    rows = [pandas.read_json(folder / "package" / f"{split}.jsonl", lines=True)
            for split in ("train", "test")]
    texts = records.text.str[:3 * ev.PASSAGE]              # some are there twice: the first counts
    module = dict(zip(texts[::-1], records.module[::-1]))
    train, test = (set(table.text.map(module)) for table in rows)
    assert train and test and not train & test
    for table in rows:
        assert set(MARKS) <= set(table.label)
        assert ((table.group == "doctest") == table.text.str.contains(">>>")).all()


def test_source_is_sorted_into_code_comments_and_docstrings():
    source = 'def f():\n    """One\n    two."""\n    # why\n    return 1\n\nx = """a"""\n'
    assert ev.kinds_of_line(source) == {
        "code": ["def f():", "    return 1"], "comment": ["    # why"],
        "docstring": ['    """One', '    two."""', 'x = """a"""']}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma2"])
def test_any_causal_model_is_probed(world, kind):
    """Without TransformerLens; with a tokenizer that adds no BOS by itself."""
    size = SIZE | {"intermediate_size": 32, "num_key_value_heads": 2}
    config = {
        "gpt2": transformers.GPT2Config(vocab_size=len(WORDS), n_embd=D, n_layer=3, n_head=4),
        "qwen2": transformers.Qwen2Config(**size),
        "gemma2": transformers.Gemma2Config(**size, head_dim=8)}[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(kind)
    save_tokenizer(kind, bos=False)
    save_cache(Path(f"acts/{kind}"), model, speak(model, 4, CTX), path=kind)
    lm = ev.LanguageModel(Acts(f"acts/{kind}"), CPU)
    run = make_run("random", random_sae(Acts(f"acts/{kind}")))
    settings = PROBING | {"dataset_names": ["letters"]}
    result = results("sparse_probing", kind, lm, [run], **settings)[0]
    assert result["metrics"]["sae_test_accuracy"] > 0.6
    bench = ev.bench_of(Acts(f"acts/{kind}"), lm)
    ids, _, acts = next(bench.read(["ab ac"]))
    assert ids[0, 0] == WORDS["<bos>"]
    hidden = model(ids, output_hidden_states=True).hidden_states[LAYER + 1]
    torch.testing.assert_close(acts, hidden, atol=1e-4, rtol=1e-4)


# ---- forget, unlearning ----


def test_clamping_planted_latents_costs_the_topic_and_not_the_rest(world):
    settings = {"texts": 24, "context_length": CTX, "n_features": [4], "multiples": [1.0]}
    run = make_run("planted", alphabet_sae(world.toy))
    planted = results("forget", "labelled", world.model, [run], **settings)[0]
    assert planted["metrics"]["forget_added"] > 0.05
    cost = planted["metrics"]["retain_added"] / planted["metrics"]["retain_clean"]
    assert abs(cost) <= 0.01
    assert planted["details"]["settings"][0]["n_features"] == 4


def test_latents_are_clamped_as_saebench_clamps_them(world):
    from sae_bench.evals.unlearning.utils import intervention
    sae, latents = random_sae(world.toy), list(range(0, 40, 3))
    x = world.toy.shard(0)["acts"][:40].float().view(8, 5, -1)
    plain = SimpleNamespace(encode=sae.encode, decode=lambda acts: acts @ sae.W_dec.detach())
    theirs = intervention.anthropic_clamp_resid_SAE_features(x, None, plain, latents, 7.0)
    ours = ev.clamp(sae, latents, 7.0, x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours != x).any() and torch.equal(ours[:, 0], x[:, 0])


def test_forgets_clean_losses_are_the_models_own(world):
    settings = {"texts": 5, "context_length": CTX}
    run = make_run("random", random_sae(world.toy))
    metrics = results("forget", "labelled", world.model, [run], **settings)[0]["metrics"]
    folder = ev.corpus_tasks(Acts("acts/labelled"))
    texts = pandas.read_json(folder / "retain" / "test.jsonl", lines=True).text[:5].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    ids = tokenizer(texts, truncation=True, max_length=CTX, return_tensors="pt")["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    loss = model(ids, labels=ids).loss.item()
    assert metrics["retain_clean"] == pytest.approx(loss, rel=1e-4)


def test_questions_are_asked_only_of_models_that_saebench_has_prompts_for(world):
    with pytest.raises(ev.Unfit, match="gemma-2-2b-it"):
        results("unlearning", "toy", world.model, [])


@pytest.mark.slow
def test_unlearning_is_saebenchs_own_call(world, bench_model, monkeypatch):
    """A model of random weights under the name of one that sae_bench has prompts for. A question
    counts as known that it answers right in a quarter of the orders."""
    from sae_bench.evals.unlearning.utils import metrics
    g, subject = random.Random(1), "human_aging"

    def question():
        return {"question": sentence(g, *"abc", n=8), "choices": [g.choice(OWN) for _ in range(4)],
                "answer": g.randrange(4)}

    write_lines(ev.FORGET_CORPUS, [{"text": sentence(g, *"nopq", n=60)} for _ in range(40)])
    write_lines(Path("labelled/wikitext/wikitext-2-raw-v1/test.jsonl"),
                [{"text": sentence(g, *"abcd", n=60)} for _ in range(40)])
    write_lines(Path("labelled/cais/wmdp/wmdp-bio/test.jsonl"), [question() for _ in range(8)])
    write_lines(Path(f"labelled/cais/mmlu/{subject}/test.jsonl"), [question() for _ in range(8)])
    monkeypatch.setattr(metrics, "_find_all_permutation_correct_ans", lambda found: numpy.where(
        found["is_correct"].reshape(-1, 24).sum(1) >= 6)[0])
    monkeypatch.setattr(bench_model.cfg, "model_name", "gemma-2-2b-it")
    tokens = speak(world.model.model, 4, CTX)
    save_cache(Path("acts/gemma"), world.model.model, tokens, name="google/gemma-2-2b-it")
    few = {"dataset_names": ["wmdp-bio", subject], "dataset_size": 30, "seq_len": CTX,
           "multipliers": [1, 5], "n_features_list": [2], "retain_thresholds": [0.1]}
    run = make_run("examined", alphabet_sae(world.toy))
    result = results("unlearning", "gemma", world.model, [run], **few)[0]
    assert 0 <= result["metrics"]["unlearning_score"] <= 1
    bench, x = ev.BenchSAE(ev.bench_of(Acts("acts/gemma"), world.model), run), torch.ones(2, D)
    torch.testing.assert_close(bench.decode(run.sae.encode(x)), run.sae.reconstruct(x))
    assert result["eval_config"]["dataset_names"] == few["dataset_names"]

"""Promises of 01_cache_acts.py: what is cached is what the model computes, every row once,
shuffled; what would be silent nonsense is refused; a kill changes nothing."""

import argparse
import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import sae  # noqa: E402

cache = importlib.import_module("01_cache_acts")

WORDS = [f"w{i}" for i in range(200)]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
SMALL = ["--ctx", "8", "--rows-per-shard", "64", "--tokens", "640", "--val-tokens", "64",
         "--dtype", "float32", "--device", "cpu"]
SIZE = dict(vocab_size=204, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2, pad_token_id=0)
T = transformers
CONFIGS = {
    "gpt2": lambda: T.GPT2Config(vocab_size=204, n_embd=16, n_layer=3, n_head=2, n_positions=32,
                                 initializer_range=0.3, bos_token_id=1, eos_token_id=2),
    "gpt_neox": lambda: T.GPTNeoXConfig(**SIZE),
    "llama": lambda: T.LlamaConfig(**SIZE),
    "gemma2": lambda: T.Gemma2Config(**SIZE, num_key_value_heads=1, head_dim=8, sliding_window=4,
                                     query_pre_attn_scalar=8),
    "gemma3 with vision": lambda: T.Gemma3Config(
        text_config=dict(**SIZE, num_key_value_heads=1, head_dim=8, sliding_window=4),
        vision_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                           num_attention_heads=2, image_size=28, patch_size=14),
        image_token_index=200, boi_token_index=201, eoi_token_index=202, mm_tokens_per_image=4),
    "mixtral": lambda: T.MixtralConfig(**SIZE, num_key_value_heads=2, num_local_experts=4),
    "mamba": lambda: T.MambaConfig(vocab_size=204, hidden_size=16, num_hidden_layers=3,
                                   state_size=4),
    "jamba": lambda: T.JambaConfig(**SIZE, num_key_value_heads=2, attn_layer_period=2,
                                   mamba_d_state=4, attn_layer_offset=1, num_experts=2,
                                   use_mamba_kernels=False),
    "falcon_h1": lambda: T.FalconH1Config(**SIZE, num_key_value_heads=2, mamba_d_ssm=32,
                                          mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4,
                                          mamba_chunk_size=8, head_dim=8),
    "gpt_oss": lambda: T.GptOssConfig(**SIZE, num_key_value_heads=2, head_dim=8,
                                      num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "falcon": lambda: T.FalconConfig(vocab_size=204, hidden_size=16, num_hidden_layers=3,
                                     num_attention_heads=2, initializer_range=0.3),
    "glm4": lambda: T.Glm4Config(**SIZE, num_key_value_heads=2, head_dim=8),
    "granite": lambda: T.GraniteConfig(**SIZE, residual_multiplier=0.5),
    "bloom": lambda: T.BloomConfig(vocab_size=204, hidden_size=16, n_layer=3, n_head=2),
    "xlm": lambda: T.XLMConfig(vocab_size=204, emb_dim=16, n_layers=3, n_heads=2, causal=True,
                               max_position_embeddings=32),
    "bert": lambda: T.BertConfig(**SIZE),
    "gemma3n": lambda: T.Gemma3nTextConfig(
        **SIZE, vocab_size_per_layer_input=204, hidden_size_per_layer_input=8,
        num_key_value_heads=2, head_dim=8, sliding_window=16, num_kv_shared_layers=0, laurel_rank=4,
        altup_num_inputs=2, activation_sparsity_pattern=None,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "bart": lambda: T.BartConfig(vocab_size=204, d_model=16, encoder_layers=1, decoder_layers=3,
                                 encoder_attention_heads=2, decoder_attention_heads=2),
}


def tokenizer(bos=False, special=SPECIAL, **names):
    """One token per word; optionally a BOS before each text, as Gemma and Llama have it."""
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>") | names
    if bos:
        first = names["bos_token"]
        words.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, vocab[first])])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def tiny(architecture="gpt2", seed=0):
    """A model with random weights, large enough that its attention patterns and norms matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        eager = dict(attn_implementation="eager") if "gemma2" in architecture else {}
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](),
                                                              **eager).eval()
        for p in model.parameters():
            if p.ndim == 1:  # norms and biases start at 1 and 0: make mixing them up visible
                p.data += 0.3 * torch.randn_like(p)
    return model


def save(folder, architecture="gpt2", words=None, seed=0):
    model = tiny(architecture, seed)
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return model


def texts(n=80, length=30, seed=0):
    """Documents of random words."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(200, (n, length), generator=g).tolist()
    return [" ".join(WORDS[i] for i in document) for document in drawn]


def write_jsonl(path, documents, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: d}) + "\n" for d in documents))


def run(*argv):
    """The script in this process, with these arguments."""
    before, sys.argv = sys.argv, ["01_cache_acts.py", *map(str, argv)]
    try:
        cache.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    save(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, gpt2):
    """An empty working folder with a model `m` and a text `t.jsonl`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gpt2, tmp_path / "m")
    write_jsonl(tmp_path / "t.jsonl", texts())
    return tmp_path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != ".lock"}


def all_rows(folder):
    acts = sae.Acts(folder)
    shards = [acts.shard(i) for i in range(len(acts.shards))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def in_order(folder, what="acts"):
    """Rows in the order of the text."""
    rows = all_rows(folder)
    return rows[what][(rows["context"].long() * 1000 + rows["position"]).argsort()]


def refused(code, *argv):
    """What the script says as it refuses; checks the exit code and that nothing is left behind."""
    before = contents(".")
    with pytest.raises(sae.Refuse) as e:
        run(*argv)
    assert e.value.code == code, str(e.value)
    assert "\n" not in str(e.value) and contents(".") == before
    return str(e.value)


# ---- what is cached ------------------------------------------------------------------------------


def tokens_of(rows, n):
    """Contexts [n, 8] of rows; 2 (EOS) is what is not a row."""
    tokens = torch.full((n, 8), 2)
    tokens[rows["context"].long(), rows["position"].long()] = rows["tokens"].long()
    return tokens


@pytest.mark.parametrize("architecture", [
    "llama", "gemma2", "gemma3 with vision", "mixtral", "mamba", "jamba", "falcon_h1", "gpt_oss",
    "falcon"])
def test_activations_are_the_hidden_states_of_the_model(architecture, here):
    model = save(here / "m", architecture)
    run("--model", "m", "--layer", 0, 1, "--data", "t.jsonl", *SMALL)
    for layer in (0, 1):
        meta, rows = sae.Acts(f"acts/m_l{layer}").meta, all_rows(f"acts/m_l{layer}")
        hidden = model(tokens_of(rows, meta["contexts"]), output_hidden_states=True).hidden_states
        at = layer if architecture == "mamba" else layer + 1         # Mamba's list starts later
        wanted = hidden[at][rows["context"].long(), rows["position"].long()]
        torch.testing.assert_close(rows["acts"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2", "glm4", "falcon"])
def test_attention_and_mlp_add_up_to_what_the_layer_adds(architecture, here):
    save(here / "m", architecture)
    for hook in cache.HOOKS:
        run("--model", "m", "--layer", 0, 1, "--hook", hook, "--data", "t.jsonl", "--name", hook,
            *SMALL)
    before, after, attn, mlp = (in_order(f"acts/{name}") for name in
                                ("resid_post_l0", "resid_post_l1", "attn_out_l1", "mlp_out_l1"))
    torch.testing.assert_close(after - before, attn + mlp, rtol=1e-3, atol=1e-3)


def test_every_row_is_there_once_and_the_statistics_are_of_them(here):
    run("--model", "m", "--layer", 1, "--data", "t.jsonl", *SMALL)
    acts, rows = sae.Acts("acts/m_l1"), all_rows("acts/m_l1")
    tokens = tokens_of(rows, 80)
    places = set(zip(rows["context"].tolist(), rows["position"].tolist()))
    assert len(places) == acts.rows == (tokens != 2).sum()
    x = rows["acts"].double()
    torch.testing.assert_close(acts.mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert acts.meta["mean_norm"] == pytest.approx(x.norm(dim=1).mean().item(), rel=1e-6)
    normalised = (x - x.mean(0)) * acts.scale
    assert normalised.norm(dim=1).mean().item() == pytest.approx(4, rel=1e-5)       # sqrt(d_in)
    assert acts.norm_limit == pytest.approx(10 * x.norm(dim=1).median().item(), rel=0.1)


def test_every_shard_is_a_sample_of_the_whole_cache(here):
    run("--model", "m", "--data", "t.jsonl", *SMALL)
    acts = sae.Acts("acts/m")
    assert len(acts.shards) == 10
    for i in range(10):
        context = acts.shard(i)["context"].float()
        assert context.unique().numel() > 25                               # of 80, in about 62 rows
        assert abs(context.mean() - 39.5) < 12                             # 4 standard errors
        both = torch.stack([context, torch.arange(len(context)).float()])
        assert abs(torch.corrcoef(both)[0, 1]) < 0.5


def test_layers_after_the_deepest_one_are_not_run(here, monkeypatch):
    calls = Counter()
    block = transformers.models.gpt2.modeling_gpt2.GPT2Block
    forward = block.forward

    def counted(self, *args, **kwargs):
        calls[self.attn.layer_idx] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(block, "forward", counted)
    run("--model", "m", "--layer", 0, 1, "--data", "t.jsonl", *SMALL)
    assert calls[0] == calls[1] > calls[2] + 2  # those two check the hooks


def test_several_layers_in_one_pass_equal_one_at_a_time(here):
    run("--model", "m", "--layer", 2, 0, "--data", "t.jsonl", *SMALL)
    together = contents("acts")
    assert {name.split("/")[0] for name in together} == {"m_l0", "m_l2"}
    for layer in (0, 2):
        os.rename(f"acts/m_l{layer}", f"old_{layer}")
        run("--model", "m", "--layer", layer, "--data", "t.jsonl", *SMALL)
    assert contents("acts") == together


def test_the_batch_changes_no_row(here):
    for batch in (1, 32):
        run("--model", "m", "--data", "t.jsonl", "--name", f"b{batch}", "--batch", batch, *SMALL)
    one, many = all_rows("acts/b1"), all_rows("acts/b32")
    assert torch.equal(one["context"], many["context"])
    torch.testing.assert_close(one["acts"], many["acts"])


def test_the_bar_moves_with_each_batch(here, monkeypatch):
    moved = []

    def update(bar, n):
        if not bar.disable and bar.desc == "caching":
            moved.append(n)

    monkeypatch.setattr(cache.tqdm, "update", update)
    run("--model", "m", "--data", "t.jsonl", *SMALL, "--batch", 4)
    assert moved == [4 * 8] * 20


def test_bos_padding_and_outliers_are_left_out_and_counted(here):
    model = save(here / "m", words=tokenizer(bos=True))
    model.transformer.wte.weight.data[4 + 7] *= 1000          # w7: a norm far over 10 x the median
    model.save_pretrained(here / "m")
    documents = [" ".join(WORDS[10 + i] for i in range(n % 11 + 1)) + (" w7" if n % 5 == 0 else "")
                 for n in range(120)]
    write_jsonl(here / "t.jsonl", ["", *documents])
    run("--model", "m", "--layer", 0, "--data", "t.jsonl", "--no-pack", *SMALL)
    meta, rows = sae.Acts("acts/m_l0").meta, all_rows("acts/m_l0")
    held = meta["val"]["contexts"]
    kept = [d.split()[:7] for d in documents[held : held + meta["contexts"]]]  # BOS is the eighth
    assert meta["dropped"] == {"bos": len(kept), "padding": sum(7 - len(k) for k in kept),
                               "outlier": sum("w7" in k for k in kept)}
    assert meta["dropped"]["outlier"] > 5
    words = Counter(w for k in kept for w in k if w != "w7")
    assert Counter(rows["tokens"].tolist()) == {4 + int(w[1:]): n for w, n in words.items()}
    assert rows["position"].min() == 1
    assert meta["rows"] + sum(meta["dropped"].values()) == meta["contexts"] * 8


@pytest.mark.parametrize("model, name", [
    (".", "here"), ("..", "two"), ("../.mm", "_mm"), ("模型", "__"), ("m.gguf", "m"),
    ("a/b c", "b_c")])
def test_a_model_gives_its_cache_a_name_that_stage_2_takes(model, name, tmp_path, monkeypatch):
    (tmp_path / "two/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "two/here")
    args = argparse.Namespace(model=model, name=None, layer=None, hook="resid_post")
    assert cache.folders(args, [1]) == [Path("acts") / sae.check_name("--acts", name)]


def test_a_file_whose_name_is_a_pattern_is_read_itself(here):
    for name, word in (("run[1].csv", "w7"), ("run1.csv", "w8")):
        (here / name).write_text("text\n" + f"{word} {word} {word}\n" * 400)
    run("--model", "m", "--data", "run[1].csv", *SMALL)
    assert set(all_rows("acts/m")["tokens"].tolist()) == {4 + 7}


@pytest.mark.parametrize("words, starts", [
    (dict(), []), (dict(bos=True), [1]),
    (dict(bos=True, special=["<bos>", "<pad>", "<eos>", "<unk>"]), [0]),             # BOS id 0
    (dict(bos=True, bos_token="<eos>"), [2]),                                        # BOS is EOS
    (dict(bos_token="<eos>"), []), (dict(padding_side="left"), [])])
def test_contexts_start_with_bos_if_the_tokenizer_puts_one(words, starts):
    words = tokenizer(**words)  # the letter "a" is unknown to it
    found = [context for _, context in cache.contexts(texts(), words, 8, pack=True)]
    assert all(context[:len(starts)] == starts and len(context) == 8 for context in found)
    flat = [token for context in found for token in context[len(starts):]]
    ids = [words(text, add_special_tokens=False).input_ids for text in texts()]
    given = [token for i in ids for token in i + [words.eos_token_id]]
    assert len(given) - 8 < len(flat) and flat == given[:len(flat)]


def test_held_out_documents_are_not_trained_on_and_are_a_tenth_of_a_short_text(here):
    write_jsonl(here / "t.jsonl", [" ".join([word] * 20) for word in WORDS[:150]])
    run("--model", "m", "--data", "t.jsonl", "--ctx", 8, "--device", "cpu")  # 300,000 tokens
    acts = sae.Acts("acts/m")
    val = acts.val()
    held = set(val["tokens"][val["mask"]].tolist())
    trained = set(all_rows("acts/m")["tokens"].tolist())
    assert held and trained and not held & trained
    assert 0.08 < len(val["tokens"]) / (len(val["tokens"]) + acts.meta["contexts"]) < 0.11


def test_a_file_named_val_is_the_held_out_part_and_split_chooses_among_the_others(here, capsys):
    for name, word in (("train-00000-of-00001", "w1"), ("test-00000-of-00001", "w2"),
                       ("val", "w3")):
        write_jsonl(here / "d" / "data" / f"{name}.jsonl", [f"{word} " * 100] * 9)
    (here / "d" / "LICENSE.txt").write_text("w9 " * 10_000)
    for split, token in (("train", 5), ("test", 6)):
        run("--model", "m", "--data", "d", "--split", split, "--name", split, *SMALL)
        assert set(all_rows(f"acts/{split}")["tokens"].tolist()) == {token}
        val = sae.Acts(f"acts/{split}").val()
        assert set(val["tokens"][val["mask"]].tolist()) == {4 + 3}
        assert "left out 2" in (said := capsys.readouterr().out) and "LICENSE.txt" in said
    assert "no json file of --split dev" in refused(2, "--model", "m", "--data", "d", "--split",
                                                    "dev", *SMALL)


def test_a_configuration_is_a_folder_of_the_data_and_many_texts_outweigh_a_table(here):
    for config, word in (("en", "w1"), ("de", "w2")):
        write_jsonl(here / "d" / config / "train.jsonl", [f"{word} " * 100] * 9)
    for config, token in (("en", 5), ("de", 6)):
        run("--model", "m", "--data", "d", "--config", config, "--name", config, *SMALL)
        assert set(all_rows(f"acts/{config}")["tokens"].tolist()) == {token}
    assert "data config" in refused(2, "--model", "m", "--data", "d", "--name", "en", *SMALL)
    card = "---\nconfigs:\n- config_name: en\n- config_name: de\n---\nhello\n"
    (here / "d/README.md").write_text(card)
    assert "configurations en, de" in refused(2, "--model", "m", "--data", "d", *SMALL)
    (here / "d/README.md").write_text("---\nconfigs: a: b\n---\n")
    assert "d/README.md does not load" in refused(3, "--model", "m", "--data", "d", *SMALL)
    names = [Path(f"{i}.txt") for i in range(9)]
    assert cache.main_kind([*names, Path("about.csv")]) == "text"
    assert cache.main_kind([names[0], Path("rows.csv")]) == "csv"


def test_the_same_text_in_any_format_gives_the_same_rows(here):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("datasets")
    documents = texts(20)
    write_jsonl(here / "a.jsonl", documents)
    (here / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (here / "a.jsonl").read_bytes())
    (here / "blank.jsonl").write_bytes(b"\n" + (here / "a.jsonl").read_bytes())
    (here / "u2028.jsonl").write_text((here / "a.jsonl").read_text().replace(" w", "\u2028w", 1))
    (here / "z.jsonl.gz").write_bytes(gzip.compress((here / "a.jsonl").read_bytes()))
    write_jsonl(here / "nul.jsonl", ["\0\0", *documents[:-1], "\0" + documents[-1] + "\0"])
    table = pandas.DataFrame({"x": range(20), "text": documents})
    table.to_parquet(here / "b.parquet")
    table.to_csv(here / "c.csv")
    (here / "d.json").write_text(json.dumps([{"text": d} for d in documents]))
    for i, half in enumerate((documents[:9], documents[9:])):
        write_jsonl(here / "folder" / f"{i}.jsonl", half)
    column = argparse.Namespace(column="text", split="train", config=None, trust_remote_code=False)
    for data in ("bom.jsonl", "blank.jsonl", "z.jsonl.gz", "nul.jsonl", "b.parquet", "c.csv",
                 "d.json", "folder"):
        assert list(cache.Text(column, data).train())[-20:] == documents, data
    assert "".join(cache.Text(column, "u2028.jsonl").train()).count("\u2028") == 1
    (here / "t.txt").write_text("\n".join(documents))
    (here / "t.txt.gz").write_bytes(gzip.compress((here / "t.txt").read_bytes()))
    endings = ["", ".gz"]
    if importlib.util.find_spec("zstandard"):
        import zstandard
        (here / "t.txt.zst").write_bytes(zstandard.compress((here / "t.txt").read_bytes()))
        endings.append(".zst")
    for end in endings:
        assert list(cache.Text(column, f"t.txt{end}").train()) == ["\n".join(documents)]


def test_text_files_and_the_embedded_model_need_no_datasets(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (here / "t.txt").write_text("\n".join(texts(200, 60)))
    run("--model", "m", "--data", "t.txt", *SMALL)
    assert sae.Acts("acts/m").rows > 500
    (here / "t.csv").write_text("text\nw1\n")
    assert "pip install datasets" in refused(4, "--model", "m", "--data", "t.csv", "--name", "c",
                                             *SMALL)


def test_a_packed_file_whose_package_is_missing_names_it(here, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "zstandard" else find(name))
    Path("t.jsonl.zst").write_bytes(b"packed")
    assert "pip install zstandard" in refused(4, "--model", "m", "--data", "t.jsonl.zst", *SMALL)


def test_text_that_runs_out_gives_the_rows_there_are(here, capsys):
    run("--model", "m", "--data", "t.jsonl", *SMALL, "--tokens", "20_000")
    meta = sae.Acts("acts/m").meta
    assert meta["rows"] < 80 * 30 and "the text ends after" in capsys.readouterr().out
    # not as many as 20,000 tokens would fill
    assert len(meta["shards"]) < 2 * meta["rows"] / 64 + 1


@pytest.mark.parametrize("dtype, bytes_of_one", [("bfloat16", 2), ("float16", 2)])
def test_a_dtype_costs_little_variance(here, dtype, bytes_of_one):
    for name in (dtype, "float32"):
        run("--model", "m", "--data", "t.jsonl", "--name", name, *SMALL, "--dtype", name)
    got, exact = all_rows(f"acts/{dtype}")["acts"], all_rows("acts/float32")["acts"]
    lost = (got.float() - exact).square().sum() / (exact - exact.mean(0)).square().sum()
    assert lost < 0.001 and got.dtype.itemsize == bytes_of_one


def test_synthetic_rows_are_sums_of_known_directions_in_trees(tmp_path, monkeypatch):
    pytest.importorskip("sae_lens")
    monkeypatch.chdir(tmp_path)
    run("--model", "synthetic", "--tokens", 20_000, "--rows-per-shard", 5000, "--val-tokens", 5000,
        "--dtype", "float32", "--device", "cpu")
    acts, rows = sae.Acts("acts/synthetic"), all_rows("acts/synthetic")
    val, checksum = acts.val(), acts.meta["truth"]["checksum"]
    truth, _ = sae.read_tensors("acts/synthetic/truth.safetensors", checksum)
    fires, parent = val["features"] > 0, truth["parent"].long()
    children = (parent >= 0).nonzero().flatten()
    torch.testing.assert_close(val["features"].float() @ truth["dictionary"], val["acts"])
    assert fires[:, parent[children]][fires[:, children]].all()  # a parent fires with a child
    assert len(children) >= 100 and fires[:, children].any(0).float().mean() > 0.9
    alone = fires.float()[:, parent[children]].mean(0) - fires.float()[:, children].mean(0)
    assert (alone > 0).float().mean() > 0.9                                # and also without it
    torch.testing.assert_close(fires.float().mean(0), truth["probability"], atol=0.03, rtol=0)
    assert 3 < fires.sum(1).float().mean() < 8 and len(truth["dictionary"]) > 2 * acts.d_in
    assert sorted(rows["context"].tolist()) == list(range(20_000)) and not rows["position"].any()
    assert len(rows["acts"].unique(dim=0)) > 15_000


def test_synthetic_without_sae_lens_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    assert "needs the package sae_lens" in refused(4, "--model", "synthetic", "--device", "cpu")


# ---- going on ------------------------------------------------------------------------------------


def test_a_finished_cache_is_left_alone_and_other_settings_are_refused(here, capsys):
    ask = ["--model", "m", "--data", "t.jsonl", *SMALL]
    run(*ask)
    before = contents("acts")
    (here / "acts/m/scratch").mkdir()  # as if killed while tidying up
    (here / "acts/m/scratch/part_00000.raw").touch()
    run(*ask)
    assert contents("acts") == before and "is complete" in capsys.readouterr().out
    for key, argv in (("ctx", ["--ctx", 16]), ("dtype", ["--dtype", "float16"]),
                      ("seed", ["--seed", 1]), ("hook", ["--hook", "mlp_out", "--name", "m"]),
                      ("tokens", ["--tokens", 1100]), ("layer", ["--layer", 0, "--name", "m"]),
                      ("pack", ["--no-pack"])):
        assert f"was made with {key} " in refused(2, *ask, *argv)
    write_jsonl(here / "t.jsonl", texts(seed=9))
    assert "was made with data checksum" in refused(2, *ask)
    write_jsonl(here / "t.jsonl", texts())
    for name in ("train_00001", "val"):
        (here / f"acts/m/{name}.safetensors").rename(here / "aside")
        assert f"{name}.safetensors is missing or cut short" in refused(3, *ask)
        (here / "aside").rename(here / f"acts/m/{name}.safetensors")


def test_a_model_in_this_folder_names_its_cache(here, monkeypatch):
    monkeypatch.chdir("m")
    run("--model", ".", "--data", "../t.jsonl", *SMALL)
    assert sae.Acts("acts/m").rows > 500


DRIVER = """
import importlib, os, random, resource, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
cache = importlib.import_module("01_cache_acts")
import torch, transformers
torch.set_num_threads(1)                     # no threads yet, so that the process may be forked
transformers.AutoModelForCausalLM.from_pretrained("m")
transformers.AutoTokenizer.from_pretrained("m")
from sae import run_script
sys.argv = ["01_cache_acts.py", *sys.argv[2:]]

def start(events=None, limit=None, **env):
    '''The script in a fork that is killed at its n-th event: fsync, rename, truncation, removal.'''
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    seen = [0]
    def watched(real):
        def call(*args, **kwargs):
            seen[0] += 1
            if seen[0] == events:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for name in ("fsync", "replace", "truncate", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run_script(cache.main)
    except SystemExit as e:
        open("events.txt", "w").write(str(seen[0]))
        os._exit(e.code)
    except BaseException:
        os._exit(99)

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def files():
    return {os.path.join(d, f): open(os.path.join(d, f), "rb").read()
            for d, _, fs in os.walk("acts") for f in fs if f != ".lock"}

assert end(start()) == 0, open("said.txt").read()
whole, total = files(), int(open("events.txt").read())
assert total > 40, total
points = random.Random(0).sample(range(1, total + 1), min(total, int(os.environ["POINTS"])))
for n in points:
    shutil.rmtree("acts")
    assert end(start(n)) == -9, n
    assert end(start()) == 0 and files() == whole, (n, sorted(set(files()) ^ set(whole)))
for limit in (1500, 5000):
    shutil.rmtree("acts")
    assert end(start(limit=limit)) == 4, (limit, open("said.txt").read())
    assert end(start()) == 0 and files() == whole, limit
for killed in (None, 9):                     # two processes of torchrun; once the first is killed
    shutil.rmtree("acts")
    both = [start(killed, RANK="0", WORLD_SIZE="2"), start(RANK="1", WORLD_SIZE="2")]
    if killed:
        assert end(both[0]) == -9
        both[0] = start(RANK="0", WORLD_SIZE="2")
    assert [end(pid) for pid in both] == [0, 0] and files() == whole, killed
print(f"{len(points)} of {total} kill points, 2 full disks and 2 processes: byte-identical")
"""


def drive(folder, points):
    env = {**os.environ, "POINTS": str(points), "OMP_NUM_THREADS": "1",
           "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", DRIVER, str(ROOT), "--model", "m", "--layer", "0", "1",
               "--data", "t.jsonl", *SMALL, "--rows-per-shard", "128", "--tokens", "512"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "byte-identical" in done.stdout


def test_killed_anywhere_or_shared_by_two_processes_the_bytes_are_the_same(here):
    drive(here, 5)


@pytest.mark.slow
def test_killed_at_every_event_and_run_again_the_bytes_are_the_same(here):
    drive(here, 10_000)


def test_parts_with_gaps_are_gone_on_from_and_a_late_process_finds_the_cache_complete(
        here, monkeypatch):
    ask = ["--model", "m", "--data", "t.jsonl", *SMALL]
    seen = []

    def interrupted(self, *args):
        seen.append((self, args))
        for number in (1, 3):            # of a process that had got less far
            self.part(number).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.Cache, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*ask)
    run(*ask)
    went_on = contents("acts")
    shutil.rmtree("acts")
    run(*ask)
    assert contents("acts") == went_on
    (late, (n_parts, _, _)), = seen
    process = threading.Thread(target=late.finish, args=(n_parts, 1, 2), daemon=True)
    process.start()
    process.join(20)
    assert not process.is_alive() and contents("acts") == went_on


def test_the_caches_of_a_call_have_to_fit_together(here, monkeypatch):
    usage, room = shutil.disk_usage("."), [150_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room[0]))
    # more rows to a shard than there are cost nothing
    run("--model", "m", "--data", "t.jsonl", "--name", "m", *SMALL, "--rows-per-shard", 10**9)
    room[0] = 100_000
    run("--model", "m", "--data", "t.jsonl", "--layer", "0", *SMALL)
    with pytest.raises(sae.Refuse, match="m_l1, acts/m_l2: 0.00 GB to write") as e:
        run("--model", "m", "--data", "t.jsonl", "--layer", "1", "2", *SMALL)
    assert e.value.code == 4


def test_a_bit_that_flips_in_scratch_is_noticed(here, monkeypatch):
    ask = ["--model", "m", "--data", "t.jsonl", *SMALL]
    finish = cache.Cache.finish

    def flip(self, *args):
        path = self.part(3).with_suffix(".raw")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        finish(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(cache.Cache, "finish", flip)
        with pytest.raises(sae.Refuse,
                           match="part_00003.raw is damaged.*delete acts/m/scratch and run"):
            run(*ask)
    shutil.rmtree(here / "acts/m/scratch")
    run(*ask)
    assert sae.Acts("acts/m").rows > 500


def test_a_folder_that_another_process_writes_is_refused(here):
    with sae.lock(here / "acts" / "m"):
        assert "in use" in refused(6, "--model", "m", "--data", "t.jsonl", *SMALL)
    run("--model", "m", "--data", "t.jsonl", *SMALL)


# ---- what is refused -----------------------------------------------------------------------------


BAD = [(2, "has layers 0 to 2", ["--layer", "3"]),
       (2, "invalid choice: 'resid_pre'", ["--hook", "resid_pre"]),
       (2, "invalid choice: 'float8'", ["--dtype", "float8"]), (2, "want 2 to 32", ["--ctx", "33"]),
       (2, "want a whole number above 0", ["--tokens", "1e6"]),
       (2, "want a name of at most 200 letters", ["--name", "../x"]),
       (2, "./nowhere is neither on the hub", ["--model", "./nowhere"]),
       (2, "no config.json", ["--model", "empty_folder"]),
       (2, "--device", ["--device", "nonsense"]),
       (2, "leave --layer", ["--model", "synthetic", "--layer", "1"]),
       (2, "t.jsonl, line 1: no column 'body', there are text", ["--column", "body"]),
       (3, "lists.jsonl, line 1: column 'text' holds list, not text", ["--data", "lists.jsonl"]),
       (3, "bytes.parquet, record 1: column 'text' holds bytes", ["--data", "bytes.parquet"]),
       (2, "no such file or folder", ["--data", "nothing.jsonl"]),
       (3, "too short, or too few documents, for one context", ["--data", "short.jsonl"]),
       (3, "too short, or too few documents, for one context", ["--data", "empty.txt"]),
       (2, "want a .txt, .jsonl", ["--data", "empty_folder"]),
       (2, "--data is a file", ["--config", "en"]),
       (3, "bad.jsonl, line 2: not JSON", ["--data", "bad.jsonl"]),
       (3, "latin1.jsonl, line 3: not UTF-8 (byte 0xe9)", ["--data", "latin1.jsonl"]),
       (3, "half.jsonl, line 2: holds the character U+D83D", ["--data", "half.jsonl"]),
       (3, "utf16.txt, line 1 or after: not UTF-8", ["--data", "utf16.txt"]),
       (3, "nul.txt, line 1 or after: holds the character U+0000", ["--data", "nul.txt"]),
       (3, "data file bad.parquet does not load", ["--data", "bad.parquet"]),
       (3, "data file cut.jsonl.gz does not load", ["--data", "cut.jsonl.gz"]),
       (4, "GB free", ["--tokens", "900_000_000_000_000"])]


def test_bad_input_is_refused_in_one_line_that_names_it(here):
    pandas = pytest.importorskip("pandas")
    (here / "empty_folder").mkdir()
    (here / "empty.txt").touch()
    (here / "bad.jsonl").write_text('{"text": "w1"}\n{"text"\n')
    (here / "bad.parquet").write_text("no parquet")
    (here / "cut.jsonl.gz").write_bytes(gzip.compress((here / "t.jsonl").read_bytes())[:500])
    (here / "utf16.txt").write_text("w1 w2\n" * 99, encoding="utf-16")
    (here / "nul.txt").write_text("w1 w2\n" * 99, encoding="utf-16-le")
    (here / "latin1.jsonl").write_bytes(b'{"text": "w1"}\n' * 2 + b'{"text": "caf\xe9"}\n')
    (here / "half.jsonl").write_text('{"text": "w1"}\n{"text": "cut \\ud83d off"}\n')
    pandas.DataFrame({"text": [b"w1"] * 9}).to_parquet(here / "bytes.parquet")
    write_jsonl(here / "short.jsonl", ["w1 w2 w3"])
    write_jsonl(here / "lists.jsonl", [["w1", "w2"]])
    for code, words, argv in BAD:
        start = ["--model", "m", "--data", "t.jsonl", *SMALL] if "synthetic" not in argv else []
        with pytest.raises(sae.Refuse) as e:
            run(*start, *argv)
        said = str(e.value)
        assert words in said and "\n" not in said and e.value.code == code, said
        assert not list(Path("acts").glob("*/train*"))
        shutil.rmtree(here / "acts", ignore_errors=True)
    assert "--data" in refused(2, "--model", "m")
    run("--model", "m", "--data", "t.jsonl", *SMALL)  # nothing of that is in the way


@pytest.mark.parametrize("architecture, hook, words", [
    ("bert", "resid_post", "is not causal"),
    ("xlm", "resid_post", "hidden states"),
    ("gemma3n", "resid_post", "not the residual stream"),
    ("bloom", "mlp_out", "does not add up"),
    ("granite", "attn_out", "does not add up"),
    ("mamba", "mlp_out", "have no mlp_out"),
    ("bart", "resid_post", "is an encoder-decoder")])
def test_a_hook_that_does_not_mean_what_it_says_is_refused(architecture, hook, words, here):
    save(here / "other", architecture)
    edit(here / "other" / "config.json", is_encoder_decoder=architecture == "bart")
    said = refused(3, "--model", "other", "--layer", 1, "--hook", hook, "--data", "t.jsonl", *SMALL)
    assert "other" in said and words in said


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def test_a_config_that_this_transformers_does_not_read_is_translated_or_refused(here):
    ask = ["--layer", 1, "--data", "t.jsonl", *SMALL]
    model = save(here / "v5", "llama")
    config = here / "v5" / "config.json"
    edit(config, rope_theta=500.0, rope_parameters=None)                   # as version 4 writes it
    shutil.copytree(here / "v5", here / "v4")
    edit(config, rope_theta=None, rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    for name in ("v4", "v5"):
        run("--model", name, *ask)
    assert torch.equal(in_order("acts/v4_l1"), in_order("acts/v5_l1"))
    rows = all_rows("acts/v5_l1")
    # the model itself still has the rotary base 10,000
    plain = model(tokens_of(rows, 80), output_hidden_states=True).hidden_states[2]
    plain = plain[rows["context"].long(), rows["position"].long()]
    assert (plain - rows["acts"]).abs().max() > 0.01
    edit(config, transformers_version="99.0", wobble=3, auto_map={"AutoModel": "code.Model"})
    said = refused(3, "--model", "v5", *ask, "--name", "x")
    assert "written by transformers 99.0" in said and "has wobble," in said
    assert T.__version__ in said
    if T.__version__ < "5":
        bases = {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 1.0}}
        edit(config, transformers_version="5.2", wobble=None, rope_parameters=bases)
        assert "rope_parameters" in refused(3, "--model", "v5", *ask, "--name", "x")
        edit(here / "m" / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
        assert "was written by transformers 5" in refused(3, "--model", "m", *ask)


def test_a_model_that_can_not_be_read_is_one_line(here):
    ask = ["--model", "m", "--layer", 1, "--data", "t.jsonl", *SMALL]
    edit(here / "m/config.json", output_hidden_states=True, return_dict=False)
    run(*ask, "--name", "odd")                             # both are meant for other uses
    model = sae.language_model("m", torch.float32)
    assert not model.config.output_hidden_states
    saved = model.state_dict()
    wrapped = {f"_orig_mod.{name}": weight.clone() for name, weight in saved.items()}
    safetensors.torch.save_file(wrapped, "m/model.safetensors", {"format": "pt"})    # compiled
    assert "model m: its files lack 41 of its weights" in refused(3, *ask)
    os.rename("m/tokenizer.json", "hidden")
    os.rename("m/tokenizer_config.json", "hidden_too")
    for rest in Path("m").glob("*token*"):
        rest.unlink()
    assert "the folder has no tokenizer" in refused(3, *ask)
    os.rename("hidden", "m/tokenizer.json")
    os.rename("hidden_too", "m/tokenizer_config.json")
    edit(here / "m/config.json",
         quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "model m does not load" in refused(3, *ask)
    edit(here / "m/config.json", quantization_config=None)
    Path("m/model.safetensors").unlink()
    torch.save(saved, "m/pytorch_model.bin")
    said = refused(3, *ask)
    assert "no weights in safetensors files: save them so, or add --trust-remote-code" in said
    with open("m/model.safetensors", "wb") as f:
        f.truncate(10 ** 13)                                               # a hole of 10 TB
    with pytest.raises(sae.Refuse,
                       match="model m needs .* GB as torch.float32, this machine has") as e:
        sae.language_model("m", torch.float32)
    assert e.value.code == 4


def test_tokens_beyond_the_embedding_are_refused_by_name_and_padding_is_masked(here):
    words = tokenizer(pad_token="[PAD]", additional_special_tokens=["<|user|>"])
    assert words.pad_token_id >= 204
    words.save_pretrained(here / "m")
    ask = ["--model", "m", "--layer", 1, *SMALL, "--no-pack", "--data"]
    write_jsonl(here / "short.jsonl", ["w1 w2 w3"] * 200)
    run(*ask, "short.jsonl")
    assert sae.Acts("acts/m_l1").meta["dropped"]["padding"] > 0
    write_jsonl(here / "chat.jsonl", ["<|user|> w1 w2 w3"] * 200)
    with pytest.raises(sae.Refuse, match=re.escape("'<|user|>' is token 20")):
        run(*ask, "chat.jsonl", "--name", "chat")


def test_activations_that_are_not_finite_are_refused_and_the_next_try_is_free(here):
    model = save(here / "big")
    model.transformer.wte.weight.data *= 1e6
    model.save_pretrained(here / "big")
    ask = ["--model", "big", "--layer", 0, "--data", "t.jsonl", *SMALL, "--dtype"]
    with pytest.raises(sae.Refuse, match="not finite.*try --dtype bfloat16"):
        run(*ask, "float16")
    run(*ask, "bfloat16")
    assert sae.Acts("acts/big_l0").meta["dtype"] == "bfloat16"


def test_a_gguf_file_is_a_model_or_one_line(here):
    Path("m.gguf").write_bytes(b"GGUF")
    said = refused(3, "--model", "m.gguf", "--data", "t.jsonl", *SMALL)
    assert "model m.gguf does not load" in said
    for name in ("q2", "q8"):
        Path("empty").mkdir(exist_ok=True)
        Path(f"empty/{name}.gguf").write_bytes(b"GGUF")
    assert "2 .gguf files" in refused(2, "--model", "empty", "--data", "t.jsonl", *SMALL)


# ---- the embedded model --------------------------------------------------------------------------


def test_a_short_embedded_build_is_repeatable_and_an_unfinished_one_is_done_again(tmp_path,
                                                                                  monkeypatch):
    short = dict(code_chars=20_000, doc_chars=40_000, steps=2, bigram_steps=1, spelling_docs=200,
                 bigram_contexts=300, vocab=1024)
    monkeypatch.setattr(cache, "RECIPE", {**cache.RECIPE, **short})
    monkeypatch.chdir(tmp_path)
    cache.tiny_model()
    made = contents("acts")
    (tmp_path / "acts/tiny_lm/recipe.json").unlink()  # as if killed before the marker was written
    (tmp_path / "acts/tiny_lm/model/model.safetensors").write_bytes(b"half")
    cache.tiny_model()
    assert contents("acts") == made
    train, val = ([json.loads(line) for line in open(f"acts/tiny_lm/text/{part}.jsonl")]
                  for part in ("train", "val"))
    assert {r["kind"] for r in train} == {"code", "doc", "spelling"}
    assert {"stdlib", "torch", "spelling"} <= {r["package"] for r in train}
    modules = [{r["module"] for r in records} for records in (train, val)]
    assert modules[1] and not modules[0] & modules[1]


@pytest.mark.slow
def test_the_embedded_model_beats_bigrams_clearly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--tokens", "200_000", "--device", "cpu")
    told = sae.read_json("acts/tiny_lm/recipe.json")
    assert told["loss"] < told["bigram_loss"] - 0.3 < told["unigram_loss"] - 1.5
    acts = sae.Acts("acts/tiny")
    words = transformers.AutoTokenizer.from_pretrained("acts/tiny_lm/model")
    assert acts.meta["layer"] == 1 and acts.d_in == 128 and len(acts.val()["tokens"]) > 100
    assert acts.shard(0)["position"].min() == 1
    assert acts.meta["dropped"]["outlier"] < 0.001 * acts.rows
    tail = words.tokenize(" tartan has the first letter:")[-5:]  # as the absorption prompts need it
    assert words.convert_tokens_to_string(tail) == " has the first letter:"

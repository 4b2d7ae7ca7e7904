"""Promises of 01_cache_acts.py: what is cached is what the model computes, every row once, shuffled, and a kill changes nothing."""
import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import sae  # noqa: E402

cache = importlib.import_module("01_cache_acts")

WORDS = [f"w{i}" for i in range(200)]
SMALL = ["--ctx", "8", "--rows-per-shard", "64", "--tokens", "640", "--val-tokens", "64", "--dtype", "float32"]


def tokenizer(bos=False):
    """One token per word; optionally a BOS before each text, as Gemma and Llama have it."""
    vocab = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>"] + WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if bos:
        words.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def tiny(architecture, seed=0, n_layers=3):
    """A model with random weights, large enough that its attention patterns and norms matter."""
    size = dict(vocab_size=204, hidden_size=16, num_hidden_layers=n_layers, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=32, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=204, n_embd=16, n_layer=n_layers, n_head=2, n_positions=32,
                                                initializer_range=0.3, bos_token_id=1, eos_token_id=2),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**size, rotary_pct=0.5),
        "llama": lambda: transformers.LlamaConfig(**size, num_key_value_heads=1),
        "qwen2": lambda: transformers.Qwen2Config(**size, num_key_value_heads=1),
        "gemma2": lambda: transformers.Gemma2Config(**size, num_key_value_heads=1, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    }[architecture]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, p in model.named_parameters():
            if p.ndim == 1:                                        # norms and biases start at 1 and 0: make mixing them up visible
                p.data += 0.3 * torch.randn_like(p)
    return model


def hooked(model, architecture):
    """The same weights in TransformerLens, without any folding."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions as convert
    c = model.config
    rotary = dict(positional_embedding_type="rotary", rotary_adjacent_pairs=False, rotary_dim=8, rotary_base=10000)
    layer_norm = dict(normalization_type="LN", eps=1e-5)
    rms = dict(normalization_type="RMS", eps=getattr(c, "rms_norm_eps", None), gated_mlp=True, final_rms=True, **rotary)
    rms["n_key_value_heads"] = 1
    special, convert = {
        "gpt2": (dict(act_fn="gelu_new", d_mlp=64, **layer_norm), convert.convert_gpt2_weights),
        "gpt_neox": (dict(act_fn="gelu", parallel_attn_mlp=True, **layer_norm, **rotary | dict(rotary_dim=4)),
                     convert.convert_neox_weights),
        "llama": (dict(act_fn="silu", **rms), convert.convert_llama_weights),
        "qwen2": (dict(act_fn="silu", **rms), convert.convert_qwen2_weights),
        "gemma2": (dict(act_fn="gelu_pytorch_tanh", use_normalization_before_and_after=True, attn_scores_soft_cap=50.0,
                        output_logits_soft_cap=30.0, use_local_attn=True, window_size=4, attn_types=["local", "global", "local"], **rms),
                   convert.convert_gemma_weights),
    }[architecture]
    size = dict(n_layers=3, d_model=16, n_heads=2, d_head=8, d_mlp=32, n_ctx=32, d_vocab=204, init_weights=False, device="cpu",
                original_architecture=type(model).__name__)
    config = HookedTransformerConfig(**{**size, **special})
    lens = HookedTransformer(config)
    lens.load_and_process_state_dict(convert(model, config), fold_ln=False, fold_value_biases=False,
                                     center_writing_weights=False, center_unembed=False)
    return lens.eval()


def save(folder, architecture="gpt2", bos=False, **more):
    model = tiny(architecture, **more)
    model.save_pretrained(folder)
    tokenizer(bos).save_pretrained(folder)
    return model


def texts(n=80, length=30, seed=0):
    """Documents of random words."""
    g = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=g)) for _ in range(n)]


def write_jsonl(path, documents, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: d}) + "\n" for d in documents))


def run(monkeypatch, *argv):
    """The script in this process, with these arguments."""
    monkeypatch.setattr(sys, "argv", ["01_cache_acts.py", *map(str, argv)])
    cache.main()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with a model `m` and a text `t.jsonl`."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "m")
    write_jsonl(tmp_path / "t.jsonl", texts())
    return tmp_path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def all_rows(folder):
    shards = [sae.Acts(folder).shard(i) for i in range(len(sae.Acts(folder).shards))]
    return {k: torch.cat([s[k] for s in shards]) for k in shards[0]}


# ---- what is cached --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "qwen2", "gemma2"])
def test_activations_equal_transformer_lens_at_every_layer_and_hook(architecture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save(tmp_path / "m", architecture)
    write_jsonl(tmp_path / "t.jsonl", texts())
    lens = hooked(model, architecture)
    for hook in cache.HOOKS:
        run(monkeypatch, "--model", "m", "--layer", 0, 1, 2, "--hook", hook, "--data", "t.jsonl", "--name", hook, *SMALL)
        for layer in range(3):
            folder = f"acts/{hook}_l{layer}"
            meta, rows = sae.Acts(folder).meta, all_rows(folder)
            tokens = torch.full((meta["contexts"], 8), 2, dtype=torch.long)          # 2 (EOS) is what is not a row
            tokens[rows["context"].long(), rows["position"].long()] = rows["tokens"].long()
            _, found = lens.run_with_cache(tokens, names_filter=meta["hook_name"])
            wanted = found[meta["hook_name"]][rows["context"].long(), rows["position"].long()]
            torch.testing.assert_close(rows["acts"], wanted, rtol=1e-4, atol=1e-4)


def test_a_row_is_what_the_model_computes_and_every_row_is_there_once(here, monkeypatch):
    run(monkeypatch, "--model", "m", "--layer", 1, "--data", "t.jsonl", *SMALL)
    a = sae.Acts("acts/m_l1")
    rows, model = all_rows("acts/m_l1"), transformers.AutoModelForCausalLM.from_pretrained("m")
    tokens = torch.full((80, 8), 2)
    at = rows["context"].long(), rows["position"].long()
    tokens[at] = rows["tokens"].long()
    hidden = model(tokens, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(rows["acts"], hidden[at])
    assert len(set(zip(*(x.tolist() for x in at)))) == a.rows == (tokens != 2).sum()
    norm, mean = hidden[at].double().norm(dim=-1), hidden[at].double().mean(0)
    assert a.meta["mean_norm"] == pytest.approx(norm.mean().item(), rel=1e-6)
    assert a.scale == pytest.approx(4 / norm.mean().item(), rel=1e-6)
    assert a.meta["gamma"] == pytest.approx((mean.norm() / (norm.square().mean() - mean.square().sum()).sqrt()).item(), rel=1e-4)


def test_every_shard_is_a_sample_of_the_whole_cache(here, monkeypatch):
    run(monkeypatch, "--model", "m", "--data", "t.jsonl", *SMALL)
    a = sae.Acts("acts/m")
    assert len(a.shards) == 10
    for i in range(len(a.shards)):
        context = a.shard(i)["context"].float()
        assert context.unique().numel() > 25                               # of 80, in about 62 rows
        assert abs(context.mean() - 39.5) < 12                             # 4 standard errors
        assert abs(torch.corrcoef(torch.stack([context, torch.arange(len(context)).float()]))[0, 1]) < 0.5


def test_layers_after_the_deepest_one_are_not_run(here, monkeypatch):
    calls = Counter()
    plain = transformers.models.gpt2.modeling_gpt2.GPT2Block.forward
    monkeypatch.setattr(transformers.models.gpt2.modeling_gpt2.GPT2Block, "forward",
                        lambda self, *a, **k: (calls.update([self.attn.layer_idx]), plain(self, *a, **k))[1])
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *a: pytest.fail("the lm_head was run"))
    run(monkeypatch, "--model", "m", "--layer", 0, 1, "--data", "t.jsonl", *SMALL)
    assert calls[0] == calls[1] > 0 and calls[2] == 0


def test_several_layers_in_one_pass_equal_one_at_a_time(here, monkeypatch):
    run(monkeypatch, "--model", "m", "--layer", 2, 0, "--data", "t.jsonl", *SMALL)
    together = contents("acts")
    assert {k.split("/")[0] for k in together} == {"m_l0", "m_l2"}
    for layer in (0, 2):
        os.rename(f"acts/m_l{layer}", f"old_{layer}")
        run(monkeypatch, "--model", "m", "--layer", layer, "--data", "t.jsonl", *SMALL)
    assert contents("acts") == together


def test_the_batch_changes_no_row(here, monkeypatch):
    for batch in (1, 32):
        run(monkeypatch, "--model", "m", "--data", "t.jsonl", "--name", f"b{batch}", "--batch", batch, *SMALL)
    one, many = all_rows("acts/b1"), all_rows("acts/b32")
    assert torch.equal(one["context"], many["context"]) and torch.equal(one["position"], many["position"])
    torch.testing.assert_close(one["acts"], many["acts"])


def test_bos_padding_and_outliers_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save(tmp_path / "m", bos=True)
    model.transformer.wte.weight.data[4 + 7] *= 1000                       # the word w7 gets a norm far over 10 x the median
    model.save_pretrained(tmp_path / "m")
    documents = [" ".join(WORDS[10 + i] for i in range(n % 11 + 1)) + (" w7" if n % 5 == 0 else "") for n in range(120)]
    write_jsonl(tmp_path / "t.jsonl", documents)
    run(monkeypatch, "--model", "m", "--layer", 0, "--data", "t.jsonl", "--no-pack", *SMALL)
    meta, rows = sae.Acts("acts/m_l0").meta, all_rows("acts/m_l0")
    held = meta["val"]["contexts"]
    kept = [d.split()[:7] for d in documents[held:held + meta["contexts"]]]            # BOS takes the first place of 8
    assert meta["dropped"] == {"bos": len(kept), "padding": sum(7 - len(k) for k in kept), "outlier": sum("w7" in k for k in kept)}
    assert meta["dropped"]["outlier"] > 5
    words = Counter(w for k in kept for w in k if w != "w7")
    assert Counter(rows["tokens"].tolist()) == {4 + int(w[1:]): n for w, n in words.items()}
    assert rows["position"].min() == 1 and meta["rows"] + sum(meta["dropped"].values()) == meta["contexts"] * 8


def test_packed_contexts_start_with_bos_where_the_tokenizer_puts_one(here, monkeypatch):
    save(here / "b", bos=True)
    for name in ("m", "b"):
        run(monkeypatch, "--model", name, "--data", "t.jsonl", *SMALL)
    plain, with_bos = (sae.Acts(f"acts/{n}").val()["tokens"] for n in ("m", "b"))
    assert (with_bos[:, 0] == 1).all() and not (plain == 1).any()
    words = [[t for t in tokens.flatten().tolist() if t != 1] for tokens in (plain, with_bos)]
    n = min(map(len, words))
    assert words[0][:n] == words[1][:n]
    assert words[0][30] == 2                                               # an EOS between documents of 30 words


def test_held_out_documents_are_not_trained_on(here, monkeypatch):
    write_jsonl(here / "t.jsonl", [" ".join([WORDS[i]] * 20) for i in range(150)])                 # a document is known by its word
    run(monkeypatch, "--model", "m", "--data", "t.jsonl", *SMALL)
    val = sae.Acts("acts/m").val()
    held, trained = set(val["tokens"][val["mask"]].tolist()), set(all_rows("acts/m")["tokens"].tolist())
    assert held and trained and not held & trained


def test_a_file_named_val_in_a_folder_is_the_held_out_part(here, monkeypatch):
    write_jsonl(here / "d" / "a.jsonl", texts(40, seed=1))
    write_jsonl(here / "d" / "b.jsonl", texts(40, seed=2))
    write_jsonl(here / "d" / "val.jsonl", ["w0 " * 100])
    run(monkeypatch, "--model", "m", "--data", "d", *SMALL)
    val = sae.Acts("acts/m").val()
    assert val["tokens"].shape == (8, 8) and set(val["tokens"][val["mask"]].tolist()) == {4}


def test_the_same_text_in_any_format_gives_the_same_rows(here, monkeypatch):
    import pyarrow.parquet
    documents = texts()
    write_jsonl(here / "other.jsonl", documents, "body")
    pyarrow.parquet.write_table(pyarrow.table({"x": range(80), "body": documents}), here / "t.parquet")
    write_jsonl(here / "d" / "a.jsonl", documents[:30])
    write_jsonl(here / "d" / "sub" / "b.jsonl", documents[30:])
    for name, data in (("l", "t.jsonl"), ("o", "other.jsonl"), ("p", "t.parquet"), ("d", "d")):
        run(monkeypatch, "--model", "m", "--data", data, "--column", "body" if name in "op" else "text", "--name", name, *SMALL)
    shards = [[s["checksum"] for s in sae.Acts(f"acts/{n}").shards] for n in "lopd"]
    assert shards[0] == shards[1] == shards[2] == shards[3]


def test_a_txt_file_is_read_to_its_end(here, monkeypatch):
    (here / "t.txt").write_text("".join(" ".join(WORDS[(i + j) % 200] for j in range(300)) + "\n" for i in range(30)))
    run(monkeypatch, "--model", "m", "--data", "t.txt", *SMALL, "--tokens", "20_000")
    meta = sae.Acts("acts/m").meta
    held = meta["val"]["contexts"] * 8
    assert 9000 - held - 2600 < meta["rows"] <= 9000 - held                # the document that gives the held-out part is not trained on


def test_text_that_runs_out_gives_the_rows_there_are(here, monkeypatch, capsys):
    run(monkeypatch, "--model", "m", "--data", "t.jsonl", *SMALL, "--tokens", "100_000")
    meta = sae.Acts("acts/m").meta
    assert meta["tokens"] == 100_000 and meta["rows"] < 80 * 30 and "the text ends after" in capsys.readouterr().out
    assert len(meta["shards"]) < 2 * meta["rows"] / 64 + 1                 # not as many as 100,000 tokens would fill


@pytest.mark.parametrize("dtype, size", [("bfloat16", 2), ("float16", 2), ("float32", 4), ("int8", 1)])
def test_a_dtype_costs_little_variance(here, monkeypatch, dtype, size):
    for d in (dtype, "float32"):
        run(monkeypatch, "--model", "m", "--data", "t.jsonl", "--name", d, *SMALL, "--dtype", d)
    got, exact = all_rows(f"acts/{dtype}"), all_rows("acts/float32")
    assert torch.equal(got["context"], exact["context"])
    lost = (got["acts"].float() - exact["acts"]).square().sum() / (exact["acts"] - exact["acts"].mean(0)).square().sum()
    assert lost < 0.001
    assert sae.read_tensors(f"acts/{dtype}/train_00000.safetensors")[0]["acts"].dtype.itemsize == size


def test_synthetic_rows_are_sums_of_known_directions_in_trees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--model", "synthetic", "--tokens", 20_000, "--rows-per-shard", 5000, "--val-tokens", 5000, "--dtype", "float32")
    a, rows = sae.Acts("acts/synthetic"), all_rows("acts/synthetic")
    truth, val = sae.read_tensors("acts/synthetic/truth.safetensors", a.meta["truth"]["checksum"])[0], a.val()
    fires, parent = val["features"] > 0, truth["parent"].long()
    children = (parent >= 0).nonzero().flatten()
    torch.testing.assert_close(val["features"].float() @ truth["dictionary"], val["acts"])
    assert fires[:, parent[children]][fires[:, children]].all()            # a parent fires whenever a child does
    assert len(children) >= 100 and fires[:, children].any(0).float().mean() > 0.9
    alone = fires.float()[:, parent[children]].mean(0) - fires.float()[:, children].mean(0)
    assert (alone > 0).float().mean() > 0.9                                # and also without it
    torch.testing.assert_close(fires.float().mean(0), truth["probability"], atol=0.03, rtol=0)
    assert 3 < fires.sum(1).float().mean() < 8 and truth["dictionary"].shape[0] > 2 * a.d_in == 2 * rows["acts"].shape[1]
    assert sorted(rows["context"].tolist()) == list(range(20_000)) and not rows["tokens"].any() and not rows["position"].any()
    assert len(rows["acts"].unique(dim=0)) > 15_000


# ---- going on, and refusing ------------------------------------------------------------------------------------------------------


def test_more_tokens_add_shards_and_keep_the_old_ones(here, monkeypatch):
    ask = ["--model", "m", "--data", "t.jsonl", *SMALL, "--tokens"]
    run(monkeypatch, *ask, 640)
    old, files = sae.Acts("acts/m").meta, contents("acts/m")
    run(monkeypatch, *ask, 1100)
    new, rows = sae.Acts("acts/m").meta, all_rows("acts/m")
    assert new["shards"][:len(old["shards"])] == old["shards"] and len(new["shards"]) > len(old["shards"])
    assert all(contents("acts/m")[k] == v for k, v in files.items() if k != "meta.json")
    run(monkeypatch, *ask, 1100, "--name", "whole")
    whole = all_rows("acts/whole")
    order, wanted = ((r["context"].long() * 8 + r["position"]).sort() for r in (rows, whole))
    assert torch.equal(order.values, wanted.values)
    torch.testing.assert_close(rows["acts"][order.indices], whole["acts"][wanted.indices])
    for key in ("mean_norm", "scale", "gamma"):
        assert new[key] == pytest.approx(sae.Acts("acts/whole").meta[key], rel=1e-9)
    assert new["dropped"] == sae.Acts("acts/whole").meta["dropped"]


def test_a_finished_cache_is_left_alone(here, monkeypatch, capsys):
    for _ in range(2):
        run(monkeypatch, "--model", "m", "--data", "t.jsonl", *SMALL)
        seen = {p: p.stat().st_mtime_ns for p in (here / "acts" / "m").iterdir()}
        first = locals().get("first", seen)
    assert seen == first and "is complete" in capsys.readouterr().out


DRIVER = """
import importlib, os, random, resource, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
cache = importlib.import_module("01_cache_acts")
import torch, transformers
torch.set_num_threads(1)                     # no threads, so that the process may be forked
transformers.AutoModelForCausalLM.from_pretrained("m"), transformers.AutoTokenizer.from_pretrained("m")      # import once what they need
from sae import run_script
sys.argv = ["01_cache_acts.py", *sys.argv[2:]]
def child(events=None, limit=None):
    '''Run the script in a fork that is killed at its n-th event (write, fsync, rename, truncate, removal); returns (exit, events).'''
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
        seen = [0]
        def event(then=lambda: None):
            seen[0] += 1
            if seen[0] == events:
                then()
                os.kill(os.getpid(), signal.SIGKILL)
        def watched(real):
            def call(*a, **k):
                event()
                return real(*a, **k)
            return call
        for name in ("fsync", "replace", "truncate", "unlink", "rmdir"):
            setattr(os, name, watched(getattr(os, name)))
        def opened(path, mode="r", **k):
            f = open(path, mode, **k)
            if mode == "ab":
                real = f.write
                class Half:
                    __enter__, __exit__ = (lambda s: s), (lambda s, *a: f.close())
                    def write(s, data):
                        event(lambda: (real(data[:len(data) // 2 + 1]), f.flush()))
                        real(data)
                return Half()
            return f
        cache.open = opened
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            run_script(cache.main)
        except SystemExit as e:
            os.write(write, str(seen[0]).encode())
            os._exit(e.code)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    said = os.read(read, 20)
    os.close(read)
    return os.waitstatus_to_exitcode(status), int(said or 0)
def files():
    return {os.path.join(d, f): open(os.path.join(d, f), "rb").read() for d, _, fs in os.walk("acts") for f in fs}
code, total = child()
whole = files()
assert code == 0 and total > 60, (code, total)
points = random.Random(0).sample(range(1, total + 1), min(total, int(os.environ["POINTS"])))
for n in points:
    shutil.rmtree("acts")
    assert child(n) == (-9, 0), n
    code, _ = child()
    assert code == 0 and files() == whole, (n, code, sorted(set(files()) ^ set(whole)))
for limit in (300, 2000):
    shutil.rmtree("acts")
    assert child(limit=limit)[0] == 4, limit
    assert child()[0] == 0 and files() == whole, limit
print(f"{len(points)} of {total} kill points and 2 full disks: byte-identical")
"""


def drive(folder, points):
    env = {**os.environ, "POINTS": str(points), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", DRIVER, str(ROOT), "--model", "m", "--layer", "0", "1", "--data", "t.jsonl",
               "--ctx", "8", "--rows-per-shard", "128", "--tokens", "512", "--val-tokens", "64"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "byte-identical" in done.stdout


def test_killed_anywhere_and_run_again_gives_the_same_bytes(here):
    drive(here, 10)


@pytest.mark.slow
def test_killed_at_every_event_and_run_again_gives_the_same_bytes(here):
    drive(here, 10_000)


def refused(monkeypatch, code, *argv):
    """What the script says when it refuses; checks the exit code and that no folder is left behind."""
    before = contents(".")
    with pytest.raises(sae.Refuse) as e:
        run(monkeypatch, *argv)
    assert e.value.code == code, str(e.value)
    assert "\n" not in str(e.value) and str(e.value).isascii()
    assert contents(".") == before and not [p for p in Path("acts").glob("*") if not any(p.iterdir())]
    return str(e.value)


BAD = [
    (2, "has layers 0 to 2", ["--layer", "3"]),
    (2, "has layers 0 to 2", ["--layer", "0", "-1"]),
    (2, "want one of resid_post, mlp_out, attn_out", ["--hook", "resid_pre"]),
    (2, "want one of", ["--dtype", "float8"]),
    (2, "want 2 to 32", ["--ctx", "33"]),
    (2, "want a whole number above 0", ["--tokens", "0"]),
    (2, "want a whole number above 0", ["--tokens", "1e6"]),
    (2, "want a whole number above 0", ["--ctx", "-3"]),
    (2, "want a name of at most 200 letters", ["--name", "../x"]),
    (2, "no such folder", ["--model", "./nowhere"]),
    (2, "no config.json", ["--model", "empty_folder"]),
    (2, "--device", ["--device", "nonsense"]),
    (2, "leave --layer", ["--model", "synthetic", "--layer", "1"]),
    (2, "no column 'body', there are text", ["--column", "body"]),
    (3, "holds list, not text", ["--data", "lists.jsonl"]),
    (2, "no such file or folder", ["--data", "nothing.jsonl"]),
    (3, "shorter than one context", ["--data", "short.jsonl"]),
    (3, "shorter than one context", ["--data", "empty.txt"]),
    (2, "want .txt, .jsonl or .parquet", ["--data", "empty_folder"]),
    (2, "want .txt, .jsonl or .parquet", ["--data", "t.csv"]),
    (3, "bad.jsonl, line 2: not JSON", ["--data", "bad.jsonl"]),
    (3, "not a parquet file", ["--data", "bad.parquet"]),
    (2, "no column 'body', there are text", ["--data", "t.parquet", "--column", "body"]),
    (4, "GB free", ["--tokens", "900_000_000_000_000"]),
]


def test_bad_input_is_refused_in_one_line_that_names_it(here, monkeypatch):
    import pyarrow.parquet
    (here / "empty_folder").mkdir()
    (here / "empty.txt").touch()
    (here / "t.csv").write_text("text\nw1\n")
    (here / "bad.jsonl").write_text('{"text": "w1"}\n{"text"\n')
    (here / "bad.parquet").write_text("no parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts()}), here / "t.parquet")
    write_jsonl(here / "short.jsonl", ["w1 w2 w3"])
    write_jsonl(here / "lists.jsonl", [["w1"]])
    for code, words, argv in BAD:
        said = refused(monkeypatch, code, "--model", "m", "--data", "t.jsonl", *SMALL, *argv) if argv[0] != "--model" else \
            refused(monkeypatch, code, *argv)
        assert words in said, said
    assert "--data" in refused(monkeypatch, 2, "--model", "m")
    run(monkeypatch, "--model", "m", "--data", "t.jsonl", *SMALL)          # nothing of that is in the way


def test_an_existing_name_with_other_settings_is_refused(here, monkeypatch):
    run(monkeypatch, "--model", "m", "--data", "t.jsonl", *SMALL)
    ask = ["--model", "m", "--data", "t.jsonl", *SMALL]
    for key, argv in (("ctx", ["--ctx", 16]), ("dtype", ["--dtype", "int8"]), ("seed", ["--seed", 1]),
                      ("hook", ["--hook", "mlp_out", "--name", "m"]), ("layer", ["--layer", 0, "--name", "m"]), ("pack", ["--no-pack"])):
        assert f"was made with {key} " in refused(monkeypatch, 2, *ask, *argv)
    write_jsonl(here / "t.jsonl", texts(seed=9))
    assert "was made with data checksum" in refused(monkeypatch, 2, *ask)
    save(here / "m", seed=1)
    assert "was made with model revision" in refused(monkeypatch, 2, *ask)


def test_activations_that_are_not_finite_are_refused_and_the_next_try_is_free(here, monkeypatch):
    model = save(here / "big")
    model.transformer.wte.weight.data *= 1e6
    model.save_pretrained(here / "big")
    ask = ["--model", "big", "--layer", 0, "--data", "t.jsonl", *SMALL, "--dtype"]
    with pytest.raises(sae.Refuse, match="not finite.*try --dtype bfloat16"):
        run(monkeypatch, *ask, "float16")
    run(monkeypatch, *ask, "bfloat16")
    assert sae.Acts("acts/big_l0").meta["dtype"] == "bfloat16"


def test_a_folder_that_another_process_writes_is_refused(here, monkeypatch):
    with cache.locked(Path("acts/m")):
        with pytest.raises(sae.Refuse, match="another process") as e:
            run(monkeypatch, "--model", "m", "--data", "t.jsonl", *SMALL)
    assert e.value.code == 6
    run(monkeypatch, "--model", "m", "--data", "t.jsonl", *SMALL)


def test_a_shard_that_went_missing_is_noticed(here, monkeypatch):
    run(monkeypatch, "--model", "m", "--data", "t.jsonl", *SMALL)
    (here / "acts/m/train_00001.safetensors").unlink()
    assert "missing or cut short" in refused(monkeypatch, 3, "--model", "m", "--data", "t.jsonl", *SMALL)


def test_hub_failures_are_told_apart_by_class(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.errors as hub
    import requests
    response, busy = requests.Response(), requests.Response()
    busy.status_code = 503
    for error, code, words in [
            (hub.GatedRepoError("x", response=response), 4, "is gated"),
            (hub.RepositoryNotFoundError("x", response=response), 2, "neither on the hub"),
            (hub.LocalEntryNotFoundError("x"), 4, "not reachable"),
            (hub.OfflineModeIsEnabled("x"), 4, "HF_HUB_OFFLINE"),
            (hub.HFValidationError("x"), 2, "neither a name on the hub"),
            (requests.exceptions.ConnectionError("x"), 4, "not reachable"),
            (datasets.exceptions.DatasetNotFoundError("x"), 2, "neither on the hub"),
            (hub.HfHubHTTPError("x", response=busy), 4, "the hub answers 503: try again later"),
            (ValueError("line one\nline two"), 3, "ValueError: line one")]:
        with pytest.raises(sae.Refuse, match=re.escape(words)) as e, cache.hub_errors("model", "a/b"):
            try:
                raise error
            except Exception as inner:
                raise OSError("long story") if not isinstance(inner, ValueError) or isinstance(inner, hub.HFValidationError) else inner
        assert e.value.code == code and "\n" not in str(e.value)


def test_the_hub_is_not_needed_for_a_clear_message(here, monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "model nobody/nothing" in refused(monkeypatch, 4, "--model", "nobody/nothing", "--data", "t.jsonl")
    assert "data set nobody/nothing" in refused(monkeypatch, 4, "--model", "m", "--data", "nobody/nothing", *SMALL)


# ---- the embedded model ----------------------------------------------------------------------------------------------------------


def test_a_short_embedded_build_is_repeatable_and_an_unfinished_one_is_done_again(tmp_path, monkeypatch):
    short = dict(code_chars=30_000, doc_chars=60_000, steps=3, bigram_steps=2, spelling_docs=200, bigram_contexts=500)
    monkeypatch.setattr(cache, "RECIPE", {**cache.RECIPE, **short})
    made = []
    for name in "ab":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        cache.tiny_model()
        made.append(contents("acts"))
    assert made[0] == made[1]
    (tmp_path / "b/acts/tiny_lm/recipe.json").unlink()                     # as if killed before the marker was written
    (tmp_path / "b/acts/tiny_lm/model/model.safetensors").write_bytes(b"half")
    cache.tiny_model()
    assert contents("acts") == made[0]
    records = [json.loads(line) for part in ("train", "val") for line in open(f"acts/tiny_lm/text/{part}.jsonl")]
    assert all(set(r) == {"text", "package", "module", "kind"} for r in records)
    assert {r["kind"] for r in records} == {"code", "doc", "spelling"} and {r["package"] for r in records} == {*cache.PACKAGES, "spelling"}
    modules = [{json.loads(line)["module"] for line in open(f"acts/tiny_lm/text/{part}.jsonl")} for part in ("train", "val")]
    assert modules[1] and not modules[0] & modules[1]


@pytest.mark.slow
def test_the_embedded_model_beats_bigrams_clearly_and_goes_through_the_same_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--tokens", "200_000")
    told = sae.read_json("acts/tiny_lm/recipe.json")
    assert told["loss"] < told["bigram_loss"] - 0.3 < told["unigram_loss"] - 1.5
    a = sae.Acts("acts/tiny")
    model, words = (kind.from_pretrained("acts/tiny_lm/model") for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    assert a.meta["layer"] == model.config.num_hidden_layers // 2 and a.d_in == model.config.hidden_size
    assert a.shard(0)["position"].min() == 1 and a.meta["dropped"]["outlier"] < 0.001 * a.rows
    tail = words.tokenize(" tartan has the first letter:")[-5:]
    assert words.convert_tokens_to_string(tail) == " has the first letter:"           # one token each, as the absorption prompts need it
    assert a.val()["tokens"].shape[0] > 100

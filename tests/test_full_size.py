"""Promises about runs at full size: a ring of shards gives the same bits as the whole cache, several processes divide the labour, estimates hold, and
every command of variants/README.md parses and passes its pre-flight on models of the full shape."""
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from sae import Acts, Refuse, read_json, run_script  # noqa: E402
from test_cache import WORDS, here, save, texts, tokenizer, write_jsonl  # noqa: E402, F401

cache, train_py, plot = (importlib.import_module(name) for name in ("01_cache_acts", "02_train", "04_plot"))

SMALL = ["--variant", "topk", "baseline", "--set", "d_sae=32", "l0=3", "batch_size=32", "--device", "cpu"]


def call(monkeypatch, module, *argv):
    """A script in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    return module.main()


class Script:
    """A script in a fork of this process, which need not import everything again; `env`: what torchrun would set."""

    def __init__(self, folder, module, *argv, **env):
        sys.stdout.flush()
        self.said = Path(folder) / f"said_{len(list(Path(folder).glob('said_*')))}.txt"
        self.said.touch()
        self.pid, self.code = os.fork(), None
        if not self.pid:
            os.chdir(folder)
            os.dup2(os.open(self.said, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
            os.environ.update(env)
            sys.argv = [module.__name__, *map(str, argv)]
            try:
                run_script(module.main)
            except SystemExit as e:
                os._exit(e.code)
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def kill(self, how=signal.SIGKILL):
        os.kill(self.pid, how)

    def ended(self, code=0, seconds=300):
        """What it said, once it has ended with this code."""
        until(lambda: self.poll() is not None, seconds=seconds)
        assert self.code == code, self.said.read_text()[-3000:]
        return self.said.read_text()


def until(condition, *alive, seconds=300):
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop and all(p.poll() is None for p in alive), [p.said.read_text()[-2000:] for p in alive if p.poll() is not None]
        time.sleep(0.02)


def weights(folder):
    return {p.parent.name: p.read_bytes() for p in sorted(Path(folder).glob("runs/*/sae.safetensors"))}


# ---- a ring of shards ------------------------------------------------------------------------------------------------------------


SHARD, WIDTH, TOKENS = 128, 96 * 4 + 10, 4000                       # a synthetic row in float32 has 394 bytes; 31 shards of 128 rows
RING = 13 * SHARD * WIDTH                                           # a window of 5 shards
SYNTHETIC = ["--model", "synthetic", "--tokens", TOKENS, "--rows-per-shard", SHARD, "--val-tokens", 500, "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache in windows that keeps its shards, and the runs trained on it."""
    folder = tmp_path_factory.mktemp("kept")
    Script(folder, cache, *SYNTHETIC, "--window", 5 * SHARD).ended()
    Script(folder, train_py, "--acts", "synthetic", *SMALL).ended()
    return folder


def disk(folder):
    """Bytes of the shards and of what they are made from."""
    total = 0
    for p in [*Path(folder).glob("train_*"), *Path(folder).glob("scratch/*.raw")]:
        try:
            total += p.stat().st_size
        except FileNotFoundError:
            pass
    return total


def test_windows_have_shards_of_one_size_each_shuffled_over_its_own_window(kept):
    acts = Acts(kept / "acts" / "synthetic")
    assert acts.sizes == [SHARD] * (TOKENS // SHARD) and acts.meta["window"] == 5 * SHARD
    seen = []
    for i in range(len(acts.shards)):
        rows = acts.shard(i)["context"]
        assert set((rows // (5 * SHARD)).tolist()) == {i // 5}
        assert rows.float().std() > 100 and not torch.equal(rows, rows.sort().values)
        seen += rows.tolist()
    assert len(set(seen)) == len(seen)
    assert [i for i in range(31) if acts.ends_window(i)] == [4, 9, 14, 19, 24, 29, 30]


def test_a_ring_smaller_than_the_data_gives_the_bits_of_the_whole_cache(kept, tmp_path):
    producer = Script(tmp_path, cache, *SYNTHETIC, "--window", 5 * SHARD, "--ring", f"{RING / 1e3:.3f}KB")
    folder, most = tmp_path / "acts" / "synthetic", 0
    until(lambda: (folder / "meta.json").exists() and read_json(folder / "meta.json")["shards"], producer)
    assert RING < TOKENS * WIDTH / 2
    consumer = Script(tmp_path, train_py, "--acts", "synthetic", *SMALL)
    while producer.poll() is None or consumer.poll() is None:
        most = max(most, disk(folder))
        time.sleep(0.005)
    producer.ended(), consumer.ended()
    assert most <= RING + 12 * 1000                                  # headers of the files apart
    assert weights(tmp_path) == weights(kept)
    for name in weights(kept):
        config, whole = (read_json(f / "runs" / name / "config.json") for f in (tmp_path, kept))
        assert config["identity"] == whole["identity"] and config["ring"] == int(RING) and whole["ring"] is None and config["window"] == whole["window"]
    assert [p.name for p in folder.glob("train_*")] == ["train_00000.safetensors"]      # read and deleted, but for the first
    again = Script(tmp_path, train_py, "--acts", "synthetic", *SMALL, "--seed", "1")
    assert "can be read once" in again.ended(3)


def test_killed_at_any_time_producer_and_consumer_go_on_to_the_same_bits(kept, tmp_path):
    folder = tmp_path / "acts" / "synthetic"
    cached = lambda: Script(tmp_path, cache, *SYNTHETIC, "--window", 5 * SHARD, "--ring", f"{RING / 1e3:.3f}KB")
    train = lambda: Script(tmp_path, train_py, "--acts", "synthetic", *SMALL)
    listed = lambda: len(read_json(folder / "meta.json")["shards"]) if (folder / "meta.json").exists() else 0
    producer = cached()
    until(lambda: listed() >= 10, producer)                             # the ring is full
    producer.kill()
    producer.ended(-9)
    consumer = train()
    until(lambda: (folder / "reader_0" / "read.json").exists() and read_json(folder / "reader_0" / "read.json")["shards"] == 10, consumer)
    until(lambda: "waiting for shard 11 of 31" in consumer.said.read_text(), consumer)      # which no producer makes
    time.sleep(1)
    consumer.kill(signal.SIGINT)                                        # it stops at once
    said = consumer.ended(130)
    assert "interrupted" in said and said.count("waiting for shard") == 1
    producer, consumer = cached(), train()
    until(lambda: listed() >= 20, producer, consumer)
    consumer.kill(), producer.kill()
    consumer.ended(-9), producer.ended(-9)
    producer, consumer = cached(), train()
    producer.ended(), consumer.ended()
    assert weights(tmp_path) == weights(kept)


def test_a_ring_refuses_in_one_line_what_it_cannot_do(kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = [*SYNTHETIC, "--ring"]
    for argv, words in [(["50"], "want a size such as 50GB"), (["1KB"], "at least two windows and three shards"),
                        ([f"{RING / 1e3}KB", "--window", 10_000], "at least two windows"), (["1MB", "--tokens", 100], "fills no shard")]:
        with pytest.raises(Refuse, match=words):
            call(monkeypatch, cache, *ask, *argv)
    call(monkeypatch, cache, *ask, "9MB", "--tokens", 1000)             # all in one window: it does not wait for a reader
    with pytest.raises(Refuse, match="can be read once"):
        call(monkeypatch, train_py, "--acts", "synthetic", *SMALL, "--epochs", 2)
    with pytest.raises(Refuse, match="was made with window 1024, not 2048"):
        call(monkeypatch, cache, *ask, "9MB", "--tokens", 2000)


# ---- several processes -----------------------------------------------------------------------------------------------------------


TEXT = ["--model", "m", "--layer", 0, 1, "--data", "t.jsonl", "--ctx", 8, "--rows-per-shard", 64, "--tokens", 1600, "--val-tokens", 64,
        "--dtype", "float32", "--device", "cpu"]


def two(folder, module, *argv):
    """The two processes that `torchrun --nproc-per-node 2` starts."""
    return [Script(folder, module, *argv, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]


def in_order(folder):
    """All rows of a cache, by context and position."""
    acts = Acts(folder)
    shards = [acts.shard(i) for i in range(len(acts.shards))]
    rows = {k: torch.cat([s[k] for s in shards]) for k in shards[0]}
    order = (rows["context"].long() * 100 + rows["position"]).argsort()
    return {k: v[order] for k, v in rows.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_share_the_contexts_and_make_one_cache_of_them(here, monkeypatch):
    call(monkeypatch, cache, *TEXT, "--name", "one")
    for part in two(here, cache, *TEXT, "--name", "two"):
        part.ended()
    for layer in (0, 1):
        one, both = Acts(f"acts/one_l{layer}"), Acts(f"acts/two_l{layer}")
        assert same(in_order(one.folder), in_order(both.folder))
        assert same(one.val(), both.val())
        assert both.meta["processes"] == 2 and both.meta["dropped"] == one.meta["dropped"]
        assert both.scale == pytest.approx(one.scale, rel=1e-12) and both.meta["gamma"] == pytest.approx(one.meta["gamma"], rel=1e-9)
        for i in range(len(both.shards) - 1):                           # each process' shards are a sample of its own parts, and come in turn
            assert set((both.shard(i)["context"] // 8 % 2).tolist()) == {i % 2}
        assert not list(both.folder.glob("process_*"))
    for part in two(here, cache, *TEXT, "--name", "two"):
        assert "is complete" in part.ended()
    with pytest.raises(Refuse, match="by several processes can't be extended"):
        call(monkeypatch, cache, *TEXT, "--name", "two", "--tokens", 2000)


def test_processes_that_were_killed_go_on_to_the_same_bytes(here, monkeypatch):
    for part in two(here, cache, *TEXT, "--name", "whole"):
        part.ended()
    parts = two(here, cache, *TEXT, "--name", "killed")
    until(lambda: list(here.glob("acts/killed_l1/process_*/scratch/00000.raw")))
    for part in parts:
        part.kill()
        part.ended(-9)
    with pytest.raises(Refuse, match="begun by another number of processes"):
        call(monkeypatch, cache, *TEXT, "--name", "killed")
    for part in two(here, cache, *TEXT, "--name", "killed"):
        part.ended()
    for layer in (0, 1):
        shards = [[(s["file"], s["checksum"]) for s in Acts(f"acts/{name}_l{layer}").shards] for name in ("whole", "killed")]
        assert shards[0] == shards[1]


def test_parts_are_joined_once_their_processes_have_let_go_of_them(here, monkeypatch):
    """Between the last meta.json of a part and the end of its process there is some tidying up."""
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (real(a, b), time.sleep(str(b).endswith("process_1/meta.json"))))
    for part in two(here, cache, *TEXT, "--name", "two"):
        part.ended()
    assert not list(here.glob("acts/*/process_*"))


def test_two_processes_divide_the_runs_and_give_the_bits_of_one(here, monkeypatch):
    call(monkeypatch, cache, *TEXT, "--name", "a")
    ask = ["--acts", "a_l1", *SMALL, "--seed", 0, 1, 2]
    (here / "alone" / "acts").mkdir(parents=True)
    shutil.copytree("acts/a_l1", "alone/acts/a_l1")
    Script(here / "alone", train_py, *ask).ended()
    first, second = (part.ended() for part in two(here, train_py, *ask))
    assert "3 runs" in first and "3 runs" in second
    trained = [set(re.findall(r"^(\S+-s\d) ", said, re.M)) for said in (first, second)]
    assert not trained[0] & trained[1] and len(trained[0] | trained[1]) == 6
    assert weights(here) == weights(here / "alone") and len(weights(here)) == 6


def test_a_process_whose_run_failed_waits_for_the_others_and_ends_when_it_is_told_to(here, monkeypatch):
    """torchrun stops all processes when one ends with an error, and stops the others by SIGTERM when one was killed."""
    (here / "variants").mkdir()
    for name in ("sae.py", "02_train.py"):
        shutil.copy(ROOT / name, here / name)
    (here / "variants" / "fails.py").write_text('''"""fails = baseline + a mistake."""
from sae import SAE
class Variant(SAE):
    def activate(self, pre):
        raise ValueError("no")
''')
    call(monkeypatch, cache, *TEXT, "--name", "a")
    ask = [sys.executable, "02_train.py", "--acts", "a_l1", "--variant", "baseline", "fails", *SMALL[3:]]
    start = lambda rank: subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                          env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"})
    says = lambda process, words: any(words in line for line in process.stdout)
    for end in (signal.SIGTERM, None):
        failed = start(1)
        assert says(failed, "waiting for 1 runs of the other processes")
        if end:                                                         # the other process was killed: its run never ends
            failed.send_signal(end)
            assert "interrupted" in failed.communicate(timeout=60)[0] and failed.returncode == 130
        else:
            time.sleep(2)
            assert failed.poll() is None
            assert start(0).wait(timeout=300) == 0
            assert failed.wait(timeout=60) == 5
    assert list(weights(here)) == ["baseline-a_l1-batch_size=32-d_sae=32-l0=3.0-s0"]
    with pytest.raises(Refuse, match="--resume: processes"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        call(monkeypatch, train_py, "--acts", "a_l1", "--resume")


def test_two_processes_read_one_ring(kept, tmp_path):
    producer = Script(tmp_path, cache, *SYNTHETIC, "--window", 5 * SHARD, "--ring", f"{RING / 1e3:.3f}KB")
    meta = tmp_path / "acts" / "synthetic" / "meta.json"
    until(lambda: meta.exists() and read_json(meta)["shards"], producer)
    for part in two(tmp_path, train_py, "--acts", "synthetic", *SMALL):
        part.ended()
    producer.ended()
    assert weights(tmp_path) == weights(kept)


@pytest.mark.slow
def test_torchrun_divides_the_labour(here, monkeypatch):
    """The same under torchrun itself; a second call on the same runs is refused while the first one trains."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = lambda *argv: subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
                                             *map(str, argv)], cwd=here, env=env, capture_output=True, text=True)
    call(monkeypatch, cache, *TEXT, "--name", "one")
    done = torchrun(ROOT / "01_cache_acts.py", *TEXT, "--name", "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(in_order("acts/one_l1"), in_order("acts/two_l1"))
    done = torchrun(ROOT / "02_train.py", "--acts", "two_l1", *SMALL, "--seed", 0, 1)
    assert done.returncode == 0 and len(weights(here)) == 4, done.stderr[-3000:]
    blocked = train_py.take_lock(here / "runs" / next(iter(weights(here))))
    done = torchrun(ROOT / "02_train.py", "--acts", "two_l1", *SMALL, "--seed", 0, 1, "--steps", 5)
    assert done.returncode != 0 and "in use by another process" in done.stderr
    blocked.close()


# ---- hub data sets: configurations, gates, and the cache without a network -------------------------------------------------------


def test_without_a_network_the_hubs_cache_is_read(here, monkeypatch):
    """As `hf download` leaves it; a split and a configuration are told by the files' names."""
    import pyarrow.parquet
    snapshot = here / "hub" / "datasets--Salesforce--wikitext" / "snapshots" / "0123abc"
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("0123abc")
    for config, split, word in (("wikitext-103-raw-v1", "train", "w1"), ("wikitext-103-raw-v1", "test", "w2"), ("wikitext-2-raw-v1", "train", "w3")):
        (snapshot / config).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": ["", f"{word} " * 40, ""] * 60}), snapshot / config / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(cache.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(cache.huggingface_hub.constants, "HF_HUB_CACHE", str(here / "hub"))
    ask = ["--model", "m", "--data", "Salesforce/wikitext", *TEXT[7:], "--layer", 0, "--config"]
    call(monkeypatch, cache, *ask, "wikitext-103-raw-v1")
    meta = Acts("acts/m_l0").meta
    assert set(in_order("acts/m_l0")["tokens"].tolist()) == {4 + WORDS.index("w1")} and meta["data"]["revision"] == "0123abc"
    assert meta["dropped"]["bos"] < meta["contexts"]                    # one EOS after 40 words, none for the empty lines
    with pytest.raises(Refuse, match="no .txt, .jsonl or .parquet file of split train and config nothing"):
        call(monkeypatch, cache, *ask, "nothing")


def test_a_gated_model_says_where_to_accept_what():
    import requests
    from huggingface_hub.errors import GatedRepoError
    for kind, name, page in (("model", "google/gemma-2-2b", "google/gemma-2-2b"), ("data set", "cais/wmdp", "datasets/cais/wmdp")):
        with pytest.raises(Refuse) as e, cache.hub_errors(kind, name):
            raise GatedRepoError("x", response=requests.Response())
        assert f"https://huggingface.co/{page}, then `hf auth login` or set HF_TOKEN" in str(e.value) and e.value.code == 4


# ---- published figures -----------------------------------------------------------------------------------------------------------


def planted(folder, model, layer, d_sae=16384, **metrics):
    """A finished and evaluated TopK run of SAEBench's shape."""
    from sae import write_json
    settings = {"activation": "topk", "d_sae": d_sae, "l0": 80.0}
    config = {"status": "done", "name": folder.name, "variant": "topk", "seed": 0, "settings": settings, "acts": "a", "model": {"name": model},
              "layer": layer, "final": {"tokens": 500_000_000}}
    write_json(folder / "config.json", config)
    return type("Run", (), dict(folder=folder, config=config, settings=settings, variant="topk", core={"metrics": metrics}, get=lambda self, k: metrics.get(k)))()


def test_saebenchs_figure_stands_beside_a_run_of_its_shape_and_of_no_other(tmp_path):
    rows = lambda *runs: plot.saebench(list(runs))[-1]
    run = planted(tmp_path / "r", "google/gemma-2-2b", 12, l0=80.0, ce_recovered=0.985)
    assert rows(run)[0][3:] == ["0.9850", "0.9880", "-0.0030"]          # TopK 16k: 80:.988
    between = planted(tmp_path / "r", "models/gemma-2-2b", 12, l0=(80 * 160) ** 0.5, ce_recovered=0.99)
    assert rows(between)[0][4:] == ["0.9900", "+0.0000"]                # half way in log L0 between .988 and .992
    assert rows(planted(tmp_path / "r", "google/gemma-2-2b", 12, l0=900.0, ce_recovered=0.99))[0][4:] == ["L0 20 to 640 only", "-"]
    assert rows(planted(tmp_path / "r", "google/gemma-2-2b", 19, l0=80.0, ce_recovered=0.99))[0][5] == "-"
    for kinds in plot.SAEBENCH.values():
        for points in [p for lines in kinds.values() for p in lines]:
            numbers = [tuple(map(float, p.split(":"))) for p in points.split()]
            assert numbers == sorted(numbers) and all(0.9 < score < 1 for _, score in numbers)


def test_note_004s_figures_stand_beside_the_runs_own(tmp_path):
    run = planted(tmp_path / "r", "google/gemma-2-2b", 19, 65536, l0=320.0, explained_variance=0.8, explained_variance_zero=-1.0, ce_recovered=0.98)
    plot.write_file(tmp_path / "r" / "eval" / "x.json", b"")
    from sae import write_json
    write_json(tmp_path / "r" / "eval" / "x.json", {"result": {"mean": {"mean_full_absorption_score": 0.0123}}})
    others = [planted(tmp_path / "other", "google/gemma-2-2b", *shape) for shape in ((19, 16384), (12, 65536))]
    table = {row[0]: row[1:] for row in plot.note004([*others, run])[-1]}
    assert "There is no run of this kind" in plot.note004(others)[1] and "There is no run" not in plot.note004([run])[1]
    assert table["L0"] == ["320", "320.0000"] and table["absorption, full (24 letters)"] == ["0.00876", "0.0123"]
    assert table["explained variance about the mean"] == ["-", "0.8000"]
    assert [v for k, v in table.items() if k.startswith("explained variance about zero")] == [["-", "0.9000"]]      # 1 - 0.2 / 2
    assert table["CE recovered"] == ["0.9901", "0.9800"] and table["KL recovered"] == ["0.9897", "-"]


# ---- recipes and estimates -------------------------------------------------------------------------------------------------------


README = (ROOT / "variants" / "README.md").read_text()
COMMANDS = list(dict.fromkeys(line for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines() if line.startswith("python")))
CACHING, TRAINING = ([c for c in COMMANDS if name in c] for name in ("01_cache_acts", "02_train"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Gemma-2-2B with 2 of its 26 layers and Pythia-70M, at their full shapes but for the vocabulary, with random weights."""
    folder, vocabulary = tmp_path_factory.mktemp("models"), dict(vocab_size=204, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    gemma = transformers.Gemma2Config(hidden_size=2304, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
                                      intermediate_size=9216, max_position_embeddings=8192, **vocabulary)
    pythia = transformers.GPTNeoXConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, rotary_pct=0.25, **vocabulary)
    for name, config in (("gemma-2-2b", gemma), ("pythia-70m", pythia)):
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
        tokenizer(bos=name == "gemma-2-2b").save_pretrained(folder / name)
    write_jsonl(folder / "texts" / "a.jsonl", texts(60, 300))
    return folder


def test_the_readme_has_the_five_studies_and_the_two_references():
    for study in ("contrastive", "adaptive_ortho", "topk_ortho", "zscore", "hierarchical"):
        assert any(study in c.split() for c in TRAINING), study
    assert {"04_plot.py --reference note004", "04_plot.py --reference saebench"} <= {c.removeprefix("python ") for c in COMMANDS}
    note, = [c for c in TRAINING if "--steps 4882" in c]
    assert "--variant topk" in note and {"d_sae=65536", "l0=320", "lr=1e-4"} < set(note.split())
    assert any("--ring" in c for c in CACHING) and any("--config" in c for c in CACHING)


@pytest.mark.parametrize("command", [c if "pythia" in c else pytest.param(c, marks=pytest.mark.slow) for c in CACHING])
def test_a_caching_recipe_runs_on_a_model_of_the_full_shape(command, models, tmp_path, monkeypatch, capsys):
    """The hub's model and data stand in as folders, and there are as many tokens as fill a few contexts; every other flag is as written."""
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(command)[2:]
    at = {flag: argv.index(flag) + 1 for flag in argv if flag.startswith("--")}
    name, ctx = argv[at["--model"]].split("/")[-1], int(argv[at["--ctx"]])
    argv[at["--model"]], argv[at["--data"]] = str(models / name), str(models / "texts")
    if name == "gemma-2-2b":
        first = at["--layer"]
        layers = [a for a in argv[first:] if a.isdigit()][:3 if argv[first + 1].isdigit() else 1]
        argv[first:first + len(layers)] = ["0", "1"][:len(layers)]
    argv[argv.index("--tokens") + 1] = str(3 * ctx)
    call(monkeypatch, cache, *argv, "--rows-per-shard", 64, "--val-tokens", ctx, "--device", "cpu")
    said = capsys.readouterr().out
    assert re.search(r"about [\d,]+ s, measured on a few contexts; the disk has", said)
    for folder in Path("acts").iterdir():
        acts = Acts(folder)
        assert acts.d_in == {"gemma-2-2b": 2304, "pythia-70m": 512}[name] and acts.rows > ctx and acts.meta["dtype"] == "bfloat16"
        if not acts.ring:                                               # the rows that are counted have exactly the bytes that were said
            assert sum(s["bytes"] - header(folder / s["file"]) for s in acts.shards) == acts.rows * (2 * acts.d_in + 10)
            assert f"up to {3 * ctx:,} rows of {acts.d_in} bfloat16, {3 * ctx * (2 * acts.d_in + 10) / 1e6:,.0f} MB" in said


@pytest.mark.slow                                                       # a timing, which a machine that slows down meanwhile fails
def test_the_time_told_for_caching_is_what_it_takes(models, tmp_path, monkeypatch, capsys):
    """Within 30 %, in CPU seconds, so that the machine's other work does not count: for the whole command but for loading the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "perf_counter", time.process_time)        # the clock that the script tells time by
    write_jsonl(tmp_path / "t.jsonl", texts(500, 300))
    loaded, load = [], cache.LanguageModel.load
    monkeypatch.setattr(cache.LanguageModel, "load", lambda self: (load(self), loaded.append(time.process_time()))[0])
    call(monkeypatch, cache, "--model", models / "pythia-70m", "--layer", 3, "--ctx", 128, "--data", "t.jsonl", "--tokens", 60_000, "--device", "cpu")
    took = time.process_time() - loaded[0]
    told = float(re.search(r"about ([\d,]+) s, measured", capsys.readouterr().out)[1].replace(",", ""))
    assert told / 1.3 < took < told * 1.3 and told > 5


def header(path):
    with open(path, "rb") as f:
        return 8 + int.from_bytes(f.read(8), "little")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A cache of a shard for each name that the README trains on, of the width of its model."""
    from toys import write_cache
    folder = tmp_path_factory.mktemp("caches")
    for name in {re.search(r"--acts (\S+)", c)[1] for c in TRAINING}:
        write_cache(folder / "acts" / name, torch.randn(2100 + 64, 2304 if "gemma" in name else 512), rows_per_shard=2100, val=64)
    return folder


@pytest.mark.parametrize("command", TRAINING)
def test_a_training_recipe_parses_and_passes_its_pre_flight(command, caches, monkeypatch, capsys):
    """On a machine with a GPU's 80 GB of memory and a disk of a terabyte; and on a small one it is refused."""
    monkeypatch.chdir(caches)
    monkeypatch.setattr(train_py.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    argv = shlex.split(command.replace("--steps 4882", "--steps 1"))[2:]
    gpu = lambda device: 80e9
    monkeypatch.setattr(train_py, "free_memory", gpu)
    assert not call(monkeypatch, train_py, *argv, "--estimate", "--device", "cpu")
    assert re.search(r"\d+ runs need about [\d.]+ GB of cpu memory", capsys.readouterr().out)
    monkeypatch.setattr(train_py, "free_memory", lambda device: 1e8)
    with pytest.raises(Refuse, match="of cpu memory are free, about"):
        call(monkeypatch, train_py, *argv, "--estimate", "--device", "cpu")
    assert not Path("runs").exists()


def test_the_other_recipes_lines_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = [c for c in COMMANDS if c not in CACHING + TRAINING]
    for command in others:
        module = importlib.import_module(shlex.split(command)[1].removesuffix(".py"))
        with pytest.raises(Refuse, match="no runs under runs/"):        # all that is wrong is that there are none here
            call(monkeypatch, module, *shlex.split(command)[2:])
    assert len(others) == 5


MEASURED = """
import importlib, re, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = [sys.argv.pop(1)]
train = importlib.import_module("02_train")
status = lambda key: 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
time.perf_counter = time.process_time          # times are told in CPU seconds: the machine's other work does not count
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = status("VmRSS")
code = train.main()
Path("peak.txt").write_text(str(status("VmHWM") - before))
sys.exit(code)
"""


def peak(folder, *argv):
    """(what 02_train.py said, bytes that it took at its peak beyond what its imports had), in a process of its own: one that has
    worked before holds memory that it uses again."""
    done = subprocess.run([sys.executable, "-c", MEASURED, str(ROOT), *map(str, argv)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, int(Path(folder, "peak.txt").read_text())


@pytest.mark.parametrize("variant, d_sae", [("topk", 6144), ("baseline", 6144), ("batch_topk", 3072)])
def test_memory_and_disk_are_what_was_said(tmp_path, variant, d_sae):
    """Memory within 30 %, a run's file within 1 %: biases and buffers are not counted."""
    from toys import write_cache
    write_cache(tmp_path / "acts" / "a", torch.randn(9_000, 512), rows_per_shard=8192, val=64)
    said, took = peak(tmp_path, "--acts", "a", "--variant", variant, "--set", f"d_sae={d_sae}", "l0=32", "--device", "cpu", "--steps", 4, "--snapshots", 0)
    memory, disk = (float(re.search(words, said)[1]) * 1e9 for words in (r"about ([\d.]+) GB of cpu memory", r"moments\), ([\d.]+) GB of disk"))
    assert memory / 1.3 < took < memory * 1.3, (memory, took)
    file, = (tmp_path / "runs").glob("*/sae.safetensors")
    assert file.stat().st_size == pytest.approx(8 * 512 * d_sae, rel=0.01) and file.stat().st_size == pytest.approx(disk, abs=5.1e6)


@pytest.mark.parametrize("variant", ["topk", "gated", "contrastive_r9", "topk_ortho_r8", "zscore_r9"])
def test_the_disk_that_runs_take_is_told_to_the_byte(tmp_path, monkeypatch, variant):
    """Also of variants that add parameters and buffers; what a file says of its tensors apart."""
    from toys import write_cache
    monkeypatch.chdir(tmp_path)
    acts = Acts(write_cache(tmp_path / "acts" / "a", torch.randn(3 * 128 + 64, 48), rows_per_shard=3 * 128, val=64))
    settings = {"d_sae": 64, "l0": 4.0, "batch_size": 128}
    call(monkeypatch, train_py, "--acts", "a", "--variant", variant, "--set", *(f"{k}={v:g}" for k, v in settings.items()), "--device", "cpu", "--snapshots", 1)
    files = [*tmp_path.glob("runs/*/sae.safetensors"), *tmp_path.glob("runs/*/snapshots/*")]
    run = train_py.Run(variant, settings, 0, acts, 3, 1, snapshots=1)
    assert len(files) == 2 and sum(f.stat().st_size - header(f) for f in files) == train_py.needs([run], acts, 128, torch.device("cpu"))[2]


def like_gemma(rows, seed=0):
    """Rows [n, 2304] with the statistics of Gemma-2-2B's layer 19: mean norm 308, gamma 0.89 (the mean's length over the deviation's), two dimensions
    far larger than the others; sums of about 60 of 4,096 directions."""
    from sae import generator, unit
    g = generator("gemma", seed)
    directions = unit(torch.randn(4096, 2304, generator=g))
    p = (torch.arange(4096) + 10.0) ** -0.8
    x = ((torch.rand(rows, 4096, generator=g) < (p * 60 / p.sum()).clamp(max=0.9)) * (1 + torch.rand(rows, 4096, generator=g))) @ directions
    x = x - x.mean(0)
    mean = torch.randn(2304, generator=g)
    mean[:2] = 30.0                                                     # outlier dimensions
    x = x / x.square().sum(1).mean().sqrt() + 0.89 * mean / mean.norm()
    return x * 308 / x.norm(dim=1).mean()


LOADED = 0.17e9                # bytes that libraries take when training begins, and no estimate counts: measured with an SAE of 16 latents
CLOCK = '''"""ticks = baseline + a clock that says how long a step takes: a second at first, three later."""
import time
from sae import SAE
now = [0.0]
time.perf_counter = lambda: now[0]
class Variant(SAE):
    def after_step(self, opt, out):
        super().after_step(opt, out)
        now[0] += 1 if self.progress < 0.1 else 3
'''


def test_the_time_that_is_left_is_told_after_ten_steps_and_again_after_a_quarter(tmp_path):
    """By then it knows what only later steps do, such as AuxK: it needs latents that were silent for a tenth of the run."""
    from toys import write_cache
    (tmp_path / "variants").mkdir()
    for name in ("sae.py", "02_train.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "variants" / "ticks.py").write_text(CLOCK)
    write_cache(tmp_path / "acts" / "a", torch.randn(96 * 32 + 64, 8), rows_per_shard=96 * 32, val=64)
    done = subprocess.run([sys.executable, "02_train.py", "--acts", "a", "--variant", "ticks", "--set", "d_sae=16", "l0=2", "batch_size=32", "--device", "cpu"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall(r"about (\d+) s for (\d+) more steps of 1 runs, from the time of (\d+) steps", done.stdout) == [("86", "86", "7"), ("216", "72", "12")]
    config, = (read_json(p) for p in tmp_path.glob("runs/*/config.json"))
    assert config["seconds"] == 10 + 3 * 86 and 3 * 72 == 216


@pytest.mark.slow
@pytest.mark.parametrize("d_sae, l0, batch, lr", [(2304, 80, 128, 1e-3), (16384, 80, 32, 3e-4), (65536, 320, 16, 1e-4)])
def test_full_width_trains_within_20_gb_and_takes_what_was_said(tmp_path, d_sae, l0, batch, lr):
    """In 8 epochs of 25 steps, so that it learns these few rows by heart at its recipe's learning rate. The time is what it told after a quarter of
    the steps, of those that were left; checkpoints are not in it."""
    from toys import write_cache
    steps = 200
    write_cache(tmp_path / "acts" / "a", like_gemma(batch * steps // 8 + 64), rows_per_shard=batch * 25, val=64)
    said, took = peak(tmp_path, "--acts", "a", "--variant", "topk", "--set", f"d_sae={d_sae}", f"l0={l0}", f"batch_size={batch}", f"lr={lr}",
                      "--epochs", 8, "--device", "cpu", "--snapshots", 0)
    told = [float(seconds.replace(",", "")) for seconds in re.findall(r"about ([\d,]+) s for", said)]
    memory = float(re.search(r"about ([\d.]+) GB of cpu memory", said)[1]) * 1e9
    folder, = (tmp_path / "runs").iterdir()
    config, log = read_json(folder / "config.json"), [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = {line["step"]: line["tokens"] / line["tokens_per_s"] for line in log}
    left = config["seconds"] - seconds[steps // 4]
    print(f"d_sae {d_sae}: told {told} s and {memory / 1e9:.2f} GB, took {config['seconds']:.0f} s, {left:.0f} of them after a quarter, and {took / 1e9:.2f} GB, "
          f"explained variance {[round(line['explained_variance'], 3) for line in log[::10]]}, {config['final']}")
    assert config["status"] == "done" and not config["void"] and took < 20e9 and took < 1.3 * memory + LOADED
    assert config["final"]["l0"] == pytest.approx(l0, rel=0.05) and config["final"]["mse"] < 0.8 * log[0]["mse"]
    assert told[-1] / 1.3 < left < told[-1] * 1.3

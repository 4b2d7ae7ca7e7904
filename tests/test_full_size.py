"""Promises about runs at full size: a ring of shards gives the same bits as the whole cache, several processes divide the labour, estimates hold, and
every command of variants/README.md parses and passes its pre-flight on models of the full shape."""
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from sae import Acts, Refuse, load_variant, read_json  # noqa: E402
from test_cache import WORDS, save, texts, tokenizer, write_jsonl  # noqa: E402

cache, train_py, plot = (importlib.import_module(name) for name in ("01_cache_acts", "02_train", "04_plot"))

SMALL = ["--variant", "topk", "baseline", "--set", "d_sae=32", "l0=3", "batch_size=32", "--device", "cpu"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "1", "HF_HUB_OFFLINE": "1"}


def call(monkeypatch, module, *argv):
    """A script in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    return module.main()


def script(folder, name, *argv, torchrun=0):
    """A script in a process of its own, or in as many as torchrun starts."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun), "--master-port", "0"] if torchrun else []
    return subprocess.Popen([sys.executable, *start, str(ROOT / name), *map(str, argv)], cwd=folder, env=ENV, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def ended(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err[-3000:]
    return out + err


def until(condition, *processes, seconds=240):
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop and all(p.poll() is None for p in processes), [p.communicate() for p in processes if p.poll() is not None]
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
    ended(script(folder, "01_cache_acts.py", *SYNTHETIC, "--window", 5 * SHARD))
    ended(script(folder, "02_train.py", "--acts", "synthetic", *SMALL))
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
    producer = script(tmp_path, "01_cache_acts.py", *SYNTHETIC, "--window", 5 * SHARD, "--ring", f"{RING / 1e3:.3f}KB")
    folder, most = tmp_path / "acts" / "synthetic", 0
    until(lambda: (folder / "meta.json").exists() and read_json(folder / "meta.json")["shards"], producer)
    assert RING < TOKENS * WIDTH / 2
    consumer = script(tmp_path, "02_train.py", "--acts", "synthetic", *SMALL)
    while producer.poll() is None or consumer.poll() is None:
        most = max(most, disk(folder))
        time.sleep(0.005)
    ended(producer), ended(consumer)
    assert most <= RING + 12 * 1000                                  # headers of the files apart
    assert weights(tmp_path) == weights(kept)
    for name in weights(kept):
        config, whole = (read_json(f / "runs" / name / "config.json") for f in (tmp_path, kept))
        assert config["identity"] == whole["identity"] and config["ring"] == int(RING) and whole["ring"] is None and config["window"] == whole["window"]
    assert [p.name for p in folder.glob("train_*")] == ["train_00000.safetensors"]      # read and deleted, but for the first
    again = script(tmp_path, "02_train.py", "--acts", "synthetic", *SMALL, "--seed", "1")
    assert "can be read once" in ended(again, 3)


def test_killed_at_any_time_producer_and_consumer_go_on_to_the_same_bits(kept, tmp_path):
    folder = tmp_path / "acts" / "synthetic"
    cached = lambda: script(tmp_path, "01_cache_acts.py", *SYNTHETIC, "--window", 5 * SHARD, "--ring", f"{RING / 1e3:.3f}KB")
    train = lambda: script(tmp_path, "02_train.py", "--acts", "synthetic", *SMALL)
    listed = lambda: len(read_json(folder / "meta.json")["shards"]) if (folder / "meta.json").exists() else 0
    producer = cached()
    until(lambda: listed() >= 10, producer)                             # the ring is full
    producer.kill()
    assert producer.wait() == -9
    consumer = train()
    until(lambda: (folder / "reader_0" / "read.json").exists() and read_json(folder / "reader_0" / "read.json")["shards"] == 10, consumer)
    time.sleep(1)
    consumer.send_signal(signal.SIGINT)                                 # it waits for shards that no producer makes: stops at once
    assert "interrupted" in ended(consumer, 130)
    producer, consumer = cached(), train()
    until(lambda: listed() >= 20, producer, consumer)
    consumer.kill(), producer.kill()
    assert consumer.wait() == producer.wait() == -9
    producer, consumer = cached(), train()
    ended(producer), ended(consumer)
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

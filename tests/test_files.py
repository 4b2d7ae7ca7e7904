"""Promises of the files between the stages: whole or not at all, checked when read, one line when
wrong."""
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from sae import (ROOT, Acts, Refuse, check_name, lock, natural, pick_device, positive_int,
                 read_json, read_tensors, run_folders, run_script, write_file, write_json,
                 write_tensors)
from toys import mixture, write_cache

TENSORS = {"acts": torch.randn(40, 8).bfloat16(), "tokens": torch.arange(40, dtype=torch.int32),
           "position": torch.arange(40, dtype=torch.int16), "empty": torch.zeros(0, 3),
           "one of a column": torch.arange(14)[::7][:1]}


def test_tensors_come_back_with_their_meta_also_through_a_kept_buffer(tmp_path):
    said = write_tensors(tmp_path / "a.safetensors", TENSORS, {"step": 7, "name": "ü"})
    buffer = torch.empty(10_000, dtype=torch.uint8)
    for kept in (None, buffer):
        tensors, meta = read_tensors(tmp_path / "a.safetensors", said, kept)
        assert meta["step"] == 7 and meta["name"] == "ü" and tensors.keys() == TENSORS.keys()
        assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype
                   for k, v in TENSORS.items())
    theirs = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(theirs[k], v) for k, v in TENSORS.items())
    first = buffer.data_ptr()
    assert first <= tensors["acts"].data_ptr() < first + len(buffer)      # views, no copies


@pytest.mark.parametrize("at", [0, 3, 60, 200, -1, -400])
def test_a_flipped_bit_and_a_cut_are_noticed(at, tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[at] ^= 4
    for blob in (flipped, whole[:at]):
        path.write_bytes(blob)
        with pytest.raises(Refuse, match="damaged"):
            read_tensors(path)


def test_json_comes_back_and_an_edit_or_a_missing_key_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1, "b": [1.5, None, "ü"]})
    assert read_json(path, "a") == {"a": 1, "b": [1.5, None, "ü"]}
    with pytest.raises(Refuse, match="no steps"):
        read_json(path, "steps")
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(Refuse, match="edited"):
        read_json(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"a": 1}', '{"checksum": 3}'])
def test_json_that_is_not_ours_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Refuse, match="damaged"):
        read_json(tmp_path / "a.json")


def test_nan_is_refused_before_the_file_is_touched(tmp_path):
    write_file(tmp_path / "a", b"old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a", {"x": float("nan")})
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def ended(main, stderr=os.devnull):
    """The exit code of main() in a process of its own, a fork, whose stderr goes to a file."""
    def run():
        sys.stderr = open(stderr, "w")
        main()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def test_a_write_killed_half_way_leaves_the_old_file_and_the_lock_removes_the_rest(tmp_path):
    """The process dies before the rename: os.replace is never called."""
    def die_half_way():
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_file(tmp_path / "a", b"new")

    write_file(tmp_path / "a", b"old")
    assert ended(die_half_way) == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"old" and list(tmp_path.glob(".a.*.tmp"))
    lock(tmp_path).release()
    assert not list(tmp_path.glob(".a.*.tmp"))


def test_a_disk_that_is_full_is_one_line(tmp_path):
    def fill_the_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        write_file(tmp_path / "there" / "a", bytes(5000))

    (tmp_path / "there").mkdir()
    assert ended(lambda: run_script(fill_the_disk), tmp_path / "stderr") == 4
    assert (tmp_path / "stderr").read_text().startswith("error: disk full while writing")
    assert not list((tmp_path / "there").iterdir())


def refuse():
    raise Refuse("no such run: a\nb", 2)


def interrupt():
    raise KeyboardInterrupt


def run_out_of_memory():
    raise MemoryError("12 GB")


def be_terminated():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


@pytest.mark.parametrize("main, code, says", [
    (refuse, 2, "error: no such run: a b\n"),
    (interrupt, 130, "interrupted: the same command goes on from what is saved\n"),
    (lambda: open("/nowhere/x"), 4, "error: /nowhere/x: No such file or directory\n"),
    (run_out_of_memory, 4, "error: out of memory: 12 GB\n"),
    (be_terminated, 130, "interrupted"),
    (lambda: 0, 0, ""),
])
def test_a_script_ends_in_one_line_and_a_code(main, code, says, tmp_path):
    assert ended(lambda: run_script(main), tmp_path / "stderr") == code
    said = (tmp_path / "stderr").read_text()
    assert said.startswith(says) and said.count("\n") == bool(says)


def test_a_reader_that_has_seen_enough_ends_a_script_quietly():
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sae\ndef main():\n"
              "    for i in range(100_000): print('line', i)\nsae.run_script(main)")
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "line 0\n"
    writer.stdout.close()
    assert writer.wait() == 0 and writer.stderr.read() == ""


def test_whole_numbers_on_the_command_line():
    import argparse
    assert positive_int("2_000_000") == 2_000_000 and natural("0") == 0
    for bad in ("0", "-1", "1.5", "x", "", "1e6", "9" * 40):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
            positive_int(bad)


@pytest.mark.parametrize("name", ["../x", ".hidden", "a/b", "", "x" * 300, "a b"])
def test_a_name_is_never_a_path(name):
    with pytest.raises(Refuse, match="want a name"):
        check_name("--name", name)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps", "cpu:0"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(Refuse, match="want cpu, or cuda"):
        pick_device(name)


def test_each_process_of_torchrun_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("cuda") == pick_device() == torch.device("cuda:3")
    assert pick_device("cuda:1") == torch.device("cuda:1")


def test_controls_are_no_runs_where_all_folders_are_named(tmp_path):
    names = ["topk-s0", "controls-tiny"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "topk-s0/config.json").touch()
    assert run_folders([tmp_path / name for name in names]) == [tmp_path / "topk-s0"]


# ---- a cache -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "acts" / "toy", mixture(n_rows=20_000)[0])


def edit(cache, **changes):
    meta = read_json(cache / "meta.json")
    write_json(cache / "meta.json", {**meta, **changes})


@pytest.mark.parametrize("changes, says", [
    ({"format": 1}, "has format 1, this is 2"), ({"complete": False}, "not finished"),
    ({"d_in": 31}, "cache again"), ({"dtype": "float32"}, "cache again")])
def test_a_cache_of_another_kind_is_refused(cache, changes, says):
    edit(cache, **changes)
    with pytest.raises(Refuse, match=says):
        Acts(cache).shard(0)


def test_a_shard_with_numbers_that_are_not_finite_is_refused(cache):
    shard = cache / "train_00000.safetensors"
    tensors = {k: v.clone() for k, v in read_tensors(shard)[0].items()}
    tensors["acts"][5, 3] = torch.inf
    meta = read_json(cache / "meta.json")
    meta["shards"][0]["checksum"] = write_tensors(shard, tensors)
    edit(cache, shards=meta["shards"])
    with pytest.raises(Refuse, match="not finite"):
        Acts(cache).shard(0)


def test_a_missing_or_foreign_shard_is_refused(cache):
    os.remove(cache / "train_00001.safetensors")
    with pytest.raises(Refuse, match="is missing"):
        Acts(cache).shard(1)
    (cache / "train_00001.safetensors").write_bytes(
        (cache / "train_00000.safetensors").read_bytes())
    with pytest.raises(Refuse, match="another cache"):
        Acts(cache).shard(1)

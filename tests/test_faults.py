"""Promises about faults: each ends in one clear line, what was finished stays, and nothing is silently wrong. Counts are printed at the end.

Kills, full disks and double starts are made by kills.py, in forks of one process; `-m slow` makes 200 kills and those of several processes."""
import argparse
import ast
import importlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sae
import test_cache
import test_eval
from sae import (ROOT, SAE, Acts, Refuse, load_run, load_variant, parse_settings, read_json, read_log, read_tensors, run_script, take_lock,
                 variant_names, whole, write_file, write_json)
from toys import build, mixture, steps, train_py, write_cache

cache_py, eval_py, plot_py = (importlib.import_module(name) for name in ("01_cache_acts", "03_eval", "04_plot"))
CPU = torch.device("cpu")
X = mixture(n_rows=6000)[0]
TOY = ["--set", "d_sae=64", "l0=4", "batch_size=256", "--device", "cpu"]


def kills(*flags):
    done = subprocess.run([sys.executable, ROOT / "tests" / "kills.py", *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def call(monkeypatch, capsys, module, *argv):
    """A script in this process -> (exit code, what it said on stderr)."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run_script(module.main)
    return e.value.code, re.sub(r".*\r", "", capsys.readouterr().err)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a cache `tiny` of 5,000 rows in 3 shards."""
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "acts" / "tiny", X, rows_per_shard=2000, val=1000)
    return tmp_path


# ---- killed, without room, started twice -----------------------------------------------------------------------------------------


def test_killed_without_room_or_started_twice_every_stage_ends_with_the_same_bytes(tell):
    said, err = kills("--kills", 8, "--stops", 8, "--limits", 300, "--rooms", 8, "--twice")
    report(tell, said)
    assert not lost(said), err + json.dumps(said)
    assert said["twice"]["refused"] >= 4 and all(sum(said[k]["tried"].values()) >= 8 for k in ("kills", "stops"))


@pytest.mark.slow
def test_two_hundred_kills_at_random_moments(tell):
    said, err = kills("--kills", 200, "--stops", 40, "--limits", 100, 300, 3000, 20_000, "--rooms", 0, 4, 16, 40, 100, "--twice", "--seed", 1)
    report(tell, said)
    assert not lost(said), err + json.dumps(said)


@pytest.mark.slow
def test_kills_of_a_ring_of_pairs_of_processes_and_of_saebench(tell):
    """Of producer and consumer, or of the processes that torchrun starts, one is struck and the others told to end; then torchrun itself is."""
    said, err = kills("--stage", "01_cache_acts by two", "02_train by two", "ring", "saebench", "--kills", 32, "--stops", 16, "--limits", 300, 20_000,
                      "--torchrun", "--seed", 1)
    report(tell, said)
    tell(f"torchrun or one of its processes ended: {said['torchrun']['tried']} tried, {len(said['torchrun']['lost'])} lost")
    assert not lost(said), err + json.dumps(said)


def lost(said):
    return [what for part in said.values() for what in part.get("lost", [])]


def report(tell, said):
    for key, what in (("kills", "kill -9"), ("stops", "Ctrl-C and SIGTERM")):
        tried = said[key]["tried"]
        tell(f"{what} at random moments: {sum(tried.values())} tried ({', '.join(f'{k} {v}' for k, v in tried.items())}), {len(said[key]['lost'])} lost")
    tell(f"full disks (file size limit{', tmpfs' if said['disks']['tmpfs'] else '; no tmpfs: mounting is not allowed here'}): "
         f"{said['disks']['tried']} tried, {len(said['disks']['lost'])} lost")
    if "twice" in said:
        tell(f"two processes at once: {said['twice']['tried']} tried, {said['twice']['refused']} second ones refused, {len(said['twice']['lost'])} lost")


def test_what_torchrun_started_ends_when_torchrun_is_killed(tmp_path):
    """kill -9 of the parent stops its process as SIGTERM does."""
    pid = os.fork()
    if not pid:
        os.environ["WORLD_SIZE"] = "2"
        if not os.fork():
            try:
                run_script(lambda: ((tmp_path / "begun").touch(), time.sleep(60)))
            except SystemExit as e:
                write_file(tmp_path / "ended", str(e.code).encode())
            os._exit(0)
        signal.pause()
    for name in ("begun", "ended"):
        until = time.monotonic() + 30
        while not (tmp_path / name).exists():
            assert time.monotonic() < until, name
            time.sleep(0.01)
        if name == "begun":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert (tmp_path / "ended").read_text() == "130"


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """write, fsync, rename, fsync of the folder; readable by whom the umask lets."""
    calls, real = [], {name: getattr(os, name) for name in ("fsync", "replace")}
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else os.fstat(fd).st_size), real["fsync"](fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), real["replace"](a, b)))
    write_file(tmp_path / "x", b"12345")
    assert calls == [5, "rename", "folder"]
    umask = os.umask(0o027)
    write_file(tmp_path / "y", b"1")
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "y").stat().st_mode) == 0o640


def test_a_lock_ends_with_its_process_and_names_it(tmp_path):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        lock = take_lock(tmp_path / "run")                     # noqa: F841
        (tmp_path / "run" / ".config.json.ab.tmp").touch()
        os.write(write, b"1")
        signal.pause()
    os.read(read, 1)
    with pytest.raises(Refuse, match=f"another process .{pid}.") as e:
        take_lock(tmp_path / "run")
    assert e.value.code == 6
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert take_lock(tmp_path / "run") and not list((tmp_path / "run").glob("*.tmp"))       # a stale lock is free, its leftovers are gone


# ---- 10,000 corruptions ----------------------------------------------------------------------------------------------------------


def corrupted(blob, others, rng):
    """(kind, changed bytes) of a file; `others`: files of the same kind."""
    n, at = len(blob), rng.randrange(len(blob))
    length = int.from_bytes(blob[:8], "little")
    is_json = length > n
    kinds = ["bit", "byte", "cut", "tail", "zero tail", "hole", "exchange", "other file"] + (["json"] * 4 if is_json else ["header"] * 4)
    kind, new = rng.choice(kinds), bytearray(blob)
    if kind == "bit":
        new[at] ^= 1 << rng.randrange(8)
    if kind == "byte":
        new[at] = rng.randrange(256)
    if kind == "cut":
        del new[at:]
    if kind == "tail":
        new += rng.randbytes(rng.randint(1, 40))
    if kind == "zero tail":
        new[at:] = bytes(n - at)
    if kind == "hole":
        new[at:at + 16] = bytes(len(new[at:at + 16]))
    if kind == "exchange":
        at, size = rng.randrange(n // 2), rng.randint(1, n // 4)
        new[at:at + size], new[at + n // 2 - size:at + n // 2] = new[at + n // 2 - size:at + n // 2], new[at:at + size]
    if kind == "other file":
        new = bytearray(rng.choice(others))
    if kind == "header":
        header = json.loads(blob[8:8 + length])
        entry = header[rng.choice([k for k in header if k != "__metadata__"])]
        edit = rng.choice(["shape", "dtype", "offsets", "name", "extra", "meta", "checksum", "blanks"])
        if edit == "shape":
            entry["shape"] = entry["shape"][::-1] if len(set(entry["shape"])) > 1 else entry["shape"] + [1]
        if edit == "dtype":
            entry["dtype"] = {"BF16": "F16", "F32": "I32", "I32": "F32", "I16": "F16"}.get(entry["dtype"], "I8")
        if edit == "offsets":
            entry["data_offsets"] = [entry["data_offsets"][0] + rng.choice([-2, 2]), entry["data_offsets"][1]]
        if edit == "name":
            header["renamed"] = header.pop(rng.choice([k for k in header if k != "__metadata__"]))
        if edit == "extra":
            header["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [n - 8 - length] * 2}
        if edit == "meta":
            header["__metadata__"] = rng.choice([{}, {"meta": "{}"}, {"meta": "[]"}, {"meta": header["__metadata__"]["meta"].replace('"format": 1', '"format": 2')}])
        if edit == "checksum":
            header["__metadata__"]["meta"] = re.sub(r'"checksum": "\w+"', '"checksum": "' + rng.randbytes(16).hex() + '"', header["__metadata__"]["meta"])
        text = json.dumps(header).encode() + b" " * (edit == "blanks") * rng.randint(1, 9)
        new = bytearray(len(text).to_bytes(8, "little") + text + blob[8 + length:])
    if kind == "json":
        value = json.loads(blob)
        key = rng.choice(list(value))
        edit = rng.choice(["remove", "rename", "number", "null", "list", "nan", "add"])
        if edit in ("remove", "rename"):
            old = value.pop(key)
            value |= {key + "x": old} if edit == "rename" else {}
        if edit == "number":
            number = rng.choice([k for k in value if isinstance(value[k], (int, float))])
            value[number] = value[number] + 1
        value |= {key: None} if edit == "null" else {"new": 1} if edit == "add" else {"rows": float("nan")} if edit == "nan" else {}
        new = bytearray(json.dumps([value] if edit == "list" else value).encode())
    return kind, bytes(new)


def same(a, b):
    """Whether two things read are equal, tensors bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """{name: (path, f() that reads it as the scripts do, files of the same kind)} of two caches, two finished runs and two interrupted ones."""
    place = tmp_path_factory.mktemp("victims")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tiny = write_cache(place / "acts" / "tiny", X[:600], rows_per_shard=128, val=100)
        other = write_cache(place / "acts" / "other", X[600:1200], rows_per_shard=128, val=100)
        write_json(other / "meta.json", {**read_json(other / "meta.json"), "model": {"name": "another"}})
        acts, runs = Acts(tiny), {}
        settings = {"d_sae": 32, "l0": 3.0, "batch_size": 64}
        for variant, seed in (("topk", 0), ("topk", 1), ("baseline", 0)):
            run = train_py.Run(variant, settings, seed, acts, 8, 1)
            run.start(acts, CPU)
            for step in range(8):
                run.sae.step = step
                run.train_on(acts.shard(0)["acts"][:64].float() * acts.scale, log_now=step in (3, 7))
                if step == 3:
                    run.save_checkpoint()
            checkpoint = (run.folder / "checkpoint.safetensors").read_bytes()
            run.finish()
            write_file(run.folder / "checkpoint.safetensors", checkpoint)
            runs[f"{variant}{seed}"] = place / run.folder
        run.lock.close()

        def resumed():
            """The checkpoint of topk0, loaded into a fresh run; None if it is taken for another run's, which starts over, and says so."""
            fresh = train_py.Run("topk", settings, 0, acts, 8, 1)
            fresh.folder = runs["topk0"]
            fresh.sae = fresh.cls(acts.d_in, 8, 0, **fresh.settings)
            fresh.opt = fresh.sae.make_optimizer()
            return {**train_py.pack(fresh.sae, fresh.opt)[0], "step": fresh.next_step} if fresh.load_checkpoint() else None

        blob = lambda *paths: [Path(p).read_bytes() for p in paths]
        run = runs["topk0"]
        others = [runs["topk1"], runs["baseline0"]]
        yield {
            "shard": (tiny / "train_00001.safetensors", lambda: Acts(tiny).shard(1),
                      blob(tiny / "train_00000.safetensors", other / "train_00001.safetensors", tiny / "val.safetensors", run / "sae.safetensors")),
            "meta.json": (tiny / "meta.json", lambda: vars(Acts(tiny)), blob(run / "config.json")),
            "checkpoint": (run / "checkpoint.safetensors", resumed, blob(*(o / "checkpoint.safetensors" for o in others), run / "sae.safetensors")),
            "sae.safetensors": (run / "sae.safetensors", lambda: load_run(run)[0].state_dict(),
                                blob(*(o / "sae.safetensors" for o in others), run / "checkpoint.safetensors", tiny / "train_00000.safetensors")),
            "config.json": (run / "config.json", lambda: load_run(run)[1], blob(others[0] / "config.json", tiny / "meta.json"))}


def test_of_ten_thousand_corruptions_none_is_silently_accepted(victims, tell):
    rng, count = random.Random(0), dict.fromkeys(("refused", "harmless", "silent", "crashed"), 0)
    wrong, by_safetensors = [], 0
    for name, (path, read, others) in victims.items():
        blob = path.read_bytes()
        want = read()
        for _ in range(2010):
            kind, new = corrupted(blob, others, rng)
            if new == blob:
                continue
            path.write_bytes(new)
            try:
                got = read()
                result = "refused" if got is None else "harmless" if same(got, want) else "silent"
            except Refuse as e:
                assert "\n" not in str(e)
                result = "refused"
            except Exception as e:
                result = "crashed"
                wrong.append((name, kind, repr(e)))
            count[result] += 1
            wrong += [(name, kind)] * (result == "silent")
            if name == "shard":                                # the same files by the library alone: the test has teeth
                try:
                    by_safetensors += not same(safetensors.torch.load(new), safetensors.torch.load(blob))
                except Exception:                              # noqa: S110 - refused
                    pass
        path.write_bytes(blob)
        assert same(read(), want)
    tell(f"corrupted shards, manifests, checkpoints, SAEs and configs: {sum(count.values())} tried, {count['refused']} refused, {count['harmless']} with the "
         f"same contents, {count['silent']} silently accepted, {count['crashed']} crashes (safetensors alone accepts {by_safetensors} of 2,010 shards)")
    assert count["silent"] == count["crashed"] == 0, wrong[:5]
    assert sum(count.values()) >= 10_000 and by_safetensors > 300


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blob=st.binary(max_size=400))
def test_any_bytes_in_a_shards_place_are_refused(tmp_path, blob):
    folder = write_cache(tmp_path / "a", X[:100], val=20) if not (tmp_path / "a").exists() else tmp_path / "a"
    (folder / "train_00000.safetensors").write_bytes(blob)
    with pytest.raises(Refuse, match="train_00000"):
        Acts(folder).shard(0)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(st.text() | st.sampled_from(["complete", "shards", "d_in"]), JSON))
def test_any_json_of_ours_in_a_manifests_place_is_refused(tmp_path, value):
    """Also with a right checksum of itself."""
    write_json(tmp_path / "meta.json", value)
    with pytest.raises(Refuse):
        Acts(tmp_path)


@settings(max_examples=200)
@given(number=st.floats(1e-30, 1e30) | st.integers(1, 10**9))
def test_a_setting_is_read_as_python_writes_it(number):
    assert parse_settings(SAE, [f"lr={number!r}"])["lr"] == number
    if isinstance(number, int):
        assert parse_settings(SAE, [f"batch_size={number}"])["batch_size"] == number == whole(f"{number:_}") if number <= 10**9 else True


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_fills_while_torch_saves_is_told_in_a_line_and_blames_no_run():
    """SAEBench saves so, and torch's exception is not the system's."""
    save = "torch.save(torch.zeros(10 ** 6), '/dev/full')"
    done = subprocess.run([sys.executable, "-c", f"import torch, sae; sae.run_script(lambda: {save})"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4 and done.stderr.startswith("error: disk full while writing a file") and done.stderr.count("\n") == 1
    with pytest.raises(RuntimeError) as raised:
        torch.save(torch.zeros(10 ** 6), "/dev/full")
    assert importlib.import_module("03_eval").is_machines(raised.value)


@settings(max_examples=300)
@given(text=st.text(max_size=12) | st.from_regex(r"[\d_.eE+-]{1,12}", fullmatch=True))
def test_any_text_is_a_whole_number_or_refused(text):
    try:
        assert 1 <= whole(text) == int(text) <= sae.LARGEST and text.isascii()
    except argparse.ArgumentTypeError as e:
        assert repr(text)[1:-1] in str(e)


def test_names_in_files_are_never_paths(here):
    meta = read_json("acts/tiny/meta.json")
    shutil.copy("acts/tiny/train_00000.safetensors", "train_00000.safetensors")
    meta["shards"][0]["file"] = "../../train_00000.safetensors"
    write_json("acts/tiny/meta.json", meta)
    with pytest.raises(Refuse, match="names '../../train"):
        Acts("acts/tiny")
    run = dict(status="done", variant="topk", acts="../../elsewhere", settings={}, seed=0, name="x")
    write_json("runs/x/config.json", run)
    for read in (load_run, lambda f: plot_py.Run(Path(f))):
        with pytest.raises(Refuse, match="'../../elsewhere'"):
            read("runs/x")


# ---- numbers gone wrong ----------------------------------------------------------------------------------------------------------


def test_a_spike_in_the_data_does_not_reach_the_weights(here):
    """One row of 10,000 times the usual length, in the middle or where training starts from: its step is refused and counted, the run is sound."""
    straight = trained(here, X)
    for row in (5, 2100):
        spiked = X.clone()
        spiked[row] *= 1e4
        config, tensors = trained(here, spiked)
        assert config["refused"] == config["epochs"] == 4 and config["status"] == "done" and not config["void"]
        assert all(v.isfinite().all() for v in tensors.values())
        assert config["final"]["explained_variance"] == pytest.approx(straight[0]["final"]["explained_variance"], abs=0.03)
        assert (tensors["b_dec"] - straight[1]["b_dec"]).norm() < 0.1 * straight[1]["b_dec"].norm()
    assert straight[0]["refused"] == 0


def trained(here, x):
    """(config, weights) of topk on rows x; the scale is that of rows without spikes, as a cache's is."""
    shutil.rmtree(here / "acts")
    shutil.rmtree(here / "runs", ignore_errors=True)
    write_cache(here / "acts" / "tiny", x, rows_per_shard=2000, val=1000)
    meta = read_json("acts/tiny/meta.json")
    write_json("acts/tiny/meta.json", {**meta, "scale": 32 ** 0.5 / float(x.norm(dim=1).median())})
    acts = Acts("acts/tiny")
    plan = train_py.plan_steps(acts, 256, 4)
    run = train_py.Run("topk", {"d_sae": 64, "l0": 4.0, "batch_size": 256}, 0, acts, sum(n for *_, n in plan), 4)
    run.start(acts, CPU)
    train_py.train([run], acts, plan, 256, CPU, 60)
    return run.config, read_tensors(run.folder / "sae.safetensors")[0]


def test_a_spike_refuses_the_step_and_leaves_every_state_alone():
    sae_, opt = build("batch_topk", X)
    steps(sae_, opt, X, stop=3)
    before = {k: v.clone() for k, v in {**sae_.state_dict(), **train_py.pack(sae_, opt)[0]}.items()}
    for bad in (1e6, float("nan"), float("-inf")):
        x = X[:256].clone()
        x[9, 3] = bad
        sae_.step = 3
        assert not train_py.train_step(sae_, opt, x)[2]
        assert same({**sae_.state_dict(), **train_py.pack(sae_, opt)[0]}, before)


VOID = '"""mute = baseline + no latent ever fires."""\nfrom sae import SAE\n\n\nclass Variant(SAE):\n    aux_weight = 0.0\n\n    def activate(self, pre):\n        return pre * 0\n'


def test_a_void_run_is_marked_in_every_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test_eval.truth_cache(tmp_path / "acts" / "tiny")
    for name in ("sae.py", "02_train.py", "03_eval.py", "04_plot.py"):
        shutil.copy(ROOT / name, name)
    write_file("variants/mute.py", VOID.encode())
    test_cache.write_jsonl(Path("ignored.jsonl"), ["x"])
    driver = "import sys, importlib; sys.path.insert(0, '.'); sys.argv = sys.argv[1:]; from sae import run_script; run_script(importlib.import_module(sys.argv[0][:-3]).main)"
    script = lambda *argv: subprocess.run([sys.executable, "-c", driver, *argv], capture_output=True, text=True)
    trained = script("02_train.py", "--variant", "mute", *TOY)
    assert trained.returncode == 5 and "VOID: no latent fires" in trained.stdout, trained.stdout + trained.stderr
    config = read_json(next(Path("runs").glob("mute*/config.json")))
    assert config["status"] == "done" and config["void"][0] == "no latent fires"
    evaluated = script("03_eval.py", "--eval", "core", "--device", "cpu")
    assert "invalid, G36 void since training: no latent fires" in evaluated.stdout, evaluated.stdout + evaluated.stderr
    (result,) = (read_json(path) for path in Path("runs").glob("mute*/eval/core.json"))
    assert ("G36", "fatal") in [(g["id"], g["level"]) for g in result["guards"]]
    script("04_plot.py")
    assert "G36" in Path("plots/results.md").read_text() and "void since training: no latent fires" in Path("plots/results.md").read_text()
    again = script("02_train.py", "--variant", "mute", *TOY)
    assert again.returncode == 5 and "finished already" in again.stdout


# ---- out of memory ---------------------------------------------------------------------------------------------------------------


class Greedy:
    """Stands before a real function: raises torch.OutOfMemoryError, as CUDA does, for more than `most` rows; `sizes` that it saw."""

    def __init__(self, real, most, rows):
        self.real, self.most, self.rows, self.sizes = real, most, rows, []

    def __call__(self, *args, **kwargs):
        self.sizes.append(self.rows(*args, **kwargs))
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.real(*args, **kwargs)


def test_out_of_memory_halves_the_language_models_batch_and_caches_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    test_cache.save(tmp_path / "m")
    test_cache.write_jsonl(tmp_path / "t.jsonl", test_cache.texts())
    ask = ["--model", "m", "--data", "t.jsonl", "--device", "cpu", *test_cache.SMALL]
    assert call(monkeypatch, capsys, cache_py, *ask, "--name", "plain", "--batch", 3)[0] == 0
    block = transformers.models.gpt2.modeling_gpt2.GPT2Block
    greedy = Greedy(block.forward, 3, lambda self, hidden, *a, **k: len(hidden))
    monkeypatch.setattr(block, "forward", lambda *a, **k: greedy(*a, **k))
    assert call(monkeypatch, capsys, cache_py, *ask, "--name", "small", "--batch", 12)[0] == 0
    assert 3 in greedy.sizes and greedy.sizes[0] > 3 and 6 in greedy.sizes
    plain, small = ({p.name: p.read_bytes() for p in Path(f"acts/{n}").glob("train_*")} for n in ("plain", "small"))
    assert plain == small
    greedy.most = 0
    code, said = call(monkeypatch, capsys, cache_py, *ask, "--name", "none", "--batch", 4)
    assert code == 4 and "out of memory with one context" in said


def test_out_of_memory_in_a_training_step_falls_back_to_micro_batches_with_the_same_result(capsys):
    class Greedy(SAE):
        activation = "topk"

        def pre_acts(self, x):
            if len(x) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().pre_acts(x)

    ends = []
    for most, micro in ((999, 1), (999, 4), (64, 1)):
        Greedy.most = 8192                                     # init_from_data
        sae_, opt = build(Greedy, X, 20, micro_batches=micro)
        Greedy.most = most
        steps(sae_, opt, X)
        ends.append({k: v.clone() for k, v in sae_.state_dict().items()})
    assert "out of memory" in capsys.readouterr().err and sae_.micro_batches == 4
    assert same(ends[1], ends[2])                              # as if it had been asked for
    assert all(torch.allclose(ends[0][k].float(), ends[2][k].float(), atol=1e-4) for k in ends[0])
    Greedy.most = 0
    with pytest.raises(Refuse, match="a row at a time"):
        train_py.train_step(sae_, opt, X[:256])


def test_out_of_memory_gives_every_variant_the_bits_of_the_micro_batches_that_it_falls_back_to(capsys):
    """Memory ends when the losses of the whole batch are there already: what that changed must not count twice."""
    for name in variant_names():
        class Greedy(load_variant(name)):
            def losses(self, out):
                terms = super().losses(out)
                if len(out.x) > self.most:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return terms

        ends = []
        for most, micro in ((9999, 2), (128, 1)):
            Greedy.most = 9999
            sae_, opt = build(Greedy, X, 12, micro_batches=micro)
            Greedy.most = most
            steps(sae_, opt, X)
            ends.append(sae_.state_dict())
        assert sae_.micro_batches == 2 and same(*ends), name
    assert capsys.readouterr().err.count("out of memory") == len(variant_names())


def test_out_of_memory_in_an_evaluation_halves_its_batches(tmp_path, monkeypatch, capsys):
    test_eval.language_cache(tmp_path / "acts" / "toy")
    acts = Acts(tmp_path / "acts" / "toy")
    run = test_eval.as_run(test_eval.some_sae(acts))
    plain = eval_py.evaluate_core(eval_py.HeldOut(acts, CPU), [run], {})[run]["metrics"]
    block = transformers.models.gpt2.modeling_gpt2.GPT2Block
    greedy = Greedy(block.forward, 5, lambda self, hidden, *a, **k: len(hidden))
    monkeypatch.setattr(block, "forward", lambda *a, **k: greedy(*a, **k))
    held_out = eval_py.HeldOut(acts, CPU)
    failures = {}
    metrics = eval_py.in_memory(eval_py.evaluate_core, held_out, [run], failures)[run]["metrics"]
    assert not failures and greedy.sizes[0] == 20 and max(greedy.sizes[-8:]) <= 5
    assert all(metrics[k] == pytest.approx(plain[k], rel=1e-4, abs=1e-5) for k in plain if isinstance(plain[k], float))
    greedy.most = 0
    with pytest.raises(Refuse, match="one context at a time"):
        eval_py.in_memory(eval_py.evaluate_core, held_out, [run], failures)


def test_memory_that_the_machine_lacks_is_one_line(monkeypatch, capsys):
    class Script:
        @staticmethod
        def main():
            torch.empty(10**17)                                # the CPU's allocator raises a plain RuntimeError
    code, said = call(monkeypatch, capsys, Script)
    assert code == 4 and said.startswith("error: out of memory") and said.count("\n") == 1


# ---- reproducible ----------------------------------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_the_hash_seed(tmp_path):
    """Caching and training in two processes with different PYTHONHASHSEED."""
    made = []
    for seed in ("0", "42"):
        place = tmp_path / seed
        place.mkdir()
        test_cache.save(place / "m")
        test_cache.write_jsonl(place / "t.jsonl", test_cache.texts(300))
        code = f"""
import sys, importlib
sys.path.insert(0, {str(ROOT)!r})
for name, argv in (("01_cache_acts", "--model m --data t.jsonl --ctx 8 --rows-per-shard 1024 --tokens 5000 --val-tokens 64 --name tiny --device cpu"),
                   ("02_train", "--variant baseline jumprelu --set d_sae=48 l0=4 batch_size=64 --device cpu")):
    sys.argv = [name + ".py", *argv.split()]
    assert not importlib.import_module(name).main()
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True,
                              env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        made.append({str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*.safetensors")})
    assert made[0] == made[1] and len(made[0]) > 8


def test_bits_do_not_depend_on_the_number_of_reading_threads(here, monkeypatch):
    ends = []
    for threads in (1, 4):
        monkeypatch.setattr(train_py, "ThreadPoolExecutor", lambda n, threads=threads: ThreadPoolExecutor(threads))
        shutil.rmtree("runs", ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["02_train.py", "--variant", "topk", "--epochs", "3", *TOY])
        assert train_py.main() == 0
        ends.append(next(Path("runs").glob("*/sae.safetensors")).read_bytes())
    assert ends[0] == ends[1]


def test_a_config_records_what_ran_on_what(here, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["02_train.py", "--variant", "topk", *TOY])
    train_py.main()
    config = read_json(next(Path("runs").glob("*/config.json")))
    ask = lambda *a: subprocess.run(["git", "-C", ROOT, *a], capture_output=True, text=True).stdout.strip()
    assert config["acts_checksum"] == Acts("acts/tiny").checksum and config["device"] == "cpu"
    assert config["commit"] == (ask("rev-parse", "HEAD") or None)
    assert not config["commit"] or config["dirty"] == bool(ask("status", "--porcelain", "--untracked-files=no"))
    assert config["versions"]["torch"] == torch.__version__ and config["versions"]["threads"] == torch.get_num_threads()


def test_resuming_without_any_part_of_the_state_would_be_noticed():
    """The resume tests can fail: with a part of the state left at its start, the end has other bits."""
    fresh = lambda: build("baseline", X, 60, d_sae=256, l0=1.0, dead_after=0.05, sparsity_warmup=0.0)
    straight, opt = fresh()
    start = train_py.pack(straight, opt)[0]
    start = {k: v.clone() for k, v in start.items()}
    steps(straight, opt, X, stop=55)
    tensors, plain = train_py.pack(straight, opt)
    tensors = {k: v.clone() for k, v in tensors.items()}
    steps(straight, opt, X, start=55)
    for dropped in (None, "exp_avg", "exp_avg_sq", "step", "silent", "rate", "weight_now", "l0_now", "b_enc"):
        sae_, opt = fresh()
        left = {k: start.get(k, torch.zeros_like(v)) if k.split(".")[-1] == dropped else v for k, v in tensors.items()}
        train_py.unpack(sae_, opt, left, plain)
        steps(sae_, opt, X, start=55)
        assert same(sae_.state_dict(), straight.state_dict()) == (dropped is None), dropped


# ---- wrong flags -----------------------------------------------------------------------------------------------------------------

WRONG = ["", "x y", "../x", "/etc/passwd", "..", "-1", "0x10", "1e400", "nan", "9" * 40, "9" * 400, "a" * 300, "None", "\u0663", "topk\n", "x=1=2", "lr=", "=3", "__class__=1"]
NAMES = [value for value in WRONG if re.fullmatch(r"[\w-][\w.-]{0,95}", value, re.ASCII)]          # which a folder or a repository of the hub may have
RIGHT = {("01", "--split"): WRONG, ("01", "--config"): WRONG, ("01", "--name"): [n for n in NAMES if n != "-1"], ("01", "--model"): [*NAMES, "\u0663"], ("01", "--data"): [*NAMES, "..", "\u0663"], ("04", "--out"): WRONG[1:]}
SCRIPTS = {"01": cache_py, "02": train_py, "03": eval_py, "04": plot_py}
SWITCHES = {"--help", "--pack", "--no-pack", "--trust-remote-code", "--resume", "--list", "--controls", "--force"}


def flags_of(monkeypatch, capsys, module):
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit) as e:
        module.main()
    assert e.value.code == 0
    return sorted(set(re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.M)))


@pytest.mark.parametrize("number", SCRIPTS)
def test_every_flag_refuses_every_wrong_value_in_one_line_with_code_2(here, monkeypatch, capsys, tell, number):
    """Each flag that --help names, with values that are empty, of another type, negative, huge, a path or not a number."""
    module, base = SCRIPTS[number], []
    test_cache.save(here / "m")
    test_cache.write_jsonl(here / "t.jsonl", test_cache.texts())
    if number == "01":
        base = ["--model", "m", "--data", "t.jsonl", *test_cache.SMALL, "--device", "cpu"]
    before = test_cache.contents(here)
    tried = 0
    cases = [(flag, value) for flag in flags_of(monkeypatch, capsys, module) if flag not in SWITCHES for value in WRONG]
    cases += [("--nonsense", None), ("--see", "1"), ("--device", "tpu"), ("--device", "cuda:99")] + [(flag, "x") for flag in ("--resume", "--force") if number != "04"]
    cases += [("runs/none", None), ("", None), ("t.jsonl", None)] if number in ("03", "04") else []
    for flag, value in cases:
        if value in RIGHT.get((number, flag), ()):
            continue
        argv = [*base, flag] if value is None else [*base, f"{flag}={value}"] if flag.startswith("--") else [*base, flag, value]
        code, said = call(monkeypatch, capsys, module, *argv)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said and len(said) < 900, (flag, value, code, said)
        tried += 1
    after = test_cache.contents(here)
    assert {k: v for k, v in after.items() if not k.endswith(".lock")} == before
    tell(f"wrong values of the flags of script {number}: {tried} tried, {tried} refused in one line with code 2")


@pytest.mark.parametrize("number, argv, says", [
    ("01", ["--model", "none", "--name", "../x"], "--name '../x'"),
    ("01", ["--model", "none", "--data", "none.txt", "--dtype", "float8"], "--dtype"), ("02", ["--acts", "../x", "--variant", "topkk"], "--acts"),
    ("02", ["--variant", "topkk"], "did you mean topk"), ("02", ["--set", "l00=3"], "did you mean l0?"), ("02", ["--set", "activation=tanh"], "want relu, topk"),
    ("02", ["--sweep", "l0=3,-3"], "l0=-3"), ("02", ["--sweep", "batch_size=256,512"], "share their batches"), ("02", ["--epochs", "20_000"], "at most 10000"),
    ("03", ["--eval", "coree"], "invalid choice: 'coree'"), ("03", ["runs/none", "--contexts", "-3"], "--contexts"), ("04", ["--metric", "x"], "--metric"),
    ("04", ["runs/none", "--reference", "x"], "--reference")])
def test_a_wrong_name_or_setting_is_told_before_files_are_looked_for(tmp_path, monkeypatch, capsys, number, argv, says):
    """In an empty folder, where nothing of what the stage reads exists."""
    monkeypatch.chdir(tmp_path)
    code, said = call(monkeypatch, capsys, SCRIPTS[number], *argv)
    assert code == 2 and says in said and said.count("\n") == 1 and not list(tmp_path.iterdir()), said


@pytest.mark.parametrize("number, blocked", [("01", "acts"), ("02", "runs"), ("04", "plots")])
def test_a_folder_that_cannot_be_written_is_one_line(here, monkeypatch, capsys, number, blocked):
    """A file stands where the folder should be made: also root can't write there."""
    test_cache.save(here / "m")
    test_cache.write_jsonl(here / "t.jsonl", test_cache.texts())
    if number == "04":
        write_json("runs/x/config.json", dict(status="failed", reason="why", variant="topk", acts="tiny", settings={}, seed=0, name="x"))
    shutil.move("acts", "elsewhere")
    if number != "01":
        os.symlink("elsewhere", "acts")
    Path(blocked).touch()
    argv = {"01": ["--model", "m", "--data", "t.jsonl", *test_cache.SMALL], "02": ["--variant", "topk", *TOY], "04": []}[number]
    code, said = call(monkeypatch, capsys, SCRIPTS[number], *argv)
    assert code in (2, 4) and said.startswith("error: ") and blocked in said and said.count("\n") == 1, said


def test_a_folder_deleted_while_training_is_one_line_and_the_others_go_on(here, capsys):
    acts = Acts("acts/tiny")
    plan = train_py.plan_steps(acts, 256, 1)
    runs = [train_py.Run(v, {"d_sae": 64, "l0": 4.0, "batch_size": 256}, 0, acts, sum(n for *_, n in plan), 1) for v in ("topk", "batch_topk")]
    for run in runs:
        run.start(acts, CPU)
    shutil.rmtree(runs[0].folder)
    train_py.train(runs, acts, plan, 256, CPU, 60)
    assert "was deleted while it was trained" in capsys.readouterr().err and not runs[0].folder.exists()
    assert runs[1].config["status"] == "done" and not runs[1].failure


def test_a_log_that_was_cut_short_is_noticed(here, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["02_train.py", "--variant", "topk", *TOY])
    train_py.main()
    (folder,) = Path("runs").iterdir()
    config, log = read_json(folder / "config.json"), folder / "metrics.jsonl"
    lines = read_log(folder, config)
    assert lines[-1] == config["final"]
    log.write_bytes(log.read_bytes()[:-30])
    with pytest.raises(Refuse, match="metrics.jsonl is damaged"):
        read_log(folder, config)
    del config["log_checksum"]                                 # as of a run that is being trained: the line being written is left out
    assert read_log(folder, config) == lines[:-1]


# ---- untrusted files -------------------------------------------------------------------------------------------------------------


def test_no_pickle_and_no_remote_code_unless_asked_for():
    for path in [*ROOT.glob("*.py"), *(ROOT / "variants").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [a.name for a in node.names] + [getattr(node, "module", "")] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            told = {k.arg: ast.unparse(k.value) for k in node.keywords} if called else {}
            assert not {"pickle", "joblib", "dill", "marshal", "shelve"} & set(imported), path
            assert called not in ("eval", "exec", "torch.load", "np.load", "numpy.load"), f"{path}:{node.lineno}"
            assert not {"allow_pickle", "weights_only"} & set(told) and told.get("trust_remote_code") != "True", f"{path}:{node.lineno}"


def test_weights_in_a_pickle_are_not_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = test_cache.save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    test_cache.write_jsonl(tmp_path / "t.jsonl", test_cache.texts())
    ask = ["--model", "m", "--data", "t.jsonl", "--device", "cpu", *test_cache.SMALL]
    code, said = call(monkeypatch, capsys, cache_py, *ask)
    assert code and said.startswith("error: model m") and said.count("\n") == 1
    assert call(monkeypatch, capsys, cache_py, *ask, "--trust-remote-code")[0] == 0


def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    test_cache.save(tmp_path / "m")
    config = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}))
    Path("m/mine.py").write_text("open('ran', 'w')\nimport transformers\nclass Mine(transformers.PretrainedConfig): pass\n")
    test_cache.write_jsonl(tmp_path / "t.jsonl", test_cache.texts())
    code, said = call(monkeypatch, capsys, cache_py, "--model", "m", "--data", "t.jsonl", "--device", "cpu", *test_cache.SMALL)
    assert code and said.startswith("error: model m") and said.count("\n") == 1 and not Path("ran").exists()


def test_a_language_model_that_changed_after_caching_is_not_evaluated_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    test_cache.save(tmp_path / "m")
    test_cache.write_jsonl(tmp_path / "t.jsonl", test_cache.texts())
    assert call(monkeypatch, capsys, cache_py, "--model", "m", "--data", "t.jsonl", "--device", "cpu", *test_cache.SMALL)[0] == 0
    meta = Acts("acts/m").meta
    assert eval_py.LanguageModel(meta, CPU).vocab == 204
    test_cache.save(tmp_path / "m", seed=1)
    with pytest.raises(Refuse, match="m has changed since its activations were cached"):
        eval_py.LanguageModel(meta, CPU)


def test_a_torchvision_of_another_torch_is_one_line(tmp_path):
    """It breaks transformer_lens and sae_lens deep inside; the line names the first cause."""
    write_file(tmp_path / "torchvision" / "__init__.py", b'raise RuntimeError("operator torchvision::nms does not exist")\n')
    done = subprocess.run([sys.executable, ROOT / "01_cache_acts.py", "--model", "synthetic", "--tokens", "2000"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 4 and done.stderr.count("\n") == 1, done.stderr[-2000:]
    assert done.stderr.startswith("error: sae_lens does not load (RuntimeError: operator torchvision::nms") and "torchvision must be built for torch" in done.stderr


def test_a_scratch_file_damaged_between_two_runs_is_noticed(tmp_path, monkeypatch, capsys):
    """What an interrupted caching had appended already is checked before it becomes a shard."""
    monkeypatch.chdir(tmp_path)
    test_cache.save(tmp_path / "m")
    test_cache.write_jsonl(tmp_path / "t.jsonl", test_cache.texts())
    ask = ["--model", "m", "--data", "t.jsonl", "--device", "cpu", *test_cache.SMALL]

    def stop(self):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(cache_py.Cache, "finish", stop)
        assert call(patch, capsys, cache_py, *ask)[0] == 130
    bucket = sorted(Path("acts/m/scratch").glob("*.raw"))[3]
    blob = bytearray(bucket.read_bytes())
    blob[100] ^= 1
    bucket.write_bytes(blob)
    code, said = call(monkeypatch, capsys, cache_py, *ask)
    assert code == 3 and bucket.name in said and "damaged" in said


@pytest.mark.slow
def test_a_hostile_environment_changes_nothing(tmp_path):
    """ASCII output, another time zone, a strict umask: all four stages run."""
    test_cache.save(tmp_path / "m")
    test_cache.write_jsonl(tmp_path / "t.jsonl", test_cache.texts(300))
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "TZ": "Pacific/Kiritimati", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for argv in (["01_cache_acts.py", "--model", "m", "--data", "t.jsonl", "--ctx", "8", "--tokens", "4000", "--val-tokens", "64", "--name", "tiny"],
                 ["02_train.py", "--variant", "topk", "--set", "d_sae=48", "l0=4", "batch_size=64"], ["03_eval.py", "--eval", "core", "features"], ["04_plot.py"]):
        done = subprocess.run([sys.executable, ROOT / argv[0], *argv[1:]], cwd=tmp_path, env=env, umask=0o077, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "plots" / "results.md").stat().st_mode & 0o077 == 0


def test_a_ctrl_c_that_meets_a_destructor_is_not_lost():
    """Python drops what is raised there; the script must end all the same, in one line."""
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from sae import run_script

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

def main():
    Dropped()
    time.sleep(20)
    print("went on")

run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done
    assert done.stderr.startswith("interrupted:")


@pytest.mark.parametrize("after", ["torch.tensor(Rows())", "try: torch.tensor(Rows())\n    except ValueError as e: raise Refuse('the model does not load') from e",
                                   "try: torch.tensor(Rows())\n    except ValueError: time.sleep(20)"])
def test_a_ctrl_c_that_meets_c_code_is_not_lost(after):
    """torch makes a ValueError of whatever is raised while it looks at a sequence's first item, and the caller may take that for a fault or go on."""
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from sae import Refuse, run_script

class Rows:
    def __len__(self):
        return 1

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return 1.0

def main():
    {after}
    print("went on")

run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done
    assert done.stderr.startswith("interrupted:")


def test_a_ctrl_c_that_became_another_exception_fails_no_run(tmp_path, monkeypatch):
    acts = Acts(write_cache(tmp_path / "acts" / "tiny", X[:600], rows_per_shard=128, val=100))
    run = train_py.Run("topk", {"d_sae": 32, "l0": 3.0, "batch_size": 64}, 0, acts, 4, 1)
    monkeypatch.setattr(train_py.interrupt, "came", True)
    with pytest.raises(ValueError), run.blamed("decode"):
        raise ValueError("could not determine the shape of object type")
    assert not run.failure and "status" not in run.config


@pytest.mark.skipif(sys.platform != "linux", reason="of GNU's OpenMP")
@pytest.mark.parametrize("script", ["01_cache_acts.py", "02_train.py", "03_eval.py"])
def test_threads_that_wait_spin_for_a_moment_only(script):
    """As OpenMP itself says, once it is loaded: it reads the environment then, and not again."""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | {"OMP_DISPLAY_ENV": "VERBOSE"}
    said = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, env=env).stderr
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said)) == {"1000"}


@pytest.mark.parametrize("script", ["01_cache_acts.py", "02_train.py", "03_eval.py", "04_plot.py"])
def test_a_ctrl_c_while_libraries_load_just_ends_the_script(tmp_path, script):
    """It dies of the signal, which a shell calls 130 (Ctrl-C) or 143 (SIGTERM), and says nothing."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        (tmp_path / "torch.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(sign)})\ntime.sleep(20)\nprint('went on')\n")
        done = subprocess.run([sys.executable, ROOT / script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (-sign, "", "")


def test_a_ctrl_c_while_python_ends_just_ends_it():
    """After main() has ended: here in an exit handler, as libraries have them."""
    code = f"""
import atexit, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from sae import run_script
atexit.register(time.sleep, 20)
atexit.register(os.kill, os.getpid(), signal.SIGINT)
run_script(lambda: print("done", flush=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "done\n", "")

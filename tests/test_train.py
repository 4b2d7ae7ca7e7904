"""Promises of 02_train.py: one pass for all runs, exact resume, folders that say what ran, one-line
errors."""
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae import (ROOT, SAE, Acts, Refuse, load_run, pick_device, read_json, read_log, read_tensors,
                 write_json)
from toys import mixture, train_py, write_cache

X = mixture(n_rows=20_000)[0]                        # 15,904 rows to train on: 62 steps of 256
SMALL = ["--set", "d_sae=64", "l0=4", "batch_size=256"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a cache `tiny`, the working directory."""
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "acts" / "tiny", X)
    return tmp_path


def call(monkeypatch, *args):
    """02_train.main() with these arguments; its exit code."""
    monkeypatch.setattr(sys, "argv", ["02_train.py", *args])
    return train_py.main()


def script(here, *args):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}        # as conftest.py: bits depend on it
    return subprocess.Popen([sys.executable, ROOT / "02_train.py", *args], cwd=here, text=True,
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def weights(run):
    return read_tensors(Path("runs") / run / "sae.safetensors")[0]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_one_pass_serves_all_runs_and_company_changes_none(here, monkeypatch):
    reads = []
    plain = Acts.shard
    monkeypatch.setattr(Acts, "shard", lambda acts, i, buffer=None: (
        reads.append(buffer is not None), plain(acts, i, buffer))[1])
    assert call(monkeypatch, "--variant", "baseline", "topk", "--seed", "0", "1", *SMALL) == 0
    assert sum(reads) == 2                           # each shard once for four runs
    names = sorted(p.name for p in Path("runs").iterdir())
    together = weights("topk-batch_size=256-d_sae=64-l0=4.0-s1")
    assert len(names) == 4 and "baseline-batch_size=256-d_sae=64-l0=4.0-s0" in names
    shutil.rmtree("runs")
    assert call(monkeypatch, "--variant", "topk", "--seed", "1", *SMALL) == 0
    assert equal(weights("topk-batch_size=256-d_sae=64-l0=4.0-s1"), together)


def test_runs_side_by_side_have_the_bits_of_one_after_another(here, monkeypatch):
    args = ["--variant", "contrastive_r10", "topk", "zscore_r9", "--seed", "0", *SMALL]
    threads, plain = set(), train_py.Run.train_on
    monkeypatch.setattr(train_py.Run, "train_on", lambda run, x, log_now: (
        threads.add(threading.get_ident()), plain(run, x, log_now))[1])
    call(monkeypatch, *args)
    expected = {p.name: weights(p.name) for p in Path("runs").iterdir()}
    assert len(threads) == 1
    shutil.rmtree("runs")
    torch.set_num_threads(3)
    assert call(monkeypatch, *args) == 0
    assert len(threads) == 4 and torch.get_num_threads() == 1
    assert all(equal(found, weights(name)) for name, found in expected.items())


def test_a_run_folder_says_what_ran(here, monkeypatch):
    call(monkeypatch, "--variant", "contrastive_r3", "--seed", "3", *SMALL)
    folder, = Path("runs").iterdir()
    config = read_json(folder / "config.json")
    assert config["status"] == "done"
    assert config["variant"] == "contrastive_r3"
    assert config["seed"] == 3
    assert config["parent"] == "contrastive_r2"
    assert config["paired"] is True
    assert config["path"] == "dense"
    assert config["settings"]["l0"] == 4.0
    assert config["settings"]["lr"] == 3e-3
    assert config["steps"] == 62
    assert config["acts_checksum"] == Acts("acts/tiny").checksum
    assert config["sae_checksum"] == read_tensors(folder / "sae.safetensors")[1]["checksum"]
    assert config["start_checksum"] == read_tensors(folder / "start.safetensors")[1]["checksum"]
    source = (folder / "code.py").read_text()
    places = [source.index(text) for text in ("class SAE", "contrastive_r1 =", "contrastive_r3 =")]
    assert places == sorted(places)
    log = read_log(folder, config)
    assert log[-1]["step"] == 62
    assert log[-1] == config["final"]
    assert 0 < log[-1]["explained_variance"] < 1
    assert {"loss_recon", "ratio_sparsity", "l0", "l1", "dead", "lr", "tokens_per_s"} <= set(log[0])
    assert not (folder / "checkpoint.safetensors").exists()


def test_the_sae_applies_to_raw_activations(here, monkeypatch):
    write_cache(here / "acts" / "moved", X * 5 + 100)
    call(monkeypatch, "--variant", "topk", "--seed", "0", "--acts", "moved", *SMALL)
    sae, config = load_run(next(Path("runs").iterdir()))
    raw = X[-2000:] * 5 + 100
    left = (sae.reconstruct(raw) - raw).pow(2).sum() / (raw - raw.mean(0)).pow(2).sum()
    assert 1 - left == pytest.approx(config["final"]["explained_variance"], abs=0.05)


def test_seeds_settings_and_sweeps_make_the_runs(here, monkeypatch):
    call(monkeypatch, "--variant", "topk", "--seed", "0", "1", "--sweep", "l0=2,4", "--set",
         "d_sae=64", "batch_size=256")
    assert sorted(p.name for p in Path("runs").iterdir()) == [
        f"topk-batch_size=256-d_sae=64-l0={l0}-s{seed}" for l0 in ("2.0", "4.0") for seed in (0, 1)]


def test_more_steps_than_rows_go_through_the_shards_again_in_another_order(here):
    acts = Acts("acts/tiny")
    assert train_py.plan_shards(acts, 256) == train_py.plan_shards(acts, 256, 62)
    plan = train_py.plan_shards(acts, 256, 400)
    passes = [tuple(i for i, _ in plan[n:n + 2]) for n in range(0, 10, 2)]
    assert sum(n for _, n in plan) == 400 and len(set(passes)) == 2


def test_the_reader_gives_each_shard_whole_while_it_reads_the_next(here):
    acts = Acts("acts/tiny")
    order = [0, 1, 1, 0, 1]
    for i, rows in zip(order, train_py.read_ahead(acts, order, torch.device("cpu"))):
        time.sleep(0.05)                             # the next shards are read meanwhile
        assert torch.equal(rows, acts.shard(i)["acts"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_bits(here, monkeypatch, how):
    args = ["--variant", "baseline", "batch_topk", "--seed", "0", "--steps", "250", *SMALL]
    first = script(here, *args, "--checkpoint", "0")
    checkpoints = lambda: list(here.glob("runs/*/checkpoint.safetensors"))
    while len(checkpoints()) < 2:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    first.send_signal(how)
    _, said = first.communicate()
    assert first.returncode == {signal.SIGKILL: -9}.get(how, 130)
    assert how == signal.SIGKILL or said.splitlines()[-1].startswith(
        "interrupted: the same command goes on")
    assert read_json(next(here.glob("runs/base*/config.json")))["status"] == "training"
    assert call(monkeypatch, "--resume") == 0
    stopped = {
        p.name: (weights(p.name), read_log(p, read_json(p / "config.json")))
        for p in Path("runs").iterdir()
    }
    shutil.rmtree("runs")
    assert call(monkeypatch, *args) == 0
    for name, (found, log) in stopped.items():
        assert equal(found, weights(name))
        whole = read_log(Path("runs") / name, {})
        times = {"tokens_per_s"}
        assert [{k: v for k, v in line.items() if k not in times} for line in log] == [
            {k: v for k, v in line.items() if k not in times} for line in whole]


def test_a_finished_run_is_left_alone_until_its_data_or_code_change(here, monkeypatch, capsys):
    def again():
        call(monkeypatch, "--variant", "topk", "--seed", "0", *SMALL)
        weights = next(Path("runs").iterdir()) / "sae.safetensors"
        return weights.stat().st_mtime_ns, capsys.readouterr().out

    first, _ = again()
    at, said = again()
    assert at == first and "1 of 1 runs are finished already" in said
    write_cache(here / "acts" / "tiny", X + 1)
    at, said = again()
    assert at > first and "data or code changed since: it is trained again" in said
    monkeypatch.setattr(SAE, "code_checksum", lambda: "of other code")
    later, said = again()
    assert later > at and "data or code changed since: it is trained again" in said


def test_a_run_in_use_is_not_trained_twice(here, monkeypatch):
    from sae import lock
    held = lock(Path("runs") / "topk-batch_size=256-d_sae=64-l0=4.0-s0")
    code = script(here, "--variant", "topk", "--seed", "0", *SMALL)
    assert "in use by another process" in code.communicate()[1] and code.returncode == 6
    held.release()


BROKEN = """\"\"\"broken = baseline + a mistake.\"\"\"
import torch
from sae import SAE
class Variant(SAE):
    {}
"""


@pytest.mark.parametrize("body, says", [
    ("def decode(self, acts): return acts @ self.W_dec[:, :5]",
     "decode() returned [256, 5], want [256, 32]"),
    ("def activate(self, pre): return pre", "activate() returned negative activations"),
    ("def pre_acts(self, x): return super().pre_acts(x) * float('nan')",
     "pre_acts() returned numbers that are not finite"),
    ("def penalties(self, out): return {'aux': out.x}", "penalties() returned 'aux'"),
    ("def after_step(self, opt, out): self.no_such_thing",
     "AttributeError in after_step() (broken.py:5)"),
    ("def choose_batch(self, n_rows, rng): return self.nothing",
     "AttributeError in choose_batch()"),
    ("def choose_batch(self, n_rows, rng): return torch.tensor([n_rows])", "IndexError"),
    ("def accept(self, loss): return False", "10 steps in a row")])
def test_a_broken_variant_is_named_and_the_others_go_on(here, monkeypatch, capsys, tmp_path, body,
                                                        says):
    package = tmp_path / "variants"
    package.mkdir()
    (package / "broken.py").write_text(BROKEN.format(body))
    import variants
    monkeypatch.setattr(variants, "__path__", [*variants.__path__, str(package)])
    load = train_py.load_variant

    def find(name):
        if name == "broken":
            return importlib.import_module("variants.broken").Variant
        return load(name)

    monkeypatch.setattr(train_py, "load_variant", find)
    monkeypatch.setattr(train_py, "docstring_line", lambda name: name)
    monkeypatch.setattr(train_py, "parent_of", lambda name: "baseline")
    monkeypatch.setattr(train_py, "find_variants", lambda names: names)
    monkeypatch.setattr(train_py, "ROOT", package.parent)
    try:
        assert call(monkeypatch, "--variant", "broken", "topk", "--seed", "0", *SMALL) == 5
    finally:
        sys.modules.pop("variants.broken", None)
    printed = capsys.readouterr()
    assert says in printed.err and "FAILED" in printed.out
    status = {
        p.name.split("-")[0]: read_json(p / "config.json")["status"] for p in Path("runs").iterdir()
    }
    assert status == {"broken": "failed", "topk": "done"}


def test_a_count_that_is_nan_is_left_out_of_what_is_told(here, monkeypatch):
    plain = SAE.after_step

    def after_step(sae, opt, out):
        plain(sae, opt, out)
        sae.stats |= {"odd": float("nan"), "even": 2.0}

    monkeypatch.setattr(SAE, "after_step", after_step)
    monkeypatch.setattr(SAE, "counts", ("odd", "even"))
    assert call(monkeypatch, "--variant", "baseline", "--steps", "20", *SMALL) == 0
    assert read_json(next(Path("runs").iterdir()) / "config.json")["acted"] == {"even": 2.0}


def test_an_idea_that_never_acted_has_its_parents_weights(here, monkeypatch):
    assert call(monkeypatch, "--variant", "baseline", "revive", "latent_lr", "--seed", "0",
                *SMALL) == 0
    configs = [read_json(path) for path in sorted(Path("runs").glob("*/config.json"))]
    baseline, latent_lr, revive = (config["weights_checksum"] for config in configs)
    assert configs[2]["acted"] == {"revived": 0} and baseline == revive != latent_lr


def test_rows_that_no_batch_takes_and_a_damaged_log_are_said(here, monkeypatch, capsys):
    write_cache(here / "acts" / "tiny", X, rows_per_shard=6000)
    args = ["--variant", "topk", "--seed", "0", "--set", "d_sae=64", "l0=4", "batch_size=4000"]
    save = train_py.Run.save_checkpoint

    def interrupted(run):
        save(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_py.Run, "save_checkpoint", interrupted)
        call(patch, *args, "--checkpoint", "0")
    assert "batches don't straddle shards" in capsys.readouterr().out
    log = next(Path("runs").glob("*/metrics.jsonl"))
    log.write_text("no JSON\n")
    assert call(monkeypatch, *args) == 5
    assert f"{log} is damaged: delete {log.parent}" in capsys.readouterr().err


def test_a_void_run_is_marked(here, monkeypatch, capsys):
    poor = ("d_sae=64", "l0=4", "batch_size=256", "sparsity_start=0.0001", "sparsity_warmup=1")
    assert call(monkeypatch, "--variant", "baseline", "--seed", "0", "--set", *poor) == 5
    config = read_json(next(Path("runs").iterdir()) / "config.json")
    assert config["void"] == ["it explains no variance"] and "VOID" in capsys.readouterr().out
    # windows over past steps that are not full yet hold NaN
    assert call(monkeypatch, "--variant", "adaptive_ortho_r3", "--steps", "5", *SMALL) == 0


def test_each_reason_makes_a_run_void():
    def void(weight=0.0, l0=4.0, refused=0):
        sae = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(sae.weight, weight)
        last = {"l0": l0, "explained_variance": 0.5}
        run = SimpleNamespace(sae=sae, last=last, refused=refused, steps=10)
        return train_py.Run.void(run)

    assert void() == []
    assert void(weight=float("inf")) == ["its weights are not finite"]
    assert void(l0=0.0) == ["no latent fires"] and void(refused=6) == ["6 of 10 steps were refused"]


@pytest.mark.parametrize("args, code, says", [
    (["--variant", "topkk"], 2, "did you mean topk"),
    (["--variant", "topk", "--set", "lo=3"], 2, "no such setting"),
    (["--variant", "topk", "--set", "paired=false"], 2, "no such setting"),
    (["--variant", "topk", "--sweep", "bandwidth=0.1,0.5"], 2, "no effect with activation=topk"),
    (["--variant", "topk_ortho_r1", "--set", "pair_rule=jaccard"], 2, "want "),
    (["--acts", "tinny"], 2, "there are tiny"),
    (["--acts", "../tiny"], 2, "want a name"),
    (["--steps", "0"], 2, "above 0"),
    (["--set", "batch_size=9000"], 2, "no shard has a batch of 9000"),
    (["--variant", "topk", "--set", "l0=2", "--sweep", "l0=3,4"], 2, "l0: given twice"),
    (["--variant", "topk", "--sweep", "l0=2", "l0=4"], 2, "l0: given twice"),
    (["--variant", "topk", "--set", "d_sae=64", "l0=33"], 2, "l0=33.0: want 1 to 32"),
    (["--variant", "topk", "--set", "l0=0.4"], 2, "l0=0.4: want 1 to"),
    (["--variant", "topk", "--set", "sparsity_warmup=2"], 2, "sparsity_warmup=2.0: want 0 to 1"),
    (["--sweep", "batch_size=128,256"], 2, "share their batches"),
    (["--resume"], 3, "no interrupted run")])
def test_wrong_flags_end_in_one_line_before_anything_is_written(here, monkeypatch, args, code,
                                                                says):
    with pytest.raises(Refuse, match=says) as refused:
        call(monkeypatch, *args)
    assert refused.value.code == code
    assert "\n" not in str(refused.value)
    assert not Path("runs").exists()


def test_processes_divide_the_runs_and_give_the_bits_of_one(here, monkeypatch):
    args = ["--variant", "baseline", "topk", "batch_topk", "--seed", "0", *SMALL]
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        call(monkeypatch, *args)
        assert len(list(Path("runs").iterdir())) == (2, 3)[rank]
    divided = {p.name: weights(p.name) for p in Path("runs").iterdir()}
    shutil.rmtree("runs")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    call(monkeypatch, *args)
    assert all(equal(found, weights(name)) for name, found in divided.items())


@pytest.mark.slow
def test_torchrun_divides_the_labour(here):
    args = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "02_train.py"),
            "--device", "cpu", "--variant", "baseline", "topk", "--seed", "0", *SMALL]
    done = subprocess.run([sys.executable, *args], cwd=here, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert [read_json(p)["status"] for p in here.glob("runs/*/config.json")] == ["done", "done"]


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_nothing(here, monkeypatch):
    args = ["--variant", "contrastive_r10", "topk", "--seed", "0", "--steps", "600", *SMALL]
    for n in range(10):
        run = script(here, *args, "--checkpoint", "0")
        time.sleep(4 + 0.7 * n)
        run.kill()
        run.communicate()
    assert call(monkeypatch, *args) == 0
    killed = {p.name: weights(p.name) for p in Path("runs").iterdir()}
    shutil.rmtree("runs")
    call(monkeypatch, *args)
    assert all(equal(found, weights(name)) for name, found in killed.items())
    assert not list(here.rglob("*.tmp"))


def test_the_list_shows_every_variants_lineage(here, monkeypatch, capsys):
    call(monkeypatch, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list((ROOT / "variants").glob("[a-z]*.py"))) + 1
    assert all(" = " in line for line in lines)


def test_a_study_is_its_rows_in_order():
    assert train_py.find_variants(["contrastive", "topk"]) == [
        f"contrastive_r{n}" for n in range(1, 11)] + ["topk"]


def test_a_run_of_other_length_has_a_name_of_its_own(here, monkeypatch):
    args = ["--variant", "topk", "--seed", "0", *SMALL]
    call(monkeypatch, *args)
    call(monkeypatch, *args, "--steps", "62")            # one pass
    call(monkeypatch, *args, "--steps", "20")
    names = {p.name: read_json(p / "config.json")["steps"] for p in Path("runs").iterdir()}
    name = "topk-batch_size=256-d_sae=64-l0=4.0"
    assert names == {f"{name}-s0": 62, f"{name}-steps=20-s0": 20}


def test_a_start_sees_enough_rows_for_each_latent_to_fire(here, monkeypatch):
    acts = Acts(Path("acts/tiny"))
    monkeypatch.setattr(train_py, "SAMPLE_PRE", 1)       # as if latents were very many
    sae = SAE(32, 100, d_sae=64, l0=4.0)
    x = train_py.sample(acts, sae)
    assert len(x) == 4 * 64 / 4
    sae.init_from_data(x)
    assert (sae(X[:1000]).acts > 0).float().sum(-1).mean() > 2
    with pytest.raises(Refuse, match="a latent would fire less than twice"):
        train_py.sample(acts, SAE(32, 100, d_sae=64, l0=0.001))
    sae = SAE(32, 100, d_sae=64, l0=0.001, activation="batch_topk")    # has no bias to start
    assert len(train_py.sample(acts, sae)) > 1000


def test_runs_whose_settings_are_gone_do_not_keep_others_from_being_resumed(here, monkeypatch,
                                                                            capsys):
    call(monkeypatch, "--variant", "topk", "--seed", "0", "1", "2", *SMALL)
    for seed, variant, more in (("0", "topk", {}), ("1", "topk", {"gone": 1.0}), ("2", "mine", {})):
        path = Path(f"runs/topk-batch_size=256-d_sae=64-l0=4.0-s{seed}/config.json")
        config = read_json(path)
        write_json(path, config | {"status": "training", "variant": variant,
                                   "settings": config["settings"] | more})
    assert call(monkeypatch, "--resume") == 0
    said = capsys.readouterr().out
    assert "is left: topk has no gone any more" in said
    assert "is left: there is no variant mine any more" in said
    status = [read_json(path)["status"] for path in sorted(Path("runs").glob("*/config.json"))]
    assert status == ["done", "training", "training"]


def test_log_lines_wait_for_no_disk(here, monkeypatch):
    """As many fsyncs in a long run as in a short one: a log line costs none."""
    counts, plain = [], os.fsync
    for steps in ("50", "200"):
        calls = []
        monkeypatch.setattr(os, "fsync", lambda f: (calls.append(f), plain(f))[1])
        call(monkeypatch, "--variant", "topk", "--seed", "0", "--steps", steps, *SMALL)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_a_driver_without_a_gpu_is_said_loudly(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/proc/driver/nvidia")
    assert pick_device().type == "cpu"
    assert "finds no GPU although a driver is there" in capsys.readouterr().err

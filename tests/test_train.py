"""Promises of 02_train.py: many runs from one pass, the same bits however a run comes about, and plain words when something is wrong."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from sae import ROOT, read_json, read_tensors, write_json, write_tensors
from toys import mixture, train_py, write_cache

X = mixture(n_rows=40_000)[0]
SMALL = ["--set", "d_sae=64", "l0=4", "batch_size=256", "--device", "cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with cached activations: 36k rows in 5 shards."""
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "acts" / "tiny", X)
    return tmp_path


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["02_train.py", *args])
    return train_py.main()


def weights(folder):
    return (folder / "sae.safetensors").read_bytes()


def names(here):
    return sorted(p.name for p in (here / "runs").iterdir())


def test_one_pass_serves_one_run_and_twelve(here, monkeypatch, capsys):
    run(monkeypatch, "--variant", "topk", *SMALL)
    one = capsys.readouterr().out
    run(monkeypatch, "--variant", "baseline", "topk", "batch_topk", "matryoshka", "--seed", "1", "2", "3", *SMALL)
    twelve = capsys.readouterr().out
    assert "5 shards read for 1 runs" in one and "5 shards read for 12 runs" in twelve
    assert len(names(here)) == 13


def test_a_run_folder_says_what_ran(here, monkeypatch):
    run(monkeypatch, "--variant", "matryoshka", *SMALL)
    (folder,) = (here / "runs").iterdir()
    assert folder.name == "matryoshka-batch_size=256-d_sae=64-l0=4.0-s0"
    config = read_json(folder / "config.json")
    assert config["status"] == "done" and config["parents"] == ["batch_topk"] and config["settings"]["d_sae"] == 64
    assert config["steps"] == sum(s["rows"] // 256 for s in read_json(here / "acts/tiny/meta.json")["shards"])
    assert {"commit", "dirty", "versions", "device", "acts_checksum", "code_checksum", "sae_checksum", "seconds"} <= set(config)
    code = (folder / "code.py").read_text()
    assert code.index("class SAE") < code.index("activation = \"batch_topk\"") < code.index("matryoshka_prefixes")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == config["steps"] == config["final"]["step"]
    assert {"loss_recon", "loss_aux", "ratio_aux", "l0", "explained_variance", "dead", "grad_norm", "lr", "tokens_per_s"} <= set(lines[-1])
    assert lines[-1]["explained_variance"] > lines[0]["explained_variance"]
    tensors, _ = read_tensors(folder / "sae.safetensors")
    assert torch.allclose(tensors["W_dec"].norm(dim=1), torch.ones(64), atol=1e-5)
    assert float(tensors["scale"]) == pytest.approx(read_json(here / "acts/tiny/meta.json")["scale"])
    assert not (folder / "checkpoint.safetensors").exists()


def test_seed_settings_and_sweep_make_the_runs(here, monkeypatch):
    run(monkeypatch, "--variant", "topk", "--seed", "0", "1", "--sweep", "l0=2,3", "--set", "d_sae=64", "batch_size=4096", "--device", "cpu")
    assert names(here) == [f"topk-batch_size=4096-d_sae=64-l0={l0}-s{s}" for l0 in ("2.0", "3.0") for s in (0, 1)]


def test_order_and_company_do_not_change_a_run(here, monkeypatch):
    run(monkeypatch, "--variant", "topk", *SMALL)
    alone = weights(next((here / "runs").iterdir()))
    shutil.rmtree(here / "runs")
    run(monkeypatch, "--variant", "batch_topk", "baseline", "topk", "--seed", "1", "0", *SMALL)
    assert weights(here / "runs" / "topk-batch_size=256-d_sae=64-l0=4.0-s0") == alone


def test_several_epochs_see_every_batch_again_in_another_order(here):
    from sae import Acts
    acts = Acts(here / "acts" / "tiny")
    plan = train_py.plan_steps(acts, 256, 3)
    assert [sorted(i for e, i, _ in plan if e == epoch) for epoch in range(3)] == [list(range(5))] * 3
    assert len({tuple(i for e, i, _ in plan if e == epoch) for epoch in range(3)}) > 1
    seen = [float(rows[p * 256:(p + 1) * 256].float().sum()) for _, p, rows, _ in train_py.stream(acts, plan, torch.device("cpu"), 0)]
    third = len(seen) // 3
    assert sorted(seen[:third]) == sorted(seen[third:2 * third]) == sorted(seen[2 * third:])
    assert acts.reads == 5                                  # it fits in memory, so the epochs after the first read nothing


def script(here, *args, **kw):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    return subprocess.Popen([sys.executable, ROOT / "02_train.py", *args], cwd=here, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **kw)


LONG = ["--variant", "baseline", "batch_topk", "--epochs", "20", "--checkpoint", "1", *SMALL]


def wait_for(path, process, since=0, seconds=90):
    """Wait until `path` is there, written after `since`, while the process lives."""
    until = time.monotonic() + seconds
    while not path.exists() or path.stat().st_mtime_ns <= since:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)


def test_stopped_by_ctrl_c_or_killed_it_goes_on_to_the_same_bits(here):
    straight = script(here, *LONG)
    assert straight.wait() == 0, straight.communicate()
    folders = sorted((here / "runs").iterdir())
    want = {f.name: (weights(f), re.sub(r'"tokens_per_s": [\d.]+', "", (f / "metrics.jsonl").read_text())) for f in folders}
    shutil.rmtree(here / "runs")
    for signs, code in (([signal.SIGINT], 130), ([signal.SIGKILL], -9), ([signal.SIGTERM] * 2, 130)):      # `timeout` sends it twice
        checkpoint = folders[0] / "checkpoint.safetensors"
        since = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = script(here, *LONG)
        wait_for(checkpoint, process, since)
        time.sleep(0.2)                                          # the other run's is written too
        sent = time.time_ns()
        for sign in signs:
            process.send_signal(sign)
            time.sleep(0.01)
        assert process.wait() == code
        assert (checkpoint.stat().st_mtime_ns > sent) == (code == 130)      # what was done up to now is kept
        if sign == signal.SIGINT:
            assert process.communicate()[1].strip().splitlines()[-1].startswith("interrupted")
    process = script(here, "--resume", "--device", "cpu")        # no other flag needed
    assert process.wait() == 0, process.communicate()
    assert {f.name: (weights(f), re.sub(r'"tokens_per_s": [\d.]+', "", (f / "metrics.jsonl").read_text())) for f in folders} == want


def test_a_finished_run_is_left_alone_until_something_changes(here, monkeypatch, capsys):
    run(monkeypatch, "--variant", "topk", *SMALL)
    folder = next((here / "runs").iterdir())
    stamp = (folder / "sae.safetensors").stat().st_mtime_ns
    run(monkeypatch, "--variant", "topk", *SMALL)
    assert "1 of 1 runs are finished already" in capsys.readouterr().out and (folder / "sae.safetensors").stat().st_mtime_ns == stamp
    (folder / "eval").mkdir()
    write_json(folder / "eval" / "core.json", {"l0": 1})
    write_cache(here / "acts" / "tiny", mixture(n_rows=40_000, seed=1)[0])          # other data under the same name
    run(monkeypatch, "--variant", "topk", *SMALL)
    assert (folder / "sae.safetensors").stat().st_mtime_ns != stamp and not (folder / "eval").exists()      # no stale evaluation


def test_two_processes_do_not_train_the_same_run(here):
    first = script(here, *LONG)
    wait_for(here / "runs" / "baseline-batch_size=256-d_sae=64-l0=4.0-s0" / "code.py", first)
    second = script(here, *LONG)
    assert second.wait() == 6 and "in use by another process" in second.communicate()[1]
    first.kill()                                            # the lock of a dead process is free
    first.wait()
    third = script(here, "--resume", "--device", "cpu")
    assert third.wait() == 0, third.communicate()


BAD = {
    "raises": "    def activate(self, pre):\n        return pre.nonsense()\n",
    "raises_late": "    def after_step(self, opt, out):\n        assert self.step < 9, 'gave up'\n        super().after_step(opt, out)\n",
    "shape": "    def decode(self, acts):\n        return acts\n",
    "nan": "    def losses(self, out):\n        return super().losses(out) | {'mine': out.x.sum() * float('nan')}\n",
    "narrow": "    def activate(self, pre):\n        return pre.relu()[:, 1:]\n",
    "negative": "    def activate(self, pre):\n        return pre\n",
    "blows_up": "    def losses(self, out):\n        return super().losses(out) | {'mine': out.acts.sum() * (float('inf') if self.step > 3 else 0.0)}\n",
    "vector": "    def losses(self, out):\n        return {'recon': self.recon_error(out)}\n",
    "builds_badly": "    def build(self):\n        raise ValueError('no')\n",
    "errors": "    def recon_error(self, out):\n        return (out.x - out.x_hat).pow(2)[:, :0].mean(-1)\n",
    "chooses": "    def choose_batch(self, n_rows, rng):\n        return slice(0, 0)\n",
    "strays": "    def choose_batch(self, n_rows, rng):\n        return [n_rows] * self.batch_size\n",
    "rates": "    def lr_scale(self):\n        return float('nan')\n",
    "poisons": "    def after_step(self, opt, out):\n        super().after_step(opt, out)\n        self.W_enc.fill_(float('nan'))\n",
}
UNLOADABLE = {"typo": "class Variant(SAE)\n", "imports": "import no_such_library\n", "nameless": "", "alien": "class Variant:\n    pass\n"}
SAYS = {"raises": "activate()", "raises_late": "after_step() (raises_late.py:5): AssertionError: gave up", "shape": "decode() returned", "nan": "'mine'",
        "errors": "losses() returned 'recon' = nan", "chooses": "choose_batch() chose rows of shape [0, 32], want [256, 32]",
        "strays": "in what choose_batch() returned: IndexError", "rates": "see before_step(), after_step() and lr_scale()", "poisons": "W_enc is not finite any more",
        "narrow": "activate() returned [256, 63], want [256, 64]", "negative": "activate() returned negative", "blows_up": "10 steps in a row", "vector": "losses() returned 'recon'", "builds_badly": "build()"}


def test_a_broken_variant_is_named_and_the_others_go_on(here):
    """Each with its method in one line; exit code 5; the sound run of the same call is finished and kept."""
    for name in ("sae.py", "02_train.py"):
        shutil.copy(ROOT / name, here / name)
    (here / "variants").mkdir()
    for name, body in BAD.items():
        (here / "variants" / f"{name}.py").write_text(f'"""{name} = baseline + a mistake."""\nfrom sae import SAE\n\nclass Variant(SAE):\n{body}'.replace("\n\nclass", "\nclass"))
    for name, text in UNLOADABLE.items():
        (here / "variants" / f"{name}.py").write_text(f'"""{name} = baseline + a mistake."""\n{text}')
    process = subprocess.run([sys.executable, here / "02_train.py", "--variant", *UNLOADABLE, *BAD, "baseline", *SMALL], cwd=here, capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 5 and "Traceback" not in process.stderr, process.stderr
    lines = process.stderr.splitlines()
    assert all(any(line.startswith(f"error: variants/{name}.py") for line in lines) for name in UNLOADABLE)
    for name, says in SAYS.items():
        (line,) = [line for line in process.stderr.splitlines() if line.startswith(f"error: {name}-")]
        assert says in line, line
        config = read_json(here / "runs" / f"{name}-batch_size=256-d_sae=64-l0=4.0-s0" / "config.json")
        assert config["status"] == "failed" and says in config["reason"]
    assert read_json(here / "runs" / "baseline-batch_size=256-d_sae=64-l0=4.0-s0" / "config.json")["status"] == "done"


@pytest.mark.parametrize("args, code, says", [
    (["--variant", "tpok"], 2, "did you mean topk"), (["--variant", "../sae"], 2, "no variant"), (["--set", "orto=1"], 2, "no such setting"),
    (["--set", "l0=-3"], 2, "l0"), (["--set", "lr=nan"], 2, "want float"), (["--sweep", "l0="], 2, "name=value"), (["--sweep", "l0=1,x"], 2, "want float"),
    (["--set", "l0=3", "--sweep", "l0=1,2"], 2, "--set gives it too"), (["--acts", "nothing"], 2, "there are tiny"), (["--acts", "../acts"], 2, "--acts"),
    (["--seed", "-1"], 2, "--seed"), (["--seed", "1.5"], 2, "--seed"), (["--epochs", "0"], 2, "--epochs"), (["--device", "tpu"], 2, "--device"),
    (["--var", "topk"], 2, "unrecognized"), (["--resume"], 3, "no interrupted run"), (["--set", "batch_size=1_000_000"], 2, "no shard has a batch"),
    (["--sweep", "batch_size=256,512"], 2, "share their batches"), (["--set", "activation=tanh"], 2, "activation")])
def test_wrong_flags_end_in_one_line(here, monkeypatch, capsys, args, code, says):
    from sae import run_script
    monkeypatch.setattr(sys, "argv", ["02_train.py", *args])
    with pytest.raises(SystemExit) as e:
        run_script(train_py.main)
    err = capsys.readouterr().err
    assert e.value.code == code and says in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1
    assert not (here / "runs").exists() or not any((here / "runs").glob("*/sae.safetensors"))


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "foreign", "missing", "nan", "pickle"])
def test_a_damaged_cache_is_never_trained_on(here, monkeypatch, damage):
    from sae import Refuse
    shard = here / "acts" / "tiny" / "train_00001.safetensors"
    blob = bytearray(shard.read_bytes())
    if damage == "flip":
        blob[len(blob) // 2] ^= 1
    if damage == "cut":
        blob = blob[:-9]
    if damage == "swap":
        blob = (here / "acts" / "tiny" / "train_00002.safetensors").read_bytes()
    shard.write_bytes(blob)
    if damage == "foreign":
        write_tensors(shard, {"acts": torch.ones(8192, 32)})
    if damage == "missing":
        shard.unlink()
    if damage == "pickle":
        torch.save({"acts": torch.ones(3)}, shard)
    if damage == "nan":                                    # a bad number with every checksum right
        bad = read_tensors(here / "acts" / "tiny" / "train_00002.safetensors")[0]
        bad["acts"][5, 5] = float("nan")
        meta = read_json(here / "acts" / "tiny" / "meta.json")
        meta["shards"][1]["checksum"] = write_tensors(shard, bad)
        write_json(here / "acts" / "tiny" / "meta.json", meta)
    with pytest.raises(Refuse, match="train_00001"):
        run(monkeypatch, "--variant", "topk", *SMALL)


def test_the_list_shows_every_variants_lineage(here, monkeypatch, capsys):
    run(monkeypatch, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(train_py.variant_names()) and any(line.startswith("matryoshka = batch_topk + ") for line in lines)


def test_a_study_is_its_rows_in_order():
    assert train_py.find_variants(["topk"]) == ["topk"]
    study = train_py.find_variants(["topk_ortho"])
    assert study == sorted(study, key=lambda v: int(v.rsplit("_r", 1)[1])) and all(v.startswith("topk_ortho_r") for v in study)
    assert train_py.find_variants(["all", "topk"]) == train_py.variant_names()

"""The four scripts one after another, as a user runs them, each in a process of its own."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import test_cache
from sae import ROOT, Acts, read_json, read_tensors


def script(here, name, *args, code=0):
    """Run a script in the folder `here`; its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run([sys.executable, ROOT / name, *map(str, args)], cwd=here, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:] + done.stdout[-1000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def check_png(path):
    blob = path.read_bytes()
    assert blob[:8] == b"\x89PNG\r\n\x1a\n" and len(blob) > 5_000, path


def test_a_local_model_from_text_to_a_page(tmp_path):
    test_cache.save(tmp_path / "m", "gpt_neox")
    test_cache.write_jsonl(tmp_path / "t.jsonl", test_cache.texts(n=1200, length=40))
    script(tmp_path, "01_cache_acts.py", "--model", "m", "--layer", 0, 1, "--data", "t.jsonl",
           "--ctx", 16, "--tokens", 40_000, "--val-tokens", 2_000, "--rows-per-shard", 8192)
    assert sorted(p.name for p in (tmp_path / "acts").iterdir() if p.name.startswith("m_")) == [
        "m_l0", "m_l1"]
    acts = Acts(tmp_path / "acts" / "m_l1")
    assert acts.meta["hook_name"] == "blocks.1.hook_resid_post" and acts.rows > 35_000
    x = torch.cat([acts.shard(i)["acts"].float() for i in range(len(acts.shards))])
    assert ((x - acts.mean) * acts.scale).norm(dim=1).mean() == pytest.approx(acts.d_in**0.5,
                                                                              abs=0.02)

    out = script(tmp_path, "02_train.py", "--acts", "m_l1", "--variant", "baseline", "topk",
                 "--seed", 0, 1, 2, "--set", "d_sae=48", "l0=4", "batch_size=256")
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 6 and all(run.name in out for run in runs)
    script(tmp_path, "03_eval.py", "--controls", "--eval", "core", "geometry", "stability",
           "features")
    printed = script(tmp_path, "04_plot.py")
    assert all(len(line) <= 100 for line in printed.splitlines())

    for run in runs:
        config, core = read_json(run / "config.json"), read_json(run / "eval" / "core.json")
        m = core["metrics"]
        assert config["status"] == "done" and core["sae_checksum"] == config["sae_checksum"]
        assert 0.3 < m["explained_variance"] < 1 and abs(m["l0"] - 4) < 0.4
        ours = (m["ce_zero"] - m["ce_sae"]) / (m["ce_zero"] - m["ce_clean"])
        assert m["ce_zero"] != m["ce_clean"] and m["ce_recovered"] == pytest.approx(ours, abs=1e-6)
        assert m["explained_variance"] == pytest.approx(config["final"]["explained_variance"],
                                                        abs=0.1)
    results = (tmp_path / "plots" / "results.md").read_text()
    for variant in ("baseline", "topk"):
        assert re.search(rf"^\| *{variant}", results, re.MULTILINE), results
    for name in ("pareto.png", "training_curves.png", "feature_usage.png"):
        check_png(tmp_path / "plots" / name)
    assert (tmp_path / "plots" / "report.html").stat().st_size > 20_000
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("checkpoint.safetensors"))


def test_synthetic_truth_from_features_to_verdict(tmp_path):
    """On trees of features, at their own L0: Matryoshka absorbs least, the dictionary is found."""
    script(tmp_path, "01_cache_acts.py", "--model", "synthetic", "--tokens", 400_000)
    truth, _ = read_tensors(tmp_path / "acts/synthetic/truth.safetensors")
    assert truth["dictionary"].shape[0] > truth["dictionary"].shape[1]
    assert (truth["parent"] >= 0).sum() > 50
    script(tmp_path, "02_train.py", "--acts", "synthetic", "--variant", "topk", "matryoshka",
           "--seed", 0, "--set", "d_sae=320", "l0=5", "batch_size=1024")
    script(tmp_path, "03_eval.py", "--eval", "core", "--controls")
    script(tmp_path, "04_plot.py", "--metric", "absorption")
    found = {run.name.split("-")[0]: read_json(run / "eval" / "core.json")["metrics"]
             for run in (tmp_path / "runs").glob("*-s0")}
    assert all(abs(m["l0"] - 5) < 0.05 * 5 for m in found.values()), found
    assert found["topk"]["absorption"] > found["matryoshka"]["absorption"] + 0.02
    assert all(m["mcc"] > 0.5 and m["explained_variance"] > 0.8 for m in found.values())
    assert "ce_recovered" not in found["topk"]  # there is no language model behind these rows


@pytest.mark.slow
def test_the_main_job_without_flags_ends_in_verdicts(tmp_path):
    """The README's first command: at least one better, and one worse or no difference seen."""
    for name in ("01_cache_acts.py", "02_train.py", "03_eval.py"):
        script(tmp_path, name)
    printed = script(tmp_path, "04_plot.py")
    recipe = read_json(tmp_path / "acts/tiny_lm/recipe.json")
    assert recipe["loss"] < recipe["bigram_loss"] - 0.3 < recipe["unigram_loss"]
    for run in (tmp_path / "runs").glob("*-s[012]"):
        m = read_json(run / "eval" / "core.json")["metrics"]
        assert abs(m["l0"] - 16) < 0.05 * 16, run.name
        assert m["explained_variance"] > 0.7 and m["ce_recovered"] > 0.85, run.name
        assert m["dead"] < 0.1, run.name
    assert json.loads((tmp_path / "runs/topk-s0/eval/features.json").read_text())
    assert "better" in printed and ("worse" in printed or "no difference seen" in printed)

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
    done = subprocess.run([sys.executable, ROOT / name, *map(str, args)], cwd=here, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == code, done.stderr[-3000:] + done.stdout[-1000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def check_png(path):
    blob = path.read_bytes()
    assert blob[:8] == b"\x89PNG\r\n\x1a\n" and len(blob) > 5_000, path


PLOTS = ["pareto.png", "training_curves.png", "feature_usage.png"]


def test_a_local_model_from_text_to_plots(tmp_path):
    test_cache.save(tmp_path / "m", "gpt_neox")
    test_cache.write_jsonl(tmp_path / "t.jsonl", test_cache.texts(n=1200, length=40))
    script(tmp_path, "01_cache_acts.py", "--model", "m", "--layer", 0, 1, "--data", "t.jsonl", "--ctx", 16, "--tokens", 40_000, "--val-tokens", 2_000,
           "--rows-per-shard", 8192)
    assert sorted(p.name for p in (tmp_path / "acts").iterdir()) == ["m_l0", "m_l1"]
    acts = Acts(tmp_path / "acts" / "m_l1")
    assert acts.meta["hook_name"] == "blocks.1.hook_resid_post" and acts.d_in == 16 and acts.rows > 35_000
    x = torch.cat([acts.shard(i)["acts"].float() for i in range(len(acts.shards))])
    assert abs(float(x.norm(dim=1).mean()) * acts.scale - 16 ** 0.5) < 1e-3

    out = script(tmp_path, "02_train.py", "--acts", "m_l1", "--variant", "baseline", "topk", "--seed", 0, 1, "--set", "d_sae=48", "l0=4", "batch_size=256")
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 4 and all(r.name in out for r in runs)
    script(tmp_path, "03_eval.py", "--controls")
    script(tmp_path, "04_plot.py")

    results = (tmp_path / "plots" / "results.md").read_text()
    for run in runs:
        config, core = read_json(run / "config.json"), read_json(run / "eval" / "core.json")
        m = core["metrics"]
        assert config["status"] == "done" and core["sae_checksum"] == config["sae_checksum"] and core["acts_checksum"] == acts.checksum
        assert 0.3 < m["explained_variance"] < 1 and abs(m["l0"] - 4) < 0.6
        assert m["ce_zero"] != m["ce_clean"] and m["ce_recovered"] == pytest.approx((m["ce_zero"] - m["ce_sae"]) / (m["ce_zero"] - m["ce_clean"]), abs=1e-6)
        assert m["explained_variance"] == pytest.approx(config["final"]["explained_variance"], abs=0.1)
        assert (run / "code.py").stat().st_size > 10_000
    assert "\n## m_l1 with batch_size=256 d_sae=48 l0=4" in results
    for variant in ("baseline", "topk"):
        assert re.search(rf"^\| {variant} \|", results, re.M), results
    for name in PLOTS:
        check_png(tmp_path / "plots" / name)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("checkpoint.safetensors"))


def test_synthetic_truth_from_features_to_verdict(tmp_path):
    """On trees of features, at their own L0 of 5: the dictionary is scored against the truth; TopK absorbs more than BatchTopK, Matryoshka least."""
    script(tmp_path, "01_cache_acts.py", "--model", "synthetic", "--tokens", 600_000)
    truth, _ = read_tensors(tmp_path / "acts/synthetic/truth.safetensors")
    assert truth["dictionary"].shape[0] > truth["dictionary"].shape[1] and (truth["parent"] >= 0).sum() > 50
    script(tmp_path, "02_train.py", "--acts", "synthetic", "--variant", "topk", "batch_topk", "matryoshka", "--set", "d_sae=320", "l0=5", "batch_size=1024")
    script(tmp_path, "03_eval.py", "--controls")
    script(tmp_path, "04_plot.py")
    metrics = {run.name.split("-")[0]: read_json(run / "eval" / "core.json")["metrics"] for run in (tmp_path / "runs").glob("*-s0")}
    assert all(abs(m["l0"] - 5) < 0.05 * 5 for m in metrics.values()), metrics
    assert metrics["topk"]["absorption"] > metrics["batch_topk"]["absorption"] > metrics["matryoshka"]["absorption"] + 0.02
    assert all(m["mcc"] > 0.5 and m["explained_variance"] > 0.8 for m in metrics.values())
    assert "ce_recovered" not in metrics["topk"]                       # there is no language model behind these rows
    for name in PLOTS:
        check_png(tmp_path / "plots" / name)


@pytest.mark.slow
def test_the_main_job_without_flags(tmp_path):
    """What the README's first command does: the embedded language model, its activations, the comparison, evaluations and plots."""
    for name in ("01_cache_acts.py", "02_train.py", "03_eval.py", "04_plot.py"):
        script(tmp_path, name)
    recipe = read_json(tmp_path / "acts/tiny_lm/recipe.json")
    assert recipe["loss"] < recipe["bigram_loss"] - 0.3 < recipe["unigram_loss"]
    metrics = {run.name.removesuffix("-s0"): read_json(run / "eval" / "core.json")["metrics"] for run in (tmp_path / "runs").glob("*-s0")}
    for name, m in metrics.items():
        assert abs(m["l0"] - 16) < 0.05 * 16, name
        assert m["explained_variance"] > 0.7 and m["ce_recovered"] > 0.85 and m["dead"] < 0.1, name
    assert metrics["topk"]["explained_variance"] > 0.86 and metrics["topk"]["ce_recovered"] > 0.95
    features = json.loads((tmp_path / "runs/topk-s0/eval/features.json").read_text())
    assert features
    for name in PLOTS:
        check_png(tmp_path / "plots" / name)

"""Promises of 04_plot.py: it reads run folders alone, its numbers are the files', and gaps are words."""
import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from sae import ROOT, Refuse, write_json, write_tensors

sys.path.insert(0, str(ROOT))
plot = importlib.import_module("04_plot")
SETTINGS = {"activation": "topk", "d_sae": 64, "l0": 16.0, "batch_size": 100, "lr": 0.001}


def make_run(root, variant, seed=0, parent="baseline", sets=None, core=None, evals=None, guards=(), log=60,
             density=None, **config):
    """A run's folder as stages 2 and 3 leave it, written by the project's own writers.

    core: metrics of core.json (None: not evaluated); evals: {NAME: the rest of its file}.
    """
    shown = [f"{k}={v}" for k, v in sorted((sets or {}).items())]
    acts = config.pop("acts", "tiny")
    where = [acts] if acts != "tiny" else []
    folder = root / "-".join([variant, *where, *shown, f"s{seed}"])
    about = {"name": folder.name, "variant": variant, "parent": None if variant == "baseline" else parent,
             "acts": acts, "acts_checksum": "a", "seed": seed, "steps": 100, "d_in": 32, "status": "done",
             "settings": SETTINGS | (sets or {}), "sae_checksum": folder.name, "seconds": 10.0,
             "paired": True, "acted": {}}
    write_json(folder / "config.json", about | config)
    lines = [{"step": s, "tokens": 100 * s, "loss": 1 / s + 0.1, "loss_recon": 1 / s, "loss_sparsity": 0.1,
              "ratio_ortho": 0.2, "l0": 16.0, "explained_variance": 1 - 1 / s, "dead": 0.0, "mse": 1 / s}
             for s in range(1, log + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = {"version": 1, "sae_checksum": folder.name, "acts": acts, "guards": []}
    if core is not None:
        metrics = {"l0": 16.0, "explained_variance": 0.8, "ce_recovered": 0.9, "kl_sae": 0.1} | core
        found = [{"name": name, "level": level, "why": f"{name} because"} for name, level in guards]
        write_json(folder / "eval/core.json", said | {"name": "core", "metrics": metrics, "guards": found,
                                                   "details": {"density": density or {}}})
    for name, rest in (evals or {}).items():
        write_json(folder / f"eval/{name}.json", said | {"name": name, "metrics": {}} | rest)
    return folder


def make_control(root, kind, acts="tiny", **metrics):
    said = {"name": "core", "version": 1, "sae_checksum": kind, "acts": acts, "d_sae": 64, "guards": []}
    write_json(root / f"controls-{acts}/{kind}/eval/core.json", said | {"metrics": metrics})


def everything(rng, shift=0.0):
    """Evaluations of one run that feed every plot."""
    letters = [{"first_letter": c, "full_absorption_rate": float(rng.random() / 5), "num_split_features": 1}
               for c in "abcdefghij"]
    means = {"mean_full_absorption_score": 0.1 - shift + 0.01 * rng.random(), "mean_num_split_features": 1.2,
             "mean_absorption_fraction_score": 0.05}
    jl = {"error_sd": [0.2, 0.15, 0.1], "recall": [0.2, 0.5, 0.9]}
    pairs = {"jaccard": [0.1, 0.3 + shift, 0.5]}
    directions = {"correlation": 0.02, "mean_abs_cosine": 0.1, "effective_rank": 30.0,
                  "mean_max_cosine": 0.5, "coherence": 0.9}
    metrics = {k: v * (1 + 0.1 * float(rng.random())) for k, v in directions.items()}
    geometry = {"metrics": metrics | {"hoyer": 0.8, "gini": 0.4, "condition_group": 3.0 + float(rng.random()),
                                      "condition_active": 2.0},
                "details": {"l0_of_rows": list(range(101)), "null": directions,
                            "jl": {"dimensions": [32, 64, 128], "run": jl, "null": jl},
                            "condition": {"group": {"null": {"median": 2.5}}},
                            "pairs": {"rows": [256, 1024, 4096], "null": [0.01] * 3,
                                      "coactivation": pairs, "preact": pairs}}}
    probing = {f"sae_top_{k}_test_accuracy": 0.7 + k / 100 + shift for k in (1, 5, 20)}
    model = {f"llm_top_{k}_test_accuracy": 0.65 + k / 100 for k in (1, 5, 20)}
    return {
        "absorption": {"eval_result_metrics": {"mean": means}, "eval_result_details": letters},
        "geometry": geometry,
        "sparse_probing": {"eval_result_metrics": {"sae": probing, "llm": model}, "eval_result_details": []},
        "unlearning": {"eval_result_metrics": {"unlearning": {"unlearning_score": 0.05 + shift}}},
        "stability": {"metrics": {"matched": 0.7, "again": 0.5, "best": 0.8, "null": 0.3}},
        "features": {"latents": [{"latent": 7, "rate": 0.01, "why": ["random"], "promotes": ["</script>"],
                                  "neighbours": [{"latent": 3, "cosine": 0.5}],
                                  "contexts": [{"activation": 2.5, "token": "<b>", "text": "a <<<b>>> c"}]}]},
    }

"""Toy data with known answers, and training on it by the very step that 02_train.py takes.

Sizes: d_in 32, 64 latents; a run of 300 steps takes about a second.
"""
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from sae import FORMAT, generator, load_variant, unit, write_json, write_tensors  # noqa: E402

train_py = importlib.import_module("02_train")
D_IN = 32

# Settings of a variant (and its children) whose own numbers don't fit 64 latents and 300 steps.
TOY = {
    "hierarchical_r2": {"revive_every": 0.45, "revive_silent": 0.0},  # none dies: all restart once
    "hierarchical_r5": {"merge_threshold": 0.5},
    "prune": {"prune_threshold": 0.5},
    "contrastive_r7": {"n_groups": 8},  # of which 2 hold 16 latents, at L0 4
    "hierarchical_r4": {"l1_target": 0.45},  # what L0 4 allows there
    "topk_ortho_r1": {"pair_fraction": 0.02},
    "topk_ortho_r7": {"inhibition_radius": 4},
    "topk_ortho_r9": {"reallocate_below": 0.9},  # all latents fire about equally often
}


def orthonormal(n, d_in=D_IN, seed=0):
    """n orthonormal directions [n, d_in]."""
    return torch.linalg.qr(torch.randn(d_in, d_in, generator=generator("directions", seed)))[0][:n]


def normalised(x):
    """Rows centred and scaled so that E||x|| = sqrt(d_in), as 02_train.py feeds them."""
    x = x - x.mean(0)
    return x * x.shape[1] ** 0.5 / x.norm(dim=1).mean()


def hierarchy(n_rows=40_000, trees=6, children=3, p_parent=0.25, p_child=0.6, noise=0.02, seed=0):
    """Trees of a parent and mutually exclusive children, which fire only with it: what provokes
    absorption. True L0 = trees p_parent (1 + p_child).

    -> x [n, 32]; on [n, features] bool; directions [features, 32]; parent [features] index or -1.
    """
    g = generator("hierarchy", seed)
    features = trees * (1 + children)
    directions = orthonormal(features, seed=seed)
    root_of = torch.arange(features) // (1 + children) * (1 + children)
    parent = torch.where(root_of == torch.arange(features), -1, root_of)
    on = torch.zeros(n_rows, features, dtype=torch.bool)
    for root in range(0, features, 1 + children):
        on[:, root] = torch.rand(n_rows, generator=g) < p_parent
        has_child = on[:, root] & (torch.rand(n_rows, generator=g) < p_child)
        which = torch.randint(children, (n_rows,), generator=g)
        for c in range(children):
            on[:, root + 1 + c] = has_child & (which == c)
    size = 1 + 0.2 * torch.randn(n_rows, features, generator=g).clamp(-3, 3)
    x = (on * size) @ directions + noise * torch.randn(n_rows, D_IN, generator=g)
    return normalised(x), on, directions, parent


def mixture(n_rows=40_000, features=48, l0=4.0, zipf=0.7, noise=0.05, correlated=0.0, seed=0):
    """Sparse sums of more features than dimensions, at Zipf frequencies, with noise. `correlated`:
    the chance that feature 2i + 1 copies feature 2i's firing.

    -> x [n, 32]; on [n, features] bool; directions [features, 32].
    """
    g = generator("mixture", seed)
    directions = unit(torch.randn(features, D_IN, generator=g))
    p = (torch.arange(features) + 3.0) ** -zipf
    p = (p / p.sum() * l0).clamp(max=0.6)
    on = torch.rand(n_rows, features, generator=g) < p
    copy = torch.rand(n_rows, features // 2, generator=g) < correlated
    on[:, 1::2] = torch.where(copy, on[:, 0::2], on[:, 1::2])
    size = 1 + torch.rand(n_rows, features, generator=g)
    x = (on * size) @ directions + noise * torch.randn(n_rows, D_IN, generator=g)
    return normalised(x), on, directions


def build(variant, x, steps=300, seed=0, **settings):
    """A variant (name or class) ready for its first step, and its optimizer, in toy sizes."""
    cls = load_variant(variant) if isinstance(variant, str) else variant
    toy = {"d_sae": 64, "l0": 4.0, "batch_size": 256}
    for c in cls.chain():
        toy |= TOY.get(c.__module__.split(".")[-1], {})
    sae = cls(x.shape[1], steps, seed, **{**toy, **settings})
    opt = sae.make_optimizer()
    sae.init_from_data(x[:8192])
    return sae, opt


def steps(sae, opt, x, start=0, stop=None, each=None):
    """Take training steps start..stop on the rows x, in order; each(sae, out, terms) after every
    step."""
    for step in range(start, sae.steps if stop is None else stop):
        sae.step, sae.shard = step, 0
        sae.position = step * sae.batch_size % (len(x) - sae.batch_size + 1)
        rows = sae.choose_batch(len(x), generator(sae.seed, step, "batch"))
        out, terms, _ = train_py.train_step(sae, opt, x[rows], check=step == 0)
        if each:
            each(sae, out, terms)
        sae.stats = {}


def train(variant, x, steps_=300, seed=0, each=None, **settings):
    """A trained SAE in eval mode."""
    sae, opt = build(variant, x, steps_, seed, **settings)
    steps(sae, opt, x, each=each)
    sae.step = sae.steps
    return sae.eval()


@torch.no_grad()
def evaluate(sae, x):
    """-> (explained variance about the mean, L0, acts [n, d_sae]) on rows x."""
    out = sae(x)
    ev = 1 - (x - out.x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    return float(ev), float((out.acts > 0).sum(1).float().mean()), out.acts


@torch.no_grad()
def absorption(sae, x, on, directions, parent):
    """How often a parent is absorbed: with parent and child on, every latent near the parent
    (cosine above 0.8) is silent and a latent near both (above 0.3 each) fires. Mean over
    parent-child pairs."""
    fires = sae(x).acts > 0
    cos = unit(directions) @ unit(sae.W_dec).T                                  # [features, d_sae]
    shares = []
    for child in (parent >= 0).nonzero().flatten().tolist():
        p = int(parent[child])
        rows = fires[on[:, child] & on[:, p]]
        silent = ~rows[:, cos[p] > 0.8].any(1)
        stands_in = rows[:, (cos[p] > 0.3) & (cos[child] > 0.3)].any(1)
        shares.append((silent & stands_in).float().mean())
    return float(torch.stack(shares).mean())


def cosines(sae, latents=None):
    """Off-diagonal decoder cosines [n, n - 1] of `latents` (all)."""
    w = unit(sae.W_dec.detach() if latents is None else sae.W_dec.detach()[latents])
    n = len(w)
    return (w @ w.T)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)


def gini(values):
    """Gini index of non-negative values [n]: 0 all alike, near 1 one has all."""
    values = values.sort().values
    n = len(values)
    rank = torch.arange(1.0, n + 1)
    return float((2 * rank - n - 1) @ values / (n * values.sum()))


def write_cache(folder, x, rows_per_shard=8192, val=4096):
    """x as a finished cache that sae.Acts reads: the last `val` rows held out, the others in
    shards."""
    shards, kept = [], x[:len(x) - val]
    for i, rows in enumerate(kept.split(rows_per_shard)):
        n = len(rows)
        tensors = {"acts": rows.bfloat16(), "tokens": torch.zeros(n, dtype=torch.int32),
                   "context": torch.arange(n, dtype=torch.int32),
                   "position": torch.zeros(n, dtype=torch.int16)}
        name = f"train_{i:05d}.safetensors"
        shards.append({"file": name, "rows": n, "checksum": write_tensors(folder / name, tensors)})
    said = write_tensors(folder / "val.safetensors", {"acts": x[len(x) - val:].contiguous()})
    mean = kept.double().mean(0)
    write_json(
        folder / "meta.json",
        {"format": FORMAT, "complete": True, "source": "synthetic", "model": {"name": "toy"},
         "layer": 0, "hook": "resid_post", "hook_name": "none", "d_in": x.shape[1],
         "dtype": "bfloat16", "rows": len(kept), "rows_per_shard": rows_per_shard, "shards": shards,
         "val": {"file": "val.safetensors", "checksum": said}, "mean": mean.tolist(),
         "scale": float(x.shape[1] ** 0.5 / (kept - mean).norm(dim=1).mean()),
         "mean_norm": float(kept.norm(dim=1).mean()),
         "norm_limit": float(10 * kept.norm(dim=1).median())},
    )
    return folder

"""Toy data with known answers, and training on it by the very step that 02_train.py takes. Sizes: d_in 32, a run takes about a second."""
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from sae import generator, load_variant, unit, write_json, write_tensors  # noqa: E402

train_py = importlib.import_module("02_train")
D_IN = 32
SEEDS = 0, 1, 2              # of the tests of what variants do; more by pytest --seeds N, and under -m slow


def orthonormal(n, d_in=D_IN, seed=0):
    """n orthonormal directions [n, d_in]."""
    return torch.linalg.qr(torch.randn(d_in, d_in, generator=generator("directions", seed)))[0][:n]


def normalised(x):
    """Rows scaled so that E||x|| = sqrt(d_in), as 02_train.py feeds them."""
    return x * x.shape[1] ** 0.5 / x.norm(dim=1).mean()


def hierarchy(n_rows=40_000, trees=6, children=3, p_parent=0.25, p_child=0.6, noise=0.02, seed=0):
    """Trees of a parent and mutually exclusive children, which fire only with it: what provokes absorption (FAIR_TESTS 3.2).

    -> x [n, 32]; on [n, features] bool; directions [features, 32]; parent [features] index or -1. True L0 = trees * p_parent * (1 + p_child)."""
    g = generator("hierarchy", seed)
    features = trees * (1 + children)
    directions = orthonormal(features, seed=seed)
    parent = torch.tensor([-1 if f % (1 + children) == 0 else f - f % (1 + children) for f in range(features)])
    on = torch.zeros(n_rows, features, dtype=torch.bool)
    for tree in range(trees):
        root = tree * (1 + children)
        on[:, root] = torch.rand(n_rows, generator=g) < p_parent
        has_child = on[:, root] & (torch.rand(n_rows, generator=g) < p_child)
        which = torch.randint(children, (n_rows,), generator=g)
        for c in range(children):
            on[:, root + 1 + c] = has_child & (which == c)
    size = 1 + 0.2 * torch.randn(n_rows, features, generator=g).clamp(-3, 3)
    x = (on * size) @ directions + noise * torch.randn(n_rows, D_IN, generator=g)
    return normalised(x), on, directions, parent


def mixture(n_rows=40_000, features=48, l0=4.0, zipf=0.7, noise=0.05, mean=0.5, correlated=0.0, seed=0):
    """Sparse sums of more features than dimensions (Zipf frequencies), a mean and noise; `correlated`: the chance that feature 2i + 1
    copies feature 2i's firing. -> x [n, 32]; on [n, features]; directions [features, 32]."""
    g = generator("mixture", seed)
    directions = unit(torch.randn(features, D_IN, generator=g))
    p = (torch.arange(features) + 3.0) ** -zipf
    p = (p / p.sum() * l0).clamp(max=0.6)
    on = torch.rand(n_rows, features, generator=g) < p
    copy = torch.rand(n_rows, features // 2, generator=g) < correlated
    on[:, 1::2] = torch.where(copy, on[:, 0::2], on[:, 1::2])
    size = 1 + torch.rand(n_rows, features, generator=g)
    x = (on * size) @ directions + mean * torch.randn(D_IN, generator=g) + noise * torch.randn(n_rows, D_IN, generator=g)
    return normalised(x), on, directions


def build(variant, x, steps=300, seed=0, **settings):
    """A variant (name or class) ready for its first step, and its optimizer. Toy sizes unless `settings` say otherwise."""
    cls = load_variant(variant) if isinstance(variant, str) else variant
    toy = {"d_sae": 64, "l0": 4.0, "batch_size": 256, "lr": 3e-3}
    for c in cls.chain():
        toy |= vars(c).get("toy", {})              # a variant whose numbers don't fit 64 latents says so
    sae = cls(x.shape[1], steps, seed, **{**toy, **settings})
    opt = sae.make_optimizer()
    sae.init_from_data(x[:8192])
    return sae, opt


def steps(sae, opt, x, start=0, stop=None, each=None):
    """Take training steps start..stop on the rows x, in order, as 02_train.py does; each(sae, out, terms) is called after every step."""
    for step in range(start, sae.steps if stop is None else stop):
        sae.step, sae.first_row = step, 0
        sae.position = step * sae.batch_size % (len(x) - sae.batch_size + 1)
        rows = sae.choose_batch(len(x), generator(sae.seed, step, "batch"))
        out, terms, _ = train_py.train_step(sae, opt, x[rows], check=step == 0)        # as 02_train.py does
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
    """Share of rows with parent and child on where the parent's latent is silent while another latent fires whose decoder has a cosine
    above 0.3 with the parent; the parent's latent is the one that best tells parent on from off (F1). Mean over parent-child pairs."""
    fires = sae(x).acts > 0                                                     # [n, d_sae]
    hits = on.T.float() @ fires.float()                                         # [features, d_sae]
    f1 = 2 * hits / (on.sum(0)[:, None] + fires.sum(0)[None]).clamp_min(1)
    main = f1.argmax(1)
    towards = unit(directions) @ unit(sae.W_dec).T > 0.3                        # [features, d_sae]
    shares = []
    for child in (parent >= 0).nonzero().flatten().tolist():
        p = int(parent[child])
        rows = on[:, child] & on[:, p]
        others = towards[p].clone()
        others[main[p]] = False
        shares.append((~fires[rows][:, main[p]] & fires[rows][:, others].any(1)).float().mean())
    return float(torch.stack(shares).mean())


def cosines(sae, latents=None):
    """Off-diagonal decoder cosines [n, n - 1] of `latents` (all)."""
    w = unit(sae.W_dec.detach() if latents is None else sae.W_dec.detach()[latents])
    n = len(w)
    return (w @ w.T)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)


def write_cache(folder, x, rows_per_shard=8192, val=4096):
    """x as a finished cache that sae.Acts reads: the last `val` rows held out, the others in shards."""
    shards, kept = [], x[:len(x) - val]
    for i, rows in enumerate(kept.split(rows_per_shard)):
        n = len(rows)
        tensors = {"acts": rows.bfloat16(), "tokens": torch.zeros(n, dtype=torch.int32), "context": torch.arange(n, dtype=torch.int32),
                   "position": torch.zeros(n, dtype=torch.int16)}
        name = f"train_{i:05d}.safetensors"
        shards.append({"file": name, "rows": n, "bytes": tensors["acts"].nbytes, "checksum": write_tensors(folder / name, tensors)})
    said = write_tensors(folder / "val.safetensors", {"acts": x[len(x) - val:].contiguous()})
    mean_norm = float(kept.norm(dim=1).double().mean())
    write_json(folder / "meta.json", {
        "format": 1, "complete": True, "source": "synthetic", "model": {"name": "toy"}, "layer": 0, "hook": "resid_post", "hook_name": "none",
        "d_in": x.shape[1], "dtype": "bfloat16", "rows": len(kept), "rows_per_shard": rows_per_shard, "shards": shards,
        "val": {"file": "val.safetensors", "checksum": said}, "scale": x.shape[1] ** 0.5 / mean_norm, "mean_norm": mean_norm})
    return folder

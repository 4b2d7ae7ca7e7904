"""Every figure of one GPU that RESULTS.md wants, in one command. No GPU has run it yet: about ten minutes are expected; on a CPU it is a rehearsal.

    pip install --no-deps --target PEERS dictionary-learning==0.1.0 eai-sparsify==1.3.3 natsort simple-parsing docstring-parser schedulefree
    python tests/bench/gpu.py [rates train profile stage1 ideas] [--peers PEERS] [--steps N] [--json FILE]

rates    the GPU's own: a product in bfloat16, copying memory; choosing the highest of 65,536, and of the maxima of 8, which is what highest() does
         on a CPU first
train    steps of TopK and ReLU at d_in 2,304, three ways: sparse by the kernels, sparse by PyTorch's operations, dense; and the peers, under
         bfloat16 autocast. `floor`: the products that no step can do without (TopK: the encoder's; ReLU, dense: five) at that rate, and the
         bytes at that rate: 28 a parameter (Adam on fp32, a copy in bfloat16), and of TopK 8 k d_in a row (four gathers in bfloat16) and pre
         once. `apart`: how far the reconstruction is from the dense one's, relative. Tables for RESULTS.md
profile  where a TopK step's time goes
stage1   tokens a second of Gemma-2-2B's shape up to layer 12, contexts of 128, random weights, without the writing
ideas    all variants at 2,304 x 2,304 on rows with Gemma's statistics, N steps each: whether all is finite, L0 over the L0 wanted, and what
         10 M tokens of each would take; with what is far off at the end
"""
import argparse
import contextlib
import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = DEVICE.type == "cpu"
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
import transformers  # noqa: E402
from test_full_size import like_gemma  # noqa: E402
from toys import steps as take_steps  # noqa: E402
from train import TRAINERS, rows  # noqa: E402

import sae as base  # noqa: E402
from sae import blocks_of, hook_point, load_variant, variant_names  # noqa: E402

D_IN = 64 if TINY else 2304
CASES = [(variant, activation, D_IN, 128 if TINY else d_sae, 4 if TINY else l0, 16 if TINY else batch, [])       # as in train.py
         for variant, activation, d_sae, l0 in (("topk", "topk", 65_536, 20), ("topk", "topk", 65_536, 80), ("topk", "topk", 65_536, 320),
                                                ("topk", "topk", 16_384, 80), ("baseline", "relu", 16_384, 64), ("baseline", "relu", 2_304, 64))
         for batch in ((2_048,) if TINY else (2_048, 8_192))]
WAYS = {"sparse, kernels": (1e9, True), "sparse, PyTorch": (1e9, False), "dense": (0.0, True)}      # SPARSE_BELOW, by_kernel
SPARSE_BELOW, BY_KERNEL, CHOOSE = base.SPARSE_BELOW, base.by_kernel, base.kernels_pay               # sae.py's own choice


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run, n, warm=3):
    """Of one of n calls, after some to warm up."""
    for _ in range(warm):
        run()
    wait()
    started = time.perf_counter()
    for _ in range(n):
        run()
    wait()
    return (time.perf_counter() - started) / n


def peak():
    """Bytes that were allocated at most since the last call; 0 on a CPU."""
    if DEVICE.type == "cpu":
        return 0
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def free():
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    peak()


def rates():
    """Operations a second of a product in bfloat16, bytes a second of a copy (reading and writing)."""
    n = 256 if TINY else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    big = torch.randn(n * n, device=DEVICE)
    into = torch.empty_like(big)
    found = {"operations": 2 * n**3 / seconds(lambda: a @ b, 20), "bytes": 2 * big.nbytes / seconds(lambda: into.copy_(big), 20)}
    print(f"product in bfloat16 {found['operations'] / 1e12:.0f} TFLOP/s, copy {found['bytes'] / 1e12:.2f} TB/s")
    pre = torch.randn(2048, 1024 if TINY else 65_536, device=DEVICE, dtype=torch.bfloat16)
    for k in (20, 80, 320):
        ways = lambda: pre.topk(k, sorted=False), lambda: pre.unflatten(1, (8, -1)).amax(1).topk(min(k, pre.shape[1] // 8), sorted=False)
        found[f"highest {k}"] = [seconds(way, 2 if TINY else 20) for way in ways]
        print("the highest {} of {:,} in 2,048 rows: {:.2f} ms, of the maxima {:.2f} ms".format(k, pre.shape[1], *(1e3 * s for s in found[f"highest {k}"])))
    return found


def choose(way):
    """Make sae.py go this way."""
    base.SPARSE_BELOW, kernels = WAYS[way]
    base.by_kernel, base.kernels_pay = lambda *tensors: kernels, lambda *size: True


def train(rate, args):
    """One line for each case and way."""
    print("\n| case | l0 | batch | way | ms | tokens/s | of the floor | x our best | memory GB | apart |")
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    x, results = rows(64 if TINY else 32_768, D_IN).to(DEVICE), []
    for case in CASES:
        variant, _, d_in, d_sae, l0, batch, _ = case
        products, numbers = (1, 8 * l0 * d_in + 2 * d_sae) if variant == "topk" else (5, 0)
        floor = products * 2 * batch * d_in * d_sae / rate["operations"] + (28 * 2 * d_in * d_sae + batch * numbers) / rate["bytes"]
        found = {}
        free()
        choose("dense")
        ours, x_hat = TRAINERS["ours"](case, x[:batch], 1000, 0), {}
        for way in WAYS:                                                        # of the same weights; the steps below change them
            choose(way)
            with failing(found, way), torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
                x_hat[way] = ours.sae.train()(x[:batch]).x_hat.float()
        apart = {way: float((x_hat[way] - x_hat["dense"]).norm() / x_hat["dense"].norm()) for way in x_hat}
        del x_hat
        for way in apart:
            choose(way)
            with failing(found, way):
                found[way] = {"apart": apart[way], **timed(ours, x, batch, args.steps)}
        base.by_kernel = BY_KERNEL
        pays = CHOOSE(DEVICE, min(2048, batch), d_in, d_sae, l0)
        del ours
        for name in ("saelens", "dictionary_learning", "sparsify") if args.peers else ():      # the second one hides packages from the first
            if name != "sparsify" or variant == "topk":
                free()
                with failing(found, name):
                    found[name] = timed(TRAINERS[name](case, x[:batch], 1000, 0), x, batch, args.steps)
        best = min(r["seconds"] for way, r in found.items() if way in WAYS and "seconds" in r)
        for way, r in found.items():
            row = r["failed"] if "failed" in r else (
                f"{r['seconds'] * 1e3:.2f} | {batch / r['seconds']:,.0f} | {floor / r['seconds']:.0%} | {r['seconds'] / best:.2f} | "
                f"{r['memory'] / 1e9:.1f} | {r.get('apart', 0):.4f}")
            print(f"| {variant} {d_in:,} x {d_sae:,} | {l0} | {batch:,} | {way} | {row} |", flush=True)
        results.append({"case": case[:6], "floor": floor, "chosen": "sparse" if pays else "dense", **found})
    return results


def timed(trainer, x, batch, n):
    """Seconds a step, the first three not counted, and the memory at its most."""
    at = iter(range(10**9))
    def step():
        i = next(at)
        first = i % (len(x) // batch) * batch
        with contextlib.nullcontext() if isinstance(trainer, TRAINERS["ours"]) else torch.autocast(DEVICE.type, torch.bfloat16):
            trainer.step(i, x[first:first + batch])
    peak()
    return {"seconds": seconds(step, n), "memory": peak()}


@contextlib.contextmanager
def failing(found, name):
    """What fails is a line of the table: the rest of a rented GPU's minutes is still used."""
    try:
        yield
    except Exception as e:
        found[name] = {"failed": f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"}


def profile():
    """The costliest operations of five TopK steps."""
    case = CASES[len(CASES) // 6]
    x = rows(4 * case[5], D_IN).to(DEVICE)
    choose("sparse, kernels")
    ours = TRAINERS["ours"](case, x[:case[5]], 1000, 0)
    timed(ours, x, case[5], 3)
    with torch.profiler.profile() as p:
        timed(ours, x, case[5], 2)                                              # and three to warm up
    print(f"\nTopK {case[2]:,} x {case[3]:,}, k {case[4]}, batch {case[5]:,}, five steps, sparse by kernels")
    print(p.key_averages().table(sort_by=f"self_{DEVICE.type}_time_total", row_limit=25, max_name_column_width=70))


@torch.no_grad()
def stage1():
    """Tokens a second. 13 of Gemma-2-2B's 26 layers are built: no later one is reached."""
    cache_py = importlib.import_module("01_cache_acts")
    tiny = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=128, vocab_size=256) if TINY else {}
    config = transformers.Gemma2Config(num_hidden_layers=13, attn_implementation="eager", **tiny)
    with DEVICE:
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    found = {}
    for batch in (2,) if TINY else (32, 128):
        source = cache_py.LanguageModel.__new__(cache_py.LanguageModel)         # its reading of text is not measured
        source.model, source.device, source.dtype, source.batch = model, DEVICE, "bfloat16", batch
        source.points = [hook_point(block, "resid_post", "bench") for block in blocks_of(model, 13, "bench")]
        tokens = torch.randint(config.vocab_size, (batch, 128))
        found[batch] = tokens.numel() / seconds(lambda: source.activations(tokens, [12]), 2 if TINY else 20)
        print(f"Gemma-2-2B's shape to layer 12, {batch} contexts of 128: {found[batch]:,.0f} tokens/s", flush=True)
    return found


def ideas(n):
    """Every variant, n steps."""
    base.SPARSE_BELOW, base.by_kernel, base.kernels_pay = SPARSE_BELOW, BY_KERNEL, CHOOSE
    batch, found = 64 if TINY else 2048, {}
    x = like_gemma(256 if TINY else 40_960)
    x = (x * x.shape[1] ** 0.5 / x.norm(dim=1).mean()).to(DEVICE)
    held_out, x = x[:batch], x[batch:]
    size = dict(d_sae=64, l0=4.0) if TINY else dict(d_sae=2304, l0=64.0, lr=1e-3)
    for name in variant_names():
        free()
        with failing(found, name):
            sae = load_variant(name)(x.shape[1], n, 0, batch_size=batch, **size).to(DEVICE)
            opt = sae.make_optimizer()
            sae.init_from_data(x[:8192])
            take_steps(sae, opt, x, stop=n // 5)
            wait()
            started = time.perf_counter()
            take_steps(sae, opt, x, start=n // 5)
            wait()
            per_step = (time.perf_counter() - started) / (n - n // 5)
            sae.step = n
            with torch.no_grad():
                out = sae.eval()(held_out)
                ev = 1 - (held_out - out.x_hat).square().sum() / (held_out - held_out.mean(0)).square().sum()
            found[name] = {"finite": all(bool(v.isfinite().all()) for v in sae.state_dict().values()), "explained_variance": float(ev),
                           "l0": float((out.acts > 0).sum(1).float().mean()) / size["l0"],
                           "ms": per_step * 1e3, "memory": peak(), "of 10 M tokens": per_step * 10e6 / 2048}
            print(f"{name:22} {per_step * 1e3:8.2f} ms  L0 {found[name]['l0']:5.2f} x  explained variance {float(ev):6.3f}"
                  + ("" if found[name]["finite"] else "  NOT FINITE"), flush=True)
        if "failed" in found[name]:
            print(f"{name:22} FAILED: {found[name]['failed']}", flush=True)
    well = {k: r for k, r in found.items() if r.get("finite")}
    off = [f"{k} {r['l0']:.2f}" for k, r in well.items() if abs(r["l0"] - 1) >= 0.1]
    print(f"\n{len(well)} of {len(found)} variants finite, {len(well) - len(off)} with L0 within 10 %, off: {', '.join(off) or 'none'}\n"
          f"10 M tokens of each, one after the other, as {n} steps take it: {sum(r['of 10 M tokens'] for r in well.values()) / 60:.1f} minutes")
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", help="default: all")
    p.add_argument("--peers", help="folder with the peers' packages; without it only ours is measured")
    p.add_argument("--steps", type=int, default=2 if TINY else 20, help="timed, of each case and way (default: %(default)s)")
    p.add_argument("--idea-steps", type=int, default=10 if TINY else 300, help="of each variant (default: %(default)s)")
    p.add_argument("--json", help="write all figures here")
    args = p.parse_args()
    if args.peers:
        sys.path.append(args.peers)
    torch.set_float32_matmul_precision("high")                                  # as 02_train.py
    wanted, results = args.parts or ["rates", "train", "profile", "stage1", "ideas"], {}
    print(f"{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU, tiny: no figure here means anything'}, torch {torch.__version__}")
    rate = results["rates"] = rates()
    run = {"rates": lambda: rate, "train": lambda: train(rate, args), "profile": profile, "stage1": stage1, "ideas": lambda: ideas(args.idea_steps)}
    for part in wanted:
        results[part] = run[part]()
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

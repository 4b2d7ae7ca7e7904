"""What each variant costs against the base, as ratios.

    python tests/bench/variant_cost.py [NAMES ...]           time of a training step: d_in 256, d_sae 2,048, batch 1,024, L0 32
    python tests/bench/variant_cost.py --memory [NAMES ...]  peak memory of a training step: d_in 2,304, d_sae 16,384, batch 2,048, L0 80

Time: steps 1,500 to 1,511 of 5,000, when all schedules are on; what happens every 2 % of a run or less often is not in it. Six variants and
the base take turns of three steps, so that a machine that slows down slows down all; the ratio is that of their sums. On a CPU the
time is that of the processor (OMP_NUM_THREADS=1), so that other processes don't count.
Memory: a process of its own, and one step in which all that is ever due is due: new pairs, blocks and neighbours, 1,024 dead latents that AuxK
teaches and that restart, 256 of them copies to prune or merge. On a GPU it is torch's own count of the peak; on a CPU the
process' resident peak less what it had after importing torch. Codes are dense, and products on a CPU in float32.
"""
import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from toys import load_variant, steps, train_py  # noqa: E402

import sae as base  # noqa: E402
from sae import generator, unit, variant_names  # noqa: E402

base.SPARSE_BELOW = 0
train_py.BF16_FROM = float("inf")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rows(n, d_in):
    """Sparse sums of Zipf-frequent features with a mean and noise, E||x|| = sqrt(d_in)."""
    g = generator("bench")
    directions = unit(torch.randn(2 * d_in, d_in, generator=g))
    p = (torch.arange(2 * d_in) + 3.0) ** -0.8
    on = torch.rand(n, 2 * d_in, generator=g) < p / p.sum() * 30
    x = on.float() @ directions + 0.5 * torch.randn(d_in, generator=g) + 0.05 * torch.randn(n, d_in, generator=g)
    return (x * d_in ** 0.5 / x.norm(dim=1).mean()).to(DEVICE)


def prepare(name, x, n_steps, **settings):
    sae = load_variant(name)(x.shape[1], n_steps, **settings).to(DEVICE)
    opt = sae.make_optimizer()
    sae.init_from_data(x[:4096])
    return sae, opt


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_ratios(names, x):
    """Seconds of 12 steps of each variant, over the base's."""
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    group = {n: prepare(n, x, 5000, d_sae=2048, l0=32.0, batch_size=1024) for n in ["baseline", *names]}
    seconds = dict.fromkeys(group, 0.0)
    for start in range(1500, 1512, 3):
        for n, (sae, opt) in group.items():
            wait()
            started = clock()
            steps(sae, opt, x, start=start, stop=start + 3)
            wait()
            seconds[n] += clock() - started
    return {n: seconds[n] / seconds["baseline"] for n in names}


def peak_memory(name):
    """Bytes, in a process of its own: step 40 of 100, after a small one that leaves optimizer states and what a variant keeps between steps."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    batch, d_sae, few = 2048, 16_384, 256
    x, middle = rows(batch, 2304), d_sae // 2
    sae, opt = prepare(name, x[:batch // 4], 100, d_sae=d_sae, l0=80.0, batch_size=batch)
    with torch.no_grad():
        sae.W_dec[middle:middle + few] = sae.W_dec[:few]
        sae.b_enc[middle:middle + 4 * few] = -1e4
        sae.silent[middle:middle + 4 * few] = 50.0
    for step, sae.batch_size in ((38, batch // 32), (39, batch)):
        steps(sae, opt, x, start=step, stop=step + 1)
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", help="variants (default: all)")
    p.add_argument("--memory", action="store_true", help="peak memory instead of time")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    names = args.names or [n for n in variant_names() if n != "baseline"]
    if args.child:
        print(peak_memory(names[0]))
        return
    if args.memory:
        child = [sys.executable, __file__, "--memory", "--child"]
        ask = lambda n: int(subprocess.run([*child, n], capture_output=True, text=True, check=True).stdout)
        base = ask("baseline")
        print(f"baseline: {base / 1e9:.2f} GB on {DEVICE}")
        for n in names:
            print(f"{n:24} {ask(n) / base:5.2f}", flush=True)
        return
    x = rows(10_240, 256)
    for i in range(0, len(names), 6):
        for n, ratio in time_ratios(names[i:i + 6], x).items():
            print(f"{n:24} {ratio:5.2f}", flush=True)


if __name__ == "__main__":
    main()

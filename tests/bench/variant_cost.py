"""What each variant costs against the base: time of a step and peak memory, as ratios.

    python tests/bench/variant_cost.py [NAMES ...]           time, all by default: d_in 256, d_sae 2,048, batch 1,024, l0 32,
                                                             the first 32 steps of a run of 500
    python tests/bench/variant_cost.py --memory [NAMES ...]  peak memory of a process of its own at d_in 2,304, d_sae 16,384, batch 2,048

Variants take turns with the base, so that a machine that slows down slows down both; the ratio is of medians over the turns. On a CPU the
time is that of the processor (OMP_NUM_THREADS=1), so that other processes don't count, and codes are dense. On a GPU the
memory is torch's own count of the peak; on a CPU it is the process' resident peak less what it had after importing torch.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from toys import load_variant, steps  # noqa: E402

import sae as base  # noqa: E402
from sae import generator, unit, variant_names  # noqa: E402

base.SPARSE_BELOW = 0

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


def time_ratio(name, x, turns=4, per_turn=8, n_steps=500):
    """Median seconds of a turn, over the base's."""
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    size = dict(d_sae=2048, l0=32.0, batch_size=1024)
    pair = {n: prepare(n, x, n_steps, **size) for n in ("baseline", name)}
    seconds = {n: [] for n in pair}
    for turn in range(turns):
        for n, (sae, opt) in pair.items():
            wait()
            started = clock()
            steps(sae, opt, x, start=turn * per_turn, stop=(turn + 1) * per_turn)
            wait()
            seconds[n].append(clock() - started)
    return statistics.median(seconds[name]) / statistics.median(seconds["baseline"])


def peak_memory(name):
    """Bytes, in a process of its own: three steps at full size."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    x = rows(2048, 2304)
    sae, opt = prepare(name, x, 50, d_sae=16_384, l0=80.0, batch_size=2048)
    steps(sae, opt, x, stop=3)
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
        ask = lambda n: int(subprocess.run([sys.executable, __file__, "--memory", "--child", n], capture_output=True, text=True, check=True).stdout)
        base = ask("baseline")
        print(f"baseline: {base / 1e9:.2f} GB on {DEVICE}")
        for n in names:
            print(f"{n:24} {ask(n) / base:5.2f}", flush=True)
        return
    x = rows(10_240, 256)
    for n in names:
        print(f"{n:24} {time_ratio(n, x):5.2f}", flush=True)


if __name__ == "__main__":
    main()

"""How fast stage 1's host path is: everything between a forward pass and finished shards.

    python tests/bench/cache.py [--before FOLDER]     FOLDER: a checkout that is compared

Parts of 65,536 rows of 2,304 as bfloat16 go through the mask, norms, statistics, shuffle, checksums
and files of 01_cache_acts.py, as after a forward pass on a GPU; the forward pass itself is left
out. The checkouts take turns, each in a process of its own. Seconds are CPU seconds of the process
(the disk is not measured) and, beside them, by the clock.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROWS, D_IN, CTX, PARTS = 65_536, 2304, 128, 2


def activations(part):
    """[512, 128, 2304] bfloat16, different in each part."""
    g = torch.Generator().manual_seed(part)
    return torch.randn(ROWS // CTX, CTX, D_IN, generator=g).bfloat16()


def settings():
    args = SimpleNamespace(dtype="bfloat16", tokens=ROWS * PARTS, rows_per_shard=ROWS, seed=0,
                           window=None, ring=None, rank=0, processes=1)
    return args, dict(source="model", model={}, layer=0, hook="resid_post", d_in=D_IN, ctx=CTX)


def new_way(script, folder, acts):
    """Seconds (CPU, clock) of this checkout."""
    args, of_source = settings()
    tokens = torch.randint(3, 1000, (ROWS // CTX, CTX), dtype=torch.int32)
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    cache = script.Cache(folder, of_source, args)
    cache.begin({"val": {"tokens": tokens}}, 0, norm_limit=1e6)
    started = time.process_time(), time.perf_counter()
    for part, of_part in enumerate(acts):
        cache.add(part, tokens, mask, 0, of_part.flatten(0, 1))()
    cache.finish(PARTS, 0, 1)
    return time.process_time() - started[0], time.perf_counter() - started[1]


def old_way(script, folder, acts):
    """Seconds (CPU, clock) of the checkout before, with its ring and windows."""
    args, of_source = settings()
    source = script.LanguageModel.__new__(script.LanguageModel)
    source.ctx, source.special, source.tokenizer = (CTX, torch.tensor([1]),
                                                    SimpleNamespace(pad_token_id=0))
    contexts = torch.randint(3, 1000, (ROWS // CTX, CTX)).tolist()
    source.held_out = lambda: ({"val": {"tokens": torch.zeros(1, CTX)}}, (0, [], 0))
    cache = script.Cache(folder, of_source, 0, args)
    cache.open()
    cache.begin(source, {})
    started = time.process_time(), time.perf_counter()
    for part, of_part in enumerate(acts):
        source.activations = lambda tokens, layers: [of_part.cpu()]
        (rows, dropped), = source.rows(contexts, part * len(contexts), [0])
        cache.append(part * len(contexts), len(contexts), rows, dropped, (0, [], 0))
    cache.finish()
    return time.process_time() - started[0], time.perf_counter() - started[1]


def measure(checkout):
    """Print [CPU seconds, clock seconds] of a checkout as JSON."""
    sys.path.insert(0, checkout)
    script = importlib.import_module("01_cache_acts")
    way = new_way if hasattr(script.Cache, "add") else old_way
    with tempfile.TemporaryDirectory(dir=".") as folder:
        print(json.dumps(way(script, Path(folder), [activations(part) for part in range(PARTS)])))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--before", help="folder of a checkout to compare with")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--measure", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        return measure(args.measure)
    here = str(Path(__file__).resolve().parent.parent.parent)
    seconds = {checkout: [] for checkout in ([args.before] if args.before else []) + [here]}
    for _ in range(args.turns):
        for checkout in seconds:
            command = [sys.executable, __file__, "--measure", checkout]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds[checkout].append(json.loads(done.stdout.splitlines()[-1]))
    for checkout, pairs in seconds.items():
        cpu, clock = (statistics.median(values) for values in zip(*pairs))
        print(
            f"{checkout}: {cpu / PARTS:.2f} CPU s a shard of {ROWS} x {D_IN}, "
            f"{ROWS * PARTS / cpu:,.0f} rows/CPU s; by the clock {clock / PARTS:.2f} s, "
            f"{ROWS * PARTS / clock:,.0f} rows/s"
        )
    if args.before:
        ratios = [a[0] / b[0] for a, b in zip(seconds[args.before], seconds[here])]
        print("before / now, CPU seconds: " + ", ".join(f"{ratio:.1f}" for ratio in ratios))


if __name__ == "__main__":
    main()

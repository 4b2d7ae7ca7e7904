"""How fast 02_train.py's reader gives shards, checked, against a plain sequential read.

    python tests/bench/loader.py [--rows 65536] [--d-in 2304] [--shards 4]

Both read the same files from the page cache, in turns; the plain read checks nothing. Printed is
the median of plain over ours (1: as fast as reading alone), and the same for the old way: read(),
checksum and safetensors' parser.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
import xxhash

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from sae import Acts  # noqa: E402
from toys import train_py, write_cache  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=65_536)
    p.add_argument("--d-in", type=int, default=2304)
    p.add_argument("--shards", type=int, default=4)
    p.add_argument("--turns", type=int, default=7)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        x = torch.randn(args.rows * args.shards + 1000, args.d_in)
        acts = Acts(write_cache(Path(folder) / "acts", x, args.rows, val=1000))
        del x
        files = [acts.folder / shard["file"] for shard in acts.shards]
        kept = bytearray(max(f.stat().st_size for f in files))

        def plain():
            for file in files:
                with open(file, "rb", buffering=0) as f:
                    f.readinto(kept)

        def ours():
            for rows in train_py.read_ahead(acts, range(len(files)), torch.device("cpu")):
                rows[-1, -1].item()

        def old():
            for file in files:
                blob = file.read_bytes()
                xxhash.xxh3_128(blob).hexdigest()
                safetensors.torch.load(blob)["acts"][-1, -1].item()

        times = {way: [] for way in (plain, ours, old)}
        for _ in range(args.turns + 1):
            for way in times:
                started = time.perf_counter()
                way()
                times[way].append(time.perf_counter() - started)
        for way in (ours, old):
            ratios = [a / b for a, b in zip(times[plain][1:], times[way][1:])]
            print(f"{way.__name__}: {statistics.median(ratios):.2f} of a plain read "
                  f"({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()

"""How fast batches come from the cache: 02_train.py's reader against a plain read of the same files and other loaders.

    python tests/bench/loader.py [--rows 65536] [--d-in 512] [--json FILE]

Every way gives all rows once, in batches of 2,048 as float32; they take turns, from files that are in the page cache. `plain` reads a file
whole and slices it, in the stored order; `buffer` draws random unread rows as dictionary_learning's ActivationBuffer does, from tensors in
memory; `DataLoader` shuffles single rows, from tensors in memory. Ours reads ahead in a thread, and checks every file's checksum and numbers.
Figures: MB of stored activations per second of CPU and of wall time, medians over the turns, and as ratios to plain.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # as in 02_train.py
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from toys import train_py, write_cache  # noqa: E402

from sae import Acts, generator  # noqa: E402

BATCH, TURNS = 2048, 7


def ours(acts):
    for _, position, rows, _ in train_py.stream(acts, train_py.plan_steps(acts, BATCH, 1), torch.device("cpu"), 0):
        yield rows[position * BATCH:(position + 1) * BATCH].float()


def plain(acts):
    for shard in acts.shards:
        blob = bytearray((acts.folder / shard["file"]).read_bytes())
        start = 8 + int.from_bytes(blob[:8], "little")
        rows = torch.frombuffer(blob, dtype=torch.bfloat16, offset=start, count=shard["rows"] * acts.d_in).view(-1, acts.d_in)
        for batch in rows.split(BATCH):
            yield batch.float()


def buffer(acts):
    rows = acts.all_rows
    read = torch.zeros(len(rows), dtype=torch.bool)
    while len(unread := (~read).nonzero().squeeze()) >= BATCH:
        chosen = unread[torch.randperm(len(unread))[:BATCH]]
        read[chosen] = True
        yield rows[chosen].float()


def loader(acts):
    data = torch.utils.data.TensorDataset(acts.all_rows)
    for batch, in torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True):
        yield batch.float()


WAYS = {"ours": ours, "plain": plain, "buffer": buffer, "DataLoader": loader}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=65_536, help="in 4 shards (default: %(default)s)")
    p.add_argument("--d-in", type=int, default=512)
    p.add_argument("--json", help="write all figures here")
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        x = torch.randn(args.rows + BATCH, args.d_in, generator=generator("loader"))
        acts = Acts(write_cache(Path(folder), x, rows_per_shard=args.rows // 4, val=BATCH))
        acts.all_rows = torch.cat([acts.shard(i)["acts"] for i in range(4)])
        speeds = {way: [] for way in WAYS}
        for _ in range(TURNS):
            for way, batches in WAYS.items():
                cpu, wall, seen = time.process_time(), time.perf_counter(), 0
                for batch in batches(acts):
                    seen += len(batch)
                assert seen == args.rows, (way, seen)
                size = 2 * seen * args.d_in / 1e6
                speeds[way].append((size / (time.process_time() - cpu), size / (time.perf_counter() - wall)))
    result = {}
    print(f"{args.rows:,} rows of {args.d_in}, {2 * args.rows * args.d_in / 1e6:.0f} MB\n{'':12} {'MB/CPU s':>9} {'MB/s':>9} {'CPU, x plain':>13} {'wall, x plain':>13}")
    for way, turns in speeds.items():
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(turns[1:], speeds["plain"][1:])) for i in (0, 1)]
        result[way] = {"speeds": turns, "ratios": ratios}
        print(f"{way:12} {statistics.median(s[0] for s in turns[1:]):9.0f} {statistics.median(s[1] for s in turns[1:]):9.0f} {ratios[0]:13.2f} {ratios[1]:13.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""What a training step costs: this checkout, another one, and dictionary_learning, in turns.

    python tests/bench/train.py [--old FOLDER] [--cases topk ...] [--turns 7]

Every trainer is a process of its own with one thread and takes its steps when it is its turn, so
that a machine that slows down slows all of them. Printed: the median over the turns of each one's
time over this checkout's, the least and the most, and peak memory above that after imports and
data. dictionary_learning 0.1.0 takes part if it is installed (pip install --no-deps
dictionary-learning==0.1.0).
"""
import argparse
import importlib
import importlib.util
import inspect
import os
import re
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # as in 02_train.py

ROOT = Path(__file__).resolve().parents[2]
KINDS = "relu", "topk", "batch_topk", "jumprelu"
CASES = {  # name: (activation, d_in, d_sae, l0, batch)
    **{kind: (kind, 128, 1024, 16.0, 2048) for kind in KINDS},
    **{f"{kind}-wide": (kind, 512, 8192, 32.0, 2048) for kind in KINDS},
}
STEPS = 5                    # of a turn


def rows(n, d_in):
    """Sparse sums of Zipf-frequent features, E||x|| = sqrt(d_in) [n, d_in]."""
    import torch
    g = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=g), dim=1)
    p = (torch.arange(4 * d_in) + 3.0) ** -0.8
    on = torch.rand(n, 4 * d_in, generator=g) < p / p.sum() * 30
    x = (on * (0.5 + torch.rand(n, 4 * d_in, generator=g))) @ directions
    x = x + 0.05 * torch.randn(n, d_in, generator=g)
    x = x - x.mean(0)
    return x * d_in ** 0.5 / x.norm(dim=1).mean()


def ours(root, case):
    """step() of the checkout in `root`."""
    sys.path.insert(0, str(root))
    train = importlib.import_module("02_train")
    sae_py = importlib.import_module("sae")
    activation, d_in, d_sae, l0, batch = CASES[case]
    x = rows(4 * batch, d_in)
    sae = sae_py.SAE(d_in, 2000, d_sae=d_sae, l0=l0, batch_size=batch, activation=activation)
    opt = sae.make_optimizer()
    sae.init_from_data(x)
    check = {"check": False} if "check" in inspect.signature(train.train_step).parameters else {}

    def step(n):
        sae.step = n
        train.train_step(sae, opt, x[n % 4 * batch:][:batch], **check)
    return step


def dictionary_learning(_, case, device="cpu"):
    """step() of dictionary_learning's trainer on the same rows, scaled as its own pipeline does."""
    # only its buffers need these, which take no part
    for name, needed in (("nnsight", "LanguageModel"), ("zstandard", "open"),
                         ("datasets", "load_dataset")):
        if name not in sys.modules and not importlib.util.find_spec(name):
            sys.modules[name] = types.SimpleNamespace(**{needed: None})
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    activation, d_in, d_sae, l0, batch = CASES[case]
    x = (rows(4 * batch, d_in) / d_in ** 0.5).to(device)
    both = dict(steps=2000, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="",
                device=device, lr=1e-3)
    kinds = {"topk": (TopKTrainer, {"k": int(l0)}),
             "batch_topk": (BatchTopKTrainer, {"k": int(l0)}),
             "relu": (StandardTrainer, {"l1_penalty": 0.1})}
    trainer_class, more = kinds[activation]
    wanted = inspect.signature(trainer_class.__init__).parameters
    given = {**both, **more, "warmup_steps": 0, "sparsity_warmup_steps": None, "decay_start": None}
    trainer = trainer_class(**{key: value for key, value in given.items() if key in wanted})
    return lambda n: trainer.update(n, x[n % 4 * batch:][:batch])


def work(kind, root, case):
    """Take STEPS steps for each line of stdin; answer with the seconds of one, and with memory at
    the end."""
    import torch
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(kind == "ours")
    torch.utils.deterministic.fill_uninitialized_memory = False
    step, n = globals()[kind](root, case), 0
    Path("/proc/self/clear_refs").write_text("5")           # the peak counts from here on
    before = peak_memory()
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(STEPS):
            step(n)
            n += 1
        print((time.perf_counter() - started) / STEPS, peak_memory() - before, flush=True)


def peak_memory():
    """The most memory that this process has had, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--old", help="another checkout to compare with")
    p.add_argument("--cases", nargs="+", default=list(CASES))
    p.add_argument("--turns", type=int, default=7)
    p.add_argument("--worker", nargs=3)
    args = p.parse_args()
    if args.worker:
        return work(*args.worker)
    trainers = {"this": ("ours", str(ROOT))}
    if args.old:
        trainers["old"] = ("ours", args.old)
    print("| case | trainer | time over this | least | most | MiB |\n|---|---|---:|---:|---:|---:|")
    for case in args.cases:
        peers = dict(trainers)
        if importlib.util.find_spec("dictionary_learning") and not case.startswith("jumprelu"):
            peers["dictionary_learning"] = ("dictionary_learning", "-")
        processes = {
            name: subprocess.Popen([sys.executable, __file__, "--worker", *what, case], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
            for name, what in peers.items()
        }
        times, memory = {name: [] for name in peers}, {}
        for turn in range(args.turns + 1):
            for name, process in processes.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                seconds, memory[name] = map(float, process.stdout.readline().split())
                times[name].append(seconds)
        for name in peers:
            ratios = [a / b for a, b in zip(times[name][1:], times["this"][1:])]
            ms = (
                f" ({statistics.median(times[name][1:]) * 1e3:.0f} ms here)"
                if name == "this"
                else ""
            )
            print(
                f"| {case} | {name}{ms} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | "
                f"{max(ratios):.2f} | {memory[name]:.0f} |",
                flush=True,
            )
        for process in processes.values():
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    main()

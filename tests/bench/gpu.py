"""What is to be known of a GPU, in ten minutes: each phase a process of its own under a time limit.

    python tests/bench/gpu.py --out gpu.jsonl             on a GPU
    python tests/bench/gpu.py --out gpu.jsonl --toy       toy sizes, anywhere: does it run

Needs torch, transformers, safetensors, numpy, xxhash, filelock and tqdm; no datasets, sae_bench or
network. Appends JSON lines to --out: one per figure, and one per phase with how it ended. Times in
ms are medians.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
KINDS = ("relu", "topk", "batch_topk", "jumprelu")


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ms(action, times=10, warm=3):
    """Median wall time of action() in ms, and of the host's part of it, before the GPU is waited
    for."""
    wall, host = [], []
    for n in range(warm + times):
        sync()
        started = time.perf_counter()
        action()
        host.append(time.perf_counter() - started)
        sync()
        wall.append(time.perf_counter() - started)
    return statistics.median(wall[warm:]) * 1e3, statistics.median(host[warm:]) * 1e3


def launches(action):
    """How many kernels (on a CPU: operators) one action() starts."""
    cuda = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as found:
        action()
        sync()
    wanted = torch.profiler.DeviceType.CUDA if cuda else torch.profiler.DeviceType.CPU
    return sum(event.device_type == wanted for event in found.events()), found


class Bench:
    """An SAE on random rows, and its training step."""

    def __init__(self, device, variant="baseline", d_in=2304, d_sae=2304, batch=2048, path=None,
                 **settings):
        from sae import SAE, load_variant
        if path:
            SAE.path = property(lambda self: path)
        self.train_step = importlib.import_module("02_train").train_step
        self.x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(0)).to(device)
        self.sae = load_variant(variant)(d_in, 1000, d_sae=d_sae, batch_size=batch, **settings).to(
            device)
        self.opt = self.sae.make_optimizer()
        self.sae.position = self.sae.shard = 0
        self.sae.init_from_data(self.x)
        self.at = 0

    def step(self):
        self.sae.step = self.at
        self.at += 1
        rows = self.sae.choose_batch(len(self.x), torch.Generator().manual_seed(self.at))
        return self.train_step(self.sae, self.opt, self.x[rows])


# ---- phases --------------------------------------------------------------------------------------


def versions(say, device, toy):
    import platform

    import transformers
    say(python=platform.python_version(), torch=torch.__version__,
        transformers=transformers.__version__)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        say(gpu=properties.name, memory_gb=properties.total_memory / 1e9)
    size = 2 ** 20 if toy else 2 ** 28
    for pinned in (False, True)[:1 + (device.type == "cuda")]:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        wall, _ = median_ms(lambda: host.to(device, non_blocking=True).sum())
        say(copy="pinned" if pinned else "pageable", gb_per_s=size / wall / 1e6)


def steps(say, device, toy):
    """The first steps on this device against the same in fp32 on the CPU."""
    for activation in KINDS:
        sizes = dict(d_in=64, d_sae=512, batch=256, activation=activation, l0=8.0)
        losses = {}
        for where in ("cpu", device):
            bench = Bench(torch.device(where), **sizes)
            losses[str(where)] = [float(sum(bench.step()[1].values())) for _ in range(20)]
        cpu, there = torch.tensor(list(losses.values())[0]), torch.tensor(list(losses.values())[-1])
        say(activation=activation,
            largest_relative_difference=float(((there - cpu) / cpu).abs().max()))


def sizes(say, device, toy):
    """Wall and host time, launches and memory of a TopK step."""
    for d_sae, k in ((2304, 40), (16_384, 80), (65_536, 80)) if not toy else ((256, 4),):
        d_in = 2304 if not toy else 64
        bench = Bench(device, d_in=d_in, d_sae=d_sae, batch=2048 if not toy else 64,
                      activation="topk", l0=float(k))
        wall, host = median_ms(bench.step)
        count, _ = launches(bench.step)
        memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        say(d_sae=d_sae, k=k, path=bench.sae.path, wall_ms=wall, host_ms=host, launches=count,
            memory_gb=memory, rows_per_s=len(bench.x) / wall * 1e3)
        del bench


def profile(say, device, toy):
    bench = Bench(device, **({} if not toy else dict(d_in=64, d_sae=256, batch=64)),
                  activation="topk", l0=40.0 if not toy else 4.0)
    bench.step()
    _, found = launches(bench.step)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    say(table=found.key_averages().table(sort_by=key, row_limit=25).splitlines())


def stage2(say, device, toy):
    """From disk: one run, nine runs, nine runs in four processes on one GPU."""
    from toys import write_cache
    here = Path(tempfile.mkdtemp())
    rows, d_in = (400_000, 2304) if not toy else (6_000, 32)
    write_cache(here / "acts" / "tiny", torch.randn(rows, d_in),
                rows_per_shard=65_536 if not toy else 2_000, val=1000)
    variants = ["baseline", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "p_anneal",
                "ortsae", "fixed_ortho"]
    small = ["--set", f"d_sae={2304 if not toy else 64}", f"l0={40 if not toy else 4}",
             f"batch_size={2048 if not toy else 256}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    for runs, start in ((variants[1:2], [sys.executable]), (variants, [sys.executable]),
                        (variants, torchrun)):
        shutil.rmtree(here / "runs", ignore_errors=True)
        started = time.perf_counter()
        done = subprocess.run(
            [*start, str(ROOT / "02_train.py"), "--variant", *runs, "--seed", "0", *small],
            cwd=here, capture_output=True, text=True)
        say(runs=len(runs), processes=4 if start is torchrun else 1,
            seconds=time.perf_counter() - started, code=done.returncode,
            said=done.stderr[-300:] if done.returncode else "")
    shutil.rmtree(here)


def stage1(say, device, toy):
    """Caching on a Gemma shape with random weights, to layer 12 of 13."""
    import transformers
    here = Path(tempfile.mkdtemp())
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, vocab_size=512)
    gemma = dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=13,
                 num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=32_000)
    config = transformers.Gemma2Config(**(small if toy else gemma))
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        here / "gemma")
    letters = "abcdefghijklmnopqrstuvwxyz .\n"
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {c: i + 3 for i, c in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(here / "gemma")
    draw = torch.randint(len(letters), (3_000_000 if not toy else 60_000,),
                         generator=torch.Generator().manual_seed(0))
    (here / "text.txt").write_text("".join(letters[i] for i in draw.tolist()))
    started = time.perf_counter()
    tokens = 1_000_000 if not toy else 20_000
    done = subprocess.run(
        [sys.executable, str(ROOT / "01_cache_acts.py"), "--model", "gemma", "--layer",
         "12" if not toy else "1", "--data", "text.txt", "--ctx", "128", "--tokens", str(tokens)],
        cwd=here,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    say(seconds=seconds, tokens_per_s=tokens / seconds, code=done.returncode,
        said=done.stderr[-300:] if done.returncode else "")
    shutil.rmtree(here)


def rule(say, device, toy):
    """Sparse against dense at several k: where the rule of SAE.path should be."""
    shapes = ((2304, 4096), (2304, 16_384), (2304, 65_536)) if not toy else ((64, 512),)
    for d_in, d_sae in shapes:
        for share in (0.002, 0.005, 0.009, 0.02):
            times = {}
            for path in ("sparse", "dense"):
                bench = Bench(device, d_in=d_in, d_sae=d_sae, batch=2048 if not toy else 64,
                              path=path, activation="topk", l0=float(max(1, round(share * d_sae))))
                times[path], _ = median_ms(bench.step, times=5)
                del bench
            say(d_in=d_in, d_sae=d_sae, share=share, sparse_ms=times["sparse"],
                dense_ms=times["dense"], sparse_over_dense=times["sparse"] / times["dense"])


def variants(say, device, toy):
    """Sixty steps of every variant."""
    from sae import variant_names
    for name in variant_names() if not toy else variant_names()[:3]:
        bench = Bench(device, name, d_in=128, d_sae=1024, batch=2048 if not toy else 256)
        try:
            wall, _ = median_ms(bench.step, times=57 if not toy else 3)
            say(variant=name, wall_ms=wall, error=float(bench.step()[1]["recon"]))
        except Exception as e:                             # told, and the others are measured
            say(variant=name, failed=f"{type(e).__name__}: {e}")


def tests(say, device, toy):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "test_gpu.py")],
        capture_output=True, text=True)
    say(code=done.returncode, said=done.stdout.splitlines()[-15:])


def peers(say, device, toy):
    """The plain way: autograd through dense products, torch's Adam, as most public trainers do."""
    from sae import unit
    for d_sae, k in ((16_384, 80), (65_536, 80)) if not toy else ((512, 4),):
        d_in, batch = (2304, 2048) if not toy else (64, 64)
        x = torch.randn(batch, d_in, device=device)
        W = unit(torch.randn(d_sae, d_in, device=device))
        encoder, decoder = torch.nn.Parameter(W.T.clone()), torch.nn.Parameter(W.clone())
        b = torch.nn.Parameter(torch.zeros(d_in, device=device))
        opt = torch.optim.Adam([encoder, decoder, b], lr=3e-4)

        def plain():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                pre = ((x - b) @ encoder).relu()
                top = pre.topk(k, sorted=False)
                acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
                loss = (acts @ decoder + b - x).pow(2).mean()
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([encoder, decoder, b], 1.0)
            opt.step()
            with torch.no_grad():
                decoder.copy_(unit(decoder))

        ours = Bench(device, d_in=d_in, d_sae=d_sae, batch=batch, activation="topk", l0=float(k))
        theirs_ms, ours_ms = median_ms(plain, times=5)[0], median_ms(ours.step, times=5)[0]
        say(d_sae=d_sae, k=k, plain_ms=theirs_ms, ours_ms=ours_ms,
            plain_over_ours=theirs_ms / ours_ms)


PHASES = {versions: 25, steps: 45, sizes: 80, profile: 30, stage2: 75, stage1: 45, rule: 60,
          variants: 90, tests: 60, peers: 70}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="gpu.jsonl")
    p.add_argument("--toy", action="store_true")
    p.add_argument("--phase", choices=[phase.__name__ for phase in PHASES])
    args = p.parse_args()

    def say(**found):
        line = json.dumps({"phase": args.phase, **found})
        print(line[:300], flush=True)
        with open(args.out, "a") as f:
            f.write(line + "\n")

    if args.phase:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        globals()[args.phase](say, device, args.toy)
        return
    for phase, seconds in PHASES.items():
        args.phase = phase.__name__
        command = [sys.executable, __file__, "--phase", args.phase, "--out",
                   os.path.abspath(args.out)]
        started = time.perf_counter()
        try:
            code = subprocess.run(command + ["--toy"] * args.toy,
                                  timeout=seconds * (10 if args.toy else 1)).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        say(ended=code, seconds=time.perf_counter() - started)


if __name__ == "__main__":
    main()

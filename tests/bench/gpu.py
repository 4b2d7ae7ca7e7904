"""What is to be known of a GPU, in ten minutes: each phase a process of its own under a time limit.

    python tests/bench/gpu.py --out gpu.jsonl             on a GPU
    python tests/bench/gpu.py --out gpu.jsonl --toy       toy sizes, anywhere: does it run

Needs torch, transformers, safetensors, numpy, scipy, pandas, xxhash, filelock, tqdm, pytest and
pytest-xdist; no datasets, sae_bench or network. Appends JSON lines to --out: one per figure, and
one per phase with how it ended. Times in ms are medians. dictionary_learning takes part if it is
installed.
"""

import argparse
import importlib
import importlib.util
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
    """Where a TopK step's time goes, on both paths."""
    for d_sae, k, path in (((2304, 40, "dense"), (65_536, 80, "dense"), (65_536, 80, "sparse"))
                           if not toy else ((256, 4, "dense"),)):
        bench = Bench(device, d_in=2304 if not toy else 64, d_sae=d_sae, path=path,
                      batch=2048 if not toy else 64, activation="topk", l0=float(k))
        for _ in range(3):
            bench.step()
        _, found = launches(bench.step)
        rows = sorted(found.key_averages(), key=lambda row: (-row.self_device_time_total,
                                                             -row.self_cpu_time_total))
        say(d_sae=d_sae, path=path, calls_and_ms_of_device_and_host={
            row.key[:60]: [row.count, row.self_device_time_total / 1e3,
                           row.self_cpu_time_total / 1e3] for row in rows[:30]})
        del bench


def stage2(say, device, toy):
    """From disk: nine runs in four processes on one GPU, nine runs in one, one run."""
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
    for runs, start in ((variants, torchrun), (variants, [sys.executable]),
                        (variants[1:2], [sys.executable])):
        shutil.rmtree(here / "runs", ignore_errors=True)
        started = time.perf_counter()
        done = subprocess.run(
            [*start, str(ROOT / "02_train.py"), "--variant", *runs, "--seed", "0", *small],
            cwd=here, capture_output=True, text=True)
        say(runs=len(runs), processes=4 if start is torchrun else 1,
            seconds=time.perf_counter() - started, code=done.returncode,
            said=done.stderr[-300:] if done.returncode else "")
    shutil.rmtree(here)


def stages(say, device, toy):
    """Stages 1 to 3 on a Gemma shape with random weights, to layer 12 of 13."""
    import transformers
    here = Path(tempfile.mkdtemp())
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, vocab_size=512)
    gemma = dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=13,
                 num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=32_000)
    config = transformers.Gemma2Config(**(small if toy else gemma))
    started = time.perf_counter()
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(here / "gemma")
    del model
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
    say(script="the model and its text", seconds=time.perf_counter() - started)
    tokens = 1_000_000 if not toy else 20_000
    acts = "gemma_l1" if toy else "gemma_l12"
    settings = (["d_sae=64", "l0=4", "batch_size=256"] if toy
                else ["d_sae=16384", "l0=80", "batch_size=2048"])
    for script, *given in (
            ("01_cache_acts.py", "--model", "gemma", "--layer", "1" if toy else "12", "--data",
             "text.txt", "--ctx", "128", "--tokens", str(tokens)),
            ("02_train.py", "--acts", acts, "--seed", "0", "--variant", "topk", "baseline", "--set",
             *settings),
            ("03_eval.py", "--eval", "core", "geometry")):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, str(ROOT / script), *given], cwd=here,
                              capture_output=True, text=True)
        said = done.stderr if done.returncode else done.stdout
        say(script=script, seconds=time.perf_counter() - started, tokens=tokens,
            code=done.returncode, said=said[-600:])
    shutil.rmtree(here)


def rule(say, device, toy):
    """Sparse against dense at several k: whether SAE.path chooses the faster one."""
    shapes = (((768, 6144), (2304, 2304), (2304, 8192), (2304, 16_384), (2304, 65_536))
              if not toy else ((64, 512),))
    for d_in, d_sae in shapes:
        for kind in ("topk", "batch_topk"):
            for share in (0.0025, 0.005, 0.01, 0.02):
                times = {}
                for path in ("sparse", "dense"):
                    bench = Bench(device, d_in=d_in, d_sae=d_sae, batch=2048 if not toy else 64,
                                  path=path, activation=kind, l0=max(1.0, share * d_sae))
                    times[path], _ = median_ms(bench.step, times=5, warm=2)
                    del bench
                say(activation=kind, d_in=d_in, d_sae=d_sae, share=share, sparse_ms=times["sparse"],
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
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-n", "4", "-m", "gpu",
         str(ROOT / "tests" / "test_gpu.py")], capture_output=True, text=True)
    say(code=done.returncode, said=done.stdout.splitlines()[-60:])


def peers(say, device, toy):
    """The plain way: autograd through dense products, torch's Adam, as most public trainers do; and
    dictionary_learning's own steps under autocast."""
    from sae import unit
    from train import CASES, dictionary_learning
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

        times = {"plain": median_ms(plain, times=5)[0]}
        for kind in ("topk", "batch_topk"):
            ours = Bench(device, d_in=d_in, d_sae=d_sae, batch=batch, activation=kind, l0=float(k))
            times[f"ours {kind}"] = median_ms(ours.step, times=5)[0]
            del ours
            if importlib.util.find_spec("dictionary_learning"):
                CASES["here"] = (kind, d_in, d_sae, float(k), batch)
                step = dictionary_learning(None, "here", device.type)

                def theirs():
                    with torch.autocast(device.type, torch.bfloat16,
                                        enabled=device.type == "cuda"):
                        step(0)
                times[f"dictionary_learning {kind}"] = median_ms(theirs, times=5)[0]
                del step
        say(d_sae=d_sae, k=k, ms=times)


PHASES = {versions: 25, steps: 25, tests: 100, sizes: 30, rule: 70, peers: 50, stages: 120,
          stage2: 90, variants: 60, profile: 30}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="gpu.jsonl")
    p.add_argument("--toy", action="store_true")
    p.add_argument("--phase", choices=[phase.__name__ for phase in PHASES])
    args = p.parse_args()

    def say(**found):
        line = json.dumps({"phase": args.phase, **found})
        print(line[:3000], flush=True)
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

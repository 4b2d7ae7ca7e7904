"""What a training step costs here and with the peers, and what is reached: the same rows, sizes, learning rate and seed, in turns.

    pip install --no-deps --target PEERS dictionary-learning==0.1.0 eai-sparsify==1.3.3 natsort simple-parsing docstring-parser schedulefree
    python tests/bench/train.py [CASES ...] --peers PEERS [--steps 6] [--seed 0] [--small] [--big-pages] [--json FILE]

Cases: relu-cold (1 latent in 8 fires), relu (L0 64), topk, batch_topk, jumprelu, matryoshka, topk-large; --small: all at 96 x 1,024, l0 16,
batch 512, for long runs. Every trainer is a process of its own with one thread, and takes one step at its turn, so that a machine that slows
down slows all of them down. Printed: CPU and wall time of a step as ratios to ours (median over the turns but the first, and the range), peak
memory above that after imports and data, and explained variance and L0 on held-out rows after the last step. `floor`: the encoder's product
alone at this machine's own rate (relu-cold: all five), the least that a step can cost. `ours` takes dense products in bfloat16 where the CPU has
units for it, as 02_train.py does from its BF16_FROM on; `ours-fp32` and the peers, as they come, do not. dictionary_learning gets rows of mean
square norm 1, as its own pipeline does, all others rows of norm sqrt(d_in). Ours runs with torch's big pages, which 02_train.py switches on; the
peers run as they come, or with --big-pages have them too. Nothing is warmed up or decayed, no latent counts as dead.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import MagicMock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from toys import train_py  # noqa: E402

from sae import firing, generator, load_variant, read_tensors, unit, write_tensors  # noqa: E402

CASES = {  # name: (our variant, activation, d_in, d_sae, l0, batch, peers)
    "relu-cold": ("baseline", "relu", 512, 4096, 512, 2048, ["dictionary_learning", "saelens"]),
    "relu": ("baseline", "relu", 512, 4096, 64, 2048, ["dictionary_learning", "saelens"]),
    "topk": ("topk", "topk", 512, 8192, 32, 2048, ["dictionary_learning", "saelens", "sparsify"]),
    "batch_topk": ("batch_topk", "batch_topk", 512, 8192, 32, 2048, ["dictionary_learning", "saelens"]),
    "jumprelu": ("jumprelu", "jumprelu", 512, 4096, 64, 2048, ["dictionary_learning", "saelens"]),
    "matryoshka": ("matryoshka", "matryoshka", 512, 8192, 32, 2048, ["dictionary_learning", "saelens"]),
    "topk-large": ("topk", "topk", 1024, 32_768, 64, 2048, ["dictionary_learning", "sparsify"]),
}
HELD_OUT, BATCHES, LR = 2048, 8, 1e-3


def rows(n, d_in):
    """Sparse sums of Zipf-frequent features with a mean and noise, E||x|| = sqrt(d_in)."""
    g = generator("bench")
    directions = unit(torch.randn(4 * d_in, d_in, generator=g))
    p = (torch.arange(4 * d_in) + 3.0) ** -0.8
    on = torch.rand(n, 4 * d_in, generator=g) < p / p.sum() * 30
    size = 0.5 + torch.rand(n, 4 * d_in, generator=g)
    x = (on * size) @ directions + 0.5 * torch.randn(d_in, generator=g) + 0.05 * torch.randn(n, d_in, generator=g)
    return x * d_in ** 0.5 / x.norm(dim=1).mean()


class Ours:
    bf16_from = 0

    def __init__(self, case, x, steps, seed):
        variant, _, d_in, d_sae, l0, batch, _ = case
        train_py.BF16_FROM = self.bf16_from
        self.sae = load_variant(variant)(d_in, steps, seed, d_sae=d_sae, l0=float(l0), batch_size=batch, lr=LR, lr_warmup=0.0, lr_decay=0.0,
                                         sparsity_warmup=0.0, dead_after=1.0).to(x.device)
        self.opt = self.sae.make_optimizer()
        self.sae.init_from_data(x)

    def step(self, i, x):
        self.sae.step = i
        train_py.train_step(self.sae, self.opt, x)

    def reconstruct(self, x):
        """In training mode, as the peers: all of them choose the batch's highest, not by a threshold that few steps can't settle."""
        out = self.sae.train()(x)
        return out.x_hat, float(firing(out.acts).sum())


class OursFp32(Ours):
    bf16_from = float("inf")


class DictionaryLearning:
    def __init__(self, case, x, steps, seed):
        _, kind, d_in, d_sae, l0, _, _ = case
        for name in ("nnsight", "zstandard"):
            sys.modules.setdefault(name, MagicMock())       # imported by parts of the package that are not used here
        from dictionary_learning.trainers import batch_top_k, jumprelu, matryoshka_batch_top_k, standard, top_k
        settings = dict(steps=steps + 1, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="none", lr=LR, warmup_steps=0, seed=seed, device=str(x.device))
        make = {"relu": lambda: standard.StandardTrainer(**settings, l1_penalty=0.03, sparsity_warmup_steps=None),
                "topk": lambda: top_k.TopKTrainer(**settings, k=l0),
                "batch_topk": lambda: batch_top_k.BatchTopKTrainer(**settings, k=l0),
                "jumprelu": lambda: jumprelu.JumpReluTrainer(**settings, target_l0=float(l0), sparsity_warmup_steps=None),
                "matryoshka": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(**settings, k=l0, group_fractions=[1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2])}
        self.trainer, self.factor = make[kind](), d_in ** -0.5

    def step(self, i, x):
        self.trainer.update(i, x * self.factor)

    def reconstruct(self, x):
        sae, x = self.trainer.ae, x * self.factor
        acts = sae.encode(x, use_threshold=False) if hasattr(sae, "threshold") and "TopK" in type(sae).__name__ else sae.encode(x)
        return sae.decode(acts) / self.factor, float((acts > 0).sum(-1).float().mean())


class SAELens:
    def __init__(self, case, x, steps, seed):
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer
        _, kind, d_in, d_sae, l0, batch, _ = case
        torch.manual_seed(seed)
        size = dict(d_in=d_in, d_sae=d_sae, device=str(x.device))
        cls, cfg = {
            "relu": lambda: (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig(**size, l1_coefficient=1.0)),
            "topk": lambda: (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig(**size, k=l0)),
            "batch_topk": lambda: (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig(**size, k=l0)),
            "jumprelu": lambda: (sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig(**size)),
            "matryoshka": lambda: (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig(
                **size, k=l0, matryoshka_widths=[d_sae >> n for n in (4, 3, 2, 1, 0)]))}[kind]()
        self.sae = cls(cfg)
        self.trainer = SAETrainer(SAETrainerConfig(total_training_samples=steps * batch, train_batch_size_samples=batch, lr=LR, lr_end=LR,
                                                   device=str(x.device)), self.sae, None)

    def step(self, i, x):
        self.trainer._train_step(self.sae, x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x):
        acts = self.sae.encode(x)
        return self.sae.decode(acts), float((acts > 0).sum(-1).float().mean())


class Sparsify:
    """Its per-step work without the language model that its trainer needs: the module, its two decoder constraints, Adam."""

    def __init__(self, case, x, steps, seed):
        if not x.is_cuda:
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder
        _, _, d_in, d_sae, l0, _, _ = case
        torch.manual_seed(seed)
        self.sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=l0), device=x.device)
        self.sae.b_dec.data = x.mean(0)
        self.opt = torch.optim.Adam(self.sae.parameters(), lr=LR)

    def step(self, i, x):
        self.sae.set_decoder_norm_to_unit_norm()
        self.sae(x).fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.opt.step()
        self.opt.zero_grad()

    def reconstruct(self, x):
        out = self.sae(x)
        return out.sae_out, float((out.latent_acts > 0).sum(-1).float().mean())


TRAINERS = {"ours": Ours, "ours-fp32": OursFp32, "dictionary_learning": DictionaryLearning, "saelens": SAELens, "sparsify": Sparsify}


def floor(case, dtype):
    """CPU seconds of the products that no step can do without: the encoder's, and where codes are dense the other four."""
    _, _, d_in, d_sae, l0, batch, _ = case
    a, b = torch.randn(batch, d_in, dtype=dtype), torch.randn(d_in, d_sae, dtype=dtype)
    into, times = torch.empty(batch, d_sae, dtype=dtype), []
    for _ in range(4):
        started = time.process_time()
        torch.mm(a, b, out=into)
        times.append(time.process_time() - started)
    return min(times) * (5 if l0 >= 0.05 * d_sae else 1)


def memory(kind):
    """Bytes: VmRSS, what the process has now, or VmHWM, the most it had."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def worker(trainer, case, path, steps, seed):
    """Build the trainer, then take a step for every line of standard input; at the end say what was reached."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(trainer.startswith("ours"))
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = read_tensors(path)[0]["x"]
    held_out, x = x[:HELD_OUT], x[HELD_OUT:]
    batch = case[5]
    tiny = TRAINERS[trainer]((*case[:2], 8, 64, 2, 16, []), torch.randn(16, 8), 2, 0)       # so that what it imports is not counted
    tiny.step(0, torch.randn(16, 8))
    Path("/proc/self/clear_refs").write_text("5")                                           # the peak is counted from here
    before = memory("VmRSS")
    t = TRAINERS[trainer](case, x[:batch], steps, seed)
    print("READY", flush=True)
    for i, line in enumerate(sys.stdin):
        if line.strip() == "end":
            break
        at = i % (len(x) // batch) * batch
        cpu, wall = time.process_time(), time.perf_counter()
        t.step(i, x[at:at + batch])
        print("READY", json.dumps([time.process_time() - cpu, time.perf_counter() - wall]), flush=True)
    used = memory("VmHWM") - before
    with torch.no_grad():
        x_hat, l0 = t.reconstruct(held_out)
    ev = 1 - (held_out - x_hat).pow(2).sum() / (held_out - held_out.mean(0)).pow(2).sum()
    print("READY", json.dumps({"memory": used, "explained_variance": float(ev), "l0": l0}), flush=True)


def answer(process):
    """What a worker says on its next line for us; whatever else it prints is passed over."""
    for line in process.stdout:
        if line.startswith("READY"):
            return json.loads(line[6:] or "null")
    raise SystemExit(f"a worker ended: {' '.join(map(str, process.args[2:]))}")


def compare(name, args):
    """One case -> {trainer: what was measured}."""
    case = CASES[name]
    trainers = ["ours", "ours-fp32", *(case[6] if args.peers else [])]
    if args.small:
        case = (*case[:2], 96, 1024, 128 if name == "relu-cold" else 16, 512, case[6])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, {"x": rows(HELD_OUT + BATCHES * case[5], case[2])})
        env = {t: {**os.environ, "OMP_NUM_THREADS": "1", **({"THP_MEM_ALLOC_ENABLE": "1"} if t.startswith("ours") or args.big_pages else {})} for t in trainers}
        processes = {t: subprocess.Popen([sys.executable, __file__, name, "--worker", t, "--data", path, "--steps", str(args.steps), "--seed", str(args.seed),
                                          *(["--peers", args.peers] if args.peers else []), *(["--small"] if args.small else [])],
                                         env=env[t], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for t in trainers}
        times = {t: [] for t in trainers}
        for p in processes.values():
            answer(p)
        for _ in range(args.steps):
            for t, p in processes.items():
                print("step", file=p.stdin, flush=True)
                times[t].append(answer(p))
        result = {}
        for t, p in processes.items():
            print("end", file=p.stdin, flush=True)
            result[t] = {"cpu": [c for c, _ in times[t]], "wall": [w for _, w in times[t]], **answer(p)}
            p.wait()
    low = [floor(case, dtype) for dtype in (torch.bfloat16, torch.float32)]
    print(f"\n{name}: {case[2]} x {case[3]:,}, l0 {case[4]}, batch {case[5]:,}, {args.steps} steps, seed {args.seed}; floor {low[0] * 1e3:.0f} ms of CPU, "
          f"{low[1] * 1e3:.0f} in fp32")
    print(f"{'':20} {'CPU ms':>8} {'tok/s':>8} {'CPU, x ours':>20} {'wall, x ours':>20} {'CPU, x ours-fp32':>20} {'memory':>8} {'expl.var':>9} {'L0':>7}")
    for t, r in result.items():
        against = {"cpu": ("cpu", "ours"), "wall": ("wall", "ours"), "cpu_fp32": ("cpu", "ours-fp32")}
        ratios = {name: sorted(a / b for a, b in zip(r[key][1:], result[other][key][1:])) for name, (key, other) in against.items()}
        r["ratios"] = ratios
        show = lambda v: f"{statistics.median(v):.2f} ({v[0]:.2f}..{v[-1]:.2f})"
        cpu = statistics.median(r["cpu"][1:])
        print(f"{t:20} {cpu * 1e3:8.0f} {case[5] / cpu:8.0f} {show(ratios['cpu']):>20} {show(ratios['wall']):>20} {show(ratios['cpu_fp32']):>20} {r['memory'] / 1e6:5.0f} MB "
              f"{r['explained_variance']:9.4f} {r['l0']:7.1f}", flush=True)
    return {"case": case[:6], "floor": low, "steps": args.steps, "seed": args.seed, "trainers": result}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", nargs="*", help="default: all but topk-large")
    p.add_argument("--peers", help="folder with the peers' packages; without it only ours is measured")
    p.add_argument("--steps", type=int, default=6, help="of every trainer (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--small", action="store_true", help="96 x 1,024, for runs long enough to compare what is reached")
    p.add_argument("--big-pages", action="store_true", help="for the peers too")
    p.add_argument("--json", help="write all figures here")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    p.add_argument("--data", help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.peers:
        sys.path.append(args.peers)
    names = args.cases or [c for c in CASES if c != "topk-large"]
    if args.worker:
        case = CASES[names[0]]
        worker(args.worker, (*case[:2], 96, 1024, 128 if names[0] == "relu-cold" else 16, 512, case[6]) if args.small else case, args.data, args.steps, args.seed)
        return
    results = {name: compare(name, args) for name in names}
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

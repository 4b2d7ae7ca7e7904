"""Train SAEs on cached activations: many variants, seeds and settings on the same batches.

    python 02_train.py                                      the README's comparison, on acts/tiny
    python 02_train.py --acts gemma-2-2b_l12 --variant topk topk_ortho --set d_sae=16384 l0=80
    python 02_train.py --variant topk --sweep l0=8,16,32    a run per value and seed
    python 02_train.py --list                               all variants with their lineage
    torchrun --nproc-per-node 4 02_train.py --variant all   each process trains its share of runs

Reads acts/NAME/ and variants/*.py. Writes for each run runs/NAME/, NAME = variant, acts (unless the
default), settings that differ from their default, steps unless one pass, seed:
    config.json               what ran: settings, data, code, versions, how it ended
    code.py                   the source files of the class chain, base first
    metrics.jsonl             one line per log: losses, L0, explained variance, dead latents ...
    start.safetensors         the weights that training started from
    sae.safetensors           the SAE and what normalises its rows; sae.load_run() reads it
    checkpoint.safetensors    while training
A run that is finished with the same settings, data and code (sae.py's first part and the variant)
is left alone; an interrupted one goes on from its last checkpoint, and ends with the same bits (on
a CPU, at the same number of threads a run: the runs of a call share them).
"""
import functools
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Before torch loads. Threads that spin for long while they wait cost 2 to 5 x on a busy machine; in
# big pages fresh [B, d_sae] memory costs a third.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import safetensors
import torch
from tqdm import tqdm

from sae import (FORMAT, ROOT, SAE, Acts, Out, Parser, Refuse, check_name, checksum, docstring_line,
                 generator, is_out_of_memory, load_variant, lock, natural, parent_of,
                 parse_settings, pick_device, positive_int, ranks, read_json, read_tensors,
                 run_script, variant_names, write_file, write_json, write_tensors)

DEFAULT_ACTS = "tiny"
DEFAULT_VARIANTS = ["baseline", "topk", "batch_topk", "matryoshka", "contrastive_r2",
                    "adaptive_ortho_r1", "topk_ortho_r1", "zscore_r1", "hierarchical_r2"]
DEFAULT_SEEDS = [0, 1, 2]
SAMPLE_ROWS = 16_384         # rows that init_from_data sees, at most ...
SAMPLE_PRE = 2 ** 26         # ... and pre-activations, if each latent fires on enough of the rows
REFUSED_IN_A_ROW = 10        # steps; then the run has failed


# ---- one run: an SAE in training, its optimizer and its folder -----------------------------------


class Run:
    """One SAE in training, its optimizer and its folder."""

    def __init__(self, variant, settings, seed, acts, steps):
        self.cls, self.seed, self.steps = load_variant(variant), seed, steps
        defaults = self.cls.settings()
        changed = {k: v for k, v in sorted(settings.items()) if v != defaults[k]}
        parts = [variant] + [acts.folder.name] * (acts.folder.name != DEFAULT_ACTS)
        parts += [f"{k}={v}" for k, v in changed.items()]
        one_pass = sum(steps_of_shards(acts, settings.get("batch_size", defaults["batch_size"])))
        parts += [f"steps={steps}"] * (steps != one_pass) + [f"s{seed}"]
        self.name = check_name("--set: the run's name", "-".join(parts), also="=")
        self.folder = Path("runs") / self.name
        identity = {"variant": variant, "acts_checksum": acts.checksum, "seed": seed,
                    "steps": steps, "settings": {**defaults, **changed},
                    "code_checksum": self.cls.code_checksum()}
        self.identity = checksum(json.dumps(identity, sort_keys=True).encode())
        described = {key: acts.meta.get(key) for key in ("source", "model", "layer", "hook_name")}
        self.config = {"format": FORMAT, "name": self.name, "lineage": docstring_line(variant),
                       "parent": parent_of(variant), "paired": self.cls.paired,
                       "acts": acts.folder.name, "d_in": acts.d_in, "identity": self.identity,
                       "base_checksum": base_checksum(),
                       **described, **identity}
        self.next_step, self.seconds, self.refused, self.refused_in_a_row = 0, 0.0, 0, 0
        self.failure, self.last, self.acted = None, {}, {}
        self.sums = {}                                     # since the last log line

    def is_finished(self):
        """Whether this very run is in its folder already."""
        if not (self.folder / "config.json").exists():
            return False
        try:
            config = read_json(self.folder / "config.json", "status", "identity")
            if config["status"] != "done":
                return False
            if config["identity"] != self.identity:
                print(f"note: {self.name}: data or code changed since: it is trained again")
                return False
            read_tensors(self.folder / "sae.safetensors", config["sae_checksum"])
        except Refuse as e:
            print(f"note: {e}: it is trained again")
            return False
        self.config = config
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return True

    def start(self, acts, device):
        """Take the folder, build the SAE, and go to the checkpoint if this very run was
        interrupted."""
        self.lock = lock(self.folder)
        self.config |= {"status": "training", "device": str(device), "versions": versions()}
        self.config |= git_state()
        write_file(self.folder / "code.py", self.cls.source().encode())
        self.sae = self.cls(acts.d_in, self.steps, self.seed, **self.config["settings"]).to(device)
        self.sae.mean.copy_(acts.mean)
        self.sae.scale.fill_(acts.scale)
        self.config["path"] = self.sae.path
        self.opt = self.sae.make_optimizer()
        if not self.load_checkpoint():
            shutil.rmtree(self.folder / "eval", ignore_errors=True)  # of an older run of this name
            for file in ("sae.safetensors", "checkpoint.safetensors", "metrics.jsonl"):
                (self.folder / file).unlink(missing_ok=True)
            x = sample(acts, self.sae)
            with torch.no_grad():
                check_forward(self.sae, self.sae(x[:256]))
            self.sae.init_from_data(x)
            start = write_tensors(self.folder / "start.safetensors", base_weights(self.sae))
            self.config["start_checksum"] = start
        write_json(self.folder / "config.json", self.config)

    def train_on(self, x, log_now):
        """One step on the normalised rows x [B, d_in]."""
        started = time.perf_counter()
        out, terms, taken = train_step(self.sae, self.opt, x, check=self.next_step == 0)
        self.refused += not taken
        self.refused_in_a_row = 0 if taken else self.refused_in_a_row + 1
        if self.refused_in_a_row == REFUSED_IN_A_ROW:
            raise Refuse(f"{REFUSED_IN_A_ROW} steps in a row had a loss or gradient that is not "
                         "finite, or accept() refused them")
        self.watch(x, out, terms)
        self.seconds += time.perf_counter() - started
        if log_now:
            self.log(len(x))
        self.next_step += 1

    @torch.no_grad()
    def watch(self, x, out, terms):
        """Add this step to the sums that the next log line reports; nothing here waits for the
        GPU."""
        weight = self.sae.row_weight  # of rows that were drawn more often than others
        share = x.new_full((len(x),), 1 / len(x)) if weight is None else weight / weight.sum()
        new = {f"loss_{name}": value for name, value in terms.items()}
        new |= {"mse": share @ (x - out.x_hat).pow(2).mean(-1),
                "variance": share @ (x - share @ x).pow(2).mean(-1),
                "l0": share @ (out.acts > 0).sum(-1).float(),
                "l1": share @ out.acts.sum(-1).float(), "n": 1}
        for key, value in new.items():
            self.sums[key] = self.sums.get(key, 0) + value

    def log(self, batch_size):
        """Append one line: means since the last one; penalties over the reconstruction error as
        ratio_*."""
        n = self.sums.pop("n")
        mean = {key: float(value) / n for key, value in self.sums.items()}
        losses = {key: value for key, value in mean.items() if key.startswith("loss_")}
        ratios = {key.replace("loss_", "ratio_"): value / max(mean["loss_recon"], 1e-12)
                  for key, value in losses.items() if key != "loss_recon"}
        stats = {key: float(value) for key, value in self.sae.stats.items()}
        done = self.next_step + 1
        line = {"step": done, "tokens": done * batch_size, "loss": sum(losses.values()), **losses,
                **ratios, "mse": mean["mse"],
                "explained_variance": 1 - mean["mse"] / max(mean["variance"], 1e-12),
                "l0": mean["l0"], "l1": mean["l1"], "dead": float(self.sae.dead().float().mean()),
                "lr": self.opt.param_groups[0]["lr"], "refused": self.refused,
                "tokens_per_s": done * batch_size / max(self.seconds, 1e-9), **stats}
        line = {key: value if abs(value) < float("inf") else None for key, value in line.items()}
        self.acted |= {key: line[key] for key in self.cls.counts if line.get(key) is not None}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")               # strict JSON: what is not finite is null
        self.last, self.sums, self.sae.stats = line, {}, {}

    def save_checkpoint(self):
        """All that the next step depends on, in one file: it is there whole or not at all."""
        with open(self.folder / "metrics.jsonl", "a") as f:
            os.fsync(f.fileno())                           # a checkpoint is never ahead of the log
        tensors, plain = pack(self.sae, self.opt)
        write_tensors(self.folder / "checkpoint.safetensors", tensors, {
            "identity": self.identity, "step": self.next_step, "seconds": self.seconds,
            "refused": self.refused, "refused_in_a_row": self.refused_in_a_row, "last": self.last,
            "acted": self.acted, "start_checksum": self.config["start_checksum"], "plain": plain})

    def load_checkpoint(self):
        """Whether there was a checkpoint of this very run; then all is as it was at it."""
        path, log = self.folder / "checkpoint.safetensors", self.folder / "metrics.jsonl"
        if not path.exists() or not log.exists():
            return False
        tensors, meta = read_tensors(path)
        if meta["identity"] != self.identity:
            print(f"{self.name}: settings, data or code changed since it was interrupted; "
                  "it starts over")
            return False
        unpack(self.sae, self.opt, tensors, meta["plain"])
        self.next_step, self.seconds, self.last = meta["step"], meta["seconds"], meta["last"]
        self.refused, self.refused_in_a_row = meta["refused"], meta["refused_in_a_row"]
        self.acted, self.config["start_checksum"] = meta["acted"], meta["start_checksum"]
        lines = log.read_bytes().splitlines(keepends=True)
        try:
            kept = [line for line in lines if line.endswith(b"\n")
                    and json.loads(line)["step"] <= self.next_step]
        except ValueError:
            raise Refuse(f"{log} is damaged: delete {self.folder}, train it again") from None
        write_file(log, b"".join(kept))
        return True

    def finish(self):
        """Write the SAE and how the run ended."""
        self.sae.step = self.steps
        said = write_tensors(self.folder / "sae.safetensors", self.sae.state_dict())
        # of each alone: together they would be in memory twice more
        sums = [checksum(w.detach().cpu().flatten().numpy())
                for w in base_weights(self.sae).values()]
        log = (self.folder / "metrics.jsonl").read_bytes()
        self.config |= {"status": "done", "sae_checksum": said, "log_checksum": checksum(log),
                        "weights_checksum": checksum("".join(sums).encode()),
                        "seconds": self.seconds, "refused": self.refused, "final": self.last,
                        "acted": self.acted, "void": self.void()}
        write_json(self.folder / "config.json", self.config)
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def void(self):
        """Why the run's numbers say nothing, in words; [] if they may."""
        # not buffers: windows over past steps may not be full
        finite = all(p.isfinite().all() for p in self.sae.parameters())
        final, many = numbers(self.last), f"{self.refused} of {self.steps} steps were refused"
        found = {"its weights are not finite": not finite,
                 "no latent fires": final["l0"] == 0,
                 "it explains no variance": not final["explained_variance"] > 0,
                 many: 2 * self.refused > self.steps}
        return [words for words, holds in found.items() if holds]

    def fail(self, e):
        """End this run alone, naming the line of the variant that raised e."""
        lines = [f for f in traceback.extract_tb(e.__traceback__)
                 if Path(f.filename).parent in (ROOT / "variants", ROOT) and f.filename != __file__]
        where, said = "", str(e).split("\n")[0]
        if lines:
            where = f" in {lines[-1].name}() ({Path(lines[-1].filename).name}:{lines[-1].lineno})"
        self.failure = said if isinstance(e, Refuse) else f"{type(e).__name__}{where}: {said}"
        self.config |= {"status": "failed", "reason": self.failure}
        if self.folder.exists():
            write_json(self.folder / "config.json", self.config)
        print(f"error: {self.name}: {self.failure}", file=sys.stderr)


def base_weights(sae):
    """The parameters that every variant has."""
    return {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


@functools.cache
def base_checksum():
    """Of the base's code: only runs on the same base are compared."""
    return SAE.code_checksum()


def attempt(run, action, *args):
    """action(*args) for `run`; what its variant does wrong ends this run and no other. A disk that
    is full or memory that is out is not the variant's fault."""
    try:
        action(*args)
    except Exception as e:
        if is_out_of_memory(e):
            raise Refuse(f"{run.name}: out of memory: train fewer runs in a call, with a smaller "
                         "--set batch_size= or d_sae=, or --set micro_batches=2", 4) from e
        if isinstance(e, OSError) or isinstance(e, Refuse) and e.code in (4, 6):
            raise
        run.fail(e)


def pack(sae, opt):
    """The state of an SAE and its optimizer as ({name: tensor}, {name: what is no tensor})."""
    tensors, plain = {f"sae.{k}": v for k, v in sae.state_dict().items()}, {}
    for index, state in opt.state_dict()["state"].items():
        for key, value in state.items():
            (tensors if torch.is_tensor(value) else plain)[f"opt.{index}.{key}"] = value
    return tensors, plain


def unpack(sae, opt, tensors, plain):
    """Put back what pack() gave."""
    sae.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
    parameters = [p for group in opt.param_groups for p in group["params"]]
    state = {}
    for key, value in (tensors | plain).items():
        if key.startswith("opt."):
            index, name = key[4:].split(".", 1)
            p = parameters[int(index)]
            if torch.is_tensor(value) and value.shape == p.shape:
                # fused Adam goes by memory order, which is the parameter's
                value = torch.empty_like(p).copy_(value)
            state.setdefault(int(index), {})[name] = value
    opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})


def sample(acts, sae):
    """Normalised rows for init_from_data, the same for every run of a width and L0: the first
    shard's first."""
    enough = math.ceil(4 * sae.d_sae / sae.l0)             # for each latent to fire on 4 of them
    rows = acts.shard(0)["acts"][:min(SAMPLE_ROWS, max(enough, SAMPLE_PRE // sae.d_sae))]
    # from fewer rows, biases and thresholds would start where no latent fires
    if sae.activation in ("relu", "jumprelu") and 2 * len(rows) < enough:
        raise Refuse(f"d_sae={sae.d_sae} l0={sae.l0:g}: training starts from {len(rows)} rows, on "
                     "which a latent would fire less than twice: want a larger l0, a smaller d_sae "
                     "or a cache with more --rows-per-shard")
    return sae.normalise(rows.to(sae.scale.device))


# ---- one step ------------------------------------------------------------------------------------


def train_step(sae, opt, x, check=False):
    """One optimizer step on normalised rows x [B, d_in] -> (Out, loss terms, whether it was taken).

    It is refused if accept() refuses the loss or if the gradient is not finite.
    check: look at what the variant's methods returned.
    """
    sae.train()
    opt.zero_grad()
    outs, terms, first = [], {}, 0
    for part in x.chunk(sae.micro_batches):
        sae.part, share = slice(first, first + len(part)), len(part) / len(x)
        first += len(part)
        # on a GPU products take bfloat16 and add in fp32; weights and optimizer are fp32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            out = sae(part)
            new = sae.losses(out)
        if check:
            check_forward(sae, out)
            check_losses(new)
        (share * sum(new.values())).backward()
        terms = {name: terms.get(name, 0) + share * value.detach() for name, value in new.items()}
        outs.append(out)
    out = outs[0] if len(outs) == 1 else Out(*(torch.cat(tensors) for tensors in zip(*outs)))
    taken = bool(sae.accept(sum(terms.values())))
    if taken:
        for group in opt.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * sae.lr_scale()
        sae.before_step(opt)
        taken = bool(sae.stats["grad_norm"].isfinite())
    if taken:
        opt.step()
        with torch.no_grad():
            sae.after_step(opt, out)
    sae.fired = None
    return out, terms, taken


def check_forward(sae, out):
    """Refuse, naming the method, what a variant's methods may not return in a forward pass."""
    for method, value, width in (("pre_acts", out.pre, sae.d_sae),
                                 ("activate", out.acts, sae.d_sae),
                                 ("decode", out.x_hat, sae.d_in)):
        if value.shape != (len(out.x), width):
            raise Refuse(f"{method}() returned {list(value.shape)}, want {[len(out.x), width]}", 5)
        if not value.isfinite().all():
            raise Refuse(f"{method}() returned numbers that are not finite", 5)
    if (out.acts < 0).any():
        raise Refuse("activate() returned negative activations", 5)


def check_losses(terms):
    """Refuse a penalty that is not one finite number."""
    for name, value in terms.items():
        if not torch.is_tensor(value) or value.numel() != 1 or not value.isfinite():
            raise Refuse(f"penalties() returned {name!r} = {value}, want one finite number", 5)


# ---- one pass over the data for all runs ---------------------------------------------------------


def steps_of_shards(acts, batch_size):
    """How many batches each shard has."""
    return [shard["rows"] // batch_size for shard in acts.shards]


def plan_shards(acts, batch_size, steps=None):
    """[(shard, its steps)] in training order, for `steps` or one pass. Batches don't straddle
    shards. Each pass has the shards in a new order."""
    sizes = steps_of_shards(acts, batch_size)
    if not sum(sizes):
        raise Refuse(f"{acts.folder} has {acts.rows} rows, no shard has a batch of {batch_size}: "
                     "cache more tokens, or --set batch_size=", 2)
    if sum(sizes) * batch_size < 0.9 * acts.rows:
        print(f"note: a pass takes {sum(sizes) * batch_size:,} of the {acts.rows:,} rows: batches "
              "don't straddle shards")
    plan, left = [], steps or sum(sizes)
    for epoch in itertools.count():
        for i in torch.randperm(len(sizes), generator=generator("order", epoch)).tolist():
            if left and sizes[i]:
                plan.append((i, min(left, sizes[i])))
                left -= plan[-1][1]
        if not left:
            return plan


def read_ahead(acts, order, device):
    """Yield the rows of each shard in `order`, on the device, while two more are being read."""
    size = max((acts.folder / shard["file"]).stat().st_size for shard in acts.shards)
    cuda = device.type == "cuda"
    buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
               for _ in range(min(3, len(order)))]
    copying = torch.cuda.Stream(device) if cuda else None

    def read(n):
        rows = acts.shard(order[n], buffers[n % 3])["acts"]
        if copying:
            with torch.cuda.stream(copying):               # beside the training steps
                rows = rows.to(device, non_blocking=True)
            rows.record_stream(torch.cuda.default_stream(device))
            copying.synchronize()
        return rows

    with ThreadPoolExecutor(2) as reader:
        ahead = deque(reader.submit(read, n) for n in range(min(2, len(order))))
        for n in range(len(order)):
            rows = ahead.popleft().result()
            if n + 2 < len(order):
                ahead.append(reader.submit(read, n + 2))
            yield rows


def side_by_side(n_runs, device):
    """A map() over runs. On a CPU it works on several runs at a time, each with its share of the
    threads: 1.3 times as fast a step as with threads inside each operation."""
    workers = min(n_runs, torch.get_num_threads()) if device.type == "cpu" else 1
    if workers < 2:
        return map
    torch.set_num_threads(torch.get_num_threads() // workers)
    return ThreadPoolExecutor(workers).map


def batches(acts, plan, batch_size, first, device):
    """Yield (step, shard, the shard's rows, the slice of them that is the common batch) for the
    steps from `first` on."""
    ends = list(itertools.accumulate(n for _, n in plan))
    todo = [(shard, end - n, end) for (shard, n), end in zip(plan, ends) if end > first]
    ahead = read_ahead(acts, [shard for shard, _, _ in todo], device)
    for (shard, begin, end), rows in zip(todo, ahead):
        for step in range(max(first, begin), end):
            start = (step - begin) * batch_size
            yield step, shard, rows, slice(start, start + batch_size)


def train(runs, acts, plan, batch_size, device, checkpoint_every, each):
    """Train all runs together; the batch that most of them take is prepared once."""
    steps, first = runs[0].steps, min(run.next_step for run in runs)
    log_every = max(1, min(50, steps // 100))
    bar = tqdm(total=steps, initial=first, unit="step", desc="training", mininterval=1,
               disable=True if ranks()[0] else None)
    saved = time.perf_counter()
    for step, shard, rows, common in batches(acts, plan, batch_size, first, device):
        log_now = (step + 1) % log_every == 0 or step + 1 == steps
        due = [run for run in runs if not run.failure and run.next_step == step]
        take_step(due, rows, common, shard, log_now, each)
        alive = [run for run in runs if not run.failure]
        if not alive:
            return
        bar.update()
        if log_now:
            bar.set_postfix(progress(alive))
            if time.perf_counter() - saved > checkpoint_every and step + 1 < steps:
                for run in alive:
                    if run.next_step == step + 1:          # not one that is ahead of the others
                        run.save_checkpoint()
                saved = time.perf_counter()
    bar.close()
    for run in alive:
        run.finish()


def take_step(runs, rows, common, shard, log_now, each):
    """One step of each run on its batch of `rows`, for most runs the slice `common`."""
    if not runs:
        return
    shared = runs[0].sae.normalise(rows[common])

    def step(run):
        sae = run.sae
        sae.step, sae.position, sae.shard = run.next_step, common.start, shard
        chosen = sae.choose_batch(len(rows), generator(run.seed, sae.step, "batch"))
        run.train_on(shared if chosen == common else sae.normalise(rows[chosen]), log_now)

    list(each(lambda run: attempt(run, step, run), runs))


def progress(runs):
    """Medians over the runs, for the progress bar."""
    def middle(key):
        return statistics.median(run.last[key] or 0 for run in runs)
    return {"L0": f"{middle('l0'):.1f}", "EV": f"{middle('explained_variance'):.3f}",
            "dead": f"{middle('dead'):.1%}"}


# ---- the table, and what a call asks for ---------------------------------------------------------


def table(runs):
    """One line per run, best explained variance first; failed runs last, with the reason."""
    width = max(len(run.name) for run in runs)
    lines = [f"{'run':{width}}  {'L0':>7}  {'expl.var':>8}  {'dead':>6}  {'seconds':>7}  acted"]
    done = [run for run in runs if not run.failure]
    for run in sorted(done, key=lambda run: -(run.config["final"]["explained_variance"] or -9)):
        final = numbers(run.config["final"])
        acted = ", ".join(f"{key} {value:.4g}" for key, value in run.config["acted"].items())
        void = f"  VOID: {', '.join(run.config['void'])}" if run.config["void"] else ""
        lines.append(f"{run.name:{width}}  {final['l0']:7.2f}  {final['explained_variance']:8.4f}  "
                     f"{final['dead']:6.1%}  {run.config['seconds']:7.1f}  {acted}{void}".rstrip())
    lines += [f"{run.name:{width}}  FAILED: {run.failure}" for run in runs if run.failure]
    return "\n".join(lines)


def numbers(line):
    """A log line with NaN for null."""
    return {key: float("nan") if value is None else value for key, value in line.items()}


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__,
            "safetensors": safetensors.__version__, "threads": torch.get_num_threads()}


def git_state():
    """The commit that ran and whether files differed from it; None outside a git checkout."""
    def ask(*words):
        return subprocess.check_output(["git", "-C", ROOT, *words], text=True,
                                       stderr=subprocess.DEVNULL).strip()
    try:
        return {"commit": ask("rev-parse", "HEAD"),
                "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (FileNotFoundError, subprocess.CalledProcessError):         # no git, or no checkout
        return {"commit": None, "dirty": None}


def find_variants(names):
    """Names, `all`, or a study (`topk_ortho` for topk_ortho_r1, r2 ...) -> variant names, each
    once."""
    known, found = variant_names(), []
    for name in names:
        rows = [v for v in known if re.fullmatch(re.escape(name) + r"_r\d+", v)]
        if name == "all":
            found += known
        elif name in known or not rows:
            found.append(name)                             # load_variant refuses an unknown one
        else:
            found += sorted(rows, key=lambda v: int(v.rsplit("_r", 1)[1]))
    return list(dict.fromkeys(found))


READ_BY = {                  # setting -> the activations that read it; all read the others
    "bandwidth": ("jumprelu",), "threshold_lr": ("jumprelu",),
    **dict.fromkeys(["sparsity_weight", "sparsity_gain", "sparsity_memory"], ("relu", "jumprelu")),
}


def combinations(cls, sets, sweeps):
    """The settings of each run of a sweep: `sets` in all, times every combination of swept
    values."""
    fixed, grid = parse_settings(cls, sets), {}
    for sweep in sweeps:
        key, _, values = sweep.partition("=")
        if key in fixed or key in grid:
            raise Refuse(f"--sweep {key}: given twice, want --sweep {key}=V1,V2", 2)
        grid[key] = [parse_settings(cls, [f"{key}={value}"])[key] for value in values.split(",")]
    found = [{**fixed, **dict(zip(grid, values))} for values in itertools.product(*grid.values())]
    for settings in found:
        full = {**cls.settings(), **settings}
        cls.check(full)
        for key in settings:
            if full["activation"] not in READ_BY.get(key, [full["activation"]]):
                raise Refuse(f"--set {key}: has no effect with activation={full['activation']}", 2)
    return found


def interrupted(folder):
    """[(variant, settings, seed, steps)] of the runs on these activations that were not
    finished."""
    found = []
    for path in sorted(Path("runs").glob("*/config.json")):
        config = read_json(path, "status", "acts")
        if config["status"] == "training" and config["acts"] == folder.name:
            if why := why_left(config):
                print(f"note: {path.parent} is left: {why}")
            else:
                found.append((config["variant"], config["settings"], config["seed"],
                              config["steps"]))
    if not found:
        raise Refuse(f"--resume: no interrupted run on {folder}")
    return found


def why_left(config):
    """Why an interrupted run can't go on; "" if it can."""
    if config["variant"] not in variant_names():
        return f"there is no variant {config['variant']} any more"
    lost = config["settings"].keys() - load_variant(config["variant"]).settings().keys()
    return f"{config['variant']} has no {', '.join(sorted(lost))} any more" if lost else ""


def wait_for_others(runs):
    """Block until every other rank has finished: torchrun kills all ranks when one exits non-zero,
    so a rank with a failed run exits last."""
    for run in runs:
        ended = {}
        while ended.get("identity") != run.identity or ended["status"] not in ("done", "failed"):
            time.sleep(0.5)
            if (run.folder / "config.json").exists():
                ended = read_json(run.folder / "config.json", "status")


def parse_args():
    p = Parser(__doc__)
    p.add_argument("--acts", default=DEFAULT_ACTS, help="folder under acts/ (default: %(default)s)")
    p.add_argument("--variant", nargs="+", default=DEFAULT_VARIANTS,
                   help="names, `all`, or a study")
    p.add_argument("--seed", nargs="+", type=natural, default=DEFAULT_SEEDS,
                   help="(default: 0 1 2)")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                   help="settings, for every run")
    p.add_argument("--sweep", nargs="+", action="extend", default=[], metavar="NAME=V1,V2",
                   help="one run per value (and combination)")
    p.add_argument("--steps", type=positive_int, help="steps to take (default: one pass)")
    p.add_argument("--resume", action="store_true",
                   help="go on with every interrupted run on these activations and with no other; "
                   "--variant, --seed, --set, --sweep and --steps do not count")
    p.add_argument("--checkpoint", type=natural, default=60, metavar="SECONDS",
                   help="save the state when as many have passed (default: 60)")
    p.add_argument("--list", action="store_true", help="print all variants with their lineage")
    p.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    return p.parse_args()


def asked_for(args):
    """(Acts, batch size, plan_shards(), [Run]) of a call; wrong flags are told before files are
    looked for."""
    folder = Path("acts") / check_name("--acts", args.acts)
    if args.resume:
        wanted = interrupted(folder)
    else:
        wanted = [(variant, settings, seed, args.steps) for variant in find_variants(args.variant)
                  for settings in combinations(load_variant(variant), args.set, args.sweep)
                  for seed in dict.fromkeys(args.seed)]
    sizes = {(settings.get("batch_size", load_variant(variant).batch_size), steps)
             for variant, settings, _, steps in wanted}
    if len(sizes) > 1:
        raise Refuse("all runs of a call share their batches: want one batch_size and number of "
                     "steps (runs to resume: give each kind its own command again)", 2)
    (batch_size, steps), = sizes
    acts = Acts(folder)
    plan = plan_shards(acts, batch_size, steps)
    steps = sum(n for _, n in plan)
    runs = [Run(variant, settings, seed, acts, steps) for variant, settings, seed, _ in wanted]
    return acts, batch_size, plan, list({run.name: run for run in runs}.values())


def main():
    args = parse_args()
    if args.list:
        print("\n".join(docstring_line(name) for name in variant_names()))
        return 0
    rank, processes = ranks()
    device = pick_device(args.device)
    # use_deterministic_algorithms(), without its imports
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high")

    acts, batch_size, plan, runs = asked_for(args)
    others = [run for i, run in enumerate(runs) if i % processes != rank]
    runs = runs[rank::processes]

    # train those that are not there yet
    each = side_by_side(len(runs), device)
    todo = [run for run in runs if not run.is_finished()]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already "
              "(same settings, data, code)")
    list(each(lambda run: attempt(run, run.start, acts, device), todo))
    alive = [run for run in todo if not run.failure]
    if alive:
        steps = alive[0].steps
        print(f"training {len(alive)} run{'s' * (len(alive) > 1)} of {steps} steps of {batch_size} "
              f"rows of {acts.folder} ({acts.rows:,} rows)", flush=True)
        train(alive, acts, plan, batch_size, device, args.checkpoint, each)
    if runs:
        print(table(runs))
    if any(run.failure or run.config.get("void") for run in runs):
        wait_for_others(others)
        return 5
    return 0


if __name__ == "__main__":
    run_script(main)

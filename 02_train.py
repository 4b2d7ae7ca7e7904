"""Train SAEs on cached activations: many variants, seeds and settings from one pass over the data.

    python 02_train.py                                               the comparison that the README shows, on acts/tiny
    python 02_train.py --acts gemma-2-2b_l12 --variant topk topk_ortho --seed 0 1 2 --set d_sae=16384 l0=80
    python 02_train.py --variant topk --sweep l0=8,16,32             one run per value
    python 02_train.py --list                                        all variants with their lineage
    torchrun --nproc-per-node 8 02_train.py --variant all --seed 0 1 2      each process trains its share of the runs, on a GPU of its own

Reads acts/NAME/ (01_cache_acts.py) and variants/*.py. Writes for each run runs/NAME/, NAME = variant, acts (unless the default),
settings that differ from their default, seed:
    config.json            what ran: settings, data, code, versions, how it ended
    code.py                the source files of the class chain, base first
    metrics.jsonl          one line per log: loss terms, L0, explained variance, dead latents, what the variant adds
    sae.safetensors        the SAE; applies to raw activations
    snapshots/STEP.safetensors   the SAE at 1/2, 1/4, 1/8 ... of the run, for 03_eval.py to see how it came about
    checkpoint.safetensors while training
A run that is finished with the same settings, data and code is left alone; an interrupted one goes on where it stopped.
"""
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # a Ctrl-C while libraries load just ends it; run_script() takes over
os.environ.setdefault("GOMP_SPINCOUNT", "1000")         # before torch loads: waiting threads that spin for long cost 2 to 5 x on a busy
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # machine, and those that sleep at once a fifth in 03_eval.py on an idle one
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # big tensors in big pages: a [B, d_sae] of fresh memory costs a third

import contextlib
import itertools
import json
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import torch
from tqdm import tqdm

from sae import (FORMAT, ROOT, SAE, Acts, Out, Parser, Refuse, cannot_write, check_name, checksum, docstring_line, firing, generator, interrupt, load_variant,
                 nonzeros, number, parse_settings, pick_device, read_json, read_tensors, run_script, share, take_lock, variant_names, whole, write_file,
                 write_json, write_tensors)

DEFAULT_ACTS = "tiny"
DEFAULT_VARIANTS = ["baseline", "topk", "batch_topk", "matryoshka",
                    "contrastive_r2", "adaptive_ortho_r1", "topk_ortho_r1", "zscore_r1", "hierarchical_r2"]      # an idea of each study
SAMPLE_ROWS = 16_384          # rows that init_from_data sees ...
SAMPLE_PRE = 2 ** 28          # ... fewer where they would have more pre-activations than this
COPIES = {"relu": (5.2, 4.4), "topk": (5.2, 1.6), "batch_topk": (5.2, 4.1), "jumprelu": (5.7, 4.4)}      # how often a step of the base holds
                              # [batch, d_sae] floats at its peak, and init_from_data [rows, d_sae]; measured on a CPU at d_in 512, d_sae 8,192
BF16_FROM = 2 ** 29           # multiplications of a product [batch, d_in] @ [d_in, d_sae], from which a CPU with units for it takes bfloat16, as a
                              # GPU does: a step takes 0.78 of its time there, 0.74 at 2 ** 31. The default job is below: equal figures on every CPU
TIMED_STEPS = 3, 10           # the time that training will take is told after the second, from those after the first; again after a quarter of
                              # the run, from its second eighth: by then latents are dead, and AuxK takes its time too
REFUSED_IN_A_ROW = 10         # steps; then the run has failed
SAVING = 0.05                 # share of the time that checkpoints may take; they come less often than --checkpoint says where they would take more


class Run:
    """One SAE in training, its optimizer and its folder."""

    def __init__(self, variant, settings, seed, acts, steps, epochs, snapshots=0):
        self.snapshots = {round(steps / 2**i) for i in range(1, snapshots + 1)} - {0}        # after so many steps
        self.variant, self.cls, self.seed, self.steps = variant, load_variant(variant), seed, steps
        defaults = self.cls.settings()
        self.settings = {k: v for k, v in settings.items() if v != defaults[k]}
        parts = [variant, *([acts.folder.name] if acts.folder.name != DEFAULT_ACTS else []),
                 *(f"{k}={v}" for k, v in sorted(self.settings.items())), f"s{seed}"]
        self.folder = Path("runs") / check_name("--set: the run's name", "-".join(parts), also="=")
        self.name = self.folder.name
        self.config = {
            "format": FORMAT, "name": self.name, "variant": variant, "lineage": docstring_line(variant),
            "parents": [c.__module__.split(".")[-1] for c in self.cls.__bases__ if issubclass(c, SAE) and c is not SAE] or
                       (["baseline"] if self.cls is not SAE else []),
            "acts": acts.folder.name, "acts_checksum": acts.checksum, "source": acts.meta["source"], "model": acts.meta["model"],
            "layer": acts.meta["layer"], "hook_name": acts.meta["hook_name"], "d_in": acts.d_in, "seed": seed, "steps": steps,
            "epochs": epochs, "window": acts.window, "ring": acts.ring, "settings": {**defaults, **self.settings}, "code_checksum": self.cls.code_checksum()}
        identity = {k: self.config[k] for k in ("variant", "acts_checksum", "seed", "steps", "settings", "code_checksum")}
        self.identity = checksum(json.dumps(identity, sort_keys=True).encode())
        self.next_step, self.failure, self.seconds, self.refused, self.refused_in_a_row = 0, None, 0.0, 0, 0
        self.window = {}                                     # sums since the last log

    def is_finished(self):
        """Whether this very run is in its folder already."""
        if not (self.folder / "config.json").exists():
            return False
        try:
            config = read_json(self.folder / "config.json", "status", "identity")
            if config["status"] != "done" or config["identity"] != self.identity:
                return False
            read_tensors(self.folder / "sae.safetensors", config["sae_checksum"])
        except Refuse as e:
            print(f"note: {e}: it is trained again")
            return False
        self.config = config
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)     # killed between the last two lines of finish()
        return True

    def start(self, acts, device):
        """Take the folder, build the SAE, and load the checkpoint if this very run was interrupted."""
        self.lock = take_lock(self.folder)
        self.config |= {"identity": self.identity, "status": "training", "device": str(device), "versions": versions(), **git_state()}
        write_file(self.folder / "code.py", self.cls.source().encode())
        with self.blamed():
            self.sae = self.cls(acts.d_in, self.steps, self.seed, **self.settings).to(device)
            self.sae.scale.fill_(acts.scale)
            self.opt = self.sae.make_optimizer()
            self.config["autocast"] = "bfloat16" if in_bf16(self.sae) else None
            if not self.load_checkpoint():
                for name in ("eval", "snapshots"):
                    shutil.rmtree(self.folder / name, ignore_errors=True)    # of an older run of this name
                for name in ("sae.safetensors", "checkpoint.safetensors", "metrics.jsonl"):
                    (self.folder / name).unlink(missing_ok=True)
                x = sample(acts, self.sae)
                with watched(self.sae):
                    self.sae(x[:256])
                self.sae.init_from_data(x)
            self.write_config()

    def write_config(self):
        write_json(self.folder / "config.json", self.config)

    def train_on(self, x, log_now):
        """One step on the normalised rows x [B, d_in]."""
        started = time.perf_counter()
        with self.blamed():
            out, terms, stepped = train_step(self.sae, self.opt, x, check=self.next_step == 0)
            self.refused += not stepped
            self.refused_in_a_row = 0 if stepped else self.refused_in_a_row + 1
            if self.refused_in_a_row == REFUSED_IN_A_ROW:
                bad = [name for name, p in self.sae.named_parameters() if not p.isfinite().all()]
                raise Refuse(f"{bad[0]} is not finite any more: see before_step(), after_step() and lr_scale()" if bad else
                             f"{REFUSED_IN_A_ROW} steps in a row gave a loss or gradient that is not finite (or a spike in the data, or accept() refused)")
            self.watch(x, out, terms)
            if log_now:
                self.log(len(x))
        self.next_step += 1
        self.seconds += time.perf_counter() - started
        if self.next_step in self.snapshots and not self.failure:
            write_tensors(self.folder / "snapshots" / f"{self.next_step:08}.safetensors", self.sae.state_dict(),
                          {"identity": self.identity, "step": self.next_step})

    def watch(self, x, out, terms):
        """Add this step to the sums that the next log line reports; nothing here waits for the GPU."""
        new = {**{f"loss_{k}": v for k, v in terms.items()}, "mse": (x - out.x_hat).pow(2).mean(),
               "variance": (x - x.mean(0)).pow(2).mean(),                     # var(0) takes 1.4 (d_in 512) to 12 times (128) as long
               "l0": firing(out.acts).sum(), "l1": nonzeros(out.acts).sum() / len(x), "n": 1}
        if self.sae.row_weight is not None:               # some rows were drawn more often than others; the log is of the data
            share = self.sae.row_weight / self.sae.row_weight.sum()
            new |= {"mse": share @ (x - out.x_hat).pow(2).mean(-1), "variance": share @ (x - share @ x).pow(2).mean(-1),
                    "l0": share @ (out.acts > 0).sum(-1).float(), "l1": share @ out.acts.sum(-1).float()}
        for key, value in new.items():
            self.window[key] = self.window.get(key, 0) + value

    def log(self, batch_size):
        """One line of metrics: means since the last one; ratios of the penalties to the reconstruction error as `ratio_NAME`."""
        n = self.window.pop("n")
        mean = {k: float(v) / n for k, v in self.window.items()}
        losses = {k: v for k, v in mean.items() if k.startswith("loss_")}
        line = {"step": self.next_step + 1, "tokens": (self.next_step + 1) * batch_size, "loss": sum(losses.values()), **losses,
                **{k.replace("loss_", "ratio_"): v / max(mean["loss_recon"], 1e-12) for k, v in losses.items() if k != "loss_recon"},
                "mse": mean["mse"], "explained_variance": 1 - mean["mse"] / max(mean["variance"], 1e-12), "l0": mean["l0"], "l1": mean["l1"],
                "dead": float(self.sae.dead().float().mean()), "lr": self.opt.param_groups[0]["lr"], "refused": self.refused,
                "tokens_per_s": (self.next_step + 1) * batch_size / max(self.seconds, 1e-9),
                **{k: float(v) for k, v in self.sae.stats.items()}}
        line = {k: v if v == v and abs(v) != float("inf") else None for k, v in line.items()}     # strict JSON: not finite is null
        path = self.folder / "metrics.jsonl"
        if not self.folder.exists():
            raise Refuse(f"{self.folder} was deleted while it was trained")
        try:
            with open(path, "a") as f:
                f.write(json.dumps(line) + "\n")
                f.flush()
                os.fsync(f.fileno())                         # a checkpoint is never ahead of the log
        except OSError as e:
            raise cannot_write(path, e) from e
        self.last, self.window, self.sae.stats = line, {}, {}

    def save_checkpoint(self):
        """All that the next step depends on, in one file: it is there whole or not at all."""
        tensors, plain = pack(self.sae, self.opt)
        write_tensors(self.folder / "checkpoint.safetensors", tensors, {
            "identity": self.identity, "step": self.next_step, "seconds": self.seconds, "refused": self.refused,
            "refused_in_a_row": self.refused_in_a_row, "last": self.last, "plain": plain})

    def load_checkpoint(self):
        """Whether there was a checkpoint of this very run; then the SAE, the optimizer and the log are as they were at it."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return False
        tensors, meta = read_tensors(path)
        if "step" not in meta or not (self.folder / "metrics.jsonl").exists():
            raise Refuse(f"{self.folder} has a checkpoint of another kind or without its metrics.jsonl: delete {self.folder} and train again")
        if meta["identity"] != self.identity:
            print(f"{self.name}: settings, data or code changed since it was interrupted; it starts over")
            return False
        unpack(self.sae, self.opt, tensors, meta["plain"])
        self.next_step, self.seconds, self.last = meta["step"], meta["seconds"], meta["last"]
        self.refused, self.refused_in_a_row = meta["refused"], meta["refused_in_a_row"]
        lines = (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = itertools.takewhile(lambda line: line.endswith("\n") and json.loads(line)["step"] <= self.next_step, lines)
        write_file(self.folder / "metrics.jsonl", "".join(kept).encode())
        return True

    def finish(self):
        """Write the SAE and how the run ended."""
        self.sae.step = self.steps
        said = write_tensors(self.folder / "sae.safetensors", self.sae.state_dict(), {"name": self.name, "identity": self.identity})
        self.config |= {"status": "done", "sae_checksum": said, "seconds": self.seconds, "refused": self.refused, "final": self.last,
                        "log_checksum": checksum((self.folder / "metrics.jsonl").read_bytes()), "void": self.void(),
                        "micro_batches_used": self.sae.micro_batches}
        self.write_config()
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def void(self):
        """Why the run's numbers say nothing, in words; [] if they may. Stages 3 and 4 keep a void run out of every comparison."""
        final = {k: float("nan") if v is None else v for k, v in self.last.items()}
        said = {"its weights are not finite": not all(v.isfinite().all() for v in self.sae.state_dict().values()),
                "no latent fires": final["l0"] == 0,
                "it explains no variance": not final["explained_variance"] > 0,
                f"{self.refused} of {self.steps} steps were refused": 2 * self.refused > self.steps}
        return [words for words, is_so in said.items() if is_so]

    @contextlib.contextmanager
    def blamed(self, method=None):
        """What a variant does wrong ends its run alone, with the method and the line named; `method` where no line of it raised. A full disk
        is not its fault."""
        try:
            yield
        except Exception as e:
            if isinstance(e, Refuse) and e.code == 4 or interrupt.came:
                raise
            ours = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).parent in (ROOT / "variants", ROOT)
                    and Path(f.filename).name != "02_train.py"]
            where = ("" if isinstance(e, Refuse) else f" in {ours[-1].name}() ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else
                     f" in what {method}() returned" if method else "")
            what = str(e).split("\n")[0] if isinstance(e, Refuse) else f"{type(e).__name__}: {str(e).split(chr(10))[0]}"
            self.failure = f"{self.variant}{where}: {what}"
            self.config |= {"status": "failed", "reason": self.failure}
            if self.folder.exists():
                self.write_config()
            print(f"error: {self.name}: {self.failure}", file=sys.stderr)


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
    state = {}
    for key, value in (tensors | plain).items():
        if key.startswith("opt."):
            index, name = key[4:].split(".", 1)
            state.setdefault(int(index), {})[name] = value
    opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})


def train_step(sae, opt, x, check=False):
    """One optimizer step on normalised rows x [B, d_in] -> (Out, loss terms, whether the step was taken).

    It is not taken if a row is a spike, if accept() refuses the loss, or if a gradient is not finite. A GPU is waited for three times: for
    that, for the gradient's norm, and in aux(); once or twice more where the number of codes is not fixed.
    check: verify shapes and types of what the variant's methods return, naming the method."""
    sae.train()
    while not (done := backward(sae, opt, x, check)):        # out of memory
        if sae.micro_batches >= len(x):
            raise Refuse("out of memory even with a row at a time: train fewer runs in a call, or a smaller --set d_sae=")
        sae.micro_batches = min(2 * sae.micro_batches, len(x))
        if x.is_cuda:
            torch.cuda.empty_cache()
        print(f"note: out of memory: {type(sae).__module__.split('.')[-1]} goes on with micro_batches={sae.micro_batches}", file=sys.stderr)
    out, terms = done
    stepped = bool(sae.accept(sum(terms.values())) & sae.usual(x).all())         # one wait for the GPU, not two
    if stepped:
        for group in opt.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * sae.lr_scale()
        sae.before_step(opt)
        stepped = bool(sae.stats["grad_norm"].isfinite())
    if stepped:
        opt.step()
        with torch.no_grad():
            sae.after_step(opt, out)
    return out, terms, stepped


def backward(sae, opt, x, check):
    """Gradients of the losses on rows x, in sae.micro_batches parts -> (Out, loss terms); None if the GPU's memory is too small."""
    opt.zero_grad()
    outs, terms, at = [], {}, 0
    try:
        for part in x.chunk(sae.micro_batches):
            share = len(part) / len(x)
            sae.part, at = slice(at, at + len(part)), at + len(part)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=in_bf16(sae)), watched(sae) if check else contextlib.nullcontext():
                out = sae(part)
                new = sae.losses(out)
            if check:
                check_losses(new)
            (share * sum(new.values())).backward()
            terms = {k: terms.get(k, 0) + share * v.detach() for k, v in new.items()}
            outs.append(Out(*(t.detach() for t in out)))
        return outs[0] if len(outs) == 1 else Out(*map(torch.cat, zip(*outs))), terms
    except torch.OutOfMemoryError:
        return None                                          # what it held is freed only once this frame is left


def in_bf16(sae):
    """Whether dense products of a training step take bfloat16 and add in fp32: on a GPU, and on a CPU with units for it from BF16_FROM on. The weights,
    the optimizer and sparse products are fp32 all the same, and evaluation is fp32 throughout."""
    return sae.scale.is_cuda or torch.cpu._is_avx512_bf16_supported() and sae.batch_size * sae.d_in * sae.d_sae >= BF16_FROM


@contextlib.contextmanager
def watched(sae):
    """Inside, what pre_acts, activate and decode return is looked at before the next one gets it: Refuse, naming the method, if it has
    the wrong shape, is not finite or, of activations, negative."""
    def look(name, width, method):
        def call(given):
            got, want = method(given), (len(given), width)
            if not torch.is_tensor(got) or got.shape != want:
                raise Refuse(f"{name}() returned {list(got.shape) if torch.is_tensor(got) else type(got).__name__}, want {list(want)}")
            values = nonzeros(got).detach()                  # what is kept for a gradient must not depend on being looked at (checkpointing)
            if not values.isfinite().all():
                raise Refuse(f"{name}() returned numbers that are not finite")
            if name == "activate" and (values < 0).any():
                raise Refuse("activate() returned negative activations")
            return got
        return call

    widths = {"pre_acts": sae.d_sae, "activate": sae.d_sae, "decode": sae.d_in}
    for name, width in widths.items():
        setattr(sae, name, look(name, width, getattr(sae, name)))
    try:
        yield
    finally:
        for name in widths:
            delattr(sae, name)


def check_losses(terms):
    """Refuse what losses() may not return."""
    if not isinstance(terms, dict) or "recon" not in terms:
        raise Refuse("losses() must return a dict of named scalars with 'recon' in it")
    for name, value in terms.items():
        if not torch.is_tensor(value) or value.numel() != 1 or not value.isfinite():
            raise Refuse(f"losses() returned {name!r} = {value}, want one finite number")


def sample(acts, sae):
    """Normalised rows for init_from_data, the same for every run of a width: the start of the first shard, without spikes."""
    x = acts.shard(0)["acts"][:sample_rows(sae.d_sae)].to(sae.scale.device).float() * sae.scale
    return x[sae.usual(x)]


def sample_rows(d_sae):
    return min(SAMPLE_ROWS, SAMPLE_PRE // d_sae)


def plan_steps(acts, batch_size, epochs, wanted=None):
    """(epoch, shard, its steps) in training order, up to `wanted` steps. Batches don't straddle shards; what a shard has beyond its last
    batch is left out. Shards come in a new order in every epoch, but those that were cached in windows at first as they were cached."""
    plan = []
    for epoch in range(epochs):
        order = torch.randperm(len(acts.sizes), generator=generator("order", epoch)).tolist()
        plan += [(epoch, i, acts.sizes[i] // batch_size) for i in (range(len(acts.sizes)) if acts.window and epoch == 0 else order)]
    there = sum(n for _, _, n in plan)
    if wanted and wanted > there:
        raise Refuse(f"--steps {wanted}: {acts.folder} has {there} steps of {batch_size} rows: cache more tokens, or give --epochs", 2)
    before = itertools.accumulate((n for _, _, n in plan), initial=0)
    return [(epoch, i, min(n, wanted - done)) for (epoch, i, n), done in zip(plan, before) if done < wanted] if wanted else plan


def stream(acts, plan, device, start):
    """Yield (step, position, rows on the device, first row's index) for every step from `start`, reading one shard ahead.
    The cache stays in the device's memory when there are several epochs and it fits in half of what is free; one pass reads each shard
    once, so that there is nothing to keep."""
    rows_before = [0, *itertools.accumulate(acts.sizes)]
    size = acts.rows * acts.d_in * (2 if acts.meta["dtype"] in ("bfloat16", "float16") else 4)       # int8 is float32 once it is read
    keep, kept = plan[-1][0] > 0 and size < free_memory(device) / 2, {}
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None      # beside the training steps, which have the default one

    def load(i):
        if i not in kept:
            rows = acts.shard(i)["acts"]
            if copying:
                with torch.cuda.stream(copying):
                    rows = rows.pin_memory().to(device, non_blocking=True)
                rows.record_stream(torch.cuda.default_stream(device))           # its memory is used again only after the steps that read it
                copying.synchronize()
            if not keep:
                return rows
            kept[i] = rows
        return kept[i]

    todo, step = [], 0
    for _, i, n in plan:
        if step + n > start:
            todo.append((step, i, n))
        step += n
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(load, todo[0][1]) if todo else None
        try:
            for at, (step, i, n) in enumerate(todo):
                acts.waiting = i >= len(acts.shards)
                rows = ahead.result()
                acts.waiting = False
                ahead = reader.submit(load, todo[at + 1][1]) if at + 1 < len(todo) else None
                for position in range(max(0, start - step), n):
                    yield step + position, position, rows, rows_before[i]
        finally:
            acts.stopped = True


# ---- a ring of shards, and several processes -------------------------------------------------------------------------------------


def release(acts, shards):
    """Tell that this process does not need the first `shards` shards of a ring any more, and delete those that none needs. The first one
    stays: runs start from it, and controls are made of it."""
    rank, processes = share()
    write_json(acts.folder / f"reader_{rank}" / "read.json", {"shards": shards})
    files = [acts.folder / f"reader_{r}" / "read.json" for r in range(processes)]
    for entry in acts.shards[1:min(read_json(f)["shards"] if f.exists() else 0 for f in files)]:
        (acts.folder / entry["file"]).unlink(missing_ok=True)


def wait_for_others(runs):
    """Until the other processes' runs have ended: torchrun stops all processes when one ends with an error, as a failed run does. When one of
    them was killed, it stops this one too."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, interrupt)                                       # train() would go on to its next checkpoint
    identities = {run.folder / "config.json": run.identity for run in runs}
    ended = lambda c, identity: c.get("identity") == identity and c["status"] in ("done", "failed")
    if runs:
        print(f"waiting for {len(runs)} runs of the other processes", flush=True)
    while not all(path.exists() and ended(read_json(path), identity) for path, identity in identities.items()):
        time.sleep(0.5)


# ---- what a call needs -----------------------------------------------------------------------------------------------------------


def sizes(run, d_in):
    """Bytes of a run's parameters, and of all that its file holds, by building it without memory; of the base SAE's where a variant's build()
    looks at values, which are not there then, or is broken, which start() will say."""
    for cls in (run.cls, SAE):
        with contextlib.suppress(Exception), torch.device("meta"):
            sae = cls(d_in, run.steps, run.seed, **run.config["settings"])
            return sum(p.nbytes for p in sae.parameters()), sum(t.nbytes for t in sae.state_dict().values())


def needs(runs, acts, batch_size, device):
    """Bytes of memory, how many of them are weights, gradients and moments, bytes of disk that stay, and of checkpoints: a parameter is there four
    times with its gradient and Adam's moments, three times in a checkpoint, which a CPU has in memory twice while writing it."""
    parameters, files = zip(*(sizes(run, acts.d_in) for run in runs))
    working = 0
    for s in (run.config["settings"] for run in runs):
        step, start = COPIES[s["activation"]]
        working = max(working, 4 * s["d_sae"] * max(step * batch_size / s["micro_batches"], start * min(sample_rows(s["d_sae"]), acts.sizes[0])))
    shards = 2 * max(acts.sizes) * acts.d_in * 2                           # one in use, one read ahead, mostly in bfloat16
    saved = [file + 2 * n for file, n in zip(files, parameters)]
    weights, saving = sum(files) + 3 * sum(parameters), 2 * max(saved) if device.type == "cpu" else 0
    return weights + shards + max(working, saving), weights, sum(n * (1 + len(run.snapshots)) for run, n in zip(runs, files)), sum(saved)


def announce(runs, acts, batch_size, device):
    """Say what memory and disk the runs need, and refuse what can't fit."""
    memory, weights, final, checkpoints = needs(runs, acts, batch_size, device)
    print(f"{len(runs)} runs need about {memory / 1e9:,.2f} GB of {device.type} memory ({weights / 1e9:,.2f} of them weights, gradients and moments), "
          f"{final / 1e9:,.2f} GB of disk, {checkpoints / 1e9:,.2f} more for checkpoints while they train: by the sizes, not measured")
    for free, wanted, what in ((free_memory(device), memory, f"{device.type} memory"), (shutil.disk_usage(".").free, final + checkpoints, "disk")):
        if wanted > free:
            raise Refuse(f"{free / 1e9:,.2f} GB of {what} are free, about {wanted / 1e9:,.2f} are needed: "
                         "train fewer runs in a call, with fewer --snapshots, or --set micro_batches= for less memory", 4)


def free_memory(device):
    """Bytes; on a CPU what Linux could give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = Path("/proc/meminfo")
    if known.exists():
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", known.read_text())[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def train(runs, acts, plan, batch_size, device, checkpoint_every):
    """Train all runs together on one pass over the plan; the batch that most of them take is prepared once."""
    steps = runs[0].steps
    start = min(r.next_step for r in runs)
    log_every = max(1, min(50, steps // 100))
    stopping, saved, saving, paused, clock = [], time.perf_counter(), 0.0, 0.0, {}
    timed = [TIMED_STEPS] + [(steps // 8, steps // 4)] * (steps // 8 >= TIMED_STEPS[1])
    ends = dict(zip(itertools.accumulate(n for _, _, n in plan), ((i, n) for _, i, n in plan)))      # steps done at a shard's end -> the shard
    acts.waiting = False                                                     # for a shard of a ring: all is saved then, so that it may stop at once

    def stop(*_):                                                            # after the next log line; at once the second time, which is not
        if acts.waiting or stopping and time.monotonic() - stopping[0] > 1:  # the second signal of `timeout`: to the process and to its group
            interrupt()
        stopping.append(time.monotonic())

    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, stop)
    if acts.ring:
        release(acts, next(i for end, (i, _) in ends.items() if end > start))
    bar = tqdm(total=steps, initial=start, unit="step", desc="training", disable=True if share()[0] else None, mininterval=1, smoothing=0.05)
    for step, position, rows, first_row in stream(acts, plan, device, start):
        shared = None
        window_ends = step + 1 in ends and acts.ends_window(ends[step + 1][0])
        log_now = (step + 1) % log_every == 0 or step + 1 == steps or window_ends
        for run in runs:
            if run.failure or step < run.next_step:
                continue
            sae = run.sae
            sae.step, sae.position, sae.first_row = step, position * batch_size, first_row
            with run.blamed("choose_batch"):
                chosen = sae.choose_batch(len(rows), generator(run.seed, step, "batch"))
                if chosen == slice(sae.position, sae.position + batch_size) if isinstance(chosen, slice) else False:
                    shared = rows[chosen].float() * sae.scale if shared is None else shared
                    x = shared
                else:
                    x = rows[chosen].float() * sae.scale
                if x.shape != (batch_size, acts.d_in):
                    raise Refuse(f"choose_batch() chose rows of shape {list(x.shape)}, want {[batch_size, acts.d_in]}")
            if not run.failure:
                run.train_on(x, log_now)
        alive = [r for r in runs if not r.failure]
        bar.update()
        if not alive:
            break
        done = step + 1 - start
        for first, last in timed:
            if done in (first, last):
                clock[done] = time.perf_counter() - paused
            if done == last and step + 1 < steps:
                tell_time(len(alive), last - first, clock[last] - clock[first], steps - step - 1)
        if log_now:
            bar.set_postfix(progress_line(alive, batch_size))
            since = time.perf_counter()
            if step + 1 < steps and (stopping or since - saved > max(checkpoint_every, saving / SAVING) or window_ends and acts.ring):
                for run in alive:
                    if run.next_step == step + 1:
                        run.save_checkpoint()
                saved = time.perf_counter()
                saving = saved - since
                paused += saving
                if stopping:
                    raise KeyboardInterrupt
            if window_ends and acts.ring:
                release(acts, ends[step + 1][0] + 1)
    bar.close()
    for run in runs:
        if not run.failure:
            run.finish()


def tell_time(runs, n, seconds, steps):
    """The time that is left, from that of the last n steps of all runs; checkpoints and the first compilation are not in it."""
    tqdm.write(f"about {seconds / n * steps:,.0f} s for {steps} more steps of {runs} runs, from the time of {n} steps", sys.stdout)


def progress_line(runs, batch_size):
    """Medians over the runs, for the progress bar."""
    middle = lambda key: sorted(r.last[key] or 0 for r in runs)[len(runs) // 2]
    return {"tok/s": f"{middle('tokens_per_s') / len(runs):,.0f}x{len(runs)}", "EV": f"{middle('explained_variance'):.3f}",
            "L0": f"{middle('l0'):.1f}", "dead": f"{middle('dead'):.1%}"}


def table(runs):
    """One line per run, best explained variance first; failed runs last, with the reason."""
    width = max(len(r.name) for r in runs)
    lines = [f"{'run':{width}}  {'L0':>7}  {'expl.var':>8}  {'mse':>8}  {'dead':>6}  {'seconds':>7}"]
    done = [r for r in runs if not r.failure]
    for r in sorted(done, key=lambda r: -(r.config["final"]["explained_variance"] or -9)):
        f = {k: float("nan") if v is None else v for k, v in r.config["final"].items()}
        lines.append(f"{r.name:{width}}  {f['l0']:7.2f}  {f['explained_variance']:8.4f}  {f['mse']:8.4f}  {f['dead']:6.1%}  "
                     f"{r.config['seconds']:7.1f}" + (f"  VOID: {', '.join(r.config['void'])}" if r.config["void"] else ""))
    return "\n".join(lines + [f"{r.name:{width}}  FAILED: {r.failure}" for r in runs if r.failure])


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "safetensors": safetensors.__version__,
            "threads": torch.get_num_threads()}


def git_state():
    """The commit that ran and whether files differed from it; None outside a git checkout."""
    ask = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True)
    commit = ask("rev-parse", "HEAD")
    return {"commit": commit.stdout.strip() if commit.returncode == 0 else None,
            "dirty": bool(ask("status", "--porcelain", "--untracked-files=no").stdout.strip()) if commit.returncode == 0 else None}


def find_variants(names):
    """Names, `all`, or a study (`topk_ortho` stands for topk_ortho_r1, r2 ...) -> variant names, each once."""
    known, found = variant_names(), []
    for name in names:
        study = sorted((v for v in known if re.fullmatch(re.escape(name) + r"_r\d+", v)), key=lambda v: int(v.rsplit("_r", 1)[1]))
        if name == "all":
            found += known
        elif name in known or not study:
            found.append(name)              # load_variant refuses an unknown one and names the closest
        else:
            found += study
    return list(dict.fromkeys(found))


def loading(names):
    """Those of the variants whose files load; what is wrong with the others is told, and raised if none does."""
    found = []
    for name in names:
        try:
            load_variant(name)
        except Refuse as e:
            if e.code != 5 or not found and name == names[-1]:
                raise
            print(" ".join(f"error: {e}".split()), file=sys.stderr)
        else:
            found.append(name)
    return found


def combinations(cls, sets, sweeps):
    """Settings of each run of a sweep: `sets` in all of them, times every combination of the swept values."""
    fixed, grid = parse_settings(cls, sets), []
    for sweep in sweeps:
        key, _, values = sweep.partition("=")
        if key in fixed:
            raise Refuse(f"--sweep {key}: --set gives it too", 2)
        grid.append([parse_settings(cls, [f"{key}={v}"]) for v in values.split(",")])
    found = [fixed | {k: v for part in choice for k, v in part.items()} for choice in itertools.product(*grid)]
    for settings in found:
        cls.check({**cls.settings(), **settings})
    return found


def interrupted(folder):
    """(variant, settings, seed, epochs, steps) of the runs on the activations in `folder` that were started and not finished."""
    found = []
    for path in sorted(Path("runs").glob("*/config.json")):
        c = read_json(path)
        if c["status"] == "training" and c["acts"] == folder.name:
            found.append((c["variant"], c["settings"], c["seed"], c["epochs"], c["steps"]))
    if not found:
        raise Refuse(f"--resume: no interrupted run on {folder}")
    return found


def main():
    p = Parser(__doc__)
    p.add_argument("--acts", default=DEFAULT_ACTS, help="folder under acts/ (default: %(default)s)")
    p.add_argument("--variant", nargs="+", default=DEFAULT_VARIANTS, help="names, `all`, or a study such as topk_ortho")
    p.add_argument("--seed", nargs="+", type=number, default=[0], help="one run per seed (default: 0)")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings, for every run")
    p.add_argument("--sweep", nargs="+", action="extend", default=[], metavar="NAME=V1,V2", help="one run per value (and combination)")
    p.add_argument("--epochs", type=whole, default=1, help="passes over the activations (default: 1)")
    p.add_argument("--snapshots", type=number, default=5, metavar="N",
                   help="keep the SAE at 1/2, 1/4 ... 1/2^N of the run, each as large as the SAE (default: %(default)s)")
    p.add_argument("--steps", type=whole, help="steps to take (default: as many as the activations have)")
    p.add_argument("--estimate", action="store_true", help="say what memory and disk it will take, and stop")
    p.add_argument("--resume", action="store_true", help="go on with every interrupted run on these activations, start no new one")
    p.add_argument("--checkpoint", type=whole, default=60, metavar="SECONDS", help="how often, at most (default: %(default)s)")
    p.add_argument("--list", action="store_true", help="print all variants with their lineage and stop")
    p.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    args = p.parse_args()

    if args.list:
        print("\n".join(docstring_line(v) for v in variant_names()))
        return 0
    rank, processes = share()
    device = pick_device(args.device)
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False      # that every new tensor is first filled with NaN is no part of it
    torch.set_float32_matmul_precision("high")

    folder = Path("acts") / check_name("--acts", args.acts)
    if args.resume:
        if processes > 1:
            raise Refuse("--resume: processes can't share what others finish meanwhile; the command that started the runs goes on with them", 2)
        wanted, broken = interrupted(folder), False
    else:
        names = find_variants(args.variant)
        variants = loading(names)
        broken = len(variants) < len(names)
        wanted = [(v, settings, seed, args.epochs, args.steps) for v in variants
                  for settings in combinations(load_variant(v), args.set, args.sweep) for seed in dict.fromkeys(args.seed)]
    sizes = {(settings.get("batch_size", load_variant(v).batch_size), epochs, steps) for v, settings, _, epochs, steps in wanted}
    if len(sizes) > 1:
        raise Refuse("all runs of a call share their batches: want one batch_size, one number of epochs and of steps", 2)
    (batch_size, epochs, steps), = sizes
    for flag, value, most in (("--epochs", epochs, 10_000), ("--snapshots", args.snapshots, 30)):
        if value > most:
            raise Refuse(f"{flag} {value}: want at most {most}", 2)
    acts = Acts(folder)                                                      # wrong flags are told before files are looked for
    if acts.ring and epochs > 1:
        raise Refuse("--epochs: the shards of a --ring can be read once; cache without --ring for several passes", 2)
    plan = plan_steps(acts, batch_size, epochs, steps)
    steps = sum(n for _, _, n in plan)
    if not steps:
        raise Refuse(f"{acts.folder} has {acts.rows} rows, no shard has a batch of {batch_size}: cache more tokens or --set batch_size=", 2)

    runs = [Run(v, settings, seed, acts, steps, epochs, args.snapshots) for v, settings, seed, *_ in wanted]
    runs = list({r.name: r for r in runs}.values())
    runs, others = runs[rank::processes], [r for i, r in enumerate(runs) if i % processes != rank]
    todo = [r for r in runs if not r.is_finished()]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already (same settings, data and code)")
    if todo:
        announce(todo, acts, batch_size, device)
    if args.estimate:
        return 0
    if acts.ring:
        reading = take_lock(acts.folder / f"reader_{rank}")                  # held until this process ends
    for run in todo:
        run.start(acts, device)
    alive = [r for r in todo if not r.failure]
    if alive:
        print(f"{len(alive)} runs, {steps} steps of {batch_size} rows each, from one pass over {acts.folder} "
              f"({acts.rows:,} rows, {len(acts.sizes)} shards)" + (f", {epochs} epochs" if epochs > 1 else ""))
        reads = acts.reads
        train(alive, acts, plan, batch_size, device, args.checkpoint)
        print(f"{acts.reads - reads} shards read for {len(alive)} runs")
    if acts.ring:
        release(acts, len(acts.sizes))
    if runs:
        print(table(runs))
    if broken or any(r.failure or r.config.get("void") for r in runs):
        wait_for_others(others)
        return 5
    return 0


if __name__ == "__main__":
    run_script(main)

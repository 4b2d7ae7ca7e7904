"""Kill and stop the four stages at random moments, fill their disk, start them twice: after the same command again, are the files the same?

    python tests/kills.py --kills 200 --stops 40 --seed 0

Makes a small language model and text in a temporary folder, runs every stage once undisturbed, then disturbs one stage after another: the four
scripts, SAEBench's evaluations, a ring with its producer and its consumer, and the pairs of processes that torchrun starts. Each attempt is a
fork of this process, which has imported torch already; --torchrun takes torchrun itself. Prints one JSON object: how many of each disturbance
were tried, and which of them ended with other bytes ("lost"). Not compared: seconds, tokens per second, how many runs shared those seconds, and
SAEBench's date and number of a result.
"""
import argparse
import contextlib
import importlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}      # threads don't survive a fork
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch

import test_cache
import test_saebench
from sae import ROOT, Acts, read_json, read_tensors, run_script


class Stage(NamedTuple):
    """What is disturbed."""
    parts: list              # (script, its arguments, what torchrun would set) of each process; several run at once
    writes: str              # the folder that is compared
    threads: int = 1         # of each


def two(script, *argv):
    return [(script, argv, {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]


CACHE = ["--model", "m", "--layer", "1", "--data", "t.jsonl", "--ctx", "16", "--tokens", "12_000", "--val-tokens", "800", "--rows-per-shard", "1024",
         "--name", "toy"]
TRAIN = ["--variant", "baseline", "batch_topk", "--set", "d_sae=48", "l0=4", "batch_size=64", "--checkpoint", "1", "--device", "cpu"]
RING = ["--model", "synthetic", "--tokens", "8_000", "--rows-per-shard", "512", "--val-tokens", "500", "--dtype", "float32", "--ring", "3MB", "--device", "cpu"]
BENCH = ["saebench_core", "absorption", "sparse_probing", "scr", "tpp", "unlearning"]
STAGES = {
    "01_cache_acts": Stage([("01_cache_acts", CACHE, {})], "acts"),
    "02_train": Stage([("02_train", ["--acts", "toy", "--epochs", "3", *TRAIN], {})], "runs"),
    "03_eval": Stage([("03_eval", ["--eval", "core", "features", "--controls", "--device", "cpu"], {})], "runs"),
    "04_plot": Stage([("04_plot", [], {})], "plots"),
    "01_cache_acts by two": Stage(two("01_cache_acts", *CACHE), "acts"),
    "02_train by two": Stage(two("02_train", "--acts", "toy", *TRAIN), "runs"),
    "ring": Stage([("01_cache_acts", RING, {}), ("02_train", ["--acts", "synthetic", *TRAIN], {})], "runs"),
    "runs": Stage([("02_train", ["--acts", "labelled", "--epochs", "2", *TRAIN], {})], "runs"),        # which it evaluates
    "saebench": Stage([("03_eval", ["--eval", *BENCH, "--device", "cpu"], {})], "runs", threads=2)}      # and as many processes
SINGLE, ALL = list(STAGES)[:4], [name for name in STAGES if name != "runs"]
SCRIPT = {name: importlib.import_module(name) for name in SINGLE}
PAIRS = ["01_cache_acts by two", "02_train by two"]
STOPS = signal.SIGINT, signal.SIGTERM


def start(name, *more, part=0, limit=None, fill=None):
    """Fork a child that runs a part of a stage (`more`: further arguments); limit: no file may grow larger (bytes); fill: called when it
    begins to write. -> (pid, its stderr)"""
    script, argv, env = STAGES[name].parts[part]
    read, write = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)                           # in the child until run_script has set its handlers
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        os.close(write)
        return pid, read
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(write, 2)
    sys.argv = [f"{script}.py", *more, *argv]
    torch.set_num_threads(STAGES[name].threads)
    os.environ.update(env)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if fill and name == "01_cache_acts":                                      # after it has looked how much room there is
        announce = SCRIPT[name].announce
        SCRIPT[name].announce = lambda *a: (announce(*a), fill())
    elif fill:
        fill()

    def main():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return SCRIPT[script].main()
    try:
        run_script(main)
    except SystemExit as e:
        os._exit(e.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def end(child, after=300.0, sign=signal.SIGKILL):
    """Wait for a child, to which a signal is sent after so many seconds (and kill -9 after 300 more) -> (exit code, what it said)."""
    pid, read = child
    said, until = b"", time.monotonic() + after
    while True:
        if not select.select([read], [], [], max(0, until - time.monotonic()))[0]:
            os.kill(pid, sign)
            sign, until = signal.SIGKILL, time.monotonic() + 300
        part = os.read(read, 65536)
        said += part
        if not part:
            break
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


CLOCK = rb'"(seconds|shared_by|tokens_per_s|checksum|log_checksum|datetime_epoch_millis|eval_id)": ("[\w-]+"|[\d.e+-]+)'


def files(folder):
    """{path: contents} without what a clock decides."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"):
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            data = re.sub(CLOCK, b"", data) if "acts" not in path.parts else data
        found[str(path)] = data
    return found


class Undisturbed:
    """The working folder before each stage, and what the stage makes of it in peace."""

    def __init__(self, stages):
        self.after, self.seconds = {}, {}
        test_cache.save("m")
        test_cache.write_jsonl(Path("t.jsonl"), test_cache.texts(n=700, length=30))
        for name in SINGLE:
            self.run(name)
        for name in ("01_cache_acts", "02_train"):
            if f"{name} by two" in stages:
                self.prepare(name)
                self.run(f"{name} by two")
        if "ring" in stages:
            self.run_ring()
        if "saebench" in stages:
            self.run_saebench()

    def run_ring(self):
        clear()
        producer, meta = start("ring"), Path("acts/synthetic/meta.json")
        while not (meta.exists() and read_json(meta)["shards"]):              # before that its consumer does not start
            time.sleep(0.02)
        end(producer, 0)
        self.run("ring")

    def run_saebench(self):
        clear()
        test_saebench.make_world(Path("."))
        SCRIPT["03_eval"].EMBEDDED.update(test_saebench.FEWER)
        test_saebench.make_corpus(Acts("acts/toy"))
        end(start("runs"))
        self.run("saebench")

    def run(self, name):
        """Keep the folder as it is now, then run the stage."""
        shutil.copytree(".", Path("..") / "kept" / name)
        started = time.monotonic()
        children = [start(name, part=i) for i in range(len(STAGES[name].parts))]
        ends = [end(child) for child in children]
        self.seconds[name] = time.monotonic() - started
        assert not any(code for code, _ in ends), f"{name}: {ends}"
        self.after[name] = files(STAGES[name].writes)

    def prepare(self, name):
        """The folder as it was before the stage."""
        clear()
        shutil.copytree(Path("..") / "kept" / name, ".", dirs_exist_ok=True)

    def is_reached(self, name):
        """Whether the stage, run again, ends with the same bytes; if not, say where they differ."""
        children = [start(name, part=i) for i in range(len(STAGES[name].parts))]
        ends = [end(child) for child in children]
        now = files(STAGES[name].writes)
        differs = sorted(k for k in now.keys() | self.after[name].keys() if now.get(k) != self.after[name].get(k))
        failed = any(code for code, _ in ends)
        if failed or differs:
            print(f"{name}: differs: {differs}: {[(code, said[-2000:]) for code, said in ends]}", file=sys.stderr)
        return not failed and not differs


def clear():
    """Empty the working folder."""
    for path in Path(".").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def kill(peace, stages, kills, rng, signs=(signal.SIGKILL,)):
    """Signals at random moments, up to four times in a row, then once undisturbed. Ctrl-C and SIGTERM end in one line with code 130.
    Of several processes one is struck, and the others are told to end by SIGTERM, as torchrun does it."""
    tried, lost = dict.fromkeys(stages, 0), []
    while sum(tried.values()) < kills:
        name = min(tried, key=tried.get)
        peace.prepare(name)
        before = tried[name]
        for _ in range(rng.randint(1, 4)):
            sign = signs[tried[name] % len(signs)]
            children = [start(name, part=i) for i in range(len(STAGES[name].parts))]
            rng.shuffle(children)
            ends = [(sign, *end(children[0], rng.uniform(0, peace.seconds[name]), sign))]
            ends += [(signal.SIGTERM, *end(child, 0, signal.SIGTERM)) for child in children[1:]]
            tried[name] += ends[0][1] in (-sign, 130)
            for by, code, said in ends:                                       # -by: where Python had begun to end
                if code not in (0, -by, 130) or code == 130 and ("Traceback" in said or not said.splitlines()[-1].startswith("interrupted: ")):
                    lost.append(f"{name}: {by.name}, exit {code}: {said[-1500:]}")
                    print(lost[-1], file=sys.stderr)
        if not peace.is_reached(name):
            lost += [name] * (tried[name] - before)
        print(f"{sum(tried.values())} of {kills} {' '.join(s.name for s in signs)}, {len(lost)} lost", file=sys.stderr)
    return {"tried": tried, "lost": lost}


def fill_up(peace, stages, rooms, limits):
    """A full disk: a tmpfs with so much room left (KiB; where mounting is allowed), and files that may not grow beyond a limit (bytes)."""
    tried, lost, mounted = 0, [], True
    home = os.getcwd()
    for name in [name for name in stages if len(STAGES[name].parts) == 1]:
        for limit in limits:
            peace.prepare(name)
            tried += 1
            lost += judged(name, *end(start(name, limit=limit)), peace)
        for room in rooms:
            peace.prepare(name)
            os.mkdir("../disk")
            try:
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", "../disk"], check=True, capture_output=True)
            except (subprocess.CalledProcessError, FileNotFoundError):
                mounted = False
                os.rmdir("../disk")
                break
            try:
                shutil.copytree(".", "../disk", dirs_exist_ok=True)
                os.chdir("../disk")
                tried += 1
                result = end(start(name, fill=lambda: ballast(room)))
                Path("ballast").unlink()
                lost += judged(name, *result, peace)
            finally:
                os.chdir(home)
                subprocess.run(["umount", "../disk"], check=True)
                os.rmdir("../disk")
    return {"tried": tried, "lost": lost, "tmpfs": mounted}


def ballast(room):
    """Fill the disk of this folder but for `room` KiB."""
    free = os.statvfs(".").f_bavail * os.statvfs(".").f_bsize
    Path("ballast").write_bytes(bytes(max(0, free - 1024 * room)))


def judged(name, code, said, peace):
    """[] if a stage without room said so in one line, or had room enough, and ends as undisturbed once there is room again."""
    problems = []
    if code not in (0, 4) or "Traceback" in said or (code and not said.splitlines()[-1].startswith("error: ")):
        problems.append(f"{name}: exit {code}: {said[-1000:]}")
    if code and list(Path(".").rglob("*.tmp")):
        problems.append(f"{name} left {list(Path('.').rglob('*.tmp'))}")
    return problems + ([] if peace.is_reached(name) else [name])


def twice(peace, rng):
    """Two processes at once, the second up to half the stage's time later: one does the work, the other says so and stops."""
    tried, lost, refused = 0, [], 0
    for name in SINGLE:
        for most in (0, 0.5):
            peace.prepare(name)
            first = start(name)
            time.sleep(rng.uniform(0, most * peace.seconds[name]))
            ends = [end(child) for child in (start(name), first)]
            tried, refused = tried + 1, refused + (6 in [code for code, _ in ends])
            if sorted(code for code, _ in ends) not in ([0, 0], [0, 6]) or any(code == 6 and "another process" not in said for code, said in ends):
                lost.append(f"{name}: {ends}")
            elif not peace.is_reached(name):
                lost.append(name)
    for _ in range(3):                                                        # of different runs, but both write the files of the controls
        peace.prepare("03_eval")
        ends = [end(child) for child in [start("03_eval", str(run), "--force") for run in sorted(Path("runs").glob("*-s0"))]]
        whole = [read_json(path) if path.suffix == ".json" else read_tensors(path) for path in Path("runs").glob("controls-*/*/eval/*")]
        tried += 1
        if [code for code, _ in ends] != [0, 0] or len(whole) != 8:
            lost.append(f"controls: {len(whole)} files, {ends}")
        elif not peace.is_reached("03_eval"):
            lost.append("controls")
    return {"tried": tried, "lost": lost, "refused": refused}


def torchrun(peace, rng):
    """torchrun itself, with two processes, told to end or killed, or one of its processes killed: all of them end, and the stage goes on."""
    tried, lost = 0, []
    for name in PAIRS:
        script, argv, _ = STAGES[name].parts[0]
        for struck, sign in ((0, signal.SIGINT), (0, signal.SIGKILL), (1, signal.SIGKILL)):
            peace.prepare(name)
            with open("../said", "wb") as said:
                agent = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
                                          ROOT / f"{script}.py", *argv], stdout=said, stderr=said)
            begun = Path("acts/toy/process_1/meta.json" if script == "01_cache_acts" else "runs/batch_topk-toy-batch_size=64-d_sae=48-l0=4.0-s0/metrics.jsonl")
            while not begun.exists() and agent.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            processes = [agent.pid, *map(int, Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split())]
            os.kill(processes[struck], sign)
            agent.wait()
            until, left = time.monotonic() + 60, processes[1:]
            while left and time.monotonic() < until:
                left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
                time.sleep(0.01)
            tried += 1
            if left or len(processes) != 3:
                lost.append(f"{name}: {sign.name} to process {struck}, of {processes} {left} go on: {Path('../said').read_text()[-2000:]}")
            if not peace.is_reached(name):
                lost.append(f"{name}: {sign.name} to process {struck}")
            print(f"torchrun: {tried} tried, {lost}", file=sys.stderr)
    return {"tried": tried, "lost": lost}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=0, help="kill -9")
    p.add_argument("--stops", type=int, default=0, help="Ctrl-C and SIGTERM in turn")
    p.add_argument("--rooms", type=int, nargs="*", default=[], help="KiB left on a full tmpfs")
    p.add_argument("--limits", type=int, nargs="*", default=[], help="bytes that a file may have")
    p.add_argument("--twice", action="store_true", help="two processes at once")
    p.add_argument("--torchrun", action="store_true", help="torchrun and its processes")
    p.add_argument("--stage", nargs="+", default=SINGLE, choices=ALL, help="which are killed and stopped (default: the four scripts)")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.mkdir("work")
        os.chdir("work")
        peace = Undisturbed([*args.stage, *PAIRS] if args.torchrun else args.stage)
        said = {"seconds": peace.seconds}
        if args.kills:
            said["kills"] = kill(peace, args.stage, args.kills, rng)
        if args.stops:
            said["stops"] = kill(peace, args.stage, args.stops, rng, STOPS)
        if args.rooms or args.limits:
            said["disks"] = fill_up(peace, args.stage, args.rooms, args.limits)
        if args.twice:
            said["twice"] = twice(peace, rng)
        if args.torchrun:
            said["torchrun"] = torchrun(peace, rng)
    print(json.dumps(said))


if __name__ == "__main__":
    main()

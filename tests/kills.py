"""Kill and stop the four stages at random moments, fill their disk, start them twice: after the same command again, are the files the same?

    python tests/kills.py --kills 200 --stops 40 --seed 0

Makes a small language model and text in a temporary folder, runs every stage once undisturbed, then disturbs one stage after another. Each
attempt is a fork of this process, which has imported torch already. Prints one JSON object: how many of each disturbance were tried, and which
of them ended with other bytes ("lost"). Not compared: seconds, tokens per second, and how many runs shared those seconds.
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

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}      # threads don't survive a fork
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch

import test_cache
from sae import read_json, read_tensors, run_script

STAGES = {
    "01_cache_acts": ["--model", "m", "--layer", "1", "--data", "t.jsonl", "--ctx", "16", "--tokens", "12_000", "--val-tokens", "800",
                      "--rows-per-shard", "1024", "--name", "toy"],
    "02_train": ["--acts", "toy", "--variant", "baseline", "batch_topk", "--set", "d_sae=48", "l0=4", "batch_size=64", "--epochs", "3",
                 "--checkpoint", "1", "--device", "cpu"],
    "03_eval": ["--eval", "core", "features", "--controls", "--device", "cpu"],
    "04_plot": []}
WRITES = {"01_cache_acts": "acts", "02_train": "runs", "03_eval": "runs", "04_plot": "plots"}
STAGE = {name: importlib.import_module(name) for name in STAGES}
STOPS = signal.SIGINT, signal.SIGTERM


def start(name, *more, limit=None, fill=None):
    """Fork a child that runs a stage (`more`: further arguments); limit: no file may grow larger (bytes); fill: called when it begins to write.
    -> (pid, its stderr)"""
    read, write = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)                           # in the child until run_script has set its handlers
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        os.close(write)
        return pid, read
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(write, 2)
    sys.argv = [f"{name}.py", *more, *STAGES[name]]
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if fill and name == "01_cache_acts":                                      # after it has looked how much room there is
        announce = STAGE[name].announce
        STAGE[name].announce = lambda *a: (announce(*a), fill())
    elif fill:
        fill()

    def main():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return STAGE[name].main()
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


def files(folder):
    """{path: contents} without what a clock decides."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"):
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            data = re.sub(rb'"(seconds|shared_by|tokens_per_s|checksum|log_checksum)": ("\w+"|[\d.e+-]+)', b"", data) if "acts" not in path.parts else data
        found[str(path)] = data
    return found


class Undisturbed:
    """The folder after each stage, run once in peace."""

    def __init__(self):
        self.after, self.seconds = {}, {}
        for name in STAGES:
            self.prepare(name)
            started = time.monotonic()
            code, said = end(start(name))
            self.seconds[name] = time.monotonic() - started
            assert code == 0, f"{name}: {said[-3000:]}"
            keep = Path("..") / "kept" / name
            shutil.copytree(WRITES[name], keep)
            self.after[name] = files(WRITES[name])

    def prepare(self, name):
        """The folder as the stage before left it."""
        before = {"02_train": "01_cache_acts", "03_eval": "02_train", "04_plot": "03_eval"}.get(name)
        for folder in ("runs", "plots") if before == "01_cache_acts" else (WRITES[name],):
            shutil.rmtree(folder, ignore_errors=True)
        if before:
            shutil.rmtree(WRITES[before], ignore_errors=True)
            shutil.copytree(Path("..") / "kept" / before, WRITES[before])

    def is_reached(self, name):
        """Whether the stage, run again, ends with the same bytes; if not, say where they differ."""
        code, said = end(start(name))
        now = files(WRITES[name])
        differs = sorted(k for k in now.keys() | self.after[name].keys() if now.get(k) != self.after[name].get(k))
        if code or differs:
            print(f"{name}: exit {code}, differs: {differs}: {said[-2000:]}", file=sys.stderr)
        return not code and not differs


def kill(peace, kills, rng, signs=(signal.SIGKILL,)):
    """Signals at random moments, up to four times in a row, then once undisturbed. Ctrl-C and SIGTERM end in one line with code 130."""
    tried, lost = dict.fromkeys(STAGES, 0), []
    while sum(tried.values()) < kills:
        name = min(tried, key=tried.get)
        peace.prepare(name)
        before = tried[name]
        for _ in range(rng.randint(1, 4)):
            sign = signs[tried[name] % len(signs)]
            code, said = end(start(name), rng.uniform(0, peace.seconds[name]), sign)
            stopped = code in (-sign, 130)                                    # -sign: where Python had begun to end
            tried[name] += stopped
            if code and not stopped or code == 130 and ("Traceback" in said or not said.splitlines()[-1].startswith("interrupted: ")):
                lost.append(f"{name}: {sign.name}, exit {code}: {said[-1500:]}")
                print(lost[-1], file=sys.stderr)
        if not peace.is_reached(name):
            lost += [name] * (tried[name] - before)
        print(f"{sum(tried.values())} of {kills} {' '.join(s.name for s in signs)}, {len(lost)} lost", file=sys.stderr)
    return {"tried": tried, "lost": lost}


def fill_up(peace, rooms, limits):
    """A full disk: a tmpfs with so much room left (KiB; where mounting is allowed), and files that may not grow beyond a limit (bytes)."""
    tried, lost, mounted = 0, [], True
    home = os.getcwd()
    for name in STAGES:
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
    for name in STAGES:
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


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=0, help="kill -9")
    p.add_argument("--stops", type=int, default=0, help="Ctrl-C and SIGTERM in turn")
    p.add_argument("--rooms", type=int, nargs="*", default=[], help="KiB left on a full tmpfs")
    p.add_argument("--limits", type=int, nargs="*", default=[], help="bytes that a file may have")
    p.add_argument("--twice", action="store_true", help="two processes at once")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.mkdir("work")
        os.chdir("work")
        test_cache.save("m")
        test_cache.write_jsonl(Path("t.jsonl"), test_cache.texts(n=700, length=30))
        peace = Undisturbed()
        said = {"seconds": peace.seconds}
        if args.kills:
            said["kills"] = kill(peace, args.kills, rng)
        if args.stops:
            said["stops"] = kill(peace, args.stops, rng, STOPS)
        if args.rooms or args.limits:
            said["disks"] = fill_up(peace, args.rooms, args.limits)
        if args.twice:
            said["twice"] = twice(peace, rng)
    print(json.dumps(said))


if __name__ == "__main__":
    main()

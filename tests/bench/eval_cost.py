"""What SAEBench's evaluations cost for 1, 5 and 20 SAEs: 03_eval.py, which shares what depends on no SAE, against SAEBench's own calls.

    python tests/bench/eval_cost.py                       # on acts/tiny
    python tests/bench/eval_cost.py --part 4              # a quarter of the contexts and words

Reads acts/tiny (01_cache_acts.py) and writes nothing but its eval_cache, which it empties. CPU seconds of this process, imports and the
building of the language model apart. SAEs are random, 1,024 latents, L0 16. SAEBench is timed on 1 and 2 SAEs; its further SAEs cost what
the second did. Both do the same work: the same contexts, words and prompts, every letter used, and the results are compared.

Measured with --part 4 on the embedded model, seconds ours / SAEBench's: core 2.2 / 3.8 for one SAE, 16.5 / 73 for 20, 0.76 / 3.7 for each
further one; absorption (an earlier state) 3.4 / 16.2 for one, 6.6 / 39 for 5, 0.80 / 5.6 for each further one.
"""
import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]
ev = importlib.import_module("03_eval")
from sae import SAE, Acts, checksum, generator  # noqa: E402

CPU = torch.device("cpu")


def random_runs(acts, n, folder):
    """n TopK SAEs of random directions around the mean."""
    mean, made = acts.shard(0)["acts"][:4096].float().mean(0) * acts.scale, []
    for seed in range(n):
        sae = SAE(acts.d_in, 100, seed, d_sae=1024, activation="topk", l0=16.0)
        with torch.no_grad():
            sae.scale.fill_(acts.scale)
            sae.b_dec.copy_(mean + 0.01 * torch.randn(acts.d_in, generator=generator(seed)))
        said = checksum(b"".join(v.detach().numpy().tobytes() for v in sae.state_dict().values()))
        made.append(ev.Run(folder / f"random-{seed}", sae.eval(), {"variant": "random", "steps": 100, "settings": sae.settings(), "sae_checksum": said}))
    return made


def cpu_seconds(work):
    started = time.process_time()
    work()
    return time.process_time() - started


def ours(acts, bench, name, runs):
    """Everything of one evaluation, from an empty eval_cache."""
    shutil.rmtree(acts.folder / "eval_cache", ignore_errors=True)
    failures = {}
    spec, settings = ev.BENCH[name], ev.BENCH[name].settings(acts)
    results = {run.name: result for run, result, *_ in ev.outcomes(bench, name, settings, runs, failures)}
    assert not failures and len(results) == len(runs), failures
    return results


def theirs(acts, bench, name, runs, folder):
    """SAEBench's own call."""
    import test_saebench as own
    call = {"saebench_core": own.plain_core, "absorption": own.plain_absorption}[name]
    return call(acts, bench, runs, ev.BENCH[name].settings(acts), folder)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--acts", default="tiny", help="folder under acts/ (default: tiny)")
    p.add_argument("--eval", nargs="+", default=["saebench_core", "absorption"], help="which evaluations")
    p.add_argument("--saes", nargs="+", type=int, default=[1, 5, 20], help="how many SAEs; the first must be 1")
    p.add_argument("--part", type=int, default=1, help="work on one of so many contexts and words (default: all)")
    args = p.parse_args()
    torch.set_num_threads(1)
    import test_saebench as own
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        acts = Acts(Path("acts").resolve() / args.acts)
        spells = {**ev.absorption_settings(acts), "prompt_template": "{word} has the first letter:", "prompt_token_pos": -6, "own_position": False,
                  "probe_batch": 4096, "min_probe_f1": -1.0, "min_letters": 1}            # what SAEBench's own code can do as well
        core = ev.core_settings(acts)
        core["batches"] //= args.part
        words = ev.alpha_tokens
        ev.alpha_tokens = lambda tokenizer: words(tokenizer)[::args.part]
        ev.BENCH["saebench_core"] = ev.BENCH["saebench_core"]._replace(settings=lambda acts: core)
        ev.BENCH["absorption"] = ev.BENCH["absorption"]._replace(settings=lambda acts: spells)
        bench, runs = ev.Bench(acts, CPU), random_runs(acts, max(args.saes), Path(folder))
        print(f"{acts.folder.name}: CPU seconds on one core\n{'':16}{'SAEs':>5}{'ours':>9}{'SAEBench':>10}{'ratio':>7}{'ours / ours of 1':>18}")
        for name in args.eval:
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                ours(acts, bench, name, random_runs(acts, 1, Path(folder)))               # imports
                spent, results = {}, {}
                for n in args.saes:
                    spent[n] = cpu_seconds(lambda: results.update(ours(acts, bench, name, runs[:n])))
                plain, found = {}, {}
                for n in (1, 2):
                    plain[n] = cpu_seconds(lambda: found.update({n: theirs(acts, bench, name, runs[:n], Path(folder) / f"{name}-{n}")}))
            own.same(results["random-0"]["eval_result_metrics"], found[1][0]["eval_result_metrics"], rtol=1e-4, atol=1e-5)
            for n in args.saes:
                their = plain[1] + (n - 1) * (plain[2] - plain[1])
                print(f"{name:16}{n:5}{spent[n]:9.1f}{their:10.1f}{their / spent[n]:7.1f}{spent[n] / spent[1]:18.2f}", flush=True)
            most = max(args.saes)
            each, their = (spent[most] - spent[1]) / (most - 1), plain[2] - plain[1]
            print(f"{name:16} each{each:9.2f}{their:10.2f}{their / each:7.1f}", flush=True)


if __name__ == "__main__":
    main()

"""What SAEBench's evaluations cost for 1, 5 and 20 SAEs: 03_eval.py, which shares what depends on no SAE, against SAEBench's own calls.

    python tests/bench/eval_cost.py                       # on acts/tiny, a quarter of its contexts, words and texts
    python tests/bench/eval_cost.py --alone               # 03_eval.py alone, one evaluation and SAE after another
    python tests/bench/eval_cost.py --wall                # 03_eval.py as it is called, by the clock: SAEs side by side

Reads acts/tiny (01_cache_acts.py) and writes nothing but its eval_cache, which it empties. CPU seconds of this process with one thread, imports
and the building of the language model apart; with --wall all seconds by the clock, with PyTorch's usual threads. SAEs are random, 1,024
latents, L0 16. "kept": one SAE in a call of its own, once what depends on no SAE is there. SAEBench is timed on 1 and 2 SAEs, inside the
same seams; its further SAEs cost what the second did. Both do the same work (absorption by prompts, every letter used); unlearning by
losses is no evaluation of SAEBench's. What was measured is in RESULTS.md.
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
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]
ev = importlib.import_module("03_eval")                                 # before torch: it says how threads wait
import test_saebench as own  # noqa: E402
import torch  # noqa: E402
from sae import SAE, Acts, checksum, generator  # noqa: E402

CPU, BEGUN = torch.device("cpu"), time.time() - time.process_time()      # nearly: what loading waited for the disk is not in it


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


def seconds(work, clock=time.process_time):
    started = clock()
    work()
    return clock() - started


def ours(bench, name, runs):
    """Everything of one evaluation."""
    failures, settings = {}, ev.BENCH[name].settings(bench.acts)
    results = {run.name: result for run, result, *_ in ev.outcomes(bench, name, settings, runs, failures)}
    assert not failures and len(results) == len(runs), failures
    return results


def by_the_clock(acts, names, counts):
    """Prints what whole calls of 03_eval.py take; each starts from an empty cache."""
    took = {}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        runs = random_runs(acts, max(counts), Path(folder))
        loaded = time.time() - BEGUN
        for n in counts:
            shutil.rmtree(acts.folder / "eval_cache", ignore_errors=True)
            failures = {}
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                took[n] = loaded + seconds(lambda: ev.evaluate_saebench(acts, runs[:n], names, True, CPU, failures), time.perf_counter)
            assert not failures, failures
            print(f"{n:4} SAEs {took[n]:7.1f} s {took[n] / took[counts[0]]:6.2f}", flush=True)


def theirs(bench, name, runs, folder):
    """SAEBench's own call."""
    settings = {"sae_bench": "", **ev.BENCH[name].settings(bench.acts)}
    if name in ("saebench_core", "absorption"):
        return {"saebench_core": own.plain_core, "absorption": own.plain_absorption}[name](bench.acts, bench, runs, settings, folder)
    config, fixed, counts, module = "ScrAndTppEvalConfig", {"perform_scr": name == "scr"}, "n_values", ev.SCR_MAIN
    if name == "sparse_probing":
        config, fixed, counts, module = "SparseProbingEvalConfig", {}, "k_values", "sae_bench.evals.sparse_probing.main"
    saes = [(bench.label(run), ev.BenchSAE(bench, run)) for run in runs]
    with ev.labelled_tasks(bench, settings) as data, bench.seams(ev.SEED, data):
        config = ev.labelled_config(bench, settings, config, fixed, counts, saes[0][1])
        importlib.import_module(module).run_eval(config, saes, "cpu", str(folder / "out"), artifacts_path=str(folder / "artifacts"))


def smaller(part, acts):
    """SAEBench's evaluations of one of so many contexts, words and texts; absorption as SAEBench's own code can do it."""
    core, words = ev.core_settings(acts), ev.alpha_tokens
    core["batches"] //= part
    spells = {**ev.absorption_settings(acts), "prompt_template": "{word} has the first letter:", "prompt_token_pos": -6, "own_position": False,
              "probe_batch": 4096, "min_probe_f1": -1.0, "min_letters": 1}
    ev.alpha_tokens = lambda tokenizer: words(tokenizer)[::part]
    ev.BENCH["saebench_core"] = ev.BENCH["saebench_core"]._replace(settings=lambda acts: core)
    ev.BENCH["absorption"] = ev.BENCH["absorption"]._replace(settings=lambda acts: spells)
    ev.EMBEDDED.update(train=ev.EMBEDDED["train"] // part, test=ev.EMBEDDED["test"] // part)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--acts", default="tiny", help="folder under acts/ (default: tiny)")
    usual = [name for name in ev.BENCH if name not in ev.ASKED]
    p.add_argument("--eval", nargs="+", default=usual, help="which evaluations")
    p.add_argument("--saes", nargs="+", type=int, default=[1, 5, 20], help="how many SAEs; the first must be 1")
    p.add_argument("--part", type=int, default=4, help="against SAEBench: work on one of so many contexts, words and texts")
    p.add_argument("--alone", action="store_true", help="03_eval.py alone, on all of them, absorption as in the default job")
    p.add_argument("--wall", action="store_true", help="the same by the clock, all evaluations in one call, side by side on the threads that PyTorch "
                                                       "takes by itself; for an idle machine")
    args = p.parse_args()
    acts = Acts(Path("acts").resolve() / args.acts)
    for module in ("core", "absorption", "sparse_probing", "scr_and_tpp", "unlearning"):
        importlib.import_module(f"sae_bench.evals.{module}.main")
    if args.wall:
        return by_the_clock(acts, args.eval, args.saes)
    torch.set_num_threads(1)
    spent, kept, plain, results, found = defaultdict(dict), {}, defaultdict(dict), {}, {}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        folder = Path(folder)
        if not args.alone:
            smaller(args.part, acts)
        runs, bench = random_runs(acts, max(args.saes), folder), ev.Bench(acts, CPU)
        start = time.process_time()
        print(f"{acts.folder.name}: CPU seconds; before anything is evaluated {start:.1f}", flush=True)
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            for n in args.saes:
                shutil.rmtree(acts.folder / "eval_cache", ignore_errors=True)
                bench = ev.Bench(acts, CPU)
                for name in args.eval:
                    spent[name][n] = seconds(lambda: results.update({(name, n): ours(bench, name, runs[:n])}))
                    print(name, n, round(spent[name][n], 2), file=sys.__stdout__, flush=True)
            for name in args.eval:
                bench = ev.Bench(acts, CPU)
                kept[name] = seconds(lambda: ours(bench, name, runs[:1]))
            for name in args.eval if not args.alone else ():
                for n in (1, 2) if name != "unlearning" else ():
                    plain[name][n] = seconds(lambda: found.update({(name, n): theirs(bench, name, runs[:n], folder / f"{name}-{n}")}))
                    print(f"SAEBench's {name}", n, round(plain[name][n], 2), file=sys.__stdout__, flush=True)
    for name in {"saebench_core", "absorption"} & plain.keys():
        own.same(results[name, 1]["random-0"]["eval_result_metrics"], found[name, 1][0]["eval_result_metrics"], rtol=1e-4, atol=1e-5)
    most = max(args.saes)
    print(f"{'':16}{'SAEs':>8}{'ours':>9}{'SAEBench':>10}{'ratio':>7}{'ours / ours of 1':>18}")
    spent["all"] = {n: start + sum(spent[name][n] for name in args.eval) for n in args.saes}
    for name, ours_n in spent.items():
        first, second = plain[name].get(1), plain[name].get(2)
        for n in args.saes:
            their = f"{first + (n - 1) * (second - first):10.1f}{(first + (n - 1) * (second - first)) / ours_n[n]:7.1f}" if first else f"{'-':>10}{'-':>7}"
            print(f"{name:16}{n:8}{ours_n[n]:9.1f}{their}{ours_n[n] / ours_n[1]:18.2f}")
        if name in kept:
            print(f"{name:16}{'kept':>8}{kept[name]:9.2f}" + (f"{first:10.2f}{first / kept[name]:7.1f}" if first else ""))
        if most > 1:
            each = (ours_n[most] - ours_n[1]) / (most - 1)
            print(f"{name:16}{'further':>8}{each:9.2f}" + (f"{second - first:10.2f}{(second - first) / each:7.1f}" if first else ""))


if __name__ == "__main__":
    main()

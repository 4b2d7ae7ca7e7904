"""What stage 3 costs for 1, 5 and 20 SAEs: all evaluations share what depends on no SAE.

    python tests/bench/eval_cost.py                       # on acts/tiny
    python tests/bench/eval_cost.py --eval core --saes 1 20

Reads acts/tiny (01_cache_acts.py); SAEs are random, 1,024 latents, L0 16. Prints CPU seconds of one
thread, without imports and the loading of the language model; `further`: of each SAE after the
first. What SAEBench's evaluations keep is made anew for every count, in acts/NAME/eval_cache.
"""
import argparse
import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]
from evaluation import CPU, eval_py, write_run  # noqa: E402

import torch  # noqa: E402
from sae import SAE, Acts, generator  # noqa: E402


def random_runs(acts, n, folder):
    """n runs of TopK SAEs in random directions around the mean."""
    runs = []
    for seed in range(n):
        sae = SAE(acts.d_in, 960, seed, d_sae=1024, activation="topk", l0=16.0).eval()
        with torch.no_grad():
            sae.mean.copy_(acts.mean)
            sae.scale.fill_(acts.scale)
            sae.b_dec.normal_(0, 0.01, generator=generator("eval_cost", seed))
        runs.append(write_run(folder / f"topk-s{seed}", sae, acts, seed=seed))
    return runs


def seconds(name, acts, model, runs):
    """CPU seconds of one evaluation of the runs, as the script makes it."""
    failures, started = [], time.process_time()
    eval_py.evaluate(name, acts, model, runs, failures)
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")
    return time.process_time() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acts", default="tiny", help="folder under acts/ (default: %(default)s)")
    parser.add_argument("--eval", nargs="+", choices=eval_py.EVALS, default=list(eval_py.EVALS))
    parser.add_argument("--saes", nargs="+", type=int, default=[1, 5, 20])
    args = parser.parse_args()
    torch.set_num_threads(1)
    acts = Acts(Path("acts") / args.acts)
    model = eval_py.LanguageModel(acts, CPU)
    for package in ("absorption", "sparse_probing", "scr_and_tpp", "unlearning"):
        importlib.import_module(f"sae_bench.evals.{package}.main")

    with tempfile.TemporaryDirectory() as folder:
        runs = random_runs(acts, max(args.saes), Path(folder))
        header = "".join(f"{n:>9}" for n in args.saes)
        print(f"{'CPU seconds, SAEs':20}{header}{'further':>9}")
        for name in [name for name in eval_py.EVALS if name in args.eval]:
            took = []
            for n in args.saes:
                shutil.rmtree(acts.folder / "eval_cache", ignore_errors=True)
                took.append(seconds(name, acts, model, runs[:n]))
            further = (took[-1] - took[0]) / max(1, args.saes[-1] - args.saes[0])
            cells = "".join(f"{value:9.2f}" for value in [*took, further])
            print(f"{name:20}{cells}", flush=True)


if __name__ == "__main__":
    main()

"""What SAEBench's metrics cost for one SAE and for many: 03_eval.py against sae_bench's own calls.

    python tests/bench/eval_cost.py            # after 01_cache_acts.py, on acts/tiny
    python tests/bench/eval_cost.py --alone    # 03_eval.py alone, on the default job's cache

CPU seconds of one process with one thread. SAEs are random: TopK, 1,024 latents, L0 16. Against
sae_bench, both work on the embedded model, absorption on 12 words of a letter (whatever the model
knows of them: it does not spell, so --alone leaves absorption out), the others on passages of
documentation that stand in the columns of one of its data sets. sae_bench is timed on one SAE and
on two; the difference is what a further one costs. Writes a temporary folder, and the labelled
texts that 03_eval.py makes, in acts/tiny/eval_cache.
"""
import argparse
import contextlib
import functools
import importlib
import itertools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]
import pandas  # noqa: E402
import torch  # noqa: E402

from sae import SAE, Acts, generator  # noqa: E402
from test_saebench import PlainSAE, hooked_llama, seed_all, write_lines  # noqa: E402

ev = importlib.import_module("03_eval")
CPU = torch.device("cpu")
NAMES = ("absorption", "sparse_probing", "scr", "tpp")
WORDS = 12                                 # of a letter
BIOS = "LabHC/bias_in_bios_class_set1"
PROFESSIONS = (0, 1, 2, 6, 9)              # of that task
TEXTS = {"dataset_names": [BIOS], "context_length": 64}
SETTINGS = {                               # of both, where they work side by side
    "absorption": {"min_GT_probe_f1": -1.0, "min_feats_for_eval": 1},
    "sparse_probing": TEXTS | {"probe_train_set_size": 200, "probe_test_set_size": 200},
    "scr": TEXTS | {"train_set_size": 200, "test_set_size": 200, "n_values": [2, 5, 10, 20],
                    "probe_lr": 1e-2, "column1_vals_lookup": {BIOS: [["professor", "nurse"]]}},
    "tpp": TEXTS | {"train_set_size": 200, "test_set_size": 200, "n_values": [2, 5, 10, 20],
                    "probe_lr": 1e-2}}


def random_run(acts, seed):
    """A TopK SAE of random directions, as a control: core then asks for no files of training."""
    sae = SAE(acts.d_in, 100, seed, d_sae=1024, activation="topk", l0=16.0).eval()
    with torch.no_grad():
        sae.scale.fill_(acts.scale)
        sae.mean.copy_(acts.mean)
        sae.b_dec.normal_(0, 0.01, generator=generator("b_dec", seed))
    config = {"variant": "random", "control": "random", "steps": 0, "settings": sae.settings(),
              "sae_checksum": str(seed)}
    return ev.Run(Path("runs") / f"random-{seed}", config, sae)


def cpu_seconds(work):
    """CPU seconds that work() takes; what it prints is dropped."""
    with open(os.devnull, "w") as null:
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            start = time.process_time()
            work()
            return time.process_time() - start


def ours(name, acts, model, runs):
    """03_eval.py's evaluation of the runs."""
    spec = ev.EVALS[name]
    found = dict(spec.make(acts, model, runs, spec.settings(acts)))
    for result in found.values():
        if isinstance(result, Exception):
            raise result
    assert len(found) == len(runs)


def fewer_words():
    """Have sae_bench, and so 03_eval.py, take WORDS words of a letter from a vocabulary."""
    names = "vocab", "common", "feature_absorption"
    modules = [importlib.import_module(f"sae_bench.evals.absorption.{name}") for name in names]
    all_words = modules[0].get_alpha_tokens

    def some_words(tokenizer):
        words = pandas.Series(sorted(all_words(tokenizer)))
        return words.groupby(words.str.strip().str[0].str.lower()).head(WORDS).tolist()

    for module in modules:
        module.get_alpha_tokens = some_words


def write_as_bios(folder):
    """The corpus' passages of documentation under labelled/, in the columns of bias_in_bios: five
    packages as five professions, the first two as professor and nurse as well."""
    for split in ("train", "test"):
        table = pandas.read_json(folder / "package" / f"{split}.jsonl", lines=True)
        rows = []
        packages = table.label.value_counts().index
        for number, package in itertools.chain(zip(PROFESSIONS, packages), zip((21, 13), packages)):
            for row in table[table.label == package].itertuples():
                rows.append({"hard_text": row.text, "profession": number,
                             "gender": int(row.group == "plain")})
        write_lines(Path(f"labelled/LabHC/bias_in_bios/{split}.jsonl"), rows)
    write_lines(Path("labelled/settings.json"), [SETTINGS])


def theirs(name, acts, hooked, runs, folder):
    """sae_bench's own call, in `folder`."""
    from sae_bench.evals.absorption import eval_config as absorption_config
    from sae_bench.evals.scr_and_tpp import eval_config as ablation_config
    from sae_bench.evals.sparse_probing import eval_config as probing_config
    common = {"model_name": "toy", "llm_dtype": "float32", "llm_batch_size": 32, **SETTINGS[name]}
    saes = [(run.name, PlainSAE(acts, run)) for run in runs]
    seed_all()
    with ev.local_data(), own_model(hooked):
        if name == "absorption":
            main = importlib.import_module("sae_bench.evals.absorption.main")
            config = absorption_config.AbsorptionEvalConfig(
                precalc_k_sparse_probe_sae_acts=True, **common)
            with absorption_in(folder, main), contextlib.chdir(folder):
                main.run_eval(config, saes, "cpu", str(folder))
            return
        if name == "sparse_probing":
            main = importlib.import_module("sae_bench.evals.sparse_probing.main")
            config = probing_config.SparseProbingEvalConfig(k_values=[1, 2, 5, 20], **common)
        else:
            main = importlib.import_module("sae_bench.evals.scr_and_tpp.main")
            config = ablation_config.ScrAndTppEvalConfig(perform_scr=name == "scr", **common)
        main.run_eval(config, saes, "cpu", str(folder / "out"), artifacts_path=str(folder / "kept"))
    torch.set_grad_enabled(True)


@contextlib.contextmanager
def own_model(hooked):
    """Inside, sae_bench gets `hooked` by any name."""
    import transformer_lens
    kind = transformer_lens.HookedTransformer
    before = kind.from_pretrained_no_processing
    kind.from_pretrained_no_processing = staticmethod(lambda *args, **kwargs: hooked)
    try:
        yield
    finally:
        kind.from_pretrained_no_processing = before


@contextlib.contextmanager
def absorption_in(folder, main):
    """Inside, sae_bench's absorption keeps what it keeps in `folder`, not beside the package."""
    names = "run_k_sparse_probing_experiment", "run_feature_absortion_experiment"
    before = [getattr(main, name) for name in names]
    places = {"experiment_dir": folder / "probing", "probes_dir": folder / "probes"}
    main.run_k_sparse_probing_experiment = functools.partial(before[0], **places)
    main.run_feature_absortion_experiment = functools.partial(
        before[1], experiment_dir=folder / "scores", probes_dir=folder / "probes",
        sparse_probing_experiment_dir=folder / "probing")
    try:
        yield
    finally:
        for name, function in zip(names, before):
            setattr(main, name, function)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acts", default="tiny", help="folder under acts/ (default: tiny)")
    parser.add_argument("--eval", nargs="+", help="which evaluations")
    parser.add_argument("--saes", type=int, default=20, help="how many SAEs")
    parser.add_argument("--alone", action="store_true", help="03_eval.py alone")
    args = parser.parse_args()
    for module in ("absorption", "sparse_probing", "scr_and_tpp", "unlearning"):
        importlib.import_module(f"sae_bench.evals.{module}.main")
    torch.set_num_threads(1)
    acts = Acts(Path("acts").resolve() / args.acts)
    for key in ("path", "name"):
        entry = acts.meta["model" if key == "path" else "data"]
        entry[key] = str(Path(entry[key]).resolve())
    corpus, source = ev.corpus_tasks(acts), acts.folder
    names = args.eval or (("core", *NAMES[1:], "forget") if args.alone else NAMES)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        shutil.copytree(source, "acts", ignore=shutil.ignore_patterns("eval_cache"))
        acts.folder = Path("acts").resolve()
        if not args.alone:
            write_as_bios(corpus)
            fewer_words()
            acts.meta["data"]["name"] = "none"             # else its own tasks are taken
            acts.meta["model"]["name"] = "toy"             # else it is not asked to spell
            hooked = hooked_llama(acts.meta["model"]["path"])
        ev.corpus_tasks.cache_clear()
        model = ev.LanguageModel(acts, CPU)
        assert model.point and model.tokenizer             # loaded before the clock starts
        runs = [random_run(acts, seed) for seed in range(args.saes)]
        start = time.process_time()
        print(f"CPU seconds; imports and loading {start:.1f}")
        print(f"{'':16}{'1 SAE':>9}{'further':>9}{f'{args.saes} / 1':>9}"
              f"{'sae_bench 1':>13}{'further':>9}{'call / ours':>13}{'further / ours':>16}")
        one, many = start, start
        for name in names:
            first = cpu_seconds(lambda: ours(name, acts, model, runs[:1]))
            rest = cpu_seconds(lambda: ours(name, acts, model, runs[1:]))
            each = rest / (len(runs) - 1)
            one, many = one + first, many + first + rest
            line = f"{name:16}{first:9.2f}{each:9.2f}{(first + rest) / first:9.2f}"
            if not args.alone:
                took = []
                for n in (1, 2):
                    folder = Path(f"theirs-{name}-{n}").resolve()
                    folder.mkdir()
                    took.append(cpu_seconds(lambda: theirs(name, acts, hooked, runs[:n], folder)))
                further = took[1] - took[0]
                line += f"{took[0]:13.2f}{further:9.2f}{took[0] / each:13.1f}{further / each:16.1f}"
            print(line, flush=True)
        print(f"all, with imports: 1 SAE {one:.1f}, {args.saes} {many:.1f}, ratio {many / one:.2f}")


if __name__ == "__main__":
    main()

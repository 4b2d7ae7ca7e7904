"""Switch each mechanism of the variants off in turn and print which test notices. Slow; by hand.

    python tests/mutants.py                     all
    python tests/mutants.py contrastive         those of tests/test_contrastive.py

A mutant is `variant:setting=value` or `variant:-method`, listed as MUTANTS in the test file that
must notice it. A blank in the last column is a mechanism that no test sees.
"""
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def apply(mutant):
    """Change the class as the mutant says."""
    sys.path.insert(0, str(TESTS.parent))
    from sae import load_variant, parse_value
    variant, _, change = mutant.partition(":")
    cls = load_variant(variant)
    if change.startswith("-"):
        delattr(cls, change[1:])
    else:
        name, _, text = change.partition("=")
        setattr(cls, name, parse_value(name, text, getattr(cls, name)))


def noticed_by(mutant, file):
    """The first test of `file` that fails under `mutant`, or ''; those of its row come first."""
    row = re.sub(r".*_(r\d+)$", r"_\1_", mutant.partition(":")[0])
    return first_failure(mutant, file, row) or first_failure(mutant, file, f"not {row}")


def first_failure(mutant, file, which):
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(file),
               "-k", which]
    environment = {**os.environ, "MUTANT": mutant}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", run.stdout, re.MULTILINE)
    return failed[1] if failed else ""


def main():
    wanted = sys.argv[1:] or [""]
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    blanks = 0
    for file in sorted(TESTS.glob("test_*.py")):
        if not any(word in file.stem for word in wanted) or "MUTANTS" not in file.read_text():
            continue
        for mutant in importlib.import_module(file.stem).MUTANTS:
            test = noticed_by(mutant, file)
            blanks += not test
            print(f"| {mutant} | {test} |", flush=True)
    return blanks


if __name__ == "__main__":
    sys.exit(main())

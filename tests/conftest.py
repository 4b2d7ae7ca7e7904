import os
import signal
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before Triton is loaded: kernels run on the CPU, see test_kernels.py

sys.path.insert(0, str(Path(__file__).parent.parent))
import sae  # noqa: E402
import toys  # noqa: E402

sae.SPARSE_BELOW = float(os.environ.get("SPARSE_BELOW", sae.SPARSE_BELOW))     # 1: toys take the sparse path too, see test_sparse.py

torch.use_deterministic_algorithms(True)        # as 02_train.py does on a CPU
torch.set_num_threads(1)                        # bits depend on it, and toys are faster so


@pytest.fixture(autouse=True)
def own_signals():
    """pytest's Ctrl-C is as before after a test that called a script in this process."""
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    yield
    for sign, handler in before.items():
        signal.signal(sign, handler)


FIGURES = pytest.StashKey()                     # what tests counted, printed at the end


@pytest.fixture
def tell(request):
    """tell(line): a figure for the end of the run."""
    return request.config.stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(FIGURES, []):
        terminalreporter.write_line(f"reliability: {line}")


def pytest_addoption(parser):
    parser.addoption("--seeds", type=int, help="of the tests of what variants do (default: 3; 6 under -m slow, which runs them too)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run with -m slow")
    config.addinivalue_line("markers", "gpu: of a GPU, or of a pretended one where there is none")
    config.long = "slow" in config.option.markexpr and "not slow" not in config.option.markexpr
    toys.SEEDS = tuple(range(config.getoption("--seeds") or (6 if config.long else len(toys.SEEDS))))


@pytest.hookimpl(tryfirst=True)                 # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Slow tests run when asked for by -m, and with them, on more seeds, the tests of what variants do."""
    for item in items:
        if config.long and hasattr(item.module, "SEEDS"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:        # not keywords: they hold folder names too
            item.add_marker(pytest.mark.skip(reason="run with -m slow"))

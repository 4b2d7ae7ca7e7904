import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import mutants  # noqa: E402

if os.environ.get("MUTANT"):
    mutants.apply(os.environ["MUTANT"])

torch.set_deterministic_debug_mode("error")      # as 02_train.py does on a CPU
torch.set_num_threads(1)                        # bits depend on it, and toys are faster so


@pytest.fixture(autouse=True)
def own_process():
    """Ctrl-C and torch's determinism and threads are as before after a script in this process."""
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    yield
    for sign, handler in before.items():
        signal.signal(sign, handler)
    torch.set_deterministic_debug_mode("error")
    torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    config.addinivalue_line("markers", "gpu: needs a GPU; run with -m gpu")


@pytest.hookimpl(tryfirst=True)                 # before -m chooses
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))

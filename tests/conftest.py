"""Let the tests import our files, from wherever pytest is started."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    torch.set_num_threads(1)  # networks this small take ten times as long on two threads of a machine that is busy
    config.addinivalue_line("markers", "slow: takes seconds, or minutes; leave it out with -m 'not slow'")
    # torch.func.jvp loads its own rules through torch.jit.script, which torch itself has deprecated
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def plain_blocks(monkeypatch):
    """A main with --compile or --checkpointing turns a switch of all DiTs; the next test finds it off."""
    for switch in ("checkpointing", "compiling"):
        monkeypatch.setattr("models.DiT." + switch, False)


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items):
    """Slow is also what needs the classifier of glyphs by its full recipe, 20 s of training, or torch.compile."""
    for item in items:
        if "recipe" in getattr(item, "fixturenames", ()) or "--compile]" in item.name:
            item.add_marker(pytest.mark.slow)

"""Let the tests import our files, from wherever pytest is started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than ten seconds; leave it out with -m 'not slow'")
    # torch.func.jvp loads its own rules through torch.jit.script, which torch itself has deprecated
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script. is deprecated:DeprecationWarning")

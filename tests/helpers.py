"""Weights and inputs that anyone can make again, so that a network can be checked without a download.

The numbers in the tests are what the official code answered (facebookresearch/DiT, willisma/SiT, diffusers) after its
networks had been filled by this same rule.
"""

import os
import re
import signal
import subprocess
import sys
import time
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from models import DiT, Teacher

ROOT = Path(__file__).resolve().parent.parent


def wave(*shape, phase=0, freq=0.37):
    """sin(freq * i + phase), i = flat index: a float32 tensor of this shape, computed in float64."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(freq * i + phase).reshape(shape).float()


@torch.no_grad()
def fill(module):
    """Overwrite all weights of a module by a fixed rule, put it in eval mode and return it.

    For the k-th name of sorted(state_dict): w_i = s * sin(0.7 i + k), s = 0.3 for embedders and adaLN, else 0.05.
    running_var becomes 1 + 0.5 * sin(0.7 i + k), a norm's gain 1 + w; pos_embed and integer entries stay.
    """
    state = module.state_dict()
    for k, name in enumerate(sorted(state)):
        entry = state[name]
        if name.endswith("pos_embed") or not entry.is_floating_point():
            continue
        wave_k = torch.sin(0.7 * torch.arange(entry.numel(), dtype=torch.float64) + k).reshape(entry.shape)
        if name.endswith("running_var"):
            values = 1 + 0.5 * wave_k
        else:
            values = (0.3 if "embedder" in name or "adaLN" in name else 0.05) * wave_k
            if name.endswith("weight") and entry.ndim == 1:
                values = 1 + values
        entry.copy_(values)  # state_dict shares memory with the module
    return module.eval()


def tiny_teacher(seed=0, two_times=False):
    """A DiT for images (B, 1, 8, 8) of 3 classes in its wrapper, with random weights in the place of DiT's zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DiT(8, 4, 1, 16, 2, 2, num_classes=3, two_times=two_times)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.15)
    return Teacher(net)


def without_times(rows):
    """Rows of metrics without what no two runs share: how long a step took."""
    return [{key: value for key, value in row.items() if key != "seconds_per_step"} for row in rows]


@contextmanager
def within(seconds=5, megabytes=64):
    """Inside, more address space than so much beyond the present one is refused, and more time raises an error.

    A loader may take either for damage: at the end, time is looked at once more; of memory, see `short_of_memory`."""
    resource, begun = pytest.importorskip("resource"), time.monotonic()

    def late(number, frame=None):
        raise TimeoutError(f"not done after {seconds} s")

    limit, alarm = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (megabytes << 20), limit[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        if time.monotonic() - begun > seconds:
            late(None)


def short_of_memory(error):
    """Whether a loader refused a file because `within` refused it memory."""
    return re.search("MemoryError|allocate", str(error)) is not None


SAVE_EACH_STEP = """
import os, signal, sys
import data, {script}
data.Keep.EVERY = 0
save, stage, last = data.Keep.save, sys.argv[1], int(sys.argv[2])
def save_and_die(keep, parts, steps, rows):
    save(keep, parts, steps, rows)
    print("saved", keep.path.stem, steps, flush=True)
    if (keep.path.stem, steps) == (stage, last):
        os.kill(os.getpid(), {signal})
data.Keep.save = save_and_die
{script}.main(sys.argv[3:])
"""


def run_saving(script, *arguments, die=("", 0)):
    """A script's main in a process of its own, which saves at each step and is SIGKILLed after `die` = (stage, steps).

    Returns the first thing that it saved, "stage steps": where it went on.
    """
    code = SAVE_EACH_STEP.format(script=script, signal=int(signal.SIGKILL))
    process = subprocess.run([sys.executable, "-c", code, *map(str, [*die, *arguments])], cwd=ROOT, text=True,
                             capture_output=True, timeout=900)  # fmt: skip
    assert process.returncode == (-signal.SIGKILL if die[0] else 0), process.stderr
    saved = [line.removeprefix("saved ") for line in process.stdout.splitlines() if line.startswith("saved ")]
    return saved[0] if saved else None


def broken(module, *replacements):
    """A copy of one of our modules with (old, new) replaced in its source: what a test must be able to catch.

    Every `old` has to stand in the source exactly once, so that a mutation can't silently stop mutating: a LookupError
    is no error that tests expect of broken code.
    """
    source = Path(module.__file__).read_text()
    for old, new in replacements:
        if source.count(old) != 1:
            raise LookupError(f"{old!r} stands {source.count(old)} times in {module.__file__}")
        source = source.replace(old, new)
    copy = types.ModuleType(module.__name__)
    exec(compile(source, f"broken {module.__name__}", "exec"), copy.__dict__)
    return copy

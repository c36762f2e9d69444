"""Weights, inputs, a known density and broken copies of our files: what the tests share."""

import contextlib
import io
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models import DiT, Velocity

ROOT = Path(__file__).resolve().parent.parent


def wave(*shape, phase=0, freq=0.37):
    """sin(freq * i + phase), i = flat index: a float32 tensor of this shape, computed in float64."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(freq * i + phase).reshape(shape).float()


@torch.no_grad()
def fill(module):
    """Overwrite all weights of a module by a fixed rule, put it in eval mode and return it.

    For the k-th name of sorted(state_dict): w_i = s * sin(0.7 i + k), s = 0.3 for embedders and adaLN, else 0.05.
    running_var becomes 1 + 0.5 * sin(0.7 i + k), a norm's gain 1 + w; pos_embed and integer entries stay. The numbers
    in the tests are what official networks answered after they had been filled by this same rule.
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


def seeded(build, seed=0):
    """build() with torch's global random numbers at a seed, and left as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def tiny_teacher(seed=0, two_times=False):
    """A DiT for images (B, 1, 8, 8) of 3 classes in its wrapper, with random weights in the place of DiT's zeros."""
    net = DiT(8, 4, 1, 16, 2, 2, num_classes=3, two_times=two_times)
    for k, parameter in enumerate(net.parameters()):
        nn.init.normal_(parameter, std=0.15, generator=torch.Generator().manual_seed(1000 * seed + k))
    return Velocity(net)


class GaussianMixture:
    """Equal-weight round Gaussians N(mean_k, std^2): a density whose velocity and p_t are known exactly.

    means (K, D), std a number. Along x_t = (1 - t) x_0 + t eps the density stays a mixture, of N((1 - t) mean_k, s^2)
    with s^2 = (1 - t)^2 std^2 + t^2, and within one component everything is linear in x_t (Gaussian conditioning).
    """

    def __init__(self, means, std):
        self.means, self.std = torch.as_tensor(means, dtype=torch.float64), std

    def draw(self, n, generator):
        """n points (n, D), in float32."""
        k = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[k].float() + self.std * torch.randn(n, self.means.shape[1], generator=generator)

    def conditioning(self, x_t, t):
        """For each component: x_t's distance from its centre (B, K, D), s^2 (B, 1, 1), its log-weight (B, K)."""
        off = x_t[:, None, :] - (1 - t[:, None, None]) * self.means.to(x_t)
        s2 = (1 - t[:, None, None]) ** 2 * self.std**2 + t[:, None, None] ** 2
        return off, s2, -off.square().sum(2) / (2 * s2[:, :, 0])

    def velocity(self, x_t, *, t, y=None):
        """v(x_t, t) = E[eps - x_0 | x_t]: (B, D)."""
        off, s2, logits = self.conditioning(x_t, t)
        t = t[:, None, None]
        # in component k: E[eps | x_t] = t/s^2 off,  E[x_0 | x_t] = mean_k + (1 - t) std^2/s^2 off
        v = (t - (1 - t) * self.std**2) / s2 * off - self.means.to(x_t)  # (B, K, D)
        return (torch.softmax(logits, dim=1)[:, :, None] * v).sum(dim=1)


def broken(module, *replacements):
    """A copy of one of our modules with (old, new) replaced in its source: what a test must be able to catch.

    Every `old` has to stand in the source exactly once, so that a mutation can't silently stop mutating: a LookupError
    is no error that tests expect of broken code.
    """
    source = Path(module.__file__).read_text()
    for old, new in replacements:
        if source.count(old) != 1:
            raise LookupError(f"{old!r} stands {source.count(old)} times in {Path(module.__file__).name}")
        source = source.replace(old, new)
    copy = types.ModuleType(module.__name__)
    exec(compile(source, f"broken {module.__name__}", "exec"), copy.__dict__)
    return copy


def pictures(root, classes, end="jpg"):
    """A folder root/<class>/<i>.<end> of random blocks, {class: number of images}, from 20 to 36 px. -> root"""
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            blocks = np.random.default_rng([i, *name.encode()]).integers(0, 256, (5, 5 + i % 5, 3), np.uint8)
            Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)).save(root / name / f"{i}.{end}")
    return root


def files(folder):
    """{path: bytes} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(module, *arguments):
    """What a script's main says as it stops with a code other than 0. A traceback would be another exception."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(said):
        module.main([str(argument) for argument in arguments])
    assert stop.value.code
    return f"{said.getvalue()}{stop.value}"

"""Everything that is drawn, read or written: 2D densities, randomness, and the run folder.

Densities come as a `Density`: how to draw points, and which part of the support a point lies in, so that a sample can be
judged without a distance to tune. Randomness is a function of (seed, stream, step), never of history: the same step of
the same run draws the same numbers, whatever ran before it. A run folder holds all that a run leaves behind.
"""

import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Randomness
# ---------------------------------------------------------------------------------------------------------------------


def rng(seed, stream, step=0, device="cpu"):
    """A torch.Generator for one step of one stream of one run: seed and step are integers, stream any string."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# 2D densities
# ---------------------------------------------------------------------------------------------------------------------


class Density(NamedTuple):
    """A distribution of points in the plane, about [-2, 2]^2.

    draw(n, generator) -> (n, 2). part(x (n, 2)) -> (n,) integers: the part of the support that holds the point,
    -1 outside. parts: how many there are, each with the same share of the data.
    """

    draw: Callable
    part: Callable
    parts: int


def _uniform(n, generator, columns=1):
    return torch.rand(n, columns, generator=generator, device=generator.device)


def _normal(n, generator, columns=2):
    return torch.randn(n, columns, generator=generator, device=generator.device)


def _pick(n, count, generator):
    return torch.randint(count, (n,), generator=generator, device=generator.device)


def _checkerboard():
    """The 8 squares of a 4 x 4 board on [-2, 2]^2 whose row + column is even; uniform in each, nothing between."""

    def draw(n, generator):
        square = _pick(n, 8, generator)
        row = square // 2
        column = 2 * (square % 2) + row % 2
        return torch.stack([column, row], dim=1) + _uniform(n, generator, 2) - 2

    def part(x):
        column, row = torch.floor(x + 2).long().unbind(1)
        on_board = (column >= 0) & (column < 4) & (row >= 0) & (row < 4) & ((row + column) % 2 == 0)
        return torch.where(on_board, 2 * row + column // 2, -1)

    return Density(draw, part, 8)


def _rings(radii=(0.6, 1.2, 1.8), width=0.05):
    """Three circles, blurred by a Gaussian across; inside means within three widths of one of them."""

    def draw(n, generator):
        radius = torch.tensor(radii, device=generator.device)[_pick(n, len(radii), generator)]
        radius = radius + width * _normal(n, generator, 1)[:, 0]
        angle = 2 * math.pi * _uniform(n, generator)[:, 0]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)

    def part(x):
        off = (x.norm(dim=1, keepdim=True) - x.new_tensor(radii)).abs()  # (n, rings)
        distance, ring = off.min(dim=1)
        return torch.where(distance < 3 * width, ring, -1)

    return Density(draw, part, len(radii))


def _spirals(turns=1.25, width=0.05):
    """Two arms, radius = 2 angle / (2 pi turns), blurred by a Gaussian; inside means within three widths of an arm."""
    last = 2 * math.pi * turns

    def arm(angle):  # (n,) -> (n, 2)
        return 2 / last * angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)

    def draw(n, generator):
        angle = last * _uniform(n, generator)[:, 0].sqrt()  # the square root spreads the points evenly along the arm
        side = 1 - 2 * _pick(n, 2, generator)[:, None]
        return side * arm(angle) + width * _normal(n, generator)

    def part(x):
        curve = arm(torch.linspace(0, last, 512, device=x.device, dtype=x.dtype))
        distance = torch.stack([torch.cdist(side * x, curve).min(dim=1).values for side in (1, -1)], dim=1)
        nearest, side = distance.min(dim=1)
        return torch.where(nearest < 3 * width, side, -1)

    return Density(draw, part, 2)


class GaussianMixture:
    """Equal-weight round Gaussians N(mean_k, std^2): the one density here whose v, score and p_t are known exactly.

    means (K, D), std a number. Along x_t = (1 - t) x_0 + t eps the density stays a mixture, of N((1 - t) mean_k, s^2) with
    s^2 = (1 - t)^2 std^2 + t^2, and within one component everything is linear in x_t (Gaussian conditioning).
    The tests use it as their oracle.
    """

    def __init__(self, means, std):
        self.means, self.std = torch.as_tensor(means), std

    def draw(self, n, generator):
        """n points (n, D)."""
        means = self.means.to(generator.device)
        return means[_pick(n, len(means), generator)] + self.std * _normal(n, generator, means.shape[1])

    def part(self, x):
        """The component within three standard deviations of a point x (n, D), or -1: (n,)."""
        distance, component = torch.cdist(x, self.means.to(x)).min(dim=1)
        return torch.where(distance < 3 * self.std, component, -1)

    def _conditioning(self, x_t, t):
        t = t[:, None, None]
        off = x_t[:, None, :] - (1 - t) * self.means.to(x_t)  # (B, K, D), from each component's centre
        s2 = (1 - t) ** 2 * self.std**2 + t**2  # (B, 1, 1)
        logits = -off.square().sum(2) / (2 * s2[:, :, 0])  # (B, K)
        return t, off, s2, logits

    def log_density(self, x_t, *, t):
        """log p_t(x_t): (B,), for x_t (B, D) and t (B,) in [0, 1]."""
        _, off, s2, logits = self._conditioning(x_t, t)
        K, D = off.shape[1:]
        return torch.logsumexp(logits, dim=1) - math.log(K) - D / 2 * torch.log(2 * math.pi * s2[:, 0, 0])

    def score(self, x_t, *, t):
        """The gradient of log p_t at x_t: (B, D)."""
        _, off, s2, logits = self._conditioning(x_t, t)
        return (torch.softmax(logits, dim=1)[:, :, None] * -off / s2).sum(dim=1)

    def velocity(self, x_t, *, t):
        """v(x_t, t) = E[eps - x_0 | x_t]: (B, D)."""
        t, off, s2, logits = self._conditioning(x_t, t)
        # in component k: E[eps | x_t] = t/s^2 off,  E[x_0 | x_t] = mean_k + (1 - t) std^2/s^2 off
        v = (t - (1 - t) * self.std**2) / s2 * off - self.means.to(x_t)  # (B, K, D)
        return (torch.softmax(logits, dim=1)[:, :, None] * v).sum(dim=1)


def _mixture():
    """Eight Gaussians on a circle of radius 1.6, standard deviation 0.15."""
    angle = 2 * math.pi * torch.arange(8) / 8
    mixture = GaussianMixture(1.6 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.15)
    return Density(mixture.draw, mixture.part, 8)


DENSITIES = {"checkerboard": _checkerboard, "spirals": _spirals, "rings": _rings, "mixture": _mixture}


# ---------------------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------------------


def progress(items, label):
    """A tqdm bar over `items`, gone when done; a plain line now and then where nobody looks at a terminal."""
    return tqdm(items, desc=label, leave=False, mininterval=0.2 if sys.stderr.isatty() else 30)


class UserError(ValueError):
    """A mistake that its reader can mend: one sentence with the value and the remedy. Scripts print it and exit with 2."""


def write_whole(path, write):
    """Call write(file) on a file beside `path`, flush it to the disk, then rename: `path` is old or new, never half."""
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


class RunFolder:
    """runs/<name>/: config.json, metrics.csv, results.json, pictures, and one checkpoint for each finished stage.

    Made, with its parents, if it is not there. Raises UserError if the path is a file or can't be written, if the folder
    holds something that is no run, or a run of another configuration: nothing is overwritten.
    """

    def __init__(self, path, config):
        self.path = Path(path)
        config = json.loads(json.dumps(config))  # as it will be read back: tuples become lists
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"can't make the run folder {self.path} ({error.strerror}): name another with --out") from None
        there = self.path / "config.json"
        if there.exists():
            try:
                old = json.loads(there.read_text())
            except (OSError, ValueError):
                raise UserError(f"{there} can't be read: name another folder with --out, or remove this one") from None
            changed = [key for key in sorted(old.keys() | config.keys()) if old.get(key) != config.get(key)]
            if changed:
                was = ", ".join(f"{key} = {old.get(key)!r} there and {config.get(key)!r} now" for key in changed)
                raise UserError(f"{self.path} holds a run of another configuration ({was}): name another folder with --out")
        elif any(self.path.iterdir()):
            raise UserError(f"{self.path} is no run folder, but it is not empty: name another folder with --out")
        try:
            write_whole(there, lambda file: file.write(json.dumps(config, indent=1).encode()))
        except OSError as error:
            raise UserError(f"can't write to the run folder {self.path} ({error.strerror}): name another with --out") from None

    def read(self, path):
        """A stage's dict, or None with a warning where the file is damaged."""
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:  # torch has no one type for "this file is damaged"
            print(f"warning: {path} can't be read ({type(error).__name__}): its stage will be computed again")

    def stage(self, name, compute):
        """The dict that compute() returns, from <name>.pt if an earlier run finished this stage, else computed and saved.

        The dict holds tensors, numbers, strings and containers of them: it is read back with weights_only=True.
        """
        path = self.path / f"{name}.pt"
        state = self.read(path) if path.exists() else None
        if state is None:
            state = {**compute(), "finished": time.time()}
            write_whole(path, lambda file: torch.save(state, file))
        return state

    def stages(self):
        """{name: dict} of all finished stages, in the order in which they were finished."""
        states = {path.stem: self.read(path) for path in self.path.glob("*.pt")}
        whole = {name: state for name, state in states.items() if state is not None}
        return dict(sorted(whole.items(), key=lambda item: item[1]["finished"]))

    def write_metrics(self, rows):
        """All rows (dicts) to metrics.csv; a column for every key, empty where a row does not have it."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(columns)] + [",".join(str(row.get(key, "")) for key in columns) for row in rows]
        write_whole(self.path / "metrics.csv", lambda file: file.write("\n".join(lines).encode() + b"\n"))

    def write_results(self, rows):
        """All rows (dicts) to results.json."""
        write_whole(self.path / "results.json", lambda file: file.write(json.dumps(rows, indent=1).encode() + b"\n"))

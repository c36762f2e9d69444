"""toy2d.py: densities, the distance, the two other roads of the unified view, and the script as a person runs it."""

import builtins
import json
import shutil
import signal
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from helpers import broken
from PIL import Image
from scipy.special import betainc
from test_meanflow import GaussianFlow
from test_propositions import check_consistency_gradient, check_progressive, gaussian_exact
from test_runs import end, start  # noqa: F401  start is a fixture

import toy2d
from data import rng

FEW = dict(teacher_steps=25, td_steps=25, refine_steps=25, samples=200, ode_steps=2)  # instead of QUICK

# --- Densities and distance ------------------------------------------------------------------------------------------


def check_density(name, m=toy2d):
    """Draws are inside (three BLURs of a curve hold 0.989 of them), in equal shares; most of the plane is not."""
    draw, part_of, parts = m.DENSITIES[name]
    x = draw(8000, rng(0, "x"))
    part = part_of(x)
    assert x.shape == (8000, 2) and x.dtype == torch.float32 and torch.equal(x, draw(8000, rng(0, "x")))
    assert (part >= 0).float().mean() >= (1 if name == "checkerboard" else 0.985)
    shares = torch.bincount(part[part >= 0], minlength=parts) / 8000
    assert len(shares) == parts and (shares - 1 / parts).abs().max() < 0.02
    plane = 6 * torch.rand(8000, 2, generator=rng(0, "plane")) - 3
    assert (part_of(plane) == -1).float().mean() > 0.7
    assert (part_of(torch.tensor([[9.0, 9.0], [-9.0, 0.5]])) == -1).all()


@pytest.mark.parametrize("name", toy2d.DENSITIES)
def test_a_density_fills_its_parts_evenly(name):
    check_density(name)


def check_sliced_w2(m=toy2d):
    """A shift s moves a projection by s . direction, of mean square |s|^2/2; a Gaussian of std (a, b), and turned by 90
    degrees, has projections of std |(a cos, b sin)| and |(b cos, a sin)|, whose distance is that of their std."""
    x = torch.randn(6000, 2, generator=rng(0, "x"))
    distance = lambda a, b: m.sliced_w2(m.sorted_projections(a), m.sorted_projections(b))  # noqa: E731
    assert distance(x, x) == 0 and distance(x, x[torch.randperm(len(x), generator=rng(0))]) < 1e-6
    assert distance(x, x + torch.tensor([0.3, 0.4])) == pytest.approx(0.5 / 2**0.5, rel=1e-3)
    a, b, angle = 2.0, 0.5, np.pi * (np.arange(1000) + 0.5) / 1000
    one, other = (np.hypot(p * np.cos(angle), q * np.sin(angle)) for p, q in ((a, b), (b, a)))
    expected = ((one - other) ** 2).mean() ** 0.5
    wide = x * torch.tensor([a, b])
    assert distance(wide, wide.flip(1)) == pytest.approx(expected, rel=0.03)


def test_sliced_w2():
    check_sliced_w2()


def test_measures_of_known_samples():
    """The data itself, the data a square to the right, and one point alone."""
    x = toy2d.DENSITIES["checkerboard"][0](4000, rng(0, "judge data"))
    own, off, one = (toy2d.measure(y, "checkerboard", x) for y in (x, x + torch.tensor([1.0, 0]), 0 * x - 1.5))
    assert (own["share_inside"], own["sliced_w2"], own["replay_error"]) == (1, 0, 0)
    assert (off["share_inside"], off["largest_part"]) == (0, 0) and off["replay_error"] == pytest.approx(1, rel=1e-4)
    assert (one["smallest_part"], one["largest_part"]) == (0, 1)


# --- The roads -------------------------------------------------------------------------------------------------------


def check_consistency(m=toy2d):
    """MeanFlow's gradient at r = 0; err is the squared norm of df/dt, which is none on the exact answer."""
    check_consistency_gradient(lambda u, x, v, *, t: m.consistency_loss(
        lambda x, *, t: u(x, t=t, r=0 * t), x, v, t=t, p=0.0)[0])  # fmt: skip
    flow, t = GaussianFlow(), torch.linspace(0.05, 1, 9, dtype=torch.float64)
    x = torch.randn(9, 3, generator=rng(0, "x"), dtype=torch.float64)
    exact = lambda x, *, t: flow.average_velocity(x, t=t, r=0 * t)  # noqa: E731
    assert m.consistency_loss(exact, x, flow.velocity(x, t=t), t=t)[1].max() < 1e-20


def check_rounds(m=toy2d):
    """Exact rounds of progressive distillation converge to the flow's average velocity, at first order."""
    check_progressive(m.progressive_target, GaussianFlow().velocity, gaussian_exact)


def test_told_apart(capsys):
    """Welch's p by hand: (1, 2, 3) and (2, 4, 6) have t^2 = 12/5 and 50/17 degrees of freedom."""
    rows = [{"name": name, "x": k * step} for k in (1, 2, 3) for name, step in (("a", 1.0), ("b", 2.0), ("c", 9.0))]
    toy2d.told_apart("now", rows, "a", "b", ["x"])
    toy2d.told_apart("now", rows[:3], "a", "b", ["x"])  # of one seed there is nothing to tell
    said = capsys.readouterr().out.splitlines()
    p = betainc(25 / 17, 0.5, 50 / 17 / (50 / 17 + 12 / 5))  # the tails of Student's distribution
    assert len(said) == 1 and float(said[0].split("p = ")[1]) == pytest.approx(p, abs=6e-4)


def test_the_two_other_roads():
    check_consistency()
    check_rounds()


@pytest.mark.parametrize("check, old, new", [
    (check_consistency, "(v - u - expand_times(t, x_t) * du_dt)", "(v - u + expand_times(t, x_t) * du_dt)"),
    (check_consistency, "(f - df_dt).detach()", "(f + df_dt).detach()"),
    (check_consistency, ".sum(dim=1) / t\n", ".sum(dim=1)\n"),
    (check_rounds, "(v_first + v_second) / 2", "v_second"),
    (check_rounds, "x_t - h * v_first, t=t - h", "x_t - h * v_first, t=t"),
    (check_sliced_w2, "np.sort(projected.numpy(), axis=1)", "projected.numpy()"),
    (check_sliced_w2, "angle = math.pi *", "angle = math.pi / 2 *"),
    (partial(check_density, "checkerboard"), "(row + column) % 2 == 0", "(row + column) % 2 == 1"),
    (partial(check_density, "spirals"), "distance < 3 * BLUR", "distance < 30 * BLUR")])  # fmt: skip
def test_a_broken_copy_is_caught(check, old, new):
    with pytest.raises(AssertionError):
        check(m=broken(toy2d, (old, new)))


# --- The script ------------------------------------------------------------------------------------------------------


def in_one_process(arguments, put=partial(setattr, toy2d)):
    """The script with few steps, on small batches, its jobs one after the other."""
    put("QUICK", FEW)
    put("draw", lambda data, batch, generator: (toy2d.DENSITIES[data][0](16, generator), None))
    put("processes", lambda: nullcontext(builtins))  # whose map runs the jobs here
    toy2d.main(arguments)


@pytest.mark.slow
def test_the_story_killed_or_not(start, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Pictures, and a row for each training; the same command again only draws, or goes on where it was killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    in_one_process(["--quick", "--out", str(whole)], put=partial(monkeypatch.setattr, toy2d))
    rows = json.loads((whole / "results.json").read_text())
    before = {path: path.read_bytes() for path in whole.glob("*.pt")}
    kinds = [row["what"] for row in rows]
    assert kinds.count("TD") == len(toy2d.WIDTHS) and len(rows) >= 14 and all(row["seed"] == 0 for row in rows)
    assert {"teacher", "HD: TD + DMD + AWD", "TD + DMD", "DMD, no TD", "DMD + AWD, no TD"} < set(kinds)
    assert all(np.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))
    said = capsys.readouterr().out
    assert all(word in said for word in (str(whole), *kinds))
    equal = ("TD", "TD + DMD", "HD: TD + DMD + AWD", "DMD, no TD", "DMD + AWD, no TD")
    assert {row["updates"] for row in rows if row["what"] in equal} == {50}
    for name in ("story.png", "bottleneck.png", "start.png", "toy.gif"):
        assert len(np.unique(Image.open(whole / name).convert("L"))) > 20
    shutil.copytree(whole, killed)
    toy2d.main(["--quick", "--out", str(whole)])
    assert json.loads((whole / "results.json").read_text()) == rows
    assert {path: path.read_bytes() for path in before} == before
    (killed / "seed0-hd.pt").unlink()
    (killed / "seed0-td-start.pt").unlink()
    for die_at, name in ((18, "td-start"), (40, "hd")):
        end(start(in_one_process, "--quick", "--out", killed, die_at=die_at), -signal.SIGKILL)
        assert 0 < torch.load(killed / f"seed0-{name}.pt")["step"] < 25
    end(start(in_one_process, "--quick", "--out", killed))
    assert json.loads((killed / "results.json").read_text()) == rows


@pytest.mark.slow
def test_unify_measures_three_roads_in_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(toy2d, "QUICK", FEW | dict(teacher_steps=6, td_steps=6, refine_steps=6))
    toy2d.main(["--unify", "--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "unified.json").read_text())
    assert [row["what"] for row in rows] == ["teacher", *3 * ["MeanFlow", "consistency", "progressive"]]
    assert len({row["updates"] for row in rows[1:]}) == 1 and all(0 < row["replay_error"] < 1e4 for row in rows[1:])
    assert (tmp_path / "unified.png").exists()

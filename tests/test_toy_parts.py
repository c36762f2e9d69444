"""The parts of the toy: its network, densities, measures, randomness and run folder."""

import csv
import json
import math
import os

import pytest
import torch
from helpers import broken

import data
import models
import toy2d
from data import DENSITIES, BadInput, GaussianMixture, RunFolder, rng
from models import (VelocityMLP, add_noise, eps_from_velocity, frozen_copy, score_from_velocity, update_ema,
                    x0_from_velocity)

# ---------------------------------------------------------------------------------------------------------------------
# Network and conversions
# ---------------------------------------------------------------------------------------------------------------------


def test_a_student_with_its_teachers_weights_is_its_teacher():
    teacher, student = VelocityMLP(2, 16, 3), VelocityMLP(2, 16, 3, two_times=True)
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    x_t = torch.randn(32, 2, generator=rng(0, "x"))
    r, t = torch.rand(32, 2, generator=rng(0, "t")).sort(dim=1).values.T
    assert torch.equal(student(x_t, t=t, r=r), teacher(x_t, t=t))
    torch.nn.init.normal_(student.embed_duration.weight)
    assert torch.equal(student(x_t, t=t, r=t), teacher(x_t, t=t))  # at r = t it stays so, whatever is learned
    assert (student(x_t, t=t, r=r) - teacher(x_t, t=t)).abs().max() > 0.1
    module = broken(models, ("self.embed_duration(duration - none)", "self.embed_duration(duration)"))
    other = module.VelocityMLP(2, 16, 3, two_times=True)
    other.load_state_dict(student.state_dict())
    assert not torch.equal(other(x_t, t=t, r=t), teacher(x_t, t=t))


def test_taps_are_one_token_a_layer_and_change_nothing():
    net = VelocityMLP(2, 16, 3)
    x_t, t = torch.randn(5, 2), torch.rand(5)
    v, [tokens] = net(x_t, t=t, taps=(0, 2))
    assert tokens.shape == (5, 2, 16) and torch.equal(v, net(x_t, t=t))
    torch.testing.assert_close(net.out(tokens[:, 1]), v)  # the last hidden layer is what the output reads


def test_times_that_do_not_fit_the_network_are_refused():
    x_t, t = torch.randn(5, 2), torch.rand(5)
    with pytest.raises(ValueError, match="two times"):
        VelocityMLP(2, 8, 1, two_times=True)(x_t, t=t)
    with pytest.raises(ValueError, match="one time"):
        VelocityMLP(2, 8, 1)(x_t, t=t, r=t)


def test_the_conversions_undo_the_path():
    x_0, eps, t = torch.randn(6, 3, 2, 2), torch.randn(6, 3, 2, 2), torch.linspace(0.1, 0.9, 6)
    x_t, v = add_noise(x_0, eps, t), eps - x_0
    torch.testing.assert_close(x0_from_velocity(x_t, t, v), x_0)
    torch.testing.assert_close(eps_from_velocity(x_t, t, v), eps)
    torch.testing.assert_close(score_from_velocity(x_t, t, v), -eps / t[:, None, None, None])


def test_the_average_network_forgets_its_start():
    net = VelocityMLP(2, 4, 1)
    ema = frozen_copy(net)
    torch.nn.init.constant_(net.out.bias, 1.0)
    torch.nn.init.zeros_(ema.out.bias)
    update_ema(ema, net, 0)
    torch.testing.assert_close(ema.out.bias, torch.full((2,), 0.9))  # decay (1 + 0) / (10 + 0)
    update_ema(ema, net, 10**6)
    torch.testing.assert_close(ema.out.bias, torch.full((2,), 0.9 * 0.999 + 0.001))
    assert not any(p.requires_grad for p in ema.parameters())
    with pytest.raises(ValueError, match="embed_duration"):
        update_ema(ema, VelocityMLP(2, 4, 1, two_times=True), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Densities
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_fills_its_parts_evenly(name):
    density = DENSITIES[name]()
    x = density.draw(20_000, rng(0, "x"))
    part = density.part(x)
    assert x.shape == (20_000, 2) and x.dtype == torch.float32 and x.abs().max() < 2.6
    assert (part >= 0).float().mean() > (0.985 if name == "mixture" else 0.99)  # 1 - exp(-9/2) for a round Gaussian
    shares = torch.bincount(part[part >= 0], minlength=density.parts) / 20_000
    assert len(shares) == density.parts and (shares - 1 / density.parts).abs().max() < 0.015
    assert torch.equal(x, density.draw(20_000, rng(0, "x"))) and not torch.equal(x, density.draw(20_000, rng(1, "x")))
    square = 4 * torch.rand(20_000, 2, generator=rng(0, "uniform")) - 2
    assert (density.part(square) >= 0).float().mean() < 0.55  # most of the plane is outside
    assert (density.part(torch.tensor([[9.0, 9.0]])) == -1).all()


def test_the_board():
    x = torch.tensor([[-1.5, -1.5], [-0.5, -1.5], [-0.5, -0.5], [0.5, -1.5], [1.5, 1.5], [2.1, 0.5]])
    assert (DENSITIES["checkerboard"]().part(x) >= 0).tolist() == [True, False, True, True, True, False]


def check_mixture(module):
    """Score and velocity against autograd through log p_t, which is itself checked against a sum of torch's normals."""
    means = torch.tensor([[0.3, -1.0], [1.0, 0.5], [-0.7, 0.2]], dtype=torch.float64)
    mixture = module.GaussianMixture(means, 0.3)
    x_t = torch.randn(40, 2, generator=rng(0, "x"), dtype=torch.float64).requires_grad_(True)
    t = torch.linspace(0.05, 1.0, 40, dtype=torch.float64)
    std = ((1 - t) ** 2 * 0.09 + t**2).sqrt()[:, None, None]
    normal = torch.distributions.Normal((1 - t)[:, None, None] * means, std)
    log_density = torch.logsumexp(normal.log_prob(x_t[:, None]).sum(2), dim=1) - math.log(3)
    torch.testing.assert_close(mixture.log_density(x_t, t=t), log_density)
    (score,) = torch.autograd.grad(log_density.sum(), x_t)
    torch.testing.assert_close(mixture.score(x_t, t=t), score)
    torch.testing.assert_close(score_from_velocity(x_t, t, mixture.velocity(x_t, t=t)), score)


def test_the_mixtures_score_and_velocity_are_exact():
    check_mixture(data)
    for old, new in [("* off - self.means.to(x_t)", "* off + self.means.to(x_t)"),
                     ("(t - (1 - t) * self.std**2) / s2", "(t - self.std**2) / s2")]:  # fmt: skip
        with pytest.raises(AssertionError):
            check_mixture(broken(data, (old, new)))


def test_the_mixtures_velocity_is_the_mean_of_eps_minus_x0():
    """Monte Carlo at one point: keep the pairs (x_0, eps) whose x_t falls close to it."""
    mixture, t = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.5), 0.6
    generator = rng(0, "pairs")
    x_0 = mixture.draw(2_000_000, generator)
    eps = torch.randn(2_000_000, 1, generator=generator)
    x_t = (1 - t) * x_0 + t * eps
    near = (x_t - 0.35).abs() < 0.01
    expected = (eps - x_0)[near].mean().item()
    ours = mixture.velocity(torch.tensor([[0.35]]), t=torch.tensor([t])).item()
    assert ours == pytest.approx(expected, abs=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def test_sliced_w2_of_shifted_and_stretched_points():
    x = torch.randn(5000, 2, generator=rng(0, "x"))
    projections = toy2d.sorted_projections(x)
    assert toy2d.sliced_w2(projections, projections) == 0
    # a shift by s moves every projection by s . direction: the mean square over directions is |s|^2 / 2
    shifted = toy2d.sorted_projections(x + torch.tensor([0.3, 0.4]))
    assert toy2d.sliced_w2(projections, shifted) == pytest.approx(0.5 / math.sqrt(2), rel=1e-3)
    # doubling pairs every point with its double: the mean square of a projection
    doubled = toy2d.sorted_projections(2 * x)
    assert toy2d.sliced_w2(projections, doubled) == pytest.approx(projections.square().mean().sqrt().item(), rel=1e-3)


def test_the_judge_knows_its_data_and_its_teacher():
    judge = toy2d.Judge(DENSITIES["checkerboard"](), 4000, torch.device("cpu"))
    verdict = judge(judge.data, judge.data)
    assert verdict["share_inside"] == 1 and verdict["sliced_w2"] == 0 and verdict["replay_error"] == 0
    off = judge(judge.data + torch.tensor([1.0, 0.0]), judge.data)  # one square to the right: off the board, all of it
    assert off["share_inside"] == 0 and off["largest_part"] == 0 and off["replay_error"] == pytest.approx(1, rel=1e-4)
    one_part = judge.data.clone()
    one_part[:] = torch.tensor([-1.5, -1.5])
    assert (judge(one_part)["smallest_part"], judge(one_part)["largest_part"]) == (0, 1)


def test_sampling_in_blocks_changes_nothing():
    eps = torch.randn(10_000, 2)
    assert torch.equal(toy2d.in_blocks(lambda x: 2 * x, eps), 2 * eps)


# ---------------------------------------------------------------------------------------------------------------------
# Randomness and the run folder
# ---------------------------------------------------------------------------------------------------------------------


def test_randomness_is_a_function_of_seed_stream_and_step():
    def number(*key):
        return torch.rand(1, generator=rng(*key)).item()

    numbers = [number(seed, stream, step) for seed in (0, 1) for stream in ("a", "b") for step in (0, 1)]
    assert len(set(numbers)) == 8 and number(0, "a", 1) == numbers[1]


def test_new_networks_leave_the_global_state_alone():
    before = torch.random.get_rng_state()
    a, b = (toy2d.student_network(3, 8, "cpu") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.out.weight, toy2d.student_network(4, 8, "cpu").out.weight)


def test_a_stage_is_computed_once(tmp_path, capsys):
    run, calls = RunFolder(tmp_path / "run", {"toy": {"a": 1}}), []

    def compute(keep):
        calls.append(1)
        return {"net": {"w": torch.ones(2)}, "number": 0.1 + len(calls)}

    first = run.stage("one", compute)
    again = RunFolder(tmp_path / "run", {"toy": {"a": 1}}).stage("one", compute)
    assert len(calls) == 1 and first["number"] == again["number"] and torch.equal(first["net"]["w"], again["net"]["w"])
    run.stage("two", compute)
    assert list(run.stages()) == ["one", "two"]
    path = tmp_path / "run" / "one.pt"
    path.write_bytes(path.read_bytes()[:100])  # a truncated file is named, and its stage computed again
    assert run.stage("one", compute)["number"] == 3.1
    assert "one.pt is damaged" in capsys.readouterr().out and (tmp_path / "run" / "one.pt.damaged").exists()
    assert not list((tmp_path / "run").glob("*.partial"))


def test_nothing_executable_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    run = RunFolder(tmp_path / "run", {})
    torch.save({"net": Evil()}, tmp_path / "run" / "one.pt")
    assert run.stage("one", lambda keep: {"good": 1})["good"] == 1
    assert not (tmp_path / "evil").exists()


def test_a_file_is_flushed_before_it_takes_the_others_place(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("replace") or replace(a, b))
    data.write_whole(tmp_path / "file", lambda file: file.write(b"new"))
    assert order == ["fsync", "replace"] and (tmp_path / "file").read_bytes() == b"new"


def test_a_spread_is_the_sample_deviation():
    assert toy2d.mean_std([1, 2, 4]) == "2.3333 +- 1.5275" and toy2d.mean_std([1]) == "1.0000"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        data.write_whole(path, fail)
    assert path.read_bytes() == b"old"


def test_the_sizes_of_the_default_plan():
    """At least six sizes, the largest at least 50 times the smallest and 10 times the student of the second stage."""
    plan = toy2d.PLANS["default"]
    sizes = [models.count_parameters(toy2d.student_network(0, width, "cpu")) for width in plan["widths"]]
    hd = models.count_parameters(toy2d.student_network(0, plan["hd_width"], "cpu"))
    assert len(set(sizes)) >= 6 and hd in sizes
    assert max(sizes) >= 50 * min(sizes) and max(sizes) >= 10 * hd


def test_run_folders_that_can_not_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="file .*--out"):
        RunFolder(tmp_path / "file", {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(BadInput, match="no run folder.*--out"):
        RunFolder(tmp_path / "other", {})
    (tmp_path / "list").mkdir()
    for damaged in ("[1, 2]", '{"data": ', '{"data": "rings"}'):
        (tmp_path / "list" / "config.json").write_text(damaged)
        with pytest.raises(BadInput, match="config.json"):
            RunFolder(tmp_path / "list", {})
    config = {"toy": {"data": "rings", "sizes": (1, 2)}, "net": {"width": 8}}
    RunFolder(tmp_path / "run", config)
    RunFolder(tmp_path / "run", config)  # the same again is fine, and so is a part of it
    RunFolder(tmp_path / "run", {"net": {"width": 8}})
    with pytest.raises(BadInput, match=r"\(of toy: data = 'rings' there and 'spirals' now\)"):
        RunFolder(tmp_path / "run", {"toy": {"data": "spirals", "sizes": (1, 2)}})
    with pytest.raises(BadInput, match=r"\(of net: depth = None there and 2 now\)"):
        RunFolder(tmp_path / "run", {"more": {"a": 1}, "net": {"width": 8, "depth": 2}})

    def written():
        """What config.json says, but for its own sha256."""
        told = json.loads((tmp_path / "run" / "config.json").read_text())
        assert told.pop("sha256") == data.sha256_json(told)
        return told

    assert written() == json.loads(json.dumps(config))
    RunFolder(tmp_path / "run", {"more": {"a": 1}})  # a new section joins
    assert written() == json.loads(json.dumps(config | {"more": {"a": 1}}))
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == ["thesis.tex"]

    def refuse(path, write):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data, "write_whole", refuse)
    with pytest.raises(BadInput, match="can't write to .*Permission denied.*--out"):
        RunFolder(tmp_path / "locked", {"toy": {}})


def test_metrics_have_a_column_for_every_key_and_one_row_for_each_step(tmp_path):
    run, path = RunFolder(tmp_path / "run", {}), tmp_path / "run" / "metrics.csv"
    a, b = {"network": "a", "seed": 0, "step": 0}, {"network": "b", "seed": 0, "step": 0}
    run.write_metrics([a | {"loss": 1.5}, a | {"step": 1, "du_dt": 2.0}])
    comment, *lines = path.read_text().splitlines()
    assert comment.startswith("# ") and lines == ["network,seed,step,loss,du_dt", "a,0,0,1.5,", "a,0,1,,2.0"]
    run.write_metrics([b | {"gradient": 3.0}, a | {"seed": 1}])  # another network, another seed: they join
    run.write_metrics([a | {"loss": 0.5}])  # the same again: its rows are replaced, all of them
    comment, *lines = path.read_text().splitlines()
    assert comment.startswith("# ") and len(lines) == 4
    rows = {(row["network"], row["seed"]): row for row in csv.DictReader(lines)}
    assert rows["a", "0"]["loss"] == "0.5" and rows["b", "0"]["gradient"] == "3.0" and rows["a", "1"]["loss"] == ""

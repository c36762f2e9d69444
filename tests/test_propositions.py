"""The paper's unified view: consistency and progressive distillation learn the average velocity too.

Proposition 1: the consistency model's continuous-time condition, df/dt = 0, is the MeanFlow identity at r = 0.
Proposition 2: the student of N progressive halvings is the mean of 2^N teacher velocities along the path, and so
converges to the average velocity, at first order in the step.
"""

import types

import pytest
import torch
from helpers import broken
from test_meanflow import GaussianFlow, network, points

import meanflow_td
import toy2d
from data import rng
from models import VelocityMLP, frozen_copy

# ---------------------------------------------------------------------------------------------------------------------
# Proposition 1
# ---------------------------------------------------------------------------------------------------------------------


def test_the_exact_consistency_function_is_constant_along_the_path():
    flow = GaussianFlow()
    x_t, _, t = points(low=0.05)

    def f(x, time):  # f(x_t, t) = x_t - t u(x_t, 0, t)
        return x - time[:, None] * flow.average_velocity(x, t=time, r=torch.zeros_like(time))

    v = flow.velocity(x_t, t=t)
    _, df_dt = torch.func.jvp(f, (x_t, t), (v, torch.ones_like(t)))
    assert df_dt.abs().max() < 1e-12
    _, elsewhere = torch.func.jvp(f, (x_t, t), (v + 1, torch.ones_like(t)))  # off the path it is not
    assert elsewhere.abs().min() > 1e-3


def test_df_dt_is_the_residual_of_the_identity_at_r_0():
    """df/dt = v - u - t du/dt = u_target - u, for any network: the two conditions are one."""
    net = network()
    x_t, _, t = points(low=0.05)
    v, zero = GaussianFlow().velocity(x_t, t=t), torch.zeros_like(t)

    def f(x, time):
        return x - time[:, None] * net(x, t=time, r=zero)

    _, df_dt = torch.func.jvp(f, (x_t, t), (v, torch.ones_like(t)))
    u_target, _ = meanflow_td.meanflow_target(net, x_t, v, r=zero, t=t)
    torch.testing.assert_close(df_dt, u_target - net(x_t, t=t, r=zero))


def check_consistency_gradient(module):
    """The consistency gradient weighted by 1/t is MeanFlow's at r = 0, parameter by parameter."""
    net = network()
    x_t, _, t = points(low=0.05)
    v, zero = GaussianFlow().velocity(x_t, t=t), torch.zeros_like(t)
    at_zero = lambda x, *, t: net(x, t=t, r=torch.zeros_like(t))  # noqa: E731
    loss, err = module.consistency_loss(at_zero, x_t, v, t=t, p=0.0)
    half, err_meanflow = meanflow_td.meanflow_loss(net, x_t, v, r=zero, t=t, p=0.0)
    torch.testing.assert_close(err, err_meanflow)
    ours = torch.autograd.grad(loss, net.parameters())
    meanflows = torch.autograd.grad(0.5 * half, net.parameters())
    for a, b in zip(ours, meanflows):
        torch.testing.assert_close(a, b)


def test_the_consistency_gradient_over_t_is_meanflows():
    check_consistency_gradient(toy2d)


@pytest.mark.parametrize("old, new", [("(f - df_dt)", "(f + df_dt)"), (".sum(dim=1) / t\n", ".sum(dim=1)\n"),
                                      ("(v - u - expand_times(t, x_t) * du_dt)", "(v - u - du_dt)")])  # fmt: skip
def test_a_broken_consistency_loss_is_caught(old, new):
    with pytest.raises(AssertionError):
        check_consistency_gradient(broken(toy2d, (old, new)))


# ---------------------------------------------------------------------------------------------------------------------
# Proposition 2
# ---------------------------------------------------------------------------------------------------------------------


def halve(module, velocity, rounds):
    """The one-step student after exact progressive distillation of 2^rounds Euler steps: a function of (x_t, t=t)."""
    for k in range(rounds):
        previous, h = velocity, 2.0 ** (k - rounds)
        velocity = lambda x, *, t, v=previous, h=h: module.progressive_target(v, x, t=t, h=h)  # noqa: E731
    return velocity


def check_progressive(module, velocity, exact):
    """Against plain Euler steps, which average their velocities; and against the exact average velocity."""
    eps = torch.randn(32, 3, generator=rng(0, "eps"), dtype=torch.float64)
    one = torch.ones(32, dtype=torch.float64)
    errors = []
    for rounds in (3, 4, 5, 6, 7):
        n = 2**rounds
        x, velocities = eps, []
        for k in range(n):
            velocities.append(velocity(x, t=one * (1 - k / n)))
            x = x - velocities[-1] / n
        student = halve(module, velocity, rounds)(eps, t=one)
        torch.testing.assert_close(student, torch.stack(velocities).mean(dim=0), rtol=1e-9, atol=1e-9)
        errors.append((student - exact(eps)).abs().mean())
    slopes = [torch.log2(a / b).item() for a, b in zip(errors, errors[1:])]
    assert slopes[-1] == pytest.approx(1, abs=0.1), slopes
    return slopes


def gaussian_exact(eps):
    one = torch.ones(len(eps), dtype=torch.float64)
    return GaussianFlow().average_velocity(eps, t=one, r=0 * one)


def test_progressive_distillation_averages_and_converges_at_first_order():
    check_progressive(toy2d, GaussianFlow().velocity, gaussian_exact)


def test_also_for_a_networks_velocity_field():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = VelocityMLP(3, 16, 2).double().requires_grad_(False)
    check_progressive(toy2d, net, lambda eps: eps - meanflow_td.sample_ode(net, eps, steps=2000))


def test_a_round_learns_to_step_twice_as_far_on_its_own_grid():
    net, x_0, eps = VelocityMLP(2, 8, 2), *torch.randn(2, 64, 2, generator=rng(0, "round"))
    previous, seen = VelocityMLP(2, 8, 2).requires_grad_(False), []

    def watched(x_t, *, t):
        seen.append((x_t, t))
        return net(x_t, t=t)

    _, terms = toy2d.progressive_objective(watched, x_0, None, eps, rng(0, "t"), previous=previous, h=1 / 8)
    ((x_t, t),) = seen
    assert set(t.tolist()) == {0.25, 0.5, 0.75, 1.0}
    torch.testing.assert_close(x_t, (1 - t)[:, None] * x_0 + t[:, None] * eps)
    x_mid = x_t - previous(x_t, t=t) / 8
    target = (previous(x_t, t=t) + previous(x_mid, t=t - 1 / 8)) / 2
    torch.testing.assert_close(terms["raw_error"], (net(x_t, t=t) - target).square().sum(1).mean())


def test_rounds_halve_the_steps_and_share_the_updates(monkeypatch):
    rounds, net, teacher = [], VelocityMLP(2, 4, 1), VelocityMLP(2, 4, 1)

    def train(net, draw, objective, *, steps, name):
        rounds.append((objective.keywords["h"], steps, objective.keywords["previous"], frozen_copy(net)))
        return rounds[-1][3], [len(rounds)]

    monkeypatch.setattr(toy2d, "train", train)
    keep = types.SimpleNamespace(restore=lambda parts: (0, []), save=lambda *_: None)
    last, rows = toy2d.distill_progressively(net, None, teacher=teacher, rounds=3, steps=10, name="p", keep=keep)
    assert [h for h, *_ in rounds] == [1 / 8, 1 / 4, 1 / 2] and [steps for _, steps, *_ in rounds] == [3, 3, 4]
    assert [previous for *_, previous, _ in rounds] == [teacher, rounds[0][3], rounds[1][3]]
    assert last is rounds[2][3] and rows == [1, 2, 3]


def test_consistency_distillation_asks_for_the_teachers_velocity_at_a_point_of_the_path(monkeypatch):
    x_0, eps = torch.randn(2, 64, 2, generator=rng(0, "consistency"))
    seen = []
    monkeypatch.setattr(toy2d, "consistency_loss", lambda net, x_t, v, *, t: seen.append((x_t, v, t)) or (v.sum(), v))
    toy2d.consistency_objective(None, x_0, None, eps, rng(0, "t"), teacher=lambda x_t, *, t: 2 * x_t + t[:, None])
    ((x_t, v, t),) = seen
    torch.testing.assert_close(x_t, (1 - t)[:, None] * x_0 + t[:, None] * eps)
    torch.testing.assert_close(v, 2 * x_t + t[:, None])
    assert t.min() < 0.1 and t.max() > 0.9


@pytest.mark.parametrize("old, new", [
    ("velocity(x_t - h * v_first", "velocity(x_t + h * v_first"), ("t=t - h)", "t=t)"),
    ("(v_first + v_second) / 2", "v_second"),
])  # fmt: skip
def test_a_broken_halving_is_caught(old, new):
    with pytest.raises(AssertionError):
        check_progressive(broken(toy2d, (old, new)), GaussianFlow().velocity, gaussian_exact)

"""The paper's unified view: consistency and progressive distillation learn the average velocity too.

MeanFlow's identity holds for the average velocity of a flow without a closed form too, which scipy integrates.
Proposition 1: the consistency model's continuous-time condition, df/dt = 0, is the MeanFlow identity at r = 0.
Proposition 2: the student of N progressive halvings is the mean of 2^N teacher velocities along the path, and so
converges to the average velocity, at first order in the step.
"""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import GaussianMixture, broken, seeded
from scipy.integrate import solve_ivp
from test_meanflow import GaussianFlow, network, points

import meanflow_td
from data import rng
from models import VelocityMLP

MIXTURE = GaussianMixture([[-1.0, 0.3], [1.2, 0.5], [0.1, -1.1]], 0.5)  # its flow has no closed form


def path_end(x_t, *, t, r, steps=25):
    """x_r from x_t along the mixture's flow, by Runge and Kutta's method in torch, so that it can be differentiated."""
    h, x, s = (r - t) / steps, x_t, t
    for _ in range(steps):
        k1 = MIXTURE.velocity(x, t=s)
        k2 = MIXTURE.velocity(x + h[:, None] / 2 * k1, t=s + h / 2)
        k3 = MIXTURE.velocity(x + h[:, None] / 2 * k2, t=s + h / 2)
        k4 = MIXTURE.velocity(x + h[:, None] * k3, t=s + h)
        x, s = x + h[:, None] / 6 * (k1 + 2 * k2 + 2 * k3 + k4), s + h
    return x


def test_path_end_is_scipys():
    """The oracle's own oracle: scipy's solver, to 1e-6."""
    x_t, r, t = points(4, 2)
    ours = path_end(x_t, t=t, r=r)
    for i in range(4):
        field = lambda s, x: MIXTURE.velocity(torch.tensor(x)[None], t=torch.tensor([s]))[0].numpy()  # noqa: E731
        theirs = solve_ivp(field, (t[i].item(), r[i].item()), x_t[i].numpy(), method="DOP853", rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(ours[i].numpy(), theirs.y[:, -1], atol=1e-6)


def check_exact_mixture(module):
    x_t, r, t = points(16, 2)
    u = lambda x_t, *, t, r: (x_t - path_end(x_t, t=t, r=r)) / (t - r)[:, None]  # noqa: E731
    _, err = module.meanflow_loss(u, x_t, MIXTURE.velocity(x_t, t=t), r=r, t=t)
    assert err.max() < 1e-10


def test_the_exact_average_velocity_of_a_mixture_has_zero_loss():
    """And not without (t - r) or d_t u."""
    check_exact_mixture(meanflow_td)
    for old, new in (("expand_times(t - r, v) * du_dt", "du_dt"), ("torch.ones_like(t[rows])", "0 * t[rows]")):
        with pytest.raises(AssertionError):
            check_exact_mixture(broken(meanflow_td, (old, new)))


def tangent_of_f(u, x_t, v, t):
    """df/dt along (v, 1) of the consistency function f(x_t, t) = x_t - t u(x_t, 0, t)."""
    f = lambda x, time: x - time[:, None] * u(x, t=time, r=torch.zeros_like(time))  # noqa: E731
    return torch.func.jvp(f, (x_t, t), (v, torch.ones_like(t)))[1]


def test_the_exact_consistency_function_is_constant_along_the_path():
    """And off the path it is not."""
    flow, (x_t, _, t) = GaussianFlow(), points(low=0.05)
    v = flow.velocity(x_t, t=t)
    assert tangent_of_f(flow.average_velocity, x_t, v, t).abs().max() < 1e-12
    assert tangent_of_f(flow.average_velocity, x_t, v + 1, t).abs().min() > 1e-3


def test_df_dt_is_the_residual_of_the_identity_at_r_0():
    """df/dt = v - u - t du/dt = u_target - u, for any network: the two conditions are one."""
    net, (x_t, _, t) = network(), points(low=0.05)
    v, zero = GaussianFlow().velocity(x_t, t=t), torch.zeros_like(t)
    u_target, _ = meanflow_td.meanflow_target(net, x_t, v, r=zero, t=t)
    torch.testing.assert_close(tangent_of_f(net, x_t, v, t), u_target - net(x_t, t=t, r=zero))


def consistency_loss(u, x_t, v, *, t, sign=1.0, power=1.0):
    """1/2 |f - sg[f - df/dt]|^2 / t, whose gradient is (df/dt) . grad f / t."""
    f = x_t - t[:, None] * u(x_t, t=t, r=torch.zeros_like(t))
    stepped = (f - sign * tangent_of_f(u, x_t, v, t)).detach()
    return (0.5 * (f - stepped).square().sum(dim=1) / t**power).mean()


def check_consistency_gradient(loss):
    """loss(u, x_t, v, t=t) has half of the gradient of MeanFlow's at r = 0, parameter by parameter."""
    net, (x_t, _, t) = network(), points(low=0.05)
    v = GaussianFlow().velocity(x_t, t=t)
    meanflow, _ = meanflow_td.meanflow_loss(net, x_t, v, r=torch.zeros_like(t), t=t, p=0.0)
    expected = torch.autograd.grad(0.5 * meanflow, net.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss(net, x_t, v, t=t), net.parameters()), expected):
        torch.testing.assert_close(ours, theirs)


def test_the_consistency_gradient_over_t_is_meanflows():
    """With another sign of df/dt, or without the weight 1/t, it is not."""
    check_consistency_gradient(consistency_loss)
    for wrong in (dict(sign=-1.0), dict(power=0.0)):
        with pytest.raises(AssertionError):
            check_consistency_gradient(partial(consistency_loss, **wrong))


def two_steps_as_one(velocity, x_t, *, t, h):
    """Progressive distillation's target (arXiv 2202.00512): two steps of length h by the present velocity, as one."""
    v_first = velocity(x_t, t=t)
    return (v_first + velocity(x_t - h * v_first, t=t - h)) / 2


def check_progressive(target, velocity, exact):
    """Exact students of 2^N halvings are the mean of the velocities of as many Euler steps, and nearer with each N."""
    eps = torch.randn(32, 3, generator=rng(0, "eps"), dtype=torch.float64)
    one, errors = torch.ones(32, dtype=torch.float64), []
    for rounds in (3, 4, 5, 6, 7):
        x, velocities, student = eps, [], velocity
        for k in range(2**rounds):
            velocities.append(velocity(x, t=one * (1 - k / 2**rounds)))
            x = x - velocities[-1] / 2**rounds
        for k in range(rounds):
            student = lambda x, *, t, v=student, h=2.0 ** (k - rounds): target(v, x, t=t, h=h)  # noqa: E731
        u = student(eps, t=one)
        torch.testing.assert_close(u, torch.stack(velocities).mean(dim=0), rtol=1e-9, atol=1e-9)
        errors.append((u - exact(eps)).abs().mean())
    slope = torch.log2(errors[-2] / errors[-1]).item()
    assert slope == pytest.approx(1, abs=0.1)


def gaussian_exact(eps):
    one = torch.ones(len(eps), dtype=torch.float64)
    return GaussianFlow().average_velocity(eps, t=one, r=0 * one)


def test_progressive_distillation_averages_and_converges_at_first_order():
    """To a Gaussian's exact average velocity; the second velocity alone, or at the same time, is no mean."""
    check_progressive(two_steps_as_one, GaussianFlow().velocity, gaussian_exact)
    for wrong in (lambda v, x, *, t, h: v(x - h * v(x, t=t), t=t - h),
                  lambda v, x, *, t, h: (v(x, t=t) + v(x - h * v(x, t=t), t=t)) / 2):  # fmt: skip
        with pytest.raises(AssertionError):
            check_progressive(wrong, GaussianFlow().velocity, gaussian_exact)


def test_it_converges_for_a_networks_velocity_field_too():
    """Against Heun's method with many steps."""
    net = seeded(lambda: VelocityMLP(3, 16, 2)).double().requires_grad_(False)
    check_progressive(two_steps_as_one, net, lambda eps: eps - meanflow_td.sample_ode(net, eps, steps=1000))

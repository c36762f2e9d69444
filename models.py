"""The networks, and the one convention that all files share.

The convention (flow matching's linear path; Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003)

    x_t = (1 - t) x_0 + t eps          t = 0 is data, t = 1 is noise
    v   = dx_t / dt                    conditional value: eps - x_0
    x0_hat  = x_t - t v                eps_hat = x_t + (1 - t) v
    score   = -eps_hat / t             the gradient of log p_t(x_t)

    u(x_t, r, t) = 1/(t - r) * integral_r^t v(x_s, s) ds,   r <= t       the AVERAGE velocity of MeanFlow
    x_r = x_t - (t - r) u(x_t, r, t)                                     so one step is x_0 = eps - u(eps, 0, 1)

Two kinds of network follow it. One with a single time, net(x_t, t=t), is a velocity field v: a teacher, or the fake
branch of DMD. One with two_times=True, net(x_t, t=t, r=r), is an average velocity u: a student. At r = t the two mean
the same thing, and a student that starts from its teacher's weights answers exactly what the teacher answers.

Times are tensors (B,), keyword-only. This file imports no file of ours.
"""

import copy
import math

import torch
from torch import nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Conversions. Every network here answers a velocity; whoever wants x_0, eps or the score takes it from there.
# ---------------------------------------------------------------------------------------------------------------------


def expand_times(t, x):
    """Reshape times t (B,) to (B, 1, ..., 1), so that they multiply x (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x_0, eps, t):
    """x_t = (1 - t) x_0 + t eps, for data x_0 (B, ...), unit Gaussian noise eps of the same shape and t (B,) in [0, 1]."""
    t = expand_times(t, x_0)
    return (1 - t) * x_0 + t * eps


def x0_from_velocity(x_t, t, v):
    """x0_hat = x_t - t v: the mean of the data that a velocity v at (x_t, t) stands for. Shapes (B, ...), t (B,)."""
    return x_t - expand_times(t, x_t) * v


def eps_from_velocity(x_t, t, v):
    """eps_hat = x_t + (1 - t) v: the mean of the noise that a velocity v at (x_t, t) stands for. Shapes (B, ...), t (B,)."""
    return x_t + (1 - expand_times(t, x_t)) * v


def score_from_velocity(x_t, t, v):
    """score = -eps_hat / t = -(x_t + (1 - t) v) / t, the gradient of log p_t at x_t. Shapes (B, ...), t (B,) in (0, 1]."""
    return -eps_from_velocity(x_t, t, v) / expand_times(t, x_t)

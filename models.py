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


# ---------------------------------------------------------------------------------------------------------------------
# The 2D network
# ---------------------------------------------------------------------------------------------------------------------


def sinusoids(a, frequencies):
    """Features [a, sin(f a), cos(f a)] of every column of a (B, D) at K frequencies in radians per unit: (B, D (1 + 2K))."""
    phase = (a[:, :, None] * frequencies).flatten(1)  # (B, D K)
    return torch.cat([a, phase.sin(), phase.cos()], dim=1)


class VelocityMLP(nn.Module):
    """A residual MLP for points: the teacher, the student and the fake branch of the 2D toy.

    net = VelocityMLP(dim, width, depth, two_times=False);  net(x_t, t=t) -> v (B, dim)
    net = VelocityMLP(dim, width, depth, two_times=True);   net(x_t, t=t, r=r) -> u (B, dim)

    x_t (B, dim); times t and r (B,) in [0, 1]. With taps, a tuple of hidden layers' indices, the answer is
    (v, [tokens]) where tokens (B, len(taps), width) holds one token for each tapped layer: what the discriminator
    of awd.py reads. Raises ValueError where r is missing, or given to a network that has no place for it.

    With two_times=True the duration t - r gets an embedding of its own whose weights start at zero: a student that
    takes its teacher's weights is its teacher at step 0, u(x, r, t) = v(x, t).
    """

    def __init__(self, dim, width, depth, two_times=False):
        super().__init__()
        self.two_times = two_times
        # OURS: a student differentiates through its time features, and du/dt grows with the highest frequency.
        # 2^5 pi/2 = 50 rad per unit of t is fast enough for the sharp end of the path, at t near 0, and slow enough
        # for the tangent. The points get features too: a plain MLP blurs the edges of the board.
        self.register_buffer("time_frequencies", math.pi / 2 * 2.0 ** torch.arange(6), persistent=False)
        self.register_buffer("space_frequencies", math.pi / 2 * 2.0 ** torch.arange(2), persistent=False)
        time_features = 1 + 2 * len(self.time_frequencies)
        self.embed_x = nn.Linear(dim * (1 + 2 * len(self.space_frequencies)), width)
        self.embed_t = nn.Linear(time_features, width)
        if two_times:
            self.embed_duration = nn.Linear(time_features, width)
            nn.init.zeros_(self.embed_duration.weight)
            nn.init.zeros_(self.embed_duration.bias)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, dim)

    def forward(self, x_t, *, t, r=None, taps=()):
        if self.two_times and r is None:
            raise ValueError("this network has two times: call it with t= and r=")
        if not self.two_times and r is not None:
            raise ValueError("this network has one time, a velocity at t: r= means nothing to it")
        time = self.embed_t(sinusoids(t[:, None], self.time_frequencies))  # (B, width)
        if self.two_times:
            time = time + self.embed_duration(sinusoids((t - r)[:, None], self.time_frequencies))
        h = self.embed_x(sinusoids(x_t, self.space_frequencies)) + time  # (B, width)
        tokens = []
        for i, layer in enumerate(self.hidden):
            h = h + F.gelu(layer(h) + time)
            if i in taps:
                tokens.append(h)
        v = self.out(h)  # (B, dim)
        return (v, [torch.stack(tokens, dim=1)]) if taps else v


def count_parameters(net):
    """How many numbers the network holds, trainable or not."""
    return sum(p.numel() for p in net.parameters())


def frozen_copy(net):
    """A copy of the network that takes no gradient: a teacher, or the start of an average."""
    return copy.deepcopy(net).requires_grad_(False)


def update_ema(ema, net, step, decay=0.999):
    """Move the average network a step towards the trained one: ema <- d ema + (1 - d) net, in place.

    d = min(decay, (1 + step) / (10 + step)) rises with the step (an integer from 0), so that the random start is soon
    forgotten (PRIOR: the warm-up that TensorFlow's ExponentialMovingAverage documents). Parameters are matched by name.
    """
    decay = min(decay, (1 + step) / (10 + step))
    live = dict(net.named_parameters())
    averages = dict(ema.named_parameters())
    if live.keys() != averages.keys():
        raise ValueError(f"the average and the network differ in {sorted(live.keys() ^ averages.keys())[:4]}")
    with torch.no_grad():
        torch._foreach_lerp_(list(averages.values()), [live[name] for name in averages], 1 - decay)

"""The networks, and the one convention that all files share.

The convention (flow matching's linear path; Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003)

    x_t = (1 - t) x_0 + t eps          t = 0 is data, t = 1 is noise
    v   = E[dx_t/dt | x_t]             for one pair (x_0, eps) the derivative is eps - x_0
    x0_hat  = x_t - t v                eps_hat = x_t + (1 - t) v
    score   = -eps_hat / t             the gradient of log p_t(x_t)

    u(x_t, r, t) = 1/(t - r) * integral_r^t v(x_s, s) ds,   r <= t       the AVERAGE velocity of MeanFlow
    x_r = x_t - (t - r) u(x_t, r, t)                                     so one step is x_0 = eps - u(eps, 0, 1)

Two kinds of network follow it. One with a single time, net(x_t, t=t), is a velocity field v: a teacher, or the fake
branch of DMD. One with two_times=True, net(x_t, t=t, r=r), is an average velocity u: a student. At r = t the two mean
the same thing. A student that starts from its teacher's weights answers at first what the unguided teacher does,
whatever r is. (Two students of toy2d.py's unified view have one time: their r follows from t, and one step of Euler's
method is their jump.)

Times are tensors (B,); networks take them by keyword only. This file imports no file of ours.
"""

import argparse
import copy
import io
import json
import math
import mmap
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from functools import cache, partial

import torch
from torch import nn
from torch.autograd import forward_ad
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Conversions. What leaves a network is a velocity (of a DiT: what its wrapper makes of its answer, see `Teacher`);
# whoever wants x_0, eps or the score takes it from there.
# ---------------------------------------------------------------------------------------------------------------------


def expand_times(t, x):
    """Reshape times t (B,) to (B, 1, ..., 1), so that they multiply x (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x_0, eps, t):
    """x_t = (1 - t) x_0 + t eps, for data x_0 (B, ...), unit Gaussian noise eps of its shape, and t (B,) in [0, 1]."""
    t = expand_times(t, x_0)
    return (1 - t) * x_0 + t * eps


def x0_from_velocity(x_t, t, v):
    """x0_hat = x_t - t v: the mean of the data that a velocity v at (x_t, t) stands for. (B, ...), t (B,)."""
    return x_t - expand_times(t, x_t) * v


def eps_from_velocity(x_t, t, v):
    """eps_hat = x_t + (1 - t) v: the mean of the noise that a velocity v at (x_t, t) stands for. (B, ...), t (B,)."""
    return x_t + (1 - expand_times(t, x_t)) * v


def score_from_velocity(x_t, t, v):
    """score = -eps_hat / t = -(x_t + (1 - t) v) / t, the gradient of log p_t at x_t. (B, ...), t (B,) in (0, 1]."""
    return -eps_from_velocity(x_t, t, v) / expand_times(t, x_t)


# ---------------------------------------------------------------------------------------------------------------------
# The 2D network
# ---------------------------------------------------------------------------------------------------------------------


def sinusoids(a, frequencies):
    """Features [a, sin(f a), cos(f a)] of each column of a (B, D), at K frequencies in rad/unit: (B, D (1 + 2K))."""
    phase = (a[:, :, None] * frequencies).flatten(1)  # (B, D K)
    return torch.cat([a, phase.sin(), phase.cos()], dim=1)


class VelocityMLP(nn.Module):
    """A residual MLP for points: the teacher, the student and the fake branch of the 2D toy.

    net = VelocityMLP(dim, width, depth, two_times=False);  net(x_t, t=t) -> v (B, dim)
    net = VelocityMLP(dim, width, depth, two_times=True);   net(x_t, t=t, r=r) -> u (B, dim)

    x_t (B, dim); times t and r (B,) in [0, 1]. With taps, a tuple of hidden layers' indices, the answer is
    (v, [tokens]) where tokens (B, len(taps), width) holds one token for each tapped layer: what the discriminator
    of awd.py reads. Raises ValueError where r is missing, or given to a network that has no place for it.

    With two_times=True the duration t - r gets an embedding of its own, which is zero at t = r and whose weights start
    at zero: a student that takes its teacher's weights is its teacher at step 0, u(x, r, t) = v(x, t).
    """

    def __init__(self, dim, width, depth, two_times=False):
        super().__init__()
        self.two_times = two_times
        # OURS: a student differentiates through its time features, and du/dt grows with the highest frequency.
        # 2^5 pi/2 = 50 rad per unit of t is fast enough for the sharp end of the path, at t near 0, and slow enough
        # for the tangent. The points get features too: a plain MLP blurs the edges of the board.
        self.register_buffer("time_frequencies", math.pi / 2 * 2.0 ** torch.arange(6), persistent=False)
        self.register_buffer("space_frequencies", 2.0 ** torch.arange(3), persistent=False)
        time_features = 1 + 2 * len(self.time_frequencies)
        self.embed_x = nn.Linear(dim * (1 + 2 * len(self.space_frequencies)), width)
        self.embed_t = nn.Linear(time_features, width)
        if two_times:
            self.embed_duration = nn.Linear(time_features, width, bias=False)
            nn.init.zeros_(self.embed_duration.weight)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, dim)

    def forward(self, x_t, *, t, r=None, taps=()):
        if self.two_times and r is None:
            raise ValueError("this network has two times: call it with t= and r=")
        if not self.two_times and r is not None:
            raise ValueError("this network has one time, a velocity at t: r= means nothing to it")
        time = self.embed_t(sinusoids(t[:, None], self.time_frequencies))  # (B, width)
        if self.two_times:
            # OURS: minus the features of no duration, so that at r = t this part is silent and the network is a
            # velocity field. Left in, their cosines of 1 act as a second bias: sliced W2 of a TD student 0.20 instead
            # of 0.08 (by hand, on a prototype: checkerboard, width 64, 3,000 updates at 1e-3, one seed).
            duration = sinusoids((t - r)[:, None], self.time_frequencies)
            none = sinusoids(torch.zeros_like(t)[:, None], self.time_frequencies)
            time = time + self.embed_duration(duration - none)
        h = self.embed_x(sinusoids(x_t, self.space_frequencies)) + time  # (B, width)
        tokens = []
        for i, layer in enumerate(self.hidden):
            h = h + F.gelu(layer(h) + time)
            if i in taps:
                tokens.append(h)
        v = self.out(h)  # (B, dim)
        return (v, [torch.stack(tokens, dim=1)]) if taps else v

    def features(self, x_t, *, t, taps):
        """The tapped tokens alone."""
        return self(x_t, t=t, taps=taps)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Small tools for any network
# ---------------------------------------------------------------------------------------------------------------------


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


def with_part(module, name, part):
    """A shallow copy of a module with another part of this name: all other parts, and their parameters, are shared."""
    other = copy.copy(module)
    other._modules = {**module._modules, name: part}
    return other


def at_least_fp32(x):
    """x in float32, or in float64 if it was in float64: half precision and integers go up, nothing goes down."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_off(x):
    """A context in which autocast does not lower the precision of work on x's device (it knows no "meta" device)."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Forward mode. du/dt is one pass of dual numbers: every tensor on the way carries its tangent. Torch has a rule for
# each operation, but three of its rules do much more than they need to; the ones below answer the same. A pass with a
# tangent should cost two without: by these rules it costs 2.4, by torch's own 3.2, and 3.5 by torch.func.jvp (33 M
# parameters, 256 tokens, one core). Attention is a product of three things that all carry tangents, which alone is more
# than twice the work.
# ---------------------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear. Its tangent is one product, W dx; by torch's rule there is a second, of x with the zeros dW."""

    def forward(self, x):
        x, dx = forward_ad.unpack_dual(x)
        y = F.linear(x, self.weight, self.bias)
        return y if dx is None else forward_ad.make_dual(y, F.linear(dx, self.weight))


def symmetric(f, x):
    """f(x), for an f whose Jacobian J is symmetric, as those of LayerNorm without a gain and of softmax are.

    The tangent J dx is then J^T dx: the backward pass, one kernel, where torch's forward mode takes ten.
    """
    x, dx = forward_ad.unpack_dual(x)
    if dx is None:
        return f(x)
    y, backward = torch.func.vjp(f, x)
    return forward_ad.make_dual(y, *backward(dx))


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, for q, k, v (B, heads, N, d) -> (B, heads, N, d).

    Fused, unless q carries a tangent: the fused kernels have no forward-mode derivative (NotImplementedError, on CPU
    too), so then softmax is written out. It holds an N x N matrix per head, hence only where it must. unpack_dual sees
    the tangents of torch.autograd.forward_ad and of torch.func.jvp alike. It does not see one that hides below another
    functional transform, as in jvp(grad(...)); there the fused kernel raises its error, nothing goes wrong silently.
    """
    if forward_ad.unpack_dual(q).tangent is None:
        return F.scaled_dot_product_attention(q, k, v)
    return symmetric(partial(torch.softmax, dim=-1), q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)) @ v


# ---------------------------------------------------------------------------------------------------------------------
# DiT, the diffusion transformer (Peebles & Xie, arXiv 2212.09748). SiT (Ma et al., arXiv 2401.08740) has its layers.
#
#   image (B, C, H, W) --patches, + positions--> tokens (B, N, D) --> depth x block --> final layer --> (B, C, H, W)
#   c = embed(t) + embed(y)   (B, D)                        each block and the final layer read c
#
# What is special is how a block hears of the time and the class. LayerNorm has no gain and bias of its own; a linear
# layer computes them from c, and one gate more for each branch ("adaLN"). That layer starts at zero ("-Zero"), so every
# gate is 0 and every block starts as the identity.
#
# The names of the parameters are the published checkpoints', so those load key for key. That is why a lone layer
# sometimes sits in a container of one.
# ---------------------------------------------------------------------------------------------------------------------

TIME_CHANNELS = 256  # PRIOR: DiT's sinusoidal channels of one time, half of them cosines


def sinusoid_angles(x, n):
    """Angles x * 10000^(-k/n), k = 0 .. n-1: times or positions x (N,) -> (N, n), in x's own precision."""
    k = torch.arange(n, dtype=x.dtype, device=x.device)
    return x[:, None] * torch.exp(-math.log(10000.0) * k / n)


def grid_positions(channels, side):
    """The fixed position vectors of a side x side grid of tokens, row by row: (1, side^2, channels).

    The first half of the channels tells the column, the second half the row, each as sines, then cosines.
    """
    i = torch.arange(side * side, dtype=torch.float64)  # float64: a table computed once can be exact
    angles = [sinusoid_angles(axis, channels // 4) for axis in (i % side, i // side)]  # column, row
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)[None].float()


class TimeEmbedder(nn.Module):
    """Times t (B,), fractional and negative ones too -> (B, hidden_size): 128 cosines, 128 sines, two linear layers.

    Computed outside autocast, because bf16 moves in steps of 0.004 just below 1, and a small t - r is lost in them.
    DIFFERS: the official code makes the sinusoids in float32 always; here float64 stays float64, so that a test can
    compare derivatives with finite differences.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_CHANNELS, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))

    def forward(self, t):
        angles = sinusoid_angles(at_least_fp32(t), TIME_CHANNELS // 2)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 256)
        with autocast_off(t):
            return self.mlp(waves.to(self.mlp[0].weight.dtype))  # (B, D)


class Attention(nn.Module):
    """Multi-head self-attention of tokens, (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


def modulate(x, shift, scale):
    """x (1 + scale) + shift, for tokens x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention, then an MLP, each shifted, scaled and gated by the condition c (B, D). Tokens (B, N, D) both ways."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        width = int(hidden_size * mlp_ratio)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=Linear(hidden_size, width), act=nn.GELU(approximate="tanh"), fc2=Linear(width, hidden_size)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(symmetric(self.norm1, x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(symmetric(self.norm2, x), shift_mlp, scale_mlp))


@cache
def compiled_block():
    """DiTBlock's forward(block, x, c), compiled: once for all blocks of a size, and again for each kind of pass."""
    torch._dynamo.config.recompile_limit = 64  # stage 2 has more kinds than the 8 after which torch gives up
    return torch.compile(DiTBlock.forward)


class FinalLayer(nn.Module):
    """Tokens (B, N, D) and condition c (B, D) -> the numbers of each patch, (B, N, patch_numbers)."""

    def __init__(self, hidden_size, patch_numbers):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(hidden_size, patch_numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(symmetric(self.norm_final, x), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer, with one time (a teacher, a fake branch) or with two (a student).

    input_size, in_channels: side and channels of the square input (32 and 4 for SD-VAE latents of 256 px images).
    patch_size: divides input_size. hidden_size D: a multiple of 4 and of num_heads. ValueError if not.
    num_classes: labels are 0 .. num_classes - 1; row num_classes of the table is the null class of guidance.
    learn_sigma: the output has 2 * in_channels channels. The first half is the prediction; the second is DiT's learned
        variance, and SiT's published nets carry it too and never use it. Whoever calls takes the half that it wants.
    two_times: adds an embedder of the time span t - r, and r must then be given.
    checkpointing, an attribute: a pass with a graph keeps only what enters each block, and makes the rest again when it
        is needed; the same numbers for a third more time. A pass without a graph, as du/dt is, does not notice.
    compiling, an attribute: the blocks go through torch.compile, except where a tangent passes, as in du/dt, for it
        loses tangents. The same numbers up to rounding. The net itself is not wrapped: its state dict keeps its names.

    `dit_by_name` builds the published sizes, `student_from_teacher` the student of a net with one time.

    OURS: the student's second time enters as t - r, like MeanFlow's (arXiv 2505.13447), and the LAST layer of its
    embedder starts at zero. A student that takes all other weights from its teacher therefore starts as its teacher.

    DIFFERS: the official code drops labels inside the network in training mode; here the training loop passes
    y = num_classes, where everyone can see it. pos_embed is a Parameter there, a buffer here: the state dict is the
    same, and requires_grad_(True) on a copy of a frozen teacher does not set the fixed table free.
    """

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio=4.0,
                 num_classes=1000, learn_sigma=False, two_times=False):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"patch_size {patch_size} must divide input_size {input_size}; "
                             f"num_heads {num_heads} and 4 must divide hidden_size {hidden_size}")
        self.config = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels,
                           hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
                           num_classes=num_classes, learn_sigma=learn_sigma)  # all but two_times
        self.patch_size, self.num_classes, self.two_times = patch_size, num_classes, two_times
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        side = input_size // patch_size
        self.register_buffer("pos_embed", grid_positions(hidden_size, side))  # (1, N, D)
        self.x_embedder = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)))
        self.t_embedder = TimeEmbedder(hidden_size)
        if two_times:
            self.span_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = nn.Sequential(OrderedDict(embedding_table=nn.Embedding(num_classes + 1, hidden_size)))
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * self.out_channels)
        self.checkpointing = self.compiling = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """PRIOR: as DiT's: Xavier for linear layers, normal(0, 0.02) for embedders, zero for adaLN and the last one."""
        for layer in self.modules():
            if isinstance(layer, (Linear, nn.Conv2d)):  # the patch layer is a linear layer on flattened patches
                nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in [self.t_embedder, self.span_embedder] if self.two_times else [self.t_embedder]:
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        for layer in [*self.blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.two_times:
            nn.init.zeros_(self.span_embedder.mlp[2].weight)  # biases are zero already

    def forward(self, x_t, *, t, y, r=None, taps=()):
        """The network's answer at x_t (B, C, H, W), time t (B,), labels y (B,) int64: (B, out_channels, H, W).

        t, and r (B,) where there are two times, go to the embedders as they are: 0 .. 999 for a published DiT, [0, 1]
        for SiT, [0, CLOCK] for nets trained here. What the answer means, the wrapper knows (see `Teacher`).
        taps: indices of blocks, from 0. If any, returns (answer, [tokens (B, N, D) after each of these blocks]).
        Raises ValueError if r is missing with two_times, given without, or a tap is no block's index.
        """
        if self.two_times != (r is not None):
            raise ValueError("a net with two_times=True needs r" if self.two_times else "r needs two_times=True")
        if not set(taps) <= set(range(len(self.blocks))):
            raise ValueError(f"taps {tuple(taps)} must be indices of the {len(self.blocks)} blocks")
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        if self.two_times:
            span = at_least_fp32(t) - at_least_fp32(r)
            # minus the features of no span, so that at r = t this part is silent, after training too
            c = c + (self.span_embedder(span) - self.span_embedder(torch.zeros_like(span)))  # so at r = t exactly c
        x = self.x_embedder(x_t).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D)
        tokens = {}
        plain = forward_ad.unpack_dual(x).tangent is None
        again = self.checkpointing and torch.is_grad_enabled() and plain
        for i, block in enumerate(self.blocks):
            run = partial(compiled_block(), block) if self.compiling and plain else block
            # nothing in a block is random, so there is no random state to keep
            x = checkpoint(run, x, c, use_reentrant=False, preserve_rng_state=False) if again else run(x, c)
            if i in taps:
                tokens[i] = x
        out = self.unpatchify(self.final_layer(x, c))
        return (out, [tokens[i] for i in taps]) if taps else out

    def unpatchify(self, x):
        """Tokens (B, N, p*p*C) back to images (B, C, H, W); the channel varies fastest within a token."""
        side, p = math.isqrt(x.shape[1]), self.patch_size
        x = x.unflatten(2, (p, p, self.out_channels)).unflatten(1, (side, side))  # (B, rows, columns, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, rows * p, columns * p)


DIT_SIZES = {  # PRIOR: DiT's, Table 1. hidden_size, depth, num_heads
    "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def dit_by_name(name):
    """A net of published size for latents of 256 px images: "DiT-XL/2" is XL with patches of 2. Random weights.

    Sizes S, B, L, XL; patches 2, 4, 8. "SiT-XL/2" is the same net, though SiT never reads the second half of its
    outputs. XL/2 has 292 keys and 675,129,632 numbers. ValueError for any other name.
    """
    match = re.fullmatch(r"[DS]iT-(S|B|L|XL)/([248])", name)
    if not match:
        raise ValueError(f"no net is called {name!r}: it is DiT or SiT, a size ({', '.join(DIT_SIZES)}) and a patch "
                         "(2, 4, 8), as in SiT-XL/2")
    return DiT(32, int(match[2]), 4, *DIT_SIZES[match[1]], learn_sigma=True)


def dit_from_weights(weights):
    """The DiT that fits weights {name: tensor}, with one time, and random still. ValueError if they are no DiT's.

    Sizes are read off the shapes, except the number of heads, which no shape tells: that of the published net of this
    hidden_size, else a head for each 64 channels, as all published nets but XL have it.
    """
    if dit_size(weights) is None:
        raise ValueError("it holds no DiT")
    hidden_size, in_channels, _, patch_size = weights["x_embedder.proj.weight"].shape
    tokens, numbers = weights["pos_embed"].shape[1], len(weights["final_layer.linear.bias"])
    heads = {size: heads for size, _, heads in DIT_SIZES.values()}.get(hidden_size, max(1, hidden_size // 64))
    return DiT(math.isqrt(tokens) * patch_size, patch_size, in_channels, hidden_size,
               len({name.split(".")[1] for name in weights if name.startswith("blocks.")}), heads,
               mlp_ratio=len(weights["blocks.0.mlp.fc1.bias"]) / hidden_size,
               num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1,
               learn_sigma=numbers == 2 * in_channels * patch_size**2)  # fmt: skip


def student_from_teacher(net):
    """A two-time copy of a DiT with one time, on its device, in float32: u(x, r, t) = v(x, t) at first, whatever r is.

    Only the first layer of the new embedder is random (torch's global generator). The student stands in its teacher's
    convention: wrap it as its teacher is wrapped, type(teacher)(student_from_teacher(teacher.net)).
    """
    student = DiT(**net.config, two_times=True)  # on the CPU, whose random numbers are the same everywhere
    student.load_state_dict({**student.state_dict(), **net.state_dict()})  # the teacher may be in bf16
    return student.to(net.pos_embed.device)


# ---------------------------------------------------------------------------------------------------------------------
# Teachers: a DiT of any origin, made to answer in our convention. Foreign clocks and parameterizations end here.
#
# Nothing is frozen by the wrapper, because DMD's fake branch is a teacher too, and trains. Freeze a teacher with
# teacher.requires_grad_(False). No torch.no_grad() inside: the adversarial loss reaches x_gen through the features.
# ---------------------------------------------------------------------------------------------------------------------

DIT_STEPS = 1000  # the published DiT's diffusion has k = 0 .. 999
DIT_BETAS = 1e-4, 2e-2  # its first and last beta, linear in between (Ho et al., arXiv 2006.11239)


# OURS: a DiT's fastest sinusoid turns 1 rad per unit of its clock, so a t in [0, 1] hardly moves any. 30 rad lets it
# tell times apart, and keeps the tangent d_t u small, which a student differentiates through.
CLOCK = 30.0


class Teacher(nn.Module):
    """Velocity, with guidance, of a DiT that was trained here: its clock is CLOCK t. The published ones are below.

    net: a DiT. If it has 2C channels (learn_sigma), the first C are the prediction. With one time, the wrapper is a
        velocity field: a teacher, or a fake branch. With two_times it is a student, and forward needs r.
    w, cfg_channels: the guidance with which forward and sample_ddpm answer; see `velocity`. A student's w stays 1.
    """

    clock = CLOCK  # the net's time for a unit of ours; 1 where a subclass has made the net's time itself
    times = 0.0, 1.0  # the t that the net knows

    def __init__(self, net, w=1.0, cfg_channels=3):
        super().__init__()
        self.net, self.w, self.cfg_channels = net, w, cfg_channels

    def raw(self, x, t, y, taps, r=None):
        """The net's whole answer (B, C or 2C, H, W), in at least float32, and the tapped tokens. t, r: the net's."""
        out = self.net(x, t=t, y=y, taps=taps, **({} if r is None else {"r": r}))
        out, tokens = out if taps else (out, [])
        return at_least_fp32(out), tokens

    def unguided(self, x_t, t, y, taps, r=None):
        """(v, or u if r is given, at x_t; the tapped tokens), without guidance. A subclass overrides it where its net
        has another clock or answers something else."""
        v, tokens = self.raw(x_t, self.clock * t, y, taps, None if r is None else self.clock * r)
        return v[:, :x_t.shape[1]], tokens

    def guided(self, answer, x, t, y, w, cfg_channels, taps=()):
        """answer(x, t, y, taps) -> (B, channels, H, W) and tokens, with guidance as `velocity` describes it."""
        if w == 1:
            return answer(x, t, y, taps)
        y_null = torch.full_like(y, self.net.num_classes)
        if taps:  # the tokens alone have a graph (see `velocity`), so that the backward pass skips the null rows
            cond, tokens = answer(x, t, y, taps)
            with torch.no_grad():
                null, _ = answer(x, t, y_null, ())
        else:  # conditional and null rows in one batch
            out, tokens = answer(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y_null]), ())
            cond, null = out.chunk(2)
        guided = null + w * (cond - null)
        return torch.cat([guided[:, :cfg_channels], cond[:, cfg_channels:]], dim=1), tokens

    def forward(self, x_t, *, t, y, r=None, taps=()):
        """v_w (B, C, H, W) with the wrapper's own w and cfg_channels; with r (B,), r <= t, a student's u(x_t, r, t).

        x_t, t, y, taps and the second result: as in `velocity`. ValueError for r with w != 1: a student has learned
        its teacher's guidance, and must not be guided a second time.
        """
        if r is None:
            return self.velocity(x_t, t=t, y=y, w=self.w, cfg_channels=self.cfg_channels, taps=taps)
        if self.w != 1:
            raise ValueError(f"a student's guidance is baked in: with r, w must be 1, not {self.w}")
        u, tokens = self.unguided(x_t, t, y, taps, r)
        return (u, tokens) if taps else u

    def velocity(self, x_t, *, t, y, w=1.0, cfg_channels=3, taps=()):
        """Guided velocity v_w = v_null + w (v_cond - v_null): x_t (B, C, H, W), t (B,) in [0, 1], y (B,) -> like x_t.

        w: guidance scale >= 0; 1 is none, and then the null class costs nothing (Ho & Salimans, arXiv 2207.12598).
        cfg_channels: only the first so many channels are guided, the others are the conditional velocity. PRIOR: 3 of 4
            latent channels in the official code of DiT and SiT, and so in their FIDs; w = 1.5 on 3 is about 1.375 on 4.
        taps: indices of blocks. If any, returns (v, [their tokens (B, N, D)]), those of the conditional rows; the
            tokens have a graph then, and v has none.
        """
        v, tokens = self.guided(self.unguided, x_t, t, y, w, cfg_channels, taps)
        return (v.detach(), tokens) if taps else v

    def features(self, x_t, *, t, y, taps):
        """The tokens that `velocity` gives for these taps, alone: no later block is run, and no null row."""
        until = with_part(self.net, "blocks", self.net.blocks[: max(taps) + 1])
        return with_part(self, "net", until).unguided(x_t, t, y, taps)[1]


class SiTTeacher(Teacher):
    """A SiT (arXiv 2401.08740) in our convention. Its clock runs the other way:

        SiT    x = t x_0 + (1 - t) eps      v_SiT = x_0 - eps      t = 0 noise, t = 1 data
        here   x = (1 - t) x_0 + t eps      v     = eps - x_0      t = 0 data,  t = 1 noise

    Exchanging t and 1 - t makes the paths equal; the velocity, a derivative by t, changes its sign:
        v(x_t, t) = -v_SiT(x_t, 1 - t)      u(x_t, r, t) = -u_SiT(x_t, 1 - r, 1 - t)
    A SiT's own sampler is `sample_sde`, and the ODE's Heun.
    """

    clock = 1.0

    def unguided(self, x_t, t, y, taps, r=None):
        v_sit, tokens = super().unguided(x_t, 1 - t, y, taps, None if r is None else 1 - r)
        return -v_sit, tokens


class DiTTeacher(Teacher):
    """A DiT that predicts eps on the DDPM path (arXiv 2212.09748) in our convention.

        DiT    x_vp = alpha_k x_0 + sigma_k eps, alpha_k^2 + sigma_k^2 = 1, k = 0 .. 999      answers eps_hat(x_vp, k)
        here   x_t  = (1 - t) x_0 + t eps,       t in [0, 1]                                 answers v = eps - x_0

    Dividing the first by alpha_k + sigma_k gives the second:
        t = sigma_k / (alpha_k + sigma_k)        x_vp = x_t (alpha_k + sigma_k) = x_t / sqrt((1 - t)^2 + t^2)
        x0_hat = (x_t - t eps_hat) / (1 - t), so v = eps_hat - x0_hat = (eps_hat - x_t) / (1 - t)

    Between two steps, k is linear in the log-SNR, log(alpha^2 / sigma^2) = 2 log((1 - t) / t). The steps cover
    t in [t_0, t_999] = [0.0099, 0.9937]. Outside, the velocity is that at the nearest end: t is clamped in all of
    the above. For unit Gaussian data this is wrong by 2.0e-4 |x| at t = 0 and by 8e-5 |x| at t = 1.
    OURS: the clamp and the interpolation of the clock; the published sampler uses whole k only.

    At t_999 an error of eps_hat grows 158 times. So the net runs outside autocast, and the rest is done in float32 at
    least. A net of bf16 weights raises an error of types here.

    A student of it (net with two_times) hears (k(t), k(r)), and the SAME formula turns its answer into u:
    u = (eps_hat - x_t) / (1 - t). Its "eps_hat" no longer means a noise: it is whatever stands for u, and at first,
    with the teacher's weights, for v. Compared with a SiT, this costs:
    - du/dt passes through k. One unit of t is at least 176 steps, 760 at t = 0.5 and 15,757 at t_999; the embedder's
      fastest wave turns by 1 rad in one step, where a SiT's turns by 1 rad in all of [0, 1]. Warm the tangent up, or
      normalise it. k also has a kink at every step, at which du/dt jumps.
    - Near t = 1 the divisor amplifies errors of the net, and bf16's rounding, 158 times. One-step samples start there.
    - Beyond the ends, t is clamped: du/dt has no d_t u there, and the MeanFlow target is wrong by (t - r) d_t u. That
      is much at t > t_999. Draw the times of training in [t_0, t_999], which `times` is.
    """

    clock = 1.0

    def __init__(self, net, w=1.0, cfg_channels=3):
        super().__init__(net, w, cfg_channels)
        betas = torch.linspace(*DIT_BETAS, DIT_STEPS, dtype=torch.float64)
        alpha_bar = (1 - betas).cumprod(0)  # alpha_k^2
        # No buffer: .to(torch.bfloat16) on the module must not round it. Minus the log-SNR, which rises with k.
        self.noise_to_signal = torch.log((1 - alpha_bar) / alpha_bar)  # (1000,)

    @property
    def times(self):
        """t_0 and t_999."""
        return tuple((self.noise_to_signal[[0, -1]] / 2).sigmoid().tolist())

    def step_of(self, t):
        """Clamp t (B,) to [t_0, t_999]; return it and the fractional step k (B,) in [0, 999] that belongs to it."""
        table = self.noise_to_signal.to(t)
        # log(sigma^2 / alpha^2) = 2 log(t / (1 - t))   <=>   t = sigmoid(log(sigma^2 / alpha^2) / 2)
        t = t.clamp(*(table[[0, -1]] / 2).sigmoid())
        level = 2 * torch.logit(t)
        above = torch.searchsorted(table, level).clamp(1, DIT_STEPS - 1)
        k = above - 1 + (level - table[above - 1]) / (table[above] - table[above - 1])
        return t, k.clamp(0, DIT_STEPS - 1)  # rounding in float32 alone could give 999.001

    def unguided(self, x_t, t, y, taps, r=None):
        x_t, (t, k) = at_least_fp32(x_t), self.step_of(at_least_fp32(t))
        k_r = None if r is None else self.step_of(at_least_fp32(r))[1]
        t = expand_times(t, x_t)
        with autocast_off(x_t):
            eps_hat, tokens = super().unguided(x_t / torch.sqrt((1 - t) ** 2 + t ** 2), k, y, taps, k_r)
        return (eps_hat - x_t) / (1 - t), tokens

    def respaced(self, steps):
        """The steps k (steps,) of the 1000 that a shorter DDPM takes, spread evenly, and alpha_bar there. Rising, CPU.

        PRIOR: Nichol & Dhariwal, arXiv 2102.09672. ValueError unless 2 <= steps <= 1000.
        """
        if not 2 <= steps <= DIT_STEPS:
            raise ValueError(f"the DDPM takes 2 to {DIT_STEPS} steps, not {steps}")
        stride = torch.full((steps,), (DIT_STEPS - 1) / (steps - 1), dtype=torch.float64)
        stride[0] = 0
        k = stride.cumsum(0).round().long()  # summed, as the official code does: where k is a half, rounding decides
        return k, torch.sigmoid(-self.noise_to_signal[k])

    def denoise(self, x, y, i, steps):
        """One step of the DDPM with learned variance: p(x_{i-1} | x_i) is Gaussian. Returns mean, log-variance, x0_hat.

        x (B, C, H, W): x_vp at the i-th step of `respaced`, i from 0; y (B,). The results are like x. With the
        alpha_bar a of this step, a' of the one below (1 if there is none) and beta = 1 - a / a':
            x0_hat  = x / sqrt(a) - sqrt(1 / a - 1) eps_hat
            mean    = (beta sqrt(a') x0_hat + (1 - a') sqrt(a / a') x) / (1 - a)            arXiv 2006.11239, eq. 7
            log var = f log beta + (1 - f) log(beta (1 - a') / (1 - a)), f = (out + 1) / 2  arXiv 2102.09672, eq. 15
        PRIOR: the official code guides eps_hat alone, and takes the conditional row's f. Where a' = 1, and the second
        logarithm with it infinite, it takes the one of the next step up.
        """
        ks, table = self.respaced(steps)
        table = [1.0, *table.tolist()]
        a_below, a = table[i:i + 2]
        beta = 1 - a / a_below
        channels = x.shape[1]
        with autocast_off(x):
            k = torch.full((len(x),), float(ks[i]), device=x.device)
            out, _ = self.guided(self.raw, x, k, y, self.w, min(self.cfg_channels, channels))
        if out.shape[1] != 2 * channels:
            raise ValueError("the DDPM needs a net that predicts the variance too (learn_sigma=True)")
        eps_hat, f = out[:, :channels], (out[:, channels:] + 1) / 2
        x0_hat = x / a ** 0.5 - (1 / a - 1) ** 0.5 * eps_hat
        mean = (beta * a_below ** 0.5 * x0_hat + (1 - a_below) * (a / a_below) ** 0.5 * x) / (1 - a)
        low_below, low = table[max(i, 1):max(i, 1) + 2]
        least = (1 - low / low_below) * (1 - low_below) / (1 - low)
        return mean, f * math.log(beta) + (1 - f) * math.log(least), x0_hat

    @torch.no_grad()
    def sample_ddpm(self, eps, y, steps=250, *, generator):
        """Samples x_0 (B, C, H, W) of the DiT's own sampler from noise eps, with the wrapper's w and cfg_channels.

        y (B,). steps: calls of the net, 2 to 1000; PRIOR: 250, behind the published FID 2.27 at w = 1.5. generator:
        of `normal_like`, for the noise of every step but the last. The net must have learn_sigma.
        """
        x = at_least_fp32(eps)  # at k = 999 the path is noise, but for 0.6 % of x_0
        for i in reversed(range(steps)):
            mean, log_variance, _ = self.denoise(x, y, i, steps)
            noise = normal_like(x, generator) if i else 0.0
            x = mean + (log_variance / 2).exp() * noise
        return x


def normal_like(x, generator):
    """Unit noise of the shape of x (B, ...), in its precision, on its device.

    generator: a torch.Generator on that device; or a list of B on the CPU, one for each row: then a row's noise is the
    same whatever batch it is in, and on any device.
    """
    if isinstance(generator, list):
        return torch.stack([torch.randn(x.shape[1:], generator=one, dtype=x.dtype) for one in generator]).to(x.device)
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


SDE_LAST_STEP = 0.04  # PRIOR: SiT's. The last step, from t = 0.04 to t = 0, adds no noise.


@torch.no_grad()
def sample_sde(velocity, eps, y=None, steps=250, *, generator):
    """Samples x_0 (B, ...) from noise eps by SiT's Euler-Maruyama (arXiv 2401.08740), `steps` calls of velocity.

    velocity(x_t, t=t) -> (B, ...), called with y=y too if y (B,) is given: a Teacher, whose w is then the guidance.
    generator: of `normal_like`. Raises ValueError for steps < 2.

    The SDE has the densities p_t of the ODE, for any g(t) >= 0, and runs from t = 1 down to 0 (score = -eps_hat / t):
        dx = (v - g/2 score) dt + sqrt(g) dW          with g = 2 t:   dx = (v + eps_hat) dt + sqrt(2 t) dW
    PRIOR: g = 2 t is the default ("sigma") of SiT's published code, and so are 250 steps: all but the last are equal
    and end at t = 0.04; the last goes to 0 along the drift alone. It leaves an error that no number of steps removes:
    for Gaussian data of std 0.5 the variance comes out at 0.245, not 0.25.
    """
    if steps < 2:
        raise ValueError(f"the SDE sampler takes at least 2 steps, not {steps}")
    label = {} if y is None else {"y": y}
    x, dt = eps, (1 - SDE_LAST_STEP) / (steps - 1)
    for k in range(steps):
        t = x.new_full((len(x),), 1 - k * dt)
        v = velocity(x, t=t, **label)
        drift = v + eps_from_velocity(x, t, v)
        if k == steps - 1:
            return x - drift * SDE_LAST_STEP
        noise = normal_like(x, generator)
        x = x - drift * dt + (2 * (1 - k * dt) * dt) ** 0.5 * noise


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder of Stable Diffusion (Rombach et al., arXiv 2112.10752): images of 3 channels to latents of 4, 8 times
# smaller. The teachers for ImageNet live in these latents. Frozen; we only need it to answer what diffusers' answers.
#
#   encode   3 --conv--> stage --halve--> stage --halve--> stage --halve--> stage --> middle --conv--> mean, logvar
#   decode   z --conv--> middle --> stage --double--> stage --double--> stage --double--> stage --conv--> 3
#   stage    2 residual blocks (decoder: 3)          middle   residual block, attention over all pixels, residual block
# ---------------------------------------------------------------------------------------------------------------------

SD_VAE_SCALE = 0.18215  # PRIOR: latent diffusion's. A diffusion model sees SD_VAE_SCALE * z, of about unit variance.


def group_norm(channels):
    """The autoencoder's normalisation: 32 groups."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(conv(x)), (B, in, H, W) -> (B, out, H, W); x goes through a 1x1 convolution where in and out differ."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)  # Identity adds no key

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class PixelAttention(nn.Module):
    """x + self-attention over the pixels of x, one head. (B, C, H, W) both ways."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1 head, H*W, C)
        h = self.to_out[0](attention(self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)))
        return x + h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Residual block, attention, residual block. (B, C, H, W) both ways."""

    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels), ResnetBlock(channels, channels)])
        self.attentions = nn.ModuleList([PixelAttention(channels)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Halve(nn.Module):
    """Half the side: (B, C, H, W) -> (B, C, H/2, W/2). PRIOR: zeros are added below and to the right only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Double the side by repeating pixels, then smooth: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """`layers` residual blocks at one resolution, then, if asked, half or double the side."""

    def __init__(self, in_channels, out_channels, layers, halve=False, double=False):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c_in, out_channels) for c_in in inputs)
        self.downsamplers = nn.ModuleList([Halve(out_channels)] if halve else [])  # an empty list adds no key
        self.upsamplers = nn.ModuleList([Double(out_channels)] if double else [])

    def forward(self, x):
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, 2 * latent_channels, H/8, W/8) for four stages; all but the last halve the side."""

    def __init__(self, channels, layers, latent_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        inputs, last = [channels[0], *channels[:-1]], len(channels) - 1
        self.down_blocks = nn.ModuleList(
            Stage(c_in, c_out, layers, halve=i < last) for i, (c_in, c_out) in enumerate(zip(inputs, channels)))
        self.mid_block = MidBlock(channels[-1])
        self.conv_norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> images (B, 3, 8h, 8w) for four stages; all but the last double the side."""

    def __init__(self, channels, layers, latent_channels):
        super().__init__()
        channels = channels[::-1]
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0])
        inputs, last = [channels[0], *channels[:-1]], len(channels) - 1
        self.up_blocks = nn.ModuleList(
            Stage(c_in, c_out, layers + 1, double=i < last) for i, (c_in, c_out) in enumerate(zip(inputs, channels)))
        self.conv_norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder, key for key that of diffusers: 248 keys, 83,653,863 numbers at the default sizes.

    Images are in [-1, 1]; 2^(stages - 1), so 8 at the default, divides their side. Channels are multiples of 32.
    No scale is applied here: multiply by SD_VAE_SCALE after encoding, divide by it before decoding.
    """

    def __init__(self, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4):
        super().__init__()
        self.encoder = Encoder(list(block_out_channels), layers_per_block, latent_channels)
        self.decoder = Decoder(list(block_out_channels), layers_per_block, latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x):
        """Images x (B, 3, H, W) in [-1, 1] -> mean and logvar of the latents, (B, latent_channels, H/8, W/8) each.

        A latent is mean + exp(logvar / 2) * noise. PRIOR: logvar is clamped to [-30, 20], as latent diffusion does.
        """
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z):
        """Unscaled latents z (B, latent_channels, h, w) -> images (B, 3, 8h, 8w), about [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(z))


# ---------------------------------------------------------------------------------------------------------------------
# Files of weights. They come from strangers: nothing in them is run, and a net gets all of a file or nothing.
# ---------------------------------------------------------------------------------------------------------------------

SAFETENSORS_TYPES = {  # of the format's types, those in which weights are published
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
SAFETENSORS_HEADER = 1 << 20  # bytes. OURS: the format allows 100 MB; XL/2's 292 names take 35 kB
WRAPPERS = "module", "_orig_mod"  # what DistributedDataParallel and torch.compile put into names
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Bounded(io.BufferedReader):
    """A file that is never asked for more bytes than it has left, since Python sets room aside for them first: a
    damaged pickle of 1 kB may ask for 4 GB."""

    def read(self, size=-1):
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def read_torch_file(path):
    """What torch.save wrote, memory-mapped where the file is of the new kind. Runs no code of the file.

    OURS: the checksums in a file of the new kind must be right, so one saved with set_crc32_options(False) is refused.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:  # torch maps such a file without a look at its checksums
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its parts are compressed, which torch.save never does")
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of its part {damaged[:80]} is wrong")
    # The official DiT and SiT training scripts put their argparse.Namespace into each checkpoint; it is a plain record.
    with torch.serialization.safe_globals([argparse.Namespace]):
        if zipped:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with Bounded(io.FileIO(path)) as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def unique_keys(pairs):
    """A dict of a JSON object's pairs. ValueError if a key comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("its header has a name twice")
    return dict(pairs)


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, memory-mapped. ValueError, or another error, if it is not whole.

    The format: 8 bytes n, little-endian; n bytes of JSON, {name: {"dtype", "shape", "data_offsets": [begin, end]}}, and
    "__metadata__", which says nothing of the tensors; then the data, which the offsets count from and fill.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, SAFETENSORS_HEADER):
            raise ValueError(f"a header of {length} bytes is more than the file holds or than {SAFETENSORS_HEADER}")
        header = json.loads(file.read(length).decode(), object_pairs_hook=unique_keys)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writing to a tensor never reaches the file
    header.pop("__metadata__", None)
    tensors, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = SAFETENSORS_TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n <= size for n in [*shape, begin, end]):
            raise ValueError(f"{name!r:.80} has sizes that do not fit into the file")
        numbers = math.prod(shape)
        if begin != position or end - begin != numbers * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f"{name!r:.80} does not lie where its header says")
        tensors[name] = (torch.frombuffer(data, dtype=dtype, count=numbers, offset=8 + length + begin) if numbers
                         else torch.empty(0, dtype=dtype)).reshape(shape)
        position = end
    if 8 + length + position != size:
        raise ValueError(f"its header speaks of {position} bytes of data, the file has {size - 8 - length}")
    return tensors


def our_name(name):
    """A name as our nets have it: without wrappers' parts, and with today's names for old ones in the SD-VAE.

    PRIOR: the published sd-vae-ft-ema and -mse still name the linear layers of PixelAttention as OLD_ATTENTION does.
    """
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return re.sub(r"(\battentions\.\d+)\.(query|key|value|proj_attn)\b",
                  lambda match: f"{match[1]}.{OLD_ATTENTION[match[2]]}", name)


def read_weights(path):
    """The weights in a file: {name: tensor on the CPU}, memory-mapped where the format allows, with our nets' names.

    path: .safetensors, or anything else for what torch.save wrote: a state dict, or a dict that has one at "ema", else
    "model", else "state_dict". Raises ValueError, one sentence with the file's name: unreadable, damaged, with pickled
    objects that are no tensors, or no dict of tensors.
    """
    try:
        state = read_safetensors(path) if str(path).endswith(".safetensors") else read_torch_file(path)
        for key in ("ema", "model", "state_dict"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
                break
        if not isinstance(state, dict) or not state:
            raise ValueError("it holds no dict of tensors")
        weights = {}
        for name, tensor in state.items():
            plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
            readable = type(name) is str and name.isascii() and name.isprintable()  # errors will print it
            if not readable or not plain or tensor.is_quantized or tensor.is_meta:
                raise ValueError(f"its entry {name!r:.80} is no plain tensor")
            name, tensor = our_name(name), tensor.detach()
            if name in weights:
                raise ValueError(f"it holds {name!r:.80} twice")
            if "attentions." in name and tensor.shape[2:] == (1, 1):  # once a 1x1 convolution, (C, C, 1, 1)
                tensor = tensor.flatten(1)
            weights[name] = tensor
        return weights
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name another file.") from error
    except Exception as error:  # a damaged file raises nearly anything, in torch, zipfile and json
        if pickled := re.search(r"GLOBAL (\S{1,80})", str(error)):
            reason = f"it holds a pickled {pickled[1]}, which is no tensor"
        elif isinstance(error, pickle.UnpicklingError):  # torch's own text advises to run the file's code
            reason = "what it pickled is broken"
        else:
            reason = str(error).split("\n")[0][:200] or type(error).__name__
        reason = reason.encode("ascii", "backslashreplace").decode()
        raise ValueError(
            f"{path} is damaged or no file of weights ({reason}): fetch it again, or name another.") from error


def dit_size(weights):
    """"hidden size D, depth N, patch size p" of the DiT in {name: tensor}, or None if it is none."""
    patches = weights.get("x_embedder.proj.weight")
    if patches is None or patches.ndim != 4:
        return None
    depth = len({name.split(".")[1] for name in weights if re.match(r"blocks\.\d+\.", name)})
    return f"hidden size {patches.shape[0]}, depth {depth}, patch size {patches.shape[3]}"


def load_weights(net, weights, source):
    """Copy weights {name: tensor}, as `read_weights` returns them, into a net that has exactly these names and shapes.

    Any precision goes into the net's own. source: the file's name, for the error. Raises ValueError before anything is
    copied: one sentence with the names that are missing, not expected, or of another shape.
    """
    state = net.state_dict()

    def some(names):
        return ", ".join(name[:120] for name in names[:4]) + (", ..." if len(names) > 4 else "")

    missing, unexpected = [n for n in state if n not in weights], [n for n in weights if n not in state]
    misshaped = [f"{n} is {tuple(weights[n].shape)}, not {tuple(state[n].shape)}" for n in state
                 if n in weights and weights[n].shape != state[n].shape]
    mistyped = [f"{n} is {weights[n].dtype}" for n in state
                if n in weights and weights[n].is_floating_point() != state[n].is_floating_point()]
    kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped, "of another type": mistyped}
    problems = [f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names]
    held, expected = dit_size(weights), dit_size(state)
    if held != expected:
        problems.insert(0, f"it holds {f'a DiT of {held}' if held else 'no DiT'}, expected is "
                           f"{f'one of {expected}' if expected else 'another network'}")
    if problems:
        raise ValueError(f"{source} does not fit the network: {'; '.join(problems)}. "
                         "Give the file that was made for this network, or name the network of this file.")
    net.load_state_dict(weights)

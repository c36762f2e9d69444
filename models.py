"""The networks, and the one convention that all files share: the linear path of flow matching (Lipman et al., arXiv
2210.02747; Liu et al., arXiv 2209.03003).

    x_t = (1 - t) x_0 + t eps          t = 0 is data, t = 1 is noise
    v   = E[dx_t/dt | x_t]             for one pair (x_0, eps) the derivative is eps - x_0
    x0_hat  = x_t - t v                eps_hat = x_t + (1 - t) v
    score   = -eps_hat / t             the gradient of log p_t(x_t)

    u(x_t, r, t) = 1/(t - r) * integral_r^t v(x_s, s) ds,   r <= t       the AVERAGE velocity of MeanFlow
    x_r = x_t - (t - r) u(x_t, r, t)                                     so one step is x_0 = eps - u(eps, 0, 1)
    Here x_s is not a straight line but the solution of dx/ds = v(x, s) through x_t: the sampling path.

A network with a single time, net(x_t, t=t), is a velocity field v: a teacher, or the fake branch of DMD. A network with
two_times=True, net(x_t, t=t, r=r), is an average velocity u: a student. At r = t, u is v. On images a student starts
from its teacher's weights; the students of toy2d.py have other sizes than their teacher, and start at random.
Times are tensors (B,). Networks take them by keyword only, and labels too, as y=, which the 2D network ignores.

Tags in all files: PAPER, from Cheng et al., arXiv 2511.08930; PRIOR, from earlier work; OURS, our choice, which the
paper does not state; DIFFERS, departs from a source; TRY, a place to play.
For the method, read up to DiT. The rest is for images.
"""

import argparse
import math
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from data import BadInput, blame

# --- Conversions: what leaves a network is a velocity; whoever wants x_0, eps or the score takes it from there --------


def expand_times(t, x):
    """Reshape times t (B,) to (B, 1, ..., 1), so that they multiply x (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x_0, eps, t):
    """x_t = (1 - t) x_0 + t eps, for data x_0 (B, ...), unit Gaussian noise eps of its shape, and t (B,) in [0, 1]."""
    t = expand_times(t, x_0)
    return (1 - t) * x_0 + t * eps


def x0_from_velocity(x_t, t, v):
    """x0_hat = x_t - t v: the mean of x_0 given x_t, if the velocity v there is exact. (B, ...), t (B,)."""
    return x_t - expand_times(t, x_t) * v


def eps_from_velocity(x_t, t, v):
    """eps_hat = x_t + (1 - t) v: the mean of eps given x_t, if the velocity v there is exact. (B, ...), t (B,)."""
    return x_t + (1 - expand_times(t, x_t)) * v


def score_from_velocity(x_t, t, v):
    """score = -eps_hat / t = -(x_t + (1 - t) v) / t, the gradient of log p_t at x_t. (B, ...), t (B,) in (0, 1]."""
    return -eps_from_velocity(x_t, t, v) / expand_times(t, x_t)


def with_labels(net, y):
    """net with its labels y (B,) in place; without labels, net as it is."""
    return net if y is None else partial(net, y=y)


# --- The 2D network --------------------------------------------------------------------------------------------------
#
# For du/dt (meanflow_td.py) dual numbers pass through it: a tensor x together with its tangent dx, a direction, and f
# turns the pair (x, dx) into (f(x), J dx), J being its Jacobian. Torch has a rule for each operation. Read `Linear` and
# `linear`, from further down, as torch's own: their rule is only faster.


def sinusoids(a, frequencies):
    """Features [a, sin(f a), cos(f a)] of each column of a (B, D), at K frequencies in rad/unit: (B, D (1 + 2K))."""
    phase = linear(a[:, :, None], frequencies[:, None]).flatten(1)  # a * frequencies, by a faster rule: (B, D K)
    return torch.cat([a, phase.sin(), phase.cos()], dim=1)


class VelocityMLP(nn.Module):
    """A residual MLP for points: the teacher, the student and the fake branch of the 2D toy. x_t (B, dim), t (B,) in
    [0, 1] -> v (B, dim); with two_times=True also r (B,), -> u. Labels y are ignored. depth: the number of hidden
    layers. ValueError where r is missing, or given to a network that has no place for it."""

    def __init__(self, dim, width, depth, two_times=False):
        super().__init__()
        self.two_times = two_times
        # OURS: a student differentiates through its time features, and du/dt grows with the highest frequency.
        # 2^5 pi/2 = 50 rad per unit of t is high enough to resolve small t, where the data's edges are decided, and low
        # enough to keep du/dt small. The points get features too: a plain MLP blurs the edges of the board.
        self.register_buffer("time_frequencies", math.pi / 2 * 2.0 ** torch.arange(6), persistent=False)
        self.register_buffer("space_frequencies", 2.0 ** torch.arange(3), persistent=False)
        time_features = 1 + 2 * len(self.time_frequencies)
        self.embed_x = Linear(dim * (1 + 2 * len(self.space_frequencies)), width)
        self.embed_t = Linear(time_features, width)
        if two_times:  # starts at zero: at first u does not depend on r
            self.embed_span = Linear(time_features, width, bias=False)
            nn.init.zeros_(self.embed_span.weight)
        self.hidden = nn.ModuleList(Linear(width, width) for _ in range(depth))
        self.out = Linear(width, dim)

    def layers(self, x_t, t, r):
        """What enters the first hidden layer, and what leaves each of them: a list of (B, width)."""
        if self.two_times != (r is not None):
            raise ValueError("a network of two times needs r=" if self.two_times else "r= needs a network of two times")
        time = self.embed_t(sinusoids(t[:, None], self.time_frequencies))  # (B, width)
        if self.two_times:
            time = time + self.embed_span(sinusoids((t - r)[:, None], self.time_frequencies))
        hidden = [self.embed_x(sinusoids(x_t, self.space_frequencies)) + time]  # (B, width)
        for layer in self.hidden:
            hidden.append(hidden[-1] + F.gelu(layer(hidden[-1]) + time))
        return hidden

    def forward(self, x_t, *, t, r=None, y=None):
        return self.out(self.layers(x_t, t, r)[-1])  # (B, dim)

    def features(self, x_t, *, t, y=None, taps):
        """What awd.py's discriminator reads: one (B, len(taps), width), with a token for each tapped layer. It is in a
        list because a DiT gives one for each tapped layer, with patches as tokens."""
        hidden = self.layers(x_t, t, None)
        return [torch.stack([hidden[1 + i] for i in taps], dim=1)]


# --- DiT, the diffusion transformer ----------------------------------------------------------------------------------
#
# Peebles & Xie, arXiv 2212.09748. SiT (Ma et al., arXiv 2401.08740) has its layers.
#
# An image becomes N tokens of D numbers:
#
#   image (B, C, H, W) --patches, + positions--> tokens (B, N, D) --> depth x block --> final layer --> (B, C, H, W)
#   c = embed(t) + embed(y)   (B, D)                        each block and the final layer read c
#
# What is special is how time and class condition a block. LayerNorm has no gain and bias of its own; a linear
# layer computes shift, scale and a gate for each branch from c ("adaLN"). That layer starts at zero ("-Zero"), so every
# gate is 0 and every block starts as the identity. The names of the parameters are the published checkpoints', so those
# load key for key. That is why a lone layer sometimes sits in a chain of one.


def chain(**layers):
    """Layers under the names that they have in the published files; where it is called, one after the other."""
    return nn.Sequential(OrderedDict(layers))


def at_least_fp32(x):
    """x in float32, or in float64 if it was in float64: half precision and integers go up, nothing goes down."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x, weight, bias=None):
    """W x + b, whose tangent is one product, W dx. Torch's rule adds a second, of x with a dW of zeros, as it does for
    all operations of a tensor that has a tangent with one that has none: by way of Python, slow for small tensors."""
    x, dx = forward_ad.unpack_dual(x)
    y = F.linear(x, weight, bias)
    return y if dx is None else forward_ad.make_dual(y, F.linear(dx, weight))


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def symmetric(f, x):
    """f(x), for an f whose Jacobian J is symmetric: softmax, or LayerNorm without a gain. Its tangent J dx is then
    J^T dx: the backward pass, one kernel, where torch's forward mode takes ten. With this and `Linear`, a pass with a
    tangent costs 2.4 plain ones, not 3.2 (33 M parameters, 256 tokens, one core)."""
    x, dx = forward_ad.unpack_dual(x)
    if dx is None:
        return f(x)
    y, backward = torch.func.vjp(f, x)
    return forward_ad.make_dual(y, *backward(dx))


def autocast_off(x):
    """A context in which autocast does not lower the precision of work on x's device; "meta" has no autocast."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, for q, k, v (B, heads, N, d) -> (B, heads, N, d). Where q carries a tangent, softmax
    is written out: torch's fused kernels have no forward-mode derivative (NotImplementedError, on the CPU too)."""
    if forward_ad.unpack_dual(q).tangent is None:
        return F.scaled_dot_product_attention(q, k, v)
    return symmetric(partial(torch.softmax, dim=-1), (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)) @ v


def sinusoid_angles(x, n):
    """Angles x * 10000^(-k/n), k = 0 .. n-1: times or positions x (N,) -> (N, n), in x's own precision."""
    k = torch.arange(n, dtype=x.dtype, device=x.device)
    return x[:, None] * torch.exp(-math.log(10000.0) * k / n)


def grid_positions(channels, side):
    """The fixed position vectors of a side x side grid of tokens, row by row: (1, side^2, channels). The first half of
    the channels holds the column, the second half the row, each as sines, then cosines."""
    i = torch.arange(side * side, dtype=torch.float64)  # float64: a table computed once can be exact
    angles = [sinusoid_angles(axis, channels // 4) for axis in (i % side, i // side)]  # column, row
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)[None].float()


class TimeEmbedder(nn.Module):
    """Times t (B,) -> (B, hidden_size): 128 cosines, 128 sines, two linear layers. Autocast is off: bf16 moves in steps
    of 0.004 just below 1, and a small t - r would be lost in them."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(Linear(256, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))

    def forward(self, t):
        angles = sinusoid_angles(at_least_fp32(t), 128)  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 256)
        with autocast_off(t):
            return self.mlp(waves.to(self.mlp[0].weight.dtype))  # (B, D)


def modulate(x, shift, scale):
    """LayerNorm(x) (1 + scale) + shift, for tokens x (B, N, D), shift and scale (B, D)."""
    norm = partial(F.layer_norm, normalized_shape=x.shape[-1:], eps=1e-6)
    return symmetric(norm, x) * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Multi-head attention, then an MLP, each shifted, scaled and gated by c (B, D). Tokens (B, N, D) both ways."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.num_heads = num_heads
        width = int(hidden_size * mlp_ratio)
        self.attn = chain(qkv=Linear(hidden_size, 3 * hidden_size), proj=Linear(hidden_size, hidden_size))
        self.mlp = chain(fc1=Linear(hidden_size, width), act=nn.GELU("tanh"), fc2=Linear(width, hidden_size))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        qkv = self.attn.qkv(modulate(x, shift_msa, scale_msa)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, N, 3, heads, d) -> each (B, heads, N, d)
        x = x + gate_msa[:, None] * self.attn.proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)
        return x + gate_mlp[:, None] * self.mlp(modulate(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) and condition c (B, D) -> image (B, out_channels, H, W)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.patch_size = patch_size
        self.linear = Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = self.linear(modulate(x, shift, scale))  # (B, N, p*p*C): the channel varies fastest within a token
        side, p = math.isqrt(x.shape[1]), self.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # (B, rows, columns, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, rows * p, columns * p)


class DiT(nn.Module):
    """The diffusion transformer, with one time (a teacher, a fake branch) or with two (a student).

    input_size, in_channels: of the square input, 32 and 4 for latents of 256 px images; patch_size divides input_size.
    hidden_size D: a multiple of 4 and of num_heads. num_classes: labels are below it; it is the null class of guidance.
    learn_sigma: twice the channels, the prediction and DiT's learned variance. two_times: embeds the span t - r too.

    OURS: the student's second time enters as t - r, like MeanFlow's (arXiv 2505.13447), and the LAST layer of its
    embedder starts at zero. A student that takes all other weights from its teacher therefore starts as its teacher.
    DIFFERS: the official code drops labels inside the network; here the training loop passes y = num_classes. Its
    pos_embed is a Parameter, ours a buffer: requires_grad_(True) on a copy of a frozen teacher must not free it."""

    checkpointing = compiling = False  # of all nets: less memory, less time, see `run`

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio=4.0,
                 num_classes=1000, learn_sigma=False, two_times=False):
        super().__init__()
        self.config = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels,
                           hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
                           num_classes=num_classes, learn_sigma=learn_sigma)  # all but two_times
        self.num_classes, self.two_times = num_classes, two_times
        self.register_buffer("pos_embed", grid_positions(hidden_size, input_size // patch_size))  # (1, N, D)
        self.x_embedder = chain(proj=nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size))
        self.t_embedder = TimeEmbedder(hidden_size)
        if two_times:
            self.span_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = chain(embedding_table=nn.Embedding(num_classes + 1, hidden_size))
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, 2 * in_channels if learn_sigma else in_channels)

        # PRIOR: as DiT's: Xavier for linear layers, normal(0, 0.02) for embedders, zero for adaLN and the last one
        for layer in self.modules():
            if isinstance(layer, (Linear, nn.Conv2d)):  # the patch layer is a linear layer on flattened patches
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                nn.init.zeros_(layer.bias)
        times = [self.t_embedder, self.span_embedder] if two_times else [self.t_embedder]
        for layer in [self.y_embedder.embedding_table, *(embedder.mlp[i] for embedder in times for i in (0, 2))]:
            nn.init.normal_(layer.weight, std=0.02)
        zero = "adaLN_modulation.1.weight", "final_layer.linear.weight", "span_embedder.mlp.2.weight"
        for name, weight in self.named_parameters():
            if name.endswith(zero):
                nn.init.zeros_(weight)

    def embed(self, x_t, t, y, r):
        """Tokens (B, N, D) of x_t and the condition c (B, D) of times and labels."""
        if self.two_times != (r is not None):
            raise ValueError("a net with two_times=True needs r" if self.two_times else "r needs two_times=True")
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        if self.two_times:
            span = at_least_fp32(t) - at_least_fp32(r)
            # minus the features of no span, so that at r = t this part is silent, after training too
            c = c + (self.span_embedder(span) - self.span_embedder(torch.zeros_like(span)))
        # contiguous: of transposed tokens torch.compile (2.13, CPU) makes gradients that are wrong by a tenth
        return self.x_embedder(x_t).flatten(2).transpose(1, 2).contiguous() + self.pos_embed, c

    def forward(self, x_t, *, t, y, r=None):
        """The network's output at x_t (B, C, H, W), labels y (B,) int64: (B, out_channels, H, W). t (B,), and r (B,)
        where there are two times, are in the net's own clock: 0 .. 999 for a published DiT, [0, 1] for SiT, [0, CLOCK]
        for nets trained here. The wrapper knows what the output means (see `Velocity`)."""
        x, c = self.embed(x_t, t, y, r)
        for block in self.blocks:
            x = self.run(block, x, c)
        return self.final_layer(x, c)

    def features(self, x_t, *, t, y, taps):
        """The tokens after each of the blocks `taps`, indices from 0: a list of (B, N, D). No later block is run."""
        x, c = self.embed(x_t, t, y, None)
        tokens = [x]
        for block in self.blocks[: max(taps) + 1]:
            tokens.append(self.run(block, tokens[-1], c))
        return [tokens[1 + i] for i in taps]

    def run(self, block, x, c):
        """block(x, c). checkpointing: keep what enters the block, and compute it again in the backward pass, for a
        third more time. compiling: by torch.compile, which would lose du/dt's tangents."""
        if forward_ad.unpack_dual(x).tangent is not None:
            return block(x, c)
        call = partial(compiled_block(), block) if self.compiling else block
        if self.checkpointing and torch.is_grad_enabled():  # nothing in a block is random: there is no state to keep
            return checkpoint(call, x, c, use_reentrant=False, preserve_rng_state=False)
        return call(x, c)


@cache
def compiled_block():
    """DiTBlock's forward(block, x, c), compiled: once for all blocks of a size, and again for each kind of pass."""
    torch._dynamo.config.recompile_limit = 64  # stage 2 has more kinds than the 8 after which torch gives up
    return torch.compile(DiTBlock.forward)


def student_from_teacher(teacher):
    """A student in its teacher's wrapper, on its device, that answers as the unguided teacher does, whatever r is.
    Only the first layer of the new embedder is random (torch's global generator); the last one is zero."""
    net = DiT(**teacher.net.config, two_times=True)
    net.load_state_dict({**net.state_dict(), **teacher.net.state_dict()})
    return type(teacher)(net).to(teacher.net.pos_embed.device)


# --- Wrappers: a DiT of any origin, made to answer in our convention. Foreign clocks and answers end here -------------

# OURS: a DiT's fastest sinusoid turns 1 rad per unit of its clock, so a t in [0, 1] hardly moves any. 30 rad lets it
# tell times apart, and keeps the tangent d_t u small, which a student differentiates through.
CLOCK = 30.0


class Velocity(nn.Module):
    """A DiT that answers in our convention: v(x_t, t), or u(x_t, r, t) if it has two times. Its clock is CLOCK t.
    This one wraps teachers, students and fake branches trained here; SiTTeacher and DiTTeacher, by other `to_net` and
    `to_velocity`, those of published weights. w, cfg_channels: a teacher's guidance, see `velocity`."""

    times = 0.0, 1.0  # between which it knows its velocity; DiTTeacher has others

    def __init__(self, net):
        super().__init__()
        self.net, self.w, self.cfg_channels = net, 1.0, 3

    def describe(self):
        """What a file has to say of this net, so that `meanflow_td.load_net` can make it again: a dict."""
        return {"wrapper": type(self).__name__, "two_times": self.net.two_times, **self.net.config}

    def to_net(self, x_t, t, r=None):
        """x_t, t and r as the net takes them."""
        return x_t, CLOCK * t, None if r is None else CLOCK * r

    def to_velocity(self, answer, x_t, t):
        """v, or u, from the first C channels of the net's answer."""
        return answer

    def answer(self, x, time, y, r, w, cfg_channels):
        """The net's own answer (B, out_channels, H, W), guided as in `velocity`, in at least float32."""
        if w == 1:
            return at_least_fp32(self.net(x, t=time, y=y, r=r))
        y_both = torch.cat([y, torch.full_like(y, self.net.num_classes)])  # both in one batch
        both = self.answer(torch.cat([x, x]), torch.cat([time, time]), y_both, r=None, w=1, cfg_channels=0)
        cond, null = both.chunk(2)
        guided = null + w * (cond - null)
        return torch.cat([guided[:, :cfg_channels], cond[:, cfg_channels:]], dim=1)

    def velocity(self, x_t, *, t, y, r=None, w=1.0, cfg_channels=3):
        """Guided velocity v_w = v_null + w (v_cond - v_null): x_t (B, C, H, W), t (B,) in [0, 1], y (B,) -> like x_t.
        w: guidance scale; 1 is none, and then the null class costs nothing (Ho & Salimans, arXiv 2207.12598).
        cfg_channels: number of guided channels. PRIOR: 3 of 4 in the official code of DiT and SiT, and in FIDs."""
        x, time, r = self.to_net(x_t, t, r)
        answer = self.answer(x, time, y, r, w, cfg_channels)
        return self.to_velocity(answer[:, : x_t.shape[1]], x_t, t)  # learned variances, if any, are not for us

    def forward(self, x_t, *, t, y, r=None):
        """v_w (B, C, H, W) with the wrapper's own w and cfg_channels; with r (B,), r <= t, a student's u(x_t, r, t)."""
        return self.velocity(x_t, t=t, y=y, r=r, w=self.w if r is None else 1.0, cfg_channels=self.cfg_channels)

    def features(self, x_t, *, t, y, taps):
        """The net's tokens after the blocks `taps`, without guidance: a list of (B, N, D)."""
        x, time, _ = self.to_net(x_t, t)
        return self.net.features(x, t=time, y=y, taps=taps)


class SiTTeacher(Velocity):
    """A SiT (arXiv 2401.08740), a teacher or its student, in our convention. Its clock runs the other way:

        SiT    x = t x_0 + (1 - t) eps      v_SiT = x_0 - eps      t = 0 noise, t = 1 data
        here   x = (1 - t) x_0 + t eps      v     = eps - x_0      t = 0 data,  t = 1 noise

    Exchanging t and 1 - t makes the paths equal; the velocity, a derivative in t, changes sign:
        v(x_t, t) = -v_SiT(x_t, 1 - t)      u(x_t, r, t) = -u_SiT(x_t, 1 - r, 1 - t)"""

    def to_net(self, x_t, t, r=None):
        return x_t, 1 - t, None if r is None else 1 - r

    def to_velocity(self, answer, x_t, t):
        return -answer


DIT_STEPS = 1000  # the published DiT's diffusion has k = 0 .. 999


class DiTTeacher(Velocity):
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

    A student of it (net with two_times) takes (k(t), k(r)), and the SAME formula turns its answer into u:
    u = (eps_hat - x_t) / (1 - t). Compared with a SiT, this costs:
    - du/dt passes through k. One unit of t is at least 176 steps, 15,757 at t_999; the embedder's fastest wave turns by
      1 rad in one step, where a SiT's turns by 1 rad in all of [0, 1]. And du/dt jumps at every step.
    - Near t = 1 the divisor amplifies errors 158 times, and one-step samples start there. So the net runs outside
      autocast, and the rest is done in float32 at least.
    - Beyond the ends t is clamped, so du/dt has no d_t u there: draw the times of training in `times`."""

    def __init__(self, net):
        super().__init__(net)
        betas = torch.linspace(1e-4, 2e-2, DIT_STEPS, dtype=torch.float64)  # Ho et al., arXiv 2006.11239
        alpha_bar = (1 - betas).cumprod(0)  # alpha_k^2
        # No buffer: .to(torch.bfloat16) on the module must not round it. Minus the log-SNR, which rises with k.
        self.noise_to_signal = torch.log((1 - alpha_bar) / alpha_bar)  # (1000,)
        self.times = tuple((self.noise_to_signal[[0, -1]] / 2).sigmoid().tolist())  # t_0 and t_999

    def step_of(self, t):
        """Clamp t (B,) to [t_0, t_999]; return it and the fractional step k (B,) in [0, 999] that belongs to it."""
        t = at_least_fp32(t)
        table = self.noise_to_signal.to(t)
        # log(sigma^2 / alpha^2) = 2 log(t / (1 - t))   <=>   t = sigmoid(log(sigma^2 / alpha^2) / 2)
        t = t.clamp(*(table[[0, -1]] / 2).sigmoid())
        level = 2 * torch.logit(t)
        above = torch.searchsorted(table, level).clamp(1, DIT_STEPS - 1)
        k = above - 1 + (level - table[above - 1]) / (table[above] - table[above - 1])
        return t, k.clamp(0, DIT_STEPS - 1)  # rounding in float32 alone could give 999.001

    def to_net(self, x_t, t, r=None):
        t, k = self.step_of(t)
        t = expand_times(t, x_t)
        return x_t / torch.sqrt((1 - t) ** 2 + t**2), k, None if r is None else self.step_of(r)[1]

    def to_velocity(self, answer, x_t, t):
        return (answer - x_t) / (1 - expand_times(self.step_of(t)[0], x_t))

    def velocity(self, x_t, **options):
        with autocast_off(x_t):
            return super().velocity(x_t, **options)

    def respaced(self, steps):
        """The steps k (steps,), rising, that a shorter DDPM takes (PRIOR: arXiv 2102.09672), and alpha_bar there."""
        if not 2 <= steps <= DIT_STEPS:
            raise ValueError(f"the DDPM takes 2 to {DIT_STEPS} steps, not {steps}")
        strides = torch.full((steps - 1,), (DIT_STEPS - 1) / (steps - 1), dtype=torch.float64)
        k = F.pad(strides, (1, 0)).cumsum(0).round().long()  # summed, as DiT does: where k is a half, rounding decides
        return k, torch.sigmoid(-self.noise_to_signal[k])

    def denoise(self, x, y, i, steps):
        """One step of the DDPM with learned variance: p(x_{i-1} | x_i) is Gaussian. Returns mean, log-variance, x0_hat.

        x (B, C, H, W): x_vp at the i-th step of `respaced`, i from 0; y (B,). The results are like x. With the
        alpha_bar a of this step, a' of the one below (1 if there is none) and beta = 1 - a / a':
            x0_hat  = x / sqrt(a) - sqrt(1 / a - 1) eps_hat
            mean    = (beta sqrt(a') x0_hat + (1 - a') sqrt(a / a') x) / (1 - a)            arXiv 2006.11239, eq. 7
            log var = f log beta + (1 - f) log(beta (1 - a') / (1 - a)), f = (out + 1) / 2  arXiv 2102.09672, eq. 15
        PRIOR: the official code guides eps_hat alone, and takes the conditional row's f. At the last step a' = 1, and
        the second logarithm would be infinite: that of the next step up stands in its place."""
        ks, alpha_bar = self.respaced(steps)
        table, channels = [1.0, *alpha_bar.tolist()], x.shape[1]
        k = torch.full((len(x),), float(ks[i]), device=x.device)
        with autocast_off(x):
            out = self.answer(x, k, y, None, self.w, min(self.cfg_channels, channels))
        if out.shape[1] != 2 * channels:
            raise ValueError("the DDPM needs a net that predicts the variance too (learn_sigma=True)")
        eps_hat, f = out[:, :channels], (out[:, channels:] + 1) / 2
        a_below, a = table[i : i + 2]
        beta = 1 - a / a_below
        x0_hat = x / a**0.5 - (1 / a - 1) ** 0.5 * eps_hat
        mean = (beta * a_below**0.5 * x0_hat + (1 - a_below) * (a / a_below) ** 0.5 * x) / (1 - a)
        a_below, a = table[max(i, 1) : max(i, 1) + 2]
        least = (1 - a / a_below) * (1 - a_below) / (1 - a)
        return mean, f * math.log(beta) + (1 - f) * math.log(least), x0_hat

    @torch.no_grad()
    def sample_ddpm(self, eps, y, steps=250, *, generator):
        """Samples x_0 (B, C, H, W) of the DiT's own sampler from noise eps, labels y (B,), with the wrapper's w.
        steps: 2 to 1000; PRIOR: 250, behind the published FID 2.27 at w = 1.5. generator: on the CPU."""
        x = at_least_fp32(eps)  # at k = 999 the path is noise, but for 0.6 % of x_0
        for i in reversed(range(steps)):
            x, log_variance, _ = self.denoise(x, y, i, steps)
            if i > 0:
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
                x = x + (log_variance / 2).exp() * noise
        return x


@torch.no_grad()
def sample_sde(velocity, eps, y=None, steps=250, *, generator):
    """Samples x_0 (B, ...) from noise eps by SiT's Euler-Maruyama (arXiv 2401.08740), `steps` calls of
    velocity(x_t, t=t), with y=y if labels are given. generator: on the CPU. ValueError for steps < 2.

    The SDE has the densities p_t of the ODE, for any g(t) >= 0, and runs from t = 1 down to 0 (score = -eps_hat / t):
        dx = (v - g/2 score) dt + sqrt(g) dW          with g = 2 t:   dx = (v + eps_hat) dt + sqrt(2 t) dW
    PRIOR: SiT's published code has g = 2 t ("sigma") and 250 steps. All but the last are equal and end at t = 0.04. The
    last goes to 0 without noise, and its error does not shrink with more steps."""
    if steps < 2:
        raise ValueError(f"the SDE sampler takes at least 2 steps, not {steps}")
    velocity, x, last = with_labels(velocity, y), eps, 0.04
    dt = (1 - last) / (steps - 1)
    for k in range(steps):
        t = x.new_full((len(x),), 1 - k * dt)
        v = velocity(x, t=t)
        drift = v + eps_from_velocity(x, t, v)
        if k < steps - 1:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            x = x - drift * dt + (2 * (1 - k * dt) * dt) ** 0.5 * noise
    return x - drift * last


# --- The autoencoder of Stable Diffusion -----------------------------------------------------------------------------
#
# Rombach et al., arXiv 2112.10752: images of 3 channels to latents of 4, 8 times smaller. The teachers for ImageNet
# live in these latents. Frozen; it only has to match diffusers' outputs and parameter names.
#
#   encode   3 --conv--> stage --halve--> stage --halve--> stage --halve--> stage --> middle --conv--> mean, logvar
#   decode   z --conv--> middle --> stage --double--> stage --double--> stage --double--> stage --conv--> 3
#   stage    2 residual blocks (decoder: 3)          middle   residual block, attention over all pixels, residual block

conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)
group_norm = partial(nn.GroupNorm, 32, eps=1e-6)
RESIZE = {  # what halves and what doubles the side. PRIOR: before halving, zeros are added below and to the right only
    "downsamplers": lambda c: chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)),
    "upsamplers": lambda c: chain(repeat=nn.Upsample(scale_factor=2), conv=conv3(c, c)),
}  # fmt: skip


class ResnetBlock(nn.Module):
    """x + conv(conv(x)), (B, c_in, H, W) -> (B, c_out, H, W); x goes through a 1x1 convolution where these differ."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), conv3(c_in, c_out)
        self.norm2, self.conv2 = group_norm(c_out), conv3(c_out, c_out)
        self.conv_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)  # Identity adds no key

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Middle(nn.Module):
    """Residual block, self-attention of all pixels with one head, residual block. (B, C, H, W) both ways."""

    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels), ResnetBlock(channels, channels)])
        linear = partial(nn.Linear, channels, channels)
        self.attentions = nn.ModuleList([chain(group_norm=group_norm(channels), to_q=linear(), to_k=linear(),
                                               to_v=linear(), to_out=nn.Sequential(linear()))])  # fmt: skip

    def forward(self, x):
        x = self.resnets[0](x)
        attn = self.attentions[0]
        pixels = attn.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1 head, H*W, C)
        h = attn.to_out(attention(attn.to_q(pixels), attn.to_k(pixels), attn.to_v(pixels)))
        return self.resnets[1](x + h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


def stages(channels, layers, resize):
    """A stage for each of `channels`: `layers` residual blocks and, in all but the last, one of RESIZE."""
    made = []
    for c_in, c in zip([channels[0], *channels], channels):
        made.append(chain(resnets=nn.Sequential(*(ResnetBlock(c_in if k == 0 else c, c) for k in range(layers)))))
        if len(made) < len(channels):
            made[-1].add_module(resize, nn.Sequential(RESIZE[resize](c)))
    return nn.Sequential(*made)


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder, key for key that of diffusers. Images are in [-1, 1]; `factor`, 8 at the default,
    divides their side. A diffusion model sees `scale` times a latent, of about unit variance."""

    scale = 0.18215  # PRIOR: latent diffusion's

    def __init__(self, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4):
        super().__init__()
        self.factor = 2 ** (len(block_out_channels) - 1)
        first, last = block_out_channels[0], block_out_channels[-1]
        self.encoder = chain(
            conv_in=conv3(3, first), down_blocks=stages(block_out_channels, layers_per_block, "downsamplers"),
            mid_block=Middle(last), conv_norm_out=group_norm(last), act=nn.SiLU(),
            conv_out=conv3(last, 2 * latent_channels))  # fmt: skip
        self.decoder = chain(
            conv_in=conv3(latent_channels, last), mid_block=Middle(last),
            up_blocks=stages(block_out_channels[::-1], layers_per_block + 1, "upsamplers"),
            conv_norm_out=group_norm(first), act=nn.SiLU(), conv_out=conv3(first, 3))  # fmt: skip
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x):
        """Images x (B, 3, H, W) in [-1, 1] -> mean and logvar of the latents, (B, latent_channels, H/8, W/8) each.
        PRIOR: logvar is clamped to [-30, 20], as latent diffusion does."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):  # see `decode`
            mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z):
        """Unscaled latents z (B, latent_channels, h, w) -> images (B, 3, 8h, 8w), about [-1, 1] and not clamped.
        OURS: convolutions may round to TF32 on a GPU: images move by 0.2 % of their norm, a pass takes a fifth of the
        time, and cuDNN is not tempted to take 33 GB (measured on an H200, random weights)."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            return self.decoder(self.post_quant_conv(z))


# --- Published weights. Fetched on first use; nothing in a file is run ------------------------------------------------

URLS = {
    "SiT-XL/2": "https://huggingface.co/nyu-visionx/SiT-collections/resolve/main/SiT-XL-2-256.pt",
    "DiT-XL/2": "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
    "vae-ema": "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.bin",
    "vae-mse": "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.bin",
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth",
}  # fmt: skip


def weights_path(name, fetch=True):
    """The file of one of URLS, in torch.hub's cache, fetched if it is not there (fetch=False: only look); or `name`
    itself, a file of your own. BadInput says where a file comes from and where it goes."""
    if name not in URLS:
        if not Path(name).is_file():
            raise BadInput(f"{name}: there is no such file; the published weights are called {', '.join(URLS)}")
        return Path(name)
    url = URLS[name]  # both VAEs have the same file name there
    path = Path(torch.hub.get_dir(), "checkpoints", f"{name.replace('/', '-')}-{url.rsplit('/', 1)[1]}")
    with blame(f"{name} can't be fetched", f"download {url} and put it at {path}"):
        if not path.exists():
            if not fetch:
                raise OSError("not tried")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
    return path


def load_weights(build, name):
    """build(state), frozen, with the weights `state`, {name: tensor}, of `weights_path(name)`, which need exactly its
    names and shapes. In the file they may lie under "ema", "model" or "state_dict". BadInput: another net's."""
    path = weights_path(name)
    with blame(f"{path} holds no weights", "remove it, so that it is fetched again, or name another file"):
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's and SiT's own scripts save one along
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(next((state[key] for key in ("ema", "model", "state_dict") if key in state), state))
    with blame(f"{path} holds the weights of another network", "name another file"):
        net = build(state)
        net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def load_teacher(name):
    """A frozen published teacher in our convention: one of URLS, or a file with SiT or DiT in its name. The name tells
    which of the two clocks it follows, since weights don't; the sizes are read from the shapes."""
    own = name if name in URLS else Path(name).name
    kinds = [kind for kind in (SiTTeacher, DiTTeacher) if kind.__name__[:3] in own]
    if len(kinds) != 1:
        raise BadInput(f"{name}: a teacher's file needs SiT or DiT in its name, whose clocks differ: SiT-XL-2-256.pt")

    def build(state):
        hidden_size, in_channels, _, patch_size = state["x_embedder.proj.weight"].shape
        return DiT(
            math.isqrt(state["pos_embed"].shape[1]) * patch_size, patch_size, in_channels, hidden_size,
            depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
            num_heads=16 if hidden_size == 1152 else max(1, hidden_size // 64),  # PRIOR: DiT's Table 1; not in a shape
            mlp_ratio=len(state["blocks.0.mlp.fc1.bias"]) / hidden_size,
            num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
            learn_sigma=len(state["final_layer.linear.bias"]) == 2 * in_channels * patch_size**2)  # fmt: skip

    return kinds[0](load_weights(build, name))


def load_vae(name):
    """Stable Diffusion's autoencoder, frozen: "vae-ema", "vae-mse", or a file. Sizes are read from the shapes."""

    def build(state):
        # PRIOR: the published files carry older names for the attention's linear layers, once 1x1 convolutions
        old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        for key in [key for key in state if "attentions" in key]:
            *start, layer, end = key.split(".")
            state[".".join([*start, old.get(layer, layer), end])] = state.pop(key).squeeze()
        # one bias for each of the encoder's residual blocks, stage after stage
        biases = sorted(key for key in state if key.startswith("encoder.down_blocks") and key.endswith("conv1.bias"))
        layers = sum(".down_blocks.0." in key for key in biases)
        return AutoencoderKL([len(state[key]) for key in biases[::layers]], layers, len(state["post_quant_conv.bias"]))

    return load_weights(build, name)

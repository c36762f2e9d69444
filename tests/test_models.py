"""The networks, the teachers, their samplers and the autoencoder, against official answers and closed forms.

"Official" is what facebookresearch/DiT (ed81ce2), willisma/SiT (947f95b) and diffusers' AutoencoderKL answered with the
weights of helpers.fill. A test takes the module m, so that a copy with one of the faults in BROKEN can be given to it.
"""

import argparse
import hashlib
import json
import math
import re
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GaussianMixture, broken, fill, wave
from torch import nn

import models
from data import BadInput, rng
from meanflow_td import meanflow_target

SIGMA = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=4, num_classes=10,
             learn_sigma=True)  # fmt: skip
PLAIN = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=64, depth=3, num_heads=2, num_classes=7)
WRAPPERS = ["Velocity", "SiTTeacher", "DiTTeacher"]
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))  # the DiT's 1000 steps, and their times in our convention
T_STEPS = torch.from_numpy((1 - ALPHA_BAR) ** 0.5 / (ALPHA_BAR**0.5 + (1 - ALPHA_BAR) ** 0.5))
POINT = wave(2, 4, 8, 8).double(), torch.tensor([0.9, 0.4]).double(), torch.tensor([0.2, 0.1]).double()  # x_t, t, r

# Of an official output: its shape, mean, standard deviation, and the first three numbers and the last
DIT_SIGMA = [2, 8, 8, 8], -0.003678258745, 0.351088419357, [0.249712676, -0.442145586, 0.181446388, -0.133130908]
DIT_PLAIN = [2, 3, 8, 8], -0.005286172555, 0.344498413674, [-0.394859076, 0.640705884, -0.582850158, -0.087593734]
SIT_SIGMA = [2, 4, 8, 8], -0.017166445543, 0.352507871982, [0.251181751, -0.443864346, 0.182730407, -0.079685405]
SIT_PLAIN = [2, 3, 8, 8], -0.008465039380, 0.383595543238, [-0.441962749, 0.664041519, -0.571786106, -0.184273243]
VAE_MEAN = [1, 4, 16, 16], -0.039506900862, 0.223843009925, [-0.078841962, -0.146595359, -0.180452153, -0.045368437]
VAE_LOGVAR = [1, 4, 16, 16], 0.025051889592, 0.222713353389, [0.078315333, 0.120986968, 0.079484776, 0.055526581]
VAE_IMAGE = [1, 3, 32, 32], -0.008383916601, 0.626174432299, [-0.03744079, -0.03929271, -0.04036373, -0.041471954]
OFFICIAL_DDPM = [  # steps, i, k, then mean and std of: the posterior's mean, its log-variance, x0_hat
    (250, 0, 0, (0.001539728, 0.706006283), (-9.286730418, 0.027114518), (0.001539728, 0.706006283)),
    (250, 249, 999, (0.002805864, 0.731817170), (-2.557229503, 0.000000595), (2.909295693, 116.468325974)),
    (50, 1, 20, (0.002710309, 0.705041217), (-7.137402761, 0.726487473), (0.002732014, 0.705026396))]  # fmt: skip


def assert_official(out, shape, mean, std, numbers):
    """An output has an official summary, to 1e-4: float32 at t = 999 gives no more."""
    flat = out.detach().double().flatten()
    found = [flat.mean(), flat.std(), *flat[:3], flat[-1]]
    assert list(out.shape) == shape and found == pytest.approx([mean, std, *numbers], abs=3e-5, rel=1e-4)


def batch(config):
    """Input and labels of the official runs; the second label is the null class."""
    return wave(2, config["in_channels"], 8, 8), torch.tensor([1, config["num_classes"]])


@pytest.mark.parametrize("config, dit, sit", [(SIGMA, DIT_SIGMA, SIT_SIGMA), (PLAIN, DIT_PLAIN, SIT_PLAIN)])
def test_official_dit_and_sit(config, dit, sit):
    """The raw net at a DiT's and at a SiT's times, and v(x_t, t) = -v_SiT(x_t, 1 - t) of the wrapper."""
    (x, y), net, t_sit = batch(config), fill(models.DiT(**config)), torch.tensor([0.9, 0.05])
    assert_official(net(x, t=torch.tensor([999.0, 37.0]), y=y), *dit)
    assert_official(net(x, t=t_sit, y=y)[:, : x.shape[1]], *sit)
    assert_official(-models.SiTTeacher(net).velocity(x, t=1 - t_sit, y=y), *sit)
    assert net.blocks[0].mlp.act.approximate == "tanh"  # these numbers are too coarse to tell


def test_state_dicts():
    """Of XL/2, S/2 and the SD-VAE: how many names and numbers, and a digest of names and shapes, as published."""
    with torch.device("meta"):
        dits = [models.DiT(32, 2, 4, *sizes, learn_sigma=True) for sizes in ((1152, 28, 16), (384, 12, 6))]
        states = [net.state_dict() for net in (*dits, models.AutoencoderKL())]
    counts = [(len(state), sum(entry.numel() for entry in state.values())) for state in states]
    assert counts == [(292, 675_129_632), (132, 32_963_360), (248, 83_653_863)]
    listed = [json.dumps(sorted([name, list(entry.shape)] for name, entry in state.items())) for state in states]
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in listed]
    assert digests[0] == "0b2e75a339048060" and digests[2] == "6286db08f9cfd63c"


@pytest.mark.parametrize("kind", ["VelocityMLP", "DiT"])
def test_student(kind, m=models):
    """With its teacher's weights it is its teacher; a DiT, whatever it has learned, still is at r = t, to the bit."""
    sizes = PLAIN if kind == "DiT" else dict(dim=3, width=16, depth=3)
    teacher, student = fill(getattr(m, kind)(**sizes)), getattr(m, kind)(**sizes, two_times=True)
    (x, y), t, r = batch(PLAIN), torch.tensor([0.9, 0.4]), torch.tensor([0.2, 0.1])
    x = x if kind == "DiT" else x[:, :, 0, 0]
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    assert torch.equal(student(x, t=t, r=r, y=y), teacher(x, t=t, y=y))
    state = fill(student).state_dict()
    teacher.load_state_dict({name: state[name] for name in teacher.state_dict()})
    assert kind == "VelocityMLP" or torch.equal(student(x, t=t, r=t, y=y), teacher(x, t=t, y=y))
    assert (student(x, t=t, r=r, y=y) - teacher(x, t=t, y=y)).abs().max() > 1e-3
    for call in (lambda: student(x, t=t, y=y), lambda: teacher(x, t=t, r=t, y=y)):
        with pytest.raises(ValueError):
            call()


def test_features():
    """Tokens after the tapped blocks, in the order asked, with a gradient to x_t; no later block is run."""
    net, (x, y), t, ran = fill(models.DiT(**PLAIN)).requires_grad_(False), batch(PLAIN), torch.tensor([0.9, 0.4]), []
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
    second, first = net.features(x.requires_grad_(True), t=t, y=y, taps=(1, 0))
    c = net.t_embedder(t) + net.y_embedder(y)
    assert ran == [0, 1] and second.requires_grad and torch.equal(net.blocks[1](first, c), second)
    assert torch.equal(net.final_layer(net.blocks[2](second, c), c), net(x, t=t, y=y))


def test_forward_rules(m=models):
    """Value and tangent of Linear, symmetric and attention, in fp64."""
    layer, norm = m.Linear(6, 5).double(), nn.LayerNorm(6, elementwise_affine=False).double()
    written_out = lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) / 6**0.5, -1) @ v  # noqa: E731
    for ours, theirs, inputs in ((layer, partial(F.linear, weight=layer.weight, bias=layer.bias), 1),
                                 (partial(m.symmetric, norm), norm, 1), (m.attention, written_out, 3)):  # fmt: skip
        x, dx = torch.randn(2, inputs, 2, 3, 4, 6, generator=rng(0, "x"), dtype=torch.float64)
        expected = torch.func.jvp(theirs, tuple(x), tuple(dx))
        torch.testing.assert_close(torch.func.jvp(ours, tuple(x), tuple(dx)), expected)
        torch.testing.assert_close(ours(*x), expected[0])


@pytest.mark.parametrize("kind", WRAPPERS)
def test_du_dt(kind):
    """Of a wrapped DiT of two times, du/dt is the central difference along the path, in fp64."""
    student = getattr(models, kind)(fill(models.DiT(**SIGMA, two_times=True)).double())
    (x, t, r), y, v = POINT, torch.tensor([1, 3]), wave(2, 4, 8, 8, phase=1.0).double()
    h = 1e-7 if kind == "DiTTeacher" else 1e-5  # k(t) bends once in a thousandth of t, and u turns in 1 of 999
    _, du_dt = meanflow_target(student, x, v, r=r, t=t, y=y)
    difference = student(x + h * v, t=t + h, r=r, y=y) - student(x - h * v, t=t - h, r=r, y=y)
    torch.testing.assert_close(du_dt, difference / (2 * h), rtol=1e-5, atol=1e-6 * du_dt.abs().max().item())


def exact_sit(x, *, t, y, r=None, std):
    """A perfect SiT for data N(0, std^2), in SiT's convention: E[x_0 - eps | x = t x_0 + (1 - t) eps]."""
    t = t.reshape(-1, 1, 1, 1)
    return (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t) ** 2) * x


def exact_dit(x, *, t, y, r=None, std):
    """A perfect DiT for data N(0.7, std^2), with the variance of each of 250 steps; its k may be fractional."""
    log_snr = np.interp(t.numpy(), np.arange(1000), np.log(ALPHA_BAR / (1 - ALPHA_BAR)))
    a = torch.from_numpy(1 / (1 + np.exp(-log_snr))).reshape(-1, 1, 1, 1)
    eps_hat = (1 - a) ** 0.5 / (a * std**2 + 1 - a) * (x - a**0.5 * 0.7)
    i = max(1, round(t[0].item() * 249 / 999))  # the variance of step 0 is never asked for
    a, below = (ALPHA_BAR[round(999 * j / 249)] for j in (i, i - 1))
    # Var[x_below | x] = least + (how far the mean of x_below moves with x_0)^2 Var[x_0 | x]
    beta = 1 - a / below
    least = beta * (1 - below) / (1 - a)
    exact = least + (beta * below**0.5 / (1 - a) * std) ** 2 * (1 - a) / (a * std**2 + 1 - a)
    return torch.cat([eps_hat, torch.full_like(x, 2 * math.log(exact / least) / math.log(beta / least) - 1)], dim=1)


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_the_velocity_of_a_perfect_net_is_the_exact_one(std):
    """A SiT's at all t, a DiT's within its steps. At std 1 alone, errors of clock and sign would hide each other."""
    x, y = wave(301, 2, 1, 1).double(), torch.zeros(301, dtype=torch.int64)
    sit, dit = models.SiTTeacher(partial(exact_sit, std=std)), models.DiTTeacher(partial(exact_dit, std=std))
    for teacher, mean, first, last in ((sit, 0.0, 0, 1), (dit, 0.7, *T_STEPS[[0, -1]])):
        t = first + (last - first) * torch.linspace(0, 1, 301).double()
        expected = GaussianMixture([[mean, mean]], std).velocity(x.flatten(1), t=t)
        torch.testing.assert_close(teacher.velocity(x, t=t, y=y).flatten(1), expected, rtol=1e-7, atol=1e-9)


def test_the_clock_of_a_dit():
    """step_of is exact at the 1000 steps and never leaves them; bf16 does not round the velocity."""
    teacher, (x, y) = models.DiTTeacher(fill(models.DiT(**SIGMA))), batch(SIGMA)
    torch.testing.assert_close(teacher.step_of(T_STEPS)[1], torch.arange(1000.0).double(), rtol=0, atol=1e-6)
    t, k = teacher.step_of(torch.tensor([0.0, 1.0]))
    assert [*t, *k, *teacher.times] == pytest.approx([0.009901, 0.993687, 0, 999, 0.009901, 0.993687], abs=1e-3)
    assert 0 <= k.min() and k.max() <= 999
    v = teacher.velocity(x, t=t, y=y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.velocity(x, t=t, y=y), v)


def test_both_times(m=models):
    """The average velocity, written out once more from the raw answer of a filled net of two times."""
    (x, t, r), y, net = POINT, torch.tensor([1, 3]), fill(m.DiT(**SIGMA, two_times=True)).double()
    torch.testing.assert_close(m.Velocity(net)(x, t=t, r=r, y=y), net(x, t=30 * t, r=30 * r, y=y)[:, :4])
    torch.testing.assert_close(m.SiTTeacher(net)(x, t=t, r=r, y=y), -net(x, t=1 - t, r=1 - r, y=y)[:, :4])
    k, n = torch.tensor([700, 300]), torch.tensor([200, 0])
    alpha, sigma = (torch.from_numpy(a**0.5)[k].reshape(-1, 1, 1, 1) for a in (ALPHA_BAR, 1 - ALPHA_BAR))
    x_vp = x * (alpha + sigma)
    eps_hat = net(x_vp, t=k.double(), r=n.double(), y=y)[:, :4]
    u = m.DiTTeacher(net)(x, t=T_STEPS[k], r=T_STEPS[n], y=y)
    torch.testing.assert_close(u, eps_hat - (x_vp - sigma * eps_hat) / alpha, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_guidance(kind, m=models):
    """w = 0 is the null class, 1 the label alone; the fourth channel is not guided; a student starts as unguided v."""
    teacher, x = getattr(m, kind)(fill(m.DiT(**SIGMA))), wave(2, 4, 8, 8)
    t, y = torch.tensor([0.9, 0.4]), torch.tensor([1, 3])
    rows, close = [], partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    teacher.net.x_embedder.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    v_cond, v_null = teacher(x, t=t, y=y), teacher(x, t=t, y=torch.tensor([10, 10]))
    close(teacher.velocity(x, t=t, y=y, w=0.0, cfg_channels=4), v_null)
    guided = 2.5 * v_cond - 1.5 * v_null
    close(teacher.velocity(x, t=t, y=y, w=2.5), torch.cat([guided[:, :3], v_cond[:, 3:]], dim=1))
    assert rows == [2, 2, 4, 4] and (guided - v_cond).abs().amax(dim=(0, 2, 3)).min() > 1e-3  # in every channel
    teacher.w, teacher.cfg_channels = 2.5, 4
    close(teacher(x, t=t, y=y), guided)
    student = m.student_from_teacher(teacher)
    assert type(student) is type(teacher) and all(torch.equal(student(x, t=t, r=r, y=y), v_cond) for r in (t, 0 * t))


def moments(sample, steps, shape):
    """Exact mean and variance of what a sampler, linear in its noise, makes: each row gets one of the noises, as 1."""
    sources = iter(range(2, steps + 2))
    one_row = lambda size, **_: F.one_hot(torch.tensor(next(sources)), size[0]).double().reshape(size)  # noqa: E731
    with patch.object(torch, "randn", one_row):
        x = sample(F.one_hot(torch.tensor(1), steps + 2).double().reshape(-1, *shape)).flatten()
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


def test_official_ddpm(m=models):
    """Posterior mean, log-variance and x0_hat, and which of the 1000 steps a shorter sampler takes."""
    teacher = m.DiTTeacher(fill(m.DiT(**SIGMA)))
    for steps, i, k, *official in OFFICIAL_DDPM:
        assert teacher.respaced(steps)[0][i] == k
        for out, expected in zip(teacher.denoise(wave(2, 4, 8, 8), torch.tensor([1, 10]), i, steps), official):
            assert (out.mean().item(), out.std().item()) == pytest.approx(expected, abs=3e-6, rel=1e-5)
    x, y, a = wave(1, 4, 8, 8), torch.tensor([1]), ALPHA_BAR[500]
    unguided, teacher.w = teacher.denoise(x, y, 500, 1000), 4.0  # eps_hat on 3 channels; the variance stays the label's
    _, log_variance, x0_hat = teacher.denoise(x, y, 500, 1000)
    eps_hat = ((x / a**0.5 - x0_hat) / (1 / a - 1) ** 0.5).flatten()[:4]
    assert eps_hat.tolist() == pytest.approx([0.54670602, -0.61001521, 0.40071484, -0.50137185], abs=1e-5)
    torch.testing.assert_close(log_variance, unguided[1])


def test_ddpm(m=models):
    """The moments of 250 steps with a perfect net. At std 0 the last step must add no noise."""
    for std, lost in ((0.5, 1e-4), (1.5, 1e-4), (0.0, 0.0)):
        teacher = m.DiTTeacher(partial(exact_dit, std=std))
        mean, variance = moments(partial(teacher.sample_ddpm, y=torch.arange(252), generator=None), 250, (1, 1, 1))
        assert mean == pytest.approx(0.7, abs=1e-4)  # at k = 999 the path is not quite noise
        assert variance == pytest.approx(std**2 - lost, abs=1e-6)


def test_sde(m=models):
    """Euler-Maruyama is of first order towards the variance 0.245 that SiT's last step leaves; the mean is exact."""
    t, error, velocity = 0.04, {}, GaussianMixture([[0.7]], 0.5).velocity
    variance = (1 - t) ** 2 * 0.25 + t**2
    limit = variance * (1 - t * (2 * t - (1 - t) * 0.25) / variance) ** 2  # the last step's drift: v + eps_hat
    for steps in (25, 50, 100, 250):
        mean, variance = moments(partial(m.sample_sde, velocity, steps=steps, generator=None), steps, (1,))
        error[steps] = variance - limit
        assert mean == pytest.approx(0.7, abs=1e-6)
    assert limit == pytest.approx(0.245, abs=1e-4) and abs(error[250]) < 1e-3
    assert [error[25] / error[50], error[50] / error[100]] == pytest.approx([2, 2], rel=0.2)


def test_official_vae():
    """Mean, log-variance and image of two stages; four stages make an image 8 times smaller; logvar is clamped."""
    vae = fill(models.AutoencoderKL(block_out_channels=(32, 64)))
    for out, official in zip(vae.encode(wave(1, 3, 32, 32)), (VAE_MEAN, VAE_LOGVAR)):
        assert_official(out, *official)
    assert_official(vae.decode(wave(1, 4, 16, 16)), *VAE_IMAGE)
    vae = fill(models.AutoencoderKL(block_out_channels=(32, 32, 32, 32), layers_per_block=1))
    vae.quant_conv.bias.data[4:] = torch.tensor([100.0, -100.0, 0.0, 0.0])
    mean, logvar = vae.encode(wave(1, 3, 16, 24))
    assert mean.shape == (1, 4, 2, 3) and (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()
    assert vae.decode(mean).shape == (1, 3, 16, 24) and vae.factor == 8


TINY = {**SIGMA, "hidden_size": 128, "num_heads": 2, "depth": 1}


def test_teacher_file(tmp_path):
    """Sizes from the shapes, the clock from the name, weights from the EMA, beside which a Namespace is saved."""
    state = fill(models.DiT(**TINY)).state_dict()
    content = {"model": models.DiT(**TINY).state_dict(), "ema": state, "args": argparse.Namespace(lr=1e-4)}
    for name, kind in (("SiT-XL-2.pt", models.SiTTeacher), ("DiT.pt", models.DiTTeacher)):
        torch.save(content, tmp_path / name)
        teacher = models.load_teacher(str(tmp_path / name))
        assert type(teacher) is kind and teacher.net.config == {**TINY, "mlp_ratio": 4.0}
        assert all(torch.equal(entry, state[key]) for key, entry in teacher.net.state_dict().items())


def test_vae_file(tmp_path):
    """The published files call the attention's layers query, key, value and proj_attn, and have 1x1 convolutions."""
    vae = fill(models.AutoencoderKL((32, 64), 1))
    old_name = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, entry in vae.state_dict().items():
        key, found = re.subn(r"(?<=attentions\.0\.)(to_\w(ut\.0)?)", lambda match: old_name[match[0]], key)
        old[key] = entry[..., None, None] if found and entry.ndim == 2 else entry
    torch.save(old, tmp_path / "vae.bin")
    x, loaded = wave(1, 3, 8, 8), models.load_vae(str(tmp_path / "vae.bin"))
    assert torch.equal(loaded.encode(x)[0], vae.encode(x)[0])


class Stranger:
    """What a pickle could run."""

    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("what", ["SiT.pt", "vae.bin"])
@pytest.mark.parametrize("content", [None, b"<html>", [1, 2], {"a": torch.zeros(3)}, {"a": Stranger()}, "lacking"])
def test_a_file_that_holds_no_weights_gives_one_sentence(what, content, tmp_path, capsys):
    """No file, a web page, no dict, other tensors, code to run, a VAE without its last name."""
    path, load = tmp_path / what, models.load_teacher if what == "SiT.pt" else models.load_vae
    if content == "lacking":
        content = models.AutoencoderKL((32,), 1).state_dict()
        content.popitem()
    if content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(BadInput) as error:
        load(str(path))
    assert what in str(error.value) and "\n" not in str(error.value) and not capsys.readouterr().out


def test_conversions(m=models):
    """Of an exact velocity: x0_hat and eps_hat make x_t and v, and the score is the gradient of log p_t."""
    mixture = GaussianMixture([[1.0, 0.5], [-1.0, 0.0]], 0.4)
    x_t = torch.randn(50, 2, generator=rng(0, "x"), dtype=torch.float64).requires_grad_()
    t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    v = mixture.velocity(x_t, t=t).detach()
    x0_hat, eps_hat = m.x0_from_velocity(x_t, t, v), m.eps_from_velocity(x_t, t, v)
    torch.testing.assert_close(m.add_noise(x0_hat, eps_hat, t), x_t)
    torch.testing.assert_close(eps_hat - x0_hat, v)
    off, s2, logits = mixture.conditioning(x_t, t)
    (score,) = torch.autograd.grad(torch.logsumexp(logits, dim=1).sum(), x_t)
    torch.testing.assert_close(m.score_from_velocity(x_t, t, v).detach(), score)


BROKEN = [
    (test_conversions, "return -eps_from_velocity", "return eps_from_velocity"),
    (test_conversions, "return x_t - expand_times(t, x_t) * v", "return x_t + expand_times(t, x_t) * v"),
    (partial(test_student, "DiT"), "self.span_embedder(span) - self.", "self.span_embedder(span) - 0 * self."),
    (partial(test_student, "VelocityMLP"), "nn.init.zeros_(self.embed_span.weight)", "pass"),
    (test_forward_rules, "F.linear(dx, weight))", "F.linear(dx, weight, bias))"),
    (test_forward_rules, "*backward(dx))", "*backward(x))"),
    (test_forward_rules, "(q * q.shape[-1] ** -0.5) @", "q @"),
    (test_both_times, "None if r is None else 1 - r", "r"),
    (test_both_times, "return -answer", "return answer"),
    (partial(test_guidance, "Velocity"), "null + w * (cond - null)", "cond + w * (cond - null)"),
    (partial(test_guidance, "Velocity"), "{**net.state_dict(), **teacher.net.state_dict()}", "net.state_dict()"),
    (test_official_ddpm, ".cumsum(0).round()", ".cumsum(0).floor()"),
    (test_ddpm, "(log_variance / 2).exp()", "log_variance.exp()"),
    (test_sde, "drift = v + eps_from_velocity(x, t, v)", "drift = v"),
]  # fmt: skip


@pytest.mark.parametrize("check, old, new", BROKEN)
def test_a_broken_copy_is_caught(check, old, new):
    """Each of these faults fails the test beside it."""
    with pytest.raises(AssertionError):
        check(m=broken(models, (old, new)))

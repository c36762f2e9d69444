"""DiT, the teachers and the autoencoder: against the official code's answers, closed forms and finite differences.

Numbers named "official" are what facebookresearch/DiT (ed81ce2), willisma/SiT (947f95b) and diffusers' AutoencoderKL
answered with the weights of helpers.fill on the inputs of helpers.wave. On one core the file takes some seconds.
"""

import numpy as np
import pytest
import torch
from torch import nn
import torch.nn.functional as F
from torch.autograd import forward_ad

import models
from helpers import broken, fill, wave
from models import AutoencoderKL, DiT, DiTTeacher, SiTTeacher, Teacher

SIGMA_NET = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=4, num_classes=10,
                 learn_sigma=True)
PLAIN_NET = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=64, depth=3, num_heads=2, num_classes=7)

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))  # the DiT's 1000 steps, and their times in our convention
T_STEPS = torch.from_numpy((1 - ALPHA_BAR) ** 0.5 / (ALPHA_BAR ** 0.5 + (1 - ALPHA_BAR) ** 0.5))
T_FIRST, T_LAST = T_STEPS[0].item(), T_STEPS[-1].item()


def assert_official(out, shape, mean, std, first8, last4):
    """The summary of a tensor that the official numbers consist of, to 1e-4: float32 of t = 999 gives no more."""
    flat = out.detach().double().flatten()
    assert list(out.shape) == shape
    found = [flat.mean().item(), flat.std().item(), *flat[:8].tolist(), *flat[-4:].tolist()]
    assert found == pytest.approx([mean, std, *first8, *last4], abs=3e-5, rel=1e-4)


def batch(config):
    """Input and labels of the official runs; the second label is the null class."""
    shape = (2, config["in_channels"], config["input_size"], config["input_size"])
    return wave(*shape), torch.tensor([1, config["num_classes"]])


# --- against the official DiT and SiT ---

OFFICIAL_DIT = [
    (SIGMA_NET, [2, 8, 8, 8], -0.003678258745, 0.351088419357,
     [0.249712676, -0.442145586, 0.181446388, -0.397229761, 0.307525128, -0.248204254, 0.434673190, -0.095666572],
     [0.171853155, -0.255590767, 0.259432703, -0.133130908]),
    (PLAIN_NET, [2, 3, 8, 8], -0.005286172555, 0.344498413674,
     [-0.394859076, 0.640705884, -0.582850158, 0.232791781, -0.347994894, 0.593367755, -0.556604445, 0.239594877],
     [-0.239798367, 0.179496914, -0.060058057, -0.087593734]),
]
OFFICIAL_SIT = [
    (SIGMA_NET, [2, 4, 8, 8], -0.017166445543, 0.352507871982,
     [0.251181751, -0.443864346, 0.182730407, -0.398836315, 0.309180230, -0.249756664, 0.436964631, -0.097212210],
     [-0.329357207, 0.056001142, -0.327829421, -0.079685405]),
    (PLAIN_NET, [2, 3, 8, 8], -0.008465039380, 0.383595543238,
     [-0.441962749, 0.664041519, -0.571786106, 0.192368880, -0.396922529, 0.608796477, -0.531504810, 0.185402781],
     [-0.366331786, 0.250778228, -0.043612842, -0.184273243]),
]


@pytest.mark.parametrize("case", OFFICIAL_DIT)
def test_dit_answers_what_the_official_dit_answers(case):
    config, *official = case
    x, y = batch(config)
    assert_official(fill(DiT(**config))(x, t=torch.tensor([999.0, 37.0]), y=y), *official)


@pytest.mark.parametrize("case", OFFICIAL_SIT)
def test_sit_raw_and_with_the_clock_reversed(case):
    config, *official = case
    x, y = batch(config)
    net, t_sit = fill(DiT(**config)), torch.tensor([0.9, 0.05])
    assert_official(net(x, t=t_sit, y=y)[:, :x.shape[1]], *official)
    # v(x_t, t) = -v_SiT(x_t, 1 - t), at our t = 1 - t_sit
    assert_official(-SiTTeacher(net).velocity(x, t=1 - t_sit, y=y), *official)


def test_dit_teacher_guides_the_channels_that_the_official_sampler_guides():
    # Official forward_with_cfg at step 500, scale 4, one image: rows [conditional, null] of [guided eps of 3 channels,
    # which both rows share; the rest, which keeps each row's own answer]. A sampler reads the conditional row.
    net = fill(DiT(**SIGMA_NET))
    x_vp = wave(2, 4, 8, 8)[:1]
    alpha, sigma = ALPHA_BAR[500] ** 0.5, (1 - ALPHA_BAR[500]) ** 0.5
    x_t, t = x_vp / (alpha + sigma), T_STEPS[500:501].float()
    v = DiTTeacher(net).velocity(x_t, t=t, y=torch.tensor([1]), w=4.0)
    eps_w = models.eps_from_velocity(x_t, t, v)
    raw = net(torch.cat([x_vp, x_vp]), t=torch.tensor([500.0, 500.0]), y=torch.tensor([1, 10]))
    assert torch.allclose(eps_w[:, 3], raw[:1, 3], atol=1e-5)
    official_rows = torch.cat([eps_w[:, :3].expand(2, -1, -1, -1), raw[:, 3:]], dim=1)
    assert_official(
        official_rows, [2, 8, 8, 8], -0.004421390448, 0.428866203122,
        [0.546706021, -0.610015213, 0.400714844, -0.501371861, 0.632466912, -0.292789072, 0.996820629, -0.183226317],
        [0.141118000, -0.267119646, 0.159804404, -0.148094505])


@pytest.mark.parametrize("sizes, keys, numbers", [
    (dict(hidden_size=1152, depth=28, num_heads=16), 292, 675_129_632),  # XL/2
    (dict(hidden_size=384, depth=12, num_heads=6), 132, 32_963_360),  # S/2
])
def test_state_dict_has_the_published_size(sizes, keys, numbers):
    with torch.device("meta"):
        net = DiT(input_size=32, patch_size=2, in_channels=4, learn_sigma=True, **sizes)
        out = net(torch.empty(2, 4, 32, 32), t=torch.empty(2), y=torch.empty(2, dtype=torch.int64))
    state = net.state_dict()
    assert len(state) == keys and sum(entry.numel() for entry in state.values()) == numbers
    assert out.shape == (2, 8, 32, 32)


def test_state_dict_names_and_shapes_of_xl_2():
    with torch.device("meta"):
        net = DiT(32, 2, 4, 1152, 28, 16, learn_sigma=True)
    expected = {"pos_embed": (1, 256, 1152), "x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,),
                "y_embedder.embedding_table.weight": (1001, 1152)}

    def linear(name, n_in, n_out):
        expected.update({f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)})

    linear("t_embedder.mlp.0", 256, 1152)
    linear("t_embedder.mlp.2", 1152, 1152)
    for i in range(28):
        linear(f"blocks.{i}.attn.qkv", 1152, 3456)
        linear(f"blocks.{i}.attn.proj", 1152, 1152)
        linear(f"blocks.{i}.mlp.fc1", 1152, 4608)
        linear(f"blocks.{i}.mlp.fc2", 4608, 1152)
        linear(f"blocks.{i}.adaLN_modulation.1", 1152, 6912)
    linear("final_layer.linear", 1152, 32)
    linear("final_layer.adaLN_modulation.1", 1152, 2304)
    assert {name: tuple(entry.shape) for name, entry in net.state_dict().items()} == expected


def test_requires_grad_leaves_the_position_table_fixed():
    net = DiT(**PLAIN_NET).requires_grad_(True)
    assert not net.pos_embed.requires_grad and "pos_embed" not in dict(net.named_parameters())


def test_initialisation_is_that_of_the_dit_paper():
    torch.manual_seed(0)
    net = DiT(**PLAIN_NET, two_times=True)
    assert all(block.adaLN_modulation[1].weight.abs().max() == 0 for block in net.blocks)
    assert net.final_layer.adaLN_modulation[1].weight.abs().max() == net.final_layer.linear.weight.abs().max() == 0
    assert net.span_embedder.mlp[2].weight.abs().max() == 0 and net.span_embedder.mlp[0].weight.std() > 0.01
    for weight in (net.t_embedder.mlp[0].weight, net.t_embedder.mlp[2].weight, net.y_embedder.embedding_table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    limit = (6 / (64 + 192)) ** 0.5  # Xavier: uniform up to sqrt(6 / (fan_in + fan_out))
    assert 0.99 * limit < net.blocks[0].attn.qkv.weight.abs().max().item() <= limit
    assert all(p.abs().max() == 0 for name, p in net.named_parameters() if name.endswith("bias"))
    x, y = batch(PLAIN_NET)
    _, (first, last) = net(x, t=torch.rand(2), r=torch.zeros(2), y=y, taps=(0, 2))
    assert torch.equal(first, last)  # every block starts as the identity


def test_gelu_is_the_tanh_approximation():
    # The official numbers above are too coarse to tell it from the exact GELU; the two differ by 4.7e-4 at most.
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    gelu = 0.5 * x * (1 + torch.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
    assert torch.allclose(DiT(**PLAIN_NET).blocks[0].mlp.act(x), gelu, atol=1e-9)


# --- two times, taps, tangents ---


def student_of(teacher, config):
    """A two-time net with all of the teacher's weights; only the second embedder keeps its own."""
    torch.manual_seed(0)
    student = DiT(**config, two_times=True)
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    return student


def test_student_starts_as_its_teacher_and_then_hears_r():
    teacher, (x, y), t = fill(DiT(**PLAIN_NET)), batch(PLAIN_NET), torch.tensor([0.9, 0.4])
    student = student_of(teacher, PLAIN_NET)
    assert set(student.state_dict()) - set(teacher.state_dict()) == {
        f"span_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    for r in (t, torch.zeros(2), torch.tensor([0.7, -3.0])):
        assert torch.equal(student(x, t=t, r=r, y=y), teacher(x, t=t, y=y))
    fill(student)  # now the last layer of the second embedder is not zero
    u = student(x, t=t, r=torch.zeros(2), y=y)
    assert (u - student(x, t=t, r=t, y=y)).abs().max() > 1e-3
    # What is embedded is t - r, by a net of its own: with that net's output in place of zero, we get the same.
    bias = student.span_embedder(t) - student.span_embedder(torch.zeros(2))
    student.t_embedder.register_forward_hook(lambda module, inputs, out: out + bias)
    student.span_embedder.mlp[2].weight.data.zero_()
    student.span_embedder.mlp[2].bias.data.zero_()
    assert torch.allclose(student(x, t=t, r=torch.zeros(2), y=y), u, atol=1e-6)


def check_silent_span(module):
    """A student of any weights answers at r = t what a net with one time and the same weights answers, to the bit."""
    student, (x, y) = module.DiT(**PLAIN_NET, two_times=True), batch(PLAIN_NET)
    for k, parameter in enumerate(student.parameters()):  # random everywhere: as after training, not as at birth
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(k))
    teacher, t = module.DiT(**PLAIN_NET), torch.tensor([0.9, 0.4])
    teacher.load_state_dict({k: v for k, v in student.state_dict().items() if not k.startswith("span_embedder")})
    assert (student(x, t=t, r=torch.zeros(2), y=y) - teacher(x, t=t, y=y)).abs().max() > 1e-3
    assert torch.equal(student(x, t=t, r=t, y=y), teacher(x, t=t, y=y))
    wrapped, plain = module.Teacher(student), module.Teacher(teacher)
    assert torch.equal(wrapped(x, t=t, r=t, y=y), plain(x, t=t, y=y))


def test_a_span_of_zero_is_silent():
    check_silent_span(models)
    for new in ("self.span_embedder(span)", "self.span_embedder(span) - self.span_embedder(torch.ones_like(span))"):
        with pytest.raises(AssertionError):
            check_silent_span(broken(models, (
                "(self.span_embedder(span) - self.span_embedder(torch.zeros_like(span)))", new)))


def test_r_is_required_with_two_times_and_refused_without():
    x, y = batch(PLAIN_NET)
    t = torch.tensor([0.9, 0.4])
    with pytest.raises(ValueError, match="needs r"):
        DiT(**PLAIN_NET, two_times=True)(x, t=t, y=y)
    with pytest.raises(ValueError, match="two_times"):
        DiT(**PLAIN_NET)(x, t=t, r=t, y=y)


@pytest.mark.parametrize("wrong", [dict(patch_size=3), dict(num_heads=5), dict(hidden_size=66)])
def test_sizes_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError, match="must divide"):
        DiT(**{**PLAIN_NET, **wrong})


def test_taps_are_the_tokens_after_the_blocks_in_the_order_asked():
    net, (x, y), t = fill(DiT(**PLAIN_NET)), batch(PLAIN_NET), torch.tensor([0.9, 0.4])
    out, tokens = net(x, t=t, y=y, taps=(2, 0))
    assert [f.shape for f in tokens] == [(2, 4, 64), (2, 4, 64)]
    assert torch.equal(out, net(x, t=t, y=y))
    c = net.t_embedder(t) + net.y_embedder(y)
    assert torch.equal(net.unpatchify(net.final_layer(tokens[0], c)), out)  # block 2 is the last one
    assert torch.equal(net.blocks[2](net.blocks[1](tokens[1], c), c), tokens[0])  # block 0 is the first one
    for wrong in ((3,), (-1,)):
        with pytest.raises(ValueError, match="taps"):
            net(x, t=t, y=y, taps=wrong)


def test_taps_carry_gradients_through_a_frozen_teacher_to_its_input():
    net, (x, y), t = fill(DiT(**PLAIN_NET)), batch(PLAIN_NET), torch.tensor([0.9, 0.4])
    teacher = Teacher(net).requires_grad_(False)
    x = x.clone().requires_grad_(True)
    _, (tokens,) = teacher.velocity(x, t=t, y=y, taps=(1,))
    tokens.square().sum().backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in teacher.parameters())


def tangent_problem():
    """A filled two-time net in float64 as a function of (x, t, r), a point, and a direction."""
    net = fill(DiT(**PLAIN_NET, two_times=True)).double()
    x, y = batch(PLAIN_NET)
    point = (x.double(), torch.tensor([0.9, 0.4]).double(), torch.tensor([0.2, 0.1]).double())
    direction = (wave(*x.shape, phase=1.0), torch.tensor([1.0, 0.7]), torch.tensor([0.3, -0.5]))
    return lambda x_t, t, r: net(x_t, t=t, r=r, y=y), point, tuple(d.double() for d in direction)


def test_forward_derivative_equals_central_differences():
    f, point, direction = tangent_problem()
    h = 1e-5
    with torch.no_grad():
        for keep in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):  # all of x, t, r at once, then each alone
            d = tuple(k * v for k, v in zip(keep, direction))
            _, tangent = torch.func.jvp(f, point, d)
            plus, minus = (f(*(p + s * h * v for p, v in zip(point, d))) for s in (1, -1))
            assert tangent.dtype == torch.float64 and tangent.abs().max() > 1e-3
            assert torch.allclose(tangent, (plus - minus) / (2 * h), rtol=1e-6, atol=1e-8)


def test_dual_tensors_and_func_jvp_agree_and_leave_the_value_alone():
    f, point, direction = tangent_problem()
    value, tangent = torch.func.jvp(f, point, direction)
    with torch.no_grad(), forward_ad.dual_level():
        dual = f(*(forward_ad.make_dual(p, d) for p, d in zip(point, direction)))
        dual_value, dual_tangent = forward_ad.unpack_dual(dual)
    assert torch.allclose(dual_tangent, tangent, rtol=1e-12, atol=1e-14)
    assert torch.allclose(dual_value, value, rtol=1e-12, atol=1e-14)
    assert torch.allclose(value, f(*point), rtol=1e-10, atol=1e-12)  # written-out and fused attention


def test_attention_is_fused_unless_a_tangent_passes(monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    f, point, direction = tangent_problem()
    f(*point)
    assert len(calls) == PLAIN_NET["depth"]
    torch.func.jvp(f, point, direction)
    with forward_ad.dual_level():
        f(*(forward_ad.make_dual(p, d) for p, d in zip(point, direction)))
        assert len(calls) == PLAIN_NET["depth"]
        f(*point)  # no tangent passes here, though a level is open
    assert len(calls) == 2 * PLAIN_NET["depth"]


def test_times_are_embedded_in_float32_under_autocast():
    net, t = fill(DiT(**PLAIN_NET)), torch.tensor([0.9, 0.4])
    with torch.autocast("cpu", torch.bfloat16):
        c = net.t_embedder(t)
    assert c.dtype == torch.float32 and torch.equal(c, net.t_embedder(t))


# --- the teachers, against exact velocities of Gaussian data ---


class ExactSiT(nn.Module):
    """A perfect SiT for data N(0, std^2), in SiT's convention: E[x_0 - eps | x = t x_0 + (1 - t) eps]."""

    num_classes = 10

    def __init__(self, std):
        super().__init__()
        self.std = std

    def forward(self, x, *, t, y, taps=()):
        t = t.reshape(-1, 1, 1, 1)
        return (t * self.std ** 2 - (1 - t)) / (t ** 2 * self.std ** 2 + (1 - t) ** 2) * x


class ExactDiT(ExactSiT):
    """A perfect DiT: E[eps | x = alpha_k x_0 + sigma_k eps], k fractional, log-SNR linear in between."""

    def forward(self, x, *, t, y, taps=()):
        log_snr = np.interp(t.numpy(), np.arange(1000), np.log(ALPHA_BAR / (1 - ALPHA_BAR)))
        alpha_2 = torch.from_numpy(1 / (1 + np.exp(-log_snr))).reshape(-1, 1, 1, 1)
        eps_hat = (1 - alpha_2) ** 0.5 / (alpha_2 * self.std ** 2 + 1 - alpha_2) * x
        return torch.cat([eps_hat, 100 + eps_hat], dim=1)  # the second half is the learned variance: not to be read


def exact_velocity(x_t, t, std):
    """E[eps - x_0 | x_t] for data N(0, std^2)."""
    t = t.reshape(-1, 1, 1, 1)
    return (t - (1 - t) * std ** 2) / ((1 - t) ** 2 * std ** 2 + t ** 2) * x_t


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_velocity_of_a_perfect_net_is_the_exact_velocity(std):
    # std 0.5 tells data and noise apart: with std 1 two errors, of the clock and of the sign, would hide each other.
    t = torch.linspace(0, 1, 301, dtype=torch.float64)
    x_t, y = wave(301, 2, 1, 1).double(), torch.zeros(301, dtype=torch.int64)
    v = SiTTeacher(ExactSiT(std)).velocity(x_t, t=t, y=y)
    assert torch.allclose(v, exact_velocity(x_t, t, std), rtol=1e-9, atol=1e-12)
    t = T_FIRST + t * (T_LAST - T_FIRST)
    v = DiTTeacher(ExactDiT(std)).velocity(x_t, t=t, y=y)
    assert torch.allclose(v, exact_velocity(x_t, t, std), rtol=1e-9, atol=1e-11)
    v_32 = DiTTeacher(ExactDiT(std)).velocity(x_t.float(), t=t.float(), y=y)
    assert torch.allclose(v_32.double(), v, rtol=1e-3, atol=1e-4)


def test_dit_teacher_outside_its_steps_errs_by_what_the_docstring_says():
    x_t, y = torch.ones(2, 1, 1, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    v = DiTTeacher(ExactDiT(1.0)).velocity(x_t, t=t, y=y)
    error = (v - exact_velocity(x_t, t, 1.0)).flatten()
    assert error.tolist() == pytest.approx([2.0e-4, -8.1e-5], rel=0.02)
    v_ends = DiTTeacher(ExactDiT(1.0)).velocity(x_t, t=T_STEPS[[0, -1]], y=y)
    assert torch.allclose(v, v_ends, rtol=1e-9)


def test_step_of_a_time_is_exact_at_the_steps_and_never_leaves_them():
    teacher = DiTTeacher(ExactDiT(1.0))
    assert [T_FIRST, T_STEPS[499].item(), T_LAST] == pytest.approx([0.009901, 0.773967, 0.993687], abs=1e-6)
    t, k = teacher.step_of(T_STEPS)
    assert torch.allclose(k, torch.arange(1000.0).double(), atol=1e-6) and torch.allclose(t, T_STEPS)
    t, k = teacher.step_of(torch.tensor([0.0, 0.005, 0.999, 1.0]))
    assert k.tolist() == pytest.approx([0, 0, 999, 999], abs=1e-3) and k.min() >= 0 and k.max() <= 999
    assert t.tolist() == pytest.approx([T_FIRST, T_FIRST, T_LAST, T_LAST], abs=1e-6)


def test_dit_teacher_has_no_kink_of_nan_at_the_ends():
    teacher, x, y = DiTTeacher(fill(DiT(**SIGMA_NET))), wave(1, 4, 8, 8), torch.tensor([3])
    for end in (0.0, 1.0):
        value, tangent = torch.func.jvp(
            lambda x_t, t: teacher.velocity(x_t, t=t, y=y), (x, torch.tensor([end])), (x, torch.ones(1)))
        assert value.isfinite().all() and tangent.isfinite().all()


def test_dit_teacher_is_not_rounded_by_autocast_or_by_bfloat16():
    teacher, (x, y) = DiTTeacher(fill(DiT(**SIGMA_NET))), batch(SIGMA_NET)
    t = torch.tensor([0.9, 0.99])
    v = teacher.velocity(x, t=t, y=y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.velocity(x, t=t, y=y), v)
    with pytest.raises(RuntimeError, match="should be the same"):
        teacher.to(torch.bfloat16).velocity(x, t=t, y=y)


@pytest.mark.parametrize("kind, times", [
    (Teacher, lambda t: models.CLOCK * t), (SiTTeacher, lambda t: 1 - t), (DiTTeacher, lambda t: None)])
def test_each_wrapper_tells_its_net_the_time_by_the_nets_own_clock(kind, times):
    heard = {}

    def net(x, *, t, y, r=None, taps=()):
        heard.update(t=t, r=r)
        return x

    teacher, x, y = kind(net), wave(3, 2, 1, 1), torch.zeros(3, dtype=torch.int64)
    t, r = torch.tensor([0.3, 0.6, 0.9]), torch.tensor([0.1, 0.2, 0.9])
    teacher(x, t=t, r=r, y=y)
    for name, time in (("t", t), ("r", r)):
        expected = teacher.step_of(time)[1] if kind is DiTTeacher else times(time)
        assert torch.equal(heard[name], expected), name


# --- guidance ---


@pytest.mark.parametrize("kind", [Teacher, SiTTeacher, DiTTeacher])
def test_guidance_scale_0_is_null_1_is_conditional_and_between_is_linear(kind):
    teacher, t = kind(fill(DiT(**SIGMA_NET))), torch.tensor([0.9, 0.4])
    x, y, y_null = wave(2, 4, 8, 8), torch.tensor([1, 3]), torch.tensor([10, 10])
    v_cond, v_null = teacher.velocity(x, t=t, y=y), teacher.velocity(x, t=t, y=y_null)
    assert (v_cond - v_null).abs().amax(dim=(0, 2, 3)).min() > 1e-4  # in every channel
    close = dict(rtol=1e-4, atol=1e-5)
    assert torch.allclose(teacher.velocity(x, t=t, y=y, w=0.0, cfg_channels=4), v_null, **close)
    assert torch.allclose(teacher.velocity(x, t=t, y=y, w=2.5, cfg_channels=4), 2.5 * v_cond - 1.5 * v_null, **close)
    v = teacher.velocity(x, t=t, y=y, w=2.5)
    assert torch.allclose(v[:, :3], (2.5 * v_cond - 1.5 * v_null)[:, :3], **close)
    assert torch.allclose(v[:, 3], v_cond[:, 3], **close)


def test_guidance_scale_1_does_no_null_work_and_other_scales_one_batch():
    teacher = Teacher(fill(DiT(**SIGMA_NET)))
    rows = []
    teacher.net.x_embedder.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    x, t, y = wave(2, 4, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([1, 3])
    teacher.velocity(x, t=t, y=y)
    teacher.velocity(x, t=t, y=y, w=1.5)
    assert rows == [2, 4]


@pytest.mark.parametrize("kind", [Teacher, SiTTeacher, DiTTeacher])
def test_teacher_passes_the_taps_of_the_conditional_rows(kind):
    teacher, t = kind(fill(DiT(**SIGMA_NET))), torch.tensor([0.9, 0.4])
    x, y = wave(2, 4, 8, 8), torch.tensor([1, 3])
    v, (tokens,) = teacher.velocity(x, t=t, y=y, taps=(1,))
    v_w, (tokens_w,) = teacher.velocity(x, t=t, y=y, w=2.0, taps=(1,))
    assert tokens.shape == tokens_w.shape == (2, 16, 48)
    assert torch.allclose(tokens, tokens_w, rtol=1e-4, atol=1e-4)
    assert torch.equal(v, teacher.velocity(x, t=t, y=y))
    assert torch.allclose(v_w, teacher.velocity(x, t=t, y=y, w=2.0), rtol=1e-4, atol=1e-3)  # in one batch


# --- the autoencoder ---


def test_autoencoder_answers_what_diffusers_answers():
    vae = fill(AutoencoderKL(block_out_channels=(32, 64)))
    assert len(vae.state_dict()) == 156
    mean, logvar = vae.encode(wave(1, 3, 32, 32))
    assert_official(
        mean, [1, 4, 16, 16], -0.039506900862, 0.223843009925,
        [-0.078841962, -0.146595359, -0.180452153, -0.153332859, -0.047215629, 0.048282407, -0.040985126, -0.239289433],
        [-0.045508109, -0.045742176, -0.045552712, -0.045368437])
    assert_official(
        logvar, [1, 4, 16, 16], 0.025051889592, 0.222713353389,
        [0.078315333, 0.120986968, 0.079484776, -0.048213899, -0.273589760, -0.414243430, -0.275576770, -0.089565493],
        [0.055501241, 0.055698835, 0.055544995, 0.055526581])
    assert_official(
        vae.decode(wave(1, 4, 16, 16)), [1, 3, 32, 32], -0.008383916601, 0.626174432299,
        [-0.03744079, -0.03929271, -0.04036373, -0.04126750, -0.04173757, -0.04173819, -0.04139521, -0.04094350],
        [-0.041729093, -0.041709464, -0.041661360, -0.041471954])


def test_autoencoder_has_the_published_keys():
    # Counts and shapes of diffusers' state dict at the sizes of sd-vae-ft-ema and -mse.
    with torch.device("meta"):
        state = AutoencoderKL().state_dict()
    assert len(state) == 248 and sum(entry.numel() for entry in state.values()) == 83_653_863
    for name, shape in {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down_blocks.2.downsamplers.0.conv.weight": (512, 512, 3, 3),
        "encoder.down_blocks.2.resnets.0.conv_shortcut.weight": (512, 256, 1, 1),
        "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
        "encoder.conv_out.bias": (8,),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.weight": (4, 4, 1, 1),
        "decoder.mid_block.attentions.0.group_norm.bias": (512,),
        "decoder.mid_block.resnets.1.norm2.weight": (512,),
        "decoder.up_blocks.0.upsamplers.0.conv.bias": (512,),
        "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": (256, 512, 1, 1),
        "decoder.up_blocks.3.resnets.2.conv2.weight": (128, 128, 3, 3),
        "decoder.conv_norm_out.weight": (128,),
    }.items():
        assert tuple(state[name].shape) == shape, name


def test_autoencoder_is_8_times_smaller_at_four_stages_and_clamps_logvar():
    vae = fill(AutoencoderKL(block_out_channels=(32, 32, 32, 32), layers_per_block=1))
    vae.quant_conv.bias.data[4:] = torch.tensor([100.0, -100.0, 0.0, 0.0])
    mean, logvar = vae.encode(wave(1, 3, 16, 24))
    assert mean.shape == logvar.shape == (1, 4, 2, 3)
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()
    assert vae.decode(mean).shape == (1, 3, 16, 24)

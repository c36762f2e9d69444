"""Stage 1 against oracles that are not the code under test: a closed-form Gaussian and central differences.

A test takes the module m, so that a copy with one of the faults in BROKEN can be given to it, and be seen to fail.
"""

import copy

import pytest
import torch
from helpers import broken, seeded, tiny_teacher, wave
from torch import nn
from torch.autograd import forward_ad

import meanflow_td
import models
from data import rng
from models import VelocityMLP

MEAN, STD = 0.7, 0.4


class GaussianFlow:
    """Data N(MEAN, STD^2) in every dimension: all along the path x_t is Gaussian, and the flow keeps the quantile."""

    @staticmethod
    def std(t):
        return ((1 - t) ** 2 * STD**2 + t**2).sqrt()

    def velocity(self, x_t, *, t):
        t = t[:, None]
        return -MEAN + (t - (1 - t) * STD**2) / self.std(t) ** 2 * (x_t - (1 - t) * MEAN)

    def average_velocity(self, x_t, *, t, r):
        t, r = t[:, None], r[:, None]
        x_r = (1 - r) * MEAN + self.std(r) / self.std(t) * (x_t - (1 - t) * MEAN)
        return (x_t - x_r) / (t - r)


def points(n=64, dim=3, low=0.0):
    """x_t (n, dim) and times low <= r < t, in float64."""
    generator = rng(0, "points")
    times = low + (1 - low) * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    r, t = times.sort(dim=1).values.unbind(1)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64), r, t


def noise(n=64, dim=3):
    return torch.randn(n, dim, generator=rng(0, "noise"), dtype=torch.float64)


def network(dim=3):
    """A student in float64 whose second time has an effect."""
    net = seeded(lambda: VelocityMLP(dim, 16, 2, two_times=True)).double()
    nn.init.normal_(net.embed_span.weight, std=0.1, generator=rng(0, "duration"))
    return net


def difference_along(net, x_t, v, r, t, h=1e-6):
    """du/dt by a central difference along the path."""
    with torch.no_grad():
        return (net(x_t + h * v, t=t + h, r=r) - net(x_t - h * v, t=t - h, r=r)) / (2 * h)


def test_exact_gaussian(m=meanflow_td):
    """The exact average velocity of a Gaussian has zero loss."""
    flow, (x_t, r, t) = GaussianFlow(), points()
    loss, err = m.meanflow_loss(flow.average_velocity, x_t, flow.velocity(x_t, t=t), r=r, t=t)
    assert err.max() < 1e-20 and loss < 1e-18


def test_du_dt(m=meanflow_td):
    """du/dt is the central difference along the path, and the target v - (t - r) du/dt, in fp64."""
    net, v, (x_t, r, t) = network(), noise(), points()
    u_target, du_dt = m.meanflow_target(net, x_t, v, r=r, t=t)
    difference = difference_along(net, x_t, v, r, t)
    torch.testing.assert_close(du_dt, difference, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(u_target, v - (t - r)[:, None] * difference, rtol=1e-6, atol=1e-7)


def test_gradient(m=meanflow_td):
    """The loss's gradient is that of |u - constant|^2 with MeanFlow's weight, both held fixed."""
    net, v, p, c, (x_t, r, t) = network(), noise(), 0.5, 0.1, points()
    constant = v - (t - r)[:, None] * difference_along(net, x_t, v, r, t)
    squares = (net(x_t, t=t, r=r) - constant).square().sum(1)
    expected = torch.autograd.grad((squares / (squares.detach() + c) ** p).mean(), net.parameters())
    loss, _ = m.meanflow_loss(net, x_t, v, r=r, t=t, p=p, c=c)
    for ours, theirs in zip(torch.autograd.grad(loss, net.parameters()), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_at_r_equal_t_it_is_flow_matching():
    """To the bit, and flow matching is the squared distance from v."""
    (x_t, _, t), v, net = (a.float() for a in points()), noise().float(), network().float()
    loss, err = meanflow_td.meanflow_loss(net, x_t, v, r=t, t=t, p=0.0)
    assert torch.equal(err, ((net(x_t, t=t, r=t) - v) ** 2).sum(dim=1)) and torch.equal(loss, err.mean())
    one_time = VelocityMLP(3, 16, 2)
    loss, err = meanflow_td.flow_matching_loss(one_time, x_t, v, t=t)
    assert torch.equal(err, ((one_time(x_t, t=t) - v) ** 2).sum(dim=1)) and torch.equal(loss, err.mean())


def test_labels(m=meanflow_td):
    """A label reaches the network row by row; du/dt is computed where r < t alone, and zero elsewhere."""
    sizes = []

    def net(x_t, *, t, r, y):
        sizes.append(len(x_t))
        return x_t * y[:, None] + t[:, None] * y[:, None]

    x_t, r, t = points(6, 2)
    r[::2], y = t[::2], torch.arange(6.0, dtype=torch.float64)
    u_target, du_dt = m.meanflow_target(net, x_t, x_t, r=r, t=t, y=y)
    assert sizes == [3]
    expected = (x_t + 1) * y[:, None]  # d/dt (x y + t y) with dx/dt = v = x
    expected[::2] = 0
    torch.testing.assert_close(du_dt, expected)
    _, err = m.meanflow_loss(net, x_t, x_t, r=r, t=t, y=y)
    torch.testing.assert_close(err, (net(x_t, t=t, r=r, y=y) - u_target).square().sum(1))


def test_r_after_t_is_refused():
    """With the row and its values."""
    (x_t, _, _), r, t = points(4), torch.tensor([0, 0, 0.9, 0]), torch.full((4,), 0.5)
    with pytest.raises(ValueError, match=r"row 2 has r = 0.9 > t = 0.5"):
        meanflow_td.meanflow_loss(network(), x_t, x_t, r=r, t=t)


def test_drawn_times():
    """The larger and the smaller of two uniform draws; a quarter of rows have r = t; 0.3 of the spans r = 0."""
    r, t = meanflow_td.draw_times(10_000, rng(0, "times"))
    assert (r <= t).all() and r.min() >= 0 and t.max() <= 1 and (r[7500:] == t[7500:]).all()
    r, t = r[:7500], t[:7500]
    assert (r < t).all() and abs((r == 0).float().mean() - 0.3) < 0.02
    assert abs(t.mean() - 2 / 3) < 0.01 and abs(r[r > 0].mean() - 1 / 3) < 0.01


def test_stage_1(m=meanflow_td):
    """It asks for the velocity at a point of the path between data and noise: the teacher's there, or eps - x_0."""
    x_0, asked = noise(64, 2).float() + 3, []

    def student(x_t, *, t, r, y=None):
        asked.append((x_t, t, r))
        return 0 * x_t * t[:, None] + 1

    def teacher(x_t, *, t, y=None):
        return torch.sin(3 * x_t) + t[:, None]

    for source in (teacher, None):
        _, log = m.student_loss(student, rng(0, "stage 1"), draw=lambda g: (x_0, None), teacher=source)
        x_t, t, r = asked[-1]
        eps = (x_t - (1 - t)[:, None] * x_0) / t[:, None]
        assert abs(eps.mean()) < 0.3 and abs(eps.std() - 1) < 0.2 and (r < t).float().mean() == 0.75
        v = eps - x_0 if source is None else teacher(x_t, t=t)
        torch.testing.assert_close(log["raw_error"], (1 - v).square().sum(1).mean(), rtol=1e-4, atol=0)
    m.student_loss(student, rng(0, "stage 1"), draw=lambda g: (x_0, None), teacher=None, t_limits=(0.2, 0.9))
    _, t, r = asked[-1]
    assert (r.min().item(), t.max().item()) == pytest.approx((0.2, 0.9))  # clamped
    _, log = m.student_loss(student, rng(0, 1), draw=lambda g: (x_0, None), teacher=teacher, share_spans=1.0)
    assert log["v_error"] == 0  # of no row


def test_dropout(m=meanflow_td):
    """One label in ten is the null class, drawn anew; the others stay; without a null class all do."""
    heard, y, x_0 = [], torch.arange(20_000) % 3, torch.zeros(20_000, 2)
    net = lambda x_t, *, t, y: heard.append(y) or x_t  # noqa: E731
    for step, null_class in ((0, 3), (1, 3), (0, None)):
        m.teacher_loss(net, rng(0, "drop", step), draw=lambda g: (x_0, y), null_class=null_class)
    for labels in heard[:2]:
        dropped = labels == 3
        assert all(0.08 < dropped[y == k].float().mean() < 0.12 for k in range(3))
        assert torch.equal(labels[~dropped], y[~dropped])
    assert not torch.equal(heard[0], heard[1]) and torch.equal(heard[2], y)


def test_update(m=meanflow_td):
    """The gradient is the mean of the parts', each drawn by words of its own; clipped; the rate is what was given."""
    net = network()
    before, parts = copy.deepcopy(net), [rng("a", 1, k) for k in range(4)]

    def loss_of(generator, net=net):
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        return net(x, t=x[:, 0], r=x[:, 1]).square().mean(), {}

    mean = sum(loss_of(generator, before)[0] for generator in parts) / 4
    expected = torch.autograd.grad(mean, list(before.parameters()))
    norm = torch.stack([g.norm() for g in expected]).norm()
    optimizer = torch.optim.SGD(net.parameters(), lr=9.0)
    log = m.update(net, optimizer, loss_of, lr=0.1, words=("a", 1), parts=4, clip=norm.item() / 2)
    torch.testing.assert_close(log["gradient"], norm)
    for p, q, g in zip(net.parameters(), before.parameters(), expected):
        torch.testing.assert_close(p, q - 0.05 * g)


def test_the_average_network_forgets_its_start():
    """EMA: d = min(decay, (1 + step) / (10 + step))."""
    net = VelocityMLP(2, 4, 1)
    ema = copy.deepcopy(net)
    for step, d in ((0, 0.1), (10, 0.55), (10**6, 0.999)):
        nn.init.constant_(net.out.bias, 1.0)
        nn.init.zeros_(ema.out.bias)
        meanflow_td.update_ema(ema, net, step)
        torch.testing.assert_close(ema.out.bias, torch.full((2,), 1 - d))


def td_gradient(*passes):
    """The gradient of one loss of stage 1 on a tiny teacher and student, with these switches of DiT on."""
    student, teacher = tiny_teacher(1, two_times=True), tiny_teacher(9).requires_grad_(False)
    for name in ("checkpointing", "compiling"):
        setattr(models.DiT, name, name in passes)
    draw = lambda g: (torch.randn(6, 1, 8, 8, generator=g), torch.arange(6) % 3)  # noqa: E731
    loss, _ = meanflow_td.student_loss(student, rng(0, "td"), draw=draw, teacher=teacher)
    return torch.autograd.grad(loss, student.parameters())


def test_checkpointing_and_compiling_change_no_gradient(monkeypatch):
    """Checkpoints take the pass with a graph alone; the compiled block also the teacher's, and never a tangent."""
    kept, called, checkpoint = [], [], models.checkpoint

    def block_forward(block, x, c):
        called.append(forward_ad.unpack_dual(x).tangent is None)
        return models.DiTBlock.forward(block, x, c)

    monkeypatch.setattr(models, "checkpoint", lambda *args, **options: kept.append(1) or checkpoint(*args, **options))
    monkeypatch.setattr(models, "compiled_block", lambda: block_forward)
    for switch in ("checkpointing", "compiling"):
        assert all(torch.equal(a, b) for a, b in zip(td_gradient(switch), td_gradient()))
    assert len(kept) == 2 and called == [True] * 4  # two blocks


@pytest.mark.slow
def test_compiling_in_earnest(m=models):
    """torch.compile, with checkpoints: the same gradient up to rounding."""
    net, x, t, y, found = m.DiT(8, 4, 1, 16, 2, 2), wave(6, 1, 8, 8), torch.linspace(0.1, 0.9, 6), torch.arange(6), []
    for k, parameter in enumerate(net.parameters()):
        nn.init.normal_(parameter, std=0.15, generator=rng(0, k))
    for net.compiling, net.checkpointing in ((True, True), (False, False)):
        found.append(torch.autograd.grad(net(x, t=t, y=y).square().sum(), net.parameters()))
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def test_sample(m=meanflow_td):
    """One step of the exact average velocity gives the data, and so do five; generate has a graph, sample has none."""
    eps, net = noise(), network()
    for steps in (1, 5):
        torch.testing.assert_close(m.sample(GaussianFlow().average_velocity, eps, steps=steps), MEAN + STD * eps)
    x_gen, x_0 = m.generate(net, eps, steps=3), m.sample(net, eps, steps=3)
    assert torch.equal(x_gen, x_0) and x_gen.requires_grad and not x_0.requires_grad


def test_teachers_samplers(m=meanflow_td):
    """Heun's method is of second order, towards the exact endpoints."""
    eps = noise()
    errors = [(m.sample_ode(GaussianFlow().velocity, eps, steps=n) - (MEAN + STD * eps)).abs().max().item()
              for n in (20, 40)]  # fmt: skip
    assert errors[1] < 1e-2 and errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    with pytest.raises(ValueError):
        m.sample_ode(GaussianFlow().velocity, eps, steps=0)


BROKEN = [
    (test_exact_gaussian, "(v - expand_times(t - r, v) * du_dt)", "(v + expand_times(t - r, v) * du_dt)"),
    (test_exact_gaussian, "(v - expand_times(t - r, v) * du_dt)", "(v - du_dt)"),
    (test_du_dt, "x_t[rows].detach(), v[rows].detach()", "x_t[rows].detach(), 0 * v[rows]"),
    (test_du_dt, "torch.ones_like(t[rows])", "torch.zeros_like(t[rows])"),
    (test_gradient, "(err.detach() + c)", "(err + c)"),
    (test_labels, "y[rows])", "y.flip(0)[rows])"),
    (test_stage_1, "x_t = add_noise(x_0, eps, t)", "x_t = add_noise(eps, x_0, t)"),
    (test_stage_1, "v = eps - x_0 if teacher", "v = x_0 - eps if teacher"),
    (test_stage_1, "else with_labels(teacher, y)(x_t, t=t)", "else with_labels(teacher, y)(x_t, t=r)"),
    (test_dropout, "(dropped, null_class, y)", "(dropped, y, null_class)"),
    (test_update, "(loss / parts).backward()", "loss.backward()"),
    (test_update, "loss_of(rng(*words, k, device=device))", "loss_of(rng(*words, device=device))"),
    (test_sample, "x = x - u(x, t=t, r=r) / steps", "x = x - u(x, t=t, r=r)"),
    (test_teachers_samplers, "(v_t + v_r) / (2 * steps)", "v_t / steps"),
]  # fmt: skip


@pytest.mark.parametrize("check, old, new", BROKEN)
def test_a_broken_copy_is_caught(check, old, new):
    """Each of these faults fails the test beside it."""
    with pytest.raises(AssertionError):
        check(m=broken(meanflow_td, (old, new)))


def test_a_target_with_a_gradient_is_caught():
    """The target is held fixed twice, so both have to break."""
    module = broken(meanflow_td, ("with torch.no_grad(), forward_ad.dual", "with forward_ad.dual"),
                    ("* du_dt).detach(), du_dt", "* du_dt), du_dt"))  # fmt: skip
    with pytest.raises(AssertionError):
        test_gradient(module)

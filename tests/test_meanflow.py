"""Stage 1 against oracles that are not the code under test: a closed-form Gaussian, scipy's ODE solver, differences.

Each check is a function of the module that it checks, so that it can be run on a broken copy too, and be seen to fail.
"""

import numpy as np
import pytest
import torch
from helpers import broken, tiny_teacher, without_times
from scipy.integrate import solve_ivp
from torch import nn

import meanflow_td
from data import GaussianMixture, rng
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


def network(dim=3):
    """A student in float64 whose second time has an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = VelocityMLP(dim, 16, 2, two_times=True).double()
        torch.nn.init.normal_(net.embed_duration.weight, std=0.1)
    return net


# ---------------------------------------------------------------------------------------------------------------------
# The identity
# ---------------------------------------------------------------------------------------------------------------------


def check_exact_gaussian(module):
    flow = GaussianFlow()
    x_t, r, t = points()
    loss, err = module.meanflow_loss(flow.average_velocity, x_t, flow.velocity(x_t, t=t), r=r, t=t)
    assert err.max() < 1e-20
    assert loss < 1e-18


def test_the_exact_average_velocity_of_a_gaussian_has_zero_loss():
    check_exact_gaussian(meanflow_td)


def check_jvp(module):
    net, h = network(), 1e-6
    x_t, r, t = points()
    v = torch.randn(x_t.shape, generator=rng(0, "v"), dtype=torch.float64)
    u_target, du_dt = module.meanflow_target(net, x_t, v, r=r, t=t)
    with torch.no_grad():
        ahead, behind = (net(x_t + s * h * v, t=t + s * h, r=r) for s in (1, -1))
    difference = (ahead - behind) / (2 * h)
    torch.testing.assert_close(du_dt, difference, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(u_target, v - (t - r)[:, None] * difference, rtol=1e-6, atol=1e-7)


def test_du_dt_is_the_central_difference_along_the_path():
    check_jvp(meanflow_td)


def check_gradient(module):
    """The loss's gradient is that of |u - constant|^2 with MeanFlow's weight, the constant from central differences."""
    net, h, p, c = network(), 1e-6, 0.5, 0.1
    x_t, r, t = points()
    v = torch.randn(x_t.shape, generator=rng(0, "v"), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (net(x_t + s * h * v, t=t + s * h, r=r) for s in (1, -1))
        constant = v - (t - r)[:, None] * (ahead - behind) / (2 * h)
        weight = 1 / ((net(x_t, t=t, r=r) - constant).square().sum(1) + c) ** p
    expected = torch.autograd.grad((weight * (net(x_t, t=t, r=r) - constant).square().sum(1)).mean(), net.parameters())
    loss, _ = module.meanflow_loss(net, x_t, v, r=r, t=t, p=p, c=c)
    for ours, theirs in zip(torch.autograd.grad(loss, net.parameters()), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_the_target_and_the_weight_are_held_fixed():
    check_gradient(meanflow_td)


MUTATIONS = {
    "sign": [("(v - expand_times(t - r, v) * du_dt)", "(v + expand_times(t - r, v) * du_dt)")],
    "factor": [("(v - expand_times(t - r, v) * du_dt)", "(v - du_dt)")],
    "tangent of x": [("tangents = (v[rows].detach(), torch", "tangents = (torch.zeros_like(v[rows]), torch")],
    "tangent of t": [("torch.ones_like(t_rows))", "torch.zeros_like(t_rows))")],
    "stop-gradient": [("with torch.no_grad(), forward_ad.dual", "with forward_ad.dual"),
                      ("du_dt).detach(), du_dt", "du_dt), du_dt")],
    "weight's stop-gradient": [("(err.detach() + c)", "(err + c)")],
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_identity_is_caught(mutation):
    module = broken(meanflow_td, *MUTATIONS[mutation])
    caught = []
    for check in (check_exact_gaussian, check_jvp, check_gradient):
        try:
            check(module)
        except AssertionError:
            caught.append(check.__name__)
    by = {"stop-gradient": ["check_gradient"], "weight's stop-gradient": ["check_gradient"]}
    assert caught == by.get(mutation, ["check_exact_gaussian", "check_jvp", "check_gradient"])


# ---------------------------------------------------------------------------------------------------------------------
# A mixture, whose flow has no closed form: scipy integrates it
# ---------------------------------------------------------------------------------------------------------------------

MIXTURE = GaussianMixture(torch.tensor([[-1.0, 0.3], [1.2, 0.5], [0.1, -1.1]], dtype=torch.float64), 0.5)


def path_end(x_t, *, t, r, steps=50):
    """x_r from x_t along the mixture's flow, by Runge and Kutta's method in torch, so that it can be differentiated."""
    h = (r - t) / steps
    x, s = x_t, t
    for _ in range(steps):
        k1 = MIXTURE.velocity(x, t=s)
        k2 = MIXTURE.velocity(x + h[:, None] / 2 * k1, t=s + h / 2)
        k3 = MIXTURE.velocity(x + h[:, None] / 2 * k2, t=s + h / 2)
        k4 = MIXTURE.velocity(x + h[:, None] * k3, t=s + h)
        x, s = x + h[:, None] / 6 * (k1 + 2 * k2 + 2 * k3 + k4), s + h
    return x


def mixture_average_velocity(x_t, *, t, r):
    return (x_t - path_end(x_t, t=t, r=r)) / (t - r)[:, None]


def check_exact_mixture(module):
    x_t, r, t = points(16, 2)
    _, err = module.meanflow_loss(mixture_average_velocity, x_t, MIXTURE.velocity(x_t, t=t), r=r, t=t)
    assert err.max() < 1e-10


def test_the_exact_average_velocity_of_a_mixture_has_zero_loss():
    x_t, r, t = points(16, 2)
    for i in range(4):  # the oracle's own oracle: scipy, to 1e-6
        field = lambda s, x: MIXTURE.velocity(torch.tensor(x)[None], t=torch.tensor([s]))[0].numpy()  # noqa: E731
        solution = solve_ivp(field, (t[i].item(), r[i].item()), x_t[i].numpy(), method="DOP853", rtol=1e-10, atol=1e-10)
        ours = path_end(x_t[i : i + 1], t=t[i : i + 1], r=r[i : i + 1])[0].numpy()
        np.testing.assert_allclose(ours, solution.y[:, -1], atol=1e-6)
    check_exact_mixture(meanflow_td)
    for mutation in ("sign", "factor", "tangent of x", "tangent of t"):
        with pytest.raises(AssertionError):
            check_exact_mixture(broken(meanflow_td, *MUTATIONS[mutation]))


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching is MeanFlow with r = t
# ---------------------------------------------------------------------------------------------------------------------


def test_at_r_equal_t_it_is_flow_matching_to_the_bit():
    net = network().float()
    x_t, _, t = (a.float() for a in points())
    v = torch.randn(x_t.shape, generator=rng(0, "v"))
    squares = ((net(x_t, t=t, r=t) - v) ** 2).sum(dim=1)
    loss, err = meanflow_td.meanflow_loss(net, x_t, v, r=t, t=t, p=0.0)
    assert torch.equal(err, squares)
    assert torch.equal(loss, squares.mean())
    one_time = VelocityMLP(3, 16, 2)
    loss, err = meanflow_td.flow_matching_loss(one_time, x_t, v, t=t)
    assert torch.equal(err, ((one_time(x_t, t=t) - v) ** 2).sum(dim=1))
    assert torch.equal(loss, err.mean())


def test_only_rows_with_a_span_are_differentiated():
    net, sizes = network(), []

    def counting(x_t, *, t, r):
        sizes.append(len(x_t))
        return net(x_t, t=t, r=r)

    x_t, r, t = points(20)
    r[5:] = t[5:]
    _, du_dt = meanflow_td.meanflow_target(counting, x_t, x_t, r=r, t=t)
    assert sizes == [5]
    assert (du_dt[:5] != 0).any(dim=1).all() and (du_dt[5:] == 0).all()


def check_labels(module):
    """du/dt of a network that multiplies by its label, on rows of which every other has a span."""
    def labelled(x_t, *, t, r, y):
        return x_t * y[:, None] + t[:, None] * y[:, None]

    x_t, r, t = points(6, 2)
    r[::2] = t[::2]
    y = torch.arange(6.0, dtype=torch.float64)
    u_target, du_dt = module.meanflow_target(labelled, x_t, x_t, r=r, t=t, y=y)
    expected = (x_t + 1) * y[:, None]  # d/dt (x y + t y) with dx/dt = v = x
    expected[::2] = 0
    torch.testing.assert_close(du_dt, expected)
    _, err = module.meanflow_loss(labelled, x_t, x_t, r=r, t=t, y=y)
    torch.testing.assert_close(err, (labelled(x_t, t=t, r=r, y=y) - u_target).square().sum(1))
    one_time = lambda x_t, *, t, y: labelled(x_t, t=t, r=t, y=y)  # noqa: E731
    _, err = module.flow_matching_loss(one_time, x_t, x_t, t=t, y=y)
    torch.testing.assert_close(err, (one_time(x_t, t=t, y=y) - x_t).square().sum(1))


def test_a_label_reaches_the_network_row_by_row():
    check_labels(meanflow_td)
    for old, new in [("y[rows]", "y"), ("y[rows]", "y[:len(rows)]"), ("y[rows]", "y.flip(0)[rows]"),
                     ("t=t, r=r, **labelled(y)) - u_target", "t=t, r=r, **labelled(y.flip(0))) - u_target")]:
        with pytest.raises((AssertionError, RuntimeError)):
            check_labels(broken(meanflow_td, (old, new)))


def check_stage_1(module):
    """`student_objective` is the loss of a point of the path and the velocity there: the teacher's, or eps - x_0."""
    net, (x_0, eps) = network(2).float(), torch.randn(2, 64, 2, generator=rng(0, "stage 1"))

    def teacher(x_t, *, t):
        return torch.sin(3 * x_t) + t[:, None]

    for source in (teacher, None):
        _, terms = module.student_objective(net, x_0, None, eps, rng(0, "times"), teacher=source)
        r, t = terms["rows"]["r"], terms["rows"]["t"]
        x_t = (1 - t)[:, None] * x_0 + t[:, None] * eps
        v = eps - x_0 if source is None else teacher(x_t, t=t)
        _, err = meanflow_td.meanflow_loss(net, x_t, v, r=r, t=t)
        torch.testing.assert_close(terms["rows"]["error"], err)
        assert (r < t).float().mean() == 0.75


def test_stage_1_asks_for_the_velocity_at_a_point_of_the_path():
    check_stage_1(meanflow_td)
    path = "    x_t = add_noise(x_0, eps, t)\n"
    for old, new in [(path, path.replace("x_0, eps, t", "eps, x_0, t")), (path, path.replace("eps, t", "eps, r")),
                     ("None else teacher(x_t, t=t, **", "None else teacher(x_t, t=r, **"),
                     ("v = eps - x_0 if teacher", "v = x_0 - eps if teacher")]:  # fmt: skip
        with pytest.raises(AssertionError):
            check_stage_1(broken(meanflow_td, (old, new)))


def test_muon_gets_the_matrices_of_the_blocks_and_adam_all_else():
    net = tiny_teacher()
    (adam, lr), (muon, lr_muon) = meanflow_td.make_optimizers(net, 1e-3, 1e-2)
    names = {id(p): name for name, p in net.named_parameters()}
    of = lambda optimizer: {names[id(p)] for p in optimizer.param_groups[0]["params"]}  # noqa: E731
    assert (lr, lr_muon) == (1e-3, 1e-2) and of(adam) | of(muon) == set(names.values())
    assert of(muon) == {name for name in names.values() if ".blocks." in name and name.endswith(".weight")}
    assert len(of(muon)) == 10 and not of(adam) & of(muon)  # of two blocks: qkv, proj, fc1, fc2, adaLN
    assert len(meanflow_td.make_optimizers(net, 1e-3)) == 1


def test_momentum_is_that_of_both_optimizers(monkeypatch):
    net = tiny_teacher()
    for given, expected in ((None, (0.9, 0.95)), (0.0, (0.0, 0.0)), (0.3, (0.3, 0.3))):
        (adam, _), (muon, _) = meanflow_td.make_optimizers(net, 1e-3, 1e-2, given)
        assert (adam.param_groups[0]["betas"][0], muon.param_groups[0]["momentum"]) == expected
    heard, made = [], meanflow_td.make_optimizers
    monkeypatch.setattr(meanflow_td, "make_optimizers", lambda *args: heard.append(args[1:]) or made(*args))
    draw = lambda n, g: (torch.zeros(n, 1, 8, 8), torch.zeros(n, dtype=torch.long))  # noqa: E731
    meanflow_td.train(net, draw, meanflow_td.teacher_objective, steps=1, batch=2, seed=0, stream="t", name="t",
                      lr=1e-3, lr_muon=1e-2, momentum=0.3)  # fmt: skip
    assert heard == [(1e-3, 1e-2, 0.3)]


class Wave(nn.Module):
    """u = a cos 20t + b sin 20t: a fault of the student that swings along the path."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x_t, *, t, r):
        return (self.a[0] * torch.cos(20 * t) + self.a[1] * torch.sin(20 * t))[:, None]


def size_after_training(momentum, spans):
    """How large a Wave is after 300 updates towards a velocity of 0, from 1."""
    net, t, nothing = Wave(), torch.linspace(0.005, 1, 200), torch.zeros(200, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.005, momentum=momentum, dampening=momentum)
    for _ in range(300):
        loss, _ = meanflow_td.meanflow_loss(net, nothing, nothing, r=torch.zeros(200) if spans else t, t=t, p=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.a.norm().item()


def test_momentum_makes_a_fault_grow_that_du_dt_turns():
    """Why PLANS has no momentum in stage 1 on glyphs. The step towards the target, -(u + (t - r) du/dt), shrinks a Wave
    and turns it, since a derivative makes a sine of a cosine; at 20 rad it turns it ten times as much (eigenvalues
    1 +- 10i, of the gradient of |u - u_target|^2). Momentum repeats steps that were made for where the Wave was before
    it turned, and these drive it outwards; so would a step four times as long, without momentum."""
    assert size_after_training(0.0, spans=True) < 0.5
    assert size_after_training(0.95, spans=True) > 10
    assert size_after_training(0.95, spans=False) < 0.5  # r = t: nothing turns
    assert meanflow_td.PLANS["default"]["td"]["momentum"] == 0


def check_dropout(module):
    """One label in ten is the null class, drawn anew; the others stay; without a null class all do."""
    heard = []

    def net(x_t, *, t, y):
        heard.append(y)
        return x_t

    y = torch.arange(20_000) % 3
    x_0, eps = torch.randn(2, 20_000, 2, generator=rng(0, "x"))
    for step, null_class in [(0, 3), (1, 3), (0, None)]:
        module.teacher_objective(net, x_0, y, eps, rng(0, "objective", step), null_class=null_class)
    for labels in heard[:2]:
        dropped = labels == 3
        assert 0.09 < dropped.float().mean() < 0.11 and torch.equal(labels[~dropped], y[~dropped])
        assert all(0.08 < dropped[y == k].float().mean() < 0.12 for k in range(3))
    assert not torch.equal(heard[0], heard[1]) and torch.equal(heard[2], y)


def test_one_label_in_ten_is_dropped():
    check_dropout(meanflow_td)
    for old, new in [("< 0.1  #", "< 0.2  #"), ("(dropped, null_class, y)", "(dropped, 0, y)"),
                     ("(dropped, null_class, y)", "(dropped, y, null_class)")]:
        with pytest.raises(AssertionError):
            check_dropout(broken(meanflow_td, (old, new)))


def test_r_after_t_is_refused():
    x_t, r, t = points(4)
    with pytest.raises(ValueError, match=r"needs r <= t, but row 2 has r = 0.9 > t = 0.5"):
        r, t = torch.zeros(4), torch.full((4,), 0.5)
        r[2] = 0.9
        meanflow_td.meanflow_loss(network(), x_t, x_t, r=r, t=t)


def test_drawn_times():
    r, t = meanflow_td.draw_times(10_000, rng(0, "times"))
    assert (r <= t).all() and r.min() >= 0 and t.max() <= 1
    assert ((r < t).sum() - 7500).abs() <= 1 and (r[7500:] == t[7500:]).all()
    # the larger of two uniform draws: mean 2/3; the smaller: 1/3; and 0.3 of the spans reach down to 0
    r, t = r[:7500], t[:7500]
    assert abs((r == 0).float().mean() - 0.3) < 0.02
    assert abs(t.mean() - 2 / 3) < 0.01 and abs(r[r > 0].mean() - 1 / 3) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------------------------------


def check_sampler(module):
    eps = torch.randn(20_000, 3, generator=rng(0, "eps"), dtype=torch.float64)
    x_0 = module.sample(GaussianFlow().average_velocity, eps)
    torch.testing.assert_close(x_0, MEAN + STD * eps)  # the flow keeps the quantile
    assert abs(x_0.mean() - MEAN) < 0.01 and abs(x_0.std() - STD) < 0.01
    few = torch.randn(16, 2, generator=rng(0, "few"), dtype=torch.float64)
    one = module.sample(mixture_average_velocity, few)
    torch.testing.assert_close(one, module.sample(mixture_average_velocity, few, steps=5), atol=1e-6, rtol=0)


def test_one_step_of_the_exact_average_velocity_gives_the_data_and_so_do_five():
    check_sampler(meanflow_td)


@pytest.mark.parametrize("old, new", [
    ("x = x - net(", "x = x + net("),
    ("(k + 1) / steps)\n        x = x - net", "k / steps - 1e-3)\n        x = x - net"),
])  # fmt: skip
def test_a_broken_sampler_is_caught(old, new):
    with pytest.raises(AssertionError):
        check_sampler(broken(meanflow_td, (old, new)))


def test_heun_is_of_second_order():
    eps = torch.randn(64, 3, generator=rng(0, "eps"), dtype=torch.float64)
    errors = [(meanflow_td.sample_ode(GaussianFlow().velocity, eps, steps=n) - (MEAN + STD * eps)).abs().max()
              for n in (20, 40)]  # fmt: skip
    assert errors[1] < 1e-2
    assert 3.5 < errors[0] / errors[1] < 4.5
    euler = broken(meanflow_td, ("(v_t + v_r) / 2", "v_t"))
    assert (euler.sample_ode(GaussianFlow().velocity, eps, steps=40) - (MEAN + STD * eps)).abs().max() > 1e-2


def test_euler_is_of_first_order():
    eps = torch.randn(64, 3, generator=rng(0, "eps"), dtype=torch.float64)
    errors = [(meanflow_td.sample_euler(GaussianFlow().velocity, eps, steps=n) - (MEAN + STD * eps)).abs().max()
              for n in (80, 160, 320)]  # fmt: skip
    assert errors[0] > 1e-3
    assert all(1.8 < a / b < 2.2 for a, b in zip(errors, errors[1:]))
    labelled = lambda x, *, t, y: GaussianFlow().velocity(x, t=t) + y[:, None]  # noqa: E731
    shifted = meanflow_td.sample_euler(labelled, eps, torch.ones(64, dtype=torch.float64), steps=1)
    torch.testing.assert_close(shifted, meanflow_td.sample_euler(GaussianFlow().velocity, eps, steps=1) - 1)


def test_generate_has_a_graph_and_sample_has_none():
    net, eps = network(), torch.randn(8, 3, generator=rng(0, "eps"), dtype=torch.float64)
    for steps in (1, 3):
        x_gen, x_0 = meanflow_td.generate(net, eps, steps=steps), meanflow_td.sample(net, eps, steps=steps)
        assert torch.equal(x_gen, x_0) and x_gen.requires_grad and not x_0.requires_grad
        x_gen.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("sampler", [meanflow_td.sample, meanflow_td.generate, meanflow_td.sample_ode,
                                     meanflow_td.sample_euler])
def test_no_step_is_no_sample(sampler):
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        sampler(network(), torch.zeros(1, 3), steps=0)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def test_training_is_the_same_twice_and_stops_at_a_number_that_is_none():
    def run(draw):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = VelocityMLP(2, 8, 1)
        objective = meanflow_td.teacher_objective
        return meanflow_td.train(net, draw, objective, steps=3, batch=16, lr=1e-3, seed=0, stream="t", name="t")

    def draw(batch, generator):
        return MIXTURE.draw(batch, generator).float(), None

    (a, rows_a), (b, rows_b) = run(draw), run(draw)
    assert without_times(rows_a) == without_times(rows_b) and len(rows_a) == 2
    assert rows_a[0]["gradient"] > 0 and rows_a[0]["seconds_per_step"] >= 0
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    with pytest.raises(FloatingPointError, match="t, seed 0, step 0: loss is nan"):
        run(lambda n, g: (torch.full((n, 2), float("nan")), None))


def test_the_learning_rate_rises_and_falls():
    rates = [meanflow_td.learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02, rel=1e-3) and max(rates) == pytest.approx(2.0, rel=0.05)
    assert rates.index(max(rates)) in range(90, 110) and rates[-1] < 1e-4
    floored = [meanflow_td.learning_rate(step, 1000, 2.0, floor=0.5) for step in range(1000)]
    assert floored[:500] == rates[:500] and floored[500:] == [1.0] * 500

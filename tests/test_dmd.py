"""Stage 2 against the closed forms of Gaussians, and which network each update moves.

A test takes the module m, so that a broken copy can be given to it, and be seen to fail: the table BROKEN at the end.
"""

import copy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from helpers import GaussianMixture, broken, seeded, tiny_teacher
from torch import nn
from torch.distributions import Normal, kl_divergence

import dmd_refine
import meanflow_td
from awd import AdaptiveWeightedDiscriminator
from data import rng
from meanflow_td import generate, sample, teacher_loss, train
from models import VelocityMLP, add_noise, score_from_velocity

REAL = GaussianMixture([[0.5]], 0.6)  # one component: a plain Gaussian, in 1D
MEAN, LOG_STD = 1.1, -0.4  # of the generator: x_gen = mean + exp(log_std) z

# --- The gradient ----------------------------------------------------------------------------------------------------


def hermite_grid(n=8):
    """Nodes (n^2,) z and noise, and weights (n^2,), that integrate polynomials over two unit Gaussians exactly."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    z, noise = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.flatten(), noise.flatten(), torch.outer(weights, weights).flatten()


def test_kl(m=dmd_refine):
    """At each t the gradient is the exact KL's: autograd through its closed form, against Gauss-Hermite quadrature."""
    for time in (0.1, 0.5, 0.9):
        parameters = torch.tensor([MEAN, LOG_STD], dtype=torch.float64, requires_grad=True)
        mean, std = parameters[0], parameters[1].exp()
        both = (mean, std), (0.5, 0.6)
        at_t = [Normal((1 - time) * mu, (((1 - time) * s) ** 2 + time**2) ** 0.5) for mu, s in both]
        (expected,) = torch.autograd.grad(kl_divergence(*at_t), parameters)
        # ours: the mean over x_gen and its noise of grad . dx_gen/dparameters, with exact velocities
        z, noise, weight = hermite_grid()
        x_gen = (MEAN + np.exp(LOG_STD) * z)[:, None]
        x_t, t = (1 - time) * x_gen + time * noise[:, None], torch.full_like(z, time)
        v_fake = GaussianMixture([[MEAN]], np.exp(LOG_STD)).velocity(x_t, t=t)
        v_real = REAL.velocity(x_t, t=t)
        grad = m.dmd_gradient(x_gen, x_t, t=t, v_real=v_real, v_fake=v_fake) * (x_gen - x_t + time * v_real).abs()
        exact = weight * grad[:, 0] * (1 - time) ** 2 / time**2  # without the normaliser
        ours = torch.stack([exact.sum(), (exact * np.exp(LOG_STD) * z).sum()])
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_normalised(m=dmd_refine):
    """The normalised gradient is its formula, sample by sample; it is zero where the fake branch is the teacher."""
    x_gen, x_t, v_real, v_fake = torch.randn(4, 8, 3, 4, 4, generator=rng(0, "dmd"), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    grad = m.dmd_gradient(x_gen, x_t, t=t, v_real=v_real, v_fake=v_fake)
    for i in range(8):
        x0_real, x0_fake = x_t[i] - t[i] * v_real[i], x_t[i] - t[i] * v_fake[i]
        torch.testing.assert_close(grad[i], (x0_fake - x0_real) / (x_gen[i] - x0_real).abs().mean())
    assert not m.dmd_gradient(x_gen, x_t, t=t, v_real=v_real, v_fake=v_real).any()
    # s_real - s_fake = (1 - t)/t^2 (x0_real - x0_fake)
    t_ = t[:, None, None, None]
    scores = score_from_velocity(x_t, t, v_real) - score_from_velocity(x_t, t, v_fake)
    torch.testing.assert_close(scores, (1 - t_) / t_**2 * t_ * (v_fake - v_real))
    (ours,) = torch.autograd.grad(m.dmd_loss(x_gen.requires_grad_(True), grad), x_gen)
    torch.testing.assert_close(ours, grad / x_gen.numel())


# --- Who is moved by what --------------------------------------------------------------------------------------------


def cast(images=False, pooling="attention"):
    """Student, teacher, fake branch and discriminator, small, and draw. images: DiTs with labels; else 2D points."""
    if images:
        nets = tiny_teacher(1, two_times=True), tiny_teacher(2), tiny_teacher(3)
    else:
        nets = seeded(lambda: (VelocityMLP(2, 8, 2, two_times=True), VelocityMLP(2, 8, 2), VelocityMLP(2, 8, 2)))
    dims, shape, y = ([16, 16], (16, 1, 8, 8), torch.arange(16) % 3) if images else ([8], (16, 2), None)
    discriminator = seeded(lambda: AdaptiveWeightedDiscriminator(dims, pooling)).eval() if pooling else None
    nets[1].requires_grad_(False)
    return *nets, discriminator, lambda generator: (torch.randn(shape, generator=generator), y)


def refined(m, players, **how):
    """The average network of a short refinement that leaves no file."""
    with TemporaryDirectory() as folder:
        return m.refine(Path(folder, "t.pt"), *players, **{"steps": 1, "taps": (0, 1), **how})


def watched(m, monkeypatch, players, **how):
    """For each update of a refinement: its rate, Adam's betas and the clip, and which players have gradients."""
    updates, update = [], meanflow_td.update

    def watched_update(net, optimizer, *args, **options):
        for player in players[:4]:
            player.zero_grad(set_to_none=True)
        log = update(net, optimizer, *args, **options)
        have = [{p.grad is not None for p in player.parameters()} for player in players[:4]]
        about = optimizer.param_groups[0]["betas"], options.get("clip")
        updates.append((options["lr"], about, have))
        return log

    with monkeypatch.context() as patch:
        patch.setattr(m, "update", watched_update)
        refined(m, players, **how)
    return updates


@pytest.mark.parametrize("images", [False, True])
def test_routing(images, monkeypatch, m=dmd_refine):
    """Each update gives gradients to its own network alone, and to all of it; rates, betas and clip are as told."""
    rates = dict(lr={"student": 1e-2, "fake": 2e-2, "discriminator": 3e-2})
    updates = watched(m, monkeypatch, cast(images), steps=3, clip=1.5, **rates)
    student, _, fake, discriminator = [[{k == player} for k in range(4)] for player in range(4)]
    expected = [(fake, 2e-2), (fake, 2e-2), (discriminator, 3e-2), (student, 1e-2)] * 3
    assert [have for *_, have in updates] == [have for have, _ in expected]
    falling = [meanflow_td.learning_rate(k // 4, 3, peak) for k, (_, peak) in enumerate(expected)]
    assert [lr for lr, *_ in updates] == pytest.approx(falling)
    assert all(about == ((0.0, 0.99), 1.5) for _, about, _ in updates)


def test_sides(m=dmd_refine):
    """After some updates the discriminator gives data the higher logit, and says so."""
    _, teacher, _, discriminator, draw = cast(images=True)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    x_data, y = draw(rng(0, "x"))
    x_data, x_gen = x_data.abs(), -x_data.abs().flip(0)
    for k in range(20):
        optimizer.zero_grad()
        loss, log = m.discriminator_loss(discriminator, teacher, x_data, x_gen, y, rng(0, k), taps=(0, 1))
        loss.backward()
        optimizer.step()
    t = torch.full((16,), 0.1)
    logit_data, logit_gen = (discriminator(teacher.features(x, t=t, y=y, taps=(0, 1))).mean() for x in (x_data, x_gen))
    assert logit_data > logit_gen + 0.1 and log["accuracy"] > 0.7 and log["logit_data"] > log["logit_gen"]


@pytest.mark.parametrize("images", [False, True])
def test_adversarial(images, m=dmd_refine):
    """Where the fake branch is the teacher, the adversarial term stands alone, and a step along it raises the logit."""
    student, teacher, _, discriminator, draw = cast(images)
    (eps, y), (noise, _), t = draw(rng(0, "eps")), draw(rng(0, "noise")), torch.full((16,), 0.1)

    def logit():
        x_t = add_noise(sample(student, eps, y), noise, t)
        return discriminator(teacher.features(x_t, t=t, y=y, taps=(0, 1))).mean()

    before, x_gen = logit(), generate(student, eps, y)
    loss, log = m.generator_loss(teacher, teacher, discriminator, x_gen, y, rng(0, "t"), lambda_adv=0.1, taps=(0, 1))
    loss.backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= 0.01 * p.grad
    assert log["grad_dmd"] == 0 and logit() > before


def test_pulls(m=dmd_refine):
    """The logged pulls are the norms of the two terms' gradients on x_gen: at weights 0 and huge, one term is all."""
    _, teacher, fake, discriminator, draw = cast(images=True)
    x, y = draw(rng("pulls"))
    for weight, name in ((0.0, "pull_dmd"), (1e6, "pull_adv")):
        x_gen = x.clone().requires_grad_(True)
        loss, log = m.generator_loss(teacher, fake, discriminator, x_gen, y, rng("t"), lambda_adv=weight, taps=(0, 1))
        loss.backward()
        torch.testing.assert_close(log[name], x_gen.grad.norm(), rtol=1e-4, atol=0)


def test_a_blurred_patch(size=16):
    """A quarter of the sides wide, inside the image, softer, and where there is something to blur."""
    x = torch.randn(50, 2, size, size, generator=rng("blur"))
    changed = dmd_refine.blur_patch(x, rng("place")) - x
    where = changed.abs().amax(1) > 0
    assert (where.flatten(1).sum(1) == (size // 4) ** 2).all()
    assert (where.any(1).sum(1) == size // 4).all() and (where.any(2).sum(1) == size // 4).all()
    assert where.float().mean(0).gt(0).sum() > 200  # every place is possible
    inside = (x + changed).permute(1, 0, 2, 3)[:, where]
    assert 0.1 < inside.var() < 0.2  # the kernel's squares sum to (1 + 4 + 1)^2/16^2 = 0.14
    x = torch.zeros(50, 1, size, size)
    x[:, :, 2, 13] = 1  # one pixel alone can be blurred
    assert (dmd_refine.blur_patch(x, rng("place"))[:, 0, 2, 13] == 0.25).all()


def test_times(m=dmd_refine):
    """DMD sees t in [0.02, 0.98], the discriminator low noise alone, and the fake branch is trained at all t."""
    seen = {}

    def net(name):
        def velocity(x_t, *, t, y=None):
            seen[name] = t
            return 0 * x_t
        return velocity

    x_gen = torch.zeros(4000, 2, requires_grad=True)
    m.generator_loss(net("dmd"), net("dmd, fake"), None, x_gen, None, rng(0, "t"), lambda_adv=0.1, taps=())
    m.fake_loss(net("fake"), x_gen, None, rng(0, "t"))
    _, t = m.noised(x_gen, rng(0, "t"), m.T_ADV)[1:]
    assert torch.equal(seen["dmd"], seen["dmd, fake"])
    for t, low, high in ((seen["dmd"], 0.02, 0.98), (seen["fake"], 0, 1), (t, 0.02, 0.15)):
        assert low <= t.min() < low + 2e-3 and high - 2e-3 < t.max() <= high


# --- One or two calls ------------------------------------------------------------------------------------------------


def test_two_calls(m=dmd_refine):
    """Three rows of four by the formula of one call, the others by that of two, with the gradients of both calls."""
    net = seeded(lambda: VelocityMLP(2, 8, 2, two_times=True)).double()
    nn.init.normal_(net.embed_span.weight, std=0.3, generator=rng(0, "duration"))
    eps, y = torch.randn(8, 2, generator=rng(0, "eps"), dtype=torch.float64), torch.arange(8)
    zero, half, one = (torch.full((8,), t, dtype=torch.float64) for t in (0, 0.5, 1))
    first = eps[:6] - net(eps[:6], t=one[:6], r=zero[:6])
    x_half = eps[6:] - net(eps[6:], t=one[6:], r=half[6:]) / 2  # x_1/2 = eps - u(eps, 1/2, 1) / 2
    expected = torch.cat([first, x_half - net(x_half, t=half[6:], r=zero[6:]) / 2])
    x_gen = m.generate_by_calls(net, eps, y)
    torch.testing.assert_close(x_gen, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), net.parameters()) for x in (x_gen, expected))):
        torch.testing.assert_close(ours, theirs)
    jump = lambda x, *, t, r, y: y[:, None].expand_as(x)  # noqa: E731  whatever the steps, x_0 = eps - y
    torch.testing.assert_close(m.generate_by_calls(jump, eps, y), eps - y[:, None])


def test_fake_by_calls(m=dmd_refine):
    """Samples of 1 call have labels 0 to 2, those of 2 calls 4 to 6, in training and when DMD asks; at first a copy."""
    student, teacher, fake, _, _ = cast(images=True)
    y, told, asked = torch.arange(8) % 3, torch.tensor([0, 1, 2, 0, 1, 2, 4, 5]), []
    x_t, t = torch.randn(8, 1, 8, 8, generator=rng(0, "x")), torch.full((8,), 0.5)
    branch, before = m.FakeByCalls(copy.deepcopy(fake)), fake.net.y_embedder.embedding_table.weight.repeat(2, 1)
    torch.testing.assert_close(branch(x_t, t=t, y=y), fake(x_t, t=t, y=y))
    branch.fake.net.register_forward_pre_hook(lambda net, args, kwargs: asked.append(kwargs["y"]), with_kwargs=True)
    refined(m, (student, teacher, branch, None, lambda generator: (x_t, y)), steps=2, make=m.generate_by_calls)
    assert len(asked) == 6 and all(torch.equal(labels, told) for labels in asked)  # 2 updates of its own and 1 question
    moved = (branch.fake.net.y_embedder.embedding_table.weight != before).any(dim=1)
    assert moved.tolist() == [True, True, True, False, True, True, False, False]


# --- The whole loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("pooling", ["attention", "mean", None])
def test_refining_is_the_same_twice_and_leaves_the_teacher_alone(images, pooling):
    """With attention, with the mean and without a discriminator, to the bit; the student's average has moved."""
    results = []
    for _ in range(2):
        players = cast(images, pooling)
        before, start = copy.deepcopy(players[1]), copy.deepcopy(players[0])
        ema = refined(dmd_refine, players, steps=2)
        assert all(torch.equal(a, b) for a, b in zip(players[1].parameters(), before.parameters()))
        assert any(not torch.equal(a, b) for a, b in zip(ema.parameters(), start.parameters()))
        results.append(list(ema.parameters()))
    assert all(map(torch.equal, *results))


@pytest.mark.slow
def test_dmd_brings_a_gaussian_student_to_the_teacher(tmp_path):
    """Where the answer is known: data N(0.5, 0.6^2), from a start that is far off."""
    student, net = seeded(lambda: (VelocityMLP(1, 16, 1, two_times=True), VelocityMLP(1, 16, 1)))
    draw = lambda generator: (REAL.draw(256, generator), None)  # noqa: E731
    teacher = train(tmp_path / "teacher.pt", net, partial(teacher_loss, draw=draw), steps=400, lr=5e-3)
    eps = torch.randn(4000, 1, generator=rng(0, "eps"))
    assert abs(sample(student, eps).mean() - 0.5) > 0.2
    players = student, teacher, copy.deepcopy(teacher), None, draw
    x = sample(dmd_refine.refine(tmp_path / "dmd.pt", *players, steps=400), eps)
    assert abs(x.mean() - 0.5) < 0.08 and abs(x.std() - 0.6) < 0.08


BROKEN = [
    (test_kl, "return (x0_fake - x0_real) /", "return (x0_real - x0_fake) /"),
    (test_kl, "x0_fake = x0_from_velocity(x_t, t, v_fake)\n    scale", "x0_fake = x_t - v_fake\n    scale"),
    (test_kl, "return (x0_fake - x0_real) /", "return (x0_fake - x0_real) *"),
    (test_normalised, "(x_gen - x0_real).abs()", "(x_t - x0_real).abs()"),
    (test_normalised, ".flatten(1).mean(dim=1)  #", ".flatten(1).sum(dim=1)  #"),
    (test_normalised, "(x_gen - grad).detach()", "(x_gen + grad).detach()"),
    (test_sides, "logit_data, logit_gen = disc", "logit_gen, logit_data = disc"),
    (test_sides, "torch.cat([x_data, x_gen])", "torch.cat([x_gen, x_data])"),
    (partial(test_adversarial, True), "adv = lambda_adv *", "adv = -lambda_adv *"),
    (partial(test_adversarial, True), "* pull).sum()", "* -pull).sum()"),
    (test_times, "T_DMD = 0.02, 0.98", "T_DMD = 0.3, 0.7"),
    (test_two_calls, "ONE_CALL = 0.75", "ONE_CALL = 0.5"),
    (test_two_calls, "eps[one:], y[one:], steps=2", "eps[one:], y[one:], steps=1"),
    (test_fake_by_calls, "y=y + self.labels * two", "y=y"),
]  # fmt: skip


@pytest.mark.parametrize("check, old, new", BROKEN)
def test_a_broken_copy_is_caught(check, old, new):
    """Each of these faults fails the test beside it."""
    with pytest.raises(AssertionError):
        check(m=broken(dmd_refine, (old, new)))


@pytest.mark.parametrize("old, new", [
    ('torch.set_grad_enabled(name == "student")', "torch.enable_grad()"), ("betas=(0.0, 0.99)", "betas=(0.9, 0.99)"),
    ("return generator_loss(teacher, fake, discriminator, x_gen,",
     "return generator_loss(teacher, fake, discriminator, x_gen.detach(),")])  # fmt: skip
def test_a_leak_is_caught(old, new, monkeypatch):
    """A gradient that reaches another player, or none, or momentum."""
    with pytest.raises((AssertionError, RuntimeError)):
        test_routing(True, monkeypatch, broken(dmd_refine, (old, new)))

"""Stage 2 against the closed forms of Gaussians, and which network each update moves."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import broken, tiny_teacher, without_times
from torch.distributions import Normal, kl_divergence

import dmd_refine
import meanflow_td
from awd import AdaptiveWeightedDiscriminator
from data import GaussianMixture, rng
from meanflow_td import generate, sample, teacher_objective, train
from models import VelocityMLP, add_noise, frozen_copy, score_from_velocity

REAL = GaussianMixture(torch.tensor([[0.5]], dtype=torch.float64), 0.6)  # one component each: plain Gaussians, in 1D
MEAN, LOG_STD = 1.1, -0.4  # of the generator: x_gen = mean + exp(log_std) z


def hermite_grid(n=8):
    """Nodes (n^2,) z and noise, and weights (n^2,), that integrate polynomials over two unit Gaussians exactly."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    z, noise = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.flatten(), noise.flatten(), torch.outer(weights, weights).flatten()


def check_kl(module):
    for time in (0.1, 0.5, 0.9):
        # the oracle: autograd through the closed form of KL(p_gen,t || p_real,t)
        parameters = torch.tensor([MEAN, LOG_STD], dtype=torch.float64, requires_grad=True)
        mean, std = parameters[0], parameters[1].exp()
        at_t = [Normal((1 - time) * m, (((1 - time) * s) ** 2 + time**2) ** 0.5) for m, s in [(mean, std), (0.5, 0.6)]]
        (expected,) = torch.autograd.grad(kl_divergence(*at_t), parameters)
        # ours: the mean over x_gen and its noise of grad . dx_gen/dparameters, with exact velocities
        z, noise, weight = hermite_grid()
        x_gen = (MEAN + np.exp(LOG_STD) * z)[:, None]
        x_t, t = (1 - time) * x_gen + time * noise[:, None], torch.full_like(z, time)
        gen = GaussianMixture(torch.tensor([[MEAN]], dtype=torch.float64), float(np.exp(LOG_STD)))
        grad = module.dmd_gradient(x_gen, x_t, t=t, v_real=REAL.velocity(x_t, t=t), v_fake=gen.velocity(x_t, t=t),
                                   normalize=False)[:, 0]  # fmt: skip
        exact = grad * (1 - time) ** 2 / time**2
        ours = torch.stack([(weight * exact).sum(), (weight * exact * np.exp(LOG_STD) * z).sum()])
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_the_gradient_is_the_exact_kls_at_each_t():
    check_kl(dmd_refine)


@pytest.mark.parametrize("old, new", [("grad = x0_fake - x0_real\n", "grad = x0_real - x0_fake\n"),
                                      ("x0_fake = x0_from_velocity(x_t, t, v_fake)", "x0_fake = x_t - v_fake"),
                                      ("    if normalize:", "    if True:")])  # fmt: skip
def test_a_broken_gradient_is_caught(old, new):
    with pytest.raises(AssertionError):
        check_kl(broken(dmd_refine, (old, new)))


def random_inputs(shape=(8, 3, 4, 4)):
    generator = rng(0, "dmd")
    x_gen, x_t, v_real, v_fake = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    return x_gen, x_t, v_real, v_fake, torch.rand(shape[0], generator=generator, dtype=torch.float64)


def test_the_normalised_gradient_is_its_formula():
    x_gen, x_t, v_real, v_fake, t = random_inputs()
    grad = dmd_refine.dmd_gradient(x_gen, x_t, t=t, v_real=v_real, v_fake=v_fake)
    for i in range(len(t)):
        x0_real, x0_fake = x_t[i] - t[i] * v_real[i], x_t[i] - t[i] * v_fake[i]
        torch.testing.assert_close(grad[i], (x0_fake - x0_real) / (x_gen[i] - x0_real).abs().mean())
    for old, new in [("(x_gen - x0_real).abs()", "(x_t - x0_real).abs()"),
                     (".flatten(1).mean(dim=1)  #", ".flatten(1).sum(dim=1)  #")]:  # fmt: skip
        other = broken(dmd_refine, (old, new)).dmd_gradient(x_gen, x_t, t=t, v_real=v_real, v_fake=v_fake)
        assert not torch.allclose(other, grad)


@pytest.mark.parametrize("normalize", [True, False])
def test_no_gradient_where_the_fake_branch_is_the_teacher(normalize):
    x_gen, x_t, v_real, _, t = random_inputs()
    assert (dmd_refine.dmd_gradient(x_gen, x_t, t=t, v_real=v_real, v_fake=v_real, normalize=normalize) == 0).all()


def test_the_loss_has_the_gradient_that_it_was_given():
    x_gen, grad = random_inputs()[:2]
    x_gen.requires_grad_(True)
    (ours,) = torch.autograd.grad(dmd_refine.dmd_loss(x_gen, grad), x_gen)
    torch.testing.assert_close(ours, grad / x_gen.numel())


def test_scores_and_guesses_point_the_same_way():
    """s_real - s_fake = (1 - t)/t^2 (x0_real - x0_fake)."""
    _, x_t, v_real, v_fake, t = random_inputs()
    scores = score_from_velocity(x_t, t, v_real) - score_from_velocity(x_t, t, v_fake)
    t_ = t[:, None, None, None]
    torch.testing.assert_close(scores, (1 - t_) / t_**2 * ((x_t - t_ * v_real) - (x_t - t_ * v_fake)))


# ---------------------------------------------------------------------------------------------------------------------
# Who is moved by what
# ---------------------------------------------------------------------------------------------------------------------


ADVERSARIAL = {"lambda_adv": 0.1, "taps": (0, 1)}


def cast(images=False, pooling="attention"):
    """Student, teacher, fake branch and discriminator, small; and noise, data, labels and times for them.

    images: DiTs with labels; else MLPs for points in the plane, whose labels are None.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if images:
            student, teacher, fake = tiny_teacher(1, two_times=True), tiny_teacher(2), tiny_teacher(3)
            discriminator, shape = AdaptiveWeightedDiscriminator([16, 16], pooling), (1, 8, 8)
        else:
            student, teacher, fake = VelocityMLP(2, 8, 2, two_times=True), VelocityMLP(2, 8, 2), VelocityMLP(2, 8, 2)
            discriminator, shape = AdaptiveWeightedDiscriminator([8], pooling), (2,)
        eps, noise, x_data = torch.randn(3, 16, *shape)
    y, t = torch.arange(16) % 3 if images else None, torch.linspace(0.1, 0.9, 16)
    return student, teacher.requires_grad_(False), fake, discriminator, eps, noise, x_data, y, t


def moved(*nets):
    """For each network: do all parameters have a gradient (True), or none (False)? A mixture is told as "some"."""
    counts = [(sum(p.grad is not None for p in net.parameters()), len(list(net.parameters()))) for net in nets]
    return [have == of if have in (0, of) else "some" for have, of in counts]


def check_routing(module, images=False):
    student, teacher, fake, discriminator, eps, noise, x_data, y, t = cast(images)
    x_gen = generate(student, eps, y)
    loss, _ = module.generator_loss(teacher, fake, discriminator, x_gen, y, noise, t, **ADVERSARIAL)
    loss.backward()
    assert moved(student, teacher, fake, discriminator) == [True, False, False, False]
    student.zero_grad(set_to_none=True)
    x_gen = generate(student, eps, y)
    module.fake_branch_loss(fake, x_gen, y, noise, t).backward()
    assert moved(student, teacher, fake, discriminator) == [False, False, True, False]
    fake.zero_grad(set_to_none=True)
    both = torch.cat([noise, noise]), torch.cat([t, t])
    loss, _ = module.discriminator_loss(discriminator, teacher, x_data, x_gen, y, *both, taps=(0, 1))
    loss.backward()
    assert moved(student, teacher, fake, discriminator) == [False, False, False, True]


@pytest.mark.parametrize("images", [False, True])
def test_each_update_moves_its_own_network_only(images):
    check_routing(dmd_refine, images)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("old, new", [
    ("with fixed(discriminator), autocast_off", "with autocast_off"),
    ("    x_gen = x_gen.detach()\n    loss, _ = flow", "    loss, _ = flow"),
    ("torch.cat([x_data, x_gen.detach()]), noise, t)\n    with torch.no_grad():",
     "torch.cat([x_data, x_gen]), noise, t)\n    if True:"),
    ("    with torch.no_grad():\n        v_fake = fake", "    if True:\n        v_fake = fake"),
])  # fmt: skip
def test_a_leak_is_caught(old, new, images):
    module = broken(dmd_refine, (old, new))
    if "v_fake" in new:  # the gradient is held fixed twice, in the loss too: both have to break
        module = broken(dmd_refine, (old, new), ("(x_gen - grad).detach()", "(x_gen.detach() - grad)"))
    with pytest.raises((AssertionError, RuntimeError)):
        check_routing(module, images)


def check_sides(module):
    """After some updates the discriminator gives data the higher logit."""
    _, teacher, _, discriminator, eps, noise, x_data, y, t = cast(images=True)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    x_data, x_gen = x_data.abs(), -eps.abs()
    noise, t = torch.cat([noise, noise]), torch.full((32,), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss, terms = module.discriminator_loss(discriminator, teacher, x_data, x_gen, y, noise, t, taps=(0, 1))
        loss.backward()
        optimizer.step()
    features = [teacher.features(add_noise(x, noise[:16], t[:16]), t=t[:16], y=y, taps=(0, 1)) for x in (x_data, x_gen)]
    logit_data, logit_gen = (discriminator(f).mean() for f in features)
    assert logit_data > logit_gen + 0.1 and terms["accuracy"] > 0.7 and terms["logit_data"] > terms["logit_gen"]


def test_the_discriminator_learns_which_side_is_data():
    check_sides(dmd_refine)
    for old, new in [("logit_data, logit_gen = disc", "logit_gen, logit_data = disc"),
                     ("torch.cat([x_data, x_gen.detach()])", "torch.cat([x_gen.detach(), x_data])")]:  # fmt: skip
        with pytest.raises(AssertionError):
            check_sides(broken(dmd_refine, (old, new)))


@pytest.mark.parametrize("images", [False, True])
def test_the_adversarial_term_moves_samples_towards_data(images):
    """The student's gradient of the adversarial term alone raises the discriminator's logit."""
    student, teacher, _, discriminator, eps, noise, _, y, t = cast(images)
    fake = frozen_copy(teacher)  # equal to the teacher: no DMD gradient, the adversarial term stands alone
    label = {} if y is None else {"y": y}

    def logit():
        x_t = dmd_refine.add_noise(sample(student, eps, y), noise, t)
        return discriminator(teacher(x_t, t=t, taps=(0, 1), **label)[1]).mean().item()

    discriminator.eval()  # spectral norm without its power iteration, so that before and after can be compared
    before = logit()
    x_gen = generate(student, eps, y)
    loss, terms = dmd_refine.generator_loss(teacher, fake, discriminator, x_gen, y, noise, t, **ADVERSARIAL)
    assert terms["grad_dmd"] == 0 and loss.item() == pytest.approx(-0.1 * before, abs=1e-6)
    loss.backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= 0.01 * (p.grad if p.grad is not None else 0)
    assert logit() > before


def network():
    """A student of points in float64 whose second time has an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = VelocityMLP(2, 8, 2, two_times=True).double()
        torch.nn.init.normal_(net.embed_duration.weight, std=0.3)
    return net


def check_two_steps(module):
    """Three rows of four by the formula of one call, the others by that of two, and the gradients of both calls."""
    net, eps = network(), torch.randn(8, 2, generator=rng(0, "eps"), dtype=torch.float64)
    zero, half, one = (torch.full((8,), t, dtype=torch.float64) for t in (0, 0.5, 1))
    first = eps[:6] - net(eps[:6], t=one[:6], r=zero[:6])
    x_half = eps[6:] - net(eps[6:], t=one[6:], r=half[6:]) / 2  # x_1/2 = eps - u(eps, 1/2, 1) / 2
    second = x_half - net(x_half, t=half[6:], r=zero[6:]) / 2  # x_0 = x_1/2 - u(x_1/2, 0, 1/2) / 2
    x_gen = module.student_samples(net, eps, None, 2)
    torch.testing.assert_close(x_gen, torch.cat([first, second]))
    expected = torch.autograd.grad(torch.cat([first, second]).square().sum(), net.parameters())
    for ours, theirs in zip(torch.autograd.grad(x_gen.square().sum(), net.parameters()), expected):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(module.student_samples(net, eps[:6], None, 1), first)
    assert [len(part) for part in module.by_calls(eps[:2], 2)] == [1, 1]  # as few rows as --accumulate may leave


def test_a_student_of_two_steps_learns_both():
    check_two_steps(dmd_refine)
    for old, new in [("y_part, 1 + k)", "y_part, 2)"), ("ONE_CALL = 0.75", "ONE_CALL = 0.5"),
                     ("int(ONE_CALL", "round(ONE_CALL")]:  # fmt: skip
        with pytest.raises(AssertionError):
            check_two_steps(broken(dmd_refine, (old, new)))
    module = broken(dmd_refine)
    module.generate = broken(meanflow_td, ("        x = x - net(", "        x = x.detach() - net(")).generate
    with pytest.raises(AssertionError):  # the samples are right, and the first call learns nothing
        check_two_steps(module)


def check_fake_by_calls(module):
    """The fake branch knows samples of 1 call by the labels 0 to 2 and those of 2 by 4 and 5 (and 6, of which there are
    none here): it is trained on them and asked by them."""
    fake, y, told = tiny_teacher(3), torch.arange(8) % 3, torch.tensor([0, 1, 2, 0, 1, 2, 4, 5])
    asked = []
    fake.net.register_forward_pre_hook(lambda net, args, kwargs: asked.append(kwargs["y"]), with_kwargs=True)
    before = fake.net.y_embedder.embedding_table.weight.detach().clone()  # 3 classes and the null class
    module.refine(tiny_teacher(1, two_times=True), tiny_teacher(2).requires_grad_(False), fake,
                  lambda batch, generator: (torch.zeros(8, 1, 8, 8), y), steps=2, batch=8, seed=0, stream="t", name="t",
                  student_steps=2)  # fmt: skip
    after = fake.net.y_embedder.embedding_table.weight.detach()
    assert after.shape == (8, 16) and len(asked) == 6 and all(torch.equal(labels, told) for labels in asked)
    moved = (after != before.repeat(2, 1)).any(dim=1)
    assert moved.tolist() == [True, True, True, False, True, True, False, False]
    x_t, t = torch.randn(8, 1, 8, 8, generator=rng(0, "x")), torch.full((8,), 0.5)
    branch = module.FakeByCalls(tiny_teacher(3), 2)
    torch.testing.assert_close(branch(x_t, t=t, y=y), tiny_teacher(3)(x_t, t=t, y=y))  # at first a copy
    branch.fake.net.y_embedder.embedding_table.weight.data = after
    torch.testing.assert_close(branch(x_t, t=t, y=y), branch.fake(x_t, t=t, y=told))


def test_the_fake_branch_of_two_steps_tells_the_calls_apart():
    check_fake_by_calls(dmd_refine)
    for old, new in [("else FakeByCalls(fake, student_steps)", "else fake"), ("part + k * self.labels", "part"),
                     ("generator_loss(teacher, branch,", "generator_loss(teacher, fake,")]:  # fmt: skip
        with pytest.raises(AssertionError):
            check_fake_by_calls(broken(dmd_refine, (old, new)))


def test_labels_stay_with_their_rows_in_two_steps():
    def net(x, *, t, r, y):  # a jump over t - r takes y (t - r) off: whatever the steps, x_0 = eps - y
        return y[:, None].expand_as(x)

    eps, y = torch.zeros(6, 2), torch.arange(6.0)
    torch.testing.assert_close(dmd_refine.student_samples(net, eps, y, 2), -y[:, None].expand(6, 2))


@pytest.mark.parametrize("images", [False, True])
def test_lambda_td_adds_stage_1s_gradient(images, monkeypatch):
    objective, stage_1 = dmd_refine.student_objective, []

    def watched(student, x_data, y, eps, generator, *, teacher):
        loss, terms = objective(student, x_data, y, eps, generator, teacher=teacher)
        stage_1.extend(torch.autograd.grad(loss, student.parameters(), retain_graph=True))
        return loss, terms

    monkeypatch.setattr(dmd_refine, "student_objective", watched)
    gradients = []
    for lambda_td in (0.0, 0.7):
        student, teacher, fake, discriminator, _, _, x_data, y, _ = cast(images)
        draw = lambda n, g: (x_data[:n], None if y is None else y[:n])  # noqa: E731
        _, rows = dmd_refine.refine(student, teacher, fake, draw, steps=1, batch=16, seed=0, stream="t", name="t",
                                    discriminator=discriminator, taps=(0, 1), lambda_td=lambda_td)  # fmt: skip
        assert ("du_dt" in rows[0]) == (lambda_td > 0) == bool(stage_1)
        gradients.append([p.grad.clone() for p in student.parameters()])  # what the one update left
    assert max(g.abs().max() for g in stage_1) > 1e-3
    for without, both, td in zip(*gradients, stage_1):
        torch.testing.assert_close(both, without + 0.7 * td, rtol=1e-3, atol=1e-6)


def check_steps(td, refine, monkeypatch):
    """Rates, Adam's betas and the greatest norm of gradients in three updates of `train` and of `refine`."""
    steps, times, step, clip = [], [], torch.optim.Adam.step, 1e-3

    def watched_step(optimizer):
        group = optimizer.param_groups[0]
        norm = torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm().item()
        steps.append((group["lr"], group["betas"], norm))
        return step(optimizer)

    def watched_add_noise(x, noise, t):
        times.append(t)
        return add_noise(x, noise, t)

    student, teacher, fake, discriminator, _, _, x_data, _, _ = cast()
    settings = dict(steps=3, batch=8, seed=0, stream="t", name="t", clip=clip, lr=1e-2)
    draw = lambda n, g: (x_data[:n], None)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", watched_step)
        patch.setattr(refine, "add_noise", watched_add_noise)
        td.train(student, draw, partial(td.student_objective, teacher=teacher), **settings)
        refine.refine(student, teacher, fake, draw, discriminator=discriminator, taps=(0, 1), lr_fake=2e-2,
                      fake_floor=0.7, lr_discriminator=3e-2, **settings)  # fmt: skip

    def rate(step, peak):
        share = (1 + np.cos(np.pi * step / 3)) / 2
        return peak * (step + 1) / 100 * (max(share, 0.7) if peak == 2e-2 else share)  # 2e-2 is the fake branch's

    expected = [(rate(k, 1e-2), (0.9, 0.99)) for k in range(3)]  # then fake branch twice, discriminator, student
    expected += [(rate(k, peak), (0.0, 0.99)) for k in range(3) for peak in (2e-2, 2e-2, 3e-2, 1e-2)]
    assert [lr for lr, _, _ in steps] == pytest.approx([lr for lr, _ in expected])
    assert [tuple(betas) for _, betas, _ in steps] == [betas for _, betas in expected]
    assert max(norm for _, _, norm in steps) <= clip * 1.001
    for k in (2, 3):  # each iteration noises for the fake branch twice, for the discriminator, for the student
        t = torch.cat(times[k::4])
        assert 0.02 <= t.min() < 0.2 and 0.8 < t.max() <= 0.98


RATE = 'optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak'
CLIP = "clip_grad_norm_(net.parameters(), clip)", "clip_grad_norm_(net.parameters(), math.inf)"


def test_updates_have_their_rates_and_their_clip(monkeypatch):
    check_steps(meanflow_td, dmd_refine, monkeypatch)
    for td, refine in [((f"{RATE})", "pass"), None), (CLIP, None), (None, (f"{RATE}, floor=floor)", "pass")),
                       (None, ("(0.0, fake_floor, 0.0)", "(fake_floor, 0.0, 0.0)")), (None, CLIP),
                       (None, ("momentum=0.0) for rate", "momentum=None) for rate")),
                       (None, ("T_MIN, T_MAX = 0.02, 0.98", "T_MIN, T_MAX = 0.3, 0.7"))]:  # fmt: skip
        with pytest.raises(AssertionError):
            check_steps(broken(meanflow_td, td) if td else meanflow_td,
                        broken(dmd_refine, refine) if refine else dmd_refine, monkeypatch)  # fmt: skip


def check_t_power(module, monkeypatch):
    """The times that x_gen is noised to for the student: at t_power 1/2 the roots of those at 1 (but for the ends)."""
    student, teacher, fake, _, _, _, x_data, _, _ = cast()
    loss, seen = module.generator_loss, []

    def watched(*args, **kwargs):
        seen.append(args[6])  # t
        return loss(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "generator_loss", watched)
        for t_power in (1.0, 0.5):
            module.refine(student, teacher, fake, lambda n, g: (x_data[:n], None), steps=1, batch=16, seed=0,
                          stream="t", name="t", t_power=t_power)  # fmt: skip
    uniform, high = seen
    torch.testing.assert_close(high, 0.02 + 0.96 * ((uniform - 0.02) / 0.96).sqrt())


def test_t_power_noises_more(monkeypatch):
    check_t_power(dmd_refine, monkeypatch)
    for wrong in (" ** (1 / t_power)", ""):
        with pytest.raises(AssertionError):
            check_t_power(broken(dmd_refine, (" ** t_power", wrong)), monkeypatch)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("moving", ["lr", "lr_fake", "lr_discriminator"])
def test_a_player_without_a_rate_stands_still(moving, images):
    """Who moves is told by the three rates; nobody else does, the teacher never."""
    student, teacher, fake, discriminator, _, _, x_data, y, _ = cast(images)
    players = dict(lr=student, lr_fake=fake, lr_discriminator=discriminator, teacher=teacher)
    before = {name: frozen_copy(net) for name, net in players.items()}
    rates = {name: 1e-2 * (name == moving) for name in ("lr", "lr_fake", "lr_discriminator")}
    draw = lambda n, g: (x_data[:n], None if y is None else y[:n])  # noqa: E731
    dmd_refine.refine(student, teacher, fake, draw, steps=2, batch=8, seed=0, stream="t", name="t",
                      discriminator=discriminator, taps=(0, 1), **rates)  # fmt: skip
    for name, net in players.items():
        same = all(torch.equal(a, b) for a, b in zip(net.parameters(), before[name].parameters()))
        assert same == (name != moving), name


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("pooling", ["attention", "mean", None])
def test_refining_is_the_same_twice_and_keeps_teacher_and_start(pooling, images):
    results = []
    for _ in range(2):
        student, teacher, fake, discriminator, _, _, x_data, y, _ = cast(images, pooling or "mean")
        before = frozen_copy(teacher)
        discriminator = discriminator if pooling else None
        draw = lambda n, g: (x_data[:n], None if y is None else y[:n])  # noqa: E731
        ema, rows = dmd_refine.refine(student, teacher, fake, draw, steps=3, batch=8, seed=0, stream="t", name="t",
                                      discriminator=discriminator, taps=(0, 1))  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before.parameters()))
        assert all(p.grad is None for p in teacher.parameters())
        assert ("accuracy" in rows[0]) == (pooling is not None) and rows[0]["gradient"] > 0
        results.append((list(ema.parameters()), without_times(rows)))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0]))


def test_dmd_brings_a_gaussian_student_to_the_teacher():
    """The whole loop, where the answer is known: data N(0.5, 0.6^2), from a start that is far off."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = VelocityMLP(1, 16, 1, two_times=True), VelocityMLP(1, 16, 1)
    draw = lambda n, g: (REAL.draw(n, g).float(), None)  # noqa: E731
    settings = dict(steps=400, batch=256, seed=0, stream="t", name="t")
    teacher, _ = train(teacher, draw, teacher_objective, lr=5e-3, **settings)
    eps = torch.randn(4000, 1, generator=rng(0, "eps"))
    assert abs(sample(student, eps).mean() - 0.5) > 0.2
    ema, _ = dmd_refine.refine(student, teacher, frozen_copy(teacher).requires_grad_(True), draw, **settings)
    x = sample(ema, eps)
    assert abs(x.mean() - 0.5) < 0.08 and abs(x.std() - 0.6) < 0.08

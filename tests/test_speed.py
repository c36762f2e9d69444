"""As fast as the arithmetic allows: what every step computes, counted, and that none of it changes a result.

Times are for `python dmd_refine.py --bench`; here the multiplications are counted, which any machine does alike.
"""

import json
from functools import partial

import pytest
import torch
from helpers import ROOT, broken, fill, tiny_teacher, without_times
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import dmd_refine
import meanflow_td
import models
from awd import AdaptiveWeightedDiscriminator
from data import rng
from models import DiT, DiTTeacher, SiTTeacher, Teacher, VelocityMLP

NET = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4, num_classes=10,
           learn_sigma=True)  # fmt: skip
PASSES = {"checkpointing": False, "compiling": False}


def draw(batch, generator):
    return torch.randn(batch, 1, 8, 8, generator=generator), torch.randint(3, (batch,), generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# Forward mode
# ---------------------------------------------------------------------------------------------------------------------


def written_out(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1) @ v


def check_rules(module):
    """Value and tangent of each rule are those of torch's own forward mode, and leave nothing of autograd behind."""
    generator = rng(0, "rules")
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    layer, norm = module.Linear(6, 5).double(), nn.LayerNorm(6, elementwise_affine=False)
    plain = nn.Linear(6, 5).double()
    plain.load_state_dict(layer.state_dict())
    x, dx = randn(2, 3, 6), randn(2, 3, 6)
    heads, tangents = [randn(2, 2, 5, 3) for _ in range(3)], [randn(2, 2, 5, 3) for _ in range(3)]
    softmax = partial(torch.softmax, dim=-1)
    for ours, theirs, point, direction in [
        (layer, plain, [x], [dx]), (lambda x: module.symmetric(norm, x), norm, [x], [dx]),
        (lambda x: module.symmetric(softmax, x), softmax, [x], [dx]),
        (module.attention, written_out, heads, tangents),
    ]:  # fmt: skip
        value, tangent = torch.func.jvp(theirs, tuple(point), tuple(direction))
        for no_grad in (False, True):
            with torch.set_grad_enabled(not no_grad), forward_ad.dual_level():
                dual = forward_ad.unpack_dual(ours(*map(forward_ad.make_dual, point, direction)))
                torch.testing.assert_close(dual.primal, value, rtol=1e-13, atol=1e-13)
                torch.testing.assert_close(dual.tangent, tangent, rtol=1e-12, atol=1e-13)
                assert not (no_grad and (dual.primal.requires_grad or dual.tangent.requires_grad))
        for both, one in zip(torch.func.jvp(ours, tuple(point), tuple(direction)), (value, tangent)):
            torch.testing.assert_close(both, one, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ours(*point), value, rtol=1e-13, atol=1e-13)


def test_the_rules_of_forward_mode_are_torchs():
    check_rules(models)
    for old, new in [("F.linear(dx, self.weight))", "F.linear(dx, self.weight, self.bias))"),
                     ("*backward(dx))", "*backward(x))"), ("q * q.shape[-1] ** -0.5 @", "q @")]:  # fmt: skip
        with pytest.raises((AssertionError, RuntimeError)):
            check_rules(broken(models, (old, new)))


def test_a_tangent_of_the_weights_is_not_lost():
    layer, x = models.Linear(3, 2).double(), torch.ones(1, 3, dtype=torch.float64)
    direction = {name: torch.ones_like(p) for name, p in layer.named_parameters()}
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    _, tangent = torch.func.jvp(lambda p: torch.func.functional_call(layer, p, (x,)), (parameters,), (direction,))
    torch.testing.assert_close(tangent, torch.full((1, 2), 4.0, dtype=torch.float64))


def test_the_graph_through_a_tangent_is_torchs():
    """Of a loss of du/dt, which no step here has, the gradient is right too: a rule may be differentiated."""
    x, dx = torch.randn(2, 4, 6, generator=rng(0, "x"), dtype=torch.float64).unbind()
    weight = torch.randn(6, 6, generator=rng(0, "w"), dtype=torch.float64).requires_grad_(True)

    def gradient(softmax):
        _, tangent = torch.func.jvp(lambda x: softmax(x @ weight), (x,), (dx,))
        return torch.autograd.grad(tangent.square().sum(), weight)[0]

    softmax = partial(torch.softmax, dim=-1)
    torch.testing.assert_close(gradient(lambda x: models.symmetric(softmax, x)), gradient(softmax))


def test_du_dt_of_points_is_that_of_func_jvp_to_the_bit():
    """The toy's networks use none of the rules, and the toy's results stay what they were."""
    net = VelocityMLP(2, 64, 3, two_times=True)
    x, v = torch.randn(2, 200, 2, generator=rng(0, "x"))
    r, t = meanflow_td.draw_times(200, rng(0, "t"))
    _, du_dt = meanflow_td.meanflow_target(net, x, v, r=r, t=t)
    spans = r < t
    with torch.no_grad():
        _, expected = torch.func.jvp(lambda x, t: net(x, t=t, r=r[spans]), (x[spans], t[spans]),
                                     (v[spans], torch.ones_like(t[spans])))  # fmt: skip
    assert torch.equal(du_dt[spans], expected) and spans.sum() == 150


# ---------------------------------------------------------------------------------------------------------------------
# The TD step, against the plain version of it: all rows, with a graph, torch's own rules, a pass for each kind of rows
# ---------------------------------------------------------------------------------------------------------------------


def plain_gradient(student, teacher, x_t, r, t, y, monkeypatch):
    """The gradient of the TD loss, one pass of torch.func.jvp over all rows for both u and du/dt."""
    with monkeypatch.context() as patch:
        patch.setattr(models.Linear, "forward", nn.Linear.forward)
        patch.setattr(models, "symmetric", lambda f, x: f(x))
        patch.setattr(models, "attention", written_out)
        cond, null = (teacher.velocity(x_t, t=t, y=labels) for labels in (y, torch.full_like(y, 10)))
        v = cond.clone()
        v[:, :3] = null[:, :3] + teacher.w * (cond - null)[:, :3]
        u, du_dt = torch.func.jvp(lambda x, t: student(x, t=t, r=r, y=y), (x_t, t), (v, torch.ones_like(t)))
        err = (u - (v - (t - r)[:, None, None, None] * du_dt).detach()).square().flatten(1).sum(1)
        return torch.autograd.grad((err / (err.detach() + 1e-2)).mean(), student.parameters())


@pytest.mark.parametrize("kind", [Teacher, SiTTeacher])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("w", [1.0, 1.5])
def test_the_td_step_has_the_gradients_of_the_plain_one(kind, dtype, tolerance, w, monkeypatch):
    teacher = kind(fill(DiT(**NET)).requires_grad_(False).to(dtype), w=w)
    student = kind(fill(DiT(**NET, two_times=True)).to(dtype))
    generator = rng(0, "td")
    x_t, y = torch.randn(8, 4, 8, 8, generator=generator, dtype=dtype), torch.arange(8)
    r, t = (time.to(dtype) for time in meanflow_td.draw_times(8, generator, share_spans=0.5))
    with torch.no_grad():
        v = teacher(x_t, t=t, y=y)
    loss, _ = meanflow_td.meanflow_loss(student, x_t, v, r=r, t=t, y=y)
    ours = torch.autograd.grad(loss, student.parameters())
    plain = plain_gradient(student, teacher, x_t, r, t, y, monkeypatch)
    ours, plain = (torch.cat([g.flatten() for g in gradient]) for gradient in (ours, plain))
    assert plain.norm() > 1e-3 and (ours - plain).norm() < tolerance * plain.norm()


def test_tangents_pass_through_the_rows_with_a_span_alone_and_without_a_graph():
    teacher, student = tiny_teacher(0).requires_grad_(False), tiny_teacher(1, two_times=True)
    seen = []

    def hook(who):
        def note(module, inputs, out):
            primal, tangent = forward_ad.unpack_dual(out)
            seen.append((who, len(out), tangent is not None, out.requires_grad))
        return note

    for who, wrapper in (("teacher", teacher), ("student", student)):
        wrapper.net.blocks[0].register_forward_hook(hook(who))
    x_0, y = draw(8, rng(0, "draw"))
    for teacher.w in (1.0, 1.5):
        meanflow_td.student_objective(student, x_0, y, torch.randn_like(x_0), rng(0, "t"), teacher=teacher,
                                      share_spans=0.25)  # fmt: skip
    passes = [("student", 2, True, False), ("student", 8, False, True)]
    assert seen == [("teacher", 8, False, False), *passes, ("teacher", 16, False, False), *passes]


# ---------------------------------------------------------------------------------------------------------------------
# The count
# ---------------------------------------------------------------------------------------------------------------------


class Multiplications(TorchDispatchMode):
    """Counts those of layers, that is of products of two matrices; attention's are products of batches of matrices."""

    total = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = arguments[-2:]
            self.total += a.shape[0] * a.shape[1] * b.shape[1]
        return operation(*arguments, **(options or {}))


def multiplications(call):
    with Multiplications() as counter:
        call()
    return counter.total


def check_counts(module, names=None):
    size = dict(input_size=16, patch_size=2, hidden_size=64, depth=4, num_heads=2)
    steps = module.bench_steps(size, 8, torch.device("cpu"), "off", PASSES)
    one = multiplications(steps["flow matching"][1]) / 3
    for name, (count, call) in steps.items():
        if names is None or name.strip() in names:
            assert multiplications(call) / one == pytest.approx(count, rel=0.04), name


def test_every_step_does_the_work_that_is_counted_and_no_more():
    check_counts(dmd_refine)


def test_work_for_nothing_is_caught(monkeypatch):
    def caught(name, module=dmd_refine):
        with pytest.raises(AssertionError, match=name):
            check_counts(module, [name])

    features = "teacher.features(x_t, t=t, taps=taps, **labelled(None if y is None else torch.cat([y, y])))"
    caught("discriminator", broken(dmd_refine, (features, features.replace("teacher.features", "teacher") + "[1]")))
    with monkeypatch.context() as patch:
        patch.setattr(models.Linear, "forward", nn.Linear.forward)
        caught("du/dt")


def test_optimisers_are_fused(monkeypatch):
    fused, adam = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *given, **options: fused.append(options.get("fused"))
                        or adam(*given, **options))  # fmt: skip
    td_and_refinement(False)
    assert fused == [True] * 4


# ---------------------------------------------------------------------------------------------------------------------
# The teacher's features
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Teacher, SiTTeacher, DiTTeacher])
def test_features_are_the_taps_and_no_later_block_is_run(kind):
    teacher = kind(fill(DiT(**NET)).requires_grad_(False), w=1.5)
    x, t, y = torch.randn(2, 4, 8, 8, generator=rng(0, "x")), torch.tensor([0.9, 0.4]), torch.tensor([1, 3])
    _, expected = teacher(x, t=t, y=y, taps=(1, 0))
    called = []
    for i, block in enumerate(teacher.net.blocks):
        block.register_forward_hook(lambda module, inputs, out, i=i: called.append((i, len(out))))
    features = teacher.features(x, t=t, y=y, taps=(1, 0))
    assert called == [(0, 2), (1, 2)]
    assert len(features) == 2 and all(torch.equal(ours, theirs) for ours, theirs in zip(features, expected))
    assert len(teacher.net.blocks) == 3  # the teacher is left as it was
    with pytest.raises(ValueError, match="taps"):
        teacher.features(x, t=t, y=y, taps=(3,))


def test_features_of_points():
    net, x, t = VelocityMLP(2, 8, 3), torch.randn(5, 2, generator=rng(0, "x")), torch.linspace(0.1, 0.9, 5)
    assert torch.equal(net.features(x, t=t, taps=(0, 2))[0], net(x, t=t, taps=(0, 2))[1][0])


@pytest.mark.parametrize("kind", [Teacher, SiTTeacher, DiTTeacher])
def test_the_tapped_pass_of_a_guided_teacher_serves_both_terms(kind):
    """v is what it is without taps; the gradient of the features is that of all rows in one batch; v has none."""
    teacher = kind(fill(DiT(**NET)).requires_grad_(False).double(), w=1.5)
    x = torch.randn(2, 4, 8, 8, generator=rng(0, "x"), dtype=torch.float64).requires_grad_(True)
    t, y = torch.tensor([0.9, 0.4], dtype=torch.float64), torch.tensor([1, 3])
    v, features = teacher(x, t=t, y=y, taps=(0, 2))
    torch.testing.assert_close(v, teacher(x, t=t, y=y).detach(), rtol=1e-10, atol=1e-10)
    assert not v.requires_grad
    both = [torch.cat([a, a]) for a in (x, t)]
    _, together = teacher.unguided(*both, torch.cat([y, torch.full_like(y, 10)]), (0, 2))
    ours, expected = (torch.autograd.grad(sum(f[:2].square().sum() for f in tokens), x)[0]
                      for tokens in (features, together))  # fmt: skip
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------


def td_and_refinement(compiling, checkpointing=False):
    """Rows of two updates of each stage, and the networks."""
    teacher, student, fake = tiny_teacher(1).requires_grad_(False), tiny_teacher(2, two_times=True), tiny_teacher(3)
    teacher.w = 1.5
    for wrapper in (teacher, student, fake):
        wrapper.net.compiling, wrapper.net.checkpointing = compiling, checkpointing
    with torch.random.fork_rng():
        torch.manual_seed(0)
        discriminator = AdaptiveWeightedDiscriminator([16])
    settings = dict(steps=2, batch=8, seed=0, stream="t", log_every=1)
    _, rows = meanflow_td.train(student, draw, partial(meanflow_td.student_objective, teacher=teacher), lr=1e-4,
                                name="td", **settings)  # fmt: skip
    ema, more = dmd_refine.refine(student, teacher, fake, draw, discriminator=discriminator, taps=(0,), lr=1e-4,
                                  name="hd", **settings)  # fmt: skip
    return without_times([*rows, *more]), [student, fake, ema]


def check_compiled(compiled, plain):
    rows, nets = compiled
    for ours, theirs in zip(rows, plain[0], strict=True):
        assert ours.pop("network") == theirs.pop("network")
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5, nan_ok=True)
    for ours, theirs in zip(nets, plain[1], strict=True):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert not any("_orig_mod" in name for name in ours.state_dict())


def test_every_pass_without_a_tangent_goes_through_the_compiled_block(monkeypatch):
    calls = []

    def block_forward(block, x, c):
        calls.append(forward_ad.unpack_dual(x).tangent is None)
        return models.DiTBlock.forward(block, x, c)

    plain = td_and_refinement(False)
    hooked = []
    monkeypatch.setattr(models, "compiled_block", lambda: block_forward)
    monkeypatch.setattr(models.DiTBlock, "__call__", lambda *args: hooked.append(1) or models.DiTBlock.forward(*args))
    check_compiled(td_and_refinement(True), plain)
    # blocks in an update of TD: teacher and student 2 each; of refinement: 2 fake updates of sample and pass, the
    # first block's features, and sample, teacher with and without labels, fake branch
    assert len(calls) == 2 * (2 + 2) + 2 * (2 * 4 + 1 + 8) and all(calls)
    assert len(hooked) == 2 * 2  # du/dt's, once an update of TD


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_has_the_losses_of_a_plain_one(checkpointing):
    check_compiled(td_and_refinement(True, checkpointing), td_and_refinement(False))


# ---------------------------------------------------------------------------------------------------------------------
# The bench
# ---------------------------------------------------------------------------------------------------------------------


def test_the_bench_prints_a_table_and_writes_it(tmp_path, capsys):
    dmd_refine.main(["--bench", "--quick", "--batch", "4", "--out", str(tmp_path / "bench")])
    told = json.loads((tmp_path / "bench" / "bench.json").read_text())
    rows = {row["what"]: row for row in told["rows"]}
    assert told["machine"]["batch"] == 4 and told["machine"]["peak memory"] > 1e8
    assert rows["flow matching"]["time/3F"] == pytest.approx(1) and rows["TD"]["count"] == 5.5
    assert rows["refinement"]["count"] == 2 * 4 + 2 + 7 and rows["teacher, 250 calls"]["count"] == 500
    said = capsys.readouterr().out
    for name, row in rows.items():
        assert name in said and row["seconds"] > 0 and row["samples/s"] == pytest.approx(4 / row["seconds"])
        assert row["time/count"] is None or row["time/count"] == pytest.approx(row["time/F"] / row["count"])
    assert rows["teacher, 250 calls"]["seconds"] == pytest.approx(250 * rows["guided teacher"]["seconds"])


def test_the_readmes_table_is_a_bench():
    kept = json.loads((ROOT / "figures" / "bench.json").read_text())
    table = (ROOT / "README.md").read_text().split("| what | time in F |")[1].split("\n\n")[0].replace("- of it, ", "")
    lines = table.replace("each of two fake branch updates", "fake branch").splitlines()[2:]
    assert len(lines) == len(kept["rows"])
    for line, row in zip(lines, kept["rows"]):
        count = f"{row['count']:g}" if row["count"] else ""
        assert line.startswith(f"| {row['what']} | {row['time/F']:.2f} | {count} |")

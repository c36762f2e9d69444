"""Hierarchical distillation in 2D, start to end on a CPU: where trajectory distillation stops, and the way past it.

    python toy2d.py              the story, one seed        python toy2d.py --seeds 3     with mean and spread
    python toy2d.py --quick      all of it, small           python toy2d.py --unify       three methods, one function

It leaves runs/toy2d/ with bottleneck.png, story.png, results.json and metrics.csv, and a table on the terminal. The
same command again goes on where it was stopped, or only redraws. On 2 cores of an AMD EPYC, a network at a time on each
(--workers): 11 minutes for one seed, 27 for three, at most 5 for --unify, half a minute for --quick.

1. A teacher learns the velocity field of a density by flow matching; Heun's method with 100 steps (200 calls) draws
   its samples.
2. The bottleneck. Students of many sizes learn the teacher's average velocity by MeanFlow (TD, meanflow_td.py) and
   sample with ONE call. How close to the teacher's own sample of the same noise (replay error), how close to the data
   (sliced Wasserstein-2), and how many samples lie inside the support? Bigger is better, but not by enough: the map
   from noise to data has cliffs where the path chooses between two squares, and a smooth network builds bridges there.
3. The way past. A SMALL student takes the first half of its updates from TD, the second half from distribution matching
   and an adversarial loss (dmd_refine.py, awd.py). It may now answer a noise point with another sample than the teacher
   would, as long as all samples together have the right distribution, and that a small network can do.
4. The controls: stage 2 for all of the updates, from random weights; and a discriminator that averages its tokens.

The toy calls the losses, samplers and loops of the other files and has no second version of any. The paper's figure 3
asks the same question (PAPER: quality of TD rises with size, 50 times the size does not close the gap). OURS: density,
networks and budget, since the paper does not tell its data and sizes. One thing differs from images: the tokens that
the discriminator weighs are the teacher's hidden layers, not places: attention against mean pooling says little here.
"""

import argparse
import math
import os
from functools import cache, partial

import numpy as np
import torch

from awd import AdaptiveWeightedDiscriminator
from data import (BLUE, DENSITIES, GREEN, GREY, ORANGE, PINK, Keep, RunFolder, alone, check_device, new_figure,
                  progress, rng, save_figure, sentences, side_by_side, whole_number, write_json)  # fmt: skip
from dmd_refine import refine
from meanflow_td import (check_finite, flow_matching_loss, meanflow_target, new_network, sample, sample_euler,
                         sample_ode, student_objective, teacher_objective, train)  # fmt: skip
from models import VelocityMLP, add_noise, count_parameters, expand_times, frozen_copy

TEACHER_WIDTH, TEACHER_DEPTH = 128, 3  # the depth is the number of hidden layers
# OURS: shallow students, so that size is what limits them. Of three layers, a student of width 128 went on to gain with
# every doubling of its updates (sliced W2 0.033, 0.026 and 0.021 after 6,000, 12,000 and 24,000; seed 0, by hand).
STUDENT_DEPTH = 1
TAPS = (0, 1, 2)  # the teacher's hidden layers that the discriminator reads, one token each
POINTS = 5000  # samples kept for the pictures

# `td_steps` + `refine_steps` updates is what every student of the story gets, in whichever way it spends them, but for
# those called otherwise ("first half only", "trained twice as long"); one of --unify gets `td_steps`.
PLANS = {
    "default": dict(widths=(28, 40, 56, 80, 160, 300), hd_width=80,
                    teacher_steps=6000, td_steps=3000, refine_steps=3000,
                    unify_rounds=6, unify_widths=(28, 80, 160), samples=100_000, ode_steps=100),
    "quick": dict(widths=(8, 12, 16, 24, 48, 64), hd_width=16, teacher_steps=300, td_steps=100, refine_steps=100,
                  unify_rounds=3, unify_widths=(8, 16), samples=4000, ode_steps=20),
}  # fmt: skip
TEACHER_BATCH, BATCH = 1024, 512
LR_TEACHER = 5e-3


def td_rate(width):
    """Adam's peak learning rate for a TD student: in inverse proportion to its width, and at most the teacher's.

    PRIOR: 1/width for hidden layers (Yang et al., arXiv 2203.03466); OURS: 1/width for all layers. OURS: the constant,
    found by hand on seed 0 with 6,000 updates, by sliced W2: width 80 had 0.053 at 5e-3 and 0.059 at 3.2e-3; width 300
    had 0.043 at 1e-3 and 0.046 at 3e-3. Other widths were not tried.
    """
    return min(LR_TEACHER, 0.5 / width)


# ---------------------------------------------------------------------------------------------------------------------
# How good is a sample?
# ---------------------------------------------------------------------------------------------------------------------


def sorted_projections(x, count=256):
    """The points x (n, 2) projected onto `count` fixed directions, each row sorted: (count, n)."""
    # evenly spread over half a circle: a direction and its opposite give the same distance
    angle = math.pi * (torch.arange(count, device=x.device) + 0.5) / count
    return (torch.stack([angle.cos(), angle.sin()], dim=1) @ x.T).sort(dim=1).values


def sliced_w2(projections_x, projections_y):
    """Sliced Wasserstein-2 distance from the sorted projections (count, n) of two samples of equal size.

    In one dimension the optimal transport pairs the sorted points; the squares are averaged over points and directions
    (Bonneel et al., J. Math. Imaging Vis. 51, 2015).
    """
    return (projections_x - projections_y).square().mean().sqrt().item()


def in_blocks(sampler, eps):
    """sampler(eps), 4096 rows at a time: their activations fit a CPU's cache (3 times faster on one core, measured)."""
    x = torch.cat([sampler(block) for block in progress(eps.split(4096), "sampling")])
    check_finite("judging", sample=x)
    return x


class Judge:
    """What all samples of one run are measured against: the data, and the one noise that they are made from."""

    def __init__(self, density, samples, device):
        self.density = density
        # drawn on the CPU: a run that goes on with another device is judged on the same noise
        self.eps = torch.randn(samples, 2, generator=rng(0, "judge noise")).to(device)
        self.data = density.draw(samples, rng(0, "judge data")).to(device)
        self.projections = sorted_projections(self.data)

    def __call__(self, x, x_teacher=None):
        """The measures of samples x (samples, 2) that were made from self.eps, as a dict of numbers.

        x_teacher (samples, 2): the teacher's many-step endpoints of the same noise, for the replay error."""
        part = self.density.part(x)
        shares = torch.bincount(part[part >= 0], minlength=self.density.parts) / len(x)
        measures = {
            "share_inside": (part >= 0).float().mean().item(),
            "sliced_w2": sliced_w2(sorted_projections(x), self.projections),
            "smallest_part": shares.min().item(),
            "largest_part": shares.max().item(),
        }
        if x_teacher is not None:
            measures["replay_error"] = (x - x_teacher).square().sum(dim=1).mean().item()
        return measures


@cache
def judge_of(data, samples, device):
    """The judge of a run, made once for all jobs of a process."""
    return Judge(DENSITIES[data](), samples, device)


# ---------------------------------------------------------------------------------------------------------------------
# The story
# ---------------------------------------------------------------------------------------------------------------------


def draw_points(density, batch, generator):
    """A batch for the training loops: points x_0 (batch, 2), and None, since points have no labels."""
    return density.draw(batch, generator), None


def student_network(seed, width, device):
    """A student's random start: the same for one seed and width, so that variants differ in their training only."""
    build = partial(VelocityMLP, 2, width, STUDENT_DEPTH, two_times=True)
    return new_network(seed, f"student {width}", build).to(device)


def new_result(what, seed, *, part="story", width=0, parameters=0, updates=0, nfe=0, seconds=0.0, **measures):
    """A row of results.json: what was run, its seed, its calls of a network for one sample (nfe), and its measures.

    updates: of all stages. seconds: of training in its last stage; a start from TD has a row of its own."""
    return {"part": part, "what": what, "seed": seed, "width": width, "parameters": parameters, "updates": updates,
            "nfe": nfe, **measures, "seconds": round(seconds, 1)}  # fmt: skip


class Stages:
    """One seed's networks: each is trained, judged and kept in the run folder, or found there."""

    def __init__(self, run, judge, plan, seed, device):
        self.run, self.judge, self.plan, self.seed, self.device = run, judge, plan, seed, device
        self.draw = partial(draw_points, judge.density)
        self.x_teacher = None  # (samples, 2), the many-step endpoint of each of the judge's noises, see `teacher`

    def fresh_data(self):
        """Judge another draw of the data: how good a perfect sampler would look."""

        def compute(keep):
            x = self.judge.density.draw(len(self.judge.eps), rng(self.seed, "fresh data")).to(self.device)
            return {"rows": [], "result": new_result("data against data", self.seed, **self.judge(x))}

        self.run.stage(f"seed{self.seed}-data", compute)

    def teacher(self):
        """The teacher, whose endpoints become x_teacher (and at half the steps too: the floor of the replay error)."""
        net = new_network(self.seed, "teacher", lambda: VelocityMLP(2, TEACHER_WIDTH, TEACHER_DEPTH)).to(self.device)

        def compute(keep):
            updates, steps = self.plan["teacher_steps"], self.plan["ode_steps"]
            ema, rows = train(net, self.draw, teacher_objective, steps=updates, batch=TEACHER_BATCH, lr=LR_TEACHER,
                              seed=self.seed, stream="teacher", name="teacher", keep=keep)  # fmt: skip
            seconds = keep.seconds()
            x, coarse = (in_blocks(partial(sample_ode, ema, steps=count), self.judge.eps)
                         for count in (steps, steps // 2))  # fmt: skip
            result = new_result("teacher", self.seed, width=TEACHER_WIDTH, parameters=count_parameters(net),
                                updates=updates, nfe=2 * steps, seconds=seconds,
                                **self.judge(x) | {"replay_error": self.judge(coarse, x)["replay_error"]})  # fmt: skip
            return {"net": ema.state_dict(), "rows": rows, "result": result, "points": x.cpu()}

        state = self.run.stage(f"seed{self.seed}-teacher", compute)
        net.load_state_dict(state["net"])
        self.x_teacher = state["points"].to(self.device)
        return net.requires_grad_(False)

    def student(self, name, what, net, fit, *, updates, sampler=sample, part="story"):
        """`net` with the average network's weights after fit(net, keep=keep) -> (ema, rows); its measures are kept."""

        def compute(keep):
            ema, rows = fit(net, keep=keep)
            seconds = keep.seconds()
            x = in_blocks(partial(sampler, ema), self.judge.eps)
            result = new_result(what, self.seed, part=part, width=net.out.in_features, parameters=count_parameters(net),
                                updates=updates, nfe=1, seconds=seconds, **self.judge(x, self.x_teacher))  # fmt: skip
            return {"net": ema.state_dict(), "rows": rows, "result": result, "points": x[:POINTS].cpu()}

        state = self.run.stage(f"seed{self.seed}-{name}", compute)
        net.load_state_dict(state["net"])
        return net.requires_grad_(False)

    def distilled(self, name, what, width, updates):
        """A student by TD."""
        objective = partial(student_objective, teacher=self.teacher())
        fit = partial(train, draw=self.draw, objective=objective, steps=updates, batch=BATCH, lr=td_rate(width),
                      seed=self.seed, stream="td", name=name)  # fmt: skip
        return self.student(name, what, student_network(self.seed, width, self.device), fit, updates=updates)

    def td_start(self):
        """The student that stage 2 starts from."""
        return self.distilled("td-start", "TD, first half only", self.plan["hd_width"], self.plan["td_steps"])

    def refined(self, name, what, *, td=True, pooling=None):
        """A student by DMD. pooling: with an adversarial term. td=False: from random weights, with the updates of both
        stages."""
        teacher, steps = self.teacher(), self.plan["refine_steps"]
        both = steps + self.plan["td_steps"]
        net = frozen_copy(self.td_start()) if td else student_network(self.seed, self.plan["hd_width"], self.device)
        discriminator = None
        if pooling is not None:
            build = partial(AdaptiveWeightedDiscriminator, [TEACHER_WIDTH], pooling)
            discriminator = new_network(self.seed, "discriminator", build).to(self.device)
        fake = frozen_copy(teacher).requires_grad_(True)  # PAPER: the fake branch starts as the teacher
        fit = partial(refine, teacher=teacher, fake=fake, draw=self.draw, discriminator=discriminator,
                      steps=steps if td else both, batch=BATCH, seed=self.seed, stream="refine", name=name,
                      taps=TAPS)  # fmt: skip
        return self.student(name, what, net.requires_grad_(True), fit, updates=both)


def story(stages, first=True):
    """The story as {name of a stage: (names of those that it needs, what to call)}.

    first: of the first of the seeds. It alone trains the largest student twice as long too, to see how much of its gap
    is a matter of training.
    """
    plan = stages.plan
    both = plan["td_steps"] + plan["refine_steps"]
    jobs = {"data": ([], stages.fresh_data), "teacher": ([], stages.teacher)}

    # --- the bottleneck: every size gets the updates of both stages ---
    def distill(name, *how):
        jobs[name] = ["teacher"], partial(stages.distilled, name, *how)

    for width in plan["widths"]:
        distill(f"td-{width}", "TD", width, both)
    if first:
        distill("td-largest-twice", "TD, trained twice as long", plan["widths"][-1], 2 * both)

    # --- the way past it: half of the updates for each stage ---
    def refine_by(name, what, td=True, pooling=None):
        needs = ["teacher"] + ["td-start"] * td
        jobs[name] = needs, partial(stages.refined, name, what, td=td, pooling=pooling)

    jobs["td-start"] = ["teacher"], stages.td_start
    refine_by("td-dmd", "TD + DMD")
    refine_by("hd", "HD: TD + DMD + AWD", pooling="attention")
    refine_by("td-dmd-mean", "TD + DMD + GAN, mean pooling", pooling="mean")
    # --- the controls: no TD, the updates of both stages ---
    refine_by("dmd", "DMD, no TD", td=False)
    refine_by("dmd-awd", "DMD + AWD, no TD", td=False, pooling="attention")
    return jobs


# ---------------------------------------------------------------------------------------------------------------------
# The unified view: three roads to the average velocity
# ---------------------------------------------------------------------------------------------------------------------


def consistency_loss(u_theta, x_t, v, *, t, p=1.0, c=1e-2):
    """Continuous-time consistency distillation, weighted by 1/t, as a loss on the network u_theta(x_t, t=t).

    The consistency function f(x_t, t) = x_t - t u(x_t, 0, t) should not change along the teacher's path: df/dt = 0.
    Its gradient is (df/dt) . grad f (Song et al., arXiv 2303.01469, continuous-time CD; Lu & Song, arXiv 2410.11081).
    x_t, v (B, ...); t (B,) in (0, 1]. p, c: MeanFlow's adaptive weight, as on the other two roads.
    Returns the scalar loss and err (B,), the squared norm of df/dt.
    """
    zero = torch.zeros_like(t)

    def u_from_zero(x, *, t, r):
        return u_theta(x, t=t)

    # f = x_t - t u   =>   df/dt = v - u - t du/dt ;   grad f = -t grad u
    u = u_theta(x_t, t=t)
    _, du_dt = meanflow_target(u_from_zero, x_t, v, r=zero, t=t)
    f = x_t - expand_times(t, x_t) * u
    df_dt = (v - u - expand_times(t, x_t) * du_dt).detach()
    # 1/2 |f - sg[f - df/dt]|^2 / t has the gradient (df/dt . grad f) / t = -(df/dt) . grad u :
    # half of MeanFlow's at r = 0, where |u - sg[u_target]|^2 has no 1/2. Adam does not mind.
    err = df_dt.square().flatten(1).sum(dim=1)  # (B,)
    move = 0.5 * (f - (f - df_dt).detach()).square().flatten(1).sum(dim=1) / t
    return (move * (err + c) ** -p).mean(), err


def consistency_objective(net, x_0, y, eps, generator, *, teacher):
    """Consistency distillation for a batch of data and noise (B, 2), y None; net has one time, u(x_t, 0, t)."""
    t = torch.rand(len(x_0), generator=generator, device=x_0.device).clamp_min(1e-3)  # the weight is 1/t
    x_t = add_noise(x_0, eps, t)
    with torch.no_grad():
        v = teacher(x_t, t=t)
    loss, err = consistency_loss(net, x_t, v, t=t)
    return loss, {"raw_error": err.mean()}


def progressive_target(velocity, x_t, *, t, h):
    """Progressive distillation's target: two steps of length h by the present velocity, as one (arXiv 2202.00512).

    velocity(x_t, t=t) -> (B, ...); t (B,) >= 2 h. Returns (v(x_t, t) + v(x_t - h v, t - h)) / 2: (B, ...).
    """
    v_first = velocity(x_t, t=t)
    v_second = velocity(x_t - h * v_first, t=t - h)
    return (v_first + v_second) / 2


def progressive_objective(net, x_0, y, eps, generator, *, previous, h):
    """One round of progressive distillation: net learns to step 2 h where `previous` steps h. Both have one time."""
    count = round(1 / (2 * h))  # the student's grid: t = 2 h, 4 h, ..., 1
    t = 2 * h * (1 + torch.randint(count, (len(x_0),), generator=generator, device=x_0.device))
    x_t = add_noise(x_0, eps, t)
    with torch.no_grad():
        v = progressive_target(previous, x_t, t=t, h=h)
    loss, err = flow_matching_loss(net, x_t, v, t=t, p=1.0)
    return loss, {"raw_error": err.mean()}


def distill_progressively(net, draw, *, teacher, rounds, steps, name, keep, **settings):
    """`rounds` halvings, from 2^rounds Euler steps of the teacher to one, share `steps` updates; returns as `train`.

    keep: a data.Keep, and a killed distillation goes on with the round that it was in."""
    parts = {"net": net}
    first, rows = keep.restore(parts)
    previous = frozen_copy(net) if first else teacher
    for k in range(first, rounds):
        objective = partial(progressive_objective, previous=previous, h=2.0 ** (k - rounds))
        share = (k + 1) * steps // rounds - k * steps // rounds
        previous, more = train(net, draw, objective, steps=share, name=f"{name}-round-{k + 1}", **settings)
        net.load_state_dict(previous.state_dict())  # the next round's student starts from this round's
        rows += more
        keep.save(parts, k + 1, rows)
    return previous, rows


ROADS = ("MeanFlow", "consistency", "progressive")


def take_road(stages, road, width):
    """A student of this width by one of ROADS: same updates, rates and weighting of the loss."""
    teacher, rounds, updates = stages.teacher(), stages.plan["unify_rounds"], stages.plan["td_steps"]
    name, sampler = f"unify-{road}-{width}", sample_euler
    if road == "MeanFlow":
        net, sampler = student_network(stages.seed, width, stages.device), sample
        fit = partial(train, objective=partial(student_objective, teacher=teacher))
    else:
        build = partial(VelocityMLP, 2, width, STUDENT_DEPTH)
        net = new_network(stages.seed, f"student {width}", build).to(stages.device)
        fit = partial(train, objective=partial(consistency_objective, teacher=teacher))
        if road == "progressive":
            fit = partial(distill_progressively, teacher=teacher, rounds=rounds)
    fit = partial(fit, draw=stages.draw, lr=td_rate(width), steps=updates, batch=BATCH, seed=stages.seed,
                  stream="unify", name=name)  # fmt: skip
    stages.student(name, road, net, fit, updates=updates, sampler=sampler, part="unify")


def judge_euler(stages):
    """Where progressive distillation starts: the teacher's 2^rounds Euler steps."""

    def compute(keep):
        teacher, calls = stages.teacher(), 2 ** stages.plan["unify_rounds"]
        x = in_blocks(partial(sample_euler, teacher, steps=calls), stages.judge.eps)
        result = new_result(f"the teacher's {calls} Euler steps", stages.seed, part="unify", nfe=calls,
                            **stages.judge(x, stages.x_teacher))  # fmt: skip
        return {"rows": [], "result": result}

    stages.run.stage(f"seed{stages.seed}-unify-euler", compute)


def unify(stages):
    """Consistency, progressive and MeanFlow distillation of one teacher, at several widths; jobs as those of `story`.

    The question: u(eps, 0, 1). The exact answer: (eps - x_0) / 1, with x_0 the end of the teacher's ODE. The distance
    between the two is the replay error of one step.

    What still differs: MeanFlow's network has a second time (13 weights more for each unit of width); progressive
    distillation's updates are shared by its rounds, each with a warm-up, and its target is 2^rounds Euler steps of the
    teacher, whose own distance gets a row.
    """
    jobs = {"teacher": ([], stages.teacher), "unify-euler": (["teacher"], partial(judge_euler, stages))}
    for width in stages.plan["unify_widths"]:
        for road in ROADS:
            jobs[f"unify-{road}-{width}"] = ["teacher"], partial(take_road, stages, road, width)
    return jobs


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and tables
# ---------------------------------------------------------------------------------------------------------------------


def mean_std(values):
    """The mean and the standard deviation of some numbers as text, 0.1230 +- 0.0040; of one number, the number."""
    spread = f" +- {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def grouped(results, part):
    """{(what, width): [a result for each seed]} of one part, in the order in which they are told."""
    groups = {}
    for row in results:
        if row["part"] == part:
            groups.setdefault((row["what"], row["width"]), []).append(row)
    return groups


def print_table(results, part):
    """What was run, and how good it is: a line for each kind, with mean and spread over the seeds."""
    print(f"{'':38} {'parameters':>10} {'calls':>5}  {'inside':<17} {'sliced W2':<17} {'replay error':<17} parts, %")
    for (what, width), rows in grouped(results, part).items():
        columns = [mean_std([row[key] for row in rows]) if key in rows[0] else "" for key in
                   ("share_inside", "sliced_w2", "replay_error")]  # fmt: skip
        low, high = (100 * np.mean([row[key] for row in rows]) for key in ("smallest_part", "largest_part"))
        name = f"{what}, width {width}" if width else what
        print(f"{name:38} {rows[0]['parameters'] or '':>10} {rows[0]['nfe'] or '':>5}  "
              f"{columns[0]:<17} {columns[1]:<17} {columns[2]:<17} {low:.1f} to {high:.1f}")


def draw_curve(axis, groups, names, key, **style):
    """Mean over seeds against the number of parameters, with a bar for the standard deviation."""
    chosen = [rows for (what, _), rows in groups.items() if what in names]
    chosen.sort(key=lambda rows: rows[0]["parameters"])
    x = [rows[0]["parameters"] for rows in chosen]
    values = [[row[key] for row in rows] for rows in chosen]
    spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
    axis.errorbar(x, [np.mean(v) for v in values], spread, capsize=3, **style)


def style_axes(axis, ylabel, log=True):
    axis.set_xscale("log")
    axis.set_yscale("log" if log else "linear")
    axis.xaxis.set_minor_formatter("")  # else the numbers between the powers of ten overlap
    axis.set_xlabel("parameters of the student")
    axis.set_ylabel(ylabel)


def plot_bottleneck(path, results):
    """bottleneck.png: the quality of one step against the student's size, with the teacher as the floor."""
    groups = grouped(results, "story")
    figure, axes = new_figure(13, 4.4, columns=3)
    panels = [("replay_error", "replay error\n(squared distance to the teacher's sample)", True),
              ("sliced_w2", "sliced Wasserstein-2 to the data", True),
              ("share_inside", "share of samples inside the support", False)]  # fmt: skip
    for axis, (key, label, log) in zip(axes, panels):
        draw_curve(axis, groups, ["TD"], key, color=BLUE, marker="o", label="TD, 1 call")
        draw_curve(axis, groups, ["TD, trained twice as long"], key, color=BLUE, marker="o", mfc="white", ls="none",
                   label="TD, trained twice as long")  # fmt: skip
        draw_curve(axis, groups, ["HD: TD + DMD + AWD"], key, color=ORANGE, marker="*", ms=16, ls="none",
                   label="hierarchical distillation, 1 call")  # fmt: skip
        teacher = next(rows for (what, _), rows in groups.items() if what == "teacher")
        axis.axhline(np.mean([row[key] for row in teacher]), color="black", ls="--",
                     label=f"teacher, {teacher[0]['nfe']} calls (left: half against all of its steps)")  # fmt: skip
        if key == "sliced_w2":
            data = groups["data against data", 0]
            axis.axhline(np.mean([row[key] for row in data]), color=GREY, ls=":", label="data against data")
        style_axes(axis, label, log)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle("One-step students of one teacher, against their size")
    save_figure(path, figure)


def plot_story(path, panels):
    """story.png: panels {title: (points (n, 2), a colour or a number for each)}, on the same axes."""
    figure, axes = new_figure(14, 7.4, rows=2, columns=4, grid=False, sharex=True, sharey=True)
    for axis, (title, (points, colour)) in zip(axes.flat, panels.items()):
        cmap = None if colour is GREY else "viridis"
        axis.scatter(*points.T, c=colour, cmap=cmap, s=1.5, lw=0)
        axis.set(title=title, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
    save_figure(path, figure)


def plot_unified(path, results):
    """unified.png: how far three distillations of one teacher stay from the exact average velocity, by size."""
    groups = grouped(results, "unify")
    figure, axis = new_figure(6, 4.2)
    for road, colour, marker in [("MeanFlow", BLUE, "o"), ("consistency", PINK, "s"), ("progressive", GREEN, "^")]:
        draw_curve(axis, groups, [road], "replay_error", color=colour, marker=marker, label=f"{road} distillation")
    teacher = [row["replay_error"] for row in results if row["what"] == "teacher"]
    axis.axhline(np.mean(teacher), color="black", ls="--", label="teacher at half against all of its steps")
    style_axes(axis, "squared distance of u(eps, 0, 1)\nfrom the exact average velocity")
    axis.set_title("Three distillations of one teacher, against the student's size")
    axis.legend(fontsize=9)
    save_figure(path, figure)


def report(stages):
    """Results, metrics, pictures and tables of all that the run folder holds; the story's picture is of one seed."""
    run, judge, plan, seed = stages.run, stages.judge, stages.plan, stages.seed
    order = [*story(stages), *unify(stages)]  # in this order
    states = {name: state for name, state in run.stages().items() if name.split("-", 1)[-1] in order}
    states = dict(sorted(states.items(), key=lambda item: (
        item[1]["result"]["seed"], order.index(item[0].split("-", 1)[1]))))  # fmt: skip
    results = [state["result"] for state in states.values()]
    write_json(run.path / "results.json", results)
    run.write_metrics([row for state in states.values() for row in state["rows"]])
    pictures = []
    if all(f"seed{seed}-{name}" in states for name in story(stages, first=False)):
        small, large = min(plan["widths"]), max(plan["widths"])
        calls = states[f"seed{seed}-teacher"]["result"]["nfe"]
        chosen = {f"teacher, {calls} calls": "teacher", "TD, 1 call, smallest": f"td-{small}",
                  "TD, 1 call, HD's size": f"td-{plan['hd_width']}", "TD, 1 call, largest": f"td-{large}",
                  "TD + DMD, 1 call": "td-dmd",
                  "HD: TD + DMD + AWD, 1 call": "hd", "no TD: DMD + AWD, 1 call": "dmd-awd"}  # fmt: skip
        colour = judge.eps[:POINTS, 1].cpu().argsort().argsort()  # by the height of its noise: the same in all panels
        panels = {"data": (judge.data[:POINTS].cpu(), GREY)}
        panels |= {title: (states[f"seed{seed}-{name}"]["points"][:POINTS], colour) for title, name in chosen.items()}
        plot_story(run.path / "story.png", panels)
        plot_bottleneck(run.path / "bottleneck.png", results)
        print_table(results, "story")
        pictures += ["story.png", "bottleneck.png"]
    if any(row["part"] == "unify" for row in results):
        plot_unified(run.path / "unified.png", results)
        print_table(results, "unify")
        pictures.append("unified.png")
    print(f"In {run.path}: {', '.join(pictures)}, results.json, metrics.csv, and a checkpoint for each network.")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DENSITIES, default="checkerboard", help="2D density (default: %(default)s)")
    parser.add_argument("--seeds", type=whole_number(1), default=1, help="how many seeds to run (default: %(default)s)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--out", help="run folder (default: runs/toy2d, and for other data or plans runs/toy2d-...)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: %(default)s)")
    parser.add_argument("--workers", type=whole_number(1, 64), default=min(4, os.cpu_count() or 1),
                        help="stages side by side, on one thread each (default: %(default)s)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="everything, small: to see that it works, not how well")
    parser.add_argument("--unify", action="store_true",
                        help="not the story, but three distillation methods side by side")  # fmt: skip
    for name, what in [("teacher", "of the teacher"), ("td", "of stage 1, and of each method of --unify"),
                       ("refine", "of stage 2")]:  # fmt: skip
        parser.add_argument(f"--{name}-steps", type=whole_number(1),
                            help=f"updates {what} (default: {PLANS['default'][f'{name}_steps']})")  # fmt: skip
    args = parser.parse_args(arguments)
    check_device(parser, args.device)
    return parser, args


def configuration(data, plan):
    """What config.json holds: all that two runs must share to share a folder."""
    return {"toy2d": {"data": data, **plan, "student_depth": STUDENT_DEPTH, "taps": TAPS,
                      "teacher_width": TEACHER_WIDTH, "teacher_depth": TEACHER_DEPTH, "teacher_batch": TEACHER_BATCH,
                      "batch": BATCH, "lr_teacher": LR_TEACHER,
                      "lr_td": {width: td_rate(width) for width in plan["widths"]}}}  # fmt: skip


def stages_of(args, plan, seed):
    """One seed's stages, and its jobs: the story's or those of --unify."""
    run, device = RunFolder(args.out, configuration(args.data, plan)), torch.device(args.device)
    stages = Stages(run, judge_of(args.data, plan["samples"], device), plan, seed, device)
    return stages, unify(stages) if args.unify else story(stages, first=seed == args.seed)


def work(args, plan, seed, name):
    """Do one job, in whatever process."""
    _, jobs = stages_of(args, plan, seed)
    jobs[name][1]()


def main(arguments=None):
    parser, args = parse_arguments(arguments)
    plan = dict(PLANS["quick" if args.quick else "default"])
    given = {f"{name}_steps": getattr(args, f"{name}_steps") for name in ("teacher", "td", "refine")}
    plan |= {key: steps for key, steps in given.items() if steps is not None}
    name = "-".join(["toy2d"] + [args.data] * (args.data != "checkerboard") + ["quick"] * args.quick)
    args.out = args.out or f"runs/{name}"
    with sentences(parser) as held:
        run = RunFolder(args.out, configuration(args.data, plan))
        held.enter_context(alone(run.path))
        finished, waiting = run.stages(), {}
        for seed in range(args.seed, args.seed + args.seeds):
            _, jobs = stages_of(args, plan, seed)
            names = [name for name in jobs if f"seed{seed}-{name}" not in finished]
            for name in jobs.keys() - names:
                Keep(run, f"seed{seed}-{name}").discard()  # by a kill just before its stage would have done so
            # the last first, for they take longest
            waiting |= {(seed, name): [(seed, needed) for needed in jobs[name][0] if needed in names]
                        for name in reversed(names)}  # fmt: skip
        side_by_side(partial(work, args, plan), waiting, args.workers, parser.prog)
        report(stages_of(args, plan, args.seed)[0])


if __name__ == "__main__":
    main()

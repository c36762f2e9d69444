"""Hierarchical distillation in 2D, start to end on a CPU: where trajectory distillation stops, and the way past it.

    python toy2d.py              the story, one seed        python toy2d.py --seeds 3     with mean and spread
    python toy2d.py --quick      all of it, small           python toy2d.py --unify       three methods, one function

It leaves pictures, results.json and a csv for each training in runs/toy2d/. The same command resumes, or redraws.

1. A teacher learns the velocity field of a density by flow matching. It samples by Heun's method, with 64 calls.
2. The bottleneck. Students of many sizes learn its average velocity (TD, meanflow_td.py) and sample with ONE call.
   Bigger is better, but not by enough: where the path chooses between two squares, they build bridges.
3. The way past. A SMALL student takes half of its updates from TD, the others from stage 2 (dmd_refine.py, awd.py).
4. The controls: no TD, or a discriminator that averages its tokens. Does the start matter? DMD alone from three starts.

PAPER: figure 3, where quality of TD rises with size, and 50 times the size does not close the gap. OURS: density,
networks and budget, which the paper does not give.
"""

import argparse
import copy
import math
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from scipy import stats

from awd import AdaptiveWeightedDiscriminator
from data import load, plot_curves, report, rng, save
from dmd_refine import processes, refine
from meanflow_td import NO_MOMENTUM, meanflow_target, new_network, sample, sample_ode, student_loss, teacher_loss, train
from models import VelocityMLP, add_noise, expand_times

DEPTH, TEACHER_WIDTH, TAPS = 3, 96, (0, 1, 2)  # hidden layers of all networks; TAPS: read by the discriminator
HD_WIDTH, WIDTHS = 48, (168, 88, 48, 18)  # of students: 92,570 to 1,820 parameters; HD has 9,170
# run, in all that follows: one of these two, with the keys "data", what to draw, and "out", where to write
DEFAULT = dict(teacher_steps=6000, td_steps=1900, refine_steps=1900, samples=100_000, ode_steps=32)
QUICK = dict(teacher_steps=150, td_steps=60, refine_steps=60, samples=2000, ode_steps=8)

# --- The trainings: each is a job for one process, and leaves one file -----------------------------------------------
# Further down: `draw` takes points of a density, `keep` and `result` measure a network and write that down. Imported:
# new_network builds one from a seed. pool: of processes. A row is one of the table of results.


def teacher_of(run, seed):
    """The frozen teacher of a seed, trained here or found in its file."""
    net = new_network(seed, "teacher", lambda: VelocityMLP(2, TEACHER_WIDTH, DEPTH))
    loss = partial(teacher_loss, draw=partial(draw, run["data"], 1024))
    return train(run["out"] / f"seed{seed}-teacher.pt", net, loss, steps=run["teacher_steps"], lr=5e-3, seed=seed,
                 config={"data": run["data"]})  # fmt: skip


def data_row(run, seed):
    """The row of fresh data points: as near the data as that many samples can come."""
    x, _ = draw(run["data"], run["samples"], rng(seed, "other data"))
    return {"what": "data", "name": "data", "seed": seed, "nfe": 0, **measure(x, run["data"], x)}


def teacher_row(run, seed):
    """Job: the teacher of a seed. -> its row"""
    return result(run, seed, "teacher", "teacher", teacher_of(run, seed), run["teacher_steps"],
                  partial(sample_ode, steps=run["ode_steps"]), nfe=2 * run["ode_steps"])  # fmt: skip


def student(seed, width, two_times=True):
    """A student's random start: the same for one seed and width, so that variants differ in their training only."""
    return new_network(seed, f"student {width}", lambda: VelocityMLP(2, width, DEPTH, two_times))


def td_rate(width):
    """Adam's peak rate for a TD student. PRIOR: 1/width (Yang et al., arXiv 2203.03466). OURS: the numbers, of a few
    tried at widths from 18 to 168 on seeds that are in no table."""
    return min(1.2e-2, 0.6 / width)


def td_row(run, job):
    """Job: a student by TD. -> its row"""
    seed, name, what, width, updates = job
    loss = partial(student_loss, draw=partial(draw, run["data"], 256), teacher=teacher_of(run, seed))
    net = train(run["out"] / f"seed{seed}-{name}.pt", student(seed, width), loss, steps=updates, lr=td_rate(width),
                betas=NO_MOMENTUM, seed=seed, config={"data": run["data"]},
                look=partial(keep, run, seed, name), look_every=25)  # fmt: skip
    return result(run, seed, name, what, net, updates)


def refined_row(run, job):
    """Job: a student by stage 2, from TD, from random weights or from far off. -> its row"""
    seed, name, what, start, pooling, updates = job
    net, teacher, discriminator = student(seed, HD_WIDTH), teacher_of(run, seed), None
    fake = copy.deepcopy(teacher)  # PAPER: the fake branch starts as the teacher
    if start == "td":
        net.load_state_dict(load(run["out"] / f"seed{seed}-td-start.pt", "run toy2d.py again")["ema"])
    if start == "far":
        net.out.bias.data -= 3  # x_gen = eps - u lies around (3, 3), outside of the data
    if pooling != "none":
        build = partial(AdaptiveWeightedDiscriminator, [TEACHER_WIDTH], pooling)
        discriminator = new_network(seed, "discriminator", build)
    net = refine(run["out"] / f"seed{seed}-{name}.pt", net, teacher, fake, discriminator,
                 partial(draw, run["data"], 512), steps=updates, seed=seed, taps=TAPS,
                 config={"data": run["data"], "start": start, "pooling": pooling},
                 look=partial(keep, run, seed, name), look_every=25)  # fmt: skip
    return result(run, seed, name, what, net, updates + (start == "td") * run["td_steps"])


def story(run, seeds, pool):
    """Teachers, their students by TD, stage 2; then the table and the pictures."""
    first, second = run["td_steps"], run["refine_steps"]
    rows = [data_row(run, seed) for seed in seeds]
    rows += pool.map(partial(teacher_row, run), seeds)

    # seed, name, what it is, width, updates. First the largest student, trained longer: is the gap one of training?
    jobs = [(0, f"td-x{k}", f"TD, {k} times the updates", WIDTHS[0], k * (first + second)) for k in (4, 2)]
    for seed in seeds:
        jobs += [(seed, f"td-{width}", "TD", width, first + second) for width in WIDTHS]
        jobs += [(seed, "td-start", "TD, stage 1 alone", HD_WIDTH, first)]
    rows += pool.map(partial(td_row, run), jobs)

    # name, what it is, start, pooling, updates of stage 2; the longest first. "td": from td-start
    variants = [("dmd-awd", "DMD + AWD, no TD", "random", "attention", first + second),
                ("dmd", "DMD, no TD", "random", "none", first + second),
                ("hd", "HD: TD + DMD + AWD", "td", "attention", second),
                ("td-mean", "TD + DMD + GAN, mean pooling", "td", "mean", second),
                ("td-dmd", "TD + DMD", "td", "none", second),
                ("dmd-short", "DMD, no TD, stage 2 alone", "random", "none", second),
                ("dmd-far", "DMD, from far off", "far", "none", second)]  # far: no overlap at first  # fmt: skip
    rows += pool.map(partial(refined_row, run), [(seed, *variant) for variant in variants for seed in seeds])
    show(run, rows)


# --- Densities: points in the plane, and which part of the support a point lies in, -1 outside ------------------------


def checkerboard(n, generator):
    """The 8 squares of a 4 x 4 board on [-2, 2]^2 whose row + column is even; uniform in each: (n, 2)."""
    square = torch.randint(8, (n,), generator=generator)  # two in each row
    row = square // 2
    column = 2 * (square % 2) + row % 2
    return torch.stack([column, row], dim=1) + torch.rand(n, 2, generator=generator) - 2


def square_of(x):
    """Which of the 8 squares holds a point x (n, 2): (n,)."""
    column, row = torch.floor(x + 2).long().unbind(1)
    on_board = (column >= 0) & (column < 4) & (row >= 0) & (row < 4) & ((row + column) % 2 == 0)
    return torch.where(on_board, 2 * row + column // 2, -1)  # the number that `checkerboard` gives the square


# By name: how to draw it, which part of it holds a point, how many parts. Rings and spirals follow at the end.
DENSITIES = {"checkerboard": (checkerboard, square_of, 8)}


def draw(data, batch, generator):
    """A batch for the training loops: points x_0 (batch, 2), and None, since points have no labels."""
    return DENSITIES[data][0](batch, generator), None


# --- How good is a sample? -------------------------------------------------------------------------------------------


def sorted_projections(x, count=128):
    """The points x (n, 2) projected onto `count` fixed directions, each row sorted: (count, n)."""
    angle = math.pi * (torch.arange(count) + 0.5) / count  # half a circle: the opposite gives the same distance
    projected = torch.stack([angle.cos(), angle.sin()], dim=1) @ x.T
    return torch.from_numpy(np.sort(projected.numpy(), axis=1))  # ten times as fast as torch's


def sliced_w2(projections_x, projections_y):
    """Sliced Wasserstein-2 distance from the sorted projections (count, n) of two samples of equal size: the optimal
    transport in one dimension pairs the sorted points (Bonneel et al., J. Math. Imaging Vis. 51, 2015)."""
    return (projections_x - projections_y).square().mean().sqrt().item()


@cache
def reference(data, samples):
    """The noise (samples, 2) that all networks sample from, and the projected data that samples are compared with."""
    points = DENSITIES[data][0](samples, rng(0, "judge data"))
    return torch.randn(samples, 2, generator=rng(0, "judge noise")), sorted_projections(points)


def measure(x, data, x_teacher):
    """The measures of samples x (n, 2). x_teacher (n, 2): the teacher's samples from the same noise."""
    _, part_of, parts = DENSITIES[data]
    part = part_of(x)
    shares = torch.bincount(part[part >= 0], minlength=parts) / len(x)
    return {"share_inside": (part >= 0).float().mean().item(), "smallest_part": shares.min().item(),
            "largest_part": shares.max().item(),
            "sliced_w2": sliced_w2(sorted_projections(x), reference(data, len(x))[1]),
            "replay_error": (x - x_teacher).square().sum(dim=1).mean().item()}  # fmt: skip


# --- The unified view: three roads to the average velocity -----------------------------------------------------------
# The question: u(eps, 0, 1). The answer: eps - x_0, where x_0 ends the teacher's ODE. Replay error: |difference|^2.


def consistency_loss(u_theta, x_t, v, *, t, p=1.0, c=1e-2):
    """Continuous-time consistency distillation, weighted by 1/t, as a loss on the network u_theta(x_t, t=t).
    The consistency function f(x_t, t) = x_t - t u(x_t, 0, t) should not change along the teacher's path: df/dt = 0.
    Its gradient is (df/dt) . grad f (Song et al., arXiv 2303.01469, continuous-time CD; Lu & Song, arXiv 2410.11081).
    x_t, v (B, ...); t (B,) in (0, 1]. p, c: MeanFlow's adaptive weight. -> scalar loss, err (B,) = |df/dt|^2."""
    # f = x_t - t u   =>   df/dt = v - u - t du/dt ;   grad f = -t grad u
    u = u_theta(x_t, t=t)
    _, du_dt = meanflow_target(lambda x, *, t, r: u_theta(x, t=t), x_t, v, r=torch.zeros_like(t), t=t)
    f = x_t - expand_times(t, x_t) * u
    df_dt = (v - u - expand_times(t, x_t) * du_dt).detach()
    # 1/2 |f - sg[f - df/dt]|^2 / t has the gradient (df/dt . grad f) / t = -(df/dt) . grad u :
    # half of MeanFlow's at r = 0, where |u - sg[u_target]|^2 has no 1/2. Adam does not mind.
    err = df_dt.square().flatten(1).sum(dim=1)  # (B,)
    move = 0.5 * (f - (f - df_dt).detach()).square().flatten(1).sum(dim=1) / t
    return (move * (err + c) ** -p).mean(), err


def progressive_target(velocity, x_t, *, t, h):
    """Progressive distillation's target: two steps of length h by the present velocity, as one (arXiv 2202.00512).
    velocity(x_t, t=t) -> (B, ...); t (B,) >= 2 h. -> (v(x_t, t) + v(x_t - h v, t - h)) / 2: (B, ...)."""
    v_first = velocity(x_t, t=t)
    v_second = velocity(x_t - h * v_first, t=t - h)
    return (v_first + v_second) / 2


def road_loss(net, generator, *, data, teacher, h):
    """Consistency distillation of a teacher (h None), or progressive distillation of its steps of length h."""
    x_0, _ = draw(data, 256, generator)
    eps, t = torch.randn(x_0.shape, generator=generator), torch.rand(256, generator=generator).clamp_min(1e-3)
    if h is None:
        x_t = add_noise(x_0, eps, t)
        loss, err = consistency_loss(net, x_t, teacher(x_t, t=t), t=t)
    else:
        t = 2 * h * (t / (2 * h)).ceil()  # the student's grid: 2 h, 4 h, ..., 1
        x_t = add_noise(x_0, eps, t)
        err = (net(x_t, t=t) - progressive_target(teacher, x_t, t=t, h=h)).square().flatten(1).sum(dim=1)
        loss = (err / (err.detach() + 1e-2)).mean()  # MeanFlow's adaptive weight, as on the other two roads
    return loss, {"raw_error": err.mean()}


def road_row(run, job):
    """Job: a student by one of three distillations, with the updates and rates of the story's TD. -> its row"""
    seed, road, width = job
    updates, name = run["td_steps"] + run["refine_steps"], f"unify-{road}-{width}"
    if road == "MeanFlow":
        return td_row(run, (seed, f"td-{width}", road, width, updates))
    # Progressive distillation takes six rounds, from 64 Euler steps of the teacher to one. Each student but the first
    # starts as the one before it, which is now its teacher. It learns to step 2 h as its teacher steps h twice.
    rounds = [None] if road == "consistency" else [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]  # h
    betas = NO_MOMENTUM if road == "consistency" else (0.9, 0.99)  # without du/dt in the target, momentum helps
    teacher, net = teacher_of(run, seed), student(seed, width, two_times=False)
    for k, h in enumerate(rounds):
        loss = partial(road_loss, data=run["data"], teacher=teacher, h=h)
        teacher = train(run["out"] / f"seed{seed}-{name}-{k}.pt", net, loss, steps=updates // len(rounds),
                        lr=td_rate(width), betas=betas, seed=seed, config={"data": run["data"]})  # fmt: skip
        net = copy.deepcopy(teacher).requires_grad_(True)
    return result(run, seed, name, road, teacher, updates, lambda net, eps: eps - net(eps, t=torch.ones(len(eps))))


def unify(run, seeds, pool):
    """Three distillations of one teacher, at three sizes; then the table and the picture."""
    rows = list(pool.map(partial(teacher_row, run), seeds))
    jobs = [(seed, road, width) for width in (88, 48, 18) for road in ROADS for seed in seeds]
    rows += pool.map(partial(road_row, run), jobs)
    report(run["out"] / "unified.json", rows, FACTS, MEASURES)
    plot_curves(run["out"] / "unified.png", rows, "width", {"replay_error": MEASURES["replay_error"]}, ROADS,
                "Three distillations of one teacher to one call, at three widths")  # fmt: skip


# --- Two more densities: points evenly along curves (curves, 1024, 2), blurred by a Gaussian of std BLUR --------------
BLUR, ALONG = 0.05, torch.arange(1024)[:, None] / 1024
CIRCLE, ARM = 2 * math.pi * ALONG, 2 * math.pi * 1.25 * ALONG.sqrt()  # angles; the root spreads an arm's points evenly
RINGS = torch.stack([radius * torch.cat([CIRCLE.cos(), CIRCLE.sin()], 1) for radius in (0.6, 1.2, 1.8)])
SPIRALS = torch.stack([side * 2 * ALONG.sqrt() * torch.cat([ARM.cos(), ARM.sin()], 1) for side in (1, -1)])


def blurred(curves, n, generator):
    """n points (n, 2): a curve, a point on it, noise."""
    curve, along = (torch.randint(count, (n,), generator=generator) for count in curves.shape[:2])
    return curves[curve, along] + BLUR * torch.randn(n, 2, generator=generator)


def curve_of(curves, x):
    """Which curve lies within three BLURs of a point x (n, 2): (n,)."""
    distance, curve = torch.stack([torch.cdist(x, points).amin(1) for points in curves], dim=1).min(dim=1)
    return torch.where(distance < 3 * BLUR, curve, -1)


DENSITIES |= {"rings": (partial(blurred, RINGS), partial(curve_of, RINGS), 3),
              "spirals": (partial(blurred, SPIRALS), partial(curve_of, SPIRALS), 2)}  # fmt: skip


# --- What is kept, and the pictures of it -----------------------------------------------------------------------------
# Pictures show samples of these networks at MARKS updates of a stage. One without TD trains as long as both stages, so
# it is shown again at td_steps + MARKS updates, beside stage 2 of the others.
WATCHED = ("td-start", "hd", "dmd-awd", "td-dmd", "dmd-short", "dmd-far")
LAST = 99_999  # in the name of a file, the end of a training, however many updates it has
MARKS = (25, 50, 100, 150, 200, 400, 800, 1900)
POINTS, SHOWN = 5000, 2000  # samples in a picture, and in the moving one
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#888888"  # told apart by all eyes
MEASURES = {"replay_error": ("replay error\n(squared distance to the teacher's sample)", "log"),
            "sliced_w2": ("sliced Wasserstein-2 to the data", "log"),
            "share_inside": ("share of samples inside the support", "linear")}  # fmt: skip
BOTTLENECK = {"data": dict(color=GREY, ls=":", label="data against data"),
              "teacher": dict(color="black", ls="--"), "TD": dict(color=BLUE, marker="o"),
              "TD, 2 times the updates": dict(color=BLUE, marker="o", mfc="white", ls="none"),
              "TD, 4 times the updates": dict(color=BLUE, marker="D", mfc="white", ls="none"),
              "HD: TD + DMD + AWD": dict(color=ORANGE, marker="*", ms=16)}  # fmt: skip
START = {"TD + DMD": dict(color=ORANGE, marker="o"), "DMD, from far off": dict(color=GREEN, marker="o"),
         "DMD, no TD, stage 2 alone": dict(color=BLUE, marker="o", label="DMD, no TD"),
         "DMD, no TD": dict(color=BLUE, marker="s", mfc="white", ls="none", label="DMD, no TD, with TD's updates too")}
FACTS = "width", "parameters", "nfe", "updates"  # columns of the printed table, before the measures
ROADS = {"MeanFlow": dict(color=BLUE, marker="o"), "consistency": dict(color=PINK, marker="s"),
         "progressive": dict(color=GREEN, marker="^")}  # fmt: skip


def keep(run, seed, name, net, n, sampler=sample):
    """Measure a network after n updates, if a picture looks then, and keep that for `load_kept`. -> its measures"""
    watched = name in WATCHED and {n, n - run["td_steps"]} & {*MARKS}
    if n != LAST and not watched:
        return None
    eps, _ = reference(run["data"], run["samples"])
    x = torch.cat([sampler(net, block) for block in eps.split(1024)])  # blocks that fit into a CPU's cache
    measures = measure(x, run["data"], x if name == "teacher" else load_kept(run, seed, "teacher")["x"])
    save(run["out"] / f"seed{seed}-{name}" / f"{n:05d}.pt", {"x": x, **measures})
    return measures


def load_kept(run, seed, name, n=LAST):
    """What was kept of a training after n updates, or the last before: samples "x", and their measures by name."""
    there = sorted((run["out"] / f"seed{seed}-{name}").glob("*.pt"))
    return load([path for path in there if int(path.stem) <= n][-1], "run toy2d.py again")


def result(run, seed, name, what, net, updates, sampler=sample, nfe=1):
    """A row of results.json for a trained network: what was run, its calls for one sample (nfe), its measures."""
    return {"what": what, "name": name, "seed": seed, "width": net.out.in_features, "nfe": nfe, "updates": updates,
            "parameters": sum(p.numel() for p in net.parameters()), **keep(run, seed, name, net, LAST, sampler)}


def show(run, rows):
    """The table and the pictures of the story."""
    out, second = run["out"], run["refine_steps"]
    measures = [*MEASURES, "smallest_part", "largest_part"]
    report(out / "results.json", rows, FACTS, measures)
    plot_curves(out / "bottleneck.png", rows, "parameters", MEASURES, BOTTLENECK,
                "The bottleneck: students of one call against their size. Their teacher makes many calls")  # fmt: skip
    two = {key: MEASURES[key] for key in ("share_inside", "sliced_w2")}
    marks = [row | {"updates": n} | {key: load_kept(run, row["seed"], row["name"], n)[key] for key in measures}
             for row in rows if row["name"] in ("td-dmd", "dmd-short", "dmd-far") for n in MARKS if n <= second]
    report(out / "start.json", marks, FACTS, two)
    for one, other in ("hd", "td-dmd"), ("hd", "td-mean"), ("hd", "dmd-awd"), ("td-dmd", "dmd"):
        told_apart("at the end", rows, one, other, two)
    for n in MARKS:
        told_apart(f"after {n}", [row for row in marks if row["updates"] == n], "td-dmd", "dmd-short", two)
    plot_curves(out / "start.png", marks + [row for row in rows if row["name"] == "dmd"], "updates", two, START,
                "Does the start matter? DMD alone from three starts, against the updates of stage 2")  # fmt: skip
    colours = reference(run["data"], run["samples"])[0][:POINTS, 1].argsort().argsort()  # noise points' ranks by height
    plot_story(out / "story.png", run, rows, colours)
    animate(out / "toy.gif", run, colours[:SHOWN])


def told_apart(when, rows, one, other, measures):
    """Print p by Welch's test between two trainings: small where they differ by more than their seeds do."""
    for key in measures:
        sides = [[row[key] for row in rows if row["name"] == name] for name in (one, other)]
        if len(sides[0]) > 1:
            print(f"{one} and {other} {when}, {key}: p = {stats.ttest_ind(*sides, equal_var=False).pvalue:.3f}")


def scatter(axis, one, colours, title):
    """Samples of `load_kept`, as many as there are colours, and the share of all that lies inside the support."""
    axis.clear()
    axis.scatter(*one["x"][: len(colours)].T, c=colours, s=1.5, lw=0)
    axis.set(title=title, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", xticks=[], yticks=[])
    axis.text(-2.5, 2.28, f"{100 * one['share_inside']:.1f} % inside", fontsize=9)


def plot_story(path, run, rows, colours):
    """story.png: the samples of seed 0, side by side."""
    figure = Figure((14, 7.6), layout="constrained", dpi=110)
    axes = figure.subplots(2, 4)
    data = DENSITIES[run["data"]][0](POINTS, rng(0, "judge data"))
    scatter(axes.flat[0], {"x": data, "share_inside": 1.0}, [GREY] * POINTS, "data")
    names = ["teacher", f"td-{WIDTHS[-1]}", f"td-{WIDTHS[0]}", f"td-{HD_WIDTH}", "td-dmd", "hd", "dmd-awd"]
    of_name = {row["name"]: row for row in rows if row["seed"] == 0}
    for axis, name in zip(axes.flat[1:], names):
        scatter(axis, load_kept(run, 0, name), colours, "{what}\nwidth {width}, calls: {nfe}".format(**of_name[name]))
    figure.suptitle("A sample's colour shows the height of its noise point, in all panels but the first")
    figure.savefig(path)


def animate(path, run, colours):
    """toy.gif: the same noise points through training; on the left TD and then stage 2, on the right no TD."""
    figure = Figure((7.2, 4.1), layout="constrained")
    axes = figure.subplots(1, 2)
    frames = [("td-start", "stage 1: TD", n, n) for n in MARKS if n <= run["td_steps"]]
    frames += [("hd", "stage 2: DMD + AWD", n, n + run["td_steps"]) for n in MARKS if n <= run["refine_steps"]]
    writer = PillowWriter(fps=6)
    with writer.saving(figure, path, dpi=64):
        for name, title, n, total in frames:
            scatter(axes[0], load_kept(run, 0, name, n), colours, f"{title}, update {total}")
            scatter(axes[1], load_kept(run, 0, "dmd-awd", total), colours, f"no TD: DMD + AWD, update {total}")
            writer.grab_frame()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=DENSITIES, default="checkerboard", help="2D density (default: %(default)s)")
    add("--seeds", type=int, default=1, choices=range(1, 11), metavar="N", help="1 to 10 seeds (default: %(default)s)")
    add("--out", type=Path, help="run folder (default: runs/toy2d, and for other data runs/toy2d-...)")
    add("--quick", action="store_true", help="everything, small: to see that it works, not how well")
    add("--unify", action="store_true", help="not the story, but three distillation methods side by side")
    args = parser.parse_args(argv)
    name = "-".join(["toy2d"] + [args.data] * (args.data != "checkerboard") + ["quick"] * args.quick)
    run = (QUICK if args.quick else DEFAULT) | {"data": args.data, "out": args.out or Path("runs", name)}
    with processes() as pool:
        (unify if args.unify else story)(run, range(args.seeds), pool)
    print(f"In {run['out']}: pictures, rows as JSON, csv files.")


if __name__ == "__main__":
    main()

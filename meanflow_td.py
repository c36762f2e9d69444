"""Stage 0 and stage 1: a flow-matching teacher, and its one-step student by MeanFlow trajectory distillation (TD).

A teacher knows the velocity v(x_t, t) of the path that carries noise to data, and has to follow it in many small steps.
A student learns the AVERAGE velocity over a whole stretch of that path, and takes the stretch in one step:

    u(x_t, r, t) = 1/(t - r) * integral_r^t v(x_s, s) ds           x_r = x_t - (t - r) u(x_t, r, t)

An integral makes a poor regression target, since it needs the teacher's whole path. Multiply by (t - r) and
differentiate along the path (dx_t/dt = v, r fixed): u + (t - r) du/dt = v. That is the MeanFlow identity (Geng et al.,
arXiv 2505.13447),

    u = v - (t - r) du/dt              du/dt = v . grad_x u + d_t u

and it only holds what one point of the path can tell. du/dt is ONE forward-mode product of the student with the
tangents (v, 0, 1) for (x, r, t). The right side, held fixed, is the target. Two things follow:

- At r = t the identity says u = v: flow matching is MeanFlow with r = t, so one loss trains the teacher (on eps - x_0)
  and the student (on the frozen teacher's velocity, in which guidance is then baked in).
- The teacher's v is a function of (x_t, t), while eps - x_0 is a noisy sample of it: distillation has a deterministic
  target.

What this stage leaves behind: at t = 1 the map from noise to data is steep wherever the path decides between two modes.
A network of finite size rounds these cliffs off, and samples fall between the modes; toy2d.py measures it. Stage 2,
dmd_refine.py, starts from there.

Departures from MeanFlow: which times are drawn (`draw_times`), and a teacher's velocity in the place of eps - x_0. The
functions here are called by toy2d.py: run `python toy2d.py`.
"""

import argparse
import math
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data import (BadInput, Glyphs, ImageFolder, RunFolder, positive_number, progress, rng, save_grid, to_uint8,
                  whole_number)
from models import DiT, Teacher, add_noise, expand_times, frozen_copy, student_from_teacher, update_ema

# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def labelled(y):
    """The keyword that carries labels y to a network; none where there are no labels, as in 2D."""
    return {} if y is None else {"y": y}


def draw_times(batch, generator, *, share_spans=0.75, share_to_data=0.3):
    """Times r <= t, each (batch,): the first share_spans of the rows span r < t, the others have r = t.

    The spans alone need du/dt; the others tie u to the teacher's velocity, which the identity starts from. Of the
    spans, share_to_data reach down to r = 0, as every one-step sample does.
    """
    # DIFFERS: MeanFlow draws both times from sigmoid(N(-0.4, 1)) (arXiv 2505.13447), we draw uniformly, because a
    # one-step sample starts at t = 1 and ends at r = 0, which logit-normal times all but never reach.
    # DIFFERS: 75 % of the rows are spans, where MeanFlow has 25 % on ImageNet: the boundary r = t is soon learned here.
    # OURS: share_to_data. Sliced W2 of a TD student (checkerboard, width 64, 3,000 steps, seed 0) was 0.05 with 0.3 of
    # the spans at r = 0, 0.09 with none of them and 0.19 with all, which is consistency distillation (tried by hand).
    # TRY: share_to_data=1.0, and look at the rows of "TD" in `python toy2d.py --out runs/consistency`
    r, t = torch.rand(batch, 2, generator=generator, device=generator.device).sort(dim=1).values.unbind(1)
    to_data = torch.rand(batch, generator=generator, device=generator.device) < share_to_data
    r = torch.where(to_data, 0.0, r)
    spans = torch.arange(batch, device=generator.device) < int(batch * share_spans)
    return torch.where(spans, r, t), t


def meanflow_target(u_theta, x_t, v, *, r, t, y=None):
    """u_target = sg[v - (t - r) du/dt], the right side of the MeanFlow identity (arXiv 2505.13447, eq. 10).

    u_theta(x_t, t=t, r=r) -> (B, ...) is the student, called with y=y too if y (B,) is given. x_t and v (B, ...): a
    point of the path and the velocity there; r and t (B,) with r <= t. Returns u_target and du/dt, both (B, ...)
    without gradient. Rows with r = t have target v and a du/dt of zero that nobody computed.
    Raises ValueError where r > t.
    """
    if (r > t).any():
        row = int((r > t).nonzero()[0])
        raise ValueError(f"u(x_t, r, t) needs r <= t, but row {row} has r = {r[row]:.4g} > t = {t[row]:.4g}")
    du_dt = torch.zeros_like(v)
    rows = (r < t).nonzero().squeeze(1)
    if len(rows):
        label = labelled(None if y is None else y[rows])
        x_rows, r_rows, t_rows = x_t[rows].detach(), r[rows], t[rows]

        def u_along_path(x, time):
            return u_theta(x, t=time, r=r_rows, **label)  # r is constant along the path: its tangent is 0

        with torch.no_grad():  # the target carries no gradient, so forward mode needs no graph
            # du/dt = v . grad_x u + d_t u : the tangents are (v, 1) for (x, t)
            tangents = (v[rows].detach(), torch.ones_like(t_rows))
            _, du_dt[rows] = torch.func.jvp(u_along_path, (x_rows, t_rows), tangents)
    # u_target = v - (t - r) du/dt
    return (v - expand_times(t - r, v) * du_dt).detach(), du_dt


def adaptive_mean(err, p, c):
    """The mean of err / sg[(err + c)^p] over a batch of squared errors err (B,): MeanFlow's adaptive weight."""
    return (err * (err.detach() + c) ** -p).mean()


def meanflow_loss(u_theta, x_t, v, *, r, t, y=None, p=1.0, c=1e-2, watch=None):
    """MeanFlow's loss: the student's squared distance from u_target, adaptively weighted (arXiv 2505.13447, Sec. 4).

    Arguments as in `meanflow_target`. Returns the scalar loss and err (B,), the raw squared error summed over all but
    the first dimension: watch err, for at p = 1 the weighted loss is about 1 whatever the student does.
    p, c: the weight 1/(err + c)^p, without gradient. PRIOR: p = 1, c = 1e-2 (MeanFlow's official code). With a noisy
    target of few dimensions, p = 1 fits the mode and not the mean: in 1D a true mean of 0.4 was fitted as 0.99. So the
    teacher and the fake branch use p = 0. (MeanFlow itself trains on noisy targets with p = 1, but in thousands of
    dimensions, where the error of all rows is about the same and the weight changes little.)
    watch: a dict that receives du_dt, its mean norm over the rows with r < t. It decides whether training is stable.
    """
    u_target, du_dt = meanflow_target(u_theta, x_t, v, r=r, t=t, y=y)
    err = (u_theta(x_t, t=t, r=r, **labelled(y)) - u_target).square().flatten(1).sum(dim=1)  # (B,)
    if watch is not None:
        watch["du_dt"] = du_dt[r < t].flatten(1).norm(dim=1).mean()
    return adaptive_mean(err, p, c), err


def flow_matching_loss(v_theta, x_t, v, *, t, y=None, p=0.0):
    """Conditional flow matching (Lipman et al., arXiv 2210.02747): MeanFlow's loss with r = t and, by default, p = 0.

    v_theta(x_t, t=t) -> (B, ...) is a network with one time. p: as in `meanflow_loss`. Returns the scalar loss and
    err (B,).
    """

    def u_theta(x_t, *, t, r, **label):  # r = t: the average velocity over nothing is the velocity
        return v_theta(x_t, t=t, **label)

    return meanflow_loss(u_theta, x_t, v, r=t, t=t, y=y, p=p)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------------------------------


def generate(net, eps, y=None, steps=1):
    """The student's samples x_0 (B, ...) from noise eps (B, ...), with their graph: what stage 2 trains through.

    `steps` equal jumps x_r = x_t - (t - r) u(x_t, r, t), one network call each; with steps=1, x_0 = eps - u(eps, 0, 1).
    Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"sampling takes at least 1 step, not {steps}")
    x = eps
    for k in range(steps):
        t = x.new_full((len(x),), 1 - k / steps)
        r = x.new_full((len(x),), 1 - (k + 1) / steps)
        x = x - net(x, t=t, r=r, **labelled(y)) / steps
    return x


@torch.no_grad()
def sample(net, eps, y=None, steps=1):
    """`generate` without a graph: the student's samples x_0 (B, ...) from noise eps (B, ...)."""
    return generate(net, eps, y, steps)


def sample_euler(velocity, eps, y=None, steps=1):
    """The teacher's samples x_0 (B, ...) by Euler's method, one call a step: a student's jumps, with v in place of u.

    velocity: as in `sample_ode`."""
    return sample(lambda x, *, t, r, **label: velocity(x, t=t, **label), eps, y, steps)


@torch.no_grad()
def sample_ode(velocity, eps, y=None, steps=100):
    """The teacher's samples x_0 (B, ...) from noise eps: Heun's method from t = 1 to t = 0, two calls a step.

    velocity(x_t, t=t) -> (B, ...), called with y=y too if y (B,) is given. Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"sampling takes at least 1 step, not {steps}")
    x = eps
    for k in range(steps):
        t = x.new_full((len(x),), 1 - k / steps)
        s = x.new_full((len(x),), 1 - (k + 1) / steps)
        v_t = velocity(x, t=t, **labelled(y))
        v_s = velocity(x - v_t / steps, t=s, **labelled(y))
        x = x - (v_t + v_s) / (2 * steps)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(step, steps, peak, warmup=100):
    """Half a cosine from `peak` to almost 0 at the last of `steps`, times a linear rise over the first `warmup`."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def check_finite(where, **terms):
    """Raise FloatingPointError, naming the place and the term, if one of these scalar tensors is NaN or infinite."""
    for name, value in terms.items():
        if not torch.isfinite(value):
            raise FloatingPointError(f"{where}: {name} is {value.item()}. A lower learning rate may help.")


def teacher_objective(net, x_0, y, eps, generator, *, null_class=None):
    """Stage 0 for a batch of data and noise (B, ...), labels y (B,) or None: flow matching on eps - x_0.

    null_class: the label that takes the place of one in ten, so that the network also knows the velocity of all classes
    together, which guidance needs (Ho & Salimans, arXiv 2207.12598). Returns the loss and terms to log.
    """
    # OURS: uniform times. The edges of a density are drawn at small t, which logit-normal times seldom see.
    t = torch.rand(len(x_0), generator=generator, device=x_0.device)
    if null_class is not None:
        dropped = torch.rand(len(x_0), generator=generator, device=x_0.device) < 0.1  # PRIOR: DiT's share
        y = torch.where(dropped, null_class, y)
    v = eps - x_0  # noisy: its mean given x_t is the velocity field, and so p = 0
    loss, err = flow_matching_loss(net, add_noise(x_0, eps, t), v, t=t, y=y)
    return loss, {"raw_error": err.mean()}


def student_objective(net, x_0, y, eps, generator, *, teacher=None):
    """Stage 1 for a batch of data and noise (B, ...), labels y (B,) or None: MeanFlow on the teacher's velocity.

    teacher(x_t, t=t) -> v (B, ...), frozen, called with y=y too if there are labels; guidance is its own affair. None:
    MeanFlow from scratch, on eps - x_0 (PRIOR: arXiv 2505.13447). Returns the loss and terms to log.
    """
    terms = {}
    r, t = draw_times(len(x_0), generator)
    x_t = add_noise(x_0, eps, t)
    with torch.no_grad():
        # deterministic with a teacher, one noisy draw of it without
        v = eps - x_0 if teacher is None else teacher(x_t, t=t, **labelled(y))
    loss, err = meanflow_loss(net, x_t, v, r=r, t=t, y=y, watch=terms)
    return loss, {**terms, "raw_error": err.mean(), "v_error": err[r == t].mean()}


def train(net, draw, objective, *, steps, batch, lr, seed, stream, name, clip=math.inf, keep=None, look=None,
          log_every=100):  # fmt: skip
    """Train `net` in place and return its average network (EMA) and a list of rows for metrics.csv.

    draw(batch, generator) -> x_0 (batch, ...), labels y (batch,) or None. objective(net, x_0, y, eps, generator) ->
    loss, terms: one of those above. steps, batch: integers >= 1; lr: the peak of Adam's learning rate. seed, stream:
    what the randomness of each step is made from; networks that are to be compared share them. name: what the bar and
    the rows call this network, with a row every `log_every` steps. clip: the gradient's greatest norm. keep: a data.Keep, and a killed training goes on.
    look(step, ema): called now and then, to draw samples. Raises FloatingPointError when the loss is not finite.
    """
    device = next(net.parameters()).device
    # OURS: 0.99, a memory of 100 steps; MeanFlow has 0.95. TD of the toy did not care (0.95, 0.99, 0.999, one seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    ema, first, rows = frozen_copy(net), 0, []
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    if keep is not None:
        first, rows = keep.restore(parts)
    bar = progress(range(first, steps), name, initial=first, total=steps)
    for step in bar:
        start = time.perf_counter()
        # --- training step ---
        generator = rng(seed, stream, step, device)
        x_0, y = draw(batch, generator)  # (B, ...), (B,)
        eps = torch.randn(x_0.shape, generator=generator, device=device)
        loss, terms = objective(net, x_0, y, eps, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        optimizer.zero_grad()
        loss.backward()
        gradient = nn.utils.clip_grad_norm_(net.parameters(), clip)  # the norm that it had
        optimizer.step()
        update_ema(ema, net, step)
        # --- bookkeeping ---
        check_finite(f"{name}, seed {seed}, step {step}", loss=loss, gradient=gradient)
        last = step == steps - 1
        if step % log_every == 0 or last:
            terms = {"loss": loss, **terms, "gradient": gradient}
            values = {name: value.item() for name, value in terms.items()}
            seconds = round(time.perf_counter() - start, 4)
            rows.append({"network": name, "seed": seed, "step": step, **values, "seconds_per_step": seconds})
            bar.set_postfix(raw_error=f"{values['raw_error']:.3g}", refresh=False)
        if look is not None and (step % LOOK_EVERY == 0 or last):
            look(step, ema)
        if keep is not None:
            keep.save(parts, step + 1, rows)
    return ema, rows


# ---------------------------------------------------------------------------------------------------------------------
# Runs on images
# ---------------------------------------------------------------------------------------------------------------------

# What a run is made of. The sections go to the run folder's config.json; dmd_refine.py adds its own.
# OURS: all of it, chosen by short runs of the teacher and of stage 1 on 2 CPU cores.
PLANS = {
    "default": {
        "network": dict(patch_size=4, hidden_size=96, depth=4, num_heads=4),
        "teacher": dict(steps=32_000, batch=64, lr=3e-3, clip=300.0),
        "td": dict(steps=1500, batch=64, lr=1e-3, clip=50.0, w=1.0),
    },
    "quick": {
        "network": dict(patch_size=4, hidden_size=32, depth=2, num_heads=2),
        "teacher": dict(steps=60, batch=32, lr=3e-3, clip=300.0),
        "td": dict(steps=30, batch=32, lr=1e-3, clip=50.0, w=1.0),
    },
}
LOOK_EVERY = 500  # steps between two pictures of samples


def new_network(seed, stream, build):
    """build() on the CPU, with random weights that depend on (seed, stream) alone; the global state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng(seed, stream).initial_seed())
        return build()


class ImageRun:
    """What the three scripts share of a run on images: its folder, settings (`plan`) and data, and its networks.

    args: the command line, of `add_run_arguments`. given: {(section, key): value or None}, settings from flags. A new run
    folder takes PLANS with these in it; one that is there already has its settings, and these must agree with them.
    more: other sections. needs: stages that an earlier script has finished; without them nothing is written.
    Raises BadInput: no data, a folder with other settings, a stage that is not there yet.
    """

    def __init__(self, args, given, more=None, needs=()):
        name = "-".join([args.data] + [str(args.size)] * (args.size != 16) + ["quick"] * args.quick)
        path = Path(args.out or f"runs/{name}")
        for stage in needs:
            if not (path / f"{stage}.pt").exists():
                raise BadInput(f"{path} holds no finished {stage}: run meanflow_td.py with the same --data first")
        self.device = torch.device(args.device)
        if args.data == "glyphs":
            self.channels, classes = 1, [str(digit) for digit in range(10)]
        else:
            if args.data_dir is None:
                raise BadInput("--data folder needs --data-dir, a folder with one folder of images for each class")
            self.source = ImageFolder(args.data_dir, args.size)
            self.channels, classes = self.source.channels, self.source.classes
        plan = PLANS["quick" if args.quick else "default"] | (more or {})
        plan |= {"data": dict(data=args.data, size=args.size, channels=self.channels, classes=classes, seed=0)}
        there = RunFolder(path, {}).config
        plan = {name: dict(section) for name, section in (plan | there).items()}
        for (section, key), value in given.items():
            if value is not None:
                plan[section][key] = value
        plan["data"] |= dict(data=args.data, size=args.size, channels=self.channels, classes=classes)
        self.folder, self.plan, self.classes = RunFolder(path, plan), plan, len(classes)
        self.seed = plan["data"]["seed"]
        if args.data == "glyphs":
            self.source = Glyphs(args.size, seed=self.seed)
        # the same labels and noise for every grid of samples: a row for each class, up to ten
        self.grid_y = torch.arange(min(10, self.classes)).repeat_interleave(10).to(self.device)
        self.grid_eps = self.noise(len(self.grid_y), "grid")

    def noise(self, count, stream):
        """Noise (count, C, size, size) that depends on the stream alone: drawn on the CPU, so it is so on any device."""
        size = self.plan["data"]["size"]
        return torch.randn(count, self.channels, size, size, generator=rng(0, stream)).to(self.device)

    def network(self, stream, two_times=False, seed=None):
        """A DiT in its wrapper, with random weights that depend on the seed (else the run's) and the stream alone."""
        build = partial(DiT, self.plan["data"]["size"], in_channels=self.channels, num_classes=self.classes,
                        two_times=two_times, **self.plan["network"])  # fmt: skip
        return Teacher(new_network(self.seed if seed is None else seed, stream, build)).to(self.device)

    def student(self, teacher):
        """A student that answers as its teacher without guidance does, whatever r is."""
        return type(teacher)(new_network(self.seed, "student", lambda: student_from_teacher(teacher.net)))

    def load(self, name, two_times=False):
        """The frozen network of a finished stage. BadInput if it is not finished."""
        state = self.folder.finished(name)
        if state is None:
            raise BadInput(f"{self.folder.path} holds no finished {name}: run meanflow_td.py with the same --data first")
        net = self.network("", two_times)
        net.load_state_dict(state["net"])
        return net.requires_grad_(False)

    def load_teacher(self):
        """The frozen teacher, with the guidance of the run's plan."""
        teacher = self.load("teacher")
        teacher.w = self.plan["td"]["w"]
        return teacher

    def train(self, name, net, objective, *, section, sampler, seed=None):
        """Train `net` as the plan's section says, or find it finished: stage `name` of the run.

        sampler(net, eps, y) -> x_0: for the grids in samples/. seed: if not the run's."""

        def look(step, ema):
            self.save_samples(f"{name}-{step:06d}", sampler(ema, self.grid_eps, self.grid_y))

        def compute(keep):
            plan = {key: self.plan[section][key] for key in ("steps", "batch", "lr", "clip")}
            ema, rows = train(net, self.source.draw, objective, **plan, stream=section, name=name,
                              seed=self.seed if seed is None else seed,
                              keep=keep, look=look)  # fmt: skip
            self.folder.write_metrics(rows)
            return {"net": ema.state_dict(), "rows": rows}

        self.folder.stage(name, compute)

    def save_samples(self, name, x):
        """A grid of samples x (N, C, H, W), ten in a row, to samples/<name>.png."""
        save_grid(self.folder.path / "samples" / f"{name}.png", to_uint8(x), columns=10)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def add_run_arguments(parser):
    """The flags that say which run is meant: the same for all three scripts."""
    parser.add_argument("--data", choices=("glyphs", "folder"), default="glyphs", help="(default: %(default)s)")
    parser.add_argument("--data-dir", help="for --data folder: a folder with one folder of images for each class")
    parser.add_argument("--size", type=int, choices=(16, 32), default=16, help="pixels (default: %(default)s)")
    parser.add_argument("--out", help="run folder (default: runs/glyphs, and for other data or sizes runs/...)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="everything, small: to see that it works, not how well")


def check_device(parser, device):
    """Exit with 2 and a sentence if torch can't use this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device} can't be used here ({str(error).splitlines()[0]}): try --device cpu")


@contextmanager
def sentences(parser):
    """Inside, what a user can mend ends the script with one sentence in the place of a traceback."""
    try:
        yield
    except BadInput as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:
        parser.exit(2, f"{parser.prog}: {error}; what was trained is kept, and the same command goes on\n")
    except FloatingPointError as error:
        parser.exit(3, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped; the same command goes on from where it last saved\n")


def teacher_sample(net, eps, y, steps=25):
    """The teacher's samples for the grids: Heun with `steps` steps, twice as many calls."""
    return sample_ode(net, eps, y, steps=steps)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), help="of data and networks (default: 0)")
    parser.add_argument("--teacher-steps", type=whole_number(1), help="updates of the teacher")
    parser.add_argument("--td-steps", type=whole_number(1), help="updates of the student")
    parser.add_argument("--w", type=positive_number, help="the teacher's guidance in both stages; 1 is none (default: 1)")
    args = parser.parse_args(arguments)
    check_device(parser, args.device)
    with sentences(parser):
        run = ImageRun(args, {("data", "seed"): args.seed, ("teacher", "steps"): args.teacher_steps,
                              ("td", "steps"): args.td_steps, ("td", "w"): args.w})  # fmt: skip
        run.train("teacher", run.network("teacher"), partial(teacher_objective, null_class=run.classes),
                  section="teacher", sampler=teacher_sample)  # fmt: skip
        teacher = run.load_teacher()
        run.train("td", run.student(teacher), partial(student_objective, teacher=teacher), section="td", sampler=sample)
        print(f"In {run.folder.path}: teacher.pt, td.pt, metrics.csv, and grids in samples/. "
              f"Next: python dmd_refine.py --data {args.data}")  # fmt: skip


if __name__ == "__main__":
    main()

"""Stage 0 and stage 1: a flow-matching teacher, and its one-step student by MeanFlow trajectory distillation (TD).

A teacher knows the velocity v(x_t, t) of the path between data (t = 0) and noise (t = 1), and has to follow it
backwards in many small steps to make a sample. A student learns the AVERAGE velocity over a whole stretch of that path,
and takes the stretch in one step:

    u(x_t, r, t) = 1/(t - r) * integral_r^t v(x_s, s) ds           x_r = x_t - (t - r) u(x_t, r, t)

Here x_s is the teacher's curved path through x_t, not the straight line between a data point and its noise. The
integral makes a poor regression target, since it needs that whole path. Multiply by (t - r) and differentiate along the
path (dx_t/dt = v, r fixed): u + (t - r) du/dt = v. That is the MeanFlow identity (Geng et al., arXiv 2505.13447),

    u = v - (t - r) du/dt              du/dt = v . grad_x u + d_t u

and it needs only what is known at one point of the path. du/dt is ONE forward-mode pass of the student (a
Jacobian-vector product), with the tangents (v, 0, 1) for (x, r, t). The right side, held fixed, is the target. Two
things follow:

- At r = t the identity says u = v: MeanFlow with r = t is flow matching.
- MeanFlow itself, without a teacher, takes eps - x_0 for v, a noisy sample of it. The teacher's v has no noise. If v is
  guided, so is the student: guidance is in its one call.

What this stage leaves behind: the map from noise to data is steep wherever the path decides between two modes. A
finite network smooths these places, and samples fall between the modes (toy2d.py). Stage 2, dmd_refine.py, mends it.

    python meanflow_td.py --data glyphs                                   # digits: trains the teacher, then its student
    python meanflow_td.py --data imagenet --data-dir DIR --device cuda    # latents, then a student of SiT-XL/2

A run leaves runs/<data>/: teacher.pt, td.pt, a csv for each, grids in samples/. If killed, the same command resumes it.
"""

import argparse
import copy
import hashlib
import math
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad

from data import RANK, RANKS, BadInput, ImageFolder, Latents, draw_glyphs, go_on, join, load, rng, save_grid
from models import (DiT, DiTTeacher, SiTTeacher, Velocity, add_noise, autocast_off, expand_times, load_teacher,
                    load_vae, student_from_teacher, weights_path, with_labels)  # fmt: skip

# --- The loss --------------------------------------------------------------------------------------------------------


def draw_times(batch, generator, *, share_spans=0.75, share_to_data=0.3):
    """Times r <= t, each (batch,): the first share_spans of the rows span r < t, the others have r = t.
    Only the spans need du/dt; the others have the target v itself. Of the spans, share_to_data reach down to r = 0, as
    a one-step sample does. TRY: share_to_data=1.0, see the README."""
    # DIFFERS: MeanFlow (arXiv 2505.13447) draws both times from sigmoid(N(-0.4, 1)), which hardly ever comes near 0 and
    # 1, the two that a one-step sample uses; 25 % of its rows are spans.
    r, t = torch.rand(batch, 2, generator=generator, device=generator.device).sort(dim=1).values.unbind(1)
    to_data = torch.rand(batch, generator=generator, device=generator.device) < share_to_data
    r = torch.where(to_data, 0.0, r)
    spans = torch.arange(batch, device=generator.device) < int(batch * share_spans)
    return torch.where(spans, r, t), t


def meanflow_target(u_theta, x_t, v, *, r, t, y=None):
    """u_target = sg[v - (t - r) du/dt], sg: no gradient; the MeanFlow identity's right side (arXiv 2505.13447, eq. 10).
    u_theta(x_t, t=t, r=r) -> (B, ...) is the student, called with y=y too if y (B,) is given. x_t and v (B, ...): a
    point of the path and the velocity there; r and t (B,) with r <= t. Returns u_target and du/dt, both (B, ...)
    without gradient; du/dt is computed where r < t, and zero elsewhere. Raises ValueError where r > t."""
    if (r > t).any():
        row = int((r > t).nonzero()[0])
        raise ValueError(f"u(x_t, r, t) needs r <= t, but row {row} has r = {r[row]:.4g} > t = {t[row]:.4g}")
    du_dt, rows = torch.zeros_like(v), (r < t).nonzero().squeeze(1)
    if len(rows):
        u_labelled = with_labels(u_theta, None if y is None else y[rows])
        with torch.no_grad(), forward_ad.dual_level():  # no_grad stops backward mode only
            # du/dt = v . grad_x u + 0 d_r u + 1 d_t u : the tangents of (x, r, t) are (v, 0, 1)
            x_dual = forward_ad.make_dual(x_t[rows].detach(), v[rows].detach())
            r_dual = forward_ad.make_dual(r[rows], torch.zeros_like(r[rows]))  # a plain r: the same, slower
            t_dual = forward_ad.make_dual(t[rows], torch.ones_like(t[rows]))
            with autocast_off(v):  # bf16 would make du/dt wrong by a percent
                u = u_labelled(x_dual, t=t_dual, r=r_dual)
            du_dt[rows] = forward_ad.unpack_dual(u).tangent
    # u_target = v - (t - r) du/dt
    return (v - expand_times(t - r, v) * du_dt).detach(), du_dt


def meanflow_loss(u_theta, x_t, v, *, r, t, y=None, p=1.0, c=1e-2):
    """MeanFlow's loss: the student's squared distance from u_target (arXiv 2505.13447, Sec. 4), adaptively weighted so
    that outliers do not dominate the batch. Arguments as in `meanflow_target`. Returns the scalar loss; err (B,), the
    raw squared error, a sum for each row. Watch err: at p = 1 the loss is about 1 as long as err is far above c.
    p, c: the weight 1/(err + c)^p, without gradient. PRIOR: p = 1, c = 1e-2 (MeanFlow's official code)."""
    u_target, _ = meanflow_target(u_theta, x_t, v, r=r, t=t, y=y)
    err = (with_labels(u_theta, y)(x_t, t=t, r=r) - u_target).square().flatten(1).sum(dim=1)  # (B,)
    return (err * (err.detach() + c) ** -p).mean(), err


def flow_matching_loss(v_theta, x_t, v, *, t, y=None):
    """Conditional flow matching (Lipman et al., arXiv 2210.02747): the squared distance of v_theta(x_t, t=t) from v, a
    noisy target whose mean given x_t is learned. MeanFlow's weight, which downweights large errors, would bias it
    (a teacher's v has no noise). Arguments, and what is returned, as in `meanflow_loss`."""
    err = (with_labels(v_theta, y)(x_t, t=t) - v).square().flatten(1).sum(dim=1)  # (B,)
    return err.mean(), err


# --- Samplers --------------------------------------------------------------------------------------------------------


def equal_steps(eps, steps):
    """Steps from t = 1 to 0 as [(t, r), ...], (B,) each: for 2 steps (1, 0.5) and (0.5, 0). ValueError: steps < 1."""
    if steps < 1:
        raise ValueError(f"sampling takes at least 1 step, not {steps}")
    times = [eps.new_full((len(eps),), 1 - i / steps) for i in range(steps + 1)]
    return list(zip(times, times[1:]))


def generate(net, eps, y=None, steps=1):
    """The student's samples x_0 (B, ...) from noise eps (B, ...), with their graph: what stage 2 trains through. They
    take `steps` equal jumps x_r = x_t - (t - r) u(x_t, r, t), one call each; with steps=1, x_0 = eps - u(eps, 0, 1)."""
    u, x = with_labels(net, y), eps
    for t, r in equal_steps(eps, steps):
        x = x - u(x, t=t, r=r) / steps
    return x


sample = torch.no_grad()(generate)  # the same without a graph


@torch.no_grad()
def sample_ode(velocity, eps, y=None, steps=100):
    """The teacher's samples x_0 (B, ...) from noise eps: Heun's method from t = 1 to t = 0, two calls a step."""
    v, x = with_labels(velocity, y), eps
    for t, r in equal_steps(eps, steps):
        v_t = v(x, t=t)
        v_r = v(x - v_t / steps, t=r)
        x = x - (v_t + v_r) / (2 * steps)  # a jump by the mean of the velocities at its two ends
    return x


# --- Training: these two draw data, noise and times from a generator, and call a loss above -> scalar, numbers to log -


def teacher_loss(net, generator, *, draw, null_class=None):
    """Stage 0: flow matching on eps - x_0. draw(generator) -> data x_0 (B, ...), labels y (B,) or None.
    null_class, for images only: one label in ten becomes this one, so that the network also learns the
    unconditional velocity, which guidance needs (Ho & Salimans, arXiv 2207.12598)."""
    x_0, y = draw(generator)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    # OURS: uniform times. The edges of a density are decided at small t, which logit-normal times seldom see.
    t = torch.rand(len(x_0), generator=generator, device=x_0.device)
    if null_class is not None:
        dropped = torch.rand(len(x_0), generator=generator, device=x_0.device) < 0.1  # PRIOR: DiT's share
        y = torch.where(dropped, null_class, y)
    loss, err = flow_matching_loss(net, add_noise(x_0, eps, t), eps - x_0, t=t, y=y)
    return loss, {"raw_error": err.mean()}


def student_loss(net, generator, *, draw, teacher, share_spans=0.75, t_limits=(0.0, 1.0)):
    """Stage 1: MeanFlow on the frozen teacher's velocity, guided if the teacher is; with teacher None, on the data's
    own, noisy one. draw: as in `teacher_loss`. share_spans: of `draw_times`. t_limits: for DiTTeacher's times."""
    x_0, y = draw(generator)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    r, t = (time.clamp(*t_limits) for time in draw_times(len(x_0), generator, share_spans=share_spans))
    x_t = add_noise(x_0, eps, t)  # one of the teacher's paths passes through each such point
    with torch.no_grad():
        v = eps - x_0 if teacher is None else with_labels(teacher, y)(x_t, t=t)
    loss, err = meanflow_loss(net, x_t, v, r=r, t=t, y=y)
    at_v = r == t  # rows where u is to be the teacher's velocity
    return loss, {"raw_error": err.mean(), "v_error": (err * at_v).sum() / at_v.sum().clamp_min(1)}


def learning_rate(step, steps, peak, warmup=100):
    """Cosine decay from `peak` to almost 0 over `steps`, times a linear warmup over the first `warmup`."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def update(net, optimizer, loss_of, *, lr, words, parts=1, clip=20.0, amp=False):
    """Move one network by the gradient of loss_of(generator) -> (loss, log). -> log, of the last part
    In short: zero_grad, loss, backward, clip, step. words, as (0, "td", step), seed the generator. To skip at first:
    parts save memory; of torchrun's RANKS processes, the RANK-th takes every RANKS-th part. clip: the maximum gradient
    norm. amp: matrix products in bf16; times, du/dt and the loss stay in fp32."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    weights = list(net.parameters())
    device = weights[0].device
    for k in range(RANK, parts, RANKS):
        # no cache: with bf16, autocast would reuse weights that it cast without a graph in a pass that needs one
        with torch.autocast(device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
            loss, log = loss_of(rng(*words, k, device=device))
        (loss / parts).backward()
    for p in weights:
        if RANKS > 1 and p.grad is not None:
            dist.all_reduce(p.grad)  # by hand: DDP's wrapper does not see a forward-mode pass, and would sum nothing
    gradient = nn.utils.clip_grad_norm_(weights, clip)  # the norm before clipping
    optimizer.step()
    return {"loss": loss, **log, "gradient": gradient}


@torch.no_grad()
def update_ema(ema, net, step, decay=0.999):
    """ema <- d ema + (1 - d) net, in place, with d = min(decay, (1 + step) / (10 + step)): d rises with the step, so
    that the random start is soon forgotten (PRIOR: TensorFlow's ExponentialMovingAverage)."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), weight)


# OURS: no momentum in stage 1, where it makes TD worse in 2D (README, "Three things to try"). The target moves with the
# student, so a step follows no gradient of a fixed loss, and momentum repeats directions that are out of date.
NO_MOMENTUM = 0.0, 0.99  # Adam's betas; 0.99 is a memory of 100 updates


def train(path, net, loss_of, *, steps, lr, seed=0, betas=(0.9, 0.99), ema_decay=0.999, config=None, look=None,
          look_every=500, **how):  # fmt: skip
    """Train `net` by loss_of(net, generator) -> (loss, log); return its average network (EMA), frozen.
    The loop is data.go_on: `for k in range(steps): one_step(k)`, with saving and resuming. lr: the peak of Adam's rate.
    betas: Adam's. how: clip, parts and amp of `update`. The rest is bookkeeping: path, the stage's file; config, what
    it says of its making; look(ema, n), which draws a picture after n updates, every look_every."""
    optimizer = torch.optim.Adam(net.parameters(), betas=betas, fused=True)
    ema = copy.deepcopy(net).requires_grad_(False)

    def one_step(k):
        log = update(net, optimizer, partial(loss_of, net), lr=learning_rate(k, steps, lr),
                     words=(seed, path.stem, k), **how)  # fmt: skip
        update_ema(ema, net, k, ema_decay)
        return log

    config = {**(config or {}), "lr": lr, "betas": betas, "ema_decay": ema_decay, "seed": seed,
              "clip": how.get("clip"), "parts": how.get("parts", 1)}  # fmt: skip
    go_on(path, {"net": net, "ema": ema, "optimizer": optimizer}, one_step, steps=steps, config=config,
          look=look and partial(look, ema), look_every=look_every)  # fmt: skip
    return ema


# --- The run: the method ends here, and what follows opens data and files ---------------------------------------------

# OURS on glyphs: all of it, and w = 1.5: of 1, 1.25, 1.5 and 2, it brings the teacher's samples nearest to the data. In
# stage 1, tried by hand, 4,000 updates at a rate of 2e-3 lost the teacher, and so did p = 0 and p = 0.5 in the loss.
GLYPHS = dict(batch=64, share_spans=0.75, network=dict(patch_size=4, hidden_size=64, depth=4, num_heads=4),
              teacher_steps=16_000, stage_0=dict(lr=3e-3, clip=300.0),
              steps=3000, stage_1=dict(lr=1e-3, betas=NO_MOMENTUM, clip=50.0))  # fmt: skip
# PRIOR: batch, lr, betas, ema_decay and a quarter of spans are MeanFlow's for ImageNet (arXiv 2505.13447, official
# code); w = 1.5 on 3 of 4 channels is behind the published FIDs of both teachers. OURS: steps (never run), clip.
IMAGENET = dict(batch=256, share_spans=0.25,
                steps=100_000, stage_1=dict(lr=1e-4, betas=(0.9, 0.95), clip=1.0, ema_decay=0.9999))  # fmt: skip
PRESETS = {"glyphs": GLYPHS, "folder": GLYPHS, "imagenet": IMAGENET}
TINY = dict(batch=32, teacher_steps=60, steps=30, network=dict(patch_size=4, hidden_size=32, depth=2, num_heads=2))
QUICK = {"glyphs": TINY, "folder": TINY, "imagenet": dict(batch=4, share_spans=0.5, steps=3)}

# draw(batch, generator) -> x_0 (batch, *shape), y (batch,) < classes. decode(x_0) -> images in about [-1, 1]
Source = namedtuple("Source", "draw shape classes decode")


def open_data(data, data_dir, *, size, device, teacher=None, vae=None, cache=None):
    """The Source of --data, and its published teacher: None unless imagenet, whose latents are encoded on first use.
    BadInput lists all that a run on ImageNet lacks here; weights are fetched if they alone are missing."""
    if data == "glyphs":
        return Source(partial(draw_glyphs, size=size), (1, size, size), 10, lambda x: x), None
    if data == "folder":
        folder = ImageFolder(data_dir, size, upright=True)
        return Source(folder.draw, (3, size, size), len(folder.classes), lambda x: x), None
    lacking = []
    if not Path(cache, "info.json").exists() and not (data_dir and Path(data_dir).is_dir()):
        lacking.append(f"--data-dir {data_dir}: ImageNet's train/ (138 GB, from https://image-net.org/download.php)")
    for name in (teacher, vae):
        try:
            weights_path(name, fetch=not lacking)  # a long download would only delay the bad news
        except BadInput as error:
            lacking.append(str(error))
    if lacking:
        raise BadInput("\n- ".join(["this machine lacks", *lacking]))
    sha256 = hashlib.sha256(weights_path(vae).read_bytes()).hexdigest()
    teacher, vae = load_teacher(teacher).to(device), load_vae(vae).to(device)
    channels, side, classes = (teacher.net.config[key] for key in ("in_channels", "input_size", "num_classes"))
    folder = ImageFolder(data_dir, side * vae.factor) if data_dir else None
    latents, shape = Latents(cache, vae, folder, {"vae": sha256}), (channels, side, side)
    if (latents.shape, len(latents.classes)) != (shape, classes):
        raise BadInput(f"{cache} has latents {latents.shape} of {len(latents.classes)} classes, and the teacher knows "
                       f"{shape} of {classes}: give the --data-dir or the --teacher that fits")  # fmt: skip
    return Source(latents.draw, shape, classes, lambda x: vae.decode(x / vae.scale)), teacher


def new_network(seed, what, build):
    """build(), a network whose random weights depend on (seed, what) alone: data.rng(*words) seeds by their hash."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng(seed, what).initial_seed())
        return build()


def load_net(path, hint, device="cpu", two_times=None):
    """The average network of a finished stage, frozen, and the stage's config. hint: what to do if it is not there.
    two_times: True asks for a student, False for a teacher. BadInput: the file is unfinished, or something else."""
    state = load(path, hint)
    config = state.get("config", {})
    sizes = dict(config.get("network", {}))
    if not sizes or two_times not in (None, sizes["two_times"]):
        raise BadInput(f"{path} is no stage of meanflow_td.py or dmd_refine.py that fits here: name another file")
    if state["step"] < config["steps"]:
        raise BadInput(f"{path} holds {state['step']} of {config['steps']} updates: run the same command to its end")
    wrappers = {kind.__name__: kind for kind in (Velocity, SiTTeacher, DiTTeacher)}
    net = wrappers[sizes.pop("wrapper")](DiT(**sizes))
    net.load_state_dict(state["ema"])
    return net.to(device).eval().requires_grad_(False), config


def grid_noise(source, device):
    """Noise and labels of all grids: ten each of ten classes. Drawn on the CPU, the same on any device."""
    rows = min(10, source.classes)
    y = (torch.arange(rows) * source.classes // rows).repeat_interleave(10)
    return torch.randn(len(y), *source.shape, generator=rng(0, "grid")).to(device), y.to(device)


def add_flags(parser):
    """The flags of both stages."""
    add = parser.add_argument
    add("--data", choices=PRESETS, default="glyphs", help="what to train on (default: %(default)s)")
    add("--data-dir", help="of folder and imagenet: a folder with one folder of images for each class")
    add("--size", type=int, choices=(16, 32), default=16, help="of glyphs and folder, px (default: %(default)s)")
    add("--out", type=Path, help="run folder (default: runs/<data>)")
    add("--seed", type=int, default=0, help="of data and networks (default: %(default)s)")
    add("--batch", type=int, help="images in an update (default: of the preset)")
    add("--w", type=float, default=1.5, help="the teacher's guidance, above 0; 1 is none (default: %(default)s)")
    add("--teacher", default="SiT-XL/2", help="of imagenet: SiT-XL/2, DiT-XL/2 or a file (default: %(default)s)")
    add("--vae", default="vae-ema", help="of imagenet: vae-ema, vae-mse or a file (default: %(default)s)")
    add("--cache", default="runs/latents", help="of imagenet: the folder of its latents (default: %(default)s)")
    add("--cfg-channels", type=int, default=3, help="of imagenet: guide so many of 4 channels (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda computes in bf16 where that is safe")
    add("--parts", type=int, help="take a batch in so many parts: less memory (default: one for each process)")
    add("--checkpointing", action="store_true", help="keep less of a pass: less memory, a third more time")
    add("--compile", action="store_true", help="networks through torch.compile; du/dt is not")
    add("--quick", action="store_true", help="everything, small: to see that it works, not how well")
    add("--steps", type=int, help="updates of the student")


def settings(presets, quick_presets, *, data, quick, parts, **flags):
    """The preset of --data, with what --quick and the flags of the same names change. "part": images in a part."""
    preset = presets[data] | (quick_presets[data] if quick else {})
    preset |= {name: flags[name] for name in preset if flags.get(name) is not None} | {"parts": parts or RANKS}
    preset["part"], rest = divmod(preset["batch"], preset["parts"])
    if flags["w"] <= 0:
        raise BadInput(f"--w {flags['w']:g}: guidance is above 0, and 1 is none")
    if rest or preset["parts"] % RANKS:
        raise BadInput(f"a batch of {preset['batch']} in {preset['parts']} parts for {RANKS} processes: all must "
                       "have the same share; change --batch or --parts")  # fmt: skip
    return preset


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--teacher-steps", type=int, help="updates of a teacher that is trained here")
    parser.add_argument("--on-data", action="store_true", help="for comparison: stage 1 on eps - x_0, unguided")
    args = parser.parse_args(argv)
    device = join(args.device)
    preset = settings(PRESETS, QUICK, **vars(args))
    if int(preset["part"] * preset["share_spans"]) < 1:
        raise BadInput(f"a part of {preset['part']} rows has none with r < t: give a larger --batch, or fewer --parts")
    out = args.out or Path("runs", args.data + "-quick" * args.quick)
    source, teacher = open_data(args.data, args.data_dir, size=args.size, device=device, teacher=args.teacher,
                                vae=args.vae, cache=args.cache)  # fmt: skip
    DiT.checkpointing, DiT.compiling = args.checkpointing, args.compile
    eps, y = grid_noise(source, device)
    draw = partial(source.draw, preset["part"])
    about = {"data": args.data, "data_dir": args.data_dir, "shape": source.shape, "batch": preset["batch"]}
    common = dict(seed=args.seed, parts=preset["parts"], amp=device.type == "cuda")

    def look(name, sampler, ema, n):
        save_grid(out / "samples" / f"{name}-{n:06d}.png", source.decode(sampler(ema, eps, y)))

    if teacher is None:  # stage 0
        sizes = dict(preset["network"], input_size=args.size, in_channels=source.shape[0], num_classes=source.classes)
        net = new_network(args.seed, "teacher", lambda: Velocity(DiT(**sizes))).to(device)
        loss = partial(teacher_loss, draw=draw, null_class=source.classes)
        teacher = train(out / "teacher.pt", net, loss, steps=preset["teacher_steps"], **preset["stage_0"], **common,
                        config=about | {"network": net.describe()},
                        look=partial(look, "teacher", partial(sample_ode, steps=25)))  # fmt: skip
    name, w = ("meanflow", 1.0) if args.on_data else ("td", args.w)
    teacher.w, teacher.cfg_channels = w, args.cfg_channels  # guidance is baked into the student
    student = new_network(args.seed, "student", lambda: student_from_teacher(teacher)).to(device)
    loss = partial(student_loss, draw=draw, teacher=None if args.on_data else teacher,
                   share_spans=preset["share_spans"], t_limits=teacher.times)  # fmt: skip
    about |= {"network": student.describe(), "w": w, "cfg_channels": args.cfg_channels}
    train(out / f"{name}.pt", student, loss, steps=preset["steps"], **preset["stage_1"], **common, config=about,
          look=partial(look, name, sample))  # fmt: skip
    if RANK == 0:
        print(f"In {out}: {name}.pt, its csv, grids in samples/. After td: dmd_refine.py, the same --data, --out, --w")


if __name__ == "__main__":
    main()

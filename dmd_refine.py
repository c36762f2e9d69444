"""Stage 2: refine the one-step student by distribution matching (DMD) and an adversarial loss (AWD).

Stage 1 maps each noise point to the teacher's sample from it, which a small network can't do for all points. Now it
no longer matters WHICH sample a noise point becomes, only that all samples together have the teacher's distribution.
For that, minimise KL(student || teacher) = E[log p_student - log p_teacher] on noised samples. As a sample moves, the
KL changes by the difference of the scores (Yin et al., arXiv 2311.18828); log p_student's own change averages to 0.

    x_gen = eps - u(eps, 0, 1)                        the student's sample, one call
    x_t   = (1 - t) x_gen + t noise                   t in [0.02, 0.98]
    x0_real = x_t - t v_real(x_t, t)                  the frozen teacher's guess of the clean sample
    x0_fake = x_t - t v_fake(x_t, t)                  the fake branch's, which knows the STUDENT's distribution
    grad  = (x0_fake - x0_real) / mean|x_gen - x0_real|

A score is -eps_hat/t, and eps_hat = (x_t - (1 - t) x0_hat)/t, so score_fake - score_real = (1 - t)/t^2 (x0_fake -
x0_real). x_t moves by 1 - t as x_gen moves by 1, so the KL's gradient is (1 - t)^2/t^2 (x0_fake - x0_real), and grad is
that up to a positive factor for each sample.
The fake branch starts as a copy of the teacher (PAPER) and is trained by flow matching on x_gen. It always lags a
little behind the student, and each score is good only where its network has seen samples, so the two distributions
should overlap from the start: that is the paper's reason for stage 1.
The adversarial term adds what neither score knows: real data. A discriminator (awd.py) reads the frozen teacher's
features of x_gen at a little noise, where local defects can still be seen. Three players, each update moves one:

    fake branch <- flow matching on x_gen          discriminator <- hinge on noised x_data and x_gen
    student     <- L_G = L_DMD + lambda_adv L_adv  L_adv = -mean D(teacher's features of the noised x_gen)

    python dmd_refine.py --data glyphs                         # on images, from the TD student of meanflow_td.py
    python dmd_refine.py --data glyphs --ablation --seeds 3    # which part does what: all variants, a table, curves
    python dmd_refine.py --data glyphs --probe                 # at which noise can a discriminator see anything?

A run adds to the folder of stage 1: <name>-seed<seed>.pt, its csv, in samples/ grids and `panels`, and in budgets/ the
student at earlier updates. Not stated by the paper: rates, update ratio, lambda_adv, the times of its term.
"""

import argparse
import copy
import math
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from awd import AdaptiveWeightedDiscriminator, discriminator_hinge, generator_hinge
from data import RANK, BadInput, check_made, go_on, join, plot_curves, progress, report, rng, save, save_grid
from meanflow_td import (add_flags, flow_matching_loss, generate, grid_noise, learning_rate, load_net,
                         new_network, open_data, sample, settings, update, update_ema)  # fmt: skip
from models import DiT, add_noise, autocast_off, expand_times, student_from_teacher, x0_from_velocity

# --- The losses ------------------------------------------------------------------------------------------------------

# PRIOR: DMD (arXiv 2311.18828). At both ends the difference of the two guesses says nothing about x_gen: near t = 0
# both are x_t itself, near t = 1 each is the mean of its whole distribution, wherever x_gen lies.
T_DMD = 0.02, 0.98
# OURS: the discriminator's times. A local defect, an edge too soft, drowns in more noise than this: see `probe`.
T_ADV = 0.02, 0.15


def dmd_gradient(x_gen, x_t, *, t, v_real, v_fake):
    """The direction in which x_gen should NOT go: (x0_fake - x0_real) / mean|x_gen - x0_real|, for each sample.
    x_gen, its noised x_t, and both velocities at (x_t, t): (B, ...); t (B,). Returns (B, ...).
    The normaliser gives all noise levels about the same weight. PRIOR: DMD (arXiv 2311.18828, eq. 8). It has a
    further factor 1 - t; DMD2 and we drop it."""
    x0_real = x0_from_velocity(x_t, t, v_real)
    x0_fake = x0_from_velocity(x_t, t, v_fake)
    scale = (x_gen - x0_real).abs().flatten(1).mean(dim=1)  # (B,)
    return (x0_fake - x0_real) / expand_times(scale.clamp_min(1e-6), x_gen)


def dmd_loss(x_gen, grad):
    """1/2 mean (x_gen - sg[x_gen - grad])^2 over all elements; gradient w.r.t. x_gen: grad / x_gen.numel()."""
    return 0.5 * F.mse_loss(x_gen, (x_gen - grad).detach())


def noised(x, generator, times):
    """x (B, ...) at uniform times in [times[0], times[1]]: x_t and its noise (B, ...), t (B,)."""
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    t = times[0] + (times[1] - times[0]) * torch.rand(len(x), generator=generator, device=x.device)
    return add_noise(x, noise, t), noise, t


def fake_loss(fake, x_gen, y, generator):
    """Flow matching at all t on the student's samples x_gen (B, ...): the fake branch learns their distribution."""
    x_t, noise, t = noised(x_gen, generator, (0.0, 1.0))
    return flow_matching_loss(fake, x_t, noise - x_gen, t=t, y=y)[0], {}


def discriminator_loss(discriminator, teacher, x_data, x_gen, y, generator, *, taps, times=T_ADV):
    """The hinge loss on the frozen teacher's features of noised data and noised samples, both of labels y or None."""
    with torch.no_grad():
        x_t, _, t = noised(torch.cat([x_data, x_gen]), generator, times)
        features = teacher.features(x_t, t=t, y=None if y is None else torch.cat([y, y]), taps=taps)
    with autocast_off(x_t):  # small, and bf16 would spoil its spectral norms
        logit_data, logit_gen = discriminator(features).chunk(2)
    accuracy = 0.5 * ((logit_data > 0).float().mean() + (logit_gen < 0).float().mean())
    log = {"logit_data": logit_data.mean(), "logit_gen": logit_gen.mean(), "accuracy": accuracy}
    return discriminator_hinge(logit_data, logit_gen), log


def adversarial_pull(teacher, discriminator, x_gen, y, generator, *, lambda_adv, taps):
    """lambda_adv L_adv of samples x_gen (B, ...), and its gradient on them (B, ...): apart only to log its norm."""
    x = x_gen.detach().requires_grad_()
    x_t, _, t = noised(x, generator, T_ADV)
    features = teacher.features(x_t, t=t, y=y, taps=taps)
    with autocast_off(x):
        adv = lambda_adv * generator_hinge(discriminator(features))
        return adv.detach(), torch.autograd.grad(adv, x)[0]


def generator_loss(teacher, fake, discriminator, x_gen, y, generator, *, lambda_adv, taps):
    """L_G = L_DMD + lambda_adv L_adv for samples x_gen (B, ...) with their graph. discriminator None: L_DMD alone.
    Logs the mean norm of `grad` over the samples, the mean and spread of x_gen, and how hard each term pulls at x_gen:
    pull_dmd and pull_adv are the norms of their gradients on it, the second with lambda_adv."""
    x_t, _, t = noised(x_gen, generator, T_DMD)
    with torch.no_grad():
        v_real, v_fake = teacher(x_t, t=t, y=y), fake(x_t, t=t, y=y)
        grad = dmd_gradient(x_gen, x_t, t=t, v_real=v_real, v_fake=v_fake)
    log = {"grad_dmd": grad.flatten(1).norm(dim=1).mean(), "pull_dmd": grad.norm() / grad.numel(),
           "gen_mean": x_gen.mean(), "gen_std": x_gen.std()}  # fmt: skip
    loss = dmd_loss(x_gen, grad)  # its gradient on x_gen has the norm pull_dmd
    if discriminator is not None:
        adv, pull = adversarial_pull(teacher, discriminator, x_gen, y, generator, lambda_adv=lambda_adv, taps=taps)
        log["pull_adv"] = pull.norm()
        # L_G = L_DMD + lambda_adv L_adv. adv is the value of the second term, a number without a graph, and pull its
        # gradient on x_gen, which the student gets by a term that is 0
        loss = loss + adv + ((x_gen - x_gen.detach()) * pull).sum()
    return loss, log


# --- Training --------------------------------------------------------------------------------------------------------

RATES = {"student": 3e-3, "fake": 2e-3, "discriminator": 1e-3}  # OURS: peaks of the learning rates, found in 2D


def refine(path, student, teacher, fake, discriminator, draw, *, steps, lr=RATES, seed=0, taps=(), lambda_adv=0.05,
           fake_updates=2, make=generate, ema_decay=0.999, config=None, look=None, look_every=500, **how):  # fmt: skip
    """Train the student by L_G, with its two helpers; return its average network (EMA), frozen.

    student: a network u(x_t, r, t), from stage 1 (or without it, for the control). teacher: frozen, guided or not.
    fake: a copy of it, which is trained; never guided, since the student's samples contain the guidance.
    discriminator: an awd.AdaptiveWeightedDiscriminator for the layers `taps` of the teacher, or None.
    draw(generator) -> x_data (B, ...), y (B,) or None. fake_updates: for each of the student's (PRIOR: DMD2's
    two-time-scale rule, there 5; OURS: 2, since small networks learn fast). make: how x_gen is made, in one call here.
    lr: a peak for each player, as RATES. path, steps, config, look, look_every, how: as in `meanflow_td.train`."""
    players = {"student": student, "fake": fake} | ({"discriminator": discriminator} if discriminator else {})
    # PRIOR: no momentum between players that chase each other (Brock et al., arXiv 1809.11096)
    optimizers = {f"{name} optimizer": torch.optim.Adam(net.parameters(), betas=(0.0, 0.99), fused=True)
                  for name, net in players.items()}  # fmt: skip
    ema = copy.deepcopy(student).requires_grad_(False)

    for net in players.values():
        net.requires_grad_(True)

    def loss_of(name, generator):
        """The loss of one player. x_gen has a graph only where the student is to learn."""
        x_data, y = draw(generator)
        with torch.set_grad_enabled(name == "student"):
            x_gen = make(student, torch.randn(x_data.shape, generator=generator, device=x_data.device), y)
        if name == "fake":
            return fake_loss(fake, x_gen, y, generator)
        if name == "discriminator":
            return discriminator_loss(discriminator, teacher, x_data, x_gen, y, generator, taps=taps)
        return generator_loss(teacher, fake, discriminator, x_gen, y, generator, lambda_adv=lambda_adv, taps=taps)

    def move(name, k, again=0):
        """One update of one player, the `again`-th in a step. -> its log"""
        log = update(players[name], optimizers[f"{name} optimizer"], partial(loss_of, name),
                     lr=learning_rate(k, steps, lr[name]), words=(seed, path.stem, name, k, again), **how)  # fmt: skip
        prefix = {"student": "", "fake": "fake_", "discriminator": "d_"}[name]
        return {prefix + key: value for key, value in log.items()}

    def one_step(k):
        for again in range(fake_updates):
            log = move("fake", k, again)
        if discriminator is not None:
            discriminator.power_iteration()
            log |= move("discriminator", k)
        log = move("student", k) | log
        update_ema(ema, student, k, ema_decay)
        return log

    config = {**(config or {}), "seed": seed, "taps": taps, "lambda_adv": lambda_adv, "lr": lr,
              "fake_updates": fake_updates, "clip": how.get("clip"), "parts": how.get("parts", 1)}  # fmt: skip
    go_on(path, {**players, **optimizers, "ema": ema}, one_step, steps=steps, config=config,
          look=look and partial(look, ema), look_every=look_every)  # fmt: skip
    return ema


# --- A student for one and two calls: --student-steps 2 ------------------------------------------------------------

ONE_CALL = 0.75  # OURS: share of rows that such a student makes in 1 call, since one call is harder to learn


def generate_by_calls(student, eps, y):
    """x_gen (B, ...) with its graph; some of the rows take 1 call and the others 2, so that the student learns both,
    and its second call is trained on the very states that its first call leaves."""
    one = int(ONE_CALL * len(eps))
    return torch.cat([generate(student, eps[:one], y[:one]), generate(student, eps[one:], y[one:], steps=2)])


class FakeByCalls(nn.Module):
    """The fake branch of a student of 2 calls, with a second set of labels for the samples that took 2.
    OURS: a fake branch that knows only the mixture of both lets the student be too blurred in 1 call and too sharp in
    2, for the two average out. fake: a models.Velocity. Its rows are those of `generate_by_calls`."""

    def __init__(self, fake):
        super().__init__()
        self.fake, self.labels = fake, fake.net.num_classes + 1
        table = fake.net.y_embedder.embedding_table.weight.detach()
        fake.net.y_embedder.embedding_table = nn.Embedding.from_pretrained(table.repeat(2, 1), freeze=False)

    def forward(self, x_t, *, t, y):
        two = torch.arange(len(y), device=y.device) >= int(ONE_CALL * len(y))
        return self.fake(x_t, t=t, y=y + self.labels * two)


# --- Pictures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def panels(student, teacher, fake, discriminator, eps, y, *, taps, decode, t=0.5):
    """What stage 2 sees of ten samples, row by row (rows * 10, C, H, W): x_gen; x0_real and x0_fake at its noised x_t;
    the gradient, scaled to be seen. Where x0_real and x0_fake look the same, the student has nothing more to learn, or
    the fake branch has not followed. Then, per tapped layer, where the discriminator looks: grey is a token with an
    even share of the weight, black one with none, white one with twice its share or more."""
    eps, y = eps[:: len(eps) // 10][:10], y[:: len(y) // 10][:10]
    x_gen, times = generate(student, eps, y), eps.new_full((len(eps),), t)
    x_t = add_noise(x_gen, eps.flip(0), times)
    v_real, v_fake = teacher(x_t, t=times, y=y), fake(x_t, t=times, y=y)
    x0_real, x0_fake = x0_from_velocity(x_t, times, v_real), x0_from_velocity(x_t, times, v_fake)
    grad = dmd_gradient(x_gen, x_t, t=times, v_real=v_real, v_fake=v_fake)
    rows = [decode(x) for x in (x_gen, x0_real, x0_fake, grad / grad.abs().max().clamp_min(1e-12))]
    if discriminator is not None:
        times = eps.new_full((len(eps),), sum(T_ADV) / 2)
        features = teacher.features(add_noise(x_gen, eps.flip(0), times), t=times, y=y, taps=taps)
        for head, f in zip(discriminator.heads, features):
            share = head.weights(head.norm_tokens(f)) * f.shape[1]  # (B, N), 1 is even
            side = math.isqrt(f.shape[1])
            rows.append(F.interpolate(share.view(-1, 1, side, side) - 1, rows[0].shape[2:]).expand_as(rows[0]))
    return torch.cat(rows)


# --- The probe: where can a discriminator see? -----------------------------------------------------------------------

PROBE = dict(levels=(0.02, 0.1, 0.2, 0.7), images=8000, updates=400)
PROBE_QUICK = dict(levels=(0.05, 0.4), images=200, updates=10)


@torch.no_grad()
def blur_patch(x, generator):
    """Images x (B, C, H, W), each with one patch (a quarter of each side) blurred by (1 2 1), at a random place;
    places are drawn by how much the blur changes there, since blurring background changes nothing."""
    B, C, H, W = x.shape
    kernel = torch.tensor([1.0, 2.0, 1.0], device=x.device) / 4
    framed = F.pad(x, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    soft = F.conv2d(framed, torch.outer(kernel, kernel)[None, None]).view_as(x)
    place = torch.multinomial((soft - x).abs().sum(1).flatten(1) + 1e-9, 1, generator=generator)  # (B, 1)
    top, left = (place // W - H // 8).clamp(0, H * 3 // 4), (place % W - W // 8).clamp(0, W * 3 // 4)
    rows, columns = torch.arange(H, device=x.device) - top, torch.arange(W, device=x.device) - left  # (B, H), (B, W)
    inside = ((rows >= 0) & (rows < H // 4))[:, :, None] & ((columns >= 0) & (columns < W // 4))[:, None]
    return torch.where(inside[:, None], soft, x)


def probe(path, draw, student, teacher, build, *, taps, levels, images, updates):
    """Train discriminators on fixed images, and plot how well they tell apart, at each noise level t: data and samples
    of a fixed student; clean data and data with one blurred patch.
    build(pooling) -> a discriminator. path: of the picture; the AUC (area under the ROC curve: 0.5 is a guess, 1 is
    always right) is of the last quarter of the images, which were not trained on."""
    x_data, y = draw(images, rng(0, "probe", device=next(student.parameters()).device))
    x_gen = torch.cat([sample(student, torch.randn(part.shape, generator=rng(0, "probe", k)).to(part), labels)
                       for k, (part, labels) in enumerate(zip(x_data.split(250), y.split(250)))])  # fmt: skip
    tasks = {"AUC, student": x_gen, "AUC, patch": blur_patch(x_data, rng(1, "probe", device=x_data.device))}
    learn, rows = images * 3 // 4, []
    for pooling in ("attention", "mean"):
        for t in progress(levels, pooling):
            rows.append({"what": pooling, "t": t})
            for task, x_other in tasks.items():
                net = build(pooling)
                optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))

                def loss_of(generator):
                    i = torch.randint(learn, (64,), generator=generator, device=generator.device)
                    return discriminator_loss(net, teacher, x_data[i], x_other[i], y[i], generator, taps=taps,
                                              times=(t, t))  # fmt: skip

                for k in range(updates):
                    net.power_iteration()
                    update(net, optimizer, loss_of, lr=learning_rate(k, updates, 5e-3), words=("probe", k))
                scores = []
                for x in (x_data[learn:], x_other[learn:]):
                    with torch.no_grad():
                        x_t, _, times = noised(x, rng(2, "probe", device=x.device), (t, t))
                        scores.append(net(teacher.features(x_t, t=times, y=y[learn:], taps=taps)).mean(1))
                # the share of all pairs of which the right one has the larger score: this is the AUC
                rows[-1][task] = (scores[0][:, None] > scores[1]).float().mean().item()
    report(path.with_suffix(".json"), rows, ["t"], tasks)
    labels = "data or samples of the student, AUC", "clean, or one patch blurred, AUC"
    curves = {pooling: dict(color=COLOURS[pooling], marker="o") for pooling in ("attention", "mean")}
    plot_curves(path, rows, "t", {task: (label, "linear") for task, label in zip(tasks, labels)}, curves,
                f"What a discriminator sees at noise t. The adversarial term has t in {T_ADV}")  # fmt: skip


# --- The run ---------------------------------------------------------------------------------------------------------

# OURS. lambda_adv: 0.001 and 0.003 end about equally near to the data, with either pooling; pull_adv is then up to 0.7
# times pull_dmd. At 0.01 it is more than twice pull_dmd, and the Frechet distance a tenth larger. At twice this lr
# samples vary less (recall 0.71 vs 0.80). All from runs of 500 updates, seed 3.
GLYPHS = dict(batch=32, steps=2000, taps=(1, 3), lambda_adv=3e-3, fake_updates=2, clip=10.0,
              lr={"student": 1e-3, "fake": 1e-3, "discriminator": 5e-3})  # fmt: skip
# PRIOR: lr, fake_updates, clip and lambda_adv are DMD2's for ImageNet at 64 px (arXiv 2405.14867, official code).
# OURS: batch, steps, the discriminator's lr, the taps: four blocks, evenly spread over the 28 of an XL/2.
IMAGENET = dict(batch=256, steps=50_000, taps=(6, 13, 20, 27), lambda_adv=3e-3, fake_updates=5, clip=10.0,
                lr={"student": 2e-6, "fake": 2e-6, "discriminator": 1e-4})  # fmt: skip
PRESETS = {"glyphs": GLYPHS, "folder": GLYPHS, "imagenet": IMAGENET}
QUICK = {"glyphs": dict(steps=20, taps=(0, 1)), "folder": dict(steps=20, taps=(0, 1)),
         "imagenet": dict(batch=4, steps=3, taps=(0, 1), fake_updates=2)}  # fmt: skip
COLOURS = {"attention": "C1", "mean": "C2", "none": "C0"}  # of pictures
BUDGETS = 250, 500, 1000, 2000, 4000  # updates after which a student is kept, for the curves of evaluate.py
VARIANTS = {  # of --ablation: where the student starts, and how the discriminator pools
    "hd": ("td", "attention"), "td-mean": ("td", "mean"), "td-dmd": ("td", "none"),
    "hd-no-td": ("teacher", "attention"), "mean-no-td": ("teacher", "mean"),
    "dmd-no-td": ("teacher", "none")}  # fmt: skip


def open_stage_1(out, teacher, *, init, seed, device, about):
    """The student that stage 2 starts from and its teacher, from the files in `out`. teacher: a published one, or None.
    init: "td"; or "teacher", for a student without stage 1. about: how the files must have been made, else BadInput."""
    hint, made = "run meanflow_td.py with the same --data and --out first", {}
    if teacher is None:
        teacher, made = load_net(out / "teacher.pt", hint, device, two_times=False)
    teacher.w, teacher.cfg_channels = about["w"], about["cfg_channels"]
    if init == "teacher":  # at r < t it is far from an average velocity
        student = new_network(seed, "student", lambda: student_from_teacher(teacher)).to(device)
    else:
        student, made = load_net(out / "td.pt", hint, device, two_times=True)
    made, about = made | made.get("network", {}), about | {"wrapper": type(teacher).__name__}
    check_made(f"stage 1 in {out}", made, {key: about[key] for key in about if key in made})
    return student, teacher


def processes():
    """A process for each core, one thread each, for use in a with; map(work, jobs) yields work(job) in their order."""
    return ProcessPoolExecutor(None, torch.multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def flags():
    """The command line of this stage: an argparse.ArgumentParser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # fmt: skip
    add_flags(parser)
    add = parser.add_argument
    add("--name", default="hd", help="of this variant, its files and its random numbers (default: %(default)s)")
    add("--init", choices=("td", "teacher"), default="td", help="teacher: without stage 1 (default: %(default)s)")
    add("--pooling", choices=("attention", "mean", "none"), default="attention",
        help="of the discriminator's tokens; none: no discriminator (default: %(default)s)")
    add("--lambda-adv", type=float, help="weight of the adversarial term (default: 0.003)")
    add("--taps", type=int, nargs="+", help="blocks of the teacher, from 0, that the discriminator reads")
    add("--student-steps", type=int, choices=(1, 2), default=1, help="2: a student of 1 and of 2 calls (default: 1)")
    add("--ablation", action="store_true",
        help="small images only: each --init with each --pooling for --seeds seeds, side by side; then the table")
    add("--probe", action="store_true", help="train no student: at which noise can a discriminator see? probe.png")
    add("--seeds", type=int, default=3, help="of --ablation (default: %(default)s)")
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = flags().parse_args(argv)
    if args.probe and args.data != "glyphs":
        raise BadInput("--probe is for --data glyphs, which are endless: it needs images that no training has seen")
    if args.ablation and args.data == "imagenet":
        raise BadInput("--ablation is not for --data imagenet: train each variant with a --name of its own")
    device, out = join(args.device), args.out or Path("runs", args.data + "-quick" * args.quick)
    if args.ablation:
        rest = [word for word in argv if word != "--ablation"]  # of a flag given twice, the last counts
        jobs = [[*rest, f"--name={name}", f"--init={init}", f"--pooling={pooling}", f"--seed={seed}"]
                for seed in range(args.seeds) for name, (init, pooling) in VARIANTS.items()]  # fmt: skip
        with processes() as pool:
            list(pool.map(main, jobs))
        table = [sys.executable, Path(__file__).with_name("evaluate.py"), "--data", args.data, "--out", out]
        return subprocess.run(table + ["--quick"] * args.quick, check=True)

    plan = settings(PRESETS, QUICK, **vars(args))
    batch, part, taps, steps = plan.pop("batch"), plan.pop("part"), plan["taps"], plan["steps"]
    source, teacher = open_data(args.data, args.data_dir, size=args.size, device=device, teacher=args.teacher,
                                vae=args.vae, cache=args.cache)  # fmt: skip
    about = {"data": args.data, "shape": list(source.shape), "num_classes": source.classes, "w": args.w,
             "cfg_channels": args.cfg_channels}  # fmt: skip
    student, teacher = open_stage_1(out, teacher, init=args.init, seed=args.seed, device=device, about=about)
    fake = type(teacher)(copy.deepcopy(teacher.net))  # PAPER: starts as the teacher; unguided
    DiT.checkpointing, DiT.compiling = args.checkpointing, args.compile
    if absent := [tap for tap in taps if not 0 <= tap < len(teacher.net.blocks)]:
        raise BadInput(f"--taps {absent[0]}: the teacher has blocks 0 to {len(teacher.net.blocks) - 1}")

    def build(pooling):
        dims = [teacher.net.config["hidden_size"]] * len(taps)
        return new_network(args.seed, "discriminator", partial(AdaptiveWeightedDiscriminator, dims, pooling)).to(device)

    if args.probe:
        how = PROBE_QUICK if args.quick else PROBE
        probe(out / "probe.png", source.draw, student, teacher, build, taps=taps, **how)
        return print(f"In {out}: probe.png, probe.json")
    discriminator = None if args.pooling == "none" else build(args.pooling)
    (eps, y), stem = grid_noise(source, device), f"{args.name}-seed{args.seed}"
    about |= {"network": student.describe(), "init": args.init, "pooling": args.pooling, "batch": batch,
              "student_steps": args.student_steps}  # fmt: skip

    def look(ema, n):
        if n in BUDGETS and n < steps:
            as_finished = about | {"seed": args.seed, "steps": n}
            save(out / "budgets" / f"{stem}-{n:06d}.pt", {"ema": ema.state_dict(), "step": n, "config": as_finished})
        save_grid(out / "samples" / f"{stem}-{n:06d}.png", source.decode(sample(ema, eps, y)))
        seen = panels(ema, teacher, fake, discriminator, eps, y, taps=taps, decode=source.decode)
        save_grid(out / "samples" / f"{stem}-panels-{n:06d}.png", seen)

    branch, make = (FakeByCalls(fake), generate_by_calls) if args.student_steps == 2 else (fake, generate)
    ema = refine(out / f"{stem}.pt", student, teacher, branch, discriminator,
                 partial(source.draw, part), **plan, make=make, seed=args.seed,
                 amp=device.type == "cuda", config=about, look=look, look_every=BUDGETS[0])
    if RANK == 0:
        print(f"In {out}: {stem}.pt and its csv, grids in samples/. Next: evaluate.py")


if __name__ == "__main__":
    main()

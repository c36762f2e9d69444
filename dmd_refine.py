"""Stage 2: refine the one-step student by distribution matching (DMD) and an adversarial loss (AWD).

Stage 1 asked of every noise point the answer that the teacher's path gives it, and a finite student cannot keep so many
promises. This stage drops them: it no longer matters WHICH sample a noise point becomes, only that all samples together
have the teacher's distribution. For that, minimise KL(student || teacher) on noised samples, whose gradient is a
difference of two scores (Yin et al., arXiv 2311.18828):

    x_gen = eps - u(eps, 0, 1)                        the student's sample, one call
    x_t   = (1 - t) x_gen + t noise                   t in [0.02, 0.98]
    x0_real = x_t - t v_real(x_t, t)                  the frozen teacher's guess of the clean sample
    x0_fake = x_t - t v_fake(x_t, t)                  that of the fake branch, which knows the STUDENT's distribution
    grad  = (x0_fake - x0_real) / mean|x_gen - x0_real|

since a score is -(x_t - (1 - t) x0_guess)/t^2, and so score_fake - score_real = (1 - t)/t^2 (x0_fake - x0_real).
The fake branch starts as a copy of the teacher (PAPER) and is trained by flow matching on x_gen, several updates for
each of the student's. It is always a little late, and the two scores tell something only where samples of both, student
and teacher, lie; so a student had better start close to the teacher, which is the paper's reason for stage 1 (see the
README for what we find of it). The adversarial term adds what neither score knows: real data (see awd.py). One call of
the frozen teacher at the noised x_gen serves both terms, x0_real and the features; guided, it is two passes, and the
features are those of the conditional one.

    L_G = L_DMD + lambda_adv L_adv                    L_adv = -mean D(teacher's features of x_t)
Three players, each update moves one of them:
    student <- L_G      fake branch <- flow matching on x_gen      discriminator <- hinge on noised x_data and x_gen

    python dmd_refine.py --data glyphs                         # on images, from the TD student of meanflow_td.py
    python dmd_refine.py --data glyphs --ablation --seeds 3    # which part does what: all variants, one table
    python dmd_refine.py --bench                               # what a step costs, in passes of the network

What the paper does not tell: learning rates, update ratio, lambda_adv, times of the adversarial term. OURS: the
defaults of `refine`, found on seed 0 of the 2D toy, and PLANS, found on glyphs.
"""

import argparse
import math
import os
import re
import shlex
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from awd import AdaptiveWeightedDiscriminator, discriminator_hinge, generator_hinge
from data import (BLUE, GREEN, ORANGE, PUBLISHED, Glyphs, RunFolder, alone, in_turn, new_figure, positive_number,
                  progress, rng, save_figure, sentences, side_by_side, to_uint8, whole_number, world,
                  write_json)  # fmt: skip
from evaluate import COUNT, NAMES, QUICK_COUNT, VARIANTS, evaluate_run
from meanflow_td import PLANS as STAGE_1
from meanflow_td import (LOOK_EVERY, TEACHERS, WRAPPERS, ImageRun, add_run_arguments, add_training_arguments, autocast,
                         backward_in_parts, check_finite, check_section, check_training, count_clipped, draw_times,
                         flow_matching_loss, generate, in_parts, is_whole, labelled, learning_rate, make_optimizers,
                         meanflow_loss, meanflow_target, missing_parts, new_network, open_run, pick, plan_name,
                         run_flags, sample, share_clipped, student_config, student_objective, teacher_kind, teacher_net,
                         teacher_objective, teacher_weights)
from models import (DiT, DiTTeacher, Teacher, add_noise, autocast_off, dit_by_name, expand_times, frozen_copy,
                    normal_like, update_ema, x0_from_velocity)  # fmt: skip

try:
    import resource
except ImportError:  # Windows
    resource = None

# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------

# PRIOR: DMD (arXiv 2311.18828). Near t = 0 both guesses are x_t itself, near t = 1 each is the mean of its whole
# distribution, wherever x_gen lies: there the difference of the two tells nothing about x_gen.
T_MIN, T_MAX = 0.02, 0.98


def dmd_gradient(x_gen, x_t, *, t, v_real, v_fake, normalize=True):
    """The direction in which x_gen should NOT go: (x0_fake - x0_real) / mean|x_gen - x0_real|, for each sample.

    x_gen, its noised x_t, and both velocities at (x_t, t): (B, ...); t (B,). Returns (B, ...).
    Multiplied by (1 - t)^2/t^2 instead of normalised, and averaged over the noise, this is the exact gradient of
    KL(p_gen,t || p_real,t) by x_gen, if both velocities are exact: a score is -(x_t - (1 - t) x0_guess)/t^2, and x_t
    moves by 1 - t as x_gen moves by 1. The normaliser gives all noise levels about the same weight instead. PRIOR:
    the normaliser of DMD (arXiv 2311.18828, eq. 8), whose other factor, 1 - t, DMD2's code leaves out, as we do.
    """
    x0_real = x0_from_velocity(x_t, t, v_real)
    x0_fake = x0_from_velocity(x_t, t, v_fake)
    grad = x0_fake - x0_real
    if normalize:
        scale = (x_gen - x0_real).abs().flatten(1).mean(dim=1)  # (B,)
        grad = grad / expand_times(scale.clamp_min(1e-6), grad)
    return grad


def dmd_loss(x_gen, grad):
    """1/2 mean (x_gen - sg[x_gen - grad])^2 over all elements, whose gradient by x_gen is grad / x_gen.numel()."""
    return 0.5 * F.mse_loss(x_gen, (x_gen - grad).detach())


@contextmanager
def fixed(net):
    """Inside, the network's parameters take no gradient, while gradients still flow THROUGH it to its input."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def generator_loss(teacher, fake, discriminator, x_gen, y, noise, t, *, lambda_adv, taps):
    """L_G = L_DMD + lambda_adv L_adv for samples x_gen (B, ...) with their graph: no network but the student's gets a
    gradient.

    y (B,): the samples' labels, or None. noise (B, ...): what they are noised with, to the times t (B,).
    teacher(x_t, t=t, taps=taps) -> v or (v, features), frozen. discriminator: None leaves the adversarial term out.
    Returns the loss and a dict of scalars to log.
    """
    x_t = add_noise(x_gen, noise, t)
    if discriminator is None:
        with torch.no_grad():
            v_real = teacher(x_t, t=t, **labelled(y))
    else:  # one call: x0_real for DMD, features for the discriminator
        v_real, features = teacher(x_t, t=t, taps=taps, **labelled(y))
    with torch.no_grad():
        v_fake = fake(x_t, t=t, **labelled(y))
        grad = dmd_gradient(x_gen, x_t, t=t, v_real=v_real, v_fake=v_fake)
    loss = dmd_loss(x_gen, grad)
    terms = {"grad_dmd": grad.flatten(1).norm(dim=1).mean()}
    if discriminator is not None:
        # small, and bf16 would spoil the power iterations of its spectral norms
        with fixed(discriminator), autocast_off(x_gen):
            loss = loss + lambda_adv * generator_hinge(discriminator(features))
    return loss, terms


def fake_branch_loss(fake, x_gen, y, noise, t):
    """Flow matching on the student's samples x_gen (B, ...), so that the fake branch knows their distribution."""
    x_gen = x_gen.detach()
    loss, _ = flow_matching_loss(fake, add_noise(x_gen, noise, t), noise - x_gen, t=t, y=y)
    return loss


def discriminator_loss(discriminator, teacher, x_data, x_gen, y, noise, t, *, taps):
    """The hinge loss on the frozen teacher's features of noised data and noised samples, both of labels y (B,) or None.

    x_data, x_gen (B, ...); noise (2B, ...) and t (2B,) for the two in this order.
    Returns the loss and a dict of scalars to log.
    """
    x_t = add_noise(torch.cat([x_data, x_gen.detach()]), noise, t)
    with torch.no_grad():
        features = teacher.features(x_t, t=t, taps=taps, **labelled(None if y is None else torch.cat([y, y])))
    with autocast_off(x_t):
        logit_data, logit_gen = discriminator(features).chunk(2)
        loss = discriminator_hinge(logit_data, logit_gen)
    accuracy = 0.5 * ((logit_data > 0).float().mean() + (logit_gen < 0).float().mean())
    terms = {"logit_data": logit_data.mean(), "logit_gen": logit_gen.mean(), "accuracy": accuracy}
    return loss, terms


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def uniform(low, high, n, generator):
    """n times (n,), uniform in [low, high]."""
    return low + (high - low) * torch.rand(n, generator=generator, device=generator.device)


def both_halves(x, rows):
    """Rows of the first half of x (2B, ...) and the same of the second, in this order."""
    return torch.cat([half[rows] for half in x.chunk(2)])


ONE_CALL = 0.75  # OURS: share of rows that a student of 2 steps makes in 1 call, since one call is harder to learn


def by_calls(x, steps):
    """The rows of x (B, ...) that a student of `steps` steps, 1 or 2, makes in 1 call, and if 2 those in 2 calls."""
    return (x,) if steps == 1 else x.tensor_split([int(ONE_CALL * len(x))])


def student_samples(student, eps, y, steps):
    """x_gen (B, ...) with its graph. A student of 2 steps makes some of the rows in 1 call and the others in 2, so that
    it learns both, and its second call is trained on the very states that its first call leaves."""
    labels = [None] * steps if y is None else by_calls(y, steps)
    return torch.cat([generate(student, part, y_part, 1 + k)
                      for k, (part, y_part) in enumerate(zip(by_calls(eps, steps), labels))])  # fmt: skip


class FakeByCalls(nn.Module):
    """The fake branch of a student of 2 steps, with a second set of labels for the samples that took 2 calls.

    OURS: a fake branch that knows only the mixture of both lets the student be too blurred in 1 call and too sharp in
    2, for the two average out (the README has the numbers). fake: a Teacher, for a DiT with labels. The rows of
    forward are in the order of `student_samples`."""

    def __init__(self, fake, steps):
        super().__init__()
        self.fake, self.steps, self.labels = fake, steps, fake.net.num_classes + 1
        table = fake.net.y_embedder.embedding_table.weight.detach()
        fake.net.y_embedder.embedding_table = nn.Embedding.from_pretrained(table.repeat(steps, 1), freeze=False)

    def forward(self, x_t, *, t, y):
        y = torch.cat([part + k * self.labels for k, part in enumerate(by_calls(y, self.steps))])
        return self.fake(x_t, t=t, y=y)


def refine(student, teacher, fake, draw, *, discriminator=None, steps, batch, seed, stream, name, taps=(),
           lambda_adv=0.1, lambda_td=0.0, student_steps=1, lr=3e-3, lr_fake=2e-3, lr_muon=None,
           lr_discriminator=1e-3, fake_updates=2, fake_floor=0.0, t_power=1.0, clip=20.0, ema_decay=0.999, amp="off",
           accumulate=1, keep=None, look=None, log_every=100):  # fmt: skip
    """Train the student in place by L_G, with its helpers; return its average network (EMA) and rows for metrics.csv.

    student: two times, from stage 1 (or without it, for the control). teacher: frozen, see `generator_loss`. fake: a
    copy of it, which is trained; without guidance, for the samples that it fits are guided already. draw(batch,
    generator) -> x_data (batch, ...), y (batch,) or None. discriminator: an awd.AdaptiveWeightedDiscriminator for the
    layers `taps` of the teacher, or None; trained in place. lambda_td: weight of stage 1's loss, kept on (its share of
    rows with r < t is SHARE_SPANS of meanflow_td.py, whatever stage 1 had). student_steps: 1, or 2 for a student that
    can do both (a DiT with labels). fake_updates: of the fake branch for each of the student's (PRIOR: DMD2's
    two-time-scale rule, there 5; OURS: 2 for each, since these networks learn fast). Learning rates are peaks, and fall
    to 0, the fake branch's to `fake_floor` times its peak (OURS: so that it keeps up with a student that comes to
    rest); lr_muon of student and fake branch, see `meanflow_td.make_optimizers`. t_power: x_gen is noised to the times
    u^t_power, u uniform, stretched to T_MIN .. T_MAX (OURS: below 1 there is more noise, which hides the detail and
    shows the whole: recall rises, and so does the distance, README). seed, stream, name, clip, ema_decay, amp,
    accumulate, keep: as in `meanflow_td.train`; each part of a batch brings the discriminator's spectral norms a step
    further.
    look(step, ema, fake): called now and then, to draw pictures.
    Raises data.Diverged when a loss, a gradient or a sample is not finite.
    """
    device = next(student.parameters()).device
    branch = fake if student_steps == 1 else FakeByCalls(fake, student_steps)
    players = [student, branch] + ([] if discriminator is None else [discriminator])
    # PRIOR: no momentum in Adam between players that chase each other (Brock et al., arXiv 1809.11096).
    # OURS: no momentum in Muon either. On glyphs recall is higher then, precision and distance a little worse.
    rates = zip(players, (lr, lr_fake, lr_discriminator), (lr_muon, lr_muon, None))
    optimizers = [make_optimizers(*rate, momentum=0.0) for rate in rates]  # a list for each player
    ema, first, log = frozen_copy(student), 0, []
    parts = {"ema": ema} | {f"net{i}": net for i, net in enumerate(players)}
    parts |= {f"optimizer{i}.{j}": one for i, own in enumerate(optimizers) for j, (one, _) in enumerate(own)}
    if keep is not None:
        first, log = keep.restore(parts)

    def update(player, loss_of):
        """One step of one player by loss_of(rows) -> loss, terms; returns both, and the norm of its gradient."""
        net = players[player]
        net.zero_grad()
        loss, terms = backward_in_parts(net, batch, accumulate, loss_of, partial(autocast, device, amp))
        gradient = nn.utils.clip_grad_norm_(net.parameters(), clip)
        for optimizer, _ in optimizers[player]:
            optimizer.step()
        return loss, terms, gradient

    bar = progress(range(first, steps), name, initial=first, total=steps)
    for step in bar:
        start = time.perf_counter()
        # --- training step ---
        generator = rng(seed, stream, step, device)
        for own, floor in zip(optimizers, (0.0, fake_floor, 0.0)):  # as players
            for optimizer, peak in own:
                optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak, floor=floor)
        x_data, y = draw(batch, generator)  # (B, ...), (B,)
        terms = {}
        for _ in range(fake_updates):
            eps = normal_like(x_data, generator)
            x_gen = torch.empty_like(eps)
            with torch.no_grad(), autocast(device, amp):
                for part, _ in in_parts(batch, accumulate):
                    x_gen[part] = student_samples(student, eps[part], pick(y, part), student_steps)
            # PRIOR: all t here, also those that the student is never asked about (DMD2's code)
            noise, t = normal_like(x_gen, generator), uniform(0, 1, batch, generator)
            loss_fake, _, gradient = update(1, lambda rows: (
                fake_branch_loss(branch, x_gen[rows], pick(y, rows), noise[rows], t[rows]), {}))  # fmt: skip
            gradients = {"gradient_fake": gradient}
        if discriminator is not None:
            # the last x_gen serves again: the student has not moved since, and new noise falls on it
            noise = normal_like(torch.cat([x_data, x_gen]), generator)
            t = uniform(T_MIN, T_MAX, 2 * batch, generator)
            loss_d, terms, gradients["gradient_d"] = update(2, lambda rows: discriminator_loss(
                discriminator, teacher, x_data[rows], x_gen[rows], pick(y, rows), both_halves(noise, rows),
                both_halves(t, rows), taps=taps))  # fmt: skip
        eps, noise = normal_like(x_data, generator), normal_like(x_data, generator)
        t = T_MIN + (T_MAX - T_MIN) * uniform(0, 1, batch, generator) ** t_power
        drawn = generator.get_state()

        def loss_of(rows):
            x_gen = student_samples(student, eps[rows], pick(y, rows), student_steps)
            loss, terms = generator_loss(teacher, branch, discriminator, x_gen, pick(y, rows), noise[rows], t[rows],
                                         lambda_adv=lambda_adv, taps=taps)  # fmt: skip
            if lambda_td:
                generator.set_state(drawn)  # the same random numbers for all parts
                part = {} if is_whole(rows) else {"rows": rows}
                loss_td, td_terms = student_objective(student, x_data, y, eps, generator, teacher=teacher, **part)
                loss, terms = loss + lambda_td * loss_td, terms | td_terms
            # for `check_finite`, in the place of errors: each sample's norm, and the time of its noise
            per_row = {"t": t[rows], "error": x_gen.detach().flatten(1).norm(dim=1)}
            return loss, terms | {"gen_mean": x_gen.mean(), "gen_std": x_gen.std(), "rows": per_row}

        loss, generator_terms, gradient = update(0, loss_of)
        update_ema(ema, student, step, ema_decay)
        # --- bookkeeping ---
        losses = {"loss": loss, "loss_fake": loss_fake} | ({} if discriminator is None else {"loss_d": loss_d})
        per_row = generator_terms.pop("rows")
        check_finite(f"{name}, seed {seed}, step {step}", per_row, generator_terms.get("du_dt"),
                     sample=per_row["error"], **losses, gradient=gradient, **gradients)  # fmt: skip
        count_clipped(optimizers[0][0][0], gradient, clip)
        last = step == steps - 1
        if step % log_every == 0 or last:
            terms = {**losses, **terms, **generator_terms, "gradient": gradient}
            values = {name: value.item() for name, value in terms.items()}
            values["clipped"] = share_clipped(optimizers[0][0][0], step, log)
            seconds = round(time.perf_counter() - start, 4)
            log.append({"network": name, "seed": seed, "step": step, **values, "seconds_per_step": seconds})
            bar.set_postfix(grad_dmd=f"{values['grad_dmd']:.3g}", refresh=False)
        if look is not None and (step % LOOK_EVERY == 0 or last):
            look(step, ema, fake)
        if keep is not None:
            keep.save(parts, step + 1, log)
    return ema, log


# ---------------------------------------------------------------------------------------------------------------------
# Runs on images
# ---------------------------------------------------------------------------------------------------------------------

# The settings of one variant, under its name a section of the run folder's config.json.
PLANS = {
    # OURS: all of it, found on glyphs.
    "default": dict(steps=6000, batch=32, lr=1e-3, lr_fake=1e-3, lr_muon=6e-3, lr_discriminator=5e-3, fake_updates=2,
                    fake_floor=0.5, t_power=0.75, taps=(1, 3), pooling="attention", init="td", lambda_adv=0.1,
                    lambda_td=0.0, student_steps=1, clip=10.0),
    "quick": dict(steps=20, batch=32, lr=5e-4, lr_fake=5e-4, lr_muon=5e-3, lr_discriminator=1e-3, fake_updates=2,
                  taps=(0, 1), pooling="attention", init="td", lambda_adv=0.1, lambda_td=0.0, student_steps=1,
                  clip=10.0),
    # PRIOR: lr, lr_fake, fake_updates and clip are DMD2's for ImageNet at 64 px (arXiv 2405.14867, official code); the
    # batch is close to its 280. OURS: steps, lr_discriminator, lambda_adv, ema_decay, and the taps: four blocks, evenly
    # spread over the 28 of an XL/2. The paper tells none of them.
    "imagenet256-xl2": dict(steps=50_000, batch=256, lr=2e-6, lr_fake=2e-6, lr_discriminator=1e-4, fake_updates=5,
                            taps=(6, 13, 20, 27), pooling="attention", init="td", lambda_adv=0.1, lambda_td=0.0,
                            student_steps=1, clip=10.0, ema_decay=0.999),
}  # fmt: skip
# OURS: the small student is far from its end after stage 1, so it learns five times as fast.
PLANS["imagenet256-b4"] = PLANS["imagenet256-xl2"] | dict(lr=1e-5)
PLANS["imagenet-quick"] = PLANS["imagenet256-xl2"] | dict(steps=3, batch=4, taps=(0, 1), fake_updates=2)


def refine_images(run, name, seed):
    """Stage 2 on images, by the section `name` of the run's plan: its stage <name>-seed<seed>, found or trained."""
    plan = dict(run.plan[name])
    init, pooling = plan.pop("init"), plan.pop("pooling")
    stage, teacher = f"{name}-seed{seed}", run.load_teacher()

    def compute(keep):
        student = run.student(teacher)  # from the teacher's weights if it has its sizes, else random
        if init == "td":
            student.load_state_dict(run.load("td", two_times=True).state_dict())
        fake = type(teacher)(frozen_copy(teacher.net)).requires_grad_(True)  # PAPER: starts as the teacher; unguided
        discriminator = None
        if pooling != "none":
            dims = [teacher.net.config["hidden_size"]] * len(plan["taps"])
            build = partial(AdaptiveWeightedDiscriminator, dims, pooling)
            discriminator = new_network(seed, "discriminator", build).to(run.device)

        run.set_passes(student, teacher, fake)

        def look(step, ema, fake):
            run.save_samples(f"{stage}-{step:06d}", sample(ema, run.grid_eps, run.grid_y))
            run.save_samples(f"{stage}-dmd-{step:06d}", dmd_panels(ema, teacher, fake, run.grid_eps, run.grid_y))

        ema, rows = refine(student.requires_grad_(True), teacher, fake, run.draw, discriminator=discriminator,
                           **plan, **run.how, seed=seed, stream="refine", name=stage, keep=keep,
                           look=None if world()[0] else look)  # fmt: skip
        run.folder.write_metrics(rows)
        if pooling == "attention" and not world()[0]:
            x_gen, weights = attention_weights(ema, teacher, discriminator, run.grid_eps, run.grid_y, taps=plan["taps"])
            plot_attention(run.folder.path / f"attention-{stage}.png", run.decode(x_gen), weights, taps=plan["taps"])
        return {"net": ema.state_dict(), "rows": rows}

    return run.folder.stage(stage, compute)


@torch.no_grad()
def dmd_panels(student, teacher, fake, eps, y, t=0.5):
    """What DMD compares, for ten of the noises eps: x_gen, x0_real and x0_fake at its noised x_t, the gradient (scaled
    to be seen): (40, C, H, W). Where x0_real and x0_fake look the same, the student has nothing more to learn, or the
    fake branch has not followed."""
    eps, y = eps[::len(eps) // 10][:10], y[::len(y) // 10][:10]
    x_gen, times = generate(student, eps, y), eps.new_full((len(eps),), t)
    x_t = add_noise(x_gen, eps.flip(0), times)
    v_real, v_fake = teacher(x_t, t=times, y=y), fake(x_t, t=times, y=y)
    x0_real, x0_fake = x0_from_velocity(x_t, times, v_real), x0_from_velocity(x_t, times, v_fake)
    grad = dmd_gradient(x_gen, x_t, t=times, v_real=v_real, v_fake=v_fake)
    return torch.cat([x_gen, x0_real, x0_fake, grad / grad.abs().max().clamp_min(1e-12)])


@torch.no_grad()
def attention_weights(student, teacher, discriminator, eps, y, *, taps, t=0.3):
    """Where the AWD looks: x_gen (8, C, H, W) and, for each tapped layer, its weights over tokens, (8, side, side)."""
    eps, y = eps[::len(eps) // 8][:8], y[::len(y) // 8][:8]
    x_gen, times = generate(student, eps, y), eps.new_full((len(eps),), t)
    _, features = teacher(add_noise(x_gen, eps.flip(0), times), t=times, y=y, taps=taps)
    weights = [head.weights(head.norm_tokens(f)) for head, f in zip(discriminator.heads, features)]
    return x_gen, [a.unflatten(1, (math.isqrt(a.shape[1]), -1)).cpu() for a in weights]


def plot_attention(path, x_gen, weights, *, taps):
    """attention.png: generated images, and below each the weights over its tokens; 1 is an even share."""
    rows, columns = 1 + len(weights), len(x_gen)
    figure, axes = new_figure(1.3 * columns, 1.4 * rows, rows, columns, grid=False)
    for axis, image in zip(axes[0], to_uint8(x_gen)):
        axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    for row, a, tap in zip(axes[1:], weights, taps):
        share = a * a[0].numel()
        for axis, image, one in zip(row, to_uint8(x_gen), share):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            shown = axis.imshow(one, cmap="inferno", alpha=0.7, vmin=0, vmax=share.max(), interpolation="nearest",
                                extent=(-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5))  # fmt: skip
        row[0].set_ylabel(f"block {tap}")
        figure.colorbar(shown, ax=list(row), label="weight / even share")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    save_figure(path, figure)


# ---------------------------------------------------------------------------------------------------------------------
# The ablation
# ---------------------------------------------------------------------------------------------------------------------



def ablation_plan(plan, td):
    """Sections for all variants. plan: HD's, td: stage 1's. Those without TD get the updates of both stages; "scratch"
    is MeanFlow on data, from random weights."""
    both = plan["steps"] + td["steps"]
    sections = {name: {**plan, **change, "steps": both if change.get("init") == "teacher" else plan["steps"]}
                for name, change in VARIANTS.items()}  # fmt: skip
    scratch = {key: td[key] for key in ("batch", "lr", "lr_muon", "momentum", "clip") if key in td}
    return sections | {"scratch": scratch | {"steps": both}}


def ablation_job(args, name, seed):
    """Train one variant with one seed."""
    run = ImageRun(args, {})  # --ablation is for glyphs
    if name == "scratch":
        net = run.network("scratch", two_times=True, seed=seed)
        run.train(f"{name}-seed{seed}", net, student_objective, section=name, sampler=sample, seed=seed)
    else:
        refine_images(run, name, seed)


def ablation(args, run):
    """All variants and seeds, `args.workers` at a time; then the table, ablation.png and ablation.json."""
    jobs = {(name, seed): () for seed in range(args.seeds) for name in (*VARIANTS, "scratch")}
    # a variant that diverges is a result
    side_by_side(partial(ablation_job, args), jobs, args.workers, "the ablation", forgive=FloatingPointError)
    for state in run.folder.stages().values():
        run.folder.write_metrics(state.get("rows", []))
    rows = evaluate_run(run, args.count or (QUICK_COUNT if args.quick else COUNT))
    lines = compare(rows)
    variances = [gradient_variance(run, seed) for seed in range(args.seeds)]
    ratio = [v["data"] / v["teacher"] for v in variances]
    spread = np.std(ratio, ddof=len(ratio) > 1)
    lines.append(f"The gradient of MeanFlow's loss varies {np.mean(ratio):.2f} +- {spread:.2f} times as much with "
                "eps - x_0 as with the teacher's velocity.")  # fmt: skip
    diverged = [f"{name}-seed{seed}" for name, seed in jobs if run.folder.finished(f"{name}-seed{seed}") is None]
    lines += [f"{stage} diverged: it has no row." for stage in diverged]
    print("\n".join(lines))
    write_json(run.folder.path / "ablation.json", {"comparisons": lines, "gradient_variance": variances})
    plot_ablation(run.folder.path / "ablation.png", rows, run.folder)
    print(f"In {run.folder.path}: ablation.json, ablation.png")


def compare(rows):
    """Sentences on the paper's orderings, in Frechet distance and in recall, with mean and spread over seeds.

    Two rows are told apart where Welch's t-test over the seeds has p < 0.05; it needs two seeds of each.
    """
    pairs = {"with AWD, a start from TD against none": ("hd", "hd-no-td"),
             "with DMD alone, a start from TD against none": ("dmd", "dmd-no-td"),
             "attention against mean pooling": ("hd", "mean"), "AWD against none": ("hd", "dmd")}  # fmt: skip
    lines = []
    for what, names in pairs.items():
        for measure, sign in (("frechet", -1), ("recall", 1)):
            groups = [[row[measure] for row in rows if row["what"] == NAMES[name] and row["nfe"] == 1]
                      for name in names]  # fmt: skip
            if min(map(len, groups)) < 2:
                lines.append(f"{what}: {measure} not compared, for that takes two seeds of each")
                continue
            apart = scipy.stats.ttest_ind(*groups, equal_var=False).pvalue < 0.05
            gain = sign * (np.mean(groups[0]) - np.mean(groups[1]))
            first, second = (f"{np.mean(group):.4f} +- {np.std(group, ddof=1):.4f}" for group in groups)
            verdict = ("better" if gain > 0 else "worse") if apart else "not separated"
            seeds = " and ".join(str(len(group)) for group in groups)
            lines.append(f"{what}: {measure} {first} against {second} ({seeds} seeds): {verdict}")
    return lines


def gradient_variance(run, seed, batches=32):
    """How much the gradient of MeanFlow's loss at the TD student varies from batch to batch, by the source of v.

    The trace of the gradient's covariance over `batches` batches, without the adaptive weight: u_target is linear in
    v, so that the expected gradient is the same with the teacher's v as with the conditional eps - x_0, as far as the
    teacher is right, and the variances compare. Same data, noise and times for both.
    """
    student, plan = run.load("td", two_times=True).requires_grad_(True), run.plan["td"]
    teacher, variance = run.load("teacher"), {}  # without guidance: the mean of eps - x_0, and of nothing else
    for source in ("teacher", "data"):
        gradients = []
        for k in range(batches):
            generator = rng(seed, "gradient variance", k, run.device)
            x_0, y = run.source.draw(plan["batch"], generator)
            eps, (r, t) = normal_like(x_0, generator), draw_times(len(x_0), generator)
            x_t = add_noise(x_0, eps, t)
            with torch.no_grad():
                v = teacher(x_t, t=t, y=y) if source == "teacher" else eps - x_0
            loss, _ = meanflow_loss(student, x_t, v, r=r, t=t, y=y, p=0)
            parts = torch.autograd.grad(loss, list(student.parameters()))
            gradients.append(torch.cat([part.flatten() for part in parts]))
        gradients = torch.stack(gradients).double()  # (batches, parameters)
        variance[source] = gradients.var(dim=0).sum().item()
    return {"seed": seed, **variance}


def plot_ablation(path, rows, folder):
    """ablation.png: Frechet distance and recall of each variant and seed, and of the teacher with the guidance that is
    best for its distance; MeanFlow's error in training, with the teacher's velocity and on data."""
    figure, axes = new_figure(13, 4.4, columns=3)
    names = ["td", "scratch", "dmd-no-td", "dmd", "mean", "hd-no-td", "hd"]
    titles = {"td": "TD", **NAMES}
    teacher = min((row for row in rows if row["what"] == "teacher, Heun"), key=lambda row: row["frechet"])
    for axis, measure in zip(axes, ("frechet", "recall")):
        for place, name in enumerate(names):
            values = [row[measure] for row in rows if row["what"] == titles[name] and row["nfe"] == 1]
            axis.plot(values, [place] * len(values), "o", color=ORANGE if name == "hd" else BLUE)
        axis.axvline(teacher[measure], color="black", ls="--", label="teacher")
        axis.set_yticks(range(len(names)), [titles[name] for name in names] if axis is axes[0] else [])
        axis.set_xlabel("Frechet distance (less is better)" if measure == "frechet" else "recall (more is better)")
        axis.legend(fontsize=9)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_minor_formatter("")  # else the numbers between the powers of ten overlap
    curves = ("td", "TD: the teacher's velocity", BLUE), ("scratch-seed0", "on data, no teacher", GREEN)
    for name, label, colour in curves:
        state = folder.finished(name)
        if state is not None:
            axes[2].plot([row["step"] for row in state["rows"]], [row["raw_error"] for row in state["rows"]],
                         color=colour, label=label)  # fmt: skip
    axes[2].set(yscale="log", xlabel="update", ylabel="MeanFlow's squared error, unweighted")
    axes[2].legend(fontsize=9)
    save_figure(path, figure)


# ---------------------------------------------------------------------------------------------------------------------
# What a run on ImageNet takes, without any of it: fake tensors are meta tensors, of a shape and a type but no memory,
# that take part in autocast and in the choice of kernels as those of a device do.
# ---------------------------------------------------------------------------------------------------------------------

IMAGENET_IMAGES = 1_281_167


def saved_bytes(call, *nets):
    """Bytes that a pass with a graph keeps for its backward pass, besides the parameters of `nets`.

    Counted: every storage that autograd saves, once, whatever tensors share it. Not counted: what a pass needs only on
    its way, and what the allocator of a device wastes.
    """
    parameters = {p.untyped_storage()._cdata for net in nets for p in net.parameters()}
    storages = {}

    def pack(x):
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()  # holds the graph, so that no storage's place is taken by another's
    del result
    return sum(size for storage, size in storages.items() if storage not in parameters)


def numbers(*nets):
    """Entries of state dicts: parameters and fixed tables, as files of weights hold them."""
    return sum(tensor.numel() for net in nets for tensor in net.state_dict().values())


def memory(stage_1, stage_2, teacher, student, *, batch, amp, checkpointing):
    """Bytes by part for each stage, {stage: {part: bytes}}, and the numbers of each network, {name: count}.

    stage_1, stage_2: plans. teacher, student: wrapped nets of fake tensors, to be called under their FakeTensorMode.
    batch: rows taken at once in stage 1 and in stage 2. The discriminator is counted whatever the plan's pooling.
    """
    fake = type(teacher)(DiT(**teacher.net.config))
    taps = tuple(stage_2["taps"])
    discriminator = AdaptiveWeightedDiscriminator([teacher.net.config["hidden_size"]] * len(taps))
    teacher.requires_grad_(False)
    teacher.w, teacher.cfg_channels = stage_1["w"], stage_1["cfg_channels"]
    known, nets = teacher.net.config, (teacher, student, fake, discriminator)
    for wrapper in nets[:3]:
        wrapper.net.checkpointing = checkpointing

    def kept(rows, call, wrapper):
        """Saved bytes of call(x, t, y) on so many rows; with checkpointing, plus those of one block of the wrapped net,
        which the backward pass computes again."""
        x = torch.randn(rows, known["in_channels"], known["input_size"], known["input_size"])
        t, y = torch.rand(rows), torch.zeros(rows, dtype=torch.int64)
        with autocast(torch.device("cpu"), amp):
            size = saved_bytes(lambda: call(x, t, y), *nets)
        with autocast(torch.device("cpu"), "off" if isinstance(wrapper, DiTTeacher) else amp):
            if checkpointing:
                net = wrapper.net
                tokens, width = (known["input_size"] // net.patch_size) ** 2, net.config["hidden_size"]
                x, c = torch.randn(rows, tokens, width, requires_grad=True), torch.randn(rows, width)
                size += saved_bytes(lambda: net.blocks[0](x, c), *nets)
        return size

    def generator_pass(eps, t, y):
        x_gen = generate(student, eps, y)
        return generator_loss(teacher, fake, discriminator, x_gen, y, eps, t, lambda_adv=1.0, taps=taps)

    rows_1, rows_2 = batch
    trained = {"TD": [student], "refinement": [student, fake, discriminator]}
    activations = {
        "TD": kept(rows_1, lambda x, t, y: student(x, t=t, r=t, y=y).square().sum(), student),
        "refinement": max(kept(rows_2, generator_pass, teacher),
                          kept(rows_2, lambda x, t, y: fake(x, t=t, y=y).square().sum(), fake)),
    }  # fmt: skip
    stages = {}
    for stage, players in trained.items():
        trainable = 4 * sum(p.numel() for net in players for p in net.parameters())  # fp32
        stages[stage] = {"weights": 4 * numbers(teacher, *players), "EMA": 4 * numbers(student),
                         "optimiser": 2 * trainable, "gradients": trainable,
                         "activations": activations[stage]}  # fmt: skip
    counts = {"teacher": numbers(teacher), "student": numbers(student), "fake branch": numbers(fake),
              "discriminator": numbers(discriminator)}  # fmt: skip
    return stages, counts


def dry_run(args, given):
    """--dry-run of both scripts: print what both stages take and what this machine lacks. -> exit code, 0 or 2."""
    name = plan_name(args)
    plans = {"td": dict(STAGE_1[name]["td"]), "refine": dict(PLANS[name])}
    for (section, key), value in given.items():
        if value is not None and section != "data":
            plans["td" if section == "td" else "refine"][key] = value
    missing = missing_parts(args)
    if args.teacher in PUBLISHED:
        build = partial(dit_by_name, args.teacher)
    else:
        there = os.path.exists(args.teacher)
        build = partial(teacher_net, args.teacher, teacher_weights(args.teacher)) if there else None
    if build is not None:
        with FakeTensorMode():
            teacher = TEACHERS[teacher_kind(args.teacher)](build())
            for plan in plans.values():
                check_section(plan, len(teacher.net.blocks), args.accumulate)
            config = student_config(teacher, STAGE_1[name]["network"])
            student = WRAPPERS[config.pop("wrapper")](DiT(**config, two_times=True))
            rows = [-(-plan["batch"] // args.accumulate) for plan in plans.values()]
            stages, counts = memory(plans["td"], plans["refine"], teacher, student, batch=rows, amp=args.amp,
                                    checkpointing=args.checkpointing)  # fmt: skip
        print(f"{name}, teacher {args.teacher}, amp {args.amp}, checkpointing "
              f"{'on' if args.checkpointing else 'off'}; rows at once: TD {rows[0]}, refinement {rows[1]}")  # fmt: skip
        for what, count in counts.items():
            print(f"{count:>15,}  numbers in the {what}")
        print(f"{'GB':>24}" + "".join(f"{stage:>12}" for stage in stages))
        for part in stages["TD"]:
            print(f"{part:>24}" + "".join(f"{sizes[part] / 1e9:12.2f}" for sizes in stages.values()))
        print(f"{'sum':>24}" + "".join(f"{sum(sizes.values()) / 1e9:12.2f}" for sizes in stages.values()))
        side, channels = teacher.net.config["input_size"], teacher.net.config["in_channels"]
        cache = IMAGENET_IMAGES * 2 * 2 * channels * side * side * 2
        print(f"The latents of {IMAGENET_IMAGES:,} images take {cache / 1e9:.1f} GB of disk: python data.py --encode "
              f"--data-dir {args.data_dir or 'DIR'} --cache {args.cache or 'CACHE'} --vae {args.vae}")  # fmt: skip
        print("Not in the sum: the VAE (0.3 GB of weights), what passes need only on their way, and what CUDA keeps.")
        if plans["refine"]["lambda_td"] or plans["refine"]["student_steps"] == 2:
            print("Not in the sum either: what --lambda-td and --student-steps 2 add to the refinement's activations.")
    for what, published in missing:
        print(f"missing: {what}.")
        if published:
            print(f"    curl -L --create-dirs -o {published.path} {published.url}")
    return 2 if missing else 0


# ---------------------------------------------------------------------------------------------------------------------
# How fast. One forward pass of the network is F a row, a backward pass 2F, so flow matching costs 3F. All else is made
# of such passes, and is measured in F, a third of flow matching's time in the same process: then a table says on any
# machine how much of the time is arithmetic that has to be, and how much is not.
#
#   TD            3F, 2F of the guided teacher, and 2F where r < t: the student and its tangent
#   fake branch   4F, the student's sample and flow matching on it
#   discriminator 2 s F, features of data and samples; s: the last tap's place in the depth of the teacher
#   generator     (6 + s) F: the student's sample, 2F of the guided teacher, the fake branch; back through the teacher
#                 to its input alone, which is half of a backward pass, and through the student
# ---------------------------------------------------------------------------------------------------------------------

BENCH = {
    "default": dict(input_size=32, patch_size=2, hidden_size=384, depth=12, num_heads=6),  # S/2: 33 M, 256 tokens
    "quick": dict(input_size=16, patch_size=4, hidden_size=32, depth=4, num_heads=2),
}
BENCH_SPANS, BENCH_CALLS = 0.25, 250  # MeanFlow's share of rows with r < t on ImageNet; the published teachers' calls


def bench_steps(size, batch, device, amp, passes):
    """What is timed: {name: (count of passes, what to call)}.

    size: of the DiTs, all alike, with random weights that stay; the teacher is guided. The data are glyphs. passes:
    attributes of the DiTs.
    """
    build = partial(DiT, in_channels=1, num_classes=10, **size)
    teacher, student, fake = (Teacher(new_network(0, name, partial(build, two_times=name == "student"))).to(device)
                              for name in ("teacher", "student", "fake"))  # fmt: skip
    for wrapper in (teacher, student, fake):
        wrapper.net.checkpointing, wrapper.net.compiling = passes["checkpointing"], passes["compiling"]
    teacher.requires_grad_(False).w = 1.5
    depth, fake_updates = size["depth"], 2
    taps = tuple(depth * k // 4 - 1 for k in (1, 2, 3, 4))
    heads = partial(AdaptiveWeightedDiscriminator, [size["hidden_size"]] * len(taps))
    discriminator = new_network(0, "discriminator", heads).to(device)
    source, generator = Glyphs(size["input_size"]), rng(0, "bench", 0, device)
    x_0, y = source.draw(batch, generator)
    eps, noise = normal_like(x_0, generator), normal_like(torch.cat([x_0, x_0]), generator)
    r, t = draw_times(batch, generator, share_spans=BENCH_SPANS)
    idle = frozen_copy(fake).requires_grad_(True)
    optimizer, ema = torch.optim.Adam(idle.parameters(), fused=True), frozen_copy(idle)
    for p in idle.parameters():
        p.grad = torch.zeros_like(p)

    def learn(player, loss_of):
        with autocast(device, amp):
            loss = loss_of()
        (loss[0] if isinstance(loss, tuple) else loss).backward()
        player.zero_grad()

    @torch.no_grad()
    def answer(call):
        with autocast(device, amp):
            return call()

    def optimise():
        nn.utils.clip_grad_norm_(idle.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, idle, 0)

    def fake_branch():
        x_gen = answer(lambda: sample(student, eps, y))
        learn(fake, lambda: fake_branch_loss(fake, x_gen, y, noise[:batch], t))

    s, spans = (max(taps) + 1) / depth, int(batch * BENCH_SPANS) / batch
    return {
        "flow matching": (3, lambda: learn(fake, lambda: teacher_objective(
            fake, x_0, y, eps, generator, null_class=10))),
        "TD": (5 + 2 * spans, lambda: learn(student, lambda: student_objective(
            student, x_0, y, eps, generator, teacher=teacher, share_spans=BENCH_SPANS))),
        "  guided teacher": (2, lambda: answer(lambda: teacher(eps, t=t, y=y))),
        "  du/dt": (2 * spans, lambda: meanflow_target(student, x_0, eps, r=r, t=t, y=y)),
        "  optimiser, EMA": (0, optimise),
        "  drawing data": (0, lambda: source.draw(batch, generator)),
        "refinement": (fake_updates * 4 + 6 + 3 * s, lambda: refine(
            student, teacher, fake, source.draw, discriminator=discriminator, steps=1, batch=batch, seed=0,
            stream="bench", name="refinement", taps=taps, fake_updates=fake_updates, amp=amp, lr=0, lr_fake=0,
            lr_discriminator=0)),
        "  fake branch": (4, fake_branch),
        "  discriminator": (2 * s, lambda: learn(discriminator, lambda: discriminator_loss(
            discriminator, teacher, x_0, eps, y, noise, torch.cat([t, t]), taps=taps))),
        "  generator": (6 + s, lambda: learn(student, lambda: generator_loss(
            teacher, fake, discriminator, generate(student, eps, y), y, noise[:batch], t, lambda_adv=0.1, taps=taps))),
        "student, 1 call": (1, lambda: answer(lambda: sample(student, eps, y))),
        "student, 2 calls": (2, lambda: answer(lambda: sample(student, eps, y, steps=2))),
    }  # fmt: skip


def bench(args, rounds=3):
    """--bench: every step and its parts, in turns, `rounds` times: a table of medians, which bench.json keeps."""
    device, batch = torch.device(args.device), args.batch or 8
    size = BENCH["quick" if args.quick else "default"]
    passes = {"checkpointing": args.checkpointing, "compiling": args.compile}
    steps, seconds = bench_steps(size, batch, device, args.amp, passes), defaultdict(list)
    cuda, threads = device.type == "cuda", torch.get_num_threads()
    # where one thread computes, its own time counts: others on the machine disturb it less
    clock = time.process_time if threads == 1 and not cuda else time.perf_counter
    for i in progress(range(rounds + args.compile), "bench"):
        for name, (_, call) in steps.items():
            start = clock()
            call()
            if cuda:
                torch.cuda.synchronize(device)
            if i >= args.compile:  # the first round compiles
                seconds[name].append(clock() - start)
    costs = {name: (count, float(np.median(seconds[name]))) for name, (count, _) in steps.items()}
    count, once = costs["  guided teacher"]
    costs[f"teacher, {BENCH_CALLS} calls"] = count * BENCH_CALLS, once * BENCH_CALLS
    one = costs["flow matching"][1] / 3  # F of the batch
    rows = [{"what": name.strip(), "seconds": time_, "time/F": time_ / one, "count": count,
             "time/count": time_ / one / count if count else None, "time/3F": time_ / one / 3,
             "samples/s": batch / time_} for name, (count, time_) in costs.items()]  # fmt: skip
    print(f"{'':20}{'time/F':>9}{'count':>9}{'time/count':>12}{'time/3F':>9}{'samples/s':>11}")
    for name, row in zip(costs, rows):
        counted = f"{row['count']:9.2f}{row['time/count']:12.3f}" if row["count"] else 21 * " "
        print(f"{name:20}{row['time/F']:9.3f}{counted}{row['time/3F']:9.3f}{row['samples/s']:11.3g}")
    if cuda:
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process, on Linux
    machine = {"torch": torch.__version__, "device": str(device), "threads": threads, "amp": args.amp, "batch": batch,
               "rounds": rounds, "seconds/F": one / batch, "peak memory": memory, **passes, **size}  # fmt: skip
    print(", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in machine.items()))  # fmt: skip
    path = Path(args.out or "runs/bench", "bench.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine, "rows": rows})
    print(f"In {path.parent}: {path.name}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def variant_name(text):
    """A type for argparse: names of files and of sections of a run's settings that are not taken."""
    taken = ("data", "scratch", *STAGE_1["default"])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text) or text.lower() in taken:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of letters, digits, _.-, or is one of {taken}")
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    add_training_arguments(parser)
    parser.add_argument("--name", type=variant_name, default="hd", help="name of this variant (default: %(default)s)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of this stage (default: %(default)s)")
    parser.add_argument("--refine-steps", type=whole_number(1), help="updates of the student")
    parser.add_argument("--pooling", choices=("attention", "mean", "none"),
                        help="of the discriminator's tokens; none: no such term (default: attention)")  # fmt: skip
    parser.add_argument("--init", choices=("td", "teacher"),
                        help="teacher: without stage 1, from the teacher's weights, or from random ones where its "
                        "sizes are others (default: td)")  # fmt: skip
    parser.add_argument("--lambda-adv", type=positive_number, help="weight of the adversarial term")
    parser.add_argument("--lambda-td", type=positive_number, help="weight of stage 1's loss, kept on (default: off)")
    parser.add_argument("--taps", type=whole_number(0, 99), nargs="+", metavar="BLOCK",
                        help="blocks of the teacher, from 0, that the discriminator reads")  # fmt: skip
    parser.add_argument("--student-steps", type=int, choices=(1, 2), help="2: a student for 1 and 2 calls (default: 1)")
    parser.add_argument("--ablation", action="store_true", help="all variants and seeds, from one teacher and one TD")
    parser.add_argument("--seeds", type=whole_number(1, 10), default=3, help="of --ablation (default: %(default)s)")
    parser.add_argument("--workers", type=whole_number(1, 64), default=os.cpu_count() or 1,
                        help="of --ablation: jobs side by side (default: %(default)s, one for each core)")  # fmt: skip
    parser.add_argument("--count", type=whole_number(100, 10**6),
                        help=f"of --ablation: images in a row of the table ({COUNT}; with --quick {QUICK_COUNT})")
    parser.add_argument("--bench", action="store_true",
                        help="time every step and its parts on this machine, against the count of network passes")
    args = parser.parse_args(arguments)
    check_training(parser, args)
    if args.bench:
        with sentences(parser):
            bench(args)
        return
    if args.ablation and (args.data != "glyphs" or args.name != "hd"):
        parser.error("--ablation is of --data glyphs and --name hd: else train each variant with its own --name")
    if args.ablation and (args.init or args.pooling or args.seed):
        parser.error("--ablation trains each --init and --pooling with the seeds 0 .. --seeds - 1: leave out --init, "
                     "--pooling and --seed")
    with sentences(parser, None if args.ablation or args.dry_run else args.device) as held:
        keys = ("pooling", "init", "lambda_adv", "lambda_td", "student_steps", "batch", "taps")
        given = {(args.name, key): getattr(args, key) for key in keys} | {(args.name, "steps"): args.refine_steps}
        plan = {args.name: PLANS[plan_name(args)]}
        if args.dry_run:
            sys.exit(dry_run(args, given))
        needs = ["teacher"] * (args.data != "imagenet") + ["td"] * (args.init != "teacher")
        with in_turn():
            run = open_run(args, given, plan, needs=needs)
        if args.ablation:
            sections = ablation_plan(run.plan["hd"], run.plan["td"])
            RunFolder(run.folder.path, sections)  # BadInput where one of them was trained otherwise by hand
            run = ImageRun(args, {}, sections)
            held.enter_context(alone(run.folder.path))
            run.load("td", two_times=True)  # or say that it is damaged, before anything starts
            ablation(args, run)
            return
        held.enter_context(alone(run.folder.path))
        refine_images(run, args.name, args.seed)
        checkpoint = run.folder.path / f"{args.name}-seed{args.seed}.pt"
        after = (run_flags(parser, args) if args.data == "glyphs" else
                 f"--sample 50000 --checkpoint {shlex.quote(str(checkpoint))} --out DIR")  # fmt: skip
        print(f"In {run.folder.path}: {checkpoint.name}, metrics.csv, and grids in samples/. "
              f"Next: python evaluate.py {after}")  # fmt: skip


if __name__ == "__main__":
    main()

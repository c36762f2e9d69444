"""Stage 0 and stage 1: a flow-matching teacher, and its one-step student by MeanFlow trajectory distillation (TD).

A teacher knows the velocity v(x_t, t) of the path between data (t = 0) and noise (t = 1), and has to follow it
backwards in many small steps to make a sample. A student learns the AVERAGE velocity over a whole stretch of that path,
and takes the stretch in one step:

    u(x_t, r, t) = 1/(t - r) * integral_r^t v(x_s, s) ds           x_r = x_t - (t - r) u(x_t, r, t)

An integral makes a poor regression target, since it needs the teacher's whole path. Multiply by (t - r) and
differentiate along the path (dx_t/dt = v, r fixed): u + (t - r) du/dt = v. That is the MeanFlow identity (Geng et al.,
arXiv 2505.13447),

    u = v - (t - r) du/dt              du/dt = v . grad_x u + d_t u

and it needs only what is known at one point of the path. du/dt is ONE forward-mode product of the student with the
tangents (v, 0, 1) for (x, r, t). The right side, held fixed, is the target. Two things follow:

- At r = t the identity says u = v: flow matching is MeanFlow with r = t, so one loss trains the teacher (on eps - x_0)
  and the student (on the frozen teacher's velocity; if that is guided, so is the student).
- The teacher's v is a function of (x_t, t), while eps - x_0 is a noisy sample of it: distillation has a deterministic
  target.

What this stage leaves behind: at t = 1 the map from noise to data is steep wherever the path decides between two modes.
A network of finite size rounds these cliffs off, and samples fall between the modes; toy2d.py measures it. Stage 2,
dmd_refine.py, starts from there.

    python toy2d.py                            # points in the plane call the functions here
    python meanflow_td.py --data glyphs        # images: trains the teacher, then the TD student
    python meanflow_td.py --data imagenet --dry-run       # the main experiment: what it takes, and what is missing
    torchrun --nproc_per_node=8 meanflow_td.py --data imagenet --device cuda ...          # 8 GPUs share each batch

Departures from MeanFlow: the times (`draw_times`), the optimisers (`make_optimizers`), and a teacher's velocity in the
place of eps - x_0.
"""

import argparse
import copy
import math
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.autograd import forward_ad

from data import (PUBLISHED, BadInput, Diverged, EncodedFolder, Glyphs, ImageFolder, LatentCache, RunFolder, add_up,
                  alone, check_device, decode_latents, fetch, glyph_ranges, in_short, in_turn, load_vae, own_share,
                  positive_number, progress, rng, save_grid, sentences, sha256_file, to_uint8, weights_path,
                  whole_number, world)  # fmt: skip
from models import (SD_VAE_SCALE, DiT, DiTTeacher, SiTTeacher, Teacher, add_noise, autocast_off, dit_by_name,
                    dit_from_weights, expand_times, frozen_copy, load_weights, read_weights, student_from_teacher,
                    update_ema)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def labelled(y):
    """The keyword that carries labels y to a network; none where there are no labels, as in 2D."""
    return {} if y is None else {"y": y}


def pick(y, rows):
    """Rows of labels y (B,), or None where there are no labels."""
    return None if y is None else y[rows]


# A span is a row of a batch with r < t, from which the student learns to jump; rows with r = t teach it the velocity.
# DIFFERS: 75 % of the rows are spans, where MeanFlow has 25 % on ImageNet: the boundary r = t is soon learned here.
SHARE_SPANS = 0.75


def draw_times(batch, generator, *, share_spans=SHARE_SPANS, share_to_data=0.3):
    """Times r <= t, each (batch,): the first share_spans of the rows span r < t, the others have r = t.

    The spans alone need du/dt; the others tie u to the teacher's velocity, which the identity starts from. Of the
    spans, share_to_data reach down to r = 0, as every one-step sample does.
    """
    # DIFFERS: MeanFlow draws both times from sigmoid(N(-0.4, 1)) (arXiv 2505.13447), we draw both uniformly and
    # sort them, so that t has density 2t, in rows with r = t too: a one-step sample starts at t = 1 and ends at r = 0,
    # which logit-normal times all but never reach.
    # OURS: share_to_data = 0.3. With it sliced W2 of a TD student was 0.05, without spans at r = 0 it was 0.09, with no
    # other spans, close to consistency distillation, 0.19 (checkerboard, 3,000 updates, one seed, earlier version).
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
        label = labelled(pick(y, rows))
        x_rows, r_rows, t_rows = x_t[rows].detach(), r[rows], t[rows]

        with torch.no_grad(), forward_ad.dual_level():  # the target carries no gradient: forward mode needs no graph
            # du/dt = v . grad_x u + d_t u : the tangents are (v, 1) for (x, t); r is constant along the path
            tangents = (v[rows].detach(), torch.ones_like(t_rows))
            x_dual, t_dual = map(forward_ad.make_dual, (x_rows, t_rows), tangents)
            with autocast_off(v):  # bf16 would make du/dt wrong by a percent
                u = u_theta(x_dual, t=t_dual, r=r_rows, **label)
            du_dt[rows] = forward_ad.unpack_dual(u).tangent
    # u_target = v - (t - r) du/dt
    return (v - expand_times(t - r, v) * du_dt).detach(), du_dt


def adaptive_mean(err, p, c):
    """The mean of err / sg[(err + c)^p] over a batch of squared errors err (B,): MeanFlow's adaptive weight."""
    return (err * (err.detach() + c) ** -p).mean()


def meanflow_loss(u_theta, x_t, v, *, r, t, y=None, p=1.0, c=1e-2, watch=None):
    """MeanFlow's loss: the student's squared distance from u_target, adaptively weighted (arXiv 2505.13447, Sec. 4).

    Arguments as in `meanflow_target`. Returns the scalar loss and err (B,), the raw squared error summed over all but
    the first dimension: watch err, for at p = 1 the weighted loss is about 1 as long as err is far above c.
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


def sample_ode(velocity, eps, y=None, steps=100):
    """The teacher's samples x_0 (B, ...) from noise eps: Heun's method from t = 1 to t = 0, two calls a step.

    velocity(x_t, t=t) -> (B, ...), called with y=y too if y (B,) is given. Raises ValueError for steps < 1.
    """

    def heun(x, *, t, r, **label):  # a jump by the mean of the velocities at its two ends
        v_t = velocity(x, t=t, **label)
        v_r = velocity(x - v_t / steps, t=r, **label)
        return (v_t + v_r) / 2

    return sample(heun, eps, y, steps)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(step, steps, peak, warmup=100, floor=0.0):
    """Half a cosine from `peak` to almost 0 at the last of `steps`, but not below `floor` times the peak; times a
    linear rise over the first `warmup`."""
    risen = peak * min(1.0, (step + 1) / warmup)
    return max(risen * 0.5 * (1 + math.cos(math.pi * step / steps)), risen * floor)


def check_finite(where, rows=None, du_dt=None, **terms):
    """Raise data.Diverged, naming the place and the term, if one of these tensors holds NaN or infinity.

    rows, du_dt: for its report. {name: (B,)}, values for each row of the batch, of which the five with the largest
    "error" are reported; and the mean norm of du/dt.
    """
    for name, value in terms.items():
        if not value.isfinite().all():
            break
    else:
        return

    def number(value):  # JSON has no NaN
        number = value.item()
        return number if math.isfinite(number) else str(number)

    values = {key: number(value.detach().float().mean()) for key, value in terms.items()}
    report = {"where": where, "term": name, "values": values}
    if du_dt is not None:
        report["du_dt"] = number(du_dt)
    if rows is not None:
        size = rows["error"].detach().float().abs()
        worst = torch.where(size.isnan(), math.inf, size).argsort(descending=True)[:5].tolist()
        report["worst rows"] = [{"row": i} | {key: number(column[i]) for key, column in rows.items()} for i in worst]
    raise Diverged(f"{where}: {name} is {values[name]}. A lower learning rate may help.", report)


def count_clipped(optimizer, gradient, clip):
    """Note whether a gradient of this norm was longer than clip. Kept in the optimizer, whose state a Keep saves."""
    group = optimizer.param_groups[0]
    group["clipped"] = group.get("clipped", 0) + bool(gradient > clip)


def share_clipped(optimizer, step, log):
    """The share of the steps since the last row of `log` that `count_clipped` noted."""
    return optimizer.param_groups[0].pop("clipped") / (step - (log[-1]["step"] if log else -1))


def autocast(device, amp):
    """A context for passes with a graph and for the teacher's: matrix products in bf16 if amp is "bf16", not if "off".

    Times, their embeddings, du/dt, the target and the loss stay in fp32: the networks here answer in fp32, and
    `meanflow_target` switches autocast off. No cache: it would hand weights that were cast without a graph to a pass
    that needs one.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16", cache_enabled=False)


def in_parts(batch, accumulate):
    """Splits a batch among ranks and, for each, into `accumulate` parts. A part is every count-th row, so that all have
    their share of the spans, which come first (see `draw_times`). -> this rank's slices, and what share of the batch
    each is."""
    count = accumulate * world()[1]
    if count > batch:
        raise BadInput(f"a batch of {batch} can't be taken in {count} parts: lower --accumulate")
    slices = [slice(k, None, count) for k in range(count)[own_share()]]
    return [(rows, len(range(batch)[rows]) / batch) for rows in slices]


def is_whole(rows):
    """Whether a slice of `in_parts` is the whole batch: then nothing is in parts, and no rank has another."""
    return rows.step == 1


def backward_in_parts(net, batch, accumulate, loss_of, context):
    """Make the gradient of a batch's mean loss in net's parameters, part by part: one part's activations at a time.

    loss_of(rows) -> loss, terms for a slice of the batch's rows, called within context(). The gradient is that of the
    whole batch up to rounding, if each row has its own share of the loss. Returns loss and terms for the whole batch.
    All three are the same on all ranks.
    """
    loss, terms, parts = 0.0, [], in_parts(batch, accumulate)
    for rows, share in parts:
        with context():
            part, part_terms = loss_of(rows)
        (part * share).backward()
        loss = loss + part.detach() * share
        terms.append(part_terms)
    if is_whole(rows):
        return loss, terms[0]
    # each part writes its terms into its own place and leaves zeros in the others: the sum over ranks has all
    means = {name: loss.new_zeros(accumulate * world()[1]) for name in terms[0] if name != "rows"}
    columns = {key: loss.new_zeros(batch) for key in terms[0].get("rows", ())}
    for (rows, _), part_terms in zip(parts, terms):
        for name, values in means.items():
            values[rows.start] = part_terms[name].detach()
        for key, values in columns.items():
            values[rows] = part_terms["rows"][key].detach()
    add_up([*(p.grad for p in net.parameters() if p.grad is not None), loss, *means.values(), *columns.values()])
    # a part without a row of some kind has NaN for its mean: it has no say, unless the loss is not finite itself
    mean = torch.nanmean if loss.isfinite() else torch.mean
    means = {name: mean(values) for name, values in means.items()}
    return loss, means | ({"rows": columns} if columns else {})


def teacher_objective(net, x_0, y, eps, generator, *, null_class=None, rows=slice(None)):
    """Stage 0 for a batch of data and noise (B, ...), labels y (B,) or None: flow matching on eps - x_0.

    null_class: the label that takes the place of one in ten, so that the network also knows the velocity of all classes
    together, which guidance needs (Ho & Salimans, arXiv 2207.12598). rows: a slice, on which the loss is computed;
    random numbers are drawn for the whole batch, so that they do not depend on how it is split. Returns the loss and
    terms to log; of these, "rows" are for each row of the batch, and not logged but reported if the loss is not finite.
    """
    # OURS: uniform times. The edges of a density are drawn at small t, which logit-normal times seldom see.
    t = torch.rand(len(x_0), generator=generator, device=x_0.device)
    if null_class is not None:
        dropped = torch.rand(len(x_0), generator=generator, device=x_0.device) < 0.1  # PRIOR: DiT's share
        y = torch.where(dropped, null_class, y)
    x_0, y, eps, t = x_0[rows], pick(y, rows), eps[rows], t[rows]
    v = eps - x_0  # noisy: its mean given x_t is the velocity field, and so p = 0
    loss, err = flow_matching_loss(net, add_noise(x_0, eps, t), v, t=t, y=y)
    return loss, {"raw_error": err.mean(), "rows": {"r": t, "t": t, "error": err}}


def student_objective(net, x_0, y, eps, generator, *, teacher=None, share_spans=SHARE_SPANS, rows=slice(None)):
    """Stage 1 for a batch of data and noise (B, ...), labels y (B,) or None: MeanFlow on the teacher's velocity.

    teacher(x_t, t=t) -> v (B, ...), frozen, called with y=y too if there are labels; guidance is its own affair. None:
    MeanFlow from scratch, on eps - x_0 (PRIOR: arXiv 2505.13447). share_spans: of `draw_times`. rows, and what is
    returned: as in `teacher_objective`.
    """
    terms = {}
    r, t = draw_times(len(x_0), generator, share_spans=share_spans)
    # a student of a published DiT stands still beyond t_0 and t_999 (see models.DiTTeacher)
    r, t = (time.clamp(*getattr(net, "times", (0.0, 1.0))) for time in (r, t))
    x_0, y, eps, r, t = x_0[rows], pick(y, rows), eps[rows], r[rows], t[rows]
    x_t = add_noise(x_0, eps, t)
    with torch.no_grad():
        # deterministic with a teacher, one noisy draw of it without
        v = eps - x_0 if teacher is None else teacher(x_t, t=t, **labelled(y))
    loss, err = meanflow_loss(net, x_t, v, r=r, t=t, y=y, watch=terms)
    per_row = {"r": r, "t": t, "error": err}
    return loss, {**terms, "raw_error": err.mean(), "v_error": err[r == t].mean(), "rows": per_row}


def make_optimizers(net, lr, lr_muon=None, momentum=None):
    """[(optimizer, its peak learning rate)] of all of net's parameters: Adam; Muon for a DiT's matrices, if lr_muon.

    Muon makes every singular value of a matrix's step alike, so that rare directions are learned as fast as common ones
    (PRIOR: Jordan et al., https://kellerjordan.github.io/posts/muon). OURS: to use Muon on glyphs, for all networks but
    the discriminator. After 2,000 updates the teacher's squared error per pixel of held-out glyphs was 0.217, with Adam
    at its best 0.239, at 1.3 times the time (seed 0 of an earlier version, whose glyphs varied more).
    momentum: of both. None: the usual, Adam's beta_1 = 0.9 and Muon's 0.95.
    """
    matrices = [p for name, p in net.named_parameters() if "blocks." in name and p.ndim == 2 and lr_muon is not None]
    taken = set(map(id, matrices))
    others = [p for p in net.parameters() if id(p) not in taken]
    beta_1, mu = (0.9, 0.95) if momentum is None else (momentum, momentum)
    # OURS: beta_2 = 0.99, a memory of 100 updates; MeanFlow has 0.95. TD of the toy did not care (0.95, 0.99 and 0.999,
    # one seed).
    optimizers = [(torch.optim.Adam(others, lr=lr, betas=(beta_1, 0.99), fused=True), lr)]
    if matrices:
        optimizers.append((torch.optim.Muon(matrices, lr=lr_muon, momentum=mu, weight_decay=0.0), lr_muon))
    return optimizers


def train(net, draw, objective, *, steps, batch, lr, seed, stream, name, lr_muon=None, momentum=None, clip=20.0,
          ema_decay=0.999, amp="off", accumulate=1, keep=None, look=None, log_every=100):  # fmt: skip
    """Train `net` in place and return its average network (EMA) and a list of rows for metrics.csv.

    draw(batch, generator) -> x_0 (batch, ...), labels y (batch,) or None. objective(net, x_0, y, eps, generator) ->
    loss, terms: one of those above. steps, batch: integers >= 1; lr, lr_muon: peaks of the learning rates, and
    momentum: see `make_optimizers`. seed, stream: what the randomness of each step is made from; networks that are to
    be compared share them. name: what the bar and the rows call this network, with a row every `log_every` steps. clip:
    the gradient's greatest norm; the toy's seldom reach 20. ema_decay: of `update_ema`. amp: of `autocast`. accumulate:
    parts in which a batch is taken, one after the other, to save memory; objective is then called with rows= too. keep:
    a data.Keep, and a killed training goes on. look(step, ema): called now and then, to draw samples.
    Raises data.Diverged when the loss or its gradient is not finite.
    """
    device = next(net.parameters()).device
    optimizers = make_optimizers(net, lr, lr_muon, momentum)
    ema, first, log = frozen_copy(net), 0, []
    parts = {"net": net, "ema": ema} | {f"optimizer{i}": optimizer for i, (optimizer, _) in enumerate(optimizers)}
    if keep is not None:
        first, log = keep.restore(parts)
    bar = progress(range(first, steps), name, initial=first, total=steps)
    for step in bar:
        start = time.perf_counter()
        # --- training step ---
        generator = rng(seed, stream, step, device)
        x_0, y = draw(batch, generator)  # (B, ...), (B,)
        eps = torch.randn(x_0.shape, generator=generator, device=device)
        drawn = generator.get_state()

        def loss_of(rows):
            generator.set_state(drawn)  # the same random numbers for all parts
            part = {} if is_whole(rows) else {"rows": rows}
            return objective(net, x_0, y, eps, generator, **part)

        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
            optimizer.zero_grad()
        loss, terms = backward_in_parts(net, batch, accumulate, loss_of, partial(autocast, device, amp))
        gradient = nn.utils.clip_grad_norm_(net.parameters(), clip)  # the norm that it had
        for optimizer, _ in optimizers:
            optimizer.step()
        update_ema(ema, net, step, ema_decay)
        # --- bookkeeping ---
        check_finite(f"{name}, seed {seed}, step {step}", terms.pop("rows", None), terms.get("du_dt"),
                     loss=loss, gradient=gradient)  # fmt: skip
        count_clipped(optimizers[0][0], gradient, clip)
        last = step == steps - 1
        if step % log_every == 0 or last:
            terms = {"loss": loss, **terms, "gradient": gradient}
            values = {name: value.item() for name, value in terms.items()}
            values["clipped"] = share_clipped(optimizers[0][0], step, log)
            seconds = round(time.perf_counter() - start, 4)
            log.append({"network": name, "seed": seed, "step": step, **values, "seconds_per_step": seconds})
            bar.set_postfix(raw_error=f"{values['raw_error']:.3g}", refresh=False)
        if look is not None and (step % LOOK_EVERY == 0 or last):
            look(step, ema)
        if keep is not None:
            keep.save(parts, step + 1, log)
    return ema, log


# ---------------------------------------------------------------------------------------------------------------------
# Runs on images
# ---------------------------------------------------------------------------------------------------------------------

# What a run is made of. The sections go to the run folder's config.json; dmd_refine.py adds its own.
PLANS = {
    # OURS: all of it, chosen by short runs of the teacher and of stage 1 on 2 CPU cores.
    # No momentum in stage 1: a step towards the target moves a fault e of the student by -(e + (t - r) de/dt), which
    # turns it; steps repeated from before the turn make it grow. With momentum, more updates made TD worse (README).
    "default": {
        "network": dict(patch_size=4, hidden_size=48, depth=4, num_heads=3),
        "teacher": dict(steps=48_000, batch=64, lr=3e-3, lr_muon=1e-2, clip=300.0),
        "td": dict(steps=4000, batch=64, lr=1e-3, lr_muon=2e-2, momentum=0.0, clip=50.0, w=1.0),
    },
    "quick": {
        "network": dict(patch_size=4, hidden_size=32, depth=2, num_heads=2),
        "teacher": dict(steps=60, batch=32, lr=3e-3, lr_muon=1e-2, clip=300.0),
        "td": dict(steps=30, batch=32, lr=1e-3, lr_muon=5e-3, momentum=0.0, clip=50.0, w=1.0),
    },
    # The student is as large as the teacher, and starts from its weights.
    # PRIOR: batch, lr, ema_decay and a quarter of spans are MeanFlow's for ImageNet (arXiv 2505.13447, official code);
    # w = 1.5 on 3 channels is the guidance behind the published FIDs of both teachers (arXiv 2212.09748).
    # OURS: steps (20 epochs, never run), clip.
    "imagenet256-xl2": {
        "network": {},
        "td": dict(steps=100_000, batch=256, lr=1e-4, clip=1.0, ema_decay=0.9999, share_spans=0.25, w=1.5,
                   cfg_channels=3),
    },
    # A student of a tenth of the teacher's work. Its sizes are not the teacher's, so it starts from random weights and
    # learns all from the teacher's velocity: OURS, as the toy does. With a B/4 as --teacher it starts from its weights.
    # PRIOR: B/4 and its steps, 80 epochs, are those of MeanFlow's ablations.
    "imagenet256-b4": {
        "network": dict(patch_size=4, hidden_size=768, depth=12, num_heads=12),
        "td": dict(steps=400_000, batch=256, lr=1e-4, clip=1.0, ema_decay=0.9999, share_spans=0.25, w=1.5,
                   cfg_channels=3),
    },
    "imagenet-quick": {
        "network": {},
        "td": dict(steps=3, batch=4, lr=1e-4, clip=1.0, ema_decay=0.9999, share_spans=0.5, w=1.5, cfg_channels=3),
    },
}  # fmt: skip
LOOK_EVERY = 500  # steps between two pictures of samples


def check_section(section, blocks, accumulate):
    """BadInput if what a section of a plan asks for can't be done with a teacher of so many blocks, in so many parts.

    Call it before config.json is written: the folder would keep the bad value, and refuse the mended command as another
    run's."""
    if "batch" in section:
        in_parts(section["batch"], accumulate)
    stage_1 = "w" in section or section.get("lambda_td")
    if stage_1 and section["batch"] * section.get("share_spans", SHARE_SPANS) < 1:
        raise BadInput(f"a batch of {section['batch']} has no row with r < t, from which a student learns to jump: "
                       "raise --batch")  # fmt: skip
    parts = accumulate * world()[1]
    if section.get("student_steps") == 2 and section["batch"] // parts < 4:
        raise BadInput(f"a batch of {section['batch']} in {parts} parts leaves less than 4 rows in one, and a student "
                       "of 2 steps makes 1 row of 4 in 2 calls: lower --accumulate")  # fmt: skip
    if max(section.get("taps", (0,))) >= blocks:
        raise BadInput(f"blocks {tuple(section['taps'])} are to be tapped, and the teacher has {blocks}, counted from "
                       "0: name others by --taps")  # fmt: skip


def new_network(seed, stream, build):
    """build() on the CPU, with random weights that depend on (seed, stream) alone; the global state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng(seed, stream).initial_seed())
        return build()


def run_path(args):
    """The run folder that the command line means."""
    name = "-".join([args.data] + [str(args.size)] * (args.size != 16) + ["quick"] * args.quick)
    return Path(args.out or f"runs/{plan_name(args) if args.data == 'imagenet' else name}")


def run_flags(parser, args):
    """The flags by which the next script finds the run that the command line means."""
    names = ("data_dir", "cache", "teacher", "vae", "preset", "size", "out", "device")
    given = {name: str(getattr(args, name)) for name in names if getattr(args, name) != parser.get_default(name)}
    named = [f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in given.items()]
    return " ".join([f"--data {args.data}", *named, *["--quick"] * args.quick])


def plan_name(args):
    """The entry of PLANS that the command line asks for."""
    if args.data == "imagenet":
        return "imagenet-quick" if args.quick else args.preset
    return "quick" if args.quick else "default"


class ImageRun:
    """What the three scripts share of a run on images: its folder, settings (`plan`) and data, and its networks.

    args: the command line, of `add_run_arguments`. given: {(section, key): value or None}, settings from flags. A new
    run folder takes PLANS with these in it; one that is there has its settings, and these must agree with them.
    more: other sections. needs: stages that an earlier script has finished; without them nothing is written.
    Raises BadInput: no data, settings that can't be, a folder with others, a stage that is not there yet.
    """

    def __init__(self, args, given, more=None, needs=()):
        path = run_path(args)
        for stage in needs:
            if not (path / f"{stage}.pt").exists():
                raise BadInput(f"{path} holds no finished {stage}: run meanflow_td.py with the same --data first")
        self.device = torch.device(args.device)
        self.how = {"amp": args.amp, "accumulate": args.accumulate}
        self.passes = {"checkpointing": args.checkpointing, "compiling": args.compile}
        plan = PLANS[plan_name(args)] | (more or {})
        opened = self.open(args, plan)
        # what comes later overrides: PLANS, the folder's config.json, --quick's network, flags, what the data tells
        plan = copy.deepcopy(plan | {"data": {"seed": 0}} | RunFolder(path, {}).config)
        if args.quick:
            plan["network"] = dict(PLANS[plan_name(args)]["network"])
        for (section, key), value in given.items():
            if value is not None:
                plan[section][key] = value
        for name, section in opened.items():
            plan[name] |= section
        blocks = self.teacher.net.config["depth"] if args.data == "imagenet" else plan["network"]["depth"]
        for name in more or plan:
            check_section(plan[name], blocks, args.accumulate)
        self.begin(RunFolder(path, plan, named=more or ()), plan)
        if args.data == "glyphs":
            self.source = Glyphs(args.size, seed=self.seed)

    def open(self, args, plan):
        """Open the data; return the sections of the plan that follow from what was opened: "data", and maybe others."""
        channels, classes = 1, [str(digit) for digit in range(10)]
        if args.data == "folder":
            if args.data_dir is None:
                raise BadInput("--data folder needs --data-dir, a folder with one folder of images for each class")
            self.source = ImageFolder(args.data_dir, args.size)
            channels, classes = self.source.channels, self.source.classes
        about = dict(data=args.data, size=args.size, channels=channels, classes=classes)
        more = {"data_dir": str(Path(args.data_dir).resolve())} if args.data == "folder" else glyph_ranges()
        return {"data": about | more}

    def begin(self, folder, plan):
        """Take a run's folder and its plan."""
        self.folder, self.plan, about = folder, plan, plan["data"]
        self.seed, self.classes, self.channels = about["seed"], len(about["classes"]), about["channels"]
        self.shape = tuple(about.get("latent", (self.channels, about["size"], about["size"])))  # of what is diffused
        # the same labels and noise for every grid of samples: of ten classes, or of all if there are less
        rows, each = min(10, self.classes), 10 if self.shape[1] == about["size"] else -(-20 // min(10, self.classes))
        self.grid_y = (torch.arange(rows) * self.classes // rows).repeat_interleave(each).to(self.device)
        self.grid_eps = self.noise(len(self.grid_y), "grid")

    def noise(self, count, stream):
        """Noise (count, C, H, W) that depends on the stream alone: drawn on the CPU, so it is so on any device."""
        return torch.randn(count, *self.shape, generator=rng(0, stream)).to(self.device)

    def draw(self, batch, generator):
        """A batch for training: x_0 (batch, C, H, W), y (batch,). Of several ranks, each makes the rows that it trains
        on, and the others are NaN, of label -1: nobody may need them."""
        x, labels = self.source.draw(batch, generator, own_share())
        if len(x) == batch:
            return x, labels
        x_0, y = x.new_full((batch, *x.shape[1:]), math.nan), labels.new_full((batch,), -1)
        x_0[own_share()], y[own_share()] = x, labels
        return x_0, y

    def decode(self, x):
        """Images (B, C, H, W) in about [-1, 1] of what is diffused, which here are images already."""
        return x

    def network(self, stream, two_times=False, seed=None):
        """A DiT in its wrapper, with random weights that depend on the seed (else the run's) and the stream alone."""
        sizes = dict(wrapper="Teacher", input_size=self.plan["data"]["size"], in_channels=self.channels,
                     num_classes=self.classes) | self.plan["network"]  # of ImageNet, the plan has them all
        wrapper = WRAPPERS[sizes.pop("wrapper")]
        build = partial(DiT, **sizes, two_times=two_times)
        return wrapper(new_network(self.seed if seed is None else seed, stream, build)).to(self.device)

    def student(self, teacher):
        """A student that answers as its teacher without guidance does, whatever r is."""
        return type(teacher)(new_network(self.seed, "student", lambda: student_from_teacher(teacher.net)))

    def load(self, name, two_times=False):
        """The frozen network of a finished stage. BadInput if it is not finished."""
        state = self.folder.finished(name)
        if state is None:
            script = "meanflow_td.py" if name in ("teacher", "td") else "dmd_refine.py"
            raise BadInput(f"{self.folder.path} holds no finished {name}: run {script} with the same --data first")
        net = self.network("", two_times)
        try:
            net.load_state_dict(state["net"])
        except (KeyError, RuntimeError) as error:  # judged-....pt, say, or the teacher where a student is asked for
            raise BadInput(f"{self.folder.path / name}.pt is no {'student' if two_times else 'teacher'}: name another "
                           "stage") from error  # fmt: skip
        return net.requires_grad_(False)

    def load_teacher(self):
        """The frozen teacher, with the guidance of the run's plan."""
        teacher = self.load("teacher")
        teacher.w = self.plan["td"]["w"]
        return teacher

    def set_passes(self, *wrappers):
        """Tell networks how their blocks are to be computed: see models.DiT."""
        for wrapper in wrappers:
            wrapper.net.checkpointing, wrapper.net.compiling = self.passes["checkpointing"], self.passes["compiling"]

    def train(self, name, net, objective, *, section, sampler, seed=None):
        """Train `net` as the plan's section says, or find it finished: stage `name` of the run.

        sampler(net, eps, y) -> x_0: for the grids in samples/. seed: if not the run's."""

        def look(step, ema):
            self.save_samples(f"{name}-{step:06d}", sampler(ema, self.grid_eps, self.grid_y))

        def compute(keep):
            keys = ("steps", "batch", "lr", "lr_muon", "momentum", "clip", "ema_decay")
            plan = {key: self.plan[section][key] for key in keys if key in self.plan[section]}
            self.set_passes(net)
            ema, rows = train(net, self.draw, objective, **plan, **self.how, stream=section, name=name,
                              seed=self.seed if seed is None else seed, keep=keep,
                              look=None if world()[0] else look)  # fmt: skip
            self.folder.write_metrics(rows)
            return {"net": ema.state_dict(), "rows": rows}

        self.folder.stage(name, compute)

    def save_samples(self, name, x):
        """A grid of samples x (N, C, H, W), ten in a row, to samples/<name>.png."""
        save_grid(self.folder.path / "samples" / f"{name}.png", to_uint8(self.decode(x)), columns=10)


# ---------------------------------------------------------------------------------------------------------------------
# Runs on ImageNet: the paper's main experiment. The teacher is published, so there is no stage 0; all happens in the
# latents of Stable Diffusion's VAE. Nothing of this has run with the real weights and images: see the README.
# ---------------------------------------------------------------------------------------------------------------------

TEACHERS = {"SiT": SiTTeacher, "DiT": DiTTeacher}
WRAPPERS = {wrapper.__name__: wrapper for wrapper in (Teacher, SiTTeacher, DiTTeacher)}
DATA_HELP = ("ImageNet's training images (ILSVRC 2012, 138 GB; accounts at https://image-net.org/download.php): "
             "name by --data-dir the folder that holds n01440764/*.JPEG and 999 more; or by --cache their latents, as "
             "`python data.py --encode` writes them")  # fmt: skip


def missing_parts(args):
    """What a run on ImageNet needs and this machine does not have: a list of (what and where to put it, Published or
    None). Looks at no more than whether files are there."""
    missing = []
    places = [Path(place) for place in (args.cache, args.data_dir) if place]
    if not places:
        missing.append((DATA_HELP, None))
    missing += [(f"{place}, which is not there; what goes there: {DATA_HELP}", None)
                for place in places if not place.exists()]  # fmt: skip
    for flag, what, name in (("--teacher", "the teacher", args.teacher), ("--vae", "the VAE", args.vae)):
        path = weights_path(name)
        if name in PUBLISHED and not path.exists():
            missing.append((f"{what} {name}: download {PUBLISHED[name].url} and put it at {path}, or name it by {flag}",
                            PUBLISHED[name]))  # fmt: skip
        elif not path.exists():
            missing.append((f"{what}: there is no file {path}, which {flag} names", None))
    return missing


def require_parts(args):
    """Fetch the weights that are not there. BadInput that lists ALL that is missing, if anything can't be fetched."""
    missing = missing_parts(args)
    said = [what for what, _ in missing]
    if all(published for _, published in missing):  # else a download would only delay the bad news
        said = []
        for what, published in missing:
            try:
                fetch(published, "its flag")
            except BadInput as error:
                said.append(f"{what} ({error.__cause__})")
    if said:
        raise BadInput("\n".join(["this machine lacks", *(f"- {what}." for what in said)]))


def teacher_kind(name):
    """SiT or DiT, as a teacher's name or its file's name says. BadInput if it says neither, or both."""
    kinds = [kind for kind in TEACHERS if kind in (name if name in PUBLISHED else Path(name).name)]
    if len(kinds) != 1:
        raise BadInput(f"{name}: the file's name has to tell whether it is a SiT or a DiT, whose clocks differ, as in "
                       "SiT-XL-2-256.pt")  # fmt: skip
    return kinds[0]


def teacher_weights(path):
    """The weights {name: tensor} in a teacher's file. BadInput if it holds none."""
    try:
        return read_weights(path)
    except ValueError as error:
        raise BadInput(str(error)) from error


def teacher_net(path, weights):
    """The DiT of the sizes that a teacher's weights have, random still. BadInput, with the file's name, if of none."""
    try:
        return dit_from_weights(weights)
    except Exception as error:  # missing names and strange shapes can break any line there
        raise BadInput(f"{path} does not hold a DiT with all its parts ({in_short(error)})") from error


def load_teacher(name):
    """-> a frozen published teacher in the wrapper that its name asks for, and the sha256 of its file.

    name: one of PUBLISHED, fetched on first use; or a path whose file's name has SiT or DiT in it, since weights do not
    tell which of the two clocks they follow. Of a path, the file tells the sizes. BadInput: one sentence.
    """
    kind = teacher_kind(name)
    path = fetch(PUBLISHED[name], "--teacher") if name in PUBLISHED else Path(name)
    sha256, weights = sha256_file(path), teacher_weights(path)
    net = dit_by_name(name) if name in PUBLISHED else teacher_net(path, weights)
    try:
        load_weights(net, weights, path)
    except ValueError as error:
        raise BadInput(str(error)) from error
    return TEACHERS[kind](net.eval().requires_grad_(False)), sha256


def student_config(teacher, sizes):
    """The student's wrapper and sizes, for a plan: those of a preset (patch_size, ...), or the teacher's if {}."""
    known = teacher.net.config
    own = {**known, **sizes}
    if own == known:
        return {"wrapper": type(teacher).__name__, **known}
    return {"wrapper": "Teacher", **own, "learn_sigma": False}


class ImagenetRun(ImageRun):
    """A run on ImageNet, of a published teacher. args has more flags: cache, teacher, vae, preset.

    The student starts from the teacher's weights where it has the teacher's sizes, else from random ones. With random
    ones it is wrapped as a plain Teacher, a DiT's student too: DiTTeacher multiplies errors by 158 where samples start.
    Raises BadInput, before anything is written: parts that are missing, and data, VAE or teacher that do not fit.
    """

    def open(self, args, plan):
        require_parts(args)
        teacher, teacher_sha256 = load_teacher(args.teacher)
        self.teacher, known = teacher.to(self.device), teacher.net.config
        vae, vae_sha256 = load_vae(args.vae)
        self.vae = vae.to(self.device)
        side, factor = known["input_size"], 2 ** (len(self.vae.encoder.down_blocks) - 1)
        if args.cache:
            self.source = LatentCache(args.cache)
            if self.source.vae_sha256 != vae_sha256:
                raise BadInput(f"{args.cache} was made with another VAE (sha256 {self.source.vae_sha256[:8]}...) than "
                               f"--vae {args.vae} ({vae_sha256[:8]}...): name that one, or encode again")  # fmt: skip
        else:
            folder = ImageFolder(args.data_dir, factor * side)
            self.source = EncodedFolder(folder, self.vae, scale=SD_VAE_SCALE)
        shape, classes = (known["in_channels"], side, side), self.source.classes
        place = args.cache or args.data_dir
        if self.source.shape != shape:
            raise BadInput(f"{place} gives latents {self.source.shape}, but the teacher {args.teacher} takes {shape}: "
                           "it is a teacher for another size of images")  # fmt: skip
        if len(classes) != known["num_classes"]:
            raise BadInput(f"{place} has {len(classes)} classes, but the teacher {args.teacher} knows "
                           f"{known['num_classes']}: give the folder that has a folder for each of them")  # fmt: skip
        about = dict(data="imagenet", preset=plan_name(args), size=factor * side, channels=3, latent=list(shape),
                     teacher=type(teacher).__name__, classes=classes)  # fmt: skip
        about |= {"teacher sha256": teacher_sha256, "vae sha256": vae_sha256}
        return {"data": about, "network": student_config(self.teacher, plan["network"])}

    def decode(self, x):
        """Images (B, 3, H, W) in about [-1, 1] of latents x (B, C, h, w)."""
        return decode_latents(self.vae, x, SD_VAE_SCALE)

    def student(self, teacher):
        same = self.plan["network"] == {"wrapper": type(teacher).__name__, **teacher.net.config}
        return super().student(teacher) if same else self.network("student", two_times=True)

    def load_teacher(self):
        self.teacher.w, self.teacher.cfg_channels = self.plan["td"]["w"], self.plan["td"]["cfg_channels"]
        return self.teacher


def open_run(args, given, more=None, needs=()):
    """The ImageRun, or ImagenetRun, that the command line asks for."""
    return (ImagenetRun if args.data == "imagenet" else ImageRun)(args, given, more, needs)


def saved_run(path, device):
    """A run as its folder tells of it, without its data and its teacher: enough to load students. BadInput if none."""
    path = Path(path)
    if not (path / "config.json").exists():
        raise BadInput(f"{path} is no run folder: it has no config.json")
    folder = RunFolder(path, {})
    try:
        run = ImageRun.__new__(ImageRun)
        run.device = torch.device(device)
        run.begin(folder, folder.config)
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path / 'config.json'} is not the configuration of a run on images ({error})") from error
    return run


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def add_run_arguments(parser):
    """The flags that say which run is meant: the same for all three scripts."""
    parser.add_argument("--data", choices=("glyphs", "folder", "imagenet"), default="glyphs",
                        help="imagenet: in latents, from a published teacher (default: %(default)s)")  # fmt: skip
    parser.add_argument("--size", type=int, choices=(16, 32), default=16,
                        help="pixels; of imagenet, the teacher tells them (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", help="run folder (default: runs/glyphs, and for other data or sizes runs/...)")
    imagenet = parser.add_argument_group("for --data imagenet")
    imagenet.add_argument("--teacher", default="SiT-XL/2", metavar="SiT-XL/2|DiT-XL/2|PATH",
                          help="published, or a file with SiT or DiT in its name (default: %(default)s)")  # fmt: skip
    imagenet.add_argument("--vae", default="ema", metavar="ema|mse|PATH",
                          help="weights of Stable Diffusion's VAE (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="everything, small: to see that it works, not how well")


def add_training_arguments(parser):
    """The flags on a run's data and how it is computed: the same for both stages."""
    parser.add_argument("--data-dir", help="for folder and imagenet: a folder with one folder of images for each class")
    parser.add_argument("--batch", type=whole_number(1, 2**16), help="images in an update (default: the plan's)")
    parser.add_argument("--amp", choices=("bf16", "off"),
                        help="matrix products in bf16 (default: bf16 on cuda, off elsewhere)")  # fmt: skip
    parser.add_argument("--accumulate", type=whole_number(1, 2**16), default=1, metavar="N",
                        help="take a batch in N parts: less memory, the same gradient (default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true",
                        help="keep less of a pass and compute it again: less memory, a third more time")
    parser.add_argument("--compile", action="store_true",
                        help="networks' blocks through torch.compile, which takes a minute at first; du/dt is not")
    parser.add_argument("--cache", help="of imagenet: latents by `data.py --encode`; else images are encoded as drawn")
    parser.add_argument("--preset", choices=("imagenet256-xl2", "imagenet256-b4"), default="imagenet256-xl2",
                        help="of imagenet, xl2: a student like the teacher; b4: a small one (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true",
                        help="of --data imagenet: print sizes, memory and what is missing, and stop")  # fmt: skip


def check_training(parser, args):
    """Fill in --amp, and exit with 2 where flags can't go together."""
    check_device(parser, args.device)
    if args.amp is None:
        args.amp = "bf16" if torch.device(args.device).type == "cuda" else "off"
    if args.dry_run and args.data != "imagenet":
        parser.error("--dry-run is for --data imagenet: the others fit on any machine")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    add_training_arguments(parser)
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), help="of data and networks (default: 0)")
    parser.add_argument("--teacher-steps", type=whole_number(1), help="updates of the teacher")
    parser.add_argument("--td-steps", type=whole_number(1), help="updates of the student")
    parser.add_argument("--w", type=positive_number,
                        help="the teacher's guidance, baked in; 1 is none (default: "
                        f"{PLANS['default']['td']['w']:g}, of imagenet {PLANS['imagenet256-xl2']['td']['w']:g})")
    parser.add_argument("--cfg-channels", type=whole_number(1, 4), metavar="N",
                        help="of imagenet: guide the first N of 4 channels (default: 3, as published)")  # fmt: skip
    args = parser.parse_args(arguments)
    check_training(parser, args)
    if args.cfg_channels and args.data != "imagenet":
        parser.error("--cfg-channels is of --data imagenet, whose latents have 4")
    if args.teacher_steps and args.data == "imagenet":
        parser.error("--teacher-steps is for teachers that are trained here: that of --data imagenet is published")
    given = {("data", "seed"): args.seed, ("td", "steps"): args.td_steps, ("td", "w"): args.w,
             ("td", "batch"): args.batch, ("td", "cfg_channels"): args.cfg_channels}  # fmt: skip
    if args.data != "imagenet":
        given |= {("teacher", "steps"): args.teacher_steps, ("teacher", "batch"): args.batch}
    with sentences(parser, None if args.dry_run else args.device) as held:
        if args.dry_run:
            from dmd_refine import dry_run  # stage 2 knows both stages

            sys.exit(dry_run(args, given))
        with in_turn():
            run = open_run(args, given)
        held.enter_context(alone(run.folder.path))
        if args.data != "imagenet":
            run.train("teacher", run.network("teacher"), partial(teacher_objective, null_class=run.classes),
                      section="teacher", sampler=partial(sample_ode, steps=25))  # fmt: skip
        teacher = run.load_teacher()
        run.set_passes(teacher)
        spans = run.plan["td"].get("share_spans", SHARE_SPANS)
        objective = partial(student_objective, teacher=teacher, share_spans=spans)
        run.train("td", run.student(teacher), objective, section="td", sampler=sample)
        print(f"In {run.folder.path}: {'' if args.data == 'imagenet' else 'teacher.pt, '}td.pt, metrics.csv, and grids "
              f"in samples/. Next: python dmd_refine.py {run_flags(parser, args)}")  # fmt: skip


if __name__ == "__main__":
    main()

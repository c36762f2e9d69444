"""What a step costs on this machine, against its count of network passes: `python tests/bench.py`.

One forward pass of the network is F a row, a backward pass 2F, so flow matching costs 3F. All else is made of such
passes, and is measured in F, a third of flow matching's time in the same process. So the table says how much of a
step's time is arithmetic that has to be, and how much is not.

    TD            3F, 2F of the guided teacher, and 2F where r < t: the student and its tangent
    fake branch   4F: the student's sample, and flow matching on it
    discriminator (1 + 2s) F: the student's sample, features of data and samples; s: the last tap's place in the depth
    generator     (6 + 2s) F: the student's sample, 2F of the guided teacher, the fake branch, the features; back by
                  the teacher to its input alone, which is half of a backward pass, and through the student
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from awd import AdaptiveWeightedDiscriminator  # noqa: E402
from data import draw_glyphs, join, progress, rng  # noqa: E402
from dmd_refine import discriminator_loss, fake_loss, generator_loss  # noqa: E402
from meanflow_td import generate, sample, student_loss, teacher_loss, update  # noqa: E402
from models import DiT, Velocity  # noqa: E402

SIZE = dict(input_size=32, patch_size=2, hidden_size=384, depth=12, num_heads=6)  # S/2: 33 M parameters, 256 tokens
QUICK = dict(input_size=16, patch_size=4, hidden_size=32, depth=4, num_heads=2)
SPANS, FAKE_UPDATES = 0.25, 2  # MeanFlow's share of rows with r < t on ImageNet; updates of the fake branch in a step


def steps_to_time(size, batch, device, checkpointing, compiling):
    """{name: (count of passes, what to call)}: networks of one size with random weights, data drawn beforehand."""
    torch.manual_seed(0)
    build = partial(DiT, in_channels=1, num_classes=10, **size)
    teacher, student, fake = (Velocity(build(two_times=two)).to(device) for two in (False, True, False))
    DiT.checkpointing, DiT.compiling = checkpointing, compiling
    teacher.requires_grad_(False).w = 1.5
    taps = tuple(size["depth"] * k // 4 - 1 for k in (1, 2, 3, 4))
    discriminator = AdaptiveWeightedDiscriminator([size["hidden_size"]] * len(taps)).to(device)
    discriminator.power_iteration()
    x_0, y = draw_glyphs(batch, rng(0, "bench", device=device), size["input_size"])
    eps = torch.randn(x_0.shape, generator=rng(0, "noise", device=device), device=device)
    optimizers = {net: torch.optim.Adam(net.parameters(), fused=True) for net in (student, fake, discriminator)}

    def step(net, loss_of):
        for other in (student, fake, discriminator):
            other.requires_grad_(other is net)
        update(net, optimizers[net], loss_of, lr=1e-6, words=(0, "bench"), amp=device.type == "cuda")

    def draw(generator):
        return x_0, y

    flow = partial(teacher_loss, fake, draw=draw, null_class=10)
    td = partial(student_loss, student, draw=draw, teacher=teacher, share_spans=SPANS)
    return {
        "flow matching": (3, lambda: step(fake, flow)),
        "TD": (5 + 2 * SPANS, lambda: step(student, td)),
        "fake branch": (4, lambda: step(fake, lambda g: fake_loss(fake, sample(student, eps, y), y, g))),
        "discriminator": (3, lambda: step(discriminator, lambda g: discriminator_loss(
            discriminator, teacher, x_0, sample(student, eps, y), y, g, taps=taps))),
        "generator": (8, lambda: step(student, lambda g: generator_loss(
            teacher, fake, discriminator, generate(student, eps, y), y, g, lambda_adv=0.01, taps=taps))),
        "student, 1 call": (1, lambda: sample(student, eps, y)),
        "teacher, 1 guided call": (2, torch.no_grad()(lambda: teacher(eps, t=eps.new_ones(batch), y=y))),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="the table has medians over them (default: %(default)s)")
    for flag in ("--checkpointing", "--compile"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--quick", action="store_true", help="small networks, to see that it works")
    parser.add_argument("--out", type=Path, help="a file for the table as JSON")
    args = parser.parse_args()
    device, size = join(args.device), QUICK if args.quick else SIZE
    # where one thread computes, its own time counts: others on the machine disturb it less
    clock = time.process_time if torch.get_num_threads() == 1 and args.device == "cpu" else time.perf_counter
    steps = steps_to_time(size, args.batch, device, args.checkpointing, args.compile)
    seconds = {name: [] for name in steps}
    for k in progress(range(args.rounds + 1), "bench"):
        for name, (_, call) in steps.items():
            start = clock()
            call()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if k:  # the first round warms up
                seconds[name].append(clock() - start)
    costs = {name: (count, float(np.median(seconds[name]))) for name, (count, _) in steps.items()}
    parts = [costs[name] for name in ["fake branch"] * FAKE_UPDATES + ["discriminator", "generator"]]
    costs["refinement, a step"] = tuple(map(sum, zip(*parts)))
    one = costs["flow matching"][1] / 3  # F of the batch
    rows = [{"what": name, "count": count, "time/F": spent / one, "time/count": spent / one / count,
             "time/flow matching": spent / one / 3} for name, (count, spent) in costs.items()]  # fmt: skip
    for row in rows:
        print(f"{row['what']:24}" + "".join(f"{key} {value:<9.3f}" for key, value in row.items() if key != "what"))
    machine = {"torch": torch.__version__, "device": args.device, "threads": torch.get_num_threads(),
               "batch": args.batch, "ms/F of a row": 1000 * one / args.batch, **size}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Several ranks share the work of one run, and end with what one process ends with.

Ranks are real processes that talk by gloo, but most of them are forked from one that has imported torch already, and
without torchrun: a rank of its own makes what it is told. The slow test starts torchrun itself.
"""

import json
import multiprocessing
import os
from pathlib import Path
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

import data
import dmd_refine
import evaluate
import meanflow_td
import toy2d
from awd import AdaptiveWeightedDiscriminator
from helpers import ROOT, SAVE_EACH_STEP, broken, tiny_teacher, without_times
from test_latents import SIZE, TRUNCATED, make_tree, tiny_vae
from test_runs import contents, draw, equal

SCRIPTS = {"data": data, "meanflow_td": meanflow_td, "dmd_refine": dmd_refine, "evaluate": evaluate, "toy2d": toy2d}


def work(job, arguments, out, environment):
    """One rank: job(*arguments), its result in the file `out`, what it says in others beside it."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    data.tqdm.set_lock(threading.RLock())  # else a semaphore of the system is left behind by a killed process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = open(f"{out}.out", "w"), open(f"{out}.err", "w")
    torch.save(job(*arguments), out)


@pytest.fixture(scope="module")
def fork():
    """start(job, arguments, out, environment) -> process."""
    context = multiprocessing.get_context("forkserver")
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])  # the server imports this file
    context.set_forkserver_preload(["test_parallel"])

    def start(*arguments):
        process = context.Process(target=work, args=arguments)
        process.start()
        return process

    yield start
    os.environ.pop("PYTHONPATH") if old is None else os.environ.update(PYTHONPATH=old)


@pytest.fixture
def ranks(fork, tmp_path):
    """ranks(job, *arguments, count=2) -> [(exit code, result, stdout, stderr) of each rank]."""

    def run(job, *arguments, count=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        outs = [tmp_path / f"rank{k}" for k in range(count)]
        processes = [fork(job, arguments, out, {**shared, "RANK": str(k), "LOCAL_RANK": str(k)})
                     for k, out in enumerate(outs)]  # fmt: skip
        for process in processes:
            process.join(300)
        told = []
        for process, out in zip(processes, outs):
            result = torch.load(out, weights_only=False) if out.exists() else None
            said = [Path(f"{out}.{kind}").read_text() for kind in ("out", "err")]
            told.append((process.exitcode, result, *said))
            out.unlink(missing_ok=True)
        return told

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with train/, vae.pt, and the latents in cache/."""
    root = tmp_path_factory.mktemp("imagenet")
    make_tree(root / "train")
    (root / "train" / TRUNCATED).unlink()
    torch.save(tiny_vae().state_dict(), root / "vae.pt")
    encode(root, root / "cache")
    return root


def encode(root, cache):
    data.main(["--encode", "--data-dir", str(root / "train"), "--vae", str(root / "vae.pt"), "--size", str(SIZE),
               "--batch", "2", "--shard-images", "2", "--device", "cpu", "--cache", str(cache)])  # fmt: skip


def test_some_rows_of_a_draw_are_those_of_the_whole(made):
    folder = data.ImageFolder(made / "train", size=SIZE)
    sources = [data.Glyphs(16), folder, data.LatentCache(made / "cache"),
               data.EncodedFolder(folder, tiny_vae(), vae_sha256="", scale=0.18215)]  # fmt: skip
    for source in sources:
        generator = data.rng(0, "draw")
        whole = source.draw(7, generator)
        for rows in (slice(0, None, 3), slice(2, None, 3), slice(1, None, 2)):
            again = data.rng(0, "draw")
            x_0, y = source.draw(7, again, rows)
            torch.testing.assert_close(x_0, whole[0][rows], rtol=0, atol=1e-6)  # a VAE's rounding knows its batch
            assert torch.equal(y, whole[1][rows])
            assert torch.equal(again.get_state(), generator.get_state())  # what follows is drawn as ever


MUTATIONS = {
    "the mean": [("x.copy_(part.view_as(x))", "x.copy_(part.view_as(x) / world()[1])")],
    "no sum": [("            dist.all_reduce(flat)", "            pass")],
    "one bucket alone": [("if size < BUCKET and i < len(tensors):", "if i < len(tensors) or size > BUCKET:")],
    "all rows for all": [("return slice(world()[0], None, world()[1])", "return slice(0, None, world()[1])")],
}  # fmt: skip


def fit(steps, mutation=None, accumulate=1):
    """Both objectives of stages 0 and 1, and stage 2 -> {name: (gradients, all weights and buffers, rows)}.

    Batches of 8 without torchrun, or of 8 shared by the ranks. mutation: how data.add_up and the like are broken."""
    module, td, dmd = data, meanflow_td, dmd_refine
    if mutation:
        module = broken(data, *MUTATIONS[mutation])
        td.add_up, td.own_share = module.add_up, module.own_share
    module.BUCKET = 2000  # bytes: several buckets, of one tensor or more

    def states(*nets):
        grads = [p.grad for net in nets for p in net.parameters() if p.grad is not None]
        return grads, [entry for net in nets for entry in net.state_dict().values()]

    found = {}
    how = dict(steps=steps, batch=8, seed=0, stream="t", name="t", accumulate=accumulate, log_every=1)
    with module.ranks("cpu"):
        teacher = tiny_teacher(9).requires_grad_(False)
        for name, two_times, objective in [
            ("teacher", False, lambda *args, **rows: td.teacher_objective(*args, null_class=3, **rows)),
            ("student", True, lambda *args, **rows: td.student_objective(*args, teacher=teacher, **rows)),
        ]:
            net = tiny_teacher(1, two_times)
            ema, rows = td.train(net, own_draw, objective, lr=1e-2, **how)
            found[name] = *states(net, ema), without_times(rows)
        for pooling, student_steps in (("attention", 2), (None, 1)):
            student, fake = tiny_teacher(1, two_times=True), tiny_teacher(3)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                discriminator = AdaptiveWeightedDiscriminator([16, 16], pooling) if pooling else None
            rate = 0.0 if steps == 1 else 1e-2  # Adam's first step is a matter of signs; rounding decides some
            ema, rows = dmd.refine(student, teacher, fake, own_draw, discriminator=discriminator, taps=(0, 1), lr=rate,
                                   lr_fake=rate, lr_discriminator=rate, lambda_td=0.5, student_steps=student_steps,
                                   **how)  # fmt: skip
            found[f"refined, {pooling}"] = *states(student, fake, ema, *[discriminator] * bool(pooling)), rows
            without_times(rows)
    return found


def own_draw(batch, generator):
    """Images and labels, of which a rank sees its own rows alone."""
    source = type("Source", (), {"draw": lambda batch, generator, rows: [x[rows] for x in draw(batch, generator)]})
    run = meanflow_td.ImageRun.__new__(meanflow_td.ImageRun)
    run.source = source
    return run.draw(batch, generator)


def check_sums(whole, told):
    """The gradients, and what is logged, of two ranks are those of one process; on both they are the same bits."""
    assert [code for code, *_ in told] == [0, 0], told[0][3] + told[1][3]
    first, second = (found for _, found, _, _ in told)
    for name, (grads, _, rows) in whole.items():
        assert equal(first[name], second[name]), name
        assert max(g.abs().max() for g in grads) > 1e-3
        for a, b in zip(first[name][0], grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(first[name][2], rows, strict=True):
            assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=0.3) for key in a.keys()), (a, b)


def test_x(ranks):
    whole = fit(1)
    told = ranks(fit, 1)
    for name, (grads, _, rows) in whole.items():
        a = told[0][1][name]
        print(name, max((x - y).abs().max() for x, y in zip(a[0], grads)), max(g.abs().max() for g in grads), equal(told[0][1][name], told[1][1][name]))
        print(a[2]); print(rows)

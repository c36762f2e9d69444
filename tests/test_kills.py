"""Each script, SIGKILLed again and again at random moments, ends with the same bits as one that was left alone.

The processes are real ones, but all are forked from one that has imported torch already, and the networks are tiny and
save themselves at each step: so that dozens of kills take a minute.
"""

import contextlib
import csv
import multiprocessing
import os
from pathlib import Path
import random
import signal
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
from helpers import ROOT
from test_evaluate import FakeNet
from test_latents import contents, make_tree, tiny_vae

SCRIPTS = {"data": data, "meanflow_td": meanflow_td, "dmd_refine": dmd_refine, "evaluate": evaluate, "toy2d": toy2d}
TOY = dict(widths=(4, 6), hd_width=4, teacher_steps=5, td_steps=3, refine_steps=3, unify_rounds=2, unify_widths=(4,),
           samples=200, ode_steps=2)  # fmt: skip


def work(script, arguments, last, written, moment, where):
    """A script's main as a process of its own. last: a folder that gets what finished stages had last saved on their
    way, nets and optimisers. written: a shared number, of the files written so far; at the moment-th the process is
    SIGKILLed, by itself or by its worker, where = 0 before it is written, 1 once it is half there, 2 when it is."""
    main = os.getpid()
    torch.set_num_threads(1)
    data.tqdm.set_lock(threading.RLock())  # else a semaphore of the system is left behind by each kill
    sys.stdout = sys.stderr = open(os.devnull, "w")
    toy2d.PLANS["quick"] = TOY
    train_classifier, write_whole = evaluate.train_classifier, data.write_whole
    evaluate.train_classifier = lambda size: train_classifier(size, steps=3, batch=16)
    fork = multiprocessing.get_context("fork")  # workers do as we do here
    multiprocessing.get_context = lambda kind: fork

    def counted(path, write):
        written.value += 1

        def die(here):
            if written.value >= moment and here == where:
                with contextlib.suppress(ProcessLookupError):  # a worker may be there still
                    os.kill(main, signal.SIGKILL)

        def write_and_die(file):
            write(file)
            die(1)

        die(0)
        write_whole(path, write_and_die)
        die(2)

    def discard(keep):
        if keep.path.exists():
            os.replace(keep.path, last / keep.path.name)
        keep.older.unlink(missing_ok=True)

    data.write_whole, data.Keep.discard, data.Keep.EVERY = counted, discard, 0
    evaluate.SAVE_SECONDS = -1
    evaluate.load_inception = lambda path: (FakeNet(), evaluate.INCEPTION_SHA + 56 * "0")
    vars(evaluate).update(FakeNet.dims)
    SCRIPTS[script].main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def fork():
    """start(script, arguments, last) -> exit code, number of files written."""
    context = multiprocessing.get_context("forkserver")
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])  # the server imports this file
    context.set_forkserver_preload(["test_kills"])

    def start(*arguments, moment=sys.maxsize, where=0):
        written = context.Value("i", 0, lock=False)
        process = context.Process(target=work, args=(*arguments, written, moment, where))
        process.start()
        process.join(300)
        return process.exitcode, written.value

    yield start
    os.environ.pop("PYTHONPATH") if old is None else os.environ.update(PYTHONPATH=old)


def left_alone(fork, *arguments):
    """Run to the end; the number of files written."""
    code, written = fork(*arguments)
    assert code == 0, arguments
    return written


def kill(fork, dice, times, total, *arguments):
    """Run, SIGKILL at `times` random moments of a run that writes `total` files, then run to the end."""
    moments, before = sorted(dice.sample(range(1, total), times)), 0
    for moment in moments:
        code, _ = fork(*arguments, moment=moment - before, where=dice.randrange(3))
        assert code == -signal.SIGKILL, (code, arguments)
        before = moment
        folder, deadline = arguments[1][-1], time.monotonic() + 30
        # forked workers share their dead parent's lock
        while "--workers" in arguments[1] and folder.exists() and time.monotonic() < deadline:
            with contextlib.suppress(data.BadInput), data.alone(folder):
                break
            time.sleep(0.01)
    left_alone(fork, *arguments)


TIMES = {"seconds_per_step", "seconds", "finished", "ms_per_image"}


def same(a, b):
    """Equal to the bit: dicts, lists, tensors and numbers in them, but for how long something took."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - TIMES)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def everything(folder, last):
    """All that a run leaves: finished stages, the last state of nets and optimisers, metrics, pictures of samples."""
    states = {path.name: data.read_checkpoint(path) for path in [*folder.glob("*.pt"), *last.iterdir()]}
    with open(folder / "metrics.csv") as file:
        next(file)
        rows = sorted(csv.DictReader(file), key=lambda row: (row["network"], row["seed"], int(row["step"])))
    samples = {path.name: path.read_bytes() for path in folder.glob("samples/*")}
    others = sorted(path.name for path in folder.iterdir())
    return {"states": states, "rows": rows, "samples": samples, "others": others}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_dozens_of_kills_change_nothing(fork, tmp_path):
    dice, begin = random.Random(0), time.monotonic()
    commands = [  # script, flags, kills
        ("meanflow_td", "--teacher-steps 4 --td-steps 4", 6),
        ("dmd_refine", "--name two --refine-steps 3 --student-steps 2 --lambda-td 1", 3),
        ("dmd_refine", "--ablation --refine-steps 2 --seeds 1 --workers 2 --count 100", 5),
        ("evaluate", "--data glyphs --count 110", 3),
    ]
    for chain in (commands, [("toy2d", "--workers 2", 4), ("toy2d", "--workers 1 --unify", 2)]):
        name = chain[0][0]
        folders = {who: (tmp_path / f"{name}-{who}", tmp_path / f"{name}-{who}-last") for who in ("whole", "killed")}
        for _, last in folders.values():
            last.mkdir()
        for script, arguments, times in chain:
            arguments = [*arguments.split(), "--quick", "--out"]
            folder, last = folders["whole"]
            total = left_alone(fork, script, [*arguments, folder], last)
            folder, last = folders["killed"]
            kill(fork, dice, times, total, script, [*arguments, folder], last)
            seconds = time.monotonic() - begin
            print(f"{script}: {times} kills of a run that writes {total} files, {seconds:.0f} s", flush=True)
        whole, killed = (everything(*pair) for pair in folders.values())
        for part in whole:
            assert same(killed[part], whole[part]), (name, part)
        optimisers = [state for file, state in whole["states"].items() if file.endswith(".unfinished")]
        assert len(optimisers) >= 8 and not list(folders["killed"][0].glob("*.partial"))
    make_tree(tmp_path / "train")
    torch.save(tiny_vae().state_dict(), tmp_path / "vae.pt")
    encode = ["--encode", "--data-dir", tmp_path / "train", "--vae", tmp_path / "vae.pt", "--size", "64",
              "--batch", "2", "--shard-images", "1", "--cache"]  # fmt: skip
    total = left_alone(fork, "data", [*encode, tmp_path / "whole"], tmp_path)
    kill(fork, dice, 3, total, "data", [*encode, tmp_path / "killed"], tmp_path)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    student = tmp_path / "meanflow_td-whole" / "td.pt"
    draw = ["--sample", "20", "--batch", "2", "--checkpoint", student, "--out"]
    total = left_alone(fork, "evaluate", [*draw, tmp_path / "drawn"], tmp_path)
    kill(fork, dice, 3, total, "evaluate", [*draw, tmp_path / "drawn-killed"], tmp_path)
    assert contents(tmp_path / "drawn-killed") == contents(tmp_path / "drawn")
    score = ["--images", tmp_path / "drawn" / "images", "--reference", "glyphs", "--glyphs", "24", "--batch", "2",
             "--allow-small", "--out"]  # fmt: skip
    total = left_alone(fork, "evaluate", [*score, tmp_path / "scored"], tmp_path)
    kill(fork, dice, 3, total, "evaluate", [*score, tmp_path / "scored-killed"], tmp_path)
    (one,), (other,) = (data.read_json(tmp_path / name / "results.json") for name in ("scored", "scored-killed"))
    assert one["metrics"] == other["metrics"] and one["fingerprint"] == other["fingerprint"]

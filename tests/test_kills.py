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


def work(script, arguments, last, written):
    """A script's main as a process of its own. last: a folder that gets what finished stages had last saved on their
    way, nets and optimisers. written: a shared number, of the files written so far."""
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
        write_whole(path, write)

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
    """start(script, arguments, last) -> process, number of files written."""
    context = multiprocessing.get_context("forkserver")
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])  # the server imports this file
    context.set_forkserver_preload(["test_kills"])

    def start(*arguments):
        written = context.Value("i", 0, lock=False)
        process = context.Process(target=work, args=(*arguments, written))
        process.start()
        return process, written

    yield start
    os.environ.pop("PYTHONPATH") if old is None else os.environ.update(PYTHONPATH=old)


def left_alone(fork, *arguments):
    """Run to the end; the number of files written."""
    process, written = fork(*arguments)
    process.join(300)
    assert process.exitcode == 0, arguments
    return written.value


def kill(fork, dice, times, total, *arguments):
    """Run, SIGKILL at `times` random moments of a run that writes `total` files, then run to the end; the number of
    kills, for on a busy machine a process may have ended before it is reached."""
    moments, before, kills = sorted(dice.sample(range(1, total), times)), 0, 0
    for moment in moments:
        process, written = fork(*arguments)
        while process.is_alive() and written.value < moment - before:
            time.sleep(0.0002)
        time.sleep(dice.random() * 0.01)  # somewhere in or after the write
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        before, kills = moment, kills + 1
        folder, deadline = arguments[1][-1], time.monotonic() + 30
        # forked workers share their dead parent's lock
        while "--workers" in arguments[1] and folder.exists() and time.monotonic() < deadline:
            with contextlib.suppress(data.BadInput), data.alone(folder):
                break
            time.sleep(0.01)
    left_alone(fork, *arguments)
    return kills


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
    dice, kills, begin = random.Random(0), 0, time.monotonic()
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
            kills += kill(fork, dice, times, total, script, [*arguments, folder], last)
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
    kills += kill(fork, dice, 3, total, "data", [*encode, tmp_path / "killed"], tmp_path)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    student = tmp_path / "meanflow_td-whole" / "td.pt"
    draw = ["--sample", "20", "--batch", "2", "--checkpoint", student, "--out"]
    total = left_alone(fork, "evaluate", [*draw, tmp_path / "drawn"], tmp_path)
    kills += kill(fork, dice, 3, total, "evaluate", [*draw, tmp_path / "drawn-killed"], tmp_path)
    assert contents(tmp_path / "drawn-killed") == contents(tmp_path / "drawn")
    score = ["--images", tmp_path / "drawn" / "images", "--reference", "glyphs", "--glyphs", "24", "--batch", "2",
             "--allow-small", "--out"]  # fmt: skip
    total = left_alone(fork, "evaluate", [*score, tmp_path / "scored"], tmp_path)
    kills += kill(fork, dice, 3, total, "evaluate", [*score, tmp_path / "scored-killed"], tmp_path)
    (one,), (other,) = (data.read_json(tmp_path / name / "results.json") for name in ("scored", "scored-killed"))
    assert one["metrics"] == other["metrics"] and one["fingerprint"] == other["fingerprint"]
    assert kills >= 25  # of 32

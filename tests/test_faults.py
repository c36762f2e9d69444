"""What goes wrong around a run: disks, signals, second processes, dead workers, numbers that are not finite, damage.

The README's table "When something goes wrong" names these tests, and the last one here reads it.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import dmd_refine
import evaluate
import meanflow_td
import toy2d
from data import Diverged, Keep, Patience, RunFolder, alone
from helpers import ROOT
from test_runs import Stopped, draw_points, equal, fit_refined, fit_student, points_net, work

TEACHER = ["--quick", "--teacher-steps", "4", "--td-steps", "4"]


def end(module, *arguments):
    """A script's main in this process: its exit code, 0 if it just returns."""
    try:
        module.main(list(map(str, arguments)))
    except SystemExit as stop:
        return stop.code
    return 0


def said(capsys, *words):
    """The last line on stderr, in which these words must stand, and no traceback before it."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert all(word in last for word in words), last
    return last


def weights(folder, stage):
    return data.read_checkpoint(folder / f"{stage}.pt")["net"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    meanflow_td.main([*TEACHER, "--out", str(folder)])
    return folder


@pytest.fixture
def each_step(monkeypatch):
    monkeypatch.setattr(Keep, "EVERY", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------


class SmallDisk(io.FileIO):
    """A file on a disk that has `room` bytes left."""

    room = math.inf

    def write(self, content):
        SmallDisk.room -= len(content)
        if SmallDisk.room < 0:
            raise OSError(28, "No space left on device")
        return super().write(content)


def open_on_small_disk(path, mode="r"):
    return io.BufferedRandom(SmallDisk(path, "w+")) if mode == "w+b" else io.open(path, mode)


def test_a_full_disk_ends_with_a_sentence_and_loses_nothing(tmp_path, capsys, monkeypatch, each_step, whole):
    out, save = tmp_path / "run", Keep.save

    def fill(keep, parts, steps, rows):
        monkeypatch.setattr(SmallDisk, "room", 5000 if steps == 3 else math.inf)  # a part of the third checkpoint
        save(keep, parts, steps, rows)

    monkeypatch.setattr(data, "open", open_on_small_disk, raising=False)
    monkeypatch.setattr(Keep, "save", fill)
    assert end(meanflow_td, *TEACHER, "--out", out) == 2
    said(capsys, "No space left on device; what was saved is kept, and the same command goes on")
    assert data.read_checkpoint(out / "teacher.unfinished.older")["steps"] == 2 and not list(out.rglob("*.partial"))
    monkeypatch.setattr(Keep, "save", save)
    monkeypatch.setattr(SmallDisk, "room", math.inf)
    assert end(meanflow_td, *TEACHER, "--out", out) == 0
    assert equal(weights(out, "td"), weights(whole, "td"))


def test_a_read_only_folder_is_refused_before_any_work(tmp_path, capsys, monkeypatch, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "td.pt").unlink()
    out.chmod(0o555)
    if os.access(out, os.W_OK):  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(meanflow_td, "train", None)
    new = tmp_path / "new"
    new.mkdir(0o555)
    for module, folder, arguments in ((meanflow_td, out, TEACHER), (toy2d, new, ["--quick"])):
        assert end(module, *arguments, "--out", folder) == 2
        said(capsys, f"can't write to {folder}: name another folder")
    out.chmod(0o755)


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C, and other processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c(monkeypatch):
    """Whoever started pytest may ignore Ctrl-C; here it is heard."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(Patience, "asked", False)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("full", [
    lambda: torch.empty(2**55),
    lambda: bytearray(2**62),
    lambda: exec("raise torch.OutOfMemoryError('CUDA out of memory. Tried')"),
])  # fmt: skip
def test_a_full_memory_ends_with_a_sentence_and_loses_nothing(tmp_path, capsys, monkeypatch, each_step, whole, full):
    objective, calls = meanflow_td.teacher_objective, []

    def fill(*arguments, **options):
        calls.append(1)
        return objective(*arguments, **options) if len(calls) < 3 else full()

    with monkeypatch.context() as patch:
        patch.setattr(meanflow_td, "teacher_objective", fill)
        assert end(meanflow_td, *TEACHER, "--out", tmp_path / "run") == 2
    said(capsys, "out of memory (", "a lower --batch, a higher --accumulate and fewer --workers")
    assert data.read_checkpoint(tmp_path / "run" / "teacher.unfinished")["steps"] == 2
    assert end(meanflow_td, *TEACHER, "--out", tmp_path / "run") == 0
    assert equal(weights(tmp_path / "run", "td"), weights(whole, "td"))


@pytest.mark.parametrize("times, kept", [(1, 2), (2, None)])
def test_ctrl_c_once_saves_the_step_and_twice_stops_at_once(tmp_path, capsys, monkeypatch, ctrl_c, whole, times, kept):
    objective, calls = meanflow_td.teacher_objective, []

    def press(*arguments, **options):
        calls.append(1)
        for _ in range(times if len(calls) == 2 else 0):
            signal.raise_signal(signal.SIGINT)
        return objective(*arguments, **options)

    monkeypatch.setattr(meanflow_td, "teacher_objective", press)
    assert end(meanflow_td, *TEACHER, "--out", tmp_path / "run") == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and len(calls) == 2
    said(capsys, "stopped; the same command goes on from where it last saved")
    path = tmp_path / "run" / "teacher.unfinished"
    assert path.exists() == (kept is not None)
    if kept:
        assert data.read_checkpoint(path)["steps"] == kept
    monkeypatch.setattr(Patience, "asked", False)
    assert end(meanflow_td, *TEACHER, "--out", tmp_path / "run") == 0
    assert equal(weights(tmp_path / "run", "td"), weights(whole, "td"))


def test_ctrl_c_in_a_stage_without_steps_waits_until_it_is_kept(tmp_path, ctrl_c):
    run = RunFolder(tmp_path / "run", {})

    def compute(keep):
        signal.raise_signal(signal.SIGINT)
        return {"number": 1}

    with pytest.raises(KeyboardInterrupt):
        run.stage("one", compute)
    assert run.finished("one")["number"] == 1
    with pytest.raises(KeyboardInterrupt):  # a worker that has jobs left begins none
        run.stage("two", compute)
    assert run.finished("two") is None


def test_a_second_process_on_one_run_folder_is_refused(tmp_path, capsys, whole):
    out, toy = tmp_path / "run", tmp_path / "toy"
    shutil.copytree(whole, out)
    RunFolder(toy, toy2d.configuration("checkerboard", toy2d.PLANS["quick"]))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with alone(out), alone(toy):
        for module, arguments in ((meanflow_td, ["--out", out]), (dmd_refine, ["--out", out]),
                                  (dmd_refine, ["--ablation", "--out", out]), (toy2d, ["--out", toy]),
                                  (evaluate, ["--data", "glyphs", "--out", out])):  # fmt: skip
            assert end(module, "--quick", *arguments) == 2
            said(capsys, f"another process works in {arguments[-1]}: wait until it is done")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with alone(out):  # it is free again
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = """import os, sys, data
with data.alone(sys.argv[1]):
    open(sys.argv[1] + "/a.1.partial", "w")
    os.abort()
"""
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=100)
    assert process.returncode == -signal.SIGABRT and (tmp_path / "a.1.partial").exists()
    with alone(tmp_path):
        assert not list(tmp_path.iterdir())  # what it had half written is gone
    (tmp_path / "far" / "away").mkdir(parents=True)
    others = [tmp_path / "film.partial", tmp_path / "far" / "away" / "a.1.partial"]
    for path in others:
        path.touch()
    with alone(tmp_path):
        assert all(path.exists() for path in others)  # but nothing of others


def die(*job):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("module, job, arguments", [
    (dmd_refine, "ablation_job", ["--ablation", "--seeds", 1]), (toy2d, "work", [])])  # fmt: skip
def test_a_dead_worker_gets_one_sentence(tmp_path, capsys, monkeypatch, whole, module, job, arguments):
    out = tmp_path / "run"
    if module is dmd_refine:
        shutil.copytree(whole, out)
    monkeypatch.setattr(module, job, die)
    fork = multiprocessing.get_context("fork")  # so that workers know of `die`
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    assert end(module, "--quick", *arguments, "--workers", 2, "--out", out) == 2
    said(capsys, " died (if memory was short: fewer --workers); what was saved is kept")
    assert module is toy2d or equal(weights(out, "td"), weights(whole, "td"))


@pytest.mark.slow
def test_ctrl_c_reaches_workers_at_work_and_without_and_all_is_saved(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, ROOT / "toy2d.py", "--quick", "--teacher-steps", "100000", "--workers",
                                "2", "--out", out], stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    told = b""
    while b"teacher:" not in told:  # its bar; the second worker has nothing to do meanwhile
        byte = process.stderr.read(1)
        assert byte, told  # it ended
        told += byte
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    try:
        told += process.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and b"the same command goes on" in told and b"Traceback" not in told, told.decode()
    assert data.read_checkpoint(out / "seed0-teacher.unfinished")["steps"] > 0 and not list(out.glob("*.partial"))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def poison(monkeypatch, module, name, at):
    """From its `at`-th call on, module.name draws a batch whose sixth row is NaN."""
    whole, calls = getattr(module, name), []

    def drawn(*arguments):
        x_0, y = whole(*arguments)
        calls.append(1)
        if len(calls) >= at:
            x_0[5] = math.nan
        return x_0, y

    monkeypatch.setattr(module, name, drawn)


@pytest.mark.parametrize("stage, at, known", [
    ("teacher", 3, {"r", "t"}), ("td", 7, {"r", "t", "du_dt"}), ("hd-seed0", 3, {"t"}),
    ("seed0-teacher", 3, {"r", "t"})])  # fmt: skip
def test_numbers_that_are_not_finite_stop_the_run_with_a_report(tmp_path, capsys, monkeypatch, each_step, whole, stage,
                                                               at, known):  # fmt: skip
    out, module, arguments = tmp_path / "run", meanflow_td, TEACHER
    if stage == "hd-seed0":
        shutil.copytree(whole, out)
        module, arguments = dmd_refine, ["--quick", "--refine-steps", "4"]
    if stage == "seed0-teacher":
        module, arguments = toy2d, ["--quick", "--teacher-steps", "4", "--workers", "1"]
    with monkeypatch.context() as patch:
        poison(patch, *((toy2d, "draw_points") if module is toy2d else (data.Glyphs, "draw")), at)
        assert end(module, *arguments, "--out", out) == 3
    path = out / f"{stage}.diverged.json"
    said(capsys, "step 2: loss is nan. A lower learning rate may help.", f"{path} tells more")
    report = json.loads(path.read_text())
    assert report["stage"] == stage and report["values"][report["term"]] == "nan"
    assert known <= report.keys() | report["worst rows"][0].keys() and len(report["worst rows"]) == 5
    if stage in ("teacher", "seed0-teacher"):  # else the bad row spoils the whole batch, by way of a network
        assert report["worst rows"][0]["row"] == 5 and report["worst rows"][0]["error"] == "nan"
    assert data.read_checkpoint(out / f"{stage}.unfinished")["steps"] == 2  # the last good one
    if module is meanflow_td:
        assert end(module, *arguments, "--out", out) == 0 and not path.exists()
        assert equal(weights(out, "td"), weights(whole, "td"))


def test_whatever_is_not_finite_is_named():
    ok, rows = torch.ones(()), {"t": torch.tensor([0.1, 0.2, 0.3]), "error": torch.tensor([1.0, math.inf, 5.0])}
    meanflow_td.check_finite("here", rows, loss=ok, gradient=ok)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(Diverged, match="here: gradient is") as error:
            meanflow_td.check_finite("here", rows, torch.tensor(bad), loss=ok, gradient=torch.tensor(bad))
        report = error.value.report
        assert [row["row"] for row in report["worst rows"]] == [1, 2, 0] and report["du_dt"] == str(bad)
        assert report["values"] == {"loss": 1.0, "gradient": str(bad)} and json.dumps(report, allow_nan=False)
    with pytest.raises(Diverged, match="sample"):
        meanflow_td.check_finite("here", sample=torch.tensor([1.0, math.nan]))


def test_a_term_that_is_nan_in_one_part_of_a_batch_is_nan_in_all_unless_that_part_has_no_row_of_its_kind():
    net = torch.nn.Linear(1, 1)
    for factor, mean in ((1.0, 3.0), (math.nan, math.nan)):
        parts = iter([(1.0, 3.0), (factor, math.nan)])  # the factor of the loss, the term

        def loss_of(rows):
            scale, term = next(parts)
            return scale * net.weight.sum(), {"term": torch.tensor(term)}

        _, terms = meanflow_td.backward_in_parts(net, 4, 2, loss_of, contextlib.nullcontext)
        assert terms["term"].item() == pytest.approx(mean, nan_ok=True)


def test_a_players_gradient_that_is_not_finite_stops_stage_2(monkeypatch):
    """An infinite gradient, clipped, is NaN in the weights: it has to be seen before the next save."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def infinite(parameters, norm):
        calls.append(1)
        return clip(parameters, norm) * (math.inf if len(calls) == 3 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
    with pytest.raises(Diverged, match="step 0: gradient_d is inf"):
        fit_refined(dmd_refine, None, 0)


def test_samples_that_are_not_finite_are_never_drawn_or_judged(tmp_path):
    x = torch.zeros(4, 1, 8, 8)
    x[2, 0, 3, 3] = math.nan
    with pytest.raises(Diverged, match="1 of 4 samples are not finite"):
        data.to_uint8(x)
    with pytest.raises(Diverged, match="judging: sample is nan"):
        toy2d.in_blocks(lambda eps: eps * math.inf, torch.zeros(3, 2))
    judge = evaluate.RunJudge.__new__(evaluate.RunJudge)
    judge.run = type("Run", (), {"device": "cpu"})
    judge.eps, judge.y = torch.zeros(4, 1, 8, 8), torch.zeros(4)
    with pytest.raises(Diverged, match="TD, seed 7: sample is nan"):
        judge.sample(lambda eps, y: x, "TD, seed 7")


def test_the_share_of_clipped_gradients_is_logged_and_survives_a_stop(tmp_path, each_step):
    """Against the norms themselves, which a run that logs each step tells."""

    def fit(module, keep, seed, clip=60.0, log_every=3):
        return module.train(points_net(seed, False), draw_points, module.teacher_objective, steps=8, batch=8, lr=1e-2,
                            clip=clip, seed=0, stream="t", name="t", keep=keep, log_every=log_every)  # fmt: skip

    _, rows = fit(meanflow_td, None, 0, log_every=1, clip=1e9)
    norms = [row["gradient"] for row in rows]
    assert all(row["clipped"] == 0 for row in rows)
    clip = sorted(norms)[3]
    _, rows = fit(meanflow_td, None, 0, clip=clip)
    assert [row["step"] for row in rows] == [0, 3, 6, 7] and rows[0]["clipped"] == (norms[0] > clip)
    assert any(0 < row["clipped"] < 1 for row in rows)
    keep = Keep(RunFolder(tmp_path, {}), "stage")
    save = keep.save

    def save_and_stop(parts, steps, rows):
        save(parts, steps, rows)
        if steps == 3:  # two steps after the first row
            raise Stopped

    keep.save = save_and_stop
    with pytest.raises(Stopped):
        fit(meanflow_td, keep, 0, clip=clip)
    _, again = fit(meanflow_td, Keep(keep.run, "stage"), 5, clip=clip)
    assert [row["clipped"] for row in again] == [row["clipped"] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-100]),
                                    lambda path: path.write_bytes(b"")], ids=["a bit", "the end", "all"])
def test_a_damaged_last_save_gives_way_to_the_one_before(tmp_path, capsys, each_step, damage):
    expected = work(tmp_path / "whole", fit_student, meanflow_td)
    with pytest.raises(Stopped):
        work(tmp_path / "run", fit_student, meanflow_td, stop=3)
    path, older = tmp_path / "run" / "stage.unfinished", tmp_path / "run" / "stage.unfinished.older"
    assert (data.read_checkpoint(path)["steps"], data.read_checkpoint(older)["steps"]) == (3, 2)
    damage(path)
    assert equal(work(tmp_path / "run", fit_student, meanflow_td, seed=5), expected)
    assert f"warning: {path} is damaged" in capsys.readouterr().out
    assert path.with_name("stage.unfinished.damaged").exists()


def test_a_damaged_teacher_is_put_aside_and_named(tmp_path, capsys, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    flip(out / "teacher.pt")
    assert end(dmd_refine, "--quick", "--out", out) == 2
    told = capsys.readouterr()
    assert "teacher.pt is damaged (it is not what its sha256 says); kept as teacher.pt.damaged" in told.out
    assert f"{out} holds no finished teacher: run meanflow_td.py" in told.err
    assert end(meanflow_td, *TEACHER, "--out", out) == 0
    assert equal(weights(out, "teacher"), weights(whole, "teacher"))


def test_checkpoints_of_newer_code_of_other_runs_and_of_older_code(tmp_path, capsys, monkeypatch, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    state = data.read_checkpoint(whole / "teacher.pt")
    made = state["made"]
    assert made["format"] == 1 and re.fullmatch("[0-9a-f]{8}", made["code"])
    assert made["config"] == RunFolder(out, {}).config and made["config"]["teacher"]["steps"] == 4
    for changed, sentence in (({"format": 2}, "has format 2, this code reads up to 1"),
                              ({"config": {"teacher": {"steps": 5}}}, "made in a run with other settings of teacher")):
        data.write_checkpoint(out / "teacher.pt", state | {"made": made | changed})
        before = (out / "teacher.pt").read_bytes()
        assert end(dmd_refine, "--quick", "--out", out) == 2
        said(capsys, str(out / "teacher.pt"), sentence)
        assert (out / "teacher.pt").read_bytes() == before
    torch.save({key: state[key] for key in state if key != "made"}, out / "teacher.pt")  # as it was done once
    assert equal(RunFolder(out, {}).finished("teacher")["net"], state["net"])
    assert equal(torch.load(whole / "teacher.pt", weights_only=True)["net"], state["net"])  # ours are torch's still
    flip(out / "teacher.pt")
    assert RunFolder(out, {}).finished("teacher") is None  # by the zip file's own checksums
    assert "warning" in capsys.readouterr().out


def test_an_evaluation_whose_state_is_damaged_begins_anew(tmp_path, capsys, monkeypatch):
    from test_evaluate import FakeNet

    for name, dim in FakeNet.dims.items():
        monkeypatch.setattr(evaluate, name, dim)
    monkeypatch.setattr(evaluate, "SAVE_SECONDS", -1)
    options = {"resize": "tf1", "batch": 8, "keep": [1, 7, 20]}
    glyphs = data.Glyphs(length=24)
    expected = evaluate.extract(FakeNet(), glyphs, tmp_path / "whole", **options)
    def cut(path):
        path.write_bytes(path.read_bytes()[:-50])

    cuts = [("state.pt", flip), ("pool.npy", flip), ("pool.npy", cut), ("logits_no_bias.npy", Path.unlink)]
    for i, (name, damage) in enumerate(cuts):
        folder = tmp_path / str(i)
        evaluate.extract(FakeNet(), glyphs, folder, **options)
        damage(folder / name)
        again = evaluate.extract(FakeNet(), glyphs, folder, **options)
        assert "state.pt is damaged" in capsys.readouterr().out and again["pixels"] == expected["pixels"]
        np.testing.assert_array_equal(again["pool_rows"], expected["pool_rows"])
        np.testing.assert_array_equal(again["logit_rows"], expected["logit_rows"])
        np.testing.assert_array_equal(again["pool"].finish()[1], expected["pool"].finish()[1])


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

FLAT = """
import os, resource, sys
from functools import partial
import torch
import data, dmd_refine, meanflow_td, models, toy2d
torch.set_num_threads(1)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
def watched(draw):
    seen = []
    def drawn(*arguments):
        seen.append(resident())
        return draw(*arguments)
    return drawn, seen
points = partial(toy2d.draw_points, data.DENSITIES["checkerboard"]())
glyphs = data.Glyphs(16)
keep = lambda name: data.Keep(data.RunFolder(sys.argv[1], {"flat": {}}), name)
mlp = lambda two: models.VelocityMLP(2, 8, 3, two)
dit = lambda two: models.Teacher(models.DiT(16, 4, 1, 16, 1, 2, num_classes=10, two_times=two))
data.Keep.EVERY = 0.2
for name, net, draw in (("toy", mlp, points), ("glyphs", dit, glyphs.draw)):
    teacher = net(False).requires_grad_(False)
    drawn, seen = watched(draw)
    objective = partial(meanflow_td.student_objective, teacher=teacher)
    meanflow_td.train(net(True), drawn, objective, steps=1000, batch=8, lr=1e-4, seed=0, stream="s", name=name,
                      keep=keep(name))
    print(name, seen[200], seen[-1])
    drawn, seen = watched(draw)
    fake = models.frozen_copy(teacher).requires_grad_(True)
    dmd_refine.refine(net(True), teacher, fake, drawn, steps=1000, batch=8, seed=0, stream="s", name=name,
                      keep=keep(name + "-refined"))
    print(name + "-refined", seen[200], seen[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its own size from /proc")
def test_memory_stays_flat_over_1000_steps(tmp_path):
    process = subprocess.run([sys.executable, "-c", FLAT, str(tmp_path)], cwd=ROOT, text=True, capture_output=True,
                             timeout=900)  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = [line.split() for line in process.stdout.splitlines() if len(line.split()) == 3]
    assert [line[0] for line in lines] == ["toy", "toy-refined", "glyphs", "glyphs-refined"]
    for name, early, late in lines:
        print(f"{name}: {int(early) >> 20} MB, {100 * (int(late) / int(early) - 1):.2f} % more after 1,000 steps")
        assert int(late) < 1.01 * int(early), (name, early, late)


# ---------------------------------------------------------------------------------------------------------------------
# The README's table
# ---------------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_readmes_table_of_faults_has_its_test():
    section = (ROOT / "README.md").read_text().split("## When something goes wrong")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    sources = {path.name: path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    assert len(rows) >= 15
    for row in rows:
        names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert names, f"no test backs: {row}"
        for file, name in names:
            assert f"\ndef {name}(" in sources[file], f"{file} has no {name}, which backs: {row}"

"""Runs that stop and go on, and the scripts for images as a person runs them."""

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, broken, run_saving, tiny_teacher, without_times
from test_evaluate import make_folder
from PIL import Image

import data
import dmd_refine
import evaluate
import meanflow_td
from awd import AdaptiveWeightedDiscriminator
from data import Keep, RunFolder
from models import VelocityMLP

SCRIPTS = {"meanflow_td.py": meanflow_td, "dmd_refine.py": dmd_refine, "evaluate.py": evaluate}

# ---------------------------------------------------------------------------------------------------------------------
# Keep: a loop that is stopped and goes on ends with the same bits. What goes on starts from other random weights, so
# that whatever is not restored shows.
# ---------------------------------------------------------------------------------------------------------------------

STEPS = 4


class Stopped(Exception):
    pass


def draw(batch, generator):
    """Images of noise, and their labels."""
    y = torch.randint(3, (batch,), generator=generator)
    return torch.randn(batch, 1, 8, 8, generator=generator), y


def draw_points(batch, generator):
    return torch.rand(batch, 2, generator=generator), None


def points_net(seed, two_times):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VelocityMLP(2, 8, 2, two_times)


def fit_teacher(module, keep, seed):
    objective = lambda *args: module.teacher_objective(*args, null_class=3)  # noqa: E731
    return module.train(tiny_teacher(seed), draw, objective, steps=STEPS, batch=8, lr=1e-2, lr_muon=1e-2, clip=1.0,
                        seed=0, stream="t", name="t", keep=keep, log_every=1)  # fmt: skip


def fit_student(module, keep, seed):
    teacher = tiny_teacher(9).requires_grad_(False)
    objective = lambda *args: module.student_objective(*args, teacher=teacher)  # noqa: E731
    return module.train(tiny_teacher(seed, two_times=True), draw, objective, steps=STEPS, batch=8, lr=1e-2, seed=0,
                        stream="t", name="t", keep=keep, log_every=1)  # fmt: skip


def fit_points(module, keep, seed):
    return module.train(points_net(seed, False), draw_points, module.teacher_objective, steps=STEPS, batch=8, lr=1e-2,
                        seed=0, stream="t", name="t", keep=keep, log_every=1)  # fmt: skip


def fit_refined(module, keep, seed, pooling="attention", points=False, **settings):
    if points:
        student, teacher, fake = points_net(seed, True), points_net(9, False), points_net(seed + 1, False)
    else:
        student, teacher, fake = tiny_teacher(seed, two_times=True), tiny_teacher(9), tiny_teacher(seed + 1)
    discriminator = None
    if pooling:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            discriminator = AdaptiveWeightedDiscriminator([8] if points else [16, 16], pooling)
    return module.refine(student, teacher.requires_grad_(False), fake, draw_points if points else draw, steps=STEPS,
                         batch=8, seed=0, stream="t", name="t", discriminator=discriminator, taps=(0, 1), keep=keep,
                         log_every=1, **settings)  # fmt: skip


def work(folder, fit, module, seed=0, stop=None):
    """fit(module, keep, seed) as a stage of a run folder: what its Keep holds at the end, its EMA and its rows.

    stop: raise Stopped after so many steps have been saved."""
    keep = Keep(RunFolder(folder, {"run": {}}), "stage")
    save = keep.save

    def save_and_stop(parts, steps, rows):
        save(parts, steps, rows)
        if steps == stop:
            raise Stopped

    keep.save = save_and_stop
    ema, rows = fit(module, keep, seed)
    state = torch.load(keep.path, weights_only=True)
    assert [row["step"] for row in rows] == list(range(STEPS))
    del state["seconds"], state["rows"]
    return state, ema.state_dict(), without_times(rows)


def equal(a, b):
    """The same to the bit: dicts, lists, tensors and numbers in them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check_keep(tmp_path, fit, module):
    whole = work(tmp_path / "whole", fit, module)
    for stop in (1, 3):
        folder = tmp_path / f"stopped-{stop}"
        with pytest.raises(Stopped):
            work(folder, fit, module, stop=stop)
        assert equal(work(folder, fit, module, seed=5), whole)


def refined(**settings):
    return lambda *args: fit_refined(*args, **settings)


FITS = {
    "teacher, labels": (meanflow_td, fit_teacher),
    "student, labels": (meanflow_td, fit_student),
    "teacher, points": (meanflow_td, fit_points),
    "attention": (dmd_refine, refined(lr_muon=1e-2)),
    "attention, points": (dmd_refine, refined(points=True)),
    "attention, 2 steps, TD": (dmd_refine, refined(student_steps=2, lambda_td=0.5, clip=1.0)),
    "mean, 2 steps": (dmd_refine, refined(pooling="mean", student_steps=2)),
    "mean, TD": (dmd_refine, refined(pooling="mean", lambda_td=0.5)),
    "no discriminator": (dmd_refine, refined(pooling=None)),
}


@pytest.mark.parametrize("name", FITS)
def test_a_loop_that_goes_on_ends_with_the_same_bits(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Keep, "EVERY", 0)
    module, fit = FITS[name]
    check_keep(tmp_path, fit, module)


@pytest.mark.parametrize("module, fit, old, new", [
    (meanflow_td, fit_teacher, ', "ema": ema}', '}'),
    (meanflow_td, fit_teacher, 'for i, (optimizer, _) in enumerate(optimizers)}', 'for i, optimizer in []}'),
    (meanflow_td, fit_teacher, "keep.save(parts, step + 1, log)", "keep.save(parts, step, log)"),
    (dmd_refine, fit_refined, 'for i, net in enumerate(players)}', 'for i, net in enumerate(players[:2])}'),
    (dmd_refine, fit_refined, 'for i, own in enumerate(optimizers)', 'for i, own in []'),
    (dmd_refine, fit_refined, 'parts = {"ema": ema} | {', 'parts = {'),
])  # fmt: skip
def test_a_part_that_is_not_kept_is_caught(module, fit, old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(Keep, "EVERY", 0)
    work(tmp_path / "alone", fit, broken(module, (old, new)))  # no error: what fails below is going on
    with pytest.raises((AssertionError, ZeroDivisionError)):
        check_keep(tmp_path, fit, broken(module, (old, new)))


def test_a_damaged_unfinished_stage_starts_over_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Keep, "EVERY", 0)
    whole = work(tmp_path / "whole", fit_points, meanflow_td)
    with pytest.raises(Stopped):
        work(tmp_path / "run", fit_points, meanflow_td, stop=2)
    path = tmp_path / "run" / "stage.unfinished"
    path.write_bytes(path.read_bytes()[:500])
    assert equal(work(tmp_path / "run", fit_points, meanflow_td), whole)
    assert f"warning: {path} is damaged" in capsys.readouterr().out
    assert len((tmp_path / "run" / "stage.unfinished.damaged").read_bytes()) == 500


def test_a_keep_saves_now_and_then_and_counts_the_time(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    run, net = RunFolder(tmp_path / "run", {"run": {}}), VelocityMLP(2, 4, 1)
    keep, rows = Keep(run, "stage"), [{"network": "t", "seed": 0, "step": 0, "loss": 1.0}]
    assert keep.restore({"net": net}) == (0, [])
    now[0] += 59
    keep.save({"net": net}, 1, rows)
    assert not keep.path.exists() and not (run.path / "metrics.csv").exists()
    now[0] += 2
    keep.save({"net": net}, 2, rows)
    assert "t,0,0,1.0" in (run.path / "metrics.csv").read_text()  # a killed run has its metrics, too
    now[0] += 30  # lost: it was not saved
    keep.save({"net": net}, 3, rows)
    assert keep.seconds() == 91
    again, other = Keep(run, "stage"), VelocityMLP(2, 4, 1)
    assert again.restore({"net": other}) == (2, rows) and equal(other.state_dict(), net.state_dict())
    now[0] += 5
    assert again.seconds() == 61 + 5


def test_a_finished_stage_leaves_no_unfinished_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Keep, "EVERY", 0)
    run = RunFolder(tmp_path / "run", {"run": {}})

    def compute(keep):
        keep.save({}, 1, [])
        assert keep.path.exists()
        return {"number": 1}

    run.stage("stage", compute)
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "metrics.csv", "stage.pt"]


# ---------------------------------------------------------------------------------------------------------------------
# Jobs side by side
# ---------------------------------------------------------------------------------------------------------------------


def note(folder, name, needs=()):
    """A job: fails if what it needs is not done, else leaves the number of its threads and its process."""
    assert all((folder / one).exists() for one in needs), name
    if name == "diverges":
        (folder / "diverges").touch()
        raise data.Diverged("loss is nan.")
    while name.isdigit() and not (folder / "diverges").exists():  # the other worker may still be starting
        time.sleep(0.01)
    time.sleep(0.3 * name.isdigit())
    (folder / name).write_text(f"{torch.get_num_threads()} {os.getpid()}")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_jobs_wait_for_what_they_need_and_have_one_thread_each(workers, tmp_path, capfd):
    jobs = {(tmp_path, "last", ("middle", "other")): {(tmp_path, "middle", ("first",)), (tmp_path, "other")},
            (tmp_path, "middle", ("first",)): {(tmp_path, "first")}, (tmp_path, "diverges"): (),
            (tmp_path, "first"): (), (tmp_path, "other"): ()}  # fmt: skip
    threads = torch.get_num_threads()
    data.side_by_side(note, jobs, workers, "jobs", forgive=FloatingPointError)
    (tmp_path / "diverges").unlink()
    told = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    assert told.keys() == {"first", "middle", "other", "last"} and {count for count, _ in told.values()} == {"1"}
    assert (workers == 1) == (os.getpid() in {int(process) for _, process in told.values()})
    assert torch.get_num_threads() == threads and "loss is nan. The others go on." in capfd.readouterr().out
    jobs = {(tmp_path, "other"): (), (tmp_path, "diverges"): ()} | {(tmp_path, f"{i}"): () for i in range(9)}
    with pytest.raises(FloatingPointError):  # those that had begun are done, and no other
        data.side_by_side(note, jobs, workers, "jobs")
    assert sum(path.name.isdigit() for path in tmp_path.iterdir()) <= 2
    with pytest.raises(ValueError, match="need what is not among the jobs"):
        data.side_by_side(note, {(tmp_path, "a"): ["b"], (tmp_path, "other"): ()}, workers, "jobs")


# ---------------------------------------------------------------------------------------------------------------------
# The scripts
# ---------------------------------------------------------------------------------------------------------------------


def contents(folder):
    """All that a run is to reproduce to the bit: weights, metrics and pictures, without times."""
    states = {}
    for path in sorted(folder.glob("*.pt")):
        state = torch.load(path, weights_only=True)
        state["rows"] = without_times(state["rows"])
        states[path.name] = {key: value for key, value in state.items() if key != "finished"}
    return states, without_times(metrics(folder)), {p.name: p.read_bytes() for p in (folder / "samples").iterdir()}


def metrics(folder):
    """The rows of metrics.csv, below its line of comment."""
    with open(folder / "metrics.csv") as file:
        assert next(file).startswith("# ")
        return list(csv.DictReader(file))


def snapshot(folder):
    """{path: bytes} of everything in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def begun(tmp_path_factory):
    """A run folder with a teacher and a TD student of one update each."""
    folder = tmp_path_factory.mktemp("runs") / "begun"
    meanflow_td.main(["--quick", "--teacher-steps", "1", "--td-steps", "1", "--out", str(folder)])
    return folder


def refuse(capsys, script, *arguments):
    """The one sentence of a script that exits with 2."""
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(list(map(str, arguments)))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err, err
    last = err.strip().splitlines()[-1]
    assert len(err.strip().splitlines()) == 1 or last.count("error: ") == 1  # argparse prints the usage before it
    return last


def test_what_is_missing_gets_one_sentence(tmp_path, capsys, begun):
    new, run = tmp_path / "new", tmp_path / "run"
    assert "needs --data-dir" in refuse(capsys, "meanflow_td.py", "--data", "folder", "--out", new)
    for script in ("dmd_refine.py", "evaluate.py"):
        said = refuse(capsys, script, "--data", "glyphs", "--quick", "--out", new)
        assert f"{new} holds no finished teacher: run meanflow_td.py" in said
    assert "the table is made for glyphs" in refuse(capsys, "evaluate.py", "--data", "folder", "--out", new)
    assert not new.exists()  # else it would stand in the way of a run with other settings
    shutil.copytree(begun, run)
    (run / "td.pt").unlink()
    assert f"{run} holds no finished td: run meanflow_td.py" in refuse(capsys, "dmd_refine.py", "--quick", "--out", run)
    said = refuse(capsys, "evaluate.py", "--data", "glyphs", "--quick", "--out", run)
    assert f"{run} holds no finished td: run meanflow_td.py" in said
    new.mkdir()
    shutil.copy(begun / "teacher.pt", new)
    assert f"{new} holds no finished td" in refuse(capsys, "dmd_refine.py", "--quick", "--out", new)
    assert [path.name for path in new.iterdir()] == ["teacher.pt"]  # free for --w
    with pytest.raises(data.BadInput, match="no finished hd-seed1: run dmd_refine.py"):
        meanflow_td.saved_run(begun, "cpu").load("hd-seed1", two_times=True)


def test_a_folder_of_other_settings_is_refused(tmp_path, capsys, begun, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    before = snapshot(run)
    for arguments, sentence in [
        (["--w", "2"], "(of td: w = 1.0 there and 2.0 now)"),
        (["--seed", "3"], "(of data: seed = 0 there and 3 now)"),
        (["--size", "32"], "(of data: size = 16 there and 32 now)"),
        (["--teacher-steps", "7"], "(of teacher: steps = 1 there and 7 now)"),
    ]:
        said = refuse(capsys, "meanflow_td.py", "--quick", "--out", run, *arguments)
        assert sentence in said and str(run) in said and "name another with --out" in said and "--name" not in said
    turn = data.MAX_TURN
    with monkeypatch.context() as patch:  # or a folder of an older version, or of other numbers in data.py
        patch.setattr(data, "MAX_TURN", 15.0)
        for script in ("meanflow_td.py", "dmd_refine.py", "evaluate.py"):
            said = refuse(capsys, script, "--data", "glyphs", "--quick", "--out", run)
            assert f"(of data: turn = {turn} there and 15.0 now)" in said
    assert snapshot(run) == before
    meanflow_td.main(["--teacher-steps", "1", "--td-steps", "1", "--out", str(tmp_path / "large")])
    capsys.readouterr()
    said = refuse(capsys, "meanflow_td.py", "--quick", "--out", tmp_path / "large")
    width = meanflow_td.PLANS["default"]["network"]["hidden_size"]
    assert f"hidden_size = {width} there and 32 now" in said
    config = json.loads((run / "config.json").read_text()) | {"hd": dmd_refine.PLANS["quick"] | {"lambda_adv": 0.3}}
    (run / "config.json").write_text(json.dumps(config))
    assert "config.json is damaged or was edited" in refuse(capsys, "dmd_refine.py", "--quick", "--out", run)
    del config["sha256"]  # who edits it on purpose takes this out
    (run / "config.json").write_text(json.dumps(config))
    said = refuse(capsys, "dmd_refine.py", "--quick", "--out", run, "--lambda-adv", "0.2")
    assert "(of hd: lambda_adv = 0.3 there and 0.2 now): name another variant with --name, or another run" in said
    del config["hd"]
    config["mean"] = dmd_refine.PLANS["quick"]  # by hand, and without --pooling mean
    (run / "config.json").write_text(json.dumps(config))
    said = refuse(capsys, "dmd_refine.py", "--quick", "--out", run, "--ablation")
    assert "(of mean: pooling = 'attention' there and 'mean' now" in said


def test_a_teacher_may_be_copied_into_a_run_with_other_students(tmp_path, capsys, begun):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(begun / "teacher.pt", run)
    meanflow_td.main(["--quick", "--teacher-steps", "1", "--td-steps", "2", "--w", "1.5", "--out", str(run)])
    assert (run / "teacher.pt").read_bytes() == (begun / "teacher.pt").read_bytes() and (run / "td.pt").exists()
    shutil.copytree(begun, tmp_path / "other")
    shutil.copy(run / "td.pt", tmp_path / "other")  # a student may not
    capsys.readouterr()
    said = refuse(capsys, "dmd_refine.py", "--quick", "--out", tmp_path / "other")
    assert "was made in a run with other settings of td" in said
    other = tmp_path / "of other steps"
    other.mkdir()
    shutil.copy(begun / "teacher.pt", other)
    said = refuse(capsys, "meanflow_td.py", "--quick", "--teacher-steps", "2", "--out", other)
    assert "was made in a run with other settings of teacher" in said


def test_settings_that_can_not_be_are_refused_before_the_folder_takes_them(tmp_path, capsys, begun):
    """A folder that had taken them would refuse the mended command as another run's."""
    run, new = tmp_path / "run", tmp_path / "new"
    shutil.copytree(begun, run)
    before = snapshot(run)
    said = refuse(capsys, "dmd_refine.py", "--quick", "--out", run, "--taps", "0", "2")
    assert "blocks (0, 2) are to be tapped, and the teacher has 2" in said
    said = refuse(capsys, "dmd_refine.py", "--quick", "--out", run, "--batch", "4", "--accumulate", "5")
    assert "a batch of 4 can't be taken in 5 parts" in said
    said = refuse(capsys, "dmd_refine.py", "--quick", "--out", run, "--student-steps", "2", "--accumulate", "9")
    assert "a batch of 32 in 9 parts leaves less than 4 rows" in said and snapshot(run) == before
    refuse(capsys, "meanflow_td.py", "--quick", "--out", new, "--batch", "4", "--accumulate", "5")
    said = refuse(capsys, "meanflow_td.py", "--quick", "--out", new, "--batch", "1")
    assert "a batch of 1 has no row with r < t" in said and not list(new.iterdir())


def test_a_run_on_a_folder_is_of_that_folder(tmp_path, capsys):
    for animal, seed in (("cats", 1), ("dogs", 2)):
        make_folder(tmp_path / animal, 8, seed=seed)
    few = ["--quick", "--data", "folder", "--teacher-steps", "1", "--td-steps", "1", "--batch", "4",
           "--out", tmp_path / "run"]  # fmt: skip
    meanflow_td.main([*map(str, few), "--data-dir", str(tmp_path / "cats")])
    capsys.readouterr()
    said = refuse(capsys, "meanflow_td.py", *few, "--data-dir", tmp_path / "dogs")
    assert "data_dir = " in said and "name another with --out" in said
    dmd_refine.main([*"--quick --data folder --refine-steps 1 --batch 4 --data-dir".split(), str(tmp_path / "cats"),
                     "--out", str(tmp_path / "run")])  # fmt: skip
    checkpoint = tmp_path / "run" / "hd-seed0.pt"
    assert f"Next: python evaluate.py --sample 50000 --checkpoint {checkpoint} --out DIR" in capsys.readouterr().out


def test_samples_of_two_teachers_are_not_taken_for_one_anothers(tmp_path, capsys, begun):
    other = tmp_path / "other"
    meanflow_td.main(["--quick", "--teacher-steps", "1", "--td-steps", "1", "--seed", "1", "--out", str(other)])
    draw = ["--sample", "2", "--sampler", "heun", "--steps", "1", "--out", str(tmp_path / "samples"), "--checkpoint"]
    evaluate.main([*draw, str(begun / "td.pt")])
    capsys.readouterr()
    assert "holds other samples (teacher = " in refuse(capsys, "evaluate.py", *draw, other / "td.pt")


class Mean:
    """Stands in for the judge of glyphs."""

    count, sha = 8, "1"

    def __call__(self, images, labels):
        return {"mean": images.mean().item()}

    def fingerprint(self, labels):
        return {}


def test_rows_of_the_table_are_those_of_the_networks_that_are_there(tmp_path, begun):
    run = meanflow_td.saved_run(begun, "cpu")
    run.folder = data.RunFolder(tmp_path / "run", {})
    judge = evaluate.RunJudge.__new__(evaluate.RunJudge)
    judge.run, judge.rows, judge.spectra, judge.judge, judge.count, judge.noise_seed = run, [], {}, Mean(), 2, 0
    net = run.network("student", two_times=True)
    for value in (1.0, 2.0, 2.0):
        torch.nn.init.constant_(next(net.parameters()), value)
        judge.row("TD", lambda: (torch.full((2, 1, 16, 16), value), torch.zeros(2)), net=net)
        assert judge.rows[-1]["mean"] == value
    judge.row("TD", None, net=net)  # measured already
    for which, key, value in ((judge, "noise_seed", 1), (judge.judge, "count", 9), (judge.judge, "sha", "2")):
        setattr(which, key, value)  # but not of this noise, or by this judge
        with pytest.raises(TypeError):
            judge.row("TD", None, net=net)


def test_metrics_that_were_damaged_come_again_with_the_command_that_made_them(tmp_path, begun, capsys):
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    before = (run / "metrics.csv").read_bytes()
    (run / "metrics.csv").write_bytes(before.replace(b"teacher", b"Teacher"))
    meanflow_td.main(["--quick", "--out", str(run)])
    assert (run / "metrics.csv").read_bytes() == before and "warning: " in capsys.readouterr().out


def test_what_a_plan_says_reaches_training(tmp_path, monkeypatch):
    calls = {}

    def train(net, draw, objective, *, name, **settings):
        calls[name] = objective, settings
        return net, []

    monkeypatch.setattr(meanflow_td, "train", train)
    meanflow_td.main(["--quick", "--w", "1.5", "--out", str(tmp_path)])
    plan = meanflow_td.PLANS["quick"]
    for name, others in (("teacher", set()), ("td", {"w"})):
        settings = calls[name][1]
        assert {key: settings[key] for key in plan[name].keys() - others}.items() <= plan[name].items()
    assert calls["teacher"][0].keywords == {"null_class": 10}  # else guidance would ask a class that nobody trained
    assert calls["td"][0].keywords["teacher"].w == 1.5 and calls["td"][0].keywords["share_spans"] == 0.75


def test_settings_that_are_not_given_are_those_of_the_run(begun):
    before = snapshot(begun)
    meanflow_td.main(["--quick", "--out", str(begun)])  # 60 and 30 updates in a new run, 1 in this one: it is finished
    assert snapshot(begun) == before


@pytest.mark.parametrize("damaged", ["[1, 2]", '{"data": ', '{"data": "glyphs"}'])
def test_a_config_that_is_none_is_refused(tmp_path, capsys, damaged, begun):
    (tmp_path / "config.json").write_text(damaged)
    for stage in ("teacher.pt", "td.pt"):
        shutil.copy(begun / stage, tmp_path)
    for script in ("meanflow_td.py", "dmd_refine.py"):
        assert "config.json" in refuse(capsys, script, "--quick", "--out", tmp_path)
    assert (tmp_path / "config.json").read_text() == damaged


def test_other_folders_and_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    before = snapshot(tmp_path)
    assert "name another run folder with --out" in refuse(capsys, "meanflow_td.py", "--out", tmp_path / "file")
    assert "no run folder, but it is not empty" in refuse(capsys, "meanflow_td.py", "--out", tmp_path / "other")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("script, arguments, sentence", [
    ("meanflow_td.py", ["--data", "faces"], "invalid choice: 'faces'"),
    ("meanflow_td.py", ["--size", "17"], "invalid choice: 17"),
    ("meanflow_td.py", ["--td-steps", "0"], "'0' is not a whole number in 1"),
    ("meanflow_td.py", ["--seed", "-1"], "'-1' is not a whole number in 0"),
    ("meanflow_td.py", ["--w", "0"], "'0' is not a number above 0"),
    ("meanflow_td.py", ["--device", "warp"], "--device warp can't be used here"),
    ("dmd_refine.py", ["--lambda-adv", "nan"], "'nan' is not a number above 0"),
    ("dmd_refine.py", ["--lambda-td", "-1"], "'-1' is not a number above 0"),
    ("dmd_refine.py", ["--student-steps", "3"], "invalid choice: 3"),
    ("dmd_refine.py", ["--name", "td"], "'td' is not a name of letters"),
    ("dmd_refine.py", ["--name", "TD"], "'TD' is not a name of letters"),
    ("dmd_refine.py", ["--name", "scratch"], "'scratch' is not a name of letters"),
    ("dmd_refine.py", ["--ablation", "--pooling", "mean"], "--ablation trains each --init and"),
    ("dmd_refine.py", ["--ablation", "--init", "td"], "--ablation trains each --init and"),
    ("dmd_refine.py", ["--ablation", "--seed", "1"], "--ablation trains each --init and"),
    ("meanflow_td.py", ["--data", "imagenet", "--teacher-steps", "3"], "--teacher-steps is for teachers that are"),
    ("dmd_refine.py", ["--ablation", "--name", "foo"], "--ablation is of --data glyphs and --name hd"),
    ("dmd_refine.py", ["--ablation", "--data", "folder", "--data-dir", "x"], "--ablation is of --data glyphs and"),
    ("meanflow_td.py", ["--data", "folder", "--data-dir", "x", "--cfg-channels", "1"], "is of --data imagenet"),
    ("dmd_refine.py", ["--name", "a/b"], "'a/b' is not a name of letters"),
    ("dmd_refine.py", ["--device", "warp"], "--device warp can't be used here"),
    ("evaluate.py", ["--data", "glyphs", "--device", "warp"], "--device warp can't be used here"),
    ("evaluate.py", ["--data", "glyphs", "--count", "5"], "'5' is not a whole number in 100"),
])  # fmt: skip
def test_a_mistake_gets_one_sentence(tmp_path, capsys, script, arguments, sentence):
    assert sentence in refuse(capsys, script, "--quick", "--out", tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()


def test_positive_numbers():
    assert [data.positive_number(text) for text in ("0.5", "1e-3", " 7 ")] == [0.5, 1e-3, 7.0]
    for text in ("0", "-0.0", "-1", "nan", "inf", "-inf", "1e999", "many", ""):
        with pytest.raises(data.argparse.ArgumentTypeError, match="is not a number above 0"):
            data.positive_number(text)


def run(script, *arguments):
    process = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], cwd=ROOT, text=True,
                             capture_output=True, timeout=900)  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("line", ["", "--quick", "--size 32 --device meta",
                                  "--data folder --data-dir 'my images' --out x",
                                  "--data imagenet --preset imagenet256-b4 --cache c --teacher a/SiT.pt --vae v.pt",
                                  "--data imagenet --data-dir d --quick"])  # fmt: skip
def test_the_next_command_means_the_same_run(line):
    parser = argparse.ArgumentParser()
    meanflow_td.add_run_arguments(parser)
    meanflow_td.add_training_arguments(parser)
    args = parser.parse_args(shlex.split(line))
    assert parser.parse_args(shlex.split(meanflow_td.run_flags(parser, args))) == args


@pytest.mark.slow
def test_the_chain(tmp_path, capsys):
    """Teacher, TD, two variants of stage 2, the table: four commands, one folder. Again: all is found finished."""
    out = tmp_path / "run"
    commands = [("meanflow_td.py", "--quick"), ("dmd_refine.py", "--quick"),
                ("dmd_refine.py", "--quick", "--name", "two", "--pooling", "none", "--init", "teacher", "--lambda-td",
                 "0.5", "--student-steps", "2", "--seed", "12", "--refine-steps", "3"),
                ("evaluate.py", "--data", "glyphs", "--quick")]  # fmt: skip
    said = [run(*command, "--out", out) for command in commands]
    assert all(str(out) in text for text in said)
    for text, script in zip(said, ("dmd_refine", "evaluate", "evaluate")):
        assert text.endswith(f"Next: python {script}.py --data glyphs --out {out} --quick\n")
    for name in ("teacher-000000", "teacher-000059", "td-000029", "hd-seed0-000019", "hd-seed0-dmd-000019",
                 "two-seed12-000002"):  # fmt: skip
        with Image.open(out / "samples" / f"{name}.png") as picture:
            assert picture.size == (640, 256 if "dmd" in name else 640) and len(picture.getcolors(256)) > 20, name
    config = json.loads((out / "config.json").read_text())
    assert list(config) == ["network", "teacher", "td", "data", "hd", "two", "sha256"]
    assert config["two"]["student_steps"] == 2 and config["hd"]["student_steps"] == 1
    steps = {row["network"]: int(row["step"]) for row in metrics(out)}
    assert steps == {"teacher": 59, "td": 29, "hd-seed0": 19, "two-seed12": 2}
    rows = json.loads((out / "results.json").read_text())
    judged = [(row["what"], row["seed"], row["nfe"]) for row in rows]
    assert judged[0][0] == "data against data" and all(what.startswith("teacher") for what, _, _ in judged[1:-4])
    assert judged[-4:] == [("TD", 0, 1), ("HD: TD + DMD + AWD", 0, 1), ("two", 12, 1), ("two", 12, 2)]
    assert {json.dumps(row["fingerprint"]) for row in rows} == {json.dumps(rows[0]["fingerprint"])}
    images = rows[0]["fingerprint"]["images"]
    assert rows[0]["fingerprint"]["reference"].startswith(f"{4 * images} held-out glyphs")
    shutil.copy(out / "hd-seed0.pt", out / "hd-seed0-mine.pt")  # is no seed of HD
    assert all(np.isfinite(row["frechet"]) and row["what"] in said[-1] for row in rows)
    assert (out / "grid.png").exists() and (out / "spectrum.png").exists()
    before = snapshot(out)
    for (script, *arguments), text in zip(commands, said):
        SCRIPTS[script].main([*arguments, "--out", str(out)])
        assert capsys.readouterr().out == text
    after = snapshot(out)
    assert {path for path in before if before[path] != after[path]} == set() and before.keys() == after.keys()
    run(*commands[-1], "--seed", "1", "--out", out)
    others, left = json.loads((out / "results-noise1.json").read_text()), snapshot(out)
    assert {path for path in after if after[path] != left[path]} == set()
    assert [row["what"] for row in others] == [row["what"] for row in rows]
    assert all(one["frechet"] != other["frechet"] and other["fingerprint"] == one["fingerprint"] | {"noise": 1}
               for one, other in zip(rows, others))  # fmt: skip


@pytest.mark.slow
def test_killed_runs_on_images_end_with_the_same_bits(tmp_path):
    """Killed in both stages of meanflow_td.py and in dmd_refine.py, and run again."""
    first = ["--quick", "--teacher-steps", "3", "--td-steps", "3", "--out"]
    second = ["--quick", "--refine-steps", "3", "--student-steps", "2", "--lambda-td", "0.5", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("meanflow_td.py", *first, whole)
    run("dmd_refine.py", *second, whole)
    went_on = "teacher 1"
    for script, arguments, stage in [("meanflow_td", first, "teacher"), ("meanflow_td", first, "td"),
                                     ("dmd_refine", second, "hd-seed0")]:  # fmt: skip
        assert run_saving(script, *arguments, killed, die=(stage, 2)) == went_on
        assert (killed / f"{stage}.unfinished").exists() and not (killed / f"{stage}.pt").exists()
        went_on = f"{stage} 3"
        if stage == "td":  # else the next script would rightly miss it
            assert run_saving(script, *arguments, killed) == went_on
            went_on = "hd-seed0 1"
    assert run_saving("dmd_refine", *second, killed) == went_on
    assert equal(contents(killed), contents(whole))
    assert not list(killed.glob("*.unfinished")) and not list(killed.glob("*.partial"))

"""toy2d.py as a person runs it: what it leaves behind, how it goes on, and what it says to a mistake."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, run_saving, without_times
from PIL import Image

TINY = ["--quick", "--teacher-steps", "4", "--td-steps", "3", "--refine-steps", "3"]


def start(*arguments):
    return subprocess.Popen([sys.executable, ROOT / "toy2d.py", *map(str, arguments)], text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def run(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def contents(folder):
    """All that a run is to reproduce to the bit: weights, measures, samples and metrics, without times."""
    states = {}
    for path in sorted(folder.glob("*.pt")):
        state = torch.load(path, weights_only=True)
        result = {k: v for k, v in state["result"].items() if k != "seconds"}
        net = {k: v.tolist() for k, v in state.get("net", {}).items()}
        states[path.stem] = [net, without_times(state["rows"]), result, state.get("points", torch.empty(0)).tolist()]
    return states, without_times(metrics(folder))


def metrics(folder):
    """The rows of metrics.csv, below its line of comment."""
    with open(folder / "metrics.csv") as file:
        assert next(file).startswith("# ")
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_quick_tells_the_whole_story(tmp_path):
    out = tmp_path / "run"
    code, text, err = run("--quick", "--out", out)  # 27 s on 2 idle cores
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    kinds = [row["what"] for row in results]
    assert kinds.count("TD") == 6 and {"data against data", "teacher", "TD + DMD", "HD: TD + DMD + AWD", "DMD, no TD",
                                      "TD + DMD + GAN, mean pooling", "DMD + AWD, no TD"} <= set(kinds)  # fmt: skip
    for row in results:
        assert 0 <= row["share_inside"] <= 1 and row["sliced_w2"] >= 0 and row["seed"] == 0 and "nfe" in row
        assert row["what"] in text
    # the same number of updates for every student, however it spends them; counted by the steps that were logged
    rows = metrics(out)
    updates = {row["network"]: int(row["step"]) + 1 for row in rows}
    assert all(float(row["du_dt"]) > 0 for row in rows if row["network"] == "td-start")
    for name, count in updates.items():
        if name not in ("teacher", "td-start", "td-largest-twice"):
            assert count + (updates["td-start"] if name in ("td-dmd", "hd", "td-dmd-mean") else 0) == 200, name
    assert len(updates) == 14
    students = {row["updates"] for row in results if row["nfe"] == 1 and row["what"] not in
                ("TD, trained twice as long", "TD, first half only")}  # fmt: skip
    assert students == {200}
    for name in ("story.png", "bottleneck.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("L").resize((64, 64)).getcolors(4096)) > 20
    assert str(out) in text
    # the same command again only redraws: each stage's file, which holds the time when it was finished, is the same
    before, states = contents(out), {path: path.read_bytes() for path in out.glob("*.pt")}
    code, again, err = run("--quick", "--out", out)
    assert code == 0 and again == text and contents(out) == before
    assert {path: path.read_bytes() for path in out.glob("*.pt")} == states
    # a second seed joins the first, and the table has a spread
    code, text, err = run(*TINY, "--seeds", 2, "--out", tmp_path / "tiny")
    assert code == 0 and "+-" in text


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = run(*TINY, "--workers", 2, "--out", whole)
    assert code == 0, err
    went_on = "seed0-teacher 1"
    for stage, steps in [("seed0-teacher", 2), ("seed0-hd", 1), ("seed0-td-12", 6)]:
        assert run_saving("toy2d", *TINY, "--workers", 1, "--out", killed, die=(stage, steps)) == went_on
        assert (killed / f"{stage}.unfinished").exists() and not (killed / f"{stage}.pt").exists()
        went_on = f"{stage} {steps + 1}"  # not at the stage's start
        if steps == 6:  # of td-12 there is nothing left but to finish it
            went_on = "seed0-td-8 1"
    assert run_saving("toy2d", *TINY, "--workers", 1, "--out", killed) == went_on
    assert contents(killed) == contents(whole)
    assert not list(killed.glob("*.unfinished")) and not list(killed.glob("*.partial"))


@pytest.mark.slow
def test_unify_measures_three_roads_killed_or_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = run(*TINY, "--unify", "--out", whole)
    assert code == 0, err
    rows = [row for row in json.loads((whole / "results.json").read_text()) if row["part"] == "unify"]
    roads = ["MeanFlow", "consistency", "progressive"]
    assert [row["what"] for row in rows] == ["the teacher's 8 Euler steps", *roads, *roads]
    assert {row["updates"] for row in rows[1:]} == {3} and all(row["replay_error"] > 0 for row in rows)
    assert (whole / "unified.png").exists()
    stage = "seed0-unify-progressive-8"  # which saves itself after each of its three rounds
    one = ["--workers", 1, "--unify", "--out", killed]
    assert run_saving("toy2d", *TINY, *one, die=(stage, 2)) == "seed0-teacher 1"
    assert run_saving("toy2d", *TINY, *one) == f"{stage} 3"
    assert contents(killed) == contents(whole)


@pytest.mark.parametrize("arguments, sentence", [
    (["--data", "moons"], "invalid choice: 'moons'"),
    (["--td-steps", "-5"], "'-5' is not a whole number in 1"),
    (["--refine-steps", "0"], "'0' is not a whole number in 1"),
    (["--teacher-steps", "many"], "'many' is not a whole number in 1"),
    (["--seeds", "0"], "'0' is not a whole number in 1"),
    (["--seed", "-1"], "'-1' is not a whole number in 0"),
    (["--device", "warp"], "--device warp can't be used here"),
    (["--out", "FILE"], "name another run folder with --out"),
    (["--out", "FILE/below"], "name another run folder with --out"),
    (["--out", "OTHER"], "is no run folder, but it is not empty"),
    (["--out", "RINGS"], "holds a run of another configuration (of toy2d: data = 'rings' there and 'checkerboard'"),
])  # fmt: skip
def test_a_mistake_gets_one_sentence(tmp_path, capsys, arguments, sentence):
    import toy2d
    from data import RunFolder

    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "mine.txt").write_text("mine")
    RunFolder(tmp_path / "RINGS", toy2d.configuration("rings", toy2d.PLANS["quick"]))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if arguments[0] == "--out":
        arguments = ["--out", str(tmp_path / arguments[1])]
    elif arguments[0] != "--data":
        arguments = [*arguments, "--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as stop:
        toy2d.main(["--quick", *arguments])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

"""What the README says is there, and what it tells a reader to type runs."""

import importlib
import json
import re
import shlex

import numpy as np
import pytest
import torch

from helpers import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = {part.strip() for kind, block in BLOCKS if kind != "python" for line in block.splitlines()
            for part in line.split("&&")}  # fmt: skip
COMMANDS |= {code for code in re.findall(r"`([^`]+)`", README) if re.match(r"(python|torchrun) .*\.py", code)}
SCRIPTS = ("meanflow_td", "dmd_refine", "evaluate", "toy2d")


def table(title):
    """The rows of the first table below a heading, each a list of cells."""
    text = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_it_can_be_held_in_one_evening():
    assert len(README.splitlines()) <= 280


def test_the_twenty_lines_run(tmp_path, monkeypatch, capsys):
    """As they stand, but for the number of updates."""
    code = "".join(block for kind, block in BLOCKS if kind == "python")
    monkeypatch.chdir(tmp_path)
    exec(re.sub(r"steps=\d+", "steps=5", code).replace("20_000", "200"), {})
    shares = re.findall(r"^(TD|HD) ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in shares] == ["TD", "HD"] and all(0 <= float(share) <= 1 for _, share in shares)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_its_commands_is_one_of_the_script(script, capsys):
    with pytest.raises(SystemExit) as done:
        importlib.import_module(script).main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    mine = [shlex.split(command) for command in COMMANDS if f"{script}.py" in command]
    assert mine, f"the README has no command of {script}.py"
    for words in mine:
        for flag in [word for word in words[words.index(f"{script}.py"):] if word.startswith("--")]:
            assert re.search(rf"{flag}\b", text), (flag, words)


def test_the_first_screen_has_the_two_commands():
    for command in ("pip install -r requirements.txt", "python toy2d.py", "python -m pytest"):
        assert command in COMMANDS


def test_its_pictures_and_files_are_there():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"^\| `(\w+\.py)`", README, re.MULTILINE):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("row", table("Equation, code, test"), ids=lambda row: row[1].split(",")[0].strip("`"))
def test_a_row_of_the_map_has_its_function_and_its_test(row):
    equation, code, test = row
    module, names = re.match(r"`(\w+)\.py:", code)[1], re.findall(r"`(?:\w+\.py:)?([\w.]+)`", code)
    tested = (ROOT / "tests" / test.strip("`")).read_text()
    for name in names:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        assert name.split(".")[-1] in tested, name


def test_what_it_calls_a_guess_is_tagged_in_the_code():
    """Each kind of origin is used, and every arXiv id of the table of choices stands in the code too."""
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    for tag in ("PAPER:", "PRIOR:", "OURS:", "DIFFERS:", "TRY:"):
        assert tag in code
    for row in table("What the paper tells, what we chose"):
        for paper in re.findall(r"\d{4}\.\d{5}", " ".join(row)):
            assert paper in code, paper


TABLES = {  # each with its file, what names a row there, and the measures of its last columns
    "Two commands": ("toy2d", "name", ("share_inside", "sliced_w2", "replay_error")),
    "Results in 2D": ("toy2d", "name", ("share_inside", "sliced_w2", "replay_error")),
    "Results on images": ("glyphs", "what", ("frechet", "precision", "recall", "high_power"))}


@pytest.mark.parametrize("title", TABLES)
def test_a_table_agrees_with_the_rows_behind_it(title):
    """Means and, where there are several seeds, their spreads; calls and updates."""
    file, key, measures = TABLES[title]
    rows, shown = json.loads((ROOT / "figures" / f"{file}_results.json").read_text()), table(title)
    assert shown
    for cells in shown:
        calls, updates = [int(cell.replace(",", "") or 0) for cell in cells[-len(measures) - 2 : -len(measures)]]
        group = [row for row in rows if row[key] == cells[0].split("`")[1] and row.get("updates", 0) == updates]
        assert group and all(row["nfe"] == calls for row in group), cells
        for cell, measure in zip(cells[-len(measures):], measures):
            values = np.array([row[measure] for row in group])
            expected = [values.mean(), values.std(ddof=1)] if len(values) > 1 else [values.mean()]
            told = [float(number) for number in re.findall(r"\d+\.\d+", cell)]
            assert not cell or np.allclose(told, expected, atol=6e-4), (cells[0], measure, expected)


def test_requirements_are_those_that_are_imported():
    """No package beyond the list, and this torch is within its bounds."""
    listed = set(re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert listed == {"torch", "numpy", "scipy", "matplotlib", "tqdm", "pytest"}
    assert (2, 9) <= tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)

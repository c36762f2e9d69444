"""The README says what is there: line counts, the map of equations, the list of tags, commands, files."""

import argparse
from decimal import Decimal
import importlib
import json
import re
import shlex

import numpy as np
import pytest
import torch

import facts
from helpers import ROOT

README = (ROOT / "README.md").read_text()
CODE = re.findall(r"^    ((?:pip|python).*?)(?:  +#.*)?$", README, re.MULTILINE)  # lines of its blocks of commands
COMMANDS = sorted({part.strip() for line in CODE for part in line.split("&&")})


def section(title):
    """The text below a heading, up to the next of the same rank."""
    return re.split(r"^## ", README.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def rows(text):
    """The cells of a table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_line_counts_and_tags_are_current():
    told = {cells[0].strip("`"): cells[1] for cells in rows(section("The files, in reading order"))}
    assert told == facts.line_counts(), "run python tests/facts.py --write"
    assert facts.write(README) == README, "run python tests/facts.py --write"


MAP = rows(section("The map: every equation, its code, its test"))


@pytest.mark.parametrize("row", MAP, ids=[row[1].split(",")[0].strip("`") for row in MAP])
def test_a_row_of_the_map_has_its_function_and_its_test(row):
    equation, code, tests, source = row
    places = re.findall(r"`(\w+)\.py:([\w.]+)`", code)
    assert equation and source and places and len(places) == code.count("`") // 2
    for module, name in places:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", tests)
    assert named and len(named) == tests.count("`") // 2
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), name


def test_the_map_is_whole():
    """Each loss, sampler and measure of the method is in it."""
    named = " ".join(row[1] for row in MAP)
    for module, pattern in (("meanflow_td", r"_loss$|_target$|^sample_|^generate$"), ("awd", r"_hinge$"),
                            ("dmd_refine", r"_loss$|^dmd_"), ("toy2d", r"_loss$|_target$|^sliced"),
                            ("models", r"_from_velocity$|^add_noise$|^sample_|Teacher$")):  # fmt: skip
        source = (ROOT / f"{module}.py").read_text()
        for name in re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE):
            leave_out = {"meanflow_loss", "discriminator_loss", "dmd_panels", "Teacher"}
            if re.search(pattern, name) and name not in leave_out:
                assert f"`{module}.py:{name}" in named, name


def agrees(cell, values):
    """Whether a cell tells the mean of some values and, of several, their spread, in as many digits as it has."""
    shown = [Decimal(text) for text in re.findall(r"[\d.]+(?:e-\d+)?", cell)]
    exact = [np.mean(values), np.std(values, ddof=1)] if len(values) > 1 else [np.mean(values)]
    if len(set(values)) == 1:
        exact = exact[: len(shown)]  # a spread of 0 may be left out
    return len(shown) == len(exact) and all(abs(float(text) - value) <= 0.501 * 10.0 ** text.as_tuple().exponent
                                            for text, value in zip(shown, exact))  # fmt: skip


def tables(title):
    """The tables below a heading, each a list of {head: cell}."""
    for text in re.findall(r"(?:^\|.*\n)+", section(title), re.MULTILINE):
        head = [cell.strip() for cell in text.splitlines()[0].split("|")[1:-1]]
        yield [dict(zip(head, cells)) for cells in rows(text)]


def kept(name):
    return json.loads((ROOT / "figures" / name).read_text())


def test_the_table_of_points_is_the_kept_results():
    (table,) = tables("I have a laptop: points in the plane")
    groups = {}
    for row in kept("toy2d_results.json"):
        if row["part"] == "story":
            name = f"{row['what']}, width {row['width']}" if row["width"] else row["what"]
            groups.setdefault(name, []).append(row)
    assert [row["what"] for row in table] == list(groups)
    for row in table:
        group = groups[row["what"]]
        for head, key in (("inside", "share_inside"), ("sliced W2", "sliced_w2"), ("replay error", "replay_error")):
            assert agrees(row[head], [one[key] for one in group]) if row[head] else key not in group[0], (row, head)
        low, high = (100 * np.mean([one[key] for one in group]) for key in ("smallest_part", "largest_part"))
        assert row["squares, %"] == f"{low:.1f} to {high:.1f}" and row["calls"] == str(group[0]["nfe"] or "")
        assert row["parameters"].replace(",", "") == str(group[0]["parameters"] or "")


def test_the_tables_of_glyphs_are_the_kept_results():
    keys = {"Frechet": "frechet", "precision": "precision", "recall": "recall", "class accuracy": "class_accuracy",
            "power, upper half": "high_power", "ms/image": "ms_per_image"}  # fmt: skip
    results, seen = kept("glyphs_results.json"), 0
    for table in tables("I have a laptop: images"):
        for row in table:
            if "seeds" not in row:  # made by hand
                continue
            group = [one for one in results if one["what"] == row["what"] and str(one["w"] or "") == row.get("w", "")
                     and str(one["nfe"] or "") == row.get("calls", "1")]  # fmt: skip
            assert len(group) == int(row["seeds"]), row
            for head in keys.keys() & row.keys():
                assert agrees(row[head], [one[keys[head]] for one in group]), (row, head)
            seen += len(group)
    assert seen >= len(results)


def test_a_cell_that_is_another_number_is_seen():
    assert agrees("1", [1, 1]) and agrees("1.00 ± 0.00", [1, 1]) and not agrees("1.00 ± 0.10", [1, 1])
    assert agrees("2.33 ± 1.53", [1, 2, 4]) and agrees("2.7e-07", [2.66e-7]) and agrees("0.50", [0.5])
    assert not any(agrees(*wrong) for wrong in [("2.34 ± 1.53", [1, 2, 4]), ("2.33 ± 1.25", [1, 2, 4]),
                                                ("2.33", [1, 2, 4]), ("2.7e-07", [2.76e-7])])  # fmt: skip


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, monkeypatch):
    """The parsers take every command that the README tells; what they then do is run by other tests, small."""
    words = shlex.split(command if torch.cuda.is_available() else command.replace("cuda", "cpu"))
    if words[:2] == ["pip", "install"]:
        assert words[2:] == ["-r", "requirements.txt"]
    elif words[:3] == ["python", "-m", "pytest"]:
        assert words[3:] in ([], ["-m", "not slow"])
    else:
        assert words[0] == "python" and (ROOT / words[1]).exists()
        if words[1].startswith("tests/"):
            return
        parse = argparse.ArgumentParser.parse_args

        def parse_and_stop(parser, *arguments):
            parse(parser, *arguments)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            importlib.import_module(words[1].removesuffix(".py")).main(words[2:])


def test_the_evening_ends_where_the_readme_says():
    ends = {"models.py": "Small tools for any network", "meanflow_td.py": "Runs on images",
            "dmd_refine.py": "Runs on images", "awd.py": "", "toy2d.py": "Pictures and tables"}  # fmt: skip
    lines = 0
    for name, end in ends.items():
        text = (ROOT / name).read_text()
        assert f'"{end}"' in README or not end
        lines += text[: text.index(f"\n# {end}\n") if end else None].count("\n")
    assert 1200 < lines < 1400


def test_commands_are_found():
    assert "python toy2d.py" in COMMANDS and "python -m pytest" in COMMANDS and len(COMMANDS) > 10


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`((?:tests/|figures/)?\w+\.(?:py|json|png|txt|md))`", README))
    named |= set(re.findall(r"\]\((figures/[^)]+)\)", README))
    made = {"config.json", "results.json", "ablation.json", "fingerprint.json", "bottleneck.png", "story.png",
            "unified.png", "grid.png", "spectrum.png", "ablation.png", "manifest.json", "bench.json",
            "attention-hd-seed0.png"}  # by runs  # fmt: skip
    for name in named - made:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    assert all((ROOT / name).stat().st_size < 300_000 for name in named if name.startswith("figures/"))

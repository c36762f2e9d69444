"""What is the paper's, what is prior work's, what is ours: the tags in the code, as one list; and lines of files.

    python tests/facts.py           prints the list
    python tests/facts.py --write   writes both into the README, where test_readme.py checks that they are current

PAPER: the HD paper says so. PRIOR: earlier work does it so. OURS: our choice. DIFFERS: we depart from what we follow.
A tag counts if it is in a comment or a docstring; its words end with the sentence.
"""

import ast
import functools
import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("models.py", "meanflow_td.py", "awd.py", "dmd_refine.py", "toy2d.py", "evaluate.py", "data.py")
TAGS = ("PAPER", "PRIOR", "OURS", "DIFFERS")
BEGIN, END = "<!-- tags -->\n", "<!-- end of tags -->\n"


def words_of(path):
    """(line number, text) of each run of comments and each string of a file, without the signs of either."""
    runs = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            alone = token.line.lstrip().startswith("#")
            if alone and runs and runs[-1][2] == line - 1:  # goes on with the comment above
                runs[-1] = (runs[-1][0], runs[-1][1] + "\n" + text, line)
            else:
                runs.append((line, text, line if alone else -1))
        elif token.type == tokenize.STRING and token.string.startswith('"""'):
            runs.append((line, token.string.strip('"'), -1))
    return [(line, text) for line, text, _ in runs]


def sentence(text, start):
    """The words from `start` to the end of their sentence, or of the brackets they stand in."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([") - (text[i] in ")]")
        after = text[i + 1 : i + 3]
        ends = text[i] == ";" or text[i] == "." and (not after.strip() or after[0].isspace() and after[1].isupper())
        if depth < 0 or depth == 0 and (ends or text[i : i + 2] == "\n\n"):
            return " ".join(text[start:i].split())
    return " ".join(text[start:].split())


@functools.cache
def places(path):
    """(first line, last line, name) of the functions, classes and assigned names of a file; outer ones come first."""

    def within(node, prefix):
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = prefix + child.name
                yield child.lineno, child.end_lineno, name
                if isinstance(child, ast.ClassDef):
                    yield from within(child, name + ".")
            elif isinstance(node, ast.Module) and isinstance(child, ast.Assign):
                yield child.lineno, child.end_lineno, ast.unparse(child.targets[0])

    return list(within(ast.parse(path.read_text()), ""))


def place(path, line):
    """What a line of a file belongs to: what it stands in, else what follows it, else the file."""
    inside = [name for first, last, name in places(path) if first <= line <= last]
    below = [(first, name) for first, _, name in places(path) if line < first <= line + 8]
    return inside[-1] if inside else min(below)[1] if below else ""


def tags():
    """[(tag, file, what of it, words)] of all files, in reading order."""
    found = []
    for name in FILES:
        for line, text in words_of(ROOT / name):
            for match in re.finditer(r"\b(PAPER|PRIOR|OURS|DIFFERS)\b", text):
                start = match.end() + 1
                if text[match.end() : start] != ":":  # a tag after its words
                    ends = [end.end() for end in re.finditer(r"\.\s+|\n\n", text) if end.end() <= match.start()]
                    start = max(ends, default=0)
                where = place(ROOT / name, line + text.count("\n", 0, match.start()))
                found.append((match.group(), name, where, sentence(text, start)))
    return found


def as_text():
    """The list as Markdown, without line numbers, which every edit would change."""
    lines = []
    for tag in TAGS:
        lines.append(f"\n**{tag}**\n\n")
        for kind, file, where, words in tags():
            if kind == tag:
                lines.append(f"- `{file}`{', `' + where + '`' if where else ''}: {words}\n")
    return "".join(lines) + "\n"


def line_counts():
    """{file: number of lines, as the README writes it} of the files in reading order and of all tests together."""
    paths = {name: [ROOT / name] for name in FILES} | {"tests/": ROOT.glob("tests/*.py")}
    return {name: f"{sum(len(p.read_text().splitlines()) for p in each):,}" for name, each in paths.items()}


def write(readme):
    """The text of the README with the list and the counts as they are now."""
    before, rest = readme.split(BEGIN)
    readme = before + BEGIN + as_text() + END + rest.split(END)[1]
    for name, count in line_counts().items():
        readme = re.sub(rf"^\| `{name}` \| [\d,]* \|", f"| `{name}` | {count} |", readme, flags=re.MULTILINE)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    if "--write" in sys.argv:
        path.write_text(write(path.read_text()))
    else:
        print(as_text())

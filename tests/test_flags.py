"""Every flag of every script changes something, and --help tells what: nothing is parsed and never read.

Training and judging are replaced by recorders, so what counts as changed is: what they are given, what is written, what
is said, and the exit code.
"""

import argparse
from concurrent.futures import Future
import contextlib
import functools
from pathlib import Path
import shutil
import types

import pytest
import torch

import data
import dmd_refine
import evaluate
import meanflow_td
import toy2d
from test_evaluate import FakeNet, fake, make_folder  # noqa: F401

SCRIPTS = {"data": data, "meanflow_td": meanflow_td, "dmd_refine": dmd_refine, "evaluate": evaluate, "toy2d": toy2d}
RUN = "--quick --teacher-steps 1 --td-steps 2"
SCORE = "--allow-small --images IMAGES --reference glyphs"
SAMPLE = "--checkpoint BEGUN --sample 2 --out A --sampler heun --steps 2"
DRY = "NO_--quick --data imagenet --dry-run"
COMPUTED = {"--batch": 7, "--amp": "bf16", "--accumulate": 2, "--checkpointing": "", "--compile": "",
            "--dry-run": ""}  # fmt: skip
# flags of real networks, which test_imagenet.py makes
IMAGENET = {"meanflow_td": {"--cache", "--teacher", "--vae"}, "dmd_refine": {"--cache", "--teacher", "--vae"},
            "evaluate": {"--teacher", "--vae"}}  # fmt: skip

# script: what is always given, and for each flag what is given without it and with it
FLAGS = {
    "meanflow_td": (RUN, {
        "--data": ("--data-dir IMAGES", "--data-dir IMAGES --data folder"),
        "--data-dir": ("--data folder --data-dir IMAGES", "--data folder --data-dir OTHERS"),
        "--size": ("", "--size 32"), "--out": ("--out A", "--out B"), "--device": ("", "--device warp"),
        "--quick": ("", "NO_--quick"), "--seed": ("", "--seed 5"), "--teacher-steps": ("", "--teacher-steps 2"),
        "--td-steps": ("", "--td-steps 3"), "--w": ("", "--w 1.5"), "--cfg-channels": ("", "--cfg-channels 2"),
        "--preset": (f"NO_--teacher-steps NO_1 {DRY}", f"NO_--teacher-steps NO_1 {DRY} --preset imagenet256-b4"),
    } | {flag: ("", f"{flag} {value}") for flag, value in COMPUTED.items()}),
    "dmd_refine": ("--quick", {
        "--data": ("--out BEGUN --data-dir IMAGES", "--out BEGUN --data-dir IMAGES --data folder"),
        "--data-dir": ("--out BEGUN --data folder", "--out BEGUN --data folder --data-dir IMAGES"),
        "--size": ("--out BEGUN", "--out BEGUN --size 32"), "--out": ("--out BEGUN", "--out A"),
        "--device": ("--out BEGUN", "--out BEGUN --device warp"), "--quick": ("--out BEGUN", "NO_--quick --out BEGUN"),
        "--preset": (DRY, f"{DRY} --preset imagenet256-b4"),
    } | {flag: ("--out BEGUN", f"--out BEGUN {flag} {value}") for flag, value in {
        "--name": "other", "--seed": 3, "--refine-steps": 2, "--pooling": "mean", "--init": "teacher",
        "--lambda-adv": 0.2, "--lambda-td": 0.5, "--student-steps": 2, "--taps": 1, "--ablation": "", "--bench": "",
        **COMPUTED}.items()
    } | {flag: ("--out BEGUN --ablation", f"--out BEGUN --ablation {flag} {value}") for flag, value in {
        "--seeds": 2, "--workers": 3, "--count": 200}.items()
    }),
    "evaluate": ("--glyphs 20", {
        "--data": ("--out BEGUN", "--out BEGUN --data glyphs"),
        "--size": ("--out BEGUN --data glyphs", "--out BEGUN --data glyphs --size 32"),
        "--quick": ("--out BEGUN --data glyphs", "--out BEGUN --data glyphs --quick"),
        "--count": ("--out BEGUN --data glyphs", "--out BEGUN --data glyphs --count 200"),
        "--device": ("--flops", "--flops --device warp"), "--flops": ("", "--flops"),
        "--images": ("--allow-small --reference glyphs", "--allow-small --reference glyphs --images IMAGES"),
        "--reference": ("--allow-small --images IMAGES", "--allow-small --images IMAGES --reference glyphs"),
        "--allow-small": ("--images IMAGES --reference glyphs", "--images IMAGES --reference glyphs --allow-small"),
    } | {flag: (SCORE, f"{SCORE} {flag} {value}") for flag, value in {
        "--save-npz": "A/x.npz", "--inception-weights": "x.pth", "--resize": "torch", "--glyphs": 30, "--batch": 3,
        "--out": "B"}.items()
    } | {flag: (SAMPLE, f"{SAMPLE} {flag} {value}") for flag, value in {
        "--sample": 3, "--sampler": "sde", "--steps": 3, "--classes": "balanced", "--seed": 1,
        "--w": 1.5, "--cfg-channels": 2, "--amp": "bf16"}.items()
    } | {
        "--checkpoint": ("--sample 2 --out A", "--sample 2 --out A --checkpoint BEGUN/td.pt"),
        "--speed-up": ("--checkpoint BEGUN --sample 2 --out A", "--checkpoint BEGUN --sample 2 --out A --speed-up"),
    }),
    "toy2d": ("--quick --workers 1", {
        "--data": ("", "--data rings"), "--seeds": ("", "--seeds 2"), "--seed": ("", "--seed 4"),
        "--out": ("", "--out B"), "--device": ("", "--device warp"), "--quick": ("", "NO_--quick"),
        "--unify": ("", "--unify"), "--teacher-steps": ("", "--teacher-steps 7"), "--td-steps": ("", "--td-steps 7"),
        "--refine-steps": ("", "--refine-steps 7"), "--workers": ("", "--workers 2"),
    }),
    "data": ("--encode --data-dir IMAGES --vae vae.pt --cache A", {
        "--encode": ("", "NO_--encode"), "--data-dir": ("", "--data-dir OTHERS"), "--cache": ("", "--cache B"),
        "--vae": ("", "--vae other.pt"), "--size": ("", "--size 64"), "--batch": ("", "--batch 3"),
        "--device": ("", "--device warp"), "--strict": ("", "--strict"), "--shard-images": ("", "--shard-images 7"),
    }),
}  # fmt: skip


class Parsed(Exception):
    pass


def parser_of(script, monkeypatch):
    """The ArgumentParser that a script makes."""

    def stop(parser, *arguments):
        raise Parsed(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            SCRIPTS[script].main([])
    return parsed.value.args[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_and_every_flag_is_tried_here(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    flags = {action.option_strings[0] for action in parser._actions} - {"-h"}
    assert flags == FLAGS[script][1].keys() | IMAGENET.get(script, set())
    source = Path(__file__).with_name("test_imagenet.py").read_text()
    assert all(f'"{flag}"' in source for flag in IMAGENET.get(script, ()))
    text = parser.format_help()
    for action in parser._actions:
        assert action.help and len(action.help) > 5 and f"{action.option_strings[0]}" in text


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the words in capitals stand for: two folders of images, and a run with a teacher and a TD student."""
    root = tmp_path_factory.mktemp("places")
    make_folder(root / "IMAGES", 12)
    make_folder(root / "OTHERS", 9, seed=3)
    meanflow_td.main([*RUN.split(), "--out", str(root / "BEGUN")])
    return root


class Recorder:
    """Stands in for what takes long, and notes what it is given."""

    def __init__(self):
        self.calls = []

    def note(self, name, *things):
        self.calls.append((name, *map(self.told, things)))

    @staticmethod
    def told(thing):
        """Something to compare: networks by their weights, functions by nothing."""
        if isinstance(thing, torch.nn.Module):
            parts = [round(p.double().abs().sum().item(), 6) for p in thing.parameters()]
            inner = getattr(thing, "net", None)
            passes = [getattr(inner, name, None) for name in ("checkpointing", "compiling")]
            return type(thing).__name__, parts, getattr(thing, "w", None), passes
        if isinstance(thing, functools.partial):
            return Recorder.told(thing.keywords)
        if isinstance(thing, dict):
            return {key: Recorder.told(value) for key, value in thing.items()}
        return repr(thing) if isinstance(thing, (int, float, str, tuple, list, type(None))) else type(thing).__name__

    @staticmethod
    def drawn(draw):
        x, _ = draw(4, data.rng(0, "drawn"))
        return tuple(x.shape), x.sum().item()

    def train(self, net, draw, objective, **settings):
        self.note("train", net, self.drawn(draw), objective, settings)
        return net.requires_grad_(False), []

    def refine(self, student, teacher, fake, draw, **settings):
        pooling = [head.pooling for head in settings["discriminator"].heads] if settings.get("discriminator") else None
        self.note("refine", student, teacher, self.drawn(draw), pooling, settings)
        return student.requires_grad_(False), []

    def pool(self, workers, *options):
        """A ProcessPoolExecutor that does nothing."""

        def submit(job, *arguments):
            self.note("job", *arguments)
            done = Future()
            done.set_result(None)
            return done

        self.note("pool", workers)
        return contextlib.nullcontext(types.SimpleNamespace(submit=submit, shutdown=None))


@pytest.fixture
def recorded(monkeypatch, fake):  # noqa: F811
    recorder = Recorder()
    monkeypatch.setattr(meanflow_td, "train", recorder.train)
    monkeypatch.setattr(toy2d, "train", recorder.train)
    monkeypatch.setattr(toy2d, "refine", recorder.refine)
    monkeypatch.setattr(dmd_refine, "refine", recorder.refine)
    monkeypatch.setattr(dmd_refine, "bench", lambda args: recorder.note("bench", args.batch))
    monkeypatch.setattr(dmd_refine, "attention_weights", lambda *_, **__: (torch.zeros(8, 1, 16, 16), ()))
    monkeypatch.setattr(dmd_refine, "plot_attention", lambda *_, **__: None)
    monkeypatch.setattr(data, "ProcessPoolExecutor", recorder.pool)
    monkeypatch.setattr(dmd_refine, "evaluate_run", lambda run, count: recorder.note("evaluate_run", count) or [])
    monkeypatch.setattr(dmd_refine, "gradient_variance", lambda run, seed: {"seed": seed, "data": 2.0, "teacher": 1.0})
    monkeypatch.setattr(dmd_refine, "plot_ablation", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate_run", lambda run, *how: recorder.note("evaluate_run", run.plan, *how))
    monkeypatch.setattr(evaluate, "load_inception",
                        lambda path: recorder.note("inception", str(path)) or (FakeNet(), "6726825d" + 56 * "0"))
    extract = evaluate.extract
    monkeypatch.setattr(evaluate, "extract", lambda net, source, *args, **options: recorder.note(
        "extract", len(source), options["resize"], options["batch"]) or extract(net, source, *args, **options))
    monkeypatch.setattr(dmd_refine, "dry_run", lambda args, given: recorder.note("dry", meanflow_td.plan_name(args)))
    monkeypatch.setattr(evaluate, "speed_up", lambda *_: recorder.note("speed-up"))
    monkeypatch.setattr(evaluate, "flops_table", lambda: {"a": 1.0})
    monkeypatch.setattr(toy2d, "report", lambda *_: None)
    tiny = dict(widths=(4, 6), hd_width=4, unify_widths=(4,), unify_rounds=2, samples=100, ode_steps=2)
    for plan in ("quick", "default"):
        monkeypatch.setitem(toy2d.PLANS, plan, toy2d.PLANS[plan] | tiny)
    monkeypatch.setattr(data, "load_vae", lambda path: (torch.nn.Linear(1, 1), f"sha of {path}"))
    monkeypatch.setattr(data, "encode_folder", lambda folder, vae, cache, **options: recorder.note(
        "encode", folder.size, len(folder), folder.root.name, cache.name, options))
    monkeypatch.setattr(data, "code_version", lambda: "0" * 8)
    return recorder


def observe(script, arguments, root, recorder, capsys):
    """All that a command does: exit code, what is said, the configuration, what the recorders noted."""
    recorder.calls.clear()
    code = 0
    try:
        SCRIPTS[script].main([str(root / word) if word[:1].isupper() else word for word in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    told = capsys.readouterr()
    configs = {str(path.relative_to(root)): path.read_text() for name in ("config", "fingerprint")
               for path in sorted(root.glob(f"*/{name}.json"))}  # fmt: skip
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if "cache" not in path.parts)
    assert "Traceback" not in told.err
    return code, told.err.splitlines()[-1:], configs, files, recorder.calls.copy()


@pytest.mark.parametrize("script, flag", [(script, flag) for script in FLAGS for flag in FLAGS[script][1]])
def test_every_flag_changes_something(script, flag, tmp_path, places, recorded, monkeypatch, capsys):
    always, pairs = FLAGS[script]
    monkeypatch.chdir(tmp_path)
    seen, began, fine = [], [], []
    for i, given in enumerate(pairs[flag]):
        root = tmp_path / str(i) / "root"  # of one name, as it is seen in what is written
        shutil.copytree(places, root)
        words = given.split()
        words = [*[word for word in always.split() if f"NO_{word}" not in words],
                 *[word for word in words if not word.startswith("NO_")]]  # fmt: skip
        if "--out" not in words and script != "data":
            words += ["--out", "A"]
        began.append(words)
        code, said, configs, files, calls = observe(script, words, root, recorded, capsys)
        fine.append(code == 0)
        # what config.json alone has learned may be read by nobody
        result = code, said, configs if not calls else None, files, calls
        seen.append(repr(result).replace(str(root), "ROOT"))
    assert seen[0] != seen[1], f"{script}.py {' '.join(began[1])} does what {' '.join(began[0])} does"
    assert any(fine) or flag == "--data-dir" or script == "evaluate", (began, seen)


def test_a_flag_that_is_never_read_would_be_seen(tmp_path, places, recorded, capsys):
    same = [observe("meanflow_td", [*RUN.split(), "--out", str(tmp_path / name)], places, recorded, capsys)
            for name in ("one", "two")]  # fmt: skip
    assert same[0] == same[1] and same[0][0] == 0 and len(same[0][4]) == 2

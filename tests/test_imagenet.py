"""The main experiment in small: a tree like ImageNet's, a tiny DiT and a tiny VAE with the real key names.

Filled weights learn nothing: what is tested is that every part gets the right thing from the one before.
"""

import argparse
import contextlib
import io
import itertools
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import types
import urllib.error
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT, broken, fill, tiny_teacher
from PIL import Image
from test_latents import TRUNCATED, contents, make_tree, tiny_vae
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import dmd_refine
import evaluate
import meanflow_td
import models
from awd import AdaptiveWeightedDiscriminator
from models import DiT, DiTTeacher, SiTTeacher, frozen_copy

TINY = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=1, num_classes=3,
            learn_sigma=True)  # fmt: skip


def script(module, *arguments):
    """A script's main in this process. -> exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with train/ (3 classes, 11 images), vae.pt, SiT-tiny.pt, DiT-tiny.pt, and the latents in cache/."""
    root = tmp_path_factory.mktemp("imagenet")
    make_tree(root / "train")
    (root / "train" / TRUNCATED).unlink()  # encoding on the fly would stop at it
    torch.save(tiny_vae().state_dict(), root / "vae.pt")
    for kind in ("SiT", "DiT"):
        torch.save({"ema": fill(DiT(**TINY)).state_dict()}, root / f"{kind}-tiny.pt")
    code, _, err = script(data, "--encode", "--data-dir", root / "train", "--cache", root / "cache", "--vae",
                          root / "vae.pt", "--size", 64, "--device", "cpu")  # fmt: skip
    assert code == 0, err
    return root


def imagenet(root, kind="SiT", **changes):
    """The flags that name all parts. A value of None leaves a flag out."""
    flags = {"data": "imagenet", "cache": root / "cache", "teacher": root / f"{kind}-tiny.pt", "vae": root / "vae.pt",
             "device": "cpu", **changes}  # fmt: skip
    given = {name: value for name, value in flags.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]


def train(root, out, kind="SiT", *more):
    """Both stages, three updates each."""
    for module in (meanflow_td, dmd_refine):
        code, _, err = script(module, *imagenet(root, kind), "--quick", "--out", out, *more)
        assert code == 0, err
    return out


@pytest.fixture(scope="module")
def trained(made):
    return train(made, made / "run", "SiT", "--amp", "bf16", "--accumulate", "2", "--checkpointing")


# ---------------------------------------------------------------------------------------------------------------------
# The chain
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_chain(made, trained, tmp_path):
    """Encode, TD, refine, sample, score: what each leaves is what the next one takes."""
    config = json.loads((trained / "config.json").read_text())
    assert {"network", "td", "data", "hd"} <= set(config) and "teacher" not in config
    assert config["network"] == {"wrapper": "SiTTeacher", **TINY, "mlp_ratio": 4.0}
    assert config["data"]["latent"] == [4, 8, 8] and config["data"]["size"] == 64
    assert config["data"]["vae sha256"] == data.sha256_file(made / "vae.pt")
    assert config["data"]["teacher sha256"] == data.sha256_file(made / "SiT-tiny.pt")
    lines = [line.split(",") for line in (trained / "metrics.csv").read_text().splitlines()[1:]]
    assert {row[0] for row in lines[1:]} == {"td", "hd-seed0"}
    for name in ("td-000002", "hd-seed0-000002", "hd-seed0-dmd-000002"):
        with Image.open(trained / "samples" / f"{name}.png") as picture:
            assert picture.mode == "RGB" and picture.width == 640 and len(np.unique(np.asarray(picture))) > 20
    teacher = models.read_weights(made / "SiT-tiny.pt")
    for stage in ("td", "hd-seed0"):
        net = torch.load(trained / f"{stage}.pt", weights_only=True)["net"]
        moved = [(net[f"net.{name}"] - weights).abs().max() for name, weights in teacher.items() if name != "pos_embed"]
        assert 0 < max(moved) < 1e-2  # three small steps from the teacher

    torch.save(fill(evaluate.InceptionV3()).state_dict(), tmp_path / "inception.pth")
    flags = ["--checkpoint", trained / "hd-seed0.pt", "--vae", made / "vae.pt", "--out", tmp_path / "samples"]
    code, said, err = script(evaluate, "--sample", 5, "--batch", 2, "--classes", "balanced", *flags, "--save-npz",
                             tmp_path / "samples.npz", "--device", "cpu")  # fmt: skip
    assert code == 0 and re.search(r"\d ms per image", said), err
    code, said, err = script(evaluate, "--images", tmp_path / "samples" / "images", "--reference", made / "train",
                             "--allow-small", "--inception-weights", tmp_path / "inception.pth", "--device", "cpu",
                             "--out", tmp_path / "scores")  # fmt: skip
    assert code == 0, err
    (row,) = json.loads((tmp_path / "scores" / "results.json").read_text())
    told = row["fingerprint"]
    assert told["sampler"] == "student" and told["nfe"] == row["nfe"] == 1 and told["labels"] == "balanced"
    assert told["vae"] == data.sha256_file(made / "vae.pt") and told["vae_scale"] == models.SD_VAE_SCALE
    assert told["precision"] == "float32" and told["guidance"] == "baked in" and row["seed"] == 0
    assert not any(str(value).startswith("unknown") for value in told.values()) and np.isfinite(row["metrics"]["FID-5"])
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (5, 64, 64, 3)
        np.testing.assert_array_equal(file["arr_0"], data.ImageFolder(tmp_path / "samples" / "images").images(range(5)))


@pytest.mark.slow
def test_a_student_of_other_sizes_and_a_dit(made, tmp_path, monkeypatch):
    """A preset whose sizes are not the teacher's starts from random weights; a DiT's times stay within its steps."""
    small = dict(meanflow_td.PLANS["imagenet-quick"], network=dict(patch_size=4, hidden_size=32, depth=1, num_heads=1))
    monkeypatch.setitem(meanflow_td.PLANS, "imagenet-quick", small)
    run = json.loads((train(made, tmp_path / "run", "DiT") / "config.json").read_text())
    assert run["network"] == {"wrapper": "Teacher", **TINY, "mlp_ratio": 4.0, "learn_sigma": False} | small["network"]
    assert "span_embedder.mlp.0.weight" in "".join(torch.load(tmp_path / "run" / "td.pt", weights_only=True)["net"])


def test_a_dits_student_is_trained_at_times_that_it_knows():
    teacher, seen = DiTTeacher(fill(DiT(**TINY))).requires_grad_(False), []
    assert teacher.times == pytest.approx((0.0099, 0.9937), abs=1e-4) and SiTTeacher(teacher.net).times == (0, 1)

    def watched(x_t, *, t, y):
        seen.append(t)
        return torch.zeros_like(x_t)

    student = DiTTeacher(models.student_from_teacher(teacher.net))
    spans, forward = [], student.forward
    student.forward = lambda x_t, *, t, r, y: spans.append((r, t)) or forward(x_t, t=t, r=r, y=y)
    x_0, y = torch.randn(64, 4, 8, 8), torch.zeros(64, dtype=torch.int64)
    meanflow_td.student_objective(student, x_0, y, torch.randn_like(x_0), data.rng(0, "t"), teacher=watched)
    r, t = spans[-1]
    low, high = teacher.times
    assert r.min() == pytest.approx(low) and t.max() <= high + 1e-6 and (r <= t).all() and torch.equal(seen[0], t)


def test_encoding_on_the_fly_draws_what_the_cache_draws(made, tmp_path):
    parser = meanflow_td.argparse.ArgumentParser()
    meanflow_td.add_run_arguments(parser)
    meanflow_td.add_training_arguments(parser)
    draws = []
    for changes in ({}, {"cache": None, "data_dir": made / "train"}):
        args = parser.parse_args([*map(str, imagenet(made, **changes)), "--quick", "--out", str(tmp_path / "run")])
        run = meanflow_td.open_run(args, {})  # the same run folder takes both: what is learned from is the same
        draws.append(run.source.draw(30, data.rng(0, "draw")))
    assert run.source.shape == run.shape == (4, 8, 8) and run.decode(draws[0][0][:2]).shape == (2, 3, 64, 64)
    torch.testing.assert_close(draws[0][0], draws[1][0], atol=3e-4, rtol=0)
    assert torch.equal(draws[0][1], draws[1][1])


# ---------------------------------------------------------------------------------------------------------------------
# What is missing, and what does not fit
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_machine_with_nothing_is_told_all_that_is_missing(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    (tmp_path / "here").mkdir()
    process = subprocess.run([sys.executable, ROOT / "meanflow_td.py", "--data", "imagenet"], cwd=tmp_path / "here",
                             text=True, capture_output=True, env={"HOME": str(tmp_path)})  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10  # of a core that may be busy
    assert process.returncode == 2 and "Traceback" not in process.stderr and not process.stdout
    for name in ("SiT-XL/2", "ema"):
        assert data.PUBLISHED[name].url in process.stderr
        assert str(tmp_path / ".cache/torch/hub/checkpoints" / data.PUBLISHED[name].file) in process.stderr
    assert "--data-dir" in process.stderr and "image-net.org" in process.stderr
    assert not list((tmp_path / "here").iterdir()) and not (tmp_path / ".cache/torch").exists()  # no run, no cache


def test_without_a_network_one_sentence_for_each_file_that_could_not_be_fetched(made, tmp_path, monkeypatch):
    def no_network(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for teacher, vae in (("DiT-XL/2", "mse"), (made / "SiT-tiny.pt", "ema")):
        code, _, err = script(meanflow_td, *imagenet(made, teacher=teacher, vae=vae), "--out", tmp_path / "run")
        names = [name for name in (teacher, vae) if name in data.PUBLISHED]
        assert code == 2 and len(err.strip().splitlines()) == 1 + len(names) and "not known" in err
        for name in names:
            assert data.PUBLISHED[name].url in err and str(data.PUBLISHED[name].path) in err
    code, _, err = script(data, "--encode", "--data-dir", made / "train", "--cache", tmp_path / "c", "--vae", "mse")
    assert code == 2 and data.PUBLISHED["mse"].url in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists() and not (tmp_path / "c").exists()


def another_size(root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    shutil.copy(root / "SiT-tiny.pt", data.PUBLISHED["SiT-XL/2"].path)
    monkeypatch.setattr(meanflow_td, "dit_by_name", lambda name: DiT(**{**TINY, "hidden_size": 128}))  # XL/2 is large
    return {"teacher": "SiT-XL/2"}, "it holds a DiT of hidden size 64, depth 2, patch size 2, expected is one of"


def other_images(root, tmp_path, monkeypatch):
    torch.save(fill(DiT(**{**TINY, "input_size": 16})).state_dict(), tmp_path / "SiT-large.pt")
    return {"teacher": tmp_path / "SiT-large.pt"}, "gives latents (4, 8, 8), but the teacher"


def wrong_classes(root, tmp_path, monkeypatch):
    torch.save(fill(DiT(**{**TINY, "num_classes": 5})).state_dict(), tmp_path / "SiT-five.pt")
    return {"teacher": tmp_path / "SiT-five.pt"}, "has 3 classes, but the teacher"


def empty_class(root, tmp_path, monkeypatch):
    shutil.copytree(root / "train", tmp_path / "train")
    (tmp_path / "train" / "n09999999").mkdir()
    return {"cache": None, "data_dir": tmp_path / "train"}, "n09999999 holds no images, so labels would shift"


def other_vae(root, tmp_path, monkeypatch):
    torch.save(tiny_vae(1.0).state_dict(), tmp_path / "other.pt")
    return {"vae": tmp_path / "other.pt"}, "was made with another VAE"


def nameless(root, tmp_path, monkeypatch):
    shutil.copy(root / "SiT-tiny.pt", tmp_path / "teacher.pt")
    return {"teacher": tmp_path / "teacher.pt"}, "has to tell whether it is a SiT or a DiT"


def no_dit(root, tmp_path, monkeypatch):
    shutil.copy(root / "vae.pt", tmp_path / "SiT-vae.pt")
    return {"teacher": tmp_path / "SiT-vae.pt"}, "holds no DiT"


@pytest.mark.parametrize("spoil", [another_size, other_images, wrong_classes, empty_class, other_vae, nameless, no_dit],
                         ids=lambda spoil: spoil.__name__)  # fmt: skip
def test_parts_that_do_not_fit_get_one_sentence(made, tmp_path, monkeypatch, spoil):
    changes, sentence = spoil(made, tmp_path, monkeypatch)
    before = contents(tmp_path)
    code, _, err = script(meanflow_td, *imagenet(made, **changes), "--quick", "--out", tmp_path / "run")
    assert code == 2 and sentence in err and len(err.strip().splitlines()) == 1, err
    assert contents(tmp_path) == before


def strange_teachers(tmp_path):
    """(a file or folder that is no teacher, a word of what is said of it): shapes that no DiT has, and no weights."""
    weights = DiT(**TINY).state_dict()
    for i, (name, shape) in enumerate([("final_layer.linear.bias", ()), ("blocks.0.mlp.fc1.bias", ()),
                                       ("x_embedder.proj.weight", (0, 4, 2, 2)), ("pos_embed", (16,)),
                                       ("pos_embed", None)]):  # fmt: skip
        strange = {**weights, name: torch.zeros(shape or ())}
        if shape is None:
            del strange[name]
        torch.save(strange, tmp_path / f"SiT-{i}.pt")
        yield tmp_path / f"SiT-{i}.pt", "does not hold a DiT with all its parts"
    (tmp_path / "SiT-text.pt").write_text("no weights")
    yield tmp_path / "SiT-text.pt", "is damaged or no file of weights"
    (tmp_path / "SiT-folder").mkdir()
    yield tmp_path / "SiT-folder", "cannot be read"


def test_a_teacher_that_is_none_gets_one_sentence_from_the_dry_run_too(made, tmp_path):
    for teacher, words in strange_teachers(tmp_path):
        for more in (["--dry-run"], ["--out", tmp_path / "run"]):
            code, _, err = script(meanflow_td, *imagenet(made, teacher=teacher), "--quick", *more)
            assert code == 2 and words in err and str(teacher) in err and len(err.strip().splitlines()) == 1, err
    for flags, words in ((["--taps", 1, 2], "blocks (1, 2) are to be tapped, and the teacher has 2"),
                         (["--batch", 2, "--accumulate", 3], "a batch of 2 can't be taken in 3 parts")):
        code, _, err = script(dmd_refine, *imagenet(made), "--quick", "--dry-run", *flags)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "run").exists()


def test_stages_in_the_wrong_order_and_flags_that_do_not_belong(made, tmp_path):
    code, _, err = script(dmd_refine, *imagenet(made), "--quick", "--out", tmp_path / "run")
    assert code == 2 and "holds no finished td" in err and not (tmp_path / "run").exists()
    code, _, err = script(dmd_refine, *imagenet(made), "--ablation")
    assert code == 2 and "--ablation is of --data glyphs" in err
    code, _, err = script(meanflow_td, "--dry-run")
    assert code == 2 and "--dry-run is for --data imagenet" in err


# ---------------------------------------------------------------------------------------------------------------------
# The dry run
# ---------------------------------------------------------------------------------------------------------------------


def test_the_dry_run_adds_up(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    code, said, _ = script(meanflow_td, "--data", "imagenet", "--dry-run", "--out", tmp_path / "run")
    assert code == 2 and not list(tmp_path.iterdir()) and said.count("missing:") == 3 and said.count("curl -L") == 2
    C, teacher = 1152, 675_129_632
    table = 256 * C  # pos_embed is fixed: it has neither gradient nor moments
    student = teacher + (256 * C + C) + (C * C + C)  # the embedder of the time span
    head = 2 * C + C * C + C + (C * C + C) + 2 * C + (C * C + C) + (C + 1)  # norm, keys, query, values, norm, ...
    vectors = 2 * C + 2 * C + (1 + C)  # of the power iterations of three spectral norms
    counts = re.findall(r"([\d,]+)  numbers in the", said)
    assert [int(number.replace(",", "")) for number in counts] == [teacher, student, teacher, 4 * (head + vectors)]
    rows = {name: list(map(float, values)) for name, *values in
            re.findall(r"^ *(\w+) +(\d+\.\d\d) +(\d+\.\d\d)$", said, re.MULTILINE)}  # fmt: skip
    td, both = student - table, student - table + teacher - table + 4 * head
    expected = {"weights": [4 * (teacher + student), 4 * (2 * teacher + student + 4 * (head + vectors))],
                "EMA": [4 * student, 4 * student], "optimiser": [8 * td, 8 * both], "gradients": [4 * td, 4 * both]}
    for name, sizes in expected.items():
        assert rows[name] == pytest.approx([size / 1e9 for size in sizes], abs=0.006), name
    for column in (0, 1):
        parts = [rows[name][column] for name in (*expected, "activations")]
        assert rows["sum"][column] == pytest.approx(sum(parts), abs=0.03)
    assert rows["activations"][1] > rows["activations"][0] > 100
    assert "42.0 GB of disk" in said


@pytest.mark.slow
def test_the_presets_are_two_sizes_of_student(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    said = [script(meanflow_td, "--data", "imagenet", "--dry-run", "--preset", f"imagenet256-{size}")[1]
            for size in ("xl2", "b4")]  # fmt: skip
    sizes = [int(re.findall(r"([\d,]+)  numbers in the", text)[1].replace(",", "")) for text in said]
    assert sizes[0] > 675_129_632 and 120e6 < sizes[1] < 140e6


def test_activations_are_what_autograd_keeps():
    """Fake tensors count as real ones do, in both precisions; checkpointing keeps less; rows cost alike."""
    def kept(build, batch, amp, checkpointing=False):
        net = build()
        net.checkpointing = checkpointing
        x, t, y = torch.randn(batch, 4, 8, 8), torch.rand(batch), torch.zeros(batch, dtype=torch.int64)
        with meanflow_td.autocast(torch.device("cpu"), amp):
            return dmd_refine.saved_bytes(lambda: net(x, t=t, y=y).square().sum(), net)

    def build():
        return DiT(**TINY)

    for amp in ("off", "bf16"):
        real = [kept(build, batch, amp) for batch in (2, 4, 6)]
        with FakeTensorMode():
            assert [kept(build, batch, amp) for batch in (2, 4, 6)] == real
            assert kept(build, 6, amp, checkpointing=True) < real[2] / 2
        assert real[2] - real[1] == real[1] - real[0] > 0
    # one row in fp32, by hand for what is large: in each block 16 tokens of 64 channels, 3 times for q, k, v, and the
    # MLP's 256 before and after GELU; the rest of what is kept are single tokens' 64 channels
    row = (kept(build, 4, "off") - kept(build, 2, "off")) / 2 / 4
    assert 2 * 16 * (3 * 64 + 2 * 256 + 4 * 64) < row < 2 * 16 * (3 * 64 + 2 * 256 + 12 * 64)


# ---------------------------------------------------------------------------------------------------------------------
# Precision, accumulation, checkpointing
# ---------------------------------------------------------------------------------------------------------------------


def draw(batch, generator):
    return torch.randn(batch, 1, 8, 8, generator=generator), torch.randint(3, (batch,), generator=generator)


def gradients(module, objective, two_times, **how):
    """The gradient of the one update of a tiny net."""
    net = tiny_teacher(1, two_times)
    module.train(net, draw, objective(module), steps=1, batch=6, lr=1e-3, seed=0, stream="t", name="t", **how)
    return [p.grad for p in net.parameters()]


OBJECTIVES = {
    "teacher": (lambda module: partial(module.teacher_objective, null_class=3), False),
    "student": (lambda module: partial(module.student_objective, teacher=tiny_teacher(9).requires_grad_(False)), True),
}


def check_accumulation(module, name):
    objective, two_times = OBJECTIVES[name]
    whole = gradients(module, objective, two_times)
    assert max(g.abs().max() for g in whole) > 1e-3
    for parts in (2, 4, 6):  # 4 does not divide 6
        for a, b in zip(gradients(module, objective, two_times, accumulate=parts), whole):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name):
    check_accumulation(meanflow_td, name)
    for old, new in [("(part * share).backward()", "part.backward()"), ("generator.set_state(drawn)  #", "#")]:
        with pytest.raises(AssertionError):
            check_accumulation(broken(meanflow_td, (old, new)), name)


@pytest.mark.parametrize("pooling, student_steps", [(None, 2), ("attention", 1)])
def test_refinement_in_parts_has_the_gradients_of_the_whole(pooling, student_steps):
    found = []
    for accumulate in (1, 2):
        student, teacher, fake = tiny_teacher(1, True), tiny_teacher(2).requires_grad_(False), tiny_teacher(3)
        discriminator = None
        if pooling:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                discriminator = AdaptiveWeightedDiscriminator([16], pooling).eval()  # its spectral norms stand still
        # rates of 0: Adam's first step is a matter of signs, and rounding decides some of them
        _, rows = dmd_refine.refine(
            student, teacher, fake, draw, steps=1, batch=8, seed=0, stream="t", name="t", discriminator=discriminator,
            taps=(1,), lambda_td=0.5, student_steps=student_steps, lr=0.0, lr_fake=0.0, lr_discriminator=0.0,
            accumulate=accumulate)  # fmt: skip
        nets = [student, fake] + ([discriminator] if pooling else [])
        found.append([p.grad for net in nets for p in net.parameters()])
        terms = {key: value for key, value in rows[0].items() if isinstance(value, float) and "second" not in key}
        assert all(np.isfinite(value) for value in terms.values())
    for whole, parts in zip(*found):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


def test_more_parts_than_rows_are_refused():
    with pytest.raises(data.BadInput, match="a batch of 6 can't be taken in 7 parts"):
        gradients(meanflow_td, *OBJECTIVES["teacher"], accumulate=7)


def test_checkpointing_changes_no_gradient_and_leaves_the_tangent_alone(monkeypatch):
    student, teacher = tiny_teacher(1, two_times=True), tiny_teacher(9).requires_grad_(False)
    calls, checkpoint = [], models.checkpoint
    monkeypatch.setattr(models, "checkpoint", lambda *args, **options: calls.append(1) or checkpoint(*args, **options))
    found = []
    for student.net.checkpointing in (False, True):
        teacher.net.checkpointing = student.net.checkpointing
        (x_0, y), (eps, _) = draw(6, data.rng(0, "x")), draw(6, data.rng(0, "eps"))
        loss, _ = meanflow_td.student_objective(student, x_0, y, eps, data.rng(0, "t"), teacher=teacher)
        found.append(torch.autograd.grad(loss, student.parameters()))
    assert len(calls) == len(student.net.blocks)  # neither the teacher's pass nor the one for du/dt
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_autocast_keeps_in_fp32_what_is_promised(monkeypatch):
    """bf16 in the blocks for v and u; fp32 in du/dt's pass, times, their embeddings, target, loss, gradient."""
    student, teacher = tiny_teacher(1, two_times=True), tiny_teacher(9).requires_grad_(False)
    seen, target = {}, meanflow_td.meanflow_target

    def watch(net, who):
        def hook(name):
            def note(module, args, output):
                kind = f"{who}, du/dt" if who == "student" and not torch.is_grad_enabled() else who
                seen.setdefault((kind, name), set()).add(output.dtype)
            return note

        net.net.blocks[0].mlp.fc1.register_forward_hook(hook("block"))
        net.net.t_embedder.register_forward_hook(hook("time"))

    watch(student, "student")
    watch(teacher, "teacher")

    def watched_target(*args, **options):
        result = target(*args, **options)
        seen["target"] = {x.dtype for x in (*result, args[2], options["t"], options["r"])}
        return result

    monkeypatch.setattr(meanflow_td, "meanflow_target", watched_target)
    ema, rows = meanflow_td.train(student, draw, partial(meanflow_td.student_objective, teacher=teacher), steps=1,
                                  batch=6, lr=1e-3, seed=0, stream="t", name="t", amp="bf16")  # fmt: skip
    low, full = {torch.bfloat16}, {torch.float32}
    assert seen == {
        ("teacher", "block"): low, ("student", "block"): low, ("student, du/dt", "block"): full, "target": full,
        ("teacher", "time"): full, ("student", "time"): full, ("student, du/dt", "time"): full}  # fmt: skip
    assert {p.dtype for net in (student, ema) for p in net.parameters()} == full
    assert {p.grad.dtype for p in student.parameters()} == full
    exact = gradients(meanflow_td, *OBJECTIVES["student"])
    close = gradients(meanflow_td, *OBJECTIVES["student"], amp="bf16")
    apart = torch.cat([(a - b).flatten() for a, b in zip(exact, close)]).norm()
    assert 0 < apart < 0.05 * torch.cat([a.flatten() for a in exact]).norm()


def test_a_dit_is_not_rounded_to_bf16():
    teacher = DiTTeacher(fill(DiT(**TINY))).requires_grad_(False)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 1.0]), torch.tensor([0, 1])
    with meanflow_td.autocast(torch.device("cpu"), "bf16"):
        low = teacher(x, t=t, y=y)
    torch.testing.assert_close(low, teacher(x, t=t, y=y), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def pixels(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


@pytest.fixture(scope="module")
def student(made):
    """A run folder whose student is its teacher: sampling needs no more."""
    out = made / "run-to-sample"
    code, _, err = script(meanflow_td, *imagenet(made), "--quick", "--td-steps", 1, "--out", out)
    assert code == 0, err
    return out


def test_samples_are_functions_of_seed_and_index(made, student, tmp_path):
    flags = ["--sample", 5, "--batch", 2, "--vae", made / "vae.pt", "--device", "cpu"]
    code, said, err = script(evaluate, *flags, "--checkpoint", student, "--out", tmp_path / "a", "--speed-up",
                             "--teacher", made / "SiT-tiny.pt")  # fmt: skip
    assert code == 0 and "times as long" in said and "5 of 5" in said, err
    whole = pixels(tmp_path / "a")
    assert len(whole) == len(set(whole.values())) == 5
    for name in ("000001.png", "000004.png"):  # a stopped run: what is missing is made again, to the same bytes
        (tmp_path / "a" / "images" / name).unlink()
    flags += ["--checkpoint", student / "td.pt", "--out"]
    assert script(evaluate, *flags, tmp_path / "a")[0] == 0 and pixels(tmp_path / "a") == whole
    code, said, _ = script(evaluate, *flags, tmp_path / "a")
    assert code == 0 and "there already" in said
    more = ["--sample", 6, *flags[2:]]
    assert script(evaluate, *more, tmp_path / "a")[0] == 0  # 5 of its 6 images are there; the last batch is made whole
    assert {name: pixels(tmp_path / "a")[name] for name in ("000000.png", "000003.png")}.items() <= whole.items()
    for other in (["--seed", "1"], ["--steps", "2"], ["--classes", "0,2"]):
        code, _, err = script(evaluate, *flags, tmp_path / "a", *other)
        assert code == 2 and "holds other samples" in err and len(err.strip().splitlines()) == 1
    assert script(evaluate, *flags, tmp_path / "b", "--seed", "1")[0] == 0
    assert not set(pixels(tmp_path / "b").values()) & set(whole.values())
    told = json.loads((tmp_path / "b" / "fingerprint.json").read_text())
    assert told["seed"] == 1 and told["nfe"] == 1 and evaluate.read_sidecar(tmp_path / "b" / "images")["seed"] == 1
    with Image.open(tmp_path / "b" / "grid.png") as picture:
        assert picture.width == 640


def test_one_process_alone_writes_samples_and_ctrl_c_waits_for_a_batch(made, student, tmp_path, monkeypatch):
    flags = ["--sample", 5, "--batch", 2, "--vae", made / "vae.pt", "--device", "cpu", "--checkpoint", student, "--out"]
    paint, before = evaluate.paint, signal.signal(signal.SIGINT, signal.default_int_handler)

    def press(*arguments):
        signal.raise_signal(signal.SIGINT)
        return paint(*arguments)

    monkeypatch.setattr(data.Patience, "asked", False)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "paint", press)
        code, _, err = script(evaluate, *flags, tmp_path / "a")
    signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(data.Patience, "asked", False)
    assert code == 130 and "as soon as this step is saved" in err and len(pixels(tmp_path / "a")) == 2
    (tmp_path / "a" / "images" / "000002.png.7.partial").touch()  # what a kill leaves
    with data.alone(tmp_path / "a"):
        code, _, err = script(evaluate, *flags, tmp_path / "a")
    assert code == 2 and "another process works in" in err
    for out in ("a", "b"):
        assert script(evaluate, *flags, tmp_path / out)[0] == 0
    assert pixels(tmp_path / "a") == pixels(tmp_path / "b") and len(pixels(tmp_path / "a")) == 5


def test_a_painting_is_of_the_labels_the_noise_the_steps_and_the_precision_that_were_asked_for(student):
    net = meanflow_td.saved_run(student, "cpu").load("td", two_times=True)
    painter = types.SimpleNamespace(student=net, shape=(4, 8, 8), classes=3, decode=lambda x: x)
    indices, found = [4, 7], {}
    asked = [(1, "off", "balanced"), (2, "off", "balanced"), (1, "bf16", "balanced"), (1, "off", (2, 0))]
    for steps, amp, classes in asked:
        args = types.SimpleNamespace(classes=classes, seed=5, device="cpu", amp=amp)
        x, *_ = evaluate.paint(painter, "student", steps, indices, args)
        eps = torch.stack([torch.randn(4, 8, 8, generator=data.rng(5, "sample", i)) for i in indices])
        y = torch.tensor([1, 1] if classes == "balanced" else [2, 0])
        expected = meanflow_td.sample(net, eps, y, steps)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5 if amp == "off" else 0.1)
        found[steps, amp, classes] = x
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in itertools.combinations(found.values(), 2))


def test_latents_are_decoded_in_the_vaes_own_scale():
    vae, x = tiny_vae(), torch.randn(3, 4, 8, 8, generator=data.rng(0, "latents"))
    torch.testing.assert_close(data.decode_latents(vae, x, 0.18215), vae.decode(x / 0.18215))


def test_convolutions_are_rounded_to_tf32_in_the_vae_alone(monkeypatch):
    vae, seen = tiny_vae(), []
    data.check_device(argparse.ArgumentParser(), "cpu")
    for name in ("encode", "decode"):
        call = getattr(vae, name)
        watched = partial(lambda call, x: seen.append(torch.backends.cudnn.allow_tf32) or call(x), call)
        monkeypatch.setattr(vae, name, watched)
    data.decode_latents(vae, data.encode_moments(vae, torch.zeros(1, 3, 64, 64))[:, 0], 1.0)
    assert seen == [True, True] and not torch.backends.cudnn.allow_tf32


def test_the_teacher_of_stage_1_is_guided_as_the_flags_say(made, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(meanflow_td, "train", lambda net, draw, objective, **settings: calls.append(
        (objective.keywords, settings)) or (net, []))  # fmt: skip
    code, _, err = script(meanflow_td, *imagenet(made), "--quick", "--w", 2, "--cfg-channels", 1, "--out", tmp_path)
    assert code == 0, err
    ((told, settings),) = calls
    plan = meanflow_td.PLANS["imagenet-quick"]["td"]
    assert (told["teacher"].w, told["teacher"].cfg_channels, told["share_spans"]) == (2.0, 1, plan["share_spans"])
    assert settings["ema_decay"] == plan["ema_decay"] and settings["clip"] == plan["clip"]


def test_labels():
    def labels(wanted, seed=0):
        return [evaluate.label_of(i, wanted, 3, seed) for i in range(300)]

    assert labels("balanced")[:4] == [0, 1, 2, 0] and labels((2, 0))[:3] == [2, 0, 2]
    assert labels("random") == labels("random") != labels("random", seed=1)
    assert min(np.bincount(labels("random"), minlength=3)) > 70


@pytest.mark.parametrize("sampler, kind, calls", [
    ("ddpm", "DiT", 3), ("sde", "SiT", 3), ("heun", "SiT", 6), ("heun", "DiT", 6)])  # fmt: skip
def test_teachers_samples_do_not_depend_on_the_batch(made, tmp_path, sampler, kind, calls):
    found = []
    for batch in (1, 3):
        out = tmp_path / str(batch)
        code, _, err = script(evaluate, "--sample", 3, "--sampler", sampler, "--steps", 3, "--teacher",
                              made / f"{kind}-tiny.pt", "--vae", made / "vae.pt", "--batch", batch, "--w", "1.5",
                              "--out", out, "--device", "cpu")  # fmt: skip
        assert code == 0, err
        found.append(data.ImageFolder(out / "images").images(range(3)).astype(int))
        told = json.loads((out / "fingerprint.json").read_text())
        assert told["nfe"] == calls and told["guidance"] == [1.5, 3] and told["teacher"]
    assert abs(found[0] - found[1]).max() <= 1 and len(np.unique(found[0])) > 5  # rounding alone


def test_guidance_of_a_teachers_samples_is_what_the_flags_say(made, tmp_path):
    """--w counts, --cfg-channels counts where there is guidance, and where there is none it does not."""
    found = []
    for w, channels in (("1.5", 3), ("1.5", 4), ("3", 3), ("1", 3), ("1", 4)):
        out = tmp_path / f"{w}-{channels}"
        code, _, err = script(evaluate, "--sample", 2, "--sampler", "heun", "--steps", 2, "--teacher",
                              made / "SiT-tiny.pt", "--vae", made / "vae.pt", "--w", w, "--cfg-channels", channels,
                              "--out", out, "--device", "cpu")  # fmt: skip
        assert code == 0, err
        found.append(str(pixels(out)))
    assert len(set(found)) == 4 and found[3] == found[4]


def test_sampling_refuses(made, student, tmp_path):
    flags = ["--sample", 2, "--vae", made / "vae.pt", "--device", "cpu", "--out", tmp_path / "new"]
    torch.save(tiny_vae(1.0).state_dict(), tmp_path / "other.pt")
    torch.save(fill(DiT(**{**TINY, "learn_sigma": False})).state_dict(), tmp_path / "DiT-no-sigma.pt")
    shutil.copytree(student, tmp_path / "run")
    run = data.RunFolder(tmp_path / "run", {})
    run.write(run.path / "judged.pt", {"row": {}})
    run.write(run.path / "teacher.pt", {"net": tiny_teacher().state_dict()})
    for arguments, sentence in [
        (["--checkpoint", tmp_path / "absent.pt"], "is not there"),
        (["--checkpoint", made / "SiT-tiny.pt"], "is no run folder"),
        ([], "need its --checkpoint"),
        (["--checkpoint", tmp_path], "holds neither hd-seed0.pt nor td.pt"),
        (["--checkpoint", student / "td.pt", "--classes", "0,3"], "--classes names 3, but the classes are 0 .. 2"),
        (["--checkpoint", student / "td.pt", "--vae", tmp_path / "other.pt"], "was trained with another VAE"),
        (["--sampler", "ddpm", "--teacher", made / "SiT-tiny.pt"], "--sampler ddpm is a DiT's own"),
        (["--sampler", "ddpm", "--teacher", tmp_path / "DiT-no-sigma.pt"], "--sampler ddpm is a DiT's own"),
        (["--checkpoint", run.path / "judged.pt"], "judged.pt is no student: name another stage"),
        (["--checkpoint", run.path / "teacher.pt"], "teacher.pt is no student: name another stage"),
        (["--checkpoint", student, "--sampler", "heun", "--teacher", made / "DiT-tiny.pt"], "with another teacher"),
    ]:
        code, _, err = script(evaluate, *flags, *arguments)
        assert code == 2 and sentence in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "fingerprint.json").write_text("[]")
    code, _, err = script(evaluate, *flags, "--checkpoint", student)
    assert code == 2 and "fingerprint.json does not say how" in err and len(err.strip().splitlines()) == 1, err
    code, _, err = script(evaluate, *flags, "--classes", "cat")
    assert code == 2 and "'cat' is not random, balanced" in err


def test_row_noise_is_the_rows_own():
    one = [data.rng(0, "n", i) for i in range(3)]
    x = models.normal_like(torch.empty(3, 2, 2), one)
    again = models.normal_like(torch.empty(1, 2, 2), [data.rng(0, "n", 2)])
    assert torch.equal(x[2:], again) and not torch.equal(x[0], x[1])


def test_a_teachers_sizes_are_read_off_its_file():
    for config in (TINY, dict(TINY, learn_sigma=False, patch_size=4, mlp_ratio=2.0, hidden_size=384, num_heads=6)):
        net = models.dit_from_weights(DiT(**config).state_dict())
        assert net.config == {"mlp_ratio": 4.0, **config}
    assert isinstance(net, nn.Module) and frozen_copy(net).config == net.config

"""The scripts as they are typed: killed and typed again, by two processes, with a NaN on the way, with bad input."""

import functools
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._decomp.decompositions_for_jvp  # noqa: F401  what the first du/dt imports: processes are forked with it
import torch._dynamo  # noqa: F401
from helpers import ROOT, files, fill, pictures, refusal
from PIL import Image

import data
import dmd_refine
import meanflow_td
from models import DiT, AutoencoderKL

TD, REFINE, SHORT = meanflow_td, dmd_refine, ["--quick", "--steps", 4]


# --- Processes of their own, forked from one that has imported torch -------------------------------------------------


def work(main, arguments, die_at, said):
    """main(arguments), saved at each step. SIGKILLs itself as the die_at-th state is about to take its name."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(said, "w")
    meanflow_td.go_on = dmd_refine.go_on = functools.partial(data.go_on, every=0)
    replace, saves = os.replace, itertools.count(1)

    def replace_or_die(beside, path):
        if Path(path).suffix in (".pt", ".json") and next(saves) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(beside, path)

    os.replace = replace_or_die
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(main, *arguments, die_at=0) -> a process, whose words stand in the file process.name."""
    context, folder = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("said")
    context.set_forkserver_preload(["test_runs"])

    def start(main, *arguments, die_at=0):
        said = folder / f"{len(list(folder.iterdir()))}.txt"
        said.touch()
        process = context.Process(target=work, args=(main, arguments, die_at, said), name=str(said))
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:  # what the server imports at its start
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        yield start


def end(process, code=0):
    process.join(300)
    assert process.exitcode == code, Path(process.name).read_text()


def encode_folder(arguments):
    """The encoder alone, in batches of two."""
    vae = fill(AutoencoderKL((32, 32), layers_per_block=1))
    data.encode(data.ImageFolder(arguments[0], 16), vae, Path(arguments[1]), {"vae": "a"}, batch=2)


def equal(a, b):
    """To the bit: dicts, lists, tensors and numbers in them."""
    if isinstance(a, (dict, list)):
        items = (lambda x: list(x.items())) if isinstance(a, dict) else list
        return len(a) == len(b) and all(map(equal, items(a), items(b)))
    if isinstance(a, tuple):
        return equal(list(a), list(b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same(one, other):
    """Whether two run folders hold the same: stages to the bit, and all other files byte for byte."""
    names = files(one).keys()
    assert names == files(other).keys() and names
    for name in names:
        load = functools.partial(data.load, hint="") if name.endswith(".pt") else Path.read_bytes
        assert equal(load(one / name), load(other / name)), name


@pytest.mark.slow
def test_killed_while_it_saves_a_run_goes_on_to_the_same_bits(start, tmp_path):
    whole, killed, flags = tmp_path / "whole", tmp_path / "killed", ["--quick", "--teacher-steps", 5, "--steps", 4]
    end(start(meanflow_td.main, *flags, "--out", whole))
    end(start(dmd_refine.main, *SHORT, "--out", whole))
    for die_at, step_of in ((3, {"teacher": 2}), (5, {"teacher": 5, "td": 1}), (2, {"teacher": 5, "td": 2})):
        end(start(meanflow_td.main, *flags, "--out", killed, die_at=die_at), -signal.SIGKILL)
        assert {path.stem: data.load(path, "")["step"] for path in killed.glob("*.pt")} == step_of
    end(start(meanflow_td.main, *flags, "--out", killed))
    end(start(dmd_refine.main, *SHORT, "--out", killed, die_at=3), -signal.SIGKILL)
    assert data.load(killed / "hd-seed0.pt", "")["step"] == 2 and (killed / "hd-seed0.pt.partial").exists()
    end(start(dmd_refine.main, *SHORT, "--out", killed))
    same(whole, killed)


def test_a_killed_encoder_goes_on_to_the_same_bits(start, tmp_path):
    pictures(tmp_path / "train", {"n01": 4, "n02": 3})
    end(start(encode_folder, tmp_path / "train", tmp_path / "whole"))
    for die_at in (3, 2, 3):  # the first save is of the labels
        end(start(encode_folder, tmp_path / "train", tmp_path / "killed", die_at=die_at), -signal.SIGKILL)
    end(start(encode_folder, tmp_path / "train", tmp_path / "killed"))
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_make_what_one_makes_in_two_parts(start, tmp_path):
    """The teacher, the student, and stage 2 with its discriminator; as torchrun starts them, they talk by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    for stage, flags in {meanflow_td: ["--quick", "--teacher-steps", "4", "--steps", "4"], dmd_refine: SHORT}.items():
        end(start(stage.main, *flags, "--parts", 2, "--out", tmp_path / "one"))
        command = [sys.executable, stage.__file__, *map(str, flags), "--out", tmp_path / "two"]
        ranks = [{"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        pair = [subprocess.Popen(command, env=os.environ | place | rank, stderr=subprocess.PIPE) for rank in ranks]
        for process in pair:
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0, said.decode()
    for stage in ("teacher", "td", "hd-seed0"):
        one, two = (data.load(tmp_path / folder / f"{stage}.pt", "") for folder in ("one", "two"))
        assert one["config"] == two["config"] and one["config"]["parts"] == 2
        for player in {"net", "ema", "student", "fake", "discriminator"} & one.keys():
            for name, weights in one[player].items():
                size = weights.abs().max().item()
                torch.testing.assert_close(two[player][name], weights, rtol=1e-6, atol=1e-6 * size)


# --- A NaN on the way ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run folder of glyphs with a teacher and a student of few updates."""
    out = tmp_path_factory.mktemp("made") / "run"
    meanflow_td.main(["--quick", "--teacher-steps", "3", "--steps", "3", "--out", str(out)])
    return out


FAULTS = {  # script: the loss that fails, the stage, what it logs, calls in each step
    "td": (meanflow_td, "meanflow_loss", "td", "loss", 1),
    "student": (dmd_refine, "dmd_loss", "hd-seed0", "loss", 1),
    "fake": (dmd_refine, "fake_loss", "hd-seed0", "fake_loss", 2),
    "discriminator": (dmd_refine, "discriminator_hinge", "hd-seed0", "d_loss", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_nan_stops_with_step_and_term_and_the_same_command_goes_on(made, tmp_path, monkeypatch, fault):
    module, name, stage, term, per_step = FAULTS[fault]
    flags = [*SHORT, *(["--teacher-steps", 3] if module is meanflow_td else ["--pooling", "mean"])]
    for folder in ("whole", "spoiled"):
        (tmp_path / folder).mkdir()
        for file in ("teacher.pt", "td.pt")[: 1 if module is meanflow_td else 2]:
            shutil.copy(made / file, tmp_path / folder)
    monkeypatch.setattr(module, "go_on", functools.partial(data.go_on, every=0))
    module.main([*map(str, flags), "--out", str(tmp_path / "whole")])
    loss, calls = getattr(module, name), []

    def spoiled(*args, **options):
        calls.append(0)
        answer = loss(*args, **options)
        if len(calls) <= 2 * per_step:
            return answer
        return (answer[0] * torch.nan, *answer[1:]) if isinstance(answer, tuple) else answer * torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(module, name, spoiled)
        said = refusal(module, *flags, "--out", tmp_path / "spoiled")
    assert f"{stage}, step 2: " in said and f"{term} is nan" in said and "The last save is kept" in said
    assert data.load(tmp_path / "spoiled" / f"{stage}.pt", "")["step"] == 2
    module.main([*map(str, flags), "--out", str(tmp_path / "spoiled")])
    same(tmp_path / "whole", tmp_path / "spoiled")


# --- Images of your own ----------------------------------------------------------------------------------------------

VARIANTS = {"mean": ["--pooling", "mean"], "none": ["--pooling", "none"], "two": ["--student-steps", 2],
            "start": ["--init", "teacher", "--w", 1]}  # fmt: skip


def test_the_whole_chain_on_a_folder_of_small_colour_images(tmp_path, capsys):
    flags = ["--quick", "--data", "folder", "--data-dir", pictures(tmp_path / "train", {"cat": 3, "dog": 4}),
             "--out", tmp_path / "run", "--steps", 2, "--batch", 8]  # fmt: skip
    meanflow_td.main([*map(str, flags), "--teacher-steps", "3"])
    assert "7 images of 2 classes" in capsys.readouterr().out
    for name, more in VARIANTS.items():
        dmd_refine.main([*map(str, flags + more), "--name", name])
        net, config = meanflow_td.load_net(tmp_path / "run" / f"{name}-seed0.pt", "")
        assert config["steps"] == 2 and net.net.num_classes == 2 and net.w == 1
        x_0 = meanflow_td.sample(net, torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), steps=2)
        assert x_0.shape == (2, 3, 16, 16) and x_0.isfinite().all()
        assert (tmp_path / "run" / f"{name}-seed0.csv").read_text().count("\n") == 3
    for name in ("teacher-000003", "td-000002", "two-seed0-000002", "none-seed0-panels-000002"):
        image = Image.open(tmp_path / "run" / "samples" / f"{name}.png")
        assert image.mode == "RGB" and image.width == 160 and len(np.unique(np.asarray(image))) > 20


# --- Bad input: one sentence with the value and a remedy, and nothing is written -------------------------------------


class Code:
    """A pickle that would create a file if it were believed."""

    def __reduce__(self):
        return os.mkdir, ("believed",)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unfinished(path):
    torch.save(data.load(path, "") | {"step": 1}, path)


IMAGENET = ["--data", "imagenet", "--data-dir", "flat", "--vae", "vae.pt", "--cache", "cache"]
BAD = {  # script, flags, what is done to the run folder before, what the sentence holds
    "no folder": (TD, ["--data", "folder"], None, ["None holds no images", "--data-dir"]),
    "absent": (TD, ["--data", "folder", "--data-dir", "absent"], None, ["absent holds no images", "--data-dir"]),
    "flat": (TD, ["--data", "folder", "--data-dir", "flat"], None, ["flat holds no images", "--data-dir"]),
    "truncated image": (TD, ["--data", "folder", "--data-dir", "cut"], None, ["0.png can't be read", "replace it"]),
    "unknown data": (TD, ["--data", "cifar"], None, ["'cifar'", "glyphs"]),
    "guidance": (TD, ["--w", "0"], None, ["--w 0", "1 is none"]),
    "parts": (TD, ["--batch", "5", "--parts", "2"], None, ["batch of 5", "2 parts", "change --batch or --parts"]),
    "another seed": (TD, ["--out", "run", "--seed", "7"], None, ["seed = 0, not 7", "--out"]),
    "another batch": (TD, ["--out", "run", "--batch", "8"], None, ["batch = 32, not 8", "--out"]),
    "another w": (TD, ["--out", "run", "--w", "2"], None, ["w = 1.5, not 2.0", "--out"]),
    "code": (TD, ["--out", "run"], lambda run: (run / "td.pt").write_bytes(pickle.dumps(Code(), protocol=2)),
             ["td.pt can't be read", "remove it"]),
    "cut off": (TD, ["--out", "run"], lambda run: cut(run / "teacher.pt"), ["teacher.pt can't be read", "remove it"]),
    "a list": (TD, ["--out", "run"], lambda run: torch.save([1], run / "td.pt"), ["td.pt can't be read", "remove it"]),
    "no teacher": (REFINE, ["--out", "empty"], None, ["teacher.pt is not there", "run meanflow_td.py"]),
    "no td": (REFINE, ["--out", "run"], lambda run: (run / "td.pt").unlink(), ["td.pt is not there", "meanflow_td.py"]),
    "unfinished": (REFINE, ["--out", "run"], lambda run: unfinished(run / "td.pt"), ["holds 1 of 3", "same command"]),
    "another td": (REFINE, ["--out", "run", "--w", "2"], None, ["w = 1.5, not 2.0", "the same flags"]),
    "another size": (REFINE, ["--out", "run", "--size", "32"], None, ["shape = [1, 16, 16], not [1, 32, 32]"]),
    "taps": (REFINE, ["--out", "run", "--taps", "0", "9"], None, ["--taps 9", "blocks 0 to 1"]),
    "negative tap": (REFINE, ["--out", "run", "--taps", "-1"], None, ["--taps -1", "blocks 0 to 1"]),
    "td as teacher": (REFINE, ["--out", "run"], lambda run: shutil.copy(run / "td.pt", run / "teacher.pt"),
                      ["teacher.pt", "meanflow_td.py"]),
    "teacher as td": (REFINE, ["--out", "run"], lambda run: shutil.copy(run / "teacher.pt", run / "td.pt"),
                      ["td.pt", "meanflow_td.py"]),
    "a toy's file": (REFINE, ["--out", "run"], lambda run: torch.save({"config": {}}, run / "td.pt"),
                     ["td.pt is no", "name another"]),
    "imagenet": (TD, ["--data", "imagenet", "--data-dir", "absent"], None,
                 ["--data-dir absent", "image-net.org", "SiT-XL-2-256.pt", "diffusion_pytorch_model.bin", "put it at"]),
    "no such weights": (TD, [*IMAGENET, "--teacher", "SiT-absent.pt"], None, ["SiT-absent.pt", "no such file"]),
    "another network": (TD, [*IMAGENET, "--teacher", "SiT-vae.pt"], None, ["SiT-vae.pt holds", "name another"]),
    "other weights": (TD, [*IMAGENET, "--teacher", "SiT-less.pt"], None, ["another network", "name another"]),
    "a nameless clock": (TD, [*IMAGENET, "--teacher", "vae.pt"], None, ["SiT or DiT in its name"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_changes_nothing(made, tmp_path, monkeypatch, case):
    """The sentence holds the value and a remedy. A bug would be an exception of another type, and fail the test."""
    module, flags, spoil, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    shutil.copytree(made, tmp_path / "run")
    pictures(tmp_path, {"flat": 1, "cut/cat": 1}, "png")
    cut(tmp_path / "cut" / "cat" / "0.png")
    if "imagenet" in flags:
        vae, sit = AutoencoderKL((32, 32), layers_per_block=1).state_dict(), DiT(8, 2, 4, 16, 2, 2).state_dict()
        del sit["blocks.1.mlp.fc2.bias"]
        for name, state in (("vae", vae), ("SiT-vae", vae), ("SiT-less", sit)):
            torch.save(state, tmp_path / f"{name}.pt")
    if spoil:
        spoil(tmp_path / "run")
    before = files(tmp_path)
    stages = ["--teacher-steps", 3, "--steps", 3] if module is meanflow_td else ["--steps", 3]
    said = refusal(module, "--quick", *stages, *flags)
    assert all(part in said for part in expected) and "weights_only" not in said, said  # torch says how to trust code
    assert files(tmp_path) == before and not (tmp_path / "believed").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_where_there_is_none(tmp_path):
    assert "--device cuda: torch finds no CUDA GPU" in refusal(meanflow_td, "--device", "cuda", "--out", tmp_path)

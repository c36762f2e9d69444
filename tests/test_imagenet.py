"""The chain of ImageNet in small: JPEGs, a VAE, a SiT and a DiT with the published key names, on the CPU.

Filled weights learn nothing: what is tested is that every part gets the right thing from the one before.
"""

import functools
import json
import shutil
import urllib.error

import numpy as np
import pytest
import torch
from helpers import files, fill, pictures, refusal
from PIL import Image

import data
import dmd_refine
import meanflow_td
from models import AutoencoderKL, DiT, compiled_block, load_vae

SIZES = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=1, num_classes=3,
             learn_sigma=True)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with train/ (3 classes, 7 JPEGs), vae.pt, SiT-tiny.pt, DiT-tiny.pt, and the latents in cache/."""
    root = tmp_path_factory.mktemp("imagenet")
    pictures(root / "train", {"n01440764": 2, "n01443537": 3, "n02102040": 2}, "JPEG")
    vae = fill(AutoencoderKL((32, 32), layers_per_block=1))
    vae.quant_conv.bias.data[4:] = torch.tensor([-10.0, -9.0, -11.0, -12.0])  # latents of small, known spreads
    torch.save(vae.state_dict(), root / "vae.pt")
    for kind in ("SiT", "DiT"):
        torch.save({"ema": fill(DiT(**SIZES)).state_dict()}, root / f"{kind}-tiny.pt")
    meanflow_td.main(flags(root, data_dir=root / "train", out=root / "SiT"))
    return root


def flags(root, kind="SiT", more=(), **changes):
    """The flags that name all parts; those of a value None are left out."""
    given = dict(cache=root / "cache", teacher=root / f"{kind}-tiny.pt", vae=root / "vae.pt") | changes
    named = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return ["--data=imagenet", "--quick", *named, *more]


def weights(path, player="ema"):
    """{name: tensor} of a network in a stage's file."""
    return data.load(path, "")[player]


def far(one, other):
    """The greatest difference of two {name: tensor} of the same names."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


# --- The latents -----------------------------------------------------------------------------------------------------


def test_the_cache_holds_what_the_vae_answers_for_both_views_of_each_image(made):
    info, moments = json.loads((made / "cache" / "info.json").read_text()), np.load(made / "cache" / "moments.npy")
    assert info["done"] == info["images"] == 7 and info["size"] == 16 and len(info["classes"]) == 3
    assert moments.shape == (7, 2, 2, 4, 8, 8) and len(info["vae"]) == 64
    vae, paths = load_vae(made / "vae.pt"), sorted((made / "train").glob("*/*"))
    for path, views in zip(paths, torch.from_numpy(moments).float()):
        x = data.to_float(np.stack([data.centre_crop(Image.open(path), 16)]))
        for image, found in zip((x, x.flip(3)), views):
            torch.testing.assert_close(torch.cat(vae.encode(image)), found, atol=0.02, rtol=1e-3)


def test_draws_are_of_both_views_and_as_noisy_as_the_vae_says(made):
    latents = data.Latents(made / "cache", AutoencoderKL((32, 32)))
    x_0, y = latents.draw(400, data.rng(0, "draw"))
    again, _ = latents.draw(400, data.rng(0, "draw"))
    assert x_0.shape == (400, 4, 8, 8) and torch.equal(x_0, again)
    mean, logvar = torch.from_numpy(np.load(made / "cache" / "moments.npy")).float().unbind(2)  # (7, 2, 4, 8, 8)
    noise = (x_0[:, None, None] / 0.18215 - mean) / (logvar / 2).exp()  # what each view would need
    size = noise.square().flatten(3).mean(3).sqrt().flatten(1)  # (400, 14)
    found = size.argmin(1)
    assert (size.min(1).values - 1).abs().max() < 0.25  # unit noise around the mean of one of the views
    assert found.bincount(minlength=14).min() > 10 and torch.equal(latents.labels[found // 2], y)


# --- The chain -------------------------------------------------------------------------------------------------------


def test_stage_1_starts_from_the_teacher_and_leaves_what_stage_2_needs(made):
    net, config = meanflow_td.load_net(made / "SiT" / "td.pt", "")
    assert config["network"] == {"wrapper": "SiTTeacher", "two_times": True, **SIZES, "mlp_ratio": 4.0}
    assert config["w"] == 1.5 and config["cfg_channels"] == 3 and config["shape"] == [4, 8, 8]
    teacher, student = torch.load(made / "SiT-tiny.pt")["ema"], net.net.state_dict()
    moved = far(teacher, {name: student[name] for name in teacher})
    assert 0 < moved < 1e-3  # three small steps
    assert not (made / "SiT" / "teacher.pt").exists()
    image = Image.open(made / "SiT" / "samples" / "td-000003.png")
    assert image.mode == "RGB" and image.size == (160, 48) and len(np.unique(np.asarray(image))) > 10


def test_the_same_command_again_neither_encodes_nor_trains(made, monkeypatch):
    before = files(made)
    monkeypatch.setattr(AutoencoderKL, "encode", None)  # would be an error
    meanflow_td.main(flags(made, data_dir=made / "train", out=made / "SiT"))
    assert files(made) == before


@pytest.mark.parametrize("module, stage", [(meanflow_td, "td"), (dmd_refine, "hd-seed0")])
def test_a_stopped_run_goes_on_to_the_same_bits(made, tmp_path, monkeypatch, module, stage):
    def stop(k, *rest):
        if k == 1:
            raise InterruptedError
        return learning_rate(k, *rest)

    learning_rate, path = module.learning_rate, tmp_path / f"{stage}.pt"
    command = flags(made, out=tmp_path, more=["--pooling=mean"] if module is dmd_refine else [])
    if module is dmd_refine:
        shutil.copy(made / "SiT" / "td.pt", tmp_path)
    monkeypatch.setattr(module, "go_on", functools.partial(data.go_on, every=0))
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(module, "learning_rate", stop)
        module.main(command)
    assert data.load(path, "")["step"] == 1
    module.main(command)  # goes on
    cut = weights(path)
    path.unlink()
    module.main(command)  # from the start
    assert far(cut, weights(path)) == 0


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_the_chain_of_either_teacher_from_cached_latents_alone(made, tmp_path, kind):
    """No --data-dir; stage 2 has fake branch and student in the teacher's own clock."""
    for module in (meanflow_td, dmd_refine):
        module.main(flags(made, kind, out=tmp_path))
    net, config = meanflow_td.load_net(tmp_path / "hd-seed0.pt", "")
    assert type(net).__name__ == f"{kind}Teacher" and config["pooling"] == "attention" and config["taps"] == [0, 1]
    x_0 = meanflow_td.sample(net, torch.randn(2, 4, 8, 8), torch.tensor([0, 2]))
    assert x_0.isfinite().all() and x_0.std() > 0.1
    state = data.load(tmp_path / "hd-seed0.pt", "")
    student, fake = weights(tmp_path / "td.pt"), torch.load(made / f"{kind}-tiny.pt")["ema"]
    assert 0 < far(state["student"], student) < 1e-3
    assert 0 < far({name.removeprefix("net."): w for name, w in state["fake"].items()}, fake) < 1e-3
    assert {"samples/hd-seed0-000003.png", "samples/hd-seed0-panels-000003.png"} < files(tmp_path).keys()


@pytest.fixture(scope="module")
def in_parts(made, tmp_path_factory):
    """Both stages in two parts: the folder of the run."""
    out = tmp_path_factory.mktemp("parts")
    for module in (meanflow_td, dmd_refine):
        module.main(flags(made, out=out, parts=2))
    return out


@pytest.mark.parametrize("how", ["--checkpointing", pytest.param("--compile", marks=pytest.mark.slow)])
def test_less_memory_and_compiled_blocks_give_the_same_weights(made, in_parts, tmp_path, monkeypatch, how):
    """Compiled without the C++ compiler, which would take a minute: our part is where a tangent must not meet it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled_block.cache_clear()
    for module, stage in ((meanflow_td, "td"), (dmd_refine, "hd-seed0")):
        module.main(flags(made, out=tmp_path, parts=2, more=[how]))
        most = 0 if how == "--checkpointing" else 1e-5
        assert far(weights(in_parts / f"{stage}.pt"), weights(tmp_path / f"{stage}.pt")) <= most
    compiled_block.cache_clear()


# --- What does not fit -----------------------------------------------------------------------------------------------


def saved(path, **sizes):
    """A filled DiT of other sizes in a file."""
    torch.save(fill(DiT(**(SIZES | sizes))).state_dict(), path)
    return path


MISFITS = {  # what is changed (paths in tmp_path), what the sentence holds
    "larger latents": (dict(input_size=16), {}, ["latents (4, 8, 8) of 3 classes", "(4, 16, 16) of 3", "--teacher"]),
    "other channels": (dict(in_channels=3), {}, ["latents (4, 8, 8) of 3 classes", "(3, 8, 8) of 3", "--teacher"]),
    "more classes": (dict(num_classes=5), {}, ["of 3 classes", "(4, 8, 8) of 5", "--data-dir"]),
    "no cache": ({}, dict(cache="absent"), ["--data-dir None", "image-net.org"]),
    "another folder": ({}, dict(data_dir="other"), ["cache was made with images = 7, not 2", "--cache"]),
    "another vae": ({}, dict(data_dir="train", vae="other-vae.pt"), ["cache was made with vae = ", "--cache"]),
    "no vae": ({}, dict(data_dir="train", vae="SiT-other.pt"), ["SiT-other.pt holds", "name another"]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_gets_one_sentence(made, tmp_path, monkeypatch, case):
    sizes, changes, expected = MISFITS[case]
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "other", {"a": 1, "b": 1})
    (tmp_path / "train").symlink_to(made / "train")
    teacher = saved(tmp_path / "SiT-other.pt", **sizes)
    torch.save(fill(AutoencoderKL((32, 32), layers_per_block=1)).state_dict(), tmp_path / "other-vae.pt")
    before = files(tmp_path), files(made)
    said = refusal(meanflow_td, *flags(made, out="run", **({"teacher": teacher} | changes)))
    assert all(part in said for part in expected), said
    assert (files(tmp_path), files(made)) == before


def test_without_a_network_one_line_for_each_file_that_could_not_be_fetched(made, tmp_path, monkeypatch):
    def no_network(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    said = refusal(meanflow_td, *flags(made, teacher="DiT-XL/2", vae="vae-mse", out=tmp_path / "run"))
    for name in ("DiT-XL-2-256x256.pt", "sd-vae-ft-mse"):
        assert name in said and str(tmp_path / "hub" / "checkpoints") in said
    assert "not known" in said and said.count("can't be fetched") == 2 and not files(tmp_path)


def test_several_processes_do_not_encode(made, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RANKS", 2)
    monkeypatch.setattr(data.dist, "init_process_group", lambda backend: None)
    said = refusal(meanflow_td, *flags(made, data_dir=made / "train", cache=tmp_path / "cache", out=tmp_path / "run"))
    assert "has 0 of all latents: give --data-dir, without torchrun" in said and not files(tmp_path)

"""data.py --encode and what training draws from it, on a small tree laid out like ImageNet's."""

import contextlib
import copy
import errno
import io
import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest
import torch

import data
from helpers import broken, fill, within
from models import SD_VAE_SCALE, AutoencoderKL

SIZE = 64  # px, so latents are 4 x 8 x 8
CLASSES = {"n01440764": 5, "n01443537": 4, "n02102040": 3}  # wnid: images
TRUNCATED = "n01443537/n01443537_1.JPEG"


def picture(height, width, seed):
    """Blocks of random colours: neither smooth nor symmetric."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width])


def make_tree(root, classes=CLASSES):
    """ImageNet's oddities: other sizes, grey, CMYK, a PNG with a palette in a file called JPEG, and one cut off."""
    for c, (wnid, count) in enumerate(classes.items()):
        (root / wnid).mkdir(parents=True)
        for i in range(count):
            image = picture(40 + 23 * i % 89, 171 - 31 * c - 7 * i % 97, seed=100 * c + i)
            image = image.convert("L") if (c, i) == (0, 1) else image.convert("CMYK") if (c, i) == (0, 2) else image
            path = root / wnid / f"{wnid}_{i}.JPEG"
            if (c, i) == (2, 0):
                image.convert("P").save(path, format="PNG")
            else:
                image.save(path, format="JPEG")
    if (root / TRUNCATED).exists():
        (root / TRUNCATED).write_bytes((root / TRUNCATED).read_bytes()[:700])
    return root


def tiny_vae(seed_shift=0.0):
    """The real key names at the least size; the posterior of each channel has its own small std."""
    vae = fill(AutoencoderKL(block_out_channels=(32, 32, 32, 32), layers_per_block=1))
    vae.quant_conv.bias.data[4:] = torch.tensor([-10.0, -9.0, -11.0, -12.0]) + seed_shift
    return vae


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with train/, vae.pt and the cache/ that --encode made of them, and what it said."""
    root = tmp_path_factory.mktemp("imagenet")
    make_tree(root / "train")
    torch.save(tiny_vae().state_dict(), root / "vae.pt")
    said = encode(root)
    return root, said


def encode(root, **options):
    """`python data.py --encode` in this process. -> exit code, stdout, stderr."""
    options = {"data_dir": root / "train", "cache": root / "cache", "vae": root / "vae.pt", "size": SIZE, "batch": 2,
               "shard_images": 5, "device": "cpu", **options}  # fmt: skip
    argv = ["--encode"]
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            data.main(argv)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def copied(made, tmp_path):
    """A copy of the fixture's folder, to be spoiled."""
    shutil.copytree(made[0], tmp_path / "copy")
    return tmp_path / "copy"


def contents(folder):
    """{path: bytes} of everything below a folder; directories have None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- what is in the cache --------------------------------------------------------------------------------------------


def test_moments_are_the_vaes_of_the_cropped_image_and_of_its_mirror_image(made):
    root, (code, out, err) = made
    assert code == 0 and "12 images of 3 classes" in out and "in 3 shards, 3 of them to be written" in out
    vae, folder = tiny_vae(), data.ImageFolder(root / "train", size=SIZE)
    shards = np.concatenate([np.load(root / "cache" / f"moments-0000{k}.npy") for k in range(3)])
    assert shards.shape == (12, 2, 2, 4, 8, 8) and shards.dtype == np.float16
    for i, path in enumerate(folder.paths):
        if path == root / "train" / TRUNCATED:
            assert np.isnan(shards[i]).all()
            continue
        image = data.centre_crop(Image.open(path).convert("RGB"), SIZE)
        for flip in range(2):
            pixels = np.asarray(image)[:, ::-1] if flip else np.asarray(image)
            x = torch.tensor(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                mean, logvar = vae.encode(x)
            np.testing.assert_allclose(shards[i, flip, 0], mean[0], atol=1e-3)
            np.testing.assert_allclose(shards[i, flip, 1], logvar[0], atol=1e-2)
        straight, mirrored = shards[i, :, 0].astype(np.float32)
        spread = straight.std()
        assert abs(mirrored - straight).mean() > 0.1 * spread  # the two are different,
        assert abs(mirrored - straight[..., ::-1]).mean() > 0.02 * spread  # and neither is the other, mirrored


def test_manifest_says_what_was_encoded(made):
    root, _ = made
    told = data.read_manifest(root / "cache")
    assert told["vae sha256"] == data.sha256_file(root / "vae.pt") and told["scale"] == SD_VAE_SCALE == 0.18215
    assert told["classes"] == [list(item) for item in CLASSES.items()] and told["images"] == 12 and told["size"] == SIZE
    assert [record["skipped"] for record in told["shards"].values()] == [[], [[6, TRUNCATED]], []]
    for name, record in told["shards"].items():
        assert record["sha256"] == data.sha256_file(root / "cache" / name)
    assert sorted(p.name for p in (root / "cache").iterdir()) == ["manifest.json", *told["shards"]]


def test_a_truncated_image_is_named_and_counted_or_stops(made, tmp_path):
    root, (_, out, err) = made
    assert err.count("skipped: ") == 1 and f"{TRUNCATED} cannot be read as an image" in err
    assert "11 images are in" in out and "skipped because they can't be read: 1." in out
    code, _, err = encode(root, cache=tmp_path / "strict", strict=True)
    assert code == 2 and f"{TRUNCATED} cannot be read as an image" in err
    assert [p.name for p in sorted(tmp_path.joinpath("strict").glob("*.npy"))] == ["moments-00000.npy"]
    code, _, err = encode(root, strict=True)  # the finished cache lacks it
    assert code == 2 and TRUNCATED in err
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "a.jpg").write_text("no image")
    code, _, err = encode(root, data_dir=tmp_path / "train", cache=tmp_path / "none")
    assert code == 2 and "none of its 1 images could be read" in err


@pytest.mark.parametrize("cause", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_an_image_that_the_machine_fails_to_read_is_not_left_out(made, tmp_path, monkeypatch, cause):
    read_bytes = Path.read_bytes

    def failing(path):
        if path == made[0] / "train" / TRUNCATED:
            raise cause
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    code, _, err = encode(made[0], cache=tmp_path / "cache")
    assert code == 2 and f"{TRUNCATED} cannot be read as an image" in err.splitlines()[-1]


def test_float16_costs_what_the_comment_says():
    z = torch.randn(200_000, generator=generator()) / SD_VAE_SCALE
    assert (SD_VAE_SCALE * (z.half().float() - z)).square().mean().sqrt() < 2.5e-4
    logvar = torch.linspace(-30, 20, 100_001, dtype=torch.float64)
    assert ((logvar.half() - logvar) / 2).exp().sub(1).abs().max() < 0.004
    assert 1_281_167 * 2 * 2 * 4 * 32 * 32 * 2 == pytest.approx(42e9, rel=1e-3)


def test_load_vae_finds_the_sizes(tmp_path):
    for sizes in ((32, 64), 2, 4), ((32, 32, 64), 1, 8):
        vae = fill(AutoencoderKL(*sizes))
        torch.save(vae.state_dict(), tmp_path / "vae.pt")
        loaded, sha256 = data.load_vae(tmp_path / "vae.pt")
        assert sha256 == data.sha256_file(tmp_path / "vae.pt") and not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), loaded.parameters(), strict=True))
    for value in ({"a": torch.zeros(1)}, [1, 2], dict(list(vae.state_dict().items())[:-1])):
        torch.save(value, tmp_path / "other.pt")
        with pytest.raises(data.BadInput, match="other.pt does not hold the weights"):
            data.load_vae(tmp_path / "other.pt")


# --- killed and started again ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_started_again(made, tmp_path):
    """SIGKILL at several moments; then the same command leaves what a run that nobody disturbed leaves, to the bit."""
    train, shards = make_tree(tmp_path / "train", {"n01440764": 30, "n01443537": 20}), 25
    arguments = ["--encode", "--data-dir", train, "--vae", made[0] / "vae.pt", "--size", 64, "--shard-images", 2]

    def start(cache):
        command = [sys.executable, data.__file__, *arguments, "--cache", tmp_path / cache]
        return subprocess.Popen(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"},
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip

    undisturbed, cache = start("whole"), tmp_path / "cut"
    assert undisturbed.wait() == 0
    written = {}
    moments = [
        lambda: (cache / "manifest.json").exists(),
        lambda: len(list(cache.glob("*.npy"))) > 3,
        lambda: len(list(cache.glob("*.npy"))) > 9,
    ]
    for moment in moments:
        process = start("cut")
        while process.poll() is None and not moment():
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        for path in cache.glob("*.npy"):
            status = path.stat()
            assert written.setdefault(path.name, (status.st_ino, status.st_mtime_ns)) == (
                status.st_ino, status.st_mtime_ns), f"{path.name} was written twice"  # fmt: skip
            data.open_shard(cache, data.read_manifest(cache), int(path.stem[-5:]))  # whole, or it would raise
        assert 0 <= len(written) < shards
        with pytest.raises(data.BadInput, match=f"of {shards} shards"):
            data.LatentCache(cache)
    last = start("cut")
    assert f"in {shards} shards, {shards - len(written)} of them to be written" in last.communicate()[0]
    assert contents(cache) == contents(tmp_path / "whole") and len(contents(cache)) == shards + 1
    for name, status in written.items():
        assert ((cache / name).stat().st_ino, (cache / name).stat().st_mtime_ns) == status, f"{name} was written twice"


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_cut_off_at_every_rename(made, tmp_path, monkeypatch, after):
    """There are 7 renames, 4 of the manifest: stopped just before or just after any, the next run ends the same."""
    root, replace = made[0], os.replace
    for stop in range(7):
        seen = []

        def cut(old, new):
            seen.append(Path(new).name)
            if len(seen) - 1 == stop and not after:
                raise KeyboardInterrupt
            replace(old, new)
            if len(seen) - 1 == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", cut)
        cache = tmp_path / f"cut{stop}"
        assert encode(root, cache=cache)[0] == 130  # as Ctrl-C would end it
        monkeypatch.setattr(os, "replace", replace)
        there = {p: p.stat().st_ino for p in cache.glob("*.npy")}
        assert encode(root, cache=cache)[0] == 0
        assert contents(cache) == contents(root / "cache")
        assert all(path.stat().st_ino == inode for path, inode in there.items())


def test_a_finished_cache_is_checked_and_only_what_is_damaged_is_made_again(made, tmp_path):
    root = copied(made, tmp_path)
    cache, before = root / "cache", contents(root)
    path, others = cache / "moments-00001.npy", [cache / "moments-00000.npy", cache / "moments-00002.npy"]
    whole, times = path.read_bytes(), [p.stat().st_mtime_ns for p in others]
    code, out, _ = encode(root)
    assert code == 0 and "0 of them to be written" in out and contents(root) == before
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 4
    for damage in (whole[:-1], whole + b"x", bytes(flipped), b"", others[0].read_bytes(), None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        code, out, _ = encode(root)
        assert code == 0 and "1 of them to be written" in out and contents(root) == before
    assert [p.stat().st_mtime_ns for p in others] == times


# --- what is refused -------------------------------------------------------------------------------------------------


def other_vae(root):
    torch.save(tiny_vae(0.1).state_dict(), root / "vae.pt")


def other_classes(root):
    (root / "train" / "n02102040").rename(root / "train" / "n02102041")


def other_images(root):
    (root / "train" / "n02102040" / "n02102040_2.JPEG").rename(root / "train" / "n02102040" / "x.JPEG")


def more_images(root):
    picture(70, 80, 1).save(root / "train" / "n02102040" / "more.png")


def empty_class(root):
    (root / "train" / "n01999999").mkdir()


def no_images(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def cache_is_a_file(root):
    shutil.rmtree(root / "cache")
    (root / "cache").write_text("mine")


def cache_is_a_users_folder(root):
    (root / "cache" / "manifest.json").unlink()


REFUSALS = {  # what is done to the folder, options, what the sentence says
    "another VAE": (other_vae, {}, ["holds other latents", "vae sha256 = ", "there and", "--cache"]),
    "another size": (None, {"size": 32}, ["size = 64 there and 32 now"]),
    "another class list": (other_classes, {}, ["classes = ['n02102040', 3] there and ['n02102041', 3] now"]),
    "another image": (other_images, {}, ["paths sha256 = "]),
    "more images": (more_images, {}, ["images = 12 there and 13 now", "3] there and ['n02102040', 4] now"]),
    "other shards": (None, {"shard_images": 4}, ["shard images = 5 there and 4 now"]),
    "an empty class": (empty_class, {}, ["n01999999 holds no images", "remove it"]),
    "no images": (no_images, {}, ["train holds no images", "give the path"]),
    "no folder": (None, {"data_dir": "absent"}, ["absent is not a folder: give the path"]),
    "a file as cache": (cache_is_a_file, {}, ["cache is a file: name a folder"]),
    "a user's folder as cache": (cache_is_a_users_folder, {}, ["holds no latents, but it is not empty"]),
    "a cache among the classes": (None, {"cache": "train/cache"}, ["train/cache lies in ", "name another"]),
    "a size that can't be halved": (None, {"size": 68, "cache": "new"}, ["68 px is not a multiple of 8"]),
    "no VAE": (None, {"vae": "absent.pt", "cache": "new"}, ["absent.pt cannot be read"]),
    "an image as VAE": (None, {"vae": "train/" + TRUNCATED, "cache": "new"}, ["does not hold the weights"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_refused_in_one_sentence_with_nothing_created(made, tmp_path, what):
    spoil, options, sentences = REFUSALS[what]
    root = copied(made, tmp_path)
    if spoil:
        spoil(root)
    before = contents(root)
    code, _, err = encode(root, **{k: root / v if isinstance(v, str) else v for k, v in options.items()})
    said = err.strip().splitlines()[-1].split("data.py: ")[-1]
    assert code == 2 and "Traceback" not in err and said.endswith((".", "it."))
    for sentence in sentences:
        assert sentence in said
    assert contents(root) == before


def test_a_second_process_is_refused_before_its_checks_and_after_them(made, tmp_path, monkeypatch):
    root = copied(made, tmp_path)
    (root / "cache" / "moments-00001.npy").unlink()
    before, check = contents(root), data.open_shard
    with monkeypatch.context() as patch:
        patch.setattr(data, "open_shard", None)  # what checks a shard
        with data.alone(root / "cache"):
            code, _, err = encode(root)
        assert code == 2 and "another process works in" in err and contents(root) == before

    def meanwhile(*arguments):  # while one process checks, another begins and ends
        monkeypatch.setattr(data, "open_shard", check)
        told = data.read_manifest(root / "cache")
        del told["shards"]["moments-00001.npy"]
        data.write_json(root / "cache" / "manifest.json", {**told, "sha256": data.sha256_json(told)})
        return check(*arguments)

    monkeypatch.setattr(data, "open_shard", meanwhile)
    code, _, err = encode(root)
    assert code == 2 and "another process has just worked in" in err
    assert encode(root)[0] == 0 and data.read_manifest(root / "cache") == data.read_manifest(made[0] / "cache")


def test_ctrl_c_waits_until_the_shard_is_written(made, tmp_path, monkeypatch):
    encode_shard, before = data.encode_shard, signal.signal(signal.SIGINT, signal.default_int_handler)

    def press(*arguments):
        signal.raise_signal(signal.SIGINT)
        return encode_shard(*arguments)

    monkeypatch.setattr(data.Patience, "asked", False)
    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_shard", press)
        code, _, err = encode(made[0], cache=tmp_path / "cache")
    signal.signal(signal.SIGINT, before)
    assert code == 130 and "stopping as soon as this step is saved" in err and "the same command goes on" in err
    assert list(data.read_manifest(tmp_path / "cache")["shards"]) == ["moments-00000.npy"]
    monkeypatch.setattr(data.Patience, "asked", False)
    code, out, _ = encode(made[0], cache=tmp_path / "cache")
    assert code == 0 and "in 3 shards, 2 of them to be written" in out
    assert contents(tmp_path / "cache") == contents(made[0] / "cache")


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(made, tmp_path, monkeypatch):
    usage, asked = shutil.disk_usage(tmp_path), []
    need = 12 * 2 * 2 * 4 * 8 * 8 * 2

    def small(path, free):
        asked.append(path)
        return usage._replace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: small(path, need - 1))
    code, _, err = encode(made[0], cache=tmp_path / "deep" / "cache")
    assert code == 2 and "needs 2.46e-05 GB more, and 2.46e-05 GB are free: make room" in err
    assert asked == [tmp_path] and not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small(path, need))
    assert encode(made[0], cache=tmp_path / "deep" / "cache")[0] == 0
    (tmp_path / "deep" / "cache" / "moments-00002.npy").unlink()  # two images, the only ones still to be written
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small(path, need // 6))
    assert encode(made[0], cache=tmp_path / "deep" / "cache")[0] == 0


def test_a_disk_that_fills_up_ends_with_a_sentence_and_can_go_on(made, tmp_path, monkeypatch):
    save, calls = np.save, []

    def full(file, array):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(file, array)

    monkeypatch.setattr(np, "save", full)
    code, _, err = encode(made[0], cache=tmp_path / "cache")
    assert code == 2 and "No space left on device" in err
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["manifest.json", "moments-00000.npy"]
    assert encode(made[0], cache=tmp_path / "cache")[0] == 0
    assert contents(tmp_path / "cache") == contents(made[0] / "cache")


def test_damaged_shards_are_named(made, tmp_path):
    cache = copied(made, tmp_path) / "cache"
    path = cache / "moments-00001.npy"
    whole = path.read_bytes()
    wide = io.BytesIO()
    np.save(wide, np.load(path).astype(np.float32))
    last = (cache / "moments-00002.npy").read_bytes()  # of two images
    for damage in (whole[:-1], whole[:100], b"", b"PK\x03\x04" + whole[4:], wide.getvalue(), last, None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(data.BadInput, match="moments-00001.npy"):
            data.LatentCache(cache)
    path.write_bytes(whole)
    assert len(data.LatentCache(cache)) == 11
    with pytest.raises(data.BadInput, match="manifest.json cannot be read"):
        data.LatentCache(tmp_path / "absent")


def places(value, path=()):
    """All places in a JSON value, as tuples of keys."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def mutated(told, rng):
    """A manifest with one to three places removed, or filled with something else."""
    junk = [None, -1, 0, 1, 2**70, 10**300, 0.5, float("nan"), float("inf"), True, "", "x", [], {}, [[]], [["a"]],
            [[1, 2, 3]], {"a": 1}, "9" * 10_000]  # fmt: skip
    told = copy.deepcopy(told)
    for _ in range(rng.randint(1, 3)):
        place = rng.choice([p for p in places(told) if p])
        parent = told
        for key in place[:-1]:
            parent = parent[key]
        if rng.random() < 0.3:
            del parent[place[-1]]
        else:
            parent[place[-1]] = rng.choice(junk)
    return told


def test_mutated_manifests_are_refused_or_read(made, tmp_path):
    cache, rng = copied(made, tmp_path) / "cache", random.Random(0)
    path = cache / "manifest.json"
    whole, expected, refused = path.read_bytes(), data.LatentCache(cache).draw(4, generator())[0], 0
    for i in range(800):
        if i % 2:
            text = json.dumps(mutated(json.loads(whole), rng)).encode()
        else:
            text = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                text[rng.randrange(len(text))] = rng.randrange(256)
            text = text[: rng.randrange(len(text))] if rng.random() < 0.2 else text
        path.write_bytes(text)
        try:
            with within():
                drawn = data.LatentCache(cache).draw(4, generator())[0]
        except data.BadInput as error:
            refused += 1
            assert "manifest.json" in str(error)
        else:
            assert torch.equal(drawn, expected), f"read another meaning out of {bytes(text)}"
    assert refused > 700
    for text in (b"[" * 100_000, b"[]", b"3", b"\xff"):
        path.write_bytes(text)
        with pytest.raises(data.BadInput, match="manifest.json"):
            data.LatentCache(cache)
    told = {**json.loads(whole), "format": "of the next century"}
    path.write_text(json.dumps({**told, "sha256": data.sha256_json(told)}))
    with pytest.raises(data.BadInput, match="has format 'of the next century'"):
        data.LatentCache(cache)


# --- what training draws ---------------------------------------------------------------------------------------------


def test_draw_is_a_function_of_the_generator(made):
    cache = data.LatentCache(made[0] / "cache")
    assert len(cache) == 11 and cache.classes == list(CLASSES) and cache.shape == (4, 8, 8) and cache.size == SIZE
    assert cache.labels.tolist() == [0] * 5 + [1] * 3 + [2] * 3
    torch.manual_seed(0)
    state = torch.get_rng_state()
    g = generator(7)
    x_0, y = cache.draw(6, g)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn elsewhere
    assert x_0.shape == (6, 4, 8, 8) and x_0.dtype == torch.float32 and y.shape == (6,) and y.dtype == torch.int64
    again, y_again = data.LatentCache(made[0] / "cache").draw(6, generator(7))
    assert torch.equal(x_0, again) and torch.equal(y, y_again)
    assert not torch.equal(cache.draw(6, g)[0], x_0)


def check_draws(module, root):
    """Every draw lies where its image's moments say, under its label; images and flips are equally likely.

    The posteriors are narrow here, so that the nearest mean tells which image and which flip a draw came from."""
    cache, n = module.LatentCache(root / "cache"), 6000
    x_0, y = cache.draw(n, generator(1))
    labels = torch.tensor(data.ImageFolder(root / "train", size=SIZE).labels)
    moments = torch.tensor(np.concatenate([np.load(root / "cache" / f"moments-0000{k}.npy") for k in range(3)])).float()
    mean, std = 0.18215 * moments[:, :, 0], 0.18215 * (moments[:, :, 1] / 2).exp()  # (12, 2 flips, 4, 8, 8)
    near = torch.cdist(x_0.flatten(1), mean.nan_to_num(1e3).flatten(0, 1).flatten(1)).argmin(1)
    image, flip = near // 2, near % 2
    assert torch.equal(y, labels[image])
    share = torch.bincount(near, minlength=24).float() / n
    expected = torch.full((12, 2), 1 / 22)
    expected[6] = 0  # the truncated one
    assert (share - expected.flatten()).abs().max() < 5 * (1 / 22 / n) ** 0.5
    z = (x_0 - mean[image, flip]) / std[image, flip]
    assert z.mean((0, 2, 3)).abs().max() < 5 / (n * 64) ** 0.5
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.02
    independent = (z[1:] * z[:-1]).mean()
    assert independent.abs() < 5 / z.numel() ** 0.5


def test_draws_follow_the_moments(made):
    check_draws(data, made[0])


@pytest.mark.parametrize("old, new", [
    ("mean + (logvar / 2).exp() * noise", "mean + logvar.exp() * noise"),
    ("mean + (logvar / 2).exp() * noise", "mean"),
    ("scale * (mean + (logvar / 2).exp() * noise)", "scale * mean + (logvar / 2).exp() * noise"),
    ("flips = _pick(batch, 2, generator).tolist()", "flips = ([0] * batch)"),
    ("torch.from_numpy(self.labels[indices])", "torch.from_numpy(self.labels[indices - 1])"),
    ("np.delete(np.arange(manifest[\"images\"]), skipped)", "np.arange(manifest[\"images\"])"),
    ("np.repeat(np.arange(len(counts)), counts)[self._rows]", "np.repeat(np.arange(len(counts)), counts)"),
    ("i % self._each, flip]", "i % 2, flip]"),
])  # fmt: skip
def test_wrong_draws_are_caught(made, old, new):
    if old.startswith("torch.from_numpy(self.labels"):  # stands in ImageFolder too
        old, new = "return x_0, " + old, "return x_0, " + new
    with pytest.raises((AssertionError, IndexError)):
        check_draws(broken(data, (old, new)), made[0])


def test_encoding_on_the_fly_draws_the_same(made, tmp_path):
    root = copied(made, tmp_path)
    (root / "train" / TRUNCATED).unlink()
    assert encode(root, cache=root / "new")[0] == 0
    folder, vae = data.ImageFolder(root / "train", size=SIZE), tiny_vae()
    live = data.EncodedFolder(folder, vae, scale=SD_VAE_SCALE)
    cache = data.LatentCache(root / "new")
    assert len(folder) == len(cache) == 11 and live.classes == cache.classes
    (x_live, y_live), (x_0, y) = live.draw(40, generator(3)), cache.draw(40, generator(3))
    assert torch.equal(y, y_live) and x_live.dtype == torch.float32 and not x_live.requires_grad
    torch.testing.assert_close(x_live, x_0, atol=3e-4, rtol=0)


def test_folder_draws_pixels(made, tmp_path):
    root = copied(made, tmp_path)
    folder = data.ImageFolder(root / "train", size=32)
    with pytest.raises(data.BadInput, match=TRUNCATED):
        folder.draw(200, generator())
    (root / "train" / TRUNCATED).unlink()
    folder = data.ImageFolder(root / "train", size=32)
    x_0, y = folder.draw(300, generator(5))
    assert x_0.shape == (300, 3, 32, 32) and x_0.dtype == torch.float32 and y.dtype == torch.int64
    every = data.to_float(folder.images(range(11)))
    drawn = torch.tensor([(every == x).all((1, 2, 3)).nonzero().item() for x in x_0])  # each is one of the 11, exactly
    assert torch.equal(y, torch.tensor(folder.labels)[drawn])
    assert torch.bincount(drawn, minlength=11).min() > 300 / 11 - 5 * (300 / 11) ** 0.5
    again = folder.draw(300, generator(5))
    assert torch.equal(x_0, again[0]) and torch.equal(y, again[1])
    assert data.ImageFolder(root / "train", size=32, channels=1).draw(2, generator())[0].shape == (2, 1, 32, 32)


def test_an_empty_class_is_refused_wherever_labels_count(made, tmp_path):
    root = copied(made, tmp_path)
    (root / "train" / ".hidden" / "below").mkdir(parents=True)
    shutil.copy(data.list_images(root / "train")[0], root / "train" / ".hidden" / "below" / "a.png")
    assert len(data.ImageFolder(root / "train", size=32)) == 12
    empty_class(root)
    with pytest.raises(data.BadInput, match="n01999999 holds no images, so labels would shift"):
        data.ImageFolder(root / "train", size=32)

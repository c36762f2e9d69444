"""Damaged and hostile files: our own, npz files, images. Each loader reads it as it was, or says so in one sentence.

Weights of others (.pt, .safetensors) are damaged in test_weights.py, manifests of latents in test_latents.py.
"""

import io
import math
import random
import struct
import time
import zipfile
import zlib

import numpy as np
from PIL import Image
import pytest
import torch

import data
from data import BadInput, RunFolder
from helpers import short_of_memory, within
from test_weights import mutated, with_mutated_pickle

TIMES = 500


def one_sentence(error, path):
    whole = str(path) in str(error) and "\n" not in str(error).strip() and len(str(error)) < 1000
    return whole and not short_of_memory(error)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Whatever is loaded on first use, before memory is counted."""
    path = tmp_path_factory.mktemp("warm") / "x"
    data.write_checkpoint(path, {"a": torch.zeros(3)})
    data.read_checkpoint(path)
    for kind in KINDS:
        Image.open(io.BytesIO(image_file(kind))).load()


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run folder
# ---------------------------------------------------------------------------------------------------------------------

STATE = {"net": {"w": torch.arange(40.0).reshape(5, 8)}, "rows": [{"step": 1, "loss": 0.5}], "steps": 3}


def test_a_changed_checkpoint_is_never_read(tmp_path, capsys):
    run, dice = RunFolder(tmp_path / "run", {"a": {"b": 1}}), random.Random(0)
    path = run.path / "stage.pt"
    run.write(path, STATE)
    whole = path.read_bytes()
    damages = [mutated(whole, dice) for _ in range(TIMES)]
    damages += [whole[:i] for i in (0, 1, 21, 22, 63, 64, 65, len(whole) - 64, len(whole) - 1)] + [whole + b"x"]
    for bit in dice.sample(range(8 * len(whole)), TIMES):  # one bit each
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damages.append(bytes(flipped))
    for damaged in damages:
        if damaged == whole:
            continue
        path.write_bytes(damaged)
        with within():
            assert run.finished("stage") is None
        said = capsys.readouterr().out
        assert "warning: " in said and not short_of_memory(said)
        assert (run.path / "stage.pt.damaged").read_bytes() == damaged
        assert not path.exists()
    path.write_bytes(whole)
    assert torch.equal(run.finished("stage")["net"]["w"], STATE["net"]["w"])


@pytest.mark.filterwarnings("ignore")  # torch's, about the damage
def test_a_hostile_checkpoint_is_refused_or_holds_tensors(tmp_path):
    """Its checksums are right, its pickled part is not: what somebody would make who wants harm."""
    dice, path, refused = random.Random(0), tmp_path / "stage.pt", 0
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    for i in range(TIMES):
        content = with_mutated_pickle(buffer.getvalue(), dice)
        if i % 2:  # with a sha256, as our files have it; without, as they had it once
            content = content[:-2] + (64).to_bytes(2, "little")
            content += data.hashlib.sha256(content).hexdigest().encode()
        path.write_bytes(content)
        try:
            with within():
                assert isinstance(data.read_checkpoint(path), dict)
        except TimeoutError:
            raise
        except Exception as error:  # of any type: RunFolder.read turns it into a warning
            refused += 1
            assert not short_of_memory(repr(error))
    assert TIMES > refused > TIMES / 2


def test_a_checkpoint_of_the_old_kind_is_refused(tmp_path):
    """torch still reads it, and nothing in it has a checksum. Ours were never so."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    path = tmp_path / "stage.pt"
    path.write_bytes(content + data.hashlib.sha256(content).hexdigest().encode())
    with pytest.raises(ValueError, match="it is no zip file"):
        data.read_checkpoint(path)


def test_a_changed_config_is_refused(tmp_path):
    config, dice, refused = {"td": {"steps": 1500, "lr": 1e-3}, "data": {"classes": ["a", "b"]}}, random.Random(0), 0
    there = RunFolder(tmp_path / "run", config).path / "config.json"
    whole = there.read_bytes()
    for _ in range(TIMES):
        there.write_bytes(mutated(whole, dice))
        try:
            with within():
                read = RunFolder(tmp_path / "run", {}).config
        except BadInput as error:
            refused += 1
            assert one_sentence(error, there)
        else:
            assert read == config  # a space more, say
    assert refused > 0.9 * TIMES


def test_changed_metrics_are_put_aside(tmp_path, capsys):
    run, dice, aside = RunFolder(tmp_path / "run", {}), random.Random(0), 0
    run.write_metrics([{"network": "a", "seed": 0, "step": step, "loss": 0.5} for step in range(4)])
    path = run.path / "metrics.csv"
    whole, rows, new = path.read_bytes(), run.read_metrics(), [{"network": "b", "seed": 1, "step": 7, "du_dt": 2.0}]
    for i in range(TIMES):
        content = mutated(whole, dice)
        if i % 2:  # without the sha256, as it was once
            content = b"# a comment\n" + mutated(whole.split(b"\n", 1)[1], dice)
        path.write_bytes(content)
        with within():
            run.write_metrics(new)
            read = run.read_metrics()
        assert read[-1] | {"network": "b", "seed": "1", "step": "7", "du_dt": "2.0"} == read[-1]
        if "warning: " in capsys.readouterr().out:
            aside += 1
            assert len(read) == 1 and (run.path / "metrics.csv.damaged").read_bytes() == content
        elif i % 2 == 0 and content.split(b"\n")[0].count(b"sha256"):
            assert [row["loss"] for row in read[:-1]] == [row["loss"] for row in rows]
    assert aside > 0.6 * TIMES


# ---------------------------------------------------------------------------------------------------------------------
# npz files
# ---------------------------------------------------------------------------------------------------------------------


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays) if len(arrays) > 3 else np.savez(buffer, **arrays)
    return buffer.getvalue()


def with_mutated_header(content, dice):
    """An npz whose checksums are right and whose arrays have mutated headers."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, mutated(part[:128], dice) + part[128:])
    return out.getvalue()


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
STATISTICS = {"mu": np.arange(5.0), "sigma": np.eye(5), "mu_s": np.arange(3.0), "sigma_s": np.eye(3)}
NAMED = {"pool": ("mu", "sigma", 5), "spatial": ("mu_s", "sigma_s", 3)}


@pytest.mark.parametrize("damage", [mutated, with_mutated_header])
def test_changed_npz_images_are_read_whole_or_refused(tmp_path, damage):
    dice, path, whole, refused = random.Random(0), tmp_path / "x.npz", npz(arr_0=IMAGES), 0
    for _ in range(TIMES):
        path.write_bytes(damage(whole, dice))
        try:
            with within():
                source = data.NpzImages(path)
                images = source.images(range(len(source)))
        except BadInput as error:
            refused += 1
            assert one_sentence(error, path)
        else:
            assert images.dtype == np.uint8 and images.shape == (len(source), source.size, source.size, source.channels)
    assert refused > 0.3 * TIMES


@pytest.mark.parametrize("damage", [mutated, with_mutated_header])
def test_changed_statistics_are_read_whole_or_refused(tmp_path, damage):
    dice, path, whole, refused = random.Random(0), tmp_path / "x.npz", npz(**STATISTICS), 0
    for _ in range(TIMES):
        path.write_bytes(damage(whole, dice))
        try:
            with within():
                stats, _ = data.read_statistics(path, NAMED)
        except BadInput as error:
            refused += 1
            assert one_sentence(error, path)
        else:
            for feature, (mean, covariance) in stats.items():
                dim = NAMED[feature][2]
                assert mean.shape == (dim,) and covariance.shape == (dim, dim) and np.isfinite(covariance).all()
    assert refused > 0.3 * TIMES


def array_file(header, body=b"", version=1):
    """A file of one array, with this text as its header."""
    text = header.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + body


HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': {}}}"
TRAPS = {
    "more images than bytes": array_file(HEADER.format("|u1", (10**18, 8, 8, 3))),
    "large images": array_file(HEADER.format("|u1", (1, 10**6, 10**6, 3))),
    "less than nothing": array_file(HEADER.format("|u1", (-1, 8, 8, 3))),
    "objects": array_file(HEADER.format("|O", (1, 8, 8, 3)), b"cposix\nsystem\n(S'false'\ntR."),
    "wide numbers": array_file(HEADER.format("|S999999999", (1, 8, 8, 3))),
    "a header of 80 MB": array_file(" " * (80 << 20), version=2),
    "a nest of brackets": array_file("(" * 9000),
    "a sum": array_file("1+" * 4000 + "1"),
}


@pytest.mark.parametrize("what", TRAPS)
def test_traps_in_npz_files(tmp_path, what):
    path = tmp_path / "trap.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("arr_0.npy", "mu.npy", "sigma.npy"):
            archive.writestr(name, TRAPS[what])
    for read in (data.NpzImages, lambda path: data.read_statistics(path, NAMED)):
        with within(), pytest.raises(BadInput) as error:
            read(path)
        assert one_sentence(error.value, path)


def test_npz_files_of_another_make(tmp_path):
    """Compressed as numpy never does it, encrypted by its flag, a lie about the size."""
    path = tmp_path / "x.npz"
    array = array_file(HEADER.format("|u1", IMAGES.shape), IMAGES.tobytes())
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("arr_0.npy", array)
        with pytest.raises(BadInput, match="numpy does not use"):
            data.NpzImages(path)
    content = bytearray(npz(arr_0=IMAGES))
    content[content.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match="encrypted"):
        data.NpzImages(path)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------

KINDS = ["PNG", "JPEG", "WEBP", "BMP"]


def image_file(kind):
    buffer = io.BytesIO()
    Image.fromarray(IMAGES.reshape(16, 24, 3)).save(buffer, kind)
    return buffer.getvalue()


def told_size(path):
    """The number of pixels that a file says it has."""
    with Image.open(path) as image:
        return image.width * image.height


def png_chunks(*chunks):
    """A PNG file of (name, content), with right checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks)  # fmt: skip


def png_head(width, height):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
@pytest.mark.parametrize("kind", KINDS)
def test_changed_images_are_read_or_refused(tmp_path, kind):
    dice, path, whole, refused = random.Random(0), tmp_path / "x.png", image_file(kind), 0
    for i in range(TIMES):
        content = mutated(whole, dice)
        if kind == "PNG" and i % 2:  # a wrong picture with the right checksums
            packed = mutated(zlib.compress(bytes(16 * (1 + 24 * 3))), dice)
            content = png_chunks(png_head(24, 16), (b"IDAT", packed), (b"IEND", b""))
        path.write_bytes(content)
        size = dice.choice([None, 8])
        try:
            with within():
                pixels = data.read_image(path, size)
        except BadInput as error:
            refused += 1
            assert one_sentence(error, path) or told_size(path) > 10**7  # then it says so itself
        else:
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and (size is None or pixels.shape[:2] == (8, 8))
    assert refused > 0.1 * TIMES


ZEROS = zlib.compress(bytes(300 << 20))
BOMBS = {
    "100,000 x 100,000 px": png_chunks(png_head(100_000, 100_000), (b"IDAT", ZEROS), (b"IEND", b"")),
    "a long text": png_chunks(png_head(8, 8), (b"zTXt", b"a\0\0" + ZEROS), (b"IDAT", zlib.compress(bytes(200))),
                              (b"IEND", b"")),
    "a long profile": png_chunks(png_head(8, 8), (b"iCCP", b"a\0\0" + ZEROS), (b"IDAT", zlib.compress(bytes(200))),
                                 (b"IEND", b"")),
    "more pixels than told": png_chunks(png_head(8, 8), (b"IDAT", ZEROS), (b"IEND", b"")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", BOMBS)
def test_image_bombs(tmp_path, what):
    path = tmp_path / "bomb.png"
    path.write_bytes(BOMBS[what])
    with within():
        try:
            assert data.read_image(path).shape == (8, 8, 3)
        except BadInput as error:
            assert one_sentence(error, path)
            return
    assert "100,000" not in what


def test_a_limit_that_is_broken_is_seen():
    with pytest.raises(MemoryError), within():
        bytearray(200 << 20)
    for hog in (lambda: bytearray(200 << 20), lambda: np.zeros(200 << 20, np.uint8), lambda: torch.zeros(200 << 20)):
        with pytest.raises((MemoryError, RuntimeError)) as error, within():
            hog()
        assert short_of_memory(repr(error.value))
    with pytest.raises(TimeoutError), within(seconds=0.05):
        while True:
            math.sqrt(2)
    with pytest.raises(TimeoutError), within(seconds=0.05):
        try:
            time.sleep(1)
        except TimeoutError:
            pass  # as a loader does that takes any error for damage

"""data.py: random numbers, bytes, crops, digits, folders, latents, and the file that a run goes on from."""

import csv
import itertools

import numpy as np
import pytest
import torch
from helpers import files, fill, pictures
from PIL import Image
from torch import nn

import data
from data import BadInput
from models import AutoencoderKL

def test_random_numbers_are_a_function_of_their_words():
    def drawn(*words):
        torch.rand(3)  # the global generator has no say
        return torch.rand(4, generator=data.rng(*words)).tolist()

    words = [(0,), (1,), (0, "td"), (0, "td", 1), (0, "td", "1"), (0, "td", 1, 0), (0, "t", "d", 1), (-1, "td")]
    assert [drawn(*w) for w in words] == [drawn(*w) for w in words]
    assert len({tuple(drawn(*w)) for w in words}) == len(words)


def test_bytes_to_floats_and_back_is_exact_and_rounds_as_dit_does():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = data.to_float(every)
    assert x.shape == (1, 1, 16, 16) and (x.min(), x.max()) == (-1, 1)
    np.testing.assert_array_equal(data.to_uint8(x), every)
    assert data.to_uint8(torch.tensor([-9.0, 0.0, 9.0]).reshape(3, 1, 1, 1)).ravel().tolist() == [0, 128, 255]


def picture(height, width):
    """A smooth RGB picture whose colours tell the place."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 127 + 100 * np.sin(x / 7)], 2).astype(np.uint8)


def test_crop_halves_by_boxes_before_the_bicubic_resize():
    def cropped(pixels, size):
        return np.asarray(data.centre_crop(Image.fromarray(pixels), size))

    np.testing.assert_array_equal(cropped(picture(64, 101), 64), picture(64, 101)[:, 18:82])
    quarter = Image.fromarray(picture(256, 404))
    for width, height in ((202, 128), (101, 64)):
        quarter = quarter.resize((width, height), Image.Resampling.BOX)
    np.testing.assert_array_equal(cropped(picture(256, 404), 64), np.asarray(quarter)[:, 18:82])
    halved = Image.fromarray(picture(300, 200)).resize((100, 150), Image.Resampling.BOX)
    resized = np.asarray(halved.resize((64, 96), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(cropped(picture(300, 200), 64), resized[16:80])
    assert cropped(picture(20, 31), 64).shape == (64, 64, 3)  # small images are enlarged


@pytest.mark.parametrize("size", [16, 32])
def test_glyphs_follow_from_the_generator_and_vary(size):
    x_0, y = data.draw_glyphs(600, data.rng(0, "a"), size)
    assert x_0.shape == (600, 1, size, size) and x_0.dtype == torch.float32 and (x_0.min(), x_0.max()) == (-1, 1)
    assert y.dtype == torch.int64 and y.bincount(minlength=10).min() > 30
    again, other = (data.draw_glyphs(600, data.rng(0, word), size) for word in "ab")
    assert torch.equal(x_0, again[0]) and torch.equal(y, again[1]) and not torch.equal(x_0, other[0])
    inked = data.to_uint8(x_0)[..., 0] > 64
    tall, wide = inked.any(2).sum(1), inked.any(1).sum(1)
    assert size * 0.4 <= tall.min() < size * 0.6 < size * 0.7 < tall.max() <= size * 0.9 and wide.max() <= size * 0.9
    assert all(len(np.unique(inked.any(axis).argmax(1))) >= 3 for axis in (1, 2))  # the places of the first ink


def test_no_stroke_leaves_the_image(monkeypatch):
    """The largest digits, turned and shifted as far as they go: a stroke outside would be missing from the ink."""
    faces, ends = len(data.FACES), (0, 0.999)
    draws = torch.tensor([[(face + 0.5) / faces, 0.999, turn, shift, shift]
                          for face, turn, shift in itertools.product(range(faces), (0, 0.5, 0.999), ends)])  # fmt: skip
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: draws)
    height = round((0.5 + 0.25 * 0.999) * 64 * 4)
    for digit in range(10):
        images = data.to_uint8(data.glyphs(torch.full((len(draws),), digit), data.rng(0), size=64))
        for image, draw in zip(images.astype(float), draws.tolist()):
            ink = np.asarray(data.glyph(int(faces * draw[0]), digit, height), float).sum() / 4**2
            assert image.sum() == pytest.approx(ink, rel=0.01)


def test_a_folder_reads_what_pillow_reads_and_says_what_it_found(tmp_path, capsys):
    ends = ["gif", "tif", "tiff", "ppm", "png", "jpg", "JPEG", "webp", "bmp"]
    for k, end in enumerate(ends):
        pictures(tmp_path, {f"n{k}": 1}, end)
    (tmp_path / "n0" / "notes.txt").write_text("not an image, and counted aloud")
    (tmp_path / "n0" / ".hidden.png").write_text("what some systems leave behind")
    folder = data.ImageFolder(tmp_path, 16)
    said = capsys.readouterr().out
    assert "9 images of 9 classes" in said and "n0, n1, n2" in said and "1 files left out" in said
    assert folder.classes == [f"n{k}" for k in range(9)] and folder.labels.tolist() == list(range(9))
    x_0, y = folder.draw(100, data.rng(0, "draw"))
    np.testing.assert_array_equal(data.to_uint8(x_0[:20]), np.stack([folder[i] for i in y[:20].tolist()]))
    assert torch.equal(x_0, folder.draw(100, data.rng(0, "draw"))[0])


@pytest.mark.parametrize("classes", [{"train/n01": 1, "val/n01": 1}, {".": 2}, {}], ids=["two sets", "flat", "empty"])
def test_a_folder_that_is_not_one_of_classes_is_refused(tmp_path, classes):
    with pytest.raises(BadInput, match="root holds no images .*: give a folder like ImageNet's train/.* by --data-dir"):
        data.ImageFolder(pictures(tmp_path / "root", classes), 16)


def test_upright_turns_an_image_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(picture(16, 24)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(data.ImageFolder(tmp_path, pattern="*")[0], picture(16, 24))
    upright = data.ImageFolder(tmp_path, upright=True, pattern="*")[0]
    np.testing.assert_array_equal(upright, np.rot90(picture(16, 24), -1))


@pytest.mark.parametrize("end, keep", [("jpg", 300), ("png", 90), ("gif", 60), ("webp", 30), ("bmp", 0)])
def test_a_damaged_image_is_named(tmp_path, end, keep):
    Image.fromarray(picture(40, 40)).save(tmp_path / f"a.{end}")
    (tmp_path / f"a.{end}").write_bytes((tmp_path / f"a.{end}").read_bytes()[:keep])
    with pytest.raises(BadInput, match=f"a.{end} can't be read as an image .*: repair or replace it"):
        data.ImageFolder(tmp_path, 16, pattern="*")[0]


@pytest.fixture
def to_encode(tmp_path):
    """A folder of five images, a VAE that halves the side, and an empty place for the cache."""
    pictures(tmp_path / "train", {"n01": 3, "n02": 2})
    vae = fill(AutoencoderKL((32, 32), layers_per_block=1))
    return data.ImageFolder(tmp_path / "train", 16), vae, tmp_path / "cache"


def test_a_latent_of_every_image_and_of_its_mirror_image(to_encode):
    folder, vae, cache = to_encode
    data.encode(folder, vae, cache, {"vae": "a"}, batch=2)
    moments = torch.from_numpy(np.load(cache / "moments.npy")).float()
    assert moments.shape == (5, 2, 2, 4, 8, 8)
    x = data.to_float(np.stack([folder[i] for i in range(5)]))
    with torch.no_grad():
        for view, images in enumerate((x, x.flip(3))):
            torch.testing.assert_close(moments[:, view], torch.stack(vae.encode(images), 1), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(moments[:, 0], moments[:, 1].flip(-1), atol=1e-2)  # a latent can't be mirrored


def test_encoding_goes_on_where_it_was_stopped_to_the_same_bits(to_encode, monkeypatch):
    folder, vae, cache = to_encode
    data.encode(folder, vae, cache.with_name("whole"), {"vae": "a"}, batch=2)
    encode, calls = vae.encode, []

    def stop(x):
        calls.append(len(x))
        if len(calls) == 4:  # the second batch's mirror images
            raise InterruptedError
        return encode(x)

    monkeypatch.setattr(vae, "encode", stop)
    with pytest.raises(InterruptedError):
        data.encode(folder, vae, cache, {"vae": "a"}, batch=2)
    with pytest.raises(BadInput, match="cache has 2 of 5 latents: give --data-dir"):
        data.Latents(cache, vae)
    data.encode(folder, vae, cache, {"vae": "a"}, batch=2)
    assert calls == [2, 2, 2, 2, 2, 2, 1, 1]  # the first batch is not done again
    assert files(cache) == files(cache.with_name("whole"))


def test_an_unreadable_image_is_named_and_a_repaired_one_is_encoded(to_encode):
    folder, vae, cache = to_encode
    whole = folder.paths[3].read_bytes()
    folder.paths[3].write_bytes(whole[:200])
    with pytest.raises(BadInput, match=f"{folder.paths[3]} can't be read"):
        data.encode(folder, vae, cache, {"vae": "a"}, batch=2)
    folder.paths[3].write_bytes(whole)
    latents = data.Latents(cache, vae, folder, {"vae": "a"})
    assert latents.classes == ["n01", "n02"] and latents.shape == (4, 8, 8)
    assert set(latents.draw(200, data.rng(0))[1].tolist()) == {0, 1}


def test_latents_of_another_vae_and_no_latents_are_refused(to_encode):
    folder, vae, cache = to_encode
    with pytest.raises(BadInput, match="cache has 0 of all latents"):
        data.Latents(cache, vae)
    data.encode(folder, vae, cache, {"vae": "a"})
    before, folder.size = files(cache), 32
    with pytest.raises(BadInput, match="cache was made with vae = a, not b: .*, or name another folder .*--cache"):
        data.encode(folder, vae, cache, {"vae": "b"})
    assert files(cache) == before


def learn(path, steps=6, stop=None, spoil=None, config={"lr": 0.1, "taps": (0, 1)}):
    """A linear layer that learns by go_on, saved at each step; stopped before a step, or with a NaN at one."""
    net = fill(nn.Linear(3, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)

    def one_step(k):
        if k == stop:
            raise InterruptedError
        optimizer.zero_grad()
        loss = net(torch.randn(8, 3, generator=data.rng(0, k))).square().mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss, "twice": 2 * loss * (float("nan") if k == spoil else 1)}

    data.go_on(path, {"net": net, "optimizer": optimizer}, one_step, steps=steps, config=config, every=0, log_every=2)
    return net


def test_a_run_goes_on_to_the_same_bits(tmp_path):
    learn(tmp_path / "whole.pt")
    with pytest.raises(InterruptedError):
        learn(tmp_path / "new" / "cut.pt", stop=4)
    assert data.load(tmp_path / "new" / "cut.pt", "")["step"] == 4
    learn(tmp_path / "new" / "cut.pt")
    whole, cut = (data.load(path, "") for path in (tmp_path / "whole.pt", tmp_path / "new" / "cut.pt"))
    torch.testing.assert_close(whole, cut, rtol=0, atol=0)
    rows = list(csv.DictReader((tmp_path / "new" / "cut.csv").open()))
    assert [row["step"] for row in rows] == ["0", "2", "4", "5"] and list(rows[0]) == ["step", "loss", "twice"]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in whole["rows"]]
    net = learn(tmp_path / "whole.pt", stop=0)  # finished: there is nothing to do
    assert torch.equal(net.weight, whole["net"]["weight"])


def test_another_config_is_refused_with_the_values(tmp_path):
    learn(tmp_path / "a.pt")
    before = files(tmp_path)
    with pytest.raises(BadInput, match="a.pt was made with lr = 0.1, not 0.2.*: give the same flags, or .*--out"):
        learn(tmp_path / "a.pt", steps=7, config={"lr": 0.2, "taps": [0, 1]})
    assert files(tmp_path) == before


def test_a_number_that_is_not_finite_stops_and_keeps_the_last_save(tmp_path):
    with pytest.raises(BadInput, match="a, step 0: twice is nan"):
        learn(tmp_path / "a.pt", spoil=0)
    with pytest.raises(BadInput, match="a, step 3: twice is nan. The last save is kept"):
        learn(tmp_path / "a.pt", spoil=3)
    assert data.load(tmp_path / "a.pt", "")["step"] == 3


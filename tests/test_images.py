"""data.py's images: cropping, reading, npz files, and the digits drawn from fonts."""

import itertools
import pickle
import time

import numpy as np
from PIL import Image
import pytest
import torch

import data


def picture(height, width):
    """A smooth RGB picture whose colours tell the place."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 127 + 100 * np.sin(x / 7)], 2).astype(np.uint8)


# --- bytes and floats ------------------------------------------------------------------------------------------------


def test_uint8_round_trip_is_exact_and_values_are_dits():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = data.to_float(every)
    assert x.shape == (1, 1, 16, 16) and (x.min(), x.max()) == (-1, 1)
    np.testing.assert_array_equal(data.to_uint8(x), every)
    levels = torch.tensor([-9.0, -1.0, 0.0, 0.003, 1.0, 9.0]).reshape(6, 1, 1, 1)
    assert data.to_uint8(levels).ravel().tolist() == [0, 0, 128, 128, 255, 255]


def test_a_grid_shows_every_image_at_its_place(tmp_path):
    for channels in (1, 3):
        images = np.random.default_rng(0).integers(1, 256, (7, 5, 4, channels), np.uint8)
        path = tmp_path / "new" / f"{channels}.png"
        data.save_grid(path, images, columns=3)
        with Image.open(path) as file:
            sheet = np.asarray(file).reshape(3 * 20, 3 * 16, channels)
        for i in range(9):
            row, column = divmod(i, 3)
            tile = sheet[20 * row:20 * row + 20, 16 * column:16 * column + 16]
            expected = images[i].repeat(4, axis=0).repeat(4, axis=1) if i < 7 else 0 * tile  # the last row is not full
            np.testing.assert_array_equal(tile, expected)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_crop_leaves_an_image_of_the_right_size_alone():
    image = Image.fromarray(picture(64, 64))
    np.testing.assert_array_equal(np.asarray(data.centre_crop(image, 64)), picture(64, 64))
    wide = data.centre_crop(Image.fromarray(picture(64, 101)), 64)
    np.testing.assert_array_equal(np.asarray(wide), picture(64, 101)[:, 18:82])


def test_crop_halves_by_boxes_before_the_bicubic_resize():
    pixels = picture(256, 512)
    quarter = pixels.reshape(128, 2, 256, 2, 3).mean((1, 3)).round()  # rounded to bytes at each halving
    quarter = quarter.reshape(64, 2, 128, 2, 3).mean((1, 3))
    got = np.asarray(data.centre_crop(Image.fromarray(pixels), 64)).astype(float)
    assert abs(got - quarter[:, 32:96]).max() <= 1
    twice = Image.fromarray(picture(128, 128)).resize((64, 64), Image.Resampling.BOX)
    got = data.centre_crop(Image.fromarray(picture(128, 128)), 64)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(twice))
    halved = Image.fromarray(picture(300, 200)).resize((100, 150), Image.Resampling.BOX)
    expected = np.asarray(halved.resize((64, 96), Image.Resampling.BICUBIC))[16:80]
    np.testing.assert_array_equal(np.asarray(data.centre_crop(Image.fromarray(picture(300, 200)), 64)), expected)


def test_small_images_are_enlarged():
    assert data.centre_crop(Image.fromarray(picture(20, 31)), 64).size == (64, 64)


def test_folder_of_classes(tmp_path):
    for name, count in (("n02", 3), ("n01", 2)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(40 + i, 50)).save(tmp_path / name / "deeper" / f"{i}.JPEG")
    (tmp_path / "n01" / "notes.txt").write_text("not an image, and ignored")
    (tmp_path / "n01" / "._0.png").write_text("what some systems leave behind")
    folder = data.ImageFolder(tmp_path, size=32)
    assert folder.classes == ["n01", "n02"] and folder.labels.tolist() == [0, 0, 1, 1, 1] and len(folder) == 5
    images = folder.images([4, 0])
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[1], data.read_image(tmp_path / "n01" / "deeper" / "0.JPEG", 32))
    assert data.ImageFolder(tmp_path, size=32, channels=1).images([0]).shape == (1, 32, 32, 1)
    before = folder.identity()
    Image.fromarray(picture(41, 50)).save(tmp_path / "n01" / "deeper" / "0.JPEG")
    assert data.ImageFolder(tmp_path, size=32).identity() != before


def test_links_are_followed_but_never_in_circles(tmp_path):
    """Without the check, two links that lead back make 2^40 paths."""
    for name in ("root/a", "root/b", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "x.png")
    for link, to in (("a/up", "root"), ("a/over", "root/b"), ("b/over", "root/a"), ("c", "elsewhere"), ("d", "absent")):
        (tmp_path / "root" / link).symlink_to(tmp_path / to)
    begun = time.monotonic()
    found = [str(path.relative_to(tmp_path / "root")) for path in data.list_images(tmp_path / "root")]
    assert found == ["a/over/x.png", "a/x.png", "b/over/x.png", "b/x.png", "c/x.png"] and time.monotonic() - begun < 5


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_image_modes_become_rgb_or_grey(tmp_path, mode):
    Image.fromarray(picture(16, 16)).convert(mode).save(tmp_path / "a.png")
    assert data.read_image(tmp_path / "a.png").shape == (16, 16, 3)
    assert data.read_image(tmp_path / "a.png", channels=1).shape == (16, 16, 1)


def test_folder_errors_name_the_file(tmp_path):
    Image.fromarray(picture(16, 16)).save(tmp_path / "a.png")
    Image.fromarray(picture(16, 16)).save(tmp_path / "b.png")
    assert data.ImageFolder(tmp_path).classes == [""] and data.ImageFolder(tmp_path).size == 16
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:70])
    with pytest.raises(data.BadInput, match="b.png cannot be read as an image"):
        data.ImageFolder(tmp_path).images([0, 1])
    Image.fromarray(picture(16, 20)).save(tmp_path / "b.png")
    with pytest.raises(data.BadInput, match="b.png is 20 x 16 px"):
        data.ImageFolder(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(data.BadInput, match="only square"):
        data.ImageFolder(tmp_path)
    with pytest.raises(data.BadInput, match="absent is not a folder"):
        data.ImageFolder(tmp_path / "absent")


# --- npz -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images_are_numpys(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (50, 12, 12, 3), dtype=np.uint8)
    save(tmp_path / "x.npz", images, labels=np.arange(50))
    source = data.NpzImages(tmp_path / "x.npz")
    assert (len(source), source.size, source.channels) == (50, 12, 3)
    for indices in (range(0, 20), range(20, 50), [3, 7, 49], [49, 0]):
        np.testing.assert_array_equal(source.images(indices), images[list(indices)])


def test_write_npz_in_pieces(tmp_path):
    glyphs = data.Glyphs(16, length=23)
    data.write_npz(tmp_path / "g.npz", glyphs, batch=10)
    with np.load(tmp_path / "g.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], np.repeat(glyphs.images(range(23)), 3, axis=3))
    assert [p.name for p in tmp_path.iterdir()] == ["g.npz"]


def test_npz_cut_off_within_its_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images)
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:9000] + whole[10000:])
    with pytest.raises(data.BadInput, match="x.npz"):
        data.NpzImages(tmp_path / "x.npz").images(range(50))


# --- glyphs ----------------------------------------------------------------------------------------------------------


def test_glyph_is_a_function_of_seed_and_index():
    images, labels = data.Glyphs(16, seed=5).batch(range(600))
    assert images.shape == (600, 16, 16, 1) and images.dtype == np.uint8 and labels.dtype == np.int64
    again = pickle.loads(pickle.dumps(data.Glyphs(16, seed=5)))
    for i in (599, 0, 256, 255):
        image, label = again[i]
        np.testing.assert_array_equal(image, images[i])
        assert label == labels[i]
    assert (data.Glyphs(16, seed=6).batch(range(600))[1] != labels).mean() > 0.8
    assert data.Glyphs(16)[10**12][0].shape == (16, 16, 1)  # endless


def test_held_out_glyphs_never_meet_training():
    def drawn(**options):
        return [image.tobytes() for image in data.Glyphs(16, **options).images(range(4000))]

    held_out = set(drawn(held_out=True))
    assert len(held_out) == 4000
    for seed in (0, 1, 2**32 - 1):
        assert not held_out & set(drawn(seed=seed))
    with pytest.raises(ValueError, match="seed"):
        data.Glyphs(16, seed=2**32)


def test_glyphs_of_other_ranges_are_others(monkeypatch):
    before = data.Glyphs(16).identity()
    assert data.Glyphs(16).identity() == before
    for name, value in [("HEIGHT", (0.5, 0.75)), ("MAX_TURN", 15.0), ("MAX_SHIFT", 0.125)]:
        with monkeypatch.context() as patch:
            patch.setattr(data, name, value)
            assert data.Glyphs(16).identity() != before, name


def test_no_stroke_leaves_the_image(monkeypatch):
    """The largest digits, turned and shifted as far as they go: a stroke outside would be missing from the ink."""
    faces, digits, ends = np.arange(0.5, 15) / 15, np.arange(0.5, 10) / 10, [0, 0.999]
    draws = list(itertools.product(faces, digits, [0.999], [0, 0.5, 0.999], ends, ends))
    monkeypatch.setattr(data, "DRAWS_PER_BLOCK", len(draws))
    monkeypatch.setattr(data, "glyph_draws", lambda seed, held_out, block: draws)
    glyphs, canvas = data.Glyphs(64), 64 * data.SUPERSAMPLE
    masters = data.glyph_masters(round(data.HEIGHT[1] * canvas))
    for i, (face, digit, *_) in enumerate(draws):
        ink = np.asarray(masters[int(15 * face)][int(10 * digit)], float).sum() / data.SUPERSAMPLE**2
        assert glyphs[i][0].astype(float).sum() == pytest.approx(ink, rel=0.01)


@pytest.mark.parametrize("size", [16, 32])
def test_glyphs_vary_in_size_and_place(size):
    inked = data.Glyphs(size).images(range(600))[..., 0] > 64
    tall, wide = inked.any(2).sum(1), inked.any(1).sum(1)
    assert size * 0.6 <= tall.min() < size * 0.7 < size * 0.74 < tall.max() <= size * 0.85
    assert wide.max() <= size * 0.8 and len(data.FACES) == 15
    for axis in (1, 2):
        first = inked.any(axis).argmax(1)
        assert len(np.unique(first)) >= 3


def test_labels_tell_the_digit():
    """A linear classifier learns the labels from 4,000 digits and reads unseen ones."""
    (images, labels), (unseen, truth) = (data.Glyphs(16, held_out=h).batch(range(4000)) for h in (False, True))
    assert np.bincount(labels, minlength=10).min() > 300

    def rows(images):
        return np.concatenate([images.reshape(len(images), -1) / 255, np.ones((len(images), 1))], 1)

    x, targets = rows(images), np.eye(10)[labels]
    weights = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ targets)
    assert ((rows(unseen) @ weights).argmax(1) == truth).mean() > 0.5  # chance is 0.1


def test_glyphs_are_drawn_quickly():
    glyphs = data.Glyphs(16)
    glyphs.images(range(256))
    begun = time.process_time()  # of this process alone, however busy the machine is
    glyphs.images(range(256, 2304))
    rate = 2048 / (time.process_time() - begun)
    assert rate > 3000, f"{rate:.0f} images/s; 27,000 were measured on one core of an AMD EPYC"


def test_glyphs_refuse():
    for size in (7, 17, 0):
        with pytest.raises(ValueError, match="size"):
            data.Glyphs(size)
    with pytest.raises(TypeError, match="length"):
        len(data.Glyphs(16))


def test_drawn_glyphs_are_glyphs_with_their_labels():
    glyphs = data.Glyphs(16, seed=3)
    x_0, y = glyphs.draw(300, data.rng(0, "batch"))  # more than one block of random numbers
    assert x_0.shape == (300, 1, 16, 16) and x_0.dtype == torch.float32 and (x_0.min(), x_0.max()) == (-1, 1)
    assert y.shape == (300,) and y.dtype == torch.int64 and set(y.tolist()) == set(range(10))
    again, y_again = glyphs.draw(300, data.rng(0, "batch"))
    assert torch.equal(x_0, again) and torch.equal(y, y_again)
    for other, generator in [(glyphs, data.rng(0, "batch", 1)), (data.Glyphs(16, seed=4), data.rng(0, "batch"))]:
        assert not torch.equal(x_0, other.draw(300, generator)[0])
    # image and label are those of one index each, and the place of the batch is the generator's first number
    start = torch.randint(2**40, (1,), generator=data.rng(0, "batch")).item() * data.DRAWS_PER_BLOCK
    images, labels = glyphs.batch(range(start, start + 300))
    assert torch.equal(x_0, data.to_float(images)) and y.tolist() == labels.tolist()

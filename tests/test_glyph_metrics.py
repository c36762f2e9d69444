"""The metrics of small images in evaluate.py: the classifier of glyphs, power spectra, and the judge built on both."""

import io
import math
import types

import numpy as np
from PIL import Image
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate

SIZE, COUNT = 16, 2000


@pytest.fixture(scope="session")
def recipe():
    """The classifier by its full recipe, and its accuracy: 20 s."""
    return evaluate.train_classifier(SIZE)


@pytest.fixture(scope="session")
def judge(recipe):
    return evaluate.GlyphJudge(recipe[0], SIZE, COUNT)


@pytest.fixture(scope="session")
def other():
    """Another draw of as many images, with labels: data against data."""
    return evaluate.held_out_glyphs(SIZE, COUNT, seed=1)


@pytest.fixture(scope="session")
def floor(judge, other):
    return judge(*other)


def blur(images, strength):
    """Images (N, 1, H, W) drawn towards their mean over 3 x 3 pixels, weighted (1 2 1); black beyond the border."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    soft = F.conv2d(F.pad(images, (1, 1, 1, 1), value=-1), (kernel[:, None] * kernel)[None, None])
    return torch.lerp(images, soft, strength)


# --- The classifier --------------------------------------------------------------------------------------------------


def test_classifier_knows_held_out_glyphs(recipe, other):
    net, accuracy = recipe
    features, logits = evaluate.classify(net, other[0])
    assert features.shape == (COUNT, 96) and logits.shape == (COUNT, 10)
    assert accuracy >= 0.99 and (logits.argmax(1) == other[1]).double().mean() >= 0.99
    torch.testing.assert_close(features @ net.head.weight.T + net.head.bias, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_classifier_is_the_same_to_the_bit_and_leaves_the_randomness_alone():
    torch.manual_seed(1)
    one, accuracy = evaluate.train_classifier(SIZE, steps=6, batch=32)
    drawn = torch.rand(3)
    two, again = evaluate.train_classifier(SIZE, steps=6, batch=32)
    assert accuracy == again
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    longer, _ = evaluate.train_classifier(SIZE, steps=7, batch=32)
    assert not torch.equal(one.head.weight, longer.head.weight)


@pytest.mark.parametrize("size", [8, 24, 32])
def test_classifier_takes_all_pixels_of_other_sizes(size):
    net = evaluate.GlyphClassifier(size)
    images = torch.rand(1, 1, size, size, requires_grad=True)
    features, logits = net(images)
    logits.square().sum().backward()
    assert features.shape == (1, 96) and (images.grad != 0).all()


def test_learns_from_one_stream_and_is_tested_on_another(monkeypatch):
    opened = []

    class Spy(data.Glyphs):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            opened.append((self.seed, self.held_out))

    monkeypatch.setattr(data, "Glyphs", Spy)
    evaluate.train_classifier(SIZE, steps=1, batch=8)
    assert opened == [(evaluate.CLASSIFIER_SEED, False), (evaluate.CLASSIFIER_SEED, True)]


def test_held_out_glyphs_are_balanced_and_in_no_training_stream():
    for seed in (0, evaluate.CLASSIFIER_SEED):
        images, labels = evaluate.held_out_glyphs(SIZE, 1003, seed)
        assert torch.bincount(labels).tolist() == [101, 101, 101, *[100] * 7]
        known, digits = data.Glyphs(SIZE, seed, held_out=True).batch(range(1300))
        places = {image.tobytes(): digit for image, digit in zip(known, digits)}
        ours = [image.tobytes() for image in data.to_uint8(images)]
        assert [places[image] for image in ours] == labels.tolist()  # images of the stream, with their own digits
        assert len(set(ours)) == 1003
        assert not set(ours) & {image.tobytes() for image in data.Glyphs(SIZE, seed).images(range(1300))}
    assert not torch.equal(images, evaluate.held_out_glyphs(SIZE, 1003, 0)[0])


# --- Power spectra ---------------------------------------------------------------------------------------------------


def ring_of(row, column, size):
    """The ring of an FFT's entry: its distance from frequency 0, which is at the corner, the shorter way round."""
    return round(math.hypot(min(row, size - row), min(column, size - column)))


def test_spectrum_keeps_the_power_of_images():
    """Parseval, with frequencies counted by loops: all the power of images without the corners' frequencies."""
    for size in (8, 16):
        rings = np.array([[ring_of(row, column, size) for column in range(size)] for row in range(size)])
        x = np.random.default_rng(0).normal(size=(5, 2, size, size))
        frequencies = np.fft.fft2(x)
        power = (np.abs(frequencies) ** 2).mean((0, 1)) / size**2
        frequencies[..., rings > size // 2] = 0
        x = np.fft.ifft2(frequencies).real
        spectrum = evaluate.power_spectrum(torch.from_numpy(x)).numpy()
        assert spectrum.shape == (size // 2 + 1,)
        for ring in range(size // 2 + 1):
            assert spectrum[ring] == pytest.approx(power[rings == ring].mean(), rel=1e-12)
        counts = np.bincount(rings.flatten())[: size // 2 + 1]
        assert (spectrum * counts).sum() == pytest.approx((x**2).mean((0, 1)).sum(), rel=1e-12)


def test_spectrum_of_white_noise_is_flat():
    noise = 0.3 * torch.randn(4000, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(evaluate.power_spectrum(noise), 0.09, rtol=0.1)
    np.testing.assert_allclose(evaluate.power_spectrum(noise)[1:], 0.09, rtol=0.02)


@pytest.mark.parametrize("down, right, ring", [(0, 0, 0), (0, 1, 1), (3, 4, 5), (-2, 3, 4), (8, 0, 8), (7, 7, None)])
def test_spectrum_of_a_wave_is_in_its_ring(down, right, ring):
    place = torch.arange(SIZE, dtype=torch.float64) / SIZE
    wave = torch.cos(2 * math.pi * (down * place[:, None] + right * place))[None, None]
    spectrum = evaluate.power_spectrum(wave)
    assert sum(spectrum > 1e-12) == (ring is not None)
    if ring is not None:
        assert spectrum.argmax() == ring


def test_high_power_is_of_the_upper_half_and_counts_frequencies():
    flat, low, high = torch.ones(9), torch.ones(9), torch.ones(9)
    low[:5], high[8] = 100, 2
    assert evaluate.high_power(low, flat) == 1  # rings 0 to 4 of 8 are not asked
    assert evaluate.high_power(0.25 * flat, flat) == pytest.approx(0.25)
    counts = [sum(ring_of(i, j, 16) == ring for i in range(16) for j in range(16)) for ring in range(5, 9)]
    assert evaluate.high_power(high, flat) == pytest.approx(1 + counts[-1] / sum(counts))


def test_plot_has_data_in_black_and_all_names(tmp_path, monkeypatch):
    figures = []

    class Kept(data.Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr(data, "Figure", Kept)
    names = ["data", *(f"student {i}" for i in range(8))]
    spectra = {name: torch.linspace(5, 0.1, 9) ** (i + 1) for i, name in enumerate(names)}
    evaluate.plot_spectrum(tmp_path / "spectrum.png", spectra)
    (axis,) = figures[0].axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines) == names and axis.get_xlabel() == "radial frequency (cycles per image)"
    assert axis.get_ylabel() == "power, relative to data"
    looks = {name: (line.get_color(), line.get_linestyle(), line.get_marker()) for name, line in lines.items()}
    assert looks["data"][0] == "black" and len(set(looks.values())) == 9
    np.testing.assert_array_equal(lines["student 3"].get_xdata(), range(1, 9))
    np.testing.assert_allclose(lines["student 3"].get_ydata(), spectra["data"][1:] ** 4, rtol=1e-5)
    image = Image.open(io.BytesIO((tmp_path / "spectrum.png").read_bytes()))
    assert image.format == "PNG" and min(image.size) >= 400
    assert [path.name for path in tmp_path.iterdir()] == ["spectrum.png"]


# --- The judge -------------------------------------------------------------------------------------------------------


def test_data_against_data_is_the_floor(judge, floor):
    assert list(floor) == ["frechet", "precision", "recall", "class_accuracy", "high_power"]
    assert all(type(value) is float for value in floor.values())
    assert 0 < floor["frechet"] < 0.05 and floor["class_accuracy"] >= 0.99
    assert floor["precision"] > 0.8 and floor["recall"] > 0.8 and abs(floor["high_power"] - 1) < 0.05
    same = judge(*evaluate.held_out_glyphs(SIZE, COUNT, judge.seed))
    assert same["frechet"] < 1e-6 and same["precision"] == same["recall"] == same["high_power"] == 1


def test_frechet_is_of_the_classifiers_features(recipe, judge, other, floor):
    both = [evaluate.classify(recipe[0], x)[0].double().numpy()
            for x in (evaluate.held_out_glyphs(SIZE, COUNT, judge.seed)[0], other[0])]  # fmt: skip
    expected = evaluate.frechet_distance(*(part for f in both for part in (f.mean(0), np.cov(f.T))))
    assert floor["frechet"] == pytest.approx(expected, rel=1e-6)


def test_blur_costs_detail_and_distance(judge, other, floor):
    rows = [floor, *(judge(blur(other[0], strength), other[1]) for strength in (0.1, 0.3, 0.6, 1.0))]
    for sharp, soft in zip(rows, rows[1:]):
        assert soft["frechet"] > 1.3 * sharp["frechet"] and soft["high_power"] < 0.9 * sharp["high_power"]
    assert rows[2]["class_accuracy"] > 0.95  # graded: who reads digits blurred by a third as well, is told so


def test_noise_raises_high_power_and_distance(judge, other, floor):
    noise = torch.randn(other[0].shape, generator=torch.Generator().manual_seed(0))
    noisy = judge(other[0] + 0.3 * noise, other[1])
    assert noisy["high_power"] > 1.1 and noisy["frechet"] > 10 * floor["frechet"]


def test_labels_that_were_not_asked_for_are_counted(judge, other, floor):
    images, labels = other
    mixed = judge(images, labels[torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))])
    assert mixed["class_accuracy"] == pytest.approx(0.1, abs=0.03)
    assert {**mixed, "class_accuracy": 0} == {**floor, "class_accuracy": 0}
    wrong = torch.cat([labels[:500], (labels[500:] + 1) % 10])
    assert judge(images, wrong)["class_accuracy"] == pytest.approx(0.25, abs=0.01)


def test_repeating_few_images_costs_recall_alone(judge, other, floor):
    images, labels = (part[:50].repeat_interleave(COUNT // 50, 0) for part in other)
    few = judge(images, labels)
    assert few["recall"] < 0.1 and few["precision"] > 0.7 and few["class_accuracy"] > 0.95
    assert few["frechet"] > 3 * floor["frechet"]


def test_missing_faces_cost_recall(judge, floor):
    glyphs = data.Glyphs(SIZE, seed=5, held_out=True)
    draws = [draw for block in range(20) for draw in data.glyph_draws(5, True, block)]
    kept = [i for i, draw in enumerate(draws) if int(len(data.FACES) * draw[0]) >= 7][:COUNT]
    images, labels = glyphs.batch(kept)
    poor = judge(data.to_float(images), torch.from_numpy(labels))
    assert poor["recall"] < floor["recall"] - 0.05 and poor["frechet"] > 5 * floor["frechet"]
    assert poor["precision"] > floor["precision"] - 0.03


def test_images_are_judged_as_they_would_be_saved(judge, other, floor):
    images, labels = other
    assert judge(images + 0.4 / 127.5, labels) == floor  # less than half a level
    outside = torch.where(images == 1, 3.0, torch.where(images == -1, -3.0, images))
    assert judge(outside.double(), labels) == floor


def test_clouds_are_of_at_most_so_many_images_of_all_classes(recipe, other, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "CLOUD_ROWS", 300)
    monkeypatch.setattr(evaluate, "precision_recall", lambda a, b: seen.extend([a, b]) or (0.0, 0.0))
    judge = evaluate.GlyphJudge(recipe[0], SIZE, 500)
    order = other[1].argsort(stable=True)
    judge(other[0][order], other[1][order])  # sorted by class, as a sampler may well do
    assert [len(cloud) for cloud in seen] == [300, 300]
    shares = torch.bincount(recipe[0].head(seen[1]).argmax(1), minlength=10)
    assert shares.min() > 10


def test_fingerprint(recipe, judge, other):
    labels = other[1]
    assert judge.fingerprint(labels) == {
        "images": COUNT, "labels": "balanced", "reference": f"{COUNT} held-out glyphs, 16 px, balanced",
        "features": f"GlyphClassifier {judge.sha}", "seed": 0,
    }  # fmt: skip
    drawn = torch.randint(10, (777,), generator=torch.Generator().manual_seed(0))
    told = judge.fingerprint(drawn)
    assert told["labels"] == "random" and told["images"] == 777
    assert judge.fingerprint(torch.arange(1003) % 10)["labels"] == "balanced"
    assert judge.fingerprint(torch.arange(1000) % 9)["labels"] == "random"
    assert len(judge.sha) == 8 and int(judge.sha, 16) >= 0
    net = evaluate.GlyphClassifier(SIZE)
    net.load_state_dict(recipe[0].state_dict())
    assert evaluate.GlyphJudge(net, SIZE, 30, seed=3).fingerprint(labels)["seed"] == 3
    assert evaluate.GlyphJudge(net, SIZE, 30).sha == judge.sha
    with torch.no_grad():
        net.head.bias[3] += 1e-6
    assert evaluate.GlyphJudge(net, SIZE, 30).sha != judge.sha


def test_classifier_out_of_a_run_folder_judges_alike(recipe, judge, other, floor, tmp_path):
    run = data.RunFolder(tmp_path / "run", {"data": {"data": "glyphs"}})
    for _ in range(2):  # computed, then read
        state = run.stage("classifier", lambda keep: {"net": recipe[0].state_dict(), "accuracy": recipe[1]})
    net = evaluate.GlyphClassifier(SIZE)
    net.load_state_dict(state["net"])
    again = evaluate.GlyphJudge(net, SIZE, COUNT)
    assert again(*other) == floor and again.sha == judge.sha
    np.testing.assert_array_equal(again.spectrum, judge.spectrum)


def test_the_teacher_is_judged_at_few_calls_and_at_many_with_all_guidance():
    net = types.SimpleNamespace(w=None)
    judge = evaluate.RunJudge.__new__(evaluate.RunJudge)
    judge.run = types.SimpleNamespace(load=lambda name: net, plan={"td": {"w": 1.5}})
    judge.sample = lambda sampler, what: (sampler.func, sampler.args, sampler.keywords, net.w)
    rows = []
    judge.row = lambda what, draw, *, nfe, w, net: rows.append((what, nfe, w, draw(), net))
    judge.teacher()
    euler, heun = evaluate.sample_euler, evaluate.sample_ode
    assert rows == [
        *(("teacher, Euler", calls, 1.5, (euler, (net,), {"steps": calls}, 1.5), net) for calls in (1, 2, 4, 8)),
        *(("teacher, Heun", 50, w, (heun, (net,), {"steps": 25}, w), net) for w in (1.5, 1.0, 1.25, 2.0))]  # fmt: skip


def test_a_student_is_judged_in_its_calls_and_the_floor_by_other_glyphs():
    net, rows = object(), []
    judge = evaluate.RunJudge.__new__(evaluate.RunJudge)
    judge.run, judge.size, judge.count = types.SimpleNamespace(load=lambda name, two_times: net), SIZE, 40
    judge.noise_seed = 0
    judge.sample = lambda sampler, what: (sampler.func, sampler.args, sampler.keywords)
    judge.row = lambda what, draw, **settings: rows.append((what, draw(), settings))
    judge.student("two-seed3", "two", 3, 2)
    assert rows.pop() == ("two", (evaluate.sample, (net,), {"steps": 2}), {"seed": 3, "nfe": 2, "net": net})
    judge.data()
    images, reference = rows[0][1][0], evaluate.held_out_glyphs(SIZE, 4 * 40, seed=0)[0]
    assert not {x.numpy().tobytes() for x in images} & {x.numpy().tobytes() for x in reference}


def test_the_table_has_the_mean_and_the_sample_deviation(capsys):
    columns = ("frechet", "precision", "recall", "class_accuracy", "high_power", "ms_per_image")
    row = {"what": "HD", "nfe": 1, "w": None, "fingerprint": {"images": 7}}
    evaluate.print_rows([row | dict.fromkeys(columns, value) for value in (1, 2, 4)])
    assert capsys.readouterr().out.count("2.333 +- 1.528") == len(columns)


def test_judge_refuses(judge, other):
    images, labels = other
    broken = images.clone()
    broken[3, 0, 2, 2], broken[7] = float("nan"), float("inf")
    for bad, asked, said in (
        (broken, labels, f"2 of {COUNT} images are not finite"),
        (images[:, :, :8, :8], labels, "16 px"),
        (images, labels[:-1], rf"images \({COUNT}, 1, 16, 16\) and labels \({COUNT - 1},\)"),
        (images.repeat(1, 3, 1, 1), labels, "16 px"),
        (images[:3], labels[:3], "3 neighbours"),
    ):
        with pytest.raises(ValueError, match=said):
            judge(bad, asked)
    with pytest.raises(ValueError, match="16 px glyphs can't judge 32 px"):
        evaluate.GlyphJudge(judge.classifier, 32, 30)

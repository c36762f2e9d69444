"""evaluate.py against closed forms, as a person runs it, and against what official evaluators (pytorch-fid,
torch-fidelity, prdc, ADM's formulas) answered to helpers.fill and helpers.wave."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from helpers import broken, files, fill, pictures, refusal, tiny_teacher, wave
from PIL import Image

import data
import dmd_refine
import evaluate
import meanflow_td
from models import AutoencoderKL, DiT


def run(*arguments):
    evaluate.main([str(argument) for argument in arguments])


# --- InceptionV3 -----------------------------------------------------------------------------------------------------

TORCH = {  # of (wave(2, 3, 64, 64) + 1)/2: mean, standard deviation, and some numbers at their places
    "logits": (-0.02887716, 277.48968422, {0: 359.71893311, 1: 348.32998657, -1: -301.01330566})}
TF1 = {  # of the same, rounded to uint8
    "pool": (51.88273032, 136.21868320, {0: 2.15168691, 1: 28.13476944, 2: 152.43572998, -3: 179.26823425}),
    "logits": (-0.02067404, 269.34268332, {0: 338.71737671, 1: 323.95321655, -1: -315.35302734}),
    "logits_no_bias": (-0.02058272, 269.34281567, {0: 338.76721191, 1: 323.98861694, -1: -315.33807373}),
    "spatial": (17.77697955, 30.67879437, {0: 0, 1: 22.52679634, 3: 29.78420067, -1: 99.32106781})}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    return fill(evaluate.InceptionV3()).state_dict()


def inception(state, m=evaluate):
    """A network with these weights, without an initialisation that they would overwrite."""
    with torch.device("meta"):
        net = m.InceptionV3()
    net.load_state_dict(state, assign=True)
    return net


def assert_official(out, mean, std, numbers):
    """An output has an official summary, to 1e-4 of its standard deviation."""
    flat = out.double().flatten()
    found = [flat.mean(), flat.std(), *(flat[i] for i in numbers)]
    np.testing.assert_allclose(found, [mean, std, *numbers.values()], rtol=1e-4, atol=1e-4 * std)


def check_inception(state, m=evaluate):
    x, net = (wave(2, 3, 64, 64) + 1) / 2, inception(state, m)
    rounded = (255 * x).round() / 255
    for images, resize, expected in ((rounded, "tf1", TF1), (x, "torch", TORCH)):
        found = net(images, resize=resize)
        assert [part.shape[1] for part in found.values()] == [2048, 2023, 1008, 1008]
        for name in expected:
            assert_official(found[name], *expected[name])


def test_official_inception(state):
    """With as many names as the published file has; what can't be an image is refused."""
    check_inception(state)
    assert len(state) == 566
    for wrong in (torch.full((1, 3, 8, 8), torch.nan), torch.full((1, 3, 8, 8), 255.0), torch.ones(1, 1, 8, 8)):
        with pytest.raises(ValueError, match="Inception takes"):
            inception(state)(wrong)


@pytest.mark.parametrize("old, new", [
    ("count_include_pad=False", "count_include_pad=True"), ("(2048, max_pool)", "(2048, average_pool)"),
    ("return (x - 128) / 128", "return 2 * x / 255 - 1"),
    ("x[:, :7].permute(0, 2, 3, 1)", "x[:, :7]"), ("eps=1e-3", "eps=1e-5")])  # fmt: skip
def test_a_broken_inception_is_caught(state, old, new):
    with pytest.raises(AssertionError):
        check_inception(state, broken(evaluate, (old, new)))


def test_where_both_resizes_look(height=640, width=100):
    """In a ramp every answer tells its source: dest * size/299, or (dest + 1/2) * size/299 - 1/2, within the image."""
    ramp = (torch.arange(height)[:, None] / height + torch.arange(width) / width) / 2
    for resize, shift in (("tf1", 0.0), ("torch", 0.5)):
        found = evaluate.to_inception(ramp.expand(1, 3, -1, -1), resize)[0, 1]
        found = (128 * found + 128) / 255 if resize == "tf1" else (found + 1) / 2
        source = [np.clip((np.arange(299) + shift) * n / 299 - shift, 0, n - 1) / n for n in (height, width)]
        np.testing.assert_allclose(found, (source[0][:, None] + source[1]) / 2, atol=1e-5)


# --- The metrics -----------------------------------------------------------------------------------------------------


def test_official_frechet_distance():
    """pytorch-fid's value, that of scipy's square root of a matrix, and the same from the other side."""
    generator = np.random.default_rng(0)
    for d, n, official in ((8, 100, 15.114254691515), (64, 500, 3163.001862209456), (64, 40, 3605.224018654137)):
        a = generator.normal(size=(n, d)) @ generator.normal(size=(d, d))
        (mu1, s1), (mu2, s2) = map(evaluate.statistics, (a, 1.3 * generator.normal(size=(n, d)) + 0.2))
        found, root = evaluate.frechet_distance(mu1, s1, mu2, s2), scipy.linalg.sqrtm(s1 @ s2).real
        assert np.allclose(s1, np.cov(a.T), rtol=1e-12) and np.allclose(mu1, a.mean(0), rtol=1e-12)
        assert found == pytest.approx(official, rel=1e-6)
        assert found == pytest.approx(((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * root), rel=1e-5)
        assert found == pytest.approx(evaluate.frechet_distance(mu2, s2, mu1, s1), rel=1e-9)


@pytest.mark.parametrize("rank1, rank2", [(90, 90), (90, 40), (40, 40), (89, 90)])
def test_frechet_distance_of_one_basis(rank1, rank2):
    """|m - k|^2 + sum (s - q)^2, with standard deviations s and q; some are zero, whose rounding must not add up."""
    basis, (s, q) = np.linalg.qr(np.random.default_rng(0).normal(size=(90, 90)))[0], np.linspace([1, 2], [2, 0.5], 90).T
    s[rank1:], q[rank2:] = 0, 0
    for turn in (np.eye(90), basis):
        found = evaluate.frechet_distance(s, turn * s**2 @ turn.T, q, turn * q**2 @ turn.T)
        assert found == pytest.approx(2 * ((s - q) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize("n, d", [(20, 150), (149, 150), (500, 150), pytest.param(24, 2048, marks=pytest.mark.slow)])
def test_a_set_has_no_distance_from_itself(n, d):
    """To rounding, and it is never negative. What is not finite, or of another size, is refused."""
    mu, sigma = evaluate.statistics(np.random.default_rng(n).normal(size=(n, d)) * np.geomspace(1, 1e-5, d))
    assert 0 <= evaluate.frechet_distance(mu, sigma, mu, sigma) <= 1e-9 * np.trace(sigma)
    for wrong in ((mu * np.nan, sigma), (mu, sigma * np.inf), (mu[1:], sigma), (mu, sigma[0])):
        with pytest.raises(ValueError):
            evaluate.frechet_distance(mu, sigma, *wrong)


def test_inception_score():
    """The official value in one group, the limits, and the mean of groups."""
    logits = 4 * wave(1000, 12, freq=1.3)
    assert evaluate.inception_score(logits) == pytest.approx(2.7767205468049116, rel=1e-6)
    assert evaluate.inception_score(torch.zeros(30, 12)) == pytest.approx(1)  # nothing is known
    assert evaluate.inception_score(1e3 * np.eye(12)) == pytest.approx(12)  # surely one class each, all classes
    halves = [evaluate.inception_score(part) for part in logits.split(600)]
    assert evaluate.inception_score(logits, group=600) == pytest.approx(np.mean(halves))


def test_precision_and_recall():
    """prdc's value, and the definition's, in blocks too."""
    generator = np.random.default_rng(1)
    points, gen = generator.normal(size=(400, 8)), 0.8 * generator.normal(size=(300, 8)) + 0.3
    assert evaluate.precision_recall(points, gen) == pytest.approx((0.9533333333333334, 0.6275), abs=1e-12)
    near = np.linalg.norm(points[:, None] - gen, axis=2)
    reach = [np.sort(np.linalg.norm(x[:, None] - x, axis=2))[:, 5] for x in (points, gen)]
    expected = (near <= reach[0][:, None]).any(0).mean(), (near <= reach[1]).any(1).mean()
    assert evaluate.precision_recall(points, gen, k=5, rows=77) == pytest.approx(expected, abs=1e-12)
    assert evaluate.precision_recall(points, points) == (1, 1) and evaluate.precision_recall(points, gen + 99) == (0, 0)


def test_power_spectrum():
    """A cosine fills its own ring; without the corners the rings hold all power (Parseval)."""
    noise = 0.3 * torch.randn(5, 1, 16, 16, generator=data.rng(0))
    frequencies, cycles = torch.fft.fft2(noise.double()), torch.fft.fftfreq(16, 1 / 16)
    frequencies[..., torch.hypot(cycles[:, None], cycles).round() > 8] = 0
    x = torch.fft.ifft2(frequencies).real
    power = evaluate.power_spectrum(x)
    assert power.sum().item() == pytest.approx(256 * x.square().mean(0).sum().item(), rel=1e-12)
    assert evaluate.high_power(power * torch.where(torch.arange(9) < 5, 9.0, 0.25), power) == pytest.approx(0.25)
    place = 2 * torch.pi * torch.arange(16, dtype=torch.float64) / 16
    for down, right, ring in ((0, 0, [0]), (0, 1, [1]), (3, 4, [5]), (-2, 3, [4]), (8, 0, [8]), (7, 7, [])):
        spectrum = evaluate.power_spectrum(torch.cos(down * place[:, None] + right * place)[None, None])
        assert (spectrum > 1e-9).nonzero().flatten().tolist() == ring


# --- Images against a reference, with a small network in Inception's place -------------------------------------------


class SmallNet(torch.nn.Module):  # cosines of a few sums over the image
    fc = torch.nn.Linear(1, 1)

    def forward(self, images, resize="tf1"):
        few, sizes = F.adaptive_avg_pool2d(images, 4).flatten(1), {"pool": 32, "spatial": 24, "logits_no_bias": 10}
        return {name: torch.cos(few @ wave(48, size, freq=1.7) + wave(size)) for name, size in sizes.items()}


def squares(folder, count, size=16):  # PNGs of random squares. -> uint8 (count, size, size, 3)
    images = np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return images


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with images/ (40 squares), other/ (30) and npz files, good and bad."""
    root = tmp_path_factory.mktemp("room")
    x, other, known = squares(root / "images", 40), squares(root / "other", 30), dict(mu=np.ones(32), sigma=np.eye(32))
    arrays = {
        "images": dict(arr_0=x), "other": dict(arr_0=other), "fortran": dict(arr_0=np.asfortranarray(other)),
        "adm": known | dict(mu_s=np.ones(24), sigma_s=np.eye(24), arr_0=other), "fid": known,
        "labels": known | dict(arr_0=np.arange(30)), "floats": known | dict(arr_0=other / 255),
        "short": dict(mu=np.zeros(6), sigma=np.eye(6)), "half": dict(mu=np.zeros(32)),
        "nan": known | dict(mu=np.full(32, np.nan)), "pickled": dict(arr_0=np.array([{}, 1], object)),
        "flat": dict(arr_0=x[0]), "many": dict(arr_0=x.repeat(52, 0)[:2048, :4, :4])}
    for name, content in arrays.items():
        np.savez(root / f"{name}.npz", **content)
    for name, count, size in (("few", 3, 16), ("mixed", 5, 16), ("mixed/small", 4, 15), ("damaged", 9, 16)):
        squares(root / name, count, size)
    (root / "damaged" / "0007.png").write_text("not an image")
    (root / "cut.npz").write_bytes((root / "adm.npz").read_bytes()[:300])
    return root


@pytest.fixture
def score(room, monkeypatch):
    monkeypatch.setattr(evaluate, "load_weights", lambda *names: SmallNet())
    monkeypatch.setattr(evaluate, "weights_path", lambda name: room / "other.npz")
    return lambda *names: evaluate.score(*(room / name for name in names))


def test_every_kind_of_reference(room, score):
    """Statistics come first, images serve what is left; what can't be told is left out, and the row says so."""
    everything, of_images = {"FID", "sFID", "IS", "precision", "recall"}, ["other", "other.npz", "fortran.npz"]
    gen, base = (SmallNet()(data.to_float(np.load(room / name)["arr_0"]) / 2 + 0.5)
                 for name in ("images.npz", "other.npz"))  # fmt: skip
    cloud = dict(zip(("precision", "recall"), evaluate.precision_recall(base["pool"], gen["pool"])))
    for name in (*of_images, "adm.npz", "fid.npz", "labels.npz", "floats.npz"):
        row, metrics = score("images", name), everything if name in (*of_images, "adm.npz") else {"FID", "IS"}
        assert everything & row.keys() == metrics and row["n"] == 40 and row["FID"] == score("images.npz", name)["FID"]
        for metric, key, n in (("FID", "pool", 32), ("sFID", "spatial", 24)):
            other = evaluate.statistics(base[key]) if name in of_images else (np.ones(n), np.eye(n))
            expected = evaluate.frechet_distance(*evaluate.statistics(gen[key]), *other)
            assert metric not in metrics or row[metric] == pytest.approx(expected, rel=1e-4)
        assert metrics != everything or cloud.items() <= row.items()
        assert (name in row["notes"]) == (metrics != everything)
    notes = [score(images, "fid.npz")["notes"] for images in ("images", "many.npz")]
    assert ["2,048" in note for note in notes] == [True, False] and all("FID-50k" in note for note in notes)


@pytest.mark.parametrize("images, reference, said", [
    ("images", "short.npz", ["short.npz", "(6,)", "--reference"]), ("images", "half.npz", ["half.npz", "sigma"]),
    ("images", "nan.npz", ["nan.npz", "--reference"]), ("images", "cut.npz", ["cut.npz", "name another"]),
    ("pickled.npz", "other", ["pickled.npz", "name another"]), ("floats.npz", "other", ["float64", "uint8"]),
    ("flat.npz", "other", ["flat.npz", "(16, 16, 3)"]), ("few", "other", ["few holds 3", "at least 4"]),
    ("mixed", "other", ["one size", "15"]), ("damaged", "other", ["0007.png", "repair or replace"])])  # fmt: skip
def test_what_can_not_be_scored_gets_one_sentence(score, images, reference, said):
    with pytest.raises(data.BadInput) as error:
        score(images, reference)
    assert all(part in str(error.value) for part in said) and "\n" not in str(error.value)


def test_scores_are_printed_and_images_saved_for_other_evaluators(room, score, capsys):
    run("--images", room / "other", "--save-npz", room / "saved.npz", "--reference", room / "other")
    assert capsys.readouterr().out.count("FID  0.0000") == 2
    assert np.array_equal(*(np.load(room / name)["arr_0"] for name in ("saved.npz", "other.npz")))


# --- Small images, samples, costs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_classifier_learns_and_the_judge_tells(tmp_path):
    """Data from data, other labels, a blur."""
    draw, y = partial(data.draw_glyphs, size=16), torch.arange(1000) % 10
    classifier = evaluate.train_classifier(tmp_path / "classifier.pt", draw, (1, 16, 16), 10, steps=200)
    judge, x = evaluate.Judge(classifier, data.glyphs(y, data.rng("held out"))), data.glyphs(y, data.rng("other"))
    floor, mixed, soft = judge(x, y), judge(x, y.roll(1)), judge(F.avg_pool2d(x, 3, 1, 1), y)
    assert floor["class_accuracy"] > 0.9 and floor["precision"] > 0.8 < floor["recall"]
    assert mixed["class_accuracy"] < 0.1 and mixed | {"class_accuracy": floor["class_accuracy"]} == floor
    assert abs(floor["high_power"] - 1) < 0.1 and soft["high_power"] < 0.5 and soft["frechet"] > 3 * floor["frechet"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glyphs", "folder"])
def test_the_table_of_a_run(tmp_path, kind, monkeypatch):
    """Of a tiny run: teacher, td, hd also after one update, and two, a student of two calls; and the probe."""
    monkeypatch.setattr(dmd_refine, "BUDGETS", (1, 2))
    where = [f"--data={kind}", "--quick", f"--out={tmp_path}"]
    more = [f"--data-dir={pictures(tmp_path / 'train', {'a': 12, 'b': 12})}"] if kind == "folder" else []
    meanflow_td.main([*where, *more, "--batch=8", "--teacher-steps=4", "--steps=2"])
    for name, calls in (("hd", 1), ("two", 2)):
        dmd_refine.main([*where, *more, "--batch=8", "--steps=2", f"--name={name}", f"--student-steps={calls}"])
    if kind == "glyphs":
        dmd_refine.main([*where, "--probe"])
    meanflow_td.main([*where, *more, "--batch=8", "--teacher-steps=4", "--steps=1", "--on-data"])
    shutil.copy(tmp_path / "hd-seed0.pt", tmp_path / "budgets" / "hd-seed0-000002.pt")  # the same training, no second
    run(*where)
    rows = json.loads((tmp_path / "results.json").read_text())
    students = {"meanflow": 1, "td": 1, "hd": 1, "two": 1, "two, 2 calls": 2}
    expected = {"data against data": 0, "teacher, Heun, w = 1.0": 50} | students
    assert {row["what"]: row["nfe"] for row in rows} == expected and len(rows) == 10
    assert [row["updates"] for row in rows if row["what"] == "hd"] == [2, 1]
    assert all(np.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))
    assert {"spectrum.png", "curves.png", "grid.png"} < files(tmp_path).keys()


def test_a_folder_is_judged_by_all_of_its_classes(tmp_path):
    where = pictures(tmp_path, {"a": 30, "b": 30})
    source, _ = meanflow_td.open_data("folder", where, size=16, device="cpu")
    _, held_out, other, y = evaluate.small_data({"data": "folder", "data_dir": where}, source, 20, seed=0)
    assert (len(held_out), len(other), len(y), set(y.tolist())) == (12, 20, 20, {0, 1})


@pytest.mark.slow
def test_the_ablation_is_one_command(tmp_path):
    """Six variants in processes of their own, then the table of all."""
    where = ["--quick", f"--out={tmp_path}", "--batch=8", "--steps=2"]
    meanflow_td.main([*where, "--teacher-steps=4"])
    dmd_refine.main([*where, "--ablation", "--seeds=1"])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert dmd_refine.VARIANTS.keys() < {row["what"] for row in rows}
    trained = [torch.load(path) for path in tmp_path.glob("*-seed0.pt")]
    found = {(state["config"]["init"], state["config"]["pooling"]) for state in trained}
    assert found == {*dmd_refine.VARIANTS.values()} and len({str(state["ema"]) for state in trained}) == 6


def stage(path, net):  # a finished stage's file with this network
    config = {"data": "glyphs", "steps": 1, "network": net.describe()}
    data.save(path, {"ema": net.state_dict(), "step": 1, "config": config})
    return path


def test_samples(tmp_path):
    """A folder that lacks some is filled up; label and noise of an image don't depend on how many there are."""
    command = ["--checkpoint", stage(tmp_path / "hd.pt", tiny_teacher(two_times=True)), "--batch", 2, "--out"]
    run("--sample", 5, *command, tmp_path / "a")
    whole = files(tmp_path / "a")
    assert sorted(whole) == [*(f"{i:06d}.png" for i in range(5)), "about.json"]
    (tmp_path / "a" / "000001.png").unlink(), (tmp_path / "a" / "000004.png").unlink()
    run("--sample", 5, *command, tmp_path / "a")
    run("--sample", 3, *command, tmp_path / "b")
    one, two = (np.stack([Image.open(tmp_path / name / f"{i:06d}.png") for i in range(3)]).astype(int) for name in "ab")
    assert abs(one - two).max() <= 1  # the third has no neighbour in its batch, and may round otherwise
    for wrong, said in (("--seed=1", "--out"), ("--classes=10", "0 .. "), ("--sampler=heun", "student")):
        assert said in refusal(evaluate, "--sample", 5, *command, tmp_path / "a", wrong)
        assert files(tmp_path / "a") == whole


@pytest.mark.parametrize("kind, sampler", [("SiT", "sde"), ("DiT", "ddpm"), ("own", "heun")])
def test_samples_of_a_teacher(tmp_path, monkeypatch, kind, sampler):
    """Of a published teacher's file, through the VAE, or of one trained here; two classes in turn."""
    monkeypatch.chdir(tmp_path)
    net = DiT(8, 4, 4, hidden_size=32, depth=1, num_heads=1, num_classes=3, learn_sigma=True)
    torch.save(fill(net).state_dict(), f"{kind}.pt")
    torch.save(fill(AutoencoderKL((32, 32), layers_per_block=1)).state_dict(), "vae.pt")
    of = ["--checkpoint", stage(tmp_path / "own.pt", tiny_teacher())] if kind == "own" else []
    run("--sample=3", f"--teacher={kind}.pt", "--vae=vae.pt", *of, "--steps=3", "--classes", 0, 2, "--out=x")
    about = json.loads((tmp_path / "x" / "about.json").read_text())
    assert (about["sampler"], about["steps"], about["w"], about["classes"]) == (sampler, 3, 1.5, [0, 2])
    images = [Image.open(path) for path in sorted((tmp_path / "x").glob("*.png"))]
    assert [(image.mode, image.size) for image in images] == 3 * [("L", (8, 8)) if kind == "own" else ("RGB", (16, 16))]


def test_flops(capsys):
    """The paper's 69.7, and what it is made of."""
    run("--flops")
    found = [float(line.split()[0].replace(",", "")) for line in capsys.readouterr().out.splitlines()]
    assert [found[0], found[1], *found[-2:]] == [118.62, 311.09, 69.74, 138.75]

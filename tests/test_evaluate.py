"""evaluate.py against what the official evaluators answer, and against bad input.

The literals below are answers of pytorch-fid, torch-fidelity, prdc and ADM's formulas to `fill` and `wave`
(tests/helpers.py): mean, standard deviation, first 8 and last 4 values of each output."""

import hashlib
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
import urllib.error

import numpy as np
from PIL import Image
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import data
import evaluate
import meanflow_td
from helpers import fill, wave

ROOT = Path(evaluate.__file__).parent


@pytest.fixture(scope="module")
def net():
    return fill(evaluate.InceptionV3())


def close(output, entry, scale=1e-4):
    """Assert that an output has an entry's statistics and values, to `scale` of its standard deviation."""
    shape, mean, std, first, last = entry
    assert output.numel() == np.prod(shape)
    flat = output.flatten().double()
    got = torch.cat([flat[:8], flat[-4:], flat.mean()[None], flat.std()[None]])
    np.testing.assert_allclose(got, [*first, *last, mean, std], rtol=scale, atol=scale * std)


# --- InceptionV3 -----------------------------------------------------------------------------------------------------

# pytorch-fid: (wave(2, 3, 64, 64) + 1)/2, its resize
TORCH = {
    "block_768": ([2, 768, 17, 17], 299.10252329967796, 755.1204195423783,
        [0.0, 0.0, 0.0, 0.0, 41.8983154296875, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0]),
    "pool": ([2, 2048, 1, 1], 53.65371033720842, 141.90811026830383,
        [3.045668125152588, 35.10789489746094, 167.73773193359375, 262.7689514160156,
         130.71502685546875, 0.19160433113574982, 1.366459846496582, 19.81627655029297],
        [678.85205078125, 188.38783264160156, 0.0, 0.0]),
    "logits": ([2, 1008], -0.02887715638748237, 277.48968422654025,
        [359.71893310546875, 348.3299865722656, -3.3254077434539795, -351.7347106933594,
         -356.5552673339844, -13.068414688110352, 343.20654296875, 364.2481384277344],
        [291.6155700683594, -55.06866455078125, -347.9870300292969, -301.0133056640625]),
}  # fmt: skip
# torch-fidelity: ((wave(2, 3, 64, 64) + 1) * 127.5).round() as uint8, TensorFlow 1's resize, (x - 128)/128
TF1 = {
    "resized": ([2, 3, 299, 299], 127.49915767477887, 75.14410702774825,
        [128.0, 137.84616088867188, 147.6923065185547, 157.5384521484375,
         167.38461303710938, 176.7391357421875, 185.0869598388672, 193.43478393554688],
        [233.0, 233.0, 233.0, 233.0]),
    "pool": ([2, 2048], 51.88273032467963, 136.21868319696847,
        [2.151686906814575, 28.134769439697266, 152.43572998046875, 254.85211181640625,
         131.26568603515625, 0.4044175446033478, 0.9396321773529053, 16.15206527709961],
        [670.5769653320312, 179.2682342529297, 0.0, 0.0]),
    "logits": ([2, 1008], -0.02067404311327707, 269.34268331709893,
        [338.7173767089844, 323.9532165527344, -7.2661519050598145, -331.39013671875,
         -331.79791259765625, -8.081296920776367, 323.5520324707031, 339.1504821777344],
        [306.5104675292969, -35.88029479980469, -343.2483215332031, -315.35302734375]),
    "logits_no_bias": ([2, 1008], -0.020582718508584157, 269.3428156742407,
        [338.7672119140625, 323.9886169433594, -7.261823654174805, -331.4189147949219,
         -331.84625244140625, -8.126480102539062, 323.5312805175781, 339.1639099121094],
        [306.54412841796875, -35.83073425292969, -343.2061462402344, -315.33807373046875]),
    "spatial": ([2, 2023], 17.7769795497617, 30.67879437040366,
        [0.0, 22.526796340942383, 0.0, 29.78420066833496, 0.0, 18.757558822631836, 0.0, 0.0],
        [0.0, 44.11952209472656, 0.0, 99.3210678100586]),
}  # fmt: skip


def torch_input():
    return (wave(2, 3, 64, 64) + 1) / 2


def tf1_input():
    return ((wave(2, 3, 64, 64) + 1) * 127.5).round() / 255


def test_state_dict_is_the_published_one(net):
    listed = sorted((name, list(value.shape)) for name, value in net.state_dict().items())
    assert len(listed) == 566
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()  # of the names and shapes in pytorch-fid's network
    assert digest == "98efe1f44183bf67247de946366958822c514b904f110b4f1381639ff56d9203"


def test_torch_resize_agrees_with_pytorch_fid(net):
    seen = []
    hook = net.Mixed_6e.register_forward_hook(lambda module, args, output: seen.append(output))
    features = net(torch_input(), resize="torch")
    hook.remove()
    close(seen[0].contiguous(), TORCH["block_768"])
    close(features["pool"], TORCH["pool"])
    close(features["logits"], TORCH["logits"])


def test_tf1_resize_agrees_with_torch_fidelity(net):
    close(evaluate.resize_tf1(255 * tf1_input()), TF1["resized"], 1e-6)
    features = net(tf1_input())
    assert {name: list(f.shape) for name, f in features.items()} == {
        "pool": [2, 2048], "spatial": [2, 2023], "logits": [2, 1008], "logits_no_bias": [2, 1008],
    }  # fmt: skip
    for name, output in features.items():
        close(output, TF1[name])


def half_pixel(x):
    return F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)


def padded_average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=True)


@pytest.mark.parametrize("broken", ["resize", "normalisation", "count_include_pad", "max pool of 7c", "channels-first"])
def test_comparison_sees_what_is_broken(net, monkeypatch, broken):
    if broken == "resize":
        monkeypatch.setattr(evaluate, "resize_tf1", half_pixel)
    if broken == "normalisation":
        monkeypatch.setattr(evaluate, "to_inception", lambda x, resize: 2 * evaluate.resize_tf1(x) - 1)
    if broken == "count_include_pad":
        monkeypatch.setattr(evaluate, "average_pool", padded_average)
    if broken == "max pool of 7c":
        monkeypatch.setattr(net.Mixed_7c, "pool", evaluate.average_pool)
    features = net(tf1_input())
    if broken == "channels-first":  # nothing but the order of sFID's features
        spatial = features["spatial"].reshape(2, 17, 17, 7).permute(0, 3, 1, 2).flatten(1)
        features = {"spatial": spatial}
    name = "spatial" if broken == "channels-first" else "pool"
    with pytest.raises(AssertionError):
        close(features[name], TF1[name])


@pytest.mark.parametrize("height, width", [(100, 32), (299, 640), (256, 17)])
def test_resizes_agree_with_loops_at_other_sizes(height, width):
    x = wave(1, 1, height, width)
    places = {"tf1": lambda i, size: i * size / 299, "torch": lambda i, size: max((i + 0.5) * size / 299 - 0.5, 0.0)}
    for resize, place in places.items():
        got = evaluate.to_inception((x.expand(1, 3, -1, -1) + 1) / 2, resize)[0, 1]
        got = (128 * got + 128) / 255 if resize == "tf1" else (got + 1) / 2  # back to [0, 1]
        for i, j in ((0, 0), (3, 150), (150, 7), (297, 211), (298, 298)):
            a, b = place(i, height), place(j, width)
            a0, b0 = int(a), int(b)
            a1, b1 = min(a0 + 1, height - 1), min(b0 + 1, width - 1)
            top = x[0, 0, a0, b0] * (1 - b + b0) + x[0, 0, a0, b1] * (b - b0)
            low = x[0, 0, a1, b0] * (1 - b + b0) + x[0, 0, a1, b1] * (b - b0)
            expected = (top * (1 - a + a0) + low * (a - a0) + 1) / 2
            assert float(got[i, j]) == pytest.approx(float(expected), abs=1e-4)


def test_folded_norm_is_the_plain_one_in_any_mode(net):
    block, x = net.Mixed_5b.branch3x3dbl_2, wave(2, 64, 9, 9)
    plain = F.relu(block.bn.eval()(F.conv2d(x, block.conv.weight, padding=1)))
    for mode in (True, False):
        torch.testing.assert_close(block.train(mode)(x), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spoil", [lambda x: x * np.nan, lambda x: x * 255, lambda x: x - 0.1, lambda x: x[:, :1]])
def test_inception_refuses(net, spoil):
    with pytest.raises(ValueError, match="Inception takes"):
        net(spoil(torch.rand(1, 3, 32, 32)))
    with pytest.raises(ValueError, match="resize"):
        net(torch.rand(1, 3, 32, 32), resize="bicubic")


# --- Frechet distance ------------------------------------------------------------------------------------------------


def test_frechet_agrees_with_pytorch_fid():
    rng = np.random.default_rng(0)
    for d, n, fid in ((8, 100, 15.114254691515313), (64, 500, 3163.001862209456), (64, 40, 3605.224018654137)):
        a = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
        b = 1.3 * rng.normal(size=(n, d)) + 0.2
        got = evaluate.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        assert got == pytest.approx(fid, rel=1e-6)
        assert evaluate.frechet_distance(b.mean(0), np.cov(b.T), a.mean(0), np.cov(a.T)) == pytest.approx(got, rel=1e-9)


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    rng = np.random.default_rng(3)
    (s, q), (m, k) = rng.uniform(0, 2, (2, 50)), rng.normal(size=(2, 50))
    q[:20] = 0  # one of the two is singular
    expected = ((m - k) ** 2).sum() + ((s - q) ** 2).sum()
    assert evaluate.frechet_distance(m, np.diag(s**2), k, np.diag(q**2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank1, rank2", [(200, 200), (200, 80), (80, 200), (80, 80), (199, 200), (199, 199)])
def test_frechet_of_singular_covariances_is_exact(rank1, rank2):
    """Covariances of one basis, so that the closed form holds; rounding at the zeros must not add up."""
    rng = np.random.default_rng(rank1)
    basis = np.linalg.qr(rng.normal(size=(200, 200)))[0]
    s, q = rng.uniform(0.5, 2, (2, 200))
    s[rank1:], q[rank2:] = 0, 0
    got = evaluate.frechet_distance(s, basis * s**2 @ basis.T, q, basis * q**2 @ basis.T)
    assert got == pytest.approx(2 * ((s - q) ** 2).sum(), rel=1e-10)


def test_frechet_sees_a_singular_covariance_that_cholesky_takes():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(200, 200)))[0]
    thin = np.diag(np.where(np.arange(200) < 100, 1.0, 1e-30))  # its factor exists, and is nothing but noise
    full = basis * rng.uniform(0.5, 2, 200) @ basis.T
    expected = 100 + np.trace(full) - 2 * np.sqrt(np.linalg.eigvalsh(full[:100, :100])).sum()
    for pair in ((thin, full), (full, thin)):
        got = evaluate.frechet_distance(np.zeros(200), pair[0], np.zeros(200), pair[1])
        assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [20, 299, 301, 1000])  # samples of 300 dimensions
def test_frechet_of_equal_inputs_is_zero_and_never_negative(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 300)) * np.geomspace(1, 1e-5, 300)
    mu, sigma = x.mean(0), np.cov(x.T)
    assert 0 <= evaluate.frechet_distance(mu, sigma, mu, sigma) <= 1e-6 * np.trace(sigma)
    assert 0 <= evaluate.frechet_distance(mu, sigma, mu, sigma * (1 + 1e-13)) <= 1e-6 * np.trace(sigma)


def test_frechet_refuses():
    good = np.zeros(3), np.eye(3)
    for mu, sigma in ((np.zeros(2), np.eye(2)), (np.zeros(3), np.eye(2)), (np.zeros(3), np.eye(3) * np.nan)):
        with pytest.raises(ValueError):
            evaluate.frechet_distance(*good, mu, sigma)


def test_frechet_is_faster_than_sqrtm():
    # At 2048 dimensions the ratio was 10.5 (one core of an AMD EPYC: 13.5 s against 1.28 s); this one leaves room, and
    # counts the thread's own time, however busy the machine is.
    rng = np.random.default_rng(0)
    s1, s2 = (np.cov(rng.normal(size=(384, 1000)) * np.geomspace(1, 1e-2, 384)[:, None]) for _ in range(2))
    mu, ours, theirs = np.zeros(384), [], []
    for _ in range(3):
        begun = time.thread_time()
        fast = evaluate.frechet_distance(mu, s1, mu, s2)
        ours.append(time.thread_time() - begun)
        begun = time.thread_time()
        slow = np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
        theirs.append(time.thread_time() - begun)
    assert fast == pytest.approx(slow, rel=1e-6)
    assert min(theirs) > 1.2 * min(ours)  # 2 to 2.8 at this size


def test_moments_are_numpys_whatever_the_batches():
    x = torch.randn(101, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    moments = evaluate.Moments(7)
    for part in x.split([1, 2, 60, 38]):
        moments.update(part)
    mu, sigma = moments.finish()
    np.testing.assert_allclose(mu, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.numpy().T), rtol=0, atol=1e-7)  # summing x x^T: 1e-3


# --- Inception Score, precision, recall ------------------------------------------------------------------------------


def test_inception_score():
    logits = 4 * wave(1000, 12, freq=1.3)
    assert evaluate.inception_score(logits) == pytest.approx(2.7767205468049116, rel=1e-6)  # ADM's formula, one split
    assert evaluate.inception_score(torch.zeros(30, 12)) == pytest.approx(1)
    assert evaluate.inception_score(1e3 * torch.eye(12)) == pytest.approx(12)  # surely one class each, all classes
    halves = [evaluate.inception_score(logits[:600]), evaluate.inception_score(logits[600:])]
    assert evaluate.inception_score(logits, group=600) == pytest.approx(np.mean(halves))
    logits = 4 * wave(6000, 12, freq=1.3).flip(0)
    groups = [evaluate.inception_score(part, group=6000) for part in (logits[:5000], logits[5000:])]
    assert evaluate.inception_score(logits) == pytest.approx(np.mean(groups), rel=1e-9)


def brute_force(data_, gen, k):
    def reach(points):
        return np.array([sorted(np.linalg.norm(points - p, axis=1))[k] for p in points])

    far = np.linalg.norm(data_[:, None] - gen[None], axis=2)
    return (far <= reach(data_)[:, None]).any(0).mean(), (far <= reach(gen)[None]).any(1).mean()


def test_precision_recall():
    rng = np.random.default_rng(1)
    real, gen = rng.normal(size=(400, 8)), 0.8 * rng.normal(size=(300, 8)) + 0.3
    assert evaluate.precision_recall(real, gen, k=3) == pytest.approx((0.9533333333333334, 0.6275), abs=1e-12)  # prdc
    for k in (1, 3, 5):
        expected = pytest.approx(brute_force(real, gen, k), abs=1e-12)
        assert evaluate.precision_recall(real, gen, k) == expected
        assert evaluate.precision_recall(real, gen, k, rows=77) == expected
        assert evaluate.precision_recall((real + 100).astype(np.float32), (gen + 100).astype(np.float32), k) == expected
    assert evaluate.precision_recall(real, real) == (1, 1)
    assert evaluate.precision_recall(real, gen + 100) == (0, 0)
    with pytest.raises(ValueError, match="3 neighbours"):
        evaluate.precision_recall(real, gen[:3])


# --- From images to results ------------------------------------------------------------------------------------------


class FakeNet(torch.nn.Module):
    """Stands in for Inception where only the bookkeeping is tested: cosines of a few sums over the image."""

    calls = 0
    dims = {"POOL_DIM": 32, "SPATIAL_DIM": 24, "CLASSES": 10}

    def forward(self, images, resize):
        FakeNet.calls += 1
        few = F.adaptive_avg_pool2d(images, 4).flatten(1) * (1 if resize == "tf1" else 0.9)  # (B, 48)
        dims = {"pool": 32, "spatial": 24, "logits": 10, "logits_no_bias": 10}
        return {name: torch.cos(few @ wave(48, dim, freq=1.7) + wave(dim)) for name, dim in dims.items()}


@pytest.fixture
def fake(monkeypatch):
    FakeNet.calls = 0
    for name, dim in FakeNet.dims.items():
        monkeypatch.setattr(evaluate, name, dim)
    monkeypatch.setattr(evaluate, "load_inception", lambda path: (FakeNet(), evaluate.INCEPTION_SHA + 56 * "0"))


def make_folder(root, n, size=16, seed=0):
    """n grey digits as PNG files in class folders."""
    for i, (image, label) in enumerate(zip(*data.Glyphs(size, seed).batch(range(n)))):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(root / str(label) / f"{i:05d}.png")
    return root


def run(*argv):
    evaluate.main([str(a) for a in argv])


def rows(out):
    return json.loads((out / "results.json").read_text())


def fails(capsys, out, *argv):
    """Run, expect exit code 2 and one sentence, and no results. -> the sentence."""
    with pytest.raises(SystemExit) as stop:
        run(*argv, "--out", out)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("evaluate.py: ") and said.count("\n") == 1 and "Traceback" not in said
    assert not [p for p in out.rglob("*") if p.is_file()], "something half-written is left"
    return said


def chained_sha(source):
    """sha256 of an image's bytes behind the hexadecimal sha256 of those before it."""
    sha = ""
    for image in source.images(range(len(source))):
        sha = hashlib.sha256(sha.encode() + image.tobytes()).hexdigest()
    return sha


def test_stopped_extraction_goes_on_with_the_same_bits(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(evaluate, "SAVE_SECONDS", -1)

    class Stops(data.Glyphs):
        def images(self, indices):
            if indices[0] >= 24:
                raise KeyboardInterrupt
            return super().images(indices)

    options = {"resize": "tf1", "batch": 8, "keep": [1, 7, 8, 20, 30, 40]}
    whole = evaluate.extract(FakeNet(), data.Glyphs(length=45), tmp_path / "a", **options)
    with pytest.raises(KeyboardInterrupt):
        evaluate.extract(FakeNet(), Stops(length=45), tmp_path / "b", **options)
    done = torch.load(tmp_path / "b" / "state.pt")["done"]
    assert 8 <= done <= 24
    FakeNet.calls = 0
    again = evaluate.extract(FakeNet(), data.Glyphs(length=45), tmp_path / "b", **options)
    assert FakeNet.calls == -(-(45 - done) // 8)
    assert again["pixels"] == whole["pixels"]
    for name in ("pool", "spatial"):
        for one, other in zip(whole[name].finish(), again[name].finish()):
            np.testing.assert_array_equal(one, other)
    assert whole["pixels"] == chained_sha(data.Glyphs(length=45))
    for name in ("pool_rows", "logit_rows"):
        np.testing.assert_array_equal(whole[name], again[name])
    x = torch.from_numpy(data.Glyphs().images(range(45))).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) / 255
    direct = FakeNet()(x, "tf1")
    np.testing.assert_allclose(whole["pool_rows"], direct["pool"][options["keep"]], atol=1e-6)
    np.testing.assert_allclose(whole["spatial"].finish()[1], np.cov(direct["spatial"].double().T), atol=1e-6)
    assert evaluate.extract(FakeNet(), data.Glyphs(length=45), tmp_path / "b", **options)["rate"] is None


KILLED = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import evaluate, test_evaluate
class Slow(test_evaluate.FakeNet):
    def forward(self, images, resize):
        time.sleep({sleep})
        return super().forward(images, resize)
evaluate.SAVE_SECONDS = 0
vars(evaluate).update(Slow.dims)
evaluate.load_inception = lambda path: (Slow(), "6726825d" + 56 * "0")
evaluate.main({argv!r})
"""


@pytest.mark.slow
def test_killed_command_goes_on_and_gives_the_same_numbers(tmp_path, fake):
    images = make_folder(tmp_path / "images", 60)
    argv = ["--images", str(images), "--reference", "glyphs", "--glyphs", "24", "--batch", "4", "--allow-small"]
    names = {"root": str(ROOT), "tests": str(Path(__file__).parent), "argv": [*argv, "--out", str(tmp_path / "out")]}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(sleep=0.5, **names)], env=env)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("cache/*/state.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    (state,) = (tmp_path / "out").glob("cache/*/state.pt")
    done = torch.load(state)["done"]
    assert 4 <= done < 60 and not (tmp_path / "out" / "results.json").exists()
    run(*argv, "--out", tmp_path / "out")
    assert FakeNet.calls == (60 - done) // 4 + 24 // 4
    run(*argv, "--out", tmp_path / "unbroken")
    (one,), (other,) = rows(tmp_path / "out"), rows(tmp_path / "unbroken")
    assert one["metrics"] == other["metrics"] and one["fingerprint"] == other["fingerprint"]


def test_row_and_fingerprint(tmp_path, fake, capsys):
    images = make_folder(tmp_path / "run" / "samples", 40)
    told = {"vae": "sd-vae-ft-ema", "vae_scale": 0.18215, "sampler": "heun", "steps": 50, "guidance": 1.5, "seed": 3,
            "labels": "random", "uint8": data.UINT8_RULE, "precision": "bfloat16", "nfe": 99}  # fmt: skip
    command = ("--images", images, "--reference", "glyphs", "--glyphs", 30, "--allow-small", "--out", tmp_path / "out")
    run(*command)
    unknown = rows(tmp_path / "out")[0]["fingerprint"]
    for field in told:
        assert unknown[field] == "unknown (images came without a fingerprint.json)"
    (tmp_path / "run" / "fingerprint.json").write_text(json.dumps({**told, "labels": "balanced"}))
    run(*command)
    (tmp_path / "run" / "fingerprint.json").write_text(json.dumps(told))
    calls = FakeNet.calls
    run(*command)
    assert FakeNet.calls - calls == 2  # 40 images in batches of 32; the reference's features were kept
    run(*command)
    assert len(rows(tmp_path / "out")) == 3  # the last took the place of its twin
    row = rows(tmp_path / "out")[-1]
    assert set(row["metrics"]) == {"FID-40", "sFID-40", "IS", "precision", "recall"}
    assert all(np.isfinite(v) for v in row["metrics"].values())
    assert (row["seed"], row["nfe"]) == (3, 99) and row["images_per_second"] > 0
    mark = row["fingerprint"]
    assert {field: mark[field] for field in told} == told
    assert mark["n"] == 40 and mark["resize"] == "tf1" and mark["size"] == "16 px"
    assert mark["inception sha256"].startswith("6726825d") 
    assert mark["reference sha256"] == chained_sha(data.Glyphs(16, held_out=True, length=30))
    assert mark["pixels sha256"] == chained_sha(data.ImageFolder(images))
    printed = capsys.readouterr().out
    assert "FID-40, not comparable with FID-50k" in printed and "images/s" in printed
    for value in mark.values():
        assert isinstance(value, list) or str(value) in printed


@pytest.mark.parametrize("reference_rows", [10_000, 10])
def test_metrics_are_those_of_the_features(tmp_path, fake, monkeypatch, reference_rows):
    monkeypatch.setattr(evaluate, "REFERENCE_ROWS", reference_rows)
    images, real = make_folder(tmp_path / "images", 40), make_folder(tmp_path / "real", 50, seed=1)
    run("--images", images, "--reference", real, "--allow-small", "--out", tmp_path / "out", "--resize", "torch")

    def features(folder):
        x = np.stack([data.read_image(p) for p in data.list_images(folder)])
        return FakeNet()(torch.from_numpy(x).permute(0, 3, 1, 2) / 255, "torch")

    gen, ref = features(images), features(real)
    got = rows(tmp_path / "out")[0]["metrics"]
    for name, key in (("FID-40", "pool"), ("sFID-40", "spatial")):
        a, b = gen[key].double().numpy(), ref[key].double().numpy()
        expected = evaluate.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        assert got[name] == pytest.approx(expected, rel=1e-6)
    assert got["IS"] == pytest.approx(evaluate.inception_score(gen["logits_no_bias"]), rel=1e-6)
    cloud = ref["pool"] if reference_rows > 50 else ref["pool"][np.linspace(0, 49, 10).astype(int)]  # of all classes
    assert (got["precision"], got["recall"]) == evaluate.precision_recall(cloud, gen["pool"])


def test_rows_that_another_process_wrote_meanwhile_stay(tmp_path, fake, monkeypatch):
    images, inception_score = make_folder(tmp_path / "images", 20), evaluate.inception_score

    def meanwhile(logits):
        data.write_json(tmp_path / "out" / "results.json", [{"run": "of another process"}])
        return inception_score(logits)

    monkeypatch.setattr(evaluate, "inception_score", meanwhile)
    run("--images", images, "--reference", images, "--allow-small", "--out", tmp_path / "out")
    assert [row["run"] for row in rows(tmp_path / "out")] == ["of another process", str(images)]


def test_ctrl_c_saves_the_features_of_the_batch_at_hand(tmp_path, fake, monkeypatch):
    glyphs, before = data.Glyphs(16, length=20), signal.signal(signal.SIGINT, signal.default_int_handler)
    options = {"resize": "tf1", "batch": 4, "keep": np.arange(20)}

    class Pressed(FakeNet):
        def forward(self, *arguments, **settings):
            signal.raise_signal(signal.SIGINT)
            return super().forward(*arguments, **settings)

    monkeypatch.setattr(data.Patience, "asked", False)
    with pytest.raises(KeyboardInterrupt):
        evaluate.extract(Pressed(), glyphs, tmp_path / "a", **options)
    signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(data.Patience, "asked", False)
    assert data.read_checkpoint(tmp_path / "a" / "state.pt")["done"] == 4
    again = evaluate.extract(FakeNet(), glyphs, tmp_path / "a", **options)
    np.testing.assert_array_equal(again["pool_rows"], evaluate.extract(FakeNet(), glyphs, tmp_path / "b",
                                                                      **options)["pool_rows"])  # fmt: skip


def test_kept_features_are_not_taken_for_others(tmp_path, fake):
    images = make_folder(tmp_path / "images", 20)
    one, other = make_folder(tmp_path / "one", 25, seed=1), make_folder(tmp_path / "other", 25, seed=2)
    commands = [("--reference", r, "--resize", rule, "--images", images, "--allow-small")
                for r in (one, other) for rule in ("tf1", "torch")]  # fmt: skip
    for i, command in enumerate(commands):
        run(*command, "--out", tmp_path / "together")
        run(*command, "--out", tmp_path / f"alone{i}")
    alone = [rows(tmp_path / f"alone{i}")[0]["metrics"] for i in range(4)]
    assert [r["metrics"] for r in rows(tmp_path / "together")] == alone
    assert len({str(metrics) for metrics in alone}) == 4


def moments_of(dim):
    return np.linspace(0, 1, dim), np.eye(dim)


def test_every_kind_of_reference(tmp_path, fake):
    images, out = make_folder(tmp_path / "images", 40), tmp_path / "out"
    (mu, sigma), (mu_s, sigma_s) = moments_of(32), moments_of(24)
    big = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=big)
    np.savez(tmp_path / "pytorch_fid.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "spatial.npz", mu_s=mu_s, sigma_s=sigma_s, arr_0=big)  # of no use without mu and sigma
    np.savez_compressed(tmp_path / "images.npz", arr_0=big)
    for i, image in enumerate(big[:9]):  # photos of another size than the scored images: the centre crop takes them
        (tmp_path / "photos" / "n01").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[: 40 + i]).save(tmp_path / "photos" / "n01" / f"{i}.JPEG")
    glyph_run, folder_run = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    few = ["--quick", "--teacher-steps", "1", "--td-steps", "1", "--batch", "4", "--out"]
    meanflow_td.main([*few, str(glyph_run)])
    meanflow_td.main([*few, str(folder_run), "--data", "folder", "--data-dir", str(tmp_path / "photos")])

    everything = {"FID-40", "sFID-40", "IS", "precision", "recall"}
    expected = {
        tmp_path / "adm.npz": everything, tmp_path / "pytorch_fid.npz": {"FID-40", "IS"},
        tmp_path / "images.npz": everything, tmp_path / "spatial.npz": everything, tmp_path / "photos": everything,
        "glyphs": everything,
        glyph_run: everything, folder_run: everything,
    }  # fmt: skip
    common = ("--images", images, "--glyphs", 12, "--allow-small", "--out", out)
    for reference in expected:
        run(*common, "--reference", reference)
    got = {r["fingerprint"]["reference"]: r for r in rows(out)}
    for reference, metrics in expected.items():
        if reference in (glyph_run, folder_run):
            continue
        (name,) = [name for name in got if name.startswith(str(reference))]
        assert set(got[name]["metrics"]) == metrics
    assert len(rows(out)) == 6  # a run's reference is its data: the same fingerprints as the data's own
    adm = got[str(tmp_path / "adm.npz")]["fingerprint"]
    assert adm["reference sha256"] == hashlib.sha256((tmp_path / "adm.npz").read_bytes()).hexdigest()
    assert any("20 images of 64 px are for precision and recall alone" in note for note in adm["notes"])
    pool = FakeNet()(torch.from_numpy(np.stack([data.read_image(p) for p in data.list_images(images)]))
                     .permute(0, 3, 1, 2) / 255, "tf1")["pool"].double().numpy()  # fmt: skip
    fid = evaluate.frechet_distance(mu, sigma, pool.mean(0), np.cov(pool.T))
    assert got[str(tmp_path / "adm.npz")]["metrics"]["FID-40"] == pytest.approx(fid, rel=1e-6)
    assert got[str(tmp_path / "pytorch_fid.npz")]["metrics"]["FID-40"] == pytest.approx(fid, rel=1e-6)
    assert any("no sFID" in note for note in got[str(tmp_path / "pytorch_fid.npz")]["fingerprint"]["notes"])


def test_save_npz_is_adms_format_and_scores_alike(tmp_path, fake):
    images, npz = make_folder(tmp_path / "images", 40), tmp_path / "new" / "samples.npz"
    run("--images", images, "--save-npz", npz)
    with np.load(npz) as file:
        assert file.files == ["arr_0"]
        saved = file["arr_0"]
    assert saved.dtype == np.uint8 and saved.shape == (40, 16, 16, 3)
    np.testing.assert_array_equal(saved, np.stack([data.read_image(p) for p in data.list_images(images)]))
    for source in (images, npz):
        run("--images", source, "--reference", "glyphs", "--glyphs", 30, "--allow-small", "--out", tmp_path / "out")
    one, other = rows(tmp_path / "out")
    assert one["metrics"] == other["metrics"]
    assert one["fingerprint"]["pixels sha256"] == other["fingerprint"]["pixels sha256"]


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_own_weights_are_used_and_told(tmp_path, net):
    images = make_folder(tmp_path / "images", 2, size=32)
    torch.save(net.state_dict(), tmp_path / "filled.pth")
    run("--images", images, "--reference", images, "--allow-small", "--inception-weights", tmp_path / "filled.pth",
        "--out", tmp_path / "out", "--device", "cpu")  # fmt: skip
    (row,) = rows(tmp_path / "out")
    assert 0 <= row["metrics"]["FID-2"] < 1e-6 > row["metrics"]["sFID-2"] >= 0  # the same images on either side
    sha = hashlib.sha256((tmp_path / "filled.pth").read_bytes()).hexdigest()
    assert row["fingerprint"]["inception sha256"] == sha
    assert any(f"weights {sha[:8]} are not the published 6726825d" in note for note in row["fingerprint"]["notes"])

    claimed = tmp_path / "copy-2015-12-05-6726825d.pth"
    os.link(tmp_path / "filled.pth", claimed)
    with pytest.raises(data.BadInput, match=f"{claimed.name} is damaged or another file: its sha256 is {sha}"):
        evaluate.load_inception(claimed)


def test_other_weights_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "part.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "part.pth").read_bytes()[:-5000])
    for name in ("text.pth", "part.pth", "tensor.pth", "cut.pth", "absent.pth"):
        with pytest.raises(data.BadInput, match=name) as error:
            evaluate.load_inception(tmp_path / name)
        assert "\n" not in str(error.value)


def test_offline_error_names_url_and_place(tmp_path, monkeypatch, capsys):
    def no_network(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    images = make_folder(tmp_path / "images", 5)
    said = fails(capsys, tmp_path / "out", "--images", images, "--reference", "glyphs", "--allow-small")
    assert evaluate.INCEPTION_URL in said and "--inception-weights" in said
    assert str(tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth") in said


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_truncated_png_among_a_thousand(tmp_path, fake, capsys):
    folder, bad = tmp_path / "images", tmp_path / "images" / "0700.png"
    folder.mkdir()
    for i in range(1000):
        Image.fromarray(np.full((16, 16, 3), i % 256, np.uint8)).save(folder / f"{i:04d}.png")
    bad.write_bytes(bad.read_bytes()[:50])
    command = ("--images", folder, "--reference", "glyphs", "--glyphs", 10, "--allow-small")
    assert str(bad) in fails(capsys, tmp_path / "out", *command)
    assert str(bad) in fails(capsys, tmp_path / "out", "--images", folder, "--save-npz", tmp_path / "out" / "x.npz")
    bad.unlink()
    run(*command, "--out", tmp_path / "out")
    assert rows(tmp_path / "out")[0]["fingerprint"]["n"] == 999


def bad_images(root):
    """What cannot be scored -> what the sentence about it must say."""
    ok = np.zeros((5, 16, 16, 3), np.uint8)
    make_folder(root / "mixed", 9)
    Image.fromarray(ok[0, :15]).save(root / "mixed" / "3" / "zz.png")
    make_folder(root / "stray", 3)
    Image.fromarray(ok[0]).save(root / "stray" / "grid.png")
    (root / "empty").mkdir()
    (root / "text").mkdir()
    (root / "text" / "a.png").write_text("not an image")
    (root / "deep").mkdir()
    for name in "ab":
        Image.fromarray(np.zeros((16, 16), np.uint16)).save(root / "deep" / f"{name}.png")
    nan = np.zeros((5, 16, 16, 3), np.float32)
    nan[2, 3] = np.nan
    arrays = {"nan": nan, "pickled": np.array([{}, 1], object), "flat": ok[0], "oblong": ok[:, :8], "none": ok[:0]}
    for name, array in arrays.items():
        np.savez(root / f"{name}.npz", arr_0=array)
    np.savez(root / "keyless.npz", samples=ok)
    (root / "cut.npz").write_bytes((root / "keyless.npz").read_bytes()[:300])
    return {
        "mixed": "zz.png is 16 x 15 px", "stray": "grid.png lies beside", "empty": "holds no images",
        "text": "a.png cannot be read as an image", "deep": "a.png holds I;16 pixels", "nan.npz": "float32",
        "pickled.npz": "holds pickled objects", "flat.npz": "(16, 16, 3)", "oblong.npz": "(5, 8, 16, 3)",
        "none.npz": "no images",
        "keyless.npz": "no array", "cut.npz": "npz", "absent.npz": "No such file", "absent": "No such file",
    }  # fmt: skip


def test_bad_images(tmp_path, fake, capsys):
    for name, expected in bad_images(tmp_path).items():
        said = fails(capsys, tmp_path / "out", "--images", tmp_path / name, "--reference", "glyphs", "--allow-small")
        assert expected in said and name in said


def test_bad_references(tmp_path, fake, capsys):
    images = make_folder(tmp_path / "images", 5)
    mu, sigma = moments_of(32)
    arrays = {
        "keyless": {"x": mu}, "half": {"mu": mu}, "small": {"mu": mu[:6], "sigma": sigma[:6, :6]},
        "swapped": {"mu": sigma, "sigma": mu}, "nan": {"mu": mu * np.nan, "sigma": sigma},
        "pickled": {"mu": np.array([{}], object), "sigma": sigma},
    }  # fmt: skip
    for name, content in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **content)
    np.save(tmp_path / "bare.npy", mu)
    for name, config in (("odd", {"data": {"data": "folder"}}), ("large", {"data": {"data": "glyphs", "size": 32}}),
                         ("flat", {"data": "glyphs"})):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for name in [*(f"{n}.npz" for n in arrays), "bare.npy", "odd", "large", "flat", "broken", "empty", "absent"]:
        said = fails(capsys, tmp_path / "out", "--images", images, "--reference", tmp_path / name, "--allow-small")
        assert str(tmp_path / name) in said


def test_damaged_results_and_sidecar_are_named_and_kept(tmp_path, fake, capsys):
    images, out = make_folder(tmp_path / "images", 5), tmp_path / "out"
    command = ("--images", images, "--reference", "glyphs", "--glyphs", 9, "--allow-small", "--out", out)
    out.mkdir()
    results, sidecar = out / "results.json", tmp_path / "fingerprint.json"
    for path, text in ((results, "[1,"), (results, "{}"), (sidecar, "?")):
        path.write_text(text)
        with pytest.raises(SystemExit):
            run(*command)
        assert str(path) in capsys.readouterr().err and path.read_text() == text
        path.unlink()


def test_few_images_are_refused_with_the_reason(tmp_path, capsys):
    images = make_folder(tmp_path / "images", 5)
    said = fails(capsys, tmp_path / "out", "--images", images, "--reference", "glyphs")
    assert f"{images} has 5 images" in said and "singular" in said and "--allow-small" in said
    np.savez(tmp_path / "many.npz", arr_0=np.zeros((2048, 8, 8, 1), np.uint8))
    said = fails(capsys, tmp_path / "out", "--images", tmp_path / "many.npz", "--reference", images)
    assert f"{images} has 5 images" in said
    said = fails(capsys, tmp_path / "out", "--images", make_folder(tmp_path / "one", 1), "--reference", "glyphs",
                 "--allow-small")  # fmt: skip
    assert "has 1 images" in said


@pytest.mark.parametrize("argv", [["--images", "x"], ["--reference", "glyphs"], ["--flops", "--batch", "0"],
    ["--flops", "--batch", "many"], ["--flops", "--glyphs", "1"], ["--flops", "--device", "abacus"],
    ["--flops", "--resize", "bicubic"]])  # fmt: skip
def test_bad_flags(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def test_flops_reproduce_the_papers_ratio(capsys):
    run("--flops")
    unit, *lines = capsys.readouterr().out.splitlines()
    numbers = [float(line.split()[0].replace(",", "")) for line in lines]
    assert "GMACs" in unit
    forward, decoder, *_, ratio, guided = numbers
    assert (forward, decoder) == pytest.approx((118.62, 311.09), abs=0.005)
    assert ratio == pytest.approx(69.74, abs=0.005) and round(ratio, 1) == 69.7  # the paper's
    assert guided == pytest.approx(138.75, abs=0.005)  # 138.76 by others' 118.64

"""Scores images with the metrics of the papers: FID, sFID, Inception Score, precision and recall.

A classifier, InceptionV3 of 2015, turns each image into 2048 numbers. FID is the squared Frechet distance of Gaussians
fitted to the clouds of these numbers of two sets of images:

    FID = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

sFID does so with 2023 numbers that keep spatial position. Precision is the share of generated images within the
data's cloud, recall the share of data within the generated cloud. The Inception Score asks whether each image clearly
shows one class, while all together show all classes. The resize to 299 px alone changes FID by 0.1, the number of
images much more: a row says what was compared. Small images are judged by a classifier trained here, not upscaled.

    python evaluate.py --data glyphs                                             # the table of a run on small images
    python evaluate.py --sample 50000 --checkpoint runs/imagenet/hd-seed0.pt     # images, and then
    python evaluate.py --images runs/samples --reference VIRTUAL_imagenet256_labeled.npz       # the papers' protocol
    python evaluate.py --images runs/samples --save-npz samples.npz              # for ADM's own evaluator
    python evaluate.py --flops                                                   # what one image costs

OURS: the paper names no evaluator. This is ADM's protocol (arXiv 2105.05233), as for DiT and SiT: 50,000 samples with
random labels against statistics of the whole training set.
"""

import argparse
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg, stats
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
from data import BadInput, ImageFolder, blame, check_made, glyphs, join, progress, rng, save_grid, to_float, to_uint8
from dmd_refine import COLOURS, VARIANTS
from meanflow_td import learning_rate, load_net, new_network, open_data, sample, sample_ode, update
from models import (AutoencoderKL, DiT, DiTTeacher, SiTTeacher, chain, load_teacher, load_vae, load_weights, sample_sde,
                    weights_path)  # fmt: skip

# --- InceptionV3 -----------------------------------------------------------------------------------------------------
#
# Szegedy et al., arXiv 1512.00567, in TensorFlow's variant of 2015-12-05, which all FIDs use: the average pools within
# a block do not count the padding, the last block pools by maximum, there are 1008 classes. Names: the weight file's.


def conv_norm(c_in, c_out, kernel, stride=1, pad=True):
    """Convolution without bias, batch norm, ReLU: (B, c_in, H, W) -> (B, c_out, H', W').
    At stride 1 zeros keep the image's size; at stride 2, and with pad=False, the border is lost."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, "same" if pad and stride == 1 else 0, bias=False)
    return chain(conv=conv, bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU(inplace=True))


class Mixed(nn.Module):
    """Branches side by side, their outputs concatenated: (B, c_in, H, W) -> (B, sum of c_out, H', W').
    branches: name = its convolutions one after the other, each (c_out, kernel) or (c_out, kernel, stride). The kernel
    "fan", in the last place, is a 1 x 3 and a 3 x 1 side by side. A pool is the last branch; where c_pool is given, a
    1 x 1 convolution to so many channels follows it."""

    def __init__(self, c_in, pool, c_pool=None, **branches):
        super().__init__()
        self.pool, self.branches = pool, []
        for name, steps in branches.items():
            c, branch = c_in, []  # names of layers: one for each step, two for a fan
            for i, (c_out, kernel, *stride) in enumerate(steps, 1):
                step = name if len(steps) == 1 else f"{name}_{i}"
                layers = {step + "a": (1, 3), step + "b": (3, 1)} if kernel == "fan" else {step: kernel}
                for layer, size in layers.items():
                    self.add_module(layer, conv_norm(c, c_out, size, *stride))
                branch.append(list(layers))
                c = c_out
            self.branches.append(branch)
        self.branch_pool = conv_norm(c_in, c_pool, 1) if c_pool else nn.Identity()  # Identity adds no key

    def forward(self, x):
        outputs = []
        for branch in self.branches:
            h = [x]
            for layers in branch:
                h = [getattr(self, layer)(h[0]) for layer in layers]
            outputs += h
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], dim=1)


# 3 x 3 pools. At the border the average is over the 4 or 6 pixels that exist.
average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
shrink_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class InceptionV3(nn.Module):
    """The network behind FID. Call: images (B, 3, H, W) in [0, 1] -> dict of float32 features, else ValueError:
    pool (B, 2048)            for FID, precision and recall
    spatial (B, 2023)         for sFID: 17 x 17 x 7, in (H, W, C) order
    logits (B, 1008)          and logits_no_bias, which the Inception Score takes (PRIOR: ADM's evaluator)"""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv_norm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = conv_norm(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = conv_norm(32, 64, 3)
        self.Conv2d_3b_1x1 = conv_norm(64, 80, 1)
        self.Conv2d_4a_3x3 = conv_norm(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            Mixed(c_in, average_pool, c_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                  branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
            for c_in, c_pool in ((192, 32), (256, 64), (288, 64)))  # fmt: skip
        self.Mixed_6a = Mixed(288, shrink_pool, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (  # 7 x 7 filters, split into 1 x 7 and 7 x 1
            Mixed(768, average_pool, 192, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                  branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))])
            for c in (128, 160, 160, 192))  # fmt: skip
        self.Mixed_7a = Mixed(768, shrink_pool, branch3x3=[(192, 1), (320, 3, 2)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)])  # fmt: skip
        self.Mixed_7b, self.Mixed_7c = (
            Mixed(c_in, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, "fan")],
                  branch3x3dbl=[(448, 1), (384, 3), (384, "fan")])
            for c_in, pool in ((1280, average_pool), (2048, max_pool)))  # fmt: skip
        self.fc = nn.Linear(2048, 1008)
        self.eval().to(memory_format=torch.channels_last)  # eval: batch norms by their stored statistics

    @torch.no_grad()
    def forward(self, images, resize="tf1"):
        if images.ndim != 4 or images.shape[1] != 3 or not (images.amin() >= 0 and images.amax() <= 1):  # NaN fails too
            raise ValueError(f"Inception takes finite images (B, 3, H, W) in [0, 1], not these {tuple(images.shape)}")
        x = to_inception(images.float(), resize).contiguous(memory_format=torch.channels_last)  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # 7 channels of branch1x1, the first to be concatenated
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pool = x.mean((2, 3))
        no_bias = pool @ self.fc.weight.T
        return {"pool": pool, "spatial": spatial, "logits": no_bias + self.fc.bias, "logits_no_bias": no_bias}


def to_inception(images, resize):
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, 299, 299) in about [-1, 1], bilinear, by the rule of an evaluator."""
    if resize == "torch":  # PRIOR: pytorch-fid; half a pixel apart from the rule below, and white becomes 1
        return 2 * F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False) - 1
    if resize != "tf1":
        raise ValueError(f'resize is "tf1" or "torch", not {resize!r}')
    x = 255 * images  # PRIOR: the TensorFlow 1 graph that ADM's evaluator runs; white becomes 0.992
    for size in x.shape[2:]:  # the height, then the width
        source = torch.arange(299, device=x.device) * (size / 299)  # of each new pixel; no half pixel is added
        low = source.long()
        high = (low + 1).clamp(max=size - 1)  # the last pixel repeats
        x = x.transpose(2, 3)  # the side that is resized comes last
        x = torch.lerp(x[..., low], x[..., high], source - low)
    return (x - 128) / 128


# --- The metrics, as functions of features ---------------------------------------------------------------------------


def statistics(features):
    """Features (N, d) -> mean (d,), covariance (d, d) with the divisor N - 1: float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet (Wasserstein-2) distance, squared, of two Gaussians: mu (d,), sigma (d, d). -> float >= 0.

        |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                             (Heusel et al., arXiv 1706.08500)

    With S1 = A A^T and S2 = B B^T, the last trace is the sum of the singular values of A^T B: no matrix root is taken.
    Raises ValueError on shapes that differ and on NaN or infinity."""
    mu1, sigma1, mu2, sigma2 = (np.asarray_chkfinite(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        raise ValueError(f"shapes differ: {[a.shape for a in (mu1, sigma1, mu2, sigma2)]}")
    root_trace = linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace), 0.0)


def factor(sigma):
    """A (d, rank) with sigma = A A^T. With fewer samples than dimensions most eigenvalues are zero up to rounding;
    those are dropped, for a root would turn 1e-16 into 1e-8, two thousand times."""
    values, vectors = linalg.eigh(sigma)  # ValueError for NaN and infinity
    kept = values > len(sigma) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(logits_no_bias, group=5000):
    """exp(mean over images of KL(p(y|x) || p(y))), averaged over groups of images (Salimans et al., arXiv 1606.03498).
    logits_no_bias (N, classes), numpy or torch. -> float in [1, classes].
    PRIOR: ADM's evaluator takes logits without the last layer's bias, and p(y) within groups of 5,000."""
    scores = []
    for part in torch.as_tensor(logits_no_bias).split(group):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        scores.append(((p * log_p).sum(1).mean() - torch.xlogy(p.mean(0), p.mean(0)).sum()).exp())
    return torch.stack(scores).mean().item()


def precision_recall(data, gen, k=3, rows=1024):
    """Share of `gen` within the cloud of `data`, and of `data` within the cloud of `gen`. -> both in [0, 1].
    Features (N, d), (M, d). A cloud is the union of balls around its points; each reaches to the k-th nearest neighbour
    (Kynkaanniemi et al., arXiv 1904.06991). rows: points in one pass. Raises ValueError unless N, M > k."""
    data, gen = torch.as_tensor(data).float(), torch.as_tensor(gen).float()
    if min(len(data), len(gen)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} points, not {len(data)} and {len(gen)}")

    def covered(points, centres):
        # the reach of a centre: the distance to its k-th neighbour; the nearest of all is the centre itself
        reach = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(rows)])
        inside = [(torch.cdist(part, centres) <= reach).any(dim=1) for part in points.split(rows)]
        return torch.cat(inside).double().mean().item()

    return covered(gen, data), covered(data, gen)


# --- The papers' protocol: images against a reference ----------------------------------------------------------------


def read_npz(path):
    """The arrays of an npz file, {name: array}. BadInput: no such file, or none of numpy's. No code in it is run."""
    with blame(f"{path} can't be read as an npz of plain arrays", "name another file"):
        return dict(np.load(path, allow_pickle=False))


def open_images(path, size=None):
    """A sequence of images, uint8 (H, W, 3): a folder's, or those of an npz with arr_0 (N, H, W, 3).
    size: px, to which a folder's images are centre-cropped. BadInput: no images, too few, or of another kind."""
    if Path(path).is_dir():
        images = ImageFolder(path, size, pattern="**/*")
    else:
        images = read_npz(path).get("arr_0", np.zeros(0))
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise BadInput(f"{path} needs images in arr_0, uint8 (N, H, W, 3), and has {images.dtype} {images.shape}")
    if len(images) < 4:
        raise BadInput(f"{path} holds {len(images)} images: give at least 4 for precision, and thousands for FID")
    return images


def extract(net, images, *, resize, batch=32, label="images"):
    """Inception's features of N images: {"pool": (N, 2048), "spatial": (N, 2023), "logits_no_bias": (N, 1008)}."""
    found, size = [], len(images[0])
    with ThreadPoolExecutor(4) as pool:
        for start in progress(range(0, len(images), batch), label):
            part = list(pool.map(images.__getitem__, range(start, min(start + batch, len(images)))))
            if other := {image.shape[:2] for image in part} - {(size, size)}:
                raise BadInput(f"{label}: all have to be squares of one size, and near number {start} some are {other}")
            x = torch.from_numpy(np.stack(part)).to(net.fc.weight.device).permute(0, 3, 1, 2) / 255  # (B, 3, H, W)
            found.append({key: value.cpu() for key, value in net(x, resize=resize).items()})
    return {key: torch.cat([part[key] for part in found]).numpy() for key in ("pool", "spatial", "logits_no_bias")}


def score(images, reference, *, resize="tf1", device="cpu"):
    """One row: FID, sFID, IS, precision and recall of `images` against `reference`, each a folder or an npz.
    Of a reference npz, mu and sigma (and mu_s, sigma_s) are taken where it has them, as ADM's do; its images, arr_0,
    then serve precision and recall alone. The row says what was compared, and how near to the papers' FID-50k."""
    gen, of_base, notes = open_images(images), None, []
    known = {} if Path(reference).is_dir() else read_npz(reference)
    net = load_weights(lambda state: InceptionV3(), "inception").to(device)
    row = {"images": str(images), "n": len(gen), "reference": str(reference), "resize": resize,
           "inception": hashlib.sha256(weights_path("inception").read_bytes()).hexdigest()}  # fmt: skip
    try:
        of_base = extract(net, open_images(reference, size=len(gen[0])), resize=resize, label="reference")
    except BadInput as error:
        if "mu" not in known:
            raise
        notes.append(f"precision and recall are left out: {error}")
    of_gen = extract(net, gen, resize=resize)
    for name, feature, mu, sigma in (("FID", "pool", "mu", "sigma"), ("sFID", "spatial", "mu_s", "sigma_s")):
        if mu in known or "mu" not in known:  # pytorch-fid's files know nothing of sFID
            with blame(f"{reference}: {mu} and {sigma} don't fit Inception's features", "name another --reference"):
                theirs = (known[mu], known[sigma]) if "mu" in known else statistics(of_base[feature])
                row[name] = frechet_distance(*theirs, *statistics(of_gen[feature]))
    row["IS"] = inception_score(of_gen["logits_no_bias"])
    if of_base:
        row["precision"], row["recall"] = precision_recall(of_base["pool"], of_gen["pool"])
    if len(gen) < 50_000:
        notes.append(f"FID of {len(gen)} images does not compare with FID-50k: it falls as their number grows"
                     + ", and below 2,048, where the covariance is singular, shows little else" * (len(gen) < 2048))
    return row | {"notes": "; ".join(notes)}


# --- Small images, without a download --------------------------------------------------------------------------------
#
# OURS: a classifier of the run's own classes takes Inception's place. Its numbers compare only with those of the same
# classifier, so all rows of a table come from one.


def small_classifier(shape, classes):
    """Images (B, C, size, size) in [-1, 1] -> logits (B, classes), by a head on the body's features (B, 96), which all
    measures read. OURS: group norm and GELU. With batch norm and ReLU the same recipe was as accurate on glyphs, but it
    recognised 0.10 instead of 0.68 of glyphs blurred by (1 2 1): samples a little wrong would look all wrong."""
    first, layers = max(1, shape[1] // 16), []  # stride of the first layer: from 16 px on, sizes cost the same
    for c_in, c_out, kernel, stride in ((shape[0], 32, 2 * first + 1, first), (32, 64, 3, 2), (64, 96, 3, 2)):
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        layers += [conv, nn.GroupNorm(8, c_out), nn.GELU()]
    return chain(body=nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), head=nn.Linear(96, classes))


def train_classifier(path, draw, shape, classes, steps=400):
    """A `small_classifier`, trained or found in `path`, on batches of 128; of glyphs, no image is seen twice."""
    net = new_network(0, "classifier", partial(small_classifier, shape, classes))
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))

    def loss_of(generator):
        x, y = draw(128, generator)
        return F.cross_entropy(net(x), y), {}

    data.go_on(path, {"net": net, "optimizer": optimizer},
               lambda k: update(net, optimizer, loss_of, lr=learning_rate(k, steps, 3e-3), words=(0, "classifier", k)),
               steps=steps, config={"shape": shape})  # fmt: skip
    return net.eval().requires_grad_(False)


def power_spectrum(images):
    """Power of images (N, C, size, size) by whole cycles per image, over all directions: (size/2 + 1,) float64. That is
    |FFT|^2, mean over images and channels, sum over a ring's frequencies; the corners beyond Nyquist's are left out."""
    size = images.shape[-1]
    cycles = torch.fft.fftfreq(size, 1 / size)
    ring = (cycles[:, None].square() + cycles.square()).sqrt().round().long().flatten()
    power = sum(torch.fft.fft2(part.double()).abs().square().mean(1).sum(0) for part in images.split(1000)).flatten()
    return torch.bincount(ring, weights=power)[: size // 2 + 1] / len(images)


def high_power(spectrum, reference):
    """Power above half of Nyquist's frequency, over a reference's: below 1 is blurred, and above 1 may be noise."""
    first = (len(spectrum) - 1) // 2 + 1
    return (spectrum[first:].sum() / reference[first:].sum()).item()


class Judge:
    """Compares images with held-out ones: judge(images (N, C, size, size), labels (N,)) -> {measure: float}.
    frechet, precision, recall: in the classifier's features; a distance falls as N grows, so equal N compare.
    class_accuracy: share of images classified as the requested class. high_power: see there."""

    def __init__(self, classifier, held_out):
        self.classifier = classifier
        self.statistics, self.cloud, _, self.spectrum = self.look(held_out)

    def look(self, images):
        """Statistics of the features, the features of some images, logits of all, power spectrum."""
        features = torch.cat([self.classifier.body(part) for part in images.split(500)])
        some = torch.randperm(len(features), generator=rng(0, "cloud"))[:5000]  # the cost of a cloud is quadratic
        return statistics(features), features[some], self.classifier.head(features), power_spectrum(images)

    def __call__(self, images, labels):
        found, cloud, logits, spectrum = self.look(to_float(to_uint8(images)))  # as they would be saved
        precision, recall = precision_recall(self.cloud, cloud)
        return {"frechet": frechet_distance(*self.statistics, *found), "precision": precision, "recall": recall,
                "class_accuracy": (logits.argmax(1) == labels).double().mean().item(),
                "high_power": high_power(spectrum, self.spectrum)}  # fmt: skip


def small_data(config, source, count, seed):
    """For a judge: draw for the classifier, the images to compare with, and other data with its labels, for a row.
    Glyphs are endless, and no training reads these streams. Of a folder, the classifier learns from four images in
    five, and every fifth is compared with; the generator has seen them all."""
    if config["data"] == "glyphs":
        y, size = torch.arange(4 * count) % 10, source.shape[1]  # glyphs cost little: four for each that is judged
        other = glyphs(y[:count], rng(seed, "held out"), size)
        return source.draw, glyphs(y, rng(0, "reference"), size), other, y[:count]
    folder = ImageFolder(config["data_dir"], source.shape[1], upright=True)
    if len(folder) < 20:
        raise BadInput(f"{config['data_dir']} has {len(folder)} images: a fifth is compared with, so give at least 20")
    images, fifth = folder.read(range(len(folder))), torch.arange(len(folder)) % 5 == 4
    x, y = images[~fifth], folder.labels[~fifth]

    def draw(batch, generator):
        i = torch.randint(len(x), (batch,), generator=generator)
        return x[i], y[i]

    some = torch.randperm(len(x), generator=rng(seed, "held out"))[:count]
    return draw, images[fifth], x[some], y[some]


MEASURES = {"frechet": ("Frechet distance", "log"), "precision": ("precision", "linear"),
            "recall": ("recall", "linear"), "high_power": ("power of high frequencies / data's", "linear")}  # fmt: skip


def judge_run(out, count, seed, device, quick=False):
    """The table of a run on small images: a row for data, teacher, TD and every student that is there; the pictures."""
    teacher, config = load_net(out / "teacher.pt", "run meanflow_td.py with the same --data and --out first", device)
    source, _ = open_data(config["data"], config["data_dir"], size=config["shape"][1], device=device)
    students = {}  # one per name, seed and number of updates: budgets/ may repeat a finished one
    for pattern in ("meanflow.pt", "td.pt", "*-seed*.pt", "budgets/*.pt"):
        for path in sorted(out.glob(pattern)):
            student, made = load_net(path, "", device)
            students.setdefault((path.stem.split("-seed")[0], made["seed"], made["steps"]), (student, made))
    draw, held_out, other, other_y = small_data(config, source, count, seed)
    classifier = train_classifier(out / "classifier.pt", draw, source.shape, source.classes, 60 if quick else 400)
    judge, rows, pictures, spectra = Judge(classifier, held_out), [], {}, []
    eps = torch.randn(count, *source.shape, generator=rng(seed, "evaluation")).to(device)
    y = other_y[torch.arange(count) % len(other_y)].to(device)  # classes as frequent as in the data

    def add_row(what, images, labels, **about):
        rows.append({"what": what, "seed": 0, "nfe": 0, **about, **judge(images.cpu(), labels.cpu())})
        if what not in pictures:
            pictures[what] = images[:20].cpu()
            power = (power_spectrum(images.cpu()) / judge.spectrum).tolist()
            spectra.extend({"what": what, "cycles": n, "power": power[n]} for n in range(1, len(power)))  # not the mean

    def add_samples(what, sampler, **about):
        parts = zip(progress(eps.split(250), what), y.split(250))
        add_row(what, torch.cat([sampler(*part) for part in parts]), y, **about)

    add_row("data against data", other, other_y)
    for w in (1.0,) if quick else (1.0, 1.25, 1.5, 2.0):  # 1 is none
        teacher.w = w
        add_samples(f"teacher, Heun, w = {w}", partial(sample_ode, teacher, steps=25), nfe=50, w=w)
    for (name, seed, updates), (student, made) in students.items():
        for calls in range(1, made.get("student_steps", 1) + 1):
            add_samples(name + ", 2 calls" * (calls - 1), partial(sample, student, steps=calls), nfe=calls,
                        seed=seed, updates=updates)  # fmt: skip
    data.report(out / "results.json", rows, ("updates", "nfe"), [*MEASURES, "class_accuracy"])
    compare(rows)
    plot_variants(out / "curves.png", rows)
    data.plot_curves(out / "spectrum.png", spectra, "cycles", {"power": ("power, over data's", "linear")},
                     {what: dict(marker="o", ms=3) for what in pictures}, "Power by cycles per image")  # fmt: skip
    save_grid(out / "grid.png", torch.cat(list(pictures.values())), columns=20)
    print(f"{count:,} images a row, compared with {len(held_out):,}. In {out}: results.json, curves.png, spectrum.png, "
          f"and grid.png, a row for each of: {'; '.join(pictures)}.")  # fmt: skip


def compare(rows):
    """Print which variants the seeds tell apart, at each number of updates: p by Welch's test, for each measure."""
    joined = {(row["what"], row.get("updates")): row for row in data.over_seeds(rows, ["updates"], MEASURES)}
    for pair in (("hd", "hd-no-td"), ("td-dmd", "dmd-no-td"), ("hd", "td-mean"), ("hd", "td-dmd")):
        for updates in sorted(n for what, n in joined if what == pair[0]):
            one, other = (joined.get((what, updates), {"seeds": 0}) for what in pair)
            if min(one["seeds"], other["seeds"]) > 1:  # a spread takes two seeds
                sides = {key: (*one[key], one["seeds"], *other[key], other["seeds"]) for key in MEASURES}
                found = (f"{key} {stats.ttest_ind_from_stats(*side, equal_var=False).pvalue:.3f}"
                         for key, side in sides.items())  # fmt: skip
                print(f"{' against '.join(pair)}, {updates} updates, p by Welch's test: {', '.join(found)}")


def plot_variants(path, rows):
    """curves.png: the variants of --ablation through stage 2; lines: the teacher at its best guidance, stage 1."""
    best = min((row for row in rows if row["nfe"] == 50), key=lambda row: row["frechet"])["what"]
    curves, stage_1 = {best: dict(color="black")}, {"td": ":", "meanflow": "-."}
    for row in rows:
        if (what := row["what"]) in stage_1:
            curves[what] = dict(color="black", ls=stage_1[what], label=f"{what}, {row['updates']:,} updates of stage 1")
    for what, (init, pooling) in VARIANTS.items():
        curves[what] = dict(color=COLOURS[pooling], ls="-" if init == "td" else "--", marker="o", ms=4,
                            label=f"{what}: from {init}, discriminator {pooling}")  # fmt: skip
    data.plot_curves(path, rows, "updates", MEASURES, curves, "Students of one call against the updates of stage 2. "
                     "The earlier marks of a curve are the same trainings on their way")  # fmt: skip


# --- Samples as PNG files, and what one costs ------------------------------------------------------------------------

# Steps, and how to call it. PRIOR: 250 steps of DiT's DDPM and SiT's SDE are behind their FIDs. Heun: two calls a step
SAMPLERS = {
    "student": (1, lambda net, eps, y, steps, generator: sample(net, eps, y, steps)),
    "heun": (125, lambda net, eps, y, steps, generator: sample_ode(net, eps, y, steps)),
    "sde": (250, lambda net, eps, y, steps, generator: sample_sde(net, eps, y, steps, generator=generator)),
    "ddpm": (250, lambda net, eps, y, steps, generator: net.sample_ddpm(eps, y, steps, generator=generator)),
}


def write_samples(*, out, count, checkpoint, teacher, vae, sampler, steps, classes, w, batch, seed, device, **others):
    """Images 0 .. count - 1 to out/<i>.png, or those that are missing, of a finished stage or a published teacher. The
    arguments are the flags of main. Random numbers belong to a batch of images, so a batch is made whole or not at all.
    out/about.json says how they are made. BadInput: `out` holds others, or the flags do not fit."""
    if checkpoint:
        net, config = load_net(checkpoint, "name a finished stage, as runs/glyphs/hd-seed0.pt", device)
    else:
        net, config = load_teacher(teacher).to(device), {"data": "imagenet"}
    decoder = load_vae(vae).to(device) if config["data"] == "imagenet" else None
    own = "student" if net.net.two_times else {SiTTeacher: "sde", DiTTeacher: "ddpm"}.get(type(net), "heun")
    sampler, known, sizes = sampler or own, net.net.num_classes, net.net.config
    if not all(0 <= y < known for y in classes or ()):
        raise BadInput(f"--classes {classes}: the classes are 0 .. {known - 1}")
    if sampler != own and (sampler in ("student", "ddpm") or own == "student"):
        raise BadInput(f"--sampler {sampler} is not for this network: leave it out, or take {own}")
    usual, draw = SAMPLERS[sampler]
    steps, least = usual if steps is None else steps, 1 + (sampler in ("sde", "ddpm"))
    if steps < least:
        raise BadInput(f"--steps {steps}: {sampler} takes at least {least}")
    net.w = 1.0 if own == "student" else w
    note, shape = out / "about.json", (batch, sizes["in_channels"], sizes["input_size"], sizes["input_size"])
    about = dict(of=str(checkpoint or teacher), vae=str(vae), sampler=sampler, steps=steps, classes=classes,
                 w=net.w, seed=seed, batch=batch)  # fmt: skip
    if note.exists() or list(out.glob("*.png")):
        check_made(out, json.loads(note.read_text()) if note.exists() else {"of": "unknown images"}, about)
    data.write_json(note, about)
    for start in progress(range(0, count, batch), f"batches of {batch}"):
        paths = [out / f"{i:06d}.png" for i in range(start, min(start + batch, count))]
        if all(path.exists() for path in paths):
            continue
        generator = rng(seed, "samples", start)
        y = torch.randint(known, (batch,), generator=generator)
        if classes:
            y = torch.tensor(classes)[torch.arange(start, start + batch) % len(classes)]
        images = draw(net, torch.randn(shape, generator=generator).to(device), y.to(device), steps, generator)
        if decoder:
            images = decoder.decode(images / decoder.scale)
        for path, image in zip(paths, images):
            save_grid(path, image[None], columns=1)
    print(f"In {out}: {count:,} images. Next: python evaluate.py --images {out} --reference ...")


def flops_table():
    """GMACs (a MAC is 2 FLOPs) for one 256 px ImageNet image, by torch's counter: a dict of rows.
    PAPER: one step takes 69.7 times fewer FLOPs than the teacher's 250. That is what XL/2 and the decoder of SD's VAE
    give if the decoder is counted on both sides and the teacher's second pass for guidance is not."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():  # shapes, and no memory
        xl_2, z = DiT(32, 2, 4, hidden_size=1152, depth=28, num_heads=16, learn_sigma=True), torch.empty(1, 4, 32, 32)
        xl_2(z, t=torch.empty(1), y=torch.zeros(1, dtype=torch.int64))
        forward = counter.get_total_flops() / 2e9
        AutoencoderKL().decode(z)
        student = counter.get_total_flops() / 2e9  # one step and the decoder
    decoder = student - forward
    return {
        "GMAC: XL/2, one forward pass (118.64 by others' count)": forward,
        "GMAC: SD-VAE decoder": decoder,
        "250 steps / 1 step, each with decoder, no guidance counted (paper: 69.7)": (250 * forward + decoder) / student,
        "250 steps / 1 step, each with decoder, guidance counted": (500 * forward + decoder) / student,
    }  # fmt: skip


# --- The command line ------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=("glyphs", "folder"), help="the table of a run on small images")
    add("--images", help="what to score: a folder of square images of one size, or an npz (arr_0: uint8 NHWC)")
    add("--reference", help="compared with what: an npz of ADM or pytorch-fid, or a folder, centre-cropped")
    add("--save-npz", type=Path, help="write --images into an npz for ADM's own evaluator")
    add("--resize", choices=("tf1", "torch"), default="tf1", help="tf1: ADM's, torch: pytorch-fid's (%(default)s)")
    add("--sample", type=int, metavar="N", dest="count", help="write N images of --checkpoint, else of --teacher")
    add("--checkpoint", type=Path, help="a finished stage, as runs/glyphs/hd-seed0.pt")
    add("--teacher", default="SiT-XL/2", help="a published teacher, or a file (default: %(default)s)")
    add("--vae", default="vae-ema", help="of latents: vae-ema, vae-mse or a file (default: %(default)s)")
    add("--sampler", choices=SAMPLERS, help="of --sample (default: the network's own)")
    add("--steps", type=int, help="of the sampler (default: student 1, heun 125, sde and ddpm 250)")
    add("--classes", type=int, nargs="+", help="of --sample: classes to take in turn (default: by lot)")
    add("--w", type=float, default=1.5, help="a teacher's guidance (default: %(default)s)")
    add("--batch", type=int, default=32, help="of --sample: images in one pass (default: %(default)s)")
    add("--seed", type=int, default=0, help="of labels and noise (default: %(default)s)")
    add("--out", type=Path, help="folder (default: of --data, runs/<data>; of --sample, runs/samples)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--flops", action="store_true", help="what one ImageNet image costs teacher and student")
    add("--quick", action="store_true", help="of --data: the run that --quick has made, and fewer images")
    args = parser.parse_args(argv)
    device = join(args.device)
    if args.flops:
        for name, value in flops_table().items():
            print(f"{value:12,.2f}  {name}")
    elif args.data:
        out = args.out or Path("runs", args.data + "-quick" * args.quick)
        judge_run(out, 200 if args.quick else 5000, args.seed, device, args.quick)
    elif args.count:
        write_samples(**vars(args) | {"out": args.out or Path("runs/samples"), "device": device})
    elif args.images and (args.reference or args.save_npz):
        if args.save_npz:
            np.savez(args.save_npz, arr_0=np.stack(list(progress(open_images(args.images), "reading"))))
            print(f"{args.save_npz}: the images of {args.images}, not resized.")
        if args.reference:
            for name, value in score(args.images, args.reference, resize=args.resize, device=device).items():
                print(f"{name:>12}  {value:.4f}" if isinstance(value, float) else f"{name:>12}  {value}")
    else:
        parser.error("give --data, or --sample, or --images with --reference or --save-npz, or --flops")


if __name__ == "__main__":
    main()

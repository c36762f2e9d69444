"""Scores images with the metrics of the papers: FID, sFID, Inception Score, precision and recall.

The idea. A classifier, InceptionV3 of 2015, turns each image into 2048 numbers. Two sets of images are alike if the
clouds of these numbers are alike. FID fits a Gaussian to either cloud and takes the square of Frechet's distance of the
two (all call that the distance),

    FID = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)),

sFID does so with 2023 numbers that keep the place in the image, precision is the share of generated images that lie
within the data's cloud, recall the share of data within the generated cloud, and the Inception Score asks whether
single images are surely of one class while all of them together are of all classes. The same samples get another FID
from another evaluator: the resize to 299 px alone moves it by 0.1, the number of images by much more. So every number
here carries its fingerprint: what was compared with what, and by which rules. For glyphs of 16 or 32 px, which would
have to be blown up to 299, GlyphJudge asks the same of a small classifier that is trained in half a minute.

    python evaluate.py --data glyphs                                             # the table of a run on glyphs
    python evaluate.py --sample 50000 --checkpoint runs/imagenet256-xl2 --out samples            # images, and then
    python evaluate.py --images samples/images --reference VIRTUAL_imagenet256_labeled.npz       # the papers' protocol
    python evaluate.py --images samples/images --save-npz samples.npz            # for ADM's own evaluator
    python evaluate.py --flops                                                   # what one image costs

Run the same command again to go on where a stopped evaluation was. Scores are added to OUT/results.json; the table of
a run on glyphs replaces the one in its folder; that of another noise, --seed N, is in results-noiseN.json.
One core of an AMD EPYC: 14.7 images/s, an hour for 50,000; 1.1 GB of memory. On a GPU it was not timed.
DIFFERS: the paper (arXiv 2511.08930) does not name its evaluator; the protocol here is ADM's (arXiv 2105.05233), which
DiT and SiT used: 50,000 samples with random labels against statistics of the whole training set.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
import hashlib
import itertools
import json
from pathlib import Path
import re
import shutil
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import models
from data import BadInput, check_device, in_turn, own_share, sentences, whole_number, world
from meanflow_td import (ImageRun, add_run_arguments, autocast, check_finite, learning_rate, load_teacher, sample,
                         sample_euler, sample_ode, saved_run)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# InceptionV3 (Szegedy et al., arXiv 1512.00567), in the variant that TensorFlow published on 2015-12-05 and that all
# FIDs since have used. It departs from later Inceptions in three places: average pools inside the blocks do not count
# the padding, the last block pools by maximum, and there are 1008 classes. Module names are those of the weight file.
# ---------------------------------------------------------------------------------------------------------------------

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA = "6726825d"  # the first digits of the file's sha256, which its name ends in
INCEPTION = data.Published(INCEPTION_URL.rsplit("/", 1)[1], INCEPTION_URL, INCEPTION_SHA)
POOL_DIM, SPATIAL_DIM, CLASSES = 2048, 2023, 1008


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm by the stored statistics (never the batch's, in any mode), ReLU.

    At stride 1 zeros keep the image's size; at stride 2, and with pad=False, the border is lost."""

    def __init__(self, c_in, c_out, kernel, stride=1, pad=True):
        super().__init__()
        padding = "same" if pad and stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):  # (B, c_in, H, W) -> (B, c_out, H', W')
        # gain (W x - mean) + bias = (gain W) x + (bias - gain mean): the norm goes into the weights, a pass less over x
        gain = self.bn.weight * torch.rsqrt(self.bn.running_var + self.bn.eps)
        weight, bias = self.conv.weight * gain[:, None, None, None], self.bn.bias - gain * self.bn.running_mean
        return F.relu_(F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding))


def average_pool(x):
    """3 x 3 average with stride 1 over the pixels that exist: at the border, over 4 or 6 of them."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """3 x 3 maximum with stride 1."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class Block35(nn.Module):
    """35 x 35 pixels: 1x1, 5x5, twice 3x3 and a pool, side by side. (B, c_in, 35, 35) -> (B, 224 + c_pool, 35, 35)."""

    def __init__(self, c_in, c_pool):
        super().__init__()
        self.branch1x1 = ConvNorm(c_in, 64, 1)
        self.branch5x5_1 = ConvNorm(c_in, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5)
        self.branch3x3dbl_1 = ConvNorm(c_in, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3)
        self.branch_pool = ConvNorm(c_in, c_pool, 1)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, twice, self.branch_pool(average_pool(x))], 1)


class Shrink35(nn.Module):
    """35 to 17 pixels: (B, 288, 35, 35) -> (B, 768, 17, 17)."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = ConvNorm(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(288, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x):
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice, F.max_pool2d(x, 3, stride=2)], 1)


class Block17(nn.Module):
    """17 x 17 pixels, 7x7 filters split into 1x7 and 7x1, c channels inside. (B, 768, 17, 17) -> the same shape."""

    def __init__(self, c):
        super().__init__()
        self.branch1x1 = ConvNorm(768, 192, 1)
        self.branch7x7_1 = ConvNorm(768, c, 1)
        self.branch7x7_2 = ConvNorm(c, c, (1, 7))
        self.branch7x7_3 = ConvNorm(c, 192, (7, 1))
        self.branch7x7dbl_1 = ConvNorm(768, c, 1)
        self.branch7x7dbl_2 = ConvNorm(c, c, (7, 1))
        self.branch7x7dbl_3 = ConvNorm(c, c, (1, 7))
        self.branch7x7dbl_4 = ConvNorm(c, c, (7, 1))
        self.branch7x7dbl_5 = ConvNorm(c, 192, (1, 7))
        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(average_pool(x))], 1)


class Shrink17(nn.Module):
    """17 to 8 pixels: (B, 768, 17, 17) -> (B, 1280, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(768, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x):
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], 1)


class Block8(nn.Module):
    """8 x 8 pixels, branches that fan out: (B, c_in, 8, 8) -> (B, 2048, 8, 8). `pool` is average_pool or max_pool."""

    def __init__(self, c_in, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvNorm(c_in, 320, 1)
        self.branch3x3_1 = ConvNorm(c_in, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvNorm(c_in, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1))
        self.branch_pool = ConvNorm(c_in, 192, 1)

    def forward(self, x):
        three, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        three = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        twice = [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *three, *twice, self.branch_pool(self.pool(x))], 1)


class InceptionV3(nn.Module):
    """The network behind FID. Call: images (B, 3, H, W) in [0, 1] -> dict of float32 features:

    pool (B, 2048)            for FID, precision and recall
    spatial (B, 2023)         for sFID: 17 x 17 x 7, in (H, W, C) order
    logits (B, 1008)          and logits_no_bias, which the Inception Score takes (PRIOR: ADM's evaluator)

    Raises ValueError if images are not (B, 3, H, W), hold NaN, or leave [0, 1]."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, pad=False)
        self.Mixed_5b = Block35(192, 32)
        self.Mixed_5c = Block35(256, 64)
        self.Mixed_5d = Block35(288, 64)
        self.Mixed_6a = Shrink35()
        self.Mixed_6b = Block17(128)
        self.Mixed_6c = Block17(160)
        self.Mixed_6d = Block17(160)
        self.Mixed_6e = Block17(192)
        self.Mixed_7a = Shrink17()
        self.Mixed_7b = Block8(1280, average_pool)
        self.Mixed_7c = Block8(2048, max_pool)
        self.fc = nn.Linear(POOL_DIM, CLASSES)
        self.to(memory_format=torch.channels_last)  # with the folded norm, 1.9 times as fast as plain eager

    @torch.no_grad()
    def forward(self, images, resize="tf1"):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Inception takes images (B, 3, H, W), not {tuple(images.shape)}")
        if not (images.amin() >= 0 and images.amax() <= 1):  # NaN fails both comparisons
            raise ValueError("Inception takes finite images in [0, 1]")
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
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, 299, 299) in about [-1, 1], by the rule of one of two evaluators."""
    if resize == "tf1":  # PRIOR: the TensorFlow graph that ADM's evaluator runs; white becomes 0.992
        return (resize_tf1(255 * images) - 128) / 128
    if resize == "torch":  # PRIOR: pytorch-fid; half a pixel apart from the above, white becomes 1
        return 2 * F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False) - 1
    raise ValueError(f'resize is "tf1" or "torch", not {resize!r}')


def resize_tf1(x):
    """Bilinear (B, C, H, W) -> (B, C, 299, 299) as TensorFlow 1 did it: source = dest * H / 299, no half pixel."""
    for dim in (2, 3):
        size = x.shape[dim]
        source = torch.arange(299, device=x.device) * (size / 299)
        low = source.long()
        part = (source - low).to(x.dtype).reshape([-1 if d == dim else 1 for d in range(4)])
        high = (low + 1).clamp(max=size - 1)  # the last pixel repeats
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), part)
    return x


def load_inception(path=None):
    """-> InceptionV3 with weights from `path`, or from torch.hub's cache, filled from INCEPTION_URL on first use;
    and the file's sha256. Raises BadInput: not to be had, damaged, or another network's.

    A file whose name ends in the digits of a hash must have that hash. Other names are taken as they are (a test's
    own weights, say), and `notes` then says that their numbers compare with nobody's."""
    path = data.fetch(INCEPTION, "--inception-weights") if path is None else Path(path)
    sha = data.sha256_file(path)
    claimed = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    if claimed and not sha.startswith(claimed[1]):
        raise BadInput(f"{path} is damaged or another file: its sha256 is {sha}, its name says {claimed[1]}...")
    net = InceptionV3()
    try:
        net.load_state_dict(models.read_torch_file(path))
    except Exception as error:  # torch has no one type for "this file is something else"
        reason = data.in_short(error)
        raise BadInput(f"{path} does not hold the weights of FID's InceptionV3 ({reason}).") from error
    return net.eval(), sha


# ---------------------------------------------------------------------------------------------------------------------
# The metrics, as functions of features
# ---------------------------------------------------------------------------------------------------------------------


class Moments(nn.Module):
    """Mean and covariance of a stream of vectors, in float64. Memory is d^2 numbers, however long the stream."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("scatter", torch.zeros(dim, dim, dtype=torch.float64))  # sum of (x - mean)(x - mean)^T

    def update(self, x):
        """Take in x (B, d)."""
        # PRIOR: Chan, Golub & LeVeque, 1979. Summing x x^T itself would cancel where the mean is large.
        x, n = x.to(self.mean), len(x)
        step = x.mean(0) - self.mean
        moved = step * (self.n * n / (self.n + n)).sqrt()  # what the mean's own move adds, as one more vector
        rows = torch.cat([x - x.mean(0), moved[None]])
        self.scatter.addmm_(rows.T, rows)
        self.n += n
        self.mean += step * (n / self.n)

    def finish(self):
        """-> mean (d,), covariance (d, d) with the divisor n - 1, as numpy float64."""
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet (Wasserstein-2) distance, squared, of two Gaussians: mu (d,), sigma (d, d). -> float >= 0.

        |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                             (Heusel et al., arXiv 1706.08500)

    The trace needs no matrix root. With S1 = A A^T, S2 = B B^T, it is the sum of the singular values of A^T B, and the
    sum of the roots of the eigenvalues of A^T S2 A. Raises ValueError on shapes that differ and on NaN or infinity."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        raise ValueError(f"shapes differ: {[tuple(a.shape) for a in (mu1, sigma1, mu2, sigma2)]}")
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("means and covariances must be finite")
    chol1, chol2 = positive_cholesky(sigma1), positive_cholesky(sigma2)
    if chol1 is not None and chol2 is not None:
        root_trace = torch.linalg.eigvalsh(chol1.T @ sigma2 @ chol1).clamp_min(0).sqrt().sum()
    else:
        # Fewer samples than dimensions. The root would turn rounding errors of 1e-16 at the many zero eigenvalues into
        # 1e-8 each; so drop those directions, and take singular values, which are roots already.
        root_trace = torch.linalg.svdvals(spectral_factor(sigma1).T @ spectral_factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return max(distance.item(), 0.0)  # never below zero but by rounding


def positive_cholesky(sigma):
    """L (d, d) with sigma = L L^T, or None where sigma is singular as far as float64 can tell."""
    factor, failed = torch.linalg.cholesky_ex(sigma)
    pivots = factor.diagonal().square()
    singular = failed or pivots.min() <= len(sigma) * torch.finfo(sigma.dtype).eps * pivots.max()
    return None if singular else factor


def spectral_factor(sigma):
    """A (d, rank) with sigma = A A^T, for a positive semi-definite sigma."""
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > len(sigma) * torch.finfo(sigma.dtype).eps * values.max()
    return vectors[:, kept] * values[kept].sqrt()


def inception_score(logits_no_bias, group=5000):
    """exp(mean over images of KL(p(y|x) || p(y))), averaged over groups of images (Salimans et al., arXiv 1606.03498).

    logits_no_bias (N, classes), numpy or torch. -> float in [1, classes].
    PRIOR: ADM's evaluator takes logits without the last layer's bias, and p(y) within groups of 5,000."""
    scores = []
    for start in range(0, len(logits_no_bias), group):
        log_p = torch.as_tensor(logits_no_bias[start : start + group]).double().log_softmax(1)
        p = log_p.exp()
        scores.append(((p * log_p).sum(1).mean() - torch.xlogy(p.mean(0), p.mean(0)).sum()).exp())
    return torch.stack(scores).mean().item()


def precision_recall(data, gen, k=3, device="cpu", rows=1024):
    """Share of `gen` within the cloud of `data`, and of `data` within the cloud of `gen`. -> both in [0, 1].

    Features (N, d) and (M, d), numpy or torch, float32 or float64. A cloud is the union of balls, one around each of
    its points, that reach to the point's k-th nearest neighbour (Kynkaanniemi et al., arXiv 1904.06991). Works on
    `rows` points at a time, with rows x max(N, M) distances in memory. Raises ValueError unless N, M > k."""
    data, gen = (torch.as_tensor(np.asarray(a)).to(device) for a in (data, gen))
    if min(len(data), len(gen)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} points, not {len(data)} and {len(gen)}")
    centre = data.mean(0)
    data, gen = data - centre, gen - centre  # distances stay; |a|^2 + |b|^2 - 2ab cancels less
    reach_data, reach_gen = neighbour_distance(data, k, rows), neighbour_distance(gen, k, rows)
    precise, recalled = torch.zeros(len(gen), dtype=torch.bool, device=device), []
    for start in range(0, len(data), rows):
        d = squared_distance(data[start : start + rows], gen)  # (rows, M)
        precise |= (d <= reach_data[start : start + rows, None]).any(0)
        recalled.append((d <= reach_gen).any(1))
    return precise.double().mean().item(), torch.cat(recalled).double().mean().item()


def squared_distance(a, b):
    """|a_i - b_j|^2 for a (N, d), b (M, d) -> (N, M), up to rounding."""
    return torch.addmm(b.square().sum(1)[None], a, b.T, alpha=-2).add_(a.square().sum(1)[:, None])


def neighbour_distance(points, k, rows):
    """Squared distance of each point (N, d) to its k-th nearest neighbour, itself not counted. -> (N,)"""
    reach = []
    for start in range(0, len(points), rows):
        d = squared_distance(points[start : start + rows], points)
        d.diagonal(start).fill_(float("inf"))
        reach.append(d.topk(k, largest=False).values[:, -1])
    return torch.cat(reach)


# ---------------------------------------------------------------------------------------------------------------------
# From images to features: in batches, with a state on disk from which a stopped run goes on
# ---------------------------------------------------------------------------------------------------------------------

SAVE_SECONDS = 60  # work that a kill may cost


def extract(net, source, folder, *, resize, batch=32, keep=(), device="cpu", title="images"):
    """Run all images of a source through the network, or the rest of them if `folder` holds an earlier state.

    keep: ascending indices of the images whose own features are kept, as precision, recall and Inception Score need
    them. -> dict: pool, spatial (Moments), pool_rows (len(keep), 2048) and logit_rows (len(keep), 1008), float32 and
    memory-mapped, pixels (sha256 over all images in turn), rate (images per second; None if nothing was left to do).
    A stopped run and an unbroken one give the same bits: batches begin at multiples of `batch` in both."""
    n, keep, state_file = len(source), np.asarray(keep, dtype=np.int64), folder / "state.pt"
    moments = nn.ModuleDict({"pool": Moments(POOL_DIM), "spatial": Moments(SPATIAL_DIM)})

    def open_kept(mode):
        return {name: np.lib.format.open_memmap(folder / f"{name}.npy", mode, np.float32, (len(keep), dim))
                for name, dim in (("pool", POOL_DIM), ("logits_no_bias", CLASSES))}  # fmt: skip

    def kept_sha256():  # of what was kept of the images that are done
        filled = np.searchsorted(keep, state["done"])
        return [hashlib.sha256(np.ascontiguousarray(rows[:filled]).data).hexdigest() for rows in kept.values()]

    folder.mkdir(parents=True, exist_ok=True)
    state = None
    if state_file.exists():
        try:
            state, kept = data.read_checkpoint(state_file), open_kept("r+")
            if state["kept"] != kept_sha256():
                raise ValueError("the features beside it are not those that it speaks of")
            moments.load_state_dict(state["moments"])
        except Exception as error:  # torch and numpy have no one type for "this file is damaged"
            data.set_aside(state_file, error)
            state, moments = None, nn.ModuleDict({"pool": Moments(POOL_DIM), "spatial": Moments(SPATIAL_DIM)})
    if state is None:
        state, kept = {"done": 0, "pixels": ""}, open_kept("w+")
    moments.to(device)

    def save():
        for rows in kept.values():
            rows.flush()  # before the state, which vouches for them
        state.update(moments=moments.state_dict(), kept=kept_sha256())
        data.write_checkpoint(state_file, state)

    first, begun, saved = state["done"], time.monotonic(), time.monotonic()
    spans = [range(start, min(start + batch, n)) for start in range(first, n, batch)]
    bar = tqdm(total=n, initial=first, unit=" images", desc=title, disable=not sys.stderr.isatty())
    with ThreadPoolExecutor(1) as reader, bar, data.Patience():
        ahead = reader.submit(source.images, spans[0]) if spans else None
        for span, following in zip(spans, [*spans[1:], None]):
            images, ahead = ahead.result(), reader.submit(source.images, following) if following else None
            for image in images:
                state["pixels"] = hashlib.sha256(state["pixels"].encode() + image.tobytes()).hexdigest()
            x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) / 255  # (B, 3, H, W)
            features = net(x, resize=resize)
            for name, part in moments.items():
                part.update(features[name])
            a, b = np.searchsorted(keep, [span.start, span.stop])
            for name, rows in kept.items():
                rows[a:b] = features[name].cpu().numpy()[keep[a:b] - span.start]
            state["done"] = span.stop
            bar.update(len(span))
            if time.monotonic() - saved > SAVE_SECONDS or span.stop == n or data.Patience.asked:
                save()
                saved = time.monotonic()
                if bar.disable:
                    print(f"{title}: {span.stop} of {n}, {(span.stop - first) / (saved - begun):.1f} images/s")
            data.Patience.look()
    rate = (n - first) / (time.monotonic() - begun) if spans else None
    rows = {"pool_rows": kept["pool"], "logit_rows": kept["logits_no_bias"]}
    return {**moments, **rows, "pixels": state["pixels"], "rate": rate}


def cached_features(net, weights_sha, source, keep, title, args):
    """`extract`, with its state in a folder of OUT/cache that belongs to these images, weights and rules alone.
    -> features, folder. Bad input leaves no such folder behind."""
    key = json.dumps([source.identity(), len(source), len(keep), weights_sha, args.resize, args.batch,
                      torch.__version__, args.device])  # fmt: skip
    folder = args.out / "cache" / hashlib.sha256(key.encode()).hexdigest()[:16]
    options = {"resize": args.resize, "batch": args.batch, "device": args.device}
    folder.mkdir(parents=True, exist_ok=True)
    with data.alone(folder):
        try:
            return extract(net, source, folder, keep=keep, title=title, **options), folder
        except BadInput:
            shutil.rmtree(folder, ignore_errors=True)
            raise


# ---------------------------------------------------------------------------------------------------------------------
# What is compared with what
# ---------------------------------------------------------------------------------------------------------------------

FULL_FID = 50_000  # images that the papers' FIDs are of
REFERENCE_ROWS = 10_000  # PRIOR: ADM's npz holds so many images for precision and recall
SIDECAR = "fingerprint.json"
SAMPLE_FIELDS = ("checkpoint", "teacher", "labels", "uint8", "vae", "vae_scale", "precision", "sampler", "steps",
                 "guidance", "seed", "nfe")  # fmt: skip


class Reference(NamedTuple):
    """What images are compared with. Statistics that are not in `stats` are computed from the images of `source`."""

    name: str
    stats: dict  # {"pool": (mu, sigma), "spatial": (mu, sigma)}, the first of them, or none
    source: object  # of images, as in data.py; None if there are none
    sha: str | None  # sha256 of the file; None: there is no one file


def open_images(path):
    """A folder of images of one size, or an npz with `arr_0`. BadInput if it is neither."""
    return data.ImageFolder(path) if Path(path).is_dir() else data.NpzImages(path)


def open_reference(text, size, glyphs):
    """`glyphs`, a run on glyphs or on a folder, a folder of images, or an npz. Images are taken at `size` px: folders
    are centre-cropped to it, and of glyphs so many are drawn as `glyphs` says. Raises BadInput that names the file."""
    path, settings = Path(text), {"data": text}
    if (path / "config.json").is_file():
        config = data.read_json(path / "config.json")
        settings = config.get("data") if isinstance(config, dict) else None
        if not isinstance(settings, dict) or settings.get("data") != "glyphs" and not settings.get("data_dir"):
            raise BadInput(f"{path / 'config.json'} is not the configuration of a run on glyphs or on a folder.")
        if settings.get("size") != size:
            raise BadInput(f"{path} is a run of {settings.get('size')} px images, but those to score have {size} px.")
        path = Path(settings.get("data_dir", ""))
    if settings["data"] == "glyphs":
        source = data.Glyphs(size, held_out=True, length=glyphs)
        return Reference(f"glyphs, {size} px, held-out stream", {}, source, None)
    if path.is_dir():
        return Reference(f"{path}, centre-cropped to {size} px", {}, data.ImageFolder(path, size=size), None)
    named = {"pool": ("mu", "sigma", POOL_DIM), "spatial": ("mu_s", "sigma_s", SPATIAL_DIM)}
    stats, source = data.read_statistics(path, named)
    if "pool" not in stats and not source:
        raise BadInput(f"{path} holds neither mu and sigma, nor images in arr_0: it is no reference.")
    return Reference(str(path), stats, source, data.sha256_file(path))


def read_sidecar(images):
    """What fingerprint.json beside the images says of their making: a dict with all SAMPLE_FIELDS."""
    path = Path(images).resolve().parent / SIDECAR
    if not path.exists():
        return dict.fromkeys(SAMPLE_FIELDS, f"unknown (images came without a {SIDECAR})")
    sidecar = data.read_json(path)
    if not isinstance(sidecar, dict):
        raise BadInput(f"{path} does not say how the images beside it were made.")
    return {field: sidecar.get(field, f"unknown (not in {SIDECAR})") for field in SAMPLE_FIELDS}


def refuse_few(name, source, allow_small):
    """BadInput if a source has too few images for a covariance of Inception's features."""
    if len(source) < (2 if allow_small else POOL_DIM):
        raise BadInput(
            f"{name} has {len(source)} images: the covariance of 2,048 features is singular with fewer than 2,048, "
            "and FID then tells their number more than their look (--allow-small overrides, down to 2)."
        )


def read_results(path):
    """The rows of a results.json; none if it is not there. BadInput if it holds something else."""
    rows = data.read_json(path) if path.exists() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path} is not a list of results.")
    return rows


def evaluate(args):
    """Compare args.images with args.reference, and add the row of metrics to OUT/results.json. -> the row."""
    results = args.out / "results.json"
    read_results(results)  # refused before the work
    source, sample = open_images(args.images), read_sidecar(args.images)
    reference = open_reference(args.reference, source.size, args.glyphs)
    refuse_few(args.images, source, args.allow_small)
    if "pool" not in reference.stats:
        refuse_few(args.reference, reference.source, args.allow_small)
    net, weights_sha = load_inception(args.inception_weights)
    net.to(args.device)

    gen, folder = cached_features(net, weights_sha, source, np.arange(len(source)), "images", args)
    score, stats, sha = {}, reference.stats, reference.sha
    if reference.source:
        count = len(reference.source)
        keep = np.unique(np.linspace(0, count - 1, min(count, REFERENCE_ROWS)).astype(np.int64))
        base, _ = cached_features(net, weights_sha, reference.source, keep, "reference", args)
        if "pool" not in stats:
            stats = {name: base[name].finish() for name in ("pool", "spatial")}
        sha = sha or base["pixels"]
    label = "50k" if len(source) == FULL_FID else len(source)
    for name, feature in (("FID", "pool"), ("sFID", "spatial")):
        if feature in stats:
            score[f"{name}-{label}"] = frechet_distance(*stats[feature], *gen[feature].finish())
    score["IS"] = inception_score(gen["logit_rows"])
    if reference.source and min(len(source), len(keep)) > 3:
        score["precision"], score["recall"] = precision_recall(base["pool_rows"], gen["pool_rows"], device=args.device)

    fingerprint = {
        "images": str(args.images), "n": len(source), "size": f"{source.size} px", "pixels sha256": gen["pixels"],
        "reference": reference.name, "reference sha256": sha, "inception sha256": weights_sha, "resize": args.resize,
        "evaluator": f"float32, torch {torch.__version__}, {args.device}", **sample,
        "notes": notes(source, label, reference, weights_sha),
    }  # fmt: skip
    row = {"run": str(args.images), "seed": sample["seed"], "nfe": sample["nfe"], "metrics": score}
    row |= {"images_per_second": gen["rate"], "fingerprint": fingerprint}
    # read only now: meanwhile another process may have scored other images
    rows = [r for r in read_results(results) if r.get("fingerprint") != fingerprint] + [row]
    data.write_json(results, rows)
    shutil.rmtree(folder)  # the reference's features stay: other images will be compared with them
    return row


def notes(source, label, reference, weights_sha):
    """Sentences on what the metrics are of, and with what they do not compare."""
    said = []
    if len(source) < FULL_FID:
        said.append(f"FID-{label}, not comparable with FID-50k: FID falls as the number of images grows.")
    if not weights_sha.startswith(INCEPTION_SHA):
        said.append(f"Inception weights {weights_sha[:8]} are not the published {INCEPTION_SHA}: not comparable.")
    if reference.source:
        what = "precision and recall alone; FID takes mu, sigma" if reference.stats else "all metrics"
        said.append(f"The reference's {len(reference.source)} images of {reference.source.size} px are for {what}.")
    else:
        said.append("The reference holds no images (arr_0), so no precision and recall.")
    if set(reference.stats) == {"pool"}:
        said.append("The reference has no mu_s, sigma_s, so no sFID. For pytorch-fid's files: --resize torch.")
    return said


def report(row):
    """Print a row of results.json: metrics first, then the fingerprint that belongs to them."""
    for name, value in row["metrics"].items():
        print(f"{name:>20}  {value:.4f}")
    unknown = {}
    for name, value in row["fingerprint"].items():
        if str(value).startswith("unknown"):
            unknown.setdefault(value, []).append(name)
        elif name != "notes":
            print(f"{name:>20}  {value}")
    for value, names in unknown.items():
        print(f"{', '.join(names)}: {value}")
    for sentence in row["fingerprint"]["notes"]:
        print("note:", sentence)
    rate = row["images_per_second"]
    print(f"{rate:.1f} images/s" if rate else "The features were there already.")


# ---------------------------------------------------------------------------------------------------------------------
# Small images without a download: a classifier of glyphs takes Inception's place. What it says compares only with what
# the same weights said, so every row names them. OURS: the whole judge of glyphs; the paper shows no images this small.
# ---------------------------------------------------------------------------------------------------------------------

NAMES = {  # the sections of a run's plan that are students, and what tables call them
    "scratch": "MeanFlow on data, no teacher", "dmd-no-td": "DMD, no TD", "dmd": "TD + DMD",
    "mean": "TD + DMD + GAN, mean pooling", "hd-no-td": "DMD + AWD, no TD", "hd": "HD: TD + DMD + AWD"}  # fmt: skip
VARIANTS = {  # of stage 2: how these sections differ from HD's
    "hd-no-td": dict(init="teacher"), "dmd-no-td": dict(init="teacher", pooling="none"), "hd": {},
    "mean": dict(pooling="mean"), "dmd": dict(pooling="none")}  # fmt: skip
CLASSIFIER_SEED = 2**32 - 1  # of the glyphs that it learns from: the last seed there is, which no run takes by chance
CLOUD_ROWS = 5000  # images whose features make the clouds of precision and recall; the cost grows with the square


class GlyphClassifier(nn.Module):
    """Three convolutions, the mean over their last pixels, one linear layer. images (B, 1, size, size) in [-1, 1] ->
    features (B, 96), where the Frechet distance, precision and recall are measured; logits (B, 10).

    OURS: group norm and GELU. With batch norm and ReLU the same recipe was as accurate on glyphs, but failed on
    slightly different ones: of 16 px glyphs (of an earlier version, which varied more) blurred by (1 2 1) it knew 0.10
    instead of 0.68, so that samples a little wrong would look all wrong."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        first, layers = max(1, size // 16), []  # stride of the first layer: from 16 px on, sizes cost about the same
        for c_in, c_out, stride in ((1, 32, first), (32, 64, 2), (64, 96, 2)):
            kernel = 2 * stride + 1 if c_in == 1 else 3  # no pixel is left out
            conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.GroupNorm(8, c_out), nn.GELU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(96, 10)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        features = self.body(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))  # (B, 96)
        return features, self.head(features)


def train_classifier(size, steps=400, batch=128, peak=3e-3):
    """-> GlyphClassifier and its accuracy on 5,000 held-out glyphs. No image is seen twice.

    Adam, a cosine to zero after a linear rise, no augmentation. The weights are a function of the arguments, to the
    bit, on one machine with one number of threads. One busy core of an AMD EPYC: 16 px 20 s, accuracy 0.9996; 32 px
    24 s, 0.9992."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.rng(CLASSIFIER_SEED, "classifier").initial_seed())
        net = GlyphClassifier(size)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    glyphs = data.Glyphs(size, seed=CLASSIFIER_SEED)
    for step in data.progress(range(steps), "classifier"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak, warmup=50)
        images, labels = glyphs.batch(range(step * batch, (step + 1) * batch))
        loss = F.cross_entropy(net(data.to_float(images))[1], torch.from_numpy(labels))
        check_finite(f"classifier, step {step}", loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = held_out_glyphs(size, 5000, CLASSIFIER_SEED)
    correct = classify(net, images)[1].argmax(1) == labels
    return net, correct.double().mean().item()


def held_out_glyphs(size, count, seed):
    """`count` glyphs that no training sees. -> images (count, 1, size, size) in [-1, 1], labels (count,) int64.

    Digits are balanced: an image whose digit is complete is passed over. With digits as drawn, their chance shares
    make most of the Frechet distance between two draws (16 px, 5,000 images: 0.033 +- 0.013 for 0.009)."""
    glyphs = data.Glyphs(size, seed, held_out=True)
    room, images, labels = [(count + 9 - digit) // 10 for digit in range(10)], [], []
    for index in itertools.count():
        if len(labels) == count:
            return data.to_float(np.stack(images)), torch.tensor(labels)
        image, label = glyphs[index]
        if room[label]:
            room[label] -= 1
            images.append(image)
            labels.append(label)


@torch.no_grad()
def classify(net, images, batch=500):
    """images (N, 1, size, size) -> features (N, 96), logits (N, 10), a batch at a time."""
    return tuple(torch.cat(parts) for parts in zip(*(net(part) for part in images.split(batch))))


def frequency_rings(size):
    """-> the ring (size, size) of each entry of a 2D FFT, which is its distance from frequency 0 in cycles per image,
    rounded; and how many entries each ring holds, for the whole rings 0 .. size/2 (to Nyquist's frequency)."""
    cycles = torch.fft.fftfreq(size, 1 / size)
    ring = (cycles[:, None].square() + cycles.square()).sqrt().round().long()
    return ring, torch.bincount(ring.flatten())[: size // 2 + 1]


def power_spectrum(images):
    """Radially averaged power of images (N, C, size, size). -> (size/2 + 1,) float64, by whole cycles per image.

    |FFT|^2 / size^2, mean over images, channels and a ring's frequencies: white noise has its variance everywhere, and
    the sum over all frequencies is that of the squared pixels (Parseval). The corners beyond Nyquist's are left out."""
    size = images.shape[-1]
    ring, count = frequency_rings(size)
    power = sum(torch.fft.fft2(part.double()).abs().square().sum((0, 1)) for part in images.split(1000))
    power = power / (images.shape[0] * images.shape[1] * size**2)  # (size, size)
    sums = torch.zeros(ring.max() + 1, dtype=torch.float64).index_add_(0, ring.flatten(), power.flatten())
    return sums[: len(count)] / count


def high_power(spectrum, reference):
    """Power above half of Nyquist's frequency, relative to a reference's, from two power spectra. -> float; 1: as much,
    less: blurred. More is no praise, since noise has it too."""
    size = 2 * (len(spectrum) - 1)
    upper, count = slice(size // 4 + 1, None), frequency_rings(size)[1]
    return ((spectrum * count)[upper].sum() / (reference * count)[upper].sum()).item()


class GlyphJudge:
    """Compares images with `count` held-out glyphs of a seed, with balanced digits.

    judge(images (N, 1, size, size) in about [-1, 1], labels (N,) that were asked for) -> dict of floats:
    frechet                in the classifier's features; falls as N grows, so that only rows of one N compare
    precision, recall      in the same features, of at most CLOUD_ROWS images on either side, k = 3
    class_accuracy         share of images that the classifier takes for what was asked for
    high_power             see the function of this name
    Images are judged as they would be saved, through uint8. `data against data` is the judge's word on
    held_out_glyphs(size, N, another seed). Raises ValueError on other shapes, NaN, infinity, or 3 images or fewer."""

    def __init__(self, classifier, size, count=10_000, seed=0):
        if classifier.size != size:
            raise ValueError(f"a classifier of {classifier.size} px glyphs can't judge {size} px")
        self.classifier, self.size, self.count, self.seed = models.frozen_copy(classifier).cpu(), size, count, seed
        self.sha = weights_sha(self.classifier)
        images, _ = held_out_glyphs(size, count, seed)
        self.spectrum = power_spectrum(images)
        features, _ = classify(self.classifier, images)
        self.stats, self.cloud = statistics(features), self.some(features)

    def some(self, features):
        """CLOUD_ROWS of them, or all, by lot: the first ones might be of a few classes."""
        return features[torch.randperm(len(features), generator=data.rng(self.seed, "cloud"))[:CLOUD_ROWS]]

    def __call__(self, images, labels):
        if images.shape != (len(labels), 1, self.size, self.size):
            raise ValueError(f"images {tuple(images.shape)} and labels {tuple(labels.shape)} of {self.size} px glyphs")
        if not images.isfinite().all():
            raise ValueError(f"{(~images.isfinite()).flatten(1).any(1).sum()} of {len(images)} images are not finite")
        images = data.to_float(data.to_uint8(images))
        features, logits = classify(self.classifier, images)
        precision, recall = precision_recall(self.cloud, self.some(features))
        return {
            "frechet": frechet_distance(*self.stats, *statistics(features)),
            "precision": precision,
            "recall": recall,
            "class_accuracy": (logits.argmax(1) == labels.cpu()).double().mean().item(),
            "high_power": high_power(power_spectrum(images), self.spectrum),
        }

    def fingerprint(self, labels):
        """What a row of metrics belongs to, for images with these labels (N,): with other entries nothing compares."""
        counts = torch.bincount(labels.cpu(), minlength=10)
        return {
            "images": len(labels),
            "labels": "balanced" if counts.max() - counts.min() <= 1 else "random",
            "reference": f"{self.count} held-out glyphs, {self.size} px, balanced",
            "features": f"GlyphClassifier {self.sha}",
            "seed": self.seed,
        }


def weights_sha(net):
    """The first 8 digits of the sha256 of a network's weights; of none, nothing."""
    weights = [] if net is None else net.state_dict().values()
    return hashlib.sha256(b"".join(x.cpu().contiguous().numpy().tobytes() for x in weights)).hexdigest()[:8]


def statistics(features):
    """Features (N, d) -> mean (d,), covariance (d, d), float64."""
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments.finish()


COUNT, QUICK_COUNT = 5000, 500  # images in each row; fewer make all distances greater
# OURS: so many times more held-out glyphs to compare with, for they cost little. The Frechet distance of one student
# had a standard deviation of 0.004 over six draws of 2,000 images and as many glyphs, and of 0.001 over six draws of
# 5,000 images, compared with the same 20,000 glyphs.
REFERENCE_RATIO = 4
SAMPLE_BATCH = 250
GUIDANCE = (1.0, 1.25, 1.5, 2.0)  # of the teacher; 1 is none


def title(name, section):
    """What tables call the student of a run's section: NAMES[name]; its name and what differs ("hd, init teacher") if
    its settings are not what that says; its name alone if it is not in NAMES."""
    if name not in NAMES:
        return name
    settings = {"init": "td", "pooling": "attention"} | VARIANTS.get(name, {})
    others = [f"{key} {section[key]}" for key, value in settings.items() if section.get(key, value) != value]
    return ", ".join([name, *others]) if others else NAMES[name]


class RunJudge:
    """Measures what a run on glyphs holds, a row for results.json each; a row that was measured once is kept.

    noise_seed: of the noise that is turned into images, and of the glyphs that stand for perfect ones. The glyphs that
    all are compared with stay."""

    def __init__(self, run, count, noise_seed=0):
        self.run, self.count, self.noise_seed, self.size = run, count, noise_seed, run.plan["data"]["size"]
        self.eps, self.y = run.noise(count, f"evaluation{noise_seed or ''}"), torch.arange(count) % 10
        self.rows, self.spectra = [], {}
        state = run.folder.stage("classifier", self.train)
        print(f"The classifier knows {state['accuracy']:.4f} of held-out glyphs.")
        classifier = GlyphClassifier(self.size)
        classifier.load_state_dict(state["net"])
        self.judge = GlyphJudge(classifier, self.size, REFERENCE_RATIO * count)

    def train(self, keep):
        net, accuracy = train_classifier(self.size)
        return {"net": net.state_dict(), "accuracy": accuracy}

    def sample(self, sampler, what):
        """sampler(eps, y) -> x_0 for the judge's noises, a batch at a time."""
        x, y, count = torch.zeros(self.eps.shape), self.y.to(self.run.device), len(self.y)
        batches = [slice(k, min(k + SAMPLE_BATCH, count)) for k in range(0, count, SAMPLE_BATCH)]
        for rows in data.progress(batches[own_share()], what):
            x[rows] = sampler(self.eps[rows], y[rows])
        data.add_up([x])  # each rank's zeros leave room for the others' images
        check_finite(what, sample=x)
        return x, self.y

    def row(self, what, draw, *, seed=0, nfe=0, w=None, net=None):
        """Add the row of metrics of what draw() returns, (images, labels), made by `net` with guidance w. A row of the
        same network that was measured before is read from the run folder."""

        def compute(keep):
            start = time.perf_counter()
            images, labels = draw()
            ms = 1000 * (time.perf_counter() - start) * world()[1] / self.count  # of one process
            fingerprint = self.judge.fingerprint(labels) | ({"noise": self.noise_seed} if self.noise_seed else {})
            row = {"what": what, "seed": seed, "nfe": nfe, "w": w, **self.judge(images, labels), "ms_per_image": ms,
                   "weights": weights_sha(net), "fingerprint": fingerprint}  # fmt: skip
            return {"row": row, "spectrum": power_spectrum(data.to_float(data.to_uint8(images)))}

        by = f"{self.count}-of-{self.judge.count}-{self.judge.sha}" + f"-noise{self.noise_seed}" * bool(self.noise_seed)
        name = f"judged-{what}-seed{seed}-nfe{nfe}-w{w}-{by}-{weights_sha(net)}"
        state = self.run.folder.stage(re.sub("[^A-Za-z0-9.-]+", "_", name), compute)
        self.rows.append(state["row"])
        self.spectra.setdefault(what, state["spectrum"])

    def data(self):
        """Another draw of the data: how good a perfect sampler would look."""
        seed = 1 + self.noise_seed  # 0 is of the glyphs to compare with
        self.row("data against data", lambda: held_out_glyphs(self.size, self.count, seed), seed=seed)

    def teacher(self):
        """The teacher as the students learn from it, by Euler at few calls and by Heun at 50; and at 50 with other
        guidance, for its best is what a student has to reach."""
        teacher, own = self.run.load("teacher"), self.run.plan["td"]["w"]
        rows = [("teacher, Euler", own, calls, partial(sample_euler, steps=calls)) for calls in (1, 2, 4, 8)]
        rows += [("teacher, Heun", w, 50, partial(sample_ode, steps=25)) for w in dict.fromkeys((own, *GUIDANCE))]
        for what, w, calls, sampler in rows:
            teacher.w = w
            draw = partial(self.sample, partial(sampler, teacher), what)
            self.row(what, draw, nfe=calls, w=w, net=teacher)

    def student(self, stage, what, seed=0, steps=1):
        """The student of a finished stage, in `steps` calls; returns the student."""
        net = self.run.load(stage, two_times=True)
        draw = partial(self.sample, partial(sample, net, steps=steps), f"{what}, seed {seed}")
        self.row(what, draw, seed=seed, nfe=steps, net=net)
        return net


def print_rows(rows):
    """A table of rows with equal what, nfe and w: mean and, where there are several seeds, their spread."""
    groups = {}
    for row in rows:
        groups.setdefault((row["what"], row["nfe"], row["w"]), []).append(row)
    columns = ("frechet", "precision", "recall", "class_accuracy", "high_power", "ms_per_image")
    print(f"{'':32}{'calls':>6}{'w':>6}{'seeds':>6}" + "".join(f"{name:>18}" for name in columns))
    for (what, nfe, w), group in groups.items():
        line = f"{what:32}{nfe:6}{w or '':>6}{len(group):6}"
        for name in columns:
            values = [row[name] for row in group]
            spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            line += f"{np.mean(values):.3f}{spread}".rjust(18)
        print(line)
    print("fingerprint:", ", ".join(f"{key} {value}" for key, value in rows[-1]["fingerprint"].items()))


def evaluate_run(run, count, noise_seed=0):
    """evaluate.py --data glyphs: one table of all that the run holds, grid.png and spectrum.png; returns the rows.

    With another noise_seed than 0 the rows go to results-noise<noise_seed>.json, and the pictures stay as they are."""
    judge = RunJudge(run, count, noise_seed)
    judge.data()
    judge.teacher()
    grid = {"teacher, 50 calls": partial(sample_ode, run.load_teacher(), steps=25),
            "TD, 1 call": partial(sample, judge.student("td", "TD"))}  # fmt: skip
    for path in sorted(run.folder.path.glob("*-seed*.pt")):
        stage = re.fullmatch(r"(.+)-seed(\d+)", path.stem)
        if stage and stage[1] in run.plan:
            name, seed, section = stage[1], int(stage[2]), run.plan[stage[1]]
            for steps in range(1, section.get("student_steps", 1) + 1):
                student = judge.student(path.stem, title(name, section), seed, steps)
            if seed == 0:
                grid[f"{title(name, section)}, 1 call"] = partial(sample, student)
    if world()[0]:  # the rest is rank 0's
        return judge.rows
    results = f"results-noise{noise_seed}.json" if noise_seed else "results.json"
    data.write_json(run.folder.path / results, judge.rows)
    print_rows(judge.rows)
    if noise_seed:
        print(f"In {run.folder.path}: {results}.")
        return judge.rows
    plot_spectrum(run.folder.path / "spectrum.png", {"data": judge.judge.spectrum, **judge.spectra})
    images = [data.to_uint8(sampler(run.grid_eps, run.grid_y))[::4] for sampler in grid.values()]
    data.save_grid(run.folder.path / "grid.png", np.concatenate(images), columns=len(images[0]))
    print(f"In {run.folder.path}: results.json, spectrum.png, and grid.png with a row for each of: {'; '.join(grid)}.")
    return judge.rows


DASHES = ("--", "-.", ":")


def plot_spectrum(path, spectra):
    """PNG of power spectra {name: (size/2 + 1,)}, each over the one named "data". Shaded: what high_power is of."""
    figure, axis = data.new_figure(6.4, 4.4)
    spectra = dict(spectra)
    reference = spectra.pop("data")
    cycles = np.arange(1, len(reference))  # without the mean, which is no detail
    axis.axhline(1, color="black", lw=2.5, label="data")
    axis.axvspan(len(reference) / 2, len(reference) - 1, color="black", alpha=0.07, lw=0, label="high_power")
    known, others = {"TD": data.BLUE, NAMES["hd"]: data.ORANGE}, 0
    for name, spectrum in spectra.items():
        style = {"color": known[name], "marker": "o"} if name in known else {
            "color": data.OTHERS[others % 4], "ls": DASHES[others % 3], "marker": "sD^v*"[others % 5]}  # fmt: skip
        others += name not in known
        axis.plot(cycles, (spectrum / reference)[1:], ms=4, label=name, **style)
    axis.set(xlabel="radial frequency (cycles per image)", ylabel="power, relative to data", ylim=(0, None))
    axis.legend(fontsize=9)
    data.save_figure(path, figure)


# ---------------------------------------------------------------------------------------------------------------------
# Samples, of a student's checkpoint or of a teacher, as PNG files. Label and noise of image i are functions of
# (seed, i), also the noise that samplers add on their way; so a stopped run goes on, and any image can be made again.
# ---------------------------------------------------------------------------------------------------------------------

# PRIOR: the 250 steps of DiT's DDPM and of SiT's SDE, behind their published FIDs. Heun has two calls a step.
SAMPLER_STEPS = {"student": 1, "ddpm": 250, "sde": 250, "heun": 125}


class Painter(NamedTuple):
    """Networks that make images, and what a painting needs to know of them."""

    student: object  # either can be None
    teacher: object
    decode: object  # what is diffused (B, ...) -> images (B, C, H, W) in about [-1, 1]
    shape: tuple  # (C, h, w) of what is diffused
    classes: int
    fingerprint: dict  # what samples belong to: sha256 of the files that made them


def class_list(text):
    """A type for argparse: random, balanced, or a tuple of class numbers."""
    if text in ("random", "balanced"):
        return text
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not random, balanced, or numbers of classes as in 207,360,387")
    return tuple(map(int, text.split(",")))


def label_of(i, wanted, classes, seed):
    """The label of image i: by lot, in turn through all classes, or in turn through those that are wanted."""
    if wanted == "random":
        return torch.randint(classes, (1,), generator=data.rng(seed, "label", i)).item()
    return i % classes if wanted == "balanced" else wanted[i % len(wanted)]


def open_painter(args):
    """The networks that --checkpoint and --sampler ask for. Raises BadInput."""
    wants_teacher, path = args.sampler != "student" or args.speed_up, args.checkpoint
    if path is None and args.sampler == "student":
        raise BadInput("samples of a student need its --checkpoint: a run, or a file RUN/<stage>.pt of it")
    if path is not None and path.is_dir():
        there = [p for p in (path / "hd-seed0.pt", path / "td.pt") if p.exists()]
        if not there:
            raise BadInput(f"{path} holds neither hd-seed0.pt nor td.pt: train first, or name another --checkpoint")
        path = there[0]
    student = teacher = run = None
    fingerprint = {"vae": None, "vae_scale": None, "checkpoint": None, "teacher": None}
    if path is not None:
        if not path.exists():
            raise BadInput(f"{path} is not there: name a finished stage, RUN/td.pt or RUN/hd-seed0.pt")
        run = saved_run(path.parent, args.device)
        settings = run.plan["data"]
        if args.sampler == "student":
            student, fingerprint["checkpoint"] = run.load(path.stem, two_times=True), data.sha256_file(path)
        if wants_teacher and settings["data"] != "imagenet":
            teacher, sha256 = run.load("teacher"), data.sha256_file(path.parent / "teacher.pt")
    if wants_teacher and teacher is None:
        teacher, sha256 = load_teacher(args.teacher)
        if run is not None and sha256 != settings["teacher sha256"]:
            raise BadInput(f"{path} was trained with another teacher (sha256 {settings['teacher sha256'][:8]}...) than "
                           f"--teacher {args.teacher} ({sha256[:8]}...)")  # fmt: skip
        teacher.to(args.device)
    if args.sampler != "student":
        fingerprint["teacher"] = sha256
    if run is None or settings["data"] == "imagenet":
        vae, fingerprint["vae"] = data.load_vae(args.vae)
        fingerprint["vae_scale"] = models.SD_VAE_SCALE
        if run is not None and fingerprint["vae"] != settings["vae sha256"]:
            raise BadInput(f"{path} was trained with another VAE (sha256 {settings['vae sha256'][:8]}...) than --vae "
                           f"{args.vae} ({fingerprint['vae'][:8]}...)")  # fmt: skip
        decode = partial(data.decode_latents, vae.to(args.device), scale=models.SD_VAE_SCALE)
    else:
        decode = run.decode
    if teacher is not None:
        teacher.w = args.w or (run.plan["td"]["w"] if run else 1.5)
        teacher.cfg_channels = args.cfg_channels or (run.plan["td"].get("cfg_channels") if run else None) or 3
    if run is None:
        config = teacher.net.config
        shape, classes = (config["in_channels"], config["input_size"], config["input_size"]), config["num_classes"]
    else:
        shape, classes = run.shape, run.classes
    return Painter(student, teacher, decode, shape, classes, fingerprint)


def paint(painter, sampler, steps, indices, args):
    """Images `indices` by one of SAMPLER_STEPS. -> x (B, C, H, W) in about [-1, 1], seconds to sample, to decode."""
    y = torch.tensor([label_of(i, args.classes, painter.classes, args.seed) for i in indices], device=args.device)
    eps = torch.stack([torch.randn(painter.shape, generator=data.rng(args.seed, "sample", i)) for i in indices])
    on_the_way = [data.rng(args.seed, "sampler", i) for i in indices]
    eps, device = eps.to(args.device), torch.device(args.device)
    clock = [seconds_now(device)]
    with autocast(device, args.amp):
        if sampler == "student":
            x_0 = sample(painter.student, eps, y, steps)
        elif sampler == "heun":
            x_0 = sample_ode(painter.teacher, eps, y, steps)
        elif sampler == "sde":
            x_0 = models.sample_sde(painter.teacher, eps, y, steps, generator=on_the_way)
        else:
            x_0 = painter.teacher.sample_ddpm(eps, y, steps, generator=on_the_way)
    clock.append(seconds_now(device))
    images = painter.decode(x_0)
    clock.append(seconds_now(device))
    return images, clock[1] - clock[0], clock[2] - clock[1]


def seconds_now(device):
    """The time, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def begin_samples(out, count, fingerprint):
    """The folder OUT/images for samples of this fingerprint, which is written beside it. BadInput if OUT holds
    others."""
    folder = out / "images"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"can't make {folder} ({error.strerror}): name another by --out") from error
    fingerprint = json.loads(json.dumps(fingerprint))
    if (out / SIDECAR).exists():
        was = data.read_json(out / SIDECAR)
        if not isinstance(was, dict):
            raise BadInput(f"{out / SIDECAR} does not say how the images beside it were made: name another by --out")
        differ = [f"{key} = {was.get(key)!r} there and {now!r} now" for key, now in fingerprint.items()
                  if was.get(key) != now]  # fmt: skip
        if differ:
            raise BadInput(f"{out} holds other samples ({', '.join(differ)}): name another by --out")
    elif any(folder.iterdir()):
        raise BadInput(f"{folder} holds files and no {SIDECAR} is beside it: name another by --out")
    if (there := sum(path.suffix == ".png" for path in folder.iterdir())) > count:
        raise BadInput(f"{folder} holds {there} images, more than {count}: name another folder, or ask for more")
    if not world()[0]:
        data.write_json(out / SIDECAR, fingerprint)
    return folder


def sample_images(args):
    """--sample: images 0 .. N - 1 to OUT/images, or those that are missing; grid.png; fingerprint.json."""
    with in_turn():
        painter, steps = open_painter(args), args.steps or SAMPLER_STEPS[args.sampler]
    if args.sampler == "ddpm" and own_sampler(painter.teacher) != "ddpm":
        raise BadInput("--sampler ddpm is a DiT's own, with a learned variance: of other teachers take sde or heun")
    if steps < 2 and args.sampler in ("ddpm", "sde"):
        raise BadInput(f"--sampler {args.sampler} takes at least 2 --steps")
    if isinstance(args.classes, tuple) and max(args.classes) >= painter.classes:
        raise BadInput(f"--classes names {max(args.classes)}, but the classes are 0 .. {painter.classes - 1}")
    guided = args.sampler != "student"
    fingerprint = painter.fingerprint | {
        "labels": args.classes, "uint8": data.UINT8_RULE, "precision": "bf16" if args.amp == "bf16" else "float32",
        "sampler": args.sampler, "steps": steps, "nfe": steps * (2 if args.sampler == "heun" else 1), "seed": args.seed,
        "guidance": [painter.teacher.w, painter.teacher.cfg_channels] if guided else "baked in", "batch": args.batch,
    }  # fmt: skip
    out = Path(args.out)
    with in_turn():
        folder = begin_samples(out, args.sample, fingerprint)
    paths = [folder / f"{i:06d}.png" for i in range(args.sample)]
    batches = [range(args.sample)[start : start + args.batch] for start in range(0, args.sample, args.batch)]
    # whole batches, so that a row has the same neighbours and the same rounding, whenever and wherever it is made
    batches = [batch for batch in batches[own_share()] if not all(paths[i].exists() for i in batch)]
    times = []
    with data.alone(out), ThreadPoolExecutor(4) as pool, data.Patience():
        data.gathered(None)  # rank 0 has removed what a kill left half-written
        for batch in data.progress(batches, "samples"):
            images, *seconds = paint(painter, args.sampler, steps, batch, args)
            times.append([1000 * part / len(batch) for part in seconds])
            list(pool.map(data.save_png, [paths[i] for i in batch], data.to_uint8(images)))
            data.Patience.look(together=False)
    data.gathered(None)
    if world()[0]:  # the rest is rank 0's
        return
    if times:
        sampling, decoding = np.mean(times[len(times) > 1 :], axis=0)  # the first batch warms up
        each = f", on each of {world()[1]} ranks" * (world()[1] > 1)
        print(f"{sampling + decoding:.2f} ms per image, {sampling:.2f} of them by {args.sampler} in {steps} steps, the "
              f"rest to decode; batches of {args.batch}, {args.device}{each}.")  # fmt: skip
    else:
        print("All images were there already.")
    source = data.ImageFolder(folder)
    data.save_grid(out / "grid.png", source.images(range(min(100, len(source)))), columns=10)
    if args.save_npz:
        data.write_npz(args.save_npz, source)
    if args.speed_up:
        print(speed_up(painter, steps, args))
    print(f"In {out}: images/ with {len(source):,} of {args.sample:,}, grid.png, {SIDECAR}. "
          f"Next: python evaluate.py --images {folder} --reference ...")  # fmt: skip


def own_sampler(teacher):
    """The sampler of SAMPLER_STEPS with which a teacher was published; Heun's for any other."""
    if isinstance(teacher, models.DiTTeacher) and teacher.net.config["learn_sigma"]:
        return "ddpm"
    return "sde" if isinstance(teacher, models.SiTTeacher) else "heun"


def speed_up(painter, steps, args):
    """One sentence: milliseconds per image of student and teacher, decoder included, on one batch in this process."""
    batch, ms = range(args.batch), {}
    for sampler, many in (("student", steps), (own_sampler(painter.teacher), None)):
        many = many or SAMPLER_STEPS[sampler]
        paint(painter, sampler, min(many, 2), batch, args)  # warms up
        _, *seconds = paint(painter, sampler, many, batch, args)
        ms[f"{sampler}, {many} steps"] = 1000 * sum(seconds) / len(batch)
    (student, fast), (teacher, slow) = ms.items()
    return (f"{student}: {fast:.2f} ms per image; the teacher by {teacher}, w = {painter.teacher.w}: {slow:.2f} ms; "
            f"{slow / fast:.1f} times as long. Decoder included, batches of {args.batch}, {args.device}.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What one image costs
# ---------------------------------------------------------------------------------------------------------------------


def gmacs(call):
    """Billions of multiply-adds in `call()`, by torch's counter, which counts each as two FLOPs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2e9


def flops_table(steps=250):
    """GMACs for one 256 px ImageNet image -> dict of rows. Shapes are run through on the meta device, without memory.

    PAPER: one step takes 69.7 times fewer FLOPs than the teacher's 250. That is what XL/2 and the decoder of SD's VAE
    give if the decoder is counted on either side and the teacher's second pass for guidance is not."""
    with torch.device("meta"):
        net = models.DiT(32, 2, 4, hidden_size=1152, depth=28, num_heads=16, learn_sigma=True)  # XL/2
        vae = models.AutoencoderKL()
        z, t, y = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.int64)
    forward, decoder = gmacs(lambda: net(z, t=t, y=y)), gmacs(lambda: vae.decode(z))
    student, teacher, guided = forward + decoder, steps * forward + decoder, 2 * steps * forward + decoder
    return {
        "XL/2, one forward pass (118.64 by others' count)": forward,
        "SD-VAE decoder": decoder,
        "student: 1 step, decoder": student,
        f"teacher: {steps} steps, decoder, guidance not counted": teacher,
        f"teacher: {steps} steps, decoder, guidance counted": guided,
        "teacher / student, guidance not counted (the paper's 69.7x)": teacher / student,
        "teacher / student, guidance counted": guided / student,
    }


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Read the command line and do what it says; bad input ends with one sentence and exit code 2."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--images", type=Path, help="what to score: a folder of images of one size, or an npz (arr_0: uint8 NHWC)")
    add("--reference", help="compared with what: an ADM or pytorch-fid npz, a folder, `glyphs`, or a run, runs/NAME")
    add("--save-npz", type=Path, metavar="FILE", help="write --images into an npz for ADM's own evaluator")
    add("--inception-weights", type=Path, metavar="FILE", help="a local copy; else fetched once into torch.hub's cache")
    add("--resize", choices=("tf1", "torch"), default="tf1", help="tf1: ADM's rule, torch: pytorch-fid's (%(default)s)")
    add("--glyphs", type=whole_number(2, 10**6), default=10_000, metavar="N", help="glyphs to draw (%(default)s)")
    add("--batch", type=whole_number(1, 4096), default=32, help="images in one pass, 1 .. 4096 (%(default)s)")
    add("--allow-small", action="store_true", help="score fewer than 2,048 images, for a rough look")
    add("--flops", action="store_true", help="print what one ImageNet image costs teacher and student, in GMACs")
    add("--count", type=whole_number(100, 10**6),
        help=f"of --data: images in each row ({COUNT}; with --quick {QUICK_COUNT})")
    add_run_arguments(parser)
    parser.set_defaults(data=None, data_dir=None, device=devices[0], accumulate=1, checkpointing=False, compile=False)
    add = parser.add_argument_group("samples").add_argument
    add("--sample", type=whole_number(1, 10**7), metavar="N", help="write N images to OUT/images, as named below")
    add("--checkpoint", type=Path, metavar="FILE", help="the student: a finished stage RUN/td.pt, or the run")
    add("--sampler", choices=tuple(SAMPLER_STEPS), default="student", help="all others: the teacher's (%(default)s)")
    add("--steps", type=whole_number(1, 1000), help="of the sampler (student 1, ddpm and sde 250, heun 125)")
    add("--classes", type=class_list, default="random", help="random, balanced, or numbers: 207,360 (%(default)s)")
    add("--seed", type=whole_number(0, 2**32 - 2), default=0,
        help="of labels and noise; with --data, another noise than the table's (%(default)s)")
    add("--w", type=data.positive_number, help="the teacher's guidance (that of the run, else 1.5)")
    add("--cfg-channels", type=whole_number(1, 4), help="of latents: guide the first N (that of the run, else 3)")
    add("--amp", choices=("bf16", "off"), default="off", help="bf16: matrix products in bf16 (%(default)s)")
    add("--speed-up", action="store_true", help="time the teacher's sampler too, on one batch")
    args = parser.parse_args(argv)
    check_device(parser, args.device)
    if args.sample:
        if args.out is None:
            parser.error("--sample needs --out, a folder for the images")
        if args.speed_up and args.sampler != "student":
            parser.error("--speed-up compares a student with its teacher: leave out --sampler")
        with sentences(parser, args.device):
            sample_images(args)
        return
    if args.data in ("folder", "imagenet"):
        parser.error(f"--data {args.data}: the table is made for glyphs. Write images by --sample, then score them by "
                     "--images and --reference")  # fmt: skip
    if args.data:
        with sentences(parser, args.device) as held:
            with in_turn():
                run = ImageRun(args, {}, needs=["teacher", "td"])
            held.enter_context(data.alone(run.folder.path))
            evaluate_run(run, args.count or (QUICK_COUNT if args.quick else COUNT), args.seed)
        return
    args.out = Path(args.out or "runs/evaluate")
    if not args.flops and not (args.images and (args.reference or args.save_npz)):
        parser.error("give --data, or --sample, or --images with --reference or --save-npz, or --flops")
    with sentences(parser):
        if args.flops:
            print("GMACs of one 256 px image (a MAC is 2 FLOPs), and their ratios:")
            for name, value in flops_table().items():
                print(f"{value:12,.2f}  {name}")
        if args.save_npz:
            data.write_npz(args.save_npz, open_images(args.images))
        if args.reference:
            report(evaluate(args))


if __name__ == "__main__":
    main()

"""Everything that is drawn, read or written: densities, images, randomness, and the folder of a run.

    Density      points in the plane: how to draw them, and which part of the support a point lies in
    Glyphs       digits 0-9 drawn with the fonts that matplotlib ships: nothing to download, endless, seeded
    ImageFolder  a tree with one folder per class (ImageNet's train/<wnid>/*.JPEG, or any other), centre-cropped
    NpzImages    one .npz file in the format of ADM's evaluator: `arr_0`, uint8 (N, H, W, C)
    LatentCache  latents of such a tree, encoded once by Stable Diffusion's VAE; EncodedFolder encodes them when drawn
    RunFolder    runs/<name>/: all that a run leaves behind, written whole or not at all
    add_up       sums over the ranks of one run, the processes that torchrun starts
    side_by_side many small networks at once, a process for each

Images are uint8 (H, W, C), C = 3 (RGB) or 1 (grey). Every source of them has `size`, `channels`, `len()`, and
`images(indices) -> uint8 (B, H, W, C)`. What is trained on has `draw(batch, generator) -> x_0 (B, C, H, W), y (B,)` on
the generator's device, and the names of its `classes`; draw(batch, generator, rows) makes some rows of that batch
alone. Randomness is a function of (seed, stream, step), never of history: the same step of the same run draws the same
numbers, whatever ran before it. What a user hands over and nobody can use raises BadInput.

    python data.py --encode --data-dir imagenet/train --cache imagenet-latents --vae ema --device cuda

writes what LatentCache reads; cut off at any moment, the same command goes on.
"""

from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
import argparse
import csv
from datetime import timedelta
import errno
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
from pathlib import Path
import re
import shutil
import signal
import sys
import threading
import time
from typing import Callable, NamedTuple
import zipfile

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps two processes from working in one run folder
    fcntl = None

import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
import torch
import torch.distributed as dist
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# What users hand over, and files
# ---------------------------------------------------------------------------------------------------------------------


class BadInput(ValueError):
    """What the user handed over cannot be used: one sentence with value and remedy, at which scripts exit with 2."""


def in_short(error):
    """What an error says, on one line and not too long: of a damaged file, libraries print whole pages."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Diverged(FloatingPointError):
    """A loss, a gradient or a sample is not finite, at which scripts exit with 3. report: what is known of it."""

    def __init__(self, sentence, report=None):  # pickle, which brings it from a worker, hands over the sentence alone
        super().__init__(sentence)
        self.report = report or {}


def sha256_start(file, size):
    """Hexadecimal sha256 of the first `size` bytes of an open file."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(min(1 << 22, size)):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def sha256_file(path):
    """Hexadecimal sha256 of a file of any size. BadInput if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return sha256_start(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}).") from error


def sha256_json(value):
    """Hexadecimal sha256 of a dict for JSON, but for its own entry "sha256": one that was changed is then seen."""
    entries = {key: value[key] for key in value if key != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def read_json(path):
    """Contents of a JSON file; BadInput that names it if it cannot be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({error}).") from error


def write_whole(path, write):
    """Call write(file) on a file beside `path`, flush it to the disk, then rename: `path` is old or new, never half."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may write one file
    try:
        with open(beside, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file that is never seen half-written."""
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))


def stamp(path):
    """A file's name, size and time of change: enough to see that it is still the same."""
    status = os.stat(path)
    return [str(Path(path).resolve()), status.st_size, status.st_mtime_ns]


def whole_number(low, high=2**31):
    """A type for argparse: whole numbers in low .. high."""

    def parse(text):
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in {low:,} .. {high:,}")
        return int(text)

    return parse


def positive_number(text):
    """A type for argparse: finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


@contextmanager
def sentences(parser, device=None):
    """Inside, what a user can mend ends the script with one sentence in the place of a traceback.

    device: of work that `ranks` divides, else None. Yields an ExitStack, on which the script puts the lock of its run
    folder once it knows the folder."""
    rank = int(os.environ.get("RANK", 0))

    def leave(code, said):
        if rank and code != 130:
            time.sleep(LAST_WORDS)  # rank 0 mostly has the same to say, and at its end torchrun ends the others
        parser.exit(code, said if code != 130 or not rank else None)

    try:
        with ExitStack() as held:
            held.enter_context(ranks(device))
            yield held
    except BadInput as error:
        leave(2, f"{parser.prog}: {error}\n")
    except OSError as error:
        leave(2, f"{parser.prog}: {error}; what was saved is kept, and the same command goes on\n")
    except FloatingPointError as error:
        leave(3, f"{parser.prog}: {error}\n")
    except (MemoryError, RuntimeError) as error:  # torch's CPU has no error of its own for it
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        leave(2, f"{parser.prog}: out of memory ({in_short(error)}). Less is taken, where there are such flags, by "
                 "a lower --batch, a higher --accumulate and fewer --workers; what was saved is kept\n")  # fmt: skip
    except KeyboardInterrupt:
        leave(130, f"\n{parser.prog}: stopped; the same command goes on from where it last saved\n")


def progress(items, label, **options):
    """A tqdm bar over `items`, gone when done; a plain line now and then where nobody looks at a terminal."""
    watched = sys.stderr.isatty()
    options |= {"desc": label, "leave": False, "mininterval": 0.2 if watched else 30}
    return tqdm(items, **options, position=LINE if watched else None, disable=world()[0] > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Jobs side by side: networks as small as ours gain nothing from a second thread, but two of them train at once.
# ---------------------------------------------------------------------------------------------------------------------

LINE = None  # in a worker: the line of the terminal for its progress bar, counted from that of the main process


def begin_worker(lines, lock):
    """In a new worker: one thread, a line of its own for its bars, patience with Ctrl-C also where it has nothing to
    do, and an end when the process that began it ends; else the orphan and the next start of the same command would do
    the same job."""
    global LINE
    torch.set_num_threads(1)
    with lines.get_lock():
        lines.value += 1
        LINE = lines.value
    tqdm.set_lock(lock)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, Patience.note)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def call_here(work, *job):
    """A pool's submit without a pool: the job is done in this process before its future is returned."""
    future = Future()
    try:
        future.set_result(work(*job))
    except Exception as error:
        future.set_exception(error)
    return future


@contextmanager
def pool(workers):
    """Yields submit(work, *job) -> future, of `workers` new processes of one thread each; of one, this process."""
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield call_here
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")  # a forked child would inherit half of torch's threads
    tqdm.set_lock(context.RLock())  # one terminal, drawn on by all
    with ProcessPoolExecutor(workers, context, begin_worker, (context.Value("i", 0), tqdm.get_lock())) as processes:
        yield processes.submit


def side_by_side(work, jobs, workers, label, forgive=()):
    """Call work(*job) for all jobs, `workers` at a time: the same bits however many there are.

    jobs: {job: jobs that have to be done before it}, begun in this order as far as that allows. forgive: errors of a
    job that are printed, while the others go on; any other ends all, once the jobs that have begun are done. Raises
    ChildProcessError if a worker dies.
    """
    waiting, done, running, workers = dict(jobs), set(), {}, min(workers, len(jobs))
    if not jobs:
        return
    with progress(jobs, label) as bar, pool(workers) as submit:
        try:
            while waiting or running:
                ready = [job for job, needs in waiting.items() if done.issuperset(needs)]
                for job in ready[:workers - len(running)]:
                    del waiting[job]
                    running[submit(work, *job)] = job
                if not running:
                    raise ValueError(f"{list(waiting)} need what is not among the jobs")
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done.add(running.pop(future))
                    bar.update()
                    try:
                        future.result()
                    except forgive as error:
                        print(f"{error} The others go on.")
        except BrokenProcessPool:
            tqdm.set_lock(threading.RLock())  # the dead may have held the other
            raise ChildProcessError(f"a worker of {label} died (if memory was short: fewer --workers)") from None


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: `torchrun --nproc_per_node=N meanflow_td.py ...` starts N processes, each with a GPU of its own, that share the
# rows of every batch. Gradients are summed here and not by torch's DDP, whose wrapper does not get on with forward-mode
# derivatives: gradients of such a loss stay unsummed, without an error. Random numbers are drawn for the whole batch on
# every rank, so that N changes results by rounding alone. Rank 0 alone writes, draws pictures and talks; all others
# read what it wrote, so that several machines need one disk for the run folder.
# ---------------------------------------------------------------------------------------------------------------------

BUCKET = 25 * 2**20  # PRIOR: DDP's 25 MB. Bytes summed at once: a call for each tensor costs time, one for all memory
TIMEOUT = timedelta(minutes=30)  # to wait for a rank that lives. OURS: rank 0 fetches or saves some 10 GB meanwhile
LAST_WORDS = 5  # seconds that other ranks wait before they leave, so that rank 0's sentence is printed first


def world():
    """(rank, number of ranks) of this process: (0, 1) without torchrun."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def own_share():
    """A slice of anything that is divided among the ranks: every N-th of it is this rank's."""
    return slice(world()[0], None, world()[1])


@contextmanager
def ranks(device):
    """Inside, the processes that torchrun started are ranks of one run; without torchrun nothing happens.

    device: of the tensors that are summed. None: the work is not divided, so BadInput if there are several processes,
    which would all do the same."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device is None:
        raise BadInput("this work is not divided among processes: start it without torchrun")
    cuda = torch.device(device).type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if world()[0] else sys.stdout):
        yield
    dist.destroy_process_group()  # not after an error, when others may be waiting: its exit ends them


def check_device(parser, device):
    """Exit with 2 and a sentence if torch can't use this device. "cuda" is from here on the GPU of this rank."""
    try:
        if "LOCAL_RANK" in os.environ and torch.device(device).type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=device)
        torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa would move du/dt and Inception's features
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device} can't be used here ({str(error).splitlines()[0]}): try --device cpu")


@contextmanager
def _together():
    """Around a call that waits for all ranks. ConnectionError if one of them is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo has no other type
        raise ConnectionError(f"another process of this run is gone ({in_short(error)})") from error


def add_up(tensors):
    """Replace tensors of one device by their sums over all ranks: the same bits on each of them.

    Raises ConnectionError if a rank is gone."""
    if world()[1] == 1:
        return
    bucket, size = [], 0
    for i, x in enumerate(tensors, 1):
        bucket.append(x)
        size += x.nbytes
        if size < BUCKET and i < len(tensors):
            continue
        flat = torch.cat([x.flatten() for x in bucket])
        with _together():
            dist.all_reduce(flat)
        for x, part in zip(bucket, flat.split([x.numel() for x in bucket])):
            x.copy_(part.view_as(x))
        bucket, size = [], 0


def gathered(value):
    """[value of rank 0, of rank 1, ...], for anything that pickles. All ranks wait here for each other."""
    values = [value] * world()[1]
    if len(values) > 1:
        with _together():
            dist.all_gather_object(values, value)
    return values


def agree(value):
    """Raise BadInput if ranks differ in what they found in a folder, as if each had one of its own."""
    if len(set(gathered(value))) > 1:
        raise BadInput("ranks found different things in one folder: it has to be on a disk that all machines share")


@contextmanager
def in_turn():
    """Rank 0 runs the block first, then all others: they see the files that it made, and none that it puts aside."""
    if world()[0]:
        gathered(None)
    yield
    if not world()[0]:
        gathered(None)


# ---------------------------------------------------------------------------------------------------------------------
# Published weights: fetched on first use into one folder, torch.hub's cache (moved by the variable TORCH_HOME)
# ---------------------------------------------------------------------------------------------------------------------


class Published(NamedTuple):
    """A file that its authors offer for download. sha256: its first digits, where they are known; "" checks nothing."""

    file: str  # its name in the cache
    url: str
    sha256: str = ""

    @property
    def path(self):
        """Where it is, or will be."""
        return Path(torch.hub.get_dir(), "checkpoints", self.file)


_HUGGING_FACE = "https://huggingface.co/{}/resolve/main/{}"
PUBLISHED = {  # the names that --teacher and --vae take, beside paths. Of these files no hash is published.
    "SiT-XL/2": Published("SiT-XL-2-256.pt", _HUGGING_FACE.format("nyu-visionx/SiT-collections", "SiT-XL-2-256.pt")),
    "DiT-XL/2": Published("DiT-XL-2-256x256.pt", "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"),
} | {
    name: Published(f"sd-vae-ft-{name}.safetensors",
                    _HUGGING_FACE.format(f"stabilityai/sd-vae-ft-{name}", "diffusion_pytorch_model.safetensors"))
    for name in ("ema", "mse")
}  # fmt: skip


def weights_path(name):
    """The file behind a name of PUBLISHED, or behind a path."""
    return PUBLISHED[name].path if name in PUBLISHED else Path(name)


def fetch(published, flag):
    """Path of a published file, downloaded if it is not there yet. flag: what else names it on the command line.

    Raises BadInput: one sentence with the URL and the place where the file goes."""
    path = published.path
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(published.url, str(path), hash_prefix=published.sha256 or None)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise BadInput(f"{published.file} could not be fetched ({error}): download {published.url} elsewhere and "
                           f"put it at {path}, or name it by {flag}.") from error  # fmt: skip
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Randomness
# ---------------------------------------------------------------------------------------------------------------------


def rng(seed, stream, step=0, device="cpu"):
    """A torch.Generator for one step of one stream of one run: seed and step are integers, stream any string."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# 2D densities
# ---------------------------------------------------------------------------------------------------------------------


class Density(NamedTuple):
    """A distribution of points in the plane, about [-2, 2]^2.

    draw(n, generator) -> (n, 2). part(x (n, 2)) -> (n,) integers: the part of the support that holds the point,
    -1 outside. parts: how many there are, each with the same share of the data.
    """

    draw: Callable
    part: Callable
    parts: int


def _uniform(n, generator, columns=1):
    return torch.rand(n, columns, generator=generator, device=generator.device)


def _normal(n, generator, columns=2):
    return torch.randn(n, columns, generator=generator, device=generator.device)


def _pick(n, count, generator):
    return torch.randint(count, (n,), generator=generator, device=generator.device)


def _checkerboard():
    """The 8 squares of a 4 x 4 board on [-2, 2]^2 whose row + column is even; uniform in each, nothing between."""

    def draw(n, generator):
        square = _pick(n, 8, generator)
        row = square // 2
        column = 2 * (square % 2) + row % 2
        return torch.stack([column, row], dim=1) + _uniform(n, generator, 2) - 2

    def part(x):
        column, row = torch.floor(x + 2).long().unbind(1)
        on_board = (column >= 0) & (column < 4) & (row >= 0) & (row < 4) & ((row + column) % 2 == 0)
        return torch.where(on_board, 2 * row + column // 2, -1)

    return Density(draw, part, 8)


def _rings(radii=(0.6, 1.2, 1.8), width=0.05):
    """Three circles, blurred by a Gaussian across; inside means within three widths of one of them."""

    def draw(n, generator):
        radius = torch.tensor(radii, device=generator.device)[_pick(n, len(radii), generator)]
        radius = radius + width * _normal(n, generator, 1)[:, 0]
        angle = 2 * math.pi * _uniform(n, generator)[:, 0]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)

    def part(x):
        off = (x.norm(dim=1, keepdim=True) - x.new_tensor(radii)).abs()  # (n, rings)
        distance, ring = off.min(dim=1)
        return torch.where(distance < 3 * width, ring, -1)

    return Density(draw, part, len(radii))


def _spirals(turns=1.25, width=0.05):
    """Two arms, radius = 2 angle / (2 pi turns), blurred by a Gaussian; inside means within three widths of an arm."""
    last = 2 * math.pi * turns

    def arm(angle):  # (n,) -> (n, 2)
        return 2 / last * angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)

    def draw(n, generator):
        angle = last * _uniform(n, generator)[:, 0].sqrt()  # the square root spreads the points evenly along the arm
        side = 1 - 2 * _pick(n, 2, generator)[:, None]
        return side * arm(angle) + width * _normal(n, generator)

    def part(x):
        curve = arm(torch.linspace(0, last, 512, device=x.device, dtype=x.dtype))
        distance = torch.stack([torch.cdist(side * x, curve).min(dim=1).values for side in (1, -1)], dim=1)
        nearest, side = distance.min(dim=1)
        return torch.where(nearest < 3 * width, side, -1)

    return Density(draw, part, 2)


class GaussianMixture:
    """Equal-weight round Gaussians N(mean_k, std^2): the one density here whose v, score and p_t are known exactly.

    means (K, D), std a number. Along x_t = (1 - t) x_0 + t eps the density stays a mixture, of N((1 - t) mean_k, s^2)
    with s^2 = (1 - t)^2 std^2 + t^2, and within one component everything is linear in x_t (Gaussian conditioning).
    The tests use it as their oracle.
    """

    def __init__(self, means, std):
        self.means, self.std = torch.as_tensor(means), std

    def draw(self, n, generator):
        """n points (n, D)."""
        means = self.means.to(generator.device)
        return means[_pick(n, len(means), generator)] + self.std * _normal(n, generator, means.shape[1])

    def part(self, x):
        """The component within three standard deviations of a point x (n, D), or -1: (n,)."""
        distance, component = torch.cdist(x, self.means.to(x)).min(dim=1)
        return torch.where(distance < 3 * self.std, component, -1)

    def _conditioning(self, x_t, t):
        t = t[:, None, None]
        off = x_t[:, None, :] - (1 - t) * self.means.to(x_t)  # (B, K, D), from each component's centre
        s2 = (1 - t) ** 2 * self.std**2 + t**2  # (B, 1, 1)
        logits = -off.square().sum(2) / (2 * s2[:, :, 0])  # (B, K)
        return t, off, s2, logits

    def log_density(self, x_t, *, t):
        """log p_t(x_t): (B,), for x_t (B, D) and t (B,) in [0, 1]."""
        _, off, s2, logits = self._conditioning(x_t, t)
        K, D = off.shape[1:]
        return torch.logsumexp(logits, dim=1) - math.log(K) - D / 2 * torch.log(2 * math.pi * s2[:, 0, 0])

    def score(self, x_t, *, t):
        """The gradient of log p_t at x_t: (B, D)."""
        _, off, s2, logits = self._conditioning(x_t, t)
        return (torch.softmax(logits, dim=1)[:, :, None] * -off / s2).sum(dim=1)

    def velocity(self, x_t, *, t):
        """v(x_t, t) = E[eps - x_0 | x_t]: (B, D)."""
        t, off, s2, logits = self._conditioning(x_t, t)
        # in component k: E[eps | x_t] = t/s^2 off,  E[x_0 | x_t] = mean_k + (1 - t) std^2/s^2 off
        v = (t - (1 - t) * self.std**2) / s2 * off - self.means.to(x_t)  # (B, K, D)
        return (torch.softmax(logits, dim=1)[:, :, None] * v).sum(dim=1)


def _mixture():
    """Eight Gaussians on a circle of radius 1.6, standard deviation 0.15."""
    angle = 2 * math.pi * torch.arange(8) / 8
    mixture = GaussianMixture(1.6 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.15)
    return Density(mixture.draw, mixture.part, 8)


DENSITIES = {"checkerboard": _checkerboard, "spirals": _spirals, "rings": _rings, "mixture": _mixture}


# ---------------------------------------------------------------------------------------------------------------------
# Between bytes and the networks' range.
# ---------------------------------------------------------------------------------------------------------------------

# PRIOR: DiT's sampling script. Other code truncates (x + 1)/2 * 255, which darkens by half a level.
UINT8_RULE = "clamp(127.5 x + 128, 0, 255), truncated"


def to_float(images):
    """uint8 (B, H, W, C), numpy -> float32 tensor (B, C, H, W) in [-1, 1], the range that the networks see."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """Tensor (B, C, H, W) in [-1, 1] -> numpy uint8 (B, H, W, C) by UINT8_RULE; undoes `to_float` exactly.

    Raises Diverged if it holds NaN or infinity, which would become black or white pixels that nobody questions."""
    finite = x.isfinite().flatten(1).all(dim=1)  # (B,)
    if not finite.all():
        raise Diverged(f"{int((~finite).sum())} of {len(x)} samples are not finite.", {"term": "sample"})
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# A folder of images
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def read_image(path, size=None, channels=3):
    """Read one image file, centre-cropped where a size is given. -> uint8 (H, W, channels).

    Raises BadInput that names the file if it is truncated, no image, or not 8 bits deep."""
    try:
        # from memory: a length in a damaged file may say 4 GB, and Pillow asks its file for as much
        with Image.open(io.BytesIO(Path(path).read_bytes())) as file:
            if file.mode.startswith(("I", "F")):
                raise BadInput(f"{path} holds {file.mode} pixels; only images of 8 bits per channel are read.")
            image = file.convert("RGB" if channels == 3 else "L")
    except BadInput:
        raise
    except UnidentifiedImageError as error:
        raise BadInput(f"{path} cannot be read as an image (it is of no kind that Pillow knows).") from error
    except Exception as error:  # Pillow has no one type for a damaged file
        raise BadInput(f"{path} cannot be read as an image ({in_short(error)}).") from error
    pixels = np.asarray(centre_crop(image, size) if size else image)
    return pixels.reshape(*pixels.shape[:2], channels)


def centre_crop(image, size):
    """The middle size x size pixels of a PIL image whose short side is first brought down (or up) to `size`.

    PRIOR: ADM (Dhariwal & Nichol, arXiv 2105.05233). Halvings by a box filter while the short side is still at least
    twice too long, then one bicubic resize: plain bicubic from a photo's size would be slower and alias less evenly.
    ImageNet statistics in the literature are of images cropped by this very rule."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def leads_back(folder):
    """Whether a folder is a link to one that holds it: who follows two of these never comes to an end."""
    return folder.is_symlink() and folder.resolve() in {parent.resolve() for parent in folder.absolute().parents}


def list_images(root):
    """All image files below a folder, sorted by path; a dot before a name hides it. Links to folders are followed, but
    for those that lead back. BadInput if there is none."""
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"{root} is not a folder: give the path of one with images in it.")
    paths = []
    for folder, below, names in os.walk(root, followlinks=True):
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
        below[:] = [name for name in below if not name.startswith(".") and not leads_back(Path(folder, name))]
    paths = sorted(p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise BadInput(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): give the path of one that does.")
    return paths


class ImageFolder:
    """Images of a tree with one folder per class; labels (N,) int64 are places in the sorted names of those folders.

    A folder without images in sub-folders is one class. `size` px: centre-crop every image to it; None: take the images
    as they are, which must then all have one size (only their headers are read for that, 10,000 in a second).
    Raises BadInput: no images; images beside class folders; a class without images; sizes that differ."""

    def __init__(self, root, size=None, channels=3):
        self.root, self.paths = Path(root), list_images(root)
        folders = ["".join(p.relative_to(root).parts[:-1][:1]) for p in self.paths]  # "": directly in the root
        self.classes = sorted(set(folders))
        if "" in self.classes and len(self.classes) > 1:
            stray = self.paths[folders.index("")]
            raise BadInput(f"{stray} lies beside folders of classes; move it into one, or away.")
        for path in sorted(self.root.iterdir()) if self.classes != [""] else ():
            if path.is_dir() and path.name not in self.classes and not path.name.startswith("."):
                raise BadInput(f"{path} holds no images, so labels would shift: put its images there, or remove it.")
        place = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([place[name] for name in folders])
        self.channels, self.crop = channels, size
        self.size = size or self._common_size()

    def _common_size(self):
        """The side in px that all images have; BadInput names the first that has not."""
        first = None
        for path in self.paths:
            try:
                with Image.open(path) as file:
                    size = file.size
            except Exception as error:  # Pillow has no one type for a damaged file
                raise BadInput(f"{path} cannot be read as an image ({in_short(error)}).") from error
            first = first or size
            if size != first:
                raise BadInput(f"{path} is {size[0]} x {size[1]} px, the images before it {first[0]} x {first[1]} px.")
        if first[0] != first[1]:
            raise BadInput(f"{self.paths[0]} is {first[0]} x {first[1]} px; only square images are scored.")
        return first[0]

    def __len__(self):
        return len(self.paths)

    def identity(self):
        """What these images depend on, for JSON: the state of every file, and the crop."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(json.dumps(stamp(path)).encode())
        return [digest.hexdigest(), self.crop, self.channels]

    def images(self, indices):
        """uint8 (len(indices), size, size, channels), decoded by several threads."""
        read = functools.partial(read_image, size=self.crop, channels=self.channels)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside of Python's lock
            return np.stack(list(pool.map(read, [self.paths[i] for i in indices])))

    def draw(self, batch, generator, rows=slice(None)):
        """Images, each equally likely. -> x_0 (batch, C, H, W) float32 in [-1, 1], labels (batch,) int64."""
        indices = _pick(batch, len(self), generator).cpu().numpy()[rows]
        labels = torch.from_numpy(self.labels[indices])
        return to_float(self.images(indices)).to(generator.device), labels.to(generator.device)


# ---------------------------------------------------------------------------------------------------------------------
# Images in one npz file: what ADM's evaluator reads. Read and written piece by piece, since 50,000 images of 256 px
# are 10 GB, which np.load and np.savez would hold in memory.
# ---------------------------------------------------------------------------------------------------------------------


def open_array(path, name):
    """An array of an npz file, not yet read: its stream, the place of its first byte, shape, dtype, Fortran's order.

    KeyError if there is none of this name. ValueError, or another error, for what numpy never writes: a header that
    says another size than the file has, pickled objects, which could run any program, or a strange compression."""
    archive = zipfile.ZipFile(path)
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that numpy does not use")
    file = archive.open(entry)
    head = io.BytesIO(file.read(1 << 14))  # numpy's headers take some 100 bytes; one of gigabytes is a trap
    first = np.lib.format.read_magic(head) == (1, 0)
    read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(head)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which are not read: they can run any program")
    size = head.tell() + math.prod(shape) * dtype.itemsize
    # deflate packs at most 1032 bytes into one
    if min(shape, default=0) < 0 or size != entry.file_size or size > 1032 * os.path.getsize(path):
        raise ValueError(f"{name} is not as large as its header says")
    return file, head.tell(), shape, dtype, fortran


class NpzImages:
    """`arr_0` of an .npz file, uint8 (N, H, W, C) with H = W and C = 3 or 1. Raises BadInput on anything else."""

    def __init__(self, path):
        self.path = path
        try:
            self._file, self._start, shape, dtype, fortran = open_array(path, "arr_0")
        except KeyError as error:
            raise BadInput(f"{path} has no array `arr_0` with images.") from error
        except Exception as error:  # zipfile and numpy have no one type for a damaged file
            raise BadInput(f"{path} cannot be read as an npz file ({in_short(error)}).") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] not in (1, 3) or fortran:
            raise BadInput(f"{path} holds arr_0 as {dtype} {shape}; images must be uint8 (N, H, H, 3) or (N, H, H, 1).")
        if shape[0] == 0:
            raise BadInput(f"{path} holds no images.")
        self.shape = shape
        self.size, self.channels = shape[1], shape[3]

    def __len__(self):
        return self.shape[0]

    def identity(self):
        """What these images depend on, for JSON."""
        return stamp(self.path)

    def images(self, indices):
        """uint8 (len(indices), size, size, channels). Ascending indices are read in one pass over the file."""
        bytes_each = self.size * self.size * self.channels
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        try:
            for image, i in zip(images, indices):
                self._file.seek(self._start + int(i) * bytes_each)
                image[:] = np.frombuffer(self._file.read(bytes_each), np.uint8).reshape(image.shape)
        except Exception as error:  # zipfile has no one type for a damaged file
            raise BadInput(f"{self.path} is damaged or cut off at image {int(i)} ({in_short(error)}).") from error
        return images


def read_statistics(path, named):
    """Means and covariances out of an npz: ADM's (mu, sigma, mu_s, sigma_s, arr_0) or pytorch-fid's (mu, sigma).

    named: {feature: (name of the mean, name of the covariance, dimension d)}.
    -> {feature: (mean (d,), covariance (d, d))} in float64, for the features that the file holds; and NpzImages of its
    arr_0, or None. Raises BadInput: no npz, pickled, NaN, another dimension, a mean without its covariance."""

    def read(name, expected):
        file, start, shape, dtype, fortran = open_array(path, name)
        if shape != expected or dtype.kind not in "fiu":
            raise BadInput(f"{path} holds {name} as {dtype} {shape}, not as numbers {expected}.")
        file.seek(start)
        values = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C").astype(np.float64)
        if not np.isfinite(values).all():
            raise BadInput(f"{path} holds NaN or infinity in {name}.")
        return values

    stats = {}
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
        for feature, (mu, sigma, dim) in named.items():
            if mu in keys or sigma in keys:
                stats[feature] = read(mu, (dim,)), read(sigma, (dim, dim))
    except BadInput:
        raise
    except KeyError as error:
        raise BadInput(f"{path} holds one of {mu}, {sigma} without the other.") from error
    except Exception as error:  # zipfile and numpy have no one type for a damaged file
        raise BadInput(f"{path} cannot be read as an npz file of plain arrays ({in_short(error)}).") from error
    return stats, NpzImages(path) if "arr_0" in keys else None


def write_npz(path, source, batch=256):
    """Write all images of a source into an npz in ADM's format, `arr_0` uint8 (N, H, W, 3); grey becomes RGB.

    The file appears under its name only when it is whole."""
    path = Path(path)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(source), source.size, source.size, 3)}

    def write(whole):
        with zipfile.ZipFile(whole, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(source), batch):
                images = source.images(range(start, min(start + batch, len(source))))
                file.write(np.repeat(images, 3 // source.channels, axis=3).tobytes())

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)


# ---------------------------------------------------------------------------------------------------------------------
# Glyphs: digits drawn from fonts. A data set of thin strokes, in which lost detail is seen at once, for a laptop.
# ---------------------------------------------------------------------------------------------------------------------

FACES = (  # OURS: the text faces among matplotlib's fonts; the others hold symbols, or repeat these in another slant
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
    "cmr10", "cmb10", "cmss10", "cmtt10",
)  # fmt: skip
SUPERSAMPLE = 4  # drawn 4 times too large, then averaged: anti-aliasing of strokes that are 1 px wide
# OURS: these three, so narrow that a one-call student this small keeps up with its teacher (README: wider ones).
HEIGHT = (0.635, 0.75)  # TRY: lowest and greatest height of a digit, as a share of the image
MAX_TURN = 6.0  # degrees, either way
MAX_SHIFT = 1 / 24  # of the image, either way, and never so far that a stroke leaves the image
DRAWS_PER_BLOCK = 256  # random numbers come in blocks, because seeding a generator takes longer than drawing from it


@functools.lru_cache(maxsize=4)
def glyph_masters(height):
    """All digits of all faces, `height` px high and cut to their ink. -> PIL images, [face][digit]."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return [[_draw_digit(folder / f"{face}.ttf", str(digit), height) for digit in range(10)] for face in FACES]


def _draw_digit(path, text, height):
    """One master of glyph_masters: drawn about 1.5 times too high, cut to its ink, brought to its height."""
    try:
        font = ImageFont.truetype(str(path), 2 * height)
    except OSError as error:
        raise BadInput(f"{path} is missing: glyphs are drawn with the fonts of the matplotlib package.") from error
    canvas = Image.new("L", (4 * height, 4 * height))
    ImageDraw.Draw(canvas).text((height, height), text, fill=255, font=font)
    ink = canvas.crop(canvas.getbbox())
    return ink.resize((max(1, round(ink.width * height / ink.height)), height), Image.Resampling.LANCZOS)


def glyph_ranges():
    """How much glyphs vary, for JSON: a run folder keeps it, so that no network meets the glyphs of another version."""
    return {"height": list(HEIGHT), "turn": MAX_TURN, "shift": MAX_SHIFT}


@functools.lru_cache(maxsize=16)
def glyph_draws(seed, held_out, block):
    """Random numbers of DRAWS_PER_BLOCK images. -> lists of face, digit, height, turn, right, down, each in [0, 1)."""
    return np.random.default_rng((seed, int(held_out), block)).random((DRAWS_PER_BLOCK, 6)).tolist()


class Glyphs:
    """Digits 0-9, white on black, uint8 (size, size, 1): an endless data set. Image i is a function of (seed, i) alone.

    Face, digit, height and turn are uniform and independent; the shift is uniform in the room that they leave, up to
    MAX_SHIFT. `held_out=True` is another stream of random numbers, for evaluation: no training stream, whatever its
    seed, shares a draw with it.
    size: 16 or 32 px (any even number from 8 on works). seed: 0 .. 2^32 - 1. length: what len() answers, for users that
    need an end; images go on behind it. Raises ValueError on other sizes and seeds."""

    channels = 1

    def __init__(self, size=16, seed=0, held_out=False, length=None):
        if size < 8 or size % 2:
            raise BadInput(f"glyphs have an even size of at least 8 px, not {size}")
        if not 0 <= seed < 2**32:  # a longer seed would spill into the next word of the generator's key, the stream
            raise ValueError(f"the seed must lie in 0 .. 2^32 - 1, not {seed}")
        self.size, self.seed, self.held_out, self.length = size, seed, held_out, length

    def __len__(self):
        if self.length is None:
            raise TypeError("glyphs have no end; give them a length")
        return self.length

    def __getitem__(self, index):
        """-> image uint8 (size, size, 1), label int."""
        block, row = divmod(int(index), DRAWS_PER_BLOCK)
        face, digit, height, turn, right, down = glyph_draws(self.seed, self.held_out, block)[row]
        canvas, label = self.size * SUPERSAMPLE, int(10 * digit)
        master = glyph_masters(round(HEIGHT[1] * canvas))[int(len(FACES) * face)][label]  # only ever zoomed out
        zoom = (HEIGHT[0] + (HEIGHT[1] - HEIGHT[0]) * height) * canvas / master.height
        angle = np.deg2rad(MAX_TURN * (2 * turn - 1))
        c, s = np.cos(angle), np.sin(angle)
        half_w, half_h = zoom * master.width / 2, zoom * master.height / 2
        room_x = min(MAX_SHIFT * canvas, max(0.0, canvas / 2 - abs(c) * half_w - abs(s) * half_h))
        room_y = min(MAX_SHIFT * canvas, max(0.0, canvas / 2 - abs(s) * half_w - abs(c) * half_h))
        x, y = canvas / 2 + room_x * (2 * right - 1), canvas / 2 + room_y * (2 * down - 1)
        # Pillow asks where in the master a pixel (px, py) of the canvas comes from: turn back, zoom back.
        a, b = c / zoom, s / zoom
        affine = (a, b, master.width / 2 - a * x - b * y, -b, a, master.height / 2 + b * x - a * y)
        image = master.transform((canvas, canvas), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        return np.asarray(image.reduce(SUPERSAMPLE))[:, :, None], label

    def batch(self, indices):
        """-> images uint8 (B, size, size, 1), labels int64 (B,)."""
        images, labels = zip(*(self[i] for i in indices))
        return np.stack(images), np.array(labels)

    def identity(self):
        """What these images depend on, for JSON."""
        return ["glyphs", self.size, self.seed, self.held_out, matplotlib.__version__, glyph_ranges()]

    def images(self, indices):
        """uint8 (len(indices), size, size, 1)."""
        return self.batch(indices)[0]

    def draw(self, batch, generator, rows=slice(None)):
        """A batch for training: x_0 (batch, 1, size, size) in [-1, 1], labels (batch,), on the generator's device."""
        # the images behind a random place: neighbours share a block of random numbers, and 2^40 blocks never run out
        block = torch.randint(2**40, (1,), generator=generator, device=generator.device).item()
        start = block * DRAWS_PER_BLOCK
        images, labels = self.batch(range(start, start + batch)[rows])
        return to_float(images).to(generator.device), torch.from_numpy(labels).to(generator.device)


# ---------------------------------------------------------------------------------------------------------------------
# Latents. The teachers for ImageNet live in the latents of a VAE, whose encoder takes 136 GMAC for an image; a forward
# pass of XL/2 takes 119. So each image and its mirror image (mirroring a latent does not give the latent of the
# mirrored image) are encoded once:
#
#   CACHE/manifest.json        what was encoded and by what; of each finished shard the sha256 and the images left out
#   CACHE/moments-00000.npy    float16 (images, 2 flips, mean and logvar, channels, h, w); the next has the next images
#
# Row i is image i of the sorted tree, NaN if it could not be read. The moments are kept, not a draw of the latent.
# OURS: float16. ImageNet's train set takes 1,281,167 x 2 x 2 x 4 x 32 x 32 x 2 bytes = 42 GB; float32 would take 84 GB.
# Rounding moves x_0, whose variance is about 1, by 2e-4 (rms), and the posterior's standard deviation by at most 0.4 %.
# ---------------------------------------------------------------------------------------------------------------------

CACHE_FORMAT = "moments of both flips, 1"
CROP_RULE = "ADM: halvings by a box, then bicubic, centre"


def load_vae(name):
    """-> AutoencoderKL, frozen, of the sizes that its weights have; and the sha256 of their file.

    name: ema, mse (fetched on first use), or a path. Raises BadInput if the file holds anything else."""
    from models import AutoencoderKL, load_weights, read_weights

    path = fetch(PUBLISHED[name], "--vae") if name in PUBLISHED else Path(name)
    sha256 = sha256_file(path)
    try:
        state = read_weights(path)
        resnets = [key.split(".") for key in state if key.startswith("encoder.down_blocks.") and "norm1.weight" in key]
        stages, layers = (1 + max(int(key[place]) for key in resnets) for place in (2, 4))
        convs = [state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"] for i in range(stages)]
        vae = AutoencoderKL([conv.shape[0] for conv in convs], layers, len(state["quant_conv.weight"]) // 2)
        load_weights(vae, state, path)
    except Exception as error:  # names and shapes of another network can break any of these lines
        raise BadInput(f"{path} does not hold the weights of an AutoencoderKL ({in_short(error)}).") from error
    return vae.eval().requires_grad_(False), sha256


def in_tf32():
    """A context for the VAE: its convolutions may round to TF32 on a GPU, torch's default, which `check_device` ends.

    OURS: on an H200, at SD's sizes and random weights, latents move by 0.1 % and images by 0.2 % of their norm, a pass
    takes a fifth of the time or less, and cuDNN is not tempted to take 33 GB for a batch of 8 or 32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=True)


@torch.no_grad()
def encode_moments(vae, x, batch=32):
    """Images x (B, 3, H, W) in [-1, 1] -> mean and logvar of their latents (B, 2, C, h, w), on the VAE's device."""
    device = next(vae.parameters()).device
    with in_tf32():
        return torch.cat([torch.stack(vae.encode(part.to(device)), 1) for part in x.split(batch)])


@torch.no_grad()
def decode_latents(vae, x, scale, batch=16):
    """Latents x (B, C, h, w), `scale` times the VAE's -> images (B, 3, H, W), about [-1, 1] and not clamped."""
    with in_tf32():
        return torch.cat([vae.decode(part / scale) for part in x.split(batch)])


def draw_latents(moments, scale, noise):
    """Moments (B, 2, C, h, w), noise (B, C, h, w) -> x_0 = scale * (mean + std * noise), float32, where noise is."""
    mean, logvar = moments.to(noise).unbind(1)
    return scale * (mean + (logvar / 2).exp() * noise)


def shard_path(cache, k):
    """File of shard k."""
    return Path(cache, f"moments-{k:05d}.npy")


def open_shard(cache, manifest, k):
    """Shard k, memory-mapped: float16 (images, 2, 2, C, h, w). Raises BadInput if it is missing, cut off or foreign."""
    path, each = shard_path(cache, k), manifest["shard images"]
    expected = np.dtype("float16"), (min(each, manifest["images"] - k * each), 2, 2, *manifest["latent"])
    try:
        moments = np.load(path, mmap_mode="r", allow_pickle=False)
        found = moments.dtype, moments.shape
    except Exception as error:  # numpy has no one type for a damaged file
        raise BadInput(f"{path} is missing or damaged ({in_short(error)}): encode again.") from error
    if found != expected:
        raise BadInput(f"{path} holds {found[0]} {found[1]}, not {expected[0]} {expected[1]}: encode again.")
    return moments


def read_manifest(cache):
    """The manifest of a cache, finished or not. Raises BadInput: none, damaged, another format."""
    path = Path(cache, "manifest.json")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("sha256") != sha256_json(manifest):
        raise BadInput(f"{path} is not a manifest of latents, or damaged: remove {cache} and encode again.")
    if manifest.get("format") != CACHE_FORMAT:
        raise BadInput(f"{path} has format {manifest.get('format')!r}, not {CACHE_FORMAT!r}: remove {cache}, encode "
                       "again.")  # fmt: skip
    return manifest


def finished_shards(cache, made):
    """{file name: record} of the shards that earlier runs left in a cache that is to be as the manifest `made` says.

    Raises BadInput: a file, a folder of other things, latents of other images or by another VAE. Writes nothing."""
    if cache.exists() and not cache.is_dir():
        raise BadInput(f"{cache} is a file: name a folder for the latents by --cache.")
    if not (cache / "manifest.json").exists():
        if cache.exists() and any(path.suffix != ".partial" for path in cache.iterdir()):
            raise BadInput(f"{cache} holds no latents, but it is not empty: name another folder by --cache.")
        return {}
    old, differ = read_manifest(cache), []
    for key, now in made.items():
        was = old[key]
        if key == "classes":  # the first that differs, not a thousand names
            was, now = next(((a, b) for a, b in itertools.zip_longest(was, now) if a != b), (None, None))
        if was != now:
            differ.append(f"{key} = {was!r} there and {now!r} now")
    if differ:
        raise BadInput(f"{cache} holds other latents ({', '.join(differ)}): name another folder by --cache.")
    return old["shards"]


def encode_folder(folder, vae, cache, *, vae_sha256, scale, batch=32, shard_images=1024, strict=False):
    """Write the moments of all images of an ImageFolder and of their mirror images, or go on where a call was cut off.

    Finished shards are checked by their sha256, and encoded again only if damaged. Equal batch, device and threads give
    equal bits. An image that can't be read is named and left out. Ctrl-C waits until the shard at hand is written.
    Raises BadInput: a cache of something else, or in which another process works, a size that the VAE can't halve, a
    disk that is too small, all before anything is written; with `strict`, also an image that can't be read."""
    cache, factor = Path(cache), 2 ** (len(vae.encoder.down_blocks) - 1)
    if folder.size % factor:
        raise BadInput(f"a size of {folder.size} px is not a multiple of {factor}, as this VAE needs it.")
    if cache.resolve().is_relative_to(folder.root.resolve()):
        raise BadInput(f"{cache} lies in {folder.root}, where it would count as a class: name another by --cache.")
    names = [str(path.relative_to(folder.root)) for path in folder.paths]
    latent = [vae.quant_conv.out_channels // 2, folder.size // factor, folder.size // factor]
    made = {
        "format": CACHE_FORMAT, "vae sha256": vae_sha256, "scale": scale, "crop": CROP_RULE, "size": folder.size,
        "latent": latent, "shard images": shard_images, "images": len(folder),
        "paths sha256": hashlib.sha256(b"\n".join(map(os.fsencode, names))).hexdigest(),
        "classes": [list(pair) for pair in zip(folder.classes, np.bincount(folder.labels).tolist())],
    }  # fmt: skip
    begun = finished_shards(cache, made)
    if cache.is_dir():
        with alone(cache):  # a second process is refused now, not after minutes of checks
            pass
    records = dict(begun)

    def inspect(k):  # of the shard's bytes alone: one written just before a kill, and not yet recorded, is not lost
        lost = np.isnan(open_shard(cache, made, k)[:, 0, 0, 0, 0, 0]).nonzero()[0] + k * shard_images
        return {"sha256": sha256_file(shard_path(cache, k)), "skipped": [[i, names[i]] for i in lost.tolist()]}

    def images_in(shards):
        return sum(min(shard_images, len(folder) - k * shard_images) for k in shards)

    count, found, missing = math.ceil(len(folder) / shard_images), {}, []
    for k in progress(range(count)[own_share()], "checking"):
        with suppress(BadInput):  # not there, or cut off
            found[k] = inspect(k)
    found = {k: record for part in gathered(found) for k, record in part.items()}
    for k in range(count):
        if k not in found or records.setdefault(shard_path(cache, k).name, found[k]) != found[k]:
            missing.append(k)
    left, image_bytes = images_in(missing), 2 * 2 * 2 * math.prod(latent)
    print(f"{len(folder):,} images of {len(folder.classes):,} classes: {len(folder) * image_bytes / 1e9:.3g} GB of "
          f"latents in {count:,} shards, {len(missing):,} of them to be written.")  # fmt: skip
    disk = next(place for place in [cache.resolve(), *cache.resolve().parents] if place.exists())
    if left * image_bytes > (free := shutil.disk_usage(disk).free):
        raise BadInput(f"{cache} needs {left * image_bytes / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free: "
                       "make room, or name a folder on another disk by --cache.")  # fmt: skip
    if strict and (skipped := [name for record in records.values() for _, name in record["skipped"]]):
        raise BadInput(f"{cache} was begun without {skipped[0]}: repair it and remove {cache}, or leave out --strict.")

    def write_manifest():
        manifest = {**made, "shards": dict(sorted(records.items()))}
        if not world()[0]:
            write_json(cache / "manifest.json", {**manifest, "sha256": sha256_json(manifest)})

    own, written = missing[own_share()], {}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with alone(cache), Patience(), progress(None, "encoding", total=images_in(own), unit=" images") as bar:
            if not world()[0] and finished_shards(cache, made) != begun:
                raise BadInput(f"another process has just worked in {cache}: run the same again.")
            write_manifest()
            gathered(None)  # rank 0 has removed what a kill left half-written
            for k in own:
                rows = range(len(folder))[k * shard_images : (k + 1) * shard_images]
                moments = encode_shard(folder, vae, rows, batch, strict, bar)
                write_whole(shard_path(cache, k), lambda file: np.save(file, moments))
                written[shard_path(cache, k).name] = inspect(k)
                records |= written
                write_manifest()
                Patience.look(together=False)
            for shards in gathered(written):
                records |= shards
            write_manifest()
    except ConnectionError:  # of `gathered`
        raise
    except OSError as error:
        raise BadInput(f"can't write {cache} ({error.strerror}): put that right, then run the same again.") from error
    if world()[0]:
        return
    whole = len(LatentCache(cache))
    print(f"{whole:,} images are in {cache}; skipped because they can't be read: {len(folder) - whole:,}.")


# The disk's or the system's trouble, not the image's: it would be left out for good.
MACHINE_ERRORS = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}


def encode_shard(folder, vae, rows, batch, strict, bar):
    """float16 moments (images, 2, 2, C, h, w) of some images of a folder, NaN for those that can't be read."""

    def read(path):
        try:
            return read_image(path, folder.size)
        except BadInput as error:
            cause = error.__cause__
            if strict or isinstance(cause, MemoryError) or getattr(cause, "errno", None) in MACHINE_ERRORS:
                raise
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            return None

    moments, blank = [], np.zeros((folder.size, folder.size, 3), np.uint8)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        images = pool.map(read, [folder.paths[i] for i in rows])  # reads on while the first ones are encoded
        while part := list(itertools.islice(images, batch)):
            x = to_float(np.stack([blank if image is None else image for image in part]))
            flips = torch.stack([encode_moments(vae, x, batch), encode_moments(vae, x.flip(3), batch)], 1).half()
            if not flips.isfinite().all():
                raise BadInput(f"the VAE makes latents that are not finite of images near {folder.paths[rows[0]]}.")
            flips[torch.tensor([image is None for image in part])] = math.nan  # (images, 2, 2, C, h, w)
            moments.append(flips.cpu().numpy())
            bar.update(len(part))
    return np.concatenate(moments)


class LatentCache:
    """The latents of a tree of images, memory-mapped from what `python data.py --encode` wrote.

    len: images that could be read; labels (len,) int64; names of the `classes`; `size` px of the images; `shape`
    (C, h, w) of a latent; `vae_sha256`. Opening checks the sizes of all shards; running --encode once more checks every
    byte.
    Raises BadInput that names the file: no manifest, not finished, a shard that is missing, cut off or foreign."""

    def __init__(self, path):
        self.path, manifest = Path(path), read_manifest(path)
        self.shape, self.size, self.scale = tuple(manifest["latent"]), manifest["size"], manifest["scale"]
        self.vae_sha256 = manifest["vae sha256"]
        self._each, count = manifest["shard images"], math.ceil(manifest["images"] / manifest["shard images"])
        if len(manifest["shards"]) < count:
            raise BadInput(f"{path} has {len(manifest['shards'])} of {count} shards: run the same --encode again.")
        self._shards = [open_shard(path, manifest, k) for k in range(count)]
        skipped = [i for record in manifest["shards"].values() for i, _ in record["skipped"]]
        self._rows = np.delete(np.arange(manifest["images"]), skipped)
        if not len(self._rows):
            raise BadInput(f"{path} holds no latents: none of its {manifest['images']} images could be read.")
        self.classes, counts = map(list, zip(*manifest["classes"]))
        self.labels = np.repeat(np.arange(len(counts)), counts)[self._rows]  # the tree is sorted by class

    def __len__(self):
        return len(self._rows)

    def draw(self, batch, generator, rows=slice(None)):
        """Images and mirror images, all equally likely. -> x_0 (batch, C, h, w) float32, labels (batch,) int64.

        PRIOR: DiT too trains on mirror images for half of the time."""
        indices = _pick(batch, len(self), generator).cpu().numpy()[rows]
        flips = _pick(batch, 2, generator).tolist()[rows]
        noise = torch.randn(batch, *self.shape, generator=generator, device=generator.device)[rows]
        moments = [self._shards[i // self._each][i % self._each, flip] for i, flip in zip(self._rows[indices], flips)]
        x_0 = draw_latents(torch.from_numpy(np.stack(moments)), self.scale, noise)
        return x_0, torch.from_numpy(self.labels[indices]).to(generator.device)


class EncodedFolder:
    """An ImageFolder seen through a VAE that encodes each image when it is drawn: what LatentCache gives, but slower.

    The same generator draws the same from both, up to the cache's float16. scale multiplies the VAE's latents."""

    def __init__(self, folder, vae, *, scale):
        self.folder, self.vae, self.scale = folder, vae, scale
        self.classes = folder.classes
        side = folder.size // 2 ** (len(vae.encoder.down_blocks) - 1)
        self.shape = (vae.quant_conv.out_channels // 2, side, side)

    def draw(self, batch, generator, rows=slice(None)):
        """Images and mirror images, all equally likely. -> x_0 (batch, C, h, w) float32, labels (batch,) int64."""
        x, y = self.folder.draw(batch, generator, rows)
        flips = _pick(batch, 2, generator).bool()[rows]
        noise = torch.randn(batch, *self.shape, generator=generator, device=generator.device)[rows]
        x = torch.where(flips[:, None, None, None], x.flip(3), x)
        return draw_latents(encode_moments(self.vae, x), self.scale, noise), y


# ---------------------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------------------

# A checkpoint is what torch.save writes, a zip file. Its sha256 stands where the format has room for a comment, at the
# very end: torch.load reads the file as ever, and read_checkpoint refuses one of which a single bit has changed.
SHA256_DIGITS = 64
CHECKPOINT_FORMAT = 1


def write_checkpoint(path, state):
    """Write a dict of tensors, numbers, strings and containers of them, with its sha256; whole or not at all."""

    def write(file):
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch buries the error of a full disk under one of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error
        file.seek(-2, os.SEEK_END)
        file.write(SHA256_DIGITS.to_bytes(2, "little"))  # the length of the zip file's comment, until now 0
        file.write(sha256_start(file, file.tell()).encode())

    write_whole(path, write)


def read_checkpoint(path):
    """What `write_checkpoint` wrote, onto the CPU; nothing in the file is run. Raises anything if it is damaged."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - SHA256_DIGITS))
        tail = file.read()
        if tail[-22:-18] == b"PK\5\6" and tail[-2:] == b"\0\0":  # no comment: older than these checksums
            if part := zipfile.ZipFile(file).testzip():
                raise ValueError(f"the checksum of its part {part} is wrong")
        elif sha256_start(file, size - SHA256_DIGITS).encode() != tail:
            raise ValueError("it is not what its sha256 says")
        file.seek(0)
        if file.read(4) != b"PK\3\4":
            raise ValueError("it is no zip file, as write_checkpoint writes them")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError("it holds no dict")
    return state


def set_aside(path, error):
    """Rename a damaged file of ours, with a warning, so that nothing reads it and nobody loses it."""
    kept = path.with_name(path.name + ".damaged")
    print(f"warning: {path} is damaged ({in_short(error)}); kept as {kept.name}, older work is taken or done anew")
    os.replace(path, kept)


@functools.cache
def code_version():
    """The first 8 digits of the sha256 over these files' sources: checkpoints name the code that made them."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


@contextmanager
def alone(path):
    """Inside, no other process works in this folder. A killed process leaves no lock behind.

    BadInput if one does, or if the folder can't be written to."""
    if world()[0]:  # rank 0 keeps others out
        yield
        return
    if not os.access(path, os.W_OK):
        raise BadInput(f"can't write to {path}: name another folder")
    if fcntl is None:
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in [*Path(path).glob("*.partial"), *Path(path).glob("*/*.partial")]:
            if re.search(r"\.\d+\.partial$", left.name):  # `write_whole`'s, by a process that was killed meanwhile
                left.unlink(missing_ok=True)
    except BlockingIOError:
        os.close(folder)
        raise BadInput(f"another process works in {path}: wait until it is done, or name another folder") from None
    except OSError:  # a disk, mostly of a network, that knows no locks
        pass
    try:
        yield
    finally:
        os.close(folder)


class Patience:
    """Inside, a first Ctrl-C only sets `asked`, which loops check by `look` after saving; a second stops at once."""

    asked = False  # of the whole process, as a signal is

    def __enter__(self):
        self.look()
        self.before = signal.getsignal(signal.SIGINT)
        # the handler stays where Ctrl-C is ignored (nohup), within another Patience, in threads, which can't set one
        self.ours = self.before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
        if self.ours:
            signal.signal(signal.SIGINT, self.note)

    def __exit__(self, *_):
        if self.ours:
            signal.signal(signal.SIGINT, self.before)

    @staticmethod
    def note(number, frame):
        if Patience.asked:
            raise KeyboardInterrupt
        Patience.asked = True
        if not world()[0] and LINE in (None, 1):
            print("stopping as soon as this step is saved; Ctrl-C once more stops at once", file=sys.stderr)

    @classmethod
    def look(cls, together=True):
        """Raise KeyboardInterrupt if Ctrl-C was pressed; on all ranks if on one, where all look equally often."""
        if any(gathered(cls.asked)) if together else cls.asked:
            raise KeyboardInterrupt


class RunFolder:
    """runs/<name>/: config.json, metrics.csv, results.json, pictures, and one checkpoint for each finished stage.

    config: {section: settings}. Scripts that work on one run share its folder and its sections; one that brings a new
    section adds it. Made, with its parents, if it is not there. Raises BadInput if the path is a file or can't be
    written, if the folder holds something that is no run, or a section with other settings: nothing is overwritten.
    named: sections that the command line's --name chooses; of these, another name is a remedy too.
    """

    def __init__(self, path, config, named=()):
        self.path = Path(path)
        config = json.loads(json.dumps(config))  # as it will be read back: tuples become lists
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"can't make {self.path} ({error.strerror}): name another run folder with --out") from None
        there, old = self.path / "config.json", {}
        if there.exists():
            old = read_json(there)
            checksum = old.pop("sha256", None) if isinstance(old, dict) else None  # none: older than these checksums
            if not isinstance(old, dict) or not all(isinstance(section, dict) for section in old.values()):
                raise BadInput(f"{there} is not the configuration of a run: name another folder with --out")
            if checksum not in (None, sha256_json(old)):
                raise BadInput(f"{there} is damaged or was edited: put it back as it was, or name another folder with "
                               "--out; without its line of sha256 it is taken as it is")  # fmt: skip
            for section in config.keys() & old.keys():
                was, now = old[section], config[section]
                changed = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
                if changed:
                    was = ", ".join(f"{key} = {was.get(key)!r} there and {now.get(key)!r} now" for key in changed)
                    other = "another variant with --name, or another run with --out"
                    raise BadInput(f"{self.path} holds a run of another configuration (of {section}: {was}): "
                                   f"name {other if section in named else 'another with --out'}")  # fmt: skip
        elif any(path.suffix != ".partial" and path.name != "teacher.pt" for path in self.path.iterdir()):
            raise BadInput(f"{self.path} is no run folder, but it is not empty: name another folder with --out")
        self.config = old | config  # all sections, those of other scripts too
        try:
            if old != self.config:
                with alone(self.path):
                    write_json(there, self.config | {"sha256": sha256_json(self.config)})
        except OSError as error:
            raise BadInput(f"can't write to {self.path} ({error.strerror}): name another folder with --out") from None

    def read(self, path):
        """A checkpoint's dict, or None with a warning where it is damaged. Raises BadInput if it is another run's."""
        try:
            state = read_checkpoint(path)
        except (OSError, MemoryError):
            raise  # the machine's trouble, not the file's
        except Exception as error:  # torch has no one type for "this file is damaged"
            set_aside(path, error)
            return None
        made = state.get("made", {"format": 0, "config": {}})  # none: older than these records
        if made["format"] > CHECKPOINT_FORMAT:
            raise BadInput(f"{path} has format {made['format']}, this code reads up to {CHECKPOINT_FORMAT}: update")
        # a teacher knows nothing of its students: teacher.pt may be copied into a run with others
        own = {"network", "teacher", "data"} if Path(path).stem == "teacher" else made["config"].keys()
        for section in own & made["config"].keys() & self.config.keys():
            if made["config"][section] != self.config[section]:
                raise BadInput(f"{path} was made in a run with other settings of {section}: take it out of this folder")
        return state

    def write(self, path, state):
        """Write a checkpoint that tells where it comes from."""
        if world()[0]:
            return
        made = {"format": CHECKPOINT_FORMAT, "code": code_version(), "config": self.config}
        write_checkpoint(path, {**state, "made": made})

    def finished(self, name):
        """The dict of a finished stage, or None."""
        path = self.path / f"{name}.pt"
        return self.read(path) if path.exists() else None

    def stage(self, name, compute):
        """The dict that compute(keep) returns: from <name>.pt if an earlier run finished this stage, else computed.

        keep: a `Keep`, with which a long stage saves itself on the way. The dict holds tensors, numbers, strings and
        containers of them. A stage that diverges leaves a report, <name>.diverged.json.
        """
        with in_turn():
            state, keep, report = self.finished(name), Keep(self, name), self.path / f"{name}.diverged.json"
        agree(state is None)
        if state is None:
            with Patience():
                try:
                    state = {**compute(keep), "finished": time.time()}
                except Diverged as error:
                    if not world()[0]:
                        write_json(report, {"stage": name, "said": str(error), **error.report})
                    raise Diverged(f"{error} {report} tells more; what was saved before is kept.") from error
                self.write(self.path / f"{name}.pt", state)
            Patience.look()  # and so wait until it is there
            report.unlink(missing_ok=True)
        elif state.get("rows") and not world()[0]:  # rows that are missing where metrics.csv was damaged
            network, seed = state["rows"][0]["network"], str(state["rows"][0]["seed"])
            if not any((row["network"], row["seed"]) == (network, seed) for row in self.read_metrics()):
                self.write_metrics(state["rows"])
        keep.discard()
        return state

    def stages(self):
        """{name: dict} of all finished stages, in the order in which they were finished."""
        states = {path.stem: self.read(path) for path in self.path.glob("*.pt")}
        whole = {name: state for name, state in states.items() if state is not None}
        return dict(sorted(whole.items(), key=lambda item: item[1].get("finished", 0)))

    def read_metrics(self):
        """The rows of metrics.csv, their values as text; a damaged file is put aside with a warning."""
        path = self.path / "metrics.csv"
        if not path.exists():
            return []
        try:
            comment, body = path.read_bytes().split(b"\n", 1)
            if b"sha256" in comment and not comment.endswith(hashlib.sha256(body).hexdigest().encode()):
                raise ValueError("it is not what its sha256 says")
            rows = list(csv.DictReader(io.StringIO(body.decode())))
            if any(None in row or None in row.values() or not {"network", "seed"} <= row.keys() for row in rows):
                raise ValueError("its rows are not as long as its head")
        except (ValueError, csv.Error) as error:
            set_aside(path, error)
            return []
        return rows

    def write_metrics(self, rows):
        """Rows (dicts) to metrics.csv, in the place of those there of the same network and seed."""
        if world()[0]:
            return
        new = {(row["network"], str(row["seed"])) for row in rows}
        rows = [row for row in self.read_metrics() if (row["network"], row["seed"]) not in new] + rows
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        body = text.getvalue().encode()
        comment = f"# {METRICS_COMMENT} sha256 of the lines below: {hashlib.sha256(body).hexdigest()}\n"
        write_whole(self.path / "metrics.csv", lambda file: file.write(comment.encode() + body))


METRICS_COMMENT = ("loss of MeanFlow (p = 1) is about 1 by construction: watch raw_error, the squared error before it "
                   "is weighted. clipped is the share of steps since the row before whose gradient was longer than the "
                   "plan's clip. A column is empty where a network does not have it.")  # fmt: skip


class Keep:
    """What an unfinished stage of a run saves on its way, so that a killed one goes on where it was, to the same bits.

    parts: {name: anything with state_dict and load_state_dict}, all that a loop changes. Its randomness is a function
    of the step, so there is no more to save than the parts, the number of steps done, and the rows of metrics.
    """

    EVERY = 60  # seconds between two saves, at least: what a kill costs

    def __init__(self, run, name):
        self.run, self.path, self.pause = run, run.path / f"{name}.unfinished", self.EVERY
        self.older = run.path / f"{name}.unfinished.older"
        self.saved = self.start = time.monotonic()

    def seconds(self):
        """The time behind what the stage holds, over all processes that worked on it; what a kill cost is left out."""
        return time.monotonic() - self.start

    def restore(self, parts):
        """Bring the parts to where they were saved last. -> steps done, rows; (0, []) if nothing was."""
        with in_turn():
            for path in (self.path, self.older):
                state = self.run.read(path) if path.exists() else None
                if state is not None:
                    break
        agree(state and state["steps"])
        if state is None:
            return 0, []
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.start -= state["seconds"]
        return state["steps"], state["rows"]

    def save(self, parts, steps, rows):
        """Save the parts after `steps` steps, if the last save was long ago, or Ctrl-C was pressed: then it stops."""
        due = time.monotonic() - self.saved >= self.pause and not world()[0]
        if not any(gathered(Patience.asked or due)):
            return
        if not world()[0]:
            self.save_now(parts, steps, rows)
        Patience.look()

    def save_now(self, parts, steps, rows):
        """`save`, on rank 0."""
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"steps": steps, "rows": rows, "seconds": self.seconds()}
        begun = time.monotonic()
        if self.path.exists():
            os.replace(self.path, self.older)  # stays until the new one is whole, and until the next after that
        self.run.write(self.path, state)
        self.run.write_metrics(rows)
        self.saved = time.monotonic()
        # an XL/2's state is 11 GB: a save that takes longer than a twentieth of the pause makes the next pause longer
        self.pause = self.EVERY * max(1.0, 20 * (self.saved - begun) / 60)

    def discard(self):
        """Remove what was saved: the stage is finished."""
        for path in (self.path, self.older):
            path.unlink(missing_ok=True)


def save_png(path, image):
    """Write one uint8 image (H, W, C)."""
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    write_whole(path, lambda file: picture.save(file, "png"))


# The colours of Okabe and Ito, which all eyes tell apart. In every picture HD is orange, TD blue, data black or grey.
ORANGE, BLUE, GREY = "#d55e00", "#0072b2", "#777777"
GREEN, PINK, *_ = OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def new_figure(width, height, rows=1, columns=1, grid=True, **options):
    """A figure of width x height inches, for a file and no window, and its axes as `Figure.subplots` gives them."""
    figure = Figure(figsize=(width, height), constrained_layout=True)
    axes = figure.subplots(rows, columns, **options)
    for axis in figure.axes if grid else ():
        axis.grid(alpha=0.3)
    return figure, axes


def save_figure(path, figure):
    """Write a PNG of at most 128 colours: a third of the bytes, and no difference that one sees."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=100)
    picture = Image.open(whole).convert("RGB").quantize(128)
    write_whole(path, lambda file: picture.save(file, "PNG", optimize=True))


def save_grid(path, images, columns):
    """Write uint8 images (N, H, W, C) as one picture, row by row; each pixel of small ones becomes 4 x 4."""
    N, H, W, C = images.shape
    rows, zoom = -(-N // columns), 4 if H < 64 else 1
    sheet = np.zeros((rows * columns, H, W, C), np.uint8)
    sheet[:N] = images
    sheet = sheet.reshape(rows, columns, H, W, C).transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, C)
    sheet = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, sheet)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Encode a tree of images as the command line says; bad input ends with one sentence and exit code 2."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser("data.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--encode", action="store_true", required=True, help="write the latents of --data-dir to --cache, or go on")
    add("--data-dir", type=Path, required=True, metavar="DIR", help="a folder with one folder of images for each class")
    add("--cache", type=Path, required=True, help="folder for the latents; ImageNet's take 42 GB")
    add("--vae", default="ema", metavar="ema|mse|PATH", help="weights of Stable Diffusion's VAE (%(default)s)")
    add("--size", type=whole_number(8, 4096), default=256, help="px that images are cropped to (%(default)s)")
    add("--batch", type=whole_number(1, 4096), default=32, help="images encoded at once, 1 .. 4096 (%(default)s)")
    add("--device", choices=devices, default=devices[0], help="what runs the VAE (%(default)s)")
    add("--strict", action="store_true", help="stop at an image that can't be read, instead of leaving it out")
    add("--shard-images", type=whole_number(1, 2**20), default=1024, metavar="N", help="in one file (%(default)s)")
    args = parser.parse_args(argv)
    from models import SD_VAE_SCALE

    check_device(parser, args.device)
    with sentences(parser, args.device):
        folder = ImageFolder(args.data_dir, size=args.size)
        with in_turn():
            vae, vae_sha256 = load_vae(args.vae)
        encode_folder(folder, vae.to(args.device), args.cache, vae_sha256=vae_sha256, scale=SD_VAE_SCALE,
                      batch=args.batch, shard_images=args.shard_images, strict=args.strict)  # fmt: skip


if __name__ == "__main__":
    main()

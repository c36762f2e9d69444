"""What is drawn, read and saved: random numbers, the file that a killed run resumes from, results, images, latents.

Randomness is a function of (seed, stream, step), never of history. So a stage of training is ONE file, which `go_on`
writes every minute: networks, optimisers, step. The same command resumes from it, bit for bit on the CPU.
Images are uint8 (H, W, C) in files, and float (B, C, H, W) in [-1, 1] for networks. A source of training data is a
function draw(batch, generator) -> x_0 (B, ...), y (B,): `draw_glyphs`, `ImageFolder.draw`, `Latents.draw`.
"""

import functools
import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

# Which of torchrun's processes this is, and how many there are. Part k of a batch belongs to rank k % RANKS.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class BadInput(SystemExit):
    """A sentence for whoever typed the command: Python prints it instead of a traceback, and exits with 1."""


@contextmanager
def blame(what, remedy):
    """Any error inside, from reading a truncated or wrong file, becomes BadInput: what, why, remedy."""
    try:
        yield
    except Exception as error:  # neither torch nor numpy nor Pillow has one type for all of them
        said = " ".join(str(error).split("Weights only")[0].split())  # torch goes on with how to load it unsafely
        raise BadInput(f"{what} ({type(error).__name__}: {said:.200}): {remedy}") from error


def rng(seed, *stream, device="cpu"):
    """A torch.Generator for one purpose: rng(0, "td", step, part). The same words give the same numbers, always."""
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def progress(items, label, **options):
    """A tqdm bar. Where no terminal is watching, it prints only twice a minute, so that a log stays short."""
    return tqdm(items, label, mininterval=0.2 if sys.stderr.isatty() else 30, disable=RANK > 0, **options)


def join(device):
    """Choose the device, "cpu" or "cuda", and become one of torchrun's processes if it has started us. -> device"""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no CUDA GPU here; leave --device out to use the CPU")
    torch.backends.cudnn.allow_tf32 = False  # du/dt and Inception need all digits; the VAE, which does not, allows it
    if RANKS > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return torch.device(device)


# --- Save, and go on -------------------------------------------------------------------------------------------------


def put(path, write):
    """write(beside), then rename: whenever the process is killed, `path` is whole, the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    write(beside)
    os.replace(beside, path)


def save(path, state):
    """A dict of tensors and numbers, for `load`."""
    put(path, lambda beside: torch.save(state, beside))


def write_json(path, value):
    """A value, for people and other programs."""
    put(path, lambda beside: beside.write_text(json.dumps(value, indent=1) + "\n"))


def load(path, hint):
    """What `save` wrote, on the CPU. Nothing in the file is run. hint: the remedy where there is no such file."""
    if not Path(path).is_file():
        raise BadInput(f"{path} is not there: {hint}")
    with blame(f"{path} can't be read", "remove it, or name another file"):
        return dict(torch.load(path, map_location="cpu", weights_only=True))


def check_made(path, was, now):
    """BadInput unless `was`, the dict that says how `path` was made, agrees with the dict `now`; no tuples in them."""
    for key, value in now.items():
        if was.get(key) != value:
            raise BadInput(f"{path} was made with {key} = {was.get(key)!s:.99}, not {value!s:.99}: give the same "
                           "flags, or name another folder (--out, --cache)")  # fmt: skip


def go_on(path, parts, one_step, *, steps, config, look=None, look_every=500, every=60.0, log_every=100):
    """Call one_step(k) -> {name: scalar tensor} for k = 0 .. steps - 1, or from where an earlier call was stopped.
    path: the file of this stage; beside it, <name>.csv gets a row for every `log_every` steps. parts: {name: module or
    optimizer}, all that the steps change. config: must match the file's. every: seconds between saves. look(n): draws
    after n steps, every `look_every` and the last. BadInput: config differs; or a NaN (the last save is kept)."""
    if steps < 1:
        raise BadInput(f"{path.stem} with {steps} steps: give at least 1")
    config = json.loads(json.dumps(config | {"steps": steps}))  # as it is read back: tuples become lists
    first, rows, saved = 0, [], time.monotonic()
    if path.exists():
        state = load(path, "")
        check_made(path, state.get("config", {}), config)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, rows = state["step"], state["rows"]
    bar = progress(range(first, steps), path.stem, initial=first, total=steps) if first < steps else ()
    for step in bar:
        values = {name: value.item() for name, value in one_step(step).items()}
        if bad := [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]:
            raise BadInput(f"{path.stem}, step {step}: {', '.join(bad)}. The last save is kept, and the same command "
                           "goes on from it. If it ends here again: a lower rate in the script, and a new --out.")
        last = step == steps - 1
        if step % log_every == 0 or last:
            rows.append({"step": step} | values)
            bar.set_postfix(list(values.items())[:2], refresh=False)
        if RANK == 0 and look and ((step + 1) % look_every == 0 or last):
            look(step + 1)
        if RANK == 0 and (last or time.monotonic() - saved > every):
            state = {name: part.state_dict() for name, part in parts.items()}
            save(path, state | {"step": step + 1, "rows": rows, "config": config})
            lines = [rows[0], *(row.values() for row in rows)]  # every step logs the same numbers
            path.with_suffix(".csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
            saved = time.monotonic()


# --- Results: rows, which are dicts of "what" was run, its "seed", other facts, and measures --------------------------


def over_seeds(rows, facts, measures):
    """One row for all rows of one "what" and equal facts: of each measure (mean, deviation); "seeds", their number."""
    groups, joined = {}, []
    for row in rows:
        groups.setdefault((row["what"], *map(row.get, facts)), []).append(row)
    for group in groups.values():
        values = {key: [row[key] for row in group] for key in measures}
        spreads = {key: (np.mean(v), np.std(v, ddof=len(v) > 1)) for key, v in values.items()}  # of one row: 0
        joined.append(group[0] | spreads | {"seeds": len(group)})
    return joined


def report(path, rows, facts, measures):
    """Write the rows as JSON, and print those of `over_seeds`: what, the facts, the measures as mean +- deviation."""
    write_json(path, rows)
    columns = [*facts, "seeds", *measures]
    print(" " * 30 + "".join(f"{name:>18}" for name in columns))
    for row in over_seeds(rows, facts, measures):
        spreads = {key: f"{row[key][0]:.4f}" + f" +- {row[key][1]:.4f}" * bool(row[key][1]) for key in measures}
        print(f"{row['what']:30}" + "".join(f"{(row | spreads).get(name, ''):>18}" for name in columns))


def plot_curves(path, rows, x, measures, curves, title):
    """A panel for each of measures, {key: (label, its axis' scale)}: mean and spread over the seeds against x, a key of
    the rows. curves: {what: matplotlib's style of its curve}; a style without a marker makes a level line."""
    figure = matplotlib.figure.Figure((4.4 + 3.2 * len(measures), 4.8), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(measures), squeeze=False)
    joined = over_seeds(rows, [x], measures)
    ticks = sorted({row[x] for row in joined if "marker" in curves.get(row["what"], ())})
    for axis, (key, (label, scale)) in zip(axes[0], measures.items()):
        for what, style in curves.items():
            points = sorted((row.get(x, 0), *row[key]) for row in joined if row["what"] == what)
            if points and "marker" in style:
                axis.errorbar(*zip(*points), capsize=3, **{"label": what} | style)  # at x: mean, deviation
            elif points and points[0][1] > 0:  # 0 has no place on a logarithmic axis
                axis.axhline(points[0][1], **{"label": what} | style)
        axis.set(xlabel=x, ylabel=label, xscale="log", yscale=scale)
        axis.set_xticks([], minor=True)
        axis.set_xticks(ticks, [f"{at:,}" for at in ticks], rotation=45, fontsize=8)
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(measures))
    figure.suptitle(f"{title}\nbars: standard deviation over the seeds")
    figure.savefig(path)


# --- Images. Glyphs are digits from matplotlib's fonts; face, height, turn in degrees and place are drawn uniformly ---
FACES = ("DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif DejaVuSerif-Bold"
         " DejaVuSerif-Italic STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10 cmb10 cmss10 cmtt10").split()


@functools.cache
def glyph(face, digit, height):
    """A digit of a face, cut to its ink, `height` px high: a PIL image."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{FACES[face]}.ttf")), 2 * height)
    canvas = Image.new("L", (4 * height, 4 * height))
    ImageDraw.Draw(canvas).text((height, height), str(digit), fill=255, font=font)
    ink = canvas.crop(canvas.getbbox())
    return ink.resize((max(1, round(ink.width * height / ink.height)), height), Image.Resampling.LANCZOS)


def glyphs(labels, generator, size=16):
    """Digits, white on black, one for each of labels (B,): float (B, 1, size, size) in [-1, 1]."""
    draws = torch.rand(len(labels), 5, generator=generator, device=generator.device).tolist()
    side, images = 4 * size, []  # four times too large, and averaged down at the end, so that edges are smooth
    for digit, (face, height, turn, *place) in zip(labels.tolist(), draws):
        upright = glyph(int(len(FACES) * face), digit, round(side * (0.5 + 0.25 * height)))
        turned = upright.rotate(15.0 * (2 * turn - 1), Image.Resampling.BILINEAR, expand=True)
        rooms = [(side - length) / 2 for length in turned.size]  # on either side of a glyph in the middle
        left, top = (round(room + min(side / 8, room) * (2 * at - 1)) for room, at in zip(rooms, place))
        images.append(np.asarray(turned.crop((-left, -top, side - left, side - top)).reduce(4)))  # black around it
    return to_float(np.stack(images)[..., None]).to(generator.device)


def draw_glyphs(batch, generator, size=16):
    """Glyphs of random digits: x_0 (batch, 1, size, size), labels y (batch,)."""
    y = torch.randint(10, (batch,), generator=generator, device=generator.device)
    return glyphs(y, generator, size), y


def to_float(images):
    """uint8 (B, H, W, C), numpy -> float32 tensor (B, C, H, W) in [-1, 1], the range that the networks see."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """Tensor (B, C, H, W) in about [-1, 1] -> numpy uint8 (B, H, W, C); undoes `to_float` exactly."""
    # PRIOR: clamp(127.5 x + 128, 0, 255), truncated, as DiT's sampling script does; others darken by half a level
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path, x, columns=10):
    """Images x (N, C, H, W) in about [-1, 1] as one PNG, row by row; those that fill no whole row are left out."""
    images = to_uint8(x)
    sheet = np.vstack([np.hstack(images[i : i + columns]) for i in range(0, len(images) - columns + 1, columns)])
    put(path, lambda beside: Image.fromarray(sheet.squeeze(2) if sheet.shape[2] == 1 else sheet).save(beside, "png"))


def centre_crop(image, size):
    """The middle size x size pixels of a PIL image whose short side is first brought down (or up) to `size`.
    PRIOR: ADM (Dhariwal & Nichol, arXiv 2105.05233): halvings by a box filter while the short side is at least twice
    too long, then one bicubic resize. The statistics of ImageNet in the literature are of images cropped so."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = ImageOps.scale(image, size / min(image.size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageFolder:
    """root/<class>/<image>, as ImageNet's train/n01440764/*.JPEG, [i] -> uint8 (H, W, 3); labels: places in `classes`.
    size: px, to which an image is centre-cropped; None leaves it. upright: turn an image as its EXIF entry says, which
    ADM's rule for ImageNet does not. pattern: of the files. BadInput: no images, or, when it is read, a damaged one."""

    def __init__(self, root, size=None, upright=False, pattern="*/*"):
        self.size, self.upright = size, upright
        readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = sorted(p for p in Path(root or "no --data-dir").glob(pattern) if p.is_file() and p.name[0] != ".")
        self.paths = [path for path in files if path.suffix.lower() in readable]
        if not self.paths:
            raise BadInput(f"{root} holds no images at {pattern}: give a folder like ImageNet's train/, by --data-dir")
        classes, labels = np.unique([path.parent.name for path in self.paths], return_inverse=True)  # sorted by name
        self.classes, self.labels = classes.tolist(), torch.from_numpy(labels)
        if RANK == 0:
            print(f"{root}: {len(self.paths):,} images of {len(self.classes):,} classes, "
                  f"{', '.join(self.classes[:3])} ... {len(files) - len(self.paths)} files left out as no images.")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with blame(f"{self.paths[i]} can't be read as an image", "repair or replace it"):
            image = Image.open(self.paths[i])
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel")
            image = (ImageOps.exif_transpose(image) if self.upright else image).convert("RGB")
        return np.asarray(centre_crop(image, self.size) if self.size else image)

    def read(self, rows):
        """Images of the indices `rows`: float (B, 3, size, size) in [-1, 1]."""
        with ThreadPoolExecutor(8) as pool:  # Pillow decodes outside of Python's lock
            return to_float(np.stack(list(pool.map(self.__getitem__, rows))))

    def draw(self, batch, generator):
        """Images, each equally likely: x_0 (batch, 3, size, size), labels y (batch,)."""
        i = torch.randint(len(self), (batch,), generator=generator, device=generator.device).cpu()
        return self.read(i.tolist()).to(generator.device), self.labels[i].to(generator.device)


@torch.no_grad()
def encode(folder, vae, cache, about, batch=32):
    """Write the latents of all images of a folder, and of their mirror images, or resume a stopped call.
    cache/moments.npy: float16 (N, 2 views, mean and logvar, C, h, w); two views, since a latent can't be mirrored.
    info.json: how much is done, and `about`, which must be as it was. BadInput: it is not; an image can't be read."""
    note, about = cache / "info.json", about | {"images": len(folder), "size": folder.size, "classes": folder.classes}
    info = json.loads(note.read_text()) if note.exists() else about | {"done": 0}
    check_made(cache, info, about)
    save(cache / "labels.pt", {"labels": folder.labels})
    for start in progress(range(info["done"], len(folder), batch), "encoding"):
        rows = range(start, min(start + batch, len(folder)))
        x = folder.read(rows).to(next(vae.parameters()).device)
        views = torch.stack([torch.stack(vae.encode(v), 1) for v in (x, x.flip(3))], 1)  # (B, 2, 2, C, h, w)
        shape = len(folder), *views.shape[1:]
        moments = np.lib.format.open_memmap(cache / "moments.npy", "r+" if start else "w+", np.float16, shape)
        moments[start : rows.stop] = views.half().cpu()
        moments.flush()  # before the note, which vouches for it
        write_json(note, info | {"done": rows.stop})


class Latents:
    """What `encode` wrote; it is called first if a folder is given. BadInput: not all is encoded, or not as `about`."""

    def __init__(self, cache, vae, folder=None, about={}):
        if folder and RANKS == 1:
            encode(folder, vae, Path(cache), about)
        note = Path(cache, "info.json")
        info = json.loads(note.read_text()) if note.exists() else {"done": 0, "images": "all"}
        if info["done"] != info["images"]:
            raise BadInput(f"{cache} has {info['done']} of {info['images']} latents: give --data-dir, without torchrun")
        check_made(cache, info, about)
        self.moments = np.load(Path(cache, "moments.npy"), mmap_mode="r")
        self.labels = load(Path(cache, "labels.pt"), "give --data-dir once more")["labels"]
        self.classes, self.shape, self.scale = info["classes"], self.moments.shape[3:], vae.scale

    def draw(self, batch, generator):
        """Latents of images and mirror images, all equally likely: x_0 (batch, C, h, w), labels y (batch,)."""
        device = generator.device
        i, view = (torch.randint(n, (batch,), generator=generator, device=device).cpu() for n in (len(self.labels), 2))
        mean, logvar = torch.from_numpy(self.moments[i, view]).to(device).float().unbind(1)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        return self.scale * (mean + (logvar / 2).exp() * noise), self.labels[i].to(device)

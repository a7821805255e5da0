"""Trains SiD2, in one process or many.

    python train.py                                        shapes, a few minutes on a CPU
    python train.py --preset cifar10                       one GPU
    torchrun --nproc_per_node=8 train.py --preset imagenet256_p2 --data FOLDER

The same command again goes on from the last checkpoint, on a CPU bit for bit. SIGTERM or Ctrl-C
writes one after the step, a second Ctrl-C does not wait. Whatever is random at step n is a function
of the seed and n, or of the seed and the number of an image, counted over the run: nothing else
needs to be remembered, and neither the number of processes nor the micro-batch changes what the
network sees (dropout draws anew for each).
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import tarfile
import time
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sid2
from sample import (ImageError, Parser, agree, autocast, choose_labels, choose_precision, fail,
                    grid, guarded, leave, load_checkpoint, make_config, open_npz_images, replacing,
                    sample_images, setup, sha256, shown_classes, sweep, write_json)

# --------------------------------------------------------------------------------------------------
# 1. Data. `batch(numbers)` gives uint8 images (B, H, W, 3) and int64 labels (B,) for the numbers of
#    images counted over the run: 0, 1, 2, ... without end


class Shapes:
    """Six shapes in any place, size and colour, drawn on the fly from the seed and the number."""

    name, counts, content, read = "shapes, drawn on the fly", None, "shapes", None
    shapes = {  # inside or not, at a to the right and b down from the centre, in radii
        "disc": lambda a, b: a**2 + b**2 < 1,
        "ring": lambda a, b: abs(a**2 + b**2 - 0.65) < 0.35,
        "square": lambda a, b: np.maximum(abs(a), abs(b)) < 0.85,
        "triangle": lambda a, b: (b < 0.8) & (b > 2 * abs(a) - 1),
        "cross": lambda a, b: (np.maximum(abs(a), abs(b)) < 1) & (np.minimum(abs(a), abs(b)) < 0.3),
        "moon": lambda a, b: (a**2 + b**2 < 1) & ((a - 0.5) ** 2 + b**2 > 0.7),
    }
    classes = list(shapes)

    def __init__(self, image_size: int, seed: int):
        self.size, self.seed = image_size, seed

    def batch(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = (np.random.default_rng([self.seed, n]) for n in numbers)
        u = np.stack([r.random(11, np.float32) for r in rng])
        labels = (u[:, 0] * len(self.classes)).astype(np.int64)
        radius = 0.26 + 0.16 * u[:, 1:2]  # of the image's width
        centre = radius + u[:, 2:4] * (1 - 2 * radius)  # the whole shape is in the picture
        dark, light = 0.35 * u[:, 4:7], 0.35 + 0.65 * u[:, 7:10]
        light[np.arange(len(u)), (3 * u[:, 10]).astype(int)] = 1  # one full channel for contrast

        side = 4 * self.size  # 4 x 4 points per pixel
        points = (np.arange(side, dtype=np.float32) + 0.5) / side
        a, b = ((points - centre[:, i : i + 1]) / radius for i in range(2))
        a, b, inside = a[:, None, :], b[:, :, None], np.empty((len(u), side, side), bool)
        for label, shape in enumerate(self.shapes.values()):
            inside[labels == label] = shape(a[labels == label], b[labels == label])
        cover = inside.reshape(-1, self.size, 4, self.size, 4).mean((2, 4), dtype=np.float32)
        cover, dark, light = cover[..., None], dark[:, None, None], light[:, None, None]
        return (255 * (dark * (1 - cover) + light * cover) + 0.5).astype(np.uint8), labels

    def names(self, numbers: np.ndarray) -> list:
        return numbers.tolist()


class Images:
    """Stored images, each once per epoch, in a new order every epoch.

    `read(index)` gives those at places `index` of the set, from the cache or decoded from files;
    `content` tells one set from another, `skip` are places of images to leave out.
    """

    def __init__(self, name: str, read, labels: np.ndarray, classes: list[str], seed: int,
                 content: str, skip: tuple = (), files: tuple = ()):
        self.name, self.read, self.classes, self.seed = name, read, classes, seed
        self.places = np.setdiff1d(np.arange(len(labels)), skip)
        self.labels, self.content, self.files = labels.astype(np.int64), content, files
        self.counts = np.bincount(self.labels[self.places], minlength=len(classes)).tolist()
        self.epoch, self.order = None, None

    def index(self, numbers: np.ndarray) -> np.ndarray:
        """Their places in the set."""
        index, epochs = np.empty(len(numbers), np.int64), numbers // len(self.places)
        for epoch in np.unique(epochs):
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.epoch, self.order = epoch, rng.permutation(self.places)
            index[epochs == epoch] = self.order[numbers[epochs == epoch] % len(self.places)]
        return index

    def batch(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = self.index(numbers)
        return self.read(index), self.labels[index]

    def names(self, numbers: np.ndarray) -> list:
        return [str(self.files[i]) if self.files else int(i) for i in self.index(numbers)]


class Files:
    """Decodes image files to image_size, RGB. Item i is an image, or black, and what is wrong."""

    def __init__(self, files: list[Path], image_size: int):
        self.files, self.size = files, image_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[np.ndarray, str]:
        try:
            with Image.open(self.files[i]) as image:
                return np.asarray(centre_crop(to_rgb(image), self.size, fast=True)), ""
        except Exception as error:  # Pillow's decoders raise many kinds
            return np.zeros((self.size, self.size, 3), np.uint8), f"{self.files[i]} ({error})"

    def __call__(self, index: np.ndarray) -> np.ndarray:
        images, errors = zip(*(self[i] for i in index))
        if any(errors):
            raise ImageError(f"{max(errors)} can no longer be read: restore it")
        return np.stack(images)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF tag; 16-bit grey scaled to 8 bits; transparency laid over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int, fast: bool = False) -> Image.Image:
    """ADM's crop, which the published ImageNet FIDs use: halved by box while twice too large, then
    bicubic, then the centre. (ADM itself does not turn images by their EXIF tag.) fast: RGB
    images by torch, at 256 px in half the time where the CPU has AVX2; 0.4 % of the values differ,
    nearly all by one level."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too elongated")
    if fast:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    else:
        image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Cache:
    """Images in an .npy file, memory-mapped at each call: loader processes share nothing else."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.path, self.shape = path, shape

    def whole(self) -> bool:
        try:
            images = np.load(self.path, mmap_mode="r")
            return images.shape == self.shape and images.dtype == np.uint8
        except Exception:  # NumPy's reader raises many kinds
            return False

    def write(self, chunks):
        """Once, by the main process of a machine, while the others wait."""
        with replacing(self.path) as temporary, open(temporary, "wb") as out:
            header = dict(descr="|u1", fortran_order=False, shape=self.shape)
            np.lib.format.write_array_header_1_0(out, header)
            for chunk in chunks:
                out.write(chunk)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        try:
            return np.load(self.path, mmap_mode="r")[index]
        except (OSError, ValueError) as error:
            raise ImageError(f"the cache {self.path} was changed ({error}): start again") from None


def printable(name: str) -> str:
    """A file's name may hold any bytes."""
    return name.encode(errors="replace").decode()


def fingerprint(*parts) -> str:
    text = "\n".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170,052,171 bytes
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def open_cifar10(size: int, seed: int, cache: Path, main: bool) -> Images:
    """The 50,000 training images of the binary archive: a label and 3 x 32 x 32 bytes each."""
    if size != 32:
        fail(f"--data cifar10 has images of 32 px, the configuration asks for {size}")
    archive = cache / "cifar-10-binary.tar.gz"
    if main and not archive.is_file():
        print(f"downloading {CIFAR10} to {archive}")
        try:
            torch.hub.download_url_to_file(CIFAR10, archive, hash_prefix=CIFAR10_SHA256)
        except (OSError, RuntimeError) as error:
            fail(f"could not download CIFAR-10 ({error}): fetch {CIFAR10} elsewhere and put it "
                 f"at {archive}", everywhere=True)
    agree()  # it is there
    if sha256(archive) != CIFAR10_SHA256:
        fail(f"{archive} is not the official archive, its sha256 differs: remove it, the next run "
             "fetches it again")
    with tarfile.open(archive) as tar:
        members = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
        raw = b"".join(tar.extractfile(member).read() for member in members)
    records = np.frombuffer(raw, np.uint8).reshape(50_000, 1 + 3 * 32 * 32)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    read = Cache(cache / "cifar10.npy", images.shape)
    if main and not read.whole():
        read.write([images.tobytes()])
    return Images("CIFAR-10, training set", read, records[:, 0], CIFAR10_CLASSES, seed, "cifar10")


def open_npz(path: Path, size: int, seed: int, cache: Path, main: bool) -> Images:
    """uint8 arr_0 (N, image_size, image_size, 3); labels arr_1 (N,) where there are any."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = np.asarray(arrays["arr_1"]) if "arr_1" in arrays else None
            if unknown := {*arrays} - {"arr_0", "arr_1"}:
                raise ValueError(f"it also holds {', '.join(unknown)}; labels must be called arr_1")
        member, shape = open_npz_images(path)
        checksums = [(entry.filename, entry.CRC) for entry in zipfile.ZipFile(path).infolist()]
    except Exception as error:  # errors of zip, header and type share no base
        fail(f"{path} is no npz of images to train with ({error})")
    if shape[1:3] != (size, size):
        fail(f"{path}: arr_0 is {shape}, the configuration asks for (N, {size}, {size}, 3)")
    n, classes = shape[0], []
    if labels is None:
        labels = np.zeros(n)
    else:
        whole = labels.shape == (n,) and labels.dtype.kind in "iu"
        if not whole or not 0 <= labels.min() <= labels.max() < n:
            fail(f"{path}: arr_1 is {labels.dtype} {labels.shape}, it must be {n} integer labels "
                 "from 0 up, with no more classes than images")
        classes = [str(i) for i in range(labels.max() + 1)]

    def chunks():
        try:
            yield from iter(lambda: member.read(1 << 20), b"")
        except Exception as error:  # of zip or zlib
            fail(f"{path} is damaged ({error}): fetch or write it again", everywhere=True)

    content = fingerprint(*sorted(checksums))
    read = Cache(cache / f"{content}.npy", shape)
    if main and not read.whole():
        read.write(chunks())
        if not read.whole():
            fail(f"{path} is damaged (arr_0 is not as long as it says)", everywhere=True)
    return Images(str(path), read, labels, classes, seed, content)


SUFFIXES = ".avif .bmp .gif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()


def find_images(top: Path) -> list[Path]:
    """Image files below `top`, sorted; links are followed, hidden files and folders are not."""
    files = []
    for root, folders, names in os.walk(top, followlinks=True, onerror=fail):
        above = {os.path.realpath(parent) for parent in Path(root).parents}
        loop = os.path.realpath(root) in above  # a link to a folder above is followed once
        folders[:] = [] if loop else [f for f in folders if not f.startswith(".")]
        files += [Path(root, n) for n in names if not n.startswith(".")]
    return sorted(p for p in files if p.suffix.lower() in SUFFIXES
                  and (p.is_file() or p.is_symlink() and not p.exists()))  # it leads nowhere


def decode_once(decode: Files, cached: Cache, workers: int, main: bool):
    """All images at the start, into the cache if the disk has room for it; else they are decoded
    anew in each epoch. Gives what reads them, and what is wrong with the unreadable ones."""
    report = cached.path.with_suffix(".json")

    def reported() -> dict[int, str]:
        return {int(i): error for i, error in json.loads(report.read_text()).items()}

    def images():
        loader = DataLoader(decode, 32, num_workers=workers, collate_fn=list, worker_init_fn=deaf)
        bar = tqdm(loader, f"decoding {len(decode)} images", unit="batch of 32")
        for i, (image, error) in enumerate(itertools.chain.from_iterable(bar)):
            if error:
                bad[i] = error
            yield image

    if main:
        there = cached.whole()
        fits = there or math.prod(cached.shape) < shutil.disk_usage(report.parent).free / 2
        try:
            known = all(decode[i][1] for i in reported())  # none was repaired
        except (OSError, ValueError, AttributeError, IndexError):
            known = False
        if not known or fits and not there:
            bad = {}
            if fits:
                cached.write(images())
            else:
                for _ in images():
                    pass
            write_json(report, bad)
    agree()
    return cached if cached.whole() else decode, reported()


def open_folder(path: Path, size: int, seed: int, cache: Path, main: bool, workers: int,
                skip_bad: bool) -> Images:
    """Images of a folder, nested. Its immediate sub-folders are the classes; without any it is
    unlabelled."""
    top = path.resolve()
    files = find_images(top)
    if not files:
        fail(f"no images in {path} and its sub-folders: looked for {' '.join(SUFFIXES)}")
    names = [p.relative_to(top) for p in files]
    firsts = [printable(name.parts[0]) if len(name.parts) > 1 else "" for name in names]
    classes, loose = sorted(set(firsts) - {""}), firsts.count("")
    if classes and loose:
        fail(f"{path} has {loose} images beside its {len(classes)} class folders: put them into "
             "classes, or away")
    numbers = {name: i for i, name in enumerate(classes or [""])}
    labels = np.array([numbers[first] for first in firsts])

    stats = [p.stat() if p.exists() else p.lstat() for p in files]  # a link may lead nowhere
    content = fingerprint(*(f"{name} {s.st_size}" for name, s in zip(names, stats)))
    known = fingerprint("fast crop", size, top, content, *(s.st_mtime_ns for s in stats))
    cached = Cache(cache / f"{known}.npy", (len(files), size, size, 3))
    read, bad = decode_once(Files(files, size), cached, workers, main)
    listed = printable("; ".join([*bad.values()][:20]) + ("; ..." if len(bad) > 20 else ""))
    if bad and (not skip_bad or len(bad) == len(files)):
        fail(f"{len(bad)} of {len(files)} images in {path} cannot be read: repair or remove them, "
             f"or --skip-bad leaves them out: {listed}")
    if bad and main:
        print(f"{len(bad)} of {len(files)} images left out: {listed}")
    return Images(str(path), read, labels, classes, seed, content, [*bad], names)


def deaf(_):
    """A loader process leaves signals to the process that asks it for images."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def open_data(name: str, image_size: int, seed: int, cache: str | Path, workers: int = 0,
              skip_bad: bool = False):
    """shapes, cifar10, FOLDER or FILE.npz; one process of a machine writes the cache."""
    if name == "shapes":
        return Shapes(image_size, seed)
    cache, path = Path(cache).expanduser(), Path(name)
    main = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        sweep(cache, hours=24)  # a younger one may still be being written
        if name == "cifar10":
            data = open_cifar10(image_size, seed, cache, main)
        elif path.is_dir():
            data = open_folder(path, image_size, seed, cache, main, workers, skip_bad)
        elif path.is_file() and path.suffix == ".npz":
            data = open_npz(path, image_size, seed, cache, main)
        else:
            fail(f"--data {name}: neither shapes, cifar10, a folder nor an .npz file")
    except OSError as error:
        fail(f"cannot use the cache {cache} or read {name}: {error}")
    agree()
    return data


def load(data, batch: int, share: slice, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's share of the images and labels of a step."""
    images, labels = data.batch(step * batch + np.arange(batch)[share])
    return torch.from_numpy(images), torch.from_numpy(labels)


# --------------------------------------------------------------------------------------------------
# 2. The run


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", choices=sid2.PRESETS, default="shapes", metavar="NAME",
        help=f"{', '.join(sid2.PRESETS)}; `python sid2.py` shows them")
    add("--data", help="shapes, cifar10, a folder of images or an npz; default: the preset's own")
    add("--out", help="folder of the run; default: runs/PRESET")
    add("--cache", default="~/.cache/sid2", help="folder for decoded data; default: %(default)s")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")
    add("--init-from", help="start from the EMA weights of this run, whose trunk must fit")
    add("--seed", type=int, default=0)
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto",
        help="auto: bf16 where the hardware multiplies it")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    add("--checkpointing", type=int, nargs="*", metavar="LEVEL", help="compute the activations of "
        "these levels (0 is the top; none named: all) again: less memory, slower")
    add("--bench", action="store_true", help="instead: a table of speeds, with --batch 32 or other")
    add("--workers", type=int, help="loader processes; default: up to 8 on CUDA or to decode")
    group = parser.add_argument_group("fields of sid2.Config; default: the preset's")
    for field in fields(sid2.Config):
        flag = f"--{field.name.replace('_', '-')}"
        value = getattr(sid2.PRESETS["shapes"], field.name)
        if isinstance(value, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction)
        elif isinstance(value, tuple):
            group.add_argument(flag, type=type(value[0]), nargs="+")
        else:
            group.add_argument(flag, type=type(value))
    args = parser.parse_args()
    if not 0 <= args.seed < 2**31 or (args.workers or 0) < 0:
        fail(f"--seed must be 0 to 2^31 - 1 and --workers at least 0, "
             f"got {args.seed} and {args.workers}")
    return args


def check_folder(out: Path, settings: dict):
    """A new or empty folder, or one that holds a run with the same settings."""
    if not (out / "config.json").is_file():
        if out.exists() and (not out.is_dir() or any(p.suffix != ".part" for p in out.iterdir())):
            fail(f"{out} exists and is no run folder: give another --out")
        return
    try:
        before = dict(json.loads((out / "config.json").read_text()))
    except (ValueError, TypeError):
        fail(f"{out / 'config.json'} is damaged: restore it, or give another --out")
    free = "steps micro_batch log_every sample_every save_every data".split()  # may change later
    differ = [f"{key} {before.get(key)} -> {value}" for key, value in settings.items()
              if key not in free and before.get(key) != value]
    if differ:
        fail(f"{out} holds a run with other settings ({', '.join(differ)}): "
             "give another --out, or the same flags")


def init_from(path: str, net: sid2.UViT):
    """Takes over another run's EMA weights where shapes agree; the trunks must be the same."""
    theirs, mine = load_checkpoint(path)["ema"], net.state_dict()
    fits = {key for key in mine.keys() & theirs.keys() if theirs[key].shape == mine[key].shape}
    trunk = {key for key in mine.keys() | theirs.keys()
             if key.split(".")[0] in ("blocks_down", "down", "middle", "up", "blocks_up")}
    if trunk - fits:
        fail(f"--init-from {path}: its trunk does not fit, for example {min(trunk - fits)}")
    net.load_state_dict({key: theirs[key] if key in fits else mine[key] for key in mine})
    left, fresh = (", ".join(sorted(w.keys() - fits)) or "none" for w in (theirs, mine))
    if os.environ.get("RANK", "0") == "0":
        print(f"{len(fits)} of {len(mine)} tensors from {path}; not taken over: {left}; "
              f"started afresh: {fresh}")


def open_log(path: Path, step: int):
    """log.csv with the rows up to `step`, open for more."""
    header = "step,images,loss,grad_norm,lr,skipped,images_per_second,data_wait,seconds"
    lines = path.read_text(errors="replace").splitlines()[1:] if path.is_file() else []
    kept = [line for line in lines if line.count(",") == header.count(",")
            and (n := line.split(",")[0]).isdecimal() and int(n) <= step]
    with replacing(path) as temporary:
        temporary.write_text("\n".join([header, *kept, ""]))
    return open(path, "a", buffering=1)


class Stop:
    """SIGTERM and Ctrl-C: `asked` becomes true. A second Ctrl-C ends the program at once, and
    whatever comes while a picture is drawn ends the picture."""

    def __init__(self):
        self.asked = self.drawing = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, _):
        alone = "RANK" not in os.environ  # torchrun passes on a Ctrl-C that we have had already
        again, self.asked = self.asked and number == signal.SIGINT and alone, True
        if again or self.drawing:
            self.drawing = False
            raise KeyboardInterrupt


@guarded
def main():
    args = parse()
    rank, world, device = setup(args.device)
    precision = choose_precision(device, args.precision)

    # configuration, data and folder of the run
    preset = asdict(sid2.PRESETS[args.preset])
    given = {key: value for key in preset if (value := getattr(args, key)) is not None}
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    if "image_size" in given and preset["noise_high"] == preset["image_size"]:
        given.setdefault("noise_high", given["image_size"])  # what is "the image size" stays that
    config = make_config(**preset | given)
    there = range(len(config.channels))
    levels = list(there) if args.checkpointing == [] else args.checkpointing or []
    if not set(levels) <= set(there):
        fail(f"--checkpointing {levels}: the network has levels {list(there)}")
    compiled = device.type == "cuda" if args.compile is None else args.compile
    if args.bench:
        return bench(config, args.batch or 32, device, precision, compiled, levels)
    own = args.preset if args.preset in ("shapes", "cifar10") else None
    if not (name := args.data or own):
        fail(f"--preset {args.preset} needs --data: a folder of images or an npz")
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = min(8, cores) if args.workers is None else args.workers
    data = open_data(name, config.image_size, args.seed, args.cache, workers, args.skip_bad)
    config = make_config(**preset | {"num_classes": len(data.classes)} | given)
    if config.num_classes not in (0, len(data.classes)):
        fail(f"--num-classes {config.num_classes}: {data.name} has {len(data.classes)} classes")
    names = data.classes if config.num_classes else []
    local = config.batch // world  # images of this process, per step
    micro = config.micro_batch or local
    if config.batch % world or local % micro:
        fail(f"batch {config.batch} is not divisible by {world} processes times "
             f"micro-batch {micro}")
    out = Path(args.out or f"runs/{args.preset}")
    where = name if name in ("shapes", "cifar10") else str(Path(name).resolve())
    settings = asdict(config) | dict(data=where, images=data.counts and sum(data.counts),
                                     content=data.content, seed=args.seed, precision=precision,
                                     init_from=args.init_from)
    settings = json.loads(json.dumps(settings))  # as they will be read back
    check_folder(out, settings)
    stop = Stop()

    # network, average and optimiser, as they were when the run stopped
    torch.manual_seed(args.seed)
    net = sid2.UViT(config).to(device)
    optimizer = torch.optim.Adam(net.parameters(), config.lr, betas=(0.9, 0.99), eps=1e-12,
                                 fused=True)  # [SD]
    window = dict(loss=0.0, steps=0, bad=0, skipped=0)  # what the next row of the log says
    state = dict(step=0, seconds=0.0, window=window)
    if any(os.path.lexists(out / name) for name in ("checkpoint.pt", "previous.pt")):
        state = load_checkpoint(out)
    elif args.init_from:
        init_from(args.init_from, net)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    if state["step"] > 0:
        net.load_state_dict(state.pop("net"))
        ema.load_state_dict(state.pop("ema"))
        try:
            optimizer.load_state_dict(state.pop("optimizer"))
        except (KeyError, RuntimeError, TypeError, ValueError):
            fail(f"the optimiser in {state['file']} is not that of its network")
    if agree(state["step"] > 0) and agree(state["step"] == 0):  # else one would start anew
        fail(f"not all processes see the checkpoint in {out}: it must be on a shared disk")
    net.checkpointing = levels
    if compiled:
        net.compile(dynamic=False)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net

    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            sweep(out), sweep(out / "samples")
            if state.get("file") == out / "previous.pt" and (out / "checkpoint.pt").exists():
                os.replace(out / "checkpoint.pt", out / "damaged.pt")
            write_json(out / "config.json", settings)
            (out / "samples").mkdir(exist_ok=True)
            log = open_log(out / "log.csv", state["step"])
        except OSError as error:
            fail(f"cannot write to {out}: {error}")
        describe(config, data, names)
        print(f"{world} x {device}, {precision}, micro-batch {micro}, torch {torch.__version__}")
        print(f"resumed at step {state['step']}" if state["step"] else f"a new run in {out}")
        if state["step"] >= config.steps:
            print(f"nothing left to do: it has its {state['step']} steps; --steps adds more")

    def send(w: torch.Tensor) -> torch.Tensor:
        """To the device; CUDA does not wait for what it still computes."""
        return w.to(device, non_blocking=device.type == "cuda")

    def due(done: int, every: int) -> bool:
        return done % every == 0 or done == config.steps

    def draw(done: int):
        """The picture of a step. A signal ends it: then the next start draws it."""
        path = out / f"samples/{done:07d}.png"
        if rank > 0 or not due(done, config.sample_every) or stop.asked or path.exists():
            return
        shown = shown_classes(config.num_classes)
        numbers = list(range(8 * len(shown)))
        y = choose_labels(numbers, shown, config.num_classes)
        with contextlib.suppress(KeyboardInterrupt), autocast(device, precision):
            stop.drawing = True
            pictures = sample_images(ema, config, numbers, y, device, min(64, micro),
                                     desc="samples")
            with replacing(path) as temporary:
                grid(pictures, y, names).save(temporary, "PNG")
            stop.drawing = False

    steps = range(state["step"], config.steps)
    if steps.start > 0:
        draw(steps.start)
    if agree(stop.asked):  # the others wait here for the picture
        steps = steps[:0]
    share = slice(rank * local, (rank + 1) * local)  # of the whole batch
    place = torch.arange(config.batch)[share]
    cheap = device.type != "cuda" and not isinstance(data.read, Files)
    batches = iter(DataLoader(steps, batch_size=None, worker_init_fn=deaf,
                              collate_fn=functools.partial(load, data, config.batch, share),
                              num_workers=0 if cheap and args.workers is None else workers,
                              pin_memory=device.type == "cuda"))
    generator = torch.Generator(device)
    window, losses, norms = state["window"], [], []  # since the last row; since the host looked
    waited, since_step = 0.0, steps.start
    begun = since = time.perf_counter()
    bar = tqdm(total=config.steps, initial=steps.start, unit="step", disable=rank > 0)
    model.train()
    for step in steps:
        waiting = time.perf_counter()
        images, labels = next(batches)
        waited += time.perf_counter() - waiting

        # what is random, drawn for the whole batch; each process takes its share
        rng = np.random.default_rng([args.seed, step])
        u = rng.random()
        flip = torch.from_numpy(rng.random(config.batch)[share] < 0.5 * config.flip)
        drop = torch.from_numpy(rng.random(config.batch)[share] < config.label_dropout)
        seeds = ((args.seed + 1) * 2654435761 + step * config.batch + place) % 2**32  # of eps
        torch.manual_seed(int(rng.integers(2**62)) + rank)  # of dropout
        optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup))
        losses.append(torch.zeros((), device=device))

        for k in range(0, local, micro):
            part = slice(k, k + micro)
            x = send(images[part]).permute(0, 3, 1, 2) / 127.5 - 1
            x = torch.where(send(flip[part])[:, None, None, None], x.flip(3), x)
            y = labels[part].clamp(max=config.num_classes)  # 0, if unconditional
            y = send(torch.where(drop[part], config.num_classes, y))
            eps = torch.stack([torch.randn(x.shape[1:], device=device,
                                           generator=generator.manual_seed(seed))
                               for seed in seeds[part].tolist()])
            t = sid2.low_discrepancy_times(send(place[part]), config.batch, u)
            logsnr, slope = sid2.schedule(t, config.image_size, config.noise_low, config.noise_high)
            z, v = sid2.diffuse(x, eps, logsnr), sid2.v_from_x_eps(x, eps, logsnr)
            with contextlib.nullcontext() if world == 1 or k + micro == local else model.no_sync():
                with autocast(device, precision):
                    v_hat = model(z, logsnr, y)
                loss = sid2.sigmoid_loss(v_hat, v, logsnr, slope, config.bias).sum() / local
                loss.backward(1 + 0 * loss.detach())  # not finite: nor are the gradients
            losses[-1] += loss.detach()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0))  # [SD]
        bad = ~norms[-1].isfinite()
        if device.type == "mps" and bad:  # whose fused Adam does not look at found_inf
            optimizer.zero_grad()
        optimizer.found_inf = bad.float()  # fused Adam skips the step
        optimizer.step()
        optimizer.zero_grad()
        sid2.ema_update(ema, net, step, config.ema)

        # bookkeeping: nothing above waits for the device; here, steps that log, draw or save do
        bar.update()
        done, aside = step + 1, time.perf_counter()
        draw(done)
        since += time.perf_counter() - aside
        stopped = agree(stop.asked)
        logs, saves = due(done, config.log_every), stopped or due(done, config.save_every)
        if logs or saves:
            values = torch.stack(losses)
            if world > 1:
                dist.all_reduce(values)
            values, norms = (values / world).tolist(), torch.stack(norms).tolist()
            for n, (loss, norm) in enumerate(zip(values, norms), done - len(norms) + 1):
                good = math.isfinite(norm)  # the gradient of all: the same on every process
                window["loss"] += loss if good else 0.0
                window["steps"] += good
                window["skipped"] += not good
                window["bad"] = 0 if good else window["bad"] + 1
                if window["bad"] == 10:
                    give_up(out, data, config, args.seed, n, rank)
            last, norms, losses = norms[-1], [], []
        if logs:
            now = time.perf_counter()
            loss = window["loss"] / window["steps"] if window["steps"] else math.nan
            rate = (done - since_step) * config.batch / (now - since)
            if rank == 0:
                log.write(f"{done},{done * config.batch},{loss:.6g},{last:.6g},"
                          f"{optimizer.param_groups[0]['lr']:.4g},{window['skipped']},{rate:.1f},"
                          f"{waited / (now - since):.4f},{state['seconds'] + now - begun:.1f}\n")
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
            window |= dict(loss=0.0, steps=0)
            waited, since, since_step = 0.0, now, done
        aside = time.perf_counter()
        if rank == 0 and saves:
            kept = dict(config=asdict(config), net=net.state_dict(), ema=ema.state_dict(),
                        optimizer=optimizer.state_dict(), step=done, classes=names,
                        random=dict(seed=args.seed, images=done * config.batch),
                        seconds=state["seconds"] + aside - begun, window=window)
            os.fsync(log.fileno())
            with replacing(out / "checkpoint.pt", out / "previous.pt") as temporary:
                try:
                    torch.save(kept, temporary)
                except RuntimeError as error:  # what torch makes of a full disk
                    raise OSError(str(error)) from None
        since += time.perf_counter() - aside
        if stopped:
            break
    bar.close()
    leave()
    if rank == 0 and steps:
        print(f"{done} of {config.steps} steps done in {(time.perf_counter() - begun) / 60:.1f} "
              f"minutes; pictures in {out / 'samples'}, more with `python sample.py {out}`")
    if rank == 0 and stop.asked and not (steps and done == config.steps):
        print("stopped by a signal: the same command goes on")


def give_up(out: Path, data, config: sid2.Config, seed: int, step: int, rank: int):
    """After ten steps in a row without finite gradients: what they saw, and an end."""
    seen, place = [], torch.arange(config.batch)
    for n in range(step - 10, step):
        u = np.random.default_rng([seed, n]).random()
        t = sid2.low_discrepancy_times(place, config.batch, u)
        logsnr, _ = sid2.schedule(t, config.image_size, config.noise_low, config.noise_high)
        images = data.names(n * config.batch + place.numpy())
        seen.append(dict(step=n + 1, images=images, logsnr=logsnr.tolist()))
    if rank == 0:
        write_json(out / "diagnosis.json", seen)
    fail(f"ten steps in a row without finite gradients, up to step {step}: {out}/diagnosis.json "
         f"names their images and noise levels. Try a lower --lr or --precision fp32 in another "
         f"--out, from the start or with --init-from {out}, which is as last saved", code=1)


def describe(config: sid2.Config, data, names: list[str]):
    """Configuration, size and data set, before anything is trained."""
    parameters, gmac = sid2.count(config)
    print(", ".join(f"{key} {value}" for key, value in asdict(config).items()))
    print(f"{parameters / 1e6:.1f} M parameters, {gmac:.2f} GMAC per image")
    counts = [f"{name} {n}" for name, n in zip(names, data.counts)] if data.counts else names
    print(f"data: {data.name}; {sum(data.counts) if data.counts else 'endless'} images; "
          f"{len(counts)} classes", ", ".join(counts[:20]) + (", ..." if counts[20:] else ""),
          sep=": " if counts else "")


# --------------------------------------------------------------------------------------------------
# 3. `--bench`: how fast the network is here, and how close to what the machine can do

PEAK = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100-SXM4-40GB": 312}  # dense bf16 TFLOP/s, from NVIDIA's data sheets


def activation_memory(config: sid2.Config, levels: list[int], precision: str) -> float:
    """MB that autograd keeps of an image until the backward pass, in eager mode, as on a CPU;
    nothing is computed. Blocks of `levels` keep what goes into them alone."""
    fake = FakeTensorMode()
    with fake:
        net = sid2.UViT(config)
    net.checkpointing = levels

    def total(batch: int) -> int:
        storages = {}  # held, so that their addresses stay different

        def keep(w: torch.Tensor) -> torch.Tensor:
            storages[w.untyped_storage()._cdata] = w.untyped_storage()
            return w

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda w: w)
        with fake, hooks, autocast(torch.device("cpu"), precision):
            z = torch.empty(batch, 3, config.image_size, config.image_size)
            net(z, z[:, 0, 0, 0], torch.empty(batch, dtype=torch.long))
        return sum(storage.nbytes() for storage in storages.values())

    return (total(3) - total(2)) / 1e6  # without the weights


def bench(config: sid2.Config, batch: int, device: torch.device, precision: str, compiled: bool,
          levels: list[int]):
    """Times with random data, each the median of 7; the spread is (max - min) / median.

    A pass is one image through the network once; guidance takes two. GMAC count a multiplication
    and its addition once: TFLOP/s = 2 GMAC passes/s / 1000, three times that with backward,
    whatever is computed again. "of linear": share of a large product's speed in this same run, "of
    peak": of the data sheet's. Memory: all that is alive, average and optimiser included.
    """
    cuda = device.type == "cuda"
    wait = getattr(torch, device.type).synchronize

    def clock(run) -> tuple[float, float, float]:
        """Seconds, spread, GB at the peak; the device is fed without pause for a quarter second."""
        run(), wait()  # compiles
        begun = time.perf_counter()
        run(), wait()
        calls, seconds = 1 + int(0.25 / (time.perf_counter() - begun)), []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(7):
            begun = time.perf_counter()
            for _ in range(calls):
                run()
            wait()
            seconds.append((time.perf_counter() - begun) / calls)
        median = sorted(seconds)[3]
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else math.nan
        return median, (max(seconds) - min(seconds)) / median, peak

    # what the machine can do
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    m, k, n = (8192, 8192, 8192) if cuda else (2048, 1024, 4096)
    a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n, k)))
    linear = 2 * m * k * n / clock(lambda: F.linear(a, b))[0] / 1e12
    a, b = torch.zeros(2, 2**28 if cuda else 2**25, device=device)
    copied = 2 * a.nbytes / clock(lambda: b.copy_(a))[0] / 1e9
    a = b = None
    name = torch.cuda.get_device_name() if cuda else f"{device}, {torch.get_num_threads()} threads"
    peak = PEAK.get(name, math.nan) if precision == "bf16" else math.nan
    print(f"{name}, torch {torch.__version__}, {precision}, float32 products: "
          f"{torch.get_float32_matmul_precision()}, {'compiled' if compiled else 'eager'}"
          + f", computed again: levels {levels}" * bool(levels))
    print(f"linear {m} x {k} x {n}: {linear:.3g} TFLOP/s; copy: {copied:.0f} GB/s")

    # the network
    net = sid2.UViT(config).to(device)
    net.checkpointing = levels
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), 1e-9, fused=True)
    if compiled:
        net.compile(dynamic=False)
    z = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
    y = torch.zeros(batch, dtype=torch.long, device=device)
    t = (torch.arange(batch, device=device) + 0.5) / batch
    logsnr, slope = sid2.schedule(t, config.image_size, config.noise_low, config.noise_high)

    def backward():
        with autocast(device, precision):
            v_hat = net(z, logsnr, y)
        sid2.sigmoid_loss(v_hat, z, logsnr, slope, config.bias).mean().backward()

    def step():
        backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sid2.ema_update(ema, net, 0, config.ema)

    def forward(doubled=False):
        with torch.no_grad(), autocast(device, precision):
            net(*(torch.cat([w, w]) if doubled else w for w in (z, logsnr, y)))

    def sampler():
        with autocast(device, precision):
            sid2.sample(net, list(range(batch)), y, 0, torch.linspace(-6, 6, 4), config.image_size,
                        guidance=2.0)

    parameters, gmac = sid2.count(config)
    print(f"{parameters / 1e6:.1f} M parameters, batch {batch}; per image {gmac:.2f} GMAC, and "
          f"{activation_memory(config, levels, precision):.1f} MB that autograd keeps (eager)\n\n"
          f"{'':32}      ms  spread  passes/s  TFLOP/s  of linear"
          + "  of peak  memory" * cuda)

    def row(what: str, run, passes: int, factor: int, gmac=gmac) -> float:
        seconds, spread, memory = clock(run)
        tflops = factor * 2e-3 * gmac * passes / seconds
        print(f"{what:32}{1e3 * seconds:8.1f} {spread:7.1%} {passes / seconds:9.1f} {tflops:8.3g} "
              f"{tflops / linear:10.1%}" + f"{tflops / peak:9.1%} {memory:4.1f} GB" * cuda)
        return seconds

    net.train()
    row("training step", step, batch, 3)
    row("forward and backward", backward, batch, 3)
    optimizer.zero_grad()
    net.eval()
    row("forward", forward, batch, 1)
    double = row("forward, guided", lambda: forward(True), 2 * batch, 1)
    whole = row("sampler, 4 guided steps", sampler, 8 * batch, 1)
    print(f"the sampler's speed / that of its passes: {4 * double / whole:.3f}\n")

    print("each level alone, forward and backward, eager")
    c = torch.randn(batch, config.width, device=device)
    side, last = config.image_size // config.patch_size, len(config.channels) - 1
    net.train()
    for level, (kind, C) in enumerate(zip(config.blocks, config.channels)):
        net.zero_grad()
        blocks = net.middle if level == last else [*net.blocks_down[level], *net.blocks_up[level]]
        h = torch.randn(batch, side >> level, side >> level, C, device=device, requires_grad=True)
        one = h[:1].detach().to("meta")
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            for block in copy.deepcopy(blocks[:1]):
                block.to("meta")(one, c[:1].to("meta"))
        macs = len(blocks) * counter.get_total_flops() / 2e9

        def run():
            with autocast(device, precision):
                r = net.run(level, blocks, h, c)
            r.float().mean().backward()

        what = f"{len(blocks):2} {kind} at {side >> level}² x {C}"
        row(f"{what}, {macs / gmac:.0%} of GMAC", run, batch, 3, macs)


if __name__ == "__main__":
    main()

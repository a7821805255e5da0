"""Samples from a run of train.py: a labelled grid, a folder of PNGs, or an npz for evaluation.

    python sample.py runs/shapes                               a grid, one row per class
    python sample.py runs/cifar10 --count 50000 --classes random --format npz
    torchrun --nproc_per_node=8 sample.py RUN ...              the same images, the seeds shared out

Image i depends on its seed and class alone. A run that was cut off goes on when the command is
given again.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import sid2

# --------------------------------------------------------------------------------------------------
# 1. What the scripts share: errors, devices, configurations, checkpoints


class ImageError(ValueError):
    """An unreadable image, named in the message."""


def fail(message: str, everywhere: bool = False, code: int = 2):
    """Bad input ends here: one line, exit code 2. Where all processes fail alike the first speaks
    for them; `everywhere`: whichever fails speaks."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def guarded(main):
    """What a script cannot help ends it with one line, too; SIGTERM is like Ctrl-C."""

    @functools.wraps(main)
    def script():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            main()
        except KeyboardInterrupt:
            fail("interrupted: what was written before is whole", code=130)
        except ImageError as error:  # from a loader process, at the end of a traceback
            fail(str(error).split("ImageError: ")[-1], everywhere=True)
        except OSError as error:  # no space, no permission, a disk that went away
            fail(f"cannot read or write: {error}", everywhere=True)
        except (RuntimeError, MemoryError) as error:
            text = str(error)
            if isinstance(error, MemoryError) or "out of memory" in text or "t allocate" in text:
                fail("out of memory: --batch, in train.py --micro-batch, takes fewer images at "
                     "once", everywhere=True)
            if "DataLoader worker" in text:
                reason = "a process that loads images was killed: out of memory?"
            elif isinstance(error, dist.DistError) or "gloo" in text:
                reason = "another process of this run has ended."
            else:
                raise
            fail(f"{reason} What was written before is whole, the same command goes on from there",
                 everywhere=True, code=1)
        if "RANK" in os.environ:  # gloo's threads may abort while Python shuts down: it does not
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)

    return script


class Parser(argparse.ArgumentParser):
    """Wrong flags end like every other bad input, and a flag must be written in full."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        fail(f"{message} (--help lists the flags)")


def setup(name: str = "auto") -> tuple[int, int, torch.device]:
    """Rank, number of processes, device; joins the process group if torchrun has set RANK."""
    alone = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    rank, world, local = (int(os.environ.get(key, value)) for key, value in alone.items())
    if name == "auto":  # MPS has no process group
        mps = torch.backends.mps.is_available() and world == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device("cuda", local) if name == "cuda" else torch.device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        fail(f"--device {name} cannot be used by process {local} of this machine: {reason}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32, in convolutions too
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        host_group()
    return rank, world, device


@functools.cache
def host_group():
    """Processes that wait for each other on the CPU: for hours, while one decodes or draws."""
    return dist.new_group(backend="gloo", timeout=timedelta(hours=12))


def agree(flag: bool = False) -> bool:
    """Whether any process says so. All wait here for the last."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, host_group())
    return flags.item() > 0


def leave():
    """All processes end together."""
    agree()
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_precision(device: torch.device, precision: str) -> str:
    """bf16 or fp32; auto is bf16 where the hardware multiplies it."""
    if precision != "auto":
        return precision
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


def autocast(device: torch.device, precision: str):
    """bf16: autocast around float32 weights; fp32: nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def make_config(**given) -> sid2.Config:
    """The configuration, or one line that says which field, its rule and what came."""
    c = sid2.Config(**given)
    unit = c.patch_size * 2 ** (len(c.channels) - 1) or 1
    heads = [n for n, kind in zip(c.channels, c.blocks) if kind == "T"]
    rules = [
        ("patch_size head_width noise_low noise_high steps batch sample_steps log_every "
         "sample_every save_every", "must be at least 1", lambda n: n >= 1),
        ("depth middle num_classes warmup micro_batch lr", "must not be negative",
         lambda n: n >= 0),
        ("dropout ema label_dropout gamma", "must lie in [0, 1]", lambda a: 0 <= a <= 1),
        ("lr bias guidance", "must be finite", math.isfinite),
        ("width", "must be even and positive", lambda n: n > 0 and n % 2 == 0),
        ("channels", "must be positive", lambda C: C and min(C) > 0),
        ("channels", f"of T levels must be multiples of head_width {c.head_width}",
         lambda _: all(n % c.head_width == 0 for n in heads)),
        ("blocks", f"needs a letter R or T for each of the {len(c.channels)} channels",
         lambda kinds: set(kinds) <= set("RT") and len(kinds) == len(c.channels)),
        ("image_size", f"must be a multiple of {unit}, patch_size times 2 per lower level",
         lambda n: n > 0 and n % unit == 0),
        ("sampler", "must be ddpm or ddim", lambda name: name in ("ddpm", "ddim")),
        ("interval", "must be two numbers low < high", lambda i: len(i) == 2 and i[0] < i[1]),
    ]
    for names, rule, holds in rules:
        for name in names.split():
            if not holds(getattr(c, name)):
                fail(f"{name} {rule}, got {getattr(c, name)}")
    return c


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint at `path`, or in the run folder `path`, there the one before if the last is
    damaged. Never executes what it loads."""
    path = Path(path)
    files = [path / "checkpoint.pt", path / "previous.pt"] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    if not files:
        fail(f"no checkpoint at {path}: give the folder or the checkpoint.pt of a run of train.py")
    for file in files:
        try:
            if zipfile.ZipFile(file).testzip():  # torch does not look at the checksums
                raise ValueError("checksum")
            state = torch.load(file, map_location="cpu", weights_only=True)
            state["config"] = sid2.Config(**state["config"])
            with torch.device("meta"):
                shapes = {k: w.shape for k, w in sid2.UViT(state["config"]).state_dict().items()}
            if any({k: w.shape for k, w in state[n].items()} != shapes for n in ("net", "ema")):
                raise ValueError("weights of another network")
            if min(state["step"], *(state["window"][k] for k in ("steps", "bad", "skipped"))) < 0:
                raise ValueError("a negative number")
            keys = "config net ema optimizer step random classes seconds window".split()
            return {key: state[key] for key in keys} | {"file": file}
        except Exception as error:  # what torch.load raises has no narrower common type
            if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, 22):
                raise  # it may be whole, but cannot be read; 22: a cut file
            reason = str(error) if isinstance(error, ValueError) else type(error).__name__
            damage = f"{file} is truncated or no checkpoint of train.py ({reason})"
        if file != files[-1] and os.environ.get("RANK", "0") == "0":
            print(f"warning: {damage}; taking {files[-1]}", file=sys.stderr)
    fail(damage)


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None):
    """A temporary name beside `path` that takes its place when all has gone well, and is on the
    disk; what was there is kept as `previous`.

    So nobody reads half a file, and what was there stays if the disk is full or power fails.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every system can open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        reason = str(error).splitlines()[0]
        fail(f"cannot write {path} ({reason}): what was there is kept", everywhere=True)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path, hours: float = 0):
    """Removes what `replacing` left in a folder when its process was killed."""
    for file in folder.glob(".*.????????.part"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - file.stat().st_mtime >= 3600 * hours:
                file.unlink()


# --------------------------------------------------------------------------------------------------
# 2. Images


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3); v / 127.5 - 1 becomes v again for all 256 values."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def sample_images(net, config: sid2.Config, seeds, labels, device, batch=64, **progress):
    """Images (N, H, W, 3) uint8 of seeds and labels, sampled as config says, `batch` at once."""
    t, images = torch.arange(config.sample_steps, 0, -1) / config.sample_steps, []
    logsnr, _ = sid2.schedule(t, config.image_size, config.noise_low, config.noise_high)
    scale = config.guidance if config.num_classes else 1.0
    with tqdm(total=len(seeds) * len(t), unit="step", leave=False, **progress) as bar:
        for i in range(0, len(seeds), batch):
            y = torch.tensor(labels[i : i + batch], device=device)
            for _, x_hat in sid2.sample_steps(net, seeds[i : i + batch], y, config.num_classes,
                                              logsnr, config.image_size, config.sampler,
                                              config.gamma, scale, config.interval):
                bar.update(len(y))
            images.append(to_uint8(x_hat))
    return np.concatenate(images)


def choose_labels(seeds, classes: list, num_classes: int) -> list[int]:
    """Label of each seed: `classes` in turn; drawn from the seed alone if they are ["random"]."""
    if num_classes == 0:
        return [0] * len(seeds)
    if classes == ["random"]:
        return [int(np.random.default_rng([1, seed]).integers(num_classes)) for seed in seeds]
    return [classes[seed % len(classes)] for seed in seeds]


def shown_classes(num_classes: int) -> list[int]:
    """Up to ten classes for a grid, spread over all; [0] without classes."""
    last = max(num_classes - 1, 0)
    return np.linspace(0, last, min(last + 1, 10)).astype(int).tolist()


def grid(images: np.ndarray, labels: list[int], names: list[str]) -> Image.Image:
    """Rows of one class, its name on the left; small images enlarged without smoothing."""
    rows, columns = [], 16
    for label in sorted(set(labels)):
        mine = [image for image, other in zip(images, labels) if other == label]
        name = names[label] if names else ""
        rows += [(name, mine[i : i + columns]) for i in range(0, len(mine), columns)]
    size = images.shape[1] * max(1, round(64 / images.shape[1]))
    font, cell = ImageFont.load_default(13), size + 2
    margin = 8 + max(int(font.getlength(name)) for name, _ in rows) if names else 0
    width = margin + cell * max(len(row) for _, row in rows)
    page = Image.new("RGB", (width, cell * len(rows)), "white")
    for r, (name, row) in enumerate(rows):
        ImageDraw.Draw(page).text((4, r * cell + size // 2 - 8), name, "black", font)
        for c, image in enumerate(row):
            image = Image.fromarray(image).resize((size, size), Image.NEAREST)
            page.paste(image, (margin + c * cell, r * cell))
    return page


def write_npz(path: Path, files: list[Path], labels: list[int]):
    """arr_0 (N, H, W, 3) uint8 and arr_1 (N,) int64 in the order of the seeds, image by image."""
    shape = (len(files), *np.asarray(Image.open(files[0])).shape)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as out:
            header = dict(descr="|u1", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(out, header)
            for file in files:
                out.write(np.asarray(Image.open(file)).tobytes())
        with archive.open("arr_1.npy", "w") as out:
            np.lib.format.write_array(out, np.asarray(labels))


def open_npz_images(path: Path):
    """arr_0 of an npz: a stream that stands at its first pixel, and its shape (N, H, W, 3)."""
    archive = zipfile.ZipFile(path)
    member = archive.open("arr_0.npy")
    np.lib.format.read_magic(member)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"arr_0 is {dtype} {shape}; wanted: uint8 (N, H, W, 3)")
    if archive.getinfo("arr_0.npy").file_size - member.tell() != math.prod(shape):
        raise ValueError("arr_0 is not as long as it says: the file is damaged")
    return member, shape


# --------------------------------------------------------------------------------------------------
# 3. The script


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", help="folder or checkpoint.pt of a run of train.py")
    add("--out", help="what to write; default: beside the checkpoint, under a name that is free")
    add("--format", choices=["grid", "folder", "npz"], default="grid")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--count", type=int, help="seeds 0 to COUNT - 1; default: 8 for each class "
                        "of the default grid")
    number.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "LAST"), help="inclusive")
    add("--classes", nargs="+", help="names or numbers, taken in turn; all; random; default: "
        "for a grid up to ten spread over all, else all")
    add("--weights", choices=["ema", "raw"], default="ema")
    add("--steps", type=int, help="default of this and the next four: as the run was configured")
    add("--sampler", choices=["ddpm", "ddim"])
    add("--gamma", type=float, help="DDPM noise between its lower (0) and upper (1) bound")
    add("--guidance", type=float, help="scale; 1 is none")
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="guidance where LOW <= logsnr < HIGH; -99 99 is everywhere")
    add("--batch", type=int, default=64, help="images at once, per process; default: %(default)s")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    add("--compile", action="store_true", help="torch.compile: pays with many images")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    return parser.parse_args()


def find_classes(given: list[str] | None, names: list[str], num_classes: int, shown: list) -> list:
    """--classes as numbers, or ["random"]."""
    everything = list(range(num_classes))
    if given is None:
        return shown
    if given in (["all"], ["random"]):
        return everything if given == ["all"] else given
    numbers = {str(i): i for i in everything} | {name: i for i, name in enumerate(names)}
    for name in given:
        if name not in numbers:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            fail(f"--classes {name}: this run has classes 0 to {num_classes - 1}: {known}")
    return [numbers[name] for name in given]


@guarded
def main():
    args = parse()
    state = load_checkpoint(args.run)
    flags = dict(sample_steps=args.steps, sampler=args.sampler, gamma=args.gamma,
                 guidance=args.guidance, interval=args.interval and tuple(args.interval))
    given = {key: value for key, value in flags.items() if value is not None}
    config, names = make_config(**asdict(state["config"]) | given), state["classes"]
    if config.num_classes == 0 and (args.classes or args.guidance not in (None, 1)):
        fail("this run has no classes: --classes and --guidance need a class-conditional one")
    if args.batch < 1 or args.count is not None and args.count < 1:
        fail("--batch and --count must be at least 1")
    shown = shown_classes(config.num_classes)
    first, last = args.seeds or (0, (args.count or 8 * len(shown)) - 1)
    if not 0 <= first <= last < 2**32:  # torch's CPU generator keeps 32 bits of a seed
        fail(f"--seeds must be 0 <= FIRST <= LAST < 2^32, got {first} {last}")
    default = shown if args.format == "grid" else list(range(config.num_classes))
    classes = find_classes(args.classes, names, config.num_classes, default)
    seeds = list(range(first, last + 1))
    labels = choose_labels(seeds, classes, config.num_classes)

    rank, world, device = setup(args.device)
    precision = choose_precision(device, args.precision)
    checkpoint = state["file"]
    weights = state["ema" if args.weights == "ema" else "net"]
    digest = hashlib.sha256()
    for w in weights.values():
        digest.update(w.numpy())
    settings = dict(checkpoint=str(checkpoint.resolve()), step=state["step"], weights=args.weights,
                    sha256=digest.hexdigest(), seeds=[first, last], classes=classes,
                    format=args.format, precision=precision, device=device.type,
                    torch=torch.__version__, config=asdict(config))
    settings = json.loads(json.dumps(settings))  # as they will be read back

    # images go one by one to a folder, its settings beside it, so that a cut-off run can go on
    def parts(out: Path) -> Path:
        return out if args.format == "folder" else out.with_name(out.name + ".parts")

    def json_of(path: Path) -> Path:
        return path.with_name(path.name + ".json")

    def earlier(out: Path) -> dict:
        """Settings of what is there, whole or begun; where nothing is, ours."""
        for path in (out, parts(out)):
            if path.is_file() or path.is_dir() and any(path.iterdir()):
                try:
                    return json.loads(json_of(path).read_text())
                except (OSError, ValueError):
                    return {}
        return settings

    def clear():
        """The images have their place in `out` now."""
        shutil.rmtree(parts(out), ignore_errors=True)
        json_of(parts(out)).unlink(missing_ok=True)

    name = dict(grid="samples{}.png", folder="images{}", npz="samples{}.npz")[args.format]
    numbered = (checkpoint.parent / name.format(f"-{n}" if n else "") for n in itertools.count())
    out = Path(args.out) if args.out else next(p for p in numbered if earlier(p) == settings)
    if earlier(out) != settings:
        changed = ", ".join(key for key in settings if earlier(out).get(key) != settings[key])
        fail(f"{out} or {parts(out)} was made with other settings ({changed}) or by something "
             "else: give another --out")
    folder, finished = parts(out), out.is_file()
    agree()  # all have looked before one writes
    if finished:
        if rank == 0:
            clear()
            print(f"{out} is there already, made with these settings")
        return leave()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {out}: {error}")
    if rank == 0:
        sweep(folder)
        write_json(json_of(folder), settings)
    agree()  # the others write after the sweep

    net = sid2.UViT(config).to(device).eval()
    net.load_state_dict(weights)
    if args.compile:
        net.compile(dynamic=False)  # with and without guidance, and so for a last, smaller batch
    if rank == 0:
        print(f"{checkpoint}, step {state['step']}, {args.weights} weights, {len(seeds)} images, "
              f"{config.sampler} {config.sample_steps} steps, guidance {config.guidance} for "
              f"logsnr in {list(config.interval)}, {world} x {device}, {precision}")

    files = [folder / f"{seed:06d}.png" for seed in seeds]
    missing = [i for i in range(rank, len(files), world) if not files[i].exists()]
    for k in range(0, len(missing), args.batch):
        part = missing[k : k + args.batch]
        with autocast(device, precision):
            images = sample_images(net, config, [seeds[i] for i in part], [labels[i] for i in part],
                                   device, args.batch, desc=f"{k} of {len(missing)}",
                                   disable=rank > 0)
        for i, image in zip(part, images):
            with replacing(files[i]) as temporary:
                Image.fromarray(image).save(temporary, "PNG")
    leave()  # the last image is there
    if rank == 0 and args.format != "folder":
        write_json(json_of(out), settings)
        with replacing(out) as temporary:
            if args.format == "npz":
                write_npz(temporary, files, labels)
            else:
                images = np.stack([np.asarray(Image.open(file)) for file in files])
                grid(images, labels, names).save(temporary, "PNG")
        clear()
    if rank == 0:
        print(f"wrote {out}, its settings beside it in {json_of(out).name}")


if __name__ == "__main__":
    main()

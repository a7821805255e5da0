"""Samples from a run of train.py: PNGs by seed, and beside them a grid, an npz or an animation.

    python sample.py runs/shapes                               a grid, one row per class
    python sample.py runs/shapes --trajectory                  how three images come about
    python sample.py runs/cifar10 --count 50000 --classes random --format npz
    torchrun --nproc_per_node=8 sample.py RUN ...              the same images, the seeds shared out

Image i depends on its seed and class alone. The same command again makes only what is missing.
"""

import argparse
import contextlib
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sid2
from train import (CHECKPOINT, Data, InputError, Parser, agree, check, choose_labels,
                   choose_precision, grid, guarded, is_taken, load_checkpoint, open_data, page,
                   reading, refuse_others, replacing, sample_images, say, setup, shown_classes,
                   to_uint8)


def main():
    args = parse()
    state = load_checkpoint(args.run)
    config, names = configure(args, state["config"]), state["classes"]
    classes = choose_classes(args, names, config.num_classes)
    seeds = choose_seeds(args, classes)
    data = open_given(args, config, state) if config.given else None
    labels = choose_labels(seeds, classes, config.num_classes, data)
    rank, world, device = setup(args.device)
    precision, autocast = choose_precision(device, args.precision)
    with reading(args.run, CHECKPOINT):
        net = sid2.ResidualUViT(config).to(device).eval()
        net.load_state_dict(state["ema" if args.weights == "ema" else "net"])
    if args.compile:
        net.compile(dynamic=False, fullgraph=True)  # two graphs: with and without guidance

    # seconds tell apart two trainings that ended at the same step
    settings = asdict(config) | dict(step=state["step"], seconds=state["seconds"], classes=classes,
                                     weights=args.weights, precision=precision,
                                     data=data.name if data else None)
    folder = open_samples(args, settings, rank)
    guided = sum(sid2.sampling_grid(config)[1])
    say(f"{args.run}, step {state['step']}, {args.weights} weights, {len(seeds)} samples, "
        f"{config.sample_steps} {config.sampler} steps, {guided} of them guided, "
        f"{world} x {device}, {precision}")
    with autocast:
        if args.trajectory and rank == 0:
            draw_trajectory(folder, net, config, seeds, labels, device)
        elif not args.trajectory:
            missing = [seed for seed in seeds[rank::world] if not png(folder, seed).exists()]
            mine = choose_labels(missing, classes, config.num_classes, data)
            write_pngs(folder, sample_images(net, config, missing, mine, device, args.batch, data))
    agree()  # the last image is there
    if rank == 0 and not args.trajectory:
        pack(folder, args.format, seeds, labels, names, config)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", help="folder or checkpoint.pt of a run of train.py")
    add("--out", help="folder of the PNGs; default: samples-STEP-FLAGS beside the checkpoint")
    add("--format", choices=["grid", "folder", "npz", "animation"], default="grid",
        help="what is written beside that folder; folder: nothing")
    add("--data", help="clips whose first frames are given, to a run of clips; default: its own")
    add("--trajectory", action="store_true", help="instead: z and x_hat at eight noise levels")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--count", type=int,
                        help="seeds 0 to COUNT - 1; default: 8 of each class, 80 at most")
    number.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "LAST"), help="inclusive")
    add("--classes", nargs="+", help="names or numbers, taken in turn; all; random; default: for "
        "an npz all, else up to ten spread over all")
    add("--weights", choices=["ema", "raw"], default="ema")
    add("--steps", type=int, help="default of this and the next four: as the run was configured")
    add("--sampler", choices=["ddpm", "ddim"])
    add("--gamma", type=float, help="variance of the DDPM noise: 0 lower bound, 1 upper bound")
    add("--guidance", type=float, help="scale; 1 is none")
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="guidance where LOW <= logsnr < HIGH; -99 99 is everywhere")
    add("--batch", type=int, default=64, help="images, or clips, at once in a process")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    add("--compile", action="store_true", help="torch.compile: pays with many images")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    return parser.parse_args()


def configure(args: argparse.Namespace, config: sid2.Config) -> sid2.Config:
    """The run's configuration, with the flags of this command."""
    flags = dict(sample_steps=args.steps, sampler=args.sampler, gamma=args.gamma,
                 guidance=args.guidance, interval=args.interval and tuple(args.interval))
    config = replace(config, **{key: value for key, value in flags.items() if value is not None})
    check(config)
    clips = config.given + config.frames > 1
    if args.batch < 1:
        raise InputError(f"--batch must be at least 1, got {args.batch}")
    if config.num_classes == 0 and (args.classes or args.guidance not in (None, 1)):
        raise InputError("this run has no classes: --classes and --guidance need a conditional one")
    if config.given and args.classes or args.data and not config.given:
        raise InputError("--data is for runs with given frames, whose clips have their own class; "
                         "--classes is for other runs")
    if clips and args.trajectory or not clips and args.format == "animation":
        raise InputError("--trajectory shows images, --format animation shows clips")
    return config


def choose_seeds(args: argparse.Namespace, classes: list) -> list[int]:
    default = 3 if args.trajectory else 8 * min(10, len(classes))
    first, last = args.seeds or (0, (default if args.count is None else args.count) - 1)
    if not 0 <= first <= last < 2**32:  # torch's CPU generator keeps 32 bits of a seed
        raise InputError("--count must be at least 1, --seeds 0 <= FIRST <= LAST < 2^32; got "
                         f"{args.seeds or args.count}")
    return list(range(first, last + 1))


def choose_classes(args: argparse.Namespace, names: list[str], num_classes: int) -> list:
    """--classes as numbers, or ["random"]."""
    if args.classes is None and args.format == "npz" and num_classes > 10:
        args.classes = ["all"]
    if args.classes is None:
        return shown_classes(num_classes)
    if args.classes == ["random"]:
        return ["random"]
    if args.classes == ["all"]:
        return list(range(num_classes))
    numbers = {str(i): i for i in range(num_classes)} | {name: i for i, name in enumerate(names)}
    unknown = [name for name in args.classes if name not in numbers]
    if unknown:
        raise InputError(f"--classes {unknown[0]}: this run has classes 0 to {num_classes - 1}: "
                         f"{', '.join(names[:20])}")
    return [numbers[name] for name in args.classes]


def open_given(args: argparse.Namespace, config: sid2.Config, state: dict) -> Data:
    """Clips whose first frames are given: no more of them is needed. Shapes are drawn from a seed
    above those of runs, as long as in training, which sets their speed."""
    name = args.data or state["data"]
    length = config.given + config.frames if name == "shapes" else max(2, config.given)
    data = open_data(name, config.image_size, 2**32, length)
    if config.num_classes and data.classes != state["classes"]:
        raise InputError(f"--data {name} has other classes than the run")
    return data


def open_samples(args: argparse.Namespace, settings: dict, rank: int) -> Path:
    """The folder of the PNGs, new or made with the same settings, which lie there as JSON."""
    words = [f"samples-{settings['step']:07d}"]
    for flag in "classes weights steps sampler gamma guidance interval precision".split():
        value = getattr(args, flag)
        if value not in (None, "ema", "auto"):
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    run = Path(args.run)
    run = run if run.is_dir() else run.parent
    name = os.fsencode("-".join(words).replace("/", "-"))[:200].decode(errors="ignore")
    folder = Path(args.out) if args.out else run / name
    file = folder / "settings.json"
    settings = json.loads(json.dumps(settings))  # as they are read back
    if file.is_file():
        with reading(file, "the settings of sample.py"):
            refuse_others(folder, dict(json.loads(file.read_text())), settings)
    elif is_taken(folder):
        raise InputError(f"{folder} exists and has no settings.json: give another --out")
    agree()  # all have looked before one writes
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
    agree()  # the folder is there
    return folder


def png(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def write_pngs(folder: Path, batches):
    """The PNGs of these seeds, the frames of a clip side by side. One thread writes them while the
    next batch is sampled."""

    def write(seed: int, frames: np.ndarray):
        with replacing(png(folder, seed)) as temporary:
            Image.fromarray(np.concatenate(frames, axis=1)).save(temporary, "PNG")

    with contextlib.closing(batches), ThreadPoolExecutor(1) as writer:
        written = []
        for seeds, images in batches:
            list(written)  # of the batch before: raises what went wrong, as a full disk
            written = writer.map(write, seeds, images)
        list(written)


def read_png(file: Path, length: int) -> np.ndarray:
    """(length, H, W, 3) from the frames side by side."""
    with reading(file):
        return np.stack(np.split(np.asarray(Image.open(file)), length, axis=1))


def pack(folder: Path, form: str, seeds: list[int], labels: list[int], names: list[str],
         config: sid2.Config):
    """Beside the folder of PNGs a grid, an npz or an animation of these seeds."""
    if form == "folder":
        print(f"wrote {folder}")
        return
    suffix = dict(grid="png", npz="npz", animation="webp")[form]
    path = folder.with_name(f"{folder.name}.{suffix}")
    images = (read_png(png(folder, seed), config.given + config.frames) for seed in seeds)
    with replacing(path) as temporary:
        if form == "npz":
            write_npz(temporary, images, labels, config)
        elif form == "grid":
            grid(np.stack(list(images)), labels, names, config.given).save(temporary, "PNG")
        else:
            frames = np.stack(list(images), axis=1)[:, :, None]  # (length, N, 1, H, W, 3)
            pages = [grid(frame, labels, names) for frame in frames]
            pages[0].save(temporary, "WebP", save_all=True, append_images=pages[1:], duration=125,
                          loop=0, lossless=True)
    print(f"wrote {path}")


def write_npz(path: Path, images, labels: list[int], config: sid2.Config):
    """arr_0 (N, H, W, 3) uint8, of clips (N, length, H, W, 3), and arr_1 (N,) int64, in the order
    of the seeds. One image after the other: 50,000 of 256 px are 9.8 GB."""
    size, length = config.image_size, config.given + config.frames
    shape = (len(labels), *[length] * (length > 1), size, size, 3)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as out:
            header = dict(descr="|u1", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(out, header)
            for image in images:
                out.write(image.tobytes())
        with archive.open("arr_1.npy", "w") as out:
            np.lib.format.write_array(out, np.asarray(labels))


def draw_trajectory(folder: Path, net, config: sid2.Config, seeds: list[int], labels: list[int],
                    device):
    """For each seed a row of z and one of x_hat, at eight noise levels from t = 1 to the sample.
    The heading says logsnr, with a star where the step was guided."""
    logsnr, guided = sid2.sampling_grid(config)
    shown = np.unique(np.linspace(0, len(logsnr) - 1, 8).round().astype(int)).tolist()
    steps = sid2.sample_steps(net, config, seeds, torch.tensor(labels, device=device))
    kept = [(to_uint8(z.clamp(-1, 1)), to_uint8(x_hat))
            for i, (z, x_hat) in enumerate(steps) if i in shown]
    heading = ["logsnr", *(f"{logsnr[i]:.1f}{'*' * guided[i]}" for i in shown)]
    rows = []
    for i, seed in enumerate(seeds):
        rows.append((f"seed {seed}: z", [z[i] for z, _ in kept]))
        rows.append(("x_hat", [x_hat[i] for _, x_hat in kept]))
    path = folder.with_name(f"{folder.name}-trajectory.png")
    with replacing(path) as temporary:
        page(rows, heading).save(temporary, "PNG")
    print(f"wrote {path}")


if __name__ == "__main__":
    guarded(main)

"""Samples from a run of train.py: PNGs by seed, and beside them a grid, an npz or an animation.

    python sample.py runs/shapes                               a grid, one row per class
    python sample.py runs/shapes --trajectory                  how three images come about
    python sample.py runs/cifar10 --count 50000 --format npz   all classes in turn
    torchrun --nproc_per_node=8 sample.py RUN ...              the same images, the seeds shared out

Image i depends on its seed, i, and class alone. The same command again makes only what is missing.
"""

import argparse
import contextlib
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sid2
from train import (Data, InputError, agree, check, choose_labels, choose_precision, grid,
                   in_one_line, leave, load_checkpoint, lock, open_data, page, refuse_others,
                   read_image, replacing, sample_images, say, setup, shown_classes, to_uint8)


def main():
    args = parse()
    rank, world, device = setup(args.device)
    state = load_checkpoint(args.run)
    config, names = configure(args, sid2.Config(**state["config"])), state["classes"]
    classes = choose_classes(args, names, config.num_classes)
    default = 3 if args.trajectory else 8 * min(10, len(classes))
    seeds = list(range(default if args.count is None else args.count))
    data = open_given(args, config, state) if config.given else None
    labels = choose_labels(seeds, classes, config, data)
    if args.format == "animation":
        blank = np.zeros((len(seeds), 1, config.image_size, config.image_size, 3), np.uint8)
        if max(grid(blank, labels, names).size) > 16_383:
            raise InputError("WebP ends at 16,383 pixels: an animation needs a lower --count")
    precision, autocast = choose_precision(device, args.precision)
    net = sid2.ResidualUViT(config).to(device).eval()
    with in_one_line(f"the weights of {args.run} cannot be used"):
        net.load_state_dict(state["ema" if args.weights == "ema" else "net"])
    if args.compile:
        net.compile(dynamic=False, fullgraph=True)  # two graphs: with and without guidance

    # seconds tell apart two trainings that ended at the same step
    settings = asdict(config) | dict(step=state["step"], seconds=state["seconds"], classes=classes,
                                     weights=args.weights, precision=precision,
                                     data=data.name if data else None)
    folder, path = open_samples(args, settings, rank)
    files = [folder / f"{seed:06d}.png" for seed in seeds]
    guided = sum(sid2.sampling_grid(config)[1])
    say(f"{args.run}, step {state['step']}, {args.weights} weights, {len(seeds)} samples, "
        f"{config.sample_steps} {config.sampler} steps, {guided} of them guided, "
        f"{world} x {device}, {precision}")
    with autocast:
        if args.trajectory and rank == 0:
            draw_trajectory(path, net, config, seeds, labels, device)
        elif not args.trajectory:
            missing = [seed for seed in seeds[rank::world] if not files[seed].exists()]
            mine = [labels[seed] for seed in missing]
            write_pngs(files, sample_images(net, config, missing, mine, device, args.batch, data))
    agree()  # the last image is there
    if rank == 0 and not args.trajectory and args.format != "folder":
        pack(files, path, labels, names, config)
    say(f"wrote {path}")
    leave()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     usage="%(prog)s RUN [FLAG ...]")
    add, file = parser.add_argument, os.path.expanduser
    add("run", type=file, help="folder or checkpoint.pt of a run of train.py")
    add("--out", type=file, help="folder of the PNGs; default: samples-STEP-HASH in the run's")
    add("--format", choices=["grid", "folder", "npz", "animation"], default="grid",
        help="what is written beside that folder; folder: nothing")
    add("--data", type=file, help="clips whose first frames are given; default: the run's own")
    add("--trajectory", action="store_true", help="instead: z and x_hat at eight noise levels")
    add("--count", type=int, help="seeds 0 to COUNT - 1; default: 8 of each class, 80 at most")
    add("--classes", nargs="+", help="names or numbers, taken in turn; all; default: for an npz "
        "all, else up to ten spread over all")
    add("--weights", choices=["ema", "raw"], default="ema")
    add("--steps", type=int, help="of sampling; default of --steps to --interval: the run's")
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
    check(config, batch=args.batch, count=args.count)
    if config.num_classes == 0 and args.guidance not in (None, 1):
        raise InputError(f"--guidance needs classes: {args.run} has no classes")
    if config.given and args.classes or args.data and not config.given:
        raise InputError("--data is for runs with given frames, --classes is for the others")
    is_clip = config.given + config.frames > 1
    if args.trajectory and (is_clip or args.format != "grid"):
        raise InputError("--trajectory is a picture of images: it has no --format, and no clips")
    if args.format == "animation" and not is_clip:
        raise InputError("--format animation shows clips, and this run has images")
    return config


def choose_classes(args: argparse.Namespace, names: list[str], num_classes: int) -> list[int]:
    """--classes as numbers."""
    if args.classes == ["all"] or args.classes is None and args.format == "npz":
        return list(range(max(1, num_classes)))
    if args.classes is None:
        return shown_classes(num_classes)
    numbers = {str(i): i for i in range(num_classes)} | {name: i for i, name in enumerate(names)}
    unknown = [name for name in args.classes if name not in numbers]
    if unknown:
        raise InputError(f"--classes {unknown[0]}: this run has {num_classes} classes: "
                         f"{', '.join(names[:20])}")
    return [numbers[name] for name in args.classes]


def open_given(args: argparse.Namespace, config: sid2.Config, state: dict) -> Data:
    """Clips whose first frames are given: of folders no more is read, but 2 at least, as 1 means
    images. Shapes have a seed that no run has, and the length of training, which sets the speed."""
    name = args.data or state["data"]
    length = config.given + config.frames if name == "shapes" else max(2, config.given)
    data = open_data(name, config.image_size, 2**32, length)
    if config.num_classes and data.classes != state["classes"]:
        raise InputError(f"--data {name} has other classes than the run")
    return data


def open_samples(args: argparse.Namespace, settings: dict, rank: int) -> tuple[Path, Path]:
    """The folder of the PNGs, and the file beside it. The folder is new or made with the same
    settings, which lie there as JSON; its default name has a hash of them."""
    run = Path(args.run) if os.path.isdir(args.run) else Path(args.run).parent
    text = json.dumps(settings, indent=1)
    default = run / f"samples-{settings['step']:07d}-{zlib.crc32(text.encode()):08x}"
    folder = Path(args.out or default).absolute()
    suffixes = dict(grid=".png", npz=".npz", animation=".webp", trajectory="-trajectory.png")
    suffix = suffixes.get("trajectory" if args.trajectory else args.format, "")
    path = Path(f"{folder}{suffix}")
    file = folder / "settings.json"
    beside = [f"{folder}{suffix}" for suffix in suffixes.values()]
    inside = os.path.isdir(folder) and any(folder.glob("[!.]*"))
    if (inside or any(map(os.path.lexists, beside))) and not os.path.exists(file):
        raise InputError(f"{folder} or a file beside it is not from sample.py: give another --out")
    agree()  # all have looked before one writes
    if rank == 0:
        lock(folder)
        if not os.path.exists(file):
            with replacing(file) as temporary:
                temporary.write_text(text)
    agree()  # it is there
    with in_one_line(f"{file} cannot be read"):
        before = dict(json.loads(file.read_text()))
    refuse_others(folder, before, json.loads(text))
    return folder, path


def write_pngs(files: list[Path], batches: Iterable):
    """A PNG for each seed, the frames of a clip side by side."""
    with contextlib.closing(batches):  # and its bar, before an error is printed
        for seeds, images in batches:
            for seed, frames in zip(seeds, images):
                with replacing(files[seed]) as temporary:
                    Image.fromarray(np.concatenate(frames, axis=1)).save(temporary, "PNG")


def pack(files: list[Path], path: Path, labels: list[int], names: list[str], config: sid2.Config):
    """Beside the folder of PNGs a grid, an animation, or an npz of arr_0 uint8 (N, H, W, 3), of
    clips (N, length, H, W, 3), and arr_1, the labels (N,)."""
    length = config.given + config.frames
    images = np.empty((len(labels), length, config.image_size, config.image_size, 3), np.uint8)
    for seed, file in enumerate(files):
        images[seed] = np.split(read_image(file, None), length, axis=1)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if path.suffix == ".npz":
            np.savez(file, images if length > 1 else images[:, 0], np.array(labels))
        elif path.suffix == ".png":
            grid(images, labels, names, config.given).save(file, "PNG")
        else:
            pages = [grid(images[:, [i]], labels, names) for i in range(length)]
            pages[0].save(file, "WebP", save_all=True, append_images=pages[1:], duration=125,
                          loop=0, lossless=True)


def draw_trajectory(path: Path, net, config: sid2.Config, seeds: list[int], labels: list[int],
                    device):
    """For each seed a row of z and one of x_hat, at eight noise levels from t = 1 to the sample.
    The heading says logsnr, with a star where the step was guided."""
    logsnr, guided = sid2.sampling_grid(config)
    shown = np.unique(np.linspace(0, len(logsnr) - 1, 8).round().astype(int)).tolist()
    steps = sid2.trajectory(net, config, seeds, torch.tensor(labels, device=device))
    kept = [(to_uint8(z.clamp(-1, 1)), to_uint8(x_hat))
            for i, (z, x_hat) in enumerate(steps) if i in shown]
    heading = ["logsnr", *(f"{logsnr[i]:.1f}{'*' * guided[i]}" for i in shown)]
    rows = []
    for i, seed in enumerate(seeds):
        rows.append((f"seed {seed}: z", [z[i] for z, _ in kept]))
        rows.append(("x_hat", [x_hat[i] for _, x_hat in kept]))
    with replacing(path) as temporary:
        page(rows, heading).save(temporary, "PNG")


if __name__ == "__main__":
    main()

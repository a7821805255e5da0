"""Samples from a run of train.py: a folder of PNGs by seed, and beside it a grid or an npz.

    python sample.py runs/shapes                               a grid, one row per class
    python sample.py runs/shapes --trajectory                  how three images come about
    python sample.py runs/cifar10 --count 50000 --classes random --format npz
    torchrun --nproc_per_node=8 sample.py RUN ...              the same images, the seeds shared out

Image i depends on its seed and class alone. The same command again makes only what is missing.
"""

import argparse
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import sid2
from train import (InputError, Parser, agree, autocast_of, check, check_settings, choose_labels,
                   choose_precision, grid, guarded, load_checkpoint, page, replacing, sample_images, setup,
                   shown_classes, to_uint8, write_json)


def main():
    args = parse()
    state = load_checkpoint(args.run)
    config, names = configure(args, state["config"]), state["classes"]
    seeds, classes = choose_seeds(args, config), choose_classes(args, names, config.num_classes)
    labels = choose_labels(seeds, classes, config.num_classes)
    rank, world, device = setup(args.device)
    precision = choose_precision(device, args.precision)
    autocast = autocast_of(device, precision)
    settings = dict(step=state["step"], seconds=state["seconds"], weights=args.weights,
                    classes=classes, precision=precision, config=asdict(config))
    folder = open_folder_of_samples(args, state["step"], settings, rank)

    net = sid2.ResidualUViT(config).to(device).eval()
    net.load_state_dict(state["ema" if args.weights == "ema" else "net"])
    if args.compile:
        net.compile(dynamic=False, fullgraph=True)  # two graphs: with and without guidance
    if rank == 0:
        print(f"{args.run}, step {state['step']}, {args.weights} weights, {len(seeds)} images, "
              f"{config.sampler} {config.sample_steps} steps, guidance {config.guidance} for "
              f"logsnr in {list(config.interval)}, {world} x {device}")
    if args.trajectory:
        with autocast:
            picture = trajectory(net, config, seeds, labels, device)
        with replacing(path := folder.with_name(f"{folder.name}-trajectory.png")) as temporary:
            picture.save(temporary, "PNG")
        return print(f"wrote {path}")

    files = {seed: folder / f"{seed:06d}.png" for seed in seeds}
    label_of = dict(zip(seeds, labels))
    missing = [seed for seed in seeds[rank::world] if not files[seed].exists()]
    with (autocast, ThreadPoolExecutor(1) as writer,  # writes while the next batch is sampled
          tqdm(total=len(missing), disable=rank > 0, bar_format="{l_bar}{bar}| {n:.0f}/{total} "
               "images [{elapsed}<{remaining}]") as bar):
        written = []
        for part, images in sample_images(net, config, missing, [label_of[s] for s in missing],
                                          device, args.batch, bar):
            for job in written:
                job.result()  # a full disk is noticed here
            written = [writer.submit(write_png, files[seed], image)
                       for seed, image in zip(part, images)]
        for job in written:
            job.result()
    agree()  # the last image is there
    if rank == 0:
        pack(args.format, folder, list(files.values()), labels, names)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", help="folder or checkpoint.pt of a run of train.py")
    add("--out", help="folder of the PNGs; default: samples-STEP-FLAGS beside the checkpoint")
    add("--format", choices=["grid", "folder", "npz"], default="grid",
        help="what is written beside that folder; default: %(default)s")
    add("--trajectory", action="store_true", help="instead: z and x_hat at eight noise levels")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--count", type=int, help="seeds 0 to COUNT - 1; default: 8 for each class "
                        "shown, with --trajectory 3")
    number.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "LAST"), help="inclusive")
    add("--classes", nargs="+", help="names or numbers, taken in turn; all; random; default: for "
        "an npz all, else up to ten spread over all")
    add("--weights", choices=["ema", "raw"], default="ema")
    add("--steps", type=int, help="default of this and the next four: as the run was configured")
    add("--sampler", choices=["ddpm", "ddim"])
    add("--gamma", type=float, help="DDPM noise: 0 its lower bound, 1 its upper bound")
    add("--guidance", type=float, help="scale; 1 is none")
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="guidance where LOW <= logsnr < HIGH; -99 99 is everywhere")
    add("--batch", type=int, default=64, help="images at once, per process; default: %(default)s")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    add("--compile", action="store_true", help="torch.compile: pays with many images")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    return parser.parse_args()


def configure(args: argparse.Namespace, config: sid2.Config) -> sid2.Config:
    """The run's configuration, with the flags of this command."""
    flags = dict(sample_steps=args.steps, sampler=args.sampler, gamma=args.gamma,
                 guidance=args.guidance, interval=args.interval and tuple(args.interval))
    config = replace(config, **{key: value for key, value in flags.items() if value is not None})
    if config.num_classes == 0 and (args.classes or args.guidance not in (None, 1)):
        raise InputError("this run has no classes: --classes and --guidance need a conditional one")
    check(config)
    if args.batch < 1:
        raise InputError(f"--batch must be at least 1, got {args.batch}")
    return config


def choose_seeds(args: argparse.Namespace, config: sid2.Config) -> list[int]:
    default = 3 if args.trajectory else 8 * len(shown_classes(config.num_classes))
    count = default if args.count is None else args.count
    first, last = args.seeds or (0, count - 1)
    if not 0 <= first <= last < 2**32:  # torch's CPU generator keeps 32 bits of a seed
        raise InputError(f"--count must be at least 1, --seeds 0 <= FIRST <= LAST < 2^32; got "
                         f"{args.seeds or args.count}")
    return list(range(first, last + 1))


def choose_classes(args: argparse.Namespace, names: list[str], num_classes: int) -> list:
    """--classes as numbers, or ["random"]."""
    everything = list(range(num_classes))
    if args.classes is None:
        return everything if args.format == "npz" else shown_classes(num_classes)
    if args.classes == ["random"]:
        return ["random"]
    if args.classes == ["all"]:
        return everything
    numbers = {str(i): i for i in everything} | {name: i for i, name in enumerate(names)}
    for name in args.classes:
        if name not in numbers:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise InputError(f"--classes {name}: this run has classes 0 to {num_classes - 1}: "
                             f"{known}")
    return [numbers[name] for name in args.classes]


def open_folder_of_samples(args: argparse.Namespace, step: int, settings: dict, rank: int) -> Path:
    """The folder of the PNGs, new or made with the same settings, which lie there as JSON."""
    run = Path(args.run)
    names = ("classes", "weights", "steps", "sampler", "gamma", "guidance", "interval", "precision")
    said = []
    for name in names:
        value = getattr(args, name)
        if value not in (None, "ema", "auto"):
            value = value if isinstance(value, list) else [value]
            said += [name, *map(str, value)]
    name = "-".join([f"samples-{step:07d}", *said])[:200]
    folder = Path(args.out) if args.out else (run if run.is_dir() else run.parent) / name
    file = folder / "settings.json"
    if file.is_file():
        check_settings(file, settings)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and holds no samples: give another --out")
    agree()  # all have looked before one writes
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
    agree()  # the folder is there
    return folder


def write_png(path: Path, image: np.ndarray):
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG")


def pack(kind: str, folder: Path, files: list[Path], labels: list[int], names: list[str]):
    """The PNGs as a grid or an npz beside their folder."""
    if kind == "folder":
        return print(f"wrote {folder}")
    path = folder.with_name(folder.name + (".png" if kind == "grid" else ".npz"))
    with replacing(path) as temporary:
        if kind == "grid":
            images = np.stack([np.asarray(Image.open(file)) for file in files])
            grid(images, labels, names).save(temporary, "PNG")
        else:
            write_npz(temporary, files, labels)
    print(f"wrote {path}, its images in {folder}")


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


def trajectory(net, config: sid2.Config, seeds: list[int], labels: list[int], device):
    """For each seed a row of z and one of x_hat, at eight noise levels from t = 1 to the sample.
    The heading gives logsnr, with a star where the step was guided."""
    t = torch.arange(config.sample_steps, 0, -1) / config.sample_steps
    logsnr, _ = sid2.schedule(t, config.image_size, config.noise_low, config.noise_high)
    shown = sorted(set(np.linspace(0, len(t) - 1, 8).round().astype(int).tolist()))
    guidance = config.guidance if config.num_classes else 1.0
    steps = sid2.sample_steps(net, seeds, torch.tensor(labels, device=device), config.num_classes,
                              logsnr, config.image_size, config.sampler, config.gamma, guidance,
                              config.interval)
    kept = [(to_uint8(z.clamp(-1, 1)), to_uint8(x_hat))
            for i, (z, x_hat) in enumerate(steps) if i in shown]
    low, high = config.interval
    guided = [guidance != 1 and low <= value < high for value in logsnr[shown].tolist()]
    heading = [f"{value:.1f}{'*' * star}" for value, star in zip(logsnr[shown].tolist(), guided)]
    rows = [(f"{name} {seed}", [pair[kind][i] for pair in kept])
            for i, seed in enumerate(seeds) for kind, name in enumerate(("z", "x_hat"))]
    return page(rows, heading)


if __name__ == "__main__":
    guarded(main)

"""Trains SiD2, in one process or many.

    python train.py                                        shapes, a few minutes on a CPU
    python train.py --preset cifar10                       one GPU
    torchrun --nproc_per_node=8 train.py --preset imagenet256_p2 --data FOLDER

The same command again goes on from the last checkpoint, on a CPU bit for bit. SIGTERM or Ctrl-C
finishes the step, saves and ends; a second Ctrl-C does not wait.

First comes the loop, then the run (command line, processes, folder, pictures), then the data.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import tarfile
import time
import zipfile
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

# With this on, Inductor 2.10 to 2.13 may lose gradients of scale and offset (pytorch issue 193061)
os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import sid2

# --------------------------------------------------------------------------------------------------
# 1. The loop


def main():
    args = parse()
    rank, world, device = setup(args.device)
    config, data = configure(args, world)
    local = config.batch // world  # images, or clips, of this process per step
    micro = args.micro_batch or local  # of these, on the device at once
    counted = local * (config.frames - config.given)  # frames that the loss is a mean of
    precision = choose_precision(device, args.precision)
    autocast = autocast_of(device, precision)
    run = Run(args, config, data, rank, world, device, precision)

    torch.manual_seed(args.seed)
    net = sid2.ResidualUViT(config).to(device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), config.lr, config.betas, config.adam_eps,
                                 fused=True)
    start = run.resume(net, ema, optimizer)
    net.checkpointing = args.checkpointing
    if args.compile or args.compile is None and device.type == "cuda":
        net.compile(dynamic=False, fullgraph=True)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net
    batches = Batches(data, config, args.seed, rank * local, local)
    loader = open_loader(batches, start, args.workers, device)
    generator = torch.Generator(device)
    model.train()

    with run.progress(loader, start) as bar:
        for step, batch in enumerate(bar, start):
            torch.manual_seed(args.seed + 1_000_003 * step + rank)  # dropout
            optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup))
            loss = torch.zeros((), device=device)
            for k in range(0, local, micro):
                *tensors, seeds = (whole[k : k + micro] for whole in batch)
                # images, labels and times (clips, frames, ...) become (B, ...)
                x, y, t = (w.to(device, non_blocking=w.is_pinned()).flatten(0, 1) for w in tensors)
                x = from_uint8(x)
                eps = noise(seeds.tolist(), x, generator)
                model.require_backward_grad_sync = k + micro == local  # DDP averages once a step
                with autocast:
                    share = sid2.training_loss(model, config, x, y, t, eps).sum() / counted
                share.backward()
                loss += share.detach()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip or math.inf)
            optimizer.found_inf = 1 - norm.isfinite().float()  # 1: fused Adam skips the step
            if device.type == "mps" and optimizer.found_inf:  # MPS's fused Adam ignores it
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            sid2.ema_update(ema, net, step, config.ema)

            if run.record(step + 1, loss, norm, net, ema, optimizer):  # a signal came
                break
    run.finish()


def noise(seeds: list[int], x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """eps, shaped as x: that of each image or clip from its own seed, whatever its batch or
    process."""
    shape = (len(x) // len(seeds), *x.shape[1:])
    return torch.cat([torch.randn(shape, device=x.device, generator=generator.manual_seed(seed))
                      for seed in seeds])


class Batches(Dataset):
    """Item n is this process's share of step n: uint8 images (B, frames, H, W, 3), labels and times
    (B, frames), seeds (B,). B counts clips; an image is a clip of one frame.

    Everything random at step n is drawn from (seed, n), for the whole batch of all processes; each
    takes its share. So a restart needs no random state, and the number of processes changes nothing
    (only dropout draws anew in each).
    """

    def __init__(self, data, config: sid2.Config, seed: int, first: int, count: int):
        self.data, self.config, self.seed = data, config, seed
        self.place = np.arange(first, first + count)  # of this process's share in the whole batch
        self.epoch, self.order = None, None

    def __len__(self) -> int:
        return self.config.steps

    def clip_of(self, number: int) -> int:
        """Index in the data of the run's clip `number`; each epoch visits all, in a new order."""
        epoch, place = divmod(number, len(self.data.labels))
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, 1, epoch])
            self.epoch, self.order = epoch, rng.permutation(len(self.data.labels))
        return self.order[place]

    def __getitem__(self, step: int):
        try:
            return self.make(step)
        except (LocalError, OSError) as error:  # for the training process to raise
            return error

    def make(self, step: int) -> tuple[torch.Tensor, ...]:
        config, place = self.config, self.place
        rng = np.random.default_rng([self.seed, 0, step])
        start = rng.random()
        flip = rng.random(config.batch)[place] < 0.5 * config.flip
        drop = rng.random(config.batch)[place] < config.label_dropout
        window = rng.random(config.batch)[place]  # where in its clip it begins: see Data.clips
        numbers = step * config.batch + place  # of the clips, counted over the run
        clips = np.array([self.clip_of(number) for number in numbers])
        images, labels = self.data.clips(clips, window, config.frames)
        images = np.where(flip[:, None, None, None, None], images[..., ::-1, :], images)
        y = np.where(drop | (config.num_classes == 0), config.num_classes, labels)
        t = sid2.low_discrepancy_times(config.batch, start)[place]
        # noise seeds: consecutive in a run; Knuth's multiplier sets nearby --seeds far apart
        seeds = ((self.seed + 1) * 2654435761 % 2**32 + numbers) % 2**32
        y, t = (each[:, None].repeat(1, config.frames) for each in (torch.from_numpy(y), t))
        return torch.from_numpy(images), y, t, torch.from_numpy(seeds)


def open_loader(batches: Batches, start: int, workers: int | None, device) -> DataLoader:
    """The items of `batches` from step `start` on; on CUDA in memory that is copied from fast."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine
    if workers is None:
        workers = min(8, os.cpu_count() // processes) if device.type == "cuda" else 1
    config, shared = batches.config, Path("/dev/shm")  # by which loader processes hand over items
    item = len(batches.place) * config.frames * 3 * config.image_size**2
    needed = processes * workers * 2 * item  # each has two under way
    if shared.is_dir() and shutil.disk_usage(shared).free < needed:  # they would wait for ever
        raise InputError(f"{shared} has less than the {needed / 1e6:.0f} MB free that --workers "
                         f"{workers} needs: allow more (docker: --shm-size), or give --workers 0")
    return DataLoader(batches, batch_size=None, sampler=range(start, len(batches)),
                      num_workers=workers, worker_init_fn=deaf, pin_memory=device.type == "cuda")


def deaf(_):
    """A loader process leaves signals to the process that it works for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------
# 2. The run: errors, processes, command line


class InputError(Exception):
    """What the user can mend: one line says what came, what is allowed, what to do."""


class LocalError(InputError):
    """The same, but met by one process alone: an image, or its GPU."""


def guarded(main):
    """Runs the main function of a script. What the user can mend ends it with one line of error and
    exit code 2; SIGTERM is like Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code, message = 2, ""
    try:
        main()
    except KeyboardInterrupt:
        code, message = 130, "interrupted; what was written before is whole"
    except InputError as error:
        message = str(error)
        if not isinstance(error, LocalError) and os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(code)  # the first process of this machine says the same
    except OSError as error:  # no space, no permission, a disk that went away
        message = f"cannot read or write: {error}; what was written before is whole"
    except (torch.OutOfMemoryError, MemoryError):
        message = "out of memory: --batch, in train.py --micro-batch, takes fewer images at once"
    finally:
        end_loaders()
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        raise SystemExit(code)
    if dist.is_initialized():  # all processes end together
        agree()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may abort while Python shuts down, so it does not


def end_loaders():
    """Kills the loader processes that an error has left. They ignore SIGTERM, which Python sends at
    exit before it waits for them; it would wait for ever."""
    if loaders := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for loader in loaders:
            loader.kill()


def setup(name: str) -> tuple[int, int, torch.device]:
    """Rank, number of processes, device; joins the process group if torchrun has set RANK."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":  # MPS has no process group
        mps = torch.backends.mps.is_available() and world == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LocalError(f"--device {name} cannot be used by process {local_rank} here: {reason}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32, in convolutions too
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ:
        # agree() is on the CPU, by gloo; two hours, as the others wait while the first draws
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return rank, world, device


def agree(flag: bool = False) -> bool:
    """True if `flag` is true in any process. No process returns before all have called."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.item() > 0


def choose_precision(device: torch.device, precision: str) -> str:
    """bf16 or fp32; auto is bf16 where the hardware multiplies it."""
    if precision != "auto":
        return precision
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


def autocast_of(device: torch.device, precision: str) -> torch.autocast:
    """bf16: autocast around float32 weights. fp32: nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Parser(argparse.ArgumentParser):
    """Wrong flags end like every other bad input, and a flag must be written in full."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the flags)")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", choices=sid2.PRESETS, default="shapes", metavar="NAME",
        help=f"{', '.join(sid2.PRESETS)}; `python sid2.py` shows them")
    add("--data", help="shapes, cifar10, a folder of images or an npz; default: the preset's own")
    add("--out", help="folder of the run; default: runs/PRESET")
    add("--skip-bad", action="store_true", help="instead of an unreadable image take the next one")
    add("--init-from", help="start from the EMA weights of this run, whose trunk must fit")
    add("--seed", type=int, default=0)
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto",
        help="auto: bf16 where the hardware multiplies it")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    add("--micro-batch", type=int, help="images, or clips, at once in a process; default: all")
    add("--checkpointing", type=int, nargs="*", default=(), metavar="LEVEL",
        help="compute activations again at these levels (0 is the top; none named: all): less "
        "memory, slower")
    add("--workers", type=int, help="loader processes; default: up to 8 on CUDA, else 1")
    add("--log-every", type=int, default=50, help="steps between rows of the log")
    add("--sample-every", type=int, default=1000, help="steps between pictures; 0: never")
    add("--save-every", type=int, default=1000, help="steps between checkpoints; 0: never")
    group = parser.add_argument_group("fields of sid2.Config; default: the preset's")
    # the comment beside each field of sid2.Config is the help of its flag
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(sid2.Config), re.M))
    for field in fields(sid2.Config):
        flag = f"--{field.name.replace('_', '-')}"
        value = getattr(sid2.PRESETS["shapes"], field.name)
        note = comments[field.name]
        if isinstance(value, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=note)
        elif isinstance(value, tuple):
            number = "+" if field.name == "channels" else len(value)
            group.add_argument(flag, type=type(value[0]), nargs=number, help=note)
        else:
            group.add_argument(flag, type=type(value), help=note)
    return parser.parse_args()


def configure(args: argparse.Namespace, world: int):
    """The configuration, of the preset, the flags and the classes of the data; and the data."""
    preset = sid2.PRESETS[args.preset]
    chosen = {}
    for field in fields(preset):
        value = getattr(args, field.name)
        if value is not None:
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
    config = replace(preset, **chosen)
    if args.checkpointing == []:  # the flag without a level; () without the flag
        args.checkpointing = range(len(config.channels))
    check(config, world=world, **vars(args))
    own = dict(shapes="shapes", moving="shapes", cifar10="cifar10")  # data of a preset
    name = args.data or own.get(args.preset)
    if not name:
        raise InputError(f"--preset {args.preset} needs --data: shapes, a folder or an npz")
    data = open_data(name, config.image_size, args.seed, args.skip_bad, config.frames)
    if args.num_classes and args.num_classes != len(data.classes):
        raise InputError(f"--num-classes {args.num_classes}: {data.name} has {len(data.classes)} "
                         "classes; 0 trains without them")
    if config.num_classes > 0:
        config = replace(config, num_classes=len(data.classes))
    return config, data


def check(config: sid2.Config, **flags):
    """The rules whose breach torch would report late or unclearly; flags: those of the script."""
    values, channels = flags | asdict(config), config.channels
    unit = config.patch_size * 2 ** (len(channels) - 1)
    part = values.get("world", 1) * (values.get("micro_batch") or 1)
    rules = [
        ("patch_size head_width frames noise_low steps batch sample_steps log_every micro_batch",
         "must be at least 1", lambda n: n >= 1),
        ("middle num_classes noise_high lr warmup adam_eps clip sample_every save_every "
         "workers", "must not be negative", lambda n: n >= 0),
        ("seed", "must be at least 0 and below 2^32", lambda n: 0 <= n < 2**32),
        ("dropout ema label_dropout gamma", "must lie in [0, 1]", lambda n: 0 <= n <= 1),
        ("bias guidance", "must be finite", math.isfinite),
        ("given", f"must be at least 0 and below frames, {config.frames}",
         lambda n: 0 <= n < config.frames),
        ("depth", "must not be negative", lambda pair: min(pair) >= 0),
        ("betas", "must lie in [0, 1)", lambda pair: 0 <= min(pair) <= max(pair) < 1),
        ("width", "must be even and positive", lambda n: n > 0 and n % 2 == 0),
        ("interval", "needs the lower number first", lambda pair: pair[0] < pair[1]),
        ("blocks", f"needs a letter R or T for each of the {len(channels)} channels",
         lambda kinds: set(kinds) <= set("RT") and len(kinds) == len(channels) > 0),
        ("channels", f"must be positive, at T levels multiples of head_width {config.head_width}",
         lambda widths: all(n > 0 and (kind == "R" or n % config.head_width == 0)
                            for n, kind in zip(widths, config.blocks))),
        ("image_size", f"must be a multiple of {unit}, patch_size times 2 per lower level",
         lambda n: n > 0 and n % unit == 0),
        ("batch", f"must be a multiple of {part}, the number of processes times micro_batch",
         lambda n: n % part == 0),
        ("checkpointing", f"must be levels 0 to {len(channels) - 1}",
         lambda levels: set(levels) <= set(range(len(channels)))),
        ("sampler", "must be ddpm or ddim", lambda name: name in ("ddpm", "ddim")),
    ]
    for names, rule, holds in rules:
        for name in names.split():
            if values.get(name) is not None and not holds(values[name]):
                raise InputError(f"{name} {rule}, got {values[name]}")


# --------------------------------------------------------------------------------------------------
# 3. The run: its folder


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary name beside `path`, which takes its place when all has gone well and is on the
    disk. So nobody reads half a file, and what was there stays if the disk is full or power fails.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_state(path: Path, state: dict):
    """torch.save, but a full disk is called by its name: torch hides the file's own error."""
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error


def write_json(path: Path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def check_settings(file: Path, settings: dict, free: tuple = ()):
    """Raises InputError unless the folder of `file` is new or empty, or `file` holds the same
    settings; those named in `free` may differ."""
    if not file.is_file():
        folder = file.parent
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and has no {file.name}: give another --out")
        return
    try:
        before = dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise InputError(f"{file} is damaged: restore it, or give another --out")
    settings = json.loads(json.dumps(settings))  # as they are read back
    if before.keys() != settings.keys():
        raise InputError(f"{file} is of another version of this code: give another --out")
    differ = [f"{key} {before[key]} -> {value}" for key, value in settings.items()
              if key not in free and before[key] != value]
    if differ:
        raise InputError(f"{file.parent} was made with other settings ({', '.join(differ)}): give "
                         "another --out, or the same flags")


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint at `path`, or in the run folder `path`: config, classes, data, step, seconds,
    skipped, and the states of net, ema and optimizer. What it holds is never executed."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"no checkpoint at {path}: give the folder or the checkpoint.pt of a run "
                         "of train.py")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        known = {field.name for field in fields(sid2.Config)}
        if set(state["config"]) != known:
            raise InputError(f"{file} was written by another version of this code: train again")
        state["config"] = sid2.Config(**state["config"])
        with torch.device("meta"):
            net = sid2.ResidualUViT(state["config"])
        for name in ("net", "ema"):  # raises if the weights do not fit the configuration
            weights = dict(state[name])  # a copy: assign=True marks the dict that it is given
            net.load_state_dict(weights, assign=True)
        return {key: state[key] for key in ("config", "classes", "data", "step", "seconds",
                                            "skipped", "net", "ema", "optimizer")}
    except (InputError, PermissionError, MemoryError):
        raise
    except Exception as error:  # what torch.load raises has no narrower common type
        raise InputError(f"{file} is truncated or no checkpoint of train.py "
                         f"({type(error).__name__})")


def init_from(path: str, net: sid2.ResidualUViT) -> str:
    """Takes over another run's EMA weights where shapes agree; the trunks must be the same."""
    theirs, mine = load_checkpoint(path)["ema"], net.state_dict()
    fits = {key for key in mine.keys() & theirs.keys() if theirs[key].shape == mine[key].shape}
    trunk = {key for key in mine.keys() | theirs.keys()
             if key.split(".")[0] in ("blocks_down", "down", "middle", "up", "blocks_up")}
    if trunk - fits:
        raise InputError(f"--init-from {path}: its trunk does not fit, for example "
                         f"{min(trunk - fits)}")
    net.load_state_dict({key: theirs[key] for key in fits}, strict=False)
    fresh = ", ".join(sorted(mine.keys() - fits)) or "none"
    return f"{len(fits)} of {len(mine)} tensors from {path}; started afresh: {fresh}"


class Run:
    """A run's folder, which the first process alone writes: config.json, log.csv, checkpoint.pt and
    samples/STEP.png."""

    columns = ("step images loss grad_norm lr skipped images_per_second tflops gigabytes data_wait "
               "seconds").split()

    def __init__(self, args, config: sid2.Config, data, rank: int, world: int, device, precision):
        self.args, self.config, self.data = args, config, data
        self.rank, self.world, self.device = rank, world, device
        self.folder = Path(args.out or f"runs/{args.preset}")
        self.classes = data.classes if config.num_classes else []
        self.precision = precision
        self.unit = "image" if config.frames == 1 else "clip"
        self.parameters, self.gmac = sid2.count(config)
        self.seconds, self.skipped, self.skipped_in_a_row = 0.0, 0, 0
        self.done, self.waited, self.signals = 0, 0.0, 0
        self.history = []  # loss and norm of the gradient of each step since the last row
        self.settings = asdict(config) | dict(
            data=data.name, images=len(data.labels), classes=self.classes, seed=args.seed,
            precision=precision, init_from=args.init_from)
        file = self.folder / "config.json"
        if (self.folder / "checkpoint.pt").exists() or not file.is_file():  # else it begins anew
            check_settings(file, self.settings, free=("steps", "data"))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def resume(self, net: torch.nn.Module, ema: torch.nn.Module, optimizer) -> int:
        """The step to start from; fills all three from the checkpoint, if there is one."""
        said = f"a new run in {self.folder}"
        if os.path.lexists(self.folder / "checkpoint.pt"):
            state = load_checkpoint(self.folder)
            net.load_state_dict(state["net"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
            self.done, self.seconds = state["step"], state["seconds"]
            self.skipped = state["skipped"]
            said = f"resumed at step {self.done}"
        elif self.args.init_from:
            said = init_from(self.args.init_from, net)
            ema.load_state_dict(net.state_dict())
        if agree(self.done > 0) and agree(self.done == 0):  # some see it, some do not
            raise InputError(f"not all processes see the checkpoint in {self.folder}: it must be "
                             "on a disk that all share")
        if self.rank == 0:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", self.settings)
            self.open_log()
            print(f"{self.parameters / 1e6:.1f} M parameters, {self.gmac:.2f} GMAC per "
                  f"{self.unit}; {self.world} x {self.device}, {self.precision}, torch "
                  f"{torch.__version__}")
            print(f"data: {self.data.name}, {len(self.data.labels)} {self.unit}s, "
                  f"{len(self.data.classes)} classes")
            print(said)
        return self.done

    def open_log(self):
        """log.csv with the rows up to the checkpoint, open for more."""
        path = self.folder / "log.csv"
        lines = path.read_text(errors="replace").splitlines()[1:] if path.is_file() else []
        kept = [line for line in lines if line.count(",") == len(self.columns) - 1
                and line.split(",")[0].isdecimal() and int(line.split(",")[0]) <= self.done]
        with replacing(path) as temporary:
            temporary.write_text("\n".join([",".join(self.columns), *kept, ""]))
        self.log_file = open(path, "a", buffering=1)

    def progress(self, loader: DataLoader, start: int) -> tqdm:
        """The loader under a progress bar. How long its items were waited for is added up."""
        self.since = time.perf_counter()

        def timed():
            begun = time.perf_counter()
            for item in loader:
                self.waited += time.perf_counter() - begun
                if isinstance(item, Exception):
                    raise item
                yield item
                begun = time.perf_counter()

        self.bar = tqdm(timed(), total=self.config.steps, initial=start, unit="step",
                        disable=self.rank > 0)
        return self.bar

    def on_signal(self, number: int, _):
        """SIGTERM and Ctrl-C: noted for the end of the step. A second Ctrl-C ends the program."""
        self.signals += 1
        alone = "RANK" not in os.environ  # torchrun passes on a Ctrl-C that we have had already
        if self.signals > 1 and number == signal.SIGINT and alone:
            raise KeyboardInterrupt

    def record(self, done: int, loss: torch.Tensor, norm: torch.Tensor, net: torch.nn.Module,
               ema: torch.nn.Module, optimizer) -> bool:
        """After each step: logs, saves and draws where that is due, and only then waits for the
        device. Returns whether a signal asks to stop."""

        def due(every: int) -> bool:
            return every > 0 and (done % every == 0 or done == self.config.steps)

        self.history.append(torch.stack([loss, norm]))
        stop = agree(self.signals > 0)
        save, draw = stop or due(self.args.save_every), due(self.args.sample_every)
        if save or draw or due(self.args.log_every):
            self.log(done, optimizer.param_groups[0]["lr"])
        if save:
            self.save(done, net, ema, optimizer)
        if draw:
            self.draw(done, ema)
        return stop

    def log(self, done: int, lr: float):
        """A row of log.csv, and its short form in the bar."""
        values, self.history = torch.stack(self.history), []
        if self.world > 1:
            dist.all_reduce(values)
        values = values.cpu().numpy() / self.world
        finite = np.isfinite(values[:, 1])  # the gradient of all: the same in every process
        for step, good in enumerate(finite, done - len(finite) + 1):
            self.skipped += not good
            self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1
            if self.skipped_in_a_row == 10:
                raise InputError(f"ten steps in a row without finite gradients, up to step {step}: "
                                 "try a lower --lr or --precision fp32 in another --out, from the "
                                 f"start or with --init-from {self.folder}")
        loss = values[finite, 0].mean() if finite.any() else math.nan
        elapsed = time.perf_counter() - self.since
        rate = (done - self.done) * self.config.batch / elapsed
        tflops = 6e-3 * self.gmac * rate  # 3 passes, 2 operations for each multiply-accumulate
        peak = ""
        if self.device.type == "cuda":
            peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"
        self.seconds += elapsed
        if self.rank == 0:
            row = [done, done * self.config.batch, f"{loss:.6g}", f"{values[-1, 1]:.6g}",
                   f"{lr:.4g}", self.skipped, f"{rate:.1f}", f"{tflops:.4g}", peak,
                   f"{self.waited / elapsed:.4f}", f"{self.seconds:.1f}"]
            self.log_file.write(",".join(map(str, row)) + "\n")
        self.done, self.waited, self.since = done, 0.0, time.perf_counter()
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} {self.unit}s/s, "
                                 f"{tflops:.3g} TFLOP/s")

    def save(self, done: int, net: torch.nn.Module, ema: torch.nn.Module, optimizer):
        """checkpoint.pt: plain types and tensors; right after a row of the log."""
        if self.rank == 0:
            os.fsync(self.log_file.fileno())
            state = dict(config=asdict(self.config), classes=self.classes, data=self.data.name,
                         step=done, seconds=self.seconds, skipped=self.skipped,
                         net=net.state_dict(), ema=ema.state_dict(),
                         optimizer=optimizer.state_dict())
            with replacing(self.folder / "checkpoint.pt") as temporary:
                write_state(temporary, state)
        self.since = time.perf_counter()  # saving is not training

    def draw(self, done: int, ema: torch.nn.Module):
        """samples/STEP.png: always the same seeds and classes, from the averaged weights."""
        if self.rank == 0:
            shown = shown_classes(self.config.num_classes)
            seeds = list(range(8 * len(shown)))
            data = self.data if self.config.given else None
            labels = choose_labels(seeds, shown, self.config.num_classes, data)
            with autocast_of(self.device, self.precision):
                batches = sample_images(ema, self.config, seeds, labels, self.device, 64, data)
                images = np.concatenate([images for _, images in batches])
            with replacing(self.folder / f"samples/{done:07d}.png") as temporary:
                grid(images, labels, self.classes, self.config.given).save(temporary, "PNG")
        self.since = time.perf_counter()

    def finish(self):
        if self.rank == 0:
            minutes = self.seconds / 60
            print(f"{self.done} of {self.config.steps} steps done in {minutes:.1f} minutes")
            if (self.folder / "checkpoint.pt").exists():
                print(f"`python sample.py {self.folder}` draws samples")
            if self.done < self.config.steps:
                print("stopped by a signal: the same command goes on")


# --------------------------------------------------------------------------------------------------
# 4. The run: its pictures


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3): the inverse of from_uint8 for all 256 values."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def sample_images(net, config: sid2.Config, seeds: list[int], labels: list[int], device,
                  batch: int, data=None, hide_bar: bool = False):
    """Yields seeds and their images (B, frames, H, W, 3) uint8. All batches have one size: the last
    is filled up, as a compiled network would be compiled again for a smaller one. data: clips whose
    first frames are given; seed i takes clip i, modulo their number."""
    batches = max(1, math.ceil(len(seeds) / batch))
    size = max(1, math.ceil(len(seeds) / batches))
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} samples [{elapsed}<{remaining}]"
    with tqdm(total=len(seeds) * config.sample_steps, unit_scale=1 / config.sample_steps,
              bar_format=form, disable=hide_bar or not seeds,
              leave=None) as bar:  # stays on the screen, except below the bar of train.py

        def watched(*inputs):
            bar.update(len(part))
            return net(*inputs)

        for first in range(0, len(seeds), size):
            part, y = seeds[first : first + size], labels[first : first + size]
            missing = size - len(part)
            filled = part + part[:1] * missing
            y = torch.tensor(y + y[:1] * missing, device=device).repeat_interleave(config.frames)
            x = None
            if config.given:
                clips, _ = data.clips(np.array(filled) % len(data.labels), 0.0, config.frames)
                x = from_uint8(torch.from_numpy(clips).to(device).flatten(0, 1))
            images = to_uint8(sid2.sample(watched, config, filled, y, x))
            yield part, images.reshape(size, config.frames, *images.shape[1:])[: len(part)]


def choose_labels(seeds: list[int], classes: list, num_classes: int, data=None) -> list[int]:
    """Label of each seed: `classes` in turn; drawn from the seed alone if they are ["random"]; with
    data, whose frames are given, that of the clip."""
    if num_classes == 0:
        return [0] * len(seeds)
    if data is not None:
        return [int(data.labels[seed % len(data.labels)]) for seed in seeds]
    if classes == ["random"]:
        return [int(np.random.default_rng([1, seed]).integers(num_classes)) for seed in seeds]
    return [classes[seed % len(classes)] for seed in seeds]


def shown_classes(num_classes: int) -> list[int]:
    """Up to ten classes for a grid, spread over all; [0] without classes."""
    last = max(num_classes - 1, 0)
    return np.linspace(0, last, min(last + 1, 10)).astype(int).tolist()


def grid(images: np.ndarray, labels: list[int], names: list[str], given: int = 0) -> Image.Image:
    """Images (N, 1, H, W, 3) in rows of one class, at most 16 wide; a clip (N, frames, H, W, 3) has
    a row of its own, under a heading that says which frames were given."""
    rows, frames = [], images.shape[1]
    heading = ["", *["given"] * given, *map(str, range(given + 1, frames + 1))]
    for label in sorted(set(labels)):
        mine = images[np.array(labels) == label]
        if frames == 1:
            mine = [mine[i : i + 16, 0] for i in range(0, len(mine), 16)]
        rows += [(names[label] if names else "", row) for row in mine]
    return page(rows, heading if frames > 1 else [])


def page(rows: list[tuple[str, list[np.ndarray]]], heading: list[str] = ()) -> Image.Image:
    """Rows of images with a name on the left, and a heading for names and images, if there is one;
    small images are enlarged without smoothing."""
    height = rows[0][1][0].shape[0]
    size = height * max(1, round(64 / height))
    font, cell = ImageFont.load_default(13), size + 2
    widest = max(int(font.getlength(name)) for name in [*heading[:1], *(row[0] for row in rows)])
    left, top = widest + 8 if widest else 0, 18 if heading else 0
    width = left + cell * max(len(images) for _, images in rows)
    picture = Image.new("RGB", (width, top + cell * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for j, text in enumerate(heading):
        draw.text((left + (j - 1) * cell + 2 if j else 4, 1), text, "black", font)
    for i, (name, images) in enumerate(rows):
        draw.text((4, top + i * cell + size // 2 - 8), name, "black", font)
        for j, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((size, size), Image.NEAREST)
            picture.paste(enlarged, (left + j * cell, top + i * cell))
    return picture


# --------------------------------------------------------------------------------------------------
# 5. The data


class Data:
    """Clips with labels. An image is a clip of one frame.

    labels: int64 (N,); classes: their names, none without labels; lengths: (N,), frames of each
    clip. read(i, first, frames) gives some frames of clip i, uint8 (frames, H, W, 3), and its
    label.
    """

    def __init__(self, name: str, labels: np.ndarray, classes: list[str], lengths):
        self.name, self.labels, self.classes = name, labels.astype(np.int64), classes
        self.lengths = np.broadcast_to(lengths, labels.shape)

    def clips(self, numbers: np.ndarray, window=0.0, frames: int = 1):
        """`frames` neighbours of each of these clips, uint8 (B, frames, H, W, 3), and labels (B,).
        window: where they begin, in [0, 1): 0 as early as they can, near 1 as late; or (B,)."""
        first = (window * (self.lengths[numbers] - frames + 1)).astype(np.int64)
        images, labels = zip(*(self.read(i, j, frames)
                               for i, j in zip(numbers.tolist(), first.tolist())))
        return np.stack(images), np.array(labels)


def open_data(name: str, size: int, seed: int, skip_bad: bool = False, frames: int = 1) -> Data:
    """shapes, cifar10, FOLDER or FILE.npz, as images, or clips of `frames` at least, of size x size
    pixels."""
    path = Path(name)
    if name == "shapes":
        return Shapes(size, seed, frames)
    if name == "cifar10" and frames == 1:
        return open_cifar10(size)
    if path.is_dir():
        return open_folder(path, functools.partial(cropped_rgb, size=size), skip_bad, frames=frames)
    if path.is_file() and path.suffix == ".npz":
        return open_labelled_npz(path, size, frames)
    hint = VIDEO_HINT if path.suffix.lower() in VIDEO_SUFFIXES else ""
    raise InputError(f"--data {name} cannot be opened: give shapes, cifar10 (images only), a "
                     f"folder or an .npz file that exists{hint}")


class Shapes(Data):
    """A million drawings of six shapes in any place, size and colour, drawn when asked for. In a
    clip a shape moves straight on and bounces off the edges: two frames tell all that follow."""

    count = 1_000_000
    shapes = {  # inside or not, at a to the right and b down from the centre, in radii
        "disc": lambda a, b: a**2 + b**2 < 1,
        "ring": lambda a, b: abs(a**2 + b**2 - 0.65) < 0.35,
        "square": lambda a, b: np.maximum(abs(a), abs(b)) < 0.85,
        "triangle": lambda a, b: (b < 0.8) & (b > 2 * abs(a) - 1),
        "cross": lambda a, b: (np.maximum(abs(a), abs(b)) < 1) & (np.minimum(abs(a), abs(b)) < 0.3),
        "moon": lambda a, b: (a**2 + b**2 < 1) & ((a - 0.5) ** 2 + b**2 > 0.7),
    }

    def __init__(self, size: int, seed: int, frames: int = 1):
        self.size, self.seed, self.frames = size, seed, frames
        classes, clips = list(self.shapes), self.count // frames
        super().__init__("shapes", np.arange(clips) % len(classes), classes, frames)

    def scene(self, clip: int):
        """Radius, centres in each frame (frames, 2), both in widths of the image, and colours."""
        rng = np.random.default_rng([self.seed, 2, clip])
        radius = rng.uniform(0.26, 0.42)
        if self.frames > 1:
            radius *= 0.7  # room to move
        centre = rng.uniform(radius, 1 - radius, 2)  # the whole shape is in the picture
        dark, light = rng.uniform(0, 0.35, 3), rng.uniform(0.35, 1, 3)
        light[rng.integers(3)] = 1  # one full channel for contrast

        angle = rng.uniform(0, 2 * math.pi)
        speed = 0.1 * rng.uniform() ** 2  # widths per frame; slow ones are easier to learn from
        velocity = speed * np.array([math.cos(angle), math.sin(angle)])
        room = 1 - 2 * radius
        inside = abs(centre + velocity - 0.5) <= room / 2
        velocity = np.where(inside, velocity, -velocity)  # no bounce before the second frame
        way = centre - radius + np.arange(self.frames)[:, None] * velocity
        centres = radius + abs((way + room) % (2 * room) - room)  # folded back where it leaves
        return radius, centres, dark, light

    def draw(self, clip: int, radius: float, centre: np.ndarray, dark, light) -> np.ndarray:
        fine = max(1, 64 // self.size)  # points per pixel and axis: 4 at 16 px, 1 from 33 px up
        points = (np.arange(fine * self.size, dtype=np.float32) + 0.5) / (fine * self.size)
        a, b = (points - centre[0]) / radius, (points[:, None] - centre[1]) / radius
        inside = self.shapes[self.classes[self.labels[clip]]](a, b)
        hits = inside.reshape(self.size, fine, self.size, fine).sum((1, 3))  # of a pixel's points
        share = np.arange(fine**2 + 1)[:, None] / fine**2
        palette = (255 * (dark + share * (light - dark)) + 0.5).astype(np.uint8)
        return palette[hits]

    def read(self, i: int, first: int, frames: int) -> tuple[np.ndarray, int]:
        radius, centres, dark, light = self.scene(i)
        centres = centres[first : first + frames]
        return np.stack([self.draw(i, radius, c, dark, light) for c in centres]), self.labels[i]


class Stored(Data):
    """Images (N, H, W, 3) or clips (N, frames, H, W, 3) in an array, in memory or mapped."""

    def __init__(self, name: str, images, labels: np.ndarray, classes: list[str]):
        super().__init__(name, labels, classes, math.prod(images.shape[1:-3]))
        self.images = images

    def read(self, i: int, first: int, frames: int) -> tuple[np.ndarray, int]:
        clip = self.images[i].reshape(-1, *self.images.shape[-3:])
        return clip[first : first + frames], self.labels[i]


class Mapped:
    """A uint8 array in a file, mapped anew at each call: a memmap that is sent to loader processes
    would carry its whole content there."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...]):
        self.path, self.offset, self.shape, self.dtype = path, offset, shape, np.dtype(np.uint8)

    def __getitem__(self, index) -> np.ndarray:
        images = np.memmap(self.path, np.uint8, "r", self.offset, self.shape)
        return np.array(images[index])  # a copy: a view would keep the file open


class Folder(Data):
    """Clips in files, decoded when asked for. files: of each clip a path for each frame; the frames
    of an animation have the same path."""

    def __init__(self, name: str, files: list[list[Path]], labels: np.ndarray, classes: list[str],
                 convert, skip_bad: bool):
        super().__init__(name, labels, classes, [len(paths) for paths in files])
        self.files, self.convert, self.skip_bad = files, convert, skip_bad

    def read(self, i: int, first: int = 0, frames: int = 1) -> tuple[np.ndarray, int]:
        """Frames of clip i and its label; with skip_bad, instead of an unreadable clip the next."""
        for k in range(len(self.files)):
            clip = (i + k) % len(self.files)
            files = self.files[clip]
            begin = min(first, len(files) - frames)  # the next may be shorter
            try:
                return self.decode(files, begin, frames), self.labels[clip]
            except Exception as error:  # Pillow's decoders raise many kinds
                source = files[0] if files[0] == files[-1] else files[0].parent
                said = f"{source} cannot be read ({error})"
            if not self.skip_bad:
                raise LocalError(f"{said}: repair or remove it; train.py goes on with --skip-bad")
            print(f"warning: {said}: the next one is taken", file=sys.stderr)
        raise LocalError(f"nothing in {self.name} can be read")

    def decode(self, files: list[Path], first: int, frames: int) -> np.ndarray:
        images, sizes = [], set()
        with contextlib.ExitStack() as opened:
            for j in range(first, first + frames):
                if j == first or files[j] != files[j - 1]:  # an animation is opened once
                    image = opened.enter_context(Image.open(files[j]))
                image.seek(j if files[0] == files[-1] else 0)
                images.append(np.asarray(self.convert(image)))
                sizes.add(image.size)
        if len(sizes) > 1:
            raise ValueError(f"its frames have different sizes, {sorted(sizes)}")
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


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop, which the published ImageNet FIDs use: halved by box while twice too large, then
    bicubic, then the centre. (ADM itself does not turn images by their EXIF tag.)"""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too elongated")
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def cropped_rgb(image: Image.Image, size: int) -> Image.Image:
    return centre_crop(to_rgb(image), size)


SUFFIXES = ".avif .bmp .gif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
VIDEO_SUFFIXES = ".avi .mkv .mov .mp4 .webm".split()
VIDEO_HINT = "; videos become folders of frames by `mkdir CLIP && ffmpeg -i CLIP.mp4 CLIP/%05d.png`"


def find_files(top: Path, suffixes: list[str] = SUFFIXES) -> list[Path]:
    """Files below `top` with these suffixes, sorted; links are followed, hidden files and folders
    are not."""
    files = []
    for root, folders, names in os.walk(top, followlinks=True):
        above = {os.path.realpath(parent) for parent in Path(root).parents}
        loop = os.path.realpath(root) in above  # a link to a folder above is followed once
        folders[:] = [] if loop else [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.suffix.lower() in suffixes)


def find_clips(files: list[Path], skip_bad: bool) -> dict[Path, list[Path]]:
    """Clips by the folder of their frames, frame 2 before frame 10, or by the file of an animation.
    If the first file of a folder is an animation, all are."""
    folders, clips = {}, {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    for folder, members in folders.items():
        counts = (count_frames(file, skip_bad) for file in members)  # read only as far as needed
        first = next((count for count in counts if count > 0), 0)  # 0: no file can be read
        if first == 1:
            clips[folder] = sorted(members, key=lambda file: (len(file.stem), file.stem))
        elif first > 1:
            counted = {file: count_frames(file, skip_bad) for file in members}
            clips |= {file: [file] * count for file, count in counted.items() if count > 0}
    return clips


def count_frames(file: Path, skip_bad: bool) -> int:
    """Of an animation; 1 of an image; 0 of what cannot be read, with skip_bad."""
    try:
        with Image.open(file) as image:
            return getattr(image, "n_frames", 1)
    except Exception as error:  # Pillow's decoders raise many kinds
        if not skip_bad:
            raise InputError(f"{file} cannot be read ({error}): repair or remove it; train.py goes "
                             "on with --skip-bad")
        print(f"warning: {file} cannot be read ({error})", file=sys.stderr)
        return 0


def open_folder(path: Path, convert, skip_bad: bool = False, labelled: bool = True,
                frames: int = 1) -> Folder:
    """Images of a folder, nested, or clips if frames > 1; convert: a Pillow image -> what is taken
    of it. The immediate sub-folders are the classes; without any it is unlabelled."""
    files = find_files(path)
    if not files:
        hint = VIDEO_HINT if find_files(path, VIDEO_SUFFIXES) else ""
        raise InputError(f"no images in {path} and its sub-folders: looked for "
                         f"{' '.join(SUFFIXES)}{hint}")
    clips = find_clips(files, skip_bad) if frames > 1 else {file: [file] for file in files}
    if not clips:
        raise InputError(f"nothing in {path} can be read")
    for source, members in clips.items():
        if source == path or len(members) < frames:
            raise InputError(f"{source} has {len(members)} frames: a clip is a sub-folder of "
                             f"frames or an animation, here of {frames} at least")
    parts = [source.relative_to(path).parts for source in clips]
    names = [part[0] if labelled and len(part) > 1 else "" for part in parts]
    classes = sorted(set(names) - {""})
    if classes and "" in names:
        raise InputError(f"{path} has {names.count('')} images or clips beside its {len(classes)} "
                         "class folders: put them into classes, or away")
    labels = np.unique(names, return_inverse=True)[1]  # in the order of the classes
    return Folder(str(path), list(clips.values()), labels, classes, convert, skip_bad)


def open_npz(path: Path, wanted: str = "NHW3") -> dict:
    """The arrays of an npz by name. arr_0, where it is there, must be uint8 images (N, H, W, 3), or
    as `wanted` says. Not compressed, it is mapped where it lies; 50,000 images of 256 px are 9.8
    GB."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            arrays = {key: npz[key] for key in npz if key != "arr_0"}
            if "arr_0" not in npz:
                return arrays
            arrays["arr_0"] = map_images(path) or npz["arr_0"]
        shape, dtype = arrays["arr_0"].shape, arrays["arr_0"].dtype
        if dtype != np.uint8 or len(shape) != len(wanted) or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"arr_0 is {dtype} {shape}; wanted: uint8 ({', '.join(wanted)})")
        return arrays
    except MemoryError:
        raise
    except Exception as error:  # errors of zip, zlib, header and type share no base
        raise InputError(f"{path} is no npz to read ({error})")


def map_images(path: Path) -> Mapped | None:
    """arr_0 of an npz, mapped; None if it is compressed, or no plain array of bytes."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        member = archive.getinfo("arr_0.npy")
        file.seek(member.header_offset)
        name_length, extra_length = struct.unpack("<26x2H", file.read(30))  # a zip's local header
        file.seek(name_length + extra_length, os.SEEK_CUR)
        begin = file.tell()
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran or dtype != np.uint8:
            return None
        if begin + member.file_size - file.tell() != math.prod(shape):
            raise ValueError("arr_0 is not as long as it says: the file is damaged")
        return Mapped(path, file.tell(), shape)


def open_labelled_npz(path: Path, size: int, frames: int) -> Stored:
    """uint8 arr_0 (N, size, size, 3), or (N, L, size, size, 3) if frames > 1; labels arr_1 (N,)
    where there are any."""
    arrays = open_npz(path, "NLHW3" if frames > 1 else "NHW3")
    if "arr_0" not in arrays or arrays.keys() - {"arr_0", "arr_1"}:
        raise InputError(f"{path} holds {', '.join(arrays)}; wanted: images arr_0, and labels "
                         "arr_1 if there are any")
    images = arrays["arr_0"]
    if images.shape[-3:-1] != (size, size) or frames > 1 and images.shape[1] < frames:
        clips = f", clips of {frames} frames" if frames > 1 else ""
        raise InputError(f"{path}: arr_0 is {images.shape}, the configuration asks for {size} x "
                         f"{size} pixels{clips}")
    n = images.shape[0]
    if "arr_1" not in arrays:
        return Stored(str(path), images, np.zeros(n), [])
    labels = arrays["arr_1"]
    whole = labels.shape == (n,) and labels.dtype.kind in "iu"
    if not whole or not 0 <= labels.min() <= labels.max() < n:
        raise InputError(f"{path}: arr_1 is {labels.dtype} {labels.shape}, it must be {n} integer "
                         "labels from 0 up, with no more classes than images")
    return Stored(str(path), images, labels, [str(i) for i in range(int(labels.max()) + 1)])


CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170,052,171 bytes
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def open_cifar10(size: int) -> Stored:
    """The 50,000 training images of the binary archive: a label and 3 x 32 x 32 bytes each."""
    if size != 32:
        raise InputError(f"--data cifar10 has images of 32 px, the configuration asks for {size}")
    archive = Path(torch.hub.get_dir(), "cifar-10-binary.tar.gz")
    if os.environ.get("LOCAL_RANK", "0") == "0" and not archive.is_file():
        print(f"downloading {CIFAR10} to {archive}")
        archive.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(CIFAR10, archive, hash_prefix=CIFAR10_SHA256)
        except (OSError, RuntimeError) as error:
            raise InputError(f"could not download CIFAR-10 ({error}): fetch {CIFAR10} elsewhere "
                             f"and put it at {archive}")
    agree()  # it is there
    try:
        with tarfile.open(archive) as tar:
            members = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
            raw = b"".join(tar.extractfile(member).read() for member in members)
        records = np.frombuffer(raw, np.uint8).reshape(50_000, 1 + 3 * 32 * 32)
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise InputError(f"{archive} is damaged ({error}): remove it, the next run fetches it")
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Stored("cifar10", np.ascontiguousarray(images), records[:, 0], CIFAR10_CLASSES)


if __name__ == "__main__":
    guarded(main)

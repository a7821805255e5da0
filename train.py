"""Trains SiD2, in one process or many.

    python train.py                                        shapes, a few minutes on a CPU
    python train.py --preset cifar10                       one GPU
    torchrun --nproc_per_node=8 train.py --preset imagenet256_p2 --data FOLDER

The same command continues from the last checkpoint, on a CPU bit for bit. SIGTERM or Ctrl-C
finishes the step, saves and ends; without torchrun a second one does not wait.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import itertools
import math
import os
import re
import signal
import sys
import tarfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # see ResBlock in sid2.py

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sid2

# --------------------------------------------------------------------------------------------------
# 1. The loop


def main():
    args = parse()
    rank, world, device = setup(args.device)
    config, data = configure(args, world)
    precision, autocast = choose_precision(device, args.precision)
    local = config.batch // world  # images, or clips, of this process per step
    micro = args.micro_batch or local  # of these, on the device at once

    torch.manual_seed(args.seed)
    net = sid2.ResidualUViT(config).to(device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), config.lr, config.betas, config.adam_eps,
                                 fused=True)
    run = Run(args, config, data, rank, world, device, precision, net=net, ema=ema,
              optimizer=optimizer)
    start = run.resume()
    net.checkpointing = args.checkpointing
    if args.compile or args.compile is None and device.type == "cuda":
        net.compile(dynamic=False, fullgraph=True)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net
    generator = torch.Generator(device)
    make = functools.partial(make_batch, data, config, args.seed, rank * local, local)
    batches = in_order(make, range(start, config.steps), args.workers)
    model.train()

    with contextlib.closing(batches), run.bar:
        for step, batch in enumerate(batches, start):
            torch.manual_seed(args.seed + 1_000_003 * step + rank)  # dropout
            optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup))
            loss = torch.zeros((), device=device)
            for first in range(0, local, micro):
                part = [whole[first : first + micro] for whole in batch]
                x, y, t, eps, given = to_device(part, device, generator, config.given)
                conditioned = functools.partial(model, given=given)  # clips: on their first frames
                if world > 1:  # gradients are averaged once a step, at its last part
                    model.require_backward_grad_sync = first + micro == local
                with autocast:
                    losses = sid2.training_loss(conditioned, config, x, y, t, eps)
                share = losses.sum() / (local * config.frames)
                share.backward()
                loss += share.detach()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip or math.inf)
            # nothing waits for the device to know whether the norm is finite: where found_inf is 1,
            # the fused kernel leaves weights and moments as they are, but on MPS not in every torch
            optimizer.found_inf = 1 - norm.isfinite().float()
            if device.type != "mps" or norm.isfinite():
                optimizer.step()
            optimizer.zero_grad()
            sid2.ema_update(ema, net, step, config.ema)
            if run.record(step + 1, loss, norm):  # a signal came
                break
    left = "; the same command continues" if run.done < config.steps else ""
    say(f"step {run.done} of {config.steps}{left}; `python sample.py {run.folder}` draws samples")
    leave()


# --------------------------------------------------------------------------------------------------
# 2. Batches


def make_batch(data, config: sid2.Config, seed: int, first: int, count: int, step: int) -> list:
    """Clips first, ..., first + count - 1 of the batch of `step`: uint8 images (count, given +
    frames, H, W, 3), labels and times (count, frames), seeds of the noise (count,).

    Everything random is drawn from (seed, step), for the whole batch of all processes; each takes
    its share. So a restart needs no random state, and the number of processes changes nothing.
    """
    rng, place = np.random.default_rng([seed, 0, step]), np.arange(first, first + count)
    start = rng.random()
    flip = rng.random(config.batch)[place] < 0.5 * config.flip
    drop = rng.random(config.batch)[place] < config.label_dropout
    windows = rng.random(config.batch)[place]  # where in its clip each begins: see Data
    numbers = step * config.batch + place  # of the clips, counted over the run
    size = len(data.labels)
    clips = [order_of_epoch(seed, n // size, size)[n % size] for n in numbers.tolist()]
    images, labels = read_clips(data, clips, windows)
    images[flip] = images[flip, :, :, ::-1]
    y = np.where(drop | (config.num_classes == 0), config.num_classes, labels)
    t = sid2.low_discrepancy_times(config.batch, start)[place]
    y, t = (each[:, None].repeat(1, config.frames) for each in (torch.from_numpy(y), t))
    # noise seeds: consecutive in a run; Knuth's multiplier sets nearby --seeds far apart
    seeds = ((seed + 1) * 2654435761 % 2**32 + numbers) % 2**32
    batch = [torch.from_numpy(images), y, t, torch.from_numpy(seeds)]
    return [whole.pin_memory() for whole in batch] if torch.cuda.is_initialized() else batch


@functools.lru_cache(maxsize=2)
def order_of_epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    """Each epoch visits all clips, in a new order."""
    return np.random.default_rng([seed, 1, epoch]).permutation(size)


def in_order(make: Callable, steps: Iterable[int], workers: int) -> Iterator:
    """make(step) of these steps in their order. It is made ahead in threads: Pillow and NumPy leave
    Python's lock while they work. What a thread raises is raised here."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = (pool.submit(make, step) for step in steps)
        ahead = deque(itertools.islice(futures, 2 * workers))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(itertools.islice(futures, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def to_device(part: list, device: torch.device, generator: torch.Generator, given: int):
    """x, y, t, eps (B, ...) on the device, of clips (clips, ...), and what the network is given,
    (clips, 3 given, H, W) or None. The noise of each clip comes from its own seed, whatever its
    batch or process."""
    *tensors, seeds = part
    images, y, t = (each.to(device, non_blocking=each.is_pinned()) for each in tensors)
    whole = from_uint8(images)  # (clips, given + frames, 3, H, W)
    clips = whole[:, given:]
    known = whole[:, :given].flatten(1, 2) if given else None
    eps = [torch.randn(clips.shape[1:], device=device, generator=generator.manual_seed(seed))
           for seed in seeds.tolist()]
    return clips.flatten(0, 1), y.flatten(), t.flatten(), torch.cat(eps), known


# --------------------------------------------------------------------------------------------------
# 3. The run's folder


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary name beside `path`, which takes its place at the end: nobody reads half a file,
    and what was there stays if the disk is full. Makes the folder."""
    temporary = path.with_name(f".{path.name}.part")
    with in_one_line(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@functools.cache  # which keeps the file open
def lock(folder: Path):
    """Makes the folder, and this process its only writer until it ends, however it ends."""
    with in_one_line(f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    try:
        import fcntl  # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process writes to {folder}: give another --out, or use torchrun")
    except (ImportError, OSError):  # a system or a disk without locks
        pass
    return file


def refuse_others(folder: Path, before: dict, now: dict, free: tuple = ()):
    """Only the same settings go on in a folder; those in `free` may differ."""
    differ = [f"{key} {before.get(key)}, now {value}"[:99] for key, value in now.items()
              if key not in free and before.get(key) != value]
    if differ:
        raise InputError(f"{folder} was made with other settings ({'; '.join(differ)}): give the "
                         "same ones, or another --out (--precision auto depends on the machine)")


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint at `path`, or in the folder `path`, as Run.save writes it; nothing in it is
    executed. Its tensors stay in the file, and are read when they are used."""
    file = Path(path, "checkpoint.pt") if os.path.isdir(path) else Path(path)
    with in_one_line(f"{file} cannot be read as a checkpoint of this version of train.py"):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        keys = {"step", "seconds", "skipped", "rows", "data", "classes", "net", "ema", "optimizer"}
        if not keys <= state.keys() or state["config"] != asdict(sid2.Config(**state["config"])):
            raise ValueError("something is missing")
        if not all(weights.isfinite().all() for weights in state["ema"].values()):
            raise InputError(f"{file} holds weights that are not finite: its training has failed")
        return state


def init_from(path: str, net: sid2.ResidualUViT) -> str:
    """Takes over another run's EMA weights where shapes agree; the trunks must be the same."""
    theirs, mine = load_checkpoint(path)["ema"], net.state_dict()
    fits = {key for key in mine.keys() & theirs.keys() if theirs[key].shape == mine[key].shape}
    trunk = {key for key in mine.keys() | theirs.keys() if re.match("blocks|down|middle|up", key)}
    if trunk - fits:
        raise InputError(f"--init-from {path}: its trunk does not fit, as {min(trunk - fits)}")
    net.load_state_dict({key: theirs[key] for key in fits}, strict=False)
    fresh = ", ".join(sorted(mine.keys() - fits)) or "none"
    return f"{len(fits)} of {len(mine)} tensors from {path}; started afresh: {fresh}"


class Run:
    """A run's folder, which the first process alone writes: checkpoint.pt, log.csv, and
    samples/STEP.png. The checkpoint holds the settings and the rows of the log too."""

    columns = "step,images,loss,grad_norm,lr,skipped,images_per_second,tflops,gigabytes,seconds"

    def __init__(self, args, config: sid2.Config, data, rank: int, world: int, device, precision,
                 **parts):
        self.args, self.config, self.data = args, config, data
        self.rank, self.world, self.device, self.precision = rank, world, device, precision
        self.parts = parts  # net, ema and optimizer
        self.folder = Path(args.out)
        self.file = self.folder / "checkpoint.pt"
        self.parameters, self.gmac = sid2.count(config)
        self.settings = dict(
            config=asdict(config), data=data.name, images=len(data.labels), precision=precision,
            classes=data.classes if config.num_classes else [], seed=args.seed,
            init_from=args.init_from)
        self.done, self.seconds, self.skipped, self.rows = 0, 0.0, 0, []
        self.history = []  # loss and norm of the gradient of each step since the last row
        self.lost = 0  # steps in a row without a finite gradient
        self.stopped = False  # by a signal

    def resume(self) -> int:
        """The step to start from, which is the checkpoint's; begins the folder if there is none. A
        run that has not done a step begins anew. Of the settings of any other only --steps and the
        path of the data may differ."""
        found, said = os.path.exists(self.file), f"a new run in {self.folder}"
        if found and self.rank == 0:
            lock(self.folder)  # so that nobody replaces the checkpoint while it is read
        agree()
        state = load_checkpoint(self.file) if found else dict(step=0)
        if state["step"] > 0:
            refuse_others(self.folder, state | state["config"],
                          self.settings | self.settings["config"], free=("config", "steps", "data"))
            with in_one_line(f"{self.file} does not fit this version of train.py"):
                for name, part in self.parts.items():  # copied, as Adam keeps what it is given
                    part.load_state_dict(copy.deepcopy(state[name]))
                self.done, self.seconds, self.skipped, self.rows = (
                    state[key] for key in ("step", "seconds", "skipped", "rows"))
            said = f"resumed at step {self.done}"
        elif not found and os.path.isdir(self.folder) and any(self.folder.glob("[!.]*")):
            raise InputError(f"{self.folder} holds files but no checkpoint: give another --out")
        elif self.args.init_from:
            said = init_from(self.args.init_from, self.parts["net"])
            self.parts["ema"].load_state_dict(self.parts["net"].state_dict())
        if agree(self.done) != -agree(-self.done):  # the highest step and the lowest
            raise InputError(f"{self.file} must be on a disk that all processes share")
        if self.rank == 0:
            lock(self.folder)
            if self.done == 0:
                self.save()
            with replacing(self.folder / "log.csv") as temporary:
                temporary.write_text("\n".join([self.columns, *self.rows]) + "\n")
        agree()  # NCCL would wait for the first process for ten minutes only
        say(f"{self.parameters / 1e6:.1f} M parameters, {self.gmac:.2f} GMAC per image or clip")
        say(f"{self.data.name}, at {self.config.image_size} px: {len(self.data.labels)} images or "
            f"clips, {len(self.data.classes)} classes: {', '.join(self.data.classes[:10])}")
        say(f"{self.world} x {self.device}, {self.precision}; {said}")
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # by hand, or by SLURM
            number = getattr(signal, name, None)  # Windows has two of them
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.on_signal)
        self.bar = progress(total=self.config.steps, initial=self.done)
        self.since = time.perf_counter()
        return self.done

    def on_signal(self, number: int, _):
        """Noted for the end of the step. Without torchrun a second signal ends the program."""
        self.stopped = True
        if not dist.is_initialized():  # torchrun passes on what a scheduler has sent to all
            signal.signal(number, signal.SIG_DFL)

    def record(self, done: int, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """After each step: logs, saves and draws where that is due, and only then waits for the
        device. Returns whether a signal asks to stop."""

        def due(every: int) -> bool:
            return every > 0 and (done % every == 0 or done == self.config.steps)

        self.bar.update()
        self.history.append(torch.stack([loss, norm]))
        stop = agree(self.stopped) > 0
        save = stop or due(self.args.save_every) or done == self.config.steps
        draw = due(self.args.sample_every)
        if save or draw or due(self.args.log_every):
            self.log(done)
            if save and self.rank == 0:
                self.save()
            if draw and self.rank == 0:
                self.draw()
            self.since = time.perf_counter()  # none of this was training
        return stop

    def log(self, done: int):
        """A row of log.csv, and its short form in the bar."""
        values, self.history = torch.stack(self.history), []
        if self.world > 1:
            dist.all_reduce(values)
        values = values.cpu().numpy() / self.world
        finite = np.isfinite(values[:, 1])  # the gradient of all: the same in every process
        loss = values[finite, 0].mean() if finite.any() else math.nan
        elapsed = time.perf_counter() - self.since
        rate = (done - self.done) * self.config.batch / elapsed
        tflops = 6e-3 * self.gmac * rate  # 3 passes, 2 operations for each multiply-accumulate
        gigabytes = torch.cuda.max_memory_allocated() / 1e9  # 0 without a GPU
        lr = self.parts["optimizer"].param_groups[0]["lr"]
        self.skipped += int((~finite).sum())
        self.seconds += elapsed
        row = (f"{done},{done * self.config.batch},{loss:.6g},{values[-1, 1]:.6g},{lr:.4g},"
               f"{self.skipped},{rate:.1f},{tflops:.4g},{gigabytes:.2f},{self.seconds:.1f}")
        self.rows.append(row)
        if self.rank == 0:
            file = self.folder / "log.csv"
            with in_one_line(f"{file} cannot be written"), open(file, "a") as out:
                out.write(row + "\n")
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s, {tflops:.3g} TFLOP/s",
                                 refresh=False)
        self.done = done
        self.lost = int(finite[::-1].argmax()) if finite.any() else self.lost + len(finite)
        if self.lost >= 10:
            raise InputError(f"no finite gradient in {self.lost} steps, up to step {done}: try a "
                             "lower --lr or --precision fp32, in another --out")

    def save(self):
        """checkpoint.pt: plain types and tensors, as of the last row of the log."""
        state = dict(step=self.done, seconds=self.seconds, skipped=self.skipped, rows=self.rows)
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        with replacing(self.file) as temporary, open(temporary, "wb") as file:
            torch.save(self.settings | state, file)
            file.flush()
            os.fsync(file.fileno())  # it is on the disk before it takes the place of the last one

    def draw(self):
        """samples/STEP.png: always the same seeds and classes, from the averaged weights."""
        config, data, shown = self.config, self.data, shown_classes(self.config.num_classes)
        seeds = list(range(8 * len(shown)))
        labels = choose_labels(seeds, shown, config, data)
        with choose_precision(self.device, self.precision)[1]:
            batches = sample_images(self.parts["ema"], config, seeds, labels, self.device,
                                    self.args.micro_batch or 64, data)
            images = np.concatenate([images for _, images in batches])
        picture = grid(images, labels, self.settings["classes"], config.given)
        with replacing(self.folder / "samples" / f"{self.done:07d}.png") as temporary:
            picture.save(temporary, "PNG")


# --------------------------------------------------------------------------------------------------
# 4. Pictures


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """(..., H, W, 3) -> (..., 3, H, W) in [-1, 1]."""
    return images.movedim(-1, -3).contiguous() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3): the inverse of from_uint8 for all 256 values."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def sample_images(net, config: sid2.Config, seeds: list[int], labels: list[int], device,
                  batch: int, data=None):
    """Yields seeds and their images (B, given + frames, H, W, 3) uint8. data: clips whose first
    frames are given; seed i takes clip i, modulo their number."""
    steps = math.ceil(len(seeds) / batch) * config.sample_steps
    with progress(total=steps, position=0, leave=False) as bar:
        for first in range(0, len(seeds), batch):
            part, y = seeds[first : first + batch], labels[first : first + batch]
            y = torch.tensor(y, device=device).repeat_interleave(config.frames)
            conditioned = net
            if config.given:
                clips, _ = read_clips(data, part, [0.0] * len(part))
                known = clips[:, : config.given]
                given = from_uint8(torch.from_numpy(known).to(device)).flatten(1, 2)
                conditioned = functools.partial(net, given=given)
            for _, x_hat in sid2.trajectory(conditioned, config, part, y):
                bar.update()
            images = to_uint8(x_hat).reshape(len(part), config.frames, *x_hat.shape[2:], 3)
            if config.given:
                images = np.concatenate([known, images], axis=1)
            yield part, images


def choose_labels(seeds: list[int], classes: list, config: sid2.Config, data) -> list[int]:
    """Label of each seed: `classes` in turn, or that of the clip whose first frames are given."""
    if config.given and config.num_classes:
        return [int(data.labels[seed % len(data.labels)]) for seed in seeds]
    return [classes[seed % len(classes)] for seed in seeds]


def shown_classes(num_classes: int) -> list[int]:
    """Up to ten classes for a grid, spread over all; [0] without classes."""
    return np.unique(np.linspace(0, max(num_classes - 1, 0), 10).astype(int)).tolist()


def grid(images: np.ndarray, labels: list[int], names: list[str], given: int = 0) -> Image.Image:
    """Images (N, 1, H, W, 3) in rows of one class, at most 16 wide; a clip (N, length, H, W, 3) has
    a row of its own, under a heading that says which frames were given."""
    rows, length = [], images.shape[1]
    heading = ["", *["given"] * given, *map(str, range(given + 1, length + 1))]
    for label in sorted(set(labels)):
        mine = images[np.array(labels) == label]
        if length == 1:
            mine = [mine[i : i + 16, 0] for i in range(0, len(mine), 16)]
        rows += [(names[label] if names else "", row) for row in mine]
    return page(rows, heading if length > 1 else [])


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


@dataclass
class Data:
    """Clips of one length with labels. An image is a clip of length 1.

    read(i, window) gives neighbouring frames of clip i, uint8 (length, H, W, 3), or an InputError.
    window in [0, 1) says where they begin: 0 as early as they can, near 1 as late.
    """

    name: str
    labels: np.ndarray  # int64 (N,)
    classes: list[str]  # their names; none without labels
    read: Callable


def read_clips(data: Data, numbers: Iterable[int], windows: Iterable[float]):
    """These clips, uint8 (B, length, H, W, 3), and their labels (B,)."""
    pairs = [read_clip(data, number, window) for number, window in zip(numbers, windows)]
    clips, labels = zip(*pairs)
    return np.stack(clips), np.array(labels)


def read_clip(data: Data, number: int, window: float) -> tuple[np.ndarray, int]:
    """A clip and its label. In the place of one that cannot be read comes the next that can; a
    hundred in a row end the run."""
    for i in range(number, number + 100):
        i %= len(data.labels)
        try:
            return data.read(i, window), data.labels[i]
        except InputError as error:
            warn_once(f"warning: {error}: the next takes its place")
            last = error
    raise InputError(f"a hundred images or clips in a row cannot be read; the last: {last}")


def open_data(name: str, size: int, seed: int, length: int = 1, room: float = 0) -> Data:
    """shapes, cifar10 or FOLDER, as images, or clips of `length` frames, of size x size pixels."""
    if name == "shapes":
        return open_shapes(size, seed, length)
    if name == "cifar10" and (size, length) == (32, 1):
        return open_cifar10()
    if name and os.path.isdir(name):
        return open_folder(Path(name), size, length, room)
    raise InputError(f"--data {name or 'is missing'}: give shapes, cifar10 (32 px) or a folder")


SHAPES = {  # inside or not, at a to the right and b down from the centre, in radii
    "disc": lambda a, b: a**2 + b**2 < 1,
    "ring": lambda a, b: abs(a**2 + b**2 - 0.65) < 0.35,
    "square": lambda a, b: np.maximum(abs(a), abs(b)) < 0.85,
    "triangle": lambda a, b: (b < 0.8) & (b > 2 * abs(a) - 1),
    "cross": lambda a, b: (np.maximum(abs(a), abs(b)) < 1) & (np.minimum(abs(a), abs(b)) < 0.3),
    "moon": lambda a, b: (a**2 + b**2 < 1) & ((a - 0.5) ** 2 + b**2 > 0.7),
}


def open_shapes(size: int, seed: int, length: int = 1) -> Data:
    """A million drawings of six shapes in any place, size and colour, drawn when asked for. In a
    clip a shape glides from one place to another, which its first frames foretell."""
    classes = list(SHAPES)
    labels = np.arange(1_000_000 // length) % len(classes)

    def read(i: int, window: float) -> np.ndarray:
        rng = np.random.default_rng([seed, 2, i])
        radius = rng.uniform(0.26, 0.42)  # in widths of the image, as are the places
        if length > 1:
            radius *= 0.7  # room to move
        begin = rng.uniform(radius, 1 - radius, 2)  # the whole shape is in the picture
        dark, light = rng.uniform(0, 0.35, 3), rng.uniform(0.35, 1, 3)
        light[rng.integers(3)] = 1  # one full channel for contrast
        end = rng.uniform(radius, 1 - radius, 2)
        return np.stack([draw_shape(classes[labels[i]], size, radius, centre, dark, light)
                         for centre in np.linspace(begin, end, length)])

    return Data("shapes", labels, classes, read)


def draw_shape(name: str, size: int, radius: float, centre: np.ndarray, dark, light) -> np.ndarray:
    fine = max(1, 64 // size)  # points per pixel and axis: 4 at 16 px, 1 from 33 px up
    points = (np.arange(fine * size, dtype=np.float32) + 0.5) / (fine * size)
    a, b = (points - centre[0]) / radius, (points[:, None] - centre[1]) / radius
    hits = SHAPES[name](a, b).reshape(size, fine, size, fine).sum((1, 3))  # of a pixel's points
    palette = (255 * np.linspace(dark, light, fine**2 + 1) + 0.5).astype(np.uint8)
    return palette[hits]


CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170,052,171 bytes
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


def open_cifar10() -> Data:
    """The 50,000 training images of the binary archive: a label and 3 x 32 x 32 bytes each."""
    archive = Path(torch.hub.get_dir(), "cifar-10-binary.tar.gz")
    with in_one_line(f"{archive} cannot be read: put {CIFAR10} there"):
        if os.environ.get("LOCAL_RANK", "0") == "0" and not archive.is_file():
            archive.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(CIFAR10, archive, hash_prefix=CIFAR10_SHA256)
        agree()  # it is there
        with tarfile.open(archive) as tar:
            files = [tar.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read()
                     for i in range(1, 6)]
        records = np.frombuffer(b"".join(files), np.uint8).reshape(50_000, 1 + 3 * 32 * 32)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    return Data("cifar10", records[:, 0].astype(np.int64), classes,
                lambda i, window: images[i : i + 1])


def find_files(top: Path) -> list[str]:
    """Images in `top` and below, by their names from there on, sorted. Follows links, but not to a
    folder above; leaves out what is hidden or added by systems, and says what else is left out."""
    suffixes = (".apng .avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pgm .png .ppm .tif .tiff "
                ".webp").split()
    files, others = [], Counter()

    def refuse(error: OSError):  # os.walk would leave the folder out without a word
        raise InputError(str(error))

    for root, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")
                      and name not in ("@eaDir", "__MACOSX", "lost+found")]
        if os.path.realpath(root) in map(os.path.realpath, Path(root).parents):
            folders.clear()  # it is a link to a folder above
            continue
        for name in (name for name in names if not name.startswith(".")):
            file, suffix = os.path.join(root, name), os.path.splitext(name)[1].lower()
            if suffix in suffixes:
                files.append(os.path.relpath(file, top))
            elif os.path.exists(file):
                others[suffix or name] += 1
            else:  # perhaps it was a class
                say(f"left out: {file} is a link to nowhere")
    for suffix, count in others.most_common(9):
        say(f"left out in {top}: {count} {suffix}")
    return sorted(files, key=lambda name: name.replace(os.sep, "\0"))  # a/x before a-b/x


def open_folder(path: Path, size: int, length: int, room: float) -> Data:
    """Images of a folder, nested, or clips: folders of frames by number, 2 before 10. The immediate
    sub-folders are the classes, if there are any. room: bytes of memory for decoded images."""
    clips = {}  # files by the name of their clip
    for file in find_files(path):
        clips.setdefault(file if length == 1 else os.path.dirname(file), []).append(file)
    names = [name for name, files in clips.items() if len(files) >= length]
    if len(names) < len(clips):
        say(f"left out: {len(clips) - len(names)} folders of fewer than {length} frames")
    if not names:
        wanted = "images" if length == 1 else f"folders of {length} frames or more"
        raise InputError(f"there are no {wanted} in {path} and its sub-folders")
    tops = [os.path.dirname(name).split(os.sep)[0] for name in names]
    classes, labels = np.unique(tops, return_inverse=True)
    if "" in tops and len(classes) > 1:
        raise InputError(f"{path} has {tops.count('')} images or clips beside its "
                         f"{len(classes) - 1} class folders: put them into classes, or away")
    decoded = {}  # when it is full it stays: any image is as likely to come next

    def read_once(file: str) -> np.ndarray:
        if file in decoded:
            return decoded[file]
        image = read_image(path / file, size, animated=length == 1)
        if (len(decoded) + 1) * image.nbytes <= room:
            decoded[file] = image
        return image

    def read(i: int, window: float) -> np.ndarray:
        files = sorted(clips[names[i]], key=lambda file: (len(file), file))
        begin = int(window * (len(files) - length + 1))
        return np.stack([read_once(file) for file in files[begin : begin + length]])

    return Data(str(path), labels, [name for name in classes.tolist() if name], read)


def read_image(file: Path, size: int | None, animated: bool = True) -> np.ndarray:
    """The picture of a file, uint8 (H, W, 3): upright by its EXIF tag, transparent parts white; of
    an animation its first, or refused if not `animated`. size: of the centre crop; None: whole."""
    with in_one_line(f"{file} cannot be read as an image"), Image.open(file) as image:
        if not animated and getattr(image, "is_animated", False) and image.format != "MPO":
            raise ValueError("it is an animation: a clip is a folder of frames, each in a file")
        image.load()
        with contextlib.suppress(Exception):  # what Pillow cannot read of EXIF is ignored
            ImageOps.exif_transpose(image, in_place=True)
        image = to_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        return np.asarray(centre_crop(image, size) if size else image)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8. Files whose numbers Pillow reads wrongly, or whose white is not
    known, are refused."""
    deep = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    tags = getattr(image, "tag_v2", {})  # of a TIFF; their numbers are those of its standard
    no_range = image.mode in ("I", "F") and not deep  # of 32 bits, or floats
    signed = set(tags.get(339, (1,))) != {1}
    other_bits = deep and tags.get(258, (16,)) != (16,)
    white_is_zero = deep and tags.get(262, 1) == 0
    dark_palette = max(tags.get(320, (65535,))) < 256  # 8 bits where the standard has 16
    if no_range or signed or other_bits or white_is_zero or dark_palette:
        raise ValueError("its pixels are not whole numbers of 8 or 16 bits from 0, black, up")
    if not deep:
        return image
    numbers, clear = np.asarray(image), image.info.get("transparency", -1)
    return Image.fromarray(np.where(numbers == clear, 255, numbers >> 8).astype(np.uint8))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop, which the published ImageNet FIDs use: halved by box while twice too large, then
    bicubic, then the centre. (ADM itself does not turn images by their EXIF tag.)"""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


# --------------------------------------------------------------------------------------------------
# 6. What all scripts share: errors, processes, command line


class InputError(SystemExit):
    """What the user can mend. Python prints the message and ends with code 1."""


@contextlib.contextmanager
def in_one_line(failure: str):
    """Whatever goes wrong becomes an InputError: what Pillow, NumPy, zip, torch and the disk raise
    has no common base."""
    try:
        yield
    except Exception as error:
        hidden = error.__context__  # torch hides a full disk behind an error of its own
        cause = hidden if isinstance(hidden, OSError) else error
        reason = " ".join(str(cause).split()).split(". ")[0][:200]
        raise InputError(f"{failure} ({type(cause).__name__}: {reason})") from error


# shown by the first process alone; without a terminal, as in a log file, about once a minute
progress = functools.partial(tqdm, unit="step", mininterval=0.1 if sys.stderr.isatty() else 60,
                             disable=os.environ.get("RANK", "0") != "0")
warn_once = functools.cache(lambda message: tqdm.write(message, file=sys.stderr))


def setup(name: str) -> tuple[int, int, torch.device]:
    """Rank, number of processes, device. Joins the process group if torchrun has set RANK."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    if hasattr(sys.stdout, "reconfigure"):  # names may have letters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    if name == "auto":  # MPS has no process group
        mps = torch.backends.mps.is_available() and "RANK" not in os.environ
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    index = int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None
    with in_one_line(f"--device {name} cannot be used here"):
        device = torch.device(name, index)
        torch.empty(0, device=device)
    if name == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32, in convolutions too
        torch.backends.cudnn.benchmark = True
    if "RANK" not in os.environ:
        return 0, 1, device
    # agree() is on the CPU, by gloo; two hours, as the others wait while the first draws
    with in_one_line("the processes cannot meet: start them with torchrun"):
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo", store=store,
                                rank=rank, world_size=world, timeout=timedelta(hours=2))
    return rank, world, device


def leave():
    """All processes end together."""
    agree()
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may abort while Python shuts down, so it does not


def agree(value: float = 0) -> float:
    """The largest `value` of all processes. None returns before all have called."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def say(message):
    """Printed by the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def choose_precision(device: torch.device, name: str) -> tuple[str, torch.autocast]:
    """fp32, or bf16: autocast around float32 weights. auto: bf16 if the hardware multiplies it."""
    if name == "auto":
        fast = (torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else
                device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
        name = "bf16" if fast else "fp32"
    return name, torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     usage="%(prog)s [--preset NAME] [--data DATA] [FLAG ...]")
    add, path = parser.add_argument, os.path.expanduser
    add("--preset", choices=sid2.PRESETS, default="shapes", metavar="NAME",
        help=f"{', '.join(sid2.PRESETS)}; `python sid2.py` shows them")
    add("--data", type=path, help="shapes, cifar10 or a folder of images; default: the preset's")
    add("--out", type=path, help="folder of the run; default: runs/PRESET")
    add("--init-from", type=path, help="start from the EMA weights of this run, whose trunk fits")
    add("--seed", type=int, default=0)
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 if fast")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    add("--micro-batch", type=int, help="images, or clips, at once in a process; default: all")
    add("--checkpointing", type=int, nargs="*", default=(), metavar="LEVEL",
        help="compute activations again at these levels, 0 the top, or at all: saves memory")
    add("--workers", type=int, default=8, help="threads that make batches")
    add("--cache", type=float, default=4, help="GB of decoded images that a process keeps")
    add("--log-every", type=int, default=50, help="steps between rows of the log")
    add("--sample-every", type=int, help="steps between pictures, 0: never; default: a tenth of "
        "the run, at least 1,000 and at most 5,000")
    add("--save-every", type=int,
        help="steps between checkpoints, 0: at both ends; default: as for pictures")
    group = parser.add_argument_group("fields of sid2.Config; default: the preset's")
    # the comment beside each field of sid2.Config is the help of its flag
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(sid2.Config), re.M))
    for name, value in asdict(sid2.PRESETS["shapes"]).items():
        kind = dict(type=type(value))
        if isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(value, tuple):
            kind = dict(type=type(value[0]), nargs="+" if name == "channels" else len(value))
        group.add_argument(f"--{name.replace('_', '-')}", help=comments[name], **kind)
    return parser.parse_args()


def configure(args: argparse.Namespace, world: int) -> tuple[sid2.Config, Data]:
    """The configuration, of the preset, the flags and the classes of the data; and the data."""
    preset = sid2.PRESETS[args.preset]
    flags = {name: getattr(args, name) for name in asdict(preset)}
    config = replace(preset, **{name: tuple(value) if isinstance(value, list) else value
                                for name, value in flags.items() if value is not None})
    if args.checkpointing == []:  # the flag without a level; () without the flag
        args.checkpointing = range(len(config.channels))
    every = min(max(config.steps // 10, 1000), 5000)
    args.sample_every = every if args.sample_every is None else args.sample_every
    args.save_every = every if args.save_every is None else args.save_every
    args.out = args.out or f"runs/{args.preset}"
    check(config, world, **vars(args))

    name = args.data or dict(shapes="shapes", moving="shapes", cifar10="cifar10").get(args.preset)
    data = open_data(name, config.image_size, args.seed, config.given + config.frames,
                     1e9 * args.cache)
    classes = len(data.classes)
    inside = Path(args.out).resolve().is_relative_to(Path(name).resolve())
    if inside and name not in ("shapes", "cifar10"):
        raise InputError(f"--out {args.out} lies in --data {name}: its pictures would become data")
    if args.num_classes not in (None, 0, classes):
        raise InputError(f"--num-classes must be 0 or that of the data, {classes}")
    read_clip(data, 0, 0.0)  # if nothing can be read, nothing is made
    return replace(config, num_classes=classes if config.num_classes else 0), data


def check(config: sid2.Config, world: int = 1, **flags):
    """What torch would report late, unclearly or never. flags: those of the script."""
    values = asdict(config) | {name: flag for name, flag in flags.items() if flag is not None}
    limits = dict(  # of numbers; those not named here lie in [0, 1e9], whole ones in [1, 1e9]
        bias=(-1e9, 1e9), guidance=(-1e9, 1e9), interval=(-1e9, 1e9),
        dropout=(0, 1), ema=(0, 1), gamma=(0, 1), betas=(0, 0.999999), label_dropout=(0, 0.999999),
        adam_eps=(1e-30, 1), seed=(0, 2**32 - 1), frames=(1, 1000), given=(0, 1000),
        depth=(0, 1e9), middle=(0, 1e9), num_classes=(0, 1e9), warmup=(0, 1e9), workers=(1, 99),
        sample_every=(0, 1e9), save_every=(0, 1e9), checkpointing=(0, len(config.channels) - 1))
    for name, value in values.items():
        for number in value if isinstance(value, (tuple, list, range)) else [value]:
            if type(number) not in (int, float):
                continue
            low, high = limits.get(name, (1 if type(number) is int else 0, 1e9))
            if not low <= number <= high:
                raise InputError(f"{name} must lie in [{low:g}, {high:g}], got {number}")

    levels = list(zip(config.channels, config.blocks))
    unit = config.patch_size * 2 ** (len(config.channels) - 1)
    part = world * values.get("micro_batch", 1)
    guides = config.num_classes > 0 and config.guidance != 1
    rules = dict(
        width=(config.width % 2 == 0, "must be even"),
        interval=(config.interval[0] < config.interval[1], "needs the lower number first"),
        blocks=(len(config.blocks) == len(config.channels) and set(config.blocks) <= set("RT"),
                f"needs a letter R or T for each of {len(config.channels)} channels"),
        channels=(all(n % config.head_width == 0 for n, kind in levels if kind == "T"),
                  f"must be multiples of head_width {config.head_width} at T levels"),
        image_size=(config.image_size % unit == 0,
                    f"must be a multiple of {unit}, patch_size times 2 per lower level"),
        batch=(config.batch % part == 0, f"must be a multiple of {part}, processes x micro_batch"),
        sampler=(config.sampler in ("ddpm", "ddim"), "must be ddpm or ddim"),
        label_dropout=(config.label_dropout > 0 or not guides, "must be above 0 to guide samples"),
    )
    for name, (holds, rule) in rules.items():
        if not holds:
            raise InputError(f"{name} {rule}, got {values[name]}")


if __name__ == "__main__":
    main()

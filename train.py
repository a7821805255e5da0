"""Trains SiD2, in one process or many.

    python train.py                                        shapes, a few minutes on a CPU
    python train.py --preset cifar10                       one GPU
    torchrun --nproc_per_node=8 train.py --preset imagenet256_p2 --data FOLDER

The same command again goes on from the last checkpoint, on a CPU bit for bit. SIGTERM or Ctrl-C
finishes the step, saves and ends; a second Ctrl-C does not wait.
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
import struct
import sys
import tarfile
import time
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

# With this on, Inductor 2.10 to 2.13 may lose gradients of scale and offset (pytorch issue 193061)
os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sid2

# --------------------------------------------------------------------------------------------------
# 1. The loop


def main():
    args = parse()
    rank, world, device = setup(args.device)
    config, data = configure(args, world, device)
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
    make = functools.partial(make_batch, data, config, args.seed, rank * local, local,
                             pin=device.type == "cuda")
    batches = in_order(make, range(start, config.steps), args.workers)
    model.train()

    with contextlib.closing(batches), run.bar:
        for step, (batch, waited) in enumerate(batches, start):
            torch.manual_seed(args.seed + 1_000_003 * step + rank)  # dropout
            optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup))
            loss = torch.zeros((), device=device)
            parts = list(zip(*(whole.split(micro) for whole in batch)))
            for part in parts:
                x, y, t, eps, given = to_device(part, device, generator, config.given)
                conditioned = functools.partial(model, given=given)  # clips: on their first frames
                with averaging(model, last=part is parts[-1]):
                    with autocast:
                        losses = sid2.training_loss(conditioned, config, x, y, t, eps)
                    share = losses.sum() / (local * config.frames)
                    share.backward()
                loss += share.detach()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip or math.inf)
            step_if_finite(optimizer, norm)
            sid2.ema_update(ema, net, step, config.ema)
            if run.record(step + 1, loss, norm, waited):  # a signal came
                break
    run.finish(start)


def averaging(model: torch.nn.Module, last: bool):
    """Of several processes, gradients are averaged at the last part of a step, all at once."""
    several = isinstance(model, DistributedDataParallel)
    return model.no_sync() if several and not last else contextlib.nullcontext()


def step_if_finite(optimizer: torch.optim.Adam, norm: torch.Tensor):
    """A step of Adam if the gradient's norm is finite. Nothing waits for the device to know: where
    found_inf is 1, the fused kernel itself leaves weights and moments as they are."""
    optimizer.found_inf = 1 - norm.isfinite().float()
    optimizer.step()
    optimizer.zero_grad()


# --------------------------------------------------------------------------------------------------
# 2. Batches


def make_batch(data, config: sid2.Config, seed: int, first: int, count: int, step: int,
               pin: bool = False) -> list[torch.Tensor]:
    """Clips first, ..., first + count - 1 of the batch of `step`: uint8 images (count, given +
    frames, H, W, 3), labels and times (count, frames), seeds of the noise (count,). pin: for CUDA.

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
    images = np.where(flip[:, None, None, None, None], images[..., ::-1, :], images)
    y = np.where(drop | (config.num_classes == 0), config.num_classes, labels)
    t = sid2.low_discrepancy_times(config.batch, start)[place]
    y, t = (each[:, None].repeat(1, config.frames) for each in (torch.from_numpy(y), t))
    # noise seeds: consecutive in a run; Knuth's multiplier sets nearby --seeds far apart
    seeds = ((seed + 1) * 2654435761 % 2**32 + numbers) % 2**32
    batch = [torch.from_numpy(images), y, t, torch.from_numpy(seeds)]
    return [whole.pin_memory() for whole in batch] if pin else batch


@functools.lru_cache(maxsize=2)
def order_of_epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    """Each epoch visits all clips, in a new order."""
    return np.random.default_rng([seed, 1, epoch]).permutation(size)


def in_order(make: Callable, steps: Iterable[int], workers: int) -> Iterator[tuple]:
    """make(step) of these steps in their order, and the seconds that it was waited for. It is made
    ahead in threads: Pillow and NumPy leave Python's lock while they work. What a thread raises is
    raised here."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = (pool.submit(make, step) for step in steps)
        ahead = deque(itertools.islice(futures, 2 * workers))
        while ahead:
            begun = time.perf_counter()
            batch = ahead.popleft().result()
            yield batch, time.perf_counter() - begun
            ahead.extend(itertools.islice(futures, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def to_device(part: tuple, device: torch.device, generator: torch.Generator, given: int):
    """x, y, t, eps (B, ...) on the device, of clips (clips, ...), and what the network is given,
    (clips, 3 given, H, W) or None. The noise of each clip comes from its own seed, whatever its
    batch or process."""
    *tensors, seeds = part
    images, y, t = (each.to(device, non_blocking=each.is_pinned()) for each in tensors)
    whole = from_uint8(images)  # (clips, given + frames, 3, H, W)
    x = whole[:, given:].flatten(0, 1)
    known = whole[:, :given].flatten(1, 2) if given else None
    shape = (len(x) // len(seeds), *x.shape[1:])  # of a clip
    eps = [torch.randn(shape, device=device, generator=generator.manual_seed(seed))
           for seed in seeds.tolist()]
    return x, y.flatten(), t.flatten(), torch.cat(eps), known


# --------------------------------------------------------------------------------------------------
# 3. The run's folder


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary name beside `path`, which takes its place once all is on the disk: nobody reads
    half a file, and what was there stays if the disk is full or power fails."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_others(folder: Path, before: dict, now: dict, free: tuple = ()):
    """Only the same settings go on in a folder; those in `free` may differ."""
    differ = [f"{key} {before.get(key)} -> {value}"[:99] for key, value in now.items()
              if key not in free and before.get(key) != value]
    if differ:
        raise InputError(f"{folder} was made with other settings ({', '.join(differ)}): give "
                         "another --out, or the same flags")


def is_taken(folder: Path) -> bool:
    """Something lies there, besides hidden files."""
    return folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir())


CHECKPOINT = "a checkpoint of this version of train.py"


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint at `path`, or in the run folder `path`, as Run.save writes it. What it holds
    is never executed."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    if not os.path.lexists(file):
        raise InputError(f"no checkpoint at {path}: give the folder or the checkpoint.pt of a run "
                         "of train.py")
    with reading(file, CHECKPOINT):
        state = torch.load(file, map_location="cpu", weights_only=True)
        other = set(state["config"]) ^ {field.name for field in fields(sid2.Config)}
        if other:
            raise ValueError(f"of another version: {', '.join(sorted(other))}")
        state["config"] = sid2.Config(**state["config"])
        check(state["config"])
    return state


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
    """A run's folder, which the first process alone writes: checkpoint.pt, log.csv, and
    samples/STEP.png. The checkpoint holds the settings and the rows of the log too."""

    columns = ("step,images,loss,grad_norm,lr,skipped,images_per_second,tflops,gigabytes,data_wait,"
               "seconds")

    def __init__(self, args, config: sid2.Config, data, rank: int, world: int, device, precision,
                 **parts):
        self.args, self.config, self.data = args, config, data
        self.rank, self.world, self.device, self.precision = rank, world, device, precision
        self.parts = parts  # net, ema and optimizer
        self.folder = Path(args.out or f"runs/{args.preset}")
        self.file = self.folder / "checkpoint.pt"
        self.unit = "image" if config.given + config.frames == 1 else "clip"
        self.parameters, self.gmac = sid2.count(config)
        self.settings = dict(
            config=asdict(config), data=data.name, images=len(data.labels), precision=precision,
            classes=data.classes if config.num_classes else [], seed=args.seed,
            init_from=args.init_from)
        self.done, self.seconds, self.skipped, self.rows = 0, 0.0, 0, []
        self.history = []  # loss and norm of the gradient of each step since the last row
        self.waited, self.signals = 0.0, 0

    def resume(self) -> int:
        """The step to start from, which is the checkpoint's; begins the folder if there is none. A
        run that has not done a step begins anew."""
        found, said = os.path.lexists(self.file), f"a new run in {self.folder}"
        state = load_checkpoint(self.file) if found else dict(step=0)
        if state["step"] > 0:
            self.restore(state)
            said = f"resumed at step {self.done}"
        elif not found and is_taken(self.folder):
            raise InputError(f"{self.folder} holds files but no checkpoint: give another --out")
        elif self.args.init_from:
            said = init_from(self.args.init_from, self.parts["net"])
            self.parts["ema"].load_state_dict(self.parts["net"].state_dict())
        if agree(self.done > 0) and agree(self.done == 0):  # some see it, some do not
            raise InputError(f"{self.file} must be on a disk that all processes share")
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.done == 0:  # the checkpoint of a run without a step is not its own
                self.file.unlink(missing_ok=True)
                if self.args.save_every:
                    self.save()
            with replacing(self.folder / "log.csv") as temporary:
                temporary.write_text("\n".join([self.columns, *self.rows]) + "\n")
        self.introduce(said)
        on_signals(self.on_signal)
        self.bar = tqdm(total=self.config.steps, initial=self.done, unit="step",
                        disable=self.rank > 0)
        self.since = time.perf_counter()
        return self.done

    def restore(self, state: dict):
        """From a checkpoint of the same run; the steps and the place of the data may differ."""
        refuse_others(self.folder, state | asdict(state["config"]),
                      self.settings | self.settings["config"], free=("config", "steps", "data"))
        with reading(self.file, CHECKPOINT):
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.done, self.seconds, self.skipped, self.rows = (
                state[key] for key in ("step", "seconds", "skipped", "rows"))

    def introduce(self, said: str):
        """What this run is, in a few lines."""
        batch, classes, unit = self.config.batch, self.data.classes, self.unit
        micro = self.args.micro_batch or batch // self.world
        say(f"{self.parameters / 1e6:.1f} M parameters, {self.gmac:.2f} GMAC per {unit}; "
            f"{self.world} x {self.device}, {self.precision}, torch {torch.__version__}")
        named = ", ".join(classes[:10] + ["..."] * (len(classes) > 10)) or "none"
        say(f"data: {self.data.name}, {len(self.data.labels)} {unit}s, {len(classes)} classes: "
            f"{named}")
        say(f"batch: {batch} {unit}s = {self.world} x {micro} x {batch // self.world // micro} "
            "(processes x at once x rounds)")
        say(f"pictures: {self.folder / 'samples'}\n{said}")

    def on_signal(self, number: int, _):
        """Noted for the end of the step. A second Ctrl-C ends the program."""
        self.signals += 1
        alone = "RANK" not in os.environ  # torchrun passes on a Ctrl-C that we have had already
        if self.signals > 1 and number == signal.SIGINT and alone:
            raise KeyboardInterrupt

    def record(self, done: int, loss: torch.Tensor, norm: torch.Tensor, waited: float) -> bool:
        """After each step: logs, saves and draws where that is due, and only then waits for the
        device. Returns whether a signal asks to stop."""

        def due(every: int) -> bool:
            return every > 0 and (done % every == 0 or done == self.config.steps)

        self.bar.update()
        self.history.append(torch.stack([loss, norm]))
        self.waited += waited
        stop = agree(self.signals > 0)
        save, draw = stop or due(self.args.save_every), due(self.args.sample_every)
        if save or draw or due(self.args.log_every):
            self.log(done)
        if save and self.rank == 0:
            self.save()
        if draw and self.rank == 0:
            self.draw()
        if save or draw:
            self.since = time.perf_counter()  # neither was training
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
        cuda = self.device.type == "cuda"
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if cuda else ""
        lr = self.parts["optimizer"].param_groups[0]["lr"]
        self.skipped += int((~finite).sum())
        self.seconds += elapsed
        row = (f"{done},{done * self.config.batch},{loss:.6g},{values[-1, 1]:.6g},{lr:.4g},"
               f"{self.skipped},{rate:.1f},{tflops:.4g},{peak},{self.waited / elapsed:.4f},"
               f"{self.seconds:.1f}")
        self.rows.append(row)
        if self.rank == 0:
            with open(self.folder / "log.csv", "a") as file:
                file.write(row + "\n")
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} {self.unit}s/s, "
                                 f"{tflops:.3g} TFLOP/s")
        self.done, self.waited, self.since = done, 0.0, time.perf_counter()
        if len(finite) >= 10 and not finite.any():
            raise InputError(f"no finite gradient in {len(finite)} steps, up to step {done}: try a "
                             "lower --lr or --precision fp32 in another --out, from the start or "
                             f"with --init-from {self.folder}")

    def save(self):
        """checkpoint.pt: plain types and tensors, as of the last row of the log."""
        state = dict(step=self.done, seconds=self.seconds, skipped=self.skipped, rows=self.rows)
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        with replacing(self.file) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(self.settings | state, file)
            except RuntimeError as error:  # torch hides a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error

    def draw(self):
        """samples/STEP.png: always the same seeds and classes, from the averaged weights."""
        config, shown = self.config, shown_classes(self.config.num_classes)
        seeds = list(range(8 * len(shown)))
        data = self.data if config.given else None
        labels = choose_labels(seeds, shown, config.num_classes, data)
        with choose_precision(self.device, self.precision)[1]:
            batches = sample_images(self.parts["ema"], config, seeds, labels, self.device, 64, data)
            images = np.concatenate([images for _, images in batches])
        path = self.folder / "samples" / f"{self.done:07d}.png"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            grid(images, labels, self.settings["classes"], config.given).save(temporary, "PNG")

    def finish(self, start: int):
        steps, minutes = self.config.steps, self.seconds / 60
        if self.done == start:
            say(f"nothing was left to do: the run stands at step {start}, and --steps is {steps}")
        else:
            say(f"{self.done} of {steps} steps done in {minutes:.1f} minutes")
        if self.file.exists():
            say(f"`python sample.py {self.folder}` draws samples")
        if self.done < steps:
            say("stopped by a signal: the same command goes on")


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
    """Yields seeds and their images (B, given + frames, H, W, 3) uint8. All batches have one size:
    the last is filled up, as a compiled network would be compiled again for a smaller one. data:
    clips whose first frames are given; seed i takes clip i, modulo their number."""
    batches = max(1, math.ceil(len(seeds) / batch))
    size, frames = max(1, math.ceil(len(seeds) / batches)), config.frames
    hidden = not seeds or os.environ.get("RANK", "0") != "0"
    with tqdm(total=batches * config.sample_steps, unit="step", disable=hidden, leave=None) as bar:
        for first in range(0, len(seeds), size):
            part, y = seeds[first : first + size], labels[first : first + size]
            filled = (part * size)[:size]
            conditioned = net
            y = torch.tensor((y * size)[:size], device=device).repeat_interleave(frames)
            if config.given:
                numbers = [seed % len(data.labels) for seed in filled]
                clips, _ = read_clips(data, numbers, [0.0] * size)
                known = clips[:, : config.given]
                given = from_uint8(torch.from_numpy(known).to(device)).flatten(1, 2)
                conditioned = functools.partial(net, given=given)
            for _, x_hat in sid2.sample_steps(conditioned, config, filled, y):
                bar.update()
            images = to_uint8(x_hat)
            images = images.reshape(size, frames, *images.shape[1:])
            if config.given:
                images = np.concatenate([known, images], axis=1)
            yield part, images[: len(part)]


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

    read(i, window) gives neighbouring frames of clip i, uint8 (length, H, W, 3). window in [0, 1)
    says where they begin: 0 as early as they can, near 1 as late. InputError names what cannot be
    read.
    """

    name: str
    labels: np.ndarray  # int64 (N,)
    classes: list[str]  # their names; none without labels
    read: Callable


def window_of(clip, window: float, length: int):
    """Neighbours in a sequence: see Data."""
    begin = int(window * (len(clip) - length + 1))
    return clip[begin : begin + length]


def read_clips(data: Data, numbers: Iterable[int], windows: Iterable[float]):
    """These clips, uint8 (B, length, H, W, 3), and their labels (B,). In the place of one that
    cannot be read comes the next that can; a hundred in a row end the run."""
    clips, labels = [], []
    for number, window in zip(numbers, windows):
        for i in range(number, number + 100):
            i %= len(data.labels)
            try:
                clips.append(data.read(i, window))
                labels.append(data.labels[i])
                break
            except InputError as error:
                warn_once(f"warning: {error}: the next takes its place")
                last = error
        else:
            raise InputError(f"nothing is left to read in {data.name}: {last}")
    return np.stack(clips), np.array(labels)


@functools.cache
def warn_once(message: str):
    tqdm.write(message, file=sys.stderr)


def open_data(name: str, size: int, seed: int, length: int = 1) -> Data:
    """shapes, cifar10, FOLDER or FILE.npz, as images, or clips of `length` frames, of size x size
    pixels."""
    path = Path(name)
    if name == "shapes":
        return open_shapes(size, seed, length)
    if name == "cifar10" and (size, length) == (32, 1):
        return open_cifar10()
    if path.is_dir():
        return open_folder(path, size, length)
    if path.is_file() and path.suffix == ".npz":
        return open_labelled_npz(path, size, length)
    raise InputError(f"--data {name} cannot be opened: give shapes, cifar10 (images of 32 px), or "
                     "a folder or an .npz file that exists")


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
        radius, centres, dark, light = shape_scene(seed, i, length)
        return np.stack([draw_shape(classes[labels[i]], size, radius, centre, dark, light)
                         for centre in centres])

    return Data("shapes", labels, classes, read)


def shape_scene(seed: int, clip: int, length: int):
    """Radius, centres in each frame (length, 2), both in widths of the image, and two colours."""
    rng = np.random.default_rng([seed, 2, clip])
    radius = rng.uniform(0.26, 0.42)
    if length > 1:
        radius *= 0.7  # room to move
    centre = rng.uniform(radius, 1 - radius, 2)  # the whole shape is in the picture
    dark, light = rng.uniform(0, 0.35, 3), rng.uniform(0.35, 1, 3)
    light[rng.integers(3)] = 1  # one full channel for contrast
    end = rng.uniform(radius, 1 - radius, 2)
    return radius, np.linspace(centre, end, length), dark, light


def draw_shape(name: str, size: int, radius: float, centre: np.ndarray, dark, light) -> np.ndarray:
    fine = max(1, 64 // size)  # points per pixel and axis: 4 at 16 px, 1 from 33 px up
    points = (np.arange(fine * size, dtype=np.float32) + 0.5) / (fine * size)
    a, b = (points - centre[0]) / radius, (points[:, None] - centre[1]) / radius
    hits = SHAPES[name](a, b).reshape(size, fine, size, fine).sum((1, 3))  # of a pixel's points
    share = np.arange(fine**2 + 1)[:, None] / fine**2
    palette = (255 * (dark + share * (light - dark)) + 0.5).astype(np.uint8)
    return palette[hits]


def from_array(name: str, images: np.ndarray, labels: np.ndarray, classes: list[str],
               length: int = 1) -> Data:
    """Images (N, H, W, 3) or clips (N, L, H, W, 3) in memory, or mapped."""

    def read(i: int, window: float) -> np.ndarray:
        return window_of(take(images, i).reshape(-1, *images.shape[-3:]), window, length)

    return Data(name, labels.astype(np.int64), classes, read)


SUFFIXES = (".apng .avif .bmp .dib .gif .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .pbm "
            ".pgm .png .pnm .ppm .tif .tiff .webp").split()
OTHERS = (".arw .cr2 .dng .exr .hdr .heic .heif .ico .jxl .mkv .mov .mp4 .nef .psd .svg .tga "
          ".webm").split()  # that one might believe to be read


def find_files(top: Path) -> list[str]:
    """Images in `top` and below, by their names from there on, sorted. Links are followed; hidden
    files and folders, and those that systems add, are not."""
    def refuse(error: OSError):  # os.walk would leave the folder out without a word
        raise error

    files, others = [], Counter()
    for root, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        above = {os.path.realpath(parent) for parent in Path(root).parents}
        loop = os.path.realpath(root) in above  # a link to a folder above is followed once
        folders[:] = [] if loop else [name for name in folders
                                      if not name.startswith((".", "@", "__", "lost+found"))]
        inside = os.path.relpath(root, top)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES and not name.startswith("."):
                files.append(name if inside == "." else os.path.join(inside, name))
            elif suffix in OTHERS and not name.startswith("."):
                others[suffix] += 1
    left_out = ", ".join(f"{count} {suffix}" for suffix, count in others.items())
    if not files:
        raise InputError(f"no images in {top} and its sub-folders, but {left_out or 'nothing'}: "
                         f"looked for {' '.join(SUFFIXES)}")
    if left_out:
        say(f"left out: {left_out}")
    return sorted(files, key=lambda name: name.replace(os.sep, "\0"))  # a/x before a-b/x


def open_folder(path: Path, size: int | None, length: int = 1, labelled: bool = True) -> Data:
    """Images of a folder, nested, or clips: folders of frames, 2 before 10. The immediate
    sub-folders are the classes; without any it is unlabelled. size: of the centre crop, or None."""
    files = find_files(path)
    names, clips = files, [(file,) for file in files]
    if length > 1:
        folders = {}
        for file in files:
            folders.setdefault(os.path.dirname(file), []).append(file)
        names = [name for name, members in folders.items() if len(members) >= length]
        clips = [sorted(folders[name], key=lambda file: (len(file), file)) for name in names]
        short = f"{len(folders) - len(clips)} folders of fewer than {length} images"
        if not clips:
            raise InputError(f"no clips in {path}, but {short}: a clip is a folder of frames, as "
                             "many as are given and generated at least")
        if len(clips) < len(folders):
            say(f"left out: {short}")

    def read(i: int, window: float) -> np.ndarray:
        with reading(path / names[i]):
            chosen = window_of(clips[i], window, length)
            images = [read_image(path / file, length > 1) for file in chosen]
            if len({image.size for image in images}) > 1:
                raise ValueError("its frames have different sizes")
            return np.stack([centre_crop(image, size) if size else image for image in images])

    tops = [sys.intern(name.split(os.sep, 1)[0]) if labelled and os.sep in name else ""
            for name in names]
    classes = sorted(set(tops) - {""})
    if classes and "" in tops:
        raise InputError(f"{path} has {tops.count('')} images or clips beside its {len(classes)} "
                         "class folders: put them into classes, or away")
    number = {name: i for i, name in enumerate(classes or [""])}
    return Data(str(path), np.array([number[top] for top in tops]), classes, read)


def read_image(file: Path, is_frame: bool) -> Image.Image:
    """The picture of a file in RGB; the first, if there are several."""
    with reading(file), Image.open(file) as image:
        if is_frame and getattr(image, "is_animated", False) and image.format != "MPO":
            raise ValueError("it is an animation: a clip is a folder of frames, each in a file")
        return to_rgb(image)


TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
         5: Image.TRANSPOSE, 6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF tag; grey of 12 or 16 bits scaled to 8; transparency laid over white."""
    image.load()
    orientation = 1
    with contextlib.suppress(Exception):  # what cannot be read of EXIF is ignored
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    if image.mode[0] in "IF":
        image = to_8_bits(image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Whole numbers of 16 bits, or of as many as a TIFF says. Others have no range that a file
    tells."""
    numbers, bits, plain = np.asarray(image), 16, True
    if image.format == "TIFF":  # bits, whether 0 is black, and whether numbers have a sign
        tags = image.tag_v2
        bits, plain = tags[258][0], tags.get(262) == 1 and tags.get(339, (1,)) == (1,)
    known = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    if not plain or not known:
        raise ValueError(f"mode {image.mode}, {bits} bits: only 8, 12 and 16 bits without sign, 0 "
                         "for black, say what is white")
    grey = (numbers >> bits - 8).astype(np.uint8)
    grey[numbers == image.info.get("transparency", -1)] = 255  # over white, as below
    return Image.fromarray(grey)


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


def open_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz by name. arr_0, the images, is mapped unless it is compressed: 50,000 of
    256 px are 9.8 GB."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} does not exist or is no npz: give a folder of images, or an npz "
                         "whose arr_0 is uint8 (N, H, W, 3)")
    with reading(path, "an npz"), np.load(path, allow_pickle=False) as npz:
        if not all(name.endswith(".npy") for name in npz.zip.namelist()):
            raise ValueError("it holds other files than arrays")
        arrays = {key: npz[key] for key in npz if key != "arr_0"}
        if "arr_0" in npz:
            stored = npz.zip.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
            arrays["arr_0"] = map_array(path, "arr_0.npy") if stored else npz["arr_0"]
        return arrays


def map_array(path: Path, name: str) -> np.ndarray:
    """An array of a zip, mapped where it lies."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        member = archive.getinfo(name)
        file.seek(member.header_offset)
        name_length, extra_length = struct.unpack("<26x2H", file.read(30))  # a zip's local header
        begin = member.header_offset + 30 + name_length + extra_length
        file.seek(begin)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if begin + member.file_size - file.tell() != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is not as long as it says")
        if fortran or dtype.hasobject:  # memmap would take the bytes of objects for pointers
            raise ValueError(f"{name} must hold plain numbers, the last index fastest")
        return np.memmap(path, dtype, "r", file.tell(), shape)


def take(images: np.ndarray, index) -> np.ndarray:
    """images[index]. What is mapped is mapped anew: else all that was ever read would count as
    memory of this process."""
    if isinstance(images, np.memmap):
        images = np.memmap(images.filename, images.dtype, "r", images.offset, images.shape)
    return np.array(images[index])


def held(arrays: dict[str, np.ndarray]) -> str:
    """What an npz holds, in words."""
    return ", ".join(f"{k} {value.dtype} {value.shape}" for k, value in arrays.items()) or "nothing"


def open_labelled_npz(path: Path, size: int, length: int) -> Data:
    """uint8 arr_0 (N, size, size, 3), or (N, L, size, size, 3) if length > 1, and labels arr_1 (N,)
    where there are any."""
    arrays = open_npz(path)
    images = arrays.get("arr_0", np.empty(0))
    N, *L = images.shape[:-3] or (0,)
    labels = arrays.get("arr_1", np.zeros(N, int))
    right_length = not L if length == 1 else len(L) == 1 and L[0] >= length
    fits = (arrays.keys() <= {"arr_0", "arr_1"} and images.dtype == np.uint8 and N > 0
            and right_length and images.shape[-3:] == (size, size, 3)
            and labels.shape == (N,) and labels.dtype.kind in "iu" and labels.min() >= 0)
    if not fits:
        clip = f"L, {size}, {size}, 3), L from {length} up" if length > 1 else f"{size}, {size}, 3)"
        raise InputError(f"{path} holds {held(arrays)}; wanted: arr_0 uint8 (N, {clip}, and arr_1, "
                         "N whole numbers from 0 up, if there are labels")
    found = np.unique(labels)
    empty = np.setdiff1d(np.arange(len(found)), found)
    if len(empty):
        raise InputError(f"{path}: no image has the label {empty[0]}, and one has {found[-1]}: "
                         "labels begin at 0 and leave no number out")
    names = [str(label) for label in found] if "arr_1" in arrays else []
    return from_array(str(path), images, labels, names, length)


CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170,052,171 bytes
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


def open_cifar10() -> Data:
    """The 50,000 training images of the binary archive: a label and 3 x 32 x 32 bytes each."""
    archive = Path(torch.hub.get_dir(), "cifar-10-binary.tar.gz")
    with reading(archive, f"CIFAR-10's archive, to be put there from {CIFAR10}"):
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
    return from_array("cifar10", np.ascontiguousarray(images), records[:, 0], classes)


# --------------------------------------------------------------------------------------------------
# 6. What all scripts share: errors, processes, command line


class InputError(Exception):
    """What the user can mend: one line says what came, what is allowed, what to do."""


@contextlib.contextmanager
def reading(path: Path, what: str = "an image"):
    """Whatever a reader raises becomes one line that names its file: the errors of Pillow, NumPy,
    zip and torch share no base."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
        raise InputError(f"{path} cannot be read as {what} ({reason})") from error


def guarded(main: Callable):
    """Runs the main function of a script. What the user can mend ends it with one line of error and
    exit code 2; SID2_TRACEBACK=1 shows where it was raised."""
    on_signals(signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # names may have letters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        if dist.is_initialized():
            agree()  # all processes end together
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # gloo's threads may abort while Python shuts down, so it does not
    except (Exception, KeyboardInterrupt) as raised:
        # torch.save answers a second Ctrl-C with an error of its own
        interrupted = isinstance(raised.__context__, KeyboardInterrupt)
        error = raised.__context__ if interrupted else raised
        message = explain(error)
        if not message or "SID2_TRACEBACK" in os.environ:
            raise
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        if isinstance(error, KeyboardInterrupt):
            os._exit(130)  # does not wait for a thread that may read for ever
        raise SystemExit(2)


def explain(error: BaseException) -> str:
    """An error that the user can mend, in words; "" for any other, which is a mistake of ours."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was written before is whole"
    if isinstance(error, OSError):  # no space, no permission, a disk that went away
        return f"cannot read or write: {error}; what was written before is whole"
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    on_cpu = "can't allocate memory" in str(error) or "size calculation overflow" in str(error)
    if out_of_memory or on_cpu:
        return "out of memory: --batch, in train.py --micro-batch, takes fewer images at once"
    if "Connection closed by peer" in str(error):
        return "another process has ended: its own message says why"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return (f"torch.compile cannot work here ({str(error)[:200]}): leave out --compile, "
                "in train.py give --no-compile")
    return ""


def on_signals(handler: Callable):
    """A closed terminal (SIGHUP) and SLURM's signal (SIGUSR1) mean the same as SIGTERM and Ctrl-C.
    What is ignored, as under nohup, stays so."""
    for name in "SIGINT SIGTERM SIGHUP SIGUSR1".split():
        number = getattr(signal, name, None)  # Windows has two of them
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def setup(name: str) -> tuple[int, int, torch.device]:
    """Rank, number of processes, device. Joins the process group if torchrun has set RANK."""
    several = not os.environ.keys().isdisjoint(("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not several and os.environ.get("SLURM_NTASKS", "1") != "1":
        raise InputError(f"SLURM_NTASKS is {os.environ['SLURM_NTASKS']} and RANK is not set, so "
                         "each task would run alone: start with torchrun, or srun with RANK set")
    if name == "auto":  # MPS has no process group
        mps = torch.backends.mps.is_available() and not several
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
        if name == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False  # fp32 means float32, in convolutions too
            torch.backends.cudnn.benchmark = True
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}")
    if not several:
        return 0, 1, device
    on_signals(signal.SIG_DFL)  # Python's handlers would wait until all have met
    try:  # agree() is on the CPU, by gloo; two hours, as the others wait while the first draws
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo",
                                timeout=timedelta(hours=2))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes cannot meet ({error}): start them with torchrun, or unset "
                         "RANK, WORLD_SIZE and LOCAL_RANK")
    on_signals(signal.default_int_handler)
    return dist.get_rank(), dist.get_world_size(), device


def agree(flag: bool = False) -> bool:
    """True if `flag` is true in any process. No process returns before all have called."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.item() > 0


def say(message: str):
    """Printed by the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(message, flush=True)


def choose_precision(device: torch.device, name: str) -> tuple[str, torch.autocast]:
    """fp32, or bf16: autocast around float32 weights. auto is bf16 if the hardware multiplies it.
    """
    if name == "auto":
        fast = (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
                if device.type == "cpu" else device.type == "cuda"
                and torch.cuda.is_bf16_supported(including_emulation=False))
        name = "bf16" if fast else "fp32"
    return name, torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16")


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
    add("--init-from", help="start from the EMA weights of this run, whose trunk must fit")
    add("--seed", type=int, default=0)
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 if fast")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    add("--micro-batch", type=int, help="images, or clips, at once in a process; default: all")
    add("--checkpointing", type=int, nargs="*", default=(), metavar="LEVEL",
        help="compute activations again at these levels, 0 the top, or at all: saves memory")
    add("--workers", type=int, help="threads that make batches; default: up to 8 on CUDA, else 1")
    add("--log-every", type=int, default=50, help="steps between rows of the log")
    add("--sample-every", type=int, default=1000, help="steps between pictures; 0: never")
    add("--save-every", type=int, default=1000, help="steps between checkpoints; 0: never")
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


def configure(args: argparse.Namespace, world: int, device: torch.device):
    """The configuration, of the preset, the flags and the classes of the data; and the data."""
    preset = sid2.PRESETS[args.preset]
    flags = {name: getattr(args, name) for name in asdict(preset)}
    config = replace(preset, **{name: tuple(value) if isinstance(value, list) else value
                                for name, value in flags.items() if value is not None})
    if args.checkpointing == []:  # the flag without a level; () without the flag
        args.checkpointing = range(len(config.channels))
    if args.workers is None:
        gpus = torch.cuda.device_count()  # which share the processor
        args.workers = max(1, min(8, os.cpu_count() // gpus)) if device.type == "cuda" else 1
    check(config, world=world, **vars(args))
    name = args.data or dict(shapes="shapes", moving="shapes", cifar10="cifar10").get(args.preset)
    if not name:
        raise InputError(f"--preset {args.preset} needs --data: shapes, a folder or an npz")
    data = open_data(name, config.image_size, args.seed, config.given + config.frames)
    if args.num_classes and args.num_classes != len(data.classes):
        raise InputError(f"--num-classes {args.num_classes}: {data.name} has {len(data.classes)} "
                         "classes; 0 trains without them")
    if config.num_classes > 0:
        config = replace(config, num_classes=len(data.classes))
    return config, data


def check(config: sid2.Config, **flags):
    """The rules whose breach torch would report late or unclearly; flags: those of the script."""
    values, levels, most = flags | asdict(config), len(config.channels), 10**9
    limits = [
        (1, most, "patch_size head_width width channels image_size noise_low steps batch "
                  "sample_steps log_every micro_batch workers"),
        (0, most, "middle depth num_classes noise_high lr warmup adam_eps clip sample_every "
                  "save_every"),
        (-most, most, "bias guidance interval"),
        (0, 1, "dropout ema label_dropout gamma"),
        (0, 0.999999, "betas"),
        (1, 1000, "frames"),
        (0, 1000, "given"),
        (0, levels - 1, "checkpointing"),
        (0, 2**32 - 1, "seed"),
    ]
    for low, high, names in limits:
        for name in names.split():
            value = values.get(name)
            numbers = value if isinstance(value, (tuple, list, range)) else [value]
            if value is not None and not all(low <= number <= high for number in numbers):
                raise InputError(f"{name} must lie in [{low}, {high}], got {value}")
    unit = config.patch_size * 2 ** (levels - 1)
    part = values.get("world", 1) * (values.get("micro_batch") or 1)
    rules = [
        ("width", config.width % 2 == 0, "must be even"),
        ("interval", config.interval[0] < config.interval[1], "needs the lower number first"),
        ("blocks", len(config.blocks) == levels and set(config.blocks) <= set("RT"),
         f"needs a letter R or T for each of the {levels} channels"),
        ("channels", all(n % config.head_width == 0 for n, kind in
                         zip(config.channels, config.blocks) if kind == "T"),
         f"must be multiples of head_width {config.head_width} at T levels"),
        ("image_size", config.image_size % unit == 0,
         f"must be a multiple of {unit}, patch_size times 2 per lower level"),
        ("batch", config.batch % part == 0,
         f"must be a multiple of {part}, the number of processes times micro_batch"),
        ("sampler", config.sampler in ("ddpm", "ddim"), "must be ddpm or ddim"),
    ]
    for name, holds, rule in rules:
        if not holds:
            raise InputError(f"{name} {rule}, got {values[name]}")


if __name__ == "__main__":
    guarded(main)

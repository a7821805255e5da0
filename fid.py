"""Scores samples as the field's own evaluators do: FID, sFID, IS, precision, recall, KID.

    python fid.py DATA --save-stats ref.npz --crop 256     statistics of a reference, once
    python fid.py SAMPLES ref.npz [REFERENCE ...]          a folder or npz, against each reference

`torchrun --nproc_per_node=8 fid.py ...` shares out the images and gives the same numbers.

    f, s, log p = Inception(image)    2,048 pooled features, 2,023 spatial ones, 1,008 classes
    FID  = |mu_1 - mu_2|² + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^½)     mu, S: mean, covariance of f
    sFID = the same of s
    IS   = exp(mean of KL(p of an image | mean of p)), averaged over splits of 5,000 samples
    KID  = E k(x, x') + E k(y, y') - 2 E k(x, y),   k(x, y) = (x·y / 2048 + 1)³,   x and y: f
    precision = share of samples that lie in the ball of a reference image, whose radius is the
                distance to its third nearest neighbour among the references; recall: roles swapped

FID of N samples is too large by about a constant / N. So FID, sFID and IS carry N in their names,
as in FID-50k, and compare at the same N only. KID has no such bias.
Sources: [TTUR] FID, arXiv 1706.08500; [IS] 1606.03498; [ADM] the evaluator of 2105.05233; [PR]
1904.06991; [KID] 1801.01401; [TF1] TensorFlow 1; [ours] our choice.
"""

import argparse
import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from train import InputError, find_files, in_one_line, leave, progress, read_image, replacing, setup

# --------------------------------------------------------------------------------------------------
# 1. The network: Google's Inception of 2015-12-05. (!) marks where torchvision's differs

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")  # Apache-2.0
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Conv(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel=1, stride: int = 1, padding="same"):
        super().__init__(OrderedDict(
            conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
            bn=nn.BatchNorm2d(c_out, eps=1e-3),  # torch's default is 1e-5
            relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Torchvision's InceptionA to E on c channels; m: the width that differs within a kind. Each
    branch is a chain of Conv's arguments after c_in; a list of kernels makes two Convs, a and b,
    on the same input."""

    def __init__(self, kind: str, c: int, m: int = 0, pool=nn.AvgPool2d(3, 1, 1, False, False)):
        super().__init__()  # (!) the last False: torchvision's mean counts the padding
        row, column, cross = (1, 7), (7, 1), [(1, 3), (3, 1)]
        branches = dict(
            A=dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                   branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(m, 1)]),
            B=dict(branch3x3=[(384, 3, 2, 0)],
                   branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, 0)], branch_pool=[]),
            C=dict(branch1x1=[(192, 1)], branch7x7=[(m, 1), (m, row), (192, column)],
                   branch7x7dbl=[(m, 1), (m, column), (m, row), (m, column), (192, row)],
                   branch_pool=[(192, 1)]),
            D=dict(branch3x3=[(192, 1), (320, 3, 2, 0)],
                   branch7x7x3=[(192, 1), (192, row), (192, column), (192, 3, 2, 0)],
                   branch_pool=[]),
            E=dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, cross)],
                   branch3x3dbl=[(448, 1), (384, 3), (384, cross)], branch_pool=[(192, 1)]))[kind]
        pool = nn.MaxPool2d(3, 2) if kind in "BD" else pool
        self.branches = []  # plain lists: add_module registers the layers, by torchvision's names
        for branch, convs in branches.items():
            steps = [[pool]] if branch == "branch_pool" else []
            c_in = c
            for i, (c_out, kernel, *more) in enumerate(convs, 1):
                name = f"{branch}_{i}" if len(convs) > 1 else branch
                fork = zip("ab", kernel) if isinstance(kernel, list) else [("", kernel)]
                layers = {name + letter: Conv(c_in, c_out, k, *more) for letter, k in fork}
                for name, layer in layers.items():
                    self.add_module(name, layer)
                steps.append(list(layers.values()))
                c_in = c_out
            self.branches.append(steps)

    def forward(self, h: Tensor) -> Tensor:
        out = []
        for steps in self.branches:
            ends = [h]
            for fork in steps:
                ends = [layer(ends[0]) for layer in fork]
            out += ends
        return torch.cat(out, 1)


class Inception(nn.Sequential):
    """Images (B, 3, 299, 299) in [-1, 1] -> pooled features (B, 2048), spatial features (B, 2023)
    and log p (B, 1008). 472 tensors under torchvision's names, 23,885,392 values."""

    def __init__(self):
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=Conv(3, 32, 3, 2, 0),  # 149 x 149
            Conv2d_2a_3x3=Conv(32, 32, 3, 1, 0), Conv2d_2b_3x3=Conv(32, 64, 3),  # 147
            maxpool1=nn.MaxPool2d(3, 2), Conv2d_3b_1x1=Conv(64, 80),  # 73
            Conv2d_4a_3x3=Conv(80, 192, 3, 1, 0), maxpool2=nn.MaxPool2d(3, 2),  # 71, 35
            Mixed_5b=Mixed("A", 192, 32), Mixed_5c=Mixed("A", 256, 64),
            Mixed_5d=Mixed("A", 288, 64), Mixed_6a=Mixed("B", 288),  # 35, 17
            Mixed_6b=Mixed("C", 768, 128), Mixed_6c=Mixed("C", 768, 160),
            Mixed_6d=Mixed("C", 768, 160), Mixed_6e=Mixed("C", 768, 192),
            Mixed_7a=Mixed("D", 768), Mixed_7b=Mixed("E", 1280),  # 8
            Mixed_7c=Mixed("E", 2048, pool=nn.MaxPool2d(3, 1, 1)),  # (!) torchvision: a mean
            fc=nn.Linear(2048, 1008)))  # (!) torchvision: 1000 classes

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for layer in list(self)[:-1]:
            h = layer(h)
            if layer is self.Mixed_6d:
                s = h[:, :7].permute(0, 2, 3, 1).flatten(1)  # 7 of branch1x1, channels last [ADM]
        f = h.mean((2, 3))
        return f, s, F.log_softmax(f @ self.fc.weight.T, 1)  # (!) without the bias of fc [ADM]


def load_inception(path: str | None) -> Inception:
    """The network; path: a file of its weights, `random`, or None: downloads."""
    net = Inception().eval()
    if path == "random":
        generator = torch.Generator().manual_seed(0)
        for p in net.parameters():
            if p.ndim > 1:  # He: the features of all layers have the same power
                nn.init.kaiming_normal_(p, nonlinearity="relu", generator=generator)
        return net
    with in_one_line(f"no weights of Inception at {path or URL}: fetch {URL} (95,628,359 bytes, "
                     f"sha256 {SHA256}) and give --inception PATH"):
        if path is None:
            torch.hub.load_state_dict_from_url(URL, None, "cpu", check_hash=True, weights_only=True)
            path = Path(torch.hub.get_dir(), "checkpoints", Path(URL).name)
        if hashlib.sha256(Path(path).read_bytes()).hexdigest() != SHA256:
            raise ValueError("its sha256 is another")
    state = torch.load(path, map_location="cpu", weights_only=True)
    net.load_state_dict(dict(state))  # a plain dict may lack num_batches_tracked, as the file does
    return net


def resize(x: Tensor, size: int = 299) -> Tensor:
    """Bilinear: x (B, C, H, W) -> (B, C, size, size), source place = destination * in / out [TF1].

    No half-pixel centres, no antialiasing, edge clamped: the row [0, 1] becomes [0, .5, 1, 1] at
    size 4. Trap: F.interpolate differs by 7-36 grey levels and 0.8-1.4 % of the features.
    """
    for dim in (3, 2):
        n = x.shape[dim]
        place = torch.arange(size, device=x.device) * (n / size)
        left = place.long()
        a, b = x.index_select(dim, left), x.index_select(dim, (left + 1).clamp(max=n - 1))
        x = torch.lerp(a, b, (place - left).view(-1, *[1] * (3 - dim)))
    return x


# --------------------------------------------------------------------------------------------------
# 2. The metrics


def mean_covariance(total: Tensor) -> tuple[Tensor, Tensor]:
    """Of features, from Σ (f, 1)(f, 1)ᵀ in float64. Trap: float32 sums cost 6e-5 of the trace."""
    n, mu = total[-1, -1], total[-1, :-1] / total[-1, -1]
    return mu.cpu(), ((total[:-1, :-1] - n * torch.outer(mu, mu)) / (n - 1)).cpu()


def inception_score(total: Tensor) -> float:
    """From Σp, Σ p log p and n of each split, (splits, 1008 + 2) [IS]."""
    p, p_log_p = (total[:, :-1] / total[:, -1:]).split([1008, 1], 1)
    return (p_log_p[:, 0] - torch.xlogy(p, p).sum(1)).exp().mean().item()


def frechet(mu_1: Tensor, sigma_1: Tensor, mu_2: Tensor, sigma_2: Tensor) -> float:
    """|mu_1 - mu_2|² + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^½), float64 [TTUR].

    S is sigma here. With R Rᵀ = S_1, the product S_1 S_2 has the eigenvalues of Rᵀ S_2 R, which is
    symmetric: no complex numbers, and singular covariances (fewer images than features) cost 2e-6
    at most.
    """
    l, U = torch.linalg.eigh(sigma_1)
    R = U * l.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(R.T @ sigma_2 @ R).clamp(min=0).sqrt().sum()
    means = (mu_1 - mu_2).square().sum()
    return (means + sigma_1.trace() + sigma_2.trace() - 2 * root).clamp(min=0).item()


def precision(real: Tensor, fake: Tensor, k: int = 3) -> float:
    """Share of `fake` (N, D) in the balls around `real` (M, D), each up to its k-th neighbour [PR];
    k = 3 [ADM]. Recall is precision(fake, real)."""
    real, fake = real.float(), fake.float()
    radii = torch.cat([torch.cdist(rows, real).kthvalue(k + 1).values  # the nearest is itself
                       for rows in real.split(1000)])
    hits = [(torch.cdist(rows, real) <= radii).any(1) for rows in fake.split(1000)]
    return torch.cat(hits).double().mean().item()


def kid(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000) -> float:
    """Squared maximum mean discrepancy, unbiased: mean of 100 subsets of 1,000 [KID]."""
    rng, m, total = np.random.default_rng(0), min(size, len(x), len(y)), 0.0
    for _ in range(subsets):
        a, b = (f[rng.permutation(len(f))[:m]].double() for f in (x, y))
        aa, bb, ab = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (m * (m - 1))
        total += (within - 2 * ab.mean()).item()
    return total / subsets


# --------------------------------------------------------------------------------------------------
# 3. Images and statistics


@dataclass
class Source:
    """Images, statistics, or both (ADM's reference files)."""

    name: str
    count: int = 0  # of images
    read: Callable = None  # ascending numbers -> their images, each uint8 (H, W, 3)
    statistics: dict = field(default_factory=dict)  # mu, sigma, ...: of the file, then measured


def images_of(path: Path, crop: int | None) -> Source:
    """All images in a folder and below, as train.py reads them: upright by EXIF, transparency over
    white. (pytorch-fid does neither.) crop: size of ADM's centre crop; None: as they are."""
    files, pool = find_files(path), ThreadPoolExecutor()

    def read(numbers: np.ndarray) -> list[np.ndarray]:
        return list(pool.map(lambda i: read_image(path / files[i], crop), numbers.tolist()))

    return Source(str(path), len(files), read)


SHAPES = dict(mu=(2048,), sigma=(2048, 2048), mu_s=(2023,), sigma_s=(2023, 2023), n=())


def statistics_of(path: Path, arrays: dict) -> dict:
    """Statistics as in SHAPES, of pytorch-fid, EDM, JiT, ADM or --save-stats."""
    out = {}
    for key in (key for key in SHAPES if key in arrays):
        value, shape = arrays[key], SHAPES[key]
        fits = value.dtype.kind in "fiu" and value.shape == shape and np.isfinite(value).all()
        if not fits or not np.allclose(value, value.T) or key == "n" and value < 2:
            raise InputError(f"{path}: {key} is {value.dtype} {value.shape}; wanted: finite "
                             f"numbers {shape}, sigma symmetric, n from 2 up")
        out[key] = torch.from_numpy(value.astype(np.float64)) if shape else int(value)
    return out


def open_source(name: str, crop: int | None = None) -> Source:
    """A folder of images, or an npz of images (arr_0), of statistics, or of both."""
    path = Path(name)
    if os.path.exists(path / "checkpoint.pt"):
        raise InputError(f"{path} is a run of train.py: `python sample.py {path} --format npz` "
                         "makes samples to score")
    if os.path.isdir(path):
        return images_of(path, crop)
    with in_one_line(f"{path} cannot be read as an npz"), np.load(path, allow_pickle=False) as npz:
        arrays = {key: np.asarray(value) for key, value in npz.items()}  # bytes, if it is no npz
    statistics, images = statistics_of(path, arrays), arrays.get("arr_0")
    has = statistics.keys()
    whole = ("mu" in has) == ("sigma" in has) and ("mu_s" in has) == ("sigma_s" in has)
    if images is not None:
        whole &= images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
    if not whole or images is None and "mu" not in has:
        held = ", ".join(f"{key} {array.dtype} {array.shape}" for key, array in arrays.items())
        raise InputError(f"{path} holds {held[:300]}; wanted: arr_0 uint8 (N, H, W, 3), or mu and "
                         "sigma, or both")
    if images is None:
        return Source(str(path), statistics=statistics)
    return Source(str(path), len(images), lambda numbers: images[numbers], statistics)


@torch.inference_mode()
def measure(source: Source, net: Callable, device: torch.device, batch: int = 50, keep: int = 0,
            split: int = 5000) -> dict:
    """Statistics of all images, shared out over all processes; float16 features of `keep` of them
    at random: memory grows by these alone, 4 KB each."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    n = source.count
    pooled, spatial, score = (torch.zeros(shape, dtype=torch.float64, device=place) for shape in
                              ((2049, 2049), (2024, 2024), (-(-n // split), 1008 + 2)))
    features = torch.zeros(min(keep, n), 2048, dtype=torch.float16, device=place)
    sizes = set()  # heights and widths
    # a random order chooses the features that are kept and the splits of IS [ours]: in
    # class-sorted samples a split would hold few classes
    order = torch.from_numpy(np.random.default_rng(0).permutation(n)).to(place)

    mine = np.array_split(np.arange(n), world)[rank]
    with progress(total=len(mine), desc=source.name, unit="img") as bar:
        for part in (mine[i : i + batch] for i in range(0, len(mine), batch)):
            images = source.read(part)
            shapes = [image.shape for image in images]
            sizes |= {shape[:2] for shape in shapes}
            for shape in sorted(set(shapes)):  # one, as a rule
                same = [i for i, other in enumerate(shapes) if other == shape]
                x = torch.from_numpy(np.stack([images[i] for i in same])).to(device)
                x = (resize(x.permute(0, 3, 1, 2).float()) - 128) / 128
                out = net(x.contiguous(memory_format=torch.channels_last))
                f, s, log_p = (t.to(place).double() for t in out)
                p, p_log_p = log_p.exp(), (log_p.exp() * log_p).sum(1, keepdim=True)
                one, at = torch.ones_like(p_log_p), order[part[same]]
                for total, h in (pooled, f), (spatial, s):
                    rows = torch.cat([h, one], 1)
                    total.addmm_(rows.T, rows)
                score.index_add_(0, at // split, torch.cat([p, p_log_p, one], 1))
                features[at[at < keep]] = f[at < keep].half()
            bar.update(len(part))
    if world > 1:
        for t in (pooled, spatial, score, features):
            dist.all_reduce(t)
    (mu, sigma), (mu_s, sigma_s) = mean_covariance(pooled), mean_covariance(spatial)
    return dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, n=n, features=features,
                IS=inception_score(score), sizes=sizes)


def compare(fake: dict, real: dict, args) -> dict[str, float]:
    """The metrics that both sets of statistics allow, by name."""
    n, out = fake.get("n", "?"), {}
    n = f"{n // 1000}k" if n != "?" and n % 1000 == 0 else n
    for name, mu, sigma in ("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s"):
        if sigma in fake and sigma in real:
            out[f"{name}-{n}"] = frechet(fake[mu], fake[sigma], real[mu], real[sigma])
    if "IS" in fake:
        out[f"IS-{n}"] = fake["IS"]
    if args.precision_recall:
        out["precision"] = precision(real["features"], fake["features"])
        out["recall"] = precision(fake["features"], real["features"])
    if args.kid:
        out["KID"] = kid(fake["features"], real["features"])
    prefix = "random-" if args.inception == "random" else ""  # never to be mistaken for FID
    return {prefix + name: value for name, value in out.items()}


# --------------------------------------------------------------------------------------------------
# 4. The script


def main():
    args = parse()
    rank, world, device = setup(args.device)
    torch.set_float32_matmul_precision("highest")  # no TF32, nor in convolutions: see setup()
    torch.backends.cudnn.benchmark = False

    names = [args.samples, *dict.fromkeys(args.references)]  # each reference once
    samples, *others = sources = [open_source(name, args.crop) for name in names]
    if samples.read:  # the samples themselves are measured, whatever else their file says of them
        samples.statistics = {}
    need = args.precision_recall or args.kid
    for source in sources:
        if (need or args.save_stats) and source.count == 0:
            raise InputError(f"{source.name} holds statistics alone: --kid, --precision-recall and "
                             "--save-stats need images")
        if (need or args.save_stats or not source.statistics) and source.count < 4:
            raise InputError(f"{source.name} has {source.count} images: at least 4 are needed")

    net = load_inception(args.inception).to(device, memory_format=torch.channels_last)
    for source in sources:
        if need or not source.statistics:
            keep = 0 if not need else source.count if source is samples else 10_000  # [ADM]
            measured = measure(source, net, device, args.batch, keep)
            if source.statistics:  # the file's own are kept: ADM's are of the whole set
                measured = {key: measured[key] for key in ("features", "sizes")}
            source.statistics |= measured
    if rank == 0:
        report(args, samples, others, dict(device=str(device), processes=world))
    leave()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, file = parser.add_argument, os.path.expanduser
    add("samples", type=file, help="folder or npz")
    add("references", type=file, nargs="*", help="folders or npz")
    add("--save-stats", type=file, metavar="OUT.npz", help="write statistics of SAMPLES")
    add("--precision-recall", action="store_true", help="holds 4 KB per sample")
    add("--kid", action="store_true", help="holds 4 KB per sample")
    add("--crop", type=int, help="ADM's centre crop of all folders, in pixels")
    add("--inception", type=file, metavar="PATH", help="default: downloaded once; or `random`")
    add("--out", type=file, metavar="OUT.json", help="default: beside SAMPLES")
    add("--batch", type=int, default=50, help="images at once, per process")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    args = parser.parse_args()
    for flag, value in dict(crop=args.crop, batch=args.batch).items():
        if value is not None and value < 1:
            raise InputError(f"--{flag} must be at least 1, got {value}")
    if bool(args.save_stats) == bool(args.references):
        raise InputError("give SAMPLES REFERENCE, or DATA --save-stats OUT.npz")

    args.out = args.out or f"{Path(args.save_stats or args.samples)}.fid.json"
    if args.save_stats and Path(args.save_stats).resolve() == Path(args.out).resolve():
        raise InputError(f"--out and --save-stats both name {args.out}: give another name to one")
    for name in filter(None, (args.save_stats, args.out)):
        if os.path.exists(name):
            raise InputError(f"{name} exists: remove it, or give another name")
        with in_one_line(f"{name} cannot be written"):
            tempfile.TemporaryFile(dir=Path(name).parent).close()
    return args


def report(args: argparse.Namespace, samples: Source, references: list[Source], machine: dict):
    """Prints the metrics, and writes them with all that made them."""
    results = {real.name: compare(samples.statistics, real.statistics, args) for real in references}
    for name, values in results.items():
        print(*(f"{k} {v:<8.5g}" for k, v in values.items()), f" {name}")

    # what a reader of the numbers must know
    notes, images = [], {}
    for source in [samples, *references]:
        n = source.statistics.get("n", "?")
        images[source.name] = n
        if n != "?" and n < 10_000:
            fewer = ", fewer than the 2,048 features" if n < 2048 else ""
            notes.append(f"{source.name} has {n} images{fewer}: FID is biased, compare with FID "
                         "of as many, or use --kid")
        sizes = [set_of.get("sizes", set()) for set_of in (samples.statistics, source.statistics)]
        if sizes[0] and sizes[1] and sizes[0] != sizes[1]:
            here, there = (", ".join(f"{w} x {h}" for h, w in sorted(some)[:3]) for some in sizes)
            notes.append(f"{samples.name} has images of {here} pixels, {source.name} of {there}")
    notes = list(dict.fromkeys(notes))  # samples may be their own reference
    for note in notes:
        print(f"note: {note}")

    if args.save_stats:
        with replacing(Path(args.save_stats)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{key: np.asarray(samples.statistics[key]) for key in SHAPES})
        print(f"wrote {args.save_stats}")
    versions = {module.__name__: module.__version__ for module in (torch, np, PIL)}
    weights = "random" if args.inception == "random" else SHA256
    settings = vars(args) | dict(weights=weights, versions=versions) | machine
    with replacing(Path(args.out)) as temporary:
        temporary.write_text(json.dumps(dict(results=results, images=images, notes=notes,
                                             settings=settings), indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

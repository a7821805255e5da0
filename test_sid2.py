"""The method as true sentences, in the order of sid2.py; then the scripts, run end to end.

    python -m pytest

All runs on the CPU and nothing is downloaded. What needs more than this folder skips and says so:

    SID2_IMAGES=FOLDER        trains on real images
    SID2_RUN=runs/shapes      judges samples of a run, and every npz in its folder
    SID2_INCEPTION=FILE       tests the published weights of Inception
    SID2_LONG=1               kills 30 runs, reads 9,000 damaged files
"""

import builtins
import contextlib
import csv
import dis
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tokenize
import types
import zipfile
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, TiffImagePlugin
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fid
import sample
import sid2
import train

ROOT = Path(__file__).parent
SOURCE = (ROOT / "sid2.py").read_text()
PAPER = list(sid2.PUBLISHED)
LONG = "SID2_LONG" in os.environ
TINY = sid2.Config(8, 1, (8, 16), "RT", depth=(1, 1), middle=1, width=16, head_width=8,
                   dropout=0.0, num_classes=3, noise_high=32, bias=1.0, steps=4, batch=8, lr=1e-2,
                   warmup=2, sample_steps=3)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noised(x, eps, logsnr):
    """z and v, by their definitions."""
    alpha, sigma = (l.sigmoid().sqrt()[..., None, None, None] for l in (logsnr, -logsnr))
    return alpha * x + sigma * eps, alpha * eps - sigma * x


def shaken(config=TINY, seed=0, scale=0.3):
    """A network without zero layers: all parameters are random, so that every line matters."""
    torch.manual_seed(seed)
    net = sid2.ResidualUViT(config).eval()
    for p in net.parameters():
        p.data += scale * torch.randn_like(p)
    return net


# --------------------------------------------------------------------------------------------------
# 1. Configuration

TAG = r"\[(SiD2\*?|SD|VDM(?:\+\+)?|MCM|UL|DFoT|HD|GI|derived|ours)\]"


def test_every_constant_says_where_it_comes_from():
    """A number of more than structural meaning has a tag on its own line, and so has each default
    of the configuration. Presets have it on the row, the paper's rows in the comment above."""
    legend = set(re.findall(r"^    \[(\S+)\]", SOURCE, re.M))
    what_looks_like_a_tag = set(re.findall(r"(?<=\s)\[([A-Za-z][\w*+]*)\]", SOURCE))
    assert legend == what_looks_like_a_tag == set(re.findall(TAG, SOURCE))

    method, _ = SOURCE.split("# 7. `python")
    above, presets, below = re.split(r"^UVIT = |^(?=# 2\. )", method, flags=re.M)
    for token in tokenize.generate_tokens(io.StringIO(above + below).readline):
        if token.type == tokenize.NUMBER and float(token.string) not in (0, 0.5, 1, 2, 3):
            assert re.search(TAG + "|permute", token.line), token.line
    lines = re.findall(r"^    (\w+): (.*?)  # (\S.*)$", above.split("class Config")[1], re.M)
    assert [name for name, _, _ in lines] == [field.name for field in fields(sid2.Config)]
    assert all(" = " not in code or re.search(TAG, comment) for _, code, comment in lines)

    ours, papers = presets.split("    #    ", 1)
    assert ours.count("[ours]") == ours.count("Config(") == 3
    assert papers.count("Config(") == len(PAPER) + 1  # and Kinetics600
    comment = above.split("\n\n")[-1]
    tags = {"SiD2", "SiD2*", "MCM", "VDM++", "DFoT", "UL", "GI", "HD", "derived", "ours"}
    assert set(re.findall(TAG, comment)) == tags


def test_tags_do_not_promise_more_than_is_known():
    """A second-hand fact is never the paper's own; what nobody could read is ours."""
    lines = dict(re.findall(r"^    (\w+): \w+.*  # (.*)$", SOURCE, re.M))
    for tags, names in {
            "SiD2*": "middle width dropout noise_low sampler sample_steps",
            "MCM": "depth", "SD": "steps batch lr gamma", "HD": "flip",
            "SD HD": "warmup betas adam_eps clip ema label_dropout",
            "GI": "guidance interval", "ours HD": "head_width"}.items():
        for name in names.split():
            assert re.findall(TAG, lines[name]) == tags.split(), name


def gmac_of_blocks(config):
    gmac = 0
    for level, (C, kind) in enumerate(zip(config.channels, config.blocks)):
        N = config.frames * (config.image_size // config.patch_size >> level) ** 2
        number = config.middle if level == len(config.channels) - 1 else sum(config.depth)
        gmac += number * (18 * C * C * N if kind == "R" else 12 * C * C * N + 2 * N * N * C) / 1e9
    return gmac


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers_networks(name):
    """Blocks alone, by closed formulas, have the published GMAC."""
    gmac, parameters, _ = sid2.PUBLISHED[name]
    assert gmac_of_blocks(sid2.PRESETS[name]) == pytest.approx(gmac, rel=0.005)
    with torch.device("meta"):
        net = sid2.ResidualUViT(sid2.PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)


def test_paper_presets_hold_the_papers_hyperparameters():
    rows = [sid2.PRESETS[name] for name in PAPER]
    assert [c.bias for c in rows] == [2, 0, -1, -1, -3, -3]
    assert [c.patch_size for c in rows] == [1, 1, 2, 1, 4, 2]
    small, large = ((256, 512, 1024), "RTT"), ((128, 256, 512, 1024), "RRTT")
    assert [(c.channels, c.blocks) for c in rows] == [small, *5 * [large]]
    for c in rows:
        assert (c.noise_low, c.noise_high or c.image_size) == (32, c.image_size)
        assert (c.depth, c.middle, c.width) == ((3, 3), 16, 1024)
        assert (c.dropout, c.num_classes) == (0.1, 1000)
        assert (c.steps, c.batch, c.lr, c.warmup) == (500_000, 2048, 1e-4, 10_000)
        assert (c.betas, c.adam_eps, c.clip) == ((0.9, 0.99), 1e-12, 1.0)
        assert (c.ema, c.label_dropout, c.flip) == (0.9999, 0.1, True)
        assert (c.sampler, c.sample_steps, c.gamma) == ("ddpm", 512, 0.2)


@pytest.mark.parametrize("name", PAPER)
def test_the_guidance_interval_goes_with_the_size_as_the_noise_does(name):
    """The cited interval, 0.28 < sigma / alpha <= 2.90, belongs to 64 x 64 latents. An image of S
    pixels, pooled to 64, has 2 log(S / 64) more logsnr than before: so much lower lies its own."""
    config = sid2.PRESETS[name]
    for end, noise in zip(config.interval, (2.90, 0.28)):
        pooled = end + 2 * math.log(config.image_size / 64)
        assert pooled == pytest.approx(-2 * math.log(noise), abs=5e-3)


@pytest.mark.parametrize("change", [
    dict(image_size=9), dict(patch_size=0), dict(channels=(8, -16)), dict(channels=()),
    dict(blocks="R"), dict(blocks="RX"), dict(head_width=7), dict(width=15), dict(dropout=1.5),
    dict(num_classes=-1), dict(noise_low=0), dict(noise_high=-1), dict(bias=math.nan),
    dict(steps=0), dict(batch=0), dict(lr=math.nan), dict(sampler="euler"), dict(sample_steps=0),
    dict(gamma=-0.1), dict(guidance=math.inf), dict(interval=(1.0, -1.0))], ids=str)
def test_impossible_configurations_are_refused(change):
    train.check(TINY)
    (name,) = change
    with pytest.raises(train.InputError, match=name):
        train.check(replace(TINY, **change))


def test_the_table_of_presets_puts_what_is_counted_beside_what_is_published(capsys, monkeypatch):
    """Here of three, to save time. The blocks have 99 % of all operations."""
    shown = {name: sid2.PRESETS[name] for name in ("shapes", "imagenet64", "imagenet512_p2")}
    monkeypatch.setattr(sid2, "PRESETS", shown)
    sid2.main()
    heading, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(shown)
    for row, config in zip(rows[1:], list(shown.values())[1:]):
        assert 0.99 < gmac_of_blocks(config) / float(row.split()[3]) < 1
    assert re.match(r"shapes +1\.6 +- +0\.05 +- +- +0 +16- 16 ", rows[0])
    assert re.match(r"imagenet512_p2 +400\.1 +397 +656\.42 +653 +1\.48 - 1\.50 +-3 +32-512 ",
                    rows[2])
    assert rows[2].endswith("  R 256² x 128 (65536)  R 128² x 256 (16384)  T 64² x 512 (4096)  "
                            "T 32² x 1024 (1024)")


# --------------------------------------------------------------------------------------------------
# 2. Noise process

T = torch.linspace(0, 1, 201)
EXTREMES = torch.tensor([-20.0, -10, -1, 0, 3, 10, 17, 25])


def test_the_schedule_runs_from_plus_ten_to_minus_ten_plus_its_shifts():
    for size, low, high in [(64, 64, 64), (512, 32, 512), (16, 32, 32), (128, 32, 128)]:
        logsnr, _ = sid2.schedule(T, size, low, high)
        shift_low, shift_high = 2 * math.log(low / size), 2 * math.log(high / size)
        assert logsnr[0].item() == pytest.approx(10 + shift_high, abs=2e-5)
        assert logsnr[-1].item() == pytest.approx(-10 + shift_low, abs=1e-3)
        assert logsnr[100].item() == pytest.approx((shift_low + shift_high) / 2, abs=1e-5)
        assert (logsnr.diff() < 0).all()
    angle = 0.75 * math.atan(math.exp(-5)) + 0.25 * math.atan(math.exp(5))
    cosine = sid2.schedule(torch.tensor(0.25), 64, 64, 64)[0].item()
    assert cosine == pytest.approx(-2 * math.log(math.tan(angle)), rel=1e-6)


def test_the_schedule_goes_from_the_size_of_the_image_to_32_pixels():
    """That is what it does when told nothing else: no shift at the clean end."""
    for size in (16, 64, 512):
        assert sid2.schedule(T, size)[0][0].item() == pytest.approx(10, abs=1e-4)
        assert_close(sid2.schedule(T, size), sid2.schedule(T, size, 32, size), rtol=0, atol=0)
        assert_close(sid2.schedule(T, size, 64, 0), sid2.schedule(T, size, 64, size))


def test_the_slope_is_the_derivative():
    t = T[1:-1].clone().requires_grad_()
    for size, low, high in [(64, 64, 64), (512, 32, 512), (256, 16, 64)]:
        logsnr, slope = sid2.schedule(t, size, low, high)
        (derivative,) = torch.autograd.grad(logsnr.sum(), t)
        assert_close(slope, derivative, rtol=1e-4, atol=1e-4)
    assert sid2.schedule(T, 512, 32, 512)[1].isfinite().all()


def test_the_shift_is_average_pooling():
    """The argument that fixes sign and size of the shift: pooling 2x2 quarters the variance of the
    noise, which is + log 4 in logsnr."""
    (at_128, _), (at_64, _) = sid2.schedule(T, 128, 64, 64), sid2.schedule(T, 64, 64, 64)
    assert_close(at_128 + math.log(4), at_64, rtol=1e-5, atol=1e-5)
    alpha, sigma = sid2.alpha_sigma(at_128[100])
    noise = sigma * normal(64, 3, 128, 128)
    logsnr_pooled = 2 * math.log(alpha.item() / F.avg_pool2d(noise, 2).std().item())
    assert logsnr_pooled == pytest.approx(at_64[100].item(), abs=0.01)


def test_the_process_is_float32_under_autocast():
    """In bfloat16 logsnr is wrong by more than a nat."""
    with torch.autocast("cpu", torch.bfloat16):
        logsnr, slope = sid2.schedule(T.bfloat16(), 64, 32, 64)
        alpha, sigma = sid2.alpha_sigma(logsnr.bfloat16())
    assert {a.dtype for a in (logsnr, slope, alpha, sigma)} == {torch.float32}
    t, u_0, u_1 = torch.linspace(0, 1, 100_001), math.atan(math.exp(-5)), math.atan(math.exp(5))
    in_bfloat16 = -2 * torch.log(torch.tan(u_0 + t.bfloat16() * (u_1 - u_0)))
    exact, _ = sid2.schedule(t, 64, 64, 64)
    assert 1.2 < (in_bfloat16.float() - exact).abs().max() < 1.4


def test_alpha_and_sigma_are_exact_at_the_extremes():
    """alpha² + sigma² = 1 and log(alpha² / sigma²) = logsnr, though 1 - alpha² is 0 from 17 up."""
    alpha, sigma = (a.double().squeeze() for a in sid2.alpha_sigma(EXTREMES))
    assert_close(alpha**2 + sigma**2, torch.ones(8).double(), rtol=1e-6, atol=0)
    assert_close(2 * (alpha / sigma).log(), EXTREMES.double(), rtol=1e-6, atol=1e-6)
    assert (1 - sid2.alpha_sigma(EXTREMES[6:])[0].square() == 0).all()


# --------------------------------------------------------------------------------------------------
# 3. Loss


def test_the_loss_seen_from_x_eps_and_v_is_one_loss():
    """½ (-dlogsnr/dt) times sigmoid(b - l) |d eps|², or e^b sigmoid(l - b) |d x|², or
    e^b sigmoid(l - b) sigmoid(-l) |d v|². It is float32 and a mean over pixels."""
    def error(a, a_hat):
        return (a.float() - a_hat.float()).square().flatten(1).mean(1)

    b, (logsnr, slope) = -3.0, sid2.schedule(T[20:180:20], 512, 32, 512)
    z, v, v_hat = (normal(8, 3, 4, 4, seed=seed).bfloat16() for seed in range(3))
    alpha, sigma = sid2.alpha_sigma(logsnr)
    weight_x = math.exp(b) * torch.sigmoid(logsnr - b)
    loss = sid2.sigmoid_loss(v_hat, v, logsnr, slope, b)
    for weighted in (
            torch.sigmoid(b - logsnr) * error(sigma * z + alpha * v, sigma * z + alpha * v_hat),
            weight_x * error(alpha * z - sigma * v, alpha * z - sigma * v_hat),
            weight_x * torch.sigmoid(-logsnr) * error(v, v_hat)):
        assert_close(loss, -slope / 2 * weighted, rtol=2e-4, atol=0)


def test_the_expected_loss_depends_on_the_schedule_through_its_ends_only():
    """With an error of 1 in eps the loss integrates to ½ (softplus(b - l_1) - softplus(b - l_0)),
    for any path between the ends. Without -dlogsnr/dt the two paths below differ by far."""
    b, N = 2.0, 20_001
    t = torch.linspace(0, 1, N)
    exact = 0.5 * (math.log1p(math.exp(b + 10)) - math.log1p(math.exp(b - 10)))
    straight = 10 - 20 * t, torch.full((N,), -20.0)
    for logsnr, slope in (sid2.schedule(t, 64, 64, 64), straight):
        v_error = 1 / sid2.alpha_sigma(logsnr)[0]  # d eps = alpha d v = 1
        loss = sid2.sigmoid_loss(v_error, torch.zeros(N, 1, 1, 1), logsnr, slope, b)
        mean = torch.trapezoid(loss.double(), t.double())
        assert mean.item() == pytest.approx(exact, rel=1e-4)


def test_times_cover_the_interval_evenly():
    t = sid2.low_discrepancy_times(64, 0.7391)
    assert 0 <= t.min() <= t.max() < 1
    assert_close(t.sort().values.diff(), torch.full((63,), 1 / 64), rtol=1e-4, atol=1e-6)
    assert t[[0, 16]].tolist() == pytest.approx([0.7391, 0.9891])


@pytest.mark.parametrize("noise_low, noise_high", [(32, 0), (16, 64)])
def test_the_training_loss_is_its_pieces(noise_low, noise_high):
    """Any callable will do as the network. It sees z, logsnr and y, once."""
    config = replace(TINY, noise_low=noise_low, noise_high=noise_high, bias=-1.0)
    x, eps, t = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1), torch.tensor([0.0, 0.3, 0.9, 1.0])
    seen = []

    def net(z, logsnr, y):
        seen.append((z, logsnr, y))
        return torch.sin(z + y[:, None, None, None]) * logsnr[:, None, None, None]

    y = torch.arange(4)
    loss = sid2.training_loss(net, config, x, y, t, eps)
    logsnr, slope = sid2.schedule(t, 8, noise_low, noise_high or 8)
    z, v = noised(x, eps, logsnr)
    (given,) = seen
    assert all(torch.equal(mine, theirs) for mine, theirs in zip((z, logsnr, y), given))
    assert torch.equal(loss, sid2.sigmoid_loss(net(z, logsnr, y), v, logsnr, slope, -1.0))


@pytest.mark.parametrize("d", [0.0, 0.3])
def test_the_training_loss_of_a_known_error_is_known(d):
    """That of a network which is off by d in eps is ½ (-dlogsnr/dt) sigmoid(bias - logsnr) d²."""
    def net(z, logsnr, y):
        return noised(x, eps, logsnr)[1] + d / sid2.alpha_sigma(logsnr)[0]

    x, eps, t = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1), torch.tensor([0.1, 0.4, 0.6, 0.9])
    loss = sid2.training_loss(net, TINY, x, torch.zeros(4).long(), t, eps)
    logsnr, slope = sid2.schedule(t, 8, 32, 32)
    assert_close(loss, -slope / 2 / (1 + torch.exp(logsnr - 1.0)) * d**2, rtol=1e-3, atol=0)


# --------------------------------------------------------------------------------------------------
# 4. Network

THREE_LEVELS = replace(TINY, channels=(8, 16, 16), blocks="RTT")
INPUT = normal(2, 3, 8, 8), torch.tensor([0.0, 1.0]), torch.tensor([0, 1])


def layer_norm(h, gain):
    h = h - h.mean(-1, keepdim=True)
    return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def test_a_fresh_trunk_is_the_identity_bit_for_bit():
    """And the head answers zero: training starts from the mean of v, not from noise."""
    for config in (TINY, replace(TINY, blocks="TT"), replace(THREE_LEVELS, blocks="RRT")):
        net, h, c = sid2.ResidualUViT(config), normal(2, 8, 8, 8), normal(2, 16)
        assert torch.equal(net.trunk(h, c), h)
        assert torch.equal(net(*INPUT), torch.zeros(2, 3, 8, 8))
        assert not torch.equal(shaken(config).trunk(h, c), h)


def test_initial_weights_are_what_the_network_says():
    """Zero where a branch ends, else uniform with variance 1 / (3 inputs); gains are 1."""
    torch.manual_seed(0)
    config = replace(TINY, image_size=64, patch_size=4, channels=(64, 128), width=64)
    net = sid2.ResidualUViT(config)
    zero_layers, biases = set(), []
    for name, module in net.named_modules():
        if isinstance(module, sid2.Norm):
            assert torch.equal(module.gain, torch.ones_like(module.gain))
        elif isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            scale = math.sqrt(3 * module.weight[0].numel())
            if not module.weight.any() and not module.bias.any():
                zero_layers.add(name)
            else:
                assert (scale * module.weight).var().item() == pytest.approx(1, rel=0.1), name
                assert (scale * module.weight).abs().max().item() <= math.sqrt(3) + 1e-5, name
                biases += [] if module.bias is None else [scale * module.bias]
    assert zero_layers == {"blocks_down.0.0.conv2", "blocks_up.0.0.conv2",
                           "middle.0.mlp.dense2", "middle.0.attention.project", "head"}
    assert torch.cat(biases).var().item() == pytest.approx(1, rel=0.1)
    assert net.position.std().item() == pytest.approx(0.01, rel=0.05)
    assert net.condition.label.weight.shape == (3 + 1, 64)


def test_the_skip_carries_what_the_level_below_has_changed():
    """h = high + up(h - low), spelt out for two levels with blocks of their own."""
    net = shaken(replace(THREE_LEVELS, depth=(1, 2), middle=3))
    h, c = normal(2, 8, 8, 8), normal(2, 16)

    def through(blocks, number, h):
        assert len(blocks) == number
        for block in blocks:
            h = block(h, c)
        return h

    def down(project, h):
        pooled = (h[:, ::2, ::2] + h[:, ::2, 1::2] + h[:, 1::2, ::2] + h[:, 1::2, 1::2]) / 4
        return pooled @ project.weight.T + project.bias

    def up(project, h):
        assert project.bias is None
        return (h @ project.weight.T).repeat_interleave(2, 1).repeat_interleave(2, 2)

    high_0 = through(net.blocks_down[0], 1, h)
    low_0 = down(net.down[0].project, high_0) + net.position
    high_1 = through(net.blocks_down[1], 1, low_0)
    low_1 = down(net.down[1].project, high_1)
    middle = through(net.middle, 3, low_1)
    below = through(net.blocks_up[1], 2, high_1 + up(net.up[1].project, middle - low_1))
    expected = through(net.blocks_up[0], 2, high_0 + up(net.up[0].project, below - low_0))
    assert_close(net.trunk(h, c), expected, rtol=1e-4, atol=1e-4)


def test_a_residual_block_is_its_formula():
    block, h, c = shaken().blocks_down[0][0], normal(2, 5, 5, 8), normal(2, 16)
    scale, offset = block.film(c)[:, None, None].split(8, -1)

    def conv(h, layer):
        return F.conv2d(h.movedim(3, 1), layer.weight, layer.bias, padding=1).movedim(1, 3)

    branch = conv(F.silu(layer_norm(h, block.norm1.gain)), block.conv1)
    branch = F.silu(layer_norm(branch, block.norm2.gain) * (1 + scale) + offset)
    assert_close(block(h, c), h + conv(branch, block.conv2), rtol=1e-4, atol=1e-4)


def test_a_transformer_block_is_its_formula():
    """MLP before attention; q and k normalised per head; c in the hidden layer of the MLP only."""
    block, h, c = shaken().middle[0], normal(2, 3, 3, 16), normal(2, 16)
    mlp, attention = block.mlp, block.attention
    scale, offset = mlp.film(c)[:, None, None].split(64, -1)
    hidden = F.silu(mlp.dense1(layer_norm(h, mlp.norm.gain))) * (1 + scale) + offset
    h_mlp = h + mlp.dense2(hidden)
    qkv = attention.qkv(layer_norm(h_mlp, attention.norm.gain)).reshape(2, 9, 3, 2, 8)
    q = layer_norm(qkv[:, :, 0], attention.norm_q.gain)
    k = layer_norm(qkv[:, :, 1], attention.norm_k.gain)
    weights = torch.einsum("bihd,bjhd->bhij", q, k).div(math.sqrt(8)).softmax(-1)
    branch = torch.einsum("bhij,bjhd->bihd", weights, qkv[:, :, 2]).reshape(2, 3, 3, 16)
    assert_close(block(h, c), h_mlp + attention.project(branch), rtol=1e-4, atol=1e-4)


def test_a_norm_has_mean_0_and_mean_square_1_in_each_pixel():
    """Times its gain. It answers in the type that it was asked in, also under autocast."""
    norm, h = sid2.Norm(64), 3 + 5 * normal(2, 4, 4, 64)
    assert_close(norm(h).mean(-1), torch.zeros(2, 4, 4), rtol=0, atol=1e-6)
    assert_close(norm(h).square().mean(-1), torch.ones(2, 4, 4))
    assert_close(norm(1e-4 * h), layer_norm(1e-4 * h, 1))  # no division by 0
    norm.gain.data = normal(64, seed=1)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            exact, small = norm(h), norm(h.bfloat16())
        assert_close(exact, layer_norm(h, norm.gain))  # which compares the types too
        assert_close(small, layer_norm(h, norm.gain).bfloat16(), rtol=0.02, atol=0.02)


def test_a_norm_keeps_bfloat16_under_the_autocast_of_cuda():
    """That alone would answer in float32 and promote the whole residual stream. Fake tensors are
    dispatched like real ones, so it shows without a GPU."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        norm, h = sid2.Norm(128), torch.empty(2, 4, 4, 128, dtype=torch.bfloat16)
        try:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            assert F.layer_norm(h, (128,)).dtype == torch.float32  # the trap
            assert norm(h).dtype == torch.bfloat16
        finally:
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", dtype)


def test_features_are_copied_only_where_they_are_doubled():
    """Channels last, convolutions, tokens and heads are views of each other. Attention is one fused
    operation."""
    inside_up, names = [], {True: set(), False: set()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            names[bool(inside_up)].add(operation.overloadpacket.__name__)
            return operation(*args, **(kwargs or {}))

    net = shaken(THREE_LEVELS)
    for up in net.up:
        up.register_forward_pre_hook(lambda *_: inside_up.append(True))
        up.register_forward_hook(lambda *_: inside_up.clear())
    with Watch():
        net.trunk(normal(2, 8, 8, 8), normal(2, 16))
    assert "clone" in names[True]
    assert names[False].isdisjoint({"clone", "copy_", "_to_copy", "_softmax", "bmm"})


def test_the_condition_tells_noise_levels_and_classes_apart():
    """Neighbours among 512 steps, at least 0.012 nats apart, and the null class have vectors of
    their own."""
    logsnr, _ = sid2.schedule(torch.linspace(0, 1, 513), 64, 64, 64)
    assert logsnr.diff().abs().min().item() == pytest.approx(0.012, abs=5e-4)
    condition = sid2.Condition(64, 3)
    c = condition(torch.tensor([0.0, 0.012, 0.0, 0.0]), torch.tensor([0, 0, 1, 3]))
    assert all((c[0] - other).abs().max() > 1e-3 for other in c[1:])
    for logsnr, place in ((-20.0, 0.0), (0.0, 0.5), (10.0, 0.75)):  # of [-20, 20]
        phase = place * 10 ** torch.linspace(3, -1, 32)
        dense = condition.dense1(torch.cat([phase.sin(), phase.cos()]))
        (c,) = condition(torch.tensor([logsnr]), torch.tensor([2]))
        assert_close(c, F.silu(condition.dense2(F.silu(dense)) + condition.label.weight[2]))


def test_no_parameter_is_dead():
    """Zero layers wake one after the other: after three steps every parameter has a gradient and
    has moved."""
    for config in (TINY, replace(TINY, num_classes=0, blocks="TT", patch_size=2),
                   replace(TINY, frames=4, given=2)):
        torch.manual_seed(0)
        net = sid2.ResidualUViT(config)
        before = [p.clone() for p in net.parameters()]
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        y, target = torch.arange(8) % (config.num_classes + 1), normal(8, 3, 8, 8, seed=9)
        given = normal(2, 6, 8, 8) if config.given else None
        for step in range(4):
            optimizer.zero_grad()
            v_hat = net(normal(8, 3, 8, 8, seed=step), normal(8), y, given)
            (v_hat - target).square().mean().backward()
            optimizer.step()
        for (name, p), old in zip(net.named_parameters(), before):
            assert p.grad.any() and not torch.equal(p, old), name


def test_no_example_sees_its_batch_neighbours():
    net, z, logsnr, y = shaken(), normal(4, 3, 8, 8), normal(4), torch.tensor([0, 1, 2, 3])
    together, first = net(z, logsnr, y), torch.tensor([1, 0, 0, 0])
    for i in range(4):
        (alone,) = net(z[i : i + 1], logsnr[i : i + 1], y[i : i + 1])
        assert_close(together[i], alone, rtol=1e-4, atol=1e-4)
    for other in (net(z, logsnr + first, y), net(z, logsnr, y + first)):
        assert not torch.allclose(together[0], other[0], atol=1e-3)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_any_patch_size_keeps_pixels_in_place(patch):
    """With patch layers that are the identity, a fresh network is silu(norm) of each patch."""
    net = sid2.ResidualUViT(replace(TINY, image_size=16, patch_size=patch,
                                    channels=(3 * patch**2, 8)))
    torch.nn.init.eye_(net.embed.weight)
    torch.nn.init.zeros_(net.embed.bias)
    torch.nn.init.eye_(net.head.weight)
    z = normal(2, 3, 16, 16)
    patches = F.unfold(z, patch, stride=patch).transpose(1, 2)  # (B, N, 3 p²)
    expected = F.fold(F.silu(layer_norm(patches, 1)).transpose(1, 2), 16, patch, stride=patch)
    assert_close(net(z, *INPUT[1:]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks, patch, shape", [
    ("RT", 1, (4, 4, 16)), ("TT", 1, (8, 8, 8)), ("TT", 2, (4, 4, 8)), ("RRT", 1, (2, 2, 24)),
    ("RR", 1, None)])
def test_the_position_embedding_stands_where_transformers_begin(blocks, patch, shape):
    """It may be nowhere, or at the top; what it does below is in the test of the skip."""
    net = shaken(replace(TINY, blocks=blocks, channels=(8, 16, 24)[:len(blocks)], patch_size=patch))
    assert getattr(getattr(net, "position", None), "shape", None) == shape
    if blocks == "TT":
        before, h, c = net(*INPUT), normal(2, *shape), normal(2, 16)
        trunk = net.trunk(h, c)
        net.position.data += 1
        assert not torch.allclose(net(*INPUT), before, atol=1e-3)
        assert torch.equal(net.trunk(h, c), trunk)


def test_dropout_acts_in_transformer_blocks_and_in_training_only():
    net = shaken(replace(THREE_LEVELS, dropout=0.5))
    holders = {type(module).__name__ for module in net.modules()
               if any(isinstance(child, torch.nn.Dropout) for child in module.children())}
    assert holders == {"MLP"}
    assert torch.equal(net(*INPUT), net(*INPUT))
    net.train()
    assert not torch.equal(net(*INPUT), net(*INPUT))


def kept_by_autograd(net, config, batch):
    """Bytes of each storage that autograd keeps for the backward pass, in bfloat16."""
    storages = {}  # held, so that their addresses stay different

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16)):
        given = torch.zeros(batch // config.frames, 3 * config.given, *[config.image_size] * 2)
        net(torch.zeros(batch, 3, config.image_size, config.image_size), torch.zeros(batch),
            torch.zeros(batch, dtype=torch.long), given)
    return [storage.nbytes() for storage in storages.values()]


def kept_of_an_image(config):
    """Bytes, with checkpointing of no level, level 0, all levels; clips: of a clip. Nothing is
    computed. Of a batch of 17 only activations have sizes that 17 divides; the rest are weights."""
    row = []
    with FakeTensorMode():
        net = sid2.ResidualUViT(config)
        for levels in ([], [0], range(len(config.channels))):
            net.checkpointing = levels
            sizes = kept_by_autograd(net, config, 17 * config.frames)
            row.append(sum(size for size in sizes if size % 17 == 0) / 17)
    return row


def test_the_memory_of_an_image_is_known_before_anything_runs():
    """`pytest -s` shows it: what autograd keeps in eager mode on a CPU. Batches multiply it."""
    config = replace(THREE_LEVELS, depth=(2, 2), middle=3, dropout=0.1)
    net, real = sid2.ResidualUViT(config), []
    for levels in ([], [0], [0, 1, 2]):
        net.checkpointing = levels
        more, less = (sum(kept_by_autograd(net, config, batch)) for batch in (6, 2))
        real.append((more - less) / 4)
    assert real == kept_of_an_image(config)

    print("\nMB kept of an image, bf16       checkpointing: no level     level 0  all levels")
    for name in ("shapes", "moving", "cifar10", "imagenet64", "imagenet256_p2", "imagenet256_p1",
                 "kinetics600_p2"):
        row = kept_of_an_image(sid2.PRESETS[name])
        print(f"{name:43}" + "".join(f"{size / 1e6:12.2f}" for size in row))
        assert row[2] < row[1] < row[0]


def test_checkpointing_computes_blocks_again_and_changes_nothing_else():
    """Those of the levels named, and in training only."""
    gradients = []
    for levels in ([], [0], [1], [0, 1]):
        net, calls = shaken(replace(TINY, dropout=0.5)), []
        net.checkpointing = levels
        for level, blocks in enumerate([[*net.blocks_down[0], *net.blocks_up[0]], net.middle]):
            for block in blocks:
                block.register_forward_pre_hook(lambda *_, level=level: calls.append(level))
        net(*INPUT).sum().backward()
        assert sorted(calls) == [0, 0, 1]
        calls.clear()
        net.zero_grad()
        net.train()
        torch.manual_seed(0)
        net(*INPUT).square().sum().backward()
        assert sorted(calls) == sorted([0, 0, 1] + [0, 0] * (0 in levels) + [1] * (1 in levels))
        gradients.append([p.grad for p in net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[-1]))


def test_bfloat16_autocast_keeps_activations_small_and_the_answer_close():
    """A norm that returned float32 would promote the whole residual stream."""
    net, seen = shaken(scale=0.1), []
    for module in net.modules():
        if type(module) in (sid2.Norm, sid2.ResBlock, sid2.TransformerBlock, sid2.Down, sid2.Up):
            module.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    exact = net(*INPUT)
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        close = net(*INPUT)
    assert set(seen) == {torch.bfloat16}
    assert close.dtype == torch.float32
    assert (close - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("frames", [1, 2])
def test_training_compiles_to_one_graph_and_guided_sampling_to_two(frames):
    """Whatever noise and labels: two shapes in the sampler, with the null class and without. The
    weights keep their names, and the network its answers. Clips: of two frames, after a given."""
    graphs, y, seeds = [], torch.tensor([0, 1]), [1, 2][: 2 // frames]
    config = replace(THREE_LEVELS, sample_steps=4, interval=(-4.0, 4.0), frames=frames,
                     given=frames - 1)
    net = shaken(config, scale=0.1)
    given = normal(1, 3, 8, 8) if config.given else None
    conditioned = functools.partial(net, given=given)
    names, eager = list(net.state_dict()), sid2.sample(conditioned, config, seeds, y)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net.compile(fullgraph=True, dynamic=False, backend=backend)
    net.train()
    for n in range(3):
        x, eps, t = normal(2, 3, 8, 8, seed=n), normal(2, 3, 8, 8, seed=n + 1), torch.rand(2)
        sid2.training_loss(conditioned, config, x, y.roll(n), t, eps).mean().backward()
    assert len(graphs) == 1
    net.eval()
    for guidance in (3.0, 2.0):
        x = sid2.sample(conditioned, replace(config, guidance=guidance), seeds, y)
    assert len(graphs) == 3
    assert_close(x, eager, rtol=1e-3, atol=1e-3)
    assert list(net.state_dict()) == names


# --------------------------------------------------------------------------------------------------
# 5. Sampler


def exact_net(mean, variance):
    """The best possible v_hat when every pixel of the data is N(mean[y], variance)."""
    def net(z, logsnr, y):
        alpha, sigma = sid2.alpha_sigma(logsnr)
        m = torch.tensor(mean)[y][:, None, None, None]
        x_hat = m + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * m)
        return (alpha * z - x_hat) / sigma
    return net


def x_from_v(z, v, logsnr):
    return logsnr.sigmoid().sqrt() * z - (-logsnr).sigmoid().sqrt() * v


def logsnr_grid(S):
    return sid2.schedule(torch.arange(S, 0, -1) / S, 32, 32, 32)[0]


def steps_of(net, seeds, labels, S, null=9, size=4, **changes):
    """Every step, on the grid above: unshifted, and not guided if nothing else is said."""
    config = sid2.Config(size, 1, (8,), "R", num_classes=null, noise_low=size, sample_steps=S)
    config = replace(config, **dict(guidance=1.0, interval=(-math.inf, math.inf)) | changes)
    return list(sid2.sample_steps(net, config, seeds, torch.tensor(labels)))


def draw(*args, **kwargs):
    return steps_of(*args, **kwargs)[-1][1]


def test_a_ddpm_step_is_the_gaussian_posterior():
    """gamma = 0 is q(z_s | z_t, x), found here by conditioning two Gaussians; gamma = 1 has the
    variance of q(z_t | z_s); between them the variance is geometric."""
    l_t, l_s, z, x = -1.3, 0.4, normal(1, 3, 2, 2), normal(1, 3, 2, 2, seed=1)
    alpha_t, sigma_t, alpha_s, sigma_s = (1 / math.sqrt(1 + math.exp(-l))
                                          for l in (l_t, -l_t, l_s, -l_s))
    a = alpha_t / alpha_s
    v = sigma_t**2 - a**2 * sigma_s**2  # z_t = a z_s + sqrt(v) eps
    gain = a * sigma_s**2 / sigma_t**2
    mean = alpha_s * x + gain * (z - alpha_t * x)
    variance = sigma_s**2 - gain * a * sigma_s**2
    for gamma, noise in itertools.product((0.0, 0.2, 1.0), (0.0, 1.0)):
        step = sid2.ddpm_step(z, x, torch.tensor(l_t), torch.tensor(l_s), gamma, noise)
        spread = math.sqrt(variance ** (1 - gamma) * v**gamma)
        assert_close(step, mean + spread * noise, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("S", [2, 3, 10])
@pytest.mark.parametrize("point, variance, gamma", [(0.0, 1.0, 1.0), (0.5, 0.0, 0.0)])
def test_ddpm_keeps_the_marginals_of_gaussian_data(S, point, variance, gamma):
    """Exactly, in steps of any size: with gamma = 1 for standard normal data, with gamma = 0 for a
    single point. The step is affine in z and noise, so three values tell all."""
    def marginal(logsnr):
        return (logsnr.sigmoid().sqrt().item() * point,
                logsnr.sigmoid().item() * variance + (-logsnr).sigmoid().item())

    grid, net, y = logsnr_grid(S), exact_net([point], variance), torch.zeros(3).long()
    z, noise = torch.tensor([[0.0, 1, 0], [0, 0, 1]]).reshape(2, 3, 1, 1, 1)
    mean, var = marginal(grid[0])
    for l_t, l_s in zip(grid, grid[1:]):
        x_hat = x_from_v(z, net(z, l_t.expand(3), y), l_t)
        none, by_z, by_noise = sid2.ddpm_step(z, x_hat, l_t, l_s, gamma, noise).flatten().tolist()
        mean = none + (by_z - none) * mean
        var = (by_z - none) ** 2 * var + (by_noise - none) ** 2
        assert (mean, var) == pytest.approx(marginal(l_s), rel=1e-3, abs=1e-4)


def test_small_steps_keep_their_noise():
    """1 - r at a step of 1e-4 nats is right to six digits, where 1 - exp(...) keeps four."""
    l_t, l_s, zero = torch.tensor(0.0), torch.tensor(1e-4), torch.zeros(1, 1, 1, 1)
    variance = sid2.ddpm_step(zero, zero, l_t, l_s, 0.0, zero + 1).item() ** 2
    exact = -math.expm1(-l_s.item()) / (1 + math.exp(l_s.item()))
    assert variance == pytest.approx(exact, rel=2e-6)


def test_ddim_is_of_first_order():
    """Against the exact solution for Gaussian data, z_s = z_t std_s / std_t: four times the steps,
    a quarter of the error."""
    def std(logsnr):
        return (torch.sigmoid(logsnr) * 0.04 + torch.sigmoid(-logsnr)).sqrt()

    errors = []
    for S in (32, 128, 512):
        steps, grid = steps_of(exact_net([0.0], 0.04), [0], [0], S, sampler="ddim"), logsnr_grid(S)
        quarter = 3 * S // 4  # t = 1/4
        exact = steps[0][0] * std(grid[quarter]) / std(grid[0])
        errors.append((steps[quarter][0] - exact).abs().max().item())
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5


@pytest.mark.parametrize("how, tolerance", [
    (dict(sampler="ddim"), 0.01), (dict(gamma=0.0), 0.02), (dict(gamma=1.0), 0.02)])
def test_both_samplers_draw_gaussian_data_from_the_exact_network(how, tolerance):
    """Mean and spread of the data come back, through the whole loop."""
    x = draw(exact_net([0.3, -0.4], 0.01), range(64), [0, 1] * 32, 128, size=8, **how)
    assert x[::2].mean().item() == pytest.approx(0.3, abs=0.005)
    assert x[1::2].mean().item() == pytest.approx(-0.4, abs=0.005)
    assert x[::2].std().item() == pytest.approx(0.1, abs=tolerance)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("S", [1, 2, 7])
def test_any_number_of_steps_finds_a_single_point(S, sampler):
    x = draw(exact_net([0.25], 0.0), [5], [0], S, sampler=sampler)
    assert_close(x, torch.full((1, 3, 4, 4), 0.25), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", [-3.0, 3.0])
def test_x_hat_is_clipped_before_the_next_step_uses_it(mean):
    net, l = exact_net([mean], 1.0), logsnr_grid(5)
    steps = steps_of(net, [7], [0], 5, sampler="ddim")
    for i, (z, x_hat) in enumerate(steps):
        unclipped = x_from_v(z, net(z, l[i], torch.tensor([0])), l[i])
        assert_close(x_hat, unclipped.clamp(-1, 1))
        if i < 4:
            assert_close(steps[i + 1][0], sid2.ddim_step(z, x_hat, l[i], l[i + 1]))
    assert len(steps) == 5
    assert unclipped.abs().max() > 1


def test_guidance_extrapolates_from_the_null_class():
    """x_null + w (x_y - x_null): with one point per class, the sample at scale w is that
    combination of points."""
    for w in (0.0, 0.5, 2.0, 3.0):
        x = draw(exact_net([0.1, 0.2, -0.1], 0.0), [0, 1], [0, 1], 4, null=2, guidance=w)
        expected = [-0.1 + w * 0.2, -0.1 + w * 0.3]
        assert x.mean((1, 2, 3)).tolist() == pytest.approx(expected, abs=1e-4)


def test_guidance_costs_a_second_pass_inside_its_interval_only():
    """Exactly S (1 + f) passes for a fraction f of guided steps. The lower end belongs to the
    interval, the upper does not."""
    S, grid, passes = 10, logsnr_grid(10), []

    def net(z, logsnr, y):
        assert len(z) == len(logsnr) == len(y)
        passes.append((logsnr[0].item(), y.tolist()))
        return torch.zeros_like(z)

    def cost(**kwargs):
        passes.clear()
        draw(net, [0, 1], [4, 5], S, **kwargs)
        assert [logsnr for logsnr, _ in passes] == pytest.approx(grid.tolist())
        return sum(len(y) for _, y in passes) / 2

    assert cost() == cost(guidance=1.0) == cost(guidance=3.0, interval=(50, 60)) == S
    assert cost(guidance=3.0) == cost(guidance=0.0) == 2 * S
    assert cost(guidance=3.0, interval=(grid[3].item(), grid[7].item())) == S + 4
    assert [y for _, y in passes] == [[4, 5, 9, 9] if 3 <= i < 7 else [4, 5] for i in range(S)]


def test_image_i_depends_on_seed_i_alone():
    """For any batch and any company. Each step draws once from the generator of its seed."""
    net, grid = exact_net([0.0, 0.3, -0.2], 0.05), logsnr_grid(5)
    seeds, labels = [3, 1, 4, 1], [0, 1, 2, 1]
    together = steps_of(net, seeds, labels, 5)
    for i in (0, 2):
        for pair, alone in zip(together, steps_of(net, seeds[i : i + 1], labels[i : i + 1], 5)):
            assert_close([a[i] for a in pair], [a[0] for a in alone])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for i, (z, x_hat) in enumerate(together):
        noise = torch.stack([torch.randn(3, 4, 4, generator=g) for g in generators])
        if i == 0:
            assert torch.equal(z, noise)
        else:  # gamma is 0.2 if nothing else is said
            assert_close(z, sid2.ddpm_step(*together[i - 1], grid[i - 1], grid[i], 0.2, noise))
    assert torch.equal(x_hat[1], x_hat[3])


@pytest.mark.parametrize("change", [
    dict(), dict(sampler="ddim", guidance=3.0, interval=(-1.0, 4.0)), dict(num_classes=0),
    dict(gamma=0.9, noise_low=16, noise_high=0, guidance=0.0), dict(guidance=1.0)], ids=str)
def test_a_sample_is_the_last_x_hat_of_the_configured_steps(change):
    """The grid is t = 1, 1 - 1/S, ..., 1/S. A network without classes is not guided."""
    config = replace(TINY, sample_steps=5, **change)
    net, y, passes = shaken(config, scale=0.1), torch.tensor([0, 0]), []

    def counted(z, logsnr, y):
        passes.append(y.tolist())
        return net(z, logsnr, y)

    x = sid2.sample(counted, config, [3, 4], y)
    logsnr, _ = sid2.schedule(torch.tensor([1, 0.8, 0.6, 0.4, 0.2]), 8, config.noise_low,
                              config.noise_high)
    assert_close(sid2.sampling_grid(config)[0], logsnr)
    scale, (low, high) = config.guidance if config.num_classes else 1.0, config.interval
    *_, (_, x_hat) = sid2.sample_steps(net, config, [3, 4], y)
    assert_close(x, x_hat)
    assert passes == [[0, 0, 3, 3] if scale != 1 and low <= value < high else [0, 0]
                      for value in logsnr]
    assert not x.requires_grad


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="ddpm or ddim.*euler"):
        sid2.sample(shaken(), replace(TINY, sampler="euler"), [0], torch.tensor([0]))


# --------------------------------------------------------------------------------------------------
# 6. Averaging


def test_the_average_starts_fast_and_ends_at_its_decay():
    """The decay is min(d, (1 + n) / (10 + n)): 0.1, 2/11, ... then d."""
    net, average, value = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), 0.0
    net.load_state_dict(dict(weight=torch.tensor([[1.0]]), bias=torch.tensor([-2.0])))
    average.load_state_dict(dict(weight=torch.tensor([[0.0]]), bias=torch.tensor([0.0])))
    for n in range(100):
        sid2.ema_update(average, net, n, 0.9)
        decay = min(0.9, (1 + n) / (10 + n))
        value = decay * value + (1 - decay)
        assert average.weight.item() == pytest.approx(value, rel=1e-5)
        assert average.bias.item() == pytest.approx(-2 * value, rel=1e-5)
    assert (net.weight.item(), net.bias.item()) == (1, -2)


# --------------------------------------------------------------------------------------------------
# 7. Clips: `frames` neighbours in the batch, which go on from `given` frames

CLIPS = replace(TINY, frames=3, given=2)


def test_kinetics600_generates_11_frames_from_5():
    """Both totals were counted before the preset existed; blocks alone by formulas."""
    config = sid2.PRESETS["kinetics600_p2"]
    assert (config.frames, config.given, config.image_size, config.num_classes) == (11, 5, 128, 0)
    parameters, gmac = sid2.count(config)
    assert gmac_of_blocks(config) == pytest.approx(419.3, rel=0.001)
    assert gmac == pytest.approx(423.8, rel=0.001)
    assert parameters / 1e6 == pytest.approx(397.2, abs=0.1)


def test_a_frame_sees_all_frames_of_its_clip_and_none_of_another():
    """Those that are given too."""
    net, y = shaken(replace(CLIPS, frames=4)), torch.zeros(8, dtype=torch.long)
    z, given = normal(8, 3, 8, 8), normal(2, 6, 8, 8, seed=1)
    inputs = z.requires_grad_(), given.requires_grad_()
    for i in range(8):
        answer = net(z, torch.zeros(8), y, given)[i]
        of_z, of_given = torch.autograd.grad(answer.square().sum(), inputs)
        seen = of_z.abs().amax((1, 2, 3)) > 0
        assert seen.tolist() == [j // 4 == i // 4 for j in range(8)]
        seen = of_given.unflatten(1, (2, 3)).abs().amax((2, 3, 4)) > 0
        assert seen.tolist() == [[j == i // 4] * 2 for j in range(2)]


def test_a_vector_tells_the_frames_of_a_clip_apart_and_clips_not():
    net, y, zero = shaken(CLIPS), torch.zeros(6).long(), torch.zeros(6)
    z, given = normal(1, 3, 8, 8).repeat(6, 1, 1, 1), normal(1, 6, 8, 8).repeat(2, 1, 1, 1)
    out = net(z, zero, y, given)
    assert_close(out[:3], out[3:])
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    assert sid2.ResidualUViT(CLIPS).condition.frame.std() > 0.5  # from the first step on
    net.condition.frame.data[:] = 0
    out = net(z, zero, y, given)
    assert_close(out, out[:1].expand_as(out))


def test_given_frames_are_channels_beside_each_frame_with_guidance_too():
    """At a guided step both copies of a clip go on from its own given frames."""
    net, y, given = shaken(CLIPS), torch.tensor([0, 0, 0, 1, 1, 1]), normal(2, 6, 8, 8)
    z = normal(12, 3, 8, 8, seed=1)
    labels, logsnr = torch.cat([y, torch.full_like(y, 3)]), torch.zeros(12)
    both = net(z, logsnr, labels, given)
    for part in slice(0, 6), slice(6, 12):
        assert_close(both[part], net(z[part], logsnr[part], labels[part], given))


def test_a_clip_depends_on_its_seed_alone():
    y, given = torch.zeros(3).long(), normal(2, 6, 8, 8)
    net = functools.partial(shaken(CLIPS, scale=0.1), given=given)
    together = sid2.sample(net, CLIPS, [5, 6], y.repeat(2))
    assert_close(together[3:], sid2.sample(functools.partial(net, given=given[1:]), CLIPS, [6], y))
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    z, _ = next(sid2.sample_steps(net, CLIPS, [5, 6], y.repeat(2)))
    assert torch.equal(z[3:], noise)


def test_clips_follow_the_exact_distribution_given_their_first_frames():
    """Each pixel over four frames is normal with a known covariance, so the best network is a
    matrix, and the mean and covariance of frames 3 and 4, given 1 and 2, are known. All the way
    through eight bits. The covariance is the sampler's only as far as 512 steps go: it is 2 % off
    here, and further off for less independent noise."""
    place = torch.arange(4.0, dtype=torch.float64)
    K = 0.06 * 0.97 ** (place[:, None] - place).abs() + 0.02 * torch.eye(4)
    slope = K[2:, :2] @ K[:2, :2].inverse()
    covariance = K[2:, 2:] - slope @ K[:2, 2:]
    clips, size = 8, 48
    white = normal(4, clips, 3, size, size, seed=1).double()
    whole = torch.einsum("ij,jckhw->cikhw", torch.linalg.cholesky(K), white)
    whole = train.to_uint8(whole.flatten(0, 1)).reshape(clips, 4, size, size, 3)

    def exact(z, logsnr, y, given):
        """From the best guess of both frames: their mean given the first two, drawn to z."""
        signal, noise = logsnr[0].double().sigmoid(), (-logsnr[0]).double().sigmoid()
        gain = signal.sqrt() * covariance @ (signal * covariance + noise * torch.eye(2)).inverse()
        mean = torch.einsum("ij,cjkhw->cikhw", slope, given.unflatten(1, (2, 3)).double())
        surprise = z.unflatten(0, (clips, 2)) - signal.sqrt() * mean
        x_hat = (mean + torch.einsum("ij,cjkhw->cikhw", gain, surprise)).flatten(0, 1).float()
        alpha, sigma = sid2.alpha_sigma(logsnr)
        return (alpha * z - x_hat) / sigma

    config = replace(TINY, frames=2, given=2, image_size=size, num_classes=0, noise_low=size,
                     sample_steps=512, gamma=0.6)
    data = train.Data("normal", np.zeros(clips), [], lambda i, window: whole[i])
    ((_, images),) = train.sample_images(exact, config, [*range(clips)], [0] * clips, CPU, clips, data)
    assert np.array_equal(images[:, :2], whole[:, :2])
    values = train.from_uint8(torch.from_numpy(images)).double().transpose(0, 1).flatten(1)
    first, drawn = values[:2], values[2:]
    got = drawn @ first.T @ (first @ first.T).inverse()  # regression on the given frames
    assert_close(got, slope, rtol=0.03, atol=0)
    assert_close(torch.cov(drawn - got @ first), covariance, rtol=0.03, atol=0)


# --------------------------------------------------------------------------------------------------
# 8. The file, read as a text


def names_used(code):
    """All global names in a piece of code and in the functions and classes inside it."""
    used = {instruction.argval for instruction in dis.get_instructions(code)
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inside = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return used.union(*map(names_used, inside))


USES = [  # of sections 1 to 7
    "config = Config(8, 1, (8, 16), 'RT', (1, 1), 1, width=16, head_width=8, sample_steps=2)",
    "logsnr, slope = schedule(t, 8)",
    "training_loss(lambda z, logsnr, y: z, config, x, y, t, x)",
    "net = ResidualUViT(config)\ntraining_loss(net, config, x, y, t, x).mean().backward()",
    "sample(net, config, [0, 1], y)",
    "ema_update(net, net, 0, 0.9)",
    "count(config)"]


@pytest.mark.parametrize("last", range(1, 8))
def test_each_section_needs_only_the_sections_above_it(last):
    """The imports and sections 1 to n, pasted elsewhere, do all that section n offers."""
    head, *sections = re.split(r"^# -{98}\n(?=# \d\. )", SOURCE, flags=re.M)
    assert [section[:5] for section in sections] == [f"# {i}. " for i in range(1, 8)]
    code, namespace = compile(head + "".join(sections[:last]), "", "exec"), {"__name__": "pasted"}
    exec(code, namespace)
    assert names_used(code) <= {*namespace, *dir(builtins), "__annotations__"}
    namespace |= dict(zip("xty", INPUT))
    for use in USES[:last]:
        exec(use, namespace)


def test_the_module_stays_short():
    lines = SOURCE.splitlines()
    assert len(lines) <= 600
    assert max(map(len, lines)) <= 100


# --------------------------------------------------------------------------------------------------
# HERE THE METHOD ENDS. Below: the scripts, run as a user runs them. First the tools


SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


@pytest.fixture(scope="module", autouse=True)
def no_signal_is_ignored():
    """As some are where the tests run in the background, or under nohup."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


def flags_of(config):
    """The command line that makes `config`."""
    flags = []
    for key, value in asdict(config).items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags += [f"--{flag}" if value else f"--no-{flag}"]
        elif key != "num_classes":
            flags += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return ["--device", "cpu", "--precision", "fp32", *flags]


def run(script, *flags):
    """Calls a script in this process as a shell would: exit code, stdout, stderr."""
    def leave(code):
        raise SystemExit(code)

    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    sys.argv = [script.__file__, *map(str, flags)]
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
              mock.patch.object(os, "_exit", leave)):
            train.guarded(script.main)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def fit(out, *flags, config=TINY, **changes):
    """A run of train.py that ends well: its checkpoint, or None, and what it printed."""
    code, printed, err = run(train, "--out", out, *flags_of(replace(config, **changes)), *flags)
    assert code == 0, err
    file = Path(out) / "checkpoint.pt"
    return torch.load(file, weights_only=True) if file.exists() else None, printed


def make_samples(out, *flags):
    """What sample.py printed, which ended well."""
    code, printed, err = run(sample, out, "--device", "cpu", "--precision", "fp32", *flags)
    assert code == 0, err
    return printed


def launch(*command, processes=1):
    """Real processes of Python; several find each other by the variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONPATH=str(ROOT))
    started = []
    for rank in range(processes):
        if processes > 1:
            env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        started.append(subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return started


def results(started):
    """Exit code, stdout and stderr of each process; none hangs."""
    try:
        streams = [process.communicate(timeout=90) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *both) for process, both in zip(started, streams)]


def torchrun(script, *flags):
    """Two processes of a script, which must end well."""
    result, = results(launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             "--", script, *flags))
    assert result[0] == 0, result[2][-5000:]


def error_line(code, _, err):
    """The one line of error, which stands alone at the end, whatever bar was open before it."""
    *before, last = err.removesuffix("\n").split("\n")
    assert code == 2 and last.startswith("error: "), err
    assert "error: " not in "".join(before) and "Traceback" not in err, err
    return last


def assert_same(a, b):
    """Weights, average, optimiser and counters of two checkpoints are equal in each bit."""
    keys = "step skipped net ema optimizer".split()
    assert_close([a[key] for key in keys], [b[key] for key in keys], rtol=0, atol=0)
    assert a["classes"] == b["classes"]


def log_of(out, columns=slice(1, 6)):
    """The rows of log.csv by step, of which none comes twice: images, loss, gradient norm, learning
    rate, skipped steps."""
    with open(out / "log.csv") as file:
        rows = list(csv.reader(file))[1:]
    assert len({row[0] for row in rows}) == len(rows)
    return {int(row[0]): row[columns] for row in rows}


def contents(*tops):
    """Every file below these folders."""
    return {path: path.read_bytes() for top in tops for path in top.rglob("*") if path.is_file()}


def put(root, *names, image=Image.new("RGB", (8, 8), "teal")):
    """Saves the image under each of the names, in folders made as needed."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    return root


def look_at(data, numbers):
    """Images (N, H, W, 3) of a data set, and their labels."""
    frames, labels = train.read_clips(data, numbers, [0.0] * len(numbers))
    return frames[:, 0], labels


def halve(path):
    """A file that was cut off."""
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    return path


def npz(path, save=np.savez, **arrays):
    """Images of zeros, or other arrays, in a file."""
    save(path, **({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)} | arrays))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of images in every mode and many formats, nested, in odd sizes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (23, 31, 3), dtype=np.uint8))
    for name, mode in {"a/one.png": "RGB", "a/deep/grey.JPEG": "L", "a/deep/palette.gif": "P",
                       "b/alpha.PNG": "RGBA", "b/cmyk.jpg": "CMYK", "b/16 bits.tif": "I;16",
                       "c/one.bmp": "RGB", "c/grey alpha.webp": "LA",
                       "c/bilevel.tiff": "1"}.items():
        put(root, name, image=noise.convert(mode))
    for name in ("notes.txt", "unread.heic"):
        (root / "c" / name).write_text("not an image")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    """The folder of a tiny run on those images; what it printed lies beside it."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    _, printed = fit(out, "--data", folder, "--log-every", 4, "--save-every", 3, "--sample-every",
                     5, steps=7, warmup=4)
    (out.parent / "printed").write_text(printed)
    return out


# --------------------------------------------------------------------------------------------------
# train.py: what a run leaves, and that it is the same run whatever happens


def test_a_run_leaves_a_checkpoint_a_log_and_pictures(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*")}
    assert names == {"checkpoint.pt", "log.csv", "samples", "samples/0000005.png",
                     "samples/0000007.png"}
    checkpoint, picture = finished / "checkpoint.pt", finished / "samples/0000007.png"
    assert checkpoint.stat().st_mtime_ns < picture.stat().st_mtime_ns  # drawn when all is safe
    assert Image.open(finished / "samples/0000005.png").height == 3 * 66  # a row for each class
    state = train.load_checkpoint(finished)
    assert state["step"] == 7 and state["skipped"] == 0 and state["classes"] == ["a", "b", "c"]
    printed = (finished.parent / "printed").read_text()
    for said in ("9 images, 3 classes: a, b, c", "M parameters", "GMAC", "1 x cpu, fp32",
                 "left out: 1 .heic", "batch: 8 images = 1 x 8 x 1",
                 "a new run", f"pictures: {finished}/samples", "7 of 7 steps done",
                 f"sample.py {finished}"):
        assert said in printed


def test_the_log_has_a_row_where_it_is_due_and_before_each_checkpoint_and_picture(
        tmp_path, folder, finished):
    """Its loss is the mean since the row before. With 0, neither checkpoint nor picture is made."""
    _, printed = fit(tmp_path, "--data", folder, "--log-every", 1, "--save-every", 0,
                     "--sample-every", 0, steps=7, warmup=4)
    assert "sample.py" not in printed  # there is nothing to sample from
    assert [path.name for path in tmp_path.rglob("*")] == ["log.csv"]
    each, rows = log_of(tmp_path), log_of(finished, slice(1, None))
    assert list(rows) == [3, 4, 5, 6, 7]
    mean = sum(float(each[step][1]) for step in (1, 2, 3)) / 3
    assert float(rows[3][1]) == pytest.approx(mean, rel=1e-5)
    assert [float(each[step][3]) for step in (1, 2, 4, 5)] == [0.0025, 0.005, 0.01, 0.01]
    for step, (images, _, norm, _, skipped, rate, tflops, peak, wait, _) in rows.items():
        assert images == str(8 * step) and norm == each[step][2]
        assert skipped == "0" and peak == "" and 0 <= float(wait) < 1
        wanted = 3 * 2 * sid2.count(TINY)[1] / 1e3 * float(rate)  # forward, and twice backward
        assert float(tflops) == pytest.approx(wanted, rel=1e-2)
    assert float(rows[7][-1]) >= float(rows[3][-1]) >= 0  # seconds


def amid(patch, calls, *signals, factor=1):
    """At these calls of the loss signals come in, and it is multiplied by `factor`."""
    count, loss = itertools.count(1), sid2.training_loss

    def changed(*args):
        if next(count) not in calls:
            return loss(*args)
        for number in signals:
            signal.raise_signal(number)
        return factor * loss(*args)

    patch.setattr(sid2, "training_loss", changed)


def test_a_run_that_goes_on_from_a_checkpoint_equals_an_uninterrupted_one_bit_for_bit(
        tmp_path, folder, monkeypatch):
    """Weights, average, optimiser, log and pictures, with dropout, flips, label dropout and epochs
    that end amid a batch. A second Ctrl-C does not wait for the end of step 6. The log is what the
    checkpoint says, whatever has been written since."""
    config, whole, cut = replace(TINY, dropout=0.2, steps=7), tmp_path / "whole", tmp_path / "cut"
    flags = ["--data", folder, "--log-every", 3, "--save-every", 4, "--sample-every", 5]
    expected, _ = fit(whole, *flags, config=config)
    with monkeypatch.context() as patch:
        amid(patch, [6], signal.SIGINT, signal.SIGINT)
        code, _, err = run(train, "--out", cut, *flags_of(config), *flags)
    assert code == 130 and "interrupted" in err.split("\n")[-2] and "Traceback" not in err
    assert list(log_of(cut)) == [3, 4, 5] and not list(cut.rglob(".*"))
    with open(cut / "log.csv", "a") as log:
        log.write("6,48,9,9,9,0,9,9,9,9,9\nbro")
    for said in ("resumed at step 4", "resumed at step 7"):
        state, printed = fit(cut, *flags, config=config)
        assert said in printed
        assert_same(state, expected)
    assert log_of(cut) == log_of(whole)
    one, two = (contents(top / "samples") for top in (whole, cut))
    assert list(one.values()) == list(two.values()) and len(one) == 2


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_its_step_and_nothing_is_lost(tmp_path, monkeypatch, number):
    expected, _ = fit(tmp_path / "whole", steps=5)
    with monkeypatch.context() as patch:
        amid(patch, [3], number)
        state, printed = fit(tmp_path / "cut", steps=5)
    assert state["step"] == 3 and "3 of 5 steps done" in printed and "by a signal" in printed
    state, _ = fit(tmp_path / "cut", steps=5)
    assert_same(state, expected)
    assert list(log_of(tmp_path / "cut")) == [3, 5]


def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    amid(monkeypatch, [2], signal.SIGHUP)
    try:
        state, _ = fit(tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert state["step"] == TINY.steps


def test_a_run_that_has_not_done_a_step_begins_anew(tmp_path, monkeypatch):
    """With other settings too; if nothing is to be saved, no other run's weights lie there."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "read_clips", lambda *_: 1 / 0)
        run(train, "--out", tmp_path, *flags_of(TINY))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 0
    state, printed = fit(tmp_path, "--save-every", 0, "--sample-every", 0, lr=0.005)
    assert state is None and "a new run" in printed and "sample.py" not in printed


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    put(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b").chmod(0)
    try:
        with pytest.raises(PermissionError, match="/b"):
            train.open_data(str(tmp_path), 8, seed=0)
    finally:
        (tmp_path / "b").chmod(0o700)


def test_a_finished_run_says_that_nothing_is_left_to_do(tmp_path):
    fit(tmp_path / "run", steps=3)
    _, printed = fit(tmp_path / "run", steps=2)
    assert "nothing was left to do: the run stands at step 3, and --steps is 2" in printed


def threads():
    """Those of Python that are alive."""
    return {thread for thread in threading.enumerate() if thread.is_alive()}


@pytest.mark.parametrize("end", ["end", *SIGNALS, "second Ctrl-C", "error in a thread"], ids=str)
def test_no_thread_outlives_a_run(tmp_path, monkeypatch, end):
    before = threads()
    if isinstance(end, signal.Signals):
        amid(monkeypatch, [2], end)
    if end == "second Ctrl-C":
        amid(monkeypatch, [2], signal.SIGINT, signal.SIGINT)
    if end == "error in a thread":
        monkeypatch.setattr(train, "read_clips", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(train, "--out", tmp_path / "run", *flags_of(TINY))
    else:
        code, _, _ = run(train, "--out", tmp_path / "run", *flags_of(TINY), "--workers", 3)
        assert code == (130 if end == "second Ctrl-C" else 0)
    until = time.monotonic() + 20
    while not threads() <= before and time.monotonic() < until:  # a batch may still be made
        time.sleep(0.01)
    assert threads() <= before


@pytest.mark.parametrize("number, processes", [(signal.SIGKILL, 1)] + LONG * [
    (signal.SIGTERM, 1), (signal.SIGKILL, 2), (signal.SIGTERM, 2)])
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(
        tmp_path, folder, number, processes):
    """Also amid saving and drawing: each step writes a checkpoint, every fifth a picture."""
    config = replace(TINY, dropout=0.2, steps=300 if LONG else 30)
    rng = random.Random(0)
    whole, checkpoint = tmp_path / "whole/checkpoint.pt", tmp_path / "killed/checkpoint.pt"

    def start(file):
        return launch(ROOT / "train.py", "--out", file.parent, *flags_of(config), "--data", folder,
                      "--save-every", 1, "--sample-every", 5, "--micro-batch", 4,
                      processes=processes)

    for kill in range(10 // processes if LONG else 1):
        begun, started = time.time(), start(checkpoint)
        while not checkpoint.exists() or checkpoint.stat().st_mtime < begun:
            assert all(process.poll() is None for process in started)
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        for process in started:
            process.send_signal(number)
        codes = [process.wait(60) for process in started]
        assert codes == [0 if number == signal.SIGTERM else -number] * processes
    assert torch.load(checkpoint, weights_only=True)["step"] < config.steps
    for file in (whole, checkpoint):
        assert [code for code, _, _ in results(start(file))] == [0] * processes
    assert_same(*(torch.load(file, weights_only=True) for file in (whole, checkpoint)))


def test_a_clip_of_0_does_not_limit_the_gradient(tmp_path):
    """It would else multiply every gradient by 0, and train nothing."""
    (free, _), (limited, _) = (fit(tmp_path / str(clip), clip=clip) for clip in (0.0, 1e9))
    assert_close(free["net"], limited["net"], rtol=0, atol=0)


def test_steps_whose_gradient_is_not_finite_are_skipped_and_an_interval_of_them_ends_the_run(
        tmp_path, monkeypatch):
    """An interval of the log, of ten steps at least; one good step among them is enough. Weights,
    moments and their step counts stay as they were."""
    before, _ = fit(tmp_path / "two", "--log-every", 1, steps=2)
    amid(monkeypatch, [*range(3, 12), *range(13, 40)], factor=math.inf)
    out, flags = tmp_path / "run", [*flags_of(TINY), "--log-every", 1, "--save-every", 2]
    after, _ = fit(out, *flags, "--steps", 11)
    assert_close(after["net"], before["net"], rtol=0, atol=0)
    assert_close(after["optimizer"]["state"], before["optimizer"]["state"], rtol=0, atol=0)
    rows = log_of(out)
    assert rows[3][1:] == ["nan", "nan", "0.01", "1"] and after["skipped"] == 9
    assert [rows[step] for step in (1, 2)] == list(log_of(tmp_path / "two").values())
    flags = [*flags, "--steps", 40, "--log-every", 10, "--save-every", 10]
    line = error_line(*run(train, "--out", out, *flags))
    assert "no finite gradient in 10 steps, up to step 30" in line
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 20 and state["skipped"] == 17
    assert all(w.isfinite().all() for w in [*state["net"].values(), *state["ema"].values()])


def test_neither_processes_nor_micro_batches_change_a_run(tmp_path, monkeypatch):
    """Two processes of two micro-batches each are one batch: in weights, average and log. At step 2
    the gradient is not finite, in the second process alone; both skip it. Adam with epsilon 1e-12
    turns rounding of tiny gradients into steps, hence the tolerance."""
    poisoned = f"""
import os, pytest, train
from {Path(__file__).stem} import amid
amid(pytest.MonkeyPatch(), [3] if os.environ["RANK"] == "1" else [], factor=float("nan"))
train.guarded(train.main)
"""
    flags = [*flags_of(TINY), "--log-every", 1, "--micro-batch", 2]
    started = launch("-c", poisoned, "--out", tmp_path / "two", *flags, processes=2)
    amid(monkeypatch, [2], factor=math.nan)
    one, _ = fit(tmp_path / "one", "--log-every", 1)
    for code, _, err in results(started):
        assert code == 0, err
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    for part in "net", "ema":
        assert_close(one[part], two[part], rtol=2e-3, atol=2e-3)
    ours, theirs = (list(log_of(tmp_path / name).values()) for name in ("one", "two"))
    np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), rtol=1e-3)
    assert [row[4] for row in theirs] == ["0", "1", "1", "1"] and theirs[1][1] == "nan"


def test_training_waits_for_the_device_at_rows_of_the_log_alone(tmp_path):
    """No step asks for the value of a tensor: not of the loss, nor whether the gradient is finite.
    Adam and the average each cost one call for all tensors."""
    counts, aten = Counter(), torch.ops.aten

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            counts[operation.overloadpacket] += 1
            return operation(*args, **(kwargs or {}))

    with Counting():
        fit(tmp_path, "--log-every", 99, "--sample-every", 0, "--save-every", 0)
    assert counts[aten._fused_adam_] == counts[aten._foreach_lerp_] == TINY.steps
    assert counts[aten._local_scalar_dense] == 0


def test_a_full_disk_is_called_by_its_name_and_what_was_there_stays(tmp_path):
    """Real processes whose files cannot grow past 2 kB: a checkpoint fails, and an image, in the
    thread that writes it."""
    pytest.importorskip("resource")
    code = ("import resource, sample, train; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, 2 * [2048]); train.guarded({}.main)")
    for size in (8, 32):
        fit(tmp_path / f"{size}", "--sample-every", 0, image_size=size, steps=1)
    before, checkpoint = contents(tmp_path), tmp_path / "8" / "checkpoint.pt"
    for script, *flags in (("train", "--out", tmp_path / "8", *flags_of(TINY), "--save-every", 2),
                           ("sample", tmp_path / "32", "--device", "cpu", "--out", tmp_path / "x")):
        result, = results(launch("-c", code.format(script), *flags))
        assert "File too large" in error_line(*result) and "%|" in result[2]
    after = contents(tmp_path)
    assert after.keys() - before.keys() == {tmp_path / "x" / "settings.json"}
    assert after[checkpoint] == before[checkpoint]


def test_a_finer_network_starts_from_a_coarser_run(tmp_path, finished):
    """--init-from: 8 px with patch 1 to 16 px with patch 2; the average's trunk and all that fits.
    The step that follows is too small to see."""
    new, printed = fit(tmp_path, "--init-from", finished, image_size=16, patch_size=2, steps=1,
                       lr=1e-20)
    fresh = "condition.label.weight, embed.weight, head.bias, head.weight"
    assert f"started afresh: {fresh}" in printed
    old = torch.load(finished / "checkpoint.pt", weights_only=True)
    key = "middle.0.attention.qkv.weight"
    assert new["net"][key].equal(old["ema"][key]) and new["ema"][key].equal(old["ema"][key])
    assert not old["net"][key].equal(old["ema"][key])


def test_labels_can_be_left_out_or_missing(tmp_path, folder):
    """Then the network is unconditional, and pictures have no names on the left."""
    fit(tmp_path / "left out", "--num-classes", 0, steps=1)
    fit(tmp_path / "missing", "--data", folder / "a" / "deep", steps=1)
    for name in ("left out", "missing"):
        state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        assert state["classes"] == [] and len(state["net"]["condition.label.weight"]) == 1
        make_samples(tmp_path / name)
        for file in tmp_path.glob(f"{name}/samples*/0000001.png"):
            assert Image.open(file).size == (8 * 66, 66)
    assert "no classes" in error_line(*run(sample, tmp_path / "missing", "--guidance", 2))


# --------------------------------------------------------------------------------------------------
# train.py: data


def test_images_of_every_kind_become_rgb(folder):
    images, labels = look_at(train.open_data(str(folder), 8, seed=0), range(9))
    assert np.asarray(images).shape == (9, 8, 8, 3) and np.asarray(images).dtype == np.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(train.to_rgb(clear)).min() == 255


def tiff(dtype, values, bits=None, black=1):
    """A grey TIFF of one row of four pixels, as `values` in this type, or in these bytes. black: 1
    where 0 is black, 0 where it is white."""
    dtype = np.dtype(dtype)
    data = values if bits else np.array(values, dtype).tobytes()
    order, kind = (">" if dtype.str[0] == ">" else "<"), "uif".index(dtype.kind) + 1
    tags = {256: 4, 257: 1, 258: bits or 8 * dtype.itemsize, 259: 1, 262: black, 273: 122, 278: 1,
            279: len(data), 339: kind}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, tags[tag]) for tag in tags)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    return start + entries + bytes(4) + data


GREY = [0, 0x4000, 0x8000, 0xFFFF]


@pytest.mark.parametrize("content", [
    tiff("<u2", GREY), tiff(">u2", GREY), tiff("<u2", bytes([0, 4, 0, 0x80, 0x0F, 0xFF]), bits=12),
    "png", "pgm", "jp2"], ids=["16 bits", "big-endian", "12 bits", "png", "pgm", "jp2"])
def test_grey_of_12_or_16_bits_is_scaled_to_8(tmp_path, content):
    file = tmp_path / (content if isinstance(content, str) else "tif")
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file = file.with_suffix(f".{content}")
        Image.fromarray(np.array([GREY] * 4, np.uint16)).save(file)
    with Image.open(file) as image:
        assert np.asarray(train.to_rgb(image))[0, :, 0].tolist() == [0, 64, 128, 255]
    clear = file.with_suffix(".png")
    Image.fromarray(np.array([GREY] * 4, np.uint16)).save(clear, transparency=0x4000)
    with Image.open(clear) as image:  # laid over white
        assert np.asarray(train.to_rgb(image))[0, :, 0].tolist() == [0, 255, 128, 255]


@pytest.mark.parametrize("content", [
    tiff("<f4", [0, 0.25, 0.5, 1]), tiff("<i4", [0, 64, 128, 255]),
    tiff("<u4", [0, 1, 2, 2**32 - 1]), tiff("<i2", [0, 1, 2, 3]), tiff("<u2", GREY, black=0)],
    ids=["float", "32 bits", "32 bits without sign", "16 with sign", "0 is white"])
def test_grey_whose_white_no_file_tells_is_named_and_never_black(tmp_path, content):
    (tmp_path / "x.tif").write_bytes(content)
    data = train.open_data(str(tmp_path), 8, seed=0)
    with pytest.raises(train.InputError, match="x.tif cannot be read .*mode [FI].*what is white"):
        data.read(0, 0.0)


def test_pictures_are_turned_by_their_orientation_whatever_else_their_tags_say(tmp_path):
    """Alike in five formats; one tag is not a number, which Pillow cannot write anew."""
    corner = Image.new("RGB", (16, 8))
    corner.paste("white", (0, 0, 8, 8))
    for suffix in (".jpg", ".png", ".webp", ".avif", ".tiff"):
        file, exif = tmp_path / f"x{suffix}", Image.Exif()
        exif[0x0112] = 6
        if suffix != ".tiff":  # there Pillow could not save it
            exif[0x9206] = TiffImagePlugin.IFDRational(0, 0)
        corner.save(file, exif=exif, quality=95)
        with Image.open(file) as image:
            seen = np.asarray(train.to_rgb(image))
        assert seen.shape == (16, 8, 3) and seen[4, 4].min() > 200 and seen[12, 4].max() < 50
    for number, way in train.TURNS.items():  # as Pillow itself turns them
        exif = Image.Exif()
        exif[0x0112] = number
        corner.save(tmp_path / "x.png", exif=exif)
        with Image.open(tmp_path / "x.png") as image:
            assert train.to_rgb(image).tobytes() == corner.transpose(way).tobytes()


def test_what_has_several_pictures_counts_as_its_first(tmp_path):
    """Stereo photographs (MPO, under the name of a JPEG) and animations."""
    white, black = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    for name, form in (("a.jpg", "MPO"), ("b.gif", "GIF"), ("c.apng", "PNG"), ("d.jpe", "MPO")):
        white.save(tmp_path / name, form, save_all=True, append_images=[black])
    images, _ = look_at(train.open_data(str(tmp_path), 8, seed=0), range(4))
    assert images.min() > 250
    for name in ("1.jpg", "2.jpg"):
        put(tmp_path / "clips/x", name)
        white.save(tmp_path / "clips/x" / name, "MPO", save_all=True, append_images=[black])
    clips = train.open_data(str(tmp_path / "clips"), 8, seed=0, length=2)
    assert clips.read(0, 0.0).shape == (2, 8, 8, 3)


def test_the_crop_keeps_the_middle_and_its_proportions():
    """ADM's: by box to less than twice the size, then bicubic, then the centre."""
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200
    assert (np.asarray(train.centre_crop(Image.fromarray(wide), 16)) == 200).all()
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    flat = np.asarray(train.centre_crop(board, 32)).astype(int)
    assert abs(flat - 127).max() <= 1  # a box average of a chessboard is grey
    white = train.centre_crop(Image.new("L", (65, 43), 255), 62)
    assert white.size == (62, 62) and np.asarray(white).min() == 255  # rounding leaves no edge
    with pytest.raises(ValueError, match="elongated"):  # it would fill the memory
        train.centre_crop(Image.new("1", (2_000_000, 1)), 64)


def test_links_are_followed_once_and_what_systems_add_is_left_out(tmp_path, folder):
    root = put(tmp_path, ".ipynb_checkpoints/x.png", "own/one.png", "own/._two.png",
               "own/loop.png/three.png", "own/@eaDir/one.png/thumb.png", "__MACOSX/own/one.png",
               "lost+found/x.png")
    (root / "linked").symlink_to(folder / "b")
    (root / "own" / "up").symlink_to(root)
    (root / "other").symlink_to(root / "own")
    data = train.open_data(str(root), 8, seed=0)
    assert data.classes == ["linked", "other", "own"]
    assert np.bincount(data.labels).tolist() == [3, 2, 2]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_the_highest_label_of_an_npz_says_how_many_classes_there_are(tmp_path, dtype):
    """Also where one more does not fit into the type of the labels."""
    images = np.zeros((256, 8, 8, 3), np.uint8)
    file = npz(tmp_path / "many.npz", arr_0=images, arr_1=np.arange(256, dtype=dtype))
    assert len(train.open_data(str(file), 8, seed=0).classes) == 256


def test_an_epoch_has_every_image_once_half_of_them_mirrored_and_a_tenth_without_label(tmp_path):
    """Each epoch in a new order, and no noise comes twice."""
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    stored = npz(tmp_path / "images.npz", arr_0=images, arr_1=np.arange(5) % 3)
    data = train.open_data(str(stored), 8, seed=0)
    order = np.concatenate([train.order_of_epoch(5, epoch, 5) for epoch in range(80)])
    assert (np.sort(order.reshape(80, 5)) == np.arange(5)).all()
    assert len(np.unique(order.reshape(80, 5), axis=0)) > 40
    items = zip(*(train.make_batch(data, TINY, 5, 0, 8, step) for step in range(50)))
    got, labels, _, seeds = (torch.cat(parts).flatten(0, 1).numpy() if parts[0].ndim > 1
                             else torch.cat(parts).numpy() for parts in items)
    mirrored = (got == images[order, :, ::-1]).all((1, 2, 3))
    null = labels == TINY.num_classes
    assert (mirrored ^ (got == images[order]).all((1, 2, 3))).all()
    assert (null | (labels == order % 3)).all() and len(set(seeds)) == 400
    assert 0.4 < mirrored.mean() < 0.6 and 0.05 < null.mean() < 0.15


def test_shapes_are_whole_and_depend_on_seed_and_number_alone():
    """At 16 px a drawing is what the eye sees of it at 64 px: as wide as high, but for the moon, so
    that the frame cuts nothing off, and at the same contrast."""
    small, large = (train.open_shapes(size, seed=3) for size in (16, 64))
    images, labels = look_at(large, range(120))
    assert np.array_equal(look_at(large, [17, 5])[0], images[[17, 5]])
    assert not np.array_equal(images, look_at(train.open_shapes(64, seed=4), range(120))[0])
    seen = images.reshape(120, 16, 4, 16, 4, 3).mean((2, 4))
    assert abs(seen - look_at(small, range(120))[0]).max() <= 1
    for image, label in zip(images, labels):
        inside = (image > image.min((0, 1))).any(2)  # dark is darker in every channel
        height, width = (np.ptp(np.flatnonzero(inside.any(axis))) + 1 for axis in (1, 0))
        wanted = 0.775 if large.classes[label] == "moon" else 1
        assert abs(width - wanted * height) <= 2 and height > 20 and image.max() == 255


def test_cifar10_is_read_from_the_binary_archive(tmp_path, monkeypatch):
    """10,000 records per file, label first, then planes R, G, B. Without a connection the message
    says what to fetch and where to put it; a damaged archive is named."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(train, "CIFAR10", (tmp_path / "nowhere").as_uri())
    archive = tmp_path / "hub" / "cifar-10-binary.tar.gz"
    flags = ["--preset", "cifar10", "--out", tmp_path / "run", "--device", "cpu"]
    unreadable = f"{archive} cannot be read as the archive that {train.CIFAR10} gives"
    assert unreadable in error_line(*run(train, *flags))
    archive.write_bytes(b"no archive")
    assert unreadable in error_line(*run(train, *flags))
    records = np.zeros((10_000, 3073), np.uint8)
    records[7] = record = np.random.default_rng(0).integers(0, 10, 3073)
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for i in range(1, 6):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            info.size = records.size
            tar.addfile(info, io.BytesIO(records.tobytes()))
    data = train.open_data("cifar10", 32, seed=0)
    images, labels = look_at(data, [10_007, 10_008])
    assert np.array_equal(images[0], record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
    assert labels.tolist() == [record[0], 0] and not images[1].any()
    assert len(data.labels) == 50_000 and data.classes[3] == "cat"


def test_an_npz_is_mapped_unless_it_is_compressed(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    stored = npz(tmp_path / "stored.npz", arr_0=images, arr_1=np.array([0, 2, 1, 0, 1]))
    packed = npz(tmp_path / "packed.npz", np.savez_compressed, arr_0=images)
    mapped, loaded = (train.open_data(str(path), 8, seed=0) for path in (stored, packed))
    for file, kind in ((stored, np.memmap), (packed, np.ndarray)):
        assert type(train.open_npz(file)["arr_0"]) is kind
    order = np.array([3, 0, 4])
    for data in (mapped, loaded):
        assert np.array_equal(look_at(data, order)[0], images[order])
    assert look_at(mapped, order)[1].tolist() == [0, 0, 1] and mapped.classes == ["0", "1", "2"]
    assert look_at(loaded, order)[1].tolist() == [0, 0, 0] and loaded.classes == []


def test_eight_bits_survive_the_way_there_and_back():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert np.array_equal(train.to_uint8(train.from_uint8(values)), values.numpy())


def test_the_next_image_and_its_label_take_the_place_of_one_that_cannot_be_read(tmp_path, capsys):
    """Zero bytes, no image, half an image, links to nowhere or in a loop, a decompression bomb:
    each is named once. If nothing is left, that ends the run, and it may begin anew with other
    settings; the line of error begins a line of its own though a bar is open."""
    top = put(tmp_path / "data", "a/good.png", "a/cut.png")
    put(top, "b/good.png", image=Image.new("RGB", (8, 8), "red"))
    put(top, "b/bomb.png", image=Image.new("1", (40_000, 20_000)))
    halve(top / "a/cut.png")
    (top / "a/zero.png").write_bytes(b"")
    (top / "a/text.jpg").write_text("<html>404</html>")
    (top / "b/nowhere.png").symlink_to("gone.png")
    (top / "b/loop.png").symlink_to("loop.png")
    _, printed = fit(tmp_path / "run", "--data", top)
    assert "8 images, 2 classes" in printed and "4 of 4 steps done" in printed
    capsys.readouterr()
    train.warn_once.cache_clear()
    data = train.open_data(str(top), 8, seed=0)
    images, labels = look_at(data, range(8))
    look_at(data, range(8))
    assert labels.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]  # cut good text zero bomb good loop nowhere
    assert [image[0, 0, 0] // 255 for image in images] == labels.tolist()
    assert len(re.findall(rf"^warning: {top}/\S+ cannot", capsys.readouterr().err, re.M)) == 6

    only = halve(put(tmp_path / "only", "x.png") / "x.png")
    flags = ["--data", only.parent, "--out", tmp_path / "no_run", *flags_of(TINY)]
    code, printed, err = run(train, *flags)
    assert "nothing is left to read in" in error_line(code, printed, err) and "step/s" in err
    put(only.parent, "x.png")
    assert run(train, *flags, "--lr", 0.005)[0] == 0


# --------------------------------------------------------------------------------------------------
# sample.py


def test_the_image_of_a_seed_depends_on_neither_batch_nor_order_nor_processes(finished, tmp_path):
    """npz: in the order of the seeds, so never sorted by class. It can be trained on."""
    flags = ["--device", "cpu", "--precision", "fp32", "--format", "npz", "--count", 7]
    torchrun(ROOT / "sample.py", finished, *flags, "--batch", 2, "--out", tmp_path / "two")
    make_samples(finished, *flags, "--batch", 5, "--out", tmp_path / "one")
    make_samples(finished, "--seeds", 3, 4, "--out", tmp_path / "few")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    images = one["arr_0"].astype(int)
    assert one["arr_0"].dtype == np.uint8 and images.shape == (7, 8, 8, 3)
    assert one["arr_1"].tolist() == two["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert abs(images - two["arr_0"]).max() <= 1  # rounding of another batch size
    assert len({image.tobytes() for image in images}) == 7
    few = [np.asarray(Image.open(tmp_path / f"few/00000{seed}.png")) for seed in (3, 4)]
    assert abs(images[3:5] - few).max() <= 1
    data = train.open_data(str(tmp_path / "one.npz"), 8, seed=0)
    assert np.array_equal(look_at(data, range(7))[0], images) and data.classes == ["0", "1", "2"]


def test_a_folder_of_samples_is_completed_and_the_rest_is_left_alone(finished, tmp_path):
    """Other settings are refused. The grid shows one row per class."""
    flags = ["--out", tmp_path / "images", "--count", 6]
    assert f"wrote {tmp_path / 'images.png'}" in make_samples(finished, *flags)
    assert Image.open(tmp_path / "images.png").height == 3 * 66
    files = [tmp_path / f"images/00000{seed}.png" for seed in range(6)]
    before = [file.stat().st_mtime_ns for file in files]
    files[2].unlink()
    files[4].unlink()
    make_samples(finished, *flags)
    make_samples(finished, *flags)  # nothing is missing
    kept = [file.stat().st_mtime_ns == time for file, time in zip(files, before)]
    assert kept == [True, True, False, True, False, True]
    everything = contents(tmp_path)
    others = ["--device", "cpu", "--precision", "fp32", "--steps", 2]  # the precision is the same
    message = error_line(*run(sample, finished, *flags, *others))
    assert "other settings (sample_steps 3 -> 2)" in message and contents(tmp_path) == everything


def test_every_flag_of_sample_reaches_the_sampler(finished, tmp_path):
    """Each changes the picture, and has a folder of its own beside the checkpoint."""
    run_folder = shutil.copytree(finished, tmp_path / "run")
    flags = [[], ["--weights", "raw"], ["--steps", 2], ["--sampler", "ddim"], ["--gamma", 1],
             ["--guidance", 9], ["--interval", -20, 20], ["--classes", "b"], ["--classes", 2, 0],
             ["--classes", "random"]]
    paths = [make_samples(run_folder, "--count", 8, *more).split()[-1] for more in flags]
    assert paths[0].endswith("run/samples-0000007-precision-fp32.png")
    assert paths[8].endswith("run/samples-0000007-classes-2-0-precision-fp32.png")
    assert len({Path(path).read_bytes() for path in paths}) == len(set(paths)) == len(flags)
    make_samples(run_folder, "--classes", "c", "a", "--out", tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.png"))) == 16  # 8 of each class


def test_a_trajectory_ends_in_the_sample(finished, tmp_path):
    """A row of z and one of x_hat for each seed, at up to eight noise levels; the last x_hat is the
    sample."""
    flags = ["--out", tmp_path / "x", "--seeds", 1, 2, "--steps", 9]
    make_samples(finished, *flags, "--trajectory")
    make_samples(finished, *flags, "--format", "folder")
    picture = Image.open(tmp_path / "x-trajectory.png")
    left = picture.width - 8 * 66
    assert 0 < left < 120 and picture.height == 18 + 4 * 66
    for row, seed in enumerate((1, 2)):
        wanted = np.asarray(Image.open(tmp_path / f"x/00000{seed}.png")).astype(int)
        corner = left + 7 * 66, 18 + (2 * row + 1) * 66
        cell = picture.crop((*corner, corner[0] + 64, corner[1] + 64))
        assert abs(np.asarray(cell)[4::8, 4::8] - wanted).max() <= 1
    assert not list(tmp_path.glob("x.*"))


# --------------------------------------------------------------------------------------------------
# Clips: the same scripts


def film(clips=6, frames=7):
    """Random clips: every frame differs, so no writer merges two."""
    return np.random.default_rng(0).integers(0, 256, (clips, frames, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """An npz of clips in two classes, and a finished run on it that goes on from two frames."""
    root = tmp_path_factory.mktemp("clips")
    data = npz(root / "clips.npz", arr_0=film(), arr_1=np.arange(6) % 2)
    fit(root / "run", "--data", data, config=CLIPS)
    return data, root / "run"


def test_a_clip_is_a_folder_of_frames(tmp_path):
    """Frame 2 comes before frame 10; sub-folders are the classes; a window begins anywhere."""
    for i, frames in enumerate(film(frames=12)):
        for j, frame in enumerate(frames):
            put(tmp_path / "ab"[i % 2] / f"clip{i}", f"{j}.png", image=Image.fromarray(frame))
    data = train.open_data(str(tmp_path), 8, 0, length=5)
    assert data.classes == ["a", "b"]
    images, labels = train.read_clips(data, range(6), [0.99] * 6)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(images, film(frames=12)[[0, 2, 4, 1, 3, 5], 7:])
    alone = train.open_data(str(tmp_path / "a" / "clip4"), 8, 0, length=5)
    assert np.array_equal(alone.read(0, 0.0), film(frames=12)[4, :5])


def test_a_clip_that_is_broken_of_mixed_sizes_or_an_animation_is_named(tmp_path, capsys):
    """And folders that are too short, as those of unrelated pictures, are left out."""
    put(tmp_path, *(f"{name}/{i}.png" for name in ("cut", "good", "mixed") for i in (1, 2)))
    put(tmp_path, "mixed/2.png", image=Image.new("RGB", (8, 9)))
    put(tmp_path, "short/1.png", "loose.png")
    halve(tmp_path / "cut/2.png")
    (tmp_path / "gifs").mkdir()
    frames = [Image.fromarray(frame) for frame in film()[0]]
    for i in (1, 2):
        frames[0].save(tmp_path / f"gifs/{i}.gif", save_all=True, append_images=frames[1:])
    data = train.open_data(str(tmp_path), 8, 0, length=2)
    assert "left out: 2 folders of fewer than 2 images" in capsys.readouterr().out
    wanted = {"cut": "cut/2.png cannot be read", "gifs": "1.gif .*animation: a clip is a folder",
              "good": None, "mixed": "mixed .*different sizes"}
    for i, message in enumerate(wanted.values()):
        with pytest.raises(train.InputError, match=message) if message else (
                contextlib.nullcontext()):
            data.read(i, 0.0)
    good = data.read(2, 0.0)
    assert np.array_equal(train.read_clips(data, range(2), [0.0] * 2)[0], [good, good])


def test_a_clip_moves_straight_on_from_one_place_to_another():
    """So two frames tell all that follow; the whole shape stays in the picture."""
    for i in range(50):
        radius, centres, *_ = train.shape_scene(0, i, 8)
        assert abs(centres - 0.5).max() <= 0.5 - radius
        assert_close(np.diff(centres, axis=0), np.tile((centres[-1] - centres[0]) / 7, (7, 1)))


def test_a_step_has_windows_of_clips_with_one_time_one_label_and_one_mirror(clips):
    config = replace(CLIPS, batch=64, num_classes=2, flip=True)
    data = train.open_data(str(clips[0]), 8, 0, length=5)
    images, y, t, seeds = batch = train.make_batch(data, config, 0, 0, 64, 0)
    whole, found = film(), Counter()
    for i in range(64):
        found[next((clip, begin, flip) for clip, begin, flip in itertools.product(
            range(6), range(3), (1, -1)) if np.array_equal(
                images[i], whole[clip, begin : begin + 5, :, ::flip]))] += 1
        assert len(set(t[i].tolist())) == 1 and set(y[i].tolist()) in ({0}, {1}, {2})
    assert len(found) > 20 and {begin for _, begin, _ in found} == {0, 1, 2}
    assert len(set(seeds.tolist())) == 64
    x, _, _, eps, given = train.to_device(batch, CPU, torch.Generator(), config.given)
    again = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seeds[1].item()))
    assert torch.equal(eps[3:6], again) and not torch.equal(eps[0], eps[1])
    assert np.array_equal(train.to_uint8(x), images[:, 2:].flatten(0, 1))
    assert np.array_equal(train.to_uint8(given.reshape(128, 3, 8, 8)), images[:, :2].flatten(0, 1))


def test_the_loss_of_clips_is_a_mean_of_what_follows_the_given_frames(tmp_path, clips, monkeypatch):
    """Its log says 1 if all losses are 1; its network is given the frames before those of x."""
    real, whole = sid2.training_loss, film()

    def ones(net, config, x, *args):
        given = net.keywords["given"].unflatten(1, (2, 3))
        for clip, before in zip(x.unflatten(0, (-1, 3)), given):
            images = train.to_uint8(torch.cat([before, clip]))
            assert any(np.array_equal(images, film[begin : begin + 5, :, ::flip]) for film in whole
                       for begin in range(3) for flip in (1, -1))
        return 0 * real(net, config, x, *args) + 1

    monkeypatch.setattr(sid2, "training_loss", ones)
    fit(tmp_path / "run", "--data", clips[0], "--micro-batch", 2, "--log-every", 1, config=CLIPS)
    assert [row[1] for row in log_of(tmp_path / "run").values()] == ["1"] * 4


def watch_headings(monkeypatch):
    """A list of what stands above the pictures that are drawn from now on."""
    headings, page = [], train.page
    monkeypatch.setattr(train, "page", lambda rows, heading: headings.append(heading) or page(
        rows, heading))
    return headings


def test_a_run_of_clips_goes_on_bit_for_bit_and_processes_change_nothing(
        tmp_path, clips, monkeypatch):
    """Two processes with micro-batches and checkpointing are one; so is a run in two parts."""
    data, whole = clips
    flags = ["--data", data, "--device", "cpu"]
    two = launch(ROOT / "train.py", "--out", tmp_path / "two", *flags, *flags_of(CLIPS),
                 "--micro-batch", 2, "--checkpointing", processes=2)
    headings = watch_headings(monkeypatch)
    fit(tmp_path / "parts", "--data", data, config=CLIPS, steps=2)
    parts, _ = fit(tmp_path / "parts", "--data", data, config=CLIPS)
    assert headings == [["", "given", "given", "3", "4", "5"]] * 2
    for code, _, err in results(two):
        assert code == 0, err
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True)
                for out in (whole, tmp_path / "two"))
    assert_same(one, parts)
    assert_close(one["net"], two["net"], rtol=2e-3, atol=2e-3)


def test_samples_of_clips_begin_with_the_given_frames(tmp_path, clips, monkeypatch):
    """In strips, an npz and an animation; the class is that of the clip, and other clips can be
    given. A strip depends on its seed alone."""
    data, run_folder = clips
    flags = ["--count", 8, "--guidance", 3, "--interval", -99, 99]
    make_samples(run_folder, *flags, "--format", "npz", "--out", tmp_path / "a")
    with np.load(tmp_path / "a.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (8, 5, 8, 8, 3)
    assert np.array_equal(images[:, :2], film()[np.arange(8) % 6, :2])
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    strip = np.asarray(Image.open(tmp_path / "a" / "000005.png"))
    assert np.array_equal(strip, np.concatenate(images[5], axis=1))

    headings = watch_headings(monkeypatch)
    other = npz(tmp_path / "other.npz", arr_0=film()[::-1, :2], arr_1=np.arange(6) % 2)
    make_samples(run_folder, *flags, "--data", other, "--format", "animation", "--out",
                 tmp_path / "b", "--batch", 3)
    assert Image.open(tmp_path / "b.webp").n_frames == 5
    strip = np.asarray(Image.open(tmp_path / "b" / "000000.png"))
    assert np.array_equal(strip[:, :8], film()[5, 0])
    make_samples(run_folder, "--out", tmp_path / "c", "--seeds", 5, 5, *flags[2:])
    assert (tmp_path / "c" / "000005.png").read_bytes() == (
        tmp_path / "a" / "000005.png").read_bytes()
    assert Image.open(tmp_path / "c.png").height == 66 + 18  # one clip under a heading
    assert headings[-1] == ["", "given", "given", "3", "4", "5"]


def test_one_frame_that_follows_others_is_a_clip(tmp_path, clips):
    _, out = fit(tmp_path / "run", "--data", clips[0], config=replace(CLIPS, frames=1))
    assert "6 clips" in out
    make_samples(tmp_path / "run", "--count", 2, "--format", "animation", "--out", tmp_path / "a")
    assert Image.open(tmp_path / "a.webp").n_frames == 3


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture(scope="module")
def bad(tmp_path_factory, finished):
    """A folder with everything that somebody has given to the scripts by mistake."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty" / "a").mkdir(parents=True)
    (root / "file").write_text("")
    put(root / "loose", "a/good.png", "loose.png")
    npz(root / "float.npz", arr_0=np.zeros((2, 8, 8, 3)))
    npz(root / "small.npz", arr_0=np.zeros((2, 4, 8, 3), np.uint8))
    npz(root / "foreign.npz", mu=0)
    npz(root / "clips.npz", arr_0=np.zeros((2, 4, 8, 8, 3), np.uint8))
    (root / "films").mkdir()
    for name in ("a.mp4", "b.heic", "c.HEIC", "d.txt"):
        (root / "films" / name).write_text("")
    npz(root / "from_one.npz", arr_0=np.zeros((8, 8, 8, 3), np.uint8), arr_1=np.arange(8) % 4 + 1)
    with zipfile.ZipFile(root / "pictures.npz", "w") as archive:
        archive.write(root / "loose" / "loose.png")
    npz(root / "gaps.npz", arr_1=np.array([17, 3]))
    npz(root / "negative.npz", arr_1=np.array([0, -1]))
    shutil.copytree(finished, root / "no_run")
    (root / "no_run" / "checkpoint.pt").unlink()
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    older = {key: value for key, value in state["config"].items() if key != "clip"}
    for name, change in {"older": dict(config=older),
                         "network": dict(config=state["config"] | {"width": 32})}.items():
        shutil.copytree(finished, root / name)
        torch.save(state | change, root / name / "checkpoint.pt")
    return root


BAD_INPUT = r"""
train --preset imagenet64                  | needs --data
train --step 1                             | unrecognized arguments: --step
train --log-every 0                        | log_every must lie in \[1, 1000000000\]
train --workers 0                          | workers must lie in
train --bias nan                           | bias must lie in
train --lr nan                             | lr must lie in \[0, 1000000000\]
train --lr inf                             | lr must lie in
train --seed -1                            | seed must lie in
train --seed 4294967296                    | seed must lie in
train --betas 0.9 1                        | betas must lie in
train --ema 1.5                            | ema must lie in \[0, 1\]
train --width 15                           | width must be even
train --interval 2 1                       | interval .*lower
train --blocks RTT                         | blocks needs a letter R or T for each of the 2
train --channels 8 12                      | channels must be multiples of head_width 8
train --image-size 9                       | image_size must be a multiple of 2.*got 9
train --micro-batch 3                      | batch must be a multiple of 3
train --checkpointing 9                    | checkpointing must lie in \[0, 1\]
train --sampler euler                      | sampler must be ddpm or ddim
train --width 100000000                    | out of memory
train --num-classes 4                      | --num-classes 4: shapes has 6 classes
train --data BAD/nowhere                   | nowhere cannot be opened: give shapes, cifar10
train --data BAD/empty                     | no images in .*empty
train --data BAD/films                     | no images in .*but 2 .heic, 1 .mp4
train --data BAD/loose                     | 1 images or clips beside its 1 class folders
train --data cifar10                       | cifar10 .images of 32 px
train --data BAD/float.npz                 | arr_0 float64 \(2, 8, 8, 3\)
train --data BAD/small.npz                 | holds arr_0 uint8 \(2, 4, 8, 3\); wanted
train --data BAD/foreign.npz               | foreign.npz holds mu .*; wanted
train --data BAD/negative.npz              | N whole numbers from 0 up
train --data BAD/from_one.npz              | no image has the label 0.* labels begin at 0
train --data BAD/gaps.npz                  | no image has the label 0
train --data BAD/pictures.npz              | pictures.npz cannot be read as an npz .it holds other
train --data BAD/clips.npz                 | holds arr_0 .*; wanted: arr_0 uint8 \(N, 8, 8, 3\)
train --frames 4 --data BAD/small.npz      | holds arr_0 .*; wanted: arr_0 uint8 \(N, L, 8, 8, 3\)
train --frames 9 --data BAD/clips.npz      | \(N, L, 8, 8, 3\), L from 9 up
train --frames 4 --data DATA               | no clips in .*folders of fewer than 4 images: a clip is
train --frames 2 --data BAD/loose          | no clips in .*folders of fewer than 2 images: a clip is
train --frames 4 --data cifar10            | cifar10 .images of 32 px
train --given 1001                         | given must lie in \[0, 1000\]
train --init-from RUN --middle 0           | does not fit, for example middle.0
train --out RUN --data DATA --lr 0.5       | other settings .*lr 0.01 -> 0.5
train --out BAD/no_run --data DATA         | no_run holds files but no checkpoint
train --out BAD/loose                      | loose holds files but no checkpoint
train --out BAD/file/run                   | cannot read or write: .*file
sample BAD/nowhere                         | no checkpoint at .*nowhere
sample BAD/network                         | cannot be read as a checkpoint
sample BAD/older                           | cannot be read as a checkpoint of this version .*clip
sample RUN --classes zebra                 | --classes zebra: this run has classes 0 to 2: a, b, c
sample RUN --gamma 2                       | gamma must lie in
sample RUN --seeds 4 2                     | --seeds
sample RUN --batch 0                       | --batch must be at least 1
sample RUN --steps 0                       | sample_steps must lie in
sample RUN --format animation              | animation shows clips
sample RUN --data shapes                   | --data is for runs with given frames
sample RUN --out BAD/loose                 | exists and has no settings.json
"""


@pytest.mark.parametrize("command, message", [
    line.split(" | ", 1) for line in BAD_INPUT.strip().splitlines()])
def test_bad_input_ends_with_one_clear_line_and_changes_nothing(
        command, message, tmp_path, bad, finished, folder):
    places = {"BAD": bad, "RUN": finished, "DATA": folder}
    name, *flags = re.sub("BAD|RUN|DATA", lambda found: str(places[found[0]]), command).split()
    if name == "train" and "--preset" not in flags:
        flags = [*flags_of(replace(TINY, warmup=4)), *flags]  # RUN and its copies have that warm-up
    if name == "train" and "--out" not in flags:
        flags += ["--out", tmp_path / "run"]
    before = contents(bad, finished, folder)
    code, out, err = run({"train": train, "sample": sample}[name], *flags)
    line = error_line(code, out, err)
    assert re.search(message.strip(), line) and err == line + "\n", err
    assert out in ("", "left out: 1 .heic\n")
    assert contents(bad, finished, folder) == before and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # of torch, about pickles of another protocol
def test_a_file_from_elsewhere_cannot_run_code(tmp_path):
    """Pickles that would make a folder when loaded: as a checkpoint, in torch's format of today and
    of old, as a bare pickle, and inside an npz."""
    marker = tmp_path / "made"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save(dict(config=Evil()), tmp_path / "new.pt")
    torch.save(dict(config=Evil()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("new.pt", "old.pt", "bare.pt"):
        assert "cannot be read as a checkpoint" in error_line(*run(sample, tmp_path / name))
    evil = np.array([Evil()], object)
    npz(tmp_path / "evil.npz", arr_0=evil, arr_1=evil)
    with pytest.raises(train.InputError, match="evil.npz"):
        train.open_data(str(tmp_path / "evil.npz"), 8, seed=0)
    with zipfile.ZipFile(tmp_path / "pointers.npz", "w") as archive:
        with archive.open("arr_0.npy", "w") as member:  # bytes that would be taken for pointers
            header = dict(descr="|O", fortran_order=False, shape=(10,))
            np.lib.format.write_array_header_1_0(member, header)
            member.write(bytes(range(80)))
    with pytest.raises(train.InputError, match="pointers.npz .*plain numbers"):
        train.open_data(str(tmp_path / "pointers.npz"), 8, seed=0)
    assert not marker.exists()
    pickle.loads((tmp_path / "bare.pt").read_bytes())
    assert marker.exists()  # the weapon was loaded


def damaged(data, rng):
    """A file cut somewhere, with some bytes changed, or with a part left out or repeated."""
    a, b = rng.randrange(len(data)), rng.randrange(len(data))
    changed = bytearray(data)
    for place in rng.choices(range(len(data)), k=rng.randrange(1, 9)):
        changed[place] = rng.randrange(256)
    return rng.choice([data[:a], bytes(changed), data[:a] + data[b:]])


@pytest.mark.filterwarnings("ignore")  # of Pillow, about images that are damaged or too large
@pytest.mark.parametrize("kind", ["checkpoint", "npz", "image"])
def test_damaged_files_never_crash_a_reader(tmp_path, finished, folder, kind):
    """They end with one clear line that names the file, or give what has the right form."""
    rng, cases, read = random.Random(1), 3000 if LONG else 60, 0
    sources = {"checkpoint": [finished / "checkpoint.pt"],
               "image": [folder / name for name in train.find_files(folder)],
               "npz": [npz(tmp_path / f"{save.__name__}.npz", save, arr_1=np.arange(2))
                       for save in (np.savez, np.savez_compressed)]}
    (tmp_path / "data").mkdir()
    for case in range(cases):
        source = rng.choice(sources[kind])
        path = tmp_path / "data" / f"{case}{source.suffix}"
        path.write_bytes(damaged(source.read_bytes(), rng))
        try:
            if kind == "checkpoint":
                assert isinstance(train.load_checkpoint(path)["config"], sid2.Config)
            else:
                data = train.open_data(str(path if kind == "npz" else path.parent), 8, seed=0)
                found, labels = look_at(data, range(len(data.labels)))
                assert np.asarray(found).shape == (len(labels), 8, 8, 3)
            read += 1
        except train.InputError as error:
            assert str(path) in str(error)
        path.unlink()
    assert 0 < read < cases


def test_names_may_have_letters_that_the_terminal_has_not(tmp_path):
    """Bytes of Latin-1 in a folder's name, Japanese where the terminal has cp1252."""
    result = subprocess.run([sys.executable, ROOT / "train.py", "--data", put(
        tmp_path / "caf\udce9", "\u732b/1.png", "\u72ac/1.png"), "--out", tmp_path / "run",
        *flags_of(replace(TINY, steps=1))], capture_output=True,
        env=os.environ | dict(PYTHONIOENCODING="cp1252", OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stderr
    assert rb"caf\udce9, 2 images, 2 classes: \u72ac, \u732b" in result.stdout
    make_samples(tmp_path / "run")


def test_the_scripts_end_in_a_shell_as_they_do_here(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    started = [*launch(ROOT / "train.py", "--device", "cuda"), *launch(ROOT / "sample.py", "no")]
    for result, message in zip(results(started), ("--device cuda cannot be used", "no checkpoint")):
        assert message in error_line(*result)


@pytest.mark.parametrize("variables, message", [
    (dict(WORLD_SIZE="4"), "RANK expected"),
    (dict(RANK="0"), "WORLD_SIZE expected"),
    (dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="abc"), "'abc'"),
    (dict(LOCAL_RANK="1"), "RANK expected"),
    (dict(SLURM_NTASKS="4"), "start with torchrun"),
], ids=str)
@pytest.mark.parametrize("script", [train, sample, fid], ids=lambda script: script.__name__)
def test_what_torchrun_sets_is_there_as_a_whole_or_not_at_all(
        tmp_path, monkeypatch, finished, script, variables, message):
    """Else four processes would be four lone runs in one folder."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    data = npz(tmp_path / "a.npz")
    flags = {train: ["--out", tmp_path / "run"], sample: [finished, "--out", tmp_path / "x"],
             fid: [data, data]}[script]
    line = error_line(*run(script, *flags, "--device", "cpu"))
    assert message in line and "torchrun" in line and list(tmp_path.iterdir()) == [data]


# --------------------------------------------------------------------------------------------------
# README, and the quality of a real run


def test_the_readme_runs_as_it_stands(tmp_path):
    """Its Python does, and its commands have flags that exist. --help says what each flag means."""
    readme = (ROOT / "README.md").read_text()
    names = {}
    fit(tmp_path / "run")
    blocks = re.findall("```python\n(.*?)```", readme, re.S)
    assert len(blocks) == 2  # the two calls, and how a trained network comes back
    for block in blocks:
        exec(block.replace("RUN", str(tmp_path / "run")), names)
    assert names["loss"].isfinite() and names["x_hat"].shape == names["x"].shape
    flags = {}
    for script in (train, sample, fid):
        flags[script.__name__] = set(re.findall(r"--[a-z][a-z-]+", run(script, "--help")[1]))
    assert "the weighting sigmoid(b - logsnr)" in " ".join(run(train, "--help")[1].split())
    commands = re.findall(r"(train|sample|fid)\.py ([^`]*?(?<!\\))[\n`]", readme)
    assert len(commands) > 9
    for name, command in commands:
        assert set(re.findall(r"--[a-z][a-z-]+", command)) <= flags[name], command
    launcher = {"--nnodes", "--nproc", "--rdzv-backend", "--rdzv-endpoint"}
    assert set(re.findall(r"--[a-z][a-z-]+", readme)) <= launcher.union(*flags.values())


@pytest.mark.skipif("SID2_IMAGES" not in os.environ, reason="SID2_IMAGES names no folder of images")
def test_real_images_train(tmp_path):
    fit(tmp_path / "run", "--data", os.environ["SID2_IMAGES"], image_size=32)


def judge(data, flip, classes):
    """A small network that has learned the classes of a data set: it names images and gives their
    128 features. Also 10 % of the images (of 22,000 drawings, or of up to 50,000 others), which it
    has not seen, and their labels."""

    def conv(a, b):
        return [torch.nn.Conv2d(a, b, 3, padding=1), torch.nn.BatchNorm2d(b), torch.nn.ReLU()]

    torch.manual_seed(0)
    body = torch.nn.Sequential(
        *conv(3, 32), torch.nn.MaxPool2d(2), *conv(32, 64), torch.nn.MaxPool2d(2), *conv(64, 128),
        *conv(128, 128), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    body, head = body.to(memory_format=torch.channels_last), torch.nn.Linear(128, classes)
    number = 22_000 if data.name == "shapes" else min(len(data.labels), 50_000)
    chosen = np.random.default_rng(0).permutation(len(data.labels))[:number]
    images, labels = (torch.from_numpy(np.asarray(part)) for part in look_at(data, chosen))
    known, batch, epochs = number - number // 10, 100, 8
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()])
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3,
                                                total_steps=epochs * (known // batch))
    cpu = torch.device("cpu")
    _, fast = train.choose_precision(cpu, "auto")
    for _ in range(epochs):
        for part in torch.randperm(known).split(batch)[: known // batch]:
            x = train.from_uint8(images[part])
            x = torch.where((torch.rand(batch) < 0.5 * flip)[:, None, None, None], x.flip(3), x)
            x = x + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)  # samples are not clean
            with fast:
                loss = F.cross_entropy(head(body(x)).float(), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    body.eval()

    @torch.no_grad()
    def look(images):
        parts = np.array_split(images, -(-len(images) // 500))
        features = torch.cat([body(train.from_uint8(torch.from_numpy(part))) for part in parts])
        return head(features).argmax(1).numpy(), features.double()

    return look, images[known:].numpy(), labels[known:].numpy()


@pytest.mark.skipif("SID2_RUN" not in os.environ, reason="SID2_RUN names no run")
def test_samples_are_recognised():
    """A judge trained on the run's data says what samples show, and how far their features lie from
    those of unseen images: 400 seeds, untrained, unguided and guided; then every npz in the run's
    folder. What spans less than 40 grey levels in each channel shows nothing, whatever the judge
    takes it for. Of shapes at least 99 % must show their class."""
    folder = Path(os.environ["SID2_RUN"])
    state = train.load_checkpoint(folder)
    config, name = state["config"], state["data"]
    if config.given + config.frames > 1 or config.num_classes == 0:
        pytest.skip("only images of classes show one")
    data = train.open_data(name, config.image_size, 99)  # 99: shapes not trained on
    look, real, labels = judge(data, config.flip, config.num_classes)
    seeds, net = list(range(400)), sid2.ResidualUViT(config).eval()
    y = train.choose_labels(seeds, list(range(config.num_classes)), config.num_classes)
    cpu = torch.device("cpu")
    sets = {"unseen images": (real[:500], labels[:500])}
    for title, weights, guidance in (("untrained", net.state_dict(), 1.0),
                                     ("unguided", state["ema"], 1.0),
                                     ("guided", state["ema"], config.guidance)):
        net.load_state_dict(weights)
        with train.choose_precision(cpu, "auto")[1]:
            parts = train.sample_images(net, replace(config, guidance=guidance), seeds, y, cpu, 64)
            sets[title] = np.concatenate([images[:, 0] for _, images in parts]), np.array(y)
    sets["guided, wrong label"] = sets["guided"][0], (np.array(y) + 1) % config.num_classes
    for file in sorted(folder.glob("*.npz")):
        sets[file.name] = np.load(file)["arr_0"], np.load(file)["arr_1"]

    def moments(features):
        return features.mean(0), features.T.cov()

    there, scores = moments(look(real[500:])[1]), {}
    for title, (images, wanted) in sets.items():
        seen, features = look(images)
        span = images.max((1, 2)).astype(int) - images.min((1, 2))  # (N, 3)
        empty = (span < 40).all(1)
        scores[title] = ((seen == wanted) & ~empty).mean()
        distance = fid.frechet(*moments(features), *there)
        print(f"{title:24} n {len(images):5}   shows its class {scores[title]:6.1%}   empty "
              f"{empty.sum():3}   judge-FD {distance:8.3f}")
    assert scores["untrained"] < scores["unguided"] <= scores["guided"]
    assert scores["guided"] > scores["guided, wrong label"]
    if name == "shapes":
        assert scores["unseen images"] >= 0.99 and scores["guided"] >= 0.99
        assert scores["untrained"] < 0.4 and scores["guided, wrong label"] < 0.05


def read_shape(image):
    """Class, centre in pixels, and which pixels lie inside, of a drawing: all classes and sizes are
    tried, where the image differs from its edge, with the two colours that fit best. The class of
    an empty picture, whose colours are nearly one, is None."""
    size, pixels = len(image), image.reshape(-1, 3) / 255
    ticks = (np.arange(size) + 0.5) / size
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]) / 255

    def middle(weight):
        return np.array([weight.sum(0) @ ticks, weight.sum(1) @ ticks]) / weight.sum()

    seen = middle(((pixels - np.median(edge, 0)) ** 2).sum(1).reshape(size, size) + 1e-9)
    tries = []
    for label, radius in itertools.product(range(6), np.arange(0.18, 0.31, 0.02)):
        centre = seen
        for _ in range(3):  # the centre of mass of a triangle or a moon is not its centre
            drawn = train.draw_shape(list(train.SHAPES)[label], size, radius, centre, np.zeros(3),
                                     np.ones(3))[..., 0] / 255
            centre = centre + seen - middle(drawn + 1e-9)
        share = np.stack([1 - drawn.ravel(), drawn.ravel()], axis=1)
        colours = np.linalg.lstsq(share, pixels, rcond=None)[0]
        if abs(colours[1] - colours[0]).max() < 0.3:  # drawings differ by 0.65 in a channel
            label = None
        tries.append((((share @ colours - pixels) ** 2).sum(), label, centre * size, drawn == 1))
    return min(tries, key=lambda found: found[0])[1:]


@pytest.mark.skipif("SID2_RUN" not in os.environ, reason="SID2_RUN names no run")
def test_moving_shapes_go_on_as_they_must():
    """Of 200 clips that no run has seen: how far the centre in each frame is from where it must be,
    in pixels; how many frames show the class; and how far pixels inside the shape are off, in grey
    levels: the median, and the share that is off by more than 40."""
    state = train.load_checkpoint(os.environ["SID2_RUN"])
    config, n = state["config"], 200
    if config.given == 0 or state["data"] != "shapes":
        pytest.skip("only clips of shapes have a future that is known")
    length = config.given + config.frames
    data = train.open_shapes(config.image_size, 2**32, length)
    truth, labels = train.read_clips(data, range(n), [0.0] * n)
    sets = {"true future": truth, "last given frame stays": truth.copy()}
    sets["last given frame stays"][:, config.given :] = truth[:, [config.given - 1]]
    net, autocast = sid2.ResidualUViT(config).eval(), train.choose_precision(CPU, "auto")[1]
    for title, weights in ("untrained", net.state_dict()), ("samples", state["ema"]):
        net.load_state_dict(weights)
        with autocast:
            parts = train.sample_images(net, config, list(range(n)), labels.tolist(), CPU, 50, data)
            sets[title] = np.concatenate([images for _, images in parts])
    last, recognised, off_inside = {}, {}, {}
    for title, clips in sets.items():
        (off, right), errors = np.zeros((2, n, config.frames)), []
        for i, j in itertools.product(range(n), range(config.frames)):
            label, centre, inside = read_shape(clips[i, config.given + j])
            _, centres, _, light = train.shape_scene(2**32, i, length)
            off[i, j] = np.hypot(*(centre - centres[config.given + j] * config.image_size))
            right[i, j] = label == labels[i]
            errors.append(abs(clips[i, config.given + j][inside] - 255 * light).ravel())
        last[title], recognised[title] = off[:, -1].mean(), right.mean()
        errors = np.concatenate(errors)
        off_inside[title] = np.median(errors)
        print(f"{title:24} centre off by", *(f"{value:5.2f}" for value in off.mean(0)),
              f"px   class {right.mean():6.1%}   inside off by {np.median(errors):5.1f}, more than "
              f"40 {(errors > 40).mean():5.1%}")
    assert last["true future"] < 0.2 and recognised["true future"] > 0.99
    assert last["samples"] < 1 < 2.5 < last["last given frame stays"]
    assert recognised["untrained"] < 0.3 < 0.95 < recognised["samples"]
    assert off_inside["samples"] < 12


# --------------------------------------------------------------------------------------------------
# 10. fid.py

CPU = torch.device("cpu")
CHECKED = [0.5599197, 0.2772512, 0.1640582, 0.07772964, -3.909923]  # as torchvision's
WEIGHTS = os.environ.get("SID2_INCEPTION")
STATISTICS = dict(mu=np.zeros(2048), sigma=np.eye(2048))


@pytest.fixture(scope="module")
def inception():
    """Random weights, and batch norms that do something: offsets, gains and uneven statistics."""
    net, generator = fid.load_inception("random"), torch.Generator().manual_seed(1)
    for norm in (layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)):
        for values in (norm.weight, norm.running_var):
            values.data.uniform_(0.8, 1.2, generator=generator)
        for values in (norm.bias, norm.running_mean):
            values.data.uniform_(-0.1, 0.1, generator=generator)
    return net.requires_grad_(False)


def wave(count=1):
    """Images (count, 3, 299, 299) in [-1, 1] that are the same in every version of torch."""
    i = torch.arange(count * 3 * 299**2, dtype=torch.float64)
    return torch.sin(i * 0.37 + (i / 1000).square() % 6.28).float().view(count, 3, 299, 299)


def test_inception_equals_torchvisions_once_its_pools_are_patched(inception, monkeypatch):
    """An independent implementation of the graph, on the same weights. Means leave out the padding;
    Mixed_7c takes maxima. ADM: log p without the bias of fc; sFID's seven channels come last."""
    try:
        import torchvision.models.inception as theirs
    except Exception as error:  # installed for another torch, it fails in many ways
        pytest.skip(f"torchvision cannot be imported ({error})")
    net = theirs.inception_v3(weights=None, aux_logits=False, num_classes=1008, init_weights=False)
    net.eval().load_state_dict(inception.state_dict())
    last, got = [], {}
    net.Mixed_7c.register_forward_pre_hook(lambda *_: last.append(True))
    net.avgpool.register_forward_hook(lambda layer, h, out: got.update(f=out.flatten(1)))
    net.Mixed_6d.branch1x1.register_forward_hook(lambda layer, h, out: got.update(s=out[:, :7]))

    def pool(h, kernel_size, stride, padding):
        return F.max_pool2d(h, 3, 1, 1) if last else F.avg_pool2d(h, 3, 1, 1, False, False)

    patched = types.SimpleNamespace(avg_pool2d=pool, max_pool2d=F.max_pool2d, relu=F.relu)
    monkeypatch.setattr(theirs, "F", patched)
    log_p = (net(wave(2)) - net.fc.bias).log_softmax(1)
    expected = got["f"], got["s"].permute(0, 2, 3, 1).flatten(1), log_p
    for ours, other in zip(inception(wave(2)), expected):
        assert (ours - other).norm() < 1e-5 * other.norm()


def test_inception_has_the_published_tensors_and_the_features_it_had_when_checked(inception):
    """Otherwise the downloaded weights do not load. The figures pin the whole graph where there is
    no torchvision: branches, pools, eps, heads."""
    shapes = {k: v.shape for k, v in inception.state_dict().items() if "num_batches" not in k}
    assert len(shapes) == 472 and sum(map(math.prod, shapes.values())) == 23_885_392
    assert shapes["Mixed_6b.branch7x7dbl_3.conv.weight"] == (128, 128, 1, 7)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    f, s, log_p = (t[0].double() for t in inception(wave()))
    assert f.shape == (2048,) and s.shape == (2023,) and log_p.shape == (1008,)
    i = torch.arange(1, 2049, dtype=torch.float64)
    figures = [f.mean(), f @ i / 2048**2, s.mean(), s @ i[:2023] / 2048**2, log_p @ i[:1008] / 1e6]
    np.testing.assert_allclose(figures, CHECKED, rtol=1e-4)
    without_bias = (f @ inception.fc.weight.double().T).log_softmax(0)
    np.testing.assert_allclose(log_p, without_bias, rtol=1e-4)


def test_resize_is_tensorflow_1s():
    """Source place = destination * in / out; nothing centred or averaged, the edge repeats."""
    for values, expected in ([0, 1], [0, 0.5, 1, 1]), ([0, 10, 20, 90], [0, 20]), ([7], [7, 7, 7]):
        x = torch.tensor(values, dtype=torch.float32).expand(1, 1, len(values), -1)
        got = fid.resize(x, len(expected))[0, 0]
        assert (got == torch.tensor(expected)).all()
    image = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.float32)
    i, j = np.arange(299) * 5 / 299, np.arange(299) * 7 / 299
    rows = [np.interp(j, np.arange(7), row) for row in image]
    expected = np.stack([np.interp(i, np.arange(5), column) for column in np.transpose(rows)], 1)
    x = torch.from_numpy(image)[None, None]
    assert np.abs(fid.resize(x)[0, 0].numpy() - expected).max() < 1e-2
    assert torch.equal(fid.resize(wave()), wave())


def test_weights_are_loaded_if_their_hash_is_right(tmp_path, monkeypatch):
    """Checked every time, since a cache can rot: a truncated download or torchvision's file would
    give numbers that look like FID. One line says what to fetch where there is no connection."""
    right, fresh = (torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.BatchNorm2d(5))
                    for _ in range(2))
    file = tmp_path / "weights.pth"  # like the published one without num_batches_tracked
    torch.save({k: v for k, v in right.state_dict().items() if "num_batches" not in k}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file = file.rename(tmp_path / f"weights-{digest[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for name, value in dict(Inception=fresh.train, URL=file.as_uri(), SHA256=digest).items():
        monkeypatch.setattr(fid, name, value)
    for path in (None, str(file)):
        torch.nn.init.zeros_(fresh[0].weight)
        net = fid.load_inception(path)
        assert not net.training
        torch.testing.assert_close(net.state_dict(), right.state_dict(), rtol=0, atol=0)
    torch.save(right.state_dict(), next((tmp_path / "home").rglob("*.pth")))
    for url, path in (fid.URL, None), (fid.URL, "nowhere.pth"), ("http://127.0.0.1:9/a.pth", None):
        monkeypatch.setattr(fid, "URL", url)
        with pytest.raises(train.InputError, match="^no weights of Inception") as error:
            fid.load_inception(path)
        for fact in (url, "95,628,359 bytes", digest, "--inception PATH"):
            assert fact in str(error.value)


@pytest.mark.skipif(not WEIGHTS, reason=f"no weights: SID2_INCEPTION names {Path(fid.URL).name}")
def test_published_weights_load_and_tell_drawings_from_noise():
    net = fid.load_inception(WEIGHTS)
    drawings, _ = look_at(train.open_shapes(64, 0), range(32))
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    sets = [fid.measure(fid.Source("", 16, images.__getitem__), net, CPU)
            for images in (drawings[:16], drawings[16:], noise)]
    first, *others = ((s["mu"], s["sigma"]) for s in sets)
    near, far = (fid.frechet(*first, *other) for other in others)
    assert 0 < 2 * near < far and 1 < sets[2]["IS"] < 1000


def gaussian(n, d, seed=0):
    """n draws of a normal distribution whose mean and covariance depend on the seed."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d))


def moments(f):
    rows = F.pad(f.double(), (0, 1), value=1.0)
    return fid.mean_covariance(rows.T @ rows)


def test_frechet_distance_has_its_closed_forms():
    """Common axes: |mu_1 - mu_2|² + Σ (√a - √b)². Fewer images than features make covariances
    singular, where the textbook's square root gets imaginary."""
    mu, axes = gaussian(40, 1)[:, 0], torch.linalg.qr(gaussian(40, 40))[0]
    a, b = mu.abs() + 0.1, (2 - mu).abs()
    expected = mu.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    distance = fid.frechet(mu, axes * a @ axes.T, 2 * mu, axes * b @ axes.T)
    assert distance == pytest.approx(expected.item(), rel=1e-9)
    x, y = moments(gaussian(20, 100)), moments(gaussian(30, 100, seed=1))
    assert 0 <= fid.frechet(*x, *x) < 2e-6 * x[1].trace()
    assert 0 < fid.frechet(*x, *y) == pytest.approx(fid.frechet(*y, *x), rel=1e-6)


def test_frechet_distance_agrees_with_scipys_square_root():
    """The textbook form tr (S_1 S_2)^½, which other evaluators take."""
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    mu_1, S_1 = moments(gaussian(400, 60))
    mu_2, S_2 = moments(gaussian(400, 60, seed=1) * 2)
    root = np.trace(linalg.sqrtm((S_1 @ S_2).numpy()).real)
    expected = (mu_1 - mu_2).square().sum() + S_1.trace() + S_2.trace() - 2 * root
    assert fid.frechet(mu_1, S_1, mu_2, S_2) == pytest.approx(expected.item(), rel=1e-9)


def test_precision_and_recall_equal_brute_force():
    """Third neighbours, the point itself not counted; balls around the reference: precision."""
    real, fake = gaussian(60, 5).float(), gaussian(45, 5, seed=1).float() * 0.7

    def share(points, centres):
        between = np.linalg.norm(centres[:, None] - centres, axis=2)
        radii = np.sort(between, 1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres, axis=2) <= radii).any(1).mean()

    values = fid.precision(real, fake), fid.precision(fake, real)
    assert values == (share(fake.numpy(), real.numpy()), share(real.numpy(), fake.numpy()))
    assert values[0] != values[1] and 0 < min(values) and max(values) < 1


def test_kid_equals_a_direct_sum():
    """Cubic kernel with 1 / width, every pair but that of an image with itself: no bias."""
    x, y = gaussian(30, 8), gaussian(30, 8, seed=1)

    def direct(x, y):
        xx, yy, xy = ((a.numpy() @ b.numpy().T / 8 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        apart = [k[~np.eye(len(k), dtype=bool)].mean() for k in (xx, yy)]
        return sum(apart) - 2 * xy.mean()

    assert fid.kid(x, y, subsets=2) == pytest.approx(direct(x, y), rel=1e-9)
    assert fid.kid(x, y[:20]) == pytest.approx(direct(x, y[:20]), rel=0.05)  # subsets of 20


def test_metrics_of_two_sets_have_names_and_distances_their_number_of_samples():
    """FID of few images is too large: FID-5k must never be read as FID-50k. Samples that crowd
    around one image of the reference have precision 1 and a low recall."""
    real = dict(mu=torch.zeros(2), sigma=torch.eye(2), mu_s=torch.ones(3), sigma_s=torch.eye(3))
    fake = real | dict(mu_s=torch.zeros(3), features=3 + torch.arange(8)[:, None] / 1000)
    real["features"] = torch.arange(8.0)[:, None]
    flags = types.SimpleNamespace(precision_recall=True, kid=False, inception=None)
    for n, name in (50_000, "50k"), (7500, "7500"), ("?", "?"):
        metrics = fid.compare(fake | dict(n=n), real, flags)
        assert metrics == {f"FID-{name}": 0, f"sFID-{name}": 3, "precision": 1, "recall": 1 / 8}


class Shallow(torch.nn.Module):
    """Stands in for Inception where only the bookkeeping matters: pixels are the features."""

    def forward(self, x):
        f, s, p = (x[:, channel].flatten(1)[:, ::40] for channel in range(3))
        return f[:, :2048] + 1000, s[:, :2023], (3 * p[:, :1008]).log_softmax(1)


def write_images(folder, count=5, size=8):
    """Images in files of a new folder."""
    Path(folder).mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"{folder}/{i}.png")
    return images


def test_statistics_equal_direct_ones_whatever_the_batch(tmp_path):
    """Pixels reach the network as TF1's resize minus 128 over 128. Mean and covariance (ddof 1)
    though features are near 1000, where float32 sums would lose the third digit; IS over shuffled
    splits; mixed sizes; every image once."""
    images = [*write_images(tmp_path / "large", 4, 9), *write_images(tmp_path / "small", 3, 8)]
    pixels = [torch.from_numpy(image).permute(2, 0, 1)[None].float() for image in images]
    x = torch.cat([(fid.resize(h) - 128) / 128 for h in pixels])
    f, s, log_p = (t.double().numpy() for t in Shallow()(x))
    order = np.random.default_rng(0).permutation(7)
    splits = [log_p[order // 3 == k] for k in range(3)]
    scores = [(np.exp(q) * (q - np.log(np.exp(q).mean(0)))).sum(1).mean() for q in splits]
    for batch in (1, 3):
        got = fid.measure(fid.open_source(tmp_path), Shallow(), CPU, batch, keep=5, split=3)
        for h, mu, sigma in (f, "mu", "sigma"), (s, "mu_s", "sigma_s"):
            np.testing.assert_allclose(got[mu], h.mean(0), rtol=1e-9, atol=1e-7)
            np.testing.assert_allclose(got[sigma], np.cov(h.T), rtol=1e-4, atol=1e-7)
        assert got["IS"] == pytest.approx(np.exp(scores).mean(), rel=1e-6) and got["n"] == 7
        kept = np.argsort(order)[:5]
        np.testing.assert_array_equal(got["features"], f[kept].astype(np.float16))


def test_folder_and_npz_give_the_same_pixels_as_rgb_at_any_size(tmp_path, monkeypatch):
    """PNG files and arr_0, stored or deflated, in whole or in part, are one set of images."""
    monkeypatch.chdir(tmp_path)
    images = write_images("a")
    np.savez("b.npz", arr_0=images)
    np.savez_compressed("c.npz", arr_0=images)
    for name in ("a", "b.npz", "c.npz"):
        source, numbers = fid.open_source(name), np.array([1, 3, 4])
        assert source.count == 5 and np.array_equal(source.read(numbers), images[numbers])


def test_fid_sees_the_pictures_that_training_sees(tmp_path):
    """Turned, transparent, of 16 bits: a perfect model must have distance 0 to its own data."""
    turned, rng = Image.Exif(), np.random.default_rng(0)
    turned[0x112] = 6
    for i, mode in enumerate(("RGB", "RGBA", "LA", "I;16", "P")):
        pixels = Image.fromarray(rng.integers(0, 256, (8, 12, 4), dtype=np.uint8))
        put(tmp_path, f"{i}.png")
        pixels.convert(mode).save(tmp_path / f"{i}.png", exif=turned)
    trained, _ = look_at(train.open_data(str(tmp_path), 8, seed=0), range(5))
    assert np.array_equal(fid.open_source(tmp_path, crop=8).read(np.arange(5)), trained)
    assert {image.shape for image in fid.open_source(tmp_path).read(np.arange(5))} == {(12, 8, 3)}


def make_light(patch):
    """Exchanges what takes seconds: the network, and the eigenvalues of 2,048 features."""
    whole, some = fid.frechet, slice(64)
    patch(fid, "load_inception", lambda path: Shallow())
    patch(fid, "frechet", lambda a, A, b, B: whole(a[some], A[some, some], b[some], B[some, some]))


@pytest.fixture
def score(tmp_path, monkeypatch):
    """Runs `python fid.py ...`, made light, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    make_light(monkeypatch.setattr)
    return lambda *args: run(fid, *args, "--inception", "random", "--device", "cpu")


def test_script_saves_statistics_and_scores_against_them(score):
    """The README's commands, on images that are also the reference. ADM's files have images too:
    precision and recall are of these, FID of mu and sigma."""
    write_images("real/nested", 5, 12)
    assert score("real", "--save-stats", "ref.npz", "--crop", 8)[0] == 0
    with np.load("ref.npz") as arrays:
        assert arrays["mu"].shape == (2048,) and arrays["n"] == 5
    crops = [train.centre_crop(Image.open(f"real/nested/{i}.png"), 8) for i in range(5)]
    np.savez_compressed("samples.npz", arr_0=np.stack(crops))
    np.savez("adm.npz", **STATISTICS, arr_0=np.stack(crops))
    code, out, _ = score("samples.npz", "ref.npz")
    report = json.loads(Path("samples.npz.fid.json").read_text())
    assert code == 0 and "FID is biased" in out and report["settings"]["weights"] == "random"
    result = report["results"]["ref.npz"]
    assert list(result) == ["random-FID-5", "random-sFID-5", "random-IS-5"]
    assert result["random-FID-5"] < 1e-4  # the reference itself

    assert score("adm.npz", "adm.npz", "--precision-recall", "--kid", "--out", "b.json")[0] == 0
    result = json.loads(Path("b.json").read_text())["results"]["adm.npz"]
    assert list(result) == [f"random-{k}" for k in "FID-5 IS-5 precision recall KID".split()]
    assert result["random-precision"] == result["random-recall"] == 1
    assert result["random-FID-5"] > 20 and result["random-KID"] < 0  # without bias, on one set


def test_notes_name_sizes_that_differ_and_each_set_once(score):
    write_images("small", 5, 8)
    write_images("large", 5, 12)
    code, out, _ = score("small", "large", "small", "large")
    notes = re.findall("^note: (.*)$", out, re.M)
    assert code == 0 and len(notes) == 3
    assert "small has images of 8 x 8 pixels, large of 12 x 12" in notes
    report = json.loads(Path("small.fid.json").read_text())
    assert list(report["results"]) == ["large", "small"] and report["notes"] == notes


def test_two_processes_give_the_numbers_of_one(score, tmp_path):
    """Eleven images, some of another size, are shared out: none twice, none missing."""
    write_images("samples/large", 8, 9)
    write_images("samples/small", 3)
    np.savez("ref.npz", arr_0=write_images("c"))
    (tmp_path / "script.py").write_text(f"""
import sys
sys.path[:0] = {str(ROOT)!r}, {str(Path(__file__).parent)!r}
import fid, train
from {Path(__file__).stem} import make_light
make_light(setattr)
train.guarded(fid.main)
""")
    command = ("samples", "ref.npz", "--batch", 2, "--precision-recall", "--kid")
    assert score(*command, "--out", "one.json")[0] == 0
    torchrun(tmp_path / "script.py", *command, "--out", "two.json", "--inception", "random",
             "--device", "cpu")
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    assert two["results"]["ref.npz"] == pytest.approx(one["results"]["ref.npz"], rel=1e-6)
    assert one["images"] == two["images"] == {"samples": 11, "ref.npz": 5}


IMAGES = np.zeros((5, 8, 8, 3), np.uint8)
FILES = {
    "keys.npz": dict(images=IMAGES),
    "grey.npz": dict(arr_0=IMAGES[..., 0]),
    "planes.npz": dict(arr_0=IMAGES.transpose(0, 3, 1, 2)),
    "mu.npz": dict(arr_0=IMAGES, mu=np.zeros(2048)),
    "narrow.npz": dict(mu=np.zeros(192), sigma=np.eye(192)),
    "text.npz": dict(mu=np.array(["one"] * 2048), sigma=np.eye(2048)),
    "nan.npz": dict(mu=np.zeros(2048), sigma=np.full((2048, 2048), np.nan)),
    "stats.npz": STATISTICS,
}


@pytest.mark.parametrize("args, message", [
    ("nowhere good", "nowhere does not exist or is no npz"),
    ("few good", "few has 3 images"),
    ("keys.npz good", "keys.npz holds images uint8 (5, 8, 8, 3); wanted: arr_0 uint8 (N, H, W, 3)"),
    ("mu.npz good", "mu.npz holds mu float64 (2048,), arr_0 uint8 (5, 8, 8, 3); wanted"),
    ("grey.npz good", "grey.npz holds arr_0 uint8 (5, 8, 8); wanted: arr_0 uint8 (N, H, W, 3)"),
    ("planes.npz good", "planes.npz holds arr_0 uint8 (5, 3, 8, 8); wanted: arr_0"),
    ("good/0.png good", "0.png does not exist or is no npz: give a folder of images, or an npz"),
    ("good narrow.npz", "mu is float64 (192,); wanted: finite numbers (2048,)"),
    ("good text.npz", "mu is <U3 (2048,); wanted: finite numbers (2048,)"),
    ("good nan.npz", "sigma is float64 (2048, 2048); wanted: finite numbers (2048, 2048)"),
    ("good stats.npz --kid", "stats.npz holds statistics alone"),
    ("stats.npz --save-stats a.npz", "stats.npz holds statistics alone"),
    ("good good --batch 0", "--batch must be at least 1, got 0"),
    ("good", "give SAMPLES REFERENCE, or DATA --save-stats OUT.npz"),
    ("good few --out stats.npz", "stats.npz exists: remove it, or give another --out"),
    ("few --save-stats stats.npz", "stats.npz exists: remove it, or give another --save-stats"),
    ("good --save-stats a.npz --out ./a.npz", "--out and --save-stats both name ./a.npz"),
    ("good good --out nowhere/a.json", "cannot write nowhere/a.json"),
    ("broken good", "broken/0.png cannot be read as an image"),
    ("run good", "run is a run of train.py: `python sample.py run --format npz`"),
])
def test_bad_input_ends_with_one_line_and_changes_nothing(score, tmp_path, args, message):
    """Exit code 2; the line names what came and what is wanted."""
    for folder, count in dict(good=5, few=3, run=5, broken=5).items():
        write_images(folder, count)
    halve("broken/0.png")
    for name in FILES.keys() & set(args.split()):
        np.savez(name, **FILES[name])
    Path("run/checkpoint.pt").touch()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert message in error_line(*score(*args.split()))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

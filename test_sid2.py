"""The method as true sentences, in the order of sid2.py; then the scripts, run as users run them.

    python -m pytest

Nothing is downloaded. What needs a GPU skips where there is none.
"""

import contextlib
import copy
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import types
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import fid
import sample
import sid2
import train

if "OMP_NUM_THREADS" not in os.environ:  # for networks so small more would only wait
    torch.set_num_threads(1)

ROOT = Path(__file__).parent
SOURCE = (ROOT / "sid2.py").read_text("utf-8")
CPU = torch.device("cpu")
TINY = sid2.Config(8, 1, (8, 16), "RT", depth=(1, 1), middle=1, width=16, head_width=8,
                   dropout=0.0, num_classes=3, bias=1.0, steps=4, batch=8, lr=1e-2,
                   warmup=2, sample_steps=3)
THREE_LEVELS = replace(TINY, channels=(8, 16, 16), blocks="RTT")
CLIPS = replace(TINY, frames=3, given=2)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(config=TINY, scale=0.3):
    """A network without zero layers: all parameters are random, so that every line matters."""
    torch.manual_seed(0)
    net = sid2.ResidualUViT(config).eval()
    for p in net.parameters():
        p.data += scale * torch.randn_like(p)
    return net


# --------------------------------------------------------------------------------------------------
# 1. Configuration


def test_every_default_says_where_it_comes_from():
    """In brackets, in the comment beside it, which is also the help of its flag."""
    sources = re.findall(r"^    \[(\S+)\]", SOURCE, re.M)
    lines = re.findall(r"^    (\w+): (.*?)  # (\S.*)$", SOURCE, re.M)
    assert [name for name, _, _ in lines] == [field.name for field in fields(sid2.Config)]
    for name, code, comment in lines:
        tags = re.findall(r"\[([A-Za-z]\S*)\]", comment)
        assert set(tags) <= set(sources) and (tags or " = " not in code), name


def gmac_of_blocks(config):
    """R: two 3x3 convolutions. T: MLP 8, qkv 3, projection 1; and q·k, and its weights times v."""
    gmac = 0
    for level, (C, kind) in enumerate(zip(config.channels, config.blocks)):
        N = config.frames * (config.image_size // config.patch_size >> level) ** 2
        number = config.middle if level == len(config.channels) - 1 else sum(config.depth)
        gmac += number * (18 * C * C * N if kind == "R" else 12 * C * C * N + 2 * N * N * C) / 1e9
    return gmac


@pytest.mark.parametrize("name", sid2.PUBLISHED)
def test_presets_are_the_papers_networks(name):
    """Their blocks alone, by closed formulas, have the published GMAC, and all of the network has
    the published number of parameters."""
    gmac, parameters, _ = sid2.PUBLISHED[name]
    assert gmac_of_blocks(sid2.PRESETS[name]) == pytest.approx(gmac, rel=0.005)
    with torch.device("meta"):
        net = sid2.ResidualUViT(sid2.PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", sid2.PUBLISHED)
def test_the_guidance_interval_goes_with_the_size_as_the_noise_does(name):
    """The cited interval, 0.28 < sigma / alpha <= 2.90, belongs to 64 x 64 latents. An image of S
    pixels, pooled to 64, has 2 log(S / 64) more logsnr: its own interval lies that much lower."""
    config = sid2.PRESETS[name]
    for end, noise in zip(config.interval, (2.90, 0.28)):
        pooled = end + 2 * math.log(config.image_size / 64)
        assert pooled == pytest.approx(-2 * math.log(noise), abs=5e-3)


def test_the_table_of_presets_puts_what_is_counted_beside_what_is_published(capsys, monkeypatch):
    """Of two, to save time. Blocks have more than 98 % of all operations, in clips too."""
    shown = {name: sid2.PRESETS[name] for name in ("imagenet512_p2", "kinetics600_p2")}
    monkeypatch.setattr(sid2, "PRESETS", shown)
    sid2.main()
    _, *rows = capsys.readouterr().out.splitlines()
    assert re.match("imagenet512_p2 +400.1 +397 +656.42 +653 +1.48 - 1.50 +-3 +32-512 ", rows[0])
    for row, config in zip(rows, shown.values()):
        assert 0.98 < gmac_of_blocks(config) / float(row.split()[3]) < 1


# --------------------------------------------------------------------------------------------------
# 2. Noise process

T = torch.linspace(0, 1, 201)
EXTREMES = torch.tensor([-20.0, -10, -1, 0, 3, 10, 17, 25])


def test_the_schedule_runs_from_plus_ten_to_minus_ten_plus_its_shift():
    """The shift is that to noise for 32 pixels when nothing else is said."""
    for size, low in [(64, 64), (512, 32), (16, 32), (128, 64)]:
        logsnr, _ = sid2.schedule(T, size, low)
        shift = 2 * math.log(low / size)
        assert logsnr[0].item() == pytest.approx(10, abs=2e-5)
        assert logsnr[-1].item() == pytest.approx(-10 + shift, abs=1e-3)
        assert logsnr[100].item() == pytest.approx(shift / 2, abs=1e-5)
        assert (logsnr.diff() < 0).all()
    angle = 0.75 * math.atan(math.exp(-5)) + 0.25 * math.atan(math.exp(5))
    cosine = sid2.schedule(torch.tensor(0.25), 64, 64)[0].item()
    assert cosine == pytest.approx(-2 * math.log(math.tan(angle)), rel=1e-6)
    assert_close(sid2.schedule(T, 512), sid2.schedule(T, 512, 32), rtol=0, atol=0)


def test_the_slope_is_the_derivative():
    t = T.clone().requires_grad_()
    for size, low in [(64, 64), (512, 32), (64, 128)]:
        logsnr, slope = sid2.schedule(t, size, low)
        (derivative,) = torch.autograd.grad(logsnr.sum(), t)
        assert_close(slope, derivative, rtol=1e-4, atol=1e-4)


def test_the_shift_is_average_pooling():
    """The argument that fixes sign and size of the shift: pooling 2x2 quarters the variance of the
    noise, which is + log 4 in logsnr. So the noisy end of 128 px, pooled, is that of 64 px."""
    (at_128, _), (at_64, _) = sid2.schedule(T, 128, 64), sid2.schedule(T, 64, 64)
    assert_close(at_128 + T * math.log(4), at_64, rtol=1e-5, atol=1e-5)
    alpha, sigma = sid2.alpha_sigma(at_128[-1])
    noise = sigma * normal(64, 3, 128, 128)
    logsnr_pooled = 2 * math.log(alpha.item() / F.avg_pool2d(noise, 2).std().item())
    assert logsnr_pooled == pytest.approx(at_64[-1].item(), abs=0.01)


def test_the_process_is_float32_under_autocast():
    """In bfloat16 logsnr is wrong by more than a nat."""
    with torch.autocast("cpu", torch.bfloat16):
        logsnr, slope = sid2.schedule(T.bfloat16(), 64, 32)
        alpha, sigma = sid2.alpha_sigma(logsnr.bfloat16())
    assert {a.dtype for a in (logsnr, slope, alpha, sigma)} == {torch.float32}
    t, u_0, u_1 = torch.linspace(0, 1, 100_001), math.atan(math.exp(-5)), math.atan(math.exp(5))
    in_bfloat16 = -2 * torch.log(torch.tan(u_0 + t.bfloat16() * (u_1 - u_0)))
    exact, _ = sid2.schedule(t, 64, 64)
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

    b, (logsnr, slope) = -3.0, sid2.schedule(T[20:180:20], 512, 32)
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
    for any path between the ends. Here along two."""
    b, N = 2.0, 20_001
    t = torch.linspace(0, 1, N)
    exact = 0.5 * (math.log1p(math.exp(b + 10)) - math.log1p(math.exp(b - 10)))
    straight = 10 - 20 * t, torch.full((N,), -20.0)
    for logsnr, slope in (sid2.schedule(t, 64, 64), straight):
        v_error = 1 / sid2.alpha_sigma(logsnr)[0]  # d eps = alpha d v = 1
        loss = sid2.sigmoid_loss(v_error, torch.zeros(N, 1, 1, 1), logsnr, slope, b)
        mean = torch.trapezoid(loss.double(), t.double())
        assert mean.item() == pytest.approx(exact, rel=1e-4)


def test_times_cover_the_interval_evenly():
    t = sid2.low_discrepancy_times(64, 0.7391)
    assert 0 <= t.min() <= t.max() < 1
    assert_close(t.sort().values.diff(), torch.full((63,), 1 / 64), rtol=1e-4, atol=1e-6)
    assert t[[0, 16]].tolist() == pytest.approx([0.7391, 0.9891])


@pytest.mark.parametrize("noise_low", [32, 16])
def test_the_training_loss_is_its_pieces(noise_low):
    """Any callable will do as the network. It sees z, logsnr and y, once."""
    config = replace(TINY, noise_low=noise_low, bias=-1.0)
    x, eps, t = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1), torch.tensor([0.0, 0.3, 0.9, 1.0])
    seen = []

    def net(z, logsnr, y):
        seen.append((z, logsnr, y))
        return torch.sin(z + y[:, None, None, None]) * logsnr[:, None, None, None]

    y = torch.arange(4)
    loss = sid2.training_loss(net, config, x, y, t, eps)
    logsnr, slope = sid2.schedule(t, 8, noise_low)
    alpha, sigma = (l.sigmoid().sqrt()[:, None, None, None] for l in (logsnr, -logsnr))
    z, v = alpha * x + sigma * eps, alpha * eps - sigma * x
    assert_close(seen, [(z, logsnr, y)], rtol=0, atol=0)
    assert torch.equal(loss, sid2.sigmoid_loss(net(z, logsnr, y), v, logsnr, slope, -1.0))


# --------------------------------------------------------------------------------------------------
# 4. Network

INPUT = normal(2, 3, 8, 8), torch.tensor([0.0, 1.0]), torch.tensor([0, 1])


def layer_norm(h, gain):
    h = h - h.mean(-1, keepdim=True)
    return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def test_a_fresh_trunk_is_the_identity_bit_for_bit():
    """And the head answers zero: training starts from v_hat = 0. Positions start small."""
    for config in (TINY, replace(TINY, blocks="TT"), replace(THREE_LEVELS, blocks="RRT")):
        net, h, c = sid2.ResidualUViT(config), normal(2, 8, 8, 8), normal(2, 16)
        assert torch.equal(net.trunk(h, c), h)
        assert torch.equal(net(*INPUT), torch.zeros(2, 3, 8, 8))
        assert not torch.equal(shaken(config).trunk(h, c), h)
        assert -0.05 < net.position.min() < 0 < net.position.max() < 0.05


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


def attended(attention, h):
    """Attention by its formula: q and k normalised per head, all weights written out."""
    B, H, W, C = h.shape
    D = attention.head_width
    qkv = attention.qkv(layer_norm(h, attention.norm.gain)).reshape(B, H * W, 3, C // D, D)
    q = layer_norm(qkv[:, :, 0], attention.norm_q.gain)
    k = layer_norm(qkv[:, :, 1], attention.norm_k.gain)
    weights = torch.einsum("bihd,bjhd->bhij", q, k).div(math.sqrt(D)).softmax(-1)
    branch = torch.einsum("bhij,bjhd->bihd", weights, qkv[:, :, 2])
    return attention.project(branch.reshape(B, H, W, C))


def test_a_transformer_block_is_its_formula():
    """MLP before attention; c in the hidden layer of the MLP only."""
    block, h, c = shaken().middle[0], normal(2, 3, 3, 16), normal(2, 16)
    mlp = block.mlp
    scale, offset = mlp.film(c)[:, None, None].split(64, -1)
    hidden = F.silu(mlp.dense1(layer_norm(h, mlp.norm.gain))) * (1 + scale) + offset
    h_mlp = h + mlp.dense2(hidden)
    assert_close(block(h, c), h_mlp + attended(block.attention, h_mlp), rtol=1e-4, atol=1e-4)


def test_a_norm_has_mean_0_and_mean_square_1_in_each_pixel():
    """Times its gain. It answers in the type that it was asked in."""
    norm, h = sid2.Norm(64), 3 + 5 * normal(2, 4, 4, 64)
    assert_close(norm(h).mean(-1), torch.zeros(2, 4, 4), rtol=0, atol=1e-6)
    assert_close(norm(h).square().mean(-1), torch.ones(2, 4, 4))
    assert_close(norm(1e-4 * h), layer_norm(1e-4 * h, 1))  # eps is 1e-6
    norm.gain.data = normal(64, seed=1)
    assert_close(norm(h), layer_norm(h, norm.gain))  # which compares the types too
    assert_close(norm(h.bfloat16()), layer_norm(h, norm.gain).bfloat16(), rtol=0.02, atol=0.02)


def test_a_norm_keeps_bfloat16_under_the_autocast_of_cuda():
    """Autocast alone would answer in float32 and promote the whole residual stream. Fake tensors
    are dispatched like real ones, so it shows without a GPU."""
    enabled = torch.is_autocast_enabled("cuda")
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        norm, h = sid2.Norm(128), torch.empty(2, 4, 4, 128, dtype=torch.bfloat16)
        try:
            torch.set_autocast_enabled("cuda", True)
            assert F.layer_norm(h, (128,)).dtype == torch.float32  # the trap
            assert norm(h).dtype == torch.bfloat16
        finally:
            torch.set_autocast_enabled("cuda", enabled)


def test_the_condition_tells_noise_levels_and_classes_apart():
    """Neighbours among 512 steps, at least 0.012 nats apart, and the null class have vectors of
    their own."""
    logsnr, _ = sid2.schedule(torch.linspace(0, 1, 513), 64, 64)
    assert logsnr.diff().abs().min().item() == pytest.approx(0.012, abs=5e-4)
    condition = sid2.Condition(64, 3)
    c = condition(torch.tensor([0.0, 0.012, 0.0, 0.0]), torch.tensor([0, 0, 1, 3]))
    assert all((c[0] - other).abs().max() > 1e-3 for other in c[1:])
    assert len(condition.label.weight) == 3 + 1
    for logsnr, place in ((-20.0, 0.0), (0.0, 0.5), (10.0, 0.75)):  # of [-20, 20]
        phase = place * 10 ** torch.linspace(3, -1, 32)
        dense = condition.dense1(torch.cat([phase.sin(), phase.cos()]))
        (c,) = condition(torch.tensor([logsnr]), torch.tensor([2]))
        assert_close(c, F.silu(condition.dense2(F.silu(dense)) + condition.label.weight[2]))


@pytest.mark.parametrize("config", [
    TINY, replace(TINY, num_classes=0, blocks="TT", patch_size=2), replace(CLIPS, frames=2)],
    ids=["RT", "TT", "clips"])
def test_no_parameter_is_dead(config):
    """Zero layers wake one after the other: after three steps every parameter has a gradient and
    has moved."""
    torch.manual_seed(0)
    net = sid2.ResidualUViT(config)
    before = [p.clone() for p in net.parameters()]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    y, target = torch.arange(8) % (config.num_classes + 1), normal(8, 3, 8, 8, seed=9)
    given = normal(4, 6, 8, 8) if config.given else None
    for step in range(4):
        optimizer.zero_grad()
        v_hat = net(normal(8, 3, 8, 8, seed=step), normal(8), y, given)
        (v_hat - target).square().mean().backward()
        optimizer.step()
    for (name, p), old in zip(net.named_parameters(), before):
        assert p.grad.any() and not torch.equal(p, old), name


def test_no_example_sees_its_batch_neighbours():
    """But its own logsnr and label matter."""
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
    ("RT", 1, (4, 4, 16)), ("TT", 2, (4, 4, 8)), ("RRT", 1, (2, 2, 24)), ("RR", 1, None)])
def test_the_position_embedding_stands_where_transformers_begin(blocks, patch, shape):
    """It may be nowhere, or at the top; what it does below is in the test of the skip."""
    net = shaken(replace(TINY, blocks=blocks, channels=(8, 16, 24)[:len(blocks)], patch_size=patch))
    shapes = {name: p.shape for name, p in net.named_parameters()}
    assert shapes.get("position") == shape
    if blocks == "TT":
        before = net(*INPUT)
        net.position.data += 1
        assert not torch.allclose(net(*INPUT), before, atol=1e-3)


def test_dropout_acts_in_transformer_blocks_and_in_training_only():
    net = shaken(replace(THREE_LEVELS, dropout=0.5))
    holders = {type(module) for module in net.modules()
               if any(isinstance(child, torch.nn.Dropout) for child in module.children())}
    assert holders == {sid2.MLP}
    assert torch.equal(net(*INPUT), net(*INPUT))
    net.train()
    assert not torch.equal(net(*INPUT), net(*INPUT))


def test_checkpointing_computes_blocks_again_and_changes_nothing_else():
    """Those of the levels named, and in training only."""
    gradients = []
    for levels in ([], [0], [1], [2], [0, 1, 2]):
        net, calls = shaken(replace(THREE_LEVELS, dropout=0.5)), []
        net.checkpointing = levels
        of_level = [[*net.blocks_down[i], *net.blocks_up[i]] for i in (0, 1)] + [net.middle]
        for level, blocks in enumerate(of_level):
            for block in blocks:
                block.register_forward_pre_hook(lambda *_, level=level: calls.append(level))
        net(*INPUT).sum().backward()
        assert sorted(calls) == [0, 0, 1, 1, 2]
        calls.clear()
        net.zero_grad()
        net.train()
        torch.manual_seed(0)
        net(*INPUT).square().sum().backward()
        assert Counter(calls) == {n: len(of_level[n]) * (2 if n in levels else 1) for n in range(3)}
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
    graphs, y, seeds = [], torch.tensor([0, 1]), list(range(2 // frames))
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


def logsnr_grid(S):
    return sid2.schedule(torch.arange(S, 0, -1) / S, 32, 32)[0]


def steps_of(net, seeds, labels, S, null=9, size=4, **changes):
    """Every step, on the grid above: unshifted, and not guided if nothing else is said."""
    config = sid2.Config(size, 1, (8,), "R", num_classes=null, noise_low=size, sample_steps=S)
    config = replace(config, **dict(guidance=1.0, interval=(-math.inf, math.inf)) | changes)
    return list(sid2.trajectory(net, config, seeds, torch.tensor(labels)))


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


def test_small_steps_keep_their_noise():
    """1 - r at a step of 1e-4 nats is right to six digits."""
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


def test_x_hat_is_clipped_before_the_next_step_uses_it():
    net, l = exact_net([-3.0, 3.0], 1.0), logsnr_grid(5)
    steps = steps_of(net, [7, 8], [0, 1], 5, sampler="ddim")
    for i, (z, x_hat) in enumerate(steps):
        alpha, sigma = sid2.alpha_sigma(l[i])
        unclipped = alpha * z - sigma * net(z, l[i], torch.tensor([0, 1]))
        assert_close(x_hat, unclipped.clamp(-1, 1))
        if i < 4:
            assert_close(steps[i + 1][0], sid2.ddim_step(z, x_hat, l[i], l[i + 1]))
    assert len(steps) == 5
    assert unclipped.min() < -1 and unclipped.max() > 1


def test_guidance_extrapolates_from_the_null_class():
    """x_null + w (x_y - x_null): with one point per class, the sample at scale w is that
    combination of points."""
    for w in (0.0, 0.5, 2.0, 3.0):
        _, x = steps_of(exact_net([0.1, 0.2, -0.1], 0.0), [0, 1], [0, 1], 4, null=2, guidance=w)[-1]
        expected = [-0.1 + w * 0.2, -0.1 + w * 0.3]
        assert x.mean((1, 2, 3)).tolist() == pytest.approx(expected, abs=1e-4)


def test_guidance_costs_a_second_pass_inside_its_interval_only():
    """Exactly S (1 + f) passes for a fraction f of guided steps. The lower end belongs to the
    interval, the upper does not. Without classes nothing is guided."""
    S, grid, passes = 10, logsnr_grid(10), []

    def net(z, logsnr, y):
        assert len(z) == len(logsnr) == len(y)
        passes.append((logsnr[0].item(), y.tolist()))
        return torch.zeros_like(z)

    def cost(labels=(4, 5), **kwargs):
        passes.clear()
        steps_of(net, [0, 1], labels, S, **kwargs)
        assert [logsnr for logsnr, _ in passes] == pytest.approx(grid.tolist())
        return sum(len(y) for _, y in passes) / 2

    assert cost() == cost(guidance=3.0, interval=(50, 60)) == S
    assert cost((0, 0), guidance=3.0, null=0) == S
    assert cost(guidance=3.0) == cost(guidance=0.0) == 2 * S
    assert cost((0, 0), guidance=3.0, null=1) == 2 * S
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
    assert torch.equal(x_hat[1], x_hat[3])  # the same seed and label


@pytest.mark.parametrize("gamma, noise_low", [(0.9, 16), (0.2, 32)])
def test_a_sample_is_the_last_x_hat_of_the_configured_steps(gamma, noise_low):
    """The grid is t = 1, 1 - 1/S, ..., 1/S, of the configured noise."""
    config = replace(TINY, sample_steps=5, gamma=gamma, noise_low=noise_low)
    net, y = shaken(config, scale=0.1), torch.tensor([1])
    logsnr, _ = sid2.schedule(torch.tensor([1, 0.8, 0.6, 0.4, 0.2]), 8, noise_low)
    assert_close(sid2.sampling_grid(config)[0], logsnr)
    steps, x = list(sid2.trajectory(net, config, [3], y)), sid2.sample(net, config, [3], y)
    assert len(steps) == 5 and torch.equal(x, steps[-1][1]) and not x.requires_grad
    first, second = normal(2, 3, 8, 8, seed=3).split(1)
    assert_close(steps[0][0], first)
    assert_close(steps[1][0], sid2.ddpm_step(*steps[0], *logsnr[:2], gamma, second))


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="ddpm or ddim.*euler"):
        sid2.sample(shaken(), replace(TINY, sampler="euler"), [0], torch.tensor([0]))


# --------------------------------------------------------------------------------------------------
# 6. Averaging


def test_the_average_starts_fast_and_ends_at_its_decay():
    """The decay is min(d, (1 + n) / (10 + n)): 0.1, 2/11, ... then d."""
    net, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    net.load_state_dict(dict(weight=torch.tensor([[1.0]]), bias=torch.tensor([-2.0])))
    for n in (0, 1, 10, 70, 90, 10_000):
        average.load_state_dict(dict(weight=torch.tensor([[0.0]]), bias=torch.tensor([3.0])))
        sid2.ema_update(average, net, n, 0.9)
        decay = min(0.9, (1 + n) / (10 + n))
        assert average.weight.item() == pytest.approx(1 - decay, rel=1e-5)
        assert average.bias.item() == pytest.approx(3 * decay - 2 * (1 - decay), rel=1e-5)
    assert (net.weight.item(), net.bias.item()) == (1, -2)


# --------------------------------------------------------------------------------------------------
# 7. All of it together: it learns


def test_training_and_sampling_learn_a_distribution_that_is_known():
    """Pictures of two halves, each dark or light. The upper is light in a quarter of class 0 and in
    three quarters of class 1; the lower is like it in 80 %. 600 steps learn both, and guidance
    makes each class more typical. With noise for 1 pixel the schedule's end at t = 1 is shifted by
    -5.5 nats; with the shift's sign wrong the pictures would show through its noise."""
    config = sid2.Config(16, 4, (64, 64), "RT", depth=(1, 1), middle=1, width=64, head_width=32,
                         dropout=0.0, num_classes=2, noise_low=1, sample_steps=32, batch=64)
    colours, chance = torch.tensor([-0.4, 0.8]), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = sid2.ResidualUViT(config)
    average = copy.deepcopy(net).eval()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3, config.betas, config.adam_eps)
    for step in range(600):
        y = torch.randint(2, (64,), generator=chance)
        top = torch.rand(64, generator=chance) < 0.25 + 0.5 * y
        bottom = top ^ (torch.rand(64, generator=chance) < 0.2)
        halves = colours[torch.stack([top, bottom], dim=1).long()]  # (64, 2)
        x = halves.repeat_interleave(8, dim=1)[:, None, :, None].expand(-1, 3, 16, 16)
        y = y.masked_fill(torch.rand(64, generator=chance) < config.label_dropout, 2)
        t = sid2.low_discrepancy_times(64, torch.rand((), generator=chance).item())
        eps = torch.randn(x.shape, generator=chance)
        optimizer.zero_grad()
        sid2.training_loss(net, config, x, y, t, eps).mean().backward()
        optimizer.step()
        sid2.ema_update(average, net, step, 0.98)

    def draw(count, guidance):
        """Shares of light upper halves and of equal halves, for each class."""
        y = torch.arange(2).repeat_interleave(count)
        changed = replace(config, guidance=guidance, interval=(-99, 99))
        x = sid2.sample(average, changed, range(2 * count), y)
        halves = x.unflatten(2, (2, 8))  # (B, 3, 2, 8, 16)
        light = halves.mean((1, 3, 4)) > 0.2  # (B, 2)
        error = (halves - colours[light.long()][:, None, :, None, None]).abs().mean((1, 2, 3, 4))
        assert (error < 0.1).float().mean() > 0.9  # they show one of the four pictures
        top, bottom = light.view(2, count, 2).unbind(2)
        return top.float().mean(1).tolist(), (top == bottom).float().mean(1).tolist()

    light, alike = draw(300, guidance=1.0)
    assert light == pytest.approx([0.25, 0.75], abs=0.12)
    assert alike == pytest.approx([0.8, 0.8], abs=0.12)
    (first, second), _ = draw(100, guidance=3.0)
    assert first < 0.15 and second > 0.85


# --------------------------------------------------------------------------------------------------
# 8. Clips: `frames` neighbours in the batch, which go on from `given` frames


def test_a_frame_sees_all_frames_of_its_clip_and_none_of_another():
    """The given frames too."""
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


def test_a_vector_tells_the_frames_of_a_clip_apart_but_not_clips():
    net, y, zero = shaken(CLIPS), torch.zeros(6).long(), torch.zeros(6)
    z, given = normal(1, 3, 8, 8).repeat(6, 1, 1, 1), normal(1, 6, 8, 8).repeat(2, 1, 1, 1)
    out = net(z, zero, y, given)
    assert_close(out[:3], out[3:])
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    assert sid2.ResidualUViT(CLIPS).condition.frame.std() > 0.5  # from the first step on
    net.condition.frame.data[:] = 0
    out = net(z, zero, y, given)
    assert_close(out, out[:1].expand_as(out))


def test_at_a_guided_step_both_copies_of_a_clip_go_on_from_its_own_given_frames():
    net, y, given = shaken(CLIPS), torch.tensor([0, 0, 0, 1, 1, 1]), normal(2, 6, 8, 8)
    z = normal(12, 3, 8, 8, seed=1)
    labels, logsnr = torch.cat([y, torch.full_like(y, 3)]), torch.zeros(12)
    both = net(z, logsnr, labels, given)
    for part in slice(0, 6), slice(6, 12):
        assert_close(both[part], net(z[part], logsnr[part], labels[part], given))


def test_a_clip_has_one_seed_for_all_its_frames():
    y, given = torch.zeros(6).long(), normal(2, 6, 8, 8)
    net = functools.partial(shaken(CLIPS, scale=0.1), given=given)
    z, _ = next(sid2.trajectory(net, CLIPS, [5, 6], y))
    assert torch.equal(z[3:], normal(3, 3, 8, 8, seed=6))


def test_clips_follow_the_exact_distribution_given_their_first_frames():
    """Each pixel over four frames is normal with a known covariance, so the best network is a
    matrix, and the mean and covariance of frames 3 and 4, given 1 and 2, are known. All the way
    through eight bits. With 512 steps the sampler's covariance is 2 % off here."""
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
    ((_, images),) = train.sample_images(exact, config, [*range(clips)], [0] * clips, CPU, clips,
                                         data)
    assert np.array_equal(images[:, :2], whole[:, :2])
    values = train.from_uint8(torch.from_numpy(images)).double().transpose(0, 1).flatten(1)
    first, drawn = values[:2], values[2:]
    got = drawn @ first.T @ (first @ first.T).inverse()  # regression on the given frames
    assert_close(got, slope, rtol=0.03, atol=0)
    assert_close(torch.cov(drawn - got @ first), covariance, rtol=0.03, atol=0)


# --------------------------------------------------------------------------------------------------
# 9. The file, read as a text

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
    namespace = {"__name__": "pasted"} | dict(zip("xty", INPUT))
    exec("\n".join([head, *sections[:last], *USES[:last]]), namespace)


def test_the_module_stays_short():
    assert len(SOURCE.splitlines()) <= 585
    assert max(map(len, SOURCE.splitlines())) <= 100


# --------------------------------------------------------------------------------------------------
# HERE THE METHOD ENDS. 10. The scripts, run as a user runs them: the tools of these tests

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


@pytest.fixture(scope="module", autouse=True)
def no_other_run():
    """What a launcher has set for the tests' own process means nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield


def flags_of(config):
    """The command line that makes `config`."""
    flags = ["--device", "cpu", "--precision", "fp32"]
    for key, value in asdict(config).items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags += [f"--{flag}" if value else f"--no-{flag}"]
        elif key != "num_classes":
            flags += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def run(script, *flags, ignored=()):
    """Calls a script in this process, on the CPU, as a shell would: exit code, stdout, stderr.
    Signals that are `ignored` are so from the start, as under nohup; its locks end with it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.default_int_handler)
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
              mock.patch.object(sys, "argv", [script.__file__, "--device=cpu", *map(str, flags)])):
            script.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        train.lock.cache_clear()
        for number, handler in before.items():
            signal.signal(number, handler)
    if isinstance(code, str):  # Python itself prints it so
        return 1, out.getvalue(), f"{err.getvalue()}{code}\n"
    return code, out.getvalue(), err.getvalue()


def state_of(run_folder):
    return torch.load(run_folder / "checkpoint.pt", weights_only=True)


def fit(out, *flags, config=TINY, **changes):
    """A run of train.py that ends well: its checkpoint, and what it printed."""
    code, printed, err = run(train, "--out", out, *flags_of(replace(config, **changes)), *flags)
    assert code == 0, err
    return state_of(out), printed


def make_samples(out, *flags):
    """A call of sample.py that ends well: what it printed."""
    code, printed, err = run(sample, out, "--precision", "fp32", *flags)
    assert code == 0, err
    return printed


def launch(*command, processes=None):
    """A real process of Python, or several, with the variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path, started = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", []
    env = os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONPATH=path)
    for rank in range(processes or 1):
        if processes:
            env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        started.append(subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return started


def results(started, code=0):
    """Exit code, stdout and stderr of each process; none hangs, and all end with this code."""
    try:
        streams = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [code] * len(started), streams
    return [(code, *both) for both in streams]


def error_line(code, _, err):
    """The one line of error, which stands alone at the end, whatever bar was open before it."""
    last = re.split("[\r\n]", err.removesuffix("\n"))[-1]
    assert code == (2 if ".py: error: " in last else 1), err
    assert "Traceback" not in err and "step/s" not in last, err
    return last


def losses_of(out):
    """Those of the rows of log.csv."""
    return [float(row[1]) for row in log_of(out).values()]


def log_of(out, columns=slice(1, 6)):
    """The rows of log.csv by step: images, loss, gradient norm, learning rate, skipped steps."""
    with open(out / "log.csv") as file:
        return {int(row[0]): row[columns] for row in list(csv.reader(file))[1:]}


def contents(*tops):
    """Every file below these folders."""
    files = (path for top in tops for path in sorted(top.rglob("*")) if path.is_file())
    return {path: path.read_bytes() for path in files}


def put(root, *names, image=Image.new("RGB", (8, 8), "teal"), **how):
    """Saves the image under each of the names, in folders made as needed."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name, **how)
    return root


def put_all(root, images):
    """Saves these images as 0.png, 1.png and so on."""
    for i, image in enumerate(images):
        put(root, f"{i}.png", image=Image.fromarray(image))


def halve(path):
    """A file that was cut off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def npz(path, **arrays):
    """Images of zeros, or other arrays, in a file."""
    np.savez(path, **({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)} | arrays))
    return path


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def look_at(name, size=8, numbers=None, seed=0):
    """Images (N, H, W, 3) of a data set, and their labels."""
    data = train.open_data(str(name), size, seed)
    numbers = range(len(data.labels)) if numbers is None else numbers
    frames, labels = train.read_clips(data, numbers, [0.0] * len(numbers))
    return frames[:, 0], labels.tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of images in every mode and many formats, nested, in odd sizes."""
    root = tmp_path_factory.mktemp("images")
    for name, mode in {"a/one.png": "RGB", "a/deep/grey.JPEG": "L", "a/deep/palette.gif": "P",
                       "b/alpha.PNG": "RGBA", "b/cmyk.jpg": "CMYK", "b/16 bits.tif": "I;16",
                       "c/one.bmp": "RGB", "c/grey alpha.webp": "LA",
                       "c/bilevel.tiff": "1"}.items():
        put(root, name, image=Image.fromarray(noise(23, 31, 3)).convert(mode))
    for name in ("notes.txt", "unread.heic"):
        (root / "c" / name).write_text("not an image")
    return root


SHORT = replace(TINY, dropout=0.2, steps=7, warmup=4)
OFTEN = ["--log-every", 4, "--save-every", 3, "--sample-every", 5]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    """The folder of a tiny run on those images."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    fit(out, "--data", folder, *OFTEN, config=SHORT)
    return out


FILM = noise(6, 7, 8, 8, 3)  # six clips of seven frames that all differ


def put_film(root, film=FILM):
    """Each clip a folder of frames: three of class a, three of class b."""
    for i, frames in enumerate(film):
        put_all(root / "ab"[i // 3] / f"clip{i}", frames)
    return root


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips in two classes, and a finished run on them that goes on from two frames."""
    root = tmp_path_factory.mktemp("clips")
    data = put_film(root / "data")
    fit(root / "run", "--data", data, config=CLIPS)
    return data, root / "run"


# --------------------------------------------------------------------------------------------------
# 11. train.py: what a run leaves, and that it is the same run whatever happens


def test_a_run_leaves_a_checkpoint_a_log_and_pictures(tmp_path, folder, finished):
    """The log has a row where it is due and before each checkpoint and picture; its loss is the
    mean since the row before. With 0, no picture is made, and a checkpoint at both ends alone."""
    names = {path.relative_to(finished).as_posix() for path in contents(finished)}
    assert names == {".lock", "checkpoint.pt", "log.csv", "samples/0000005.png",
                     "samples/0000007.png"}
    assert Image.open(finished / "samples/0000007.png").height == 3 * 66  # a row for each class

    _, printed = fit(tmp_path, "--data", folder, "--log-every", 1, "--save-every", 0,
                     "--sample-every", 0, config=SHORT)
    for said in ("9 images or clips, 3 classes: a, b, c", f"left out in {folder}: 1 .heic",
                 "1 x cpu, fp32", "a new run", "step 7 of 7; `python sample.py"):
        assert said in printed
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoint.pt", "log.csv"}
    each, rows = log_of(tmp_path), log_of(finished, slice(1, None))
    assert list(rows) == [3, 4, 5, 6, 7]
    mean = sum(float(each[step][1]) for step in (1, 2, 3)) / 3
    assert float(rows[3][1]) == pytest.approx(mean, rel=1e-5)
    for step, (images, _, norm, _, skipped, rate, tflops, gigabytes, _) in rows.items():
        assert (images, norm, skipped) == (str(8 * step), each[step][2], "0")
        wanted = 3 * 2 * sid2.count(TINY)[1] / 1e3 * float(rate)  # forward, and twice backward
        assert float(tflops) == pytest.approx(wanted, rel=0.1) and float(gigabytes) == 0


def test_checkpoints_and_pictures_come_every_tenth_of_a_run(monkeypatch):
    """But at least 1,000 and at most 5,000 steps apart."""
    for steps, every in {40: 1000, 20_000: 2000, 1_000_000: 5000}.items():
        monkeypatch.setattr(sys, "argv", ["train.py", "--steps", str(steps)])
        args = train.parse()
        train.configure(args, world=1)
        assert (args.save_every, args.sample_every) == (every, every)


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


def assert_goes_on(out, folder, finished, step):
    """The run in `out` goes on at this step, from data that have moved, and ends as `finished`,
    bit for bit: weights, average, optimiser, log and pictures."""
    with open(out / "log.csv", "a") as log:
        log.write("6,48,9,9,9,0,9,9,9,9\nbro")  # a row after the checkpoint, and half of one
    flags = ["--data", shutil.copytree(folder, out / "moved"), *OFTEN]
    for said in (step, 7):
        state, printed = fit(out, *flags, config=SHORT)
        assert f"resumed at step {said}" in printed
        for key in ("step", "skipped", "net", "ema", "optimizer"):
            assert_close(state[key], state_of(finished)[key], rtol=0, atol=0)
    assert log_of(out) == log_of(finished)
    assert [*contents(out / "samples").values()] == [*contents(finished / "samples").values()]


@pytest.mark.parametrize("number", SIGNALS, ids=str)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, folder, finished, monkeypatch,
                                                    number):
    """With dropout, flips, and epochs that end amid a batch. A signal waits for the step's end."""
    with monkeypatch.context() as patch:
        amid(patch, [6], number)
        _, printed = fit(tmp_path, "--data", folder, *OFTEN, config=SHORT)
    assert "step 6 of 7; the same command continues" in printed
    assert list(log_of(tmp_path)) == [3, 4, 5, 6]
    assert_goes_on(tmp_path, folder, finished, step=6)


KILLED_AMID_SAVING = """
import itertools, os, train
count, fsync = itertools.count(1), os.fsync
os.fsync = lambda file: os.kill(os.getpid(), 9) if next(count) == 3 else fsync(file)
train.main()
"""
INTERRUPTED_TWICE = f"""
import pytest, signal, train
from {Path(__file__).stem} import amid
signal.signal(signal.SIGINT, signal.default_int_handler)
amid(pytest.MonkeyPatch(), [6], signal.SIGINT, signal.SIGINT)
train.main()
"""


@pytest.mark.parametrize("code, number", [
    (KILLED_AMID_SAVING, signal.SIGKILL), (INTERRUPTED_TWICE, signal.SIGINT)], ids=["9", "2"])
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path, folder, finished, code,
                                                                number):
    """A real process, killed when its third checkpoint is written but not yet in its place; or by a
    second Ctrl-C, which does not wait and shows no traceback."""
    flags = ["--data", folder, *OFTEN]
    [(_, _, err)] = results(launch("-c", code, "--out", tmp_path, *flags_of(SHORT), *flags),
                            code=-number)
    assert "Traceback" not in err
    assert (tmp_path / ".checkpoint.pt.part").exists() == (number == signal.SIGKILL)
    assert_goes_on(tmp_path, folder, finished, step=3)


def test_under_torchrun_a_second_signal_waits_too(tmp_path, folder):
    """A scheduler's own, and its copy by torchrun: one process gets both, as eight would."""
    [(_, printed, _)] = results(launch("-c", INTERRUPTED_TWICE, "--out", tmp_path, "--data", folder,
                                       *flags_of(SHORT), processes=1))
    assert "step 6 of 7; the same command continues" in printed


def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path, monkeypatch):
    amid(monkeypatch, [2], signal.SIGHUP)
    code, printed, _ = run(train, "--out", tmp_path, *flags_of(TINY), ignored=[signal.SIGHUP])
    assert code == 0 and "step 4 of 4" in printed


def test_a_folder_has_one_writer_at_a_time(tmp_path, finished):
    """Else lone processes, as srun starts them, would overwrite each other. Kill ends the lock."""
    code = f"import pathlib, time, train; train.lock(pathlib.Path({str(tmp_path)!r}))"
    holder = launch("-c", f"{code}; print('locked', flush=True); time.sleep(300)")
    try:
        assert holder[0].stdout.readline() == "locked\n"
        for result in (run(train, "--out", tmp_path, *flags_of(TINY)),
                       run(sample, finished, "--out", tmp_path)):
            assert f"another process writes to {tmp_path}" in error_line(*result)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        holder[0].kill()
        holder[0].communicate()
    fit(tmp_path)


@pytest.mark.parametrize("config", [TINY, CLIPS], ids=["images", "clips"])
def test_neither_processes_nor_micro_batches_change_a_run(tmp_path, monkeypatch, clips, config):
    """In weights, average and log. At step 2 the gradient is not finite, in the second process
    alone; both skip it. Adam turns rounding of tiny gradients into steps, hence the tolerance."""
    poisoned = f"""
import os, pytest, train
from {Path(__file__).stem} import amid
amid(pytest.MonkeyPatch(), [3] if os.environ["RANK"] == "1" else [], factor=float("nan"))
train.main()
"""
    flags = ["--log-every", 1, *(["--data", clips[0]] if config.given else [])]
    started = launch("-c", poisoned, "--out", tmp_path / "two", *flags_of(config), *flags,
                     "--micro-batch", 2, processes=2)
    amid(monkeypatch, [2], factor=math.nan)
    one, _ = fit(tmp_path / "one", *flags, config=config)
    results(started)
    two = state_of(tmp_path / "two")
    for part in "net", "ema":
        assert_close(one[part], two[part], rtol=2e-3, atol=2e-3)
    ours, theirs = (list(log_of(tmp_path / name).values()) for name in ("one", "two"))
    np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), rtol=1e-3)
    assert [row[4] for row in theirs] == ["0", "1", "1", "1"] and theirs[1][1] == "nan"


def test_steps_whose_gradient_is_not_finite_are_skipped_and_ten_in_a_row_end_the_run(
        tmp_path, monkeypatch):
    """Whatever the interval of the log. Weights and moments stay as they were, and the logged loss
    is the mean of the others. A clip of 0 is no limit: it would multiply every gradient by 0."""
    before, _ = fit(tmp_path / "good", "--log-every", 1, steps=2, clip=0.0)
    good = losses_of(tmp_path / "good")
    amid(monkeypatch, range(3, 40), factor=math.inf)
    after, _ = fit(tmp_path / "run", "--log-every", 3, steps=11, clip=1e9)
    assert_close(after["net"], before["net"], rtol=0, atol=0)
    assert_close(after["optimizer"]["state"], before["optimizer"]["state"], rtol=0, atol=0)
    rows = log_of(tmp_path / "run")
    assert float(rows[3][1]) == pytest.approx(sum(good) / 2, rel=1e-5)
    assert rows[3][2:] == ["nan", "0.01", "1"] and rows[6][1] == "nan" and after["skipped"] == 9
    flags = [*flags_of(replace(TINY, steps=40, clip=1e9)), "--log-every", 3]
    line = error_line(*run(train, "--out", tmp_path / "run", *flags))
    assert "no finite gradient in 10 steps, up to step 21" in line


def test_training_waits_for_the_device_at_rows_of_the_log_alone(tmp_path, monkeypatch):
    """No step asks for the value of a loss, nor whether the gradient is finite."""
    for name in ("item", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, mock.Mock(side_effect=AssertionError(name)))
    fit(tmp_path, "--log-every", 99, "--sample-every", 0, "--save-every", 0)


def test_a_full_disk_is_called_by_its_name_and_what_was_there_stays(tmp_path, folder, finished):
    """Real processes whose files cannot grow past 2 kB: a checkpoint fails, and an npz."""
    code = ("import resource, sample, train; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, 2 * [2048]); {}.main()")
    out = shutil.copytree(finished, tmp_path / "run")
    flags, before = [*flags_of(SHORT), "--data", folder, "--steps", 9], contents(out)
    for script, *flags in (("train", "--out", out, *flags),
                           ("sample", out, "--count", 99, "--format", "npz", "--device", "cpu")):
        [result] = results(launch("-c", code.format(script), *flags), code=1)
        assert "cannot be written (OSError: [Errno 27] File too large" in error_line(*result)
    after = contents(out)
    assert {path for path in before if after[path] != before[path]} == {out / "log.csv"}
    assert {path.name[-4:] for path in after.keys() - before.keys()} == {"json", ".png", "lock"}


def test_a_finer_network_starts_from_a_coarser_run(tmp_path, finished):
    """--init-from: 8 px with patch 1 to 16 px with patch 2; the average's trunk and all that fits.
    The step that follows is too small to see."""
    new, printed = fit(tmp_path, "--init-from", finished, image_size=16, patch_size=2, steps=1,
                       lr=1e-20)
    assert "afresh: condition.label.weight, embed.weight, head.bias, head.weight" in printed
    old, key = state_of(finished), "middle.0.attention.qkv.weight"
    assert new["net"][key].equal(old["ema"][key]) and new["ema"][key].equal(old["ema"][key])
    assert not old["net"][key].equal(old["ema"][key])


@pytest.mark.parametrize("config", [TINY, CLIPS], ids=["images", "clips"])
def test_a_run_is_the_loop_that_its_configuration_describes(tmp_path, monkeypatch, clips, config):
    """Its seeds, Adam's constants, clipping, warm-up and average, in two micro-batches. Dropout has
    a seed for each step, and the blocks of checkpointed levels are computed again."""
    name, classes = ("shapes", 6) if config is TINY else (str(clips[0]), 2)
    config = replace(config, num_classes=classes, betas=(0.5, 0.6), adam_eps=1e-3, clip=0.1,
                     ema=0.15, flip=False, warmup=3)
    loss, seeds, losses = sid2.training_loss, [], []
    monkeypatch.setattr(sid2, "training_loss",
                        lambda *args: seeds.append(torch.initial_seed()) or loss(*args))
    with mock.patch.object(sid2, "checkpoint", wraps=sid2.checkpoint) as checkpoint:
        state, _ = fit(tmp_path, "--data", name, "--seed", 3, "--checkpointing", 1, "--micro-batch",
                       4, "--log-every", 1, config=config)
    assert len(set(seeds)) == 4 and checkpoint.call_count == 4 * 2

    data = train.open_data(name, 8, 3, config.given + config.frames)
    torch.manual_seed(3)
    net = sid2.ResidualUViT(config)
    average = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, (0.5, 0.6), 1e-3)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 3)
        batch = train.make_batch(data, config, 3, 0, 8, step)
        x, y, t, eps, given = train.to_device(batch, CPU, torch.Generator(), config.given)
        optimizer.zero_grad()
        mean = loss(functools.partial(net, given=given), config, x, y, t, eps).mean()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        sid2.ema_update(average, net, step, 0.15)
        losses.append(mean.item())
    assert losses_of(tmp_path) == pytest.approx(losses, rel=1e-4)
    for mine, part in (net, "net"), (average, "ema"):
        assert_close(dict(mine.state_dict()), dict(state[part]), rtol=1e-4, atol=1e-5)


def test_training_in_bfloat16_is_near_training_in_float32(tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        fit(tmp_path / precision, "--log-every", 1, "--precision", precision)
        losses.append(losses_of(tmp_path / precision))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


def test_labels_can_be_left_out_or_missing(tmp_path, folder):
    """Then the network is unconditional, and pictures have no names on the left."""
    for flag, value in {"--num-classes": 0, "--data": folder / "a/deep"}.items():
        out = tmp_path / flag
        state, _ = fit(out, flag, value, steps=1)
        assert state["classes"] == [] and len(state["net"]["condition.label.weight"]) == 1
        assert Image.open(out / "samples/0000001.png").size == (8 * 66, 66)
    assert "has no classes" in error_line(*run(sample, out, "--guidance", 2))


# --------------------------------------------------------------------------------------------------
# 12. On a GPU, where there is one

GPU = "cuda"
needs_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="there is no GPU that multiplies bfloat16")


@needs_a_gpu
def test_fused_attention_in_bfloat16_is_its_formula_in_float32():
    config = replace(TINY, channels=(128, 256), blocks="TT", head_width=64)
    attention, h = shaken(config, scale=0.05).middle[0].attention, normal(4, 16, 16, 256)
    exact = attended(attention, h)
    with torch.autocast(GPU, torch.bfloat16), torch.no_grad(), sdpa_kernel(
            [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        fused = attention.to(GPU)(h.to(GPU))
    assert fused.dtype == torch.bfloat16
    assert (fused.float().cpu() - exact).norm() < 0.02 * exact.norm()


@needs_a_gpu
def test_a_compiled_step_in_bfloat16_has_the_gradients_of_an_eager_one_in_float32():
    """A kernel that is wrong, or leaves a gradient out, is off by about 1 in one parameter."""
    _, _, device = train.setup(GPU)  # float32 means float32
    config = replace(sid2.PRESETS["cifar10"], dropout=0.0, depth=(1, 1), middle=2)
    net, gradients = shaken(config, scale=0.02).train().to(device), []
    x, eps = (normal(128, 3, 32, 32, seed=seed).to(device) for seed in (0, 1))
    y, t = torch.arange(128, device=device) % 10, torch.linspace(0.01, 0.99, 128, device=device)
    for bf16 in (False, True):
        if bf16:
            net.compile(dynamic=False, fullgraph=True)
        with torch.autocast(GPU, torch.bfloat16, enabled=bf16):
            loss = sid2.training_loss(net, config, x, y, t, eps).mean()
        net.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.double() for name, p in net.named_parameters()})
    exact, fast = gradients
    errors = {name: ((fast[name] - g).norm() / g.norm()).item() for name, g in exact.items()}
    assert np.median([*errors.values()]) < 0.03 and max(errors.values()) < 0.2, errors


@needs_a_gpu
def test_a_run_on_a_gpu_goes_on_and_its_samples_depend_on_their_seeds(tmp_path, monkeypatch):
    """Compiled, in bfloat16, up to atomic additions; samples in float32, in batches of 8 and 3."""
    flags = ["--device", GPU, "--precision", "bf16", "--log-every", 1]
    fit(tmp_path / "whole", *flags, config=SHORT)
    with monkeypatch.context() as patch:
        amid(patch, [4], signal.SIGTERM)
        fit(tmp_path / "cut", *flags, config=SHORT)
    _, printed = fit(tmp_path / "cut", *flags, config=SHORT)
    assert "resumed at step 4" in printed
    assert losses_of(tmp_path / "cut") == pytest.approx(losses_of(tmp_path / "whole"), rel=0.02)
    images = []
    for more in (["--batch", 8], ["--batch", 3], ["--batch", 8, "--compile"]):
        out = tmp_path / f"images{len(images)}"
        make_samples(tmp_path / "whole", "--device", GPU, "--count", 8, "--format", "npz", "--out",
                     out, *more)
        images.append(np.load(f"{out}.npz")["arr_0"].astype(int))
    assert all(abs(images[0] - other).max() <= 2 for other in images[1:])


# --------------------------------------------------------------------------------------------------
# 13. train.py: data


def test_pictures_are_upright_on_white_and_of_several_in_a_file_the_first_counts(tmp_path):
    """Though Pillow cannot write all tags of a photograph again: here the name of the camera is a
    number. Stereo photographs and animations have several pictures."""
    turned, pixels = Image.Exif(), noise(8, 12, 3)
    turned[ExifTags.Base.Orientation] = 6  # a quarter to the right
    turned[ExifTags.Base.ShutterSpeedValue] = 0.5
    tags = turned.tobytes().replace(b"\x92\x01", b"\x01\x10")  # speed becomes model
    put(tmp_path, "turned.png", image=Image.fromarray(pixels), exif=tags)
    upright = train.read_image(tmp_path / "turned.png", None)
    assert np.array_equal(upright, np.rot90(pixels, -1))
    put(tmp_path / "white", "clear.png", image=Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    for name, form in (("a.jpg", "MPO"), ("b.gif", "GIF"), ("c.apng", "PNG"), ("d.jpe", "MPO")):
        put(tmp_path / "white", name, image=Image.new("RGB", (8, 8), "white"), format=form,
            save_all=True, append_images=[Image.new("RGB", (8, 8))])
    images, _ = look_at(tmp_path / "white")
    assert len(images) == 5 and images.min() > 250


PLAIN = [0, 64, 128, 255]


@pytest.mark.parametrize("name, dtype, old, new, seen", [
    ("x.png", "<u2", "", "", PLAIN), ("x.jp2", "<u2", "", "", PLAIN),
    ("x.pgm", "<u2", "", "", PLAIN),
    ("x.tif", "<u2", "", "", PLAIN), ("x.tif", ">u2", "", "", PLAIN),
    ("x.tif", "<u2", "0201 0300 01000000 1000", "0201 0300 01000000 0c00", None),  # 12 bits
    ("x.tif", "<u2", "0601 0300 01000000 01", "0601 0300 01000000 00", None),  # 0 is white
    ("x.tif", "<u2", "5301 0300 01000000 01", "5301 0300 01000000 02", None),  # with sign
    ("x.tif", "u1", "5301 0300 01000000 01", "5301 0300 01000000 02", None),  # with sign, 8 bits
    ("palette.tif", "u1", "", "", None),  # a palette of 8 bits where 16 are the rule
    ("x.tif", "<i4", "", "", None), ("x.tif", "<f4", "", "", None)])
def test_grey_of_16_bits_is_scaled_to_8_and_what_pillow_would_mistake_is_refused(
        tmp_path, name, dtype, old, new, seen):
    """By name, where a file does not say what is white. Bytes of a TIFF, in hexadecimal, are
    changed in the file: a tag's number, its type, how many values, the value."""
    numbers = np.array([[0, 0x4000, 0x8000, 0xFFFF]] * 4)
    image = Image.fromarray((numbers >> 8 if dtype == "u1" else numbers).astype(dtype))
    if name == "palette.tif":  # 256 v of each colour becomes v
        image, colours = image.convert("P"), np.tile(np.arange(256, dtype="<u2"), 3)
        old, new = (256 * colours).tobytes().hex(), colours.tobytes().hex()
    file = tmp_path / name
    image.save(file, tiffinfo={339: 1})  # without sign
    if old:
        head, tail = file.read_bytes().split(bytes.fromhex(old))
        file.write_bytes(head + bytes.fromhex(new) + tail)
    data = train.open_data(str(tmp_path), 4, seed=0)
    if seen:
        assert data.read(0, 0.0)[0, 0, :, 0].tolist() == seen
    else:
        with pytest.raises(train.InputError, match=f"{name} cannot be read .*not whole numbers"):
            data.read(0, 0.0)


def test_the_crop_keeps_the_middle_and_its_proportions():
    """ADM's: by box to less than twice the size, then bicubic, then the centre."""
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200
    assert (np.asarray(train.centre_crop(Image.fromarray(wide), 16)) == 200).all()
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    flat = np.asarray(train.centre_crop(board, 32)).astype(int)
    assert abs(flat - 127).max() <= 1  # a box average of a chessboard is grey


def test_links_are_followed_and_what_systems_add_is_left_out(tmp_path, folder, capsys):
    """A link to a folder above is followed once, and one to a folder that is gone is named."""
    root = put(tmp_path, ".ipynb_checkpoints/x.png", "own/one.png", "own/._two.png",
               "own/loop.png/three.png", "own/@eaDir/one.png/thumb.png", "__MACOSX/own/one.png",
               "lost+found/x.png")
    (root / "linked").symlink_to(folder / "b")
    (root / "own" / "up").symlink_to(root)
    (root / "other").symlink_to(root / "own")
    (root / "gone").symlink_to(root / "nowhere")
    data = train.open_data(str(root), 8, seed=0)
    assert data.classes == ["linked", "other", "own"]
    assert np.bincount(data.labels).tolist() == [3, 2, 2]
    assert f"left out: {root}/gone is a link to nowhere" in capsys.readouterr().out


def test_an_image_is_decoded_once_if_there_is_room(tmp_path):
    """As many as --cache has room for are kept, from the first epoch on; the others are decoded
    again. A photograph of 12 megapixels takes a quarter of a second."""
    put(tmp_path, *(f"{i}.png" for i in range(5)))
    for room, decoded in ((5 * 192, 5), (2.5 * 192, 2 + 3 * 3), (0, 3 * 5)):
        data = train.open_data(str(tmp_path), 8, seed=0, room=room)
        with mock.patch.object(train, "read_image", wraps=train.read_image) as read_image:
            epochs = [train.read_clips(data, range(5), [0.0] * 5)[0] for _ in range(3)]
        assert read_image.call_count == decoded
        assert np.array_equal(epochs[0], epochs[1]) and np.array_equal(epochs[0], epochs[2])


def test_an_epoch_has_every_clip_once_half_of_them_mirrored_and_a_tenth_without_label(clips):
    """Each epoch in a new order, and no noise comes twice. A clip begins at any frame, and has one
    time, one label and one mirror. An image is a clip of one frame."""
    config, data = replace(CLIPS, num_classes=2), train.open_data(str(clips[0]), 8, 0, length=5)
    order = np.concatenate([train.order_of_epoch(5, epoch, 6) for epoch in range(80)])
    assert (np.sort(order.reshape(80, 6)) == np.arange(6)).all()
    assert len(np.unique(order.reshape(80, 6), axis=0)) > 40
    assert not np.array_equal(*(train.order_of_epoch(seed, 0, 99) for seed in (5, 6)))
    steps = zip(*(train.make_batch(data, config, 5, 0, 8, step) for step in range(60)))
    images, labels, t, seeds = (torch.cat(parts).numpy() for parts in steps)
    windows = {FILM[clip, begin : begin + 5, :, ::flip].tobytes(): (clip, begin, flip)
               for clip, begin, flip in itertools.product(range(6), range(3), (1, -1))}
    seen, null = [windows[image.tobytes()] for image in images], labels == config.num_classes
    assert [clip for clip, _, _ in seen] == order.tolist() and {*seen} == {*windows.values()}
    assert 0.4 < np.mean([flip == -1 for _, _, flip in seen]) < 0.6 and 0.05 < null.mean() < 0.15
    assert (null | (labels == order[:, None] // 3)).all()
    assert (labels == labels[:, :1]).all() and (t == t[:, :1]).all()
    dropped = null[:, 0].reshape(60, 8).sum(1)  # of each step: not all or none
    assert 1 in dropped and 8 not in dropped
    times = np.sort(t[:, 0].reshape(60, 8))
    np.testing.assert_allclose(np.diff(times), 1 / 8, rtol=1e-4)  # low-discrepancy times
    unflipped, *_ = train.make_batch(data, replace(config, flip=False), 5, 0, 8, 0)
    assert {windows[image.numpy().tobytes()][2] for image in unflipped} == {1}
    _, _, more_t, more_seeds = train.make_batch(data, config, 6, 0, 8, 0)  # another --seed
    assert len({*t[:, 0], *more_t[:, 0].tolist()}) == 480 + 8
    assert len({*seeds, *more_seeds.tolist()}) == 480 + 8


def test_the_network_gets_numbers_up_to_1_the_noise_of_each_seed_and_the_given_frames():
    """And its numbers become the bytes that they were."""
    images, seeds = torch.from_numpy(noise(6, 5, 8, 8, 3)), torch.arange(6)
    x, _, _, eps, given = train.to_device([images, seeds, seeds, seeds], CPU, torch.Generator(), 2)
    assert torch.equal(eps[3:6], normal(3, 3, 8, 8, seed=1))
    assert (x.min(), x.max()) == (-1, 1) and len(images.unique()) == 256
    assert np.array_equal(train.to_uint8(x), images[:, 2:].flatten(0, 1))
    assert np.array_equal(train.to_uint8(given.reshape(12, 3, 8, 8)), images[:, :2].flatten(0, 1))


def test_shapes_depend_on_seed_and_number_alone_and_are_alike_at_every_size():
    """At 16 px a drawing is what the eye sees of it at 64 px."""
    images, labels = look_at("shapes", 64, range(120))
    assert np.array_equal(look_at("shapes", 64, [17, 5])[0], images[[17, 5]])
    assert not np.array_equal(look_at("shapes", 64, [0], seed=4)[0], images[:1])
    seen = images.reshape(120, 16, 4, 16, 4, 3).mean((2, 4))
    assert abs(seen - look_at("shapes", 16, range(120))[0]).max() <= 1
    drawings = {train.draw_shape(name, 16, 0.4, (0.5, 0.5), np.zeros(3), np.ones(3)).tobytes()
                for name in train.SHAPES}
    assert labels == [*range(6)] * 20 and len(drawings) == 6


def test_a_shape_moves_straight_on_from_one_place_to_another():
    """So two frames tell all that follows; the whole shape stays in the picture."""
    data = train.open_data("shapes", 64, 0, length=8)
    for i in range(50):
        frames = data.read(i, 0.0)
        inside = (frames != frames[0, 0, 0]).any(-1)
        places = np.array([np.argwhere(mask).mean(0) for mask in inside])
        straight, areas = np.linspace(places[0], places[-1], 8), inside.sum((1, 2))
        assert abs(places - straight).max() < 1 < abs(places[0] - places[-1]).max()  # in pixels
        assert areas.max() < 1.2 * areas.min()


def test_cifar10_is_read_from_the_binary_archive(tmp_path, monkeypatch):
    """10,000 records per file, label first, then planes R, G, B. Without a connection the message
    says what to fetch and where to put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(train, "CIFAR10", (tmp_path / "nowhere").as_uri())
    archive = tmp_path / "hub/cifar-10-binary.tar.gz"
    with pytest.raises(train.InputError, match=f"{archive} .* put {train.CIFAR10} there"):
        train.open_data("cifar10", 32, seed=0)
    records = np.zeros((10_000, 3073), np.uint8)
    records[7] = record = noise(3073) % 10
    records.tofile(tmp_path / "records")
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for i in range(1, 6):
            tar.add(tmp_path / "records", f"cifar-10-batches-bin/data_batch_{i}.bin")
    images, labels = look_at("cifar10", 32, [10_007, 10_008])
    assert np.array_equal(images[0], record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
    assert labels == [record[0], 0] and not images[1].any()


def test_the_next_image_and_its_label_take_the_place_of_one_that_cannot_be_read(tmp_path):
    """Nothing, text, half an image, links to nowhere or in a loop, a bomb: each is named once."""
    top = put(tmp_path / "data", "a/good.png", "a/cut.png")
    put(top, "b/good.png", image=Image.new("RGB", (8, 8), "red"))
    put(top, "b/bomb.png", image=Image.new("1", (40_000, 20_000)))
    halve(top / "a/cut.png")
    (top / "a/zero.png").write_bytes(b"")
    (top / "a/text.jpg").write_text("<html>404</html>")
    (top / "b/nowhere.png").symlink_to("gone.png")
    (top / "b/loop.png").symlink_to("loop.png")
    train.warn_once.cache_clear()
    code, printed, err = run(train, "--data", top, "--out", tmp_path / "run", *flags_of(TINY))
    assert code == 0 and "8 images or clips, 2 classes" in printed and "step 4 of 4" in printed
    assert len(re.findall(rf"warning: {top}/\S+ cannot", err)) == 6
    images, labels = look_at(top)
    assert labels == [0, 0, 1, 1, 1, 1, 0, 0]  # cut good text zero bomb good loop nowhere
    assert [image[0, 0, 0] // 255 for image in images] == labels


# --------------------------------------------------------------------------------------------------
# 14. sample.py


def test_the_image_of_a_seed_depends_on_neither_batch_nor_processes(
        finished, tmp_path, monkeypatch):
    """npz: in the order of the seeds, so never sorted by class."""
    flags = ["--device", "cpu", "--precision", "fp32", "--format", "npz", "--count", 7]
    results(launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                   ROOT / "sample.py", finished, *flags, "--batch", 2, "--out", tmp_path / "two"))
    make_samples(finished, *flags, "--batch", 5, "--out", tmp_path / "one")
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert one["arr_1"].tolist() == two["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    images = one["arr_0"]
    assert abs(images.astype(int) - two["arr_0"]).max() <= 1  # rounding of another batch size
    assert len({image.tobytes() for image in images}) == 7

    shares = []  # of two processes, one after the other
    for rank in (0, 1):
        monkeypatch.setattr(sample, "setup", lambda _: (rank, 2, CPU))
        make_samples(finished, "--count", 7, "--format", "folder", "--out", tmp_path / "x")
        shares.append({int(path.stem) for path in (tmp_path / "x").glob("*.png")})
    assert shares == [{0, 2, 4, 6}, {*range(7)}]


def test_a_folder_of_samples_is_completed_and_other_settings_are_refused(finished, tmp_path):
    """Eight samples of each class are the picture that the run drew last."""
    flags = ["--out", tmp_path / "x", "--precision", "fp32"]
    make_samples(finished, *flags)
    assert (tmp_path / "x.png").read_bytes() == (finished / "samples/0000007.png").read_bytes()
    files, everything = sorted(tmp_path.glob("x/*.png")), contents(tmp_path)
    for file in files:
        os.utime(file, (0, 0))
    files[2].unlink()
    files[4].unlink()
    make_samples(finished, *flags)
    make_samples(finished, *flags)  # nothing is missing
    assert [i for i, file in enumerate(files) if file.stat().st_mtime != 0] == [2, 4]
    line = error_line(*run(sample, finished, *flags, "--steps", 2))
    assert "other settings (sample_steps 3, now 2)" in line
    assert contents(tmp_path) == everything and len(files) == 24


def test_an_image_that_cannot_be_written_ends_the_script_whatever_its_batch(finished, tmp_path):
    """In the first of twelve batches: a folder has the name of its temporary file. The bar is gone
    before the line of error, which a real process prints last."""
    (tmp_path / ".000000.png.part").mkdir()
    flags = ["--out", tmp_path, "--batch", 2, "--device", "cpu"]
    [result] = results(launch(ROOT / "sample.py", finished, *flags), code=1)
    assert "000000.png cannot be written" in error_line(*result)


def test_each_flag_of_the_sampler_changes_the_picture(finished, tmp_path):
    """And has a folder of its own beside the checkpoint."""
    run_folder = shutil.copytree(finished, tmp_path / "run")
    flags = [[], ["--weights", "raw"], ["--steps", 2], ["--sampler", "ddim"], ["--gamma", 1],
             ["--guidance", 9], ["--interval", -20, 20], ["--classes", "b"], ["--classes", 2, 0],
             ["--precision", "bf16"]]
    paths = [Path(make_samples(run_folder, "--count", 8, *more).split("wrote ")[1].strip())
             for more in flags]
    assert len({path.read_bytes() for path in paths}) == len(set(paths)) == len(flags)
    assert {path.parent for path in paths} == {run_folder}


def test_a_trajectory_ends_in_the_sample(finished, tmp_path):
    """A row of z and one of x_hat for each seed, at up to eight noise levels, under a heading."""
    flags = ["--out", tmp_path / "x", "--count", 2, "--steps", 9]
    make_samples(finished, *flags, "--trajectory")
    make_samples(finished, *flags, "--format", "folder")
    picture = np.asarray(Image.open(tmp_path / "x-trajectory.png")).astype(int)
    assert picture.shape[0] == 18 + 4 * 66 and 8 * 66 < picture.shape[1] < 10 * 66
    for seed in (0, 1):
        last = picture[18 + (2 * seed + 1) * 66 :, -66:-2][4:64:8, 4::8]
        assert abs(last - np.asarray(Image.open(tmp_path / f"x/00000{seed}.png"))).max() <= 1


# --------------------------------------------------------------------------------------------------
# 15. Clips: the same scripts


def test_a_clip_is_a_folder_of_frames(tmp_path):
    """Frame 2 comes before frame 10. A window begins anywhere, up to the last that is whole."""
    film = FILM.reshape(42, 8, 8, 3)[:12]
    put_all(tmp_path, film)
    data = train.open_data(str(tmp_path), 8, 0, length=5)
    assert data.classes == [] and data.labels.tolist() == [0]
    assert np.array_equal(data.read(0, 0.0), film[:5])
    assert np.array_equal(data.read(0, 0.99), film[7:])


def test_a_clip_that_is_broken_or_an_animation_is_named(tmp_path, capsys):
    """And folders that are too short, as those of unrelated pictures, are left out."""
    animated = dict(save_all=True, append_images=[Image.new("RGB", (8, 8))])
    put(tmp_path, *(f"{name}/{i}.png" for name in ("cut", "good") for i in (1, 2)))
    put(tmp_path, "gifs/1.gif", "gifs/2.gif", **animated)
    put(tmp_path, "good/1.jpg", format="MPO", **animated)
    put(tmp_path, "short/1.png", "loose.png")
    halve(tmp_path / "cut/2.png")
    data = train.open_data(str(tmp_path), 8, 0, length=2)
    assert "left out: 2 folders of fewer than 2 frames" in capsys.readouterr().out
    for i, message in {0: "cut/2.png cannot be read",
                       1: "1.gif .*animation: a clip is a folder"}.items():
        with pytest.raises(train.InputError, match=message):
            data.read(i, 0.0)
    assert data.read(2, 0.0).shape == (2, 8, 8, 3)


def test_samples_of_clips_begin_with_the_given_frames(tmp_path, clips, monkeypatch):
    """In strips, an npz and an animation; the class is that of the clip, and other clips can be
    given. A strip depends on its seed alone, and its heading says what was given."""
    (_, run_folder), page = clips, mock.Mock(wraps=train.page)
    monkeypatch.setattr(train, "page", page)
    flags = ["--guidance", 3, "--interval", -99, 99]
    make_samples(run_folder, *flags, "--count", 8, "--format", "npz", "--out", tmp_path / "a")
    images, labels = (np.load(tmp_path / "a.npz")[name] for name in ("arr_0", "arr_1"))
    assert images.shape == (8, 5, 8, 8, 3) and labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert np.array_equal(images[:, :2], FILM[np.arange(8) % 6, :2])
    other = put_film(tmp_path / "other", FILM[::-1, :2])
    make_samples(run_folder, *flags, "--data", other, "--format", "animation", "--out",
                 tmp_path / "b", "--batch", 3)
    assert Image.open(tmp_path / "b.webp").n_frames == 5
    make_samples(run_folder, "--out", tmp_path / "c", "--count", 6, "--batch", 1, *flags)
    assert page.call_args.args[1] == ["", "given", "given", "3", "4", "5"]
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}/000005.png")) for name in "abc")
    assert abs(a.astype(int) - c).max() <= 1  # rounding of another batch size
    assert np.array_equal(a, np.concatenate(images[5], axis=1))
    assert np.array_equal(b[:, :8], FILM[0, 0])


# --------------------------------------------------------------------------------------------------
# 16. Bad input, of all scripts

MOMENTS = np.zeros(2048), np.eye(2048)


@pytest.fixture(scope="module")
def bad(tmp_path_factory, finished):
    """A folder with everything that somebody has given to the scripts by mistake."""
    root = tmp_path_factory.mktemp("bad")

    class Evil:
        def __reduce__(self):  # makes a file when it is unpickled
            return Path.touch, (root / "made",)

    put(root, *(f"good/{i}.png" for i in range(5)), *(f"few/{i}.png" for i in range(3)),
        "loose/a/good.png", "loose/loose.png", "broken/good.png")
    (root / "empty/a").mkdir(parents=True)
    for name in ("file", *(f"broken/{i}.png" for i in range(110))):
        (root / name).write_text("")
    npz(root / "clips.npz", arr_0=np.zeros((2, 4, 8, 8, 3), np.uint8))
    npz(root / "evil.npz", arr_0=np.array([Evil()], object))
    torch.save(dict(config=Evil()), root / "evil.pt")
    for name, (mu, sigma) in {"narrow": (np.zeros(9), np.eye(9)), "stats": MOMENTS,
                              "nan": (MOMENTS[0], MOMENTS[1] * np.nan),
                              "half": (MOMENTS[0], np.triu(np.ones((2048, 2048))))}.items():
        np.savez_compressed(root / f"{name}.npz", mu=mu, sigma=sigma)
    state = state_of(finished)
    older = {key: value for key, value in state["config"].items() if key != "clip"}
    for name, config in dict(older=older, network=state["config"] | {"width": 32}).items():
        torch.save(state | dict(config=config), root / f"{name}.pt")
    state["ema"]["head.bias"][0] = math.nan
    torch.save(state, root / "failed.pt")
    return root


BAD_INPUT = r"""
train --preset imagenet64                | --data is missing: give shapes, cifar10
train --step 1                           | unrecognized arguments: --step
train --lr nan                           | lr must lie in \[0, 1e\+09\], got nan
train --frames 2000                      | frames must lie in
train --seed -1                          | seed must lie in
train --ema 1.5                          | ema must lie in \[0, 1\], got 1.5
train --betas 0.9 1                      | betas must lie in
train --adam-eps 0                       | adam_eps must lie in
train --width 15                         | width must be even
train --interval 2 1                     | interval .*lower
train --blocks RTT                       | blocks needs a letter R or T for each of 2
train --channels 8 12                    | channels must be multiples of head_width 8
train --image-size 9                     | image_size must be a multiple of 2.*got 9
train --micro-batch 3                    | batch must be a multiple of 3
train --sampler euler                    | sampler must be ddpm or ddim
train --label-dropout 0                  | label_dropout must be above 0 to guide samples
train --num-classes 4                    | --num-classes must be 0 or that of the data, 6
train --data BAD/empty                   | there are no images in .*empty
train --data BAD/broken                  | a hundred images or clips in a row .* the last: .*png can
train --data BAD/loose                   | 1 images or clips beside its 1 class folders
train --data cifar10                     | --data cifar10: give .*32 px
train --frames 4 --data DATA             | there are no folders of 4 frames or more
train --data DATA --out DATA/a/run       | lies in --data .*: its pictures would become data
train --init-from RUN --middle 0         | does not fit, as middle.0
train --out RUN --data DATA --lr 0.5     | other settings .*lr 0.01, now 0.5
train --out RUN --data DATA --seed 9     | other settings .seed 0, now 9
train --out RUN --data DATA --precision bf16 | precision fp32, now bf16.*--precision auto
train --out BAD/loose                    | loose holds files but no checkpoint
train --out BAD/file/run                 | file/run cannot be written
sample BAD/nowhere                       | nowhere cannot be read as a checkpoint
sample BAD/evil.pt                       | evil.pt cannot be read as a checkpoint
sample BAD/network.pt                    | the weights of .*network.pt cannot be used
sample BAD/older.pt                      | cannot be read as a checkpoint of this version of train
sample BAD/failed.pt                     | failed.pt holds weights that are not finite
train --init-from BAD/failed.pt          | failed.pt holds weights that are not finite
sample RUN --classes zebra               | --classes zebra: this run has 3 classes: a, b, c
sample RUN --gamma 2                     | gamma must lie in
sample RUN --count 0                     | count must lie in
sample RUN --batch 0                     | batch must lie in
sample RUN --format animation            | --format animation shows clips
sample CLIP --format animation --count 9999 | WebP ends at 16,383 pixels
sample RUN --trajectory --format npz     | --trajectory is a picture of images
sample RUN --data shapes                 | --data is for runs with given frames
sample RUN --out BAD/loose               | is not from sample.py: give another --out
sample RUN --out BAD/clips               | clips or a file beside it is not from sample.py
fid BAD/nowhere BAD/good                 | nowhere cannot be read as an npz
fid BAD/evil.npz BAD/good                | evil.npz cannot be read as an npz
fid BAD/few BAD/good                     | few has 3 images
fid BAD/clips.npz BAD/good               | holds arr_0 .*; wanted: arr_0 uint8 \(N, H, W, 3\), or mu
fid BAD/good BAD/narrow.npz              | mu is float64 \(9,\); wanted: finite numbers \(2048,\)
fid BAD/good BAD/nan.npz                 | sigma is float64 \(2048, 2048\); wanted: finite numbers
fid BAD/good BAD/half.npz                | sigma .* wanted: .* sigma symmetric
fid BAD/evil.pt BAD/good                 | evil.pt holds evil/data.pkl
fid BAD/good BAD/stats.npz --kid         | stats.npz holds statistics alone
fid BAD/good BAD/good --batch 0          | --batch must be at least 1
fid BAD/good                             | give SAMPLES REFERENCE, or DATA --save-stats OUT.npz
fid BAD/good BAD/few --out BAD/stats.npz | stats.npz exists: remove it, or give another name
fid BAD/good --save-stats a --out ./a    | --out and --save-stats both name ./a
fid BAD/good BAD/good --out BAD/no/a     | no/a cannot be written
fid BAD/good --save-stats /proc/st.npz   | /proc/st.npz cannot be written
fid BAD/broken BAD/good                  | broken/0.png cannot be read as an image
fid RUN BAD/good                         | is a run of train.py: `python sample.py .* --format npz`
"""


@pytest.mark.parametrize("command, message", [
    line.split(" | ", 1) for line in BAD_INPUT.strip().splitlines()])
def test_bad_input_ends_with_one_clear_line_and_changes_nothing(
        command, message, tmp_path, bad, finished, folder, clips):
    places = {"BAD": bad, "RUN": finished, "DATA": folder, "CLIP": clips[1]}
    name, *flags = (re.sub("BAD|RUN|DATA|CLIP", lambda found: str(places[found[0]]), word)
                    for word in command.split())
    if name == "train" and "--preset" not in flags:
        flags = [*flags_of(SHORT), *flags]
    if name == "train" and "--out" not in flags:
        flags += ["--out", tmp_path / "run"]
    if name == "fid":
        flags += ["--inception", "random"]
    before = contents(bad, finished, folder, clips[1])
    code, out, err = run({"train": train, "sample": sample, "fid": fid}[name], *flags)
    assert re.search(message.strip(), error_line(code, out, err))
    assert all(line.startswith("left out") for line in out.splitlines())
    assert contents(bad, finished, folder, clips[1]) == before and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    put(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b").chmod(0)
    with pytest.raises(train.InputError, match="/b"):
        train.open_data(str(tmp_path), 8, seed=0)
    (tmp_path / "b").chmod(0o700)


def test_names_may_have_letters_that_the_terminal_has_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    data = put(tmp_path / "data", "\u732b/1.png", "\u72ac/1.png")
    [(_, out, _)] = results(launch(ROOT / "train.py", "--data", data, "--out", tmp_path / "run",
                                  *flags_of(replace(TINY, steps=1))))
    assert r"2 images or clips, 2 classes: \u72ac, \u732b" in out


def test_a_mistake_of_ours_shows_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "read_clips", lambda *_: 1 / 0)  # in a thread that makes batches
    with pytest.raises(ZeroDivisionError):
        run(train, "--out", tmp_path / "run", *flags_of(TINY))


def test_processes_that_cannot_meet_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    line = error_line(*run(train, "--out", tmp_path / "run"))
    assert "cannot meet: start them with torchrun" in line and not list(tmp_path.iterdir())


def test_processes_that_see_other_checkpoints_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "agree", lambda value=0: max(value, 3))  # another is at step 3
    line = error_line(*run(train, "--out", tmp_path / "run", *flags_of(TINY)))
    assert "must be on a disk that all processes share" in line


def test_a_tilde_is_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(train, "--out=~/run", *flags_of(TINY))[0] == 0
    make_samples("~/run", "--out=~/samples", "--count", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "samples", "samples.png"}


# --------------------------------------------------------------------------------------------------
# 17. README

README = (ROOT / "README.md").read_text("utf-8")


def test_the_recipe_in_the_readme_is_that_of_the_module():
    """Its lines need nothing but a network. With the same random numbers they give the same."""
    lines = {}
    exec(re.search("```python\n(import math.*?)```", README, re.S)[1], lines)
    for config in sid2.PRESETS["imagenet64"], sid2.PRESETS["imagenet128"]:
        config = replace(config, num_classes=4, sample_steps=12, guidance=3.0)
        S, y = config.image_size, torch.tensor([3, 0])

        def net(z, logsnr, y):
            return torch.sin(z + (y + logsnr)[:, None, None, None])

        x = normal(2, 3, S, S).clamp(-1, 1)
        torch.manual_seed(0)
        loss = lines["training_loss"](net, x, y, config.bias)
        torch.manual_seed(0)
        t = sid2.low_discrepancy_times(2, torch.rand(1).item())
        assert_close(loss, sid2.training_loss(net, config, x, y, t, torch.randn_like(x)).mean())
        torch.manual_seed(5)
        image = lines["sample"](net, y[:1], 4, S, 3.0, config.interval, steps=12)
        assert {*sid2.sampling_grid(config)[1]} == {False, True}
        assert_close(image, sid2.sample(net, config, [5], y[:1]), rtol=0, atol=1e-4)
    for size, bias, expected in (64, 2, 1.16), (128, 0, 0.50), (256, -1, 0.29), (512, -3, 0.08):
        assert f" {expected:.2f}" in README
        x = normal(1000, 1, 1, size).sign()
        loss = lines["training_loss"](lambda z, logsnr, y: 0 * z, x, None, bias)
        assert abs(loss - expected) < 0.01


def test_the_readme_runs_as_it_stands(tmp_path):
    """Its Python does, its commands have flags that exist, and lines that it quotes from the module
    stand there. --help says what each flag means."""
    names = {}
    fit(tmp_path / "run")
    for block in re.findall("```python\n(.*?)```", README, re.S):
        exec(block.replace("RUN", str(tmp_path / "run")), names)
    assert names["images"].shape == (8, 3, 8, 8)
    assert {*re.findall(r"assets/[a-z0-9]+\.\w+", README)} == {
        f"assets/{file.name}" for file in (ROOT / "assets").iterdir()}
    quoted = re.findall(r"`(\w+ = [^`]*)`", README)
    assert len(quoted) > 2 and all(line in SOURCE for line in quoted)
    helps = {script.__name__: run(script, "--help")[1] for script in (train, sample, fid)}
    assert "the weighting sigmoid(b - logsnr)" in " ".join(helps["train"].split())
    flags = {name: {*re.findall(r"--[a-z][a-z-]+", text)} for name, text in helps.items()}
    commands = re.findall(r"(train|sample|fid)\.py ([^`]*?(?<!\\))[\n`]", README)
    assert len(commands) > 9
    for name, command in commands:
        assert set(re.findall(r"--[a-z][a-z-]+", command)) <= flags[name], command


# --------------------------------------------------------------------------------------------------
# 18. fid.py


def test_inception_has_the_tensors_of_the_published_weights_and_three_outputs():
    """The three numbers are of code that was equal to pytorch-fid's (0.3.0) on the same random
    weights. They differ if a mean counts the padding."""
    net = fid.load_inception("random")
    shapes = {k: v.shape for k, v in net.state_dict().items() if "num_batches" not in k}
    assert len(shapes) == 472 and sum(map(math.prod, shapes.values())) == 23_885_392
    with torch.no_grad():
        outputs = net(normal(1, 3, 299, 299))
    assert [out.shape[1] for out in outputs] == [2048, 2023, 1008]
    summary = [(out @ torch.linspace(-1, 1, out.shape[1])).item() for out in outputs]
    assert summary == pytest.approx([-18.040, -0.77179, 9.8983], rel=1e-3)


def test_resize_is_tensorflow_1s():
    """Source place = destination * in / out; nothing centred or averaged, the edge repeats."""
    for values, expected in ([0, 1], [0, 0.5, 1, 1]), ([0, 10, 20, 90], [0, 20]), ([7], [7, 7, 7]):
        x = torch.tensor(values, dtype=torch.float32).expand(1, 1, len(values), -1)
        assert fid.resize(x, len(expected))[0, 0].tolist() == [expected] * len(expected)
    image = noise(5, 7).astype(np.float32)
    i, j = np.arange(299) * 5 / 299, np.arange(299) * 7 / 299
    rows = [np.interp(j, np.arange(7), row) for row in image]
    expected = np.stack([np.interp(i, np.arange(5), column) for column in np.transpose(rows)], 1)
    resized = fid.resize(torch.from_numpy(image)[None, None])[0, 0].numpy()
    assert abs(resized - expected).max() < 1e-2


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
    # called as the class is, fresh.train returns fresh
    for name, value in dict(Inception=fresh.train, URL=file.as_uri(), SHA256=digest).items():
        monkeypatch.setattr(fid, name, value)
    for path in (None, str(file)):
        torch.nn.init.zeros_(fresh[0].weight)
        net = fid.load_inception(path)
        assert not net.training
        assert_close(net.state_dict(), right.state_dict(), rtol=0, atol=0)
    halve(next((tmp_path / "home").rglob("*.pth")))
    for path in (None, "nowhere.pth"):
        with pytest.raises(train.InputError, match=f"^no weights .* fetch {fid.URL} .*{digest}"):
            fid.load_inception(path)


def gaussian(n, d, seed=0):
    """n draws of a normal distribution whose mean and covariance depend on the seed."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d))


def test_frechet_distance_has_its_closed_forms():
    """Common axes: |mu_1 - mu_2|² + Σ (√a - √b)². Otherwise the textbook's tr (S_1 S_2)^½, by
    eigenvalues. Fewer images than features make covariances singular."""
    mu, axes = gaussian(40, 1)[:, 0], torch.linalg.qr(gaussian(40, 40))[0]
    a, b = mu.abs() + 0.1, (2 - mu).abs()
    expected = mu.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    distance = fid.frechet(mu, axes * a @ axes.T, 2 * mu, axes * b @ axes.T)
    assert distance == pytest.approx(expected.item(), rel=1e-9)
    (mu_1, S_1), (mu_2, S_2) = ((x.mean(0), x.T.cov()) for x in (gaussian(400, 60),
                                                                gaussian(400, 60, seed=1)))
    root = torch.linalg.eigvals(S_1 @ S_2).real.sqrt().sum()
    expected = (mu_1 - mu_2).square().sum() + S_1.trace() + S_2.trace() - 2 * root
    assert fid.frechet(mu_1, S_1, mu_2, S_2) == pytest.approx(expected.item(), rel=1e-9)
    mu, S = gaussian(20, 100).mean(0), gaussian(20, 100).T.cov()
    assert 0 <= fid.frechet(mu, S, mu, S) < 2e-6 * S.trace()


def test_precision_and_recall_equal_brute_force():
    """Balls reach the third neighbour; those around the reference give precision."""
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


def test_statistics_equal_direct_ones_whatever_the_batch(tmp_path):
    """Pixels reach the network as TF1's resize minus 128 over 128. Mean and covariance (ddof 1)
    though features are near 1000, where float32 sums would lose the third digit; IS over shuffled
    splits; mixed sizes; every image once."""
    images = [*noise(4, 9, 9, 3), *noise(3, 8, 8, 3)]
    put_all(tmp_path / "large", images[:4])
    put_all(tmp_path / "small", images[4:])
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


def test_fid_sees_the_pictures_that_training_sees(tmp_path, folder):
    """Of every kind, and in an npz: a perfect model must have distance 0 to its own data."""
    trained, _ = look_at(folder)
    assert np.array_equal(fid.open_source(folder, crop=8).read(np.arange(9)), trained)
    source = fid.open_source(npz(tmp_path / "x.npz", arr_0=trained))
    assert source.count == 9
    assert np.array_equal(source.read(np.array([1, 3, 4])), trained[[1, 3, 4]])


def make_light(patch):
    """Exchanges what takes seconds: the network, and the eigenvalues of 2,048 features."""
    whole, n = fid.frechet, 64
    patch(fid, "load_inception", lambda path: Shallow())
    patch(fid, "frechet", lambda a, A, b, B: whole(a[:n], A[:n, :n], b[:n], B[:n, :n]))


@pytest.fixture
def score(tmp_path, monkeypatch):
    """Runs `python fid.py ...`, made light, in a folder of its own: what it printed, and wrote."""
    monkeypatch.chdir(tmp_path)
    make_light(monkeypatch.setattr)

    def score(*args, out):
        code, printed, err = run(fid, *args, "--inception", "random", "--out", out)
        assert code == 0, err
        return printed, json.loads(Path(out).read_text())

    return score


def test_the_script_saves_statistics_and_scores_against_them(score):
    """On images that are also the reference. ADM's files have images too: precision and recall are
    of these, FID of mu and sigma. Notes name sizes that differ, and few images."""
    put_all(Path("real/nested"), noise(5, 12, 12, 3))
    score("real", "--save-stats", "ref.npz", "--crop", 8, out="a.json")
    crops = np.stack([train.centre_crop(Image.open(f"real/nested/{i}.png"), 8) for i in range(5)])
    npz("samples.npz", arr_0=crops)
    npz("adm.npz", arr_0=crops, mu=MOMENTS[0], sigma=MOMENTS[1])
    printed, report = score("samples.npz", "ref.npz", "real", "real", out="b.json")
    assert report["settings"]["weights"] == "random" and "FID is biased" in printed
    assert "samples.npz has images of 8 x 8 pixels, real of 12 x 12" in report["notes"]
    assert list(report["results"]) == ["ref.npz", "real"]  # each once
    result = report["results"]["ref.npz"]
    assert list(result) == ["random-FID-5", "random-sFID-5", "random-IS-5"]
    assert result["random-FID-5"] < 1e-4  # the reference itself

    _, report = score("adm.npz", "adm.npz", "--precision-recall", "--kid", out="c.json")
    result = report["results"]["adm.npz"]
    assert list(result) == [f"random-{k}" for k in "FID-5 IS-5 precision recall KID".split()]
    assert result["random-precision"] == result["random-recall"] == 1
    assert result["random-FID-5"] > 20 and result["random-KID"] < 0  # without bias, on one set


def test_two_processes_give_the_numbers_of_one(score):
    """Eleven images, some of another size, are shared out: none twice, none missing."""
    put_all(Path("samples/large"), noise(8, 9, 9, 3))
    put_all(Path("samples/small"), noise(3, 8, 8, 3))
    npz("ref.npz", arr_0=noise(5, 8, 8, 3))
    light = (f"import fid; from {Path(__file__).stem} import make_light; "
             "make_light(setattr); fid.main()")
    command = ("samples", "ref.npz", "--batch", 2, "--precision-recall", "--kid")
    started = launch("-c", light, *command, "--out", "two.json", "--inception", "random",
                     "--device", "cpu", processes=2)
    _, one = score(*command, out="one.json")
    results(started)
    two = json.loads(Path("two.json").read_text())
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    assert two["results"]["ref.npz"] == pytest.approx(one["results"]["ref.npz"], rel=1e-6)
    assert one["images"] == two["images"] == {"samples": 11, "ref.npz": 5}

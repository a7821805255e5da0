"""The method as true sentences, in the order of sid2.py; then the scripts, run end to end. CPU only, no download.

    python -m pytest

What needs more than this folder skips and says so:
SID2_IMAGES=FOLDER        trains on real images
SID2_RUN=runs/shapes      judges samples of a run, and every npz in its folder
SID2_INCEPTION=FILE       tests the published weights of Inception
SID2_LONG=1               kills 90 runs and reads 12,000 damaged files: 9 minutes on two cores
"""

import ast
import builtins
import contextlib
import csv
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
import subprocess
import sys
import tarfile
import time
import tokenize
import types
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import fid
import sample
import sid2
import train

ROOT = Path(__file__).parent
SOURCE = (ROOT / "sid2.py").read_text()
PAPER = list(sid2.PUBLISHED)
TINY = sid2.Config(8, 1, (8, 16), "RT", depth=1, middle=1, width=16, head_width=8, dropout=0.0, num_classes=3,
                   noise_high=32, bias=1.0, steps=4, batch=8, lr=1e-2, warmup=2, sample_steps=3)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(config=TINY, seed=0, scale=0.3):
    """A network without zero layers: every parameter is random, so that every line of it matters."""
    torch.manual_seed(seed)
    net = sid2.UViT(config).eval()
    for p in net.parameters():
        p.data += scale * torch.randn_like(p)
    return net


# ---------------------------------------------------------------------------------------------------
# 1. Configuration


def test_every_constant_says_where_it_comes_from():
    """A number of more than structural meaning carries a tag on its own line; presets carry it on the row, the paper's
    rows in the comment above them."""
    lines, untagged = SOURCE.splitlines(), []
    explained = {m.group(1) for m in re.finditer(r"^    \[(\S+)\]", SOURCE, re.M)}
    tags = re.findall(r"\[(SiD\S*?|SD|VDM\S*?|MCM|GI|derived|ours)\]", SOURCE)
    assert set(tags) == explained and len(tags) > 60
    body, table = SOURCE.split("# 7. `python")[0], range(lines.index("PRESETS = {"), lines.index("# 2. Noise process: variance "
                  "preserving, in float32 whatever the autocast state"))
    for token in tokenize.generate_tokens(io.StringIO(body).readline):
        n = token.start[0] - 1
        if token.type == tokenize.NUMBER and float(token.string) not in (0, 0.5, 1, 2, 3) and n not in table:
            if not re.search(r"\[(SiD2\*?|SD|VDM\+*|MCM|GI|derived|ours)\]|permute", lines[n]):
                untagged.append(f"{n + 1}: {lines[n]}")
    assert not untagged
    rows = re.split(r'\n    (?=")', SOURCE.split("PRESETS = {")[1].split("\n}")[0])
    assert all("[ours]" in row for row in rows[1:3]) and len(rows) == 9
    above = SOURCE.split("PRESETS = {")[0].splitlines()[-4:]
    assert all(tag in "".join(above) for tag in ("[SiD2]", "[SiD2*]", "[MCM]", "[VDM++]", "[derived]"))


def test_tags_do_not_promise_more_than_is_known():
    """A second-hand fact is never the paper's own; what nobody could read is ours."""
    tags = dict(re.findall(r"^    (\w+): \w+.*\[([^\]]+)\]$", SOURCE, re.M))
    second_hand = "depth middle width dropout noise_low sample_steps".split()
    sister = "steps batch lr warmup ema label_dropout gamma".split()
    ours = "head_width micro_batch flip log_every sample_every save_every".split()
    for names, tag in ((second_hand, "SiD2*"), (sister, "SD"), (ours, "ours"), (["guidance", "interval"], "GI")):
        assert all(tags[name] == tag for name in names), tag
    assert SOURCE.count("[SiD2]") == 4  # the legend, ImageNet, finer patches, the weighting


def test_every_field_of_the_configuration_is_explained():
    for line in SOURCE.split("class Config")[1].split("\n\n\n")[0].splitlines():
        assert not re.match(r"    \w+: ", line) or "  # " in line, line


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers_networks(name):
    """Blocks alone, by closed formulas, give the published GMAC; all parameters and operations are counted on meta."""
    config, (gmac, parameters, _) = sid2.PRESETS[name], sid2.PUBLISHED[name]
    blocks = 0
    for level, (C, kind) in enumerate(zip(config.channels, config.blocks)):
        N = (config.image_size // config.patch_size >> level) ** 2
        count = config.middle if level == len(config.channels) - 1 else 2 * config.depth
        blocks += count * (18 * C * C * N if kind == "R" else 12 * C * C * N + 2 * N * N * C) / 1e9
    counted_parameters, counted = sid2.count(config)
    assert blocks == pytest.approx(gmac, rel=0.005)
    assert blocks < counted < 1.01 * blocks
    assert counted_parameters / 1e6 == pytest.approx(parameters, rel=0.01)


def test_paper_presets_hold_the_papers_hyperparameters():
    rows = {name: sid2.PRESETS[name] for name in PAPER}
    assert [c.bias for c in rows.values()] == [2, 0, -1, -1, -3, -3]
    assert [c.patch_size for c in rows.values()] == [1, 1, 2, 1, 4, 2]
    for c in rows.values():
        assert (c.noise_low, c.noise_high) == (32, c.image_size)
        assert (c.depth, c.middle, c.width, c.dropout, c.num_classes) == (3, 16, 1024, 0.1, 1000)
        assert (c.lr, c.warmup, c.ema, c.batch, c.label_dropout) == (1e-4, 10_000, 0.9999, 2048, 0.1)
        assert (c.sampler, c.sample_steps, c.gamma) == ("ddpm", 512, 0.2)


def test_the_guidance_interval_is_the_cited_one():
    """Noise sigma of variance-exploding notation in (0.28, 2.90] is logsnr = -2 log sigma in [-2.13, 2.55)."""
    low, high = sid2.PRESETS["imagenet512_p2"].interval
    assert low == pytest.approx(-2 * math.log(2.90), abs=5e-3) and high == pytest.approx(-2 * math.log(0.28), abs=5e-3)


@pytest.mark.parametrize("change", [
    dict(image_size=9), dict(blocks="R"), dict(blocks="RX"), dict(head_width=7), dict(width=15), dict(dropout=1.5),
    dict(gamma=-0.1), dict(sampler="euler"), dict(interval=(1.0, -1.0)), dict(interval=(1.0,)), dict(lr=math.nan), dict(steps=0),
    dict(batch=0), dict(channels=(8, -16)), dict(channels=()), dict(num_classes=-1), dict(bias=math.nan), dict(patch_size=0),
    dict(guidance=math.inf), dict(noise_low=0)])
def test_impossible_configurations_are_refused(change, capsys):
    with pytest.raises(SystemExit):
        sample.make_config(**asdict(TINY) | change)
    assert next(iter(change)) in capsys.readouterr().err


def test_the_table_of_presets_names_them_all(capsys):
    sid2.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in sid2.PRESETS)
    assert re.search(r"imagenet512_p2 +400\.1 +397 +656\.42 +653 +1\.48 - 1\.50 +-3 +32-512 ", printed)


# ---------------------------------------------------------------------------------------------------
# 2. Noise process

T = torch.linspace(0, 1, 201)
EXTREMES = torch.tensor([-20.0, -10, -1, 0, 3, 10, 17, 25])


def test_the_schedule_runs_from_plus_ten_to_minus_ten_plus_its_shifts():
    for size, low, high in [(64, 64, 64), (512, 32, 512), (16, 32, 32), (128, 32, 128)]:
        logsnr, _ = sid2.schedule(T, size, low, high)
        shift_low, shift_high = 2 * math.log(low / size), 2 * math.log(high / size)
        assert logsnr[0].item() == pytest.approx(10 + shift_high, abs=1e-4)
        assert logsnr[-1].item() == pytest.approx(-10 + shift_low, abs=1e-3)
        assert logsnr[100].item() == pytest.approx((shift_low + shift_high) / 2, abs=1e-5)
        assert logsnr.isfinite().all() and (logsnr.diff() < 0).all()
    cosine = sid2.schedule(torch.tensor([0.25]), 64, 64, 64)[0]
    angle = math.atan(math.exp(-5)) + 0.25 * (math.atan(math.exp(5)) - math.atan(math.exp(-5)))
    assert cosine.item() == pytest.approx(-2 * math.log(math.tan(angle)), rel=1e-6)


def test_the_slope_is_the_derivative():
    t = T[1:-1].clone().requires_grad_()
    for size, low, high in [(64, 64, 64), (512, 32, 512), (256, 16, 64)]:
        logsnr, slope = sid2.schedule(t, size, low, high)
        (derivative,) = torch.autograd.grad(logsnr.sum(), t)
        torch.testing.assert_close(slope, derivative, rtol=1e-4, atol=1e-4)
    assert sid2.schedule(T, 512, 32, 512)[1].isfinite().all()


def test_the_shift_is_average_pooling():
    """The argument that fixes sign and size of the shift: pooling 2x2 quarters the noise variance, +log 4 in logsnr."""
    at_128, at_64 = sid2.schedule(T, 128, 64, 64)[0], sid2.schedule(T, 64, 64, 64)[0]
    torch.testing.assert_close(at_128 + math.log(4), at_64, rtol=1e-5, atol=1e-5)
    logsnr = at_128[100]
    pooled = F.avg_pool2d(sid2.diffuse(torch.zeros(64, 3, 128, 128), normal(64, 3, 128, 128), logsnr), 2)
    alpha, _ = sid2.alpha_sigma(logsnr)
    assert 2 * math.log(alpha.item() / pooled.std().item()) == pytest.approx(at_64[100].item(), abs=0.01)


def test_the_process_is_float32_under_autocast():
    """In bfloat16 logsnr is wrong by more than a nat."""
    with torch.autocast("cpu", torch.bfloat16):
        logsnr, slope = sid2.schedule(T.bfloat16(), 64, 32, 64)
        z = sid2.diffuse(normal(201, 3, 4, 4), normal(201, 3, 4, 4, seed=1), logsnr)
    assert {logsnr.dtype, slope.dtype, z.dtype, *(a.dtype for a in sid2.alpha_sigma(logsnr.bfloat16()))} == {torch.float32}
    t = torch.linspace(0, 1, 100_001)
    u_0, u_1 = math.atan(math.exp(-5)), math.atan(math.exp(5))
    low_precision = -2 * torch.log(torch.tan(u_0 + t.bfloat16() * (u_1 - u_0)))
    assert 1.2 < (low_precision.float() - sid2.schedule(t, 64, 64, 64)[0]).abs().max() < 1.4


def test_alpha_and_sigma_are_exact_at_the_extremes():
    """alpha² + sigma² = 1 and log alpha²/sigma² = logsnr; sqrt(1 - alpha²) would be 0 from logsnr 17 up."""
    alpha, sigma = (a.double().squeeze() for a in sid2.alpha_sigma(EXTREMES))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(8).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(2 * torch.log(alpha / sigma), EXTREMES.double(), rtol=1e-6, atol=1e-6)
    assert (1 - sid2.alpha_sigma(EXTREMES[6:])[0].square() == 0).all()


def test_x_and_eps_come_back_from_v():
    x, eps = normal(8, 3, 4, 4), normal(8, 3, 4, 4, seed=1)
    z, v = sid2.diffuse(x, eps, EXTREMES), sid2.v_from_x_eps(x, eps, EXTREMES)
    alpha, sigma = EXTREMES.sigmoid().sqrt(), (-EXTREMES).sigmoid().sqrt()
    torch.testing.assert_close(z, torch.einsum("b,b...->b...", alpha, x) + torch.einsum("b,b...->b...", sigma, eps))
    torch.testing.assert_close(sid2.x_from_v(z, v, EXTREMES), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sid2.eps_from_v(z, v, EXTREMES), eps, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------
# 3. Loss


def test_the_loss_seen_from_x_eps_and_v_is_one_loss():
    """½ (-dlogsnr/dt) times sigmoid(b - l) |d eps|² = e^b sigmoid(l - b) |d x|² = e^b sigmoid(l - b) sigmoid(-l) |d v|²."""
    b, (logsnr, slope) = -3.0, sid2.schedule(T[20:180:20], 512, 32, 512)
    x, eps, v_hat = (normal(8, 3, 4, 4, seed=i) for i in range(3))
    z, v = sid2.diffuse(x, eps, logsnr), sid2.v_from_x_eps(x, eps, logsnr)
    error = lambda a, a_hat: (a - a_hat).square().mean((1, 2, 3))
    loss = sid2.sigmoid_loss(v_hat, v, logsnr, slope, b)
    from_eps = -slope / 2 * torch.sigmoid(b - logsnr) * error(eps, sid2.eps_from_v(z, v_hat, logsnr))
    from_x = -slope / 2 * math.exp(b) * torch.sigmoid(logsnr - b) * error(x, sid2.x_from_v(z, v_hat, logsnr))
    from_v = -slope / 2 * math.exp(b) * torch.sigmoid(logsnr - b) * torch.sigmoid(-logsnr) * error(v, v_hat)
    for other in (from_eps, from_x, from_v):
        torch.testing.assert_close(loss, other, rtol=2e-4, atol=0)
    assert loss.shape == (8,) and (loss > 0).all()


def test_the_expected_loss_depends_on_the_schedule_through_its_ends_only():
    """With an error of 1 in eps the loss integrates to ½ (softplus(b - l_1) - softplus(b - l_0)), for any path between
    the ends. Without -dlogsnr/dt the two paths below differ by far."""
    b, N, values = 2.0, 20_001, []
    t = torch.linspace(0, 1, N)
    straight = 10 - 20 * t, torch.full((N,), -20.0)
    for logsnr, slope in (sid2.schedule(t, 64, 64, 64), straight):
        v_error = torch.sigmoid(logsnr).rsqrt()[:, None, None, None]  # d eps = alpha d v = 1
        values.append(torch.trapezoid(sid2.sigmoid_loss(v_error, torch.zeros(N, 1, 1, 1), logsnr, slope, b).double(), t.double()))
    exact = 0.5 * (math.log1p(math.exp(12)) - math.log1p(math.exp(-8)))
    assert [float(v) for v in values] == pytest.approx([exact, exact], rel=1e-4)


def test_the_loss_is_float32_and_a_mean_over_pixels():
    v_hat, v = normal(2, 3, 8, 8).bfloat16(), normal(2, 3, 8, 8, seed=1)
    loss = sid2.sigmoid_loss(v_hat, v, torch.zeros(2), torch.full((2,), -4.0), 0.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, 0.5 * 4 * 0.5 * 0.5 * (v_hat.float() - v).square().flatten(1).mean(1))


def test_times_cover_the_interval_evenly_whatever_the_number_of_processes():
    batch, u = 64, 0.7391
    whole = sid2.low_discrepancy_times(torch.arange(batch), batch, u)
    shares = torch.cat([sid2.low_discrepancy_times(torch.arange(r * 16, r * 16 + 16), batch, u) for r in range(4)])
    assert torch.equal(whole, shares) and (whole >= 0).all() and (whole < 1).all()
    torch.testing.assert_close(whole.sort().values.diff(), torch.full((batch - 1,), 1 / batch), rtol=1e-4, atol=1e-6)
    assert whole[0].item() == pytest.approx(u) and whole[16].item() == pytest.approx(u + 0.25)


# ---------------------------------------------------------------------------------------------------
# 4. Network


def test_a_fresh_trunk_is_the_identity_bit_for_bit():
    """And the head answers zero: training starts from the mean of v, not from noise."""
    for config in (TINY, replace(TINY, blocks="TT"), replace(TINY, channels=(8, 16, 16), blocks="RRT")):
        net = sid2.UViT(config)
        h, c = normal(2, 8, 8, 8), normal(2, 16)
        assert torch.equal(net.trunk(h, c), h)
        assert torch.equal(net(normal(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long()), torch.zeros(2, 3, 8, 8))
        assert not torch.equal(shaken(config).trunk(h, c), h)


def test_the_skip_carries_what_the_level_below_has_changed():
    """h = high + up(h - low), spelt out for one level."""
    net, h, c = shaken(), normal(2, 8, 8, 8), normal(2, 16)
    high = net.blocks_down[0][0](h, c)
    pooled = high.reshape(2, 4, 2, 4, 2, 8).mean((2, 4))
    low = pooled @ net.down[0].project.weight.T + net.down[0].project.bias + net.position
    changed = (net.middle[0](low, c) - low) @ net.up[0].project.weight.T
    expected = net.blocks_up[0][0](high + changed.repeat_interleave(2, 1).repeat_interleave(2, 2), c)
    torch.testing.assert_close(net.trunk(h, c), expected)
    assert net.up[0].project.bias is None


def test_a_residual_block_is_its_formula():
    block = shaken().blocks_down[0][0]
    h, c, (scale, shift) = normal(2, 5, 5, 8), normal(2, 16), block.film(normal(2, 16))[:, None, None].chunk(2, -1)
    norm = lambda h, gain: h / h.square().mean(-1, keepdim=True).sqrt() * gain
    conv = lambda h, layer: F.conv2d(h.movedim(3, 1), layer.weight, layer.bias, padding=1).movedim(1, 3)
    r = conv(F.silu(norm(h, block.norm1.gain)), block.conv1)
    r = conv(F.silu(norm(r, block.norm2.gain) * (1 + scale) + shift), block.conv2)
    torch.testing.assert_close(block(h, c), h + r, rtol=1e-4, atol=1e-4)


def test_a_transformer_block_is_its_formula():
    """MLP before attention; q and k normalised per head; c in the hidden layer of the MLP only."""
    block = shaken().middle[0]
    h, c = normal(2, 3, 3, 16), normal(2, 16)
    scale, shift = block.film(c)[:, None, None].chunk(2, -1)
    norm = lambda h, gain: h / h.square().mean(-1, keepdim=True).sqrt() * gain
    m = h + block.mlp_out(F.silu(block.mlp_in(norm(h, block.norm_mlp.gain))) * (1 + scale) + shift)
    q, k, v = block.qkv(norm(m, block.norm_attention.gain)).reshape(2, 9, 3, 2, 8).unbind(2)
    q, k = norm(q, block.norm_q.gain), norm(k, block.norm_k.gain)
    attention = torch.einsum("bihd,bjhd->bhij", q, k).div(math.sqrt(8)).softmax(-1)
    r = torch.einsum("bhij,bjhd->bihd", attention, v).reshape(2, 3, 3, 16)
    torch.testing.assert_close(block(h, c), m + block.attention_out(r), rtol=1e-4, atol=1e-4)


def test_a_norm_divides_by_the_root_of_a_mean_in_float32():
    """In bfloat16 nothing but the factor and the products are rounded: the mean of n ones of 1024 has all its digits."""
    h = (torch.arange(1024) <= torch.arange(1024)[:, None]).float()
    exact = h * torch.rsqrt(torch.arange(1, 1025) / 1024 + 1e-6)[:, None]
    norm = sid2.RMSNorm(1024)
    torch.testing.assert_close(norm(h), exact)
    assert torch.equal(norm(h.bfloat16()), exact.bfloat16())
    norm.gain.data = torch.rand(1024)
    torch.testing.assert_close(norm(h), exact * norm.gain)
    torch.testing.assert_close(norm(h.bfloat16()), (exact * norm.gain).bfloat16(), rtol=2**-6, atol=0)  # and its type


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket] += 1
        return operation(*args, **(kwargs or {}))


def test_features_are_copied_only_where_they_are_doubled():
    """Channels last, convolutions, tokens and heads are views of each other; `up` repeats rows, then columns."""
    net, c = shaken(replace(TINY, channels=(8, 16, 16), blocks="RTT")), normal(2, 16)
    with Operations() as run:
        net.trunk(normal(2, 8, 8, 8), c)
    assert run.counts[torch.ops.aten.clone] == 2 * 2
    assert run.counts[torch.ops.aten._to_copy] == run.counts[torch.ops.aten.copy_] == 0


def test_attention_goes_through_torchs_kernel(monkeypatch):
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k))
    shaken()(normal(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long())
    assert calls == [(2, 2, 16, 8)]


def test_the_condition_tells_noise_levels_and_classes_apart():
    """Neighbours among 512 steps, at least 0.012 nats apart, and the null class have vectors of their own."""
    assert sid2.schedule(torch.linspace(0, 1, 513), 64, 64, 64)[0].diff().abs().min().item() == pytest.approx(0.012, abs=5e-4)
    condition = sid2.Condition(64, 3)
    logsnr, y = torch.tensor([0.0, 0.012, 0.0, 0.0]), torch.tensor([0, 0, 1, 3])
    c = condition(logsnr, y)
    assert all((c[0] - other).abs().max() > 1e-3 for other in c[1:])
    frequency = 10 ** torch.linspace(3, -1, 32)
    s = torch.cat([(0.5 * frequency).sin(), (0.5 * frequency).cos()])  # logsnr 0 is the middle of the map
    torch.testing.assert_close(c[0], F.silu(condition.dense2(F.silu(condition.dense1(s))) + condition.label.weight[0]))


def test_no_parameter_is_dead():
    """Zero layers wake one after the other: after three steps every parameter has a gradient and has moved."""
    for config in (TINY, replace(TINY, num_classes=0, blocks="TT", patch_size=2)):
        torch.manual_seed(0)
        net = sid2.UViT(config)
        before, optimizer = [p.clone() for p in net.parameters()], torch.optim.Adam(net.parameters(), 1e-2)
        y = torch.arange(8) % (config.num_classes + 1)
        for step in range(4):
            optimizer.zero_grad()
            (net(normal(8, 3, 8, 8, seed=step), normal(8), y) - normal(8, 3, 8, 8, seed=9)).square().mean().backward()
            optimizer.step()
        for (name, p), old in zip(net.named_parameters(), before):
            assert p.grad.abs().max() > 0 and not torch.equal(p, old), name


def test_no_example_sees_its_batch_neighbours():
    net, z, logsnr, y = shaken(), normal(4, 3, 8, 8), normal(4), torch.tensor([0, 1, 2, 3])
    together = net(z, logsnr, y)
    for i in range(4):
        torch.testing.assert_close(together[i], net(z[i : i + 1], logsnr[i : i + 1], y[i : i + 1])[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], net(z, logsnr, y + torch.tensor([1, 0, 0, 0]))[0], atol=1e-3)
    assert not torch.allclose(together[0], net(z, logsnr + torch.tensor([1, 0, 0, 0]), y)[0], atol=1e-3)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_any_patch_size_keeps_pixels_in_place(patch):
    """With linear patch layers that undo each other and a fresh trunk, the network would return its input."""
    config = replace(TINY, image_size=16, patch_size=patch, channels=(3 * patch**2, 8))
    net, z = sid2.UViT(config), normal(2, 3, 16, 16)
    torch.nn.init.eye_(net.embed.weight), torch.nn.init.zeros_(net.embed.bias), torch.nn.init.eye_(net.head.weight)
    patches = F.unfold(z, patch, stride=patch).transpose(1, 2)  # (B, N, 3 p²)
    expected = F.silu(patches / patches.square().mean(-1, keepdim=True).sqrt()).transpose(1, 2)
    expected = F.fold(expected, 16, patch, stride=patch)
    torch.testing.assert_close(net(z, torch.zeros(2), torch.zeros(2).long()), expected, rtol=1e-4, atol=1e-4)


def test_the_position_embedding_stands_where_transformers_begin():
    shape = lambda blocks, C: list(sid2.UViT(replace(TINY, blocks=blocks, channels=C)).position.shape)
    assert shape("RT", (8, 16)) == [4, 4, 16] and shape("TT", (8, 16)) == [8, 8, 8]
    assert shape("RTT", (8, 16, 24)) == [4, 4, 16]
    assert not hasattr(sid2.UViT(replace(TINY, blocks="RR")), "position")
    assert sid2.UViT(replace(TINY, image_size=64)).position.std().item() == pytest.approx(0.01, rel=0.05)
    top, moved = shaken(replace(TINY, blocks="TT")), shaken(replace(TINY, blocks="TT"))
    moved.position.data += 1
    z = normal(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long()
    assert not torch.allclose(top(*z), moved(*z), atol=1e-3)


def test_dropout_acts_in_transformer_blocks_and_in_training_only():
    net, z, y = shaken(replace(TINY, dropout=0.5)), normal(2, 3, 8, 8), torch.zeros(2).long()
    assert [type(m).__name__ for m in net.modules() if any(isinstance(k, torch.nn.Dropout) for k in m.children())] == ["TransformerBlock"]
    assert torch.equal(net(z, torch.zeros(2), y), net(z, torch.zeros(2), y))
    net.train()
    assert not torch.equal(net(z, torch.zeros(2), y), net(z, torch.zeros(2), y))


def test_checkpointing_changes_memory_and_nothing_else(monkeypatch):
    """Of the levels named, each block is computed again: two of the top level, one of the middle."""
    calls, real, gradients = [], sid2.checkpoint, []
    monkeypatch.setattr(sid2, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    for levels, blocks in ((), 0), ([0], 2), ([1], 1), ([0, 1], 3):
        net, kept = shaken().train(), []
        net.checkpointing = levels
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            loss = net(normal(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long()).square().sum()
        loss.backward()
        gradients.append(([p.grad for p in net.parameters()], sum(kept)))
        assert len(calls) == blocks
        calls.clear()
    (first, most), *others = gradients
    assert all(torch.equal(a, b) for other, _ in others for a, b in zip(first, other))
    assert all(kept < most for _, kept in others) and gradients[3][1] == min(kept for _, kept in gradients)


def test_bfloat16_autocast_keeps_activations_small_and_the_answer_close():
    """A norm that returned float32 would promote the whole residual stream."""
    net, seen = shaken(scale=0.1), []
    for module in net.modules():
        if isinstance(module, (sid2.RMSNorm, sid2.ResBlock, sid2.TransformerBlock, sid2.Down)):
            module.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    z, logsnr, y = normal(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long()
    exact = net(z, logsnr, y)
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        close = net(z, logsnr, y)
    assert set(seen) == {torch.bfloat16} and close.dtype == torch.float32
    assert (close - exact).norm() / exact.norm() < 0.03


def test_compiling_in_place_gives_one_graph_and_leaves_the_names():
    net = shaken()
    before, z = set(net.state_dict()), (normal(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long())
    eager = net(*z)
    net.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(net(*z), eager, rtol=1e-4, atol=1e-4)
    assert set(net.state_dict()) == before


def test_training_compiles_once_and_guided_sampling_twice():
    """One graph for all steps, whatever noise and labels; two shapes in the sampler, with and without the null class."""
    graphs = []

    def counter(graph, _):
        graphs.append(graph)
        return graph.forward

    net, y = shaken().train(), torch.tensor([0, 1])
    net.compile(fullgraph=True, dynamic=False, backend=counter)
    for n in range(4):
        net(normal(2, 3, 8, 8, seed=n), normal(2, seed=n), y.roll(n)).sum().backward()
    assert len(graphs) == 1
    net.eval()
    for guidance in (2.0, 3.0):
        sid2.sample(net, [1, 2], y, 3, torch.linspace(-6, 6, 5), 8, guidance=guidance, interval=(-4.0, 4.0))
    assert len(graphs) == 3


# ---------------------------------------------------------------------------------------------------
# 5. Sampler


def exact_net(mean, variance):
    """The best possible v_hat when every pixel of the data is N(mean[y], variance)."""
    mean = torch.as_tensor(mean)

    def net(z, logsnr, y):
        alpha, sigma = sid2.alpha_sigma(logsnr)
        m = mean[y][:, None, None, None]
        x_hat = m + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * m)
        return (alpha * z - x_hat) / sigma
    return net


def logsnr_grid(S, size=32, low=32, high=32):
    return sid2.schedule(torch.arange(S, 0, -1) / S, size, low, high)[0]


def draw(net, seeds, labels, S, null=9, size=4, **kwargs):
    return sid2.sample(net, seeds, torch.tensor(labels), null, logsnr_grid(S), size, **kwargs)


def test_a_ddpm_step_is_the_gaussian_posterior():
    """gamma = 0 is q(z_s | z_t, x), found here by conditioning two Gaussians, in float64; gamma = 1 has the variance of
    q(z_t | z_s); between them, geometric."""
    l_t, l_s, z, x = torch.tensor(-1.3), torch.tensor(0.4), normal(1, 3, 2, 2), normal(1, 3, 2, 2, seed=1)
    a_t, s_t = (1 / (1 + math.exp(1.3))) ** 0.5, (1 / (1 + math.exp(-1.3))) ** 0.5
    a_s, s_s = (1 / (1 + math.exp(-0.4))) ** 0.5, (1 / (1 + math.exp(0.4))) ** 0.5
    a = a_t / a_s  # z_t = a z_s + sqrt(v) eps
    v = s_t**2 - a**2 * s_s**2
    gain = a * s_s**2 / s_t**2
    mean, variance = a_s * x + gain * (z - a_t * x), s_s**2 - gain * a * s_s**2
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    torch.testing.assert_close(sid2.ddpm_step(z, x, l_t, l_s, 0.0, zero), mean, rtol=1e-5, atol=1e-6)
    for gamma, expected in [(0.0, variance), (1.0, v), (0.5, (variance * v) ** 0.5)]:
        spread = sid2.ddpm_step(z, x, l_t, l_s, gamma, one) - sid2.ddpm_step(z, x, l_t, l_s, gamma, zero)
        torch.testing.assert_close(spread, math.sqrt(expected) * one, rtol=1e-5, atol=1e-6)


def test_ddpm_keeps_the_marginals_of_gaussian_data():
    """Exactly, in steps of any size: with gamma = 1 for standard normal data, with gamma = 0 for a single point."""
    O, y = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    marginal = lambda l: (a.item() for a in sid2.alpha_sigma(l))
    for S, (point, variance, gamma) in itertools.product((2, 3, 10), ((0.0, 1.0, 1.0), (0.5, 0.0, 0.0))):
        grid, net = logsnr_grid(S), exact_net([point], variance)
        alpha, sigma = marginal(grid[0])
        mean, var = alpha * point, alpha**2 * variance + sigma**2
        for l_t, l_s in zip(grid, grid[1:]):
            step = lambda z, n: sid2.ddpm_step(z, sid2.x_from_v(z, net(z, l_t.expand(1), y), l_t), l_t, l_s, gamma, n).item()
            offset, slope, spread = step(O, O), step(O + 1, O) - step(O, O), step(O, O + 1) - step(O, O)
            mean, var = offset + slope * mean, slope**2 * var + spread**2
            alpha, sigma = marginal(l_s)
            assert mean == pytest.approx(alpha * point, rel=1e-3, abs=1e-4)
            assert var == pytest.approx(alpha**2 * variance + sigma**2, rel=1e-3, abs=1e-4)


def test_small_steps_keep_their_noise():
    """1 - r at a step of 1e-4 nats: right to six digits, where 1 - exp(...) keeps four."""
    l_t, l_s, O = torch.tensor(0.0), torch.tensor(1e-4), torch.zeros(1, 1, 1, 1)
    variance = sid2.ddpm_step(O, O, l_t, l_s, 0.0, O + 1).item() ** 2
    assert variance == pytest.approx(-math.expm1(-float(l_s)) / (1 + math.exp(float(l_s))), rel=2e-6)


def test_ddim_is_of_first_order():
    """Against the exact solution for Gaussian data, z_s = z_t std_s / std_t: four times the steps, a quarter the error."""
    variance = 0.04
    std = lambda l: (torch.sigmoid(l) * variance + torch.sigmoid(-l)).sqrt().item()
    errors = []
    for S in (32, 128, 512):
        steps = list(sid2.sample_steps(exact_net([0.0], variance), [0], torch.tensor([0]), 1, logsnr_grid(S), 4, "ddim"))
        k = 3 * S // 4  # at t = 1/4
        exact = steps[0][0] * std(logsnr_grid(S)[k]) / std(logsnr_grid(S)[0])
        errors.append((steps[k][0] - exact).abs().max().item())
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5


def test_both_samplers_draw_gaussian_data_from_the_exact_network():
    """Mean and spread of the data come back, through the whole loop."""
    for kwargs, tolerance in ((dict(sampler="ddim"), 0.01), (dict(gamma=0.0), 0.02), (dict(gamma=1.0), 0.02)):
        x = draw(exact_net([0.3, -0.4], 0.01), list(range(64)), [0, 1] * 32, 128, size=8, **kwargs)
        assert x[::2].mean().item() == pytest.approx(0.3, abs=0.005) and x[1::2].mean().item() == pytest.approx(-0.4, abs=0.005)
        assert x[::2].std().item() == pytest.approx(0.1, abs=tolerance)


@pytest.mark.parametrize("S", [1, 2, 7])
def test_any_number_of_steps_finds_a_single_point(S):
    for sampler in ("ddpm", "ddim"):
        x = draw(exact_net([0.25], 0.0), [5], [0], S, sampler=sampler)
        torch.testing.assert_close(x, torch.full((1, 3, 4, 4), 0.25), rtol=1e-4, atol=1e-4)


def test_the_last_step_returns_x_hat_and_every_x_hat_is_clipped():
    for mean in (-3.0, 3.0):
        steps = list(sid2.sample_steps(exact_net([mean], 1.0), [0], torch.tensor([0]), 1, logsnr_grid(6), 4))
        assert len(steps) == 6 and all(x_hat.abs().max() <= 1 for _, x_hat in steps)
        assert any((x_hat == mean / 3).any() for _, x_hat in steps)
    assert torch.equal(draw(exact_net([3.0], 1.0), [0], [0], 6), steps[-1][1])
    (_, x_one), = sid2.sample_steps(exact_net([0.1], 0.04), [0], torch.tensor([0]), 1, logsnr_grid(1), 4)
    z = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))[None]
    torch.testing.assert_close(x_one, sid2.x_from_v(z, exact_net([0.1], 0.04)(z, logsnr_grid(1), torch.tensor([0])), logsnr_grid(1)))


def test_the_clipped_x_hat_is_what_the_next_step_uses():
    steps = list(sid2.sample_steps(exact_net([3.0], 1.0), [7], torch.tensor([0]), 1, logsnr_grid(5), 4, "ddim"))
    for i in range(4):
        (z, x_hat), l = steps[i], logsnr_grid(5)
        torch.testing.assert_close(steps[i + 1][0], sid2.ddim_step(z, x_hat, l[i], l[i + 1]))


def test_guidance_extrapolates_from_the_null_class():
    """x_null + w (x_y - x_null): with one point per class, at scale w, the sample is that combination of points."""
    net = exact_net([0.1, 0.2, -0.1], 0.0)
    for w in (0.0, 0.5, 2.0, 3.0):
        x = draw(net, [0, 1, 2], [0, 1, 1], 4, null=2, guidance=w)
        assert x[0].mean().item() == pytest.approx(-0.1 + w * 0.2, abs=1e-4)
        assert x[1].mean().item() == pytest.approx(-0.1 + w * 0.3, abs=1e-4)


def test_guidance_costs_a_second_pass_inside_its_interval_only():
    """Exactly S (1 + f) passes for a fraction f of guided steps; the lower end belongs to the interval, the upper does not."""
    S, passes = 10, []
    grid = logsnr_grid(S)

    def net(z, logsnr, y):
        passes.append((len(z), logsnr[0].item(), y.tolist()))
        return torch.zeros_like(z)

    def cost(**kwargs):
        passes.clear()
        draw(net, [0, 1], [4, 5], S, **kwargs)
        assert [l for _, l, _ in passes] == pytest.approx(grid.tolist())
        return sum(n for n, _, _ in passes) / 2

    assert cost() == cost(guidance=1.0) == cost(guidance=3.0, interval=(50, 60)) == S
    assert cost(guidance=3.0) == cost(guidance=0.0) == 2 * S
    assert cost(guidance=3.0, interval=(grid[3].item(), grid[7].item())) == S + 4
    assert [n == 4 for n, _, _ in passes] == [3 <= i < 7 for i in range(S)]
    assert [y for n, _, y in passes if n == 4] == [[4, 5, 9, 9]] * 4 and passes[0][2] == [4, 5]


def test_image_i_depends_on_seed_i_alone():
    """In every step, for any batch and any company; and each step has noise of its own."""
    net = exact_net([0.0, 0.3, -0.2], 0.05)
    one_batch = list(sid2.sample_steps(net, [3, 1, 4, 1], torch.tensor([0, 1, 2, 1]), 9, logsnr_grid(5), 4))
    for seed, label, i in ((3, 0, 0), (4, 2, 2)):
        alone = list(sid2.sample_steps(net, [seed], torch.tensor([label]), 9, logsnr_grid(5), 4))
        for (z, x), (z_i, x_i) in zip(one_batch, alone):
            torch.testing.assert_close(z[i], z_i[0]), torch.testing.assert_close(x[i], x_i[0])
    assert torch.equal(one_batch[-1][1][1], one_batch[-1][1][3]) and not torch.equal(one_batch[0][0][0], one_batch[0][0][1])
    torch.testing.assert_close(one_batch[0][0][0], torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(3)))
    grid, noises = logsnr_grid(5), []
    for i in range(4):
        (z, x), step = one_batch[i], lambda n: sid2.ddpm_step(*one_batch[i], grid[i], grid[i + 1], 0.2, n)
        noises.append((one_batch[i + 1][0] - step(0 * z)) / (step(0 * z + 1) - step(0 * z)))
    assert all((a - b).abs().mean() > 0.5 for i, a in enumerate(noises) for b in noises[:i])
    assert torch.stack(noises).std().item() == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------------------------------------------
# 6. Averaging


def test_the_average_starts_fast_and_ends_at_its_decay():
    """decay min(d, (1 + n) / (10 + n)): 0.1, 2/11, ... then d."""
    net, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    average.weight.data.zero_()
    net.weight.data.fill_(1.0)
    value = 0.0
    for n in range(100):
        sid2.ema_update(average, net, n, 0.9)
        d = min(0.9, (1 + n) / (10 + n))
        value = d * value + (1 - d)
        assert average.weight.item() == pytest.approx(value, rel=1e-5)


# ---------------------------------------------------------------------------------------------------
# 7. The file, read as a text


def test_each_section_needs_only_the_sections_above_it():
    """Reading order is copying order: every name a section uses is torch's, its own, or stands above."""
    head, *sections = re.split(r"^# -{98}\n(?=# \d\.)", SOURCE, flags=re.M)
    assert [s[:4] for s in sections] == [f"# {i}." for i in range(1, 8)]
    known, pasted = {"__name__"}, ""
    for text in [head, *sections]:
        pasted += text
        exec(compile(pasted, "pasted", "exec"), {"__name__": "pasted"})
        tree = ast.parse(text)
        bound = {n.asname or n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for n in node.names}
        bound |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        bound |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        known |= bound
        assert not used - known - set(dir(builtins)), text[:60]


def test_schedule_and_loss_can_be_taken_alone():
    head, _, process, loss, *_ = re.split(r"^# -{98}\n(?=# \d\.)", SOURCE, flags=re.M)
    namespace = {}
    exec(head.split("from torch.utils")[0] + process + loss, namespace)
    assert "sigmoid_loss" in namespace and "Config" not in namespace


def test_the_module_stays_short():
    assert len(SOURCE.splitlines()) <= 500


# ---------------------------------------------------------------------------------------------------
# 8. Scripts


def flags_of(config=TINY, **changes):
    """The command line that makes `config`."""
    flags = []
    for key, value in (asdict(config) | changes).items():
        if key == "num_classes":
            continue
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            flags += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def run(script, *flags):
    """Runs the script's main in this process: exit code and what it wrote."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = [script.__file__, *map(str, flags)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            script.main()
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def fit(out, *flags, config=TINY, **changes):
    """A finished run of train.py on the CPU: its checkpoint."""
    code, printed, err = run(train, "--out", out, "--device", "cpu", "--precision", "fp32", *flags_of(config, **changes), *flags)
    assert code == 0, err
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True), printed


def script(name, *flags, processes=1):
    """A real process, or several under torchrun, in a group of their own."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    command = [sys.executable, *launch, str(ROOT / name), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def torchrun(name, *flags, processes=2):
    process = script(name, *flags, processes=processes)
    err = process.communicate()[1]
    assert process.returncode == 0, err[:5000]


def same(a, b, exact=True, tolerance=1e-5):
    """Whether two nests of dicts, lists, tensors and numbers are equal, or close."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], exact, tolerance) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, exact, tolerance) for x, y in zip(a, b))
    return a == b


def log_of(out):
    """The columns of log.csv that are not times."""
    return [row[:6] for row in csv.reader(open(Path(out) / "log.csv"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of images in every mode and many formats, nested, in odd sizes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (23, 31, 3), dtype=np.uint8))
    (root / "a" / "deep").mkdir(parents=True), (root / "b").mkdir(), (root / "c").mkdir()
    noise.save(root / "a" / "one.png")
    noise.convert("L").save(root / "a" / "deep" / "grey.JPEG")
    noise.convert("P").save(root / "a" / "deep" / "palette.gif")
    noise.convert("RGBA").save(root / "b" / "alpha.PNG")
    noise.convert("CMYK").save(root / "b" / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (9, 8), dtype=np.uint16)).save(root / "b" / "sixteen.png")
    noise.resize((1, 1)).save(root / "c" / "pixel.bmp")
    noise.convert("LA").save(root / "c" / "grey alpha.webp")
    noise.convert("1").save(root / "c" / "bilevel.tiff")
    (root / "c" / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    """A tiny run on that folder."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, *fit(out, "--data", folder, "--cache", out.parent / "cache", log_every=2, sample_every=3, save_every=2)


def test_a_run_leaves_what_the_readme_says(finished):
    out, state, printed = finished
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "config.json", "log.csv", "previous.pt", "samples"]
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["0000003.png", "0000004.png"]
    assert json.loads((out / "config.json").read_text())["channels"] == [8, 16]
    header, *rows = csv.reader(open(out / "log.csv"))
    assert header == "step images loss grad_norm lr skipped images_per_second data_wait seconds".split()
    assert [row[:2] for row in rows] == [["2", "16"], ["4", "32"]] and rows[0][4] == "0.01"
    assert state["step"] == 4 and state["classes"] == ["a", "b", "c"] and sid2.Config(**state["config"]).num_classes == 3
    sid2.UViT(sid2.Config(**state["config"])).load_state_dict(state["ema"])
    parameters, gmac = sid2.count(TINY)
    for said in ("a 3, b 3, c 3", "9 images", f"{parameters / 1e6:.1f} M parameters", f"{gmac:.2f} GMAC", "cpu", "image_size 8"):
        assert said in printed


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, folder, monkeypatch):
    """Weights, average, optimiser, log and pictures; with dropout, flips, label dropout, epochs that end mid-batch, and
    a cut between two rows of the log and two checkpoints."""
    config, real = replace(TINY, dropout=0.2, steps=6, log_every=3, save_every=2), sid2.ema_update
    for i, data in enumerate(("shapes", folder)):
        flags, whole, parts = ("--data", data, "--cache", tmp_path / "cache"), tmp_path / f"{i}whole", tmp_path / f"{i}parts"
        expected, printed = fit(whole, *flags, config=config)
        assert "a new run" in printed

        def cut(average, net, n, decay):
            real(average, net, n, decay)
            if n == 4:
                raise LookupError

        monkeypatch.setattr(sid2, "ema_update", cut)
        with pytest.raises(LookupError):
            fit(parts, *flags, config=config)
        monkeypatch.setattr(sid2, "ema_update", real)
        with open(parts / "log.csv", "a") as log:
            log.write("5,40,9,9,9,0,9,9,9\nbro")  # a row after the last checkpoint, and half of one
        state, printed = fit(parts, *flags, config=config)
        assert "resumed at step 4" in printed
        assert equal_runs(whole, parts)
    before = (parts / "checkpoint.pt").read_bytes()
    assert "nothing left" in fit(parts, *flags, config=config)[1]
    assert before == (parts / "checkpoint.pt").read_bytes()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """Files may not grow past 4 kB here: one line, exit code 2, and what was saved before is intact."""
    resource = pytest.importorskip("resource")
    fit(tmp_path / "run", "--data", "shapes", steps=1)
    before, limit = (tmp_path / "run" / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        code, _, err = run(train, "--data", "shapes", "--out", tmp_path / "run", "--device", "cpu", "--precision", "fp32", *flags_of())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2 and "error: cannot write" in err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not [p for p in (tmp_path / "run").rglob(".*")]


def test_training_waits_for_the_device_in_steps_that_log_alone(tmp_path):
    """No step asks for the value of a tensor: not of the loss, nor whether the gradient is finite."""
    with Operations() as operations:
        fit(tmp_path / "run", log_every=99, sample_every=99, save_every=99)
    assert operations.counts[torch.ops.aten._fused_adam_] == operations.counts[torch.ops.aten._foreach_lerp_] == TINY.steps
    assert operations.counts[torch.ops.aten._local_scalar_dense] <= 1  # the DataLoader's seed


def test_another_seed_is_another_run(tmp_path):
    a, b = (fit(tmp_path / str(seed), "--seed", seed, "--data", "shapes", steps=1)[0] for seed in (1, 2))
    assert not same(a["net"], b["net"])


def test_micro_batches_and_processes_do_not_change_the_run(tmp_path):
    """4 micro-batches of 2 = 1 batch of 8 = 2 processes = 2 processes with micro-batches: weights, average, log.

    SGD would agree to rounding; Adam with epsilon 1e-12 turns rounding of tiny gradients into steps, hence the tolerance."""
    config = replace(TINY, steps=3, log_every=1)
    one = fit(tmp_path / "one", "--data", "shapes", config=config)[0]
    micro = fit(tmp_path / "micro", "--data", "shapes", config=config, micro_batch=2)[0]
    both = "--device", "cpu", "--precision", "fp32", "--data", "shapes"
    torchrun("train.py", "--out", tmp_path / "two", *both, *flags_of(config, micro_batch=2))
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    for name, other in (("micro", micro), ("two", two)):
        assert same(one["net"], other["net"], exact=False, tolerance=2e-3) and same(one["ema"], other["ema"], exact=False, tolerance=2e-3)
        ours, theirs = (np.array(log_of(tmp_path / run)[1:], float) for run in ("one", name))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_a_finer_network_starts_from_a_coarser_run(tmp_path, finished):
    """--init-from: 8 px with patch 1 -> 16 px with patch 2, the trunk and all else that fits, from the average."""
    out, state, _ = finished
    code, printed, _ = run(train, "--data", "shapes", "--init-from", out, "--out", tmp_path / "run", "--device", "cpu",
                           *flags_of(image_size=16, patch_size=2, steps=1, lr=1e-20))
    started = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert code == 0 and "started afresh: condition.label.weight, embed.weight, head.bias, head.weight" in printed
    assert "not taken over: condition.label.weight, embed.weight, head.bias, head.weight;" in printed
    assert same(started["net"]["middle.0.qkv.weight"], state["ema"]["middle.0.qkv.weight"], exact=False)
    assert not same(state["net"]["middle.0.qkv.weight"], state["ema"]["middle.0.qkv.weight"], exact=False)


def test_labels_can_be_left_out(tmp_path):
    state, printed = fit(tmp_path / "run", "--data", "shapes", "--num-classes", 0, steps=1)
    assert state["classes"] == [] and state["config"]["num_classes"] == 0
    assert Image.open(tmp_path / "run" / "samples" / "0000001.png").width == 8 * 66  # no names on the left


def test_links_are_followed_once_and_hidden_files_are_left_out(tmp_path, folder):
    root = tmp_path / "links"
    (root / ".ipynb_checkpoints").mkdir(parents=True), (root / "own" / "loop.png").mkdir(parents=True)
    for name in (".ipynb_checkpoints/x.png", "own/one.png", "own/._two.png", "own/loop.png/three.png"):
        Image.new("RGB", (8, 8)).save(root / name)
    (root / "linked").symlink_to(folder / "b"), (root / "own" / "up").symlink_to(root)
    (root / "other").symlink_to(root / "own")
    data = train.open_data(str(root), 8, 0, tmp_path / "cache")
    assert data.classes == ["linked", "other", "own"] and data.counts == [3, 2, 2]
    assert fid.open_folder(root, None).count == 7


def test_an_unlabelled_folder_trains_an_unconditional_network(tmp_path, folder):
    state, _ = fit(tmp_path / "run", "--data", folder / "a" / "deep", "--cache", tmp_path)
    assert state["classes"] == [] and state["net"]["condition.label.weight"].shape[0] == 1
    assert run(sample, tmp_path / "run", "--device", "cpu")[0] == 0
    assert Image.open(tmp_path / "run" / "samples.png").width > 64


def test_images_of_every_kind_become_rgb(folder):
    files = sorted(p for p in folder.rglob("*.*") if p.suffix != ".txt")
    for i, file in enumerate(files):
        image, error = train.Files(files, 8)[i]
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and not error, file
    ramp = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    assert np.asarray(train.to_rgb(ramp))[..., 1].tolist() == (np.asarray(ramp) >> 8).tolist()
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(train.to_rgb(clear)).min() == 255
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(buffer := io.BytesIO(), "JPEG", exif=exif)
    assert train.to_rgb(Image.open(buffer)).size == (2, 4)


def test_the_crop_keeps_the_middle_and_its_proportions():
    """ADM's: by box to less than twice the size, then bicubic, then the centre."""
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200
    assert (np.asarray(train.centre_crop(Image.fromarray(wide), 16))[:, 2:-2] == 200).all()
    checks = np.indices((64, 64)).sum(0) % 2 * 255  # a box average of a chessboard is grey
    flat = np.asarray(train.centre_crop(Image.fromarray(checks.astype(np.uint8)).convert("RGB"), 32))
    assert abs(flat.astype(int) - 127).max() <= 1
    for fast in (False, True):
        assert train.centre_crop(Image.new("RGB", (5, 3)), 16, fast).size == (16, 16)


@pytest.mark.parametrize("size", [16, 40, 100])
def test_the_fast_crop_is_the_other_but_for_a_level_here_and_there(size):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)).resize((83, 61))
    exact, fast = (np.asarray(train.centre_crop(photo, size, fast)).astype(int) for fast in (False, True))
    assert 0 < abs(fast - exact).max() <= 2 and (fast != exact).mean() < 0.01


def test_the_cache_holds_what_decoding_gives(tmp_path, folder):
    data = train.open_data(str(folder), 8, 0, tmp_path)
    direct = train.Files(sorted(p for p in folder.rglob("*.*") if p.suffix != ".txt"), 8)(range(9))
    assert np.array_equal(data.read(np.arange(9)), direct) and len(list(tmp_path.glob("*.npy"))) == 1
    assert data.classes == ["a", "b", "c"] and np.bincount(data.labels).tolist() == [3, 3, 3]


def test_every_epoch_shows_every_image_once_in_a_new_order(tmp_path, folder):
    data = train.open_data(str(folder), 8, 0, tmp_path)
    data.read = lambda index: index
    seen = np.concatenate([data.batch(np.arange(n, n + 4))[0] for n in range(0, 36, 4)]).reshape(4, 9)
    assert all(sorted(epoch) == list(range(9)) for epoch in seen) and len({tuple(epoch) for epoch in seen}) == 4


def test_shapes_depend_on_seed_and_number_alone():
    shapes = train.Shapes(16, seed=3)
    images, labels = shapes.batch(np.arange(40))
    again, _ = shapes.batch(np.array([17, 5]))
    assert np.array_equal(again, images[[17, 5]]) and set(labels) == set(range(6))
    assert not np.array_equal(images, train.Shapes(16, seed=4).batch(np.arange(40))[0])
    edges = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1).astype(int)
    assert (edges.min(1) >= 0).all() and images.reshape(40, -1).std(1).min() > 10


def test_cifar10_is_read_from_the_binary_archive(tmp_path, monkeypatch):
    """Ten thousand records per file, label first, planes R G B; the hash is checked; nothing is unpickled."""
    records = np.random.default_rng(0).integers(0, 256, (10_000, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as tar:
        for i in range(1, 6):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            info.size = records.size
            tar.addfile(info, io.BytesIO(records.tobytes()))
    with pytest.raises(SystemExit):
        train.open_data("cifar10", 32, 0, tmp_path)
    monkeypatch.setattr(train, "CIFAR10_SHA256", hashlib.sha256((tmp_path / "cifar-10-binary.tar.gz").read_bytes()).hexdigest())
    data = train.open_data("cifar10", 32, 0, tmp_path)
    image = data.read(np.array([10_007]))[0]
    assert image[3, 5].tolist() == records[7, [1 + 3 * 32 + 5, 1025 + 3 * 32 + 5, 2049 + 3 * 32 + 5]].tolist()
    assert data.labels[10_007] == records[7, 0] and len(data.labels) == 50_000 and data.classes[3] == "cat"


def test_without_a_connection_cifar10_says_what_to_fetch(tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(SystemExit) as exit:
        train.open_data("cifar10", 32, 0, tmp_path)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and train.CIFAR10 in message and str(tmp_path / "cifar-10-binary.tar.gz") in message


def test_eight_bits_survive_the_way_there_and_back():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.array_equal(sample.to_uint8(values / 127.5 - 1), values.permute(0, 2, 3, 1).numpy())


def test_samples_are_the_same_for_any_batch_and_number_of_processes(finished, tmp_path):
    """npz: uint8 in the order of the seeds, so never sorted by class; npz data train again."""
    out, _, _ = finished
    common = out, "--device", "cpu", "--precision", "fp32", "--format", "npz", "--count", 7
    assert run(sample, *common, "--batch", 5, "--out", tmp_path / "one.npz")[0] == 0
    torchrun("sample.py", *common, "--batch", 2, "--out", tmp_path / "two.npz")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["arr_0"].dtype == np.uint8 and one["arr_0"].shape == (7, 8, 8, 3)
    assert one["arr_1"].tolist() == two["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1  # rounding of another batch size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.npz", "one.npz.json", "two.npz", "two.npz.json"]
    state, _ = fit(tmp_path / "run", "--data", tmp_path / "one.npz", "--cache", tmp_path / "cache")
    assert state["classes"] == ["0", "1", "2"]
    cached = np.load(next((tmp_path / "cache").glob("*.npy")))
    assert np.array_equal(cached, one["arr_0"])


def test_a_cut_off_folder_of_samples_is_completed(finished, tmp_path):
    out, _, _ = finished
    common = out, "--device", "cpu", "--format", "folder", "--out", tmp_path / "images", "--count", 6
    assert run(sample, *common)[0] == 0
    files = sorted((tmp_path / "images").glob("*.png"))
    before = [(f.stat().st_mtime_ns, f.read_bytes()) for f in files]
    files[2].unlink(), files[4].unlink()
    assert run(sample, *common)[0] == 0
    after = [(f.stat().st_mtime_ns, f.read_bytes()) for f in files]
    assert len(files) == 6 and [a[0] == b[0] for a, b in zip(before, after)] == [True, True, False, True, False, True]
    code, _, err = run(sample, *common, "--steps", 2)
    assert code == 2 and "config" in err and after == [(f.stat().st_mtime_ns, f.read_bytes()) for f in files]


@pytest.mark.parametrize("function", ["rmtree", "replace"])
def test_a_kill_amid_the_clean_up_loses_no_sample(finished, tmp_path, monkeypatch, function):
    """The npz is whole, its settings beside it; what is left of the single images goes with the next call."""
    flags = [finished[0], "--format", "npz", "--count", 4, "--out", tmp_path / "s.npz", "--device", "cpu"]
    with monkeypatch.context() as patch:
        owner, real = (shutil, shutil.rmtree) if function == "rmtree" else (os, os.replace)

        def killed(*args, **kwargs):
            if function == "rmtree" or str(args[1]).endswith("s.npz"):
                raise LookupError
            return real(*args, **kwargs)

        patch.setattr(owner, function, killed)
        with pytest.raises(LookupError):
            run(sample, *flags)
    monkeypatch.setattr(sid2, "sample_steps", None)  # all images are there
    code, printed, err = run(sample, *flags)
    assert code == 0 and (function == "replace" or "is there already" in printed), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "s.npz.json"]
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (4, 8, 8, 3)


def test_flags_of_sample_reach_the_sampler(finished, tmp_path):
    """Each of them changes the picture, and the JSON beside it holds every one."""
    out, _, _ = finished
    pictures = {}
    for i, flags in enumerate([[], ["--weights", "raw"], ["--steps", 2], ["--sampler", "ddim"], ["--gamma", 1], ["--guidance", 9],
                               ["--interval", -20, 20], ["--classes", "b"], ["--classes", 2, 0], ["--classes", "random"], ["--seeds", 4, 11]]):
        number = [] if "--seeds" in flags else ["--count", 8]
        code, _, err = run(sample, out, "--device", "cpu", *number, "--out", tmp_path / f"{i}.png", *flags)
        assert code == 0, err
        pictures[(tmp_path / f"{i}.png").read_bytes()] = flags
    assert len(pictures) == 11
    again = [run(sample, out, "--device", "cpu", *flags)[1].split()[-1] for flags in ([], ["--steps", 2], [])]
    assert again == ["samples.png.json", "samples-1.png.json", "settings"]  # the third was there already
    settings = json.loads((tmp_path / "6.png.json").read_text())
    assert settings["config"]["interval"] == [-20, 20] and settings["step"] == 4 and settings["seeds"] == [0, 7]


def damaged(tmp_path, finished, kind):
    data = (finished[0] / "checkpoint.pt").read_bytes()
    path = tmp_path / f"{kind}.pt"
    if kind == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif kind == "pickle":
        torch.save({"config": print}, path)
    elif kind == "network":
        state = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
        torch.save(state | {"config": state["config"] | {"width": 32}}, path)
    else:
        path.write_bytes(data[: len(data) // 2] if kind == "truncated" else b"")
    return path


def bad_images(tmp_path, kind):
    root = tmp_path / kind
    (root / "a").mkdir(parents=True), (root / "b").mkdir()
    Image.new("RGB", (8, 8)).save(root / "a" / "good.png")
    if kind == "broken":
        (root / "b" / "broken.png").write_bytes((root / "a" / "good.png").read_bytes()[:45])
    elif kind == "loose":
        Image.new("RGB", (8, 8)).save(root / "loose.png")
    elif kind == "empty":
        (root / "a" / "good.png").unlink()
    return root


def cut_npz(tmp_path):
    np.savez(tmp_path / "cut.npz", arr_0=U8(9, 8, 8, 3))
    data = bytearray((tmp_path / "cut.npz").read_bytes())
    data[500] ^= 1  # the checksum of the member is wrong now
    (tmp_path / "cut.npz").write_bytes(data)
    return tmp_path / "cut.npz"


def bad_npz(tmp_path, **arrays):
    np.savez(tmp_path / "bad.npz", **arrays)
    return tmp_path / "bad.npz"


U8 = lambda *shape: np.zeros(shape, np.uint8)
BAD_TRAIN = [  # what is wrong, the flags, words of the message
    (lambda p, f: ["--preset", "imagenet1024"], "imagenet1024.*imagenet512_p2"),
    (lambda p, f: ["--steps", "many"], "steps.*many"),
    (lambda p, f: ["--image-size", "9"], "image_size must be a multiple of 2.*got 9"),
    (lambda p, f: ["--batch", "8", "--micro-batch", "3"], "batch 8 is not divisible by 1 processes times micro-batch 3"),
    (lambda p, f: ["--num-classes", "4"], "--num-classes 4: shapes.* has 6 classes"),
    (lambda p, f: ["--data", p / "nowhere"], "nowhere: neither shapes, cifar10, a folder nor an .npz"),
    (lambda p, f: ["--data", bad_images(p, "empty")], "no images in .*empty"),
    (lambda p, f: ["--data", bad_images(p, "broken"), "--workers", "1"], "1 of 2 images .* cannot be read.*b/broken.png"),
    (lambda p, f: ["--data", bad_images(p, "loose")], "1 images beside its 1 class folders"),
    (lambda p, f: ["--data", bad_npz(p, images=U8(2, 8, 8, 3))], "no npz of images"),
    (lambda p, f: ["--data", bad_npz(p, arr_0=np.zeros((2, 8, 8, 3)))], "arr_0 is float64"),
    (lambda p, f: ["--data", bad_npz(p, arr_0=U8(2, 4, 4, 3))], r"asks for \(N, 8, 8, 3\)"),
    (lambda p, f: ["--data", bad_npz(p, arr_0=U8(2, 8, 8, 3), arr_1=np.array([0, -1]))], "labels from 0"),
    (lambda p, f: ["--data", bad_npz(p, arr_0=U8(2, 8, 8, 3), arr_1=np.array([0, 2])), "--num-classes", "3"], "no more classes than images"),
    (lambda p, f: ["--data", "cifar10"], "images of 32 px"),
    (lambda p, f: ["--preset", "imagenet64"], "needs --data"),
    (lambda p, f: ["--device", "tpu"], "--device.*tpu"),
    (lambda p, f: ["--workers", "-1"], "workers"),
    (lambda p, f: ["--checkpointing", "2"], r"--checkpointing \[2\]: the network has levels \[0, 1\]"),
    (lambda p, f: ["--seed", "-1"], "seed"),
    (lambda p, f: ["--init-from", p / "nowhere"], "no checkpoint at .*nowhere"),
    (lambda p, f: ["--init-from", f[0], "--channels", "8", "32"], "its trunk does not fit, for example"),
    (lambda p, f: ["--init-from", f[0], "--middle", "0"], "its trunk does not fit, for example middle.0"),
    (lambda p, f: ["--step", "1"], "unrecognized arguments: --step"),
    (lambda p, f: ["--data", cut_npz(p)], "cut.npz is damaged|no npz"),
    (lambda p, f: ["--out", f[0], "--lr", "0.5"], "other settings .*lr 0.01 -> 0.5"),
    (lambda p, f: ["--out", ROOT], "exists and is no run folder"),
    (lambda p, f: ["--out", "/proc/nowhere"], "cannot write to /proc/nowhere"),
]
BAD_SAMPLE = [
    (lambda p, f: [p / "nowhere"], "no checkpoint at .*nowhere"),
    (lambda p, f: [damaged(p, f, "truncated")], "truncated.pt is truncated or no checkpoint"),
    (lambda p, f: [damaged(p, f, "empty")], "empty.pt is truncated or no checkpoint"),
    (lambda p, f: [damaged(p, f, "foreign")], "foreign.pt is truncated or no checkpoint"),
    (lambda p, f: [damaged(p, f, "network")], "network.pt is truncated or no checkpoint"),
    (lambda p, f: [damaged(p, f, "pickle")], "pickle.pt is truncated or no checkpoint"),
    (lambda p, f: [f[0], "--classes", "3"], "--classes 3: this run has classes 0 to 2: a, b, c"),
    (lambda p, f: [f[0], "--classes", "zebra"], "--classes zebra"),
    (lambda p, f: [f[0], "--steps", "0"], "sample_steps must be at least 1"),
    (lambda p, f: [f[0], "--seeds", "4", "2"], "--seeds"),
    (lambda p, f: [f[0], "--count", "0"], "--count"),
    (lambda p, f: [f[0], "--batch", "0"], "--batch"),
    (lambda p, f: [f[0], "--sampler", "euler"], "euler"),
    (lambda p, f: [f[0], "--out", "/proc/nowhere/x.png"], "cannot write to /proc/nowhere"),
]


@pytest.mark.parametrize("script, flags, message", [(train, *row) for row in BAD_TRAIN] + [(sample, *row) for row in BAD_SAMPLE])
def test_bad_input_ends_with_one_clear_line(script, flags, message, tmp_path, finished):
    """Exit code 2, one line on stderr, no traceback, and what was there before is there still."""
    flags = list(map(str, flags(tmp_path, finished)))
    if script is train:
        common = ["--data", "shapes", "--device", "cpu", "--cache", tmp_path / "cache", *flags_of()]
        flags = ["--out", tmp_path / "run", *([] if "--preset" in flags else common), *flags]
    else:
        flags = ["--device", "cpu", *flags]
    files = lambda: {p: p.read_bytes() for p in finished[0].rglob("*") if p.is_file()}
    before = files()
    code, _, err = run(script, *flags)
    assert code == 2 and re.search(message, err), err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1 and "Traceback" not in err
    assert files() == before and not (tmp_path / "run").exists()


def test_the_scripts_start_from_a_shell(tmp_path):
    """As a stranger types them: exit codes and streams of the real processes."""
    result = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "--device" in result.stdout
    result = subprocess.run([sys.executable, ROOT / "sample.py", "nowhere"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "error: no checkpoint at nowhere" in result.stderr


def test_the_readme_runs_as_it_stands():
    """Its Python does, and its commands have flags that exist."""
    readme = (ROOT / "README.md").read_text()
    B, S, steps, num_classes, bias, seeds = 2, 8, 2, 3, 0.0, [0, 1]
    names = vars(sid2) | dict(B=B, S=S, steps=steps, num_classes=num_classes, bias=bias, seeds=seeds,
                              net=sid2.UViT(TINY).eval(), x=normal(B, 3, S, S), y=torch.tensor([0, 3]))
    exec(re.search("```python\n(.*?)```", readme, re.S)[1], names)
    assert names["loss"].isfinite() and names["x_hat"].shape == (B, 3, S, S)
    flags = {name: set(re.findall(r"--[a-z][a-z-]+", run(globals()[name], "--help")[1])) for name in ("train", "sample", "fid")}
    commands = re.findall(r"(train|sample|fid)\.py ([^`]*?(?<!\\))[\n`]", readme)
    assert len(commands) > 15
    for name, command in commands:
        assert set(re.findall(r"--[a-z][a-z-]+", command)) <= flags[name], command
    launcher = {"--nnodes", "--nproc", "--rdzv-backend", "--rdzv-endpoint", "--signal"}
    assert set(re.findall(r"--[a-z][a-z-]+", readme)) <= launcher.union(*flags.values())


def test_the_benchmark_counts_what_it_says(monkeypatch):
    """With a clock that says one second for everything: products, levels, three forward passes for a step."""
    monkeypatch.setattr(train.time, "perf_counter", itertools.count().__next__)
    code, printed, err = run(train, "--bench", "--device", "cpu", "--precision", "fp32", *flags_of())
    assert code == 0, err
    gmac = sid2.count(replace(TINY, num_classes=6))[1]
    assert f"linear 2048 x 1024 x 4096: {2 * 2048 * 1024 * 4096 / 1e12:.3g} TFLOP/s" in printed
    rows = {line[:32].strip(): line[32:].split() for line in printed.splitlines()}
    for name, passes, images in (("training step", 3, 8), ("forward and backward", 3, 8), ("forward", 1, 8),
                                 ("forward, guided", 1, 16), ("sampler, 4 guided steps", 1, 64)):
        tflops = passes * 2e-3 * gmac * images
        assert rows[name] == ["1000.0", "0.0%", f"{images:.1f}", f"{tflops:.3g}", f"{tflops / 0.01718:.1%}"], name
    assert "the sampler's speed / that of its passes: 4.000" in printed
    shares = [int(re.search(r"(\d+)% of GMAC", name).group(1)) for name in rows if "of GMAC" in name]
    assert len(shares) == 2 and 85 < sum(shares) <= 100
    assert any(name.startswith("2 R at 8² x 8") for name in rows) and any(name.startswith("1 T at 4² x 16") for name in rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_memory_of_an_image_is_what_autograd_keeps(precision):
    """Distinct storages of the saved tensors of a real network, by the images that a larger batch has more."""
    kept, net = {}, sid2.UViT(TINY)
    for batch in (2, 5):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda w: saved.append(w) or w, lambda w: w), \
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            net(normal(batch, 3, 8, 8), torch.zeros(batch), torch.zeros(batch).long())
        kept[batch] = sum({w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in saved}.values())
    none, top, all_levels = (train.activation_memory(TINY, levels, precision) for levels in ([], [0], [0, 1]))
    assert none == (kept[5] - kept[2]) / 3 / 1e6
    assert all_levels < top < none


@pytest.mark.skipif("SID2_IMAGES" not in os.environ, reason="SID2_IMAGES names no folder of real images")
def test_real_images_train(tmp_path):
    fit(tmp_path / "run", "--data", os.environ["SID2_IMAGES"], "--cache", tmp_path / "cache", image_size=32)


def judge(data, flip: bool, classes: int):
    """A small network that has learned the classes of a data set; it names images and gives their 128 features. Also 10 % of the
    images (of 22,000 drawings, or of up to 50,000 stored ones), which it has not seen, and their labels."""
    conv = lambda a, b: [torch.nn.Conv2d(a, b, 3, padding=1), torch.nn.BatchNorm2d(b), torch.nn.ReLU()]
    torch.manual_seed(0)
    body = torch.nn.Sequential(*conv(3, 32), torch.nn.MaxPool2d(2), *conv(32, 64), torch.nn.MaxPool2d(2), *conv(64, 128), *conv(128, 128),
                               torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).to(memory_format=torch.channels_last)
    head = torch.nn.Linear(128, classes)
    images, labels = map(torch.from_numpy, data.batch(np.arange(min(sum(data.counts or [22_000]), 50_000))))
    known, batch, epochs = len(images) - len(images) // 10, 100, 8
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()])
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * (known // batch))
    cpu = torch.device("cpu")
    fast = sample.autocast(cpu, sample.choose_precision(cpu, "auto"))
    for _ in range(epochs):
        for part in torch.randperm(known).split(batch)[: known // batch]:
            x = images[part].permute(0, 3, 1, 2) / 127.5 - 1
            x = torch.where((torch.rand(batch) < 0.5 * flip)[:, None, None, None], x.flip(3), x)
            x = x + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)  # samples are not free of noise
            with fast:
                loss = F.cross_entropy(head(body(x)).float(), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    body.eval()

    @torch.no_grad()
    def look(images: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        features = torch.cat([body(torch.from_numpy(part).permute(0, 3, 1, 2) / 127.5 - 1)
                              for part in np.array_split(images, -(-len(images) // 500))])
        return head(features).argmax(1).numpy(), features.double()

    return look, images[known:].numpy(), labels[known:].numpy()


@pytest.mark.skipif("SID2_RUN" not in os.environ, reason="SID2_RUN names no run")
def test_samples_are_recognised():
    """A judge trained on the run's data says what samples show, and how far their features lie from those of unseen images.

    400 seeds: untrained, unguided and guided; then every npz in the run's folder. For shapes at least 95 % must show their class.
    """
    run, state = Path(os.environ["SID2_RUN"]), sample.load_checkpoint(os.environ["SID2_RUN"])
    assert state["config"].num_classes, "images without classes show none"
    config, name = state["config"], json.loads((run / "config.json").read_text())["data"]
    look, real, labels = judge(train.open_data(name, config.image_size, 99, "~/.cache/sid2"), config.flip, config.num_classes)
    seeds, net = list(range(400)), sid2.UViT(config).eval()
    y = np.array(sample.choose_labels(seeds, list(range(config.num_classes)), config.num_classes))
    sets = {"unseen images": (real[:500], labels[:500])}
    cpu = torch.device("cpu")
    for title, weights, guidance in (("untrained", net.state_dict(), 1.0), ("unguided", state["ema"], 1.0), ("guided", state["ema"], config.guidance)):
        net.load_state_dict(weights)
        with sample.autocast(cpu, sample.choose_precision(cpu, "auto")):
            sets[title] = sample.sample_images(net, replace(config, guidance=guidance), seeds, y.tolist(), cpu, disable=True), y
    sets["guided, wrong label"] = sets["guided"][0], (y + 1) % config.num_classes
    sets |= {file.name: (np.load(file)["arr_0"], np.load(file)["arr_1"]) for file in sorted(run.glob("*.npz"))}

    moments = lambda features: (features.mean(0), features.T.cov())
    there, scores = moments(look(real[500:])[1]), {}
    for title, (images, wanted) in sets.items():
        seen, features = look(images)
        scores[title] = (seen == wanted).mean()
        print(f"{title:24} n {len(images):5}   shows its class {scores[title]:6.1%}   "
              f"judge-FD {fid.frechet(*moments(features), *there):8.3f}")
    assert scores["untrained"] < scores["unguided"] <= scores["guided"] > scores["guided, wrong label"]
    if name == "shapes":
        assert scores["unseen images"] >= 0.99 and scores["guided"] >= 0.95
        assert scores["untrained"] < 0.4 and scores["guided, wrong label"] < 0.05


# ---------------------------------------------------------------------------------------------------
# 9. Nothing lost

LONG = "SID2_LONG" in os.environ
SAVED = "net ema optimizer step random classes window".split()


def equal_runs(a, b):
    """Weights, average, optimiser, counters, log and pictures of two runs are the same, bit for bit."""
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
    assert same([one[key] for key in SAVED], [two[key] for key in SAVED])
    assert log_of(a) == log_of(b)
    pictures = [{p.name: p.read_bytes() for p in (run / "samples").iterdir()} for run in (a, b)]
    assert pictures[0] == pictures[1]
    return True


def interrupt(monkeypatch, module, name, call, *numbers):
    """Signals to this process itself, amid the given call of a function."""
    calls, real = itertools.count(1), getattr(module, name)

    def patched(*args, **kwargs):
        if next(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, patched)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_nothing_differs(tmp_path, monkeypatch, number):
    """SIGTERM and Ctrl-C: the step is finished and saved, exit code 0; between two rows of the log, too."""
    flags = dict(steps=7, log_every=4, sample_every=5, save_every=100)
    fit(tmp_path / "whole", "--data", "shapes", **flags)
    with monkeypatch.context() as patch:
        interrupt(patch, sid2, "sigmoid_loss", 3, number)
        state, printed = fit(tmp_path / "cut", "--data", "shapes", **flags)
    assert state["step"] == 3 and "3 of 7 steps done" in printed and "stopped by a signal" in printed
    state, printed = fit(tmp_path / "cut", "--data", "shapes", **flags)
    assert "resumed at step 3" in printed and equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_does_not_wait_for_a_picture_which_the_next_start_draws(tmp_path, monkeypatch):
    flags = dict(steps=6, sample_every=4, save_every=100)
    fit(tmp_path / "whole", "--data", "shapes", **flags)
    with monkeypatch.context() as patch:
        interrupt(patch, sid2, "x_from_v", 2, signal.SIGTERM)
        state, _ = fit(tmp_path / "cut", "--data", "shapes", **flags)
    assert state["step"] == 4 and not any((tmp_path / "cut" / "samples").iterdir())
    with monkeypatch.context() as patch:
        interrupt(patch, sid2, "x_from_v", 2, signal.SIGTERM)  # and that start, too
        state, _ = fit(tmp_path / "cut", "--data", "shapes", **flags)
    assert state["step"] == 4 and not any((tmp_path / "cut" / "samples").iterdir())
    fit(tmp_path / "cut", "--data", "shapes", **flags)
    assert equal_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("error, code, message", [
    (OSError(28, "No space left on device"), 2, "cannot read or write: .* No space left"),
    (MemoryError(), 2, "out of memory: --batch"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory: --batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory: --batch"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "loads images was killed"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer"), 1, "another process of this run has ended"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (SystemExit(3), 3, "^$"),
])
def test_what_a_script_cannot_help_ends_with_one_line(capsys, error, code, message):
    @sample.guarded
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        main()
    err = capsys.readouterr().err
    assert exit.value.code == code and re.search(message, err) and err.count("\n") <= 1


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    flags = dict(steps=6, save_every=2)
    with monkeypatch.context() as patch:
        interrupt(patch, sid2, "sigmoid_loss", 4, signal.SIGINT, signal.SIGINT)
        code, _, err = run(train, "--data", "shapes", "--out", tmp_path / "run", "--device", "cpu", *flags_of(**flags))
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2


def poison(monkeypatch, calls, value):
    """At the given calls the loss gets `value` added, which leaves its gradient as it is."""
    count, real = itertools.count(1), sid2.sigmoid_loss
    monkeypatch.setattr(sid2, "sigmoid_loss", lambda *a: real(*a) + (value if next(count) in calls else 0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch, value):
    """Weights, moments and their step count stay as they were: the run equals one whose step did not happen."""
    before, _ = fit(tmp_path / "two", "--data", "shapes", steps=2, log_every=1)
    poison(monkeypatch, [3], value)
    after, _ = fit(tmp_path / "three", "--data", "shapes", steps=3, log_every=1)
    assert same([before["net"], before["optimizer"]["state"]], [after["net"], after["optimizer"]["state"]])
    assert all(w.isfinite().all() for w in after["ema"].values()) and after["window"]["skipped"] == 1
    rows = log_of(tmp_path / "three")
    assert rows[:3] == log_of(tmp_path / "two") and rows[3][2:4] == ["nan", "nan"] and rows[3][5] == "1"


def test_ten_such_steps_in_a_row_end_the_run_with_a_diagnosis(tmp_path, monkeypatch, folder):
    """Exit code 1, a message, who was in those batches at which noise; nine in a row are forgiven."""
    flags = dict(steps=24, save_every=2, log_every=4)
    poison(monkeypatch, [*range(2, 11), *range(12, 25)], math.nan)
    out = tmp_path / "run"
    code, _, err = run(train, "--data", folder, "--cache", tmp_path, "--out", out, "--device", "cpu", *flags_of(**flags))
    assert code == 1 and "ten steps in a row" in err and "Traceback" not in err
    steps = json.loads((out / "diagnosis.json").read_text())
    assert [s["step"] for s in steps] == list(range(12, 22)) and len(steps[0]["logsnr"]) == 8
    assert {str(p.relative_to(folder)) for p in train.find_images(folder)} == {name for s in steps for name in s["images"]}
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 20 and state["window"]["skipped"] == 18
    assert all(w.isfinite().all() for w in [*state["net"].values(), *state["ema"].values()])


def test_one_process_without_finite_gradients_makes_all_skip(tmp_path):
    """The second of two processes has an infinite loss at step 2."""
    (tmp_path / "script.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import sid2, train
calls, real = [], sid2.sigmoid_loss
def patched(*args):
    calls.append(1)
    return real(*args) + (float("inf") if os.environ["RANK"] == "1" and len(calls) == 2 else 0)
sid2.sigmoid_loss = patched
train.main()
""")
    torchrun(tmp_path / "script.py", "--data", "shapes", "--out", tmp_path / "run", "--device", "cpu", *flags_of(log_every=1))
    rows = log_of(tmp_path / "run")
    assert [row[5] for row in rows[1:]] == ["0", "1", "1", "1"] and rows[2][2] == "nan" and float(rows[4][3]) > 0


def workers_of(path):
    """Processes with that word in their command, but for torchrun itself."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            pids += [int(pid)] * (str(path) in words and "torch.distributed.run" not in words)
    return pids


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds its victims in /proc")


@needs_proc
@pytest.mark.parametrize("number, kind, processes", [(signal.SIGKILL, "shapes", 1), (signal.SIGTERM, "shapes", 1)] + LONG * [
    (signal.SIGKILL, "folder", 1), (signal.SIGTERM, "folder", 1), (signal.SIGKILL, "folder", 2), (signal.SIGTERM, "shapes", 2)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path, folder, number, kind, processes):
    """At random moments, also amid saving and drawing: each step writes a checkpoint, every fifth a picture."""
    steps = 150 if LONG else 60
    data = folder if kind == "folder" else "shapes"
    config = replace(TINY, dropout=0.2, steps=steps, log_every=3, sample_every=5, save_every=1, micro_batch=4)
    flags = ["--data", data, "--cache", tmp_path / "cache", "--device", "cpu", "--precision", "fp32", *flags_of(config)]
    whole, killed, rng, times = tmp_path / "whole", tmp_path / "killed", random.Random(0), 0
    assert script("train.py", "--out", whole, *flags, processes=processes).wait() == 0
    while times < (15 if LONG else 1):
        process, begun = script("train.py", "--out", killed, *flags, processes=processes), time.time()
        log = killed / "log.csv"
        while process.poll() is None and not (log.exists() and log.stat().st_mtime > begun):
            time.sleep(0.01)  # it trains from here on
        time.sleep(rng.uniform(0, 0.8))
        for pid in workers_of(killed):  # torchrun gives each a session of its own
            os.kill(pid, number)
        err = process.communicate()[1]
        times += 1
        assert processes > 1 or "Traceback" not in err, err  # torchrun has one of its own
        late = (killed / "checkpoint.pt").exists() and sample.load_checkpoint(killed)["step"] == steps
        if processes == 1:  # torchrun has a code of its own; a late signal meets Python on its way out
            assert process.returncode == (0 if number == signal.SIGTERM else -9) or late and process.returncode in (0, -number)
        if late:
            shutil.move(killed, tmp_path / f"finished{times}")  # once more
    assert script("train.py", "--out", killed, *flags, processes=processes).wait() == 0
    assert equal_runs(whole, killed) and not list(killed.rglob(".*"))
    rows = [row[0] for row in log_of(killed)[1:]]
    assert rows == [str(n) for n in range(3, steps + 1, 3)]


@needs_proc
def test_a_process_that_dies_takes_the_others_with_it_and_one_goes_on_alone(tmp_path):
    """Within seconds, with a message; two processes began, one ends the run, on the same global batch."""
    flags = ["--data", "shapes", "--out", tmp_path / "run", "--device", "cpu", "--precision", "fp32"]
    config = replace(TINY, steps=100_000, save_every=20, log_every=20)
    process = script("train.py", *flags, *flags_of(config), processes=2)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None
    os.kill(max(workers_of(tmp_path / "run")), signal.SIGKILL)
    err = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "another process of this run has ended" in err
    step = sample.load_checkpoint(tmp_path / "run")["step"]
    state, printed = fit(tmp_path / "run", "--data", "shapes", config=replace(config, steps=step + 5))
    assert f"resumed at step {step}" in printed and state["step"] == step + 5


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    """The run goes on from there, ends the same, and the damaged file is kept; with both gone it says so."""
    config = replace(TINY, steps=6, save_every=2, sample_every=2)
    fit(tmp_path / "whole", "--data", "shapes", config=config)
    fit(tmp_path / "run", "--data", "shapes", config=replace(config, steps=4))
    last = tmp_path / "run" / "checkpoint.pt"
    (data := bytearray(last.read_bytes()))[len(data) // 2] ^= 16
    last.write_bytes(data)
    code, printed, err = run(sample, tmp_path / "run", "--device", "cpu")
    assert code == 0 and "previous.pt, step 2" in printed and "checkpoint.pt is truncated or no checkpoint" in err
    _, printed = fit(tmp_path / "run", "--data", "shapes", config=config)
    assert "resumed at step 2" in printed and (tmp_path / "run" / "damaged.pt").read_bytes() == data
    assert equal_runs(tmp_path / "whole", tmp_path / "run")
    for name in ("checkpoint.pt", "previous.pt"):
        (tmp_path / "run" / name).write_bytes(data)
    code, _, err = run(train, "--data", "shapes", "--out", tmp_path / "run", "--device", "cpu", "--precision", "fp32", *flags_of(config))
    assert code == 2 and "previous.pt is truncated" in err and last.read_bytes() == data


def fuzzed(data, rng):
    """A file cut somewhere, with some bytes changed, or with a part repeated or left out."""
    data, kind = bytearray(data), rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.randrange(1, 9) if kind == 1 else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return bytes(data[:a] + data[b:] if kind == 2 else data[:b] + data[a:] if kind == 3 else data)


def ends_well(call):
    """The result, or None after one line of error: nothing else may come out of it."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except SystemExit as exit:
        lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        assert exit.code == 2 and len(lines) == 1, err.getvalue()


@pytest.mark.parametrize("reader", ["checkpoint", "npz", "statistics", "folder"])
def test_damaged_files_never_crash_a_reader(tmp_path, finished, folder, reader):
    """Checkpoints, npz of images and statistics, image folders: one clear line, or what is whole is right."""
    rng, cases = random.Random(1), 3000 if LONG else 60
    path, cache = tmp_path / "file.npz", tmp_path / "cache"
    images, labels = np.arange(3 * 192, dtype=np.uint8).reshape(3, 8, 8, 3), np.array([0, 1, 0])
    if reader == "checkpoint":
        original = (finished[0] / "checkpoint.pt").read_bytes()
        expected = sample.load_checkpoint(finished[0])
    elif reader == "folder":
        originals = {p: p.read_bytes() for p in folder.rglob("*.*") if p.suffix != ".txt"}
    else:
        (np.savez_compressed if rng.random() < 0.5 else np.savez)(path, arr_0=images, arr_1=labels)
        original = path.read_bytes()
    accepted = 0
    for case in range(cases):
        if reader == "folder":
            source = rng.choice(list(originals))
            path = tmp_path / f"image{case}{source.suffix}"
            path.write_bytes(fuzzed(originals[source], rng))
            image, error = train.Files([path], 8)[0]
            assert image.shape == (8, 8, 3) and image.dtype == np.uint8
            assert not error or error.startswith(str(path))
            accepted += not error
            path.unlink()
            continue
        path.write_bytes(fuzzed(original, rng))
        if reader == "checkpoint":
            if state := ends_well(lambda: sample.load_checkpoint(path)):
                assert same({k: expected[k] for k in SAVED}, {k: state[k] for k in SAVED})
        elif reader == "npz":
            if state := ends_well(lambda: train.open_data(str(path), 8, 0, cache)):
                assert np.array_equal(state.read(np.arange(3)), images)
                assert np.array_equal(state.labels, labels) or not state.classes  # the zip directory lost arr_1
        else:
            if state := ends_well(lambda: fid.open_npz(path)):
                ends_well(lambda: state.read(np.arange(state.count)))
        accepted += state is not None
    print(f"{reader}: {accepted} of {cases} damaged files were read")
    assert accepted < cases


def test_a_file_from_elsewhere_cannot_run_code(tmp_path, finished):
    """Pickles that would write a file when loaded: as checkpoint, old and new format, and inside an npz."""
    marker = tmp_path / "written"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save(dict(config=Evil()), tmp_path / "new.pt")
    torch.save(dict(config=Evil()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
    np.savez(tmp_path / "evil.npz", arr_0=np.array([Evil()], object), arr_1=np.array([Evil()], object), mu=np.array([Evil()], object))
    for name in ("new.pt", "old.pt", "bare.pt"):
        code, _, err = run(sample, tmp_path / name)
        assert code == 2 and "no checkpoint of train.py" in err
    code, _, err = run(train, "--data", tmp_path / "evil.npz", "--cache", tmp_path, "--out", tmp_path / "run", *flags_of())
    assert code == 2 and "evil.npz" in err
    assert ends_well(lambda: fid.open_npz(tmp_path / "evil.npz")) is None
    assert not marker.exists()
    pickle.loads((tmp_path / "bare.pt").read_bytes())
    assert marker.exists()  # the weapon was loaded


def rubbish(root):
    """A folder with every kind of file that has stopped somebody's run; two images in it are good."""
    (root / "a" / "looks.png").mkdir(parents=True), (root / "b").mkdir()
    Image.new("RGB", (9, 9), "red").save(root / "a" / "good.png")
    Image.new("RGB", (1, 1), "red").save(root / "a" / "pixel.png")
    frames = [Image.new("RGB", (9, 9), c) for c in ("red", "blue")]
    frames[0].save(root / "b" / "animated.gif", save_all=True, append_images=frames[1:])
    (root / "a" / "zero.png").write_bytes(b"")
    (root / "a" / "text.jpg").write_text("<html>404</html>")
    (root / "b" / "nowhere.png").symlink_to(root / "gone.png")
    (root / "b" / "loop.png").symlink_to(root / "b" / "loop.png")
    (root / "b" / "up").symlink_to(root)
    Image.new("1", (40_000, 20_000)).save(root / "b" / "bomb.png")
    Image.new("1", (20_000, 1)).save(root / "b" / "wire.png")
    return {"a/zero.png", "a/text.jpg", "b/nowhere.png", "b/loop.png", "b/bomb.png"}


@pytest.mark.parametrize("space", ["cached", "no room for a cache"])
def test_unreadable_images_are_all_named_or_left_out(tmp_path, monkeypatch, space):
    """Zero bytes, no image, links to nowhere or in a loop, a decompression bomb; at the start, not after hours."""
    bad = rubbish(tmp_path / "data")
    if space != "cached":
        monkeypatch.setattr(train.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    flags = ["--data", tmp_path / "data", "--cache", tmp_path / "cache", "--out", tmp_path / "run", "--device", "cpu", *flags_of()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, _, err = run(train, *flags)
        assert code == 2 and "5 of 9 images" in err and all(name in err for name in bad) and "--skip-bad" in err
        code, printed, err = run(train, *flags, "--skip-bad")
        assert code == 0 and "5 of 9 images left out" in printed and "a 2, b 2" in printed, err
        code, printed, err = run(train, *flags, "--skip-bad", "--steps", 5)
        assert code == 0 and "resumed at step 4" in printed
    data = train.open_data(str(tmp_path / "data"), 8, 0, tmp_path / "cache", skip_bad=True)
    seen = np.concatenate([data.index(np.arange(4 * n, 4 * n + 4)) for n in range(3)])
    assert len(set(seen)) == 4 and data.labels[seen[:4]].sum() == 2
    assert {os.path.relpath(m.split(" (")[0], tmp_path / "data") for m in
            json.loads(next((tmp_path / "cache").glob("*.json")).read_text()).values()} == bad


def test_a_folder_that_cannot_be_listed_ends_the_run(tmp_path, monkeypatch):
    """Else a class would be missing without a word."""
    def scandir(path, real=os.scandir):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    rubbish(tmp_path / "data")
    monkeypatch.setattr(os, "scandir", scandir)
    assert ends_well(lambda: train.find_images(tmp_path / "data")) is None


def test_an_image_that_can_be_read_again_is_taken(tmp_path, monkeypatch):
    """A disk that was away, rights that were missing: neither size nor date of the file have changed."""
    root = bad_images(tmp_path, "fine")
    Image.new("RGB", (8, 8)).save(root / "b" / "moody.png")
    real = Image.open
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda path: real(path if "moody" not in str(path) else "nowhere"))
        assert ends_well(lambda: train.open_data(str(root), 8, 0, tmp_path)) is None
        assert train.open_data(str(root), 8, 0, tmp_path, skip_bad=True).counts == [1, 0]
    assert train.open_data(str(root), 8, 0, tmp_path).counts == [1, 1]


def test_names_of_any_bytes_train(tmp_path):
    root = os.fsencode(tmp_path / "data")
    os.makedirs(root + b"/\xff\xfe"), os.makedirs(root + b"/b\nc")
    for name in (b"/\xff\xfe/\xe9.png", b"/b\nc/2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
        shutil.copy(tmp_path / "x.png", root + name)
    state, printed = fit(tmp_path / "run", "--data", tmp_path / "data", "--cache", tmp_path / "cache")
    printed.encode()
    assert state["step"] == 4 and len(state["classes"]) == 2


def test_an_image_of_one_row_does_not_fill_the_memory():
    with pytest.raises(ValueError, match="elongated"):
        train.centre_crop(Image.new("1", (2_000_000, 1)), 64)


def test_a_data_set_that_changed_under_a_run_is_noticed_and_one_that_moved_is_not(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "data")
    flags = ["--cache", tmp_path / "cache"]
    fit(tmp_path / "run", "--data", tmp_path / "data", *flags)
    os.rename(tmp_path / "data", tmp_path / "moved")
    fit(tmp_path / "run", "--data", tmp_path / "moved", *flags, steps=5)
    Image.new("RGB", (7, 7)).save(tmp_path / "moved" / "a" / "one.png")
    code, _, err = run(train, "--data", tmp_path / "moved", *flags, "--out", tmp_path / "run", "--device", "cpu",
                       "--precision", "fp32", *flags_of(steps=6))
    assert code == 2 and "other settings (content" in err


def test_a_cache_that_was_cut_off_is_built_again(tmp_path, folder):
    """Cut while being written it has no name; cut later it is too short; without its report it is not trusted."""
    images = train.open_data(str(folder), 8, 0, tmp_path).read(np.arange(9))
    cached, report = next(tmp_path.glob("*.npy")), next(tmp_path.glob("*.json"))
    whole = cached.read_bytes()
    for cut in (b"", whole[:20], whole[:130], whole[:-1], whole.replace(b"|u1", b"|i1")):
        cached.write_bytes(cut)
        assert np.array_equal(train.open_data(str(folder), 8, 0, tmp_path).read(np.arange(9)), images)
        assert cached.read_bytes() == whole
    for text in (None, "", "[]", "null", '{"x": 1}', '{"99": ""}'):
        report.write_text(text) if text is not None else report.unlink()
        cached.write_bytes(whole[:200] + bytes(len(whole) - 200))
        assert np.array_equal(train.open_data(str(folder), 8, 0, tmp_path).read(np.arange(9)), images), text
    stale = tmp_path / ".x.npy.12345678.part"
    stale.write_bytes(b"")
    train.open_data(str(folder), 8, 0, tmp_path)
    assert stale.exists()  # its writer may be alive
    os.utime(stale, (0, 0))
    train.open_data(str(folder), 8, 0, tmp_path)
    assert not stale.exists()


def test_two_runs_may_build_the_same_cache_at_once(tmp_path, folder):
    flags = ["--data", folder, "--cache", tmp_path / "cache", "--device", "cpu", *flags_of(steps=1)]
    both = [script("train.py", "--out", tmp_path / name, *flags) for name in ("one", "two")]
    for process in both:
        assert process.communicate() and process.returncode == 0
    direct = train.Files(train.find_images(folder), 8)(range(9))
    assert np.array_equal(train.open_data(str(folder), 8, 0, tmp_path / "cache").read(np.arange(9)), direct)
    assert len(list((tmp_path / "cache").iterdir())) == 2


# --------------------------------------------------------------------------------------------------
# 10. fid.py

CPU = torch.device("cpu")
CHECKED = [0.5599197, 0.2772512, 0.1640582, 0.07772964, -3.909923]  # as torchvision's


@pytest.fixture(scope="module")
def inception():
    """Random weights, and batch norms that do something: offsets, gains and uneven statistics."""
    net, generator = fid.load_inception("random")[0], torch.Generator().manual_seed(1)
    for norm in (layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)):
        for values in (norm.weight, norm.running_var):
            values.data.uniform_(0.8, 1.2, generator=generator)
        for values in (norm.bias, norm.running_mean):
            values.data.uniform_(-0.1, 0.1, generator=generator)
    return net.requires_grad_(False)


def wave(count=1, size=299):
    """Images (count, 3, size, size) in [-1, 1] that are the same in every version of torch."""
    i = torch.arange(count * 3 * size * size, dtype=torch.float64)
    return torch.sin(i * 0.37 + (i / 1000).square() % 6.28).float().view(count, 3, size, size)


def pooled(h, reduce, stride=1, padding=1):
    """3 x 3 windows over what lies inside the image, one by one."""
    places = range(-padding, h.shape[-1] - 2 + padding, stride)
    rows = [[reduce(h[:, :, max(a, 0) : a + 3, max(b, 0) : b + 3], (2, 3)) for b in places]
            for a in places]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def test_inception_has_the_tensors_of_the_published_file(inception):
    """Otherwise the downloaded weights do not load; names are torchvision's."""
    state = {k: v for k, v in inception.state_dict().items() if "num_batches" not in k}
    assert len(state) == 472 and sum(v.numel() for v in state.values()) == 23_885_392
    assert state["Mixed_6b.branch7x7dbl_3.conv.weight"].shape == (128, 128, 1, 7)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert state["fc.weight"].shape == (1008, 2048)


def test_inception_equals_torchvisions_once_its_pools_are_patched(inception, monkeypatch):
    """An independent implementation of the graph, on the same weights."""
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
    for ours, other in zip(inception(wave(2)),
                           (got["f"], got["s"].permute(0, 2, 3, 1).flatten(1), log_p)):
        assert (ours - other).norm() < 1e-5 * other.norm()


def test_inception_gives_the_features_it_gave_when_it_was_checked(inception):
    """Pins the whole graph where torchvision is not there: order of branches, maxima of the stem, eps of the batch norms."""
    f, s, log_p = (t[0].double() for t in inception(wave()))
    assert f.shape == (2048,) and s.shape == (2023,) and log_p.shape == (1008,)
    i = torch.arange(1, 2049, dtype=torch.float64)
    figures = [f.mean(), f @ i / 2048**2, s.mean(), s @ i[:2023] / 2048**2, log_p @ i[:1008] / 1e6]
    np.testing.assert_allclose(figures, CHECKED, rtol=1e-4)


WEIGHTS = Path(os.environ.get("SID2_INCEPTION", ROOT.parent / "shared" / "weights" / Path(fid.URL).name))


@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no published weights: SID2_INCEPTION names {Path(fid.URL).name}")
def test_published_weights_load_and_tell_drawings_from_noise():
    net, digest = fid.load_inception(str(WEIGHTS))
    drawings, noise = train.Shapes(64, 0).batch(np.arange(64))[0], np.random.default_rng(0).integers(0, 256, (32, 64, 64, 3), np.uint8)
    with torch.inference_mode():
        sets = [fid.measure(fid.Source("", len(x), x.__getitem__), np.arange(len(x)), net, CPU) for x in (drawings[:32], drawings[32:], noise)]
    near, far = (fid.frechet(sets[0]["mu"], sets[0]["sigma"], other["mu"], other["sigma"]) for other in sets[1:])
    assert digest == fid.SHA256 and 0 < near < far and 1 < sets[2]["IS"] < 1000


CHANNELS = {"5b": 192, "5c": 256, "5d": 288, "6b": 768, "6c": 768, "6d": 768, "6e": 768, "7b": 1280,
            "7c": 2048, "6a": 288, "7a": 768}


@pytest.mark.parametrize("block", CHANNELS)
def test_blocks_pool_as_the_original_graph(inception, block):
    """Means leave out the padding, which torchvision's count: features move by a fifth. Maximum in
    Mixed_7c, a slip that every FID contains; halving maxima after the convolutions in 6a and 7a."""
    layer, seen = inception.get_submodule(f"Mixed_{block}"), []
    h = torch.randn(1, CHANNELS[block], 7, 7) - 3  # padding with 0 would show
    if block in ("6a", "7a"):
        expected, got = pooled(h, torch.amax, 2, 0), layer(h)[:, -CHANNELS[block] :]
    else:
        hook = layer.branch_pool.register_forward_pre_hook(lambda _, h: seen.append(h[0].clone()))
        layer(h), hook.remove()
        expected, got = pooled(h, torch.amax if block == "7c" else torch.mean), seen[0]
    torch.testing.assert_close(got, expected)


def test_heads_take_no_bias_and_seven_channels_of_one_branch(inception):
    """ADM: log p without the bias of fc, over all 1008 classes; sFID's values in channels-last
    order, which matters against ADM's files."""
    seen = []
    hook = inception.Mixed_6d.branch1x1.register_forward_hook(lambda _, h, out: seen.append(out))
    (f, s, log_p), _ = inception(wave()), hook.remove()
    assert inception.fc.bias.abs().min() > 0
    torch.testing.assert_close(log_p, (f @ inception.fc.weight.T).log_softmax(1))
    assert torch.equal(s, seen[0][:, :7].permute(0, 2, 3, 1).reshape(1, -1)) and s.min() == 0


def test_resize_is_tensorflow_1s_and_not_torchs():
    """Source place = destination * in / out; nothing centred or averaged, the edge repeats.
    F.interpolate's half-pixel centres are off by whole grey levels."""
    for values, expected in ([0, 1], [0, 0.5, 1, 1]), ([0, 10, 20, 90], [0, 20]), ([7], [7, 7, 7]):
        x = torch.tensor(values, dtype=torch.float32).expand(1, 1, len(values), -1)
        got = fid.resize(x, len(expected))[0, 0]
        assert (got == torch.tensor(expected)).all()
        assert torch.equal(fid.resize(x.mT, len(expected))[0, 0], got.T)
    image = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.float32)
    i, j = np.arange(299) * 5 / 299, np.arange(299) * 7 / 299
    rows = [np.interp(j, np.arange(7), row) for row in image]
    expected = np.stack([np.interp(i, np.arange(5), column) for column in np.transpose(rows)], 1)
    x = torch.from_numpy(image)[None, None]
    assert np.abs(fid.resize(x)[0, 0].numpy() - expected).max() < 1e-2
    torchs = F.interpolate(x, (299, 299), mode="bilinear")[0, 0].numpy()
    assert np.abs(torchs - expected).max() > 7 and torch.equal(fid.resize(wave()), wave())


# Metrics


def gaussian(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d))


def moments(f):
    rows = F.pad(f.double(), (0, 1), value=1.0)
    return fid.mean_covariance(rows.T @ rows)


def test_frechet_distance_has_its_closed_forms():
    """Identical sets: 0. Equal covariances: the squared distance of the means. Common axes:
    Σ (√a - √b)²."""
    mu, sigma = moments(gaussian(500, 40))
    assert fid.frechet(mu, sigma, mu, sigma) < 1e-7
    shift = torch.linspace(-1, 1, 40, dtype=torch.float64)
    distance = fid.frechet(mu, sigma, mu + shift, sigma)
    assert distance == pytest.approx(shift.square().sum().item(), rel=1e-7)
    Q, (a, b) = torch.linalg.qr(gaussian(30, 30))[0], (shift[:30] + 1.1, 2 - shift[:30])
    distance = fid.frechet(a, Q * a @ Q.T, a, Q * b @ Q.T)
    assert distance == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-9)
    # fewer images than features: singular, where a matrix square root has imaginary noise
    x, y = moments(gaussian(20, 100)), moments(gaussian(30, 100, seed=1))
    assert np.isfinite(fid.frechet(*x, *y)) and fid.frechet(*x, *y) > 0
    assert 0 <= fid.frechet(*x, *x) < 2e-6 * x[1].trace()
    assert fid.frechet(*x, *y) == pytest.approx(fid.frechet(*y, *x), rel=1e-6)


def test_frechet_distance_agrees_with_scipys_square_root():
    """The textbook form tr (S_1 S_2)^½, which other evaluators take."""
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    (mu_1, S_1), (mu_2, S_2) = moments(gaussian(400, 60)), moments(gaussian(400, 60, seed=1) * 2)
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


def test_kid_equals_a_direct_sum_and_has_no_bias():
    """Cubic kernel with 1 / width, every pair but that of an image with itself; zero on average
    between draws of one distribution, where FID is far from zero."""
    x, y = gaussian(30, 8), gaussian(30, 8, seed=1)
    apart = ~np.eye(30, dtype=bool)
    xx, yy, xy = ((a.numpy() @ b.numpy().T / 8 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    expected = xx[apart].mean() + yy[apart].mean() - 2 * xy.mean()
    assert fid.kid(x, y, subsets=2) == pytest.approx(expected, rel=1e-9)
    draws = [torch.randn(20, 6, generator=torch.Generator().manual_seed(i)) for i in range(400)]
    values = np.array([fid.kid(a, b, subsets=1) for a, b in zip(draws[::2], draws[1::2])])
    assert abs(values.mean()) < 4 * values.std() / 200**0.5
    pairs = zip(draws[:20:2], draws[1:20:2])
    assert min(fid.frechet(*moments(a), *moments(b)) for a, b in pairs) > 0.3


# From images to statistics


def shallow(x):
    """Stands in for Inception where only the bookkeeping matters: pixels are the features."""
    f, s, p = x[:, 0].flatten(1), x[:, 1].flatten(1), x[:, 2].flatten(1)
    return f[:, :2048] + 1000, s[:, :2023], (3 * p[:, :1008]).log_softmax(1)


def some_source(count=7):
    rngs = [np.random.default_rng(i) for i in range(count)]
    images = [rng.integers(0, 256, (9 + (i > 3), 8, 3), np.uint8) for i, rng in enumerate(rngs)]
    return fid.Source("images", count, lambda numbers: [images[i] for i in numbers])


def test_pixels_reach_the_network_minus_128_over_128():
    """Levels 0, 128, 255 as -1, 0, 127/128; rows, columns and channels keep their places."""
    image, seen = np.zeros((299, 299, 3), np.uint8), []
    image[0, :2] = [[0, 128, 255], [0, 64, 0]]
    source = fid.Source("one", 2, lambda numbers: [image] * len(numbers))
    fid.measure(source, np.arange(2), lambda x: (seen.append(x), shallow(x))[1], CPU)
    assert seen[0][0, :, 0, :2].T.tolist() == [[-1, 0, 127 / 128], [-1, -0.5, -1]]


def test_statistics_equal_direct_ones_whatever_the_batch():
    """Mean and covariance (ddof 1) though features are near 1000, where float32 sums would lose
    the third digit; IS over shuffled splits; mixed sizes; every image once."""
    seen, source = [], some_source()
    net = lambda x: (seen.append(shallow(x)), shallow(x))[1]  # noqa: E731
    fid.measure(source, np.arange(7), net, CPU, batch=1)
    f, s, log_p = (torch.cat(t).double().numpy() for t in zip(*seen))
    order = np.random.default_rng(0).permutation(7) // 3
    splits = [log_p[order == k] for k in range(3)]
    scores = [(np.exp(q) * (q - np.log(np.exp(q).mean(0)))).sum(1).mean() for q in splits]
    for batch in (1, 3, 7):
        got = fid.measure(source, np.arange(7), shallow, CPU, batch, keep=5, split=3)
        np.testing.assert_allclose(got["mu"], f.mean(0), rtol=1e-9)
        np.testing.assert_allclose(got["sigma"], np.cov(f.T), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got["sigma_s"], np.cov(s.T), rtol=1e-4, atol=1e-6)
        assert got["IS"] == pytest.approx(np.exp(scores).mean(), rel=1e-6) and got["n"] == 7
        assert got["sizes"] == {(9, 8, 3), (10, 8, 3)}
        kept = np.argsort(np.random.default_rng(0).permutation(7))[:5]
        np.testing.assert_array_equal(got["features"], f[kept].astype(np.float16))


def test_two_processes_give_the_statistics_of_one(tmp_path):
    """Seven images over two processes: none twice, none missing, one answer on both."""
    (tmp_path / "script.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch, fid, sample
from {Path(__file__).stem} import CPU, shallow, some_source
rank = sample.setup("cpu")[0]
torch.save(fid.measure(some_source(), np.arange(7), shallow, CPU, 2, 5), sys.argv[1] + str(rank))
sample.leave()
os._exit(0)  # as the scripts do: gloo's threads may abort while Python shuts down
""")
    torchrun(tmp_path / "script.py", out := tmp_path / "out")
    one = fid.measure(some_source(), np.arange(7), shallow, CPU, 2, 5)
    for rank in range(2):
        two = torch.load(f"{out}{rank}", weights_only=True)
        assert two.pop("sizes") == one["sizes"]
        torch.testing.assert_close(two, {k: one[k] for k in two})


# The script


@pytest.fixture
def score(inception, tmp_path, monkeypatch):
    """Runs `python fid.py ...` in this process, in a folder of its own: exit code, stdout, stderr.
    Distances are of the first 64 features, as the eigenvalues of 2,048 take seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "load_inception", lambda path: (inception, "random"))
    whole, some = fid.frechet, slice(64)
    monkeypatch.setattr(fid, "frechet", lambda a, A, b, B: whole(a[some], A[some, some], b[some],
                                                                 B[some, some]))

    return lambda *args: run(fid, *args, "--device", "cpu")


def write_images(name, size=8, suffix=".png"):
    Path(name).mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (5, size, size, 3), np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"{name}/{i}{suffix}")
    return images


def test_script_saves_statistics_and_scores_against_them(score):
    """The README's commands, on images that are also the reference, with a note at every doubt.
    ADM's files have images too: precision and recall are of these, FID of mu and sigma."""
    write_images("real/nested", 12, ".JPEG")
    code, out, _ = score("real", "--save-stats", "ref.npz", "--crop", 8)
    assert code == 0 and "wrote ref.npz.fid.json and ref.npz" in out and "JPEG files" in out
    with np.load("ref.npz") as arrays:
        assert {k: v.shape for k, v in arrays.items()} == fid.SHAPES and arrays["n"] == 5
    crops = [train.centre_crop(Image.open(f"real/nested/{i}.JPEG"), 8) for i in range(5)]
    np.savez_compressed("samples.npz", arr_0=np.stack(crops), arr_1=[0, 0, 1, 1, 2])
    np.savez("adm.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=np.stack(crops))
    code, out, _ = score("samples.npz", "ref.npz")
    report = json.loads(Path("samples.npz.fid.json").read_text())
    assert code == 0 and report["images"] == {"samples.npz": 5, "ref.npz": 5}
    assert list(report["results"]["ref.npz"]) == ["random-FID-5", "random-sFID-5", "random-IS-5"]
    assert report["results"]["ref.npz"]["random-FID-5"] < 1e-4  # the reference itself
    assert set(report["sha256"]) == {"samples.npz", "ref.npz"} and report["settings"]["num"] is None
    assert set(report["versions"]) == {"torch", "numpy", "PIL"}
    assert "sorted by class" in out and "fewer than the 2,048" in out
    code, out, _ = score("samples.npz", "adm.npz", "--precision-recall", "--kid", "--out", "b.json")
    result = json.loads(Path("b.json").read_text())["results"]["adm.npz"]
    names = [f"random-{k}" for k in "FID-5 IS-5 precision recall KID".split()]
    assert code == 0 and list(result) == names and "0.0 MB of features in float16" in out
    assert result["random-precision"] == result["random-recall"] == 1
    assert result["random-FID-5"] > 20 and "adm.npz does not say" in out


def test_the_whole_script_on_two_processes_writes_the_same_statistics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images("five")
    for n in (1, 2):
        torchrun("fid.py", "five", "--save-stats", f"{n}.npz", "--inception", "random", "--device", "cpu", "--batch", 2, processes=n)
    one, two = np.load("1.npz"), np.load("2.npz")
    assert one["n"] == two["n"] == 5
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_allclose(one[key], two[key], rtol=1e-3, atol=1e-5 * abs(one[key]).max())
    assert json.loads(Path("2.npz.fid.json").read_text())["processes"] == 2


def test_folder_and_npz_give_the_same_pixels_as_rgb_at_any_size(score):
    """PNG files and arr_0, stored or deflated, in whole or in part, are one set of images."""
    images = write_images("a")
    np.savez("b.npz", arr_0=images)
    np.savez_compressed("c.npz", arr_0=images)
    for name in ("a", "b.npz", "c.npz"):
        source = fid.open_source(name)
        for numbers in (np.array([1, 3, 4]), np.arange(source.count)):
            assert source.count == 5 and np.array_equal(source.read(numbers), images[numbers])
    for i, mode in enumerate(("L", "P", "RGBA")):
        Image.new("RGB", (20, 10)).convert(mode).save(f"a/{i}.png")
    shapes = [image.shape for image in fid.open_source("a").read(np.arange(4))]
    assert shapes == [(10, 20, 3)] * 3 + [(8, 8, 3)]
    assert {x.shape for x in fid.open_source("a", 4).read(np.arange(4))} == {(4, 4, 3)}


def test_script_samples_a_run_and_scores_it(score, tmp_path):
    """No files in between: the same images as sample.py's, labels as in the data."""
    Path("run").mkdir()
    for classes in ([], train.Shapes.classes):
        config = sid2.Config(8, 2, (16,), "T", depth=1, middle=1, width=16, head_width=16,
                             num_classes=len(classes), sample_steps=2)
        net = sid2.UViT(config).eval()
        for p in net.parameters():  # a fresh network gives 0 for every label
            torch.nn.init.normal_(p, 0, 0.3)
        torch.save(dict(config=asdict(config), net=net.state_dict(), ema=net.state_dict(), optimizer={}, step=3,
                        random={}, classes=classes, seconds=0.0, window=dict(loss=0.0, steps=0, bad=0, skipped=0)), "run/checkpoint.pt")
        args = types.SimpleNamespace(samples="run", data="shapes", num=5, batch=2, cache=tmp_path)
        fake, real, _ = fid.open_run(args, CPU)
        pictures, labels = train.Shapes(8, 0).batch(np.arange(5))
        labels = labels if classes else [0] * 5
        with sample.autocast(CPU, sample.choose_precision(CPU, "auto")):
            expected = sample.sample_images(net, config, list(range(5)), labels, CPU, 2)
        assert np.array_equal(fake.read(np.arange(5)), expected) and fake.count == 5
        assert np.array_equal(real.read(np.arange(5)), pictures) and real.count == 10_000
    np.savez("ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert score("run", "ref.npz", "--data", "shapes", "--num", 5)[0] == 0
    report = json.loads(Path("run/step-3.fid.json").read_text())
    assert report["results"]["ref.npz"].keys() == {"random-FID-5", "random-IS-5"}
    assert report["settings"]["config"]["step"] == 3 and "run/checkpoint.pt" in report["sha256"]


def test_result_of_other_settings_is_never_replaced(score):
    """The same command again may replace its own result."""
    write_images("samples")
    np.savez("ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert score("samples", "ref.npz")[0] == 0
    before = Path("samples.fid.json").read_bytes()
    code, _, err = score("samples", "ref.npz", "--num", 4)
    assert code == 2 and "other settings (num)" in err
    assert Path("samples.fid.json").read_bytes() == before
    assert score("samples", "ref.npz", "--batch", 2)[0] == 0
    assert score("samples", "ref.npz", "--num", 4, "--out", "four.json")[0] == 0
    assert "random-FID-4" in json.loads(Path("four.json").read_text())["results"]["ref.npz"]


def halve(name):
    Path(name).write_bytes(Path(name).read_bytes()[: Path(name).stat().st_size // 2])


@pytest.mark.parametrize("args, message", [
    ("nowhere good", "nowhere does not exist"),
    ("good nowhere.npz", "nowhere.npz does not exist"),
    ("empty good", "no images in empty"),
    ("few good", "few has 3 images"),
    ("broken good", "broken/2.png is no readable image"),
    ("text.npz good", "text.npz is no npz to score with"),
    ("cut.npz good", "cut.npz is no npz to score with"),
    ("short.npz good", "arr_0 is not as long as it says"),
    ("keys.npz good", "it holds images; wanted: arr_0, or mu and sigma"),
    ("mu.npz good", "it holds arr_0, mu; wanted: arr_0, or mu and sigma"),
    ("float.npz good", "arr_0 is float64 (5, 8, 8, 3); wanted: uint8 (N, H, W, 3)"),
    ("shape.npz good", "arr_0 is uint8 (5, 8, 8, 1); wanted: uint8 (N, H, W, 3)"),
    ("object.npz good", "object.npz is no npz to score with"),
    ("good narrow.npz", "mu is (192,); wanted: (2048,), finite"),
    ("good nan.npz", "sigma is (2048, 2048); wanted: (2048, 2048), finite"),
    ("good stats.npz --kid", "stats.npz has statistics only"),
    ("good good --num 6", "--num 6: good has 5 images"),
    ("good good --num 3", "--num must be at least 4, got 3"),
    ("good good --batch 0", "--batch must be at least 1, got 0"),
    ("good good --bath 9", "unrecognized arguments"),
    ("good", "give SAMPLES REFERENCE, or RUN --data DATA, or DATA --save-stats OUT.npz"),
    ("good good --save-stats a.npz", "give SAMPLES REFERENCE"),
    ("good --save-stats stats.npz", "stats.npz exists with other settings"),
    ("stats.npz --save-stats a.npz", "stats.npz is a file of statistics"),
    ("good good --out nowhere/a.json", "cannot write nowhere/a.json"),
    ("run good", "run is a run of train.py: --data DATA"),
    ("good --data shapes", "no checkpoint at good"),
])
def test_bad_input_ends_with_one_line_and_changes_nothing(score, tmp_path, args, message):
    """Exit code 2; the line names what came and what is wanted."""
    images, name = write_images("good"), args.split()[0]
    bad = {"keys.npz": dict(images=images), "mu.npz": dict(arr_0=images, mu=np.zeros(2048)),
           "float.npz": dict(arr_0=images / 255), "shape.npz": dict(arr_0=images[..., :1]),
           "object.npz": dict(arr_0=np.array([None])), "cut.npz": dict(arr_0=images),
           "short.npz": dict(arr_0=images), "narrow.npz": dict(mu=np.zeros(192), sigma=np.eye(192)),
           "nan.npz": dict(mu=np.zeros(2048), sigma=np.full((2048, 2048), np.nan)),
           "stats.npz": dict(mu=np.zeros(2048), sigma=np.eye(2048))}
    for file in bad.keys() & set(args.split()):
        np.savez(file, **bad[file])
    if name in ("few", "broken", "run"):
        write_images(name)
    match name:
        case "empty": Path("empty").mkdir()
        case "run": Path("run/checkpoint.pt").touch()
        case "few": Path("few/0.png").unlink(), Path("few/1.png").unlink()
        case "broken": halve("broken/2.png")
        case "cut.npz": halve("cut.npz")
        case "text.npz": Path(name).write_text("no zip")
        case "short.npz":  # a whole zip file whose array ends before its last image
            with zipfile.ZipFile(name) as archive:
                array = archive.read("arr_0.npy")
            with zipfile.ZipFile(name, "w") as archive:
                archive.writestr("arr_0.npy", array[:-1])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, out, err = score(*args.split())
    assert code == 2 and message in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")
    assert err.count("\n") == 1 or name in ("broken", "short.npz")  # begun, with a bar to show it
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_weights_are_loaded_if_their_hash_is_right(inception, tmp_path, monkeypatch, capsys):
    """Checked every time, since a cache can rot: a truncated download or torchvision's file would
    give numbers that look like FID. One line says what to fetch where there is no connection."""
    state = {k: v for k, v in inception.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "weights.pth")  # the published file has no num_batches_tracked
    digest = fid.sha256(tmp_path / "weights.pth")
    file = (tmp_path / "weights.pth").rename(tmp_path / f"weights-{digest[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fid, "URL", file.as_uri())
    monkeypatch.setattr(fid, "SHA256", digest)
    for path in (None, file):
        net, weights = fid.load_inception(path)
        assert weights == digest and not net.training
        torch.testing.assert_close(net.state_dict(), inception.state_dict(), rtol=0, atol=0)
    halve(next((tmp_path / "home").rglob("*.pth")))
    for url, path in (fid.URL, None), (fid.URL, "nowhere.pth"), ("http://127.0.0.1:9/a.pth", None):
        monkeypatch.setattr(fid, "URL", url)
        with pytest.raises(SystemExit) as end:
            fid.load_inception(path)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.splitlines()[-1].startswith("error: no weights of Incep")
        assert all(fact in err for fact in (url, "95,628,359 bytes", digest, "--inception PATH"))

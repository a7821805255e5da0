"""SiD2, Simpler Diffusion (arXiv 2410.19324): pixel-space diffusion. The method in six lines:

    logsnr = -2 log tan(u(t)) + (1 - t) shift(image size) + t shift(32)    t = 0 data, t = 1 noise
    z    = alpha x + sigma eps       alpha² = sigmoid(logsnr), sigma² = sigmoid(-logsnr)
    v    = alpha eps - sigma x       v_hat = network(z, logsnr, y), x_hat = alpha z - sigma v_hat
    loss = E_t ½ (-dlogsnr/dt) sigmoid(bias - logsnr) |eps - eps_hat|²
    h    = high + up(h - low)        the network's only skip: what the level below has changed
    z_s  = r (alpha_s / alpha_t) z_t + (1 - r) alpha_s x_hat + noise,  r = exp(logsnr_t - logsnr_s)

The alphabet, here and in the scripts: x clean image (B, 3, H, W) in [-1, 1]; z noisy image; eps
noise; v what the network predicts; _hat an estimate; t > s times in [0, 1]; logsnr in nats; y class
label (B,); h features (B, H, W, C); c conditioning vector (B, width).

No code of the authors was ever released. Every constant says in brackets where it comes from:
    [SiD2]    the paper's abstract and introduction, read at first hand
    [SiD2*]   the paper's appendix and tables, as other people transcribe or quote them
    [SD]      simple diffusion, arXiv 2301.11093, the predecessor by the same group
    [VDM]     Variational Diffusion Models, arXiv 2107.00630
    [VDM++]   Kingma & Gao 2023, arXiv 2303.00848, the source of the sigmoid weighting
    [MCM]     Multistep Consistency Models, arXiv 2403.06807, same group, same network
    [GI]      Kynkäänniemi et al. 2024, arXiv 2404.07724, guidance in a limited interval
    [derived] arithmetic from the above, shown by a test
    [ours]    in no text that we could read: our choice, with its reason

A section uses the imports and the sections above it: reading order is copying order.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# --------------------------------------------------------------------------------------------------
# 1. Configuration


@dataclass(frozen=True)
class Config:
    """One run: network, noise process, training, sampling. Defaults are those of ImageNet."""

    # network
    image_size: int  # height = width of the images, in pixels
    patch_size: int  # the top feature map has (image_size / patch_size)² positions
    channels: tuple  # width of each level, top first; each level halves the feature map
    blocks: str  # a letter for each level: R residual (convolutional), T transformer
    depth: int = 3  # blocks per level on the way down, and again on the way up [SiD2*]
    middle: int = 16  # blocks of the last level, which is the middle [SiD2*]
    width: int = 1024  # of the conditioning vector [SiD2*]
    head_width: int = 128  # channels per attention head: 4 heads at 512 channels [ours]
    dropout: float = 0.1  # in transformer blocks only [SiD2*]
    num_classes: int = 1000  # ImageNet [SiD2]; 0: unconditional; label num_classes: null class
    # noise process and loss
    noise_low: int = 32  # noise resolution at t = 1, in pixels [SiD2*]
    noise_high: int = 64  # at t = 0: the image size, from 64 px up [SiD2*] [MCM]
    bias: float = 0.0  # b of the weighting sigmoid(b - logsnr), by resolution [SiD2*] [VDM++]
    # training
    steps: int = 500_000  # [SD]
    batch: int = 2048  # images per step, over all processes [SD]
    micro_batch: int = 0  # images at once in a process; 0: its whole share [ours]
    lr: float = 1e-4  # of Adam, constant after the warm-up [SD]
    warmup: int = 10_000  # steps from 0 to lr [SD]
    ema: float = 0.9999  # decay of the averaged weights [SD]
    label_dropout: float = 0.1  # share of labels replaced by the null class [SD]
    flip: bool = True  # mirror half of the images [ours]
    log_every: int = 50  # steps between rows of the log [ours]
    sample_every: int = 5000  # steps between pictures [ours]
    save_every: int = 5000  # steps between checkpoints [ours]
    # sampling
    sampler: str = "ddpm"  # or "ddim" [SiD2*]
    sample_steps: int = 512  # [SiD2*]
    gamma: float = 0.2  # DDPM noise between its lower (0) and upper (1) bound [SD]
    guidance: float = 2.0  # scale inside the interval; 1 is no guidance [GI]
    interval: tuple = (-2.13, 2.55)  # low <= logsnr < high: 0.28 < sigma / alpha <= 2.90 [GI]


# The paper's rows are one network; compute grows by finer patches, not more parameters [SiD2].
# Channels and blocks [SiD2*], at 64 px [MCM]; noise 32 -> 64 and 128 [MCM], 32 -> 512 [SiD2*],
# 32 -> 256 by analogy [derived]; bias at 64 px [VDM++], above [SiD2*]. Not trained here.
# `shapes` is for five minutes on two CPU cores, `cifar10` for one GPU.
PRESETS = {
    "shapes": Config(16, 1, (32, 64, 128), "RRT", depth=2, middle=2, width=256, head_width=64,
                     dropout=0.0, num_classes=6, noise_high=32, bias=2.0, steps=1200, batch=64,
                     lr=2e-3, warmup=100, flip=False, sample_every=300, save_every=300,
                     sample_steps=32, interval=(-6.0, 6.0)),  # [ours]
    "cifar10": Config(32, 1, (128, 256, 512), "RTT", middle=8, width=512, head_width=64,
                      num_classes=10, noise_high=32, bias=2.0, steps=40_000, batch=256, lr=3e-4,
                      warmup=1000, ema=0.9995, save_every=1000, sample_steps=256),  # [ours]
    #                      pixels patch channels           blocks                  loss bias
    "imagenet64":     Config( 64, 1, (256, 512, 1024),      "RTT",  noise_high=64,  bias=2.0),
    "imagenet128":    Config(128, 1, (128, 256, 512, 1024), "RRTT", noise_high=128, bias=0.0),
    "imagenet256_p2": Config(256, 2, (128, 256, 512, 1024), "RRTT", noise_high=256, bias=-1.0),
    "imagenet256_p1": Config(256, 1, (128, 256, 512, 1024), "RRTT", noise_high=256, bias=-1.0),
    "imagenet512_p4": Config(512, 4, (128, 256, 512, 1024), "RRTT", noise_high=512, bias=-3.0),
    "imagenet512_p2": Config(512, 2, (128, 256, 512, 1024), "RRTT", noise_high=512, bias=-3.0),
}

# --------------------------------------------------------------------------------------------------
# 2. Noise process: variance preserving, in float32 whatever the autocast state


def schedule(t: Tensor, image_size: int, noise_low: int, noise_high: int) -> tuple[Tensor, Tensor]:
    """Interpolated shifted cosine: logsnr(t) in nats and its slope dlogsnr/dt, shaped as t [SiD2*].

        logsnr(t) = -2 log tan(u) + (1 - t) shift(noise_high) + t shift(noise_low)
        u = u_0 + t (u_1 - u_0),   shift(d) = 2 log(d / image_size)

    The cosine term runs from +10 to -10 ([SD] has 15), so both ends are finite. The shift is
    [SD]'s: averaging 2x2 pixels divides the noise variance by 4, so 128 px at noise resolution 64,
    pooled to 64 px, is exactly as noisy as 64 px unshifted. Trap: public transcriptions of the
    paper print the shift with the opposite sign and half the size. Trap: computed in bfloat16,
    logsnr is off by up to 1.3 nats.
    """
    t = t.float()
    u_0, u_1 = math.atan(math.exp(-10 / 2)), math.atan(math.exp(10 / 2))  # logsnr +10, -10 [SiD2*]
    shift_low, shift_high = (2 * math.log(d / image_size) for d in (noise_low, noise_high))
    u = u_0 + t * (u_1 - u_0)
    logsnr = -2 * torch.log(torch.tan(u)) + (1 - t) * shift_high + t * shift_low
    slope = -4 * (u_1 - u_0) / torch.sin(2 * u) + shift_low - shift_high  # [derived]
    return logsnr, slope


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, shaped (..., 1, 1, 1) to multiply images; logsnr: (B,) or a scalar.

    Trap: sqrt(1 - alpha²) is exactly 0 in float32 from logsnr 17 up; sigmoid(-logsnr) is not.
    """
    logsnr = logsnr.float()[..., None, None, None]
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def diffuse(x: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """z = alpha x + sigma eps."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * x + sigma * eps


def v_from_x_eps(x: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """v = alpha eps - sigma x, the network's target [SiD2*]."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * eps - sigma * x


def x_from_v(z: Tensor, v: Tensor, logsnr: Tensor) -> Tensor:
    """x = alpha z - sigma v."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * z - sigma * v


def eps_from_v(z: Tensor, v: Tensor, logsnr: Tensor) -> Tensor:
    """eps = sigma z + alpha v."""
    alpha, sigma = alpha_sigma(logsnr)
    return sigma * z + alpha * v


# --------------------------------------------------------------------------------------------------
# 3. Loss


def low_discrepancy_times(index: Tensor, batch: int, u: float) -> Tensor:
    """Times of the images at places `index` of a batch: t_i = (u + i / batch) mod 1 [VDM].

    With one u ~ U(0, 1) per step each t is uniform, and together they cover [0, 1) evenly, which
    takes most of the variance out of the loss. `batch` counts the images of all processes.
    """
    return (u + index.float() / batch) % 1


def sigmoid_loss(v_hat: Tensor, v: Tensor, logsnr: Tensor, slope: Tensor, bias: float) -> Tensor:
    """The sigmoid loss of each image, (B,): weight sigmoid(bias - logsnr) on eps [SiD2] [VDM++].

        ½ (-dlogsnr/dt) sigmoid(bias - logsnr) |eps - eps_hat|²,  |d eps|² = alpha² |d v|²

    Mean over pixels and channels, in nats per dimension: with weight 1 it is the diffusion part of
    the variational bound. Because of -dlogsnr/dt its mean over t depends on the schedule through
    the end points only. Traps: public SiD2 losses drop that factor, or put the weight of the x
    error, e^bias sigmoid(logsnr - bias) [SiD2*], on the v error.
    """
    weight = 0.5 * -slope * torch.sigmoid(bias - logsnr) * torch.sigmoid(logsnr)
    return weight * (v_hat.float() - v.float()).square().mean((1, 2, 3))


# --------------------------------------------------------------------------------------------------
# 4. Network: Residual U-ViT. Features lie as (B, H, W, C): channels last, and a token sequence too


def zero(layer: nn.Module) -> nn.Module:
    """The last layer of a residual branch starts at zero, so a fresh block is the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class RMSNorm(nn.Module):
    """h / rms(h) * gain over the last dimension: mean in float32, products in the type of h.

    The paper's kind of norm is not known; this one [ours] works per pixel and has no groups. A
    float32 copy of h would halve the rounding in bfloat16, and add a third to what training keeps.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, h: Tensor) -> Tensor:
        mean = (h * h).mean(-1, keepdim=True, dtype=torch.float32)
        r = torch.rsqrt(mean + 1e-6)  # no division by 0 [ours]
        return h * r.to(h.dtype) * self.gain.to(h.dtype)


class Conv3x3(nn.Conv2d):
    """3x3 convolution of (B, H, W, C); the permuted view is torch's channels_last: no copy."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ResBlock(nn.Module):
    """Two convolutions; c scales and shifts after the second norm [SD]."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm1 = RMSNorm(channels)
        self.conv1 = Conv3x3(channels)
        self.film = nn.Linear(width, 2 * channels)
        self.norm2 = RMSNorm(channels)
        self.conv2 = zero(Conv3x3(channels))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.film(c)[:, None, None].chunk(2, dim=-1)
        r = self.conv1(F.silu(self.norm1(h)))
        r = self.norm2(r) * (1 + scale) + shift
        return h + self.conv2(F.silu(r))


class TransformerBlock(nn.Module):
    """MLP first, then attention [SD]; c scales and shifts the MLP's hidden layer alone [MCM].

    q and k are normalised, each head by itself [SiD2*]: else logits grow in long training.
    """

    def __init__(self, channels: int, width: int, head_width: int, dropout: float):
        super().__init__()
        self.norm_mlp = RMSNorm(channels)
        self.mlp_in = nn.Linear(channels, 4 * channels)  # MLP ratio 4 [SiD2*]
        self.film = nn.Linear(width, 2 * 4 * channels)  # [MCM]
        self.dropout = nn.Dropout(dropout)
        self.mlp_out = zero(nn.Linear(4 * channels, channels))  # [SiD2*]
        self.norm_attention = RMSNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm_q, self.norm_k = RMSNorm(head_width), RMSNorm(head_width)
        self.attention_out = zero(nn.Linear(channels, channels))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        B, H, W, C = h.shape
        scale, shift = self.film(c)[:, None, None].chunk(2, dim=-1)
        r = F.silu(self.mlp_in(self.norm_mlp(h))) * (1 + scale) + shift
        h = h + self.mlp_out(self.dropout(r))

        qkv = self.qkv(self.norm_attention(h)).reshape(B, H * W, 3, -1, len(self.norm_q.gain))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H W, head_width)
        r = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return h + self.attention_out(r.transpose(1, 2).reshape(B, H, W, C))


class Down(nn.Module):
    """To the level below: 2x2 average, 1x1 projection [MCM]."""

    def __init__(self, channels: int, channels_below: int):
        super().__init__()
        self.project = nn.Linear(channels, channels_below)

    def forward(self, h: Tensor) -> Tensor:
        return self.project(F.avg_pool2d(h.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))


class Up(nn.Module):
    """From the level below: 1x1 projection, nearest x2 [MCM]. Trap: no bias, or up(0) is not 0."""

    def __init__(self, channels: int, channels_below: int):
        super().__init__()
        self.project = nn.Linear(channels_below, channels, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.project(h).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


class Condition(nn.Module):
    """c from logsnr and label: sinusoids, two dense layers, plus the class embedding, swish.

    logsnr in [-20, 20] maps linearly to [0, 1] at every resolution, so that weights can move
    between them [ours]. The frequencies run from 1000 to 0.1 [ours]: the fastest turns by 0.3
    radians between neighbours of 512 steps, which lie at least 0.012 nats apart.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.dense1 = nn.Linear(width, width)
        self.dense2 = nn.Linear(width, width)
        self.label = nn.Embedding(num_classes + 1, width)  # the last row is the null class

    def forward(self, logsnr: Tensor, y: Tensor) -> Tensor:
        exponent = torch.linspace(3, -1, self.dense1.in_features // 2, device=logsnr.device)
        angle = (logsnr.float()[:, None] + 20) / 40 * 10**exponent  # [ours]
        c = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return F.silu(self.dense2(F.silu(self.dense1(c))) + self.label(y))


class UViT(nn.Module):
    """Residual U-ViT: z (B, 3, H, W), logsnr (B,), y (B,) int64 -> v_hat (B, 3, H, W) in float32.

    H = W = config.image_size; y = config.num_classes is the null class. One skip per level and no
    other [SiD2*]. Patch layers are linear [ours]: 3x3 would add 1.2 % GMAC at 512 px, patch 4.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.patch_size, self.checkpointing = config.patch_size, ()  # levels that save memory
        C, levels = config.channels, range(len(config.channels) - 1)  # above the middle
        self.first = config.blocks.find("T")  # the level where transformers begin

        def blocks(level: int, count: int) -> nn.ModuleList:
            if config.blocks[level] == "R":
                return nn.ModuleList(ResBlock(C[level], config.width) for _ in range(count))
            return nn.ModuleList(TransformerBlock(C[level], config.width, config.head_width,
                                                  config.dropout) for _ in range(count))

        self.condition = Condition(config.width, config.num_classes)
        self.embed = nn.Linear(3 * config.patch_size**2, C[0])
        if self.first >= 0:
            side = config.image_size // config.patch_size >> self.first
            self.position = nn.Parameter(0.01 * torch.randn(side, side, C[self.first]))  # [SD]
        self.blocks_down = nn.ModuleList(blocks(i, config.depth) for i in levels)
        self.down = nn.ModuleList(Down(C[i], C[i + 1]) for i in levels)
        self.middle = blocks(-1, config.middle)
        self.up = nn.ModuleList(Up(C[i], C[i + 1]) for i in levels)
        self.blocks_up = nn.ModuleList(blocks(i, config.depth) for i in levels)
        self.norm = RMSNorm(C[0])
        self.head = zero(nn.Linear(C[0], 3 * config.patch_size**2))

    def place(self, h: Tensor, level: int) -> Tensor:
        """Positions, where transformers begin; before `low` is taken, or a fresh trunk would be
        no identity [ours]."""
        return h + self.position.to(h.dtype) if level == self.first else h

    def run(self, level: int, blocks: nn.ModuleList, h: Tensor, c: Tensor) -> Tensor:
        for block in blocks:
            if level in self.checkpointing and self.training:  # keep h, compute the inside again
                h = checkpoint(block, h, c, use_reentrant=False)
            else:
                h = block(h, c)
        return h

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        """All between patch embedding and head; at initialisation the identity, bit for bit."""
        skips = []
        for level, (blocks, down) in enumerate(zip(self.blocks_down, self.down)):
            high = self.run(level, blocks, h, c)
            h = low = self.place(down(high), level + 1)
            skips.append((high, low))
        h = self.run(len(skips), self.middle, h, c)
        for level in reversed(range(len(skips))):
            (high, low), up = skips.pop(), self.up[level]
            h = high + up(h - low)
            h = self.run(level, self.blocks_up[level], h, c)
        return h

    def forward(self, z: Tensor, logsnr: Tensor, y: Tensor) -> Tensor:
        c = self.condition(logsnr, y)
        h = self.embed(F.pixel_unshuffle(z, self.patch_size).permute(0, 2, 3, 1))
        h = self.trunk(self.place(h, 0), c)
        h = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(h.permute(0, 3, 1, 2), self.patch_size).float()


# --------------------------------------------------------------------------------------------------
# 5. Sampler


def ddpm_step(z: Tensor, x_hat: Tensor, logsnr_t: Tensor, logsnr_s: Tensor, gamma: float,
              noise: Tensor) -> Tensor:
    """Ancestral step from t to s < t [SD]. Images (B, 3, H, W), logsnr scalars or (B,).

        mean = r (alpha_s / alpha_t) z + (1 - r) alpha_s x_hat,   r = exp(logsnr_t - logsnr_s)
        variance = (1 - r) sigma_s^(2 - 2 gamma) sigma_t^(2 gamma)

    gamma = 0 is exact when the data are one point, gamma = 1 when they are standard normal. Trap:
    1 - r by expm1; else a step of 1e-4 nats near logsnr 0 keeps four digits.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    r = torch.exp(logsnr_t - logsnr_s)[..., None, None, None]
    one_minus_r = -torch.expm1(logsnr_t - logsnr_s)[..., None, None, None]
    mean = r * (alpha_s / alpha_t) * z + one_minus_r * alpha_s * x_hat
    return mean + one_minus_r.sqrt() * sigma_s ** (1 - gamma) * sigma_t**gamma * noise


def ddim_step(z: Tensor, x_hat: Tensor, logsnr_t: Tensor, logsnr_s: Tensor) -> Tensor:
    """Step without noise: z_s = alpha_s x_hat + sigma_s eps_hat, eps_hat from z and x_hat."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    return alpha_s * x_hat + sigma_s / sigma_t * (z - alpha_t * x_hat)


@torch.no_grad()
def sample_steps(net, seeds: list[int], y: Tensor, null: int, logsnr: Tensor, image_size: int,
                 sampler="ddpm", gamma=0.2,  # [SD]
                 guidance=1.0, interval=(-math.inf, math.inf)):
    """Yields (z, x_hat) at every step; x_hat is clipped to [-1, 1], and the last is the sample.

    net(z, logsnr, y) -> v_hat; y: (B,) labels on the device to use; null: the null class; logsnr:
    (S,) = schedule(t) at t = 1, 1 - 1/S, ..., 1/S. All noise of image i comes from seeds[i], so
    neither its batch nor the number of processes matters. Guidance, x_null + guidance
    (x_y - x_null), acts where low <= logsnr < high [GI]; outside, and at scale 1, only the
    conditional pass is paid: S (1 + f) passes for a fraction f of the steps.
    """
    generators = [torch.Generator(y.device).manual_seed(seed) for seed in seeds]

    def normal() -> Tensor:
        return torch.stack([torch.randn(3, image_size, image_size, generator=g, device=y.device)
                            for g in generators])

    guided = [guidance != 1 and interval[0] <= value < interval[1] for value in logsnr.tolist()]
    logsnr, z = logsnr.to(y.device), normal()
    for i, logsnr_t in enumerate(logsnr):
        if guided[i]:
            labels = torch.cat([y, torch.full_like(y, null)])
            v_y, v_null = net(torch.cat([z, z]), logsnr_t.expand(2 * len(y)), labels).chunk(2)
            v_hat = v_null + guidance * (v_y - v_null)  # x_hat is linear in v_hat
        else:
            v_hat = net(z, logsnr_t.expand(len(y)), y)
        x_hat = x_from_v(z, v_hat, logsnr_t).clamp(-1, 1)
        yield z, x_hat
        if i + 1 == len(logsnr):  # the last step returns x_hat
            break
        if sampler == "ddim":
            z = ddim_step(z, x_hat, logsnr_t, logsnr[i + 1])
        else:
            z = ddpm_step(z, x_hat, logsnr_t, logsnr[i + 1], gamma, normal())


def sample(*args, **kwargs) -> Tensor:
    """The sample alone, (B, 3, H, W) in [-1, 1]; arguments as sample_steps."""
    for _, x_hat in sample_steps(*args, **kwargs):
        pass
    return x_hat


# --------------------------------------------------------------------------------------------------
# 6. Averaging


@torch.no_grad()
def ema_update(average: nn.Module, net: nn.Module, n: int, decay: float):
    """average = d average + (1 - d) net after n updates; short runs forget their first weights."""
    d = min(decay, (1 + n) / (10 + n))  # a warm-up common in the field [ours]
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - d)


# --------------------------------------------------------------------------------------------------
# 7. `python sid2.py`: the table of presets

PUBLISHED = {  # GMAC and FID as later papers quote the paper's tables [SiD2*]; parameters, M [MCM]
    "imagenet64":     (108.5, 394, "-"),  # [MCM]
    "imagenet128":    (137,   397, "-"),
    "imagenet256_p2": (137,   397, "1.73"),
    "imagenet256_p1": (653,   397, "1.38"),
    "imagenet512_p4": (137,   397, "2.19"),
    "imagenet512_p2": (653,   397, "1.48 - 1.50"),
}


def count(config: Config) -> tuple[int, float]:
    """Parameters, and GMAC (1e9 multiply-accumulates) of a forward pass of one image, on meta."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net, image = UViT(config).eval(), torch.empty(1, 3, config.image_size, config.image_size)
        net(image, torch.empty(1), torch.empty(1, dtype=torch.long))
    macs = counter.get_total_flops() / 2  # a MAC is 2 flops
    return sum(p.numel() for p in net.parameters()), macs / 1e9


def main():
    print("preset             M params (published)     GMAC (published)  FID (published)  bias  "
          "noise    levels")
    for name, c in PRESETS.items():
        (parameters, gmac), (there_gmac, there, fid) = count(c), PUBLISHED.get(name, ("-",) * 3)
        sides = [c.image_size // c.patch_size >> level for level in range(len(c.channels))]
        levels = [f"{b} {n}² x {C} ({n * n})" for b, n, C in zip(c.blocks, sides, c.channels)]
        print(f"{name:15} {parameters / 1e6:11.1f} {there:>11} {gmac:10.2f} {there_gmac:>11} "
              f"{fid:>16} {c.bias:5.0f}  {c.noise_low:3}-{c.noise_high:3}", *levels, sep="  ")


if __name__ == "__main__":
    main()

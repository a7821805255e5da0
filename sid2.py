"""SiD2, Simpler Diffusion (arXiv 2410.19324): pixel-space diffusion. The method in six lines:

    logsnr = -2 log tan(u) + t shift     from t = 0, data, to t = 1, noise; shift by image size
    z    = alpha x + sigma eps       alpha² = sigmoid(logsnr), sigma² = sigmoid(-logsnr)
    v    = alpha eps - sigma x       v_hat = network(z, logsnr, y), x_hat = alpha z - sigma v_hat
    loss = E_t ½ (-dlogsnr/dt) sigmoid(bias - logsnr) |eps - eps_hat|²
    h    = high + up(h - low)        each level's only skip: adds what the level below has changed
    z_s  = r (alpha_s / alpha_t) z_t + (1 - r) alpha_s x_hat + noise,  r = exp(logsnr_t - logsnr_s)

Two calls are the recipe: `training_loss(net, config, x, y, t, eps)` and
`sample(net, config, seeds, y)`. The alphabet: x clean image (B, 3, H, W) in [-1, 1]; z noisy image;
eps noise; v what the network predicts; _hat an estimate; t > s times in [0, 1];
logsnr = log(alpha² / sigma²), in nats; y class label (B,); h features (B, H, W, C); c conditioning
vector (B, width). B counts frames: those of a clip are neighbours in the batch, and an image is a
clip of one frame.

No code of the authors was ever released. Every constant says in brackets where it comes from:
    [SiD2]    the paper's abstract and introduction, read at first hand
    [SiD2*]   the paper's appendix and tables, as other people transcribe or quote them
    [SD]      simple diffusion, arXiv 2301.11093, the predecessor by the same group
    [VDM]     Variational Diffusion Models, arXiv 2107.00630
    [VDM++]   Kingma & Gao 2023, arXiv 2303.00848, the source of the sigmoid weighting
    [MCM]     Multistep Consistency Models, arXiv 2403.06807, same group, same network
    [UL]      Unified Latents, arXiv 2602.17270, the group's next paper, read at first hand
    [DFoT]    History-guided video diffusion, arXiv 2502.06764, a similar network, read likewise
    [HD]      google/hackable_diffusion at 06f026e: code by colleagues of the authors, not by them
    [GI]      Kynkäänniemi et al. 2024, arXiv 2404.07724, guidance in a limited interval
    [derived] arithmetic from the above, shown by a test
    [ours]    in no text that we could read: our choice, with its reason

Each section needs only the imports and the sections above it: copy down to the one you want.
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
    """The recipe: network, noise process, training, sampling. Defaults are those of ImageNet."""

    # network
    image_size: int  # height = width of the images, in pixels
    patch_size: int  # the top feature map has (image_size / patch_size)² positions
    channels: tuple  # width of each level, top first; each level halves the feature map
    blocks: str  # a letter per level: R residual (convolutions), T transformer; middle last
    depth: tuple = (3, 3)  # blocks per level on the way down, and on the way up [MCM]
    middle: int = 16  # blocks of the last level, which is the middle [SiD2*]
    width: int = 1024  # of the conditioning vector [SiD2*]
    head_width: int = 128  # channels per attention head, 4 heads at 512 channels [ours]; [HD]: 64
    dropout: float = 0.1  # in transformer blocks only [SiD2*]
    num_classes: int = 1000  # 0: unconditional; the null class is label num_classes [SiD2]
    frames: int = 1  # of a clip, all generated at once; 1: images [SiD2]
    given: int = 0  # frames that a clip goes on from, and that are not generated [SiD2]
    # noise process and loss
    noise_low: int = 32  # shifts logsnr by 2 log(noise_low / image_size) at t = 1 [SiD2*]
    bias: float = 0.0  # b of the weighting sigmoid(b - logsnr), by image size [SiD2*] [VDM++] [HD]
    # training
    steps: int = 1_000_000  # of training; 800,000 in the networks of 653 GMAC [SiD2*]
    batch: int = 2048  # images, or clips, per step, over all processes [SD]
    lr: float = 1e-4  # learning rate of Adam, constant after the warm-up [SD]
    warmup: int = 10_000  # steps in which the learning rate rises from 0 to lr [SD] [HD]
    betas: tuple = (0.9, 0.99)  # Adam's two decay rates [SD] [HD]
    adam_eps: float = 1e-12  # Adam's epsilon [SD] [HD]
    clip: float = 1.0  # largest norm of the gradient, over all parameters; 0: no limit [SD] [HD]
    ema: float = 0.9999  # decay of the averaged weights [SD] [HD]
    label_dropout: float = 0.1  # share of labels replaced by the null class [SD] [HD]
    flip: bool = True  # mirror half of the images [HD]
    # sampling
    sampler: str = "ddpm"  # [SiD2*], or ddim
    sample_steps: int = 512  # of the sampler [SiD2*]
    gamma: float = 0.2  # DDPM noise variance: 0 lower bound, 1 upper, log-linear between [SD]
    guidance: float = 2.0  # scale inside the interval; 1 is no guidance [GI]
    interval: tuple = (-2.13, 2.55)  # of logsnr: noise 0.28 < sigma / alpha <= 2.90, at 64 px [GI]


# `shapes` and `moving` are for minutes on two CPU cores, `cifar10` for one GPU. The other rows are
# the paper's, and were not trained here. imagenet64 has a network of its own [MCM]. All rows from
# 128 pixels up are one network: compute grows by finer patches, not by more parameters [SiD2].
# imagenet256_p1 saw 1280 epochs, 0.8 M steps, by a table in arXiv 2510.11690 [SiD2*]. The hours of
# training that others quote give 0.8 M for imagenet512_p2 too, and 1.0 M for 137 GMAC [SiD2*].
# Noise runs from 32 to the image size [MCM] for 64 and 128 px, [SiD2*] for 512 px, by analogy
# [derived] for 256 px. The bias is [VDM++] [HD] for 64 px, [SiD2*] for the rest, and -1 at 256 px
# stands in [DFoT] too. The guidance interval of [GI] belongs to 64 x 64 latents: the ImageNet rows
# shift it by 2 log(64 / image_size), as pooling shifts logsnr [derived]. It was not tuned. Of
# Kinetics600 the paper has the claim alone [SiD2]: size, channels, 11 frames after 5 are [UL]'s,
# bias and noise those of 128 px [derived], 256 clips per step and the way in of the 5 [ours].
UVIT = (128, 256, 512, 1024), "RRTT"  # channels and blocks of all rows from 128 pixels up [SiD2*]
PRESETS = {
    "shapes": Config(16, 1, (32, 64, 128), "RRT", depth=(2, 2), middle=2, width=256, head_width=64,
                     dropout=0.0, num_classes=6, noise_low=16, bias=0.0, steps=1200, batch=64,
                     lr=2e-3, warmup=100, flip=False, sample_steps=32, guidance=4.0,
                     interval=(-6.0, 0.0)),  # [ours]
    "cifar10": Config(32, 1, (128, 256, 512), "RTT", middle=8, width=512, head_width=64,
                      num_classes=10, bias=2.0, steps=40_000, batch=256, lr=3e-4, warmup=1000,
                      ema=0.9995, sample_steps=256),  # [ours]
    "moving": Config(16, 1, (32, 64, 128), "RRT", depth=(2, 2), middle=2, width=256, head_width=64,
                     dropout=0.0, num_classes=6, frames=5, given=3, noise_low=16, bias=-2.0,
                     steps=4000, batch=8, lr=2e-3, warmup=100, flip=False, sample_steps=32,
                     guidance=2.0, interval=(-6.0, 6.0)),  # [ours]
    #                      pixels, patch, channels and blocks
    "imagenet64":     Config( 64, 1, (256, 512, 1024), "RTT", bias=2.0),
    "imagenet128":    Config(128, 1, *UVIT, bias=0.0, interval=(-3.52, 1.16)),
    "imagenet256_p2": Config(256, 2, *UVIT, bias=-1.0, interval=(-4.90, -0.23)),
    "imagenet256_p1": Config(256, 1, *UVIT, bias=-1.0, interval=(-4.90, -0.23), steps=800_000),
    "imagenet512_p4": Config(512, 4, *UVIT, bias=-3.0, interval=(-6.29, -1.61)),
    "imagenet512_p2": Config(512, 2, *UVIT, bias=-3.0, interval=(-6.29, -1.61), steps=800_000),
    "kinetics600_p2": Config(128, 2, *UVIT, bias=0.0, num_classes=0, frames=11, given=5, batch=256),
}

# --------------------------------------------------------------------------------------------------
# 2. Noise process: variance preserving, in float32 whatever the autocast state


def schedule(t: Tensor, image_size: int, noise_low: int = 32) -> tuple[Tensor, Tensor]:
    """Interpolated shifted cosine: logsnr(t) in nats and its slope dlogsnr/dt, shaped as t [SiD2*].

        logsnr(t) = -2 log tan(u) + t shift
        u = u_0 + t (u_1 - u_0),   shift = 2 log(noise_low / image_size)

    The cosine term runs from +10 to -10 ([SD] and [HD] have 15), so both ends are finite. The shift
    is that of [SD] and [HD]: averaging 2x2 pixels divides the noise variance by 4, so the end of
    128 px with noise_low 64, pooled to 64 px, is exactly as noisy as that of 64 px unshifted. At
    t = 0 there is none [SiD2*] [MCM]; at t = 1, noise_low = 32 makes any size as noisy as 32 px.

    Traps: public transcriptions of the paper print the shift with the opposite sign and half the
    size. Computed in bfloat16, logsnr is off by up to 1.3 nats.
    """
    t = t.float()
    u_0, u_1 = math.atan(math.exp(-10 / 2)), math.atan(math.exp(10 / 2))  # logsnr +10, -10 [SiD2*]
    shift = 2 * math.log(noise_low / image_size)
    u = u_0 + t * (u_1 - u_0)
    logsnr = -2 * torch.log(torch.tan(u)) + t * shift
    slope = -4 * (u_1 - u_0) / torch.sin(2 * u) + shift  # [derived]
    return logsnr, slope


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, shaped (..., 1, 1, 1) to multiply images; logsnr: (B,) or a scalar.

    Trap: sqrt(1 - alpha²) is exactly 0 in float32 from logsnr 17 up; sigmoid(-logsnr) is not.
    """
    logsnr = logsnr.float()[..., None, None, None]
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


# --------------------------------------------------------------------------------------------------
# 3. Loss


def low_discrepancy_times(batch: int, start: float) -> Tensor:
    """The times of a batch, (batch,): t_i = (start + i / batch) mod 1 [VDM].

    With start ~ U(0, 1) each time is uniform, and together they cover [0, 1) evenly: most of the
    loss's variance goes. Several processes divide the times of one whole batch among them.
    """
    return (start + torch.arange(batch) / batch) % 1


def sigmoid_loss(v_hat: Tensor, v: Tensor, logsnr: Tensor, slope: Tensor, bias: float) -> Tensor:
    """The sigmoid loss of each image, (B,): weight sigmoid(bias - logsnr) on eps [SiD2] [VDM++].

        ½ (-dlogsnr/dt) sigmoid(bias - logsnr) |eps - eps_hat|²

    The network's error is in v: eps - eps_hat = alpha (v - v_hat), hence alpha² = sigmoid(logsnr)
    in the code. The loss is a mean over pixels and channels, in nats per dimension: with 1 in place
    of sigmoid(bias - logsnr) it is the diffusion part of the variational bound. Because of
    -dlogsnr/dt its mean over t depends on the schedule through the two end points only.

    Witnesses: [UL] draws this weight; lib/training/gaussian_loss.py of [HD] has this loss, without
    the ½, as the paper's equation 4. Traps: public SiD2 losses leave out -dlogsnr/dt, or give to
    the error in v the weight of that in x, e^bias sigmoid(logsnr - bias) [SiD2*] [HD].
    """
    weight = 0.5 * -slope * torch.sigmoid(bias - logsnr) * torch.sigmoid(logsnr)
    return weight * (v_hat.float() - v).square().mean((1, 2, 3))


def training_loss(net, config: Config, x: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The loss of each image, (B,), at times t (B,) with noise eps (B, 3, H, W); backpropagate its
    mean. net(z, logsnr, y) -> v_hat may be any callable. The caller has set a share
    config.label_dropout of y to the null class, config.num_classes."""
    logsnr, slope = schedule(t, config.image_size, config.noise_low)
    alpha, sigma = alpha_sigma(logsnr)
    z = alpha * x + sigma * eps
    v = alpha * eps - sigma * x  # what the network predicts [SiD2*]
    v_hat = net(z, logsnr, y)
    return sigmoid_loss(v_hat, v, logsnr, slope, config.bias)


# --------------------------------------------------------------------------------------------------
# 4. Network: Residual U-ViT. Features lie as (B, H, W, C): channels last, and a token sequence too


def zero(layer: nn.Module) -> nn.Module:
    """Sets a layer to zero. The last one of each branch starts so: a new block is the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Norm(nn.Module):
    """Layer norm over the last dimension, with a gain and without a bias.

    The paper's kind of norm is not known; [HD] and [DFoT] have RMS. On `shapes` RMS had 0.6 % less
    held-out loss and no better samples, but trained about 13 % slower on a CPU: this one is torch's
    fused kernel [ours]. Trap: CUDA's autocast would answer in float32, hence it is off here.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, h: Tensor) -> Tensor:
        device = "cpu" if h.is_meta else h.device.type  # autocast does not know meta
        with torch.autocast(device, enabled=False):
            return F.layer_norm(h, h.shape[-1:], self.gain.to(h.dtype), eps=1e-6)  # [ours]


class Conv3x3(nn.Conv2d):
    """3x3 convolution of (B, H, W, C); the permuted view is torch's channels_last: no copy."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ResBlock(nn.Module):
    """Two convolutions; c scales and offsets the features after the second norm [SD]."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm1 = Norm(channels)
        self.conv1 = Conv3x3(channels)
        self.film = nn.Linear(width, 2 * channels)
        self.norm2 = Norm(channels)
        self.conv2 = zero(Conv3x3(channels))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        # Trap: Inductor 2.10 to 2.13 may lose gradients of these two, in MLP too (pytorch issue
        # 193061), unless TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 was set before torch was imported
        scale, offset = self.film(c)[:, None, None].chunk(2, dim=-1)  # each (B, 1, 1, C)
        branch = self.conv1(F.silu(self.norm1(h)))
        branch = self.norm2(branch) * (1 + scale) + offset
        return h + self.conv2(F.silu(branch))


class MLP(nn.Module):
    """Two dense layers; c scales and offsets the hidden layer between them [MCM]."""

    def __init__(self, channels: int, width: int, dropout: float):
        super().__init__()
        self.norm = Norm(channels)
        self.dense1 = nn.Linear(channels, 4 * channels)  # MLP ratio 4 [SiD2*]
        self.film = nn.Linear(width, 2 * 4 * channels)  # [MCM]
        self.dropout = nn.Dropout(dropout)
        self.dense2 = zero(nn.Linear(4 * channels, channels))  # [SD]

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        scale, offset = self.film(c)[:, None, None].chunk(2, dim=-1)  # each (B, 1, 1, 4 C)
        hidden = F.silu(self.dense1(self.norm(h))) * (1 + scale) + offset
        return self.dense2(self.dropout(hidden))


class Attention(nn.Module):
    """Each place of an image sees all its places; in a clip, those of all frames [DFoT]. q and k
    are normalised [SD] [HD], each head by itself: else logits grow in long training."""

    def __init__(self, channels: int, head_width: int, frames: int):
        super().__init__()
        self.head_width, self.frames = head_width, frames
        self.norm = Norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm_q, self.norm_k = Norm(head_width), Norm(head_width)
        self.project = zero(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        B, H, W, C = h.shape
        N, heads = self.frames * H * W, C // self.head_width  # N: all places of a clip
        qkv = self.qkv(self.norm(h)).reshape(-1, N, 3, heads, self.head_width)
        q, k, v = qkv.unbind(2)  # each (B / frames, N, heads, head_width)
        q = self.norm_q(q).transpose(1, 2)  # (B / frames, heads, N, head_width)
        k = self.norm_k(k).transpose(1, 2)
        v = v.transpose(1, 2)
        # In bf16 CUDA does this in one kernel, cuDNN's or FlashAttention's, which never stores the
        # N x N weights. There is no mask: no place is hidden from another, and Flash takes none.
        branch = F.scaled_dot_product_attention(q, k, v)
        return self.project(branch.transpose(1, 2).reshape(B, H, W, C))


class TransformerBlock(nn.Module):
    """MLP first, then attention [SD]."""

    def __init__(self, channels: int, width: int, head_width: int, dropout: float, frames: int):
        super().__init__()
        self.mlp = MLP(channels, width, dropout)
        self.attention = Attention(channels, head_width, frames)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = h + self.mlp(h, c)
        return h + self.attention(h)


class Down(nn.Module):
    """To the level below: 2x2 average, 1x1 projection [MCM]."""

    def __init__(self, channels: int, channels_below: int):
        super().__init__()
        self.project = nn.Linear(channels, channels_below)

    def forward(self, h: Tensor) -> Tensor:
        return self.project(F.avg_pool2d(h.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))


class Up(nn.Module):
    """From the level below: 1x1 projection, nearest x2 [MCM]. Trap: with a bias up(0) is not 0."""

    def __init__(self, channels: int, channels_below: int):
        super().__init__()
        self.project = nn.Linear(channels_below, channels, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.project(h).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


class Condition(nn.Module):
    """c from logsnr and label: sinusoids, two dense layers, plus the class embedding, swish.

    logsnr in [-20, 20] is mapped linearly to [0, 1], alike at every resolution, so that a network
    trained at one resolution can continue at another [ours]. Frequencies from 1000 to 0.1 [HD]
    tell neighbours among 512 steps apart: the fastest turns by 0.3 radians or more. In clips a
    vector for each frame says which one it is [ours].
    """

    def __init__(self, width: int, num_classes: int, frames: int = 1):
        super().__init__()
        self.frames = frames
        self.dense1 = nn.Linear(width, width)
        self.dense2 = nn.Linear(width, width)
        self.label = nn.Embedding(num_classes + 1, width)  # the last row is the null class
        if frames > 1:
            self.frame = nn.Parameter(torch.randn(frames, width))

    def forward(self, logsnr: Tensor, y: Tensor) -> Tensor:
        exponent = torch.linspace(3, -1, self.dense1.in_features // 2, device=logsnr.device)  # [HD]
        phase = (logsnr.float()[:, None] + 20) / 40 * 10**exponent  # [ours]
        c = torch.cat([phase.sin(), phase.cos()], dim=-1)
        c = self.dense2(F.silu(self.dense1(c))) + self.label(y)
        if self.frames > 1:
            c = c + self.frame.repeat(len(y) // self.frames, 1)
        return F.silu(c)


class ResidualUViT(nn.Module):
    """Residual U-ViT: z (B, 3, H, W), logsnr (B,), y (B,) int64 -> v_hat (B, 3, H, W) in float32.

    H = W = config.image_size; y = config.num_classes is the null class. There is one skip per level
    and no other [SiD2*]. UVIT's published GMAC fix how many blocks stand above the middle, 12 R and
    6 T, not their split between down and up: 3 + 3 is [MCM]'s. Patch layers are linear [ours].
    First weights [ours]: zero where `zero` says so, positions 0.01 and frames 1 wide, elsewhere
    torch's defaults, whose variance is 1 / (3 n) for n inputs. [HD]'s, with variance 1 / n, zero
    biases, and zero scales and offsets, gave 3 % more held-out loss on `shapes`, in six of six
    pairs of runs.

    A clip goes on from config.given frames: `given`, (clips, 3 config.given, H, W), is input beside
    each of its frames, and functools.partial(net, given=given) is what loss and sampler take.
    [DFoT] lets given frames stand among the others, at a noise level that says clean. In a trial of
    `moving`, to do so as well was a third slower and no better: they are channels only [ours].
    Trap: to generate all frames, and put the given ones back after each step ("replacement"),
    samples another distribution: FVD 95.5 instead of 4.8 [DFoT].
    """

    def __init__(self, config: Config):
        super().__init__()
        channels, kinds = config.channels, config.blocks
        self.patch_size, self.frames = config.patch_size, config.frames
        self.checkpointing = ()  # levels whose blocks keep their input only, to save memory
        self.first_transformer_level = kinds.find("T")  # -1: there is none

        def make_block(level: int) -> nn.Module:
            if kinds[level] == "R":
                return ResBlock(channels[level], config.width)
            return TransformerBlock(channels[level], config.width, config.head_width,
                                    config.dropout, config.frames)

        def make_blocks(level: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(make_block(level) for _ in range(count))

        above = range(len(channels) - 1)  # the levels above the middle
        depth_down, depth_up = config.depth
        self.condition = Condition(config.width, config.num_classes, config.frames)
        self.embed = nn.Linear(3 * (1 + config.given) * config.patch_size**2, channels[0])
        if self.first_transformer_level >= 0:
            side = (config.image_size // config.patch_size) >> self.first_transformer_level
            C = channels[self.first_transformer_level]
            self.position = nn.Parameter(0.01 * torch.randn(side, side, C))  # [SD]
        self.blocks_down = nn.ModuleList(make_blocks(i, depth_down) for i in above)
        self.down = nn.ModuleList(Down(channels[i], channels[i + 1]) for i in above)
        self.middle = make_blocks(-1, config.middle)
        self.up = nn.ModuleList(Up(channels[i], channels[i + 1]) for i in above)
        self.blocks_up = nn.ModuleList(make_blocks(i, depth_up) for i in above)
        self.norm = Norm(channels[0])
        self.head = zero(nn.Linear(channels[0], 3 * config.patch_size**2))

    def add_position(self, h: Tensor, level: int) -> Tensor:
        """Adds the learned positions where transformers begin: before `low` is taken, so that
        h - low stays 0 in a fresh network [ours]."""
        return h + self.position.to(h.dtype) if level == self.first_transformer_level else h

    def apply_blocks(self, level: int, blocks: nn.ModuleList, h: Tensor, c: Tensor) -> Tensor:
        for block in blocks:
            if level in self.checkpointing and self.training:
                h = checkpoint(block, h, c, use_reentrant=False)  # computes the inside again
            else:
                h = block(h, c)
        return h

    def trunk(self, h: Tensor, c: Tensor, level: int = 0) -> Tensor:
        """From `level` down to the middle and back; at initialisation the identity, bit for bit."""
        if level == len(self.down):
            return self.apply_blocks(level, self.middle, h, c)
        high = self.apply_blocks(level, self.blocks_down[level], h, c)
        low = self.add_position(self.down[level](high), level + 1)
        h = self.trunk(low, c, level + 1)
        h = high + self.up[level](h - low)
        return self.apply_blocks(level, self.blocks_up[level], h, c)

    def forward(self, z: Tensor, logsnr: Tensor, y: Tensor, given: Tensor | None = None) -> Tensor:
        c = self.condition(logsnr, y)
        if given is not None:
            given = given.repeat_interleave(self.frames, dim=0)
            copies = len(z) // len(given)  # two at guided steps
            z = torch.cat([z, given.repeat(copies, 1, 1, 1)], dim=1)
        h = self.embed(F.pixel_unshuffle(z, self.patch_size).permute(0, 2, 3, 1))
        h = self.trunk(self.add_position(h, 0), c)
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
    without expm1, rounding changes 1 - r by up to 0.03 % at a step of 1e-4 nats.
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


def sampling_grid(config: Config) -> tuple[Tensor, list[bool]]:
    """logsnr (S,) at the times 1, 1 - 1/S, ..., 1/S of the S steps [SD]; and which of them are
    guided: where interval[0] <= logsnr < interval[1] [GI]; none without classes or at scale 1."""
    t = torch.arange(config.sample_steps, 0, -1) / config.sample_steps
    logsnr, _ = schedule(t, config.image_size, config.noise_low)
    low, high = config.interval
    can_guide = config.num_classes > 0 and config.guidance != 1
    return logsnr, [can_guide and low <= value < high for value in logsnr.tolist()]


@torch.no_grad()
def trajectory(net, config: Config, seeds: list[int], y: Tensor):
    """Yields (z, x_hat) at S steps; x_hat is clipped to [-1, 1] [SD]; the last is the sample.

    net(z, logsnr, y) -> v_hat must be in eval mode, else dropout acts; y: (B,) labels on the device
    to use. All noise of image i, or of clip i, comes from seeds[i]: neither its batch nor the
    number of processes matters. Guidance is x_null + guidance (x_y - x_null). Steps without it skip
    the pass of the null class: S (1 + f) passes in all, if the fraction f of the steps is guided.
    """
    if config.sampler not in ("ddpm", "ddim"):
        raise ValueError(f"sampler must be ddpm or ddim, got {config.sampler}")
    generators = [torch.Generator(y.device).manual_seed(seed) for seed in seeds]
    shape = (config.frames, 3, config.image_size, config.image_size)  # of an image or a clip

    def normal() -> Tensor:
        return torch.cat([torch.randn(shape, generator=g, device=y.device) for g in generators])

    logsnr, guided = sampling_grid(config)
    logsnr = logsnr.to(y.device)
    z = normal()
    for i, logsnr_t in enumerate(logsnr):
        if guided[i]:
            labels = torch.cat([y, torch.full_like(y, config.num_classes)])
            v_y, v_null = net(torch.cat([z, z]), logsnr_t.expand(2 * len(y)), labels).chunk(2)
            v_hat = v_null + config.guidance * (v_y - v_null)  # x_hat is linear in v_hat
        else:
            v_hat = net(z, logsnr_t.expand(len(y)), y)
        alpha, sigma = alpha_sigma(logsnr_t)
        x_hat = (alpha * z - sigma * v_hat).clamp(-1, 1)
        yield z, x_hat
        if i + 1 == len(logsnr):  # the last step returns x_hat
            break
        if config.sampler == "ddim":
            z = ddim_step(z, x_hat, logsnr_t, logsnr[i + 1])
        else:
            z = ddpm_step(z, x_hat, logsnr_t, logsnr[i + 1], config.gamma, normal())


def sample(net, config: Config, seeds: list[int], y: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1]: the last x_hat of `trajectory`, which says the rest."""
    for _, x_hat in trajectory(net, config, seeds, y):
        pass
    return x_hat


# --------------------------------------------------------------------------------------------------
# 6. Averaging


@torch.no_grad()
def ema_update(average: nn.Module, net: nn.Module, updates: int, decay: float):
    """average = decay average + (1 - decay) net, for all parameters; this network has no buffers.
    updates: how many were done before; the decay grows from 0.1 on, so that short runs forget their
    first weights. torch._foreach_lerp_, which is private, is Tensor.lerp_ for all in one call."""
    decay = min(decay, (1 + updates) / (10 + updates))  # a warm-up common in the field [ours]
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)


# --------------------------------------------------------------------------------------------------
# 7. `python sid2.py`: the table of presets

PUBLISHED = {  # GMAC, M parameters [MCM], FID: the paper's, as later papers quote them [SiD2*]
    "imagenet64":     (108.5, 394, "-"),  # [MCM]
    "imagenet128":    (137,   397, "-"),
    "imagenet256_p2": (137,   397, "1.73"),
    "imagenet256_p1": (653,   397, "1.38"),
    "imagenet512_p4": (137,   397, "2.19"),
    "imagenet512_p2": (653,   397, "1.48 - 1.50"),
}


def count(config: Config) -> tuple[int, float]:
    """Parameters, and GMAC (1e9 multiply-accumulates) of a forward pass of one image or clip."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = ResidualUViT(config).eval()
        B = config.frames
        z = torch.empty(B, 3, config.image_size, config.image_size)
        given = torch.empty(1, 3 * config.given, config.image_size, config.image_size)
        net(z, torch.empty(B), torch.empty(B, dtype=torch.long), given)
    multiply_accumulates = counter.get_total_flops() / 2  # each is 2 floating-point operations
    return sum(p.numel() for p in net.parameters()), multiply_accumulates / 1e9


def main():
    print("preset             M params (published)     GMAC (published)  FID (published)  bias  "
          "noise    levels")
    for name, config in PRESETS.items():
        parameters, gmac = count(config)
        published_gmac, published_parameters, published_fid = PUBLISHED.get(name, ("-", "-", "-"))
        top = config.image_size // config.patch_size
        levels = [f"{kind} {top >> level}² x {channels} ({(top >> level) ** 2})"
                  for level, (kind, channels) in enumerate(zip(config.blocks, config.channels))]
        print(f"{name:15} {parameters / 1e6:11.1f} {published_parameters:>11} {gmac:10.2f} "
              f"{published_gmac:>11} {published_fid:>16} {config.bias:5.0f}  {config.noise_low:3}-"
              f"{config.image_size:3}", *levels, sep="  ")


if __name__ == "__main__":
    main()

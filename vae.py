"""A causal video VAE with a high compression ratio: clips of pixels in, a small grid of latents out.

The idea (paper, high-compression video VAE). Full 3D attention costs O((t·h·w)^2), so the cheapest way to make a
video transformer fast is to give it fewer tokens. The paper compares ratios from 4x16x16 to 8x64x64
(time x height x width) and settles on 8x32x32; `--ratio` takes any of them, and 4x8x8 for the tiny preset.

    pixels   [b, 3, 1 + k*rt, h, w]     in [-1, 1]; the ratio is rt x rs x rs, and k any whole number
       |  4x4 pixels become channels; then one stage for each halving that is still to do, in space, in time or in both
    latents  [b, c, 1 + k, h/rs, w/rs]  mean and log-variance of a diagonal Gaussian
       |  the mirror image
    pixels   [b, 3, 1 + k*rt, h, w]

Causal means that no latent frame sees a later pixel frame: every convolution pads time in front only. So the
first frame is encoded alone, a picture is a video of one frame, and lengths are 1 + a multiple of rt.
The sources state the ratios and the PSNR they reach; the layers, the widths and the losses below are our reading.

    python vae.py                           # trains on the built-in `shapes`  -> runs/tiny/vae.pt, latents.pt
    python vae.py --data my_clips --run runs/mine      # name.mp4 beside name.txt (and, if you like, name.npy)

Reading order: the data, the model, the loss and the loop, and last the kit that the other five scripts share.
"""
import argparse
import atexit
import collections
import concurrent.futures
import contextlib
import fcntl
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint_sequential
from tqdm import tqdm

PRESETS = {
    "tiny": dict(size="9x32x32", ratio="4x8x8", latent_channels=12, width=48, res_blocks=1,
                 clips=6144, steps=1400, batch_size=8, lr=0.02, kl=1e-3, optimizer="muon", ema=0.99),
    "toy": dict(size="17x128x128", ratio="8x32x32", latent_channels=128, width=128, res_blocks=2,
                clips=16384, steps=12000, batch_size=16, lr=0.02, kl=1e-4, optimizer="muon", ema=0.999),
    "mobile": dict(size="49x384x512", ratio="8x32x32", latent_channels=128, width=128, res_blocks=3,
                   clips=65536, steps=200000, batch_size=8, lr=1e-4, kl=1e-5, optimizer="adamw", ema=0.9995),
}
PRESETS["server"] = dict(PRESETS["mobile"], size="121x576x1024")

# ---------------------------------------------------------------------------------------------- the data: shapes

COLORS = {"red": (.9, .1, .1), "green": (.1, .9, .1), "blue": (.1, .1, .9),
          "yellow": (.9, .9, .1), "magenta": (.9, .1, .9), "cyan": (.1, .9, .9)}
SHAPES = ("circle", "square", "triangle", "bar")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TEST_CLIPS = 512


def shape_coverage(x, y, radius):
    """How much of each pixel every shape covers, anti-aliased: [..., shapes] in [0, 1].

    x, y: distance to the shape's centre in pixels; radius in pixels. From signed distances, a pixel wide."""
    ax, ay, r = x.abs(), y.abs(), radius
    circle = torch.hypot(x, y) - r
    square = torch.maximum(ax, ay) - 0.87 * r
    triangle = torch.maximum(y - 0.6 * r, 0.866 * ax - 0.5 * y - 0.6 * r)
    bar = torch.maximum(ax - 1.1 * r, ay - 0.45 * r)
    return (0.5 - torch.stack([circle, square, triangle, bar], -1)).clamp(0, 1)


class Shapes:
    """Rendered clips of one moving shape; the caption names colour, shape and direction, and nothing else.

    Clip i is a fixed function of (seed, clips, i). One combination in eight is held out of training, chosen so that
    every pair (colour, shape), (shape, direction), (colour, direction) is still seen: scoring shows composition."""

    def __init__(self, frames, height, width, clips, seed):
        self.size = frames, height, width
        grid = torch.cartesian_prod(*(torch.arange(len(n)) for n in (COLORS, SHAPES, DIRECTIONS)))
        is_held_out = (grid[:, 0] + 2 * grid[:, 1] + 3 * grid[:, 2]) % 8 == 0
        # Two independent streams, so that asking for more training clips leaves the test clips as they are.
        g, g_test = (torch.Generator().manual_seed(2 * seed + s) for s in (0, 1))
        seen = grid[~is_held_out]
        train, test = seen[torch.randint(len(seen), (clips,), generator=g)], grid[torch.arange(TEST_CLIPS) % len(grid)]
        self.combos = torch.cat([train, test])
        self.random = torch.cat([torch.rand(clips, 5, generator=g), torch.rand(TEST_CLIPS, 5, generator=g_test)])
        self.train, self.test = range(clips), range(clips, clips + TEST_CLIPS)
        self.held_out_captions = sorted(self.caption(c) for c in grid[is_held_out])
        self.captions = [self.caption(c) for c in self.combos]
        self.embeddings = None

    @staticmethod
    def caption(combo):
        color, shape, direction = combo.tolist()
        return f"a {list(COLORS)[color]} {SHAPES[shape]} moving {list(DIRECTIONS)[direction]}"

    def clip(self, indices):
        """Renders clips: [b, 3, t, h, w] in [-1, 1]."""
        (t, h, w), combos, u = self.size, self.combos[indices], self.random[indices][:, :, None, None, None]
        small = min(h, w)
        radius = small * (0.18 + 0.06 * u[:, 0])
        heading = torch.tensor(list(DIRECTIONS.values()))[combos[:, 2]].float()
        path = small * (0.25 + 0.15 * u[:, 1]) * torch.linspace(-0.5, 0.5, t)[:, None, None]  # speed, in pixels a clip

        def centre(u, extent, along):  # a random place such that the whole path lies inside the picture
            along = along[:, None, None, None]
            room = extent - 2.2 * radius - (path.amax(1, keepdim=True) * 2) * along.abs()
            return extent / 2 + (u - 0.5) * room + path * along

        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        cover = shape_coverage(x - centre(u[:, 2], w, heading[:, 0]), y - centre(u[:, 3], h, heading[:, 1]), radius)
        cover = cover.gather(-1, combos[:, 1, None, None, None, None].expand(*cover.shape[:-1], 1))
        ground = (0.1 + 0.4 * u[:, 4])[..., None]  # grey: the colour of a pixel alone tells shape from background
        color = torch.tensor(list(COLORS.values()))[combos[:, 0]][:, None, None, None]
        return rearrange(cover * color + (1 - cover) * ground, "b t h w c -> b c t h w") * 2 - 1


# ------------------------------------------------------------------------------------- the data: a folder of clips


class Folder:
    """Windows of real clips: whatever FFmpeg decodes, `name.mp4` with its caption in `name.txt`, centre-cropped and
    resized. A tenth from the middle of each clip (one window at least; the end of a short one) is never trained on.
    `name.npy`, [tokens, dim], is an optional embedding of the caption by an encoder of your own. Unusable files are
    named and skipped."""

    def __init__(self, folder, frames, height, width, clips, stride):
        self.size, self.stride, self.videos = (frames, height, width), stride, []
        pixels = tempfile.TemporaryFile()  # on disk and mapped, so that memory does not grow with the folder
        span = (frames - 1) * stride + 1
        windows, names, embeddings = {"train": [], "test": []}, [], {}
        paths = sorted(p for p in Path(folder).iterdir() if p.suffix not in (".txt", ".npy", ".md"))
        for path in progress(paths, "reading clips"):
            try:
                text, embedding = path.with_suffix(".txt"), path.with_suffix(".npy")
                if not (path.is_file() and text.is_file()):  # a pipe would keep us waiting
                    raise ValueError(f"a clip is a file with its caption beside it in {text.name}")
                caption = text.read_text(encoding="utf-8-sig").split()
                if not 0 < (n := len(re.findall(r"\w+", " ".join(caption)))) <= 512:
                    raise ValueError(f"a caption of {n} words: it takes 1 to 512")
                video = np.stack([self.fit(f, height, width) for f in iio.imiter(path, plugin="pyav", format="rgb24")])
                if len(video) < 2 * span:
                    raise ValueError(f"{len(video)} frames: two windows of {span} are the least")
                if embedding.exists():  # mapped, since a header may claim more than the memory holds
                    array = np.lib.format.open_memmap(embedding, "r").astype(np.float32)
                    if not np.isfinite(array).all():
                        raise ValueError(f"{embedding.name} holds numbers that are not finite")
                    embeddings[" ".join(caption)] = torch.from_numpy(array)
            except Exception as error:  # PyAV raises dozens of kinds; a clip that cannot be used is skipped by name
                why = "" if isinstance(error, ValueError) else "no video that FFmpeg can read: "
                print(f"skipped {path.name}: {why}{first_line(error.__cause__ or error)}", file=sys.stderr)
                continue
            held = max(span, len(video) // 10)
            first = (len(video) - held) // 2 if len(video) >= 3 * span else len(video) - held  # of the held-out frames
            for s in range(len(video) - span + 1):  # windows that hold both kinds of frames are left out
                if s + span <= first or s >= first + held:
                    windows["train"].append((len(self.videos), s))
                elif s >= first and s + span <= first + held:
                    windows["test"].append((len(self.videos), s))
            np.save(pixels, video)
            pixels.flush()
            self.videos.append(torch.from_numpy(np.memmap(pixels, np.uint8, "r+", pixels.tell() - video.nbytes,
                                                          video.shape)))
            names.append(" ".join(caption))
        if skipped := len(paths) - len(self.videos):
            print(f"{skipped} of {len(paths)} files skipped", file=sys.stderr)
        if not self.videos:
            fail(f"no usable clip in {folder}: it needs videos with a caption each, such as frog.mp4 and frog.txt")
        shapes = {tuple(e.shape) for e in embeddings.values()}
        fits = len(shapes) == 1 and len(min(shapes)) == 2 and 0 not in min(shapes) and set(embeddings) == set(names)
        if embeddings and not fits:
            fail("the .npy embeddings must all have one shape [tokens, dim], and every clip needs one: of "
                 f"{len(set(names))} captions {len(embeddings)} have one, of shapes {sorted(shapes)[:5]}")
        for split, most in ("train", clips), ("test", TEST_CLIPS):  # evenly thinned to what was asked for
            keep = np.linspace(0, len(windows[split]) - 1, min(most, len(windows[split]))).round().astype(int)
            windows[split] = [windows[split][i] for i in keep]
        self.windows = windows["train"] + windows["test"]
        print(f"{folder}: {len(self.videos)} clip(s), {len(windows['train'])} windows of {frames} frames to train on, "
              f"{len(windows['test'])} to test")
        self.train = range(len(windows["train"]))
        self.test = range(len(windows["train"]), len(self.windows))
        self.captions = [names[v] for v, _ in self.windows]
        self.held_out_captions, self.embeddings = [], embeddings or None

    @staticmethod
    def fit(frame, height, width):
        """[h, w, 3] uint8 -> [3, height, width] uint8: resized to cover, then centre-cropped."""
        if frame.shape[0] * frame.shape[1] > 2 ** 26:
            raise ValueError(f"frames of {frame.shape[1]}x{frame.shape[0]} pixels: 67 million are the most")
        x = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
        scale = max(height / x.shape[2], width / x.shape[3])
        size = max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale))
        x = F.interpolate(x, size, mode="bilinear", antialias=True)[0]
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        return x[:, top:top + height, left:left + width].round().byte().numpy()

    def clip(self, indices):
        t, s = self.size[0], self.stride
        picked = [self.videos[v][start:start + (t - 1) * s + 1:s] for v, start in (self.windows[i] for i in indices)]
        return rearrange(torch.stack(picked), "b t c h w -> b c t h w").float() / 127.5 - 1


def open_data(data, size, clips, stride, seed):
    return Shapes(*size, clips, seed) if data == "shapes" else Folder(data, *size, clips, stride)


def listing(data):
    """A number that changes with the captions in a folder and the sizes of what they belong to; 0 for `shapes`."""
    if data == "shapes":
        return 0
    if not Path(data).is_dir():
        fail(f"--data {data} is neither `shapes` nor a folder")
    crc = 0
    for path in sorted(Path(data).iterdir()):
        with contextlib.suppress(OSError):  # what cannot be read is skipped by name later
            if path.is_file() and path.with_suffix(".txt").exists():
                text = path.read_bytes() if path.suffix == ".txt" else b""
                crc = zlib.crc32(f"{path.name} {path.stat().st_size} ".encode() + text, crc)
    return crc


# -------------------------------------------------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    """RMSNorm over one dimension (paper: RMSNorm throughout, for memory on the phone). Written out, since
    torch.rms_norm has no Core ML counterpart. Statistics of one position only, so it cannot leak the future."""

    def __init__(self, dim, axis=-1, affine=True):
        super().__init__()
        self.axis, self.float16_safe = axis, False
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x):
        if self.float16_safe:  # for the phone: above 256 a square leaves float16's range, so scale first
            x = x / x.abs().amax(self.axis, keepdim=True).clamp(min=1e-3)
        x = x * torch.rsqrt(x.square().mean(self.axis, keepdim=True) + 1e-6).to(x.dtype)
        if self.weight is None:
            return x
        weight = self.weight.to(x.dtype)  # under autocast, or all that follows would be float32
        return x * (weight if self.axis == -1 else weight.view(-1, *[1] * (x.ndim - 2)))


class CausalConv3d(nn.Conv3d):
    """A convolution whose output frame t sees input frames <= t * stride: the first frame is repeated in front
    instead of padding at both ends. kernel: (time, height, width), odd."""

    def __init__(self, c_in, c_out, kernel=(3, 3, 3), stride=(1, 1, 1)):
        super().__init__(c_in, c_out, kernel, stride=stride, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x):
        return super().forward(torch.cat([x[:, :, :1]] * (self.kernel_size[0] - 1) + [x], dim=2))


class ResBlock(nn.Module):
    """A 3x3 convolution over the picture, then one over three frames: a fifth of the cost of two full ones."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = RMSNorm(channels, 1), CausalConv3d(channels, channels, (1, 3, 3))
        self.norm2, self.conv2 = RMSNorm(channels, 1), CausalConv3d(channels, channels, (3, 1, 1))

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def match_channels(x, channels):
    """Averages groups of channels, or repeats them all, until there are as many as asked for."""
    if x.shape[1] > channels:
        return reduce(x, "b (group c) t h w -> b c t h w", "mean", c=channels)
    return torch.cat([x] * (channels // x.shape[1]), dim=1)


class Downsample(nn.Module):
    """Space (and time) to channels, beside a strided convolution. The shortcut has no weights, so the untrained
    autoencoder already passes a blurred clip through; at these ratios training hardly starts without it
    (the residual autoencoding of DC-AE, arXiv 2410.10733)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.stride, self.c_out, self.conv = stride, c_out, CausalConv3d(c_in, c_out, stride=stride)

    def forward(self, x):
        pt, ph, pw = self.stride
        shortcut = torch.cat([x[:, :, :1]] * (pt - 1) + [x], dim=2)
        shortcut = rearrange(shortcut, "b c (t pt) (h ph) (w pw) -> b (pt ph pw c) t h w", pt=pt, ph=ph, pw=pw)
        return self.conv(x) + match_channels(shortcut, self.c_out)


class Upsample(nn.Module):
    """Channels to space (and time). The first frame stands for itself alone, so the copies that would come before
    it are dropped: k frames become 1 + (k - 1) * stride."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.stride, self.conv = stride, CausalConv3d(c_in, c_out * math.prod(stride), (1, 1, 1))

    def forward(self, x):
        pt, ph, pw = self.stride
        x = self.conv(x) + match_channels(x, self.conv.out_channels)
        x = rearrange(x, "b (pt ph pw c) t h w -> b c (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw)
        return x[:, :, pt - 1:]


class VAE(nn.Module):
    """ratio: (time, height, width) compression, powers of two; width: channels of the first stage;
    blocks: residual blocks a stage."""

    def __init__(self, ratio=(4, 8, 8), latent_channels=16, width=64, blocks=1):
        super().__init__()
        rt, rs, rw = ratio
        if rs != rw or rt not in (1, 2, 4, 8) or rs not in (8, 16, 32, 64):
            raise ValueError(f"ratio {rt}x{rs}x{rw}: time is 1, 2, 4 or 8, height = width is 8, 16, 32 or 64")
        self.config = dict(ratio=ratio, latent_channels=latent_channels, width=width, blocks=blocks)
        self.recompute = False  # activations, in the backward pass: less memory for more time
        self.ratio, self.patch = ratio, 4  # the first two halvings are free: pixels into channels
        space, time = int(math.log2(rs // self.patch)), int(math.log2(rt))
        stages = max(space, time)
        halves = [(i >= stages - time, i >= stages - space) for i in range(stages)]  # the last ones, of time and space
        strides = [(1 + t, 1 + s, 1 + s) for t, s in halves]
        c = [width * min(2 ** i, 4) for i in range(stages + 1)]
        if c[-1] % (2 * latent_channels):
            raise ValueError(f"{latent_channels} latent channels: twice that must divide the last stage's {c[-1]}")
        pixels = 3 * self.patch ** 2

        down, up = [CausalConv3d(pixels, c[0], (1, 3, 3))], [Upsample(latent_channels, c[-1], (1, 1, 1))]
        for i in range(stages):
            down += [ResBlock(c[i]) for _ in range(blocks)] + [Downsample(c[i], c[i + 1], strides[i])]
        down += [ResBlock(c[-1]) for _ in range(blocks)] + [Downsample(c[-1], 2 * latent_channels, (1, 1, 1))]
        for i in reversed(range(stages)):
            up += [ResBlock(c[i + 1]) for _ in range(blocks)] + [Upsample(c[i + 1], c[i], strides[i])]
        up += [ResBlock(c[0]) for _ in range(blocks)]
        up += [RMSNorm(c[0], 1), nn.SiLU(), CausalConv3d(c[0], pixels, (1, 3, 3))]
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)
        # At log-variance 0 unit noise drowns an untrained mean: start the posterior narrow.
        nn.init.constant_(self.encoder[-1].conv.bias[latent_channels:], -6.0)

    def encode(self, x):
        """[b, 3, 1 + k*rt, h, w] -> mean and logvar, each [b, c, 1 + k, h/rs, w/rs]."""
        p = self.patch
        x = rearrange(x, "b c t (h ph) (w pw) -> b (c ph pw) t h w", ph=p, pw=p)
        mean, logvar = self.through(self.encoder, x).chunk(2, dim=1)
        return mean, logvar.clamp(-20, 10)

    def through(self, layers, x):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint_sequential(layers, len(layers), x, use_reentrant=False)
        return layers(x)

    def decode(self, z):
        """[b, c, 1 + k, h/rs, w/rs] -> [b, 3, 1 + k*rt, h, w]."""
        p = self.patch
        return rearrange(self.through(self.decoder, z), "b (c ph pw) t h w -> b c t (h ph) (w pw)", ph=p, pw=p)


def vae_loss(vae, x, noise, kl_weight):
    """Reconstruction and KL divergence to N(0, 1), both means over elements; noise has the latents' shape."""
    mean, logvar = vae.encode(x)
    recon = vae.decode(mean + noise * (0.5 * logvar).exp()).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
    mse = F.mse_loss(recon, x)
    return mse + kl_weight * kl, mse


@torch.no_grad()
def psnr(vae, clips, precision):
    """Mean over clips of the peak signal-to-noise ratio in dB; clips: an iterable of [b, 3, t, h, w] in [-1, 1]."""
    values = []
    for x in clips:
        with precision():
            recon = vae.decode(vae.encode(x)[0]).float().clamp(-1, 1)
        values.append(10 * torch.log10(4 / (recon - x).square().mean((1, 2, 3, 4))))
    return torch.cat(values).mean().item()


def load_vae(path, device):
    checkpoint = load(path, "vae")
    with reading(path):
        vae = VAE(**checkpoint["config"])
        vae.load_state_dict(checkpoint["model"])
    return vae.to(device).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------- the training


def main(argv=None):
    p = parser(__doc__, PRESETS)
    p.add_argument("--data", default="shapes", help="`shapes`, or a folder of name.mp4 + name.txt (default: shapes)")
    p.add_argument("--size", type=dims, metavar="TxHxW", help="frames x height x width of a clip, in pixels")
    p.add_argument("--ratio", type=dims, metavar="TxHxW",
                   help="compression, time x height x width: 4x16x16, 8x32x32, 8x64x64, ...")
    p.add_argument("--stride", type=positive, default=2, help="take every n-th frame of a real clip (default: 2)")
    p.add_argument("--clips", type=positive, help="rendered clips, or windows of real ones, to train on")
    p.add_argument("--latent-channels", type=positive, help="channels of a latent")
    p.add_argument("--width", type=positive, help="channels of the first stage")
    p.add_argument("--res-blocks", type=positive, help="residual blocks a stage")
    p.add_argument("--kl", type=between(0), help="weight of the KL divergence")
    p.add_argument("--out", type=Path, help="the trained autoencoder")
    p.add_argument("--latents", type=Path, help="the data set's latents")
    training_flags(p)
    args = parse(p, PRESETS, argv, out="vae.pt", latents="latents.pt")
    check_size(args.size, args.ratio)
    args.data = str(Path(args.data))  # a name that ends in / is the same folder
    settings = {k: getattr(args, k) for k in ("data", "size", "ratio", "stride", "clips", "latent_channels", "width",
                                              "res_blocks", "kl", "steps", "batch_size", "lr", "optimizer", "ema",
                                              "seed")}
    settings["folder"] = listing(args.data)
    then = command("dit.py", args.run, args.preset)
    device, precision = set_up(args)
    stop_if_done([args.out, args.latents], settings, then)

    data = open_data(args.data, args.size, args.clips, args.stride, args.seed)

    torch.manual_seed(args.seed)
    try:
        vae = VAE(args.ratio, args.latent_channels, args.width, args.res_blocks)
    except ValueError as error:
        fail(str(error))
    vae.to(device)
    vae.recompute = args.recompute
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = Optimizer(vae, args, args.steps, precision)
    loss_fn = torch.compile(vae_loss) if args.compile else vae_loss

    (t, h, w), (rt, rs, _) = args.size, args.ratio
    z_shape = args.latent_channels, 1 + (t - 1) // rt, h // rs, w // rs
    loop = Loop("vae", args, settings, args.steps, device, model=vae, ema=ema, optimizer=optimizer,
                draw=lambda g: (data.clip(g.randint(len(data.train)).tolist()), g.randn(*z_shape)))
    shown = [data.test[i * (len(data.test) - 1) // 3] for i in range(4)]
    for step, (x, noise) in loop:
        with precision():
            loss, mse = loss_fn(vae, x, noise, args.kl)
        optimizer.step(loss)
        ema.update_parameters(vae)
        loop.log(loss=loss.item(), psnr_db=-10 * mse.div(4).log10().item())
        if args.sample_every and (step + 1) % args.sample_every == 0:  # clips, and below them what is left of them
            x = data.clip(shown).to(device)
            with torch.no_grad(), precision():
                recon = ema.module.decode(ema.module.encode(x)[0]).float().clamp(-1, 1)
            show_clips(args, "vae", step + 1, x, recon)

    vae = ema.module.eval()
    metrics = dict(psnr_db=psnr(vae, (data.clip([i]).to(device) for i in progress(data.test, "testing")), precision),
                   params=count(vae), compression=list(args.ratio), latent_channels=args.latent_channels)
    save(args.out, stage="vae", config=vae.config, model=vae.state_dict(), metrics=metrics, settings=settings,
         history=loop.history)

    # The data set, once, as latents: no later stage touches pixels. They go to disk batch by batch, and are read from
    # there, so that neither here nor later does memory grow with their number.
    everything, b = [*data.train, *data.test], args.batch_size
    total = torch.zeros(2, z_shape[0], dtype=torch.float64)  # of the training latents and of their squares

    def encode(file):
        for i in progress(range(0, len(everything), b * WORLD), "encoding"):
            mine = [everything[j % len(everything)] for j in range(i + b * RANK, i + b * (RANK + 1))]
            with torch.no_grad(), precision():
                z = gathered(vae.encode(data.clip(mine).to(device))[0].half()).cpu()[:len(everything) - i]
            file.write(z.numpy().tobytes())
            z = z[:max(0, len(data.train) - i)].double()
            total.add_(torch.stack([z.sum((0, 2, 3, 4)), z.square().sum((0, 2, 3, 4))]))

    part = args.latents.with_name(args.latents.name + ".part")
    if FIRST:
        write_aside(part, encode)
        shape = len(everything), *z_shape
        latents = torch.from_file(str(part), size=math.prod(shape), dtype=torch.float16).view(shape)
        mean, square = total / (len(data.train) * math.prod(z_shape[1:]))
        std = (square - mean.square()).clamp(min=1e-8).sqrt()
        save(args.latents, stage="latents", config=dict(size=args.size, ratio=args.ratio, data=args.data),
             settings=settings, metrics=metrics, latents=latents, fingerprint=fingerprint([latents]),
             mean=mean.float(), std=std.float(), train_clips=len(data.train), captions=data.captions,
             held_out_captions=data.held_out_captions, embeddings=data.embeddings)
        part.unlink()
    else:
        encode(open(os.devnull, "wb"))
    finish(args, "vae", metrics, then, loop)


# --------------------------------------------------------------------------------------------------------- the kit
# What every script needs and none is about: the command line, files that are never half-written, exact resuming.


# torchrun starts this script WORLD times and tells each process its RANK; alone it is the first of one.
RANK, WORLD = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
FIRST = RANK == 0  # the one process that writes, and talks


def script(main):
    """Runs a script's main. What the person or the machine can cause anywhere ends in a sentence, not in a traceback:
    Ctrl-C outside a Loop, a file system that says no, too little memory."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped: no file is half-written, and the same command begins again or goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, OSError) and FIRST:
            fail(str(error))
        if not (out_of_memory(error) and FIRST):  # what other processes say is not heard, but a traceback is
            raise
        fail(f"too little memory ({first_line(error)}): take a smaller --batch-size, --size or --preset")


def out_of_memory(error):
    return isinstance(error, MemoryError) or "tried to allocate" in str(error).lower()


def fail(message):
    """One line for the person at the keyboard, whatever a file's name holds; exit status 2."""
    if FIRST:
        print("error: " + "".join(c if c.isprintable() else "?" for c in message)[:1000], file=sys.stderr)
    sys.exit(2)


def quiet():
    """What tqdm's `disable` wants: no bar but from the first process, and only on a terminal."""
    return None if FIRST else True


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see python {self.prog} --help)")


def dims(text):
    """'9x32x32' -> (9, 32, 32)."""
    try:
        t, h, w = (int(n) for n in text.split("x"))
        assert 0 < min(t, h, w) <= max(t, h, w) < 2 ** 16
    except (ValueError, AssertionError):
        raise argparse.ArgumentTypeError(f"{text} is not time x height x width, such as 9x32x32") from None
    return t, h, w


def between(low, high=2 ** 31, kind=float):
    """An argparse type: a number in [low, high]; not a number is in no range."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return kind(text)
    number.metavar = "N" if kind is int else "X"
    return number


positive = between(1, kind=int)


def parser(doc, presets, computes=True):
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--preset", choices=list(presets), default="tiny",
                   help="tiny: a laptop's CPU; toy: one GPU; mobile, server: the paper's sizes; "
                        "one preset for all stages of a run (default: tiny)")
    p.add_argument("--run", type=Path, metavar="DIR",
                   help="folder that files are read from and written to (default: runs/PRESET)")
    p.add_argument("--seed", type=between(0, kind=int), default=0, help="all randomness follows from it (default: 0)")
    if not computes:
        return p
    p.add_argument("--device", default="auto",
                   help="cpu, cuda, cuda:1, mps, ... (default: auto, cuda where there is one, else cpu)")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                   help="of the arithmetic; weights stay float32 (default: auto, bfloat16 where it is faster)")
    return p


def training_flags(p, steps="optimiser steps"):
    p.add_argument("--steps", type=positive, help=steps)
    p.add_argument("--batch-size", type=positive, help="clips a step")
    p.add_argument("--lr", type=between(1e-12), help="peak learning rate; adamw wants about a twentieth of muon's")
    p.add_argument("--optimizer", choices=["muon", "adamw"], help="adamw is the paper's; muon is faster at this scale")
    p.add_argument("--ema", type=between(0, 1), help="decay of the running average of the weights, which is saved")
    p.add_argument("--compile", action="store_true", help="torch.compile the step: slow to start, then faster")
    p.add_argument("--recompute", action="store_true",
                   help="activation checkpointing: a fraction of the memory for about a third more time")
    p.add_argument("--save-every", type=between(0), default=60, help="seconds between saves of the run (default: 60)")
    p.add_argument("--sample-every", type=positive, help="steps between pictures of what the model makes by then, "
                   "RUN/samples/STAGE-STEP.gif (default: none)")


def parse(p, presets, argv, **files):
    """Fills what was not given: from the preset, and file names from --run."""
    for action in p._actions:  # the presets' values stand in --help too
        if action.dest in presets["tiny"]:
            action.help += f" (default: {', '.join(f'{presets[k][action.dest]} {k}' for k in presets)})"
        action.metavar = action.metavar or getattr(action.type, "metavar", {Path: "FILE", int: "N"}.get(action.type))
        if action.dest in files and "default" not in action.help:
            action.help += f" (default: RUN/{files[action.dest]})"
    args = p.parse_args(argv)
    args.run = args.run or Path("runs") / args.preset
    for name, value in presets[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, dims(value) if name in ("size", "ratio") else value)
    for name, file in files.items():
        if getattr(args, name, None) is None:
            setattr(args, name, args.run / file)
    return args


def check_size(size, ratio):
    """A clip must be 1 + a multiple of the ratio's frames, and multiples of it in height and width."""
    (t, h, w), (rt, rs, _) = size, ratio
    if (t - 1) % rt:
        near = 1 + max(1, round((t - 1) / rt)) * rt
        fail(f"{t} frames do not fit the ratio {rt}x{rs}x{rs}: use 1 + a multiple of {rt}, such as {near}")
    for name, n in ("height", h), ("width", w):
        if n % rs:
            fail(f"{name} {n} does not fit the ratio {rt}x{rs}x{rs}: use a multiple of {rs}, such as "
                 f"{max(1, round(n / rs)) * rs}")


def set_up(args):
    """-> the device, and a function that returns the autocast context of --dtype."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the device `meta` has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        fail(f"--device {name} cannot be used here: {first_line(error)}")
    if WORLD > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if not FIRST:
            sys.stdout = open(os.devnull, "w")
    fast = device.type == "cuda" or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    use_bf16 = args.dtype == "bfloat16" or args.dtype == "auto" and fast
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)


def count(module):
    return sum(p.numel() for p in module.parameters())


def share(batch):
    """Which clips of a batch of so many are this process's."""
    return range(RANK, batch, WORLD)


def average(tensors, batch):
    """In place, the mean over all clips of a batch of what each process has computed as the mean over its share."""
    if WORLD > 1:
        for work in [dist.all_reduce(x.mul_(len(share(batch)) / batch), async_op=True) for x in tensors]:
            work.wait()


def gathered(x):
    """The x of all processes, one after the other."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class Draws:
    """The random numbers of one step, a row for each clip of this process's share of the batch. Each clip has a
    generator of its own, so its numbers are the same whichever of however many processes draws them."""

    def __init__(self, key, batch):
        self.generators = [torch.Generator().manual_seed(zlib.crc32(f"{key} {i}".encode())) for i in share(batch)]

    def randn(self, *shape):
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def rand(self):
        return torch.stack([torch.rand((), generator=g) for g in self.generators])

    def randint(self, n):
        return torch.stack([torch.randint(n, (), generator=g) for g in self.generators])


class Optimizer:
    """AdamW as the paper states (`--optimizer adamw`), or Muon for the weight matrices of linear and convolution
    layers with AdamW for all else, which gets further in the few steps of a laptop. A step clips the gradient, updates,
    and moves the learning rate: up in 30 steps (at most a tenth), then down to zero along a cosine. precision: of
    Muon's matrix products, as `set_up` returns it."""

    def __init__(self, model, args, steps, precision=contextlib.nullcontext, lr=None):
        lr, matrices = lr or args.lr, {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv3d))}
        matrices = matrices if args.optimizer == "muon" else set()
        trained, self.batch = [p for p in model.parameters() if p.requires_grad], args.batch_size
        muon, rest = ([p for p in trained if (id(p) in matrices) == yes] for yes in (True, False))
        self.parameters, self.parts, self.precision = trained, [], precision
        if muon:
            self.parts.append(Muon(muon, lr))
        self.parts.append(torch.optim.AdamW(rest, lr / 20 if muon else lr, betas=(0.9, 0.99), fused=True))
        warmup = max(1, min(30, steps // 10))
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(
            part, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, s / steps))))
            for part in self.parts]

    def step(self, loss, also=()):
        """One update from the mean loss of this process's share of the batch. also: parameters of another optimiser,
        whose gradients are wanted too; nobody else's are computed."""
        parameters = [*self.parameters, *also]
        for p in parameters:
            p.grad = None
        loss.backward(inputs=parameters)
        average([p.grad for p in parameters if p.grad is not None], self.batch)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        with self.precision():  # Muon's products
            for part in self.parts + self.schedules:
                part.step()

    def state_dict(self):
        return {"parts": [p.state_dict() for p in self.parts], "schedules": [s.state_dict() for s in self.schedules]}

    def load_state_dict(self, state):
        for name in ("parts", "schedules"):
            for part, saved in zip(getattr(self, name), state[name]):
                part.load_state_dict(saved)


class Muon(torch.optim.Optimizer):
    """Momentum, its matrix made orthogonal by five Newton-Schulz iterations (Keller Jordan, 2024). Not torch's own
    Muon: that one takes no convolutions, and its bfloat16 products are 30 times slower on a CPU without bfloat16."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates = {}  # by shape: one batched product is faster than many small ones
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                updates.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, group["momentum"]).flatten(1)))
            for shape, pairs in updates.items():
                x = torch.stack([update for _, update in pairs])
                tall = x.shape[1] > x.shape[2]
                x = x.mT if tall else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315) @ x
                rate = group["lr"] * max(1, shape[0] / shape[1:].numel()) ** 0.5
                for (p, _), update in zip(pairs, x.mT if tall else x):
                    p.add_(update.reshape(shape), alpha=-rate)


def write_aside(path, write):
    """Whatever happens, `path` is either the old file or the whole new one: write aside, flush, rename."""
    if not FIRST:
        return
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError):  # torch's own words for a full disk hide the system's
            error = error.__context__ or error
        fail(f"cannot write {path}: {first_line(error)}; what was there before is untouched")
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def save(path, **checkpoint):
    """A flat dict of tensors and plain values; `torch.load(path, weights_only=True)` reads it back."""
    write_aside(Path(path), lambda f: torch.save(checkpoint, f))


COMMANDS = {"vae": "vae.py", "latents": "vae.py", "dit": "dit.py", "masks": "prune.py", "pruned": "prune.py",
            "student": "distill.py", "discriminator": "distill.py"}


def command(script, run, preset="tiny", *more):
    """What to type next, with the flags that lead it to this run."""
    flags = ["--preset", preset] * (preset != "tiny") + ["--run", str(run)] * (Path(run) != Path("runs") / preset)
    return shlex.join(["python", script, *flags, *more])


def maker(path, stage):
    """The commands that make a file which is not there, from the first stage that its folder lacks."""
    folder, last = Path(path).parent, COMMANDS.get(Path(path).stem, COMMANDS[stage])
    before = itertools.takewhile(lambda name: COMMANDS[name] != last, ("latents", "dit", "pruned"))
    scripts = [COMMANDS[name] for name in before if not (folder / f"{name}.pt").exists()] + [last]
    preset = folder.name if folder.name in PRESETS else "tiny"
    return " && ".join(command(script, folder, preset) for script in scripts)


def progress(items, what):
    """A bar with speed and time left on a terminal; elsewhere a line at the end, if it took more than two seconds."""
    start = time.monotonic()
    bar = tqdm(items, desc=what, disable=quiet(), dynamic_ncols=True, leave=False, delay=1)
    on_terminal = not bar.disable
    yield from bar
    if FIRST and not on_terminal and time.monotonic() - start > 2:
        print(f"{what}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def gif(frames, fps):
    """[t, h, w, 3] uint8 -> the bytes of an animated gif. One palette for all frames, spread over the colours that
    occur: the usual choice, by how many pixels have a colour, turns a small cyan triangle green."""
    thinned = frames[:, ::3, ::3]
    palette = Image.fromarray(thinned.reshape(-1, *thinned.shape[2:])).quantize(256, Image.Quantize.MAXCOVERAGE, 3)
    frames = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)
    return file.getvalue()


def show_clips(args, stage, step, *rows):
    """--sample-every: rows of clips, each [b, 3, t, h, w] in [-1, 1], as one picture RUN/samples/STAGE-STEP.gif."""
    frames = rearrange((torch.stack(rows) + 1) * 127.5, "row b c t h w -> t (row h) (b w) c")
    frames = frames.round().byte().cpu().numpy()
    k = max(1, 96 // rows[0].shape[-1])  # tiny clips are enlarged
    data = gif(frames.repeat(k, 1).repeat(k, 2), 8)
    write_aside(args.run / "samples" / f"{stage}-{step:06}.gif", lambda f: f.write(data))


@contextlib.contextmanager
def reading(path):
    """A damaged file raises nearly anything; here that becomes one line and exit status 2."""
    try:
        yield
    except OSError as error:
        fail(f"cannot read {path}: {error}")
    except Exception as error:
        if out_of_memory(error):
            raise
        fail(f"{path} is damaged, or not of this program ({type(error).__name__}): put back a copy, or delete it and "
             "make it again")


class Checkpoint(dict):
    def __missing__(self, key):
        fail(f"{self.path} has no {key}: it is of another program or another version, make it again")


def load(path, *stages):
    """Reads a checkpoint of one of these stages, never running code from it; otherwise one line and exit status 2.
    Checks every byte first, at about 5 GB/s: torch compares no checksums, and would take flipped bits for weights."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path} is a folder" if path.is_dir() else
             f"{path} is not there: `{maker(path, stages[0])}` makes it")
    with reading(path), zipfile.ZipFile(path) as archive:
        if sum(file.file_size for file in archive.infolist()) > path.stat().st_size or archive.testzip():
            raise ValueError("a checksum is wrong, or something is compressed: torch.save does not")
        checkpoint = Checkpoint(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        checkpoint.path = path
        stage = checkpoint["stage"]
    if stage not in stages:
        fail(f"{path} holds a {stage} checkpoint where {' or '.join(stages)} is needed")
    return checkpoint


def stop_if_done(paths, settings, then):
    """Leaves if all of `paths` were made with these settings, refuses if one was with others: nothing is overwritten
    unasked. Refuses as well if another run is at work on them."""
    for folder in {path.resolve().parent for path in paths}:
        lock(folder)
    there = {path: load(path, *COMMANDS) for path in paths if path.exists()}
    for path, old in there.items():
        check_settings(path, old["settings"], settings, there)
    # If the resume file is still there, `finish` was cut short: its last thing is to delete that.
    if len(there) == len(paths) and not resume_path(paths[0], COMMANDS[there[paths[0]]["stage"]][:-3]).exists():
        print(f"{paths[0]} is done; next: {then}")
        sys.exit(0)


LOCKS = {}


def lock(folder):
    """Refuses a second process that trains in a folder. The lock is on the folder itself: it leaves no file, and dies
    with the process. Of the processes of one torchrun the first takes it for all."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder in LOCKS or os.environ.get("RANK", "0") != "0":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        LOCKS[folder] = handle
    except BlockingIOError:
        fail(f"another run is at work in {folder}: let it end, or take another --run")
    except OSError as error:  # some network file systems
        print(f"warning: {folder} cannot be locked ({error}): start no second run in it", file=sys.stderr)


def fingerprint(tensors):
    """A number that tells these tensors from others, so that a stage notices when what it was made from has changed."""
    crc = 0
    for x in tensors:
        crc = zlib.crc32(x.detach().cpu().contiguous().numpy(), crc)
    return crc


def check_settings(path, old, new, files=()):
    """Refuses what was made with other settings; files: all that would have to be made anew."""
    differ, files = [key for key in new if old.get(key) != new[key]], " and ".join(map(str, files or [path]))
    if said := [key for key in differ if key not in ("latents", "teacher", "pruned", "folder")]:
        differences = "; ".join(f"{key} = {old.get(key)}, not {new[key]}" for key in said)
        fail(f"{path} was made with {differences}: ask for the same, delete {files}, or copy what it is made from into "
             "another --run")
    if differ:  # fingerprints say nothing to a reader
        source = "other clips than are" if differ[0] == "folder" else f"another {differ[0]} file than is"
        fail(f"{path} was made from {source} there now: delete {files} to make it again")


def resume_path(out, stage):
    return out.with_suffix(f".{stage}.resume")


class Loop:
    """The steps that a training run still has to do, each with its batch: draw(Draws) -> tensors, on `device`. What is
    drawn follows from (stage, seed, step) alone, so a resumed run repeats an unbroken one bit by bit. Saves every
    --save-every seconds and when told to stop (Ctrl-C, SIGTERM); `state` is everything with a state_dict that the run
    changes."""

    def __init__(self, stage, args, settings, steps, device, draw, **state):
        self.stage, self.args, self.settings, self.steps, self.state = stage, args, settings, steps, state
        self.device, self.draw = device, draw
        self.path, self.saved = resume_path(args.out, stage), None
        self.step, self.seconds, self.history, self.told, self.stop = 0, 0.0, {}, 0, 0
        if WORLD > args.batch_size:
            fail(f"--batch-size {args.batch_size} is too small for {WORLD} processes: a clip each is the least")
        if self.path.exists():
            saved = load(self.path, "resume")
            check_settings(self.path, saved["settings"], settings)
            with reading(self.path):
                for name, part in state.items():
                    part.load_state_dict(saved[name])
                self.step, self.seconds = saved["step"], saved["seconds"]
                # interned like the names in the code: pickle writes equal strings once only if they are one object
                self.history = {sys.intern(k): v for k, v in saved["history"].items()}
            self.saved = self.step
            print(f"{self.path}: going on from step {self.step}")

    def save(self):
        modules = (part for part in self.state.values() if isinstance(part, nn.Module))
        if not all(p.isfinite().all() for module in modules for p in module.parameters()):
            self.diverged("a weight is not finite")
        self.saved = self.step
        save(self.path, stage="resume", settings=self.settings, step=self.step, seconds=self.seconds,
             history=self.history, **{name: part.state_dict() for name, part in self.state.items()})

    def __iter__(self):
        old = {s: signal.signal(s, lambda s, _: setattr(self, "told", s)) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield from self.remaining()
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def batches(self):
        """A GPU's batches are drawn by threads, four steps ahead, so that it need not wait for disks and decoders."""
        def make(step):
            return self.draw(Draws(f"{self.stage} {self.args.seed} {step}", self.args.batch_size))
        steps = range(self.step, self.steps)
        if self.device.type != "cuda":
            yield from map(make, steps)
            return
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            ahead = collections.deque(threads.submit(make, step) for step in steps[:4])
            for step in steps:
                ahead.append(threads.submit(make, step + 4) if step + 4 < self.steps else None)
                yield [x.pin_memory() for x in ahead.popleft().result()]

    def remaining(self):
        saved = printed = start = time.monotonic()
        bar = tqdm(total=self.steps, initial=self.step, desc=self.stage, disable=quiet(), dynamic_ncols=True)
        for batch in self.batches():
            yield self.step, [x.to(self.device, non_blocking=True) for x in batch]
            self.step += 1
            now = time.monotonic()
            self.seconds, start = self.seconds + now - start, now
            last = ", ".join(f"{k} {v[-1]:.4g}" for k, v in self.history.items())
            bar.set_postfix_str(last, refresh=False)
            bar.update()
            if bar.disable and (now - printed > 20 or self.step == self.steps):
                printed = now
                print(f"{self.stage} {self.step}/{self.steps}: {last}, {self.seconds:.0f} s", flush=True)
            if self.stop or now - saved > self.args.save_every:
                saved = now
                self.save()
            if self.stop:
                if FIRST:
                    print(f"\nstopped at step {self.step} of {self.steps}, saved in {self.path}: "
                          "the same command goes on from here", file=sys.stderr)
                sys.exit(128 + self.stop)
        bar.close()
        self.save()  # what follows a loop may be interrupted too

    def log(self, **values):
        """Notes this step's values, averaged over all processes, which also agree here whether to stop."""
        packed = torch.tensor([*map(float, values.values())], dtype=torch.float64, device=self.device)
        told = torch.tensor(self.told, device=self.device)
        average([packed], self.args.batch_size)
        if WORLD > 1:
            dist.all_reduce(told, dist.ReduceOp.MAX)
        self.stop = told.item()
        for name, value in zip(values, packed.tolist()):
            if not math.isfinite(value):
                self.diverged(f"{name} is {value}")
            self.history.setdefault(name, []).append(value)

    def diverged(self, what):
        """A save of an earlier step is good: the loss there was finite. One of this very step is what went wrong."""
        if self.saved == self.step:
            self.path.unlink(missing_ok=True)
            self.saved = None
        last = f"the last good save is {self.path}, of step {self.saved}" if self.saved else "no earlier save is left"
        fail(f"{what} at step {self.step}: {last}; try a smaller --lr in another --run")


def finish(args, stage, metrics, then, *loops):
    """After the results are saved: the metrics file with the seconds, which no checkpoint holds, so that the same seed
    gives the same files; a sentence; and the resume files go, the last loop's last."""
    metrics = {**metrics, "seconds": sum(loop.seconds for loop in loops)}
    record(args.run, stage, metrics)
    for loop in loops if FIRST else ():
        loop.path.unlink(missing_ok=True)
    told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
    print(f"{args.out}: {told}; next: {then}")


def read_metrics(run):
    path = Path(run) / "metrics.json"
    with reading(path):
        return dict(json.loads(path.read_text())) if path.exists() else {}


def record(run, stage, metrics):
    """Sets one stage's object in metrics.json and leaves the others."""
    everything = {**read_metrics(run), stage: metrics}
    write_aside(Path(run) / "metrics.json", lambda f: f.write(json.dumps(everything, indent=2).encode() + b"\n"))


if __name__ == "__main__":
    script(main)

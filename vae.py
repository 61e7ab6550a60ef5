"""A causal video VAE with a high compression ratio: clips in, a small grid of latents out.

The idea (paper, high-compression VAE). Full 3D attention costs O((t·h·w)^2), so the cheapest way
to make a video transformer fast is to give it fewer tokens. Stated: ratios from 4x16x16 to 8x64x64
(time x height x width) were built and compared, and 8x32x32 chosen. `--ratio` takes any of them,
and 4x8x8 for the tiny preset. Our reading: all layers, widths and losses.

    pixels   [b, 3, 1 + k*rt, h, w]     in [-1, 1]; the ratio is rt x rs x rs, k any whole number
       |  2x2 or 4x4 pixels become channels; then stages that halve space, time or both
    latents  [b, c, 1 + k, h/rs, w/rs]  mean and log-variance of a diagonal Gaussian
       |  the mirror image
    pixels   [b, 3, 1 + k*rt, h, w]

Causal means that no latent frame sees a later pixel frame: every convolution pads time in front
only. So the first frame is encoded alone, a picture is a video of one frame, and lengths are
1 + a multiple of rt. And latents of any length can be decoded as they come: `VAE.stream`.

    python vae.py                                   # built-in `shapes` -> vae.pt, latents.pt
    python vae.py --data my_clips --run runs/mine   # a folder of clips with captions

Reading order: the model, the loss, the data (rendered clips, then filmed ones), the training.
"""
import csv
import json
import math
import os
import re
import shutil
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint_sequential

from common import (FIRST, SHARE, Loop, Optimizer, add_file, add_training_flags, average_gradients,
                    average_weights, check_settings, checksum, count_parameters, fail, finish, load,
                    make_parser, number, positive, progress, reading, run_script, save, say, set_up,
                    settings_of, size, step_generator, stop_if_done, wait_for_all, warmup_cosine)

PRESETS = {
    "tiny": dict(
        size="9x32x32",      # frames x height x width: the smallest clip in which motion shows
        ratio="4x8x8",       # 3 x 4 x 4 latent positions per clip: 48 tokens
        latent_channels=16,  # 768 numbers per clip, of 27,648 pixel values
        width=32,            # channels of the first stage, doubled in each of the next two
        patch=2,             # 2x2 pixels into channels; 4x4 rounds the corners of small shapes
        res_blocks=1,        # per stage
        clips=6144,          # rendered ones, or at most so many windows of filmed ones
        steps=1200,
        batch_size=12,
        lr=0.01,             # Muon's: each update is orthogonal, whatever the gradient's size
        kl=0.04,             # dB: it keeps the scale of the latents in bounds, no more
        optimizer="muon",
        ema=0.99),           # the average of about the last 100 steps
    "toy": dict(size="17x128x128", ratio="8x32x32", latent_channels=128, width=128, patch=4,
                res_blocks=2, clips=16384, steps=12000, batch_size=16, lr=0.01, kl=0.004,
                optimizer="muon", ema=0.999),
    "mobile": dict(size="49x384x512", ratio="8x32x32", latent_channels=128, width=128, patch=4,
                   res_blocks=3, clips=65536, steps=200000, batch_size=8, lr=1e-4, kl=4e-4,
                   optimizer="adamw", ema=0.9995),
}
PRESETS["server"] = PRESETS["mobile"] | dict(size="121x576x1024")

# ------------------------------------------------------------ the model


class RMSNorm(nn.Module):
    """RMSNorm over one axis (https://arxiv.org/abs/1910.07467). Stated: throughout, for memory on
    the phone. Written out, since torch.rms_norm has no Core ML counterpart. One position at a time,
    so it leaks no future."""

    def __init__(self, dim, axis=-1, affine=True):
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x):
        rms_inverse = torch.rsqrt(x.square().mean(self.axis, keepdim=True) + 1e-6)
        x = x * rms_inverse.to(x.dtype)
        if self.weight is None:
            return x
        weight = self.weight.to(x.dtype)  # under autocast, or all that follows would be float32
        if self.axis == 1:
            weight = weight[:, None, None, None]  # for x [b, c, t, h, w]
        return x * weight


class CausalConv3d(nn.Conv3d):
    """A convolution of [b, c, t, h, w] whose output frame t sees input frames <= t * stride: the
    first frame is repeated in front instead of padding at both ends. kernel: (time, height, width),
    odd. A clip may come in pieces: see `VAE.decode_next`."""

    def __init__(self, c_in, c_out, kernel=(3, 3, 3), stride=(1, 1, 1)):
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(c_in, c_out, kernel, stride=stride, padding=padding)

    def forward(self, x, caches=None, is_first=True):
        k = self.kernel_size[0]
        if k > 1:
            frames_before = [x[:, :, :1]] * (k - 1) if is_first else [caches.pop(0)]
            x = torch.cat([*frames_before, x], dim=2)
        if caches is not None:
            caches.append(x[:, :, 1 - k:].clone())  # a view would keep all of x alive
        return super().forward(x)


class ResBlock(nn.Module):
    """[b, c, t, h, w] -> the same: a 3x3 convolution over the picture, then one over three frames,
    with 12 weights per pair of channels where two full convolutions have 54."""

    def __init__(self, channels):
        super().__init__()
        self.norm1 = RMSNorm(channels, axis=1)
        self.conv1 = CausalConv3d(channels, channels, (1, 3, 3))
        self.norm2 = RMSNorm(channels, axis=1)
        self.conv2 = CausalConv3d(channels, channels, (3, 1, 1))

    def forward(self, x, caches=None, is_first=True):
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = F.silu(self.norm2(hidden))
        return x + self.conv2(hidden, caches, is_first)


def match_channels(x, channels):
    """[b, c, t, h, w]: averages groups of channels, or repeats them all, until there are `channels`
    of them. One number must divide the other."""
    if x.shape[1] > channels:
        groups = x.split(channels, dim=1)
        return sum(groups) / len(groups)
    return torch.cat([x] * (channels // x.shape[1]), dim=1)


class Downsample(nn.Module):
    """[b, c, t, h, w]: space (and time) to channels, beside a strided convolution. The shortcut has
    no weights, so the untrained autoencoder already passes a blurred clip through; at these ratios
    training hardly starts without it (residual autoencoding of DC-AE,
    https://arxiv.org/abs/2410.10733). Stride (1, 1, 1) only changes the channels."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv = CausalConv3d(c_in, c_out, stride=stride)

    def forward(self, x):
        st, sh, sw = self.conv.stride
        padded = torch.cat([x[:, :, :1]] * (st - 1) + [x], dim=2)  # causal, as in the convolution
        shortcut = rearrange(padded, "b c (t st) (h sh) (w sw) -> b (st sh sw c) t h w",
                             st=st, sh=sh, sw=sw)
        return self.conv(x) + match_channels(shortcut, self.conv.out_channels)


class Upsample(nn.Module):
    """[b, c, t, h, w]: channels to space (and time). The first latent frame stands for one frame:
    the stride - 1 copies before it are dropped, and k frames become 1 + (k - 1) * stride."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.stride = stride
        self.conv = CausalConv3d(c_in, c_out * math.prod(stride), (1, 1, 1))

    def forward(self, x, is_first=True):
        st, sh, sw = self.stride
        x = self.conv(x) + match_channels(x, self.conv.out_channels)
        x = rearrange(x, "b (st sh sw c) t h w -> b c (t st) (h sh) (w sw)", st=st, sh=sh, sw=sw)
        return x[:, :, st - 1:] if is_first else x


class VAE(nn.Module):
    """ratio: (time, height, width) compression, powers of two; width: channels of the first stage;
    res_blocks: residual blocks per stage; patch: pixels of height and width that become channels,
    2 or 4. Raises ValueError for a ratio, or a number of latent channels, that cannot be built."""

    def __init__(self, ratio, latent_channels, width, res_blocks, patch):
        super().__init__()
        rt, rs, rw = ratio
        if rs != rw or rt not in (1, 2, 4, 8) or rs not in (8, 16, 32, 64):
            raise ValueError(f"ratio {rt}x{rs}x{rw}: time is 1, 2, 4 or 8, height = width is 8, "
                             "16, 32 or 64")
        self.config = dict(ratio=ratio, latent_channels=latent_channels, width=width,
                           res_blocks=res_blocks, patch=patch)
        self.patch = patch
        self.gradient_checkpointing = False
        # Of the training clips' latents, once there are any: the DiT sees them normalised.
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_channels, 1, 1, 1))

        # A stage halves space, time or both; where one needs fewer halvings, its come last.
        halvings_t = int(math.log2(rt))
        halvings_s = int(math.log2(rs // patch))
        stages = max(halvings_t, halvings_s)
        strides = []
        for i in range(stages):
            stride_t = 2 if i >= stages - halvings_t else 1
            stride_s = 2 if i >= stages - halvings_s else 1
            strides.append((stride_t, stride_s, stride_s))
        channels = [width * min(2 ** i, 4) for i in range(stages + 1)]
        if channels[-1] % (2 * latent_channels):
            raise ValueError(f"{latent_channels} latent channels: twice that must divide the last "
                             f"stage's {channels[-1]}")
        patch_channels = 3 * patch ** 2

        layers = [CausalConv3d(patch_channels, channels[0], (1, 3, 3))]
        for i in range(stages):
            layers += [ResBlock(channels[i]) for _ in range(res_blocks)]
            layers += [Downsample(channels[i], channels[i + 1], strides[i])]
        layers += [ResBlock(channels[-1]) for _ in range(res_blocks)]
        layers += [Downsample(channels[-1], 2 * latent_channels, (1, 1, 1))]
        self.encoder = nn.Sequential(*layers)

        layers = [Upsample(latent_channels, channels[-1], (1, 1, 1))]
        for i in reversed(range(stages)):
            layers += [ResBlock(channels[i + 1]) for _ in range(res_blocks)]
            layers += [Upsample(channels[i + 1], channels[i], strides[i])]
        layers += [ResBlock(channels[0]) for _ in range(res_blocks)]
        layers += [RMSNorm(channels[0], axis=1), nn.SiLU()]
        layers += [CausalConv3d(channels[0], patch_channels, (1, 3, 3))]
        self.decoder = nn.Sequential(*layers)

        # At log-variance 0 unit noise drowns an untrained mean: start the posterior narrow.
        nn.init.constant_(self.encoder[-1].conv.bias[latent_channels:], -6.0)

    def run_layers(self, layers, x):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint_sequential(layers, len(layers), x, use_reentrant=False)
        return layers(x)

    def encode(self, x):
        """[b, 3, 1 + k*rt, h, w] -> mean and logvar, each [b, c, 1 + k, h/rs, w/rs]."""
        p = self.patch
        x = rearrange(x, "b c t (h ph) (w pw) -> b (c ph pw) t h w", ph=p, pw=p)
        mean, logvar = self.run_layers(self.encoder, x).chunk(2, dim=1)
        return mean, logvar.clamp(-20, 10)

    def decode(self, z):
        """[b, c, 1 + k, h/rs, w/rs] -> [b, 3, 1 + k*rt, h, w]."""
        return self.to_pixels(self.run_layers(self.decoder, z))

    def to_pixels(self, x):
        p = self.patch
        return rearrange(x, "b (c ph pw) t h w -> b c t (h ph) (w pw)", ph=p, pw=p)

    def decode_next(self, x, caches):
        """One latent frame [b, c, 1, h/rs, w/rs] -> its frames: one if it is the first, then rt.

        caches: a list, empty before the first, and changed here: the last k - 1 input frames of
        every convolution over time. It is a queue: each takes its own from the front, and puts the
        new ones at the end. Nothing else in the decoder looks back."""
        is_first = not caches
        for layer in self.decoder:
            if isinstance(layer, ResBlock):
                x = layer(x, caches, is_first)
            elif isinstance(layer, Upsample):
                x = layer(x, is_first)
            else:
                x = layer(x)
        return self.to_pixels(x)

    @torch.no_grad()
    def stream(self, z):
        """As `decode`, but yields the frames of one latent frame after the other: memory does not
        grow with the length of z."""
        caches = []
        for latent in z.split(1, dim=2):
            yield self.decode_next(latent, caches)


def latent_size(clip_size, ratio):
    """-> frames, height and width of a clip's latents. A clip is 1 + a multiple of the ratio's
    frames, and a multiple of it in height and width; others are refused."""
    t, h, w = clip_size
    rt, rs, _ = ratio
    if (t - 1) % rt or h % rs or w % rs:
        fail(f"{t}x{h}x{w} does not fit the ratio {rt}x{rs}x{rs}: use 1 + a multiple of {rt} "
             f"frames, such as {t + (1 - t) % rt}, and multiples of {rs} pixels, such as "
             f"{h + -h % rs}x{w + -w % rs}")
    return 1 + (t - 1) // rt, h // rs, w // rs


def vae_loss(vae, x, noise, kl_weight):
    """-> kl_weight * KL divergence to N(0, 1) (https://arxiv.org/abs/1312.6114) per element - PSNR
    in dB per clip; and the PSNR alone. noise: standard normal, in the latents' shape. Our reading:
    the logarithm of the squared error, so that clips whose error is small still have much to
    win."""
    mean, logvar = vae.encode(x)
    reconstruction = vae.decode(mean + noise * (0.5 * logvar).exp()).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
    mse = (reconstruction - x).square().mean((1, 2, 3, 4))
    psnr_db = 10 * torch.log10(4 / (mse + 1e-5)).mean()  # a flat clip cannot count beyond 56 dB
    return kl_weight * kl - psnr_db, psnr_db


@torch.no_grad()
def psnr(vae, clips, precision):
    """Peak signal-to-noise ratio in dB, mean over clips; clips: an iterable of [b, 3, t, h, w] in
    [-1, 1]."""
    values = []
    for x in clips:
        with precision():
            mean, _ = vae.encode(x)
            reconstruction = vae.decode(mean).float().clamp(-1, 1)
        mse = (reconstruction - x).square().mean((1, 2, 3, 4))
        values.append(10 * torch.log10(4 / mse))  # 4: the square of the range of values
    return torch.cat(values).mean().item()


def load_vae(path, device, vae_checksum):
    """-> the autoencoder, in eval mode. Refuses another one than made the latents."""
    checkpoint = load(path, "vae")
    with reading(path):
        vae = VAE(**checkpoint["config"])
        vae.load_state_dict(checkpoint["model"])
    if checksum(vae.parameters()) != vae_checksum:
        fail(f"{path} is of another run: not the autoencoder that made the latents")
    return vae.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------ the data: shapes

COLORS = {"red": (.9, .1, .1), "green": (.1, .9, .1), "blue": (.1, .1, .9),
          "yellow": (.9, .9, .1), "magenta": (.9, .1, .9), "cyan": (.1, .9, .9)}
SHAPES = ("circle", "square", "triangle", "bar")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TEST_CLIPS = 512


def shape_coverage(x, y, radius):
    """Coverage of each pixel by every shape, anti-aliased: [..., shapes] in [0, 1]. x, y: distance
    to the shape's centre, and radius, in pixels."""
    ax = x.abs()
    ay = y.abs()
    circle = torch.hypot(x, y) - radius
    square = torch.maximum(ax, ay) - 0.87 * radius
    triangle = torch.maximum(y - 0.6 * radius, 0.866 * ax - 0.5 * y - 0.6 * radius)
    bar = torch.maximum(ax - 1.1 * radius, ay - 0.45 * radius)
    return (0.5 - torch.stack([circle, square, triangle, bar], dim=-1)).clamp(0, 1)


class Shapes:
    """Rendered clips of one moving shape; the caption names colour, shape and direction, and
    nothing else. Clip i is a fixed function of (seed, clips, i).

    One combination in eight is held out of training, chosen so that every pair (colour, shape),
    (shape, direction), (colour, direction) is still seen: scores on these show composition. Test
    clips show every combination, those too."""

    embeddings = None

    def __init__(self, frames, height, width, clips, seed):
        self.size = frames, height, width
        combinations = torch.cartesian_prod(  # [96, (colour, shape, direction)]
            *(torch.arange(len(names)) for names in (COLORS, SHAPES, DIRECTIONS)))
        color, shape, direction = combinations.T
        is_held_out = (color + 2 * shape + 3 * direction) % 8 == 0
        seen = combinations[~is_held_out]
        # Two streams, so that asking for more training clips leaves the test clips as they are.
        train_generator = torch.Generator().manual_seed(2 * seed)
        test_generator = torch.Generator().manual_seed(2 * seed + 1)
        train = seen[torch.randint(len(seen), (clips,), generator=train_generator)]
        test = combinations[torch.arange(TEST_CLIPS) % len(combinations)]
        self.combinations = torch.cat([train, test])
        self.uniform = torch.cat([torch.rand(clips, 5, generator=train_generator),
                                  torch.rand(TEST_CLIPS, 5, generator=test_generator)])
        self.train = range(clips)
        self.pictures = range(clips, clips)
        self.test = range(clips, clips + TEST_CLIPS)
        self.captions = [self.caption(c) for c in self.combinations]
        self.held_out_captions = sorted(self.caption(c) for c in combinations[is_held_out])

    @staticmethod
    def caption(combination):
        color, shape, direction = combination.tolist()
        return f"a {list(COLORS)[color]} {SHAPES[shape]} moving {list(DIRECTIONS)[direction]}"

    def clip(self, indices):
        """Renders clips: [b, 3, t, h, w] in [-1, 1]."""
        t, h, w = self.size
        color, shape, direction = self.combinations[indices].T
        for_radius, for_speed, for_x, for_y, for_ground = rearrange(
            self.uniform[indices], "b five -> five b 1 1 1")
        small = min(h, w)
        radius = small * (0.18 + 0.06 * for_radius)
        speed = small * (0.25 + 0.15 * for_speed)  # pixels per clip
        travel = speed * torch.linspace(-0.5, 0.5, t)[:, None, None]  # [b, t, 1, 1]
        heading = torch.tensor(list(DIRECTIONS.values()))[direction].float()

        def centre(position, extent, along):
            """position in [0, 1] -> pixels, such that the whole path lies inside the picture."""
            along = along[:, None, None, None]
            room = extent - 2.2 * radius - speed * along.abs()
            return extent / 2 + (position - 0.5) * room + travel * along

        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        x = x - centre(for_x, w, heading[:, 0])  # [b, t, h, w], from the subject's centre
        y = y - centre(for_y, h, heading[:, 1])
        coverage = shape_coverage(x, y, radius)  # [b, t, h, w, shapes]
        coverage = coverage[torch.arange(len(shape)), ..., shape][..., None]  # [b, t, h, w, 1]
        ground = (0.1 + 0.4 * for_ground)[..., None]  # grey: only the subject has a colour
        rgb = torch.tensor(list(COLORS.values()))[color][:, None, None, None]
        pixels = coverage * rgb + (1 - coverage) * ground
        return rearrange(pixels, "b t h w c -> b c t h w") * 2 - 1


# ------------------------------------------------------------ the data: a folder

# A clip folder may come from anywhere: no playlist in it may open other files, or the network.
CONTAINERS = {"protocol_whitelist": "file",
              "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # a video of one frame each
BESIDE = (".txt", ".npy", ".md", ".csv", ".json", ".jsonl")  # what lies beside clips


def files_below(folder):
    """All files of a folder and its folders, in order, but for hidden ones."""
    paths = sorted(Path(folder).rglob("*"))
    return [path for path in paths if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def read_table(table):
    """metadata.csv or metadata.jsonl -> [(path, caption)]"""
    with reading(table), open(table, encoding="utf-8-sig", newline="") as file:
        if table.suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            rows = [dict(json.loads(line)) for line in file]
    if not rows or not all({"file_name", "text"} <= row.keys() for row in rows):
        fail(f"{table} needs the columns file_name and text")
    return [(table.parent / str(row["file_name"]), row["text"]) for row in rows]


def find_clips(folder):
    """-> the layout; {path: caption, or the file that holds it}; and a line for each clip without a
    caption, and the other way round. The layout is that of the Hub, metadata.csv or metadata.jsonl;
    or name.txt beside each clip; or class folders, whose names are captions."""
    skipped = []
    files = dict.fromkeys(files_below(folder))  # a set that keeps its order
    clips = dict.fromkeys(path for path in files if path.suffix.lower() not in BESIDE)
    captions = {}
    beside = {path: path.with_suffix(".txt") for path in clips}
    tables = [path for path in files if path.name in ("metadata.csv", "metadata.jsonl")]
    if tables:
        layout = "metadata"
        for table in tables:
            for path, caption in read_table(table):
                if path not in clips:  # nor is an absolute path, or one with ..
                    skipped.append(f"{path}: a row of {table}, but no clip in this folder")
                elif path in captions:
                    skipped.append(f"{path}: a second caption")
                else:
                    captions[path] = "" if caption is None else str(caption)
    elif any(text in files for text in beside.values()):
        layout = ".txt files"
        captions = {path: text for path, text in beside.items() if text in files}
    else:
        layout = "class folders"
        for path in clips:  # ApplyEyeMakeup, brush_hair
            if path.parent != Path(folder):
                spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_-]", " ", path.parent.name)
                captions[path] = spaced.lower()
    skipped += [f"{path}: no caption" for path in clips if path not in captions]
    return layout, captions, skipped


def read_embedding(path):
    """name.npy, [tokens, dim]; None where there is none. Memory-mapped: a false header cannot
    allocate."""
    path = path.with_suffix(".npy")
    if not path.exists():
        return None
    with np.errstate(over="ignore"):
        array = np.lib.format.open_memmap(path, "r").astype(np.float32)
    if array.ndim != 2 or not array.size or not (np.abs(array) <= 65504).all():
        raise ValueError(f"{path.name} is no array [tokens, dim] of finite float16 numbers")
    return torch.from_numpy(array)


# Of a file: frames is their number; dim, the channels of its embedding, or None.
Clip = namedtuple("Clip", "path caption frames seconds dim")


def look_at(path, caption, least):
    """-> the Clip. Decodes nothing. Raises where it cannot be used, as with fewer frames than
    `least`."""
    if isinstance(caption, Path):
        caption = caption.read_text(encoding="utf-8-sig")
    caption = " ".join(caption.split())
    if not 0 < len(re.findall(r"\w+", caption)) <= 512:
        raise ValueError("a caption takes 1 to 512 words")
    embedding = read_embedding(path)
    dim = None if embedding is None else embedding.shape[1]
    if path.suffix.lower() in PICTURES:
        return Clip(path, caption, 1, 0.0, dim)
    import av  # here, since rendered clips do not need it

    with av.open(f"file:{path}", options=CONTAINERS) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate)  # read here: a closed container tells nothing
        frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if frames < least:
        raise ValueError(f"{frames} frames, where {least} are the least")
    return Clip(path, caption, frames, frames / rate, dim)


def upright(frame, scaler, height, width):
    """A decoded frame -> [3, height, width] uint8: scaled to cover that and centre-cropped."""
    turns = round(frame.rotation / 90)  # a phone films lying, and notes how it was held
    if turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    h = round(frame.height * scale)
    w = round(frame.width * scale)
    image = scaler.reformat(frame, w, h, "rgb24", interpolation="AREA", threads=1).to_ndarray()
    top = (h - height) // 2
    left = (w - width) // 2
    image = np.rot90(image[top:top + height, left:left + width], turns)
    return rearrange(image, "h w rgb -> rgb h w")


def read_frames(path, places, height, width):
    """Yields (place, frame) of a film, frames [3, height, width] uint8. places: which, rising. One
    that is more than 250 behind the last is sought; then it and those after it, up to the next such
    gap, shift back by as much as lies between it and its keyframe, which must be decoded anyway.
    Raises ValueError where the film ends too early."""
    import av
    from av.video.reformatter import VideoReformatter

    with av.open(f"file:{path}", options=CONTAINERS) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1  # it is clips that are read in parallel
        # Only these tell when a frame is shown; in others frames are counted, and none is sought.
        has_times = container.format.name.startswith(("mov", "matroska"))
        per_tick = float(stream.average_rate * stream.time_base)  # frames
        start = stream.start_time or 0
        scaler = VideoReformatter()
        frames = container.decode(stream)
        position = -1  # of `frame`
        shift = 0
        for previous, place in zip([0, *places], places):
            if has_times and place > previous + 250:
                container.seek(start + int(place / per_tick), stream=stream)
                frames = container.decode(stream)
                frame = next(frames)
                keyframe = round((frame.pts - start) * per_tick)
                shift = place - keyframe if keyframe > position else 0  # never back into windows
                position = keyframe
            while position < place - shift:
                frame = next(frames, None)
                if frame is None:
                    raise ValueError(f"it ends before frame {place}")
                position += 1
                if has_times:
                    position = round((frame.pts - start) * per_tick)
            yield place, upright(frame, scaler, height, width)


def read_picture(path, height, width):
    """A picture file -> [3, height, width] uint8: upright, scaled to cover that and cropped."""
    from PIL import Image, ImageOps

    with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    return rearrange(np.array(ImageOps.fit(image, (width, height))), "h w rgb -> rgb h w")


def read_clip(path, windows, stride, pixels, done):
    """Decodes the windows of one clip, {window: first frame}, into pixels [windows, t, 3, h, w]. A
    picture is a clip that stands still."""
    rows = list(windows)
    if done[rows].all():
        return
    _, t, _, h, w = pixels.shape
    if path.suffix.lower() in PICTURES:
        pixels[rows] = read_picture(path, h, w)
    else:
        wanted = {}  # frame -> its places in `pixels`
        for window, first in windows.items():
            for k in range(t):
                wanted.setdefault(first + k * stride, []).append((window, k))
        for frame, image in read_frames(path, sorted(wanted), h, w):
            for place in wanted[frame]:
                pixels[place] = image
    done[rows] = 1


def in_parallel(function, items, what):
    """-> function(*item) of all items, by several threads, but for those with which it raises; and
    a line for each of these."""
    def attempt(item):
        try:
            return function(*item), None
        except Exception as error:  # PyAV raises dozens of kinds
            return None, f"{item[0]}: {error}"

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = list(progress(pool.map(attempt, items), desc=what, total=len(items)))
    finally:  # `with` would wait for all items, after Ctrl-C too
        pool.shutdown(cancel_futures=True)
    errors = [error for _, error in results if error]
    return [result for result, error in results if not error], errors


def spread(counts, firsts, most):
    """At most so many of all windows, evenly spread, without a list of them all. counts: windows of
    each clip; firsts: the first frame of its first one. -> [n, 2]: clip, first frame"""
    ends = counts.cumsum()
    places = np.linspace(0, ends[-1] - 1, min(most, ends[-1])).round().astype(int)
    clips = np.searchsorted(ends, places, side="right")
    return np.stack([clips, places - (ends - counts)[clips] + firsts[clips]], axis=1)


def held_out(captions):
    """Which clips are held out whole, a bool each: of 20 or more every twentieth, if another one
    has its caption."""
    clips_with = Counter(captions)
    has_twin = np.array([clips_with[caption] > 1 for caption in captions], dtype=bool)
    is_twentieth = np.arange(len(captions)) % 20 == 10
    return has_twin & is_twentieth & (len(captions) >= 20)


def choose_windows(captions, frames, span, most):
    """Windows of `span` frames to train on, at most so many, and to test on, [n, 2] each: clip,
    first frame. Where no clip is held out whole, the last tenth of each is. captions, frames: of
    all clips. A caption that is not trained on is no test."""
    is_test = held_out(captions)
    windows = frames - span + 1
    start = np.zeros_like(frames)
    most_tests = min(TEST_CLIPS, max(1, most // 10))
    if is_test.any():
        train = spread(np.where(is_test, 0, windows), start, most)
        test = spread(np.where(is_test, windows, 0), start, most_tests)
    else:
        test_start = frames - np.maximum(span, frames // 10)
        train = spread(test_start - span + 1, start, most)
        test = spread(windows - test_start, test_start, most_tests)
    trained = {captions[clip] for clip in train[:, 0]}
    return train, test[[captions[clip] in trained for clip in test[:, 0]]]


def map_store(path, shape):
    """-> pixels uint8 `shape`, and which of its windows are done: one file, mapped."""
    pixels = math.prod(shape)
    store = torch.from_numpy(np.memmap(path, np.uint8, "r+", shape=(pixels + shape[0],)))
    return store[:pixels].view(shape), store[pixels:]


def allocate(path, n_bytes):
    """Makes a file. A full disk shows now, not as a crash while it is mapped."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        file.truncate(n_bytes)


def usable_clips(folder, span, picture_share):
    """-> the clips and the pictures of a folder, two lists of Clip; says what was found. span:
    frames that a window reaches over."""
    layout, found, skipped = find_clips(folder)
    items = [(file, caption, span) for file, caption in found.items()]
    usable, errors = in_parallel(look_at, items, "looking at clips")
    skipped += errors
    clips = [clip for clip in usable if clip.frames >= span]
    pictures = [clip for clip in usable if clip.frames < span]
    if pictures and not picture_share:
        say(f"{len(pictures):,} pictures are left out, since --picture-share is 0")
        pictures = []
    if not held_out([clip.caption for clip in clips]).any():
        # Each has a window to train on and one to test on.
        skipped += [f"{clip.path}: {clip.frames} frames, where {2 * span} are the least"
                    for clip in clips if clip.frames < 2 * span]
        clips = [clip for clip in clips if clip.frames >= 2 * span]
    for line in skipped[:10]:
        say(f"skipped {line}")
    if not clips:
        fail(f"no usable clip in {folder}: it needs videos with a caption each, such as frog.mp4 "
             "and frog.txt (20 pictures alone will do, if --size begins with 1x)")
    _, captions, _, seconds, dims = zip(*clips, *pictures)
    print(f"{layout}: {len(clips):,} clips and {len(pictures):,} pictures with "
          f"{len(set(captions)):,} captions, {sum(seconds) / 3600:.3g} hours; {len(skipped):,} "
          "skipped")
    if len(set(dims)) > 1:
        fail(f"the .npy embeddings in {folder} must have as many channels, one for every clip and "
             "picture")
    return clips, pictures


def prepare_store(path, n_bytes):
    """Makes the file of the windows, unless it is there, half-read; removes those of other
    settings."""
    for old in path.parent.glob("windows-*.bin"):
        if old != path:
            old.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    print(f"{n_bytes / 1e9:.3g} GB in {path}; {free / 1e9:.3g} GB are free")
    if not path.exists() or path.stat().st_size != n_bytes:
        if n_bytes > free:
            fail("the disk is too small: take fewer --clips or a smaller --size")
        allocate(path, n_bytes)


def store_windows(settings, path):
    """Chooses windows of a folder's clips, decodes them into one file, and writes `path`,
    windows.pt, which names it. Stopped and called again, it goes on."""
    t, h, w = settings["size"]
    span = (t - 1) * settings["stride"] + 1
    most = settings["clips"]
    clips, pictures = usable_clips(settings["data"], span, settings["picture_share"])
    paths, captions, frames, _, dims = zip(*clips, *pictures)
    n = len(clips)
    train, test = choose_windows(captions[:n], np.array(frames[:n]), span, most)
    some = np.linspace(n, n + len(pictures) - 1, min(most, len(pictures))).round().astype(int)
    stills = [(picture, 0) for picture in some.tolist()]
    windows = [*train.tolist(), *stills, *test.tolist()]
    print(f"{len(train):,} windows of {t} frames and {len(stills):,} pictures to train on, "
          f"{len(test):,} windows to test")

    shape = len(windows), t, 3, h, w
    of_what = zlib.crc32(repr((settings, windows)).encode())
    store = path.with_name(f"windows-{of_what:08x}.bin")
    prepare_store(store, math.prod(shape) + len(windows))
    pixels, done = map_store(store, shape)
    of_clip = {}  # clip -> {window: first frame}
    for window, (clip, first) in enumerate(windows):
        of_clip.setdefault(clip, {})[window] = first
    items = [(paths[clip], of_one, settings["stride"], pixels.numpy(), done.numpy())
             for clip, of_one in of_clip.items()]
    _, unreadable = in_parallel(read_clip, items, "reading clips")
    for line in unreadable[:10]:
        say(f"skipped {line}")

    known = len(train) + len(stills)  # windows and pictures to train on
    caption_of = [captions[clip] for clip, _ in windows]
    path_of = {caption_of[i]: paths[windows[i][0]] for i in range(known) if done[i]}
    kept = [i for i in range(len(windows)) if done[i] and caption_of[i] in path_of]
    n_train = sum(i < len(train) for i in kept)
    n_known = sum(i < known for i in kept)
    if not n_train or n_known == len(kept):
        fail(f"no usable clip in {settings['data']}: nothing to train on, or nothing to test on")
    embeddings = None
    if dims[0]:  # [captions and the empty one, tokens, dim], padded with zeros
        arrays = [read_embedding(path_of[caption]).half() for caption in sorted(path_of)]
        empty = Path(settings["data"], "empty.npy")
        with reading(empty):
            of_empty = read_embedding(empty) if empty.exists() else torch.zeros(1, dims[0])
            embeddings = pad_sequence([*arrays, of_empty.half()], batch_first=True)
    save(path, stage="windows", settings=settings, store=store.name, shape=shape, kept=kept,
         captions=[caption_of[i] for i in kept], train_clips=n_train,
         pictures=n_known - n_train, embeddings=embeddings)


class Folder:
    """Windows of filmed clips, decoded once into one mapped file: memory does not grow with their
    number, and no later start decodes again."""

    held_out_captions = []

    def __init__(self, settings, path):
        names = "data", "size", "stride", "clips", "folder", "picture_share"
        settings = {name: settings[name] for name in names}
        if FIRST and not path.exists():
            store_windows(settings, path)
        wait_for_all()
        saved = load(path, "windows")
        check_settings(path, saved["settings"], settings)
        with reading(path):
            self.pixels, _ = map_store(path.with_name(saved["store"]), saved["shape"])
            self.kept = saved["kept"]
            self.captions = saved["captions"]
            self.embeddings = saved["embeddings"]
            self.train = range(saved["train_clips"])
            self.pictures = range(len(self.train), len(self.train) + saved["pictures"])
            self.test = range(self.pictures.stop, len(self.kept))

    def clip(self, indices):
        """Windows: [b, 3, t, h, w] in [-1, 1]."""
        pixels = self.pixels[[self.kept[i] for i in indices]]
        return rearrange(pixels, "b t c h w -> b c t h w").float() / 127.5 - 1


def open_data(settings, path):
    """settings: of vae.py; path: where windows of filmed clips lie, or will. -> a data set:
    clip(indices) gives pixels; captions, one per clip; train, pictures and test, ranges of indices
    in this order; held_out_captions; embeddings of the training captions in order and of the empty
    one, [captions + 1, tokens, dim], or None."""
    if settings["data"] == "shapes":
        return Shapes(*settings["size"], settings["clips"], settings["seed"])
    return Folder(settings, path)


def describe_folder(data, run):
    """Some words that change with the names and sizes of a folder's files; None for `shapes`."""
    if data == "shapes":
        return None
    if not Path(data).is_dir():
        fail(f"--data {data} is neither `shapes` nor a folder")
    if run.resolve().is_relative_to(Path(data).resolve()):
        fail(f"--run {run} lies in --data {data}, and would be taken for clips: put it outside")
    files = files_below(data)
    listing = repr([(path, path.stat().st_size) for path in files])
    return f"{len(files)} files, checksum {zlib.crc32(listing.encode()):08x}"


# ------------------------------------------------------------ the training


def random_part(clips, part_size, generator):
    """[b, 3, t, h, w] -> [b, 3, *part_size], the same place in all clips."""
    for axis, length in enumerate(part_size, start=2):
        places = clips.shape[axis] - length + 1
        first = torch.randint(places, (), generator=generator).item()
        clips = clips.narrow(axis, first, length)
    return clips


@torch.no_grad()
def encode_all(vae, data, latent_shape, path, batch_size, device, precision):
    """-> the latents (means) of all clips [n, c, t, h, w], float16, mapped from a file at `path`,
    so that memory does not grow with their number; and their mean and std per channel [c], over
    the training clips."""
    shape = (len(data.captions), *latent_shape)
    allocate(path, 2 * math.prod(shape))
    latents = torch.from_numpy(np.memmap(path, np.float16, "r+", shape=shape))
    total = torch.zeros(latent_shape[0], dtype=torch.float64)
    total_of_squares = total.clone()
    for start in progress(range(0, len(latents), batch_size), desc="encoding"):
        batch = slice(start, start + batch_size)
        clips = data.clip(list(range(len(latents))[batch]))
        with precision():
            mean, _ = vae.encode(clips.to(device))
        latents[batch] = mean.half().cpu()
        training = latents[:len(data.train)][batch].double()
        total += training.sum((0, 2, 3, 4))
        total_of_squares += training.square().sum((0, 2, 3, 4))
    count = len(data.train) * math.prod(latent_shape[1:])
    mean = total / count
    std = (total_of_squares / count - mean.square()).clamp(min=1e-8).sqrt()
    return latents, mean.float(), std.float()


def main(argv=None):
    p = make_parser(__doc__, PRESETS, argv)
    p.add_argument("--data", default="shapes", help="`shapes`, or a folder of clips with captions")
    p.add_argument("--size", type=size, metavar="TxHxW", help="frames x height x width of a clip")
    p.add_argument("--ratio", type=size, metavar="TxHxW", help="compression: time x height x width")
    p.add_argument("--stride", type=positive, default=2, help="every n-th frame of filmed clips")
    p.add_argument("--clips", type=positive,
                   help="rendered clips; of filmed ones, the most windows, and the most pictures")
    p.add_argument("--latent-channels", type=positive, help="channels of a latent")
    p.add_argument("--width", type=positive, help="channels of the first stage")
    p.add_argument("--patch", type=int, choices=[2, 4], help="pixels a side that become channels")
    p.add_argument("--res-blocks", type=positive, help="residual blocks per stage")
    p.add_argument("--kl", type=number(0), help="weight of the KL divergence")
    p.add_argument("--crop", type=size, metavar="TxHxW",
                   help="train on random parts of this size, one per step, in less memory")
    add_file(p, "--out", "vae.pt", "the trained autoencoder")
    add_file(p, "--latents", "latents.pt", "the data set's latents")
    add_training_flags(p)
    args = p.parse_args(argv)
    latent_shape = args.latent_channels, *latent_size(args.size, args.ratio)
    crop = args.crop or args.size
    crop_shape = args.latent_channels, *latent_size(crop, args.ratio)
    if any(part > whole for part, whole in zip(crop, args.size)):
        fail(f"--crop {crop} is larger than the clips, --size {args.size}")
    torch.manual_seed(args.seed)
    try:
        vae = VAE(args.ratio, args.latent_channels, args.width, args.res_blocks, args.patch)
    except ValueError as error:
        fail(str(error))
    args.data = str(Path(args.data))  # a name that ends in / is the same folder
    settings = settings_of(args) | dict(folder=describe_folder(args.data, args.run))
    device, precision = set_up(args)
    stop_if_done([args.out, args.latents], settings, "vae", "dit.py")

    data = open_data(settings, args.latents.with_name("windows.pt"))
    vae.to(device).gradient_checkpointing = args.gradient_checkpointing
    ema = average_weights(vae, args)
    optimizer = Optimizer(vae, args.optimizer, args.lr, precision)
    loss_fn = torch.compile(vae_loss) if args.compile else vae_loss

    def draw(step):
        g = step_generator("vae", args.seed, step)
        is_pictures = torch.rand((), generator=g) < args.picture_share
        choices = data.pictures.stop if is_pictures else data.train.stop
        picked = torch.randint(choices, (args.batch_size,), generator=g)
        noise = torch.randn(args.batch_size, *crop_shape, generator=g)
        clips = data.clip(picked[SHARE].tolist())
        clips = random_part(clips, crop, g)
        frames = 1 if is_pictures else None
        return clips[:, :, :frames], noise[SHARE][:, :, :frames]

    loop = Loop("vae", args, settings, args.steps, device, draw, model=vae, ema=ema,
                optimizer=optimizer)
    for step, (x, noise) in loop:
        optimizer.set_lr(warmup_cosine(step, args.steps))
        vae.zero_grad()
        with precision():
            loss, psnr_db = loss_fn(vae, x, noise, args.kl)
        loss.backward()
        average_gradients(vae.parameters(), args.batch_size)
        # A loss in dB has gradients of 20 to 100; clipped to 1, every step would weigh the same.
        grad_norm = nn.utils.clip_grad_norm_(vae.parameters(), 100.0)
        optimizer.step()
        ema.update_parameters(vae)
        loop.log(loss=loss, psnr_db=psnr_db, grad_norm=grad_norm)

    if not FIRST:
        return
    vae = ema.module.eval()
    test_clips = (data.clip([i]).to(device) for i in progress(data.test, desc="testing"))
    metrics = dict(psnr_db=psnr(vae, test_clips, precision), params=count_parameters(vae),
                   compression=list(args.ratio), latent_channels=args.latent_channels)

    # The data set, once, as latents: no later training touches pixels.
    part = args.latents.with_name(args.latents.name + ".part")
    batch_size = 1 if args.crop else args.batch_size
    latents, mean, std = encode_all(vae, data, latent_shape, part, batch_size, device, precision)
    vae.latent_mean.copy_(mean.view(-1, 1, 1, 1))
    vae.latent_std.copy_(std.view(-1, 1, 1, 1))
    save(args.out, stage="vae", config=vae.config, model=vae.state_dict(), metrics=metrics,
         settings=settings, history=loop.history)
    save(args.latents, stage="latents", metrics=metrics, settings=settings,
         config=dict(size=args.size, data=args.data),
         latents=latents, mean=mean, std=std, checksum=checksum([latents]),
         vae_checksum=checksum(vae.parameters()),
         train_clips=len(data.train), pictures=len(data.pictures), captions=data.captions,
         held_out_captions=data.held_out_captions, embeddings=data.embeddings)
    del latents  # mapped: Windows would not delete its file
    part.unlink()
    finish(args, "vae", metrics, "dit.py", loop)


if __name__ == "__main__":
    run_script(main)

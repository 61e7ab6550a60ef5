"""A causal video VAE with a high compression ratio: clips in, a small grid of latents out.

The idea (paper, high-compression VAE). Full 3D attention costs O((t·h·w)^2), so fewer tokens come
first. Stated: ratios from 4x16x16 to 8x64x64 (time x height x width) were built and compared, and
8x32x32 chosen. `--ratio` takes any of them, and 4x8x8 for the tiny preset. Our reading: all layers,
widths and losses.

    pixels   [b, 3, 1 + k*rt, h, w]     in [-1, 1]; the ratio is rt x rs x rs, k any whole number
       |  2x2 or 4x4 pixels become channels; then stages that halve space, time or both
    latents  [b, c, 1 + k, h/rs, w/rs]  mean and log-variance of a diagonal Gaussian
       |  the mirror image
    pixels   [b, 3, 1 + k*rt, h, w]

Causal means that no latent frame sees a later pixel frame: every convolution pads time in front
only. So the first frame is encoded alone, a picture is a video of one frame, and lengths are 1 + a
multiple of rt. Latent frame 0 holds pixel frame 0; latent frame i >= 1 holds pixel frames
(i-1)*rt + 1 ... i*rt. Nine frames at rt = 4, halved twice:

    pixels      0 | 1 2 3 4 | 5 6 7 8     9 frames
    stage 1     0 | 1    2  | 3    4      5: frame i holds pixels 2i-1 and 2i
    latents     0 |    1    |    2        3: frame 1 holds pixels 1 to 4, frame 2 pixels 5 to 8

    python vae.py                                   # built-in `shapes` -> vae.pt, latents.pt
    python vae.py --data my_clips --run runs/mine   # a folder of clips with captions

Reading order: the model, what it leaves for later stages, the loss and the training.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from common import cli, data, files, training

PRESETS = {
    "tiny": dict(
        size="9x32x32",      # frames x height x width: the smallest clip in which motion shows
        ratio="4x8x8",       # 3 x 4 x 4 latent positions per clip: 48 tokens
        latent_channels=16,  # 768 numbers per clip, of 27,648 pixel values
        width=32,            # channels of the first stage, doubled in each of the next two
        patch=2,             # 2x2 pixels into channels; 4x4 rounds the corners of small shapes
        res_blocks=1,        # per stage
        clips=6144,          # rendered ones, or at most so many windows of real videos
        fps=8,               # of real videos: frames per second at which they are read
        steps=960,
        batch_size=12,       # clips per step
        lr=0.015,            # Muon's: each update is orthogonal, whatever the gradient's size
        kl=0.04,             # dB per nat: it keeps the latents' scale in bounds, no more
        optimizer="muon",    # the paper has AdamW
        ema=0.99),           # the average of about the last 100 steps
    "toy": dict(size="17x128x128", ratio="8x32x32", latent_channels=96, width=48, patch=4,
                res_blocks=1, crop="17x64x64", clips=6144, fps=8, steps=2600, batch_size=8,
                lr=0.01, kl=0.04, optimizer="muon", ema=0.99),
    "mobile": dict(size="49x384x512", ratio="8x32x32", latent_channels=128, width=128, patch=4,
                   res_blocks=3, clips=65536, fps=24, steps=200000, batch_size=8, lr=1e-4, kl=4e-4,
                   optimizer="adamw", ema=0.9995),
}
PRESETS["server"] = PRESETS["mobile"] | dict(size="121x576x1024")

# ------------------------------------------------------------ the model


class RMSNorm(nn.Module):
    """RMSNorm over one axis (https://arxiv.org/abs/1910.07467). Stated for the DiT: throughout, for
    memory on the phone; in the VAE our reading. Written out, since torch.rms_norm has no Core ML
    counterpart. One position at a time, so it leaks no future."""

    def __init__(self, dim, axis=-1, affine=True):
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x, epsilon=1e-6):
        rms_inverse = torch.rsqrt(x.square().mean(self.axis, keepdim=True) + epsilon)
        x = x * rms_inverse.to(x.dtype)
        if self.weight is None:
            return x
        weight = self.weight.to(x.dtype)  # under autocast, or all that follows would be float32
        if self.axis == 1:
            weight = weight[:, None, None, None]  # for x [b, c, t, h, w]
        return x * weight


def repeat_first_frame(x, n):
    """[b, c, t, h, w] -> [b, c, n + t, h, w]: n copies of the first frame in front."""
    return torch.cat([x[:, :, :1]] * n + [x], dim=2) if n else x


class CausalConv3d(nn.Conv3d):
    """A convolution of [b, c, t, h, w] whose output frame i sees input frames <= i * stride: the
    first frame is repeated in front instead of padding at both ends. kernel: (time, height, width),
    odd."""

    def __init__(self, c_in, c_out, kernel=(3, 3, 3), stride=(1, 1, 1)):
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(c_in, c_out, kernel, stride=stride, padding=padding)

    def forward(self, x):
        return super().forward(repeat_first_frame(x, self.kernel_size[0] - 1))


class ResBlock(nn.Module):
    """[b, c, t, h, w] -> the same: a 3x3 convolution over the picture, then one over three frames,
    with 12 weights per pair of channels where two full convolutions have 54."""

    def __init__(self, channels):
        super().__init__()
        self.norm1 = RMSNorm(channels, axis=1)
        self.conv1 = CausalConv3d(channels, channels, (1, 3, 3))
        self.norm2 = RMSNorm(channels, axis=1)
        self.conv2 = CausalConv3d(channels, channels, (3, 1, 1))

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


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
        padded = repeat_first_frame(x, st - 1)  # causal, as in the convolution
        shortcut = rearrange(padded, "b c (t st) (h sh) (w sw) -> b (st sh sw c) t h w",
                             st=st, sh=sh, sw=sw)
        return self.conv(x) + match_channels(shortcut, self.conv.out_channels)


class Upsample(nn.Module):
    """[b, c, t, h, w]: channels to space (and time). The first frame stands for one frame: the
    stride[0] - 1 copies before it are dropped, and 1 + k frames become 1 + k * stride[0]."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.stride = stride
        self.conv = CausalConv3d(c_in, c_out * math.prod(stride), (1, 1, 1))

    def forward(self, x):
        return self.unfold(x)[:, :, self.stride[0] - 1:]

    def unfold(self, x):
        """With those copies; export_coreml.py, frame by frame, drops them once."""
        st, sh, sw = self.stride
        x = self.conv(x) + match_channels(x, self.conv.out_channels)
        return rearrange(x, "b (st sh sw c) t h w -> b c (t st) (h sh) (w sw)", st=st, sh=sh, sw=sw)


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

        # A stage halves space, time or both. Where one axis needs fewer halvings, they come last.
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
        p = self.patch
        x = self.run_layers(self.decoder, z)
        return rearrange(x, "b (c ph pw) t h w -> b c t (h ph) (w pw)", ph=p, pw=p)


def latent_size(clip_size, ratio):
    """-> frames, height and width of a clip's latents. A clip is 1 + a multiple of the ratio's
    frames, and a multiple of it in height and width; others are refused."""
    frames, height, width = clip_size
    rt, rs, _ = ratio
    if (frames - 1) % rt or height % rs or width % rs:
        cli.exit_with_error(
            f"{frames}x{height}x{width} does not fit the ratio {rt}x{rs}x{rs}: use 1 + a multiple "
            f"of {rt} frames, such as {frames + (1 - frames) % rt}, and multiples of {rs} pixels, "
            f"such as {height + -height % rs}x{width + -width % rs}")
    return 1 + (frames - 1) // rt, height // rs, width // rs


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
    """-> the autoencoder, in eval mode. Refuses a VAE other than the one that made the latents."""
    checkpoint = files.load(path, "vae")
    with files.reading(path):
        vae = VAE(**checkpoint["config"])
        vae.load_state_dict(checkpoint["model"])
    if files.checksum(vae.parameters()) != vae_checksum:
        cli.exit_with_error(f"{path} is of another run: not the autoencoder that made the latents")
    return vae.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------ what a trained VAE leaves


@torch.no_grad()
def encode_all(vae, dataset, latent_shape, path, batch_size, device, precision):
    """-> the latents (means) of all records [n, c, t, h, w], float16, mapped from a file at `path`,
    so that memory does not grow with their number; and their mean and std per channel [c], over
    the training clips."""
    n = len(dataset.records)
    shape = (n, *latent_shape)
    files.allocate(path, 2 * math.prod(shape))
    latents = torch.from_numpy(np.memmap(path, np.float16, "r+", shape=shape))
    is_train = torch.tensor([record.split == "train" for record in dataset.records])
    total = torch.zeros(latent_shape[0], dtype=torch.float64)
    total_of_squares = total.clone()
    for start in cli.progress(range(0, n, batch_size), desc="encoding"):
        batch = slice(start, start + batch_size)
        pixels = dataset.clip(list(range(start, min(start + batch_size, n))))
        with precision():
            posterior_mean, _ = vae.encode(pixels.to(device))
        latents[batch] = posterior_mean.half().cpu()
        train_latents = latents[batch][is_train[batch]].double()
        total += train_latents.sum((0, 2, 3, 4))
        total_of_squares += train_latents.square().sum((0, 2, 3, 4))
    count = is_train.sum() * math.prod(latent_shape[1:])
    mean = total / count
    std = (total_of_squares / count - mean.square()).clamp(min=1e-8).sqrt()
    return latents, mean.float(), std.float()


def save_results(args, settings, vae, dataset, loop, latent_shape, device, precision):
    """The PSNR on test clips; the data set, once, as latents: no later training touches pixels."""
    test = cli.progress(data.indices_of(dataset.records, "test").tolist(), desc="testing")
    metrics = dict(psnr_db=psnr(vae, (dataset.clip([i]).to(device) for i in test), precision),
                   params=training.count_parameters(vae), compression=list(args.ratio),
                   latent_channels=args.latent_channels)
    part = args.latents.with_name(args.latents.name + ".part")
    batch_size = 1 if args.crop else args.batch_size  # whole clips, which --crop kept out of memory
    latents, mean, std = encode_all(vae, dataset, latent_shape, part, batch_size, device,
                                    precision)
    vae.latent_mean.copy_(mean.view(-1, 1, 1, 1))
    vae.latent_std.copy_(std.view(-1, 1, 1, 1))
    # `config` rebuilds the VAE; latent_mean and latent_std are among its weights.
    files.save(args.out, stage="vae", config=vae.config, model=vae.state_dict(), metrics=metrics,
               settings=settings, history=loop.history)
    data.save_latents(args.latents, dataset, latents, mean, std, metrics=metrics, settings=settings,
                      config=dict(size=args.size, data=args.data, fps=args.fps),
                      vae_checksum=files.checksum(vae.parameters()))
    del latents  # mapped: Windows would not delete its file
    part.unlink()
    return metrics


def parse_arguments(argv):
    p = cli.make_parser(__doc__, PRESETS, argv)
    p.add_argument("--data", default="shapes", help="`shapes`, or a folder of clips with captions")
    p.add_argument("--size", type=cli.size, metavar="TxHxW",
                   help="frames x height x width of a clip")
    p.add_argument("--ratio", type=cli.size, metavar="TxHxW",
                   help="compression: time x height x width")
    p.add_argument("--fps", type=cli.positive,
                   help="frames per second at which real videos are read, and clips are shown")
    p.add_argument("--clips", type=cli.positive,
                   help="rendered clips; of real ones, the most windows, and the most pictures")
    p.add_argument("--latent-channels", type=cli.positive, help="channels of a latent")
    p.add_argument("--width", type=cli.positive, help="channels of the first stage")
    p.add_argument("--patch", type=int, choices=[2, 4], help="pixels a side that become channels")
    p.add_argument("--res-blocks", type=cli.positive, help="residual blocks per stage")
    p.add_argument("--kl", type=cli.number(0),
                   help="weight of the KL divergence, dB per nat of each latent number")
    p.add_argument("--crop", type=cli.size, metavar="TxHxW",
                   help="train on random crops of this size, one place per step, in less memory")
    cli.add_file(p, "--out", "vae.pt", "the trained autoencoder")
    cli.add_file(p, "--latents", "latents.pt", "the data set's latents")
    cli.add_training_flags(p)
    args = p.parse_args(argv)
    args.data = str(Path(args.data))  # a name that ends in / is the same folder
    if args.crop and any(part > whole for part, whole in zip(args.crop, args.size)):
        cli.exit_with_error(f"--crop {args.crop} is larger than the clips, --size {args.size}")
    return args


# ------------------------------------------------------------ the loss and the training


def vae_loss(vae, x, noise, kl_weight):
    """-> the loss in dB: kl_weight * KL divergence to N(0, 1) in nats, mean over latent numbers
    (https://arxiv.org/abs/1312.6114), minus the PSNR in dB, mean over clips; and the PSNR alone.
    noise: standard normal, in the latents' shape. Our reading: the logarithm of the squared error,
    so that clips whose error is small still have much to win."""
    mean, logvar = vae.encode(x)
    reconstruction = vae.decode(mean + noise * (0.5 * logvar).exp()).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
    mse = (reconstruction - x).square().mean((1, 2, 3, 4))
    psnr_db = 10 * torch.log10(4 / (mse + 1e-5)).mean()  # a flat clip cannot count beyond 56 dB
    return kl_weight * kl - psnr_db, psnr_db


def random_crop(clips, crop, generator):
    """[b, 3, t, h, w] -> [b, 3, *crop], the same place in all clips."""
    for axis, length in enumerate(crop, start=2):
        places = clips.shape[axis] - length + 1
        first = torch.randint(places, (), generator=generator).item()
        clips = clips.narrow(axis, first, length)
    return clips


def main(argv=None):
    args = parse_arguments(argv)
    latent_shape = args.latent_channels, *latent_size(args.size, args.ratio)
    crop = args.crop or args.size
    crop_shape = args.latent_channels, *latent_size(crop, args.ratio)
    torch.manual_seed(args.seed)
    try:
        vae = VAE(args.ratio, args.latent_channels, args.width, args.res_blocks, args.patch)
    except ValueError as error:
        cli.exit_with_error(str(error))
    settings = cli.settings_of(args) | dict(folder=data.describe_folder(args.data, args.run))
    device, precision = training.set_up(args)
    training.stop_if_done([args.out, args.latents], settings, "vae", "dit.py")

    dataset = data.open_clips(settings, args.latents.with_name("frames.pt"))
    train = data.indices_of(dataset.records, "train")
    train_and_pictures = data.indices_of(dataset.records, "train", "picture")
    batch_size = training.local_batch_size(args)
    vae.to(device).gradient_checkpointing = args.gradient_checkpointing
    ema = training.average_weights(vae, args)
    optimizer = training.Optimizer(vae, args.optimizer, args.lr)
    loss_fn = torch.compile(vae_loss) if args.compile else vae_loss

    def draw(step):
        # From (stage, seed, step, process) alone: a resumed run repeats an unbroken one.
        g = training.step_generator("vae", args.seed, step)
        is_pictures = training.is_picture_step(args.picture_share, "vae", args.seed, step)
        pool = train_and_pictures if is_pictures else train
        picked = pool[torch.randint(len(pool), (batch_size,), generator=g)]
        noise = torch.randn(batch_size, *crop_shape, generator=g)
        x = random_crop(dataset.clip(picked.tolist()), crop, g)
        frames = 1 if is_pictures else None  # a picture is a video of one frame
        return x[:, :, :frames], noise[:, :, :frames]

    loop = training.Loop("vae", args, settings, args.steps, device, draw, model=vae, ema=ema,
                         optimizer=optimizer)
    for step, (x, noise) in loop:
        optimizer.set_lr(training.warmup_linear(step, args.steps))
        vae.zero_grad()
        with precision():
            loss, psnr_db = loss_fn(vae, x, noise, args.kl)
        loss.backward()
        training.average_gradients(vae.parameters())
        # A loss in dB has gradients of 20 to 100; clipped to 1, every step would weigh the same.
        grad_norm = nn.utils.clip_grad_norm_(vae.parameters(), 100.0)
        optimizer.step()
        ema.update_parameters(vae)
        loop.log(loss=loss, psnr_db=psnr_db, grad_norm=grad_norm)

    if cli.is_main_process:
        metrics = save_results(args, settings, ema.module.eval(), dataset, loop, latent_shape,
                               device, precision)
        training.finish(args, "vae", metrics, "dit.py", loop)


if __name__ == "__main__":
    cli.run_script(main)

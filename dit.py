"""The diffusion transformer (DiT): text and noise in, the latents of a video out. The teacher of what follows.

The architecture (stated by the paper): full 3D self-attention over all tokens of a clip, cross-attention to the text,
rotary position embeddings (RoPE), query-key normalisation, RMSNorm throughout; 28 blocks, 32 heads, FFN 8192, 2.0 B
parameters. Our reading: head size 64, so width 2048; QK norm per head and no biases in a block, so that taking one
head or one channel away leaves the others exactly as they were; adaLN-single; rectified flow.

    latents x_t [b, c, t, h, w] -> tokens [b, t*h*w, width] --+
                                                               v
    time t [b] -> shift, scale, gate --------------->  depth x [ self-attention (RoPE over t, h, w)
    caption -> text encoder -> [b, words, width] ---->           cross-attention to the words
                                                                 FFN ]
                                                               v
                                                       velocity [b, c, t, h, w]

Rectified flow: x_t = (1 - t) x0 + t noise, and the network predicts the velocity noise - x0, the direction from data
to noise. Sampling walks back from t = 1 to t = 0 in Euler steps, with classifier-free guidance (CFG): 40 steps, each
with and without the caption, are the 80 network evaluations that distill.py brings down to 4.

    python dit.py                   # runs/tiny/latents.pt -> runs/tiny/dit.pt

Every later stage uses this one class: masked (an argument of `forward`), pruned (a smaller config), as the
discriminator's features (the first K blocks).
"""
import math
import re
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vae import PRESETS as VAE_PRESETS
from vae import (Loop, Optimizer, RMSNorm, between, check_size, command, count, dims, fail, finish, load, load_vae,
                 parse, parser, positive, progress, reading, save, script, set_up, show_clips, stop_if_done,
                 training_flags)

PRESETS = {
    "tiny": dict(width=128, depth=7, heads=8, head_dim=16, ffn=512, steps=900, batch_size=32, lr=0.04,
                 optimizer="muon", ema=0.99),
    "toy": dict(width=512, depth=14, heads=16, head_dim=32, ffn=2048, steps=20000, batch_size=128, lr=0.02,
                optimizer="muon", ema=0.9995),
    # The paper's sizes; mobile is what prune.py cuts out of server, for whoever wants it from scratch.
    "mobile": dict(width=2048, depth=20, heads=20, head_dim=64, ffn=6144, steps=200000, batch_size=256, lr=5e-5,
                   optimizer="adamw", ema=0.9995),
    "server": dict(width=2048, depth=28, heads=32, head_dim=64, ffn=8192, steps=200000, batch_size=256, lr=5e-5,
                   optimizer="adamw", ema=0.9995),
}

# --------------------------------------------------------------------------------------------------------- the text

PAD = 0  # a caption of padding alone is the empty caption of classifier-free guidance


def words(caption):
    return re.findall(r"\w+", caption.lower())


def tokenize(captions, vocabulary, length):
    """Captions -> word numbers [b, length], cut or padded. Words that training never saw are named and left out; a
    caption of nothing else is refused, since it would give the clip of no caption."""
    index = {word: i for i, word in enumerate(vocabulary)}
    unknown = sorted({w for c in captions for w in words(c)} - set(index))
    if unknown:
        print(f"warning: not in the training captions, so left out: {', '.join(unknown)[:200]}", file=sys.stderr)
    rows = [[index[w] for w in words(c) if w in index] for c in captions]
    if not all(rows):
        fail(f"no word of '{captions[rows.index([])][:200]}' is known; known are: {', '.join(list(index)[1:20])}"
             f"{', ...' * (len(index) > 20)}")
    if (longest := max(map(len, rows))) > length:
        print(f"warning: captions of up to {longest} words are cut to the first {length}", file=sys.stderr)
    rows = [row[:length] for row in rows]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def text_input(context, captions):
    """What the text encoder reads, as a checkpoint describes it: word numbers, or the user's own embeddings."""
    embeddings = context["embeddings"]
    if not embeddings:
        return tokenize(captions, context["vocabulary"], context["text_tokens"])
    for caption in captions:
        if caption not in embeddings:
            fail(f"this model reads text embeddings, and none is known for '{caption}'; known are: "
                 + "; ".join(list(embeddings)[:5]))
    return torch.stack([embeddings[caption] for caption in captions])


class TextEncoder(nn.Module):
    """Word numbers [b, n] -> [b, n, width]; or embeddings [b, n, text_dim] of an encoder of your own -> the same.
    Padding has an embedding like any word, so cross-attention needs no mask."""

    def __init__(self, width, vocabulary, text_tokens, text_dim):
        super().__init__()
        self.embed = nn.Linear(text_dim, width) if text_dim else nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(text_tokens, width) * 0.02)
        self.norm, self.out = RMSNorm(width), nn.Linear(width, width)

    def forward(self, tokens):
        return self.out(self.norm(self.embed(tokens) + self.position))


# -------------------------------------------------------------------------------------------------------- the model


def rope_angles(t, h, w, head_dim, device):
    """Angles [t*h*w, head_dim / 2] of 3D RoPE. A quarter of a head's pairs of channels stands for time, three eighths
    for height, three eighths for width; each pair turns at its own frequency, from 1 to about 1/100 radian a position:
    grids are hardly longer than that."""
    pairs = head_dim // 2
    spatial = 3 * pairs // 8
    sizes, angles = (pairs - 2 * spatial, spatial, spatial), []
    grid = torch.meshgrid(*(torch.arange(n, device=device, dtype=torch.float32) for n in (t, h, w)), indexing="ij")
    for position, n in zip(grid, sizes):
        frequency = 100 ** (-torch.arange(n, device=device, dtype=torch.float32) / n)
        angles.append(position.reshape(-1, 1) * frequency)
    return torch.cat(angles, dim=1)


def rotate(x, rope):
    """Turns each pair (x1, x2) of channels by its token's angle; x: [b, heads, n, head_dim]."""
    (cos, sin), (x1, x2) = rope, x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def attend(q, k, v):
    """softmax(q k^T / sqrt(head_dim)) v for [b, heads, n, head_dim], by PyTorch's fused kernel. On a CPU that kernel
    gains nothing from bfloat16; written out, a few heads at a time so that their scores stay small, it does."""
    if isinstance(q, FakeTensor):  # for `cost`: as a GPU would
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    few = max(1, 2 ** 21 // (q.shape[2] * k.shape[2]))
    parts = zip(*(x.flatten(0, 1).contiguous().split(few) for x in (q * q.shape[-1] ** -0.5, k, v)))
    return torch.cat([(q @ k.mT).softmax(-1) @ v for q, k, v in parts]).view_as(q)


class Attention(nn.Module):
    """Multi-head attention of x [b, n, width] to itself or to a context [b, m, width]."""

    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.norm_q, self.norm_k = RMSNorm(head_dim), RMSNorm(head_dim)
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x, context=None, rope=None, head_mask=None):
        q = rearrange(self.q(x), "b n (heads d) -> b heads n d", heads=self.heads)
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        k, v = (rearrange(y, "b m (heads d) -> b heads m d", heads=self.heads) for y in (k, v))
        q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = attend(q.type_as(v), k.type_as(v), v)
        if head_mask is not None:
            x = x * head_mask[:, None, None]
        return self.out(rearrange(x, "b heads n d -> b n (heads d)"))


class FeedForward(nn.Module):
    def __init__(self, width, ffn):
        super().__init__()
        self.tiles = 1  # slices of the hidden channels, each computed and added up before the next (a phone's memory)
        self.up, self.down = nn.Linear(width, ffn, bias=False), nn.Linear(ffn, width, bias=False)

    def forward(self, x, channel_mask=None):
        if self.tiles > 1:  # the tiled GEMM of the paper's second version: the hidden activation never exists whole
            slices = zip(self.up.weight.chunk(self.tiles), self.down.weight.chunk(self.tiles, dim=1))
            return sum(F.linear(F.gelu(F.linear(x, up)), down) for up, down in slices)
        x = F.gelu(self.up(x))
        return self.down(x if channel_mask is None else x * channel_mask)


class Block(nn.Module):
    """Self-attention and FFN, modulated by the time (adaLN-single: one projection for all blocks, and a learned
    offset each), with cross-attention to the text between them."""

    def __init__(self, width, heads, head_dim, ffn):
        super().__init__()
        self.norm1, self.self_attention = RMSNorm(width, affine=False), Attention(width, heads, head_dim)
        self.norm2, self.cross_attention = RMSNorm(width), Attention(width, heads, head_dim)
        self.norm3, self.feed_forward = RMSNorm(width, affine=False), FeedForward(width, ffn)
        # Gates start open and the projections behind them at zero: a new block is the identity, and learns at once.
        self.modulation = nn.Parameter(torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].repeat(1, width))
        for layer in (self.self_attention.out, self.cross_attention.out, self.feed_forward.down):
            nn.init.zeros_(layer.weight)

    def forward(self, x, modulation, text, rope, mask=None):
        """x: [b, n, width]; modulation: [b, 6, width]; text: [b, m, width]. mask: None, or a dict of this block's
        masks, `blocks` a scalar, `self_heads` and `cross_heads` [heads], `ffn` [ffn]."""
        mask = mask or {}
        keep = mask.get("blocks", 1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.modulation).unsqueeze(2).unbind(1)
        h = (self.norm1(x) * (1 + scale1) + shift1).type_as(modulation)  # cast once, for q, k and v
        x = x + keep * gate1 * self.self_attention(h, rope=rope, head_mask=mask.get("self_heads"))
        x = x + keep * self.cross_attention(self.norm2(x), text, head_mask=mask.get("cross_heads"))
        h = self.norm3(x) * (1 + scale2) + shift2
        return x + keep * gate2 * self.feed_forward(h, mask.get("ffn"))


class DiT(nn.Module):
    """config: latent_channels; width; depth, blocks; heads and head_dim; ffn; vocabulary, words known; text_tokens,
    words a caption; text_dim, channels of text embeddings of your own (0: the built-in text encoder)."""

    def __init__(self, latent_channels, width, depth, heads, head_dim, ffn, vocabulary, text_tokens, text_dim=0):
        super().__init__()
        self.config = dict(latent_channels=latent_channels, width=width, depth=depth, heads=heads, head_dim=head_dim,
                           ffn=ffn, vocabulary=vocabulary, text_tokens=text_tokens, text_dim=text_dim)
        self.time_dim, self.head_dim = width // 2, head_dim
        self.recompute = False  # activations, in the backward pass: less memory for more time
        self.text_encoder = TextEncoder(width, vocabulary, text_tokens, text_dim)
        self.embed = nn.Linear(latent_channels, width)
        self.time = nn.Sequential(nn.Linear(self.time_dim, self.time_dim), nn.SiLU(),
                                  nn.Linear(self.time_dim, self.time_dim), nn.SiLU())
        self.modulation = nn.Linear(self.time_dim, 6 * width)
        self.blocks = nn.ModuleList(Block(width, heads, head_dim, ffn) for _ in range(depth))
        self.norm, self.final_modulation = RMSNorm(width, affine=False), nn.Linear(self.time_dim, 2 * width)
        self.out = nn.Linear(width, latent_channels)
        for layer in (self.modulation, self.final_modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def prepare(self, x_t, t):
        """-> tokens [b, n, width], modulation [b, 6, width], RoPE's cos and sin [n, head_dim / 2], and the embedded
        time [b, time_dim]."""
        x = self.embed(rearrange(x_t, "b c t h w -> b (t h w) c"))
        angles = rope_angles(*x_t.shape[2:], self.head_dim, x.device)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        frequency = 64 ** (torch.arange(self.time_dim // 2, device=x.device) / (self.time_dim // 2 - 1))
        phase = t[:, None] * frequency  # at most 64 radians, which float16 still resolves on a phone
        time = self.time(torch.cat([phase.cos(), phase.sin()], dim=1))
        modulation = rearrange(self.modulation(time), "b (six width) -> b six width", six=6)
        return x, modulation, rope, time

    def forward(self, x_t, t, text, masks=None, return_features=False):
        """x_t: [b, c, t, h, w]; t: [b] in [0, 1], 1 is noise; text: [b, words, width] from `text_encoder`.
        masks: None, or a dict of {0, 1} tensors, `blocks` [depth], `self_heads` and `cross_heads` [depth, heads],
        `ffn` [depth, ffn]. -> velocity [b, c, t, h, w], and if asked the tokens [b, n, width] after each block."""
        x, modulation, rope, time = self.prepare(x_t, t)
        features = []
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, modulation, text, rope, masks and {level: mask[i] for level, mask in masks.items()})
            features.append(x)
        velocity = self.finish(x, time, x_t.shape[2:])
        return (velocity, features) if return_features else velocity

    def finish(self, x, time, size):
        """Tokens [b, n, width] after the last block, the embedded time, size (t, h, w) -> velocity [b, c, t, h, w]."""
        shift, scale = self.final_modulation(time)[:, None].chunk(2, dim=-1)
        x = self.out(self.norm(x) * (1 + scale) + shift)
        return rearrange(x, "b (t h w) c -> b c t h w", **dict(zip("thw", size)))


# --------------------------------------------------------------------------------------------------- rectified flow


def add_noise(x0, noise, t):
    """x_t on the straight line from data to noise; t: [b]."""
    t = t.view(-1, 1, 1, 1, 1)
    return (1 - t) * x0 + t * noise


def flow_loss(dit, x0, tokens, noise, t):
    velocity = dit(add_noise(x0, noise, t), t, dit.text_encoder(tokens))
    return F.mse_loss(velocity.float(), noise - x0)


def guided_velocity(dit, x_t, t, text, empty, cfg):
    """Classifier-free guidance: away from the velocity without a caption, by a factor; cfg = 1 is the caption alone,
    for half the evaluations. text, empty: [b, words, width]."""
    if cfg == 1:
        return dit(x_t, t, text).float()
    with_text, without = dit(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, empty])).float().chunk(2)
    return without + cfg * (with_text - without)


@torch.no_grad()
def sample_euler(dit, noise, tokens, empty_tokens, steps, cfg, path=None):
    """`steps` equal Euler steps from noise [b, c, t, h, w] at t = 1 to latents at t = 0. path: a list that gets, of
    each step, t, x_t, and the clean latents x0 to which the velocity points from there."""
    text, empty = dit.text_encoder(tokens), dit.text_encoder(empty_tokens)
    x, times = noise, torch.linspace(1, 0, steps + 1, device=noise.device)
    for t, t_next in zip(times, times[1:]):
        velocity = guided_velocity(dit, x, t.expand(len(x)), text, empty, cfg)
        if path is not None:
            path.append((t.item(), x, x - t * velocity))
        x = x + (t_next - t) * velocity
    return x


# --------------------------------------------------------------------------------------------------------- the data


class Latents:
    """latents.pt, normalised to mean 0 and deviation 1 a channel, with the captions as the DiT takes them. The latents
    stay on disk: what is not asked for is not in memory."""

    def __init__(self, path):
        file = load(path, "latents")
        self.file, self.latents, self.fingerprint = file, file["latents"], file["fingerprint"]
        self.mean, self.std = (file[k].view(-1, 1, 1, 1) for k in ("mean", "std"))
        n, self.embeddings = file["train_clips"], file["embeddings"]
        self.train, self.test = range(n), range(n, len(self.latents))
        self.captions, self.test_captions = file["captions"][:n], file["captions"][n:]
        self.vocabulary = ["<pad>", *sorted({w for c in set(self.captions) for w in words(c)})]
        self.text_tokens, self.text_dim = max(len(words(c)) for c in set(self.captions)), 0
        if self.embeddings:
            self.text_tokens, self.text_dim = next(iter(self.embeddings.values())).shape
        different = sorted(set(self.captions))  # each caption's input once, and which of them a clip has
        self.text, index = text_input(self.context(), different), {c: i for i, c in enumerate(different)}
        self.caption = torch.tensor([index[c] for c in self.captions])

    def x0(self, indices):
        """Clean latents [b, c, t, h, w] of these clips."""
        return (self.latents[torch.as_tensor(indices)].float() - self.mean) / self.std

    def draw(self, g, empty_share=0.0):
        """Training clips, their captions (some left empty, for CFG; with embeddings of your own: zeros), fresh noise
        and levels: x0 and noise [b, c, t, h, w], tokens [b, words], t [b]."""
        i = g.randint(len(self.train))
        tokens = self.text[self.caption[i]]
        tokens[g.rand() < empty_share] = PAD
        return self.x0(i), tokens, g.randn(*self.latents.shape[1:]), logit_normal(g)

    def context(self):
        """What a checkpoint needs beside the weights, so that sampling needs no data set."""
        return dict(vocabulary=self.vocabulary, text_tokens=self.text_tokens, embeddings=self.embeddings,
                    captions=sorted(set(self.captions)), held_out_captions=self.file["held_out_captions"],
                    latent_shape=list(self.latents.shape[1:]), latent_mean=self.file["mean"],
                    latent_std=self.file["std"])


def logit_normal(g, mean=0.0):
    """Noise levels [b] in (0, 1), most of them in the middle, where the flow is hardest to predict."""
    return torch.sigmoid(mean + g.randn())


def load_dit(path, device, *stages):
    """-> the model in eval mode, and its checkpoint."""
    checkpoint = load(path, *stages)
    with reading(path):
        dit = DiT(**checkpoint["config"])
        dit.load_state_dict(checkpoint["model"])
    return dit.to(device).eval().requires_grad_(False), checkpoint


def context(checkpoint):
    """What Latents.context put into a checkpoint, to hand on to the next stage's."""
    own = ("stage", "config", "model", "metrics", "settings", "history", "timesteps")
    return {k: v for k, v in checkpoint.items() if k not in own}


@torch.no_grad()
def decode(vae, context, x0, precision, batch=32):
    """Normalised latents -> clips [b, 3, t, h, w] in [-1, 1], on the CPU. context: a checkpoint, or Latents.context."""
    if x0.shape[1] != vae.config["latent_channels"]:
        fail(f"the clips have {x0.shape[1]} latent channels, the autoencoder {vae.config['latent_channels']}: "
             "they come from different runs")
    mean, std = (context[k].view(-1, 1, 1, 1).to(x0.device) for k in ("latent_mean", "latent_std"))
    with precision():
        return torch.cat([vae.decode(z * std + mean).float().clamp(-1, 1).cpu()
                          for z in progress(x0.split(batch), "decoding")])


class Samples:
    """--sample-every N: after every N steps four clips side by side, RUN/samples/STAGE-STEP.gif, by the model as it
    then is. Captions and noise are always the same, and not from the training's random numbers, which stay as they
    would be."""

    def __init__(self, stage, args, data, device, steps=1):
        self.stage, self.args, self.context = stage, args, data.context()
        if args.sample_every:
            captions, g = self.context["captions"], torch.Generator().manual_seed(args.seed)
            self.vae = load_vae(args.vae, device)
            self.noises = torch.randn(steps, 4, *data.latents.shape[1:], generator=g).to(device)
            self.tokens = text_input(self.context, [captions[i * len(captions) // 4] for i in range(4)]).to(device)

    def show(self, step, sample):
        """sample: (noises [steps, 4, c, t, h, w], tokens) -> normalised latents [4, c, t, h, w]."""
        if self.args.sample_every and step % self.args.sample_every == 0:
            clips = decode(self.vae, self.context, sample(self.noises, self.tokens), torch.no_grad)
            show_clips(self.args, self.stage, step, clips)


# ---------------------------------------------------------------------------------------------- what a size costs


class Traffic(TorchDispatchMode):
    """Counts the bytes that the operations inside it read and write, as eager PyTorch does: nothing is fused."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view and "view" not in function.__name__:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


def cost(config, latent_shape, recompute=False):
    """What one clip [c, t, h, w] costs a DiT in training, by PyTorch's fake tensors: nothing is allocated or computed.
    -> a dict: params, tokens, forward_flops, step_flops (forward and backward), step_bytes (read and written, without
    the optimiser), activation_bytes (kept for the backward pass, bfloat16 copies of the weights among them); float32
    weights and bfloat16 products, as in training."""
    with FakeTensorMode(), torch.enable_grad(), FlopCounterMode(display=False) as flops, Traffic() as traffic:
        dit, x0, t = DiT(**config), torch.empty(1, *latent_shape), torch.empty(1)
        words, channels = config["text_tokens"], config.get("text_dim")
        tokens = torch.empty(1, words, channels) if channels else torch.empty(1, words).long()
        dit.recompute, kept = recompute, {}
        weights, traffic.bytes = {p.untyped_storage()._cdata for p in dit.parameters()}, 0

        def keep(x):  # what autograd saves; views of one storage count once
            kept[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = flow_loss(dit, x0, tokens, torch.empty_like(x0), t)
        forward = flops.get_total_flops()
        loss.backward()
    return dict(params=count(dit), tokens=math.prod(latent_shape[1:]), forward_flops=forward,
                step_flops=flops.get_total_flops(), step_bytes=traffic.bytes,
                activation_bytes=sum(storage.nbytes() for key, storage in kept.items() if key not in weights))


def planned(preset, size=None):
    """-> the config of a preset's DiT and the latent shape of a clip (frames, height, width), before there is any data:
    captions of `shapes`, or for the paper's sizes 128 embeddings of 4096 channels, as of T5-XXL."""
    vae, own = VAE_PRESETS[preset], PRESETS[preset]
    size, ratio = size or dims(vae["size"]), dims(vae["ratio"])
    check_size(size, ratio)
    config = {k: own[k] for k in ("width", "depth", "heads", "head_dim", "ffn")}
    config |= (dict(vocabulary=17, text_tokens=5, text_dim=0) if preset in ("tiny", "toy") else
               dict(vocabulary=0, text_tokens=128, text_dim=4096))
    config["latent_channels"] = vae["latent_channels"]
    return config, (vae["latent_channels"], 1 + (size[0] - 1) // ratio[0], size[1] // ratio[1], size[2] // ratio[2])


def dry_run(config, latent_shape):
    """Prints what this DiT would cost; -> its parameters."""
    def si(n, units="TGMk "):
        return next(f"{n / scale:.3g} {unit}" for unit, scale in zip(units, (1e12, 1e9, 1e6, 1e3, 1)) if n >= scale)

    with torch.device("meta"):
        dit = DiT(**config)
    block, once, again = dit.blocks[0], cost(config, latent_shape), cost(config, latent_shape, recompute=True)
    print(f"{config['depth']} blocks, {config['heads']} heads of {config['head_dim']}, FFN {config['ffn']}, width "
          f"{config['width']}: {si(once['params'], 'TBMk ')} parameters\n"
          f"  a block: self-attention {si(count(block.self_attention))}, cross-attention "
          f"{si(count(block.cross_attention))}, FFN {si(count(block.feed_forward))}; all "
          f"{si(count(dit.blocks), 'TBMk ')}; text encoder {si(count(dit.text_encoder))}\n"
          f"  a clip: latents {'x'.join(map(str, latent_shape))}, {once['tokens']:,} tokens; one evaluation "
          f"{si(once['forward_flops'])}FLOP\n"
          f"  weights, gradients, AdamW's two moments and EMA, in float32: {si(20 * once['params'])}B")
    for name, c in ("a training step a clip", once), ("  the same with --recompute", again):
        print(f"  {name}: {si(c['step_flops'])}FLOP, {si(c['step_bytes'])}B read and written, "
              f"{si(c['activation_bytes'])}B of activations kept")
    return once["params"]


def main(argv=None):
    p = parser(__doc__, PRESETS)
    p.add_argument("--width", type=positive, help="channels of a token")
    p.add_argument("--depth", type=positive, help="blocks")
    p.add_argument("--heads", type=positive, help="attention heads a block")
    p.add_argument("--head-dim", type=positive, help="channels of a head")
    p.add_argument("--ffn", type=positive, help="hidden channels of the FFN")
    p.add_argument("--cfg-dropout", type=between(0, 1), default=0.1, help="share of captions left empty (default: 0.1)")
    p.add_argument("--latents", type=Path, help="the data set, from vae.py")
    p.add_argument("--out", type=Path, help="the trained DiT")
    p.add_argument("--dry-run", nargs="?", type=dims, const=(), metavar="SIZE",
                   help="only say what the preset costs: parameters, FLOPs, memory; for clips of a SIZE in pixels")
    p.add_argument("--vae", type=Path, help="the autoencoder, from vae.py, for --sample-every")
    training_flags(p)
    args = parse(p, PRESETS, argv, latents="latents.pt", vae="vae.pt", out="dit.pt")
    if args.head_dim % 2:
        fail(f"--head-dim {args.head_dim}: rotary embeddings turn pairs of channels, so it must be even")
    if args.width % 4 or args.width < 8:
        fail(f"--width {args.width}: half of it embeds the time in pairs, so it must be a multiple of 4, such as "
             f"{max(8, round(args.width / 4) * 4)}")
    if args.dry_run is not None:
        config, latent_shape = planned(args.preset, args.dry_run)
        dry_run(config | {k: getattr(args, k) for k in ("width", "depth", "heads", "head_dim", "ffn")}, latent_shape)
        return
    settings = {k: getattr(args, k) for k in ("width", "depth", "heads", "head_dim", "ffn", "cfg_dropout", "steps",
                                              "batch_size", "lr", "optimizer", "ema", "seed")}
    device, precision = set_up(args)
    with reading(args.latents):
        data = Latents(args.latents)
    settings["latents"] = data.fingerprint
    then = command("prune.py", args.run, args.preset)
    stop_if_done([args.out], settings, then)
    torch.manual_seed(args.seed)
    dit = DiT(data.latents.shape[1], args.width, args.depth, args.heads, args.head_dim, args.ffn, len(data.vocabulary),
              data.text_tokens, data.text_dim).to(device)
    dit.recompute = args.recompute
    ema = AveragedModel(dit, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = Optimizer(dit, args, args.steps, precision)
    loss_fn = torch.compile(flow_loss) if args.compile else flow_loss
    samples = Samples("dit", args, data, device)

    loop = Loop("dit", args, settings, args.steps, device, model=dit, ema=ema, optimizer=optimizer,
                draw=lambda g: data.draw(g, args.cfg_dropout))
    for step, (x0, tokens, noise, t) in loop:
        with precision():
            loss = loss_fn(dit, x0, tokens, noise, t)
        optimizer.step(loss)
        ema.update_parameters(dit)
        loop.log(loss=loss.item())
        samples.show(step + 1, lambda noises, tokens: sample_euler(
            ema.module, noises[0], tokens, torch.zeros_like(tokens), 20, 3.0))

    last = {k: sum(v[-50:]) / max(1, len(v[-50:])) for k, v in loop.history.items()}
    metrics = dict(params=count(dit), **last)
    save(args.out, stage="dit", config=dit.config, model=ema.module.state_dict(), metrics=metrics, settings=settings,
         history=loop.history, **data.context())
    finish(args, "dit", metrics, then, loop)


if __name__ == "__main__":
    script(main)

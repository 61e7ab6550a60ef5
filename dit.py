"""The diffusion transformer (DiT): text and noise in, the latents of a video out. The teacher.

Stated by the paper: full 3D self-attention over all tokens of a clip, cross-attention to the text,
rotary position embeddings (RoPE), QK normalisation, RMSNorm throughout; 28 blocks, 32 heads,
FFN 8192, 2.0 B parameters. Our reading (1.91 B): head size 64, so width 2048; QK norm per head, so
that taking a head away leaves the others as they were; no biases in a block; adaLN-single, with
gates that start open; rectified flow; logit-normal noise levels.

    latents x_t [b, c, t, h, w] -> tokens [b, t*h*w, width] --+
                                                               v
    noise level t [b] -> shift, scale, gate --------->  depth x [ self-attention (RoPE over t, h, w)
    caption -> text encoder -> [b, m, width] -------->           cross-attention to m tokens of text
                                                                 FFN ]
                                                               v
                                                       velocity [b, c, t, h, w]

Rectified flow: x_t = (1 - t) x0 + t noise, and the network predicts the velocity noise - x0, the
direction from data to noise. Sampling walks back from t = 1 to t = 0 in Euler steps, with
classifier-free guidance (CFG): 40 steps, each with and without the caption, are the 80 function
evaluations that distill.py brings down to 4.

    python dit.py                                    # runs/tiny/latents.pt -> runs/tiny/dit.pt
    python dit.py --preset server --dry-run          # what a size costs, without training it

Every later stage uses this one class: masked (an argument of `forward`), pruned (a smaller config),
as the discriminator's features (the first K blocks).
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from common import cli, data, files, training
from vae import PRESETS as VAE_PRESETS
from vae import RMSNorm, latent_size

PRESETS = {
    "tiny": dict(
        width=128,           # channels of a token
        depth=7,             # blocks; a quarter of the paper's, as are the heads
        heads=8,             # heads x head_dim is the width, as in our reading of the paper
        head_dim=16,         # channels of a head
        ffn=512,             # hidden channels, four times the width
        steps=780,
        batch_size=32,       # clips per step
        lr=0.04,             # Muon's
        noise_level=0.0,     # mean of the training levels' logit
        optimizer="muon",    # the paper has AdamW
        ema=0.99),           # the average of about the last 100 steps
    "toy": dict(width=192, depth=7, heads=8, head_dim=24, ffn=768, steps=5000, batch_size=32,
                lr=0.03, noise_level=0.8, optimizer="muon", ema=0.998),
    # Stated: depth, heads, FFN, AdamW, its rate. The paper's teacher, on the phone's clips;
    # prune.py cuts the phone's model out of it.
    "mobile": dict(width=2048, depth=28, heads=32, head_dim=64, ffn=8192, steps=200000,
                   batch_size=256, lr=5e-5, noise_level=0.8, optimizer="adamw", ema=0.9995),
}
PRESETS["server"] = PRESETS["mobile"]

TEACHER_STEPS = 40  # stated: with guidance 80 function evaluations
CFG_SCALE = 1.5     # our reading: 3 makes rougher outlines
SIZES = ("width", "depth", "heads", "head_dim", "ffn")

# ------------------------------------------------------------ the text


class TextEncoder(nn.Module):
    """Token ids [b, m], or embeddings [b, m, text_dim] of a text encoder of your own -> text
    [b, m, width]. Padding is zeros and is not masked: position embeddings are learned, so the model
    learns what a padded position means."""

    def __init__(self, width, vocabulary, text_tokens, text_dim):
        super().__init__()
        # The empty caption of classifier-free guidance: padding, or what your encoder gives for it.
        empty = torch.full((text_tokens,), data.PAD)
        if text_dim:
            empty = torch.zeros(text_tokens, text_dim)
        self.register_buffer("empty", empty, persistent=text_dim > 0)
        self.embed = nn.Linear(text_dim, width) if text_dim else nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(text_tokens, width) * 0.02)
        self.norm = RMSNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, prompts):
        return self.out(self.norm(self.embed(prompts) + self.position))


# ------------------------------------------------------------ attention and FFN


def rope_angles(frames, height, width, head_dim, device):
    """Angles [n, head_dim / 2] of 3D RoPE (https://arxiv.org/abs/2104.09864; our reading of how to
    split it), n = frames * height * width. Three eighths of a head's pairs of channels, rounded
    down, stand for height, as many for width, the rest for time; each pair turns at its own
    frequency, from 1 towards 1/100 radian per position, since hardly a grid is longer than 100."""
    pairs = head_dim // 2
    spatial = 3 * pairs // 8
    axes = []
    for length in (frames, height, width):
        axes.append(torch.arange(length, device=device, dtype=torch.float32))
    grid = torch.meshgrid(*axes, indexing="ij")
    angles = []
    for position, axis_pairs in zip(grid, (pairs - 2 * spatial, spatial, spatial)):
        exponent = torch.arange(axis_pairs, device=device, dtype=torch.float32) / axis_pairs
        frequency = 100 ** -exponent
        angles.append(position.reshape(-1, 1) * frequency)
    return torch.cat(angles, dim=1)


def rotate(x, rope):
    """Turns channels i and i + head_dim/2 of x [b, heads, n, head_dim] by their token's angle."""
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of x [b, n, width] to a context [b, m, width], which is x itself in
    self-attention, with QK norm (https://arxiv.org/abs/2010.04245)."""

    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        # Our reading: QK norm over the channels of each head alone, so that a head that is pruned
        # leaves the others as they were; over all heads it would change their scale.
        self.norm_q = RMSNorm(head_dim)
        self.norm_k = RMSNorm(head_dim)
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x, context, rope=None, head_mask=None):
        """rope: cos and sin [n, head_dim / 2]; head_mask: [heads], 1 or 0, on what each head gives,
        before the output projection mixes them."""
        q = rearrange(self.q(x), "b n (heads d) -> b heads n d", heads=self.heads)
        k, v = rearrange(self.kv(context), "b m (two heads d) -> two b heads m d", two=2,
                         heads=self.heads)
        q = self.norm_q(q)
        k = self.norm_k(k)
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
        x = F.scaled_dot_product_attention(q, k, v)  # [b, heads, n, d]
        if head_mask is not None:
            x = x * head_mask[:, None, None]
        return self.out(rearrange(x, "b heads n d -> b n (heads d)"))


class FeedForward(nn.Module):
    """[b, n, width] -> ffn channels, GELU -> [b, n, width]. The exact GELU: its tanh form, usually
    the cheaper one, costs six times as much on a CPU."""

    def __init__(self, width, ffn):
        super().__init__()
        self.up = nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x, channel_mask=None):
        x = F.gelu(self.up(x))  # [b, n, ffn]
        if channel_mask is not None:
            x = x * channel_mask
        return self.down(x)


# ------------------------------------------------------------ the DiT


def modulate(x, shift, scale):
    """x: [b, n, width]; shift, scale: [b, 1, width]."""
    return x * (1 + scale) + shift


class TimestepEmbedder(nn.Module):
    """t [b] in [0, 1] -> [b, dim]: sines and cosines, then two layers."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, t):
        # Our reading: at most 64 radians, which float16 still resolves on a phone.
        frequency = 64 ** (torch.arange(self.dim // 2, device=t.device) / (self.dim // 2 - 1))
        phase = t[:, None] * frequency
        return self.mlp(torch.cat([phase.cos(), phase.sin()], dim=-1))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, FFN. The noise level modulates the first and the
    last, not the cross-attention.

    adaLN-single (PixArt-alpha, https://arxiv.org/abs/2310.00426): one projection of the noise level
    serves all blocks, and each block adds a table of its own to it."""

    def __init__(self, width, heads, head_dim, ffn):
        super().__init__()
        self.norm1 = RMSNorm(width, affine=False)
        self.self_attention = Attention(width, heads, head_dim)
        self.norm2 = RMSNorm(width)
        self.cross_attention = Attention(width, heads, head_dim)
        self.norm3 = RMSNorm(width, affine=False)
        self.feed_forward = FeedForward(width, ffn)
        # Our reading: gates start open and every output projection at zero, so that a new block is
        # the identity and learns at once.
        table = torch.tensor([0.0, 0, 1, 0, 0, 1])  # shift, scale, gate of attention and of FFN
        self.scale_shift_table = nn.Parameter(table[:, None].repeat(1, width))
        for layer in (self.self_attention.out, self.cross_attention.out, self.feed_forward.down):
            nn.init.zeros_(layer.weight)

    def forward(self, x, modulation, text, rope, masks):
        """x: [b, n, width]; modulation: [b, 6, width]; text: [b, m, width]; rope: cos and sin
        [n, head_dim / 2]; masks: of this block, as in DiT.forward. -> [b, n, width]"""
        block_mask = masks.get("blocks", 1)
        signals = (modulation + self.scale_shift_table).unsqueeze(2)  # [b, 6, 1, width]
        shift1, scale1, gate1, shift2, scale2, gate2 = signals.unbind(1)
        # Under autocast x, the residual stream, is float32: cast once, for q and kv.
        hidden = modulate(self.norm1(x), shift1, scale1).type_as(modulation)
        update = self.self_attention(hidden, hidden, rope, masks.get("self_heads"))
        x = x + block_mask * gate1 * update
        update = self.cross_attention(self.norm2(x), text, head_mask=masks.get("cross_heads"))
        x = x + block_mask * update
        update = self.feed_forward(modulate(self.norm3(x), shift2, scale2), masks.get("ffn"))
        return x + block_mask * gate2 * update


class FinalLayer(nn.Module):
    """Tokens [b, n, width], the embedded noise level [b, time_dim], grid (frames, height, width)
    -> velocity [b, c, t, h, w]. Starts at zero: an untrained DiT is the zero function."""

    def __init__(self, width, time_dim, latent_channels):
        super().__init__()
        self.norm = RMSNorm(width, affine=False)
        self.modulation = nn.Linear(time_dim, 2 * width)
        self.linear = nn.Linear(width, latent_channels)
        for layer in (self.modulation, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t_embedding, grid):
        frames, height, width = grid
        shift, scale = self.modulation(t_embedding).unsqueeze(1).chunk(2, dim=-1)
        x = self.linear(modulate(self.norm(x), shift, scale))  # [b, n, c]
        return rearrange(x, "b (t h w) c -> b c t h w", t=frames, h=height, w=width)


class DiT(nn.Module):
    """depth: blocks; vocabulary: number of known words, padding included; text_tokens: tokens per
    caption; text_dim: channels of text embeddings of your own (0: the built-in text encoder).
    `config` rebuilds it."""

    def __init__(self, latent_channels, width, depth, heads, head_dim, ffn, vocabulary, text_tokens,
                 text_dim=0):
        super().__init__()
        self.config = dict(latent_channels=latent_channels, width=width, depth=depth, heads=heads,
                           head_dim=head_dim, ffn=ffn, vocabulary=vocabulary,
                           text_tokens=text_tokens, text_dim=text_dim)
        self.gradient_checkpointing = False
        time_dim = width // 2
        self.text_encoder = TextEncoder(width, vocabulary, text_tokens, text_dim)
        self.x_embedder = nn.Linear(latent_channels, width)
        self.t_embedder = TimestepEmbedder(time_dim)
        self.modulation = nn.Linear(time_dim, 6 * width)  # adaLN-single: one for all blocks
        self.blocks = nn.ModuleList(Block(width, heads, head_dim, ffn) for _ in range(depth))
        self.final_layer = FinalLayer(width, time_dim, latent_channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def run_block(self, block, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return recompute(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def embed_inputs(self, x_t, t):
        """-> tokens [b, n, width], modulation [b, 6, width], RoPE's cos and sin [n, head_dim / 2],
        and the embedded noise levels [b, width / 2]."""
        x = self.x_embedder(rearrange(x_t, "b c t h w -> b (t h w) c"))
        angles = rope_angles(*x_t.shape[2:], self.config["head_dim"], x.device)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        t_embedding = self.t_embedder(t)
        modulation = self.modulation(t_embedding).unflatten(1, (6, -1))
        return x, modulation, rope, t_embedding

    def forward(self, x_t, t, text, masks=None, return_features=False):
        """x_t: [b, c, t, h, w]; t: noise levels [b] in [0, 1], 1 is noise; text: [b, m, width] from
        `text_encoder`. masks: None, or {0, 1} tensors, `blocks` [depth], `self_heads` and
        `cross_heads` [depth, heads], `ffn` [depth, ffn].
        -> velocity [b, c, t, h, w], and if asked the tokens [b, n, width] after each block."""
        x, modulation, rope, t_embedding = self.embed_inputs(x_t, t)
        masks = masks or {}
        features = []
        for i, block in enumerate(self.blocks):
            block_masks = {name: mask[i] for name, mask in masks.items()}
            x = self.run_block(block, x, modulation, text, rope, block_masks)
            if return_features:
                features.append(x)
        velocity = self.final_layer(x, t_embedding, x_t.shape[2:])
        return (velocity, features) if return_features else velocity


# ------------------------------------------------------------ from a file


def load_dit(path, device, *stages, latents=None):
    """-> the model in eval mode, and its checkpoint. latents: what it must have been trained on."""
    checkpoint = files.load(path, *stages)
    with files.reading(path):
        dit = DiT(**checkpoint["config"])
        dit.load_state_dict(checkpoint["model"])
    if latents is not None:
        files.check_settings(path, checkpoint["settings"], dict(latents_checksum=latents.checksum))
    return dit.to(device).eval().requires_grad_(False), checkpoint


# ------------------------------------------------------------ what a size costs


def forward_flops(config, n):
    """One evaluation of one clip of n tokens: the products and attention of all blocks, in
    multiply-adds of two operations each."""
    width = config["width"]
    m = config["text_tokens"]
    inner = config["heads"] * config["head_dim"]
    self_attention = 4 * width * inner * n + 2 * inner * n ** 2  # q, k, v, out; scores, their sum
    cross_attention = 2 * width * inner * (n + m) + 2 * inner * n * m
    feed_forward = 2 * width * config["ffn"] * n
    return 2 * config["depth"] * (self_attention + cross_attention + feed_forward)


def planned_config(preset):
    """The DiT of a preset before there is any data: captions of `shapes`, or at the paper's sizes
    128 embeddings of 4096 channels (our reading)."""
    config = {key: PRESETS[preset][key] for key in SIZES}
    config["latent_channels"] = VAE_PRESETS[preset]["latent_channels"]
    if preset in ("tiny", "toy"):
        return config | dict(vocabulary=17, text_tokens=5, text_dim=0)
    return config | dict(vocabulary=0, text_tokens=128, text_dim=4096)


def print_cost(name, config, args):
    """--dry-run: prints what a DiT is and what a clip costs. -> its parameters"""
    preset = VAE_PRESETS[args.preset]
    clip_size = args.dry_run or cli.size(preset["size"])  # --dry-run alone is ()
    n = math.prod(latent_size(clip_size, cli.size(preset["ratio"])))
    with torch.device("meta"):
        params = training.count_parameters(DiT(**config))
    print(f"{name}: {config['depth']} blocks, {config['heads']} heads, FFN {config['ffn']}, width "
          f"{config['width']}: {params / 1e6:,.4g} M parameters; one evaluation of {n:,} tokens "
          f"{forward_flops(config, n) / 1e12:.3g} TFLOP")
    return params


def add_dry_run(p):
    p.add_argument("--dry-run", nargs="?", type=cli.size, const=(), metavar="TxHxW",
                   help="only print what the preset's size costs, on clips of this size")


# ------------------------------------------------------------ rectified flow


def per_clip(t):
    """Levels [b] -> [b, 1, 1, 1, 1], to be combined with latents."""
    return t.view(-1, 1, 1, 1, 1)


def add_noise(x0, noise, t):
    """x_t on the straight line from x0 to noise, both [b, c, t, h, w]; t: [b]."""
    return (1 - per_clip(t)) * x0 + per_clip(t) * noise


def logit_normal(n, generator, mean=0.0):
    """Noise levels [n] in (0, 1): the sigmoid of N(mean, 1) (https://arxiv.org/abs/2403.03206).
    With mean 0 most are in the middle, where the velocity is hardest to predict; a negative mean is
    nearer to data, a positive one to noise: the more numbers a clip's latents have, the more noise
    it takes to hide what they show."""
    return torch.sigmoid(mean + torch.randn(n, generator=generator))


def flow_loss(dit, x0, prompts, noise, t, masks=None):
    """Flow matching (https://arxiv.org/abs/2210.02747) along rectified flow's straight lines
    (https://arxiv.org/abs/2209.03003): the mean squared error of the velocity. x0, noise:
    [b, c, t, h, w]; prompts: [b, m] or [b, m, text_dim]; t: [b]."""
    velocity = dit(add_noise(x0, noise, t), t, dit.text_encoder(prompts), masks)
    return F.mse_loss(velocity.float(), noise - x0)


def guided_velocity(dit, x_t, t, text, empty, cfg):
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598): velocity without the caption +
    cfg * (with - without). cfg = 1 is the caption alone, for half the evaluations. text, empty:
    [b, m, width]. -> [b, c, t, h, w]"""
    if cfg == 1:
        return dit(x_t, t, text).float()
    both = dit(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, empty])).float()
    conditional, unconditional = both.chunk(2)
    return unconditional + cfg * (conditional - unconditional)


@torch.no_grad()
def sample_euler(dit, noise, prompts, steps, cfg):
    """The teacher's sampler: integrates the ODE from noise [b, c, t, h, w] at t = 1 to latents at
    t = 0 in `steps` equal Euler steps along the velocity. With cfg other than 1 a step costs two
    evaluations: 80 for 40 steps. Yields t (a 0-dimensional tensor), x_t, and the clean x0 to which
    the velocity points; the last x0 is the sample."""
    text = dit.text_encoder(prompts)
    empty = dit.text_encoder(dit.text_encoder.empty.expand_as(prompts))
    x_t = noise
    levels = torch.linspace(1, 0, steps + 1, device=noise.device)
    for t, t_next in zip(levels, levels[1:]):
        velocity = guided_velocity(dit, x_t, t.expand(len(x_t)), text, empty, cfg)
        yield t, x_t, x_t - t * velocity
        x_t = x_t + (t_next - t) * velocity


# ------------------------------------------------------------ the training


def draw_batch(latents, args, stage, step):
    """What a step of flow matching trains on, from (stage, seed, step, process) alone, so that a
    resumed run repeats an unbroken one. -> x0 [b, c, t, h, w], prompts [b, m], noise, t [b]"""
    g = training.step_generator(stage, args.seed, step)
    is_pictures = training.is_picture_step(args.picture_share, stage, args.seed, step)
    batch_size = training.local_batch_size(args)
    x0, prompts = latents.draw(g, batch_size, args.cfg_dropout, is_pictures)
    noise = torch.randn(x0.shape, generator=g)
    t = logit_normal(batch_size, g, args.noise_level)
    return x0, prompts, noise, t


def parse_arguments(argv):
    p = cli.make_parser(__doc__, PRESETS, argv)
    p.add_argument("--width", type=cli.positive, help="channels of a token")
    p.add_argument("--depth", type=cli.positive, help="blocks")
    p.add_argument("--heads", type=cli.positive, help="attention heads per block")
    p.add_argument("--head-dim", type=cli.positive, help="channels of a head")
    p.add_argument("--ffn", type=cli.positive, help="hidden channels of the FFN")
    p.add_argument("--cfg-dropout", type=cli.number(0, 1), default=0.1,
                   help="fraction of captions left empty, for classifier-free guidance")
    p.add_argument("--noise-level", type=cli.number(-20, 20),
                   help="noise level t in training: mean of its logit (std 1); prune.py takes the "
                        "teacher's")
    cli.add_file(p, "--latents", "latents.pt", "the data set, from vae.py")
    cli.add_file(p, "--out", "dit.pt", "the trained DiT")
    cli.add_training_flags(p)
    add_dry_run(p)
    args = p.parse_args(argv)
    if args.head_dim % 2 or args.head_dim < 6 or args.width % 4 or args.width < 8:
        cli.exit_with_error(
            "--head-dim must be even and at least 6, since RoPE turns pairs of channels for time, "
            "height and width; --width a multiple of 4 and at least 8")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    sizes = {key: getattr(args, key) for key in SIZES}
    if args.dry_run is not None:
        print_cost("DiT", planned_config(args.preset) | sizes, args)
        return
    device, precision = training.set_up(args)
    latents = data.Latents(args.latents)
    settings = cli.settings_of(args) | dict(latents_checksum=latents.checksum)
    training.stop_if_done([args.out], settings, "dit", "prune.py")

    torch.manual_seed(args.seed)
    dit = DiT(latent_channels=latents.metadata["latent_shape"][0], text_dim=latents.text_dim,
              vocabulary=len(latents.metadata["vocabulary"]),
              text_tokens=latents.metadata["text_tokens"], **sizes).to(device)
    dit.text_encoder.empty[:] = latents.empty
    dit.gradient_checkpointing = args.gradient_checkpointing
    ema = training.average_weights(dit, args)
    optimizer = training.Optimizer(dit, args.optimizer, args.lr)
    loss_fn = torch.compile(flow_loss) if args.compile else flow_loss

    def draw(step):
        return draw_batch(latents, args, "dit", step)

    loop = training.Loop("dit", args, settings, args.steps, device, draw, model=dit, ema=ema,
                         optimizer=optimizer)
    for step, (x0, prompts, noise, t) in loop:
        optimizer.set_lr(training.warmup_linear(step, args.steps))
        dit.zero_grad()
        with precision():
            loss = loss_fn(dit, x0, prompts, noise, t)
        loss.backward()
        training.average_gradients(dit.parameters())
        grad_norm = nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(dit)
        loop.log(loss=loss, grad_norm=grad_norm)

    last_losses = loop.history["loss"][-50:]
    metrics = dict(params=training.count_parameters(dit), loss=sum(last_losses) / len(last_losses))
    # `config` rebuilds the DiT; the metadata has what sampling needs beside it: vocabulary, latent
    # shape, captions.
    files.save(args.out, stage="dit", config=dit.config, model=ema.module.state_dict(),
               metrics=metrics, settings=settings, history=loop.history, **latents.metadata)
    training.finish(args, "dit", metrics, "prune.py", loop)


if __name__ == "__main__":
    cli.run_script(main)

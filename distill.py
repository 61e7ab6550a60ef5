"""Adversarial step distillation: 40 guided steps (80 network evaluations) become 4 steps (4 evaluations).

The idea (paper, adversarial step distillation). The student learns to jump from any of four noise levels straight to
clean latents. A discriminator, made for a DiT, tells its results from real latents. Stated: it inherits the
generator's first K blocks, frozen, as a time-conditioned feature parser, and adds learnable layers with full 3D
attention and cross-attention to the text. Result: 4 steps without classifier-free guidance (CFG).

    x_t at one of 4 levels --> generator (starts as the pruned DiT) --> x0 = x_t - t * velocity
                                                                         |  noise again, level s, real ones alike
    caption, s, noisy real or generated latents --> K frozen blocks --> learnable blocks --> one score a token
                                                    (never trained)     3D attention,        -> mean: real or not
                                                                        cross-attention
Our reading: the four levels; the hinge loss; real and generated latents get the same noise at the same low level s
before they are judged; the discriminator gets a head start, or the student outruns it; x0 is noised again between
sampling steps; a distillation term pulls x0 towards the end of the teacher's CFG trajectory from the same x_t;
optionally a smoothness term on the discriminator (approximate R1).

    python distill.py                   # runs/tiny/pruned.pt, dit.pt, latents.pt -> student.pt, discriminator.pt
    python distill.py --adversarial 0   # the distillation term alone
    python distill.py --distillation 0 --adversarial 1 --lr 0.001 --discriminator-ahead 20     # the adversary alone
"""
import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dit import Block, DiT, Latents, Samples, add_noise, context, guided_velocity, load_dit, logit_normal
from vae import (Loop, Optimizer, RMSNorm, between, check_settings, command, count, fail, fingerprint, finish, load,
                 parse, parser, positive, reading, save, script, set_up, stop_if_done, training_flags)

PRESETS = {
    "tiny": dict(frozen_blocks=3, learned_blocks=1, teacher_steps=8, steps=100, batch_size=32, lr=0.02,
                 discriminator_lr=0.02, discriminator_ahead=10, optimizer="muon", ema=0.95),
    "toy": dict(frozen_blocks=5, learned_blocks=2, teacher_steps=10, steps=3000, batch_size=64, lr=0.002,
                discriminator_lr=0.01, discriminator_ahead=100, optimizer="muon", ema=0.999),
    "mobile": dict(frozen_blocks=10, learned_blocks=4, teacher_steps=10, steps=20000, batch_size=128, lr=5e-6,
                   discriminator_lr=2e-5, discriminator_ahead=500, optimizer="adamw", ema=0.999),
    "server": dict(frozen_blocks=10, learned_blocks=4, teacher_steps=10, steps=20000, batch_size=128, lr=5e-6,
                   discriminator_lr=2e-5, discriminator_ahead=500, optimizer="adamw", ema=0.999),
}

# ---------------------------------------------------------------------------------------------------- the generator


def predict_x0(dit, x_t, t, text):
    """The generator: from x_t at level t [b] straight to clean latents, along the predicted velocity."""
    return x_t - t.view(-1, 1, 1, 1, 1) * dit(x_t, t, text).float()


def student_times(steps, shift=3.0):
    """The levels at which a `steps`-step student starts its jumps: 1, 9/10, 3/4, 1/2 for four. Shifted towards noise,
    where what the clip shows is decided; from 1/2 on hardly anything is."""
    t = torch.linspace(1, 0, steps + 1)[:-1]
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def sample_student(dit, noises, tokens, path=None):
    """One jump to x0 a step, and noise again in between, to the next level. No guidance: one evaluation a step.

    noises: [steps, b, c, t, h, w], a fresh one for each step. -> x0 [b, c, t, h, w]. path: as in sample_euler."""
    text, x0 = dit.text_encoder(tokens), torch.zeros_like(noises[0])
    for t, noise in zip(student_times(len(noises)), noises):
        t = t.to(noise.device).expand(len(noise))
        x_t = add_noise(x0, noise, t)
        x0 = predict_x0(dit, x_t, t, text)
        if path is not None:
            path.append((t[0].item(), x_t, x0))
    return x0


@torch.no_grad()
def teacher_endpoint(teacher, x_t, t, tokens, cfg, steps):
    """Where the teacher's CFG trajectory from x_t ends: Euler steps of 1 / steps (the last may be shorter) from each
    clip's own level t [b] down to 0, so that a clip at t = 1/4 takes a quarter of them."""
    text, empty = teacher.text_encoder(tokens), teacher.text_encoder(torch.zeros_like(tokens))
    x, t = x_t.clone(), t.clone()
    while (on := t > 1e-4).any():
        step = t[on].clamp(max=1 / steps)
        velocity = guided_velocity(teacher, x[on], t[on], text[on], empty[on], cfg)
        x[on] = x[on] - step.view(-1, 1, 1, 1, 1) * velocity
        t[on] -= step
    return x


# ------------------------------------------------------------------------------------------------ the discriminator


class Convolution(nn.Module):
    """A 3x3x3 convolution over the grid of tokens, in the place of a learnable block: what earlier designs use."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.conv = RMSNorm(width), nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x, size):
        grid = rearrange(self.norm(x), "b (t h w) c -> b c t h w", **dict(zip("thw", size)))
        return x + rearrange(F.silu(self.conv(grid)), "b c t h w -> b (t h w) c")


class Discriminator(nn.Module):
    """K frozen blocks of a DiT as features of noisy latents at level s, then learnable blocks of the same kind.

    Other designs to compare with: no learnable block leaves a linear head a token; head "convolution"; K = 0 learns
    all blocks from scratch (the embeddings of words, tokens and time stay inherited); without time conditioning the
    parser is told that every level is 0."""

    def __init__(self, dit, frozen_blocks, learned_blocks, head="attention", time_conditioning=True):
        super().__init__()
        c = dit.config
        if not 0 <= frozen_blocks <= c["depth"]:
            raise ValueError(f"{frozen_blocks} frozen blocks: the generator has {c['depth']}")
        if head not in ("attention", "convolution"):
            raise ValueError(f"head {head}: it is attention or convolution")
        self.time_conditioning = time_conditioning
        self.parser = copy.deepcopy(dit).requires_grad_(False)
        self.parser.blocks = self.parser.blocks[:frozen_blocks]
        del self.parser.norm, self.parser.final_modulation, self.parser.out  # what only a velocity needs
        self.blocks = nn.ModuleList(Block(c["width"], c["heads"], c["head_dim"], c["ffn"]) if head == "attention" else
                                    Convolution(c["width"]) for _ in range(learned_blocks))
        self.norm, self.out = RMSNorm(c["width"]), nn.Linear(c["width"], 1)

    def forward(self, x_s, s, tokens):
        """x_s: noisy latents [b, c, t, h, w]; s: their level [b]; tokens: captions. -> scores [b], above 0: real."""
        text = self.parser.text_encoder(tokens)
        x, modulation, rope, _ = self.parser.prepare(x_s, s * self.time_conditioning)
        for block in [*self.parser.blocks, *self.blocks]:
            x = block(x, x_s.shape[2:]) if isinstance(block, Convolution) else block(x, modulation, text, rope)
        return self.out(self.norm(x)).squeeze(-1).mean(dim=1).float()


def discriminator_loss(discriminator, real, fake, s, noise, tokens, r1=0.0, disturbance=None):
    """Hinge loss on real and generated latents with the same noise at the same level; r1 weighs how much a small
    disturbance [b, c, t, h, w] of the real ones changes their score. -> the loss, and how often each is told right."""
    both = torch.cat([add_noise(real, noise, s), add_noise(fake, noise, s)])
    on_real, on_fake = discriminator(both, torch.cat([s, s]), torch.cat([tokens, tokens])).chunk(2)
    loss = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
    if r1:
        disturbed = add_noise(real, noise, s) + 0.01 * disturbance
        loss = loss + r1 * (discriminator(disturbed, s, tokens) - on_real).square().mean() / 0.01 ** 2
    return loss, ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2


def load_discriminator(path, device):
    """-> the trained discriminator, and the settings of its training."""
    checkpoint = load(path, "discriminator")
    config = checkpoint["config"]
    discriminator = Discriminator(DiT(**config.pop("dit")), **config)
    discriminator.load_state_dict(checkpoint["model"])
    return discriminator.to(device).eval().requires_grad_(False), checkpoint["settings"]


def main(argv=None):
    p = parser(__doc__, PRESETS)
    p.add_argument("--sampling-steps", type=positive, default=4,
                   help="steps that the student learns to sample in (default: 4)")
    p.add_argument("--frozen-blocks", type=between(0, kind=int),
                   help="K, blocks of the generator that the discriminator inherits")
    p.add_argument("--learned-blocks", type=between(0, kind=int),
                   help="blocks that the discriminator learns on top; 0: one linear layer")
    p.add_argument("--discriminator-head", default="attention", choices=["attention", "convolution"],
                   help="what those blocks are: the paper's attention to all tokens and the text, or convolutions "
                        "(default: attention)")
    p.add_argument("--time-conditioning", action=argparse.BooleanOptionalAction, default=True,
                   help="tell the discriminator the noise level (default: yes)")
    p.add_argument("--discriminator-lr", type=between(1e-12),
                   help="peak learning rate of the discriminator, by the same --optimizer")
    p.add_argument("--discriminator-ahead", type=between(0, kind=int),
                   help="steps that the discriminator learns before the student hears it")
    p.add_argument("--adversarial", type=between(0), default=0.03, help="weight of the adversary (default: 0.03)")
    p.add_argument("--distillation", type=between(0), default=1.0, help="weight of the distillation term (default: 1)")
    p.add_argument("--r1", type=between(0), default=0.0, help="weight of the smoothness term (default: 0)")
    p.add_argument("--cfg", type=between(0), default=3.0, help="guidance scale of the teacher (default: 3)")
    p.add_argument("--teacher-steps", type=positive, help="Euler steps of the teacher from x_t to its end")
    p.add_argument("--noise-level", type=between(-20, 20), default=-2.5,
                   help="mean of the logit of the level at which the discriminator looks (default: -2.5, about 0.08)")
    p.add_argument("--discriminator", type=Path, help="the trained discriminator, written if --adversarial is not 0")
    p.add_argument("--pruned", type=Path, help="where the student starts, from prune.py")
    p.add_argument("--teacher", type=Path, help="the CFG teacher, from dit.py")
    p.add_argument("--latents", type=Path, help="the data set, from vae.py")
    p.add_argument("--out", type=Path, help="the few-step student")
    p.add_argument("--vae", type=Path, help="the autoencoder, from vae.py, for --sample-every")
    training_flags(p)
    args = parse(p, PRESETS, argv, pruned="pruned.pt", teacher="dit.pt", latents="latents.pt", vae="vae.pt",
                 discriminator="discriminator.pt", out="student.pt")
    settings = {k: getattr(args, k) for k in (
        "sampling_steps", "frozen_blocks", "learned_blocks", "discriminator_head", "time_conditioning",
        "discriminator_lr", "discriminator_ahead", "adversarial", "distillation", "r1", "cfg", "teacher_steps",
        "noise_level", "steps", "batch_size", "lr", "optimizer", "ema", "seed")}
    if not (args.adversarial or args.distillation):
        fail("--adversarial 0 --distillation 0 leaves nothing to learn from")
    device, precision = set_up(args)
    teacher, teacher_checkpoint = load_dit(args.teacher, device, "dit")
    start, checkpoint = load_dit(args.pruned, device, "pruned", "dit")
    with reading(args.latents):
        data = Latents(args.latents)
    for path, made in (args.teacher, teacher_checkpoint), (args.pruned, checkpoint):
        check_settings(path, made["settings"], {"latents": data.fingerprint})
    settings |= {"latents": data.fingerprint, "teacher": fingerprint(teacher.parameters()),
                 "pruned": fingerprint(start.parameters())}
    then = command("sample.py", args.run, args.preset, "--score")
    stop_if_done([args.out] + [args.discriminator] * bool(args.adversarial), settings, then)

    torch.manual_seed(args.seed)
    student = copy.deepcopy(start).train().requires_grad_(True)
    student.recompute = args.recompute
    design = dict(frozen_blocks=args.frozen_blocks, learned_blocks=args.learned_blocks, head=args.discriminator_head,
                  time_conditioning=args.time_conditioning)
    try:
        discriminator = Discriminator(start, **design).to(device)
    except ValueError as error:
        fail(f"--frozen-blocks: {error}")
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = Optimizer(student, args, args.steps, precision)
    d_optimizer = Optimizer(discriminator, args, args.steps, precision, args.discriminator_lr)
    predict = torch.compile(predict_x0) if args.compile else predict_x0
    times, shape = student_times(args.sampling_steps), data.latents.shape[1:]

    def draw(g):  # and besides: which of the student's levels; the level, noise and disturbance for the discriminator
        real, tokens, noise, _ = data.draw(g)
        return (real, tokens, noise, times[g.randint(len(times))], logit_normal(g, args.noise_level), g.randn(*shape),
                g.randn(*shape))

    samples = Samples("student", args, data, device, args.sampling_steps)
    loop = Loop("distill", args, settings, args.steps, device, draw, student=student, discriminator=discriminator,
                ema=ema, optimizer=optimizer, d_optimizer=d_optimizer)
    for step, (real, tokens, noise, t, s, s_noise, disturbance) in loop:
        x_t = add_noise(real, noise, t)
        loss, values = 0.0, {}
        with precision():
            fake = predict(student, x_t, t, student.text_encoder(tokens))
            if args.distillation:
                target = teacher_endpoint(teacher, x_t, t, tokens, args.cfg, args.teacher_steps)
                # Pseudo-Huber: where the outcome is open, a squared error would want the blurred mean of them all.
                values["distillation"] = ((fake - target).square() + 0.01).sqrt().mean()
                loss = loss + args.distillation * values["distillation"]
        if args.adversarial:
            with precision():
                d_loss, told = discriminator_loss(discriminator, real, fake.detach(), s, s_noise, tokens, args.r1,
                                                   disturbance)
            d_optimizer.step(d_loss)
            with precision():
                values["generator"] = -discriminator(add_noise(fake, s_noise, s), s, tokens).mean()
            values |= {"hinge": d_loss, "told_right": told}
            heard = step >= args.discriminator_ahead
            loss = loss + heard * args.adversarial * values["generator"]
        optimizer.step(loss)
        ema.update_parameters(student)
        loop.log(**{name: value.item() for name, value in values.items()})
        samples.show(step + 1, lambda noises, tokens: sample_student(ema.module, noises, tokens))

    last = {k: sum(v[-20:]) / len(v[-20:]) for k, v in loop.history.items()}
    metrics = dict(params=count(student), discriminator_params=count(discriminator), evaluations=args.sampling_steps,
                   **last)
    if args.adversarial:  # no later stage needs it; sample.py --report shows what it says
        save(args.discriminator, stage="discriminator", config=dict(dit=start.config, **design),
             model=discriminator.state_dict(), metrics=metrics, settings=settings)
    save(args.out, stage="student", config=student.config, model=ema.module.state_dict(), metrics=metrics,
         settings=settings, history=loop.history, timesteps=times.tolist(), **context(checkpoint))
    finish(args, "distill", metrics, then, loop)


if __name__ == "__main__":
    script(main)

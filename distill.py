"""Adversarial step distillation: 40 guided steps (80 evaluations) become 4 steps (4 evaluations).

The idea (paper, adversarial step distillation). The student learns to jump from any of four noise
levels straight to clean latents (our reading). A discriminator, made for a DiT, tells the student's
results from real latents. Stated: it inherits the generator's first K blocks, frozen, as a
time-conditioned feature parser, and adds learnable layers with full 3D attention and
cross-attention to the text. Result: 4 steps without classifier-free guidance (CFG).

    x_t at one of 4 levels --> the student, which  --> x0 = x_t - t * velocity
                               starts as pruned.pt       |  noise again, level s,
    caption, s, noisy real or generated latents          v  on real ones as well
         --> K frozen blocks --> trainable blocks --> one score per token --> mean: real or not
             (never trained)     (3D attention, cross-attention)

Our reading: the four levels; the hinge loss; the discriminator sees real and generated latents with
the same noise at the same low level s (logit-normal, median 0.08); the shared modulation is frozen,
too; the adversarial loss is off during some warm-up steps, or the student overpowers the
discriminator; x0 is noised again between sampling steps; a distillation term, pseudo-Huber, pulls
x0 towards the end of the teacher's CFG trajectory from the same x_t, in --teacher-steps Euler steps
(4 at tiny, not sampling's 40).

    python distill.py                   # pruned.pt, dit.pt -> student.pt, discriminator.pt
    python distill.py --run runs/x --adversarial 0    # the distillation term alone
    python distill.py --run runs/y --distillation 0 --adversarial 1 --lr 0.001 --d-warmup 0.2

For other runs copy latents.pt, dit.pt and pruned.pt into a folder of their own.
"""
import argparse
import copy
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import cli, data, files, training
from dit import CFG_SCALE, Block, add_noise, guided_velocity, load_dit, logit_normal, per_clip
from vae import RMSNorm

PRESETS = {
    "tiny": dict(
        frozen_blocks=3,     # K: of the generator's 5
        trainable_blocks=1,  # of the same kind, on top
        teacher_steps=4,     # Euler steps, for the target
        steps=65,
        batch_size=32,       # clips per step
        lr=0.02,             # half of the teacher's: the student starts as a trained model
        d_lr=0.02,           # the discriminator's, as the student's
        d_warmup=0.1,        # fraction of the steps in which the adversarial loss is off
        optimizer="muon",    # the paper has AdamW
        ema=0.95),           # the average of about the last 20 steps
    "toy": dict(frozen_blocks=3, trainable_blocks=1, teacher_steps=4, steps=350, batch_size=32,
                lr=0.02, d_lr=0.02, d_warmup=0.1, optimizer="muon", ema=0.98),
    "mobile": dict(frozen_blocks=10, trainable_blocks=4, teacher_steps=10, steps=20000,
                   batch_size=128, lr=5e-6, d_lr=2e-5, d_warmup=0.025, optimizer="adamw",
                   ema=0.999),
}
PRESETS["server"] = PRESETS["mobile"]

# ------------------------------------------------------------ the generator


def predict_x0(dit, x_t, t, text):
    """The generator: from x_t [b, c, t, h, w] at level t [b] straight to clean latents, along the
    velocity."""
    return x_t - per_clip(t) * dit(x_t, t, text).float()


def student_timesteps(steps, shift=3.0):
    """The levels ("timesteps" in files) at which a student's jumps start: 1, 0.9, 0.75, 0.5 for
    four. Shifted towards noise (https://arxiv.org/abs/2403.03206), where what the clip shows is
    decided: below 1/2 hardly anything is. Later stages read them from the checkpoint."""
    t = torch.linspace(1, 0, steps + 1)[:-1]
    return (shift * t / (1 + (shift - 1) * t)).tolist()


@torch.no_grad()
def sample_student(dit, noise_per_step, prompts, timesteps):
    """The student's sampler: at each of its levels one jump along the velocity to clean latents x0,
    then fresh noise up to the next level. (The teacher's, sample_euler, moves x_t a little way
    along it instead, and draws no noise.) No guidance: one evaluation per step. noise_per_step:
    [steps, b, c, t, h, w]. Yields t, x_t and x0 of each step; the last x0 is the sample."""
    text = dit.text_encoder(prompts)
    x0 = torch.zeros_like(noise_per_step[0])  # at t = 1 it weighs nothing
    for level, noise in zip(timesteps, noise_per_step):
        t = torch.full((len(x0),), level, device=x0.device)
        x_t = add_noise(x0, noise, t)
        x0 = predict_x0(dit, x_t, t, text)
        yield level, x_t, x0


@torch.no_grad()
def teacher_endpoint(teacher, x_t, t, prompts, cfg, steps):
    """Where the teacher's CFG trajectory from x_t, noised real latents, ends: equal Euler steps
    from each clip's own level t [b] down to 0."""
    text = teacher.text_encoder(prompts)
    empty = teacher.text_encoder(teacher.text_encoder.empty.expand_as(prompts))
    x = x_t
    for i in range(steps):
        velocity = guided_velocity(teacher, x, t * (1 - i / steps), text, empty, cfg)
        x = x - per_clip(t) / steps * velocity
    return x


# ------------------------------------------------------------ the discriminator


class Convolution(nn.Module):
    """A 3x3x3 convolution over the grid of tokens [b, n, width], in the place of a trainable block:
    our stand-in for earlier designs, to compare with."""

    def __init__(self, width):
        super().__init__()
        self.norm = RMSNorm(width)
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x, grid):
        frames, height, width = grid
        features = rearrange(self.norm(x), "b (t h w) c -> b c t h w", t=frames, h=height, w=width)
        return x + rearrange(F.silu(self.conv(features)), "b c t h w -> b (t h w) c")


class Discriminator(nn.Module):
    """K frozen blocks of a DiT as features of noisy latents at level s, then trainable blocks of
    the same kind. All that comes from the DiT is frozen: embedders, text encoder, modulation, K
    blocks; the added blocks, norm and linear layer train. Frozen weights still pass the gradient
    on to their input: through them the adversarial loss reaches the student. Raises ValueError for
    more blocks than the DiT has.

    Designs to compare with: no trainable block leaves a linear layer per token; head "convolution";
    K = 0 learns all blocks from scratch (embedders and modulation stay inherited);
    without time conditioning all of it is told that every level is 0."""

    def __init__(self, dit, frozen_blocks, trainable_blocks, head="attention",
                 time_conditioning=True):
        super().__init__()
        config = dit.config
        width = config["width"]
        if not 0 <= frozen_blocks <= config["depth"]:
            raise ValueError(f"{frozen_blocks} frozen blocks: the generator has {config['depth']}")
        self.time_conditioning = time_conditioning
        self.parser = copy.deepcopy(dit).requires_grad_(False)
        self.parser.blocks = self.parser.blocks[:frozen_blocks]
        del self.parser.final_layer  # only a velocity needs it
        self.blocks = nn.ModuleList()
        for _ in range(trainable_blocks):
            if head == "convolution":
                self.blocks.append(Convolution(width))
            else:
                self.blocks.append(Block(width, config["heads"], config["head_dim"], config["ffn"]))
        self.norm = RMSNorm(width)
        self.out = nn.Linear(width, 1)

    def forward(self, x_s, s, prompts):
        """x_s: noisy latents [b, c, t, h, w]; s: their level [b]; prompts: [b, m]. -> scores [b],
        above 0: real."""
        if not self.time_conditioning:
            s = torch.zeros_like(s)
        text = self.parser.text_encoder(prompts)
        x, modulation, rope, _ = self.parser.embed_inputs(x_s, s)
        for block in [*self.parser.blocks, *self.blocks]:
            if isinstance(block, Convolution):
                x = block(x, x_s.shape[2:])
            else:
                x = self.parser.run_block(block, x, modulation, text, rope, {})
        score_per_token = self.out(self.norm(x)).squeeze(-1)  # [b, n]
        return score_per_token.mean(dim=1).float()


def discriminator_loss(discriminator, real, fake, s, noise, prompts):
    """Hinge loss on real and generated latents [b, c, t, h, w] with the same noise at the same
    level s [b]. -> the loss, and the accuracy."""
    real_s = add_noise(real, noise, s)
    fake_s = add_noise(fake, noise, s)
    x_s = torch.cat([real_s, fake_s])
    scores = discriminator(x_s, torch.cat([s, s]), torch.cat([prompts, prompts]))
    real_score, fake_score = scores.chunk(2)
    loss = F.relu(1 - real_score).mean() + F.relu(1 + fake_score).mean()
    accuracy = ((real_score > 0).float().mean() + (fake_score < 0).float().mean()) / 2
    return loss, accuracy


# ------------------------------------------------------------ the training


def parse_arguments(argv):
    p = cli.make_parser(__doc__, PRESETS, argv)
    p.add_argument("--sampling-steps", type=cli.positive, default=4, help="steps of the student")
    p.add_argument("--frozen-blocks", type=cli.not_negative,
                   help="K: blocks of the generator that the discriminator inherits")
    p.add_argument("--trainable-blocks", type=cli.not_negative,
                   help="blocks that the discriminator adds; 0: one linear layer")
    p.add_argument("--d-head", default="attention", choices=["attention", "convolution"],
                   help="what those blocks are: the paper's attention, or convolutions")
    p.add_argument("--time-conditioning", action=argparse.BooleanOptionalAction, default=True,
                   help="tell the discriminator the noise level")
    p.add_argument("--d-lr", type=cli.number(1e-12),
                   help="peak learning rate of the discriminator")
    p.add_argument("--d-warmup", type=cli.number(0, 1),
                   help="fraction of the steps, at the start, without the adversarial loss")
    p.add_argument("--d-noise-level", type=cli.number(-20, 20), default=-2.5,
                   help="noise level s of the discriminator's inputs: mean of its logit (std 1); "
                        "-2.5: median 0.08, 90 %% of them from 0.02 to 0.3")
    p.add_argument("--adversarial", type=cli.number(0), default=0.03,
                   help="weight of the adversarial loss; 0: no discriminator")
    p.add_argument("--distillation", type=cli.number(0), default=1.0,
                   help="weight of the distillation term")
    p.add_argument("--cfg", type=cli.number(0), default=CFG_SCALE,
                   help="classifier-free guidance scale of the teacher")
    p.add_argument("--teacher-steps", type=cli.positive,
                   help="Euler steps of the teacher for a target")
    cli.add_file(p, "--discriminator", "discriminator.pt",
                 "the discriminator, written unless --adversarial is 0")
    cli.add_file(p, "--pruned", "pruned.pt", "where the student starts, from prune.py")
    cli.add_file(p, "--teacher", "dit.pt", "the CFG teacher, from dit.py")
    cli.add_file(p, "--latents", "latents.pt", "the data set, from vae.py")
    cli.add_file(p, "--out", "student.pt", "the few-step student")
    cli.add_training_flags(p)
    args = p.parse_args(argv)
    if not (args.adversarial or args.distillation):
        cli.exit_with_error("--adversarial 0 --distillation 0 leaves nothing to learn from")
    return args


def draw_batch(latents, args, timesteps, step):
    """From (stage, seed, step, process) alone: a resumed run repeats an unbroken one. -> real
    latents [b, c, t, h, w], prompts [b, m], noise, the student's levels t [b]; the
    discriminator's levels s [b] and noise."""
    g = training.step_generator("distill", args.seed, step)
    is_pictures = training.is_picture_step(args.picture_share, "distill", args.seed, step)
    batch_size = training.local_batch_size(args)
    real, prompts = latents.draw(g, batch_size, 0.0, is_pictures)
    noise = torch.randn(real.shape, generator=g)
    t = timesteps[torch.randint(len(timesteps), (batch_size,), generator=g)]
    s = logit_normal(batch_size, g, args.d_noise_level)
    s_noise = torch.randn(real.shape, generator=g)
    return real, prompts, noise, t, s, s_noise


def train(args, loop, teacher, student, discriminator, ema, optimizer, d_optimizer, precision):
    """Both steps, the discriminator's and the student's, on each batch."""
    predict = torch.compile(predict_x0) if args.compile else predict_x0
    for step, (real, prompts, noise, t, s, s_noise) in loop:
        values = {}  # to log
        # Made once, on the student's graph; the discriminator's step sees it detached.
        x_t = add_noise(real, noise, t)
        with precision():
            fake = predict(student, x_t, t, student.text_encoder(prompts))

        # The discriminator's step: real latents against what the student makes now.
        if args.adversarial:
            d_optimizer.set_lr(training.warmup_linear(step, args.steps))
            discriminator.zero_grad()
            with precision():
                d_loss, accuracy = discriminator_loss(discriminator, real, fake.detach(), s,
                                                      s_noise, prompts)
            d_loss.backward()
            training.average_gradients(discriminator.parameters())
            nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
            d_optimizer.step()
            values |= dict(hinge=d_loss, d_accuracy=accuracy)

        # The student's step: towards the teacher's endpoint, and against the new discriminator.
        optimizer.set_lr(training.warmup_linear(step, args.steps))
        student.zero_grad()
        loss = 0 * fake.sum()  # in warm-up without a distillation term the gradient is zero
        if args.distillation:
            with precision():
                target = teacher_endpoint(teacher, x_t, t, prompts, args.cfg, args.teacher_steps)
            # Pseudo-Huber, of scale 0.1 where latents have a std of 1: where the outcome is open, a
            # squared error would want the blurred mean.
            distillation = ((fake - target).square() + 0.01).sqrt().mean() - 0.1  # 0 if equal
            loss = loss + args.distillation * distillation
            values["distillation"] = distillation
        if args.adversarial:
            adversarial = torch.zeros_like(loss)  # in warm-up
            if step >= args.d_warmup * args.steps:
                # The gradient passes through all of the discriminator, frozen blocks too, to
                # `fake`; below only the student's own is asked for.
                with precision():
                    scores = discriminator(add_noise(fake, s_noise, s), s, prompts)
                adversarial = -scores.mean()
                loss = loss + args.adversarial * adversarial
            values["adversarial"] = adversarial
        loss.backward(inputs=list(student.parameters()))
        training.average_gradients(student.parameters())
        values["grad_norm"] = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(student)
        loop.log(**values)


def main(argv=None):
    args = parse_arguments(argv)
    device, precision = training.set_up(args)
    latents = data.Latents(args.latents)
    teacher, _ = load_dit(args.teacher, device, "dit", latents=latents)
    student, _ = load_dit(args.pruned, device, "pruned", "dit", latents=latents)
    settings = cli.settings_of(args) | dict(
        latents_checksum=latents.checksum, teacher_checksum=files.checksum(teacher.parameters()),
        pruned_checksum=files.checksum(student.parameters()))
    results = [args.out, args.discriminator] if args.adversarial else [args.out]
    training.stop_if_done(results, settings, "distill", "sample.py --score")

    torch.manual_seed(args.seed)
    student.train().requires_grad_(True)
    student.gradient_checkpointing = args.gradient_checkpointing  # and the discriminator's copy
    ema = training.average_weights(student, args)
    optimizer = training.Optimizer(student, args.optimizer, args.lr)
    state = dict(student=student, ema=ema, optimizer=optimizer)
    discriminator = None
    d_optimizer = None
    design = dict(frozen_blocks=args.frozen_blocks, trainable_blocks=args.trainable_blocks,
                  head=args.d_head, time_conditioning=args.time_conditioning)
    if args.adversarial:
        try:
            discriminator = Discriminator(student, **design).to(device)
        except ValueError as error:
            cli.exit_with_error(f"--frozen-blocks: {error}")
        d_optimizer = training.Optimizer(discriminator, args.optimizer, args.d_lr)
        state |= dict(discriminator=discriminator, d_optimizer=d_optimizer)

    timesteps = student_timesteps(args.sampling_steps)
    draw = partial(draw_batch, latents, args, torch.tensor(timesteps))
    loop = training.Loop("distill", args, settings, args.steps, device, draw, **state)
    train(args, loop, teacher, student, discriminator, ema, optimizer, d_optimizer, precision)

    metrics = dict(params=training.count_parameters(student), nfe=args.sampling_steps)
    for name, values in loop.history.items():
        metrics[name] = sum(values[-20:]) / len(values[-20:])
    if args.adversarial:  # no later stage reads it
        files.save(args.discriminator, stage="discriminator", metrics=metrics, settings=settings,
                   config=dict(dit=student.config, **design), model=discriminator.state_dict())
    # `config` rebuilds the student; sampling and export take its levels from `timesteps`.
    files.save(args.out, stage="student", config=student.config, model=ema.module.state_dict(),
               metrics=metrics, settings=settings, history=loop.history, timesteps=timesteps,
               **latents.metadata)
    training.finish(args, "distill", metrics, "sample.py --score", loop)


if __name__ == "__main__":
    cli.run_script(main)

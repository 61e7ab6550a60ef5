"""KD-guided, sensitivity-aware tri-level pruning: the teacher, cut to about half its size.

The idea (paper, tri-level pruning). A small DiT trained from scratch makes worse videos, so start from the large
trained one and cut it at three levels: whole blocks, attention heads, channels of the FFN. Learnable binary masks
say what stays, knowledge distillation (KD) from the frozen teacher guides them, and what they keep is copied into a
dense, smaller model that needs no sparse kernels. Stated: 28 blocks -> 20, 32 heads -> 20, FFN 8192 -> 6144,
2.0 B -> 0.915 B parameters.

    1. sensitivity   how much the loss would change without each unit             one number a unit
    2. masks         logits start from it; top-k of them is the hard mask;        depth + 2 depth*heads + depth*ffn
                     k falls from all to the budget while KD trains               numbers of 0 or 1
                     mask logits and weights together
    3. cut           copy the kept rows and columns: the same function            a DiT with a smaller config
    4. recovery      train the small model under KD

Our reading: first-order Taylor sensitivity, straight-through gradients, a cubic budget schedule, one count of heads
and channels for all blocks (so that one config describes the model), and the same weight for the three losses.

    python prune.py                                  # runs/tiny/dit.pt -> runs/tiny/masks.pt, masks.svg, pruned.pt
    python prune.py --run runs/x --levels heads      # in a folder with copies of runs/tiny/latents.pt and dit.pt
"""
import copy
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dit import DiT, Latents, Samples, add_noise, context, dry_run, load_dit, planned, sample_euler
from vae import PRESETS as VAE_PRESETS
from vae import (WORLD, Draws, Loop, Optimizer, average, between, check_settings, command, count, dims, fail,
                 fingerprint, finish, parse, parser, positive, progress, reading, save, script, set_up, stop_if_done,
                 training_flags, write_aside)

PRESETS = {  # tiny and toy in the paper's proportions: 5/7 of the blocks, 5/8 of the heads, 3/4 of the FFN
    "tiny": dict(blocks=5, heads=5, ffn=384, mask_steps=50, steps=320, batch_size=32, lr=0.04, optimizer="muon",
                 ema=0.99),
    "toy": dict(blocks=10, heads=10, ffn=1536, mask_steps=1500, steps=6000, batch_size=128, lr=0.01,
                optimizer="muon", ema=0.999),
    "mobile": dict(blocks=20, heads=20, ffn=6144, mask_steps=10000, steps=50000, batch_size=256, lr=5e-5,
                   optimizer="adamw", ema=0.9995),
    "server": dict(blocks=20, heads=20, ffn=6144, mask_steps=10000, steps=50000, batch_size=256, lr=5e-5,
                   optimizer="adamw", ema=0.9995),
}
LEVELS = {"blocks": ["blocks"], "heads": ["self_heads", "cross_heads"], "ffn": ["ffn"]}  # level -> its masks
CONFIG = {"blocks": "depth", "heads": "heads", "ffn": "ffn"}  # level -> what counts its units in a DiT's config

# -------------------------------------------------------------------------------------------------------- the masks


def full_masks(config):
    """All units kept: `blocks` [depth], `self_heads` and `cross_heads` [depth, heads], `ffn` [depth, ffn]."""
    depth, heads = config["depth"], config["heads"]
    return {"blocks": torch.ones(depth), "self_heads": torch.ones(depth, heads),
            "cross_heads": torch.ones(depth, heads), "ffn": torch.ones(depth, config["ffn"])}


def sensitivity(dit, criterion, batches, seed=0, batch_size=WORLD):
    """One score a unit, in the masks' shapes; higher means keep. batches: a list of (x0, tokens, noise, t).

    taylor, and where learned masks start: |d loss / d mask|, the first-order estimate of what cutting the unit
    costs, averaged over batches. magnitude: the norm of a unit's outgoing weights (a block's: all). random: chance."""
    masks = {name: m.to(batches[0][0].device) for name, m in full_masks(dit.config).items()}
    if criterion == "random":
        g = torch.Generator().manual_seed(seed)
        return {name: torch.rand(m.shape, generator=g).to(m.device) for name, m in masks.items()}
    if criterion == "magnitude":
        heads = dit.config["heads"]

        def head_norms(attention):  # of the columns of the output projection that read this head
            return rearrange(attention.out.weight, "o (heads d) -> heads (o d)", heads=heads).norm(dim=1)

        return {"blocks": torch.stack([torch.stack([p.norm() for p in b.parameters()]).norm() for b in dit.blocks]),
                "self_heads": torch.stack([head_norms(b.self_attention) for b in dit.blocks]),
                "cross_heads": torch.stack([head_norms(b.cross_attention) for b in dit.blocks]),
                "ffn": torch.stack([b.feed_forward.down.weight.norm(dim=0) for b in dit.blocks])}
    scores = {name: torch.zeros_like(m) for name, m in masks.items()}
    for x0, tokens, noise, t in progress(batches, "sensitivity"):
        for m in masks.values():
            m.requires_grad_(True)
        velocity = dit(add_noise(x0, noise, t), t, dit.text_encoder(tokens), masks)
        loss = F.mse_loss(velocity, noise - x0)
        gradients = torch.autograd.grad(loss, list(masks.values()))
        average(gradients, batch_size)  # over the processes that share the batch
        for name, gradient in zip(masks, gradients):
            scores[name] += gradient.abs() / len(batches)
    return scores


class Masks(nn.Module):
    """Learnable binary masks: one logit a unit, of which the `keep` largest in each row are on."""

    def __init__(self, scores, keep):
        """scores: where the logits start, standardised a row; keep: {mask: units to keep a row}, by default all."""
        super().__init__()
        self.keep = keep
        centred = {name: s - s.mean(-1, keepdim=True) for name, s in scores.items()}
        self.logits = nn.ParameterDict({name: c / (c.square().mean(-1, keepdim=True).sqrt() + 1e-12)
                                        for name, c in centred.items()})

    def forward(self, progress=1.0):
        """The masks when a share `progress` of the schedule is over: k falls from all units to the budget, fast at
        first. Hard {0, 1} forward; backward the gradient of a sigmoid (straight-through), so that units that are off
        learn too, and may come back."""
        masks = {}
        for name, logits in self.logits.items():
            units = logits.shape[-1]
            keep = self.keep.get(name, units)
            k = round(keep + (units - keep) * (1 - progress) ** 3)
            hard = torch.zeros_like(logits).scatter(-1, logits.topk(k, dim=-1).indices, 1.0)
            soft = torch.sigmoid(logits)
            masks[name] = hard + soft - soft.detach()
        return masks

    def level_gradients(self):
        """One scale for all units of a level, so that what matters more moves faster (Adam would give each its own)."""
        for logits in self.parameters():
            logits.grad /= logits.grad.square().mean().sqrt() + 1e-12


def cut(dit, masks):
    """The dense model that computes what `dit` computes under these masks [all {0, 1}, full_masks' shapes]."""
    kept = {name: [row.nonzero().flatten() for row in m.reshape(len(dit.blocks), -1)] for name, m in masks.items()}
    blocks = masks["blocks"].nonzero().flatten().tolist()
    config = dict(dit.config, depth=len(blocks), heads=len(kept["self_heads"][0]), ffn=len(kept["ffn"][0]))
    dense, d = DiT(**config), dit.head_dim
    dense.load_state_dict({k: v for k, v in dit.state_dict().items() if not k.startswith("blocks.")}, strict=False)
    for new, i in zip(dense.blocks, blocks):
        state = dict(dit.blocks[i].state_dict())
        for attention, name in ("self_attention", "self_heads"), ("cross_attention", "cross_heads"):
            rows = (kept[name][i][:, None] * d + torch.arange(d, device=kept[name][i].device)).flatten()
            both = torch.cat([rows, rows + dit.config["heads"] * d])  # the keys, then the values
            state[f"{attention}.q.weight"] = state[f"{attention}.q.weight"][rows]
            state[f"{attention}.kv.weight"] = state[f"{attention}.kv.weight"][both]
            state[f"{attention}.out.weight"] = state[f"{attention}.out.weight"][:, rows]
        state["feed_forward.up.weight"] = state["feed_forward.up.weight"][kept["ffn"][i]]
        state["feed_forward.down.weight"] = state["feed_forward.down.weight"][:, kept["ffn"][i]]
        new.load_state_dict(state)
    return dense.to(next(dit.parameters()).device)


# ------------------------------------------------------------------------------------------- pictures of the masks

FULL, HOLLOW = 'fill="#4c8bf5"', 'fill="none" stroke="currentColor" stroke-opacity=".4"'
END, BOLD = 'text-anchor="end"', 'font-weight="600"'


def svg(height, *parts):
    """360 wide, so that on a phone its letters are as large as a page's; in a grey that shows on white and on black."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 {height}" font-family="system-ui,sans-serif" '
            f'font-size="12" color="#808890" fill="currentColor">{"".join(parts)}</svg>')


def label(x, y, words, *style):
    return f'<text x="{x:.1f}" y="{y:.1f}" {" ".join(style)}>{escape(str(words))}</text>'


def rect(x, y, width, height, style):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {style}/>'


def mask_map(masks):
    """Which units the masks keep: a row a block, a square a head; filled stays, hollow is cut."""
    parts = [label(x, 12, name) for x, name in ((54, "self-attention"), (166, "cross-attention"), (278, "FFN"))]
    for i, on in enumerate(masks["blocks"].tolist()):
        y, ffn = 20 * i + 22, (masks["ffn"][i] * on).mean().item()
        parts += [label(0, y + 11, f"block {i + 1}"), label(360, y + 11, f"{ffn:.0%}" if on else "cut", END),
                  rect(278, y, 50, 14, HOLLOW), rect(278, y, 50 * ffn, 14, FULL)]
        for x, name in (54, "self_heads"), (166, "cross_heads"):
            step = 104 / masks[name].shape[1]
            parts += [rect(x + step * j, y, 0.8 * step, 14, FULL if on * kept else HOLLOW)
                      for j, kept in enumerate(masks[name][i].tolist())]
    return svg(20 * len(masks["blocks"]) + 22, *parts)


# ------------------------------------------------------------------------------------------- knowledge distillation


def kd_loss(student, teacher, batch, kd, masks=None, kept=None):
    """The flow-matching loss, plus the teacher's velocity (`output`), plus its tokens after the blocks that stay,
    each relative to their size (`features`). kept: the teacher's block behind each of the student's."""
    x0, tokens, noise, t = batch
    x_t = add_noise(x0, noise, t)
    with torch.no_grad():
        target, target_features = teacher(x_t, t, teacher.text_encoder(tokens), return_features=True)
    velocity, features = student(x_t, t, student.text_encoder(tokens), masks, return_features=True)
    loss = F.mse_loss(velocity.float(), noise - x0)
    if "output" in kd:
        loss = loss + F.mse_loss(velocity.float(), target.float())
    if "features" in kd:
        # The masked student still has all blocks, the dense one only those that stay.
        pairs = [(features[i] if masks else features[j], target_features[i]) for j, i in enumerate(kept)]
        relative = [(f - g).square().mean((1, 2)) / g.square().mean((1, 2)) for f, g in pairs]
        loss = loss + torch.stack(relative).mean()
    return loss


def kept_units(args, levels, config):
    """-> what changes in a teacher's config: how many units of each level stay, all where a level is not pruned."""
    keep = {CONFIG[level]: getattr(args, level) if level in levels else config[CONFIG[level]] for level in LEVELS}
    for level, name in CONFIG.items():
        if not 0 < keep[name] <= config[name]:
            fail(f"--{level} {keep[name]}: the teacher has {config[name]}, keep 1 to {config[name]}")
    if all(keep[name] == config[name] for name in keep):
        fail(f"nothing to cut: the teacher has just {' / '.join(map(str, keep.values()))} blocks / heads / FFN "
             "channels; take a larger one, or smaller --blocks, --heads or --ffn")
    return keep


def main(argv=None):
    p = parser(__doc__, PRESETS)
    p.add_argument("--blocks", type=int, help="blocks to keep")
    p.add_argument("--heads", type=int, help="heads to keep in each attention of each block")
    p.add_argument("--ffn", type=int, help="FFN channels to keep in each block")
    p.add_argument("--levels", default="blocks,heads,ffn",
                   help="levels to prune, with commas between (default: blocks,heads,ffn)")
    p.add_argument("--criterion", default="learned", choices=["learned", "taylor", "magnitude", "random"],
                   help="what decides which units stay: masks that learn, or the largest of a score that does not: "
                        "the change of the loss, the norm of the weights, chance (default: learned)")
    p.add_argument("--kd", default="both", help="what is to be like the teacher's: its velocity (output), "
                   "its tokens after each block that stays (features), both, or none (default: both)")
    p.add_argument("--mask-steps", type=positive, help="steps of learning the masks, before --steps of recovery")
    p.add_argument("--mask-lr", type=between(0), default=0.002,
                   help="learning rate of the mask logits, down to 0 with the budget (default: 0.002)")
    p.add_argument("--dit", type=Path, help="the teacher, from dit.py")
    p.add_argument("--latents", type=Path, help="the data set, from vae.py")
    p.add_argument("--masks", type=Path, help="the masks, written; a picture of them goes beside")
    p.add_argument("--out", type=Path, help="the pruned DiT")
    p.add_argument("--dry-run", nargs="?", type=dims, const=(), metavar="SIZE",
                   help="only say what the teacher and its pruned model cost, for clips of a SIZE in pixels")
    p.add_argument("--vae", type=Path, help="the autoencoder, from vae.py, for --sample-every")
    training_flags(p, "optimiser steps of recovery, after --mask-steps")
    args = parse(p, PRESETS, argv, dit="dit.pt", latents="latents.pt", vae="vae.pt", masks="masks.pt", out="pruned.pt")
    levels = args.levels.split(",")
    kd = {"both": ["output", "features"], "none": []}.get(args.kd, args.kd.split(","))
    if unknown := (set(levels) - set(LEVELS)) | (set(kd) - {"output", "features"}):
        fail(f"{', '.join(sorted(unknown))}: --levels takes blocks, heads, ffn and --kd output, features, both, none")
    args.levels, args.kd = ",".join(sorted(levels)), ",".join(sorted(kd, reverse=True))  # one name for one thing
    if args.dry_run is not None:  # what mobile is cut out of is server
        config, latent_shape = planned("server" if args.preset == "mobile" else args.preset, args.dry_run or dims(
            VAE_PRESETS[args.preset]["size"]))
        pruned = config | kept_units(args, levels, config)
        print("teacher: ", end="")
        before = dry_run(config, latent_shape)
        print("pruned: ", end="")
        after = dry_run(pruned, latent_shape)
        print(f"pruned to {after / before:.1%} of the parameters")
        return
    settings = {k: getattr(args, k) for k in ("blocks", "heads", "ffn", "levels", "criterion", "kd", "mask_steps",
                                              "mask_lr", "steps", "batch_size", "lr", "optimizer", "ema", "seed")}
    settings |= {level: "all" for level in LEVELS if level not in levels}  # whatever the flag says, nothing is cut
    device, precision = set_up(args)
    teacher, checkpoint = load_dit(args.dit, device, "dit")
    with reading(args.latents):
        data = Latents(args.latents)
    check_settings(args.dit, checkpoint["settings"], {"latents": data.fingerprint})
    units = kept_units(args, levels, teacher.config)
    settings |= {"latents": data.fingerprint, "teacher": fingerprint(teacher.parameters())}
    then = command("distill.py", args.run, args.preset)
    stop_if_done([args.out, args.masks], settings, then)
    # 1. sensitivity, 2. masks: learned together with the weights, under KD
    def draw(g):  # a tenth of the captions empty, since the small model is guided too
        return data.draw(g, empty_share=0.1)

    batches = [[x.to(device) for x in draw(Draws(f"sensitivity {args.seed} {i}", args.batch_size))] for i in range(8)]
    scores = sensitivity(teacher, args.criterion, batches, args.seed, args.batch_size)
    keep = {name: units[CONFIG[level]] for level, names in LEVELS.items() for name in names}
    student, masks = copy.deepcopy(teacher).train().requires_grad_(True), Masks(scores, keep).to(device)
    student.recompute = args.recompute
    loss_fn = torch.compile(kd_loss) if args.compile else kd_loss
    optimizer = Optimizer(student, args, args.mask_steps, precision)
    mask_optimizer = torch.optim.SGD(masks.parameters(), lr=args.mask_lr, momentum=0.9)
    loop = Loop("masks", args, settings, args.mask_steps, device, draw, student=student, masks=masks,
                optimizer=optimizer, mask_optimizer=mask_optimizer)
    for step, batch in loop:
        # Masks come to rest as the budget is reached, for the last third: the weights' rate falls as well, and for a
        # unit that came back late they would have no time.
        passed = min(1, step / (0.7 * args.mask_steps))
        mask_optimizer.param_groups[0]["lr"] = args.mask_lr * (args.criterion == "learned") * (1 - passed)
        now = masks(passed)
        kept = now["blocks"].nonzero().flatten().tolist()
        with precision():
            loss = loss_fn(student, teacher, batch, kd, now, kept)
        optimizer.step(loss, also=list(masks.parameters()))
        masks.level_gradients()
        mask_optimizer.step()
        loop.log(loss=loss.item())

    # 3. cut: the dense model computes what the masked one computes
    final = {name: m.detach().round() for name, m in masks().items()}
    dense = cut(student, final)
    dense.recompute = args.recompute
    kept = final["blocks"].nonzero().flatten().tolist()
    x0, tokens, noise, t = batches[0]
    with torch.no_grad():
        masked = student(add_noise(x0, noise, t), t, student.text_encoder(tokens), final)
        difference = (dense(add_noise(x0, noise, t), t, dense.text_encoder(tokens)) - masked).abs().max().item()

    # 4. recovery
    ema = AveragedModel(dense, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = Optimizer(dense, args, args.steps, precision)
    samples = Samples("pruned", args, data, device)
    recovery = Loop("prune", args, settings, args.steps, device, draw, dense=dense, ema=ema, optimizer=optimizer)
    for step, batch in recovery:
        with precision():
            loss = loss_fn(dense, teacher, batch, kd, kept=kept)
        optimizer.step(loss)
        ema.update_parameters(dense)
        recovery.log(loss=loss.item())
        samples.show(step + 1, lambda noises, tokens: sample_euler(
            ema.module, noises[0], tokens, torch.zeros_like(tokens), 20, 3.0))

    metrics = dict(params=count(dense), params_ratio=count(dense) / count(teacher), blocks=dense.config["depth"],
                   heads=dense.config["heads"], ffn=dense.config["ffn"], dense_vs_masked_max_abs=difference)
    save(args.masks, stage="masks", config=teacher.config, settings=settings, masks=final, scores=scores,
         metrics=metrics)
    picture = mask_map({name: m.cpu() for name, m in final.items()})
    write_aside(args.masks.with_suffix(".svg"), lambda f: f.write(picture.encode()))
    history = {**{f"masks_{k}": v for k, v in loop.history.items()}, **recovery.history}
    save(args.out, stage="pruned", config=dense.config, model=ema.module.state_dict(), metrics=metrics,
         settings=settings, history=history, **context(checkpoint))
    finish(args, "prune", metrics, then, loop, recovery)


if __name__ == "__main__":
    script(main)

"""KD-guided, sensitivity-aware tri-level pruning: the teacher, cut to about half its size.

The idea (paper, tri-level pruning). A small DiT trained from scratch makes worse videos, so start
from the large trained one and cut it at three levels: whole blocks, attention heads, channels of
the linear layers. Learnable binary masks say what stays, knowledge distillation (KD) from the
frozen teacher guides them, and what they keep is copied into a dense, smaller model that needs no
sparse kernels. Stated: 28 blocks -> 20, 32 heads -> 20, FFN 8192 -> 6144, 2.0 B -> 0.915 B
parameters (in our reading 1.91 B -> 0.955 B).

    1. sensitivity   how much the loss would change without a unit     one number per unit
    2. masks         logits start there; the k largest of a row (the   depth + 2 depth*heads
                     units of one block, or all blocks) are on;        + depth*ffn numbers, 0 or 1
                     k falls from all to the budget while KD trains
                     mask logits and weights together
    3. cut           copy the kept rows and columns: the same function, a smaller config
    4. recovery      train the small model under KD

Our reading: the four steps; the heads of both attentions; the linear layers' channels are the FFN's
hidden ones; first-order Taylor importance of the flow-matching loss; straight-through gradients,
normalised, under SGD; a cubic budget schedule over the first 70 % of the mask steps, after which
the masks rest; one count of heads and channels for all blocks (so that one config describes the
model); three losses (flow matching, the teacher's velocity, its tokens after each block) of the
same weight.

    python prune.py                                    # runs/tiny/dit.pt -> masks.pt, pruned.pt
    python prune.py --run runs/x --blocks 7 --ffn 512 --heads 3    # heads alone, in a folder with
                                                                   # copies of dit.pt, latents.pt
"""
import copy

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import cli, data, files, training
from dit import (DiT, add_dry_run, add_noise, draw_batch, flow_loss, load_dit, planned_config,
                 print_cost)

PRESETS = {
    "tiny": dict(
        blocks=5,          # of 7; the paper keeps 5/7 of its blocks,
        heads=5,           # of 8; 5/8 of its heads,
        ffn=384,           # of 512; 3/4 of its FFN's channels
        mask_steps=50,     # of learning the masks
        steps=210,         # of recovery, about a quarter of the teacher's 780
        batch_size=32,     # clips per step
        lr=0.04,           # Muon's; as for the teacher
        optimizer="muon",  # the paper has AdamW
        ema=0.99),         # the average of about the last third
    "toy": dict(blocks=5, heads=5, ffn=576, mask_steps=120, steps=1200, batch_size=32, lr=0.03,
                optimizer="muon", ema=0.995),
    "mobile": dict(blocks=20, heads=20, ffn=6144, mask_steps=10000, steps=50000, batch_size=256,
                   lr=5e-5, optimizer="adamw", ema=0.9995),
}
PRESETS["server"] = PRESETS["mobile"]

# ------------------------------------------------------------ 1. sensitivity


def full_masks(config):
    """All units on, in the shapes that `DiT.forward` takes."""
    depth = config["depth"]
    heads = config["heads"]
    return {"blocks": torch.ones(depth), "self_heads": torch.ones(depth, heads),
            "cross_heads": torch.ones(depth, heads), "ffn": torch.ones(depth, config["ffn"])}


def taylor_importance(dit, batches):
    """|d loss / d mask| per batch, the first-order estimate of what cutting a unit costs (Molchanov
    et al., https://arxiv.org/abs/1611.06440), averaged over batches of (x0, prompts, noise, t)."""
    device = batches[0][0].device
    masks = {name: m.to(device).requires_grad_(True) for name, m in full_masks(dit.config).items()}
    scores = {name: torch.zeros_like(m) for name, m in masks.items()}
    for batch in cli.progress(batches, desc="sensitivity", leave=False, delay=1):
        flow_loss(dit, *batch, masks).backward(inputs=list(masks.values()))
        training.average_gradients(masks.values())
        for name, mask in masks.items():
            scores[name] += mask.grad.abs() / len(batches)
            mask.grad = None
    return scores


def weight_magnitude(dit):
    """The norm of each unit's outgoing weights; of a block, of all its weights."""
    scores = {name: [] for name in full_masks(dit.config)}
    for block in dit.blocks:
        scores["blocks"].append(torch.stack([p.norm() for p in block.parameters()]).norm())
        for name, attention in (("self_heads", block.self_attention),
                                ("cross_heads", block.cross_attention)):
            columns = rearrange(attention.out.weight, "out (heads d) -> heads (out d)",
                                heads=attention.heads)
            scores[name].append(columns.norm(dim=1))
        scores["ffn"].append(block.feed_forward.down.weight.norm(dim=0))
    return {name: torch.stack(rows) for name, rows in scores.items()}


def sensitivity(dit, criterion, batches, seed=0):
    """One score per unit, in the masks' shapes; higher means keep. criterion: taylor (where learned
    masks start, too), magnitude or random. batches: a list of (x0, prompts, noise, t)."""
    if criterion == "magnitude":
        return weight_magnitude(dit)
    if criterion == "random":
        g = torch.Generator().manual_seed(seed)
        return {name: torch.rand(m.shape, generator=g)
                for name, m in full_masks(dit.config).items()}
    return taylor_importance(dit, batches)


# ------------------------------------------------------------ 2. masks


class Masks(nn.Module):
    """Learnable binary masks: one logit per unit, of which the k largest of each row are on.

    A unit that is off may come back: its logit still gets a gradient, and where it overtakes one
    that is on, the two change places. (While a block is off, its heads and channels get none; its
    own logit does.) That goes on for the first 70 % of the mask steps, in which the logits'
    learning rate falls to 0 (`learn_masks`)."""

    def __init__(self, scores, budget):
        """scores: where the logits start, standardised per row; budget: {mask: units per row that
        stay}."""
        super().__init__()
        self.budget = budget
        self.logits = nn.ParameterDict()
        for name, score in scores.items():
            centred = score - score.mean(-1, keepdim=True)
            std = centred.square().mean(-1, keepdim=True).sqrt()
            self.logits[name] = centred / (std + 1e-12)

    def forward(self, fraction=1.0):
        """The masks when this fraction of the schedule is over: k falls from all units to the
        budget, fast at first (cubic, https://arxiv.org/abs/1710.01878). Hard {0, 1} forward;
        backward the gradient of a sigmoid (straight-through, https://arxiv.org/abs/1308.3432), for
        off units of a block that is on, too."""
        masks = {}
        for name, logits in self.logits.items():
            units = logits.shape[-1]
            budget = self.budget[name]
            k = round(budget + (units - budget) * (1 - fraction) ** 3)
            kept = logits.topk(k, dim=-1).indices
            hard = torch.zeros_like(logits).scatter(-1, kept, 1.0)
            soft = torch.sigmoid(logits)
            masks[name] = hard + soft - soft.detach()  # hard but for rounding, soft's gradient
        return masks

    def normalize_gradients(self):
        """One scale for all units of a mask, so that what matters more moves faster; Adam would
        give each unit its own."""
        for logits in self.parameters():
            logits.grad /= logits.grad.square().mean().sqrt() + 1e-12


# ------------------------------------------------------------ 3. cut


def cut(dit, masks):
    """The dense model that computes what `dit` computes under these {0, 1} masks."""
    kept_blocks = masks["blocks"].nonzero().flatten().tolist()
    config = dit.config | dict(depth=len(kept_blocks), heads=int(masks["self_heads"][0].sum()),
                               ffn=int(masks["ffn"][0].sum()))
    dense = DiT(**config)
    outside = {name: p for name, p in dit.state_dict().items() if not name.startswith("blocks.")}
    dense.load_state_dict(outside, strict=False)
    for new_block, i in zip(dense.blocks, kept_blocks):
        state = dit.blocks[i].state_dict()
        for attention, name in ("self_attention", "self_heads"), ("cross_attention", "cross_heads"):
            on = masks[name][i].bool()
            on = on.repeat_interleave(dit.config["head_dim"])  # rows of q, k and v
            state[f"{attention}.q.weight"] = state[f"{attention}.q.weight"][on]
            state[f"{attention}.kv.weight"] = state[f"{attention}.kv.weight"][torch.cat([on, on])]
            state[f"{attention}.out.weight"] = state[f"{attention}.out.weight"][:, on]
        on = masks["ffn"][i].bool()
        state["feed_forward.up.weight"] = state["feed_forward.up.weight"][on]
        state["feed_forward.down.weight"] = state["feed_forward.down.weight"][:, on]
        new_block.load_state_dict(state)
    return dense.to(masks["ffn"].device)


# ------------------------------------------------------------ knowledge distillation


def kd_loss(student, teacher, batch, kd, masks=None, kept_blocks=None):
    """Squared error of the velocity from the flow's; with `output` in kd also from the teacher's;
    with `features` also that of the tokens after each kept block, relative to their size. While the
    student has all blocks, under masks, block i learns from block i; after the cut, block j learns
    from the teacher's block kept_blocks[j]. batch: x0 [b, c, t, h, w], prompts [b, m], noise,
    t [b]."""
    x0, prompts, noise, t = batch
    x_t = add_noise(x0, noise, t)
    if kd:
        with torch.no_grad():
            teacher_velocity, teacher_features = teacher(x_t, t, teacher.text_encoder(prompts),
                                                         return_features=True)
    velocity, features = student(x_t, t, student.text_encoder(prompts), masks,
                                 return_features=True)
    loss = F.mse_loss(velocity.float(), noise - x0)
    if "output" in kd:
        loss = loss + F.mse_loss(velocity.float(), teacher_velocity.float())
    if "features" in kd:
        if kept_blocks is not None:
            teacher_features = [teacher_features[i] for i in kept_blocks]
        errors = []  # one per block of the student
        for feature, target in zip(features, teacher_features):
            error = (feature - target).square().mean((1, 2)) / target.square().mean((1, 2))
            errors.append(error.mean())
        errors = torch.stack(errors)
        is_kept = masks["blocks"].detach() if masks else torch.ones_like(errors)
        loss = loss + (errors * is_kept).sum() / is_kept.sum()
    return loss


# ------------------------------------------------------------ the training


def learn_masks(args, settings, latents, teacher, budget, device, precision):
    """Steps 1 and 2. -> the masked model, the sensitivity scores, the masks' module, the loop."""
    batches = []
    for i in range(8):
        batch = draw_batch(latents, args, "sensitivity", i)
        batches.append([x.to(device) for x in batch])
    teacher.gradient_checkpointing = args.gradient_checkpointing  # and its copy
    with precision():
        scores = sensitivity(teacher, args.criterion, batches, args.seed)
    mask_module = Masks(scores, budget).to(device)
    masked = copy.deepcopy(teacher).train().requires_grad_(True)
    optimizer = training.Optimizer(masked, args.optimizer, args.lr)
    mask_lr = args.mask_lr if args.criterion == "learned" else 0.0
    mask_optimizer = torch.optim.SGD(mask_module.parameters(), lr=mask_lr, momentum=0.9)
    loss_fn = torch.compile(kd_loss) if args.compile else kd_loss

    def draw(step):
        return draw_batch(latents, args, "masks", step)

    loop = training.Loop("masks", args, settings, args.mask_steps, device, draw, masked=masked,
                         masks=mask_module, optimizer=optimizer, mask_optimizer=mask_optimizer)
    for step, batch in loop:
        # After 70 % of the steps masks are fixed, so that the weights settle on what stays.
        fraction = min(1, step / (0.7 * args.mask_steps))
        mask_optimizer.param_groups[0]["lr"] = mask_lr * (1 - fraction)
        optimizer.set_lr(training.warmup_linear(step, args.mask_steps))
        masked.zero_grad()
        mask_module.zero_grad()
        with precision():
            loss = loss_fn(masked, teacher, batch, args.kd, mask_module(fraction))
        loss.backward()
        training.average_gradients([*masked.parameters(), *mask_module.parameters()])
        grad_norm = nn.utils.clip_grad_norm_(masked.parameters(), 1.0)
        optimizer.step()
        mask_module.normalize_gradients()
        mask_optimizer.step()
        loop.log(loss=loss, grad_norm=grad_norm)
    return masked, scores, mask_module, loop


def recover(args, settings, latents, teacher, dense, kept_blocks, device, precision):
    """Step 4. -> the average of the dense model's weights, and the loop."""
    dense.gradient_checkpointing = args.gradient_checkpointing
    ema = training.average_weights(dense, args)
    optimizer = training.Optimizer(dense, args.optimizer, args.lr)
    loss_fn = torch.compile(kd_loss) if args.compile else kd_loss

    def draw(step):
        return draw_batch(latents, args, "prune", step)

    loop = training.Loop("prune", args, settings, args.steps, device, draw, model=dense, ema=ema,
                         optimizer=optimizer)
    for step, batch in loop:
        optimizer.set_lr(training.warmup_linear(step, args.steps))
        dense.zero_grad()
        with precision():
            loss = loss_fn(dense, teacher, batch, args.kd, None, kept_blocks)
        loss.backward()
        training.average_gradients(dense.parameters())
        grad_norm = nn.utils.clip_grad_norm_(dense.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(dense)
        loop.log(loss=loss, grad_norm=grad_norm)
    return ema.module, loop


@torch.no_grad()
def largest_difference(dense, masked, masks, latents):
    """Between the velocities of the dense model and of its masked parent, on one batch."""
    device = masks["ffn"].device
    g = torch.Generator().manual_seed(0)
    x_t, prompts = latents.draw(g, 8, 0.0, is_pictures=False)  # any x_t will do: x0
    x_t = x_t.to(device)
    prompts = prompts.to(device)
    t = torch.rand(8, generator=g).to(device)
    expected = masked(x_t, t, masked.text_encoder(prompts), masks)
    return (dense(x_t, t, dense.text_encoder(prompts)) - expected).abs().max().item()


def kept_sizes(args, config):
    """-> depth, heads and ffn of the pruned config."""
    sizes = dict(depth=args.blocks, heads=args.heads, ffn=args.ffn)
    for flag, (key, n) in zip(("--blocks", "--heads", "--ffn"), sizes.items()):
        if n > config[key]:
            cli.exit_with_error(f"{flag} {n}: the teacher has {config[key]}")
    if all(n == config[key] for key, n in sizes.items()):
        cli.exit_with_error(f"nothing to cut, the teacher has as many: {sizes}")
    return sizes


def planned_pruned(preset):
    """The config of a preset's pruned DiT before there is any data."""
    kept = PRESETS[preset]
    return planned_config(preset) | dict(depth=kept["blocks"], heads=kept["heads"],
                                         ffn=kept["ffn"])


def print_costs(args):
    """--dry-run: prints what teacher and pruned model cost."""
    config = planned_config(args.preset)
    params = print_cost("teacher", config, args)
    pruned_params = print_cost("pruned", config | kept_sizes(args, config), args)
    print(f"  pruned to {pruned_params / params:.1%} of the parameters")


def parse_arguments(argv):
    p = cli.make_parser(__doc__, PRESETS, argv)
    p.add_argument("--blocks", type=cli.positive, help="blocks to keep")
    p.add_argument("--heads", type=cli.positive,
                   help="heads to keep in each attention of each block")
    p.add_argument("--ffn", type=cli.positive, help="FFN channels to keep in each block")
    p.add_argument("--criterion", default="learned",
                   choices=["learned", "taylor", "magnitude", "random"],
                   help="which units stay: learned masks, or the largest Taylor importance, "
                        "magnitude, or random score")
    p.add_argument("--kd", nargs="*", choices=["output", "features"],
                   default=["output", "features"],
                   help="distillation targets: the teacher's velocity (output), its tokens after "
                        "each block (features); with nothing after --kd: no teacher")
    p.add_argument("--mask-steps", type=cli.steps_of(p.get_default("mask_steps")),
                   help="steps of learning masks, before --steps")
    p.add_argument("--mask-lr", type=cli.number(0), default=0.002,
                   help="learning rate of the mask logits, down to 0 over 70 %% of the mask steps")
    cli.add_file(p, "--dit", "dit.pt", "the teacher, from dit.py")
    cli.add_file(p, "--latents", "latents.pt", "the data set, from vae.py")
    cli.add_file(p, "--masks", "masks.pt", "the masks, which this stage writes")
    cli.add_file(p, "--out", "pruned.pt", "the pruned DiT")
    cli.add_training_flags(p)
    add_dry_run(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.dry_run is not None:
        print_costs(args)
        return
    device, precision = training.set_up(args)
    latents = data.Latents(args.latents)
    teacher, checkpoint = load_dit(args.dit, device, "dit", latents=latents)
    with files.reading(args.dit):  # the pruned model is sampled with CFG, too: empty captions
        args.cfg_dropout = checkpoint["settings"]["cfg_dropout"]
        args.noise_level = checkpoint["settings"]["noise_level"]
    sizes = kept_sizes(args, teacher.config)
    settings = cli.settings_of(args) | dict(
        latents_checksum=latents.checksum, teacher_checksum=files.checksum(teacher.parameters()))
    training.stop_if_done([args.out, args.masks], settings, "prune", "distill.py")

    # 1. sensitivity, 2. masks
    budget = dict(blocks=sizes["depth"], self_heads=sizes["heads"], cross_heads=sizes["heads"],
                  ffn=sizes["ffn"])
    masked, scores, mask_module, mask_loop = learn_masks(
        args, settings, latents, teacher, budget, device, precision)

    # 3. cut
    masks = {name: m.detach().round() for name, m in mask_module().items()}
    kept_blocks = masks["blocks"].nonzero().flatten().tolist()
    dense = cut(masked, masks)
    difference = largest_difference(dense, masked, masks, latents)
    mask_loop.state.clear()  # memory, as large as all that follows
    del masked

    # 4. recovery
    pruned, loop = recover(args, settings, latents, teacher, dense, kept_blocks, device, precision)

    params = training.count_parameters(dense)
    metrics = dict(params=params, params_ratio=params / training.count_parameters(teacher),
                   blocks=dense.config["depth"], heads=dense.config["heads"],
                   ffn=dense.config["ffn"], dense_vs_masked_max_abs=difference)
    files.save(args.masks, stage="masks", config=teacher.config, settings=settings, masks=masks,
               scores=scores, metrics=metrics)
    history = {"masks_loss": mask_loop.history["loss"], "loss": loop.history["loss"]}
    # `config` rebuilds the pruned DiT: the same class with fewer blocks, heads and channels.
    files.save(args.out, stage="pruned", config=dense.config, model=pruned.state_dict(),
               metrics=metrics, settings=settings, history=history, **latents.metadata)
    training.finish(args, "prune", metrics, "distill.py", mask_loop, loop)


if __name__ == "__main__":
    cli.run_script(main)

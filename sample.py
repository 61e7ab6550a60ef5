"""Prompts in, videos out; the scores of every checkpoint; a page that shows what each stage does.

    python sample.py --prompt "a red circle moving left" --out red.mp4        # also .gif, or .png: a contact sheet
    python sample.py --model runs/tiny/dit.pt --prompts prompts.txt --out all.gif        # one prompt a line
    python sample.py --score              # every checkpoint of the run, in one go  -> runs/tiny/metrics.json
    python sample.py --report             # -> runs/tiny/report.html, and the README's pictures beside it

A student samples in its few steps without guidance; dit.pt and pruned.pt in --sampling-steps Euler steps with --cfg.

The scores have the names of VBench's dimensions, which the paper reports, but each is a plain formula: the data is
rendered, so a clip can be measured instead of shown to another network. Text alignment is the share of clips with
colour (by palette), shape (by template) and direction (by centroid) all as the caption says. On a folder of real
clips it is the share whose nearest training clip, by latents, carries the caption. Subject
consistency: the cosine similarity of each frame's subject with the first's. Motion smoothness: 1 - the mean distance
of a frame from the mean of its neighbours. Dynamic degree: the mean difference of neighbouring frames, pixels in
[0, 1]. Frechet distance: from real clips, on the features of a fixed network; less is better.
"""
import base64
import json
import math
import sys
import time
from html import escape
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from distill import load_discriminator, sample_student
from dit import Latents, add_noise, decode, flow_loss, load_dit, logit_normal, sample_euler, text_input, words
from prune import BOLD, END, FULL, HOLLOW, label, mask_map, rect, svg
from vae import (COLORS, DIRECTIONS, SHAPES, Draws, between, command, count, fail, gif, load, load_vae, maker,
                 open_data, parse, parser, positive, progress, read_metrics, reading, record, script, set_up,
                 shape_coverage, write_aside)

PRESETS = {name: {} for name in ("tiny", "toy", "mobile", "server")}
STAGES = {"dit": "teacher", "pruned": "pruned", "student": "student"}  # a checkpoint, and its name in pictures

# ---------------------------------------------------------------------------------------------------- from a prompt


class Model:
    """A checkpoint of dit.py, prune.py or distill.py, ready to sample."""

    def __init__(self, path, device, precision, steps, cfg):
        self.dit, self.checkpoint = load_dit(path, device, *STAGES)
        self.stage, self.device, self.precision, self.cfg = self.checkpoint["stage"], device, precision, cfg
        self.student = self.stage == "student"
        self.steps = steps or (len(self.checkpoint["timesteps"]) if self.student else 40)
        self.evaluations = self.steps * (1 if self.student or cfg == 1 else 2)  # a clip

    def tokens(self, captions):
        return text_input(self.checkpoint, captions).to(self.device)

    def noise(self, n, seed):
        """[steps, n, c, t, h, w]. Clip i's noise depends on seed + i alone, and is the same for every checkpoint."""
        shape = (self.steps if self.student else 1, *self.checkpoint["latent_shape"])
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)],
                           dim=1).to(self.device)

    def sample(self, tokens, noises, path=None):
        """-> normalised latents [b, c, t, h, w]. path: as in sample_euler."""
        with self.precision():
            if self.student:
                return sample_student(self.dit, noises, tokens, path)
            return sample_euler(self.dit, noises[0], tokens, torch.zeros_like(tokens), self.steps, self.cfg, path)

    def make(self, captions, seed, batch=48):
        """-> normalised latents [n, c, t, h, w] for these captions, and the median over batches of seconds a clip."""
        tokens, noises, x0, seconds = self.tokens(captions), self.noise(len(captions), seed), [], []
        for i in progress(range(0, len(captions), batch), f"{STAGES[self.stage]}, {len(captions)} clips"):
            start = time.perf_counter()
            x0.append(self.sample(tokens[i:i + batch], noises[:, i:i + batch]))
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / len(x0[-1]))
        return torch.cat(x0), float(np.median(seconds))


def models_of(args, device, precision):
    """The checkpoints that the run has. --sampling-steps is for the teacher and the pruned model: a student learned its
    own."""
    for stage in STAGES:
        path = args.run / f"{stage}.pt"
        if path.exists():
            yield Model(path, device, precision, args.sampling_steps if stage != "student" else None, args.cfg)
        else:
            print(f"{path} is not there, so left out: `{maker(path, stage)}` makes it", file=sys.stderr)


# -------------------------------------------------------------------------------------------------- measuring clips


def subject_mask(clips):
    """How much each pixel belongs to the subject, [b, t, h, w]: its colourfulness, since backgrounds are grey."""
    chroma = (clips.amax(1) - clips.amin(1)) / 1.6  # 1.6: the palette's own, in [-1, 1]
    return torch.where(chroma > 0.25, chroma.clamp(max=1), 0)


def centroids(mask):
    """[b, t, h, w] -> the subject's centre in pixels [b, t, 2] as (x, y), and its area in pixels [b, t]."""
    y, x = (torch.arange(n) + 0.5 for n in mask.shape[-2:])
    area = mask.sum((2, 3))
    return torch.stack([(mask.sum(2) * x).sum(-1), (mask.sum(3) * y).sum(-1)], -1) / (area + 1e-6)[..., None], area


def centred(images, mask, pixels=24):
    """Each frame's subject, moved to the middle and scaled to one area: images [b, c, t, h, w], mask [b, t, h, w]
    -> [b, t, c, pixels, pixels]."""
    centre, area = centroids(mask)
    scale, size = area.clamp(min=4).sqrt(), torch.tensor([mask.shape[3], mask.shape[2]])
    steps = (torch.arange(pixels) + 0.5) / pixels * 2 - 1
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)  # [pixels, pixels, (x, y)]
    at = (centre[..., None, None, :] + grid * scale[..., None, None, None]) / size * 2 - 1
    crops = F.grid_sample(rearrange(images, "b c t h w -> (b t) c h w"), at.flatten(0, 1), align_corners=False)
    return rearrange(crops, "(b t) c h w -> b t c h w", b=len(mask))


def measure(clips):
    """What a clip of `shapes` shows: indices (colour, shape, direction) [b, 3], -1 where nothing can be seen.
    clips: [b, 3, t, h, w] in [-1, 1]."""
    mask = subject_mask(clips)
    centre, area = centroids(mask)
    weight = mask[:, None] / (mask.sum((1, 2, 3)) + 1e-6)[:, None, None, None, None]
    mean_color = (clips * weight).sum((2, 3, 4))
    palette = torch.tensor(list(COLORS.values())) * 2 - 1
    color = torch.cdist(mean_color, palette).argmin(1)

    # Templates as large as the data's shapes and a little blurred, as an autoencoder's edges are.
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    templates = shape_coverage(x, y, torch.tensor(6.0)).permute(2, 0, 1)[:, None]  # [shapes, t=1, h, w]
    templates = F.avg_pool2d(F.avg_pool2d(templates, 3, 1, 1), 3, 1, 1)
    templates, crops = centred(templates[:, None], templates)[:, 0, 0], centred(mask[:, None], mask)[:, :, 0].mean(1)
    templates, crops = (x.flatten(1) - x.mean((1, 2))[:, None] for x in (templates, crops))
    shape = F.cosine_similarity(crops[:, None], templates, dim=-1).argmax(1)

    third = max(1, clips.shape[2] // 3)
    travel = centre[:, -third:].mean(1) - centre[:, :third].mean(1)
    headings = torch.tensor(list(DIRECTIONS.values())).float()
    direction = torch.where(travel.norm(dim=1) > 0.05 * min(clips.shape[3:]), (travel @ headings.T).argmax(1), -1)
    seen = (area.amin(1) > 4)[:, None]
    return torch.where(seen, torch.stack([color, shape, direction], 1), -1)


def expected(captions):
    """The indices that `measure` should find, [b, 3]: -2 where a caption does not say."""
    def find(caption, names):
        return next((i for i, name in enumerate(names) if name in words(caption)), -2)
    return torch.tensor([[find(c, names) for names in (COLORS, SHAPES, DIRECTIONS)] for c in captions])


def motion_scores(clips, on_shapes):
    """Subject consistency: cosine similarity of each frame's subject (of the whole frame, for real clips) with the
    first's. Motion smoothness: 1 - the mean absolute distance of a frame from the mean of its neighbours. Dynamic
    degree: the mean absolute difference of neighbouring frames. Pixel values in [0, 1]; all averaged over clips."""
    frames = clips / 2 + 0.5
    subject = centred(frames, subject_mask(clips)) if on_shapes else rearrange(frames, "b c t h w -> b t c h w")
    subject, between = subject.flatten(2), (frames[:, :, 2:] + frames[:, :, :-2]) / 2
    return dict(subject_consistency=F.cosine_similarity(subject[:, 1:], subject[:, :1], dim=-1).mean().item(),
                motion_smoothness=1 - (frames[:, :, 1:-1] - between).abs().mean().item(),
                dynamic_degree=(frames[:, :, 1:] - frames[:, :, :-1]).abs().mean().item())


def fixed_features(clips):
    """[b, 3, t, h, w] -> [b, 64]: means and deviations of a small convolution network that nobody trained. Its first
    filters sum to zero, so that it looks at edges and motion: with brightness in it, blur would hardly show."""
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(16, 3, 3, 3, 3, generator=g) / 9, torch.randn(32, 16, 3, 3, 3, generator=g) / 20
    first = first - first.mean((2, 3, 4), keepdim=True)
    x = F.relu(F.conv3d(clips, first, stride=(1, 2, 2), padding=1))
    x = F.relu(F.conv3d(x, second, stride=2, padding=1)).flatten(2)
    return torch.cat([x.mean(2), x.std(2)], dim=1)


def frechet(a, b):
    """Frechet distance of two sets of features [n, d], each seen as a Gaussian (Heusel et al. 2017, FID)."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), torch.cov(x.T)) for x in (a.double(), b.double()))
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


def judge(captions, clips, x0, data):
    """What each clip shows of what its caption asks: a dict a clip, {aspect: (whether it is right, what it shows)}."""
    if data.file["config"]["data"] == "shapes":
        names = {"color": [*COLORS, "none"], "shape": [*SHAPES, "none"], "direction": [*DIRECTIONS, "none"]}  # -1: none
        return [{aspect: (is_ == asked, names[aspect][is_]) for aspect, is_, asked in zip(names, *both)}
                for both in zip(measure(clips).tolist(), expected(captions).tolist())]
    known = data.x0(data.train).to(x0.device).flatten(1)
    nearest = [data.captions[i] for i in torch.cdist(x0.flatten(1), known).argmin(1).tolist()]
    return [{"nearest training clip": (found == asked, found)} for found, asked in zip(nearest, captions)]


@torch.no_grad()
def test_loss(dit, data, device, precision, batch=64):
    """The flow-matching loss on clips that no stage trained on, with noise and levels that are always the same: what
    tells two teachers, or two pruned models, apart that make clips equally right."""
    losses = []
    for i in progress(range(0, len(data.test), batch), "testing"):
        picked, g = data.test[i:i + batch], Draws(f"test {i}", len(data.test[i:i + batch]))
        x0, noise, t = data.x0(picked), g.randn(*data.latents.shape[1:]), logit_normal(g)
        tokens = text_input(data.context(), [data.test_captions[j - len(data.train)] for j in picked])
        with precision():
            loss = flow_loss(dit, *(x.to(device) for x in (x0, tokens, noise, t)))
        losses += [loss.item()] * len(picked)
    return float(np.mean(losses))


def share(values):
    return float(np.mean([bool(v) for v in values]))


def score(args, device, precision):
    """Every checkpoint of the run on the same prompts and noise; half as many held-out prompts as seen ones. And, to
    say how far a score can go, as many training clips of `shapes`, which no model but the VAE has touched."""
    with reading(args.latents):
        data = Latents(args.latents)
    vae = load_vae(args.vae, device)
    if not any((args.run / f"{stage}.pt").exists() for stage in STAGES):
        fail(f"nothing to score in {args.run}: `{maker(args.run / 'dit.pt', 'dit')}` makes the first checkpoint")
    on_shapes = data.file["config"]["data"] == "shapes"
    seen = [sorted(set(data.captions))[i % len(set(data.captions))] for i in range(args.score)]
    held = data.file["held_out_captions"]
    held = [held[i % len(held)] for i in range(args.score // 2)] if held else []
    reference = data.x0(data.test if len(data.test) > 1 else data.train[:256]).to(device)
    real, scores = fixed_features(decode(vae, data.context(), reference, precision)), {}

    def scores_of(captions, n, context, x0):  # n: how many of the captions are seen ones
        clips = decode(vae, context, x0, precision)
        told = judge(captions, clips, x0, data)
        right = [all(ok for ok, _ in aspects.values()) for aspects in told]
        result = {"text_alignment": share(right[:n])}
        if on_shapes:
            result |= {aspect: share(t[aspect][0] for t in told[:n]) for aspect in told[0]}
            result |= {"held_out_alignment": share(right[n:])} if right[n:] else {}
        return dict(**result, **motion_scores(clips, on_shapes), frechet=frechet(fixed_features(clips), real), clips=n)

    def tell(name, values):
        print(name.ljust(8), "  ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)

    for model in models_of(args, device, precision):
        x0, seconds = model.make(seen + held, args.seed)
        scores[model.stage] = scores_of(seen + held, len(seen), model.checkpoint, x0)
        if not model.student and len(data.test):  # a student jumps; it has no flow
            scores[model.stage]["test_loss"] = test_loss(model.dit, data, device, precision)
        scores[model.stage] |= dict(params=count(model.dit), evaluations=model.evaluations, seconds_per_clip=seconds)
        tell(model.stage, scores[model.stage])
    record(args.run, "score", scores)
    if on_shapes:
        picked = data.train[:len(seen + held)]
        own = scores_of([data.captions[i] for i in picked], len(picked), data.context(), data.x0(picked).to(device))
        tell("data", own)
        record(args.run, "data", own)
    print(f"{args.run / 'metrics.json'}: score; next: {command('export_coreml.py', args.run, args.preset)}")


# --------------------------------------------------------------------------------------------------------- pictures


def cell(clip, caption, size=128):
    """[3, t, h, w] in [-1, 1] -> frames [t, H, W, 3] uint8, enlarged to `size` or more, the caption above."""
    frames = ((clip / 2 + 0.5) * 255).round().byte().permute(1, 2, 3, 0).numpy()
    factor = max(1, math.ceil(size / frames.shape[2]))
    frames = frames.repeat(factor, 1).repeat(factor, 2)
    lines, font = [""], ImageFont.load_default(size=12)
    for word in caption.split():
        if font.getlength(f"{lines[-1]} {word}") > frames.shape[2] - 6:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    banner = Image.new("RGB", (frames.shape[2], 14 * 2 + 6), "white")
    ImageDraw.Draw(banner).multiline_text((4, 2), "\n".join(lines[:2]), fill="black", font=font, spacing=2)
    banner = np.broadcast_to(np.asarray(banner), (len(frames), *np.asarray(banner).shape))
    return np.pad(np.concatenate([banner, frames], axis=1), ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)


def write_video(path, rows, fps):
    """rows: a list of rows of cells [t, H, W, 3]. mp4 and gif move; a png holds all frames of each cell in a line."""
    if path.suffix == ".png":
        data = np.concatenate([np.concatenate([np.concatenate(list(c), axis=1) for c in row], axis=1) for row in rows])
        encoded = iio.imwrite("<bytes>", data, extension=".png")
    else:
        data = np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)
        data = data[:, :data.shape[1] // 2 * 2, :data.shape[2] // 2 * 2]  # H.264 wants even sizes; a gif may have them
        encoded = gif(data, fps) if path.suffix == ".gif" else iio.imwrite(
            "<bytes>", data, extension=".mp4", plugin="pyav", codec="libx264", fps=fps)
    write_aside(path, lambda f: f.write(encoded))


def moving(clip, fps):
    """[3, t, h, w] in [-1, 1] -> an <img> with its frames inside; a large clip is made smaller."""
    t, h, w = clip.shape[1:]
    if max(h, w) > 192:
        clip = F.interpolate(clip[None], (t, h * 192 // max(h, w), w * 192 // max(h, w)), mode="area")[0]
    frames = ((clip / 2 + 0.5) * 255).round().byte().permute(1, 2, 3, 0).numpy()
    data = iio.imwrite("<bytes>", frames, extension=".webp", plugin="pillow", duration=1000 / fps, loop=0,
                       lossless=max(h, w) <= 64, quality=85)
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(data).decode()}">'


def number(x):
    return f"{x / 1e6:.2f} M" if x >= 1e6 else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def pipeline(scores, pixels, latents):
    """What each stage saves, as bars: hollow is before it, filled is after."""
    rows = [("vae.py", "numbers a clip", pixels, latents)]
    if len(scores) == len(STAGES):
        dit, pruned, student = ((s["params"], s["evaluations"], s["seconds_per_clip"]) for s in scores.values())
        rows += [("dit.py", "parameters", dit[0], dit[0]), ("prune.py", "parameters", dit[0], pruned[0]),
                 ("distill.py", "network evaluations a clip", dit[1], student[1]),
                 ("all of them", "seconds a clip", dit[2], student[2])]
    return svg(48 * len(rows), *(
        label(0, y + 15, script, BOLD) + label(358, y + 15, what, END) + rect(1, y + 22, 220, 14, HOLLOW)
        + rect(1, y + 22, 220 * after / before, 14, FULL)
        + label(358, y + 33, number(after) if before == after else f"{number(before)} → {number(after)}", END)
        for y, (script, what, before, after) in zip(range(0, 999, 48), rows)))


def curve(name, values):
    """A loss, each point the mean of a hundredth of the steps; logarithmic where it falls far."""
    y = np.array([piece.mean() for piece in np.array_split(np.array(values), min(100, len(values)))])
    low, high = y.min(), y.max()
    y = np.log(y) if low > 0 and high > 20 * low else y
    y = 104 - 96 * (y - y.min()) / (np.ptp(y) + 1e-9)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(np.linspace(56, 356, len(y)), y))
    return svg(128, f'<path d="M52 4V108H358" {HOLLOW}/><polyline points="{points}" fill="none" stroke="#4c8bf5" '
               'stroke-width="2"/>', label(48, 13, f"{high:.3g}", END), label(48, 107, f"{low:.3g}", END),
               label(52, 123, 1), label(358, 123, f"{len(values)} steps", END)
               ) + f"<figcaption><b>{name}</b>, {values[0]:.3g} to {values[-1]:.3g}</figcaption>"


def histogram(sets):
    """Distributions of scores {name: array}, one below the other on one axis; the line is 0."""
    everything = np.concatenate(list(sets.values()))
    edges = np.linspace(min(everything.min(), -0.1), max(everything.max(), 0.1), 31)
    zero, y, parts = 66 - 290 * edges[0] / (edges[-1] - edges[0]), 50 * len(sets) + 12, []
    for i, (name, values) in enumerate(sets.items()):
        bars = np.histogram(values, edges)[0]
        parts += [label(0, 50 * i + 44, name)] + [rect(66 + 290 / 30 * j, 50 * i + 44 - h, 9, h, FULL)
                                                  for j, h in enumerate(40 * bars / bars.max()) if h]
    return svg(y + 4, *parts, f'<path d="M{zero:.1f} 0V{y - 12}" stroke="currentColor"/>',
               label(66, y, f"{edges[0]:.2g}"), label(356, y, f"{edges[-1]:.2g}", END))


# ------------------------------------------------------------------------------------------------------- the report

STYLE = """:root{color-scheme:light dark;--page:#fff;--ink:#222;--soft:#666;--line:#ddd;--ok:#1a7f37;--no:#cf222e}
@media(prefers-color-scheme:dark){:root{--page:#111;--ink:#eee;--soft:#999;--line:#444;--ok:#3fb950;--no:#ff7b72}}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem;background:var(--page)}
body,b,svg{color:var(--ink)}figcaption,small{color:var(--soft);font:.8rem/1.4 system-ui,sans-serif}figure{margin:0}
h1{margin:0}h2{margin:3rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--line)}h3{margin:1.5rem 0 .5rem}
p{max-width:44rem;margin:.5rem 0 1rem}svg{display:block;width:100%;max-width:30rem}pre{overflow-x:auto}
img{display:block;width:100%;image-rendering:pixelated;border-radius:4px;margin-bottom:3px}
.grid{display:grid;gap:.75rem;
grid-template-columns:repeat(auto-fill,minmax(max(var(--least),100%/(var(--most) + 1)),1fr))}
table{border-collapse:collapse;width:100%;max-width:44rem;font-size:.9rem;font-variant-numeric:tabular-nums}
td{padding:.3rem 0 .3rem .5rem;text-align:right;border-bottom:1px solid var(--line)}.ok{color:var(--ok)}
td:first-child{text-align:left;padding-left:0;overflow-wrap:anywhere}.no{color:var(--no)}"""


def grid(most, least, figures):
    """Figures side by side: at most so many, and none narrower than `least`."""
    figures = "".join(f"<figure>{figure}</figure>" for figure in figures)
    return f'<div class="grid" style="--most:{most};--least:{least}">{figures}</div>'


def missing(args, *names):
    """What to read in place of what the run does not have."""
    return "".join(f"<p>Left out: {name} is not there. <code>{escape(maker(args.run / name, Path(name).stem))}</code> "
                   "makes it.</p>" for name in names if not (args.run / name).exists())


def side_by_side(args, data, models, captions, show):
    """A row a prompt, a column a stage; what each clip shows stands below it. Writes compare.gif and compare.png."""
    where = {c: i for i, c in enumerate(data.captions + data.test_captions)}  # a test clip, if the caption has one
    where, made = [where[c] for c in captions], data.file["settings"]
    real, columns, html = data.x0(where), {}, ""
    if made["data"] == "shapes" or Path(made["data"]).is_dir():
        source = open_data(*(made[key] for key in ("data", "size", "clips", "stride", "seed")))
        if source.captions == data.captions + data.test_captions:
            columns["input"] = source.clip(where), real
    if not columns:
        html = f"<p>Left out: the input. {escape(made['data'])} has gone or changed.</p>"
    columns["reconstruction"] = show(real), real
    for model in models:
        x0 = model.make(captions, args.seed)[0]
        columns[STAGES[model.stage]] = show(x0), x0
    rows = [[cell(clips[i], f"{name}: {caption}", 160) for name, (clips, _) in columns.items()]
            for i, caption in enumerate(captions)]
    write_video(args.run / "compare.gif", rows, args.fps)
    middle = rows[0][0].shape[0] // 2
    write_video(args.run / "compare.png", [[c[[0, middle, -1]] for c in row] for row in rows], args.fps)

    told = {name: judge(captions, *column, data) for name, column in columns.items()}
    for i, caption in enumerate(captions):
        new = " <small>never trained on</small>" if caption in data.file["held_out_captions"] else ""
        html += f"<h3>{escape(caption)}{new}</h3>" + grid(5, "6.4rem", (
            f"{moving(clips[i], args.fps)}<figcaption><b>{name}</b><br>" + " ".join(
                f"<span class={'ok' if ok else 'no'}>{'✓' if ok else '✗'}&nbsp;{escape(seen)}</span>"
                for ok, seen in told[name][i].values()) + "</figcaption>" for name, (clips, _) in columns.items()))
    return html + missing(args, *(f"{stage}.pt" for stage in STAGES))


def from_noise(args, models, caption, show):
    """x_t, and the x0 that the network sees in it, at up to eight steps of a sampling. Writes path.png."""
    html, rows = "", []
    for model in models:
        path = []
        model.sample(model.tokens([caption]), model.noise(1, args.seed), path)
        steps = np.linspace(0, len(path) - 1, min(8, len(path))).round().astype(int)
        t, x_t, x0 = zip(*(path[i] for i in steps))
        x_t, x0 = show(torch.cat(x_t)), show(torch.cat(x0))
        notes, name = [f"step {i + 1}, t={at:.2f}" for i, at in zip(steps, t)], STAGES[model.stage]
        html += f"<h3>{name}: {len(path)} steps, {model.evaluations} evaluations</h3>" + grid(8, "4.6rem", (
            f"{moving(a, args.fps)}{moving(b, args.fps)}<figcaption>{note}</figcaption>"
            for a, b, note in zip(x_t, x0, notes)))
        row = [cell(torch.cat(both, dim=2), f"{name} {note}", 96)[[both[0].shape[1] // 2]]
               for *both, note in zip(x_t, x0, notes)]
        rows.append(row + [np.full_like(row[0], 255)] * (8 - len(row)))
    write_video(args.run / "path.png", rows, args.fps)
    return html


def opinions(args, data, models, device):
    """What the trained discriminator says of real clips that no stage trained on, and of clips made from the same
    captions, all with the same noise: {name: scores}."""
    discriminator, settings = load_discriminator(args.run / "discriminator.pt", device)
    g = torch.Generator().manual_seed(args.seed)
    picked = torch.randperm(len(data.test), generator=g)[:64].tolist()
    captions = [data.test_captions[i] for i in picked]
    real = data.x0([data.test[i] for i in picked]).to(device)
    sets = {"real": real, **{STAGES[m.stage]: m.make(captions, args.seed)[0] for m in models}}
    s = torch.sigmoid(settings["noise_level"] + torch.randn(len(picked), generator=g)).to(device)
    noise, tokens = torch.randn(sets["real"].shape, generator=g).to(device), models[0].tokens(captions)
    return {name: discriminator(add_noise(x0, noise, s), s, tokens).cpu().numpy() for name, x0 in sets.items()}


def report(args, device, precision):
    """report.html, one file that needs no other, and the README's pictures: compare.gif, path.png, pipeline.svg. What
    the run does not have is left out with a word."""
    with reading(args.latents):
        data = Latents(args.latents)
    vae, models = load_vae(args.vae, device), [*models_of(args, device, precision)]
    held, captions = data.file["held_out_captions"], sorted(set(data.captions))
    captions = list(dict.fromkeys(captions[37 * i % len(captions)] for i in range(4)))  # of each kind something
    captions += held[::max(1, len(held) // 2)][:2]
    few, metrics = [m for m in models if m.stage != "pruned"], read_metrics(args.run)
    scores = metrics.get("score", {})

    def show(x0):
        return decode(vae, data.context(), x0.to(device), precision)

    bars = pipeline(scores, 3 * math.prod(data.file["config"]["size"]), math.prod(data.latents.shape[1:]))
    columns = {STAGES[stage]: s for stage, s in scores.items()} | {k: metrics[k] for k in ("data",) if k in metrics}
    keys = dict.fromkeys(["params", "evaluations", "seconds_per_clip", *(k for s in scores.values() for k in s)])
    table = [["", *columns]] + [[key.replace("_", " "), *(number(s[key]) if key in s else "" for s in columns.values())]
                                for key in keys]
    table = "".join(f"<tr><td>{'<td>'.join(row)}" for row in table) if scores else (
        f"<tr><td>Not yet: <code>{escape(command('sample.py', args.run, args.preset, '--score'))}</code>")
    masks = missing(args, "masks.pt") or mask_map(load(args.run / "masks.pt", "masks")["masks"])
    said = {} if missing(args, "discriminator.pt") or not few else opinions(args, data, few, device)
    told = ", ".join(f"{(said['real'][:, None] > x).mean():.0%} ({name})" for name, x in said.items() if name != "real")
    curves = [curve(f"{name}: {key.replace('_', ' ')}", values)
              for name in ("vae", *STAGES) if (args.run / f"{name}.pt").exists()
              for key, values in load(args.run / f"{name}.pt", name)["history"].items()]
    seconds = ", ".join(f"{stage} {metrics[stage]['seconds']:.0f}" for stage in metrics if "seconds" in metrics[stage])
    sections = [
        ("What each stage saves", "Hollow is before it, filled after it.", bars),
        ("Side by side", "Input is a real clip with that caption, reconstruction what the VAE keeps of it; the others "
         "start from the same noise. Below each clip stands what it shows, as measured (of a real clip the caption of "
         "the nearest training clip), ✓ where the caption asks for it.",
         side_by_side(args, data, models, captions, show)),
        ("Costs and scores", "Text alignment: the share of clips that are all that their caption says; held out "
         "alignment: the same, of combinations never trained on. Frechet: the distance from real clips, less is "
         "better. Seconds are those of sampling latents. Data: training clips as the VAE keeps them.",
         f"<table>{table}</table>"),
        ("From noise to a clip", f"“{escape(captions[-1])}”. Above: x_t, what the network is given. Below: x0, the "
         "clean clip that it sees in it. The teacher creeps along its velocity; the student jumps to x0, adds noise, "
         "and jumps again.", from_noise(args, few, captions[-1], show) if few else ""),
        ("What was cut", "A row a block of the teacher, a square an attention head, a bar the FFN's channels. Filled "
         "stays, hollow is cut; a block that is cut keeps nothing.", masks),
        ("What the discriminator says", "Scores of real clips that no stage trained on, and of clips made from the "
         "same captions, with the same noise; right of the line (0) it says: real.", f"<p>Of all pairs it puts the "
         f"real clip above the generated one in {told}; a coin would in 50%.</p>{histogram(said)}" if said else
         missing(args, "discriminator.pt")),
        ("Training", f"Seconds: {seconds}. A curve that falls far has a logarithmic axis.", grid(3, "16rem", curves)),
        ("All figures", "", f"<pre>{escape(json.dumps(metrics, indent=1))}</pre>")]
    size = "×".join(map(str, data.file["config"]["size"]))
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>Mobile Video DiT: {escape(str(args.run))}</title><style>{STYLE}</style><h1>Mobile Video DiT</h1>"
            f"<p>The run {escape(str(args.run))}: clips of {size} (frames, height, width), stage by stage.</p>"
            + "".join(f"<h2>{title}</h2><p>{words}</p>{body}" for title, words, body in sections) + "</html>")
    write_aside(args.run / "pipeline.svg", lambda f: f.write(bars.encode()))
    write_aside(args.run / "report.html", lambda f: f.write(page.encode()))
    print(f"open {args.run / 'report.html'}")


def main(argv=None):
    p = parser(__doc__, PRESETS)
    p.add_argument("--prompt", action="append", help="what to show, in words of the training captions; may be repeated")
    p.add_argument("--prompts", type=Path, help="a text file with one prompt a line")
    p.add_argument("--model", type=Path, help="the checkpoint to sample from: dit.pt, pruned.pt or a student")
    p.add_argument("--vae", type=Path, help="the autoencoder, from vae.py")
    p.add_argument("--latents", type=Path, help="the data set, from vae.py, for --score and --report")
    p.add_argument("--out", type=Path, help="an mp4, a gif, or a png with all frames")
    p.add_argument("--sampling-steps", type=positive, help="one evaluation of the network each, two with --cfg; --score"
                   " and --report leave a student its own (default: a student's own, 40 for the others)")
    p.add_argument("--cfg", type=between(0), default=3.0, help="guidance of dit.pt and pruned.pt; 1: none (default: 3)")
    p.add_argument("--fps", type=positive, default=8, help="frames a second of what is written (default: 8)")
    p.add_argument("--score", type=between(2, kind=int), nargs="?", const=96, metavar="CLIPS",
                   help="score CLIPS clips (default: 96) of every checkpoint of the run, into RUN/metrics.json")
    p.add_argument("--report", action="store_true", help="write RUN/report.html and the README's pictures beside it")
    args = parse(p, PRESETS, argv, model="student.pt", vae="vae.pt", latents="latents.pt", out="sample.mp4")
    prompts = list(args.prompt or [])
    if args.prompts:
        try:
            prompts += [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--prompts {args.prompts}: {error}")
    if not (prompts or args.score or args.report):
        fail('nothing to do: give --prompt "a red circle moving left", --prompts FILE, --score or --report')
    if args.out.suffix not in (".mp4", ".gif", ".png"):
        fail(f"--out {args.out}: the name must end in .mp4, .gif or .png")
    if any(not words(prompt) for prompt in prompts):
        fail("a prompt without a word: say what to show, such as \"a red circle moving left\"")
    device, precision = set_up(args)
    if args.score:
        score(args, device, precision)
    if args.report:
        report(args, device, precision)
    if prompts:
        others = [args.run / f"{stage}.pt" for stage in STAGES if (args.run / f"{stage}.pt").exists()]
        if others and not args.model.exists():
            fail(f"{args.model} is not there: `{maker(args.model, 'student')}` makes it; --model {others[-1]} is there")
        model, vae = Model(args.model, device, precision, args.sampling_steps, args.cfg), load_vae(args.vae, device)
        clips = decode(vae, model.checkpoint, model.make(prompts, args.seed)[0], precision)
        cells = [cell(clip, prompt) for clip, prompt in zip(clips, prompts)]
        across = 1 if args.out.suffix == ".png" else math.ceil(math.sqrt(len(cells)))
        cells += [np.full_like(cells[0], 255)] * (-len(cells) % across)
        write_video(args.out, [cells[i:i + across] for i in range(0, len(cells), across)], args.fps)
        print(f"{args.out}: {len(prompts)} clip(s) by {args.model}, {model.evaluations} network evaluations each")


if __name__ == "__main__":
    script(main)

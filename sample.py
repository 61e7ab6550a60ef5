"""Prompts in, videos out; the scores of every checkpoint; a page that shows what each stage does.

The paper reports VBench (https://arxiv.org/abs/2311.17982). Three of its dimensions keep their
names here, but each is a plain formula: the data is rendered, so a clip can be measured instead of
shown to another network.

    text alignment        share of clips with colour (by palette), shape (by template) and direction
                          (by centroid) all as the caption says; of filmed clips, the share whose
                          nearest training clip, by latents, carries the caption
    unseen combinations   the same, on combinations that no stage was trained on
    subject consistency   cosine similarity of each frame's subject with the first frame's
    motion smoothness     1 - mean distance of a frame from the mean of its neighbours
    dynamic degree        mean difference of neighbouring frames, pixels in [0, 1]
    outline IoU           overlap of the subject with the ideal outline of the shape asked for
    Frechet distance      from test clips as the VAE keeps them, on the features of a fixed random
                          network; less is better

A student samples without guidance in its own few steps, unless --prompt comes with
--sampling-steps; dit.pt and pruned.pt take --sampling-steps Euler steps with --cfg.

    python sample.py --prompt "a red circle moving left" --out red.mp4   # or .gif, .png
    python sample.py --score        # every checkpoint of the run -> metrics.json
    python sample.py --report       # -> report.html, and the README's pictures
"""
import base64
import io
import json
import math
import textwrap
import time
from html import escape
from itertools import cycle, islice
from pathlib import Path
from string import Template

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from common import (add_device_flags, add_file, check_settings, count_parameters, fail, load,
                    make_parser, number, positive, progress, read_metrics, reading, record_metrics,
                    run_script, say, set_up, size, step_generator, write_atomically)
from distill import sample_student
from dit import (Latents, decode, flow_loss, load_dit, logit_normal, sample_euler, tokenize, words)
from vae import (COLORS, DIRECTIONS, SHAPES, latent_size, load_vae, open_data, read_embedding,
                 shape_coverage)
from vae import PRESETS as VAE_PRESETS

STAGES = {"dit": "teacher", "pruned": "pruned", "student": "student"}  # checkpoint -> its name

# ------------------------------------------------------------ from a prompt


class Model:
    """A checkpoint of dit.py, prune.py or distill.py, ready to sample. steps: None means 40, or
    a student's own. nfe: function evaluations per clip."""

    def __init__(self, path, device, precision, steps, cfg):
        self.dit, self.checkpoint = load_dit(path, device, *STAGES)
        self.device = device
        self.precision = precision
        self.cfg = cfg
        self.latent_shape = self.checkpoint["latent_shape"]
        self.stage = self.checkpoint["stage"]
        self.is_student = self.stage == "student"
        own_steps = len(self.checkpoint["timesteps"]) if self.is_student else 40
        self.steps = steps or own_steps
        nfe_per_step = 1 if self.is_student or cfg == 1 else 2
        self.nfe = nfe_per_step * self.steps

    def noise(self, n, seed):
        """[steps, n, c, t, h, w]. Clip i's noise depends on seed + i alone, and its first step's is
        the same for every checkpoint."""
        steps = self.steps if self.is_student else 1
        shape = steps, *self.latent_shape
        clips = []
        for i in range(n):
            g = torch.Generator().manual_seed(seed + i)
            clips.append(torch.randn(shape, generator=g))
        return torch.stack(clips, dim=1).to(self.device)

    def sample(self, prompts, noise, trajectory=None):
        """-> normalised latents [b, c, t, h, w]. trajectory: as in sample_euler."""
        with self.precision():
            if self.is_student:
                return sample_student(self.dit, noise, prompts, trajectory)
            return sample_euler(self.dit, noise[0], prompts, self.steps, self.cfg, trajectory)

    def make(self, prompts, seed, batch=48):
        """-> normalised latents [n, c, t, h, w] on the CPU, and the median over batches of seconds
        per clip. prompts: what the text encoder reads, [n, words, ...]."""
        n = len(prompts)
        prompts = prompts.to(self.device)
        noise = self.noise(n, seed)
        x0 = []
        seconds = []
        for i in progress(range(0, n, batch), desc=f"{STAGES[self.stage]}, {n} clips"):
            start = time.perf_counter()
            latents = self.sample(prompts[i:i + batch], noise[:, i:i + batch])
            x0.append(latents.cpu())  # waits for the device
            seconds.append((time.perf_counter() - start) / len(x0[-1]))
        return torch.cat(x0), float(np.median(seconds))


def models_of(args, data, device, precision):
    """The checkpoints that the run has. --sampling-steps is not for a student: it learned its
    own."""
    for stage in STAGES:
        path = args.run / f"{stage}.pt"
        if path.exists():
            steps = None if stage == "student" else args.sampling_steps
            model = Model(path, device, precision, steps, args.cfg)
            check_settings(path, model.checkpoint["settings"],
                           dict(latents_checksum=data.checksum))
            yield model
        else:
            say(f"{path} is not there, so left out")


# ------------------------------------------------------------ measuring clips


def subject_mask(clips):
    """How much each pixel belongs to the subject, [b, t, h, w]: its colourfulness, since
    backgrounds are grey."""
    chroma = (clips.amax(1) - clips.amin(1)) / 1.6  # 1.6: the palette's own, in [-1, 1]
    return torch.where(chroma > 0.25, chroma.clamp(max=1), 0)


def centroids(mask):
    """[b, t, h, w] -> the subject's centre [b, t, 2] as (x, y) and its area [b, t], in pixels."""
    h, w = mask.shape[-2:]
    area = mask.sum((2, 3))
    x = (mask.sum(2) * (torch.arange(w) + 0.5)).sum(-1)
    y = (mask.sum(3) * (torch.arange(h) + 0.5)).sum(-1)
    return torch.stack([x, y], dim=-1) / (area + 1e-6)[..., None], area


def centred(images, mask, pixels=24):
    """Each frame's subject, moved to the middle and scaled to one area: images [b, c, t, h, w],
    mask [b, t, h, w] -> [b, t, c * pixels * pixels]."""
    centre, area = centroids(mask)
    # Half the side of the window, which is as large as four subjects: [b, t, 1, 1, 1].
    half_side = area.clamp(min=4).sqrt()[..., None, None, None]
    ticks = (torch.arange(pixels) + 0.5) / pixels * 2 - 1
    offsets = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)
    position = centre[..., None, None, :] + offsets * half_side  # [b, t, pixels, pixels, 2]
    grid = position / torch.tensor([mask.shape[3], mask.shape[2]]) * 2 - 1
    frames = rearrange(images, "b c t h w -> (b t) c h w")
    crops = F.grid_sample(frames, grid.flatten(0, 1), align_corners=False)
    return rearrange(crops, "(b t) c h w -> b t (c h w)", b=len(mask))


def measure(clips):
    """What a clip of `shapes` shows: indices (colour, shape, direction) [b, 3], -1 where nothing
    can be seen. clips: [b, 3, t, h, w] in [-1, 1]."""
    mask = subject_mask(clips)
    centre, area = centroids(mask)
    weight = mask / (mask.sum((1, 2, 3), keepdim=True) + 1e-6)
    mean_color = (clips * weight[:, None]).sum((2, 3, 4))
    palette = torch.tensor(list(COLORS.values())) * 2 - 1
    color = torch.cdist(mean_color, palette).argmin(1)

    # Templates as large as the data's shapes and a little blurred, as an autoencoder's edges are.
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    shapes = rearrange(shape_coverage(x, y, torch.tensor(6.0)), "h w shape -> shape 1 h w")
    shapes = F.avg_pool2d(F.avg_pool2d(shapes, 3, 1, 1), 3, 1, 1)
    templates = centred(shapes[:, None], shapes)  # [shapes, 1, pixels * pixels]
    crops = centred(mask[:, None], mask).mean(1, keepdim=True)  # [b, 1, pixels * pixels]
    templates = templates - templates.mean(-1, keepdim=True)
    crops = crops - crops.mean(-1, keepdim=True)
    shape = F.cosine_similarity(crops, templates.transpose(0, 1), dim=-1).argmax(1)  # [b]

    third = max(1, clips.shape[2] // 3)
    travel = centre[:, -third:].mean(1) - centre[:, :third].mean(1)
    headings = torch.tensor(list(DIRECTIONS.values())).float()
    moves = travel.norm(dim=1) > 0.05 * min(clips.shape[3:])
    direction = torch.where(moves, (travel @ headings.T).argmax(1), -1)
    is_visible = (area.amin(1) > 4)[:, None]
    return torch.where(is_visible, torch.stack([color, shape, direction], dim=1), -1)


def outline_iou(clips, captions):
    """How well the subject fills the outline that the caption asks for: intersection over union
    with the ideal shape where that fits best, mean over frames. clips: [b, 3, t, h, w] of `shapes`
    -> [b] in [0, 1]"""
    mask = subject_mask(clips)
    b, _, h, w = mask.shape
    asked = [SHAPES.index(words(caption)[2]) for caption in captions]  # a COLOUR SHAPE moving ...
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")

    def overlap(fit):
        """fit: (x, y, radius) [b, t, 3] -> [b, t]"""
        shape_x, shape_y, radius = fit[..., None, None].unbind(2)  # each [b, t, 1, 1]
        ideal = shape_coverage(x - shape_x, y - shape_y, radius)[torch.arange(b), ..., asked]
        union = torch.maximum(mask, ideal).sum((2, 3))
        return torch.minimum(mask, ideal).sum((2, 3)) / (union + 1e-6)

    # Start from the centroid and about the right size; then take every step that fits better:
    # to the right, down, larger, and back.
    centre, area = centroids(mask)
    radius = (area / 2).sqrt().clamp(min=1)
    fit = torch.cat([centre, radius[..., None]], dim=-1)
    best = overlap(fit)
    for step in (0.2, 0.2, 0.1, 0.1, 0.05, 0.05, 0.02, 0.02):  # of the radius
        for move in [*torch.eye(3), *-torch.eye(3)]:
            candidate = fit + step * move * fit[..., 2:]
            new = overlap(candidate)
            fit = torch.where((new > best)[..., None], candidate, fit)
            best = torch.maximum(new, best)
    return best.mean(1)


def nearest_captions(x0, data, piece=4096):
    """Of each clip the caption of the nearest training clip, by distance of latents."""
    distances = []
    for start in range(0, len(data.train), piece):
        known = data.x0(data.train[start:start + piece])
        distances.append(torch.cdist(x0.flatten(1), known.flatten(1)))
    return [data.captions[i] for i in torch.cat(distances, dim=1).argmin(1)]


def judge(captions, clips, x0, data):
    """What each clip shows of what its caption asks: one dict per clip, {aspect: (whether it is
    right, what it shows)}."""
    verdicts = []
    if data.on_shapes:
        aspects = {"color": COLORS, "shape": SHAPES, "direction": DIRECTIONS}
        for indices, caption in zip(measure(clips).tolist(), captions):
            verdict = {}
            for (aspect, names), index in zip(aspects.items(), indices):
                shown = [*names, "none"][index]  # -1 is none
                verdict[aspect] = (shown in words(caption), shown)
            verdicts.append(verdict)
    else:
        for shown, caption in zip(nearest_captions(x0, data), captions):
            verdicts.append({"nearest training clip": (shown == caption, shown)})
    return verdicts


def motion_scores(clips, on_shapes):
    """Subject consistency (of filmed clips: of the whole frame), motion smoothness and dynamic
    degree, means over clips [b, 3, t, h, w] in [-1, 1]; none of fewer than three frames."""
    frames = clips / 2 + 0.5
    if frames.shape[2] < 3:
        return {}
    if on_shapes:
        subject = centred(frames, subject_mask(clips))  # [b, t, values]
    else:
        subject = rearrange(frames, "b c t h w -> b t (c h w)")
    similarity = F.cosine_similarity(subject[:, 1:], subject[:, :1], dim=-1)
    change = (frames[:, :, 1:] - frames[:, :, :-1]).abs()
    neighbours = (frames[:, :, 2:] + frames[:, :, :-2]) / 2
    distance = (frames[:, :, 1:-1] - neighbours).abs()
    return dict(subject_consistency=similarity.mean().item(), dynamic_degree=change.mean().item(),
                motion_smoothness=1 - distance.mean().item())


def fixed_features(clips):
    """[b, 3, t, h, w] -> [b, 64]: means and stds of a small convolution network that nobody
    trained. Its first filters sum to zero, so that it looks at edges and motion: with brightness in
    it, blur would hardly show."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(16, 3, 3, 3, 3, generator=g) / 9
    second = torch.randn(32, 16, 3, 3, 3, generator=g) / 20
    first = first - first.mean((2, 3, 4), keepdim=True)
    x = F.relu(F.conv3d(clips, first, stride=(1, 2, 2), padding=1))
    x = F.relu(F.conv3d(x, second, stride=2, padding=1)).flatten(2)
    return torch.cat([x.mean(2), x.std(2)], dim=1)


def frechet(a, b):
    """Frechet distance of two sets of features [n, d], each seen as a Gaussian (FID,
    https://arxiv.org/abs/1706.08500). It depends on both n: compare only distances between sets of
    the same sizes."""
    a = a.double()
    b = b.double()
    cov_a = torch.cov(a.T)
    cov_b = torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    return distance.item()


@torch.no_grad()
def validation_loss(dit, data, device, precision, batch=64):
    """The flow-matching loss on clips that no stage was trained on, always with the same noise: it
    tells models apart whose clips are equally right."""
    losses = []
    for start in progress(range(0, len(data.test), batch), desc="validation"):
        picked = data.test[start:start + batch]
        g = step_generator("validation", start)
        x0 = data.x0(picked)
        prompts = data.prompts_of([data.captions[i] for i in picked])
        noise = torch.randn(x0.shape, generator=g)
        t = logit_normal(len(picked), g)
        inputs = [x.to(device) for x in (x0, prompts, noise, t)]
        with precision():
            loss = flow_loss(dit, *inputs)
        losses += [loss.item()] * len(picked)  # the mean is over clips, not batches
    return float(np.mean(losses))


# ------------------------------------------------------------ the scores of a run


@torch.no_grad()
def score_clips(x0, captions, data, vae, precision, batch=32):
    """x0: normalised latents. -> one dict of scores per clip, and their features [n, 64]. In
    batches: decoded clips are large."""
    rows = []
    features = []
    for start in range(0, len(x0), batch):
        part = x0[start:start + batch]
        of_part = captions[start:start + batch]
        clips = decode(vae, part, precision)
        features.append(fixed_features(clips))
        verdicts = judge(of_part, clips, part, data)
        for clip, caption, verdict in zip(clips.split(1), of_part, verdicts):
            row = {aspect: float(right) for aspect, (right, _) in verdict.items()}
            row["text_alignment"] = min(row.values())  # all of them right
            if data.on_shapes:
                row["outline_iou"] = outline_iou(clip, [caption]).item()
            rows.append(row | motion_scores(clip, data.on_shapes))
    return rows, torch.cat(features)


def mean_scores(rows):
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def score(args, data, vae, models, precision):
    """Every checkpoint of the run on the same prompts and noise, half as many unseen prompts as
    seen ones; and training clips through the VAE alone: the ceiling of the scores."""
    if not models:
        fail(f"nothing to score in {args.run}: dit.py makes the first checkpoint")
    seen = list(islice(cycle(data.metadata["captions"]), args.score))
    unseen = list(islice(cycle(data.metadata["held_out_captions"]), args.score // 2))
    reference = data.test if len(data.test) > 1 else data.train[:256]
    real = []
    for start in range(0, len(reference), 32):  # decoded clips are large
        clips = decode(vae, data.x0(reference[start:start + 32]), precision)
        real.append(fixed_features(clips))
    real = torch.cat(real)
    scores = {}
    for model in models:
        x0, seconds = model.make(data.prompts_of(seen + unseen), args.seed)
        rows, features = score_clips(x0, seen + unseen, data, vae, precision)
        result = dict(params=count_parameters(model.dit), nfe=model.nfe, seconds_per_clip=seconds)
        result |= mean_scores(rows[:len(seen)])
        if unseen:
            result["held_out_alignment"] = mean_scores(rows[len(seen):])["text_alignment"]
        if not model.is_student:  # a student jumps; it has no flow
            result["validation_loss"] = validation_loss(model.dit, data, model.device, precision)
        scores[model.stage] = result | dict(frechet=frechet(features, real), clips=len(seen))
    record_metrics(args.run, "score", scores)
    if data.on_shapes:
        picked = data.train[:len(seen + unseen)]
        captions = [data.captions[i] for i in picked]
        rows, features = score_clips(data.x0(picked), captions, data, vae, precision)
        result = mean_scores(rows) | dict(frechet=frechet(features, real), clips=len(picked))
        record_metrics(args.run, "data", result)
    for name, *cells in score_table(read_metrics(args.run)):
        print(name.ljust(28), *(text.rjust(9) for text in cells))
    print(f"{args.run / 'metrics.json'}: scores; next: export_coreml.py")


# ------------------------------------------------------------ pictures


def cell(clip, caption, verdict=None, width=128):
    """[3, t, h, w] in [-1, 1] -> frames [t, H, W, 3] uint8, at least `width` wide, the caption
    above; verdict: (whether it is right, what it shows), written below the caption."""
    pixels = ((clip / 2 + 0.5) * 255).round().byte()
    frames = rearrange(pixels, "rgb t h w -> t h w rgb").numpy()
    factor = math.ceil(width / frames.shape[2])
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    width = frames.shape[2]
    font = ImageFont.load_default(size=12)
    lines = textwrap.wrap(caption, width // 7, max_lines=2, placeholder="…")
    banner = Image.new("RGB", (width, 48 if verdict else 34), "white")
    draw = ImageDraw.Draw(banner)
    draw.multiline_text((4, 2), "\n".join(lines), fill="black", font=font, spacing=2)
    if verdict:
        is_right, shown = verdict
        draw.text((4, 32), shown[:width // 7], fill="green" if is_right else "red", font=font)
    banners = np.stack([np.asarray(banner)] * len(frames))
    frames = np.concatenate([banners, frames], axis=1)
    return np.pad(frames, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)


def gif_bytes(frames, fps):
    """[t, h, w, 3] uint8 -> an animated gif. One palette for all frames, spread over the colours
    that occur: the usual one, by frequency, turns a small cyan triangle green."""
    thinned = rearrange(frames[:, ::3, ::3], "t h w rgb -> (t h) w rgb")
    palette = Image.fromarray(thinned).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
              for frame in frames]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=1000 / fps,
                   loop=0)
    return file.getvalue()


def write_video(path, rows, fps):
    """rows: lists of cells [t, H, W, 3]. In an mp4 and a gif cells move; a png holds all frames
    side by side. -> what was written."""
    frames = np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)
    if path.suffix == ".png":
        sheet = rearrange(frames, "t h w rgb -> h (t w) rgb")
        encoded = iio.imwrite("<bytes>", sheet, extension=".png")
    elif path.suffix == ".gif":
        encoded = gif_bytes(frames, fps)
    else:
        encoded = iio.imwrite("<bytes>", frames, extension=".mp4", plugin="pyav", codec="libx264",
                              fps=fps)
    write_atomically(path, lambda file: file.write(encoded))
    return encoded


def mask_map(masks):
    """Which units stay, as text: a row per block of the teacher, a square per head."""
    lines = []
    for i, block_on in enumerate(masks["blocks"].tolist()):
        row = f"block {i + 1:<4}"
        for name in ("self_heads", "cross_heads"):
            heads = masks[name][i] * block_on
            row += "".join("■" if on else "□" for on in heads.tolist()) + "   "
        kept = masks["ffn"][i].mean().item() * block_on
        lines.append(f"{row}FFN {kept:.0%}")
    return "\n".join(lines)


def curve(name, values):
    """A loss as a figure, each point the mean of a hundredth of the steps."""
    pieces = np.array_split(np.array(values, dtype=float), min(100, len(values)))
    y = np.array([piece.mean() for piece in pieces])
    heights = 38 - 36 * (y - y.min()) / (np.ptp(y) + 1e-9)
    points = " ".join(f"{100 * i / len(y):.1f},{height:.1f}" for i, height in enumerate(heights))
    return (f'<figure><svg viewBox="0 0 100 40"><polyline points="{points}"/></svg><figcaption>'
            f"<b>{escape(name)}</b>: {y[0]:.3g} to {y[-1]:.3g} in {len(values)} steps, from "
            f"{y.min():.3g} to {y.max():.3g}</figcaption></figure>")


# ------------------------------------------------------------ the report

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Mobile Video DiT: $run</title>
<style>
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem}
h2{margin-top:3rem}pre{overflow-x:auto}img{max-width:100%;background:#fff}
table{display:block;overflow-x:auto}td{padding:.2rem .5rem;text-align:right}
td:first-child{text-align:left}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(16rem,1fr))}
svg{width:100%}polyline{fill:none;stroke:#4c8bf5;stroke-width:.7}
</style>
<h1>Mobile Video DiT</h1>
<p>The run $run: clips of $size (frames, height, width), stage by stage. $left_out</p>
<h2>Side by side</h2>
<p>Input is a real clip with that caption, reconstruction what the VAE keeps of it; the others start
from the same noise. Above each clip stands what it shows, as measured (of a filmed clip the caption
of the nearest training clip), green where the caption asks for it. Never trained on: $unseen.</p>
$compare
<h2>Costs and scores</h2>
<p>Data: training clips as the VAE keeps them, about what a perfect generator would score.</p>
<table>$table</table>
<h2>From noise to a clip</h2>
<p>“$caption”. Above: x_t, what the network is given. Below: x0, the clean clip that it sees in it.
The teacher creeps along its velocity; the student jumps to x0, adds noise, and jumps again.</p>
$trajectories
<h2>What was cut</h2>
<p>A row per block of the teacher: the heads of its self-attention and of its cross-attention, and
how much of its FFN stays. Filled stays; a block that is cut keeps nothing.</p>
<pre>$masks</pre>
<h2>Training</h2>
<div class="curves">$curves</div>
<h2>All figures</h2>
<pre>$metrics</pre>
</html>
""")


def figure(path, rows, fps, alt):
    """Writes a picture of the report. -> its tag, which holds the picture."""
    text = base64.b64encode(write_video(path, rows, fps)).decode()
    return f'<img alt="{alt}" src="data:image/{path.suffix[1:]};base64,{text}">'


def input_clips(data, indices):
    """The clips of the data set behind these latents; None if the windows have gone."""
    windows = data.path.with_name("windows.pt")
    are_there = windows.exists() and any(windows.parent.glob("windows-*.bin"))
    if not (data.on_shapes or are_there):
        return None
    return open_data(data.checkpoint["settings"], windows).clip(indices)


def side_by_side(args, data, vae, models, captions, precision):
    """compare.gif: a row per prompt, a column per stage."""
    # A later clip replaces an earlier one, and test clips come last.
    index = {data.captions[i]: i for i in [*data.train, *data.test]}
    indices = [index[caption] for caption in captions]
    real = data.x0(indices)
    columns = {"reconstruction": (decode(vae, real, precision), real)}
    clips = input_clips(data, indices)
    if clips is not None:
        columns = {"input": (clips, real)} | columns
    for model in models:
        x0, _ = model.make(data.prompts_of(captions), args.seed)
        columns[STAGES[model.stage]] = decode(vae, x0, precision), x0
    rows = [[] for _ in captions]
    for name, (clips, x0) in columns.items():
        verdicts = judge(captions, clips, x0, data)
        for row, caption, clip, verdict in zip(rows, captions, clips, verdicts):
            is_right = all(right for right, _ in verdict.values())
            shown = " ".join(what for _, what in verdict.values())
            row.append(cell(clip, f"{name}: {caption}", (is_right, shown), width=160))
    return figure(args.run / "compare.gif", rows, args.fps, "clips, a row per prompt")


def from_noise(args, data, vae, models, caption, precision):
    """path.png: x_t, and the x0 that the network sees in it, at up to eight steps of a sampling."""
    rows = []
    for model in models:
        trajectory = []
        prompts = data.prompts_of([caption]).to(model.device)
        model.sample(prompts, model.noise(1, args.seed), trajectory=trajectory)
        row = []
        for i in np.unique(np.linspace(0, len(trajectory) - 1, 8).round().astype(int)):
            t, *latents = trajectory[i]
            x_t, x0 = decode(vae, torch.cat(latents), precision)
            both = torch.cat([x_t, x0], dim=2)  # one above the other
            middle = both[:, both.shape[1] // 2][:, None]
            row.append(cell(middle, f"{STAGES[model.stage]} step {i + 1}, t={t:.2f}", width=96))
        blank = np.full_like(row[0], 255)
        rows.append(row + [blank] * (8 - len(row)))
    return figure(args.run / "path.png", rows, args.fps, "x_t above x0, a column per step")


FIGURES = {  # key in metrics.json -> name, and what its value is multiplied with
    "params": ("parameters, M", 1e-6),
    "nfe": ("NFE per clip", 1),
    "seconds_per_clip": ("milliseconds per clip", 1e3),
    "clips": ("clips", 1),
    "text_alignment": ("text alignment, %", 100),
    "color": ("colour, %", 100),
    "shape": ("shape, %", 100),
    "direction": ("direction, %", 100),
    "outline_iou": ("outline IoU, %", 100),
    "held_out_alignment": ("unseen combinations, %", 100),
    "validation_loss": ("validation loss", 1),
    "subject_consistency": ("subject consistency", 1),
    "motion_smoothness": ("motion smoothness", 1),
    "dynamic_degree": ("dynamic degree", 1),
    "frechet": ("Fréchet distance", 1),
}


def score_table(metrics):
    """-> rows of texts: the figures that are there, in words and units to read."""
    columns = {STAGES[stage]: scores for stage, scores in metrics.get("score", {}).items()}
    if "data" in metrics:
        columns["data"] = metrics["data"]
    if not columns:
        return [["Not yet: sample.py --score measures them."]]
    rows = [["", *columns]]
    for key, (name, factor) in FIGURES.items():
        values = [scores.get(key) for scores in columns.values()]
        texts = ["" if value is None else f"{value * factor:,.3g}" for value in values]
        if any(texts):
            rows.append([name, *texts])
    return rows


def report(args, data, vae, models, precision):
    """Writes report.html, one file that needs no other, and the pictures in it. What the run does
    not have is left out with a word."""
    seen = data.metadata["captions"]
    unseen = data.metadata["held_out_captions"]
    unseen = unseen[::max(1, len(unseen) // 2)][:2]
    captions = [seen[37 * i % len(seen)] for i in range(4)]  # 37 spreads over all aspects
    captions = list(dict.fromkeys([*captions, *unseen]))
    masks = ""
    curves = ""
    left_out = []
    for name in "vae", "dit", "masks", "pruned", "student":
        file = args.run / f"{name}.pt"
        if not file.exists():
            left_out.append(f"{name}.pt")
            continue
        checkpoint = load(file, name)
        with reading(file):
            if name == "masks":
                masks = mask_map(checkpoint["masks"])
                continue
            for key, values in checkpoint["history"].items():
                curves += curve(f"{name}: {key.replace('_', ' ')}", values)
    metrics = read_metrics(args.run)
    with reading(args.run / "metrics.json"):
        table = "".join("<tr><td>" + "<td>".join(row) for row in score_table(metrics))
        # Four digits are enough to read.
        metrics = json.loads(json.dumps(metrics), parse_float=lambda x: float(f"{float(x):.4g}"))
    compare = side_by_side(args, data, vae, models, captions, precision)
    few = [model for model in models if model.stage != "pruned"]
    trajectories = ""
    if few:
        trajectories = from_noise(args, data, vae, few, captions[-1], precision)
    page = PAGE.substitute(
        run=escape(str(args.run)), size="×".join(str(n) for n in data.checkpoint["config"]["size"]),
        left_out=f"Left out, since it is not there: {', '.join(left_out)}." if left_out else "",
        unseen=escape("; ".join(unseen) or "none of them"), compare=compare,
        caption=escape(captions[-1]),
        masks=masks, trajectories=trajectories, table=table, curves=curves,
        metrics=escape(json.dumps(metrics, indent=1)))
    write_atomically(args.run / "report.html", lambda file: file.write(page.encode()))
    print(f"open {args.run / 'report.html'}")


# ------------------------------------------------------------ the command line


def read_prompts(args, checkpoint):
    """What the text encoder reads for --prompt: [prompts, words] or [prompts, tokens, dim]."""
    m = checkpoint["text_tokens"]
    dim = checkpoint["config"]["text_dim"]
    is_array = args.embedding and args.embedding.suffix == ".npy" and args.embedding.is_file()
    if args.embedding and not (dim and is_array):
        fail(f"--embedding {args.embedding} is no .npy file, or {args.model} reads words")
    if not dim:
        return tokenize(args.prompt, checkpoint["vocabulary"], m)
    if args.embedding is None:
        return Latents(args.latents).prompts_of(args.prompt)
    with reading(args.embedding):
        embedding = read_embedding(args.embedding)
    if len(embedding) > m or embedding.shape[1] != dim:
        fail(f"{args.embedding} is {list(embedding.shape)}: the model takes up to {m} tokens of "
             f"{dim} channels")
    padded = F.pad(embedding, (0, 0, 0, m - len(embedding)))
    return padded.expand(len(args.prompt), -1, -1)


def make_clips(args, device, precision):
    """--prompt: one clip each."""
    model = Model(args.model, device, precision, args.sampling_steps, args.cfg)
    vae = load_vae(args.vae, device, model.checkpoint["vae_checksum"])
    channels, t, h, w = model.latent_shape
    rt, rs, _ = vae.config["ratio"]
    clip_size = args.size or (1 + (t - 1) * rt, h * rs, w * rs)
    if args.frames:
        clip_size = args.frames, *clip_size[1:]
    model.latent_shape = channels, *latent_size(clip_size, vae.config["ratio"])
    prompts = read_prompts(args, model.checkpoint)
    x0, _ = model.make(prompts, args.seed)
    clips = decode(vae, x0, precision)
    cells = [cell(clip, prompt) for clip, prompt in zip(clips, args.prompt)]
    columns = 1 if args.out.suffix == ".png" else math.ceil(math.sqrt(len(cells)))
    while len(cells) % columns:
        cells.append(np.full_like(cells[0], 255))
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)]
    write_video(args.out, rows, args.fps)
    print(f"{args.out}: {len(clips)} clip(s) by {args.model}, {model.nfe} function evaluations "
          "per clip")


def main(argv=None):
    p = make_parser(__doc__, dict.fromkeys(VAE_PRESETS, {}), argv)
    p.add_argument("--prompt", action="append", default=[],
                   help="what to show, in words of the training captions; may be repeated")
    p.add_argument("--embedding", type=Path, metavar="FILE",
                   help="name.npy, the prompt's text embedding, if the model was trained on such")
    p.add_argument("--size", type=size, metavar="TxHxW",
                   help="frames x height x width of --prompt's clips (default: as trained)")
    p.add_argument("--frames", type=positive,
                   help="frames of --prompt's clips, in place of --size's; 1: a picture")
    p.add_argument("--sampling-steps", type=positive,
                   help="steps per clip; --score and --report leave a student its own (default: a "
                        "student's own, 40 for the others)")
    p.add_argument("--cfg", type=number(0), default=2.0,
                   help="classifier-free guidance scale of dit.pt and pruned.pt; 1: none")
    p.add_argument("--fps", type=positive, default=8, help="frames per second of what is written")
    p.add_argument("--score", type=number(2, kind=int), nargs="?", const=96, metavar="CLIPS",
                   help="score CLIPS clips (96 unless told) of every checkpoint of the run")
    p.add_argument("--report", action="store_true", help="write report.html and its pictures")
    add_file(p, "--model", "student.pt", "checkpoint to sample from: dit.pt, pruned.pt, student.pt")
    add_file(p, "--vae", "vae.pt", "the autoencoder, from vae.py")
    add_file(p, "--latents", "latents.pt", "the data set, from vae.py, where it is needed")
    add_file(p, "--out", "sample.mp4", "an mp4, a gif, or a png with all frames")
    add_device_flags(p)
    args = p.parse_args(argv)
    if not (args.prompt or args.score or args.report):
        fail('nothing to do: give --prompt "a red circle moving left", --score or --report')
    if args.out.suffix not in (".mp4", ".gif", ".png"):
        fail(f"--out {args.out}: the name must end in .mp4, .gif or .png")
    device, precision = set_up(args)
    if args.prompt:
        make_clips(args, device, precision)
    if args.score or args.report:
        data = Latents(args.latents)
        vae = load_vae(args.vae, device, data.metadata["vae_checksum"])
        models = list(models_of(args, data, device, precision))
        if args.score:
            score(args, data, vae, models, precision)
        if args.report:
            report(args, data, vae, models, precision)


if __name__ == "__main__":
    run_script(main)

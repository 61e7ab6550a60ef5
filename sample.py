"""Prompts in, videos out; the scores of every checkpoint; pictures that put the stages side by side.

    python sample.py --prompt "a red circle moving left" --out red.mp4        # also .gif, or .png: a contact sheet
    python sample.py --model runs/tiny/dit.pt --prompts prompts.txt --out all.gif        # one prompt a line
    python sample.py --score              # every checkpoint of the run, in one go  -> runs/tiny/metrics.json
    python sample.py --report             # -> runs/tiny/report.html, compare.gif, compare.png

A student samples in its few steps without guidance; dit.pt and pruned.pt in --steps Euler steps with --cfg.

The scores have the names of VBench's dimensions, which the paper reports, but each is a plain formula: the data is
rendered, so a clip can be measured instead of shown to another network. Text alignment is the share of clips with
colour (by palette), shape (by template) and direction (by centroid) all as the caption says. On a folder of real
clips it is the share whose nearest training clip, by latents, carries the caption. The others are defined where they
are computed, below; that they rank good above bad clips is for tests/ to show.
"""
import base64
import html
import json
import math
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from distill import sample_student
from dit import Latents, load_dit, sample_euler, text_input, words
from vae import (COLORS, DIRECTIONS, SHAPES, VAE, between, count, fail, load, parse, parser, positive, read_metrics,
                 reading, record, script, set_up, shape_coverage, write_aside)

PRESETS = {name: {} for name in ("tiny", "toy", "mobile", "server")}
STAGES = ("dit", "pruned", "student")

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

    def sample(self, tokens, noises):
        """-> normalised latents [b, c, t, h, w]."""
        with self.precision():
            if self.student:
                return sample_student(self.dit, noises, tokens)
            return sample_euler(self.dit, noises[0], tokens, torch.zeros_like(tokens), self.steps, self.cfg)


@torch.no_grad()
def decode(vae, checkpoint, x0, precision, batch=32):
    """Normalised latents -> clips [b, 3, t, h, w] in [-1, 1], on the CPU."""
    if x0.shape[1] != vae.config["latent_channels"]:
        fail(f"the clips have {x0.shape[1]} latent channels, the autoencoder {vae.config['latent_channels']}: "
             "they come from different runs")
    mean, std = (checkpoint[k].view(-1, 1, 1, 1).to(x0.device) for k in ("latent_mean", "latent_std"))
    with precision():
        return torch.cat([vae.decode(z * std + mean).float().clamp(-1, 1).cpu() for z in x0.split(batch)])


def load_vae(path, device):
    checkpoint = load(path, "vae")
    with reading(path):
        vae = VAE(**checkpoint["config"])
        vae.load_state_dict(checkpoint["model"])
    return vae.to(device).eval().requires_grad_(False)


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


def score(args, device, precision):
    """Every checkpoint of the run on the same prompts and noise; half as many held-out prompts as seen ones."""
    with reading(args.latents):
        data = Latents(args.latents, device)
    vae = load_vae(args.vae, device)
    on_shapes = data.file["config"]["data"] == "shapes"
    seen = [sorted(set(data.captions))[i % len(set(data.captions))] for i in range(args.clips)]
    held = data.file["held_out_captions"]
    held = [held[i % len(held)] for i in range(args.clips // 2)] if held else []
    real, scores = None, {}
    for stage in STAGES:
        path = args.run / f"{stage}.pt"
        if not path.exists():
            print(f"{path} is not there: not scored", file=sys.stderr)
            continue
        model = Model(path, device, precision, args.steps, args.cfg)
        if real is None:
            reference = data.test_x0 if len(data.test_x0) > 1 else data.x0[:256]
            real = fixed_features(decode(vae, model.checkpoint, reference, precision))
        captions, seconds, x0 = seen + held, [], []
        tokens, noises = model.tokens(captions), model.noise(len(captions), args.seed)
        for i in range(0, len(captions), 48):
            start = time.perf_counter()
            x0.append(model.sample(tokens[i:i + 48], noises[:, i:i + 48]))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / len(x0[-1]))
        x0 = torch.cat(x0)
        clips = decode(vae, model.checkpoint, x0, precision)
        if on_shapes:
            right = measure(clips) == expected(captions)
            seen_right, held_right = right[:len(seen)], right[len(seen):]
            result = dict(text_alignment=share(seen_right.all(1)), color=share(seen_right[:, 0]),
                          shape=share(seen_right[:, 1]), direction=share(seen_right[:, 2]),
                          held_out_alignment=share(held_right.all(1)))
        else:
            nearest = torch.cdist(x0.flatten(1), data.x0.flatten(1)).argmin(1).tolist()
            result = dict(text_alignment=sum(data.captions[j] == c for j, c in zip(nearest, captions)) / len(captions))
        scores[stage] = dict(**result, **motion_scores(clips, on_shapes),
                             frechet=frechet(fixed_features(clips), real), params=count(model.dit),
                             evaluations=model.evaluations, seconds_per_clip=float(np.median(seconds)))
        print(stage.ljust(8), "  ".join(f"{k} {v:.4g}" for k, v in scores[stage].items()), flush=True)
    record(args.run, "score", scores)


def share(values):
    return values.float().mean().item()


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
        options = {}
    else:
        data = np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)
        options = dict(plugin="pillow", duration=1000 / fps, loop=0) if path.suffix == ".gif" else dict(
            plugin="pyav", codec="libx264", fps=fps)
        data = data[:, :data.shape[1] // 2 * 2, :data.shape[2] // 2 * 2]  # H.264 wants even sizes; a gif may have them
    encoded = iio.imwrite("<bytes>", data, extension=path.suffix, **options)
    write_aside(path, lambda f: f.write(encoded))


def loss_curve(title, values, width=280, height=90):
    """One curve as inline SVG, averaged in a hundred pieces; the numbers are its first and last."""
    points = [piece.mean() for piece in np.array_split(np.array(values), min(100, len(values)))]
    low, high = min(points), max(points)
    line = " ".join(f"{i / max(1, len(points) - 1) * width:.1f},{height - (p - low) / (high - low + 1e-9) * height:.1f}"
                    for i, p in enumerate(points))
    return (f"<figure><svg viewBox='-4 -4 {width + 8} {height + 8}' width={width}><polyline points='{line}' fill=none "
            f"stroke=currentColor stroke-width=2 /></svg><figcaption>{html.escape(title)}: {points[0]:.3g} to "
            f"{points[-1]:.3g}</figcaption></figure>")


def mask_map(masks):
    """Which units the masks keep: a row a block, full squares are kept; a block that is cut keeps nothing."""
    def row(i):
        on = masks["blocks"][i]
        own, cross = ("".join("■" if on * kept else "□" for kept in masks[f"{name}_heads"][i])
                      for name in ("self", "cross"))
        return f"block {i + 1:2}   {own}   {cross}   {(on * masks['ffn'][i]).mean():4.0%}"
    return "\n".join(["           heads of self-, of cross-attention, FFN", *map(row, range(len(masks["blocks"])))])


def report(args, device, precision):
    """compare.gif and compare.png: a row a prompt, a column a stage, from the same noise; report.html around them."""
    with reading(args.latents):
        data = Latents(args.latents, device)
    vae = load_vae(args.vae, device)
    held, captions = data.file["held_out_captions"], sorted(set(data.captions))
    captions = list(dict.fromkeys(captions[37 * i % len(captions)] for i in range(4)))  # of each kind something
    captions += held[::max(1, len(held) // 2)][:2]
    models = [Model(args.run / f"{stage}.pt", device, precision, args.steps, args.cfg) for stage in STAGES]
    where = {c: i for i, c in enumerate(data.captions + data.test_captions)}  # a test clip, if the caption has one
    real = torch.cat([data.x0, data.test_x0])[[where[c] for c in captions]]
    columns = {"input": decode(vae, models[0].checkpoint, real, precision)}
    for model in models:
        x0 = model.sample(model.tokens(captions), model.noise(len(captions), args.seed))
        title = {"dit": "teacher", "pruned": "pruned", "student": "student"}[model.stage]
        columns[f"{title} ({model.evaluations})"] = decode(vae, models[0].checkpoint, x0, precision)
    rows = [[cell(clips[i], f"{title}: {caption}" + (" (held out)" if caption in held else ""), 160)
             for title, clips in columns.items()] for i, caption in enumerate(captions)]
    write_video(args.run / "compare.gif", rows, args.fps)
    middle = rows[0][0].shape[0] // 2
    write_video(args.run / "compare.png", [[c[[0, middle, -1]] for c in row] for row in rows], args.fps)

    metrics = read_metrics(args.run)
    image = base64.b64encode((args.run / "compare.gif").read_bytes()).decode()
    scores = metrics.get("score", {})
    keys = list(next(iter(scores.values()), {}))
    table = "".join(f"<tr><th>{key}</th>" + "".join(f"<td>{scores[stage][key]:.4g}</td>" for stage in scores) + "</tr>"
                    for key in keys)
    curves = "".join(loss_curve(f"{name}, {key.replace('_', ' ')}", values) for name in ("vae", *STAGES)
                     for key, values in load(args.run / f"{name}.pt", name)["history"].items())
    masks = args.run / "masks.pt"
    masks = f"<h2>Masks</h2><pre class=wide>{mask_map(load(masks, 'masks')['masks'])}</pre>" if masks.exists() else ""
    page = f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Mobile Video DiT: report</title><style>:root{{color-scheme:light dark}}body{{font:16px system-ui;max-width:60rem;
margin:auto;padding:1rem}}img{{max-width:100%}}td,th{{padding:.2rem .8rem;text-align:left}}
.wide{{overflow-x:auto}}.curves{{display:flex;flex-wrap:wrap;gap:1rem}}figure{{margin:0}}</style>
<h1>Mobile Video DiT</h1>
<p>One row a prompt; columns: a real clip through the VAE, then each stage from the same noise, with its network
evaluations a clip.</p><img alt="comparison of the stages"
src="data:image/gif;base64,{image}"><h2>Scores</h2><div class=wide><table>
<tr><th></th>{"".join(f"<th>{s}</th>" for s in scores)}</tr>{table}</table></div><h2>Training</h2>
<div class=curves>{curves}</div>{masks}<h2>metrics.json</h2>
<pre class=wide>{html.escape(json.dumps(metrics, indent=2))}</pre></html>"""
    write_aside(args.run / "report.html", lambda f: f.write(page.encode()))
    print(f"open {args.run / 'report.html'}, {args.run / 'compare.gif'}, {args.run / 'compare.png'}")


def main(argv=None):
    p = parser(__doc__, PRESETS)
    p.add_argument("--prompt", action="append", help="what to show; may be given several times")
    p.add_argument("--prompts", type=Path, help="a text file with one prompt a line")
    p.add_argument("--model", type=Path, help="the checkpoint to sample from")
    p.add_argument("--vae", type=Path, help="the autoencoder")
    p.add_argument("--latents", type=Path, help="the data set, for --score and --report")
    p.add_argument("--out", type=Path, help="an mp4, a gif, or a png with all frames")
    p.add_argument("--steps", type=positive, help="sampling steps (default: a student's own, 40 for the others)")
    p.add_argument("--cfg", type=between(0), default=3.0, help="guidance of dit.pt and pruned.pt; 1: none (default: 3)")
    p.add_argument("--fps", type=positive, default=8, help="frames a second of what is written (default: 8)")
    p.add_argument("--score", action="store_true", help="score every checkpoint of the run")
    p.add_argument("--clips", type=positive, default=96, help="clips a checkpoint that --score makes (default: 96)")
    p.add_argument("--report", action="store_true", help="write report.html, compare.gif and compare.png")
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
    if args.score and args.clips < 2:
        fail("--clips 1: the scores need two at the least")
    if args.score:
        score(args, device, precision)
    if args.report:
        report(args, device, precision)
    if prompts:
        model, vae = Model(args.model, device, precision, args.steps, args.cfg), load_vae(args.vae, device)
        x0 = model.sample(model.tokens(prompts), model.noise(len(prompts), args.seed))
        clips = decode(vae, model.checkpoint, x0, precision)
        cells = [cell(clip, prompt) for clip, prompt in zip(clips, prompts)]
        across = 1 if args.out.suffix == ".png" else math.ceil(math.sqrt(len(cells)))
        cells += [np.full_like(cells[0], 255)] * (-len(cells) % across)
        write_video(args.out, [cells[i:i + across] for i in range(0, len(cells), across)], args.fps)
        print(f"{args.out}: {len(prompts)} clip(s) by {args.model}, {model.evaluations} network evaluations each")


if __name__ == "__main__":
    script(main)

"""Pictures and the report: clips as gif, mp4 and png; tables and curves; the HTML page.

Clips come as arrays, so nothing here knows a model: sample.py decides what is shown."""
import base64
import io
import math
import textwrap
from html import escape
from string import Template

import imageio.v3 as iio
import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from common import files

NAMES = {"dit": "teacher", "pruned": "pruned", "student": "student"}  # of the checkpoints

# ------------------------------------------------------------ clips


def cell(clip, caption, prediction=None, width=128):
    """[3, t, h, w] in [-1, 1] -> frames [t, H, W, 3] uint8, at least `width` wide, the caption
    above; prediction: (whether it is right, what the clip shows), written below the caption."""
    pixels = ((clip / 2 + 0.5) * 255).round().byte()
    frames = rearrange(pixels, "rgb t h w -> t h w rgb").numpy()
    factor = math.ceil(width / frames.shape[2])
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    width = frames.shape[2]
    font = ImageFont.load_default(size=12)
    lines = textwrap.wrap(caption, width // 7, max_lines=2, placeholder="…")
    banner = Image.new("RGB", (width, 48 if prediction else 34), "white")
    draw = ImageDraw.Draw(banner)
    draw.multiline_text((4, 2), "\n".join(lines), fill="black", font=font, spacing=2)
    if prediction:
        is_right, shown = prediction
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
    files.write_atomically(path, lambda file: file.write(encoded))
    return encoded


def figure(path, rows, fps, alt):
    """Writes a picture of the report. -> its tag, which holds the picture."""
    text = base64.b64encode(write_video(path, rows, fps)).decode()
    return f'<img alt="{alt}" src="data:image/{path.suffix[1:]};base64,{text}">'


# ------------------------------------------------------------ tables and curves

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
    "dynamic_degree": ("dynamic degree, 1e-3", 1e3),
    "frechet": ("Fréchet distance, 1e-3", 1e3),
}


def digits(x):
    """Three of them; of a whole number all."""
    return f"{x:,}" if isinstance(x, int) else f"{x:#,.3g}".rstrip(".")


def score_table(metrics):
    """-> rows of texts: the figures that are there, in words and units to read."""
    columns = {NAMES[stage]: scores for stage, scores in metrics.get("score", {}).items()}
    if "data" in metrics:
        columns["data"] = metrics["data"]
    if not columns:
        return [["Not yet: sample.py --score measures them."]]
    rows = [["", *columns]]
    for key, (name, factor) in FIGURES.items():
        values = [scores.get(key) for scores in columns.values()]
        texts = ["" if value is None else digits(value * factor) for value in values]
        if any(texts):
            rows.append([name, *texts])
    return rows


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


# ------------------------------------------------------------ the page

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
<p>Input is a clip of the data with that caption, reconstruction the VAE's of it; the others start
from the same noise. Above each clip stands what it shows, as measured (of a real video the caption
of the nearest training clip), green where the caption asks for it. Never trained on: $unseen.</p>
$compare
<h2>Costs and scores</h2>
<p>Data: VAE reconstructions of training clips, about what a perfect generator would score (but for
the Fréchet distance, since none of these shows an unseen combination).</p>
<table>$table</table>
<p>$stale</p>
<h2>From noise to a clip</h2>
<p>“$caption”. Above: x_t, what the network is given. Below: x0, the clean clip that it sees in it.
The teacher integrates the ODE in Euler steps; the student jumps to x0, adds noise, and jumps
again.</p>
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


def write_page(path, **parts):
    """report.html: one file that needs no other. parts: of PAGE, as HTML."""
    page = PAGE.substitute(parts)
    files.write_atomically(path, lambda file: file.write(page.encode()))

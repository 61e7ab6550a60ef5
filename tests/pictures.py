"""The pictures of docs/ that no report has, from what `make demo` and, if it ran, `make demo
PRESET=toy` left.

    python tests/pictures.py     # -> docs/curves.svg, expect.gif, large.gif

expect.gif shows models that were trained for less, too: they are made first, in
runs/tables/expect, in a few minutes.
"""
import os
import re
import sys
from contextlib import nullcontext
from html import escape
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import tables  # noqa: E402

from common import data, files, report  # noqa: E402
from dit import CFG_SCALE  # noqa: E402
from sample import Model, decode  # noqa: E402
from sample import main as sample_main  # noqa: E402
from vae import VAE, load_vae  # noqa: E402

DOCS = ROOT / "docs"
DEMO = ROOT / "runs" / "tiny"
PROMPT = "a red triangle moving right"
LARGE = ["a red circle moving left", "a blue bar moving down", "a green triangle moving right",
         "a yellow square moving up", "a cyan circle moving right", "a magenta bar moving down"]
EXPECT = [  # name, stage, key of its history and how it is shown, runs that stop earlier
    ("VAE", "vae", "psnr_db", "dB", ["vae.py --steps 100", "vae.py --steps 400"]),
    ("teacher", "dit", "loss", "loss",
     ["dit.py --steps 30", "dit.py --steps 100", "dit.py --steps 300"]),
    ("student", "student", "distillation", "loss", ["distill.py --steps 20"]),
]

# ------------------------------------------------------------ curves


def label(x, y, text, more=""):
    return f'<text x="{x}" y="{y:.1f}" fill="#808890" {more}>{escape(str(text))}</text>'


def curves(run):
    """An SVG: six curves of a run's training, each point the mean of five steps or more."""
    shown = [("vae", "psnr_db", "VAE: PSNR of the batch, dB"), ("dit", "loss", "teacher: loss"),
             ("pruned", "masks_loss", "masks: loss, with distillation"),
             ("pruned", "loss", "pruned: loss, with distillation"),
             ("student", "distillation", "student: distillation term"),
             ("student", "d_accuracy", "discriminator: accuracy")]
    parts = []
    for i, (name, key, title) in enumerate(shown):
        values = files.load(run / f"{name}.pt", name)["history"][key]
        points = max(2, min(100, len(values) // 5))
        y = [piece.mean() for piece in np.array_split(np.array(values), points)]
        left = 10 + 240 * (i % 3)
        top = 10 + 150 * (i // 3)
        heights = top + 110 - 90 * (np.array(y) - min(y)) / (max(y) - min(y))
        path = " ".join(f"{left + 36 + 180 * k / (len(y) - 1):.1f},{height:.1f}"
                        for k, height in enumerate(heights))
        parts += [label(left, top + 8, title), label(left, top + 24, f"{max(y):.2f}"),
                  label(left, top + 112, f"{min(y):.2f}"), label(left + 36, top + 126, 0),
                  label(left + 216, top + 126, f"{len(values):,} steps", 'text-anchor="end"'),
                  f'<path d="M{left + 36} {top + 112}h180" stroke="#80889066"/>',
                  f'<polyline points="{path}" fill="none" stroke="#4c8bf5" stroke-width="1.5"/>']
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" font-size="11" '
            f'font-family="sans-serif">{"".join(parts)}</svg>\n')


# ------------------------------------------------------------ what to expect


def trained(command):
    """-> the folder of a run with seed 0 on the demo's files, once the command has run in it."""
    folder = tables.OUT / "expect" / re.sub(r"\W+", "-", command)
    tables.run(folder, 0, [command], str(os.cpu_count()), DEMO)
    return folder


@torch.no_grad()
def expect():
    """Rows of cells: a clip by VAEs, a prompt and noise by teachers and students, each after more
    and more steps, with what the last twenty of them logged."""
    latents = data.Latents(DEMO / "latents.pt")
    vae = load_vae(DEMO / "vae.pt", "cpu", latents.metadata["vae_checksum"])
    index = [record.caption for record in latents.records].index(PROMPT)
    clip = data.open_clips(latents.checkpoint["settings"], DEMO / "frames.pt").clip([index])
    rows = []
    for name, stage, key, unit, commands in EXPECT:
        rows.append([report.cell(clip[0], f"input: {PROMPT}", width=160)] if stage == "vae" else [])
        for folder in [*map(trained, commands), DEMO]:
            path = folder / f"{stage}.pt"
            checkpoint = files.load(path, stage)
            if stage == "vae":
                early = VAE(**checkpoint["config"])
                early.load_state_dict(checkpoint["model"])
                shown = early.eval().decode(early.encode(clip)[0]).clamp(-1, 1)
            else:
                model = Model(path, torch.device("cpu"), nullcontext, None, CFG_SCALE)
                x0, _ = model.sample(latents.prompts_of([PROMPT]), 0)
                shown = decode(vae, x0, nullcontext)
            logged = np.mean(checkpoint["history"][key][-20:])
            steps = checkpoint["settings"]["steps"]
            title = f"{name}, {steps:,} steps: {unit} {logged:.2f}"
            rows[-1].append(report.cell(shown[0], title, width=160))
    blank = np.full_like(rows[0][0], 255)
    return [row + [blank] * (4 - len(row)) for row in rows]


def main():
    (DOCS / "curves.svg").write_text(curves(DEMO))
    report.write_video(DOCS / "expect.gif", expect(), 8)
    if (ROOT / "runs" / "toy" / "student.pt").exists():
        prompts = [word for prompt in LARGE for word in ("--prompt", prompt)]
        sample_main(["--preset", "toy", "--run", str(ROOT / "runs" / "toy"), *prompts,
                     "--out", str(DOCS / "large.gif")])


if __name__ == "__main__":
    main()

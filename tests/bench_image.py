"""Image-to-video, measured: what docs/experiments.md says of it.

    python tests/bench_image.py --run runs/tiny

Pictures: first frames of test clips. Each goes on under a prompt that names another colour and
another direction than its clip had, so that what the picture decides and what the prompt decides
can be told apart. Then longer clips: each stretch starts from the last frame of the one before.
With one prompt the subject soon reaches the edge, which no training clip shows. So a second table
sends it back in every other stretch. --sheet FILE.png shows both: the last frame of each stretch.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import set_up  # noqa: E402
from dit import Latents, decode, encode  # noqa: E402
from sample import (STAGES, Model, cell, input_clips, measure, outline_iou,  # noqa: E402
                    write_video)
from vae import COLORS, DIRECTIONS, SHAPES, load_vae  # noqa: E402

OTHER_DIRECTION = {"left": "up", "up": "right", "right": "down", "down": "left"}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def share(found, wanted):
    return f"{100 * (found == wanted).float().mean().item():.0f} %"


def index_of(captions, names):
    return torch.tensor([[i for i, name in enumerate(names) if name in caption.split()][0]
                         for caption in captions])


def psnr(clip, reference):
    return (10 * torch.log10(4 / (clip - reference).square().mean((1, 2, 3, 4)))).mean().item()


def animate(model, data, vae, precision, n):
    """n pictures under n other prompts: one line of a table."""
    picked = data.test[:n]
    own_captions = [data.captions[i] for i in picked]
    pictures = input_clips(data, list(picked))[:, :, :1]
    color = index_of(own_captions, COLORS)
    shape = index_of(own_captions, SHAPES)
    asked_color = (color + 1) % len(COLORS)
    prompts = []
    for caption, i in zip(own_captions, asked_color.tolist()):
        _, _, name, _, direction = caption.split()
        prompts.append(f"a {list(COLORS)[i]} {name} moving {OTHER_DIRECTION[direction]}")
    given = encode(vae, pictures, precision)
    x0, _ = model.make(data.prompts_of(prompts), seed=0, first_frame=given)
    clips = decode(vae, x0, precision)
    reconstruction = decode(vae, given, precision)
    found = measure(clips)
    first = psnr(clips[:, :, :1], pictures)
    print(f"| {STAGES[model.stage]} | {first:.1f} | {psnr(reconstruction, pictures):.1f} | "
          f"{share(found[:, 2], index_of(prompts, DIRECTIONS))} | {share(found[:, 1], shape)} | "
          f"{share(found[:, 0], color)} | {share(found[:, 0], asked_color)} |")


def go_on(model, data, vae, precision, n, stretches, turns_back):
    """n prompts, each from noise, then on and on: a line per stretch. -> the first prompt's clip,
    the last frame of each stretch [3, stretches, h, w]"""
    seen = data.metadata["captions"]
    picture = None
    last_frames = []
    for i in range(stretches):
        prompts = [seen[k % len(seen)] for k in range(n)]
        if turns_back and i % 2:
            prompts = [" ".join(OPPOSITE.get(word, word) for word in p.split()) for p in prompts]
        wanted = torch.stack([index_of(prompts, x) for x in (COLORS, SHAPES, DIRECTIONS)], 1)
        x0, _ = model.make(data.prompts_of(prompts), 1000 * i, picture)
        clips = decode(vae, x0, precision)
        picture = encode(vae, clips[:, :, -1:], precision)
        last_frames.append(clips[0, :, -1:])
        right = measure(clips) == wanted
        aspects = " | ".join(f"{100 * x:.0f} %" for x in right.float().mean(0).tolist())
        overlap = outline_iou(clips, prompts).mean().item()
        print(f"| {STAGES[model.stage]} | {i + 1} | {100 * right.all(1).float().mean():.0f} % | "
              f"{aspects} | {100 * overlap:.0f} % |")
    return torch.cat(last_frames, dim=1)


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/tiny"))
    p.add_argument("--clips", type=int, default=96)
    p.add_argument("--stretches", type=int, default=8)
    p.add_argument("--sheet", type=Path, help="a png of the longer clips")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    args = p.parse_args()
    device, precision = set_up(args)
    data = Latents(args.run / "latents.pt")
    vae = load_vae(args.run / "vae.pt", device, data.metadata["vae_checksum"])
    models = [Model(args.run / f"{stage}.pt", device, precision, None, 2.0) for stage in STAGES]
    print("| | first frame, dB | of the VAE, dB | direction as prompted | shape of the picture | "
          "colour of the picture | colour of the prompt |\n|---|---|---|---|---|---|---|")
    for model in models:
        animate(model, data, vae, precision, args.clips)
    rows = []
    for turns_back in False, True:
        print("\n| | stretch | text alignment | colour | shape | direction | outline IoU |\n"
              "|---|---|---|---|---|---|---|")
        frames = go_on(models[-1], data, vae, precision, args.clips, args.stretches, turns_back)
        rows.append([cell(frames, "turning back" if turns_back else "one prompt", width=96)])
    if args.sheet:
        write_video(args.sheet, rows, fps=8)


if __name__ == "__main__":
    main()

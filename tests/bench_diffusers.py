"""Our DiT beside the transformer that a user would otherwise take, LTXVideoTransformer3DModel of
diffusers, at the same size: forward and training step (AdamW, float32 weights, bfloat16 by
autocast), alternating in one process.

    python tests/bench_diffusers.py                      # on a CPU about five minutes
    python tests/bench_diffusers.py --compile --widths 512

diffusers is installed into a folder of its own (--packages) the first time; the project itself
never needs it.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import training  # noqa: E402
from dit import DiT, flow_loss  # noqa: E402

GRID = 7, 12, 16  # 49x384x512 at 8x32x32: 1,344 tokens
CHANNELS = 128
WORDS = 32
DEPTH = {512: 6, 2048: 2}
WARM_UP = 3  # until memory has settled


def contestants(width, device):
    """-> {name: (model, loss function of no arguments)}: the same clip, noise, level, words."""
    from diffusers import LTXVideoTransformer3DModel

    depth = DEPTH[width]
    heads = width // 64
    x0, noise = torch.randn(2, 1, CHANNELS, *GRID, device=device)
    t = torch.full((1,), 0.5, device=device)
    words = torch.randint(1, 100, (1, WORDS), device=device)
    text = torch.randn(1, WORDS, width, device=device)
    mask = torch.ones(1, WORDS, device=device)
    ours = DiT(CHANNELS, width, depth, heads, 64, 4 * width, 100, WORDS).to(device)
    theirs = LTXVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=heads,
        attention_head_dim=64, cross_attention_dim=width, num_layers=depth,
        caption_channels=width, attention_bias=False, attention_out_bias=False).to(device)

    def our_loss():
        return flow_loss(ours, x0, words, noise, t)

    def their_loss():
        x_t = (0.5 * x0 + 0.5 * noise).flatten(2).mT
        velocity = theirs(x_t, text, 1000 * t, mask, *GRID, return_dict=False)[0]
        return (velocity.float() - (noise - x0).flatten(2).mT).square().mean()

    return {"ours": (ours, our_loss), "diffusers": (theirs, their_loss)}


def compare(pair, task, precision, device, rounds):
    """-> {name: seconds of each round}."""
    optimizers = {name: training.Optimizer(model, "adamw", 1e-5)
                  for name, (model, _) in pair.items()}
    seconds = {name: [] for name in pair}
    for _ in range(WARM_UP + rounds):
        for name, (_, loss_fn) in pair.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(task == "training step"), precision():
                loss = loss_fn()
            if task == "training step":
                pair[name][0].zero_grad()
                loss.backward()
                optimizers[name].step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[WARM_UP:] for name, times in seconds.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--widths", type=int, nargs="+", default=[512, 2048], choices=DEPTH)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--device", default="auto")
    p.add_argument("--packages", type=Path, default=Path("build/diffusers"),
                   help="where diffusers is installed")
    args = p.parse_args()
    if not args.packages.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target",
                        args.packages, "diffusers"], check=True)
    sys.path.append(str(args.packages.resolve()))  # last: torch and NumPy stay ours
    for width in args.widths:
        for dtype in "float32", "bfloat16":
            device, precision = training.set_up(SimpleNamespace(device=args.device, dtype=dtype))
            pair = contestants(width, device)
            if args.compile:
                pair = {name: (model, torch.compile(f)) for name, (model, f) in pair.items()}
            for task in "forward", "training step":
                seconds = compare(pair, task, precision, device, args.rounds)
                ratios = [a / b for a, b in zip(seconds["ours"], seconds["diffusers"])]
                print(f"width {width}, {DEPTH[width]} blocks, {dtype}, {task}: diffusers "
                      f"{median(seconds['diffusers']):.3f} s, ours {median(seconds['ours']):.3f} s,"
                      f" ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                      flush=True)


if __name__ == "__main__":
    main()

"""Our DiT beside the transformer that a user would otherwise take, diffusers' LTXVideoTransformer3DModel, at the same
size: forward and training step (AdamW, weights in float32, bfloat16 by autocast), alternating in one process, and with
them the matrix products and the attention of ours without all else, below which no change to the rest can get.

    python tests/bench_diffusers.py                      # eager; on a CPU about five minutes
    python tests/bench_diffusers.py --compile --widths 512

diffusers is installed into a folder of its own (--packages) the first time; the project itself never needs it.
"""
import argparse
import contextlib
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from bench_cost import Products  # noqa: E402
from dit import DiT, flow_loss  # noqa: E402
from vae import Optimizer, set_up  # noqa: E402

CLIP, CHANNELS, WORDS = (7, 12, 16), 128, 32  # 49x384x512 at 8x32x32: 1,344 tokens
DEPTH = {512: 6, 2048: 2}


def diffusers_model(width, depth):
    from diffusers import LTXVideoTransformer3DModel
    return LTXVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=width // 64, attention_head_dim=64,
        cross_attention_dim=width, num_layers=depth, caption_channels=width, attention_bias=False,
        attention_out_bias=False)


def contestants(width, device, compile):
    """-> {name: (model, loss function of no arguments)}: the same clip, noise, level and words for both."""
    depth, g = DEPTH[width], torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, CHANNELS, *CLIP, generator=g).to(device) for _ in range(2))
    t, words = torch.full((1,), 0.5, device=device), torch.randint(1, 100, (1, WORDS), generator=g).to(device)
    ours = DiT(CHANNELS, width, depth, width // 64, 64, 4 * width, 100, WORDS).to(device)
    theirs = diffusers_model(width, depth).to(device)
    text = torch.randn(1, WORDS, width, generator=g).to(device)
    mask = torch.ones(1, WORDS, device=device)

    def their_loss():
        x_t = (0.5 * x0 + 0.5 * noise).flatten(2).mT
        velocity = theirs(x_t, text, 1000 * t, mask, *CLIP, return_dict=False)[0]
        return (velocity.float() - (noise - x0).flatten(2).mT).square().mean()

    pair = {"ours": (ours, lambda: flow_loss(ours, x0, words, noise, t)), "diffusers": (theirs, their_loss)}
    return {name: (model, torch.compile(loss) if compile else loss) for name, (model, loss) in pair.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--widths", type=int, nargs="+", default=[512, 2048], choices=DEPTH)
    p.add_argument("--rounds", type=int, default=7, help="counted runs of each, after three that let memory settle")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--device", default="auto")
    p.add_argument("--packages", type=Path, default=Path("build/diffusers"), help="where diffusers is installed")
    args = p.parse_args()
    if not args.packages.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", args.packages, "diffusers"],
                       check=True)
    sys.path.append(str(args.packages.resolve()))  # last: torch and NumPy stay ours
    for width in args.widths:
        for dtype in "float32", "bfloat16":
            device, precision = set_up(SimpleNamespace(device=args.device, dtype=dtype))
            pair = contestants(width, device, args.compile)
            settings = SimpleNamespace(optimizer="adamw", lr=1e-5, batch_size=1)
            optimizers = {name: Optimizer(model, settings, 1000, precision) for name, (model, _) in pair.items()}
            for task in "forward", "training step":
                def work(name):
                    with torch.no_grad() if task == "forward" else contextlib.nullcontext():  # noqa: B023
                        with precision():  # noqa: B023
                            loss = pair[name][1]()  # noqa: B023
                        if task == "training step":  # noqa: B023
                            optimizers[name].step(loss)  # noqa: B023

                runs, seconds = {name: partial(work, name) for name in pair}, {}
                if not args.compile:
                    with Products() as products:
                        work("ours")
                    runs["products"] = products.again
                for _ in range(args.rounds + 3):
                    for name, run in runs.items():
                        start = time.perf_counter()
                        run()
                        if device.type == "cuda":
                            torch.cuda.synchronize()
                        seconds.setdefault(name, []).append(time.perf_counter() - start)
                theirs = seconds.pop("diffusers")[3:]
                print(f"width {width}, {DEPTH[width]} blocks, {dtype}, {task}: diffusers {median(theirs):.3f} s",
                      end="")
                for name, times in seconds.items():
                    ratios = sorted(a / b for a, b in zip(times[3:], theirs))
                    print(f"; {name} {median(times[3:]):.3f} s, ratio {median(ratios):.2f} ({ratios[0]:.2f} to "
                          f"{ratios[-1]:.2f})", end="")
                print(flush=True)


if __name__ == "__main__":
    main()

"""What tokens, parameters and clips cost: the measurements behind the README's tables of cost, on this machine.

    python tests/bench_cost.py ratios     # one evaluation of the mobile DiT at 49x384x512, for four VAE ratios
    python tests/bench_cost.py curves     # training step against tokens and parameters, memory against the data set
    python tests/bench_cost.py memory     # the last of these alone
    python tests/bench_cost.py steps      # training steps: width 512 in both precisions, preset tiny

Seconds are medians after a warm-up (on a CPU the two large evaluations of `ratios` are a single run). Shares are of
this machine's own rate for a 4096x4096 matrix product, which `steps` takes in turn with the step.
"""
import argparse
import math
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from dit import PRESETS, DiT, cost, flow_loss, planned  # noqa: E402
from vae import Optimizer, save, set_up  # noqa: E402

PAPER_MS = {"4x16x16": 7900, "8x32x32": 380, "8x64x64": 90}  # a DiT step on the paper's phone


def seconds(*runs, device, rounds, warm_up=1):
    """Median seconds of each, taken in turn, so that a slow moment of the machine meets them all."""
    times = [[] for _ in runs]
    for _ in range(warm_up + rounds):
        for run, its in zip(runs, times):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            its.append(time.perf_counter() - start)
    return [median(its[warm_up:]) for its in times]


def matrix_product(device, dtype, n=4096):
    """-> a large matrix product to run, and its FLOPs."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return lambda: a @ a, 2 * n ** 3


def ratios(device, dtype, rounds):
    config, _ = planned("mobile")
    dit = DiT(**config).to(device, dtype).requires_grad_(False)
    for p in dit.parameters():
        p.normal_(std=0.02)
    product, product_flops = matrix_product(device, dtype)
    rate, measured = product_flops / seconds(product, device=device, rounds=rounds)[0], {}
    print(f"{dtype}, a matrix product runs at {rate / 1e9:.0f} GFLOP/s")
    for ratio in ("8x64x64", "8x32x32", "8x16x16", "4x16x16"):
        rt, rs = (int(n) for n in ratio.split("x")[:2])
        shape = config["latent_channels"], 1 + 48 // rt, 384 // rs, 512 // rs
        x_t, t = torch.randn(1, *shape, device=device, dtype=dtype), torch.ones(1, device=device, dtype=dtype)
        text = torch.randn(1, config["text_tokens"], config["width"], device=device, dtype=dtype)
        n, first = (rounds, 1) if device.type == "cuda" or math.prod(shape[1:]) < 5000 else (1, 0)  # minutes, on a CPU
        measured[ratio], = seconds(lambda: dit(x_t, t, text), device=device, rounds=n, warm_up=first)  # noqa: B023
        flops = cost(config, shape)["forward_flops"]
        print(f"{ratio}: {math.prod(shape[1:])} tokens, {flops / 1e12:6.2f} TFLOP, {measured[ratio]:7.2f} s, "
              f"{flops / measured[ratio] / 1e9:.0f} GFLOP/s, {flops / measured[ratio] / rate:.0%} of it", flush=True)
    for ratio, ms in PAPER_MS.items():
        print(f"{ratio} : 8x32x32 = {measured[ratio] / measured['8x32x32']:.2f}, the paper's phone {ms / 380:.2f}")


class Products(TorchDispatchMode):
    """Notes the matrix products and the attention inside it, so that they can be run again without all else: no DiT of
    this size can take less time with these kernels."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        call = partial(function, *args, **(kwargs or {}))
        if re.search("mm|scaled_dot_product", function.__name__):
            self.calls.append(call)
        return call()

    def again(self):
        for call in self.calls:
            call()


def training_step(config, shape, batch, optimizer, device, precision, rounds, beside=()):
    """-> seconds a step, those of its products and attention alone, and those of what is to be timed beside them."""
    dit = DiT(**config).to(device)
    settings = SimpleNamespace(optimizer=optimizer, lr=1e-4, batch_size=batch)
    optimizer = Optimizer(dit, settings, 1000, precision)
    x0, noise = torch.randn(2, batch, *shape, device=device)
    t, tokens = torch.rand(batch, device=device), torch.ones(batch, config["text_tokens"], device=device).long()

    def step():
        with precision():
            loss = flow_loss(dit, x0, tokens, noise, t)
        optimizer.step(loss)

    with Products() as products:
        step()
    return seconds(step, products.again, *beside, device=device, rounds=rounds, warm_up=3)  # memory settles by then


def slope(xs, ys):
    """The exponent e of y ~ x^e, by least squares on logarithms."""
    xs, ys = ([math.log(v) for v in values] for values in (xs, ys))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def curves(device, precision, rounds):
    def config(width=512, depth=4):
        return dict(latent_channels=128, width=width, depth=depth, heads=width // 64, head_dim=64, ffn=4 * width,
                    vocabulary=100, text_tokens=32)

    shapes = [(128, t, 12, 16) for t in (1, 2, 4, 8, 16)]
    tokens = [math.prod(s[1:]) for s in shapes]
    times = [training_step(config(), s, 1, "adamw", device, precision, rounds)[0] for s in shapes]
    flops = [cost(config(), s)["step_flops"] for s in shapes]
    kept = [cost(config(), s)["activation_bytes"] for s in shapes]
    for n, s, f, b in zip(tokens, times, flops, kept):
        print(f"{n:5} tokens: {s:.3f} s a step, {f / 1e12:.2f} TFLOP, {b / 1e6:.0f} MB of activations")
    weights = kept[0] - (kept[1] - kept[0]) / (tokens[1] - tokens[0]) * tokens[0]  # bfloat16 copies: as for no token
    print(f"time grows as tokens^{slope(tokens, times):.2f}; FLOPs as ^{slope(tokens, flops):.2f} (predicted: 1 for "
          f"matrices to 2 for attention); activations, but for {weights / 1e6:.0f} MB of weights in bfloat16, as "
          f"^{slope(tokens, [k - weights for k in kept]):.2f} (predicted 1)")
    widths, shape = (256, 512, 768, 1024), (128, 4, 12, 16)
    params = [cost(config(w), shape)["params"] for w in widths]
    times = [training_step(config(w), shape, 1, "adamw", device, precision, rounds)[0] for w in widths]
    for n, s in zip(params, times):
        print(f"{n / 1e6:5.1f} M parameters: {s:.3f} s a step of {math.prod(shape[1:])} tokens")
    print(f"time grows as parameters^{slope(params, times):.2f} (predicted 1)")
    memory()


def memory():
    """Peak memory of a short training on data sets of several sizes, each in a process of its own (Linux)."""
    for clips in 1000, 4000, 16000:
        with tempfile.TemporaryDirectory() as run:
            zeros = torch.zeros(clips, 16, 7, 12, 16, dtype=torch.float16)
            save(Path(run) / "latents.pt", stage="latents", latents=zeros, fingerprint=0, mean=torch.zeros(16),
                 std=torch.ones(16), train_clips=clips, captions=["a clip"] * clips, held_out_captions=[],
                 embeddings=None, config={}, settings={}, metrics={})
            flags = ["--run", run, "--steps", "20", "--batch-size", "4", "--width", "64", "--depth", "2"]
            code = f"import dit; dit.main({flags}); print(open('/proc/self/status').read())"
            said = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True, text=True,
                                  capture_output=True).stdout
            print(f"{clips:6} clips, latents.pt {zeros.nbytes / 1e6:.0f} MB: in training at most "
                  + ", ".join(" ".join(line.split()) for line in said.splitlines() if line.startswith("VmHWM")))


def steps(device, precision, rounds):
    """The training steps that the README quotes; FLOPs of the model, three times those of its forward pass."""
    config = dict(latent_channels=128, width=512, depth=6, heads=8, head_dim=64, ffn=2048, vocabulary=100,
                  text_tokens=32)
    for dtype in torch.float32, torch.bfloat16:
        def precision_512(dtype=dtype):
            return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        product, product_flops = matrix_product(device, dtype)
        s, least, its = training_step(config, (128, 7, 12, 16), 1, "adamw", device, precision_512, rounds, [product])
        rate, flops = product_flops / its, 3 * cost(config, (128, 7, 12, 16))["forward_flops"]
        print(f"width 512, 6 blocks, 1,344 tokens, {dtype}: {s:.3f} s a training step, {flops / s / 1e9:.0f} GFLOP/s, "
              f"{flops / s / rate:.0%} of the {rate / 1e9:.0f} of a matrix product; its products and attention alone "
              f"{least:.3f} s, {flops / least / rate:.0%}", flush=True)
    own = PRESETS["tiny"]
    config = {k: own[k] for k in ("width", "depth", "heads", "head_dim", "ffn")}
    config |= dict(latent_channels=12, vocabulary=20, text_tokens=5)
    for batch in own["batch_size"], 64:
        s, least = training_step(config, (12, 3, 4, 4), batch, own["optimizer"], device, precision, 4 * rounds)
        print(f"tiny, batch {batch} of 48 tokens: {s:.3f} s a training step, its products alone {least:.3f} s")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["ratios", "curves", "steps", "memory"])
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    device, precision = set_up(args)
    torch.manual_seed(0)
    if args.what == "ratios":
        with precision(), torch.no_grad():
            dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
        with torch.no_grad(), precision():
            ratios(device, dtype, args.rounds)
    elif args.what == "memory":
        memory()
    else:
        {"curves": curves, "steps": steps}[args.what](device, precision, args.rounds)


if __name__ == "__main__":
    main()

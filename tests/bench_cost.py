"""What tokens cost on this machine, for docs/performance.md; and what a clip costs on the phone,
package by package, for docs/coreml.md.

    python tests/bench_cost.py ratios   # one evaluation of the mobile DiT, for four VAE ratios
    python tests/bench_cost.py phone    # reads runs/mobile/coreml-random, which `export_coreml.py
                                        # --preset mobile --random-weights` makes, or --coreml DIR

Seconds are medians after a warm-up (on a CPU the two large evaluations of `ratios` are a single
run). Shares are of this machine's own rate for a 4096x4096 matrix product, measured in turn.
"""
import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import cli, training  # noqa: E402
from common.coreml_evaluator import as_list, read_program, schedule, tensor_bytes  # noqa: E402
from dit import DiT, forward_flops, planned_config  # noqa: E402
from prune import PRESETS as PRUNE_PRESETS  # noqa: E402

PRODUCT_FLOPS = 2 * 4096 ** 3
PAPER_MS = {"4x16x16": 7900, "8x32x32": 380, "8x64x64": 90}  # a DiT step on the paper's phone


def seconds(*runs, device, rounds, warm_up=1):
    """Median seconds of each, in turn, so that a slow moment of the machine meets them all."""
    times = [[] for _ in runs]
    for _ in range(warm_up + rounds):
        for run, run_times in zip(runs, times):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            run_times.append(time.perf_counter() - start)
    return [median(run_times[warm_up:]) for run_times in times]


def matrix_product(device, dtype):
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    return lambda: a @ a


@torch.no_grad()
def ratios(device, precision, rounds):
    with precision():
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
    kept = PRUNE_PRESETS["mobile"]
    config = planned_config("mobile") | dict(depth=kept["blocks"], heads=kept["heads"],
                                             ffn=kept["ffn"])
    dit = DiT(**config).to(device, dtype)
    for p in dit.parameters():
        p.normal_(std=0.02)
    text = torch.randn(1, config["text_tokens"], config["width"], device=device, dtype=dtype)
    t = torch.ones(1, device=device, dtype=dtype)
    product_seconds, = seconds(matrix_product(device, dtype), device=device, rounds=rounds)
    rate = PRODUCT_FLOPS / product_seconds
    measured = {}
    for ratio in "8x64x64", "8x32x32", "8x16x16", "4x16x16":
        rt, rs, _ = cli.size(ratio)
        grid = 1 + 48 // rt, 384 // rs, 512 // rs
        tokens = math.prod(grid)
        x_t = torch.randn(1, config["latent_channels"], *grid, device=device, dtype=dtype)
        once = device.type == "cpu" and tokens > 5000  # it takes minutes
        with precision():
            measured[ratio], = seconds(partial(dit, x_t, t, text), device=device,
                                       rounds=1 if once else rounds, warm_up=0 if once else 1)
        flops = forward_flops(config, tokens)
        print(f"{ratio}: {tokens} tokens, {flops / 1e12:6.2f} TFLOP, {measured[ratio]:7.2f} s, "
              f"{flops / measured[ratio] / rate:.0%} of a {dtype} matrix product's "
              f"{rate / 1e9:.0f} GFLOP/s", flush=True)
    for ratio, ms in PAPER_MS.items():
        print(f"{ratio} : 8x32x32 = {measured[ratio] / measured['8x32x32']:.2f}, "
              f"the paper's phone {ms / 380:.2f}")


def op_flops(op):
    if op.op_type == "linear":
        return 2 * math.prod(op.outputs[0].shape) * op.weight.shape[1]
    if op.op_type == "conv":
        return 2 * math.prod(op.outputs[0].shape) * math.prod(op.weight.shape[1:])
    if op.op_type == "scaled_dot_product_attention":
        scores = math.prod(op.query.shape[:-1]) * op.key.shape[-2]
        return 2 * scores * (op.query.shape[-1] + op.value.shape[-1])
    return 0


def op_bytes(op):
    """Its tensors, weights too, each read or written once."""
    moved = list(op.outputs)
    for x in op.inputs.values():
        moved += as_list(x)
    return sum(tensor_bytes(var) for var in moved if var is not None and var.shape)


def phone(folder):
    """What each package computes and moves for a clip; and the seconds, were it as fast as a step
    of the generator in the paper: in FLOP/s, and in bytes/s."""
    manifest = json.loads((folder / "manifest.json").read_text())
    calls = dict(text_encoder=1, generator=len(manifest["timesteps"]), decoder_first=1,
                 decoder=manifest["latent_shape"][1] - 1)
    flops = {}
    moved = {}
    for name in calls:
        ops = [op for op, _ in schedule(read_program(folder / f"{name}.mlpackage"))]
        flops[name] = sum(op_flops(op) for op in ops)
        moved[name] = sum(op_bytes(op) for op in ops)
    for name, n in calls.items():
        by_flops = n * 0.380 * flops[name] / flops["generator"]
        by_bytes = n * 0.380 * moved[name] / moved["generator"]
        print(f"{name}: {n} x {flops[name] / 1e12:.4f} TFLOP, {moved[name] / 1e9:.3f} GB; together "
              f"{n * flops[name] / 1e12:.3f} TFLOP, {n * moved[name] / 1e9:.2f} GB; "
              f"{by_flops:.3f} s by FLOPs, {by_bytes:.3f} s by bytes")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["ratios", "phone"])
    p.add_argument("--coreml", type=Path, default=Path("runs/mobile/coreml-random"))
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    if args.what == "phone":
        phone(args.coreml)
        return
    device, precision = training.set_up(args)
    torch.manual_seed(0)
    ratios(device, precision, args.rounds)


if __name__ == "__main__":
    main()

"""Training: a step's random numbers, optimisers, the average of weights, the loop that resumes.

The training step itself stands in each script:

    for step, batch in training.Loop("dit", args, settings, args.steps, device, draw, model=...):
        ...forward, backward, average over processes, clip, optimizer.step(), EMA...
        loop.log(loss=loss)
"""
import atexit
import datetime
import math
import os
import signal
import sys
import time
import zlib

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from common import cli, files


def set_up(args):
    """-> the torch device, and a function that returns the autocast context of --dtype."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if cli.WORLD_SIZE > 1 and name.startswith("cuda"):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails where there are no numbers, as on `meta`
    except (RuntimeError, AssertionError, ImportError) as error:
        cli.exit_with_error(f"--device {name} cannot be used here: {error}")
    if cli.WORLD_SIZE > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # A process may wait for as long as the main one reads clips.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))
        atexit.register(dist.destroy_process_group)
        if not cli.is_main_process:
            sys.stdout = open(os.devnull, "w")
    if args.dtype == "auto":
        is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if is_fast else "float32"
    bfloat16 = args.dtype == "bfloat16"
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------ random numbers and processes


def step_generator(*key):
    """The random numbers of one step and process, from (stage, seed, step) and the rank alone: a
    resumed run draws what an unbroken one would."""
    return torch.Generator().manual_seed(zlib.crc32(repr((*key, cli.RANK)).encode()))


def is_picture_step(share, *key):
    """Whether a step trains on pictures. Without the rank: all processes must agree."""
    g = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return torch.rand((), generator=g).item() < share


def local_batch_size(args):
    """Clips per step of this process; gradients are then averaged over all of them."""
    if args.batch_size % cli.WORLD_SIZE:
        cli.exit_with_error(f"--batch-size {args.batch_size}: {cli.WORLD_SIZE} processes need a "
                            "multiple of their number")
    return args.batch_size // cli.WORLD_SIZE


def average(tensors):
    """In place: the mean over all processes."""
    if cli.WORLD_SIZE > 1:
        for x in tensors:
            dist.all_reduce(x.div_(cli.WORLD_SIZE))


def average_gradients(parameters):
    average([p.grad for p in parameters if p.grad is not None])


def wait_for_all():
    if cli.WORLD_SIZE > 1:
        dist.barrier()


# ------------------------------------------------------------ optimisers


def warmup_linear(step, steps):
    """Fraction of the peak learning rate: a line from 1 down to 0, cut by a ramp up in 30 steps, at
    most a tenth of all."""
    warmup = max(1, min(30, steps // 10))
    return min((step + 1) / warmup, max(0, 1 - step / steps))


class Muon(torch.optim.Optimizer):
    """Momentum, its matrix made orthogonal by five Newton-Schulz iterations (Keller Jordan, 2024,
    https://kellerjordan.github.io/posts/muon/). torch's own takes no convolutions, and its products
    are bfloat16 on every machine; here they are the weights' float32."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        updates = {}  # by shape: one batched product is faster than many small ones
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(momentum, group["momentum"])  # Nesterov
            updates.setdefault(p.shape, []).append((p, update.flatten(1)))
        for shape, pairs in updates.items():
            x = torch.stack([update for _, update in pairs])  # [matrices, rows, columns]
            is_tall = x.shape[1] > x.shape[2]
            x = x.mT if is_tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            # Each singular value s: 3.4445 s - 4.775 s^3 + 2.0315 s^5, five times, as a product of
            # polynomials of the Gram matrix, which is smaller than x.
            gram = x @ x.mT
            product = None
            for i in range(5):
                polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
                polynomial.diagonal(dim1=1, dim2=2).add_(3.4445)
                product = polynomial if product is None else polynomial @ product
                if i < 4:  # no polynomial of the last one is needed
                    gram = polynomial @ gram @ polynomial
            x = product @ x
            x = x.mT if is_tall else x
            # A tall matrix takes a longer step (same post).
            rate = group["lr"] * max(1, shape[0] / shape[1:].numel()) ** 0.5
            for (p, _), update in zip(pairs, x):
                # No gradient, no update: what a mask switches off holds still.
                p.add_(update.reshape(shape) * (p.grad != 0), alpha=-rate)


class Optimizer:
    """AdamW as the paper states; or Muon for the matrices of linear and convolution layers beside
    AdamW for all else, stepped as one. Our reading: AdamW decays matrices by 0.01, and nothing else
    (norms, biases, gates, embeddings); Muon decays nothing."""

    def __init__(self, model, name, lr):
        weights = {id(module.weight) for module in model.modules()
                   if isinstance(module, (nn.Linear, nn.Conv3d))}
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if id(p) in weights]
        others = dict(params=[p for p in trained if id(p) not in weights], weight_decay=0.0)
        groups = [dict(params=matrices, weight_decay=0.01), others]
        self.parts = []
        if name == "muon":
            self.parts = [Muon(matrices, lr)]
            groups = [others]
            lr = lr / 20  # AdamW's usual rates are about that much lower
        self.parts.append(torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), fused=True))
        self.peaks = [part.param_groups[0]["lr"] for part in self.parts]

    def set_lr(self, fraction):
        """fraction: of the peak learning rate, as `warmup_linear` gives it."""
        for part, peak in zip(self.parts, self.peaks):
            for group in part.param_groups:
                group["lr"] = peak * fraction

    def step(self):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)


def average_weights(model, args):
    """The exponential moving average (EMA) of a model's weights: of 1 / (1 - decay) steps, but
    never of more than a third of the run."""
    decay = min(args.ema, max(0, 1 - 3 / args.steps))
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


# ------------------------------------------------------------ start and end of a stage


def stop_if_done(paths, settings, stage, next_script):
    """Exits if all `paths` exist with these settings; refuses if one has others. stage: of the last
    loop."""
    done = [path for path in paths if path.exists()]
    for path in done:
        files.check_settings(path, files.load(path)["settings"], settings)
    # While the resume file of the last loop is there, `finish` has not run.
    if done == paths and not paths[0].with_suffix(f".{stage}.resume").exists():
        print(f"{paths[0]} is done; next: {next_script}")
        sys.exit(0)


def finish(args, stage, metrics, next_script, *loops):
    """Ends a stage whose results are saved: records metrics, deletes the resume files, prints a
    line. Seconds go into metrics.json alone: one seed gives identical checkpoints."""
    seconds = sum(loop.seconds for loop in loops)
    metrics = {**metrics, "dtype": args.dtype, "seconds": seconds}
    files.record_metrics(args.run, stage, metrics)
    if cli.is_main_process:
        for loop in reversed(loops):
            loop.path.unlink(missing_ok=True)
    figures = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
               for key, value in metrics.items()]
    print(f"{args.out}: {', '.join(figures)}; next: {next_script}")


# ------------------------------------------------------------ the loop


class Loop:
    """The steps that a run still has to do: `for step, batch in Loop(...)`.

    draw(step) -> the tensors of a batch, from the step's own random numbers. state: everything with
    a state_dict that the run changes. It is saved every --save-every seconds, at the end, and when
    told to stop (Ctrl-C, SIGTERM): the same command ends in the same bits as an unbroken run."""

    def __init__(self, stage, args, settings, steps, device, draw, **state):
        self.stage = stage
        self.settings = settings
        self.steps = steps
        self.save_every = args.save_every
        self.device = device
        self.draw = draw
        self.state = state
        self.path = args.out.with_suffix(f".{stage}.resume")
        self.step = 0
        self.seconds = 0.0  # over all starts of the run
        self.history = {}  # name -> one value per step
        self.logged = []  # the last steps' values, still on the device
        self.received = 0  # SIGINT or SIGTERM, once it came
        if self.path.exists():
            saved = files.load(self.path, "resume")
            files.check_settings(self.path, saved["settings"], settings)
            with files.reading(self.path):
                for name, part in state.items():
                    part.load_state_dict(saved[name])
                self.step = saved["step"]
                self.seconds = saved["seconds"]
                self.history = saved["history"]
            print(f"{self.path}: going on from step {self.step}")

    def __iter__(self):
        on_gpu = self.device.type == "cuda"
        workers = 4 if on_gpu and hasattr(os, "fork") else 0  # they draw ahead of the steps
        batches = DataLoader(range(self.step, self.steps), batch_size=None, collate_fn=self.draw,
                             num_workers=workers, pin_memory=on_gpu,
                             multiprocessing_context="fork" if workers else None)
        bar = cli.progress(batches, total=self.steps, initial=self.step, desc=self.stage)
        log_every = 20 if self.save_every else 1  # reading a loss waits for the device
        start = time.monotonic() - self.seconds
        next_save = time.monotonic() + self.save_every
        signals = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.signal(signum, self.note_signal) for signum in signals]
        try:
            for batch in bar:
                yield self.step, [x.to(self.device, non_blocking=on_gpu) for x in batch]
                self.step += 1
                now = time.monotonic()
                self.seconds = now - start
                is_last = self.step == self.steps
                # Several processes agree every 20 steps, in read_log; one need not wait.
                is_due = cli.WORLD_SIZE == 1 and (self.received or now > next_save)
                if self.step % log_every and not is_last and not is_due:
                    continue
                bar.set_postfix_str(self.read_log(), refresh=False)
                if self.received or is_last or now > next_save or not self.save_every:
                    self.save()
                    # At most a twentieth of the time goes into saves.
                    pause = max(self.save_every, 20 * (time.monotonic() - now))
                    next_save = time.monotonic() + pause
                if self.received:
                    bar.close()
                    cli.warn(f"stopped at step {self.step} of {self.steps}, saved in {self.path}: "
                             "the same command goes on from here")
                    sys.exit(128 + self.received)
        finally:
            for signum, handler in zip(signals, handlers):
                signal.signal(signum, handler)

    def note_signal(self, signum, _):
        self.received = signum

    def save(self):
        parts = {name: part.state_dict() for name, part in self.state.items()}
        files.save(self.path, stage="resume", settings=self.settings, step=self.step,
                   seconds=self.seconds, history=self.history, **parts)

    def log(self, **values):
        """Notes 0-dimensional tensors, the same names in every step: means over this process's
        clips, and the gradient's norm. What is not finite ends the run before it saves."""
        self.logged.append({name: value.detach().float() for name, value in values.items()})

    def read_log(self):
        """Moves what was logged into `history`, averaged over all processes, which also agree here
        on whether to stop. The one place where the host waits for the device. -> a line of it"""
        table = torch.stack([torch.stack(list(row.values())) for row in self.logged])
        average([table])  # [steps, values]
        if cli.WORLD_SIZE > 1:
            received = torch.tensor(self.received, device=self.device)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self.received = received.item()
        for name, values in zip(self.logged[0], table.T.tolist()):
            if not all(math.isfinite(value) for value in values):
                kept = f"the last save, {self.path}, is good; " if self.path.exists() else ""
                cli.exit_with_error(f"{name} is not finite at step {self.step}: {kept}try a "
                                    "smaller --lr in another --run")
            self.history.setdefault(name, []).extend(values)
        self.logged = []
        return ", ".join(f"{name} {series[-1]:.4g}" for name, series in self.history.items())

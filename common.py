"""What every script needs and none is about. Read it last, or never.

    the command line   flags with the preset's values as defaults; errors in one sentence
    processes          `torchrun` starts several; each takes its share of every batch
    optimisers         AdamW, or Muon beside AdamW; the learning rate as a function of the step
    files              checkpoints: flat dicts, never half-written, never trusted with code
    the loop           batches, resuming, saving, the progress bar

The training step itself stands in each script.
"""
import argparse
import atexit
import contextlib
import datetime
import json
import math
import mmap
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

# torchrun starts a script WORLD times and tells each process its RANK.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
FIRST = RANK == 0  # the one process that writes, and talks
SHARE = slice(RANK, None, WORLD)  # this process's clips of a batch [b, ...]

# ------------------------------------------------------------ errors


def say(message):
    """Prints one line to stderr; unprintable characters become spaces."""
    if FIRST:
        line = "".join(c if c.isprintable() else " " for c in message[:600])
        tqdm.write(line, file=sys.stderr)  # above a progress bar


def fail(message):
    """Ends the script with one line and exit status 2."""
    if not FIRST:
        print(f"error in process {RANK}: {message}", file=sys.stderr)
    say(f"error: {message}")
    sys.exit(2)


def run_script(main):
    """Runs main; interrupts, disk and memory errors end in one line, without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        say("stopped: no file is half-written; the same command goes on")
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        fail(f"too little memory, take a smaller --batch-size or --preset: {error}")


# ------------------------------------------------------------ the command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see python {self.prog} --help)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        # `in` would take a seed of 0 for False.
        if action.default in (None, [], argparse.SUPPRESS) or action.default is False:
            return action.help
        return f"{action.help} (default: %(default)s)"


def size(text):
    """'9x32x32' -> (9, 32, 32): time x height x width."""
    if not re.fullmatch("[1-9][0-9]{0,4}(x[1-9][0-9]{0,4}){2}", text):
        raise argparse.ArgumentTypeError(f"{text} is not time x height x width, such as 9x32x32")
    return tuple(int(n) for n in text.split("x"))


def number(low, high=2 ** 31, kind=float):
    """An argparse type: a number in [low, high]; `nan` is in no range."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return kind(text)

    parse.__name__ = "number"  # argparse's word for what is expected
    return parse


positive = number(1, kind=int)
not_negative = number(0, kind=int)


def steps_of(preset_steps):
    """An argparse type: a number of steps; below 1 a share of the preset's."""
    def steps(text):
        if 0 < float(text) < 1:
            return max(1, round(float(text) * preset_steps))
        return positive(text)

    return steps


def make_parser(doc, presets, argv):
    """The flags of every script. A preset's values are the defaults of the flags of those names."""
    # --preset and --run decide the other defaults, so they are read first.
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", choices=list(presets), default="tiny",
                       help="tiny: a laptop's CPU; toy: one GPU; mobile, server: the paper's sizes")
    early.add_argument("--run", type=Path, metavar="DIR", help="folder of the run's files")
    chosen, _ = early.parse_known_args(argv)

    p = Parser(description=doc, parents=[early], formatter_class=HelpFormatter, allow_abbrev=False)
    p.set_defaults(run=chosen.run or Path("runs") / chosen.preset, **presets[chosen.preset])
    p.add_argument("--seed", type=not_negative, default=0, help="all randomness follows from it")
    return p


def add_file(p, flag, name, text):
    p.add_argument(flag, type=Path, metavar="FILE", default=p.get_default("run") / name, help=text)


def add_device_flags(p):
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda, else cpu")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                   help="of the arithmetic (weights stay float32); auto: bfloat16 on GPUs that "
                        "have it in hardware, else float32")


def add_training_flags(p):
    add_device_flags(p)
    p.add_argument("--steps", type=steps_of(p.get_default("steps")),
                   help="optimiser steps; below 1: a share of the preset's")
    p.add_argument("--batch-size", type=positive, help="clips per step, over all processes")
    p.add_argument("--lr", type=number(1e-12),
                   help="peak learning rate; adamw wants a twentieth of muon's")
    p.add_argument("--optimizer", choices=["muon", "adamw"], help="adamw is the paper's")
    p.add_argument("--ema", type=number(0, 1), help="decay of the average weights that are saved")
    p.add_argument("--picture-share", type=number(0, 1), default=0.0,
                   help="share of steps on pictures: first frames, of pictures and clips")
    p.add_argument("--compile", action="store_true", help="torch.compile the loss")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    p.add_argument("--save-every", type=number(0), default=60,
                   help="seconds between saves; 0: every step")


def settings_of(args):
    """What a result depends on: every flag but file names and those that change it at most by
    rounding."""
    left_out = ("preset", "device", "dtype", "compile", "gradient_checkpointing", "save_every",
                "dry_run")
    return {name: value for name, value in vars(args).items()
            if name not in left_out and not isinstance(value, Path)}


def set_up(args):
    """-> the torch device, and a function that returns the autocast context of --dtype."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1 and name.startswith("cuda"):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails where there are no numbers, as on `meta`
    except (RuntimeError, AssertionError, ImportError) as error:
        fail(f"--device {name} cannot be used here: {error}")
    if WORLD > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # A process may wait for as long as the first one reads clips.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))
        atexit.register(dist.destroy_process_group)
        if not FIRST:  # only the first process prints
            sys.stdout = open(os.devnull, "w")
    bfloat16 = args.dtype == "bfloat16"
    if args.dtype == "auto" and device.type == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def progress(items, **how):
    """A progress bar; in a log file a line every 20 seconds. Only the first process has one."""
    interval = 0.1 if sys.stderr.isatty() else 20
    return tqdm(items, disable=not FIRST, mininterval=interval, dynamic_ncols=True, **how)


# ------------------------------------------------------------ processes


def step_generator(*key):
    """The random numbers of one step. Every process draws the whole batch from it and takes its
    SHARE, so that any number of processes computes the same update."""
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, key)).encode()))


def average(tensors, batch_size):
    """In place: the mean over a batch, from the mean of each process over its own share."""
    if WORLD > 1:
        weight = len(range(RANK, batch_size, WORLD)) / batch_size  # the fraction that is here
        for x in tensors:
            dist.all_reduce(x.mul_(weight))


def wait_for_all():
    if WORLD > 1:
        dist.barrier()


def average_gradients(parameters, batch_size):
    average([p.grad for p in parameters if p.grad is not None], batch_size)


# ------------------------------------------------------------ optimisers


def warmup_cosine(step, steps):
    """Fraction of the peak learning rate: up in 30 steps (at most a tenth of all), then down to 0
    along a cosine."""
    warmup = max(1, min(30, steps // 10))
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps)))


class Muon(torch.optim.Optimizer):
    """Momentum, its matrix made orthogonal by five Newton-Schulz iterations (Keller Jordan, 2024,
    https://kellerjordan.github.io/posts/muon/). torch's own takes no convolutions, and its bfloat16
    products are slow on many CPUs: here autocast decides."""

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
            for _ in range(5):  # each singular value s: 3.4445 s - 4.775 s^3 + 2.0315 s^5
                gram = x @ x.mT
                polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
                x = 3.4445 * x + polynomial @ x
            x = x.mT if is_tall else x
            # A tall matrix takes a longer step (same post).
            rate = group["lr"] * max(1, shape[0] / shape[1:].numel()) ** 0.5
            for (p, _), update in zip(pairs, x):
                p.add_(update.reshape(shape), alpha=-rate)


class Optimizer:
    """AdamW as the paper states; or Muon for the matrices of linear and convolution layers beside
    AdamW for all else, stepped as one under the autocast context of `precision`."""

    def __init__(self, model, name, lr, precision=contextlib.nullcontext):
        self.precision = precision
        kinds = (nn.Linear, nn.Conv3d) if name == "muon" else ()
        weights = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if id(p) in weights]
        others = [p for p in trained if id(p) not in weights]
        adamw_lr = lr / 20 if matrices else lr  # its usual rates are about that much lower
        self.parts = [Muon(matrices, lr)] if matrices else []
        self.parts.append(torch.optim.AdamW(others, adamw_lr, betas=(0.9, 0.99), fused=True))
        self.peaks = [part.param_groups[0]["lr"] for part in self.parts]

    def set_lr(self, fraction):
        """fraction: of the peak learning rate, as `warmup_cosine` gives it."""
        for part, peak in zip(self.parts, self.peaks):
            part.param_groups[0]["lr"] = peak * fraction

    def step(self):
        with self.precision():
            for part in self.parts:
                part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)


def average_weights(model, args):
    """The exponential moving average of a model's weights: of 1 / (1 - decay) steps, but never of
    more than a third of the run."""
    decay = min(args.ema, max(0, 1 - 3 / args.steps))
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------ files


def write_atomically(path, write):
    """`path` is either the old file or the whole new one: write aside, flush, rename."""
    if not FIRST:
        return
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        # torch's error for a full disk hides the system's, which is its context.
        cause = error.__context__ or error
        fail(f"cannot write {path}: {cause}; what was there before is untouched")
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def save(path, **checkpoint):
    """A dict of tensors, plain values, and dicts and lists of these: torch.load(path,
    weights_only=True) reads it."""
    write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


@contextlib.contextmanager
def reading(path):
    """A damaged file raises nearly anything; here that becomes one line and exit status 2."""
    try:
        yield
    except OSError as error:
        fail(f"cannot read {path}: {error}")
    except Exception as error:
        fail(f"{path} is damaged, or of another program or version, or larger than memory: "
             f"{type(error).__name__} {error}")


def load(path, *stages):
    """Reads a checkpoint of one of these stages, never running code from it. Checks every byte
    first: torch compares no checksums, and would take flipped bits for weights."""
    path = Path(path)
    if not path.is_file():
        maker = {"latents": "vae", "masks": "prune", "pruned": "prune", "student": "distill"}
        stage = path.stem if path.stem in stages else stages[0]
        fail(f"there is no file {path}: {maker.get(stage, stage)}.py makes it")
    with reading(path):
        if FIRST:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a wrong checksum")
        is_data = "latents" in stages  # maybe larger than memory; no other file stays open
        sharing = contextlib.nullcontext()
        if is_data and sys.platform != "win32":  # a private mapping would count as memory
            sharing = torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
        with sharing:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_data)
        stage = checkpoint["stage"]
        checkpoint["settings"]  # KeyError: not of this program
    if stage not in stages:
        fail(f"{path} holds a {stage} checkpoint where {' or '.join(stages)} is needed")
    return checkpoint


def checksum(tensors):
    """A hash, by which a stage notices that its input has changed."""
    crc = 0
    for x in tensors:
        crc = zlib.crc32(x.detach().cpu().contiguous().numpy(), crc)
    return f"{crc:08x}"


def check_settings(path, old, new):
    """Refuses a file that was made with other settings."""
    differ = [f"{key} = {old.get(key)}, not {new[key]}" for key in new if old.get(key) != new[key]]
    if differ:
        fail(f"{path} was made with {'; '.join(differ)}: ask for the same, take another --run, or "
             "delete it")


def read_metrics(run):
    path = run / "metrics.json"
    with reading(path):
        return dict(json.loads(path.read_text())) if path.exists() else {}


def record_metrics(run, stage, metrics):
    """Sets one stage's object in metrics.json and leaves the others."""
    text = json.dumps({**read_metrics(run), stage: metrics}, indent=2)
    write_atomically(run / "metrics.json", lambda file: file.write(text.encode() + b"\n"))


# ------------------------------------------------------------ a training run


def resume_path(out, stage):
    return out.with_suffix(f".{stage}.resume")


def stop_if_done(paths, settings, stage, next_script):
    """Exits if all `paths` exist with these settings; refuses if one has others. stage: of the last
    loop."""
    done = [path for path in paths if path.exists()]
    for path in done:
        old = load(path, "vae", "latents", "dit", "masks", "pruned", "student", "discriminator")
        check_settings(path, old["settings"], settings)
    # While the resume file of the last loop is there, `finish` has not run.
    if done == paths and not resume_path(paths[0], stage).exists():
        print(f"{paths[0]} is done; next: {next_script}")
        sys.exit(0)


def finish(args, stage, metrics, next_script, *loops):
    """Ends a stage whose results are saved: records metrics, deletes the resume files, prints a
    line. Seconds go into metrics.json only, so that one seed gives identical checkpoints."""
    metrics = {**metrics, "seconds": sum(loop.seconds for loop in loops)}
    record_metrics(args.run, stage, metrics)
    if FIRST:
        for loop in reversed(loops):
            loop.path.unlink(missing_ok=True)
    figures = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
               for key, value in metrics.items()]
    print(f"{args.out}: {', '.join(figures)}; next: {next_script}")


class Loop:
    """The steps that a run still has to do: `for step, batch in Loop(...)`.

    draw(step) -> the tensors of a batch, from `step_generator`, so that a resumed run repeats an
    unbroken one bit by bit. state: everything with a state_dict that the run changes. It is saved
    every --save-every seconds, at the end, and when told to stop (Ctrl-C, SIGTERM)."""

    def __init__(self, stage, args, settings, steps, device, draw, **state):
        self.stage = stage
        self.args = args
        self.settings = settings
        self.steps = steps
        self.device = device
        self.draw = draw
        self.state = state
        self.path = resume_path(args.out, stage)
        self.step = 0
        self.seconds = 0.0  # over all starts of the run
        self.history = {}  # name -> one value per step
        self.logged = []  # the last steps' values, still on the device
        self.received = 0  # SIGINT or SIGTERM, once it came
        if WORLD > args.batch_size:
            fail(f"--batch-size {args.batch_size}: {WORLD} processes need at least a clip each")
        if self.path.exists():
            saved = load(self.path, "resume")
            check_settings(self.path, saved["settings"], settings)
            with reading(self.path):
                for name, part in state.items():
                    part.load_state_dict(saved[name])
                self.step = saved["step"]
                self.seconds = saved["seconds"]
                self.history = saved["history"]
            print(f"{self.path}: going on from step {self.step}")

    def save(self):
        state = {name: part.state_dict() for name, part in self.state.items()}
        save(self.path, stage="resume", settings=self.settings, step=self.step,
             seconds=self.seconds, history=self.history, **state)

    def log(self, **values):
        """Notes values of this step, 0-dimensional tensors: means over this process's clips. The
        gradient's norm is one of them: what is not finite ends the run before it saves."""
        for name, value in values.items():
            self.logged[-1][name] = value.detach().float()

    def __iter__(self):
        handlers = {signum: signal.signal(signum, self.note_signal)
                    for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield from self.remaining_steps()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def note_signal(self, signum, _):
        self.received = signum

    def remaining_steps(self):
        on_gpu = self.device.type == "cuda"
        workers = 4 if on_gpu and hasattr(os, "fork") else 0
        # The data set is the numbers of the steps; collate_fn draws one step's batch.
        batches = DataLoader(range(self.step, self.steps), batch_size=None, collate_fn=self.draw,
                             num_workers=workers, pin_memory=on_gpu,
                             multiprocessing_context="fork" if workers else None)
        save_every = self.args.save_every
        look_every = 20 if save_every else 1  # reading a loss waits for the device
        bar = progress(batches, total=self.steps, initial=self.step, desc=self.stage)
        start = time.monotonic() - self.seconds
        next_save = time.monotonic() + save_every
        for batch in bar:
            self.logged.append({})  # for `log`
            yield self.step, [x.to(self.device, non_blocking=on_gpu) for x in batch]
            self.step += 1
            now = time.monotonic()
            self.seconds = now - start
            is_last = self.step == self.steps
            stop_at_once = self.received and WORLD == 1  # several must agree, in read_log
            if self.step % look_every and not is_last and not stop_at_once:
                continue
            self.read_log()
            values = [f"{name} {series[-1]:.4g}" for name, series in self.history.items()]
            bar.set_postfix_str(", ".join(values), refresh=False)
            if self.received or is_last or now > next_save or not save_every:
                self.save()
                saved = time.monotonic()
                # At most a twentieth of the time goes into saves.
                next_save = saved + max(save_every, 20 * (saved - now))
            if self.received:
                bar.n = self.step  # tqdm counts only when it draws
                bar.close()
                say(f"stopped at step {self.step} of {self.steps}, saved in {self.path}: the same "
                    "command goes on from here")
                sys.exit(128 + self.received)

    def read_log(self):
        """Moves what was logged into `history`, averaged over all processes, which also agree here
        on whether to stop. The one place where the host waits for the device."""
        rows = [torch.stack(list(row.values())) for row in self.logged]
        table = torch.stack(rows)  # [steps, values]
        average([table], self.args.batch_size)
        if WORLD > 1:
            received = torch.tensor(self.received, device=self.device)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self.received = received.item()
        for name, values in zip(self.logged[0], table.T.tolist()):
            if not all(math.isfinite(value) for value in values):
                kept = f"the last save, {self.path}, is good; " if self.path.exists() else ""
                fail(f"{name} is not finite at step {self.step}: {kept}try a smaller --lr in "
                     "another --run")
            self.history.setdefault(name, []).extend(values)
        self.logged = []

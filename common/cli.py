"""The command line: flags with a preset's values as defaults, errors in one line, a progress bar;
and which of torchrun's processes this one is."""
import argparse
import os
import re
import signal
import sys
from pathlib import Path

from tqdm import tqdm

# torchrun starts a script WORLD_SIZE times and tells each process its RANK.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
is_main_process = RANK == 0  # the one process that writes files and prints


def warn(message):
    """Prints one line to stderr; unprintable characters become spaces."""
    if is_main_process:
        line = "".join(c if c.isprintable() else " " for c in message[:600])
        tqdm.write(line, file=sys.stderr)  # above a progress bar


def exit_with_error(message):
    """Ends the script with one line and exit status 2."""
    if not is_main_process:
        print(f"error in process {RANK}: {message}", file=sys.stderr)
    warn(f"error: {message}")
    sys.exit(2)


def run_script(main):
    """Runs main; interrupts, disk and memory errors end in one line, without a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(errors="backslashreplace")  # letters that a terminal cannot encode
    try:
        main()
    except KeyboardInterrupt:
        warn("stopped: no file is half-written; the same command goes on")
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        exit_with_error(str(error))
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        exit_with_error(f"too little memory, take a smaller --batch-size or --preset: {error}")


def progress(items, **options):
    """A progress bar; in a log file a line every 20 seconds. The main process alone has one."""
    interval = 0.1 if sys.stderr.isatty() else 20
    return tqdm(items, disable=not is_main_process, mininterval=interval, dynamic_ncols=True,
                **options)


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
    """An argparse type: a number of steps; below 1 a fraction of the preset's."""
    def steps(text):
        if 0 < float(text) < 1:
            return max(1, round(float(text) * preset_steps))
        return positive(text)

    return steps


class Parser(argparse.ArgumentParser):
    def error(self, message):
        exit_with_error(f"{message} (see python {self.prog} --help)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        # `in` would take a seed of 0 for False.
        if action.default in (None, [], argparse.SUPPRESS) or action.default is False:
            return action.help
        return f"{action.help} (default: %(default)s)"


def make_parser(doc, presets, argv):
    """The flags of every script. A preset's values are the defaults of the flags of those names."""
    # --preset and --run decide the other defaults, so they are read first.
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", choices=list(presets), default="tiny",
                       help="tiny: minutes on a laptop; toy: an hour there, or a GPU; mobile, "
                            "server: the paper's sizes")
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
                   help="of the arithmetic (weights stay float32); auto: bfloat16 on CUDA GPUs "
                        "that have it in hardware, else float32")


def add_training_flags(p):
    add_device_flags(p)
    p.add_argument("--steps", type=steps_of(p.get_default("steps")),
                   help="optimiser steps; below 1: a fraction of the preset's")
    p.add_argument("--batch-size", type=positive, help="clips per step, over all processes")
    p.add_argument("--lr", type=number(1e-12),
                   help="peak learning rate; adamw wants a twentieth of muon's")
    p.add_argument("--optimizer", choices=["muon", "adamw"], help="adamw is the paper's")
    p.add_argument("--ema", type=number(0, 1),
                   help="decay of the saved average of weights, over a third of the run at most")
    p.add_argument("--picture-share", type=number(0, 1), default=0.0,
                   help="fraction of steps on pictures: first frames, of pictures and clips")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile the loss; in distill.py the student")
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

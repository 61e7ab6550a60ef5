"""Files: checkpoints and metrics.json, never half-written, never trusted with code.

A checkpoint is a flat dict of tensors, plain values, and dicts and lists of these. Its `stage` says
who made it, `settings` with which flags, and `config` alone rebuilds the module whose weights are
`model`: `DiT(**checkpoint["config"])`, `VAE(**checkpoint["config"])`.
"""
import contextlib
import json
import mmap
import os
import sys
import zipfile
import zlib
from pathlib import Path

import torch

from common import cli


def write_atomically(path, write):
    """`path` is either the old file or the whole new one: write aside, flush, rename."""
    if not cli.is_main_process:
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
        # torch's error for a full disk hides the system's, which is its context, if it has one.
        cause = error.__context__ or (error if isinstance(error, OSError) else "is the disk full?")
        cli.exit_with_error(f"cannot write {path}: {cause}; what was there before is untouched")
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def allocate(path, n_bytes):
    """Makes a file. A full disk shows now, not as a crash while it is mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        file.truncate(n_bytes)


def save(path, **checkpoint):
    """Writes a checkpoint: torch.load(path, weights_only=True) reads it."""
    write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


@contextlib.contextmanager
def reading(path):
    """A damaged file raises nearly anything; here that becomes one line and exit status 2."""
    try:
        yield
    except OSError as error:
        cli.exit_with_error(f"cannot read {path}: {error}")
    except Exception as error:
        cli.exit_with_error(f"{path} is damaged, or of another program or version, or larger than "
                            f"memory: {type(error).__name__} {error}")


def load(path, *stages):
    """Reads a checkpoint of one of these stages (of any, if none is named), never running code from
    it. Checks every byte first: torch would take flipped bits for weights."""
    path = Path(path)
    if not path.is_file():
        maker = {"latents": "vae", "masks": "prune", "pruned": "prune", "student": "distill"}
        stage = path.stem if not stages or path.stem in stages else stages[0]
        cli.exit_with_error(f"there is no file {path}: {maker.get(stage, stage)}.py makes it")
    with reading(path):
        if cli.is_main_process:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a wrong checksum")
        is_data = "latents" in stages  # maybe larger than memory; no other file stays open
        sharing = contextlib.nullcontext()
        # A private mapping would count as memory; a shared one takes the right to write.
        if is_data and sys.platform != "win32" and os.access(path, os.W_OK):
            sharing = torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
        with sharing:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_data)
        stage = checkpoint["stage"]
        checkpoint["settings"]  # KeyError: not of this program
    if stages and stage not in stages:
        cli.exit_with_error(f"{path} holds a {stage} checkpoint where {' or '.join(stages)} is "
                            "needed")
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
        cli.exit_with_error(f"{path} was made with {'; '.join(differ)}: ask for the same, take "
                            "another --run, or delete it")


def read_metrics(run):
    path = run / "metrics.json"
    with reading(path):
        return dict(json.loads(path.read_text())) if path.exists() else {}


def record_metrics(run, stage, metrics):
    """Replaces one stage's object in metrics.json and leaves those of the others: a stage that
    runs again overwrites its own figures, and nothing else."""
    text = json.dumps({**read_metrics(run), stage: metrics}, indent=2)
    write_atomically(run / "metrics.json", lambda file: file.write(text.encode() + b"\n"))

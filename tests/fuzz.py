"""Random damage to the two kinds of files that come from elsewhere: checkpoints, and folders of clips.

    python tests/fuzz.py                      # two minutes
    python tests/fuzz.py --seconds 600 --seed 1 --keep /tmp/found

    damaged    a checkpoint with bits flipped, bytes set, blocks cut, zeroed, copied: refused, or read as it was
    hostile    the same done to the pickle inside, and the checksums made right again: refused, or used somehow
    folder     the same done to clips, captions and embeddings: used, skipped by name, or refused

Each case is a whole script in a process of its own, with limits on memory and time, forked from one that has only
imported the scripts. Wrong are: a signal, a traceback, a hang, a damaged file read as something else, a refusal of
more than one line. Whatever is found is kept."""
import argparse
import collections
import gc
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads would not survive the fork
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np  # noqa: E402
import torch._dynamo  # noqa: E402  (the optimisers import it at their first step, which would take most of a case)

import dit  # noqa: E402
import sample  # noqa: E402
import vae  # noqa: E402
from conftest import MICRO, train  # noqa: E402

MEMORY, SECONDS = 2 << 30, 20  # what a case may take beyond what the scripts take when imported
READERS = {"vae.pt": "sample", "student.pt": "sample", "dit.pt": "sample", "latents.pt": "dit",
           "dit.dit.resume": "dit", "vae.vae.resume": "vae"}  # file -> the script that is given it


def make_corpus(folder):
    """A micro run, two resume files, and four clips of four kinds."""
    run, clips, rng = folder / "run", folder / "clips", np.random.default_rng(0)
    for stage in MICRO:
        train(stage, run)
    vae.finish = dit.finish = lambda *_: None  # leaves the resume files where they are
    for stage in "vae", "dit":
        train(stage, run, "--steps", "1", "--out", str(run / "half" / f"{stage}.pt"),
              *(["--latents", str(run / "half/latents.pt")] if stage == "vae" else []))
    for path in (run / "half").glob("*.resume"):
        path.rename(run / path.name)
    clips.mkdir()
    for i, kind in enumerate((".mp4", ".gif", ".webm", ".avi")):
        frames = np.cumsum(rng.integers(0, 9, (20, 24, 32, 3)), axis=0).astype(np.uint8)
        how = dict(plugin="pillow") if kind == ".gif" else dict(
            plugin="pyav", fps=20, codec={".mp4": "libx264", ".webm": "libvpx", ".avi": "mpeg4"}[kind])
        (clips / f"{i}{kind}").write_bytes(sample.iio.imwrite("<bytes>", frames, extension=kind, **how))
        (clips / f"{i}.txt").write_text(f"clip number {i}")
        np.save(clips / f"{i}.npy", rng.normal(size=(3, 5)).astype(np.float32))


def mutate(data, rng, other):
    """data with one to four random changes; other: bytes to splice in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        n = len(data)
        if not n:
            break
        head, tail = rng.randrange(min(n, 600)), n - 1 - rng.randrange(min(n, 6000))  # headers, directories
        at = rng.choice((rng.randrange(n), rng.randrange(n), head, tail))
        size = min(n - at, int(2 ** rng.uniform(0, 12)))
        kind = rng.randrange(9)
        if kind <= 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at] = rng.choice((0, 1, 0x7f, 0x80, 0xff, rng.randrange(256)))
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at + size] = bytes(size)
        elif kind == 5:
            start = rng.randrange(len(other))
            data[at:at + size] = other[start:start + size]
        elif kind == 6:
            del data[at:at + size]
        elif kind == 7:
            data[at:at] = data[at:at + size]
        else:
            number = rng.choice((0, 1, rng.randrange(999), *(2 ** k - less for k in (31, 32, 63) for less in (0, 1))))
            width = rng.choice((2, 4, 8))
            data[at:at + width] = number.to_bytes(8, rng.choice(("little", "big")))[:width]
    return bytes(data)


def with_pickle(data, change):
    """A checkpoint with its pickle changed, written as torch.save would have: stored, aligned, with right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for file in old.infolist():
            content = old.read(file)
            info = zipfile.ZipInfo(file.filename)
            pad = -(buffer.tell() + 30 + len(file.filename) + 4) % 64
            info.extra = b"FB" + pad.to_bytes(2, "little") + bytes(pad)
            new.writestr(info, change(content) if file.filename.endswith("data.pkl") else content)
    return buffer.getvalue()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def case(kind, corpus, work, rng):
    """Prepares one case in the folder `work`. -> what the child has to call."""
    run, clips = corpus / "run", corpus / "clips"
    if kind == "folder":
        shutil.copytree(clips, work / "clips")
        names = sorted(p.name for p in clips.iterdir())
        if rng.random() < 0.7:  # without embeddings, which all clips must have
            names = [n for n in names if not n.endswith(".npy")]
            for path in (work / "clips").glob("*.npy"):
                path.unlink()
        for name in rng.sample(names, rng.choice((1, 1, 2))):
            other = (clips / rng.choice(names)).read_bytes()
            (work / "clips" / name).write_bytes(mutate((clips / name).read_bytes(), rng, other))
        return lambda: train("vae", work / "out", "--data", str(work / "clips"), "--steps", "1", "--clips", "4")
    name = rng.choice(list(READERS))
    good, bad = run / name, work / name
    other = (run / rng.choice(list(READERS))).read_bytes()
    data = good.read_bytes()
    while (changed := mutate(data, rng, other) if kind == "damaged" else
           with_pickle(data, lambda content: mutate(content, rng, content))) == data:
        pass
    bad.write_bytes(changed)
    for file in run.glob("*.pt"):  # the others as they are, but for what the script is to make
        if file.name not in (name, f"{READERS[name]}.pt", *["latents.pt"] * (READERS[name] == "vae")):
            (work / file.name).symlink_to(file)

    def act():
        if kind == "damaged" and not same(*(vae.load(path, *vae.COMMANDS, "resume") for path in (good, bad))):
            raise AssertionError(f"{name} is read as something else")
        if READERS[name] == "sample":
            flags = ["--vae" if name == "vae.pt" else "--model", str(bad), "--out", str(work / "x.gif")]
            sample.main(["--run", str(work), "--prompt", "red", "--sampling-steps", "1", "--device", "cpu", *flags])
        else:
            train(READERS[name], work, "--steps", "1")
    return act


def fork(act, log):
    if pid := os.fork():
        return pid
    try:
        signal.alarm(SECONDS)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        vae.script(act)
    except SystemExit as stop:
        os._exit(stop.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def verdict(status, told):
    """-> how the case ended; with a `!` in front if that is wrong."""
    lines = told.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if status == -signal.SIGALRM:
        return "! hang"
    if status < 0:
        return f"! {signal.Signals(-status).name}"
    if status == 0:
        return "skipped in part" if "files skipped" in told else "used"
    if status == 2 and len(errors) == 1 and lines[-1] == errors[0]:
        return "refused for its memory" if "memory" in errors[0] else "refused"
    return f"! exit status {status}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=120, help="how long to go on (default: 120)")
    p.add_argument("--seed", type=int, default=0, help="case i follows from it and from i (default: 0)")
    p.add_argument("--only", type=int, help="just this case")
    p.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for what is found (default: runs/fuzz)")
    args = p.parse_args()
    vae.TEST_CLIPS = 8
    ends, peak, running = collections.defaultdict(collections.Counter), 0, {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        assert os.waitpid(fork(lambda: make_corpus(corpus), corpus / "log"), 0)[1] == 0, (corpus / "log").read_text()
        gc.collect()
        gc.freeze()
        end, i = time.monotonic() + args.seconds, args.only or 0
        while (more := time.monotonic() < end if args.only is None else i == args.only) or running:
            if more and len(running) < (os.cpu_count() or 1):
                work, kind = Path(folder) / str(i), ("damaged", "hostile", "folder")[i % 3]
                work.mkdir()
                act = case(kind, corpus, work, random.Random(f"{args.seed} {i}"))
                running[fork(act, work / "log")] = i, kind, work
                i += 1
                continue
            pid, status, usage = os.wait4(-1, 0)
            number, kind, work = running.pop(pid)
            told, peak = (work / "log").read_text(errors="replace"), max(peak, usage.ru_maxrss)
            how = verdict(os.waitstatus_to_exitcode(status), told)
            ends[kind][how] += 1
            if how.startswith("!") or args.only is not None:
                print(f"case {number}, {kind}, {how}: {' / '.join(told.splitlines()[-3:])[-400:]}", flush=True)
                shutil.rmtree(args.keep / f"{args.seed}-{number}", ignore_errors=True)
                shutil.copytree(work, args.keep / f"{args.seed}-{number}", symlinks=True)
            shutil.rmtree(work)
    for kind, counts in ends.items():
        print(f"{kind}: {sum(counts.values())} cases, " + ", ".join(f"{n} {how}" for how, n in counts.most_common()))
    wrong = sum(n for counts in ends.values() for how, n in counts.items() if how.startswith("!"))
    print(f"seed {args.seed}: {wrong} wrong of {sum(sum(c.values()) for c in ends.values())}; "
          f"at most {peak / 2 ** 20:.1f} GB of memory a case")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

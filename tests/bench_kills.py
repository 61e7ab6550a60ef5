"""Kills the training stages with SIGKILL and starts them again with the same command, until they are done.

    python tests/bench_kills.py                   # each stage: at 10 random moments, and before each change to a file
    python tests/bench_kills.py --kills 100 dit   # one stage, more moments

Every step is saved, so that a save is nearly always under way. After each kill all files must be readable, and no
finished step may be lost that a save had reached; at the end all files must be those of a run that was never stopped,
byte for byte (metrics.json but for its seconds). Each run is a process of its own, forked from one that has only
imported the scripts: starting Python and torch takes longer than the runs."""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads would not survive the fork
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch._dynamo  # noqa: E402  (the optimisers import it at their first step, which would take most of a run)

import vae  # noqa: E402
from conftest import MICRO, train  # noqa: E402

OUTPUTS = {"vae": ["vae.pt", "latents.pt"], "dit": ["dit.pt"], "prune": ["masks.pt", "pruned.pt"],
           "distill": ["student.pt", "discriminator.pt"]}


def start(stage, run, steps, die_at=None):
    """Forks a training run that saves every step. die_at: kill itself before that one of its changes to a file.
    -> its process id"""
    if pid := os.fork():
        return pid
    try:
        log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        changes = 0

        def count(event, args):
            nonlocal changes
            if event in ("os.rename", "os.remove") or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
                changes += 1
                if changes == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        vae.script(lambda: train(stage, run, "--save-every", "0", "--steps", str(steps)))
    except SystemExit as stop:
        os._exit(stop.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def wait(pid):
    """-> the exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fresh(base, folder, stage):
    """A folder with what the stages before this one have made."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for earlier in list(MICRO)[:list(MICRO).index(stage)]:
        for name in OUTPUTS[earlier]:
            os.link(base / name, folder / name)
    return folder


def steps_saved(run):
    """Loads every file of the run, which must all be readable. -> the steps that its resume files hold."""
    if (run / "metrics.json").exists():
        json.loads((run / "metrics.json").read_text())
    for path in run.glob("*.pt"):
        vae.load(path, *vae.COMMANDS)
    return {path.name: vae.load(path, "resume")["step"] for path in run.glob("*.resume")}


def same(stage, run, whole):
    """Whether a run that is done has all the files of an unbroken one, and nothing left over."""
    def seen(folder):
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "metrics.json"}
        metrics = json.loads((folder / "metrics.json").read_text())[stage]
        return files, {k: v for k, v in metrics.items() if k != "seconds"}
    return seen(run) == seen(whole)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stages", nargs="*", default=list(MICRO), help="default: all four")
    p.add_argument("--kills", type=int, default=10, help="random moments a stage (default: 10)")
    p.add_argument("--steps", type=int, default=40, help="training steps of the runs killed at random (default: 40)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = p.parse_args()
    vae.TEST_CLIPS = 8  # measuring the autoencoder on 512 would take longer than training it
    moments, lost = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        base, whole, run = (Path(folder) / name for name in ("base", "whole", "run"))
        base.mkdir()
        for stage in MICRO:
            assert wait(start(stage, base, 2)) == 0, base.with_suffix(".log").read_text()
        for stage in args.stages:
            begin = time.monotonic()
            assert wait(start(stage, fresh(base, whole, stage), args.steps)) == 0
            seconds = time.monotonic() - begin

            kills = survived = while_saving = 0
            while kills < args.kills:  # as many runs as it takes: some end before their kill
                fresh(base, run, stage)
                here, before, good = 0, {}, True
                while good:
                    pid = start(stage, run, args.steps)
                    if kills < args.kills:
                        time.sleep(moments.uniform(0, 2 * seconds / args.kills))
                        os.kill(pid, signal.SIGKILL)
                    status = wait(pid)
                    if status != -signal.SIGKILL:
                        good = status == 0 and same(stage, run, whole)
                        break
                    kills, here, while_saving = kills + 1, here + 1, while_saving + any(run.glob("*.tmp"))
                    now = steps_saved(run)
                    good, before = all(now.get(name, args.steps) >= step for name, step in before.items()), now
                survived += here * good

            assert wait(start(stage, fresh(base, whole, stage), 2)) == 0
            points = points_survived = 0
            while True:
                status = wait(start(stage, fresh(base, run, stage), 2, die_at=points + 1))
                if status == 0:
                    break
                points += 1
                steps_saved(run)
                points_survived += wait(start(stage, run, 2)) == 0 and same(stage, run, whole)
            print(f"{stage}: survived {survived} of {kills} kills at random moments ({while_saving} of them left a "
                  f"half-written file) and {points_survived} of {points} before each change to a file, "
                  f"{time.monotonic() - begin:.0f} s", flush=True)
            lost += kills - survived + points - points_survived
    sys.exit(lost > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

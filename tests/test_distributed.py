"""Many processes compute what one computes: gloo on a CPU stands for NCCL on GPUs."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import MICRO, train

ROOT = Path(__file__).parent.parent
OUTPUT = {"vae": "vae.pt", "dit": "dit.pt", "prune": "pruned.pt", "distill": "student.pt"}


def torchrun(processes, stage, run, *more):
    flags = [*MICRO[stage][1].split(), "--run", run, "--device", "cpu", "--dtype", "float32", *more]
    return launch(processes, ROOT / f"{stage}.py", *flags)


def launch(processes, *command):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--",
         *command],
        cwd=ROOT, text=True, capture_output=True, timeout=60,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))


@pytest.mark.parametrize("stage, processes", [("vae", 3), ("dit", 2), ("prune", 2), ("distill", 2)])
def test_processes_that_share_a_batch_train_the_same_model_as_one(micro_run, tmp_path, stage, processes):
    """3 processes share a batch of 4 unevenly; the float32 sums differ in their order only."""
    runs = tmp_path / "one", tmp_path / "many"
    for run in runs:
        run.mkdir()
        for file in micro_run.glob("*.pt"):
            if file.name not in (OUTPUT[stage], "masks.pt", "latents.pt" if stage == "vae" else ""):
                os.link(file, run / file.name)
    train(stage, runs[0], "--dtype", "float32")
    done = torchrun(processes, stage, runs[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("; next: ") == 1  # one process talks, and writes
    one, many = (torch.load(run / OUTPUT[stage], weights_only=True) for run in runs)
    for name, weight in one["model"].items():
        torch.testing.assert_close(many["model"][name], weight, rtol=1e-2, atol=1e-3)
    for name, values in one["history"].items():
        if name != "psnr_db":  # a logarithm, whose mean over shares is another number
            torch.testing.assert_close(torch.tensor(many["history"][name]), torch.tensor(values), rtol=1e-3, atol=1e-3)
    if stage == "vae":
        one, many = (torch.load(run / "latents.pt", weights_only=True) for run in runs)
        torch.testing.assert_close(many["latents"], one["latents"], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(many["std"], one["std"], rtol=1e-3, atol=1e-3)


def test_a_run_of_two_processes_is_resumed_by_one(micro_run, tmp_path):
    os.link(micro_run / "latents.pt", tmp_path / "latents.pt")
    (tmp_path / "stop.py").write_text(
        "import os, signal, sys\nimport dit, vae\nlog = vae.Loop.log\n"
        "def stop_at_the_third(self, **values):\n"
        "    log(self, **values)\n"
        "    if self.step == 2 and vae.RANK == 1:\n"  # told on one process, all must agree
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "vae.Loop.log = stop_at_the_third\ndit.main()\n")
    flags = [*MICRO["dit"][1].split(), "--run", str(tmp_path), "--device", "cpu", "--dtype", "float32"]
    stopped = launch(2, tmp_path / "stop.py", *flags)
    assert "stopped at step 4 of 6" in stopped.stderr and not (tmp_path / "dit.pt").exists()
    train("dit", tmp_path, "--dtype", "float32")
    resumed, whole = (torch.load(run / "dit.pt", weights_only=True) for run in (tmp_path, micro_run))
    torch.testing.assert_close(resumed["history"]["loss"], whole["history"]["loss"], rtol=1e-2, atol=1e-2)


def test_a_batch_smaller_than_the_processes_is_refused_in_one_line(micro_run, tmp_path):
    os.link(micro_run / "latents.pt", tmp_path / "latents.pt")
    refused = torchrun(2, "dit", tmp_path, "--batch-size", "1")
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "a clip each is the least" in errors[0]

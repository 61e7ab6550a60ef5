"""Many processes compute what one computes: gloo on a CPU stands for NCCL on GPUs."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MICRO, train

import vae

ROOT = Path(__file__).parent.parent
FLAGS = ["--device", "cpu", "--dtype", "float32"]
OUTPUT = {"vae": "vae.pt", "dit": "dit.pt", "prune": "pruned.pt", "distill": "student.pt"}


def torchrun(processes, folder, runs, *more, before=""):
    """Stages in several processes, one after the other; runs: {stage: its folder}; more: flags.
    before: Python that runs first in each process."""
    calls = ""
    for stage, run in runs.items():
        flags = [*MICRO[stage][1].split(), "--run", str(run), *FLAGS, *more]
        calls += f"common.run_script(lambda: {stage}.main({flags}))\n"
    script = folder / "stages.py"
    script.write_text("import common, vae, dit, prune, distill\n"
                      f"vae.TEST_CLIPS = {vae.TEST_CLIPS}\n{before}\n{calls}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc_per_node={processes}", script], cwd=ROOT, text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, timeout=120)


def folder_with_inputs(micro_run, run, stage):
    run.mkdir()
    made = {OUTPUT[stage], "masks.pt", "discriminator.pt"}
    if stage == "vae":
        made.add("latents.pt")
    for file in micro_run.glob("*.pt"):
        if file.name not in made:
            os.link(file, run / file.name)
    return run


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def many(micro_run, tmp_path_factory):
    """-> {stage: its folder}, trained by three processes, which share a batch of 4 or 8
    unevenly."""
    folder = tmp_path_factory.mktemp("many")
    runs = {stage: folder_with_inputs(micro_run, folder / stage, stage) for stage in MICRO}
    done = torchrun(3, folder, runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("; next: ") == len(runs)  # one process talks, and writes
    return runs


@pytest.mark.parametrize("stage", MICRO)
def test_processes_that_share_a_batch_train_the_same_model_as_one(micro_run, many, tmp_path, stage):
    """The float32 sums differ in their order only."""
    run = folder_with_inputs(micro_run, tmp_path / "one", stage)
    train(stage, run, *FLAGS)
    one = load(run / OUTPUT[stage])
    other = load(many[stage] / OUTPUT[stage])
    for name, weight in one["model"].items():
        torch.testing.assert_close(other["model"][name], weight, rtol=1e-2, atol=1e-3)
    for name, values in one["history"].items():
        if name != "psnr_db":  # a logarithm, whose mean over shares is another number
            torch.testing.assert_close(other["history"][name], values, rtol=1e-3, atol=1e-3)
    if stage == "vae":
        one = load(run / "latents.pt")
        other = load(many[stage] / "latents.pt")
        torch.testing.assert_close(other["latents"], one["latents"], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(other["std"], one["std"], rtol=1e-3, atol=1e-3)


SIGTERM_ON_ONE = """
import os, signal
log = common.Loop.log
def stop_at_the_third(self, **values):
    log(self, **values)
    if self.step == 2 and common.RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
common.Loop.log = stop_at_the_third
"""


def test_a_run_of_two_processes_stops_as_one_and_is_resumed_by_one(micro_run, tmp_path):
    """The signal reaches one process; all of them agree to stop after the same step."""
    os.link(micro_run / "latents.pt", tmp_path / "latents.pt")
    stopped = torchrun(2, tmp_path, {"dit": tmp_path}, "--save-every", "0",
                       before=SIGTERM_ON_ONE)
    assert "stopped at step 3 of 6" in stopped.stderr
    assert not (tmp_path / "dit.pt").exists()
    train("dit", tmp_path, *FLAGS)
    resumed = load(tmp_path / "dit.pt")["history"]["loss"]
    whole = load(micro_run / "dit.pt")["history"]["loss"]
    torch.testing.assert_close(resumed, whole, rtol=1e-2, atol=1e-2)

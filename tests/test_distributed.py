"""Processes that share a batch: gloo on a CPU stands for NCCL on GPUs."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MAKES, MICRO, folder_before, train

import distill
import dit
import prune
from common import cli, data, training

ROOT = Path(__file__).parent.parent
FLAGS = ["--device", "cpu", "--dtype", "float32"]


def torchrun(processes, folder, runs, *more, before=""):
    """Stages in several processes, one after the other; runs: {stage: its folder}; more: flags.
    before: Python that runs first in each process."""
    calls = ""
    for stage, run in runs.items():
        flags = [*MICRO[stage][1].split(), "--run", str(run), *FLAGS, *more]
        calls += f"cli.run_script(lambda: {stage}.main({flags}))\n"
    script = folder / "stages.py"
    script.write_text("import vae, dit, prune, distill\nfrom common import cli, data, training\n"
                      f"data.TEST_CLIPS = {data.TEST_CLIPS}\n{before}\n{calls}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc_per_node={processes}", script], cwd=ROOT, text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, timeout=120)


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def many(micro_run, tmp_path_factory):
    """-> {stage: its folder}, trained by two processes."""
    folder = tmp_path_factory.mktemp("many")
    runs = {stage: folder_before(stage, micro_run, folder / stage) for stage in MICRO}
    done = torchrun(2, folder, runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("; next: ") == len(runs)  # one process prints, and writes
    return runs


def drawn_by_both(draw):
    """What two processes draw for a step, in one batch."""
    def draw_all(*arguments):
        parts = []
        for cli.RANK in range(2):
            parts.append(draw(*arguments))
        cli.RANK = 0
        return [torch.cat(tensors) for tensors in zip(*parts)]

    return draw_all


@pytest.mark.parametrize("stage", MICRO)
def test_two_processes_compute_the_update_of_what_both_of_them_draw(micro_run, many, tmp_path,
                                                                    stage, monkeypatch):
    """The float32 sums differ in their order alone."""
    monkeypatch.setattr(training, "local_batch_size", lambda args: args.batch_size // 2)
    for module in dit, prune, distill:
        monkeypatch.setattr(module, "draw_batch", drawn_by_both(module.draw_batch))
    if stage == "vae":
        loop = training.Loop
        monkeypatch.setattr(
            training, "Loop", lambda name, args, settings, steps, device, draw, **state: loop(
                name, args, settings, steps, device, drawn_by_both(draw), **state))
    run = folder_before(stage, micro_run, tmp_path / "one")
    train(stage, run, *FLAGS)
    one = load(run / MAKES[stage][0])
    other = load(many[stage] / MAKES[stage][0])
    for name, weight in one["model"].items():
        torch.testing.assert_close(other["model"][name], weight, rtol=1e-2, atol=1e-3)
    for name, values in one["history"].items():
        if name != "grad_norm":
            torch.testing.assert_close(other["history"][name], values, rtol=1e-3, atol=1e-3)


SIGTERM_ON_ONE = """
import os, signal
log = training.Loop.log
def stop_at_the_third(self, **values):
    log(self, **values)
    if self.step == 2 and cli.RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
training.Loop.log = stop_at_the_third
"""


def test_a_run_of_two_processes_stops_as_one_and_is_resumed_by_one(micro_run, tmp_path):
    """The signal reaches one process; all of them agree to stop after the same step."""
    os.link(micro_run / "latents.pt", tmp_path / "latents.pt")
    stopped = torchrun(2, tmp_path, {"dit": tmp_path}, "--save-every", "0",
                       before=SIGTERM_ON_ONE)
    assert "stopped at step 3 of 6" in stopped.stderr
    assert not (tmp_path / "dit.pt").exists()
    train("dit", tmp_path, *FLAGS)
    assert len(load(tmp_path / "dit.pt")["history"]["loss"]) == 6

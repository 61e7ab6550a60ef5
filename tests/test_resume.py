"""What the machine may do to a run: kills, signals, a full disk, numbers that explode. The same
command, started again, must end in the bits of a run that nothing happened to."""
import os
import resource
import signal
import sys

import pytest
import torch
from conftest import MAKES, MICRO, folder_before, train
from common import cli, files, training


def is_same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_unharmed(stage, run, micro_run):
    for name in MAKES[stage]:
        made, unbroken = (torch.load(folder / name) for folder in (run, micro_run))
        assert is_same(made, unbroken), name
    assert not [*run.glob("*.resume"), *run.glob("*.tmp"), *run.glob("*.part")]


def status_of(stage, run):
    """The exit status of a run that saves every step."""
    with pytest.raises(SystemExit) as stop:
        cli.run_script(lambda: train(stage, run, "--save-every", "0"))
    return stop.value.code


def steps_saved(run):
    return [files.load(path, "resume")["step"] for path in run.glob("*.resume")]


def at_step(monkeypatch, step, act):
    """Calls `act` when a Loop has logged this step."""
    log = training.Loop.log

    def log_and_act(self, **values):
        log(self, **values)
        if self.step == step:
            act()

    monkeypatch.setattr(training.Loop, "log", log_and_act)


def fork(stage, run, die_at):
    """Starts a run, in a process of its own, that saves every step and is killed just before this
    one of its changes to a file. -> its exit status"""
    pid = os.fork()
    if not pid:
        changes = []

        def count(event, arguments):
            is_written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if is_written or event in ("os.rename", "os.remove"):
                changes.append(event)
                if len(changes) == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            train(stage, run, "--save-every", "0")
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("stage", MICRO)
def test_kills_at_any_moment_change_nothing_in_the_end(micro_run, tmp_path, stage):
    """Each start lives for a save or two longer: kills fall between steps and between results,
    before a file is opened, renamed or removed."""
    folder_before(stage, micro_run, tmp_path)
    kills = 0
    while fork(stage, tmp_path, die_at=4 + 4 * kills) == -signal.SIGKILL:
        kills += 1
        for path in [*tmp_path.glob("*.pt"), *tmp_path.glob("*.resume")]:
            torch.load(path)  # none is half-written
    assert kills >= 2
    assert_unharmed(stage, tmp_path, micro_run)


@pytest.mark.parametrize("stage", MICRO)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_once(micro_run, tmp_path, monkeypatch, capsys, stage, number):
    folder_before(stage, micro_run, tmp_path)
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        train(stage, tmp_path)  # which would not have saved for a minute
    assert stop.value.code == 128 + number
    assert steps_saved(tmp_path) == [3]
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    train(stage, tmp_path)
    assert_unharmed(stage, tmp_path, micro_run)


def test_ctrl_c_outside_the_training_is_a_sentence_too(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run_script(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert stop.value.code == 130
    assert capsys.readouterr().err.startswith("stopped: ")


@pytest.mark.parametrize("room", [0, 100, 5000, 100_000])
def test_a_full_disk_harms_no_save(micro_run, tmp_path, monkeypatch, capsys, room):
    """A limit on the size of files is a disk that is full after so many bytes."""
    folder_before("dit", micro_run, tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1])))
    try:
        assert status_of("dit", tmp_path) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "error: cannot write" in capsys.readouterr().err
    assert steps_saved(tmp_path) == [3] and not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    train("dit", tmp_path)
    assert_unharmed("dit", tmp_path, micro_run)


def test_damaged_metrics_take_no_result_away(micro_run, tmp_path, capsys):
    folder_before("dit", micro_run, tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    assert status_of("dit", tmp_path) == 2
    assert "metrics.json" in capsys.readouterr().err
    (tmp_path / "metrics.json").unlink()
    train("dit", tmp_path)
    assert_unharmed("dit", tmp_path, micro_run)
    assert "dit" in files.read_metrics(tmp_path)


@pytest.mark.parametrize("stage", MICRO)
def test_what_is_not_finite_is_never_saved(micro_run, tmp_path, monkeypatch, capsys, stage):
    """In the third step the gradients of the model, of distill.py's student, are NaN."""
    folder_before(stage, micro_run, tmp_path)
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def spoil(parameters, most):
        parameters = list(parameters)
        calls.append(True)
        if len(calls) == (6 if stage == "distill" else 3):
            for p in parameters:
                p.grad = torch.full_like(p, torch.nan)
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    assert status_of(stage, tmp_path) == 2
    assert "not finite" in capsys.readouterr().err
    assert steps_saved(tmp_path) == [2]
    assert not [name for name in MAKES[stage] if (tmp_path / name).exists()]
    monkeypatch.undo()
    train(stage, tmp_path)
    assert_unharmed(stage, tmp_path, micro_run)

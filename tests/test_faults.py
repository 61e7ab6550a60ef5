"""What the machine may do to a run: kills, a full disk, files that vanish, numbers that explode, a second run."""
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dit
import export_coreml
import sample
import vae
from conftest import MICRO, train

ROOT = Path(__file__).parent.parent


@pytest.fixture
def half_run(micro_run, tmp_path):
    """A folder with what the DiT is trained from."""
    for name in "vae.pt", "latents.pt":
        shutil.copy(micro_run / name, tmp_path / name)
    return tmp_path


def at_step(monkeypatch, step, act):
    """Calls `act` when a Loop has logged this step."""
    log = vae.Loop.log

    def log_and_act(self, **values):
        log(self, **values)
        if self.step == step:
            act()

    monkeypatch.setattr(vae.Loop, "log", log_and_act)


def status_of(function, *arguments):
    with pytest.raises(SystemExit) as stop:
        vae.script(lambda: function(*arguments))
    return stop.value.code


def test_kills_at_any_moment_change_nothing_in_the_end():
    bench = subprocess.run([sys.executable, ROOT / "tests/bench_kills.py", "--kills", "3", "dit"], text=True,
                           capture_output=True)
    assert bench.returncode == 0 and "survived 3 of 3" in bench.stdout, bench.stdout + bench.stderr


def test_a_second_run_is_refused_while_the_first_lives_and_ctrl_c_saves(tmp_path, capsys):
    flags = [*MICRO["vae"][1].split(), "--steps", "100000", "--run", str(tmp_path), "--save-every", "0"]
    first = subprocess.Popen([sys.executable, ROOT / "vae.py", *flags], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    while not (tmp_path / "vae.vae.resume").exists() and first.poll() is None:
        time.sleep(0.05)
    assert status_of(vae.main, flags) == 2 and "another run is at work" in capsys.readouterr().err
    first.send_signal(signal.SIGINT)
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 130 and "the same command goes on" in error and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"vae.vae.resume"}  # no lock is left either


HOLD = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"


@pytest.mark.parametrize("stage", MICRO)
def test_the_lock_of_a_killed_run_is_gone_and_only_the_first_process_of_a_torchrun_takes_one(
        stage, micro_run, tmp_path, capsys, monkeypatch):
    for name in "vae.pt", "latents.pt", "dit.pt", "masks.pt", "pruned.pt", "student.pt", "discriminator.pt":
        shutil.copy(micro_run / name, tmp_path / name)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert status_of(train, stage, tmp_path) == 2 and "another run is at work" in capsys.readouterr().err
    with monkeypatch.context() as m:
        m.setenv("RANK", "1")
        assert status_of(train, stage, tmp_path) == 0  # it looks on: done
    holder.kill()
    holder.wait()
    assert status_of(train, stage, tmp_path) == 0 and "is done" in capsys.readouterr().out


def test_all_that_differs_is_said_but_nothing_of_levels_that_are_not_cut(micro_run, tmp_path, capsys):
    for name in "latents.pt", "dit.pt":
        shutil.copy(micro_run / name, tmp_path / name)
    train("prune", tmp_path, "--levels", "heads")
    assert status_of(train, "prune", tmp_path, "--levels", "ffn", "--ffn", "32", "--lr", "0.5") == 2
    error = capsys.readouterr().err
    assert "heads = 2, not all; ffn = all, not 32; levels = heads, not ffn; lr = " in error and "blocks = " not in error
    assert f"delete {tmp_path / 'pruned.pt'} and {tmp_path / 'masks.pt'}" in error
    assert status_of(train, "prune", tmp_path, "--levels", "heads", "--ffn", "32") == 0  # nothing that it would change


def test_masks_of_other_settings_are_not_overwritten_by_a_run_with_another_out(micro_run, tmp_path, capsys):
    for name in "latents.pt", "dit.pt", "masks.pt":
        shutil.copy(micro_run / name, tmp_path / name)
    other = ["--out", str(tmp_path / "other.pt"), "--criterion", "random"]
    assert status_of(train, "prune", tmp_path, *other) == 2
    error = capsys.readouterr().err
    assert "masks.pt was made with criterion = learned, not random" in error and error.count("\n") == 1
    assert (tmp_path / "masks.pt").read_bytes() == (micro_run / "masks.pt").read_bytes()
    train("prune", tmp_path, *other, "--masks", str(tmp_path / "other-masks.pt"))
    assert {"other.pt", "other-masks.pt", "other-masks.svg"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("room", [0, 100, 5000, 100_000])
def test_a_full_disk_is_said_and_the_last_save_goes_on(half_run, micro_run, room, monkeypatch, capsys):
    """A limit on the size of files is a disk that is full after so many bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1])))
    try:
        assert status_of(train, "dit", half_run, "--save-every", "0") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write") and "File too large" in error and error.count("\n") == 1
    assert vae.load(half_run / "dit.dit.resume", "resume")["step"] == 3 and not list(half_run.glob("*.tmp"))
    monkeypatch.undo()
    train("dit", half_run)
    assert (half_run / "dit.pt").read_bytes() == (micro_run / "dit.pt").read_bytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for error in OSError("No space left on device"), KeyboardInterrupt():
        def breaks(f, error=error):
            f.write(b"half")
            raise error
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            vae.write_aside(path, breaks)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_files_removed_meanwhile_take_nothing_away(half_run, micro_run, monkeypatch):
    at_step(monkeypatch, 3, lambda: shutil.rmtree(half_run))
    train("dit", half_run, "--save-every", "0")
    assert (half_run / "dit.pt").read_bytes() == (micro_run / "dit.pt").read_bytes()


def interrupt(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


@pytest.mark.parametrize("where", ["rendering", "measuring", "reading", "sampling", "drawing", "exporting"])
def test_ctrl_c_outside_the_training_is_a_sentence_too(where, micro_run, tmp_path, monkeypatch, capsys):
    patch = {"rendering": (vae.Shapes, "__init__"), "measuring": (vae, "psnr"), "reading": (dit.Latents, "__init__"),
             "sampling": (sample.Model, "sample"), "drawing": (sample, "cell"), "exporting": (export_coreml, "convert")}
    monkeypatch.setattr(*patch[where], interrupt)
    prompt = ["--run", str(micro_run), "--prompt", "red", "--out", str(tmp_path / "x.gif")]
    function, arguments = {
        "rendering": (train, ["vae", tmp_path]), "measuring": (train, ["vae", tmp_path]),
        "reading": (train, ["dit", micro_run]), "sampling": (sample.main, [prompt]),
        "drawing": (sample.main, [prompt]),
        "exporting": (export_coreml.main, [["--run", str(micro_run), "--out", str(tmp_path / "coreml")]])}[where]
    assert status_of(function, *arguments) == 130
    assert capsys.readouterr().err.strip().startswith("stopped: ")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".resume"]


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, capsys):
    assert status_of(train, "vae", tmp_path, "--lr", "1e9", "--save-every", "0") == 2
    error = capsys.readouterr().err
    assert "at step 1: no earlier save is left" in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_the_save_that_a_diverged_run_names_is_good(what, half_run, micro_run, monkeypatch, capsys):
    """The fourth step spoils the weights: infinite ones are not saved, huge ones show in the next loss."""
    step, log, calls = vae.Optimizer.step, vae.Loop.log, []

    def spoil(self, loss):
        step(self, loss)
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                for p in self.parameters:
                    p.fill_(1e30 if what == "loss" else float("inf"))

    def save_but_after_the_fourth(self, **values):
        log(self, **values)
        self.args.save_every = 1e9 if what == "loss" and self.step == 3 else 0

    monkeypatch.setattr(vae.Optimizer, "step", spoil)
    monkeypatch.setattr(vae.Loop, "log", save_but_after_the_fourth)
    assert status_of(train, "dit", half_run) == 2
    error = capsys.readouterr().err
    assert "at step 4: the last good save is" in error and "dit.dit.resume, of step 3;" in error
    monkeypatch.undo()
    train("dit", half_run)  # goes on from that save, and nothing spoils it this time
    assert (half_run / "dit.pt").read_bytes() == (micro_run / "dit.pt").read_bytes()


def test_the_same_seed_gives_the_same_files(micro_run, tmp_path):
    for stage in MICRO:
        train(stage, tmp_path)
    for suffix in ".gif", ".png":  # an mp4 shows the same, but FFmpeg may write it in other bytes
        for run in micro_run, tmp_path:
            sample.main(["--run", str(run), "--prompt", "red circle", "--out", str(tmp_path / f"{run.name}{suffix}")])
        one, two = ((tmp_path / f"{run.name}{suffix}").read_bytes() for run in (micro_run, tmp_path))
        assert one == two
    for path in micro_run.glob("*.pt"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_another_seed_gives_other_files(micro_run, half_run):
    train("dit", half_run, "--seed", "1")
    assert (half_run / "dit.pt").read_bytes() != (micro_run / "dit.pt").read_bytes()

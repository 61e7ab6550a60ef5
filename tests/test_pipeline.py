"""The scripts as a person uses them: command lines, files, resuming, errors, the Core ML packages."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import export_coreml
import sample
import vae
from conftest import MICRO, train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def scored_run(micro_run):
    sample.main(["--run", str(micro_run), "--score", "--clips", "4", "--steps", "2", "--device", "cpu"])
    export_coreml.main(["--run", str(micro_run)])
    sample.main(["--run", str(micro_run), "--report", "--steps", "2", "--device", "cpu"])
    return micro_run


def test_the_chain_leaves_every_file_and_figure_that_the_design_names(scored_run):
    metrics = json.loads((scored_run / "metrics.json").read_text())
    assert {"psnr_db", "params", "compression", "latent_channels", "seconds"} <= set(metrics["vae"])
    assert {"params", "seconds", "blocks", "heads", "ffn", "dense_vs_masked_max_abs"} <= set(metrics["prune"])
    assert metrics["prune"]["dense_vs_masked_max_abs"] < 1e-4
    assert (metrics["prune"]["blocks"], metrics["prune"]["heads"], metrics["prune"]["ffn"]) == (2, 2, 48)
    assert set(metrics["score"]) == {"dit", "pruned", "student"}
    for scores in metrics["score"].values():
        assert {"text_alignment", "color", "shape", "direction", "held_out_alignment", "subject_consistency",
                "motion_smoothness", "dynamic_degree", "frechet", "evaluations", "seconds_per_clip"} <= set(scores)
    for package in metrics["export"].values():
        assert {"bytes", "ops", "max_rank", "precision", "parity_max_abs"} <= set(package)
    for name in "compare.gif", "compare.png", "report.html", "coreml/manifest.json":
        assert (scored_run / name).stat().st_size > 100
    assert not list(scored_run.glob("*.resume")) and not list(scored_run.glob("*.tmp"))


@pytest.mark.parametrize("name", ["vae", "latents", "dit", "masks", "pruned", "student"])
def test_every_checkpoint_is_plain_data(micro_run, name):
    checkpoint = torch.load(micro_run / f"{name}.pt", weights_only=True)
    assert {"stage", "config", "settings", "metrics"} <= set(checkpoint)


def test_a_second_call_says_that_it_is_done_and_changes_nothing(micro_run, capsys):
    before = (micro_run / "dit.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train("dit", micro_run)
    assert stop.value.code == 0 and "is done" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        train("dit", micro_run, "--lr", "0.5")
    assert stop.value.code == 2 and "lr" in capsys.readouterr().err
    assert (micro_run / "dit.pt").read_bytes() == before


OUTPUT = {"vae": "vae.pt", "dit": "dit.pt", "prune": "pruned.pt", "distill": "student.pt"}


@pytest.mark.parametrize("stage", MICRO)
def test_a_stopped_run_ends_bit_for_bit_like_one_that_never_stopped(micro_run, tmp_path, stage, monkeypatch):
    for file in micro_run.glob("*.pt"):
        if file.name not in (OUTPUT[stage], "latents.pt" if stage == "vae" else ""):
            os.link(file, tmp_path / file.name)
    (tmp_path / "masks.pt").unlink(missing_ok=True)
    log, calls = vae.Loop.log, []

    def stop_at_the_third(self, **values):
        log(self, **values)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(vae.Loop, "log", stop_at_the_third)
    with pytest.raises(SystemExit) as stop:
        train(stage, tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM and not (tmp_path / OUTPUT[stage]).exists()
    train(stage, tmp_path)
    ours, theirs = (torch.load(run / OUTPUT[stage], weights_only=True) for run in (tmp_path, micro_run))
    assert ours["history"] == theirs["history"]
    assert all(torch.equal(v, theirs["model"][k]) for k, v in ours["model"].items())


def script(name, *arguments, cwd=ROOT):
    return subprocess.run([sys.executable, ROOT / f"{name}.py", *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True)


@pytest.mark.parametrize("name", ["vae", "dit", "prune", "distill", "sample", "export_coreml"])
def test_help_explains_every_flag(name):
    text = script(name, "--help").stdout
    assert "--preset" in text and "--run" in text and "default" in text and "None" not in text


def test_ctrl_c_saves_and_leaves_with_a_sentence(tmp_path):
    command = [sys.executable, ROOT / "vae.py", *MICRO["vae"][1].split(), "--steps", "100000", "--run", tmp_path]
    process = subprocess.Popen([str(c) for c in command], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command goes on" in error and "Traceback" not in error
    assert (tmp_path / "vae.vae.resume").exists()


BAD = [  # what a person may type, and a word of the answer
    ("vae", "--size 16x32x32", "17"), ("vae", "--size 9x30x32", "32"), ("vae", "--size 9", "9x32x32"),
    ("vae", "--ratio 4x8x16 --size 9x32x32", "ratio"), ("vae", "--data nowhere", "nowhere"),
    ("vae", "--steps 0", "above 0"), ("vae", "--device warp", "warp"), ("vae", "--speed 3", "--speed"),
    ("dit", "--run {empty}", "vae.py"), ("prune", "--run {empty}", "dit.py"), ("distill", "--run {empty}", "dit.py"),
    ("sample", "--run {empty} --prompt red", "distill.py"), ("export_coreml", "--run {empty}", "distill.py"),
    ("dit", "--run {run} --latents {run}/vae.pt --out {empty}/x.pt", "latents is needed"),
    ("prune", "--run {run} --blocks 9 --out {empty}/x.pt", "keep 1 to 3"),
    ("prune", "--run {run} --levels layers --out {empty}/x.pt", "layers"),
    ("distill", "--run {run} --frozen-blocks 7 --out {empty}/x.pt", "frozen"),
    ("sample", "--run {run}", "--prompt"), ("sample", "--run {run} --prompt ...", "without a word"),
    ("sample", "--run {run} --prompt red --out red.avi", ".mp4"),
    ("sample", "--run {run} --prompts {empty}/none.txt", "none.txt"),
    ("export_coreml", "--run {run} --model {run}/dit.pt", "student is needed"),
    ("sample", "--model {broken} --prompt red", "not a readable checkpoint"),
    ("sample", "--model {evil} --prompt red", "not a readable checkpoint"),
]


@pytest.mark.parametrize("name, flags, word", BAD, ids=[f"{n} {f}" for n, f, _ in BAD])
def test_bad_input_gets_one_line_and_status_2(micro_run, tmp_path, name, flags, word, capsys):
    import importlib
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.pt").write_bytes((micro_run / "student.pt").read_bytes()[:5000])

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    torch.save({"stage": Evil()}, tmp_path / "evil.pt")
    words = flags.format(run=micro_run, empty=tmp_path / "empty", broken=tmp_path / "broken.pt",
                         evil=tmp_path / "evil.pt").split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main([*words, *(["--run", str(tmp_path)] if "--run" not in words else [])])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and "\n" not in error and word in error
    assert not (tmp_path / "was run").exists() and not list(tmp_path.glob("**/x.pt"))


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train("vae", tmp_path, "--lr", "1e30")
    assert stop.value.code == 2 and "step" in capsys.readouterr().err and not (tmp_path / "vae.pt").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(SystemExit):
        def breaks(f):
            f.write(b"half")
            raise OSError("No space left on device")
        vae.write_aside(path, breaks)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_embeddings_of_your_own_replace_the_text_encoder(micro_run, tmp_path, capsys):
    for name in "one", "two":
        frames = np.random.default_rng(len(name)).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
        (tmp_path / "clips").mkdir(exist_ok=True)
        sample.iio.imwrite(tmp_path / f"clips/{name}.mp4", frames, plugin="pyav", codec="libx264", fps=20)
        (tmp_path / f"clips/{name}.txt").write_text(f"clip {name}")
        np.save(tmp_path / f"clips/{name}.npy", np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    run = tmp_path / "run"
    train("vae", run, "--data", str(tmp_path / "clips"))
    for stage in "dit", "prune", "distill":
        train(stage, run)
    sample.main(["--run", str(run), "--prompt", "clip one", "--out", str(tmp_path / "one.gif"), "--device", "cpu"])
    sample.main(["--run", str(run), "--score", "--clips", "2", "--steps", "2", "--device", "cpu"])
    assert (tmp_path / "one.gif").exists()
    for clips, told in (tmp_path / "clips", False), (tmp_path / "moved", True):  # the report reads the clips again
        sample.main(["--run", str(run), "--report", "--steps", "2", "--device", "cpu"])
        page = (run / "report.html").read_text()
        assert "&nbsp;clip one" in page and ("Left out: the input" in page) == told
        clips.exists() and clips.rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as stop:
        sample.main(["--run", str(run), "--prompt", "clip three", "--device", "cpu"])
    assert stop.value.code == 2 and "clip three" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_files(micro_run, tmp_path):
    train("vae", tmp_path)
    a, b = (torch.load(run / "latents.pt", weights_only=True)["latents"] for run in (tmp_path, micro_run))
    digest = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in (a, b)]
    assert digest[0] == digest[1]

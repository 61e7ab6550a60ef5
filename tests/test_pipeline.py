"""The scripts as a person uses them: command lines, files, resuming, the Core ML packages."""
import json
import os
import re
import signal
import subprocess
import sys
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
    sample.main(["--run", str(micro_run), "--score", "4", "--sampling-steps", "2", "--device", "cpu"])
    export_coreml.main(["--run", str(micro_run)])
    sample.main(["--run", str(micro_run), "--report", "--sampling-steps", "2", "--device", "cpu"])
    return micro_run


def test_the_readmes_example_of_parts_in_other_code_computes_what_it_says():
    torch.manual_seed(0)
    own, (code,) = {}, re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    exec(code, own)
    x, t, dense, whole = own["noise"], own["t"], own["small"], own["dit"]
    masked = whole(x, t, whole.text_encoder(own["tokens"]), own["masks"])
    torch.testing.assert_close(dense(x, t, dense.text_encoder(own["tokens"])), masked)
    assert masked.abs().max() > 1e-3 and vae.count(dense) < 0.8 * vae.count(whole)
    parser, learned = own["discriminator"].parser, own["discriminator"].blocks
    assert all(p.grad is None for p in parser.parameters()) and all(p.grad is not None for p in learned.parameters())


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
    assert metrics["data"]["clips"] == 6 and 0 < metrics["data"]["frechet"] < metrics["score"]["dit"]["frechet"]
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
    sample.main(["--run", str(run), "--score", "2", "--sampling-steps", "2", "--device", "cpu"])
    assert (tmp_path / "one.gif").exists()
    for clips, told in (tmp_path / "clips", False), (tmp_path / "moved", True):  # the report reads the clips again
        sample.main(["--run", str(run), "--report", "--sampling-steps", "2", "--device", "cpu"])
        page = (run / "report.html").read_text()
        assert "&nbsp;clip one" in page and ("Left out: the input" in page) == told
        clips.exists() and clips.rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as stop:
        sample.main(["--run", str(run), "--prompt", "clip three", "--device", "cpu"])
    assert stop.value.code == 2 and "clip three" in capsys.readouterr().err

"""The scripts as a person uses them: command lines, files, your own clips and embeddings."""
import importlib
import json
import math
import re
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from conftest import MICRO, evaluate, train

import prune
from common import training

ROOT = Path(__file__).parent.parent
SCORES = {"text_alignment", "color", "shape", "direction", "held_out_alignment",
          "subject_consistency", "motion_smoothness", "dynamic_degree", "frechet", "nfe",
          "seconds_per_clip"}


def test_the_chain_leaves_every_file_and_figure_that_the_design_names(scored_run):
    metrics = json.loads((scored_run / "metrics.json").read_text())
    assert {"psnr_db", "params", "compression", "latent_channels", "seconds"} <= set(metrics["vae"])
    for stage in "dit", "prune", "distill":
        assert {"params", "seconds"} <= set(metrics[stage])
    pruned = metrics["prune"]
    assert pruned["dense_vs_masked_max_abs"] < 1e-4
    assert (pruned["blocks"], pruned["heads"], pruned["ffn"]) == (2, 2, 48)
    assert {"nfe", "d_accuracy"} <= set(metrics["distill"])
    assert list(metrics["score"]) == ["dit", "pruned", "student"]
    # Two steps with guidance, or four without: the student keeps those that it learned.
    assert [score["nfe"] for score in metrics["score"].values()] == [4, 4, 4]
    for scores in metrics["score"].values():
        assert SCORES <= set(scores)
    assert "validation_loss" in metrics["score"]["dit"]
    assert (scored_run / "report.html").stat().st_size > 100
    assert not list(scored_run.glob("*.resume")) and not list(scored_run.glob("*.tmp"))


def test_training_clips_as_the_vae_keeps_them_say_how_far_a_score_can_go(scored_run):
    metrics = json.loads((scored_run / "metrics.json").read_text())
    assert metrics["data"]["clips"] == 6
    assert 0 < metrics["data"]["frechet"] < metrics["score"]["dit"]["frechet"]


def test_caption_dropout_and_noise_levels_are_the_teachers(micro_run, tmp_path, monkeypatch):
    for name in "latents", "dit":
        checkpoint = torch.load(micro_run / f"{name}.pt", weights_only=True)
        if name == "dit":
            checkpoint["settings"] |= dict(cfg_dropout=1.0, noise_level=9.0)
        torch.save(checkpoint, tmp_path / f"{name}.pt")
    drawn = []
    draw_batch = prune.draw_batch
    monkeypatch.setattr(prune, "draw_batch", lambda *a: drawn.append(draw_batch(*a)) or drawn[-1])
    train("prune", tmp_path)
    assert len(drawn) == 8 + 4 + 4 and not any(prompts.any() for _, prompts, _, _ in drawn)
    assert all(t.min() > 0.9 for _, _, _, t in drawn)


@pytest.mark.parametrize("name", [*MICRO, "sample", "export_coreml"])
def test_help_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--preset" in text and "--run" in text
    assert "default" in text and "None" not in text
    flags = re.findall(r"^  (--?\w.*?)(?=^  -|\Z)", text, re.M | re.S)
    for flag in flags:  # a name, two spaces or a new line, an explanation
        assert re.search(r"(  |\n)\s*\w", flag.strip()), flag


def test_the_example_of_parts_in_your_own_code_computes_what_it_says():
    page = (ROOT / "docs" / "reuse.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", page, re.S)
    torch.manual_seed(0)
    own = {}
    exec(code, own)
    dense = own["small"]
    whole = own["dit"]
    x, t, tokens = own["noise"], own["t"], own["prompts"]
    masked = whole(x, t, whole.text_encoder(tokens), own["masks"])
    torch.testing.assert_close(dense(x, t, dense.text_encoder(tokens)), masked)
    assert masked.abs().max() > 1e-3
    assert training.count_parameters(dense) < 0.8 * training.count_parameters(whole)
    assert all(p.grad is None for p in own["discriminator"].parser.parameters())
    assert all(p.grad is not None for p in own["discriminator"].blocks.parameters())


def test_the_chain_runs_in_bfloat16(tmp_path):
    """In float32 all other tests run."""
    for stage in MICRO:
        train(stage, tmp_path, "--dtype", "bfloat16")
    evaluate(tmp_path, "--score", "2", "--dtype", "bfloat16")
    evaluate(tmp_path, "--prompt", "a red circle", "--out", str(tmp_path / "x.gif"))
    scores = json.loads((tmp_path / "metrics.json").read_text())["score"]
    assert all(math.isfinite(score["frechet"]) for score in scores.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_of_your_own_replace_the_text_encoder(tmp_path, capsys, dtype):
    clips = tmp_path / "clips"
    clips.mkdir()
    g = np.random.default_rng(0)
    for name in "one", "two":
        frames = g.integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
        iio.imwrite(clips / f"{name}.mp4", frames, plugin="pyav", codec="libx264", fps=20)
        (clips / f"{name}.txt").write_text(f"clip {name}")
        np.save(clips / f"{name}.npy", g.normal(size=(4, 6)).astype(np.float32))
    empty = g.normal(size=(2, 6)).astype(np.float16)
    np.save(clips / "empty.npy", empty)
    run = tmp_path / "run"
    train("vae", run, "--data", str(clips), "--fps", "20")
    for stage in "dit", "prune", "distill":
        train(stage, run, "--dtype", dtype)
    student = torch.load(run / "student.pt", weights_only=True)
    assert student["model"]["text_encoder.empty"].sum() == empty.astype(np.float32).sum()
    evaluate(run, "--prompt", "clip one", "--out", str(tmp_path / "one.gif"))
    assert Image.open(tmp_path / "one.gif").info["duration"] == 50  # ms: as its clips were read
    evaluate(run, "--score", "2")
    clips.rename(tmp_path / "moved")
    # Without the input, four.
    for gone, columns in ("nothing", 5), ("frames.bin", 4), ("frames.pt", 4):
        for file in run.glob(gone):
            file.unlink()
        evaluate(run, "--report")
        assert "“clip two”" in (run / "report.html").read_text()
        assert Image.open(run / "compare.gif").width // 164 == columns
    new = tmp_path / "three.npy"
    asked = "--prompt", "clip three", "--out", str(tmp_path / "three.gif")
    np.save(new, g.normal(size=(3, 6)))  # a caption that nobody trained on, and shorter
    evaluate(run, *asked, "--embedding", str(new))
    assert (tmp_path / "three.gif").exists()
    np.save(new, g.normal(size=(3, 7)))
    for more, word in ([], "clip three"), (["--embedding", str(new)], "6 channels"):
        with pytest.raises(SystemExit) as stop:
            evaluate(run, *asked, *more)
        assert stop.value.code == 2 and word in capsys.readouterr().err

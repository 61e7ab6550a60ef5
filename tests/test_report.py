"""The report and its pictures, as a browser shows them; samples during training; what long work says of itself."""
import io
import json
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import distill
import dit
import prune
import sample
import vae
from conftest import train

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CPU = torch.device("cpu")


def report(run, *more):
    sample.main(["--run", str(run), "--report", "--sampling-steps", "3", "--device", "cpu", *more])
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def reported(micro_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("reported")
    for file in micro_run.iterdir():
        if file.is_file():
            shutil.copy(file, run)
    sample.main(["--run", str(run), "--score", "4", "--sampling-steps", "2", "--device", "cpu"])
    report(run)
    return run


def test_the_report_is_one_file_that_fetches_nothing(reported):
    page = (reported / "report.html").read_text()
    assert not re.search(r"<script|<link|@import|url\(|<iframe", page)
    assert set(re.findall(r"(?:src|href)=\"([^:]*):", page)) == {"data"}
    assert "Left out" not in page and "Not yet" not in page
    clips = 6 * 5 + 2 * (3 + 4)  # six prompts in five columns; x_t and x0 of three steps and of four
    assert page.count("<img") == clips


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: the report was not opened in a browser")
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_shows_its_pictures_and_nothing_is_wider_than_a_phone(reported, tmp_path, scheme):
    shutil.copy(reported / "report.html", tmp_path)
    look = """onload = () => { const d = document.querySelector("iframe").contentDocument, root = d.documentElement
        const pixels = [...d.images].map(i => { const c = document.createElement("canvas").getContext("2d")
            c.drawImage(i, 0, 0); return new Set(c.getImageData(0, 0, i.naturalWidth, i.naturalHeight).data).size })
        document.title = JSON.stringify({pixels, wide: root.scrollWidth, seen: root.clientWidth,
            svgs: [...d.querySelectorAll("svg")].map(s => s.getBoundingClientRect().height),
            page: getComputedStyle(d.body).backgroundColor, ink: getComputedStyle(d.body).color}) }"""
    (tmp_path / "phone.html").write_text(
        f'<iframe src="report.html" style="width:380px;height:800px;border:0"></iframe><script>{look}</script>')
    dom = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
         "--dump-dom", (tmp_path / "phone.html").as_uri()], capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert len(seen["pixels"]) == 44 and min(seen["pixels"]) > 4  # different values: no blank picture
    assert seen["wide"] <= seen["seen"] <= 380
    assert len(seen["svgs"]) > 8 and min(seen["svgs"]) > 20
    brightness = [sum(map(int, re.findall(r"\d+", seen[what])[:3])) for what in ("page", "ink")]
    assert (brightness[0] < brightness[1]) == (scheme == "dark")


@pytest.mark.parametrize("gone", [["masks.pt"], ["discriminator.pt"], ["pruned.pt", "metrics.json"],
                                  ["dit.pt", "pruned.pt", "student.pt", "masks.pt", "discriminator.pt"]])
def test_what_a_run_does_not_have_is_left_out_with_a_word(reported, tmp_path, gone):
    for file in reported.glob("*.*"):
        if file.name not in gone and file.suffix in (".pt", ".json"):
            shutil.copy(file, tmp_path)
    page = report(tmp_path)
    for name in gone:
        assert ("Not yet: <code>python" if name == "metrics.json" else f"Left out: {name}") in page
    assert page.count("Left out") == len([name for name in gone if name != "metrics.json"])


def test_pictures_for_the_readme_are_made_and_are_valid(reported):
    for name in "masks.svg", "pipeline.svg":
        assert len(list(ET.parse(reported / name).iter())) > 10
    for name in "compare.gif", "path.png":
        assert np.asarray(Image.open(reported / name)).std() > 1
    assert "80 →" not in (reported / "pipeline.svg").read_text()  # the figures are the run's: here it took 4


def test_the_mask_map_fills_what_stays(reported):
    masks = torch.load(reported / "masks.pt", weights_only=True)["masks"]
    kept = sum((masks[name] * masks["blocks"][:, None]).sum() for name in ("self_heads", "cross_heads"))
    filled = [r for r in ET.fromstring(prune.mask_map(masks)).iter() if r.get("fill") == "#4c8bf5"]
    assert len([r for r in filled if r.get("height") == "14.0" and float(r.get("x")) < 270]) == kept == 2 * 2 * 2
    bars = [float(r.get("width")) for r in filled if r.get("x") == "278.0"]
    assert sorted(bars) == [0, 50 * 48 / 64, 50 * 48 / 64]  # one block of three is cut, 48 of 64 channels stay


def test_a_curve_says_where_it_starts_and_ends():
    picture = sample.curve("loss", [5.0, 4.0, 3.0, 2.5])
    y = [float(point.split(",")[1]) for point in re.search(r'points="(.*?)"', picture)[1].split()]
    assert y == sorted(y) and y[0] < y[-1]  # downwards, as SVG counts
    assert "4 steps" in picture and "5 to 2.5" in picture


def test_each_clip_is_told_what_it_shows_and_whether_that_was_asked_for(reported):
    data, rendered = dit.Latents(reported / "latents.pt"), vae.Shapes(9, 32, 32, clips=4, seed=1)
    clips, captions = rendered.clip([0, 1]), rendered.captions[:2]
    assert all(right for told in sample.judge(captions, clips, None, data) for right, _ in told.values())
    told = sample.judge(["a red bar moving left"], vae.Shapes(9, 32, 32, 4, 1).clip([0]) * 0, None, data)[0]
    assert told == {aspect: (False, "none") for aspect in ("color", "shape", "direction")}
    data.file["config"]["data"] = "a folder"
    told = sample.judge([data.captions[0], "another"], None, data.x0([0, 1]), data)
    assert told[0] == {"nearest training clip": (True, data.captions[0])} and not told[1]["nearest training clip"][0]


@pytest.mark.parametrize("stage, steps", [("dit", 40), ("student", 4)])
def test_the_path_of_a_sample_starts_at_its_noise_and_ends_at_the_sample(micro_run, stage, steps):
    model, path = sample.Model(micro_run / f"{stage}.pt", CPU, torch.no_grad, None, 3.0), []
    tokens, noises = model.tokens(["a red circle moving left"]), model.noise(1, 0)
    x0 = model.sample(tokens, noises, path)
    assert len(path) == steps and [t for t, _, _ in path] == sorted((t for t, _, _ in path), reverse=True)
    torch.testing.assert_close(path[0][1], noises[0])
    torch.testing.assert_close(path[-1][2], x0, rtol=1e-3, atol=1e-3)
    assert torch.equal(x0, model.sample(tokens, noises))


def test_score_leaves_the_student_the_steps_that_it_learned(reported):
    scores = json.loads((reported / "metrics.json").read_text())["score"]
    assert {stage: s["evaluations"] for stage, s in scores.items()} == {"dit": 4, "pruned": 4, "student": 4}
    named = sample.Model(reported / "student.pt", CPU, torch.no_grad, 2, 3.0)
    assert named.evaluations == 2  # asked for by name, it does as it is told


def test_the_discriminator_is_kept_as_it_was_trained(micro_run, tmp_path):
    discriminator, settings = distill.load_discriminator(micro_run / "discriminator.pt", CPU)
    start = dit.load_dit(micro_run / "pruned.pt", CPU, "pruned")[0]
    fresh = distill.Discriminator(start, settings["frozen_blocks"], settings["learned_blocks"])
    frozen = fresh.parser.state_dict()
    assert frozen and all(torch.equal(v, frozen[k]) for k, v in discriminator.parser.state_dict().items())
    assert discriminator.blocks[0].feed_forward.down.weight.abs().max() > 0  # zero before the first step
    for name in "vae.pt", "latents.pt", "dit.pt", "pruned.pt":
        shutil.copy(micro_run / name, tmp_path)
    train("distill", tmp_path, "--adversarial", "0")
    assert (tmp_path / "student.pt").exists() and not (tmp_path / "discriminator.pt").exists()


@pytest.mark.parametrize("stage, needs, made, steps", [
    ("vae", [], "vae", [3, 6]), ("dit", ["vae", "latents"], "dit", [3, 6]),
    ("prune", ["vae", "latents", "dit"], "pruned", [3]),
    ("distill", ["vae", "latents", "dit", "pruned"], "student", [3])])
def test_samples_during_training_move_and_change_no_bit_of_it(micro_run, tmp_path, stage, needs, made, steps):
    for name in needs:
        shutil.copy(micro_run / f"{name}.pt", tmp_path)
    train(stage, tmp_path, "--sample-every", "3")
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [p.name for p in pictures] == [f"{made}-{step:06}.gif" for step in steps]
    frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(pictures[0]))]
    assert len(frames) == 5 and any((f != frames[0]).any() for f in frames) and frames[0].shape[1] == 4 * 96
    assert frames[0].shape[0] == (2 if stage == "vae" else 1) * 96  # what the VAE keeps of a clip is below the clip
    ours, theirs = (torch.load(run / f"{made}.pt", weights_only=True)["model"] for run in (tmp_path, micro_run))
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_work_of_more_than_two_seconds_shows_a_bar_on_a_terminal_and_elsewhere_one_line(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(vae.time, "monotonic", lambda: now[0])

    def work(seconds, terminal):
        out = io.StringIO()
        out.isatty = lambda: terminal
        monkeypatch.setattr(vae.sys, "stderr", out)
        for _ in vae.progress(range(3), "thinking"):
            now[0] += seconds
            if terminal:
                time.sleep(seconds)  # the bar's own clock is the real one
        return out.getvalue()

    assert work(0.1, False) == "" and work(5, False) == "thinking: 15 s\n"
    bar = work(0.8, True)
    assert "thinking:" in bar and "/3 [" in bar and "\n" not in bar


@pytest.mark.parametrize("run, preset, flags", [("runs/tiny", "tiny", ""), ("runs/toy", "toy", " --preset toy"),
                                                ("my run", "tiny", " --run 'my run'")])
def test_the_next_command_leads_to_the_same_run(run, preset, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vae.command("prune.py", Path(run), preset) == f"python prune.py{flags}"
    with pytest.raises(SystemExit):
        vae.load(Path(run) / "vae.pt", "vae")
    assert f"`python vae.py{flags}` makes it" in capsys.readouterr().err


def test_a_gif_keeps_a_colour_that_few_pixels_have():
    g = np.random.default_rng(0)
    frames = g.integers(30, 110, (3, 120, 160, 1)) + g.integers(0, 9, (3, 120, 160, 3))  # greys, not quite
    for i, color in enumerate([(230, 26, 26), (26, 230, 26), (26, 26, 230), (230, 230, 26), (230, 26, 230)]):
        frames[:, 20 * i:20 * i + 18, 10:50] = color + g.integers(-20, 20, (3, 18, 40, 3))
    frames[:, 60:66, 90:96] = 26, 230, 230
    moving = Image.open(io.BytesIO(vae.gif(frames.clip(0, 255).astype(np.uint8), 8)))
    seen = [np.asarray(f.convert("RGB"))[63, 93].astype(int) for f in ImageSequence.Iterator(moving)]
    assert len(seen) == 3 and all(np.abs(color - (26, 230, 230)).max() < 25 for color in seen)

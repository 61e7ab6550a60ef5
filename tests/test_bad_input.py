"""What a person may hand to the scripts by mistake: a case for each kind, on each script that it
concerns. All must end in one line that begins with `error: ` and in exit status 2, with every file
as it was before. (Clips that cannot be used: test_data.py.)"""
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import MICRO, Code, train
from common import cli


COMMANDS = {  # name -> its script, flags with which it works, files that it reads and that it makes
    "vae": ("vae", MICRO["vae"][1], "", "vae latents"),
    "dit": ("dit", MICRO["dit"][1], "latents", "dit"),
    "prune": ("prune", MICRO["prune"][1], "dit latents", "pruned masks"),
    "distill": ("distill", MICRO["distill"][1], "dit pruned latents", "student discriminator"),
    "sample": ("sample", "--prompt red --out x.gif", "student vae", ""),
    "score": ("sample", "--score 2 --sampling-steps 1", "vae latents dit pruned student", ""),
    "report": ("sample", "--report --sampling-steps 1", "masks", ""),  # and what --score reads
    "export": ("export_coreml", "", "student vae", "")}
SCRIPTS = [*MICRO, "sample", "export"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(micro_run, tmp_path, monkeypatch):
    """A run of one's own to damage, in the folder where the scripts work."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(micro_run, "run", ignore=shutil.ignore_patterns("coreml", "*.gif", "*.png"))
    return Path("run")


def files():
    return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


@pytest.fixture
def refused(run, capsys):
    def check(name, *more, word="", is_done=False):
        if name == "export":
            pytest.importorskip("coremltools")
        script, flags, _, makes = COMMANDS[name]
        device = [] if name == "export" else ["--device", "cpu"]
        for made in [] if is_done else makes.split():
            (run / f"{made}.pt").unlink()
        before = files()
        main = importlib.import_module(script).main
        with pytest.raises(SystemExit) as stop:
            cli.run_script(lambda: main([*flags.split(), "--run", "run", *device, *more]))
        told = capsys.readouterr().err
        bars = re.compile(r"[^\r\n]*it/s[^\r\n\]]*\]|\x1b\[A")
        lines = [line.strip() for line in bars.sub("", told).splitlines()]
        error, = [line for line in lines if line and not line.startswith("warning: ")]
        assert error.startswith("error: ") and error.isprintable() and word in error
        assert stop.value.code == 2
        assert files() == before

    return check


# ------------------------------------------------------------ files


def saved(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


def flip_a_bit(data):
    """In the middle of the largest tensor."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda file: file.file_size)
        at = data.index(archive.read(largest)) + largest.file_size // 2
    return data[:at] + bytes([data[at] ^ 8]) + data[at + 1:]


def change(data, with_something_else):
    """Takes away what a script needs of a checkpoint, or puts a small matrix in its place."""
    checkpoint = torch.load(io.BytesIO(data), weights_only=True)
    key = {"latents": "mean", "masks": "masks"}.get(checkpoint["stage"], "model")
    del checkpoint[key]
    if with_something_else:
        checkpoint[key] = torch.ones(3, 3)
    return saved(checkpoint)


DAMAGE = {
    "missing": lambda data: None,
    "a folder": lambda data: None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[:len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "a bit flipped": flip_a_bit,
    "text": lambda data: b"a red circle moving left\n",
    "code": lambda data: saved({"stage": "student", "settings": {}, "model": Code()}),
    "a list": lambda data: saved([1, 2]),
    "another stage": lambda data: saved({"stage": "resume", "settings": {}}),
    "a key missing": lambda data: change(data, False),
    "another shape": lambda data: change(data, True),
}
CASES = [(name, file, kind) for name, (_, _, reads, _) in COMMANDS.items()
         for file in reads.split() for kind in DAMAGE]
FINE = [("score", file, "missing") for file in ("dit", "pruned", "student")]
FINE += [("report", "masks", "missing"), ("report", "masks", "another shape")]


@pytest.mark.parametrize("name, file, kind", [case for case in CASES if case not in FINE])
def test_a_damaged_file(run, refused, name, file, kind):
    path = run / f"{file}.pt"
    data = DAMAGE[kind](path.read_bytes())
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    refused(name, word="holds a resume" if kind == "another stage" else f"{file}.pt")


def test_the_code_in_that_file_would_run_without_care(run):
    torch.load(io.BytesIO(DAMAGE["code"](b"")), weights_only=False)
    assert Path("was run").exists()


@pytest.fixture(scope="session")
def other_run(tmp_path_factory):
    """A whole run of the same sizes and another seed: every shape fits."""
    folder = tmp_path_factory.mktemp("other")
    for stage in MICRO:
        train(stage, folder, "--steps", "2", "--seed", "1")
    return folder


@pytest.mark.parametrize("case", [
    "prune dit", "prune latents", "distill dit", "distill pruned", "distill latents", "score vae",
    "score latents", "sample student", "sample vae", "export student", "export vae", "report vae"])
def test_a_file_of_another_run(run, other_run, refused, case):
    name, file = case.split()
    shutil.copy(other_run / f"{file}.pt", run)
    refused(name, word="latent")


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("kind", ["truncated", "a bit flipped", "text", "another stage"])
def test_a_resume_file_that_cannot_be_used(run, refused, name, kind):
    out = COMMANDS[name][3].split()[0]
    good = (run / f"{out}.pt").read_bytes()
    file = f"{out}.{'masks' if name == 'prune' else name}.resume"
    (run / file).write_bytes(DAMAGE[kind](good))  # another stage: of resume, but other settings
    refused(name, word=file)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("place", ["file/x.gif", "file", "x" * 300 + ".gif"])
def test_an_output_that_cannot_be_written(refused, name, place):
    Path("file").write_text("in the way")
    refused(name, "--out", place)


@pytest.mark.parametrize("name", ["score", "report"])
@pytest.mark.parametrize("data", [b"", b"[1, 2]", b"\xff\xfe", b'{"vae": 1'], ids=str)
def test_a_damaged_metrics_file(run, refused, name, data):
    (run / "metrics.json").write_bytes(data)
    refused(name, word="metrics.json")


# ------------------------------------------------------------ flags

NUMBERS = {  # flags that take a number of at least 0
    "vae": "--steps --batch-size --fps --clips --width --lr --kl --ema --save-every",
    "dit": "--width --depth --heads --head-dim --ffn --lr --cfg-dropout",
    "prune": "--mask-steps --mask-lr", "sample": "--sampling-steps --fps --score --cfg",
    "distill": "--teacher-steps --d-lr --adversarial --distillation --frozen-blocks"}
FLAGS = [(name, f"{flag}={value}") for name, flags in NUMBERS.items()
         for flag in flags.split() for value in ("-1", "nan", "99999999999", "much")]
FLAGS += [(name, f"{flag}=0") for name in MICRO for flag in ("--steps", "--batch-size", "--lr")]
FLAGS += [(name, flag) for name in SCRIPTS for flag in (
    "--seed=-1", "--preset=huge", "--unknown=3", "--see=1", "--pres=toy", "extra", "--run")]
FLAGS += [(name, flag) for name in [*MICRO, "sample"] for flag in (
    "--device=warp", "--device=meta", "--device=cuda:99", "--dtype=float8")]
FLAGS += [
    ("vae", "--optimizer=sgd"), ("dit", "--cfg-dropout=1.5"), ("prune", "--criterion=luck"),
    ("prune", "--kd=loud"), ("distill", "--d-noise-level=nan")]


@pytest.mark.parametrize("name, flag", FLAGS)
def test_a_flag_that_makes_no_sense(refused, name, flag):
    refused(name, flag, word=flag.split("=")[0])


@pytest.mark.parametrize("name, flags, word", [
    ("vae", "--size 16x32x32", "such as 17"), ("vae", "--size 9x30x45", "such as 32"),
    ("vae", "--size 20x32x32 --ratio 8x32x32", "such as 25"), ("vae", "--size 9", "--size"),
    ("vae", "--size 0x32xwide", "--size"), ("vae", "--ratio 4x8x16", "ratio"),
    ("vae", "--crop 5x24x16", "larger"), ("vae", "--crop 4x16x16", "such as 5"),
    ("dit", "--dry-run 49x384", "such as 9x32x32"), ("dit", "--steps 0.5x", "--steps"),
    ("vae", "--patch 3", "--patch"), ("sample", "--size 4x16x16", "such as 5"),
    ("sample", "--size 5x16", "--size"), ("sample", "--frames 4", "such as 5"),
    ("sample", "--embedding x.npy", "reads token ids"),
    ("vae", "--latent-channels 7", "last stage"), ("vae", "--data nowhere", "nowhere"),
    ("dit", "--head-dim 5", "even"), ("prune", "--blocks 9", "has 3"),
    ("prune", "--ffn -5", "--ffn"), ("prune", "--blocks 3 --heads 4 --ffn 64", "nothing to cut"),
    ("distill", "--adversarial 0 --distillation 0", "nothing to learn"),
    ("distill", "--frozen-blocks 7", "7"), ("sample", "--out red.avi", ".mp4"),
    ("sample", "--out red.gif --fps 51", "browsers"),
    ("sample", "--model student.pt", "student.pt: distill.py makes it"),
    ("export", "--ffn-tiles 9", "FFN's 48 channels"), ("vae", "--data .", "outside")])
def test_flags_that_do_not_fit(refused, name, flags, word):
    refused(name, *flags.split(), word=word)


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("flag", ["--seed=5", "--lr=0.5", "--batch-size=2"])
def test_the_same_run_with_other_settings(refused, name, flag):
    refused(name, flag, word="was made with", is_done=True)


def test_a_terminal_that_does_not_know_a_letter_is_told_all_the_same(run):
    flags = "--run run --device cpu --out círculo.gif --prompt red".split()
    done = subprocess.run([sys.executable, ROOT / "sample.py", *flags], capture_output=True,
                          env=dict(os.environ, PYTHONIOENCODING="ascii"))
    assert done.returncode == 0, done.stderr
    assert b"c\\xedrculo.gif: 1 clip(s)" in done.stdout


@pytest.mark.parametrize("prompt", ["", "... ?!", "purple elephant", "🎬🐸", "\x1b[2J", "<pad>"])
def test_a_prompt_without_a_known_word(refused, prompt):
    refused("sample", "--prompt", prompt, word="word")

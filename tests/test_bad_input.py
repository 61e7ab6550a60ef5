"""What a person may hand to the scripts by mistake, as tables: each case is one test.

An error is one line that begins with `error: `, exit status 2, no traceback, and no file that was not there before. A
file of a data set that cannot be used is skipped by name and counted. What is merely unusual has to work."""
import gc
import importlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import wave
import zipfile
from fractions import Fraction

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import vae
from conftest import MICRO, train

FILES = {"vae": "vae.pt", "latents": "latents.pt", "dit": "dit.pt", "masks": "masks.pt", "pruned": "pruned.pt",
         "student": "student.pt"}


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """The reader of clips collects garbage after each; what is alive by now need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def other_run(tmp_path_factory):
    """A run that is whole, but of another configuration: its latents have 4 channels instead of 8."""
    run = tmp_path_factory.mktemp("other")
    train("vae", run, "--latent-channels", "4", "--steps", "2")
    train("dit", run, "--steps", "2")
    return run


def files_of(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def call(name, arguments):
    """One script with these arguments, as its command line would run it. -> the exit status."""
    try:
        vae.script(lambda: importlib.import_module(name).main([str(a) for a in arguments]))
    except SystemExit as stop:
        return stop.code
    return 0


def refused(capsys, name, arguments, word, *folders):
    """Asserts that the call is refused as the docstring above says, with `word` in its line."""
    before = files_of(*folders)
    status, (out, error) = call(name, arguments), capsys.readouterr()
    lines = [line for line in error.splitlines() if not line.startswith(("warning: ", "skipped "))]
    lines = [line for line in lines if not line.endswith("files skipped")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], (status, error)
    assert lines[0].isprintable() and "Traceback" not in out + error
    assert files_of(*folders) == before


# ------------------------------------------------------------------------------------------------------------ flags

WHOLE = {  # flags that take a whole number above 0
    "vae": "--steps --batch-size --stride --clips --latent-channels --width --res-blocks",
    "dit": "--steps --batch-size --width --depth --heads --head-dim --ffn",
    "prune": "--steps --batch-size --mask-steps",
    "distill": "--steps --batch-size --sampling-steps --teacher-steps",
    "sample": "--sampling-steps --fps --score"}
REAL = {  # flags that take a number of at least 0
    "vae": "--lr --kl --save-every", "dit": "--lr --cfg-dropout --save-every", "prune": "--lr --mask-lr --save-every",
    "distill": "--lr --discriminator-lr --frozen-blocks --learned-blocks --discriminator-ahead --adversarial "
               "--distillation --r1 --cfg --save-every", "sample": "--cfg"}
FLAGS = [(name, f"{flag} {value}", flag) for name, flags in WHOLE.items() for flag in flags.split()
         for value in ("0", "-3", "two", "1e99")]
FLAGS += [(name, f"{flag}={value}", flag) for name, flags in REAL.items() for flag in flags.split()
          for value in ("nan", "inf", "-1", "much")]
FLAGS += [
    ("vae", "--seed -1", "--seed"), ("dit", "--seed 9999999999999999999999", "--seed"), ("vae", "--lr 0", "--lr"),
    ("dit", "--cfg-dropout 1.5", "--cfg-dropout"), ("distill", "--noise-level nan", "--noise-level"),
    ("vae", "--size 16x32x32", "17"), ("vae", "--size 10x32x32", "9"), ("vae", "--size 9x30x32", "32"),
    ("vae", "--size 9x32x45", "48"), ("vae", "--size 9x1x32", "8"), ("vae", "--size 2x32x32", "5"),
    ("vae", "--size 9", "9x32x32"), ("vae", "--size 9x32", "9x32x32"), ("vae", "--size 9x32x32x3", "9x32x32"),
    ("vae", "--size 0x32x32", "9x32x32"), ("vae", "--size=-9x32x32", "9x32x32"), ("vae", "--size 9x32xwide", "9x32x32"),
    ("vae", "--size 9x32x99999999", "9x32x32"), ("vae", "--size 9x40x40 --ratio 8x32x32", "32"),
    ("vae", "--size 20x32x32 --ratio 8x32x32", "17"), ("vae", "--size 22x32x32 --ratio 8x32x32", "25"),
    ("vae", "--ratio 4x8x16 --size 9x32x32", "ratio"), ("vae", "--ratio 3x8x8 --size 10x32x32", "ratio"),
    ("vae", "--ratio 4x4x4", "ratio"), ("vae", "--latent-channels 7", "latent channels"), ("vae", "--width 5", "last"),
    ("vae", "--data nowhere", "nowhere"), ("vae", "--data README.md", "--data"), ("vae", "--device warp", "warp"),
    ("vae", "--device meta", "meta"), ("vae", "--device cuda:99", "cuda:99"), ("vae", "--dtype float8", "float8"),
    ("vae", "--preset huge", "huge"), ("vae", "--optimizer sgd", "sgd"), ("vae", "--speed 3", "--speed"),
    ("vae", "--steps", "--steps"), ("vae", "extra", "extra"), ("dit", "--step 3", "--step"),
    ("vae", "--width 1073741824 --latent-channels 8", "memory"),
    ("dit", "{run} --out {new}/x.pt --head-dim 5", "even"), ("dit", "{run} --out {new}/x.pt --width 34", "32"),
    ("dit", "{run} --out {new}/x.pt --width 4", "8"), ("dit", "{run} --ffn 2000000000 --out {new}/x.pt", "memory"),
    ("prune", "{run} --blocks 9 --out {new}/x.pt", "1 to 3"), ("prune", "{run} --heads 0 --out {new}/x.pt", "1 to 4"),
    ("prune", "--dry-run --blocks 0", "1 to 7"), ("dit", "--dry-run --width 130", "128"),
    ("prune", "{run} --blocks 3 --heads 4 --ffn 64 --out {new}/x.pt", "nothing to cut"),
    ("prune", "{run} --ffn -5 --out {new}/x.pt", "1 to 64"),
    ("prune", "{run} --levels layers --out {new}/x.pt", "layers"),
    ("prune", "{run} --levels blocks,,ffn --out {new}/x.pt", "--levels"), ("prune", "{run} --kd loud", "loud"),
    ("prune", "--criterion luck", "luck"), ("distill", "--adversarial 0 --distillation 0", "nothing to learn"),
    ("distill", "{run} --frozen-blocks 7 --out {new}/x.pt", "frozen"),
    ("sample", "{run}", "--prompt"), ("sample", "{run} --score 1", "2"),
    ("sample", "{run} --prompt red --out red.avi", ".mp4"), ("sample", "{run} --prompt red --out red", ".mp4"),
    ("sample", "{run} --prompt red --sampling-steps 2000000000", "memory"),
    # The same folder twice, with other settings.
    ("vae", "{run} --lr 0.5", "lr"), ("vae", "{run} --size 9x16x16", "size"), ("dit", "{run} --seed 5", "seed"),
    ("prune", "{run} --criterion taylor", "criterion"), ("distill", "{run} --cfg 1", "cfg"),
]


@pytest.mark.parametrize("name, flags, word", FLAGS, ids=[f"{n} {f}" for n, f, _ in FLAGS])
def test_flags_that_make_no_sense(micro_run, tmp_path, name, flags, word, capsys):
    words = flags.format(run=f"--run {micro_run}", new=tmp_path).split()
    words += [] if "{run}" in flags else ["--run", tmp_path / "run"]
    if "{run}" in flags and name in MICRO:  # its own flags first, so that only the one in question is new
        words = MICRO[name][1].split() + words
    refused(capsys, name, words, word, tmp_path, micro_run)


# ------------------------------------------------------------------------------------------------------ checkpoints

READS = [  # script, the flag of a file that it reads, what that may hold
    ("dit", "--latents", "latents"), ("prune", "--dit", "dit"), ("prune", "--latents", "latents"),
    ("distill", "--pruned", "pruned dit"), ("distill", "--teacher", "dit"), ("distill", "--latents", "latents"),
    ("sample", "--model", "student pruned dit"), ("sample", "--vae", "vae"), ("export_coreml", "--model", "student"),
    ("export_coreml", "--vae", "vae")]
WRONG = [(name, flag, stage) for name, flag, right in READS for stage in FILES if stage not in right.split()]


def needs(name):
    return ["--prompt", "red", "--out", "x.gif"] if name == "sample" else []


@pytest.mark.parametrize("name, flag, stage", WRONG)
def test_a_checkpoint_of_another_stage(micro_run, tmp_path, name, flag, stage, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--run", micro_run, flag, micro_run / FILES[stage], *needs(name)]
    refused(capsys, name, words, f"holds a {stage} checkpoint", tmp_path, micro_run)


@pytest.mark.parametrize("name, flag, right", READS)
@pytest.mark.parametrize("kind", ["missing", "folder", "empty"])
def test_a_checkpoint_that_is_no_file(micro_run, tmp_path, name, flag, right, kind, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "some.pt"
    path.mkdir() if kind == "folder" else path.write_bytes(b"") if kind == "empty" else None
    word = {"missing": "makes it", "folder": "is a folder", "empty": "damaged"}[kind]
    refused(capsys, name, ["--run", micro_run, flag, path, *needs(name)], word, tmp_path, micro_run)


def test_what_is_missing_is_said_from_the_first_stage_that_lacks(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("sample", ["--run", "x", "--prompt", "red", "--device", "cpu"]) == 2
    chain = [f"python {script}.py --run x" for script in ("vae", "dit", "prune", "distill")]
    assert " && ".join(chain) in capsys.readouterr().err
    for name in "vae", "latents", "pruned":
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / f"{name}.pt").touch()
    assert call("sample", ["--run", "x", "--prompt", "red", "--device", "cpu"]) == 2
    assert f"`{chain[1]} && {chain[3]}` makes it" in capsys.readouterr().err


def test_a_teacher_is_pointed_to_where_there_is_no_student_yet(micro_run, tmp_path, capsys, monkeypatch):
    shutil.copy(micro_run / "dit.pt", tmp_path)
    words = ["--run", tmp_path, "--prompt", "red"]
    refused(capsys, "sample", words, f"--model {tmp_path / 'dit.pt'} is there", tmp_path)


def flipped(data, where, bit=3):
    return data[:where] + bytes([data[where] ^ 1 << bit]) + data[where + 1:]


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", data)
    return buffer.getvalue()


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def script_module():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


DAMAGE = {f"truncated at {i} tenths": lambda data, i=i: data[:len(data) * i // 10] for i in range(1, 10)}
DAMAGE |= {"truncated by a byte": lambda data: data[:-1], "without its first byte": lambda data: data[1:],
           "twice": lambda data: data[:len(data) // 2] + data, "zeros": lambda data: bytes(len(data)),
           "a hole": lambda data: data[:len(data) // 2] + bytes(4096) + data[len(data) // 2 + 4096:]}
# Anywhere in the file a bit may flip in padding, where it means nothing: these are in the middle of tensors.
DAMAGE |= {f"a bit flipped in tensor {i}": lambda data, i=i: flipped(data, middle_of_tensor(data, i)) for i in range(8)}
NO_CHECKPOINT = {
    "text": b"a red circle moving left\n", "JSON": b'{"stage": "student"}', "zip bomb": zipped(data_pkl=bytes(10 ** 7)),
    "a zip of something else": zipped(readme=b"hello"), "a list": saved([1, 2]), "no stage": saved({"model": {}}),
    "weights alone": saved(torch.nn.Linear(2, 2).state_dict()), "TorchScript": script_module(),
    "an old format": pickle.dumps({"stage": "student"}), "a whole module": saved({"stage": torch.nn.Linear(2, 2)}),
    "a stage of numbers": saved({"stage": torch.ones(3)}), "no config": saved({"stage": "student"}),
    "another config": saved({"stage": "student", "config": {"width": 8}, "model": {}}),
    "a config of text": saved({"stage": "student", "config": "small", "model": {}}),
    "weights that are missing": saved({"stage": "student", "model": {}, "config": dict(
        latent_channels=4, width=8, depth=1, heads=1, head_dim=4, ffn=8, vocabulary=3, text_tokens=3)})}


def middle_of_tensor(data, i):
    """Where the middle byte of one of eight of the tensors in this file is."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        tensors = [file for file in archive.infolist() if "/data/" in file.filename and file.file_size]
    file = tensors[len(tensors) * i // 8]
    name, extra = struct.unpack("<HH", data[file.header_offset + 26:file.header_offset + 30])
    return file.header_offset + 30 + name + extra + file.file_size // 2


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name, flag", [("sample", "--model"), ("sample", "--vae"), ("dit", "--latents")])
def test_a_damaged_checkpoint(micro_run, tmp_path, name, flag, damage, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = micro_run / {"--model": "student.pt", "--vae": "vae.pt", "--latents": "latents.pt"}[flag]
    (tmp_path / "bad.pt").write_bytes(DAMAGE[damage](good.read_bytes()))
    refused(capsys, name, ["--run", micro_run, flag, "bad.pt", *needs(name)], "bad.pt", tmp_path, micro_run)


@pytest.mark.parametrize("kind", NO_CHECKPOINT)
def test_a_file_that_is_no_checkpoint(micro_run, tmp_path, kind, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pt").write_bytes(NO_CHECKPOINT[kind])
    refused(capsys, "sample", ["--run", micro_run, "--model", "bad.pt", *needs("sample")], "bad.pt", tmp_path)


def test_what_is_compressed_is_not_unpacked(tmp_path, monkeypatch, capsys):
    """torch.save compresses nothing: a small file that claims to hold much is refused before it takes memory."""
    (tmp_path / "bomb.pt").write_bytes(NO_CHECKPOINT["zip bomb"])
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    for unpack in (zipfile.ZipFile, "testzip"), (torch, "load"):
        monkeypatch.setattr(*unpack, lambda *_, **__: pytest.fail("unpacked"))
    refused(capsys, "sample", ["--model", tmp_path / "bomb.pt", "--prompt", "red"], "damaged", tmp_path)


class Evil:
    """Unpickled without care, this makes a folder."""

    def __init__(self, folder, function=os.mkdir):
        self.folder, self.function = folder, function

    def __reduce__(self):
        code = f"__import__('os').mkdir('{self.folder}')"
        return self.function, (str(self.folder) if self.function is os.mkdir else code,)


EVIL = {"as the whole": lambda evil: saved(evil), "inside": lambda evil: saved({"stage": "student", "model": evil}),
        "as a key": lambda evil: saved({"stage": "student", evil: 1}), "an old format": lambda evil: pickle.dumps(evil),
        "behind good data": lambda evil: saved({"stage": "student", "config": {}, "x": torch.ones(3), "y": [evil]})}


@pytest.mark.parametrize("function", [os.mkdir, eval, exec])
@pytest.mark.parametrize("kind", EVIL)
def test_code_in_a_checkpoint_does_not_run(micro_run, tmp_path, kind, function, capsys):
    (tmp_path / "evil.pt").write_bytes(EVIL[kind](Evil(tmp_path / "was run", function)))
    words = ["--run", micro_run, "--model", tmp_path / "evil.pt", "--prompt", "red"]
    refused(capsys, "sample", words, "damaged", tmp_path, micro_run)
    assert not (tmp_path / "was run").exists()


def test_that_code_would_run_without_care(tmp_path):
    for i, function in enumerate((os.mkdir, eval, exec)):
        pickle.loads(pickle.dumps(Evil(tmp_path / str(i), function)))
        assert (tmp_path / str(i)).exists()


OTHER = [("prune", "--dit"), ("prune", "--latents"), ("distill", "--teacher"), ("distill", "--pruned"),
         ("distill", "--latents"), ("sample", "--vae"), ("export_coreml", "--vae")]


@pytest.mark.parametrize("name, flag", OTHER)
def test_a_checkpoint_of_another_run(micro_run, other_run, tmp_path, name, flag, capsys):
    other = other_run / {"--dit": "dit.pt", "--teacher": "dit.pt", "--pruned": "dit.pt"}.get(flag, f"{flag[2:]}.pt")
    words = ["--run", micro_run, flag, other, "--out", tmp_path / ("x.gif" if name == "sample" else "x.pt")]
    words += ["--prompt", "red"] if name == "sample" else []
    refused(capsys, name, words, "latent", tmp_path, micro_run)


@pytest.mark.parametrize("stage", MICRO)
@pytest.mark.parametrize("damage", ["truncated at 5 tenths", "a bit flipped in tensor 4", "other settings", "student"])
def test_a_resume_file_that_cannot_be_used(micro_run, tmp_path, stage, damage, capsys):
    for file in FILES.values():
        if file != {"vae": "latents.pt"}.get(stage):
            os.link(micro_run / file, tmp_path / file)
    out = {"vae": "vae", "dit": "dit", "prune": "pruned", "distill": "student"}[stage]
    (tmp_path / f"{out}.pt").unlink()
    good, resume = (micro_run / "student.pt").read_bytes(), {"prune": "masks"}.get(stage, stage)
    bad = DAMAGE[damage](good) if damage in DAMAGE else good if damage == "student" else saved(
        {"stage": "resume", "settings": {}})
    (tmp_path / f"{out}.{resume}.resume").write_bytes(bad)
    word = {"other settings": "was made with", "student": "holds a student"}.get(damage, "damaged")
    refused(capsys, stage, [*MICRO[stage][1].split(), "--run", tmp_path, "--device", "cpu"], word, tmp_path)


# ------------------------------------------------------------------------------------------------------------ clips


def noise(frames=24, height=48, width=64, channels=3):
    """A clip of [frames, h, w(, channels)] uint8 that no encoder makes small."""
    shape = (frames, height, width, channels) if channels > 1 else (frames, height, width)
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def mp4(path, frames=24, height=48, width=64, out="libx264", pixels="yuv420p"):
    iio.imwrite(path, noise(frames, height, width), extension=path.suffix, plugin="pyav", codec=out, fps=20,
                out_pixel_format=pixels)


def truncated(path, share):
    mp4(path)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def streams(path, video_frames=0, audio=True, times=None):
    """A file written with PyAV directly: with sound, or with frames at uneven times."""
    with av.open(str(path), "w") as file:
        if video_frames:
            video = file.add_stream("libx264", rate=20)
            video.width, video.height, video.pix_fmt, video.time_base = 64, 48, "yuv420p", Fraction(1, 1000)
            video.codec_context.time_base = Fraction(1, 1000)
        sound = file.add_stream("aac", rate=44100) if audio else None
        for i, array in enumerate(noise(video_frames)):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = (times[i] if times else 50 * i), Fraction(1, 1000)
            file.mux(video.encode(frame))
        if video_frames:
            file.mux(video.encode())
        if audio:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.int16), format="s16", layout="mono")
            frame.rate = 44100
            file.mux([*sound.encode(frame), *sound.encode()])


def gif(path, frames):
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50)


def transparent(path):
    frames = np.concatenate([noise(), noise(channels=1)[..., None]], axis=3)
    with av.open(str(path), "w") as file:
        video = file.add_stream("png", rate=20)
        video.width, video.height, video.pix_fmt = 64, 48, "rgba"
        for frame in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
        file.mux(video.encode())


def wav(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))


CLIPS = {  # name -> (how it is made, a word of why it is skipped, None if it has to be used)
    "empty.mp4": (lambda p: p.write_bytes(b""), "FFmpeg"),
    "text.mp4": (lambda p: p.write_text("not a film " * 500), "FFmpeg"),
    "zeros.mp4": (lambda p: p.write_bytes(bytes(50000)), ""),
    "random.mp4": (lambda p: p.write_bytes(noise().tobytes()), ""),
    "truncated at half.mp4": (lambda p: truncated(p, 0.5), "FFmpeg"),
    "truncated at a tenth.mp4": (lambda p: truncated(p, 0.1), "FFmpeg"),
    "truncated at half.mkv": (lambda p: truncated(p, 0.5), "frames"),
    "only its head.mp4": (lambda p: truncated(p, 0.01), ""),
    "one frame.mp4": (lambda p: mp4(p, 1), "1 frames"), "too short.mp4": (lambda p: mp4(p, 17), "17 frames"),
    "sound only.m4a": (lambda p: streams(p), "FFmpeg"), "sound only.mp4": (lambda p: streams(p), "FFmpeg"),
    "sound only.wav": (wav, "FFmpeg"), "picture.png": (lambda p: iio.imwrite(p, noise(1)[0]), "1 frames"),
    "picture.jpg": (lambda p: iio.imwrite(p, noise(1)[0]), "1 frames"),
    "huge.png": (lambda p: Image.new("L", (9000, 9000)).save(p), "9000x9000"),
    "a folder.mp4": (lambda p: p.mkdir(), "a file"), "a pipe.mp4": (os.mkfifo, "a file"),
    "a dead link.mp4": (lambda p: p.symlink_to("nowhere"), "a file"),
    "a checkpoint.pt": (lambda p: torch.save({}, p), "FFmpeg"), ".hidden": (lambda p: p.write_text("x"), ""),
    "page.html": (lambda p: p.write_text("<html>"), "FFmpeg"),
    # From here on nothing is wrong.
    "name with spaces.mp4": (mp4, None), "Фильм 映画 🎬.mp4": (mp4, None), "UPPER.MP4": (mp4, None),
    "dots.in.the.name.mp4": (mp4, None), "'quotes' & $HOME;*.mp4": (mp4, None), "-flag.mp4": (mp4, None),
    "%d.mp4": (mp4, None), "x" * 200 + ".mp4": (mp4, None),
    "odd.gif": (lambda p: gif(p, noise(24, 47, 63)), None), "tiny.gif": (lambda p: gif(p, noise(24, 3, 5)), None),
    "odd.mp4": (lambda p: mp4(p, 24, 47, 63, pixels="yuv444p"), None),
    "wide.mp4": (lambda p: mp4(p, 24, 16, 640), None), "high.mp4": (lambda p: mp4(p, 24, 640, 16), None),
    "large.mp4": (lambda p: mp4(p, 18, 1080, 1920, out="mpeg4"), None),
    "grey.mp4": (lambda p: mp4(p, pixels="gray"), None),
    "grey.gif": (lambda p: gif(p, noise(channels=1)), None), "alpha.mov": (transparent, None),
    "dark.gif": (lambda p: gif(p, noise(24, 8, 8) // 64), None),
    "film.mkv": (mp4, None), "film.webm": (lambda p: mp4(p, out="libvpx-vp9"), None),
    "with sound.mp4": (lambda p: streams(p, 24), None), "just long enough.mp4": (lambda p: mp4(p, 18), None),
    "uneven times.mp4": (lambda p: streams(p, 24, audio=False, times=[50 * i + 9 * i * i for i in range(24)]), None),
}


def folder_of_clips(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    mp4(clips / "good.mp4")
    (clips / "good.txt").write_text("a good clip")
    return clips


def train_on(clips, run):
    """A step of vae.py on a folder. -> the status, and the captions that it trained on."""
    status = call("vae", [*MICRO["vae"][1].split(), "--steps", 1, "--batch-size", 1, "--data", clips, "--run", run,
                          "--clips", 4, "--device", "cpu"])
    return status, set(vae.load(run / "latents.pt", "latents")["captions"]) if status == 0 else None


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_used_or_skipped_by_name(tmp_path, name, capsys):
    make, why = CLIPS[name]
    clips = folder_of_clips(tmp_path)
    make(clips / name)
    (clips / name).with_suffix(".txt").write_text("an odd clip")
    status, captions = train_on(clips, tmp_path / "run")
    error = capsys.readouterr().err
    assert status == 0 and "Traceback" not in error
    assert captions == ({"a good clip", "an odd clip"} if why is None else {"a good clip"})
    if why is None:
        assert "skipped" not in error
    else:
        assert why in next(line for line in error.splitlines() if line.startswith(f"skipped {name}: "))
        assert "1 of 2 files skipped" in error


CAPTIONS = {  # of the odd clip -> why it is skipped, or the caption that it has
    "missing": (None, ValueError("odd.txt")), "empty": (b"", ValueError("0 words")),
    "blank": (b" \n\t ", ValueError("0 words")), "only signs": (b"... !? --", ValueError("0 words")),
    "Latin-1": ("a café".encode("latin-1"), ValueError("utf-8")), "binary": (bytes(range(256)), ValueError("utf-8")),
    "UTF-16": ("a clip".encode("utf-16"), ValueError("utf-8")), "long": (b"word " * 10000, ValueError("10000 words")),
    "long by a word": (b"word " * 513, ValueError("513 words")), "just fits": (b"word " * 512, "word " * 511 + "word"),
    "one long word": (b"a" * 100000, "a" * 100000), "lines": (b"a clip\r\nof\r\nlines\r\n", "a clip of lines"),
    "with a mark in front": (b"\xef\xbb\xbfa clip", "a clip"), "accents": ("a café".encode(), "a café"),
    "emoji": ("🎬 film".encode(), "🎬 film"), "right to left": ("קליפ טוב".encode(), "קליפ טוב"),
    "Chinese": ("青蛙".encode(), "青蛙"), "control characters": (b"a \x1b[31mred\x07 \0", "a \x1b[31mred\x07 \0")}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_caption_is_used_or_its_clip_skipped(tmp_path, kind, capsys):
    text, expected = CAPTIONS[kind]
    clips = folder_of_clips(tmp_path)
    mp4(clips / "odd.mp4")
    if text is not None:
        (clips / "odd.txt").write_bytes(text)
    status, captions = train_on(clips, tmp_path / "run")
    error = capsys.readouterr().err
    if isinstance(expected, ValueError):
        assert status == 0 and captions == {"a good clip"} and "1 of 2 files skipped" in error
        assert str(expected) in next(line for line in error.splitlines() if line.startswith("skipped odd.mp4: "))
    else:
        assert status == 0 and captions == {"a good clip", expected} and "skipped" not in error


def npy(array, **how):
    buffer = io.BytesIO()
    np.save(buffer, array, **how)
    return buffer.getvalue()


def claims(shape):
    """A .npy file whose header promises far more than follows."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


GOOD = np.ones((4, 6), np.float32)
EMBEDDINGS = {  # of the odd clip, beside a good one of [4, 6] -> a word of why it is skipped, None if it is used
    "NaN": (npy(np.full((4, 6), np.nan, np.float32)), "not finite"), "inf": (npy(GOOD * np.inf), "not finite"),
    "beyond float32": (npy(np.full((4, 6), 1e300)), "not finite"),
    "objects": (npy(np.array([{}, 1], dtype=object), allow_pickle=True), "Python objects"),
    "a pickle": (pickle.dumps([1, 2]), ""), "text": (b"0.1 0.2 0.3", ""), "empty": (b"", ""),
    "truncated": (npy(GOOD)[:-10], ""), "words": (npy(np.array([["a", "b"]])), ""),
    "npz": (zipped(a_npy=npy(GOOD)), ""),
    "a terabyte claimed": (claims((500000, 500000)), ""), "more than a number holds": (claims((2 ** 62, 2 ** 62)), ""),
    "a negative shape": (claims((-4, 6)), ""),
    "float16": (npy(GOOD.astype(np.float16)), None), "float64": (npy(GOOD.astype(np.float64)), None),
    "integers": (npy(GOOD.astype(np.int32)), None), "big-endian": (npy(GOOD.astype(">f4")), None),
    "columns first": (npy(np.asfortranarray(GOOD)), None)}
SHAPES = {"one dimension": GOOD[0], "three dimensions": GOOD[None], "a number": GOOD[0, 0],
          "more tokens": np.ones((5, 6)), "other channels": np.ones((4, 7)), "no tokens": np.ones((0, 6))}


def folder_with_embeddings(tmp_path, odd):
    clips = folder_of_clips(tmp_path)
    np.save(clips / "good.npy", GOOD)
    mp4(clips / "odd.mp4")
    (clips / "odd.txt").write_text("an odd clip")
    if odd is not None:
        (clips / "odd.npy").write_bytes(odd)
    return clips


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_an_embedding_is_used_or_its_clip_skipped(tmp_path, kind, capsys):
    data, why = EMBEDDINGS[kind]
    status, captions = train_on(folder_with_embeddings(tmp_path, data), tmp_path / "run")
    error = capsys.readouterr().err
    assert status == 0 and captions == ({"a good clip", "an odd clip"} if why is None else {"a good clip"})
    assert "skipped" not in error if why is None else "skipped odd.mp4: " in error and why in error


@pytest.mark.parametrize("kind", [*SHAPES, "none"])
def test_embeddings_of_different_shapes(tmp_path, kind, capsys):
    clips = folder_with_embeddings(tmp_path, None if kind == "none" else npy(SHAPES[kind]))
    words = [*MICRO["vae"][1].split(), "--data", clips, "--run", tmp_path / "run"]
    refused(capsys, "vae", words, "[tokens, dim]", tmp_path)


FOLDERS = {"nothing": {}, "captions alone": {"a.txt": b"a clip"}, "notes": {"README.md": b"# clips"},
           "a clip without a caption": {"a.mp4": b""},
           "broken clips": {"a.mp4": b"", "a.txt": b"x", "b.gif": b"", "b.txt": b"x"}}


def test_a_folder_that_changed_while_the_run_was_stopped(tmp_path, capsys, monkeypatch):
    clips = folder_of_clips(tmp_path)
    monkeypatch.setattr(vae, "psnr", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert train_on(clips, tmp_path / "run")[0] == 130
    monkeypatch.undo()
    shutil.copy(clips / "good.mp4", clips / "more.mp4")
    (clips / "more.txt").write_text("a clip that came later")
    assert train_on(clips, tmp_path / "run")[0] == 2 and "other clips than are there" in capsys.readouterr().err
    (clips / "more.txt").unlink()
    assert train_on(clips, tmp_path / "run") == (0, {"a good clip"})
    said = capsys.readouterr().out
    assert "1 clip(s), " in said and " to train on, " in said
    assert train_on(f"{clips}/", tmp_path / "run")[0] == 0 and "is done" in capsys.readouterr().out
    (clips / "good.txt").write_text("a bold clip")
    assert train_on(clips, tmp_path / "run")[0] == 2
    assert re.search(r"there now: delete \S+vae.pt and \S+latents.pt", capsys.readouterr().err)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_a_usable_clip(tmp_path, kind, capsys):
    (tmp_path / "clips").mkdir()
    for name, data in FOLDERS[kind].items():
        (tmp_path / "clips" / name).write_bytes(data)
    refused(capsys, "vae", ["--data", tmp_path / "clips", "--run", tmp_path / "run"], "no usable clip", tmp_path)


# ---------------------------------------------------------------------------------------------------------- prompts

PROMPTS = {"nothing": "", "a space": " ", "signs": "... ?!", "unknown words": "purple elephant", "emoji alone": "🎬🐸",
           "Arabic": "دائرة حمراء", "10,000 unknown words": "elephant " * 10000, "control characters": "\x1b[2J \x07",
           "an underscore": "_", "a number": "12345", "a lone surrogate": "\udcff", "the word for padding": "pad"}
FINE = {"capitals": "A RED CIRCLE", "a known and an unknown word": "red elephant", "10,000 words": "red circle " * 5000,
        "a word of 100,000 letters": "red " + "x" * 100000, "control characters": "red \x1b[31m\x07 circle",
        "lines": "red\ncircle\r\nmoving", "emoji": "🎬 red circle 🐸", "right to left": "red دائرة circle",
        "an override": "red \u202e circle", "a byte order mark": "\ufeffred circle", "no breaks": "red\u00a0circle",
        "markup": "<b>red</b> & circle", "a lone surrogate": "red \udcff"}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_that_says_nothing(micro_run, tmp_path, kind, capsys):
    words = ["--run", micro_run, "--prompt", "red circle", "--prompt", PROMPTS[kind], "--out", tmp_path / "x.gif"]
    refused(capsys, "sample", words, "word", tmp_path, micro_run)


@pytest.mark.parametrize("kind", FINE)
def test_a_prompt_that_is_merely_unusual(micro_run, tmp_path, kind, capsys):
    words = ["--run", micro_run, "--prompt", FINE[kind], "--out", tmp_path / "x.gif", "--device", "cpu"]
    assert call("sample", words) == 0
    error = capsys.readouterr().err
    assert (tmp_path / "x.gif").stat().st_size > 100
    assert all(line.startswith("warning: ") for line in error.splitlines())
    assert "10000 words are cut" in error or kind != "10,000 words"
    assert "elephant" in error or "elephant" not in FINE[kind]


LISTS = {"missing": None, "a folder": None, "empty": b"", "blank lines": b"\n \n\n", "binary": bytes(range(256)),
         "Latin-1": "café".encode("latin-1"), "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
         "one bad line": b"red circle\n???\n"}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_prompts_that_cannot_be_read(micro_run, tmp_path, kind, capsys):
    path = tmp_path / "prompts.txt"
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(LISTS[kind])
    words = ["--run", micro_run, "--prompts", path, "--out", tmp_path / "x.gif"]
    refused(capsys, "sample", words, "prompt", tmp_path, micro_run)


# ------------------------------------------------------------------------------------------------- files and folders


PLACES = {"under a file": "file/run", "a name too long": "x" * 300, "a line feed": "a\nb", "colours": "\x1b[31mred",
          "bytes that are no text": "\udcff\udcfe"}
EMPTY = {"vae": "nowhere", "dit": "latents.pt", "prune": "dit.pt", "distill": "dit.pt", "sample": "student.pt",
         "export_coreml": "student.pt"}  # what each script misses in an empty run


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_in_an_odd_place(tmp_path, name, place, capsys):
    (tmp_path / "file").write_text("in the way")
    words = [*(MICRO[name][1].split() if name in MICRO else needs(name)), "--run", tmp_path / PLACES[place]]
    words += ["--data", "nowhere"] if name == "vae" and place not in ("under a file", "a name too long") else []
    in_the_way = name == "vae" and place == "under a file"
    word = "too long" if place == "a name too long" else "file" if in_the_way else EMPTY[name]
    refused(capsys, name, words, word, tmp_path)


@pytest.mark.parametrize("name", ["vae", "dit", "prune", "distill", "sample"])
@pytest.mark.parametrize("place", ["file/x.gif", "folder.gif"])
def test_an_output_that_cannot_be_written(micro_run, tmp_path, name, place, capsys):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.gif").mkdir()
    words = [*(MICRO[name][1].split() if name in MICRO else ["--prompt", "red"]), "--run", micro_run]
    refused(capsys, name, [*words, "--out", tmp_path / place, "--device", "cpu"], tmp_path.name, tmp_path, micro_run)


@pytest.mark.parametrize("data", [b"", b"[1, 2]", b"\xff\xfe", b'{"vae": 1'])
@pytest.mark.parametrize("name", ["dit", "sample"])
def test_a_damaged_metrics_file_stops_nothing_from_being_saved(micro_run, tmp_path, name, data, capsys):
    for file in "vae.pt", "latents.pt", "dit.pt", "pruned.pt", "student.pt":
        shutil.copy(micro_run / file, tmp_path / file)
    (tmp_path / "metrics.json").write_bytes(data)
    if name == "dit":
        (tmp_path / "dit.pt").unlink()
        assert call("dit", [*MICRO["dit"][1].split(), "--run", tmp_path, "--device", "cpu"]) == 2
        ours, theirs = (vae.load(run / "dit.pt", "dit")["model"] for run in (tmp_path, micro_run))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "metrics.json" in error and error.count("\n") == 1
        (tmp_path / "metrics.json").unlink()  # mended, the same command ends what is left of it
        assert call("dit", [*MICRO["dit"][1].split(), "--run", tmp_path, "--device", "cpu"]) == 0
        assert "dit" in json.loads((tmp_path / "metrics.json").read_text()) and not list(tmp_path.glob("*.resume"))
    else:
        words = ["--run", tmp_path, "--score", 2, "--sampling-steps", 1, "--device", "cpu"]
        refused(capsys, "sample", words, "metrics.json", tmp_path)
    assert name == "dit" or (tmp_path / "metrics.json").read_bytes() == data

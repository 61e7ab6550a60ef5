"""Clips of one's own: layouts, what is held out, which frames are read, and what cannot be used."""
import gc
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import unicodedata
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch
from conftest import Code, train
from PIL import Image

from common import data, reader, training

FORMATS = {".mkv": "matroska", ".webm": "matroska", ".ts": "mpegts"}
PIXELS = dict(gif="rgb8", mjpeg="yuvj420p", ffv1="bgra")


def numbered(i):
    """48x64 pixels that say which frame it is: one grey on the left, one on the right."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32] = i // 16 % 16 * 16
    pixels[:, 32:] = i % 16 * 16
    return pixels


def larger(i):
    return numbered(i + 100).repeat(2, axis=0).repeat(2, axis=1)


def quarters(i):
    """Red and green above, blue and yellow below."""
    colors = [[(220, 20, 20), (20, 220, 20)], [(20, 20, 220), (220, 220, 20)]]
    return np.array(colors, np.uint8).repeat(24, axis=0).repeat(32, axis=1)


def video(frames=40, suffix=".mp4", codec="libx264", picture=numbered, times=None, aspect=None,
         **options):
    """times: when each frame is shown, in ms; without them 25 frames per second."""
    file = io.BytesIO()
    with av.open(file, "w", format=FORMATS.get(suffix, suffix[1:])) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, channels = picture(0).shape
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        stream.codec_context.time_base = Fraction(1, 1000 if times else 25)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i in range(len(times) if times else frames):
            frame = av.VideoFrame.from_ndarray(picture(i), "rgba" if channels == 4 else "rgb24")
            frame.pts = times[i] if times else i
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def numbers(frames):
    """Frames [..., 3, h, w] -> which they are, [...], modulo 256."""
    width = frames.shape[-1]
    grey = np.asarray(frames)[..., 4:12, :].astype(float).mean((-3, -2))
    left = (grey[..., width // 8:width * 3 // 8].mean(-1) / 16).round()
    right = (grey[..., width * 5 // 8:width * 7 // 8].mean(-1) / 16).round()
    return (left * 16 + right).astype(int)


def captions_of(clips, *splits):
    """Of the records of these splits; of all, if none is named."""
    return [record.caption for record in clips.records if not splits or record.split in splits]


def frame_numbers(clips, split):
    """Which frames the windows of a split show, [n, t], modulo 256."""
    pixels = clips.clip(data.indices_of(clips.records, split))
    return numbers((pixels.transpose(1, 2) + 1) * 127.5)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n../part.ts\n#EXT-X-ENDLIST\n"
VIDEO = video()
PART = video(suffix=".ts")  # what the playlist is of
EMBEDDING = np.ones((4, 6), np.float32)


def write(folder, name="a.mp4", data=VIDEO, caption=b"a clip", embedding=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)
    if embedding is not None:
        np.save(path.with_suffix(".npy"), embedding)


def settings_for(folder):
    """25 frames per second: every frame of the videos here."""
    return dict(data=str(folder), size=(5, 16, 16), clips=1000, fps=25, picture_share=0.5,
                folder=data.describe_folder(str(folder), Path("nowhere")))


def read(folder, **settings):
    return data.open_clips(settings_for(folder) | settings, Path(f"{folder} run", "frames.pt"))


def refused(folder, capsys):
    """-> what is said before exit status 2."""
    with pytest.raises(SystemExit) as stop:
        read(folder)
    assert stop.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------ which frames are read


def shown(times, fps=5):
    """Of frames that are shown from these ms on, 40 ms the last: which one a player shows at each
    time k / fps."""
    at = np.arange(times[0], times[-1] + 40, 1000 / fps)
    return np.searchsorted(times, at, side="right") - 1


def remuxed(sources, change=lambda packets: packets, suffix=".mp4", default=None):
    """The packets of videos, changed but not encoded anew. default: the stream to be shown."""
    file = io.BytesIO()
    with av.open(file, "w", format=FORMATS.get(suffix, suffix[1:])) as target:
        packets = []
        for i, source in enumerate(sources):
            given = av.open(io.BytesIO(source)).streams.video[0]
            stream = target.add_stream_from_template(given)
            if default is not None:
                stream.disposition = av.stream.Disposition(int(i == default))
            for packet in change([p for p in given.container.demux(given) if p.size]):
                packet.stream = stream
                packets.append(packet)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            target.mux(packet)
    return file.getvalue()


def shifted(packets):
    """As `ffmpeg -ss 0.33 -c copy` cuts: an edit list hides what lies before."""
    for packet in packets:
        packet.pts -= int(0.33 / packet.time_base)
        packet.dts -= int(0.33 / packet.time_base)
    return packets


def without_rate(webm):
    """As browsers record: the element DefaultDuration becomes void."""
    place = webm.index(b"\x23\xe3\x83")
    length = 4 + (webm[place + 3] & 0x7f)
    void = b"\xec" + bytes([0x80 | length - 2]) + bytes(length - 2)
    return webm[:place] + void + webm[place + length:]


EVEN = list(range(0, 4000, 40))
UNEVEN = [40 * i + i * i % 30 for i in range(100)]
SLOW_START = [0, *range(8040, 12000, 40)]
COVER = video(1, ".mkv", "mjpeg", lambda i: np.full((48, 64, 3), 255, np.uint8))
OTHER = video(picture=lambda i: numbered(i + 100))
LONG = video(100, g="50")
PLAYED = {  # -> a video, its suffix, and which of its frames a player shows at 5 per second
    "mp4": (LONG, ".mp4", shown(EVEN)),
    "mp4, B-frames": (video(times=SLOW_START, bf="2"), ".mp4", shown(SLOW_START)),
    "mkv, the first stands": (video(0, ".mkv", times=SLOW_START), ".mkv", shown(SLOW_START)),
    "webm, no rate": (without_rate(video(suffix=".webm", codec="libvpx", times=UNEVEN)), ".webm",
                      shown(UNEVEN)),
    "avi, h264": (video(100, ".avi"), ".avi", shown(EVEN)),
    # Between two keyframes: what comes before the second cannot be decoded.
    "ts, cut": (remuxed([video(100, ".ts", g="10", sc_threshold="0")], lambda p: p[4:], ".ts"),
                ".ts", 10 + shown(EVEN[10:])),
    "gif, uneven": (video(suffix=".gif", codec="gif", times=[t // 10 * 10 for t in UNEVEN]), ".gif",
                    shown([t // 10 * 10 for t in UNEVEN])),
    "cut": (remuxed([LONG], shifted), ".mp4", 8 + shown(EVEN[8:])),
    "a preview first": (remuxed([OTHER, LONG], default=1), ".mp4", shown(EVEN)),
    "a cover first": (remuxed([COVER, LONG], suffix=".mkv"), ".mkv", shown(EVEN)),
    "a clock that jumps": (video(suffix=".mkv", times=[t + 36_000_000 * (t > 1990) for t in EVEN]),
                           ".mkv", [*shown(EVEN[:50]), *50 + shown(EVEN[50:])]),
    "ts, another size after": (
        PART + video(suffix=".ts", picture=larger, times=EVEN[40:]), ".ts",
        [*shown(EVEN[:40]), *100 + shown(EVEN[40:])]),
    "truncated": (video(100, ".mkv", g="10")[:-2000], ".mkv", None),
}


@pytest.mark.parametrize("kind", PLAYED)
def test_the_frames_are_those_that_a_player_shows(tmp_path, kind):
    content, suffix, expected = PLAYED[kind]
    write(tmp_path, "a" + suffix, content)
    frames = list(reader.read_frames(tmp_path / f"a{suffix}", 5, 48, 64))
    read = numbers(np.stack(frames))
    if expected is None:  # as far as it goes
        expected = shown(EVEN)[:len(read)]
        assert 5 < len(read) < 20
    assert abs(len(read) - len(expected)) <= 1
    few = min(len(read), len(expected))
    assert (np.abs(read[:few] - expected[:few]) <= (kind == "cut")).all()  # at half a frame's time


ONE = 65536
TURNS = {  # the display matrix, x' = a·x + c·y and y' = b·x + d·y -> red, green / blue, yellow then
    "as it is": (1, 0, 0, 1, "RG/BY"), "mirrored": (-1, 0, 0, 1, "GR/YB"),
    "upside down": (1, 0, 0, -1, "BY/RG"), "by 180 degrees": (-1, 0, 0, -1, "YB/GR"),
    "right": (0, 1, -1, 0, "BR/YG"), "left": (0, -1, 1, 0, "GY/RB"),
    "transposed": (0, 1, 1, 0, "RB/GY"), "transposed, by 180": (0, -1, -1, 0, "YG/BR")}
LYING = video(3, picture=quarters)


@pytest.mark.parametrize("kind", TURNS)
def test_a_video_is_read_upright_and_mirrored_as_a_player_shows_it(tmp_path, kind):
    a, b, c, d, expected = TURNS[kind]
    matrix = struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, ONE << 14)
    turned = struct.pack(">9i", a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, ONE << 14)
    place = LYING.index(matrix, LYING.index(b"tkhd"))
    write(tmp_path, data=LYING[:place] + turned + LYING[place + 36:])
    frame = next(reader.read_frames(tmp_path / "a.mp4", 25, 16, 16))
    names = []
    for y in 4, 12:
        colors = [frame[:, y, x] > 120 for x in (4, 12)]
        names.append("".join("Y" if rgb[:2].all() else "RGB"[rgb.argmax()] for rgb in colors))
    assert "/".join(names) == expected


def test_pixels_are_square_and_the_middle_is_read(tmp_path):
    def picture(i):  # of 96x48 when shown, with a square of 24x24 in the middle
        pixels = np.full((48, 48, 3), 40, np.uint8)
        pixels[12:36, 18:30] = 220
        return pixels

    for suffix in ".mp4", ".mkv":
        write(tmp_path, "a" + suffix, video(3, suffix, picture=picture, aspect=Fraction(2, 1)))
        frame = next(reader.read_frames(tmp_path / f"a{suffix}", 25, 24, 24))
        bright = frame.mean(0) > 130
        assert (bright.any(0).nonzero()[0][[0, -1]] == (6, 17)).all()
        assert (bright.any(1).nonzero()[0][[0, -1]] == (6, 17)).all()


def test_interlaced_videos_are_deinterlaced(tmp_path):
    def picture(i):  # a bar that moves by two pixels from each half picture to the next
        pixels = np.full((48, 64, 3), 40, np.uint8)
        pixels[::2, 4 + 4 * i:16 + 4 * i] = 220
        pixels[1::2, 6 + 4 * i:18 + 4 * i] = 220
        return pixels

    write(tmp_path, data=video(12, picture=picture, **{"x264-params": "interlaced=1:tff=1"}))
    for frame in reader.read_frames(tmp_path / "a.mp4", 25, 48, 64):
        assert np.abs(np.diff(frame.mean(0), axis=0)).mean() < 2  # lines are alike


def test_what_is_clear_is_white_and_what_is_half_clear_half_white(tmp_path):
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    image.save(tmp_path / "a.gif", save_all=True, append_images=[image.rotate(180)], duration=100)
    frame = next(reader.read_frames(tmp_path / "a.gif", 10, 16, 16))
    assert (frame.min(0) > 250).sum() == ((frame[0] > 250) & (frame[1] < 5)).sum() == 128
    pixels = np.full((48, 64, 4), (200, 100, 50, 128), np.uint8)
    write(tmp_path, "a.mkv", video(1, ".mkv", "ffv1", lambda i: pixels))
    frame = next(reader.read_frames(tmp_path / "a.mkv", 25, 16, 16))
    assert np.abs(frame.mean((1, 2)) - (227, 177, 152)).max() < 3


# ------------------------------------------------------------ folders


def test_with_few_clips_the_last_tenth_of_each_is_tested_on_and_never_trained_on(tmp_path):
    write(tmp_path, data=video(250))
    clips = read(tmp_path)
    test = frame_numbers(clips, "test")
    assert test.shape == (21, 5) and test.min() == 225 > frame_numbers(clips, "train").max()
    assert clips.clip([0, 1]).shape == (2, 3, 5, 16, 16) and clips.clip([0]).abs().max() <= 1


def test_what_has_been_read_is_not_read_again_but_by_other_settings(tmp_path, monkeypatch):
    write_many(tmp_path, 3)
    settings = settings_for(tmp_path)
    path = Path(f"{tmp_path} run", "frames.pt")
    monkeypatch.setattr(reader, "read_frames", Mock(wraps=reader.read_frames))
    first = data.open_clips(settings, path)
    (tmp_path / "000.mp4").unlink()
    again = data.open_clips(settings, path)
    assert reader.read_frames.call_count == 3 and first.records == again.records
    assert torch.equal(first.clip([0, 5]), again.clip([0, 5]))
    path.unlink()  # as if it had been killed
    assert len(data.open_clips(settings | dict(fps=50), path).frames) == 2 * 80


def write_many(folder, n, data=VIDEO, caption="clip {}"):
    for i in range(n):
        write(folder, f"{i:03}.mp4", data, caption.format(i).encode())


KILLED = """
import os, signal, sys
from pathlib import Path
from common import data
read_clip = data.read_clip
def killed(path, caption, settings, store):
    if path.name == "011.mp4":
        store.write(bytes(50_000))
        os.kill(os.getpid(), signal.SIGKILL)
    return read_clip(path, caption, settings, store)
data.read_clip = killed
data.open_clips(eval(sys.argv[1]), Path(sys.argv[2]))
"""


def in_a_process(code, *arguments, before=None):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                          preexec_fn=before)


def test_killed_while_it_reads_it_goes_on_with_the_next_clip(tmp_path, monkeypatch):
    clips = tmp_path / "clips"
    write_many(clips, 19)
    settings = settings_for(clips)
    path = tmp_path / "killed" / "frames.pt"
    assert in_a_process(KILLED, repr(settings), path).returncode == -signal.SIGKILL
    index = path.with_suffix(".jsonl")
    assert path.with_suffix(".bin").stat().st_size > 11 * 40 * 3 * 16 * 16 and not path.exists()
    index.write_text(index.read_text() + "[40")  # half a line
    monkeypatch.setattr(reader, "read_frames", Mock(wraps=reader.read_frames))
    data.open_clips(settings, path)
    assert reader.read_frames.call_count == 8
    data.open_clips(settings, tmp_path / "frames.pt")
    for name in "frames.bin", "frames.jsonl":
        assert (path.parent / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_full_disk_is_said_in_one_line(tmp_path):
    write(tmp_path)
    code = ("import sys; from pathlib import Path; from common import cli, data\n"
            "cli.run_script(lambda: data.open_clips(eval(sys.argv[1]), Path(sys.argv[2])))")
    settings = settings_for(tmp_path) | dict(size=(5, 256, 256))  # beyond a file object's buffer
    done = in_a_process(code, repr(settings), f"{tmp_path} run/frames.pt",
                        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000)))
    assert done.returncode == 2
    last, = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "cannot fill" in last and "smaller --size" in last


def test_what_cannot_be_used_is_counted_and_makes_no_clip_to_hold_out(tmp_path, capsys):
    write_many(tmp_path, 15, video(4), "clip")  # too short
    write_many(tmp_path, 3, caption="clip")
    for i in range(25):
        write(tmp_path, f"bad{i}.mp4", b"no video")
    clips = read(tmp_path)
    assert captions_of(clips, "train") and captions_of(clips, "test")
    told, skipped = capsys.readouterr()
    assert skipped.count("bad") == 10 and "skipped 25, Invalid data" in skipped
    assert "37 skipped" in told


def test_a_damaged_clip_that_is_used_is_named_and_not_called_skipped(tmp_path, capsys, monkeypatch):
    def damaged(path, fps, height, width):
        for i in range(20):
            yield np.full((3, height, width), 10 * i, np.uint8)
        raise ValueError("the rest is damaged")

    write(tmp_path)
    monkeypatch.setattr(reader, "read_frames", damaged)
    assert captions_of(read(tmp_path), "train")
    told, warned = capsys.readouterr()
    assert "a.mp4: damaged, read as far as it goes" in warned and "skipped" not in warned
    assert "1 clips and pictures, 0 skipped" in told


def windows_of(captions, counts, most, t=9):
    """-> [windows, (clip, place in it)] to train on, and to test on."""
    firsts = np.cumsum([0, *counts])
    clips = [data.Clip(None, *clip) for clip in zip(captions, firsts, counts)]
    chosen = []
    for records in data.choose_windows(clips, t, most):
        rows = np.array([record.row for record in records])
        numbers = np.searchsorted(firsts, rows, side="right") - 1
        assert [record.caption for record in records] == [captions[i] for i in numbers]
        chosen.append(np.stack([numbers, rows - firsts[numbers]], axis=1))
    return chosen


def test_every_twentieth_clip_is_held_out_whole():
    counts = np.arange(60) + 40
    train, test = windows_of(["a cat", "a dog"] * 30, counts, 100_000)
    assert set(test[:, 0]) == {10, 30, 50} and not set(test[:, 0]) & set(train[:, 0])
    assert len(train) == (counts - 8)[sorted(set(train[:, 0]))].sum()  # each window once


def test_where_every_clip_has_a_caption_of_its_own_none_is_held_out_whole():
    train, test = windows_of([str(i) for i in range(25)], [40] * 25, 1000)
    assert set(train[:, 0]) == set(test[:, 0]) == set(range(25))
    assert (train[:, 1].max(), test[:, 1].min()) == (22, 31)  # 9 frames from 22 on end before 31


def test_a_clip_too_short_to_be_tested_on_is_trained_on():
    train, test = windows_of(["a cat", "a dog"], [17, 18], 1000)
    assert train.tolist() == [*([0, i] for i in range(9)), [1, 0]] and test.tolist() == [[1, 9]]


def test_windows_are_spread_evenly_over_all_clips():
    train, test = windows_of(["a cat"] * 5, [300] * 5, 20)
    assert np.bincount(train[:, 0]).tolist() == [4] * 5 and len(test) == 2


def test_a_caption_that_training_does_not_know_is_not_tested(tmp_path):
    write(tmp_path)
    # It moves where it is tested alone, and nothing else is trained on.
    write(tmp_path, "b.mkv", video(suffix=".mkv", times=[0, *range(2000, 2200, 40)]), b"stands")
    clips = read(tmp_path)
    assert set(captions_of(clips)) == {"a clip"} and captions_of(clips, "test")


def test_windows_in_which_nothing_changes_are_counted_and_not_trained_on(tmp_path, capsys):
    write(tmp_path, "still.mkv", video(suffix=".mkv", times=[0, *range(2000, 2800, 40)]))
    clips = read(tmp_path)
    assert "; 46 in which nothing changes left out" in capsys.readouterr().out
    numbers = frame_numbers(clips, "train")
    assert len(numbers) == 13 and (numbers[:, 0] != numbers[:, -1]).all()


ROWS = [("b/one.mp4", "a first clip"), ("two.mp4", 'a "second", clip'), ("two.mp4", "once more"),
        ("three.mp4", "gone"), ("../x.mp4", "climbs"), ("/etc/passwd", "absolute"), ("b", "folder")]


TABLES = {  # with blank lines, and three ways to have no caption
    "metadata.csv": "\ufefftext,size,file_name\n\n,7,five.mp4\nNaN,7,six.mp4\n" + "".join(
        '"{}",7,{}\n\n'.format(text.replace('"', '""'), name) for name, text in ROWS),
    "metadata.jsonl": "\n\n".join(
        json.dumps(dict(file_name=name, text=text))
        for name, text in [*ROWS, ("five.mp4", None), ("six.mp4", float("nan"))])}


@pytest.mark.parametrize("table", TABLES)
def test_metadata_names_clips_and_their_captions(tmp_path, capsys, table):
    folder = tmp_path / "clips" / "train"
    for name in "b/one.mp4", "two.mp4", "four.mp4", "five.mp4", "six.mp4", "../../x.mp4":
        write(folder, name, caption=b"not this")
    (folder / table).write_text(TABLES[table], encoding="utf-8")
    clips = read(tmp_path / "clips")
    assert set(captions_of(clips)) == {"a first clip", 'a "second", clip'}
    told, skipped = capsys.readouterr()
    for word in ("a second caption: train/two.mp4", "but no clip: train/three.mp4", "x.mp4",
                 "passwd", "3, no caption: train/five.mp4, train/four.mp4, train/six.mp4"):
        assert word in skipped
    assert "metadata: 2 clips" in told and "8 skipped" in told


@pytest.mark.parametrize("table, text", [
    ("metadata.csv", "file_name;text\na.mp4;hello\n"), ("metadata.csv", "a\0b,\xff"),
    ("metadata.jsonl", "file_name,text\na.mp4,hello\n"), ("metadata.jsonl", '{"text": 1}\n'),
    ("metadata.jsonl", "[" * 100_000)])
def test_metadata_without_the_columns_is_refused(tmp_path, capsys, table, text):
    write(tmp_path)
    (tmp_path / table).write_text(text, encoding="latin-1")
    said = refused(tmp_path, capsys).splitlines()[-1]
    assert table in said and "needs the columns file_name and text" in said


def test_class_folders_give_their_names_as_captions(tmp_path, capsys):
    for name in "ApplyEyeMakeup", "brush_hair", "deep/YoYo", ".hidden":
        write(tmp_path, f"{name}/a.mp4", caption=None)
    write(tmp_path, "alone.mp4", caption=None)
    (tmp_path / "readme.txt").write_text("no clip has this name")
    clips = read(tmp_path)
    assert set(captions_of(clips)) == {"apply eye makeup", "brush hair", "yo yo"}
    told, skipped = capsys.readouterr()
    assert "class folders: 3 clips" in told and "1 skipped" in told
    assert "alone.mp4" in skipped


def test_text_files_count_in_every_folder_and_before_class_folders(tmp_path):
    write(tmp_path, "Cats/a.mp4", caption=b"a  cat\n")
    write(tmp_path, "Cats/more/b.MP4", caption=b"another cat")
    write(tmp_path, "Cats/c.mp4", caption=None)
    assert set(captions_of(read(tmp_path))) == {"a cat", "another cat"}


def test_links_and_what_cannot_be_entered_are_named(tmp_path, capsys, monkeypatch):
    clips = tmp_path / "clips"
    write(clips)
    write(clips, "closed/b.mp4")
    write(tmp_path, "elsewhere/b.mp4")
    for name, place in ("linked.mp4", "elsewhere/b.mp4"), ("set2", "elsewhere"), ("gone.mp4", "no"):
        (clips / name).symlink_to(tmp_path / place)
    for name in "linked", "gone":
        (clips / f"{name}.txt").write_text(name)
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert set(captions_of(read(clips))) == {"a clip", "linked"}
    told, skipped = capsys.readouterr()
    for word in ("2, a link to a folder, or to nothing: ", "set2", "gone.mp4",
                 "1, a caption without a clip: gone.txt", "1, an unreadable folder: closed"):
        assert word in skipped
    assert "4 skipped" in told


@pytest.mark.parametrize("has_table", [False, True])
@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_however_their_accents_are_written(tmp_path, has_table, form, other):
    write(tmp_path, unicodedata.normalize(form, "café.mp4"), caption=None)
    name = unicodedata.normalize(other, "café")
    if has_table:
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{name}.mp4,{name}\n", "utf-8")
    else:
        (tmp_path / f"{name}.txt").write_text(name, "utf-8")
    assert set(captions_of(read(tmp_path))) == {"café"}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_text_that_is_not_utf_8_is_called_that(tmp_path, capsys, name, encoding):
    write(tmp_path)
    text = "é" if encoding == "latin-1" else "a"
    (tmp_path / name).write_bytes(f"file_name,text\na.mp4,{text}\n".encode(encoding))
    said = refused(tmp_path, capsys)
    assert "UTF-8" in said and name in said


def test_a_file_replaced_by_one_of_equal_size_is_noticed(tmp_path):
    write(tmp_path, "long.mkv", bytes(300_000))
    write(tmp_path)
    seen = {data.describe_folder(str(tmp_path), Path("run"))}
    for name, place in ("a.txt", 3), ("a.mp4", 9), ("long.mkv", 0), ("long.mkv", 299_999):
        with open(tmp_path / name, "r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(data.describe_folder(str(tmp_path), Path("run")))
    assert len(seen) == 5


def test_words_keep_their_marks():
    for a, b in ("लाल", "लोल"), ("पीला", "पुल"), ("দিন", "দান"), ("สีแดง", "สีดำ"):
        assert len(data.words(a)) == len(data.words(b)) == 1 and data.words(a) != data.words(b)
    assert data.words("Cafe\u0301, \tÉTÉ_2 -- ❤️🎬") == ["café", "été", "2"]


def test_words_that_are_unknown_or_do_not_fit_are_named_and_left_out(capsys):
    vocabulary = ["<pad>", *"a red circle moving left video of".split()]
    captions = ["A red, CIRCLE", "a video of a turquoise circle moving left"]
    assert data.tokenize(captions, vocabulary, 5).tolist() == [[1, 2, 3, 0, 0], [1, 6, 7, 1, 3]]
    unknown, too_many = capsys.readouterr().err.splitlines()
    assert unknown.endswith(": turquoise") and too_many.endswith(": moving left")


def test_no_clip_leaves_files_or_filters_open(tmp_path, monkeypatch):
    write_many(tmp_path, 30, video(10), "one of")
    read_clip = data.read_clip
    alive = []

    def counted(*arguments):
        kinds = [type(x) for x in gc.get_objects()]
        alive.append(sum(kinds.count(kind) for kind in (av.filter.Graph, av.VideoFrame,
                                                        av.container.InputContainer)))
        return read_clip(*arguments)

    monkeypatch.setattr(data, "read_clip", counted)
    gc.collect()
    read(tmp_path)
    assert len(alive) == 30 and max(alive) <= 2


UNUSABLE = {
    "empty": dict(data=b""), "text": dict(data=b"no video"), "zeros": dict(data=bytes(50_000)),
    "truncated": dict(data=VIDEO[:len(VIDEO) // 2]), "too short": dict(data=video(4)),
    "escapes": dict(name="\x1b[31mred\n.mp4", data=b""),
    "a playlist": dict(name="a.m3u8", data=PLAYLIST),
    "a playlist in disguise": dict(data=PLAYLIST),
    "no caption": dict(caption=None), "an empty caption": dict(caption=b""),
    "Latin-1": dict(caption="é".encode("latin-1")), "too long": dict(caption=b"word " * 513),
    "NaN": dict(embedding=EMBEDDING * np.nan), "one dimension": dict(embedding=EMBEDDING[0]),
    "beyond float16": dict(embedding=EMBEDDING * 1e6), "no tokens": dict(embedding=EMBEDDING[:0]),
    "a damaged picture": dict(name="a.jpg", data=b"\xff\xd8\xff\xe0 is all"),
    "code": dict(embedding=np.array([[Code()]]))}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_clip_that_cannot_be_used_is_skipped(tmp_path, capsys, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("part.ts").write_bytes(PART)
    Path("clips").mkdir()
    write(Path("clips"), **UNUSABLE[kind])
    told = refused("clips", capsys)
    assert "skipped " in told and "error: no usable clip in clips" in told
    assert "\x1b[31m" not in told
    assert not Path("was run").exists()


PICTURE = Image.new("RGB", (20, 30), (255, 0, 0))  # red above, blue below, as it should be seen
PICTURE.paste((0, 0, 255), (0, 15, 20, 30))
TURNED = Image.Exif()
TURNED[0x0112] = 8  # how a phone was held: turn the picture left by a quarter


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_picture_is_trained_on_beside_clips_and_stands_upright(tmp_path, name):
    write(tmp_path, "video.mp4", caption=b"a video")
    lying = PICTURE.transpose(Image.Transpose.ROTATE_270)
    write(tmp_path, name, b"", b"red above")
    lying.save(tmp_path / name, exif=TURNED, quality=95)
    assert set(captions_of(read(tmp_path, picture_share=0.0))) == {"a video"}
    Path(f"{tmp_path} run", "frames.pt").unlink()
    clips = read(tmp_path)
    assert captions_of(clips, "picture") == ["red above"]
    assert set(captions_of(clips, "train")) == set(captions_of(clips, "test")) == {"a video"}
    picture = data.indices_of(clips.records, "picture")
    clip = clips.clip(picture)[0]  # [3, t, h, w]
    assert (clip == clip[:, :1]).all()  # it stands still
    red, _, blue = clip[:, 0]
    assert red[:6].min() > 0.8 > -0.8 > red[10:].max()
    assert blue[10:].min() > 0.8 > -0.8 > blue[:6].max()


def test_a_picture_of_16_bits_or_with_an_alpha_channel_is_read_as_it_is_seen(tmp_path):
    """From black to white: in 16 bits, and as black of less and less alpha."""
    grey = np.linspace(0, 1, 48)[None] * np.ones((48, 1))
    black = Image.new("RGBA", (48, 48))
    black.putalpha(Image.fromarray((255 - grey * 255).round().astype(np.uint8)))
    for image in Image.fromarray((grey * 65535).astype(np.uint16)), black:
        image.save(tmp_path / "a.png")
        row = reader.read_picture(tmp_path / "a.png", 24, 24)[:, 12].astype(int)
        assert np.abs(row - np.linspace(0, 255, 24)).max() < 6


def test_pictures_alone_are_clips_of_one_frame(tmp_path, capsys):
    for i in range(20):
        write(tmp_path, f"{i}.png", b"")
        PICTURE.save(tmp_path / f"{i}.png")
    assert "if --size begins with 1x" in refused(tmp_path, capsys)
    run = tmp_path.with_name("run")
    train("vae", run, "--data", str(tmp_path), "--size", "1x16x16")
    train("dit", run)
    latents = data.Latents(run / "latents.pt")
    assert (len(latents.train), len(latents.train_and_pictures), len(latents.test)) == (19, 19, 1)


def test_batches_of_pictures_are_drawn_from_pictures_and_clips_alike(tmp_path):
    folder = tmp_path / "clips"
    write(folder, "video.mp4", caption=b"a video")
    write(folder, "a.png", b"", b"red above")
    PICTURE.save(folder / "a.png")
    train("vae", tmp_path, "--data", str(folder), "--picture-share", "0.5")
    latents = data.Latents(tmp_path / "latents.pt")
    assert latents.metadata["captions"] == ["a video"]  # what scores ask for
    for is_pictures, captions in (False, {"a video"}), (True, {"a video", "red above"}):
        x0, prompts = latents.draw(training.step_generator(0), 99, 0.0, is_pictures)
        assert x0.shape[2] == (1 if is_pictures else 2)
        drawn = {" ".join(latents.metadata["vocabulary"][i] for i in row if i) for row in prompts}
        assert drawn == captions


def test_embeddings_lie_beside_their_clips_and_are_padded_with_zeros(tmp_path):
    write(tmp_path, "Cats/a.mp4", caption=None, embedding=EMBEDDING)
    write(tmp_path, "Dogs/a.mp4", caption=None, embedding=EMBEDDING[:1] * 2)
    for empty in [0, 0, 0, 0], [18, 18, 0, 0]:  # the caption that is empty
        sums = read(tmp_path).embeddings.sum(2)
        assert sums.tolist() == [[6, 6, 6, 6], [12, 0, 0, 0], empty]
        shutil.rmtree(f"{tmp_path} run")
        np.save(tmp_path / "empty.npy", EMBEDDING[:2] * 3)


@pytest.mark.parametrize("other, empty", [
    (None, EMBEDDING), (EMBEDDING[:, :2], EMBEDDING), (EMBEDDING, EMBEDDING[:, :2])])
def test_embeddings_that_do_not_fit_together_are_refused(tmp_path, capsys, other, empty):
    write(tmp_path, embedding=EMBEDDING)
    write(tmp_path, "b.mp4", caption=b"another", embedding=other)
    np.save(tmp_path / "empty.npy", empty)
    assert "must have as many channels" in refused(tmp_path, capsys)

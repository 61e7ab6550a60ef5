"""Folders of real clips: which files have which captions, and their frames as a player shows them:
upright, deinterlaced, with square pixels, at an even rate. FFmpeg's filters do that, inside PyAV,
whatever a container says of its frames."""
import contextlib
import csv
import io
import json
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
from einops import rearrange
from PIL import Image, ImageOps

from common import cli

# ------------------------------------------------------------ a folder of clips and captions

BESIDE = (".txt", ".npy", ".md", ".csv", ".json", ".jsonl")  # what lies beside clips


def is_picture(path):
    return path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")


def files_below(folder):
    """-> all files of a folder and its folders, in order, but for hidden ones; and {reason: paths}
    of what is left out. Linked folders are not entered: they lie elsewhere."""
    paths = []
    skipped = defaultdict(list)
    unreadable = []
    for root, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders + names:
            path = Path(root, name)
            if os.path.isfile(path) and not name.startswith("."):
                paths.append(path)
            elif path.is_symlink():
                skipped["a link to a folder, or to nothing"].append(path)
    skipped["an unreadable folder"] = [error.filename for error in unreadable]
    return sorted(paths), skipped


def read_text(path):
    """Raises ValueError where that is not UTF-8."""
    text = path.read_text("utf-8-sig")
    if "\0" in text:
        raise ValueError("a NUL, as in UTF-16")
    return text


def read_table(table):
    """metadata.csv or metadata.jsonl -> [(file name, caption)], "" for none"""
    try:
        text = read_text(table)
        if table.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(text, newline=""))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        pairs = [(str(row["file_name"]), str(row["text"])) for row in rows]
    except Exception as error:  # a file that is no table raises nearly anything
        cli.exit_with_error(f"cannot read {table}, which needs the columns file_name and text, in "
                            f"UTF-8: {type(error).__name__} {error}")
    empty = "none", "nan", ""
    return [(name, "" if caption.strip().lower() in empty else caption) for name, caption in pairs]


def nfc(text):
    """Accents composed into their letters: a Mac's names come composed or decomposed."""
    return unicodedata.normalize("NFC", str(text))


def find_clips(folder):
    """-> the layout; {path: caption}; and {reason: paths} of what is left out. The layout is that
    of the Hub, metadata.csv or metadata.jsonl; or name.txt beside each clip; or class folders,
    whose names are captions."""
    paths, skipped = files_below(folder)
    clips = {nfc(path): path for path in paths if path.suffix.lower() not in BESIDE}
    texts = {nfc(path.with_suffix("")): path for path in paths if path.suffix == ".txt"}
    beside = {path: texts.get(nfc(path.with_suffix(""))) for path in clips.values()}
    tables = [path for path in paths if path.name in ("metadata.csv", "metadata.jsonl")]
    captions = {}
    if tables:
        layout = "metadata"
        rows = [(table, *row) for table in tables for row in read_table(table)]
        for table, name, caption in rows:
            path = clips.get(nfc(table.parent / name))
            if path is None:  # nor is an absolute path, or one with ..
                skipped[f"in {table.name}, but no clip"].append(table.parent / name)
            elif path in captions:
                skipped["a second caption"].append(path)
            elif caption:
                captions[path] = caption
    elif any(beside.values()):
        layout = ".txt files"
        skipped["a caption without a clip"] += sorted({*texts.values()} - {*beside.values()})
        for path, text in beside.items():
            try:
                if text:
                    captions[path] = read_text(text)
            except (OSError, ValueError):
                skipped["a caption that cannot be read as UTF-8"].append(text)
    else:
        layout = "class folders"
        for path in beside:  # ApplyEyeMakeup, brush_hair
            if path.parent != Path(folder):
                spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_-]", " ", path.parent.name)
                captions[path] = spaced.lower()
    skipped["no caption"] += [path for path in beside if path not in captions]
    captions = {path: nfc(" ".join(caption.split())) for path, caption in captions.items()}
    return layout, captions, skipped


# ------------------------------------------------------------ frames, as a player shows them

# A clip folder may come from anywhere: no playlist in it may open other files, or the network.
CONTAINERS = {"protocol_whitelist": "file",
              "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg"}
LONGEST_STILL = 60  # seconds that a frame is shown for, at most: beyond, the clock has jumped


def upright(matrix):
    """A display matrix (x' = a·x + c·y, y' = b·x + d·y) -> the filters that turn and mirror."""
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    is_turned = abs(b) > abs(a)
    filters = [("transpose", "cclock_flip")] if is_turned else []  # x and y change places
    if (c if is_turned else a) < 0:
        filters.append(("hflip", ""))
    if (b if is_turned else d) < 0:
        filters.append(("vflip", ""))
    return filters


def build_graph(frame, aspect, fps, height, width):
    """FFmpeg's filters for frames like this one. aspect: the width of a pixel over its height."""
    prepare = [("yadif", "deint=interlaced")]
    pixels = "rgb24"
    if any(component.is_alpha for component in frame.format.components):
        prepare = [("format", "gbrap"), ("premultiply", "inplace=1")]
        pixels = "rgba"
    source = (f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:"
              f"time_base={frame.time_base}:pixel_aspect={aspect}")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    cover = f"{width}:{height}:force_original_aspect_ratio=increase:flags=area"
    filters = [
        ("buffer", source), *prepare,
        ("setpts", "PTS-STARTPTS"), ("fps", f"{fps}:round=up"),  # what is shown at time k / fps
        ("scale", "iw*sar:ih"), ("setsar", "1"), *(upright(matrix) if matrix else []),
        ("scale", cover), ("format", pixels), ("crop", f"{width}:{height}"), ("buffersink", "")]
    graph = av.filter.Graph()
    graph.threads = 1
    graph.link_nodes(*(graph.add(*named) for named in filters)).configure()
    return graph


def filtered(graph, frame):
    """Gives the filters a frame, or None at the end; yields what comes out: [3, h, w] uint8."""
    graph.push(frame)
    with contextlib.suppress(BlockingIOError, EOFError):  # they need more, or have ended
        while True:
            image = graph.pull().to_ndarray()
            color, alpha = np.split(image, [3], axis=2)
            if alpha.size:  # over white; colours are multiplied with alpha already
                color = np.minimum(color, alpha) + (255 - alpha)
            yield rearrange(color, "h w rgb -> rgb h w")


def read_frames(path, fps, height, width):
    """Yields the frames [3, h, w] uint8 of a video, so many per second: deinterlaced, upright, with
    square pixels, scaled to cover height x width and centre-cropped; of a picture its one."""
    if is_picture(path):
        yield read_picture(path, height, width)
        return
    with av.open(f"file:{path}", options=CONTAINERS) as container:
        stream = container.streams.best("video")  # the default one, and no cover picture
        if stream is None:
            raise ValueError("no video in it")
        stream.thread_type = "AUTO"
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or "1/1"
        graph = None
        known = None
        last = 0  # when the frame before is shown
        due = 0  # when it ends
        for frame in container.decode(stream):
            if frame.pts is None or container.format.name == "avi":  # which has no other times
                frame.pts = due if frame.dts is None else frame.dts
            kind = frame.width, frame.height, frame.format.name
            gap = (frame.pts - last) * frame.time_base  # seconds
            if kind != known or not -1 < gap < LONGEST_STILL:  # filters take one kind, one clock
                if graph:
                    yield from filtered(graph, None)
                graph = build_graph(frame, aspect, fps, height, width)
                known = kind
            frame.duration = min(frame.duration, int(LONGEST_STILL / frame.time_base))
            last = frame.pts
            due = last + frame.duration
            yield from filtered(graph, frame)
        if graph:
            yield from filtered(graph, None)


def read_picture(path, height, width):
    """A picture file -> [3, h, w] uint8: upright, over white, scaled to cover that and cropped."""
    with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, of which convert() would keep what is below 256
            image = Image.fromarray((np.array(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (width, height))
    return rearrange(np.array(image), "h w rgb -> rgb h w")

"""Data: rendered shapes, folders of real clips, captions, and the latents on disk.

A data set is a list of records; each has a caption and a split. `clip(indices)` gives the pixels of
records, and vae.py writes their latents once, with everything that later stages need:

    open_clips(settings, path) -> Shapes or Folder     records, clip(indices) in [-1, 1]
    save_latents(...)          -> latents.pt           latents, records, captions as token ids
    Latents(path)              -> for dit.py and on    x0(indices), draw(...), metadata
"""
import csv
import json
import math
import os
import re
import shutil
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch.nn.utils.rnn import pad_sequence

from common import cli, files, training

# split: "train", "picture" (trained on beside first frames) or "test"; row: where its pixels are.
Record = namedtuple("Record", "caption split row")


def indices_of(records, *splits):
    """The indices of the records of these splits, a tensor."""
    return torch.tensor([i for i, record in enumerate(records) if record.split in splits]).long()


# ------------------------------------------------------------ rendered shapes

COLORS = {"red": (.9, .1, .1), "green": (.1, .9, .1), "blue": (.1, .1, .9),
          "yellow": (.9, .9, .1), "magenta": (.9, .1, .9), "cyan": (.1, .9, .9)}
SHAPES = ("circle", "square", "triangle", "bar")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TEST_CLIPS = 512


def shape_coverage(x, y, radius):
    """Coverage of each pixel by every shape, anti-aliased: [..., shapes] in [0, 1]. x, y: distance
    to the shape's centre, and radius, in pixels."""
    ax = x.abs()
    ay = y.abs()
    circle = torch.hypot(x, y) - radius
    square = torch.maximum(ax, ay) - 0.87 * radius
    triangle = torch.maximum(y - 0.6 * radius, 0.866 * ax - 0.5 * y - 0.6 * radius)
    bar = torch.maximum(ax - 1.1 * radius, ay - 0.45 * radius)
    return (0.5 - torch.stack([circle, square, triangle, bar], dim=-1)).clamp(0, 1)


class Shapes:
    """Rendered clips of one moving shape; the caption names colour, shape and direction, and
    nothing else. Clip i is a fixed function of (seed, clips, i).

    One combination in eight is held out of training, chosen so that every pair (colour, shape),
    (shape, direction), (colour, direction) is still seen: scores on these show composition. Test
    clips show every combination, those too."""

    embeddings = None

    def __init__(self, frames, height, width, clips, seed):
        self.size = frames, height, width
        combinations = torch.cartesian_prod(  # [96, (colour, shape, direction)]
            *(torch.arange(len(names)) for names in (COLORS, SHAPES, DIRECTIONS)))
        color, shape, direction = combinations.T
        is_held_out = (color + 2 * shape + 3 * direction) % 8 == 0
        seen = combinations[~is_held_out]
        # Two streams, so that asking for more training clips leaves the test clips as they are.
        train_generator = torch.Generator().manual_seed(2 * seed)
        test_generator = torch.Generator().manual_seed(2 * seed + 1)
        train = seen[torch.randint(len(seen), (clips,), generator=train_generator)]
        test = combinations[torch.arange(TEST_CLIPS) % len(combinations)]
        self.combinations = torch.cat([train, test])  # [n, 3], one per record
        self.uniform = torch.cat([torch.rand(clips, 5, generator=train_generator),
                                  torch.rand(TEST_CLIPS, 5, generator=test_generator)])
        splits = ["train"] * clips + ["test"] * TEST_CLIPS
        self.records = [Record(self.caption(self.combinations[row]), split, row)
                        for row, split in enumerate(splits)]
        self.held_out_captions = sorted(self.caption(c) for c in combinations[is_held_out])

    @staticmethod
    def caption(combination):
        color, shape, direction = combination.tolist()
        return f"a {list(COLORS)[color]} {SHAPES[shape]} moving {list(DIRECTIONS)[direction]}"

    def clip(self, indices):
        """Renders clips: [b, 3, t, h, w] in [-1, 1]."""
        t, h, w = self.size
        color, shape, direction = self.combinations[indices].T
        for_radius, for_speed, for_x, for_y, for_ground = rearrange(
            self.uniform[indices], "b five -> five b 1 1 1")
        small = min(h, w)
        radius = small * (0.18 + 0.06 * for_radius)
        speed = small * (0.25 + 0.15 * for_speed)  # pixels per clip
        travel = speed * torch.linspace(-0.5, 0.5, t)[:, None, None]  # [b, t, 1, 1]
        heading = torch.tensor(list(DIRECTIONS.values()))[direction].float()

        def centre(position, extent, along):
            """position in [0, 1] -> pixels, such that the whole path lies inside the picture."""
            along = along[:, None, None, None]
            room = extent - 2.4 * radius - speed * along.abs()  # a triangle's tip is at 1.2 radii
            return extent / 2 + (position - 0.5) * room + travel * along

        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        x = x - centre(for_x, w, heading[:, 0])  # [b, t, h, w], from the subject's centre
        y = y - centre(for_y, h, heading[:, 1])
        coverage = shape_coverage(x, y, radius)  # [b, t, h, w, shapes]
        coverage = coverage[torch.arange(len(shape)), ..., shape][..., None]  # [b, t, h, w, 1]
        ground = (0.1 + 0.4 * for_ground)[..., None]  # grey: only the subject has a colour
        rgb = torch.tensor(list(COLORS.values()))[color][:, None, None, None]
        pixels = coverage * rgb + (1 - coverage) * ground
        return rearrange(pixels, "b t h w c -> b c t h w") * 2 - 1


# ------------------------------------------------------------ a folder of real clips

# A clip folder may come from anywhere: no playlist in it may open other files, or the network.
CONTAINERS = {"protocol_whitelist": "file",
              "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # a video of one frame each
BESIDE = (".txt", ".npy", ".md", ".csv", ".json", ".jsonl")  # what lies beside clips


def files_below(folder):
    """All files of a folder and its folders, in order, but for hidden ones."""
    paths = sorted(Path(folder).rglob("*"))
    return [path for path in paths if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def read_table(table):
    """metadata.csv or metadata.jsonl -> [(path, caption)]"""
    with files.reading(table), open(table, encoding="utf-8-sig", newline="") as file:
        if table.suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            rows = [dict(json.loads(line)) for line in file]
    if not rows or not all({"file_name", "text"} <= row.keys() for row in rows):
        cli.exit_with_error(f"{table} needs the columns file_name and text")
    return [(table.parent / str(row["file_name"]), row["text"]) for row in rows]


def find_clips(folder):
    """-> the layout; {path: caption, or the file that holds it}; and a line for each clip without a
    caption, and the other way round. The layout is that of the Hub, metadata.csv or metadata.jsonl;
    or name.txt beside each clip; or class folders, whose names are captions."""
    skipped = []
    paths = dict.fromkeys(files_below(folder))  # a set that keeps its order
    clips = dict.fromkeys(path for path in paths if path.suffix.lower() not in BESIDE)
    captions = {}
    beside = {path: path.with_suffix(".txt") for path in clips}
    tables = [path for path in paths if path.name in ("metadata.csv", "metadata.jsonl")]
    if tables:
        layout = "metadata"
        for table in tables:
            for path, caption in read_table(table):
                if path not in clips:  # nor is an absolute path, or one with ..
                    skipped.append(f"{path}: a row of {table}, but no clip in this folder")
                elif path in captions:
                    skipped.append(f"{path}: a second caption")
                else:
                    captions[path] = "" if caption is None else str(caption)
    elif any(text in paths for text in beside.values()):
        layout = ".txt files"
        captions = {path: text for path, text in beside.items() if text in paths}
    else:
        layout = "class folders"
        for path in clips:  # ApplyEyeMakeup, brush_hair
            if path.parent != Path(folder):
                spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_-]", " ", path.parent.name)
                captions[path] = spaced.lower()
    skipped += [f"{path}: no caption" for path in clips if path not in captions]
    return layout, captions, skipped


def read_embedding(path):
    """name.npy, [tokens, dim]; None where there is none. Memory-mapped: a false header cannot
    allocate."""
    path = path.with_suffix(".npy")
    if not path.exists():
        return None
    with np.errstate(over="ignore"):
        array = np.lib.format.open_memmap(path, "r").astype(np.float32)
    if array.ndim != 2 or not array.size or not (np.abs(array) <= 65504).all():
        raise ValueError(f"{path.name} is no array [tokens, dim] of finite float16 numbers")
    return torch.from_numpy(array)


# Of a file: frames is their number; dim, the channels of its embedding, or None.
Clip = namedtuple("Clip", "path caption frames seconds dim")


def look_at(path, caption, least):
    """-> the Clip. Decodes nothing. Raises where it cannot be used, as with fewer frames than
    `least`."""
    if isinstance(caption, Path):
        caption = caption.read_text(encoding="utf-8-sig")
    caption = " ".join(caption.split())
    if not 0 < len(re.findall(r"\w+", caption)) <= 512:
        raise ValueError("a caption takes 1 to 512 words")
    embedding = read_embedding(path)
    dim = None if embedding is None else embedding.shape[1]
    if path.suffix.lower() in PICTURES:
        return Clip(path, caption, 1, 0.0, dim)
    import av  # here, since rendered clips do not need it

    with av.open(f"file:{path}", options=CONTAINERS) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate)  # read here: a closed container tells nothing
        frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if frames < least:
        raise ValueError(f"{frames} frames, where {least} are the least")
    return Clip(path, caption, frames, frames / rate, dim)


def upright(frame, scaler, height, width):
    """A decoded frame -> [3, height, width] uint8: scaled to cover that and centre-cropped."""
    turns = round(frame.rotation / 90)  # how a phone was held
    if turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    h = round(frame.height * scale)
    w = round(frame.width * scale)
    image = scaler.reformat(frame, w, h, "rgb24", interpolation="AREA", threads=1).to_ndarray()
    top = (h - height) // 2
    left = (w - width) // 2
    image = np.rot90(image[top:top + height, left:left + width], turns)
    return rearrange(image, "h w rgb -> rgb h w")


def read_frames(path, places, height, width):
    """Yields (place, frame) of a video, frames [3, height, width] uint8. places: which, rising. One
    that is more than 250 behind the last is sought; then it and those after it, up to the next such
    gap, shift back by as much as lies between it and its keyframe, which must be decoded anyway.
    Raises ValueError where the video ends too early."""
    import av
    from av.video.reformatter import VideoReformatter

    with av.open(f"file:{path}", options=CONTAINERS) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1  # it is clips that are read in parallel
        # Only these tell when a frame is shown; in others frames are counted, and none is sought.
        has_times = container.format.name.startswith(("mov", "matroska"))
        per_tick = float(stream.average_rate * stream.time_base)  # frames
        start = stream.start_time or 0
        scaler = VideoReformatter()
        frames = container.decode(stream)
        position = -1  # of `frame`
        shift = 0
        for previous, place in zip([0, *places], places):
            if has_times and place > previous + 250:
                container.seek(start + int(place / per_tick), stream=stream)
                frames = container.decode(stream)
                frame = next(frames)
                keyframe = round((frame.pts - start) * per_tick)
                shift = place - keyframe if keyframe > position else 0  # never back into windows
                position = keyframe
            while position < place - shift:
                frame = next(frames, None)
                if frame is None:
                    raise ValueError(f"it ends before frame {place}")
                position += 1
                if has_times:
                    position = round((frame.pts - start) * per_tick)
            yield place, upright(frame, scaler, height, width)


def read_picture(path, height, width):
    """A picture file -> [3, height, width] uint8: upright, scaled to cover that and cropped."""
    from PIL import Image, ImageOps

    with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    return rearrange(np.array(ImageOps.fit(image, (width, height))), "h w rgb -> rgb h w")


def read_clip(path, windows, stride, pixels, done):
    """Decodes the windows of one clip, {window: first frame}, into pixels [windows, t, 3, h, w]. A
    picture is a clip that stands still."""
    rows = list(windows)
    if done[rows].all():
        return
    _, t, _, h, w = pixels.shape
    if path.suffix.lower() in PICTURES:
        pixels[rows] = read_picture(path, h, w)
    else:
        wanted = {}  # frame -> its places in `pixels`
        for window, first in windows.items():
            for k in range(t):
                wanted.setdefault(first + k * stride, []).append((window, k))
        for frame, image in read_frames(path, sorted(wanted), h, w):
            for place in wanted[frame]:
                pixels[place] = image
    done[rows] = 1


def in_parallel(function, items, what):
    """-> function(*item) of all items, by several threads, but for those with which it raises; and
    a line for each of these."""
    def attempt(item):
        try:
            return function(*item), None
        except Exception as error:  # PyAV raises dozens of kinds
            return None, f"{item[0]}: {error}"

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = list(cli.progress(pool.map(attempt, items), desc=what, total=len(items)))
    finally:  # `with` would wait for all items, after Ctrl-C too
        pool.shutdown(cancel_futures=True)
    errors = [error for _, error in results if error]
    return [result for result, error in results if not error], errors


def spread(counts, firsts, most):
    """At most so many of all windows, evenly spread, without a list of them all. counts: windows of
    each clip; firsts: the first frame of its first one. -> [n, 2]: clip, first frame"""
    ends = counts.cumsum()
    places = np.linspace(0, ends[-1] - 1, min(most, ends[-1])).round().astype(int)
    clips = np.searchsorted(ends, places, side="right")
    return np.stack([clips, places - (ends - counts)[clips] + firsts[clips]], axis=1)


def held_out(captions):
    """Which clips are held out whole, a bool each: of 20 or more every twentieth, if another one
    has its caption."""
    clips_with = Counter(captions)
    has_twin = np.array([clips_with[caption] > 1 for caption in captions], dtype=bool)
    is_twentieth = np.arange(len(captions)) % 20 == 10
    return has_twin & is_twentieth & (len(captions) >= 20)


def choose_windows(captions, frames, span, most):
    """Windows of `span` frames to train on, at most so many, and to test on, [n, 2] each: clip,
    first frame. Where no clip is held out whole, the last tenth of each is. captions, frames: of
    all clips. A caption that is not trained on is no test."""
    is_test = held_out(captions)
    windows = frames - span + 1
    start = np.zeros_like(frames)
    most_tests = min(TEST_CLIPS, max(1, most // 10))
    if is_test.any():
        train = spread(np.where(is_test, 0, windows), start, most)
        test = spread(np.where(is_test, windows, 0), start, most_tests)
    else:
        test_start = frames - np.maximum(span, frames // 10)
        train = spread(test_start - span + 1, start, most)
        test = spread(windows - test_start, test_start, most_tests)
    trained = {captions[clip] for clip in train[:, 0]}
    return train, test[[captions[clip] in trained for clip in test[:, 0]]]


def map_store(path, shape):
    """-> pixels uint8 `shape`, and which of its windows are done: one file, mapped."""
    pixels = math.prod(shape)
    store = torch.from_numpy(np.memmap(path, np.uint8, "r+", shape=(pixels + shape[0],)))
    return store[:pixels].view(shape), store[pixels:]


def allocate(path, n_bytes):
    """Makes a file. A full disk shows now, not as a crash while it is mapped."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        file.truncate(n_bytes)


def usable_clips(folder, span, picture_share):
    """-> the clips and the pictures of a folder, two lists of Clip; says what was found. span:
    frames that a window reaches over."""
    layout, found, skipped = find_clips(folder)
    items = [(file, caption, span) for file, caption in found.items()]
    usable, errors = in_parallel(look_at, items, "looking at clips")
    skipped += errors
    clips = [clip for clip in usable if clip.frames >= span]
    pictures = [clip for clip in usable if clip.frames < span]
    if pictures and not picture_share:
        cli.warn(f"{len(pictures):,} pictures are left out, since --picture-share is 0")
        pictures = []
    if not held_out([clip.caption for clip in clips]).any():
        # Each has a window to train on and one to test on.
        skipped += [f"{clip.path}: {clip.frames} frames, where {2 * span} are the least"
                    for clip in clips if clip.frames < 2 * span]
        clips = [clip for clip in clips if clip.frames >= 2 * span]
    for line in skipped[:10]:
        cli.warn(f"skipped {line}")
    if not clips:
        cli.exit_with_error(
            f"no usable clip in {folder}: it needs videos with a caption each, such as frog.mp4 "
            "and frog.txt (20 pictures alone will do, if --size begins with 1x)")
    _, captions, _, seconds, dims = zip(*clips, *pictures)
    print(f"{layout}: {len(clips):,} clips and {len(pictures):,} pictures with "
          f"{len(set(captions)):,} captions, {sum(seconds) / 3600:.3g} hours; {len(skipped):,} "
          "skipped")
    if len(set(dims)) > 1:
        cli.exit_with_error(f"the .npy embeddings in {folder} must have as many channels, one for "
                            "every clip and picture")
    return clips, pictures


def prepare_store(path, n_bytes):
    """Makes the file of the windows, unless it is there, half-read; removes those of other
    settings."""
    for old in path.parent.glob("windows-*.bin"):
        if old != path:
            old.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    print(f"{n_bytes / 1e9:.3g} GB in {path}; {free / 1e9:.3g} GB are free")
    if not path.exists() or path.stat().st_size != n_bytes:
        if n_bytes > free:
            cli.exit_with_error("the disk is too small: take fewer --clips or a smaller --size")
        allocate(path, n_bytes)


def store_windows(settings, path):
    """Chooses windows of a folder's clips, decodes them into one file, and writes `path`,
    windows.pt, which names it. Stopped and called again, it goes on."""
    t, h, w = settings["size"]
    span = (t - 1) * settings["stride"] + 1
    most = settings["clips"]
    clips, pictures = usable_clips(settings["data"], span, settings["picture_share"])
    paths, captions, frames, _, dims = zip(*clips, *pictures)
    n = len(clips)
    train, test = choose_windows(captions[:n], np.array(frames[:n]), span, most)
    some = np.linspace(n, n + len(pictures) - 1, min(most, len(pictures))).round().astype(int)
    stills = [(picture, 0) for picture in some.tolist()]
    windows = [*train.tolist(), *stills, *test.tolist()]  # (clip, first frame) of each row
    splits = ["train"] * len(train) + ["picture"] * len(stills) + ["test"] * len(test)
    print(f"{len(train):,} windows of {t} frames and {len(stills):,} pictures to train on, "
          f"{len(test):,} windows to test")

    shape = len(windows), t, 3, h, w
    key = zlib.crc32(repr((settings, windows)).encode())
    store = path.with_name(f"windows-{key:08x}.bin")
    prepare_store(store, math.prod(shape) + len(windows))
    pixels, done = map_store(store, shape)
    rows_of_clip = {}  # clip -> {row: first frame}
    for row, (clip, first) in enumerate(windows):
        rows_of_clip.setdefault(clip, {})[row] = first
    items = [(paths[clip], rows, settings["stride"], pixels.numpy(), done.numpy())
             for clip, rows in rows_of_clip.items()]
    _, unreadable = in_parallel(read_clip, items, "reading clips")
    for line in unreadable[:10]:
        cli.warn(f"skipped {line}")

    records = []
    path_of = {}  # caption that is trained on -> one of its clips
    for row, ((clip, _), split) in enumerate(zip(windows, splits)):
        if done[row] and (split != "test" or captions[clip] in path_of):
            records.append(Record(captions[clip], split, row))
            path_of.setdefault(captions[clip], paths[clip])
    if {"train", "test"} - {record.split for record in records}:
        cli.exit_with_error(f"no usable clip in {settings['data']}: nothing to train on, or "
                            "nothing to test on")
    embeddings = None
    if dims[0]:
        embeddings = read_embeddings(settings["data"], path_of)
    files.save(path, stage="windows", settings=settings, store=store.name, shape=shape,
               records=[tuple(record) for record in records], embeddings=embeddings)


def read_embeddings(folder, path_of):
    """Of the captions, in order, and of the empty one, empty.npy: [captions + 1, tokens, dim],
    float16, padded with zeros. path_of: {caption: a clip that has it}."""
    arrays = [read_embedding(path_of[caption]).half() for caption in sorted(path_of)]
    path = Path(folder, "empty.npy")
    with files.reading(path):
        empty = read_embedding(path) if path.exists() else torch.zeros(1, arrays[0].shape[1])
        return pad_sequence([*arrays, empty.half()], batch_first=True)


class Folder:
    """Windows of real videos, decoded once into one mapped file: memory does not grow with their
    number, and no later start decodes again."""

    held_out_captions = []

    def __init__(self, settings, path):
        names = "data", "size", "stride", "clips", "folder", "picture_share"
        settings = {name: settings[name] for name in names}
        if cli.is_main_process and not path.exists():
            store_windows(settings, path)
        training.wait_for_all()
        saved = files.load(path, "windows")
        files.check_settings(path, saved["settings"], settings)
        with files.reading(path):
            self.pixels, _ = map_store(path.with_name(saved["store"]), saved["shape"])
            self.records = [Record(*record) for record in saved["records"]]
            self.embeddings = saved["embeddings"]

    def clip(self, indices):
        """Windows: [b, 3, t, h, w] in [-1, 1]."""
        pixels = self.pixels[[self.records[i].row for i in indices]]
        return rearrange(pixels, "b t c h w -> b c t h w").float() / 127.5 - 1


def open_clips(settings, path):
    """settings: of vae.py; path: where windows of real videos lie, or will. -> records;
    clip(indices), their pixels; held_out_captions; embeddings of the captions that are trained on,
    in order, and of the empty one, [captions + 1, tokens, dim], or None."""
    if settings["data"] == "shapes":
        return Shapes(*settings["size"], settings["clips"], settings["seed"])
    return Folder(settings, path)


def describe_folder(data, run):
    """Some words that change with the names and sizes of a folder's files; None for `shapes`."""
    if data == "shapes":
        return None
    if not Path(data).is_dir():
        cli.exit_with_error(f"--data {data} is neither `shapes` nor a folder")
    if run.resolve().is_relative_to(Path(data).resolve()):
        cli.exit_with_error(f"--run {run} lies in --data {data}, and would be taken for clips: put "
                            "it outside")
    paths = files_below(data)
    listing = repr([(path, path.stat().st_size) for path in paths])
    return f"{len(paths)} files, checksum {zlib.crc32(listing.encode()):08x}"


# ------------------------------------------------------------ captions

PAD = 0  # a caption of padding alone is the empty caption of classifier-free guidance


def words(caption):
    """'A red circle' -> ['a', 'red', 'circle']"""
    return re.findall(r"\w+", caption.lower())


def tokenize(captions, vocabulary, length):
    """Captions -> token ids [b, length], cut or padded. Words that training never saw are named
    and left out; a caption of nothing else is refused: it would give the clip of no caption."""
    token_id = {word: i for i, word in enumerate(vocabulary)}
    unknown = set(words(" ".join(captions))) - set(token_id)
    if unknown:
        cli.warn(f"warning: not in the training captions, so left out: "
                 f"{', '.join(sorted(unknown))}")
    rows = []
    for caption in captions:
        row = [token_id[word] for word in words(caption) if word in token_id][:length]
        if not row:
            cli.exit_with_error(f"no word of '{caption[:100]}' is known; known are: "
                                f"{', '.join(vocabulary[1:20])}")
        rows.append(row + [PAD] * (length - len(row)))
    return torch.tensor(rows)


# ------------------------------------------------------------ the latents on disk


def save_latents(path, clips, latents, mean, std, **more):
    """Writes latents.pt: latents [n, c, t, h, w] of all records of `clips`, their mean and std per
    channel [c], and the captions as the DiT takes them."""
    trained = sorted({record.caption for record in clips.records if record.split != "test"})
    captions = sorted({record.caption for record in clips.records})
    vocabulary = ["<pad>", *sorted(set(words(" ".join(trained))))]
    prompts = clips.embeddings  # [captions + 1, tokens, dim], the last is the empty caption's
    if prompts is None:
        text_tokens = max(len(words(caption)) for caption in trained)
        empty = torch.full((1, text_tokens), PAD)
        prompts = torch.cat([tokenize(captions, vocabulary, text_tokens), empty])
    files.save(path, stage="latents", latents=latents, mean=mean, std=std, prompts=prompts,
               captions=captions, vocabulary=vocabulary,
               held_out_captions=clips.held_out_captions, checksum=files.checksum([latents]),
               records=[tuple(record) for record in clips.records], **more)


class Latents:
    """latents.pt, normalised to mean 0 and std 1 per channel, with the captions as the DiT takes
    them. The latents stay on disk: what is not asked for is not in memory."""

    def __init__(self, path):
        self.path = path
        self.checkpoint = files.load(path, "latents")
        if "train_clips" in self.checkpoint:
            cli.exit_with_error(f"{path} is of an earlier version of this project: take another "
                                "--run, or delete it and vae.pt, and start with vae.py")
        with files.reading(path):
            self.latents = self.checkpoint["latents"]  # [n, c, t, h, w]
            self.checksum = self.checkpoint["checksum"]
            self.mean = self.checkpoint["mean"].view(-1, 1, 1, 1)
            self.std = self.checkpoint["std"].view(-1, 1, 1, 1)
            self.on_shapes = self.checkpoint["config"]["data"] == "shapes"
            self.records = [Record(*record) for record in self.checkpoint["records"]]
            self.train = indices_of(self.records, "train")
            self.train_and_pictures = indices_of(self.records, "train", "picture")
            self.test = indices_of(self.records, "test")
            # Token ids [captions + 1, m], or embeddings [captions + 1, m, dim], mapped in float16.
            self.prompts = self.checkpoint["prompts"]
            self.row_of = {name: i for i, name in enumerate(self.checkpoint["captions"])}
            self.prompt_rows = torch.tensor([self.row_of[r.caption] for r in self.records])
            self.text_dim = self.prompts.shape[2] if self.prompts.ndim == 3 else 0
            self.empty = self.cast(self.prompts[-1])
            # What a checkpoint needs beside the weights, so that sampling needs no data set.
            self.metadata = dict(
                vocabulary=self.checkpoint["vocabulary"], text_tokens=self.prompts.shape[1],
                captions=sorted({self.records[i].caption for i in self.train}),
                held_out_captions=self.checkpoint["held_out_captions"],
                latent_shape=list(self.latents.shape[1:]),
                vae_checksum=self.checkpoint["vae_checksum"])
            self.x0(self.train[:1])  # raises if mean and std do not fit the latents

    @staticmethod
    def cast(prompts):
        """float16 does not mix with autocast's bfloat16: cast once, where prompts leave the file.
        Token ids stay as they are."""
        return prompts.float() if prompts.is_floating_point() else prompts

    def prompts_of(self, captions):
        """Token ids [b, m], or embeddings [b, m, dim], of captions that are in the file."""
        for caption in captions:
            if caption not in self.row_of:
                cli.exit_with_error(f"there is no embedding for '{caption}', only for "
                                    f"{'; '.join(self.row_of)}")
        return self.cast(self.prompts[[self.row_of[caption] for caption in captions]])

    def x0(self, indices):
        """Clean latents [b, c, t, h, w] of these records."""
        return (self.latents[torch.as_tensor(indices)].float() - self.mean) / self.std

    def draw(self, generator, batch_size, cfg_dropout, is_pictures):
        """A random batch -> x0 [b, c, t, h, w] and prompts [b, m], a fraction cfg_dropout of them
        empty for classifier-free guidance. is_pictures: first latent frames alone, of pictures and
        clips alike."""
        pool = self.train_and_pictures if is_pictures else self.train
        picked = pool[torch.randint(len(pool), (batch_size,), generator=generator)]
        prompts = self.cast(self.prompts[self.prompt_rows[picked]])
        prompts[torch.rand(batch_size, generator=generator) < cfg_dropout] = self.empty
        x0 = self.x0(picked)
        return (x0[:, :, :1] if is_pictures else x0), prompts

"""Data: rendered shapes, folders of real clips, captions, and the latents on disk.

A data set is a list of records; each has a caption and a split. `clip(indices)` gives the pixels of
records, and vae.py writes their latents once, with everything that later stages need:

    open_clips(settings, path) -> Shapes or Folder     records, clip(indices) in [-1, 1]
    save_latents(...)          -> latents.pt           latents, records, captions as token ids
    Latents(path)              -> for dit.py and on    x0(indices), draw(...), metadata
"""
import contextlib
import errno
import gc
import json
import os
import shutil
import unicodedata
import zlib
from bisect import bisect
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch.nn.utils.rnn import pad_sequence

from common import cli, files, reader, training

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


def shape_coverage(shape, x, y, radius):
    """Coverage of each pixel by a shape of SHAPES, anti-aliased, in [0, 1]. x, y: offset from the
    shape's centre, to the right and down; and radius; all in pixels, of shapes that broadcast."""
    if shape == "circle":
        outside = torch.hypot(x, y) - radius
    elif shape == "square":
        outside = torch.maximum(x.abs(), y.abs()) - 0.87 * radius
    elif shape == "triangle":
        sides = 0.866 * x.abs() - 0.5 * y - 0.6 * radius
        outside = torch.maximum(y - 0.6 * radius, sides)
    else:  # bar
        outside = torch.maximum(x.abs() - 1.1 * radius, y.abs() - 0.45 * radius)
    return (0.5 - outside).clamp(0, 1)


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
            """position in [0, 1] -> pixels [b, t, 1, 1], such that the whole path lies inside the
            picture."""
            along = along[:, None, None, None]
            room = extent - 2.4 * radius - speed * along.abs()  # a triangle's tip is at 1.2 radii
            return extent / 2 + (position - 0.5) * room + travel * along

        # Each pixel's offset from the subject's centre, [b, t, 1, w] and [b, t, h, 1].
        x = torch.arange(w) + 0.5 - centre(for_x, w, heading[:, 0])
        y = (torch.arange(h) + 0.5)[:, None] - centre(for_y, h, heading[:, 1])
        coverage = torch.stack([shape_coverage(SHAPES[shape[i]], x[i], y[i], radius[i])
                                for i in range(len(shape))])[:, None]  # [b, 1, t, h, w]
        ground = (0.1 + 0.4 * for_ground)[:, None] * 2 - 1  # grey: only the subject has a colour
        rgb = torch.tensor(list(COLORS.values()))[color][..., None, None, None] * 2 - 1
        return ground + coverage * (rgb - ground)


# ------------------------------------------------------------ a folder of real clips


def read_embedding(path):
    """name.npy, [tokens, dim]; None where there is none. Memory-mapped: a false header cannot
    allocate."""
    path = path.with_suffix(".npy")
    if not path.exists():
        return None
    array = np.lib.format.open_memmap(path, "r")
    if array.ndim != 2 or not array.size or not (np.abs(array) <= 65504).all():
        raise ValueError("its .npy is no array [tokens, dim] of finite float16 numbers")
    return torch.from_numpy(array.astype(np.float32))


def read_clip(path, caption, settings, store):
    """Appends a clip's frames to an open file; of a damaged clip those before the damage. -> their
    number, and what is wrong or None. Raises OSError on a full disk."""
    _, height, width = settings["size"]
    count = 0
    try:
        if not 0 < len(words(caption)) <= 512:
            raise ValueError("a caption takes 1 to 512 words")
        read_embedding(path)  # raises if the clip's own is damaged
        for image in reader.read_frames(path, settings["fps"], height, width):
            store.write(image.tobytes())
            count += 1
    except Exception as error:  # PyAV raises dozens of kinds
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # the store's, not the clip's
        reason = getattr(error, "strerror", None) or str(error).replace(str(path), "it")
        return count, "damaged, read as far as it goes" if count else reason
    return count, None


def read_clips(settings, captions, path):
    """Decodes clips, {path: caption}, one after the other into the file `path`. Killed and called
    again, it goes on with the next clip. -> what read_clip says of each"""
    _, height, width = settings["size"]
    index = path.with_suffix(".jsonl")  # a line that names the settings, and one for each clip
    key = json.dumps([settings["data"], settings["folder"], settings["fps"], height, width])
    lines = []
    if index.exists() and path.exists():
        lines = index.read_text().split("\n")[:-1]  # a last one without its end is half written
    if lines[:1] != [key]:
        lines = [key]
    entries = [json.loads(line) for line in lines[1:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as store, open(index, "w") as file:
        store.truncate(sum(count for count, _ in entries) * 3 * height * width)
        print(*lines, sep="\n", file=file)
        bar = cli.progress(list(captions.items())[len(entries):], desc="reading clips")
        for item in bar:
            entries.append(read_clip(*item, settings, store))
            gc.collect(1)  # PyAV's graphs are reference cycles, whose size Python does not see
            store.flush()
            print(json.dumps(entries[-1]), file=file, flush=True)
            free = shutil.disk_usage(path.parent).free
            bar.set_postfix_str(f"{store.tell() / 1e9:.3g} GB, {free / 1e9:.3g} GB free", False)
    return entries


# A clip that has been read: its first frame in the file of frames, and their number.
Clip = namedtuple("Clip", "path caption first count")


def usable_clips(settings, store):
    """Reads the clips of a folder into a file. -> those of at least --size's frames, and pictures,
    of one; says what was left out."""
    t, _, _ = settings["size"]
    layout, captions, skipped = reader.find_clips(settings["data"])
    too_short = (f"fewer than {t} frames at --fps {settings['fps']}, or a picture without "
                 "--picture-share")
    usable = []
    first = 0
    for path, (count, error) in zip(captions, read_clips(settings, captions, store)):
        least = 1 if settings["picture_share"] and reader.is_picture(path) else t
        if count >= least:
            usable.append(Clip(path, captions[path], first, count))
            if error:
                cli.warn(f"{path}: {error}")
        else:
            skipped[error or too_short].append(path)
        first += count
    for reason, paths in skipped.items():
        names = ", ".join(os.path.relpath(path, settings["data"]) for path in paths[:10])
        if paths:
            cli.warn(f"skipped {len(paths):,}, {reason}: {names}{', ...' * (len(paths) > 10)}")
    print(f"{layout}: {len(usable):,} clips and pictures, {sum(map(len, skipped.values())):,} "
          "skipped")
    return usable


def spread(items, most):
    """At most so many of them, evenly spread."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]


def choose_windows(clips, t, most):
    """Windows of t frames to train on, at most so many, and to test on: two lists of Record.

    Of 20 clips or more every twentieth is held out whole, if another one has its caption. Where
    that holds none out, the last tenth of each clip is, unless it is too short for both."""
    clips_with = Counter(clip.caption for clip in clips)
    is_test = [len(clips) >= 20 and i % 20 == 10 and clips_with[clip.caption] > 1
               for i, clip in enumerate(clips)]
    ends_are_tests = not any(is_test)
    train = [np.arange(0)]
    test = [np.arange(0)]
    for clip, is_held_out in zip(clips, is_test):
        end = clip.first + clip.count
        test_first = clip.first if is_held_out else end
        if ends_are_tests and clip.count >= 2 * t:
            test_first = end - max(t, clip.count // 10)
        train.append(np.arange(clip.first, test_first - t + 1))
        test.append(np.arange(test_first, end - t + 1))

    firsts = [clip.first for clip in clips]

    def records(windows, split, most):
        rows = spread(np.concatenate(windows), most)
        return [Record(clips[bisect(firsts, row) - 1].caption, split, int(row)) for row in rows]

    most_tests = min(TEST_CLIPS, max(1, most // 10))
    return records(train, "train", most), records(test, "test", most_tests)


def store_frames(settings, path):
    """Reads a folder's clips into a file of frames, and writes `path`, frames.pt, with the records,
    whose rows are the windows' first frames there."""
    t, height, width = settings["size"]
    store = path.with_suffix(".bin")
    try:
        usable = usable_clips(settings, store)
    except OSError as error:
        cli.exit_with_error(f"cannot fill {store}: {error}; a smaller --size or --fps takes less")
    clips = [clip for clip in usable if clip.count >= t]
    pictures = [clip for clip in usable if clip.count < t]
    windows, tests = choose_windows(clips, t, settings["clips"])
    frames = map_frames(store, height, width) if windows else None  # an empty file has no map

    def moves(window):
        few = frames[[window.row, window.row + t // 2, window.row + t - 1]]
        return t == 1 or np.ptp(few, axis=0).max() > 3  # of 255; less is compression noise

    train = [window for window in windows if moves(window)]
    trained = {record.caption for record in train}
    tests = [record for record in tests if record.caption in trained]
    stills = [Record(clip.caption, "picture", clip.first)
              for clip in spread(pictures, settings["clips"])]
    print(f"{len(train):,} windows of {t} frames and {len(stills):,} pictures to train on, "
          f"{len(tests):,} windows to test; {len(windows) - len(train):,} in which nothing changes "
          "left out")
    if not tests:
        cli.exit_with_error(
            f"no usable clip in {settings['data']}: it needs videos in which something moves, with "
            "a caption each, such as frog.mp4 and frog.txt, some of them twice as long as --size "
            "(20 pictures alone will do, if --size begins with 1x)")
    records = train + stills + tests
    path_of = {clip.caption: clip.path for clip in usable}
    paths = [path_of[caption] for caption in sorted({record.caption for record in records})]
    files.save(path, stage="frames", settings=settings,
               embeddings=read_embeddings(settings["data"], paths),
               records=[tuple(record) for record in records])


def read_embeddings(folder, paths):
    """Of these clips, and of the empty caption, empty.npy: [clips + 1, tokens, dim], float16,
    padded with zeros; or None."""
    embeddings = [read_embedding(path) for path in paths]
    dims = {0 if embedding is None else embedding.shape[1] for embedding in embeddings}
    if dims == {0}:
        return None
    path = Path(folder, "empty.npy")
    with files.reading(path):
        empty = read_embedding(path) if path.exists() else torch.zeros(1, max(dims))
    if dims != {empty.shape[1]}:
        cli.exit_with_error(f"the .npy embeddings in {folder} must have as many channels, one for "
                            "every clip and picture, and empty.npy, too")
    return pad_sequence([embedding.half() for embedding in [*embeddings, empty]], batch_first=True)


def map_frames(path, height, width):
    """-> all frames of a store, mapped: [n, 3, height, width] uint8."""
    return np.memmap(path, np.uint8, "r").reshape(-1, 3, height, width)


class Folder:
    """Windows of real videos, decoded once into one mapped file: memory does not grow with their
    number, and no later start decodes again."""

    held_out_captions = []

    def __init__(self, settings, path):
        names = "data", "size", "fps", "clips", "folder", "picture_share"
        settings = {name: settings[name] for name in names}
        if cli.is_main_process and not path.exists():
            store_frames(settings, path)
        training.wait_for_all()
        saved = files.load(path, "frames")
        files.check_settings(path, saved["settings"], settings)
        self.length, height, width = settings["size"]
        with files.reading(path):
            self.frames = map_frames(path.with_suffix(".bin"), height, width)
            self.records = [Record(*record) for record in saved["records"]]
            self.embeddings = saved["embeddings"]

    def clip(self, indices):
        """Windows: [b, 3, t, h, w] in [-1, 1]. A picture stands still."""
        rows = np.array([self.records[i].row for i in indices])
        step = np.array([self.records[i].split != "picture" for i in indices])
        rows = rows[:, None] + step[:, None] * np.arange(self.length)  # [b, t]
        pixels = torch.from_numpy(self.frames[rows])
        return rearrange(pixels, "b t c h w -> b c t h w").float() / 127.5 - 1


def open_clips(settings, path):
    """settings: of vae.py; path: of frames.pt, where real videos lie, or will. -> records;
    clip(indices), their pixels; held_out_captions; embeddings of the captions that are trained on,
    in order, and of the empty one, [captions + 1, tokens, dim], or None."""
    if settings["data"] == "shapes":
        return Shapes(*settings["size"], settings["clips"], settings["seed"])
    return Folder(settings, path)


def describe_folder(data, run):
    """Some words that change with the names, the sizes, and the first and last 64 KB of a folder's
    files; None for `shapes`."""
    if data == "shapes":
        return None
    if not Path(data).is_dir():
        cli.exit_with_error(f"--data {data} is neither `shapes` nor a folder")
    if run.resolve().is_relative_to(Path(data).resolve()):
        cli.exit_with_error(f"--run {run} lies in --data {data}, and would be taken for clips: put "
                            "it outside")
    paths, _ = reader.files_below(data)
    crc = 0
    for path in paths:
        size = path.stat().st_size
        crc = zlib.crc32(os.fsencode(f"{path} {size}"), crc)
        with contextlib.suppress(OSError), open(path, "rb") as file:  # the reader will name it
            crc = zlib.crc32(file.read(2 ** 16), crc)
            file.seek(max(0, size - 2 ** 16))
            crc = zlib.crc32(file.read(), crc)
    return f"{len(paths)} files, checksum {crc:08x}"


# ------------------------------------------------------------ captions

PAD = 0  # a caption of padding alone is the empty caption of classifier-free guidance


def words(caption):
    """'A red circle' -> ['a', 'red', 'circle']: what stands between white space, punctuation and
    symbols, if it has a letter or digit. Marks, such as vowels in Hindi and Thai, belong to it."""
    text = reader.nfc(caption.lower())
    spaced = "".join(" " if unicodedata.category(c)[0] in "PSZ" else c for c in text)
    return [word for word in spaced.split() if any(map(str.isalnum, word))]


def tokenize(captions, vocabulary, length):
    """Captions -> token ids [b, length], cut or padded. Words that training never saw, and those
    that do not fit, are named and left out; a caption of nothing else is refused: it would give the
    clip of no caption."""
    token_id = {word: i for i, word in enumerate(vocabulary)}
    unknown = set(words(" ".join(captions))) - set(token_id)
    if unknown:
        cli.warn(f"warning: not in the training captions, so left out: "
                 f"{', '.join(sorted(unknown))}")
    rows = []
    for caption in captions:
        row = [token_id[word] for word in words(caption) if word in token_id]
        if not row:
            cli.exit_with_error(f"no word of '{caption[:100]}' is known; known are: "
                                f"{', '.join(vocabulary[1:20])}")
        if row[length:]:
            cut = " ".join(vocabulary[i] for i in row[length:])
            cli.warn(f"warning: the model reads {length} words; left out are: {cut}")
        rows.append(row[:length] + [PAD] * (length - len(row)))
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
                fps=self.checkpoint["config"]["fps"],
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

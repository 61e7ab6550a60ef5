"""What reading a folder of clips costs, beside PyAV alone: the figures of docs/data.md.

    python tests/bench_data.py                            # 2,000 clips, a film of an hour
    python tests/bench_data.py --files 200 --minutes 10   # a first look

Makes its own h264 files of 320x240, 180 frames each (the mean of UCF-101), and one long film. PyAV
alone decodes every clip up to its last wanted frame and scales the wanted ones, keeping none.
Medians of --rounds, in turn.
"""
import argparse
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import av
import numpy as np
from av.video.reformatter import VideoReformatter

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import data  # noqa: E402

SIZE = (17, 128, 128)  # preset toy
SPAN = 33  # of a window, with every second frame
FRAMES = 180


def write_film(path, frames):
    """Blocks that wander over the picture, and a camera's noise."""
    g = np.random.default_rng(0)
    canvas = g.integers(30, 225, (60, 80), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    noise = g.integers(-12, 13, (50, 240, 320), dtype=np.int8)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options=dict(preset="veryfast"))
        stream.width = 320
        stream.height = 240
        stream.bit_rate = 500_000  # as UCF-101 has
        for i in range(frames):
            pixels = canvas[i % 240:][:240, i % 320:][:, :320] + noise[i % 50]
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), "gray")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())


def store(folder, clips, run):
    shutil.rmtree(run, ignore_errors=True)
    settings = dict(data=str(folder), size=SIZE, clips=clips, stride=2, picture_share=0)
    data.store_windows(settings, run / "windows.pt")


def pyav_alone(path, wanted=()):
    """wanted: numbers of frames, ascending; none: decodes all and scales nothing."""
    scaler = VideoReformatter()
    with av.open(path) as container:
        container.streams.video[0].thread_count = 1  # as ours: clips are read in parallel
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                scaler.reformat(frame, 171, 128, "rgb24", interpolation="AREA",
                                threads=1).to_ndarray()
            if wanted and number == wanted[-1]:
                break


def wanted_frames(paths, clips):
    """-> paths, and of each the frames of its windows."""
    frames = np.full(len(paths), FRAMES)
    train, test = data.choose_windows([path.parent.name for path in paths], frames, SPAN, clips)
    wanted = {}
    for clip, first in np.concatenate([train, test]):
        wanted.setdefault(paths[clip], set()).update(range(first, first + SPAN, 2))
    return list(wanted), [sorted(places) for places in wanted.values()]


def seconds(run, *arguments):
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--files", type=int, default=2000)
    p.add_argument("--minutes", type=int, default=60, help="length of the film")
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    work = Path(tempfile.mkdtemp())
    run = work / "run"
    write_film(work / "clip.mp4", FRAMES)
    for i in range(args.files):
        path = work / "clips" / f"Class{i % 100:02}" / f"{i:05}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / "clip.mp4", path)
    items = wanted_frames(data.files_below(work / "clips"), args.files)
    rates = {}
    for threads in 1, 2:
        data.os.cpu_count = lambda threads=threads: threads
        ours = []
        alone = []
        for _ in range(args.rounds):
            ours.append(seconds(store, work / "clips", args.files, run))
            with ThreadPoolExecutor(threads) as pool:
                alone.append(seconds(lambda pool=pool: list(pool.map(pyav_alone, *items))))
        rates[threads] = (median(ours), median(alone), median(np.divide(alone, ours)))
    of_pixels = next(run.glob("windows-*.bin")).stat()
    used = of_pixels.st_blocks * 512 + (run / "windows.pt").stat().st_size
    n = of_pixels.st_size // (3 * np.prod(SIZE) + 1)

    (work / "film").mkdir()
    write_film(work / "film" / "film.mp4", args.minutes * 60 * 25)
    (work / "film" / "film.txt").write_text("a film")
    wanted = max(2, round(200 * args.minutes / 60))
    whole = seconds(pyav_alone, work / "film" / "film.mp4")
    sought = median(seconds(store, work / "film", wanted, run) for _ in range(args.rounds))

    for threads, (ours, alone, rate) in rates.items():
        print(f"{threads} thread(s): {ours:.1f} s, PyAV alone {alone:.1f} s: {rate:.0%} of its "
              "rate")
    print(f"on disk: {used / n / 3 / np.prod(SIZE):.3f} of the bytes of {n} windows")
    print(f"{wanted} windows of {args.minutes} minutes: {sought:.1f} s, decoding it whole "
          f"{whole:.1f} s: {sought / whole:.1%}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()

"""What reading a folder of clips costs, beside PyAV alone: the figures of docs/data.md.

    python tests/bench_data.py                            # 2,000 clips, a film of ten minutes
    python tests/bench_data.py --files 200 --minutes 60   # fewer clips, a film of an hour

Makes its own h264 files of 320x240. PyAV alone decodes every clip up to its last wanted frame and
scales the wanted ones, keeping none. Seconds are medians of --rounds, both in turn. Windows of the
film are as dense as 200 in an hour.
"""
import argparse
import resource
import shutil
import subprocess
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
import vae  # noqa: E402

SIZE = (17, 128, 128)  # preset toy
STRIDE = 2
SCALING = dict(interpolation="AREA", threads=1)
SPAN = (SIZE[0] - 1) * STRIDE + 1
FRAMES = 180  # of a clip: the mean of UCF-101


def write_film(path, frames):
    """Blocks that wander over the picture, and a camera's noise."""
    g = np.random.default_rng(len(str(path)))
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


def store(folder, clips, threads, run):
    """-> seconds. Prints what store_windows prints."""
    start = time.perf_counter()
    shutil.rmtree(run, ignore_errors=True)
    settings = dict(data=str(folder), size=SIZE, clips=clips, stride=STRIDE)
    vae.store_windows(settings, run / "windows.pt", threads)
    return time.perf_counter() - start


def pyav_alone(path, wanted=()):
    """wanted: numbers of frames, ascending; none: decodes all and scales nothing."""
    scaler = VideoReformatter()
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1  # as many threads as ours
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                scaler.reformat(frame, 171, 128, "rgb24", **SCALING).to_ndarray()
            if wanted and number == wanted[-1]:
                break


def wanted_frames(folder, clips):
    """-> (path, the frames of its windows) of each file."""
    _, captions = vae.find_clips(folder, [])
    frames = np.full(len(captions), FRAMES)
    windows = vae.choose_windows(np.array([*captions.values()]), frames, SPAN, clips)
    wanted = [set() for _ in captions]
    for clip, first in np.concatenate(windows):
        wanted[clip].update(range(first, first + SPAN, STRIDE))
    return [(path, sorted(places)) for path, places in zip(captions, wanted) if places]


def peak_memory(folder, clips, run):
    """-> MB, in a process of its own."""
    command = [sys.executable, __file__, "--store", folder, "--clips", str(clips), "--run", run]
    return int(subprocess.run(command, capture_output=True, check=True).stdout.split()[-1]) / 1000


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--files", type=int, default=2000)
    p.add_argument("--clips", type=int, help="windows (default: as many as files)")
    p.add_argument("--minutes", type=int, default=10, help="length of the film")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    clips = args.clips or args.files
    if args.store:
        store(args.store, clips, None, args.run)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    work = Path(tempfile.mkdtemp())
    run = work / "run"
    for i in range(args.files):
        path = work / "clips" / f"Class{i % 100:02}" / f"{i:05}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < 10:
            write_film(path, FRAMES)
        else:
            shutil.copy(work / "clips" / f"Class{i % 10:02}" / f"{i % 10:05}.mp4", path)
    items = wanted_frames(work / "clips", clips)
    print()
    for threads in 1, 2:
        ours = []
        alone = []
        for _ in range(args.rounds):
            ours.append(store(work / "clips", clips, threads, run))
            start = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(pyav_alone, *zip(*items)))
            alone.append(time.perf_counter() - start)
        rate = median(b / a for a, b in zip(ours, alone))
        print(f"{threads} thread(s): {median(ours):.2f} s, PyAV alone {median(alone):.2f} s: "
              f"{rate:.0%} of its rate")
    size = (run / "windows.bin").stat().st_blocks * 512 + (run / "windows.pt").stat().st_size
    n = (run / "windows.bin").stat().st_size // (3 * np.prod(SIZE) + 4)
    print(f"on disk: {size / n / 3 / np.prod(SIZE):.3f} of the bytes of {n} windows")
    for part in clips // 4, clips:
        print(f"peak memory, {part} windows: {peak_memory(work / 'clips', part, run):.0f} MB")
    (work / "film").mkdir()
    write_film(work / "film" / "film.mp4", args.minutes * 60 * 25)
    (work / "film" / "film.txt").write_text("a film")
    wanted = round(200 * args.minutes / 60)
    ours = [store(work / "film", wanted, 1, run) for _ in range(args.rounds)]
    start = time.perf_counter()
    pyav_alone(work / "film" / "film.mp4")
    whole = time.perf_counter() - start
    print(f"{wanted} windows of {args.minutes} minutes: {median(ours):.2f} s, decoding it whole "
          f"{whole:.2f} s: {median(ours) / whole:.1%}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()

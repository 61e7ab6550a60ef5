"""What reading a folder of clips costs, beside PyAV alone: the figures of docs/data.md.

    python tests/bench_data.py                           # 2,000 clips, a video of an hour
    python tests/bench_data.py --files 40 --minutes 2    # a first look

Makes its own h264 files of 320x240, 180 frames each (the mean of UCF-101), and one long video.
PyAV alone decodes all frames, scales as many as are read and keeps none. Medians of --rounds, in
turn.
"""
import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import av
import numpy as np
from av.video.reformatter import VideoReformatter

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import data  # noqa: E402

SIZE = (17, 128, 128)  # preset toy
FPS = 8
FRAMES = 180


def write_video(path, frames):
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


def store(folder, run):
    shutil.rmtree(run, ignore_errors=True)
    settings = dict(data=str(folder), folder="", size=SIZE, clips=10 ** 6, fps=FPS, picture_share=0)
    data.usable_clips(settings, run / "frames.bin")


def pyav_alone(folder):
    for path in sorted(folder.rglob("*.mp4")):
        scaler = VideoReformatter()
        with av.open(path) as container:
            container.streams.video[0].thread_type = "AUTO"  # as ours
            for number, frame in enumerate(container.decode(video=0)):
                if number % 3 == 0:  # of 25 per second
                    scaler.reformat(frame, 171, 128, "rgb24", interpolation="AREA",
                                    threads=1).to_ndarray()


def seconds(run, *arguments):
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--files", type=int, default=2000)
    p.add_argument("--minutes", type=int, default=60, help="of the long video")
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    work = Path(tempfile.mkdtemp())
    write_video(work / "clip.mp4", FRAMES)
    for i in range(args.files):
        path = work / "clips" / f"Class{i % 100:02}" / f"{i:05}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / "clip.mp4", path)
    (work / "long" / "long").mkdir(parents=True)
    write_video(work / "long" / "long" / "long.mp4", args.minutes * 60 * 25)
    for name in "clips", "long":
        ours = []
        alone = []
        for _ in range(args.rounds):
            ours.append(seconds(store, work / name, work / "run"))
            alone.append(seconds(pyav_alone, work / name))
        used = (work / "run" / "frames.bin").stat().st_size
        print(f"{name}: {median(ours):.2f} s, PyAV alone {median(alone):.2f} s, "
              f"{median(np.divide(ours, alone)):.2f} times as long; "
              f"{used / 3 / SIZE[1] / SIZE[2]:,.0f} frames, {used / 1e6:.0f} MB")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()

"""Clips and pictures as a player shows them: upright, deinterlaced, with square pixels, at an even
rate. FFmpeg's filters do it, inside PyAV, whatever a container says of its frames."""
import contextlib

import av
import numpy as np
from einops import rearrange
from PIL import Image, ImageOps

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
              f"time_base={frame.time_base}:pixel_aspect={aspect}:"
              f"colorspace={int(frame.colorspace)}:range={int(frame.color_range)}")
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
    square pixels, scaled to cover height x width and centre-cropped."""
    with av.open(f"file:{path}", options=CONTAINERS) as container:
        stream = container.streams.best("video")  # the default one, and no cover picture
        stream.thread_type = "AUTO"
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or "1/1"
        graph = None
        known = None
        due = 0  # when the next frame is expected
        for frame in container.decode(stream):
            if frame.pts is None or container.format.name == "avi":  # which has no other times
                frame.pts = due if frame.dts is None else frame.dts
            kind = frame.width, frame.height, frame.format.name
            gap = (frame.pts - due) * frame.time_base  # seconds
            if kind != known or not -1 < gap < LONGEST_STILL:
                if graph:
                    yield from filtered(graph, None)
                graph = build_graph(frame, aspect, fps, height, width)
                known = kind
            if frame.duration * frame.time_base > LONGEST_STILL:
                frame.duration = 0
            due = frame.pts + frame.duration
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

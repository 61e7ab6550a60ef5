"""The VAE and its data."""
import io
import socket
import threading
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import train

import common
import vae

RATIOS = [(4, 8, 8), (4, 16, 16), (8, 16, 16), (8, 32, 32), (8, 64, 64)]


def small_vae(ratio, patch=4):
    torch.manual_seed(0)
    return vae.VAE(ratio, latent_channels=8, width=8, res_blocks=1, patch=patch)


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("ratio", RATIOS, ids=str)
def test_shapes_at_every_compression_ratio_of_the_paper(ratio, patch):
    model = small_vae(ratio, patch)
    x = torch.randn(1, 3, 1 + 2 * ratio[0], 2 * ratio[1], ratio[2])
    mean, logvar = model.encode(x)
    assert mean.shape == logvar.shape == (1, 8, 3, 2, 1)
    assert model.decode(mean).shape == x.shape


@pytest.mark.parametrize("ratio", [(4, 8, 8), (8, 32, 32)], ids=str)
def test_the_vae_never_sees_the_future(ratio):
    model = small_vae(ratio).double()
    rt = ratio[0]
    x = torch.randn(1, 3, 1 + 3 * rt, ratio[1], ratio[2], dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 1 + rt:] += 1  # everything after the second latent frame's own pixels
    z = model.encode(x)[0]
    z_changed = model.encode(changed)[0]
    assert torch.equal(z[:, :, :2], z_changed[:, :, :2])
    assert not torch.allclose(z[:, :, 2:], z_changed[:, :, 2:])
    y = model.decode(z)
    y_changed = model.decode(z_changed)
    assert torch.equal(y[:, :, :1 + rt], y_changed[:, :, :1 + rt])
    assert not torch.allclose(y[:, :, 1 + rt], y_changed[:, :, 1 + rt])  # its own begin right there


def test_a_picture_is_a_video_of_one_frame():
    model = small_vae((4, 8, 8)).double()
    x = torch.randn(1, 3, 9, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model.encode(x[:, :, :1])[0], model.encode(x)[0][:, :, :1])
    z = torch.randn(1, 8, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(model.decode(z[:, :, :1]), model.decode(z)[:, :, :1])


@pytest.mark.parametrize("preset", vae.PRESETS)
def test_every_preset_is_a_network_that_can_be_built(preset):
    p = vae.PRESETS[preset]
    ratio = common.size(p["ratio"])
    vae.latent_size(common.size(p["size"]), ratio)
    with torch.device("meta"):
        model = vae.VAE(ratio, p["latent_channels"], p["width"], p["res_blocks"], p["patch"])
        mean, _ = model.encode(torch.empty(1, 3, 1, *ratio[1:]))
    assert mean.shape == (1, p["latent_channels"], 1, 1, 1)


@pytest.mark.parametrize("ratio", [(1, 8, 8), (4, 8, 8), (8, 32, 32), (8, 64, 64)], ids=str)
def test_decoding_latent_frame_by_latent_frame_equals_decoding_at_once(ratio):
    model = small_vae(ratio)
    z = torch.randn(2, 8, 4, 2, 1)
    pieces = list(model.stream(z))
    assert [frames.shape[2] for frames in pieces] == [1] + [ratio[0]] * 3
    torch.testing.assert_close(torch.cat(pieces, dim=2), model.decode(z), atol=1e-5, rtol=0)


def test_a_stream_keeps_as_much_after_many_frames_as_after_one():
    model = small_vae((4, 8, 8))
    caches = []
    kept = []
    with torch.no_grad():
        for _ in range(4):
            model.decode_next(torch.randn(1, 8, 1, 2, 2), caches)
            kept.append([x.untyped_storage().nbytes() for x in caches])
    assert kept[1:] == kept[:-1]
    assert kept[0] == [4 * 2 * x.shape[1] * x.shape[3] * x.shape[4] for x in caches]  # two frames


def test_gradient_checkpointing_changes_no_gradient():
    model = small_vae((4, 8, 8))
    x = torch.randn(1, 3, 5, 16, 16)
    noise = torch.randn(1, 8, 2, 2, 2)
    gradients = []
    for model.gradient_checkpointing in False, True:
        loss, _ = vae.vae_loss(model, x, noise, 1e-3)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for kept, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, kept)


def test_a_dry_run_counts_the_bytes_that_autograd_keeps():
    model = vae.VAE((4, 8, 8), latent_channels=8, width=64, res_blocks=1, patch=4)
    x = torch.randn(1, 3, 17, 64, 64)
    kept = {}

    def keep(saved):
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        with torch.autocast("cpu", torch.bfloat16):
            vae.vae_loss(model, x, torch.randn(1, 8, 5, 8, 8), 1e-3)
    for p in model.parameters():
        kept.pop(p.data_ptr(), None)
    measured = sum(storage.nbytes() for storage in kept.values())
    said, said_checkpointing = vae.kept_bytes(model, (17, 64, 64))
    assert said == pytest.approx(measured, rel=0.25)
    assert said_checkpointing < said / 2


def test_a_crop_is_the_same_random_place_of_every_clip():
    t, h, w = 9, 16, 24
    position = torch.arange(t * h * w).float().view(1, 1, t, h, w).expand(2, 3, t, h, w)
    corners = set()
    for step in range(50):
        part = vae.random_part(position, (5, 8, 16), common.step_generator(step))
        assert part.shape == (2, 3, 5, 8, 16) and torch.equal(part[0, 0], part[1, 2])
        first = int(part[0, 0, 0, 0, 0])
        corner = first // (h * w), first // w % h, first % w
        torch.testing.assert_close(part, position[:, :, corner[0]:, corner[1]:, corner[2]:]
                                   [:, :, :5, :8, :16])
        corners.add(corner)
    for axis, places in enumerate((5, 9, 9)):
        seen = {corner[axis] for corner in corners}
        assert min(seen) == 0 and max(seen) == places - 1


def test_a_vae_trained_on_crops_encodes_whole_clips(tmp_path):
    train("vae", tmp_path, "--size", "9x24x24", "--crop", "5x16x16", "--steps", "2")
    latents = torch.load(tmp_path / "latents.pt", weights_only=True)["latents"]
    assert latents.shape[1:] == (8, 3, 3, 3)


def test_psnr_is_that_of_its_definition():
    class Off(torch.nn.Module):
        def encode(self, x):
            return x, None

        def decode(self, z):
            return z + 0.2  # 0.1 of the range [0, 1]: 20 dB

    clips = [torch.zeros(2, 3, 1, 8, 8)]
    assert vae.psnr(Off(), clips, torch.no_grad) == pytest.approx(20, abs=1e-4)


# ------------------------------------------------------------ the data


def test_no_held_out_combination_is_trained_on_yet_every_pair_is():
    data = vae.Shapes(5, 16, 16, clips=3000, seed=0)
    train = {tuple(data.combinations[i].tolist()) for i in data.train}
    held_out = set(data.held_out_captions)
    assert held_out and not held_out & {data.captions[i] for i in data.train}
    assert held_out <= {data.captions[i] for i in data.test}
    sizes = [len(vae.COLORS), len(vae.SHAPES), len(vae.DIRECTIONS)]
    for a, b in (0, 1), (1, 2), (0, 2):
        assert len({(c[a], c[b]) for c in train}) == sizes[a] * sizes[b]


def test_a_rendered_clip_depends_on_its_index_and_seed_alone():
    a, b, c = (vae.Shapes(5, 16, 16, clips=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.clip([3, 7])[1:], b.clip([7]))
    assert not torch.equal(a.clip([7]), c.clip([7]))
    more = vae.Shapes(5, 16, 16, clips=80, seed=1)  # leaves the test clips as they are
    assert torch.equal(a.clip(list(a.test)), more.clip(list(more.test)))


def film(frames=40, suffix=".mp4"):
    pixels = np.random.default_rng(0).integers(0, 255, (frames, 48, 64, 3), dtype=np.uint8)
    return iio.imwrite("<bytes>", pixels, extension=suffix, plugin="pyav", codec="libx264", fps=20)


def sound():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), "s16", "mono")
        frame.rate = 44100
        container.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


def playlist(address):
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{address}\n#EXT-X-ENDLIST\n".encode()


FILM = film()
PART = film(suffix=".ts")  # what the playlists are of
EMBEDDING = np.ones((4, 6), np.float32)


def write(folder, name="a.mp4", data=FILM, caption=b"a clip", embedding=None):
    path = folder / name
    path.write_bytes(data)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)
    if embedding is not None:
        np.save(path.with_suffix(".npy"), embedding)


def read(folder):
    return vae.Folder(folder, 5, 16, 16, clips=1000, stride=2)


def refused(folder, capsys):
    """-> what is said before exit status 2."""
    with pytest.raises(SystemExit) as stop:
        read(folder)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_folder_of_clips_is_read_and_what_cannot_be_used_is_named(tmp_path, capsys):
    write(tmp_path, "one.mp4", embedding=EMBEDDING)
    write(tmp_path, "two words.mkv", film(suffix=".mkv"), b"another\nclip", EMBEDDING * 2)
    write(tmp_path, "text.mp4", b"not a video", b"a text")
    data = read(tmp_path)
    assert {data.captions[i] for i in data.train} == {"a clip", "another clip"}
    assert data.clip([0, 1]).shape == (2, 3, 5, 16, 16)
    assert data.clip([0]).abs().max() <= 1
    assert data.embeddings["another clip"].tolist() == (EMBEDDING * 2).tolist()
    assert capsys.readouterr().err.count("skipped") == 1


def test_no_frame_of_a_test_window_is_trained_on(tmp_path):
    write(tmp_path)
    data = read(tmp_path)

    def frames(part):
        windows = [data.windows[i] for i in part]
        return {(video, first + i) for video, first in windows for i in range(9)}

    assert frames(data.test) and not frames(data.train) & frames(data.test)


class Code:
    """Unpickled without care, it makes a file."""

    def __reduce__(self):
        return open, ("was run", "w")


UNUSABLE = {
    "empty": dict(data=b""), "text": dict(data=b"no film"), "zeros": dict(data=bytes(50_000)),
    "truncated": dict(data=FILM[:5000]), "too short": dict(data=film(17)),
    "sound alone": dict(data=sound()), "escapes": dict(name="\x1b[31mred\n.mp4", data=b""),
    "a playlist": dict(name="a.m3u8", data=playlist("../part.ts")),
    "a playlist in disguise": dict(data=playlist("../part.ts")),
    "no caption": dict(caption=None), "an empty caption": dict(caption=b""),
    "Latin-1": dict(caption="é".encode("latin-1")), "too long": dict(caption=b"word " * 513),
    "NaN": dict(embedding=EMBEDDING * np.nan), "one dimension": dict(embedding=EMBEDDING[0]),
    "no tokens": dict(embedding=EMBEDDING[:0]), "code": dict(embedding=np.array([[Code()]]))}


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


@pytest.mark.parametrize("name", ["a.m3u8", "a.mp4"])
def test_a_playlist_reaches_no_server(tmp_path, capsys, name):
    server = socket.create_server(("127.0.0.1", 0))
    visit = threading.Thread(target=lambda: server.accept()[0].close(), daemon=True)
    visit.start()
    write(tmp_path, name, playlist(f"http://127.0.0.1:{server.getsockname()[1]}/part.ts"))
    assert "no usable clip" in refused(tmp_path, capsys)
    assert visit.is_alive()  # still waiting


@pytest.mark.parametrize("other", [None, EMBEDDING[:2], EMBEDDING[:, :2]],
                         ids=["none", "2x6", "4x2"])
def test_embeddings_that_do_not_fit_together_are_refused(tmp_path, capsys, other):
    write(tmp_path, embedding=EMBEDDING)
    write(tmp_path, "b.mp4", caption=b"another", embedding=other)
    assert "must all have one shape" in refused(tmp_path, capsys)

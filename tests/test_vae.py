import imageio.v3 as iio
import numpy as np
import pytest
import torch

import sample
import vae

RATIOS = [(4, 8, 8), (4, 16, 16), (8, 16, 16), (8, 32, 32), (8, 64, 64)]


@pytest.mark.parametrize("ratio", RATIOS, ids=str)
def test_shapes_at_every_compression_ratio_of_the_paper(ratio):
    model = vae.VAE(ratio, latent_channels=8, width=8)
    x = torch.randn(1, 3, 1 + 2 * ratio[0], 2 * ratio[1], ratio[2])
    mean, logvar = model.encode(x)
    assert mean.shape == logvar.shape == (1, 8, 3, 2, 1)
    assert model.decode(mean).shape == x.shape


@pytest.mark.parametrize("ratio", [(4, 8, 8), (8, 32, 32)], ids=str)
def test_the_vae_never_sees_the_future(ratio):
    torch.manual_seed(0)
    model, rt = vae.VAE(ratio, latent_channels=8, width=8).double(), ratio[0]
    x = torch.randn(1, 3, 1 + 3 * rt, ratio[1], ratio[2], dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 1 + rt:] += 1  # everything after the second latent frame's own pixels
    z, z_changed = model.encode(x)[0], model.encode(changed)[0]
    assert torch.equal(z[:, :, :2], z_changed[:, :, :2])
    assert not torch.allclose(z[:, :, 2:], z_changed[:, :, 2:])
    y, y_changed = model.decode(z), model.decode(z_changed)
    assert torch.equal(y[:, :, :1 + rt], y_changed[:, :, :1 + rt])
    assert not torch.allclose(y[:, :, 1 + rt], y_changed[:, :, 1 + rt])  # its own frames begin right there


def test_a_picture_is_a_video_of_one_frame():
    torch.manual_seed(0)
    model = vae.VAE((4, 8, 8), latent_channels=8, width=8).double()
    x = torch.randn(1, 3, 9, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model.encode(x[:, :, :1])[0], model.encode(x)[0][:, :, :1])
    z = torch.randn(1, 8, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(model.decode(z[:, :, :1]), model.decode(z)[:, :, :1])


@pytest.mark.parametrize("preset", vae.PRESETS)
def test_every_preset_is_a_network_that_can_be_built(preset):
    p = {k: vae.dims(v) if k in ("size", "ratio") else v for k, v in vae.PRESETS[preset].items()}
    vae.check_size(p["size"], p["ratio"])
    with torch.device("meta"):
        model = vae.VAE(p["ratio"], p["latent_channels"], p["width"], p["res_blocks"])
        assert model.encode(torch.empty(1, 3, 1, *p["ratio"][1:]))[0].shape == (1, p["latent_channels"], 1, 1, 1)


def test_the_norm_for_the_phone_is_the_same_norm_and_survives_float16():
    norm, x = vae.RMSNorm(64, affine=False), torch.randn(5, 64)
    plain = norm(x)
    norm.float16_safe = True
    torch.testing.assert_close(norm(x), plain, rtol=1e-4, atol=1e-4)
    large = x.half() * 4000  # its squares leave float16's range
    torch.testing.assert_close(norm(large).float(), plain, rtol=1e-2, atol=1e-2)
    norm.float16_safe = False
    assert not torch.allclose(norm(large).float(), plain, rtol=1e-2, atol=1e-2)


def test_psnr_is_that_of_its_definition():
    class Off(torch.nn.Module):
        def encode(self, x):
            return x, None

        def decode(self, z):
            return z + 0.2  # 0.1 of the range [0, 1]: 20 dB

    assert vae.psnr(Off(), [torch.zeros(2, 3, 1, 8, 8)], torch.no_grad) == pytest.approx(20, abs=1e-4)


def test_no_held_out_combination_is_trained_on_yet_every_pair_is():
    data = vae.Shapes(5, 16, 16, clips=3000, seed=0)
    train = {tuple(data.combos[i].tolist()) for i in data.train}
    held_out = set(data.held_out_captions)
    assert held_out and not held_out & {data.captions[i] for i in data.train}
    assert held_out <= {data.captions[i] for i in data.test}
    for a, b in (0, 1), (1, 2), (0, 2):
        sizes = [len(vae.COLORS), len(vae.SHAPES), len(vae.DIRECTIONS)]
        assert len({(c[a], c[b]) for c in train}) == sizes[a] * sizes[b]


def test_a_rendered_clip_depends_on_its_index_and_seed_alone():
    a, b, c = (vae.Shapes(5, 16, 16, clips=50, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.clip([3, 7])[1:], b.clip([7]))
    assert not torch.equal(a.clip([7]), c.clip([7]))
    more = vae.Shapes(5, 16, 16, clips=80, seed=1)  # more training clips leave the test clips as they are
    assert torch.equal(a.clip(list(a.test)), more.clip(list(more.test)))


def test_the_measure_reads_real_renders_and_chance_on_shuffled_captions():
    data = vae.Shapes(9, 32, 32, clips=512, seed=5)
    found = sample.measure(data.clip(list(data.test)))
    right = found == sample.expected([data.captions[i] for i in data.test])
    assert right.all(1).float().mean() >= 0.99
    g = torch.Generator().manual_seed(0)
    shuffled = [data.captions[i] for i in torch.randperm(len(data.test), generator=g) + len(data.train)]
    by_chance = (found == sample.expected(shuffled)).float().mean(0)
    chance = torch.tensor([1 / len(vae.COLORS), 1 / len(vae.SHAPES), 1 / len(vae.DIRECTIONS)])
    assert (by_chance - chance).abs().max() < 0.07
    nothing = torch.full((4, 3, 9, 32, 32), -0.4)
    assert (sample.measure(nothing) == -1).all()  # a grey clip is no shape at all


@pytest.fixture
def clips(tmp_path):
    """Two good clips, one of them in colour noise, and files that cannot be used."""
    for name, seed in ("one", 0), ("two words", 1):
        frames = np.random.default_rng(seed).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
        iio.imwrite(tmp_path / f"{name}.mp4", frames, plugin="pyav", codec="libx264", fps=20)
        (tmp_path / f"{name}.txt").write_text(f"a clip called {name}\n")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("nothing")
    (tmp_path / "silent.mp4").write_bytes((tmp_path / "one.mp4").read_bytes())  # no caption
    iio.imwrite(tmp_path / "short.gif", np.zeros((3, 32, 32, 3), np.uint8), plugin="pillow")
    (tmp_path / "short.txt").write_text("three frames")
    return tmp_path


def test_a_folder_of_clips_is_read_and_what_cannot_be_used_is_named(clips, capsys):
    data = vae.Folder(clips, 5, 16, 16, clips=1000, stride=2)
    assert {data.captions[i] for i in data.train} == {"a clip called one", "a clip called two words"}
    assert data.clip([0, 1]).shape == (2, 3, 5, 16, 16) and data.clip([0]).abs().max() <= 1
    skipped = capsys.readouterr().err
    for name in "text.mp4", "empty.mp4", "silent.mp4", "short.gif":
        assert f"skipped {name}" in skipped
    trained, tested = ({(v, f) for v, s in (data.windows[i] for i in part) for f in range(s, s + 9)}
                       for part in (data.train, data.test))
    assert tested and not trained & tested  # no frame of a test window is trained on


def test_a_folder_without_a_usable_clip_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        vae.Folder(tmp_path, 5, 16, 16, clips=10, stride=1)
    assert stop.value.code == 2 and "no usable clip" in capsys.readouterr().err


def test_embeddings_of_your_own_stand_beside_the_clips(clips):
    for name in "one", "two words":
        np.save(clips / f"{name}.npy", np.ones((4, 6), np.float32))
    data = vae.Folder(clips, 5, 16, 16, clips=10, stride=1)
    assert data.embeddings["a clip called one"].shape == (4, 6)


def test_muon_makes_every_direction_of_a_matrix_count_the_same():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16, 40))
    gradient = torch.randn(16, 40) * torch.logspace(0, -2, 16)[:, None]
    optimizer = vae.Muon([weight], lr=1.0)
    weight.grad = gradient
    optimizer.step()
    singular = torch.linalg.svdvals(weight)
    assert singular.min() > 0.5 and singular.max() < 1.3
    assert (weight * gradient).sum() < 0  # and it goes downhill


def test_muon_blows_up_no_direction_in_half_precision():
    """A gradient of low rank is the hard case: rounding stands where its small singular values would be."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(32, 64))
    weight.grad = torch.randn(32, 3) @ torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        vae.Muon([weight], lr=1.0).step()
    assert 0.5 < torch.linalg.svdvals(weight)[:3].min() and torch.linalg.svdvals(weight).max() < 1.3

"""The VAE and its data."""

import pytest
import torch
from conftest import train

import vae
from common import cli, data, training

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
    ratio = cli.size(p["ratio"])
    vae.latent_size(cli.size(p["size"]), ratio)
    with torch.device("meta"):
        model = vae.VAE(ratio, p["latent_channels"], p["width"], p["res_blocks"], p["patch"])
        mean, _ = model.encode(torch.empty(1, 3, 1, *ratio[1:]))
    assert mean.shape == (1, p["latent_channels"], 1, 1, 1)


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


def test_a_crop_is_the_same_random_place_of_every_clip():
    t, h, w = 9, 16, 24
    position = torch.arange(t * h * w).float().view(1, 1, t, h, w).expand(2, 3, t, h, w)
    corners = set()
    for step in range(50):
        part = vae.random_crop(position, (5, 8, 16), training.step_generator(step))
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
    path = tmp_path / "new" / "latents.pt"  # a folder that is not there yet
    train("vae", tmp_path, *"--size 9x24x24 --crop 5x16x16 --steps 2 --latents".split(), str(path))
    latents = torch.load(path, weights_only=True)["latents"]
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
    clips = data.Shapes(5, 16, 16, clips=3000, seed=0)
    train = {tuple(combination.tolist()) for combination in clips.combinations[:3000]}
    held_out = set(clips.held_out_captions)
    captions = {"train": set(), "test": set()}
    for record in clips.records:
        captions[record.split].add(record.caption)
    assert held_out and not held_out & captions["train"]
    assert held_out <= captions["test"]
    sizes = [len(data.COLORS), len(data.SHAPES), len(data.DIRECTIONS)]
    for a, b in (0, 1), (1, 2), (0, 2):
        assert len({(c[a], c[b]) for c in train}) == sizes[a] * sizes[b]


def test_every_shape_stays_inside_the_picture():
    """One that touches the border covers three quarters of a pixel there; one that leaves, more."""
    for height, width in (32, 32), (32, 48):
        clips = data.Shapes(3, height, width, clips=1000, seed=0).clip(list(range(1000)))
        coverage = (clips.amax(1) - clips.amin(1)) / 1.6  # 1.6: the palette's own, in [-1, 1]
        for border in (coverage[:, :, 0], coverage[:, :, -1], coverage[..., 0], coverage[..., -1]):
            assert border.max() < 0.76


def test_a_rendered_clip_depends_on_its_index_and_seed_alone():
    a, b, c = (data.Shapes(5, 16, 16, clips=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.clip([3, 7])[1:], b.clip([7]))
    assert not torch.equal(a.clip([7]), c.clip([7]))
    more = data.Shapes(5, 16, 16, clips=80, seed=1)  # leaves the test clips as they are
    test = [data.indices_of(clips.records, "test").tolist() for clips in (a, more)]
    assert torch.equal(a.clip(test[0]), more.clip(test[1]))

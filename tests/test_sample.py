"""Each score must rank known good clips above known bad ones before it is used for anything."""
import io

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import dit
import sample
from common import data, report

CPU = torch.device("cpu")
CAPTION = "a red circle moving left"


@pytest.fixture(scope="module")
def clips():
    rendered = data.Shapes(9, 32, 32, clips=256, seed=1)
    return rendered.clip(list(range(256)))


def load_model(run, stage, steps=None, cfg=3.0):
    return sample.Model(run / f"{stage}.pt", CPU, torch.no_grad, steps, cfg)


def prompts_of(model, n):
    return data.tokenize([CAPTION] * n, model.checkpoint["vocabulary"], 5)


# ------------------------------------------------------------ the scores


def test_the_measure_reads_real_renders_and_chance_on_shuffled_captions():
    rendered = data.Shapes(9, 32, 32, clips=512, seed=5)
    found = sample.measure(rendered.clip(list(range(512))))
    asked = rendered.combinations[:512]
    assert (found == asked).all(1).float().mean() >= 0.99
    shuffled = asked[torch.randperm(512, generator=torch.Generator().manual_seed(0))]
    by_chance = (found == shuffled).float().mean(0)
    chance = torch.tensor([1 / len(data.COLORS), 1 / len(data.SHAPES), 1 / len(data.DIRECTIONS)])
    assert (by_chance - chance).abs().max() < 0.07
    nothing = torch.full((4, 3, 9, 32, 32), -0.4)
    assert (sample.measure(nothing) == -1).all()  # a grey clip is no shape at all


def test_the_outline_score_sees_round_corners_other_shapes_and_blur():
    """One still subject of 8 pixels' radius, for the caption "square"."""
    y, x = torch.meshgrid(torch.arange(32) - 15.2, torch.arange(32) - 16.4, indexing="ij")
    half = 0.87 * 8
    corner = torch.stack([x.abs(), y.abs()]).sub(half - 4).clamp(min=0)
    rounded = (0.5 - (corner.norm(dim=0) - 4)).clamp(0, 1)  # corners with a radius of 4 pixels
    circle, square, bar = (data.shape_coverage(shape, x, y, 8.0)
                           for shape in ("circle", "square", "bar"))
    blurred = torch.nn.functional.avg_pool2d(square[None], 5, 1, 2)[0]
    masks = torch.stack([square, rounded, circle, bar, blurred])
    clips = masks[:, None, None].repeat(1, 1, 3, 1, 1)  # three frames
    color = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1, 1)
    pixels = clips * color + (1 - clips) * 0.3
    exact, is_rounded, is_circle, is_bar, is_blurred = sample.outline_iou(
        pixels * 2 - 1, ["a red square"] * 5).tolist()
    assert exact > 0.97 and exact - is_rounded > 0.03
    assert is_rounded > is_circle + 0.03 > is_bar
    assert exact - is_blurred > 0.05


def test_smoothness_falls_when_frames_are_shuffled_and_frozen_ones_do_not_move(clips):
    good = sample.motion_scores(clips, True)
    shuffled = sample.motion_scores(clips[:, :, [4, 0, 7, 2, 8, 1, 6, 3, 5]], True)
    frozen = sample.motion_scores(clips[:, :, :1].expand_as(clips), True)
    assert good["motion_smoothness"] > shuffled["motion_smoothness"]
    assert good["dynamic_degree"] > 0.005 and frozen["dynamic_degree"] == 0
    assert frozen["motion_smoothness"] == pytest.approx(1)


def test_subject_consistency_falls_when_the_subject_changes_on_the_way(clips):
    changed = clips.clone()
    changed[:, :, 4:] = clips.roll(1, 0)[:, :, 4:]  # another shape and colour half way through
    assert sample.motion_scores(clips, True)["subject_consistency"] > 0.95
    assert sample.motion_scores(changed, True)["subject_consistency"] < 0.93


def test_the_frechet_distance_grows_with_blur_with_noise_and_with_lost_diversity(clips):
    real = sample.fixed_features(clips[:128])
    others = clips[128:]
    base = sample.frechet(sample.fixed_features(others), real)
    assert sample.frechet(real, real) == pytest.approx(0, abs=1e-6)
    g = torch.Generator().manual_seed(0)
    blurred = torch.nn.functional.avg_pool3d(others, (1, 3, 3), 1, (0, 1, 1))
    noisy = others + 0.1 * torch.randn(others.shape, generator=g)
    same = others[:1].expand_as(others)
    for worse in blurred, noisy, same:
        assert sample.frechet(sample.fixed_features(worse), real) > 2 * base
    brighter = sample.fixed_features(others + 0.2)  # is nothing that it looks at
    assert sample.frechet(brighter, real) == pytest.approx(base, rel=1e-3)


def test_the_frechet_distance_is_that_of_two_gaussians():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 2, generator=g)
    b = torch.randn(200_000, 2, generator=g) * torch.tensor([2.0, 3.0]) + torch.tensor([1.0, 0.0])
    expected = 1 + (2 - 1) ** 2 + (3 - 1) ** 2
    assert sample.frechet(a, b) == pytest.approx(expected, rel=0.03)


def test_the_validation_loss_ranks_models_and_is_always_drawn_the_same(micro_run):
    latents = data.Latents(micro_run / "latents.pt")
    model, _ = dit.load_dit(micro_run / "dit.pt", CPU, "dit")
    loss = sample.validation_loss(model, latents, CPU, torch.no_grad)
    assert loss == sample.validation_loss(model, latents, CPU, torch.no_grad)
    for p in model.final_layer.parameters():
        p.neg_()
    assert sample.validation_loss(model, latents, CPU, torch.no_grad) > loss


def test_each_clip_is_measured_against_what_its_caption_asks_for(micro_run):
    latents = data.Latents(micro_run / "latents.pt")
    rendered = data.Shapes(9, 32, 32, clips=4, seed=1)
    captions = [record.caption for record in rendered.records[:2]]
    clips = rendered.clip([0, 1])
    for prediction in sample.evaluate_attributes(captions, clips, None, latents):
        assert all(right for right, _ in prediction.values())
    prediction = sample.evaluate_attributes([CAPTION], clips[:1] * 0, None, latents)[0]
    assert set(prediction) == {"color", "shape", "direction"}
    assert set(prediction.values()) == {(False, "none")}
    latents.on_shapes = False  # measured by the nearest training clip
    known = latents.records[0].caption
    x0 = latents.x0([0, 1])
    first, second = sample.evaluate_attributes([known, "another"], None, x0, latents)
    assert list(first.values()) == [(True, known)]
    assert not any(right for right, _ in second.values())


# ------------------------------------------------------------ sampling


@pytest.mark.parametrize("stage, steps, cfg, nfe", [
    ("dit", None, 3, 80), ("pruned", None, 3, 80), ("student", None, 3, 4), ("student", 2, 3, 2),
    ("dit", 10, 1, 10)])
def test_the_number_of_function_evaluations_is_counted(micro_run, stage, steps, cfg, nfe):
    model = load_model(micro_run, stage, steps, cfg)
    clips = []
    model.dit.register_forward_hook(lambda _, inputs, __: clips.append(len(inputs[0])))
    list(model.trajectory(prompts_of(model, 2), model.noise(2, 0)))
    assert sum(clips) / 2 == model.nfe == nfe


def test_a_clips_noise_is_its_own_whatever_else_is_sampled(micro_run):
    model = load_model(micro_run, "student")
    assert torch.equal(model.noise(3, seed=5)[:, 2], model.noise(1, seed=7)[:, 0])
    model.latent_shape = [3, 3, 3, 3]  # torch fills a tensor's last 81 % 16 numbers in another way
    one_step = load_model(micro_run, "dit")
    one_step.latent_shape = model.latent_shape
    assert torch.equal(model.noise(1, seed=7)[0], one_step.noise(1, seed=7)[0])


@pytest.mark.parametrize("stage, steps", [("dit", 40), ("student", 4)])
def test_a_trajectory_starts_at_its_noise_and_ends_at_the_sample(micro_run, stage, steps):
    model = load_model(micro_run, stage)
    prompts = prompts_of(model, 1)
    noise = model.noise(1, 0)
    trajectory = list(model.trajectory(prompts, noise))
    x0, _ = model.sample(prompts, 0)
    times = [float(t) for t, _, _ in trajectory]
    assert len(trajectory) == steps and times == sorted(times, reverse=True)
    torch.testing.assert_close(trajectory[0][1], noise[0])
    assert torch.equal(trajectory[-1][2], x0)


def test_sampling_runs_under_autocast_while_it_iterates(micro_run):
    bfloat16 = sample.Model(micro_run / "student.pt", CPU,
                            lambda: torch.autocast("cpu", torch.bfloat16), None, 1)
    float32 = load_model(micro_run, "student")
    prompts = prompts_of(float32, 1)
    assert not torch.equal(bfloat16.sample(prompts, 0)[0], float32.sample(prompts, 0)[0])


# ------------------------------------------------------------ videos and pictures


@pytest.mark.parametrize("flags, shape", [
    ("--size 9x24x32", (9, 24, 32)), ("--frames 1", (1, 16, 16)), ("--frames 13", (13, 16, 16))])
def test_a_clip_may_have_another_size_than_those_trained_on(micro_run, monkeypatch, flags, shape):
    decoded = []
    plain = sample.decode

    def decode(*args):
        decoded.append(plain(*args))
        return decoded[-1]

    monkeypatch.setattr(sample, "decode", decode)
    monkeypatch.setattr(report, "write_video", lambda *args: None)
    sample.main(["--run", str(micro_run), "--device", "cpu", "--prompt", CAPTION, *flags.split()])
    assert decoded[0].shape == (1, 3, *shape) and decoded[0].isfinite().all()


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_prompts_become_videos_and_contact_sheets(micro_run, tmp_path, suffix):
    out = tmp_path / f"some videos.{suffix}"
    prompts = ["--prompt", CAPTION, "--prompt", "a blue square moving up"]
    sample.main(["--run", str(micro_run), "--out", str(out), "--device", "cpu", *prompts])
    if suffix == "png":
        image = np.asarray(Image.open(out))
        assert image.shape[1] == 5 * 132  # five frames side by side, each prompt in its line
        halves = np.split(image, 2)
        assert not np.array_equal(halves[0][:36], halves[1][:36])  # the captions
    else:
        frames = iio.imread(out, plugin="pillow" if suffix == "gif" else "pyav")
        assert len(frames) == 5
        halves = np.split(frames, 2, axis=2)  # the two prompts side by side
    assert min(half.std() for half in halves) > 1
    assert not np.array_equal(*halves)


def test_a_gif_keeps_a_colour_that_few_pixels_have():
    g = np.random.default_rng(0)
    frames = g.integers(30, 110, (3, 120, 160, 1)) + g.integers(0, 9, (3, 120, 160, 3))  # greys
    colors = [(230, 26, 26), (26, 230, 26), (26, 26, 230), (230, 230, 26), (230, 26, 230)]
    for i, color in enumerate(colors):
        frames[:, 20 * i:20 * i + 18, 10:50] = color + g.integers(-20, 20, (3, 18, 40, 3))
    frames[:, 60:66, 90:96] = 26, 230, 230
    gif = Image.open(io.BytesIO(report.gif_bytes(frames.clip(0, 255).astype(np.uint8), 8)))
    seen = [np.asarray(frame.convert("RGB"))[63, 93] for frame in ImageSequence.Iterator(gif)]
    assert len(seen) == 3
    for color in seen:
        assert np.abs(color.astype(int) - (26, 230, 230)).max() < 25

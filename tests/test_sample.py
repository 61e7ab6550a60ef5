"""Each score must rank known good clips above known bad ones before it is used for anything."""
import numpy as np
import pytest
import torch
from PIL import Image

import dit
import sample
import vae


@pytest.fixture(scope="module")
def clips():
    data = vae.Shapes(9, 32, 32, clips=10, seed=1)
    return data.clip([data.test[i] for i in torch.randperm(len(data.test))[:256]])


def test_smoothness_falls_when_frames_are_shuffled_and_motion_stops_when_they_are_frozen(clips):
    good = sample.motion_scores(clips, True)
    shuffled = sample.motion_scores(clips[:, :, torch.tensor([4, 0, 7, 2, 8, 1, 6, 3, 5])], True)
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
    real, other = sample.fixed_features(clips[:128]), sample.fixed_features(clips[128:])
    blurred = torch.nn.functional.avg_pool3d(clips[128:], (1, 3, 3), 1, (0, 1, 1))
    noisy = clips[128:] + 0.1 * torch.randn(clips[128:].shape, generator=torch.Generator().manual_seed(0))
    same = clips[128:129].expand(128, -1, -1, -1, -1)
    base = sample.frechet(other, real)
    assert sample.frechet(real, real) == pytest.approx(0, abs=1e-6)
    for worse in blurred, noisy, same:
        assert sample.frechet(sample.fixed_features(worse), real) > 2 * base


def test_the_frechet_distance_is_that_of_two_gaussians():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 2, generator=g)
    b = torch.randn(200_000, 2, generator=g) * torch.tensor([2.0, 3.0]) + torch.tensor([1.0, 0.0])
    assert sample.frechet(a, b) == pytest.approx(1 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=0.03)


@pytest.mark.parametrize("stage, evaluations", [("dit", 80), ("pruned", 80), ("student", 4)])
def test_the_number_of_network_evaluations_is_counted_not_claimed(micro_run, stage, evaluations):
    model = sample.Model(micro_run / f"{stage}.pt", torch.device("cpu"), torch.no_grad, None, 3.0)
    clips = []
    model.dit.register_forward_hook(lambda _, args, __: clips.append(len(args[0])))
    model.sample(model.tokens(["a red circle moving left"] * 2), model.noise(2, 0))
    assert sum(clips) / 2 == model.evaluations == evaluations


def test_a_clips_noise_is_its_own_whatever_else_is_sampled(micro_run):
    model = sample.Model(micro_run / "student.pt", torch.device("cpu"), torch.no_grad, None, 3.0)
    assert torch.equal(model.noise(3, seed=5)[:, 2], model.noise(1, seed=7)[:, 0])


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_prompts_become_videos_and_contact_sheets(micro_run, tmp_path, suffix):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving left\n\na blue square moving up\n")
    out = tmp_path / f"some videos.{suffix}"
    sample.main(["--run", str(micro_run), "--prompts", str(prompts), "--out", str(out), "--device", "cpu"])
    if suffix == "png":
        image = np.asarray(Image.open(out))
        assert image.shape[1] == 5 * 132 and image.std() > 1  # five frames side by side
    else:
        frames = sample.iio.imread(out, plugin="pillow" if suffix == "gif" else "pyav")
        assert len(frames) == 5 and frames.std() > 1


def test_the_caption_is_written_on_the_picture():
    blank, written = (sample.cell(torch.zeros(3, 2, 8, 8), caption) for caption in ("", "a red circle"))
    assert blank.shape == written.shape and (written != blank).any()


def test_the_loss_on_unseen_clips_ranks_models_and_is_always_drawn_the_same(micro_run):
    data, device = dit.Latents(micro_run / "latents.pt"), torch.device("cpu")
    model, _ = dit.load_dit(micro_run / "dit.pt", device, "dit")
    loss = sample.test_loss(model, data, device, torch.no_grad)
    assert loss == sample.test_loss(model, data, device, torch.no_grad)
    for p in model.out.parameters():
        p.neg_()
    assert sample.test_loss(model, data, device, torch.no_grad) > loss

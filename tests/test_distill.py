"""Distillation: the discriminator, the student's few steps, the teacher's endpoint."""
import pytest
import torch
from conftest import folder_before, train

import distill
import dit
from common import files, training


def inputs(b=3):
    torch.manual_seed(4)
    return torch.randn(b, 4, 2, 3, 3), torch.randint(2, 10, (b, 5)), torch.randn(b, 4, 2, 3, 3)


def teach(discriminator, optimizer, steps, batch):
    """-> the last loss, and the discriminator's accuracy."""
    for _ in range(steps):
        loss, accuracy = distill.discriminator_loss(discriminator, *batch)
        discriminator.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), accuracy.item()


# ------------------------------------------------------------ the discriminator


def test_the_discriminator_is_conditioned_on_time_and_text(micro_dit):
    x, tokens, _ = inputs()
    s = torch.full((3,), 0.1)
    d = distill.Discriminator(micro_dit, 2, 1)
    scores = d(x, s, tokens)
    assert scores.shape == (3,)
    assert not torch.allclose(scores, d(x, s * 3, tokens))
    assert not torch.allclose(scores, d(x, s, tokens.flip(1)))
    timeless = distill.Discriminator(micro_dit, 2, 1, time_conditioning=False)
    assert torch.equal(timeless(x, s, tokens), timeless(x, s * 3, tokens))


def test_gradient_checkpointing_changes_no_gradient_of_the_discriminator(micro_dit):
    real, tokens, noise = inputs()
    d = distill.Discriminator(micro_dit, 2, 1)
    for p in d.blocks.parameters():
        torch.nn.init.normal_(p, std=0.2)
    fake = (real + noise).requires_grad_()
    gradients = []
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x,
                                                     lambda x: x)
    total = []
    for d.parser.gradient_checkpointing in False, True:
        kept.clear()
        with hooks:
            score = d(fake, torch.full((3,), 0.1), tokens).mean()
        gradients.append(torch.autograd.grad(score, [fake, *d.blocks.parameters()]))
        total.append(sum(kept))
    assert total[1] < total[0] / 2
    for one, other in zip(*gradients):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("design", [
    dict(frozen_blocks=1, trainable_blocks=1), dict(frozen_blocks=2, trainable_blocks=0),
    dict(frozen_blocks=0, trainable_blocks=2),
    dict(frozen_blocks=2, trainable_blocks=1, head="convolution")], ids=str)
def test_every_design_learns_to_tell_real_from_generated(micro_dit, design):
    real, tokens, noise = inputs(8)
    d = distill.Discriminator(micro_dit, **design)
    assert len(d.parser.blocks) == design["frozen_blocks"]
    assert not [p for p in d.parser.parameters() if p.requires_grad]
    attends = any("attention" in name for name, p in d.named_parameters() if p.requires_grad)
    assert attends == (design["trainable_blocks"] > 0 and "head" not in design)
    batch = real, real.roll(1, dims=-1) * 0.5, torch.full((8,), 0.08), noise, tokens
    before, _ = distill.discriminator_loss(d, *batch)
    loss, accuracy = teach(d, training.Optimizer(d, "adamw", 1e-2), 60, batch)
    assert accuracy > 0.85 and loss < before / 2


def test_with_nothing_to_tell_apart_the_hinge_loss_cannot_fall_below_two(micro_dit):
    real, tokens, noise = inputs()
    d = distill.Discriminator(micro_dit, 1, 1)
    s = torch.full((3,), 0.1)
    loss, accuracy = distill.discriminator_loss(d, real, real.clone(), s, noise, tokens)
    assert loss >= 2 - 1e-5  # but for rounding
    assert accuracy == pytest.approx(0.5)


def test_the_discriminators_frozen_part_never_moves_and_the_rest_does(micro_run):
    saved = files.load(micro_run / "discriminator.pt", "discriminator")
    start, _ = dit.load_dit(micro_run / "pruned.pt", torch.device("cpu"), "pruned")
    design = {name: value for name, value in saved["config"].items() if name != "dit"}
    discriminator = distill.Discriminator(dit.DiT(**saved["config"]["dit"]), **design)
    discriminator.load_state_dict(saved["model"])
    frozen = discriminator.parser.state_dict()
    assert len(discriminator.parser.blocks) == 1
    assert all(torch.equal(p, start.state_dict()[name]) for name, p in frozen.items())
    block, = discriminator.blocks
    for layer in block.self_attention.out, block.cross_attention.out, block.feed_forward.down:
        assert layer.weight.abs().max() > 0  # zero before the first step


def test_in_warm_up_the_adversarial_loss_is_off(micro_run, tmp_path):
    """All four steps of warm-up: the student is that of the distillation term alone."""
    students = []
    for name, flags in (("warm-up", ["--d-warmup", "1"]), ("alone", ["--adversarial", "0"]),
                        ("on", ["--d-warmup", "0.75"])):
        run = folder_before("distill", micro_run, tmp_path / name)
        train("distill", run, *flags)
        students.append(files.load(run / "student.pt", "student")["model"])
        assert (run / "discriminator.pt").exists() == (name != "alone")
    warm_up, alone, on = students
    assert all(torch.equal(p, alone[name]) for name, p in warm_up.items())
    assert not all(torch.equal(p, alone[name]) for name, p in on.items())


# ------------------------------------------------------------ the student's steps


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_student_makes_one_evaluation_per_step_without_guidance(micro_dit, steps):
    calls = []
    micro_dit.register_forward_hook(
        lambda _, inputs, __: calls.append((len(inputs[0]), inputs[1][0].item())))
    timesteps = distill.student_timesteps(steps)
    noise_per_step = torch.randn(steps, 3, 4, 2, 3, 3)
    list(distill.sample_student(micro_dit, noise_per_step, inputs()[1], timesteps))
    assert calls == [(3, pytest.approx(t)) for t in timesteps]


def test_the_students_levels_start_at_pure_noise_and_crowd_there():
    assert distill.student_timesteps(4) == pytest.approx([1, 0.9, 0.75, 0.5])
    assert distill.student_timesteps(1) == [1]


def test_a_student_that_knows_the_clip_finds_it_from_any_noise():
    x0 = torch.randn(1, 4, 2, 3, 3)

    class Perfect(torch.nn.Module):
        text_encoder = torch.nn.Identity()
        text_encoder.empty = torch.zeros(())

        def forward(self, x_t, t, text):
            return (x_t - x0) / dit.per_clip(t)

    noise_per_step = torch.randn(4, 1, 4, 2, 3, 3)
    timesteps = distill.student_timesteps(4)
    for _, _, found in distill.sample_student(Perfect(), noise_per_step, None, timesteps):
        torch.testing.assert_close(found, x0)


def test_the_teachers_endpoint_from_pure_noise_is_its_own_sample(micro_dit):
    _, tokens, noise = inputs()
    end = distill.teacher_endpoint(micro_dit, noise, torch.ones(3), tokens, 3.0, 5)
    *_, (_, _, sampled) = dit.sample_euler(micro_dit, noise, tokens, 5, 3.0)
    torch.testing.assert_close(end, sampled, rtol=1e-4, atol=1e-4)

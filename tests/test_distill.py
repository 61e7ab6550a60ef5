import copy
import shutil

import pytest
import torch
from conftest import train

import distill
import dit
import vae


def inputs(b=3):
    torch.manual_seed(4)
    return torch.randn(b, 4, 2, 3, 3), torch.randint(2, 10, (b, 5)), torch.randn(b, 4, 2, 3, 3)


def test_the_discriminators_frozen_part_never_moves_and_the_rest_does(micro_dit):
    real, tokens, noise = inputs()
    d = distill.Discriminator(micro_dit, frozen_blocks=2, learned_blocks=1)
    before = copy.deepcopy(d.state_dict())
    settings = type("Args", (), dict(optimizer="muon", lr=0.02, batch_size=3))
    optimizer, s = vae.Optimizer(d, settings, 10), torch.full((3,), 0.1)
    for _ in range(3):
        loss, _ = distill.discriminator_loss(d, real, real + 1, s, noise, tokens, 0.1, noise)
        optimizer.step(loss)
    moved = {k for k, v in d.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not [k for k in moved if k.startswith("parser.")]
    assert {k for k in moved if "self_attention" in k} and {k for k in moved if "cross_attention" in k}
    for i in range(2):  # it is the generator's own start
        assert torch.equal(d.parser.blocks[i].feed_forward.up.weight, micro_dit.blocks[i].feed_forward.up.weight)
    assert len(d.parser.blocks) == 2 and len(micro_dit.blocks) == 3


def test_a_discriminator_of_no_known_design_is_refused(micro_dit):
    for design in dict(head="linear"), dict(frozen_blocks=4):
        with pytest.raises(ValueError):
            distill.Discriminator(micro_dit, **{"frozen_blocks": 2, "learned_blocks": 1, **design})


def test_the_discriminator_is_conditioned_on_time_and_text(micro_dit):
    x, tokens, _ = inputs()
    d, s = distill.Discriminator(micro_dit, 2, 1), torch.full((3,), 0.1)
    scores = d(x, s, tokens)
    assert scores.shape == (3,)
    assert not torch.allclose(scores, d(x, s * 3, tokens))
    assert not torch.allclose(scores, d(x, s, tokens.flip(1)))


@pytest.mark.parametrize("design", [dict(frozen_blocks=2, learned_blocks=0), dict(frozen_blocks=0, learned_blocks=2),
                                    dict(frozen_blocks=2, learned_blocks=1, head="convolution")])
def test_other_designs_learn_only_what_they_say_and_tell_real_from_generated(micro_dit, design):
    real, tokens, noise = inputs(8)
    fake, s, d = real * 0.2, torch.full((8,), 0.08), distill.Discriminator(micro_dit, **design)
    assert not [name for name, p in d.parser.named_parameters() if p.requires_grad]
    attends = any("attention" in name for name, p in d.named_parameters() if p.requires_grad)
    assert attends == (design["frozen_blocks"] == 0) and len(d.parser.blocks) == design["frozen_blocks"]
    optimizer = vae.Optimizer(d, type("Args", (), dict(optimizer="adamw", lr=1e-2, batch_size=3)), 60)
    for _ in range(60):
        loss, told = distill.discriminator_loss(d, real, fake, s, noise, tokens)
        optimizer.step(loss)
    assert told > 0.85


def test_without_time_conditioning_every_level_looks_the_same(micro_dit):
    x, tokens, _ = inputs()
    d, s = distill.Discriminator(micro_dit, 2, 1, time_conditioning=False), torch.full((3,), 0.1)
    assert torch.equal(d(x, s, tokens), d(x, s * 3, tokens))


def test_the_student_does_not_hear_a_discriminator_that_is_still_ahead(micro_run, tmp_path):
    """Four steps, the discriminator ahead all the time: the student is that of the distillation term alone."""
    students = []
    for i, flags in enumerate((["--discriminator-ahead", "4"], ["--adversarial", "0"], ["--discriminator-ahead", "3"])):
        for file in "latents.pt", "dit.pt", "pruned.pt":
            (tmp_path / str(i)).mkdir(exist_ok=True)
            shutil.copy(micro_run / file, tmp_path / str(i))
        train("distill", tmp_path / str(i), *flags)
        students.append(vae.load(tmp_path / str(i) / "student.pt", "student")["model"])
    ahead, alone, heard = students
    assert all(torch.equal(ahead[k], alone[k]) for k in ahead)
    assert not all(torch.equal(heard[k], alone[k]) for k in ahead)


def test_a_discriminator_learns_to_tell_real_from_generated(micro_dit):
    real, tokens, noise = inputs(8)
    fake, s = real.roll(1, dims=-1) * 0.5, torch.full((8,), 0.08)
    d = distill.Discriminator(micro_dit, 1, 1)
    optimizer = vae.Optimizer(d, type("Args", (), dict(optimizer="adamw", lr=3e-3, batch_size=3)), 40)
    for _ in range(40):
        loss, told = distill.discriminator_loss(d, real, fake, s, noise, tokens)
        optimizer.step(loss)
    assert told > 0.9 and loss < 1


def test_with_nothing_to_tell_apart_the_hinge_loss_cannot_fall_below_two(micro_dit):
    real, tokens, noise = inputs()
    d = distill.Discriminator(micro_dit, 1, 1)
    loss, told = distill.discriminator_loss(d, real, real.clone(), torch.full((3,), 0.1), noise, tokens)
    assert loss >= 2 - 1e-5 and told == pytest.approx(0.5)  # but for rounding


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_student_makes_one_evaluation_a_step_without_guidance(micro_dit, steps):
    calls = []
    micro_dit.register_forward_hook(lambda _, args, __: calls.append((len(args[0]), args[1][0].item())))
    noises = torch.randn(steps, 3, 4, 2, 3, 3)
    distill.sample_student(micro_dit, noises, inputs()[1])
    assert calls == [(3, pytest.approx(t)) for t in distill.student_times(steps).tolist()]


def test_the_students_levels_start_at_pure_noise_and_crowd_there():
    torch.testing.assert_close(distill.student_times(4), torch.tensor([1, 0.9, 0.75, 0.5]))
    assert distill.student_times(1).tolist() == [1]


def test_the_student_starts_from_noise_and_forgets_a_perfect_x0():
    noises, x0 = torch.randn(4, 1, 4, 2, 3, 3), torch.randn(1, 4, 2, 3, 3)

    class Perfect(torch.nn.Module):
        text_encoder = torch.nn.Identity()

        def forward(self, x_t, t, text):
            return (x_t - x0) / t.view(-1, 1, 1, 1, 1)

    torch.testing.assert_close(distill.sample_student(Perfect(), noises, None), x0)


def test_the_teachers_endpoint_from_pure_noise_is_its_own_sample(micro_dit):
    _, tokens, noise = inputs()
    end = distill.teacher_endpoint(micro_dit, noise, torch.ones(3), tokens, 3.0, 5)
    torch.testing.assert_close(end, dit.sample_euler(micro_dit, noise, tokens, torch.zeros_like(tokens), 5, 3.0),
                               rtol=1e-4, atol=1e-4)

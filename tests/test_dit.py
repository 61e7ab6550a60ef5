"""The DiT: guidance, attention over space and time, the flow, and what a size costs."""
import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit
from common import data, training


def inputs(b=2):
    torch.manual_seed(1)
    return torch.randn(b, 4, 2, 3, 3), torch.rand(b), torch.randint(2, 10, (b, 5))


def test_cfg_1_is_the_conditional_model_and_other_scales_extrapolate(micro_dit):
    x, t, tokens = inputs()
    text = micro_dit.text_encoder(tokens)
    empty = micro_dit.text_encoder(torch.zeros_like(tokens))
    conditional = micro_dit(x, t, text)
    unconditional = micro_dit(x, t, empty)

    def guided(cfg):
        return dit.guided_velocity(micro_dit, x, t, text, empty, cfg)

    torch.testing.assert_close(guided(1), conditional)
    torch.testing.assert_close(guided(1 + 1e-9), conditional)
    torch.testing.assert_close(guided(0), unconditional)
    further = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(guided(3), further, rtol=1e-4, atol=1e-4)


def test_the_velocity_depends_on_noise_time_and_text(micro_dit):
    x, t, tokens = inputs()
    text = micro_dit.text_encoder(tokens)
    v = micro_dit(x, t, text)
    assert v.shape == x.shape
    assert not torch.allclose(v, micro_dit(x + 0.1, t, text))
    assert not torch.allclose(v, micro_dit(x, t / 2, text))
    assert not torch.allclose(v, micro_dit(x, t, micro_dit.text_encoder(tokens.flip(1))))


def test_attention_is_full_3d_every_token_reaches_every_other(micro_dit):
    x, t, tokens = inputs(1)
    x.requires_grad_(True)
    v = micro_dit(x, t, micro_dit.text_encoder(tokens))
    gradient, = torch.autograd.grad(v[0, 0, 1, 2, 2], x)
    assert (gradient[0].abs().sum(0) > 0).all()


def test_rope_makes_attention_depend_on_relative_positions_in_time_height_and_width():
    angles = dit.rope_angles(4, 4, 4, 16, "cpu").view(4, 4, 4, 8)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(at_q, at_k):
        q_rope = angles[at_q].cos(), angles[at_q].sin()
        k_rope = angles[at_k].cos(), angles[at_k].sin()
        return (dit.rotate(q, q_rope) * dit.rotate(k, k_rope)).sum()

    reference = score((0, 0, 0), (1, 2, 1))
    torch.testing.assert_close(score((2, 1, 2), (3, 3, 3)), reference)
    for other in (2, 2, 1), (1, 3, 1), (1, 2, 2):
        assert not torch.allclose(score((0, 0, 0), other), reference)


def test_a_new_model_is_the_zero_function_and_its_blocks_the_identity():
    model = dit.DiT(4, 32, 2, 4, 16, 64, vocabulary=10, text_tokens=5)
    x, t, tokens = inputs()
    v, features = model(x, t, model.text_encoder(tokens), return_features=True)
    assert v.abs().max() == 0
    assert torch.equal(features[0], features[1])


class Perfect(torch.nn.Module):
    """Knows the velocity, so that any number of steps ends at the data."""

    text_encoder = torch.nn.Identity()
    text_encoder.empty = torch.zeros(())

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, x_t, t, text, masks=None):
        return self.velocity.expand_as(x_t)


def test_the_flow_goes_from_noise_to_data_along_a_straight_line():
    x0, noise = torch.randn(2, 1, 4, 2, 3, 3)
    torch.testing.assert_close(dit.add_noise(x0, noise, torch.tensor([0.0])), x0)
    torch.testing.assert_close(dit.add_noise(x0, noise, torch.tensor([1.0])), noise)
    perfect = Perfect(noise - x0)
    tokens = torch.zeros(1, 5)
    for steps in 1, 7:
        *_, (_, _, x) = dit.sample_euler(perfect, noise, tokens, steps, 3.0)
        torch.testing.assert_close(x, x0)
    assert dit.flow_loss(perfect, x0, tokens, noise, torch.tensor([0.3])) < 1e-12


def test_a_share_of_the_batches_is_pictures(micro_run):
    latents = data.Latents(micro_run / "latents.pt")
    for share in 0.0, 0.3, 1.0:
        args = SimpleNamespace(seed=0, batch_size=4, picture_share=share, cfg_dropout=0.1,
                               noise_level=0.0)
        pictures = 0
        for step in range(200):
            x0, _, noise, t = dit.draw_batch(latents, args, "dit", step)
            assert x0.shape == noise.shape and t.shape == (4,)
            pictures += x0.shape[2] == 1
        assert pictures / 200 == pytest.approx(share, abs=0.1)


def test_noise_levels_lie_between_0_and_1_about_their_mean():
    t = dit.logit_normal(10_000, torch.Generator().manual_seed(0), mean=-2.5)
    assert 0 < t.min() and t.max() < 1
    assert t.median() == pytest.approx(0.076, rel=0.05)


def test_a_share_of_the_captions_is_left_out_for_guidance(micro_run):
    latents = data.Latents(micro_run / "latents.pt")
    g = training.step_generator("test")
    _, tokens = latents.draw(g, 400, 0.25, is_pictures=False)
    empty = (tokens == data.PAD).all(1).float().mean()
    assert empty == pytest.approx(0.25, abs=0.07)
    _, tokens = latents.draw(g, 400, 0.0, is_pictures=False)
    assert not (tokens == data.PAD).all(1).any()


def test_latents_are_normalised_per_channel(micro_run):
    latents = data.Latents(micro_run / "latents.pt")
    x0 = latents.x0(latents.train)
    torch.testing.assert_close(x0.mean((0, 2, 3, 4)), torch.zeros(8), atol=2e-2, rtol=0)
    torch.testing.assert_close(x0.std((0, 2, 3, 4)), torch.ones(8), atol=2e-2, rtol=0)


# ------------------------------------------------------------ what a size costs


CONFIG = dict(latent_channels=4, width=128, depth=3, heads=4, head_dim=32, ffn=512, vocabulary=9,
              text_tokens=5)


def test_the_flops_that_a_dry_run_says_are_those_of_an_evaluation():
    for changes in {}, dict(heads=2, ffn=384), dict(text_tokens=40):
        config = CONFIG | changes
        model = dit.DiT(**config)
        x = torch.randn(1, 4, 4, 6, 6)
        tokens = torch.ones(1, config["text_tokens"]).long()
        # The counter knows no fused attention on a CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(x, torch.rand(1), model.text_encoder(tokens))
        said = dit.forward_flops(config, 4 * 6 * 6)
        assert said == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("command, expected", [
    ("dit --preset server --dry-run",
     ["28 blocks, 32 heads", "FFN 8192", "9,216 tokens", "1,912 M"]),  # stated: 2.0 B
    ("dit --preset server --dry-run 49x384x512", ["1,344 tokens", "4.93 TFLOP"]),
    ("prune --preset mobile --dry-run",
     ["28 blocks, 32 heads", "20 blocks, 20 heads", "FFN 6144", "pruned to 50.0%"])])  # 46 %
def test_a_dry_run_prices_the_papers_sizes_without_making_them(command, expected, capsys):
    name, *flags = command.split()
    importlib.import_module(name).main(flags)
    out = capsys.readouterr().out
    for words in expected:
        assert words in out

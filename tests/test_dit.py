import importlib

import pytest
import torch
import torch.nn.functional as F

import dit


def inputs(b=2):
    torch.manual_seed(1)
    return torch.randn(b, 4, 2, 3, 3), torch.rand(b), torch.randint(2, 10, (b, 5))


def test_cfg_1_is_the_conditional_model_and_other_scales_extrapolate(micro_dit):
    x, t, tokens = inputs()
    text, empty = micro_dit.text_encoder(tokens), micro_dit.text_encoder(torch.zeros_like(tokens))
    conditional, unconditional = micro_dit(x, t, text), micro_dit(x, t, empty)
    torch.testing.assert_close(dit.guided_velocity(micro_dit, x, t, text, empty, 1), conditional)
    torch.testing.assert_close(dit.guided_velocity(micro_dit, x, t, text, empty, 1 + 1e-9), conditional)
    torch.testing.assert_close(dit.guided_velocity(micro_dit, x, t, text, empty, 0), unconditional)
    torch.testing.assert_close(dit.guided_velocity(micro_dit, x, t, text, empty, 3),
                               unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


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
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(at_q, at_k):
        rope = [(angles[at].cos(), angles[at].sin()) for at in (at_q, at_k)]
        return (dit.rotate(q, rope[0]) * dit.rotate(k, rope[1])).sum()

    reference = score((0, 0, 0), (1, 2, 1))
    torch.testing.assert_close(score((2, 1, 2), (3, 3, 3)), reference)
    for other in (2, 2, 1), (1, 3, 1), (1, 2, 2):
        assert not torch.allclose(score((0, 0, 0), other), reference)


def test_the_flow_goes_from_noise_to_data_along_a_straight_line():
    x0, noise = torch.randn(2, 1, 4, 2, 3, 3)
    torch.testing.assert_close(dit.add_noise(x0, noise, torch.tensor([0.0])), x0)
    torch.testing.assert_close(dit.add_noise(x0, noise, torch.tensor([1.0])), noise)

    class Perfect(torch.nn.Module):  # knows the velocity, so any number of steps ends at the data
        text_encoder = torch.nn.Identity()

        def forward(self, x_t, t, text):
            return (noise - x0).expand_as(x_t)

    tokens = torch.zeros(1, 5)
    for steps in 1, 7:
        torch.testing.assert_close(dit.sample_euler(Perfect(), noise, tokens, tokens, steps, 3.0), x0)
    assert dit.flow_loss(Perfect(), x0, tokens, noise, torch.tensor([0.3])) < 1e-12


def test_a_new_model_is_the_zero_function_and_its_blocks_the_identity():
    model = dit.DiT(4, 32, 2, 4, 16, 64, vocabulary=10, text_tokens=5)
    x, t, tokens = inputs()
    v, features = model(x, t, model.text_encoder(tokens), return_features=True)
    assert v.abs().max() == 0 and torch.equal(features[0], features[1])


def test_unknown_words_are_named_and_left_out(capsys):
    vocabulary = ["<pad>", "a", "red", "circle"]
    tokens = dit.tokenize(["A red, CIRCLE", "a turquoise circle"], vocabulary, 5)
    assert tokens.tolist() == [[1, 2, 3, 0, 0], [1, 3, 0, 0, 0]]
    assert "turquoise" in capsys.readouterr().err


def test_the_paper_sizes_have_the_stated_number_of_parameters():
    def params(preset):
        p = dit.PRESETS[preset]
        with torch.device("meta"):
            model = dit.DiT(128, p["width"], p["depth"], p["heads"], p["head_dim"], p["ffn"], 0, 256, text_dim=4096)
        return sum(x.numel() for x in model.parameters())

    assert params("server") == pytest.approx(2.0e9, rel=0.05)  # stated: 2.0 B
    assert params("mobile") == pytest.approx(0.915e9, rel=0.07)  # stated: 0.915 B; ours prunes cross-attention too


def test_recomputed_activations_give_the_same_gradients_and_keep_less(micro_dit):
    batch = torch.randn(2, 4, 2, 3, 3), torch.randint(2, 10, (2, 5)), torch.randn(2, 4, 2, 3, 3), torch.rand(2)
    gradients = []
    for recompute in False, True:
        micro_dit.recompute = recompute
        gradients.append(torch.autograd.grad(dit.flow_loss(micro_dit, *batch), list(micro_dit.parameters())))
    for kept, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, kept)
    whole, saving = (dit.cost(micro_dit.config, (4, 2, 3, 3), recompute) for recompute in (False, True))
    assert saving["activation_bytes"] < whole["activation_bytes"] / 3
    assert saving["step_flops"] > whole["step_flops"]


def test_written_out_attention_is_attention():
    q, k, v = torch.randn(3, 2, 4, 7, 16).bfloat16()
    k, v = k[:, :, :5], v[:, :, :5]
    reference = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(dit.attend(q, k, v).float(), reference, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_memory_that_a_dry_run_says_is_what_a_step_keeps(recompute, monkeypatch):
    config = dict(latent_channels=4, width=64, depth=3, heads=4, head_dim=16, ffn=256, vocabulary=9, text_tokens=5)
    model, x0, kept = dit.DiT(**config), torch.randn(1, 4, 3, 4, 5), {}
    model.recompute = recompute
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    monkeypatch.setattr(dit, "attend", F.scaled_dot_product_attention)  # what a GPU has: attention keeps no scores

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        dit.flow_loss(model, x0, torch.ones(1, 5).long(), torch.randn_like(x0), torch.rand(1))
    measured = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    monkeypatch.undo()
    assert dit.cost(config, x0.shape[1:], recompute)["activation_bytes"] == pytest.approx(measured, rel=0.01)


def test_the_cost_of_a_size_is_what_arithmetic_says():
    config, shape = dit.planned("mobile", (49, 384, 512))
    assert shape == (128, 7, 12, 16)
    c, n, m, width, inner, ffn = dit.cost(config, shape), 1344, 128, 2048, 20 * 64, 6144
    matrices = 4 * width * inner * n + 2 * width * inner * n + 2 * width * inner * m + 2 * width * ffn * n
    attention = 2 * n * n * inner + 2 * n * m * inner
    forward = 2 * 20 * (matrices + attention)
    assert c["tokens"] == n and abs(c["forward_flops"] / forward - 1) < 0.02  # the rest: text, time, in and out
    assert 3 * forward < c["step_flops"] < 3.2 * forward


@pytest.mark.parametrize("command, expected", [
    ("dit --preset server", ["28 blocks, 32 heads", "FFN 8192", "9,216 tokens", "1.91 B"]),
    ("dit --preset server --dry-run 49x384x512", ["1,344 tokens", "38.2 GB"]),
    ("prune --preset mobile", ["28 blocks, 32 heads", "20 blocks, 20 heads", "FFN 6144", "pruned to 50.0%"])])
def test_a_dry_run_prices_the_papers_sizes_without_making_them(command, expected, capsys):
    name, *flags = command.split()
    importlib.import_module(name).main([*flags, *([] if "--dry-run" in flags else ["--dry-run"])])
    out = capsys.readouterr().out
    assert all(word in out for word in expected), out

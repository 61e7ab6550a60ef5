"""Pruning: masked equals dense, the budget, what the masks learn, and the teacher's guidance."""
import pytest
import torch

import dit
import prune

KEEP = {"blocks": 2, "self_heads": 3, "cross_heads": 2, "ffn": 40}


def inputs():
    torch.manual_seed(2)
    return torch.randn(2, 4, 2, 3, 3), torch.rand(2), torch.randint(2, 10, (2, 5))


def a_batch():
    x0, t, tokens = inputs()
    return x0, tokens, torch.randn_like(x0), t


def velocity(model, masks=None):
    x, t, tokens = inputs()
    return model(x, t, model.text_encoder(tokens), masks)


def random_masks(model, budget):
    torch.manual_seed(3)
    full = prune.full_masks(model.config)
    return prune.Masks({name: torch.rand_like(m) for name, m in full.items()}, budget)


def on_or_off(masks):
    return {name: m.detach().round() for name, m in masks.items()}


def test_a_pruned_dense_model_equals_its_masked_parent(micro_dit):
    budget = KEEP | {"cross_heads": KEEP["self_heads"]}  # one count of heads for the model
    masks = on_or_off(random_masks(micro_dit, budget)())
    dense = prune.cut(micro_dit, masks)
    assert dense.config["depth"] == budget["blocks"]
    assert dense.config["heads"] == budget["self_heads"]
    assert dense.config["ffn"] == budget["ffn"]
    masked = velocity(micro_dit, masks)
    torch.testing.assert_close(velocity(dense), masked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(masked, velocity(micro_dit), atol=1e-2)  # the cut did something


def test_full_masks_change_nothing(micro_dit):
    full = prune.full_masks(micro_dit.config)
    torch.testing.assert_close(velocity(micro_dit, full), velocity(micro_dit))


def test_masks_are_binary_and_reach_the_budget_on_a_schedule(micro_dit):
    masks = random_masks(micro_dit, KEEP)
    counts = []
    for done in 0, 0.3, 0.6, 1:
        now = masks(done)
        for m in now.values():
            torch.testing.assert_close(m, m.round())
            assert set(m.round().unique().tolist()) <= {0, 1}
        counts.append(int(now["ffn"].round().sum(-1).max()))
    assert counts[0] == 64 and counts[-1] == KEEP["ffn"]
    assert counts == sorted(counts, reverse=True)
    for name, m in masks().items():
        assert (m.round().sum(-1) == KEEP[name]).all()


def test_units_that_are_off_still_get_a_gradient(micro_dit):
    masks = random_masks(micro_dit, KEEP)
    now = masks()
    velocity(micro_dit, now).square().mean().backward()
    for name, logits in masks.logits.items():
        is_off = now[name].detach() < 0.5
        assert (logits.grad[is_off] != 0).any(), name


def test_taylor_importance_and_magnitude_find_the_units_that_do_nothing(micro_dit):
    first, second, third = micro_dit.blocks
    with torch.no_grad():  # kill one head, one channel and one block by their outgoing weights
        first.self_attention.out.weight[:, 16:32] = 0
        second.feed_forward.down.weight[:, 7] = 0
        third.self_attention.out.weight.zero_()
        third.cross_attention.out.weight.zero_()
        third.feed_forward.down.weight.zero_()
    taylor = prune.sensitivity(micro_dit, "taylor", [a_batch()])
    assert taylor["self_heads"][0].argmin() == 1 and taylor["self_heads"][0, 1] == 0
    assert taylor["ffn"][1].argmin() == 7
    assert taylor["blocks"].argmin() == 2 and taylor["blocks"][2] == 0
    magnitude = prune.sensitivity(micro_dit, "magnitude", [a_batch()])
    assert magnitude["self_heads"][0].argmin() == 1
    assert magnitude["ffn"][1].argmin() == 7


def test_taylor_importance_is_the_loss_that_cutting_a_little_of_a_unit_costs(micro_dit):
    x0, tokens, noise, t = a_batch()
    scores = prune.sensitivity(micro_dit, "taylor", [(x0, tokens, noise, t)])

    def loss(mask_of_block_1):
        masks = prune.full_masks(micro_dit.config)
        masks["blocks"][1] = mask_of_block_1
        x_t = dit.add_noise(x0, noise, t)
        v = micro_dit(x_t, t, micro_dit.text_encoder(tokens), masks)
        return (v - (noise - x0)).square().mean().item()

    slope = (loss(1.01) - loss(0.99)) / 0.02
    assert scores["blocks"][1].item() == pytest.approx(abs(slope), rel=0.02)


def test_learned_masks_move_towards_what_the_teacher_needs():
    """A teacher in which one head does all the work: masks that start with it cut get it back."""
    torch.manual_seed(0)
    teacher = dit.DiT(4, 32, 1, 4, 16, 64, vocabulary=10, text_tokens=5)
    for p in teacher.parameters():
        torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        out = teacher.blocks[0].self_attention.out.weight
        out[:, :48] *= 0.01  # heads 0 to 2 hardly count
        out[:, 48:] *= 3
    scores = {name: torch.zeros_like(m) for name, m in prune.full_masks(teacher.config).items()}
    scores["self_heads"][0] = torch.tensor([1.0, 0.9, 0.8, -0.2])
    masks = prune.Masks(scores, {"blocks": 1, "self_heads": 2, "cross_heads": 4, "ffn": 64})
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.02, momentum=0.9)
    assert masks()["self_heads"][0, 3].round() == 0
    for _ in range(60):
        loss = (velocity(teacher, masks()) - velocity(teacher)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        masks.normalize_gradients()
        optimizer.step()
    assert masks()["self_heads"][0, 3].round() == 1


def test_kd_is_zero_for_the_teacher_itself(micro_dit):
    plain = prune.kd_loss(micro_dit, micro_dit, a_batch(), [])
    both = prune.kd_loss(micro_dit, micro_dit, a_batch(), ["output", "features"])
    torch.testing.assert_close(plain, both)


def test_kd_asks_the_same_of_a_masked_student_and_of_its_dense_cut(micro_dit):
    """A block that stays learns from the teacher's block at its own place."""
    masks = on_or_off(random_masks(micro_dit, KEEP | {"cross_heads": 3})())
    dense = prune.cut(micro_dit, masks)
    kept_blocks = masks["blocks"].nonzero().flatten().tolist()
    kd = ["output", "features"]
    loss_masked = prune.kd_loss(micro_dit, micro_dit, a_batch(), kd, masks)
    loss_dense = prune.kd_loss(dense, micro_dit, a_batch(), kd, None, kept_blocks)
    torch.testing.assert_close(loss_dense, loss_masked)
    elsewhere = prune.kd_loss(dense, micro_dit, a_batch(), kd, None, [1, 0])
    assert not torch.allclose(loss_dense, elsewhere)

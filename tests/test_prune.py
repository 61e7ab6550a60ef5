import pytest
import torch

import dit
import prune

KEEP = {"blocks": 2, "self_heads": 3, "cross_heads": 2, "ffn": 40}


def inputs():
    torch.manual_seed(2)
    return torch.randn(2, 4, 2, 3, 3), torch.rand(2), torch.randint(2, 10, (2, 5))


def velocity(model, masks=None):
    x, t, tokens = inputs()
    return model(x, t, model.text_encoder(tokens), masks)


def random_masks(model, keep):
    torch.manual_seed(3)
    scores = {name: torch.rand_like(m) for name, m in prune.full_masks(model.config).items()}
    return {name: m.detach() for name, m in prune.Masks(scores, keep)().items()}


@pytest.mark.parametrize("level", [*KEEP, "all"])
def test_a_pruned_dense_model_equals_its_masked_parent(micro_dit, level):
    everything = {name: m.shape[-1] for name, m in prune.full_masks(micro_dit.config).items()}
    keep = KEEP | {"cross_heads": 3} if level == "all" else everything | {level: KEEP[level]}
    if level.endswith("heads"):  # one count of heads a model
        keep |= {"self_heads": KEEP[level], "cross_heads": KEEP[level]}
    masks = random_masks(micro_dit, keep)
    dense = prune.cut(micro_dit, masks)
    assert dense.config["depth"] == keep["blocks"] and dense.config["ffn"] == keep["ffn"]
    torch.testing.assert_close(velocity(dense), velocity(micro_dit, masks), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(velocity(dense), velocity(micro_dit), atol=1e-2)  # and the cut did something


def test_full_masks_change_nothing(micro_dit):
    torch.testing.assert_close(velocity(micro_dit, prune.full_masks(micro_dit.config)), velocity(micro_dit))


def test_masks_are_binary_and_reach_the_budget_on_a_schedule(micro_dit):
    scores = {name: torch.rand_like(m) for name, m in prune.full_masks(micro_dit.config).items()}
    masks = prune.Masks(scores, KEEP)
    counts = []
    for progress in 0, 0.3, 0.6, 1:
        now = masks(progress)
        assert all(((m.round() - m).abs() < 1e-6).all() and set(m.round().unique().tolist()) <= {0, 1}
                   for m in now.values())
        counts.append(int(now["ffn"].sum(-1).max().round()))
    assert counts[0] == 64 and counts[-1] == KEEP["ffn"] and counts == sorted(counts, reverse=True)
    assert all((m.round().sum(-1) == KEEP[name]).all() for name, m in masks().items())


def test_units_that_are_off_still_get_a_gradient(micro_dit):
    scores = {name: torch.rand_like(m) for name, m in prune.full_masks(micro_dit.config).items()}
    masks = prune.Masks(scores, KEEP)
    now = masks()
    velocity(micro_dit, now).square().mean().backward()
    for name, logits in masks.logits.items():
        assert (logits.grad[now[name].detach() < 0.5] != 0).any(), name


def batches(model):
    x0, t, tokens = inputs()
    return [(x0, tokens, torch.randn_like(x0), t)]


def test_sensitivity_finds_the_units_that_do_nothing(micro_dit):
    with torch.no_grad():  # kill one head, one channel and one block by their outgoing weights
        micro_dit.blocks[0].self_attention.out.weight[:, 16:32] = 0
        micro_dit.blocks[1].feed_forward.down.weight[:, 7] = 0
        for layer in (micro_dit.blocks[2].self_attention.out, micro_dit.blocks[2].cross_attention.out,
                      micro_dit.blocks[2].feed_forward.down):
            layer.weight.zero_()
    taylor = prune.sensitivity(micro_dit, "taylor", batches(micro_dit))
    assert taylor["self_heads"][0].argmin() == 1 and taylor["self_heads"][0, 1] == 0
    assert taylor["ffn"][1].argmin() == 7 and taylor["blocks"].argmin() == 2 and taylor["blocks"][2] == 0
    magnitude = prune.sensitivity(micro_dit, "magnitude", batches(micro_dit))
    assert magnitude["self_heads"][0].argmin() == 1 and magnitude["ffn"][1].argmin() == 7


def test_learned_masks_move_towards_what_the_teacher_needs():
    """A teacher in which one head does all the work; masks that start with it cut get it back under output KD."""
    torch.manual_seed(0)
    teacher = dit.DiT(4, 32, 1, 4, 16, 64, vocabulary=10, text_tokens=5)
    for p in teacher.parameters():
        torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        teacher.blocks[0].self_attention.out.weight[:, :48] *= 0.01  # heads 0 to 2 hardly count
        teacher.blocks[0].self_attention.out.weight[:, 48:] *= 3
    scores = {name: torch.zeros_like(m) for name, m in prune.full_masks(teacher.config).items()}
    scores["self_heads"][0] = torch.tensor([1.0, 0.9, 0.8, -0.2])
    keep = {"blocks": 1, "self_heads": 2, "cross_heads": 4, "ffn": 64}
    masks = prune.Masks(scores, keep)
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.02, momentum=0.9)
    assert masks()["self_heads"][0, 3] == 0
    for _ in range(60):
        loss = (velocity(teacher, masks()) - velocity(teacher)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        masks.level_gradients()
        optimizer.step()
    assert masks()["self_heads"][0, 3] == 1


def test_kd_is_zero_for_the_teacher_itself(micro_dit):
    batch = batches(micro_dit)[0]
    plain = prune.kd_loss(micro_dit, micro_dit, batch, [])
    both = prune.kd_loss(micro_dit, micro_dit, batch, ["output", "features"], kept=[0, 1, 2])
    torch.testing.assert_close(plain, both)

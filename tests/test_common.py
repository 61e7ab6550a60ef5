"""What every script shares: optimisers, the learning rate, shares of a batch; who may import whom.
Files and resuming have tests of their own: test_resume, test_bad_input."""
import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import cli, data, training

ROOT = Path(__file__).parent.parent
PIPELINE = ["common.cli", "common.files", "common.training", "common.reader", "common.data",
            "common.report", "common.coreml_evaluator",
            "vae", "dit", "prune", "distill", "sample", "export_coreml"]


@pytest.mark.parametrize("name", PIPELINE)
def test_imports_point_upstream_only(name):
    upstream = PIPELINE[:PIPELINE.index(name)]
    path = ROOT / f"{name.replace('.', '/')}.py"
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            imported |= {f"common.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & set(PIPELINE) <= set(upstream)


def test_the_learning_rate_goes_up_then_down_to_zero():
    steps = 400
    shares = [training.warmup_linear(step, steps) for step in range(steps + 1)]
    peak = shares.index(max(shares))
    assert 20 <= peak <= 40 and 0.9 < shares[peak] <= 1
    assert 0 < shares[0] < 0.1
    assert shares[:peak + 1] == sorted(shares[:peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert shares[-1] == pytest.approx(0, abs=1e-12)
    assert training.warmup_linear(0, 1) == 1  # a run of one step learns


def test_the_average_weights_forget_the_first_two_thirds_of_a_short_run():
    model = torch.nn.Linear(1, 1, bias=False)
    averages = []
    for steps in (30, 10_000):
        args = SimpleNamespace(ema=0.999, steps=steps)
        torch.nn.init.zeros_(model.weight)
        ema = training.average_weights(model, args)
        ema.update_parameters(model)
        torch.nn.init.ones_(model.weight)
        for _ in range(30):
            ema.update_parameters(model)
        averages.append(ema.module.weight.item())
    assert averages[0] == pytest.approx(1 - 0.9 ** 30)
    assert averages[1] == pytest.approx(1 - 0.999 ** 30, rel=1e-3)


def test_steps_below_one_are_a_share_of_the_presets():
    parse = cli.steps_of(900)
    assert [parse(text) for text in ("0.1", "0.0001", "1", "2000")] == [90, 1, 1, 2000]


def test_muon_makes_every_direction_of_a_matrix_count_the_same():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(16, 40))
    weight.grad = torch.randn(16, 40) * torch.logspace(0, -2, 16)[:, None]
    training.Muon([weight], lr=1.0).step()
    before = torch.linalg.svdvals(weight.grad)
    assert before.max() > 100 * before.min()
    singular = torch.linalg.svdvals(weight)
    assert singular.min() > 0.5 and singular.max() < 1.3
    assert (weight * weight.grad).sum() < 0  # and it goes downhill


def test_muon_blows_up_no_direction_that_the_gradient_does_not_have():
    """A gradient of low rank is the hard case: rounding stands where its small singular values
    would be."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(32, 64))
    weight.grad = torch.randn(32, 3) @ torch.randn(3, 64)
    training.Muon([weight], lr=1.0).step()
    singular = torch.linalg.svdvals(weight)
    assert singular[:3].min() > 0.5 and singular.max() < 1.3 and singular[3] < 1e-4


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (8, 4, 3, 3, 3)], ids=str)
def test_muon_steps_matrices_of_one_shape_as_it_would_each_alone(shape):
    torch.manual_seed(0)
    gradients = torch.randn(3, *shape)
    together = [nn.Parameter(torch.zeros(shape)) for _ in gradients]
    alone = [nn.Parameter(torch.zeros(shape)) for _ in gradients]
    for weights in together, alone:
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient.clone()
    training.Muon(together, lr=0.1).step()
    for weight in alone:
        training.Muon([weight], lr=0.1).step()
    for one, other in zip(together, alone):
        torch.testing.assert_close(one, other)


def test_what_has_no_gradient_holds_still():
    """Muon's momentum would move it on for dozens of steps."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(16, 16))
    optimizer = training.Muon([weight], lr=1.0)
    for _ in range(3):
        weight.grad = torch.randn(16, 16)
        optimizer.step()
    before = weight.detach().clone()
    weight.grad[:8] = 0  # these units are off now
    optimizer.step()
    assert torch.equal(weight[:8], before[:8])
    assert (weight[8:] != before[8:]).all()


def test_muon_takes_the_matrices_adamw_the_rest_and_frozen_parameters_rest():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].requires_grad_(False)
    muon, adamw = training.Optimizer(model, "muon", 0.02).parts
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model[1].weight)]
    taken = {id(p) for p in adamw.param_groups[0]["params"]}
    assert taken == {id(model[0].weight), id(model[1].bias)}
    paper, = training.Optimizer(model, "adamw", 0.02).parts
    assert isinstance(paper, torch.optim.AdamW)
    decay = {id(p): group["weight_decay"] for group in paper.param_groups for p in group["params"]}
    assert decay == {id(model[1].weight): 0.01, id(model[0].weight): 0, id(model[1].bias): 0}


def test_a_steps_random_numbers_are_its_own_and_a_processs_but_all_agree_on_pictures(monkeypatch):
    def draw(*key, rank=0):
        monkeypatch.setattr(cli, "RANK", rank)
        return torch.rand(4, generator=training.step_generator(*key))

    first = draw("dit", 0, 7)
    assert torch.equal(draw("dit", 0, 7), first)
    others = [draw("vae", 0, 7), draw("dit", 1, 7), draw("dit", 0, 8), draw("dit", 0, 7, rank=1)]
    assert not any(torch.equal(other, first) for other in others)
    agreed = []
    for rank in range(2):
        monkeypatch.setattr(cli, "RANK", rank)
        agreed.append([training.is_picture_step(0.3, "dit", 0, step) for step in range(400)])
    assert agreed[0] == agreed[1]
    assert sum(agreed[0]) / 400 == pytest.approx(0.3, abs=0.07)


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(cli, "WORLD_SIZE", 3)
    assert training.local_batch_size(SimpleNamespace(batch_size=6)) == 2
    with pytest.raises(SystemExit) as stop:
        training.local_batch_size(SimpleNamespace(batch_size=8))
    assert stop.value.code == 2
    assert "3 processes need a multiple" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of mappings")
def test_latents_are_mapped_from_the_disk_in_a_way_that_counts_as_no_memory(micro_run):
    latents = data.Latents(micro_run / "latents.pt")
    mapped = [line for line in open("/proc/self/maps") if str(micro_run / "latents.pt") in line]
    assert any(" rw-s " in line for line in mapped) and len(latents.train) == 96

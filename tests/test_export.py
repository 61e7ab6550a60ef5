"""The Core ML packages: read back from disk, they compute what PyTorch computes, and an app can be written for them."""
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import export_coreml
import sample
import vae
from dit import DiT, FeedForward
from export_coreml import convert, evaluate, measure, read_program


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def exported(micro_run):
    """The run, its packages as they come by default, and a second export with everything cut into pieces."""
    export_coreml.main(["--run", str(micro_run)])
    pieces = ["--chunks", "2", "--ffn-tiles", "3", "--attention-slices", "4"]
    export_coreml.main(["--run", str(micro_run), "--out", str(micro_run / "pieces"), *pieces])
    return micro_run


def package(module, inputs, path, **options):
    """Converts one small module with inputs {name: tensor} and one output `y`. -> the program as it lies on disk."""
    module.inputs, module.outputs = list(inputs), ["y"]
    convert(module, inputs, path, **options)
    return read_program(path)


def operations(program, *kinds):
    return [op for op in program.operations if op.op_type in kinds]


# -------------------------------------------------------------------------------------------------- what is computed


def test_the_packages_compute_what_pytorch_computes_in_five_dimensions(exported):
    export = json.loads((exported / "metrics.json").read_text())["export"]
    assert set(export) == {"text_encoder", "generator_1", "generator_2", "decoder"}
    for figures in export.values():
        assert figures["max_rank"] <= 5 and figures["parity_max_abs"] < 0.05 and figures["precision"] == 16
        assert figures["working_set_bytes"] >= figures["largest_tensor_bytes"] > 0
    assert export["decoder"]["video_psnr_db"] > 40


@pytest.mark.parametrize("folder", ["coreml", "pieces"])
def test_an_app_can_sample_from_the_manifest_and_the_packages_alone(exported, folder):
    prompt, g = "A red circle, moving LEFT sideways", torch.Generator().manual_seed(0)

    manifest = json.loads((exported / folder / "manifest.json").read_text())
    words = [w for w in re.findall("[a-z0-9_]+", prompt.lower()) if w in manifest["vocabulary"]]
    numbers = [manifest["vocabulary"].index(w) for w in words][:manifest["words"]]
    numbers += [0] * (manifest["words"] - len(numbers))
    tensors = {"words": torch.tensor([numbers]), "x0": torch.zeros(1, *manifest["latent_shape"])}

    def run(name):
        about = manifest["packages"][name]
        assert all(list(tensors[k].shape) == x["shape"] for k, x in about["inputs"].items())
        results = evaluate(read_program(exported / folder / about["file"]), {k: tensors[k] for k in about["inputs"]})
        tensors.update(zip(about["outputs"], results))

    run("text_encoder")
    noises = torch.randn(len(manifest["timesteps"]), 1, *manifest["latent_shape"], generator=g)
    for t, noise in zip(manifest["timesteps"], noises):
        tensors.update(t=torch.tensor([t]), x_t=(1 - t) * tensors["x0"] + t * noise)
        for name in manifest["each_step"]:
            run(name)
    run("decoder")

    model = sample.Model(exported / "student.pt", torch.device("cpu"), torch.no_grad, None, 1)
    reference = model.sample(model.tokens(["a red circle moving left"]), noises)
    reference = sample.decode(sample.load_vae(exported / "vae.pt", "cpu"), model.checkpoint, reference,
                              torch.no_grad) / 2 + 0.5
    assert -10 * (tensors["video"] - reference).square().mean().log10() > 40


def test_what_the_evaluator_does_not_know_is_not_written(exported, tmp_path, monkeypatch, capsys):
    program = read_program(exported / "coreml/text_encoder.mlpackage")
    monkeypatch.delitem(export_coreml.OPERATIONS, "linear")
    with pytest.raises(NotImplementedError, match="linear"):
        evaluate(program, {"words": torch.zeros(1, 5, dtype=torch.int32)})
    with pytest.raises(SystemExit):
        export_coreml.main(["--run", str(exported), "--out", str(tmp_path)])
    assert "text_encoder is not proven: linear" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_large_activations_overflow_a_plain_norm_in_float16_and_not_ours(tmp_path):
    class Plain(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    x = torch.randn(1, 4, 32) * 4000  # squares of 16,000,000, where float16 ends at 65,504
    ours, plain = (package(norm, {"x": x}, tmp_path / f"{i}.mlpackage")
                   for i, norm in enumerate([vae.RMSNorm(32, affine=False), Plain()]))
    assert torch.allclose(evaluate(ours, {"x": x})[0], Plain()(x), atol=5e-3)
    with pytest.raises(FloatingPointError):
        evaluate(plain, {"x": x})


def test_tiles_of_the_ffn_give_the_same_result_with_a_smaller_activation(tmp_path):
    torch.manual_seed(0)
    ffn, x = FeedForward(16, 64), torch.randn(1, 10, 16)
    whole, tiled = (package(ffn, {"x": x}, tmp_path / f"{n}.mlpackage", ffn_tiles=n) for n in (1, 4))
    peaks = [max(np.prod(op.outputs[0].shape) for op in operations(program, "gelu")) for program in (whole, tiled)]
    assert peaks == [10 * 64, 10 * 16] and len(operations(tiled, "gelu")) == 4
    assert measure(whole)["largest_tensor_bytes"] == 4 * measure(tiled)["largest_tensor_bytes"]
    assert all(torch.allclose(evaluate(program, {"x": x})[0], ffn(x), atol=2e-3) for program in (whole, tiled))
    assert ffn.tiles == 1  # as it was trained


def test_the_working_set_is_what_is_alive_at_once(tmp_path):
    program = package(FeedForward(16, 64), {"x": torch.randn(1, 10, 16)}, tmp_path / "ffn.mlpackage")
    x, hidden = 2 * 10 * 16, 2 * 10 * 64  # float16: two bytes
    assert measure(program) == {"ops": 3, "max_rank": 3, "largest_tensor_bytes": hidden,
                                "working_set_bytes": max(x + hidden, hidden + hidden, hidden + x)}


def test_slices_of_the_queries_give_the_same_attention(exported):
    whole, sliced = read_program(exported / "coreml/generator.mlpackage"), [
        read_program(exported / f"pieces/generator_{k}.mlpackage") for k in (1, 2)]
    assert len(operations(whole, "scaled_dot_product_attention")) == 4  # two blocks, self and cross
    assert not any(operations(program, "scaled_dot_product_attention") for program in sliced)
    assert sum(len(operations(program, "softmax")) for program in sliced) == 4 * 4


def test_the_rotary_tables_are_constants(exported):
    """cos and sin are left for the time alone, once a step and not in the second chunk."""
    for name, times in ("coreml/generator", 1), ("pieces/generator_1", 1), ("pieces/generator_2", 0):
        program = read_program(exported / f"{name}.mlpackage")
        assert [len(operations(program, kind)) for kind in ("cos", "sin")] == [times, times]


# ---------------------------------------------------------------------------------------------------- smaller weights


@pytest.mark.parametrize("weights, bits, worst", [("int8", 8, 0.01), ("palette6", 6, 0.05), ("palette4", 4, 0.2)])
def test_smaller_weights_are_read_back_from_the_package(tmp_path, weights, bits, worst):
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 128, bias=False), torch.randn(1, 8, 128)
    program = package(linear, {"x": x}, tmp_path / "small.mlpackage", weights=weights)
    compressed, = (op for op in program.operations if op.op_type.startswith("constexpr_"))
    stored = export_coreml.OPERATIONS[compressed.op_type](**{
        k: v.val if k in ("data", "indices") else torch.from_numpy(v.val.astype(np.float32))
        for k, v in compressed.inputs.items() if v is not None})
    # Core ML Tools' own unpacking is the judge of ours
    assert np.allclose(stored.numpy(), compressed.materialized_val_inference().astype(np.float32), atol=1e-4)
    assert len(stored[0].unique()) <= 2 ** bits and 0 < (stored - linear.weight).abs().max() < worst / 5
    assert torch.allclose(evaluate(program, {"x": x})[0], linear(x), atol=worst)
    packed = (tmp_path / "small.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert packed < 128 * 128 * bits / 8 + 1500


# ------------------------------------------------------------------------------------------------------ for the user


def test_embeddings_of_your_own_are_described_and_those_known_come_along(exported, tmp_path):
    torch.manual_seed(0)
    student = torch.load(exported / "student.pt", weights_only=True)
    dit = DiT(**{**student["config"], "text_dim": 6, "text_tokens": 4})
    known = {name: torch.randn(4, 6) for name in ("clip one", "clip two")}
    for p in dit.parameters():
        nn.init.normal_(p, std=0.1)
    vae.save(tmp_path / "student.pt", **{**student, "config": dit.config, "model": dit.state_dict(),
                                         "embeddings": known, "captions": list(known)})
    shutil.copy(exported / "vae.pt", tmp_path)
    export_coreml.main(["--run", str(tmp_path)])
    manifest = json.loads((tmp_path / "coreml/manifest.json").read_text())
    about = manifest["packages"]["text_encoder"]["inputs"]
    assert about == {"embedding": {"shape": [1, 4, 6], "dtype": "float16"}} and "vocabulary" not in manifest
    stored = np.fromfile(tmp_path / "coreml" / manifest["embeddings"]["file"], "<f2").reshape(-1, 4, 6)
    embedding = torch.from_numpy(stored[manifest["embeddings"]["captions"].index("clip two")]).float()
    text = evaluate(read_program(tmp_path / "coreml/text_encoder.mlpackage"), {"embedding": embedding[None]})[0]
    assert torch.allclose(text, dit.text_encoder(known["clip two"][None]), atol=0.02)


def test_random_weights_need_no_checkpoint_and_follow_from_the_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(export_coreml.PRUNED_SIZES["tiny"], "blocks", 1)
    command = ["--run", str(tmp_path), "--random-weights", "--seed", "5"]
    export_coreml.main(command)
    export_coreml.main([*command, "--check"])
    with pytest.raises(SystemExit):
        export_coreml.main([*command[:-1], "6", "--check"])
    assert "below 40 dB" in capsys.readouterr().err


def test_on_a_mac_each_compute_unit_is_timed_and_compared(exported, monkeypatch, capsys):
    class MLModel:  # as coremltools.models.MLModel answers there
        def __init__(self, path, compute_units):
            self.program, self.unit = read_program(type(exported)(path)), compute_units

        def predict(self, inputs):
            assert {a.dtype for a in inputs.values()} <= {np.dtype(np.float16), np.dtype(np.int32)}
            results = evaluate(self.program, {k: torch.from_numpy(v) for k, v in inputs.items()})
            return {var.name: x.half().numpy() for var, x in zip(self.program.outputs, results)}

    monkeypatch.setattr(export_coreml.ct.models, "MLModel", MLModel)
    monkeypatch.setattr(export_coreml, "sys", SimpleNamespace(platform="darwin"))
    export_coreml.main(["--run", str(exported), "--out", str(exported / "pieces"), "--check"])
    printed = capsys.readouterr().out
    figures = json.loads((exported / "metrics.json").read_text())["export"]["decoder"]
    for unit in "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL":
        assert re.search(rf"{unit}: [\d.]+ ms a step, video [\d.]+ dB", printed)
        assert figures[f"ms_a_step_{unit.lower()}"] > 0 and figures[f"video_psnr_db_{unit.lower()}"] > 40


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("when", ["while converting", "while replacing"])
def test_a_kill_leaves_the_old_export_or_none_that_looks_finished(exported, tmp_path, monkeypatch, when, capsys):
    out = tmp_path / "coreml"
    shutil.copytree(exported / "coreml", out)
    before, calls = everything(out), []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    where, name = (export_coreml, "convert") if when == "while converting" else (type(out), "rename")
    original = getattr(where, name)
    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_coreml.main(["--run", str(exported), "--out", str(out)])
    monkeypatch.undo()
    if when == "while converting":
        assert everything(out) == before
        return
    with pytest.raises(SystemExit):
        export_coreml.main(["--run", str(exported), "--out", str(out), "--check"])
    assert "holds no finished export" in capsys.readouterr().err
    export_coreml.main(["--run", str(exported), "--out", str(out), "--chunks", "2"])
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", *(f"{name}.mlpackage" for name in ("text_encoder", "generator_1", "generator_2", "decoder"))}


BAD = [  # what a person may type, and a word of the answer
    ("--model {run}/dit.pt", "student is needed"), ("--ffn-tiles 9", "channels: 8 does"), ("--chunks 9", "2 at most"),
    ("--out {run}/vae.pt", "cannot be used"), ("--out {empty} --check", "holds no finished export"),
    ("--model {tiny} --preset mobile", "say --preset tiny"), ("--device cuda", "--device"), ("--weights int3", "int3"),
]


@pytest.mark.parametrize("flags, word", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_gets_one_line_and_leaves_no_packages(micro_run, tmp_path, flags, word, capsys):
    student = torch.load(micro_run / "student.pt", weights_only=True)
    config = {**student["config"], "width": 128, "depth": 1}
    vae.save(tmp_path / "tiny.pt", **{**student, "config": config, "model": DiT(**config).state_dict()})
    flags = flags.format(run=micro_run, empty=tmp_path, tiny=tmp_path / "tiny.pt").split()
    with pytest.raises(SystemExit) as stop:
        export_coreml.main(["--run", str(micro_run), "--out", str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and "\n" not in error and word in error
    assert not (tmp_path / "out").exists()


def test_without_core_ml_tools_the_script_says_what_to_install(micro_run, monkeypatch, capsys):
    monkeypatch.setattr(export_coreml, "ct", None)
    with pytest.raises(SystemExit) as stop:
        export_coreml.main(["--run", str(micro_run)])
    assert stop.value.code == 2 and "pip install" in capsys.readouterr().err

"""The Core ML packages: read back from disk, they compute what PyTorch computes, and an app can be
written for them."""
import json
import re
import shutil

import pytest
import torch
from torch import nn

pytest.importorskip("coremltools")

import dit  # noqa: E402
import export_coreml  # noqa: E402
import prune  # noqa: E402
import sample  # noqa: E402
import vae  # noqa: E402
from distill import sample_student  # noqa: E402
from common.coreml_evaluator import evaluate, program_cost, read_program  # noqa: E402
from export_coreml import convert  # noqa: E402
from common import cli, coreml_evaluator, data, files  # noqa: E402


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def exported(micro_run):
    """The run with its packages, and a second export with the FFN in tiles."""
    export_coreml.main(["--run", str(micro_run), "--out", str(micro_run / "tiles"),
                        "--ffn-tiles", "3"])
    export_coreml.main(["--run", str(micro_run)])
    return micro_run


def package(module, x, path, **options):
    """Converts one small module with one input and one output. -> the program as saved."""
    module.inputs = ["x"]
    module.outputs = ["y"]
    convert(module, {"x": x}, path, **options)
    return read_program(path)


def operations(program, kind):
    return [op for op in program.operations if op.op_type == kind]


def refusal(capsys, *flags):
    """What the script says when it stops with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run_script(lambda: export_coreml.main([str(flag) for flag in flags]))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


# ------------------------------------------------------------ what is computed


def test_the_packages_compute_what_pytorch_computes_in_five_dimensions(exported):
    figures = json.loads((exported / "metrics.json").read_text())["export"]
    assert list(figures) == ["text_encoder", "generator", "decoder_first", "decoder"]
    for one in figures.values():
        assert one["max_rank"] <= 5
        assert one["parity_max_abs"] < 0.05
        assert one["precision"] == 16
        assert one["working_set_bytes"] >= one["largest_tensor_bytes"] > 0
        assert one["bytes"] > 0 and one["ops"] > 0
    assert figures["decoder"]["video_psnr_db"] > 40


def test_an_app_can_sample_from_the_manifest_and_the_packages_alone(exported):
    folder = exported / "coreml"
    manifest = json.loads((folder / "manifest.json").read_text())
    shape = [1, *manifest["latent_shape"]]
    prompt = "A red circle, moving LEFT sideways"
    found = [w for w in re.findall("[a-z0-9_]+", prompt.lower()) if w in manifest["vocabulary"]]
    words = [manifest["vocabulary"].index(word) for word in found]
    words += [0] * (manifest["text_tokens"] - len(words))
    tensors = {"token_ids": torch.tensor([words]), "x0": torch.zeros(shape)}

    def run(name):
        about = manifest["packages"][name]
        for key, declared in about["inputs"].items():
            assert list(tensors[key].shape) == declared["shape"]
        program = read_program(folder / about["file"])
        results = evaluate(program, {key: tensors[key] for key in about["inputs"]})
        assert list(results) == list(about["outputs"])
        for key, x in results.items():
            tensors[key.removeprefix("next_")] = x

    run("text_encoder")
    g = torch.Generator().manual_seed(0)
    noise_per_step = torch.randn(len(manifest["timesteps"]), *shape, generator=g)
    for level, noise in zip(manifest["timesteps"], noise_per_step):
        tensors["t"] = torch.tensor([level])
        tensors["x_t"] = (1 - level) * tensors["x0"] + level * noise
        run("generator")
    video = []
    for i in range(shape[2]):
        tensors["latent"] = tensors["x0"][:, :, i:i + 1]
        run("decoder" if i else "decoder_first")
        video.append(tensors["frames"])
    assert [frames.shape[2] for frames in video] == [1, 4]

    student, metadata = dit.load_dit(exported / "student.pt", "cpu", "student")
    tokens = data.tokenize(["a red circle moving left"], metadata["vocabulary"],
                          metadata["text_tokens"])
    autoencoder = vae.load_vae(exported / "vae.pt", "cpu", metadata["vae_checksum"])
    *_, (_, _, x0) = sample_student(student, noise_per_step, tokens, metadata["timesteps"])
    clip = sample.decode(autoencoder, x0, torch.no_grad)
    mse = (torch.cat(video, dim=2) - (clip / 2 + 0.5)).square().mean()
    assert -10 * mse.log10() > 40


def test_what_the_evaluator_does_not_know_is_not_written(exported, tmp_path, monkeypatch, capsys):
    program = read_program(exported / "coreml/text_encoder.mlpackage")
    monkeypatch.delitem(coreml_evaluator.OPERATIONS, "linear")
    with pytest.raises(NotImplementedError, match="linear"):
        evaluate(program, {"token_ids": torch.zeros(1, 5, dtype=torch.int32)})
    error = refusal(capsys, "--run", exported, "--out", tmp_path)
    assert "text_encoder is not verified: linear" in error
    assert not any(tmp_path.iterdir())


def test_an_operation_in_a_form_that_the_evaluator_does_not_know_is_an_error(exported, monkeypatch):
    program = read_program(exported / "coreml/text_encoder.mlpackage")
    monkeypatch.setitem(coreml_evaluator.OPERATIONS, "linear", lambda x, weight, bias: x[..., :1])
    with pytest.raises(NotImplementedError, match="linear gives the shape"):
        evaluate(program, {"token_ids": torch.zeros(1, 5, dtype=torch.int32)})


def test_large_activations_overflow_a_plain_norm_in_float16_and_not_ours(tmp_path, monkeypatch):
    x = torch.randn(1, 4, 32) * 4000  # squares of 16,000,000, where float16 ends at 65,504
    norm = vae.RMSNorm(32, affine=False)
    ours = package(norm, x, tmp_path / "ours.mlpackage")
    monkeypatch.setattr(export_coreml, "for_phone", lambda module, ffn_tiles: module)
    plain = package(norm, x, tmp_path / "plain.mlpackage")
    for scale in 1, 1e-3, 1e-6, 2.5e-8:  # down to 1e-4, where epsilon outweighs the squares
        torch.testing.assert_close(evaluate(ours, {"x": x * scale})["y"], norm(x * scale),
                                   atol=5e-3, rtol=0)
    with pytest.raises(FloatingPointError, match="float16"):
        evaluate(plain, {"x": x})


def test_tiles_of_the_ffn_give_the_same_result_with_a_smaller_activation(exported, tmp_path):
    torch.manual_seed(0)
    ffn = dit.FeedForward(16, 64)
    x = torch.randn(1, 10, 16)
    whole = package(ffn, x, tmp_path / "whole.mlpackage")
    tiled = package(ffn, x, tmp_path / "tiled.mlpackage", ffn_tiles=4)
    assert [op.outputs[0].shape for op in operations(whole, "gelu")] == [(1, 10, 64)]
    assert [op.outputs[0].shape for op in operations(tiled, "gelu")] == [(1, 10, 16)] * 4
    hidden = 2 * 10 * 64  # float16: two bytes
    assert program_cost(whole) == dict(ops=3, max_rank=3, largest_tensor_bytes=hidden,
                                       working_set_bytes=2 * hidden)  # of the GELU
    assert program_cost(tiled)["largest_tensor_bytes"] == 2 * 10 * 16
    for program in whole, tiled:
        assert torch.allclose(evaluate(program, {"x": x})["y"], ffn(x), atol=2e-3)
    counts = [len(operations(read_program(exported / folder / "generator.mlpackage"), "gelu"))
              for folder in ("coreml", "tiles")]
    assert counts == [2, 2 * 3]  # of two blocks


def test_the_module_that_was_trained_is_left_as_it_is(micro_dit):
    for_phone = export_coreml.for_phone(micro_dit, ffn_tiles=4)
    kinds = {type(part) for part in micro_dit.modules()}
    phone_kinds = {type(part) for part in for_phone.modules()}
    assert {vae.RMSNorm, dit.FeedForward} <= kinds
    assert not {vae.RMSNorm, dit.FeedForward} & phone_kinds
    for ours, trained in zip(for_phone.parameters(), micro_dit.parameters()):
        assert ours is trained  # no second copy of the weights


def test_the_rotary_tables_are_constants(exported):
    """cos and sin are left for the time alone, once per step."""
    program = read_program(exported / "coreml/generator.mlpackage")
    assert len(operations(program, "cos")) == len(operations(program, "sin")) == 1
    assert len(operations(program, "scaled_dot_product_attention")) == 4  # 2 blocks, self and cross


# ------------------------------------------------------------ for the user


def test_embeddings_of_your_own_are_what_the_text_encoder_reads(exported, tmp_path):
    torch.manual_seed(0)
    student = torch.load(exported / "student.pt", weights_only=True)
    own = dit.DiT(**student["config"] | dict(text_dim=6, text_tokens=4))
    for p in own.parameters():
        nn.init.normal_(p, std=0.1)
    student |= dict(config=own.config, model=own.state_dict(), text_tokens=4,
                    captions=["clip one", "clip two"])
    files.save(tmp_path / "student.pt", **student)
    shutil.copy(exported / "vae.pt", tmp_path)
    export_coreml.main(["--run", str(tmp_path)])
    manifest = json.loads((tmp_path / "coreml/manifest.json").read_text())
    inputs = manifest["packages"]["text_encoder"]["inputs"]
    assert inputs == {"embedding": dict(shape=[1, 4, 6], dtype="float16")}
    assert "vocabulary" not in manifest


def test_random_weights_need_no_checkpoint_and_follow_from_the_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(prune.PRESETS["tiny"], "blocks", 1)
    command = ["--run", str(tmp_path), "--random-weights", "--seed"]
    export_coreml.main([*command, "5"])
    export_coreml.main([*command, "5", "--check"])
    assert "below 40 dB" in refusal(capsys, *command, "6", "--check")


def test_a_model_of_other_sizes_is_not_what_was_exported(exported, capsys):
    error = refusal(capsys, "--run", exported, "--random-weights", "--check", "--out",
                    exported / "coreml")
    assert "was made from another model" in error and "\n" not in error


def interrupt_second_call(monkeypatch, owner, name):
    """As a kill would, in the second call of a function."""
    original = getattr(owner, name)
    calls = []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


def test_a_stop_while_converting_leaves_the_old_export(exported, tmp_path, monkeypatch):
    def everything():
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    out = shutil.copytree(exported / "coreml", tmp_path / "coreml")
    before = everything()
    interrupt_second_call(monkeypatch, export_coreml, "convert")
    with pytest.raises(KeyboardInterrupt):
        export_coreml.main(["--run", str(exported), "--out", str(out)])
    assert everything() == before


def test_a_stop_while_replacing_leaves_none_that_looks_finished(exported, tmp_path, monkeypatch,
                                                                capsys):
    out = shutil.copytree(exported / "coreml", tmp_path / "coreml")
    command = ["--run", str(exported), "--out", str(out)]
    with monkeypatch.context() as patch:
        interrupt_second_call(patch, type(out), "replace")
        with pytest.raises(KeyboardInterrupt):
            export_coreml.main(command)
    assert "holds no finished export" in refusal(capsys, *command, "--check")
    export_coreml.main(command)
    assert sorted(path.name for path in out.iterdir()) == [
        "decoder.mlpackage", "decoder_first.mlpackage", "generator.mlpackage", "manifest.json",
        "text_encoder.mlpackage"]


@pytest.mark.parametrize("foreign", ["decoder.mlpackage/weights.bin", "manifest.json"])
def test_what_another_program_made_is_neither_replaced_nor_removed(micro_run, tmp_path, foreign,
                                                                    capsys):
    out = tmp_path / "Models"
    for name in foreign, "Other.mlpackage/weights.bin", "unfinished/notes.txt":
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    error = refusal(capsys, "--run", micro_run, "--out", out)
    assert "is not of this script: take another --out" in error
    assert len([path for path in out.rglob("*") if path.is_file()]) == 3


def test_an_export_replaces_an_older_one_and_leaves_all_else_alone(exported, tmp_path):
    """An older one had a fifth package."""
    out = shutil.copytree(exported / "coreml", tmp_path / "coreml")
    shutil.copytree(out / "decoder.mlpackage", out / "image_encoder.mlpackage")
    shutil.copytree(out / "decoder.mlpackage", out / "Other.mlpackage")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["packages"]["image_encoder"] = manifest["packages"]["decoder"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    export_coreml.main(["--run", str(exported), "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == [
        "Other.mlpackage", "decoder.mlpackage", "decoder_first.mlpackage", "generator.mlpackage",
        "manifest.json", "text_encoder.mlpackage"]


def test_a_stream_keeps_two_frames_per_convolution_and_gives_what_the_whole_gives(micro_dit):
    for ratio in (1, 8, 8), (4, 8, 8), (8, 32, 32):
        torch.manual_seed(0)
        model = vae.VAE(ratio, latent_channels=8, width=8, res_blocks=1, patch=4).eval()
        model.latent_mean.normal_()
        model.latent_std.uniform_(0.5, 1.5)
        modules = export_coreml.package_modules(micro_dit, model)
        x0 = torch.randn(2, 8, 4, 2, 1)
        caches = []
        pieces = []
        for latent in x0.split(1, dim=2):
            module = modules["decoder" if caches else "decoder_first"]
            frames, *caches = module(latent, *caches)
            pieces.append(frames)
            assert [cache.shape[2] for cache in caches] == [2] * (len(module.outputs) - 1)
        assert [frames.shape[2] for frames in pieces] == [1] + [ratio[0]] * 3
        z = x0 * model.latent_std + model.latent_mean
        whole = (model.decode(z) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=1e-5, rtol=0)


def test_a_damaged_export_gets_one_line(exported, tmp_path, capsys):
    out = shutil.copytree(exported / "coreml", tmp_path / "coreml")
    (out / "decoder.mlpackage/Data/com.apple.CoreML/model.mlmodel").write_bytes(b"damaged")
    error = refusal(capsys, "--run", exported, "--out", out, "--check")
    assert "damaged" in error and "\n" not in error


def test_without_core_ml_tools_the_script_says_what_to_install(micro_run, monkeypatch, capsys):
    monkeypatch.setattr(export_coreml, "ct", None)
    assert "pip install -r requirements.txt" in refusal(capsys, "--run", micro_run)

"""To the phone: Core ML packages in half precision, and a numerical check that needs no Mac.

Stated by the paper: Core ML Tools, half precision, no extra compilation, no special hardware; in
its second version a tiled GEMM for the FFN. Our reading: four ML programs, float16 throughout,
iOS 18, fixed shapes, no tensor of more than five dimensions.

    package        calls  inputs                            outputs
    text_encoder   1      token_ids [1, m] int32              text [1, m, width]
    generator      4      x_t [1, c, t, h, w], t [1], text  x0 [1, c, t, h, w]
    decoder_first  1      latent [1, c, 1, h, w]            frames [1, 3, 1, height, width], caches
    decoder        rest   latent, caches                    frames [1, 3, rt, height, width], caches

(rest: one call for each latent frame after the first.)
Between two calls of the generator the app adds noise again: x_t = (1 - t) * x0 + t * noise. Then
it decodes x0 latent frame by latent frame, and shows each one's frames before the next is decoded.
manifest.json holds all that it needs: the order of calls, names, shapes, timesteps, vocabulary.

Each saved package is read back from disk and evaluated with torch, operation by operation
(common/coreml_evaluator.py), and compared with the PyTorch module that it came from. float16 ends
at 65,504: norms, the only squares, are written so that they stay below; any other overflow is an
error of the check.

    python export_coreml.py            # runs/tiny/student.pt, vae.pt -> runs/tiny/coreml/
    python export_coreml.py --check    # only verify what is there
    python export_coreml.py --preset mobile --random-weights    # the paper's size, untrained
"""
import contextlib
import copy
import io
import json
import shutil
import time
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import cli, coreml_evaluator, data, files
from distill import predict_x0, sample_student, student_timesteps
from dit import DiT, FeedForward, TextEncoder, add_noise, load_dit
from prune import planned_pruned
from vae import PRESETS as VAE_PRESETS
from vae import VAE, CausalConv3d, RMSNorm, Upsample, latent_size, load_vae

ct = coreml_evaluator.ct  # Core ML Tools, or None where they are not installed
MIN_PSNR = 40  # dB, of a float16 video to the float32 one

# ------------------------------------------------------------ what differs on the phone


class Float16RMSNorm(RMSNorm):
    """float16 ends at 65,504: squares of 256 already leave it, and those of 1e-4 are zero. So x is
    divided by its largest number first, and the root of epsilon, 1e-3, with it (our reading)."""

    def forward(self, x):
        largest = x.abs().amax(self.axis, keepdim=True).clamp(min=1e-3)
        # Always 1e-3, but a tensor: Core ML turns number / x into an inverse, which adds 1e-4 to x.
        root = largest.clamp(max=1e-3)
        return super().forward(x / largest, (root / largest).square())


class TiledFeedForward(FeedForward):
    """The hidden channels in `tiles` slices (stated, second version: a tiled GEMM). Each result is
    added before the next is computed: the activation of up to 4 times the width never exists."""

    def forward(self, x, channel_mask=None):
        result = 0
        up_slices = self.up.weight.chunk(self.tiles)
        down_slices = self.down.weight.chunk(self.tiles, dim=1)
        for up, down in zip(up_slices, down_slices):
            hidden = F.gelu(F.linear(x, up))  # [b, n, ffn / tiles]
            result = result + F.linear(hidden, down)
        return result


class StreamingCausalConv3d(CausalConv3d):
    """A clip in pieces: `cache` holds the last k - 1 input frames of the piece before, or None if
    there is none. Nothing else in the decoder looks back, so pieces give what the whole gives."""

    cache = None

    def forward(self, x):
        k = self.kernel_size[0]
        if k == 1:
            return super().forward(x)
        frames_before = [x[:, :, :1]] * (k - 1) if self.cache is None else [self.cache]
        x = torch.cat([*frames_before, x], dim=2)
        self.cache = x[:, :, 1 - k:]
        return nn.Conv3d.forward(self, x)


class StreamingUpsample(Upsample):
    """Drops its first copies only before the first frame of the clip."""

    def forward(self, x):
        return super().forward(x) if self.is_first else self.unfold(x)


def with_classes(module, replacements):
    """-> a copy in which parts of one class are of another that computes it differently; the
    weights are shared, so it takes no memory. replacements: {class: class}"""
    shared = {id(p): p for p in module.parameters()}
    copied = copy.deepcopy(module, memo=shared)
    for part in copied.modules():
        if type(part) in replacements:
            part.__class__ = replacements[type(part)]
    return copied


def for_phone(module, ffn_tiles):
    """-> a copy with the norms and FFNs of the phone."""
    replacements = {RMSNorm: Float16RMSNorm}
    if ffn_tiles > 1:
        replacements[FeedForward] = TiledFeedForward
    phone_module = with_classes(module, replacements)
    for part in phone_module.modules():
        if isinstance(part, TiledFeedForward):
            part.tiles = ffn_tiles
    return phone_module


# ------------------------------------------------------------ what becomes a package


class PackageModule(nn.Module):
    """What becomes a package: function(part, *tensors), with names for what goes in and comes out.
    part: the module that has the weights."""

    def __init__(self, function, part, inputs, outputs):
        super().__init__()
        self.function = function
        self.part = part
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *tensors):
        return self.function(self.part, *tensors)


def convolutions_over_time(vae):
    return [part for part in vae.decoder.modules()
            if isinstance(part, StreamingCausalConv3d) and part.kernel_size[0] > 1]


def decode_next(vae, latent, *caches):
    """One latent frame of x0, and the caches that the one before left, none for the first -> its
    frames in [0, 1], and the caches for the next. The latents' mean and std are inside."""
    convolutions = convolutions_over_time(vae)
    for convolution, cache in zip_longest(convolutions, caches):
        convolution.cache = cache
    for part in vae.decoder:
        if isinstance(part, StreamingUpsample):
            part.is_first = not caches
    frames = vae.decode(latent * vae.latent_std + vae.latent_mean)  # in [-1, 1]
    next_caches = [convolution.cache for convolution in convolutions]
    return (frames / 2 + 0.5).clamp(0, 1), *next_caches


def package_modules(dit, vae):
    """-> {package: PackageModule}, in the order of the calls. An app keeps tensors by name, gives
    each package those that it asks for, and keeps what comes out, next_NAME as NAME."""
    prompts = "embedding" if dit.config["text_dim"] else "token_ids"
    decoder = with_classes(vae, {CausalConv3d: StreamingCausalConv3d, Upsample: StreamingUpsample})
    caches = [f"cache_{i}" for i in range(len(convolutions_over_time(decoder)))]
    # Core ML Tools refuses an output with the name of an input.
    outputs = ["frames", *(f"next_{name}" for name in caches)]
    return {
        "text_encoder": PackageModule(TextEncoder.forward, dit.text_encoder, [prompts], ["text"]),
        "generator": PackageModule(predict_x0, dit, ["x_t", "t", "text"], ["x0"]),
        "decoder_first": PackageModule(decode_next, decoder, ["latent"], outputs),
        "decoder": PackageModule(decode_next, decoder, ["latent", *caches], outputs)}


def call_module(module, values):
    """values: {name: tensor}, of which the module gets its inputs. -> {name: output}"""
    results = module(*[values[name] for name in module.inputs])
    return dict(zip(module.outputs, coreml_evaluator.as_list(results)))


def store_outputs(values, results):
    """What an app does with the outputs of a call."""
    for name, x in results.items():
        values[name.removeprefix("next_")] = x


# ------------------------------------------------------------ the export


def convert(module, values, path, ffn_tiles=1):
    """Traces, converts and saves one module as a package. values: {name: example tensor}."""
    examples = [values[name] for name in module.inputs]
    inputs = []
    for name, x in zip(module.inputs, examples):
        dtype = np.float16 if x.is_floating_point() else np.int32
        inputs.append(ct.TensorType(name=name, shape=tuple(x.shape), dtype=dtype))
    outputs = [ct.TensorType(name=name, dtype=np.float16) for name in module.outputs]
    # Quiet: the tracer warns of shapes, which are fixed on purpose; dozens of progress bars.
    with contextlib.redirect_stderr(io.StringIO()):
        phone_module = for_phone(module, ffn_tiles)
        traced = torch.jit.trace(phone_module, tuple(examples), check_trace=False)
        model = ct.convert(traced, inputs=inputs, outputs=outputs, skip_model_load=True,
                           minimum_deployment_target=ct.target.iOS18,
                           compute_precision=ct.precision.FLOAT16)
        model.save(str(path))


def signature(variables):
    declared_type = coreml_evaluator.declared_type
    return {var.name: dict(shape=list(var.shape), dtype=declared_type(var)) for var in variables}


def describe(args, checkpoint, folder, names):
    """manifest.json, from which alone an app can be written. names: the packages in `folder`."""
    packages = {}
    for name in names:
        program = coreml_evaluator.read_program(folder / f"{name}.mlpackage")
        packages[name] = dict(file=f"{name}.mlpackage",
                              inputs=signature(program.inputs.values()),
                              outputs=signature(program.outputs))
    if checkpoint["config"]["text_dim"]:
        text = dict(tokenise="not here: text_encoder reads the embedding of a prompt by the "
                             "encoder of the training captions, your own, padded with zeros")
    else:
        text = dict(
            vocabulary=checkpoint["vocabulary"], text_tokens=checkpoint["text_tokens"],
            tokenise="lower case, NFC; what stands between white space, punctuation and symbols; "
                     "their indices in vocabulary, without those that are not in it; cut to "
                     f"`text_tokens` of them, or padded with {data.PAD}")
    return dict(
        packages=packages,
        order=["keep tensors by name: give a package those that it asks for, keep what comes "
               "out, next_NAME as NAME",
               "text_encoder, once",
               "x0 = 0; for each level of timesteps: t = [level]; fresh standard normal noise; "
               "x_t = (1 - level) * x0 + level * noise; generator",
               "for each i of x0's third axis: latent = x0[:, :, i:i+1]; decoder_first if i is 0, "
               "else decoder: the next frames of the video"],
        timesteps=checkpoint["timesteps"], latent_shape=checkpoint["latent_shape"],
        latent_note="mean and std are inside the decoders: give them the generator's x0 as it is",
        pixels_note="frames: [1, red green blue, frames, height, width], in [0, 1]",
        captions=checkpoint["captions"], precision="float16", ffn_tiles=args.ffn_tiles,
        minimum_deployment_target="iOS 18", **text)


def export(args, modules, checkpoint, prompts, folder):
    """Converts every program into `folder`, and writes manifest.json beside them."""
    start = time.perf_counter()
    x_t = torch.randn(1, *checkpoint["latent_shape"])
    values = {"token_ids": prompts, "embedding": prompts, "t": torch.ones(1), "x_t": x_t,
              "latent": x_t[:, :, :1]}
    for name, module in modules.items():
        convert(module, values, folder / f"{name}.mlpackage", args.ffn_tiles)
        print(f"{name}: converted after {time.perf_counter() - start:.0f} s", flush=True)
        store_outputs(values, call_module(module, values))  # the next one's examples
    manifest = describe(args, checkpoint, folder, modules)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def own_packages(folder):
    """-> the names of the packages that an earlier export left in `folder`: what its manifest
    names. Refuses a manifest of another program."""
    path = folder / "manifest.json"
    if not path.is_file():
        return []
    with files.reading(path):
        manifest = json.loads(path.read_text())
        if "ffn_tiles" in manifest:  # so in every version of this script
            return list(manifest["packages"])
    cli.exit_with_error(f"{path} is not of this script: take another --out")


def publish(folder, out, old):
    """Puts a finished export in the place of an old one. The old manifest goes first and the new
    one comes last: a kill in between leaves packages without a manifest, never with a wrong one.
    old: the packages that may be replaced; nothing else in `out` is touched."""
    (out / "manifest.json").unlink(missing_ok=True)
    for name in old:
        shutil.rmtree(out / f"{name}.mlpackage", ignore_errors=True)
    for new in folder.glob("*.mlpackage"):
        new.replace(out / new.name)
    (folder / "manifest.json").replace(out / "manifest.json")
    folder.rmdir()


# ------------------------------------------------------------ the numerical check


def sample_packages(manifest, call, prompts, noise_per_step):
    """The loop of an app, from a manifest and call(package, {name: tensor}) -> {name: tensor}
    alone. prompts: what the text encoder reads; noise_per_step: [steps, 1, c, t, h, w]. -> the
    video [1, 3, frames, height, width] in [0, 1]"""
    values = {"token_ids": prompts, "embedding": prompts, "x0": torch.zeros_like(noise_per_step[0])}

    def run(name):
        inputs = manifest["packages"][name]["inputs"]
        store_outputs(values, call(name, {key: values[key] for key in inputs}))

    run("text_encoder")
    for level, noise in zip(manifest["timesteps"], noise_per_step):
        values["t"] = torch.tensor([level])
        values["x_t"] = add_noise(values["x0"], noise, values["t"])
        run("generator")
    video = []
    for latent in values["x0"].split(1, dim=2):
        values["latent"] = latent
        run("decoder" if video else "decoder_first")
        video.append(values["frames"])
    return torch.cat(video, dim=2)


def load_packages(folder, modules, checkpoint):
    """-> the manifest in `folder` and its programs, {name: program}. Refuses what was made from a
    model with other packages or sizes."""
    path = folder / "manifest.json"
    if not path.is_file():
        cli.exit_with_error(f"{folder} holds no finished export: `python export_coreml.py` makes "
                            "one")
    saved = {}
    with files.reading(folder):
        manifest = json.loads(path.read_text())
        for name, package in manifest["packages"].items():
            saved[name] = coreml_evaluator.read_program(folder / package["file"])
        if (list(saved), manifest["latent_shape"]) == (list(modules), checkpoint["latent_shape"]):
            return manifest, saved
    cli.exit_with_error(f"{folder} was made from another model: {', '.join(saved)}")


def verify(args, dit, vae, checkpoint, prompts, folder):
    """Compares the packages in `folder` with the modules that they came from, and a whole video
    with PyTorch's in float32; prints what they are. -> the figures for metrics.json"""
    modules = package_modules(dit, vae)
    manifest, saved = load_packages(folder, modules, checkpoint)
    differences = {name: 0.0 for name in modules}

    def compared_call(name, inputs):
        try:
            results = coreml_evaluator.evaluate(saved[name], inputs)
            for key, expected in call_module(modules[name], inputs).items():
                difference = (results[key] - expected).abs().max().item()
                differences[name] = max(differences[name], difference)
        except (RuntimeError, TypeError, ValueError, LookupError, FloatingPointError) as error:
            cli.exit_with_error(f"{name} is not verified: {error}")
        return results

    g = torch.Generator().manual_seed(args.seed)
    shape = len(manifest["timesteps"]), 1, *checkpoint["latent_shape"]
    noise_per_step = torch.randn(shape, generator=g)
    video = sample_packages(manifest, compared_call, prompts, noise_per_step)
    *_, (_, _, x0) = sample_student(dit, noise_per_step, prompts, checkpoint["timesteps"])
    whole = vae.decode(x0 * vae.latent_std + vae.latent_mean)
    reference = (whole / 2 + 0.5).clamp(0, 1)
    psnr = -10 * (video - reference).square().mean().log10().item()

    metrics = {}
    for name, program in saved.items():
        package = folder / f"{name}.mlpackage"
        package_bytes = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
        cost = coreml_evaluator.program_cost(program)
        metrics[name] = dict(bytes=package_bytes, **cost, precision=16,
                             parity_max_abs=differences[name])
        print(f"{name}: {package_bytes / 1e6:.4g} MB, {cost['ops']} operations, rank <= "
              f"{cost['max_rank']}, largest tensor {cost['largest_tensor_bytes'] / 1e6:.3g} MB, "
              f"working set {cost['working_set_bytes'] / 1e6:.3g} MB, largest difference from "
              f"PyTorch {differences[name]:.2g}")
    print(f"a video through the packages, in float16, is {psnr:.1f} dB from PyTorch's in float32")
    if not psnr >= MIN_PSNR:  # nan is not
        cli.exit_with_error(f"that is below {MIN_PSNR} dB: made from another model, or float16 "
                            "does not hold it")
    metrics["decoder"]["video_psnr_db"] = psnr
    return metrics


# ------------------------------------------------------------ the command line


def random_student(preset, seed):
    """A preset's student as distill.py would leave it, but for the training, and with a text
    encoder of five words. -> dit, checkpoint, vae."""
    torch.manual_seed(seed)
    sizes = VAE_PRESETS[preset]
    caption = "a red circle moving left"
    channels = sizes["latent_channels"]
    ratio = cli.size(sizes["ratio"])
    dit = DiT(**planned_pruned(preset) | dict(vocabulary=6, text_tokens=5, text_dim=0))
    for p in dit.parameters():
        if not p.any():  # what training starts at zero would leave the rest idle
            nn.init.normal_(p, std=0.02)
    vae = VAE(ratio, channels, sizes["width"], sizes["res_blocks"], sizes["patch"])
    checkpoint = dict(
        latent_shape=[channels, *latent_size(cli.size(sizes["size"]), ratio)],
        vocabulary=["<pad>", *data.words(caption)], text_tokens=5, config=dit.config,
        captions=[caption], timesteps=student_timesteps(4))
    return dit.eval().requires_grad_(False), checkpoint, vae.eval().requires_grad_(False)


def parse_arguments(argv):
    p = cli.make_parser(__doc__, dict.fromkeys(VAE_PRESETS, {}), argv)
    cli.add_file(p, "--model", "student.pt", "the few-step student, from distill.py")
    cli.add_file(p, "--vae", "vae.pt", "the autoencoder, from vae.py")
    p.add_argument("--out", type=Path, metavar="DIR",
                   help="folder of the packages and manifest.json (default: coreml, or with "
                        "--random-weights coreml-random, in --run)")
    p.add_argument("--ffn-tiles", type=cli.positive, default=1,
                   help="slices of the FFN's hidden channels, one at a time")
    p.add_argument("--random-weights", action="store_true",
                   help="the preset's sizes untrained, without a checkpoint")
    p.add_argument("--check", action="store_true", help="export nothing, verify what is in --out")
    args = p.parse_args(argv)
    if args.out is None:
        args.out = args.run / ("coreml-random" if args.random_weights else "coreml")
    if ct is None:
        cli.exit_with_error("coremltools is missing: pip install -r requirements.txt")
    return args


def export_and_verify(args, dit, vae, checkpoint, prompts):
    """Works in a folder of its own inside --out, and replaces an older export once the new one is
    verified. -> the figures for metrics.json"""
    folder = args.out / ".unfinished-export"
    modules = package_modules(dit, vae)
    old = own_packages(args.out)
    if not old:  # it may have been killed while publishing: what it had moved goes
        for name in own_packages(folder):
            shutil.rmtree(args.out / f"{name}.mlpackage", ignore_errors=True)
    for name in modules:
        if name not in old and (args.out / f"{name}.mlpackage").exists():
            cli.exit_with_error(f"{args.out / name}.mlpackage is not of this script: take another "
                                "--out")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        export(args, modules, checkpoint, prompts, folder)
        metrics = verify(args, dit, vae, checkpoint, prompts, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    publish(folder, args.out, old)
    return metrics


@torch.no_grad()
def main(argv=None):
    args = parse_arguments(argv)
    if args.random_weights:
        dit, checkpoint, vae = random_student(args.preset, args.seed)
    else:
        dit, checkpoint = load_dit(args.model, "cpu", "student")
        vae = load_vae(args.vae, "cpu", checkpoint["vae_checksum"])
    if dit.config["ffn"] % args.ffn_tiles:
        cli.exit_with_error(f"--ffn-tiles {args.ffn_tiles} does not divide the FFN's "
                            f"{dit.config['ffn']} channels")
    m = checkpoint["text_tokens"]
    if dit.config["text_dim"]:
        prompts = torch.randn(1, m, dit.config["text_dim"])
        prompts[:, m // 2 + 1:] = 0  # padding
    else:
        prompts = data.tokenize(checkpoint["captions"][:1], checkpoint["vocabulary"], m)
    start = time.perf_counter()
    if args.check:
        metrics = verify(args, dit, vae, checkpoint, prompts, args.out)
    else:
        metrics = export_and_verify(args, dit, vae, checkpoint, prompts)
    if not args.random_weights:
        files.record_metrics(args.run, "export", metrics)
    print(f"{args.out}: done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    cli.run_script(main)

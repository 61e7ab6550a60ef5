"""To the phone: Core ML packages in half precision, and a proof that needs no Mac.

Stated by the paper: Core ML Tools, half precision, no extra compilation, no special hardware; in
its second version a tiled GEMM for the FFN. Our reading: four ML programs, float16
throughout, iOS 18, fixed shapes, no tensor of more than five dimensions.

    package        calls  inputs                            outputs
    text_encoder   1      words [1, m] int32                text [1, m, width]
    generator      4      x_t [1, c, t, h, w], t, text      x0 [1, c, t, h, w]
    decoder_first  1      latent [1, c, 1, h, w]            frames [1, 3, 1, height, width], caches
    decoder        t - 1  latent, caches                    frames [1, 3, rt, height, width], caches

Between two calls of the generator the app adds noise again: x_t = (1 - t) * x0 + t * noise. Then
it decodes x0 latent frame by latent frame, and shows each one's frames while the next is decoded.
manifest.json holds all that it needs: the order of calls, names, shapes, timesteps, vocabulary.

Core ML runs on Apple's systems only. So each saved package is read back from disk and evaluated
operation by operation with torch, every result rounded to the type that the program declares
(float16 between operations, and wider sums inside one: our assumption). An operation that the
evaluator does not know is an error, and so is an overflow.

    python export_coreml.py            # runs/tiny/student.pt, vae.pt -> runs/tiny/coreml/
    python export_coreml.py --check    # only prove what is there
    python export_coreml.py --preset mobile --random-weights    # the paper's size, untrained
"""
import contextlib
import copy
import io
import json
import logging
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import add_file, fail, make_parser, positive, reading, record_metrics, run_script, size
from distill import predict_x0, sample_student, student_times
from dit import PAD, DiT, FeedForward, add_noise, load_dit, tokenize, words
from prune import planned_pruned
from vae import PRESETS as VAE_PRESETS
from vae import VAE, ResBlock, RMSNorm, latent_size, load_vae

try:
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of all that only a Mac has
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load as load_program
    from coremltools.converters.mil.mil.types import builtin_to_string
except ImportError:
    ct = None

MIN_PSNR = 40  # dB, of a float16 video to the float32 one

# ------------------------------------------------------------ the programs


class Float16RMSNorm(RMSNorm):
    """float16 ends at 65,504: squares of 256 already leave it. The norm does not depend on the
    scale of x, so divide by the largest |x| first (our reading)."""

    def forward(self, x):
        largest = x.abs().amax(self.axis, keepdim=True)
        return super().forward(x / largest.clamp(min=1e-3))


class TiledFeedForward(FeedForward):
    """The hidden channels in `tiles` slices (stated, second version: a tiled GEMM). Each is added
    up before the next, so that the activation of up to 4 times the width never exists at once."""

    def forward(self, x, channel_mask=None):
        result = 0
        up_slices = self.up.weight.chunk(self.tiles)
        down_slices = self.down.weight.chunk(self.tiles, dim=1)
        for up, down in zip(up_slices, down_slices):
            hidden = F.gelu(F.linear(x, up))  # [b, n, ffn / tiles]
            result = result + F.linear(hidden, down)
        return result


def for_phone(module, ffn_tiles):
    """-> a copy with these norms and FFNs; the weights are shared, so it takes no memory."""
    shared = {id(p): p for p in module.parameters()}
    phone_module = copy.deepcopy(module, memo=shared)
    for part in phone_module.modules():
        if isinstance(part, RMSNorm):
            part.__class__ = Float16RMSNorm  # only the arithmetic differs: swapped in place
        elif isinstance(part, FeedForward) and ffn_tiles > 1:
            part.__class__ = TiledFeedForward
            part.tiles = ffn_tiles
    return phone_module


class Program(nn.Module):
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


def encode_text(text_encoder, prompts):
    return text_encoder(prompts)


def decode_next(vae, latent, *caches):
    """One latent frame of x0, and what the decoder keeps of those before it -> its frames in
    [0, 1], and what to keep for the next. The latents' mean and std are inside."""
    caches = list(caches)
    z = latent * vae.latent_std + vae.latent_mean
    frames = vae.decode_next(z, caches)  # in [-1, 1]
    return (frames / 2 + 0.5).clamp(0, 1), *caches


def programs(dit, vae):
    """-> {package: Program}, in the order of the calls. An app keeps tensors by name, gives each
    package those that it asks for, and keeps what comes out, next_NAME as NAME."""
    prompts = "embedding" if dit.config["text_dim"] else "words"
    blocks = sum(isinstance(layer, ResBlock) for layer in vae.decoder)
    caches = [f"cache_{i}" for i in range(blocks)]
    # Core ML Tools refuses an output with the name of an input.
    frames = ["frames", *(f"next_{name}" for name in caches)]
    return {
        "text_encoder": Program(encode_text, dit.text_encoder, [prompts], ["text"]),
        "generator": Program(predict_x0, dit, ["x_t", "t", "text"], ["x0"]),
        "decoder_first": Program(decode_next, vae, ["latent"], frames),  # nothing lies before it
        "decoder": Program(decode_next, vae, ["latent", *caches], frames)}


def as_list(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


def call_module(module, values):
    """values: {name: tensor}, of which the module gets its inputs. -> {name: output}"""
    results = module(*[values[name] for name in module.inputs])
    return dict(zip(module.outputs, as_list(results)))


def keep(values, results):
    """What an app does with the outputs of a call."""
    for name, x in results.items():
        values[name.removeprefix("next_")] = x


# ------------------------------------------------------------ the conversion


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


# ------------------------------------------------------------ the evaluator


def read_program(path):
    """The main function of a saved package: its operations, with weights, as they lie on disk."""
    spec = ct.utils.load_spec(str(path))
    weights_folder = str(path / "Data/com.apple.CoreML/weights")
    return load_program(spec, spec.specificationVersion, weights_folder).functions["main"]


def slice_by_index(x, begin, end, end_mask=False):
    ends = np.where(end_mask, x.shape, end)  # masked: to the end of the axis
    return x[tuple(map(slice, begin, ends))]


def conv(x, weight, strides, pad_type, pad, dilations, groups, bias=None):
    t0, t1, h0, h1, w0, w1 = pad  # zeros unless pad_type is custom; `same` would show in the shape
    x = F.pad(x, (w0, w1, h0, h1, t0, t1))  # torch names the last axis first
    return F.conv3d(x, weight, bias, tuple(strides), dilation=tuple(dilations), groups=groups)


# What a program may be made of. A parameter's name is Core ML's; NumPy counts axes as it does.
OPERATIONS = {
    "abs": lambda x: x.abs(),
    "add": lambda x, y: x + y,
    "cast": lambda x, dtype: x,  # every result is rounded to its type anyway
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "concat": lambda values, axis, interleave: torch.cat(values, dim=axis),
    "conv": conv,
    "cos": lambda x: x.cos(),
    "expand_dims": lambda x, axes: torch.from_numpy(np.expand_dims(x.numpy(), tuple(axes))),
    "gather": lambda x, indices, axis, batch_dims, validate_indices: (
        x.index_select(axis, indices.flatten().long()).unflatten(axis, indices.shape)),
    "gelu": lambda x, mode: F.gelu(x, approximate={"EXACT": "none"}[mode]),
    "greater_equal": lambda x, y: x >= y,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "reduce_max": lambda x, axes, keep_dims: x.amax(list(axes), keepdim=keep_dims),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(list(axes), keepdim=keep_dims),
    "reshape": lambda x, shape: x.reshape(tuple(shape)),
    "rsqrt": lambda x, epsilon: torch.rsqrt(x + epsilon),
    "scaled_dot_product_attention": lambda query, key, value, attn_mask=None: (
        F.scaled_dot_product_attention(query, key, value, attn_mask)),
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "silu": lambda x: F.silu(x),
    "sin": lambda x: x.sin(),
    "slice_by_index": slice_by_index,
    "split": lambda x, split_sizes, axis: x.split(split_sizes.tolist(), dim=axis),
    "squeeze": lambda x, axes: x.squeeze(tuple(axes.tolist())),
    "sub": lambda x, y: x - y,
    "transpose": lambda x, perm: x.permute(tuple(perm)),
}


def schedule(program):
    """-> [(operation, names that nobody reads after it)], in the program's order; constants are no
    operations."""
    steps = []
    read_later = {var.name for var in program.outputs}
    for op in reversed(program.operations):  # the first met, from the end, is the last to read
        names = {var.name for var in [*op.outputs, *op.get_flattened_inputs()]}
        if op.op_type != "const":
            steps.append((op, names - read_later))
            read_later |= names
    return steps[::-1]


def declared_type(var):
    """float16, float32, int32, bool, ...: what a program declares for a variable."""
    return builtin_to_string(var.dtype).replace("fp", "float")


def rounded(var, x):
    """x, rounded to the type that the program declares, and held in float32 if it is a float."""
    x = x.to(getattr(torch, declared_type(var)))
    return x.float() if x.is_floating_point() else x


def value_of(x, values):
    """What an operation gets for a parameter: a variable, or a list of them."""
    if isinstance(x, (list, tuple)):
        return [value_of(var, values) for var in x]
    if x.name in values:
        return values[x.name]
    constant = x.val  # constants keep their value beside them
    if isinstance(constant, np.ndarray) and constant.dtype.kind == "f":
        return torch.from_numpy(constant.astype(np.float32))
    return constant.item() if isinstance(constant, np.generic) else constant


def evaluate(program, inputs):
    """Runs a Core ML program with torch. inputs: {name: tensor}. -> {name: float32 tensor}

    Each result is rounded to its declared type and forgotten after its last use. Raises
    NotImplementedError for what OPERATIONS does not know, FloatingPointError where float16
    overflows."""
    values = {name: rounded(var, inputs[name]) for name, var in program.inputs.items()}
    for op, done in schedule(program):
        if op.op_type not in OPERATIONS:
            raise NotImplementedError(f"{op.op_type}: add what it computes to OPERATIONS")
        parameters = {name: value_of(x, values) for name, x in op.inputs.items()}
        results = OPERATIONS[op.op_type](**parameters)
        for var, result in zip(op.outputs, as_list(results)):
            if result.shape != torch.Size(var.shape):
                raise NotImplementedError(f"{op.op_type} gives the shape {list(result.shape)}")
            result = rounded(var, result)
            if not result.isfinite().all():
                raise FloatingPointError(f"{var.name} ({op.op_type}) leaves the range of float16")
            values[var.name] = result
        for name in done:
            values.pop(name, None)  # constants are not in values
    return {var.name: values[var.name].float() for var in program.outputs}


def tensor_bytes(var):
    return math.prod(var.shape) * np.dtype(declared_type(var)).itemsize


def program_cost(program):
    """What a program asks of a phone beside its weights: operations, dimensions, bytes of its
    largest tensor and of its working set: all tensors that are alive at the worst moment, if
    reshapes copy and attention writes its scores out."""
    alive = {var.name: tensor_bytes(var) for var in program.inputs.values()}
    cost = dict(ops=0, max_rank=0, largest_tensor_bytes=0, working_set_bytes=0)
    for op, done in schedule(program):
        cost["ops"] += 1
        for var in op.outputs:
            alive[var.name] = tensor_bytes(var)
            cost["max_rank"] = max(cost["max_rank"], len(var.shape))
            cost["largest_tensor_bytes"] = max(cost["largest_tensor_bytes"], tensor_bytes(var))
        working_set = sum(alive.values())
        if op.op_type == "scaled_dot_product_attention":
            working_set += 2 * math.prod(op.query.shape[:-1]) * op.key.shape[-2]
        cost["working_set_bytes"] = max(cost["working_set_bytes"], working_set)
        for name in done:
            alive.pop(name, None)
    return cost


# ------------------------------------------------------------ the export


def signature(variables):
    return {var.name: dict(shape=list(var.shape), dtype=declared_type(var)) for var in variables}


def describe(args, checkpoint, folder, names):
    """manifest.json, from which alone an app can be written. names: the packages in `folder`."""
    packages = {}
    for name in names:
        program = read_program(folder / f"{name}.mlpackage")
        packages[name] = dict(file=f"{name}.mlpackage",
                              inputs=signature(program.inputs.values()),
                              outputs=signature(program.outputs))
    if checkpoint["config"]["text_dim"]:
        text = dict(tokenise="not here: text_encoder reads the embedding of a prompt by the "
                             "encoder of the training captions, your own, padded with zeros")
    else:
        text = dict(
            vocabulary=checkpoint["vocabulary"], words=checkpoint["text_tokens"],
            tokenise="lower case; runs of letters, digits and underscores; their indices in "
                     "vocabulary, without those that are not in it; cut to `words` of them, or "
                     f"padded with {PAD}")
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
    values = {"words": prompts, "embedding": prompts, "t": torch.ones(1), "x_t": x_t,
              "latent": x_t[:, :, :1]}
    for name, module in modules.items():
        convert(module, values, folder / f"{name}.mlpackage", args.ffn_tiles)
        print(f"{name}: converted after {time.perf_counter() - start:.0f} s", flush=True)
        keep(values, call_module(module, values))  # the next one's examples
    manifest = describe(args, checkpoint, folder, modules)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def publish(folder, out):
    """Puts a finished export in the place of an old one. The old manifest goes first and the new
    one comes last: a kill in between leaves packages without a manifest, never with a wrong one."""
    (out / "manifest.json").unlink(missing_ok=True)
    for old in out.glob("*.mlpackage"):
        shutil.rmtree(old)
    for new in folder.glob("*.mlpackage"):
        new.replace(out / new.name)
    (folder / "manifest.json").replace(out / "manifest.json")


# ------------------------------------------------------------ the proof


def sample_packages(manifest, call, prompts, noise_per_step):
    """The loop of an app, from a manifest and call(package, {name: tensor}) -> {name: tensor}
    alone. prompts: what the text encoder reads; noise_per_step: [steps, 1, c, t, h, w]. -> the
    video [1, 3, frames, height, width] in [0, 1]"""
    values = {"words": prompts, "embedding": prompts, "x0": torch.zeros_like(noise_per_step[0])}

    def run(name):
        inputs = manifest["packages"][name]["inputs"]
        keep(values, call(name, {key: values[key] for key in inputs}))

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


def prove(args, dit, vae, checkpoint, prompts, folder):
    """Compares the packages in `folder` with the modules that they came from, and prints what they
    are. -> the figures for metrics.json"""
    path = folder / "manifest.json"
    if not path.is_file():
        fail(f"{folder} holds no finished export: `python export_coreml.py` makes one")
    saved = {}
    with reading(folder):
        manifest = json.loads(path.read_text())
        for name, package in manifest["packages"].items():
            saved[name] = read_program(folder / package["file"])
    modules = programs(dit, vae)
    of_model = list(modules), checkpoint["latent_shape"]
    if of_model != (list(saved), manifest.get("latent_shape")):
        fail(f"{folder} was made from another model: {', '.join(saved)}")
    differences = {name: 0.0 for name in modules}

    def compared_call(name, inputs):
        try:
            results = evaluate(saved[name], inputs)
            for key, expected in call_module(modules[name], inputs).items():
                difference = (results[key] - expected).abs().max().item()
                differences[name] = max(differences[name], difference)
        except (RuntimeError, TypeError, ValueError, LookupError, FloatingPointError) as error:
            fail(f"{name} is not proven: {error}")
        return results

    g = torch.Generator().manual_seed(args.seed)
    shape = len(manifest["timesteps"]), 1, *checkpoint["latent_shape"]
    noise_per_step = torch.randn(shape, generator=g)
    video = sample_packages(manifest, compared_call, prompts, noise_per_step)
    x0 = sample_student(dit, noise_per_step, prompts)
    whole = vae.decode(x0 * vae.latent_std + vae.latent_mean)
    reference = (whole / 2 + 0.5).clamp(0, 1)
    psnr = -10 * (video - reference).square().mean().log10().item()

    metrics = {}
    for name, program in saved.items():
        files = [file for file in (folder / f"{name}.mlpackage").rglob("*") if file.is_file()]
        package_bytes = sum(file.stat().st_size for file in files)
        cost = program_cost(program)
        metrics[name] = dict(bytes=package_bytes, **cost, precision=16,
                             parity_max_abs=differences[name])
        print(f"{name}: {package_bytes / 1e6:.4g} MB, {cost['ops']} operations, rank <= "
              f"{cost['max_rank']}, largest tensor {cost['largest_tensor_bytes'] / 1e6:.3g} MB, "
              f"working set {cost['working_set_bytes'] / 1e6:.3g} MB, largest difference from "
              f"PyTorch {differences[name]:.2g}")
    print(f"a video through the packages, in float16, is {psnr:.1f} dB from PyTorch's in float32")
    if not psnr >= MIN_PSNR:  # nan is not
        fail(f"that is below {MIN_PSNR} dB: made from another model, or float16 does not hold it")
    metrics["decoder"]["video_psnr_db"] = psnr
    return metrics


# ------------------------------------------------------------ the command line


def random_student(preset, seed):
    """A preset's student as distill.py would leave it, but for the training, and with a text
    encoder of six words. -> dit, checkpoint, vae."""
    torch.manual_seed(seed)
    of_vae = VAE_PRESETS[preset]
    caption = "a red circle moving left"
    channels = of_vae["latent_channels"]
    ratio = size(of_vae["ratio"])
    dit = DiT(**planned_pruned(preset) | dict(vocabulary=6, text_tokens=5, text_dim=0))
    for p in dit.parameters():
        if not p.any():  # what training starts at zero would leave the rest idle
            nn.init.normal_(p, std=0.02)
    vae = VAE(ratio, channels, of_vae["width"], of_vae["res_blocks"], of_vae["patch"])
    checkpoint = dict(
        latent_shape=[channels, *latent_size(size(of_vae["size"]), ratio)],
        vocabulary=["<pad>", *words(caption)], text_tokens=5, config=dit.config,
        captions=[caption], timesteps=student_times(4).tolist())
    return dit.eval().requires_grad_(False), checkpoint, vae.eval().requires_grad_(False)


@torch.no_grad()
def main(argv=None):
    p = make_parser(__doc__, dict.fromkeys(VAE_PRESETS, {}), argv)
    add_file(p, "--model", "student.pt", "the few-step student, from distill.py")
    add_file(p, "--vae", "vae.pt", "the autoencoder, from vae.py")
    p.add_argument("--out", type=Path, metavar="DIR", default=p.get_default("run") / "coreml",
                   help="folder of the packages and manifest.json")
    p.add_argument("--ffn-tiles", type=positive, default=1,
                   help="slices of the FFN's hidden channels, one at a time")
    p.add_argument("--random-weights", action="store_true",
                   help="the preset's sizes untrained, without a checkpoint")
    p.add_argument("--check", action="store_true", help="export nothing, prove what is in --out")
    args = p.parse_args(argv)
    if ct is None:
        fail("coremltools is missing: pip install -r requirements.txt")
    if args.random_weights:
        dit, checkpoint, vae = random_student(args.preset, args.seed)
    else:
        dit, checkpoint = load_dit(args.model, "cpu", "student")
        vae = load_vae(args.vae, "cpu", checkpoint["vae_checksum"])
    if dit.config["ffn"] % args.ffn_tiles:
        fail(f"--ffn-tiles {args.ffn_tiles} does not divide the FFN's {dit.config['ffn']} channels")
    m = checkpoint["text_tokens"]
    prompts = torch.randn(1, m, dit.config["text_dim"])
    prompts[:, m // 2 + 1:] = 0  # padding
    if not dit.config["text_dim"]:
        prompts = tokenize(checkpoint["captions"][:1], checkpoint["vocabulary"], m)
    start = time.perf_counter()
    if args.check:
        metrics = prove(args, dit, vae, checkpoint, prompts, args.out)
    else:
        folder = args.out / "unfinished"
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir(parents=True)
            modules = programs(dit, vae)
            export(args, modules, checkpoint, prompts, folder)
            metrics = prove(args, dit, vae, checkpoint, prompts, folder)
            publish(folder, args.out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    record_metrics(args.run, "export", metrics)
    print(f"{args.out}: done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run_script(main)

"""To the phone: three Core ML packages in half precision, a manifest to sample with, and a proof that needs no Mac.

The paper deploys with Core ML Tools, half precision, no extra compilation, no special hardware. Three ML programs
(float16, iOS 18, fixed shapes, no tensor of more than five dimensions):

    text_encoder   words [1, n] int32                                     -> text [1, n, width]     once a prompt
    generator      x_t [1, c, t, h, w], t [1], text                       -> x0 [1, c, t, h, w]     4 times
    decoder        x0                                                     -> video [1, 3, frames, height, width]

Between two calls of the generator the app adds noise again: x_t = (1 - t) * x0 + t * noise. manifest.json holds all
that it needs for that: timesteps, shapes, names, vocabulary, and the statistics of the latents.

Core ML runs only on Apple's systems. So `check` reads each saved package back from disk, graph and weights, and
evaluates it operation by operation with torch, every result rounded to the precision the program declares (float16
between operations, and wider sums inside one: our assumption). An operation that it does not know is an error.

    python export_coreml.py                          # runs/tiny/student.pt, vae.pt -> runs/tiny/coreml/
"""
import contextlib
import io
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distill import predict_x0, sample_student
from dit import PAD, load_dit, text_input
from sample import PRESETS, load_vae
from vae import RMSNorm, fail, parse, parser, record, script, set_up, write_aside

MAX_RANK = 5  # of a Core ML tensor

# ------------------------------------------------------------------------------------------- the three programs


class Generator(nn.Module):
    """One of the student's steps, from noisy latents to clean ones, so that an app only adds noise in between."""

    def __init__(self, dit):
        super().__init__()
        self.dit = dit

    def forward(self, x_t, t, text):
        return predict_x0(self.dit, x_t, t, text)


class Decoder(nn.Module):
    """Normalised latents -> a clip in [0, 1]; the latents' mean and deviation are folded in."""

    def __init__(self, vae, mean, std):
        super().__init__()
        self.vae = vae
        self.register_buffer("mean", mean.view(-1, 1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1, 1))

    def forward(self, x0):
        return (self.vae.decode(x0 * self.std + self.mean) / 2 + 0.5).clamp(0, 1)


def convert(module, inputs, output, path):
    """Traces, converts and saves one module as a package. inputs: {name: example tensor}; output: its name."""
    try:
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        import coremltools as ct
    except ImportError:
        fail("coremltools is missing: pip install -r requirements.txt")
    # Quiet: the tracer's warnings, about shapes that are fixed on purpose here, and 36 progress bars.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module.eval(), tuple(inputs.values()))
        kinds = {torch.int32: np.int32, torch.float32: np.float16}
        model = ct.convert(
            traced, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT16, compute_units=ct.ComputeUnit.ALL,
            inputs=[ct.TensorType(name=n, shape=tuple(x.shape), dtype=kinds[x.dtype]) for n, x in inputs.items()],
            outputs=[ct.TensorType(name=output, dtype=np.float16)])
    aside = path.with_name(f"{path.stem}.tmp.mlpackage")
    model.save(str(aside))
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)


# ------------------------------------------------------------------------------------------------------ the proof


def read_program(path):
    """The main function of a saved package: its operations, with weights, as they lie on disk."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load
    spec = ct.utils.load_spec(str(path))
    return load(spec, spec.specificationVersion, str(path / "Data/com.apple.CoreML/weights")).functions["main"]


def attention(query, key, value, attn_mask=None):
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


def slice_by_index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    index = []
    for i, n in enumerate(x.shape):
        first = 0 if begin_mask is not None and begin_mask[i] else begin[i]
        last = n if end_mask is not None and end_mask[i] else end[i]
        index.append(first if squeeze_mask is not None and squeeze_mask[i] else
                     slice(first, last, 1 if stride is None else stride[i]))
    return x[tuple(index)]


def conv(x, weight, bias=None, strides=None, pad_type="valid", pad=None, dilations=None, groups=1):
    if pad_type not in ("valid", "custom") or groups != 1:
        raise NotImplementedError(f"conv with pad_type {pad_type}, groups {groups}")
    if pad_type == "custom":  # (before, after) for each axis, the first axis first; torch wants the last first
        pairs = [tuple(pad[i:i + 2]) for i in range(0, len(pad), 2)]
        x = F.pad(x, [n for pair in reversed(pairs) for n in pair])
    return F.conv3d(x, weight, bias, stride=tuple(strides), dilation=tuple(dilations))


def reduce_mean(x, axes, keep_dims):
    return x.mean(list(axes), keepdim=keep_dims)


def gelu(x, mode="EXACT"):
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


OPERATIONS = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "real_div": lambda x, y: x / y,
    "greater_equal": lambda x, y: x >= y, "select": lambda cond, a, b: torch.where(cond, a, b),
    "cos": lambda x: x.cos(), "sin": lambda x: x.sin(), "silu": lambda x: F.silu(x), "gelu": gelu,
    "abs": lambda x: x.abs(), "reduce_max": lambda x, axes, keep_dims: x.amax(list(axes), keepdim=keep_dims),
    "rsqrt": lambda x, epsilon=1e-12: torch.rsqrt(x + epsilon), "square": lambda x: x * x,
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta), "cast": lambda x, dtype: x,
    "reduce_mean": reduce_mean, "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x=False, transpose_y=False: (
        (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)),
    "softmax": lambda x, axis: x.softmax(axis), "scaled_dot_product_attention": attention, "conv": conv,
    "reshape": lambda x, shape: x.reshape(tuple(shape)), "transpose": lambda x, perm: x.permute(tuple(perm)),
    "expand_dims": lambda x, axes: x[tuple(None if i in [a % (x.ndim + len(axes)) for a in axes] else slice(None)
                                           for i in range(x.ndim + len(axes)))],
    "squeeze": lambda x, axes: x.squeeze(tuple(int(a) for a in axes)),
    "concat": lambda values, axis, interleave=False: torch.cat(values, dim=axis),
    "split": lambda x, split_sizes, axis: x.split([int(n) for n in split_sizes], dim=axis),
    "slice_by_index": slice_by_index,
    "gather": lambda x, indices, axis=0, batch_dims=0, validate_indices=False: x.index_select(
        axis, indices.flatten().long()).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1:]),
}


def evaluate(program, inputs):
    """Runs a Core ML program with torch. inputs: {name: tensor}. -> its outputs, a list of float32 tensors.

    Each result is rounded to the type that the program declares for it; raises NotImplementedError for an operation
    that is not in OPERATIONS, FloatingPointError where a value overflows float16."""
    from coremltools.converters.mil.mil.types import builtin_to_string

    def rounded(var, x):
        kind = builtin_to_string(var.dtype)
        return x.half().float() if kind == "fp16" else x.float() if kind == "fp32" else x.int() if "int" in kind else x

    values = {var.name: rounded(var, inputs[name]) for name, var in program.inputs.items()}

    def value(x):  # a parameter is a variable, or a list of them; constants keep their value beside them
        if isinstance(x, (list, tuple)):
            return [value(v) for v in x]
        if x.name in values:
            return values[x.name]
        constant = x.val
        if isinstance(constant, (str, bool, np.bool_)):
            return constant if isinstance(constant, str) else bool(constant)
        if isinstance(constant, np.ndarray) and constant.dtype.kind == "f":
            return torch.from_numpy(constant.astype(np.float32))
        return constant.item() if np.ndim(constant) == 0 else np.asarray(constant)

    for op in program.operations:
        if op.op_type == "const":
            continue
        if op.op_type not in OPERATIONS:
            raise NotImplementedError(f"{op.op_type}: add what it computes to OPERATIONS")
        results = OPERATIONS[op.op_type](**{name: value(x) for name, x in op.inputs.items() if x is not None})
        for var, result in zip(op.outputs, results if isinstance(results, (list, tuple)) else [results]):
            result = rounded(var, result)
            if result.is_floating_point() and not result.isfinite().all():
                raise FloatingPointError(f"{var.name} ({op.op_type}) leaves the range of float16")
            values[var.name] = result
    return [values[var.name].float() for var in program.outputs]


def check(package, program, module, inputs, output):
    """-> the largest difference of a saved package's output from the module's on these inputs, and that output."""
    try:
        result = evaluate(program, inputs)[0]
    except (NotImplementedError, FloatingPointError) as error:
        fail(f"{package} is not proven: {error}")
    if sys.platform == "darwin":  # the real thing is at hand
        import coremltools as ct
        arrays = {k: v.numpy().astype(np.int32 if v.dtype == torch.int32 else np.float16) for k, v in inputs.items()}
        result = torch.from_numpy(ct.models.MLModel(str(package)).predict(arrays)[output]).float()
    return (result - module(*inputs.values())).abs().max().item(), result


def main(argv=None):
    p = parser(__doc__, PRESETS)
    p.add_argument("--model", type=Path, help="the few-step student, from distill.py")
    p.add_argument("--vae", type=Path, help="the autoencoder, from vae.py")
    p.add_argument("--out", type=Path, help="folder for the packages and manifest.json")
    args = parse(p, PRESETS, argv, model="student.pt", vae="vae.pt", out="coreml")
    args.device = "cpu"  # a trace for a phone; everything is small enough
    device, _ = set_up(args)
    dit, student = load_dit(args.model, device, "student")
    vae = load_vae(args.vae, device)
    if student["latent_shape"][0] != vae.config["latent_channels"]:
        fail(f"{args.model} has {student['latent_shape'][0]} latent channels and {args.vae} "
             f"{vae.config['latent_channels']}: they come from different runs")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write {args.out}: {error}")

    caption, steps = student["captions"][0], len(student["timesteps"])
    tokens = text_input(student, [caption])
    tokens = tokens if tokens.is_floating_point() else tokens.int()
    noises = torch.stack([torch.randn(1, *student["latent_shape"], generator=torch.Generator().manual_seed(i))
                          for i in range(steps)])
    generator, decoder = Generator(dit), Decoder(vae, student["latent_mean"], student["latent_std"])
    names = {"text_encoder": (dit.text_encoder, "text"), "generator": (generator, "x0"), "decoder": (decoder, "video")}
    for norm in (m for module, _ in names.values() for m in module.modules() if isinstance(m, RMSNorm)):
        norm.float16_safe = True
    packages = {name: args.out / f"{name}.mlpackage" for name in names}
    with torch.no_grad():
        text = dit.text_encoder(tokens)
        inputs = {"text_encoder": {"words": tokens}, "decoder": {"x0": torch.zeros_like(noises[0])},
                  "generator": {"x_t": noises[0], "t": torch.ones(1), "text": text}}
        metrics, programs, differences = {}, {}, {name: [] for name in names}
        for name, (module, output) in names.items():
            convert(module, inputs[name], output, packages[name])
            programs[name] = read_program(packages[name])
            operations = [op for op in programs[name].operations if op.op_type != "const"]
            rank = max(len(var.shape) for op in operations for var in op.outputs)
            if rank > MAX_RANK:
                fail(f"{packages[name]} holds a tensor of {rank} dimensions; Core ML takes {MAX_RANK}")
            size = sum(f.stat().st_size for f in packages[name].rglob("*") if f.is_file())
            metrics[name] = dict(bytes=size, ops=len(operations), max_rank=rank, precision=16)

        def run(name, **inputs):  # one call of one package, and how far it is from the module on the same input
            module, output = names[name]
            difference, result = check(packages[name], programs[name], module, inputs, output)
            differences[name].append(difference)
            return result

        # The loop of an app, through the packages: text, four steps with noise in between, the decoder.
        text, x0 = run("text_encoder", words=tokens), torch.zeros_like(noises[0])
        for t, noise in zip(student["timesteps"], noises):
            x0 = run("generator", x_t=(1 - t) * x0 + t * noise, t=torch.tensor([t]), text=text)
        video = run("decoder", x0=x0)
        reference = decoder(sample_student(dit, noises, tokens))
    for name in names:
        metrics[name]["parity_max_abs"] = max(differences[name])
    psnr_db = metrics["decoder"]["video_psnr_db"] = -10 * (video - reference).square().mean().log10().item()

    manifest = dict(
        packages={name: dict(file=packages[name].name, inputs={k: list(v.shape) for k, v in inputs[name].items()},
                             output=output) for name, (_, output) in names.items()},
        order="text = text_encoder(words); x0 = 0; for each timestep t: x0 = generator(x_t, t, text) with x_t = "
              "(1 - t) * x0 + t * noise and fresh standard normal noise; video = decoder(x0), values in [0, 1]",
        timesteps=student["timesteps"], latent_shape=student["latent_shape"], video_shape=list(video.shape[1:]),
        latent_mean=student["latent_mean"].tolist(), latent_std=student["latent_std"].tolist(),
        latent_note="mean and deviation are already inside the decoder: give it the generator's x0 as it is",
        vocabulary=student["vocabulary"], words=student["text_tokens"],
        tokenise="lower case; runs of letters and digits; their indices in vocabulary, without those not in it; "
                 f"cut to `words` of them, or pad with {PAD}",
        precision="float16", minimum_deployment_target="iOS 18", captions=student["captions"])
    write_aside(args.out / "manifest.json", lambda f: f.write(json.dumps(manifest, indent=1).encode() + b"\n"))
    record(args.run, "export", metrics)
    for name, m in metrics.items():
        print(f"{packages[name]}: {m['bytes'] / 1e6:.2f} MB, {m['ops']} operations, rank <= {m['max_rank']}, "
              f"at most {m['parity_max_abs']:.2g} from PyTorch")
    print(f"{args.out}: '{caption}' through the packages in float16 is {psnr_db:.1f} dB from PyTorch in float32")


if __name__ == "__main__":
    script(main)

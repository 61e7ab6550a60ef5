"""To the phone: Core ML packages in half precision, a manifest to sample with, and a proof that needs no Mac.

The paper deploys with Core ML Tools, half precision, no extra compilation, no special hardware. Three ML programs
(float16, iOS 18, fixed shapes, no tensor of more than five dimensions):

    text_encoder   words [1, n] int32                                     -> text [1, n, width]     once a prompt
    generator      x_t [1, c, t, h, w], t [1], text                       -> x0 [1, c, t, h, w]     4 times
    decoder        x0                                                     -> video [1, 3, frames, height, width]

Between two calls of the generator the app adds noise again: x_t = (1 - t) * x0 + t * noise. manifest.json holds all
that it needs for that: the order of calls, names, shapes, timesteps, vocabulary.

Core ML runs only on Apple's systems. So each saved package is read back from disk, graph and weights, and evaluated
operation by operation with torch, every result rounded to the precision the program declares (float16 between
operations, and wider sums inside one: our assumption). An operation that it does not know is an error.

    python export_coreml.py                          # runs/tiny/student.pt, vae.pt -> runs/tiny/coreml/
    python export_coreml.py --check                  # what is there, without exporting; on a Mac by Core ML itself too
    python export_coreml.py --preset mobile --random-weights --chunks 2     # the paper's size, untrained
"""
import contextlib
import io
import json
import logging
import math
import resource
import shutil
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distill import predict_x0, sample_student, student_times
from dit import PAD, DiT, load_dit, text_input
from dit import PRESETS as DIT_SIZES
from prune import PRESETS as PRUNED_SIZES
from sample import PRESETS, load_vae
from vae import PRESETS as VAE_SIZES
from vae import VAE, dims, fail, parse, parser, positive, record, script

try:
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of every part that only a Mac has
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.frontend.milproto.load import load as load_program
    from coremltools.converters.mil.mil.types import builtin_to_string
except ImportError:
    ct = None

MAX_RANK = 5  # of a Core ML tensor
WEIGHTS = {"float16": 16, "int8": 8, "palette6": 6, "palette4": 4}  # bits a weight

# ----------------------------------------------------------------------------------------------------- the programs


class Generator(nn.Module):
    """One of the student's steps, from noisy latents to clean ones, so that an app only adds noise in between. Or the
    k-th of `chunks` parts of a step, which hand on the tokens and what was made of the time."""

    def __init__(self, dit, latent_shape, k=0, chunks=1):
        super().__init__()
        start, stop = (round(i * len(dit.blocks) / chunks) for i in (k, k + 1))
        self.dit, self.blocks, self.k, self.first, self.last = dit, dit.blocks[start:stop], k, k == 0, k == chunks - 1
        self.rope = dit.prepare(torch.zeros(1, *latent_shape), torch.zeros(1))[2]  # a constant of the program
        self.inputs = ["text"] + ["x_t", "t"] * (self.first or self.last)
        self.inputs += [] if self.first else [f"tokens_{k}", "modulation"] + ["time"] * self.last
        self.outputs = ["x0"] if self.last else [f"tokens_{k + 1}"] + ["modulation", "time"] * self.first

    def forward(self, *values):
        v = dict(zip(self.inputs, values))
        if self.first:
            x, v["modulation"], _, v["time"] = self.dit.prepare(v["x_t"], v["t"])
        else:
            x = v[f"tokens_{self.k}"]
        for block in self.blocks:
            x = block(x, v["modulation"], v["text"], self.rope)
        if self.last:
            return predict_x0(lambda x_t, *_: self.dit.finish(x, v["time"], x_t.shape[2:]), v["x_t"], v["t"], v["text"])
        return (x, v["modulation"], v["time"]) if self.first else x


class Decoder(nn.Module):
    """Normalised latents -> a clip in [0, 1]; the latents' mean and deviation are folded in."""

    inputs, outputs = ["x0"], ["video"]

    def __init__(self, vae, mean, std):
        super().__init__()
        self.vae = vae
        self.register_buffer("mean", mean.view(-1, 1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1, 1))

    def forward(self, x0):
        return (self.vae.decode(x0 * self.std + self.mean) / 2 + 0.5).clamp(0, 1)


def programs(dit, vae, student, chunks):
    """-> {package: its module}, in the order of the calls. `inputs` and `outputs` are names: an app keeps tensors by
    name, gives each package those that it asks for, and keeps what comes out."""
    dit.text_encoder.inputs = ["embedding" if dit.config["text_dim"] else "words"]
    dit.text_encoder.outputs = ["text"]
    names = ["generator"] if chunks == 1 else [f"generator_{k + 1}" for k in range(chunks)]
    return {"text_encoder": dit.text_encoder,
            **{name: Generator(dit, student["latent_shape"], k, chunks) for k, name in enumerate(names)},
            "decoder": Decoder(vae, student["latent_mean"], student["latent_std"])}


def run(module, values):
    """Calls a module with what it asks for. values: {name: tensor}. -> {name: tensor}"""
    results = module(*(values[name] for name in module.inputs))
    return dict(zip(module.outputs, results if isinstance(results, tuple) else [results]))


def convert(module, values, path, weights="float16", ffn_tiles=1, attention_slices=1):
    """Traces, converts and saves one module as a package. values: {name: example tensor}."""
    pipeline = ct.PassPipeline.DEFAULT
    if attention_slices > 1:
        pipeline.append_pass("common::scaled_dot_product_attention_sliced_q")
        pipeline.set_options("common::scaled_dot_product_attention_sliced_q",
                             {"min_seq_length": 0, "seq_length_divider": attention_slices})
    inputs = {name: values[name] for name in module.inputs}
    kinds = {torch.int32: np.int32, torch.float32: np.float16}
    # Quiet: the tracer's warnings, about shapes that are fixed on purpose here, and dozens of progress bars.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for m in module.modules():  # the norms and the FFNs look at these
            m.float16_safe, m.tiles = True, ffn_tiles
        traced = torch.jit.trace(module, tuple(inputs.values()), check_trace=False)
        for m in module.modules():  # packages are compared with the module as it was trained
            m.float16_safe, m.tiles = False, 1
        model = ct.convert(
            traced, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
            compute_precision=ct.precision.FLOAT16, compute_units=ct.ComputeUnit.ALL, pass_pipeline=pipeline,
            inputs=[ct.TensorType(name=n, shape=tuple(x.shape), dtype=kinds[x.dtype]) for n, x in inputs.items()],
            outputs=[ct.TensorType(name=n, dtype=np.float16) for n in module.outputs])
        if weights == "int8":  # one scale an output channel
            config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=512)
            model = cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config))
        elif weights != "float16":  # k-means finds 64 or 16 values a tensor; those below 10,000 weights stay float16
            config = cto.OpPalettizerConfig(mode="kmeans", nbits=WEIGHTS[weights], weight_threshold=10_000)
            model = cto.palettize_weights(model, cto.OptimizationConfig(global_config=config))
        model.save(str(path))


# ---------------------------------------------------------------------------------------------------- the evaluator


def read_program(path):
    """The main function of a saved package: its operations, with weights, as they lie on disk."""
    spec = ct.utils.load_spec(str(path))
    return load_program(spec, spec.specificationVersion, str(path / "Data/com.apple.CoreML/weights")).functions["main"]


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


def scaled_integers(data, scale, offset=None):
    if offset is not None or any(n not in (1, data.shape[i]) for i, n in enumerate(scale.shape)):
        raise NotImplementedError("8-bit weights with an offset, or with several scales along an axis")
    return torch.from_numpy(data.astype(np.float32)) * scale


def palette(indices, lut, vector_axis=None):
    if lut.numel() != lut.shape[-2]:
        raise NotImplementedError("a tensor of weights with several palettes, or with one of vectors")
    return lut.flatten()[torch.from_numpy(indices.astype(np.int64))]


OPERATIONS = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "real_div": lambda x, y: x / y,
    "greater_equal": lambda x, y: x >= y, "select": lambda cond, a, b: torch.where(cond, a, b),
    "cos": lambda x: x.cos(), "sin": lambda x: x.sin(), "silu": lambda x: F.silu(x),
    "gelu": lambda x, mode="EXACT": F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none"),
    "abs": lambda x: x.abs(), "reduce_max": lambda x, axes, keep_dims: x.amax(list(axes), keepdim=keep_dims),
    "rsqrt": lambda x, epsilon=1e-12: torch.rsqrt(x + epsilon), "square": lambda x: x * x,
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta), "cast": lambda x, dtype: x,
    "reduce_mean": lambda x, axes, keep_dims: x.mean(list(axes), keepdim=keep_dims),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x=False, transpose_y=False: (
        (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)),
    "softmax": lambda x, axis: x.softmax(axis), "conv": conv,
    "scaled_dot_product_attention": lambda query, key, value: F.scaled_dot_product_attention(query, key, value),
    "reshape": lambda x, shape: x.reshape(tuple(shape)), "transpose": lambda x, perm: x.permute(tuple(perm)),
    "expand_dims": lambda x, axes: x[tuple(None if i in [a % (x.ndim + len(axes)) for a in axes] else slice(None)
                                           for i in range(x.ndim + len(axes)))],
    "squeeze": lambda x, axes: x.squeeze(tuple(int(a) for a in axes)),
    "concat": lambda values, axis, interleave=False: torch.cat(values, dim=axis),
    "split": lambda x, split_sizes, axis: x.split([int(n) for n in split_sizes], dim=axis),
    "slice_by_index": slice_by_index,
    "gather": lambda x, indices, axis=0, batch_dims=0, validate_indices=False: x.index_select(
        axis, indices.flatten().long()).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1:]),
    "constexpr_blockwise_shift_scale": scaled_integers, "constexpr_lut_to_dense": palette,
}


def schedule(program):
    """(operation, names that nobody reads after it), in the program's order; constants are no operations."""
    operations, last = [op for op in program.operations if op.op_type != "const"], {}
    for i, op in enumerate(operations):
        for x in [*op.inputs.values(), op.outputs]:
            last |= {var.name: i for var in (x if isinstance(x, (list, tuple)) else [x]) if var is not None}
    done = [[] for _ in operations]
    for name in last.keys() - {var.name for var in program.outputs}:
        done[last[name]].append(name)
    return zip(operations, done)


def kind(var):
    """float16, float32, int32, bool, ...: the type that a program declares for a variable."""
    return builtin_to_string(var.dtype).replace("fp", "float")


def rounded(var, x):
    if kind(var) == "float16":
        return x.half().float()
    return x.float() if kind(var) == "float32" else x.int() if "int" in kind(var) else x


def evaluate(program, inputs):
    """Runs a Core ML program with torch. inputs: {name: tensor}. -> its outputs, a list of float32 tensors.

    Each result is rounded to the type that the program declares for it, and forgotten after its last use; raises
    NotImplementedError for an operation that is not in OPERATIONS, FloatingPointError where float16 overflows."""
    values = {var.name: rounded(var, inputs[name]) for name, var in program.inputs.items()}

    def value(x):  # a parameter is a variable, or a list of them; constants keep their value beside them
        if isinstance(x, (list, tuple)):
            return [value(v) for v in x]
        if x.name in values:
            return values[x.name]
        if isinstance(x.val, np.ndarray) and x.val.dtype.kind == "f":
            return torch.from_numpy(x.val.astype(np.float32))
        return x.val.item() if isinstance(x.val, np.generic) else x.val

    for op, done in schedule(program):
        if op.op_type not in OPERATIONS:
            raise NotImplementedError(f"{op.op_type}: add what it computes to OPERATIONS")
        results = OPERATIONS[op.op_type](**{name: value(x) for name, x in op.inputs.items() if x is not None})
        for var, result in zip(op.outputs, results if isinstance(results, (list, tuple)) else [results]):
            result = rounded(var, result)
            if result.is_floating_point() and not result.isfinite().all():
                raise FloatingPointError(f"{var.name} ({op.op_type}) leaves the range of float16")
            values[var.name] = result
        for name in done:
            values.pop(name, None)
    return [values[var.name].float() for var in program.outputs]


def measure(program):
    """What a program asks of a phone beside its weights: operations, dimensions, bytes of its largest tensor and of its
    working set: all tensors alive at the worst moment, if reshapes copy and attention writes its scores out."""
    def size(var):
        return math.prod(var.shape) * int("".join(c for c in kind(var) if c.isdigit()) or 8) // 8

    live, m = {var.name: size(var) for var in program.inputs.values()}, Counter()
    for op, done in schedule(program):
        if op.op_type.startswith("constexpr_"):  # weights
            continue
        live |= {var.name: size(var) for var in op.outputs}
        sdpa = op.op_type == "scaled_dot_product_attention"
        scores = 2 * math.prod(op.query.shape[:-1]) * op.key.shape[-2] if sdpa else 0
        m["ops"] += 1
        m["max_rank"] = max(m["max_rank"], *(len(var.shape) for var in op.outputs))
        m["largest_tensor_bytes"] = max(m["largest_tensor_bytes"], *map(size, op.outputs))
        m["working_set_bytes"] = max(m["working_set_bytes"], sum(live.values()) + scores)
        for name in done:
            live.pop(name, None)
    return dict(m)


# ------------------------------------------------------------------------------------------------------- the export


def describe(args, student, folder, names):
    """manifest.json, from which alone an app can be written."""
    def tensors(variables):
        return {var.name: dict(shape=list(var.shape), dtype=kind(var)) for var in variables}

    saved = {name: read_program(folder / f"{name}.mlpackage") for name in names}
    text = dict(vocabulary=student["vocabulary"], words=student["text_tokens"], tokenise=(
        "lower case; runs of letters, digits and underscores; their indices in vocabulary, without those that are not "
        f"in it; cut to `words` of them, or padded with {PAD}"))
    if known := student["embeddings"]:
        (folder / "embeddings.float16").write_bytes(torch.stack([*known.values()]).numpy().astype("<f2").tobytes())
        text = dict(embeddings=dict(file="embeddings.float16", captions=list(known)), tokenise=(
            "not here: text_encoder reads what your own encoder, that of the training captions, makes of a prompt; the "
            "file has it for the captions listed, one after the other, little-endian"))
    return dict(
        packages={name: dict(file=f"{name}.mlpackage", inputs=tensors(program.inputs.values()),
                             outputs=tensors(program.outputs)) for name, program in saved.items()},
        each_step=[name for name in names if name.startswith("generator")],
        order="keep tensors by name: give a package those that it asks for, keep what comes out. Once text_encoder. "
              "Then x0 = 0, and for each t of timesteps: fresh standard normal noise, x_t = (1 - t) * x0 + t * noise, "
              "and the packages of each_step. Once decoder",
        timesteps=student["timesteps"], latent_shape=student["latent_shape"],
        latent_mean=student["latent_mean"].tolist(), latent_std=student["latent_std"].tolist(),
        latent_note="mean and deviation are already inside the decoder: give it the generator's x0 as it is",
        video_note="[1, red green blue, frames, height, width], values in [0, 1]", **text,
        captions=student["captions"], precision="float16", weights=args.weights, ffn_tiles=args.ffn_tiles,
        attention_slices=args.attention_slices, minimum_deployment_target="iOS 18")


def export(args, dit, vae, student, tokens, folder):
    """Converts every program into `folder`, and writes manifest.json beside them."""
    modules, start = programs(dit, vae, student, args.chunks), time.perf_counter()
    values = {**dict.fromkeys(modules["text_encoder"].inputs, tokens), "t": torch.ones(1),
              "x_t": torch.randn(1, *student["latent_shape"])}
    for name, module in modules.items():
        convert(module, values, folder / f"{name}.mlpackage", args.weights, args.ffn_tiles, args.attention_slices)
        print(f"{name}: converted after {time.perf_counter() - start:.0f} s", flush=True)
        values |= run(module, values)
    manifest = describe(args, student, folder, modules)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def publish(folder, out):
    """Puts a finished export in the place of an old one. The old manifest goes first and the new one comes last: a kill
    in between leaves packages without a manifest, never beside a wrong one."""
    (out / "manifest.json").unlink(missing_ok=True)
    for path in {*out.glob("generator*.mlpackage"), *(out / new.name for new in folder.glob("*.mlpackage"))}:
        shutil.rmtree(path, ignore_errors=True)
    for new in sorted(folder.iterdir(), key=lambda path: path.name == "manifest.json"):
        new.rename(out / new.name)


# -------------------------------------------------------------------------------------------------------- the proof


def evaluator(manifest, saved):
    """-> call(package, {name: tensor}) -> {name: tensor}, by the evaluator. saved: {package: its program}."""
    return lambda name, inputs: dict(zip(manifest["packages"][name]["outputs"], evaluate(saved[name], inputs)))


def core_ml(manifest, folder, unit):
    """-> the same by Core ML, on a Mac. unit: CPU_ONLY, CPU_AND_GPU, CPU_AND_NE or ALL."""
    models = {name: ct.models.MLModel(str(folder / package["file"]), compute_units=ct.ComputeUnit[unit])
              for name, package in manifest["packages"].items()}

    def call(name, inputs):
        arrays = {k: v.numpy().astype(np.int32 if v.dtype == torch.int32 else np.float16) for k, v in inputs.items()}
        return {k: torch.from_numpy(np.array(v, np.float32)) for k, v in models[name].predict(arrays).items()}
    return call


def sample_packages(manifest, call, tokens, noises):
    """The loop of an app, from a manifest and call(package, {name: tensor}) -> {name: tensor} alone. tokens: what the
    text encoder reads; noises: [steps, 1, c, t, h, w]. -> the video [1, 3, frames, height, width] in [0, 1]"""
    values = {"x0": torch.zeros_like(noises[0])}
    values |= dict.fromkeys(manifest["packages"]["text_encoder"]["inputs"], tokens)

    def step(name):
        values.update(call(name, {k: values[k] for k in manifest["packages"][name]["inputs"]}))

    step("text_encoder")
    for t, noise in zip(manifest["timesteps"], noises):
        values |= {"x_t": (1 - t) * values["x0"] + t * noise, "t": torch.tensor([t])}
        for name in manifest["each_step"]:
            step(name)
    step("decoder")
    return values["video"]


def compare(manifest, call, modules, tokens, noises, reference):
    """-> dB of the packages' video against the reference; {package: how far its outputs were at most from its module's
    on the same inputs}; {package: seconds of each call}."""
    differences, seconds = dict.fromkeys(modules, 0.0), {name: [] for name in modules}

    def compared(name, inputs):
        start = time.perf_counter()
        try:
            results = call(name, inputs)
            if not all(x.isfinite().all() for x in results.values()):
                raise FloatingPointError("it gives what is not a number")
        except (NotImplementedError, FloatingPointError) as error:
            fail(f"{name} is not proven: {error}")
        seconds[name].append(time.perf_counter() - start)
        for k, expected in run(modules[name], inputs).items():
            differences[name] = max(differences[name], (results[k] - expected).abs().max().item())
        return results

    video = sample_packages(manifest, compared, tokens, noises)
    return -10 * (video - reference).square().mean().log10().item(), differences, seconds


def prove(args, dit, vae, student, tokens, folder):
    """Compares the packages in `folder` with the modules that they came from, and prints what they are.
    -> the figures for metrics.json"""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        modules = programs(dit, vae, student, len(manifest["each_step"]))
    except (OSError, ValueError, KeyError):
        fail(f"{folder} holds no finished export: `python export_coreml.py` makes one")
    saved = {name: read_program(folder / package["file"]) for name, package in manifest["packages"].items()}
    noises = torch.randn(len(manifest["timesteps"]), 1, *student["latent_shape"],
                         generator=torch.Generator().manual_seed(args.seed))
    reference = run(modules["decoder"], {"x0": sample_student(dit, noises, tokens)})["video"]
    psnr, differences, _ = compare(manifest, evaluator(manifest, saved), modules, tokens, noises, reference)
    metrics = {}
    for name, program in saved.items():
        size = sum(f.stat().st_size for f in (folder / f"{name}.mlpackage").rglob("*") if f.is_file())
        m = metrics[name] = dict(bytes=size, **measure(program), precision=16,
                                 weight_bits=WEIGHTS[manifest["weights"]], parity_max_abs=differences[name])
        print(f"{name}: {size / 1e6:.4g} MB, {m['ops']} operations, rank <= {m['max_rank']}, largest tensor "
              f"{m['largest_tensor_bytes'] / 1e6:.3g} MB, working set {m['working_set_bytes'] / 1e6:.3g} MB, at most "
              f"{differences[name]:.2g} from PyTorch")
        if m["max_rank"] > MAX_RANK:
            fail(f"{name} holds a tensor of {m['max_rank']} dimensions; Core ML takes {MAX_RANK}")
    metrics["decoder"]["video_psnr_db"] = psnr
    print(f"a video through the packages, in float16, is {psnr:.1f} dB from PyTorch's in float32")
    if psnr < 40 and manifest["weights"] == "float16":
        fail("that is below 40 dB: made from another model than this, or float16 does not hold it")
    for unit in ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL") if sys.platform == "darwin" else ():
        call = core_ml(manifest, folder, unit)
        psnr, differences, seconds = compare(manifest, call, modules, tokens, noises, reference)
        ms = 1000 * sum(np.median(seconds[name]) for name in manifest["each_step"])
        metrics["decoder"] |= {f"video_psnr_db_{unit.lower()}": psnr, f"ms_a_step_{unit.lower()}": ms}
        print(f"{unit}: {ms:.1f} ms a step, video {psnr:.1f} dB, from PyTorch at most "
              + ", ".join(f"{d:.2g} ({name})" for name, d in differences.items()))
    return metrics


# ------------------------------------------------------------------------------------------------- the command line


def random_student(preset, seed):
    """A preset's student as distill.py would leave it, but for the training. -> dit, checkpoint, vae."""
    torch.manual_seed(seed)
    clip, sizes, kept, caption = VAE_SIZES[preset], DIT_SIZES[preset], PRUNED_SIZES[preset], "a red circle moving left"
    (t, h, w), ratio, c, vocabulary = dims(clip["size"]), dims(clip["ratio"]), clip["latent_channels"], caption.split()
    dit = DiT(c, sizes["width"], kept["blocks"], kept["heads"], sizes["head_dim"], kept["ffn"], 6, text_tokens=5)
    for p in dit.parameters():
        if not p.any():  # what training starts at zero would leave the rest idle
            nn.init.normal_(p, std=0.02)
    vae = VAE(ratio, c, clip["width"], clip["res_blocks"])
    student = dict(latent_shape=[c, 1 + (t - 1) // ratio[0], h // ratio[1], w // ratio[2]], text_tokens=5,
                   latent_mean=torch.zeros(c), latent_std=torch.ones(c), vocabulary=["<pad>", *vocabulary],
                   embeddings=None, captions=[caption], timesteps=student_times(4).tolist())
    return dit.eval().requires_grad_(False), student, vae.eval().requires_grad_(False)


def check_flags(args, dit, student, vae):
    """One line for what cannot go together."""
    like = [name for name, sizes in DIT_SIZES.items() if all(dit.config[k] == sizes[k] for k in ("width", "head_dim"))]
    if like and args.preset not in like:
        fail(f"{args.model} is a model of preset {like[0]}, not {args.preset}: say --preset {like[0]}")
    if student["latent_shape"][0] != vae.config["latent_channels"]:
        fail(f"{args.model} has {student['latent_shape'][0]} latent channels and {args.vae} "
             f"{vae.config['latent_channels']}: they come from different runs")
    if args.chunks > len(dit.blocks):
        fail(f"--chunks {args.chunks}: the generator has {len(dit.blocks)} blocks, so {len(dit.blocks)} at most")
    if (ffn := dit.config["ffn"]) % args.ffn_tiles:
        near = min((n for n in range(1, ffn + 1) if ffn % n == 0), key=lambda n: abs(n - args.ffn_tiles))
        fail(f"--ffn-tiles {args.ffn_tiles} does not divide the FFN's {ffn} channels: {near} does")


@torch.no_grad()
def main(argv=None):
    p = parser(__doc__, PRESETS, computes=False)
    p.add_argument("--model", type=Path, help="the few-step student, from distill.py")
    p.add_argument("--vae", type=Path, help="the autoencoder, from vae.py")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for the packages and manifest.json")
    p.add_argument("--weights", choices=WEIGHTS, default="float16", help="how weights are stored (default: float16)")
    p.add_argument("--chunks", type=positive, default=1, help="packages that the generator is cut into (default: 1)")
    p.add_argument("--ffn-tiles", type=positive, default=1, help="slices of the FFN's hidden channels (default: 1)")
    p.add_argument("--attention-slices", type=positive, default=1, help="slices of attention's queries (default: 1)")
    p.add_argument("--random-weights", action="store_true", help="the preset's sizes untrained, without a checkpoint")
    p.add_argument("--check", action="store_true", help="export nothing: prove what is in --out")
    args = parse(p, PRESETS, argv, model="student.pt", vae="vae.pt", out="coreml")
    if ct is None:
        fail("coremltools is missing: pip install -r requirements.txt")
    if args.random_weights:
        dit, student, vae = random_student(args.preset, args.seed)
    else:
        (dit, student), vae = load_dit(args.model, "cpu", "student"), load_vae(args.vae, "cpu")
    check_flags(args, dit, student, vae)
    tokens, start = text_input(student, student["captions"][:1]), time.perf_counter()
    tokens = tokens if tokens.is_floating_point() else tokens.int()
    folder = args.out if args.check else args.out / "unfinished"
    try:
        if not args.check:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            export(args, dit, vae, student, tokens, folder)
        metrics = prove(args, dit, vae, student, tokens, folder)
        if not args.check:
            publish(folder, args.out)
    except OSError as error:
        fail(f"{args.out} cannot be used: {error}")
    finally:
        if not args.check:
            shutil.rmtree(folder, ignore_errors=True)
    record(args.run, "export", metrics)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    print(f"{args.out}: {'checked' if args.check else 'exported'} in {time.perf_counter() - start:.0f} s, with at most "
          f"{peak:.1f} GB of memory")


if __name__ == "__main__":
    script(main)

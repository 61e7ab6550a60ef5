"""Reads a saved Core ML package back from disk and runs it with torch.

Core ML itself runs on Apple's systems only. Here every operation is evaluated with torch, and every
result rounded to the type that the program declares (float16 between operations, and wider sums
inside one: our assumption). An operation that OPERATIONS does not know is an error, and so is an
overflow.
"""
import logging
import math

import numpy as np
import torch
import torch.nn.functional as F

try:
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of all that only a Mac has
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load as load_program
    from coremltools.converters.mil.mil.types import builtin_to_string
except ImportError:
    ct = None


def as_list(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


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
    for op, unused in schedule(program):
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
        for name in unused:
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
    for op, unused in schedule(program):
        cost["ops"] += 1
        for var in op.outputs:
            alive[var.name] = tensor_bytes(var)
            cost["max_rank"] = max(cost["max_rank"], len(var.shape))
            cost["largest_tensor_bytes"] = max(cost["largest_tensor_bytes"], tensor_bytes(var))
        working_set = sum(alive.values())
        if op.op_type == "scaled_dot_product_attention":
            working_set += 2 * math.prod(op.query.shape[:-1]) * op.key.shape[-2]
        cost["working_set_bytes"] = max(cost["working_set_bytes"], working_set)
        for name in unused:
            alive.pop(name, None)
    return cost

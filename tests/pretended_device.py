"""A pretended accelerator: tensors that say they are on the device `gpu:0` and compute on the CPU,
but refuse to be mixed with CPU tensors or read by NumPy and, as on a Mac, float64. What a GPU would
trip over shows without one, but for autocast, kernels, and `device.type == "cuda"`.

    python tests/pretended_device.py runs/pretended     # the chain at micro size

Uses private parts of torch 2.13."""
import collections
import sys
import warnings
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import sample  # noqa: E402
from common import training  # noqa: E402
from conftest import MICRO  # noqa: E402

WAITS = collections.Counter()  # how often the host waited for the device
COPIES = ("_to_copy", "copy_", "_copy_from", "_copy_from_and_resize")
INDEXING = ("index", "index_put_", "index_put", "_unsafe_index", "_index_put_impl_")


class OnDevice(torch.Tensor):
    """A tensor on the pretended device; `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("gpu", 0), requires_grad=requires_grad)
        wrapper.inner = inner.detach()
        return wrapper

    def __init__(self, *args, **kwargs):
        pass

    def tolist(self):
        WAITS["tolist"] += 1
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("NumPy cannot read a tensor on a device")

    __array__ = numpy
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


def is_ours(device):
    return device is not None and torch.device(device).type == "gpu"


def call(function, args, kwargs):
    """One operation, if a device could do it."""
    name = function._schema.name.split("::")[1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_device = [x for x in tensors if isinstance(x, OnDevice)]
    on_cpu = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim > 0]
    if name in ("_local_scalar_dense", "item", "equal", "is_nonzero"):
        WAITS[name] += 1
    if name == "_fused_sdp_choice":
        return 0
    if on_device and name in INDEXING and isinstance(args[0], OnDevice):
        on_cpu = [x for x in on_cpu if x.is_floating_point()]  # indices may be anywhere
    if on_device and on_cpu and name not in COPIES:
        raise RuntimeError(f"{function}: tensors on two devices")
    kwargs = dict(kwargs, pin_memory=False) if kwargs.get("pin_memory") else dict(kwargs)
    goes_to_device = bool(on_device)
    if kwargs.get("device") is not None:
        goes_to_device = is_ours(kwargs["device"])
        kwargs["device"] = torch.device("cpu")
    if name == "copy_":
        goes_to_device = isinstance(args[0], OnDevice)
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x,
                                        (args, kwargs))
    result = function(*inner_args, **inner_kwargs)
    if not goes_to_device:
        return result
    dtypes = {x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
    if torch.float64 in dtypes:
        raise TypeError(f"{function}: a Mac's GPU has no float64")
    result = tree_map_only(torch.Tensor, lambda x: x if isinstance(x, OnDevice) else OnDevice(x),
                           result)
    if function._schema.is_mutable or any(r.alias_info for r in function._schema.returns):
        return return_and_correct_aliasing(function, args, kwargs, result)
    return result


class Factories(TorchDispatchMode):
    """New tensors that are asked for on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_ours(kwargs.get("device")) or any(issubclass(t, OnDevice) for t in types):
            return call(function, args, kwargs)
        return function(*args, **kwargs)


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def _lazy_init(self):
        pass


def main():
    warnings.filterwarnings("ignore")
    backend_registration._setup_privateuseone_for_python_backend("gpu", Backend())
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    torch_save = torch.save
    torch.save = lambda x, file: torch_save(  # a wrapper cannot be pickled, what it holds can
        tree_map(lambda y: y.inner.clone() if isinstance(y, OnDevice) else y, x), file)
    waits = []  # (stage, waits so far) of every training step
    log = training.Loop.log

    def log_and_count(self, **values):
        waits.append((self.stage, sum(WAITS.values())))
        log(self, **values)

    training.Loop.log = log_and_count
    where = ["--run", sys.argv[1], "--device", "gpu:0", "--dtype", "float32"]
    with Factories():
        for stage_main, flags in MICRO.values():
            stage_main([*flags.split(), *where])
        few = ["--sampling-steps", "2"]
        sample.main(["--score", "4", *few, *where])
        sample.main(["--report", *few, *where])
        sample.main(["--prompt", "a red circle", "--out", f"{sys.argv[1]}/red.gif", *where])
    for (stage, before), (next_stage, after) in zip(waits, waits[1:]):
        if stage == next_stage and after > before:
            sys.exit(f"{stage}: the host waits for the device in a step")
    print("all stages ran on the device")


if __name__ == "__main__":
    main()

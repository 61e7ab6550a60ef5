"""Peak memory, seconds per step and the host's waits of every training loop, for gpu_day.sh.

    python tests/gpu_day.py FILE STEPS PRESET ...     # what stands in FILE is not measured again

Each script's own `main` runs, on random latents and untrained teachers, until its loop has done
STEPS steps. At the paper's sizes a batch is one clip, elsewhere the preset's. One wait for the
device is expected in each loop, for its losses; all others are too many.
"""
import contextlib
import gc
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import distill  # noqa: E402
import dit  # noqa: E402
import prune  # noqa: E402
import vae  # noqa: E402

ON_GPU = torch.cuda.is_available()
results = []  # of the script that runs now, one per loop
caught = []  # warnings


class Enough(Exception):
    """Ends a script's `main`: nothing after its loop is asked for."""


class ShortLoop(common.Loop):
    """Measures the second half of its steps, and is done where the real loop saves."""

    def __iter__(self):
        for step, batch in super().__iter__():
            if step == self.steps // 2:
                if ON_GPU:
                    torch.cuda.reset_peak_memory_stats()
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("warn")
                caught.clear()
                self.start = time.perf_counter()
            yield step, batch

    def save(self):
        peak = waits = "n/a"
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
            waits = sum("synchroniz" in str(warning.message) for warning in caught)
        steps = self.steps - self.steps // 2
        seconds = (time.perf_counter() - self.start) / steps
        results.append(f"{self.stage} {peak} GB, {seconds:.3f} s per step, {waits} waits in "
                       f"{steps} steps")
        if self.stage != "masks":  # the first of prune.py's two loops
            raise Enough


class DiT(dit.DiT):
    """Made on the GPU: a CPU takes many seconds for two billion random numbers."""

    def __init__(self, **config):
        with torch.device("cuda" if ON_GPU else "cpu"):
            super().__init__(**config)


class Noise(dit.Latents):
    """In place of a data set: eight clips. path: in a folder that is called as the preset."""

    def __init__(self, path):
        self.metadata = dit.planned_config(path.parent.name)
        self.metadata["vocabulary"] = range(self.metadata["vocabulary"])
        self.text_dim = self.metadata["text_dim"]
        self.prompts = torch.ones(1, self.metadata["text_tokens"]).long()
        if self.text_dim:
            self.prompts = torch.randn(*self.prompts.shape, self.text_dim)
        self.empty = dit.PAD
        self.caption_number = torch.zeros(8).long()
        shape = vae.PRESETS[path.parent.name]
        t, h, w = common.size(shape["size"])
        rt, rs, _ = common.size(shape["ratio"])
        self.latents = torch.randn(8, shape["latent_channels"], 1 + (t - 1) // rt, h // rs, w // rs)
        self.mean = 0
        self.std = 1
        self.train = range(8)
        self.pictures = range(8, 8)
        self.checksum = None


def untrained(path, device, *stages):
    """In place of load_dit."""
    preset = path.parent.name
    config = dit.planned_config(preset)
    if path.stem == "pruned":
        kept = prune.PRESETS[preset]
        config |= dict(depth=kept["blocks"], heads=kept["heads"], ffn=kept["ffn"])
    model = DiT(**config).to(device).eval().requires_grad_(False)
    return model, dict(settings=dict(latents_checksum=None))


def measure(script, argv):
    """-> what is to say of each loop."""
    results.clear()
    try:
        script.main(argv)
    except Enough:
        pass
    except torch.OutOfMemoryError:
        results.append("does not fit")
    except (Exception, SystemExit) as error:  # the others are measured all the same
        results.append(f"failed: {type(error).__name__} {str(error)[:200]}")
    gc.collect()
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
    return "; ".join(results)


def main():
    file, steps, *presets = sys.argv[1:]
    done = [line.split(":")[0] for line in Path(file).read_text().splitlines()]
    cases = [(script, preset) for preset in presets for script in (vae, dit, prune, distill)]
    for script, preset in cases:
        name = f"{script.__name__}.py --preset {preset} --dry-run"
        if name not in done:
            print(f"{name}:", flush=True)
            with contextlib.suppress(SystemExit):  # not every script has it
                script.main(["--preset", preset, "--dry-run"])

    for module in vae, dit, prune, distill:
        for name, ours in dict(Loop=ShortLoop, DiT=DiT, Latents=Noise, load_dit=untrained,
                               checksum=lambda tensors: None).items():
            if hasattr(module, name):
                setattr(module, name, ours)
    for script, preset in cases:
        argv = ["--preset", preset, "--run", f"{Path(file).parent}/measure/{preset}"]
        argv += ["--steps", steps]
        if script is prune:
            argv += ["--mask-steps", steps]
        if script is vae:
            argv += ["--clips", "8"]
        if preset in ("mobile", "server"):
            argv += ["--batch-size", "1"]
        for flags in [], ["--gradient-checkpointing"]:
            name = " ".join([f"{script.__name__}.py --preset {preset}", *flags])
            if name not in done and not (flags and preset == "toy"):  # it fits any GPU without
                print(f"{name}: {measure(script, argv + flags)}", flush=True)


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main()

"""A micro run of the whole chain, made once through the scripts' own command lines; the tests read
its files."""
import os
import signal
import subprocess
import sys
from pathlib import Path

# Models this small gain nothing from a second thread, and lose much where cores are shared. Said
# here, since it counts only before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

import distill  # noqa: E402
import dit  # noqa: E402
import prune  # noqa: E402
import sample  # noqa: E402
import vae  # noqa: E402
from common import data  # noqa: E402

torch.manual_seed(0)
torch.set_num_threads(1)
# A shell starts what runs in the background with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
data.TEST_CLIPS = 96  # every combination once, in place of 512 clips: seconds per run of vae.py

MICRO = {  # stage -> (its main, flags that make it tiny)
    "vae": (vae.main, "--size 5x16x16 --width 16 --latent-channels 8 --clips 96 --steps 6 "
                      "--batch-size 4"),
    "dit": (dit.main, "--width 32 --depth 3 --heads 4 --head-dim 16 --ffn 64 --steps 6 "
                      "--batch-size 8"),
    "prune": (prune.main, "--blocks 2 --heads 2 --ffn 48 --mask-steps 4 --steps 4 --batch-size 8"),
    "distill": (distill.main, "--frozen-blocks 1 --teacher-steps 2 --steps 4 --batch-size 8"),
}
MAKES = {  # stage -> its files, the model first
    "vae": ["vae.pt", "latents.pt"], "dit": ["dit.pt"], "prune": ["pruned.pt", "masks.pt"],
    "distill": ["student.pt", "discriminator.pt"]}


def folder_before(stage, micro_run, run):
    """-> run, with what the stages before this one made in micro_run."""
    run.mkdir(exist_ok=True)
    for earlier in list(MICRO)[:list(MICRO).index(stage)]:
        for name in MAKES[earlier]:
            os.link(micro_run / name, run / name)
    return run


def train(stage, run, *more):
    """Runs one stage as the command line would: run is the folder, more are further flags."""
    main, flags = MICRO[stage]
    main([*flags.split(), "--run", str(run), "--device", "cpu", "--dtype", "float32", *more])


class Code:
    """Unpickled without care, it makes a file."""

    def __reduce__(self):
        return open, ("was run", "w")


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for stage in MICRO:
        train(stage, run)
    return run


def evaluate(run, *flags):
    sample.main(["--run", str(run), "--sampling-steps", "2", "--device", "cpu", *flags])


@pytest.fixture(scope="session")
def scored_run(micro_run):
    evaluate(micro_run, "--score", "4")
    evaluate(micro_run, "--report")
    return micro_run


@pytest.fixture
def micro_dit():
    """A DiT of 3 blocks whose weights are all away from zero: nothing is equal by accident."""
    torch.manual_seed(0)
    model = dit.DiT(latent_channels=4, width=32, depth=3, heads=4, head_dim=16, ffn=64,
                    vocabulary=10, text_tokens=5)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def pretended_device(request, tmp_path_factory):
    """For test_device.py: started with the first test, since it takes a while."""
    if not any("test_device" in item.nodeid for item in request.session.items):
        yield
        return
    script = Path(__file__).parent / "pretended_device.py"
    run = tmp_path_factory.mktemp("pretended")
    process = subprocess.Popen([sys.executable, script, run], cwd=script.parent.parent, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield process
    process.kill()
    process.wait()

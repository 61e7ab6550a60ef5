"""What a GPU or a Mac would trip over, found without one."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_stage_runs_on_a_device_and_no_training_step_waits_for_it(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tests/pretended_device.py", tmp_path], cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("all stages ran on the device\n")

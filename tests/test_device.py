"""What a GPU or a Mac would trip over, found without one."""


def test_every_stage_runs_on_a_device_and_no_training_step_waits_for_it(pretended_device):
    told, _ = pretended_device.communicate()
    assert pretended_device.returncode == 0, told[-2000:]
    assert told.endswith("all stages ran on the device\n")

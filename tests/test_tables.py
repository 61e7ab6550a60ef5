"""The tables' rows are commands; each must be one that its script takes, and end where the table looks."""
import pytest
import tables

import distill
import dit
import prune
import sample
import vae

MAINS = {"vae.py": vae.main, "dit.py": dit.main, "prune.py": prune.main, "distill.py": distill.main,
         "sample.py": sample.main}
COMMANDS = sorted({command for _, rows in tables.TABLES.values() for commands in rows.values()
                   for command in ([commands] if isinstance(commands, str) else commands) if ".py" in command})


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("vae.py")])
def test_a_rows_command_lacks_nothing_but_its_files(command, tmp_path, capsys):
    script, *flags = command.split()
    with pytest.raises(SystemExit) as stop:
        MAINS[script]([*flags, "--run", str(tmp_path), "--device", "cpu"])
    assert stop.value.code == 2 and "is not there" in capsys.readouterr().err


def test_pruning_alone_and_together_leaves_as_many_parameters(micro_dit):
    """The seven rows that compare levels: within 4 % of each other, by the same count as the table's column."""
    sizes = {}
    for name, command in list(tables.TABLES["prune"][1].items())[:7]:
        words = command.split()
        flag = {k: int(words[words.index(f"--{k}") + 1]) if f"--{k}" in words else v
                for k, v in (("blocks", 7), ("heads", 8), ("ffn", 512))}
        config = micro_dit.config | dict(width=128, depth=flag["blocks"], heads=flag["heads"], ffn=flag["ffn"])
        sizes[name] = vae.count(dit.DiT(**config))
    assert max(sizes.values()) < 1.04 * min(sizes.values()), sizes


def test_a_cell_is_the_mean_and_the_spread_over_seeds():
    results = [{"score": {"color": x}} for x in (0.9, 1.0)]
    assert tables.cell(results, ("prune", "score"), "color", 100, 1) == "95.0 ± 7.1"
    assert tables.cell(results, ("score",), "shape", 100, 1) == ""


def test_the_picture_has_a_point_for_each_row_of_its_lines():
    rows = tables.TABLES["steps"][1]
    results = {name: [{"score": {"evaluations": 4, "text_alignment": 0.5}}] for name in rows}
    on_a_line = [name for name in rows if "trained" not in name]
    assert tables.against_evaluations(results).count("<circle") == len(on_a_line) == 12
    assert tables.against_evaluations(results).count('cx="122.0" cy="90.0"') == 12  # 2 of 6 doublings, half the height

"""The tables' rows are commands; each must be one that its script takes, and end where the table
looks."""
import importlib

import pytest
import tables

import dit
from common import training


def commands():
    found = set()
    for _, rows in tables.TABLES.values():
        for row in rows.values():
            found.update([row] if isinstance(row, str) else row)
    return sorted(command for command in found if ".py" in command)


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith("vae.py")])
def test_a_rows_command_lacks_nothing_but_its_files(command, tmp_path, capsys):
    script, *flags = command.split()
    main = importlib.import_module(script.removesuffix(".py")).main
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--run", str(tmp_path), "--device", "cpu"])
    assert stop.value.code == 2 and "there is no file" in capsys.readouterr().err


def test_pruning_alone_and_together_leaves_as_many_parameters(micro_dit):
    """The four rows that compare levels: within 4 % of each other."""
    params = []
    for command in list(tables.TABLES["prune"][1].values())[:4]:
        words = command.split()
        kept = {"--blocks": 7, "--heads": 8, "--ffn": 512}
        for flag in kept:
            if flag in words:
                kept[flag] = int(words[words.index(flag) + 1])
        depth, heads, ffn = kept.values()
        config = micro_dit.config | dict(width=128, depth=depth, heads=heads, ffn=ffn)
        params.append(training.count_parameters(dit.DiT(**config)))
    assert max(params) < 1.04 * min(params)


def test_a_cell_is_the_mean_and_the_spread_over_seeds():
    results = [{"score": {"color": share}} for share in (0.9, 1.0)]
    assert tables.cell(results, ("prune", "score"), "color", 100, 1) == "95.0 ± 7.1"
    assert tables.cell(results[:1], ("score",), "color", 100, 1) == "90.0"
    assert tables.cell(results, ("score",), "shape", 100, 1) == ""


def test_a_cell_of_docs_that_a_new_run_contradicts_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    said = "| | colour, % | shape, % |\n|---|---|---|\n| **A** | 90.0 ± 2.0 | 50.0 |\n"
    section = f"\n## Pruning\n\n    make table-prune\n\n{said}\nprose\n"
    (tmp_path / "docs" / "experiments.md").write_text(f"# Experiments\n{section}")
    for measured, differ in ("93.0 ± 2.0 | 50.0", 0), ("95.0 ± 2.0 | 50.1", 2):
        (tmp_path / "prune.md").write_text(said.replace("90.0 ± 2.0 | 50.0", measured))
        assert tables.check("prune", tmp_path) == differ
    told = capsys.readouterr().out
    assert "A / colour, %: 90.0 ± 2.0 in docs, 95.0 ± 2.0 here" in told


def test_the_picture_has_a_point_for_each_row_of_its_lines():
    rows = tables.TABLES["steps"][1]
    results = {name: [{"score": {"nfe": 4, "text_alignment": 0.5}}] for name in rows}
    picture = tables.against_nfe(results)
    assert picture.count("<circle") == len(rows) == 10
    assert picture.count('cx="122.0" cy="90.0"') == 10  # 2 of 6 doublings, half the height

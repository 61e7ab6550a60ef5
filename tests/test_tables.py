"""The tables' rows are commands; each must be one that its script takes, and end where the table
looks."""
import importlib
import json

import pictures
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


def test_a_cell_of_a_page_that_a_new_run_contradicts_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    for folder in "docs", "runs/tiny":
        (tmp_path / folder).mkdir(parents=True)
    said = "| | colour, % | shape, % |\n|---|---|---|\n| **A** | 90.0 ± 2.0 | 50.0 |\n"
    section = f"\n## Pruning\n\n    make table-prune\n\n{said}\nprose\n\n## More\n\n{said}"
    (tmp_path / "docs" / "experiments.md").write_text(f"# Experiments\n{section}")
    readme = "| | tiny: teacher | data |\n|---|---|---|\n| outline IoU, % | 92.7 | |\n"
    (tmp_path / "README.md").write_text(f"# A\n\n## Results\n\n{readme}")
    metrics = {"score": {"dit": {"outline_iou": 0.927}}}
    (tmp_path / "runs" / "tiny" / "metrics.json").write_text(json.dumps(metrics))
    for measured, differ in ("93.0 ± 2.0 | 50.0", 0), ("95.0 ± 2.0 | 50.1", 2):
        (tmp_path / "prune.md").write_text(said.replace("90.0 ± 2.0 | 50.0", measured))
        assert tables.check(tmp_path) == differ
    told = capsys.readouterr().out
    assert "A / colour, %: 90.0 ± 2.0 in docs/experiments.md, 95.0 ± 2.0 here" in told
    assert "README.md, Results: 1 cells, 0 differ, 0 have nothing" in told
    assert "More: 2 cells, 0 differ, 2 have nothing" in told
    metrics["score"]["dit"]["outline_iou"] = 0.93
    (tmp_path / "runs" / "tiny" / "metrics.json").write_text(json.dumps(metrics))
    assert tables.check(tmp_path) == 3


def test_the_curves_and_what_to_expect_are_drawn_of_a_run(micro_run, monkeypatch):
    assert pictures.curves(micro_run).count("<polyline") == 6
    trained = []
    monkeypatch.setattr(pictures, "DEMO", micro_run)
    monkeypatch.setattr(pictures, "trained", lambda command: trained.append(command) or micro_run)
    rows = pictures.expect()
    assert [len(row) for row in rows] == [4, 4, 4]
    assert len({cell.shape for row in rows for cell in row}) == 1
    assert len(trained) == 6 and all(" --steps " in command for command in trained)

"""The report and its pictures."""
import base64
import json
import re
import shutil

import imageio.v3 as iio
import pytest
import torch

import sample
from common import report as pages

def report(run):
    sample.main(["--run", str(run), "--report", "--sampling-steps", "3", "--device", "cpu"])
    return (run / "report.html").read_text()


def copy_run(source, run, leave_out=()):
    for file in source.iterdir():
        if file.suffix in (".pt", ".json") and file.name not in leave_out:
            shutil.copy(file, run)


def test_the_report_is_one_file_that_fetches_nothing(scored_run):
    page = (scored_run / "report.html").read_text()
    assert not re.search(r"<script|<link|@import|url\(|<iframe", page)
    assert set(re.findall(r"(?:src|href)=\"([^:]*):", page)) == {"data"}
    assert "Left out" not in page and "Not yet" not in page


def test_the_pictures_in_the_report_are_the_files_beside_it(scored_run):
    page = (scored_run / "report.html").read_text()
    pictures = re.findall(r'<img [^>]*src="data:image/(\w+);base64,([^"]+)"', page)
    assert [kind for kind, _ in pictures] == ["gif", "png"]
    for name, (_, data) in zip(("compare.gif", "path.png"), pictures):
        assert base64.b64decode(data) == (scored_run / name).read_bytes()
    frames = iio.imread(scored_run / "compare.gif", plugin="pillow")
    assert len(frames) == 5 and (frames[0] != frames[-1]).any()  # it moves
    assert frames.shape[2] == 5 * 164  # input, reconstruction, teacher, pruned, student


def test_nothing_from_a_file_reaches_the_page_unescaped(scored_run, tmp_path):
    copy_run(scored_run, tmp_path)
    evil = "<script>alert(1)</script>"
    checkpoint = torch.load(tmp_path / "dit.pt", weights_only=True)
    checkpoint["history"][evil] = [2.0, 1.0]
    torch.save(checkpoint, tmp_path / "dit.pt")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics[evil] = {evil: 1, "seconds": 1}
    metrics["score"]["dit"][evil] = 1
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = report(tmp_path)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 3


@pytest.mark.parametrize("gone", [
    ["masks.pt"], ["pruned.pt", "metrics.json"], ["dit.pt", "pruned.pt", "student.pt", "masks.pt"]],
    ids=" ".join)
def test_what_a_run_does_not_have_is_left_out_with_a_word(scored_run, tmp_path, gone):
    copy_run(scored_run, tmp_path, gone)
    page = report(tmp_path)
    left_out = re.search(r"Left out, since it is not there: (.*?)\.</p>", page)[1]
    order = ["dit.pt", "masks.pt", "pruned.pt", "student.pt"]
    assert left_out.split(", ") == [name for name in order if name in gone]
    assert ("Not yet" in page) == ("metrics.json" in gone)


def test_scores_of_a_model_that_was_trained_anew_are_called_stale(scored_run, tmp_path):
    copy_run(scored_run, tmp_path)
    assert "Stale" not in (scored_run / "report.html").read_text()
    checkpoint = torch.load(tmp_path / "student.pt", weights_only=True)
    checkpoint["model"]["x_embedder.bias"] += 1
    torch.save(checkpoint, tmp_path / "student.pt")
    assert "Stale, measured before it was trained anew: student;" in report(tmp_path)


def test_figures_have_three_digits_and_whole_numbers_all():
    assert [pages.digits(x) for x in (1.004, 91.97, 100.0, 12345)] == ["1.00", "92.0", "100",
                                                                     "12,345"]


def test_the_mask_map_fills_what_stays():
    masks = {"blocks": torch.tensor([1.0, 0]), "self_heads": torch.tensor([[1.0, 0, 1], [1, 1, 0]]),
             "cross_heads": torch.tensor([[0.0, 1, 1], [1, 1, 0]]), "ffn": torch.ones(2, 8)}
    masks["ffn"][0, :2] = 0
    stays, is_cut = pages.mask_map(masks).splitlines()
    assert stays.split() == ["block", "1", "■□■", "□■■", "FFN", "75%"]
    assert is_cut.split() == ["block", "2", "□□□", "□□□", "FFN", "0%"]  # whatever its heads say


def test_a_curve_falls_where_the_loss_falls():
    losses = [1 / (1 + step) for step in range(1000)]
    figure = pages.curve("a & b", losses)
    points = re.search(r'points="(.*?)"', figure)[1].split()
    x, y = zip(*[[float(number) for number in point.split(",")] for point in points])
    assert len(points) == 100 and 0 <= min(x) < max(x) <= 100 and 0 <= min(y) < max(y) <= 40
    assert list(x) == sorted(x) and list(y) == sorted(y)  # an SVG's y grows downwards
    assert "a &amp; b" in figure and "in 1000 steps" in figure

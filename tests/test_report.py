"""The report and its pictures, as a browser shows them."""
import base64
import json
import re
import shutil
import subprocess

import imageio.v3 as iio
import pytest
import torch

import sample
from common import report as pages

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
CHROMIUM_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                  "--disable-sync", "--disable-background-networking", "--disable-component-update",
                  "--allow-file-access-from-files", "--dump-dom"]
# What a browser makes of the report in a frame as wide as a phone, as JSON in the page's title.
LOOK = """onload = () => {
    const page = document.querySelector("iframe").contentDocument, root = page.documentElement
    const values = image => {
        const canvas = document.createElement("canvas").getContext("2d")
        canvas.drawImage(image, 0, 0)
        const w = image.naturalWidth, h = image.naturalHeight
        return new Set(canvas.getImageData(0, 0, w, h).data).size
    }
    const style = getComputedStyle(page.body)
    document.title = JSON.stringify({
        pixels: [...page.images].map(values), wide: root.scrollWidth, seen: root.clientWidth,
        svgs: [...page.querySelectorAll("svg")].map(s => s.getBoundingClientRect().height),
        page: style.backgroundColor, ink: style.color})
}"""


def report(run):
    sample.main(["--run", str(run), "--report", "--sampling-steps", "3", "--device", "cpu"])
    return (run / "report.html").read_text()


def copy_run(source, run, leave_out=()):
    for file in source.iterdir():
        if file.suffix in (".pt", ".json") and file.name not in leave_out:
            shutil.copy(file, run)


@pytest.fixture(scope="module")
def reported(micro_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("reported")
    copy_run(micro_run, run)
    sample.main(["--run", str(run), "--score", "4", "--sampling-steps", "2", "--device", "cpu"])
    report(run)
    return run


def test_the_report_is_one_file_that_fetches_nothing(reported):
    page = (reported / "report.html").read_text()
    assert not re.search(r"<script|<link|@import|url\(|<iframe", page)
    assert set(re.findall(r"(?:src|href)=\"([^:]*):", page)) == {"data"}
    assert "Left out" not in page and "Not yet" not in page


def test_the_pictures_in_the_report_are_the_files_beside_it(reported):
    page = (reported / "report.html").read_text()
    pictures = re.findall(r'<img [^>]*src="data:image/(\w+);base64,([^"]+)"', page)
    assert [kind for kind, _ in pictures] == ["gif", "png"]
    for name, (_, data) in zip(("compare.gif", "path.png"), pictures):
        assert base64.b64decode(data) == (reported / name).read_bytes()
    frames = iio.imread(reported / "compare.gif", plugin="pillow")
    assert len(frames) == 5 and (frames[0] != frames[-1]).any()  # it moves
    assert frames.shape[2] == 5 * 164  # input, reconstruction, teacher, pruned, student


def test_nothing_from_a_file_reaches_the_page_unescaped(reported, tmp_path):
    copy_run(reported, tmp_path)
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
def test_what_a_run_does_not_have_is_left_out_with_a_word(reported, tmp_path, gone):
    copy_run(reported, tmp_path, gone)
    page = report(tmp_path)
    left_out = re.search(r"Left out, since it is not there: (.*?)\.</p>", page)[1]
    order = ["dit.pt", "masks.pt", "pruned.pt", "student.pt"]
    assert left_out.split(", ") == [name for name in order if name in gone]
    assert ("Not yet" in page) == ("metrics.json" in gone)


def test_scores_of_a_model_that_was_trained_anew_are_called_stale(reported, tmp_path):
    copy_run(reported, tmp_path)
    assert "Stale" not in (reported / "report.html").read_text()
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


def test_the_student_keeps_the_steps_that_it_learned(reported):
    scores = json.loads((reported / "metrics.json").read_text())["score"]
    nfe = {stage: score["nfe"] for stage, score in scores.items()}
    assert nfe == {"dit": 4, "pruned": 4, "student": 4}  # two steps with guidance, four without


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: the report was not opened in a browser")
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_shows_its_pictures_and_nothing_is_wider_than_a_phone(reported, tmp_path, scheme):
    shutil.copy(reported / "report.html", tmp_path)
    frame = '<iframe src="report.html" style="width:380px;height:800px;border:0"></iframe>'
    phone = tmp_path / "phone.html"
    phone.write_text(f"{frame}<script>{LOOK}</script>")
    flags = [*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}",
             f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    dom = subprocess.run([CHROMIUM, *flags, phone.as_uri()], capture_output=True, text=True,
                         timeout=120).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert len(seen["pixels"]) == 2 and min(seen["pixels"]) > 4  # values: no blank picture
    assert seen["wide"] <= seen["seen"] <= 380
    assert len(seen["svgs"]) > 8 and min(seen["svgs"]) > 20

    def brightness(color):
        return sum(int(n) for n in re.findall(r"\d+", color)[:3])

    assert (brightness(seen["page"]) < brightness(seen["ink"])) == (scheme == "dark")

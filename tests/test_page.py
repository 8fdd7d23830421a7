"""The run's page: values, self-containment, resumption, atomic publication; pictures and charts."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from etude import plots
from etude.core.log import number
from etude.page import Page, picture_grid, terminal_picture
from etude.plots import bar_chart, drawable, line_chart, running_mean

VOID = {"meta", "img", "br", "input", "hr", "link"}


class Checker(HTMLParser):
    """Collects every tag, reference and text, and the tags that are left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.faults: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)


def parsed(page: Page) -> Checker:
    checker = Checker()
    checker.feed(page.write().read_text("utf-8"))
    checker.close()
    return checker


def digits(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


def fill(page: Page, first: bool = True, second: bool = True) -> None:
    """The calls of a job, in two halves as an interrupted job makes them."""
    if first:
        page.state("running", 512, 1024, 61, "training")
        page.chapter("train", "Train", order=10)
        page.grid("samples", "Samples", picture_grid(digits(4)), "one", "256 images", order=11)
        page.curve("loss", "Loss", {"loss": ([1, 2], [0.5, 0.25])}, "images", "loss", order=13)
    if second:
        page.grid("samples", "Samples", picture_grid(digits(4, 1)), "two", "512 images")
        page.pairs("nearest", "Nearest", digits(3), digits(3, 2), [1.0, 2.5, 0.125], order=12)
        page.curve("loss", "Loss", {"loss": ([1, 2, 3], [0.5, 0.25, 0.125])}, "images", "loss")
        bars = {"raw": [1.5, float("nan")], "EMA": [1.25, 0.75]}
        page.bars("levels", "Levels", ["0-1", "1-2"], bars, "time", "loss", order=14)
        page.table("result", "Result", ["set", "value"], [["a<b>", 0.93125], ["c", 12]], order=20)
        page.note("words", "<script>alert(1)</script>\n\nsecond", "Reading", order=21)


def test_the_page_is_well_formed_and_asks_nobody(tmp_path: Path) -> None:
    page = Page(tmp_path, "A & B", "sub")
    fill(page)
    checker = parsed(page)
    assert checker.faults == [] and checker.open == []
    assert all(r.startswith(("data:image/png;base64,", "#")) for r in checker.references)
    text = (tmp_path / "page.html").read_text()
    plain = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|@import|url\((?!#)|//[a-z]", plain)
    scripts = [tag for tag, _ in checker.tags if tag == "script"]
    assert len(scripts) == 1  # the note's markup is shown, not obeyed
    assert "<script>alert(1)</script>" in "".join(checker.texts)


def test_values_and_order_are_shown(tmp_path: Path) -> None:
    page = Page(tmp_path, "Title", "sub")
    fill(page)
    checker = parsed(page)
    text = " ".join(checker.texts)
    for value in ("512 of 1,024 images seen", "1 min 01 s", "0.125", "0.9313", "12", "a<b>", "two"):
        assert value in text, value
    parts = [attrs for tag, attrs in checker.tags if tag in ("section", "div")]
    ids = [attrs["id"] for attrs in parts if "id" in attrs]
    assert ids == ["train", "samples", "nearest", "loss", "levels", "result", "words"]
    assert any(a.get("style") == "width:50.0%" for _, a in checker.tags)


def test_pictures_on_the_page_are_the_pictures_given(tmp_path: Path) -> None:
    page = Page(tmp_path, "t")
    image = picture_grid(digits(4), columns=2)
    page.grid("samples", "Samples", image, "", "1 image")
    (source,) = [r for r in parsed(page).references if r.startswith("data:")]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    assert np.array_equal(shown, image)


def test_an_interrupted_job_continues_the_same_page(tmp_path: Path) -> None:
    straight = Page(tmp_path / "straight", "t", "s")
    fill(straight)
    fill(Page(tmp_path / "resumed", "t", "s"), second=False)
    again = Page(tmp_path / "resumed")
    fill(again)  # the resumed job draws its last grid again under the same label
    assert again.render() == straight.render()
    assert again.render().count('class="strip"') == 1


def test_a_running_page_reloads_itself_and_a_finished_one_does_not(tmp_path: Path) -> None:
    page = Page(tmp_path, "t")
    page.state("running")
    assert 'http-equiv="refresh"' in page.render()
    page.state("finished", 10, 10, 4000)
    assert 'http-equiv="refresh"' not in page.render()
    assert "1 h 06 min" in page.render()
    with pytest.raises(ValueError, match="status must be one of"):
        page.state("done")


def test_long_histories_show_the_first_and_the_newest(tmp_path: Path) -> None:
    page = Page(tmp_path, "t")
    for step in range(40):
        page.grid("g", "G", np.full((4, 4, 3), step, np.uint8), "", f"{step} images")
    checker = parsed(page)
    images = [a for tag, a in checker.tags if tag == "img"]
    assert len(images) == 12 and len(list((tmp_path / "page").glob("g.*.png"))) == 40
    text = " ".join(checker.texts)
    assert "39 images" in text and " 0 images" in f" {text}"


def test_publication_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page(tmp_path, "before")
    page.write()
    old = (tmp_path / "page.html").read_text()
    replace = os.replace

    def full_disk(source: Path, target: Path) -> None:
        if str(target).endswith("page.html"):
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr("etude.page.os.replace", full_disk)
    page.note("n", "after")
    with pytest.raises(OSError, match="no space"):
        page.write()
    assert (tmp_path / "page.html").read_text() == old


@pytest.mark.parametrize("id", ["", "Upper", "a b", "../x", "a--b", "head"])
def test_section_ids_cannot_leave_the_folder(tmp_path: Path, id: str) -> None:
    with pytest.raises(ValueError, match="section id"):
        Page(tmp_path, "t").note(id, "x")


def test_a_section_keeps_its_kind_and_rows_match_columns(tmp_path: Path) -> None:
    page = Page(tmp_path, "t")
    page.note("x", "y")
    with pytest.raises(ValueError, match="is a note, not a table"):
        page.table("x", "t", ["a"], [["1"]])
    with pytest.raises(ValueError, match="2 cells for 1 columns"):
        page.table("z", "t", ["a"], [["1", "2"]])


def test_a_part_emptied_by_a_power_cut_is_skipped(tmp_path: Path) -> None:
    page = Page(tmp_path, "t")
    page.note("a", "kept")
    page.note("b", "lost")
    (tmp_path / "page" / "b.json").write_text("")
    assert "kept" in page.render() and "lost" not in page.render()


# At each load: the count of votes, one vote for the left, the count again; at the end the result.
VOTER = """<script>
var kept = JSON.parse(sessionStorage.getItem('counts') || '[]');
function count() {return document.querySelector('.count').textContent}
var before = count();
document.querySelector('.left').click();
kept.push([before, count()]);
sessionStorage.setItem('counts', JSON.stringify(kept));
if (kept.length < LOADS) location.reload();
else {document.querySelector('.end').click(); document.body.dataset.counts = JSON.stringify(kept)}
</script></body>"""


def test_votes_outlast_new_makers(tmp_path: Path) -> None:
    """In a browser, whose page is another one at every reload."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    pages = []
    for turn, makers in enumerate(("ab", "abc", "cb", "abc")):
        page = Page(tmp_path / str(turn), "t")
        pictures = dict.fromkeys(makers, np.repeat(digits(2), 3, axis=3))
        page.vote("vote", "Vote", ["red", "blue"], pictures)
        pages.append(page.render().replace("</body>", VOTER))
    waiting = [text.replace("LOADS", str(len(pages))).encode() for text in pages]

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = waiting.pop(0) if self.path == "/page.html" else b""
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(found)

        def log_message(self, *said: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/page.html"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
        options += [f"--user-data-dir={tmp_path}/browser", "--dump-dom", address]
        shown = subprocess.run([browser, *options], capture_output=True, text=True, timeout=60)
        server.shutdown()
    counts = re.search(r'data-counts="([^"]*)"', shown.stdout)
    assert counts, shown.stderr
    # Two prompts are two votes a pair. The second vote is on b and c, so the third page has that
    # one alone, and the vote on a and b comes back with a.
    expected = [("0 of 2", "1 of 2"), ("1 of 6", "2 of 6"), ("1 of 2", "2 of 2")]
    expected.append(("3 of 6", "4 of 6"))
    found = json.loads(html.unescape(counts[1]))
    assert found == [[f"{count} votes" for count in pair] for pair in expected]
    file = re.search(r'href="data:application/json,([^"]*)"', shown.stdout)[1]
    votes = json.loads(unquote(file))
    asked = {(vote["prompt"], *sorted((vote["left"], vote["right"]))) for vote in votes}
    assert len(votes) == len(asked) == 4  # no round twice


def test_grid_places_every_picture() -> None:
    pictures = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (50, 100, 150)])
    grid = picture_grid(pictures, columns=2, scale=3, gap=2)
    assert grid.shape == (2 * 26 + 2, 2 * 26 + 2, 3)
    assert (grid[2:26, 2:26] == 50).all() and (grid[2:26, 28:52] == 100).all()
    assert (grid[28:52, 2:26] == 150).all()
    assert (grid[:2] == grid[0, 0]).all() and (grid[28:52, 28:52] == grid[0, 0]).all()


def test_tiny_pictures_grow_smoothly_and_large_ones_stay() -> None:
    step = np.zeros((1, 8, 8, 1), np.uint8)
    step[:, :, 4:] = 200
    row = picture_grid(step, gap=0)[32, :, 0].astype(int)
    assert len(row) == 64 and len(set(row[24:40])) > 6  # a ramp, not an edge
    large = np.arange(100 * 100 * 3, dtype=np.uint8).reshape(1, 100, 100, 3)
    assert np.array_equal(picture_grid(large, gap=0), large[0])


def test_terminal_picture_draws_the_pixels() -> None:
    image = np.zeros((4, 4), np.uint8)
    image[:2, 2:] = 255
    plain = terminal_picture(image, width=8, colour=False).split("\n")
    assert len(plain) == 4 and all(len(line) == 8 for line in plain)
    assert plain[0].endswith("@@") and plain[3] == " " * 8
    colour = terminal_picture(image, width=4, colour=True)
    assert colour.count("\n") == 1 and colour.count("\u2580") == 8
    cells = re.findall(r"38;2;(\d+);\d+;\d+;48;2;(\d+);", colour)
    assert [tuple(map(int, c)) for c in cells] == [(0, 0)] * 2 + [(255, 255)] * 2 + [(0, 0)] * 4


def test_a_redirected_terminal_gets_plain_ascii() -> None:
    assert terminal_picture(np.full((4, 4), 128, np.uint8)).isascii()


def curves(svg: str) -> list[np.ndarray]:
    """End points (n, 2) of the pieces of every curve, in the drawing's coordinates."""
    found = re.findall(r'<path d="([^"]+)" clip-path', svg)
    return [np.array(re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path), float) for path in found]


def test_a_line_is_drawn_where_its_values_are() -> None:
    (xy,) = (c for c in curves(line_chart({"a": ([0, 5, 9], [0, 5, 9])}, "x", "y")) if len(c) == 3)
    slopes = np.diff(xy[:, 1]) / np.diff(xy[:, 0])
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)  # straight
    assert xy[0, 1] > xy[2, 1] and xy[0, 0] < xy[2, 0]  # SVG's y grows downwards
    svg = line_chart({"a": ([0, 1, 2], [0.01, 0.1, 1.0])}, "x", "y", log=True)
    (log,) = (c for c in curves(svg) if len(c) == 3)
    assert np.allclose(log[1], (log[0] + log[2]) / 2, atol=0.01)
    assert "a  1" in svg  # the legend states the last value


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    x, y = drawable([0, 1, 2, 3], [1.0, float("nan"), -1.0, 2.0], log=True)
    assert x.tolist() == [0, 3] and y.tolist() == [1, 2]
    assert line_chart({"a": ([], [])}, "x", "y") == '<p class="empty">no values yet</p>'


def test_long_noisy_series_show_their_mean() -> None:
    noise = np.random.default_rng(0).normal(0, 1, 4000)
    x, y = drawable(np.arange(4000), 10 + noise, log=False)
    assert len(x) == 400 and y[0] == pytest.approx(10 + noise[:10].mean())
    mean = running_mean(y)
    assert mean[200] == pytest.approx(y[184:217].mean())
    assert np.std(mean) < 0.5 * np.std(y)


def test_bars_are_as_high_as_their_values() -> None:
    svg = bar_chart(["p", "q"], {"raw": [4.0, 2.0], "ema": [1.0, 3.0]}, "x", "y")
    heights = [np.ptp(c[:, 1]) for c in curves(svg) if len(c) == 4]
    assert np.array(heights) / heights[2] == pytest.approx([4, 2, 1, 3], rel=1e-3)
    whiskers = bar_chart(["p"], {"a": [2.0]}, "x", "y", {"a": [(1.0, 3.0)]})
    (whisker,) = (c for c in curves(whiskers) if len(c) == 2 and c[0, 0] == c[1, 0])
    (bar,) = (c for c in curves(whiskers) if len(c) == 4)
    assert np.ptp(whisker[:, 1]) == pytest.approx(np.ptp(bar[:, 1]), rel=1e-3)
    with pytest.raises(ValueError, match="1 values for 2 labels"):
        bar_chart(["p", "q"], {"raw": [1.0]}, "x", "y")


def test_a_chart_is_drawn_once_and_again_when_a_value_changes(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "_svg", lambda *given: drawn.append(given) or str(len(drawn)))
    values = np.linspace(0.1, 0.9, 5000)  # as long as a run's: no value may hide in the middle
    near = values.copy()
    near[2500] += 1e-12
    asked = [values, near, values.copy(), list(values), near]
    got = [line_chart({"a": (range(5000), y)}, "once", "y", id="one") for y in asked]
    assert got == ["1", "2", "1", "3", "2"] and len(drawn) == 3
    assert line_chart({"a": (range(5000), values)}, "once", "y", id="two") == "4"
    assert bar_chart(["p"], {"a": [2.0]}, "once", "y") == "5"


def test_charts_take_the_colours_of_the_page() -> None:
    svg = line_chart({"a": ([0, 1], [1, 2]), "b": ([0, 1], [2, 3])}, "x", "y")
    assert "var(--s1)" in svg and "var(--s2)" in svg and "var(--ink)" in svg
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) == set()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.012345, "0.01235"), (0.00001234, "1.2e-05"), (12345.6, "12,346"), (2e6, "2M")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text

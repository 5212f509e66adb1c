"""The figure names every line where it ends, the page holds all and loads nothing."""
import html.parser
import io
import itertools

import numpy as np
import pytest
import rich.console

from rl_jax.train import compare_page, curves
from tests.ends import tiny_comparison
from tests.train.test_curves import GRPO, IDLE, MINE, curve

FOUND = {"grpo": curve(GRPO), "idle": curve(IDLE), "<b>mine": curve(MINE, updates=4)}


class Reader(html.parser.HTMLParser):
    """Every tag with its attributes, and all text outside of the style."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("a <comparison>")
    comparison = tiny_comparison.comparison(recipes=dict.fromkeys(FOUND, tiny_comparison.RECIPE), seeds=2, steps=10)
    path = compare_page.write(workdir, comparison, FOUND)
    assert path == workdir / "compare.html" and (workdir / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert list(workdir.glob("*.unfinished")) == []
    return path.read_text()


def test_the_page_loads_nothing_and_shows_text_as_text(page):
    tags = Reader(page).tags
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in tags}
    assert [a["src"].split(",")[0] for tag, a in tags if tag == "img"] == ["data:image/png;base64"]
    policy, = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert all(name in next(a["alt"] for tag, a in tags if tag == "img") for name in FOUND)


def test_the_page_holds_the_table_and_says_what_the_errors_are(page):
    text = " ".join(" ".join(Reader(page).text).split())
    assert "<b>mine 0.750 ± 0.050 125 % +0.150 ± 0.050 3 500.0 ms 640 40" in text
    assert "10 steps of 8 answers for each recipe, 2 replicas" in text
    assert "± 1 standard error" in text and "No update was skipped" in text


def test_columns_that_say_nothing_are_left_out():
    rows = curves.table({"grpo": curve(GRPO), "idle": curve(IDLE)}, "grpo")
    heads, body = compare_page.cells(rows, "grpo")
    assert "updates" not in heads and "skipped" not in heads and len(body) == 2
    skipped = np.eye(10)[:, :2]
    rows = curves.table({"grpo": curve(GRPO, skipped=skipped), "mine": curve(MINE, updates=2)}, "grpo")
    heads, body = compare_page.cells(rows, "grpo")
    assert heads[-2:] == ["updates", "skipped"] and [line[-2:] for line in body] == [["20", "0"], ["10", "2"]]


def test_the_table_is_printed():
    console = rich.console.Console(width=100, file=io.StringIO())
    console.print(compare_page.printed(curves.table(FOUND, "grpo"), "grpo"))
    lines = console.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", "<b>mine", "grpo", "idle"]
    assert "0.600 ± 0.100" in lines[2] and "never" in lines[3]


def test_lines_bands_and_names():
    drawn = compare_page.figure(FOUND, "title")
    axes, = drawn.axes
    assert len(axes.lines) == len(axes.collections) == len(FOUND)
    assert sorted(text.get_text() for text in axes.texts) == sorted(FOUND)
    assert axes.get_xlabel() == "step" and "± 1 standard error" in axes.get_ylabel()
    assert axes.get_title("left") == "title"
    lowest = min(band.get_paths()[0].vertices[:, 1].min() for band in axes.collections)
    assert axes.get_ylim()[0] <= lowest


def test_many_recipes_are_told_apart_and_one_replica_has_no_band():
    many = {f"recipe_{i}": curve(np.array(MINE)[:, :1] + i / 100) for i in range(16)}
    axes, = compare_page.figure(many).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 16
    places = sorted(text.get_position()[1] for text in axes.texts)
    assert min(b - a for a, b in itertools.pairwise(places)) > 0.05
    assert "nothing is known of its error" in compare_page.legend(many, "recipe_0")


@pytest.mark.parametrize("heights, expected", [
    ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]),
    ([0.0, 0.0], [-0.5, 0.5]),
    ([0.0, 0.1, 5.0], [-0.45, 0.55, 5.0]),
    ([0.0, 0.9, 1.0, 1.1], [-0.75, 0.25, 1.25, 2.25]),
    ([3.0], [3.0])])
def test_names_that_would_touch_move_apart_around_their_mean(heights, expected):
    assert compare_page.spread(heights, 1.0) == pytest.approx(expected)

import re

import pytest
from PIL import Image

from edgeke.compare.page import write_page
from edgeke.compare.pictures import LARGEST, accuracy_picture, cost_picture
from edgeke.compare.rows import rank

EVIL = "</script><img src=x onerror=alert(1)>"


def values(spec):
    (found,) = spec["datasets"].values()
    return found


def without_scripts(page):
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


@pytest.fixture
def rankings(make_run):
    return rank([make_run(0.9 + 0.01 * seed, seed, kd__beta=b) for seed in (0, 1) for b in "01"])


def test_bars_reach_one_deviation_over_seeds(rankings):
    (row, *_) = rankings[0].rows
    spread = row.spread("validation/exit_1/accuracy")
    found = next(v for v in values(accuracy_picture(rankings[0])) if v["exit"] == "exit 1")
    assert found["setting"] == "1: kl, asynchronous, beta 0"
    assert found["x_low"] == pytest.approx(100 * (spread.mean - spread.std))
    assert found["x_high"] == pytest.approx(100 * (spread.mean + spread.std))
    assert found["seeds"] == 2


def test_dots_on_one_spot_share_their_ranks(rankings):
    found = values(cost_picture(rankings[0]))
    assert [(v["point"], v["ranks"]) for v in found] == [
        ("default", "1, 2"),
        ("max_degradation_0.03_delta_0.1", "1, 2"),
        ("default", ""),
        ("max_degradation_0.03_delta_0.1", ""),
    ]


def test_pictures_hold_the_best_rows_only(make_run):
    (ranking,) = rank([make_run(0.9, kd__beta=str(n)) for n in range(LARGEST + 5)])
    assert len({v["setting"] for v in values(accuracy_picture(ranking))}) == LARGEST


def test_runs_without_costs_have_no_cost_picture(make_run):
    (ranking,) = rank([make_run(metrics={"validation/exit_0/accuracy": 0.9})])
    assert cost_picture(ranking) is None


def test_the_page_needs_no_network_and_holds_names_as_text(make_run, tmp_path):
    rankings = rank([make_run(kd__distance=EVIL, profile=EVIL, machine=EVIL)])
    page = write_page(rankings, EVIL, tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text() == page
    assert EVIL not in page
    assert page.count("</script>") == 2, "the pictures' data and what draws them"
    assert not re.search(r"<script[^>]+src", page)
    assert not re.search(r"https?:|<(?:img|link|iframe)|@import|url\(", without_scripts(page))
    assert "default-src 'none'" in page


def test_the_page_is_drawn_in_a_browser_without_a_network(rankings, make_run, tmp_path, browse):
    evil = rank([make_run(profile=EVIL, kd__distance=EVIL, branchynet__order=EVIL)])
    path = tmp_path / "page.html"
    write_page([*rankings, *evil], "edgeke", path)
    seen = browse(path, "--dump-dom")
    assert "CONSOLE" not in seen.stderr, "the page asked for something, or a script failed"
    body = without_scripts(seen.stdout).split("<body")[1]
    places = re.split(r'<div id="picture-\d"', body)[1:]
    assert len(places) == 4
    for place in places:
        svg = place[: place.index("</svg>")]
        assert "<svg" in svg
        assert 'aria-roledescription="point"' in svg, "dots are drawn"
    assert "validation accuracy (%)" in places[0]
    assert "1: kl, asynchronous, beta 0" in places[0]
    assert "mean cost (% of the plain network's MACs)" in places[1]
    assert "<td>90.5 ± 0.7</td>" in body
    assert "<h2>digits</h2>" in body
    assert "<img" not in body


def test_the_page_looks_like_something(rankings, tmp_path, browse):
    write_page(rankings, "edgeke", tmp_path / "page.html")
    picture = tmp_path / "page.png"
    browse(tmp_path / "page.html", f"--screenshot={picture}")
    with Image.open(picture) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 20)}
    for dot in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):  # the first two exits
        assert colours.get(dot, 0) > 50

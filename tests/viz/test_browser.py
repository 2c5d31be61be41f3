"""The page in a browser: what a person clicks and types. Needs the package playwright and Chromium
(`playwright install chromium`, or one on PATH).
"""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from treg.viz import PairView, Side, write_page

pytestmark = pytest.mark.browser
COUNT = 60
# a formula in a spreadsheet, and text that must stay text
NASTY = "=1+1 <script>document.title='owned'</script> \u202e \ud800 " + "x" * 5000


def sides(rng, n):
    pieces = [f" word{int(i)}" for i in rng.integers(0, 30, 8)]
    rewards = rng.normal(0.003, 0.004, 8)
    implicit = rng.normal(0, 0.1, 8)
    marked = [int(np.argmin(rewards))]
    return Side([*pieces, "<end>"], [*rewards, 0.0], [*implicit, 0.01], [8], marked)


def made_pairs():
    rng = np.random.default_rng(0)
    found = []
    for n in range(COUNT):
        prompt = f"<s>user\nquestion {n}{' Paris' if n % 7 == 0 else ''}<s>assistant\n"
        template = ["<s>assistant\n", "<s>user\n"]
        if n == COUNT - 1:
            prompt = NASTY
        chosen, rejected = sides(rng, n), sides(rng, n)
        if n == 0:
            chosen = replace(chosen, others={0: "a user's turn", 9: "and another"})
        pair = PairView(f"f:{n + 1}", prompt, chosen, rejected, template=template)
        found.append(pair)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pytest.importorskip("jinja2")
    path = tmp_path_factory.mktemp("browser") / "page.html"
    shift = {"shift/good": 0.1, "shift/bad": -2.0}
    history = {"run": [{"step": s, "loss": 1 / s, **shift} for s in (1, 2, 3)]}
    write_page(path, made_pairs(), title="t", settings={}, history=history, truth="made up")
    return path


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, path):
    """Calls: (hash, width) -> the page, whose script must not fail."""
    errors, contexts = [], []

    def open_(hash_="", width=1400, scheme="light"):
        size = {"width": width, "height": 844}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on("request", lambda request: errors.append(request.url))
        errors.clear()
        page.goto(f"{path.as_uri()}#{hash_}")
        return page

    yield open_
    for context in contexts:
        context.close()
    # the page itself and what it saves are all that is asked for
    assert not [x for x in errors if not x.startswith(("file:", "blob:"))]


def rows(page):
    """The numbers of the pairs on show, in order."""
    return [
        int(x[4:]) - 1 for x in page.eval_on_selector_all("#pairs tbody", "l => l.map(x => x.id)")
    ]


def text_of(download):
    return Path(download.value.path()).read_bytes().decode()


def data_of(page):
    return page.evaluate("data.pairs")


def test_search_filter_and_sort_are_kept_in_the_address(opened):
    page = opened("view=pairs")
    data = data_of(page)
    assert rows(page) == list(range(25))
    page.fill("#q", "paris")
    page.locator("#count", has_text="9 of 60 pairs").wait_for()
    assert rows(page) == list(range(0, COUNT - 1, 7))
    page.click("#filters")
    page.fill("input[name='margin.1']", "0")
    page.select_option("#sort", "-gap")
    want = [n for n in range(0, COUNT - 1, 7) if data[n]["margin"] <= 0]
    want.sort(key=lambda n: -data[n]["gap"])
    assert 0 < len(want) < 9 and rows(page) == want
    page.click(f"#row-{want[0] + 1} .row button")
    again = opened(page.url.partition("#")[2])
    assert rows(again) == want
    assert again.is_visible(f"#row-{want[0] + 1} section.chosen")
    assert again.input_value("#q") == "paris" and again.input_value("input[name='margin.1']") == "0"


def test_export_has_the_shown_pairs(opened):
    page = opened("view=pairs&gap=:0&sort=gap")
    data, pairs = data_of(page), made_pairs()
    want = sorted((n for n in range(COUNT) if data[n]["gap"] <= 0), key=lambda n: data[n]["gap"])
    files = {}
    for kind in ("csv", "jsonl"):
        with page.expect_download() as download:
            page.click(f"#{kind}")
        files[kind] = text_of(download)
    table = list(csv.DictReader(io.StringIO(files["csv"])))
    listed = [json.loads(line) for line in files["jsonl"].splitlines()]
    assert [int(x["pair"]) - 1 for x in table] == [x["pair"] - 1 for x in listed] == want
    for row, line, n in zip(table, listed, want, strict=True):
        assert float(row["margin"]) == line["margin"] == data[n]["margin"]
        assert row["chosen"] == "".join(pairs[n].chosen.pieces)
        assert line["rejected"]["tokens"] == pairs[n].rejected.pieces
        assert line["rejected"]["rewards"] == pytest.approx(pairs[n].rejected.rewards, rel=1e-4)


def test_a_formula_is_exported_as_text(opened):
    page = opened("view=pairs&q=x%20script")
    with page.expect_download() as download:
        page.click("#csv")
    (row,) = csv.DictReader(io.StringIO(text_of(download)))
    assert row["prompt"].startswith("'=1+1 <script>")


def test_small_rewards_have_colours_and_the_reader_sets_the_scale(opened):
    page = opened("pair-1&scale=0.01")
    side = made_pairs()[0].chosen
    shown = page.eval_on_selector_all(
        "section.chosen .tok", "l => l.map(x => [x.style.getPropertyValue('--v'), x.className])"
    )
    for (v, name), reward in zip(shown, side.rewards, strict=True):
        assert float(v) == pytest.approx(min(abs(reward) / 0.01, 1), abs=6e-4)
        assert ("up" in name, "down" in name) == (reward > 0, reward < 0)
    ground = page.eval_on_selector_all(
        "section.chosen .tok", "l => l.map(x => getComputedStyle(x).backgroundColor)"
    )
    assert len(set(ground[:8])) == 8 and ground[8] == "rgba(0, 0, 0, 0)"  # the last reward is 0
    page.fill("#limit", "0.02")
    ends = page.eval_on_selector_all("#legend span", "l => l.map(x => x.textContent)")
    assert ends == ["−0.02", "−0.01", "0", "0.01", "0.02"] and "scale=0.02" in page.url
    marked = page.eval_on_selector_all(
        "section.chosen .tok", "l => l.flatMap((x, t) => x.classList.contains('marked') ? [t] : [])"
    )
    assert marked == list(side.marked)


def test_the_template_is_folded_and_opens(opened):
    page = opened("pair-1")
    ask = page.locator("#row-1 .ask")
    assert ask.locator(".folded:visible").count() == 0
    assert [x.strip() for x in ask.locator(".fold").all_inner_texts()] == ["user", "assistant"]
    ask.locator(".fold").first.click()
    assert ask.locator(".folded:visible").all_inner_texts() == ["<s>user↵\n"]


def test_what_is_used_stays_in_view(opened):
    for width in (1400, 390):
        page = opened("view=pairs", width)
        page.evaluate("scrollTo(0, 1200)")
        assert page.evaluate("scrollY") > 500
        for selector in ("#q", "#filters", "#sort", "#legend", "#pairs thead th"):
            box = page.locator(selector).first.bounding_box()
            assert 0 <= box["y"] < 0.35 * 844, (width, selector)


@pytest.mark.parametrize("view", ["overview", "tokens", "pairs&pair-60", "training"])
def test_no_view_is_wider_than_a_phone(opened, view):
    page = opened(f"view={view}", 390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_everything_can_be_reached_by_keys(opened):
    page = opened("view=overview")
    page.focus("#tab-overview")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-pairs"
    page.focus("#row-2 .row button")
    page.keyboard.press("Enter")
    page.focus("#row-2 section.chosen .text")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    side = made_pairs()[1].chosen
    tip = page.inner_text("#tip")
    assert side.pieces[1].strip() in tip and "token\n2 of 9" in tip
    assert f"{side.rewards[1]:+.4f}".replace("-", "−") in tip


def test_a_token_that_stands_out_opens_its_pair(opened):
    page = opened("view=tokens&list=lowest")
    data = data_of(page)
    lowest = min(
        (reward, n, s, t)
        for n, pair in enumerate(data)
        for s, side in enumerate(("chosen", "rejected"))
        for t, reward in enumerate(pair[side]["rewards"])
    )
    page.click("#found li:first-child button")
    _, n, s, t = lowest
    place = f"#row-{n + 1} section.{('chosen', 'rejected')[s]} .text > :nth-child({t + 1})"
    assert page.locator(place).get_attribute("class").endswith("found")


def test_what_is_not_scored_is_shown_without_numbers(opened):
    page = opened("view=pairs&pair=1")
    others = page.locator("#pairs tbody .text .other")
    assert others.count() == 2
    text = others.first.locator("..")
    assert text.inner_text().startswith("a user's turn")
    assert text.locator(".tok").count() == 9


def test_hostile_text_stays_text(opened):
    page = opened(f"pair-{COUNT}", 390, "dark")
    assert page.title() == "t"
    assert page.locator(f"#row-{COUNT} .ask script").count() == 0
    shown = page.inner_text(f"#row-{COUNT} .ask")
    assert "<script>document.title='owned'</script> ⟨U+202E⟩ ⟨U+D800⟩" in shown

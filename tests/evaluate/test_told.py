"""What is said of an evaluation, and its pictures."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("sklearn")

from treg.evaluate.evaluation import evaluate_scores
from treg.evaluate.scored import Scored, ScoredAnswer
from treg.evaluate.told import MOST_LABELS, aligned, conclusions, head_lines, label_table, table


def scored(documents=30, *, wrong=True, pairs=False, steps=False, labels=None):
    """Answers of ten tokens: "good" is lower on wrong tokens, "bad" higher, "none" is noise."""
    rng = np.random.default_rng(0)
    found = []
    for d in range(documents):
        for better in (True, False) if pairs else (None,):
            mask = np.zeros(10, bool)
            if wrong:
                mask[3 + d % 4 : 5 + d % 4] = True
            noise = rng.normal(size=(3, 10))
            shift = 0.0 if better is None else 2.0 * better
            scores = {
                "good": noise[0] - 2 * mask + shift,
                "bad": noise[1] + 2 * mask - shift,
                "none": noise[2],
            }
            more = {"pair": f"p{d}", "preferred": better} if pairs else {}
            if steps:
                more |= {"steps": np.arange(10) // 2, "first_wrong": (3 + d % 4) // 2}
            marks = {f"type {k}": mask & (d % labels == k) for k in range(labels or 0)}
            none = np.zeros(10, bool)
            found.append(ScoredAnswer(f"d{d}", scores, mask, none, marks, **more))
    return Scored(found)


def test_tables():
    found = evaluate_scores(scored(pairs=True, steps=True), ["none"], draws=200)
    head, chance = head_lines(found)
    assert head == (
        "60 answers of 30 documents, 600 judged tokens, 120 of them wrong: base rate 0.200"
    )
    assert chance == "first error: a step at random is right in 0.200"
    titles, good, _, baselines, none = table(found)
    assert re.split(r"  +", titles.strip()) == [
        *("AUROC", "avg. precision", "sign agreement", "zeros", "within document"),
        *("pairs, by sum", "by mean", "first error"),
    ]
    assert re.match(r"good +0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] +0\.\d{3} ", good)
    assert baselines == "baselines:" and none.startswith("  none ")
    assert len({len(titles), len(good), len(none)}) == 1


def test_columns_that_the_data_cannot_give_are_left_out():
    found = evaluate_scores(scored(wrong=False, pairs=True), ["none"], draws=50)
    assert found.headline == "pair_accuracy" and found.base_rate == 0
    assert head_lines(found) == ["60 answers of 30 documents, 600 judged tokens"]
    assert re.split(r"  +", table(found)[0].strip()) == ["zeros", "pairs, by sum", "by mean"]
    assert label_table(found) == []
    found = evaluate_scores(scored(wrong=False), draws=5)
    assert found.headline is None
    assert "These marks give no measure that ranks scores" in conclusions(found)[0]


def test_conclusions():
    found = evaluate_scores(scored(), ["none"], draws=300)
    said = conclusions(found)
    assert re.match(r"The best baseline is none: AUROC 0\.\d+ \[", said[0])
    assert said[1].startswith("good is above the best baseline: the difference is +0.")
    assert said[2].startswith("bad is not above the best baseline: the difference is -0.")
    assert "is below 0.5: turned round it would be the better score" in said[3]
    assert len(said) == 4
    found = evaluate_scores(scored(), ["good"], draws=300)
    said = conclusions(found)
    assert "holds 0.5: it is not told apart from chance here." in said[-1]
    assert said[-1].startswith("none: the interval of its AUROC, 0.")


def test_a_small_advantage_is_not_shown():
    """Two scores that know nothing: the one is above the other by chance."""
    rng = np.random.default_rng(3)
    answers = []
    for d in range(40):
        mask = rng.random(20) < 0.3
        scores = {"a": rng.normal(size=20), "b": rng.normal(size=20)}
        answers.append(ScoredAnswer(f"d{d}", scores, mask, np.zeros(20, bool)))
    values = evaluate_scores(Scored(answers), draws=0).results
    first, second = sorted(values, key=lambda x: x.measures["auroc"].value)
    said = conclusions(evaluate_scores(Scored(answers), [first.name], draws=300))
    assert f"{second.name} is not shown to be above the best baseline" in " ".join(said)


def test_without_intervals():
    """One document, or no draws: values alone, and it is said."""
    for given, draws, why in (
        (scored(1), 100, "an interval needs more documents"),
        (scored(), 0, "no draws were asked for"),
    ):
        found = evaluate_scores(given, ["none"], draws=draws)
        assert all(x.measures["auroc"].low is None for x in found.results)
        said = " ".join(conclusions(found))
        assert "without an interval" in said and why in said
        assert "[" not in " ".join(table(found))


def test_first_errors_are_held_against_their_own_chance():
    given = scored(60, steps=True)
    found = evaluate_scores(given, ["none"], draws=300)
    (good, *_) = found.results
    assert found.chance == pytest.approx(0.2)
    value = good.measures["first_error"]
    assert value.value > 0.4 and value.low <= value.value <= value.high


def test_labels():
    found = evaluate_scores(scored(labels=3), ["none"], draws=100)
    title, titles, *rows = label_table(found)
    assert title == "AUROC by error type; *: the interval does not hold 0.5"
    assert titles.split() == ["tokens", "documents", "good", "bad", "none"]
    assert re.match(r"type 0 +20 +10 +0\.\d{3}\* +0\.\d{3}\* +0\.\d{3}", rows[0])
    assert {x: (y.tokens, y.documents) for x, y in found.labels.items()} == {
        f"type {k}": (20, 10) for k in range(3)
    }
    many = evaluate_scores(scored(60, labels=MOST_LABELS + 5), draws=0)
    assert label_table(many)[-1] == "and 5 more, which --json has"


def test_everything_goes_into_json():
    found = evaluate_scores(scored(labels=2, steps=True, pairs=True), ["none"], draws=20)
    again = json.loads(json.dumps(found.stored(), allow_nan=False))
    assert again["best"] == "none" and again["headline"] == "auroc"
    (good, *_) = again["results"]
    assert good["measures"].keys() >= {"auroc", "sign_agreement", "pair_accuracy", "first_error"}
    assert not any(x.startswith("bin") or x == "chance" for x in good["measures"])
    assert len(good["calibration"]) == 10 and good["labels"]["type 1"]["value"] > 0.8
    assert sum(x["tokens"] for x in good["calibration"]) == again["tokens"] == 600
    shares = [x["wrong"]["value"] for x in good["calibration"]]
    assert shares[0] > 0.7 > 0.05 > shares[-1]


def test_lines_are_aligned():
    rows = [["", "aa", "b"], ["x:"], ["long name", "1", "2222"]]
    assert aligned(rows) == ["           aa     b", "x:", "long name   1  2222"]


@pytest.mark.parametrize("more", [{"labels": 2}, {"wrong": False, "pairs": True}])
def test_pictures(more, tmp_path):
    pytest.importorskip("matplotlib")
    from treg.viz.credit_plots import plot_credit

    given = scored(8, **more)
    found = evaluate_scores(given, ["none"], draws=20)
    paths = [tmp_path / f"a.{kind}" for kind in ("svg", "png", "html")]
    for path in paths:
        plot_credit(found, given, path, title="marks <1>", lines=["AUROC < 1"])
    svg, html = paths[0].read_text(), paths[2].read_text()
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    for text in (svg, html):
        assert "good" in text and ("share of wrong tokens" in text) == bool(found.wrong)
    assert "<h1>marks &lt;1&gt;</h1><pre>AUROC &lt; 1</pre>" in html
    assert not re.search(r'(?:src|href)="(?!#)', html)
    plot_credit(found, given, tmp_path / "b.svg", title="")
    assert (tmp_path / "b.svg").read_text() == svg  # the same bits again
    with pytest.raises(ValueError, match=r"plots: expected a path that ends in .svg, .png, .html"):
        plot_credit(found, given, tmp_path / "a.pdf", title="")

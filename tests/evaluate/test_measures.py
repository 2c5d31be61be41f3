"""Measures against numbers by hand, and against scikit-learn on random scores with ties."""

import warnings

import numpy as np
import pytest

from treg.evaluate import auroc, evaluate_scores
from treg.evaluate.bootstrap import bootstrap, interval
from treg.evaluate.measures import auroc_by_group
from treg.evaluate.ranking import Ranking
from treg.evaluate.scored import Scored, ScoredAnswer, in_half
from treg.evaluate.shares import first_error, shares_of

metrics = pytest.importorskip("sklearn.metrics")


def answer(values, wrong, document="d", **more):
    """One answer with the score "r"; wrong and right: numbers of tokens."""
    count = len(values)
    marks = {
        name: np.isin(np.arange(count), more.pop(name, given))
        for name, given in (("wrong", wrong), ("right", ()))
    }
    labels = {k: np.isin(np.arange(count), v) for k, v in more.pop("labels", {}).items()}
    if "steps" in more:
        more["steps"] = np.array(more["steps"])
    scores = {"r": np.array(values, dtype=float)}
    return ScoredAnswer(document, scores, labels=labels, **marks, **more)


def values_of(scored, **more):
    """The shares of the score "r", by name."""
    shares, _ = shares_of(scored, "r", **more)
    return dict(zip(shares.names, shares(np.ones(len(scored.documents))), strict=True))


# -- by hand


def test_signs():
    """Wrong: -1, 0, 2; others: 1, -3, 0, 4, 5."""
    found = values_of(Scored([answer([-1, 0, 2, 1, -3, 0, 4, 5], [0, 1, 2])]))
    assert found["wrong_negative"] == pytest.approx(1 / 3)
    assert found["other_positive"] == pytest.approx(3 / 5)
    assert found["zeros"] == pytest.approx(2 / 8)


def test_signs_of_tokens_that_are_marked_as_right():
    """Where any token is marked as right, those that are not marked do not count."""
    found = values_of(Scored([answer([-1, 5, -2, 3], [0], right=[2, 3]), answer([-9], [])]))
    assert found["wrong_negative"] == 1
    assert found["other_positive"] == pytest.approx(1 / 2)


def test_within_documents():
    """A score that knows the bad document alone: 1/2 in each, far above it over all."""
    bad, good = [-5, -5, -5], [3, 3, 3]
    scored = Scored([answer(bad, [0], "bad"), answer(good, [1], "good"), answer(good, [], "c")])
    assert values_of(scored)["within_document"] == 0.5
    scored = Scored([answer([-6, -5, -7], [0], "bad"), answer(good, [], "good")])
    assert values_of(scored)["within_document"] == 0.5  # above one of two


def test_within_a_document_of_two_answers():
    scored = Scored([answer([1, 2], [0], "x"), answer([0, 3], [], "x")])
    assert values_of(scored)["within_document"] == pytest.approx(2 / 3)


def test_pairs():
    """By the sum: right, wrong, equal; by the mean: right, right, right."""
    pairs = {
        "a": ([1, 2], [1, 1]),  # sums 3 and 2, means 1.5 and 1
        "b": ([1], [0.5, 0.75]),  # sums 1 and 1.25, means 1 and 0.625
        "c": ([2], [1, 1]),  # sums 2 and 2, means 2 and 1
    }
    answers = []
    for name, both in pairs.items():
        for values, preferred in zip(both, (True, False), strict=True):
            answers.append(answer(values, [], name, pair=name, preferred=preferred))
    answers.append(answer([1], [], "alone", pair="alone", preferred=True))
    answers.append(answer([1], [], "unsaid", pair="a"))
    found = values_of(Scored(answers))
    assert found["pair_accuracy"] == pytest.approx(1.5 / 3)
    assert found["pair_accuracy_by_mean"] == 1


def test_what_ends_an_answer_is_a_part_of_its_sum():
    better = answer([1, 1], [], pair="a", preferred=True)
    worse = answer([3, 3], [], pair="a", preferred=False, ends={"r": -5.0})
    assert values_of(Scored([better, worse]))["pair_accuracy"] == 1
    assert values_of(Scored([better, worse]))["pair_accuracy_by_mean"] == 0


def test_first_errors():
    steps = [0, 0, 1, 1, 2, -1]
    values = [1, 2, 0, 5, 1, -9]  # lowest by step: 1, 0, 1; means 1.5, 2.5, 1; sums 3, 5, 1
    right = answer(values, [2, 3], "a", steps=steps, first_wrong=1)
    assert first_error(right, "r") == (1, pytest.approx(1 / 3))
    assert first_error(right, "r", np.mean)[0] == 0
    late = answer(values, [4], "b", steps=steps, first_wrong=2)
    assert first_error(late, "r")[0] == 0
    assert first_error(late, "r", np.mean)[0] == first_error(late, "r", np.sum)[0] == 1
    fine = answer(values, [], "c", steps=steps)
    cut = answer(values, [], "d", steps=steps, first_wrong=3)
    assert first_error(fine, "r") is None and first_error(cut, "r") is None
    scored = Scored([right, late, fine, cut, answer([1, 2], [0], "e")])
    assert values_of(scored)["first_error"] == 0.5
    assert values_of(scored, step_score="mean")["first_error"] == 0.5
    assert values_of(scored)["chance"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="step_score: expected one of min, mean, sum, got 'max'"):
        values_of(scored, step_score="max")


def test_steps_that_are_equally_low_share_the_point():
    """A score that is the same everywhere is as good as chance."""
    same = answer([1] * 6, [2], steps=[0, 0, 1, 1, 2, 2], first_wrong=1)
    assert first_error(same, "r") == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_calibration():
    """20 different scores, the four lowest of them wrong: two a bin."""
    shares, bins = shares_of(Scored([answer(np.arange(20), [0, 1, 2, 3])]), "r")
    found = dict(zip(shares.names, shares(np.ones(1)), strict=True))
    assert [found[f"bin{k}"] for k in range(10)] == [1, 1, *[0] * 8]
    assert bins.tokens == (2,) * 10
    assert bins.low == tuple(range(0, 20, 2)) and bins.high == tuple(range(1, 20, 2))


def test_calibration_of_scores_that_are_mostly_equal():
    values = [0] * 90 + list(range(1, 11))
    shares, bins = shares_of(Scored([answer(values, [0, 95])]), "r")
    found = dict(zip(shares.names, shares(np.ones(1)), strict=True))
    assert bins.tokens[0] == 90 and sum(bins.tokens) == 100 and min(bins.tokens) > 0
    assert found["bin0"] == pytest.approx(1 / 90)


# -- scikit-learn


def quiet_roc_auc(wrong, finds, weights=None):
    """NaN where there is one kind of tokens alone, also by weight."""
    seen = wrong if weights is None else wrong[weights > 0]
    if seen.all() or not seen.any():
        return np.nan
    return metrics.roc_auc_score(wrong, finds, sample_weight=weights)


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_ranking_is_that_of_scikit_learn(levels, seed):
    """Ties, weights of 0, and a document that is drawn several times."""
    rng = np.random.default_rng([seed, levels])
    tokens, documents = 300, 12
    finds = rng.integers(0, levels, tokens) / 7
    wrong = rng.random(tokens) < 0.2
    document = np.sort(rng.integers(0, documents, tokens))
    marked = np.flatnonzero(wrong)
    labels = [marked[::2], marked[1::3], marked[:5]]  # they overlap
    ranking = Ranking(finds, wrong, document, labels)
    for draw in range(20):
        drawn = np.bincount(rng.integers(0, documents, documents), minlength=documents)
        if draw == 0:
            drawn = np.ones(documents)
        weights = drawn[document].astype(float)
        found, precision, by_label = ranking(drawn.astype(float))
        assert found == pytest.approx(quiet_roc_auc(wrong, finds, weights), abs=1e-12)
        expected = metrics.average_precision_score(wrong, finds, sample_weight=weights)
        assert precision == pytest.approx(expected, abs=1e-12)
        for label, value in zip(labels, by_label, strict=True):
            kept = ~wrong
            kept[label] = True
            expected = quiet_roc_auc(wrong[kept], finds[kept], weights[kept])
            assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_one_kind_of_tokens_alone():
    finds, document = np.arange(4.0), np.array([0, 0, 1, 1])
    one, none = np.ones(2), np.array([0.0, 1.0])
    wrong = np.array([True, True, False, False])
    assert np.isnan(Ranking(finds, ~np.ones(4, bool), document)(one)[0])
    found, precision, _ = Ranking(finds, np.ones(4, bool), document)(one)
    assert np.isnan(found) and precision == 1
    found, precision, labels = Ranking(finds, wrong, document, [np.array([0])])(none)
    assert np.isnan(found) and np.isnan(precision) and np.isnan(labels).all()


def test_by_group_is_one_group_after_the_other():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 400) / 3, rng.random(400) < 0.1
    group = rng.integers(0, 30, 400)
    found = auroc_by_group(scores, positive, group, 31)
    assert np.isnan(found[30])
    for k in range(30):
        own = group == k
        expected = quiet_roc_auc(positive[own], scores[own])
        assert found[k] == pytest.approx(expected, nan_ok=True)
        if np.isfinite(expected):
            assert auroc(scores[own], positive[own]) == pytest.approx(expected)


# -- the bootstrap


def random_answers(documents, length, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for d in range(documents):
        values = np.round(rng.normal(size=length) * 2) / 2
        wrong = np.flatnonzero(rng.random(length) < rng.random() * 0.6)
        found.append(answer(values, wrong, f"d{d}", labels={"a": wrong[::2]}))
    return Scored(found)


def drawn(scored, draws, seed=0):
    shares, _ = shares_of(scored, "r")
    ranking = Ranking(-scored.of("r"), scored.wrong, scored.document, list(scored.labels.values()))
    (found,) = bootstrap([(ranking, shares)], len(scored.documents), draws=draws, seed=seed)
    return found, shares


def test_draws_are_those_of_scikit_learn_on_the_tokens_of_the_documents_that_were_drawn():
    scored = random_answers(9, 40)
    found, shares = drawn(scored, 25)
    rng = np.random.default_rng(0)
    for b in range(25):
        # the documents one after the other, as often as they were drawn
        numbers = rng.integers(0, 9, 9)
        parts = [scored.answers[i] for i in numbers]
        values = np.concatenate([x.scores["r"] for x in parts])
        wrong = np.concatenate([x.wrong for x in parts])
        assert found.auroc[b] == pytest.approx(metrics.roc_auc_score(wrong, -values))
        expected = metrics.average_precision_score(wrong, -values)
        assert found.average_precision[b] == pytest.approx(expected)
        by_name = dict(zip(shares.names, found.shares[b], strict=True))
        assert by_name["wrong_negative"] == pytest.approx((values[wrong] < 0).mean())
        assert by_name["other_positive"] == pytest.approx((values[~wrong] > 0).mean())
        each = [quiet_roc_auc(x.wrong, -x.scores["r"]) for x in parts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert by_name["within_document"] == pytest.approx(np.nanmean(each))


def test_the_same_seed_gives_the_same_draws():
    scored = random_answers(5, 20)
    first, again, other = (drawn(scored, 10, seed)[0].auroc for seed in (3, 3, 4))
    assert (first == again).all() and not (first == other).all()


def test_intervals():
    draws = np.arange(101.0)
    assert interval(draws, 2) == (pytest.approx(2.5), pytest.approx(97.5))
    draws[:5] = np.nan
    assert interval(draws, 2) is not None
    draws[:6] = np.nan
    assert interval(draws, 2) is None  # too many draws lack a kind of tokens
    assert interval(np.ones(5), 1) is None
    assert interval(np.empty(0), 5) is None


# -- what is refused, and the halves


def test_arrays_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"r: expected one value for each of the 2 tokens"):
        ScoredAnswer("d", {"r": np.ones(3)}, np.zeros(2, bool), np.zeros(2, bool))
    with pytest.raises(ValueError, match="r: expected finite scores"):
        answer([np.nan], [])
    with pytest.raises(ValueError, match="at least one scored answer"):
        Scored([])
    other = ScoredAnswer("e", {"s": np.ones(1)}, np.zeros(1, bool), np.zeros(1, bool))
    with pytest.raises(ValueError, match="expected the scores r of every answer, got s"):
        Scored([answer([1], []), other])


def test_marks_that_mean_nothing_are_refused():
    """Numbers in the place of bool, a type of error on a token that is not wrong, both kinds."""
    none, scores = np.zeros(2, bool), {"r": np.ones(2)}
    with pytest.raises(ValueError, match="wrong: expected an array of bool, got int64"):
        ScoredAnswer("d", scores, np.array([0, 1]), none)
    with pytest.raises(ValueError, match="judged: expected an array of bool, got float64"):
        ScoredAnswer("d", scores, none, none, judged=np.ones(2))
    with pytest.raises(ValueError, match="labels: expected 'a' on tokens that are wrong alone"):
        answer([1, 2], [0], labels={"a": [1]})
    with pytest.raises(ValueError, match="right: expected tokens that are not wrong"):
        answer([1, 2], [0], right=[0])


def test_what_an_evaluation_refuses():
    scored = Scored([answer([1, 2], [0])])
    for baselines, got in ((["s"], "s"), ("r", "r")):
        with pytest.raises(
            ValueError, match=f"baselines: expected a list of some of r, got {got!r}"
        ):
            evaluate_scores(scored, baselines)
    with pytest.raises(ValueError, match="draws: expected a whole number >= 0, got -1"):
        evaluate_scores(scored, draws=-1)


def test_halves_are_apart_and_stay():
    names = [f"document {i}" for i in range(400)]
    first = {x for x in names if in_half(x, "first", 0)}
    second = {x for x in names if in_half(x, "second", 0)}
    assert first | second == set(names) and not first & second
    assert 150 < len(first) < 250
    assert first != {x for x in names if in_half(x, "first", 1)}
    assert all(in_half(x, "all", 0) for x in names)
    with pytest.raises(ValueError, match="half: expected first, second or all, got 'third'"):
        in_half("d", "third", 0)


def test_tokens_that_nobody_judged():
    """They count in steps and in sums of answers, and in no measure of tokens."""
    judged = np.array([True, True, True, False])
    steps = [0, 0, 1, 2]
    first = answer([3, 2, -1, -9], [2], "a", steps=steps, first_wrong=1, judged=judged)
    assert first_error(first, "r") == (0, pytest.approx(1 / 3))
    scored = Scored([first])
    assert scored.of("r").tolist() == [3, 2, -1] and scored.wrong.tolist() == [False, False, True]
    assert values_of(scored)["within_document"] == 1
    never = np.zeros(2, bool)
    pair = [
        answer([1, 1], [], "p", pair="p", preferred=True, judged=never),
        answer([0, 0], [], "p", pair="p", preferred=False, judged=never),
    ]
    found = values_of(Scored(pair))
    assert found["pair_accuracy"] == 1 and np.isnan(found["zeros"])
    labels = answer([1, 2, 3, 4], [0, 3], labels={"a": [0, 3]}, judged=np.arange(4) > 0)
    assert Scored([first, labels]).labels["a"].tolist() == [5]

"""Shaping by hand and against plain loops; runs between pivots."""

import numpy as np
import pytest
import torch
from judges import judge, judge_tokenizer
from tiny import tiny_llama, tiny_tokenizer

from treg.data import EncodeOptions, load_pairs
from treg.data.annotated import read_annotated, read_meta
from treg.rewards import Context, load_source
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.response import Response, ResponsePairs
from treg.rewards.shaping import (
    STEPS,
    Step,
    means_over,
    parse_steps,
    pivots,
    rewarded,
    score_shaped,
    segments,
    shape,
)

GIVEN = [1.0, -2.0, 4.0, 1.0, 0.0, 2.0]
BY_HAND = {
    "scale=-0.5": [-0.5, 1.0, -2.0, -0.5, 0.0, -1.0],
    "clip=1.5": [1.0, -1.5, 1.5, 1.0, 0.0, 1.5],
    "centre": [0.0, -3.0, 3.0, 0.0, -1.0, 1.0],
    "standardise=2": [x * 2 / (10 / 3) ** 0.5 for x in (0, -3, 3, 0, -1, 1)],
    # ranks 0 to 5; the two ones share 2 and 3
    "rank=0.7,1.3": [0.7 + 0.6 * x / 5 for x in (2.5, 0, 5, 2.5, 1, 4)],
    "smooth=3": [-0.5, 1.0, 1.0, 5 / 3, 1.0, 1.0],
    "smooth=99": [1.0] * 6,
    "skip=2": [0.0, 0.0, 4.0, 1.0, 0.0, 2.0],
    "skip=9": [0.0] * 6,
}


@pytest.mark.parametrize("step", BY_HAND)
@pytest.mark.parametrize("content", [6, 4, 0])
def test_each_step_by_hand(step, content):
    """The tokens after the content take part up to the last that has a reward."""
    given = torch.tensor([*GIVEN, 0.0, 0.0])
    before = given.clone()
    response = Response("", "", "", given.numpy(), given.numpy(), content, tokenizer=None)
    found = shape(given, rewarded(response, given), parse_steps(step))
    assert found.dtype == torch.float32 and torch.equal(given, before)
    np.testing.assert_allclose(found.tolist(), [*BY_HAND[step], 0.0, 0.0], rtol=1e-6, atol=1e-7)


def test_every_step_is_tried():
    assert {text.partition("=")[0] for text in BY_HAND} == STEPS.keys()


def test_steps_follow_one_another():
    given = torch.tensor(GIVEN)
    found = shape(given, torch.arange(6), parse_steps(["centre", "clip=2", "skip=1"]))
    assert found.tolist() == [0.0, -2.0, 2.0, 0.0, -1.0, 1.0]
    other = shape(given, torch.arange(6), parse_steps(["skip=1", "centre", "clip=2"]))
    assert other[0] != 0.0  # the order matters
    assert shape(given, torch.arange(2), ()) is given  # without steps nothing is cut off


@pytest.mark.parametrize("step", BY_HAND)
@pytest.mark.parametrize("content", [0, 1])
def test_responses_of_one_token_and_of_none(step, content):
    found = shape(torch.tensor([5.0 * content, 0.0]), torch.arange(content), parse_steps(step))
    alone = {"scale=-0.5": -2.5, "clip=1.5": 1.5, "rank=0.7,1.3": 1.0}
    alone |= {"smooth=3": 5.0, "smooth=99": 5.0}
    assert found.tolist() == pytest.approx([alone.get(step, 0.0) if content else 0.0, 0.0])


@pytest.mark.parametrize("beta_c", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("step", ["scale=1", "scale=-3"])
def test_scaling_keeps_what_a_reward_model_says(beta_c, step):
    """Of its verdict a part, or all, is at the token that ends the answer."""
    options = {"model": judge("llama", judge_tokenizer), "beta_c": beta_c}
    source = load_source("redistribution", options, Context(MODEL, TOKENIZER))
    pairs, _ = load_pairs(ROWS, TOKENIZER, EncodeOptions(256))
    given = [x for pair in ResponsePairs(pairs, TOKENIZER) for x in pair]
    assert [source.check(x) for x in given] == [None, None]
    factor = float(step.partition("=")[2])
    plain, shaped = (score_shaped(source, given, parse_steps(x)) for x in ([], step))
    for response, a, b in zip(given, plain, shaped, strict=True):
        assert a["token_rewards"][response.content] != 0
        assert b["token_rewards"].tolist() == (factor * a["token_rewards"]).tolist()


def test_equal_rewards():
    same = torch.full((5,), 0.1)
    assert shape(same, torch.arange(5), parse_steps("standardise=1")).tolist() == [0.0] * 5
    assert shape(same, torch.arange(5), parse_steps("rank=0,1")).tolist() == [0.5] * 5


@pytest.mark.parametrize("n", [1, 2, 3, 8, 50])
def test_ranks_and_averages_against_loops(n):
    rng = np.random.default_rng(n)
    given = rng.integers(-3, 4, n).astype(np.float64)
    ranks = [(sum(given < x) + sum(given <= x) - 1) / 2 for x in given]
    want = [-1 + 3 * (r / (n - 1) if n > 1 else 0.5) for r in ranks]
    found = shape(torch.from_numpy(given), torch.arange(n), parse_steps("rank=-1,2"))
    np.testing.assert_allclose(found, want, atol=1e-12)
    want = [given[max(0, i - 2) : i + 3].mean() for i in range(n)]
    found = shape(torch.from_numpy(given), torch.arange(n), parse_steps("smooth=5"))
    np.testing.assert_allclose(found, want, atol=1e-12)


def test_steps_are_written_as_they_are_read():
    for text in (*BY_HAND, "clip=1e-07", "scale=0.123456789"):
        step = Step.parse(text)
        assert str(step) == text and Step.parse(str(step)) == step
    assert str(Step.parse("clip=0.50")) == "clip=0.5"
    assert parse_steps(None) == () and parse_steps([]) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("center", "expected one of scale, .*, got 'center'; did you mean 'centre'?"),
        ("clip", "expected clip=F with F > 0, got 'clip'"),
        ("clip=", "expected clip=F with F > 0, got 'clip='"),
        ("clip=0", "expected clip=F with F > 0, got 'clip=0'"),
        ("clip=-1", "expected clip=F"),
        ("clip=1,2", "expected clip=F"),
        ("clip=inf", "expected clip=F"),
        ("scale=nan", "expected scale=F with F a number, got 'scale=nan'"),
        ("scale=big", "expected scale=F"),
        ("centre=1", "expected centre with no value, got 'centre=1'"),
        ("standardise=0", "expected standardise=F with F > 0"),
        ("rank=1", "expected rank=LO,HI with LO < HI, got 'rank=1'"),
        ("rank=1,1", "expected rank=LO,HI with LO < HI, got 'rank=1,1'"),
        ("smooth=2", "expected smooth=W with W odd, got 'smooth=2'"),
        ("smooth=-1", "expected smooth=W"),
        ("smooth=1.5", "expected smooth=W"),
        ("skip=0", "expected skip=K with K >= 1 whole, got 'skip=0'"),
        ("skip=1.5", "expected skip=K"),
        ("", "expected one of scale"),
    ],
)
def test_bad_steps_are_refused(text, message):
    with pytest.raises(ValueError, match=f"^shape: {message}"):
        parse_steps(["scale=1", text])


# -- in a file

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
ROWS = [{"prompt": "the fox?", "chosen": "it is 42, said the owl", "rejected": "no, no"}]


def annotated(output, *shaping, **more):
    options = AnnotateOptions(shaping=shaping, **more)
    annotate(MODEL, TOKENIZER, ROWS, output, options, progress=False)
    return read_annotated(output)


def test_a_file_of_shaped_rewards(tmp_path):
    (plain,), _ = annotated(tmp_path / "a.parquet")
    (found,), meta = annotated(tmp_path / "b.parquet", "centre", "scale=10")
    for side in ("chosen", "rejected"):
        before, after = (x[f"{side}_token_rewards"] for x in (plain, found))
        n = len(before) - 2  # <|im_end|> and a newline end a response
        want = 10 * (before[:n] - before[:n].mean())
        np.testing.assert_allclose(after, [*want, 0, 0], rtol=1e-5, atol=1e-6)
        assert plain[f"ref_{side}_logps"] == found[f"ref_{side}_logps"]
    prompts = meta["settings"]["prompts"]
    assert meta["streams"] == {
        "token_rewards": {
            "source": "contrastive",
            "settings": {"prompts": prompts},
            "shaping": ["centre", "scale=10"],
        }
    }


@pytest.mark.parametrize("shaping", [(), ("scale=2",), ("scale=3", "centre")])
def test_a_file_that_is_shaped_otherwise_is_refused(tmp_path, shaping):
    annotated(tmp_path / "a.parquet", "centre", "scale=3")
    before = (tmp_path / "a.parquet").read_bytes()
    annotated(tmp_path / "a.parquet", "centre", "scale=3.0")  # the same
    with pytest.raises(ValueError, match=r"a\.parquet: made with token_rewards .*, now it is"):
        annotated(tmp_path / "a.parquet", *shaping)
    assert (tmp_path / "a.parquet").read_bytes() == before


def test_a_file_that_is_not_shaped_is_no_shaped_one(tmp_path):
    annotated(tmp_path / "a.parquet")
    assert "streams" not in read_meta(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"made with token_rewards .contrastive., now it is \{"):
        annotated(tmp_path / "a.parquet", "centre")


def test_numbers_that_shaping_makes_too_large(tmp_path):
    with pytest.raises(ValueError, match="shape: row 0: chosen: expected finite token_rewards"):
        annotated(tmp_path / "a.parquet", "scale=1e300")


# -- segments


def test_segments_by_hand():
    given = torch.tensor([0.2, 0.4, -0.1, -0.3, -0.2, 0.0, 0.5])
    assert pivots(given).tolist() == [2, 5, 6]
    assert segments(given).tolist() == [0, 0, 1, 1, 1, 2, 3]
    means = [0.3, 0.3, -0.2, -0.2, -0.2, 0.0, 0.5]
    np.testing.assert_allclose(means_over(given, segments(given)), means, atol=1e-7)
    # the zero and the last token join what precedes them
    assert segments(given, min_tokens=2).tolist() == [0, 0, 1, 1, 1, 1, 1]
    means = [0.3] * 2 + [-0.02] * 5
    np.testing.assert_allclose(means_over(given, segments(given, min_tokens=2)), means, atol=1e-7)
    # the first run is too short: it grows
    assert segments(given, min_tokens=3).tolist() == [0] * 7
    # another baseline, other pivots: + + - - - - +
    assert pivots(given, 0.1).tolist() == [2, 6]


def test_means_over_numbers():
    found = means_over(torch.tensor([1.0, 2.0, 6.0, 3.0]), torch.tensor([2, 0, 2, 2]))
    np.testing.assert_allclose(found, [10 / 3, 2.0, 10 / 3, 10 / 3], rtol=1e-6)


@pytest.mark.parametrize("min_tokens", [1, 2, 5])
def test_segments_are_long_enough_and_keep_the_sum(min_tokens):
    rng = np.random.default_rng(min_tokens)
    for n in (1, 2, 7, 60):
        given = torch.from_numpy(rng.normal(size=n))
        number = segments(given, 0.0, min_tokens)
        assert number[0] == 0 and set(number.diff().tolist()) <= {0, 1}
        assert number.bincount().min() >= min(min_tokens, n)
        # a segment begins at a pivot, never between two
        assert set((number.diff().nonzero()[:, 0] + 1).tolist()) <= set(pivots(given).tolist())
        torch.testing.assert_close(means_over(given, number).sum(), given.sum())
    if min_tokens == 1:
        assert number.max() == len(pivots(given))


def test_no_tokens():
    none = torch.zeros(0)
    assert (
        not len(pivots(none))
        and not len(segments(none))
        and not len(means_over(none, segments(none)))
    )


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_bad_min_tokens(value):
    with pytest.raises(ValueError, match="min_tokens: expected a whole number >= 1, got"):
        segments(torch.ones(3), min_tokens=value)

"""What a revision changed: by hand, and against every alignment of short strings."""

import functools

import numpy as np
import pytest
from tiny import tiny_llama, tiny_tokenizer

from treg.data import EncodeOptions, load_pairs
from treg.rewards import Context, columns_read, load_source, make_options
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.base import score_checked
from treg.rewards.edits import edits
from treg.rewards.response import ResponsePairs

CHAT, PLAIN = tiny_tokenizer(), tiny_tokenizer(chat=False)
MODEL = tiny_llama(len(CHAT))


def marks(original, revised):
    """The edits of two strings, as strings: - for removed, + for added."""
    found = edits(np.array([*map(ord, original)]), np.array([*map(ord, revised)]))
    return tuple(
        "".join(sign if edited else "." for edited in side)
        for sign, side in zip("-+", found, strict=True)
    )


@pytest.mark.parametrize(
    ("original", "revised", "removed", "added"),
    [
        ("kitten", "sitting", "-...-.", "+...+.+"),
        ("abcd", "acxd", ".-..", "..+."),
        ("same", "same", "....", "...."),
        ("", "ab", "", "++"),
        ("ab", "", "--", ""),
        ("abc", "xyz", "---", "+++"),
        # read from the end, a token is kept where that can be: the last a of three
        ("aaa", "a", "--.", "."),
        ("a", "aaa", ".", "++."),
        # b stands for c, and not the first a for c
        ("ab", "ac", ".-", ".+"),
        # a deletion and an insertion keep the b; two replacements would keep nothing
        ("ab", "bc", "-.", ".+"),
        # a replacement before a deletion: of "xy" -> "z" the last one is replaced
        ("xy", "z", "--", "+"),
    ],
)
def test_edits_by_hand(original, revised, removed, added):
    assert marks(original, revised) == (removed, added)


def every_alignment(original, revised):
    """(removed, added) of the alignment with the fewest edits, then the fewest replacements, then
    by the rule: from the end, keep or replace before delete before insert.
    """

    @functools.cache
    def best(i, j):
        if not i and not j:
            return (0, 0), "", ""
        ways = []
        if i and j:
            (cost, replaced), removed, added = best(i - 1, j - 1)
            other = original[i - 1] != revised[j - 1]
            costs = (cost + other, replaced + other)
            ways.append((costs, removed + ".-"[other], added + ".+"[other]))
        if i:
            (cost, replaced), removed, added = best(i - 1, j)
            ways.append(((cost + 1, replaced), removed + "-", added))
        if j:
            (cost, replaced), removed, added = best(i, j - 1)
            ways.append(((cost + 1, replaced), removed, added + "+"))
        return min(ways, key=lambda way: way[0])  # of equal ones the first

    return best(len(original), len(revised))[1:]


@pytest.mark.parametrize("letters", [2, 3, 20])
def test_edits_against_all_alignments(letters):
    rng = np.random.default_rng(letters)
    for _ in range(150):
        original, revised = (
            "".join(chr(97 + x) for x in rng.integers(letters, size=rng.integers(0, 14)))
            for _ in range(2)
        )
        assert marks(original, revised) == every_alignment(original, revised)


def rows(**more):
    return [
        {
            "prompt": "the fox?",
            "chosen": "the old owl said it is 42",
            "rejected": "the old fox said is 42 moon",
        }
        | more
    ]


def scored(data, tokenizer=CHAT, **options):
    known = columns_read("edits", options)
    pairs, _ = load_pairs(data, tokenizer, EncodeOptions(256), known=known)
    source = load_source("edits", options, Context(MODEL, tokenizer))
    responses = ResponsePairs(pairs, tokenizer)[0]
    assert [source.check(response) for response in responses] == [None, None]
    found = score_checked(source, responses)
    return [(x, y["token_rewards"].tolist()) for x, y in zip(responses, found, strict=True)]


def text_with(response, rewards, value):
    at = [i for i, reward in enumerate(rewards) if reward == value]
    return response.tokenizer.decode(response.ids[at])


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
def test_answers_of_a_pair(tokenizer):
    data = rows(chosen=" the old owl said it is 42", rejected=" the old fox said is 42 moon")
    (chosen, of_chosen), (rejected, of_rejected) = scored(data, tokenizer)
    assert text_with(chosen, of_chosen, 1.0) == " owl it"
    assert text_with(rejected, of_rejected, -1.0) == " fox moon"
    assert set(of_chosen) == {0.0, 1.0} and set(of_rejected) == {0.0, -1.0}
    assert not any(of_chosen[chosen.content :]) and not any(of_rejected[rejected.content :])


def test_the_end_of_the_revised_answer_may_count():
    (chosen, of_chosen), (rejected, of_rejected) = scored(rows(), added=0.5, removed=-2, end=True)
    n = chosen.content
    assert of_chosen[n:] == [0.5, 0.0]  # <|im_end|>, and the newline after it
    assert not any(of_rejected[rejected.content :]) and min(of_rejected) == -2.0


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
def test_revisions_in_a_column(tokenizer):
    data = rows(
        chosen=" the old owl said",
        rejected=" it is 42 42",
        chosen_revision=" the old owl said",
        rejected_revision=" it was little 42",
    )
    (chosen, of_chosen), (rejected, of_rejected) = scored(data, tokenizer, column="{side}_revision")
    assert not any(of_chosen)
    assert text_with(rejected, of_rejected, -1.0) == " is 42"
    assert len(of_chosen) == len(chosen.ids)
    one = rows(revision="the old owl said it is 42")
    (_, of_chosen), (rejected, of_rejected) = scored(one, column="revision")
    assert not any(of_chosen) and text_with(rejected, of_rejected, -1.0) == " fox moon"


def test_what_cannot_be_compared_is_refused(tmp_path):
    def report(**more):
        options = AnnotateOptions(rewards="edits", rewards_options={"column": "revision"})
        data = rows(**more) + rows(revision="the owl")
        return annotate(MODEL, CHAT, data, tmp_path / f"{len(more)}.parquet", options).examples

    (message,) = report()["no column 'revision'"]
    assert message == "row 0: no column 'revision': the other columns are none"
    (message,) = report(revision=3)["no revision"]
    assert message == "row 0: no revision: revision: expected text, got 3"
    source = load_source("edits", {}, Context(MODEL, CHAT))
    pairs, _ = load_pairs(rows(), CHAT, EncodeOptions(256))
    chosen, _ = ResponsePairs(pairs, CHAT)[0]
    object.__setattr__(chosen, "other_ids", None)
    assert source.check(chosen).reason == "no other answer"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"added": float("inf")}, "added: expected a finite number"),
        ({"removed": "x"}, "removed: expected a number, got 'x'"),
        ({"column": "c", "end": True}, "end: expected False beside a column"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_options("edits", options)

"""Sources of a few lines: surprise and its words, segments by entropy, messages, controls."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from judges import judge, judge_tokenizer
from tiny import run_once, tiny_llama, tiny_tokenizer

from treg.cli.options import RewardsOptions, RowOptions, parse
from treg.data import EncodeOptions, load_pairs
from treg.data.annotated import read_annotated
from treg.rewards import SOURCES, Context, load_source, make_options
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.base import score_checked
from treg.rewards.entropy import entropy_segments
from treg.rewards.response import ResponsePairs
from treg.rewards.units import SENTENCE, WORD, numbers_of

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
ROWS = [
    {
        "prompt": "what is better?",
        "chosen": "the old owl said: it is 42. The sun",
        "rejected": "the sun and the moon are said to be happy",
    },
    {"prompt": "the fox?", "chosen": "it is 42, said the owl", "rejected": "no"},
]


def responses(rows=ROWS):
    pairs, _ = load_pairs(rows, TOKENIZER, EncodeOptions(256))
    return [response for pair in ResponsePairs(pairs, TOKENIZER) for response in pair]


def make(name, **options):
    return load_source(name, options, Context(MODEL, TOKENIZER, tokens_per_batch=2048))


def scored(name, given=None, **options):
    """The streams of a source, beside each response."""
    given = responses() if given is None else given
    return list(zip(given, score_checked(make(name, **options), given), strict=True))


def dense(response):
    """Log-probs and entropies of each token, in float64, from dense logits."""
    ids = torch.tensor([[*response.prompt_ids, *response.ids]]).long()
    with torch.no_grad():
        logps = MODEL(ids).logits[0].double().log_softmax(-1)[len(response.prompt_ids) - 1 : -1]
    targets = torch.from_numpy(response.ids).long()
    return logps.gather(1, targets[:, None])[:, 0].numpy(), -(logps.exp() * logps).sum(-1).numpy()


# -- surprise


def test_surprise_is_the_references_log_prob():
    for response, found in scored("surprise"):
        want = dense(response)[0]
        want[response.content :] = 0.0
        np.testing.assert_allclose(found["token_rewards"], want, rtol=1e-5, atol=1e-5)


def test_surprise_of_words_is_that_of_the_least_likely_token():
    given = responses()
    plain = scored("surprise", given)
    for (response, found), (_, tokens) in zip(
        scored("surprise", given, unit="word"), plain, strict=True
    ):
        n = response.content
        pieces = [TOKENIZER.decode([i]) for i in response.ids[:n].tolist()]
        word, words = -1, []
        for i, piece in enumerate(pieces):  # no token here holds two words, or ends in a blank
            word += i == 0 or piece.startswith(" ")
            words.append(word)
        assert max(words) + 1 == len(response.text.split()) < n
        values = tokens["token_rewards"]
        want = [min(values[j] for j in range(n) if words[j] == words[i]) for i in range(n)]
        assert found["token_rewards"].tolist() == [*want, *[0.0] * (len(response.ids) - n)]


# -- words and sentences


@pytest.mark.parametrize(
    ("pieces", "words", "sentences"),
    [
        (["a", "b", " c", "d", "  e"], [0, 0, 1, 1, 2], [0] * 5),
        (
            ["Hi", ".", " How", " are", "?", "\n\n", "Ok"],
            [0, 0, 1, 2, 2, 3, 3],
            [0, 0] + [1] * 3 + [2] * 2,
        ),
        (['"No', '!"', " he", " said", "."], [0, 0, 1, 2, 2], [0, 0, 1, 1, 1]),
        (["3", ".", "5", " m"], [0, 0, 0, 1], [0] * 4),
        (["a b", "c"], [0, 1], [0, 0]),  # a token of two words counts for the first
        (["", "", "🦊", " x"], [0, 0, 0, 1], [0] * 4),
        (["a", "\n", " "], [0, 0, 0], [0, 0, 0]),
        ([" ", "\n"], [0, 0], [0, 0]),
        (["東。", "京"], [0, 0], [0, 1]),
        ([], [], []),
    ],
)
def test_words_and_sentences(pieces, words, sentences):
    assert numbers_of(pieces, WORD) == words
    assert numbers_of(pieces, SENTENCE) == sentences


# -- segments by entropy


def test_a_segment_ends_where_the_next_token_is_uncertain():
    """Token t ends a segment where H_(t+1) > 2: before tokens 2 and 5 the model is uncertain."""
    entropy = torch.tensor([9.0, 1.0, 2.5, 2.0, 0.1, 2.1])
    assert entropy_segments(entropy, 2.0).tolist() == [0, 0, 1, 1, 1, 2]
    assert entropy_segments(entropy, 0.0).tolist() == [0, 1, 2, 3, 4, 5]
    assert entropy_segments(entropy[:0], 2.0).tolist() == []


@pytest.mark.parametrize("threshold", [4.4, 4.6])
def test_entropy_spreads_sums_over_segments(threshold):
    several = 0
    for response, found in scored("entropy", threshold=threshold):
        logps, entropy = dense(response)
        n = response.content
        bounds = [0, *(i for i in range(1, n) if entropy[i] > threshold), n]
        several += 1 < len(bounds) - 1 < n
        want = np.zeros(len(response.ids))
        for a, b in pairwise(bounds):
            want[a:b] = logps[a:b].sum() / (b - a)
        np.testing.assert_allclose(found["token_rewards"], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["token_rewards"].sum(), logps[:n].sum(), rtol=1e-5)
    assert several, "segments of one token alone would test nothing"


@pytest.mark.parametrize("threshold", [0.0, 4.5, 1e9])
def test_entropy_keeps_what_a_reward_model_says(threshold):
    """Of which a part is at the token that ends the answer: it belongs to the last segment."""
    given = responses()
    inner = {"model": judge("llama", judge_tokenizer), "beta_c": 0.5}
    found = scored("entropy", given, of="redistribution", of_options=inner, threshold=threshold)
    of = make("redistribution", **inner)
    assert [of.check(x) for x in given] == [None] * len(given)
    for (response, streams), plain in zip(found, of.score(given), strict=True):
        values, rewards = (x["token_rewards"].double().numpy() for x in (streams, plain))
        n = response.content
        assert rewards[n] != 0 and values[n] == values[n - 1] != 0
        _, entropy = dense(response)
        bounds = [0, *(i for i in range(1, n) if entropy[i] > threshold), n + 1]
        want = np.zeros(len(values))
        for a, b in pairwise(bounds):
            want[a:b] = rewards[a:b].mean()
        np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(values.sum(), rewards.sum(), rtol=1e-5, atol=1e-5)


def test_entropy_of_another_source():
    given = responses()
    inner = scored("contrastive", given)
    for (response, found), (_, of) in zip(
        scored("entropy", given, of="contrastive", threshold=1e9), inner, strict=True
    ):
        n = response.content
        mean = of["token_rewards"][:n].mean().item()
        np.testing.assert_allclose(found["token_rewards"][:n], [mean] * n, rtol=1e-4, atol=1e-6)


def test_entropy_and_surprise_share_the_references_forward():
    seen, given = [], responses()
    context = Context(MODEL, TOKENIZER, on_tokens=seen.append)
    source = load_source("entropy", {}, context)
    assert all(source.check(response) is None for response in given)
    source.score(given)
    context.reference(given)
    rows = [(x.prompt_ids.tolist(), x.ids.tolist()) for x in given]
    assert sum(seen) == run_once(rows)


# -- messages

PATTERN = [0.2, 0.4, -0.1, -0.3, -0.2, 0.0, 0.5]


class Given:
    """A source whose rewards are PATTERN, for as long as it lasts."""

    Options = type(make_options("constant", {}))
    streams = ("token_rewards",)

    def __init__(self, options, context):
        pass

    def settings(self):
        return {"pattern": PATTERN}

    def check(self, response):
        return None

    def score(self, given):
        return [{"token_rewards": torch.tensor(np.resize(PATTERN, len(x.ids)))} for x in given]


@pytest.fixture
def of_pattern(monkeypatch):
    """The streams of a chosen and of a rejected answer with so many tokens, by `messagewise`."""
    monkeypatch.setitem(SOURCES, "given", Given)

    def score(content=7, **options):
        given = [replace(x, content=content, says=None) for x in responses()[:2]]
        return [found for _, found in scored("messagewise", given, of="given", **options)]

    return score


BY_HAND = {
    "each run": (
        {},
        [0.3, 0.3, -0.2, -0.2, -0.2, 0.0, 0.5],
        [1, 1, 0, 0, 0, 0, 1],
        [0, 0, 1, 1, 1, 0, 0],
    ),
    "two tokens": ({"min_tokens": 2}, [0.3] * 2 + [-0.02] * 5, [1, 1] + [0] * 5, [0, 0] + [1] * 5),
    "baseline": (
        {"baseline": 0.1},
        [0.3] * 2 + [-0.15] * 4 + [0.5],
        [1, 1, 0, 0, 0, 0, 1],
        [0, 0, 1, 1, 1, 1, 0],
    ),
    "none above": ({"baseline": 1.0}, [0.5 / 7] * 7, [0] * 7, [1] * 7),
    "whole": ({"baseline": 1.0, "empty": "whole"}, [0.5 / 7] * 7, [1] * 7, [1] * 7),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_messages_by_hand(case, of_pattern):
    options, means, *masks = BY_HAND[case]
    for found, mask in zip(of_pattern(**options), masks, strict=True):
        np.testing.assert_allclose(found["token_rewards"][:7], means, atol=1e-6)
        assert found["token_weights"][:7].tolist() == mask
        # what ends the response, up to its last reward
        ends = np.resize(PATTERN, len(found["token_rewards"]))[7:].astype(np.float32)
        last = int(np.flatnonzero(ends)[-1]) + 1
        assert found["token_rewards"][7:].tolist() == ends.tolist()
        assert found["token_weights"][7:].tolist() == [mask[-1]] * last + [0] * (len(ends) - last)


def test_messages_of_a_source_that_gives_the_end_nothing():
    for response, found in scored("messagewise", of="constant", empty="whole"):
        n = response.content
        assert not found["token_rewards"][n:].any() and not found["token_weights"][n:].any()


def test_responses_that_keep_no_token_are_counted(tmp_path, caplog):
    options = {"of": "surprise"}  # log-probs are below 0: no chosen token agrees
    made = AnnotateOptions(rewards="messagewise", rewards_options=options)
    annotate(MODEL, TOKENIZER, ROWS, tmp_path / "a.parquet", made, progress=False)
    (message,) = [x.getMessage() for x in caplog.records if x.name.startswith("treg")]
    assert "2 of 4 responses keep no token" in message
    for example in read_annotated(tmp_path / "a.parquet")[0]:
        n = example["rejected_token_weights"].sum()
        assert not example["chosen_token_weights"].any() and n == len(example["rejected_ids"]) - 2


# -- controls


def test_constant():
    for response, found in scored("constant", value=-0.25):
        assert found["token_rewards"].tolist() == padded([-0.25] * response.content, response)


def padded(values, response):
    """Values of the content, then 0."""
    return [*values, *[0.0] * (len(response.ids) - response.content)]


def test_random_rewards_depend_on_ids_and_seed_alone():
    given = responses()
    first = [found["token_rewards"] for _, found in scored("random", given, spread=2.0)]
    alone = [make("random", spread=2.0).score([x])[0]["token_rewards"] for x in reversed(given)]
    for a, b in zip(first, reversed(alone), strict=True):
        assert torch.equal(a, b)
    other = [found["token_rewards"] for _, found in scored("random", given, seed=1, spread=2.0)]
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # what these ids and this seed have always given
    response = replace(
        given[0], ids=np.array([5, 6, 7, 8], np.int32), content=3, says=None, scored=None
    )
    (found,) = make("random", seed=3).score([response])
    recorded = [-0.03448929265141487, -0.03844691812992096, -0.0931367576122284, 0.0]
    assert found["token_rewards"].tolist() == pytest.approx(recorded, rel=1e-6)


def test_random_rewards_have_the_spread_that_is_asked_for():
    long = replace(
        responses()[0], ids=np.arange(20000, dtype=np.int32), content=20000, says=None, scored=None
    )
    (found,) = make("random", spread=0.5).score([long])
    values = found["token_rewards"]
    # four standard errors of a mean and of a standard deviation
    assert abs(values.mean()) < 4 * 0.5 / 20000**0.5
    assert abs(values.std() - 0.5) < 4 * 0.5 / 40000**0.5


def test_shuffled_rewards_are_the_same_elsewhere():
    given, moved = responses(), 0
    inner = scored("surprise", given)
    for seed in (0, 1):
        for (response, found), (_, of) in zip(
            scored("shuffled", given, of="surprise", seed=seed), inner, strict=True
        ):
            n, values = response.content, found["token_rewards"]
            before = of["token_rewards"]
            assert sorted(values[:n].tolist()) == sorted(before[:n].tolist())
            assert not values[n:].any()
            moved += not torch.equal(values, before)
    assert moved >= 5  # of 8; an answer of one token stays


def test_shuffled_rewards_keep_the_end():
    given = responses()
    inner = {"model": judge("llama", judge_tokenizer)}
    made, of = (
        make("shuffled", of="redistribution", of_options=inner),
        make("redistribution", **inner),
    )
    for source in (made, of):
        assert [source.check(x) for x in given] == [None] * len(given)
    for x, found, wanted in zip(given, made.score(given), of.score(given), strict=True):
        end = wanted["token_rewards"][x.content :].tolist()
        assert found["token_rewards"][x.content :].tolist() == end and end[0] != 0


# -- sources over sources


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shuffled", {"of": "suprise"}, "did you mean 'surprise'?"),
        ("shuffled", {"of_options": '{"promts": "x"}'}, "did you mean 'prompts'?"),
        ("shuffled", {"of_options": "[1]"}, "of_options: expected values by name"),
        (
            "shuffled",
            {"of": "redistribution"},
            "got none; options of 'redistribution' go into of_options, as JSON: --rewards.of",
        ),
        ("shuffled", {"of_options": "{"}, "of_options: expected a JSON object"),
        ("shuffled", {"of": "shuffled"}, "of: expected another source than this one"),
        (
            "shuffled",
            {"of": "messagewise", "of_options": {"of": "shuffled"}},
            "of: expected another source than this one, got 'messagewise'",
        ),
        ("shuffled", {"seed": True}, "seed: expected an integer"),
        ("random", {"spread": 0.0}, "spread: expected a finite number > 0"),
        ("random", {"spread": float("nan")}, "spread: expected a finite number"),
        ("constant", {"value": float("inf")}, "value: expected a finite number"),
        ("entropy", {"threshold": -1.0}, "threshold: expected a number >= 0"),
        ("messagewise", {"min_tokens": 0}, "min_tokens: expected a whole number >= 1"),
        ("messagewise", {"empty": "all"}, "empty: expected one of zero, whole"),
        ("messagewise", {"baseline": float("nan")}, "baseline: expected a finite number"),
        ("surprise", {"unit": "letter"}, "unit: expected one of token, word"),
    ],
)
def test_options_that_are_refused(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_options(name, options)


def test_a_source_of_weights_alone_is_no_inner_one(monkeypatch):
    class Weights(Given):
        streams = ("token_weights",)

    monkeypatch.setitem(SOURCES, "weights", Weights)
    with pytest.raises(ValueError, match="of: expected a source of token_rewards, got 'weights'"):
        make_options("shuffled", {"of": "weights"})


def test_settings_hold_those_of_the_inner_source():
    given = {"of": "shuffled", "of_options": {"of": "surprise", "seed": 5}}
    assert make("messagewise", **given).settings() == {
        "of": "shuffled",
        "of.of": "surprise",
        "of.of.unit": "token",
        "of.seed": 5,
        "baseline": 0.0,
        "min_tokens": 1,
        "empty": "zero",
    }


def test_inner_options_in_yaml_are_those_of_the_command_line(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("rewards:\n  name: shuffled\n  of: entropy\n  of_options: {threshold: 1.5}\n")
    options = ["--rewards", "shuffled", "--rewards.of", "entropy"]
    for argv in (
        ["--config", str(config)],
        [*options, "--rewards.of_options", json.dumps({"threshold": 1.5})],
    ):
        _, found = parse("annotate", ["--data", "x", *argv], (RowOptions, RewardsOptions))
        made = make_options("shuffled", found.rewards_options)
        assert (made.of, made.inner_options) == ("entropy", {"threshold": 1.5})

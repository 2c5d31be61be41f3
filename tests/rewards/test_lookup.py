"""`TokenRewards` against a search through every annotated sequence."""

import itertools

import numpy as np
import pytest
import torch

from treg.data.annotated import write_annotated
from treg.rewards.lookup import TokenRewards

SIDES = ("chosen", "rejected")


def make_examples(n=6, vocab=4, seed=0):
    """Pairs over so small a vocabulary that sequences share beginnings; the rewards of a token are
    its own.
    """
    random = np.random.default_rng(seed)
    examples, seen = [], set()
    while len(examples) < n:
        prompt = random.integers(0, vocab, random.integers(1, 4))
        example = {"prompt_ids": prompt}
        for side in SIDES:
            ids = random.integers(0, vocab, random.integers(1, 9))
            example |= {
                f"{side}_ids": ids,
                f"{side}_token_rewards": random.uniform(-0.5, 0.5, len(ids)),
            }
        sequences = {tuple([*prompt, *example[f"{side}_ids"]]) for side in SIDES}
        if len(sequences) == 2 and not sequences & seen:
            seen |= sequences
            examples.append(example)
    return examples


def sequences_of(examples):
    """(ids, rewards) of every annotated sequence, 0 in the prompt."""
    for example, side in itertools.product(examples, SIDES):
        prompt, ids = (np.asarray(example[name]) for name in ("prompt_ids", f"{side}_ids"))
        rewards = np.concatenate([np.zeros(len(prompt)), example[f"{side}_token_rewards"]])
        yield np.concatenate([prompt, ids]).tolist(), rewards.astype(np.float32)


def agree(a, b):
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def search(examples, ids, tail=0):
    """What may be found for ids: the rewards of each annotated sequence with the longest common
    beginning, if that
    leaves at most tail tokens; an annotated sequence that is this beginning as a whole comes before
    all others."""
    ids = list(ids)
    found = [(agree(ids, known), len(known), rewards) for known, rewards in sequences_of(examples)]
    longest = max(n for n, _, _ in found)
    if longest < max(1, len(ids) - tail):
        return []
    # the first in order of those, and how long its prompt is: of an answer one token must agree
    first = min(known for known, _ in sequences_of(examples) if agree(ids, known) == longest)
    prompts = {
        tuple([*x["prompt_ids"], *x[f"{side}_ids"]]): len(x["prompt_ids"])
        for x in examples
        for side in SIDES
    }
    if len(ids) > prompts[tuple(first)] >= longest:
        return []
    best = [(length, rewards[:longest]) for n, length, rewards in found if n == longest]
    whole = [rewards for length, rewards in best if length == longest]
    rest = np.zeros(len(ids) - longest, dtype=np.float32)
    return [
        np.concatenate([rewards, rest]) for rewards in whole or [rewards for _, rewards in best]
    ]


def check(rewards, ids, expected):
    """The one answer there is, or the right refusal; how many answers there are."""
    distinct = {tuple(x.tolist()) for x in expected}
    if len(distinct) == 1:
        assert tuple(rewards.of(ids).tolist()) in distinct
    else:
        with pytest.raises(ValueError, match="tells apart" if distinct else "agrees with none"):
            rewards.of(ids)
    return len(distinct)


@pytest.fixture
def examples():
    return make_examples()


def test_whole_sequences(examples):
    rewards = TokenRewards(examples)
    for ids, expected in sequences_of(examples):
        found = rewards(torch.tensor([ids]))
        assert found.shape == (1, len(ids)) and found.dtype == torch.float32
        assert found[0].tolist() == expected.tolist()


def test_beginnings(examples):
    rewards, answers = TokenRewards(examples), []
    for ids, _ in sequences_of(examples):
        for length in range(1, len(ids)):
            answers.append(check(rewards, np.array(ids[:length]), search(examples, ids[:length])))
    assert min(answers) == 1 and max(answers) > 1  # some are those of several sequences


def random_queries(vocab=4, count=400):
    random = np.random.default_rng(1)
    return [random.integers(0, vocab, random.integers(1, 12)) for _ in range(count)]


@pytest.mark.parametrize("tail", [0, 1, 3])
def test_any_sequence(examples, tail):
    """Those of a random vocabulary are annotated, cut short, or unknown."""
    rewards = TokenRewards(examples, tail=tail)
    answers = [check(rewards, ids, search(examples, ids, tail)) for ids in random_queries()]
    assert 10 < answers.count(0) < 390 and answers.count(1) > 10 and max(answers) > 1


@pytest.mark.parametrize("tail", [1, 2, 5])
def test_another_end(examples, tail):
    """One that the annotated sequences do not go on with: their tokens are below 9."""
    rewards = TokenRewards(examples, tail=tail)
    for ids, _ in sequences_of(examples):
        for length in range(1, tail + 1):
            query = np.array([*ids, *[9] * length])
            assert check(rewards, query, search(examples, query, tail)) == 1
            assert not rewards.of(query)[len(ids) :].any()
        with pytest.raises(ValueError, match="agrees with none"):
            rewards.of(np.array([*ids, *[9] * (tail + 1)]))


BEGINS_ALIKE = {
    "prompt_ids": [1, 2],
    "chosen_ids": [5, 6],
    "rejected_ids": [5, 6, 7, 8],
    "chosen_token_rewards": [0.1, 0.2],
    "rejected_token_rewards": [-0.1, -0.2, -0.3, -0.4],
}


def test_a_sequence_that_another_begins_with():
    rewards = TokenRewards([BEGINS_ALIKE])
    assert rewards.of(np.array([1, 2, 5, 6])).tolist() == pytest.approx([0, 0, 0.1, 0.2])
    assert rewards.of(np.array([1, 2, 5, 6, 7, 8])).tolist() == pytest.approx(
        [0, 0, -0.1, -0.2, -0.3, -0.4]
    )


@pytest.mark.parametrize("end", [0, 7, 9])
def test_a_sequence_that_another_begins_with_and_another_end(end):
    """Whatever the ids of the end: on from the chosen response, unless the rejected one goes on
    like that.
    """
    expected = [0, 0, -0.1, -0.2, -0.3] if end == 7 else [0, 0, 0.1, 0.2, 0]
    found = TokenRewards([BEGINS_ALIKE], tail=1).of(np.array([1, 2, 5, 6, end]))
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding(examples, side):
    known = list(sequences_of(examples))
    width = max(len(ids) for ids, _ in known) + 3
    ids, mask = torch.full((len(known), width), 2), torch.zeros(len(known), width, dtype=torch.long)
    expected = torch.zeros(len(known), width)
    for row, (sequence, rewards) in enumerate(known):
        start = {"left": width - len(sequence), "right": 0, "both": 1}[side]
        place = slice(start, start + len(sequence))
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
        expected[row, place] = torch.from_numpy(rewards)
    rewards = TokenRewards(examples)
    assert torch.equal(rewards(ids, mask), expected)
    assert torch.equal(rewards(ids.int(), mask.bool()), expected)
    with pytest.raises(ValueError, match="agrees with none"):
        rewards(ids)


def test_large_ids():
    """Beyond 16 bits, in an order that the low bytes alone would not have."""
    ids = [[1, 2**16 + 3], [1, 3], [1, 2**24 + 1], [1, 2**31 - 1], [1, 2**8 + 3], [1, 2**16 + 2]]
    examples = [
        {
            "prompt_ids": a[:1],
            "chosen_ids": a[1:],
            "rejected_ids": b[1:],
            "chosen_token_rewards": [0.01 * i],
            "rejected_token_rewards": [-0.01 * i],
        }
        for i, (a, b) in enumerate(zip(ids[::2], ids[1::2], strict=True), 1)
    ]
    rewards = TokenRewards(examples)
    for known, expected in sequences_of(examples):
        assert rewards(torch.tensor([known]))[0].tolist() == expected.tolist()
    with pytest.raises(ValueError, match="agrees with none"):
        rewards.of(np.array([1, 2**16 + 4]))


def written(path, examples):
    rows = [
        x | {"index": i, "where": str(i), "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
        for i, x in enumerate(examples)
    ]
    write_annotated(path, rows, {})
    return path


def test_a_file_is_its_examples(examples, tmp_path):
    path = written(tmp_path / "annotated.parquet", examples)
    from_file, from_list = TokenRewards(path), TokenRewards(iter(examples))
    for ids, expected in sequences_of(examples):
        assert (
            from_file.of(np.array(ids)).tolist()
            == from_list.of(np.array(ids)).tolist()
            == expected.tolist()
        )
    with pytest.raises(ValueError, match=r"annotated\.parquet"):
        from_file.of(np.array([9]))


def test_no_file_and_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        TokenRewards(tmp_path / "absent.parquet")
    with pytest.raises(ValueError, match="at least one pair"):
        TokenRewards(written(tmp_path / "empty.parquet", []))


def test_no_examples_know_no_sequence():
    with pytest.raises(ValueError, match="first 0"):
        TokenRewards([]).of(np.array([1, 2]))


def test_no_tokens(examples):
    with pytest.raises(ValueError, match="0 tokens"):
        TokenRewards(examples)(torch.tensor([[1, 2]]), torch.zeros(1, 2))


def test_messages(examples):
    ids = np.array(next(iter(sequences_of(examples)))[0])
    with pytest.raises(ValueError, match=r"chat template and truncation$"):
        TokenRewards(examples).of(np.array([9, 9]))
    with pytest.raises(ValueError, match="tail="):
        TokenRewards(examples).of(np.append(ids, 9))


@pytest.mark.parametrize("tail", [-1, 1.0, True, None, "1"])
def test_bad_tail(examples, tail):
    with pytest.raises(ValueError, match="tail: expected a number of tokens"):
        TokenRewards(examples, tail=tail)


def test_rewards_that_do_not_fit():
    good = BEGINS_ALIKE
    for name, wrong in (("chosen", [0.1]), ("rejected", [0.1, 0.2, float("nan"), 0.1])):
        with pytest.raises(ValueError, match=rf"{name}_token_rewards: expected \d finite numbers"):
            TokenRewards([good | {f"{name}_token_rewards": wrong}])


def test_a_sequence_that_is_there_twice():
    again = BEGINS_ALIKE | {
        "chosen_token_rewards": [0.1 + 1e-4, 0.2]
    }  # as another batch would give
    TokenRewards([BEGINS_ALIKE, again])
    with pytest.raises(ValueError, match="the same rewards where a sequence is there twice"):
        TokenRewards([BEGINS_ALIKE, BEGINS_ALIKE | {"chosen_token_rewards": [0.3, 0.2]}])


def test_another_answer_is_no_end():
    """However long the tail: of an answer at least one token must be annotated."""
    with pytest.raises(ValueError, match="agrees with none"):
        TokenRewards([BEGINS_ALIKE], tail=2).of(np.array([1, 2, 8, 9]))

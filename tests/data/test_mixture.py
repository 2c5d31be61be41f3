"""Several sources as one: how many rows of each a weight takes, and which."""

import hashlib
import json
import math
import os
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
from datasets import Dataset
from tiny import tiny_tokenizer

from treg.data import EncodeOptions, Mixture, load_pairs
from treg.data.mixture import (
    ENCODED,
    UNNAMED,
    Share,
    check_alike,
    load_sources,
    mixture_of,
    taken_rows,
)
from treg.data.report import RowProblem
from treg.rewards import DEFAULT_SOURCE


def rows(count: int, start: int = 0) -> list[dict]:
    """Examples of other ids each."""
    ids = range(start, start + count)
    return [{"prompt_ids": [i, 7], "chosen_ids": [i], "rejected_ids": [i + 1, 3]} for i in ids]


def places_by_hand(given: list[dict], count: int, seed: int) -> list[int]:
    """The sample by its definition: the lowest SHA-256 of seed, repeats before, and content."""
    keys, contents = {}, []
    for place, row in enumerate(given):
        data = b""
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            data += len(row[name]).to_bytes(4, "little")
            data += b"".join(int(i).to_bytes(8, "little") for i in row[name])
        content = hashlib.sha256(data).hexdigest()
        key = f"{seed} {contents.count(content)} {content}"
        keys[hashlib.sha256(key.encode()).hexdigest()] = place
        contents.append(content)
    return sorted(keys[x] for x in sorted(keys)[:count])


@pytest.mark.parametrize(
    ("count", "weight", "times", "more"),
    [
        (8, 1, 1, 0),
        (8, 2, 2, 0),
        (8, 0.5, 0, 4),
        (5, 0.5, 0, 3),  # halves are rounded up
        (8, 2.5, 2, 4),
        (8, 1.99, 2, 0),
        (30, 0.1, 0, 3),
        (50, 0.29, 0, 15),  # 14.5 as it is written, in float64 less
        (1, 1000, 1000, 0),
    ],
)
def test_a_weight_by_hand(count, weight, times, more):
    given = rows(count)
    taken = taken_rows(given, weight, seed=3)
    assert taken[: times * count] == [*range(count)] * times
    assert taken[times * count :] == places_by_hand(given, more, 3)
    assert len(set(taken[times * count :])) == more


def test_a_sample_is_the_same_at_every_start():
    """These places were written down once."""
    assert taken_rows(rows(12), 0.5, 0) == PLACES[0]
    assert taken_rows(rows(12), 0.5, 1) == PLACES[1]
    as_arrays = [{k: np.asarray(x, np.int32) for k, x in row.items()} for row in rows(12)]
    assert taken_rows(as_arrays, 0.5, 0) == PLACES[0]


PLACES = ([2, 6, 7, 8, 9, 10], [0, 1, 3, 8, 9, 10])


def test_samples_are_nested_and_hold_when_rows_are_added():
    given = rows(40)
    few, many = (set(taken_rows(given, weight, 5)) for weight in (0.3, 0.6))
    assert few < many
    kept = {x["chosen_ids"][0] for x in (given[i] for i in many)}
    longer = [*rows(1, start=100), *given]
    again = {longer[i]["chosen_ids"][0] for i in taken_rows(longer, Fraction(24, 41), 5)}
    assert len(again) == 24 and len(again - kept) <= 1


def test_every_row_is_as_likely():
    seeds, times = 600, np.zeros(10)
    given = rows(8) + rows(2)  # the last two are there twice
    for seed in range(seeds):
        times[taken_rows(given, 0.5, seed)] += 1
    assert times.sum() == 5 * seeds
    assert abs(times - seeds / 2).max() < 5 * math.sqrt(seeds / 4)


def test_a_mixture_is_one_source_after_the_other():
    sets = [rows(4), rows(6, start=50)]
    mixture = Mixture(("a", "b"), (2, 0.5), seed=9)
    mixed, shares = mixture.mixed(sets)
    half = [sets[1][i] for i in places_by_hand(sets[1], 3, 9)]
    assert mixed == sets[0] + sets[0] + half
    assert shares == [Share("a", 4, 2.0, 8), Share("b", 6, 0.5, 3)]
    # of the same rows whatever stands beside them
    assert Mixture(("b",), (0.5,), seed=9).mixed([sets[1]])[0] == half
    assert Mixture(("a", "b")).mixed(sets)[0] == sets[0] + sets[1]
    assert mixture_of(["a", "b"]) == Mixture(("a", "b")) and mixture_of("a") is None


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ((), (), "data: expected a source, got none"),
        ("a.parquet", (), "sources: expected a list or a tuple, got 'a.parquet'"),
        (("a",), 2, "weights: expected a list or a tuple, got 2"),
        (("a", ""), (), "data: expected a file, a folder or a hub name, got ''"),
        (("a", "b", "./a"), (), "expected each source once, got ./a twice"),
        (("a", "a/b"), (), "expected each source once, got a/b and a, in which it lies"),
        (("a", "b"), (1,), "data_weights: expected 2, one for each of a, b, got 1: 1"),
        (("a", "b"), (1, 0), "a number above 0 and at most 1000 for b, got 0"),
        (("a", "b"), (-1, 1), "at most 1000 for a, got -1"),
        (("a", "b"), (1, float("nan")), "for b, got nan"),
        (("a", "b"), (1, float("inf")), "for b, got inf"),
        (("a", "b"), (1, 1001), "for b, got 1001"),
        (("a", "b"), (1, "2"), "for b, got '2'"),
        (("a", "b"), (1, True), "for b, got True"),
    ],
)
def test_mixtures_that_are_refused(sources, weights, message):
    with pytest.raises(ValueError) as refused:
        Mixture(sources, weights)
    assert message in str(refused.value)


def test_a_weight_that_takes_nothing_is_refused():
    with pytest.raises(ValueError, match=r"of the 8 of b, got 0\.06, which takes none; 0\.125"):
        Mixture(("a", "b"), (1, 0.06)).mixed([rows(3), rows(8)])
    assert len(Mixture(("b",), (0.0625,)).mixed([rows(8)])[0]) == 1


def test_sources_with_other_columns_are_refused_by_name():
    plain, numbers = rows(2), {"chosen_token_rewards": [1.0], "rejected_token_rewards": [0.0, 1.0]}
    rewarded = [x | numbers for x in plain]
    masked = [x | {"chosen_scored": [True], "rejected_scored": [True, False]} for x in plain]
    check_alike(["a", "b"], [plain, masked], [{}, {}])  # without a mask every token is scored
    with pytest.raises(ValueError, match=r"b: expected chosen_token.*, as in a, got none"):
        check_alike(["a", "b"], [rewarded, plain], [{}, {}])
    with pytest.raises(ValueError, match="b: expected no chosen_token_rewards, as in a, got chos"):
        check_alike(["a", "b"], [plain, rewarded], [{}, {}])
    marked = [x | {"chosen_marks": [1.0], "rejected_marks": [0.0, -1.0]} for x in plain]
    with pytest.raises(ValueError, match="b: expected chosen_marks, rejected_marks, as in a, got"):
        check_alike(["a", "b"], [marked, plain], [{}, {}])


def test_token_rewards_that_were_made_otherwise_are_refused_by_name():
    settings = {"prompts": "x", "encode": {"max_length": 9}, "dtype": "torch.float32"}
    file = {"settings": settings}
    longer = {"settings": settings | {"encode": {"max_length": 90}, "dtype": "torch.bfloat16"}}
    other = {"settings": settings | {"prompts": "y"}}
    shaped = {"streams": {"token_rewards": {"source": "s", "settings": {}, "shaping": ["centre"]}}}
    sets = [rows(1)] * 3
    check_alike(["a", "b", "c"], sets, [file, longer, {}])
    for different in (other, shaped):
        with pytest.raises(ValueError, match=r"c: expected pairs .* as those of a, with"):
            check_alike(["a", "b", "c"], sets, [file, longer, different])
        check_alike(["a", "b", "c"], sets, [file, longer, different], made=False)
    del shaped["streams"]["token_rewards"]["shaping"][:]
    with pytest.raises(ValueError, match=r"streams\.token_rewards\.source 'contrastive', got 's'"):
        check_alike(["a", "b", "c"], sets, [file, longer, shaped])


def test_of_a_sum_of_sources_those_count_that_are_in_it():
    """Marks beside it differ with the rows of each file."""

    def file(mixed, marks):
        sources = {"a": {"source": "surprise", "settings": mixed}}
        sources["marks"] = {"source": "spans", "settings": {"rows": marks}}
        made = {"source": "several", "settings": {"sources": sources, "mix": {"a": 1.0}}}
        return {"streams": {"token_rewards": made, **sources}}

    sets = [rows(1)] * 2
    check_alike(["a", "b"], sets, [file({"unit": "token"}, "1"), file({"unit": "token"}, "2")])
    with pytest.raises(ValueError, match=r"sources\.a\.settings\.unit 'token', got 'word'"):
        check_alike(["a", "b"], sets, [file({"unit": "token"}, "1"), file({"unit": "word"}, "1")])


@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (
            {"turns": "all"},
            r"encode\.turns 'assistant', got 'all'; .* the same --turns, or set mixed",
        ),
        ({"chat": False}, r"encode\.chat None, got False; .* the same --plain_text"),
        ({"date": "2026-11-30"}, r"encode\.date None, got '2026-11-30'; .* the same --date"),
    ],
)
def test_rows_that_became_ids_otherwise_are_refused_by_name(encode, said):
    files = [{"settings": {"encode": {"max_length": 9, "chat": None} | x}} for x in ({}, encode)]
    sets = [rows(1)] * 2
    with pytest.raises(ValueError, match=f"b: expected pairs .* as those of a, with {said}"):
        check_alike(["a", "b"], sets, files)
    check_alike(["a", "b"], sets, [files[1], files[1]])
    # what a file does not say is the default
    check_alike(["a", "b"], sets, [files[0], {"settings": {"encode": {"turns": "assistant"}}}])


def test_streams_without_settings():
    bare, other = ({"streams": {"token_rewards": {"source": x}}} for x in "st")
    sets = [rows(1)] * 2
    check_alike(["a", "b"], sets, [bare, bare])
    with pytest.raises(ValueError, match=r"streams\.token_rewards\.source 's', got 't'"):
        check_alike(["a", "b"], sets, [bare, other])


def test_the_source_of_files_that_name_none():
    assert UNNAMED == DEFAULT_SOURCE
    assert {x.name for x in fields(EncodeOptions)} == {*ENCODED, "max_length", "columns"}


TOKENIZER = tiny_tokenizer()


def texts(count: int, start: int = 0) -> list[dict]:
    numbers = range(start, start + count)
    return [{"prompt": f"{i}?", "chosen": f"the {i}", "rejected": f"a {i}"} for i in numbers]


@pytest.fixture
def files(tmp_path):
    """Two files, of which the second has a broken line, and a saved data set, whose rows know no
    path.
    """
    paths = [tmp_path / "a,b.jsonl", tmp_path / "c.jsonl", tmp_path / "saved"]
    paths[0].write_text("".join(json.dumps(x) + "\n" for x in texts(3)))
    lines = [json.dumps(x) for x in texts(2, start=20)]
    paths[1].write_text("\n".join([lines[0], "{broken", lines[1]]))
    Dataset.from_list([*texts(1, start=40), {**texts(1)[0], "chosen": "a 0"}]).save_to_disk(
        str(paths[2])
    )
    return paths


def test_sources_are_read_one_after_the_other(files):
    pairs, report = load_sources(files, TOKENIZER, EncodeOptions())
    alone = [load_pairs(x, TOKENIZER, EncodeOptions())[0] for x in files]
    for pair, other in zip(pairs, [x for y in alone for x in y], strict=True):
        assert all((pair.example[k] == x).all() for k, x in other.example.items())
    assert [x.index for x in pairs] == [0, 1, 2, 3, 5, 6]
    lines = [f"{files[0]}:{i}" for i in (1, 2, 3)] + [f"{files[1]}:{i}" for i in (1, 3)]
    assert [x.row.where for x in pairs] == [*lines, f"{files[2]}:row 0"]
    assert (report.seen, report.kept) == (8, 6)
    assert report.sources == dict(zip(map(str, files), ([3, 3], [3, 2], [2, 1]), strict=True))
    for line in (f"{files[0]}: 3 of 3", f"{files[1]}:2: broken JSON", f"{files[2]}:row 1: identi"):
        assert line in str(report)
    report.late_problem(RowProblem("too long", "", pairs[3].row.where), truncated=False)
    assert report.kept == 5 and report.sources[str(files[1])] == [3, 1]
    limited, report = load_sources(files, TOKENIZER, EncodeOptions(), limit=1)
    assert len(limited) == report.seen == 3


def test_one_source_in_a_list_is_that_source(files):
    pairs, report = load_sources([files[1]], TOKENIZER, EncodeOptions())
    other, expected = load_pairs(files[1], TOKENIZER, EncodeOptions())
    assert report == expected and not report.sources and "sources" not in report.stored()
    assert [x.row for x in pairs] == [x.row for x in other]


def test_sources_that_cannot_be_read_are_named(files, tmp_path):
    empty, pipe = tmp_path / "empty.jsonl", tmp_path / "pipe.jsonl"
    empty.write_text("")
    os.mkfifo(pipe)
    for bad, message in (
        (empty, "empty.jsonl: data: expected at least one usable row"),
        (pipe, "expected a file or a folder, got .*pipe.jsonl, which is neither"),
        (files[0], "expected each source once"),
        (tmp_path, "in which it lies"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sources([files[0], bad], TOKENIZER, EncodeOptions())
    with pytest.raises(FileNotFoundError, match=r"data: no such file: .*none\.jsonl"):
        load_sources([files[0], tmp_path / "none.jsonl"], TOKENIZER, EncodeOptions())
    with pytest.raises(RowProblem, match=r"saved:row 1: identical"):
        load_sources([files[0], files[2]], TOKENIZER, EncodeOptions(), strict=True)

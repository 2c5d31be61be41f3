"""Files of marks that people made, in the generic format: what is read, and what is refused."""

import gzip
import json
import math

import pyarrow as pa
import pyarrow.parquet
import pytest
from tiny import bot, shared_data, tiny_tokenizer, usr

from treg.data import EncodeOptions, RowProblem, load_pairs
from treg.evaluate.documents import Mark
from treg.evaluate.place import responses, token_marks
from treg.evaluate.readers import READERS, read_marked, reader_options
from treg.rewards import Context, load_source
from treg.rewards.response import ResponsePairs

TEXT = "the old owl 🦊 said é: it is 42."
#       0   4   8   12 14     19 ...
OLD, FOX = (4, 7), (12, 13)


def read(row, *, text=TEXT, **options):
    """The one answer of a row."""
    given = {"prompt": "q", "answer": text} | (row if isinstance(row, dict) else {"spans": row})
    (answer,), _ = read_marked([given], "spans", options, strict=True)
    return answer


def refused(row, match, reason=None, **options):
    with pytest.raises(RowProblem, match=match) as found:
        read(row, **options)
    if reason:
        assert found.value.reason == reason


FORMS = {
    "pair": [[4, 7]],
    "label": [[4, 7, "bad"]],
    "number": [[4, 7, -0.5]],
    "object": [{"start": 4, "end": 7}],
    "severity": [{"start": 4, "end": 7, "severity": "bad"}],
    "type": [{"start": 4, "end": 7, "type": "bad", "explanation": "x"}],
    "error type": [{"start": 4, "end": 7, "error type": "bad"}],
    "category": [{"start": 4, "end": 7, "category": "bad", "label": None}],
    "text": [{"start": 4, "end": 7, "text": "old"}],
    "text alone": [{"text": "old", "label": "bad"}],
    "JSON": '[{"start": 4, "end": 7, "label": "bad"}]',
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_span(form):
    label = "bad" if "bad" in str(FORMS[form]) else ""
    assert read(FORMS[form]).marks == (Mark(*OLD, label),)


def test_a_row_by_hand():
    answer = read([[4, 7, "a"], [5, 11, "b"], [12, 13, 0.5]])
    assert answer.marks == (Mark(4, 7, "a"), Mark(5, 11, "b"), Mark(12, 13, wrong=False))
    assert (answer.prompt, answer.answer, answer.index) == ("q", TEXT, 0)
    assert answer.where == answer.document == "row 0" and answer.judged and not answer.unjudged
    assert read([]).marks == () and read([]).judged


BROKEN = {
    "past the end": (
        [[4, 99]],
        "bad span",
        r"spans\[0\]: .* <= end <= 31, got \[4, 99\]",
    ),
    "backwards": ([[7, 4]], "bad span", r"expected whole numbers 0 <= start <= end"),
    "below 0": ([[-1, 4]], "bad span", "expected whole numbers"),
    "a float": ([[4.0, 7]], "bad span", "expected whole numbers"),
    "a string": ([["4", "7"]], "bad span", "expected whole numbers"),
    "True": ([[True, 7]], "bad span", "expected whole numbers"),
    "no end": ([{"start": 4}], "bad span", "expected whole numbers"),
    "four": ([[4, 7, "a", "b"]], "bad span", r"expected \[start, end\]"),
    "text": (["old"], "bad span", r"expected \[start, end\]"),
    "two labels": ([{"start": 4, "end": 7, "type": "a", "severity": "b"}], "bad span", "one label"),
    "a label of numbers": ([{"start": 4, "end": 7, "label": 3}], "bad span", "text as its label"),
    "not a number": ([[4, 7, float("nan")]], "bad span", "finite number"),
    "other text": (
        [{"start": 4, "end": 7, "text": "owl"}],
        "other text marked",
        r"expected the text at \[4, 7\), 'old'",
    ),
    "text that is not there": ([{"text": "cat"}], "bad span", "a text that the answer has"),
    "text twice": ([{"text": "i"}], "bad span", "has twice"),
    "broken JSON": ("[[4, 7]", "broken JSON", "spans: "),
    "an object": ({"spans": {"start": [4], "end": [7]}}, "no spans", "expected a list of spans"),
    "a null": (
        {"spans": None},
        "no spans",
        "got null; say .* --format.nulls",
    ),
    "no column": ({"marks": [[4, 7]]}, "no column 'spans'", "with --format.column, and give"),
    "no answer": (
        {"answer": None, "spans": []},
        "no column 'answer'",
        "--format.columns answer=NAME",
    ),
    "an empty answer": ({"answer": " ", "spans": []}, "empty answer", "answer"),
    "a context": (
        {"context": "a passage", "spans": []},
        "unknown column 'context'",
        "--format.columns context=",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_refused_says_where_and_what(case):
    row, reason, match = BROKEN[case]
    refused(row, match, reason)


def test_offsets_in_other_units():
    """The fox is 4 bytes and 2 units of UTF-16, é 2 bytes and 1 unit."""
    for unit, (a, b), (c, d) in (
        ("characters", (12, 13), (19, 20)),
        ("bytes", (12, 16), (22, 24)),
        ("utf16", (12, 14), (20, 21)),
    ):
        assert [TEXT[x.start : x.end] for x in read([[a, b], [c, d]], offsets=unit).marks] == [
            "🦊",
            "é",
        ]
    refused([[12, 14]], r"expected an offset between two characters, got 14 bytes", offsets="bytes")
    assert read([[0, 35]], offsets="bytes").marks == (Mark(0, 31),)


def test_a_marked_text_tells_what_offsets_count():
    for start, end, hint in (
        (22, 24, "--format.offsets to bytes"),
        (20, 21, "--format.offsets to utf16"),
        (19, 19, "--format.inclusive"),
    ):
        refused([{"start": start, "end": end, "text": "é"}], hint, "other text marked")
    refused([{"start": 4, "end": 7, "text": 5}], "expected text as the marked text")
    assert read([{"start": 4, "end": 6, "text": "old"}], inclusive=True).marks == (Mark(*OLD),)


def test_keys_and_columns_by_other_names():
    row = {"prompt": None, "question": "q", "text": TEXT, "errors": [{"begin": 4, "stop": 7}]}
    row.pop("prompt")
    found, _ = read_marked(
        [row],
        "spans",
        {"columns": "answer=text", "column": "errors", "keys": ["start=begin", "end=stop"]},
    )
    assert found[0].marks == (Mark(*OLD),) and found[0].prompt == "q"
    # of two labels one is chosen
    span = {"start": 4, "end": 7, "severity": "major", "category": "fact"}
    assert read([span], keys={"label": "category"}).marks[0].label == "fact"
    refused([span], "one label")


def test_labels_that_say_right_or_nothing():
    answer = read(
        [[0, 3, "good"], [4, 7, "bad"], [8, 11, "unclear"]], right=["good"], skip=["unclear"]
    )
    assert answer.marks == (Mark(0, 3, "good", wrong=False), Mark(4, 7, "bad"))
    assert answer.unjudged == ((8, 11),)


def test_nulls():
    answer = read({"spans": None}, nulls="right")
    assert answer.judged and not answer.marks
    assert not read({"spans": None}, nulls="unjudged").judged


def test_marks_of_nothing_are_counted():
    rows = [{"answer": "abc", "spans": [[1, 1], [0, 2], [0, 1, 0]]}]
    (answer,), report = read_marked(rows, "spans")
    assert answer.marks == (Mark(0, 2),)
    assert report.noted == {"a mark of nothing": 2} and report.kept == 1
    # what was noted of a row that is then refused is said of no other
    refused_row = {"prompt": "q", "answer": "abc", "spans": [[1, 1], [5, 9]]}
    _, report = read_marked([refused_row, {"answer": "abc", "spans": []}], "spans")
    assert report.kept == 1 and report.dropped == {"bad span": 1} and not report.noted


def test_rows_of_one_id_are_one_document(tmp_path):
    rows = [{"id": x, "answer": "abc", "spans": []} for x in (7, 7, None, "")]
    no_numbers = [{"id": math.nan, "answer": "abc", "spans": []}] * 2
    assert [x.document for x in read_marked(no_numbers, "spans")[0]] == ["row 0", "row 1"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = read_marked(file, "spans")
    assert [x.document for x in found] == ["a.jsonl#7", "a.jsonl#7", "a.jsonl:3", "a.jsonl:4"]
    assert found[2].where == f"{file}:3"
    other = tmp_path / "b.jsonl"
    other.write_bytes(file.read_bytes())
    both, _ = read_marked([file, str(other)], "spans")
    assert len({x.document for x in both}) == 6
    assert [x.index for x in both] == list(range(8))
    # a document keeps its name, and with it its half, wherever its file lies
    moved = tmp_path / "folder" / "a.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    for source in (moved, moved.parent, str(moved.parent)):
        again, _ = read_marked(source, "spans")
        assert [x.document for x in again] == [x.document for x in found]
    # of two files with one name the folders tell the documents apart
    both, _ = read_marked([file, moved], "spans")
    assert len({x.document for x in both}) == 6
    by_answer, _ = read_marked(file, "spans", {"document": "none"})
    assert len({x.document for x in by_answer}) == 4


def written(rows, ending):
    lines = ending.join(json.dumps(row, ensure_ascii=False) for row in rows)
    return (lines + ending).encode()


def test_files_as_people_have_them(tmp_path):
    """A byte order mark, CRLF between rows, gzip, one JSON list, parquet with nulls."""
    rows = [
        {"prompt": "q", "answer": "a\r\nb 🦊", "spans": [{"start": 3, "end": 4, "label": None}]},
        {"prompt": "q", "answer": "c", "spans": [{"start": 0, "end": 1, "label": "x"}]},
    ]
    files = {
        "bom.jsonl": b"\xef\xbb\xbf" + written(rows, "\n"),
        "crlf.jsonl": written(rows, "\r\n"),
        "z.jsonl.gz": gzip.compress(written(rows, "\n")),
        "list.json": json.dumps(rows).encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in (*files, "t.parquet"):
        found, _ = read_marked(tmp_path / name, "spans")
        assert [x.marks for x in found] == [(Mark(3, 4),), (Mark(0, 1, "x"),)], name
        assert found[0].answer[3] == "b"


def test_an_empty_file_and_one_without_a_usable_row(tmp_path):
    file = tmp_path / "empty.jsonl"
    file.write_text("")
    with pytest.raises(ValueError, match="rows with marked answers, found none: there is no row"):
        read_marked(file, "spans")
    file.write_text('{"answer": "abc", "spans": [[0, 9]]}\n{"answer"\n')
    with pytest.raises(ValueError, match="dropped 1: bad span") as error:
        read_marked(file, "spans")
    assert f"{file}:1: bad span: spans[0]" in str(error.value)
    assert f"{file}:2: broken JSON" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_marked(tmp_path / "none.jsonl", "spans")


def test_forms_of_the_prompt():
    """What it is in a row of preferences; the answer may be the dialogue's last turn."""
    asked = [usr("q"), bot("a"), usr("r")]
    assert read({"prompt": asked, "spans": []}).prompt == asked
    assert read({"prompt": json.dumps(asked), "spans": []}).prompt == asked
    assert read({"prompt": "q", "system": "s", "spans": []}).prompt[0]["role"] == "system"
    assert read({"prompt": "q", "input": "more", "spans": []}).prompt == "q\nmore"
    rows = [{"messages": [*asked, bot(TEXT)], "spans": [[4, 7]]}]
    (answer,), _ = read_marked(rows, "spans")
    assert answer.prompt == asked and answer.answer == TEXT
    rows = [{"answer": [bot(TEXT)], "spans": [[4, 7]]}]
    (answer,), _ = read_marked(rows, "spans")
    assert answer.prompt == "" and answer.answer == TEXT
    refused({"answer": [bot("a"), usr("b"), bot("c")], "spans": []}, "got 3 messages")
    refused({"answer": [bot("a", reasoning_content="b")], "spans": []}, "reasoning_content too")


PAIR = {"prompt": "q", "chosen": "the fox", "rejected": "the old owl"}


def test_a_preference():
    rows = [PAIR | {"rejected_spans": [[4, 7, "x"]], "chosen_spans": []}]
    (chosen, rejected), _ = read_marked(rows, "spans", strict=True)
    assert rejected.marks == (Mark(4, 7, "x"),) and not chosen.marks
    assert (chosen.side, rejected.side) == ("chosen", "rejected")
    assert chosen.pair == rejected.pair and chosen.preferred and not rejected.preferred
    assert chosen.judged and chosen.document == rejected.document and chosen.index == 0
    # one side was judged by nobody
    (chosen, rejected), _ = read_marked([PAIR | {"rejected_spans": []}], "spans", strict=True)
    assert not chosen.judged and rejected.judged
    with pytest.raises(RowProblem, match="no column 'rejected_spans': nor 'chosen_spans'"):
        read_marked([PAIR], "spans", strict=True)
    with pytest.raises(RowProblem, match="identical completions"):
        read_marked([PAIR | {"rejected": "the fox", "chosen_spans": []}], "spans", strict=True)


DIALOGUE = "\n\nHuman: q?\n\nAssistant:"
DIALOGUES = {
    "text": ({}, "q"),
    "blanks": ({"chosen": "  the old owl"}, "q"),
    "turns": ({}, DIALOGUE),
    "turns and blanks": ({"chosen": "  the old owl\n"}, DIALOGUE),
    "whole dialogues": ({"chosen": f"{DIALOGUE} the old owl", "rejected": f"{DIALOGUE} no"}, None),
    "messages": ({"chosen": [bot("the old owl")], "rejected": [bot("no")]}, [usr("q")]),
    "a system turn": ({"system": "s"}, "q"),
    "a system turn before turns": ({"system": "s", "chosen": "  the old owl "}, DIALOGUE),
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("case", DIALOGUES)
def test_offsets_are_those_of_the_source_spans(case, plain):
    """Whatever the row, the tokens that the source `spans` gives a value are the ones that are
    wrong, and the ids are annotate's.
    """
    tokenizer = tiny_tokenizer(chat=not plain)
    more, prompt = DIALOGUES[case]
    row = {"prompt": prompt, "chosen": "the old owl", "rejected": "no"} | more
    if plain and (isinstance(row["prompt"], list) or "system" in row):
        pytest.skip("needs a chat template")
    counted = row["chosen"] if isinstance(row["chosen"], str) else "the old owl"
    counted = counted.removeprefix(DIALOGUE).strip() if prompt is None else counted
    start = counted.index("old")
    row |= {"chosen_spans": [[start, start + 3]]}
    row = {k: v for k, v in row.items() if v is not None}
    (answer, other), _ = read_marked([row], "spans", strict=True)
    found = responses([answer, other], tokenizer)[0]
    pairs, _ = load_pairs([row], tokenizer, EncodeOptions(), strict=True)
    wanted = ResponsePairs(pairs, tokenizer)[0][0]
    assert found.ids.tolist() == wanted.ids.tolist()
    assert found.prompt_ids.tolist() == wanted.prompt_ids.tolist()
    source = load_source("spans", {"inside": -1.0}, Context(None, tokenizer))
    assert source.check(wanted) is None
    (rewards,) = source.score([wanted])
    wrong = token_marks(found, answer).wrong
    assert wrong.any() and wrong.tolist() == (rewards["token_rewards"] == -1).tolist()


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"expected one of finegrained, .*'span'; did you mean"):
        reader_options("span")
    with pytest.raises(ValueError, match=r"format.colum: the format 'spans' has no such option"):
        reader_options("spans", {"colum": "x"})
    with pytest.raises(ValueError, match=r"format.column: expected text, got 3"):
        reader_options("spans", {"column": 3})
    for name, value in (
        ("offsets", "words"),
        ("nulls", "no"),
        ("side_column", "spans"),
        ("keys", "begin=start"),
        ("columns", "a"),
    ):
        with pytest.raises(ValueError, match="expected"):
            reader_options("spans", {name: value})
    with pytest.raises(ValueError, match="limit: expected a positive number"):
        read_marked([PAIR], "spans", limit=0)


@pytest.mark.parametrize("form", list(READERS))
def test_every_option_says_what_it_is(form):
    for x in READERS[form].Options.__dataclass_fields__.values():
        assert x.metadata["help"].endswith("."), x.name


def test_a_limit_and_strictness():
    rows = [{"answer": "abc", "spans": []}, {"answer": "abc"}, {"answer": "abc", "spans": []}]
    found, report = read_marked(rows, "spans", limit=2)
    assert len(found) == 1 and (report.seen, report.kept) == (2, 1)
    with pytest.raises(RowProblem, match="row 1: no column 'spans'"):
        read_marked(rows, "spans", strict=True)


def test_real_answers_of_the_generic_format():
    """FineGrainedRLHF's own spans go through the generic reader without a change of code."""
    file = shared_data("credit", "finegrained-rlhf", "dev_feedback.json")
    rows = json.loads(file.read_text())[:50]
    given = [
        {"question": x["question"], "prediction 1": x["prediction 1"], "e": x["feedback"]["errors"]}
        for x in rows
    ]
    options = {"columns": {"answer": "prediction 1"}, "column": "e"}
    found, _ = read_marked(given, "spans", options, strict=True)
    native, _ = read_marked(rows, "finegrained", {"pairs": "none"}, strict=True)
    assert [x.marks for x in found] == [x.marks for x in native]

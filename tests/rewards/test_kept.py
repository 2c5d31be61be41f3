"""Columns of the source that are passed on into the annotated file."""

import pyarrow.parquet as pq
import pytest
from tiny import tiny_llama, tiny_tokenizer

import treg.rewards.annotate
from treg.data import RowProblem
from treg.data.annotated import read_annotated, read_meta
from treg.rewards.annotate import AnnotateOptions, annotate

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
COLUMNS = {
    "chosen_safe": [True, False, True],
    "margin": [1, 2.5, 3],
    "source": ["a", "b", ""],
    "votes": [[1, 2], [], [3]],
    "tags": [["x"], ["y", "z"], []],
}


def rows(**columns):
    texts = [("is old", "was"), ("the sun and the moon", "no"), ("42", "the owl said")]
    return [
        {"prompt": "the fox?", "chosen": chosen, "rejected": rejected}
        | {name: values[i] for name, values in columns.items()}
        for i, (chosen, rejected) in enumerate(texts)
    ]


def run(path, data, *names, **more):
    options = AnnotateOptions(keep_columns=names, rewards="constant", reference=False)
    return annotate(MODEL, TOKENIZER, data, path, options, progress=False, **more)


def test_columns_are_kept_in_their_order_and_types(tmp_path, monkeypatch):
    monkeypatch.setattr(treg.rewards.annotate, "PART_PAIRS", 1)  # types are those of all parts
    run(tmp_path / "a.parquet", rows(**COLUMNS), *COLUMNS)
    examples, meta = read_annotated(tmp_path / "a.parquet")
    for name, values in COLUMNS.items():
        found = [x[name] for x in examples]
        assert [x.tolist() if hasattr(x, "tolist") else x for x in found] == values
    kinds = {x.name: str(x.type) for x in pq.read_schema(tmp_path / "a.parquet")}
    assert [kinds[name] for name in COLUMNS][:3] == ["bool", "double", "string"]
    assert meta["settings"]["keep_columns"] == list(COLUMNS)


def test_without_it_a_file_is_what_it_was(tmp_path):
    run(tmp_path / "a.parquet", rows(**COLUMNS))
    meta = read_meta(tmp_path / "a.parquet")
    assert "keep_columns" not in meta["settings"] and "columns" not in meta["fingerprint"]
    assert "margin" not in read_annotated(tmp_path / "a.parquet")[0][0]


def test_rows_that_lack_a_column_are_counted(tmp_path):
    data = rows(margin=[1.0, None, 2.0], source=["a", "b", "c"])
    del data[2]["margin"]
    report = run(tmp_path / "a.parquet", data, "margin")
    assert report.kept == 1 and report.dropped == {"no column 'margin'": 2}
    assert sorted(report.examples["no column 'margin'"]) == [
        "row 1: no column 'margin': the other columns are margin, source",
        "row 2: no column 'margin': the other columns are source",
    ]
    (example,), _ = read_annotated(tmp_path / "a.parquet")
    assert example["margin"] == 1.0
    with pytest.raises(RowProblem, match=r"row \d: no column 'margin'"):
        run(tmp_path / "b.parquet", data, "margin", strict=True)


def test_columns_that_no_row_has_are_named_before_anything_is_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(treg.rewards.annotate, "annotate_pairs", pytest.fail)
    data = rows(margin=[1.0, None, 2.0], source=["a", "b", "c"])
    for names, message in (
        (["margn"], "expected, to be kept, the column margn, "),
        (["a", "source", "b"], "expected, to be kept, the columns a, b, "),
    ):
        with pytest.raises(ValueError, match=f"data: {message}found margin, source beside"):
            run(tmp_path / "c.parquet", data, *names)
    with pytest.raises(ValueError, match=r"data: .*margin.*found none beside"):
        run(tmp_path / "c.parquet", rows(), "margin")


BROKEN = {
    "null": ([[1, 2], [3, None], [4]], "null in column 'x'", "expected a value in every place"),
    "nulls": ([[1], [None], []], "null in column 'x'", "got [None]"),
    "surrogate": (["a", "b\ud800", "c"], "broken text in column 'x'", r"got 'b\ud800'"),
    "surrogates": ([["a"], ["b", "\udfff"], []], "broken text in column 'x'", "UTF-8 can hold"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_rows_whose_column_cannot_be_kept_are_counted(case, tmp_path):
    column, reason, detail = BROKEN[case]
    report = run(tmp_path / "a.parquet", rows(x=column), "x")
    assert report.kept == 2 and report.dropped == {reason: 1}
    (example,) = report.examples[reason]
    assert example.startswith("row 1: ") and detail in example
    found = [x["x"] for x in read_annotated(tmp_path / "a.parquet")[0]]
    assert [x.tolist() if hasattr(x, "tolist") else x for x in found] == [column[0], column[2]]
    with pytest.raises(RowProblem, match=f"row 1: {reason}"):
        run(tmp_path / "b.parquet", rows(x=column), "x", strict=True)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([{"a": 1}, {"a": 2}, {"a": 3}], "numbers, strings or lists of them in 'x', got struct"),
        ([[[1]], [[2]], [[3]]], "numbers, strings or lists of them in 'x', got list<.*list"),
        ([1, "a", 2], "expected values of one type in 'x', got: "),
        ([1, 2**70, 2], "expected values of one type in 'x', got: "),
    ],
)
def test_columns_that_cannot_be_kept(tmp_path, column, message):
    with pytest.raises(ValueError, match=f"keep_columns: .*{message}"):
        run(tmp_path / "a.parquet", rows(x=column), "x")


@pytest.mark.parametrize(
    "name",
    [
        *("index", "chosen_ids", "rejected_token_rewards", "chosen_marks", "ref_chosen_logps"),
        *("prompt", "tools"),
    ],
)
def test_names_that_cannot_be_kept(name):
    with pytest.raises(ValueError, match=f"keep_columns: expected columns beside .*got '{name}'"):
        AnnotateOptions(keep_columns=("margin", name))
    with pytest.raises(ValueError, match=f"keep_columns: expected a list of columns, got '{name}'"):
        AnnotateOptions(keep_columns=name)
    with pytest.raises(ValueError, match="keep_columns: expected each column once"):
        AnnotateOptions(keep_columns=("margin", "margin"))


@pytest.mark.parametrize(
    ("data", "names", "changed"),
    [
        (rows(margin=[1, 2, 4]), ["margin"], "columns"),
        (rows(margin=[1, 2, 3]), [], "keep_columns"),
    ],
)
def test_other_columns_make_another_file(tmp_path, data, names, changed):
    run(tmp_path / "a.parquet", rows(margin=[1, 2, 3]), "margin")
    run(tmp_path / "a.parquet", rows(margin=[1, 2, 3]), "margin")
    with pytest.raises(ValueError, match=rf"a\.parquet: made with {changed} .*, now it is"):
        run(tmp_path / "a.parquet", data, *names)

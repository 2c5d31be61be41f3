"""Runs of templates that ask for the day: the same command goes on the next day, and a changed row
is named.
"""

import datetime
import json
import types

import pytest
from tiny import CHATML, tiny_llama, tiny_tokenizer, with_template

from treg.cli import runs
from treg.data import EncodeOptions, pair
from treg.data.annotated import read_annotated
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.parts import Parts

DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
ROWS = [
    {"prompt": f"{i}?", "chosen": f"the owl {'is ' * i}old", "rejected": "no"} for i in range(4)
]
OPTIONS = AnnotateOptions(EncodeOptions(256), rewards="surprise")
TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))


@pytest.fixture
def on(monkeypatch):
    """Calls: (YYYY-MM-DD) -> from now on it is that day."""

    def set_day(text):
        class Day(datetime.date):
            @classmethod
            def today(cls):
                return datetime.date.fromisoformat(text)

        for module in (pair, runs):
            monkeypatch.setattr(module, "datetime", types.SimpleNamespace(date=Day))

    return set_day


class Stopped(BaseException):
    pass


def run_until_a_part_is_there(output, monkeypatch):
    confirm = Parts.confirm

    def stop(parts, number):
        confirm(parts, number)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Parts, "confirm", stop)
        run(output)


def run(output, rows=ROWS, options=OPTIONS):
    return annotate(MODEL, with_template(DATED), rows, output, options, progress=False)


def test_a_finished_file_is_the_same_the_next_day(tmp_path, on):
    output = tmp_path / "a.parquet"
    on("2024-07-26")
    report = run(output)
    on("2024-07-27")
    assert run(output) == report
    run(tmp_path / "b.parquet")
    begins = []
    for name in "ab":
        example = read_annotated(tmp_path / f"{name}.parquet")[0][0]
        begins.append(example["prompt_text"][:11])
    assert begins == ["26 Jul 2024", "27 Jul 2024"]


def test_parts_go_on_the_next_day(tmp_path, on, monkeypatch):
    on("2024-07-26")
    monkeypatch.setattr("treg.rewards.annotate.PART_PAIRS", 2)
    run(tmp_path / "whole.parquet")
    run_until_a_part_is_there(tmp_path / "a.parquet", monkeypatch)
    on("2024-07-27")
    run(tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_day_that_is_given_is_another(tmp_path, on):
    on("2024-07-26")
    run(tmp_path / "a.parquet")
    other = AnnotateOptions(EncodeOptions(256, date="2024-07-27"), rewards="surprise")
    with pytest.raises(ValueError, match=r"made with encode .*2024-07-26.* now it is .*07-27"):
        run(tmp_path / "a.parquet", options=other)


def test_a_changed_row_is_named(tmp_path, on, monkeypatch):
    """In a finished file and in parts: which row, what it said, and what it says."""
    on("2024-07-26")
    run(tmp_path / "a.parquet")
    changed = json.loads(json.dumps(ROWS))
    changed[3]["chosen"] = "the owl is happy and old"
    message = r"made with pairs .*; row 3: chosen_ids had '.* is old.*' where '.* happy.*' is now"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.parquet", changed)
    monkeypatch.setattr("treg.rewards.annotate.PART_PAIRS", 4)
    run_until_a_part_is_there(tmp_path / "b.parquet", monkeypatch)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "b.parquet", changed)
    with pytest.raises(ValueError, match=r"made with pairs .*; row 3 is not among the rows now"):
        run(tmp_path / "a.parquet", ROWS[:3])


def test_a_training_run_keeps_the_day_on_which_it_began(tmp_path, on):
    on("2024-07-26")
    assert runs.claim_run(tmp_path / "o", {"beta": 0.1}) == "2024-07-26"
    on("2024-07-27")
    assert runs.claim_run(tmp_path / "o", {"beta": 0.1}) == "2024-07-26"
    assert runs.claim_run(tmp_path / "p", {"beta": 0.1}) == "2024-07-27"
    options = EncodeOptions(256).dated(with_template(DATED), "2024-07-26")
    assert options.date == "2024-07-26"
    assert EncodeOptions(256).dated(tiny_tokenizer(), "2024-07-26").date is None
    given = EncodeOptions(256, date="2024-01-01")
    assert given.dated(with_template(DATED), "2024-07-26").date == "2024-01-01"

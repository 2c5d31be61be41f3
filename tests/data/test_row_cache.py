"""Rows that are kept as they are encoded, and encoded by several processes: the same as anew."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import logging
import multiprocessing
import pickle
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from pathlib import Path

import pytest
from tiny import CHATML, bot, tiny_tokenizer, usr, with_template

from treg.data import EncodeOptions, EncodeWork, RowProblem, load_pairs, workers
from treg.data import row_cache as caches
from treg.data.encode import _Encoder

DATED = CHATML + "{% if false %}{{ strftime_now('%d') }}{% endif %}"


def rows_of(count):
    """Text, turns of others within an answer, rows that cannot be used, and other columns."""
    rows = []
    for i in range(count):
        row: dict[str, object] = {
            "prompt": f"The fox {i}",
            "chosen": f"the sun {i}",
            "rejected": "the\nmoon 🙂",
        }
        if i % 4 == 1:
            turns = [bot("a wood"), usr("and the owl?"), bot(f"says {i}")]
            row = {"prompt": [usr(f"q {i}")], "chosen": turns, "rejected": [bot("no")]}
        if i % 4 == 2:
            row["rejected"] = row["chosen"]
        if i % 4 == 3:
            row |= {"rejected": "so long " * 30, "score": i}
        rows.append(row)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(found):
    """All that load_pairs says of rows."""
    pairs, report = found
    every = []
    for pair in pairs:
        answers = {
            side: (x.scored.tolist(), x.content.tolist(), x.said)
            for side, x in pair.answers.items()
        }
        ids = [x.tolist() for x in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
        arrays = (pair.prompt_ids, pair.answers["chosen"].scored)
        kinds = [(x.dtype, x.flags.writeable) for x in arrays]
        row = dataclasses.asdict(pair.row)
        every.append((ids, kinds, row, pair.index, pair.cut, pair.truncated, answers))
    return every, dataclasses.asdict(report)


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of the rows that are encoded, and not found."""
    found, own = [], _Encoder.encoded

    def counted(self, rows):
        found.extend(index for index, _ in rows)
        return own(self, rows)

    monkeypatch.setattr(_Encoder, "encoded", counted)
    return found


def load(source, folder, options=None, tokenizer=None, **more):
    more.setdefault("work", EncodeWork(cache=folder))
    return load_pairs(source, tokenizer or tiny_tokenizer(), options or EncodeOptions(60), **more)


def test_kept_rows_are_those_that_are_encoded_anew(tmp_path, encoded):
    source = write(tmp_path / "a.jsonl", rows_of(12))
    expected = said(load(source, None))
    assert any(pair[4] for pair in expected[0])  # some are cut
    assert not all(pair[6]["chosen"][0] == pair[6]["chosen"][1] for pair in expected[0])
    assert said(load(source, tmp_path / "c")) == expected
    encoded.clear()
    assert said(load(source, tmp_path / "c")) == expected
    assert encoded == []
    # a row that is changed is encoded again, and no other
    rows = rows_of(14)
    rows[3]["chosen"] = "another answer"
    changed = write(source, rows)
    assert said(load(changed, tmp_path / "c")) == said(load(changed, None))
    assert set(encoded[:3]) == {3, 12, 13}
    encoded.clear()
    load(changed, tmp_path / "c")
    assert encoded == []
    load(changed, tmp_path / "c", limit=5)
    assert encoded == []


def test_halves_of_characters_and_what_json_cannot_hold(tmp_path):
    half = "\ud83d" + "x" * 3000  # beyond what is tokenized of an answer
    rows = [
        {"prompt": "p", "chosen": "a " * 30_000 + half, "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "score": 2},
    ]
    source = write(tmp_path / "a.jsonl", rows)
    expected = said(load(source, None))
    for _ in range(2):
        assert said(load(source, tmp_path / "c")) == expected
    parsed = dataclasses.replace(load(source, None)[0][0].row, tools=[object()])
    assert caches.row_digest(parsed) is None


def other_vocabulary():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    return tokenizer


def split_tokens():
    tokenizer = tiny_tokenizer()
    tokenizer.split_special_tokens = True
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": other_vocabulary},
        {"tokenizer": lambda: tiny_tokenizer(crossing=True)},
        {"tokenizer": lambda: with_template(CHATML + "\n")},
        {"options": EncodeOptions(61)},
        {"options": EncodeOptions(60, turns="all")},
        {"options": EncodeOptions(60, chat=True)},
        {"tokenizer": split_tokens},
        {"code": True},
    ],
    ids=["vocabulary", "merges", "template", "length", "turns", "chat", "split", "code"],
)
def test_whatever_changes_the_tokens_encodes_all_again(tmp_path, encoded, monkeypatch, change):
    source = write(tmp_path / "a.jsonl", rows_of(2))
    load(source, tmp_path / "c")
    encoded.clear()
    if change.pop("code", None):
        monkeypatch.setattr(caches, "_code_digest", lambda: "other")
    tokenizer = change.pop("tokenizer", tiny_tokenizer)()
    load(source, tmp_path / "c", tokenizer=tokenizer, **change)
    assert encoded == [0, 1]


def test_the_day_and_the_data_are_told_apart(tmp_path, encoded):
    tokenizer = with_template(DATED)
    source = write(tmp_path / "a.jsonl", rows_of(2))
    for date, split, path, again in [
        ("2026-01-01", "train", source, True),
        ("2026-01-01", "train", source, False),
        ("2026-01-02", "train", source, True),
        ("2026-01-01", "train", write(tmp_path / "b.jsonl", rows_of(2)), True),
        ("2026-01-01", "train", source, False),
    ]:
        encoded.clear()
        load(path, tmp_path / "c", EncodeOptions(60, date=date), tokenizer, split=split)
        assert bool(encoded) == again
    # the code's digest is of the code itself
    assert caches._code_digest() != caches.digest_of([{}, {}])


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "foreign", "text"])
def test_a_damaged_or_foreign_file_is_named_and_made_again(tmp_path, encoded, caplog, damage):
    source = write(tmp_path / "a.jsonl", rows_of(2))
    expected = said(load(source, tmp_path / "c"))
    (file,) = (tmp_path / "c").glob("*.rows")
    content = bytearray(file.read_bytes())
    if damage == "byte":
        content[len(content) // 2] ^= 1
    elif damage == "foreign":
        load(source, tmp_path / "d", EncodeOptions(61))
        (other,) = (tmp_path / "d").glob("*.rows")
        content = other.read_bytes()
    else:
        content = {"cut": content[:-100], "empty": b"", "text": b"{}"}[damage]
    file.write_bytes(content)
    encoded.clear()
    assert said(load(source, tmp_path / "c")) == expected
    assert encoded == [0, 1] and str(file) in caplog.text
    encoded.clear()
    caplog.clear()
    load(source, tmp_path / "c")
    assert encoded == [] and not caplog.text


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    source = write(tmp_path / "a.jsonl", rows_of(2))
    (tmp_path / "file").write_text("")
    assert said(load(source, tmp_path / "file" / "c")) == said(load(source, None))
    assert "not kept" in caplog.text


def test_nothing_is_kept_of_what_has_no_name(tmp_path):
    load(rows_of(4), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def stop(source, folder, at_work):
    """At work on rows until it is killed."""

    def encode(self, rows):
        at_work.set()
        time.sleep(60)
        return []

    _Encoder.encoded = encode
    load(source, folder)


def test_a_killed_process_leaves_nothing_and_frees_those_that_wait(tmp_path, encoded, caplog):
    source, folder = write(tmp_path / "a.jsonl", rows_of(2)), tmp_path / "c"
    expected = said(load(source, None))
    encoded.clear()
    fork = multiprocessing.get_context("fork")
    at_work = fork.Event()
    first = fork.Process(target=stop, args=(source, folder, at_work), daemon=True)
    first.start()
    assert at_work.wait(60)
    start = time.monotonic()
    threading.Timer(0.5, first.kill).start()
    assert said(load(source, folder)) == expected
    assert time.monotonic() - start >= 0.5  # it waited
    assert "waiting for another process" in caplog.text
    assert encoded == [0, 1]
    first.join()
    assert sorted(x.suffix for x in folder.iterdir()) == [".lock", ".rows"]


def test_the_first_process_writes_and_the_others_read(tmp_path, encoded):
    source, folder = write(tmp_path / "a.jsonl", rows_of(2)), tmp_path / "c"
    came = []
    others = EncodeWork(cache=folder, first=False, wait=lambda: came.append("other"))
    load(source, folder, work=others)
    assert encoded == [0, 1] and not list(folder.glob("*.rows"))
    load(source, folder, work=EncodeWork(cache=folder, wait=lambda: came.append("first")))
    encoded.clear()
    load(source, folder, work=others)
    assert encoded == [] and came == ["other", "first", "other"]


def test_what_was_being_written_when_a_process_was_killed_is_removed(tmp_path):
    source, folder = write(tmp_path / "a.jsonl", rows_of(2)), tmp_path / "c"
    load(source, folder)
    (file,) = folder.glob("*.rows")
    file.rename(f"{file}.treg-1.tmp")
    load(source, folder)
    assert sorted(x.suffix for x in folder.iterdir()) == [".lock", ".rows"]


@pytest.mark.parametrize("stop", ["strict", "interrupt"])
def test_what_was_encoded_before_an_error_is_kept(tmp_path, encoded, monkeypatch, stop):
    monkeypatch.setattr(sys.modules["treg.data.encode"], "ROWS_TOGETHER", 2)
    rows = [row for row in rows_of(16) if row["rejected"] != row["chosen"]]
    source, folder = write(tmp_path / "a.jsonl", rows[:4]), tmp_path / "c"
    load(source, folder)
    bad = {**rows[0], "rejected": rows[0]["chosen"]}
    write(source, [*rows[4:10], bad, *rows[:4]])

    def interrupt(_):
        if encoded[-1] == 5:
            raise KeyboardInterrupt

    errors = {"strict": RowProblem, "interrupt": KeyboardInterrupt}
    more = {"strict": {"strict": True}, "interrupt": {"on_rows": interrupt}}
    with pytest.raises(errors[stop]):
        load(source, folder, **more[stop])
    assert sorted(x.suffix for x in folder.iterdir()) == [".lock", ".rows"]
    encoded.clear()
    assert said(load(source, folder)) == said(load(source, None))
    # the first load encoded none: those of before were kept as well
    assert encoded == [*range(6), *range(7, 11)]


def test_a_limit_throws_nothing_away(tmp_path, encoded):
    rows = rows_of(12)
    source = write(tmp_path / "a.jsonl", rows)
    load(source, tmp_path / "c")
    rows[0]["chosen"] = "another answer"
    write(source, rows)
    load(source, tmp_path / "c", limit=2)
    encoded.clear()
    load(source, tmp_path / "c")
    assert encoded == []
    # without one, rows that are in the source no more are dropped
    load(write(source, [{**rows[0], "chosen": "a third"}]), tmp_path / "c")
    encoded.clear()
    load(write(source, rows), tmp_path / "c")
    assert encoded == [i for i in range(12) if i == 0 or i % 4 != 2]


def test_one_source_has_one_file_by_whatever_path_or_names_of_columns(
    tmp_path, encoded, monkeypatch
):
    source = write(tmp_path / "a.jsonl", rows_of(2))
    load(source, tmp_path / "c")
    encoded.clear()
    monkeypatch.chdir(tmp_path)
    for same in ("a.jsonl", Path("./a.jsonl"), tmp_path / ".." / tmp_path.name / "a.jsonl"):
        load(same, tmp_path / "c")
    renamed = [{**row, "question": row.pop("prompt")} for row in rows_of(2)]
    write(source, renamed)
    load(source, tmp_path / "c", EncodeOptions(60, columns={"prompt": "question"}))
    assert encoded == []
    # a file of that name elsewhere is another
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path / "d")
    load(write(Path("a.jsonl"), rows_of(2)).name, tmp_path / "c")
    assert len(list((tmp_path / "c").glob("*.rows"))) == 2


def test_how_a_tokenizer_was_called_last_changes_nothing(tmp_path, encoded):
    source = write(tmp_path / "a.jsonl", rows_of(2))
    tokenizer = tiny_tokenizer()
    load(source, tmp_path / "c", tokenizer=tokenizer)
    encoded.clear()
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    load(source, tmp_path / "c", tokenizer=tokenizer)
    assert encoded == []


def test_no_process_sits_at_the_barrier_while_another_run_is_at_work(tmp_path, encoded):
    source, folder = write(tmp_path / "a.jsonl", rows_of(2)), tmp_path / "c"
    load(source, folder)
    (file,) = folder.glob("*.rows")
    expected = said(load(source, None))
    met = threading.Event()
    barrier = threading.Barrier(2, action=met.set)
    work = EncodeWork(cache=folder, wait=lambda: barrier.wait(20), run="a")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with caches._lock(file.with_suffix(".lock"), logging.WARNING):
            file.unlink()
            encoded.clear()
            both = [
                pool.submit(load, source, folder, work=dataclasses.replace(work, first=first))
                for first in (True, False)
            ]
            assert met.wait(20)
            time.sleep(0.1)
            assert encoded == [] and not any(x.done() for x in both)
        assert [said(x.result(20)) for x in both] == [expected] * 2
    assert encoded == [0, 1]
    assert sorted(x.suffix for x in folder.iterdir()) == [".lock", ".rows"]


def test_runs_that_start_together_encode_once(tmp_path, encoded):
    source = write(tmp_path / "a.jsonl", rows_of(2))
    expected = said(load(source, None))
    starts = list(itertools.permutations([("a", True), ("a", False), ("b", True), ("b", False)]))
    for k, order in enumerate(starts):
        encoded.clear()
        barriers = {"a": threading.Barrier(2), "b": threading.Barrier(2)}
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = []
            for run, first in order:
                barrier = barriers[run]
                wait = lambda barrier=barrier: barrier.wait(20)  # noqa: E731
                work = EncodeWork(cache=tmp_path / str(k), first=first, wait=wait, run=run)
                found.append(pool.submit(load, source, None, work=work))
            assert [said(x.result(20)) for x in found] == [expected] * 4
        assert encoded == [0, 1]


def test_what_is_read_is_mapped_and_let_go(tmp_path):
    source = write(tmp_path / "a.jsonl", rows_of(4))
    load(source, tmp_path / "c")
    (file,) = (tmp_path / "c").glob("*.rows")

    def mapped(_=None):
        seen.append(str(file) in Path("/proc/self/maps").read_text())

    seen: list[bool] = []
    found = load(source, tmp_path / "c", on_rows=mapped)
    mapped()
    assert seen == [True, False] and found[0]


def test_files_of_other_code_are_removed_and_no_others(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", rows_of(2))
    load(source, tmp_path)
    kept = {x.name for x in tmp_path.iterdir()}
    monkeypatch.setattr(caches, "_code_digest", lambda: "before")
    load(source, tmp_path)
    monkeypatch.undo()
    mine = {"mine.rows": b"", "other.rows": b"mine"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    caches.remove_old_rows(tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == kept | set(mine)


def test_several_processes_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "START_ROWS", 1)
    monkeypatch.setattr(sys.modules["treg.data.encode"], "ROWS_TOGETHER", 3)
    source = write(tmp_path / "a.jsonl", rows_of(40))
    expected = said(load(source, None))
    seen = []
    server = vars(forkserver)["_forkserver"]
    before = (server._forkserver_pid, server._preload_modules)
    work = EncodeWork(2, tmp_path / "c")
    assert said(load(source, None, work=work, on_rows=seen.append)) == expected
    assert sum(seen) == 40 and len(seen) == 14
    assert said(load(source, tmp_path / "c")) == expected
    with pytest.raises(RowProblem, match=r"a\.jsonl:3: identical"):
        load(source, None, work=EncodeWork(2), strict=True)
    assert not multiprocessing.active_children()
    # one that others use is theirs
    assert (server._forkserver_pid, server._preload_modules) == before
    with pytest.raises(ValueError, match="num_proc: expected a positive integer, got 0"):
        EncodeWork(0)


class Ending(concurrent.futures.ThreadPoolExecutor):
    """Processes of which one ends."""

    error: Exception

    def submit(self, *_):
        raise self.error


def in_pool(monkeypatch, pool):
    """An iteration of three parts whose second and third are given to this pool."""
    monkeypatch.setattr(workers, "START_ROWS", 1)
    monkeypatch.setattr(workers, "_pool", lambda *_: contextlib.closing(pool))
    pool.close = lambda: pool.shutdown(cancel_futures=True)
    monkeypatch.setattr(workers, "_encode", list)
    return workers.in_order(list, [(None, [1]), (None, [2]), (None, [3])], 2)


@pytest.mark.parametrize("error", [BrokenProcessPool(), BrokenPipeError()], ids=repr)
def test_a_process_that_ended_is_named_when_rows_are_given_to_it(monkeypatch, error):
    pool = Ending(1)
    pool.error = error
    parts = in_pool(monkeypatch, pool)
    assert next(parts) == (None, [1])
    with pytest.raises(ChildProcessError, match=r"num_proc: expected 2.*memory.*__main__.*stdin"):
        next(parts)


def test_processes_of_others_live_on(monkeypatch):
    parts = in_pool(monkeypatch, concurrent.futures.ThreadPoolExecutor(1))
    assert next(parts) == (None, [1])
    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    other.start()
    assert list(parts) == [(None, [2]), (None, [3])]
    other.join(0.3)
    assert other.is_alive()
    other.kill()


def test_a_problem_comes_from_other_processes_as_it_is():
    problem = RowProblem("a reason", "of a kind", "file:3")
    found = pickle.loads(pickle.dumps(problem))
    assert (str(found), found.reason, found.detail, found.where) == (
        *(str(problem), "a reason", "of a kind", "file:3"),
    )

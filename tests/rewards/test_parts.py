"""Parts of an annotation that was stopped: damaged, another run's, or somebody else's files."""

import shutil
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer

import treg.rewards.annotate
from treg.rewards.annotate import annotate
from treg.rewards.parts import Parts

CHAT = tiny_tokenizer()
MODEL = tiny_llama(len(CHAT))


def rows(start=0):
    return [
        {"prompt": f"{i} + {i}?", "chosen": f"the answer {2 * i}", "rejected": f"the sun {i}"}
        for i in range(start, start + 6)
    ]


class Stop(Exception):
    pass


def stopped_before_merge(output, data):
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_):
            raise Stop

        patch.setattr(treg.rewards.annotate, "merge_annotated", stop)
        with pytest.raises(Stop):
            annotate(MODEL, CHAT, data, output, progress=False)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(treg.rewards.annotate, "PART_PAIRS", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The parts of a run, those of another, and the output of the first."""
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(treg.rewards.annotate, "PART_PAIRS", 2)
        stopped_before_merge(folder / "a.parquet", rows())
        stopped_before_merge(folder / "other.parquet", rows(20))
        annotate(MODEL, CHAT, rows(), folder / "whole.parquet", progress=False)
    return folder


@pytest.fixture
def output(made, tmp_path):
    """Where a run can go on from all its parts."""
    shutil.copytree(made / "a.parquet.parts", tmp_path / "a.parquet.parts")
    return tmp_path / "a.parquet"


def flip(file: Path, made: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def by_another_run(file: Path, made: Path) -> None:
    for name in (file.name, f"{file.name}.sha256"):
        shutil.copy(made / "other.parquet.parts" / name, file.with_name(name))


def by_another_part(file: Path, made: Path) -> None:
    for end in ("", ".sha256"):
        shutil.copy(f"{file.with_name('part-00000.parquet')}{end}", f"{file}{end}")


DAMAGES = {
    "flipped": flip,
    "empty": lambda file, made: file.write_bytes(b""),
    "cut": lambda file, made: file.write_bytes(file.read_bytes()[:-9]),
    "no checksum": lambda file, made: Path(f"{file}.sha256").unlink(),
    "a damaged checksum": lambda file, made: flip(Path(f"{file}.sha256"), made),
    "another run's": by_another_run,
    "another part": by_another_part,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_part_that_cannot_be_trusted_is_computed_again(made, output, damage, monkeypatch, caplog):
    file = Path(f"{output}.parts") / "part-00001.parquet"
    DAMAGES[damage](file, made)
    computed, compute = [], treg.rewards.annotate.annotate_pairs
    monkeypatch.setattr(
        treg.rewards.annotate,
        "annotate_pairs",
        lambda *args, **more: computed.append(args) or compute(*args, **more),
    )
    annotate(MODEL, CHAT, rows(), output, progress=False)
    assert output.read_bytes() == (made / "whole.parquet").read_bytes()
    assert len(computed) == 1
    assert f"{file} is computed again: it " in caplog.text


def test_whole_parts_are_not_computed_again(made, output, monkeypatch, caplog):
    monkeypatch.setattr(treg.rewards.annotate, "annotate_pairs", None)
    annotate(MODEL, CHAT, rows(), output, progress=False)
    assert output.read_bytes() == (made / "whole.parquet").read_bytes()
    assert not caplog.text
    assert not Path(f"{output}.parts").exists()


def test_a_damaged_manifest_is_refused_by_name(made, output):
    flip(Path(f"{output}.parts") / "manifest.json", made)
    with pytest.raises(ValueError, match=r"manifest\.json: expected .*remove .*\.parts"):
        annotate(MODEL, CHAT, rows(), output, progress=False)


@pytest.mark.parametrize("damage", [flip, lambda file, made: file.write_bytes(b"")])
def test_a_damaged_output_is_refused_by_name(made, tmp_path, damage):
    output = shutil.copy(made / "whole.parquet", tmp_path / "a.parquet")
    damage(output, made)
    damaged = output.read_bytes()
    with pytest.raises(ValueError, match=r"a\.parquet"):
        annotate(MODEL, CHAT, rows(), output, progress=False)
    assert output.read_bytes() == damaged


def test_files_of_somebody_else_stay(made, tmp_path):
    """Also where the name of the output is a pattern that they fit."""
    output = tmp_path / "a[1].parquet"
    shutil.copytree(made / "a.parquet.parts", f"{output}.parts")
    mine = [
        tmp_path / "a1.parquet.notes.tmp",
        tmp_path / "a1.parquet.1.tmp",
        tmp_path / "a[1].parquet.notes.tmp",
        tmp_path / "a[1].parquet.2.tmp",
        Path(f"{output}.parts") / "notes.txt",
        Path(f"{output}.parts") / "part-of-mine.parquet",
    ]
    for file in mine:
        file.write_text("mine")
    left = tmp_path / "a[1].parquet.treg-77.tmp"
    left.write_text("of a run that was killed")
    annotate(MODEL, CHAT, rows(), output, progress=False)
    assert [file.read_text() for file in mine] == ["mine"] * len(mine)
    assert not left.exists()
    assert sorted(x.name for x in Path(f"{output}.parts").iterdir()) == [
        "notes.txt",
        "part-of-mine.parquet",
    ]


def test_a_folder_that_is_no_run_s_is_not_removed(tmp_path):
    folder = tmp_path / "a.parquet.parts"
    folder.mkdir()
    (folder / "part-00000.parquet").write_text("mine")
    Parts(folder, "", []).remove()
    assert (folder / "part-00000.parquet").read_text() == "mine"


def test_encoded_rows_of_an_annotation_that_never_began_are_removed(tmp_path):
    folder = tmp_path / "a.parquet.parts"
    for mine in (True, False):
        (folder / "_rows").mkdir(parents=True, exist_ok=True)
        (folder / "_rows" / "0.rows").write_text("")
        if mine:
            (folder / "mine").write_text("")
        Parts(folder, "", []).remove()
        assert (folder / "_rows").exists() == mine
        (folder / "mine").unlink(missing_ok=True)
    assert not folder.exists()

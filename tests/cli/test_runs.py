"""A training run in its folder: stopped anywhere, damaged anywhere, moved, or another's."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from treg.cli import main, runs
from treg.files import SEAL, last_checkpoint, seal

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and annotated pairs of it."""
    path = tmp_path_factory.mktemp("runs")
    tokenizer = tiny.tiny_tokenizer()
    tiny.tiny_llama(len(tokenizer)).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    for name, start in (("prefs", 0), ("others", 50)):
        rows = [
            {"prompt": f"{i} + {i}?", "chosen": f"the answer {2 * i}", "rejected": f"the sun {i}"}
            for i in range(start, start + 8)
        ]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["annotate", "--model", path / "model", "--data", path / f"{name}.jsonl"]
        command += ["--output", path / f"{name}.parquet", "--dtype", "float32"]
        assert main(list(map(str, command))) == 0
    return path


def train(folder: Path, out: Path, **more) -> int:
    options = {
        "model": folder / "model",
        "data": folder / "prefs.parquet",
        "output_dir": out,
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    } | more
    return main(["train", *(str(x) for k, v in options.items() for x in (f"--{k}", v))])


def model(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def state(out: Path) -> dict:
    return json.loads((out / "trainer_state.json").read_text())


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train(folder, out) == 0
    return out


@pytest.fixture
def out(whole, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def stop_before_the_end(out: Path) -> None:
    """What a kill after the last checkpoint leaves."""
    for name in (SEAL, "model.safetensors", "trainer_state.json"):
        (out / name).unlink()


def test_a_run_stopped_after_its_last_step_makes_no_other(folder, whole, out):
    stop_before_the_end(out)
    assert train(folder, out) == 0
    assert model(out) == model(whole)
    assert state(out)["global_step"] == STEPS
    assert not (out / f"checkpoint-{STEPS + 1}").exists()


def test_the_same_of_epochs_that_are_not_whole(folder, tmp_path):
    more = {"max_steps": -1, "num_train_epochs": 1.25, "save_strategy": "steps", "save_steps": 1}
    out, other = tmp_path / "out", tmp_path / "other"
    assert train(folder, out, **more) == 0
    steps = state(out)["global_step"]
    assert steps == 5  # of 8 pairs, 2 a step
    shutil.copytree(out, other)
    stop_before_the_end(other)
    assert train(folder, other, **more) == 0
    assert model(other) == model(out)
    assert state(other)["global_step"] == steps


def test_a_state_that_is_half_written(folder, whole, out, capsys):
    (out / SEAL).unlink()
    text = (out / "trainer_state.json").read_text()
    (out / "trainer_state.json").write_text(text[: len(text) // 2])
    assert train(folder, out) == 0
    assert "going on from" in capsys.readouterr().out
    assert model(out) == model(whole)
    assert state(out)["global_step"] == STEPS


def test_a_model_that_was_deleted_is_saved_again(folder, whole, out, capsys):
    (out / "model.safetensors").unlink()
    assert train(folder, out) == 0
    assert "lacks model.safetensors" in capsys.readouterr().out
    assert model(out) == model(whole)
    assert train(folder, out) == 0
    assert "nothing to do" in capsys.readouterr().out


def flip(file: Path, at: float = 0.5, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1 << bit
    file.write_bytes(data)


def test_a_model_that_was_changed_is_refused(folder, out, capsys):
    flip(out / "model.safetensors")
    changed = model(out)
    assert train(folder, out) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error and "remove that file" in error
    assert model(out) == changed


def test_a_finished_run_without_checkpoints_is_kept(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(folder, out, save_strategy="no") == 0
    before = model(out), (out / "treg_run.json").read_bytes()
    assert train(folder, out, save_strategy="no", learning_rate=1e-3) == 2
    assert "learning_rate: " in capsys.readouterr().err
    assert train(folder, out, save_strategy="no") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (model(out), (out / "treg_run.json").read_bytes()) == before


def test_data_and_models_are_known_by_their_content(folder, out, tmp_path, capsys):
    moved = tmp_path / "moved.parquet"
    shutil.copy(folder / "prefs.parquet", moved)
    shutil.copytree(folder / "model", tmp_path / "model")
    assert train(folder, out, data=moved, model=tmp_path / "model") == 0
    assert "nothing to do" in capsys.readouterr().out

    shutil.copy(folder / "others.parquet", moved)
    assert train(folder, out, data=moved, model=tmp_path / "model") == 2
    assert f"data: {out} holds a run with" in capsys.readouterr().err

    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["rms_norm_eps"] = 1e-2
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert train(folder, out, model=tmp_path / "model") == 2
    assert f"model: {out} holds a run with" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint-4/notes.txt"])
def test_a_folder_that_holds_no_run_is_left_alone(folder, tmp_path, name, capsys):
    """A model that somebody put there, or another trainer's checkpoints."""
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert train(folder, tmp_path / "out") == 2
    assert "holds" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_a_run_file_that_is_damaged_is_named(folder, out, capsys):
    flip(out / "treg_run.json")
    assert train(folder, out) == 2
    assert "treg_run.json" in capsys.readouterr().err


NEEDED = (
    "model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "trainer_state.json",
)
DAMAGES = {
    "deleted": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "flipped": flip,
    "flipped at the end": lambda file: flip(file, 0.99, 6),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*NEEDED, SEAL])
def test_a_damaged_checkpoint_is_passed_over(out, name, damage):
    newest, older = out / f"checkpoint-{STEPS}", out / "checkpoint-2"
    assert last_checkpoint(out) == newest
    DAMAGES[damage](newest / name)
    told = []
    assert last_checkpoint(out, told.append) == older
    (text,) = told
    assert str(newest) in text and name in text


def test_the_run_goes_on_from_the_older_one(folder, whole, out, capsys):
    stop_before_the_end(out)
    flip(out / f"checkpoint-{STEPS}" / "optimizer.pt")
    assert train(folder, out) == 0
    said = capsys.readouterr().out
    assert "optimizer.pt" in said and f"going on from {out / 'checkpoint-2'}" in said
    assert model(out) == model(whole)


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("damage", ["deleted", "empty", "cut"])
def test_a_checkpoint_without_a_seal_is_tested_by_its_formats(out, name, damage):
    """As an earlier version left it: what has no checksum is found where its length tells."""
    for step in (2, STEPS):
        (out / f"checkpoint-{step}" / SEAL).unlink()
    newest, older = out / f"checkpoint-{STEPS}", out / "checkpoint-2"
    assert last_checkpoint(out) == newest
    DAMAGES[damage](newest / name)
    told = []
    expected = newest if name == "config.json" else older  # which no resume reads
    assert last_checkpoint(out, told.append) == expected
    assert expected == newest or name.partition(".")[0].split("_")[0] in told[0]


def test_a_checkpoint_of_the_model_alone_is_no_start(folder, whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(folder, out, save_only_model=True) == 0
    assert "if this run is stopped, it starts from its beginning" in capsys.readouterr().out
    stop_before_the_end(out)
    assert train(folder, out, save_only_model=True) == 0
    assert "--save_only_model leaves it" in capsys.readouterr().out
    assert model(out) == model(whole)


def test_a_run_that_diverges_ends_with_an_error(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(folder, out, learning_rate=1e38, max_steps=6) == 2
    error = capsys.readouterr().err
    assert "learning_rate: expected one with which training stays finite" in error
    assert not (out / "model.safetensors").exists()
    assert last_checkpoint(out) is None


def test_a_disk_that_is_full(folder, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    assert train(folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out' / 'checkpoint-2'}: expected to write it" in error
    assert "MB are free" in error


def test_data_of_no_name(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "out", data="") == 2
    assert "data: expected" in capsys.readouterr().err
    command = ["annotate", "--model", str(folder / "model"), "--data", ""]
    assert main([*command, "--output", str(tmp_path / "a.parquet")]) == 2
    assert "data: expected" in capsys.readouterr().err


def test_a_seal_lists_what_is_there(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(b"abc")
    seal(tmp_path)
    listed = json.loads((tmp_path / SEAL).read_text())["sha256"]
    sha256_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert listed == {"a/b.bin": sha256_of_abc}


def test_packs_of_a_run_from_before_prompts_were_shared(tmp_path):
    """It goes on with the packs that it had; without packs either way is the same."""
    now = {"share_prompt": None, "token_budget": 512}
    for name, budget in (("packs", 512), ("pairs", None)):
        out = tmp_path / name
        runs.claim_run(out, {"token_budget": budget})
        (out / "model.safetensors").write_bytes(b"")
        if budget is None:
            runs.claim_run(out, now | {"token_budget": None})
            continue
        with pytest.raises(ValueError, match=r"share_prompt: .* a run with False, now it is No"):
            runs.claim_run(out, now)
        runs.claim_run(out, now | {"share_prompt": False})

"""The card of a model: its header as the hub reads it, its words, and what is pushed beside it."""

import subprocess

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from treg.losses import LossOptions
from treg.rewards import SOURCES
from treg.trainer.card import NOT_PUSHED, PAPER, SOURCE_PAPERS, Card, is_hub_name, keep_from_hub

OPTIONS = LossOptions("dpo", beta=0.1, alpha=0.25)


def header(card: Card) -> dict:
    return ModelCard(str(card)).data.to_dict()


def test_a_header_of_hub_names():
    """The hub's own reader finds what its metadata are made of."""
    card = Card(
        "mine",
        OPTIONS,
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        datasets=["argilla/dpo-mix-7k"],
        tags=["treg", "dpo", "treg"],
        more={"license": "apache-2.0", "language": None},
    )
    expected = ModelCardData(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        datasets=["argilla/dpo-mix-7k"],
        library_name="transformers",
        pipeline_tag="text-generation",
        license="apache-2.0",
        tags=["treg", "dpo"],
    )
    assert header(card) == expected.to_dict()
    assert validate_repo_id(header(card)["base_model"]) is None


def test_local_paths_stand_in_no_header(tmp_path):
    """The hub refuses a card whose base_model is none of its names."""
    base, data = tmp_path / "secret" / "model", tmp_path / "secret" / "prefs.jsonl"
    base.mkdir(parents=True)
    card = Card("mine", OPTIONS, base=str(base), datasets=[str(data), "prefs.jsonl"])
    assert not {"base_model", "datasets"} & header(card).keys()
    assert "`model`, trained on `prefs.jsonl`, `prefs.jsonl`" in str(card)
    assert "secret" not in str(card)


@pytest.mark.parametrize(
    "text", ["a/b", "gpt2", "HuggingFaceH4/ultrafeedback_binarized", "org.x/model-v1.2"]
)
def test_names_of_the_hub(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(text) and validate_repo_id(text) is None
    (tmp_path / text).mkdir(parents=True)  # a folder of that name is what was meant
    assert not is_hub_name(text)


@pytest.mark.parametrize("text", ["./a/b", "/a/b", "a/b/c", "prefs.jsonl", "a--b/c", "x/../y", ""])
def test_other_names(text):
    assert not is_hub_name(text)


def test_what_a_card_says():
    card = str(
        Card(
            "mine",
            LossOptions("sepo", beta=0.2),
            sources=["redistribution", "surprise", "redistribution"],
            adapters=True,
            facts={"learning_rate": 1e-6},
            results={"eval_loss": 0.69314},
        )
    )
    assert 'library_name: "peft"' in card
    assert "Token rewards: redistribution (RED, arXiv 2411.08302), surprise." in card
    assert "loss_type=sepo, beta=0.2" in card and "2408.13518" in card  # SePO
    assert "With alpha > 0" not in card
    assert "- learning_rate: 1e-06\n" in card and "- eval_loss: 0.6931\n" in card
    assert card.count("arxiv.org/abs/2412.02685") == 1 and PAPER["citation"] in card
    assert "scratch" not in card and "unknown dataset" not in card


def test_papers_are_those_of_sources():
    assert SOURCE_PAPERS.keys() <= SOURCES.keys()


KEPT = ("model.safetensors", "README.md", "trainer_state.json", "curves.png", "tokenizer.json")
LEFT_OUT = (
    "lock",
    "treg_run.json",
    "annotated.parquet",
    "annotated-eval.parquet",
    "annotated.parquet.parts/part-00000.parquet",
    "treg_run.json.123.tmp",
    "samples.jsonl",
    "checkpoint-5/optimizer.pt",
    "merged/model.safetensors",
)


def test_what_is_pushed(tmp_path):
    """The hub ignores what git does: .gitignore goes with an upload, and is obeyed there."""
    (tmp_path / ".gitignore").write_text("mine\n")
    for _ in range(2):
        keep_from_hub(tmp_path)
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines == ["mine", *NOT_PUSHED]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name in (*KEPT, *LEFT_OUT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    command = ["git", "-C", str(tmp_path), "ls-files", "-o", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(listed.stdout.split()) == {*KEPT, ".gitignore"}


def test_an_upload_takes_the_rules_with_it(tmp_path, monkeypatch):
    """huggingface_hub hands the content of .gitignore on to the hub, which enforces it."""
    keep_from_hub(tmp_path)
    (tmp_path / "lock").write_text("x")
    seen = {}

    def stop(**given):
        seen.update(given)
        raise InterruptedError

    name = "huggingface_hub._commit_api._fetch_upload_modes"
    monkeypatch.setattr(name, stop)
    additions = [
        huggingface_hub.CommitOperationAdd(path, str(tmp_path / path))
        for path in (".gitignore", "lock")
    ]
    with pytest.raises(InterruptedError):
        huggingface_hub.HfApi(token="hf_x").preupload_lfs_files("a/b", additions)
    assert seen["gitignore_content"].splitlines() == list(NOT_PUSHED)

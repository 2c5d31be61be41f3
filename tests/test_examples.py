"""The examples run, on real rows where they are present."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import environment, shared_data

from treg.data.annotated import read_annotated

EXAMPLES = Path(__file__).parents[1] / "examples"
CASES = {
    "UltraFeedback": ("prefs/ultrafeedback_train.jsonl", ["--tokenizer", "tok/qwen2.5"]),
    "HH": ("prefs/hh_harmless_test.jsonl.gz", ["--tokenizer", "tok/qwen2.5"]),
    "ShareGPT": ("prefs/sharegpt_demo.json", ["--tokenizer", "tok/qwen2.5"]),
    "a pretrained model": ("prefs/ultrafeedback_train.jsonl", ["--model", "lm/tinystories-656k"]),
}


@pytest.mark.parametrize("case", CASES)
def test_preference_file(case, tmp_path):
    data, (kind, path) = CASES[case]
    command = [sys.executable, EXAMPLES / "preference_file.py", shared_data(data), kind, shared_data(path),
               "--output", tmp_path, "--limit", "10", "--max_length", "160", "--steps", "2"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    examples, meta = read_annotated(tmp_path / "annotated.parquet")
    kept, dropped = meta["report"]["kept"], meta["report"]["dropped"]
    assert len(examples) == kept > 0 and kept + sum(dropped.values()) == 10
    page = (tmp_path / "page.html").read_text()
    assert all(x["where"].rpartition("/")[2] in page for x in examples)
    assert (tmp_path / "model.safetensors").exists()

"""The examples run, on real rows where they are present."""

import re
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
    command = [
        sys.executable,
        EXAMPLES / "preference_file.py",
        shared_data(data),
        kind,
        shared_data(path),
        "--output",
        tmp_path,
        "--limit",
        "10",
        "--max_length",
        "160",
        "--steps",
        "2",
    ]
    done = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    examples, meta = read_annotated(tmp_path / "annotated.parquet")
    kept, dropped = meta["report"]["kept"], meta["report"]["dropped"]
    assert len(examples) == kept > 0 and kept + sum(dropped.values()) == 10
    page = (tmp_path / "page.html").read_text()
    assert all(x["where"].rpartition("/")[2] in page for x in examples)
    assert (tmp_path / "model.safetensors").exists()


def run(command, folder):
    done = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(output):
    return [float(x) for x in re.findall(r"loss'?:? '?([0-9.]+)", output)]


def test_fsdp2_loop(tmp_path):
    """Two processes print the losses of one."""
    found = [
        losses(
            run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc_per_node",
                    size,
                    EXAMPLES / "fsdp2_loop.py",
                ],
                tmp_path,
            )
        )
        for size in (1, 2)
    ]
    assert len(found[0]) == 5 and found[0][-1] < found[0][0]
    assert found[1] == pytest.approx(found[0], abs=2e-6)


def test_trl_dpo(tmp_path):
    """Under accelerate's launcher two processes of 4 pairs log what one of 8 does."""
    pytest.importorskip("trl")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    options = ["--max_steps", "3", "--disable_tqdm", "True", "--per_device_train_batch_size"]
    found = []
    for command, batch in (([sys.executable], "8"), (launch, "4")):
        command = [
            *command,
            EXAMPLES / "trl_dpo.py",
            *options,
            batch,
            "--output_dir",
            tmp_path / batch,
        ]
        found.append(losses(run(command, tmp_path)))
    assert len(found[0]) == 4 and len(set(found[0])) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert (tmp_path / "4" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "hide", ["", "import sys; sys.modules['liger_kernel'] = None; "], ids=["present", "absent"]
)
def test_liger_swap(hide, tmp_path):
    """With and without Liger; its loss is treg's without the regularizer."""
    script = str(EXAMPLES / "liger_swap.py")
    code = f"{hide}import runpy; runpy.run_path({script!r}, run_name='__main__')"
    lines = [
        line
        for line in run([sys.executable, "-c", code], tmp_path).splitlines()
        if " loss " in line
    ]
    found = {line[:20].strip(): float(line.split(" loss ")[1].split()[0]) for line in lines}
    assert abs(found["treg, T-REG"] - found["treg, DPO"]) > 1e-3
    assert abs(found.get("Liger, DPO", found["treg, DPO"]) - found["treg, DPO"]) < 1e-4

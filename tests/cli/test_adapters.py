"""Adapters: merged into their model's weights, on weights in 4 bits; samples while training."""

import json
import math
import shutil
import types
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from treg.cli import config, main, merge, quantized
from treg.cli.samples import Samples, read_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in bfloat16, its tokenizer, and an adapter that changes it."""
    path = tmp_path_factory.mktemp("adapters")
    tokenizer = tiny.tiny_tokenizer()
    torch.manual_seed(0)
    model = tiny.tiny_llama(len(tokenizer)).bfloat16()
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    base = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(path / "adapter")
    return path


def merged(folder, output, *more) -> int:
    adapter = ["--adapter", str(folder / "adapter"), "--output", str(output)]
    return main(["merge", *adapter, *more])


def by_hand(folder, adapter):
    """W + alpha / r * B A of each layer that has an adapter, in float32."""
    weights = load_file(folder / "model" / "model.safetensors")
    found = {name: x.float() for name, x in weights.items()}
    lora = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, a in lora.items():
        if ".lora_A." in name:
            key = name.removeprefix("base_model.model.").replace(".lora_A", "")
            b = lora[name.replace(".lora_A", ".lora_B")]
            found[key] += config["lora_alpha"] / config["r"] * (b @ a)
    return found


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_merge(dtype, folder, tmp_path, capsys):
    """The weights against the formula; the logits against PEFT's with the adapter beside them."""
    output = tmp_path / "whole"
    assert merged(folder, output, "--dtype", dtype) == 0
    kind = torch.bfloat16 if dtype == "auto" else torch.float32
    assert f"the whole model, in {str(kind)[6:]}; its log-probs differ" in capsys.readouterr().out
    expected = by_hand(folder, folder / "adapter")
    found = load_file(output / "model.safetensors")
    for name, x in found.items():
        # a sum in float32 may be rounded to either neighbour in 16 bits
        torch.testing.assert_close(x, expected[name].to(kind), atol=1e-6, rtol=2**-8)
    probe = "what is 1 + 1?"
    known = AutoTokenizer.from_pretrained(folder / "model")(probe)["input_ids"]
    assert AutoTokenizer.from_pretrained(output)(probe)["input_ids"] == known
    if dtype == "auto":
        return
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        beside = PeftModel.from_pretrained(base, folder / "adapter")(input_ids=ids).logits
        logits = AutoModelForCausalLM.from_pretrained(output)(input_ids=ids).logits
    torch.testing.assert_close(logits, beside, atol=5e-5, rtol=1e-5)
    assert not torch.allclose(beside, plain, atol=0.1)  # the adapter changes something


def test_a_folder_with_files_is_not_written_to(folder, tmp_path, capsys):
    (tmp_path / "x").write_text("mine")
    assert merged(folder, tmp_path) == 2
    assert "output: expected a new or empty folder" in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapter", "{folder}/model"], "adapter: expected a folder or hub name of a PEFT"),
        (["--adapter", "./nope"], "adapter: no such folder: ./nope"),
        (["--dtype", "int8"], "dtype: expected one of auto"),
    ],
)
def test_what_merge_refuses(more, message, folder, tmp_path, capsys):
    given = ["--output", str(tmp_path / "o"), *(x.format(folder=folder) for x in more)]
    if "--adapter" not in given:
        given += ["--adapter", str(folder / "adapter")]
    assert main(["merge", *given]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_merge_that_is_another_model_is_refused(folder, monkeypatch):
    right, calls = merge._logprobs, []

    def off(model):
        calls.append(1)
        return right(model) + 0.01 * len(calls)

    monkeypatch.setattr(merge, "_logprobs", off)
    with pytest.raises(ValueError, match="adapter: expected the log-probs of the merged model"):
        merge.merge(str(folder / "model"), str(folder / "adapter"))


def test_weights_in_4_bits_are_refused_by_what_is_missing(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="load_in_4bit: expected the package bitsandbytes"):
        quantized.check_4bit()
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    assert quantized.check_4bit() is None


def test_training_on_weights_in_4_bits(folder, tmp_path):
    """Policy and reference are the same weights in 4 bits: the first loss is log 2. A run that goes
    on from a checkpoint ends in the same adapter, which `treg merge` takes.
    """
    pytest.importorskip("bitsandbytes")
    rows = [{"prompt": f"what, {i}?", "chosen": "the owl", "rejected": "no"} for i in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    command = ["train", "--model", str(folder / "model"), "--data", str(data)]
    command += ["--output_dir", str(out), "--use_peft", "--load_in_4bit", "--use_cpu"]
    command += ["--report_to", "none", "--per_device_train_batch_size", "2", "--max_steps", "2"]
    command += ["--alpha", "0", "--loss_type", "dpo", "--save_steps", "1", "--logging_steps", "1"]
    assert main(command) == 0
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    whole = (out / "adapter_model.safetensors").read_bytes()
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-2")
    assert main(command) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == whole
    model = ["--model", str(folder / "model"), "--dtype", "float32"]
    assert main(["merge", *model, "--adapter", str(out), "--output", str(tmp_path / "m")]) == 0


@pytest.mark.parametrize("bf16", [True, False])
def test_what_4_bits_ask_of_transformers(bf16, monkeypatch):
    options = quantized.quantization(torch.device("cuda", 1), bf16)
    asked = options["quantization_config"]
    assert isinstance(asked, BitsAndBytesConfig) and asked.quantization_method() == "nf4"
    assert asked.bnb_4bit_compute_dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert options["device_map"] == {"": "cuda:1"}


REFUSED = {
    "--load_in_4bit": "load_in_4bit: expected --use_peft beside it",
    "--merge_adapter": "merge_adapter: expected --use_peft beside it",
    "--sample_prompts x": "sample_prompts: expected --sample_steps beside it",
    "--sample_steps 0": "sample_steps: expected a positive number, got 0",
}


@pytest.mark.parametrize("given", REFUSED)
def test_options_that_do_not_go_together(given, folder, tmp_path, capsys):
    command = ["train", "--model", str(folder / "model"), "--data", "x.jsonl", "--use_cpu"]
    assert main([*command, "--output_dir", str(tmp_path), *given.split()]) == 2
    assert REFUSED[given] in capsys.readouterr().err


def test_samples_are_greedy_and_leave_training_alone(folder, tmp_path, capsys):
    """Against an argmax by hand; random numbers and the mode of the model stay."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = None
    samples = Samples(tmp_path, 2, ["the fox"], tokenizer, rendered=False)
    state = types.SimpleNamespace(is_world_process_zero=True, global_step=0)
    before = torch.get_rng_state()
    for state.global_step in range(1, 5):
        samples.on_step_end(None, state, None, model=model)
    assert model.training and torch.equal(before, torch.get_rng_state())
    lines = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [2, 4]
    ids = tokenizer("the fox", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    stop = model.generation_config.eos_token_id
    with torch.no_grad():
        for _ in range(128):
            following = model.eval()(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, following.view(1, 1)], 1)
            if following.item() == stop:
                break
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert {x["completion"] for x in lines} == {expected}
    assert "step 2: 'the fox' -> " in capsys.readouterr().out
    state.global_step = 2  # a run that goes on from there
    samples.on_train_begin(None, state, None)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1


def test_prompts_of_samples(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert read_prompts(str(tmp_path / "a.txt")) == ["one", "two"]
    assert read_prompts(str(tmp_path / "a.jsonl")) == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match=r"expected a text as prompt in .*b.jsonl:1"):
        read_prompts(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(ValueError, match="expected prompts in"):
        read_prompts(str(tmp_path / "c.txt"))


def test_a_configuration_of_accelerate(capsys):
    """That of the examples, which is tested on two processes."""
    assert main(["config", "fsdp2"]) == 0
    example = Path(__file__).resolve().parents[2] / "examples" / "fsdp2.yaml"
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(example.read_text())
    assert main(["config", "fsdp"]) == 2
    assert "did you mean 'fsdp2'?" in capsys.readouterr().err
    assert all(yaml.safe_load(text)["num_machines"] == 1 for text in config.PROFILES.values())


def test_train_with_samples_and_a_merged_model(folder, tmp_path, capsys):
    """The merged folder holds the model of the run."""
    rows = [
        {"prompt": f"what is {i}?", "chosen": f"it is {i}.", "rejected": "the sun"}
        for i in range(4)
    ]
    data, out = tmp_path / "prefs.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", "--model", folder / "model", "--data", data, "--output_dir", out]
    command += ["--alpha", 0, "--use_peft", "--merge_adapter", "--sample_steps", 1]
    command += ["--max_steps", 2, "--learning_rate", 0.01, "--use_cpu", "--disable_tqdm"]
    assert main([str(x) for x in command]) == 0
    assert f"wrote {out / 'merged'}: the whole model, in bfloat16" in capsys.readouterr().out
    lines = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 1, 1, 2, 2, 2]
    assert all(x["prompt"].endswith("assistant\n") for x in lines)
    expected = by_hand(folder, out)
    for name, x in load_file(out / "merged" / "model.safetensors").items():
        torch.testing.assert_close(x, expected[name].bfloat16(), atol=1e-6, rtol=2**-8)

"""Completions that a model gives while it is trained, for a person to read."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from treg.data import prompt_text

FILE = "samples.jsonl"
MOST_TOKENS = 128


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line, or of JSONL with a prompt in each row.

    Raises:
        ValueError: none, or a row without one.
    """
    prompts = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not path.endswith(".jsonl"):
            prompts.append(line.strip())
            continue
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"sample_prompts: expected a text as prompt in {path}:{number}")
        prompts.append(row["prompt"])
    if not prompts:
        raise ValueError(f"sample_prompts: expected prompts in {path}, found none")
    return prompts


def check_whole(trainer: Any) -> None:
    """ValueError for a trainer whose weights are in pieces: one process cannot generate alone."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "sample_steps: expected none under FSDP and DeepSpeed, whose weights are in pieces; "
            "take samples from what is saved"
        )


class Samples(TrainerCallback):
    """Greedy completions of a few prompts every so many steps, to the terminal and to FILE in the
    folder of the run: {"step", "prompt", "completion"} a line.

    The random numbers of training are left as they are. One process alone generates.

    rendered: whether the prompts are texts as the model sees them, chat template and all.
    """

    def __init__(
        self, folder: Path, every: int, prompts: list[str], tokenizer: Any, *, rendered: bool
    ):
        self.rendered = rendered
        self.file = folder / FILE
        self.every = every
        self.tokenizer = tokenizer
        self.prompts = prompts

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop what a run that goes on from a checkpoint will say again."""
        if not state.is_world_process_zero or not self.file.exists():
            return
        lines = self.file.read_text(encoding="utf-8").splitlines()
        kept = [x for x in lines if json.loads(x)["step"] <= state.global_step]
        self.file.write_text("".join(f"{x}\n" for x in kept), encoding="utf-8")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero and state.global_step % self.every == 0:
            self._sample(getattr(model, "module", model), state.global_step)

    @torch.no_grad()
    def _sample(self, model: Any, step: int) -> None:
        training = model.training
        model.eval()
        try:
            for prompt in self.prompts:
                completion = self._complete(model, prompt)
                line = {"step": step, "prompt": prompt, "completion": completion}
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=True) + "\n")
                print(f"step {step}: {prompt!r} -> {completion!r}", flush=True)
        finally:
            model.train(training)

    def _complete(self, model: Any, prompt: str) -> str:
        chat = self.tokenizer.chat_template is not None
        text = prompt
        if chat and not self.rendered:
            text = prompt_text(self.tokenizer, [{"role": "user", "content": prompt}])
        special = not chat and not self.rendered
        encoded = self.tokenizer(text, return_tensors="pt", add_special_tokens=special)
        ids = encoded["input_ids"].to(model.device)
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MOST_TOKENS,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
        )
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)

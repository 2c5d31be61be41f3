"""Annotation in `bench_end_to_end.py`: `treg annotate`, rows to file, and the forwards it needs.

The floor is a bare forward of as many tokens as annotation ran, in rows of the same widths but none
longer than the longest sequence, without a mask; and the dense logits of as many rows as reached
the head. No softmax, no reading of rows, no templates, no tokenizing, no file.
"""

import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from end_to_end_cases import SIDES, Cell, Counter, by_width, make_examples
from loss_head_cases import DEVICE

SHARED, APART, FORWARDS = "treg annotate", "treg annotate apart", "bare forwards"
NAMES = (SHARED, APART, FORWARDS)
TEXTS = "prefs/ultrafeedback_train.jsonl"  # in the folder that TREG_TEST_DATA names
HEAD_ROWS = 2048
COUNTED = 1 << 16  # ids of the text that rows are cut from


def corpus(tokenizer: Any, real: bool) -> list[int]:
    """Ids of real text, one answer after the other; without any, of words of the tokenizer."""
    file = Path(os.environ.get("TREG_TEST_DATA", "")) / TEXTS
    if not (real and file.is_file()):
        return [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip().isalnum()]
    ids: list[int] = []
    with file.open() as lines:
        for line in lines:
            ids += tokenizer(
                _answer(json.loads(line)["chosen"]), add_special_tokens=False
            ).input_ids
            if len(ids) > COUNTED:
                break
    return ids


def _answer(chosen: Any) -> str:
    return chosen if isinstance(chosen, str) else chosen[-1]["content"]


def make_rows(cell: Cell, tokenizer: Any, count: int, real: bool) -> list[dict[str, str]]:
    """Rows of text whose pairs have about the lengths of the cell, taken in turns.

    What a chat template adds to a prompt is taken off its text; text that is cut and tokenized
    again may have a token more or less.
    """
    ids = corpus(tokenizer, real)
    message = [{"role": "user", "content": ""}]
    added = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    template = len(tokenizer(added, add_special_tokens=False).input_ids)
    at, rows = itertools.count(), []

    def text(n: int) -> str:
        first = next(at) * 1009 % max(1, len(ids) - n)
        taken = [ids[(first + i) % len(ids)] for i in range(n)]
        if real:
            return tokenizer.decode(taken)
        return " ".join(tokenizer.decode([i]).strip() for i in taken)

    for p, w, l in itertools.islice(itertools.cycle(cell.pairs), count):
        lengths = (max(1, p - template), w, l)
        rows.append(dict(zip(("prompt", *SIDES), map(text, lengths), strict=True)))
    return rows


class Annotation:
    """`treg annotate` of a cell's rows, and its floor.

    lengths: P, R_w, R_l of each pair as they came out.
    """

    def __init__(self, cell: Cell, model: Any, tokenizer: Any, count: int, real: bool):
        from treg.data import EncodeOptions, load_pairs

        self.model, self.tokenizer = model, tokenizer
        self.rows = make_rows(cell, tokenizer, count, real)
        self.encode = EncodeOptions(2 * cell.longest + 256)
        pairs, _ = load_pairs(self.rows, tokenizer, self.encode)
        self.lengths = [(len(x.prompt_ids), len(x.chosen_ids), len(x.rejected_ids)) for x in pairs]
        self.counters: dict[str, Counter] = {}

    def annotate(self, share: bool) -> None:
        from treg.rewards.annotate import AnnotateOptions, annotate

        options = AnnotateOptions(self.encode, share_prefix=share)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "a.parquet"
            annotate(self.model, self.tokenizer, self.rows, output, options, progress=False)

    def call(self, name: str) -> Callable[[], None]:
        if name == FORWARDS:
            return self.forwards
        return functools.partial(self.annotate, name == SHARED)

    def first_call(self, name: str) -> int:
        """Run a method once; how many tokens went through the model."""
        if name == FORWARDS:
            self.forwards()
            return self.counters[SHARED].tokens
        with Counter(self.model) as counter:
            self.call(name)()
        self.counters[name] = counter
        return counter.tokens

    @torch.inference_mode()
    def forwards(self) -> None:
        """The floor of `SHARED`, which must have been called."""
        counter = self.counters[SHARED]
        weight = self.model.get_output_embeddings().weight
        left = counter.rows
        for ids in self._ids(counter):
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            for rows in hidden.flatten(0, 1)[:left].split(HEAD_ROWS):
                torch.nn.functional.linear(rows, weight)
            left = max(0, left - ids.numel())
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def _ids(self, counter: Counter) -> Iterator[torch.Tensor]:
        vocab = self.model.config.vocab_size
        for rows, width in by_width(counter.calls, counter.longest):
            example = make_examples(Cell("", ((width, 1, 1),)), vocab)[0]["prompt_ids"]
            yield torch.tensor([example] * rows, device=DEVICE)

    @property
    def counted(self) -> int:
        return sum(2 * p + w + l for p, w, l in self.lengths)

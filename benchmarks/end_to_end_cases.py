"""What `bench_end_to_end.py` measures on: lengths of pairs, their tokens, and the models.

A pair has a prompt of P tokens, a chosen answer of R_w and a rejected one of R_l. Three counts:

    counted    2P + R_w + R_l    as a person counts them, and what a tokens a second is said of
    needed     P + R_w + R_l     each token once: what a perfect method runs
    run                          what went through the model, padding included, see `Counter`
"""

import copy
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from loss_head_cases import DEVICE
from make_lengths import LENGTHS
from torch import Tensor, nn

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SIDES = ("chosen", "rejected")
Lengths = tuple[int, int, int]  # P, R_w, R_l


@dataclass(frozen=True)
class Cell:
    """A batch of pairs of these lengths."""

    name: str
    pairs: tuple[Lengths, ...]

    @property
    def counted(self) -> int:
        return sum(2 * p + w + l for p, w, l in self.pairs)

    @property
    def needed(self) -> int:
        return sum(p + w + l for p, w, l in self.pairs)

    @property
    def padded(self) -> int:
        """Of rows as long as the longest sequence."""
        return 2 * len(self.pairs) * max(p + max(w, l) for p, w, l in self.pairs)

    @property
    def longest(self) -> int:
        """Tokens of the longest pair, each token once."""
        return max(map(sum, self.pairs))


def real_lengths() -> list[Lengths]:
    """Of pairs of UltraFeedback, in random order."""
    with LENGTHS.open(newline="") as file:
        _, *rows = csv.reader(file)
    return [(int(p), int(w), int(l)) for p, w, l in rows]


BAR, LONG, REAL = "P 512, R 128 + 128", "P 1024, R 128 + 128", "UltraFeedback"
NAMES = {"bar": BAR, "long": LONG, "real": REAL}


def cell_of(name: str, pairs: int, real_pairs: int) -> Cell:
    """pairs: of the cells whose pairs are all alike; real_pairs: of the one with real lengths."""
    if name == REAL:
        return Cell(REAL, tuple(real_lengths()[:real_pairs]))
    return Cell(name, ((512 if name == BAR else 1024, 128, 128),) * pairs)


# -- models


@dataclass(frozen=True)
class Shape:
    """Of a Llama with random weights."""

    hidden: int = 384
    layers: int = 6
    heads: int = 6
    vocab: int = 16000
    positions: int = 4096


# of two cores; on a GPU about a billion parameters
SHAPE = Shape(2048, 16, 32, 128256, 8192) if DEVICE == "cuda" else Shape()


def make_model(source: str | Shape) -> nn.Module:
    """A model of a folder, or one with random weights, on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if isinstance(source, str):
        return AutoModelForCausalLM.from_pretrained(source, dtype=DTYPE).to(DEVICE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=source.vocab,
        hidden_size=source.hidden,
        intermediate_size=8 * source.hidden // 3,
        num_hidden_layers=source.layers,
        num_attention_heads=source.heads,
        max_position_embeddings=source.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(DEVICE, DTYPE)


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def make_tokenizer(source: str | Shape) -> Any:
    """The tokenizer of a folder; of a model with random weights one of words w2, w3 and so on."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if isinstance(source, str):
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<eos>", "<unknown>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocab = {x: i for i, x in enumerate([*names, *(f"w{i}" for i in range(6, source.vocab))])}
    words: Any = Tokenizer(models.WordLevel(vocab, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unknown>"
    )
    made.chat_template = CHAT
    return made


def twin(model: nn.Module) -> Any:
    """A copy with modules of its own, which share the parameters: libraries that replace a model's
    forward do not meet, and no memory is taken for weights.
    """
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def make_examples(cell: Cell, vocab: int) -> list[dict[str, Any]]:
    """Pairs of random tokens, with log-probs of a reference that are far from the model's, so that
    a loss shows where the log-probs are wrong.

    The answers of a pair differ from the first token on, and all ids are those of any tokenizer.
    """
    random = np.random.default_rng(0)
    examples = []
    for lengths in cell.pairs:
        row: dict[str, Any] = {}
        for part, n in zip(("prompt", *SIDES), lengths, strict=True):
            row[f"{part}_ids"] = random.integers(6, vocab, n).tolist()
        if row["chosen_ids"][0] == row["rejected_ids"][0]:
            row["rejected_ids"][0] = 6 + (row["chosen_ids"][0] - 5) % (vocab - 6)
        for side in SIDES:
            n = len(row[f"{side}_ids"])
            row[f"ref_{side}_logps"] = float(-n * np.log(vocab) + random.normal(0, 5))
        examples.append(row)
    return examples


class Counter:
    """Counts what goes through a model while it is on: tokens of the layers, rows of the head.

    calls: the shape of the ids of each forward. longest: the most positions of a sequence.
    """

    def __init__(self, model: Any):
        self.calls: list[tuple[int, int]] = []
        self.rows = 0
        self.longest = 0
        head = model.get_output_embeddings()
        self._hooks = [
            model.base_model.register_forward_pre_hook(self._forward, with_kwargs=True),
            head.register_forward_pre_hook(self._head),
        ]

    def _forward(self, module: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        ids: Tensor = args[0] if args else inputs["input_ids"]
        self.calls.append((ids.shape[0], ids.shape[1]))
        positions = inputs.get("position_ids")
        last = ids.shape[1] if positions is None else int(positions.max()) + 1
        self.longest = max(self.longest, last)

    def _head(self, module: nn.Module, args: tuple) -> None:
        self.rows += args[0].shape[:-1].numel()

    @property
    def tokens(self) -> int:
        return sum(rows * width for rows, width in self.calls)

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def by_width(calls: Sequence[tuple[int, int]], longest: int) -> list[tuple[int, int]]:
    """Rows and widths of the same numbers of tokens, none wider than the longest sequence."""
    found = []
    for rows, width in calls:
        if width <= longest:
            found.append((rows, width))
            continue
        whole, rest = divmod(rows * width, longest)
        found.append((whole, longest))
        if rest:
            found.append((1, rest))
    return found

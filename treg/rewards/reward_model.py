"""A reward model's scalar R, of a text and of each of its beginnings.

The model is a sequence classifier of transformers. Those that read one position (Llama, Qwen,
Gemma, Mistral, GPT-2, ...) are a backbone and a linear head `score`, which is read at the last
token that is no padding. Under a causal backbone the end of a beginning has the same hidden state
in the whole text, so that one forward pass reads R at every token. Whether a model is of that kind
is checked at run time: see `RewardModel.check_reading`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from treg.data.annotated import model_fingerprint
from treg.heads.spec import name_of, without_cache
from treg.rewards.loading import (
    adapter_config,
    add_adapter,
    check_whole,
    is_adapter,
    load_model,
    load_tokenizer,
)
from treg.rewards.scorer import batches_of, padded

WHAT = "a sequence classifier (AutoModelForSequenceClassification)"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# of the largest score of a text: up to here, scores by one forward pass and by many are the same
TOLERANCE = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.bfloat16: 0.05,
    torch.float16: 0.05,
}


class RewardModel:
    """R of token ids, in float64, from a model that computes in its own dtype.

    Args:
        path: folder or hub name of a sequence classifier, or of a PEFT adapter on one.
        tokenizer: the same of its tokenizer; None: path.
        label: index, or name in id2label, of the logit that is R; None: the only one.
        dtype: one of DTYPES; None: float32 on a CPU, else auto, which is the checkpoint's.
        device: where it runs.
        tokens_per_batch: tokens of one forward, with padding.
        on_tokens: is told how many tokens each forward had.
    Raises:
        ValueError: no classifier, one whose head is not in the checkpoint, an encoder-decoder,
            a label that it does not have, several labels and none named, a slow tokenizer.
    """

    def __init__(
        self,
        path: str,
        *,
        tokenizer: str | None,
        label: str | int | None,
        dtype: str | None,
        device: torch.device,
        tokens_per_batch: int,
        on_tokens: Callable[[int], None],
    ):
        dtype = dtype or ("float32" if device.type == "cpu" else "auto")
        option = "model" if tokenizer is None else "tokenizer"
        self.tokenizer: Any = load_tokenizer(f"rewards.{option}", tokenizer or path)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"rewards.{option}: expected a fast tokenizer, which tells where in the text its "
                f"tokens lie, got {type(self.tokenizer).__name__}; give one with rewards.tokenizer"
            )
        self.model: Any = _load_classifier(path, dtype, self.tokenizer).to(device)
        self.device = device
        self.label = _label_index(self.model.config, label)
        self.tokens_per_batch = tokens_per_batch
        self.on_tokens = on_tokens
        config = self.model.config.get_text_config()
        self.pad: int | None = config.pad_token_id
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        # of tables that begin after the padding's row, only the tokenizer knows the length
        self.longest = int(min(positions, self.tokenizer.model_max_length))

    @property
    def name(self) -> str:
        """Class and type, for errors."""
        return name_of(self.model)

    @property
    def fingerprint(self) -> str:
        return model_fingerprint(self.model, adapters=True)

    def check_ids(self, ids: list[int]) -> None:
        """ValueError for a token that the model has no embedding of."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= rows:
            raise ValueError(
                f"rewards.tokenizer: expected ids below {rows}, the embeddings of {self.name}, got "
                f"{max(ids)}; give the reward model's own tokenizer"
            )

    def check_head(self) -> None:
        """ValueError unless there is a head that can be read at every position."""
        head = getattr(self.model, "score", None)
        if not callable(head) or self.model.base_model is self.model:
            raise _not_together(f"{self.name}, which has no head `score` after a backbone")

    def check_reading(self, ids: list[int], ends: Sequence[int]) -> None:
        """Check R of a text's beginnings, by one forward pass, against the model's own forward on
        each of them alone.

        Args:
            ids: of a text. ends: lengths of the beginnings, each in 1 .. len(ids).
        Raises:
            ValueError: they differ: a later token changes what is read, or the head reads more than
                one position.
        """
        (scores,) = self.of_beginnings([ids])
        alone = self.of_texts([ids[:end] for end in ends])
        difference = np.abs(scores[np.asarray(ends) - 1] - alone).max()
        allowed = TOLERANCE[self.model.dtype] * np.abs(scores).max()
        # not ">": a difference that is NaN is refused too
        if not difference <= allowed:
            raise _not_together(
                f"{self.name}, whose own scores of beginnings differ by {difference:.2e}, more "
                f"than {allowed:.2e}"
            )

    @torch.inference_mode()
    def of_beginnings(self, rows: Sequence[list[int]]) -> list[np.ndarray]:
        """R after each token of each row, [len(row)] float64, by one forward pass."""
        found: list[Any] = [None] * len(rows)
        backbone = self.model.base_model
        for batch in batches_of([(len(row),) for row in rows], self.tokens_per_batch):
            ids, mask = self._padded([rows[i] for i in batch])
            hidden = backbone(input_ids=ids, attention_mask=mask, **without_cache(backbone))[0]
            scores = self.model.score(hidden)[..., self.label].double().cpu().numpy()
            for k, i in enumerate(batch):
                found[i] = scores[k][self._read_at(rows[i])]
            self.on_tokens(int(mask.sum()))
        return found

    @torch.inference_mode()
    def of_texts(self, rows: Sequence[list[int]]) -> np.ndarray:
        """R of each row, [rows] float64, by the model's own forward."""
        found = np.empty(len(rows))
        # a model that does not know its padding reads the end of the row
        room = self.tokens_per_batch if self.pad is not None else 1
        for batch in batches_of([(len(row),) for row in rows], room):
            ids, mask = self._padded([rows[i] for i in batch])
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            if logits.ndim != 2 or len(logits) != len(batch):
                raise ValueError(
                    f"rewards.model: {self.name}: expected logits [{len(batch)}, labels], got "
                    f"{list(logits.shape)}"
                )
            found[batch] = logits[:, self.label].double().cpu().numpy()
            self.on_tokens(int(mask.sum()))
        return found

    def _read_at(self, row: list[int]) -> np.ndarray:
        """[len(row)]: the position that the model reads of each beginning, the last that is no
        padding. Where the padding token ends turns as well, it is not the last of the beginning.
        """
        places = np.arange(len(row))
        if self.pad is None:
            return places
        return np.maximum.accumulate(np.where(np.asarray(row) == self.pad, 0, places))

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        return padded(rows, self.pad or 0, self.device)


def _not_together(got: str) -> ValueError:
    return ValueError(
        "rewards.prefixes: expected a reward model that reads the last position of a causal "
        f"backbone for 'together', got {got}; give --rewards.prefixes separate"
    )


def _load_classifier(path: str, dtype: str, tokenizer: Any) -> Any:
    """The classifier, below PEFT; with its adapter, if path is one."""
    if is_adapter("model", path):
        return _load_adapted(path, dtype, tokenizer)
    _check_decoder_alone(path)
    model, missing = load_model(
        AutoModelForSequenceClassification, "model", path, WHAT, dtype=dtype
    )
    check_whole(missing, "model", path, WHAT)
    return model


def _load_adapted(path: str, dtype: str, tokenizer: Any) -> Any:
    """A classifier whose adapter lies at path. Its head is the adapter's, where that has one."""
    from peft.utils import load_peft_weights

    config = adapter_config("model", path)
    saved = {
        name.removeprefix("base_model.model."): weight.shape
        for name, weight in load_peft_weights(path, device="cpu").items()
    }
    base = config.base_model_name_or_path or ""
    _check_decoder_alone(base)
    labels = {"num_labels": saved["score.weight"][0]} if "score.weight" in saved else {}
    model, missing = load_model(
        AutoModelForSequenceClassification, "model", base, WHAT, dtype=dtype, **labels
    )
    check_whole(missing - saved.keys(), "model", path, WHAT)
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:
        # trainers set it in the config, which is not saved with an adapter
        text_config.pad_token_id = tokenizer.pad_token_id
    return add_adapter(model, config, "model", path).get_base_model()


def _check_decoder_alone(path: str) -> None:
    """ValueError for an encoder-decoder, which reads the answer in both of its halves."""
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception:  # loading the model says what is wrong
        return
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"rewards.model: expected a decoder or an encoder alone, got {path!r}, an "
            f"encoder-decoder (model_type {config.model_type!r})"
        )


def _label_index(config: Any, label: str | int | None) -> int:
    names = config.id2label
    listed = ", ".join(f"{index} {names.get(index, '')!r}" for index in range(config.num_labels))
    if label is None:
        if config.num_labels == 1:
            return 0
        raise ValueError(
            f"rewards.label: expected one of the labels {listed}, since R is one number, got none; "
            "name one with --rewards.label"
        )
    by_name = {name: int(index) for index, name in names.items()}
    found = by_name.get(str(label))
    if found is None and str(label).isdecimal():
        found = int(label)
    if found is None or found >= config.num_labels:
        raise ValueError(f"rewards.label: expected one of the labels {listed}, got {label!r}")
    return found

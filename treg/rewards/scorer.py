"""Log-probs of completions after contexts, forward only, in batches of a bounded number of tokens.

Where a completion is scored after two contexts that begin alike, their common beginning can be run
once: its keys and values serve both continuations. For the two requests to rewrite a response y to
a prompt x, which agree up to their last words, that takes |x| + 3|y| + c tokens, c of requests,
instead of 2|x| + 4|y| + 2c. A model that does not give the same log-probs that way is run without.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from treg.data import common_prefix
from treg.heads import HeadSpec, check_sequences, install_head
from treg.ops import linear_logprobs

log = logging.getLogger(__name__)

# mean absolute difference, in nats, up to which log-probs with and without a shared beginning count
# as the same
SHARED_TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-3,
    torch.bfloat16: 0.05,
    torch.float16: 0.05,
}
TwoContexts = tuple[list[int], list[int], list[int]]  # two contexts, and the completion of both


class Scorer:
    """Log-probs of completions after contexts, in batches of a bounded number of tokens.

    Args:
        model: a Hugging Face causal LM, on its device; it is put into eval mode.
        tokens_per_batch: tokens of one forward, with padding.
        share_prefix: whether the common beginning of two contexts may be run once: it is, when
            `try_sharing` has found the same log-probs that way.
        on_tokens: is told how many tokens each forward had.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        tokens_per_batch: int,
        share_prefix: bool,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ):
        self.spec: HeadSpec = install_head(model)
        check_sequences(self.spec)
        self.tokens_per_batch = tokens_per_batch
        self.may_share = share_prefix
        self.share = False
        self.on_tokens = on_tokens
        model.eval()
        weight: Any = self.spec.projection.weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        config = model.config.get_text_config()
        self.longest: int = getattr(config, "max_position_embeddings", None) or 2**31

    def score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Log-probs [tokens of the completion], on the CPU, of each completion after its context.

        rows: (ids of the context, ids of the completion).
        """
        return [found["logprobs"] for found in self.statistics(rows)]

    def statistics(
        self, rows: Sequence[tuple[list[int], list[int]]], outputs: Sequence[str] = ()
    ) -> list[dict[str, Tensor]]:
        """What the model says at each token of each completion after its context.

        Args:
            rows: as in `score`, to the same bits.
            outputs: names of `linear_logprobs`, such as "entropy": of the distribution from which
                the token comes, in nats.
        Returns:
            A dict for each row: "logprobs" and the outputs, [tokens of the completion], on the CPU.
        """
        found: list[Any] = [None] * len(rows)
        sizes = [(len(context) + len(completion) - 1,) for context, completion in rows]
        for batch in self._batches(sizes):
            completions = [rows[i][1] for i in batch]
            sequences = [rows[i][0] + rows[i][1][:-1] for i in batch]
            ids, mask = self._padded(sequences, left=False)
            inputs = {"input_ids": ids, "attention_mask": mask}
            scored = self._statistics(ids, completions, inputs, outputs)
            for i, values in zip(batch, scored, strict=True):
                found[i] = values
            self.on_tokens(int(mask.sum()))
        return found

    def score_both(self, rows: Sequence[TwoContexts]) -> list[tuple[Tensor, Tensor]]:
        """Log-probs of each completion after its first and after its second context.

        rows: (ids of the first context, of the second, of the completion).
        """
        if not self.share:
            apart = []
            for first, second, completion in rows:
                apart += [(first, completion), (second, completion)]
            scored = self.score(apart)
            return list(zip(scored[::2], scored[1::2], strict=True))
        found: list[Any] = [None] * len(rows)
        shared, tails = [], []
        for first, second, completion in rows:
            # something of each context must be left to predict the completion from
            length = min(common_prefix(first, second), len(first) - 1, len(second) - 1)
            shared.append(length)
            tails.append([context[length:] + completion[:-1] for context in (first, second)])
        sizes = [
            (length, 2 * max(map(len, both))) for length, both in zip(shared, tails, strict=True)
        ]
        for batch in self._batches(sizes):
            scored = self._score_batch_of_two(
                [rows[i][0][: shared[i]] for i in batch],
                [tail for i in batch for tail in tails[i]],
                [rows[i][2] for i in batch for _ in range(2)],
            )
            for k, i in enumerate(batch):
                found[i] = (scored[2 * k], scored[2 * k + 1])
        return found

    def _score_batch_of_two(
        self, beginnings: list[list[int]], tails: list[list[int]], completions: list[list[int]]
    ) -> list[Tensor]:
        """Log-probs of two completions for each beginning, which runs once; tails: what follows."""
        ids, mask = self._padded(beginnings, left=True)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        found = self.spec.backbone(
            input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True
        )
        name = self._name_of_cache
        cache = getattr(found, name)
        cache.batch_repeat_interleave(2)
        tail_ids, tail_mask = self._padded(tails, left=False)
        start = mask.sum(-1, keepdim=True).repeat_interleave(2, 0)
        inputs = {
            "input_ids": tail_ids,
            "attention_mask": torch.cat([mask.repeat_interleave(2, 0), tail_mask], -1),
            # padding repeats the last position: further ones may be beyond the model's table
            "position_ids": start + tail_mask.cumsum(-1) - 1,
            name: cache,
        }
        scored = self._statistics(tail_ids, completions, inputs)
        self.on_tokens(int(mask.sum() + tail_mask.sum()))
        return [values["logprobs"] for values in scored]

    @cached_property
    def _name_of_cache(self) -> str:
        """transformers 5.24 has given the keys and values of a beginning another name."""
        parameters = inspect.signature(self.spec.backbone.forward).parameters
        return "cache" if "cache" in parameters else "past_key_values"

    def try_sharing(self, rows: list[TwoContexts]) -> None:
        """Share the beginning from now on if log-probs are the same with it; never, if not."""
        if not self.may_share:
            return
        with torch.inference_mode():
            try:
                self.share = True
                shared = self.score_both(rows)
            except Exception as error:  # whatever a model without a usable cache raises
                log.warning(
                    "the common beginning of the two requests is not shared: %s: %s",
                    type(error).__name__,
                    error,
                )
                self.share = self.may_share = False
                return
            self.share = False
            apart = self.score_both(rows)
        differences = [
            (a - b).abs()
            for with_it, without in zip(shared, apart, strict=True)
            for a, b in zip(with_it, without, strict=True)
        ]
        difference = torch.cat(differences).mean().item()
        self.share = self.may_share = difference <= SHARED_TOLERANCE[self.dtype]
        if not self.share:
            log.warning(
                "the common beginning of the two requests is not shared: log-probs differ by "
                "%.3g nats",
                difference,
            )

    def _statistics(
        self,
        ids: Tensor,
        completions: list[list[int]],
        inputs: Mapping[str, Any],
        outputs: Sequence[str] = (),
    ) -> list[dict[str, Tensor]]:
        """Log-probs and outputs of completions whose last tokens are predicted at the ends of the
        right-padded rows of ids.

        inputs: of the model, by name.
        """
        width = ids.shape[1]
        lengths = [len(completion) for completion in completions]
        row_ends = inputs["attention_mask"][:, -width:].sum(-1).tolist()
        scored = []
        for i, (end, length) in enumerate(zip(row_ends, lengths, strict=True)):
            scored.append(torch.arange(i * width + end - length, i * width + end))
        targets = [token for completion in completions for token in completion]
        hidden = self.spec.hidden(**inputs)
        rows = hidden.reshape(-1, hidden.shape[-1])[torch.cat(scored).to(self.device)]
        target = torch.tensor(targets).to(self.device)

        names = ("logprobs", *outputs)

        def head(rows: Tensor, operands: dict[str, Any]) -> list[Tensor]:
            found = linear_logprobs(rows, target=target, outputs=tuple(outputs), **operands)
            return [getattr(found, name) for name in names]

        columns = [values.cpu().split(lengths) for values in self.spec.through(head, rows)]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def _padded(self, rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        return padded(rows, self.pad, self.device, left=left)

    def _batches(self, sizes: list[tuple[int, ...]]) -> list[list[int]]:
        return batches_of(sizes, self.tokens_per_batch)


def padded(
    rows: Sequence[list[int]], pad: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """ids and mask, [rows, longest] int64."""
    side = "left" if left else "right"
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    ones = [torch.ones_like(x) for x in ids]
    filled = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence(ones, batch_first=True, padding_value=0, padding_side=side)
    return filled.to(device), mask.to(device)


def batches_of(sizes: Sequence[tuple[int, ...]], tokens_per_batch: int) -> list[list[int]]:
    """Indices, the longest first, in batches that stay within tokens_per_batch with padding.

    sizes: of each row, the tokens of the parts that are padded apart.
    """
    batches: list[list[int]] = []
    width: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sum(sizes[i]), i)):
        wider = [max(pair) for pair in zip(width, sizes[i], strict=True)] if batches else []
        if batches and sum(wider) * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(i)
            width = wider
        else:
            batches.append([i])
            width = list(sizes[i])
    return batches

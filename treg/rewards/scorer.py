"""Log-probs of completions after contexts, forward only, in batches of a bounded number of tokens.

What several rows begin with is run once (`treg.data.tree`): both answers after one prompt, and the
requests that judge them after one conversation. Answers y and z to a prompt x take

    apart    6 |x| + 5 (|y| + |z|) + 4 c       shared    2 |x| + 4 (|y| + |z|) + 4 c

tokens: once by themselves, and each after two requests that show x and the answer and have c words
of their own. A model that does not give the same log-probs that way is run row by row.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from treg.data.tree import grow, model_inputs, padded_rows, shared_beginning
from treg.heads import HeadSpec, check_branches, check_sequences, install_head
from treg.heads.sharing import LIMITS, precision_of, spread
from treg.ops import linear_logprobs

log = logging.getLogger(__name__)

TRIED = 2  # of the longest rows, and of the shortest, on which sharing is tried
# tokens of a row in which attention takes a mask of the whole row; elsewhere a batch is one row
MASKED_ROW = 1024
BY_BRANCH = ("sdpa", "flex_attention")
Rows = Sequence[tuple[list[int], list[int]]]  # ids of the context, ids of the completion
# one forward: which rows, the model's inputs, where each row's tokens but the last stand in the
# flattened hidden states, and how many tokens run
Batch = tuple[list[int], dict[str, Any], Sequence[np.ndarray], int]


class Scorer:
    """Log-probs of completions after contexts, in batches of a bounded number of tokens.

    Args:
        model: a Hugging Face causal LM, on its device; it is put into eval mode.
        tokens_per_batch: tokens of one forward, with padding.
        share_prefix: whether what rows begin with may be run once: it is, if log-probs are then the
            same.
        on_tokens: is told how many tokens each forward had.
        trial: gives rows on which that is tried; none: the first rows that are scored.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        tokens_per_batch: int,
        share_prefix: bool,
        on_tokens: Callable[[int], None] = lambda tokens: None,
        trial: Callable[[], Rows] = tuple,
    ):
        self.spec: HeadSpec = install_head(model)
        check_sequences(self.spec)
        self.tokens_per_batch = tokens_per_batch
        # None: not tried yet
        self.share: bool | None = None if share_prefix else False
        self.on_tokens = on_tokens
        self.trial = trial
        model.eval()
        weight: Any = self.spec.projection.weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.config = model.config.get_text_config()
        self.longest: int = getattr(self.config, "max_position_embeddings", None) or 2**31

    def score(self, rows: Rows) -> list[Tensor]:
        """Log-probs [tokens of the completion], on the CPU, of each completion after its context.

        rows: (ids of the context, ids of the completion). What they begin with is run once in a
            call: give those that begin alike together.
        """
        return [found["logprobs"] for found in self.statistics(rows)]

    def statistics(self, rows: Rows, outputs: Sequence[str] = ()) -> list[dict[str, Tensor]]:
        """What the model says at each token of each completion after its context.

        Args:
            rows: as in `score`, to the same bits.
            outputs: names of `linear_logprobs`, such as "entropy": of the distribution from which
                the token comes, in nats.
        Returns:
            A dict for each row: "logprobs" and the outputs, [tokens of the completion], on the CPU.
        """
        if not rows:
            return []
        if self.share is None:
            self._try_sharing(self.trial() or rows)
        return self._shared(rows, outputs) if self.share else self._apart(rows, outputs)

    def _apart(self, rows: Rows, outputs: Sequence[str]) -> list[dict[str, Tensor]]:
        """Each row by itself, padded."""
        return self._run(rows, self._padded(rows), outputs)

    def _shared(self, rows: Rows, outputs: Sequence[str]) -> list[dict[str, Tensor]]:
        """What rows begin with once."""
        return self._run(rows, self._trees(rows), outputs)

    def _run(
        self, rows: Rows, batches: Iterable[Batch], outputs: Sequence[str]
    ) -> list[dict[str, Tensor]]:
        found: list[Any] = [None] * len(rows)
        for batch, inputs, places, tokens in batches:
            hidden = self.spec.hidden(**inputs)
            scored = self._heads(hidden, [rows[i] for i in batch], places, outputs)
            for i, values in zip(batch, scored, strict=True):
                found[i] = values
            self.on_tokens(tokens)
        return found

    def _padded(self, rows: Rows) -> Iterator[Batch]:
        sizes = [(len(context) + len(completion) - 1,) for context, completion in rows]
        for batch in batches_of(sizes, self.tokens_per_batch):
            sequences = [rows[i][0] + rows[i][1][:-1] for i in batch]
            ids, mask = padded(sequences, self.pad, self.device)
            width = ids.shape[1]
            places = [np.arange(k * width, k * width + len(x)) for k, x in enumerate(sequences)]
            inputs = {"input_ids": ids, "attention_mask": mask}
            yield batch, inputs, places, sum(map(len, sequences))

    def _trees(self, rows: Rows) -> Iterator[Batch]:
        sequences = [np.array(context + completion[:-1]) for context, completion in rows]
        lengths = list(map(len, sequences))
        most = max(max(lengths), min(self.tokens_per_batch, MASKED_ROW))
        if self.config._attn_implementation in BY_BRANCH:
            most = self.tokens_per_batch  # no mask of a whole row is made
        # sorted, each row shares with the one before it all that it shares with any
        order = sorted(range(len(rows)), key=lambda i: rows[i][0] + rows[i][1])
        groups: list[list[int]] = []
        tokens = 0
        for i in order:
            new = lengths[i]
            if groups:
                new -= shared_beginning(sequences[groups[-1][-1]], sequences[i])
            if groups and tokens + new <= most:
                groups[-1].append(i)
                tokens += new
            else:
                groups.append([i])
                tokens = lengths[i]
        trees = [grow([sequences[i] for i in group]) for group in groups]
        sizes = [(tree.tokens,) for tree in trees]
        for batch in batches_of(sizes, self.tokens_per_batch):
            tree = padded_rows([trees[k] for k in batch], self.pad)
            members = [i for k in batch for i in groups[k]]
            yield members, model_inputs(tree, self.device), tree.paths, tree.tokens

    def _try_sharing(self, rows: Rows) -> None:
        """Share what rows begin with from now on, if log-probs are then the same; never, if not."""
        self.share = False
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
        some = [rows[i] for i in sorted({*by_length[:TRIED], *by_length[-TRIED:]})]
        on_tokens, self.on_tokens = self.on_tokens, lambda tokens: None
        try:
            with torch.inference_mode():
                self._check_frequencies()
                check_branches(self.spec)
                shared = self._shared(some, ())
                apart = [self._apart([row], ())[0] for row in some]
        except Exception as error:  # whatever a model without such masks raises
            log.warning("what rows begin with is not shared: %s: %s", type(error).__name__, error)
            return
        finally:
            self.on_tokens = on_tokens
        found, expected = (
            torch.cat([row["logprobs"].double() for row in rows]) for rows in (shared, apart)
        )
        kind, dtype = self.device.type, self.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        difference, _ = spread(found, expected)
        self.share = difference <= LIMITS[precision_of(dtype)][1]
        if not self.share:
            log.warning(
                "what rows begin with is not shared: log-probs differ by %.3g nats", difference
            )

    def _check_frequencies(self) -> None:
        """ValueError where positions say something else beside a longer row in the same forward."""
        parameters = str(getattr(self.config, "rope_parameters", None))
        for kind in ("longrope", "dynamic"):
            if f"'{kind}'" in parameters:
                raise ValueError(f"its rope_type is {kind!r}, which depends on the longest row")

    def _heads(
        self,
        hidden: Tensor,
        rows: Rows,
        places: Sequence[np.ndarray],
        outputs: Sequence[str],
    ) -> list[dict[str, Tensor]]:
        """Log-probs and outputs of completions.

        Args:
            hidden: [rows, width, D].
            places: of each row, where its tokens but the last stand in the flattened hidden states.
        """
        lengths = [len(completion) for _, completion in rows]
        last = [x[len(x) - n :] for x, n in zip(places, lengths, strict=True)]
        scored = torch.from_numpy(np.concatenate(last)).to(self.device)
        targets = [token for _, completion in rows for token in completion]
        target = torch.tensor(targets).to(self.device)
        names = ("logprobs", *outputs)

        def head(states: Tensor, operands: dict[str, Any]) -> list[Tensor]:
            found = linear_logprobs(states, target=target, outputs=tuple(outputs), **operands)
            return [getattr(found, name) for name in names]

        states = hidden.flatten(0, 1)[scored]
        columns = [values.cpu().split(lengths) for values in self.spec.through(head, states)]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, [rows, longest] int64, padded on the right."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    ones = [torch.ones_like(x) for x in ids]
    filled = pad_sequence(ids, batch_first=True, padding_value=pad)
    mask = pad_sequence(ones, batch_first=True, padding_value=0)
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

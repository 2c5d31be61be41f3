"""Token rewards and reference log-probs of a preference file, by the reference model, once and
offline.

Each response y to a prompt x is read by the model in three contexts, forward only:

    x                               log pi_ref(y_t | x, y_<t), of which the sum is kept
    better(x, y), worse(x, y)       the two requests to rewrite y (`treg.rewards.contrastive`), y then scored as the
                                    rewritten answer: rhat_t = sigmoid(log p_better - log p_worse) -
                                        0.5

The ids of y are the same in all three, appended to each context's ids. What ends a response
(end-of-turn tokens) is no part of a rewritten answer and gets the reward 0.

The pairs, sorted by length, are cut into parts. A part is computed as a whole and written as a
whole: a run that is killed loses the parts that it was working on, and the next one computes them
in the same batches, to the same bits.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from treg.data import SIDES, EncodeOptions, Pair, Report, RowProblem, load_pairs, pair_tokens
from treg.data.annotated import (
    is_annotated,
    merge_annotated,
    model_fingerprint,
    read_meta,
    tokenizer_fingerprint,
    write_annotated,
)
from treg.files import locked, replacing
from treg.rewards import ContrastivePrompts, contrastive_rewards
from treg.rewards.scorer import Scorer, content_length

PART_PAIRS = 32
CUTTING = ("tokens_per_batch", "share_prefix")


@dataclass(frozen=True)
class AnnotateOptions:
    """encode: how rows become ids. prompts: the two requests. tokens_per_batch: tokens of one
    forward, with padding.

    per_token: keep the reference's log-prob of each token, which token-weighted margins and
    `treg/alignment` need. share_prefix: run the common beginning of the two requests once (see
    `treg.rewards.scorer`).
    """

    encode: EncodeOptions = field(default_factory=EncodeOptions)
    prompts: ContrastivePrompts = field(default_factory=ContrastivePrompts)
    tokens_per_batch: int = 16384
    per_token: bool = False
    share_prefix: bool = True

    def __post_init__(self):
        if not isinstance(self.tokens_per_batch, int) or self.tokens_per_batch < 1:
            raise ValueError(
                f"tokens_per_batch: expected a positive integer, got {self.tokens_per_batch!r}"
            )


def annotate(
    model: Any,
    tokenizer: Any,
    source: Any,
    output: str | Path,
    options: AnnotateOptions = AnnotateOptions(),
    *,
    split: str = "train",
    strict: bool = False,
    limit: int | None = None,
    progress: bool = True,
) -> Report:
    """Annotate the pairs of source with model into output, a parquet file (see
    `treg.data.annotated`).

    Finished parts lie in `output`.parts until all are there. A run that was stopped goes on from
    them, if they were made from the same rows with the same model, tokenizer and options. Under
    `accelerate launch` or torchrun the processes share the parts among them, and the first puts
    them together.

    Args:
        model: a Hugging Face causal LM, on its device; it is put into eval mode.
        source, split, strict, limit: see `treg.data.load_pairs`.
    Returns:
        What became of the rows.
    Raises:
        ValueError: no usable row; an output or parts that were made otherwise; a head that cannot
            be read.
    """
    output, state = Path(output), process_state()
    if output.suffix != ".parquet":
        raise ValueError(f"output: expected a path that ends in .parquet, got {output}")
    pairs, report = load_pairs(
        source, tokenizer, options.encode, split=split, strict=strict, limit=limit
    )
    made_with = {
        "fingerprint": {
            "model": model_fingerprint(model, adapters=True),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "pairs": _pairs_fingerprint(pairs),
        },
        "settings": asdict(options)
        | {"dtype": str(model.dtype), "autocast": _autocast(model.device.type)},
    }
    # how the work was cut changes roundings only: after running out of memory one goes on with
    # smaller batches
    same = made_with | {
        "settings": {k: v for k, v in made_with["settings"].items() if k not in CUTTING}
    }
    folder = Path(f"{output}.parts")
    if output.exists():
        if not is_annotated(output):
            raise ValueError(
                f"{output}: not written by `treg annotate`; give another output, or remove {output}"
            )
        meta = read_meta(output)
        _check_same(output, meta, same)
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        return Report(**meta["report"])
    with contextlib.ExitStack() as stack:
        with state.main_process_first():
            if state.is_main_process:
                stack.enter_context(_claimed(folder, same | {"parts": {"part_pairs": PART_PAIRS}}))
        files, problems = _annotate_parts(
            model, tokenizer, pairs, folder, options, strict, progress, state
        )
        for problem, truncated in problems:
            report.kept -= 1
            report.truncated -= truncated
            report.problem(problem)
        if not report.kept:
            raise ValueError(f"data: no pair fits into the model's context: {report}")
        if state.is_main_process:
            for left in output.parent.glob(
                f"{output.name}.*.tmp"
            ):  # of a run that was killed while it wrote
                left.unlink()
            merge_annotated(files, output, made_with | {"report": asdict(report)})
            shutil.rmtree(folder)
        state.wait_for_everyone()
    return report


def _annotate_parts(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    folder: Path,
    options: AnnotateOptions,
    strict: bool,
    progress: bool,
    state: PartialState,
) -> tuple[list[Path], list[tuple[RowProblem, bool]]]:
    """The files of all parts, once every process has done its share; each problem, and if its pair
    was truncated.
    """
    order = sorted(
        pairs, key=lambda p: (-pair_tokens(vars(p)), p.index)
    )  # the longest first: memory runs out early
    parts = [order[i : i + PART_PAIRS] for i in range(0, len(order), PART_PAIRS)]
    files = [folder / f"part-{i:05}.parquet" for i in range(len(parts))]
    todo = [i for i in range(len(parts)) if not files[i].exists()]
    state.wait_for_everyone()  # until everyone has counted, nobody adds a part
    # by what is left, not by number, so that the processes have equal work after a stop as well
    mine = todo[state.process_index :: state.num_processes]
    with (
        _Progress([parts[i] for i in mine], progress and state.is_main_process) as bar,
        torch.inference_mode(),
    ):
        scorer = Scorer(
            model,
            tokenizer,
            options.prompts,
            tokens_per_batch=options.tokens_per_batch,
            share_prefix=options.share_prefix,
            on_tokens=bar.tokens,
        )
        if mine and options.share_prefix:
            scorer.check_sharing(
                order
            )  # of all pairs, so that every process comes to the same conclusion
        for i in mine:
            rows, problems = annotate_pairs(scorer, parts[i], per_token=options.per_token)
            if problems and strict:
                raise problems[0]
            cut = {pair.row.where: pair.truncated for pair in parts[i]}
            details = {
                "problems": [((p.reason, p.detail, p.where), cut[p.where]) for p in problems]
            }
            write_annotated(files[i], rows, details, per_token=options.per_token)
            bar.pairs(len(parts[i]))
    state.wait_for_everyone()
    found = [problem for file in files for problem in read_meta(file)["problems"]]
    return files, [(RowProblem(*problem), truncated) for problem, truncated in found]


def process_state() -> PartialState:
    """Who the processes are. Without the argument, PartialState takes each of several on CPU for
    the only one.
    """
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )


def annotate_pairs(
    scorer: Scorer, pairs: Sequence[Pair], *, per_token: bool = False
) -> tuple[list[dict[str, Any]], list[RowProblem]]:
    """The rows of the annotated file for some pairs, and a problem for each that the model's
    context cannot hold.
    """
    responses, problems = [], []
    for pair in pairs:
        sides = [
            (pair, side, getattr(pair, f"{side}_ids").tolist(), scorer.requests(pair, side))
            for side in SIDES
        ]
        need = max(
            len(context) + len(y) - 1
            for *_, y, contexts in sides
            for context in (pair.prompt_ids, *contexts)
        )
        if need <= scorer.longest:
            responses += sides
            continue
        detail = f"{need} tokens, the model has {scorer.longest} positions; lower max_length"
        problems.append(RowProblem("contrastive prompt too long", detail, pair.row.where))
    ref = scorer.score([(pair.prompt_ids.tolist(), y) for pair, _, y, _ in responses])
    judged = scorer.judge([(*contexts, y) for *_, y, contexts in responses])
    rows = {
        p.index: {"index": p.index, "where": p.row.where, "prompt_ids": p.prompt_ids}
        for p, *_ in responses
    }
    for (pair, side, y, _), logps, (better, worse) in zip(responses, ref, judged, strict=True):
        rewards = contrastive_rewards(better, worse)
        rewards[content_length(y, scorer.tokenizer) :] = 0.0
        rows[pair.index] |= {
            f"{side}_ids": getattr(pair, f"{side}_ids"),
            f"{side}_token_rewards": rewards.float().numpy(),
            f"ref_{side}_logps": logps.double().sum().item(),
        }
        if per_token:
            rows[pair.index][f"ref_{side}_token_logps"] = logps.float().numpy()
    return list(rows.values()), problems


def _pairs_fingerprint(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        digest.update(pair.index.to_bytes(8, "little"))
    return digest.hexdigest()[:16]


def _autocast(device: str) -> str | None:
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


@contextlib.contextmanager
def _claimed(folder: Path, made_with: dict[str, Any]) -> Iterator[None]:
    """The folder of parts, made or found to be of the same annotation, for this run alone."""
    with locked(folder):
        manifest = folder / "manifest.json"
        if manifest.exists():
            _check_same(folder, json.loads(manifest.read_text()), made_with)
        else:
            for part in folder.glob(
                "part-*.parquet"
            ):  # of an annotation that was stopped while it removed them
                part.unlink()
            with replacing(manifest) as temporary:
                temporary.write_text(json.dumps(made_with, indent=1))
        yield


def _check_same(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    expected = json.loads(json.dumps(expected))  # as a file gives it back
    for group, values in sorted(
        expected.items(), reverse=True
    ):  # settings first: they say what a fingerprint hides
        for name, value in values.items():
            got = found.get(group, {}).get(name)
            if got != value:
                raise ValueError(
                    f"{path}: made with {name} {got!r}, now it is {value!r}; give another output, or remove {path}"
                )


class _Progress:
    """A bar over pairs, with tokens/s. Quiet where it is not wanted."""

    def __init__(self, parts: Sequence[Sequence[Pair]], shown: bool):
        self.bar = tqdm(
            total=sum(map(len, parts)),
            unit="pair",
            desc="annotate",
            disable=not shown,
            smoothing=0.1,
        )
        self.seen = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def tokens(self, count: int) -> None:
        self.seen += count
        if not self.bar.disable:
            elapsed = max(self.bar.format_dict["elapsed"], 1e-9)
            self.bar.set_postfix_str(f"{self.seen / elapsed:,.0f} tokens/s")

    def pairs(self, count: int) -> None:
        self.bar.update(count)

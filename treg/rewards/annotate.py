"""Per-token signals and reference log-probs of a preference file, once and offline.

Each response y to a prompt x gets what a source gives its tokens (`treg.rewards.base`) and, from
the reference model, the sum of log pi_ref(y_t | x, y_<t). Forward only.

The pairs, sorted by length, are cut into parts (`treg.rewards.cutting`). A part is computed as a
whole and written as a whole: a run that is killed loses the parts that it was working on, and the
next one computes them in the same batches, to the same bits.
"""

import contextlib
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from treg.data import SIDES, EncodeWork, Pair, Report, RowProblem, pair_tokens
from treg.data.annotated import (
    is_annotated,
    merge_annotated,
    read_annotated,
    read_meta,
    without_weight,
    write_annotated,
)
from treg.data.mixture import load_sources
from treg.files import digest_of, plain, read_json, remove_leftovers
from treg.rewards import (
    Context,
    Response,
    TokenRewardSource,
    columns_read,
    load_source,
)
from treg.rewards.annotate_options import AnnotateOptions
from treg.rewards.base import check_response
from treg.rewards.cutting import cut_parts, kept_on_interrupt, part_tokens
from treg.rewards.engines import Engine
from treg.rewards.kept import KeptColumns
from treg.rewards.made_with import (
    SERVER,
    begun_on,
    check_same,
    comparable,
    fingerprint_of,
    first_change,
    made_with_of,
)
from treg.rewards.parts import MANIFEST, ROWS, Parts, claimed
from treg.rewards.progress import Progress, counted_rows
from treg.rewards.response import ResponsePairs
from treg.rewards.shaping import Step, score_shaped

log = logging.getLogger(__name__)

DEFAULTS = AnnotateOptions()
ONE_PROCESS = EncodeWork()
PART_PAIRS = 32  # at most


def annotate(
    model: Any,
    tokenizer: Any,
    source: Any,
    output: str | Path,
    options: AnnotateOptions = DEFAULTS,
    *,
    split: str = "train",
    strict: bool = False,
    limit: int | None = None,
    progress: bool = True,
    work: EncodeWork = ONE_PROCESS,
) -> Report:
    """Annotate the pairs of source with model into output, a parquet file (see
    `treg.data.annotated`).

    Finished parts lie in `output`.parts until all are there. A run that was stopped goes on from
    them, if they were made from the same rows with the same model, tokenizer and options. Under
    `accelerate launch` or torchrun the processes share the parts among them, and the first puts
    them together.

    Args:
        model: a Hugging Face causal LM, on its device, which is put into eval mode; or an `Engine`
            that has it elsewhere, as `treg.rewards.server.ServedModel`.
        source, split, strict, limit: see `treg.data.load_pairs`. source may be several paths in a
            list: their rows follow one another, and `where` says whose each is; limit is of each.
        work: how rows are encoded. Without a folder of its own they are kept among the parts.
    Returns:
        What became of the rows.
    Raises:
        ValueError: no usable row; an output or parts that were made otherwise; a head that cannot
            be read; what the source of token rewards refuses.
    """
    output = Path(output)
    if output.suffix != ".parquet":
        raise ValueError(f"output: expected a path that ends in .parquet, got {output}")
    state = process_state()
    folder = Path(f"{output}.parts")
    encode = options.encode.dated(tokenizer, begun_on(output, folder))
    day = [encode.date]
    broadcast_object_list(day)  # one day for all processes
    options = replace(options, encode=replace(encode, date=day[0]))
    known = {*options.keep_columns, *columns_read(options.rewards, options.source_options)}
    if work.cache is None and not output.exists():
        work = replace(work, cache=folder / ROWS)
    work = shared_work(work)
    with counted_rows(progress and state.is_main_process) as rows:
        pairs, report = load_sources(
            source,
            tokenizer,
            options.encode,
            split=split,
            strict=strict,
            limit=limit,
            known=known,
            on_rows=rows,
            work=work,
        )
    # the longest first: memory runs out early
    order = sorted(pairs, key=lambda pair: (-pair_tokens(vars(pair)), pair.index))
    bar = Progress(progress and state.is_main_process)
    if not isinstance(model, Engine):
        model.eval()  # before the source sees it
    context = Context(
        model,
        tokenizer,
        tokens_per_batch=options.tokens_per_batch,
        share_prefix=options.share_prefix,
        on_tokens=bar.tokens,
        pairs=ResponsePairs(order, tokenizer),
    )
    fingerprint = fingerprint_of(model)  # before a source adds to the model
    rewards = load_source(options.rewards, options.source_options, context)
    kept = KeptColumns(options.keep_columns, pairs)
    made_with = made_with_of(context, fingerprint, rewards, pairs, options)
    if kept.names:
        made_with["settings"]["keep_columns"] = list(kept.names)
        made_with["fingerprint"]["columns"] = kept.fingerprint
    same = partial(check_same, changed=lambda files: first_change(files, pairs, tokenizer))
    if output.exists():
        report = _finished(output, comparable(made_with), same)
        if state.is_main_process:
            Parts(folder, "", []).remove()
        return report
    tokens = part_tokens(model)
    cut = {"part_pairs": PART_PAIRS, "part_tokens": tokens}
    expected = plain(comparable(made_with) | {"parts": cut})
    with contextlib.ExitStack() as stack:
        with state.main_process_first():
            if state.is_main_process:
                stack.enter_context(claimed(folder, expected, same))
        # what a server says of itself may change under a run
        run_digest = digest_of({k: v for k, v in expected.items() if k != SERVER})
        parts = Parts(folder, run_digest, cut_parts(order, PART_PAIRS, tokens))
        run = _Run(context, rewards, options, kept, parts, strict)
        files, problems = _annotate_parts(run, bar, state)
        for problem, truncated in problems:
            report.late_problem(problem, truncated=truncated)
        if not report.kept:
            raise ValueError(f"data: expected a pair that can be annotated, found none: {report}")
        if state.is_main_process:
            remove_leftovers(output)  # of a run that was killed while it wrote
            began = read_json(folder / MANIFEST)
            made_with |= {k: v for k, v in began.items() if k == SERVER}
            merge_annotated(files, output, made_with | {"report": report.stored()})
            parts.remove()
            _tell_of_empty_masks(output)
        state.wait_for_everyone()
    return report


def _finished(output: Path, expected: dict[str, Any], check_same: Callable) -> Report:
    """The report of an output that is there; ValueError if it was made otherwise, or is damaged."""
    if not is_annotated(output):
        raise ValueError(
            f"{output}: not written by `treg annotate`; give another output, or remove {output}"
        )
    examples, meta = read_annotated(output)
    check_same(output, meta, plain(expected))
    report = Report(**meta["report"])
    if report.kept != len(examples):
        raise ValueError(
            f"{output}: expected the {report.kept} pairs that were annotated, got {len(examples)}; "
            f"give another output, or remove {output}"
        )
    return report


def _tell_of_empty_masks(output: Path) -> None:
    empty, responses = without_weight(output)
    if empty:
        log.warning(
            "%s: %d of %d responses keep no token: all their token_weights are 0, they add nothing "
            "to the implicit rewards",
            output,
            empty,
            responses,
        )


@dataclass(frozen=True)
class _Run:
    """What the parts of a run have in common."""

    context: Context
    rewards: TokenRewardSource
    options: AnnotateOptions
    kept: KeptColumns
    parts: Parts
    strict: bool

    @cached_property
    def masks(self) -> bool:
        """Whether tokens of some completion are not scored."""
        return any(pair.masked for part in self.parts.pairs for pair in part)


def _annotate_parts(
    run: _Run, bar: Progress, state: PartialState
) -> tuple[list[Path], list[tuple[RowProblem, bool]]]:
    """The files of all parts, once every process has done its share; each problem, and if its pair
    was truncated.
    """
    parts = run.parts.pairs
    files = [run.parts.file(i) for i in range(len(parts))]
    todo = [i for i in range(len(parts)) if not run.parts.is_whole(i)]
    state.wait_for_everyone()  # until everyone has counted, nobody adds a part
    # by what is left, not by number, so that the processes have equal work after a stop as well
    mine = todo[state.process_index :: state.num_processes]
    with kept_on_interrupt(files, parts), bar.over([parts[i] for i in mine]):
        for i in mine:
            with torch.inference_mode():
                _annotate_part(run, i)
            bar.part_done()
    state.wait_for_everyone()
    found = [problem for file in files for problem in read_meta(file)["problems"]]
    state.wait_for_everyone()  # until everyone has read them, nobody removes the parts
    return files, [(RowProblem(*problem), truncated) for problem, truncated in found]


def _annotate_part(run: _Run, number: int) -> None:
    """Write the rows of a part, and its problems into the metadata."""
    options, part = run.options, run.parts.pairs[number]
    missing = {pair.index: run.kept.problem(pair) for pair in part}
    rows, problems = annotate_pairs(
        run.rewards,
        run.context,
        [pair for pair in part if missing[pair.index] is None],
        reference=options.reference,
        per_token=options.per_token,
        masks=run.masks,
        steps=options.steps,
    )
    problems += [problem for problem in missing.values() if problem is not None]
    if problems and run.strict:
        raise problems[0]
    by_index = {pair.index: pair for pair in part}
    rows = [row | run.kept.of(by_index[row["index"]]) for row in rows]
    rows = [row | _texts(row, run.context.tokenizer) for row in rows]
    truncated = {pair.row.where: pair.truncated for pair in part}
    details = [((p.reason, p.detail, p.where), truncated[p.where]) for p in problems]
    file = run.parts.file(number)
    write_annotated(
        file,
        rows,
        run.parts.meta(number) | {"problems": details},
        streams=run.rewards.streams,
        reference=options.reference,
        per_token=options.per_token,
        masks=run.masks,
        kept=run.kept.types,
    )
    run.parts.confirm(number)


def _texts(row: Mapping[str, Any], tokenizer: Any) -> dict[str, str]:
    """The ids of a row as people read them, special tokens and all."""
    found = {}
    for name in ("prompt", *SIDES):
        ids = [int(i) for i in row[f"{name}_ids"]]
        found[f"{name}_text"] = tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    return found


def process_state() -> PartialState:
    """Who the processes are. Without the argument, PartialState takes each of several on CPU for
    the only one.
    """
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )


def shared_work(work: EncodeWork) -> EncodeWork:
    """The same where several processes have one cache: the first encodes, the others wait for it
    where they have its folder.
    """
    state = process_state()
    (run,) = broadcast_object_list([uuid.uuid4().hex])
    return replace(work, first=state.is_main_process, wait=state.wait_for_everyone, run=run)


def annotate_pairs(
    rewards: TokenRewardSource,
    context: Context,
    pairs: Sequence[Pair],
    *,
    reference: bool = True,
    per_token: bool = False,
    masks: bool = False,
    steps: Sequence[Step] = (),
) -> tuple[list[dict[str, Any]], list[RowProblem]]:
    """The rows of the annotated file for some pairs, and a problem for each that the source or the
    model's context refuses.

    Args:
        reference: whether the rows get the reference's sums; per_token: its log-prob of each token.
        masks: whether they get the masks of the tokens that are scored.
        steps: of shaping.
    """
    kept: list[tuple[Pair, Response]] = []
    problems = []
    for pair in pairs:
        sides = [Response.of_pair(pair, side, context.tokenizer) for side in SIDES]
        problem = _problem_of(rewards, context, sides, reference)
        if problem is None:
            kept += [(pair, response) for response in sides]
        else:
            problems.append(problem)
    if not kept:
        return [], problems
    try:
        return _rows_of(rewards, context, kept, reference, per_token, masks, steps), problems
    except RowProblem as problem:  # of an engine, which does not say whose row it is
        if len(kept) == len(SIDES):
            where = kept[0][0].row.where
            return [], [*problems, RowProblem(problem.reason, problem.detail, where)]
    options = {"reference": reference, "per_token": per_token, "masks": masks, "steps": steps}
    rows = []
    for pair, _ in kept[:: len(SIDES)]:
        own, found = annotate_pairs(rewards, context, [pair], **options)
        rows += own
        problems += found
    return rows, problems


def _rows_of(
    rewards: TokenRewardSource,
    context: Context,
    kept: Sequence[tuple[Pair, Response]],
    reference: bool,
    per_token: bool,
    masks: bool,
    steps: Sequence[Step],
) -> list[dict[str, Any]]:
    """The rows of pairs that the source takes; kept: each with both of its responses."""
    responses = [response for _, response in kept]
    rows: dict[int, dict[str, Any]] = {}
    for pair, _ in kept:
        rows[pair.index] = {
            "index": pair.index,
            "where": pair.row.where,
            "prompt_ids": pair.prompt_ids,
        }
    if reference:
        for (pair, response), said in zip(kept, context.reference(responses), strict=True):
            row, side, logps = rows[pair.index], response.side, said["logprobs"]
            scored = logps if response.scored is None else logps[response.scored]
            row[f"ref_{side}_logps"] = scored.double().sum().item()
            if per_token:
                row[f"ref_{side}_token_logps"] = logps.float().numpy()
    found = score_shaped(rewards, responses, steps)
    for (pair, response), streams in zip(kept, found, strict=True):
        row, side = rows[pair.index], response.side
        row[f"{side}_ids"] = response.ids
        if masks:
            row |= {name: mask for name, mask in pair.masks.items() if name.startswith(side)}
        for stream, values in streams.items():
            row[f"{side}_{stream}"] = values.numpy()
    return list(rows.values())


def _problem_of(
    rewards: TokenRewardSource, context: Context, sides: Sequence[Response], reference: bool
) -> RowProblem | None:
    """Why a pair cannot be annotated: the first of what the source says of its responses and of
    what does not fit the reference.
    """
    problem = context.unknown_token(*sides)
    if problem is not None:
        return problem
    for response in sides:
        problem = check_response(rewards, response)
        if problem is not None:
            return problem
    return context.too_long(*sides) if reference else None

"""Per-token signals and reference log-probs of a preference file, once and offline.

Each response y to a prompt x gets what a source gives its tokens (`treg.rewards.base`) and, from
the reference model, the sum of log pi_ref(y_t | x, y_<t). Forward only.

The pairs, sorted by length, are cut into parts (`treg.rewards.cutting`). A part is computed as a
whole and written as a whole: a run that is killed loses the parts that it was working on, and the
next one computes them in the same batches, to the same bits.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from treg.data import SIDES, EncodeOptions, Pair, Report, RowProblem, load_pairs, pair_tokens
from treg.data.annotated import (
    is_annotated,
    merge_annotated,
    model_fingerprint,
    read_meta,
    tokenizer_fingerprint,
    without_weight,
    write_annotated,
)
from treg.files import locked, replacing
from treg.rewards import (
    DEFAULT_SOURCE,
    Context,
    ContrastivePrompts,
    Response,
    TokenRewardSource,
    load_source,
    streams_given,
)
from treg.rewards.base import ResponsePairs, check_response
from treg.rewards.cutting import cut_parts, kept_on_interrupt, part_tokens
from treg.rewards.kept import KeptColumns, check_names
from treg.rewards.progress import Progress
from treg.rewards.several import SeveralSource
from treg.rewards.shaping import Step, parse_steps, score_shaped, shaped_streams

log = logging.getLogger(__name__)

PART_PAIRS = 32  # at most
CUTTING = ("tokens_per_batch", "share_prefix")  # settings that change roundings only


@dataclass(frozen=True)
class AnnotateOptions:
    """How a preference file is annotated.

    encode: how rows become ids.
    prompts: the option of that name of the default source, contrastive prompts.
    tokens_per_batch: tokens of one forward, with padding.
    per_token: keep the reference's log-prob of each token, which token-weighted margins and
        `treg/alignment` need.
    share_prefix: run the common beginning of two contexts once (see `treg.rewards.scorer`).
    rewards: the source, a key of `treg.rewards.SOURCES` or "package.module:Class".
    rewards_options: values of the fields of the source's Options.
    reference: keep the reference's log-probs; objectives without a reference need none.
    shaping: steps such as ("centre", "clip=0.5") over the source's streams, see
        `treg.rewards.shaping`; weights stay as they are.
    keep_columns: columns of the source that are passed on into the file: numbers, strings, or lists
        of them.
    """

    encode: EncodeOptions = field(default_factory=EncodeOptions)
    prompts: ContrastivePrompts = field(default_factory=ContrastivePrompts)
    tokens_per_batch: int = 16384
    per_token: bool = False
    share_prefix: bool = True
    rewards: str = DEFAULT_SOURCE
    rewards_options: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = True
    shaping: Sequence[str] = ()
    keep_columns: Sequence[str] = ()

    def __post_init__(self):
        if not isinstance(self.tokens_per_batch, int) or self.tokens_per_batch < 1:
            raise ValueError(
                f"tokens_per_batch: expected a positive integer, got {self.tokens_per_batch!r}"
            )
        if self.per_token and not self.reference:
            raise ValueError(
                "per_token: expected False without the reference's log-probs, got True; set "
                "reference=True"
            )
        # refused here, before a model is loaded
        streams = streams_given(self.rewards, self.source_options)
        check_names(self.keep_columns, streams)
        if self.steps and not shaped_streams(streams):
            raise ValueError(
                f"shape: expected no steps for {self.rewards!r}, which gives {', '.join(streams)} "
                f"alone, got {', '.join(map(str, self.steps))}"
            )

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of shaping."""
        return parse_steps(self.shaping)

    @property
    def source_options(self) -> dict[str, Any]:
        """The options of the source by name, prompts among them where they are not the default."""
        given = dict(self.rewards_options)
        if self.prompts != ContrastivePrompts():
            if "prompts" in given:
                raise ValueError(
                    "prompts: expected them either in prompts or in rewards_options, got both"
                )
            given["prompts"] = self.prompts
        return given


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
            be read; what the source of token rewards refuses.
    """
    output = Path(output)
    if output.suffix != ".parquet":
        raise ValueError(f"output: expected a path that ends in .parquet, got {output}")
    state = process_state()
    pairs, report = load_pairs(
        source, tokenizer, options.encode, split=split, strict=strict, limit=limit
    )
    # the longest first: memory runs out early
    order = sorted(pairs, key=lambda pair: (-pair_tokens(vars(pair)), pair.index))
    bar = Progress(progress and state.is_main_process)
    model.eval()  # before the source sees it
    context = Context(
        model,
        tokenizer,
        tokens_per_batch=options.tokens_per_batch,
        share_prefix=options.share_prefix,
        on_tokens=bar.tokens,
        pairs=ResponsePairs(order, tokenizer),
    )
    fingerprint = model_fingerprint(model, adapters=True)  # before a source adds to the model
    rewards = load_source(options.rewards, options.source_options, context)
    kept = KeptColumns(options.keep_columns, pairs)
    made_with = _made_with(context, fingerprint, rewards, pairs, options)
    if kept.names:
        made_with["settings"]["keep_columns"] = list(kept.names)
        made_with["fingerprint"]["columns"] = kept.fingerprint
    folder = Path(f"{output}.parts")
    if output.exists():
        return _finished(output, folder, _comparable(made_with), state)
    with contextlib.ExitStack() as stack:
        with state.main_process_first():
            if state.is_main_process:
                expected = _comparable(made_with) | {"parts": {"part_pairs": PART_PAIRS}}
                stack.enter_context(_claimed(folder, expected))
        run = _Run(context, rewards, options, kept, order, folder, strict)
        files, problems = _annotate_parts(run, bar, state)
        for problem, truncated in problems:
            report.kept -= 1
            report.truncated -= truncated
            report.problem(problem)
        if not report.kept:
            raise ValueError(f"data: expected a pair that can be annotated, found none: {report}")
        if state.is_main_process:
            # of a run that was killed while it wrote
            for left in output.parent.glob(f"{output.name}.*.tmp"):
                left.unlink()
            merge_annotated(files, output, made_with | {"report": asdict(report)})
            shutil.rmtree(folder)
            _tell_of_empty_masks(output)
        state.wait_for_everyone()
    return report


def _finished(output: Path, folder: Path, expected: dict[str, Any], state: PartialState) -> Report:
    """The report of an output that is there; ValueError if it was made otherwise."""
    if not is_annotated(output):
        raise ValueError(
            f"{output}: not written by `treg annotate`; give another output, or remove {output}"
        )
    meta = read_meta(output)
    _check_same(output, meta, expected)
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    return Report(**meta["report"])


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
    """What the parts of a run have in common. order: the pairs, the longest first."""

    context: Context
    rewards: TokenRewardSource
    options: AnnotateOptions
    kept: KeptColumns
    order: Sequence[Pair]
    folder: Path
    strict: bool


def _annotate_parts(
    run: _Run, bar: Progress, state: PartialState
) -> tuple[list[Path], list[tuple[RowProblem, bool]]]:
    """The files of all parts, once every process has done its share; each problem, and if its pair
    was truncated.
    """
    parts = cut_parts(run.order, PART_PAIRS, part_tokens(run.context.model))
    files = [run.folder / f"part-{i:05}.parquet" for i in range(len(parts))]
    todo = [i for i in range(len(parts)) if not files[i].exists()]
    state.wait_for_everyone()  # until everyone has counted, nobody adds a part
    # by what is left, not by number, so that the processes have equal work after a stop as well
    mine = todo[state.process_index :: state.num_processes]
    with kept_on_interrupt(files, parts), bar.over([parts[i] for i in mine]):
        for i in mine:
            with torch.inference_mode():
                _annotate_part(run, parts[i], files[i])
            bar.part_done()
    state.wait_for_everyone()
    found = [problem for file in files for problem in read_meta(file)["problems"]]
    state.wait_for_everyone()  # until everyone has read them, nobody removes the parts
    return files, [(RowProblem(*problem), truncated) for problem, truncated in found]


def _annotate_part(run: _Run, part: Sequence[Pair], file: Path) -> None:
    """Write the rows of a part, and its problems into the metadata."""
    options = run.options
    missing = {pair.index: run.kept.problem(pair) for pair in part}
    rows, problems = annotate_pairs(
        run.rewards,
        run.context,
        [pair for pair in part if missing[pair.index] is None],
        reference=options.reference,
        per_token=options.per_token,
        steps=options.steps,
    )
    problems += [problem for problem in missing.values() if problem is not None]
    if problems and run.strict:
        raise problems[0]
    by_index = {pair.index: pair for pair in part}
    rows = [row | run.kept.of(by_index[row["index"]]) for row in rows]
    truncated = {pair.row.where: pair.truncated for pair in part}
    details = [((p.reason, p.detail, p.where), truncated[p.where]) for p in problems]
    write_annotated(
        file,
        rows,
        {"problems": details},
        streams=run.rewards.streams,
        reference=options.reference,
        per_token=options.per_token,
        kept=run.kept.types,
    )


def process_state() -> PartialState:
    """Who the processes are. Without the argument, PartialState takes each of several on CPU for
    the only one.
    """
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )


def annotate_pairs(
    rewards: TokenRewardSource,
    context: Context,
    pairs: Sequence[Pair],
    *,
    reference: bool = True,
    per_token: bool = False,
    steps: Sequence[Step] = (),
) -> tuple[list[dict[str, Any]], list[RowProblem]]:
    """The rows of the annotated file for some pairs, and a problem for each that the source or the
    model's context refuses.

    Args:
        reference: whether the rows get the reference's sums; per_token: its log-prob of each token.
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
            row[f"ref_{side}_logps"] = logps.double().sum().item()
            if per_token:
                row[f"ref_{side}_token_logps"] = logps.float().numpy()
    found = score_shaped(rewards, responses, steps)
    for (pair, response), streams in zip(kept, found, strict=True):
        row, side = rows[pair.index], response.side
        row[f"{side}_ids"] = response.ids
        for stream, values in streams.items():
            row[f"{side}_{stream}"] = values.numpy()
    return list(rows.values()), problems


def _problem_of(
    rewards: TokenRewardSource, context: Context, sides: Sequence[Response], reference: bool
) -> RowProblem | None:
    """Why a pair cannot be annotated: the first of what the source says of its responses and of
    what does not fit the reference.
    """
    for response in sides:
        problem = check_response(rewards, response)
        if problem is not None:
            return problem
    return context.too_long(*sides) if reference else None


def _made_with(
    context: Context,
    fingerprint: str,
    rewards: TokenRewardSource,
    pairs: Sequence[Pair],
    options: AnnotateOptions,
) -> dict[str, Any]:
    """What goes into the metadata besides the report. fingerprint: of the model.

    The settings of the default source stand among the file's, as they always did; those of any
    other, and of one that is shaped, stand under `streams`, which the default file does not have.
    """
    model = context.model
    own = _json_settings(rewards)
    default = options.rewards == DEFAULT_SOURCE
    settings = {"encode": asdict(options.encode)}
    if default:
        settings |= own
    settings |= {
        "tokens_per_batch": options.tokens_per_batch,
        "per_token": options.per_token,
        "share_prefix": options.share_prefix,
    }
    if not options.reference:
        settings["reference"] = False
    settings |= {"dtype": str(model.dtype), "autocast": _autocast(model.device.type)}
    made_with: dict[str, Any] = {
        "fingerprint": {
            "model": fingerprint,
            "tokenizer": tokenizer_fingerprint(context.tokenizer),
            "pairs": _pairs_fingerprint(pairs),
        },
        "settings": settings,
    }
    if not default or options.steps:
        made_with["streams"] = _described(rewards, options, own)
    return made_with


def _described(
    rewards: TokenRewardSource, options: AnnotateOptions, settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Of each stream: its source, the source's settings, and the shaping."""
    own = {"source": options.rewards, "settings": settings, "shaping": []}
    described = dict.fromkeys(rewards.streams, own)
    if isinstance(rewards, SeveralSource):
        described |= rewards.described
    steps = list(map(str, options.steps))
    for stream in shaped_streams(described):
        shaping = described[stream]["shaping"] + steps
        described[stream] = described[stream] | {"shaping": shaping}
    return described


def _json_settings(rewards: TokenRewardSource) -> dict[str, Any]:
    """The settings of a source as a file gives them back."""
    settings = rewards.settings()
    try:
        return json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(rewards).__name__}.settings: expected what JSON can hold, got {settings!r}: "
            f"{error}"
        ) from error


def _comparable(made_with: dict[str, Any]) -> dict[str, Any]:
    """made_with without how the work was cut, which changes roundings only: after running out of
    memory one goes on with smaller batches.
    """
    settings = {k: v for k, v in made_with["settings"].items() if k not in CUTTING}
    return made_with | {"settings": settings}


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
            # of an annotation that was stopped while it removed them
            for part in folder.glob("part-*.parquet"):
                part.unlink()
            with replacing(manifest) as temporary:
                temporary.write_text(json.dumps(made_with, indent=1))
        yield


def _check_same(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """ValueError where a file or its parts were made otherwise than this run would make them."""
    expected = json.loads(json.dumps(expected))  # as a file gives it back
    # settings first: they say what a fingerprint hides
    for group in sorted(expected.keys() | {"streams"}, reverse=True):
        now, before = expected.get(group, {}), found.get(group, {})
        names = [*now, *(name for name in before if name not in now and name not in CUTTING)]
        for name in names:
            if before.get(name) != now.get(name):
                # the default source stands in no file
                missing = DEFAULT_SOURCE if group == "streams" else None
                was, wanted = (values.get(name, missing) for values in (before, now))
                raise ValueError(
                    f"{path}: made with {name} {was!r}, now it is {wanted!r}; give another output, "
                    f"or remove {path}"
                )

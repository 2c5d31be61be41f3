"""treg evaluate-credit: token rewards against marks on the tokens."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import treg
from treg.cli.loading import annotate_options, data_of, load_model, load_tokenizer, say
from treg.cli.options import EvaluateOptions, MarkedOptions, RewardsOptions, parse
from treg.data import EncodeOptions, Report, RowProblem
from treg.data.annotated import read_annotated, tokenizer_fingerprint
from treg.evaluate.columns import (
    BaselineColumns,
    Columns,
    FileColumns,
    SourceColumns,
    with_own_names,
)
from treg.evaluate.documents import MarkedAnswer
from treg.evaluate.evaluation import Evaluation, evaluate_scores
from treg.evaluate.place import responses, token_marks
from treg.evaluate.readers import read_marked
from treg.evaluate.scored import Scored, ScoredAnswer, in_half, sampled
from treg.evaluate.scoring import Placed, progress, score_answers
from treg.evaluate.shares import STEP_SCORES
from treg.evaluate.told import conclusions, head_lines, label_table, table
from treg.files import write_json
from treg.rewards import DEFAULT_SOURCE, Context, NoReference, load_source
from treg.rewards.annotate import AnnotateOptions, process_state
from treg.rewards.made_with import fingerprint_of
from treg.rewards.progress import Progress, counted_rows
from treg.viz.credit_plots import check_plots_path, plot_credit

KINDS = (MarkedOptions, EvaluateOptions, RewardsOptions)
PACKAGES = ("torch", "transformers", "numpy", "scikit-learn")
DEFAULT_LENGTH = 1024  # of treg annotate
HALVES = ("first", "second", "both", "all")
PARTS = {"all": "all documents", "first": "first half", "second": "second half"}


def run(argv: list[str]) -> None:
    marked, own, rewards = parse("evaluate-credit", argv, KINDS)
    run = _Run(marked, own, rewards)
    run.check()
    answers, rows = run.answers()
    file = run.file()
    tokenizer = run.tokenizer(file)
    shown = process_state().is_main_process
    options = run.encode(file)
    placed, report = place(answers, tokenizer, options, strict=marked.strict, shown=shown)
    bar = progress(shown)
    context = run.context(tokenizer, bar)
    columns, settings = run.columns(context, file)
    scored_answers, refused = score_answers(placed, columns, context, bar=bar, strict=marked.strict)
    report.add(refused)
    report.kept = refused.kept
    parts = run.parts(scored_answers)
    with counted_rows(shown, "draw", "bootstrap", own.draws * len(parts)) as on_draw:
        found = {
            part: evaluate_scores(
                scored,
                columns[-1].names,
                draws=own.draws,
                seed=own.seed,
                step_score=own.step_score,
                on_draw=on_draw,
            )
            for part, scored in parts.items()
        }
    lines = [*run.title(), *left_out(rows, report), *run.told(found)]
    say(*lines)
    counts = {"rows": rows.stored(), "answers": report.stored()}
    run.write(found, parts, lines, {"settings": settings, "counts": counts})


def place(
    answers: Sequence[MarkedAnswer],
    tokenizer: Any,
    options: EncodeOptions,
    *,
    strict: bool,
    shown: bool,
) -> tuple[list[Placed], Report]:
    """The tokens of answers and what the marks say of them; and of how many answers that cannot be
    said, by reason.

    shown: whether there is a bar.
    """
    report = Report(strict=strict)
    placed = []
    with counted_rows(shown, "answer", "encode", len(answers)) as on_answers:
        found = responses(answers, tokenizer, options, on_answers=on_answers)
    for answer, response in zip(answers, found, strict=True):
        if isinstance(response, RowProblem):
            report.problem(response)
            continue
        try:
            placed.append(Placed(answer, response, token_marks(response, answer)))
        except RowProblem as problem:
            report.problem(problem)
            continue
        report.truncated += response.cut
    report.seen = len(answers) - len(placed)  # the others are counted where they are scored
    return placed, report


def left_out(rows: Report, answers: Report) -> list[str]:
    """What was not evaluated, by reason, and what was cut."""
    lines = []
    for what, report in (("row", rows), ("answer", answers)):
        for reason, count in sorted(report.dropped.items(), key=lambda item: -item[1]):
            lines.append(f"left out {count:,} {what}{'s' * (count != 1)}: {reason}")
            lines += [f"    {example}" for example in report.examples[reason]]
    if answers.truncated:
        lines.append(f"{answers.truncated:,} answers were cut at max_length; their ends are not in")
    return lines


@dataclass(frozen=True)
class _Run:
    """The options, and what is made from them."""

    marked: MarkedOptions
    own: EvaluateOptions
    rewards: RewardsOptions

    def check(self) -> None:
        """ValueError for options that cannot be met, before anything is loaded."""
        own, marked = self.own, self.marked
        if marked.half not in HALVES:
            raise ValueError(f"half: expected one of {', '.join(HALVES)}, got {marked.half!r}")
        numbers = (
            ("limit", marked.limit, 1),
            ("sample", marked.sample, 1),
            ("draws", own.draws, 0),
        )
        for name, value, least in numbers:
            if value is not None and value < least:
                raise ValueError(f"{name}: expected a whole number >= {least}, got {value}")
        if marked.sample is not None and marked.limit is not None:
            raise ValueError(
                f"sample: expected no --limit beside it, got {marked.limit}; --sample draws "
                "documents of the whole file, --limit takes the first"
            )
        if own.step_score not in STEP_SCORES:
            raise ValueError(
                f"step_score: expected one of {', '.join(STEP_SCORES)}, got {own.step_score!r}"
            )
        if own.plots is not None:
            check_plots_path(own.plots)
        for name, path in (("json", own.json), ("plots", own.plots)):
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"{name}: no such folder: {Path(path).parent}")
        _ = self.encode(None)
        if self.source is not None:
            _ = self.source_options
        if own.streams is not None and own.annotated is None:
            raise ValueError("streams: expected --annotated FILE with it, got none")
        if own.model is None and (self.source is not None or own.tokenizer is None):
            raise ValueError(
                "model: expected a causal LM, got none; without one give --annotated and "
                "--tokenizer, and no --rewards"
            )

    @property
    def source(self) -> str | None:
        """The source that runs; None: what the file has is enough."""
        if self.rewards.rewards is None and self.own.annotated is not None:
            return None
        return self.rewards.rewards or DEFAULT_SOURCE

    @property
    def source_options(self) -> AnnotateOptions:
        """The source's options and the steps of shaping."""
        return annotate_options(self.rewards, EncodeOptions(), per_token=False)

    def answers(self) -> tuple[list[MarkedAnswer], Report]:
        """The answers of the half: of its first documents, or of those that the seed draws."""
        marked = self.marked
        data = data_of("data", marked.data)
        answers, report = read_marked(
            data, marked.format, marked.format_options, strict=marked.strict
        )
        if not any(x.marks or x.pair is not None for x in answers):
            raise ValueError(
                f"data: expected marks or pairs, found neither in {len(answers)} answers; is "
                f"{marked.format} how the file marks them? --format {marked.format} --help shows "
                "its options"
            )
        half = "all" if marked.half == "both" else marked.half
        every = list(dict.fromkeys(answer.document for answer in answers))
        names = [name for name in every if in_half(name, half, self.own.seed)][: marked.limit]
        there = set(sampled(names, marked.sample, self.own.seed))
        count = len(there) if marked.half == "both" else len(every)
        for part in ("first", "second") if marked.half == "both" else (half,):
            if not any(in_half(name, part, self.own.seed) for name in there):
                raise ValueError(
                    f"half: expected documents in the {part} half, found none: with the seed "
                    f"{self.own.seed} none of {count} is in it; give more documents, another "
                    "--seed, or --half all"
                )
        return [answer for answer in answers if answer.document in there], report

    def file(self) -> "_File | None":
        if self.own.annotated is None:
            return None
        examples, meta = read_annotated(self.own.annotated)
        name = Path(self.own.annotated).name
        return _File(meta, FileColumns(examples, meta, name, self.own.streams))

    def tokenizer(self, file: "_File | None") -> Any:
        path = self.own.tokenizer or self.own.model
        tokenizer = load_tokenizer(str(path), self.own.chat_template)
        made = None if file is None else file.meta.get("fingerprint", {}).get("tokenizer")
        if made is not None and made != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                f"tokenizer: {self.own.annotated} was annotated with another tokenizer or chat "
                "template; give it with --tokenizer"
            )
        return tokenizer

    def encode(self, file: "_File | None") -> EncodeOptions:
        """As the annotated file was encoded, where there is one and nothing else is asked for."""
        made = {} if file is None else file.meta.get("settings", {}).get("encode", {})
        marked = self.marked
        return EncodeOptions(
            made.get("max_length", DEFAULT_LENGTH)
            if marked.max_length is None
            else marked.max_length,
            chat=False if marked.plain_text else made.get("chat"),
            date=marked.date or made.get("date"),
        )

    def context(self, tokenizer: Any, bar: Progress) -> Context:
        own, device = self.own, process_state().device
        if own.model is None:
            model: Any = NoReference("rewards", device, "give --model")
        else:
            model = load_model(own.model, own.dtype, device).eval()
        return Context(
            model,
            tokenizer,
            tokens_per_batch=self.rewards.tokens_per_batch,
            share_prefix=not self.rewards.no_share_prefix,
            on_tokens=bar.tokens,
        )

    def columns(
        self, context: Context, file: "_File | None"
    ) -> tuple[Sequence[Columns], dict[str, Any]]:
        """What is scored, the baselines last, and what describes it."""
        given: list[tuple[str, Columns]] = []
        settings: dict[str, Any] = {
            "data": [Path(path).name for path in self.marked.data],
            "marked": _plain(self.marked, "data"),
            "evaluation": _plain(self.own, "json", "plots"),
        }
        if self.own.model is not None:
            settings["model_fingerprint"] = fingerprint_of(context.model)
        if self.source is not None:
            options = self.source_options
            source = load_source(self.source, options.source_options, context)
            given.append(("rewards", SourceColumns(self.source, source, options.steps)))
            steps = [str(step) for step in options.steps]
            made = {"source": self.source, "settings": source.settings(), "shaping": steps}
            settings["rewards"] = made
        if file is not None:
            given.append(("file", file.columns))
            settings["annotated"] = {x: y for x, y in file.meta.items() if x != "report"}
        made_by = None if file is None else file.columns
        given.append(("baseline", BaselineColumns(context, self.own.seed, made_by)))
        return with_own_names(given), settings

    def parts(self, answers: Sequence[ScoredAnswer]) -> dict[str, Scored]:
        """What is evaluated by itself, by name. A half all of whose answers were refused is not in
        it.
        """
        if self.marked.half != "both":
            return {self.marked.half: Scored(answers)}
        made = {"all": Scored(answers)}
        for half in ("first", "second"):
            of_half = [x for x in answers if in_half(x.document, half, self.own.seed)]
            if of_half:
                made[half] = Scored(of_half)
        return made

    def told(self, found: Mapping[str, Evaluation]) -> list[str]:
        """The head, the tables and the conclusions of each part; of several, its name as well."""
        several = self.marked.half == "both"
        lines = [self.about_draws()] if several else []
        for part, of_part in found.items():
            lines += ["", PARTS[part]] if several else []
            lines += head_lines(of_part)
            lines += [] if several else [self.about_draws()]
            lines += ["", *table(of_part), "", *label_table(of_part)]
            lines += ["", *conclusions(of_part)] if lines[-1] else conclusions(of_part)
        if several:
            missing = [PARTS[part] for part in PARTS if part not in found]
            lines += [f"{name}: none of its answers could be scored" for name in missing]
        return lines

    def title(self) -> list[str]:
        """What is evaluated."""
        parts = [", ".join(Path(path).name for path in self.marked.data)]
        parts.append(f"({self.marked.format})")
        if self.marked.half == "both":
            parts.append("both halves")
        elif self.marked.half != "all":
            parts.append(f"{self.marked.half} half")
        if self.own.model is not None:
            parts.append(f"with {Path(self.own.model).name}")
        if self.own.annotated is not None:
            parts.append(f"and {Path(self.own.annotated).name}")
        return [" ".join(parts)]

    def about_draws(self) -> str:
        own = self.own
        if not own.draws:
            return "no intervals, since draws is 0"
        return f"95 % intervals: {own.draws:,} draws of the documents, seed {own.seed}"

    def write(
        self,
        found: Mapping[str, Evaluation],
        parts: Mapping[str, Scored],
        lines: Sequence[str],
        more: Mapping[str, Any],
    ) -> None:
        """What was asked for, to files."""
        own = self.own
        if not process_state().is_main_process:
            return
        if own.json is not None:
            stored: dict[str, Any] = {
                part: {"evaluation": x.stored(), "conclusions": conclusions(x)}
                for part, x in found.items()
            }
            if self.marked.half != "both":
                (stored,) = stored.values()
            whole = {
                "treg": treg.__version__,
                "versions": {x: importlib.metadata.version(x) for x in PACKAGES},
                **more,
                **stored,
            }
            write_json(Path(own.json), whole)
            say(f"wrote {own.json}")
        if own.plots is not None:
            first = next(iter(found))  # of both halves the picture is that of all documents
            drawn = found[first], parts[first]
            plot_credit(*drawn, own.plots, title=self.title()[0], lines=lines)
            say(f"wrote {own.plots}")


@dataclass(frozen=True)
class _File:
    """An annotated file: its description and its columns."""

    meta: Mapping[str, Any]
    columns: FileColumns


def _plain(options: Any, *but: str) -> dict[str, Any]:
    """Options that were given or have a default, as JSON holds them."""
    return {x: value for x, value in asdict(options).items() if x not in but and value is not None}

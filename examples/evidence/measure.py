"""Every source and baseline against the marks of one set, on all answers and on both halves.

    python measure.py --format finegrained --data finegrained.json --model MODEL \\
        --reward_model FOLDER --trained FOLDER --scores scores.pickle --output finegrained.json

What is scored and measured is what `treg evaluate-credit` scores and measures, with --half all,
first and second; the models run once. --scores keeps the numbers of the tokens, and is read instead
of running the models where it is there already. The record holds no text.
"""

import argparse
import datetime
import importlib.metadata
import json
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

import treg
from treg.data import EncodeOptions, RowProblem
from treg.evaluate import (
    BaselineColumns,
    Evaluation,
    Measure,
    Placed,
    Scored,
    ScoredAnswer,
    SourceColumns,
    evaluate_scores,
    label_table,
    read_marked,
    responses,
    score_answers,
    table,
    token_marks,
)
from treg.evaluate.scored import in_half
from treg.evaluate.scoring import progress
from treg.evaluate.told import head_lines
from treg.rewards import Context, load_source

READINGS: dict[str, dict[str, Any]] = {
    "paper": {"name": "contrastive"},
    "hidden": {"name": "contrastive", "show_response": False},
    "word": {"name": "contrastive", "unit": "word"},
    "spread": {"name": "contrastive", "spread": 1.0, "skip_first": 1},
}
BASELINES = ("surprise", "surprise_by_word", "entropy", "position", "length", "random")
FACTUAL = ("Wrong-Grounding", "Unverifiable")  # FineGrainedRLHF's types that are about facts
KEPT = (
    *("auroc", "average_precision", "sign_agreement", "zeros", "within_document"),
    *("pair_accuracy", "pair_accuracy_by_mean"),
)
LEAST_DOCUMENTS = 5  # that an error type is in, to have a row
SMALL = 0.01  # a reward below this size is nearly none: the scale ends at 0.5


def sources(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What `--rewards several` takes."""
    found = [{"stream": name, **options} for name, options in READINGS.items()]
    if args.reward_model is not None:
        found.append(
            {"stream": "red", "name": "redistribution", "model": args.reward_model},
        )
    if args.trained is not None:
        found.append({"stream": "implicit", "name": "implicit", "model": args.trained})
    return found


def scored_answers(args: argparse.Namespace) -> tuple[list[ScoredAnswer], dict[str, Any]]:
    """Every score of every token; and how many rows and answers were left out, and why."""
    start = time.perf_counter()
    options = json.loads(args.format_options)
    answers, rows = read_marked(args.data, args.format, options)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoded = responses(answers, tokenizer, EncodeOptions(args.max_length))
    placed = [
        Placed(answer, response, token_marks(response, answer))
        for answer, response in zip(answers, encoded, strict=True)
        if not isinstance(response, RowProblem)
    ]
    bar = progress(True)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    context = Context(
        model,
        tokenizer,
        tokens_per_batch=args.tokens_per_batch,
        share_prefix=True,
        on_tokens=bar.tokens,
    )
    source = load_source("several", {"sources": sources(args)}, context)
    columns = [SourceColumns("several", source), BaselineColumns(context, args.seed)]
    found, refused = score_answers(placed, columns, context, bar=bar)
    counts = {
        "rows": rows.stored(),
        "answers": len(answers),
        "answers without tokens": len(answers) - len(placed),
        "scored": refused.stored(),
        "scoring seconds": round(time.perf_counter() - start),
    }
    for of in (counts["rows"], counts["scored"]):
        for name in ("examples", "noted_examples"):
            of.pop(name, None)  # they quote the data
    return found, counts


def with_factual(answer: ScoredAnswer) -> ScoredAnswer:
    """With a label of its own for all types that are about facts."""
    masks = [answer.labels[x] for x in FACTUAL if x in answer.labels]
    if not masks:
        return answer
    return replace(answer, labels={**answer.labels, "factual": np.logical_or.reduce(masks)})


def with_labels(answers: list[ScoredAnswer]) -> list[ScoredAnswer]:
    """Without the error types of too few documents to say anything."""
    answers = [with_factual(x) for x in answers]
    documents: dict[str, set[str]] = {}
    for answer in answers:
        for label, mask in answer.labels.items():
            if mask.any():
                documents.setdefault(label, set()).add(answer.document)
    kept = {label for label, found in documents.items() if len(found) >= LEAST_DOCUMENTS}
    return [replace(x, labels={a: b for a, b in x.labels.items() if a in kept}) for x in answers]


def evaluations(answers: list[ScoredAnswer], args: Any) -> Iterator[tuple[str, Any]]:
    """Of all answers and of both halves: the record, and what is printed."""
    for half in ("all", "first", "second"):
        there = [x for x in answers if in_half(x.document, half, args.seed)]
        scored = Scored(there)
        found = evaluate_scores(scored, BASELINES, draws=args.draws, seed=args.seed)
        print(f"\n{half}\n", *head_lines(found), "", *table(found), "", sep="\n")
        print(*label_table(found), sep="\n", flush=True)
        yield half, record(found) | {"over paper": over_paper(there, args)}


def over_paper(answers: list[ScoredAnswer], args: Any) -> dict[str, Any]:
    """The headline measure of each other reading less the paper's, with its interval."""
    found = {}
    for name in READINGS:
        if name == "paper":
            continue
        both = [
            replace(
                x,
                scores={key: x.scores[key] for key in (name, "paper")},
                ends={key: x.ends[key] for key in (name, "paper")},
            )
            for x in answers
        ]
        pair = evaluate_scores(Scored(both), ("paper",), draws=args.draws, seed=args.seed)
        found[name] = numbers(pair.results[0].over_best)
    return found


def record(found: Evaluation) -> dict[str, Any]:
    """What a table needs."""
    scores = {}
    for result in found.results:
        measures = {x: numbers(result.measures[x]) for x in KEPT if x in result.measures}
        scores[result.name] = {x: y for x, y in measures.items() if y is not None} | {
            "labels": {x: numbers(y) for x, y in result.labels.items()},
            "over best": numbers(result.over_best),
        }
    whole = found.stored()
    counts = ("documents", "answers", "tokens", "wrong", "right", "base_rate", "best", "headline")
    return {x: whole[x] for x in (*counts, "labels")} | {"scores": scores}


def numbers(measure: Measure | None) -> list[float | None] | None:
    """Value, low, high."""
    if measure is None or measure.value is None:
        return None
    each = (measure.value, measure.low, measure.high)
    return [None if x is None else round(x, 4) for x in each]


def sizes(answers: list[ScoredAnswer], name: str) -> dict[str, float]:
    """Of a source's rewards of the answers' tokens: how large, and whether they grow along an
    answer.
    """
    each = [np.abs(x.scores[name]) for x in answers]
    every = np.concatenate(each)
    first = sum(float(x[0]) for x in each if len(x))
    places = [
        spearmanr(x.scores[name], np.arange(len(x.scores[name]))).statistic
        for x in answers
        if len(np.unique(x.scores[name])) > 1
    ]
    return {
        "mean size": round(float(every.mean()), 5),
        "below 0.01": round(float((every < SMALL).mean()), 4),
        "share of first tokens": round(first / max(float(every.sum()), 1e-12), 4),
        "Spearman with the place, mean of answers": round(float(np.mean(places)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", required=True, help="as treg evaluate-credit has them")
    parser.add_argument("--format_options", default="{}", help="of the format, as JSON")
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True, help="folder or hub name of a causal LM")
    parser.add_argument("--reward_model", help="for the source red; none: without it")
    parser.add_argument("--trained", help="what DPO made of the model; none: without implicit")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--tokens_per_batch", type=int, default=2048)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scores", type=Path, required=True, help="file that keeps the scores")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    if args.scores.exists():
        answers, counts = pickle.loads(args.scores.read_bytes())
    else:
        answers, counts = scored_answers(args)
        args.scores.write_bytes(pickle.dumps((answers, counts)))
    answers = with_labels(answers)
    names = [x for x in Scored(answers).names if x not in BASELINES]
    whole = {
        "date": datetime.date.today().isoformat(),
        "treg": treg.__version__,
        "versions": {x: importlib.metadata.version(x) for x in ("torch", "transformers")},
        "command": command(args),
        "counts": counts,
        "sizes": {name: sizes(answers, name) for name in names},
        "halves": dict(evaluations(answers, args)),
    }
    args.output.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"wrote {args.output}")


def command(args: argparse.Namespace) -> str:
    """Without folders, which are another's."""
    words = ["python measure.py"]
    for name, value in vars(args).items():
        if name not in ("scores", "output") and value is not None:
            path = name in ("data", "model", "reward_model", "trained")
            words.append(f"--{name} {Path(value).name if path else value}")
    return " ".join(words)


if __name__ == "__main__":
    main()

"""treg annotate: token rewards and reference log-probs of a preference file."""

from treg.cli.loading import annotate_options, load_model, load_tokenizer, say
from treg.cli.options import AnnotateOnlyOptions, JudgeOptions, ModelOptions, RowOptions, parse
from treg.rewards.annotate import annotate, process_state


def run(argv: list[str]) -> None:
    text = """\
Score each response under two contrastive prompts (rewrite it better, rewrite it worse), and keep token rewards and
reference log-probs in a parquet file. Forward only. Run again after a stop: it goes on from what is finished.

  treg annotate --model MODEL --data prefs.jsonl --output annotated.parquet
  accelerate launch -m treg annotate --model MODEL --data HUB/NAME --output annotated.parquet"""
    kinds = (ModelOptions, RowOptions, AnnotateOnlyOptions, JudgeOptions)
    m, rows, own, judge = parse("annotate", argv, kinds, text)

    options = annotate_options(judge, own.max_length, own.per_token)
    tokenizer = load_tokenizer(m.tokenizer or m.model, m.chat_template)
    model = load_model(m.model, m.dtype or "auto", process_state().device, m.attn_implementation)
    report = annotate(
        model,
        tokenizer,
        rows.data,
        own.output,
        options,
        split=rows.split,
        strict=rows.strict,
        limit=rows.limit,
    )
    say(report, f"wrote {own.output}")

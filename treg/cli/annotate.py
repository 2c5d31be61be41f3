"""treg annotate: token rewards and reference log-probs of a preference file."""

from treg.cli.loading import annotate_options, load_model, load_tokenizer, say
from treg.cli.options import AnnotateOnlyOptions, ModelOptions, RewardsOptions, RowOptions, parse
from treg.rewards.annotate import annotate, process_state

TEXT = """\
Let a source of token rewards score each response, and keep its numbers and the reference's
log-probs in a parquet file. Forward only. Run again after a stop: it goes on from what is finished.
The default source asks the model twice to rewrite a response, so that it is better and so that it
is worse (contrastive prompts). --rewards NAME --help shows the options of another source.

  treg annotate --model MODEL --data prefs.jsonl --output annotated.parquet
  treg annotate --model MODEL --data prefs.jsonl --output annotated.parquet \\
    --rewards my_package.my_module:MySource --rewards.my_option 3
  accelerate launch -m treg annotate --model MODEL --data HUB/NAME --output annotated.parquet"""


def run(argv: list[str]) -> None:
    kinds = (ModelOptions, RowOptions, AnnotateOnlyOptions, RewardsOptions)
    model_options, rows, own, rewards = parse("annotate", argv, kinds, TEXT)
    options = annotate_options(
        rewards,
        own.max_length,
        per_token=own.per_token,
        reference=not own.no_reference,
        keep_columns=own.keep_columns or (),
    )
    tokenizer = load_tokenizer(
        model_options.tokenizer or model_options.model, model_options.chat_template
    )
    model = load_model(
        model_options.model,
        model_options.dtype,
        process_state().device,
        model_options.attn_implementation,
    )
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

"""treg annotate: token rewards and reference log-probs of a preference file."""

from contextlib import ExitStack

from treg.cli.loading import (
    annotate_options,
    autocast,
    data_of,
    encode_options,
    load_model,
    load_tokenizer,
    say,
    signal_of,
)
from treg.cli.options import (
    AnnotateOnlyOptions,
    ModelOptions,
    RewardsOptions,
    RowOptions,
    ServingOptions,
    parse,
)
from treg.cli.serving import check_options, served, served_tokenizer
from treg.data import EncodeWork
from treg.data.annotated import read_annotated
from treg.data.mixture import check_there
from treg.rewards.annotate import annotate, process_state
from treg.trainer.arguments import ALPHA


def run(argv: list[str]) -> None:
    kinds = (ModelOptions, ServingOptions, RowOptions, AnnotateOnlyOptions, RewardsOptions)
    given = parse("annotate", argv, kinds)
    model_options, serving, rows, own, rewards = given
    data = data_of("data", rows.data)
    check_there(data)
    options = annotate_options(
        rewards,
        encode_options(rows, own.max_length),
        per_token=own.per_token,
        reference=not own.no_reference,
        keep_columns=own.keep_columns or (),
    )
    check_options(serving, given, options)
    work = EncodeWork(rows.num_proc, rows.row_cache)
    with ExitStack() as stack:
        if serving.server is not None:
            tokenizer = served_tokenizer(model_options)
            model = stack.enter_context(served(serving, model_options.model, tokenizer))
        else:
            tokenizer = load_tokenizer(
                model_options.tokenizer or model_options.model, model_options.chat_template
            )
            model = load_model(
                model_options.model,
                model_options.dtype,
                process_state().device,
                model_options.attn_implementation,
            )
            stack.enter_context(autocast(model.device, bf16=own.bf16, fp16=own.fp16))
        report = annotate(
            model,
            tokenizer,
            data,
            own.output,
            options,
            split=rows.split,
            strict=rows.strict,
            limit=rows.limit,
            work=work,
        )
    if process_state().is_main_process:
        examples, _ = read_annotated(own.output)
        say(report, *signal_of(examples, ALPHA), f"wrote {own.output}")

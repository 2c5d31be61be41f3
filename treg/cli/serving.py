"""treg annotate --server: a model that a serving engine has."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.utils import parse_choice_from_env

from treg.cli.kinds import AnnotateOnlyOptions, ModelOptions, RewardsOptions, ServingOptions
from treg.cli.loading import load_tokenizer
from treg.rewards import SOURCES
from treg.rewards.annotate import process_state
from treg.rewards.annotate_options import AnnotateOptions
from treg.rewards.server import ServedModel, ServerOptions, check_sources, sources_of
from treg.rewards.server.options import check_whole

KEYS = ("TREG_SERVER_KEY", "OPENAI_API_KEY")  # the first that is set
# options that say how a model runs here, and who says it for a served one
OF_MODELS_HERE = {
    "dtype": "set it where the server is started",
    "attn_implementation": "set it where the server is started",
    "bf16": "set the dtype where the server is started",
    "fp16": "set the dtype where the server is started",
    "tokens_per_batch": "--server_concurrency bounds what is under way",
    "no_share_prefix": "the server decides what it shares",
}


def check_options(serving: ServingOptions, given: Sequence[Any], options: AnnotateOptions) -> None:
    """ValueError for options that need a server and have none, or that have one and need none.

    given: the objects of options that the command was called with.
    """
    if serving.server is None:
        alone = [name for name, _ in _changed(serving)]
        if alone:
            raise ValueError(f"{alone[0]}: expected it beside --server, got it alone")
        return
    # a reward model beside the server
    names = sources_of(options.rewards, options.source_options)
    runs_here = any(name == "redistribution" or name not in SOURCES for name in names)
    for kind in given:
        if not isinstance(kind, (ModelOptions, AnnotateOnlyOptions, RewardsOptions)):
            continue
        for name, value in _changed(kind):
            if name in OF_MODELS_HERE and not (name == "tokens_per_batch" and runs_here):
                raise ValueError(
                    f"{name}: expected none with --server, got {value!r}: {OF_MODELS_HERE[name]}"
                )
    check_sources(options.rewards, options.source_options)


def server_options(serving: ServingOptions, model: str) -> ServerOptions:
    """How the server is asked; the key comes from the environment."""
    keys = [parse_choice_from_env(name, "") for name in KEYS]
    check_whole("server_concurrency", serving.server_concurrency, 1)
    check_whole("server_retries", serving.server_retries, 0)
    if serving.server_length is not None:
        check_whole("server_length", serving.server_length, 3)
    return ServerOptions(
        serving.server or [],
        model,
        concurrency=serving.server_concurrency,
        retries=serving.server_retries,
        timeout=serving.server_timeout,
        length=serving.server_length,
        dialect=serving.server_dialect,
        key=next((key for key in keys if key), ""),
    )


def served_tokenizer(model: ModelOptions) -> Any:
    """The tokenizer of a served model: that of --tokenizer, else of the folder or hub name that the
    model has there too.
    """
    try:
        return load_tokenizer(model.tokenizer or model.model, model.chat_template)
    except (OSError, ValueError) as error:
        if model.tokenizer is not None:
            raise
        raise ValueError(
            f"tokenizer: expected --tokenizer, a folder or hub name, as {model.model!r} is a name "
            f"of the server's alone: {error}"
        ) from error


@contextmanager
def served(serving: ServingOptions, model: str, tokenizer: Any) -> Iterator[ServedModel]:
    """The model, for as long as it is needed."""
    found = ServedModel(server_options(serving, model), tokenizer, device=process_state().device)
    try:
        yield found
    finally:
        found.close()


def _changed(options: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the fields that are not the default."""
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if option.default is not dataclasses.MISSING and value != option.default:
            yield option.name, value

"""The options of the commands, as dataclasses, for which torch and transformers are not loaded."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from treg.rewards.names import DEFAULT_SOURCE, SOURCE_PATHS

SHAPES = "scale=F, clip=F, centre, standardise=F, rank=LO,HI, smooth=W, skip=K"


def _option(default: Any, text: str, value: str | None = None) -> Any:
    """A field. value: what stands for its value on a page of help."""
    return field(default=default, metadata=_told(text, value))


def _required(text: str, value: str) -> Any:
    return field(metadata=_told(text, value))


def _told(text: str, value: str | None = None) -> dict[str, Any]:
    """The arguments of argparse, to which HfArgumentParser hands a field's metadata."""
    return {"help": text} if value is None else {"help": text, "metavar": value}


@dataclass
class ModelOptions:
    GROUP: ClassVar[str] = "model"

    model: str = _required("Folder or hub name of a causal LM.", "NAME")
    tokenizer: str | None = _option(
        None, "Folder or hub name of the tokenizer, if not the model's.", "NAME"
    )
    chat_template: str | None = _option(
        None, "A Jinja file that replaces the tokenizer's chat template.", "FILE"
    )
    dtype: str | None = _option(
        None,
        "Of the weights; auto: the checkpoint's. Default: float32, the same for every command.",
        "{auto,float32,bfloat16,float16}",
    )
    attn_implementation: str | None = _option(
        None, "E.g. sdpa, flash_attention_2. Default: the model's own.", "NAME"
    )


@dataclass
class RowOptions:
    GROUP: ClassVar[str] = "data"

    data: list[str] = field(
        metadata=_told(
            "One or several of: JSONL(.gz), JSON, parquet, a folder, or a hub name.", "PATH [...]"
        )
    )
    split: str = _option("train", "Split of a hub dataset or of a folder.", "NAME")
    columns: list[str] | None = field(
        default=None,
        metadata=_told(
            "Names of columns, as OURS=YOURS: prompt=question. NAME= leaves a column out.",
            "A=B [...]",
        ),
    )
    plain_text: bool = _option(
        False, "Take text as it is, for text that a chat template wrote already."
    )
    turns: str = _option(
        "assistant",
        "Which turns of a completion of several messages are scored. TRL scores all.",
        "{assistant,all}",
    )
    date: str | None = _option(
        None, "What a chat template takes for today, as YYYY-MM-DD. Default: today.", "DATE"
    )
    limit: int | None = _option(None, "Look at the first rows only, of each source of --data.")
    num_proc: int = _option(1, "Processes that tokenize, of more than 4,000 rows.", "N")
    row_cache: str | None = _option(
        None,
        "A folder that keeps tokenized rows for other runs. Default: beside the output.",
        "DIR",
    )
    strict: bool = _option(
        False, "Stop at the first row that cannot be used, instead of counting it."
    )


@dataclass
class RewardsOptions:
    """Where token rewards come from. rewards_options: what was given of the source's own."""

    GROUP: ClassVar[str] = "token rewards"
    OWN: ClassVar[str] = "rewards"  # the option that names something with options of its own

    rewards: str | None = _option(
        None,
        f"Source of token rewards: {', '.join(SOURCE_PATHS)}, or package.module:Class of your own. "
        f"Default: {DEFAULT_SOURCE}.",
        "NAME",
    )
    prompts: str | None = _option(None, "Short for --rewards.prompts.", "FILE")
    tokens_per_batch: int = _option(16384, "Tokens of one forward of the annotating model.")
    no_share_prefix: bool = _option(
        False, "Run what rows begin with (a prompt, a conversation) anew for each of them."
    )
    shape: list[str] | None = field(
        default=None,
        metadata=_told(
            f"What is done to the rewards of each response, in the order given: {SHAPES}.",
            "STEP [...]",
        ),
    )
    rewards_options: dict[str, Any] = field(default_factory=dict, init=False)


@dataclass
class ServingOptions:
    """A model that a serving engine has, in the place of one that runs here."""

    GROUP: ClassVar[str] = "server"

    server: list[str] | None = field(
        default=None,
        metadata=_told(
            "Address of a serving engine (vLLM, SGLang) that has --model under this name; several "
            "are replicas. A key is read from TREG_SERVER_KEY or OPENAI_API_KEY.",
            "URL [...]",
        ),
    )
    server_concurrency: int = _option(16, "Requests that are under way at a time, of each process.")
    server_retries: int = _option(8, "How often a request is sent again after a fault.")
    server_timeout: float = _option(600.0, "Seconds for one request.")
    server_length: int | None = _option(
        None, "Tokens that the model's context holds there. Default: what the server says."
    )
    server_dialect: str | None = _option(
        None, "How the server is asked. Default: found out.", "{vllm,sglang,echo}"
    )


@dataclass
class AnnotateOnlyOptions:
    GROUP: ClassVar[str] = "output and logging"

    output: str = _required(
        "The parquet file to write. After a stop, the same command goes on.", "FILE"
    )
    max_length: int = _option(1024, "Tokens of prompt and completion.")
    bf16: bool = _option(
        False, "Forwards in bfloat16 with these weights, as training with --bf16 has them."
    )
    fp16: bool = _option(False, "The same in float16.")
    per_token: bool = _option(False, "Keep the reference's log-prob of every token as well.")
    no_reference: bool = _option(
        False, "Keep no log-probs of the reference, for objectives that need none."
    )
    keep_columns: list[str] | None = field(
        default=None,
        metadata=_told(
            "Columns of the data that the file keeps, such as chosen_safe.", "NAME [...]"
        ),
    )


@dataclass
class TrainOptions:
    GROUP: ClassVar[str] = "adapters"

    data_weights: list[float] | None = field(
        default=None,
        metadata=_told(
            "How many times the rows of each source of --data go into an epoch: 2 is each twice, "
            "0.5 half of them. Default: 1 for each.",
            "X [...]",
        ),
    )
    mixed_annotations: bool = _option(
        False, "Accept annotated files of --data that were not made alike, as from other sources."
    )
    eval_data: list[str] | None = field(
        default=None,
        metadata=_told("Held-out pairs, in any form that --data has.", "PATH [...]"),
    )
    eval_split: str = _option("test", "Split of held-out pairs from a hub dataset.", "NAME")
    ref_model: str | None = _option(
        None,
        "The reference. Default: the model itself, as it is before training.",
        "NAME",
    )
    use_peft: bool = _option(False, "Train LoRA adapters; the model without them is the reference.")
    lora_r: int = _option(16, "Rank of the adapters.")
    lora_alpha: int = _option(32, "Scale of the adapters.")
    lora_dropout: float = _option(0.0, "Dropout of the adapters.")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata=_told("Layers that get adapters. Default: all linear ones.", "NAME [...]"),
    )
    load_in_4bit: bool = _option(
        False, "QLoRA: the weights below the adapters in 4 bits (NF4), by bitsandbytes."
    )
    merge_adapter: bool = _option(
        False, "After training, write the whole model into the folder `merged` of the run as well."
    )
    sample_steps: int | None = _option(
        None, "Steps between samples: completions of a few prompts, to the log and samples.jsonl."
    )
    sample_prompts: str | None = _option(
        None,
        "Prompts of the samples: a text file, one a line, or JSONL. Default: three of the data.",
        "FILE",
    )


@dataclass
class InspectOptions:
    GROUP: ClassVar[str] = "options"

    data: str = _required("An annotated parquet file.", "FILE")
    model: str | None = _option(
        None, "A trained model: its implicit rewards are shown beside the token rewards."
    )
    ref_model: str | None = _option(
        None, "The reference model, if the file keeps no log-probs of each token."
    )
    tokenizer: str | None = _option(
        None, "Folder or hub name of the tokenizer, if not the model's."
    )
    dtype: str | None = _option(
        None,
        "Default: what the run was trained in, else float32.",
        "{auto,float32,bfloat16,float16}",
    )
    stream: str | None = _option(
        None, "The per-token signal to show. Default: token_rewards, else the file's first."
    )
    run: str | None = _option(
        None, "Output folder of a training run, for its curves. Default: the model's."
    )
    output: str | None = _option(None, "The HTML page. Default: beside the data.")
    curves: str | None = _option(None, "Write the training curves to this PNG as well.")
    beta: float | None = _option(
        None, "Scale of the implicit rewards. Default: that of the run, else 0.1."
    )
    limit: int = _option(100, "Show the first pairs only.")
    terminal: bool = _option(False, "Print the pairs to the terminal as well.")


# of treg evaluate-credit, in the order of docs/evaluate.md
FORMATS = ("finegrained", "spans", "tags", "steps", "pairs", "mqm")


@dataclass
class MarkedOptions:
    """Answers with marks. format_options: what was given of the format's own options."""

    GROUP: ClassVar[str] = "data"
    OWN: ClassVar[str] = "format"

    data: list[str] = field(
        metadata=_told("One or several files of answers with marks.", "PATH [...]")
    )
    format: str = _required(f"How the file marks them: {', '.join(FORMATS)}.", "NAME")
    half: str = _option(
        "all",
        "Evaluate one half of the documents, drawn by the seed: choose on the first half, and "
        "report on the second.",
        "{first,second,all}",
    )
    limit: int | None = _option(None, "The first documents only, of the half.")
    max_length: int | None = _option(
        None, "Tokens of prompt and answer. Default: that of --annotated, else 1024."
    )
    plain_text: bool = _option(False, "No chat template around prompt and answer.")
    date: str | None = _option(
        None, "What a chat template takes for today, as YYYY-MM-DD. Default: today.", "DATE"
    )
    strict: bool = _option(False, "Stop at the first answer that cannot be used.")
    format_options: dict[str, Any] = field(default_factory=dict, init=False)


@dataclass
class EvaluateOptions:
    GROUP: ClassVar[str] = "evaluation"

    model: str | None = _option(
        None, "Folder or hub name of a causal LM. Needed unless --annotated has all.", "NAME"
    )
    tokenizer: str | None = _option(
        None, "Folder or hub name of the tokenizer, if not the model's.", "NAME"
    )
    chat_template: str | None = _option(
        None, "A Jinja file that replaces the tokenizer's chat template.", "FILE"
    )
    dtype: str | None = _option(
        None, "Of the weights. Default: float32.", "{auto,float32,bfloat16,float16}"
    )
    annotated: str | None = _option(
        None,
        "Evaluate what treg annotate wrote of the same rows. Without --rewards no source runs.",
        "FILE",
    )
    streams: list[str] | None = field(
        default=None,
        metadata=_told("Streams of that file. Default: all that it names.", "NAME [...]"),
    )
    step_score: str = _option(
        "min", "What a step's score is of its tokens' scores.", "{min,mean,sum}"
    )
    draws: int = _option(1000, "Draws of the bootstrap over documents; 0: no intervals.")
    seed: int = _option(0, "Of the draws, of the halves, and of the random baseline.")
    json: str | None = _option(None, "Write everything that was measured to this file.", "FILE")
    plots: str | None = _option(
        None, "Write intervals, distributions and calibration: FILE.svg, .png or .html.", "FILE"
    )


@dataclass
class DemoOptions:
    GROUP: ClassVar[str] = "options"

    output: str = _option("treg-demo", "Folder for the annotated pairs, the page and the curves.")
    seeds: int = _option(5, "Training runs of each method.")
    pairs: int | None = _option(None, "Preference pairs to train on.")


@dataclass
class MergeOptions:
    GROUP: ClassVar[str] = "options"

    adapter: str = _required("Folder or hub name of a PEFT adapter.", "NAME")
    output: str = _required("Folder to write the whole model to.", "FOLDER")
    model: str | None = _option(
        None, "The model that the adapter was trained on. Default: what the adapter says.", "NAME"
    )
    dtype: str = _option(
        "auto", "Of the weights that are written; auto: the model's.", "{auto,float32,...}"
    )


@dataclass
class ConfigOptions:
    GROUP: ClassVar[str] = "options"

    name: str = _required("Which configuration to print.", "{fsdp2,multi_gpu}")

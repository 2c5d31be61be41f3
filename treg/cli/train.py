"""treg train: a causal LM on preference pairs, annotated or raw."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from treg.cli.loading import (
    DEFAULT_DTYPE,
    annotate_options,
    autocast,
    data_of,
    drawable,
    encode_options,
    load_model,
    load_tokenizer,
    say,
    signal_of,
    tell_of_short,
)
from treg.cli.merge import write_merged
from treg.cli.options import (
    ModelOptions,
    RewardsOptions,
    RowOptions,
    TrainOptions,
    parse,
    words,
)
from treg.cli.quantized import check_4bit, quantization
from treg.cli.runs import claim_run, finish, finished, going_on_from
from treg.cli.samples import Samples, check_whole, read_prompts
from treg.data import EncodeOptions, EncodeWork, load_pairs
from treg.data.annotated import is_annotated, read_annotated, read_meta, streams_of
from treg.data.batches import LOSS_STREAMS
from treg.data.examples import examples_of
from treg.data.mixture import (
    Mixture,
    check_made_alike,
    check_there,
    checked_weights,
    mixed_lines,
)
from treg.data.row_cache import remove_old_rows
from treg.files import last_checkpoint, locked, writing
from treg.rewards import streams_given
from treg.rewards.annotate import annotate, process_state, shared_work
from treg.rewards.made_with import planned
from treg.rewards.parts import ROWS
from treg.rewards.progress import counted_rows
from treg.trainer import TRegConfig, TRegTrainer
from treg.trainer.data import example_loader, reference_source
from treg.viz import plot_curves

# options that may change between the parts of one run, by the beginning of their names: they do not
# change the numbers
MAY_CHANGE = words(
    """
    output_dir log save eval report_to run_name disable_tqdm push_to hub dataloader memory_budget
    ignore_fingerprint load_best metric_for greater_is project trackio include do_ resume prediction
    torch_empty batch_eval sample_ merge_adapter strict tokens_per_batch no_share_prefix
    num_proc row_cache mixed_annotations
    """
)


@dataclass(frozen=True)
class Options:
    """All options of a run."""

    model: ModelOptions
    rows: RowOptions
    own: TrainOptions
    rewards: RewardsOptions
    config: TRegConfig

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the numbers, by name."""
        found: dict[str, Any] = {}
        for group in (self.model, self.rows, self.own, self.rewards):
            found |= vars(group)
        found |= self.config.to_dict()
        kept = {k: x for k, x in found.items() if not k.startswith(MAY_CHANGE) or k == "eval_data"}
        kept |= {"data": _one_or_list(self.data), "data_weights": list(self.weights)}
        kept["eval_data"] = _one_or_list(self.eval_data)
        return kept | {"processes": process_state().num_processes}

    @property
    def data(self) -> list[str]:
        """What is trained on."""
        return data_of("data", self.rows.data)

    @property
    def eval_data(self) -> list[str]:
        """What is evaluated on; [] for nothing."""
        given = self.own.eval_data
        return [] if given is None else data_of("eval_data", given)

    @property
    def weights(self) -> tuple[float, ...]:
        """How many times the rows of each of the data go into an epoch."""
        return checked_weights(self.own.data_weights, self.data)

    @property
    def sample_seed(self) -> int:
        """Of the rows that are taken where a weight is no whole number."""
        seed = self.config.data_seed
        return self.config.seed if seed is None else seed

    @property
    def dtype(self) -> str:
        return self.model.dtype or DEFAULT_DTYPE

    @property
    def encode(self) -> EncodeOptions:
        """How raw rows become token ids."""
        return encode_options(self.rows, self.config.max_length)

    @property
    def annotates(self) -> bool:
        """Whether raw data are annotated first."""
        return bool(self.config.loss_options.needed_streams) or self.rewards.rewards is not None


def _one_or_list(paths: list[str]) -> str | list[str] | None:
    """The paths as a run keeps them: one as a text, which was once the only form."""
    return paths if len(paths) > 1 else paths[0] if paths else None


def run(argv: list[str]) -> None:
    kinds = (ModelOptions, RowOptions, TrainOptions, RewardsOptions, TRegConfig)
    options = Options(*parse("train", argv, kinds))
    _check(options)
    out = Path(options.config.output_dir or "")
    with contextlib.ExitStack() as stack:
        if process_state().is_main_process:
            stack.enter_context(locked(out))
        begun = claim_run(out, options.settings)
        if finished(out):
            say(f"{out} holds a finished run of these settings: nothing to do")
        else:
            _train(out, options, begun)


def _check(options: Options) -> None:
    """ValueError for options that do not go together, before anything is loaded."""
    config = options.config
    if options.own.eval_data is not None and config.eval_strategy == "no":
        raise ValueError("eval_data: expected --eval_strategy steps or epoch beside it, got 'no'")
    if config.use_liger_kernel and torch.device(config.device).type == "cpu":
        raise ValueError(
            "use_liger_kernel: expected a GPU, got a CPU; Liger's layers are Triton kernels"
        )
    data = [*options.data, *options.eval_data]
    checked_weights(options.own.data_weights, options.data)
    _check_own(options)
    raw = [x for x in data if not is_annotated(x)]
    EncodeWork(options.rows.num_proc)
    limit = options.rows.limit
    if limit is not None and len(raw) < len(data):
        raise ValueError(
            f"limit: expected none with annotated data, got {limit}; annotate fewer rows"
        )
    _check_rewards(options, raw)
    _check_beside(options, "data", options.data)
    _check_beside(options, "eval_data", options.eval_data)


def _check_own(options: Options) -> None:
    """ValueError for options of adapters and samples that do not go together."""
    own = options.own
    for name in ("load_in_4bit", "merge_adapter"):
        if getattr(own, name) and not own.use_peft:
            raise ValueError(f"{name}: expected --use_peft beside it, got none")
    if own.load_in_4bit:
        check_4bit()
    if own.merge_adapter and own.load_in_4bit:
        raise ValueError(
            "merge_adapter: expected False with --load_in_4bit, got True; `treg merge` puts the "
            "adapter into the weights that the checkpoint has"
        )
    if own.sample_prompts is not None and own.sample_steps is None:
        raise ValueError("sample_prompts: expected --sample_steps beside it, got none")
    if own.sample_steps is not None and own.sample_steps < 1:
        raise ValueError(f"sample_steps: expected a positive number, got {own.sample_steps}")


def _check_rewards(options: Options, raw: list[str]) -> None:
    """ValueError for options of token rewards that are wrong or have no effect; raw: the data that
    are not annotated.
    """
    rewards, loss = options.rewards, options.config.loss_options
    given: dict[str, Any] = {"rewards": rewards.rewards, "prompts": rewards.prompts}
    given["shape"] = rewards.shape
    given |= {f"rewards.{name}": x for name, x in rewards.rewards_options.items()}
    for name, value in given.items():
        if value is not None and not raw:
            raise ValueError(
                f"{name}: expected none with annotated data, got {value!r}; annotate them again"
            )
        if value is not None and not options.annotates:
            raise ValueError(
                f"{name}: expected none with alpha=0, for which nothing is annotated, got "
                f"{value!r}; name the source with --rewards to annotate all the same"
            )
    if not raw or not options.annotates:
        return
    made = annotate_options(rewards, options.encode, per_token=True)
    streams = streams_given(made.rewards, made.source_options)
    if loss.alpha > 0 and "token_rewards" not in streams:
        raise ValueError(
            f"alpha: expected 0 with --rewards {made.rewards}, which gives {', '.join(streams)} "
            f"and no token_rewards, got {loss.alpha}"
        )
    for stream in loss.needed_streams:
        if stream not in streams:
            raise ValueError(
                f"loss_type: expected one that {', '.join(streams)} of --rewards {made.rewards} "
                f"serve, got {loss.loss_type!r}, which needs {stream}"
            )


def _parted(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the data that are annotated, and those that are raw."""
    annotated = [x for x in paths if is_annotated(x)]
    return annotated, [x for x in paths if x not in annotated]


def _check_beside(options: Options, name: str, paths: Sequence[str]) -> None:
    """ValueError for annotated data beside raw ones that would get other columns than they have,
    before the raw ones are annotated.

    name, paths: of the option, and what it says.
    """
    annotated, raw = _parted(paths)
    if not annotated or not raw:
        return
    if not options.annotates:
        raise ValueError(
            f"{name}: expected annotated data alone or raw ones, got {annotated[0]} and {raw[0]}; "
            "--rewards names the source that annotates the raw ones"
        )
    made = annotate_options(options.rewards, options.encode, per_token=True)
    given = set(streams_given(made.rewards, made.source_options)).intersection(LOSS_STREAMS)
    for path in annotated:
        meta = read_meta(path)
        there = set(streams_of(meta)).intersection(LOSS_STREAMS)
        if there != given:
            raise ValueError(
                f"{name}: expected {', '.join(sorted(given))} in {path}, as --rewards "
                f"{made.rewards} gives {raw[0]}, got {', '.join(sorted(there)) or 'none'}; "
                "annotate both alike"
            )
        if not meta.get("settings", {}).get("per_token"):
            raise ValueError(
                f"{name}: expected {path} with the reference's log-prob of each token, as {raw[0]} "
                "gets them, got none; annotate it with --per_token, or annotate both before"
            )


def _shared_lines(trainer: TRegTrainer) -> list[str]:
    shared = "share_prompt: a pair's prompt is run once, for both answers"
    return [shared] if trainer.shares_prompts else []


def _train(out: Path, options: Options, begun: str) -> None:
    config, own = options.config, options.own
    check_there([*options.data, *options.eval_data])
    device = torch.device(config.device)
    tell_of_short("--dtype", options.dtype, device)
    tell_of_short("--bf16", "bfloat16" if config.bf16 else "float32", device)
    tokenizer = load_tokenizer(
        options.model.tokenizer or options.model.model, options.model.chat_template
    )
    quantized = quantization(device, config.bf16) if own.load_in_4bit else {}
    model = _load_model(options, options.model.model, **quantized)
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"model: expected a whole model, got {options.model.model}, which holds adapters; "
            "merge them (PeftModel.merge_and_unload) and train from what that saves"
        )
    reference = None if own.ref_model is None else _load_model(options, own.ref_model)
    judge = model if reference is None else reference
    prepare = _DataPreparation(out, options, tokenizer, judge, begun)
    prepare.check(reference)
    train_data, eval_data = prepare.train(), prepare.eval()
    objective = config.loss_options.objective
    annotated = all(isinstance(x, str) for x in train_data.sources)
    plain = not annotated and not objective.reference_free
    plain |= config.loss_options.with_kl  # which log-probs of a file do not give
    if reference is None and plain and not own.use_peft:
        reference = _load_model(options, options.model.model)
    if own.load_in_4bit:
        from peft import prepare_model_for_kbit_training

        checkpointing = bool(config.gradient_checkpointing or config.activation_checkpointing)
        model = prepare_model_for_kbit_training(model, checkpointing)
    trainer = TRegTrainer(
        model, reference, config, train_data, eval_data, tokenizer, _peft_config(own)
    )
    say(*mixed_lines(trainer.data_shares["train_dataset"]), *_shared_lines(trainer))
    if annotated:
        alpha, mean = config.loss_options.alpha, objective.length_normalised
        trained: Any = trainer.train_dataset
        packs = (x if isinstance(x, list) else [x] for x in trained)
        examples = list(itertools.chain.from_iterable(packs))
        say(*signal_of(examples, alpha, length_normalised=mean))
    if own.sample_steps is not None:
        check_whole(trainer)
        trainer.add_callback(_samples(out, own, train_data, tokenizer))
    # the trainer keeps the reference if it is needed
    del reference, prepare, judge
    if config.save_only_model:
        say("save_only_model: if this run is stopped, it starts from its beginning again")
    try:
        trainer.train(resume_from_checkpoint=going_on_from(out))
    except KeyboardInterrupt:
        kept = last_checkpoint(out)
        step = trainer.state.global_step
        said = "no checkpoint is there yet (--save_steps)" if kept is None else f"{kept} is whole"
        raise KeyboardInterrupt(f"at step {step}; {said}") from None
    with writing(out):
        trainer.save_model()
        trainer.create_model_card(finetuned_from=options.model.model, dataset=options.rows.data)
        if trainer.is_world_process_zero() and drawable(trainer.state.log_history):
            plot_curves({out.name: trainer.state.log_history}, out / "curves.png")
        trainer.save_state()
        if trainer.is_world_process_zero():
            finish(out)
            if options.rows.row_cache is None:
                remove_old_rows(out / ROWS)
    say(f"wrote {out}: the model, its card, trainer_state.json, curves.png")
    if own.merge_adapter and trainer.is_world_process_zero():
        write_merged(options.model.model, str(out), out / "merged", tokenizer)


def _load_model(options: Options, path: str, **more: Any) -> Any:
    attention = options.model.attn_implementation
    return load_model(path, options.dtype, attn_implementation=attention, **more)


def _samples(out: Path, own: TrainOptions, data: Mixture, tokenizer: Any) -> Samples:
    if own.sample_prompts is not None:
        prompts = read_prompts(own.sample_prompts)
    else:
        source = data.sources[0]
        first = source if isinstance(source, list) else read_annotated(source)[0]
        prompts = [tokenizer.decode(x["prompt_ids"]) for x in first[:3]]
    rendered = own.sample_prompts is None
    return Samples(out, int(own.sample_steps or 1), prompts, tokenizer, rendered=rendered)


def _peft_config(own: TrainOptions) -> Any:
    if not own.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=own.lora_r,
        lora_alpha=own.lora_alpha,
        lora_dropout=own.lora_dropout,
        target_modules=own.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


@dataclass
class _DataPreparation:
    """Data as the trainer takes them: raw ones are annotated first where that is wanted.

    model: the one that annotates. begun: the day of the run, for templates that ask.
    """

    out: Path
    options: Options
    tokenizer: Any
    model: Any
    begun: str

    def check(self, reference: Any) -> None:
        """ValueError for annotated data that training would refuse once the raw ones beside them
        are annotated, before they are.

        reference: the model of --ref_model, or None.
        """
        options = self.options
        given = {"train_dataset": options.data, "eval_dataset": options.eval_data}
        parted = {name: _parted(paths) for name, paths in given.items()}
        if not options.annotates or not any(raw for _, raw in parted.values()):
            return
        config, mixed = options.config, options.own.mixed_annotations
        load = example_loader(config, self.tokenizer, self.model, adapters=True)
        encode = options.encode.dated(self.tokenizer, self.begun)
        made = planned(annotate_options(options.rewards, encode, per_token=True))
        sets = {}
        for name, (annotated, raw) in parted.items():
            if not annotated:
                continue
            sets[name] = load(Mixture(tuple(annotated), mixed_annotations=mixed), name)
            for path in annotated if raw and not mixed else ():
                check_made_alike(raw[0], made, path, read_meta(path), settings=False)
        loss = config.loss_options
        found = self.model if loss.with_kl else reference
        reference_source(loss, sets, found, options.own.use_peft)

    def train(self) -> Mixture:
        """What --data names, with its weights."""
        options = self.options
        return self._mixture(options.data, "annotated", options.rows.split, options.weights)

    def eval(self) -> Mixture | None:
        """What --eval_data names, all of it."""
        options = self.options
        if not options.eval_data:
            return None
        return self._mixture(options.eval_data, "annotated-eval", options.own.eval_split, ())

    def _mixture(
        self, paths: Sequence[str], name: str, split: str, weights: Sequence[float]
    ) -> Mixture:
        """name: of the annotated file; of several, name-1, name-2, ..."""
        several = len(paths) > 1
        names = [f"{name}-{i}" if several else name for i, _ in enumerate(paths, 1)]
        sources = [self._one(x, y, split) for x, y in zip(paths, names, strict=True)]
        seed, mixed = self.options.sample_seed, self.options.own.mixed_annotations
        return Mixture(tuple(sources), tuple(weights), seed, tuple(paths), mixed)

    def _one(self, source: str, name: str, split: str) -> str | list:
        """The path of an annotated file, or examples."""
        if is_annotated(source):
            return source
        if self.options.annotates:
            return self._annotated(source, name, split)
        rows = self.options.rows
        columns = self.options.config.loss_options.objective.pair_columns
        with counted_rows(process_state().is_main_process) as on_rows:
            pairs, report = load_pairs(
                source,
                self.tokenizer,
                self.options.encode.dated(self.tokenizer, self.begun),
                split=split,
                strict=rows.strict,
                limit=rows.limit,
                known=columns,
                on_rows=on_rows,
                work=shared_work(self._work),
            )
        say(f"{name}: {report}")
        return examples_of(pairs, columns)

    @property
    def _work(self) -> EncodeWork:
        """Rows are kept in the run's folder, from which a run that was stopped goes on. What is
        named with "_" is not pushed to the hub.
        """
        rows = self.options.rows
        return EncodeWork(rows.num_proc, rows.row_cache or self.out / ROWS)

    def _annotated(self, source: str, name: str, split: str) -> str:
        config, rows = self.options.config, self.options.rows
        output = self.out / f"{name}.parquet"
        device = torch.device(process_state().device or "cpu")
        # as training will see the reference
        with autocast(device, bf16=config.bf16, fp16=config.fp16):
            report = annotate(
                self.model.to(device),
                self.tokenizer,
                source,
                output,
                annotate_options(
                    self.options.rewards,
                    self.options.encode.dated(self.tokenizer, self.begun),
                    per_token=True,
                    keep_columns=config.loss_options.objective.pair_columns,
                ),
                split=split,
                strict=rows.strict,
                limit=rows.limit,
                work=self._work,
            )
        say(f"{name}: {report}")
        return str(output)

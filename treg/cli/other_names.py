"""Names that options have in other programs, TRL's above all, and what stands for them here."""

from collections.abc import Collection

from treg.rewards.names import nearest

ALIASES = {
    "model_name_or_path": "model",
    "ref_model_name_or_path": "ref_model",
    "tokenizer_name_or_path": "tokenizer",
    "torch_dtype": "dtype",
    "dataset_name": "data",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_split",
    "eval_dataset_name": "eval_data",
    "dataset_num_proc": "num_proc",
    "chat_template_path": "chat_template",
    "padding_free": "packing",
    "activation_checkpointing": "gradient_checkpointing",  # transformers before it had the first
}
# options that nothing stands for, and what to do instead
INSTEAD = {
    "max_prompt_length": "--max_length counts prompt and completion; there is no limit for one",
    "max_completion_length": "--max_length counts prompt and completion; there is no limit for one",
    "truncation_mode": "completions are cut at --max_length, prompts never",
    "precompute_ref_log_probs": "`treg annotate` keeps the reference's log-probs in its file",
    "reference_free": "--loss_type simpo, orpo and cpo need no reference",
    "use_liger_loss": "the loss is always computed without logits",
    "load_in_8bit": "--load_in_4bit is what there is",
    "trust_remote_code": "code that comes with a checkpoint is never run",
    "dataset_config": "give a folder or file of that configuration as --data",
    "interleave_probs": "--data_weights says how many times the rows of each source of --data go "
    "into an epoch of `treg train`",
    "dataset_mixer": "--data takes several sources, --data_weights of `treg train` their fractions",
    "lora_task_type": "the task is always a causal LM",
    "model_revision": "download that revision, and give its folder as --model",
    "label_pad_token_id": "tokens that are not scored are -100",
    "padding_value": "the tokenizer's padding token is taken",
    "force_use_ref_model": "--ref_model is taken where it is given",
    "generate_during_eval": "--sample_steps logs completions while training",
    "sync_ref_model": "the reference stays as it is",
    "rpo_alpha": "--loss_type orpo and cpo have a likelihood term",
    "use_weighting": "token weights come from the data: treg annotate --rewards",
    "ld_alpha": "token weights come from the data: treg annotate --rewards",
}


def own_name(given: str, known: Collection[str], beside: Collection[str]) -> str:
    """The name that an option has here: given itself where it is known or nothing stands for it.

    Args:
        known: the options of the command. beside: all that are given with it.
    Raises:
        ValueError: both names are given.
    """
    if given in known:
        return given
    own = ALIASES.get(given.replace("-", "_"))
    if own is None or own not in known:
        return given
    if own in beside:
        raise ValueError(f"{own}: expected --{own} or --{given}, got both")
    return own


def hint(given: str, known: Collection[str], prefix: str = "") -> str:
    """What to do instead of an option that is not known; "" where nothing is like it."""
    instead = INSTEAD.get(given.replace("-", "_"))
    if instead is not None:
        return f": {instead}"
    return nearest(prefix + given, [prefix + x for x in known])

"""GRPOConfig, and what treg's trainer needs beside it."""

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from treg.checks import check_count, check_fraction, check_number
from treg.data.reading import json_object
from treg.integrations.trl.credit import CREDITS, MACROS, needs_logprobs
from treg.rewards import streams_given
from treg.rewards.names import nearest
from treg.rl import BASELINES, SCALES

# how `treg.rewards` begins its errors, after the options of `treg annotate` -> the names here
SOURCE_NAMES = {"rewards:": "token_rewards:", "rewards.": "token_rewards_options."}
REFERENCE_NAMES = {"rewards.model:": "token_rewards_model:"}


@contextlib.contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """What is refused in here is said by the names that the config has.

    Args:
        names: beginnings of the names that errors have -> what stands in their place.
    Raises:
        ValueError: that of within, with the other names.
    """
    try:
        yield
    except ValueError as error:
        pattern = "|".join(map(re.escape, names))
        text = re.sub(rf"(?:^|--)({pattern})", lambda found: names[found[1]], str(error))
        if type(error) is not ValueError or text == str(error):
            raise
        raise ValueError(text) from error.__cause__


@dataclass
class TRegGRPOConfig(GRPOConfig):
    """GRPOConfig, and

    token_rewards: the source of token rewards rhat_t, a key of `treg.rewards.SOURCES` or
        "package.module:Class". Their sum over a completion is one more reward function, named
        after the source. None: the reward functions alone.
    token_rewards_options: values of the fields of the source's Options, as a dict or as JSON.
    token_rewards_weight: of that sum among the rewards, as reward_weights has those of the others.
    token_rewards_model: the reference of a source that needs one, a folder or hub name. None: the
        trainer's own: of adapters the model below them, else the one that beta != 0 makes.
    token_rewards_tokens_per_batch: tokens of one forward of a source.
    credit: what the tokens of a completion are held to account for.
        "sequence": one advantage for all of them, TRL's own step.
        "returns": the rewards from a token on.
        "gae": the same with credit_lambda, so that near rewards weigh more.
        "macro": "gae" over macro actions instead of tokens.
        None: "gae" where there are token rewards, else "sequence".
    credit_gamma, credit_lambda: in [0, 1]; the second of "gae" and "macro" alone.
    credit_baseline: what is taken off the returns, a key of `treg.rl.BASELINES`. None: "process"
        with token rewards, which tokens earn all along; else "group".
    credit_scale: what advantages are divided by, a key of `treg.rl.SCALES`. None: scale_rewards.
    macro: what a macro action is: "ngram", macro_length tokens; "random", 2, 3, 5 or 10 tokens,
        drawn anew each time; "perplexity", tokens each of which is likelier than the one before;
        "word"; "sentence".
    macro_length: >= 1, tokens of an "ngram".
    kl_in_reward: beta * (log pi - log pi_ref) is taken off the reward of each token (RED, Eq. 8),
        and nothing is added to the loss for it. Not with mask_truncated_completions, which leaves
        no log-probs of what was cut; so macro="perplexity" too.
    treg_share_prompt: whether what completions begin with, their prompt above all, is run once for
        all of a batch that share it, by the policy and by the reference; log-probs and gradients
        are the same. None: where the models can and the first batch shows the same log-probs; else
        a warning is said. True: else it is an error.
    treg_memory_budget: bytes of temporaries of the head, see `treg.ops.linear_logprobs`.
    """

    token_rewards: str | None = field(
        default=None,
        metadata={"help": "Source of token rewards, or package.module:Class for your own."},
    )
    token_rewards_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the source, as JSON."}
    )
    token_rewards_weight: float = field(
        default=1.0, metadata={"help": "Weight of the token rewards among the rewards."}
    )
    token_rewards_model: str | None = field(
        default=None, metadata={"help": "Reference model of a source that needs one."}
    )
    token_rewards_tokens_per_batch: int = field(
        default=16384, metadata={"help": "Tokens of a forward that makes token rewards."}
    )
    credit: str | None = field(
        default=None,
        metadata={"help": f"{', '.join(CREDITS)}. Default: gae with token rewards, else sequence."},
    )
    credit_gamma: float = field(default=1.0, metadata={"help": "Discount, in [0, 1]."})
    credit_lambda: float = field(
        default=0.95, metadata={"help": "Lambda of gae and macro, in [0, 1]."}
    )
    credit_baseline: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(BASELINES)}. Default: process with token rewards, else group."
        },
    )
    credit_scale: str | None = field(
        default=None, metadata={"help": f"{', '.join(SCALES)}. Default: scale_rewards."}
    )
    macro: str = field(default="ngram", metadata={"help": f"Macro actions: {', '.join(MACROS)}."})
    macro_length: int = field(default=5, metadata={"help": "Tokens of an ngram."})
    kl_in_reward: bool = field(
        default=False,
        metadata={"help": "Take the KL term, times beta, off the rewards of tokens."},
    )
    treg_share_prompt: bool | None = field(
        default=None,
        metadata={"help": "Run a prompt once for its completions. Default: where models allow it."},
    )
    treg_memory_budget: int | None = field(
        default=None, metadata={"help": "Bytes of temporaries of the head."}
    )

    def __post_init__(self):
        # refused here, before any model loads
        copy.copy(self).settle()
        super().__post_init__()

    def settle(self) -> None:
        """Put what follows from the others in place of None. The trainer does so with its copy.

        Raises:
            ValueError: an option that is none, by name.
        """
        if self.credit is None:
            self.credit = "sequence" if self.token_rewards is None else "gae"
        if self.credit_baseline is None:
            self.credit_baseline = "group" if self.token_rewards is None else "process"
        self._check_choices()
        check_number("token_rewards_weight", self.token_rewards_weight)
        for name in ("credit_gamma", "credit_lambda"):
            check_fraction(name, getattr(self, name))
        for name in ("macro_length", "token_rewards_tokens_per_batch"):
            check_count(name, getattr(self, name))
        self._check_source()
        self._check_together()

    def _check_choices(self) -> None:
        """ValueError for a name that is none, with the nearest one."""
        for name, known in (
            ("credit", CREDITS),
            ("macro", MACROS),
            ("credit_baseline", BASELINES),
            ("credit_scale", SCALES),
        ):
            value, or_none = getattr(self, name), name == "credit_scale"
            if value in known or (or_none and value is None):
                continue
            raise ValueError(
                f"{name}: expected one of {', '.join(known)}"
                f"{', or None for scale_rewards' if or_none else ''}, got {value!r}"
                f"{nearest(str(value), known)}"
            )

    def _check_source(self) -> None:
        """ValueError for a source that there is not, or options that it does not have."""
        if self.token_rewards is None:
            for name in ("token_rewards_options", "token_rewards_model"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: expected None without token_rewards, got {getattr(self, name)!r}"
                    )
            return
        with named(SOURCE_NAMES):
            streams = streams_given(self.token_rewards, self.source_options)
        if "token_rewards" not in streams or "token_weights" in streams:
            raise ValueError(
                "token_rewards: expected a source of token_rewards and no token_weights, got "
                f"{self.token_rewards!r}, which gives {', '.join(streams)}"
            )

    def _check_together(self) -> None:
        if self.credit != "macro" and self.macro != "ngram":
            raise ValueError(
                "macro: expected 'ngram', its default, where credit is not 'macro', got "
                f"{self.macro!r} with credit={self.credit!r}; set credit='macro'"
            )
        if self.credit != "sequence" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "multi_objective_aggregation: expected 'sum_then_normalize' with credit="
                f"{self.credit!r}, whose rewards are summed before anything is normalized, got "
                f"{self.multi_objective_aggregation!r}"
            )
        if self.kl_in_reward and (self.credit == "sequence" or self.beta == 0.0):
            raise ValueError(
                "kl_in_reward: expected False with credit='sequence' or beta=0, got True with "
                f"credit={self.credit!r} and beta={self.beta}; set beta to the weight of the KL "
                "term, such as 0.04, and credit to 'returns', 'gae' or 'macro'"
            )
        if self.mask_truncated_completions and needs_logprobs(self):
            # TRL hides them from the models, so that all their log-probs are 0
            raise ValueError(
                "mask_truncated_completions: expected False with kl_in_reward or macro="
                "'perplexity', which take log-probs of all completions of a baseline, got True"
            )

    @property
    def source_options(self) -> dict[str, Any]:
        """The options of the source of token rewards, by name."""
        return json_object("token_rewards_options", self.token_rewards_options)

    @property
    def scale(self) -> str:
        """What advantages are divided by."""
        return self.credit_scale or str(self.scale_rewards)

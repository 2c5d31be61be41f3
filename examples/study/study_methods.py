"""The methods of the study, by name, and the slices that they are run in."""

from dataclasses import dataclass, field
from typing import Any

ALPHA = 0.5  # of the regularizer where nothing else is said
ALPHAS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
NOISES = (0.1, 0.2, 0.3)  # shares of labels that are wrong
SFT = "study_sft:SFT"


@dataclass(frozen=True)
class Signal:
    """Token rewards: a source, its options, and how they are shaped. An option whose value is DPO
    or JUDGE stands for the folder of that model.
    """

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    shaping: tuple[str, ...] = ()


DPO_MODEL, JUDGE = "{dpo}", "{judge}"
# the spread of the contrastive rewards and their limit, for rewards of other sources
SCALED = ("standardise=0.16", "clip=0.5")
SIGNALS = {
    "none": Signal("constant"),
    "contrastive": Signal("contrastive"),
    "flipped": Signal("contrastive", shaping=("scale=-1",)),
    "shuffled": Signal("shuffled"),  # the contrastive ones
    "random": Signal("random", {"spread": 0.16}),
    "oracle": Signal("spans", {"column": "{side}_marks"}),
    "surprise": Signal("surprise", shaping=SCALED),
    "own": Signal("implicit", {"model": DPO_MODEL}, SCALED),
    "red": Signal("redistribution", {"model": JUDGE}, SCALED),
    # DPO + SFT: alpha times the mean log-likelihood of the chosen answer's tokens
    "likelihood": Signal("study_sft:LikelihoodSource"),
}


@dataclass(frozen=True)
class Method:
    """A row of the table: what the loss is, and which token rewards it sees.

    rate: the learning rate's name in `Settings.rates`. faster: what it is multiplied by. noise: the
    share of the pairs whose label is wrong.
    """

    loss: str = "dpo"
    signal: str = "none"
    alpha: float = 0.0
    changes: dict[str, Any] = field(default_factory=dict)
    rate: str = "dpo"
    faster: float = 1.0
    noise: float = 0.0


SIMPO = {"beta": 2.0, "gamma": 1.0}


def reg(signal: str, alpha: float = ALPHA, **more: Any) -> Method:
    """DPO with T-REG's regularizer."""
    return Method(signal=signal, alpha=alpha, **more)


MAIN = {
    "SFT": Method(loss=SFT, rate="sft"),
    "DPO": Method(),
    "DPO, twice the rate": Method(faster=2.0),
    "SimPO": Method(loss="simpo", changes=SIMPO, rate="simpo"),
    "DPO-REG": reg("contrastive"),
    "SimPO-REG": reg("contrastive", loss="simpo", changes=SIMPO, rate="simpo"),
    "DPO + SFT": reg("likelihood", changes={"weighting": "static"}),
    "static weighting": reg("contrastive", changes={"weighting": "static"}),
    "DPO's own reward": reg("own"),
    "surprise": reg("surprise"),
    "RED": reg("red"),
    "oracle": reg("oracle"),
    "random": reg("random"),
    "sign-flipped": reg("flipped"),
    "shuffled": reg("shuffled"),
    "message-wise": Method(loss="messagewise", signal="contrastive"),
    "message-wise, RED": Method(loss="messagewise", signal="red"),
    "message-wise, oracle": Method(loss="messagewise", signal="oracle"),
}
NOISY = {
    "DPO": Method(),
    "DPO-REG": reg("contrastive"),
    "oracle": reg("oracle"),
    "message-wise": Method(loss="messagewise", signal="contrastive"),
}


def _slices() -> dict[str, dict[str, Method]]:
    alphas = {f"DPO-REG, alpha {x:g}": reg("contrastive", x) for x in ALPHAS if x != ALPHA}
    alphas |= {f"oracle, alpha {x:g}": reg("oracle", x) for x in ALPHAS if x != ALPHA}
    noisy = {}
    for noise in NOISES:
        for name, method in NOISY.items():
            values = vars(method) | {"noise": noise}
            noisy[f"{name}, noise {100 * noise:.0f} %"] = Method(**values)
    return {"main": MAIN, "alpha": alphas, "noise": noisy}


SLICES = _slices()
METHODS = {name: method for methods in SLICES.values() for name, method in methods.items()}

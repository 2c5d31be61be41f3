"""Sources by name, without what they need: a page of help must not load torch."""

import difflib
from collections.abc import Iterable
from typing import Any

DEFAULT_SOURCE = "contrastive"
# name -> module:Class, loaded when the source is asked for
SOURCE_PATHS = {
    "contrastive": "treg.rewards.contrastive:ContrastiveSource",
    "redistribution": "treg.rewards.redistribution:RedistributionSource",
    "implicit": "treg.rewards.implicit:ImplicitSource",
    "messagewise": "treg.rewards.messagewise:MessagewiseSource",
    "entropy": "treg.rewards.entropy:EntropySource",
    "surprise": "treg.rewards.surprise:SurpriseSource",
    "spans": "treg.rewards.spans:SpansSource",
    "edits": "treg.rewards.edits:EditsSource",
    "several": "treg.rewards.several:SeveralSource",
    "constant": "treg.rewards.controls:ConstantSource",
    "random": "treg.rewards.controls:RandomSource",
    "shuffled": "treg.rewards.controls:ShuffledSource",
}
ALIKE = 0.6  # share of equal letters from which a name may have been meant for another


def nearest(name: Any, known: Iterable[str]) -> str:
    """A hint for a name that is not known: what is most like it, each of several that are as much
    like it; "" where nothing is.
    """
    names = map(str, known)
    likeness = {x: difflib.SequenceMatcher(None, x, str(name)).ratio() for x in names}
    most = max(likeness.values(), default=0.0)
    found = [repr(x) for x, ratio in likeness.items() if ratio == most]
    return f"; did you mean {' or '.join(found)}?" if most >= ALIKE else ""

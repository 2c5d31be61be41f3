"""How good a per-token signal is: measures against marks on the tokens.

`auroc` and `ranks` need numpy alone. Other names are loaded when they are asked for: they need
torch, transformers and scikit-learn.
"""

import importlib
from typing import TYPE_CHECKING, Any

from treg.evaluate.measures import auroc, ranks

if TYPE_CHECKING:
    from treg.evaluate.columns import BaselineColumns, FileColumns, SourceColumns, with_own_names
    from treg.evaluate.documents import Mark, MarkedAnswer
    from treg.evaluate.evaluation import Evaluation, Measure, ScoreResult, evaluate_scores
    from treg.evaluate.place import TokenMarks, responses, token_marks
    from treg.evaluate.readers import READERS, read_marked
    from treg.evaluate.scored import Scored, ScoredAnswer
    from treg.evaluate.scoring import Placed, score_answers
    from treg.evaluate.told import conclusions, label_table, table

__all__ = [
    "READERS",
    "BaselineColumns",
    "Evaluation",
    "FileColumns",
    "Mark",
    "MarkedAnswer",
    "Measure",
    "Placed",
    "ScoreResult",
    "Scored",
    "ScoredAnswer",
    "SourceColumns",
    "TokenMarks",
    "auroc",
    "conclusions",
    "evaluate_scores",
    "label_table",
    "ranks",
    "read_marked",
    "responses",
    "score_answers",
    "table",
    "token_marks",
    "with_own_names",
]

_LOADED_LATER = {
    "documents": ("Mark", "MarkedAnswer"),
    "readers": ("READERS", "read_marked"),
    "place": ("TokenMarks", "responses", "token_marks"),
    "columns": ("BaselineColumns", "FileColumns", "SourceColumns", "with_own_names"),
    "scoring": ("Placed", "score_answers"),
    "scored": ("Scored", "ScoredAnswer"),
    "evaluation": ("Evaluation", "Measure", "ScoreResult", "evaluate_scores"),
    "told": ("conclusions", "label_table", "table"),
}


def __getattr__(name: str) -> Any:
    for module, names in _LOADED_LATER.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

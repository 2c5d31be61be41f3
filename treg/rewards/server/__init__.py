"""Annotation by a model that a serving engine has: vLLM, SGLang, or what speaks as they do.

    from treg.rewards.annotate import annotate
    from treg.rewards.server import ServedModel, ServerOptions

    options = ServerOptions(["http://localhost:8000"], "meta-llama/Llama-3.1-70B-Instruct")
    annotate(ServedModel(options, tokenizer), tokenizer, "prefs.jsonl", "annotated.parquet")

Token ids go to the server and log-probs come back. What needs the model itself, its distributions
or its weights, is refused: see `check_sources`.
"""

from treg.rewards.server.engine import ServedModel, ServedScorer
from treg.rewards.server.http import ServerError
from treg.rewards.server.options import DIALECTS, ServerOptions
from treg.rewards.server.sources import check_sources, sources_of

__all__ = [
    "DIALECTS",
    "ServedModel",
    "ServedScorer",
    "ServerError",
    "ServerOptions",
    "check_sources",
    "sources_of",
]

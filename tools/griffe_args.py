"""For the API pages: the Args of a docstring, one parameter an entry.

The code's docstrings put several parameters into a line where they belong together:

    beta: > 0, the scale. alpha: >= 0, the weight.
    bias, temperature: as in `linear_logprobs`.

The pages have a row for each: here beta, alpha, bias and temperature.
"""

import re
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import griffe

SHORT = 80  # what is said of several parameters is repeated for each, if it is no longer
SECTION = re.compile(r"^(?P<head>Args:\n)(?P<body>(?:[ ]+.*\n?|\n(?=[ ]))+)", re.MULTILINE)


class OneParameterAnEntry(griffe.Extension):
    """Called by griffe for every function and class that it reads."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring:
            names = [parameter.name for parameter in func.parameters]
            func.docstring.value = with_entries(func.docstring.value, names)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring:
            init = cls.members.get("__init__")
            names = set(cls.members)
            if isinstance(init, griffe.Function):
                names |= {parameter.name for parameter in init.parameters}
            cls.docstring.value = with_entries(cls.docstring.value, names)


def with_entries(docstring: str, names: Collection[str]) -> str:
    """The docstring with its Args rewritten; text that names none of `names` stays where it is."""

    def rewritten(found: re.Match) -> str:
        body = textwrap.dedent(found["body"])
        lines = [f"    {name}: {text}" for name, text in entries(body, names)]
        return found["head"] + "\n".join(lines) + "\n"

    return SECTION.sub(rewritten, docstring)


def entries(body: str, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of every parameter that the body of an Args section describes, in its order."""
    one = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    # at the beginning, or after the end of a sentence
    start = re.compile(
        rf"(?:^|(?<=[.;])\s+)\*{{0,2}}((?:{one})(?:,\s+(?:{one}))*):\s", re.MULTILINE
    )
    begun = re.compile(rf"^\*{{0,2}}({one})\b", re.MULTILINE)
    text = re.sub(r"\n[ ]+", " ", body)  # an entry's further lines are indented
    found = list(start.finditer(text))
    if not names or not found or not begun.match(text):
        yield from _as_they_stand(text)
        return
    for here, following in zip(found, [*found[1:], None], strict=True):
        said = text[here.end() : following.start() if following else len(text)]
        first, *others = re.split(r",\s+", here[1])
        said = " ".join(said.split())
        yield first, _literal(said)
        for name in others:
            yield name, _literal(said) if len(said) <= SHORT else f"see `{first}`"


def _literal(text: str) -> str:
    """A bound such as `> 0` at the beginning is no quotation."""
    return f"\\{text}" if text.startswith(">") else text


def _as_they_stand(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, colon, said = line.partition(": ")
        if colon:
            yield name, _literal(said)

"""Answers in whose text wrong characters stand between tags.

    {"prompt": ..., "answer": "The capital is <err type=\"fact\">Lyon</err>."}
    {"prompt": ..., "chosen": ..., "rejected": "...<err>...</err>..."}

The tags are taken out of the text; what is between them is marked, with the attribute `type` as its
label. A tag within one of these, one that is not closed or not opened, and an attribute that is not
written name="value", are refused. Tags of other names, and entities such as &lt;, are text. A tag
around nothing is left out and counted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from treg.data.answer_rows import parse_answer
from treg.data.names import ALIASES
from treg.data.report import RowProblem, described
from treg.evaluate.documents import Mark, MarkedAnswer
from treg.evaluate.readers.base import LabelOptions, Reader, RowOptions, document_of
from treg.evaluate.readers.spans import SIDES, answer_of_side, preference

ATTRIBUTE = re.compile(r"""\s+([\w:.-]+)\s*=\s*("[^"]*"|'[^']*')""")


@dataclass(frozen=True)
class TagsOptions(LabelOptions, RowOptions):
    """tags: names of the tags around wrong characters. right_tags: around right ones. attribute:
    that says the label; without it a mark has none.
    """

    tags: list[str] = field(
        default_factory=lambda: ["err"], metadata={"help": "Tags around wrong characters."}
    )
    right_tags: list[str] = field(
        default_factory=list, metadata={"help": "Tags around right characters."}
    )
    attribute: str = field(default="type", metadata={"help": "Attribute that says the label."})

    def __post_init__(self):
        super().__post_init__()
        names = [*self.tags, *self.right_tags]
        wrong = [x for x in names if not re.fullmatch(r"[\w:.-]+", x)]
        if wrong or len(set(names)) < len(names) or not names:
            raise ValueError(
                "format.tags: expected names without brackets, such as err, each once, got "
                f"{', '.join(map(repr, names)) or 'none'}"
            )

    @cached_property
    def pattern(self) -> re.Pattern:
        names = "|".join(re.escape(x) for x in (*self.tags, *self.right_tags))
        return re.compile(rf"""<(/?)({names})((?:\s(?:[^<>"']|"[^"]*"|'[^']*')*?)?)(/?)>""")


class TagsReader(Reader):
    """Tags in the text of the answers."""

    Options = TagsOptions

    def answers(self, row: Mapping[str, Any], where: str, index: int) -> list[MarkedAnswer]:
        renamed, known = self.options.renamed, (self.options.document,)
        document = document_of(row, where, self.options.document)
        if not any(renamed.get(x, x) in row for x in ALIASES["rejected"]):
            given = parse_answer(row, renamed, known)
            made = MarkedAnswer(
                where,
                document,
                given.prompt,
                given.answer,
                index=index,
                row=given.columns,
                tools=given.tools,
                template_kwargs=given.template_kwargs,
            )
            return [self._untagged(made, "answer")]
        pair, _ = preference(row, renamed, known)
        found = []
        for side in SIDES:
            made = answer_of_side(pair, side, where, document, index)
            found.append(self._untagged(made, side))
        return found

    def _untagged(self, answer: MarkedAnswer, name: str) -> MarkedAnswer:
        """An answer without its tags, and with marks instead."""
        try:
            text, found, empty = untagged(answer.answer, self.options)
        except RowProblem as problem:
            raise RowProblem(problem.reason, f"{name}: {problem.detail}") from None
        if empty:
            self.note("a mark of nothing", f"{name}: {empty} of its tags are around nothing")
        if not text.strip():
            raise RowProblem("empty answer", f"{name}: it has tags alone")
        marks, unjudged = self.options.marks(found)
        return replace(answer, answer=text, marks=marks, unjudged=unjudged)


def untagged(text: str, options: TagsOptions) -> tuple[str, list[Mark], int]:
    """A text without its tags, the marks, and how many tags were around nothing.

    Raises:
        RowProblem: tags that are not in order.
    """
    parts, marks, empty = [], [], 0
    place = length = 0
    opened: tuple[str, str, int] | None = None  # name, label, and where its text begins
    for tag in options.pattern.finditer(text):
        closing, name, attributes, alone = tag.groups()
        before = text[place : tag.start()]
        parts.append(before)
        length += len(before)
        place = tag.end()
        at = f"at character {tag.start()}, {described(text[tag.start() : tag.start() + 30])}"
        if closing:
            if opened is None or opened[0] != name:
                raise RowProblem("unopened tag", f"</{name}> closes no tag {at}")
            _, label, start = opened
            opened = None
            if start == length:
                empty += 1
            else:
                marks.append(Mark(start, length, label, wrong=name in options.tags))
            continue
        if opened is not None:
            raise RowProblem("nested tags", f"<{name}> within <{opened[0]}> {at}")
        label = _label(attributes, options.attribute, at)
        if alone:
            empty += 1
        else:
            opened = name, label, length
    if opened is not None:
        raise RowProblem("unclosed tag", f"<{opened[0]}> is not closed")
    parts.append(text[place:])
    return "".join(parts), marks, empty


def _label(attributes: str, wanted: str, at: str) -> str:
    """The value of an attribute, "" where a tag does not have it."""
    found = {name: value[1:-1] for name, value in ATTRIBUTE.findall(attributes)}
    if ATTRIBUTE.sub("", attributes).strip():
        raise RowProblem("bad tag", f'expected attributes written name="value" {at}')
    return found.get(wanted, "")

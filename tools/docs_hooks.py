"""What `mkdocs build` does to the pages of docs/ beside its plug-ins, without a network.

    ```math           a block of LaTeX becomes MathML, which browsers draw themselves
    <!-- api: NAME --> becomes the reference of every public name of a package (its `__all__`)

A page that would load anything from a network (a font, a script, a picture) ends the build.
"""

import ast
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
MATH = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
API = re.compile(r"^<!-- api: ([\w.]+) -->$", re.MULTILINE)


# what a browser loads by itself; links that a person follows are no such thing
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|link(?![^>]*rel=["']?canonical))\b[^>]*?"""
    r"""(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""",
    re.IGNORECASE,
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    markdown = MATH.sub(lambda found: formula(found[1]), markdown)
    return API.sub(lambda found: reference(found[1]), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    loaded = loads(output)
    if loaded:
        raise PluginError(f"{page.file.src_uri}: expected nothing from a network, got {loaded}")
    return output


def loads(html: str) -> list[str]:
    """The addresses outside the pages that a browser would load."""
    return LOADED.findall(html)


def formula(latex: str) -> str:
    """A block of LaTeX, one formula a paragraph, as MathML."""
    parts = [part.strip() for part in latex.split("\n\n") if part.strip()]
    return "\n".join(f'<div class="math">{convert(part, display="block")}</div>' for part in parts)


def reference(package: str) -> str:
    """One block of mkdocstrings for each public name."""
    return "\n\n".join(f"::: {package}.{name}" for name in public_names(package))


def public_names(package: str) -> list[str]:
    """`__all__` of a package, read without importing it.

    Raises:
        ValueError: the package has none.
    """
    file = ROOT.joinpath(*package.split("."), "__init__.py")
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{package}: expected a list __all__ in {file.name}, got none")

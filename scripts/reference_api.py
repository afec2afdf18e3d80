"""What a docstring says, as a section of the page on the Python API."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

HEADS = {"Args": "takes", "Attributes": "has", "Returns": "returns", "Raises": "raises"}


def api(path: str) -> str:
    """The signature and docstring of ``package.module:name``."""
    module, _, name = path.partition(":")
    found: Any = getattr(importlib.import_module(module), name)
    text = inspect.getdoc(found)
    if not text:
        raise ValueError(f"{path} has no docstring")
    body, *sections = re.split(r"(?m)^(Args|Attributes|Returns|Raises):\n", text)
    out = [f"```text\nfrom {module} import {name}\n\n{signature(name, found)}\n```", markdown(body)]
    for head, held in zip(sections[::2], sections[1::2], strict=True):
        out.append(f"*{HEADS[head]}*")
        out.append(markdown(" ".join(held.split())) if head == "Returns" else listed(inspect.cleandoc("\n" + held)))
    return "\n\n".join(part.strip() for part in out)


def listed(text: str) -> str:
    """``name: what it is`` lines, those that go on indented, as a list."""
    items: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        elif line.strip():
            name, _, about = line.partition(": ")
            items.append(f"- `{name}`: {about}")
    return markdown("\n".join(items))


def signature(name: str, found: Any) -> str:
    """A signature on one line, or one argument a line."""
    made = inspect.signature(found, eval_str=False)
    words = []
    for parameter in made.parameters.values():
        if parameter.name.startswith("_"):  # nobody's business
            continue
        if (
            parameter.kind is inspect.Parameter.KEYWORD_ONLY
            and "*" not in words
            and not dataclasses.is_dataclass(found)
        ):
            words.append("*")
        kind = "" if parameter.annotation is inspect.Parameter.empty else f": {parameter.annotation}"
        words.append(
            parameter.name
            + kind
            + ("" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}")
        )
    back = (
        ""
        if inspect.isclass(found) or made.return_annotation is inspect.Signature.empty
        else f" -> {made.return_annotation}"
    )
    line = f"{name}({', '.join(words)}){back}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(words) + f",\n){back}"


def markdown(text: str) -> str:
    """Sphinx's roles and double backticks as Markdown has them."""
    return re.sub(r":\w+:`~?\.?([^`]*)`", r"`\1`", text).replace("``", "`")

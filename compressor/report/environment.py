"""The Jinja environment of the page and the card, and how values of unknown shape become text in them."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from compressor.report import numbers
from compressor.report.sentences import members_told, row_of


def plain(value: Any) -> str:
    """A JSON value as short text: ``yes``/``no``, thousands separated, nested objects as ``key: value``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return numbers.ABSENT
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(entry) for entry in value)
    return str(value)


def yaml_text(value: Any) -> str:
    """``value`` as YAML, in its own order; what JSON cannot hold is written as text."""
    simple = json.loads(json.dumps(value, default=str))
    text: str = yaml.safe_dump(simple, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100)
    return text


def markdown(value: object) -> str:
    """One line of text, safe in a Markdown table: no markup, no HTML, no cell borders."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|<>#~])", r"\\\1", text).replace("&", "&amp;")


@functools.cache
def environment() -> Environment:
    """The Jinja environment of all templates: everything is escaped, and an unknown name is an error."""
    env = Environment(
        loader=PackageLoader("compressor.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        bytes=numbers.bytes_text,
        parameters=numbers.parameters_text,
        significant=numbers.significant,
        percent=numbers.percent,
        share=numbers.share,
        duration=numbers.duration,
        plain=plain,
        yaml=yaml_text,
        md=markdown,
    )
    env.globals.update(change=numbers.change, members_told=members_told, row_of=row_of)
    return env

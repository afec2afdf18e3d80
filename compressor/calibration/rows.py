"""A row of a data set (a JSON object, a line of a table) to the text it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from compressor.calibration.tokens import Tokenizer
from compressor.errors import UserError, nearest

Row = Mapping[str, Any]
ToText = Callable[[Row, str], str]

_SINGLE = ("text", "content", "messages", "conversations")
_PAIRS = (("prompt", "completion", ""), ("prompt", "response", "\n"), ("instruction", "output", "\n"))
_PAIRS_LATE = (("question", "answer", "\n"), ("context", "continuation", " "))


def row_reader(first: Row, field: str | None, template: str | None, tokenizer: Tokenizer, where: str) -> ToText:
    """Return the function that makes text of a row, chosen by looking at the ``first`` one.

    The column is ``field`` if given. Otherwise ``text``, ``content``, ``messages``, ``conversations``, then the pairs
    prompt + completion (joined as they are), prompt + response, instruction + output, question + answer (a newline
    between), context + continuation (a space between), then the only column with strings. The function returned takes a
    row and where it stands (for its error messages).

    Raises:
        UserError: no such column, or none that can be picked.
    """
    if template is not None:
        return lambda row, place: _from_template(template, row, place)
    if field is not None:
        if field not in first:
            raise UserError(
                f"{where}: no column {field!r}{nearest(field, map(str, first))}", fix="name a column with :field=NAME"
            )
        return lambda row, place: _from_column(row, field, tokenizer, place)
    for name in _SINGLE:
        if name in first:
            return lambda row, place: _from_column(row, name, tokenizer, place)
    for left, right, between in (*_PAIRS, *_PAIRS_LATE):
        if left in first and right in first:
            return lambda row, place: _from_pair(row, left, right, between, tokenizer, place)
    strings = [str(name) for name, value in first.items() if isinstance(value, str)]
    if len(strings) == 1:
        return lambda row, place: _from_column(row, strings[0], tokenizer, place)
    columns = ", ".join(map(str, first)) or "none"
    raise UserError(f"{where}: cannot tell which column is the text (columns: {columns})", fix="add :field=NAME")


def _value(row: Row, name: str, place: str) -> Any:
    if name not in row:
        raise UserError(f"{place}: the column {name!r} is missing", fix="name another one with :field=NAME")
    return row[name]


def _from_column(row: Row, name: str, tokenizer: Tokenizer, place: str) -> str:
    value = _value(row, name, place)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return _chat(value, name, tokenizer, place)
    raise UserError(
        f"{place}: column {name!r} holds {type(value).__name__}, expected text or chat messages",
        fix="name another one with :field=NAME",
    )


def _from_pair(row: Row, left: str, right: str, between: str, tokenizer: Tokenizer, place: str) -> str:
    values = [_value(row, left, place), _value(row, right, place)]
    if all(isinstance(value, list) for value in values):
        return _chat([*values[0], *values[1]], f"{left}+{right}", tokenizer, place)
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{place}: columns {left!r} and {right!r} must both hold text", fix="add :field=NAME")
    return between.join(values)


def _from_template(template: str, row: Row, place: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: str(_value(row, found.group(1), place)), template)


def _chat(messages: list[Any], name: str, tokenizer: Tokenizer, place: str) -> str:
    if not messages:
        return ""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{place}: column {name!r} holds chat messages, and the tokenizer has no chat template",
            fix="name a column of plain text with :field=NAME",
        )
    for turn in messages:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise UserError(f"{place}: a message of {name!r} has no 'role' and 'content'", fix="mend the file")
    try:
        return str(tokenizer.apply_chat_template([dict(turn) for turn in messages], tokenize=False))
    except Exception as error:  # a template is a program: it may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{place}: the tokenizer's chat template refuses {name!r} ({reason})",
            fix="name a column of plain text with :field=NAME",
        ) from error

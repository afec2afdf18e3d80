"""Command-line options made from settings classes, so that help, recipe schema and documentation cannot disagree."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ALSO = {"tune-steps": ("qat-steps",), "tune-mode": ("qat-mode",)}
"""Flag -> its other names."""


def option(
    name: str, info: FieldInfo, *, flag: str | None = None, about: str | None = None, note: str = "", panel: str
) -> inspect.Parameter:
    """One option for one settings field. Its default is ``None``: not given, so that the settings' own default counts.

    Args:
        flag: the flag without dashes, where it is not the field's name.
        about: what it is for; by default the field's description.
        note: added to it.
        panel: heading in the help.
    """
    annotation = _plain(info.annotation)
    flag = flag or name.replace("_", "-")
    declaration = f"--{flag}/--no-{flag}" if annotation is bool else f"--{flag}"
    also = [f"--{other}" for other in ALSO.get(flag, ())]
    default = "" if info.default in (None, ()) or info.is_required() else f" (default: {_shown(info.default)})"
    other = f" (also {', '.join(also)})" if also else ""  # the column of flags may be too narrow for two
    text = f"{about or info.description or ''}{other}{note}{default}"
    repeated = get_origin(annotation) is tuple
    kind: Any = list[get_args(annotation)[0]] if repeated else annotation  # type: ignore[misc]
    settings = typer.Option(declaration, *also, help=text, rich_help_panel=panel, show_default=False)
    annotated = Annotated[Optional[kind], settings]  # noqa: UP045  # built at run time
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotated)


def _plain(annotation: Any) -> Any:
    """What the parser is to make of a word: the type without ``None``; text where several are possible."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    if get_origin(annotation) is Literal:
        kinds = [type(value) for value in get_args(annotation)]
        return annotation if set(kinds) == {str} else str if str in kinds else int
    return annotation


def _shown(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def method_options(classes: Mapping[str, type[BaseModel]], panel: str) -> list[inspect.Parameter]:
    """Options for the union of the methods' settings; a field that only some have says which."""
    ancestry = [cls for cls in next(iter(classes.values())).__mro__ if issubclass(cls, BaseModel)]
    base = ancestry[ancestry.index(BaseModel) - 1]
    out = []
    seen: set[str] = set()
    for cls in classes.values():
        for name, info in cls.model_fields.items():
            if name in seen:
                continue
            seen.add(name)
            users = [method for method, other in classes.items() if name in other.model_fields]
            common = len(users) == len(classes)
            note = "" if common else f" ({', '.join(users)} only)"
            meanings = list(dict.fromkeys(classes[method].model_fields[name].description for method in users))
            about = None
            if len(meanings) > 1 and not common:
                about = "; ".join(f"{m}: {classes[m].model_fields[name].description}" for m in users)
                note = ""
            shared = base.model_fields[name] if common and name in base.model_fields else info
            if shared is info:
                shared = _of_all(classes[method].model_fields[name] for method in users)
            differ = [method for method in users if classes[method].model_fields[name].default != shared.default]
            for default in dict.fromkeys(classes[method].model_fields[name].default for method in differ):
                who = [method for method in differ if classes[method].model_fields[name].default == default]
                note += f" (default for {', '.join(who)}: {_shown(default)})"
            out.append(option(name, shared, about=about, note=note, panel=panel))
    return out


def _of_all(infos: Iterable[FieldInfo]) -> FieldInfo:
    """The first field; where every one of them is a choice of words, with the words of all."""
    every = list(infos)
    first = copy(every[0])
    if all(get_origin(info.annotation) is Literal for info in every):
        words = dict.fromkeys(word for info in every for word in get_args(info.annotation))
        first.annotation = Literal[tuple(words)]  # type: ignore[assignment]
    return first


def with_options(function: Callable[..., Any], options: Iterable[inspect.Parameter]) -> Callable[..., Any]:
    """Replace ``**given`` in a command's signature by explicit options; the command receives them as keywords."""
    signature = inspect.signature(function, eval_str=True)
    fixed = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = fixed + list(options)

    def command(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    command.__name__ = function.__name__.lstrip("_")
    command.__doc__ = function.__doc__
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def given(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The options of ``names`` that were really given."""
    out = {name: values[name] for name in names if values.get(name) is not None and values[name] != []}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in out.items()}

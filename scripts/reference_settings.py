"""Tables of flags, settings, methods and recipes, and the JSON schema of recipes: all from the settings classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from compressor.cli.app import app
from compressor.cli.common import CALIBRATION_FLAGS, EVALUATION_FLAGS, OUTPUT_FLAGS
from compressor.methods.published import PUBLISHED
from compressor.run.recipe import STAGES, Recipe
from compressor.run.settings import CalibrationSettings, EvaluationSettings, OutputSettings

ROOT = Path(__file__).resolve().parent.parent
SECTIONS: dict[str, tuple[type[BaseModel], dict[str, str]]] = {
    "calibration": (CalibrationSettings, CALIBRATION_FLAGS),
    "evaluation": (EvaluationSettings, EVALUATION_FLAGS),
    "output": (OutputSettings, OUTPUT_FLAGS),
}
HIDDEN = {"include", "exclude"}
"""Settings of every kind of stage, which are explained once, with the recipe."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def flags(verb: str) -> str:
    """The arguments and flags of a command, panel by panel; ``kernels build`` is a command of a command."""
    command: Any = typer.main.get_command(app)
    for word in verb.split():
        command = command.commands[word]
    panels: dict[str, list[list[str]]] = {}
    annotations = inspect.signature(command.callback, eval_str=True).parameters
    for parameter in command.params:
        positional = parameter.param_type_name == "argument"
        panel = "Arguments" if positional else parameter.rich_help_panel or "Options"
        names = [*parameter.opts, *parameter.secondary_opts]
        name = parameter.metavar or parameter.name.upper() if positional else ", ".join(f"`{n}`" for n in names)
        about = sentence(parameter.help or "")
        shown = parameter.show_default and parameter.default not in (None, False, 0, [], ()) and not positional
        if shown and "default" not in about:
            about += f" Default: `{parameter.default}`."
        kind = "" if getattr(parameter, "is_flag", False) else plain(annotations[parameter.name].annotation)
        panels.setdefault(panel, []).append([f"`{name}`" if positional else name, kind, about])
    if not panels:
        return "It takes no flags."
    return "\n\n".join(f"**{panel}**\n\n" + table(("flag", "takes", ""), rows) for panel, rows in panels.items())


def settings(kind: str, method: str = "") -> str:
    """The settings of a kind of stage that all its methods take; or those in which one method differs from these."""
    classes = STAGES[kind]
    base = common_base(classes)
    fields = {name: (info, base) for name, info in base.model_fields.items()}
    if method:
        cls = classes[method]
        fields = {name: (info, cls) for name, info in cls.model_fields.items() if differs(name, info, base)}
        if not fields:
            return "It has no settings of its own."
    rows = [
        [f"`{name}`", f"`--{name.replace('_', '-')}`", *described(info)]
        for name, (info, _) in fields.items()
        if not (method and name in HIDDEN)
    ]
    return table(("in a recipe", "flag", "takes", "default", ""), rows)


def section(name: str) -> str:
    """The settings of a section of a recipe, with their flags."""
    cls, words = SECTIONS[name]
    rows = [[f"`{field}`", f"`--{words[field]}`", *described(info)] for field, info in cls.model_fields.items()]
    return table(("in a recipe", "flag", "takes", "default", ""), rows)


def methods(kind: str) -> str:
    """The methods of a kind of stage, each with a link to its page and the first sentence of its class."""
    rows = []
    for name, cls in STAGES[kind].items():
        first = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
        needs = "yes" if needs_data(kind, name) else "no"
        rows.append([f"[`{name}`](../methods/{name}.md)", first.partition(": ")[2] or first, needs])
    return table(("`--method`", "what it does", "needs text"), rows)


def published() -> str:
    """What methods are called elsewhere, and what they are here."""
    rows = []
    for name, known in PUBLISHED.items():
        method, _, flags = known.flags.partition(" ")
        what = f"`{known.kind} --method {method}{f' {flags}' if flags else ''}`"
        rows.append([name, f"[{what}]({method}.md)", "it" if known.same else "the nearest to it"])
    return table(("published as", "here", ""), rows)


def needs_data(kind: str, name: str) -> bool:
    """Whether a method with its default settings gathers statistics."""
    return bool(STAGES[kind][name]().needs_data)


def recipes() -> str:
    """The recipes that come along."""
    found = [(path, yaml.safe_load(path.read_text(encoding="utf-8"))) for path in sorted(ROOT.glob("recipes/*.yaml"))]
    return table(
        ("name", "what it is for"), ([f"`{path.stem}`", " ".join(held["description"].split())] for path, held in found)
    )


def common_base(classes: Mapping[str, type[BaseModel]]) -> type[BaseModel]:
    """The class above all of them that is directly below pydantic's."""
    above = [cls for cls in next(iter(classes.values())).__mro__ if issubclass(cls, BaseModel)]
    return above[above.index(BaseModel) - 1]


def differs(name: str, info: FieldInfo, base: type[BaseModel]) -> bool:
    """Whether a method's field is not the one that all methods have."""
    other = base.model_fields.get(name)
    return other is None or (info.annotation, info.default, info.description) != (
        other.annotation,
        other.default,
        other.description,
    )


def described(info: FieldInfo) -> list[str]:
    """What a field takes, its default, what it means."""
    default = info.default
    shown = "" if default in (None, (), "") or info.is_required() else f"`{said(default)}`"
    return [plain(info.annotation) + limits(info), shown, sentence(info.description or "")]


def plain(annotation: Any) -> str:
    """A type in words."""
    if get_origin(annotation) is Annotated:
        return plain(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{said(value)}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, type(int | str)):
        return ", or ".join(plain(part) for part in get_args(annotation) if part is not type(None)) or "nothing"
    if get_origin(annotation) in (tuple, list):
        return f"a list of {plain(get_args(annotation)[0])}s"
    words = {int: "whole number", float: "number", str: "text", bool: "yes or no", Path: "path", type(None): "nothing"}
    return words[annotation]


def limits(info: FieldInfo) -> str:
    """The range of a number."""
    signs = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}
    found = []
    for mark in info.metadata:
        if type(mark) in signs:
            bound = next(iter(vars(mark).values())) if hasattr(mark, "__dict__") else getattr(mark, mark.__slots__[0])
            found.append(f"{signs[type(mark)]} {said(bound)}")
    return f" {' and '.join(found)}" if found else ""


def said(value: Any) -> str:
    """A value as it stands in a recipe."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def sentence(text: str) -> str:
    """A description, with names of files and placeholders kept from being Markdown or HTML."""
    text = re.sub(r"\s+", " ", text).strip()
    return text.replace("<", "&lt;").replace("*", "\\*")


def schema() -> dict[str, Any]:
    """A JSON schema of recipes, for editors."""
    stages, common = [], {}
    for kind, classes in STAGES.items():
        variants = []
        base = common_base(classes)
        common[kind] = base.model_json_schema()
        for name, cls in classes.items():
            made = cls.model_json_schema()
            override = {"type": "object", "additionalProperties": {"type": "object"}}
            alike = {
                field: {"$ref": f"#/$defs/{kind}/properties/{field}"}
                for field, info in cls.model_fields.items()
                if not differs(field, info, base)
            }
            made["properties"] = {"method": {"const": name}, **made["properties"], **alike, "overrides": override}
            made["required"] = ["method"]
            variants.append(made)
        stages.append(
            {
                "type": "object",
                "properties": {kind: {"oneOf": variants}},
                "required": [kind],
                "additionalProperties": False,
            }
        )
    whole = Recipe.model_json_schema()
    whole["properties"]["stages"] = {"type": "array", "minItems": 1, "items": {"oneOf": stages}}
    whole["$defs"] = {name: held for name, held in whole["$defs"].items() if name.endswith("tionSettings")} | common
    whole["required"] = ["stages"]
    return untitled({"$schema": "https://json-schema.org/draft/2020-12/schema", **whole})


def untitled(value: Any) -> Any:
    """A schema without the titles that pydantic makes of names."""
    if isinstance(value, dict):
        return {k: untitled(v) for k, v in value.items() if not (k == "title" and isinstance(v, str))}
    return [untitled(held) for held in value] if isinstance(value, list) else value

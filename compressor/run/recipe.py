"""Recipes: what is to be done to a model, checked to the last key before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from compressor.calibration.folders import data_folder
from compressor.errors import UserError, nearest
from compressor.methods.decompose_settings import DECOMPOSE_METHODS, DecomposeSettings
from compressor.methods.linearize_settings import LINEARIZE_METHODS, LinearizeSettings
from compressor.methods.published import known_as
from compressor.methods.quantize_settings import QUANTIZE_METHODS, QuantizeSettings
from compressor.methods.settings import PRUNE_METHODS, PruneSettings
from compressor.run.settings import CalibrationSettings, EvaluationSettings, OutputSettings

Settings = PruneSettings | QuantizeSettings | DecomposeSettings | LinearizeSettings
STAGES: dict[str, Mapping[str, type[Settings]]] = {
    "prune": PRUNE_METHODS,
    "quantize": QUANTIZE_METHODS,
    "decompose": DECOMPOSE_METHODS,
    "linearize": LINEARIZE_METHODS,
}
"""Kind of stage -> its methods' settings classes."""

PER_STAGE = (
    "include",
    "exclude",
    "allocation",
    "owl_threshold",
    "owl_band",
    "embeddings",
    "tune_steps",
    "tune_rate",
    "tune_mode",
    "preprocess",
)  # mean nothing for a single matrix

WHOLE_MODEL = (
    "keep_params",
    "target_size",
    "ranks",
    "fit",
    "dense_share",
    "weighting",
    "drift",
    "in_order",
    "joint",
    "refit",
    "rounds",
    "steps",
    "residual",
)
"""The same of decomposing stages."""

WITHOUT_ZERO = ("pb-llm", "ptq161")
"""Quantizing methods whose format cannot keep a pruned weight at zero."""


class Stage(BaseModel):
    """One transformation: a method of a kind, and its settings.

    Attributes:
        overrides: (regex, settings) for the modules whose name matches; the first match counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    kind: str
    name: str
    settings: SerializeAsAny[Settings]
    overrides: tuple[tuple[str, SerializeAsAny[Settings]], ...] = ()

    def settings_of(self, module: str) -> Settings:
        """The settings for one module."""
        return next((special for regex, special in self.overrides if re.search(regex, module)), self.settings)

    @property
    def needs_data(self) -> bool:
        """Whether calibration inputs are needed for any module."""
        every = (self.settings, *(special for _, special in self.overrides))
        return self.tuned or self.prepared or any(settings.needs_data for settings in every)

    @property
    def tuned(self) -> bool:
        """Whether the codes are learned after the blocks have been quantized."""
        return isinstance(self.settings, QuantizeSettings) and self.settings.tune_steps > 0

    @property
    def end_to_end(self) -> bool:
        """Whether those of all blocks are learned together, when the last block has been quantized."""
        return self.tuned and getattr(self.settings, "tune_mode", None) == "end-to-end"

    @property
    def prepared(self) -> bool:
        """Whether the weights of a block learn to bear quantization before they are quantized."""
        return bool(getattr(self.settings, "preprocess", 0))

    @property
    def needs_reference(self) -> bool:
        """Whether the calibration windows are also sent through the model as the stage found it."""
        if isinstance(self.settings, DecomposeSettings):
            return self.settings.needs_dense
        return self.tuned or self.prepared or getattr(self.settings, "drift", 0) > 0

    @property
    def label(self) -> str:
        """The stage in a few words."""
        return self.settings.label(self.name) + (" with overrides" if self.overrides else "")

    def label_of(self, specs: Iterable[Mapping[str, Any]]) -> str:
        """The label with what is stored in place of what was asked for.

        Args:
            specs: manifest entries of the matrices that it has coded, but for those of overrides.
        """
        if not isinstance(self.settings, QuantizeSettings):
            return self.label
        stored = {width for spec in specs for width in _widths(spec)}
        return self.settings.label(self.name, stored) + (" with overrides" if self.overrides else "")

    def content(self) -> dict[str, Any]:
        """The stage as plain data with every default filled in, in the shape of a recipe file."""
        values = {"method": self.name, **self.settings.model_dump(mode="json")}
        if self.overrides:
            base = self.settings.model_dump(mode="json")
            values["overrides"] = {
                regex: {key: value for key, value in special.model_dump(mode="json").items() if value != base[key]}
                for regex, special in self.overrides
            }
        return {self.kind: values}


def _widths(spec: Mapping[str, Any]) -> list[int]:
    """Inputs that share their scales, of a code or of the codes that it is made of; not those of a correction."""
    own = [spec["group"]] if "group" in spec else []
    return own + [width for part in ("left", "right", "base") if part in spec for width in _widths(spec[part])]


class Recipe(OutputSettings):
    """A whole run but for the model and the place of the output."""

    name: str = Field("", description="name of the recipe, for reports")
    description: str = Field("", description="what it is for")
    stages: tuple[Stage, ...] = Field(description="transformations, in order")
    calibration: CalibrationSettings = CalibrationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def needs_data(self) -> bool:
        """Whether any stage needs calibration inputs."""
        return any(stage.needs_data for stage in self.stages)

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data with every default filled in, in the shape of a recipe file."""
        content = self.model_dump(mode="json", exclude={"stages"})
        stages = [stage.content() for stage in self.stages]
        return {"name": content.pop("name"), "description": content.pop("description"), "stages": stages, **content}


def make_stage(kind: str, content: Mapping[str, Any]) -> Stage:
    """Build a stage from plain data.

    Raises:
        UserError: unknown kind, method or key (with the nearest valid one), or a value out of range.
    """
    if kind not in STAGES:
        raise UserError(f"unknown stage {kind!r}{nearest(kind, STAGES)}")
    settings = dict(content)
    name, special = settings.pop("method", None), settings.pop("overrides", {})
    methods = STAGES[kind]
    if name is None:
        raise UserError(f"a {kind} stage needs a method (known: {', '.join(methods)})", fix="--method NAME")
    if not isinstance(name, str) or name not in methods:
        hint = known_as(str(name), kind, {verb: list(known) for verb, known in STAGES.items()})
        raise UserError(f"unknown {kind} method {name!r}{hint or nearest(str(name), methods)}", fix="see --method")
    model, where = methods[name], f"{kind} {name}"
    return Stage(
        kind=kind,
        name=name,
        settings=validated(model, settings, where),
        overrides=_overrides(model, settings, special, where),
    )


def _overrides(
    model: type[Settings], settings: Mapping[str, Any], special: Any, where: str
) -> tuple[tuple[str, Settings], ...]:
    """The settings of the modules that differ: those of the stage, and on top of them what the override gives."""
    if not isinstance(special, Mapping) or not all(isinstance(given, Mapping) for given in special.values()):
        raise UserError(f"{where}: overrides should look like 'overrides: {{down_proj: {{bits: 8}}}}'")
    found = []
    for regex, given in special.items():
        try:
            re.compile(str(regex))
        except re.error as error:
            raise UserError(f"{where}: override {regex!r} is not a regular expression: {error}") from error
        if issubclass(model, LinearizeSettings):
            raise UserError(
                f"{where}: layers are linearized alike; overrides mean nothing here", fix="keep_layers: [..]"
            )
        whole = PER_STAGE + (WHOLE_MODEL if issubclass(model, DecomposeSettings) else ())
        if misplaced := [key for key in given if key in whole]:
            raise UserError(f"{where}: {misplaced[0]!r} belongs to the whole stage, not to override {regex!r}")
        found.append((str(regex), validated(model, {**settings, **given}, f"{where}, override {regex!r}")))
    return tuple(found)


def validated(model: type[BaseModel], content: Mapping[str, Any], where: str) -> Any:
    """Validate plain data, turning pydantic's complaints into one line with the nearest valid key."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {complaint(error, model)}") from error


def complaint(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first thing wrong."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {path!r}{nearest(str(first['loc'][-1]), _keys(model, first['loc'][:-1]))}"
    message, given = first["msg"].removeprefix("Value error, "), first["input"]
    if path and message.startswith(f"{path} {given!r} "):  # it names both already
        return message
    percent = first["type"] == "less_than" and first["ctx"]["lt"] == 1 and 1 < given <= 100
    hint = f"; {given:g} % is {given / 100:g}" if percent else ""
    return f"{path}: {message} (got {given!r}{hint})" if path else message


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)


def make_recipe(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Build a recipe from plain data and check its chain.

    Args:
        content: what a recipe file holds; ``stages`` is the one key that it needs.
        where: how a refusal calls it.

    Raises:
        UserError: names the key, the nearest valid one, or the rule that the chain breaks.
    """
    content = dict(content)
    listed = content.pop("stages", None)
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{where}: expected 'stages', a list of transformations", fix="see recipes/ for examples")
    stages = []
    for number, entry in enumerate(listed, 1):
        if not isinstance(entry, Mapping) or len(entry) != 1 or not isinstance(next(iter(entry.values())), Mapping):
            raise UserError(f"{where}: stage {number} should look like '- prune: {{method: sparsegpt, sparsity: 0.5}}'")
        kind, settings = next(iter(entry.items()))
        stages.append(make_stage(str(kind), settings))
    unknown = [key for key in content if key not in Recipe.model_fields]
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}{nearest(str(unknown[0]), Recipe.model_fields)}")
    recipe: Recipe = validated(Recipe, {**content, "stages": tuple(stages)}, where)
    check_chain(recipe.stages)
    return recipe


def check_chain(stages: tuple[Stage, ...]) -> None:
    """Refuse chains that cannot work, with the reason.

    Raises:
        UserError: names the stage and the rule.
    """
    if len(stages) > 1 and (alone := next((s for s in stages if s.name == "transact" or s.kind == "linearize"), None)):
        raise UserError(
            f"{alone.label} changes the architecture of the model and must be the only stage",
            fix="run the others as commands of their own, before or on its output",
        )
    if len(stages) > 1 and (alone := next((stage for stage in stages if stage.end_to_end), None)):
        raise UserError(
            f"{alone.label} learns against the model that the run was given, and must be the only stage",
            fix="run the others as commands of their own before it, or --tune-mode block",
        )
    for number, (earlier, later) in enumerate(pairwise(stages), 2):
        if earlier.kind == "quantize" or getattr(earlier.settings, "bits", None) is not None:
            raise UserError(
                f"stage {number} ({later.kind}) cannot follow {earlier.label}: its codes are final",
                fix="prune first, quantize last",
            )
        if earlier.kind == "decompose":
            _check_after_factors(number, earlier, later, pruned=any(stage.kind == "prune" for stage in stages))
            continue
        if getattr(later.settings, "correct", 0):
            raise UserError(
                f"stage {number} corrects its codes after {earlier.label}: a sum cannot say zero",
                fix="leave --correct out, or do not prune",
            )
        if later.name in WITHOUT_ZERO:
            raise UserError(
                f"stage {number} ({later.name}) cannot follow {earlier.label}: a sign cannot say zero",
                fix="leave one of the two out, or quantize by gptq or trit-planes",
            )
        if not isinstance(later.settings, PruneSettings) or not isinstance(earlier.settings, PruneSettings):
            continue
        if later.settings.allocation == "owl":
            raise UserError(
                f"stage {number}: allocation owl looks at the whole model before it begins, so it must come first",
                fix="run this stage as a command of its own on the output of the others",
            )
        before, after = earlier.settings.share, later.settings.share
        if after <= before and not (earlier.settings.pattern is None and later.settings.pattern):
            raise UserError(
                f"stage {number} asks for sparsity {after:g}, stage {number - 1} already leaves {before:g}",
                fix="sparsities along a chain must rise",
            )


def _check_after_factors(number: int, earlier: Stage, later: Stage, *, pruned: bool) -> None:
    """Refuse what cannot be done to the factors of a decomposed matrix, or to those that stay whole."""
    if getattr(earlier.settings, "residual", False):
        raise UserError(
            f"stage {number} ({later.kind}) cannot follow {earlier.label}: its products are for fine-tuning",
            fix="split them off with compressor adapter, and go on with what is left",
        )
    if later.kind != "quantize":
        raise UserError(
            f"stage {number} ({later.kind}) cannot follow {earlier.label}: products cannot be {later.kind}d again",
            fix="prune first, then decompose, then quantize",
        )
    if getattr(earlier.settings, "factor_bits", 16) != 16:
        raise UserError(
            f"stage {number} cannot quantize after {earlier.label}: its factors are integers already",
            fix="leave --factor-bits out of the decomposition",
        )
    settings = later.settings
    assert isinstance(settings, QuantizeSettings)  # the only kind left
    if getattr(earlier.settings, "joint", False):
        raise UserError(
            f"stage {number} cannot quantize after {earlier.label}: factors are shared", fix="leave --joint out"
        )
    if why := not_for_factors(later):
        raise UserError(f"stage {number} cannot follow {earlier.label}: {why}", fix="--method gptq, without extras")
    if pruned and later.name in WITHOUT_ZERO:
        raise UserError(
            f"stage {number} ({later.name}) cannot follow pruning: matrices that stay whole keep their zeros",
            fix="leave one of the two out, or quantize by gptq or trit-planes",
        )


def not_for_factors(stage: Stage) -> str | None:
    """Why a quantizing stage cannot work on the factors of a decomposed matrix; None when it can."""
    if getattr(stage.settings, "correct", False):
        return "a product needs no correction by another"
    if stage.tuned or stage.prepared:
        return "learning does not reach into the factors of a product"
    return None


def load_recipe(path: str) -> Recipe:
    """Load a recipe file, or one of the ready ones by its name.

    Args:
        path: of a YAML file, or the name of a ready recipe, such as ``sparsegpt-50``.

    Raises:
        UserError: no such file or name, no valid YAML, or anything :func:`make_recipe` refuses.
    """
    file = Path(path)
    if not file.exists() and file.suffix not in (".yaml", ".yml"):
        ready = {p.stem: p for p in data_folder("recipes").glob("*.yaml")}
        if path not in ready:
            raise UserError(f"no recipe {path!r}{nearest(path, ready)}", fix="give a YAML file or a ready recipe")
        file = ready[path]
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {error}", fix="give a YAML file or a ready recipe") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} should hold a mapping with 'stages'", fix="see recipes/ for examples")
    return make_recipe(content, file.name)

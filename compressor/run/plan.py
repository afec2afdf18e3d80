"""What a run would do, from config, headers and recipe alone: what is touched, bytes, memory, disk, broken rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, get_args

import torch

from compressor.engine.checkpoint import Checkpoint
from compressor.engine.forward import batch_tokens
from compressor.engine.output import ONE_FILE, container_bytes
from compressor.engine.skeleton import Linear, Skeleton
from compressor.engine.tensorfile import Layout
from compressor.errors import UserError
from compressor.formats import tensor_name
from compressor.formats.registry import format_of
from compressor.hf.native import caveats
from compressor.methods.decompose_settings import SvdLlmSettings
from compressor.methods.linearize_settings import LinearizeSettings
from compressor.run.container import Container, container_of
from compressor.run.embeddings import embedding_violations, foreseen_specs
from compressor.run.foresee import foreseen_spec, learned_bytes, other_groups, violations
from compressor.run.linear_plan import linear_layouts, linear_stage, linear_violations, logits_bytes, training_bytes
from compressor.run.linear_target import target_of
from compressor.run.longer import Longer, foresee_longer, longer_violations
from compressor.run.narrow_plan import Narrowing, foresee_narrow
from compressor.run.planes import foreseen_planes, too_few_bits
from compressor.run.ranks import SURVEYED_TOKENS, plain_ranks, too_large, too_small
from compressor.run.recipe import Recipe, Stage
from compressor.run.settings import OutputSettings
from compressor.run.task_plan import ForeseenTask

PROCESS_BYTES = 600_000_000  # interpreter, torch, transformers: resident before the first tensor
DEFAULT_SEQLEN = 2048


@dataclass(frozen=True)
class Plan:
    """The run as foreseen.

    Attributes:
        device, dtype: where and in which precision it computes.
        seqlen, eval_seqlen: tokens in a calibration and in an evaluation window.
        targets: for each stage, the linears it touches.
        specs: predicted manifest entries of the packed linears.
        narrowing: what the model becomes where it gets other shapes; None where it keeps them.
        layouts: predicted contents of every output shard, the outer tensors first.
        violations: rules that the recipe breaks on this model; a run is refused.
        notes: where less is done than was asked for; a run says so as well.
        longer: third stage of linearization, on longer windows; None without one.
        tasks: what result and source will be asked at the end.
    """

    skeleton: Skeleton
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    seqlen: int
    eval_seqlen: int
    targets: tuple[tuple[Linear, ...], ...]
    specs: dict[str, dict[str, Any]]
    layouts: list[Layout]
    narrowing: Narrowing | None
    violations: tuple[str, ...]
    notes: tuple[str, ...] = ()
    longer: Longer | None = None
    tasks: tuple[ForeseenTask, ...] = ()

    @property
    def container(self) -> Container:
        """What kind of folder will be written."""
        if linearizing := linear_stage(self.recipe.stages):
            return target_of(linearizing, self.skeleton).container
        return container_of(self.skeleton, self.specs)

    @property
    def outer_specs(self) -> dict[str, dict[str, Any]]:
        """Those of them that lie outside the blocks."""
        linears = {linear.name for linear in self.skeleton.linears}
        return {name: spec for name, spec in self.specs.items() if name not in linears}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(prod(shape) * dtype.itemsize for layout in self.layouts for dtype, shape in layout.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of the output's weight files, headers included."""
        return self.tensor_bytes + container_bytes(self.layouts)

    @property
    def state_bytes(self) -> int:
        """Bytes of all hidden states that travel through the blocks."""
        width = self.skeleton.config.get_text_config().hidden_size * self.dtype.itemsize
        streams = sum(stage.needs_data + stage.needs_reference for stage in self.recipe.stages)
        calibration = self.recipe.calibration.nsamples * self.seqlen * streams
        evaluation = self.recipe.evaluation
        tracks = 0 if evaluation.texts == ("none",) else 2 + evaluation.baseline
        return int(width) * (
            calibration + tracks * max(1, len(evaluation.texts)) * evaluation.windows * self.eval_seqlen
        )

    @property
    def memory_bytes(self) -> int:
        """Estimated peak of the process: embeddings, up to three copies of a block, states, Hessians of one block."""
        itemsize = self.dtype.itemsize
        outer = sum(prod(self.skeleton.stored(name)[1]) for name in self.skeleton.outer_tensors()) * itemsize
        blocks = range(len(self.skeleton.block_names))
        coded = sum(prod(spec["shape"]) for spec in self.outer_specs.values()) * itemsize
        block = max(sum(prod(self.skeleton.stored(n)[1]) for n in self.skeleton.block_tensors(b)) for b in blocks)
        hessians = max(_hessian_bytes([x for x in self.skeleton.linears if x.block == b]) for b in blocks)
        if any(isinstance(s.settings, SvdLlmSettings) and s.settings.surveyed for s in self.recipe.stages):
            hessians = max(_moment_bytes([x for x in self.skeleton.linears if x.block == b]) for b in blocks)
        widest = max(max(linear.shape) for linear in self.skeleton.linears)
        stored = self.longer if self.longer and self.logits_bytes else None  # then long windows pass the dense model
        lengths = (batch_tokens(self.device), self.seqlen, self.eval_seqlen, stored.seqlen if stored else 0)
        activations = 6 * max(lengths) * widest * itemsize
        largest = max(prod(linear.shape) for linear in self.skeleton.linears)
        solver = 6 * 4 * largest if self.recipe.stages else 0
        data = hessians if self.recipe.needs_data else 0
        total: int = PROCESS_BYTES + outer + coded + block * (itemsize + 4) + data + activations + solver
        training = training_bytes(self.recipe.stages, self.skeleton)
        width = self.skeleton.config.get_text_config().hidden_size * itemsize
        states = self.state_bytes + (stored.windows * stored.seqlen * width if stored else 0)
        return max(total + states + self.learned_bytes[0], PROCESS_BYTES + training)

    @property
    def learned_bytes(self) -> tuple[int, int]:
        """What learning end to end takes in memory and on disk."""
        found = list(map(learned_bytes, self.recipe.stages, self.targets))
        return sum(memory for memory, _ in found), sum(disk for _, disk in found)

    @property
    def logits_bytes(self) -> int:
        """Bytes that predictions of the dense model take on disk, to be learned from; 0 where they are not kept."""
        tokens = self.recipe.calibration.nsamples * self.seqlen
        tokens += self.longer.windows * self.longer.seqlen if self.longer else 0
        return logits_bytes(self.recipe.stages, self.skeleton, tokens)

    @property
    def disk_bytes(self) -> int:
        """Bytes needed on disk while running: the output twice where shards are joined, and the states twice."""
        joined = 2 if self.tensor_bytes <= ONE_FILE else 1
        surveyed = max(map(self._survey_bytes, self.recipe.stages, self.targets), default=0)
        learned = self.learned_bytes[1]
        learned += self.output_bytes if learned else 0  # the codes it starts at
        stored = surveyed + learned + self.logits_bytes
        return joined * self.output_bytes + 2 * self.state_bytes + stored + 50_000_000

    def _survey_bytes(self, stage: Stage, linears: tuple[Linear, ...]) -> int:
        """What choosing ranks by the loss puts on disk: components, costs, moments, and the states of all blocks."""
        settings = stage.settings
        if not isinstance(settings, SvdLlmSettings) or not settings.surveyed:
            return 0
        values = sum(min(x.shape) * (sum(x.shape) + min(x.shape)) + x.shape[1] ** 2 for x in linears)
        width = self.skeleton.config.get_text_config().hidden_size
        tokens = min(SURVEYED_TOKENS, self.recipe.calibration.nsamples * self.seqlen)
        return int(4 * values + tokens * width * self.dtype.itemsize * len(self.skeleton.block_names))

    def refuse(self) -> None:
        """Raise the first violation.

        Raises:
            UserError: see ``violations``.
        """
        if self.violations:
            more = f" (and {len(self.violations) - 1} more; --dry-run lists them)" if len(self.violations) > 1 else ""
            raise UserError(self.violations[0] + more)


def _hessian_bytes(linears: list[Linear]) -> int:
    """Bytes of the Hessians of one block, with q,k,v and gate,up sharing theirs, and of one factor."""
    groups = {(re.sub(r"(gate|up|q|k|v)_proj$", "", linear.name), linear.shape[1]) for linear in linears}
    sizes = [4 * n * n for _, n in groups]
    return sum(sizes) + 2 * max(sizes, default=0)


def _moment_bytes(linears: list[Linear]) -> int:
    """Bytes of the second moments of all inputs and of the gradients of all outputs of one block."""
    return sum(4 * (m * m + n * n) for m, n in (linear.shape for linear in linears))


def choose_device(name: str) -> torch.device:
    """Resolve ``auto``, and refuse a device that is not there.

    Raises:
        UserError: unknown or absent device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} is not available here", fix="--device cpu") from error
    return device


def choose_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Resolve ``auto``: float32 on CPUs (half precision is slow and coarse there), the checkpoint's own elsewhere.

    Raises:
        UserError: unknown name.
    """
    known = get_args(OutputSettings.model_fields["dtype"].annotation)
    if name not in known:
        raise UserError(f"unknown dtype {name!r} (known: {', '.join(known)})", fix="--dtype auto")
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.float32 if device.type == "cpu" else stored


def context_length(config: Any) -> int | None:
    """Longest context the configuration speaks of, or ``None``."""
    text = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(value := getattr(text, key, None), int) and value > 0:
            return value
    return None


def choose_seqlen(asked: int | None, config: Any, flag: str) -> int:
    """Resolve a window length against the model's context.

    Raises:
        UserError: the model's context is shorter than what was asked for.
    """
    context = context_length(config)
    if asked is None:
        return min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
    if context is not None and asked > context:
        raise UserError(
            f"windows of {asked} tokens do not fit the model's context of {context}", fix=f"{flag} {context}"
        )
    return asked


def selects(settings: Any, name: str) -> bool:
    """Whether include/exclude patterns let a module through; they are searched anywhere in its name."""
    included = not settings.include or any(re.search(pattern, name) for pattern in settings.include)
    return included and not any(re.search(pattern, name) for pattern in settings.exclude)


def make_plan(checkpoint: Checkpoint, skeleton: Skeleton, recipe: Recipe) -> Plan:
    """Foresee a run.

    Raises:
        UserError: a device that is not there, windows too long, or filters that leave nothing to do.
    """
    device = choose_device(recipe.device)
    stored = skeleton.linears[0].dtype
    targets = tuple(_targets(stage, number, skeleton) for number, stage in enumerate(recipe.stages, 1))
    specs: dict[str, dict[str, Any]] = {}
    broken: list[str] = []
    notes: list[str] = []
    shared = {module: spec["shared"] for module, spec in skeleton.packed.items() if "shared" in spec}
    for asked, linears in zip(recipe.stages, targets, strict=True):
        broken += too_few_bits(asked, linears)
        ranks: dict[str, int | None] = {}
        if asked.name == "transact" or asked.kind == "linearize":
            continue
        if asked.kind == "decompose":
            small = too_small(asked, linears, skeleton)
            broken += small
            ranks = plain_ranks(asked, linears, skeleton) if not small else ranks
            against, told = too_large(asked, ranks, linears) if ranks else ([], [])
            broken += against
            notes += told
        stage = foreseen_planes(asked, linears)
        for linear in linears:
            packed = skeleton.packed.get(linear.name)
            if linear.name in shared or linear.name in shared.values():
                broken.append(f"{linear.name} shares a factor with others and cannot be changed; start from its source")
            broken += violations(stage, linear, packed, first=asked is recipe.stages[0])
            entry = foreseen_spec(stage, linear, specs.get(linear.name, packed), ranks.get(linear.name))
            if asked.kind != "decompose" or entry["format"] != "dense":
                specs[linear.name] = entry
        notes += other_groups(stage, linears, specs)
    specs |= foreseen_specs(skeleton, recipe)
    narrowing = None
    try:
        narrowing = foresee_narrow(recipe.stages, skeleton)
    except UserError as error:
        broken.append(str(error))
    broken += embedding_violations(skeleton, recipe)
    if recipe.save == "packed":
        specs = {**{name: dict(spec) for name, spec in skeleton.packed.items()}, **specs}
    seqlen = choose_seqlen(recipe.calibration.seqlen, skeleton.config, "--seqlen")
    longer = None
    if (linearizing := linear_stage(recipe.stages)) and isinstance(linearizing.settings, LinearizeSettings):
        broken += linear_violations(linearizing, skeleton, seqlen)
        notes += caveats(linearizing.name)
        context, settings = context_length(skeleton.config), linearizing.settings
        longer = foresee_longer(settings, seqlen, recipe.calibration.nsamples, context)
        broken += longer_violations(settings, longer, seqlen, context, checkpoint.folder.name)
    eval_seqlen = recipe.evaluation.seqlen or recipe.calibration.seqlen
    return Plan(
        skeleton=skeleton,
        recipe=recipe,
        device=device,
        dtype=choose_dtype(recipe.dtype, device, stored),
        seqlen=seqlen,
        eval_seqlen=choose_seqlen(eval_seqlen, skeleton.config, "--eval-seqlen"),
        targets=targets,
        specs=specs if recipe.save == "packed" else {},
        layouts=predict_layouts(skeleton, recipe, specs, narrowing),
        narrowing=narrowing,
        violations=tuple(dict.fromkeys(broken)),
        notes=tuple(dict.fromkeys(notes)),
        longer=longer,
    )


def _targets(stage: Stage, number: int, skeleton: Skeleton) -> tuple[Linear, ...]:
    if stage.kind == "linearize":
        return ()
    chosen = tuple(linear for linear in skeleton.linears if selects(stage.settings, linear.name))
    if not chosen:
        example = skeleton.linears[0].name
        raise UserError(
            f"stage {number}: --include/--exclude leave none of the {len(skeleton.linears)} linears "
            f"(such as {example})",
            fix="mend the regular expressions",
        )
    return chosen


def predict_layouts(
    skeleton: Skeleton, recipe: Recipe, specs: dict[str, dict[str, Any]], narrowing: Narrowing | None
) -> list[Layout]:
    """Contents of every output shard: the outer tensors, then block by block."""
    if recipe.save == "dense" and narrowing is None:
        return dense_layouts(skeleton)
    if (foreseen := linear_layouts(recipe.stages, skeleton)) is not None:
        return foreseen
    layouts = [outer_layout(skeleton, lambda name: name, specs)]
    for block in range(len(skeleton.block_names)):
        layout: Layout = {}
        for name in skeleton.block_tensors(block):
            layout |= _stored_as(skeleton, name, specs, str)
            if narrowing is not None and name in narrowing.shapes:
                layout[name] = (skeleton.stored(name)[0], narrowing.shapes[name])
        layouts.append(layout)
    return layouts


def _stored_as(
    skeleton: Skeleton, name: str, specs: Mapping[str, Mapping[str, Any]], rename: Callable[[str], str]
) -> Layout:
    """The tensors in which a module tensor is stored: its parts where it is packed."""
    spec = specs.get(module := name.removesuffix(".weight"))
    if spec is None:
        return {rename(name): skeleton.stored(name)}
    return {tensor_name(module, part): (dtype, shape) for part, (shape, dtype) in format_of(spec).layout(spec).items()}


def outer_layout(
    skeleton: Skeleton, rename: Callable[[str], str], specs: Mapping[str, Mapping[str, Any]] | None = None
) -> Layout:
    """Contents of the shard with everything outside the blocks, tensors carried over included."""
    layout: Layout = {}
    for name in skeleton.outer_tensors():
        layout |= _stored_as(skeleton, name, specs or {}, rename)
    for name in skeleton.extra:
        entry = skeleton.checkpoint.tensors[name]
        layout[name] = (entry.dtype, entry.shape)
    return layout


def dense_layouts(skeleton: Skeleton) -> list[Layout]:
    """Contents of the shards of a plain checkpoint, under the names and shapes of the source."""
    layouts = [outer_layout(skeleton, skeleton.source_name)]
    for block in range(len(skeleton.block_names)):
        layout: Layout = {}
        for name in skeleton.block_tensors(block):
            layout[skeleton.source_name(name)] = skeleton.source_layout(name)
        layouts.append(layout)
    return layouts

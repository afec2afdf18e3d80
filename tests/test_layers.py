"""The layers of docs/design.md, section 1: who may import whom, no cycles, no file that is too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "compressor"
LONGEST = 400  # lines of a file

# layer -> what it may import, beside itself and errors
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "formats": set(),
    "mixers": set(),
    "kernels": {"formats"},
    "methods": {"formats", "mixers"},
    "hf": {"kernels", "formats", "mixers"},
    "calibration": set(),
    "engine": {"methods", "formats", "mixers", "hf"},
    "report": {"engine", "formats"},
    "run": {"report", "calibration", "engine", "hf", "kernels", "methods", "mixers", "formats"},
    "cli": {"run", "report", "calibration", "engine", "hf", "kernels", "methods", "formats"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def layer(module: str) -> str:
    """``compressor.run.plan`` is in layer ``run``; ``compressor`` itself is the package's front door, ``""``."""
    return module.partition(".")[2].partition(".")[0]


def imports(path: Path, *, deferred: bool) -> Iterator[str]:
    """Modules of ours that a file imports; those inside functions only when ``deferred``; for type checkers never."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child)
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not deferred:
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (name for name in visit(tree) if name.split(".")[0] == "compressor")


def test_the_table_names_every_layer() -> None:
    assert {layer(module) for module in MODULES} - {""} == ALLOWED.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_above_it(module: str) -> None:
    own = layer(module)
    allowed = {"hf", "kernels"} if not own else ALLOWED[own] | {own, "errors"}
    for name in imports(MODULES[module], deferred=True):
        assert name in MODULES, f"{module} imports {name}, which does not exist"
        if name != "compressor":  # its version
            assert layer(name) in allowed, f"{module} imports {name}"


def test_there_are_no_import_cycles() -> None:
    """At import time. The front door imports what teaches transformers; who asks it for the version is no cycle."""
    graph = {
        module: {name for name in imports(path, deferred=False) if name not in ("compressor", module)}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                walk(name, [*trail, module])
            done.add(module)

    for module in graph:
        walk(module, [])


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{module} has {lines} lines"


def test_formats_and_methods_need_torch_and_little_else() -> None:
    """The formats travel with every output: they may need nothing that is not there anyway."""
    for path in [*(ROOT / "formats").glob("*.py"), *(ROOT / "mixers").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
                for name in names:
                    top = name.split(".")[0]
                    assert top in {"__future__", "collections", "dataclasses", "functools", "itertools", "math",
                                   "torch", "typing", "compressor"}, f"{path.name} imports {name}"  # fmt: skip

"""llama.cpp, asked through ``llama_cpp.mjs``, and models and texts to ask it about."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from foreign import absent

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHARED = ROOT.parent / "shared"
EMBEDDED = ROOT / "compressor" / "embedded"
HOME = "COMPRESSOR_LLAMA_CPP"
"""Environment variable: the ``node_modules`` that hold node-llama-cpp."""


def need_llama_cpp() -> None:
    """node and node-llama-cpp must be there for this test."""
    if not os.environ.get(HOME) or not Path(os.environ[HOME], "node-llama-cpp").is_dir() or not shutil.which("node"):
        absent("node-llama-cpp")


def ask(model: Path, folder: Path, **question: Any) -> dict[str, Any]:
    """Load a GGUF file in llama.cpp and ask; see ``llama_cpp.mjs`` for questions and answers."""
    asked = {"model": str(model), "answer": str(folder / "answer.json"), **question}
    done = subprocess.run(
        ["node", str(HERE / "llama_cpp.mjs")], input=json.dumps(asked), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "answer.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def model_folder(name: str) -> Path:
    """The embedded model, or one of the real ones that lie beside the checkout where there are some."""
    if name == "embedded":
        return EMBEDDED
    folder = SHARED / "models" / name
    if not folder.is_dir():
        absent(f"the model {name}")
    return folder


def heldout(name: str, characters: int) -> str:
    """A text that no model has been calibrated on, of the kind that it knows."""
    embedded = ROOT / "calibration" / "embedded-heldout.jsonl"
    file = embedded if name == "embedded" else SHARED / "text" / "heldout" / "stories.jsonl"
    texts, size = [], 0
    for line in file.read_text(encoding="utf-8").splitlines():
        if size >= characters:
            break
        texts.append(json.loads(line)["text"])
        size += len(texts[-1])
    return "\n".join(texts)[:characters]

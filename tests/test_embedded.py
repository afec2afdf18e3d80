"""The embedded texts and the embedded model: reproducible, disjoint, well-formed, and sensitive to compression."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "compressor" / "embedded"
FILES = ("embedded.jsonl", "embedded-heldout.jsonl", "embedded-arithmetic-heldout.jsonl")

# bf16 weights computed in fp32, non-overlapping windows of 256 tokens, no BOS (as in compressor/embedded/README.md)
HELDOUT_PERPLEXITY = 2.175
ARITHMETIC_PERPLEXITY = 2.247


def texts_of(name: str) -> list[str]:
    lines = (ROOT / "calibration" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import make_embedded_text  # type: ignore[import-not-found, unused-ignore]

        yield make_embedded_text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = load_file(MODEL / "model.safetensors")
    return loaded


@pytest.fixture(scope="module")
def heldout_ids(tokenizer: Any) -> Callable[[str], Tensor]:
    def ids(name: str) -> Tensor:
        stream = [token for text in texts_of(name) for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        return torch.tensor(stream[: len(stream) // 256 * 256]).view(-1, 256)

    return ids


def load_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def decoder_linears(model: Any) -> list[torch.nn.Linear]:
    return [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, limit: int = 96) -> float:
    nats = [float(model(row[None], labels=row[None]).loss) for row in ids[:limit]]
    return math.exp(sum(nats) / len(nats))


@torch.no_grad()
def prune(weight: Tensor, fraction: float) -> None:
    """Zero this fraction of the matrix, the smallest magnitudes."""
    cut = weight.abs().flatten().kthvalue(int(weight.numel() * fraction)).values
    weight[weight.abs() <= cut] = 0


@torch.no_grad()
def round_three_bits(weight: Tensor) -> None:
    """Round every row to eight levels between its smallest and its largest value."""
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    step = (high - low) / 7
    weight.copy_(((weight - low) / step).round() * step + low)


@pytest.mark.parametrize("name", FILES)
def test_files_parse_and_hold_documents_of_varied_length(name: str) -> None:
    lines = (ROOT / "calibration" / name).read_bytes().split(b"\n")
    assert lines[-1] == b""  # ends with a newline, and no carriage returns:
    assert not any(b"\r" in line for line in lines)
    assert all(set(json.loads(line)) == {"text"} for line in lines[:-1])
    lengths = sorted(len(text) for text in texts_of(name))
    assert lengths[0] > 0
    assert lengths[-1] > 4 * lengths[len(lengths) // 4]


def test_no_heldout_document_is_calibrated_on() -> None:
    sizes = [len(texts_of(name)) for name in FILES]
    assert sizes[0] >= 1000
    assert min(sizes[1:]) >= 200
    assert len({text for name in FILES for text in texts_of(name)}) == sum(sizes)


def test_script_makes_the_committed_bytes(script: Any) -> None:
    made = dict(script.files(script.make_world(script.SEED)))
    assert set(made) == set(FILES)
    for name, texts in made.items():
        assert script.jsonl(texts).encode() == (ROOT / "calibration" / name).read_bytes(), name


def test_another_seed_makes_another_world(script: Any) -> None:
    world, other = script.make_world(script.SEED), script.make_world(script.SEED + 1)
    assert world != other
    assert script.document(world, "x", 0) == script.document(script.make_world(script.SEED), "x", 0)
    assert script.document(world, "x", 0) != script.document(other, "x", 0)


def test_every_result_in_the_arithmetic_is_right() -> None:
    checked = 0
    for text in texts_of("embedded-arithmetic-heldout.jsonl"):
        for line in text.splitlines():
            sides = line.split(" = ")
            if len(sides) < 2 or any(set(side) - set("0123456789 +-*") for side in sides):
                continue
            assert len({eval(side) for side in sides}) == 1, line
            checked += 1
    assert checked > 500


def test_code_documents_run(script: Any) -> None:
    world = script.make_world(script.SEED)
    ran = 0
    for number in range(400):
        text = script.document(world, "code-test", number, ((script.code, 1.0),))
        source = f"class Thing: pass\n{text}"
        exec(compile(source, "document", "exec"), {"print": lambda *values: None})
        ran += "assert" in text
    assert ran > 200


def test_tokenizer_adds_nothing_and_gives_every_text_back(tokenizer: Any) -> None:
    assert len(tokenizer) == 1024
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    odd = ("", " a", "a  b\n\n\tc ", "Größe 漢字 🎉 \x00", "12345 + 1 = 12346", "don't . stop , now")
    for text in (*odd, *texts_of(FILES[0])[:20]):
        ids = tokenizer(text)["input_ids"]
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer("7" * 9)["input_ids"] == tokenizer("7")["input_ids"] * 9  # digits stand alone


def test_checkpoint_is_tied_grouped_and_finite(weights: dict[str, Tensor]) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert "lm_head.weight" not in weights
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16, name
        assert bool(tensor.isfinite().all()), name
        assert all(size % 128 == 0 for size in tensor.shape), name
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 4e6


def test_held_out_perplexity_is_as_recorded(heldout_ids: Callable[[str], Tensor]) -> None:
    model = load_model()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert perplexity(model, heldout_ids(FILES[1])) == pytest.approx(HELDOUT_PERPLEXITY, rel=5e-3)
    assert perplexity(model, heldout_ids(FILES[2])) == pytest.approx(ARITHMETIC_PERPLEXITY, rel=5e-3)


@pytest.mark.parametrize(
    ("damage", "factor"),
    [(partial(prune, fraction=0.5), 1.15), (partial(prune, fraction=0.7), 3.0), (round_three_bits, 1.08)],
    ids=["magnitude 50 %", "magnitude 70 %", "3 bits"],
)
def test_model_feels_compression(
    damage: Callable[[Tensor], None], factor: float, heldout_ids: Callable[[str], Tensor]
) -> None:
    """A model that forgives everything could not tell a good method from a bad one."""
    model = load_model()
    ids = heldout_ids(FILES[1])
    before = perplexity(model, ids, limit=40)
    for linear in decoder_linears(model):
        damage(linear.weight)
    assert perplexity(model, ids, limit=40) > factor * before


def test_generates_the_grammar_of_its_world(tokenizer: Any) -> None:
    prompt = tokenizer("One day there was", return_tensors="pt")
    out = load_model().generate(**prompt, do_sample=False, max_new_tokens=40)
    told = re.match(r"One day there was an? (\w+) named [A-Z]\w+\. (He|She) ", tokenizer.decode(out[0]))
    assert told is not None

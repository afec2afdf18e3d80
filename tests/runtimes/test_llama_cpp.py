"""Our GGUF files in llama.cpp itself: the same tokens, the same logits, the same perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import repacked
import torch
from foreign import need_package
from llama_cpp import EMBEDDED, ask, heldout, model_folder, need_llama_cpp
from test_gguf_export import integers, save_wide, trits
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.errors import UserError
from compressor.run.export_gguf import export_gguf
from compressor.run.gguf_tokenizer import LLAMA3, QWEN2, TEKKEN

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 10000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
NASTY = (
    "  two spaces, a tab\tand\n\n\nlines \n of   all kinds   ",
    "naïve café, Straße, 東京都, Ωmega, 🙂🙃 and \u200bzero width",
    "It's we'll THEY'RE I'D 'tis ''quoted'' can't",
    "1234567890 12,345.678 -0.5e10 ½ ² ٣ Ⅻ",
    '<s> </s> <unk> <0x0A> <|end|> {"a": [1, 2]} http://x.y/z?q=1&r=%20',
    "x",
    " ",
)


@pytest.fixture(autouse=True)
def _needs() -> None:
    need_package("gguf")
    need_llama_cpp()


def gguf(folder: Path, out: Path, kind: str = "auto", **options: Any) -> Path:
    """Export, and return the file."""
    export_gguf(str(folder), out, kind=kind, **options, verify=False)
    return next(out.glob("*.gguf"))


@torch.no_grad()
def logits_of(folder: Path, ids: Tensor) -> Tensor:
    """Logits (windows, length, vocabulary) in fp32, by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits  # type: ignore[no-any-return]


def windows_of(name: str, folder: Path, count: int, length: int) -> Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(heldout(name, count * length * 6)).input_ids
    assert len(ids) >= count * length
    return torch.tensor(ids[: count * length]).view(count, length)


def mean_loss(logits: Tensor, ids: Tensor) -> float:
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("name", "kind", "allowed"),
    [  # of the difference in perplexity; llama.cpp rounds the inputs of Q types to 8 bits
        ("embedded", "F32", 0.0005),
        ("embedded", "F16", 0.002),
        ("embedded", "Q8_0", 0.01),
        ("stories260k-llama", "F16", 0.002),
        ("stories260k-llama", "Q8_0", 0.01),
        ("mix14m-llama", "F16", 0.002),
        ("mix14m-llama", "Q8_0", 0.01),
    ],
)
def test_perplexity_agrees(name: str, kind: str, allowed: float, tmp_path: Path) -> None:
    folder = model_folder(name)
    ids = windows_of(name, folder, 2, 128)
    answer = ask(gguf(folder, tmp_path / "out", kind), tmp_path, windows=ids.tolist())
    theirs = float(torch.tensor(answer["losses"]).mean())
    ours = mean_loss(logits_of(folder, ids), ids)
    print(
        f"{name} {kind}: perplexity {torch.tensor(theirs).exp():.4f} in llama.cpp, {torch.tensor(ours).exp():.4f} here"
    )
    assert abs(theirs - ours) < allowed


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("embedded", "int4 groups of 32"),
        ("embedded", "int4 groups of 128"),
        ("mix14m-llama", "int4 groups of 32"),
        ("mix14m-llama", "trits"),
    ],
)
def test_packed_models_keep_their_perplexity(name: str, code: str, tmp_path: Path) -> None:
    """The integers of our folder, in llama.cpp's products; against our folder in transformers."""
    made = {"int4 groups of 32": integers(4, 32), "int4 groups of 128": integers(4, 128), "trits": trits(1, 128)}[code]
    packed = repacked.repack(model_folder(name), tmp_path / "packed", made)
    done = export_gguf(str(packed), tmp_path / "out", kind="auto", verify=False)
    assert done.form == "gguf Q4_0"
    ids = windows_of(name, packed, 2, 128)
    answer = ask(next((tmp_path / "out").glob("*.gguf")), tmp_path, windows=ids.tolist())
    theirs, ours = float(torch.tensor(answer["losses"]).mean()), mean_loss(logits_of(packed, ids), ids)
    print(
        f"{name} {code}: perplexity {torch.tensor(theirs).exp():.4f} in llama.cpp, {torch.tensor(ours).exp():.4f} here"
    )
    assert abs(theirs - ours) < 0.02


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0"])
def test_ternary_types_compute_our_model(kind: str, tmp_path: Path) -> None:
    """A model of rows of 256; it is random, so that logits are compared: nearly the same, by 8 bits of activations."""
    packed = repacked.repack(save_wide(tmp_path / "wide"), tmp_path / "packed", trits(1, 256))
    ids = windows_of("embedded", packed, 2, 32)
    answer = ask(gguf(packed, tmp_path / "out", kind), tmp_path, windows=ids.tolist(), logits=True)
    ours, theirs = logits_of(packed, ids), torch.tensor(answer["logits"])
    error = float((theirs - ours).norm() / ours.norm())
    print(f"{kind}: relative error of logits {error:.4f}")
    assert error < 0.03
    source = logits_of(tmp_path / "wide", ids)
    assert float((source - ours).norm() / ours.norm()) > 10 * 0.03  # the comparison would notice another model


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LINEAR}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"vocab_size": 1088}),  # for which transformers adds a token to any tokenizer
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": False}),
    ],
)
def test_families(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Logits of random models of every family and rotation."""
    folder = save_wide(tmp_path / "model", family, **more)
    ids = windows_of("embedded", folder, 2, 32)
    answer = ask(gguf(folder, tmp_path / "out", "F32"), tmp_path, windows=ids.tolist(), logits=True)
    ours, theirs = logits_of(folder, ids), torch.tensor(answer["logits"])
    error = float((theirs - ours).norm() / ours.norm())
    print(f"{family} {more}: relative error of logits {error:.2e}")
    assert error < 2e-3  # keys and values are kept in fp16


@pytest.mark.parametrize("name", ["embedded", "stories260k-llama", "mix14m-llama"])
def test_tokens_agree(name: str, tmp_path: Path) -> None:
    folder = model_folder(name)
    texts = [heldout(name, 3000), *NASTY]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer = ask(gguf(folder, tmp_path / "out"), tmp_path, texts=texts, generate={"ids": [5, 6, 7], "count": 4})
    for text, found in zip(texts, answer["tokens"], strict=True):
        assert found == tokenizer(text, add_special_tokens=False).input_ids, text
    assert answer["adds_bos"] == (tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    assert len(answer["generated"]) == 4


@pytest.mark.parametrize("cut", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_tokens_of_other_cuts(cut: str, tmp_path: Path) -> None:
    """Tokenizers with the rules of GPT-2, Llama 3, Qwen2 and Mistral's Tekken, trained here."""
    backend = Tokenizer(models.BPE(ignore_merges=cut in ("llama-bpe", "tekken")))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = {"llama-bpe": LLAMA3, "qwen2": QWEN2, "tekken": TEKKEN}.get(cut)
    split = pattern and pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, raw]) if split else whole
    backend.normalizer = normalizers.NFC() if cut == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([heldout("embedded", 20000), *NASTY, *NASTY], trainer)
    folder = save_wide(tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    texts = [heldout("embedded", 2000), *NASTY]
    answer = ask(gguf(folder, tmp_path / "out"), tmp_path, texts=texts)
    for text, found in zip(texts, answer["tokens"], strict=True):
        assert found == tokenizer(text, add_special_tokens=False).input_ids, text
    assert not answer["adds_bos"]


def test_a_file_without_tokenizer_works_on_ids(tmp_path: Path) -> None:
    """In transformers; node-llama-cpp splits a text as soon as it has loaded a file."""
    ids = windows_of("embedded", EMBEDDED, 1, 32)
    file = gguf(EMBEDDED, tmp_path / "out", "F32", tokenizer="none")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, logits_of(EMBEDDED, ids), atol=1e-4)


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "model")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    steps = {
        "cuts text into words": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()]),
        "changes its text first": backend.pre_tokenizer,
    }
    for word, step in steps.items():
        backend.pre_tokenizer = step
        backend.normalizer = normalizers.Lowercase() if word.startswith("changes") else None
        backend.save(str(folder / "tokenizer.json"))
        if word.startswith("changes"):
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.save(str(folder / "tokenizer.json"))
        with pytest.raises(UserError, match=rf"{word}.*--tokenizer none"):
            export_gguf(str(folder), tmp_path / "out")
    with pytest.raises(UserError, match="a token for every byte"):
        export_gguf(str(model_folder("tinystories-656k-llama")), tmp_path / "out")

"""A tokenizer in GGUF, of the two kinds that llama.cpp computes: byte-level BPE, and SentencePiece by merges.

llama.cpp does not read rules: it knows a list of ways to cut text into words (``tokenizer.ggml.pre``) by name. Ours are
the ways whose rules stand in `CUTS`; any other tokenizer is refused rather than written under a name that nearly fits.
Source: llama-vocab.cpp.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS: dict[tuple[str, ...], tuple[str, bool]] = {
    ("bytes",): ("gpt-2", False),
    ("digits", "bytes"): ("smollm", False),
    (LLAMA3, "raw"): ("llama-bpe", True),
    (QWEN2, "raw"): ("qwen2", False),
    (TEKKEN, "raw"): ("tekken", True),
}
"""Steps of the pre-tokenizer -> llama.cpp's name, and whether it takes whole words from the vocabulary before merging.

``bytes`` is ByteLevel with the pattern of GPT-2, ``raw`` without a pattern.
"""


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece, ``no_vocab`` for none.
        pre: how text is cut into words; ``default`` for SentencePiece, which does not cut.
        tokens, types, scores: by id; ``scores`` empty for BPE, ``merges`` for SentencePiece.
        ids: ``bos``, ``eos``, ``unk``, ``pad``, those there are.
        flags: ``bos``, ``eos``: whether a text gets them; ``space``: whether it gets a space in front.
        template: for chats, in Jinja.
        notes: what llama.cpp will do otherwise.
    """

    model: str
    pre: str = "default"
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    ids: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    template: str | None = None
    notes: tuple[str, ...] = ()

    def told(self) -> str:
        """In a line."""
        if self.model == "no_vocab":
            return "none: the file works on token ids"
        added = [name for name in ("bos", "eos") if self.flags[name]]
        return f"{self.model}, cut as {self.pre}, {len(self.tokens)} tokens; adds {' and '.join(added) or 'none'}"


def read_vocabulary(folder: Path, config: Any) -> Vocabulary:
    """Read the tokenizer of a model folder as transformers loads it.

    Raises:
        UserError: there is none, or llama.cpp would split some text otherwise.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _refused(f"its tokenizer cannot be read ({first})") from error
    content = json.loads(backend.to_str())
    if content["model"]["type"] != "BPE":
        raise _refused(f"its tokenizer is of kind {content['model']['type']}, expected BPE")
    if content["model"].get("dropout"):
        raise _refused("its tokenizer drops merges at random")
    notes = [
        f"llama.cpp takes {added['content']!r} without the spaces around it"
        for added in content["added_tokens"]
        if added["lstrip"] or added["rstrip"]
    ]
    if _is_sentencepiece(content):
        common = _sentencepiece(content, backend)
    else:
        model, pre, note = "gpt2", *_cut(content)
        notes += note
        merges = tuple(" ".join(_pair(merge)) for merge in content["model"]["merges"])
        common = {"model": model, "pre": pre, "merges": merges, "flags": {"space": False}}
    ids = _special_ids(tokenizer, config)
    tokens, types = _tokens(content, config.vocab_size, ids)
    by_token = common.pop("scores", None)
    scores = () if by_token is None else tuple(by_token.get(token, 0.0) for token in tokens)
    flags = {**common.pop("flags"), **_added(tokenizer, ids)}
    template = getattr(tokenizer, "chat_template", None)
    template = template if isinstance(template, str) else None
    return Vocabulary(
        **common, tokens=tokens, types=types, scores=scores, ids=ids, flags=flags, template=template, notes=tuple(notes)
    )


def _refused(why: str) -> UserError:
    return UserError(
        f"this tokenizer cannot be written as gguf: {why}", fix="--tokenizer none leaves it out (token ids alone work)"
    )


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A step of a tokenizer as a list of plain ones."""
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [step]


def _cut(content: dict[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for how byte-level BPE cuts its text into words, and what it does not do."""
    steps = []
    for step in _steps(content["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            steps.append("bytes" if step["use_regex"] else "raw")
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", "?"))
        else:
            steps.append(f"{step['type']} {step}")
    name, whole = CUTS.get(tuple(steps), (None, False))
    if name is None or whole != bool(content["model"]["ignore_merges"]):
        raise _refused("llama.cpp has no name that we know for the way it cuts text into words")
    normal = [step["type"] for step in _steps(content["normalizer"], "normalizers")]
    if set(normal) - {"NFC"}:
        raise _refused(f"it changes its text first ({', '.join(normal)}), which llama.cpp does not")
    return name, ["llama.cpp does not compose characters (NFC) before it splits a text"] if normal else []


def _is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether bytes stand in the vocabulary as ``<0x00>``, and spaces as a low line."""
    return bool(content["model"]["byte_fallback"]) or "▁" in content["model"]["vocab"]


def _sentencepiece(content: dict[str, Any], backend: Any) -> dict[str, Any]:
    """The settings of `Vocabulary` for merges in the manner of SentencePiece; ``scores`` by token.

    SentencePiece joins whichever neighbours make a token, that of the best score first; BPE joins the pairs it lists,
    in their order. That is the same if every token has its merges together, and is what merging its own text gives.
    """
    vocabulary = content["model"]["vocab"]
    space = _space_in_front(content)
    lacking = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if lacking:
        raise _refused(f"llama.cpp needs a token for every byte, and {len(lacking)} of 256 are missing")
    ranks: dict[str, list[int]] = {}
    for rank, merge in enumerate(content["model"]["merges"]):
        ranks.setdefault("".join(_pair(merge)), []).append(rank)
    apart = {added["content"] for added in content["added_tokens"]} | {f"<0x{byte:02X}>" for byte in range(256)}
    for token in vocabulary:
        rank_list = ranks.get(token, [0])
        together = rank_list[-1] - rank_list[0] == len(rank_list) - 1
        if token not in apart and not (together and [part.value for part in backend.model.tokenize(token)] == [token]):
            raise _refused(f"its merges do not follow from scores of its tokens (see {token!r})")
    scores = {token: float(-rank_list[0]) for token, rank_list in ranks.items()}
    return {"model": "llama", "scores": scores, "flags": {"space": space}}


def _space_in_front(content: dict[str, Any]) -> bool:
    """Whether a text gets a space in front; refuses whatever else is done to it but writing spaces as low lines."""
    cuts = _steps(content["pre_tokenizer"], "pretokenizers")
    normal = _steps(content["normalizer"], "normalizers")
    if not normal and len(cuts) == 1 and cuts[0]["type"] == "Metaspace" and not cuts[0]["split"]:
        return bool(cuts[0]["prepend_scheme"] != "never")
    replaces = [step for step in normal if step["type"] == "Replace"]
    prepends = [step for step in normal if step["type"] == "Prepend"]
    spaces = len(replaces) == 1 and replaces[0]["pattern"] == {"String": " "} and replaces[0]["content"] == "▁"
    other = len(normal) - len(replaces) - len(prepends)
    if cuts or other or not spaces or any(step["prepend"] != "▁" for step in prepends):
        raise _refused("it does more to its text than write spaces as low lines")
    return bool(prepends)


def _special_ids(tokenizer: Any, config: Any) -> dict[str, int]:
    """Ids of the tokens that begin, end, replace and fill, those there are."""
    ids = {}
    for short in ("bos", "eos", "unk", "pad"):
        found = getattr(tokenizer, f"{short}_token_id", None)
        if found is None and short != "pad":
            found = getattr(config, f"{short}_token_id", None)
        found = found[0] if isinstance(found, list) else found
        if found is not None:
            ids[short] = int(found)
    if "eos" not in ids:
        raise _refused("it has no token that ends a text, and llama.cpp would take one at random")
    return ids


def _tokens(content: dict[str, Any], size: int, ids: dict[str, int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Token and type of each of ``size`` ids."""
    tokens = {number: token for token, number in content["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for byte in range(256):
        if (number := content["model"]["vocab"].get(f"<0x{byte:02X}>")) is not None:
            types[number] = BYTE
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if "unk" in ids and types.get(ids["unk"]) == CONTROL and content["model"]["byte_fallback"]:
        types[ids["unk"]] = UNKNOWN
    if max(tokens) >= size:
        raise _refused(f"it has a token of id {max(tokens)}, and the model {size} ids")
    if len(set(tokens.values())) < len(tokens):
        raise _refused("two ids have the same token")
    numbers = range(size)
    return tuple(tokens.get(i, f"[PAD{i}]") for i in numbers), tuple(types.get(i, UNUSED) for i in numbers)


def _added(tokenizer: Any, ids: dict[str, int]) -> dict[str, bool]:
    """Whether a text gets the first and the last token, found by trying."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for bos in (False, True):
        for eos in (False, True):
            if full == [ids["bos"]] * (bos and "bos" in ids) + bare + [ids["eos"]] * eos:
                return {"bos": bos and "bos" in ids, "eos": eos}
    raise _refused("it adds other tokens to a text than the first and the last")


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the keys of a tokenizer to a ``GGUFWriter``."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.model == "no_vocab":
        return
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for short, number in vocabulary.ids.items():
        getattr(writer, f"add_{short}_token_id")(number)
    writer.add_add_bos_token(vocabulary.flags["bos"])
    writer.add_add_eos_token(vocabulary.flags["eos"])
    writer.add_add_space_prefix(vocabulary.flags["space"])
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)

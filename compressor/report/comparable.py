"""Which measurements may stand side by side: those of the same tokens by the same protocol."""

from __future__ import annotations

import json

from compressor.report.schema import Evaluation

NOT_IDENTITY = frozenset({"use", "path", "revision", "pinned"})
"""Keys of a protocol that say where a text came from; whether it is the same text the hashes say."""


def token_hash(text: Evaluation) -> str:
    """The hash of the token ids, wherever it was recorded; empty when it was not."""
    return text.tokens_sha256 or str(text.protocol.get("sha256") or "")


def comparable_key(text: Evaluation) -> str:
    """Equal for two measurements that may stand side by side. Without a hash of the tokens the name has to do."""
    protocol = {key: value for key, value in text.protocol.items() if key not in NOT_IDENTITY}
    identity = token_hash(text) or f"{text.name} {text.tokens}"
    return json.dumps([identity, text.windows, protocol], sort_keys=True, default=str)

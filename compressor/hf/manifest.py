"""The names that stand in a packed folder's config.json, for those who write it and those who read it."""

from __future__ import annotations

MODEL_TYPE = "compressor"
FORMAT_VERSION = 1
READER_NAME = "modeling_compressor.py"
READER_AUTO_MAP = {
    "AutoConfig": "modeling_compressor.CompressorConfig",
    "AutoModelForCausalLM": "modeling_compressor.CompressorForCausalLM",
}

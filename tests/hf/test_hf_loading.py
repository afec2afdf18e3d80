"""Packed folders are read in fresh processes: with the package, with the reader file alone, and with neither."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_folders import tiny_model, write_folder
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "qwen3_moe", "gpt2")

COMMON = """
import json, os, shutil, sys
from pathlib import Path
import torch
here = Path(sys.argv[1])
expected = torch.load(here / "expected.pt")

def check(model, family):
    ids = expected["ids"]
    assert torch.equal(model(ids).logits, expected[family]), family
    made = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(made, expected[family + " generated"]), family

def refuses(what, words, load):
    try:
        load()
    except ValueError as error:
        assert words in str(error), f"{what}: {error}"
    else:
        raise AssertionError(f"{what} was accepted")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of packed models, damaged ones too, and ``expected.pt`` with what they must compute."""
    here = tmp_path_factory.mktemp("packed")
    ids = torch.arange(3, 40)[None]
    expected = {"ids": ids}
    for family in FAMILIES:
        dtype = torch.bfloat16 if family == "llama" else torch.float32
        model = tiny_model(family, dtype)
        write_folder(model, here / family)
        with torch.no_grad():
            expected[family] = model(ids).logits
            expected[f"{family} generated"] = model.generate(
                ids[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            if family == "llama":
                wide = tiny_model(family, torch.float32)
                wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
                expected["llama fp32"] = wide(ids).logits
    torch.save(expected, here / "expected.pt")
    write_tokenizer(here / "llama")
    damage(here)
    return here


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def damage(here: Path) -> None:
    """Write copies of the llama folder that must be refused."""
    q_proj = "model.layers.0.self_attn.q_proj"
    for name in ("lost packed", "lost plain", "wrong dtype", "not listed", "too new", "tied"):
        shutil.copytree(here / "llama", here / name)
        tensors = {key: tensor.clone() for key, tensor in load_file(here / name / "model.safetensors").items()}
        config = json.loads((here / name / "config.json").read_text())
        manifest = config["quantization_config"]
        if name == "lost packed":
            del tensors[f"{q_proj}.weight_mask"]
        elif name == "lost plain":
            del tensors["model.norm.weight"]
        elif name == "wrong dtype":
            tensors[f"{q_proj}.weight_values"] = tensors[f"{q_proj}.weight_values"].float()
        elif name == "not listed":
            tensors["model.layers.0.other.weight_mask"] = tensors[f"{q_proj}.weight_mask"].clone()
        elif name == "too new":
            manifest["format_version"] = 2
        else:
            manifest["modules"]["lm_head"] = {"format": "dense", "shape": [96, 32], "dtype": "bfloat16"}
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, here / name / "model.safetensors")
        (here / name / "config.json").write_text(json.dumps(config))


def fresh(here: Path, tmp_path: Path, script: str, package: bool) -> None:
    """Run ``script`` after COMMON in a new interpreter, elsewhere, with or without the package on its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT)} if package else {}
    text = script if package else "import sys\nsys.modules['compressor'] = None\n" + script
    done = subprocess.run(
        [sys.executable, "-c", text, str(here)],
        env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_transformers_then_compressor(folders: Path, tmp_path: Path) -> None:
    """Every family, every way of asking, saving and loading again."""
    script = """
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaConfig, Qwen3MoeForCausalLM
import compressor
for family in ("llama", "qwen3_moe", "gpt2"):
    check(AutoModelForCausalLM.from_pretrained(here / family), family)
    check(AutoModelForCausalLM.from_pretrained(here / family, device_map="auto"), family)
model, info = AutoModelForCausalLM.from_pretrained(
    here / "llama", device_map="cpu", trust_remote_code=True, output_loading_info=True
)
check(model, "llama")
assert isinstance(model, LlamaForCausalLM) and not any(info.values()), info
assert type(model).__module__ == "compressor.hf.loading"
assert model.lm_head.weight is model.model.embed_tokens.weight
assert isinstance(model.config, LlamaConfig) and model.config.model_type == "llama"
assert type(model.model.layers[0].mlp.up_proj).__name__ == "PackedLinear"
wide = AutoModelForCausalLM.from_pretrained(here / "llama", dtype=torch.float32)
assert wide.dtype == torch.float32 and torch.equal(wide(expected["ids"]).logits, expected["llama fp32"])
eager = AutoModelForCausalLM.from_pretrained(here / "llama", attn_implementation="eager")
assert eager.config._attn_implementation == "eager"
body = AutoModel.from_pretrained(here / "llama")
states = AutoModelForCausalLM.from_pretrained(here / "llama").model(expected["ids"]).last_hidden_state
assert torch.equal(body(expected["ids"]).last_hidden_state, states)
for family in ("llama", "qwen3_moe"):
    again = here / "again" / family
    AutoModelForCausalLM.from_pretrained(here / family).save_pretrained(again)
    check(AutoModelForCausalLM.from_pretrained(again), family)
    assert (again / "modeling_compressor.py").read_text() == (here / family / "modeling_compressor.py").read_text()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (here / family, again))
    assert old["quantization_config"] == new["quantization_config"]
    assert all(old[key] == new[key] for key in ("model_type", "base_model_type", "auto_map"))
dense = here / "dense"
AutoModelForCausalLM.from_pretrained(here / "llama").dequantize().save_pretrained(dense)
assert json.loads((dense / "config.json").read_text())["model_type"] == "llama"
assert not (dense / "modeling_compressor.py").exists()
mixture = AutoModelForCausalLM.from_pretrained(here / "qwen3_moe").dequantize()
check(mixture, "qwen3_moe")
refuses("saving experts apart", "mixture of experts", lambda: mixture.save_pretrained(here / "mixture"))
plain = AutoModelForCausalLM.from_pretrained(dense)
assert type(plain) is LlamaForCausalLM
check(plain, "llama")

q_proj = "model.layers.0.self_attn.q_proj.weight_"
for folder, words in {
    "lost packed": f"the checkpoint has no {q_proj}mask",
    "lost plain": "the checkpoint does not fill model.norm.weight",
    "wrong dtype": f"{q_proj}values is [",
    "not listed": "packed tensors that config.json does not list: model.layers.0.other.weight_mask",
    "too new": "format_version 2",
    "tied": "lm_head is packed but its weight is tied",
}.items():
    refuses(folder, words, lambda: AutoModelForCausalLM.from_pretrained(here / folder))
"""
    fresh(folders, tmp_path, COMMON + script, package=True)


def test_a_whole_model_travels_between_processes(folders: Path, tmp_path: Path) -> None:
    """By pickle, which ``torch.save`` and the starting of processes use; its class is made anew where it is read."""
    write = """
import pickle
import compressor
from transformers import AutoModelForCausalLM
for family in ("llama", "qwen3_moe"):
    (here / f"{family}.pickle").write_bytes(pickle.dumps(AutoModelForCausalLM.from_pretrained(here / family)))
"""
    read = """
import pickle
for family in ("llama", "qwen3_moe"):
    model = pickle.loads((here / f"{family}.pickle").read_bytes())
    assert type(model).__module__ == "compressor.hf.loading"
    check(model, family)
    model.save_pretrained(here / f"{family} again")
    assert (here / f"{family} again" / "modeling_compressor.py").is_file()
"""
    fresh(folders, tmp_path, COMMON + write, package=True)
    fresh(folders, tmp_path, COMMON + read, package=True)


def test_compressor_then_transformers(folders: Path, tmp_path: Path) -> None:
    """The import is cheap, and the first thing asked of transformers finds us registered."""
    script = """
import sys
import compressor, compressor
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
assert type(sys.meta_path[0]).__module__ == "compressor.hf.autoload"
assert not type(sys.meta_path[1]).__module__.startswith("compressor")
import transformers
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + "/llama")
assert tokenizer("w5 w7").input_ids == [5, 7]
assert not any(type(finder).__module__.startswith("compressor") for finder in sys.meta_path)
"""
    rest = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
assert AutoConfig.from_pretrained(here / "gpt2").model_type == "gpt2"
check(AutoModelForCausalLM.from_pretrained(here / "gpt2"), "gpt2")
check(AutoModelForCausalLM.from_pretrained(here / "qwen3_moe", trust_remote_code=True), "qwen3_moe")
refuses("the class itself", "quant_method", lambda: LlamaForCausalLM.from_pretrained(here / "llama"))
"""
    fresh(folders, tmp_path, script + COMMON + rest, package=True)


def test_without_the_package(folders: Path, tmp_path: Path) -> None:
    """An error without consent, never random weights; with consent the reader file is enough."""
    script = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
refuses("no consent", "trust_remote_code=True", lambda: AutoModelForCausalLM.from_pretrained(here / "llama"))
refuses("no config", "trust_remote_code=True", lambda: AutoConfig.from_pretrained(here / "llama"))
refuses("the class itself", "quant_method", lambda: LlamaForCausalLM.from_pretrained(here / "llama"))
bare = here / "bare"
shutil.copytree(here / "llama", bare)
(bare / "modeling_compressor.py").unlink()
config = json.loads((bare / "config.json").read_text())
del config["auto_map"]
(bare / "config.json").write_text(json.dumps(config))
refuses("no reader", "model type `compressor`", lambda: AutoModelForCausalLM.from_pretrained(bare))

for family in ("llama", "qwen3_moe", "gpt2"):
    model = AutoModelForCausalLM.from_pretrained(here / family, trust_remote_code=True)
    check(model, family)
assert type(model).__module__.startswith("transformers_modules.")
model.save_pretrained(here / "saved by reader")
check(AutoModelForCausalLM.from_pretrained(here / "saved by reader", trust_remote_code=True), "gpt2")
reader = (here / "saved by reader" / "modeling_compressor.py").read_text()
assert reader == (here / "gpt2" / "modeling_compressor.py").read_text()
assert AutoTokenizer.from_pretrained(here / "llama", trust_remote_code=True)("w5").input_ids == [5]
refuses("damaged", "the checkpoint has no", lambda: AutoModelForCausalLM.from_pretrained(
    here / "lost packed", trust_remote_code=True
))
"""
    fresh(folders, tmp_path, COMMON + script, package=False)

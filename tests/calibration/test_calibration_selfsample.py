"""Text sampled from the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from compressor.calibration import load_calibration, sample_from_model
from compressor.calibration.selfsample import draw
from compressor.errors import UserError


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,  # more than the tokenizer knows
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.8,
    )
    return LlamaForCausalLM(config)


def slow(model: Any, tokenizer: Any, count: int, length: int, seed: int, vocabulary: int) -> torch.Tensor:
    """The same draws without a cache, one text and one token at a time."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(count, length, generator=generator, dtype=torch.float64)
    texts = []
    for row in uniforms.tolist():
        ids = [tokenizer.bos_token_id]
        for uniform in row:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :vocabulary].double()
            token, total = 0, float(torch.softmax(logits, 0)[0])
            while total <= uniform:
                token += 1
                total += float(torch.softmax(logits, 0)[token])
            ids.append(token)
        texts.append(ids[1:])
    return torch.tensor(texts)


def test_against_a_slow_loop(model: Any, tokenizer: Any) -> None:
    model.train()
    state = torch.random.get_rng_state()
    ids = sample_from_model(model, tokenizer, 3, 12, seed=5)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    model.eval()
    assert torch.equal(ids, slow(model, tokenizer, 3, 12, 5, len(tokenizer)))
    assert int(ids.max()) < len(tokenizer) and ids.dtype == torch.int64


def test_batch_seed_and_progress(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    whole = sample_from_model(model, tokenizer, 5, 10, seed=1, progress=lambda done, of: seen.append((done, of)))
    assert torch.equal(whole, sample_from_model(model, tokenizer, 5, 10, seed=1, batch=2))
    assert not torch.equal(whole, sample_from_model(model, tokenizer, 5, 10, seed=2))
    assert seen[-1] == (50, 50) and seen == sorted(seen)


def test_without_bos_the_first_token_is_random(bare_tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    ids = sample_from_model(model, bare_tokenizer, 40, 16, seed=0)
    assert ids.shape == (40, 16) and ids[:, 0].unique().numel() > 20
    with pytest.raises(UserError, match="beyond the 16 positions"):
        sample_from_model(model, bare_tokenizer, 1, 17, seed=0)


def test_draw_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    uniforms = torch.arange(1000, dtype=torch.float64) / 1000
    drawn = draw(probabilities.log().expand(1000, 6), uniforms)
    assert drawn.flatten().bincount(minlength=6).tolist() == pytest.approx([0, 100, 0, 600, 300, 0], abs=1)
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert int(draw(probabilities.log()[None], last)) == 4


def test_as_a_calibration_source(model: Any, tokenizer: Any) -> None:
    def sampler(count: int, length: int, seed: int) -> torch.Tensor:
        return sample_from_model(model, tokenizer, count, length, seed)

    loaded = load_calibration(["self:bos=yes"], tokenizer, nsamples=4, seqlen=9, seed=0, sampler=sampler)
    assert loaded.ids.shape == (4, 9) and bool((loaded.ids[:, 0] == tokenizer.bos_token_id).all())


def test_temperature(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="temperature"):
        sample_from_model(model, tokenizer, 1, 4, seed=0, temperature=0)
    cold = sample_from_model(model, tokenizer, 4, 6, seed=0, temperature=1e-6)
    assert torch.equal(cold, cold[:1].expand(4, 6))  # greedy: every text is the same

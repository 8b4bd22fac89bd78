"""Logits and every gradient of the float64 decoder, against transformers in true float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers

from rung.models import ModelConfig, RopeScaling, build
from rung.models.huggingface import to_huggingface_config, to_huggingface_name
from rung.objectives import CausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# Of the four frequencies one is kept, one blended and two are stretched.
SCALING = RopeScaling(factor=8.0, original_max_position_embeddings=100)
CASES = {
    "llama": ModelConfig(**SIZES),
    "llama, tied, grouped": ModelConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "llama, one K/V head, scaled rotation": ModelConfig(**SIZES, num_key_value_heads=1, rope_scaling=SCALING),
    "mistral, sliding window": ModelConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
    "qwen3, tied, wide heads": ModelConfig(
        **SIZES, num_key_value_heads=2, head_dim=12, qk_norm=True, tie_word_embeddings=True, rope_theta=1e6
    ),
    "qwen3, sliding window": ModelConfig(**SIZES, qk_norm=True, sliding_window=7),
}


@contextmanager
def true_float64() -> Iterator[None]:
    """transformers asks for float32 by name in norms, rotations and the softmax, whatever the model's dtype; while this
    holds, what it gets by that name is float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(torch, "float32", torch.float64),
            mock.patch.object(torch, "float", torch.float64),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(default)


def perturbed(config: ModelConfig, seed: int = 0) -> torch.nn.Module:
    """A float64 model in which no weight, norms included, has a special value, so that no gradient is small by luck."""
    generator = torch.Generator().manual_seed(seed)
    model = build(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_logits_and_gradients(config):
    ours = perturbed(config)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (2, 24), generator=generator)
    labels = torch.randint(config.vocab_size, (2, 24), generator=generator)
    labels[0, :5] = labels[1, -1] = -100
    logits = ours(tokens)
    CausalLM().sums(logits, SimpleNamespace(labels_BT=labels))["loss"].backward()

    with true_float64():
        their_config = transformers.AutoConfig.for_model(**to_huggingface_config(config, dtype="float64"))
        theirs = transformers.AutoModelForCausalLM.from_config(their_config, attn_implementation="eager")
        assert type(theirs).__name__ == their_config.architectures[0]
        weights = {to_huggingface_name(name): tensor for name, tensor in ours.state_dict().items()}
        theirs.load_state_dict(weights)
        their_logits = theirs(tokens).logits
        F.cross_entropy(their_logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    assert logits.dtype == their_logits.dtype == torch.float64
    assert relative(logits, their_logits) < 1e-10
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    gradients = {to_huggingface_name(name): parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert their_gradients[name].norm() > 1e-3, name
        assert relative(gradient, their_gradients[name]) < 1e-10, name

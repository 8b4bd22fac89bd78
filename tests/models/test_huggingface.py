"""Folders written for transformers, and folders that transformers wrote."""

import dataclasses
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rung.checkpoint.huggingface import export_huggingface, load_huggingface
from rung.errors import UserError
from rung.models import ModelConfig, RopeScaling, build
from rung.models.huggingface import from_huggingface_config, to_huggingface_config

LLAMA = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=64,
)  # fmt: skip
CONFIGS = {
    "llama": dataclasses.replace(LLAMA, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=16)),
    "mistral": dataclasses.replace(LLAMA, sliding_window=5),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, tie_word_embeddings=True, head_dim=12, rope_theta=1e6),
    "qwen3, sliding window": dataclasses.replace(LLAMA, qk_norm=True, sliding_window=6),
}
TOKENS = torch.arange(40).reshape(2, 20) % LLAMA.vocab_size


@pytest.fixture
def tokenizer_json(tmp_path):
    vocabulary = {"<eos>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "source.json"))
    return tmp_path / "source.json"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_transformers_reads_what_we_write(config, tmp_path, tokenizer_json):
    model, folder = build(config), tmp_path / "out"
    export_huggingface(folder, config, model.named_parameters(), tokenizer_json, eos_id=0, max_shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards and len(shards) > 2
    assert index["metadata"]["total_size"] == 4 * sum(parameter.numel() for parameter in model.parameters())

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.float32 and theirs.generation_config.eos_token_id == 0
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a b b")["input_ids"] == [1, 2, 2] and tokenizer.eos_token_id == 0

    again_config, again = load_huggingface(folder)
    assert again_config == config
    assert torch.equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_we_read_what_transformers_writes(config, tmp_path):
    their_config = transformers.AutoConfig.for_model(**to_huggingface_config(config))
    theirs = transformers.AutoModelForCausalLM.from_config(their_config)
    theirs.save_pretrained(tmp_path)
    found, model = load_huggingface(tmp_path, dtype=torch.float32)
    assert found == config
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)


def test_export_is_all_or_nothing(tmp_path):
    model = build(LLAMA)
    parameters = list(model.named_parameters())
    with pytest.raises(ValueError, match=r"missing parameters: lm_head\.weight"):
        export_huggingface(tmp_path / "out", LLAMA, parameters[:-1])
    with pytest.raises(ValueError, match="came twice"):
        export_huggingface(tmp_path / "out", LLAMA, [parameters[0], parameters[0]])
    assert list(tmp_path.iterdir()) == []
    export_huggingface(tmp_path / "out", LLAMA, parameters)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    with pytest.raises(UserError, match="already exists"):
        export_huggingface(tmp_path / "out", LLAMA, parameters)


def test_a_bfloat16_export_says_so(tmp_path):
    tensors = ((name, parameter.bfloat16()) for name, parameter in build(LLAMA).named_parameters())
    export_huggingface(tmp_path / "out", LLAMA, tensors)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    _, model = load_huggingface(tmp_path / "out", dtype=torch.float64)
    assert model(TOKENS).dtype == torch.float64


def test_what_a_decoder_cannot_do_is_refused_all_at_once():
    source = to_huggingface_config(LLAMA) | {
        "attention_bias": True, "hidden_act": "gelu", "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        from_huggingface_config(source)
    assert all(part in str(caught.value) for part in ("attention_bias=True", "hidden_act='gelu'", "rope_type='yarn'"))
    with pytest.raises(UserError, match="model_type='gpt2'"):
        from_huggingface_config({"model_type": "gpt2"})
    mixed = to_huggingface_config(CONFIGS["qwen3, sliding window"]) | {"max_window_layers": 1}
    with pytest.raises(UserError, match="some layers only"):
        from_huggingface_config(mixed)

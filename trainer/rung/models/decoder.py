"""A Llama-style decoder: maths only, no ranks.

Legend: B batch, T tokens, D hidden size, F feed-forward size, H heads, K key/value heads, E head size, V vocabulary,
L layers, 1 a broadcast dimension. "fp32" means promote(dtype, float32): a float64 model is float64 throughout.

Parameter names are Hugging Face's Llama names without the leading ``model.``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import rung_kernels
from rung.errors import UserError
from rung.models.config import InitRule, ModelConfig, init_rules
from rung.random import dropout_mask, name_key, step_key

__all__ = ["Attention", "AttentionMask", "Block", "Decoder", "Dropout", "build", "rotary_tables"]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, of x or of the sum of x and a residual stream."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm; with a residual, (the norm of residual + x, residual + x)."""
        if residual is None:
            return rung_kernels.rms_norm(x, self.weight, self.eps)
        return rung_kernels.add_rms_norm(x, residual, self.weight, self.eps)


class DotProductAttention(nn.Module):
    """What happens between the projections; a module of its own so that another implementation can take its place."""

    def forward(self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Tensor | None) -> Tensor:
        return rung_kernels.attention(q_BTHE, k_BTKE, v_BTKE, mask=mask, causal=True)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = heads, kv_heads  # those that are here, where heads are spread
        self.fused = config.fused_qkv
        if self.fused:  # rows of all query heads, then of all key heads, then of all value heads
            self.qkv_proj = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        else:
            self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
            self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
            self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.inner: nn.Module = DotProductAttention()

    def forward(self, x_BTD: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, mask: Tensor | None) -> Tensor:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if self.fused:
            qkv = self.qkv_proj(x_BTD).split([number * self.head_dim for number in heads], dim=-1)
        else:
            qkv = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        q_BTHE, k_BTKE, v_BTKE = (
            x.unflatten(-1, (number, self.head_dim)) for x, number in zip(qkv, heads, strict=True)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        q_BTHE, k_BTKE = rung_kernels.rope(q_BTHE, k_BTKE, cos_BTE, sin_BTE)
        return self.o_proj(self.inner(q_BTHE, k_BTKE, v_BTKE, mask).flatten(-2))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(rung_kernels.swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))


class Dropout(nn.Module):
    """Drops features of x by draws that depend on (key, sample id, position, feature) and on nothing else.

    A module of its own because x may hold other positions than the rest of a forward pass, where tokens are spread.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_BTD: Tensor, key_2: Tensor, sample_ids_B: Tensor, positions_BT: Tensor) -> Tensor:
        keep_BTD = dropout_mask((key_2[0], key_2[1]), sample_ids_B, positions_BT, x_BTD.shape[-1], 0, self.p)
        return torch.where(keep_BTD, x_BTD * (1 / (1 - self.p)), 0.0)


class Block(nn.Module):
    """One decoder layer, plain tensors in and out: the unit that is compiled, checkpointed and sharded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTD: Tensor,
        cos_BTE: Tensor,
        sin_BTE: Tensor,
        mask: Tensor | None = None,
        sample_ids_B: Tensor | None = None,
        positions_BT: Tensor | None = None,
        keys_22: Tensor | None = None,
    ) -> Tensor:
        """x_BTD -> x_BTD. ``keys_22`` (int64, one key per sublayer for this step) turns dropout on; it then needs
        sample_ids_B and positions_BT (int64). Keys arrive as a tensor so that all layers share one compiled graph."""
        y_BTD = self.self_attn(self.input_layernorm(x_BTD), cos_BTE, sin_BTE, mask)
        if keys_22 is not None and sample_ids_B is not None and positions_BT is not None:
            y_BTD = self.dropout(y_BTD, keys_22[0], sample_ids_B, positions_BT)
        normed_BTD, x_BTD = self.post_attention_layernorm(y_BTD, x_BTD)
        y_BTD = self.mlp(normed_BTD)
        if keys_22 is not None and sample_ids_B is not None and positions_BT is not None:
            y_BTD = self.dropout(y_BTD, keys_22[1], sample_ids_B, positions_BT)
        return x_BTD + y_BTD


def rotary_tables(config: ModelConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos_BTE and sin_BTE in fp32 of ``dtype``, each holding its E/2 angles twice (Su et al. 2021, "RoFormer").

    Made from the config on every forward: no buffer that a meta-device build could lose. Llama 3.1's scaling divides
    the frequencies of wavelengths beyond the original context by ``factor``, keeps the fast ones and blends linearly in
    between (Hugging Face ``rope_type: llama3``).
    """
    fp32 = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, dtype=fp32, device=positions_BT.device) / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling.factor != 1:
        turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)  # in the original context
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0, 1)  # 0: slow, stretched; 1: fast, kept
        inv_freq = (1 - blend) * inv_freq / scaling.factor + blend * inv_freq
    angles = positions_BT.unsqueeze(-1).to(fp32) * inv_freq
    angles_BTE = torch.cat((angles, angles), dim=-1)
    return angles_BTE.cos(), angles_BTE.sin()


class AttentionMask(nn.Module):
    """Which key (column) each query (row) sees: bool [B, 1, T, T], or None where plain causal order says it all.

    A token sees itself and earlier tokens of its own document, at most ``window`` tokens in all. What it returns goes
    to ``Attention.inner`` as it is: an implementation that takes that one's place brings its own in place of this.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window

    def forward(self, positions_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor | None:
        if document_ids_BT is None and (self.window is None or self.window >= positions_BT.shape[-1]):
            return None
        distance_BTT = positions_BT.unsqueeze(-1) - positions_BT.unsqueeze(-2)
        visible_BTT = distance_BTT >= 0
        if self.window is not None:
            visible_BTT = visible_BTT & (distance_BTT < self.window)
        if document_ids_BT is not None:
            visible_BTT = visible_BTT & (document_ids_BT.unsqueeze(-1) == document_ids_BT.unsqueeze(-2))
        return visible_BTT.unsqueeze(1)


class Decoder(nn.Module):
    """The whole model, or a part of it: ``embed_tokens``, ``norm`` or ``lm_head`` may be None and layers missing."""

    def __init__(self, config: ModelConfig, *, draws_seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens: nn.Module | None = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = Dropout(config.dropout)
        self.attention_mask: nn.Module = AttentionMask(config.sliding_window)
        # A dict, so that a part of the model keeps the names of the whole.
        self.layers = nn.ModuleDict({str(layer): Block(config) for layer in range(config.num_hidden_layers)})
        self.norm: nn.Module | None = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: nn.Module | None = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        names = ["embed_tokens"]
        for layer in range(config.num_hidden_layers):
            names += [f"layers.{layer}.self_attn", f"layers.{layer}.mlp"]
        self._dropout_keys = [name_key(draws_seed, f"dropout/{name}") for name in names]
        self._dropout_keys_on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        sample_ids_B: Tensor | None = None,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        step: Tensor | None = None,
    ) -> Tensor:
        """int64 token ids -> logits_BTV in the model's dtype.

        sample_ids_B: int64 identity of each sample in the data; positions_BT: int64 index in the sample's window, in
        increasing order (default 0..T-1); document_ids_BT: int64, tokens see only their own document; step: 0-dim
        int64. sample_ids_B and step are needed only to draw dropout: in training, with dropout > 0.
        A part without embed_tokens takes x_BTD in place of tokens, and one without lm_head returns x_BTD.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)
        mask = self.attention_mask(positions_BT, document_ids_BT)
        keys = self._step_keys(step, sample_ids_B, tokens_BT.device)
        if keys is not None and sample_ids_B is not None:
            positions_BT = positions_BT.expand(sample_ids_B.shape[0], -1)

        x_BTD = tokens_BT
        if self.embed_tokens is not None:
            x_BTD = self.embed_tokens(tokens_BT)
            if keys is not None and sample_ids_B is not None:
                x_BTD = self.dropout(x_BTD, keys[0], sample_ids_B, positions_BT)
        cos_BTE, sin_BTE = rotary_tables(self.config, positions_BT, x_BTD.dtype)
        for name, block in self.layers.items():
            first = 1 + 2 * int(name)
            keys_22 = None if keys is None else keys[first : first + 2]
            x_BTD = block(x_BTD, cos_BTE, sin_BTE, mask, sample_ids_B, positions_BT, keys_22)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return x_BTD if self.lm_head is None else self.lm_head(x_BTD)

    def _step_keys(self, step: Tensor | None, sample_ids_B: Tensor | None, device: torch.device) -> Tensor | None:
        """int64 [1 + 2L, 2]: the key of each place that drops features, at this step; None where nothing is dropped."""
        if not self.training or self.config.dropout == 0:
            return None
        if step is None or sample_ids_B is None:
            raise ValueError("a model in training with dropout needs step and sample_ids_B: draws depend on both")
        if device not in self._dropout_keys_on:  # copied to the device once, not in every step
            first, second = zip(*self._dropout_keys, strict=True)
            self._dropout_keys_on[device] = (torch.tensor(first, device=device), torch.tensor(second, device=device))
        # All keys at once: the rounds are plain arithmetic, and tensors of keys broadcast against the step.
        return torch.stack(step_key(self._dropout_keys_on[device], step), dim=-1)

    def blocks(self) -> list[nn.Module]:
        """The modules to compile, checkpoint and shard one by one, in order."""
        return list(self.layers.values())

    def tie_weights(self) -> None:
        """Make the output projection the embedding table again, where the config ties them and both are here.

        Needed after whatever replaces parameters one by one, such as ``to_empty``.
        """
        if self.config.tie_word_embeddings and self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.register_parameter("weight", next(self.embed_tokens.parameters()))

    def init_rules(self) -> dict[str, InitRule]:
        """Name -> how the parameter starts, for the whole model even if this is a part."""
        return init_rules(self.config)


def build(config: ModelConfig, *, draws_seed: int = 0) -> Decoder:
    """A Decoder on torch's default device and in its default dtype; on the meta device no memory is touched.

    Parameters start by ``init_rules`` from torch's global generator: right for a model by itself. A run whose start
    must not depend on its layout initialises from counters instead. ``draws_seed`` keys the dropout draws.
    Raises UserError with every problem of the config at once.
    """
    UserError.raise_all(config.validate())
    device = torch.get_default_device()
    with torch.device("meta"):  # keeps torch's modules from initialising by rules of their own
        model = Decoder(config, draws_seed=draws_seed)
    if device.type == "meta":
        return model
    model.to_empty(device=device)
    model.tie_weights()
    rules = model.init_rules()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if rules[name].kind == "ones":
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=rules[name].std)
    return model

"""A Llama and its training loop in one file of plain PyTorch: what a run costs when nothing watches over it.

This is the yardstick, so it is meant to be as fast as plain PyTorch gets for the same mathematics: fused AdamW,
scaled_dot_product_attention, F.rms_norm, F.cross_entropy, data in memory before the first step, no logging, no
checkpoint, nothing read back from the device inside a step. It imports nothing of Rung.

    python benchmarks/bare_llama.py --hidden 512 --inner 1376 --layers 8 --heads 8 --batch 8 --seq 256
    python benchmarks/bare_llama.py --device cuda --precision bf16 --compile ...
"""

# B sequences, T tokens, D features, H heads, K key/value heads, E head size, V vocabulary, S steps

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRECISIONS = ("float32", "bf16", "bf16_parameters")


@dataclass
class Shape:
    """Hugging Face's names; the defaults are llama_60m."""

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    first, second = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, head = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(width, shape.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, shape.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(width, shape.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * head, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        heads, kv_heads = self.shape.num_attention_heads, self.shape.num_key_value_heads
        q_BHTE = self.q_proj(x_BTD).unflatten(-1, (heads, -1)).transpose(1, 2)
        k_BKTE = self.k_proj(x_BTD).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        v_BKTE = self.v_proj(x_BTD).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        out_BHTE = F.scaled_dot_product_attention(
            rotate(q_BHTE, cos_TE, sin_TE),
            rotate(k_BKTE, cos_TE, sin_TE),
            v_BKTE,
            is_causal=True,
            enable_gqa=heads != kv_heads,
        )
        return self.o_proj(out_BHTE.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TE, sin_TE)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Llama(nn.Module):
    """Parameter names are Hugging Face's without the leading ``model.``."""

    cos_TE: Tensor
    sin_TE: Tensor

    def __init__(self, shape: Shape, seq_len: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        inv_freq = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles_TE = torch.outer(torch.arange(seq_len), torch.cat((inv_freq, inv_freq)))
        self.register_buffer("cos_TE", angles_TE.cos(), persistent=False)
        self.register_buffer("sin_TE", angles_TE.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=shape.initializer_range)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """The mean loss over all labels; activations in ``dtype``."""
        x_BTD = self.embed_tokens(tokens_BT).to(dtype)
        cos_TE, sin_TE = self.cos_TE.to(dtype), self.sin_TE.to(dtype)
        for block in self.layers:
            x_BTD = block(x_BTD, cos_TE, sin_TE)
        logits_BTV = self.lm_head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten())


def steps(
    model: Llama,
    tokens_SBT: Tensor,
    *,
    micro_batch_size: int,
    precision: str = "float32",
    compile_model: bool = False,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_grad_norm: float = 1.0,
) -> Iterator[Tensor]:
    """Train; every ``next`` runs one step and gives its loss, a 0-dim tensor on the device.

    ``tokens_SBT`` holds a step's sequences per row, each one token longer than the model sees, and lies on the model's
    device. float32: all in float32. bf16: float32 parameters, autocast. bf16_parameters: parameters, gradients and
    optimizer state in bf16, which is faster than what Rung promises with precision=bf16.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    forward: Callable[..., Tensor] = torch.compile(model) if compile_model else model
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    device_type = tokens_SBT.device.type
    for window_BT in tokens_SBT:
        micro_batches = window_BT.long().split(micro_batch_size)
        total = torch.zeros((), device=tokens_SBT.device)
        for micro_BT in micro_batches:
            cast = torch.autocast(device_type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
            with cast:
                loss = forward(micro_BT[:, :-1], micro_BT[:, 1:], dtype) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield total


def make(shape: Shape, seq_len: int, precision: str, device: str) -> Llama:
    """A model on its device, randomly initialised."""
    with torch.device(device):
        model = Llama(shape, seq_len)
    return model.bfloat16() if precision == "bf16_parameters" else model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Shape()
    parser.add_argument("--vocab", type=int, default=default.vocab_size)
    parser.add_argument("--hidden", type=int, default=default.hidden_size)
    parser.add_argument("--inner", type=int, default=default.intermediate_size)
    parser.add_argument("--layers", type=int, default=default.num_hidden_layers)
    parser.add_argument("--heads", type=int, default=default.num_attention_heads)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences per forward pass; 0: the whole batch")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    shape = Shape(args.vocab, args.hidden, args.inner, args.layers, args.heads, args.heads, args.hidden // args.heads)
    model = make(shape, args.seq, args.precision, args.device)
    tokens = torch.randint(args.vocab, (args.steps, args.batch, args.seq + 1), device=args.device)
    seconds, losses, before = [], [], time.perf_counter()
    for loss in steps(
        model,
        tokens,
        micro_batch_size=args.micro_batch or args.batch,
        precision=args.precision,
        compile_model=args.compile,
    ):
        losses.append(loss.item())  # here a wait for the device is what is wanted
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    rate = args.batch * args.seq / statistics.median(seconds[args.steps // 3 :])
    print(f"{rate:.1f} tokens/s, the median of the last two thirds of {args.steps} steps")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()

"""Async tensor parallelism: torch finds the products beside our collectives, and computes the same with them joined.

The joined operations run on CUDA only. Here torch's own fallbacks take their place, which compute what they must.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from law.workers import Workers

from rung.data import Batch
from rung.layout import Layout
from rung.objectives import CausalLM
from rung.parallel import World
from rung.recipes.config import Config, load_config
from rung.recipes.pretrain import spread_model

JOINED = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")


def gradients(config: Config, layout: Layout) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """On a rank: the gradients of one batch, and how many joined operations ran."""
    from torch.distributed import _symmetric_memory as symmetric

    ran: Counter[str] = Counter()
    library = torch.library.Library("symm_mem", "IMPL")
    for name in JOINED:
        library.impl(name, functools.partial(count, ran, name), "CPU")
    world = World(torch.distributed.get_rank(), 0, layout.world_size, torch.device("cpu"))
    backend = mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=join_and_run()))
    nccl = mock.patch("torch.distributed.is_nccl_available", return_value=True)  # torch looks for nothing without it
    with backend, nccl, symmetric._test_mode():
        model = spread_model(config, layout, world)
        parameters = model.local_parameters()
        tokens = torch.arange(64).view(4, 16) * 7 % config.model.vocab_size
        batch = Batch(tokens, tokens, torch.arange(4), torch.arange(16).expand(4, 16))
        objective = CausalLM(model.cross_entropy)
        model.forward_backward([batch], torch.zeros((), dtype=torch.int64), lambda x, b: objective.sums(x, b)["loss"])
        model.finish_gradients(parameters)
    return {parameter.name: parameter.gradient().clone() for parameter in parameters}, ran


def count(ran: Counter[str], name: str, *args: Any, **kwargs: Any) -> Any:
    from torch.distributed import _symmetric_memory as symmetric

    ran[name] += 1
    return getattr(symmetric, f"_{name}_fallback")(*args, **kwargs)


def join_and_run() -> Any:
    """A compiler that joins as inductor does when ``_micro_pipeline_tp`` is set, and generates no code."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensor

    def compile_graph(module: torch.fx.GraphModule, inputs: Any) -> Any:
        view_to_reshape(module)
        mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
        with V.set_fake_mode(mode), config.patch(_micro_pipeline_tp=True):
            post_grad_passes(module, is_inference=False)
        module.recompile()
        return make_boxed_func(module.forward)

    return aot_autograd(
        fw_compiler=compile_graph,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )


def test_collectives_are_joined_with_products(corpus: Path, workers: Workers) -> None:
    overrides = ["model=tiny", "data=corpus", f"data.paths=[{corpus}]", "data.seq_len=16", "precision=float64"]
    overrides += [
        "device=cpu",
        "parallel.tp=2",
        "model.num_hidden_layers=2",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
    ]
    apart = workers.run(2, gradients, *load_config(overrides, 2))
    config, layout = load_config([*overrides, "compile=true"], 2)
    layers = config.model.num_hidden_layers
    for (expected, none), (found, ran) in zip(apart, workers.run(2, gradients, config, layout), strict=True):
        assert not none
        # Attention and feed-forward both begin and end with one, in the forward pass alone.
        assert all(ran[name] >= 2 * layers for name in JOINED), ran
        assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-12

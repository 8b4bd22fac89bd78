"""Which layouts a model can be spread over: arithmetic only, before any process group exists.

A choice of method (``pp_schedule``, ``cp_method``, ``sequence_parallel``, ``defer_gradient_sync``) is one of how to do
something and holds wherever there is something to do. A number of ranks, stages or layers, or an overlap, that finds
none to act on is an error: it would be ignored in silence.
"""

from __future__ import annotations

from math import gcd, lcm

from rung.layout import Layout
from rung.layout.context import context_problems
from rung.layout.stages import SCHEDULES, schedule_problems
from rung.layout.values import divisors, heads_of_rank, listed, nearest_multiples
from rung.models.config import ModelConfig
from rung.parallel.config import ParallelConfig

__all__ = ["layout_problems"]


def layout_problems(
    parallel: ParallelConfig,
    model: ModelConfig,
    layout: Layout | None,
    *,
    seq_len: int,
    num_micro_batches: int | None,
    compile: bool,
    device: str,
    precision: str,
) -> list[str]:
    """Everything that stands against this layout, one message with the values, the legal ones and the fix each.

    ``layout`` and ``num_micro_batches`` (of a data rank in a step) are None where they could not be made: then all is
    said that needs neither. ``device`` is a setting: auto, cpu or cuda. Degrees and sizes below 1 are others' to
    report, as what makes no sense for a model or a layout alone; nothing is said here that rests on one.

    ``defer_gradient_sync`` with a pipeline is no contradiction: a pipeline defers whether it is asked to or not.
    """
    problems = []
    if parallel.tp >= 1:
        problems += _tensor_problems(parallel, model, seq_len)
        problems += _async_problems(parallel, compile, device)
    if parallel.cp >= 1:
        problems += _context_problems(parallel, model, seq_len)
    if parallel.pp >= 1 and parallel.pp_schedule in SCHEDULES and parallel.pp_virtual_stages >= 0:
        problems += schedule_problems(
            parallel.pp_schedule,
            parallel.pp,
            parallel.pp_virtual_stages,
            # A number that every schedule can run, where there is none to complain of.
            parallel.pp if num_micro_batches is None else num_micro_batches,
            max(1, model.num_hidden_layers),
            parallel.pp_layers,
        )
        problems += _reshard_problems(parallel, layout, compile, precision)
    return problems


def _tensor_problems(parallel: ParallelConfig, model: ModelConfig, seq_len: int) -> list[str]:
    tp, heads, kv_heads = parallel.tp, model.num_attention_heads, model.num_key_value_heads
    problems = []
    if heads >= 1 and heads % tp:
        legal = divisors(heads)
        problems.append(f"tp={tp} does not divide num_attention_heads={heads}; legal values: {listed(legal)}")
    if heads >= 1 and kv_heads >= 1 and kv_heads % tp and tp % kv_heads:
        legal = [n for n in divisors(heads) if kv_heads % n == 0 or n % kv_heads == 0]
        problems.append(
            f"tp={tp} neither divides num_key_value_heads={kv_heads} nor is a multiple of it: ranks hold whole K/V "
            f"heads, or neighbours the same one; legal values: {listed(legal)}"
        )
    if model.intermediate_size >= 1 and model.intermediate_size % tp:
        legal = divisors(gcd(max(1, heads), model.intermediate_size))
        problems.append(
            f"tp={tp} does not divide intermediate_size={model.intermediate_size}; legal values: {listed(legal)}"
        )
    cp = max(1, parallel.cp)
    if tp > 1 and parallel.sequence_parallel and seq_len >= 1 and seq_len % (cp * tp):
        unit = lcm(cp * tp, 2 * cp if cp > 1 else 1)
        ranks = f"tp = {tp}" if cp == 1 else f"cp · tp = {cp * tp}"
        problems.append(
            f"seq_len={seq_len} is not a multiple of {ranks}, and sequence_parallel=true splits the tokens of the "
            f"residual stream evenly; use {nearest_multiples(seq_len, unit)}, or set sequence_parallel=false"
        )
    return problems


def _async_problems(parallel: ParallelConfig, compile: bool, device: str) -> list[str]:
    if not parallel.async_tp:
        return []
    missing = []
    if parallel.tp == 1:
        missing.append("tp of 2 or more (it is 1)")
    if not parallel.sequence_parallel:
        missing.append("sequence_parallel=true (it is false: all-reduces are not overlapped)")
    if not compile:
        missing.append("compile=true (it is false)")
    if device == "cpu":
        missing.append("CUDA (device is cpu)")
    needs = ", ".join(missing)
    return [f"async_tp=true needs {needs}; change that, or set async_tp=false"] if missing else []


def _context_problems(parallel: ParallelConfig, model: ModelConfig, seq_len: int) -> list[str]:
    cp, degree, method = parallel.cp, parallel.cp_ulysses_degree, parallel.cp_method
    if degree < 0:
        return [f"cp_ulysses_degree={degree} must be 0 (1 for ring, cp for ulysses) or more"]
    if cp == 1:
        return [
            f"cp_ulysses_degree={degree} has no meaning with cp=1, where one rank sees every token; leave it out, or "
            f"set cp to {degree} or a multiple of it"
        ] * (degree > 1)
    problems = []
    if method == "ulysses" and degree not in (0, cp):
        fits = degree > 1 and cp % degree == 0
        what = f" of {cp // degree} places of {degree} ranks that exchange heads" if fits else ""
        problems.append(
            f"cp_method=ulysses exchanges heads among all of cp={cp} ranks, which cp_ulysses_degree={degree} denies; "
            f"leave cp_ulysses_degree out, or use cp_method=ring for a ring{what}"
        )
        degree = 1
    elif method == "ring" and degree == cp:
        problems.append(
            f"cp_method=ring with cp_ulysses_degree={degree} = cp leaves no ring; use cp_method=ulysses, or a smaller "
            "cp_ulysses_degree"
        )
    heads, tp = model.num_attention_heads, max(1, parallel.tp)
    here = heads // tp if heads >= 1 and heads % tp == 0 else 0
    if method == "ulysses" and degree == 0 and here and here % cp:
        legal = [n for n in divisors(cp) if here % n == 0]
        where = heads_of_rank(heads, tp)
        both = f", with cp_ulysses_degree={listed(legal[1:])} if need be" if len(legal) > 1 else ""
        problems.append(
            f"cp_method=ulysses deals the {here} heads of a rank ({where}) to cp={cp} ranks, which does not divide "
            f"them; legal values of cp: {listed(divisors(here))}; or use cp_method=ring{both}"
        )
    if seq_len >= 1:
        problems += context_problems(seq_len, cp, max(1, degree), here * tp or None, tp)
    return problems


def _reshard_problems(parallel: ParallelConfig, layout: Layout | None, compile: bool, precision: str) -> list[str]:
    """A split backward looks for parameters that resharding has freed: it would lose their gradients in silence."""
    if not (parallel.backward_is_split(compiled=compile) and parallel.reshard_after_forward):
        return []
    # Without a layout the degrees as given are what there is to go by; -1 stands for whatever is left.
    degrees = (layout.data_size, layout.cp) if layout else (parallel.dp_replicate, parallel.dp_shard, parallel.cp)
    if all(degree == 1 for degree in degrees) and precision != "bf16":
        return []  # no FSDP
    return [
        f"reshard_after_forward=true with pp_schedule={parallel.pp_schedule} would lose gradients: the schedule takes "
        "those of weights after those of inputs, when FSDP has freed the gathered weights; set "
        "reshard_after_forward=null (or false), use another pp_schedule, or run its backward passes whole with "
        "activation_checkpointing=selective"
    ]

"""Pipeline stages as arithmetic: who holds which, which layers each has, what a schedule needs, keeps and wastes.

Imports no torch. The model is cut into ``pp · virtual`` stages of whole layers; the embedding goes with the first, the
norm and the head with the last. ``virtual`` is the number of stages per rank. Two placements: looped, where rank r
holds r, r + pp, r + 2 pp …, and the V of zbv, where it holds r and 2 pp - 1 - r, so that rank 0 has both ends.

The formulas describe what ``torch.distributed.pipelining`` runs (2.11 to 2.13), and tests hold them against real runs.
They count in slots: the forward pass of one micro-batch through one stage is one slot, backward two, of which
zero-bubble schedules run the gradient of the inputs and that of the weights apart, one slot each. p stands for pp, v
for virtual, m for micro-batches, r for the rank.

Sources: GPipe (Huang et al. 2019, arXiv:1811.06965), 1F1B and interleaving (Narayanan et al. 2021, arXiv:2104.04473),
zero bubble and its V (Qi et al. 2023, arXiv:2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

__all__ = [
    "SCHEDULES",
    "SINGLE_STAGE_SCHEDULES",
    "bubble_share",
    "default_virtual_stages",
    "idle_slots",
    "layers_of_stages",
    "num_boundary_buffers",
    "peak_live_micro_batches",
    "rank_of_stage",
    "schedule_problems",
    "split_layers",
    "splits_backward",
    "stages_of",
]

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
"""Orders in which stages run forward and backward passes."""

SINGLE_STAGE_SCHEDULES = ("gpipe", "1f1b")
"""Those in which a rank has one stage."""

_INTERLEAVED = ("interleaved_1f1b", "interleaved_zero_bubble")


def default_virtual_stages(schedule: str) -> int:
    """Stages per rank where none are asked for."""
    return 1 if schedule in SINGLE_STAGE_SCHEDULES else 2


def splits_backward(schedule: str) -> bool:
    """Whether the schedule runs gradients of inputs and of weights apart, to fill bubbles with the latter."""
    return schedule in ("interleaved_zero_bubble", "zbv")


def stages_of(schedule: str, pp: int, virtual: int, rank: int) -> list[int]:
    """The stages that a rank holds, in the order in which a micro-batch visits them."""
    if pp == 1 and virtual == 1:  # no pipeline, whatever its schedule would be
        return [0]
    if schedule == "zbv":
        return [rank, 2 * pp - 1 - rank]
    return [rank + pp * turn for turn in range(virtual)]


def rank_of_stage(schedule: str, pp: int, virtual: int, stage: int) -> int:
    """The rank that holds a stage."""
    if not 0 <= stage < pp * virtual:
        raise ValueError(f"stage={stage} is not one of the {pp * virtual} of pp={pp} × virtual={virtual}")
    return min(stage, 2 * pp - 1 - stage) if schedule == "zbv" else stage % pp


def layers_of_stages(counts: Sequence[int]) -> list[range]:
    """The layers of each stage, from how many each has."""
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def split_layers(
    layer_costs: Sequence[float],
    first_extra: float,
    last_extra: float,
    num_stages: int,
    memory: Callable[[int, range], float] | None = None,
) -> list[int]:
    """How many layers each stage has, in order, so that the dearest stage is as cheap as it can be.

    ``layer_costs`` are FLOPs, or anything proportional to time; ``first_extra`` is the embedding's and ``last_extra``
    the norm's and head's. The slowest stage paces every schedule, so its cost comes first. Among splits of equal cost
    the one whose fullest stage needs least memory is taken (``memory(stage, layers)``, in any unit), then the most even
    one, by the sum of squared costs. The answer is exact, by dynamic programming in O(stages · layers²).

    Every stage has a layer: a stage with none would pay for its messages and its slots in the schedule and do nothing
    in most of them. ValueError where there are fewer layers than stages; ``schedule_problems`` says it to the user.
    """
    num_layers = len(layer_costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot be split into {num_stages} stages of one or more")
    sums = [0.0, *accumulate(layer_costs)]

    def cost(stage: int, begin: int, end: int) -> float:
        extra = first_extra * (stage == 0) + last_extra * (stage == num_stages - 1)
        return sums[end] - sums[begin] + extra

    def weight(stage: int, begin: int, end: int) -> float:
        return 0.0 if memory is None else memory(stage, range(begin, end))

    # Sums of floats differ in their last bits by the way they were added up: such splits are equal.
    def allowed(value: float, limit: float) -> bool:
        return value <= limit + 1e-9 * abs(limit)

    def best(
        legal: Callable[[int, int, int], bool], value: Callable[[int, int, int], float], join: Callable[..., float]
    ) -> tuple[float, list[int]]:
        """The least join of the values of stages, over splits into legal stages, and the ends of its stages."""
        # For each number of layers so far: the least value of a split of them, and the ends of its stages.
        found: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for stage in range(num_stages):
            left = num_stages - 1 - stage
            longer: dict[int, tuple[float, list[int]]] = {}
            for begin, (before, ends) in found.items():
                stop = num_layers - left
                for end in range(begin + 1 if left else num_layers, stop + 1):
                    if not legal(stage, begin, end):
                        continue
                    total = join(before, value(stage, begin, end))
                    if end not in longer or total < longer[end][0]:
                        longer[end] = (total, [*ends, end])
            found = longer
        return found[num_layers]

    dearest, _ = best(lambda *_: True, cost, max)
    fullest, _ = best(lambda *at: allowed(cost(*at), dearest), weight, max)
    _, ends = best(
        lambda *at: allowed(cost(*at), dearest) and allowed(weight(*at), fullest),
        lambda *at: cost(*at) ** 2,
        lambda before, squared: before + squared,
    )
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def schedule_problems(
    schedule: str,
    pp: int,
    virtual: int,
    num_micro_batches: int,
    num_layers: int,
    pp_layers: Sequence[int] = (),
) -> list[str]:
    """All that is wrong with a pipeline, one message with values, legal values and the fix each.

    ``virtual`` 0 means ``default_virtual_stages``; ``num_micro_batches`` is per data rank and step.
    """
    if schedule not in SCHEDULES:
        return [f"pp_schedule={schedule!r} is unknown; legal values: {', '.join(SCHEDULES)}"]
    if pp == 1:
        ignored = {"pp_virtual_stages": virtual if virtual > 1 else 0, "pp_layers": list(pp_layers)}
        return [
            f"{name}={value} has no meaning with pp=1, where one rank holds every layer; leave it out, or set pp"
            for name, value in ignored.items()
            if value
        ]
    return [
        *_virtual_problems(schedule, virtual),
        *_layer_problems(schedule, pp, virtual or default_virtual_stages(schedule), num_layers, pp_layers),
        *_micro_batch_problems(schedule, pp, num_micro_batches),
    ]


def _virtual_problems(schedule: str, virtual: int) -> list[str]:
    legal = {"gpipe": "1", "1f1b": "1", "interleaved_1f1b": "2 or more", "zbv": "2"}.get(schedule, "1 or more")
    allowed = {
        "gpipe": virtual == 1,
        "1f1b": virtual == 1,
        "interleaved_1f1b": virtual >= 2,  # with one stage per rank it is 1f1b that keeps more
        "zbv": virtual == 2,
    }.get(schedule, virtual >= 1)
    if virtual == 0 or allowed:
        return []
    others = [name for name in _INTERLEAVED if virtual >= 2 and name != schedule]
    fix = f", or pp_schedule={' or '.join(others)}" if others else ""
    return [
        f"pp_virtual_stages={virtual} is not what pp_schedule={schedule} can run; "
        f"legal values: {legal} (0 takes {default_virtual_stages(schedule)}){fix}"
    ]


def _layer_problems(schedule: str, pp: int, virtual: int, num_layers: int, pp_layers: Sequence[int]) -> list[str]:
    problems = []
    stages = pp * virtual
    stages_are = f"pp={pp} × pp_virtual_stages={virtual} = {stages} stages"
    if virtual >= 1 and num_layers < stages:
        fixes = [f"pp up to {num_layers // virtual}"] if num_layers >= 2 * virtual else []
        if schedule in _INTERLEAVED and num_layers // pp > (schedule == "interleaved_1f1b"):
            fixes.append(f"pp_virtual_stages up to {num_layers // pp}")
        if virtual > 1 and num_layers >= pp:
            fixes.append("pp_schedule=1f1b, which has one stage per rank")
        problems.append(
            f"{stages_are} need a layer each, but the model has num_hidden_layers={num_layers}; "
            f"use {', or '.join(fixes) or f'a model of at least {stages} layers'}"
        )
    if not pp_layers:
        return problems
    given = f"pp_layers={list(pp_layers)}"
    if virtual >= 1 and len(pp_layers) != stages:
        problems.append(f"{given} names {len(pp_layers)} stages, but {stages_are}; give one number for each")
    if min(pp_layers) < 1:
        problems.append(f"{given} leaves a stage without a layer; every number must be 1 or more")
    if sum(pp_layers) != num_layers:
        problems.append(f"{given} sums to {sum(pp_layers)}, not to num_hidden_layers={num_layers}")
    return problems


def _micro_batch_problems(schedule: str, pp: int, num_micro_batches: int) -> list[str]:
    has = f"pp_schedule={schedule} with pp={pp} has {num_micro_batches} micro-batches on each data rank in a step"
    change = "change global_batch_size or micro_batch_size"
    if num_micro_batches < 1:
        return [f"{has}; it needs at least 1: {change}"]
    if schedule == "1f1b" and num_micro_batches < pp:
        return [f"{has} and needs at least {pp}, one for each stage; {change}, or use pp_schedule=gpipe"]
    if schedule in _INTERLEAVED and not _divides_into_rounds(pp, num_micro_batches):
        near = [
            next((n for n in numbers if _divides_into_rounds(pp, n)), None)
            for numbers in (range(num_micro_batches, 0, -1), range(num_micro_batches, 2 * num_micro_batches + pp))
        ]
        legal = " or ".join(str(number) for number in near if number is not None)
        rounds = num_micro_batches // pp
        return [
            f"{has}, which do not divide into {rounds} rounds of equal size (as many rounds as pp fits into them); "
            f"nearest legal values: {legal}; {change}"
        ]
    return []


def _divides_into_rounds(pp: int, num_micro_batches: int) -> bool:
    return num_micro_batches % max(1, num_micro_batches // pp) == 0


def _round_size(pp: int, num_micro_batches: int) -> int:
    """Micro-batches that an interleaved schedule sends through one stage before it turns to the rank's next one."""
    return num_micro_batches // max(1, num_micro_batches // pp)


def peak_live_micro_batches(
    schedule: str, pp: int, virtual: int, num_micro_batches: int, rank: int, *, split_backward: bool = True
) -> int:
    """The most forward passes that a rank keeps activations of at once; each is of one stage, 1/virtual of its layers.

    A pass is live from its forward to the end of its backward, that of the weights included. With g micro-batches a
    round (m // max(1, m // p)):

    - gpipe: m.
    - 1f1b: min(m, p - r).
    - interleaved_1f1b: min(m v, (v - 1) g + 2 (p - 1 - r) + 1), the paper's warm-up (section 2.2) and one more.
    - interleaved_zero_bubble: min(m v, (v - 1) g + p), the same on every rank: a rank puts off as many gradients of
      weights as it has fewer warm-up passes (ZB-H1 keeps p for v = 1). Not split: (v - 1) g + p - r.
    - zbv: min(2 p, 2 m, m + 1 + r): the memory of 1f1b on its first rank, on every rank. Split or not.

    ``split_backward`` off says that a zero-bubble schedule runs whole backward passes in the place of those of inputs.
    """
    p, v, m, r = pp, virtual, num_micro_batches, rank
    if schedule == "gpipe":
        return m
    if schedule == "1f1b":
        return min(m, p - r)
    if schedule == "zbv":
        return min(2 * p, 2 * m, m + 1 + r)
    before = (v - 1) * _round_size(p, m)
    if schedule == "interleaved_1f1b":
        return min(m * v, before + 2 * (p - 1 - r) + 1)
    return min(m * v, before + (p if split_backward else p - r))


def idle_slots(schedule: str, pp: int, virtual: int, num_micro_batches: int, *, split_backward: bool = True) -> int:
    """Slots in which a rank waits in a step, from the first forward of any rank to the last backward of any.

    It is the same on every rank where all stages take equal time, gradients of inputs and of weights too, and messages
    take none. A rank works 3 m v slots besides. A slot is one stage's: 1/virtual as long as one of an uncut rank.

    - gpipe, 1f1b: 3 (p - 1), that is (p - 1)(F + B).
    - interleaved_1f1b: 3 (p - 1), in slots of 1/v, so (p - 1)(F + B)/v as in the paper; with m < p a turn through a
      rank's stages is not full and 3 (v - 1)(p - m) are added. The same for interleaved_zero_bubble when not split.
    - interleaved_zero_bubble: p - 1, that is (p - 1)(F + B - 2 W) of ZB-H1; with m < p it is
      2 p v + max(2 m - 1, (2 m - p) v + p - 1) - 3 m v.
    - zbv: max(p - 1, 4 (p - 1) - 2 (m - 1)). The paper's zero counts each rank from its own first pass to its own last;
      the p - 1 slots left are how much later the last rank begins, and how much earlier the first one ends. Not split:
      4 (p - 1) + 2 max(0, p - m), in slots of 1/2, still less than 1f1b.
    """
    p, v, m = pp, virtual, num_micro_batches
    if p == 1:
        return 0
    if schedule in SINGLE_STAGE_SCHEDULES:
        return 3 * (p - 1)
    if schedule == "zbv":
        return max(p - 1, 4 * (p - 1) - 2 * (m - 1)) if split_backward else 4 * (p - 1) + 2 * max(0, p - m)
    if schedule == "interleaved_1f1b" or not split_backward:
        return 3 * (p - 1) + 3 * (v - 1) * max(0, p - m)
    if m >= p:
        return p - 1
    return 2 * p * v + max(2 * m - 1, (2 * m - p) * v + p - 1) - 3 * m * v


def bubble_share(schedule: str, pp: int, virtual: int, num_micro_batches: int, *, split_backward: bool = True) -> float:
    """Idle slots as a share of all slots of a step, idle ones included: (p - 1)/(m + p - 1) for gpipe and 1f1b.

    Papers often divide by the working slots instead: (p - 1)/m.
    """
    idle = idle_slots(schedule, pp, virtual, num_micro_batches, split_backward=split_backward)
    return idle / (3 * num_micro_batches * virtual + idle)


def num_boundary_buffers(schedule: str, pp: int, virtual: int, num_micro_batches: int, rank: int) -> int:
    """Buffers of a boundary's size that a rank keeps for the whole step, for activations and for their gradients.

    torch keeps one for every micro-batch of every stage that receives, whatever the schedule's peak.
    """
    last = pp * virtual - 1
    return num_micro_batches * sum((s > 0) + (s < last) for s in stages_of(schedule, pp, virtual, rank))

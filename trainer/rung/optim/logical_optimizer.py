"""What SPAM and Stable-SPAM share: an optimizer of torch's kind that knows its parameters as logical tensors.

So the same update comes out however parameters are spread, and the host never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rung.layout import LogicalTensor, clean_name, local_view
from rung.optim.base import Events, LocalParameter, Packed, is_count
from rung.optim.torch_optimizer import MOMENTS, TorchOptimizer
from rung_kernels.reference import Factor

__all__ = [
    "LogicalOptimizer",
    "Member",
    "RunOptimizer",
    "factors",
    "flat_state",
    "learning_rate",
    "number",
    "rows_at_once",
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Member:
    """A parameter of an optimizer, whatever it was given as."""

    tensor: Tensor
    """What torch knows it by."""
    name: str
    logical: LogicalTensor
    groups: tuple[dist.ProcessGroup, ...]
    """Groups of which the product holds the whole tensor, one after another; none where this rank holds all of it."""
    steps: Tensor
    """int64 []: steps that its parameter group has done; shared by the group's members on one device."""

    @property
    def local(self) -> Tensor:
        """The plain local tensor, outside autograd."""
        return local_view(self.tensor).detach()

    def gradient(self) -> Tensor | None:
        """Of the local elements, spread like them. ValueError where it is sparse, or no DTensor as its parameter is."""
        gradient = self.tensor.grad
        if gradient is None:
            return None
        if gradient.layout != torch.strided:
            raise ValueError(f"{self.name}: the gradient is {gradient.layout}; make it dense (sparse=False)")
        if isinstance(self.tensor, DTensor) != isinstance(gradient, DTensor):
            raise ValueError(f"{self.name}: parameter and gradient must both be DTensors, or neither")
        if isinstance(gradient, DTensor):
            assert isinstance(self.tensor, DTensor)
            where = self.tensor.device_mesh, self.tensor.placements
            if (gradient.device_mesh, gradient.placements) != where:
                gradient = gradient.redistribute(*where)
            gradient = gradient.to_local()
            if hasattr(gradient, "wait"):  # a collective may be under way
                gradient = gradient.wait()
        return gradient.detach()


class LogicalOptimizer(torch.optim.Optimizer):
    """Base of optimizers over plain parameters, DTensors of any sharding, or ``LocalParameter`` s.

    It follows the protocol of ``torch.amp.GradScaler`` as torch's fused optimizers do: gradients are divided by the
    attribute ``grad_scale``, and where ``found_inf`` is 1.0 nothing changes, the step counter included.

    Moments are float32 for parameters of less precision: β2·v rounds to v in bfloat16 when β2 is near 1, and squares of
    small gradients to 0 in float16.
    """

    _step_supports_amp_scaling = True

    spikes: Tensor
    """int64 []: gradient elements that the last step clipped. SPAM counts what this rank owns, Stable-SPAM all."""
    resets: Tensor
    """int64 []: 1 where the last step reset moments."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._members: dict[Tensor, Member] = {}
        super().__init__(params, defaults)
        self.spikes = torch.zeros((), dtype=torch.int64)
        self.resets = torch.zeros((), dtype=torch.int64)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``params`` may hold parameters, pairs of name and parameter, or LocalParameters."""
        group = dict(param_group)
        entries = group["params"]
        entries = [entries] if isinstance(entries, Tensor | LocalParameter) else list(entries)
        given = {entry.local: entry for entry in entries if isinstance(entry, LocalParameter)}
        group["params"] = [entry.local if isinstance(entry, LocalParameter) else entry for entry in entries]
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            self._adopt(group, given)
        except BaseException:
            for tensor in self.param_groups.pop()["params"]:
                self._members.pop(tensor, None)
                self.state.pop(tensor, None)
            raise

    def _adopt(self, group: dict[str, Any], given: Mapping[Tensor, LocalParameter]) -> None:
        tensors, first = group["params"], len(self._members)
        names = group.get("param_names") or [f"param.{first + index}" for index in range(len(tensors))]
        names = [given[t].name if t in given else clean_name(n) for n, t in zip(names, tensors, strict=True)]
        problems = self.problems(group)
        taken = {member.name for member in self._members.values()}
        problems += [f"two parameters are called {n!r}" for i, n in enumerate(names) if n in {*names[:i], *taken}]
        problems += [text for name, tensor in zip(names, tensors, strict=True) if (text := _unfit(name, tensor))]
        if problems:
            raise ValueError("; ".join(problems))
        steps: dict[torch.device, Tensor] = {}
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.device not in steps:
                steps[tensor.device] = torch.zeros((), dtype=torch.int64, device=tensor.device)
            if tensor in given:
                logical, groups = given[tensor].logical, tuple(filter(None, [given[tensor].group]))
            else:
                logical, groups = LogicalTensor.from_tensor(name, tensor), _mesh_groups(tensor)
            member = Member(tensor, name, logical, groups, steps[tensor.device])
            self._members[tensor] = member
            self.state[tensor] = {"step": member.steps}
        self.make_state(group)

    def members(self, group: Mapping[str, Any]) -> Iterator[tuple[Tensor, list[Member]]]:
        """The members of a parameter group, device by device, with the counter that they share."""
        by_steps: dict[int, list[Member]] = {}
        for tensor in group["params"]:
            member = self._members[tensor]
            by_steps.setdefault(id(member.steps), []).append(member)
        for members in by_steps.values():
            yield members[0].steps, members

    # What an optimizer says for itself.

    def problems(self, group: Mapping[str, Any]) -> list[str]:
        """What is wrong with the settings of a group."""
        problems = []
        if not (math.isfinite(group["lr"]) and group["lr"] >= 0):
            problems.append(f"lr={group['lr']} must be a finite number, 0 or more")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            problems.append(f"betas={group['betas']} must be two numbers in [0, 1), as (0.9, 0.999)")
        if not (math.isfinite(group["eps"]) and group["eps"] > 0):
            problems.append(f"eps={group['eps']} must be a finite number above zero")
        if not (math.isfinite(group["weight_decay"]) and group["weight_decay"] >= 0):
            problems.append(f"weight_decay={group['weight_decay']} must be a finite number, 0 or more")
        if not is_count(group["reset_interval"], 1):
            problems.append(
                f"reset_interval={group['reset_interval']} must be an integer, 1 or more, below 2^63; "
                "one that is longer than the run never resets"
            )
        return problems

    def make_state(self, group: dict[str, Any]) -> None:
        """Make what state is missing of a group that was added, or whose settings were loaded."""
        for tensor in group["params"]:
            for name in MOMENTS:
                if name not in self.state[tensor]:
                    self.state[tensor][name] = zeros_like(tensor)

    def update(self, scale: Tensor | None, skip: Tensor | None) -> None:
        """One step, from gradients divided by ``scale``, unless ``skip`` is 1.0; sets ``spikes`` and ``resets``."""
        raise NotImplementedError

    # What torch asks of every optimizer.

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled; use state_dict and load_state_dict")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Moments of others are reset when that is due."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

    def live_state(self, tensor: Tensor) -> dict[str, Tensor | Packed]:
        """State of a parameter by name, as it is kept."""
        return dict(self.state[tensor])

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer of torch. Moments are whole tensors, DTensors where the parameter is one."""
        result = super().state_dict()
        for index, tensor in enumerate(chain.from_iterable(group["params"] for group in self.param_groups)):
            result["state"][index] = {name: _dense(tensor, x) for name, x in self.live_state(tensor).items()}
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned, bit for bit. ValueError where it is of other parameters."""
        kept = dict(self.state)
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        tensors = list(chain.from_iterable(group["params"] for group in self.param_groups))
        wrong = [
            self._members[tensor].name
            for key, tensor in zip(saved, tensors, strict=False)
            if self.live_state(tensor).keys() - state_dict["state"].get(key, {}).keys()
        ]
        if wrong:
            raise ValueError(
                f"the state of {', '.join(wrong[:3])} is not of {type(self).__name__}: it lacks some of "
                f"{sorted(self.live_state(tensors[0]))}"
            )
        for index, group in enumerate(state_dict["param_groups"]):
            if missing := self.defaults.keys() - group.keys():
                raise ValueError(
                    f"group {index} of what is loaded is not of {type(self).__name__}: it lacks {sorted(missing)}"
                )
            if problems := self.problems(group):
                raise ValueError(f"group {index} of what is loaded: {'; '.join(problems)}")
        super().load_state_dict(state_dict)  # casts what it loads to the parameters' dtype: it is loaded again below
        self.state.clear()
        self.state.update(kept)
        for group in self.param_groups:
            self.make_state(group)
        for names in ({"step"}, None):  # packed moments are those of the step
            for key, tensor in zip(saved, tensors, strict=True):
                for name, target in self.live_state(tensor).items():
                    if names is None or name in names:
                        label = f"{self._members[tensor].name}/{name}"
                        _load(label, tensor, target, state_dict["state"][key][name])


class RunOptimizer(TorchOptimizer):
    """A ``LogicalOptimizer`` as the optimizer of a run."""

    inner: LogicalOptimizer

    def __init__(self, parameters: list[LocalParameter], optimizer: LogicalOptimizer, *, of_whole_tensors: bool):
        super().__init__(parameters, optimizer)
        self._of_whole_tensors = of_whole_tensors

    def state_of(self, parameter: LocalParameter) -> Mapping[str, Tensor | Packed]:
        return self.inner.live_state(parameter.local)

    def events(self) -> Events:
        return Events(self.inner.spikes, self.inner.resets, self._of_whole_tensors)


def zeros_like(tensor: Tensor) -> Tensor:
    """A moment of a parameter: contiguous, float32 at least, a DTensor where the parameter is one."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros_like(tensor.detach(), dtype=dtype, memory_format=torch.contiguous_format)


def flat_state(moment: Tensor) -> Tensor:
    """The local elements of a moment."""
    return local_view(moment).view(-1)


def factors(device: torch.device, values: Mapping[Factor, Tensor | float]) -> Tensor:
    """The tensor that ``rung_kernels.adamw_step`` and ``spam_step`` read; what is not said is 0, and the scale 1."""
    values = {Factor.GRAD_SCALE: 1.0, Factor.THRESHOLD: math.inf, **values}
    return torch.stack([number(values.get(factor, 0.0), device) for factor in Factor])


def number(value: Tensor | float, device: torch.device) -> Tensor:
    """float64 []; filled on the device, as a copy from the host would make it wait."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float64).reshape(())
    return torch.full((), value, dtype=torch.float64, device=device)


def learning_rate(group: Mapping[str, Any], device: torch.device) -> Tensor:
    """float64 []."""
    return number(group["lr"], device)


def rows_at_once(tensor: Tensor) -> int:
    """Rows of a tensor to work on at once: what is in a core's cache, or bounds a device's memory."""
    most = 1 << (18 if tensor.device.type == "cpu" else 24)
    return max(1, most * tensor.shape[0] // max(tensor.numel(), 1))


def _unfit(name: str, tensor: Tensor) -> str:
    """Why a tensor cannot be a parameter."""
    if tensor.dtype not in _DTYPES:
        return f"{name} is {tensor.dtype}; parameters are {', '.join(map(str, _DTYPES))}"
    if tensor.layout != torch.strided:
        return f"{name} is {tensor.layout}; parameters are dense tensors"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"{name} is on {tensor.device}; move it to the CPU or a CUDA device first"
    return ""


def _mesh_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """See ``Member.groups``."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    dims = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    if len(dims) > 1 and mesh.size() == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return (world,)
    return tuple(mesh.get_group(dim) for dim in dims)


def _dense(parameter: Tensor, state: Tensor | Packed) -> Tensor:
    if isinstance(state, Tensor):
        return state
    dense = zeros_like(parameter)
    local_view(dense).copy_(state.dense())
    return dense


def _load(label: str, parameter: Tensor, target: Tensor | Packed, value: Any) -> None:
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value)
    if isinstance(value, DTensor):
        assert isinstance(parameter, DTensor), label
        if value.placements != parameter.placements:
            value = value.redistribute(parameter.device_mesh, parameter.placements)
        value = local_view(value)
    elif isinstance(target, DTensor):
        raise ValueError(
            f"{label} must be a DTensor as its parameter is: load it by torch.distributed.checkpoint.state_dict"
        )
    here = target if isinstance(target, Packed) else local_view(target)
    if here.shape != value.shape:
        raise ValueError(f"{label} has shape {tuple(value.shape)} in what is loaded, {tuple(here.shape)} here")
    if isinstance(here, Packed):
        here.store(value)
        if torch.count_nonzero(here.dense()) != torch.count_nonzero(value).to(here.device):
            raise ValueError(
                f"{label} belongs to another subset than it has here: names, seed, density and reset_interval must be "
                "those that it was saved with"
            )
    else:
        here.copy_(value)

"""What a checkpoint holds, and in what two of them differ, as a person reads it. Importing this needs no torch."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.checkpoint.format import Manifest, StoredTensor, is_optimizer_state, item_bytes, state_digest
from rung.checkpoint.reader import Reader
from rung.errors import UserError

__all__ = ["config_differences", "describe", "description", "differences", "select", "selected_digest"]

_HIGHLIGHTS = ("model", "optim", "schedule", "parallel")
"""The groups of the configuration that are shown."""
_WIDTH = 120
_ITEMS_AT_ONCE = 2**20


def select(manifests: Iterable[Manifest], prefix: str = "", model_only: bool = False) -> list[str]:
    """Names of tensors that begin with ``prefix``; without the optimizer's, whose names have a ``/``, if so asked.

    Raises UserError where that leaves none.
    """
    names = dict.fromkeys(name for manifest in manifests for name in manifest.tensors)
    chosen = [name for name in names if name.startswith(prefix) and not (model_only and is_optimizer_state(name))]
    if names and not chosen:
        first = sorted({name.partition(".")[0].partition("/")[0] for name in names})
        what = f"of a model begins with {prefix!r}" if model_only else f"begins with {prefix!r}"
        raise UserError(f"no tensor's name {what}; they begin with {', '.join(first)}")
    return sorted(chosen, key=_by_number)


def selected_digest(manifest: Manifest, names: Iterable[str]) -> str:
    """32 hex digits that name some tensors' names, dtypes, shapes and bits, without the progress of the run."""
    return state_digest((manifest.tensors[name] for name in names), {})


def description(reader: Reader, names: Sequence[str]) -> dict[str, Any]:
    """What ``describe`` shows and more, for programs."""
    manifest = reader.manifest
    return {
        "path": reader.where(),
        "step": manifest.step,
        "digest": manifest.digest,
        "num_bytes": sum(file.size for file in manifest.files.values()),
        "files": {name: file.size for name, file in manifest.files.items()},
        "progress": manifest.progress,
        "versions": manifest.versions,
        "fingerprints": manifest.fingerprints,
        "tensors": {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "digest": tensor.digest}
            for name in names
            for tensor in (manifest.tensors[name],)
        },
        "config": manifest.config,
    }


def describe(reader: Reader, names: Sequence[str], every_tensor: bool = False) -> str:
    """Facts of a checkpoint and a table of its tensors, those that differ by numbers in their names together."""
    manifest = reader.manifest
    facts = {"checkpoint": reader.where(), "step": f"{manifest.step:,}"}
    facts |= {key: _short(value) for key, value in _flat(manifest.progress) if key != "step"}
    num_bytes = sum(file.size for file in manifest.files.values())
    facts["size"] = f"{_bytes(num_bytes)} in {_count(len(manifest.files), 'file')}"
    facts["digest"] = manifest.digest
    facts["written by"] = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    facts |= {name: value for name, value in manifest.fingerprints.items() if value}
    for group in _HIGHLIGHTS:
        settings = _flat(manifest.config.get(group, {}))
        shown = [f"{key}={_short(value)}" for key, value in settings if value not in (None, False, "", [])]
        if shown:
            facts[group] = " ".join(shown)
    margin = max(map(len, facts)) + 2
    lines = [
        line
        for key, value in facts.items()
        for line in textwrap.wrap(
            value,
            _WIDTH,
            initial_indent=key.ljust(margin),
            subsequent_indent=" " * margin,
            break_long_words=False,
            break_on_hyphens=False,
        )
        or [key]
    ]
    tensors = [manifest.tensors[name] for name in names]
    lines += ["", f"{_count(len(tensors), 'tensor')}, {_bytes(sum(tensor.nbytes for tensor in tensors))}"]
    return "\n".join(lines + _table(tensors, every_tensor))


def differences(one: Reader, other: Reader, names: Sequence[str], progress: bool = True) -> Iterator[str]:
    """In what the states of two checkpoints, A and B, differ, line by line; nothing if they are equal."""
    a, b = one.manifest, other.manifest
    if progress:
        yield from _setting_differences("progress", a.progress, b.progress)
    for name in names:
        if name not in a.tensors or name not in b.tensors:
            yield f"{name}: only in {'A' if name in a.tensors else 'B'}"
            continue
        left, right = a.tensors[name], b.tensors[name]
        kinds = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (left, right)]
        if left.shape != right.shape:
            yield f"{name}: {kinds[0]} in A, {kinds[1]} in B"
        elif left.dtype != right.dtype or left.digest != right.digest:
            kind = kinds[0] if kinds[0] == kinds[1] else f"{kinds[0]} in A, {kinds[1]} in B"
            number, greatest = _compare(one.tensor(name), left.dtype, other.tensor(name), right.dtype)
            most = f"{greatest:.6g}" if isinstance(greatest, float) else str(greatest)
            yield f"{name}: {kind}: {number:,} of {prod(left.shape):,} elements differ, by at most {most}"


def config_differences(one: Reader, other: Reader) -> Iterator[str]:
    """Settings, versions and fingerprints that differ between A and B: no part of the state."""
    yield from _setting_differences("config", one.manifest.config, other.manifest.config)
    yield from _setting_differences("versions", one.manifest.versions, other.manifest.versions)
    yield from _setting_differences("fingerprints", one.manifest.fingerprints, other.manifest.fingerprints)


def _setting_differences(what: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    a, b = dict(_flat(one)), dict(_flat(other))
    for key in dict.fromkeys((*a, *b)):
        if key not in a or key not in b or a[key] != b[key]:
            left, right = (_short(side[key]) if key in side else "nothing" for side in (a, b))
            yield f"{what} {key}: {left} in A, {right} in B"


def _compare(
    one: NDArray[np.uint8], one_dtype: str, other: NDArray[np.uint8], other_dtype: str
) -> tuple[int, float | int]:
    """How many elements differ, in their bits or, of two dtypes, in their values; and the greatest difference.

    The latter is nan where one is not a number and the other is one or another.
    """
    widths = item_bytes(one_dtype), item_bytes(other_dtype)
    number = 0
    greatest: float | int = 0
    for first in range(0, len(one) // widths[0], _ITEMS_AT_ONCE):
        last = first + _ITEMS_AT_ONCE
        raw = one[first * widths[0] : last * widths[0]], other[first * widths[1] : last * widths[1]]
        a, b = _values(raw[0], one_dtype), _values(raw[1], other_dtype)
        if one_dtype == other_dtype:
            different = raw[0].view(f"<u{widths[0]}") != raw[1].view(f"<u{widths[0]}")
        else:
            different = (a != b) & ~(np.isnan(a) & np.isnan(b))
        if not different.any():
            continue
        number += int(different.sum())
        a, b = a[different], b[different]
        if a.dtype == b.dtype and a.dtype.kind in "iu":
            words = f"<u{a.itemsize}"  # the difference of two signed numbers may need one bit more
            distance: Any = np.maximum(a, b).view(words) - np.minimum(a, b).view(words)
        else:
            kind = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
            with np.errstate(invalid="ignore", over="ignore"):
                distance = np.abs(a.astype(kind) - b.astype(kind))
            distance = np.where(a == b, 0.0, distance)  # 0.0 and -0.0; infinities
        farthest = distance.max().item()
        if greatest == greatest and not farthest <= greatest:  # nan stays
            greatest = farthest
    return number, greatest


def _values(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """Elements as numbers that NumPy knows."""
    if dtype == "bfloat16":
        return (raw.view("<u2").astype("<u4") << 16).view("<f4")
    if dtype == "float8_e5m2":
        return (raw.astype("<u2") << 8).view("<f2")
    if dtype == "float8_e4m3fn":
        exponent, fraction = raw >> 3 & 15, (raw & 7).astype(np.float32)
        size = np.where(exponent == 0, fraction / 512, np.ldexp(8 + fraction, exponent.astype(np.int32) - 10))
        return np.where(raw & 127 == 127, np.nan, np.where(raw >> 7, -size, size))
    return raw if dtype == "bool" else raw.view(np.dtype(dtype).newbyteorder("<"))


def _table(tensors: Sequence[StoredTensor], every_tensor: bool) -> list[str]:
    """A line per tensor, or for all those that differ only by numbers in their names; the optimizer's last."""
    groups: dict[tuple[str, str, str], list[StoredTensor]] = {}
    for tensor in sorted(tensors, key=lambda tensor: (is_optimizer_state(tensor.name), _by_number(tensor.name))):
        name = tensor.name if every_tensor else re.sub(r"(?<![^./])\d+(?![^./])", "*", tensor.name)
        groups.setdefault((name, tensor.dtype, str(list(tensor.shape))), []).append(tensor)
    rows = [
        (
            found[0].name if len(found) == 1 else name,
            dtype,
            shape,
            f"× {len(found)}" if len(found) > 1 else "",
            _bytes(sum(tensor.nbytes for tensor in found)),
        )
        for (name, dtype, shape), found in groups.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index == 4 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted key, value)."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}…"


def _bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:,} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _by_number(name: str) -> list[tuple[str, int]]:
    """A sorting key that has layer 2 before layer 10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]

"""What a compiled program's devices exchange: kinds, bytes and groups, from its text."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from safemoe_jax.planning.hlo import Instruction, Program, ints

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: what each device sends at least, for each time that it runs.
      groups: [G, M] device indices that exchange with one another.
      runs: how often it runs.
    """

    kind: str
    bytes: float
    groups: np.ndarray
    runs: int


def collectives(program: Program, runs: Counter[str], num_devices: int) -> list[Collective]:
    """All exchanges of data, without those among fewer than two devices.

    One that runs beside matmuls stands in the text several times, where it begins, goes on and
    ends, with one channel.
    """
    found: dict[str, Collective] = {}
    for name, _, one in program.instructions():
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES and runs[name]:
            groups = _groups_of(one, num_devices)
            if groups.shape[1] > 1:
                channel = re.search(r"channel_id=(\d+)", one.rest)
                sent = _sent(kind, one, groups.shape[1])
                collective = Collective(kind, sent, groups, runs[name])
                found.setdefault(channel[1] if channel else one.name, collective)
    return list(found.values())


def _sent(kind: str, one: Instruction, members: int) -> float:
    """Bytes that each member sends at least, by the best known algorithm on a ring."""
    if one.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        half = len(one.shape) // 2 if kind == "all-gather" else 1  # (operands, results, flags)
        results = one.shape[half : 2 * half]
    else:
        results = one.shape
    whole = sum(array.bytes for array in results)
    share: dict[str, Callable[[], float]] = {
        "all-gather": lambda: whole * (members - 1) / members,
        "all-reduce": lambda: 2 * whole * (members - 1) / members,
        "reduce-scatter": lambda: whole * (members - 1),
        "all-to-all": lambda: whole * (members - 1) / members,
        "collective-permute": lambda: whole,
    }
    return share[kind]()


def _groups_of(one: Instruction, num_devices: int) -> np.ndarray:
    if one.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.rest)
        found = np.array(re.findall(r"\{(\d+),(\d+)\}", pairs[1]), np.int64).reshape(-1, 2)
        return found[found[:, 0] != found[:, 1]] if len(found) else np.empty((0, 0), int)
    match = re.search(r"replica_groups=(.*)", one.rest)
    return replica_groups(match[1] if match else "{}", num_devices)


def replica_groups(text: str, num_devices: int) -> np.ndarray:
    """Who exchanges with whom, [groups, members], from any of the forms that XLA prints.

    {{0,1},{2,3}}, {} for all, [2,4]<=[4,2]T(1,0), and mesh['x'=2,'y'=4] {'y'}, with
    device_ids=(...) where the mesh's devices are in another order, and 'y':(2)2 for a part of an
    axis.
    """
    if match := re.match(r"\{(\{[\d,]+\}(?:,\{[\d,]+\})*)?\}", text):
        if not match[1]:
            return np.arange(num_devices)[None]
        return np.array([ints(group) for group in re.findall(r"\{([\d,]+)\}", match[1])])
    if match := re.match(rf"\[([\d,]+)\]<=({_IOTA})", text):
        return _iota(match[2]).reshape(ints(match[1]))
    match = re.match(rf"mesh\[(.*?)\](?:, device_ids=\(({_IOTA}|[\d,]+)\))? \{{(.*?)\}}", text)
    if not match:
        raise ValueError(f"replica groups of an unknown form: {text[:80]}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    total = math.prod(sizes.values())
    devices = np.arange(total)
    if match[2]:
        devices = _iota(match[2]) if match[2].startswith("[") else np.array(ints(match[2]))
    shape, grouped = [], []
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])
    for name, size in sizes.items():
        mine = sorted(
            (int(before or 1), int(part or size)) for n, before, part in parts if n == name
        )
        done = 1
        for before, part in mine:
            shape += [before // done, part]
            grouped.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    kept = [axis for axis in range(len(shape)) if axis not in grouped]
    members = math.prod(shape[axis] for axis in grouped)
    return devices.reshape(shape).transpose(kept + grouped).reshape(-1, members)


_IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): 0 to 7 in that shape, transposed so, flat."""
    sizes, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = ints(sizes)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose(ints(order)) if order else numbers).reshape(-1)

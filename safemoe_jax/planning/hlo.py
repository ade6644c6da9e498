"""What a compiled program does on one device, read from XLA's text of it.

XLA's own cost analysis counts what is inside a loop once, and Pallas kernels not at all. Here every
instruction counts as often as it runs. Counted once each, the sums are XLA's own: a test holds
them together.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions that name or pass on what is there.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip


class Array(NamedTuple):
    """An array of the text: its type, sizes and layout."""

    dtype: str
    sizes: tuple[int, ...]
    layout: str

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        """Without the layout's padding."""
        return self.elements * _bits(self.dtype) / 8

    @property
    def padded_bytes(self) -> float:
        """As it lies in memory, its minor dimensions in whole tiles."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not order:
            return self.bytes
        tile = _ints(tile[1])
        minor_first = [self.sizes[axis] for axis in _ints(order)]
        for axis, size in enumerate(reversed(tile)):
            if axis < len(minor_first):
                minor_first[axis] = -(-minor_first[axis] // size) * size
        return math.prod(minor_first) * _bits(self.dtype) / 8

    @property
    def hbm_bytes(self) -> float:
        """What moving it costs the device's memory; nothing where the compiler keeps it on-chip."""
        return 0 if re.search(r"S\([1-9]\d*\)", self.layout) else self.bytes


class Instruction(NamedTuple):
    """One line of the text."""

    name: str
    shape: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def called(self, *keys: str) -> list[str]:
        """Names of the computations that the instruction calls as `key=`."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(?:%([\w.-]+)|\{{([^}}]*)\}})", self.rest)
        names = ",".join(itertools.chain(*found))
        return [name.strip().lstrip("%") for name in names.split(",") if name.strip()]

    @property
    def op_name(self) -> str:
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return match[1].replace("\\", "") if match else ""


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


class Kernel(NamedTuple):
    """One call of a Pallas kernel: its path in the program, operands and results, how often."""

    name: str
    arrays: tuple[Array, ...]
    runs: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed program.

    Attributes:
      computations: by name, callees before callers; each has its instructions by name.
      entry: the name of the first that runs.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads `jax.stages.Compiled.as_text()`."""
        computations: dict[str, dict[str, Instruction]] = {}
        entry = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                computations[header[2]] = current = {}
                entry = header[2] if header[1] else entry
            elif match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
                instruction = _instruction(match[1], line[match.end() :])
                current[instruction.name] = instruction
        return cls(computations, entry)

    def runs(self, unknown_trips: int = 1) -> Counter[str]:
        """How often each computation runs; a loop whose trips XLA does not know, `unknown_trips`
        times. Of a conditional, every branch counts."""
        count = Counter({self.entry: 1})
        for name in reversed(self.computations):
            for instruction in self.computations[name].values():
                trips = 1
                if instruction.opcode == "while":
                    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
                    trips = int(known[1]) if known else unknown_trips
                for callee in instruction.called(*_CALLS[instruction.opcode]):
                    count[callee] += trips * count[name]
        return count

    def flops(self, runs: Counter[str]) -> float:
        """FLOPs of matmuls and convolutions, a multiply and an add counting two."""
        return sum(runs[name] * _flops(one, computation) for name, computation, one in self._all())

    def hbm_bytes(self, runs: Counter[str]) -> float:
        """Bytes that instructions read from and write to the device's memory.

        A slice that is read or written in place counts as the slice. What a kernel reads twice
        counts once: this is a lower bound.
        """
        fused = {
            callee
            for _, _, one in self._all()
            if one.opcode == "fusion"
            for callee in one.called("calls")
        }
        return sum(
            runs[name] * self._traffic(one, computation)
            for name, computation, one in self._all()
            if name not in fused
        )

    def collectives(self, runs: Counter[str], num_devices: int) -> list[Collective]:
        """All exchanges of data, without those among fewer than two devices."""
        found = []
        for name, _, one in self._all():
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES and runs[name]:
                groups = _groups_of(one, num_devices)
                if groups.shape[1] > 1:
                    sent = _sent(kind, one, groups.shape[1])
                    found.append(Collective(kind, sent, groups, runs[name]))
        return found

    def kernels(self, runs: Counter[str]) -> list[Kernel]:
        """Calls of Pallas kernels."""
        return [
            Kernel(one.op_name, (*_inputs(one, computation), *one.shape), runs[name])
            for name, computation, one in self._all()
            if one.opcode == "custom-call" and '"tpu_custom_call"' in one.rest
        ]

    def parameters(self) -> dict[str, Array]:
        """The program's arguments by their path, like "state.trainable['layers'][...]['a']"."""
        return {
            one.op_name or one.name: one.shape[0]
            for one in self.computations[self.entry].values()
            if one.opcode == "parameter"
        }

    def _all(self) -> Iterator[tuple[str, dict[str, Instruction], Instruction]]:
        for name, computation in self.computations.items():
            for instruction in computation.values():
                yield name, computation, instruction

    def _traffic(self, one: Instruction, computation: dict[str, Instruction]) -> float:
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return 0
        if one.opcode == "async-start":
            return 0  # what it wraps is counted where it stands
        if one.opcode.endswith("-start"):  # (what is read, what is written, flags)
            return sum(array.hbm_bytes for array in one.shape[:2])
        inputs = [computation[name] for name in one.operands if name in computation]
        if one.opcode == "fusion":
            (callee,) = one.called("calls")
            return self._fusion_traffic(one, inputs, self.computations[callee])
        read = [sum(array.hbm_bytes for array in source.shape) for source in inputs]
        return _sliced(one, inputs, read)

    def _fusion_traffic(
        self,
        fusion: Instruction,
        inputs: Sequence[Instruction],
        fused: dict[str, Instruction],
    ) -> float:
        users = defaultdict(list)
        for one in fused.values():
            for name in one.operands:
                users[name].append(one)

        def readers(name: str) -> list[tuple[Instruction, str]]:
            found = []
            for one in users[name]:
                found += readers(one.name) if one.opcode == "bitcast" else [(one, name)]
            return found

        total = 0.0
        for one in fused.values():
            if one.opcode != "parameter":
                continue
            index = int(re.match(r"\s*(\d+)\)", one.rest)[1])
            whole = sum(array.hbm_bytes for array in inputs[index].shape)
            if whole:
                used = [_part_read(reader, name) for reader, name in readers(one.name)]
                part = math.inf if None in used else sum(used)
                total += min(whole, part)
        root = list(fused.values())[-1]
        roots = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for result, array in zip(roots, fusion.shape, strict=False):
            while result.opcode == "bitcast" and result.operands[0] in fused:
                result = fused[result.operands[0]]
            if array.hbm_bytes and result.opcode == "dynamic-update-slice":
                total += fused[result.operands[1]].shape[0].bytes
            else:
                total += array.hbm_bytes
        return total


_CALLS: defaultdict[str, tuple[str, ...]] = defaultdict(
    lambda: ("calls",),
    {
        "while": ("body",),
        "call": ("to_apply", "calls"),
        "conditional": ("branch_computations", "true_computation", "false_computation"),
    },
)


def _inputs(one: Instruction, computation: dict[str, Instruction]) -> list[Array]:
    return [array for name in one.operands for array in computation[name].shape]


def _part_read(one: Instruction, name: str) -> float | None:
    """Of an operand that `one` reads in part, the bytes; None where it reads the whole."""
    if one.opcode in ("dynamic-slice", "slice", "gather") and one.operands[0] == name:
        return one.shape[0].bytes
    if one.opcode == "dynamic-update-slice" and one.operands[0] == name:
        return 0.0
    return None


def _sliced(one: Instruction, inputs: Sequence[Instruction], read: Sequence[float]) -> float:
    """Traffic of an instruction outside a fusion."""
    written = sum(array.hbm_bytes for array in one.shape)
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return min(read[0], written) + written
    if one.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if one.opcode == "scatter":
        return 2 * read[-1]
    return sum(read) + written


def _instruction(name: str, text: str) -> Instruction:
    """Of "SHAPE OPCODE(OPERANDS), REST", where a tuple's shape has parentheses of its own."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    opcode, _, text = text.partition("(")
    end = _closing("(" + text, 0) - 1
    operands = tuple(re.findall(r"%([\w.-]+)", text[:end]))
    rest = text if opcode == "parameter" else text[end:]
    return Instruction(name, _arrays(shape), opcode, operands, rest)


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


@functools.lru_cache(maxsize=4096)
def _arrays(shape: str) -> tuple[Array, ...]:
    found = re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?", shape)
    return tuple(
        Array(dtype, _ints(sizes.replace("<=", "")), layout) for dtype, sizes, layout in found
    )


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 0  # a token


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def _flops(one: Instruction, computation: dict[str, Instruction]) -> float:
    if one.opcode == "dot":
        contracted = _ints(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)[1])
        left = computation[one.operands[0]].shape[0].sizes
        return 2 * one.shape[0].elements * math.prod(left[axis] for axis in contracted)
    if one.opcode != "convolution":
        return 0
    # On TPUs a matmul is a convolution; its batch is a window of which most places are padding.
    left, kernel = (computation[name].shape[0].sizes for name in one.operands[:2])
    out = one.shape[0].sizes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    (batch, features), (inputs, spatial) = (
        [out[labels[3].index(letter)] for letter in "bf"],
        (kernel[labels[2].index("i")], [x for x in labels[1] if x.isdigit()]),
    )
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", _window(one.rest)))
    places = 1
    for number, axis in enumerate(sorted(spatial)):
        places *= _valid_places(
            left[labels[1].index(axis)],
            kernel[labels[2].index(axis)],
            out[labels[3].index(axis)],
            {key: value.split("x")[number] for key, value in window.items()},
        )
    groups = re.search(r"batch_group_count=(\d+)", one.rest)
    return 2 * batch * features * inputs * places / (int(groups[1]) if groups else 1)


def _window(rest: str) -> str:
    match = re.search(r"window=\{([^}]*)\}", rest)
    return match[1] if match else ""


def _valid_places(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of a kernel's place and an output's place whose input is no padding."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, dilation = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    base = int(window.get("lhs_dilate", 1))
    at = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None] * dilation
    return int(((at >= 0) & (at % base == 0) & (at // base < size)).sum())


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
        found = np.array(re.findall(r"\{(\d+),(\d+)\}", pairs[1]), int).reshape(-1, 2)
        return found[found[:, 0] != found[:, 1]] if len(found) else np.empty((0, 0), int)
    match = re.search(r"replica_groups=(.*)", one.rest)
    return replica_groups(match[1] if match else "{}", num_devices)


def replica_groups(text: str, num_devices: int) -> np.ndarray:
    """Who exchanges with whom, [groups, members], from any of the forms that XLA prints.

    {{0,1},{2,3}}, {} for all, [2,4]<=[4,2]T(1,0), and mesh['x'=2,'y'=4] {'y'}, with device_ids=(...)
    where the mesh's devices are in another order, and 'y':(2)2 for a part of an axis.
    """
    if match := re.match(r"\{(\{[\d,]+\}(?:,\{[\d,]+\})*)?\}", text):
        if not match[1]:
            return np.arange(num_devices)[None]
        return np.array([_ints(group) for group in re.findall(r"\{([\d,]+)\}", match[1])])
    if match := re.match(rf"\[([\d,]+)\]<=({_IOTA})", text):
        return _iota(match[2]).reshape(_ints(match[1]))
    match = re.match(rf"mesh\[(.*?)\](?:, device_ids=\(({_IOTA}|[\d,]+)\))? \{{(.*?)\}}", text)
    if not match:
        raise ValueError(f"replica groups of an unknown form: {text[:80]}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    total = math.prod(sizes.values())
    devices = np.arange(total)
    if match[2]:
        devices = _iota(match[2]) if match[2].startswith("[") else np.array(_ints(match[2]))
    shape, grouped = [], []
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])
    for name, size in sizes.items():
        mine = sorted((int(before or 1), int(part or size)) for n, before, part in parts if n == name)
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
    shape = _ints(sizes)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose(_ints(order)) if order else numbers).reshape(-1)

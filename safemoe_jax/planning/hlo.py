"""The text of a compiled program: its computations, and how often each of them runs."""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple


class Array(NamedTuple):
    """An array of the text: its type, sizes and layout."""

    dtype: str
    sizes: tuple[int, ...]
    layout: str

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("f", "bf"))

    @property
    def bytes(self) -> float:
        """Without the layout's padding."""
        return self.elements * _bits(self.dtype) / 8

    @property
    def padded_bytes(self) -> float:
        """As it lies in memory, its minor dimensions in whole tiles."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile:
            return self.bytes
        minor_first = [self.sizes[axis] for axis in ints(order)] or [1]
        for axis, size in enumerate(reversed(ints(tile[1]))):
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


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed program.

    Attributes:
      computations: by name, callees before callers; each has its instructions by name.
      entry: the name of the first that runs.
      roots: by computation, the instruction that gives its result.
    """

    computations: dict[str, Computation]
    entry: str
    roots: dict[str, Instruction]

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads `jax.stages.Compiled.as_text()`."""
        computations: dict[str, Computation] = {}
        roots: dict[str, Instruction] = {}
        name = entry = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                name = header[2]
                computations[name] = {}
                entry = name if header[1] else entry
            elif match := re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line):
                instruction = _instruction(match[2], line[match.end() :])
                computations[name][instruction.name] = instruction
                if match[1]:
                    roots[name] = instruction
        return cls(computations, entry, roots)

    def runs(self, unknown_trips: int = 1) -> Counter[str]:
        """How often each computation runs; a loop whose trips XLA does not know, `unknown_trips`
        times. Of a conditional, every branch counts."""
        count = Counter({self.entry: 1})
        for name in reversed(self.computations):
            for instruction in self.computations[name].values():
                trips = 1
                if instruction.opcode == "while":
                    known = self._trips(instruction, self.computations[name])
                    trips = unknown_trips if known is None else known
                for callee in instruction.called(*_CALLS[instruction.opcode]):
                    count[callee] += trips * count[name]
        return count

    def parameters(self) -> dict[str, Array]:
        """The program's arguments by their path, like "state.trainable['layers'][...]['a']"."""
        return {
            one.op_name or one.name: one.shape[0]
            for one in self.computations[self.entry].values()
            if one.opcode == "parameter"
        }

    def _trips(self, loop: Instruction, around: Computation) -> int | None:
        """How often a loop runs that counts up to a constant; None for another."""
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        tested, stepped, test = (
            self.computations[condition],
            self.computations[body],
            self.roots[condition],
        )
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        counter, limit = (tested[name] for name in test.operands)
        if counter.opcode != "get-tuple-element":
            return None
        index = int(re.search(r"index=(\d+)", counter.rest)[1])
        first = _element(around[loop.operands[0]], index, around)
        following = _element(self.roots[body], index, stepped)
        if first is None or following is None or following.opcode != "add":
            return None
        steps = [_constant(stepped[name], stepped) for name in following.operands]
        start, stop = _constant(first, around), _constant(limit, tested)
        step = next((one for one in steps if one), None)
        if start is None or stop is None or step is None:
            return None
        return -(-(stop - start) // step)

    def instructions(self) -> Iterator[tuple[str, Computation, Instruction]]:
        for name, computation in self.computations.items():
            for instruction in computation.values():
                yield name, computation, instruction


_CALLS: defaultdict[str, tuple[str, ...]] = defaultdict(
    lambda: ("calls",),
    {
        "while": ("body",),
        "call": ("to_apply", "calls"),
        "conditional": ("branch_computations", "true_computation", "false_computation"),
    },
)


def parameter_number(one: Instruction) -> int:
    return int(re.match(r"\s*(\d+)\)", one.rest)[1])


def _element(one: Instruction, index: int, computation: Computation) -> Instruction | None:
    """Element `index` of a tuple that is made here."""
    return computation[one.operands[index]] if one.opcode == "tuple" else None


def _constant(one: Instruction, computation: Computation) -> int | None:
    """The whole number that an instruction gives, where that is written in the text."""
    while one.opcode in ("copy", "bitcast", "convert") and one.operands:
        one = computation[one.operands[0]]
    match = re.match(r"(-?\d+)\)", one.rest) if one.opcode == "constant" else None
    return int(match[1]) if match else None


def _instruction(name: str, text: str) -> Instruction:
    """Of "SHAPE OPCODE(OPERANDS), REST", where a tuple's shape has parentheses of its own."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    opcode, _, text = text.partition("(")
    end = _closing("(" + text, 0) - 1
    operands = tuple(re.findall(r"%([\w.-]+)", text[:end]))
    rest = text if opcode in ("parameter", "constant") else text[end:]
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
        Array(dtype, ints(sizes.replace("<=", "")), layout) for dtype, sizes, layout in found
    )


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 0  # a token


def ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()

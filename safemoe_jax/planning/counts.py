"""What a compiled program does on a device: FLOPs, memory traffic, kernels.

XLA's own cost analysis counts what is inside a loop once, and Pallas kernels not at all. Here every
instruction counts as often as it runs.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from safemoe_jax.planning.collectives import COLLECTIVES
from safemoe_jax.planning.hlo import (
    Array,
    Computation,
    Instruction,
    Program,
    ints,
    parameter_number,
)

# Instructions that name or pass on what is there.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip


class Kernel(NamedTuple):
    """One call of a Pallas kernel: its name, operands, results and how often it runs."""

    name: str
    arrays: tuple[Array, ...]
    runs: int


def flops(program: Program, runs: Counter[str]) -> float:
    """FLOPs: additions and multiplications, in matmuls and one by one.

    A matmul of a single row may be compiled to a product and a sum, hence the latter.
    """
    return sum(
        runs[name] * _flops(one, computation) for name, computation, one in program.instructions()
    )


def hbm_bytes(program: Program, runs: Counter[str]) -> float:
    """Bytes that instructions read from and write to the device's memory.

    A slice that is read or written in place counts as the slice. What a kernel reads twice
    counts once: this is a lower bound.
    """
    fused = {
        callee
        for _, _, one in program.instructions()
        if one.opcode == "fusion"
        for callee in one.called("calls")
    }
    return sum(
        runs[name] * _traffic(program, one, computation)
        for name, computation, one in program.instructions()
        if name not in fused
    )


def kernels(program: Program, runs: Counter[str]) -> list[Kernel]:
    """Calls of Pallas kernels."""
    return [
        Kernel(one.name, (*_inputs(one, computation), *one.shape), runs[name])
        for name, computation, one in program.instructions()
        if one.opcode == "custom-call" and '"tpu_custom_call"' in one.rest
    ]


def _traffic(program: Program, one: Instruction, computation: Computation) -> float:
    if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
        return 0
    if one.opcode == "async-start":
        return 0  # what it wraps is counted where it stands
    if one.opcode == "custom-call" and '"tpu_custom_call"' not in one.rest:
        return 0  # room for a buffer, another view of one
    if one.opcode == "slice-start":  # (all, the slice, flags)
        return min(one.shape[0].hbm_bytes, one.shape[1].bytes) + one.shape[1].hbm_bytes
    if one.opcode.endswith("-start"):  # (what is read, what is written, flags), in either order
        return sum(array.hbm_bytes for array in one.shape[:2])
    inputs = [computation[name] for name in one.operands if name in computation]
    if one.opcode == "fusion":
        return _fusion_traffic(program, one, inputs)
    read = [sum(array.hbm_bytes for array in source.shape) for source in inputs]
    return _sliced(one, read)


def _fusion_traffic(program: Program, fusion: Instruction, inputs: Sequence[Instruction]) -> float:
    (callee,) = fusion.called("calls")
    fused, root = program.computations[callee], program.roots[callee]
    total = 0.0
    for one in fused.values():
        if one.opcode == "parameter":
            whole = sum(array.hbm_bytes for array in inputs[parameter_number(one)].shape)
            total += whole and min(whole, _read(program, callee, one.name))
    roots = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for result, array in zip(roots, fusion.shape, strict=False):
        total += min(array.hbm_bytes, _written(program, callee, result))
    return total


def _read(program: Program, computation: str, name: str) -> float:
    """Of an array in a fused computation, and in those fused into it, the bytes that are read;
    infinite where it is all of it."""
    total = 0.0
    for one in program.computations[computation].values():
        for place in (number for number, operand in enumerate(one.operands) if operand == name):
            if one.opcode == "bitcast":
                total += _read(program, computation, one.name)
            elif one.opcode == "fusion":
                (callee,) = one.called("calls")
                total += sum(
                    _read(program, callee, inner.name)
                    for inner in program.computations[callee].values()
                    if inner.opcode == "parameter" and parameter_number(inner) == place
                )
            else:
                total += _part_read(one, place)
    return total


def _part_read(one: Instruction, place: int) -> float:
    """Of operand `place` the bytes that `one` reads; infinite where it is all of it."""
    if place == 0 and one.opcode in ("dynamic-slice", "slice", "gather"):
        return one.shape[0].bytes
    if place == 0 and one.opcode == "dynamic-update-slice":
        return 0.0
    # An exchange that is under way: its buffers are handed on, and counted where it ends.
    if one.opcode in ("tuple", *COLLECTIVES) or "AsyncCollective" in one.rest:
        return 0.0
    return math.inf


def _written(program: Program, computation: str, result: Instruction) -> float:
    """Of a fused computation's result, the bytes that are written; infinite where it is all."""
    fused = program.computations[computation]
    if result.opcode == "bitcast" and result.operands[0] in fused:
        return _written(program, computation, fused[result.operands[0]])
    if result.opcode == "fusion":
        (callee,) = result.called("calls")
        return _written(program, callee, program.roots[callee])
    if result.opcode == "dynamic-update-slice":
        return fused[result.operands[1]].shape[0].bytes
    passed_on = result.opcode in ("parameter", *COLLECTIVES) or _begins(result)
    return 0.0 if passed_on else math.inf


def _inputs(one: Instruction, computation: Computation) -> list[Array]:
    return [array for name in one.operands for array in computation[name].shape]


def _begins(one: Instruction) -> bool:
    """Whether an exchange begins here whose result is written later."""
    return one.opcode == "custom-call" and '"AsyncCollectiveStart"' in one.rest


def _sliced(one: Instruction, read: Sequence[float]) -> float:
    """Traffic of an instruction outside a fusion that reads arrays of these bytes."""
    written = sum(array.hbm_bytes for array in one.shape)
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return min(read[0], written) + written
    if one.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if one.opcode == "scatter":
        return 2 * read[-1]
    return sum(read) + written


def _flops(one: Instruction, computation: Computation) -> float:
    if one.opcode == "dot":
        contracted = ints(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)[1])
        left = computation[one.operands[0]].shape[0].sizes
        return 2 * one.shape[0].elements * math.prod(left[axis] for axis in contracted)
    if one.opcode in ("add", "multiply", "subtract") and one.shape[0].is_float:
        return one.shape[0].elements
    if one.opcode == "reduce" and one.shape[0].is_float:
        return computation[one.operands[0]].shape[0].elements
    if one.opcode != "convolution":
        return 0
    # On TPUs a matmul is a convolution; its batch is a window of which most places are padding.
    left, kernel = (computation[name].shape[0].sizes for name in one.operands[:2])
    out = one.shape[0].sizes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    batch, features = (out[labels[3].index(letter)] for letter in "bf")
    inputs = kernel[labels[2].index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", _window(one.rest)))
    places = 1
    for number, axis in enumerate(sorted(filter(str.isdigit, labels[1]))):
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

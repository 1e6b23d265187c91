"""The inline PTX that dequantizes weights and KV caches, evaluated in numpy and compared with the formats bit for bit.

The evaluator knows exactly the instructions that the PTX uses; no GPU is needed. Registers are arrays of uint32, one element per thread.

Dimension letters: `L` threads, `M` bytes, four of each thread.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from dbrx_q.kernels.formats import int4, int8
from dbrx_q.kernels.triton import batch_dot as triton_batch_dot
from dbrx_q.kernels.triton import group_dot as triton_group_dot
from dbrx_q.kernels.triton import kv as triton_kv
from dbrx_q.kernels.triton import weights as triton_weights

Array = np.ndarray[Any, Any]


# The evaluator


def _halves(register: Array) -> Array:
    """uint32 [L] as uint16 [L, 2], the low half first."""
    return register.view(np.uint16).reshape(-1, 2)


def _from_bfloat16(register: Array) -> Array:
    return (_halves(register).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _to_bfloat16(exact: Array) -> Array:
    """The uint16 bits of float64 values, rounded once to the nearest bfloat16, ties to even."""
    assert ((np.abs(exact) >= 2.0**-126) | (exact == 0)).all(), "subnormal bfloat16 would need another rounding"
    bits = exact.view(np.int64)
    cut = 52 - 7  # bits of the fraction that bfloat16 does not have
    rounded = (bits + ((1 << (cut - 1)) - 1) + ((bits >> cut) & 1)) >> cut << cut
    with np.errstate(over="ignore"):
        return (rounded.view(np.float64).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _fma_bfloat16(a: Array, b: Array, c: Array) -> Array:
    x, y, z = (_from_bfloat16(register) for register in (a, b, c))
    product = x * y  # 16 bits: exact
    total = product + z
    back = total - product
    assert not ((product - (total - back)) + (z - back)).any(), "float64 rounded the sum"
    return _to_bfloat16(total).view(np.uint32).reshape(-1)


def _float16(op: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Sums and products of float16 are exact in float64."""

    def run(a: Array, b: Array) -> Array:
        x, y = (_halves(register).view(np.float16).astype(np.float64) for register in (a, b))
        with np.errstate(over="ignore"):
            return op(x, y).astype(np.float16).view(np.uint32).reshape(-1)

    return run


def _fma_float16(a: Array, b: Array, c: Array) -> Array:
    """A product of float16 is exact in float64, and so is the sum where no bits are 50 places apart."""
    x, y, z = (_halves(register).view(np.float16).astype(np.float64) for register in (a, b, c))
    return (x * y + z).astype(np.float16).view(np.uint32).reshape(-1)


def _float32(op: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """float64 has more than twice the digits of float32, so that rounding to float64 first changes nothing."""
    return lambda a, b: op(*(register.view(np.float32).astype(np.float64) for register in (a, b))).astype(np.float32).view(np.uint32)


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    """Selects four of the eight bytes of `a` (0 to 3) and `b` (4 to 7)."""
    chosen = int(selector[0])
    source = np.stack(
        [*(a >> np.uint32(8 * i) & np.uint32(255) for i in range(4)), *(b >> np.uint32(8 * i) & np.uint32(255) for i in range(4))]
    )
    out = np.zeros_like(a)
    for place in range(4):
        index = chosen >> 4 * place & 15
        assert index < 8, "the mode that repeats a sign is not used"
        out |= source[index] << np.uint32(8 * place)
    return out


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit `4 a + 2 b + c` of the table, for every bit of a, b and c."""
    out = np.zeros_like(a)
    for minterm in range(8):
        if int(table[0]) >> minterm & 1:
            out |= (a if minterm & 4 else ~a) & (b if minterm & 2 else ~b) & (c if minterm & 1 else ~c)
    return out


def _convert_two(high: Array, low: Array) -> Array:
    pair = np.stack([_to_bfloat16(register.view(np.float32).astype(np.float64)) for register in (low, high)], axis=-1)
    return pair.view(np.uint32).reshape(-1)


INSTRUCTIONS: dict[str, Callable[..., Array]] = {
    "mov.b32": lambda a: a,
    "mov.f32": lambda a: a,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "shr.u32": np.right_shift,
    "xor.b32": np.bitwise_xor,
    "fma.rn.bf16x2": _fma_bfloat16,
    "add.rn.f16x2": _float16(np.add),
    "mul.rn.f16x2": _float16(np.multiply),
    "add.rn.f32": _float32(np.add),
    "mul.rn.f32": _float32(np.multiply),
    "fma.rn.f16x2": _fma_float16,
    "cvt.rn.bf16x2.f32": _convert_two,
}


@dataclass(frozen=True)
class Assembly:
    """A call of `tl.inline_asm_elementwise`."""

    lines: list[str]
    """Its instructions."""
    outputs: int
    """Output registers."""
    inputs: int
    """Input registers."""


def assembly_of(function: Any, dtype: torch.dtype | None = None, pack: int = 4) -> Assembly:
    """The assembly in the source of a `triton.jit` function; of several blocks, the block that returns elements of `dtype`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.inline_asm_elementwise"]
    options = [{keyword.arg: keyword.value for keyword in call.keywords} for call in calls]
    wanted = "" if dtype is None else f"tl.{str(dtype).removeprefix('torch.')}"
    [(call, option)] = [pair for pair in zip(calls, options, strict=True) if wanted in ast.unparse(pair[1]["dtype"])]
    text, constraints = (ast.literal_eval(argument) for argument in call.args[:2])
    assert ast.literal_eval(option["pack"]) == pack
    parts = constraints.split(",")
    outputs = [constraint for constraint in parts if constraint.startswith("=")]
    assert all(constraint.startswith("=&") for constraint in outputs), "an output could share a register with an input that is read later"
    lines = [line.strip() for line in text.replace("{", "").replace("}", "").split(";")]
    return Assembly([line for line in lines if line], len(outputs), len(parts) - len(outputs))


def evaluate(assembly: Assembly, inputs: list[Array]) -> list[Array]:
    """The output registers [L] for input registers [L], in the order of the constraints."""
    assert len(inputs) == assembly.inputs
    registers = {f"${assembly.outputs + i}": value for i, value in enumerate(inputs)}
    declared: set[str] = set()

    def operand(text: str) -> Array:
        if literal := re.fullmatch(r"0f([0-9A-F]{8})|(0x[0-9A-Fa-f]+)|(\d+)", text):
            value = int(literal[1], 16) if literal[1] else int(text, 0)
            return np.full(inputs[0].shape, value, np.uint32)
        return registers[text]

    for line in assembly.lines:
        name, rest = line.split(maxsplit=1)
        if name == ".reg":
            declared |= set(rest.split(maxsplit=1)[1].split(", "))
            continue
        target, *sources = rest.split(", ")
        assert "x2" not in name or all(source[0].isalpha() or source[0] == "$" for source in sources), f"operands must be registers: {line}"
        assert target in declared or target in [f"${i}" for i in range(assembly.outputs)], line
        registers[target] = INSTRUCTIONS[name](*(operand(source) for source in sources))
    return [registers[f"${i}"] for i in range(assembly.outputs)]


def registers_of(values: torch.Tensor) -> list[Array]:
    """Values of four per thread, [M], as registers [L]: one of four bytes, two of two 16-bit values, or four of a float32."""
    size = values.element_size()
    memory = values.view(torch.uint8).numpy().reshape(-1, size, 4)
    return [np.ascontiguousarray(memory[:, i]).view(np.uint32).reshape(-1) for i in range(size)]


def values_of(registers: list[Array]) -> torch.Tensor:
    """The bits of 16-bit values in two registers per thread, int16 [M]."""
    return torch.from_numpy(np.stack(registers, axis=1).view(np.int16).reshape(-1).copy())


# The inputs


@dataclass(frozen=True)
class Numbers:
    """Inputs of the PTX."""

    codes: torch.Tensor
    """Bytes [M]."""
    zeros: torch.Tensor
    """Zero-points [M]."""
    scales: torch.Tensor
    """Scales [M]."""


ALL_SCALES = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)  # from zero to the largest, subnormal ones among them
MANY_SCALES = ALL_SCALES[::5]
SOME_SCALES = ALL_SCALES[torch.tensor([0, 1, 2, 3, 511, 1023, 1024, 1025, 0x3C00, 0x3C01, 0x3FFF, 0x7800, 0x7BFE, 0x7BFF])]
NIBBLES = torch.tensor([16 * ((5 * i + 3) % 16) + i for i in range(16)], dtype=torch.uint8)  # each nibble once low and once high
BYTES = torch.arange(256, dtype=torch.int16).to(torch.uint8)
ZEROS = torch.arange(16, dtype=torch.uint8)


def numbers(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Iterator[Numbers]:
    """Every combination, shuffled so that neighbours in a register differ in all three; about a million at a time."""
    step = max(1, (1 << 20) // (len(codes) * len(zeros)))
    for piece in scales.split(step):
        grid = torch.cartesian_prod(*(torch.arange(len(part)) for part in (codes, zeros, piece)))
        grid = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))]
        yield Numbers(codes[grid[:, 0]], zeros[grid[:, 1]], piece[grid[:, 2]])


def dequantize_int4(dtype: torch.dtype, batch: Numbers) -> torch.Tensor:
    """The bits of both elements of each byte, int16 [M, 2], from the PTX and the operands that its callers prepare."""
    wide = batch.scales.float()
    if dtype == torch.bfloat16:
        high = wide.bfloat16()
        low = (wide - high.float()).bfloat16()
        operands = [(-128.0 - batch.zeros.float()).bfloat16(), high, low]
        assembly = assembly_of(triton_weights._int4_to_bfloat16)
    else:
        operands = [(-1024.0 - batch.zeros.float()).half(), batch.scales]
        assembly = assembly_of(triton_weights._int4_to_float16)
    out = evaluate(assembly, [register for operand in (batch.codes, *operands) for register in registers_of(operand)])
    return torch.stack((values_of(out[:2]), values_of(out[2:])), dim=-1)


def dequantize_int8(dtype: torch.dtype, batch: Numbers) -> torch.Tensor:
    """The bits of each element, int16 [M], from the PTX."""
    function = triton_weights._int8_to_bfloat16 if dtype == torch.bfloat16 else triton_weights._int8_to_float16
    scales = batch.scales.float() if dtype == torch.bfloat16 else batch.scales
    return values_of(evaluate(assembly_of(function), [*registers_of(batch.codes), *registers_of(scales)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("codes", "scales"), [(BYTES, SOME_SCALES), (NIBBLES, MANY_SCALES)], ids=["every byte", "many scales"])
def test_int4_dequantizes_to_the_bits_of_the_format(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
    for batch in numbers(codes, ZEROS, scales):
        weight = int4.Int4Weight(batch.codes[:, None], batch.scales[:, None], batch.zeros[:, None], 2)
        expected = int4.dequantize(weight, dtype).view(torch.int16)
        assert torch.equal(dequantize_int4(dtype, batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_int8_dequantizes_to_the_bits_of_the_format(dtype: torch.dtype) -> None:
    for batch in numbers(BYTES, ZEROS[:1], torch.cat((MANY_SCALES, SOME_SCALES))):
        weight = int8.Int8Weight(batch.codes.view(torch.int8)[:, None], batch.scales[:, None], 1)
        assert torch.equal(dequantize_int8(dtype, batch), int8.dequantize(weight, dtype).view(torch.int16)[:, 0])


def test_zero_points_are_subtracted_from_int4_codes_exactly() -> None:
    for batch in numbers(BYTES, ZEROS, SOME_SCALES[:1]):
        operands = (batch.codes, (-1024.0 - batch.zeros.float()).half())
        assembly = assembly_of(triton_batch_dot._steps_in_float16)
        out = evaluate(assembly, [register for operand in operands for register in registers_of(operand)])
        for registers, codes in ((out[:2], batch.codes & 15), (out[2:], batch.codes >> 4)):
            expected = (codes.float() - batch.zeros.float()).half()
            assert torch.equal(values_of(registers).view(torch.float16), expected)


def test_int4_codes_are_added_to_128_exactly() -> None:
    for batch in numbers(BYTES, ZEROS, SOME_SCALES[:1]):
        zero = (batch.zeros.to(torch.int32) | 0xC300).to(torch.uint16).view(torch.bfloat16)
        assert torch.equal(zero, (-128.0 - batch.zeros.float()).bfloat16())
        out = evaluate(assembly_of(triton_batch_dot._int4_in_bfloat16), [*registers_of(batch.codes), *registers_of(zero)])
        for registers, expected in ((out[:2], 128.0 + (batch.codes & 15)), (out[2:4], 128.0 + (batch.codes >> 4)), (out[4:], zero)):
            assert torch.equal(values_of(registers).view(torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_planes_of_int4_codes_are_exact(dtype: torch.dtype) -> None:
    """For every word of four codes; each register holds two different words."""
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    words = words[torch.randperm(len(words), generator=torch.Generator().manual_seed(0))]
    function = triton_group_dot._planes_in_bfloat16 if dtype == torch.bfloat16 else triton_group_dot._planes_in_float16
    planes = evaluate(assembly_of(function, pack=2), [words.to(torch.int16).numpy().view(np.uint32)])
    offset = 128 if dtype == torch.bfloat16 else 0
    for place, plane in enumerate(planes):
        expected = (offset + (words >> 4 * place & 15)).to(dtype)
        assert torch.equal(torch.from_numpy(plane.view(np.int16).copy()), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_int8_codes_are_converted_exactly(dtype: torch.dtype) -> None:
    codes = torch.cartesian_prod(BYTES, BYTES).flip(1).flatten()  # each register holds two different pairs
    codes = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    function = triton_batch_dot._int8_in_bfloat16 if dtype == torch.bfloat16 else triton_batch_dot._int8_in_float16
    out = evaluate(assembly_of(function), registers_of(codes))
    assert torch.equal(values_of(out).view(dtype), codes.view(torch.int8).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_codes_of_a_kv_cache_are_converted_exactly(format: str, dtype: torch.dtype) -> None:
    """For every pair of bytes; each register holds two different pairs."""
    pairs = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    function = triton_kv.int8_parts if format == "int8" else triton_kv.int4_parts
    outputs = evaluate(assembly_of(function, dtype, pack=2), [pairs.numpy().view(np.uint32)])
    if format == "int8":
        expected = list(pairs.view(torch.int8).view(-1, 2).unbind(1))
    else:
        even, odd = pairs.view(torch.uint8).view(-1, 2).unbind(1)
        expected = [even & 15, odd & 15, even >> 4, odd >> 4]
    for register, codes in zip(outputs, expected, strict=True):
        assert torch.equal(torch.from_numpy(register.view(np.int16).copy()), codes.to(dtype).view(torch.int16))


# The evaluator itself, on examples of the PTX manual


def test_the_evaluator_follows_the_ptx_manual() -> None:
    def word(value: int) -> Array:
        return np.array([value], np.uint32)

    assert _prmt(word(0x33221100), word(0x77665544), word(0x7210)).item() == 0x77221100
    assert _lop3(word(0xF0), word(0xCC), word(0xAA), word(0xEA)).item() & 0xFF == (0xF0 & 0xCC) | 0xAA
    unit, step = 0x3F80, 0x3C00  # 1.0 and 2^-7, the last place of 1.0, in bfloat16
    assert _fma_bfloat16(word(unit << 16 | unit), word(step << 16 | unit), word(unit)).item() == 0x3C00_4000
    tie = word(np.float32(1 + 2**-8).view(np.uint32))
    odd = word(np.float32(1 + 3 * 2**-8).view(np.uint32))
    assert _convert_two(odd, tie).item() == 0x3F82_3F80  # the first operand is the upper half; both ties go to even
    assert INSTRUCTIONS["mul.rn.f16x2"](word(0x3C00_7BFF), word(0x0001_7BFF)).item() == 0x0001_7C00  # subnormals stay, overflow is infinite

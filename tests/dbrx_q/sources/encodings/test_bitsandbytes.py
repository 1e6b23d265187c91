"""bitsandbytes' 4-bit tensors: the values that bitsandbytes computes, also of some rows, exact repacking, and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.nf4 import bitsandbytes_functional
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.sources.encodings.base import LoadedParts
from dbrx_q.sources.encodings.bitsandbytes import Bitsandbytes

from .stored import linear_of

_STATE = "weight.quant_state.bitsandbytes__nf4"


def _parts(
    shape: tuple[int, int], kind: str = "nf4", *, double: bool = False, block: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts that bitsandbytes saves of a random weight, and its values by the formula, rounded to `dtype`.

    `dequantize_4bit` itself reads wrong scales on some CPUs where rows are no whole number of blocks, unless it is given a single row.
    """
    functional = bitsandbytes_functional()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=double)
    parts = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), -1).view(-1)[: weight.numel()]
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    values = state.code[codes.int()] * absmax.repeat_interleave(block)[: weight.numel()]
    return parts, values.view(shape).to(dtype)


def _encoding() -> Bitsandbytes:
    return Bitsandbytes({"quant_method": "bitsandbytes", "load_in_4bit": True}, "config.json")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "block"), [((12, 64), 64), ((520, 192), 64), ((301, 72), 64), ((40, 192), 128), ((3, 7), 64)])
def test_rows_are_those_of_the_whole_tensor(shape: tuple[int, int], block: int, kind: str, double: bool, dtype: torch.dtype) -> None:
    parts, values = _parts(shape, kind, double=double, block=block, dtype=dtype)
    encoding, linear = _encoding(), linear_of(shape, parts)
    encoding.check(linear)
    assert encoding.label(linear) == f"bitsandbytes {kind}{'-double' if double else ''}"
    whole = encoding.dequantize(linear, parts)
    assert whole.dtype == encoding.dtype(linear) == torch.float32
    assert torch.equal(whole, values.float())
    for first, count in ((0, 1), (1, 2), (shape[0] // 2, shape[0] - shape[0] // 2)):
        assert torch.equal(encoding.read_rows(linear, LoadedParts(parts), first, count), whole[first : first + count])


def test_rows_of_values_stored_in_another_dtype() -> None:
    """bnb_4bit_quant_storage."""
    parts, values = _parts((40, 64))
    parts["weight"] = parts["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    assert torch.equal(_encoding().read_rows(linear_of((40, 64), parts), LoadedParts(parts), 7, 5), values[7:12].float())


def test_rows_of_values_stored_as_one_row() -> None:
    """A transposed packed weight, as bitsandbytes also saves it."""
    parts, values = _parts((40, 64))
    parts["weight"] = parts["weight"].view(1, -1)
    assert torch.equal(_encoding().read_rows(linear_of((40, 64), parts), LoadedParts(parts), 7, 5), values[7:12].float())


def test_rows_of_a_stack_read_no_others() -> None:
    """Of a stack of experts only the blocks around the rows are read; with double quantization whole blocks of 256 scales."""
    for double, most in ((False, 5 * 192 // 2 + 64), (True, 5 * 192 // 2 + 2 * 256 * 32)):
        parts, values = _parts((2000, 192), double=double)
        linear, read = linear_of((2000, 192), parts), []

        class Counted(LoadedParts):
            def rows(self, suffix: str, first: int, count: int) -> torch.Tensor:
                rows = super().rows(suffix, first, count)
                read.append((suffix, rows.nbytes))  # noqa: B023 # called in this turn of the loop
                return rows

            def whole(self, suffix: str) -> torch.Tensor:
                assert suffix not in ("weight", "weight.absmax", "weight.nested_absmax")
                return super().whole(suffix)

        rows = _encoding().read_rows(linear, Counted(parts), 1000, 5)
        assert torch.equal(rows, values[1000:1005].float())
        assert {suffix for suffix, _ in read} == {"weight", "weight.absmax"} | ({"weight.nested_absmax"} if double else set())
        assert sum(nbytes for suffix, nbytes in read if suffix == "weight") <= most


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nf4_is_repacked_exactly(double: bool, dtype: torch.dtype) -> None:
    parts, values = _parts((520, 192), double=double, dtype=dtype)
    encoding, linear = _encoding(), linear_of((520, 192), parts)
    fmt = encoding.exact_format(linear)
    assert fmt == TensorFormat("nf4", 64)
    packed = encoding.repack(linear, parts)
    assert [(part.dtype, tuple(part.shape), part.is_contiguous()) for part in packed.parts.values()] == [
        (part.dtype, part.shape, True) for part in fmt.parts(520, 192)
    ]
    assert torch.equal(dequantize(packed, dtype), values)


@pytest.mark.parametrize(("shape", "kind", "block"), [((12, 64), "fp4", 64), ((12, 128), "nf4", 128), ((16, 72), "nf4", 64)])
def test_other_types_and_blocks_have_no_exact_format(shape: tuple[int, int], kind: str, block: int) -> None:
    assert _encoding().exact_format(linear_of(shape, _parts(shape, kind, block=block)[0])) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({_STATE: None}, "must have absmax, quant_map and one of quant_state.bitsandbytes__nf4 and fp4 beside them"),
        ({"weight.nested_absmax": torch.zeros(1)}, "must have absmax, quant_map and one of"),
        ({"weight": torch.zeros(7, 1, dtype=torch.uint8)}, "4-bit values must take 384 bytes by config.json; found 7"),
        ({"weight.absmax": torch.zeros(6, 2, dtype=torch.bfloat16)}, "absmax must be float32 with one axis; found bfloat16 .* AVX512-BF16"),
        ({"weight.absmax": torch.zeros(12, dtype=torch.uint8)}, r"weight.absmax must be float32 \[12\] .* found uint8 \[12\]"),
        ({"weight.absmax": torch.zeros(0)}, r"absmax must have one scale for each block; found \[0\]"),
        ({"weight.quant_map": torch.zeros(15)}, r"weight.quant_map must be float32 \[16\]"),
        ({_STATE: torch.zeros(8)}, f"{_STATE} must be uint8"),
    ],
)
def test_statistics_that_are_incomplete_or_of_another_tensor_are_refused(changes: dict[str, Any], message: str) -> None:
    parts = {suffix: part for suffix, part in (_parts((12, 64))[0] | changes).items() if part is not None}
    with pytest.raises(CheckpointError, match=f"model.safetensors: layer: .*{message}"):
        _encoding().check(linear_of((12, 64), parts))


def _with_state(parts: dict[str, torch.Tensor], **changes: Any) -> dict[str, torch.Tensor]:
    state = json.loads(bytes(parts[_STATE].tolist())) | changes
    return parts | {_STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocksize": 0}, "the quantization state must be bitsandbytes' JSON; found ValueError: blocksize 0"),
        ({"blocksize": -64}, "the quantization state must be bitsandbytes' JSON; found ValueError: blocksize -64"),
        ({"shape": [64, 12]}, r"its quantization state must have the shape \[12, 64\]"),
        ({"dtype": "int8"}, "a float dtype"),
        ({"dtype": "nothing"}, "the quantization state must be bitsandbytes' JSON; found AttributeError"),
        ({"quant_type": "fp4"}, "the type of its name"),
        ({"blocksize": 128}, r"weight.absmax must be float32 \[6\]"),
        ({"blocksize": "64"}, "the quantization state must be bitsandbytes' JSON"),
    ],
)
def test_a_state_of_another_tensor_is_refused(changes: dict[str, Any], message: str) -> None:
    parts = _with_state(_parts((12, 64))[0], **changes)
    linear = linear_of((12, 64), parts)
    for read in (_encoding().dequantize, _encoding().repack):
        with pytest.raises(CheckpointError, match=f"model.safetensors: layer: .*{message}"):
            read(linear, parts)


def test_a_state_that_is_no_json_is_refused() -> None:
    parts = _parts((12, 64))[0] | {_STATE: torch.tensor([123, 255], dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="layer: the quantization state must be bitsandbytes' JSON"):
        _encoding().dequantize(linear_of((12, 64), parts), parts)


def test_other_tables_are_not_repacked() -> None:
    parts = _parts((520, 192), double=True)[0]
    linear = linear_of((520, 192), parts)
    with pytest.raises(CheckpointError, match=r"quant_map must hold NF4's values; .* without --keep"):
        _encoding().repack(linear, parts | {"weight.quant_map": parts["weight.quant_map"] * 2})
    with pytest.raises(CheckpointError, match=r"bitsandbytes' dynamic map; .* without --keep"):
        _encoding().repack(linear, parts | {"weight.nested_quant_map": parts["weight.nested_quant_map"] * 2})


def test_eight_bits_are_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"config.json: bitsandbytes' 4-bit formats are read; found load_in_8bit. Save the model with"
    ):
        Bitsandbytes({"quant_method": "bitsandbytes", "load_in_8bit": True}, "config.json")

"""Bit allocation: the solver against exhaustive search and a bound, measured errors against the model, formats against their target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_q import DbrxConfig, DbrxForCausalLM
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat, dense_tensors, kind_of, oriented, parts_of
from dbrx_q.errors import FormatError, RequestError
from dbrx_q.kernels.formats.registry import FORMATS
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.quantize import quantize
from dbrx_q.quantize.calibration import output_errors as output_errors_module
from dbrx_q.quantize.calibration.allocation import FormatChoice, allocate
from dbrx_q.quantize.calibration.output_errors import OutputErrors, expected_change, output_errors
from dbrx_q.quantize.calibration.sequences import sequences_of
from dbrx_q.quantize.methods.rtn import rtn
from dbrx_q.quantize.pipeline.format_assignment import EXPERT_FORMATS, _fitting, allocated_formats
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"
INT4, INT8 = TensorFormat("int4", 64), TensorFormat("int8", 64)

SMALL = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def choices_of(tensors: list[list[tuple[int, float]]]) -> dict[str, list[FormatChoice]]:
    return {f"t{i}": [FormatChoice(INT4, bits, error) for bits, error in options] for i, options in enumerate(tensors)}


def total_bits(chosen: dict[str, FormatChoice]) -> int:
    return sum(choice.bits for choice in chosen.values())


def total_error(chosen: dict[str, FormatChoice]) -> float:
    return sum(choice.error for choice in chosen.values())


@given(SMALL, st.floats(0, 1), st.integers(1, 1 << 40))
@settings(max_examples=80, deadline=None)
def test_small_cases_are_solved_exactly(tensors: list[list[tuple[int, float]]], share: float, scale: int) -> None:
    tensors = [[(bits * scale, error) for bits, error in options] for options in tensors]
    least, most = (sum(extreme(bits for bits, _ in options) for options in tensors) for extreme in (min, max))
    target = least + int(share * (most - least))
    chosen = allocate(choices_of(tensors), target)
    assert total_bits(chosen) <= target
    best = min(sum(error for _, error in mix) for mix in itertools.product(*tensors) if sum(bits for bits, _ in mix) <= target)
    assert total_error(chosen) == pytest.approx(best, abs=1e-9)


def lower_bound(choices: dict[str, list[FormatChoice]], target: int) -> float:
    """A lower bound of the sum of errors, by the Lagrange dual on a grid of prices: a tensor may be split between two choices."""
    return max(
        sum(min(choice.error + price * choice.bits for choice in options) for options in choices.values()) - price * target
        for price in (10**exponent for exponent in torch.linspace(-19, -6, 500).tolist())
    )


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6])
def test_many_tensors_of_odd_sizes_are_close_to_the_bound(share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    choices = {}
    for i in range(80):
        size, sensitivity = (float(torch.rand((), generator=generator)) for _ in range(2))
        weights = 10**6 + int(size * 10**8)
        choices[f"t{i}"] = [
            FormatChoice(INT4, int(weights * bits), 10 ** (2 * sensitivity) * 4**-bits) for bits in (4.17, 4.31, 4.63, 8.25, 16)
        ]
    least, most = (sum(extreme(choice.bits for choice in options) for options in choices.values()) for extreme in (min, max))
    target = least + int(share * (most - least))
    chosen = allocate(choices, target)
    assert target * 0.998 <= total_bits(chosen) <= target
    assert total_error(chosen) <= 1.02 * lower_bound(choices, target)  # which may split one of the 80 tensors


@pytest.mark.parametrize("target", [99, 801])
def test_a_target_out_of_reach_is_refused(target: int) -> None:
    with pytest.raises(RequestError, match=rf"from 100 to 800 bits .* found {target}"):
        allocate(
            {
                "a": [FormatChoice(INT4, 40, 1.0), FormatChoice(INT8, 400, 0.1)],
                "b": [FormatChoice(INT4, 60, 1.0), FormatChoice(INT8, 400, 0.1)],
            },
            target,
        )


@pytest.fixture(scope="module")
def sequences(nano: Path) -> torch.Tensor:
    ids = DbrxTokenizer.from_pretrained(nano).encode(BOOK.read_text(encoding="utf-8"))
    return sequences_of(ids, count=8, length=96, seed=1)


CANDIDATES = (TensorFormat("int4", 128), INT4, INT8)


@pytest.fixture(scope="module")
def measured(nano: Path, sequences: torch.Tensor) -> OutputErrors:
    with Checkpoint(nano) as checkpoint:
        return output_errors(checkpoint, sequences, candidates_of(checkpoint))


def candidates_of(checkpoint: Checkpoint) -> dict[str, Sequence[TensorFormat]]:
    kinds: dict[str, Sequence[TensorFormat]] = {"embedding": [INT8], "attention": CANDIDATES, "experts": CANDIDATES, "head": CANDIDATES}
    return {name: kinds[kind_of(name)] for name in checkpoint.tensors if kind_of(name) in kinds}


def streams(model: DbrxForCausalLM, ids: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """Activations of the model, [T, ...]: embedded tokens, the residual stream after a layer's attention and after its experts, logits."""
    activations = {}

    def keep(_: torch.nn.Module, inputs: object, stream: torch.Tensor) -> None:
        activations["experts"] = stream

    def keep_attention(_: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        activations["attention"] = outputs[0]

    block = model.transformer.layers()[layer]
    handles = [block.register_forward_hook(keep), block.norm_attn_norm.register_forward_hook(keep_attention)]
    with torch.inference_mode():
        activations["head"] = model(ids).logits.flatten(0, 1)
        activations["head"] = activations["head"] - activations["head"].mean(-1, keepdim=True)
        activations["embedding"] = model.transformer.wte(ids.flatten(), torch.float32)
    for handle in handles:
        handle.remove()
    return activations


@pytest.mark.parametrize(
    "which", ["wte.weight", "attn.Wqkv.weight", "attn.out_proj.weight", "mlp.w1", "mlp.v1", "mlp.w2", "lm_head.weight"]
)
def test_measured_errors_equal_those_of_a_model_with_one_rounded_tensor(
    nano: Path, sequences: torch.Tensor, measured: OutputErrors, which: str
) -> None:
    layer = 2
    model = DbrxForCausalLM.from_pretrained(nano, dtype=torch.float32)
    parameter_name, parameter = next(
        (name, p) for name, p in model.named_parameters() if name.endswith(which) and (f".{layer}." in name or "blocks" not in name)
    )
    with Checkpoint(nano) as checkpoint:
        candidates = candidates_of(checkpoint)[parameter_name]
        tensor, before = checkpoint.tensors[parameter_name], streams(model, sequences, layer)[kind_of(parameter_name)]
        for fmt, error in zip(candidates, measured.errors[parameter_name], strict=True):
            plain = checkpoint.read(parameter_name)
            rows = oriented(plain, tensor) if tensor.experts else plain[None]
            rounded = [dequantize(rtn(matrix, fmt)[0]) for matrix in rows]
            parameter.data.copy_(torch.cat([matrix.T if which.endswith("w2") else matrix for matrix in rounded]))
            change = streams(model, sequences, layer)[kind_of(parameter_name)] - before
            truth = float((change.square().sum(-1) / before.square().sum(-1)).mean())
            assert error == pytest.approx(truth, rel=0.05), fmt


@pytest.mark.parametrize("which", ["attn.out_proj.weight", "mlp.w1", "mlp.v1", "mlp.w2"])
def test_the_error_of_a_trellis_code_is_expected_without_a_search(
    nano: Path, sequences: torch.Tensor, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = [TensorFormat(f"trellis{bits}-fast", 128) for bits in (2, 3, 4)]

    def searched(self: output_errors_module._Measurement, name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        for fmt in self._candidates[name]:
            yield dequantize(quantize(weight, fmt)) - weight

    with Checkpoint(nano) as checkpoint:
        name = next(name for name in checkpoint.tensors if ".2." in name and name.endswith(which))
        expected = output_errors(checkpoint, sequences, {name: formats}).errors[name]
        monkeypatch.setattr(output_errors_module._Measurement, "_changes", searched)
        truth = output_errors(checkpoint, sequences, {name: formats}).errors[name]
    assert expected == pytest.approx(truth, rel=0.12)
    assert expected[0] > 3 * expected[1] > 9 * expected[2]


@pytest.mark.parametrize("name", [name for name, record in FORMATS.items() if record.trellis])
def test_the_relative_error_of_a_code_is_that_of_normal_values(name: str) -> None:
    code = FORMATS[name].trellis
    assert code is not None
    weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(5))  # short rows would have few values far out
    error = dequantize(quantize(weight, TensorFormat(name, 128))) - weight
    square = weight.square().sum()
    assert float(error.square().sum() / square) == pytest.approx(code.relative_error, rel=0.03)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)) * weight.square().mean(-1, keepdim=True).sqrt()
    expected = expected_change(weight, code, noise)
    for change in (error, expected):
        assert float((change * weight).sum() / square) == pytest.approx(-code.relative_error, rel=0.15)
    assert float(expected.square().sum() / square) == pytest.approx(code.relative_error, rel=0.03)


def test_an_error_grows_at_the_routers_after_it() -> None:
    block = "transformer.blocks.{}.ffn.experts.mlp.w1"
    attention = "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight"
    measured = OutputErrors({}, [0.01, 0.02])
    assert measured.total({block.format(1): 1e-4}) == pytest.approx(1e-4)
    assert measured.total({"lm_head.weight": 1e-4}) == pytest.approx(1e-4)
    assert measured.total({attention: 1e-4}) == pytest.approx(1e-4 + 0.02 * 1e-2)
    first = 1e-4 + 0.01 * 1e-2
    assert measured.total({"transformer.wte.weight": 1e-4}) == pytest.approx(first + 0.02 * math.sqrt(first))
    chosen = {"transformer.wte.weight": 2e-4, block.format(0): 1e-4, attention: 3e-4, "lm_head.weight": 1e-3}
    weights = measured.weights(chosen)
    for name, error in chosen.items():
        increased = measured.total(chosen | {name: error * 1.001})
        assert (increased - measured.total(chosen)) / (error * 0.001) == pytest.approx(weights[name], rel=1e-2)


def test_of_several_sources_the_largest_error_counts(nano: Path, sequences: torch.Tensor) -> None:
    """Each error is the larger of those that the two sources have when they are measured alone."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 4000, (2, sequences.shape[1]), generator=generator)
    ids, sources = torch.stack([sequences[0], noise[0], sequences[1], noise[1]]), [0, 1, 0, 1]
    name = "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight"
    experts = "transformer.blocks.0.ffn.experts.mlp.w2"
    with Checkpoint(nano) as checkpoint:
        candidates = {name: [INT4], experts: [INT4]}
        both = output_errors(checkpoint, ids, candidates, sources=sources)
        alone = [output_errors(checkpoint, part, candidates) for part in (sequences[:2], noise)]
    for tensor in candidates:
        assert both.errors[tensor][0] == pytest.approx(max(part.errors[tensor][0] for part in alone), rel=1e-4)
        assert alone[0].errors[tensor] != alone[1].errors[tensor]


def test_measured_errors_do_not_depend_on_the_number_of_threads(nano: Path, sequences: torch.Tensor, measured: OutputErrors) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if threads != 3 else 2)
    try:
        with Checkpoint(nano) as checkpoint:
            assert output_errors(checkpoint, sequences, candidates_of(checkpoint)) == measured
    finally:
        torch.set_num_threads(threads)


def bits_per_weight(checkpoint: Checkpoint, formats: dict[str, TensorFormat]) -> float:
    nbytes = parameters = 0
    for name, tensor in checkpoint.tensors.items():
        parameters += math.prod(tensor.shape)
        if name in formats:
            nbytes += sum(math.prod(part.shape) * part.dtype.itemsize for part in parts_of(tensor, formats[name]))
        else:
            nbytes += checkpoint.infos[name].nbytes
    return 8 * nbytes / parameters


@pytest.mark.parametrize("target", [2.6, 3.5, 5.0, 8.0])
def test_allocated_formats_meet_their_target(nano: Path, sequences: torch.Tensor, target: float) -> None:
    with Checkpoint(nano) as checkpoint:
        formats = allocated_formats(checkpoint, sequences[:2], target)
        assert target - 0.02 <= bits_per_weight(checkpoint, formats) <= target


def test_allocated_formats_respect_rules_and_offered_formats(nano: Path, sequences: torch.Tensor) -> None:
    rules = ["w2=int8:128", "blocks.0.w2=nf4", "head=plain"]
    with Checkpoint(nano) as checkpoint:
        formats = allocated_formats(checkpoint, sequences[:2], 6.5, experts=(INT4, INT8), others=(INT8,), rules=rules)
        assert bits_per_weight(checkpoint, formats) <= 6.5
        offered = {"transformer.blocks.0.ffn.experts.mlp.w2": {"nf4:64"}}
        for name in checkpoint.tensors:
            kind = kind_of(name)
            matrix = {"int8:128"} if name.endswith("w2") else {"int4:64", "int8:64"}
            allowed = {"experts": matrix, "attention": {"int8:64"}, "embedding": {"int8:64"}}.get(kind, {"plain"})
            assert str(formats.get(name, "plain")) in offered.get(name, allowed), name


@pytest.mark.parametrize("target", [2.5, 17.0])
def test_an_unreachable_target_names_the_reachable_range(nano: Path, sequences: torch.Tensor, target: float) -> None:
    with Checkpoint(nano) as checkpoint:
        with pytest.raises(RequestError, match=r"from 2\.542 to 9\.434 bits per weight") as refused:
            allocated_formats(checkpoint, sequences, target)
        assert str(target) in str(refused.value)
        for end in (2.542, 9.434):  # the ends of the range in the message
            assert allocated_formats(checkpoint, sequences[:1, :8], end)


def test_of_a_trellis_format_one_group_size_is_measured() -> None:
    config = DbrxConfig(
        d_model=128, n_heads=2, n_layers=1, vocab_size=64, attn_config={"kv_n_heads": 1}, ffn_config={"ffn_hidden_size": 192}
    )
    tensors = {tensor.role: tensor for tensor in dense_tensors(config)}
    for role, size in (("w1", 128), ("w2", 64), ("Wqkv", 128)):
        fitting = [str(fmt) for fmt in _fitting(tensors[role], EXPERT_FORMATS)]
        assert fitting[:3] == [f"trellis{bits}:{size}" for bits in (2, 3, 4)]
        assert not any("trellis" in fmt for fmt in fitting[3:])


def test_formats_that_fit_no_shape_are_refused(small: Path) -> None:
    with Checkpoint(small) as checkpoint, pytest.raises(FormatError, match=r"mlp\.w1: .* 64 inputs; found int4:128"):
        allocated_formats(checkpoint, torch.zeros(1, 4, dtype=torch.int64), 4.5, experts=(TensorFormat("int4", 128),))

"""Sensitivity is compared with full runs of a model whose weights other code has quantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dbrx_q import DbrxForCausalLM
from dbrx_q.checkpoint.layout import TensorFormat, dense_tensors, oriented, tensor_formats
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError, FormatError, RequestError
from dbrx_q.eval.divergence import Distribution, TokenScores, scores
from dbrx_q.eval.observe import logit_chunks, observe
from dbrx_q.eval.resume import RunState
from dbrx_q.eval.sensitivity.measure import Unit, check_formats, measurable, units_of
from dbrx_q.eval.sensitivity.report import markdown
from dbrx_q.eval.sensitivity.result import Sensitivity
from dbrx_q.eval.sensitivity.walk import Walk
from dbrx_q.eval.windows import Protocol
from dbrx_q.kernels.formats import int4, int8, nf4

NANO = Path(__file__).parents[2] / "data" / "dbrx-nano"
PROTOCOL = Protocol.of(48, limit=3)
BLOCK = "transformer.blocks.{}.{}"
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
WQKV, W1, W2 = (
    BLOCK.format(n, m) for n, m in ((0, "norm_attn_norm.attn.Wqkv.weight"), (1, "ffn.experts.mlp.w1"), (2, "ffn.experts.mlp.w2"))
)


def alone(*names: str) -> list[Unit]:
    return [Unit(name, (name,)) for name in names]


def double_quantized(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, quantized with double quantization and dequantized by bitsandbytes alone."""
    functional = nf4.bitsandbytes_functional()
    codes, state = functional.quantize_4bit(matrix.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(codes, state)  # type: ignore[no-any-return] # a tensor


def model_with_rounded(names: Sequence[str], fmt: TensorFormat) -> DbrxForCausalLM:
    """A copy of the model in which some weights are quantized and dequantized."""
    model = DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    for tensor in dense_tensors(model.config):
        if tensor.name in names:
            weight = model.get_parameter(tensor.name).data
            matrices = oriented(weight, tensor) if tensor.experts else weight
            if fmt.format == "int4":
                decoded = int4.dequantize(int4.quantize(matrices, fmt.group_size))
            elif fmt.format == "int8":
                decoded = int8.dequantize(int8.quantize(matrices, fmt.group_size))
            elif fmt.format == "nf4":
                decoded = nf4.dequantize(nf4.quantize(matrices, fmt.group_size))
            else:
                decoded = torch.stack([double_quantized(matrix) for matrix in matrices])
            matrices.copy_(decoded)
    return model


def token_scores(model: DbrxForCausalLM, changed: DbrxForCausalLM, ids: list[int]) -> TokenScores:
    """Scores of full runs of both models."""
    text, windows, parts = torch.tensor(ids), PROTOCOL.windows(len(ids)), []
    with torch.inference_mode():
        for step, changed_step in zip(observe(model, text, windows), observe(changed, text, windows), strict=True):
            for (place, p), (_, q) in zip(logit_chunks(model, step), logit_chunks(changed, changed_step), strict=True):
                parts.append(scores(Distribution.of(p, step.targets[place]), Distribution.of(q, step.targets[place])))
    all_scores, start = TokenScores.zeros(sum(len(part.kl) for part in parts)), 0
    for part in parts:
        all_scores.put(start, part)
        start += len(part.kl)
    return all_scores


CASES = {
    "embedding-int8": (WTE, TensorFormat("int8", 64)),
    "first-block-nf4": (WQKV, TensorFormat("nf4", 64)),
    "w1-int4": (W1, TensorFormat("int4", 128)),
    "w2-int4": (W2, TensorFormat("int4", 32)),
    "w2-nf4-double": (W2, TensorFormat("nf4-double", 64)),
    "head-int4": (HEAD, TensorFormat("int4", 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_gives_the_bits_of_a_full_run(model: DbrxForCausalLM, ids: list[int], case: str) -> None:
    name, fmt = CASES[case]
    walk = Walk(model, torch.tensor(ids), PROTOCOL.windows(len(ids)))
    with torch.inference_mode():
        walk.go_to(walk.place_of(name))
        (outcome,) = walk.measure([([name], fmt)])
    assert not isinstance(outcome, FormatError)
    measured_scores = outcome.scores
    expected = token_scores(model, model_with_rounded([name], fmt), ids)
    for field in ("kl", "nll", "nll_reference"):
        np.testing.assert_array_equal(getattr(measured_scores, field), getattr(expected, field))
    assert measured_scores.kl.mean() > 1e-7


@pytest.mark.parametrize("by", ["kind", "layer"])
def test_several_tensors_give_the_bits_of_a_full_run(
    model: DbrxForCausalLM, ids: list[int], by: str, measure: Callable[..., Sensitivity]
) -> None:
    fmt = TensorFormat("int4", 64)
    units = [unit for unit in units_of(model.config, by) if unit.name in ("experts", "attention", "layer 1")]
    units_measured = measure(model, ids, units, [fmt], by=by).units
    assert [unit.name for unit in units_measured] == (["attention", "experts"] if by == "kind" else ["layer 1"])
    for unit in units_measured:
        expected = token_scores(model, model_with_rounded(unit.tensors, fmt), ids)
        assert unit.mean_kl == expected.kl.mean()
        assert unit.mean_kl_stderr == expected.kl.std(ddof=1) / len(expected.kl) ** 0.5
        change = expected.nll - expected.nll_reference
        assert unit.delta_ln_ppl == change.mean()
        assert unit.delta_ln_ppl_stderr == change.std(ddof=1) / len(change) ** 0.5


def test_figures_follow_their_definitions(model: DbrxForCausalLM, ids: list[int], measure: Callable[..., Sensitivity]) -> None:
    """Figures are compared with float64 on the logits of `forward`, and with the sizes of the formats."""
    fmt = TensorFormat("int4", 128)
    result = measure(model, ids, alone(W1), [fmt])
    (unit,) = result.units
    rounded_model = model_with_rounded([W1], fmt)
    window = torch.tensor(ids[: 3 * 48]).view(3, 48)
    p, q = (m(window, use_cache=False).logits[:, :-1].double().log_softmax(-1).numpy() for m in (model, rounded_model))
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert unit.mean_kl == pytest.approx(kl.mean(), rel=1e-4)
    nll = -np.take_along_axis(p, window[:, 1:, None].numpy(), -1)
    assert result.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-6)
    assert (result.windows, result.tokens, result.context, result.protocol) == (3, 141, 48, "non-overlapping")

    weight = model.get_parameter(W1)
    packed = int4.quantize(weight, 128)
    assert unit.parameters == weight.numel()
    assert unit.bits_per_weight == 8 * packed.nbytes / weight.numel()
    assert unit.saved_bytes == 2 * weight.numel() - packed.nbytes
    assert unit.kl_per_saved_byte == unit.mean_kl / unit.saved_bytes
    error = (int4.dequantize(packed).double() - weight.double()).square().sum() / weight.double().square().sum()
    assert unit.weight_error == pytest.approx(float(error.sqrt()), rel=1e-9)


def test_the_loss_equals_that_of_the_packed_checkpoint(
    model: DbrxForCausalLM, ids: list[int], tmp_path: Path, measure: Callable[..., Sensitivity]
) -> None:
    from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

    fmt = TensorFormat("int4", 64)
    (experts,) = (unit for unit in units_of(model.config, "kind") if unit.name == "experts")
    quantize_checkpoint(NANO, tmp_path / "packed", QuantizationRequest(lambda checkpoint: dict.fromkeys(experts.tensors, fmt)))
    packed = DbrxForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    (unit,) = measure(model, ids, [experts], [fmt], by="kind").units
    # A few tokens' fourth expert differs by one rounding of a float32.
    assert unit.mean_kl == pytest.approx(token_scores(model, packed, ids).kl.mean(), rel=1e-3)


def test_units(model: DbrxForCausalLM) -> None:
    every = [tensor.name for tensor in dense_tensors(model.config) if len(tensor.shape) == 2 and "router" not in tensor.name]
    tensors = units_of(model.config, "tensor")
    assert [unit.name for unit in tensors] == every
    assert all(unit.tensors == (unit.name,) for unit in tensors)
    layers = units_of(model.config, "layer")
    assert [unit.name for unit in layers] == [f"layer {layer}" for layer in range(4)]
    assert [name for unit in layers for name in unit.tensors] == [name for name in every if ".blocks." in name]
    kinds = {unit.name: unit.tensors for unit in units_of(model.config, "kind")}
    assert list(kinds) == ["embedding", "attention", "Wqkv", "out_proj", "experts", "w1", "v1", "w2", "head"]
    assert kinds["embedding"] == (WTE,)
    assert kinds["head"] == (HEAD,)
    assert sorted(kinds["Wqkv"] + kinds["out_proj"]) == sorted(kinds["attention"])
    assert sorted(kinds["w1"] + kinds["v1"] + kinds["w2"]) == sorted(kinds["experts"])
    assert len(kinds["experts"]) == 12
    assert sorted(kinds["embedding"] + kinds["attention"] + kinds["experts"] + kinds["head"]) == sorted(every)


def test_order_and_progress(model: DbrxForCausalLM, ids: list[int], measure: Callable[..., Sensitivity]) -> None:
    """Units are returned in the requested order, whatever the order in which they are measured."""
    progress: list[tuple[int, int]] = []
    formats = [TensorFormat("int8", 64), TensorFormat("int4", 64)]
    result = measure(model, ids, alone(HEAD, W2, WTE), formats, lambda done, total: progress.append((done, total)))
    assert [(unit.name, unit.format) for unit in result.units] == [(name, f) for name in (HEAD, W2, WTE) for f in ("int8", "int4")]
    assert progress == [(done, 6) for done in range(7)]
    assert result.complete
    assert Sensitivity.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    single = measure(model, ids, alone(W2), formats[1:]).units
    assert single == [unit for unit in result.units if (unit.name, unit.format) == (W2, "int4")]


def test_an_interruption_keeps_finished_units(model: DbrxForCausalLM, ids: list[int], measure: Callable[..., Sensitivity]) -> None:
    formats = [TensorFormat("int8", 64)]
    for stop in (0, 1):
        interrupted: list[int] = []

        def interrupt(done: int, total: int, stop: int = stop, interrupted: list[int] = interrupted) -> None:
            if done == stop and not interrupted:
                interrupted.append(done)
                raise KeyboardInterrupt

        if stop == 0:
            with pytest.raises(KeyboardInterrupt):
                measure(model, ids, alone(W1, W2), formats, interrupt)
        else:
            result = measure(model, ids, alone(W1, W2), formats, interrupt)
            assert not result.complete
            assert result.units == measure(model, ids, alone(W1), formats).units


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_resumed_run_skips_finished_parts(
    model: DbrxForCausalLM,
    ids: list[int],
    tmp_path: Path,
    error: type[BaseException],
    measure: Callable[..., Sensitivity],
    interrupt_once: Callable[..., Callable[[int, int], None]],
) -> None:
    formats = [TensorFormat("int8", 64), TensorFormat("int4", 64)]
    units = alone(HEAD, WQKV, W2)
    state = RunState({"run": 1}, tmp_path)
    if error is KeyboardInterrupt:
        partial = measure(model, ids, units, formats, interrupt_once(3, error), state=state)
        assert (partial.complete, len(partial.units)) == (False, 3)
        partial = measure(model, ids, units, formats, interrupt_once(3, error), state=state)  # interrupted again before the first new unit
        assert (partial.complete, len(partial.units)) == (False, 3)
    else:
        with pytest.raises(error):
            measure(model, ids, units, formats, interrupt_once(3, error), state=state)
    reported: list[int] = []
    expected = measure(model, ids, units, formats)
    assert measure(model, ids, units, formats, lambda done, total: reported.append(done), state=state) == expected
    assert reported[0] == 3
    reported.clear()
    assert measure(model, ids, units, formats, lambda done, total: reported.append(done), state=state) == expected
    assert reported == [6]


def test_a_tensor_that_a_format_cannot_represent(ids: list[int], measure: Callable[..., Sensitivity]) -> None:
    """It is listed as failed, and all others are measured."""
    model = DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    before = measure(model, ids, alone(WQKV, W2), [TensorFormat("nf4", 64)])
    model.get_parameter(W1).data[0, 0] = 1e9
    with pytest.raises(FormatError, match=r"blocks.1.ffn.experts.mlp.w1 in int4: a group's scale must stay below 65504"):
        measure(model, ids, alone(W1), [TensorFormat("int4", 64)])
    model.get_parameter(W1).data[0, 0] = 0.01
    formats = [TensorFormat("int4", 64), TensorFormat("nf4", 64)]
    good = measure(model, ids, alone(WQKV, W2), formats)
    assert good.failed == []
    model.get_parameter(WQKV).data[0, 0] = 1e9
    result = measure(model, ids, alone(WQKV, W2), formats)
    assert [(unit.name, unit.format) for unit in result.units] == [(WQKV, "nf4"), (W2, "int4"), (W2, "nf4")]
    assert result.complete
    (failed,) = result.failed
    assert (failed.name, failed.format, failed.group_size) == (WQKV, "int4", 64)
    assert "a group's scale must stay below 65504" in failed.reason
    assert Sensitivity.from_dict(result.to_dict()) == result
    assert "not measured: blocks.0.Wqkv in int4:64: " in markdown(result)
    assert before.failed == []


def test_formats_that_a_checkpoint_may_not_have_are_skipped(
    model: DbrxForCausalLM, ids: list[int], measure: Callable[..., Sensitivity]
) -> None:
    """A part is measured in a format exactly if a checkpoint may have it in that format."""
    formats = [TensorFormat(name, 64) for name in ("int4", "int8", "nf4")]
    for tensor in units_of(model.config, "tensor"):
        for fmt in formats:
            config = model.config.to_dict()
            entry = {"format": fmt.format, "group_size": fmt.group_size}
            config["quantization_config"] = {"quant_method": "dbrx_q", "format_version": 1, "tensors": {tensor.name: entry}}
            try:
                allowed = bool(tensor_formats(DbrxConfig.from_dict(config), "test"))
            except CheckpointError:
                allowed = False
            parts, skipped = measurable([tensor], [fmt])
            assert (len(parts), len(skipped)) == ((1, 0) if allowed else (0, 1))
    result = measure(model, ids, alone(WTE, W2), [formats[2]])
    assert [unit.name for unit in result.units] == [W2]
    assert [(part.name, part.format) for part in result.skipped] == [(WTE, "nf4")]
    assert "not measured: wte in nf4:64: the embedding must be int4, int8, affine4" in markdown(result)
    with pytest.raises(RequestError, match=r"embedding must be int4, int8, .* or plain; found nf4, nf4-double .*int8"):
        measure(model, ids, alone(WTE), [formats[2], TensorFormat("nf4-double", 64)])


def test_bad_requests_are_refused(
    model: DbrxForCausalLM, ids: list[int], quantized_nano: Path, measure: Callable[..., Sensitivity]
) -> None:
    with pytest.raises(FormatError, match=r"Wqkv.weight in nf4: the group size must be one of 64; found 128.*--group-size"):
        check_formats(model.config, alone(WQKV), [TensorFormat("int4", 128), TensorFormat("nf4", 128)])
    config = DbrxConfig.from_dict(model.config.to_dict() | {"ffn_config": model.config.ffn_config.to_dict() | {"ffn_hidden_size": 96}})
    check_formats(config, units_of(config, "tensor"), [TensorFormat("int4", 32)])
    with pytest.raises(FormatError, match=r"blocks.0.ffn.experts.mlp.w2 in int4: .* must divide the reduction axis.* 64 and 96"):
        check_formats(config, units_of(config, "tensor"), [TensorFormat("int4", 64)])
    with pytest.raises(RequestError, match="plain weights; found packed ones"):
        measure(DbrxForCausalLM.from_pretrained(quantized_nano), ids, alone(WTE), [TensorFormat("int4", 64)])
    with pytest.raises(RequestError, match="must fill one window of 48 tokens; it has 47"):
        measure(model, ids[:47], alone(WTE), [TensorFormat("int4", 64)])

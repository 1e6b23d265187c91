"""Weights are restored after a measurement, and memory and passes over streamed experts stay bounded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxForCausalLM
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.eval.resume import RunState
from dbrx_q.eval.sensitivity.measure import Unit, units_of
from dbrx_q.eval.sensitivity.result import Sensitivity
from dbrx_q.eval.sensitivity.walk import Walk
from dbrx_q.eval.windows import Protocol
from dbrx_q.model.layers import DbrxBlock
from dbrx_q.sources.open import open_source

NANO = Path(__file__).parents[2] / "data" / "dbrx-nano"
BLOCK = "transformer.blocks.{}.{}"
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
WQKV, W1, W2 = (
    BLOCK.format(n, m) for n, m in ((0, "norm_attn_norm.attn.Wqkv.weight"), (1, "ffn.experts.mlp.w1"), (2, "ffn.experts.mlp.w2"))
)


def alone(*names: str) -> list[Unit]:
    return [Unit(name, (name,)) for name in names]


def test_weights_are_restored(ids: list[int], measure: Callable[..., Sensitivity]) -> None:
    model = DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    bits = {name: parameter.clone() for name, parameter in parameters.items()}
    store = model.transformer.expert_store

    def check() -> None:
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert all(torch.equal(parameter, bits[name]) for name, parameter in model.named_parameters())
        assert model.transformer.expert_store is store

    units = [*alone(WTE, HEAD), *units_of(model.config, "layer")[2:3]]
    before = measure(model, ids, units, [TensorFormat("int8", 64)])
    check()

    calls = []

    def fail(module: torch.nn.Module, *_: object) -> None:
        calls.append(not torch.equal(module.norm_attn_norm.attn.Wqkv.weight, bits[BLOCK.format(2, "norm_attn_norm.attn.Wqkv.weight")]))
        if calls[-1]:
            raise MemoryError

    handle = model.transformer.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        measure(model, ids, units[2:], [TensorFormat("int8", 64)])
    handle.remove()
    assert calls[-1], "the weights were not replaced when the error was raised"
    check()
    assert measure(model, ids, units, [TensorFormat("int8", 64)]) == before


def test_streamed_experts_give_the_same_figures(model: DbrxForCausalLM, ids: list[int], measure: Callable[..., Sensitivity]) -> None:
    streamed = open_source(NANO).load(dtype=torch.float32, device=torch.device("cpu"), stream=True)
    formats = [TensorFormat("int4", 64)]
    assert measure(streamed, ids, alone(WQKV, W2), formats) == measure(model, ids, alone(WQKV, W2), formats)


def test_streamed_experts_are_dequantized_once_for_several_parts(
    model: DbrxForCausalLM,
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    measure: Callable[..., Sensitivity],
    interrupt_once: Callable[..., Callable[[int, int], None]],
) -> None:
    source = open_source(NANO)
    reader, opened = source.reader, []  # type: ignore[attr-defined] # of a source that is dequantized

    def counted() -> Any:
        opened.append(1)
        return reader()

    monkeypatch.setattr(source, "reader", counted)
    streamed = source.load(dtype=torch.float32, device=torch.device("cpu"), stream=True)  # type: ignore[call-arg] # as above
    units = [unit for unit in units_of(model.config, "tensor") if ".blocks.1." in unit.name]
    units += [unit for unit in units_of(model.config, "layer") if unit.name == "layer 1"]
    formats = [TensorFormat("int4", 64)]
    opened.clear()
    result = measure(streamed, ids, units, formats)
    assert len(opened) == 4 + 1 + 3  # all four blocks, the block before these parts, and the three from theirs on
    assert result == measure(model, ids, units, formats)

    weight = "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight"
    state = RunState({"run": 1}, tmp_path)
    with pytest.raises(OSError, match="pressed"):
        measure(streamed, ids, units, formats, interrupt_once(2, OSError), state=state)
    assert measure(streamed, ids, units, formats, state=state) == result
    streamed.get_parameter(weight).data[0, 0] = 1e9
    broken = measure(streamed, ids, units, formats)
    assert [part.name for part in broken.failed] == [weight, "layer 1"]
    assert [unit.name for unit in broken.units] == [unit.name for unit in units if weight not in unit.tensors]


def live_tensors(tensors: Sequence[weakref.ref[torch.Tensor]]) -> int:
    return len({held.data_ptr() for tensor in tensors if (held := tensor()) is not None})


def test_memory_of_residual_streams(model: DbrxForCausalLM, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """2 D numbers per token at the walk's place, 2 D of the run, and the activations of one step."""
    from dbrx_q.eval import observe as observe_module

    monkeypatch.setattr(observe_module, "STEP_TOKENS", 48)
    steps, outputs, most = 8, list[weakref.ref[torch.Tensor]](), [0]

    run = DbrxBlock.run

    def watched(block: DbrxBlock, *args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = run(block, *args)
        outputs.extend(weakref.ref(part) for part in output if part is not None)
        most[0] = max(most[0], live_tensors(outputs))
        return output

    monkeypatch.setattr(DbrxBlock, "run", watched)
    with torch.inference_mode():
        walk = Walk(model, torch.tensor(ids), Protocol.of(48, limit=steps).windows(len(ids)))
        walk.go_to(2)
        assert most[0] <= 2 * steps + 4
        most[0] = 0
        list(walk.measure([([W1], TensorFormat("int4", 64))]))
        assert 4 * steps <= most[0] + 4 <= 4 * steps + 8


def test_one_block_is_quantized_at_a_time(
    model: DbrxForCausalLM, ids: list[int], monkeypatch: pytest.MonkeyPatch, measure: Callable[..., Sensitivity]
) -> None:
    from dbrx_q.eval.sensitivity import rounding, walk

    held: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(weight: torch.Tensor, fmt: TensorFormat) -> tuple[torch.Tensor, rounding.Rounding]:
        nonlocal most
        decoded, error = rounding.rounded(weight, fmt)
        held.append(weakref.ref(decoded))
        most = max(most, live_tensors(held))
        return decoded, error

    monkeypatch.setattr(walk, "rounded", watched)
    (experts,) = (unit for unit in units_of(model.config, "kind") if unit.name == "experts")
    measure(model, ids, [experts], [TensorFormat("int4", 64)])
    assert (len(held), most) == (12, 3)

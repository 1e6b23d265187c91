"""Sensitivity against runs of the whole model with the same weights rounded by other code."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dbrx_q import DbrxForCausalLM, DbrxTokenizer
from dbrx_q.checkpoint.layout import TensorFormat, dense_tensors, oriented, tensor_formats
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError, FormatError, RequestError
from dbrx_q.eval.divergence import Distribution, TokenScores, scores
from dbrx_q.eval.observe import logit_chunks, observe
from dbrx_q.eval.resume import RunState
from dbrx_q.eval.sensitivity.measure import Unit, check_formats, measurable, sensitivity, units_of
from dbrx_q.eval.sensitivity.report import markdown, plot, short_name, table, write_report
from dbrx_q.eval.sensitivity.result import Sensitivity, UnitResult
from dbrx_q.eval.sensitivity.walk import Walk
from dbrx_q.eval.texts import Text, load_text
from dbrx_q.eval.windows import Protocol
from dbrx_q.kernels.formats import int4, int8, nf4
from dbrx_q.sources.open import open_source

DATA = Path(__file__).parents[2] / "data"
NANO, BOOK = DATA / "dbrx-nano", DATA / "war-of-the-worlds.txt"
HOW = Protocol.of(48, limit=3)
TEXT = Text("a book", "words", "0" * 64)
BLOCK = "transformer.blocks.{}.{}"
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
WQKV, W1, W2 = (
    BLOCK.format(n, m) for n, m in ((0, "norm_attn_norm.attn.Wqkv.weight"), (1, "ffn.experts.mlp.w1"), (2, "ffn.experts.mlp.w2"))
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return DbrxTokenizer.from_pretrained(NANO).encode(load_text(str(BOOK)).text[:3000])


def measured(
    model: DbrxForCausalLM,
    ids: list[int],
    units: Sequence[Unit],
    formats: Sequence[TensorFormat],
    on_run: Callable[[int, int], None] = lambda done, total: None,
    by: str = "tensor",
    state: RunState | None = None,
) -> Sensitivity:
    record: dict[str, Any] = {"checkpoint": "nano", "sha256": "1" * 64, "text": TEXT, "by": by, "provenance": {"command": "dbrx-q"}}
    return sensitivity(model, ids, HOW, units, formats, state=state, on_run=on_run, **record)


def alone(*names: str) -> list[Unit]:
    return [Unit(name, (name,)) for name in names]


def double_quantized(matrix: torch.Tensor) -> torch.Tensor:
    """By bitsandbytes alone."""
    functional = nf4.bitsandbytes_functional()
    codes, state = functional.quantize_4bit(matrix.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(codes, state)  # type: ignore[no-any-return] # a tensor


def with_rounded(names: Sequence[str], fmt: TensorFormat) -> DbrxForCausalLM:
    """Another copy of the model, with some weights written over."""
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


def token_scores(before: DbrxForCausalLM, after: DbrxForCausalLM, ids: list[int]) -> TokenScores:
    """Of runs of two whole models."""
    text, windows, found = torch.tensor(ids), HOW.windows(len(ids)), []
    with torch.inference_mode():
        for one, other in zip(observe(before, text, windows), observe(after, text, windows), strict=True):
            for (place, p), (_, q) in zip(logit_chunks(before, one), logit_chunks(after, other), strict=True):
                found.append(scores(Distribution.of(p, one.targets[place]), Distribution.of(q, one.targets[place])))
    whole, at = TokenScores.zeros(sum(len(part.kl) for part in found)), 0
    for part in found:
        whole.put(at, part)
        at += len(part.kl)
    return whole


CASES = {
    "embedding-int8": (WTE, TensorFormat("int8", 64)),
    "first-block-nf4": (WQKV, TensorFormat("nf4", 64)),
    "w1-int4": (W1, TensorFormat("int4", 128)),
    "w2-int4": (W2, TensorFormat("int4", 32)),
    "w2-nf4-double": (W2, TensorFormat("nf4-double", 64)),
    "head-int4": (HEAD, TensorFormat("int4", 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_gives_the_bits_of_a_whole_run(model: DbrxForCausalLM, ids: list[int], case: str) -> None:
    name, fmt = CASES[case]
    walk = Walk(model, torch.tensor(ids), HOW.windows(len(ids)))
    with torch.inference_mode():
        walk.go_to(walk.place_of(name))
        (found,) = walk.measure([([name], fmt)])
    assert not isinstance(found, FormatError)
    seen = found.scores
    expected = token_scores(model, with_rounded([name], fmt), ids)
    for field in ("kl", "nll", "nll_reference"):
        np.testing.assert_array_equal(getattr(seen, field), getattr(expected, field))
    assert seen.kl.mean() > 1e-7


@pytest.mark.parametrize("by", ["kind", "layer"])
def test_several_tensors_give_the_bits_of_a_whole_run(model: DbrxForCausalLM, ids: list[int], by: str) -> None:
    fmt = TensorFormat("int4", 64)
    units = [unit for unit in units_of(model.config, by) if unit.name in ("experts", "attention", "layer 1")]
    found = measured(model, ids, units, [fmt], by=by).units
    assert [unit.name for unit in found] == (["attention", "experts"] if by == "kind" else ["layer 1"])
    for unit in found:
        expected = token_scores(model, with_rounded(unit.tensors, fmt), ids)
        assert unit.mean_kl == expected.kl.mean()
        assert unit.mean_kl_stderr == expected.kl.std(ddof=1) / len(expected.kl) ** 0.5
        change = expected.nll - expected.nll_reference
        assert unit.delta_ln_ppl == change.mean()
        assert unit.delta_ln_ppl_stderr == change.std(ddof=1) / len(change) ** 0.5


def test_what_is_counted(model: DbrxForCausalLM, ids: list[int]) -> None:
    """Against float64 on the logits of `forward`, and the formats' own sizes."""
    fmt = TensorFormat("int4", 128)
    found = measured(model, ids, alone(W1), [fmt])
    (unit,) = found.units
    other = with_rounded([W1], fmt)
    window = torch.tensor(ids[: 3 * 48]).view(3, 48)
    p, q = (m(window, use_cache=False).logits[:, :-1].double().log_softmax(-1).numpy() for m in (model, other))
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert unit.mean_kl == pytest.approx(kl.mean(), rel=1e-4)
    nll = -np.take_along_axis(p, window[:, 1:, None].numpy(), -1)
    assert found.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-6)
    assert (found.windows, found.tokens, found.context, found.protocol) == (3, 141, 48, "non-overlapping")

    weight = model.get_parameter(W1)
    packed = int4.quantize(weight, 128)
    assert unit.parameters == weight.numel()
    assert unit.bits_per_weight == 8 * packed.nbytes / weight.numel()
    assert unit.saved_bytes == 2 * weight.numel() - packed.nbytes
    assert unit.kl_per_saved_byte == unit.mean_kl / unit.saved_bytes
    error = (int4.dequantize(packed).double() - weight.double()).square().sum() / weight.double().square().sum()
    assert unit.weight_error == pytest.approx(float(error.sqrt()), rel=1e-9)


def test_it_is_what_the_packed_checkpoint_loses(model: DbrxForCausalLM, ids: list[int], tmp_path: Path) -> None:
    from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

    fmt = TensorFormat("int4", 64)
    (experts,) = (unit for unit in units_of(model.config, "kind") if unit.name == "experts")
    quantize_checkpoint(NANO, tmp_path / "packed", QuantizationRequest(lambda checkpoint: dict.fromkeys(experts.tensors, fmt)))
    packed = DbrxForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    (unit,) = measured(model, ids, [experts], [fmt], by="kind").units
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


def test_weights_are_in_place_afterwards(ids: list[int]) -> None:
    model = DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    bits = {name: parameter.clone() for name, parameter in parameters.items()}
    store = model.transformer.expert_store

    def check() -> None:
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert all(torch.equal(parameter, bits[name]) for name, parameter in model.named_parameters())
        assert model.transformer.expert_store is store

    units = [*alone(WTE, HEAD), *units_of(model.config, "layer")[2:3]]
    before = measured(model, ids, units, [TensorFormat("int8", 64)])
    check()

    calls = []

    def fail(module: torch.nn.Module, *_: object) -> None:
        calls.append(not torch.equal(module.norm_attn_norm.attn.Wqkv.weight, bits[BLOCK.format(2, "norm_attn_norm.attn.Wqkv.weight")]))
        if calls[-1]:
            raise MemoryError

    handle = model.transformer.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        measured(model, ids, units[2:], [TensorFormat("int8", 64)])
    handle.remove()
    assert calls[-1], "the weights were not replaced when the error came"
    check()
    assert measured(model, ids, units, [TensorFormat("int8", 64)]) == before


def test_streamed_experts_give_the_same(model: DbrxForCausalLM, ids: list[int]) -> None:
    streamed = open_source(NANO).load(dtype=torch.float32, device=torch.device("cpu"), stream=True)
    formats = [TensorFormat("int4", 64)]
    assert measured(streamed, ids, alone(WQKV, W2), formats) == measured(model, ids, alone(WQKV, W2), formats)


def test_streamed_experts_are_decoded_once_for_several_parts(
    model: DbrxForCausalLM, ids: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = open_source(NANO)
    reader, opened = source.reader, []  # type: ignore[attr-defined] # of a source that is decoded

    def counted() -> Any:
        opened.append(1)
        return reader()

    monkeypatch.setattr(source, "reader", counted)
    streamed = source.load(dtype=torch.float32, device=torch.device("cpu"), stream=True)  # type: ignore[call-arg] # as above
    units = [unit for unit in units_of(model.config, "tensor") if ".blocks.1." in unit.name]
    units += [unit for unit in units_of(model.config, "layer") if unit.name == "layer 1"]
    formats = [TensorFormat("int4", 64)]
    opened.clear()
    found = measured(streamed, ids, units, formats)
    assert len(opened) == 4 + 1 + 3  # all four blocks, the one before these parts, and those from theirs on
    assert found == measured(model, ids, units, formats)

    weight = "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight"
    state = RunState({"run": 1}, tmp_path)
    with pytest.raises(OSError, match="pressed"):
        measured(streamed, ids, units, formats, pressed_once(2, OSError), state=state)
    assert measured(streamed, ids, units, formats, state=state) == found
    streamed.get_parameter(weight).data[0, 0] = 1e9
    broken = measured(streamed, ids, units, formats)
    assert [part.name for part in broken.failed] == [weight, "layer 1"]
    assert [unit.name for unit in broken.units] == [unit.name for unit in units if weight not in unit.tensors]


def live(tensors: Sequence[weakref.ref[torch.Tensor]]) -> int:
    return len({found.data_ptr() for tensor in tensors if (found := tensor()) is not None})


def test_streams_take_their_own_place(model: DbrxForCausalLM, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers of D a token where the walk stands, two of the run, and one step on its way."""
    from dbrx_q.eval import observe as observe_module

    monkeypatch.setattr(observe_module, "STEP_TOKENS", 48)
    steps, seen, most = 8, list[weakref.ref[torch.Tensor]](), [0]

    def watch(module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        seen.extend(weakref.ref(part) for part in output[:2])
        most[0] = max(most[0], live(seen))

    handles = [block.register_forward_hook(watch) for block in model.transformer.layers()]
    try:
        with torch.inference_mode():
            walk = Walk(model, torch.tensor(ids), Protocol.of(48, limit=steps).windows(len(ids)))
            walk.go_to(2)
            assert most[0] <= 2 * steps + 4
            most[0] = 0
            list(walk.measure([([W1], TensorFormat("int4", 64))]))
            assert 4 * steps <= most[0] + 4 <= 4 * steps + 8
    finally:
        for handle in handles:
            handle.remove()


def test_one_block_is_rounded_at_a_time(model: DbrxForCausalLM, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from dbrx_q.eval.sensitivity import rounding, walk

    held: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(weight: torch.Tensor, fmt: TensorFormat) -> tuple[torch.Tensor, rounding.Rounding]:
        nonlocal most
        decoded, what = rounding.rounded(weight, fmt)
        held.append(weakref.ref(decoded))
        most = max(most, live(held))
        return decoded, what

    monkeypatch.setattr(walk, "rounded", watched)
    (experts,) = (unit for unit in units_of(model.config, "kind") if unit.name == "experts")
    measured(model, ids, [experts], [TensorFormat("int4", 64)])
    assert (len(held), most) == (12, 3)


def test_order_and_progress(model: DbrxForCausalLM, ids: list[int]) -> None:
    """Units come in the order of their request, whatever the order in which they are measured."""
    seen: list[tuple[int, int]] = []
    formats = [TensorFormat("int8", 64), TensorFormat("int4", 64)]
    found = measured(model, ids, alone(HEAD, W2, WTE), formats, lambda done, total: seen.append((done, total)))
    assert [(unit.name, unit.format) for unit in found.units] == [(name, f) for name in (HEAD, W2) for f in ("int8", "int4")] + [
        (WTE, "int8")
    ]
    assert seen == [(done, 5) for done in range(6)]
    assert found.complete
    assert Sensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    single = measured(model, ids, alone(W2), formats[1:]).units
    assert single == [unit for unit in found.units if (unit.name, unit.format) == (W2, "int4")]


def test_an_interruption_leaves_what_is_done(model: DbrxForCausalLM, ids: list[int]) -> None:
    formats = [TensorFormat("int8", 64)]
    for stop in (0, 1):
        pressed: list[int] = []

        def press(done: int, total: int, stop: int = stop, pressed: list[int] = pressed) -> None:
            if done == stop and not pressed:
                pressed.append(done)
                raise KeyboardInterrupt

        if stop == 0:
            with pytest.raises(KeyboardInterrupt):
                measured(model, ids, alone(W1, W2), formats, press)
        else:
            found = measured(model, ids, alone(W1, W2), formats, press)
            assert not found.complete
            assert found.units == measured(model, ids, alone(W1), formats).units


def pressed_once(at: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[int, int], None]:
    pressed: list[int] = []

    def on_run(done: int, total: int) -> None:
        if done == at and not pressed:
            pressed.append(done)
            raise error("pressed")

    return on_run


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_was_done_is_not_done_again(model: DbrxForCausalLM, ids: list[int], tmp_path: Path, error: type[BaseException]) -> None:
    formats = [TensorFormat("int8", 64), TensorFormat("int4", 64)]
    units = alone(HEAD, WQKV, W2)
    state = RunState({"run": 1}, tmp_path)
    if error is KeyboardInterrupt:
        partial = measured(model, ids, units, formats, pressed_once(3, error), state=state)
        assert (partial.complete, len(partial.units)) == (False, 3)
        partial = measured(model, ids, units, formats, pressed_once(3, error), state=state)  # before anything is measured again
        assert (partial.complete, len(partial.units)) == (False, 3)
    else:
        with pytest.raises(error):
            measured(model, ids, units, formats, pressed_once(3, error), state=state)
    seen: list[int] = []
    whole = measured(model, ids, units, formats)
    assert measured(model, ids, units, formats, lambda done, total: seen.append(done), state=state) == whole
    assert seen[0] == 3
    seen.clear()
    assert measured(model, ids, units, formats, lambda done, total: seen.append(done), state=state) == whole
    assert seen == [6]


def test_a_tensor_that_a_format_cannot_hold(ids: list[int]) -> None:
    """All others are measured."""
    model = DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    before = measured(model, ids, alone(WQKV, W2), [TensorFormat("nf4", 64)])
    model.get_parameter(W1).data[0, 0] = 1e9
    with pytest.raises(FormatError, match=r"blocks.1.ffn.experts.mlp.w1 in int4: a group's scale must stay below 65504"):
        measured(model, ids, alone(W1), [TensorFormat("int4", 64)])
    model.get_parameter(W1).data[0, 0] = 0.01
    formats = [TensorFormat("int4", 64), TensorFormat("nf4", 64)]
    good = measured(model, ids, alone(WQKV, W2), formats)
    assert good.failed == []
    model.get_parameter(WQKV).data[0, 0] = 1e9
    found = measured(model, ids, alone(WQKV, W2), formats)
    assert [(unit.name, unit.format) for unit in found.units] == [(WQKV, "nf4"), (W2, "int4"), (W2, "nf4")]
    assert found.complete
    (failed,) = found.failed
    assert (failed.name, failed.format, failed.group_size) == (WQKV, "int4", 64)
    assert "a group's scale must stay below 65504" in failed.reason
    assert Sensitivity.from_dict(found.to_dict()) == found
    assert "not measured: blocks.0.Wqkv in int4:64: " in markdown(found)
    assert before.failed == []


def test_formats_that_no_checkpoint_has(model: DbrxForCausalLM, ids: list[int]) -> None:
    """A part is measured in a format exactly where a checkpoint may hold it so."""
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
    found = measured(model, ids, alone(WTE, W2), [formats[0]])
    assert [unit.name for unit in found.units] == [W2]
    assert [(part.name, part.format) for part in found.skipped] == [(WTE, "int4")]
    assert "not measured: wte in int4:64: the embedding must be int8 or plain" in markdown(found)
    with pytest.raises(RequestError, match=r"embedding must be int8 or plain; found int4, nf4 .*int8"):
        measured(model, ids, alone(WTE), [formats[0], formats[2]])


def test_refused(model: DbrxForCausalLM, ids: list[int], quantized_nano: Path) -> None:
    with pytest.raises(FormatError, match=r"Wqkv.weight in nf4: the group size must be one of 64; found 128.*--group-size"):
        check_formats(model.config, alone(WQKV), [TensorFormat("int4", 128), TensorFormat("nf4", 128)])
    config = DbrxConfig.from_dict(model.config.to_dict() | {"ffn_config": model.config.ffn_config.to_dict() | {"ffn_hidden_size": 96}})
    check_formats(config, units_of(config, "tensor"), [TensorFormat("int4", 32)])
    with pytest.raises(FormatError, match=r"blocks.0.ffn.experts.mlp.w2 in int4: .* must divide the reduction axis.* 64 and 96"):
        check_formats(config, units_of(config, "tensor"), [TensorFormat("int4", 64)])
    with pytest.raises(RequestError, match="plain weights; found packed ones"):
        measured(DbrxForCausalLM.from_pretrained(quantized_nano), ids, alone(WTE), [TensorFormat("int4", 64)])
    with pytest.raises(RequestError, match="must fill one window of 48 tokens; it has 47"):
        measured(model, ids[:47], alone(WTE), [TensorFormat("int4", 64)])


@pytest.fixture(scope="module")
def by_tensor(model: DbrxForCausalLM, ids: list[int]) -> Sensitivity:
    return measured(model, ids, alone(WTE, WQKV, W1, W2, HEAD), [TensorFormat("int4", 64), TensorFormat("int8", 64)])


def test_heat_map(by_tensor: Sensitivity) -> None:
    known = {(unit.name, unit.format): unit.mean_kl for unit in by_tensor.units}
    panels = plot(by_tensor).axes[:2]
    assert [panel.get_title(loc="left") for panel in panels] == ["int4, groups of 64", "int8, groups of 64"]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["wte", "0", "1", "2", "head"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["Wqkv", "out_proj", "w1", "v1", "w2"]
    for panel, fmt in zip(panels, ("int4", "int8"), strict=True):
        cells = np.ma.filled(panel.collections[0].get_array(), np.nan)
        expected = np.full((5, 5), np.nan)
        expected[:, 0], expected[:, 4] = known.get((WTE, fmt), np.nan), known[HEAD, fmt]
        expected[0, 1], expected[2, 2], expected[4, 3] = known[WQKV, fmt], known[W1, fmt], known[W2, fmt]
        np.testing.assert_array_equal(cells, expected)
        written = {text.get_text() for text in panel.texts}
        assert written == {f"{value:.1e}" for (_, name), value in known.items() if name == fmt}


def test_bars(model: DbrxForCausalLM, ids: list[int]) -> None:
    found = measured(model, ids, units_of(model.config, "layer")[:2], [TensorFormat("int4", 64), TensorFormat("int8", 64)], by="layer")
    nothing = replace(found, units=[*found.units[:3], replace(found.units[3], mean_kl=0.0, mean_kl_stderr=0.0)])
    for shown in (found, nothing):
        (axes,) = plot(shown).axes
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
        tops = [patch.get_y() + patch.get_height() for patch in axes.patches]
        expected = [shown.units[index].mean_kl for index in (0, 2, 1, 3)]
        shown_as_zero = [top < min(value for value in expected if value) / 1.5 for top in tops]
        assert shown_as_zero == [value == 0 for value in expected]
        assert [top for top, zero in zip(tops, shown_as_zero, strict=True) if not zero] == pytest.approx(
            [v for v in expected if v], rel=1e-9
        )


def test_a_model_that_overflows(ids: list[int], tmp_path: Path) -> None:
    """Figures that are no numbers are null in every JSON, and no error."""
    model = DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    model.lm_head.weight.data.mul_(1e4)
    found = measured(model, ids, alone(W2), [TensorFormat("int4", 64)])
    assert found.perplexity == np.inf
    assert found.units[0].mean_kl > 1
    write_report(found, tmp_path)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    data = json.loads((tmp_path / "sensitivity.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert data == found.to_dict()
    assert data["perplexity"] is None
    assert np.isnan(Sensitivity.from_dict(data).perplexity)


def test_no_figure_is_no_zero(by_tensor: Sensitivity, tmp_path: Path) -> None:
    def lost(unit: UnitResult, kl: float) -> UnitResult:
        return replace(unit, mean_kl=kl, mean_kl_stderr=np.nan, delta_ln_ppl=np.nan, kl_per_saved_byte=kl)

    units = by_tensor.units
    found = replace(by_tensor, units=[lost(units[0], np.nan), *units[1:-1], lost(units[-1], np.inf)])
    written = [text.get_text() for panel in plot(found).axes[:2] for text in panel.texts]
    assert written.count("n/a") == 1
    assert written.count("inf") == 1
    assert "0" not in written
    rows = table(found)[1:]
    assert (rows[0][4], rows[-1][4]) == ("inf ± n/a", "n/a ± n/a")
    costs = [float(row[-1]) for row in rows[:-1]]
    assert costs == sorted(costs, reverse=True)
    kinds = [replace(unit, name=name) for unit, name in zip(found.units[-2:], ("experts", "head"), strict=True)]
    (axes,) = plot(replace(found, by="kind", units=kinds)).axes
    assert [text.get_text() for text in axes.texts] == ["inf"]
    assert len(axes.patches) == 1
    nothing = replace(found, units=[lost(units[0], np.nan)])
    for by in ("tensor", "kind"):
        write_report(replace(nothing, by=by), tmp_path / by)
        data = json.loads((tmp_path / by / "sensitivity.json").read_text(encoding="utf-8"))
        assert data["units"][0]["mean_kl"] is None


@pytest.mark.parametrize("kl", [0.0, 1e-3])
def test_plots_of_one_value(by_tensor: Sensitivity, tmp_path: Path, kl: float) -> None:
    one = replace(by_tensor, units=[replace(by_tensor.units[0], mean_kl=kl, kl_per_saved_byte=0.0)], complete=False)
    for by in ("tensor", "kind"):
        write_report(replace(one, by=by), tmp_path / by)
        assert (tmp_path / by / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "**Partial**" in (tmp_path / "kind" / "sensitivity.md").read_text(encoding="utf-8")


def test_markdown(by_tensor: Sensitivity) -> None:
    rows = [line.split(" | ") for line in markdown(by_tensor).splitlines() if " g64 | " in line]
    assert len(rows) == 9
    costs = [float(row[-1].rstrip(" |")) for row in rows]
    assert costs == sorted(costs, reverse=True)
    worst = max(by_tensor.units, key=lambda unit: unit.mean_kl / unit.saved_bytes)
    assert rows[0][:2] == [f"| {short_name(worst.name)}", f"{worst.format} g64"]
    assert costs[0] == pytest.approx(worst.mean_kl / worst.saved_bytes * 1e9, rel=1e-3)
    assert short_name(W1) == "blocks.1.w1"
    assert short_name(WTE) == "wte"


def test_command(cli: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["sensitivity", NANO, "--text", BOOK, "--by", "layer", "--format", "int8", "--context", 64, "--windows", 2]
    done = cli(*arguments, "--json", "--out", tmp_path / "a" / "report")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data == json.loads((tmp_path / "a" / "report" / "sensitivity.json").read_text(encoding="utf-8"))
    found = Sensitivity.from_dict(data)
    assert (found.windows, found.context, found.tokens, found.dtype, found.by) == (2, 64, 126, "float32", "layer")
    assert (found.checkpoint, found.text, found.text_sha256) == (str(NANO), str(BOOK), load_text(str(BOOK)).sha256)
    assert found.sha256 == open_source(NANO).sha256()
    assert [(unit.name, unit.format, unit.group_size) for unit in found.units] == [(f"layer {layer}", "int8", 64) for layer in range(4)]
    assert sorted(path.name for path in (tmp_path / "a" / "report").iterdir()) == [f"sensitivity.{end}" for end in ("json", "md", "png")]

    shown = cli(*arguments)
    assert shown.code == 0
    assert len([line for line in shown.out.splitlines() if line.startswith("layer ")]) == 4
    assert "2 windows of 64 tokens, 126 predicted" in shown.out
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_command(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    from dbrx_q.cli import terminal

    out = tmp_path / "out"
    arguments = ["sensitivity", NANO, "--text", BOOK, "--by", "layer", "--context", 64, "--windows", 1, "--json", "--out", out]
    whole = json.loads(cli(*arguments).out)
    assert not list((tmp_path / "cache").rglob("*.npz"))
    press = pressed_once(2, error)
    seen: list[int] = []

    @contextmanager
    def progress(what: str) -> Iterator[Callable[[int, int], None]]:
        def on_run(done: int, total: int) -> None:
            seen.append(done)
            press(done, total)

        yield on_run

    monkeypatch.setattr(terminal, "progress", progress)
    done = cli(*arguments)
    assert done.code == 2
    said = " ".join(done.err.split())
    if error is KeyboardInterrupt:
        assert "interrupted after 2 of 4 parts; the figures are of these alone, and the same command with --resume continues" in said
        found = Sensitivity.from_dict(json.loads(done.out))
        assert (found.complete, [unit.name for unit in found.units]) == (False, ["layer 0", "layer 1"])
        assert json.loads((out / "sensitivity.json").read_text(encoding="utf-8")) == json.loads(done.out)
    else:
        assert done.out == ""
        assert "what was measured is kept: the same command with --resume continues" in said
    seen.clear()
    again = cli(*arguments, "--resume")
    assert again.code == 0, again.err
    assert seen == [2, 3, 4]
    assert {**json.loads(again.out), "provenance": 0} == {**whole, "provenance": 0}
    assert not list((tmp_path / "cache").rglob("*.npz"))

    press = pressed_once(2, error)
    assert cli(*arguments).code == 2
    seen.clear()
    assert cli(*arguments).code == 0  # without --resume it begins again
    assert seen == [0, 1, 2, 3, 4]


def test_figures_are_shown_before_files_are_written(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dbrx_q.eval.sensitivity import report as sensitivity_report

    def fail(*_: object) -> None:
        raise RequestError("a report's folder must be writable; No space left on device. Give another name or make room")

    arguments = ["sensitivity", NANO, "--text", BOOK, "--by", "layer", "--context", 64, "--windows", 1, "--json", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity_report, "write_files", fail)
        done = cli(*arguments)
    assert done.code == 2
    assert "No space left" in done.err
    found = json.loads(done.out)
    assert len(found["units"]) == 4
    again = cli(*arguments, "--resume")
    assert again.code == 0
    assert json.loads(again.out)["units"] == found["units"]
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text(encoding="utf-8")) == json.loads(again.out)


def test_parts_without_figures_are_named(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from dbrx_q.eval.sensitivity import rounding, walk

    arguments = ["sensitivity", NANO, "--text", BOOK, "--by", "kind", "--context", 64, "--windows", 1]
    done = cli(*arguments)
    assert done.code == 0
    assert "not measured: embedding in int4:64: the embedding must be int8 or plain" in " ".join(done.err.split())
    calls: list[int] = []

    def fail_once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise FormatError("too wide")
        return rounding.rounded(*arguments)

    monkeypatch.setattr(walk, "rounded", fail_once)
    done = cli(*arguments)
    assert done.code == 2
    assert "Wqkv.weight in int4: too wide" in done.err
    assert "1 of 8 parts could not be measured" in " ".join(done.err.split())
    assert "out_proj" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "48"], "the group size must be one of 32, 64, 128; found 48"),
        (["--format", "nf4", "--group-size", "32"], "in nf4: the group size must be one of 64; found 32"),
        (["--context", "4000"], "the context must be from 2 to the model's 2048 tokens; found 4000"),
        (["--windows", "0"], "at least one window must be measured; found a limit of 0"),
        (["--text", "missing.txt"], "missing.txt: a text must be a file or the name of a data set"),
        (["--text", NANO / "generation_config.json"], "generation_config.json: line 1: must be JSON"),
        (["--out", BOOK], "a report is a folder; found a file"),
        (["--format", "int3"], "int3"),
        (["--by", "expert"], "expert"),
    ],
)
def test_bad_input(cli: Callable[..., Any], arguments: list[object], message: str) -> None:
    done = cli("sensitivity", NANO, *([] if "--text" in arguments else ["--text", BOOK]), *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in " ".join(done.err.replace("│", " ").split())
    assert "Traceback" not in done.err


def test_a_short_text(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.", encoding="utf-8")
    done = cli("sensitivity", NANO, "--text", tmp_path / "short.txt", "--out", tmp_path / "out")
    assert done.code == 2
    assert "must fill one window of 512 tokens" in done.err
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_refused(cli: Callable[..., Any], quantized_nano: Path) -> None:
    done = cli("sensitivity", quantized_nano, "--text", BOOK)
    assert done.code == 2
    assert "must start from plain weights; found int4" in done.err
    assert "Give the checkpoint that it was made from" in done.err


def test_without_matplotlib(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli("sensitivity", NANO, "--text", "missing.txt", "--out", tmp_path / "out")
    assert done.code == 2
    assert "pip install 'dbrx_q[eval]'" in done.err
    assert not (tmp_path / "out").exists()

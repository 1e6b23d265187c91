"""A decode step in pieces between the experts of its layers, in the interpreter: graphs are emulated by functions that run again.

The emulation writes to the memory that a piece returned when it was captured, as a replay does, and reads inputs where they were then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from dbrx_q import DbrxForCausalLM
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.config import DbrxConfig
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.experts.gpu_store import GpuExpertStore
from dbrx_q.generation.decode_graph import DecodeStep, capturable, capturable_by_layer
from dbrx_q.generation.layer_graphs import Captured, Piece
from dbrx_q.kernels.triton.codes import CODES
from dbrx_q.kernels.triton.launch import CHIPS, recording
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.loading import load_model
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.offloading import pinned_bytes
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

MEGABYTES = 0.25  # of the GPU beside its reserve: slots for some of the 8 experts
STEPS = [[11, 12], [90, 5]]  # tokens of two sequences


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DbrxForCausalLM]:
    """Two layers on a GPU that is a part of host memory, with slots for some of the experts."""
    plain, folder = (tmp_path_factory.mktemp("layers") / name for name in ("plain", "int4"))
    ffn = {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}
    config = DbrxConfig(d_model=64, n_heads=2, n_layers=2, max_seq_len=64, vocab_size=128, attn_config={"kv_n_heads": 1}, ffn_config=ffn)
    write_checkpoint(config, plain)
    quantize_checkpoint(plain, folder, QuantizationRequest(lambda checkpoint: default_formats(checkpoint.config, TensorFormat("int4", 64))))
    machine = Machine(pinned_bytes(Gpu.link) + (8 << 20), (Gpu(int(MEGABYTES * 1e6) + Gpu(0).reserve),))
    budget = Budget(machine, context=32, batch=2, step_tokens=16, devices=(torch.device("cpu"),), direct=False)
    model = load_model(folder, budget=budget, dtype=torch.float32)
    model.set_attn_implementation("triton")
    yield model
    model.close()


def step_of(model: DbrxForCausalLM) -> DecodeStep:
    cache = KVCache(model.config, 2, 32, dtype=model.dtype, format="int8")
    return DecodeStep(model, cache, 2)


def repeated(piece: Piece) -> Captured:
    outputs = piece()

    def replay() -> None:
        for output, new in zip(outputs, piece(), strict=True):
            output.copy_(new)

    return Captured(outputs, replay)


def run(step: DecodeStep) -> list[torch.Tensor]:
    return [step(tokens, [n, n], [0, 1]).clone() for n, tokens in enumerate(STEPS, 1)]


def memory_of(step: DecodeStep) -> list[int]:
    """Addresses of what is written between the replays of a step."""
    assert step._by_layer is not None
    return [tensor.data_ptr() for tensor in (step._by_layer._delta, step._by_layer._tokens, step._on_device)]


def test_a_step_by_layers_has_the_bits_of_a_whole_one_and_runs_whole_while_a_hook_watches(model: DbrxForCausalLM) -> None:
    assert isinstance(model.expert_store, GpuExpertStore), model.placement
    assert not capturable(model)
    assert capturable_by_layer(model)
    expected = run(step_of(model))
    assert model.expert_store.stats().cache.misses
    step = step_of(model)
    step._capture_layers(repeated)
    requests = model.expert_store.stats().cache
    inputs = memory_of(step)
    assert all(map(torch.equal, run(step), expected))
    assert memory_of(step) == inputs, "graphs have the addresses of what they read"
    assert model.expert_store.stats().cache.hits > requests.hits
    seen: list[object] = []
    handle = model.transformer.blocks[1].register_forward_hook(lambda *_: seen.append(None))
    watched = step(STEPS[-1], [len(STEPS)] * 2, [0, 1])
    handle.remove()
    assert len(seen) == 1
    assert torch.equal(watched, expected[-1])


def test_capturing_pieces_asks_the_store_for_no_expert(model: DbrxForCausalLM) -> None:
    step = step_of(model)
    before = model.expert_store.stats()
    step._capture_layers(repeated)
    assert model.expert_store.stats() == before


def test_pieces_hold_all_launches_but_those_of_the_experts(model: DbrxForCausalLM) -> None:
    pieces: list[list[str]] = []

    def recorded(piece: Piece) -> Captured:
        with recording(CHIPS["sm_90"]) as launches:
            outputs = piece()
        pieces.append([launch.kernel.__name__.removesuffix("_kernel") for launch in launches])
        return Captured(outputs, lambda: None)

    step = step_of(model)
    step._capture_layers(recorded)
    layer = ["add_norm", "linear", "qkv", "decode", "linear", "norm_route"]
    assert pieces == [layer] * model.config.n_layers + [["add_norm", "linear"]]


def test_a_format_without_code_prevents_graphs_of_layers_only_outside_the_experts(
    model: DbrxForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.delitem(CODES, "int4")  # of the experts
        assert capturable_by_layer(model)
    monkeypatch.delitem(CODES, "int8")
    assert not capturable_by_layer(model)


def test_layers_on_two_devices_have_no_graphs(model: DbrxForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: Callable[[object], list[torch.device]] = lambda _: [torch.device("cuda", 0), torch.device("cuda", 1)]  # noqa: E731
    monkeypatch.setattr(type(model.transformer), "devices", property(devices))
    assert not capturable_by_layer(model)

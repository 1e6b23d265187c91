"""Windows of every protocol are compared with the loops of the programs that published it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dbrx_q.cli.measurement import protocol_of
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.eval.observe import batches, step_tokens
from dbrx_q.eval.windows import Protocol
from dbrx_q.planning.footprint import MemoryRequest
from dbrx_q.planning.machine import Machine
from dbrx_q.planning.placement import place
from dbrx_q.sources.open import open_source
from dbrx_q.sources.streamed import ConvertedSource

NANO = Path(__file__).parent.parent / "data" / "dbrx-nano"


def predicted(protocol: Protocol, tokens: int) -> list[tuple[int, int]]:
    """(first token of the window, predicted token) of every prediction."""
    return [(window.first, token) for window in protocol.windows(tokens) for token in range(window.scored, window.end)]


@pytest.mark.parametrize("tokens", [512, 513, 1023, 1024, 5000])
def test_non_overlapping_windows_equal_those_of_gptq(tokens: int) -> None:
    context = 512
    expected = [(i * context, i * context + j) for i in range(tokens // context) for j in range(1, context)]
    assert predicted(Protocol.of(context), tokens) == expected


@pytest.mark.parametrize(("tokens", "context"), [(1024, 512), (5000, 512), (999, 101)])
def test_half_windows_equal_those_of_llama_cpp(tokens: int, context: int) -> None:
    expected = []
    for chunk in range(tokens // context):
        for position in range(context // 2, context - 1):  # the logits of `position` predict the token after it
            expected.append((chunk * context, chunk * context + position + 1))
    protocol = Protocol.of(context, half_window=True)
    assert predicted(protocol, tokens) == expected
    if context == 512:
        assert {window.tokens for window in protocol.windows(tokens)} == {255}


@pytest.mark.parametrize(("tokens", "context", "stride"), [(1000, 100, 50), (1000, 100, 99), (1000, 100, 1), (70, 64, 10), (64, 64, 10)])
def test_strided_windows_predict_every_token_once(tokens: int, context: int, stride: int) -> None:
    protocol = Protocol.of(context, stride=stride)
    assert protocol.name == "strided"
    predictions = predicted(protocol, tokens)
    assert [token for _, token in predictions] == list(range(1, tokens))
    # Except in the first window, each token sees at least context - stride tokens before it.
    assert all(token - first >= context - stride or first == 0 for first, token in predictions)
    assert all(window.end - window.first <= context for window in protocol.windows(tokens))


def test_a_limit_takes_the_first_windows() -> None:
    assert Protocol.of(100, limit=3).windows(1000) == Protocol.of(100).windows(1000)[:3]


def test_a_stride_equal_to_the_context_does_not_overlap() -> None:
    assert Protocol.of(100, stride=100).name == "non-overlapping"


def test_values_out_of_range_are_refused() -> None:
    for make, message in [
        (lambda: Protocol.of(1), "at least 2 tokens; found 1"),
        (lambda: Protocol.of(200, stride=0), "stride must be from 1 to the context of 200 tokens; found 0"),
        (lambda: Protocol.of(200, stride=201), "found 201"),
        (lambda: Protocol.of(200, half_window=True, stride=100), "half windows must not overlap; found a stride of 100"),
        (lambda: Protocol.of(3, half_window=True), "at least 4 tokens; found 3"),
        (lambda: Protocol.of(200, limit=0), "found a limit of 0"),
    ]:
        with pytest.raises(RequestError, match=message):
            make()
    config = DbrxConfig.from_pretrained(NANO)
    with pytest.raises(RequestError, match="from 2 to the model's 2048 tokens; found 2049"):
        Protocol.of(2049).check(10000, config)
    with pytest.raises(RequestError, match=r"book\.txt must fill one window of 200 tokens; it has 150"):
        Protocol.of(200).check(150, config, source="book.txt")


@pytest.mark.parametrize("measured", [[], [3], [1, 7, 8], [0, 40]])
def test_batches_begin_where_runs_resume(measured: list[int]) -> None:
    windows = Protocol.of(100).windows(2000)
    indexed = batches(windows, 400, measured)
    assert [window for _, batch in indexed for window in batch] == windows
    assert [index for index, _ in indexed] == [sum(len(batch) for _, batch in indexed[:place]) for place in range(len(indexed))]
    assert all(1 <= len(batch) <= 4 for _, batch in indexed)
    assert {index for index in measured if index < 20} <= {index for index, _ in indexed}
    assert batches(windows, 400) == [(index, windows[index : index + 4]) for index in range(0, 20, 4)]


def test_steps_are_longer_if_experts_are_dequantized_in_each_step() -> None:
    source = open_source(NANO)
    assert isinstance(source, ConvertedSource)
    resident, streamed = (source.load(dtype=None, device=torch.device("cpu"), stream=stream) for stream in (False, True))
    assert step_tokens([resident]) == step_tokens([]) == 4096
    assert step_tokens([resident, streamed]) == 32_768
    # A model loaded within a budget has memory for steps of 4,096 tokens.
    resident.placement = place(resident.config, {}, Machine(), MemoryRequest(64))
    assert step_tokens([resident, streamed]) == 4096


def test_a_stride_equal_to_the_default_context_is_refused() -> None:
    config = DbrxConfig.from_pretrained(NANO)
    with pytest.raises(RequestError, match="strided windows must overlap; found a stride of 2048"):
        protocol_of("strided", None, 2048, None, config)
    assert protocol_of("strided", None, 1024, None, config).name == "strided"

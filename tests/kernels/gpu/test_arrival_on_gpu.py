"""Sums over several programs stay whole where launches overlap: on two streams, from two graphs, and beside a graph's replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from dbrx_q.eval.bench.kernel_shapes import Shapes
from dbrx_q.kernels.router import route
from dbrx_q.kernels.triton.arrival import Graph, counters
from dbrx_q.kernels.triton.router import router_tiles

CALLS = 64  # in each of two streams, of a few programs each, so that both streams' programs fit the GPU at a time
TURNS = 20


@pytest.fixture
def products(place: Any) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """(activations, the router's product, whose reduction is split over a dozen programs)."""
    if not place.real:
        pytest.skip("the interpreter has no streams")
    shapes: Shapes = place.shapes
    assert router_tiles(1, shapes.width, shapes.experts).splits > 1
    router = place.randn(shapes.experts, shapes.width)
    return [place.randn(1, shapes.width) for _ in range(CALLS)], lambda x: route(x, router, shapes.active, 1.0).logits


def assert_equal(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    torch.cuda.synchronize()
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))


def test_launches_on_two_streams(products: Any) -> None:
    inputs, product = products
    expected = [product(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(TURNS):
        results: list[list[torch.Tensor]] = [[], []]
        for x in inputs:
            for stream, into in zip(streams, results, strict=True):
                with torch.cuda.stream(stream):
                    into.append(product(x))
        for into in results:
            assert_equal(into, expected)


def test_graphs_that_are_replayed_on_two_streams_and_eager_launches_beside_them(products: Any) -> None:
    inputs, product = products
    expected = [product(x) for x in inputs]
    graphs, results = [], []
    for _ in range(2):
        graph = Graph(inputs[0].device)
        with graph.capture():
            results.append([product(x) for x in inputs])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    assert torch.cuda.graph.default_capture_stream is not None
    eager = torch.cuda.graph.default_capture_stream  # the stream that both were captured on
    torch.cuda.synchronize()
    for _ in range(TURNS):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(eager):
            beside = [product(x) for x in inputs]
        for into in (*results, beside):
            assert_equal(into, expected)
            for out in into if into is not beside else ():
                out.zero_()
        torch.cuda.synchronize()


def test_a_capture_by_torch_alone_is_right_too(products: Any) -> None:
    inputs, product = products
    expected = [product(x) for x in inputs]
    graphs, results = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([product(x) for x in inputs])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(TURNS):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        for into in results:
            assert_equal(into, expected)


def test_streams_have_counters_of_their_own(place: Any) -> None:
    if not place.real:
        pytest.skip("the interpreter has no streams")
    device = place.randn(1).device
    default, stream = counters(device, 1), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert counters(device, 1) is not default
        assert counters(device, 1) is counters(device, 1)
    assert counters(device, 1) is default

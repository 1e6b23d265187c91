"""Launches that may overlap take different arrival counters; a model of their programs shows what happens to a sum otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dbrx_q.kernels.triton import arrival
from dbrx_q.kernels.triton.arrival import counters, new_counters, using_counters
from dbrx_q.kernels.triton.launch import CHIPS, recording
from dbrx_q.kernels.triton.linear import linear
from dbrx_q.kernels.triton.router import route

CPU = torch.device("cpu")
Choose = Callable[[], torch.Tensor]


class Streams:
    """The current stream, which the CPU lacks, and whether it is being captured."""

    def __init__(self) -> None:
        self.current, self.captured = 0, False

    def on(self, stream: int, choose: Choose, *, captured: bool = False) -> torch.Tensor:
        """What `choose` gives to a launch on `stream`."""
        self.current, self.captured = stream, captured
        return choose()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()
    monkeypatch.setattr(arrival, "_BY_STREAM", {})
    monkeypatch.setattr(arrival, "_stream", lambda device: streams.current)
    monkeypatch.setattr(arrival, "_capturing", lambda device: streams.captured)
    return streams


def one() -> torch.Tensor:
    return counters(CPU, 1)


def linear_counters() -> torch.Tensor:
    """What a launch of `linear` takes, whose reduction is split."""
    x, weight = torch.zeros(1, 8192, dtype=torch.bfloat16), torch.zeros(64, 8192, dtype=torch.bfloat16)
    with recording(CHIPS["sm_90"]) as launches:
        linear(x, weight)
    assert launches[0].constants["SPLITS"] > 1
    return arrived(launches[0])


def route_counters() -> torch.Tensor:
    with recording(CHIPS["sm_90"]) as launches:
        route(torch.zeros(1, 6144, dtype=torch.bfloat16), torch.zeros(16, 6144, dtype=torch.bfloat16), 4, 1.0)
    return arrived(launches[0])


def arrived(launch: Any) -> torch.Tensor:
    tensor: torch.Tensor = launch.arguments[launch.kernel.arg_names.index("arrived")]
    assert tensor.dtype == torch.int32
    return tensor


def overlapped(*taken: torch.Tensor) -> set[tuple[tuple[int, ...], ...]]:
    """All outcomes of launches of two programs each, which take the first of the given counters, over all orders of their steps.

    A program stores its partial result, arrives, and, as the last, sets the counter to zero and sums. An outcome has for each launch how
    many partial results each sum of it found: ((2,), (2,)) is right.
    """
    places = [tensor.data_ptr() for tensor in taken]
    programs = [(launch, program) for launch in range(len(taken)) for program in range(2)]
    outcomes: set[tuple[tuple[int, ...], ...]] = set()
    start = (0,) * len(programs), tuple((place, 0) for place in sorted(set(places))), ()
    seen, waiting = {start}, [start]
    while waiting:
        state = waiting.pop()
        following = list(_steps(state, programs, places))
        if not following:
            outcomes.add(tuple(tuple(count for launch, count in state[2] if launch == wanted) for wanted in range(len(taken))))
        fresh = [step for step in following if step not in seen]
        seen.update(fresh)
        waiting += fresh
    return outcomes


def _steps(state: Any, programs: list[tuple[int, int]], places: list[int]) -> Iterator[Any]:
    """The states that follow by one step of one program. Steps: 0 store, 1 arrive, 2 set to zero, 3 sum, 4 ended."""
    at, values, sums = state
    for index, (launch, _) in enumerate(programs):
        counter, step = dict(values), at[index]
        place, found = places[launch], sums
        if step == 4:
            continue
        after = step + 1
        if step == 1:
            after = 2 if counter[place] == 1 else 4  # the last of two sees one other
            counter[place] += 1
        elif step == 2:
            counter[place] = 0
        elif step == 3:
            stored = sum(at[other] > 0 for other, (of, _) in enumerate(programs) if of == launch)
            found = (*sums, (launch, stored))
        yield (*at[:index], after, *at[index + 1 :]), tuple(sorted(counter.items())), found


RIGHT = {((2,), (2,))}


@pytest.mark.parametrize("choose", [one, linear_counters, route_counters])
def test_launches_that_overlap_on_two_streams_sum_all_partial_results(choose: Choose, streams: Streams) -> None:
    first, second = streams.on(1, choose), streams.on(2, choose)
    assert overlapped(first, second) == RIGHT
    assert streams.on(1, choose) is first  # no allocation for each launch
    assert streams.on(2, choose) is second


def test_shared_counters_lose_partial_results(streams: Streams) -> None:
    outcomes = overlapped(streams.on(1, one), streams.on(1, one))
    assert ((1,), (2,)) in outcomes  # a program of the other launch was taken for one of this launch
    assert ((), (1, 2)) in outcomes  # and no program of the other launch was taken for its last


@pytest.mark.parametrize("choose", [one, linear_counters])
def test_a_graph_shares_no_counters_with_other_graphs_or_with_the_stream_of_its_capture(choose: Choose, streams: Streams) -> None:
    graphs = [new_counters(CPU) for _ in range(2)]
    for chosen in graphs:
        with using_counters(chosen):
            assert streams.on(7, choose, captured=True) is chosen
    eager = streams.on(7, choose)
    for pair in ((graphs[0], graphs[1]), (graphs[0], eager), (graphs[1], eager)):
        assert overlapped(*pair) == RIGHT


def test_a_capture_that_chooses_no_counters_gets_new_ones_for_every_launch(streams: Streams) -> None:
    first, second = (streams.on(7, one, captured=True) for _ in range(2))
    assert overlapped(first, second) == RIGHT
    assert overlapped(first, streams.on(7, one)) == RIGHT


def test_chosen_counters_are_those_of_one_thread(streams: Streams) -> None:
    taken: list[torch.Tensor] = []
    chosen = new_counters(CPU)
    with using_counters(chosen):
        other = threading.Thread(target=lambda: taken.append(one()))
        other.start()
        other.join()
        assert one() is chosen
    assert taken[0] is not chosen
    assert one() is taken[0]


def test_devices_share_no_counters(streams: Streams) -> None:
    key = (0, 5)
    arrival._BY_STREAM[key] = new_counters(CPU)
    assert streams.on(5, one) is not arrival._BY_STREAM[key]


def test_a_launch_that_is_only_compiled_takes_no_memory() -> None:
    assert counters(torch.device("meta"), 7).shape == (7,)


def test_graphs_are_captured_one_at_a_time_on_streams_of_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own capture stream is on the device of the first capture: on another device, kernels would run and the graph be empty."""
    current, open_captures, captures = threading.local(), [], []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        current.index = index
        yield

    @contextmanager
    def graph(_: object, *, stream: int | None = None, **options: Any) -> Iterator[None]:
        open_captures.append(stream)
        captures.append((current.index, stream, len(open_captures)))
        time.sleep(0.01)
        yield
        open_captures.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.index)
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: index)  # a stream is named by its device
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(arrival, "_capture_stream", arrival._capture_stream.__wrapped__)

    def capture(index: int) -> None:
        with arrival.Graph(index, new_counters(CPU)).capture():  # type: ignore[arg-type] # devices by index
            time.sleep(0.01)

    threads = [threading.Thread(target=capture, args=(index,)) for index in (0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(captures) == [(0, 0, 1), (1, 1, 1), (1, 1, 1)]

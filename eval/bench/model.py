"""Speed and memory of a checkpoint in llama-bench's terms, each speed beside what the machine allowed in the same minute."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.eval.provenance import provenance
from dbrx_q.generation.decoding import Decoder, decoder_for
from dbrx_q.generation.generate import generate
from dbrx_q.generation.sampling import SamplingParams, sample
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.sources.base import Source

from .ceilings import CeilingMeter, ModelWork, Rates, ceiling, decode_need, prefill_need
from .memory_growth import MemoryGrowth

__all__ = ["FirstToken", "ModelBenchmark", "SpeedRow", "SpeedTest", "bench_model", "check_tests", "speed_tests"]

_TOKENS_SEED = 0


@dataclass(frozen=True)
class SpeedTest:
    """kind: "pp", a prompt of `tokens` tokens in each of `batch` sequences, or "tg", as many tokens one after the other. depth: tokens
    that each sequence holds before."""

    kind: str
    tokens: int
    batch: int = 1
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench names it: "pp512", "tg128 @ d4096"; "tg128 b4" for four sequences."""
        return f"{self.kind}{self.tokens}" + f" b{self.batch}" * (self.batch > 1) + f" @ d{self.depth}" * (self.depth > 0)


@dataclass(frozen=True)
class SpeedRow:
    """One test. Speeds in tokens/s of all sequences together.

    mean, median, stdev: of `samples`, one for each repeat; the sample standard deviation, 0 of one.
    bandwidth, matmul_rate: medians of `Rates`, measured before each repeat.
    bytes_per_token, flops_per_token: `decode_need` or `prefill_need`. bytes_per_second: bytes_per_token * median.
    ceiling: tokens/s that these rates allow with all weights at hand. bound: what sets it, "bandwidth" or "matmul". of_ceiling: median /
    ceiling. hit_rate, fallback_share: shares of the requests for experts that found them where they are computed, and that a fallback copy
    answered; 1 and 0 where all lie there.
    """

    name: str
    kind: str
    tokens: int
    batch: int
    depth: int
    mean: float
    median: float
    stdev: float
    samples: list[float]
    bytes_per_token: float
    flops_per_token: float
    bytes_per_second: float
    bandwidth: float
    matmul_rate: float
    ceiling: float
    bound: str
    of_ceiling: float
    hit_rate: float = 1.0
    fallback_share: float = 0.0


@dataclass(frozen=True)
class FirstToken:
    """Seconds from a prompt of one sequence to the first token of its answer; median, sample standard deviation and every repeat's."""

    prompt_tokens: int
    seconds: float
    stdev: float
    samples: list[float]


@dataclass(frozen=True)
class ModelBenchmark:
    """One run. Memory in bytes, by device: "host", "cuda:0" ...

    bytes, parameters, bits_per_weight: of the checkpoint as stored. weight_bytes: of the weights in memory, of experts as many as it holds.
    load_seconds: until the model can run; files come from the page cache where they are in it.
    loaded_memory, load_peak_memory: growth of the memory in use, and of its peak, by loading.
    peak_memory: growth of the peak by loading and all rows; what measures the ceilings is left out.
    complete: False where the run was interrupted and holds the rows that were finished. planned: rows that were asked for.
    provenance: what is needed to repeat it; without the checkpoint's hash where the run was interrupted.
    """

    path: str
    format: str
    bytes: int
    parameters: int
    bits_per_weight: float
    weight_bytes: int
    device: str
    dtype: str
    kv: str
    repeats: int
    load_seconds: float
    loaded_memory: dict[str, int]
    load_peak_memory: dict[str, int]
    peak_memory: dict[str, int]
    rows: list[SpeedRow]
    first_token: list[FirstToken]
    complete: bool
    planned: int
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `dbrx-q bench --json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelBenchmark:
        """What `to_dict` gave."""
        rows = [SpeedRow(**row) for row in data["rows"]]
        return cls(**(data | {"rows": rows, "first_token": [FirstToken(**row) for row in data["first_token"]]}))


def speed_tests(prompts: Sequence[int], generated: Sequence[int], batches: Sequence[int], depths: Sequence[int]) -> list[SpeedTest]:
    """Every prompt and every generation at every depth for every batch size; a size of 0 leaves its kind out, as llama-bench does."""
    sizes = [("pp", tokens) for tokens in prompts if tokens] + [("tg", tokens) for tokens in generated if tokens]
    return [SpeedTest(kind, tokens, batch, depth) for depth in depths for batch in batches for kind, tokens in sizes]


def check_tests(tests: Sequence[SpeedTest], config: DbrxConfig) -> None:
    """Refuse what the model cannot run; needs no weights.

    Raises:
        RequestError: no test, a size out of range, or a sequence that does not fit the context.
    """
    if not tests:
        raise RequestError("there must be a prompt or tokens to generate; found none of either. Give one above 0")
    for test in tests:
        if test.tokens < 1 or test.batch < 1 or test.depth < 0:
            raise RequestError(f"tokens and batch must be at least 1 and depth at least 0; found {test}")
        # A prompt is followed by one token, whose time is measured.
        total = test.depth + test.tokens + (test.kind == "pp")
        if total > config.max_seq_len:
            parts = "depth + prompt + 1" if test.kind == "pp" else "depth + generated"
            raise RequestError(
                f"a sequence must fit the model's context of {config.max_seq_len} tokens; {test.name} takes {total} ({parts}). "
                "Give smaller sizes"
            )


def bench_model(
    source: Source,
    tests: Sequence[SpeedTest],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    kv_format: str = "plain",
    repeats: int = 5,
    command: str = "",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> ModelBenchmark:
    """Load a checkpoint and time prefill and decode on random tokens, by the decoder of `generate`, and the first token by `generate`.

    An interruption (KeyboardInterrupt) ends the run; what was finished comes back, marked as incomplete, if at least one row was.

    Args:
        source: what to load.
        tests: rows, in their order; then the time to the first token of each length of prompt.
        device: to load it on.
        dtype: of activations, None for the checkpoint's.
        kv_format: "plain", "int8" or "int4".
        repeats: that count, after one that does not.
        command: that is noted with the results.
        report: called with (rows done, rows in all).

    Raises:
        RequestError: as `check_tests`, repeats below 1, or weights of another program that do not fit in memory when they are decoded.
        CheckpointError: as loading.
    """
    check_tests(tests, source.config)
    if repeats < 1:
        raise RequestError(f"repeats must be at least 1; found {repeats}")
    prompts = sorted({test.tokens for test in tests if test.kind == "pp"})
    total = len(tests) + len(prompts)
    _warm_libraries()
    memory = MemoryGrowth(device)
    started = _now(device)
    model = source.load(dtype=dtype, device=device)
    load_seconds = _now(device) - started
    if model.expert_store.reloads_each_step:
        raise RequestError(
            f"{source.name}: speed is that of weights in memory; decoded, these do not fit. Free some, or choose --dtype bfloat16"
        )
    loaded, load_peak = memory.used(), memory.peak()
    footprint = ModelWork.of(model, kv_format)
    result = ModelBenchmark(
        path=source.name,
        format=source.format,
        bytes=source.nbytes,
        parameters=source.parameters,
        bits_per_weight=source.bits_per_weight,
        weight_bytes=_weight_bytes(model, footprint),
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        kv=kv_format,
        repeats=repeats,
        load_seconds=load_seconds,
        loaded_memory=loaded,
        load_peak_memory=load_peak,
        peak_memory=load_peak,
        rows=[],
        first_token=[],
        complete=False,
        planned=total,
        provenance=provenance(device, command),
    )
    meter = CeilingMeter(device, model.dtype)
    where = str(device) if device.type == "cuda" else "host"
    sha256 = ""
    try:
        for done, test in enumerate(tests):
            report(done, total)
            result.rows.append(_row(model, footprint, test, kv_format, repeats, meter))
        for done, tokens in enumerate(prompts, len(tests)):
            report(done, total)
            result.first_token.append(_first_token(model, tokens, kv_format, repeats))
        report(total, total)
        sha256 = source.sha256()  # last: reading the files would bring them into the page cache before they are loaded
    except KeyboardInterrupt:
        if not result.rows:
            raise
    finally:
        model.close()
    peak = {name: value - (meter.nbytes if name == where else 0) for name, value in memory.peak().items()}
    peak = {name: max(value, load_peak.get(name, 0)) for name, value in peak.items()}
    known = {"sha256": sha256} if sha256 else {}
    complete = len(result.rows) + len(result.first_token) == total
    return replace(result, peak_memory=peak, complete=complete, provenance=result.provenance | known)


def _row(model: DbrxForCausalLM, footprint: ModelWork, test: SpeedTest, kv_format: str, repeats: int, meter: CeilingMeter) -> SpeedRow:
    measure, need_of = (_prefill_seconds, prefill_need) if test.kind == "pp" else (_decode_seconds, decode_need)
    measure(model, test, kv_format)  # compiles, fills caches
    seconds, rates = [], []
    before = model.expert_store.stats()
    for _ in range(repeats):
        rates.append(meter.measure())
        seconds.append(measure(model, test, kv_format))
    served = model.expert_store.stats() - before
    samples = [test.batch * test.tokens / each for each in seconds]
    median = statistics.median(samples)
    seen = Rates(statistics.median(rate.bandwidth for rate in rates), statistics.median(rate.matmul for rate in rates))
    need = need_of(footprint, batch=test.batch, depth=test.depth, tokens=test.tokens)
    allowed, bound = ceiling(need, seen)
    return SpeedRow(
        name=test.name,
        **asdict(test),
        mean=statistics.fmean(samples),
        median=median,
        stdev=_stdev(samples),
        samples=samples,
        bytes_per_token=need.nbytes,
        flops_per_token=need.flops,
        bytes_per_second=need.nbytes * median,
        bandwidth=seen.bandwidth,
        matmul_rate=seen.matmul,
        ceiling=allowed,
        bound=bound,
        of_ceiling=median / allowed,
        hit_rate=served.cache.hit_rate,
        fallback_share=served.fallback_share,
    )


def _weight_bytes(model: DbrxForCausalLM, footprint: ModelWork) -> int:
    """Of what lies in memory."""
    plan = model.placement
    if plan is None or plan.resident:
        return sum(footprint.nbytes.values())
    dense = sum(nbytes for kind, nbytes in footprint.nbytes.items() if kind != "experts")
    return dense + sum(there.experts + there.fallback for there in plan.devices)


def _prefill_seconds(model: DbrxForCausalLM, test: SpeedTest, kv_format: str) -> float:
    with _filled(model, test, kv_format) as (decoder, tokens):
        started = _now(model.device)
        for sequence, prompt in enumerate(tokens):
            decoder.prefill(sequence, prompt)
        return _now(model.device) - started


def _decode_seconds(model: DbrxForCausalLM, test: SpeedTest, kv_format: str) -> float:
    """Every step picks tokens, as `generate` does, but goes on with random ones: a model that repeats itself asks for the same experts."""
    greedy, unused = SamplingParams(), torch.Generator()
    with _filled(model, test, kv_format) as (decoder, tokens):
        started = _now(model.device)
        for step in zip(*tokens, strict=True):
            for logits in decoder.step(dict(enumerate(step))).values():
                sample(logits, greedy, (), unused)
        return _now(model.device) - started


@contextmanager
def _filled(model: DbrxForCausalLM, test: SpeedTest, kv_format: str) -> Iterator[tuple[Decoder, list[list[int]]]]:
    """(a decoder whose sequences hold `depth` tokens, the tokens that follow in each)."""
    tokens = _random_tokens(model.config, test.batch, test.depth + test.tokens)
    with decoder_for(model, [test.depth + test.tokens] * test.batch, kv_format) as decoder:
        if test.depth:
            for sequence, row in enumerate(tokens):
                decoder.prefill(sequence, row[: test.depth])
        yield decoder, [row[test.depth :] for row in tokens]


def _first_token(model: DbrxForCausalLM, tokens: int, kv_format: str, repeats: int) -> FirstToken:
    prompts = _random_tokens(model.config, 1, tokens)
    samples = []
    for turn in range(repeats + 1):
        started = _now(model.device)
        generate(model, prompts, max_new_tokens=1, eos_token_ids=(), kv_format=kv_format)
        if turn:
            samples.append(_now(model.device) - started)
    return FirstToken(tokens, statistics.median(samples), _stdev(samples), samples)


def _random_tokens(config: DbrxConfig, batch: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(_TOKENS_SEED)
    rows: list[list[int]] = torch.randint(0, config.vocab_size, (batch, tokens), generator=generator).tolist()
    return rows


def _stdev(samples: Sequence[float]) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _warm_libraries() -> None:
    """Import what loading imports, so that only the checkpoint's own memory is counted."""
    import_module("dbrx_q.model.loading")
    import_module("dbrx_q.kernels.cpu.linear")
    torch.ones(1 << 20).sum()
    gc.collect()

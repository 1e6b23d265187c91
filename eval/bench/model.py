"""Measures speed and memory of a checkpoint in llama-bench's terms; each speed has a ceiling measured in the same minute."""

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
from dbrx_q.generation.decoding import Decoder, decoder_for, prefill
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
    """One speed to measure."""

    kind: str
    """"pp" for the prefill of a prompt, "tg" for the decoding of tokens one after the other."""
    tokens: int
    """Of the prompt, or to decode, in each sequence."""
    batch: int = 1
    """Sequences."""
    depth: int = 0
    """Tokens in the cache of each sequence before the test."""

    @property
    def name(self) -> str:
        """The name that llama-bench uses: "pp512", "tg128 @ d4096"; "tg128 b4" for four sequences."""
        return f"{self.kind}{self.tokens}" + f" b{self.batch}" * (self.batch > 1) + f" @ d{self.depth}" * (self.depth > 0)


@dataclass(frozen=True)
class SpeedRow:
    """The result of one test. Speeds are tokens/s of all sequences together."""

    name: str
    """`SpeedTest.name`."""
    kind: str
    """Of the `SpeedTest`."""
    tokens: int
    """Of the `SpeedTest`."""
    batch: int
    """Of the `SpeedTest`."""
    depth: int
    """Of the `SpeedTest`."""
    mean: float
    """Of `samples`."""
    median: float
    """Of `samples`."""
    stdev: float
    """Sample standard deviation of `samples`; 0 for a single one."""
    samples: list[float]
    """The speed of each repeat."""
    bytes_per_token: float
    """By `decode_need` or `prefill_need`."""
    flops_per_token: float
    """By `decode_need` or `prefill_need`."""
    bytes_per_second: float
    """bytes_per_token * median."""
    bandwidth: float
    """Median of `Rates.bandwidth`, measured before each repeat."""
    matmul_rate: float
    """Median of `Rates.matmul`, measured before each repeat."""
    ceiling: float
    """tokens/s that these rates allow if all weights are resident."""
    bound: str
    """The rate that limits the ceiling: "bandwidth" or "matmul"."""
    of_ceiling: float
    """median / ceiling."""
    hit_rate: float = 1.0
    """Share of the requests for experts that hit the cache of the device that computes; 1 if all experts are resident."""
    fallback_share: float = 0.0
    """Share of the requests for experts that a fallback copy answered."""


@dataclass(frozen=True)
class FirstToken:
    """The time from a prompt of one sequence to the first token of its answer."""

    prompt_tokens: int
    """Tokens of the prompt."""
    seconds: float
    """Median of `samples`."""
    stdev: float
    """Sample standard deviation of `samples`; 0 for a single one."""
    samples: list[float]
    """Seconds of each repeat."""


@dataclass(frozen=True)
class ModelBenchmark:
    """The results of one run. Memory is in bytes, by device: "host", "cuda:0" ..."""

    path: str
    """Path or hub id of the checkpoint, as given."""
    format: str
    """Such as "int4 g64 + int8 g64"."""
    bytes: int
    """Of all tensors as stored."""
    parameters: int
    """Of the checkpoint."""
    bits_per_weight: float
    """Stored bits over parameters, scales included."""
    weight_bytes: int
    """Of the weights in memory: all dense weights and the resident experts."""
    device: str
    """That the model runs on."""
    dtype: str
    """Of activations."""
    kv: str
    """Format of the KV cache."""
    repeats: int
    """Of every test."""
    load_seconds: float
    """Time until the model can run; files in the page cache are read from there."""
    loaded_memory: dict[str, int]
    """Growth of the memory in use by loading."""
    load_peak_memory: dict[str, int]
    """Growth of the peak by loading."""
    peak_memory: dict[str, int]
    """Growth of the peak by loading and all rows, without the buffers that measure the ceilings."""
    rows: list[SpeedRow]
    """One per test that was finished."""
    first_token: list[FirstToken]
    """One per length of prompt that was finished."""
    complete: bool
    """False if the run was interrupted."""
    planned: int
    """Rows of a complete run, `first_token` included."""
    provenance: dict[str, Any]
    """What is needed to repeat the run; without the checkpoint's hash if it was interrupted."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `dbrx-q bench --json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelBenchmark:
        """The inverse of `to_dict`."""
        rows = [SpeedRow(**row) for row in data["rows"]]
        return cls(**(data | {"rows": rows, "first_token": [FirstToken(**row) for row in data["first_token"]]}))


def speed_tests(prompts: Sequence[int], generated: Sequence[int], batches: Sequence[int], depths: Sequence[int]) -> list[SpeedTest]:
    """Tests of every prompt and generation size, at every depth, for every batch size. As in llama-bench, size 0 leaves its kind out."""
    sizes = [("pp", tokens) for tokens in prompts if tokens] + [("tg", tokens) for tokens in generated if tokens]
    return [SpeedTest(kind, tokens, batch, depth) for depth in depths for batch in batches for kind, tokens in sizes]


def check_tests(tests: Sequence[SpeedTest], config: DbrxConfig) -> None:
    """Refuse tests that the model cannot run. Weights are not needed.

    Raises:
        RequestError: there is no test, a size is out of range, or a sequence does not fit the context.
    """
    if not tests:
        raise RequestError("there must be a prompt or tokens to generate; found neither. Set one of them above 0")
    for test in tests:
        if test.tokens < 1 or test.batch < 1 or test.depth < 0:
            raise RequestError(f"tokens and batch must be at least 1 and depth at least 0; found {test}. Change the sizes")
        # The time to the first token is measured as well, so that a prompt is followed by one token.
        total = test.depth + test.tokens + (test.kind == "pp")
        if total > config.max_seq_len:
            parts = "depth + prompt + 1" if test.kind == "pp" else "depth + generated"
            raise RequestError(
                f"a sequence must fit the model's context of {config.max_seq_len} tokens; {test.name} takes {total} ({parts}). "
                "Choose smaller sizes"
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
    """Load a checkpoint; time prefill and decode on random tokens with the decoder of `generate`, and the first token of `generate`.

    Prefill computes the output of every token, as `llama-bench -embd 1` does; the first token of `generate` takes what a prompt costs a
    user, with the experts of the last layer for the last token alone.

    A KeyboardInterrupt ends the run. If at least one row was finished, the finished rows are returned, marked as incomplete.

    Args:
        source: the checkpoint.
        tests: rows in their order; the times to the first token of each length of prompt follow.
        device: to load the model on.
        dtype: of activations, None for the checkpoint's.
        kv_format: "plain", "int8" or "int4".
        repeats: of every test, after one that does not count.
        command: recorded in the result.
        report: called with (rows done, total rows).

    Raises:
        RequestError: as for `check_tests`; repeats are below 1; or another program's weights do not fit in memory once dequantized.
        CheckpointError: loading fails.
    """
    check_tests(tests, source.config)
    if repeats < 1:
        raise RequestError(f"repeats must be at least 1; found {repeats}. Choose more")
    prompts = sorted({test.tokens for test in tests if test.kind == "pp"})
    total = len(tests) + len(prompts)
    memory, model, load_seconds = _timed_load(source, device, dtype)
    loaded, load_peak = memory.used(), memory.peak()
    work = ModelWork.of(model, kv_format)
    result = ModelBenchmark(
        path=source.name,
        format=source.format,
        bytes=source.nbytes,
        parameters=source.parameters,
        bits_per_weight=source.bits_per_weight,
        weight_bytes=_weight_bytes(model, work),
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
    sha256 = ""
    try:
        for done, test in enumerate(tests):
            report(done, total)
            result.rows.append(_row(model, work, test, kv_format, repeats, meter))
        for done, tokens in enumerate(prompts, len(tests)):
            report(done, total)
            result.first_token.append(_first_token(model, tokens, kv_format, repeats))
        report(total, total)
        sha256 = source.sha256()  # last: hashing reads the files into the page cache, which would speed up loading
    except KeyboardInterrupt:
        if not result.rows:
            raise
    finally:
        model.close()
    peak = _without_meter(memory.peak(), meter, device)
    peak = {name: max(value, load_peak.get(name, 0)) for name, value in peak.items()}  # the meter was created after loading
    hashes = {"sha256": sha256} if sha256 else {}
    complete = len(result.rows) + len(result.first_token) == total
    return replace(result, peak_memory=peak, complete=complete, provenance=result.provenance | hashes)


def _timed_load(source: Source, device: torch.device, dtype: torch.dtype | None) -> tuple[MemoryGrowth, DbrxForCausalLM, float]:
    """(memory, counted from before loading; the model; seconds of loading)."""
    _warm_libraries()
    memory = MemoryGrowth(device)
    started = _now(device)
    model = source.load(dtype=dtype, device=device)
    load_seconds = _now(device) - started
    if model.expert_store.reloads_each_step:
        raise RequestError(
            f"{source.name}: weights must fit in memory for a benchmark; dequantized, these do not. Free memory, or use --dtype bfloat16"
        )
    return memory, model, load_seconds


def _without_meter(peak: dict[str, int], meter: CeilingMeter, device: torch.device) -> dict[str, int]:
    """A peak in bytes by device, less the buffers of the meter on the device that runs the model."""
    meter_device = str(device) if device.type == "cuda" else "host"
    return {name: value - (meter.nbytes if name == meter_device else 0) for name, value in peak.items()}


def _row(model: DbrxForCausalLM, work: ModelWork, test: SpeedTest, kv_format: str, repeats: int, meter: CeilingMeter) -> SpeedRow:
    measure, need_of = (_prefill_seconds, prefill_need) if test.kind == "pp" else (_decode_seconds, decode_need)
    measure(model, test, kv_format)  # compiles kernels and fills caches
    seconds, rates = [], []
    earlier_requests = model.expert_store.stats()
    for _ in range(repeats):
        rates.append(meter.measure())
        seconds.append(measure(model, test, kv_format))
    requests = model.expert_store.stats() - earlier_requests
    samples = [test.batch * test.tokens / elapsed for elapsed in seconds]
    median = statistics.median(samples)
    measured = Rates(statistics.median(rate.bandwidth for rate in rates), statistics.median(rate.matmul for rate in rates))
    need = need_of(work, batch=test.batch, depth=test.depth, tokens=test.tokens)
    allowed, bound = ceiling(need, measured)
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
        bandwidth=measured.bandwidth,
        matmul_rate=measured.matmul,
        ceiling=allowed,
        bound=bound,
        of_ceiling=median / allowed,
        hit_rate=requests.cache.hit_rate,
        fallback_share=requests.fallback_share,
    )


def _weight_bytes(model: DbrxForCausalLM, work: ModelWork) -> int:
    """Bytes of the weights in memory."""
    plan = model.placement
    if plan is None or plan.resident:
        return sum(work.nbytes.values())
    dense = sum(nbytes for kind, nbytes in work.nbytes.items() if kind != "experts")
    return dense + sum(device.experts + device.fallback for device in plan.devices)


def _prefill_seconds(model: DbrxForCausalLM, test: SpeedTest, kv_format: str) -> float:
    """With the last layer's output of all tokens. Without, a file of few layers would seem faster than a layer of a large model is."""
    with _filled(model, test, kv_format) as (decoder, tokens):
        started = _now(model.device)
        for sequence, prompt in enumerate(tokens):
            prefill(model, prompt, decoder.cache_of(sequence), all_states=True)
        return _now(model.device) - started


def _decode_seconds(model: DbrxForCausalLM, test: SpeedTest, kv_format: str) -> float:
    """Each step samples tokens, as `generate` does, but continues with random ones: repeated tokens would use the same experts again."""
    greedy, unused = SamplingParams(), torch.Generator()
    with _filled(model, test, kv_format) as (decoder, tokens):
        started = _now(model.device)
        for step in zip(*tokens, strict=True):
            for logits in decoder.step(dict(enumerate(step))).values():
                sample(logits, greedy, (), unused)
        return _now(model.device) - started


@contextmanager
def _filled(model: DbrxForCausalLM, test: SpeedTest, kv_format: str) -> Iterator[tuple[Decoder, list[list[int]]]]:
    """(a decoder whose sequences have `depth` tokens in their cache, the tokens that follow in each)."""
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
    """Import the libraries that loading imports, so that only the checkpoint's own memory is counted."""
    import_module("dbrx_q.model.loading")
    import_module("dbrx_q.kernels.cpu.linear")
    torch.ones(1 << 20).sum()
    gc.collect()

"""The plan of a run: what it reads and writes, and the memory that it takes. It keeps the quantizer within its limits.

Dimension letters: `T` calibration tokens, `D` d_model, `F` ffn hidden, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.registry import FORMATS
from dbrx_q.kernels.formats.trellis import first_scales
from dbrx_q.kernels.formats.viterbi import ROWS
from dbrx_q.kernels.trellis import encode
from dbrx_q.quantize.calibration.divergence import DIVERGENCE_BYTES, Divergence
from dbrx_q.quantize.calibration.forward import PIECE_TOKENS
from dbrx_q.quantize.methods.choose import Method
from dbrx_q.quantize.methods.products import fastest_dtype
from dbrx_q.quantize.methods.shrinkage import BLOCK

from .accelerator import Accelerator
from .guard import Guard, task_rows
from .jobs import STEP_BYTES, Job

__all__ = ["RunPlan", "TokenCounts", "check_seconds", "plan_run", "product_flops", "seconds_of"]

_SLACK = 1.1  # for memory that the allocator holds
_TEMPORARIES = 16  # float32 copies of the rows that one thread rounds
_SEARCH_BYTES = 4 << 20  # of the search for streams in one thread: the decisions of all states for a stream, tables of costs
_DEQUANTIZING = 2  # float32 copies of a matrix while it is dequantized from the format of another program
_PASSES = 10  # copies in memory that take as long as reading, rounding to nearest, hashing and writing
_UNEVEN = 1.5  # times the mean number of tokens of an expert
_MARGIN_BYTES = 96 << 20  # Python's own objects, compiled code


@dataclass(frozen=True)
class TokenCounts:
    """The tokens that run through the model, and how many models each kind of them runs through."""

    calibration: int = 0
    """That calibrate."""
    folds: int = 0
    """The parts of them whose Hessians are kept apart."""
    models: int = 1
    """The models that they run through."""
    held_out: int = 0
    """To which nothing is fitted; check texts are among them."""
    checked: int = 0
    """Those of check texts."""
    held_out_models: int = 0
    """The models that held-out tokens run through."""
    falls_back: bool = False
    """Whether they decide which matrices are stored as rounded to nearest."""

    @property
    def passes(self) -> int:
        """Tokens times models."""
        return self.calibration * self.models + self.held_out * self.held_out_models

    @property
    def most(self) -> int:
        """The tokens of the larger kind."""
        return max(self.calibration, self.held_out)

    @property
    def most_models(self) -> int:
        """The models whose weights are in memory."""
        return max(self.models if self.calibration else 0, self.held_out_models)


@dataclass(frozen=True)
class RunPlan:
    """Sizes of a run before it begins."""

    bytes_in: int
    """Bytes of the source's tensors."""
    bytes_out: int
    """Bytes of the tensors to write."""
    parameters: int
    """Of the model."""
    bits: dict[str, float]
    """Bits per weight to write, for each kind of tensor."""
    base: int
    """Bytes of memory that this process has before the run."""
    working: int
    """The most bytes that tensors take beside the activations."""
    activations: int
    """Bytes of the activations of all tokens; 0 without calibration."""
    in_files: bool
    """Whether activations are stored in files."""
    kept_tokens: int
    """Memory suffices to keep the hidden activations of an expert with at most so many tokens."""
    disk: int
    """Bytes that the destination's disk must have free."""
    held_out_tokens: int
    """Tokens of the calibration's sources to which nothing is fitted."""
    checked_tokens: int
    """Tokens of check texts."""
    flops: float
    """Floating-point operations of all matrix products, about."""
    check_flops: float
    """Those of check texts."""
    searched: dict[str, int]
    """Weights whose streams the CPU searches, by trellis format."""
    threads: int
    """Worker threads."""
    matrices: int
    """Number of matrices to pack."""
    accelerated: int
    """Number of those that a GPU rounds."""
    fetch: int
    """Bytes to fetch from the hub."""
    fetch_disk: int
    """The most bytes that fetched shards take on the disk at a time."""

    @property
    def peak_memory(self) -> int:
        """The most bytes of memory that this process will have."""
        return self.base + self.working + (0 if self.in_files else self.activations)


def plan_run(
    checkpoint: StoredWeights,
    shards: list[list[Job]],
    method: Method,
    *,
    tokens: TokenCounts,
    threads: int,
    base: int,
    memory: int | None,
    accelerator: Accelerator | None = None,
    snapshots: bool = True,
) -> RunPlan:
    """The plan of a run.

    Args:
        checkpoint: the plain one.
        shards: as `jobs.shards_of` gives them.
        method: the quantization method.
        tokens: that run through the model.
        threads: number of worker threads.
        base: bytes of memory that this process has now.
        memory: bytes that it may have; None for no limit.
        accelerator: the GPU that rounds the matrices that fit there.
        snapshots: whether calibration writes snapshots, so that a run can resume at a layer.

    Raises:
        RequestError: the memory does not suffice; the message names the least that would.
    """
    jobs = [job for shard in shards for job in shard]
    kinds: dict[str, tuple[int, int]] = {}
    for job in jobs:
        parameters, nbytes = kinds.get(job.kind, (0, 0))
        kinds[job.kind] = parameters + job.parameters, nbytes + job.nbytes
    config = checkpoint.config
    activations = 2 * tokens.passes * config.d_model * 4
    working = max(_working(checkpoint, job, method, tokens, threads) for job in jobs)
    working = int(_SLACK * working) + _MARGIN_BYTES
    if memory is not None and base + working > memory:
        raise RequestError(
            f"--memory must be at least {base + working:,} bytes here, of which this process has {base:,} before the first tensor; found "
            f"{memory:,}. Give more, or another method"
        )
    in_files = bool(activations) and memory is not None and base + working + activations > memory
    kept_tokens = (
        int(_UNEVEN * tokens.calibration * config.ffn_config.moe_top_k / config.ffn_config.moe_num_experts) if not method.squares else 0
    )
    hidden = kept_tokens * config.ffn_config.ffn_hidden_size * fastest_dtype(config.d_model).itemsize
    if memory is not None and base + working + activations + hidden > memory:
        kept_tokens = hidden = 0
    working += hidden
    bytes_out = sum(job.nbytes for job in jobs)
    on_gpu = [accelerator is not None and accelerator.rows(job, method, models=max(1, tokens.most_models)) > 0 for job in jobs]
    fetch, fetch_disk = checkpoint.to_fetch([job.tensor.name for job in jobs])
    disk = bytes_out + (activations if in_files else 0) + (activations if snapshots else 0)
    return RunPlan(
        bytes_in=sum(checkpoint.nbytes_of(name) for name in checkpoint.tensors),
        bytes_out=bytes_out,
        parameters=sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        bits={kind: 8 * nbytes / parameters for kind, (parameters, nbytes) in kinds.items()},
        base=base,
        working=working,
        activations=activations,
        in_files=in_files,
        kept_tokens=kept_tokens,
        disk=disk,
        fetch=fetch,
        fetch_disk=fetch_disk,
        held_out_tokens=tokens.held_out - tokens.checked,
        checked_tokens=tokens.checked,
        flops=sum(_flops(config, job, method, tokens) for job in jobs),
        check_flops=sum(_through(config, job, tokens.checked * tokens.held_out_models) for job in jobs),
        searched=_searched(jobs, on_gpu, tokens),
        threads=threads,
        matrices=sum(job.fmt is not None for job in jobs),
        accelerated=sum(on_gpu),
    )


def seconds_of(plan: RunPlan) -> float:
    """A rough time for this machine, from the speeds of a copy in memory, of a product of 1024 x 1024 and of searches, all measured now."""
    block = torch.empty(64 << 20, dtype=torch.uint8)
    rate = len(block) / _least_seconds(block.clone)
    searching = sum(weights * _search_seconds(name) for name, weights in plan.searched.items()) / plan.threads
    return (plan.bytes_in * _PASSES) / rate + plan.flops / product_flops() + searching


def check_seconds(plan: RunPlan) -> float:
    """The part of `seconds_of` that check texts take."""
    return plan.check_flops / product_flops() if plan.check_flops else 0.0


def product_flops() -> float:
    """Floating-point operations a second of this machine's CPU, measured now on a product of 1024 x 1024."""
    matrix = torch.randn(1024, 1024)
    return 2 * 1024**3 / _least_seconds(lambda: matrix @ matrix)


def _search_seconds(name: str) -> float:
    """Seconds that one thread of this machine searches for a weight in a trellis format, measured now on eight columns of a tile."""
    code = FORMATS[name].trellis
    assert code is not None, f"{name} is no trellis format"
    rotated = torch.randn(ROWS, 8)
    scales = first_scales(rotated, code)
    return _least_seconds(lambda: encode(rotated, scales, code)) / rotated.numel()


def _searched(jobs: Sequence[Job], on_gpu: Sequence[bool], tokens: TokenCounts) -> dict[str, int]:
    """The weights of `RunPlan.searched`, those that fill up tiles among them; a guard's model is rounded on the CPU in any case."""
    searched: dict[str, int] = {}
    for job, elsewhere in zip(jobs, on_gpu, strict=True):
        if job.fmt is None or job.kept:
            continue
        N, K = job.tensor.matrix
        formats = ([] if elsewhere else [job.fmt]) + ([Guard.nearest_format(job)] if tokens.held_out_models > 2 else [])
        for fmt in formats:
            if fmt.record.trellis is not None:
                searched[fmt.format] = searched.get(fmt.format, 0) + -(-N // ROWS) * ROWS * K
    return searched


def _least_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _working(checkpoint: StoredWeights, job: Job, method: Method, tokens: TokenCounts, threads: int) -> int:
    """Bytes while one matrix is rounded, the next one is read and the last one is written."""
    config = checkpoint.config
    N, K = job.tensor.matrix if job.fmt is not None else (1, job.parameters)
    matrix, packed = checkpoint.dtype_of(job.tensor.name).itemsize * N * K, job.nbytes
    if not isinstance(checkpoint, Checkpoint):
        matrix += _DEQUANTIZING * 4 * (N * K if job.expert >= 0 or job.fmt is None else min(N * K, STEP_BYTES // 2))
    rounding = 0
    if job.fmt is not None and method.takes_pieces(job.fmt):
        rounding = threads * (task_rows(job.fmt) * K * 4 * _TEMPORARIES + (0 if job.fmt.record.trellis is None else _SEARCH_BYTES))
    if not tokens.passes:
        return 3 * matrix + 3 * packed + rounding
    D, F, models = config.d_model, config.ffn_config.ffn_hidden_size, tokens.most_models
    piece = min(tokens.most, PIECE_TOKENS)
    weights = matrix + packed + (6 if job.expert >= 0 else 1) * 4 * N * K * models // 2 + 4 * N * K
    logits = tokens.passes * 8 * config.ffn_config.moe_num_experts
    passing = 4 * piece * (3 * D + 3 * max(N, F if job.expert >= 0 else 0))
    fixed = weights + logits
    if tokens.held_out:
        fixed += _guarding(job, tokens, threads)
    if job.fmt is None or not method.calibrated or job.kind == "embedding":
        return fixed + max(passing, rounding)
    # Hessian, cross term and factor of K x K, and twice the factor while it is computed in float64; of a trellis format the first two
    # once more, rotated; copies of a piece of inputs, four for each model.
    cross_term = 4 if tokens.models == 2 else 0
    squares = 0 if method.squares else K * K * (8 + cross_term + 12)
    squares += 0 if job.fmt.record.trellis is None else K * K * (4 + cross_term)
    # For each fold a Hessian of the columns that are compared and, where those are all, a cross term; a few more to compare them.
    block, sums = min(K, BLOCK), tokens.models if K <= BLOCK else 1
    squares += 4 * block * block * (tokens.folds * sums + 8) if tokens.folds else 0
    moments = squares + 4 * min(tokens.calibration, PIECE_TOKENS) * K * (4 * tokens.models)
    return fixed + max(passing, moments + rounding)


def _guarding(job: Job, tokens: TokenCounts, threads: int) -> int:
    """Bytes for what is compared with rounding to nearest: the packed matrix, the errors of both, or the logits."""
    if job.kind == "norms":
        return 0
    N, K = job.tensor.matrix
    piece = min(tokens.held_out, PIECE_TOKENS)
    if job.kind == "head":
        rows = Divergence.rows(N)[0].stop
        models = tokens.held_out_models + tokens.falls_back
        block = min(N * K, STEP_BYTES // 2)
        sums = 8 * tokens.held_out * (3 * models + 1)
        return job.nbytes + models * 4 * (block + rows * K + piece * (rows + K)) + threads * DIVERGENCE_BYTES + sums
    if not tokens.falls_back or job.fmt is None:
        return job.nbytes
    rows = min(N, tokens.held_out) if job.kind == "embedding" else N
    return job.nbytes + 4 * (3 * rows * K + piece * (3 * rows + 2 * K) * (job.kind != "embedding"))


def _flops(config: DbrxConfig, job: Job, method: Method, tokens: TokenCounts) -> float:
    """For one matrix: products with the tokens that reach it, their outer products, and rounding with a Hessian."""
    if job.fmt is None or job.kind == "embedding" or not tokens.passes:
        return 0.0
    N, K = job.tensor.matrix
    held_out = tokens.held_out * (tokens.held_out_models + (3 if tokens.falls_back else 0))
    through = _through(config, job, held_out)
    outer = rounding = 0.0
    if method.calibrated and tokens.calibration:
        # Hidden activations of experts are computed twice.
        through += _through(config, job, tokens.calibration * tokens.models) * (1.5 if job.expert >= 0 else 1)
        if not method.squares:
            reaching = tokens.calibration * _share(config, job)
            outer = 2.0 * reaching * K * K * (2 if method.compares else 0.6)  # a symmetric sum takes little more than half
            rounding = (12.0 if method.compares else 3.0) * N * K * K
    return through + outer + rounding


def _through(config: DbrxConfig, job: Job, tokens: int) -> float:
    """Of the products of a packed matrix with the tokens that reach it, `tokens` being those of all models."""
    if job.fmt is None or job.kind == "embedding":
        return 0.0
    N, K = job.tensor.matrix
    return 2.0 * tokens * _share(config, job) * N * K


def _share(config: DbrxConfig, job: Job) -> float:
    """The share of all tokens that reach a matrix."""
    ffn = config.ffn_config
    return ffn.moe_top_k / ffn.moe_num_experts if job.expert >= 0 else 1.0

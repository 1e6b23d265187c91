"""`--calibration self`: sequences that the model samples, in a file beside the result, and what sampling them takes."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.planning.sizes import format_size

from . import terminal

if TYPE_CHECKING:
    import torch

    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.checkpoint.remote_shards import RemoteShards
    from dbrx_q.config import DbrxConfig
    from dbrx_q.model.modeling import DbrxForCausalLM
    from dbrx_q.planning.machine import Machine
    from dbrx_q.planning.sampling import SamplingPlan
    from dbrx_q.quantize.calibration.sequence_file import StoredSequences
    from dbrx_q.quantize.pipeline.accelerator import Accelerator

__all__ = ["SELF", "Sampling", "faster_ways", "is_sampled", "notice_of", "sampling_as_dict", "show_sampling"]

SELF = "self"
"""The source that the model itself samples; `self=PATH` names another checkpoint of the same model, such as a quantized one."""

_LONG_SECONDS = 1800  # from which the plan says what would take less
_SHORTER = (2, 4, 8)  # parts that sequences are cut into, to take fewer steps
_SHORTEST = 64
_NOTICEABLY = 0.8
_COPIES = 4  # of the ids, with the random numbers that draw them
# Of 20,000 tokens of a novel and of as many that the bundled model samples: 9.3 and 9.7 bits, 0.07 % and 0.12 % of repeats.
_FEW_BITS, _MANY_REPEATS = 4.0, 0.25


def is_sampled(name: str) -> bool:
    """Whether a source of `--calibration` is sampled from a model."""
    return name.partition("=")[0] == SELF and not Path(name).exists()


@dataclass
class Sampling:
    """What samples the sequences of `--calibration self` for one command."""

    source: str
    """SRC, a folder or a hub id."""
    opened: Path | RemoteShards
    """Its weights."""
    destination: Path
    """DST; the sequences are kept beside it."""
    memory: int
    """Bytes of host memory that this process may take."""
    revision: str | None = None
    """Branch, tag or commit of SRC."""
    accelerator: Accelerator | None = None
    """The GPU that computes; None for the CPU."""
    resume: bool = False
    """Whether sequences of an interrupted run are taken."""
    low_disk: bool = False
    """Whether the shards of SRC are deleted after use."""
    dry_run: bool = False
    """Whether to plan and sample nothing."""
    plan: SamplingPlan | None = None
    """The plan, once sequences were asked for."""
    alternatives: tuple[str, ...] = ()
    """Sentences that say what would take less time."""
    _machine: Machine | None = None
    """What the model may take, once it is planned."""

    @property
    def folder(self) -> Path:
        """The folder of SRC's small files, or the file that holds all."""
        return self.opened if isinstance(self.opened, Path) else self.opened.folder

    @property
    def path(self) -> Path:
        """The file of the sequences."""
        from dbrx_q.checkpoint.staging import partial_of

        return partial_of(self.destination).with_suffix(".self.safetensors")

    def sequences(self, name: str, *, count: int, length: int, seed: int) -> StoredSequences:
        """The sequences of a source, sampled now or by the run that is resumed; zeros in a dry run.

        Args:
            name: `self` or `self=PATH`.
            count: how many.
            length: tokens of each.
            seed: of the sampling.

        Raises:
            CheckpointError: the checkpoint cannot be read, or is not one that can be sampled from.
            RequestError: too little memory, logits that are not finite, or sequences of other options in the file of a resumed run.
        """
        import torch

        from dbrx_q.config import DbrxConfig
        from dbrx_q.quantize.calibration.sequence_file import StoredSequences, read_sequences

        model_folder = self._model_folder(name)
        config = DbrxConfig.from_pretrained(model_folder)
        self._check(name, model_folder, config, length)
        options = {"model": _identity(model_folder), "count": count, "length": length, "seed": seed, "starts": _starts()}
        earlier = StoredSequences(torch.empty(0, length, dtype=torch.int64), {})
        if self.resume and self.path.exists():
            earlier = read_sequences(self.path)
            self._check_earlier(earlier, options)
            if len(earlier.ids) == count:
                terminal.say(f"{self.path}: holds the {count:,} sequences that were sampled before")
                return earlier
        self.plan = self._planned(config, model_folder, count, length)
        if self.dry_run:
            return StoredSequences(torch.zeros(count, length, dtype=torch.int64), options)
        return self._sampled(model_folder, config, earlier, options)

    def check_size(self, name: str, count: int, length: int) -> None:
        """Refuse sequences of which not even the ids fit into memory, before a tensor is made for them.

        Args:
            name: `self` or `self=PATH`.
            count: sequences to sample.
            length: tokens of each.

        Raises:
            RequestError: with both sizes.
        """
        needed = _COPIES * 8 * count * max(0, length)
        if needed > self.memory:
            raise RequestError(
                f"--calibration {name}: {count:,} sequences of {length:,} tokens must fit into --memory; their ids take {needed:,} bytes "
                f"of {self.memory:,}. Give a smaller --sequences or --length"
            )

    def _model_folder(self, name: str) -> Path:
        """The folder of the checkpoint to sample from, with its weights unless it is only planned."""
        from dbrx_q.checkpoint.hub import resolve_folder

        path = name.removeprefix(f"{SELF}=")
        if name != SELF:
            if not path:
                raise RequestError(
                    f"--calibration {name}: a checkpoint must follow the equals sign; found none. Give one, as self=dbrx-int4"
                )
            return resolve_folder(path, weights=not self.dry_run)
        if self.low_disk:
            raise RequestError(
                "--calibration self reads all of SRC for every token; found --low-disk, which deletes each shard after use. Leave it out, "
                "or sample from a quantized checkpoint with --calibration self=PATH"
            )
        if isinstance(self.opened, Path) and self.opened.is_file():
            raise _of_another_program(self.opened)
        return resolve_folder(self.source, revision=self.revision, weights=not self.dry_run)

    def _check(self, name: str, model_folder: Path, config: DbrxConfig, length: int) -> None:
        """Refuse before hours of work what cannot be sampled, or not be written."""
        from dbrx_q.checkpoint.folder import Checkpoint, check_is_plain
        from dbrx_q.checkpoint.staging import MARKER_NAME, check_destination, partial_of
        from dbrx_q.sources.open import tokenizer_at
        from dbrx_q.sources.open_weights import open_weights
        from dbrx_q.sources.tokenizers_agree import check_same_tokenizer

        with open_weights(self.opened) as weights:
            target = weights.config
            if isinstance(weights, Checkpoint):
                check_is_plain(weights)
            elif name == SELF:
                raise _of_another_program(self.folder)
        if name != SELF:
            if (config.vocab_size, config.n_layers, config.d_model) != (target.vocab_size, target.n_layers, target.d_model):
                raise RequestError(
                    f"--calibration {name}: the checkpoint must be of the model that is quantized, with {target.n_layers} layers, "
                    f"{target.d_model} channels and {target.vocab_size:,} ids; found {config.n_layers}, {config.d_model} and "
                    f"{config.vocab_size:,}. Give a quantized copy of it"
                )
            ours, theirs = (tokenizer_at(location) for location in (self.folder, model_folder))
            check_same_tokenizer(ours, theirs, names=(str(self.folder), str(model_folder)))
        if length > config.context_length:
            raise RequestError(f"--length must be at most the model's context of {config.context_length:,} tokens; found {length:,}")
        if self.dry_run:
            return
        if not self.resume:
            check_destination(self.destination)
            partial = partial_of(self.destination)
            if (partial / MARKER_NAME).exists():
                raise RequestError(f"{partial}: this folder holds an unfinished run. Continue it with --resume, or remove it")

    def _check_earlier(self, earlier: StoredSequences, options: Mapping[str, Any]) -> None:
        before = {name: earlier.options.get(name) for name in options}
        different = [name for name, value in options.items() if before[name] != value]
        if different:
            name = different[0]
            raise RequestError(
                f"{self.path}: --resume must find sequences of the same options; {name} was {before[name]!r} and is {options[name]!r}. "
                "Give that one, or remove the file"
            )

    def _planned(self, config: DbrxConfig, model_folder: Path, count: int, length: int) -> SamplingPlan:
        """The plan; notes what would take less where it takes long."""
        import dbrx_q.generation.sequence_sampler
        import dbrx_q.model.loading  # noqa: F401 # its memory must count as taken
        from dbrx_q.checkpoint.layout import tensor_formats
        from dbrx_q.planning.host_memory import resident_bytes
        from dbrx_q.planning.machine import Gpu, Machine
        from dbrx_q.planning.sampling import plan_sampling
        from dbrx_q.quantize.pipeline.plan import product_flops

        gpus = () if self.accelerator is None else (Gpu(self.accelerator.memory),)
        machine = self._machine = Machine(max(0, self.memory - resident_bytes()), gpus).as_measured()
        formats = tensor_formats(config, str(model_folder))
        flops = product_flops() if self.accelerator is None else math.inf
        plan = plan_sampling(config, formats, machine, sequences=count, length=length, flops=flops)
        if plan.seconds > _LONG_SECONDS:
            self.alternatives = faster_ways(config, formats, machine, plan, flops)
        return plan

    def _sampled(self, model_folder: Path, config: DbrxConfig, earlier: StoredSequences, options: Mapping[str, Any]) -> StoredSequences:
        """Sample what the earlier sequences lack, and keep every batch in the file."""
        import torch

        from dbrx_q.generation.sequence_sampler import TextTokens, sample_sequences
        from dbrx_q.quantize.calibration.sequence_file import StoredSequences, write_sequences
        from dbrx_q.sources.open import tokenizer_at

        assert self.plan is not None
        count, length = int(options["count"]), int(options["length"])
        tokens = TextTokens.of(tokenizer_at(self.folder), config.vocab_size)
        batch = int(earlier.options.get("batch", self.plan.batch))  # the earlier batches, so that all tokens are as without interruption
        done = [earlier.ids]
        options = {**options, "batch": batch}

        def keep(rows: torch.Tensor) -> None:
            done.append(rows)
            write_sequences(self.path, StoredSequences(torch.cat(done), options))

        about = _duration(self.plan.seconds)
        terminal.say(f"sampling {count:,} sequences of {length:,} tokens from {model_folder}, {batch:,} at a time: about {about}")
        started, model = time.perf_counter(), self._loaded(model_folder, batch, length)
        try:
            with terminal.progress("sampling") as on_step:
                sample_sequences(
                    model,
                    tokens,
                    count=count,
                    length=length,
                    seed=int(options["seed"]),
                    batch=batch,
                    first=len(earlier.ids),
                    on_step=lambda tokens_done: on_step(tokens_done, count * length),
                    on_batch=keep,
                )
        except KeyboardInterrupt:
            kept = sum(map(len, done))
            if not kept:
                raise
            message = f"interrupted; {kept:,} of {count:,} sequences are kept in {self.path}, and the same command with --resume continues"
            raise terminal.failed(message) from None
        finally:
            model.close()
            del model
            gc.collect()
            if self.accelerator is not None:
                torch.cuda.empty_cache()
        stored = StoredSequences(torch.cat(done), options)
        new = (count - len(earlier.ids)) * length
        terminal.say(
            f"{self.path}: {count:,} sampled sequences, {new / (time.perf_counter() - started):,.0f} tokens/s; --calibration {self.path} "
            "takes them again"
        )
        if (notice := notice_of(stored.ids)) is not None:
            terminal.say(notice)
        return stored

    def _loaded(self, model_folder: Path, batch: int, length: int) -> DbrxForCausalLM:
        """The model, loaded as `generate` loads it within a budget."""
        from dbrx_q.model.loading import load_pretrained
        from dbrx_q.planning.budget import Budget

        assert self._machine is not None
        devices = None if self.accelerator is None else (self.accelerator.device,)
        # A step of a batch needs nearly every expert, layer by layer. A prefetched expert evicts one that the step still needs: with
        # slots for 26 of the bundled model's 64 experts, 16 sequences read 12.3 MB a step with prefetching and 9.7 MB without.
        budget = Budget(self._machine, context=length, batch=batch, step_tokens=batch, devices=devices, prefetch=False)
        return load_pretrained(model_folder, budget=budget)


def faster_ways(
    config: DbrxConfig, formats: Mapping[str, TensorFormat], machine: Machine, plan: SamplingPlan, flops: float
) -> tuple[str, ...]:
    """Sentences that say what would take noticeably less time than a plan: shorter sequences, or a quantized copy of the model.

    Arguments as for `plan_sampling`, with the plan that it gave.
    """
    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.planning.sampling import plan_sampling
    from dbrx_q.quantize.pipeline.format_assignment import default_formats

    def planned(formats: Mapping[str, TensorFormat], parts: int) -> SamplingPlan:
        return plan_sampling(config, formats, machine, sequences=plan.sequences * parts, length=plan.length // parts, flops=flops)

    def takes_less(other: SamplingPlan) -> bool:
        return other.placement.fits and other.seconds < _NOTICEABLY * plan.seconds

    sentences = []
    shorter = [(parts, planned(formats, parts)) for parts in _SHORTER if plan.length // parts >= _SHORTEST]
    faster = [(other.seconds, parts, other) for parts, other in shorter if takes_less(other)]
    if faster:
        seconds, parts, other = min(faster, key=lambda item: item[0])
        what = f"as many tokens in {parts} times as many --sequences of --length {plan.length // parts}"
        sentences.append(f"{what} take {other.steps:,} steps, about {_duration(seconds)}")
    if not formats and takes_less(packed := planned(default_formats(config, TensorFormat.of("int4")), 1)):
        what = "sampled from an int4 copy of the model, made with --method rtn and named by --calibration self=COPY"
        sentences.append(f"{what}, they take about {_duration(packed.seconds)}")
    return tuple(sentences)


def notice_of(ids: torch.Tensor) -> str | None:
    """What to say of sampled sequences [n, S] that repeat themselves, as those of a damaged model do; None of others."""
    counts = ids.flatten().bincount().double()
    shares = counts[counts > 0] / ids.numel()
    bits = abs(float((shares * shares.log2()).sum()))
    repeats = float((ids[:, 1:] == ids[:, :-1]).double().mean())
    if bits >= _FEW_BITS and repeats <= _MANY_REPEATS:
        return None
    return (
        f"dbrx-q: note: the sampled text repeats itself: {len(shares):,} distinct tokens with an entropy of {bits:.2f} bits a token, and "
        f"{repeats:.0%} of the tokens equal the one before, where text has more than {_FEW_BITS:.0f} bits and fewer than "
        f"{_MANY_REPEATS:.0%}. The weights may be damaged: look at what `dbrx-q generate` writes, or calibrate with texts"
    )


def show_sampling(sampling: Sampling) -> None:
    """Print the plan of a dry run, if sequences are to be sampled."""
    if (plan := sampling.plan) is None:
        return
    tokens = plan.sequences * plan.length
    print(f"sampling    {_duration(plan.seconds):>10}  about, for {tokens:,} tokens: {plan.steps:,} steps of {plan.batch:,} sequences")
    disk = f", and reads {format_size(int(plan.step_bytes))} of experts from disk in every step" if plan.step_bytes else ""
    print(f"            {format_size(plan.memory):>10}  of memory at most, before the quantization begins{disk}")
    for sentence in sampling.alternatives:
        print(f"            {sentence}")
    if not plan.placement.fits:
        print(
            f"            lacks {format_size(plan.placement.shortfall)} on {plan.placement.short_device}: give more, or a smaller --length"
        )


def sampling_as_dict(sampling: Sampling) -> dict[str, Any] | None:
    """The plan of a dry run for JSON; None where nothing is sampled."""
    if (plan := sampling.plan) is None:
        return None
    return {
        "sequences": plan.sequences,
        "length": plan.length,
        "batch": plan.batch,
        "steps": plan.steps,
        "disk_bytes_of_a_step": plan.step_bytes,
        "memory": plan.memory,
        "fits": plan.placement.fits,
        "seconds": plan.seconds,
        "alternatives": list(sampling.alternatives),
    }


def _of_another_program(location: Path) -> CheckpointError:
    return CheckpointError(
        f"{location}: --calibration self samples from a checkpoint of the published layout; this one is of another program. "
        "Quantize it once without calibration, and sample from that copy: --calibration self=COPY"
    )


def _identity(folder: Path) -> dict[str, int]:
    """Sizes of the shards of a checkpoint, by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def _starts() -> list[list[object]]:
    from dbrx_q.generation.sequence_sampler import DEFAULT_STARTS

    return [list(asdict(start).values()) for start in DEFAULT_STARTS]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

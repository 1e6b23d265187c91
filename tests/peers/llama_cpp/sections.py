"""What is measured, in sections that can be run by themselves, and how each program runs it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import NANO_GGUF, Checkpoints
from processes import Programs

__all__ = ["SECTIONS", "Competitor", "Machine", "Section", "competitors"]

Samples = dict[str, list[float]]
"""Samples by the name of the case."""


@dataclass
class Machine:
    """What all sections share."""

    files: Checkpoints
    """Of both programs."""
    programs: Programs
    """How both are run."""
    kinds: Sequence[str]
    """llama.cpp's 4-bit types."""
    pythons: Mapping[str, str]
    """Interpreters by the name of the dbrx_q that each runs; the first is the one that is compared."""
    has_amx: bool
    """Whether the chip has AMX, which gives every type of llama.cpp a second layout."""
    rates: list[dict[str, float]] = field(default_factory=list)
    """Of the machine, as `ours.py` measured them since the section began."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Sizes and versions that the programs report."""

    def before(self, name: str) -> str:
        """The other dbrx_q, for the first; "" for others and where there is none."""
        first, *others = self.pythons
        return others[0] if name == first and others else ""

    def note_bits(self, name: str, bits: float) -> None:
        """Keep the size of a format or type."""
        self.facts.setdefault("bits per weight", {})[name] = f"{bits:.3f}"


@dataclass(frozen=True)
class Competitor:
    """One program in one configuration."""

    name: str
    """As the tables name it."""
    kind: str
    """"dbrx_q"; "llama.cpp"; or "other" for what is not compared with llama.cpp."""
    run: Callable[[], Samples]
    """Measures all cases of the section once."""
    beside: str = ""
    """The competitor of whose speed the tables print this one's multiple."""


@dataclass(frozen=True)
class Section:
    """Cases that a process measures with one load of its model."""

    title: str
    """Of the table."""
    cases: tuple[str, ...]
    """Columns of the table."""
    unit: str
    """Of all cases; "tokens/s" is better if higher, others if lower."""
    make: Callable[[Machine], list[Competitor]]
    """The competitors of a turn."""
    note: str = ""
    """What the two sides do, printed under the title."""

    @property
    def higher_is_better(self) -> bool:
        """Whether the figures are speeds."""
        return self.unit == "tokens/s"


def competitors(section: Section, machine: Machine) -> list[Competitor]:
    """Who takes part in a section's turns: every dbrx_q first, then llama.cpp."""
    return sorted(section.make(machine), key=lambda competitor: ("dbrx_q", "other", "llama.cpp").index(competitor.kind))


# ---- both sides of the sections


def _dbrx_q(
    machine: Machine, checkpoint: Path, tests: Mapping[str, Mapping[str, Any]], suffix: str = "", **request: Any
) -> list[Competitor]:
    """dbrx_q on a checkpoint; `tests` by the name of the case."""

    def run(python: str) -> Samples:
        answer, _ = machine.programs.dbrx_q(python, checkpoint, list(tests.values()), **request)
        machine.rates.append(answer["rates"])
        machine.note_bits(checkpoint.name.rsplit("-", 1)[1], answer["bits_per_weight"])
        machine.facts |= answer["versions"]
        return dict(zip(tests, answer["samples"], strict=True))

    if suffix:
        return [Competitor(name + suffix, "other", partial(run, python), beside=name) for name, python in machine.pythons.items()]
    return [Competitor(name, "dbrx_q", partial(run, python), machine.before(name)) for name, python in machine.pythons.items()]


def _llama_bench(machine: Machine, kinds: Sequence[str], arguments: Sequence[str]) -> list[Competitor]:
    """llama-bench with every type and layout."""

    def run(kind: str, layout: int) -> Samples:
        tests, _ = machine.programs.llama_bench(machine.files.gguf(kind), layout, *arguments)
        _note_size(machine, kind, tests[0])
        return {_speed_name(test): test["samples_ts"] for test in tests}

    return [Competitor(_label(kind, layout), "llama.cpp", partial(run, kind, layout)) for kind, layout in _layouts(machine, kinds)]


def _note_size(machine: Machine, kind: str, test: Mapping[str, Any]) -> None:
    machine.note_bits(kind, 8 * test["model_size"] / test["model_n_params"])
    machine.facts["llama.cpp"] = test["build_commit"]


def _layouts(machine: Machine, kinds: Sequence[str]) -> list[tuple[str, int]]:
    """(type, whether llama.cpp repacks the weights); IQ4_XS has no other layout on a chip without AMX."""
    return [(kind, layout) for kind in kinds for layout in (1, 0) if layout or machine.has_amx or kind != "IQ4_XS"]


def _label(kind: str, layout: int) -> str:
    return f"{kind}{'' if layout else ', not repacked'}"


def _speed_name(test: Mapping[str, Any]) -> str:
    """The case of a test of llama-bench."""
    return f"prefill {test['n_prompt']}" if test["n_prompt"] else "decode"


# ---- the sections


def _prefill(machine: Machine, *, tokens: int, repeats: int, format: str = "int4", kinds: Sequence[str] = ()) -> list[Competitor]:
    test = {"kind": "prefill", "tokens": tokens, "repeats": repeats}
    arguments = ["-embd", "1", "-p", str(tokens), "-n", "0", "-r", str(repeats)]
    return [
        *_dbrx_q(machine, machine.files.packed(format), {f"prefill {tokens}": test}),
        *_llama_bench(machine, kinds or machine.kinds, arguments),
    ]


def _decode(machine: Machine, *, tokens: int = 64, repeats: int = 2, format: str = "int4", kinds: Sequence[str] = ()) -> list[Competitor]:
    test = {"kind": "decode", "tokens": tokens, "repeats": repeats}
    arguments = ["-p", "0", "-n", str(tokens), "-r", str(repeats)]
    return [
        *_dbrx_q(machine, machine.files.packed(format), {"decode": test}),
        *_llama_bench(machine, kinds or machine.kinds, arguments),
    ]


def _depth(machine: Machine, *, depth: int, int8: bool = False, tokens: int = 32, repeats: int = 2) -> list[Competitor]:
    """The two configurations of llama.cpp that are fastest without depth, since the cache costs all of them the same."""
    test = {"kind": "decode", "tokens": tokens, "repeats": repeats, "depth": depth}
    case, checkpoint = f"decode at {depth}", machine.files.packed("int4")
    chosen = []
    for kind, layout in _layouts(machine, machine.kinds):
        tests, _ = machine.programs.llama_bench(machine.files.gguf(kind), layout, "-p", "0", "-n", "32", "-r", "2")
        _note_size(machine, kind, tests[0])
        chosen.append((statistics.median(tests[0]["samples_ts"]), kind, layout))
    arguments = ["-p", "0", "-n", str(tokens), "-d", str(depth), "-r", str(repeats)]

    def run(kind: str, layout: int, flash: int) -> Samples:
        tests, _ = machine.programs.llama_bench(machine.files.gguf(kind), layout, "-fa", str(flash), *arguments)
        return {case: tests[0]["samples_ts"]}

    return [
        *_dbrx_q(machine, checkpoint, {case: test}),
        *(_dbrx_q(machine, checkpoint, {case: test | {"kv": "int8"}}, ", --kv int8") if int8 else []),
        *(
            Competitor(
                f"{_label(kind, layout)}, {'with' if flash else 'without'} flash attention", "llama.cpp", partial(run, kind, layout, flash)
            )
            for _, kind, layout in sorted(chosen, reverse=True)[:2]
            for flash in (0, 1)
        ),
    ]


_BATCHES = (1, 4, 8)


def _batches(machine: Machine, *, prompt: int = 16, tokens: int = 32) -> list[Competitor]:
    def run(kind: str, layout: int) -> Samples:
        speeds = machine.programs.batched_bench(machine.files.gguf(kind), layout, _BATCHES, prompt, tokens)
        return {_batch_name(batch): samples for batch, samples in speeds.items()}

    tests = {_batch_name(batch): {"kind": "decode", "tokens": tokens, "repeats": 1, "batch": batch, "depth": prompt} for batch in _BATCHES}
    return [
        *_dbrx_q(machine, machine.files.packed("int4"), tests),
        *(Competitor(_label(kind, layout), "llama.cpp", partial(run, kind, layout)) for kind, layout in _layouts(machine, machine.kinds)),
    ]


def _batch_name(batch: int) -> str:
    return f"{batch} sequence{'s' * (batch > 1)}"


_LOAD_MEMORY = "peak memory while loading, MB"
_LOAD_CASES = ("load and first token in the process", "the whole process")


def _load(machine: Machine) -> list[Competitor]:
    def run_ours(name: str, python: str) -> Samples:
        answer, process = machine.programs.dbrx_q(python, machine.files.packed("int4"), (), rates=False, first_token=True)
        _note_memory(machine, _LOAD_MEMORY, name, process.peak_bytes)
        return dict(zip(_LOAD_CASES, ([answer["first_token_seconds"]], [process.seconds]), strict=True))

    def run_peer(kind: str, layout: int) -> Samples:
        arguments = ["-p", "0", "-n", "1", "-r", "1", "--no-warmup", "-v"]
        _, process = machine.programs.llama_bench(machine.files.gguf(kind), layout, *arguments)
        _note_memory(machine, _LOAD_MEMORY, _label(kind, layout), process.peak_bytes)
        return dict(zip(_LOAD_CASES, ([process.load_seconds], [process.seconds]), strict=True))

    return [
        *(Competitor(name, "dbrx_q", partial(run_ours, name, python), machine.before(name)) for name, python in machine.pythons.items()),
        *(
            Competitor(_label(kind, layout), "llama.cpp", partial(run_peer, kind, layout))
            for kind, layout in _layouts(machine, machine.kinds)
        ),
    ]


def _note_memory(machine: Machine, fact: str, name: str, peak_bytes: int) -> None:
    """Keep the largest peak of resident memory of each program."""
    memory = machine.facts.setdefault(fact, {})
    memory[name] = max(memory.get(name, 0), round(peak_bytes / 1e6))


_FIRST_TOKEN = "the whole process"
_PROMPT = "The mixture of experts"


def _first_token(machine: Machine) -> list[Competitor]:
    def run(name: str, command: Sequence[str]) -> Samples:
        process = machine.programs.run(*command)
        _note_memory(machine, "peak memory of the first token, MB", name, process.peak_bytes)
        return {_FIRST_TOKEN: [process.seconds]}

    def generate(python: str) -> list[str]:
        program = str(Path(python).parent / "dbrx-q")
        return [program, "generate", str(machine.files.nano), "--prompt", _PROMPT, "--max-new-tokens", "1"]

    completion = [machine.programs.tools.path("llama-completion"), "-m", str(NANO_GGUF), "-t", str(machine.programs.threads)]
    completion += ["-n", "1", "-p", _PROMPT, "-no-cnv", "--temp", "0"]
    return [
        *(
            Competitor(name, "dbrx_q", partial(run, name, generate(python)), machine.before(name))
            for name, python in machine.pythons.items()
        ),
        *(
            Competitor(f"{name}, `import dbrx_q` alone", "other", partial(run, f"{name}, import", [python, "-c", "import dbrx_q"]))
            for name, python in machine.pythons.items()
        ),
        Competitor("Q4_0", "llama.cpp", partial(run, "Q4_0", completion)),
    ]


def _float32(machine: Machine) -> list[Competitor]:
    test = {"kind": "prefill", "tokens": 512, "repeats": 2}
    return _dbrx_q(machine, machine.files.packed("int4"), {"prefill 512": test}, dtype="float32")


_ALL_TOKENS = "Both compute the logits of every token of the prompt, in chunks of 512: llama-bench with `-embd 1`."
SECTIONS = {
    "prefill-32": Section("Prefill of 32 tokens", ("prefill 32",), "tokens/s", partial(_prefill, tokens=32, repeats=5), _ALL_TOKENS),
    "prefill-512": Section("Prefill of 512 tokens", ("prefill 512",), "tokens/s", partial(_prefill, tokens=512, repeats=2), _ALL_TOKENS),
    "prefill-2048": Section(
        "Prefill of 2048 tokens", ("prefill 2048",), "tokens/s", partial(_prefill, tokens=2048, repeats=1), _ALL_TOKENS
    ),
    "decode": Section("Decode of 64 tokens", ("decode",), "tokens/s", _decode, "One sequence with random tokens on both sides."),
    "depth-4096": Section("Decode after 4,096 tokens", ("decode at 4096",), "tokens/s", partial(_depth, depth=4096, int8=True)),
    "depth-16384": Section("Decode after 16,384 tokens", ("decode at 16384",), "tokens/s", partial(_depth, depth=16384)),
    "batches": Section(
        "Decode of several sequences together",
        tuple(_batch_name(batch) for batch in _BATCHES),
        "tokens/s",
        _batches,
        "Tokens/s of all sequences; prompts of 16 tokens, 32 tokens decoded: llama-batched-bench.",
    ),
    "int8-prefill": Section(
        "int8: prefill of 512 tokens",
        ("prefill 512",),
        "tokens/s",
        partial(_prefill, tokens=512, repeats=2, format="int8", kinds=("Q8_0",)),
        _ALL_TOKENS,
    ),
    "int8-decode": Section("int8: decode", ("decode",), "tokens/s", partial(_decode, format="int8", kinds=("Q8_0",))),
    "load": Section(
        "Loading and one token, files in the page cache",
        _LOAD_CASES,
        "s",
        _load,
        "The process of dbrx_q imports torch and generates one token; that of llama-bench decodes one (`-n 1 --no-warmup`).",
    ),
    "first-token": Section(
        "First token of the bundled model",
        (_FIRST_TOKEN,),
        "s",
        _first_token,
        "From the start of the process to its end: `dbrx-q generate --max-new-tokens 1` and `llama-completion -n 1`.",
    ),
    "float32": Section(
        "Prefill of 512 tokens with float32 activations",
        ("prefill 512",),
        "tokens/s",
        _float32,
        "The default of `perplexity`; llama.cpp has 8-bit activations alone.",
    ),
}
"""All sections, in the order of a run."""

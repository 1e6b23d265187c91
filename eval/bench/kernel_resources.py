"""The resources of Triton kernels on each chip, measured without a GPU: recorded launches are compiled ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.kernels.triton.launch import Chip, Launch, compiler_options, dependent_launch_wanted, find_cache

__all__ = ["Resources", "check_compiler", "compile_launch", "early_accesses", "global_loads", "launch_key", "packed_parameters"]

_LEAST_WORDS = 1 << 20  # bytes of the codes of a trellis weight; lists of experts and slots are far smaller
_TRUE = ("1", "true", "yes", "on", "y")  # as Triton reads a switch
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Resources:
    """The resources of one compiled kernel."""

    kernel: str
    """Name of its function."""
    chip: str
    """That it is compiled for."""
    constants: str
    """Its compile-time constants, as name=value."""
    warps: int
    """Per program."""
    stages: int
    """Of software pipelining."""
    shared_memory: int
    """Bytes per program."""
    registers: int
    """Per thread."""
    spills: int
    """Bytes per thread in local memory."""
    packed_loads: tuple[int, ...] | None
    """Every width in bytes of a thread's loads of packed codes; empty if the kernel reads none, None on AMD, where it is not analysed."""
    assembly: str
    """PTX, or AMD's assembly."""
    cubin: bytes
    """NVIDIA's machine code; empty on AMD."""
    pdl: bool = False
    """Whether it may begin while the kernel before it still runs."""

    @property
    def sass(self) -> str:
        """The listing of `cubin`."""
        return _listing(self.cubin, "-sass")

    @property
    def early_accesses(self) -> list[str]:
        """What breaks the rule of `launch.py` for kernels with PDL: instructions that touch global memory, or may pass by the wait, before
        it."""
        return early_accesses(self.assembly, self.sass if self.pdl else "", pdl=self.pdl)


def check_compiler() -> None:
    """Refuse to begin where Triton would interpret kernels, or can keep no compiled ones.

    Raises:
        RequestError: the environment says so.
        DbrxError: another value of DBRX_Q_PDL than 0 and 1.
    """
    dependent_launch_wanted()
    interpret = os.environ.get("TRITON_INTERPRET", "0")
    if interpret.lower() in _TRUE:
        raise RequestError(f"kernels must be compiled, not interpreted; found TRITON_INTERPRET={interpret} in the environment. Unset it")
    find_cache()
    folder = os.environ.get("TRITON_CACHE_DIR")
    try:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RequestError(
            f"TRITON_CACHE_DIR must name a folder that you may write to; found {folder!r}: {error.strerror}. Set another, or unset it"
        ) from None


def compile_launch(launch: Launch, chip: Chip) -> Resources:
    """Compile the kernel of a recorded launch for `chip`, with the types and divisibilities of its arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _signature(launch, hip=chip.vendor == "hip")
    source = ASTSource(launch.kernel, signature, constants, attributes)
    if chip.vendor == "hip":
        target = GPUTarget("hip", chip.name, 64 if chip.name.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", int(chip.name.removeprefix("sm_")), 32)
    options = compiler_options(launch.warps, launch.stages, launch.fusion, launch.pdl, chip)
    compiled = triton.compile(source, target=target, options=options)
    packed_loads = None
    if chip.vendor == "hip":
        registers, spills = (_amd_metadata(compiled.asm["amdgcn"], name) for name in ("vgpr_count", "private_segment_fixed_size"))
    else:
        registers, spills = _usage(compiled.asm["cubin"])
        packed = packed_parameters(launch)
        packed_loads = tuple(sorted({width for parameters, width in global_loads(compiled.asm["ptx"]) if parameters & packed}))
    return Resources(
        kernel=launch.kernel.__name__,
        chip=chip.name,
        constants=" ".join(f"{name}={value}" for name, value in launch.constants.items()),
        warps=launch.warps,
        stages=launch.stages,
        shared_memory=compiled.metadata.shared,
        registers=registers,
        spills=spills,
        packed_loads=packed_loads,
        assembly=compiled.asm["ptx" if chip.vendor == "cuda" else "amdgcn"],
        cubin=compiled.asm["cubin"] if chip.vendor == "cuda" else b"",
        pdl=launch.pdl,
    )


def launch_key(launch: Launch) -> tuple[Any, ...]:
    """A key that is equal for launches that Triton compiles to the same code."""
    signature, constants, attributes = _signature(launch, hip=False)
    options = launch.warps, launch.stages, launch.fusion
    return launch.kernel.__name__, str(signature), str(constants), str(attributes), options


def packed_parameters(launch: Launch) -> frozenset[int]:
    """Indices of the compiled kernel's parameters, constants not counted, that point to packed codes of weights, keys or values.

    Codes are 8-bit tensors, or words of 32 bits in trellis formats. Zero-points are 8-bit tensors too, and lists of experts and slots
    have 32 bits, but both are small beside the codes.
    """
    signature, _, _ = _signature(launch, hip=False)
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    sizes = {
        index: values[name].nbytes
        for index, name in enumerate(names)
        if isinstance(values[name], torch.Tensor)
        and (values[name].dtype in (torch.uint8, torch.int8) or (values[name].dtype == torch.int32 and values[name].nbytes >= _LEAST_WORDS))
    }
    return frozenset(index for index, size in sizes.items() if 16 * size > max(sizes.values()))


_PARAMETER = re.compile(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]")
_ADDRESS = re.compile(r"^(?:@!?%p\d+ )?(?!ld|st|atom|red|cp)[a-z][\w.]*\s+(%rd\d+), (.*);")
_LOAD = re.compile(r"\bld\.([\w:.]+)\s[^\[]*\[\s*(%rd\d+)")
_TO_SHARED = re.compile(r"\bst\.shared\S*\s+\[[^\]]*\],\s*(.*%rd.*);")
_FROM_SHARED = re.compile(r"\bld\.shared\S*\s+(.*%rd[^\[]*), \[")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared(?:::cta)?\.global\S*\s+\[[^\]]*\], \[\s*(%rd\d+)[^\]]*\], (0x[\da-f]+|\d+)")


def global_loads(ptx: str) -> list[tuple[frozenset[int], int]]:
    """(parameters that the address may be computed from, bytes per thread) of every load from global memory in `ptx`.

    Addresses are traced through arithmetic on 64-bit registers and through shared memory, in any order of lines, until a fixed point.
    The set is empty if no parameter reaches an address. All addresses that pass through shared memory share their parameters.
    """
    origins: dict[str, set[int]] = {}
    steps: list[tuple[str, list[str]]] = []
    loads: list[tuple[str, int]] = []
    for line in map(str.strip, ptx.splitlines()):
        if match := _PARAMETER.search(line):
            origins.setdefault(match[1], set()).add(int(match[2]))
        elif (match := _LOAD.search(line)) and "global" in (kind := match[1].split(".")):
            vector = next((int(part[1:]) for part in kind if re.fullmatch("v[248]", part)), 1)
            loads.append((match[2], vector * int(kind[-1][1:]) // 8))
        elif match := _COPY.search(line):
            loads.append((match[1], int(match[2], 0)))
        elif match := _TO_SHARED.search(line):
            steps.append(("shared", re.findall(r"%rd\d+", match[1])))
        elif match := _FROM_SHARED.search(line):
            steps += [(register, ["shared"]) for register in re.findall(r"%rd\d+", match[1])]
        elif match := _ADDRESS.match(line):
            steps.append((match[1], re.findall(r"%rd\d+", match[2])))
    changed = True
    while changed:
        changed = False
        for target, sources in steps:
            known = origins.setdefault(target, set())
            before = len(known)
            for source in sources:
                known |= origins.get(source, set())
            changed |= len(known) > before
    return [(frozenset(origins.get(register, ())), width) for register, width in loads]


_PTX_ACCESS = re.compile(r"\b(ld\.(?:volatile\.|relaxed\.|acquire\.)?global|st\S*\.global|atom|red\.|cp\.async\.c|bra|ret;)")
_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_SASS_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG|LD|ST|ATOM|ATOMG|RED|REDG|EXIT|RET|CALL|BRX)\b")
_BRANCH_TARGET = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")


def early_accesses(ptx: str, sass: str, *, pdl: bool) -> list[str]:
    """Instructions before the wait of a kernel with PDL that load, store or add in global memory, end the program or pass by the wait.

    In the PTX no branch may come before the wait. ptxas makes a loop of prefetches, which is a branch backward. A kernel without PDL must
    have none of these instructions; the result then has those that it has.
    """
    if not pdl:
        return re.findall(r"griddepcontrol\.\w+|\bACQBULK\b|\bPREEXIT\b", ptx + sass)
    head, wait, _ = ptx.partition("griddepcontrol.wait")
    if not wait:
        return ["no griddepcontrol.wait"]
    early = [line.strip() for line in head.splitlines() if _PTX_ACCESS.search(line) and not line.lstrip().startswith("//")]
    for match in _SASS_LINE.finditer(sass):
        address, text = int(match[1], 16), match[2].strip()
        if "ACQBULK" in text:
            return early
        branch = _BRANCH_TARGET.search(text)
        if _SASS_ACCESS.search(text) or ("BRA" in text and not (branch and int(branch[1], 16) < address)):
            early.append(text)
    return [*early, "no ACQBULK"]


def _signature(launch: Launch, *, hip: bool) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and divisibilities of the arguments, as Triton itself specializes a call."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    parameters = {parameter.name: parameter for parameter in launch.kernel.params}
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    for index, name in enumerate(launch.kernel.arg_names):
        value, specialized = values[name], not parameters[name].do_not_specialize
        if parameters[name].is_constexpr or (specialized and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
            if hip and value.untyped_storage().nbytes() < 1 << 31:  # the reach of AMD's buffer loads
                attributes.setdefault((index,), []).append(["tt.pointer_range", 32])
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if specialized and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _amd_metadata(assembly: str, name: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", assembly)
    assert match, name
    return int(match[1])


@cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _listing(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            return subprocess.run([_cuobjdump(), option, file.name], capture_output=True, text=True, check=True).stdout
        except FileNotFoundError:
            raise UnsupportedError(
                f"machine code is read by cuobjdump, which Triton's wheels of Linux have; there is none at {_cuobjdump()}. Install Triton "
                "from PyPI"
            ) from None


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory, which include the stack that spills take) of the only kernel in `cubin`."""
    text = _listing(cubin, "-res-usage")
    match = re.search(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)", text)
    assert match, text
    return int(match[1]), int(match[2]) + int(match[3])

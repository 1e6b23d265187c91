"""Instructions of the main loop of each decoding kernel on NVIDIA, counted in its machine code without a GPU.

`python -m dbrx_q.eval.bench.instruction_counts` prints the table of docs/kernels.md.
"""

from __future__ import annotations

import re
from collections import Counter

import torch

from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.triton.launch import CHIPS, Launch, recording

from .kernel_resources import compile_launch
from .kernel_shapes import DBRX, empty_weight

__all__ = ["loop_instructions", "main", "per_weight"]

_FORMATS = ("int4:64", "trellis2", "trellis3", "trellis4")
_CHIPS = ("sm_86", "sm_89", "sm_90")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_KINDS = {
    "logic": ("LOP3", "PRMT", "SHF", "SEL", "LEA", "IADD3", "IADD", "ISETP", "VIADD"),
    "moves and FMA": ("IMAD", "MOV", "FFMA", "HFMA2", "FMUL", "FADD"),
    "memory": ("LDG", "LDS", "LDSM", "STS", "LDGSTS", "SHFL"),
    "matrix": ("HMMA", "HGMMA"),
}


def loop_instructions(sass: str) -> Counter[str]:
    """The instructions by name between the ends of the longest backward branch of a kernel's listing."""
    instructions = [(int(match[1], 16), match[2].strip()) for match in _INSTRUCTION.finditer(sass)]
    longest: list[str] = []
    for address, text in instructions:
        match = _BRANCH.search(text)
        if match and int(match[1], 16) < address:
            body = [text for place, text in instructions if int(match[1], 16) <= place <= address]
            longest = max(longest, body, key=len)
    return Counter(re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0] for text in longest)


def per_weight(launch: Launch, counts: Counter[str], matrices: int) -> dict[str, float]:
    """Instructions of a thread for each weight that it multiplies, of all kinds and by kind.

    Args:
        launch: a product with a weight.
        counts: of its main loop.
        matrices: weights that the loop reads, each a tile of BN rows and BK inputs.
    """
    weights = launch.constants["BN"] * launch.constants["BK"] * matrices / (32 * launch.warps)
    kinds = {kind: sum(counts[name] for name in names) / weights for kind, names in _KINDS.items()}
    return {"all": counts.total() / weights, **kinds}


def main() -> None:
    """Print the table for one token at DBRX's dimensions."""
    print(f"| format | kernel | chip | {' | '.join(('all', *_KINDS))} | per 16 packed bytes |")
    print("|---" * (len(_KINDS) + 5) + "|")
    for spelled in _FORMATS:
        fmt = TensorFormat.parse(spelled)
        for name in _CHIPS:
            for launch in _decode_launches(fmt, name):
                compiled = compile_launch(launch, CHIPS[name])
                both = launch.kernel.__name__.startswith("gate_up") and fmt.record.trellis is None
                shares = per_weight(launch, loop_instructions(compiled.sass), 2 if both else 1)
                cells = [f"{share:.2f}" for share in shares.values()] + [f"{shares['all'] * 128 / fmt.record.bits:.0f}"]
                print(f"| {spelled} | {launch.kernel.__name__.removesuffix('_kernel')} | {name} | {' | '.join(cells)} |", flush=True)


def _decode_launches(fmt: TensorFormat, chip: str) -> list[Launch]:
    E, A, D, F = DBRX.experts, DBRX.active, DBRX.width, DBRX.hidden
    layer = ExpertWeights(empty_weight(fmt, E, F, D), empty_weight(fmt, E, F, D), empty_weight(fmt, E, D, F))
    x, experts = torch.empty(1, D, dtype=torch.bfloat16, device="meta"), torch.empty(1, A, dtype=torch.int64, device="meta")
    with recording(CHIPS[chip]) as launches:
        moe_experts(x, experts, torch.empty(1, A, device="meta"), layer, backend=Backend.TRITON)
    return [launch for launch in launches if launch.kernel.__name__ != "rotate_kernel"]


if __name__ == "__main__":
    main()

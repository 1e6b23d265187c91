"""What NVIDIA's chips can do in a clock and a second: the data of the static roofline, in one table.

Sources: limits of a multiprocessor, "Technical Specifications per Compute Capability", and rates, "Throughput of Native Arithmetic
Instructions", both in the CUDA C++ Programming Guide; multiprocessors, boost clocks, L2 and dense bfloat16 rates, from which the products
of a multiprocessor and clock follow, NVIDIA's whitepapers on A100, GA102, Ada, H100 and RTX Blackwell. The clock of the H200 is assumed:
4 % below the 1.83 GHz at which the whitepaper states 989 TFLOP/s. Copy bandwidth was measured on an H200; for the others it is assumed:
about 90 % of the nominal 2.04, 0.94, 1.01 and 1.79 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from .sass import Instruction, Pipe, pipe_of

__all__ = ["GPUS", "GpuSpecs"]


@dataclass(frozen=True)
class GpuSpecs:
    """A GPU of one chip."""

    chip: str
    """Such as "sm_90"."""
    product: str
    """The card that clock and bandwidth belong to."""
    multiprocessors: int
    """Of the product."""
    clock: float
    """Clocks a second under load."""
    copy_bandwidth: float
    """Bytes a second that DRAM delivers to a copy, reads and writes together."""
    l2: int
    """Bytes of the L2 cache."""
    warps: int
    """Most resident warps of a multiprocessor."""
    blocks: int
    """Most resident programs of a multiprocessor."""
    shared_memory: int
    """Bytes of shared memory that the programs of a multiprocessor have together."""
    fma_rate: float
    """float32 warp instructions of a multiprocessor and clock."""
    bf16_fma_rate: float
    """The same of packed bfloat16; an A100 has twice that of float16."""
    mma_rate: int
    """bfloat16 products with float32 sums of a multiprocessor and clock, by instructions of one warp (HMMA)."""
    warpgroup_mma_rate: int
    """The same by warpgroup instructions (HGMMA), which only sm_90 has; elsewhere `mma_rate`."""

    @property
    def matmul_rate(self) -> float:
        """Floating-point operations a second of the tensor cores at `clock`, a product and a sum being two."""
        return 2.0 * self.warpgroup_mma_rate * self.multiprocessors * self.clock

    def fma_clocks(self, instruction: Instruction) -> float:
        """Clocks for which one warp's instruction occupies the FMA pipes of a multiprocessor; 0 for other pipes.

        Integer products and, on chips other than sm_80 and sm_90, packed 16-bit arithmetic run on half of the lanes. All count as if they
        were on one pipe, so that the other half is idle meanwhile.
        """
        if pipe_of(instruction) is not Pipe.FMA:
            return 0.0
        if instruction.name in _INTEGER_PRODUCTS:
            return 1 / _INTEGER_PRODUCT_RATE
        return 1 / (self.bf16_fma_rate if instruction.name in _PACKED else self.fma_rate)

    def mma_rate_of(self, instruction: Instruction) -> int:
        """`warpgroup_mma_rate` or `mma_rate`."""
        return self.warpgroup_mma_rate if "GMMA" in instruction.name else self.mma_rate


_INTEGER_PRODUCTS, _PACKED = ("IDP", "IDP4A", "IMAD", "IMUL"), ("HADD2", "HFMA2", "HMUL2")
_INTEGER_PRODUCT_RATE = 2.0  # warp instructions of a multiprocessor and clock, on every chip
_KB, _MB = 1024, 1024 * 1024
GPUS = {
    gpu.chip: gpu
    for gpu in (
        GpuSpecs("sm_80", "A100 80 GB", 108, 1.41e9, 1.80e12, 40 * _MB, 64, 32, 164 * _KB, 2, 2, 1024, 1024),
        GpuSpecs("sm_86", "RTX 3090", 82, 1.695e9, 0.86e12, 6 * _MB, 48, 16, 100 * _KB, 4, 2, 256, 256),
        GpuSpecs("sm_89", "RTX 4090", 128, 2.52e9, 0.93e12, 72 * _MB, 48, 24, 100 * _KB, 4, 2, 256, 256),
        # Instructions of one warp reach about 62 % of the rate of a warpgroup's (Luo et al. 2024, Benchmarking and Dissecting Hopper).
        GpuSpecs("sm_90", "H200", 132, 1.755e9, 4.30e12, 50 * _MB, 64, 32, 228 * _KB, 4, 4, 1270, 2048),
        GpuSpecs("sm_120", "RTX 5090", 170, 2.41e9, 1.65e12, 96 * _MB, 48, 24, 100 * _KB, 4, 2, 256, 256),
    )
}
"""By chip; multiprocessors are those of `kernels/triton/launch.py::CHIPS`."""

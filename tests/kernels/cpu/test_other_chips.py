"""The CPU kernels compiled for a chip without AVX-512: the same tests, in a separate process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL_TESTS = Path(__file__).parents[1]
AVX2 = "+avx,+avx2,+f16c,+fma,+bmi,+bmi2,+sse4.2,+popcnt"


# A product of each kind of weights, and attention; the others take a minute to compile.
SOME = "T1-N33-K1152-int4-64 or T1-N33-K1152-int8-64 or 640-int4-32-packed or int8-bfloat16-DBRX or 128-trellis2-fast"
MANY = "T1-N33 or T7-N100 or T300 or identity or batch or T5 or T64 or int8-bfloat16-DBRX or int4-bfloat16-DBRX or trellis2-fast"
EXACT = "same_bits or exact or streams or feedback"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names chips of another architecture")
@pytest.mark.parametrize("cases", [pytest.param(SOME, id="some"), pytest.param(f"{MANY} or {EXACT}", id="many", marks=pytest.mark.long)])
def test_kernels_for_a_chip_with_avx2_only(cases: str, tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2, "NUMBA_CACHE_DIR": str(tmp_path)}
    check = "from dbrx_q.kernels.cpu import amx, vector; assert not vector.has_bfloat16(); assert not amx.available()"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    pytest_script = Path(sys.executable).parent / "pytest"
    # Of the trellis codes those of 10 bits with 64 and 256 levels, of int2 and int3 the first: the others are the same code with other
    # constants, which takes a minute to compile.
    one_of_a_kind = "not trellis3 and not (trellis2 and not fast) and not (trellis4 and not fast) and not int3-32 and not plain-bfloat16"
    selection = f"({cases}) and {one_of_a_kind}"
    command = [
        str(pytest_script),
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        selection,
        *(
            str(KERNEL_TESTS / name)
            for name in (
                "test_linear.py",
                "test_moe.py",
                "cpu/test_attention.py",
                "cpu/test_integer.py",
                "cpu/test_trellis.py",
                "test_trellis.py",
            )
        ),
    ]
    run = subprocess.run(command, env=environment, cwd=KERNEL_TESTS.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout

"""The kernel benchmark, the sweep of tiles and the table of resources: the parts that run without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dbrx_q.errors import RequestError
from dbrx_q.eval.bench.device_timing import Environment
from dbrx_q.eval.bench.kernel_report import BEGIN, END, ResourceRow, document, problems, write_report
from dbrx_q.eval.bench.kernel_resources import Resources, global_loads
from dbrx_q.eval.bench.kernel_shapes import DBRX, empty_weight
from dbrx_q.eval.bench.kernels import KernelBenchmark, KernelTiming, markdown
from dbrx_q.eval.bench.tune import Failure, dbrx_problems, sweep
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.triton.launch import CHIPS
from dbrx_q.kernels.triton.tiles import Problem, Tiles, candidates

CHIP = CHIPS["sm_90"]
PROBLEM = Problem("linear", 1, 8192, 6144, 4, 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the refusal on a machine without a GPU")
@pytest.mark.parametrize("command", ["kernels", "tune"])
def test_the_commands_refuse_to_run_without_a_gpu(command: str, cli: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> None:
    outcome = cli("bench", command)
    assert outcome.code == 2  # type: ignore[attr-defined] # the Outcome of tests/conftest.py
    assert "must run on a GPU" in outcome.err  # type: ignore[attr-defined] # the same
    assert "Use a machine" in outcome.err  # type: ignore[attr-defined] # the same


def row(**changes: object) -> KernelTiming:
    timing = KernelTiming(
        kernel="linear",
        case="Wqkv, int4:64, 1 token",
        seconds=9.7e-6,
        ceiling="copy bandwidth",
        share=0.76,
        target=0.75,
        rival=None,
        met=True,
        peers={"torch._weight_int4pack_mm": 1.2e-5},
        eager=("torch._weight_int4pack_mm",),
        failed={},
    )
    return replace(timing, **changes)  # type: ignore[arg-type] # fields of KernelTiming


def test_results_as_markdown_and_json() -> None:
    environment = Environment("2026-11-22T10:00:00+00:00", "NVIDIA H200", "sm_90", 132, 1, {"torch": "2.13.0"})
    failed = row(seconds=None, share=None, met=False, peers={}, eager=(), failed={"dbrx_q": "RuntimeError: no"})
    result = KernelBenchmark(environment, "dbrx-q bench kernels", 4.2e12, 7e14, (row(), failed))
    text = markdown(result)
    assert "| 9.7 us | 76.0% | copy bandwidth | 75% | yes | torch._weight_int4pack_mm 12.0 us (no graph) |" in text
    assert "copying 4200 GB/s" in text
    assert "700 TFLOP/s" in text
    assert "- linear, Wqkv, int4:64, 1 token: dbrx_q: RuntimeError: no" in text
    assert json.loads(json.dumps(result.as_json()))["rows"][0]["met"] is True


def test_a_sweep_keeps_the_fastest_tiles_and_reports_failures() -> None:
    offered = candidates(PROBLEM, CHIP)
    fastest, broken = offered[17], offered[18]

    def timer(problem: Problem, tiles: Tiles) -> float:
        assert problem == PROBLEM
        if tiles == broken:
            raise RuntimeError("out of resource")
        return 1.0 if tiles == fastest else 2.0

    [choice], failures = sweep([PROBLEM], CHIP, timer, thorough=True)
    assert (choice.tiles, choice.seconds, choice.default_seconds) == (fastest, 1.0, 2.0)
    assert choice.candidates == len(offered) - 1
    assert failures == [Failure(PROBLEM, broken, "RuntimeError: out of resource")]


def test_a_quick_sweep_finds_the_fastest_without_trying_every_combination() -> None:
    """Each field of the tiles has a best value of its own, so that changing one field at a time finds the best combination."""

    def timer(_: Problem, tiles: Tiles) -> float:
        return 4.0 - (tiles.rows == 16) - (tiles.stages == 5) - (tiles.splits == 2)

    [choice], _ = sweep([PROBLEM], CHIP, timer)
    assert choice.seconds == 1.0
    assert choice.candidates < len(candidates(PROBLEM, CHIP)) / 2


def test_a_problem_whose_default_tiles_fail_is_skipped() -> None:
    def timer(problem: Problem, tiles: Tiles) -> float:
        if tiles == candidates(PROBLEM, CHIP)[0]:
            raise RuntimeError("no")
        return 1.0

    choices, failures = sweep([PROBLEM], CHIP, timer, thorough=True)
    assert choices == []
    assert len(failures) == 1


def test_every_product_of_dbrx_is_swept() -> None:
    swept = dbrx_problems(CHIP)
    assert len(set(swept)) == len(swept)
    assert {(problem.op, problem.N, problem.K) for problem in swept} == {
        ("linear", 8192, 6144),
        ("linear", 6144, 6144),
        ("linear", 100352, 6144),
        ("gate_up", 10752, 6144),
        ("down", 6144, 10752),
    }
    assert Problem("down", 8, 6144, 10752, 4, 64, 16, run_groups=1) in swept
    assert Problem("down", 4096 * 4, 6144, 10752, 4, 64, 16) in swept
    assert Problem("gate_up", 8, 10752, 6144, 2, 1, 16, 128) in swept
    assert Problem("linear", 8, 8192, 6144, 4, 64, run_groups=2) in swept
    assert Problem("linear", 8, 8192, 6144, 4, 64) in dbrx_problems(CHIPS["gfx1100"])
    assert DBRX.qkv == 8192


@pytest.mark.parametrize("fmt", [TensorFormat("int4", 128), TensorFormat("int8", 32), TensorFormat("nf4", 64)], ids=str)
def test_an_empty_weight_has_the_requested_shape(fmt: TensorFormat) -> None:
    assert empty_weight(fmt, 3, 24, 384).shape == (3, 24, 384)


PTX = """
	ld.param.b64 	%rd1, [a_kernel_param_0];
	ld.param.b64 	%rd2, [a_kernel_param_1];
	ld.param.b64 	%rd9, [a_kernel_param_3];
	mad.wide.s32 	%rd3, %r1, 2, %rd1;
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
	mov.b64 	%rd8, %rd4;
	add.s64 	%rd4, %rd2, %rd5;
	cp.async.cg.shared.global [ %r43 + 0 ], [ %rd8 + 0 ], 0x10, %r44;
	@!%p2 ld.global.L1::evict_first.b8 { %rs1 }, [ %rd4 + 0 ];
	ld.global.b64 	%rd6, [%rd1];
	add.s64 	%rd7, %rd9, %rd6;
	ld.global.L1::no_allocate.v2.b16 { %rs1, %rs2 }, [ %rd7 + 4 ];
	st.shared.v2.b64 	[ %r1 + 0 ], { %rd1, %rd12 };
	ld.shared.v2.b64 	{%rd10, %rd11}, [%r582];
	@%p47 ld.global.b32 { %r560 }, [ %rd11 + 0 ];
	ld.global.b16 { %rs7 }, [ %rd13 + 0 ];
	atom.global.gpu.acq_rel.add.u32 %r5, [ %rd9 + 0 ], 1;
"""


def test_loads_are_traced_to_the_parameter_that_they_read() -> None:
    expected = [({0}, 16), ({1}, 16), ({1}, 1), ({0}, 8), ({3}, 4), ({0}, 4), (set(), 2)]
    assert global_loads(PTX) == expected


def compiled(**changes: object) -> Resources:
    resources = Resources("linear_kernel", "sm_86", "", 4, 3, 1024, 100, 0, (16,), "", b"")
    return replace(resources, **changes)  # type: ignore[arg-type] # fields of Resources


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"packed_loads": None}, None),
        ({"packed_loads": ()}, None),
        ({"shared_memory": 99 * 1024 + 1}, "shared memory"),
        ({"spills": 8}, "8 bytes of local memory"),
        ({"packed_loads": (8, 16)}, "not 16"),
    ],
    ids=str,
)
def test_resource_limits_of_a_kernel(changes: dict[str, object], message: str | None) -> None:
    messages = problems(ResourceRow("case", compiled(**changes)), CHIPS["sm_86"])
    assert messages == [] if message is None else message in messages[0]


def test_the_table_replaces_only_the_lines_between_its_markers(tmp_path: Path) -> None:
    rows = [ResourceRow("Wqkv", compiled()), ResourceRow("Wqkv", compiled(chip="gfx1100", registers=200))]
    path = tmp_path / "kernels.md"
    path.write_text(f"by hand\n{BEGIN}\nold\n{END}\nby hand too\n", encoding="utf-8")
    for _ in range(2):
        write_report(path, document(rows))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "| linear_kernel | Wqkv | 100 / 1.0 / 0 | 200 / 1.0 / 0 |" in lines
    assert (lines[0], lines[-1]) == ("by hand", "by hand too")
    assert "old" not in lines
    assert all(len(line) <= 120 for line in lines if not line.startswith("|"))
    path.write_text("by hand", encoding="utf-8")
    with pytest.raises(RequestError, match="must hold the lines"):
        write_report(path, "")


def test_launches_are_recorded_where_the_command_line_defers_parts_of_torch() -> None:
    """Prefill sorts on tensors without memory, for which torch has Python code that the command line loads only on demand."""
    script = (
        "from dbrx_q.deferred_torch import defer\ndefer()\nimport torch\nimport dbrx_q.eval.bench.kernel_shapes\n"
        "torch.searchsorted(torch.empty(4, device='meta'), torch.empty(3, device='meta'), out_int32=True)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

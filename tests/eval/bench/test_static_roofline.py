"""Bounds of a launch whose code was counted by hand, the work of DBRX's launches, and the table of `dbrx-q bench static`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dbrx_q.errors import DbrxError, RequestError
from dbrx_q.eval.bench.gpu_specs import GPUS
from dbrx_q.eval.bench.launch_work import LaunchWork, work_of
from dbrx_q.eval.bench.static_cases import record, static_cases
from dbrx_q.eval.bench.static_comparison import comparison
from dbrx_q.eval.bench.static_report import BEGIN, END, StaticRow, as_json, matching_cases, table, write_report
from dbrx_q.eval.bench.static_roofline import DRAM_LATENCY, FIXED_SECONDS, SUSTAINED_ISSUE, Code, LaunchCost, cost_of
from dbrx_q.kernels.triton.launch import Launch

# Two warps; a step of the loop has 8 instructions: 3 ALU, 1 FMA, 2 memory, 1 MMA, 1 other. Outside stand 2: 1 ALU and EXIT.
LOOP = ("LDS.128 R4, [R2]", "LOP3.LUT R4, R4, 0xf", "PRMT R5, R4, R4, R4", "HFMA2.BF16_V2 R5, R5, R5, R5", "LDGSTS.E.128 [R1], [R2]")
LINES = ("MOV R1, R2", *LOOP, "HMMA.16816.F32.BF16 R8, R4, R6, R8", "ISETP.GE.AND P0, PT, R1, R2, PT", "@P0 BRA 0x10", "EXIT")
LISTING = "\n".join(f"/*{16 * number:04x}*/ {line} ;" for number, line in enumerate(LINES))
LAUNCH = Launch(SimpleNamespace(__name__="product_kernel"), (264,), (), {}, warps=2, stages=4)
WORK = LaunchWork(programs=200, iterations=(48.0,), packed_bytes=(4096,), dram_bytes=1e6, operations=2e9)
CODE = Code(LISTING, registers=128, shared_memory=18560)


def test_the_bounds_of_a_launch_counted_by_hand() -> None:
    cost = cost_of(LAUNCH, WORK, CODE, GPUS["sm_90"])
    [loop] = cost.loops
    assert {name: loop[name] for name in ("total", "alu", "fma", "memory", "mma", "uniform", "other")} == {
        "total": 8,
        "alu": 3,
        "fma": 1,
        "memory": 2,
        "mma": 1,
        "uniform": 0,
        "other": 1,
    }
    # 4,096 bytes of a program of 64 threads are 4 pieces of 16 bytes a thread.
    assert cost.per_16_bytes["total"] == 2.0
    assert (cost.resident, cost.limit) == (8, "registers")
    assert cost.waves == pytest.approx(200 / (8 * 132))
    assert cost.in_flight == 2 * 3 * 4096  # of 8 resident programs there are 2
    # The busiest multiprocessor has 2 programs of 2 warps.
    clock = 1.755e9
    total, alu, bf16 = 48 * 8 + 2, 48 * 3 + 1, 48
    assert cost.bounds["issue"] == pytest.approx(2 * 2 * total / 4 / SUSTAINED_ISSUE / clock)
    assert cost.bounds["ALU"] == pytest.approx(2 * 2 * alu / 2 / clock)
    assert cost.bounds["FMA"] == pytest.approx(2 * 2 * bf16 / 4 / clock)
    assert cost.bounds["MMA"] == pytest.approx(2 * 2 * 48 * 2048 / 1270 / clock)
    assert cost.bounds["DRAM"] == pytest.approx(1e6 / (2 * 3 * 4096 * 132 / DRAM_LATENCY))  # 4.1 TB/s, less than the copy bandwidth
    assert cost.bound == "issue"
    assert cost.seconds == pytest.approx(cost.bounds["issue"] + FIXED_SECONDS)
    assert cost.share == pytest.approx(1e6 / 4.3e12 / cost.seconds)


def test_ceilings_and_rates_follow_the_chip() -> None:
    hopper, ampere = GPUS["sm_90"], GPUS["sm_80"]
    assert cost_of(LAUNCH, WORK, CODE, hopper, decode=False).ideal == pytest.approx(2e9 / hopper.matmul_rate)
    float_cost = cost_of(LAUNCH, WORK, replace(CODE, listing=LISTING.replace("HFMA2.BF16_V2", "FFMA")), ampere)
    assert float_cost.bounds["FMA"] == pytest.approx(2 * 2 * 48 / 2 / ampere.clock)
    few_in_flight = cost_of(replace(LAUNCH, stages=2), replace(WORK, packed_bytes=(256,)), CODE, hopper)
    assert few_in_flight.bounds["DRAM"] == pytest.approx(1e6 / (2 * 256 * 132 / DRAM_LATENCY))


def test_a_loop_that_the_assembler_unrolled_has_fewer_iterations() -> None:
    twice = [*LINES[1:7], *LINES[1:8], "@P0 BRA 0x10"]
    listing = "\n".join(f"/*{16 * number:04x}*/ {line} ;" for number, line in enumerate(("MOV R1, R2", *twice, "EXIT")))
    cost = cost_of(LAUNCH, WORK, Code(listing, 128, 18560, products=1), GPUS["sm_90"])
    assert cost.loops[0]["iterations"] == WORK.iterations[0] / 2
    assert cost.bounds["MMA"] == pytest.approx(cost_of(LAUNCH, WORK, CODE, GPUS["sm_90"]).bounds["MMA"])
    assert cost.per_16_bytes["total"] == (2 * 6 + 2) / 8  # of 8 pieces of 16 bytes, the branch and its comparison once


def test_code_that_the_work_does_not_describe_is_refused() -> None:
    with pytest.raises(DbrxError, match=r"product_kernel must have 2 loops with matrix instructions.*found 1"):
        cost_of(LAUNCH, replace(WORK, iterations=(1.0, 2.0), packed_bytes=(1, 1)), CODE, GPUS["sm_90"])


def launches(name: str) -> list[Launch]:
    [case] = [case for case in static_cases(everything=True) if case.name == name]
    return [launch for launch, _ in record(case, "sm_90")]


def test_the_work_of_experts_in_decode() -> None:
    gate_up, down = (work_of(launch) for launch in launches("MoE int4:64, 1 token"))
    # Codes, bfloat16 scales and 4-bit zero-points of groups of 64: 0.5 + 2 / 64 + 0.5 / 64 bytes a weight, of 4 experts.
    matrix = 4 * 10752 * 6144 * (0.5 + 2.5 / 64)
    assert gate_up.dram_bytes == pytest.approx(2 * matrix, rel=1e-3)
    assert down.dram_bytes == pytest.approx(matrix, rel=1e-3)
    assert gate_up.operations == 2 * down.operations == 2 * 2 * 4 * 10752 * 6144
    # All weights are read once, whatever the tiles are.
    for work, codes in ((gate_up, matrix), (down, matrix / 2)):
        read = work.programs * sum(times * packed for times, packed in zip(work.iterations, work.packed_bytes, strict=True))
        assert read == pytest.approx(4 * 10752 * 6144 * 0.5 * round(codes / (matrix / 2)), rel=1e-6)
    eight = work_of(launches("MoE int4:64, 8 tokens")[0])
    assert eight.dram_bytes / gate_up.dram_bytes == pytest.approx(16 * (1 - 0.75**8) / 4, rel=1e-3)  # 14.4 experts are expected


def test_the_work_of_attention() -> None:
    [decode] = (work_of(launch) for launch in launches("attention decode int8 KV, 32,768 tokens, batch 8"))
    assert decode.dram_bytes == 8 * 2 * 8 * 32768 * (128 + 2)
    assert decode.programs * decode.iterations[0] * decode.packed_bytes[0] == 8 * 2 * 8 * 32768 * 128
    [launch] = launches("attention prefill int8 KV, 2,048 tokens after 30,720")
    work = work_of(launch, new_tokens=2048)
    blocks, tiles = sum(work.iterations), 2048 / launch.constants["BM"]
    assert work.programs == 48 * tiles
    assert work.iterations[1] * launch.constants["BL"] == launch.constants["BM"]  # masked blocks are those of the tile's own tokens
    assert blocks * launch.constants["BL"] == 30720 + 2048 / 2 + launch.constants["BM"] / 2


def row() -> StaticRow:
    costs: tuple[tuple[LaunchCost, int], ...] = tuple((cost_of(LAUNCH, WORK, CODE, GPUS["sm_90"]), times) for times in (1, 40))
    return StaticRow("sm_90", "MoE int4:64, 1 token", "moe", True, costs)


def test_a_case_of_several_launches_is_summed() -> None:
    summed = row()
    cost = summed.launches[0][0]
    assert summed.seconds == pytest.approx(41 * cost.seconds)
    assert summed.share == pytest.approx(cost.share)
    lines = table([summed]).splitlines()
    assert lines[0] == "**sm_90, H200** (4.30 TB/s, 949 TFLOP/s)"
    assert "| product x 40 | 2 / 1 / 0 / 0 / 0 / 0 / 0 | 128 | 8 (registers) | 24 | 0.19, 1.32 |" in lines[5]
    assert f"| {cost.share:.0%}, {cost.steady_share:.0%} |" in lines[5]
    assert lines[6].startswith("| **MoE int4:64, 1 token** | all |")
    assert len({line.count("|") for line in lines[2:]}) == 1
    [record_of_row] = as_json([summed])["rows"]
    assert record_of_row["launches"][1]["times"] == 40


def test_a_step_has_operators_of_torch_beside() -> None:
    [step] = matching_cases(["step"])
    alone, beside = row(), replace(row(), torch_operators=step.torch_operators)
    assert step.torch_operators > 0
    for name in ("seconds", "simulated"):
        assert getattr(beside, name) - getattr(alone, name) == pytest.approx(step.torch_operators * FIXED_SECONDS)


def test_cases_are_chosen_by_op_or_by_a_part_of_their_names() -> None:
    assert {case.op for case in matching_cases(["moe"])} == {"moe"}
    assert [case.name for case in matching_cases(["out_proj int8"])] == ["out_proj int8:64, 1 token"]
    assert len(matching_cases([], everything=True)) > len(matching_cases([]))
    with pytest.raises(RequestError, match=r"must be one of moe, linear, attention, small, step, or a part .* found 'softmax'"):
        matching_cases(["softmax"])


def test_the_command_refuses_what_it_cannot_do(cli: Callable[..., Any], tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("no place for a table\n", encoding="utf-8")
    for arguments, message in (
        (("--chip", "gfx1100"), "--chip must be one of sm_80"),
        (("--case", "softmax"), "--case must be one of"),
        (("--processes", "0"), "--processes must be at least 1"),
        (("--out", str(document)), "must"),
    ):
        outcome = cli("bench", "static", *arguments)
        assert outcome.code == 2
        assert message in outcome.err


def test_the_table_replaces_that_of_a_document(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_report(document, table([row()]))
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


def test_two_states_are_compared_by_version_of_triton() -> None:
    shorter = replace(CODE, listing=LISTING.replace("/*0030*/ PRMT R5, R4, R4, R4 ;\n", ""))
    reports, work = [], replace(WORK, iterations=(4800.0,), dram_bytes=1e8)
    for code in (CODE, shorter):
        costs = ((cost_of(LAUNCH, work, code, GPUS["sm_90"]), 1),)
        reports.append(as_json([StaticRow("sm_90", "MoE int4:64, 1 token", "moe", True, costs)]))
    lines = comparison([reports[0] | {"triton": "0.1"}, reports[0]], reports[1:]).splitlines()
    before, after = (round(100 * report["rows"][0]["share"]) for report in reports)
    simulated = [round(100 * row["ideal"] / row["simulated"]) for report in reports for row in report["rows"]]
    assert after > before
    assert f"| MoE int4:64, 1 token | {before} → {after} % ({simulated[0]} → {simulated[1]} %) |" in lines
    assert lines[-1].startswith("| MoE int4:64, 1 token | product | 2 → 2 | 1 → 0 |")
    with pytest.raises(RequestError, match=r"must have a version of Triton in common; found 0.1 and"):
        comparison([reports[0] | {"triton": "0.1"}], reports[1:])


@pytest.mark.parametrize("name", ["Wqkv int4:64, 1 token", "out_proj int8:64, 1 token", "lm_head int8:64, 1 token"])
def test_a_linear_reads_each_weight_once(name: str) -> None:
    [launch] = launches(name)
    work = work_of(launch)
    weights = launch.arguments[launch.kernel.arg_names.index("q")]
    assert work.programs * work.iterations[0] * work.packed_bytes[0] == pytest.approx(weights.nbytes, rel=0.01)

"""`dbrx-q bench PATH`: its rows, their figures, and the files of a report. No test depends on a measured speed."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import safetensors.torch
import torch

from dbrx_q.checkpoint.manifest import MANIFEST_NAME, sha256_of
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.eval.bench import ceilings
from dbrx_q.eval.bench import model as benchmark
from dbrx_q.eval.bench.ceilings import ModelWork, Need, Rates, ceiling, decode_need, prefill_need, touched_experts
from dbrx_q.eval.bench.model import ModelBenchmark, SpeedTest, bench_model, speed_tests
from dbrx_q.eval.bench.report import markdown
from dbrx_q.generation.decoding import decoder_for
from dbrx_q.model.modeling import DbrxForCausalLM, DbrxModel
from dbrx_q.sources.folder import ConvertedFolder
from dbrx_q.sources.open import open_source
from dbrx_q.sources.streamed import ConvertedSource, resident_bytes

CPU = torch.device("cpu")
SIZES = ("-p", "4", "-n", "3", "-b", "1,2", "-d", "0", "-d", "5", "-r", "2")
NAMES = ["pp4", "tg3", "pp4 b2", "tg3 b2", "pp4 @ d5", "tg3 @ d5", "pp4 b2 @ d5", "tg3 b2 @ d5"]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure ceilings with small buffers; no test depends on the rates. Module-scoped fixtures use the buffers that users have."""
    monkeypatch.setattr(ceilings, "_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "_MATMUL_ON_CPU", 64)


def stored_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for shard in folder.glob("*.safetensors") for tensor in safetensors.torch.load_file(shard).values())


# Bytes and operations of a token, computed by hand


WORK = ModelWork(
    DbrxConfig(
        d_model=8,
        n_heads=2,
        n_layers=2,
        vocab_size=4,
        attn_config={"kv_n_heads": 1},
        ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 16, "moe_top_k": 4},
    ),
    nbytes={"experts": 1600, "attention": 100, "embedding": 999, "head": 50, "router": 10, "norms": 6},
    parameters={"experts": 800, "attention": 50, "embedding": 400, "head": 25, "router": 5, "norms": 3},
    kv_bytes=20,
)


def test_bytes_and_operations_of_a_decoded_token() -> None:
    # 166 bytes of other weights, 4 of 16 experts, 2 tokens of keys and values in the mean of 1, 2 and 3.
    # Two operations for each of 50 + 5 + 200 + 25 parameters; 4 for each of 2 layers, 2 heads and 4 channels and token seen.
    assert decode_need(WORK, batch=1, depth=0, tokens=3) == Need(166 + 400 + 40, 560 + 64 * 2)
    # Two sequences touch 16 (1 - (3/4)^2) = 7 experts, and have 12 tokens each.
    assert decode_need(WORK, batch=2, depth=10, tokens=3) == Need((166 + 700 + 2 * 240) / 2, 560 + 64 * 12)


def test_bytes_and_operations_of_a_prompt_token() -> None:
    # The weights once for both tokens, 12 tokens of keys and values; the head for one of two; 11 and 12 tokens seen.
    assert prefill_need(WORK, batch=1, depth=10, tokens=2) == Need((166 + 700 + 240) / 2, 2 * (255 + 12.5) + 64 * 11.5)


@pytest.mark.parametrize(
    ("need", "expected"),
    [(Need(600, 700), (10.0, "bandwidth")), (Need(600, 7e6), (2.0, "matmul"))],
    ids=["reads longer", "computes longer"],
)
def test_the_slower_of_reading_and_computing_is_the_ceiling(need: Need, expected: tuple[float, str]) -> None:
    assert ceiling(need, Rates(bandwidth=6000, matmul=14e6)) == expected


@pytest.mark.parametrize(("experts", "active", "tokens"), [(4, 2, 2), (4, 1, 3), (5, 3, 2), (4, 4, 3)])
def test_touched_experts_over_all_choices(experts: int, active: int, tokens: int) -> None:
    choices = list(itertools.combinations(range(experts), active))
    mean = statistics.fmean(len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=tokens))
    assert touched_experts(experts, active, tokens) == pytest.approx(mean)


@pytest.mark.parametrize(("kv_format", "kv_bytes"), [("plain", 4 * 2 * 2 * 32 * 2), ("int8", 4 * 2 * 2 * (32 + 2))])
def test_model_work_counts_the_bytes_in_memory(kv_format: str, kv_bytes: int, quantized_nano: Path) -> None:
    work = ModelWork.of(DbrxForCausalLM.from_pretrained(quantized_nano), kv_format)
    assert sum(work.nbytes.values()) == stored_bytes(quantized_nano)
    assert work.nbytes["embedding"] == 4096 * 128 * (1 + 2 / 64)  # int8 with a float16 scale for 64
    assert work.parameters["experts"] == 4 * 16 * 3 * 128 * 256
    assert work.kv_bytes == kv_bytes


# Tokens that run


def test_names_are_those_of_llama_bench() -> None:
    assert [test.name for test in speed_tests([4, 0], [3], [1, 2], [0, 5])] == NAMES


@pytest.mark.parametrize(
    ("test", "steps"),
    [(SpeedTest("pp", 4, 2, 5), [5, 5, 4, 4]), (SpeedTest("tg", 3, 2, 5), [5, 5] + [1] * 6), (SpeedTest("tg", 3), [1] * 3)],
    ids=lambda value: value.name if isinstance(value, SpeedTest) else "",
)
def test_a_row_runs_the_tokens_of_its_name(test: SpeedTest, steps: list[int], small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step_sizes: list[int] = []
    run = DbrxModel._run_blocks

    def counted(self: DbrxModel, x: torch.Tensor, *arguments: Any) -> Any:
        step_sizes.append(len(x))
        return run(self, x, *arguments)

    monkeypatch.setattr(DbrxModel, "_run_blocks", counted)
    bench_model(open_source(small), [test], device=CPU, repeats=2)
    first_token = [4] * 3 if test.kind == "pp" else []
    assert step_sizes == steps * 3 + first_token  # one uncounted run and two counted ones


def test_a_prompt_continues_from_cached_tokens(small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(small, dtype=torch.float32)
    prompt = list(range(20))
    with decoder_for(model, [20, 20], "plain") as decoder:
        expected = decoder.prefill(0, prompt)
        decoder.prefill(1, prompt[:13])
        torch.testing.assert_close(decoder.prefill(1, prompt[13:]), expected)


# Results and reports


@pytest.fixture(scope="module")
def written(quantized_small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelBenchmark, Path]:
    """The result of one command, read from its bench.json, and the folder."""
    from dbrx_q.cli import run

    folder = tmp_path_factory.mktemp("bench") / "new" / "results"
    assert run(["bench", str(quantized_small), *SIZES, "--out", str(folder)]) == 0
    return ModelBenchmark.from_dict(json.loads((folder / "bench.json").read_text(encoding="utf-8"))), folder


def test_json_has_every_row_and_the_provenance(written: tuple[ModelBenchmark, Path], quantized_small: Path) -> None:
    result, folder = written
    assert json.loads((folder / "bench.json").read_text(encoding="utf-8")) == result.to_dict()
    assert [row.name for row in result.rows] == NAMES
    work = ModelWork.of(DbrxForCausalLM.from_pretrained(quantized_small), "plain")
    for row in result.rows:
        need = (prefill_need if row.kind == "pp" else decode_need)(work, batch=row.batch, depth=row.depth, tokens=row.tokens)
        assert (row.bytes_per_token, row.flops_per_token) == (need.nbytes, need.flops)
        assert len(row.samples) == 2
        assert min(row.samples) > 0
        assert (row.mean, row.median) == pytest.approx((sum(row.samples) / 2, sum(row.samples) / 2))
        assert row.stdev == pytest.approx(abs(row.samples[0] - row.samples[1]) / 2**0.5)
        allowed = {"bandwidth": row.bandwidth / need.nbytes, "matmul": row.matmul_rate / need.flops}
        assert row.ceiling == pytest.approx(min(allowed.values()))
        assert row.ceiling == pytest.approx(allowed[row.bound])
        assert row.of_ceiling == pytest.approx(row.median / row.ceiling)
        assert row.bytes_per_second == pytest.approx(row.median * need.nbytes)
    assert [(row.prompt_tokens, len(row.samples)) for row in result.first_token] == [(4, 2)]
    assert (result.complete, result.planned) == (True, len(NAMES) + 1)
    assert result.bytes == result.weight_bytes == stored_bytes(quantized_small)
    assert (result.format, result.device, result.dtype, result.kv) == ("int4:64 + int8:64", "cpu", "bfloat16", "plain")
    assert result.provenance["sha256"] == sha256_of(quantized_small / MANIFEST_NAME)
    assert {"command", "versions", "device", "threads"} <= result.provenance.keys()
    assert result.load_seconds > 0
    # The buffers that measure the ceilings take a GiB, which is not counted as memory of the model.
    assert result.loaded_memory["host"] <= result.load_peak_memory["host"] <= result.peak_memory["host"] < 1 << 30


def test_markdown_has_a_line_for_each_row(written: tuple[ModelBenchmark, Path]) -> None:
    result, folder = written
    text = (folder / "bench.md").read_text(encoding="utf-8")
    assert text == markdown(result)
    for name in NAMES:
        assert text.count(f"| {name} |") == 1
    assert "| 4 tokens |" in text
    assert "| host |" in text
    assert result.provenance["versions"]["torch"] in text
    assert "Interrupted" not in text


def test_the_plot_is_written_as_png_and_svg(written: tuple[ModelBenchmark, Path]) -> None:
    _, folder = written
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.parse(folder / "bench.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.md", "bench.png", "bench.svg"]


def test_a_gguf_file_is_measured_as_it_is_held_in_memory(nano_gguf: Path, cli: Callable[..., Any]) -> None:
    outcome = cli("bench", "model", nano_gguf, "-p", 0, "-n", 2, "-r", 1, "--json")
    assert outcome.code == 0, outcome.err
    result = ModelBenchmark.from_dict(json.loads(outcome.out))
    assert ([row.name for row in result.rows], result.first_token, result.rows[0].stdev) == (["tg2"], [], 0.0)
    assert result.format.startswith("GGUF")
    source = open_source(nano_gguf)
    assert isinstance(source, ConvertedSource)
    packed = resident_bytes(source.config, torch.float32, stream=False, formats=source.formats)
    assert result.weight_bytes == packed < 4 * result.parameters


@pytest.fixture
def nano_gguf() -> Path:
    return next((Path(__file__).parents[2] / "data" / "dbrx-nano-gguf").glob("*.gguf"))


# Interruptions and refused requests


def test_an_interruption_keeps_the_finished_rows(
    small: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, row = [], benchmark._row

    def interrupted(*arguments: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(row(*arguments))
        return measured[-1]

    monkeypatch.setattr(benchmark, "_row", interrupted)
    outcome = cli("bench", small, "-p", "4,5", "-n", 3, "-r", 1, "--json", "--out", tmp_path)
    assert outcome.code == 2
    assert "interrupted after 2 of 5 rows" in outcome.err
    result = ModelBenchmark.from_dict(json.loads(outcome.out))
    assert (result.complete, result.rows, result.first_token) == (False, measured, [])
    assert "**Interrupted: 2 of 5 rows were finished.**" in (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "bench.json").read_text(encoding="utf-8")) == result.to_dict()


def test_an_interruption_before_the_first_row_is_raised(small: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_model(open_source(small), [SpeedTest("pp", 4)], device=CPU, repeats=1, report=stop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "9" * 5000], "--n-prompt must be whole numbers of at least 0, as 512 or 128,512; found '999"),
        (["-p", "many"], "--n-prompt must be whole numbers of at least 0, as 512 or 128,512; found 'many'"),
        (["-n", "8,-1"], "--n-gen must be whole numbers of at least 0, as 512 or 128,512; found '-1'"),
        (["-b", "0"], "--batch must be whole numbers of at least 1, as 512 or 128,512; found '0'"),
        (["-p", "0", "-n", "0"], "there must be a prompt or tokens to generate"),
        (["-p", "64"], "must fit the model's context of 64 tokens; pp64 takes 65 (depth + prompt + 1)"),
        (["-p", "0", "-n", "60", "-d", "5"], "must fit the model's context of 64 tokens; tg60 @ d5 takes 65 (depth + generated)"),
        (["--device", "cuda:99"], "must be a GPU that torch sees"),
        (["-p", "4", "-n", "4", "--out", "{file}"], "a report is a folder; found a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_requests_are_refused_before_loading(
    arguments: list[str], message: str, small: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConvertedFolder, "load", lambda *_, **__: pytest.fail("was loaded"))
    file = tmp_path / "file"
    file.touch()
    outcome = cli("bench", small, *(argument.format(file=file) for argument in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == [file]


def test_a_plot_that_cannot_be_drawn_is_refused_before_loading(
    small: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConvertedFolder, "load", lambda *_, **__: pytest.fail("was loaded"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = cli("bench", small, "--out", tmp_path / "results")
    assert outcome.code == 2
    assert "pip install 'dbrx_q[eval]'" in outcome.err
    assert not any(tmp_path.iterdir())


def test_weights_that_are_dequantized_in_each_step_are_refused(nano_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(nano_gguf)
    load = source.load
    monkeypatch.setattr(source, "load", lambda *, dtype, device: load(dtype=dtype, device=device, stream=True))
    with pytest.raises(RequestError, match="weights must fit in memory for a benchmark"):
        bench_model(source, [SpeedTest("pp", 4)], device=CPU, repeats=1)


def test_offloaded_experts(quantized_nano: Path, nano: Path, cli: Callable[..., Any]) -> None:
    sizes = ("-p", 8, "-n", 4, "-r", 1)
    outcome = cli("bench", quantized_nano, *sizes, "--ram", "3MiB", "--json")
    assert outcome.code == 0
    result = ModelBenchmark.from_dict(json.loads(outcome.out))
    work = ModelWork.of(DbrxForCausalLM.from_pretrained(quantized_nano), "plain")
    assert result.weight_bytes < 3 << 20 < sum(work.nbytes.values())
    for row in result.rows:
        assert 0 <= row.hit_rate < 1
        assert row.bytes_per_token == (prefill_need if row.kind == "pp" else decode_need)(work, batch=1, depth=0, tokens=row.tokens).nbytes
    assert "of the requests for experts hit the cache" in markdown(result)
    resident = ModelBenchmark.from_dict(json.loads(cli("bench", quantized_nano, *sizes, "--json").out))
    assert [row.hit_rate for row in resident.rows] == [1, 1]
    assert "requests for experts" not in markdown(resident)
    refused = cli("bench", nano, *sizes, "--ram", "30MiB")
    assert (refused.code, refused.out) == (2, "")
    assert "--ram and --gpu measure what dbrx_q quantized; this is bfloat16" in refused.err


def test_help_explains_how_to_measure_a_model(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "dbrx-q bench PATH" in cli("bench", "--help").out
    assert "pp512" in cli("bench", "model", "--help").out
    assert "synthetic" in cli("bench").out + cli("bench").err

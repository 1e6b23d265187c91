"""`--calibration self`: sampled sequences are kept, taken again, planned, and mixed with other sources."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dbrx_q import DbrxConfig, DbrxForCausalLM, DbrxTokenizer
from dbrx_q.checkpoint.layout import HEAD, TensorFormat
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.checkpoint.staging import partial_of
from dbrx_q.cli import self_calibration
from dbrx_q.cli.calibration import load_sequences, parse_sources
from dbrx_q.cli.self_calibration import Sampling, faster_ways, notice_of
from dbrx_q.errors import RequestError
from dbrx_q.generation.sequence_sampler import TextTokens, sample_sequences
from dbrx_q.planning.host_memory import resident_bytes
from dbrx_q.planning.machine import Machine
from dbrx_q.planning.sampling import plan_sampling
from dbrx_q.quantize.calibration.sequence_file import StoredSequences, read_sequences, write_sequences
from dbrx_q.quantize.pipeline.format_assignment import default_formats

BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"
SIZES = ("--sequences", 8, "--length", 16)
SELF = ("--method", "gptq", "--calibration", "self", *SIZES)
Cli = Callable[..., Any]


def sampled_file(destination: Path) -> Path:
    return destination.with_name(destination.name + ".self.safetensors")


def weights_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.glob("*.safetensors")}


def test_a_checkpoint_calibrates_itself(small: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    outcome = cli("quantize", small, out, *SELF)
    assert outcome.code == 0, outcome.err
    assert "sampling 10 sequences of 16 tokens" in outcome.err  # 8, and 2 that are held out
    stored = read_sequences(sampled_file(out))
    model, tokenizer = DbrxForCausalLM.from_pretrained(small), DbrxTokenizer.from_pretrained(small)
    tokens = TextTokens.of(tokenizer, model.config.vocab_size)
    assert torch.equal(stored.ids, sample_sequences(model, tokens, count=10, length=16, seed=0, batch=int(stored.options["batch"])))
    config = json.loads((out / "config.json").read_text())["quantization_config"]["calibration"]
    assert config["sources"] == [{"name": "self", "weight": 1.0, "sequences": 8, "held_out": 2, "sha256": stored.sha256}]
    assert cli("verify", out).code == 0
    again = cli("quantize", small, out, *SELF, "--resume")
    assert "is complete already" in again.err
    assert "holds the 10 sequences that were sampled before" in again.err
    by_file = cli("quantize", small, tmp_path / "by-file", "--method", "gptq", "--calibration", sampled_file(out), *SIZES)
    assert by_file.code == 0, by_file.err
    assert weights_of(tmp_path / "by-file") == weights_of(out)


def test_self_takes_its_share_of_a_mix(small: Path, tmp_path: Path) -> None:
    sampling = Sampling(str(small), small, tmp_path / "out", resident_bytes() + (1 << 30))
    sources = parse_sources(["self:1", f"{BOOK}:3"])
    drawn, about = load_sequences(small, sources, count=32, length=16, seed=0, sampling=sampling)
    assert drawn is not None
    assert about is not None
    assert (drawn.counts, drawn.held_out_counts) == ((8, 24), (2, 2))
    stored = read_sequences(sampled_file(tmp_path / "out"))
    assert len(stored.ids) == 10  # no more are sampled than are drawn
    assert all(any(torch.equal(row, other) for other in stored.ids) for row in (*drawn.ids[:8], *drawn.held_out[:2]))
    assert about["sources"][0]["sha256"] == stored.sha256
    measured, _ = load_sequences(small, parse_sources(["self:0", str(BOOK)]), count=32, length=16, seed=0, sampling=sampling)
    assert measured is not None
    assert (measured.counts, measured.held_out_counts) == ((0, 32), (2, 2))


@pytest.mark.parametrize(
    ("count", "length", "message"),
    [
        (8, -1, "at least 1 sequence of at least 2 tokens; found 8 of -1"),
        (10**12, 512, r"--calibration self: 1,062,500,000,000 sequences of 512 tokens must fit into --memory; their ids take "),
        (8, 10**12, "must fit into --memory"),
    ],
)
def test_sizes_without_sense_are_refused(small: Path, tmp_path: Path, count: int, length: int, message: str) -> None:
    sampling = Sampling(str(small), small, tmp_path / "out", resident_bytes() + (1 << 30))
    with pytest.raises(RequestError, match=message):
        load_sequences(small, parse_sources(["self"]), count=count, length=length, seed=0, sampling=sampling)


def test_a_resumed_run_samples_only_what_is_missing(small: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("quantize", small, tmp_path / "whole", *SELF).code == 0
    plan = self_calibration.Sampling._planned

    def in_fours(*arguments: Any) -> Any:
        from dataclasses import replace

        return replace(plan(*arguments), batch=4)

    monkeypatch.setattr(self_calibration.Sampling, "_planned", in_fours)
    out, written = tmp_path / "out", []

    def interrupted(path: Path, sequences: StoredSequences) -> None:
        write_sequences(path, sequences)
        written.append(len(sequences.ids))
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dbrx_q.quantize.calibration.sequence_file.write_sequences", interrupted)
        outcome = cli("quantize", small, out, *SELF)
        assert outcome.code == 2
        assert "interrupted; 8 of 10 sequences are kept in" in outcome.err
    assert not out.exists()
    refused = cli("quantize", small, out, *SELF, "--seed", 1, "--resume")
    assert refused.code == 2
    assert "--resume must find sequences of the same options; seed was 0 and is 1" in refused.err
    outcome = cli("quantize", small, out, *SELF, "--resume")
    assert outcome.code == 0, outcome.err
    assert written == [4, 8]
    whole, resumed = (read_sequences(sampled_file(tmp_path / name)) for name in ("whole", "out"))
    assert torch.equal(resumed.ids, whole.ids)
    assert weights_of(out) == weights_of(tmp_path / "whole")


def test_experts_on_disk_give_the_same_sequences(nano: Path, tmp_path: Path) -> None:
    sequences = []
    for name, extra in (("memory", 1 << 30), ("disk", 12 << 20)):
        sampling = Sampling(str(nano), nano, tmp_path / name, resident_bytes() + extra)
        sequences.append(sampling.sequences("self", count=6, length=8, seed=0))
        assert sampling.plan is not None
        assert (sampling.plan.placement.disk_experts > 0) == (name == "disk")
    assert torch.equal(sequences[0].ids, sequences[1].ids)


def test_a_quantized_copy_samples_for_the_original(small: Path, quantized_small: Path, tmp_path: Path) -> None:
    name = f"self={quantized_small}"
    sampling = Sampling(str(small), small, tmp_path / "out", resident_bytes() + (1 << 30))
    drawn, about = load_sequences(small, parse_sources([f"{name}:2"]), count=8, length=16, seed=0, sampling=sampling)
    assert drawn is not None
    assert about is not None
    assert (drawn.names, about["sources"][0]["name"]) == ((name,), f"self={quantized_small.name}")
    model, tokenizer = DbrxForCausalLM.from_pretrained(quantized_small), DbrxTokenizer.from_pretrained(small)
    expected = sample_sequences(model, TextTokens.of(tokenizer, model.config.vocab_size), count=10, length=16, seed=0)
    assert torch.equal(read_sequences(sampled_file(tmp_path / "out")).ids, expected)


def test_a_dry_run_plans_and_samples_nothing(small: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("quantize", small, tmp_path / "out", *SELF, "--dry-run")
    assert outcome.code == 0
    assert "about, for 160 tokens: 16 steps of 10 sequences" in outcome.out
    planned = json.loads(cli("quantize", small, tmp_path / "out", *SELF, "--dry-run", "--json").out)["sampling"]
    assert (planned["sequences"], planned["batch"], planned["steps"], planned["fits"]) == (10, 10, 16, True)
    assert planned["disk_bytes_of_a_step"] == 0
    refused = cli("quantize", small, tmp_path / "out", *SELF, "--dry-run", "--target-bpw", 8)
    assert refused.code == 2
    assert "which --dry-run does not sample" in refused.err
    assert not list(tmp_path.iterdir())


def test_a_long_plan_names_what_takes_less() -> None:
    """DBRX on a machine with 64 GiB of memory and a disk of 5 GB/s."""
    config = DbrxConfig(
        d_model=6144,
        n_heads=48,
        n_layers=40,
        max_seq_len=32768,
        vocab_size=100352,
        attn_config={"clip_qkv": 8.0, "kv_n_heads": 8},
        ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    )
    machine, int4 = Machine(ram=64 << 30, disk_bandwidth=5e9), default_formats(config, TensorFormat("int4", 64))
    plan = plan_sampling(config, {}, machine, sequences=272, length=512)
    shorter, packed = faster_ways(config, {}, machine, plan, math.inf)
    assert re.fullmatch(r"as many tokens in (4|8) times as many --sequences of --length (128|64) take \d+ steps, about .*(h|min)", shorter)
    assert re.fullmatch(r"sampled from an int4 copy .* --calibration self=COPY, they take about \d+ min", packed)
    whole = plan_sampling(config, int4, Machine(ram=256 << 30), sequences=272, length=512, flops=1e11)
    assert faster_ways(config, int4, Machine(ram=256 << 30), whole, 1e11) == ()  # arithmetic takes the time


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calibration", "self="), "a checkpoint must follow the equals sign"),
        (("--calibration", "self", "--calibration", "self=x"), "must name self once; found self and self=x"),
        (("--calibration", "self=no-such-folder"), "no-such-folder"),
        (("--calibration", "self", "--calibration", "missing.txt"), "missing.txt: a text must be a file"),
        (("--calibration", "self", "--length", 65), "--length must be at most the model's context of 64 tokens; found 65"),
        (("--calibration", "self", "--seed", -1), "the seed"),
        (("--calibration", "self:x"), "must be a number; found 'x'"),
        (("--calibration", "text.safetensors"), "must be a safetensors file with an int64 tensor token_ids"),
        (("--calibration", "floats.safetensors"), "found float32 [2, 16]"),
        (("--calibration", "negative.safetensors"), "ids from 0 on; found -1"),
        (("--calibration", "long.safetensors"), "its sequences must have 16 tokens; found 12 sequences of 20"),
        (("--calibration", "large.safetensors"), "token ids below 4096"),
    ],
)  # fmt: skip
def test_refused_requests(
    small: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, options: tuple[Any, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.safetensors").write_text("text")
    save_file({"token_ids": torch.zeros(2, 16)}, "floats.safetensors")
    for name, ids in (("negative", torch.full((9, 16), -1)), ("long", torch.zeros(12, 20)), ("large", torch.full((12, 16), 5000))):
        write_sequences(Path(f"{name}.safetensors"), StoredSequences(ids.long()))
    before = sorted(tmp_path.iterdir())
    outcome = cli("quantize", small, "out", "--method", "gptq", "--sequences", 8, "--length", 16, *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert sorted(tmp_path.iterdir()) == before


def test_checkpoints_that_cannot_be_sampled_are_refused_before_the_work(
    small: Path, quantized_small: Path, nano: Path, tmp_path: Path, cli: Cli
) -> None:
    from safetensors.torch import load_file

    headless = tmp_path / "headless"
    shutil.copytree(small, headless)
    index = json.loads((headless / "model.safetensors.index.json").read_text())
    shard = headless / index["weight_map"].pop(HEAD)
    tensors = load_file(shard)
    del tensors[HEAD]
    save_file(tensors, shard)
    (headless / "model.safetensors.index.json").write_text(json.dumps(index))
    unfinished = partial_of(tmp_path / "unfinished")
    unfinished.mkdir()
    (unfinished / ".dbrx_q-unfinished").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for source, destination, message in (
        (quantized_small, "a", "the source must be a plain checkpoint; this one is quantized"),
        (headless, "b", HEAD),
        (small, "unfinished", "this folder holds an unfinished run. Continue it with --resume"),
        (small, "full", "the destination must be empty"),
    ):
        outcome = cli("quantize", source, tmp_path / destination, *SELF)
        assert (outcome.code, outcome.out) == (2, ""), message
        assert message in outcome.err
        assert not sampled_file(tmp_path / destination).exists()
    other = cli("quantize", small, tmp_path / "c", "--method", "gptq", "--calibration", f"self={nano}", *SIZES)
    assert "must be of the model that is quantized, with 1 layers, 64 channels and 4,096 ids; found 4, 128 and 4,096" in other.err


def test_the_shards_of_a_run_that_deletes_them_are_not_sampled_from(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"found --low-disk.*self=PATH"):
        Sampling("owner/name", tmp_path, tmp_path / "out", 1 << 30, low_disk=True).sequences("self", count=4, length=8, seed=0)


def test_too_little_memory_names_what_would_do(small: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"must hold [\d,]+ bytes"):
        Sampling(str(small), small, tmp_path / "out", resident_bytes()).sequences("self", count=4, length=8, seed=0)


def test_text_that_repeats_itself_is_noticed(nano: Path) -> None:
    repeated = torch.full((4, 50), 7)
    notice = notice_of(repeated)
    assert notice is not None
    assert "1 distinct tokens with an entropy of 0.00 bits a token, and 100% of the tokens equal the one before" in notice
    two = torch.tensor([[1, 2] * 25] * 4)
    assert "2 distinct tokens with an entropy of 1.00 bits a token, and 0%" in str(notice_of(two))
    text = DbrxTokenizer.from_pretrained(nano).encode(BOOK.read_text(encoding="utf-8")[:20_000])
    assert notice_of(torch.tensor(text[: len(text) // 64 * 64]).view(-1, 64)) is None


def test_a_file_of_sequences_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "sequences.safetensors"
    for n in (2, 3):
        sequences = StoredSequences(torch.arange(n * 4).view(n, 4), {"seed": n})
        write_sequences(path, sequences)
        assert torch.equal(read_sequences(path).ids, sequences.ids)
        assert read_sequences(path).options == {"seed": n}
        assert read_sequences(path).sha256 == sequences.sha256
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert StoredSequences(torch.zeros(2, 8)).sha256 != StoredSequences(torch.zeros(4, 4)).sha256
    if os.geteuid():
        path.parent.chmod(0o500)
    else:
        path.with_name(path.name + ".writing").mkdir()
    with pytest.raises(RequestError, match="sampled sequences must be written here"):
        write_sequences(path, sequences)
    path.parent.chmod(0o700)

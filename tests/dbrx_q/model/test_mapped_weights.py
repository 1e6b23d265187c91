"""Models whose weights are views of mapped files: the bits of read ones, shared between processes, checked at first use, never written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from dbrx_q import Budget, DbrxForCausalLM, Machine, generate
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat, expert_name
from dbrx_q.checkpoint.mapping import MappedCheckpoint, is_on_network
from dbrx_q.checkpoint.shards import SHARD_BYTES
from dbrx_q.errors import CheckpointError
from dbrx_q.model.layers import PackedWeight
from dbrx_q.model.loading import load_model
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

PROMPT = [5, 17, 200, 3, 901, 44, 7]

needs_smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="mappings are listed by Linux alone")


def mapped_bytes(folder: Path, field: str) -> int:
    """The sum of a field of /proc/self/smaps over the mappings of a folder's shards."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split()[0]:  # the first line of a mapping
            inside = f"{folder}/" in line
        elif inside and name == field:
            total += int(value.split()[0]) * 1024
    return total


def quantized(source: Path, folder: Path, fmt: str, shard_bytes: int = SHARD_BYTES) -> Path:
    def assign(checkpoint: Checkpoint) -> Mapping[str, TensorFormat]:
        return default_formats(checkpoint.config, TensorFormat.parse(fmt))

    quantize_checkpoint(source, folder, QuantizationRequest(assign, shard_bytes=shard_bytes))
    return folder


def assert_same_weights(ours: DbrxForCausalLM, theirs: DbrxForCausalLM) -> None:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    assert all(name == other and a.dtype == b.dtype and a.equal(b) for (name, a), (other, b) in pairs)


@needs_smaps
@pytest.mark.parametrize("fmt", ["plain", "int4:64", "int8:32", "nf4:64", "nf4-double:64"])
def test_mapped_weights_are_those_that_are_read(fmt: str, nano: Path, tmp_path: Path) -> None:
    folder = nano if fmt == "plain" else quantized(nano, tmp_path / "packed", fmt)
    if fmt == "plain":  # saved here, so that tensors are aligned
        load_model(nano, use_mmap=False).save_pretrained(tmp_path / "plain")
        folder = tmp_path / "plain"
    read = load_model(folder, use_mmap=False)
    assert mapped_bytes(folder, "Size") == 0
    mapped = load_model(folder)
    assert mapped_bytes(folder, "Size") >= sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert_same_weights(mapped, read)
    for prompt in (PROMPT, PROMPT * 20):  # dot products, and tiles
        tokens = [generate(model, [prompt], max_new_tokens=6)[0].token_ids for model in (mapped, read)]
        assert tokens[0] == tokens[1]
        ids = torch.tensor([prompt])
        assert mapped(ids).logits.equal(read(ids).logits)


@needs_smaps
def test_a_layer_in_two_shards_is_read(nano: Path, tmp_path: Path) -> None:
    folder = quantized(nano, tmp_path / "packed", "int4:64", shard_bytes=500_000)
    with Checkpoint(folder) as checkpoint:
        mapped = MappedCheckpoint(checkpoint)
        files = [[checkpoint.path_of(expert_name(layer, "w1", e, "scales")) for e in range(16)] for layer in range(4)]
        stacks = [mapped.stack([expert_name(layer, "w1", e, "scales") for e in range(16)]) for layer in range(4)]
        assert [stack is None for stack in stacks] == [len(set(paths)) > 1 for paths in files]
    assert any(stack is None for stack in stacks)
    assert_same_weights(load_model(folder), load_model(folder, use_mmap=False))


@needs_smaps
def test_a_budget_reads_into_memory_of_the_process(quantized_nano: Path) -> None:
    for ram in (3_000_000, 100_000_000):  # with experts on disk, and with all in memory
        model = load_model(quantized_nano, budget=Budget(Machine(ram), context=64, step_tokens=8))
        assert mapped_bytes(quantized_nano, "Size") == 0
        model.close()


@needs_smaps
def test_processes_share_the_mapped_pages(quantized_nano: Path) -> None:
    model = load_model(quantized_nano)
    model(torch.tensor([PROMPT * 20]))  # logits of all tokens, so that all experts of the last layer are used, too
    alone = mapped_bytes(quantized_nano, "Pss")
    assert alone > 0.8 * sum(path.stat().st_size for path in quantized_nano.glob("*.safetensors"))
    code = (
        "import sys, torch; from pathlib import Path; from dbrx_q.model.loading import load_model\n"
        f"model = load_model(Path({str(quantized_nano)!r})); model(torch.tensor([{PROMPT} * 20]))\n"
        "print('used', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second:
        assert second.stdout is not None
        assert second.stdout.readline() == "used\n"
        shared = mapped_bytes(quantized_nano, "Pss")
        second.communicate("")
    assert shared < 0.6 * alone


@needs_smaps
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_a_change_in_place_stays_in_the_process(packed: bool, quantized_nano: Path, nano: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized_nano if packed else nano, tmp_path / "copy"))
    contents = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    model, other = load_model(folder), load_model(folder)
    before = other(torch.tensor([PROMPT])).logits.clone()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
        copied = deepcopy(other)
    assert model(torch.tensor([PROMPT])).logits.count_nonzero() == 0
    assert other(torch.tensor([PROMPT])).logits.equal(before)
    assert copied(torch.tensor([PROMPT])).logits.equal(before)
    assert {path: path.read_bytes() for path in folder.glob("*.safetensors")} == contents
    model.load_state_dict(other.state_dict())
    assert model(torch.tensor([PROMPT])).logits.equal(before)


def test_a_mapped_model_saves_the_same_bytes_also_over_its_own_files(quantized_nano: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized_nano, tmp_path / "copy"))
    contents = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    model = load_model(folder)
    before = model(torch.tensor([PROMPT])).logits
    model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == contents
    assert model(torch.tensor([PROMPT])).logits.equal(before)


def damaged(folder: Path, name: str) -> Path:
    """Write infinity into a 16-bit tensor; returns the shard."""
    with Checkpoint(folder) as checkpoint:
        path, info = checkpoint.path_of(name), checkpoint.infos[name]
    with open(path, "r+b") as file:
        file.seek(info.offset + info.nbytes - 2)
        file.write((0x7C00 if info.dtype == torch.float16 else 0x7F80).to_bytes(2, "little"))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight.scales",
        "transformer.blocks.2.norm_attn_norm.norm_2.weight",
        "transformer.blocks.3.norm_attn_norm.attn.Wqkv.weight.scales",
        "transformer.blocks.0.ffn.router.layer.weight",
        "lm_head.weight.scales",
    ],
)
def test_a_damaged_weight_that_every_token_uses_is_refused_before_a_token(name: str, quantized_nano: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized_nano, tmp_path / "copy"))
    path = damaged(folder, name)
    model = load_model(folder)
    for _ in range(2):  # the error comes again
        with pytest.raises(CheckpointError, match=f"{path}: tensor {name} must be finite"):
            generate(model, [PROMPT], max_new_tokens=1)
    with pytest.raises(CheckpointError, match=name):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=name):
        load_model(folder, use_mmap=False)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_a_damaged_expert_is_refused_by_the_first_token_that_uses_it(
    packed: bool, quantized_nano: Path, nano: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    if packed:
        shutil.copytree(quantized_nano, folder)
    else:
        load_model(nano).save_pretrained(folder)
    sound = load_model(folder)
    uses = [
        sound(torch.tensor([[token]]), output_router_logits=True).router_logits[2].topk(4).indices.flatten().tolist() for token in range(60)
    ]
    damaged(folder, expert_name(2, "w2", 15, "scales") if packed else expert_name(2, "w2"))  # the last expert's values are the last ones
    model = load_model(folder)
    assert 0 < sum(15 in used for used in uses) < len(uses)
    for token, used in enumerate(uses):
        ids = torch.tensor([[token]])
        if 15 in used:
            with pytest.raises(CheckpointError, match=r"blocks\.2\.ffn\.experts\.mlp\.w2.* must be finite"):
                model(ids)
        else:
            assert model(ids).logits.equal(sound(ids).logits)


def test_sound_weights_are_checked_once(quantized_nano: Path) -> None:
    model = load_model(quantized_nano)
    store = model.expert_store
    assert store._checks is not None
    generate(model, [PROMPT * 40], max_new_tokens=1)
    store.check_weights()
    assert store._checks is None


def test_a_file_that_changes_before_it_is_mapped_is_refused(quantized_nano: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized_nano, tmp_path / "copy"))
    with Checkpoint(folder) as checkpoint:
        [shard] = checkpoint.shards
        os.truncate(shard, shard.stat().st_size - 64)
        with pytest.raises(CheckpointError, match=f"{shard}: a shard must not change while it is opened"):
            MappedCheckpoint(checkpoint).stack(["lm_head.weight.scales"])


def test_network_file_systems_are_known_by_their_device(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "28 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "40 28 0:45 / /mnt/my\\040models rw,relatime shared:20 master:3 - nfs4 server:/models rw,vers=4.2\n"
        "41 28 0:46 / /mnt/bucket rw - fuse.gcsfuse bucket rw\n"
        "42 28 8:1 / /mnt/disk rw - fuseblk /dev/sda1 rw\n"
    )
    devices = {(254, 0): False, (0, 45): True, (0, 46): True, (8, 1): False, (7, 7): False}
    assert {numbers: is_on_network(os.makedev(*numbers), mounts) for numbers in devices} == devices
    assert not is_on_network(os.makedev(0, 45), tmp_path / "absent")


def test_packed_stacks_are_not_copied(quantized_nano: Path) -> None:
    model = load_model(quantized_nano)
    for module in model.modules():
        if isinstance(module, PackedWeight):
            assert module.value.contiguous_matrices() is module.value


def test_experts_of_a_layer_share_a_shard_where_one_can_hold_them(quantized_nano: Path, tmp_path: Path) -> None:
    model = load_model(quantized_nano)
    layer = sum(weight.nbytes for weight in model.transformer.layers()[0].ffn.experts.mlp.buffers())
    for limit, whole in ((int(1.5 * layer), True), (layer - 1, False)):
        folder = tmp_path / str(limit)
        model.save_pretrained(folder, max_shard_size=limit)
        with Checkpoint(folder) as checkpoint:
            shards = [{checkpoint.path_of(expert_name(i, "w2", e, "zeros")) for e in range(16)} for i in range(4)]
            assert all(
                sum(info.nbytes for name, info in checkpoint.infos.items() if checkpoint.path_of(name) == shard) <= limit
                for shard in checkpoint.shards
            )
        assert all(len(names) == 1 for names in shards) == whole

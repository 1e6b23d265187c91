"""Folders written by dbrx_q, transformers and bitsandbytes: our reader's weights equal those of the programs themselves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from safetensors.torch import load_file, save_file

from dbrx_q.checkpoint.weights_hash import weights_sha256
from dbrx_q.errors import CheckpointError, ConfigError, DbrxError, RequestError
from dbrx_q.kernels.formats.cache_folders import CacheWarning
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.sources.open import open_source
from dbrx_q.sources.tokenizers_agree import check_same_tokenizer
from dbrx_q.tokenizer.bpe_file import TokenizerWarning
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
CPU = torch.device("cpu")
IDS = torch.tensor([list(range(100, 164)), list(range(3000, 3064))])


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def logits_of(model: DbrxForCausalLM) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def bundled_logits() -> torch.Tensor:
    return logits_of(DbrxForCausalLM.from_pretrained(NANO))


def config_with_theta() -> transformers.DbrxConfig:
    config = transformers.DbrxConfig.from_pretrained(NANO)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    return config


def test_a_plain_folder_gives_the_logits_of_the_model(bundled_logits: torch.Tensor) -> None:
    source = open_source(NANO)
    assert (source.name, source.path, source.format, source.bits_per_weight) == (str(NANO), NANO, "bfloat16", 16)
    model = source.load(dtype=None, device=CPU)
    assert (model.dtype, model.eos_token_ids) == (torch.bfloat16, (4092, 4094))
    assert torch.equal(logits_of(model), bundled_logits)


def test_a_quantized_folder_stays_packed(quantized_nano: Path) -> None:
    source = open_source(quantized_nano)
    assert source.format == "int4:64 + int8:64"
    assert source.sha256() == hashlib.sha256((quantized_nano / "manifest.json").read_bytes()).hexdigest()
    stored = sum(tensor.nbytes for shard in quantized_nano.glob("*.safetensors") for tensor in load_file(shard).values())
    plain = sum(tensor.numel() for tensor in load_file(NANO / "model.safetensors").values())
    assert (source.nbytes, source.parameters, source.bits_per_weight) == (stored, plain, 8 * stored / plain)
    model = source.load(dtype=torch.float32, device=CPU)
    assert torch.equal(logits_of(model), logits_of(DbrxForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32)))
    with pytest.raises(RequestError, match="only dequantized experts can be streamed"):
        source.load(dtype=None, device=CPU, stream=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("transformers_alone")
def test_a_model_saved_by_transformers_gives_the_same_logits(stream: bool, bundled_logits: torch.Tensor, tmp_path: Path) -> None:
    model = transformers.DbrxForCausalLM.from_pretrained(NANO, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="4MB")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (written["rope_parameters"]["rope_theta"], written["attn_config"]["rope_theta"]) == (10000.0, 500000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    source = open_source(tmp_path / "saved")
    assert (source.format, source.bits_per_weight, source.config.rope_theta) == ("bfloat16", 16, 500000)
    loaded = source.load(dtype=None, device=CPU, stream=stream)
    assert torch.equal(logits_of(loaded), bundled_logits)
    assert loaded.eos_token_ids == (4092, 4094)


def test_only_the_known_mistake_of_theta_is_accepted(tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "folder")
    config = json.loads((NANO / "config.json").read_text())
    path = tmp_path / "folder" / "config.json"
    path.write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}))
    with pytest.raises(ConfigError, match=r"must agree; found 500000\.0 and 20000\.0"):
        open_source(tmp_path / "folder")
    del config["attn_config"]["rope_theta"]
    path.write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}))
    assert open_source(tmp_path / "folder").config.rope_theta == 10000.0


def quantized_by_bitsandbytes(kind: str, *, double: bool, experts: bool) -> transformers.DbrxForCausalLM:
    """transformers' model as its integration quantizes it: Linear4bit for every linear layer but the head; experts only with `experts`."""
    model = transformers.DbrxForCausalLM.from_pretrained(NANO, config=config_with_theta(), dtype=torch.bfloat16).eval()
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compress_statistics=double, quant_type=kind
            )
            packed.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, compress_statistics=double, quant_type=kind)
            model.set_submodule(name, packed.to("cpu"))
        elif experts and name.endswith("experts.mlp"):
            for matrix in ("w1", "v1", "w2"):
                replace_parameter_4bit(module, matrix, compress_statistics=double, quant_type=kind)
    return model


def save(model: transformers.DbrxForCausalLM, folder: Path, *, double: bool) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16
    )
    config = json.loads((NANO / "config.json").read_text()) | {"quantization_config": quantization.to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    return folder


def dequantized_by_bitsandbytes(model: transformers.DbrxForCausalLM) -> transformers.DbrxForCausalLM:
    """A float32 model of the weights that bitsandbytes' modules dequantize."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif name.endswith("experts.mlp"):
            weights |= {f"{name}.{matrix}": getattr(module, matrix).data for matrix in ("w1", "v1", "w2")}
        elif ".parametrizations" not in name:
            weights |= {f"{name}.{parameter_name}": parameter.data for parameter_name, parameter in module.named_parameters(recurse=False)}
    plain = transformers.DbrxForCausalLM(config_with_theta()).float().eval()
    plain.load_state_dict({name: values.float().reshape(plain.state_dict()[name].shape) for name, values in weights.items()})
    return plain


CASES = {
    "nf4": ("nf4", False, False, "bitsandbytes nf4 + bfloat16 experts"),
    "double quantization": ("nf4", True, False, "bitsandbytes nf4-double + bfloat16 experts"),
    "packed experts": ("nf4", True, True, "bitsandbytes nf4-double"),
    "fp4": ("fp4", False, True, "bitsandbytes fp4"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bitsandbytes_folder_gives_the_weights_of_bitsandbytes(case: str, tmp_path: Path) -> None:
    kind, double, experts, label = CASES[case]
    model = quantized_by_bitsandbytes(kind, double=double, experts=experts)
    folder = save(model, tmp_path / "folder", double=double)
    source = open_source(folder)
    tensors = load_file(folder / "model.safetensors")
    assert (source.format, source.nbytes) == (label, sum(tensor.nbytes for tensor in tensors.values()))
    assert (source.bits_per_weight < 9) == experts
    plain = dequantized_by_bitsandbytes(model)
    loaded = source.load(dtype=None, device=CPU)
    assert loaded.dtype == torch.float32
    expected = plain.state_dict()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(logits_of(loaded), plain(IDS).logits, rtol=1e-4, atol=1e-3)
    assert torch.equal(logits_of(source.load(dtype=None, device=CPU, stream=True)), logits_of(loaded))


def test_scales_that_a_forward_on_avx512_bf16_transposed_are_explained(tmp_path: Path) -> None:
    folder = save(quantized_by_bitsandbytes("nf4", double=False, experts=False), tmp_path / "folder", double=False)
    tensors = load_file(folder / "model.safetensors")
    for name, absmax in tensors.items():
        if name.endswith(".absmax"):  # as bitsandbytes 0.50 leaves it after a forward pass on such a CPU
            rows = json.loads(bytes(tensors[name.replace("absmax", "quant_state.bitsandbytes__nf4")].tolist()))["shape"][0]
            tensors[name] = absmax.view(rows, -1).T.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"after it had run on a CPU with AVX512-BF16.* save it before the first forward pass"
    ) as raised:
        open_source(folder)
    assert "etch" not in str(raised.value)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(quantized_by_bitsandbytes("nf4", double=True, experts=False), tmp_path_factory.mktemp("bnb") / "folder", double=True)


Tensors = dict[str, torch.Tensor]
ROUTER = "transformer.blocks.1.ffn.router.layer.weight"


def state(**changes: object) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        name = f"{ROUTER}.quant_state.bitsandbytes__nf4"
        values = json.loads(bytes(tensors[name].tolist())) | changes
        tensors[name] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    return change


def setting(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


BAD: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no absmax": (lambda tensors: tensors.pop(f"{ROUTER}.absmax"), "its stored parts must be .*absmax.* by config.json; found weight, "),
    "half nested": (lambda tensors: tensors.pop(f"{ROUTER}.nested_absmax"), "must have absmax, quant_map and one of"),
    "no values": (lambda tensors: tensors.pop(ROUTER), r"its stored parts must be .*; found weight\.absmax"),
    "cut values": (
        setting(ROUTER, torch.zeros(1000, 1, dtype=torch.uint8)),
        "must take 1024 bytes by config.json; found 1000",
    ),
    "cut absmax": (
        setting(f"{ROUTER}.absmax", torch.zeros(31, dtype=torch.uint8)),
        r"absmax must be uint8 \[32\] for a weight \[16, 128\]; found .*31",
    ),
    "other shape": (state(shape=[128, 16]), r"its quantization state must have the shape \[16, 128\]"),
    "other kind": (state(quant_type="fp4"), "and the type of its name"),
    "no block size": (state(blocksize=0), "the quantization state must be bitsandbytes' JSON; found ValueError: blocksize 0"),
    "odd dtype": (state(dtype="save"), "a float dtype"),
    "no JSON": (
        setting(f"{ROUTER}.quant_state.bitsandbytes__nf4", torch.full((9,), 255, dtype=torch.uint8)),
        "must be bitsandbytes' JSON; found UnicodeDecodeError",
    ),
    "no bytes": (
        setting(f"{ROUTER}.quant_state.bitsandbytes__nf4", torch.tensor(1.0)),
        r"quant_state.bitsandbytes__nf4 must be uint8 .*; found float32 \[\]",
    ),
    "stray statistics": (setting("transformer.norm_f.absmax", torch.zeros(1)), r"norm_f must be a float \[128\]; found .*absmax"),
    "no float": (setting("transformer.norm_f.weight", torch.zeros(128, dtype=torch.int8)), r"must be a float \[128\]; found .*int8"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_bitsandbytes_folders_are_refused(case: str, packed_folder: Path, tmp_path: Path) -> None:
    change, message = BAD[case]
    shutil.copytree(packed_folder, tmp_path / "folder")
    tensors = load_file(packed_folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "folder")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "exl2"}, "must be GPTQ, AWQ, .*; found EXL2"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "found load_in_8bit"),
        ("nf4", "must be an object; found 'nf4'"),
    ],
)
def test_other_quantizations_are_refused(quantization: object, message: str, tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "folder")
    config = json.loads((NANO / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DbrxError, match=message):
        open_source(tmp_path / "folder")


def test_paths_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_source(tmp_path / "nothing")
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(CheckpointError, match=r"must be a folder with config\.json or a GGUF file; found another kind of file"):
        open_source(tmp_path / "text.txt")
    with pytest.raises(CheckpointError, match=r"config\.json: file not found"):
        open_source(tmp_path)
    (tmp_path / "dbrx.Q4_0.gguf").touch()
    with pytest.raises(CheckpointError, match=r"dbrx\.Q4_0\.gguf: a GGUF file must begin with 'GGUF'"):
        open_source(tmp_path)


def test_the_hash_of_weights_is_that_of_one_file_or_of_the_hashes_of_its_parts(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one")
    first, second = (hashlib.sha256(data).hexdigest() for data in (b"one", b"two"))
    assert weights_sha256([tmp_path / "b"]) == second
    assert weights_sha256([tmp_path / "b", tmp_path / "a"]) == hashlib.sha256(f"{first}\n{second}".encode()).hexdigest()


def test_a_shard_that_differs_from_the_manifest_is_refused(quantized_nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(quantized_nano, folder)
    assert open_source(folder).sha256() == open_source(quantized_nano).sha256()
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: a shard must have the SHA-256 of manifest\.json"):
        open_source(folder).sha256()


def test_a_file_is_hashed_once_for_each_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = weights_sha256([path])
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights_sha256([path]) == first  # size and time are the same, so the cached hash is returned
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    second = weights_sha256([path])
    assert second != first
    for cache_file in (tmp_path / "cache" / "dbrx_q" / "sha256").iterdir():
        cache_file.write_text("{}")
    assert weights_sha256([path]) == second
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    with pytest.warns(CacheWarning, match="cannot be written"):
        assert weights_sha256([path]) == second


def changed_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> DbrxTokenizer:
    folder.mkdir()
    shutil.copyfile(NANO / "tokenizer_config.json", folder / "tokenizer_config.json")
    data = json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return DbrxTokenizer.from_pretrained(folder)


def spell(data: dict[str, Any]) -> None:
    data["added_tokens"][1]["content"] = "<|start|>"


def add(data: dict[str, Any]) -> None:
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 4096, "content": "<|more|>"})


def unmark(data: dict[str, Any]) -> None:
    data["added_tokens"][1]["special"] = False


def split_digits(data: dict[str, Any]) -> None:
    regex = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    regex["Regex"] = regex["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spell, r"the tokenizers of A and B must be the same; token 4093 is '<\|im_start\|>' and '<\|start\|>'"),
        (add, r"token 4096 is no token and '<\|more\|>'"),
        (unmark, r"token 4093 \('<\|im_start\|>'\) is special and not special"),
        (split_digits, r"split the text differently at character 5: token \d+ is \d+ \('19\d*'\) and \d+ \('1'\)"),
    ],
)
def test_the_first_difference_of_two_tokenizers_is_shown(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    reference = DbrxTokenizer.from_pretrained(NANO)
    with nullcontext() if change is not split_digits else pytest.warns(TokenizerWarning, match="splits a text with the pattern"):
        other = changed_tokenizer(tmp_path / "other", change)
    with pytest.raises(RequestError, match=message):
        check_same_tokenizer(reference, other, "Wéll 1923 was", names=("A", "B"))
    check_same_tokenizer(reference, DbrxTokenizer.from_pretrained(NANO), "Wéll 1923 was")
    check_same_tokenizer(reference, reference)

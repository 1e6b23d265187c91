"""Weights that a dtype cannot hold, and activations that overflow: refused by name, in every command, and nothing is saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbrx_q import DbrxForCausalLM
from dbrx_q.checkpoint.layout import HEAD, TensorFormat
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.generation.generate import generate
from dbrx_q.generation.sampling import SamplingParams
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint
from dbrx_q.sources.open import open_source

BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"
EXPERTS = "transformer.blocks.{}.ffn.experts.mlp.{}"
IDS = [1500, 300, 2700, 410]


def changed(source: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: object) -> Path:
    """A copy of a checkpoint with other weights, in one file."""
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {name: tensor for shard in source.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    return to


def one_large_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERTS.format(0, "w2")][3, 5] = 1e5


def large_activations(tensors: dict[str, torch.Tensor]) -> None:
    for layer in (1, 2, 3):
        tensors[EXPERTS.format(layer, "v1")] *= 4096
        tensors[EXPERTS.format(layer, "w2")] *= 64


@pytest.fixture(scope="module")
def large_weight(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(small, tmp_path_factory.mktemp("overflow") / "weight", one_large_weight)


@pytest.fixture(scope="module")
def overflowing(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, whose weights fit float16 and whose activations do not, from layer 1 on."""
    return changed(nano, tmp_path_factory.mktemp("overflow") / "activations", large_activations)


@pytest.mark.parametrize("how", ["--dtype", "torch_dtype", "source", "streamed"])
def test_a_weight_that_float16_cannot_hold_is_refused_by_name(
    how: str, large_weight: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    message = r"tensor transformer\.blocks\.0\.ffn\.experts\.mlp\.w2 must fit float16, which holds values up to 65504; found 99840"
    if how == "--dtype":
        with pytest.raises(CheckpointError, match=message + r"\. Choose bfloat16 or float32"):
            DbrxForCausalLM.from_pretrained(large_weight, dtype=torch.float16)
        outcome = cli("generate", large_weight, "--prompt", "x", "--dtype", "float16")
        assert (outcome.code, outcome.out) == (2, "")
        assert "w2 must fit float16" in outcome.err
    elif how == "torch_dtype":
        shutil.copytree(large_weight, tmp_path / "float16")
        config = json.loads((large_weight / "config.json").read_text())
        (tmp_path / "float16" / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
        with pytest.raises(CheckpointError, match=message):
            DbrxForCausalLM.from_pretrained(tmp_path / "float16")
    else:
        source = open_source(large_weight)

        def run() -> None:
            source.load(dtype=torch.float16, device=torch.device("cpu"), stream=how == "streamed")(torch.tensor([IDS]))

        with pytest.raises(CheckpointError, match=message):
            run()
    DbrxForCausalLM.from_pretrained(large_weight, dtype=torch.bfloat16)


def test_float32_weights_that_bfloat16_rounds_to_infinity_are_refused(small: Path, tmp_path: Path) -> None:
    def beyond(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[HEAD].float()
        tensors[HEAD][0, 0] = torch.finfo(torch.float32).max

    folder = changed(small, tmp_path / "float32", beyond)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must fit bfloat16, which holds values up to 3\.38953e\+38; .* float32"):
        DbrxForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, seed=1)], ids=["greedy", "sampled"])
def test_generation_names_the_layer_where_an_overflow_began(sampling: SamplingParams, overflowing: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(overflowing, dtype=torch.float16)
    message = (
        "logits must be finite; found NaN or infinity, which began in the experts of layer 1, with activations in float16. "
        "float16 holds values up to 65,504, bfloat16 and float32 up to 3.4e38: choose one of these (--dtype bfloat16)"
    )
    with pytest.raises(RequestError) as raised:
        generate(model, [IDS], max_new_tokens=4, sampling=sampling)
    assert str(raised.value) == message
    assert len(generate(DbrxForCausalLM.from_pretrained(overflowing, dtype=torch.bfloat16), [IDS], max_new_tokens=4)[0].token_ids) == 4


def test_an_overflow_in_a_later_step_is_found(nano: Path, tmp_path: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(nano)
    first = generate(model, [IDS], max_new_tokens=2)[0].token_ids
    assert first[1] not in (*IDS, first[0])

    def one_embedding(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.wte.weight"][first[1]] = 3e38

    poisoned = DbrxForCausalLM.from_pretrained(changed(nano, tmp_path / "poisoned", one_embedding))
    assert generate(poisoned, [IDS], max_new_tokens=2)[0].token_ids == first
    with pytest.raises(RequestError, match=r"began in (attention|the experts) of layer 0, with activations in bfloat16. bfloat16 holds"):
        generate(poisoned, [IDS], max_new_tokens=3)


def test_an_overflow_of_the_head_is_named(nano: Path, tmp_path: Path) -> None:
    def large_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = (tensors[HEAD].float() / tensors[HEAD].float().abs().max() * 60_000).half()

    model = DbrxForCausalLM.from_pretrained(changed(nano, tmp_path / "head", large_head), dtype=torch.float16)
    with pytest.raises(RequestError, match="began in the head, with activations in float16"):
        generate(model, [IDS], max_new_tokens=1)


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "MODEL", "--prompt", "The", "--dtype", "float16"),
        ("perplexity", "MODEL", "--text", BOOK, "--limit", 2, "--context", 64, "--dtype", "float16"),
        ("compare", "GOOD", "MODEL", "--text", BOOK, "--limit", 2, "--context", 64, "--dtype", "float16", "--out", "OUT"),
        ("compare", "MODEL", "GOOD", "--text", BOOK, "--limit", 2, "--context", 64, "--dtype", "float16", "--out", "OUT"),
        ("reference", "MODEL", "OUT.safetensors", "--text", BOOK, "--limit", 2, "--context", 64, "--dtype", "float16"),
    ],
    ids=lambda command: "-".join(str(part) for part in command[:2]),
)
def test_no_command_answers_or_saves_after_an_overflow(
    command: tuple[object, ...], overflowing: Path, nano: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    places = {"MODEL": overflowing, "GOOD": nano, "OUT": tmp_path / "out" / "report", "OUT.safetensors": tmp_path / "out" / "r.safetensors"}
    outcome = cli(*(places.get(str(part), part) for part in command))
    assert (outcome.code, outcome.out) == (2, "")
    assert "which began in the experts of layer 1, with activations in float16" in outcome.err
    assert not list((tmp_path / "out").iterdir())
    assert not list((tmp_path / "cache").rglob("*.npz"))


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_weights_of_1e30_are_refused_or_fail_by_name(method: str, small: Path, tmp_path: Path) -> None:
    def enormous(tensors: dict[str, torch.Tensor]) -> None:
        for matrix in ("w1", "v1", "w2"):
            tensors[EXPERTS.format(0, matrix)][::16] = 1e30

    folder = changed(small, tmp_path / "enormous", enormous)
    sequences = None if method == "rtn" else CalibrationSequences.single(torch.arange(64).view(2, 32))
    request = QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64)), method=method, sequences=sequences)
    with pytest.raises((CheckpointError, RequestError, ValueError), match=r"w1|activations|must"):
        quantize_checkpoint(folder, tmp_path / "int4", request)
    assert not (tmp_path / "int4").exists()
    if method == "rtn":
        quantize_checkpoint(folder, tmp_path / "nf4", QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("nf4", 64))))
        for checkpoint in (folder, tmp_path / "nf4"):
            model = DbrxForCausalLM.from_pretrained(checkpoint)
            with pytest.raises(RequestError, match=r"began in the experts of layer 0, with activations in bfloat16\. .* too large"):
                generate(model, [IDS], max_new_tokens=1)


def test_generation_by_forward_refuses_logits_that_overflow(overflowing: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(overflowing, dtype=torch.float16)
    ids, mask = torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    for arguments in ({"return_dict_in_generate": True}, {"use_cache": False}, {"num_beams": 2, "use_cache": False}):
        with pytest.raises(RequestError, match="which began in the experts of layer 1, with activations in float16"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2, **arguments)
    with pytest.raises(RequestError, match="found NaN or infinity, with activations in float16"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2)

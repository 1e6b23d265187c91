"""Numbers without measure, in config.json and in options: one short error, before anything is computed with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HUGE = 10**30
BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"


def check_refused(outcome: Any, *message: str) -> None:
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    assert len(outcome.err) < 1200
    for words in message:
        assert words in outcome.err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_layers": 200_000_000}, "n_layers must be at most 1,000, far above that of any DBRX; found 200000000"),
        ({"n_layers": 1000}, "norm_1.weight and 7991 more is missing"),
        ({"vocab_size": 10**400}, "vocab_size must be at most 16,777,216, far above that of any DBRX; found a whole number of 1,329 bits"),
        ({"ffn_config": {"moe_num_experts": 1 << 31}}, "moe_num_experts must be at most 1,024"),
        ({"attn_config": {"clip_qkv": 10**400}}, "clip_qkv must be at most 1e+15"),
        ({"n_layers": "9" * 100_000}, "n_layers must be a whole number"),
        ({"model_type": "m" * 100_000}, "model_type must be 'dbrx'"),
        ({"quantization_config": {"quant_method": "q" * 100_000}}, "a quantized checkpoint must be GPTQ, AWQ"),
        (
            {"quantization_config": {"quant_method": "dbrx_q", "format_version": 1, "tensors": {"t" * 100_000: {"format": "f" * 100_000}}}},
            "format and group_size must be one of",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_a_configuration_without_measure(
    keys: dict[str, Any], message: str, command: str, small: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    shutil.copytree(small, tmp_path / "m")
    raw = json.loads((small / "config.json").read_text())
    for key, value in keys.items():
        raw[key] = raw[key] | value if key in ("attn_config", "ffn_config") else value
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    check_refused(cli(command, tmp_path / "m", *(["--prompt", "The"] if command == "generate" else [])), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "MODEL", "--ram", "1GB", "--batch", HUGE], "batch must be at most 65,536; found 1000000000000000000000000000000"),
        (["plan", "MODEL", "--ram", f"{'9' * 400}GB"], "a size must be at most"),
        (["plan", "MODEL", "--ram", "x" * 100_000], "a size must be a number with a unit"),
        (
            ["quantize", "MODEL", "OUT", "--method", "awq", "--calibration", BOOK, "--length", 32, "--seed", HUGE],
            "the seed of a calibration must be from 0 to 2^63 - 1",
        ),
    ],
    ids=["batch", "ram", "ram text", "seed"],
)
def test_options_without_measure(arguments: list[Any], message: str, small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    places = {"MODEL": small, "OUT": tmp_path / "out"}
    check_refused(cli(*(places.get(str(argument), argument) for argument in arguments)), message)
    assert not list(tmp_path.iterdir())

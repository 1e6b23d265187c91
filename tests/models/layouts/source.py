"""Writes the checkpoint that every tool quantizes: `source.py OUT [--wide]`; a tiny DBRX of seeded random weights, in the published layout.

Dimension letters: `V` vocabulary, `D` d_model, `E` experts, `F` ffn hidden, `T` tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["make_source", "make_tokens"]

NANO = Path(__file__).resolve().parents[2] / "data" / "dbrx-nano"
VOCABULARY = 320
"""256 bytes, 60 merges and four special tokens."""
EXPERTS, ACTIVE, LAYERS = 3, 2, 2


def make_source(out: Path, *, wide: bool = False) -> None:
    """Write config, tokenizer and bfloat16 weights.

    Args:
        out: folder to write.
        wide: rows of 256 and one layer, for the blocks of 256 weights of llama.cpp's k-quants; else rows of 128 and 256.
    """
    out.mkdir(parents=True)
    width, hidden, layers = (256, 256, 1) if wide else (128, 256, LAYERS)
    _write_config(out, width, hidden, layers)
    _write_tokenizer(out)
    save_file(_weights(width, hidden, layers), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def make_tokens() -> list[int]:
    """The token ids [T] on which every tool computes logits."""
    return torch.randint(VOCABULARY - 4, (32,), generator=torch.Generator().manual_seed(7)).tolist()


def _write_config(out: Path, width: int, hidden: int, layers: int) -> None:
    config = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
    config.update(d_model=width, n_layers=layers, vocab_size=VOCABULARY, max_seq_len=512)
    config["ffn_config"].update(ffn_hidden_size=hidden, moe_num_experts=EXPERTS, moe_top_k=ACTIVE)
    special = VOCABULARY - 4
    generation = {"bos_token_id": special, "eos_token_id": [special, special + 2], "pad_token_id": special + 3}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_tokenizer(out: Path) -> None:
    """The bundled model's tokenizer, cut to its first merges."""
    tokenizer = json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8"))
    plain = VOCABULARY - 4
    model = tokenizer["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < plain}
    model["merges"] = model["merges"][: plain - 256]
    for offset, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = plain + offset
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    config = json.loads((NANO / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["model_max_length"] = 512
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _weights(width: int, hidden: int, layers: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(21)

    def matrix(rows: int, columns: int, inputs: int, gain: float) -> torch.Tensor:
        """Normal values of standard deviation gain / sqrt(inputs), of which one of 50 is three times as large."""
        values = torch.randn(rows, columns, generator=generator) * (gain / inputs**0.5)
        outliers = torch.rand(rows, columns, generator=generator) < 0.02
        return torch.where(outliers, 3 * values, values).bfloat16()

    def norm() -> torch.Tensor:
        return (1 + 0.2 * torch.randn(width, generator=generator)).bfloat16()

    weights = {"transformer.wte.weight": matrix(VOCABULARY, width, 1, 1.0)}  # [V, D]
    for layer in range(layers):
        block = f"transformer.blocks.{layer}"
        attention = f"{block}.norm_attn_norm"
        weights |= {
            f"{attention}.norm_1.weight": norm(),
            f"{attention}.attn.Wqkv.weight": matrix(2 * width, width, width, 1.5),  # half as many KV heads as heads
            f"{attention}.attn.out_proj.weight": matrix(width, width, width, 1.0),
            f"{attention}.norm_2.weight": norm(),
            f"{block}.ffn.router.layer.weight": matrix(EXPERTS, width, width, 1.5),  # [E, D]
            f"{block}.ffn.experts.mlp.w1": matrix(EXPERTS * hidden, width, width, 1.5),  # [E * F, D]
            f"{block}.ffn.experts.mlp.v1": matrix(EXPERTS * hidden, width, width, 1.5),
            f"{block}.ffn.experts.mlp.w2": matrix(EXPERTS * hidden, width, hidden, 1.5),
        }
    return weights | {"transformer.norm_f.weight": norm(), "lm_head.weight": matrix(VOCABULARY, width, width, 2.0)}


if __name__ == "__main__":
    make_source(Path(sys.argv[1]), wide="--wide" in sys.argv[2:])

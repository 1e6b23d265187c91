"""Writes a DBRX checkpoint as transformers quantizes it with bitsandbytes' `load_in_4bit`: `make_bitsandbytes.py SRC DST [--double]`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import transformers


def make(source: Path, destination: Path, *, double: bool = False) -> None:
    """Write NF4 in blocks of 64 with float32 absmax; `double` quantizes absmax as well."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.DbrxForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    model.save_pretrained(destination)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, destination / name)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]), double="--double" in sys.argv[3:])

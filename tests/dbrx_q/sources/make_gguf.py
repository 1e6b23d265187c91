"""Writes a plain DBRX checkpoint as a GGUF file in float32, from which llama.cpp quantizes: `make_gguf.py SRC LIKE DST`.

LIKE is a GGUF file of the same model, of which DST takes metadata and tokenizer: llama.cpp's own converter knows the tokenizers of
published models alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import dense_tensors
from dbrx_q.sources.gguf_names import gguf_name


def make(source: Path, like: Path, destination: Path) -> None:
    """Write the weights of `source` with the metadata of `like`."""
    reader = gguf.GGUFReader(like)
    writer = gguf.GGUFWriter(destination, "dbrx")
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.") and name != "general.architecture"}
    for name, field in fields.items():
        value = int(gguf.LlamaFileType.ALL_F32) if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    with Checkpoint(source) as checkpoint:
        for tensor in dense_tensors(checkpoint.config):
            weight = checkpoint.read(tensor.name).float()
            if tensor.experts:
                weight = weight.view(tensor.experts, -1, tensor.shape[1])  # [E, F, D]
                weight = weight.transpose(1, 2) if tensor.transposed else weight  # GGUF stores w2 as [E, D, F]
            writer.add_tensor(gguf_name(tensor.name), weight.contiguous().to(torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    make(*(Path(argument) for argument in sys.argv[1:4]))

"""Quantizes the experts of a small model into llama.cpp's types of 2 to 4 bits, as a plain folder in float32.

    .venv/bin/python tests/methods/ggml_types.py MODEL OUT --library libggml-base.so --types Q2_K,IQ2_XS --imatrix imatrix.gguf

llama.cpp itself replaces these types by larger ones where 256 does not divide a row, as in the bundled models, whose w1 and v1 have rows of
128. Here a block then holds neighbouring rows of the matrix. `ggml_quantize_chunk` chooses scales and codes, with the importance of each
input where a matrix is given, and the gguf package dequantizes. Attention, embedding and head are rounded to nearest in int8:64, as
`dbrx-q quantize` does; OUT/TYPE holds the folder, in which `ggml-type.json` states the bits.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

__all__ = ["TYPE_FILE", "main", "quantized"]

TYPE_FILE = "ggml-type.json"
"""In a folder: {"type": name, "imatrix": whether importances were given, "bits": {role: bits per weight}}."""
_INT8_BITS = 8.25
_IMATRIX_NAMES = {"w1": "ffn_gate_exps", "v1": "ffn_up_exps", "w2": "ffn_down_exps"}


def main(arguments: list[str] | None = None) -> int:
    """Write a folder for every type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="plain checkpoint, such as tests/data/dbrx-nano")
    parser.add_argument("out", type=Path, help="folder of the folders to write")
    parser.add_argument("--library", type=Path, required=True, help="libggml-base.so of a build of llama.cpp")
    parser.add_argument("--types", required=True, help="names of ggml's types, with commas")
    parser.add_argument("--imatrix", type=Path, help="file that llama-imatrix wrote of the model")
    options = parser.parse_args(arguments)
    library = ctypes.CDLL(str(options.library))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    importances = {} if options.imatrix is None else _importances(options.imatrix)
    for name in options.types.split(","):
        suffix = "-imatrix" if importances else ""
        _write(options.model, options.out / f"{name}{suffix}", name, library, importances)
    return 0


def quantized(rows: np.ndarray, name: str, library: ctypes.CDLL, importance: np.ndarray | None) -> np.ndarray:
    """float32 [N, K]: a matrix in a type of ggml, dequantized.

    Args:
        rows: float32 [N, K]; N K is a multiple of the type's block, and K divides the block or is a multiple of it.
        name: the type, such as "Q2_K".
        library: libggml-base.
        importance: float32 [K], the mean square of each input; None without a matrix.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    N, K = rows.shape
    width = math.lcm(K, block)
    source = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, width)
    weights = None if importance is None else np.ascontiguousarray(np.tile(importance, width // K), dtype=np.float32)
    codes = np.zeros((len(source), width // block * size), np.uint8)
    written = library.ggml_quantize_chunk(
        ctypes.c_int(kind.value),
        source.ctypes.data_as(ctypes.c_void_p),
        codes.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(len(source)),
        ctypes.c_int64(width),
        None if weights is None else weights.ctypes.data_as(ctypes.c_void_p),
    )
    assert written == codes.nbytes
    return dequantize(codes, kind).reshape(N, K)


def _importances(path: Path) -> dict[str, np.ndarray]:
    """float32 [E, K] by the name of a tensor in the matrix's file."""
    from gguf import GGUFReader

    arrays = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(path).tensors}
    ends = (".in_sum2", ".counts")
    names = [name.removesuffix(ends[0]) for name in arrays if name.endswith(ends[0])]
    return {name: arrays[name + ends[0]] / np.maximum(arrays[name + ends[1]], 1) for name in names}


def _write(model: Path, folder: Path, name: str, library: ctypes.CDLL, importances: dict[str, np.ndarray]) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from safetensors.torch import save_file

    from dbrx_q.checkpoint.layout import TensorFormat, kind_of, oriented
    from dbrx_q.sources.open_weights import open_weights

    folder.mkdir(parents=True)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    others = TensorFormat("int8", 64)
    tensors: dict[str, torch.Tensor] = {}
    bits: dict[str, float] = {}
    with open_weights(model) as weights:
        for tensor in weights.tensors.values():
            wide, kind = weights.read(tensor.name).float(), kind_of(tensor.name)
            if tensor.experts:
                importance = importances.get(f"blk.{tensor.layer}.{_IMATRIX_NAMES[tensor.role]}.weight")
                matrices = oriented(wide, tensor)
                for expert, matrix in enumerate(matrices):
                    values = quantized(matrix.numpy(), name, library, None if importance is None else importance[expert])
                    matrix.copy_(torch.from_numpy(values))
                bits[tensor.role] = 8 * size / block
            elif kind in ("attention", "embedding", "head"):
                wide = others.record.dequantize(others.record.quantize(wide, others.group_size))
                bits[tensor.role] = _INT8_BITS
            tensors[tensor.name] = wide.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / file, folder / file)
    (folder / TYPE_FILE).write_text(json.dumps({"type": name, "imatrix": bool(importances), "bits": bits}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

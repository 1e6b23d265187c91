"""Converts and quantizes with llama.cpp, and writes what its C code dequantizes: `gguf_files.py LLAMA_CPP OUT`.

LLAMA_CPP is llama.cpp's source folder with `build/bin/llama-quantize` and `build/bin/llama-gguf-split`.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from source import make_source

REFERENCE_ROWS = 16
NARROW = {
    "token_embd": "q8_0",
    "output": "q5_1",
    "blk.0.attn_qkv": "q4_1",
    "blk.0.attn_output": "q5_1",
    "blk.0.ffn_gate_exps": "q4_0",
    "blk.0.ffn_up_exps": "q4_1",
    "blk.0.ffn_down_exps": "iq4_nl",
    "blk.1.attn_qkv": "q8_0",
    "blk.1.attn_output": "q5_0",
    "blk.1.ffn_gate_exps": "mxfp4",
    "blk.1.ffn_up_exps": "nvfp4",
    "blk.1.ffn_down_exps": "q4_0",
}
"""Tensors of the narrow source to types of blocks of 32 or 64 weights."""
WIDE = {
    "token_embd": "q2_k",
    "output": "q6_k",
    "blk.0.attn_qkv": "q6_k",
    "blk.0.attn_output": "iq3_s",
    "blk.0.ffn_gate_exps": "q4_k",
    "blk.0.ffn_up_exps": "q5_k",
    "blk.0.ffn_down_exps": "iq4_xs",
}
"""Tensors of the wide source to types of blocks of 256 weights."""

CONVERT = """
import sys
sys.path[:0] = [{root!r} + "/gguf-py", {root!r}]
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "dbrx"  # it knows the tokenizers of published models alone
sys.argv[1:] = [{source!r}, "--outfile", {out!r}, "--outtype", "bf16"]
convert_hf_to_gguf.main()
"""


class TypeTraits(ctypes.Structure):
    """`ggml_type_traits` of ggml.h, as far as `to_float`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def convert(llama: Path, source: Path, out: Path) -> None:
    """A published checkpoint as bfloat16 GGUF, by llama.cpp's converter."""
    script = CONVERT.format(root=str(llama), source=str(source), out=str(out))
    subprocess.run([sys.executable, "-c", script], check=True)


def quantize(llama: Path, source: Path, out: Path, types: dict[str, str]) -> None:
    """`llama-quantize` with a type for each tensor."""
    options = [f"--{kind}-type={types[name]}" for kind, name in (("token-embedding", "token_embd"), ("output-tensor", "output"))]
    options = [part for option in options for part in option.split("=")]
    for name, kind in types.items():
        if name.startswith("blk."):
            options += ["--tensor-type", f"{name}={kind}"]
    subprocess.run([str(llama / "build/bin/llama-quantize"), *options, str(source), str(out), "Q8_0", "1"], check=True)


def reference(llama: Path, file: Path) -> dict[str, np.ndarray]:
    """The first rows of every quantized tensor, dequantized by ggml's C code."""
    library = ctypes.CDLL(str(llama / "build/bin/libggml-base.so"))
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    rows = {}
    for tensor in GGUFReader(file).tensors:
        traits = library.ggml_get_type_traits(int(tensor.tensor_type)).contents
        if traits.is_quantized:
            data = np.ascontiguousarray(tensor.data.reshape(-1, tensor.data.shape[-1])[-REFERENCE_ROWS:])  # of the last expert
            out = np.empty((REFERENCE_ROWS, int(tensor.shape[0])), np.float32)
            traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
            rows[tensor.name] = out
    return rows


def main(llama: Path, out: Path) -> None:
    """Write `gguf-blocks-of-32`, a split file, and `gguf-blocks-of-256`."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, types in (("gguf-blocks-of-32", NARROW), ("gguf-blocks-of-256", WIDE)):
            plain, whole = work / f"{name}.bf16.gguf", work / "dbrx-tiny.gguf"
            make_source(work / name, wide=types is WIDE)
            convert(llama, work / name, plain)
            quantize(llama, plain, whole, types)
            (out / name).mkdir(parents=True)
            np.savez_compressed(out / name / "reference.npz", **reference(llama, whole))
            if types is NARROW:
                split = [str(llama / "build/bin/llama-gguf-split"), "--split-max-tensors", "8", str(whole), str(out / name / "dbrx-tiny")]
                subprocess.run(split, check=True)
            else:
                whole.rename(out / name / "dbrx-tiny.gguf")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:3]))

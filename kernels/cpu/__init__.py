"""Compiled code for the CPU: numba functions around vector instructions that are written in LLVM IR.

Begin with `linear.py`, the product with a quantized weight, and `choice.py`, which picks one of its three regimes: integer products,
AMX tiles, or rows of the weight dequantized for a library's matmul. `format_kernels.py` lists the formats that have code.

- `moe.py`: the experts of a layer, through the same products.
- `integer.py`: exact products of packed codes and quantized activations. `integer_tiles.py`: their inner loops. `row_codes.py`: sixteen
  rows decoded for them. `activations.py`: activations as integers of 8 or 16 bits. `addresses.py`: memory as addresses.
- `trellis.py`: products with trellis weights, through `integer.py`. `trellis_tiles.py`: their inner loops. `trellis_decode.py`: streams
  decoded in registers. `rotation.py`: activations rotated and quantized for them.
- `int4.py`, `int8.py`: rows dequantized into a tile.
- `float32.py`: plain float32 products by torch's matmul or by oneDNN, whichever is faster on this chip.
- `attention.py`: few new tokens attend to a KV cache as it is stored; `attention_chunks.py`: the vector code for a part of the cache.
- `amx.py`: bfloat16 products in the tiles of Intel's matrix unit.
- `repack_gguf.py`: GGUF's blocks as weights of our formats. `repack_codes.py`: packed codes of other programs in other orders.
- `quantize.py`: weights quantized to int4, q4_0 and int8 in one pass.
- `search.py`: the grid searches, with each group of a weight in the first-level cache.
- `rounding.py`: the column loops of GPTQ and coordinate descent.
- `viterbi.py`: the search of trellis streams, alone or with GPTQ's feedback; `viterbi_steps.py`: the vector code of one position.
- `compiled.py`: the decorator of all numba functions, which keeps compiled code on the disk where it can.
- `vector.py`: building blocks in LLVM IR, and what this chip can do.
- `lanes.py`: sixteen float32 values as one value of a numba function.
"""

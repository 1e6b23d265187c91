"""The formats of weights and of KV caches: bit layouts, quantization and dequantization in plain torch.

Begin with `format.py`, the record that describes a weight format, and `registry.py`, which lists the records. Everything that depends on
the format of a weight (checkpoint layout, quantization methods, command line, kernels) reads the record. Each weight format has a file:

- `int4.py`: 4-bit codes with a scale and a zero-point per group.
- `int2_int3.py`: 3-bit or 2-bit codes with a scale and a zero-point per group.
- `int8.py`: 8-bit codes with a scale per group.
- `affine.py`: 4-bit or 8-bit codes with a scale and an offset per group, both float16 or both bfloat16.
- `q4_0.py`: int4 with zero-points of 7 and 8, which llama.cpp's Q4_0 holds.
- `nf4.py`: the NormalFloat4 of bitsandbytes, with and without double quantization.
- `trellis.py`: 2, 3 or 4 bits by trellis codes, of a weight whose inputs are rotated. `trellis_codes.py` has the codes, `rotation.py` the
  rotation, `viterbi.py` the search for the best stream.

Shared by all:

- `quantized_weight.py`: the base class of a quantized weight.
- `weights.py`: `Weight`, plain or quantized, and `dequantize` for both.
- `expert_weights.py`: the experts of a layer, and the decision of a router.
- `groups.py`: groups along the reduction axis, and the checks of weights and scales.
- `kv.py`: the formats of a KV cache.
- `errors.py`: `FormatError`, raised for a tensor that a format cannot represent.
- `cache_folders.py`: where compiled kernels are kept if the usual folder cannot be written; `cpu/` and `triton/` import it.
- `user_cache.py`: the folder of the user's cache in which measurements of this machine and hashes of files are kept.
"""

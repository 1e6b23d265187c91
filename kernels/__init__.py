"""The weight formats and the operations on them. This package knows tensors and formats, but no model, layer or file.

Begin with `formats/`, which defines how weights and KV caches are stored, and `backend.py`, which picks the implementation of an operation
from the device: Triton on a GPU (`triton/`), compiled vector code on the CPU (`cpu/`), or the float32 reference.

Every operation has one file here, with its documentation, the choice of the backend and its reference in torch:

- `linear.py`: the product with a weight of any format.
- `moe.py`: the experts of a layer.
- `attention.py`: causal attention, with or without a KV cache; `flash_attention.py` calls the flash-attn package for it.
- `qkv.py`: rotated queries, keys and values from the output of Wqkv, stored in the cache.
- `router.py`: which experts a token is sent to.
- `norm.py`: residual add and LayerNorm.

For the quantizer:

- `quantize.py`: quantizes a weight to any format, to nearest or on a given grid.
- `grid_search.py`: the scales and zero-points of least error.
- `rounding.py`: the column loops of GPTQ and of coordinate descent.
- `trellis.py`: the streams of trellis formats, alone or with GPTQ's feedback.
"""

"""The weight formats and the operations on them. It knows tensors and formats, never a model, a layer or a file.

Begin with `formats/`, which defines how weights and KV caches are stored, and `backend.py`, which picks the implementation of an operation
from the device: Triton on a GPU (`triton/`), compiled vector code on the CPU (`cpu/`), or the float32 reference.

Every operation has one file here, with its documentation, the choice of the backend and its reference in torch:

- `linear.py`: the product with a weight of any format.
- `moe.py`: the experts of a layer.
- `attention.py`: causal attention, with or without a KV cache.
- `qkv.py`: rotated queries, keys and values from the output of Wqkv, stored in the cache.
- `router.py`: which experts a token is sent to.
- `norm.py`: residual add and LayerNorm.

The quantizer uses the others:

- `quantize.py`: a weight in any format, to nearest or on a given grid.
- `grid_search.py`: scales and zero-points of least error.
- `rounding.py`: the column loops of GPTQ and of coordinate descent.
"""

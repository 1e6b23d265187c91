"""The quantization methods, each of which quantizes one matrix.

Begin with `choose.py`, the methods by name: each takes a matrix, a format and, if it is calibrated, the moments of the matrix's inputs.

- `rtn.py`: round to nearest, on the grid of each group's range.
- `hqq.py`: grids by half-quadratic quantization.
- `awq.py`: column scales by the size of the inputs.
- `gptq.py`: GPTQ, block by block of columns; the loop over columns, whose errors the following ones compensate, is the op
  `dbrx_q.kernels.rounding`.
- `trellis.py`: trellis formats: the search for streams, within GPTQ or without data.
- `refine.py`: better scales and codes for a quantized matrix.

Shared by the methods:

- `grid.py`: the values that a format offers to each group, and the search for the grid of least error.
- `moments.py`: the statistics of a matrix's inputs, with the Hessian.
- `shrinkage.py`: how far a text is believed: damping and weights of sources by cross-validation. `folds.py`: the moments with them.
- `factor.py`: the factor of the inverse Hessian, for GPTQ.
- `products.py`: large matrix products on the CPU or a GPU.
- `workers.py`: threads whose number does not change a result.
"""

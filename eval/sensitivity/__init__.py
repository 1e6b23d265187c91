"""Measures how much a model loses if one part of it is quantized: `dbrx-q sensitivity`.

Begin with `measure.py`: it divides a model into units (tensors, layers or kinds), measures each in each format, and saves every figure as
soon as it is computed.

- `walk.py` runs the model block by block, so that a unit starts from the first block that it changes and not from the embedding.
- `rounding.py` quantizes one weight and dequantizes it again, and measures the error of its values.
- `report.py` writes the table, the plot and the files of a report.

The results are the input of programs that assign formats to tensors; `result.py` documents the JSON object.
"""

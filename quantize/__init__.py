"""The offline quantizer: from a plain DBRX checkpoint to a packed one, in memory that does not depend on the model's size.

Begin with `pipeline/run.py`: its function `quantize_checkpoint` is all that `dbrx-q quantize` calls. It takes one matrix after the other
in the order of the model; `calibration` supplies the statistics of the matrix's inputs, a method of `methods` turns matrix and
statistics into packed rows, and `pipeline` writes them into a shard and notes in a journal that the tensor is finished.

- `methods/`: the quantization methods, rtn, clip, hqq, awq, gptq and best: pure functions from a matrix [N, K], a format and, for the
  calibrated ones, moments of its inputs to packed rows. They know no files and no model.
- `calibration/`: runs the tokens of a text through the model layer by layer and computes those moments. It also measures the error that
  each format causes in each tensor, and allocates formats within a number of bits per weight (`--target-bpw`).
- `pipeline/`: requests, formats by tensor, the plan of memory and disk, the run that can be killed and resumed, the report and the
  model card.

Two terms that are easy to confuse: a *quantization method* (`--method`) says how a weight is rounded; a *format* (`--format`, `--tensor`)
says how the result is stored. The assignment of formats to tensors is made in `pipeline/format_assignment.py`.
"""

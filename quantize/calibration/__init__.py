"""What the tokens of a text tell about the inputs of each matrix, and which formats its errors allow.

Begin with `calibrated.py`. Its class `Calibration` runs the tokens through the quantized model so far and, for methods that compare the
two, through the original one. For each matrix, in the order of the model:

1. `Calibration.fit` computes the moments of the inputs (`dbrx_q.quantize.methods.moments`), to which a method fits the matrix;
2. `Calibration.advance` takes the quantized matrix and computes the inputs of the next one.

The steps of a block are functions of `dbrx_q.model.block`, which the model shares.

- `sources.py`: several sources with weights, the sequences that are drawn of each, and those that are held out.
- `sequences.py`: windows of one text. `sequence_file.py`: a file of sequences that calibrate as they are.
- `activations.py`: the activations of all tokens, in memory or in a file.
- `attention.py`: attention of all sequences, shared between threads.
- `forward.py`: runs tokens through several forms of a model at once, with snapshots from which an interrupted run resumes.
- `calibrated.py`: the calibration itself, which derives from it.
- `held_out.py`: held-out tokens beside it, in the original, the quantized and a model that is rounded to nearest.
- `divergence.py`: KL divergence of such models, from some rows of the head at a time.
- `output_errors.py`: the error at the end of the model when one tensor is rounded to one format; it needs no calibration run.
- `allocation.py`: the formats with the least sum of such errors within a number of bits, a knapsack problem.
"""

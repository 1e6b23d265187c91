"""Writes a checkpoint in the layouts of other programs: GGUF for llama.cpp, MLX, and plain weights for transformers.

Begin with `target.py`: a `Target` plans what becomes of each tensor, and writes the weights.

- `target.py`: the interface of a layout with its options.
- `gguf.py`: a GGUF file, or the parts of a split one, tensor by tensor.
- `gguf_types.py`: the types of GGUF that are written: the blocks of each, and the formats of ours that it holds exactly.
- `gguf_metadata.py`: the metadata that llama.cpp's converter writes for DBRX, with the tokenizer.
- `mlx.py`: what mlx-lm reads: experts as linear layers, in the affine mode.
- `transformers.py`: plain weights under the published names, dequantized.
- `pieces.py`: a tensor in pieces that bound the memory: an expert, or some rows.
- `small_files.py`: tokenizer, generation settings and licence.
- `record.py`: what an export has written.

No file here chooses codes. Where the source does not hold what a type needs, `quantize.pipeline` first rounds the source into a checkpoint
whose formats the type holds exactly, and that checkpoint is exported.
"""

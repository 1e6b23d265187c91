"""Checkpoints of every program that a command can open: dbrx_q's own, transformers', llama.cpp's, MLX's, and those of GPTQ, AWQ and
bitsandbytes.

Two views of a checkpoint: `open_weights` gives `StoredWeights` to commands that read tensors in pieces (quantize, plan, inspect, export);
`open_source` and `open_runnable` give a `Source` to commands that measure or run a model: configuration, format, size, tokenizer, and
`load`, which makes a model. Begin with `base.py`, `open_weights.py` and `open.py`.

- `base.py`: `Source`, the interface. `open.py`: `open_source`, `open_runnable`, and a location's tokenizer.
- `locations.py`: a path or a name on the hub becomes a folder or a GGUF file.
- `open_weights.py`: `open_weights`, and what `plan` and `inspect` read without downloading weights.
- `folder.py`: folders as a `Source`, of the published layout or of another program. `folder_weights.py` reads those of other programs:
  `naming.py` has the names of their layers, `encodings/` how each layer is stored.
- `kept_formats.py`: which tensors a format of ours holds exactly, and the name of a checkpoint's format.
- `gguf.py`: GGUF files of DBRX as a `Source`; `gguf_weights.py` reads their weights in pieces. `gguf_file.py` opens one file or the parts
  of a split one, `gguf_header.py` reads the header of one, `gguf_names.py` maps the layout's tensor names to GGUF's, `gguf_config.py` and
  `gguf_tokenizer.py` build configuration and tokenizer from the metadata, `gguf_keys.py` says which other keys are read or refused.
- `streamed.py`: `ConvertedSource`, the base of all of other programs: tensors that a format holds exactly stay packed, the others are
  dequantized; a model that does not fit in memory reads its experts layer by layer.
- `tokenizers_agree.py`: refuses to compare checkpoints whose tokenizers differ.
"""

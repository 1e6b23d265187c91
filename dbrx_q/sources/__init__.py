"""Checkpoints of every program that a command can open: dbrx_q's own, transformers', bitsandbytes' and llama.cpp's.

A command that measures or compares calls `open_source` with a path or a hub id and gets a `Source`: the model's configuration, the
format and size of its weights, their SHA-256, the tokenizer, and `load`, which makes a model of them. Begin with `base.py`, the
interface, and `open.py`, which looks at the path and chooses the class.

- `base.py`: `Source`, the interface.
- `open.py`: `open_source`.
- `folder.py`: folders of safetensors files, quantized by dbrx_q (they stay packed in memory) or saved by transformers.
- `bitsandbytes_state.py`: 4-bit tensors in such a folder, with the statistics that bitsandbytes saves beside them.
- `gguf.py`: GGUF files of DBRX as a `Source`; `gguf_weights.py` reads their weights in pieces. `gguf_file.py` opens one file or the parts
  of a split one, `gguf_header.py` reads the header of one, `gguf_names.py` maps the layout's tensor names to GGUF's, `gguf_config.py` and
  `gguf_tokenizer.py` build configuration and tokenizer from the metadata, `gguf_keys.py` says which other keys are read or refused.
- `streamed.py`: `DequantizedSource`, the base of all whose weights are dequantized while they are loaded, by the library of the program
  that wrote them; a model that does not fit in memory dequantizes its experts layer by layer.
- `tokenizers_agree.py`: refuses to compare checkpoints whose tokenizers differ.

To add a format of another program, write a subclass of `DequantizedSource` with a `reader`, and let `open.py` recognize its files.
"""

"""How other programs store the weight of one linear layer in safetensors files, and which format of ours holds the same values.

`folder_weights.py`, beside this folder, finds the stored parts of every layer by their names, asks the `Encoding` of the checkpoint to
check them, and then either dequantizes a layer or, where a format holds its values exactly, repacks its codes without rounding. Begin
with `base.py`.

- `base.py`: `Encoding`, the interface, and `StoredLinear`, what headers say about a layer.
- `choose.py`: which encodings a checkpoint may have, by its config.json; it refuses all others with advice.
- `plain.py`: a float weight as it is.
- `gptq.py`: AutoGPTQ and GPTQModel. `awq.py`: AutoAWQ's GEMM order. `mlx.py`: mlx-lm. `bitsandbytes.py`: its 4 bits.
- `exact_groups.py`: the groups of ours that stored groups are divided into.

`kernels/cpu/repack_codes.py` reorders codes. Formulas and layouts are in the modules' docstrings, so that another program can be written
from them. GGUF files are read by `gguf_weights.py`, beside this folder.

To add the format of another program, write a subclass of `Encoding` and let `choose.py` recognize it by config.json.
"""

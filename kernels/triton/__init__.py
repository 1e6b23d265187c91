"""Triton kernels for NVIDIA and AMD GPUs, and for Triton's interpreter on the CPU.

Begin with `linear.py`: a launcher, which chooses tiles and passes pointers, and the kernel below it. All others have the same form.

- `linear.py`: the product with a weight.
- `moe_decode.py`, `moe_prefill.py`: the experts of a layer, for few and for many tokens.
- `attention_decode.py`, `attention_prefill.py`: attention over a KV cache, for one new token per sequence and for many.
- `qkv.py`, `router.py`, `norm.py`: the operations of the same names. `norm_route.py`: norm and router of few tokens in one kernel.
- `viterbi.py`: the search of the trellis formats, for quantization.

Shared by the kernels:

- `codes.py`: the numbers of the formats that have code.
- `weights.py`: quantized weights, dequantized in registers, and the product with a tile of activations.
- `trellis.py`: the levels of trellis-coded weights in registers, and the rotation of activations.
- `batch_dot.py`: the product of int4 and int8 weights with few tokens, each warp with groups of its own.
- `group_dot.py`: sums of int4 experts with few tokens; zero-points and scales enter once per group.
- `arrival.py`: the counters by which the last program of a shared sum is known, and graphs with their own.
- `kv.py`: the codes of a quantized KV cache, converted in registers.

How they are launched:

- `launch.py`: the chips, and `launch`, which runs a kernel or records the call. `repeated_launch.py` and `plans.py`: the
  second launch of a kernel, and all launches of an op.
- `dependent_launch.py`: what kernels do that begin before the one before them ends.
- `tiles.py`, `attention_tiles.py`: the tile choices.
"""

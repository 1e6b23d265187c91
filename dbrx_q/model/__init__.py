"""The DBRX model: modules named as in the checkpoint, the KV cache, and loading.

Begin with `modeling.py`: `DbrxForCausalLM.from_pretrained` loads a model and `forward` runs it.

A forward pass, from the outside in:

- `modeling.py`: token ids to logits. Removes padding and runs the blocks, on several GPUs if need be. `arguments.py` reads its flags.
- `inputs.py`: checks ids, embeddings, positions and the cache of a call; `masks.py` its attention mask.
- `batch.py`: the tokens of a pass without padding, and what all layers share. `loss.py`: losses, and the columns that get logits.
- `implementations.py`: which implementation of attention runs.
- `layers.py`: the modules of a block, with plain or packed weights. Experts are asked of an expert store (`dbrx_q.experts`).
- `block.py`: the arithmetic of a block as functions, which calibration uses as well.
- `outputs.py`: what a forward pass returns: dataclasses that are dictionaries too, as in transformers.
- `rope.py`: the rotary embedding of longer contexts: linear, dynamic and YaRN scaling.
- `overflow.py`: finds logits that are not finite, and the layer where they began.
- `kv_cache.py`: keys and values of the tokens so far, plain or quantized; grows, forks and shares prefixes.
  `kv_cache_file.py`: those of a prompt in a file.

Loading:

- `pretrained.py`: `DbrxPreTrainedModel`, the base of both models: `from_pretrained` and what they share beside `forward`;
  `pretrained_arguments.py`: the arguments of transformers' `from_pretrained`; `embeddings.py`: embedding and head,
  read, replaced and resized.
- `loading.py`: a checkpoint to a model in three steps: plan, load the weights that stay in memory, build the expert store.
  `resident_weights.py` maps or reads these weights.
- `saving.py`: a model to a checkpoint, tensor by tensor; a packed model gives the bytes that `quantize` wrote.
- `generation_config.py`: defaults of `model.generate`, as generation_config.json has them.
- `limits.py`: what a budget leaves to requests: bytes of KV cache, tokens of a pass, bytes of logits.
- `devices.py`: checks a device by its name. `tuned_tiles.py`: tiles of the Triton kernels that were measured on this GPU.
"""

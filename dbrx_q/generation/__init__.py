"""From prompts to text: prefill, decode steps, sampling, streaming.

Begin with `generate.py`: `generate` runs prompts through a loaded model, `generate_text` and `stream_text` do the same for text.

One request, step by step:

1. `generate.py` checks the prompts and sizes the KV cache of each sequence within the memory that the model has left.
2. `decoding.py` chooses how sequences advance, one by one on a CPU or all together on a GPU, and prefills the prompts. A prefix that
   prompts share is computed once.
3. `sampling.py` turns the logits of a sequence into its next token, as its `SamplingParams` say.
4. `decoding.py` appends the new tokens in a decode step; on a GPU the step of a whole batch is one CUDA graph (`decode_graph.py`).
5. `growing_text.py` turns tokens into text that can be shown: whole characters, and nothing that may still become a stop string.

`tracing.py` records which experts a text uses, for `dbrx-q trace`.
"""

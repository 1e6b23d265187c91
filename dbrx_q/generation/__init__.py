"""From prompts to text: prefill, decode steps, sampling, streaming.

Two ways in, with one engine: `generate.py` (`dbrx_q.generate`: lists of prompts, text, finish reasons) and `model_generate.py`
(`model.generate`, with the arguments and outputs of transformers).

One request, step by step:

1. `generate.py`, or `arguments.py` and `inputs.py`, check the request; `generate.py` sizes the KV cache of each sequence within the
   memory that is left.
2. `decoding.py` chooses how sequences advance, together or one by one, and prefills the prompts. A prefix that
   prompts share is computed once. `forward_decoder.py` runs a whole batch through `forward` where caches or hidden states are asked for.
3. `token_loop.py` is the loop. Its tokens are chosen by `sampling.py` (`SamplingParams`), or by `logits_processors.py` and, for beams,
   `beam_search.py`; `prompt_lookup.py` copies tokens that a step then verifies. `stopping.py` ends sequences.
4. `decoding.py` appends the new tokens in a decode step; on a GPU the step of a whole batch is one CUDA graph (`decode_graph.py`),
   or one for each layer where experts move between memories (`layer_graphs.py`).
5. `growing_text.py` turns tokens into text that can be shown; `streamers.py` shows it; `outputs.py` holds what `model.generate` returns.

`sequence_sampler.py` samples many sequences at once from nothing but bos or random tokens, to calibrate a quantization with.
`tracing.py` records which experts a text uses, for `dbrx-q trace`.
"""

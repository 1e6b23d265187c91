"""What a token costs in transformers' generate with the plug-in, against `dbrx_q.generate`: side by side in one process, in turns.

    python tests/peers/decode_overhead.py CHECKPOINT [--rounds 7] [--tokens 96] [--threads 1] [--attention sdpa]

Each round decodes greedily with both, from the same prompt, and takes the time of `--tokens` tokens less that of the first. It is the
time that the process's threads compute, which other programs on the machine change little; with one thread on an idle machine it is the
time that passes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM

import dbrx_q.transformers  # noqa: F401 # registers the quantization method
from dbrx_q import DbrxForCausalLM, generate

PROMPT = list(range(5, 37))


def _per_token(decode: Callable[[int], object], tokens: int) -> float:
    """CPU milliseconds of a token, without the prompt's."""

    def seconds(count: int) -> float:
        started = time.process_time()
        decode(count)
        return time.process_time() - started

    return (seconds(tokens + 1) - seconds(1)) / tokens * 1e3


def main() -> None:
    """Print each round and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", default="sdpa")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    native = DbrxForCausalLM.from_pretrained(options.checkpoint, attn_implementation=options.attention)
    plugged = AutoModelForCausalLM.from_pretrained(options.checkpoint, attn_implementation=options.attention)
    ids = torch.tensor([PROMPT])
    few = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def ours(count: int) -> object:
        return generate(native, [PROMPT], max_new_tokens=count, eos_token_ids=[])

    def theirs(count: int) -> object:
        return plugged.generate(ids, max_new_tokens=count, min_new_tokens=count, **few)

    ours(4), theirs(4)
    ratios = []
    for number in range(options.rounds):
        order = [ours, theirs] if number % 2 == 0 else [theirs, ours]
        found = {decode: _per_token(decode, options.tokens) for decode in order}
        ratios.append(found[theirs] / found[ours])
        print(f"dbrx_q.generate {found[ours]:.3f} ms/token   transformers {found[theirs]:.3f} ms/token   ratio {ratios[-1]:.3f}")
    median = statistics.median(ratios)
    print(f"transformers {transformers.__version__}: median ratio {median:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()

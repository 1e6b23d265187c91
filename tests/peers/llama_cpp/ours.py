"""Loads a checkpoint with dbrx_q, times what a JSON object asks for, and prints the figures as JSON: `ours.py REQUEST`.

The interpreter that runs this file decides which dbrx_q is measured, so it uses public names alone. REQUEST has the keys `path`, `dtype`
(of activations; null for the checkpoint's), `threads`, `rates` (whether to measure the machine) and `tests`. A test has the keys `kind`
("prefill" or "decode"), `tokens`, `repeats` and, for decode, `batch`, `depth` and `kv`.

Prefill computes logits of every token of the prompt, as llama-bench does with `-embd 1`, in chunks of 512. Decode continues with random
tokens, as llama-bench does, and takes the most probable token of every step's logits.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from typing import Any

started = time.perf_counter()
os.environ.setdefault("DBRX_Q_DEFER_TORCH", "1")  # which the commands of dbrx-q set
importlib.import_module("dbrx_q")  # before torch

import torch  # noqa: E402 - imports are part of what `import_seconds` measures

from dbrx_q.generation.decoding import decoder_for  # noqa: E402
from dbrx_q.generation.generate import generate  # noqa: E402
from dbrx_q.model.kv_cache import KVCache  # noqa: E402
from dbrx_q.sources.open import open_source  # noqa: E402

import_seconds = time.perf_counter() - started

_CHUNK = 512  # tokens of a prefill step, as llama.cpp's physical batch


def main(request: dict[str, Any]) -> dict[str, Any]:
    """The figures that `request` asks for."""
    torch.set_num_threads(request["threads"])
    begin = time.perf_counter()
    source = open_source(request["path"])
    dtype = None if request["dtype"] is None else getattr(torch, request["dtype"])
    model = source.load(dtype=dtype, device=torch.device("cpu"))
    loaded = time.perf_counter()
    answer: dict[str, Any] = {"import_seconds": import_seconds, "load_seconds": loaded - begin, "samples": []}
    if request.get("first_token"):
        generate(model, [[1]], max_new_tokens=1, eos_token_ids=())
    answer["first_token_seconds"] = time.perf_counter() - begin
    measure = {"prefill": _prefill, "decode": _decode}
    with torch.no_grad():
        answer["samples"] = [measure[test["kind"]](model, test) for test in request["tests"]]
    answer["bits_per_weight"], answer["parameters"] = source.bits_per_weight, source.parameters
    answer["versions"] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    model.close()
    if request["rates"]:
        answer["rates"] = _rates()
    return answer


def _prefill(model: Any, test: dict[str, Any]) -> list[float]:
    """Tokens/s of each repeat, after one that does not count."""
    ids = _random_tokens(model, 1, test["tokens"])
    samples = []
    for turn in range(test["repeats"] + 1):
        cache = KVCache(model.config, 1, test["tokens"], dtype=model.dtype)
        begin = time.perf_counter()
        for chunk in ids.split(_CHUNK, dim=1):
            logits = model(chunk, past_key_values=cache, output_router_logits=False).logits
            if logits.shape[1] != chunk.shape[1]:
                sys.exit(f"prefill must compute logits of all {chunk.shape[1]} tokens, as -embd 1 does; found {logits.shape[1]}")
        if turn:
            samples.append(test["tokens"] / (time.perf_counter() - begin))
    return samples


def _decode(model: Any, test: dict[str, Any]) -> list[float]:
    """Tokens/s of all sequences together in each repeat. The cache is filled once; each repeat begins at the same depth."""
    batch, tokens, depth = test.get("batch", 1), test["tokens"], max(1, test.get("depth", 0))
    ids = _random_tokens(model, batch, depth + tokens).tolist()
    samples = []
    with decoder_for(model, [depth + tokens] * batch, test.get("kv", "plain")) as decoder:
        for sequence, row in enumerate(ids):
            decoder.prefill(sequence, row[:depth])
        decoder.step({sequence: row[depth] for sequence, row in enumerate(ids)})  # one step that does not count, as llama-bench has
        for _ in range(test["repeats"]):
            for sequence in range(batch):
                decoder.crop(sequence, depth)
            begin = time.perf_counter()
            for step in range(depth, depth + tokens):
                for logits in decoder.step({sequence: row[step] for sequence, row in enumerate(ids)}).values():
                    int(logits.argmax())
            samples.append(batch * tokens / (time.perf_counter() - begin))
    return samples


def _random_tokens(model: Any, batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))


def _rates() -> dict[str, float]:
    """The machine's rates: GB/s of a sum over one GiB, and the multiplications and additions, in 10^9 a second, of 2048 x 2048 matrices."""
    n = 2048
    memory = torch.ones((1 << 30) // 8, dtype=torch.int64)
    halves = [torch.randn(n, n).bfloat16() for _ in range(2)]
    bytes_ = [torch.randint(-127, 128, (n, n), dtype=torch.int8) for _ in range(2)]
    return {
        "read, GB/s": memory.nbytes / _seconds(memory.sum) / 1e9,
        "bfloat16 matmul, GFLOP/s": 2 * n**3 / _seconds(lambda: halves[0] @ halves[1]) / 1e9,
        "int8 matmul, GOP/s": 2 * n**3 / _seconds(lambda: torch._int_mm(*bytes_)) / 1e9,
    }


def _seconds(call: Any) -> float:
    """The median of three calls, after one that does not count."""
    samples = []
    for turn in range(4):
        begin = time.perf_counter()
        call()
        if turn:
            samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

"""Speeds of one layer of DBRX's dimensions in several formats of its experts: in one process, in turns.

    python tests/peers/format_speed.py int4:64 trellis2 trellis3 trellis4 [--prompt 512] [--tokens 24] [--turns 5] [--threads 2]

The weights are random bytes, which are valid in all formats here, so that nothing is quantized; attention and the head are int8. Decode
is the median of `--turns` turns of as many tokens, one after the other; prefill that of a prompt. The last column compares with the first
format.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from dbrx_q.checkpoint.layout import DenseTensor
from dbrx_q.eval.bench.synthetic import dbrx_layer_config
from dbrx_q.generation.decoding import decoder_for
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.model.loading import model_of_weights
from dbrx_q.model.modeling import DbrxForCausalLM

OTHERS = TensorFormat("int8", 64)


def packed(fmt: TensorFormat, *shape: int) -> Weight:
    """A weight [..., N, K] of random codes and small scales."""
    *lead, N, K = shape
    parts = {}
    for part in fmt.parts(N, K):
        if part.name == "scales":
            parts[part.name] = torch.full((*lead, *part.shape), 0.0005, dtype=part.dtype)
        else:
            octets = torch.empty(*lead, *part.shape, dtype=part.dtype)
            for piece in octets.view(torch.uint8).view(-1).split(1 << 26):
                piece.random_(0, 256)
            parts[part.name] = octets
    return fmt.load(parts)


def model_in(fmt: TensorFormat) -> DbrxForCausalLM:
    """One layer with experts in a format."""
    config = dbrx_layer_config()

    def read(tensor: DenseTensor) -> Weight:
        if tensor.experts:
            return packed(fmt, tensor.experts, *tensor.matrix)
        if tensor.role in ("Wqkv", "out_proj", "head"):
            return packed(OTHERS, *tensor.shape)
        return torch.ones(tensor.shape) if len(tensor.shape) == 1 else torch.randn(tensor.shape).mul_(0.02)

    return model_of_weights(config, read, dtype=torch.bfloat16)


def decode_seconds(model: DbrxForCausalLM, tokens: list[int]) -> float:
    """Of a token, without the first."""
    with decoder_for(model, [len(tokens)], "plain") as decoder:
        decoder.step({0: tokens[0]})
        started = time.perf_counter()
        for token in tokens[1:]:
            decoder.step({0: token})
        return (time.perf_counter() - started) / (len(tokens) - 1)


def prefill_seconds(model: DbrxForCausalLM, tokens: list[int]) -> float:
    """Of a token of a prompt whose last layer computes all tokens."""
    started = time.perf_counter()
    model(torch.tensor([tokens]))
    return (time.perf_counter() - started) / len(tokens)


def main() -> None:
    """Print a row for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="+", metavar="FORMAT")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    names = options.formats
    models = {name: model_in(TensorFormat.parse(name)) for name in names}
    seconds: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in names}
    for turn in range(options.turns + 1):
        for kind, measure, count in (("decode", decode_seconds, options.tokens), ("prefill", prefill_seconds, options.prompt)):
            if not count or (kind == "prefill" and turn > 2):
                continue
            tokens = torch.randint(0, 4096, (count,)).tolist()
            for name in names:
                elapsed = measure(models[name], tokens)
                if turn:  # the first compiles
                    seconds[name][kind].append(elapsed)
    for kind in ("decode", "prefill"):
        for name in names:
            if values := seconds[name][kind]:
                speed = [1 / statistics.median(seconds[other][kind]) for other in (name, names[0])]
                print(f"{kind:8} {name:12} {speed[0]:8.1f} tokens/s  {speed[0] / speed[1]:.2f}  least {1e3 * min(values):.2f} ms")


if __name__ == "__main__":
    main()

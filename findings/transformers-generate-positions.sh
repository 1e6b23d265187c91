#!/usr/bin/env bash
# transformers' generate and forward give tokens behind a gap in attention_mask different positions.
#
# Where zeros of the mask stand between ones, forward counts every column and generate counts the ones alone: the tokens
# behind the gap get other rotary positions, and the logits of the same ids with the same mask differ by up to half
# of the largest. Padding at the left is no such case, since rotary embeddings see differences of positions alone. No message
# says so. Position ids that are given to forward, cumsum(mask) - 1, make it agree with generate.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   transformers 5.24.0 torch 2.13.0+cpu
#   padding at the left: logits of forward and generate differ by 5.2e-07
#   a gap: logits of forward and generate differ by 4.6e-01
#   a gap, position_ids = cumsum(mask) - 1: logits of forward and generate differ by 1.2e-07
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$folder"
cat > finding.py <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", version("transformers"), "torch", torch.__version__)
torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.3)).eval()
ids = torch.arange(3, 13)[None]


def difference(mask, **arguments):
    """Largest difference of the logits for the next token, as a part of the largest logit."""
    options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    generated = model.generate(ids, attention_mask=mask, **options).logits[0]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, **arguments).logits[:, -1]
    return ((logits - generated).abs().max() / logits.abs().max()).item()


padded, gap = torch.tensor([[0] * 3 + [1] * 7]), torch.tensor([[1] * 3 + [0] * 3 + [1] * 4])
positions = (gap.cumsum(-1) - 1).clamp(min=0)
results = difference(padded), difference(gap), difference(gap, position_ids=positions)
for name, result in zip(("padding at the left", "a gap", "a gap, position_ids = cumsum(mask) - 1"), results):
    print(f"{name}: logits of forward and generate differ by {result:.1e}")
sys.exit(not (results[0] < 1e-4 and results[1] > 0.01 and results[2] < 1e-4))
PYTHON
venv/bin/python finding.py

#!/usr/bin/env bash
# transformers' DBRX reads no rope_theta from attn_config, where DBRX's config.json holds it.
#
# The published config.json has attn_config.rope_theta = 500000. DbrxConfig keeps that number but computes the rotary
# embedding with rope_parameters, whose rope_theta is always 10000: positions are encoded with other frequencies than those
# the model was trained with, which no message says. Without attn_config.rope_theta, as in the example of the DBRX
# documentation, the model cannot be built at all. A rope_parameters entry beside attn_config.rope_theta gives the right
# frequencies.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   transformers 5.24.0
#   attn_config.rope_theta 500000.0 rope_parameters {'rope_theta': 10000.0, 'rope_type': 'default'}
#   second inverse frequency 0.5623; of 500000 it would be 0.4404, of 10000 0.5623
#   DbrxModel(DbrxConfig(n_layers=2, d_model=256, n_heads=8, vocab_size=128)): AttributeError: 'DbrxAttentionConfig' object has...
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$folder"
cat > finding.py <<'PYTHON'
import sys
from importlib.metadata import version

from transformers import DbrxConfig, DbrxModel

print("transformers", version("transformers"))
shape = dict(d_model=256, n_heads=8, n_layers=2, vocab_size=128)
config = DbrxConfig(**shape, attn_config={"rope_theta": 500000.0, "clip_qkv": 8.0})
model = DbrxModel(config)
second = model.rotary_emb.inv_freq[1].item()
print("attn_config.rope_theta", config.attn_config.rope_theta, "rope_parameters", config.rope_parameters)
print(f"second inverse frequency {second:.4f}; of 500000 it would be {500000 ** (-2 / 32):.4f}, of 10000 {10000 ** (-2 / 32):.4f}")
try:
    DbrxModel(DbrxConfig(**shape))
    example = "builds"
except AttributeError as error:
    example = f"AttributeError: {error}"
print("DbrxModel(DbrxConfig(n_layers=2, d_model=256, n_heads=8, vocab_size=128)):", example)
sys.exit(abs(second - 10000 ** (-2 / 32)) > 1e-4 or "rope_theta" not in example)
PYTHON
venv/bin/python finding.py

#!/usr/bin/env bash
# transformers loads a checkpoint of an unknown quantization method with random weights.
#
# Where config.json names a quant_method that transformers does not know, from_pretrained logs a warning, treats the
# checkpoint as a plain one, initialises every weight whose name it does not find at random and logs their names. It raises
# nothing and returns a model that generates noise. A program that must not run such a model has to look at the missing
# keys itself (output_loading_info=True).
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   transformers 5.24.0 torch 2.13.0+cpu
#   from_pretrained returned a LlamaForCausalLM; 7 weights were not in the file
#   model.layers.0.mlp.down_proj.weight equals the stored values: False ; two loads agree: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 safetensors==0.8.0
cd "$folder"
cat > finding.py <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print("transformers", version("transformers"), "torch", torch.__version__)
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=128)
LlamaForCausalLM(config).save_pretrained("packed")
tensors = load_file("packed/model.safetensors")
packed = {name.replace("_proj.weight", "_proj.qweight"): tensor for name, tensor in tensors.items()}
save_file(packed, "packed/model.safetensors", metadata={"format": "pt"})
path = Path("packed/config.json")
path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "packed_by_another_program"}}))

first, info = AutoModelForCausalLM.from_pretrained("packed", output_loading_info=True)
second = AutoModelForCausalLM.from_pretrained("packed")
name = "model.layers.0.mlp.down_proj.weight"
weights = [model.state_dict()[name] for model in (first, second)]
stored = packed[name.replace(".weight", ".qweight")]
print(f"from_pretrained returned a {type(first).__name__}; {len(info['missing_keys'])} weights were not in the file")
print(name, "equals the stored values:", torch.equal(weights[0], stored), "; two loads agree:", torch.equal(*weights))
sys.exit(torch.equal(weights[0], stored) or torch.equal(*weights))
PYTHON
venv/bin/python finding.py

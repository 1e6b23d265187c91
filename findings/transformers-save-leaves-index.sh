#!/usr/bin/env bash
# save_pretrained over a sharded checkpoint deletes the shards and leaves the index that names them.
#
# A model that was saved in several shards and is saved again in one file leaves a folder with model.safetensors and the old
# model.safetensors.index.json, whose shards are gone. transformers itself then reads the single file. A program that
# looks for the index first, as the format of sharded checkpoints suggests, finds that all shards are missing.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   transformers 5.24.0
#   saved with max_shard_size=100KB: model-00001-of-00004.safetensors model-00002-of-00004.safetensors model-00003-of-00004.saf...
#   saved with max_shard_size=5GB: model.safetensors model.safetensors.index.json
#   the index names 4 shards, of which 4 are missing
#   transformers loads the folder
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$folder"
cat > finding.py <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print("transformers", version("transformers"))
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
model, folder = LlamaForCausalLM(config), Path("model")
for size in ("100KB", "5GB"):
    model.save_pretrained(folder, max_shard_size=size)
    print(f"saved with max_shard_size={size}:", *sorted(path.name for path in folder.glob("model*")))
shards = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
missing = sorted(name for name in shards if not (folder / name).exists())
print(f"the index names {len(shards)} shards, of which {len(missing)} are missing")
AutoModelForCausalLM.from_pretrained(folder)
print("transformers loads the folder")
sys.exit(not missing or len(missing) != len(shards))
PYTHON
venv/bin/python finding.py

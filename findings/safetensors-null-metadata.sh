#!/usr/bin/env bash
# safetensors reads a file whose header says "__metadata__": null.
#
# The format calls __metadata__ a map of strings to strings, and the package refuses a number, a list or a map with a number in
# it. It accepts null, as if the key were absent. Another reader that follows the description to the letter refuses files
# that every user of the package can open.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   safetensors 0.8.0
#   "__metadata__": {"format": "np"}: x = [1.5], metadata() = {'format': 'np'}
#   "__metadata__": null: x = [1.5], metadata() = None
#   "__metadata__": 1: refused: Error while deserializing header: invalid JSON in header: invalid type: integer `1`, expected a...
#   "__metadata__": []: refused: Error while deserializing header: invalid JSON in header: invalid type: sequence, expected a m...
#   "__metadata__": {"format": 1}: refused: Error while deserializing header: invalid JSON in header: invalid type: integer `1`...
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$folder"
cat > finding.py <<'PYTHON'
import json
import struct
import sys
from importlib.metadata import version

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

print("safetensors", version("safetensors"))
accepted = []
for metadata in ({"format": "np"}, None, 1, [], {"format": 1}):
    header = json.dumps({"__metadata__": metadata, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    with open("x.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.5))
    try:
        value = load_file("x.safetensors")["x"]
        with safe_open("x.safetensors", "np") as opened:
            result = f"x = {value}, metadata() = {opened.metadata()}"
        accepted.append(metadata)
    except SafetensorError as error:
        result = f"refused: {error}"
    print(f'"__metadata__": {json.dumps(metadata)}: {result}'[:140])
sys.exit(accepted != [{"format": "np"}, None])
PYTHON
venv/bin/python finding.py

#!/usr/bin/env bash
# tiktoken drops the text that its split pattern does not match.
#
# Encoding.encode cuts a text into the matches of pat_str and encodes those. Characters between two matches get no token and no
# message: decode(encode(text)) is not the text. The patterns of the published encodings match everything, so it shows only
# with a pattern that was written or converted for another library, such as Hugging Face's tokenizers, whose Split keeps what
# is between the matches.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   tiktoken 0.14.0 tokenizers 0.23.3
#   pattern [a-z]+|\s+, text 'call 911 now!'
#   tiktoken gives back 'call  now'; tokenizers cuts it into ['call', ' ', '911', ' ', 'now', '!']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tiktoken==0.14.0 tokenizers==0.23.3
cd "$folder"
cat > finding.py <<'PYTHON'
import sys
from importlib.metadata import version

import tiktoken
from tokenizers import Regex, pre_tokenizers

print("tiktoken", version("tiktoken"), "tokenizers", version("tokenizers"))
PATTERN, TEXT = r"[a-z]+|\s+", "call 911 now!"
encoding = tiktoken.Encoding("letters", pat_str=PATTERN, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
returned = encoding.decode(encoding.encode(TEXT))
pieces = [piece for piece, _ in pre_tokenizers.Split(Regex(PATTERN), "isolated").pre_tokenize_str(TEXT)]
print(f"pattern {PATTERN}, text {TEXT!r}")
print(f"tiktoken gives back {returned!r}; tokenizers cuts it into {pieces}")
sys.exit(returned != "call  now" or "".join(pieces) != TEXT)
PYTHON
venv/bin/python finding.py

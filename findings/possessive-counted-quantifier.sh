#!/usr/bin/env bash
# "{1,3}+" means one thing in tiktoken's regular expressions and another in those of Hugging Face's tokenizers.
#
# tiktoken's pattern of cl100k_base writes numbers as \p{N}{1,3}+, where the plus makes the quantifier possessive: at most three
# digits a piece. tokenizers (Oniguruma) reads the plus after a counted quantifier as "once or more": any number of digits a
# piece. Copied from one library to the other, the pattern gives other tokens for every number of four digits and more. The
# possessive forms ?+, ++ and *+ mean the same in both; without the plus \p{N}{1,3} does, too.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   tiktoken 0.14.0 tokenizers 0.23.3
#   \p{N}{1,3}: tiktoken ['123', '456', '7'], tokenizers ['123', '456', '7']
#   \p{N}{1,3}+: tiktoken ['123', '456', '7'], tokenizers ['1234567']
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
TEXT = "1234567"
pieces = {}
for pattern in (r"\p{N}{1,3}", r"\p{N}{1,3}+"):
    # One token for every run of digits of TEXT, so that tiktoken's tokens are its pieces.
    runs = {TEXT[i:j] for i in range(len(TEXT)) for j in range(i + 1, len(TEXT) + 1)}
    ranks = {run.encode(): rank for rank, run in enumerate(sorted(runs, key=lambda run: (len(run), run)))}
    encoding = tiktoken.Encoding("digits", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    by_tiktoken = [encoding.decode([token]) for token in encoding.encode(TEXT)]
    by_tokenizers = [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(TEXT)]
    pieces[pattern] = by_tiktoken, by_tokenizers
    print(f"{pattern}: tiktoken {by_tiktoken}, tokenizers {by_tokenizers}")
threes = ["123", "456", "7"]
sys.exit(list(pieces.values()) != [(threes, threes), (threes, [TEXT])])
PYTHON
venv/bin/python finding.py

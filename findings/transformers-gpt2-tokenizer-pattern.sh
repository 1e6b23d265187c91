#!/usr/bin/env bash
# AutoTokenizer replaces the split pattern of a tokenizer.json whose tokenizer_config.json says GPT2Tokenizer.
#
# DBRX's tokenizer is cl100k_base, saved as a tokenizer.json with cl100k's pattern and the class GPT2Tokenizer. In transformers 5
# that class builds its own pre-tokenizer, with GPT-2's pattern, and takes the vocabulary and merges alone from the file. The
# ids differ from those that the model was trained with, which no message says. PreTrainedTokenizerFast takes the file as it is.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   transformers 5.24.0 tokenizers 0.23.3
#   AutoTokenizer: a GPT2Tokenizer that cuts "1234567 they'LL" into ['1234567', 'Ġthey', "'", 'LL']
#   PreTrainedTokenizerFast: a TokenizersBackend that cuts "1234567 they'LL" into ['123', '456', '7', 'Ġthey', "'LL"]
#   the file's own pattern: ['123', '456', '7', 'Ġthey', "'LL"]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
cat > finding.py <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
tokenizer = Tokenizer(models.BPE())
split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
tokenizer.decoder = decoders.ByteLevel()
text = "In 2024 it counted 1234567 tokens; they'LL see.\n\n\n"
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator([text] * 9, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
folder = Path("tokenizer")
folder.mkdir()
tokenizer.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))

pieces = {}
for loader in (AutoTokenizer, PreTrainedTokenizerFast):
    loaded = loader.from_pretrained(folder)
    pieces[loader] = [piece for piece, _ in loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234567 they'LL")]
    name = "AutoTokenizer" if loader is AutoTokenizer else "PreTrainedTokenizerFast"
    print(f"{name}: a {type(loaded).__name__} that cuts \"1234567 they'LL\" into {pieces[loader]}")
expected = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("1234567 they'LL")]
print("the file's own pattern:", expected)
sys.exit(pieces[AutoTokenizer] == expected or pieces[PreTrainedTokenizerFast] != expected)
PYTHON
venv/bin/python finding.py

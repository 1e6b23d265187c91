"""DBRX's tokenizer, chat templates included, on tiktoken's engine.

Begin with `tokenizer.py`: `DbrxTokenizer.from_pretrained` reads a checkpoint's files and offers `encode`, `decode`, `batch_encode`, a
`StreamDecoder` and `apply_chat_template`.

- `tokenizer.py`: `DbrxTokenizer` and what it returns.
- `bpe_file.py`: reads tokenizer.json and refuses every file that tiktoken would encode otherwise than the `tokenizers` library.
- `tokenizer_config.py`: reads tokenizer_config.json: named tokens, added tokens, the chat template, and the name of a tiktoken encoding.
- `chat_template.py`: renders a chat template in a sandbox and tells the template's special tokens from text that spells one.

The tokenizer of a GGUF file is built in `dbrx_q/sources/gguf_tokenizer.py`.
"""

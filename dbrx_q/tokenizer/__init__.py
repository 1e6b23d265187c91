"""DBRX's tokenizer, chat templates included, on tiktoken's engine, with the interface of transformers' tokenizers.

Begin with `tokenizer.py`: `DbrxTokenizer.from_pretrained` reads a checkpoint's files. A tokenizer is called with texts, decodes ids, and
makes the prompt of a chat; each of its base classes adds one part:

- `tokenizer.py`: `DbrxTokenizer`, reading and saving, and `StreamDecoder`.
- `chat.py`: `apply_chat_template`, and the token that ends a turn.
- `text_calls.py`: calls, `encode`, `pad`, `decode` and `convert_*`; `call.py` has their options, truncation and padding, and
  `batch_encoding.py` the mapping that they return.
- `special_tokens.py`: named tokens such as `eos_token`, and tokens that a user adds.

Below them:

- `vocabulary.py`: the tokens, immutable: text to ids, ids to bytes, spellings, offsets.
- `bpe_file.py`: reads tokenizer.json and refuses every file that tiktoken would encode otherwise than the `tokenizers` library.
- `tokenizer_config.py`: reads tokenizer_config.json: named tokens, added tokens, settings, chat templates, the name of a tiktoken encoding.
- `saving.py`: writes both, so that transformers reads the same ids; `copying.py` copies them into a quantized checkpoint.
- `chat_template.py`: renders a chat template and tells the template's special tokens from text that spells one.
- `chat_messages.py` checks messages and tools; `template_environment.py` is Jinja's sandbox with bounds on output and time.

The tokenizer of a GGUF file is built in `dbrx_q/sources/gguf_tokenizer.py`.
"""

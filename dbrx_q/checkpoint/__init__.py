"""Checkpoints on disk and on the hub: folders of safetensors shards with a config.json, plain or quantized by dbrx_q.

Begin with `folder.py`: `Checkpoint` opens a folder or a `ShardSource`, checks that exactly the tensors that config.json calls for are
stored, with their shapes and dtypes, and reads them one by one.

- `layout.py`: the names, shapes, kinds and orientations of DBRX's tensors, and the stored parts of a packed one.
- `stored_weights.py`: `StoredWeights`, the interface of a checkpoint of any program, which `sources/` has for those of others;
  `sharded_weights.py`: its part for shards of any layout.
- `folder.py`: `Checkpoint`, the index of its shards, and the check for NaN and infinity. `shard_source.py`: what fetches shards.
- `safetensors_file.py`: one shard. The safetensors package judges the header; tensors are read in place, and a shard is written tensor by
  tensor.
- `mapping.py`: stored tensors as views of mapped files; `deferred_checks.py` checks them for NaN and infinity at their first use.
- `manifest.py`: manifest.json, with a SHA-256 for every file of a quantized checkpoint and statistics of every tensor.
- `shards.py`: how tensors are divided into shards, the index, and the list of files, for every writer of a checkpoint.
- `inventory.py`: counts, formats and bytes by kind of tensor, for `inspect`.
- `staging.py`: a destination folder that appears only when it is complete, and can be resumed.
- `hub.py`: hub ids become local folders; uploads. `hub_errors.py` turns failures of the hub into errors that state the next step.
- `remote_shards.py`: a repository on the hub as a `ShardSource`, whose shards are fetched while `quantize` works on it.
- `gguf_files.py`: GGUF models by the names of their files. `hub_gguf.py`: which one on the hub is meant, and its download.
- `transformers_files.py`: what a quantized checkpoint says to transformers, so that it never loads random weights.
- `weights_hash.py`: the SHA-256 of weights, kept in the user's cache.
"""

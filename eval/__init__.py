"""Measures checkpoints: perplexity, divergence from a reference, downstream tasks, sensitivity and speed.

Begin with `perplexity.py`, which shows how all measurements work: `texts.py` loads a text, `windows.py` cuts it into windows by a published
protocol, `observe.py` runs batches of windows through a model and yields the last hidden states, and `divergence.py` turns logits into
negative log-likelihoods and KL divergences in float64.

Every command shares these files:

- `text_files.py` reads files of text and JSON, `data_sets.py` names data sets on the hub, and `chats.py` loads chats to calibrate with.
- `provenance.py` records versions, device and command line, so that a measurement can be repeated.
- `resume.py` saves partial results, so that an interrupted run continues with `--resume`.
- `report_folder.py` checks and writes the folder of `--out`.
- `document.py` writes tables between two marker lines of a Markdown document.
- `parent_process.py` ends processes with the one that started them.

The folders:

- `compare/` measures several checkpoints against one reference.
- `sensitivity/` quantizes one part of a model at a time.
- `tasks/` runs lm-evaluation-harness.
- `bench/` measures speed and memory of checkpoints and kernels.
- `gpu_run/` is one bounded run of all that a GPU must show.
"""

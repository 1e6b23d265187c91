"""A run of the quantizer, from the request to the complete checkpoint.

Begin with `run.py`: `quantize_checkpoint` opens a request, writes the shards and finishes the folder.

In the order of a run:

- `request.py`: what to make (`QuantizationRequest`); opens the source and checks everything before the first byte is written (`Run`).
- `format_assignment.py`: the format of each tensor: one for all experts, rules for some tensors, or the best mix for a size.
- `accelerator.py`: the GPU that may multiply and round, within a limit of its memory.
- `jobs.py`: one job per stored matrix, grouped into shards; reads a job's matrix.
- `plan.py`: bytes to read and write, memory, disk and time; refuses what does not fit.
- `run.py`: the loop over the jobs, with a thread that reads ahead and one that writes behind.
- `quantizer.py`: one job: fit, round, pack, and advance the calibration. `guard.py` rounds to nearest beside it, and compares.
- `journal.py`: a line per finished tensor, from which a killed run resumes. `shards.py`: the shard files, which are reopened then.
- `source_digest.py`: what identifies the source, so that no run continues with another one.
- `records.py`: what is known of each tensor and of the run once it is done.
- `finish.py`: index, config.json, tokenizer, manifest; `model_card.py` is the README.md, `report.py` the report with its plots, and
  `report_held_out.py` what both say of held-out tokens.
"""

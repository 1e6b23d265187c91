"""Runs downstream tasks of lm-evaluation-harness: `dbrx-q tasks`.

Begin with `run.py`: it looks up the tasks, lets the harness create all requests, checks them, and only then loads the model.

- `harness.py` adapts a model to the harness's interface: log-likelihoods, rolling log-likelihoods and generation. It is the only file
  that imports the harness at its top, and is itself imported only when tasks run, since the harness is an optional extra.
- `shared_prefix.py` scores continuations; a prefix that several requests share runs once.
- `answers.py` saves the answers of finished requests, so that an interrupted run continues with `--resume`.

The numbers agree with the harness's own adapter for transformers models, which the tests compare with.
"""

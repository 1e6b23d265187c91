"""One bounded run on a GPU, `dbrx-q bench gpu`: everything that a GPU must show, most valuable first, each result one line of JSON.

Begin with `run.py`: it starts the items of `plan.py` in order while the time lasts, each in a process that may crash or be killed, and
writes every result with `journal.py`. A second run skips what the journal holds. `report.py` turns a journal into a document.

- `settings.py` says where a run takes place and at which sizes; with the device "meta" nothing is timed and launches are recorded.
- `worker.py` is the process that measures; it serves one item at a time, from `measurements.py`: rows of the kernel benchmark, ceilings,
  the whole decode step, offloading, tiles.
- `random_model.py` makes a model of random weights in memory, `offloading.py` measures one that a GPU holds in part.
- `compiling.py` compiles launches as the JIT does, into its cache; `recorded.py` records the launches that later items make.
- `commands.py` runs tests and compute-sanitizer with a time limit; `one_call.py` calls every op once, for the latter.
- `parcel.py` packs the tree with the wheels that a machine without a network lacks.
"""

"""What a model takes of a machine's memory, which device holds what, and how fast that can be. Reads configurations, never weights.

Begin with `placement.py`: its function `place` turns a machine and a request into a plan, which the loader follows.

How `--ram 64GiB` becomes slots for experts:

1. `cli/memory_budget.py` reads the option; `budget.py` checks it and holds it as a `Budget` with a `Machine` (`machine.py`).
2. `footprint.py` adds up what the model takes besides experts: dense weights, KV cache, workspace.
3. `placement.py` subtracts that, and the buffers of `offloading.py`, and divides the rest by the size of an expert (`expert_kinds.py`).
4. The resulting `DevicePlan.slots` (`machine.py`) are what `experts/build.py` allocates.

The files:

- `machine.py`: `Machine` and `Gpu`, the input of a plan; `Placement` and `DevicePlan`, the plan.
- `footprint.py`: bytes of a model by purpose, for a `MemoryRequest`. `expert_kinds.py`: the layout of one expert on disk and in memory.
- `placement.py`: the plan. `speed.py`: the tokens/s that it allows. `advice.py`: what would speed it up, or make it fit.
- `sampling.py`: batch, memory and time of sampling many sequences from a model.
- `offloading.py`: sizes of the buffers between disk, host memory and GPUs, and the slots that a GPU keeps free.
- `policy_names.py`: the names of cache policies and miss policies (the cache policies themselves: `experts/policies.py`).
- `budget.py`: how much memory a model may take and how it uses it, and the errors if that is too little.
- `bandwidths.py`: what `plan --measure` found of this machine. `cpu_quota.py`: threads within a container's quota.
- `sizes.py`: sizes such as "64GiB" as text.
- `host_memory.py`: how much host memory is free or in use, and tensors in it.
"""

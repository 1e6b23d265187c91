"""The memories that hold the experts: a model asks its expert store for a layer, and does not know where the experts are.

Begin with `store.py`: the interface, and the store that holds all experts. If they do not all fit, `build.py` makes one of two stores from
a plan (`planning/`): `cpu_store.py` (host memory over disk), or `gpu_store.py` (GPUs over host memory over disk).

What happens on an expert miss: on a CPU, `host_tier.py` assigns a slot, reads the expert from disk and waits. On a GPU, `gpu_experts.py`
lets the CPU compute it or copies it into a slot; its first lines list the steps. To change the cache policy, open `policies.py`.

- Slots: `slots.py` is the memory of experts of one kind; `cache.py` says which expert is in which slot, and evicts by `policies.py`.
- Host memory: `host_tier.py`. Its threads (`reader.py`) read what `files.py` finds in the checkpoint.
- GPUs: `gpu_experts.py` serves the layers of one GPU from its slots (`gpu_slot_pool.py`). `split.py` divides misses between the CPU and
  copies, by rates that `measured_rates.py` measures at load. `gpu_copies.py` tracks the copies under way, which `link.py` makes.
- Common to both stores: `tiered_store.py` (prefetch and fallback copy), `predictor.py` (which predictions are worth a prefetch),
  `sums.py` (computes experts and adds them up), `streams.py` (their order on a GPU), `timer.py` and
  `stats.py` (times and counters).
- `fallback.py`: the fallback copy in a checkpoint, used in place of experts that are only on disk.
- Simulation: `trace.py` records which experts a text uses; `simulate.py` replays it through the real stores without memory, `sweep.py`
  with every policy and several cache sizes; `simulated_speed.py` turns the counters into seconds.
"""

from .store import ExpertStore, ResidentExpertStore

__all__ = ["ExpertStore", "ResidentExpertStore"]

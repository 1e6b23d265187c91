"""Where the experts live: a model hands its expert store the tokens of a layer and does not know more.

`store.py` has the interface and the store that holds everything. Experts that do not all fit lie in slots (`slots.py`), which a cache
(`cache.py`, with a policy of `policies.py`) assigns to them; `files.py` knows where they lie on disk and `reader.py` brings them.
`tier.py` is host memory over disk. `host.py` is the store of a CPU on it, `gpu_store.py` that of gpus: `gpu.py` has the experts of one,
with its slots (`slot_pool.py`), the way there (`link.py`) and who serves what is missed (`split.py`, by rates that `calibrate.py`
measures).
`tiered.py` has what both stores share: a fallback copy that answers for what lies on disk, and guesses of the next layer's experts;
`predictor.py` says which are worth fetching.
`simulate.py` replays a trace (`trace.py`) through the same caches, `sweep.py` through those of every policy and size.
"""

from .store import ExpertStore, ResidentExpertStore

__all__ = ["ExpertStore", "ResidentExpertStore"]

"""Where the experts live: a model hands its expert store the tokens of a layer and does not know more.

`store.py` has the interface and the store that holds everything. Experts that do not all fit lie in slots (`slots.py`), which a cache
(`cache.py`, with a policy of `policies.py`) assigns to them; `files.py` knows where they lie on disk and `reader.py` brings them.
`host.py` is the store of a CPU: memory over disk. `simulate.py` replays a trace (`trace.py`) through the same cache.
"""

from .store import ExpertStore, ResidentExpertStore

__all__ = ["ExpertStore", "ResidentExpertStore"]

"""Packed checkpoints in transformers: importing this registers a quantization method with it.

    import dbrx_q.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("dbrx-int4")  # written by `dbrx-q quantize`

Inside this folder `import transformers` is the library. The names of its classes are kept where a class takes the place of one.

- `availability.py`: refuses a transformers that cannot load a DBRX.
- `config.py`: `DbrxQConfig`, which can limit memory; repairs the base of the rotary embedding in transformers' `DbrxConfig`.
- `quantizer.py`: what transformers calls before and after it reads the plain weights.
- `loading.py`: reads the packed weights, and builds the store of experts that stay in the files.
- `memory.py`: what `max_memory` and `device_map` mean for a packed model.
- `packed.py`: modules that hold a packed weight. `layers.py`: attention, router and experts with our kernels.
- `modeling.py`: `DbrxForCausalLM` and `DbrxModel`, which a packed checkpoint is loaded as. `saving.py`: their `save_pretrained`.
- `__main__.py`: `python -m dbrx_q.transformers PROGRAM ...` runs a program that uses transformers, such as `lm_eval`.
"""

from .availability import MINIMUM
from .config import DbrxQConfig, install
from .modeling import DbrxForCausalLM, DbrxModel
from .quantizer import DbrxQQuantizer

__all__ = ["MINIMUM", "DbrxForCausalLM", "DbrxModel", "DbrxQConfig", "DbrxQQuantizer"]

install()

"""Measures speed, memory and kernel resources: the subcommands of `dbrx-q bench`, and the report of `dbrx-q simulate`.

Begin with `model.py`, which is `dbrx-q bench PATH`: speed and memory of a checkpoint in llama-bench's terms. Each speed is compared with a
ceiling from `ceilings.py`, which measures memory bandwidth and matmul rate in the same minute. `report.py` writes the report,
`memory_growth.py` measures memory, and `synthetic.py` writes checkpoints of any size with random weights.

- `offload.py` measures decode and prefill with experts on disk or in host memory; `offload_report.py` writes the report.
- `simulation_report.py` writes the report of a simulation of expert caches, which `dbrx_q/experts` runs.
- `kernels.py` times the Triton kernels at DBRX's shapes, on the work that `kernel_work.py` defines; `device_timing.py` times calls on
  a GPU.
- `tune.py` finds the fastest tiles on a GPU.
- `kernel_shapes.py` has DBRX's shapes and the launches that they need, `kernel_resources.py` compiles launches ahead of time and reads
  registers, shared memory and spills, and `kernel_report.py` writes the table of these.
- `static_report.py` is `dbrx-q bench static`: times of kernels computed from their machine code, without a GPU. `static_cases.py` has the
  calls, `static_roofline.py` the model. It takes instructions and loops from `sass.py`, what a launch must do from `launch_work.py`,
  resident programs from `occupancy.py`, and rates of chips from `gpu_specs.py`; `warp_timing.py` simulates the issue of a loop.
  `loop_record.py` writes the counts of loops that the tests compare, and `static_comparison.py` compares two states of the kernels.
"""

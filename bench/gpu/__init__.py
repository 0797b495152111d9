"""python -m bench gpu: all measurements on a GPU, in one command with a time budget.

`parts.py` lists the parts. The parent (`supervisor.py`) gives each part its own process (`worker.py`) and a share of
the time left, after which it kills the process. A part is a module with a generator `run(context)`; each row is on disk
(`results.py`) before the next is measured. `--rehearse` runs the same code on a CPU: launches go to the PTX machine,
and `clock.py` has substitutes for CUDA events and graphs.
"""

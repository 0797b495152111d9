"""python -m bench gpu: all that is measured on a GPU, in one command with a budget.

`parts.py` is the table of parts. The parent (`supervisor.py`) gives each part a process of its own (`worker.py`), a
share of the time left, and kills it when that is used up. A part is a module with a generator `rows(context)`; each row
is on disk (`results.py`) before the next is measured. `--rehearse` runs the same code on a CPU: launches go to the PTX
machine, and `clock.py` has a stand-in for the GPU's events and graphs.
"""

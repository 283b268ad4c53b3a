"""Benchmarks of the kernels: `hogwild bench`.

| module | what it holds |
| --- | --- |
| `grid` | cells: heads of real models, who reads what, how many new tokens come |
| `work` | what the GPU's kernels do in a cell, counted from the tables of its step |
| `roofline` | how long that would take at least on a named GPU: a model, not a measurement |
| `inputs`, `peers`, `timing` | tensors, what is run on them, and how it is timed |
| `attention` | `hogwild bench attention` |
| `streams`, `slow_path` | workers and what transformers would do instead, a token each in a step |
| `ceilings` | what this machine can do at most |
| `generate`, `step_time`, `speedup_plot` | `hogwild bench generate` |
| `report` | tables for a terminal, Markdown, JSON |
"""

"""Benchmarks of the kernels: `hogwild bench`.

| module | what it holds |
| --- | --- |
| `grid` | cells: heads of real models, who reads what, how many new tokens come |
| `work` | what the GPU's kernels do in a cell, counted from the tables of its step |
| `roofline` | how long that would take at least on a named GPU: a model, not a measurement |
| `inputs`, `peers`, `timing` | tensors, what is run on them, and how it is timed |
| `flex` | FlexAttention, which has to compile |
| `ceilings` | what the CPU reaches at most, and the least time of a cell that follows |
| `yardsticks` | what times are held against: a copy on a GPU, the ceilings on the CPU |
| `attention` | `hogwild bench attention` |
| `streams`, `slow_path` | workers and what transformers would do instead, a token each in a step |
| `generate`, `step_time`, `speedup_plot` | `hogwild bench generate` |
| `targets`, `attention_targets` | `--check`: lines that pass or fail; those of attention |
| `report`, `plots` | tables for a terminal, Markdown, JSON; pictures |
"""

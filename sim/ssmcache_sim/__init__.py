"""Trace-driven simulation of a prefix cache: replay a request trace through the manager and see what it gains.

The parts, in the order of use: `formats.read_trace`, `settings.ReplaySettings` and `build_config`, `replay.replay`,
`results.write_replay`; for many settings at once `sweep` and `sweep_results`; the best of them by `recommend`;
pictures by `plots.plot_directory`.
"""

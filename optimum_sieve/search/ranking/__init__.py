"""Compare scored candidates of different sizes. Torch-free.

In: candidates with outcomes. Out: which size each could reach within the tolerance, on one task (`by_task`) or on all
(`across_tasks`).
"""

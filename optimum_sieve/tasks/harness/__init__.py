"""Tasks of lm-evaluation-harness, whose package is imported when such a task is read.

`source` finds the YAML of a task and refuses what cannot be mapped, by name; `rows` lets the package render prompts and
answers; `scoring` gives them to [`Task`][optimum_sieve.tasks.task.Task] and scores written answers as the package does.
"""

r"""Tasks: turn the rows named by a task file into examples, and score answers with the task's metric.

`several.read_tasks` reads task files into [`Task`]s, which load, split and check the data; `Task.examples` renders one
split for a tokenizer; the folder `metrics` scores the answers. Never imports torch.
"""

from .example import Example
from .task import Task


__all__ = ["Example", "Task"]

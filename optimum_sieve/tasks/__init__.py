r"""Tasks: a table of examples, a prompt, a way to answer and a metric; read from a task file. Does not import torch."""

from .example import Example
from .task import Task


__all__ = ["Example", "Task"]

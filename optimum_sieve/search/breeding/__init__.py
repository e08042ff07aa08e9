"""Propose the next generation: genetic operators and the two presets, `fast` and `paper`. Torch-free.

In: the scored candidates so far. Out: the candidates to score next (`fast.next_generation`, `paper.next_generation`), a
pure function of its arguments.
"""

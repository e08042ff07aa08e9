"""Breed the next generation: genetic operators and one module for each preset, `fast` and `paper`. Torch-free.

In: the scored candidates. Out: genomes to score next (`fast.breed`, `paper.breed`), a pure function of the arguments.
"""

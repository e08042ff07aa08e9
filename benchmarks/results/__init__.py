"""The parts of `benchmarks/results.py`: what is measured, on what, and how it is written down."""

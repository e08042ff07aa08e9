"""The parts of `benchmarks/results.py`: jobs, methods, measurements and the page."""

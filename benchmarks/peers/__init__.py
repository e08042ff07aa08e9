"""The methods of `benchmarks/peers.py`: code of other projects, imported from checkouts, and the package's own."""

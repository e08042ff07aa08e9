"""The `optimum-cli sieve` command and its subcommands. Imported at every start of optimum-cli: no torch before work."""

from .sieve import SieveCommand


__all__ = ["SieveCommand"]

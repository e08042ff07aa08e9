"""The `optimum-cli sieve` command and its subcommands. Imported at every start of optimum-cli: no torch before work."""

from optimum_sieve.commands.sieve import SieveCommand


__all__ = ["SieveCommand"]

"""The `optimum-cli sieve` command and its subcommands.

In: the words of a command line. Out: a saved directory and a table, or one line of error. optimum-cli imports this
folder at every start, so torch is imported only in `execute`; `options` makes the options of the settings classes.
"""

from optimum_sieve.run.signals import quiet_start


quiet_start()

from .sieve import SieveCommand  # noqa: E402


__all__ = ["SieveCommand"]

"""Register `optimum-cli sieve`: installed as `optimum/commands/register/register_sieve.py`, where optimum-cli looks."""

from optimum_sieve.commands import SieveCommand


REGISTER_COMMANDS = [SieveCommand]

"""Register `optimum-cli sieve`: installed as `optimum/commands/register/register_sieve.py`, where optimum-cli looks."""

try:
    from optimum_sieve.commands import SieveCommand
except ModuleNotFoundError as error:
    # The package was removed or moved without this file: the other commands still work.
    if not (error.name or "").startswith("optimum_sieve"):
        raise
    REGISTER_COMMANDS = []
else:
    REGISTER_COMMANDS = [SieveCommand]

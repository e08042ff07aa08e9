"""The entry point that torch calls, installed outside the package.

An entry point that cannot be imported breaks `import torch` for its whole environment. This module needs the standard
library alone, so it outlives the package: a folder that was deleted in part or as a whole, or the source of an editable
installation that was moved.
"""


def register() -> None:
    """Call `optimum_sieve._autoload.register`; nothing if the package is missing or damaged."""
    try:
        from optimum_sieve._autoload import register as register_model_type
    except Exception:  # A damaged package can raise anything.
        return
    register_model_type()

"""Run llama.cpp's converter on a model of reduced vocabulary, whose pre-tokenizer it knows by the whole one alone.

A script, run by `export.gguf` in a process of its own: `whole_vocabulary.py SCRIPT TOKENIZER ARGUMENT ...`. The
converter names the pre-tokenizer of a BPE by a hash of the token ids of a text (its method `get_vocab_base_pre`). A
reduced vocabulary has other ids and the same pre-tokenizer, so this method is given the whole tokenizer here.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


_METHOD = "get_vocab_base_pre"


def main(script: str, whole: str, *arguments: str) -> None:
    """Run the converter `script` with `arguments`, and let it recognize the tokenizer in the directory `whole`."""
    from transformers import AutoTokenizer

    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    converter: Any = importlib.import_module(Path(script).stem)
    owners = _owners(converter)
    if not owners:
        sys.exit(f"{script} has no class with a method {_METHOD}: it is of a version that is not known here.")
    tokenizer = AutoTokenizer.from_pretrained(whole)
    for owner in owners:
        _recognize(owner, tokenizer)
    converter.main()


def _owners(converter: Any) -> list[Any]:
    """Return the classes that define the method: in the script, or in a module that it imports from its folder."""
    folder = Path(converter.__file__).parent
    modules = [module for module in list(sys.modules.values()) if _is_inside(module, folder)]
    classes = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return [owner for owner in classes.values() if _METHOD in vars(owner)]


def _is_inside(module: Any, folder: Path) -> bool:
    return folder in Path(getattr(module, "__file__", None) or "").parents


def _recognize(owner: Any, tokenizer: Any) -> None:
    original = getattr(owner, _METHOD)
    setattr(owner, _METHOD, lambda self, _: original(self, tokenizer))


if __name__ == "__main__":
    main(*sys.argv[1:])

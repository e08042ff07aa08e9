"""Write the directory of a model: complete or not at all. Every command that writes a model does so here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.run.files import whole_directory
from optimum_sieve.run.outputs import reserved

from .origin.terms import NO_TERMS
from .page.load import write_pages
from .report import REPORT_NAME, write_report


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.run.outputs import Inputs

    from .origin.terms import Terms


def save_directory(
    output_dir: str | Path,
    write_model: Callable[[Path], None],
    tokenizer: PreTrainedTokenizerBase,
    card: Callable[[], object],
    *,
    report: dict[str, Any] | None = None,
    files: Callable[[], Mapping[str, str]] = dict,
    examples: Sequence[dict[str, Any]] | None = None,
    terms: Terms = NO_TERMS,
    finish: Callable[[Path], object] = lambda directory: None,
    overwrite: bool = False,
    needed_bytes: int = 0,
    inputs: Inputs = (),
) -> Path:
    """Check the output directory; write model, tokenizer, card, report and further files to a temporary one; rename it.

    If anything fails, the temporary directory is removed, and the previous content of `output_dir` remains.

    Args:
        output_dir (`str | Path`): A new or empty directory.
        write_model (`Callable[[Path], None]`): Writes the model to a directory; called after the check.
        tokenizer (`PreTrainedTokenizerBase`): Saved with the model; with its SentencePiece file, if it was loaded from
            one that still fits.
        card (`Callable[[], object]`): Makes the model card, whose `str` becomes README.md; called after everything else
            is written.
        report (`dict[str, Any]`, *optional*): Becomes `sieve_report.json`, with the size of the weights as written, and
            its page.
        files (`Callable[[], Mapping[str, str]]`): Returns further texts by the name of their file, such as
            `sieve_task.json`; called after the model is written.
        examples (`Sequence[dict]`, *optional*): Examples for the page alone, see `publish.page.examples`.
        terms (`Terms`): Of the base model, whose texts are written as well.
        finish (`Callable[[Path], object]`): Changes files of the temporary directory, before the card is written.
        overwrite (`bool`): Whether to replace a directory that holds a model, once the new one is complete.
        needed_bytes (`int`): Bytes that must be free on the disk.
        inputs (`Iterable[tuple[str, str | Path | None]]`): Names of arguments with their paths, from which `output_dir`
            must be apart.

    Returns:
        `Path`: `output_dir`.

    Raises:
        FileExistsError: If `output_dir` holds files and `overwrite` is false, or files that are not of a model.
        ValueError: If it is, contains or is inside an input.
        OSError: If the disk is full or the directory cannot be written.
    """
    output = Path(output_dir)
    with reserved(output, overwrite, needed_bytes=needed_bytes, inputs=inputs), whole_directory(output) as partial:
        write_model(partial)
        _save_tokenizer(tokenizer, partial)
        if report is not None:
            report["bytes"]["after"] = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
            write_report(report, partial / REPORT_NAME)
            write_pages(report, partial, examples)
        for name, text in {**terms.files, **files()}.items():
            (partial / name).write_text(text, encoding="utf-8", newline="")
        finish(partial)
        (partial / "README.md").write_text(str(card()), encoding="utf-8", newline="")
    return output


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer, and what converters read of a SentencePiece one besides `tokenizer.json`.

    transformers saves neither its file nor, for a tokenizer with one, which tokens were added to it. A tokenizer that
    was reduced has forgotten the file, which no longer fits.
    """
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = dict(config)
    if not type(tokenizer).__module__.startswith("transformers_modules"):
        # Code that was not run, and that converters would run without asking.
        config.pop("auto_map", None)
    file = _own_file(tokenizer)
    if file is not None:
        if not (directory / file.name).exists():
            # Not the link in the cache of the Hub.
            shutil.copyfile(file, directory / file.name)
        added = sorted(tokenizer.added_tokens_decoder.items())
        config.setdefault("added_tokens_decoder", {str(number): token.__getstate__() for number, token in added})
    if config != before:
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _own_file(tokenizer: Any) -> Path | None:
    """Return the SentencePiece file of a tokenizer, in its own directory or the Hub's cache.

    A checkpoint may name any file of this machine, which must not be published.
    """
    from huggingface_hub import constants

    file = Path(getattr(tokenizer, "vocab_file", None) or "")
    if file.suffix != ".model" or file.name not in tokenizer.vocab_files_names.values() or not file.is_file():
        return None
    is_own = file.parent == Path(tokenizer.name_or_path) and not file.is_symlink()
    return file if is_own or Path(constants.HF_HUB_CACHE) in file.parents else None

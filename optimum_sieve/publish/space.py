"""Push a Space: a page on which one tries a pruned model. Does not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .hub import pushing


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_REQUIREMENTS = "torch\ntransformers>=5.23\njinja2\n"
_README = """\
---
title: {title}
sdk: gradio
app_file: app.py
models:
{models}
---

Answers of `{model}`, a model pruned by optimum-sieve for one task.
"""


def space_files(model: str, dense: str | None = None) -> dict[str, str]:
    """Return the files of a Space.

    Args:
        model (`str`): Repository of the pruned model.
        dense (`str`, *optional*): Repository of the dense model, whose answers the page shows beside.
    """
    named = [model, *([dense] if dense else [])]
    return {
        "app.py": Path(__file__).with_name("space_app.py").read_text(encoding="utf-8"),
        "space.json": json.dumps({"model": model, "dense": dense}, indent=2) + "\n",
        "requirements.txt": _REQUIREMENTS,
        "README.md": _README.format(
            title=model.rpartition("/")[2], model=model, models="\n".join(f"  - {name}" for name in named)
        ),
    }


def push_space(
    model: str, space_id: str, *, dense: str | None = None, private: bool | None = None, token: str | None = None
) -> CommitInfo:
    """Create a Space with a page for a pruned model, or update it, in one commit.

    Args:
        model (`str`): Repository of the pruned model, such as `"user/name"`.
        space_id (`str`): Repository of the Space, such as `"user/name"`.
        dense (`str`, *optional*): Repository of the dense model.
        private (`bool`, *optional*): Whether a new Space is private. Default: the account's setting.
        token (`str`, *optional*): Default: `HF_TOKEN`, or the token stored by `hf auth login`.

    Raises:
        HfHubHTTPError: If the Hub refuses; an `OSError`.
        ConnectionError: If the push was interrupted.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="optimum-sieve")
    files = space_files(model, dense)
    with pushing(space_id):
        created = api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        return api.create_commit(
            created.repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode()) for name, text in files.items()],
            commit_message=f"A page for {model}",
            repo_type="space",
        )

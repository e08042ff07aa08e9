"""Push a pruned model to the Hugging Face Hub, in one commit. Does not import torch."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.modeling.block import check_block
from optimum_sieve.run.contents import PAGE, page_kind

from .page.page import PAGE_NAME, PICTURE_NAME
from .report import DIGEST_KEY, REPORT_NAME, task_blocks


if TYPE_CHECKING:
    from collections.abc import Iterator

    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

logger = logging.getLogger(__name__)

_WEIGHTS = "model*.safetensors*"
_REMEDIES = {
    401: "Log in with `hf auth login`, set HF_TOKEN or pass a token.",
    403: "Use a token with write access to it.",
    409: "The branch changed during the push; retry.",
    412: "The branch changed during the push; retry.",
}


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    with_examples: bool = False,
) -> CommitInfo:
    """Upload a directory written by `save_pretrained` in one commit; create the repository if it does not exist.

    Large files are uploaded before the commit: a push that fails does not change the repository, and the next one skips
    the files that are already uploaded.

    Args:
        folder (`str | Path`): The directory.
        repo_id (`str`): Such as `"user/name"`; without a user, that of the token.
        private (`bool`, *optional*): Whether a new repository is private. Default: the account's setting.
        revision (`str`, *optional*): Branch to push to, created from the main branch if it does not exist; with
            `create_pr`, the branch to open the pull request against.
        commit_message (`str`, *optional*): Default: a message with the task and the size.
        create_pr (`bool`): Whether to open a pull request instead of changing the branch.
        token (`str`, *optional*): Default: `HF_TOKEN`, or the token stored by `hf auth login`.
        with_examples (`bool`): Whether to upload also a `report.html` that shows examples of the data.

    Returns:
        `huggingface_hub.CommitInfo`: With `commit_url`, `oid` and `pr_url`.

    Raises:
        ValueError: If `folder` is not a complete pruned model, or `repo_id` is not a valid name.
        HfHubHTTPError: If the Hub refuses; an `OSError`.
        ConnectionError: If the push was interrupted.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    check_folder(folder)
    api = HfApi(token=token, library_name="optimum-sieve")
    with pushing(repo_id):
        # A pull request needs no write access, so the repository must exist.
        name = repo_id if create_pr else api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        there = api.model_info(name, revision=revision)
        # `upload_folder` splits long uploads into several commits: readers would download an incomplete model.
        return api.create_commit(
            name,
            _operations(folder, [file.rfilename for file in there.siblings or []], with_examples=with_examples),
            commit_message=commit_message or default_message(folder),
            revision=revision,
            create_pr=create_pr,
            parent_commit=there.sha,
        )


@contextmanager
def pushing(repo_id: str) -> Iterator[None]:
    """Add remedies to the Hub's refusals, and name the repository in errors of the network.

    Raises:
        HfHubHTTPError: If the Hub refuses; an `OSError`.
        ConnectionError: If the push was interrupted.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # huggingface_hub does not wrap the network errors of its HTTP client, which was httpx before 2.0.
    clients = [import_module(name) for name in ("httpx2", "httpx") if find_spec(name) is not None]
    network_errors = tuple(client.HTTPError for client in clients)

    try:
        yield
    except HfHubHTTPError as error:
        error.append_to_message(f" {_REMEDIES.get(error.response.status_code, '')}".rstrip())
        raise
    except (*network_errors, RuntimeError) as error:
        # The message of the client's wrapper only names the file, its cause the reason.
        raise ConnectionError(
            f"The push to {repo_id!r} did not complete: {error} {error.__cause__ or ''}".rstrip()
            + " Push again: files that have arrived are not uploaded again."
        ) from error


def _is_stale(name: str) -> bool:
    """Return whether a file of an earlier push is about other weights, unless this push replaces it."""
    return fnmatch(name, _WEIGHTS) or name in (PAGE_NAME, PICTURE_NAME)


def _operations(
    folder: Path, there: list[str], *, with_examples: bool
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """List the files to add, and the weights and the page of an earlier push to delete."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
    added = {path.relative_to(folder).as_posix(): path for path in files}
    if PAGE_NAME in added and not with_examples and page_kind(added[PAGE_NAME]) != PAGE:
        logger.warning(
            "%s is not pushed, as it may hold examples of the data. `optimum-cli sieve report %s` makes it again "
            "without them; `--with-examples` pushes it as it is.", PAGE_NAME, folder,
        )  # fmt: skip
        del added[PAGE_NAME]
    stale = [name for name in there if "/" not in name and _is_stale(name) and name not in added]
    return [
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in added.items()),
    ]


def check_folder(folder: Path) -> None:
    """Check that a directory holds a complete pruned model, before anything is sent.

    Raises:
        ValueError: If not; the message says what is missing.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model` must be a directory that `sieve prune` wrote, got {str(folder)!r} without a readable config.json."
        ) from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "sieve":
        raise ValueError(f"`model` must be a pruned model (model_type 'sieve'), got {kind!r} in {str(folder)!r}.")
    block = config.get("sieve")
    check_block(block)
    _check_report(folder, block.get("results") or {})
    missing = [name for name in _needed(folder) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"`model` must be complete, got {str(folder)!r} without {', '.join(missing)}. Save it again.")


def _check_report(folder: Path, results: dict[str, Any]) -> None:
    """Check that a report is that of the weights in the same directory, as far as both name them."""
    try:
        digest = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))[DIGEST_KEY]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if digest != results.get(DIGEST_KEY):
        raise ValueError(
            f"`model` must have a report and a card of its own weights, got {str(folder)!r} with those of others: the "
            f"weights changed after they were scored. Remove {REPORT_NAME}, and the scores in README.md."
        )


def _needed(folder: Path) -> list[str]:
    """List the files that a complete pruned model has."""
    index = folder / "model.safetensors.index.json"
    weights = ["model.safetensors"]
    if index.is_file():
        try:
            weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`model` must be complete, got a damaged {str(index)!r}. Save it again.") from error
    return ["modeling_sieve.py", "README.md", *weights]


def default_message(folder: Path) -> str:
    """Return a commit message made from the report, or a general one without a report."""
    try:
        report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        removed = 1 - report["parameters"]["targets_after"] / report["parameters"]["targets_before"]
        names = ", ".join(task["task"] for task in task_blocks(report))
        return f"Push a model pruned for {names}: {removed:.0%} of its linear parameters removed"
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        # A missing or damaged report does not prevent the push.
        return "Push a pruned model with optimum-sieve"

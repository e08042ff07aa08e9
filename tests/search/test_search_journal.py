"""The journal file of a search contains whole lines only."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from optimum_sieve.search.study.journal import WholeLines


if TYPE_CHECKING:
    from pathlib import Path


def test_a_journal_is_written_without_what_windows_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "search.log"
    backend = WholeLines(path)
    path.write_bytes(b'{"a":1}\n{"b"')
    monkeypatch.delattr(os, "pread")
    # Windows writes "\r\n" for "\n" through a descriptor without `O_BINARY`.
    monkeypatch.setattr(os, "open", lambda *arguments, **options: pytest.fail("a descriptor of `os.open`"))
    backend._append(b'{"c":2}\n')
    assert path.read_bytes() == b'{"a":1}\n{"c":2}\n'
    path.write_bytes(b"half")
    backend._append(b'{"c":2}\n')
    assert path.read_bytes() == b'{"c":2}\n'

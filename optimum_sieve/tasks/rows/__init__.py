"""Rows: `files` reads them from files; `memory` takes them from `datasets` or lists, without copies on the disk."""

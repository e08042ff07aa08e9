"""Write a pruned model in another format.

In: a pruned model. Out: a pruned model of plain factors (`factors.save_factors`), a plain dense checkpoint
(`dense.save_dense`), an ONNX graph (`onnx.export_onnx`) or a GGUF file (`gguf.export_gguf`, which runs llama.cpp's
converter, for a reduced vocabulary by `whole_vocabulary`). Only the `export` command imports this folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .dense import export_dense, save_dense
    from .factors import export_factors, save_factors
    from .gguf import export_gguf
    from .onnx import export_onnx

__all__ = ["export_dense", "export_factors", "export_gguf", "export_onnx", "save_dense", "save_factors"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "dense": ["export_dense", "save_dense"],
        "factors": ["export_factors", "save_factors"],
        "gguf": ["export_gguf"],
        "onnx": ["export_onnx"],
    },
)

"""BitDance: class-conditional images from an autoregressive transformer over binary tokens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitdance.models.transformer import BitDance
    from bitdance.weights.weights_file import load_autoencoder, load_model

__version__ = "0.1.0"

# Loaded when first asked for: `import bitdance` alone must not cost the import of torch.
_LAZY = {
    "BitDance": "bitdance.models.transformer",
    "load_autoencoder": "bitdance.weights.weights_file",
    "load_model": "bitdance.weights.weights_file",
}
__all__ = ["BitDance", "__version__", "load_autoencoder", "load_model"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bitdance' has no attribute {name!r}")

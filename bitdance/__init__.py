"""BitDance: class-conditional image generation with an autoregressive transformer over binary tokens.

Sample images with the demo model, a released model, the folder of a training run or a file of weights:

    >>> import bitdance
    >>> pipe = bitdance.load_pipeline("demo")
    >>> images = pipe(["horse", "ship", 3], seed=0, num_steps=5)
    >>> images[0].size
    (32, 32)
    >>> pipe.classes.label(3)
    'cat'

`pipe.encode` and `pipe.decode` convert between images and bits:

    >>> bits = pipe.encode(images)
    >>> tuple(bits.shape)
    (3, 16, 8, 8)
    >>> pipe.decode(bits)[0].size
    (32, 32)

`load_model` and `load_autoencoder` load only the networks. All of this is also on the command line, see
`bitdance --help`.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitdance.models.autoencoder import Autoencoder
    from bitdance.models.transformer import BitDance
    from bitdance.sampling.pipeline import Pipeline, load_pipeline
    from bitdance.weights.weights_file import load_autoencoder, load_model

__version__ = "0.1.0"

# Imported when first used, so that `import bitdance` does not import torch.
_LAZY = {
    "Autoencoder": "bitdance.models.autoencoder",
    "BitDance": "bitdance.models.transformer",
    "Pipeline": "bitdance.sampling.pipeline",
    "load_autoencoder": "bitdance.weights.weights_file",
    "load_model": "bitdance.weights.weights_file",
    "load_pipeline": "bitdance.sampling.pipeline",
}
__all__ = [
    "Autoencoder",
    "BitDance",
    "Pipeline",
    "__version__",
    "load_autoencoder",
    "load_model",
    "load_pipeline",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        if "torch" not in sys.modules:
            from bitdance.runtime.cpu_tuning import tune_cpu

            tune_cpu()
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bitdance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

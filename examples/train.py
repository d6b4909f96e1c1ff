"""Trains an autoencoder and a small model from scratch on a folder of class folders, and samples from it.

    python examples/train.py pictures runs/scratch

The few steps here show the calls; good images need thousands of pictures and hours.
"""

import pathlib
import sys

import bitdance
from bitdance.config import AutoencoderConfig, ModelSizes
from bitdance.training.setup import train_autoencoder, train_model
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig, TrainConfig

if len(sys.argv) < 3:
    sys.exit(__doc__)
pictures, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
common = {"image_size": 32, "epochs": 2, "batch_size": 8, "warmup_steps": 5, "decay_start": 5, "ema": 0.9}

train_autoencoder(
    TrainConfig(pictures, folder / "autoencoder", lr=1e-3, **common),
    AutoencoderConfig(widths=(32, 64), space_to_depth=4, blocks=1, bits=32),
    AutoencoderLossConfig(entropy_weight=0.0, commitment_weight=0.02),
)
train_model(
    TrainConfig(pictures, folder / "model", lr=1e-3, **common),
    ModelSizes(dim=128, n_layer=4, head_dim=128, head_layers=3, head_ada_ln=1, cls_token_num=4),
    LossConfig(perturb_rate=0.1),
    autoencoder=folder / "autoencoder",
)
images = bitdance.load_pipeline(folder / "model")(0, num_steps=10)
images[0].save(folder / "sample.png")
print(f"wrote {folder / 'sample.png'}")

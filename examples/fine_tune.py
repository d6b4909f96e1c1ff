"""Fine-tunes the demo model on a folder of class folders, and samples from the result.

    python examples/fine_tune.py pictures runs/mine

`bitdance train --data-path pictures --output runs/mine` does the same, and chooses the settings from the
pictures and the time.
"""

import pathlib
import sys

import bitdance
from bitdance.config import ModelSizes
from bitdance.training.setup import train_model
from bitdance.training.train_config import LossConfig, TrainConfig

if len(sys.argv) < 3:
    sys.exit(__doc__)
pictures, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
sizes = ModelSizes.of(bitdance.load_model("demo").config, num_classes=None)  # as many classes as there are folders
config = TrainConfig(
    pictures, folder, image_size=32, epochs=5, batch_size=8, random_crop=False,
    lr=5e-4, min_lr=5e-6, warmup_steps=5, decay_start=5, ema=0.9,
)  # fmt: skip
weights = train_model(config, sizes, LossConfig(perturb_rate=0.1), autoencoder="demo", init_from="demo")
pipe = bitdance.load_pipeline(folder)
for label in range(len(pipe.classes)):
    pipe(label, num_steps=20)[0].save(folder / f"sample-{label}.png")
print(f"wrote {weights} and a sample of each class")

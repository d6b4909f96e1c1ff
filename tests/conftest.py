import os
import pathlib
import sys

import hypothesis
import pytest

hypothesis.settings.register_profile("no-deadline", deadline=None)  # a slow machine is no fault
hypothesis.settings.load_profile("no-deadline")
sys.path.insert(0, str(pathlib.Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: on shared cores threads wait far longer than they work


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def quick_previews(monkeypatch):
    """Previews with one solver step, since every training run writes one."""
    from bitdance.config import SamplingDefaults
    from bitdance.training import trainer

    monkeypatch.setattr(trainer, "PREVIEW_SAMPLING", SamplingDefaults(cfg_scale=2.0, num_steps=1))


@pytest.fixture(autouse=True)
def one_thread():
    """Results that are compared to the last bit need equal numbers of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

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


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with model.safetensors, autoencoder.safetensors and pictures/ of 12 images; tests only read them."""
    import small

    folder = tmp_path_factory.mktemp("place")
    small.save_pair(folder)
    small.pictures(folder / "pictures")
    return folder


@pytest.fixture
def refused(capsys):
    """Calls a function that must end the process with status 2, and returns what it writes to stderr."""

    def call(function, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.fixture
def inductor_code(monkeypatch):
    """The C++ code that torch.compile writes, a list. It is not compiled, so the test needs no C++ compiler."""
    import torch
    from torch._inductor.async_compile import AsyncCompile

    written = []
    monkeypatch.setattr(
        AsyncCompile, "cpp_pybinding", lambda self, types, code: written.append(code) or (lambda *_: None)
    )
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield written
    torch._dynamo.reset()


@pytest.fixture
def quick_previews(monkeypatch):
    """Previews with one solver step."""
    import small

    from bitdance.training import trainer

    monkeypatch.setattr(trainer, "PREVIEW_SAMPLING", small.PREVIEWS)


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    """Tests without the mark `gpu`, and what they start, compute on the CPU, whose results and messages they expect."""
    import torch

    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def one_thread():
    """Results that are compared to the last bit need equal numbers of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

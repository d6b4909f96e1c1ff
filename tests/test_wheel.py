"""The package as others install it."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_an_installed_wheel_samples_without_the_checkout(tmp_path):
    """The dependencies are those of this environment; the package itself comes from the wheel alone."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: object) -> str:
        arguments = [sys.executable, *map(str, command)]
        result = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run("-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path / "wheels", ROOT)
    wheel = next((tmp_path / "wheels").glob("bitdance-*.whl"))
    run("-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    environment["PYTHONPATH"] = str(tmp_path / "site")
    assert pathlib.Path(run("-c", "import bitdance; print(bitdance.__file__)").strip()).is_relative_to(
        tmp_path / "site"
    )
    run("-m", "bitdance.cli.main", "sample", "--per-class", "1", "--sample-steps", "2", "--output", "out")
    assert len(list((tmp_path / "out").glob("0*.png"))) == 10 and (tmp_path / "out" / "grid.png").exists()

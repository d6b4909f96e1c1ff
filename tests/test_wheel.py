"""Installing the package."""

import os
import pathlib
import subprocess
import sys
import sysconfig

import pytest
from small import ROOT

pytestmark = pytest.mark.slow
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(folder: pathlib.Path, *command: object, python: object = sys.executable, **variables: str) -> str:
    """Runs Python in a folder and returns its output."""
    result = subprocess.run(
        [str(python), *map(str, command)],
        cwd=folder,
        env={**ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_installed_wheel_samples_without_the_checkout(tmp_path):
    """The dependencies are those of this environment; the package itself comes from the wheel."""
    run(tmp_path, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", "wheels", ROOT)
    (wheel,) = (tmp_path / "wheels").glob("bitdance-*.whl")
    run(tmp_path, "-m", "pip", "install", "-q", "--no-deps", "--target", "site", wheel)
    site = str(tmp_path / "site")
    location = run(tmp_path, "-c", "import bitdance; print(bitdance.__file__)", PYTHONPATH=site)
    assert pathlib.Path(location).is_relative_to(site)
    options = ("--per-class", 1, "--num-steps", 2, "--output", "out")
    run(tmp_path, "-m", "bitdance", "sample", *options, PYTHONPATH=site)
    assert len(list((tmp_path / "out").glob("0*.png"))) == 10 and (tmp_path / "out" / "grid.png").exists()


def test_an_editable_install_is_imported_above_a_clone_of_the_same_name(tmp_path):
    """There, the folder of the clone could be imported as a namespace package in place of the package inside."""
    run(tmp_path, "-m", "venv", "--without-pip", "environment")
    python = tmp_path / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(tmp_path, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "-e", ROOT)
    (site,) = (tmp_path / "environment").glob("**/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "bitdance" / "bitdance").mkdir(parents=True)
    (tmp_path / "bitdance" / "pyproject.toml").touch()
    code = "import bitdance; bitdance.load_pipeline; print(bitdance.__file__)"
    assert run(tmp_path, "-c", code, python=python).strip() == str(ROOT / "bitdance" / "__init__.py")

"""The public interface of the package."""

import doctest
import pydoc

import small

import bitdance


def test_examples_of_the_package():
    result = doctest.testmod(bitdance)
    assert result.attempted >= 8 and result.failed == 0


def test_help_shows_the_public_functions():
    text = pydoc.render_doc(bitdance, renderer=pydoc.plaintext)
    assert "load_pipeline(name: " in text and "-> 'Pipeline'" in text
    assert all(f"    {name}(" in text for name in ("load_autoencoder", "load_model", "class Pipeline"))


def test_version():
    assert small.run("-m", "bitdance", "--version").stdout == f"bitdance {bitdance.__version__}\n"

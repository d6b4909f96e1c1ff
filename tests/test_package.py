"""The public interface of the package."""

import doctest
import pathlib
import pydoc
import re

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


def test_versions_and_citations_agree():
    root = pathlib.Path(__file__).resolve().parent.parent
    for name, pattern in (("pyproject.toml", r'^version = "(.*)"$'), ("CITATION.cff", r"^version: (.*)$")):
        assert re.findall(pattern, (root / name).read_text(), re.MULTILINE) == [bitdance.__version__], name
    (authors,) = re.findall(r"author  = \{(.*)\}", (root / "README.md").read_text())
    cited = re.findall(r"family-names: (.*), given-names: (.*)\}", (root / "CITATION.cff").read_text())
    assert [f"{family}, {given}" for family, given in cited] == authors.split(" and ")

"""Rules of the layout: imports go down, network code is pure, heavy and optional packages are imported late."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bitdance"

# A folder (or a module at the top) imports only from those of a lower rank, and from itself.
RANKS = {
    "runtime": 0,
    "config": 1,
    "models": 2,
    "weights": 3,
    "data": 4,
    "metrics": 5,
    "sampling": 6,
    "training": 7,
    "web": 8,
    "cli": 9,
    "__main__": 10,
}

NOT_IN_MODELS = (
    *("argparse", "tyro", "logging", "torch.distributed"),
    *("bitdance.runtime.devices", "bitdance.runtime.process_group"),
)
OPTIONAL = ("gradio", "pillow_heif", "pyarrow", "tensorboard", "wandb")

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def part(module: str) -> str:
    """The key of a module in `RANKS`: bitdance.data.images -> data; the package itself -> ''."""
    return module.partition(".")[2].partition(".")[0]


def imports(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yields (line, full name) of all imports of a module, also inside functions; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def import_faults(tree: ast.AST, module: str, is_package: bool = False) -> list[str]:
    """Returns wrong imports of a module, as sentences."""
    if module == "bitdance":
        return []  # resolves its public names lazily, so it may name anything
    own = part(module)
    if own not in RANKS:
        return [f"{module} has no rank: add '{own}' to RANKS in tests/test_layout.py, above all that it imports."]
    faults = []
    for line, name in imports(tree, module, is_package):
        if not within(name, "bitdance") or name == "bitdance.__version__":
            continue
        other = part(name)
        if {module, name.rpartition(".")[0]} == {"bitdance.models.transformer", "bitdance.models.autoencoder"}:
            faults.append(f"{module}:{line} imports {name}: neither network is a part of the other.")
        elif other not in RANKS:
            faults.append(f"{module}:{line} imports {name}: import from the module that defines it, not the package.")
        elif other != own and RANKS[other] >= RANKS[own]:
            faults.append(f"{module}:{line} imports {name}, which is not below it ({RANKS[other]} >= {RANKS[own]}).")
    return faults


def purity_faults(tree: ast.AST, module: str) -> list[str]:
    """Returns uses of what network code leaves to callers: flags, processes, environment, logs, devices, compiling."""
    faults = [
        f"{module}:{line} imports {name}."
        for line, name in imports(tree, module)
        if any(within(name, banned) for banned in NOT_IN_MODELS) or name in ("os.environ", "os.getenv", "torch.compile")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text in ("os.environ", "os.getenv", "torch.compile", "torch.distributed"):
                faults.append(f"{module}:{node.lineno} uses {text}.")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            faults.append(f"{module}:{node.lineno} calls .cuda().")
    return faults


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"), filename=str(MODULES[module]))


def run_python(code: str) -> str:
    """Returns the output of `code` in a new interpreter in the root of the checkout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    faults = import_faults(parsed(module), module, MODULES[module].name == "__init__.py")
    assert not faults, "\n".join(faults)


def test_no_import_cycles() -> None:
    """Also within a folder."""
    graph = {
        module: {
            target
            for _, name in imports(parsed(module), module, MODULES[module].name == "__init__.py")
            for target in (name, name.rpartition(".")[0])
            if target in MODULES and target not in ("bitdance", module)
        }
        for module in MODULES
        if module != "bitdance"
    }
    for module, path in MODULES.items():
        # `from bitdance.data import images` runs the __init__ of the folder, like any import of a module in it.
        if path.name == "__init__.py":
            for source, targets in graph.items():
                if within(source, module):
                    targets.discard(module)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bitdance.models.head", "import bitdance.sampling.sampler"),
        ("bitdance.models.transformer", "from bitdance.models.autoencoder import Autoencoder"),
        ("bitdance.models.flow", "def f():\n    from bitdance.weights import hub"),
        ("bitdance.data.images", "from ..training import trainer"),
        ("bitdance.sampling.sampler", "from bitdance import load_model"),
        ("bitdance.novelty", "import math"),
    ],
)
def test_wrong_imports_are_detected(module: str, source: str) -> None:
    assert len(import_faults(ast.parse(source), module)) == 1


@pytest.mark.parametrize("module", [module for module in MODULES if within(module, "bitdance.models")])
def test_network_code_is_pure(module: str) -> None:
    faults = purity_faults(parsed(module), module)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "source",
    [
        "import argparse",
        "def f():\n    import logging.handlers",
        "from torch import distributed",
        "import os\nprint(os.environ['A'])",
        "from os import getenv",
        "import torch\nf = torch.compile(g)",
        "x = y.to(z).cuda(non_blocking=True)",
    ],
)
def test_impurity_is_detected(source: str) -> None:
    assert purity_faults(ast.parse(source), "bitdance.models.transformer")


def test_every_module_imports_without_the_extras() -> None:
    names = [name for name in MODULES if not name.endswith("__main__")]
    output = run_python(
        f"""
import importlib, sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # importing it fails now
for name in {names}:
    importlib.import_module(name)
    print(name)
"""
    )
    assert output.split() == names


def test_no_two_modules_share_a_name() -> None:
    names = [path.stem for path in MODULES.values() if path.stem != "__init__"]
    assert not {name for name in names if names.count(name) > 1}


def test_no_module_without_a_subject() -> None:
    assert not [str(path) for path in MODULES.values() if path.stem in ("utils", "util", "helpers", "misc")]


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_no_absolute_paths_of_one_machine() -> None:
    machine_path = re.compile(r"(?<![\w.~/-])/(?:home|Users|root|work)/\w")
    assert machine_path.search("open('/home/someone/file')") and not machine_path.search("https://example.org/home/x")
    written = [path for folder in (PACKAGE, ROOT / "docs") for path in folder.rglob("*")]
    written += [path for pattern in ("*.py", "*.md", "Makefile", "*.toml", "*.txt") for path in ROOT.glob(pattern)]
    faults = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in written
        if path.suffix in (".py", ".md", ".toml", ".txt", ".tsv", ".json", "") and path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if machine_path.search(line)
    ]
    assert not faults, "\n".join(faults)

"""Our folder `kernels` beside transformers' optional package of that name.

Theirs is a stand-in here: a distribution called kernels, of a version that
transformers takes, with the module names that the real one had in 0.17.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import streamer

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "kernels"
THEIR_MODULES = {
    "archs", "backends", "benchmark", "benchmarks", "cli", "compat", "deps", "hf_hub", "importer",
    "install", "layer", "load", "locking", "python_deps", "resolver", "status", "validate",
    "variants", "verify",
}  # fmt: skip
HAS_TORCH = importlib.util.find_spec("torch") is not None
alone = pytest.mark.skipif(
    any(d.name == "kernels" for d in importlib.metadata.distributions()),
    reason="Hugging Face's kernels is installed here",
)

LOOK = """
import json
import transformers
from transformers.utils import is_kernels_available
seen = {"available": is_kernels_available()}
import kernels
seen["folders"] = list(kernels.__path__)
seen["theirs"] = hasattr(kernels, "get_kernel")
if TORCH:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes))
    prompt = torch.tensor([[1, 2, 3]])
    seen["shape"] = list(model.generate(prompt, max_new_tokens=4, min_new_tokens=4).shape)
print(json.dumps(seen))
"""


def first(path: Path) -> dict[str, str]:
    """The environment with `path` first on Python's path."""
    paths = filter(None, [str(path), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def look(path: Path, cwd: Path) -> dict[str, Any]:
    """What transformers sees with `path` first on Python's path."""
    script = f"TORCH = {HAS_TORCH}\n{LOOK}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env=first(path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the stand-in in it."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    folder = tmp_path_factory.mktemp("theirs")
    package = folder / "kernels"
    package.mkdir()
    stub = "def __getattr__(name):\n    if name[:2] == '__':\n        raise AttributeError(name)\n"
    (package / "__init__.py").write_text(
        f"{stub}    return type(name, (), {{'__init__': lambda self, *a, **k: None}})\n"
        "def use_kernel_forward_from_hub(name):\n    return lambda cls: cls\n"
        "def use_kernelized_func(*names):\n    return lambda cls: cls\n"
    )
    for name in THEIR_MODULES:
        (package / f"{name}.py").write_text("")
    info = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    )
    (info / "top_level.txt").write_text("kernels\n")
    return folder


@pytest.mark.smoke
def test_ours_is_a_namespace_that_leaves_their_modules_alone() -> None:
    assert OURS.is_dir() and not (OURS / "__init__.py").exists()
    names = {path.name.split(".")[0] for path in OURS.iterdir()} - {"__pycache__"}
    assert not names & THEIR_MODULES
    assert not any(name.startswith("_") for name in names)


@pytest.mark.smoke
def test_our_version_cannot_be_taken_for_theirs() -> None:
    """transformers asks for the version of whichever distribution owns the folder.

    5.7, the first that mlx-lm accepts, takes any version from 0.10.2 on. Before a
    release from 0.10 on, raise the least transformers to one with an upper bound.
    """
    from transformers.utils import import_utils

    assert Version(streamer.__version__) < Version("0.10")
    assert Version(streamer.__version__) < Version(import_utils.KERNELS_MIN_VERSION)


@alone
def test_transformers_does_not_take_the_installed_package_for_theirs(
    site: Path, tmp_path: Path
) -> None:
    seen = look(site, tmp_path)
    assert seen["folders"][0] == str(site / "kernels")
    assert not seen["available"] and not seen["theirs"]
    assert seen.get("shape", [1, 7]) == [1, 7]


@alone
def test_transformers_does_not_take_the_checkout_for_theirs(tmp_path: Path) -> None:
    seen = look(ROOT, tmp_path)
    assert str(OURS) in seen["folders"]
    assert not seen["available"] and not seen["theirs"]


def test_both_in_one_folder_overwrite_nothing_and_work(
    site: Path, theirs: Path, tmp_path: Path
) -> None:
    def files(folder: Path) -> set[Path]:
        return {
            p.relative_to(folder)
            for p in folder.rglob("*")
            if p.is_file() and "__pycache__" not in p.parts
        }

    assert not files(site) & files(theirs)
    both = tmp_path / "both"
    for folder in (site, theirs):
        shutil.copytree(folder, both, dirs_exist_ok=True)
    (both / "kernels" / "ours.py").write_text("x = 1\n")
    seen = look(both, tmp_path)
    assert seen["available"] and seen["theirs"]
    assert seen.get("shape", [1, 7]) == [1, 7]
    done = subprocess.run(
        [sys.executable, "-c", "import kernels.ours, streamer.run; print(kernels.ours.x)"],
        cwd=tmp_path,
        env=first(both),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1\n", done.stderr


def test_theirs_wins_over_a_checkout(theirs: Path, tmp_path: Path) -> None:
    seen = look(Path(f"{ROOT}{os.pathsep}{theirs}"), tmp_path)
    assert seen["available"] and seen["theirs"]
    assert seen.get("shape", [1, 7]) == [1, 7]

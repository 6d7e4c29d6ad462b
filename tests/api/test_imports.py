"""The control plane runs where torch is not installed."""

from __future__ import annotations

import subprocess
import sys

_IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocker:
    names = {
        "torch", "transformers", "datasets", "accelerate", "compressed_tensors", "safetensors", "numpy",
        "huggingface_hub", "pyarrow", "tqdm", "boto3", "botocore",
    }
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import api, migrations
seen = 0
for package in (api, migrations):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name != "migrations.env":  # runs under Alembic only
            importlib.import_module(module.name)
            seen += 1
print(seen)
"""


def test_every_module_imports_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT_ALL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_the_application_loads_no_engine() -> None:
    assert loaded("api.main", "torch", "transformers") == []


def test_the_client_loads_nothing_of_the_server() -> None:
    assert loaded("api.client", "fastapi", "sqlalchemy", "pydantic", "compression", "api.settings") == []


def loaded(module: str, *others: str) -> list[str]:
    """Which of the others are there when the module has been imported."""
    code = f"import sys, {module}; print(*({set(others)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()

"""Paths and one fixture for all tests: the committed tiny models, so nothing is downloaded."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on 2 cores
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    """Run every test in the repository root, where tiny/ lies."""
    monkeypatch.chdir(ROOT)

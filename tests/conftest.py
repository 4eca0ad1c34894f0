"""Fixtures that several tests share: the shipped mini family and a few shipped samples."""

import os
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is not a failure
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    """Scripts and relative paths work from the checkout."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def parts():
    """A fresh copy of the mini SDXL's parts (methods change the UNet they are given)."""
    from packshot.base.load import load_parts
    from packshot.config.schema import ModelConfig

    return load_parts(ModelConfig())


@pytest.fixture(scope="session")
def rows():
    """Held-out rendered samples."""
    from packshot.dataset.rows import load_rows

    return load_rows("data.validation", "data/rendered/heldout")

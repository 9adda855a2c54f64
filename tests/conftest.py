"""Real data is fetched in CI; elsewhere a test that needs it runs only if it is cached."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aerogel import data
from aerogel.data.fetching import _missing


@pytest.fixture
def real_asset():
    """A function that returns the cached folder of an asset, or skips the test."""

    def folder(name: str) -> Path:
        asset = data.ASSETS[name]
        if _missing(asset, data.cache_root() / name) and os.environ.get("CI") != "true":
            pytest.skip(f"{name} is not in the cache; aerogel.data.fetch({name!r}) gets it")
        return data.fetch(name)

    return folder

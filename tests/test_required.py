from __future__ import annotations

import pytest

from tests import required


def test_a_library_that_is_missing(monkeypatch):
    with pytest.raises(pytest.skip.Exception, match="no_such_library is not installed"):
        required.require("no_such_library")
    monkeypatch.setattr(required, "REQUIRED", {"no_such_library"})
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        required.require("no_such_library")


def test_a_library_that_is_there(monkeypatch):
    assert required.require("json").dumps(1) == "1"
    monkeypatch.setattr(required, "REQUIRED", {"json"})
    assert required.require("json").dumps(1) == "1"

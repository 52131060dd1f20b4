"""kernels_triton/interpreter.py: the repair holds where Triton interprets, and is refused where it was not checked."""

from __future__ import annotations

import pytest
from interpreted_child import assert_passes_interpreted

triton = pytest.importorskip("triton")
from kernels_triton import interpreter  # noqa: E402
from workbench.errors import UnsupportedError  # noqa: E402


def test_numerics_in_the_repaired_interpreter() -> None:
    assert_passes_interpreted("test_casts.py")


def test_nothing_is_repaired_where_triton_compiles() -> None:
    assert not interpreter.requested()
    assert interpreter.InterpreterBuilder.cast_impl is not interpreter._cast


def test_a_version_that_was_not_checked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    with pytest.raises(UnsupportedError, match=r"^triton: .* checked on 3\.6\.0, got 3\.99\.0$"):
        interpreter.install()

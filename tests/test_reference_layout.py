"""The gate/up interleave, row by row."""

from __future__ import annotations

import pytest
import torch

from reference.layout import deinterleave, interleave


def test_chunks_of_gate_and_up_rows_alternate() -> None:
    gate, up = ["g0", "g1", "g2", "g3"], ["u0", "u1", "u2", "u3"]
    names = gate + up
    rows = torch.arange(8).view(1, 8, 1)
    assert [names[row] for row in interleave(rows, 1).flatten()] == ["g0", "u0", "g1", "u1", "g2", "u2", "g3", "u3"]
    assert [names[row] for row in interleave(rows, 2).flatten()] == ["g0", "g1", "u0", "u1", "g2", "g3", "u2", "u3"]
    assert torch.equal(interleave(rows, 4), rows)


@pytest.mark.parametrize("rep", [1, 2, 8, 16])
@pytest.mark.parametrize("shape", [(3, 64, 5), (1, 32, 2, 3), (2, 96)])
def test_deinterleave_undoes_interleave(shape: tuple[int, ...], rep: int) -> None:
    t = torch.randn(shape)
    interleaved = interleave(t, rep)
    assert interleaved.is_contiguous()
    assert torch.equal(deinterleave(interleaved, rep), t)
    assert torch.equal(interleave(deinterleave(t, rep), rep), t)


def test_fp8_weights_interleave_as_their_bytes() -> None:
    w = torch.randn(2, 32, 16).to(torch.float8_e4m3fn)
    assert torch.equal(interleave(w, 8).view(torch.uint8), interleave(w.view(torch.uint8), 8))


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"t: expected a multiple of 2 \* rep = 16 rows in dimension 1, got \[1, 24\]"):
        interleave(torch.zeros(1, 24), 8)
    with pytest.raises(ValueError, match="t: expected a multiple"):
        deinterleave(torch.zeros(1, 24), 8)

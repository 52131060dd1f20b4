"""Weights and batches from a seed: the same again, of the laws they name, in the layouts they should have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from reference.quant import dequantise_w13, quantise_activations
from workbench import generate
from workbench.errors import InputError
from workbench.generate import make_inputs, make_weights
from workbench.problem import FP8, MoEShape, RoutingLaw, Workload
from workbench.verify import expected_output

SHAPE = MoEShape(num_experts=17, hidden_size=256, intermediate_size=72, top_k=5, num_shared_experts=1)
LAWS = ["uniform", "zipf:1.2", "one-expert"]


def batch(num_tokens: int = 100, law: str = "uniform", shape: MoEShape = SHAPE, **values: object) -> torch.Tensor:
    """The topk_ids of one workload."""
    workload = Workload(shape, num_tokens, RoutingLaw.parse(law), **values)  # type: ignore[arg-type]
    return make_inputs(workload, "cpu").topk_ids


def test_weights_have_the_layout_and_the_law(device: torch.device) -> None:
    weights = make_weights(SHAPE, seed=0, device=device)
    assert weights.w13.shape == (17, 144, 256)
    assert weights.w13_scale.shape == (17, 2, 2)
    assert weights.w2.shape == (17, 256, 72)
    assert weights.w2_scale.shape == (17, 2, 1)
    for quantised, scale in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
        assert quantised.dtype == FP8
        assert scale.dtype == torch.float32
        values = quantised.float()
        assert values.isfinite().all()
        assert values.mean().abs() < 1
        assert values.std().item() == pytest.approx(50, rel=0.02)
        assert scale.min() >= 2e-4
        assert scale.max() <= 6e-4


def test_weights_of_another_form_have_its_layout_and_the_plain_values(device: torch.device) -> None:
    plain = make_weights(SHAPE, seed=0, device=device)
    assert plain.w13_bias is None
    assert plain.w2_bias is None
    shape = dataclasses.replace(SHAPE, weight_scales="channel", has_bias=True)
    weights = make_weights(shape, seed=0, device=device)
    assert torch.equal(weights.w13.float(), plain.w13.float())
    assert weights.w13_scale.shape == (17, 144, 1)
    assert weights.w2_scale.shape == (17, 256, 1)
    assert weights.w13_bias is not None
    assert weights.w2_bias is not None
    assert weights.w13_bias.shape == (17, 144)
    assert weights.w2_bias.shape == (17, 256)


@pytest.mark.parametrize("limit", [7.0, 10.0])
def test_where_swiglu_has_a_limit_one_value_of_up_in_twenty_is_beyond_it(limit: float) -> None:
    shape = dataclasses.replace(SHAPE, swiglu_limit=limit)
    weights, inputs = make_weights(shape, 0, "cpu"), make_inputs(Workload(shape, 50), "cpu")
    up = inputs.tokens.float() @ dequantise_w13(weights.w13[0], weights.w13_scale[0])[72:].T
    assert (up.abs() > limit).float().mean().item() == pytest.approx(0.046, abs=0.02)


def test_biases_are_about_as_large_as_what_they_are_added_to() -> None:
    for form in ({}, {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}):
        shape = dataclasses.replace(SHAPE, has_bias=True, **form)
        weights = make_weights(shape, 0, "cpu")
        assert weights.w13_bias is not None
        assert weights.w2_bias is not None
        inputs = make_inputs(Workload(shape, 50), "cpu")
        without = dataclasses.replace(weights, w2_bias=torch.zeros_like(weights.w2_bias))
        up = inputs.tokens.float() @ dequantise_w13(weights.w13[0], weights.w13_scale[0])[72:].T
        one = dataclasses.replace(inputs, topk_ids=inputs.topk_ids[:, :1], topk_weights=torch.ones(50, 1))
        assert 0.5 < weights.w13_bias.std() / up.std() < 2
        assert 0.3 < weights.w2_bias.std() / expected_output(without, one).std() < 3


def test_the_seed_decides_weights_and_batch(device: torch.device) -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        weights, inputs = make_weights(SHAPE, seed, device), make_inputs(Workload(SHAPE, 9, seed=seed), device)
        tensors = (weights.w13, weights.w13_scale, weights.w2, weights.w2_scale)
        return [t.float() for t in (*tensors, inputs.x, inputs.topk_ids, inputs.topk_weights) if t is not None]

    for one, again, other in zip(drawn(3), drawn(3), drawn(4), strict=True):
        assert torch.equal(one, again)
        assert not torch.equal(one, other)


def test_experts_drawn_in_chunks_are_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "ELEMENTS_AT_ONCE", 2 * 144 * 256)
    w13 = make_weights(SHAPE, seed=0, device="cpu").w13.float()
    assert w13.std(dim=(1, 2)).tolist() == pytest.approx([50.0] * 17, rel=0.05)
    assert len({tuple(expert.flatten()[:8].tolist()) for expert in w13}) == 17


def test_a_batch_has_bf16_tokens_and_weights_that_sum_to_one() -> None:
    inputs = make_inputs(Workload(SHAPE, 2000), "cpu")
    assert inputs.x is not None
    assert inputs.x.dtype == torch.bfloat16
    assert inputs.x.shape == (2000, 256)
    assert inputs.x.float().std().item() == pytest.approx(1, rel=0.01)
    assert inputs.topk_ids.dtype == torch.int32
    assert inputs.topk_ids.is_contiguous()
    assert torch.allclose(inputs.topk_weights.sum(dim=1), torch.ones(2000))


def test_an_fp8_batch_is_the_bf16_batch_quantised() -> None:
    inputs, quantised = (make_inputs(Workload(SHAPE, 9, input_kind=kind), "cpu") for kind in ("bf16", "fp8"))
    assert inputs.x is not None
    assert quantised.x_q is not None
    assert quantised.x_scale is not None
    x_q, x_scale = quantise_activations(inputs.x)
    assert torch.equal(quantised.x_q.float(), x_q.float())
    assert torch.equal(quantised.x_scale, x_scale)
    assert torch.equal(quantised.topk_ids, inputs.topk_ids)


@pytest.mark.parametrize("law", LAWS)
def test_every_row_has_distinct_routed_experts_and_then_the_shared_one(law: str) -> None:
    ids = batch(law=law)
    assert (ids[:, -1] == 16).all()
    for row in ids[:, :-1].tolist():
        assert len(set(row)) == 4
        assert all(0 <= expert < 16 for expert in row)


@pytest.mark.parametrize("law", LAWS)
def test_an_empty_batch(law: str) -> None:
    assert batch(0, law).shape == (0, 5)


def test_uniform_routing_hits_all_experts_alike() -> None:
    counts = torch.bincount(batch(8000)[:, :-1].flatten(), minlength=16)
    assert (counts / 8000 - 0.25).abs().max() < 0.03


def test_the_first_choice_under_zipf_follows_the_power_law_on_shuffled_ranks() -> None:
    shape = MoEShape(num_experts=8, hidden_size=128, intermediate_size=128, top_k=1)
    counts = torch.bincount(batch(20000, "zipf:1.2", shape).flatten(), minlength=8)
    law = torch.arange(1, 9).float() ** -1.2
    assert torch.allclose(counts.sort(descending=True).values / 20000, law / law.sum(), atol=0.015)
    orders = {tuple(batch(2000, "zipf:1.2", shape, seed=s).flatten().bincount(minlength=8).argsort()) for s in range(4)}
    assert len(orders) == 4


def test_one_expert_takes_the_first_choice_of_all_and_the_next_ids_follow() -> None:
    assert (batch(law="one-expert", seed=15) == torch.tensor([15, 0, 1, 2, 16])).all()


def test_dropped_choices_are_routed_ones_in_the_fraction_asked_for() -> None:
    ids = batch(4000, dropped=0.3)
    assert (ids[:, -1] == 16).all()
    assert (ids[:, :-1] == -1).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (batch(10, dropped=1.0)[:, :-1] == -1).all()


def test_a_recorded_file_is_replayed_from_its_first_row_and_repeated(tmp_path: Path) -> None:
    recorded = torch.tensor([[0, 1, 2, 3, 16], [4, -1, 6, 7, 16], [8, 8, 9, 9, 9]])
    torch.save(recorded, tmp_path / "ids.pt")
    ids = batch(5, f"replay:{tmp_path / 'ids.pt'}")
    assert torch.equal(ids, recorded[[0, 1, 2, 0, 1]].int())
    torch.save(recorded.int().view(1, 3, 5), tmp_path / "layers.pt")
    assert torch.equal(batch(5, f"replay:{tmp_path / 'layers.pt'}"), ids)


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (
            torch.zeros(3, 4, dtype=torch.int32),
            r"expected an int32 or int64 tensor \[\*, 5\], got torch.int32 \[3, 4\]",
        ),
        (torch.zeros(5, dtype=torch.int32), r"got torch.int32 \[5\]"),
        (torch.zeros(0, 5, dtype=torch.int32), r"got torch.int32 \[0, 5\]"),
        (torch.zeros(3, 5), r"got torch.float32 \[3, 5\]"),
        ([1, 2], "got list"),
        (torch.full((3, 5), 17), r"expected ids in -1\.\.16, got 17\.\.17"),
        (torch.full((3, 5), -2), r"expected ids in -1\.\.16, got -2\.\.-2"),
    ],
)
def test_a_recording_that_does_not_fit_is_refused(tmp_path: Path, recorded: object, message: str) -> None:
    torch.save(recorded, tmp_path / "ids.pt")
    with pytest.raises(InputError, match=rf"^routing: .*ids\.pt: .*{message}$"):
        batch(5, f"replay:{tmp_path / 'ids.pt'}")


class Trap:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


@pytest.mark.parametrize("content", [b"", b"not a tensor", b"PK\x03\x04truncated"])
def test_a_file_that_is_no_tensor_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ids.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"^routing: .*ids\.pt: not a tensor that torch\.save wrote: [^\n]*$"):
        batch(5, f"replay:{tmp_path / 'ids.pt'}")


def test_a_file_is_never_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Trap(), tmp_path / "ids.pt")
    with pytest.raises(InputError, match=r"not a tensor that torch\.save wrote"):
        batch(5, f"replay:{tmp_path / 'ids.pt'}")
    assert "unpickled" not in capsys.readouterr().out

"""What every implementation of the layer obeys, as properties to be checked on small random problems.

Use it so:

    @pytest.mark.parametrize("prop", PROPERTIES, ids=name_of)
    def test_layer_property(prop):
        check(prop, find("triton.grouped"), small_shapes(), device, max_examples=5)

or `check_all(variant, shapes, device, max_examples)` for all of them at once. `shapes` is a strategy: `small_shapes()`
draws many; `st.sampled_from([...])` keeps to a few where each new shape has to be compiled. Each example is run as the
contract says, from bf16 or quantised tokens, through `align` or not, and in each of these runs whatever the property:

- `out` and fresh memory hold NaN beforehand, and nothing of it may be left or spill into a result;
- the rows behind `out` must not be written, nor the weights, nor the inputs.

`small_shapes(forms=layer_forms())` draws layers with other activations, scales and biases besides.

`bitwise` asks equality where a property holds exactly in floating point (doubling); only for variants that sum in a
fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure, poison, poisoned_allocations
from workbench.problem import FP8, INPUT_KINDS, MoEInputs, MoEShape, MoEWeights, RoutingLaw, Workload
from workbench.variant import Variant
from workbench.verify import expected_output

GUARD_ROWS = 4


@dataclass(frozen=True)
class Case:
    """One layer, one batch on it, and the variant under test."""

    variant: Variant
    weights: MoEWeights
    inputs: MoEInputs
    seed: int
    aligned_ahead: bool
    """Whether batches go through `variant.align` before `run`."""
    bitwise: bool

    def run(self, *batches: MoEInputs, weights: MoEWeights | None = None) -> tuple[torch.Tensor, ...]:
        """Prepare once and run each batch in turn; fp32 outputs [M, H]."""
        weights = weights or self.weights
        with poisoned_allocations(weights.device):
            prepared = self.variant.prepare(weights)
        return tuple(run_guarded(self.variant, prepared, weights, batch, self.aligned_ahead) for batch in batches)

    def permutation(self, size: int) -> torch.Tensor:
        """A permutation of `size` things, the same for the same case."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(size, generator=generator).to(self.weights.device)

    def assert_close(self, got: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
        """||got - expected|| <= tolerance ||expected||; two runs of one variant may each be off by its tolerance."""
        allowed = 2 * self.variant.tolerance if tolerance is None else tolerance
        assert measure(got, expected, allowed).rel_err <= allowed

    def assert_same(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        """Tokens that differ only in what else was in the batch: bit by bit for a deterministic variant."""
        if self.variant.deterministic:
            assert torch.equal(got, expected)
        else:
            self.assert_close(got, expected)

    def assert_doubled(self, got: torch.Tensor, single: torch.Tensor) -> None:
        if self.bitwise:
            assert torch.equal(got, 2 * single)
        else:
            self.assert_close(got, 2 * single)


Property = Callable[[Case], None]


def run_guarded(
    variant: Variant, prepared: object, weights: MoEWeights, inputs: MoEInputs, aligned_ahead: bool = False
) -> torch.Tensor:
    """`variant.run` into a poisoned `out`; fp32 [M, H]. Asserts that all of `out` and nothing else was written."""
    shape, num_tokens = weights.shape, inputs.num_tokens
    config = next(iter(variant.configs(shape, num_tokens)))
    if aligned_ahead:
        inputs = variant.align(prepared, inputs, config)
    read_only = [*_tensors(weights), *_tensors(inputs)]
    before = [tensor.clone() for tensor in read_only]
    rows = poison(torch.empty(num_tokens + GUARD_ROWS, shape.hidden_size, dtype=torch.bfloat16, device=weights.device))
    with poisoned_allocations(weights.device):
        variant.run(prepared, inputs, rows[:num_tokens], config)
    assert all(_same_bytes(now, then) for now, then in zip(read_only, before, strict=True)), "an input was written"
    assert (rows[num_tokens:].view(torch.int16) == -1).all(), "rows behind out were written"
    out = rows[:num_tokens].float()
    assert out.isfinite().all(), "poison shows in out"
    return out


def matches_the_reference(case: Case) -> None:
    (out,) = case.run(case.inputs)
    case.assert_close(out, expected_output(case.weights, case.inputs), case.variant.tolerance)


def permuting_tokens_permutes_rows(case: Case) -> None:
    order = case.permutation(case.inputs.num_tokens)
    out, permuted = case.run(case.inputs, _rows(case.inputs, order))
    case.assert_same(permuted, out[order])


def renaming_experts_changes_nothing(case: Case) -> None:
    shape, weights = case.weights.shape, case.weights
    names = torch.arange(shape.num_experts, device=weights.device)
    num_routed = shape.num_experts - shape.num_shared_experts  # shared experts keep the last ids
    names[:num_routed] = case.permutation(num_routed)  # new id -> old id
    renamed_weights = MoEWeights(shape, *(_take(tensor, names) for tensor in weights.tensors))
    new_ids = names.argsort()[case.inputs.topk_ids.clamp(min=0).long()].int()
    renamed = dataclasses.replace(case.inputs, topk_ids=new_ids.masked_fill(case.inputs.topk_ids < 0, -1))
    (out,) = case.run(case.inputs)
    (renamed_out,) = case.run(renamed, weights=renamed_weights)
    case.assert_close(renamed_out, out)


def a_zero_weight_removes_an_expert(case: Case) -> None:
    removed = case.permutation(case.inputs.topk_ids.numel()).view_as(case.inputs.topk_ids) % 2 == 0
    unweighted = dataclasses.replace(case.inputs, topk_weights=case.inputs.topk_weights.masked_fill(removed, 0.0))
    absent = dataclasses.replace(case.inputs, topk_ids=case.inputs.topk_ids.masked_fill(removed, -1))
    case.assert_close(*case.run(unweighted, absent))


def linear_in_topk_weights(case: Case) -> None:
    ones = case.inputs.topk_weights
    others = ones.flip(1) + 0.25
    mixed = 2.0 * ones + 0.5 * others
    batches = [dataclasses.replace(case.inputs, topk_weights=weights) for weights in (ones, others, mixed)]
    for_ones, for_others, for_mixed = case.run(*batches)
    case.assert_close(for_mixed, 2.0 * for_ones + 0.5 * for_others)


def doubling_a_linear_factor_doubles_out(case: Case) -> None:
    """The factors that out is linear in: topk_weights, the routed scaling factor, and together with w2's biases, w2's
    scales or, where up is neither clamped nor shifted, the scales and biases of the up rows."""
    weights, inputs = case.weights, case.inputs
    out, twice_weighted, twice_factor = case.run(
        inputs,
        dataclasses.replace(inputs, topk_weights=2 * inputs.topk_weights),
        dataclasses.replace(inputs, routed_scaling_factor=2 * inputs.routed_scaling_factor),
    )
    case.assert_doubled(twice_weighted, out)
    case.assert_doubled(twice_factor, out)
    changes = [{"w2_scale": 2 * weights.w2_scale}]
    if weights.shape.swiglu_limit is None and not weights.shape.swiglu_beta:
        changes.append({name: _up_doubled(getattr(weights, name)) for name in ("w13_scale", "w13_bias")})
    w2_bias = None if weights.w2_bias is None else 2 * weights.w2_bias
    for changed in changes:
        (doubled,) = case.run(inputs, weights=dataclasses.replace(weights, w2_bias=w2_bias, **changed))
        case.assert_doubled(doubled, out)


def splitting_the_batch_changes_nothing(case: Case) -> None:
    rows = torch.arange(case.inputs.num_tokens, device=case.weights.device)
    middle = (len(rows) + 1) // 3
    out, first, second = case.run(case.inputs, _rows(case.inputs, rows[:middle]), _rows(case.inputs, rows[middle:]))
    case.assert_same(torch.cat([first, second]), out)


def an_earlier_batch_never_shows(case: Case) -> None:
    """Workspaces that outlive a run hold nothing that a later one reads."""
    rows = torch.arange(case.inputs.num_tokens, device=case.weights.device)
    larger = _rows(case.inputs, torch.cat([rows.flip(0), rows]))
    out, _, again = case.run(case.inputs, larger, case.inputs)
    if case.bitwise:
        assert torch.equal(again, out)
    else:
        case.assert_same(again, out)


def a_batch_without_experts_is_zero(case: Case) -> None:
    absent = dataclasses.replace(case.inputs, topk_ids=torch.full_like(case.inputs.topk_ids, -1))
    _, out = case.run(case.inputs, absent)
    assert not out.any()


PROPERTIES: tuple[Property, ...] = (
    matches_the_reference,
    permuting_tokens_permutes_rows,
    renaming_experts_changes_nothing,
    a_zero_weight_removes_an_expert,
    linear_in_topk_weights,
    doubling_a_linear_factor_doubles_out,
    splitting_the_batch_changes_nothing,
    an_earlier_batch_never_shows,
    a_batch_without_experts_is_zero,
)


def name_of(prop: Property) -> str:
    """The property's name, for pytest's ids."""
    return prop.__name__


def layer_forms() -> st.SearchStrategy[dict[str, Any]]:
    """The fields of MoEShape that make a layer another than the plain one, in all combinations, the plain one too."""
    activations = st.sampled_from(
        [
            {},
            {"swiglu_limit": 10.0},  # DeepSeek-V4
            {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},  # gpt-oss
        ]
    )
    scales = st.fixed_dictionaries(
        {
            "weight_scales": st.sampled_from(["block", "channel"]),
            "activation_scales": st.sampled_from(["group", "group_ue8m0", "token"]),
            "has_bias": st.booleans(),
        }
    )
    return st.tuples(activations, scales).map(lambda parts: {**parts[0], **parts[1]})


@st.composite
def small_shapes(
    draw: st.DrawFn,
    hidden_multiple: int = 128,
    intermediate_multiple: int = 128,
    forms: st.SearchStrategy[dict[str, Any]] = st.just({}),
) -> MoEShape:
    """Layers of up to 6 experts and 3 blocks of H and I, with or without a shared expert."""
    num_shared = draw(st.integers(0, 1))
    num_routed = draw(st.integers(1, 5))
    return MoEShape(
        num_experts=num_routed + num_shared,
        hidden_size=hidden_multiple * draw(st.integers(1, 3 * 128 // hidden_multiple)),
        intermediate_size=intermediate_multiple * draw(st.integers(1, 3 * 128 // intermediate_multiple)),
        top_k=draw(st.integers(1, min(4, num_routed))) + num_shared,
        num_shared_experts=num_shared,
        **draw(forms),
    )


@st.composite
def workloads(draw: st.DrawFn, shapes: st.SearchStrategy[MoEShape], max_tokens: int = 40) -> Workload:
    """Batches on these layers: M = 0 included, every law, some choices dropped, bf16 or quantised tokens."""
    return Workload(
        shape=draw(shapes),
        num_tokens=draw(st.one_of(st.integers(0, 9), st.integers(0, max_tokens))),
        routing=RoutingLaw.parse(draw(st.sampled_from(["uniform", "zipf:1.2", "one-expert"]))),
        seed=draw(st.integers(0, 1000)),
        input_kind=draw(st.sampled_from(INPUT_KINDS)),
        dropped=draw(st.sampled_from([0.0, 0.4])),
    )


def check(
    prop: Property,
    variant: Variant,
    shapes: st.SearchStrategy[MoEShape],
    device: torch.device | str = "cpu",
    max_examples: int = 10,
    bitwise: bool = False,
) -> None:
    """Assert one property on `max_examples` random batches; the same ones every time."""

    @settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(workloads(shapes), st.booleans(), st.booleans(), st.sampled_from([1.0, 2.5]))
    def holds(workload: Workload, repeated: bool, aligned_ahead: bool, routed_scaling_factor: float) -> None:
        support = variant.supports(workload.shape, torch.device(device))
        assert support, f"{variant.name} refuses {workload.shape}: {support.reason}"
        inputs = make_inputs(workload, device)
        if repeated:
            inputs = _with_repeated_experts(inputs, workload.shape)
        inputs = dataclasses.replace(inputs, routed_scaling_factor=routed_scaling_factor)
        prop(Case(variant, _weights(workload.shape, str(device)), inputs, workload.seed, aligned_ahead, bitwise))

    holds()


def check_all(
    variant: Variant,
    shapes: st.SearchStrategy[MoEShape],
    device: torch.device | str = "cpu",
    max_examples: int = 10,
    bitwise: bool = False,
) -> None:
    """Assert every property; see `check`."""
    for prop in PROPERTIES:
        check(prop, variant, shapes, device, max_examples, bitwise)


@functools.lru_cache(maxsize=64)
def _weights(shape: MoEShape, device: str) -> MoEWeights:
    return make_weights(shape, seed=0, device=device)


def _with_repeated_experts(inputs: MoEInputs, shape: MoEShape) -> MoEInputs:
    """Every second token visits its first routed expert in all its routed slots."""
    topk_ids = inputs.topk_ids.clone()
    routed_slots = shape.top_k - shape.num_shared_experts
    topk_ids[::2, :routed_slots] = topk_ids[::2, :1]
    return dataclasses.replace(inputs, topk_ids=topk_ids)


def _rows(inputs: MoEInputs, rows: torch.Tensor) -> MoEInputs:
    """The batch of these tokens of `inputs`, in this order."""
    per_token = {
        name: _take(tensor, rows)
        for name in ("x", "x_q", "x_scale", "topk_ids", "topk_weights")
        if (tensor := getattr(inputs, name)) is not None
    }
    return dataclasses.replace(inputs, **per_token)


def _up_doubled(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """w13's scales or biases [E, rows, ...], those of the up rows doubled."""
    if tensor is None:
        return None
    gate, up = tensor.chunk(2, dim=1)
    return torch.cat([gate, 2 * up], dim=1)


def _take(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """tensor[rows] for any dtype: not every release of torch indexes FP8 tensors."""
    return tensor.view(torch.uint8)[rows].view(FP8) if tensor.dtype == FP8 else tensor[rows]


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """All tensors in a dataclass, nested ones included."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))

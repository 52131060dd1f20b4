"""Weights and batches from a seed.

Values are like those that published kernels were measured on: weights e4m3 of a normal law of deviation 50, scales
uniform in 2e-4..6e-4, tokens normal, topk_weights a softmax of normal logits. Where SwiGLU has a limit, w13's scales
are such that one value of up in twenty is beyond it; biases are normal, about as large as what they are added to. The
same seed on the same kind of device gives the same tensors.
"""

from __future__ import annotations

import math

import torch

from reference.quant import FP8_MAX
from workbench.errors import InputError
from workbench.problem import FP8, MoEInputs, MoEShape, MoEWeights, RoutingLaw, Workload, scale_blocks

WEIGHT_DEVIATION = 50.0
SCALE_RANGE = (2e-4, 6e-4)
ELEMENTS_AT_ONCE = 1 << 26
"""How many weights exist in fp32 at a time. Part of what the seed means: another number draws other weights."""

_WEIGHTS, _BATCH = 0, 1


def make_weights(shape: MoEShape, seed: int, device: torch.device | str) -> MoEWeights:
    """One layer's weights on `device`, in the layouts of problem.py."""
    generator = _generator(seed, _WEIGHTS, device)
    experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
    w13_scale_shape: tuple[int, int] = (2 * intermediate, 1)
    w2_scale_shape: tuple[int, int] = (hidden, 1)
    if shape.weight_scales == "block":
        w13_scale_shape = (2 * scale_blocks(intermediate), scale_blocks(hidden))
        w2_scale_shape = (scale_blocks(hidden), scale_blocks(intermediate))
    dequantised = WEIGHT_DEVIATION * sum(SCALE_RANGE) / 2
    gate, enlarged = dequantised * math.sqrt(hidden), 1.0  # the deviation of W13gate . x
    if shape.swiglu_limit is not None:
        gate, enlarged = shape.swiglu_limit / 2, shape.swiglu_limit / 2 / gate
    down = dequantised * math.sqrt(intermediate) * gate * (gate + abs(shape.swiglu_beta)) / 2
    return MoEWeights(
        shape=shape,
        w13=_random_fp8(experts, 2 * intermediate, hidden, generator),
        w13_scale=_random_scales(experts, *w13_scale_shape, generator).mul_(enlarged),
        w2=_random_fp8(experts, hidden, intermediate, generator),
        w2_scale=_random_scales(experts, *w2_scale_shape, generator),
        w13_bias=_random_bias(experts, 2 * intermediate, gate, generator) if shape.has_bias else None,
        w2_bias=_random_bias(experts, hidden, down, generator) if shape.has_bias else None,
    )


def make_inputs(workload: Workload, device: torch.device | str) -> MoEInputs:
    """The batch that `workload` describes, on `device`: bf16 tokens, or quantised ones, by its input_kind.

    Raises InputError when a file to replay does not fit the shape.
    """
    shape, num_tokens = workload.shape, workload.num_tokens
    generator = _generator(workload.seed, _BATCH, device)
    topk_ids = _choose(workload, generator)
    if workload.dropped:
        drop = torch.rand(topk_ids.shape, generator=generator, device=device) < workload.dropped
        routed = topk_ids < shape.num_experts - shape.num_shared_experts
        topk_ids = topk_ids.masked_fill(drop & routed, -1)
    logits = torch.randn(num_tokens, shape.top_k, generator=generator, device=device)
    x = torch.randn(num_tokens, shape.hidden_size, generator=generator, device=device).bfloat16()
    inputs = MoEInputs(
        topk_ids=topk_ids.int().contiguous(),
        topk_weights=logits.softmax(dim=1),
        x=x,
        activation_scales=shape.activation_scales,
    )
    return inputs.quantise() if workload.input_kind == "fp8" else inputs


def _generator(seed: int, stream: int, device: torch.device | str) -> torch.Generator:
    """Weights and batches draw from streams of their own, so that equal seeds do not correlate them."""
    return torch.Generator(device=device).manual_seed(2 * seed + stream)


def _random_fp8(experts: int, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    weights = torch.empty(experts, rows, columns, dtype=FP8, device=generator.device)
    for some in weights.split(max(1, ELEMENTS_AT_ONCE // (rows * columns))):
        values = torch.randn(some.shape, generator=generator, device=generator.device)
        some.copy_(values.mul_(WEIGHT_DEVIATION).clamp_(-FP8_MAX, FP8_MAX))
    return weights


def _random_scales(experts: int, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(experts, rows, columns, device=generator.device).uniform_(*SCALE_RANGE, generator=generator)


def _random_bias(experts: int, rows: int, deviation: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(experts, rows, generator=generator, device=generator.device).mul_(deviation)


def _choose(workload: Workload, generator: torch.Generator) -> torch.Tensor:
    """topk_ids [M, top_k] by the workload's law; shared experts fill the last slots of every row."""
    shape, num_tokens, law = workload.shape, workload.num_tokens, workload.routing
    device = generator.device
    if law.kind == "replay":
        return _replay(law, shape, num_tokens).to(device)
    num_routed = shape.num_experts - shape.num_shared_experts
    routed_slots = shape.top_k - shape.num_shared_experts
    if law.kind == "one-expert":
        first = workload.seed % num_routed
        same = (first + torch.arange(routed_slots, device=device)) % num_routed
        routed = same.expand(num_tokens, routed_slots)
    else:
        # The largest of log(weight) + Gumbel noise are a draw without replacement (Efraimidis and Spirakis, 2006).
        rank = 1 + torch.randperm(num_routed, generator=generator, device=device)
        noise = torch.rand(num_tokens, num_routed, generator=generator, device=device).log_().neg_().log_().neg_()
        routed = (noise - law.exponent * rank.log()).topk(routed_slots, dim=1).indices
    shared = torch.arange(num_routed, shape.num_experts, device=device).expand(num_tokens, -1)
    return torch.cat([routed, shared], dim=1)


def _replay(law: RoutingLaw, shape: MoEShape, num_tokens: int) -> torch.Tensor:
    """Rows of the recorded topk_ids, shared experts' slots included, from the first and repeated as needed."""
    try:
        recorded = torch.load(law.path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage can raise anything
        reason = str(error).partition("\n")[0]
        raise InputError(f"routing: {law.path}: not a tensor that torch.save wrote: {reason}") from error
    expected = f"an int32 or int64 tensor [*, {shape.top_k}]"
    if not isinstance(recorded, torch.Tensor):
        raise InputError(f"routing: {law.path}: expected {expected}, got {type(recorded).__name__}")
    fits = recorded.ndim >= 2 and recorded.shape[-1] == shape.top_k and recorded.numel() > 0
    if not fits or recorded.dtype not in (torch.int32, torch.int64):
        raise InputError(f"routing: {law.path}: expected {expected}, got {recorded.dtype} {list(recorded.shape)}")
    low, high = int(recorded.min()), int(recorded.max())
    if low < -1 or high >= shape.num_experts:
        raise InputError(f"routing: {law.path}: expected ids in -1..{shape.num_experts - 1}, got {low}..{high}")
    rows = recorded.flatten(0, -2)
    return rows[torch.arange(num_tokens) % len(rows)]

"""The problem: a layer's shape, a workload on it, and the tensors of both.

Layouts and names are the field's (vLLM, SGLang):

    x            bf16 [M, H]      or  x_q e4m3 [M, H] with x_scale fp32 [M, ceil(H/128)]
    w13          e4m3 [E, 2I, H]  gate rows, then up rows    w13_scale fp32 [E, 2*ceil(I/128), ceil(H/128)]
    w2           e4m3 [E, H, I]                              w2_scale  fp32 [E, ceil(H/128), ceil(I/128)]
    topk_ids     int32 [M, top_k]   -1: the expert is not on this rank and contributes nothing
    topk_weights fp32 [M, top_k]
    out          bf16 [M, H]

M tokens, E experts, H hidden size, I intermediate size of one tensor-parallel rank. That is the plain layer; MoEShape
names the other forms. With them x_scale may be [M, 1], w13_scale [E, 2I, 1] and w2_scale [E, H, 1], and there may be
w13_bias fp32 [E, 2I] and w2_bias fp32 [E, H].
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, get_args

import torch

from reference.quant import GROUP_SIZE, ActivationScales, quantise_as
from reference.routing import AlignedRouting, TiledRouting
from workbench.errors import InputError

FP8 = torch.float8_e4m3fn

InputKind = Literal["bf16", "fp8"]
INPUT_KINDS: tuple[InputKind, ...] = ("bf16", "fp8")

WeightScales = Literal["block", "channel"]
"""One scale for each 128 x 128 block of a weight, or one for each of its rows."""

ABSENT_MEANS_DEFAULT = "absent means default"
"""Metadata of a field that records may lack: it was added later, and its default is what they were made with."""

_FORM = {ABSENT_MEANS_DEFAULT: True}


class LayerForm(TypedDict, total=False):
    """What makes a layer another than the plain one, as public calls take it; see MoEShape for the meanings."""

    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    swiglu_limit: float | None
    swiglu_alpha: float
    swiglu_beta: float
    activation_scales: ActivationScales


PLAIN_FORM: LayerForm = {
    "w13_bias": None,
    "w2_bias": None,
    "swiglu_limit": None,
    "swiglu_alpha": 1.0,
    "swiglu_beta": 0.0,
    "activation_scales": "group",
}


def _positive(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: expected an integer >= {least}, got {value!r}")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(name: str, allowed: tuple[str, ...], value: object) -> None:
    if value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True)
class MoEShape:
    """One rank's layer. Shared experts count in `num_experts` and `top_k`; they own the last ids.

    The fields with defaults behind `activation` are the layer's form. Names and meanings are those of vLLM and, for
    scales, of compressed-tensors. Weights with one scale per tensor are "block" weights with equal scales.

    Raises InputError when a size is not a positive integer, top_k exceeds what the experts allow, or a form is none.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    num_shared_experts: int = 0
    activation: Literal["swiglu"] = "swiglu"
    swiglu_limit: float | None = dataclasses.field(default=None, metadata=_FORM)
    """The gate is clamped to at most this and up to plus and minus this; None does not clamp."""
    swiglu_alpha: float = dataclasses.field(default=1.0, metadata=_FORM)
    swiglu_beta: float = dataclasses.field(default=0.0, metadata=_FORM)
    """The activation is gate * sigmoid(alpha * gate) * (up + beta)."""
    weight_scales: WeightScales = dataclasses.field(default="block", metadata=_FORM)
    activation_scales: ActivationScales = dataclasses.field(default="group", metadata=_FORM)
    """How x and the activation are quantised. Engines pair "channel" weights with "token"."""
    has_bias: bool = dataclasses.field(default=False, metadata=_FORM)
    """w13_bias is added ahead of the activation; w2_bias to an expert's output, ahead of its topk_weight. Of the ranks
    of a tensor-parallel group one has the model's w2_bias, the others zeros."""
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        for field in ("num_experts", "hidden_size", "intermediate_size", "top_k"):
            _positive(field, getattr(self, field))
        _positive("num_shared_experts", self.num_shared_experts, least=0)
        routed = self.num_experts - self.num_shared_experts
        if self.top_k <= self.num_shared_experts or self.top_k - self.num_shared_experts > routed:
            raise InputError(
                f"top_k: expected {self.num_shared_experts + 1}..{self.num_shared_experts + routed} for "
                f"{routed} routed and {self.num_shared_experts} shared experts, got {self.top_k}"
            )
        if self.activation != "swiglu":
            raise InputError(f"activation: expected 'swiglu', got {self.activation!r}")
        if self.swiglu_limit is not None and not (_is_finite(self.swiglu_limit) and self.swiglu_limit > 0):
            raise InputError(f"swiglu_limit: expected a positive number or None, got {self.swiglu_limit!r}")
        for field in ("swiglu_alpha", "swiglu_beta"):
            if not _is_finite(getattr(self, field)):
                raise InputError(f"{field}: expected a finite number, got {getattr(self, field)!r}")
        _one_of("weight_scales", get_args(WeightScales), self.weight_scales)
        _one_of("activation_scales", get_args(ActivationScales), self.activation_scales)

    @property
    def w13_rows(self) -> int:
        """N = 2I, the rows of w13."""
        return 2 * self.intermediate_size

    @property
    def scales_per_token(self) -> int:
        """The columns of x_scale."""
        return 1 if self.activation_scales == "token" else scale_blocks(self.hidden_size)

    def unserved(self, *served: str) -> str:
        """Why a kernel of the plain layer does not compute this one, for `Support.no`; "" if it does.

        `served` names what the kernel does besides: fields of the form, or single values such as "group_ue8m0".
        """
        for name, plain, value in self._unusual():
            if name not in served and value not in served:
                return f"{name}: expected {plain!r}, got {value!r}"
        return ""

    def expected_experts_hit(self, num_tokens: int, dropped: float = 0.0) -> float:
        """Routed experts that a batch reaches on average under uniform routing; shared ones are not counted.

        `dropped` is the fraction of routed choices that are -1.
        """
        routed, slots = self.num_experts - self.num_shared_experts, self.top_k - self.num_shared_experts
        return routed * (1 - (1 - (1 - dropped) * slots / routed) ** num_tokens)

    def expected_rows(self, num_tokens: int) -> float:
        """Tokens of a routed expert that is hit, on average under uniform routing."""
        routed_slots = self.top_k - self.num_shared_experts
        return num_tokens * routed_slots / max(self.expected_experts_hit(num_tokens), 1.0)

    def _unusual(self) -> list[tuple[str, object, object]]:
        """(name, the plain layer's value, this one's) of the fields in which this is not the plain layer."""
        form = [field for field in dataclasses.fields(self) if ABSENT_MEANS_DEFAULT in field.metadata]
        values = [(field.name, field.default, getattr(self, field.name)) for field in form]
        return [(name, plain, value) for name, plain, value in values if value != plain]

    def __str__(self) -> str:
        sizes = (
            f"E{self.num_experts}_N{self.w13_rows}_K{self.hidden_size}_top{self.top_k}_shared{self.num_shared_experts}"
        )
        form = (
            value if isinstance(value, str) else name.partition("_")[2] + ("" if value is True else f"{value:g}")
            for name, _, value in self._unusual()
        )
        return self.name or "_".join([sizes, *form])


@dataclass(frozen=True)
class RoutingLaw:
    """How tokens choose experts. Written `uniform`, `zipf:1.2`, `one-expert` or `replay:<file>`.

    uniform     routed experts drawn without replacement, all alike
    zipf:s      expert of rank r drawn with weight r^-s, ranks shuffled, without replacement
    one-expert  every token's routed choices start with the same expert; the others are the next ids
    replay:f    rows of the int `topk_ids` tensor that torch.save wrote to f, repeated as needed
    """

    kind: Literal["uniform", "zipf", "one-expert", "replay"] = "uniform"
    exponent: float = 0.0
    path: str = ""

    @staticmethod
    def parse(text: str) -> RoutingLaw:
        """The law that `text` names; InputError says what is allowed."""
        kind, _, argument = text.partition(":")
        if kind in ("uniform", "one-expert") and not argument:
            return RoutingLaw(kind)  # type: ignore[arg-type]
        if kind == "zipf":
            try:
                exponent = float(argument or "1.2")
            except ValueError:
                exponent = math.nan
            if not (0 < exponent < 100):
                raise InputError(f"routing: zipf expects a positive exponent, got {argument!r}")
            return RoutingLaw("zipf", exponent=exponent)
        if kind == "replay" and argument:
            if not Path(argument).is_file():
                raise InputError(f"routing: no file {argument!r} to replay")
            return RoutingLaw("replay", path=argument)
        raise InputError(f"routing: expected uniform, zipf:<exponent>, one-expert or replay:<file>, got {text!r}")

    def __str__(self) -> str:
        if self.kind == "zipf":
            return f"zipf:{self.exponent:g}"
        return f"replay:{self.path}" if self.kind == "replay" else self.kind

    def identity(self) -> str:
        """What a measurement's key holds: like str(), but a replayed file counts by its content."""
        if self.kind != "replay":
            return str(self)
        return "replay:" + hashlib.sha256(Path(self.path).read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Workload:
    """A shape with a batch on it: everything that input generation depends on."""

    shape: MoEShape
    num_tokens: int
    routing: RoutingLaw = RoutingLaw()
    seed: int = 0
    input_kind: InputKind = "bf16"
    dropped: float = 0.0
    """Fraction of routed choices replaced by -1, as under expert parallelism."""

    def __post_init__(self) -> None:
        _positive("num_tokens", self.num_tokens, least=0)
        if self.input_kind not in INPUT_KINDS:
            raise InputError(f"input_kind: expected one of {INPUT_KINDS}, got {self.input_kind!r}")
        if not 0.0 <= self.dropped <= 1.0:
            raise InputError(f"dropped: expected a fraction in 0..1, got {self.dropped!r}")

    def __str__(self) -> str:
        dropped = f" dropped={self.dropped:g}" if self.dropped else ""
        return f"{self.shape} M={self.num_tokens} {self.routing} {self.input_kind}{dropped}"


@dataclass(frozen=True)
class MoEWeights:
    """One layer's weights, in the layouts at the head of this file; biases are there if the shape has them."""

    shape: MoEShape
    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.w13.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors that are there."""
        biases = (self.w13_bias, self.w2_bias)
        return (self.w13, self.w13_scale, self.w2, self.w2_scale, *(bias for bias in biases if bias is not None))


@dataclass(frozen=True, init=False)
class MoEInputs:
    """One batch: tokens (bf16 `x`, or `x_q` with `x_scale`), routing, and the routing aligned ahead if it was."""

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    x: torch.Tensor | None = None
    x_q: torch.Tensor | None = None
    x_scale: torch.Tensor | None = None
    routed_scaling_factor: float = 1.0
    aligned: AlignedRouting | TiledRouting | None = None
    activation_scales: ActivationScales = "group"
    """How the shape wants `x` quantised."""

    def __init__(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        x: torch.Tensor | None = None,
        x_q: torch.Tensor | None = None,
        x_scale: torch.Tensor | None = None,
        routed_scaling_factor: float = 1.0,
        aligned: AlignedRouting | TiledRouting | None = None,
        activation_scales: ActivationScales = "group",
    ) -> None:
        # Every call of a layer makes one, and what `dataclass` writes for a frozen class takes three times as long.
        fields = self.__dict__
        fields["topk_ids"] = topk_ids
        fields["topk_weights"] = topk_weights
        fields["x"] = x
        fields["x_q"] = x_q
        fields["x_scale"] = x_scale
        fields["routed_scaling_factor"] = routed_scaling_factor
        fields["aligned"] = aligned
        fields["activation_scales"] = activation_scales

    @property
    def quantised(self) -> bool:
        return self.x_q is not None

    @property
    def tokens(self) -> torch.Tensor:
        """`x` or `x_q`, whichever is there."""
        tokens = self.x if self.x_q is None else self.x_q
        if tokens is None:
            raise InputError("inputs: expected x, or x_q with x_scale; got neither")
        return tokens

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    def quantise(self) -> MoEInputs:
        """The same batch with quantised tokens in place of bf16 ones."""
        if self.quantised:
            return self
        x_q, x_scale = quantise_as(self.tokens, self.activation_scales)
        return dataclasses.replace(self, x=None, x_q=x_q, x_scale=x_scale)


def scale_blocks(size: int) -> int:
    """How many 128-wide scale blocks cover `size`."""
    return -(-size // GROUP_SIZE)

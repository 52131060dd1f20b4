"""The problem: a layer's shape, a workload on it, and the tensors of both.

Layouts and names are the field's (vLLM, SGLang):

    x            bf16 [M, H]      or  x_q e4m3 [M, H] with x_scale fp32 [M, ceil(H/128)]
    w13          e4m3 [E, 2I, H]  gate rows, then up rows    w13_scale fp32 [E, 2*ceil(I/128), ceil(H/128)]
    w2           e4m3 [E, H, I]                              w2_scale  fp32 [E, ceil(H/128), ceil(I/128)]
    topk_ids     int32 [M, top_k]   -1: the expert is not on this rank and contributes nothing
    topk_weights fp32 [M, top_k]
    out          bf16 [M, H]

M tokens, E experts, H hidden size, I intermediate size of one tensor-parallel rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from reference.quant import GROUP_SIZE, quantise_activations
from reference.routing import AlignedRouting
from workbench.errors import InputError

FP8 = torch.float8_e4m3fn

InputKind = Literal["bf16", "fp8"]
INPUT_KINDS: tuple[InputKind, ...] = ("bf16", "fp8")


def _positive(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: expected an integer >= {least}, got {value!r}")


@dataclass(frozen=True)
class MoEShape:
    """One rank's layer. Shared experts count in `num_experts` and `top_k`; they own the last ids.

    Raises InputError when a size is not a positive integer or top_k exceeds what the experts allow.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    num_shared_experts: int = 0
    activation: Literal["swiglu"] = "swiglu"
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

    @property
    def w13_rows(self) -> int:
        """N = 2I, the rows of w13."""
        return 2 * self.intermediate_size

    def __str__(self) -> str:
        return self.name or (
            f"E{self.num_experts}_N{self.w13_rows}_K{self.hidden_size}_top{self.top_k}_shared{self.num_shared_experts}"
        )


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
    """One layer's weights, in the layouts at the head of this file."""

    shape: MoEShape
    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.w13.device


@dataclass(frozen=True)
class MoEInputs:
    """One batch: tokens (bf16 `x`, or `x_q` with `x_scale`), routing, and the routing aligned ahead if it was."""

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    x: torch.Tensor | None = None
    x_q: torch.Tensor | None = None
    x_scale: torch.Tensor | None = None
    routed_scaling_factor: float = 1.0
    aligned: AlignedRouting | None = None

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
        x_q, x_scale = quantise_activations(self.tokens)
        return dataclasses.replace(self, x=None, x_q=x_q, x_scale=x_scale)


def scale_blocks(size: int) -> int:
    """How many 128-wide scale blocks cover `size`."""
    return -(-size // GROUP_SIZE)

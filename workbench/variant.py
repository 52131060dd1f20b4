"""The contract that every implementation of the layer fulfils.

A variant is stateless: what it builds for one layer's weights is the `prepared` value that `prepare` returns, opaque to
the workbench. Everything slow, and everything that depends only on weights, belongs there; `run` is the hot path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch

from workbench.errors import InputError
from workbench.problem import MoEInputs, MoEShape, MoEWeights

Backend = Literal["torch", "triton", "cuda"]
ConfigValue = int | str | bool


@dataclass(frozen=True)
class Support:
    """Whether a variant serves a shape on a device, and if not, why."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    @staticmethod
    def yes() -> Support:
        return Support(True)

    @staticmethod
    def no(reason: str) -> Support:
        return Support(False, reason)


class Config(Mapping[str, ConfigValue]):
    """One point of a variant's tuning space: immutable, hashable, the same whatever order it was written in."""

    __slots__ = ("_hash", "_items")

    def __init__(self, **values: ConfigValue) -> None:
        for name, value in values.items():
            if not isinstance(value, int | str | bool):
                raise InputError(f"config {name}: expected int, str or bool, got {value!r}")
        self._items = dict(sorted(values.items()))
        self._hash = hash(tuple(self._items.items()))  # once: a call looks its kernel up by its config

    def __getitem__(self, name: str) -> ConfigValue:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._items == other._items

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self._items.items()) or "default"

    def __repr__(self) -> str:
        return f"Config({self})"

    def integer(self, name: str) -> int:
        """The value of `name`, which is an integer."""
        value = self._items[name]
        if not isinstance(value, int):
            raise InputError(f"config {name}: expected an integer, got {value!r}")
        return value


@dataclass(frozen=True)
class CompileReport:
    """What the compiler said of one kernel: resources per thread and block, and what it warned of."""

    kernel: str
    config: Config
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_smem_bytes: int
    dynamic_smem_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """No spills, no stack frame, and no ptxas warnings."""
        return not (self.spill_bytes or self.stack_bytes or self.warnings)


class Variant(ABC):
    """One implementation of the layer."""

    name: ClassVar[str]
    """`<backend>.<what>`, as the command line and the records name it."""
    backend: ClassVar[Backend]
    graph_capturable: ClassVar[bool] = True
    """False for variants whose `run` reads device data on the host; they are timed without a CUDA graph."""
    deterministic: ClassVar[bool] = False
    """Whether `run` gives the same bits every time, and for a token whatever else is in the batch, with any config."""
    tolerance: ClassVar[float] = 0.03
    """The largest relative error, as numerics.py measures it, at which `verify` passes this variant.

    FP8 tensor cores keep few bits of their partial sums, so now and then a code of Q falls to the other side, and one
    code is up to 1/8 of its value: most batches stay under 0.008, a small one with a dominant value can reach 0.02.
    Dropping one expert of 9 or one K tile of 56 is 0.1 and more.
    """

    @abstractmethod
    def supports(self, shape: MoEShape, device: torch.device) -> Support:
        """Whether `run` serves this shape on this kind of device. Never raises."""

    def supports_shape(self, shape: MoEShape) -> Support:
        """`supports` with the device left aside, for what is compiled ahead on a machine without one. Never raises."""
        return Support.yes()

    @abstractmethod
    def configs(self, shape: MoEShape, num_tokens: int) -> Iterable[Config]:
        """The tuning space for this shape and batch size; the first is the default. Never empty."""

    @abstractmethod
    def prepare(self, weights: MoEWeights) -> Any:
        """Once per layer: re-lay-out, tensor maps, compiled kernels. Allocates through torch."""

    def align(self, prepared: Any, inputs: MoEInputs, config: Config) -> MoEInputs:
        """Quantised `inputs` with the routing already in the form `run` takes under `config`.

        The *kernel* figure times `run` on what this returns; the *layer* figure times `run` on the caller's
        inputs. A variant that has no such step returns the inputs with the tokens quantised.
        """
        return inputs.quantise()

    @abstractmethod
    def run(self, prepared: Any, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        """Write every element of `out` (bf16 [M, H]), in the current stream's order.

        The hot path: nothing is checked again, nothing waits for the device, nothing device-side is read on the host
        (but see `graph_capturable`). `inputs` holds bf16 or quantised tokens, aligned or not, and is never written.
        """

    @abstractmethod
    def sources(self) -> tuple[Path, ...]:
        """The files whose content decides what runs; records are keyed by their digest."""

    def compile(self, shape: MoEShape, configs: Iterable[Config]) -> list[CompileReport]:
        """Compile for sm_90a without a GPU and report resources; empty for variants with nothing to compile so.

        Raises CompileError with the compiler's log.
        """
        return []


AnyVariant = TypeVar("AnyVariant", bound=type[Variant])

_registered: dict[str, Variant] = {}


def register(variant_class: AnyVariant) -> AnyVariant:
    """Class decorator: make a variant known under its name. A second variant of the same name is an InputError."""
    name = variant_class.name
    known = _registered.get(name)
    if known is not None and type(known).__module__ != variant_class.__module__:
        raise InputError(
            f"variant {name!r}: registered twice, by {type(known).__module__} and {variant_class.__module__}"
        )
    _registered[name] = variant_class()
    return variant_class


def registered() -> Mapping[str, Variant]:
    """What `register` has seen so far. Use registry.variants(), which loads them first."""
    return _registered

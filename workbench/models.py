"""The catalogue of real layers, from the models' published configurations, and what one tensor-parallel rank holds.

Tensor parallelism splits I and nothing else: a rank of TP has every expert with I / TP. A model's shared experts are
served as extra experts that every token visits, behind the routed ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.errors import InputError
from workbench.problem import MoEShape


@dataclass(frozen=True)
class Model:
    """One model's MoE layers, before tensor parallelism."""

    name: str
    """As on the hub, in lower case with dashes."""
    hidden_size: int
    intermediate_size: int
    num_experts: int
    """Routed experts; `num_shared_experts` come on top."""
    top_k: int
    num_shared_experts: int
    routed_scaling_factor: float = 1.0
    note: str = ""
    """Where the model's layer is more than this workbench's, or how sure the row is."""
    form: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The fields of MoEShape in which it is not the plain layer."""
    usual_tp: tuple[int, ...] = ()
    """The tensor parallelism it is commonly served with on one or two hosts of eight GPUs, in FP8, the more common one
    first; of those, ones that leave I a multiple of 128. Selection tables are shipped for these."""


_GROUPS = "selection limited to 4 of 8 groups"
_UE8M0 = {"activation_scales": "group_ue8m0"}
_V4 = {"swiglu_limit": 10.0, **_UE8M0}
_GPT_OSS = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0, "has_bias": True}
_REMEMBERED = "from memory, not checked against the published configuration"

MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model("deepseek-v3", 7168, 2048, 256, 8, 1, 2.5, _GROUPS, usual_tp=(8, 16)),
        Model("deepseek-r1", 7168, 2048, 256, 8, 1, 2.5, _GROUPS, usual_tp=(8, 16)),
        Model("deepseek-v3.2", 7168, 2048, 256, 8, 1, 2.5, _GROUPS, _UE8M0, usual_tp=(8,)),
        Model("deepseek-v4-flash", 4096, 2048, 256, 6, 1, 1.5, form=_V4, usual_tp=(8,)),
        Model("deepseek-v4-pro", 7168, 3072, 384, 6, 1, 2.5, form=_V4, usual_tp=(8,)),
        Model("kimi-k2", 7168, 2048, 384, 8, 1, 2.827, usual_tp=(16, 8)),
        Model("glm-5", 6144, 2048, 256, 8, 1, 2.5, usual_tp=(8,)),
        Model("glm-4.5", 5120, 1536, 160, 8, 1, 2.5, usual_tp=(4,)),
        Model("glm-4.6", 5120, 1536, 160, 8, 1, 2.5, usual_tp=(4,)),
        Model("glm-4.7", 5120, 1536, 160, 8, 1, 2.5, usual_tp=(4,)),
        Model("qwen3-235b-a22b", 4096, 1536, 128, 8, 0, usual_tp=(4,)),
        Model("qwen3-coder-480b-a35b", 6144, 2560, 160, 8, 0, usual_tp=(4,)),
        Model("qwen3-30b-a3b", 2048, 768, 128, 8, 0, usual_tp=(2,)),
        Model("qwen3-next-80b-a3b", 2048, 512, 512, 10, 1, usual_tp=(4,)),
        Model("qwen3.5-397b", 4096, 1024, 512, 10, 1, usual_tp=(8,)),
        Model("qwen3.5-122b", 3072, 1024, 256, 8, 1, usual_tp=(4,)),
        Model("minimax-m2.5", 3072, 1536, 256, 8, 0, usual_tp=(4,)),
        Model("mimo-v2-flash", 4096, 2048, 256, 8, 0, usual_tp=(8,)),
        Model("step-3.5-flash", 4096, 1280, 288, 8, 1, 3.0, usual_tp=(2,)),
        Model("longcat-flash", 6144, 2048, 512, 12, 0, 6.0, "256 identity experts besides", usual_tp=(8,)),
        Model("mixtral-8x7b", 4096, 14336, 8, 2, 0, usual_tp=(8,)),
        Model("mixtral-8x22b", 6144, 16384, 8, 2, 0, usual_tp=(8,)),
        Model(
            "llama-4-maverick",
            5120,
            8192,
            128,
            1,
            1,
            note=f"weight applied to the input ({_REMEMBERED})",
            usual_tp=(8,),
        ),
        Model("gpt-oss-20b", 2880, 2880, 32, 4, 0, note="published in MXFP4", form=_GPT_OSS),
        Model("gpt-oss-120b", 2880, 2880, 128, 4, 0, note="published in MXFP4", form=_GPT_OSS),
        Model("ernie-4.5-300b-a47b", 8192, 3584, 64, 8, 0, note=_REMEMBERED, usual_tp=(4,)),
        Model("ling-1t", 8192, 2048, 256, 8, 1, 2.5, _REMEMBERED, usual_tp=(8,)),
    )
}

ALIASES: Mapping[str, MoEShape] = {
    name: dataclasses.replace(shape, name=name)
    for name, shape in {
        "dsv3_tp16": MoEShape(257, 7168, 128, 9, num_shared_experts=1),
        "dsv3_tp8": MoEShape(257, 7168, 256, 9, num_shared_experts=1),
        "qwen3next_tp4": MoEShape(512, 2048, 128, 10),
        # For machines without a GPU: a second or so per verification.
        "tiny": MoEShape(8, 256, 128, 2),
        "tiny_shared": MoEShape(9, 512, 128, 3, num_shared_experts=1),
    }.items()
}
"""Shapes that figures are given for, by name."""


def shape_of_model(model: str, tp: int, *, shared_as_experts: bool = True) -> MoEShape:
    """What one of `tp` tensor-parallel ranks of `model` holds, shared experts included as extra experts, as SGLang
    serves them, or without `shared_as_experts` left out, as vLLM serves them apart.

    Raises InputError when the model is not in the catalogue or `tp` does not divide its I.
    """
    if model not in MODELS:
        raise InputError(f"model: expected one of {', '.join(sorted(MODELS))}; got {model!r}")
    row = MODELS[model]
    if tp < 1 or row.intermediate_size % tp:
        raise InputError(f"tp: expected a divisor of {model}'s intermediate size {row.intermediate_size}, got {tp}")
    num_shared = row.num_shared_experts if shared_as_experts else 0
    return MoEShape(
        num_experts=row.num_experts + num_shared,
        hidden_size=row.hidden_size,
        intermediate_size=row.intermediate_size // tp,
        top_k=row.top_k + num_shared,
        num_shared_experts=num_shared,
        name=f"{model}_tp{tp}" if num_shared == row.num_shared_experts else f"{model}_tp{tp}_routed",
        **row.form,
    )


def usual_shapes(*, shared_as_experts: bool = True) -> list[MoEShape]:
    """The distinct layers of all models at their usual tensor parallelism; with `shared_as_experts` False only those of
    models that have shared experts."""
    found = [
        shape_of_model(name, tp, shared_as_experts=shared_as_experts)
        for name, model in MODELS.items()
        for tp in model.usual_tp
        if shared_as_experts or model.num_shared_experts
    ]
    return list(dict.fromkeys(found))


def shape_of_alias(alias: str) -> MoEShape:
    """The shape called `alias`; InputError lists the names there are."""
    if alias not in ALIASES:
        raise InputError(f"shape: expected one of {', '.join(sorted(ALIASES))}; got {alias!r}")
    return ALIASES[alias]

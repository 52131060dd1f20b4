"""Host side of include/activation.cuh: the forms of the layer that the kernels compute."""

from __future__ import annotations

import ctypes
import math

from workbench.problem import MoEShape

SERVED = ("swiglu_limit", "swiglu_alpha", "swiglu_beta", "group_ue8m0")
"""What MoEShape.unserved() need not complain of."""


class ActivationForm(ctypes.Structure):
    """The struct of that name."""

    _fields_ = (
        ("swiglu_limit", ctypes.c_float),
        ("swiglu_alpha", ctypes.c_float),
        ("swiglu_beta", ctypes.c_float),
        ("power_of_two_scales", ctypes.c_uint32),
    )


def activation_form(shape: MoEShape) -> ActivationForm:
    """The form of `shape`, which asks for nothing but what is SERVED."""
    limit = math.inf if shape.swiglu_limit is None else shape.swiglu_limit
    return ActivationForm(limit, shape.swiglu_alpha, shape.swiglu_beta, power_of_two_scales(shape))


def is_plain_swiglu(shape: MoEShape) -> bool:
    """Whether there is neither a limit nor an alpha or beta."""
    return shape.swiglu_limit is None and shape.swiglu_alpha == 1 and shape.swiglu_beta == 0


def power_of_two_scales(shape: MoEShape) -> bool:
    """Whether activations are quantised with scales that are powers of two."""
    return shape.activation_scales == "group_ue8m0"

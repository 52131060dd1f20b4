// What lies between the two projections: SwiGLU in the forms that models use, and the scale that its values get.
#pragma once
#include "numeric.cuh"

struct ActivationForm {
    float swiglu_limit;  // infinite: no limit
    float swiglu_alpha;
    float swiglu_beta;
    uint32_t power_of_two_scales;

    // gate * sigmoid(alpha * gate) * (up + beta), the gate at most the limit and up within plus and minus it. kPlain: it is known
    // that there is no limit, alpha is 1 and beta 0.
    template <bool kPlain = false>
    __device__ __forceinline__ float swiglu(float gate, float up) const {
        constexpr float kLog2E = 1.44269504f;
        if constexpr (kPlain) return gate * fast_reciprocal(1.f + fast_exp2(-kLog2E * gate)) * up;
        gate = min_nan(gate, swiglu_limit);
        up = max_nan(min_nan(up, swiglu_limit), -swiglu_limit);
        return gate * fast_reciprocal(1.f + fast_exp2(-kLog2E * swiglu_alpha * gate)) * (up + swiglu_beta);
    }

    // Of a group whose largest magnitude is `amax`.
    __device__ __forceinline__ float scale(float amax) const {
        const float scale = quotient(fmaxf(amax, kSmallestAmax), kE4M3Max, 1.f / kE4M3Max);
        return power_of_two_scales ? round_up_to_power_of_two(scale) : scale;
    }

    // The smallest power of two that is not below: a carry out of the mantissa raises the exponent.
    __device__ __forceinline__ static float round_up_to_power_of_two(float scale) {
        constexpr uint32_t kMantissa = (1u << 23) - 1;
        return __uint_as_float((__float_as_uint(scale) + kMantissa) & ~kMantissa);
    }
};

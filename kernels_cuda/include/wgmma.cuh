// Warpgroup matrix products: D[64 x N] = A[64 x 32] * B[N x 32]^T in e4m3 with fp32 accumulators, N = 8..136.
// A and B lie K-major in shared memory under the 128-byte swizzle. Called by all 128 threads of a warpgroup.
//
// Accumulators of thread (warp w, lane l): d[4j + 2h + b] is row 16w + l/4 + 8h, column 8j + 2(l%4) + b.
#pragma once
#include "types.cuh"

namespace wgmma {

// Descriptor of a tile whose rows are 128 bytes, in groups of 8 rows (1024 bytes, 1024-byte aligned); the 16-byte piece
// c of row r lies at piece c ^ (r % 8). Adding kStepK moves 32 bytes along K.
__device__ __forceinline__ uint64_t descriptor(const void* tile) {
    constexpr uint64_t kLeadingBytes = 1;                   // ignored under a swizzle
    constexpr uint64_t kStrideBytes = 1024 >> 4;            // from one group of 8 rows to the next
    constexpr uint64_t kSwizzle128 = 1;
    const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
    return address | kLeadingBytes << 16 | kStrideBytes << 32 | kSwizzle128 << 62;
}

constexpr uint64_t kStepK = 32 >> 4;

// Before the first product of a group: orders earlier register and shared-memory accesses.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to accumulators across this point; without it ptxas serialises the products.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kN>
struct Product;  // zero(d, a, b) and anew(d, a, b): d = a b^T, anew() in the registers that d has;  add(d, a, b): d += a b^T

// Register lists of N/2 accumulators, each list the previous one and four more.
#define MOE_REGISTERS_8 "%0, %1, %2, %3"
#define MOE_REGISTERS_16 MOE_REGISTERS_8 ", %4, %5, %6, %7"
#define MOE_REGISTERS_24 MOE_REGISTERS_16 ", %8, %9, %10, %11"
#define MOE_REGISTERS_32 MOE_REGISTERS_24 ", %12, %13, %14, %15"
#define MOE_REGISTERS_40 MOE_REGISTERS_32 ", %16, %17, %18, %19"
#define MOE_REGISTERS_48 MOE_REGISTERS_40 ", %20, %21, %22, %23"
#define MOE_REGISTERS_56 MOE_REGISTERS_48 ", %24, %25, %26, %27"
#define MOE_REGISTERS_64 MOE_REGISTERS_56 ", %28, %29, %30, %31"
#define MOE_REGISTERS_72 MOE_REGISTERS_64 ", %32, %33, %34, %35"
#define MOE_REGISTERS_80 MOE_REGISTERS_72 ", %36, %37, %38, %39"
#define MOE_REGISTERS_88 MOE_REGISTERS_80 ", %40, %41, %42, %43"
#define MOE_REGISTERS_96 MOE_REGISTERS_88 ", %44, %45, %46, %47"
#define MOE_REGISTERS_104 MOE_REGISTERS_96 ", %48, %49, %50, %51"
#define MOE_REGISTERS_112 MOE_REGISTERS_104 ", %52, %53, %54, %55"
#define MOE_REGISTERS_120 MOE_REGISTERS_112 ", %56, %57, %58, %59"
#define MOE_REGISTERS_128 MOE_REGISTERS_120 ", %60, %61, %62, %63"
#define MOE_REGISTERS_136 MOE_REGISTERS_128 ", %64, %65, %66, %67"
#define MOE_FOUR(c, d, i) c((d)[i]), c((d)[i + 1]), c((d)[i + 2]), c((d)[i + 3])
#define MOE_OPERANDS_8(c, d) MOE_FOUR(c, d, 0)
#define MOE_OPERANDS_16(c, d) MOE_OPERANDS_8(c, d), MOE_FOUR(c, d, 4)
#define MOE_OPERANDS_24(c, d) MOE_OPERANDS_16(c, d), MOE_FOUR(c, d, 8)
#define MOE_OPERANDS_32(c, d) MOE_OPERANDS_24(c, d), MOE_FOUR(c, d, 12)
#define MOE_OPERANDS_40(c, d) MOE_OPERANDS_32(c, d), MOE_FOUR(c, d, 16)
#define MOE_OPERANDS_48(c, d) MOE_OPERANDS_40(c, d), MOE_FOUR(c, d, 20)
#define MOE_OPERANDS_56(c, d) MOE_OPERANDS_48(c, d), MOE_FOUR(c, d, 24)
#define MOE_OPERANDS_64(c, d) MOE_OPERANDS_56(c, d), MOE_FOUR(c, d, 28)
#define MOE_OPERANDS_72(c, d) MOE_OPERANDS_64(c, d), MOE_FOUR(c, d, 32)
#define MOE_OPERANDS_80(c, d) MOE_OPERANDS_72(c, d), MOE_FOUR(c, d, 36)
#define MOE_OPERANDS_88(c, d) MOE_OPERANDS_80(c, d), MOE_FOUR(c, d, 40)
#define MOE_OPERANDS_96(c, d) MOE_OPERANDS_88(c, d), MOE_FOUR(c, d, 44)
#define MOE_OPERANDS_104(c, d) MOE_OPERANDS_96(c, d), MOE_FOUR(c, d, 48)
#define MOE_OPERANDS_112(c, d) MOE_OPERANDS_104(c, d), MOE_FOUR(c, d, 52)
#define MOE_OPERANDS_120(c, d) MOE_OPERANDS_112(c, d), MOE_FOUR(c, d, 56)
#define MOE_OPERANDS_128(c, d) MOE_OPERANDS_120(c, d), MOE_FOUR(c, d, 60)
#define MOE_OPERANDS_136(c, d) MOE_OPERANDS_128(c, d), MOE_FOUR(c, d, 64)

// A and B are the numbers of the two operands after the accumulators.
#define MOE_PRODUCT_ASM(N, A, B, ACCUMULATE)                                                    \
    "{\n"                                                                                       \
    ".reg .pred accumulate;\n"                                                                  \
    "setp.ne.b32 accumulate, " #ACCUMULATE ", 0;\n"                                             \
    "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" MOE_REGISTERS_##N "}, %" #A    \
    ", %" #B ", accumulate, 1, 1;\n"                                                            \
    "}"
#define MOE_PRODUCT(N, A, B)                                                                                       \
    template <>                                                                                                    \
    struct Product<N> {                                                                                            \
        static __device__ __forceinline__ void zero(float (&d)[N / 2], uint64_t a, uint64_t b) {                   \
            asm volatile(MOE_PRODUCT_ASM(N, A, B, 0) : MOE_OPERANDS_##N("=f", d) : "l"(a), "l"(b));                \
        }                                                                                                          \
        static __device__ __forceinline__ void anew(float (&d)[N / 2], uint64_t a, uint64_t b) {                   \
            asm volatile(MOE_PRODUCT_ASM(N, A, B, 0) : MOE_OPERANDS_##N("+f", d) : "l"(a), "l"(b));                \
        }                                                                                                          \
        static __device__ __forceinline__ void add(float (&d)[N / 2], uint64_t a, uint64_t b) {                    \
            asm volatile(MOE_PRODUCT_ASM(N, A, B, 1) : MOE_OPERANDS_##N("+f", d) : "l"(a), "l"(b));                \
        }                                                                                                          \
    };
MOE_PRODUCT(8, 4, 5)
MOE_PRODUCT(16, 8, 9)
MOE_PRODUCT(24, 12, 13)
MOE_PRODUCT(32, 16, 17)
MOE_PRODUCT(40, 20, 21)
MOE_PRODUCT(48, 24, 25)
MOE_PRODUCT(56, 28, 29)
MOE_PRODUCT(64, 32, 33)
MOE_PRODUCT(72, 36, 37)
MOE_PRODUCT(80, 40, 41)
MOE_PRODUCT(88, 44, 45)
MOE_PRODUCT(96, 48, 49)
MOE_PRODUCT(104, 52, 53)
MOE_PRODUCT(112, 56, 57)
MOE_PRODUCT(120, 60, 61)
MOE_PRODUCT(128, 64, 65)
MOE_PRODUCT(136, 68, 69)

#undef MOE_PRODUCT
#undef MOE_PRODUCT_ASM
#undef MOE_FOUR
#undef MOE_REGISTERS_8
#undef MOE_OPERANDS_8
#undef MOE_REGISTERS_16
#undef MOE_OPERANDS_16
#undef MOE_REGISTERS_24
#undef MOE_OPERANDS_24
#undef MOE_REGISTERS_32
#undef MOE_OPERANDS_32
#undef MOE_REGISTERS_40
#undef MOE_OPERANDS_40
#undef MOE_REGISTERS_48
#undef MOE_OPERANDS_48
#undef MOE_REGISTERS_56
#undef MOE_OPERANDS_56
#undef MOE_REGISTERS_64
#undef MOE_OPERANDS_64
#undef MOE_REGISTERS_72
#undef MOE_OPERANDS_72
#undef MOE_REGISTERS_80
#undef MOE_OPERANDS_80
#undef MOE_REGISTERS_88
#undef MOE_OPERANDS_88
#undef MOE_REGISTERS_96
#undef MOE_OPERANDS_96
#undef MOE_REGISTERS_104
#undef MOE_OPERANDS_104
#undef MOE_REGISTERS_112
#undef MOE_OPERANDS_112
#undef MOE_REGISTERS_120
#undef MOE_OPERANDS_120
#undef MOE_REGISTERS_128
#undef MOE_OPERANDS_128
#undef MOE_REGISTERS_136
#undef MOE_OPERANDS_136

// d = A[64 x 128] * B[N x 128]^T as one committed group. With kAnew, once d has been written, in the same registers: the
// compiler may otherwise give it others, to start while the last product is still read.
template <int kN, bool kAnew = false>
__device__ __forceinline__ void multiply_k128(float (&d)[kN / 2], uint64_t a, uint64_t b) {
    fence();
    if constexpr (kAnew)
        Product<kN>::anew(d, a, b);
    else
        Product<kN>::zero(d, a, b);
#pragma unroll
    for (int step = 1; step < 4; ++step) Product<kN>::add(d, a + step * kStepK, b + step * kStepK);
    commit();
}

}  // namespace wgmma

// AVX-512: 32 registers of 16 floats. 14 x 2 accumulators, 2 weights and a value; 14 divides 112, 56, 28 and 14.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "abi.h"
#include "kernels.h"

// Past this line only: what the standard library shares with other files must not need these instructions.
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#define VECTOR 16
#define ROWS 14
#define COLUMNS 2
#include "kernels.inc"

namespace depthfuse {
extern const Kernels kAvx512 = kernels_named("avx512");
}  // namespace depthfuse
#endif

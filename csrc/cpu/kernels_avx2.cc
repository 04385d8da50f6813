// AVX2 and FMA: 16 registers of 8 floats. 6 x 2 accumulators, 2 weights and a value.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "abi.h"
#include "kernels.h"

// Past this line only: what the standard library shares with other files must not need these instructions.
#pragma GCC target("avx2,fma")
#define VECTOR 8
#define ROWS 6
#define COLUMNS 2
#include "kernels.inc"

namespace depthfuse {
extern const Kernels kAvx2 = kernels_named("avx2");
}  // namespace depthfuse
#endif

// AVX-512's products of bfloat16, for networks of bfloat16 where there are no tiles.
#if defined(__x86_64__)
#include "kernels.h"

#if __GNUC__ >= 10
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "abi.h"

// Past this line only, as in kernels_avx512.cc, whose vectors and tails these are.
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")
#define VECTOR 16
#define ROWS 14
#define COLUMNS 2
#include "kernels.inc"
#include "tiles.inc"

namespace depthfuse {
namespace {
constexpr TileKernels kKernels = {tile_conv, tile_scratch, tile_weights};
}
extern const TileKernels* const kPairs = &kKernels;
}  // namespace depthfuse
#else
namespace depthfuse {
extern const TileKernels* const kPairs = nullptr;
}
#endif
#endif

// AVX-512's products of bfloat16, for networks of bfloat16 where there are no tiles.
#if defined(__x86_64__)
#include "kernels.h"

#if __GNUC__ >= 10
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "abi.h"

// Past this line only, as in kernels_avx512.cc.
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")
#define TILE_KERNELS kPairs
#include "tile_kernels.inc"
#else
namespace depthfuse {
extern const TileKernels* const kPairs = nullptr;
}
#endif
#endif

// AMX's tiles beside AVX-512.
#if defined(__x86_64__)
#include "kernels.h"

#if __GNUC__ >= 12
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "abi.h"

// Past this line only, as in kernels_avx512.cc.
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma,amx-tile,amx-bf16")
// The macros of an instruction set are of the command line alone: a pragma does not define them.
#define BY_AMX
#define TILE_KERNELS kTiles
#include "tile_kernels.inc"
#else
namespace depthfuse {
extern const TileKernels* const kTiles = nullptr;
}
#endif
#endif

// The one place where HIP, CUDA and a plain C++ compiler differ.
//
// A kernel is written as phases, each a loop over the threads of a block (FOR_THREADS), with a barrier after each. On a GPU
// the loop is the body for one thread. A C++ compiler, which has no GPU, runs the threads of a phase one after another: so
// the same source is tested on any machine, and what depends on threads of one phase running at once would be found.
#pragma once
#include <stdint.h>

#if defined(__HIPCC__)
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#elif defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>
#endif

namespace depthfuse {

#if defined(__HIPCC__) || defined(__CUDACC__)

#define DEVICE __device__ __forceinline__
#define FOR_THREADS(thread) for (int thread = threadIdx.x, once = 1; once; once = 0)
#define BARRIER() __syncthreads()
#define UNROLL _Pragma("unroll")  // what is indexed in the loop stays in registers
#if defined(__HIPCC__)
constexpr int kWave = 64;
using Stream = hipStream_t;
#else
constexpr int kWave = 32;
using Stream = cudaStream_t;
#endif

// A thread's registers, which live from phase to phase.
template <int THREADS, int COUNT>
struct Registers {
  float values[COUNT];
  DEVICE float* of(int) { return values; }
};

#else

#define DEVICE inline
#define FOR_THREADS(thread) for (int thread = 0; thread < THREADS; ++thread)
#define BARRIER()
#define UNROLL
constexpr int kWave = 1;
using Stream = void*;

template <int THREADS, int COUNT>
struct Registers {
  float values[THREADS][COUNT];
  float* of(int thread) { return values[thread]; }
};

#endif

// 16-bit values are carried as their bits, so that loads, stores and matrix instructions take them as they are.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
DEVICE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(Bfloat x) { return float_of(uint32_t(x.bits) << 16); }
template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) { return x; }
template <>
DEVICE Bfloat from_float<Bfloat>(float x) {  // to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return Bfloat{uint16_t(bits >> 16 | 0x40)};
  return Bfloat{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
#if defined(__HIPCC__) || defined(__CUDACC__)
DEVICE float to_float(Half x) {
  __half h;
  __builtin_memcpy(&h, &x, 2);
  return __half2float(h);
}
template <>
DEVICE Half from_float<Half>(float x) {
  const __half h = __float2half(x);
  Half bits;
  __builtin_memcpy(&bits, &h, 2);
  return bits;
}
#endif

}  // namespace depthfuse

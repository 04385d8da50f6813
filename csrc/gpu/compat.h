// The one place where HIP, CUDA and a plain C++ compiler differ.
//
// A kernel is written as phases, each a loop over the threads of a block (FOR_THREADS), with barriers between them. On a
// GPU the loop is the body for one thread. A C++ compiler, which has no GPU, runs the threads of a phase one after another,
// so the same source is tested on any machine. Shared memory is touched through load_shared and store_shared alone: without
// a GPU they note who touched what since the last barrier (races.h), so that a missing barrier is found there, too.
#pragma once
#include <stdint.h>

#if defined(__HIPCC__)
#include <hip/hip_runtime.h>
#elif defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include <cmath>
#include <limits>
#include <vector>

#include "races.h"
#endif

namespace depthfuse {

#if defined(__HIPCC__) || defined(__CUDACC__)

#define DEVICE __device__ __forceinline__
#define FOR_THREADS(thread) for (int thread = threadIdx.x, once = 1; once; once = 0)
#define BARRIER() __syncthreads()
#define UNROLL _Pragma("unroll")  // what is indexed in the loop stays in registers
#define NOTE_READ(from, bytes)
#define NOTE_WRITE(to, bytes)
#if defined(__HIPCC__)
constexpr int kWave = 64;
using Stream = hipStream_t;
#else
constexpr int kWave = 32;
using Stream = cudaStream_t;
#endif
constexpr int kWaves = 256 / kWave;  // of a block

// A thread's registers, which live from phase to phase.
template <int COUNT>
struct Registers {
  float values[COUNT];
  DEVICE float* of(int) { return values; }
};

#else

#define DEVICE inline
#define FOR_THREADS(thread) for (int thread = 0; races.thread = thread, thread < THREADS; ++thread)
#define BARRIER() (++races.epoch)
#define UNROLL
#define NOTE_READ(from, bytes) races.read(from, bytes)
#define NOTE_WRITE(to, bytes) races.write(to, bytes)
constexpr int kWave = 1;
constexpr int kWaves = 4;
using Stream = void*;

template <int COUNT>
struct Registers {
  float values[kWaves * kWave][COUNT];
  float* of(int thread) { return values[thread]; }
};

#endif

constexpr int THREADS = kWaves * kWave;

// 16-bit values are carried as their bits, so that loads, stores and matrix instructions take them as they are.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <class To, class From>
DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

#if defined(__CUDACC__) && !defined(__HIPCC__)
using NativeHalf = __half;
#else
using NativeHalf = _Float16;
#endif

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(Half x) { return float(bits_as<NativeHalf>(x)); }
DEVICE float to_float(Bfloat x) { return bits_as<float>(uint32_t(x.bits) << 16); }

template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) { return x; }
template <>
DEVICE Half from_float<Half>(float x) { return bits_as<Half>(NativeHalf(x)); }
template <>
DEVICE Bfloat from_float<Bfloat>(float x) {  // to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = bits_as<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return Bfloat{uint16_t(bits >> 16 | 0x40)};
  return Bfloat{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// N values that are moved at once, 16 bytes at most.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T values[N];
};

#if defined(__HIPCC__) || defined(__CUDACC__)
// Compilers take a struct of 16-bit values apart, but move these by one instruction.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
template <int N, class T>
DEVICE Pack<T, N> load(const T* from) {
  return bits_as<Pack<T, N>>(*reinterpret_cast<const typename Word<N * sizeof(T)>::type*>(from));
}
template <int N, class T>
DEVICE void store(T* to, const Pack<T, N>& pack) {
  using Bits = typename Word<N * sizeof(T)>::type;
  *reinterpret_cast<Bits*>(to) = bits_as<Bits>(pack);
}
#else
template <int N, class T>
Pack<T, N> load(const T* from) { return *reinterpret_cast<const Pack<T, N>*>(from); }
template <int N, class T>
void store(T* to, const Pack<T, N>& pack) { *reinterpret_cast<Pack<T, N>*>(to) = pack; }
#endif

template <int N, class T>
DEVICE Pack<T, N> load_shared(const T* from) {
  NOTE_READ(from, N * sizeof(T));
  return load<N>(from);
}
template <int N, class T>
DEVICE void store_shared(T* to, const Pack<T, N>& pack) {
  NOTE_WRITE(to, N * sizeof(T));
  store<N>(to, pack);
}

}  // namespace depthfuse

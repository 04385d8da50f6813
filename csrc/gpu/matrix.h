// Products of 16 x 16 tiles by a wave's matrix instructions: acc[16, 16] += a[16, k] b[16, k]^T, float32 sums.
//
// Both operands lie in shared memory with k innermost, rows `stride` values apart. A lane holds 256 / kWave of the sums;
// `row_of` and `column_of` say which.
#pragma once
#include "compat.h"

namespace depthfuse {

constexpr int kTile = 16;
constexpr int kSums = kTile * kTile / kWave;  // of a lane

#if defined(__HIPCC__)

typedef float float4_ __attribute__((ext_vector_type(4)));
typedef _Float16 half4_ __attribute__((ext_vector_type(4)));
typedef short short2_ __attribute__((ext_vector_type(2)));
typedef short short4_ __attribute__((ext_vector_type(4)));

DEVICE int row_of(int lane, int i) { return lane / 16 * 4 + i; }
DEVICE int column_of(int lane, int) { return lane % 16; }

DEVICE float4_ step(const Half* a, const Half* b, float4_ acc) {
  return __builtin_amdgcn_mfma_f32_16x16x16f16(*reinterpret_cast<const half4_*>(a), *reinterpret_cast<const half4_*>(b),
                                               acc, 0, 0, 0);
}

DEVICE float4_ step(const Bfloat* a, const Bfloat* b, float4_ acc) {
#if defined(__gfx908__)  // 8 deep: the four values that a lane has are the halves of two instructions
  const short4_ x = *reinterpret_cast<const short4_*>(a), y = *reinterpret_cast<const short4_*>(b);
  acc = __builtin_amdgcn_mfma_f32_16x16x8bf16(short2_{x.x, x.y}, short2_{y.x, y.y}, acc, 0, 0, 0);
  return __builtin_amdgcn_mfma_f32_16x16x8bf16(short2_{x.z, x.w}, short2_{y.z, y.w}, acc, 0, 0, 0);
#elif defined(__gfx90a__)
  return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(*reinterpret_cast<const short4_*>(a),
                                                   *reinterpret_cast<const short4_*>(b), acc, 0, 0, 0);
#else
  return acc;  // the host's pass
#endif
}

template <class T>
DEVICE void multiply_add(const T* a, int a_stride, const T* b, int b_stride, int k, int lane, float* acc) {
  float4_ sums = {acc[0], acc[1], acc[2], acc[3]};
  a += lane % 16 * a_stride + lane / 16 * 4;
  b += lane % 16 * b_stride + lane / 16 * 4;
  UNROLL for (int i = 0; i < k; i += 16) sums = step(a + i, b + i, sums);
  UNROLL for (int i = 0; i < 4; ++i) acc[i] = sums[i];
}

#elif defined(__CUDACC__)

DEVICE int row_of(int lane, int i) { return lane / 4 + (i & 2) * 4; }
DEVICE int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + (i & 1); }

DEVICE void step(const Half*, const uint32_t (&a)[4], const uint32_t (&b)[2], float* c) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void step(const Bfloat*, const uint32_t (&a)[4], const uint32_t (&b)[2], float* c) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
DEVICE uint32_t pair_at(const T* p) { return *reinterpret_cast<const uint32_t*>(p); }

template <class T>
DEVICE void multiply_add(const T* a, int a_stride, const T* b, int b_stride, int k, int lane, float* acc) {
  a += lane / 4 * a_stride + lane % 4 * 2;
  b += lane / 4 * b_stride + lane % 4 * 2;
  UNROLL for (int i = 0; i < k; i += 16) {
    const uint32_t rows[4] = {pair_at(a + i), pair_at(a + i + 8 * a_stride), pair_at(a + i + 8),
                              pair_at(a + i + 8 * a_stride + 8)};
    UNROLL for (int half = 0; half < 2; ++half) {
      const T* columns = b + i + half * 8 * b_stride;
      const uint32_t pairs[2] = {pair_at(columns), pair_at(columns + 8)};
      step(a, rows, pairs, acc + 4 * half);
    }
  }
}

#else

DEVICE int row_of(int, int i) { return i / kTile; }
DEVICE int column_of(int, int i) { return i % kTile; }

template <class T>
void multiply_add(const T* a, int a_stride, const T* b, int b_stride, int k, int, float* acc) {
  for (int r = 0; r < kTile; ++r)
    for (int c = 0; c < kTile; ++c)
      for (int i = 0; i < k; ++i) acc[r * kTile + c] += to_float(a[r * a_stride + i]) * to_float(b[c * b_stride + i]);
}

#endif

}  // namespace depthfuse

// Products of 16 x 16 tiles by a wave's matrix instructions: sums[16, 16] += left[16, 16] right[16, 16]^T, in float32.
//
// Operands lie in memory with the summed axis innermost, rows `stride` values apart: `left` in shared memory, `right`
// (weights) in global memory, from where each wave takes what it needs straight into registers. A lane holds kSums sums, as
// runs of kRun neighbours of one row: `row_of` and `column_of` say where each run starts.
#pragma once
#include "compat.h"

namespace depthfuse {

constexpr int kTile = 16;
constexpr int kSums = kTile * kTile / kWave;  // of a lane

#if defined(__HIPCC__)

// v_mfma gives each lane four rows of one column. The operands change places, so that it is four columns of one row.
constexpr int kRun = 4;
DEVICE int row_of(int lane, int) { return lane % 16; }
DEVICE int column_of(int lane, int) { return lane / 16 * 4; }

typedef float float4_ __attribute__((ext_vector_type(4)));
typedef _Float16 half4_ __attribute__((ext_vector_type(4)));
typedef short short2_ __attribute__((ext_vector_type(2)));
typedef short short4_ __attribute__((ext_vector_type(4)));

template <class T>
using Left = Pack<T, 4>;
template <class T>
using Right = Pack<T, 4>;

template <class T>
DEVICE Left<T> load_left(const T* from, int stride, int lane) {
  return load_shared<4>(from + lane % 16 * stride + lane / 16 * 4);
}
template <class T>
DEVICE Right<T> load_right(const T* from, int stride, int lane) {
  return load<4>(from + lane % 16 * stride + lane / 16 * 4);
}

DEVICE float4_ product(Pack<Half, 4> a, Pack<Half, 4> b, float4_ sums) {
  return __builtin_amdgcn_mfma_f32_16x16x16f16(bits_as<half4_>(a), bits_as<half4_>(b), sums, 0, 0, 0);
}
DEVICE float4_ product(Pack<Bfloat, 4> a, Pack<Bfloat, 4> b, float4_ sums) {
  const short4_ x = bits_as<short4_>(a), y = bits_as<short4_>(b);
#if defined(__gfx908__)  // 8 deep: the four values that a lane has are the halves of two instructions
  sums = __builtin_amdgcn_mfma_f32_16x16x8bf16(x.xy, y.xy, sums, 0, 0, 0);
  return __builtin_amdgcn_mfma_f32_16x16x8bf16(x.zw, y.zw, sums, 0, 0, 0);
#elif defined(__gfx90a__) || defined(__gfx942__)
  return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x, y, sums, 0, 0, 0);
#elif defined(__HIP_DEVICE_COMPILE__)
#error "expected gfx908, gfx90a or gfx942: which bfloat16 matrix instruction this target has is not known"
#else
  return sums;  // the compiler's pass for the host, which runs none of this
#endif
}

template <class T>
DEVICE void multiply_add(const Left<T>& left, const Right<T>& right, float* sums) {
  const float4_ result = product(right, left, float4_{sums[0], sums[1], sums[2], sums[3]});
  UNROLL for (int i = 0; i < 4; ++i) sums[i] = result[i];
}

#elif defined(__CUDACC__)

// mma.m16n8k16 twice, for the left and the right eight columns.
constexpr int kRun = 2;
DEVICE int row_of(int lane, int run) { return lane / 4 + run % 2 * 8; }
DEVICE int column_of(int lane, int run) { return run / 2 * 8 + lane % 4 * 2; }

template <class T>
struct Left {
  uint32_t pairs[4];
};
template <class T>
struct Right {
  uint32_t pairs[2][2];  // [columns' half][depth's half]
};

template <class T>
DEVICE Left<T> load_left(const T* from, int stride, int lane) {
  Left<T> left;
  const uint32_t at = uint32_t(__cvta_generic_to_shared(from + lane % 16 * stride + lane / 16 * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(left.pairs[0]), "=r"(left.pairs[1]), "=r"(left.pairs[2]), "=r"(left.pairs[3])
               : "r"(at)
               : "memory");
  return left;
}
template <class T>
DEVICE Right<T> load_right(const T* from, int stride, int lane) {
  Right<T> right;
  from += lane / 4 * stride + lane % 4 * 2;
  UNROLL for (int i = 0; i < 2; ++i)
    UNROLL for (int j = 0; j < 2; ++j) right.pairs[i][j] = bits_as<uint32_t>(load<2>(from + i * 8 * stride + j * 8));
  return right;
}

#define MMA(TYPE)                                                                                                      \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
DEVICE void product(Half, const uint32_t (&a)[4], const uint32_t (&b)[2], float* c) { MMA("f16"); }
DEVICE void product(Bfloat, const uint32_t (&a)[4], const uint32_t (&b)[2], float* c) { MMA("bf16"); }
#undef MMA

template <class T>
DEVICE void multiply_add(const Left<T>& left, const Right<T>& right, float* sums) {
  UNROLL for (int half = 0; half < 2; ++half) product(T{}, left.pairs, right.pairs[half], sums + 4 * half);
}

#else

constexpr int kRun = kTile;
DEVICE int row_of(int, int run) { return run; }
DEVICE int column_of(int, int) { return 0; }

template <class T>
struct Left {
  Pack<T, kTile> rows[kTile];
};
template <class T>
struct Right {
  Pack<T, kTile> rows[kTile];
};

template <class T>
Left<T> load_left(const T* from, int stride, int) {
  Left<T> left;
  for (int r = 0; r < kTile; ++r)
    for (int i = 0; i < kTile; ++i) left.rows[r].values[i] = load_shared<1>(from + r * stride + i).values[0];
  return left;
}
template <class T>
Right<T> load_right(const T* from, int stride, int) {
  Right<T> right;
  for (int r = 0; r < kTile; ++r)
    for (int i = 0; i < kTile; ++i) right.rows[r].values[i] = from[r * stride + i];
  return right;
}

template <class T>
void multiply_add(const Left<T>& left, const Right<T>& right, float* sums) {
  float a[kTile][kTile], b[kTile][kTile];
  for (int i = 0; i < kTile * kTile; ++i) {
    a[i / kTile][i % kTile] = to_float(left.rows[i / kTile].values[i % kTile]);
    b[i % kTile][i / kTile] = to_float(right.rows[i / kTile].values[i % kTile]);
  }
  for (int r = 0; r < kTile; ++r)
    for (int i = 0; i < kTile; ++i)
      for (int c = 0; c < kTile; ++c) sums[r * kTile + c] += a[r][i] * b[i][c];
}

#endif

constexpr int kRuns = kSums / kRun;

}  // namespace depthfuse

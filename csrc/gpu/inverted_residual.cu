// Inverted residual in one launch: expand 1x1, depthwise 3x3, project 1x1, skip. The formula is that of
// kernels/inverted_residual.py:
//
//   e[h] = act_inner(sum_c x[c] * w1[h, c] + b1[h])                    at every input pixel, 0 outside the image
//   d[h] = act_inner(sum_{r,s} e[h, shifted by r, s] * w2[h, r, s] + b2[h])
//   y[k] = scale[k] * act(sum_h d[h] * w3[k, h] + b3[k] + residual[k]) + shift[k]
//
// A block owns 8 x 8 outputs of one image and keeps their input pixels in shared memory. For 32 (16) hidden channels at a
// time it expands them, filters, and adds their share to the outputs' sums. Neighbouring blocks expand their common border
// twice: 1.56 times as much as there is, where Triton, which cannot index shared memory, expands 4 times as much.
#include "matrix.h"

namespace depthfuse {

constexpr int kSide = 8, kOutputs = kSide * kSide, kWaves = 4, THREADS = kWaves * kWave;
constexpr int kSkew = 8;  // values between rows of shared memory beyond their own: rows start in different banks

enum Activation { kNone, kRelu, kRelu6, kGelu, kGeluTanh, kSilu, kHardswish };

template <class T>
struct Arguments {
  const T *x, *w1, *b1, *w2, *b2, *w3, *b3, *residual, *scale, *shift;  // b3 to shift: or nullptr
  T* y;
  int batch, height, width, out_height, out_width, channels, hidden, out_channels, act_inner, act;
};

DEVICE float activate(float x, int act) {
  switch (act) {
    case kRelu: return x < 0.0f ? 0.0f : x;
    case kRelu6: return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x;
    case kGelu: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case kGeluTanh: return x / (1.0f + expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case kSilu: return x / (1.0f + expf(-x));
    case kHardswish: {
      const float gate = x + 3.0f;
      return x * (gate < 0.0f ? 0.0f : gate > 6.0f ? 6.0f : gate) * (1.0f / 6.0f);
    }
    default: return x;
  }
}

// Sizes of a block for C channels in and K out, both padded to whole tiles.
template <int C, int K, int STRIDE>
struct Block {
  static constexpr int kIn = (kSide - 1) * STRIDE + 3;
  static constexpr int kPixels = kIn * kIn;
  static constexpr int kRows = (kPixels + kTile - 1) / kTile * kTile;
  static constexpr int kSlice = STRIDE == 1 ? 32 : 16;  // hidden channels at a time: what shared memory holds
  static constexpr int kX = C + kSkew, kE = kSlice + kSkew;
  static constexpr int kShared = kRows * kX + kRows * kE + kOutputs * kE + kSlice * kX + K * kE;  // values
};

template <class T, int C, int K, int STRIDE>
DEVICE void inverted_residual_block(const Arguments<T>& a, int block, T* shared) {
  using B = Block<C, K, STRIDE>;
  T* xs = shared;                  // [kRows][kX]
  T* es = xs + B::kRows * B::kX;   // [kRows][kE]
  T* ds = es + B::kRows * B::kE;   // [kOutputs][kE]
  T* w1s = ds + kOutputs * B::kE;  // [kSlice][kX]
  T* w3s = w1s + B::kSlice * B::kX;  // [K][kE]
  const int tiles_w = (a.out_width + kSide - 1) / kSide, tiles_h = (a.out_height + kSide - 1) / kSide;
  const int n = block / (tiles_w * tiles_h);
  const int p0 = block / tiles_w % tiles_h * kSide, q0 = block % tiles_w * kSide;
  const int top = p0 * STRIDE - 1, left = q0 * STRIDE - 1;
  const T zero = from_float<T>(0.0f);
  constexpr int kColumnTiles = K / kTile;
  Registers<THREADS, kColumnTiles * kSums> sums;

  FOR_THREADS(thread) {
    for (int i = thread; i < B::kRows * C; i += THREADS) {
      const int pixel = i / C, c = i % C, h = top + pixel / B::kIn, w = left + pixel % B::kIn;
      const bool there = pixel < B::kPixels && c < a.channels && h >= 0 && h < a.height && w >= 0 && w < a.width;
      xs[pixel * B::kX + c] = there ? a.x[((int64_t(n) * a.height + h) * a.width + w) * a.channels + c] : zero;
    }
    UNROLL for (int i = 0; i < kColumnTiles * kSums; ++i) sums.of(thread)[i] = 0.0f;
  }
  BARRIER();

  for (int first = 0; first < a.hidden; first += B::kSlice) {
    FOR_THREADS(thread) {
      for (int i = thread; i < B::kSlice * C; i += THREADS) {
        const int h = i / C, c = i % C;
        const bool there = first + h < a.hidden && c < a.channels;
        w1s[h * B::kX + c] = there ? a.w1[int64_t(first + h) * a.channels + c] : zero;
      }
      for (int i = thread; i < K * B::kSlice; i += THREADS) {
        const int k = i / B::kSlice, h = i % B::kSlice;
        const bool there = k < a.out_channels && first + h < a.hidden;
        w3s[k * B::kE + h] = there ? a.w3[int64_t(k) * a.hidden + first + h] : zero;
      }
    }
    BARRIER();

    FOR_THREADS(thread) {
      const int wave = thread / kWave, lane = thread % kWave;
      for (int tile = wave; tile < B::kRows / kTile * (B::kSlice / kTile); tile += kWaves) {
        const int row0 = tile / (B::kSlice / kTile) * kTile, h0 = tile % (B::kSlice / kTile) * kTile;
        float acc[kSums] = {};
        multiply_add(xs + row0 * B::kX, B::kX, w1s + h0 * B::kX, B::kX, C, lane, acc);
        UNROLL for (int i = 0; i < kSums; ++i) {
          const int pixel = row0 + row_of(lane, i), h = h0 + column_of(lane, i);
          const int y = top + pixel / B::kIn, x = left + pixel % B::kIn;
          const bool there = first + h < a.hidden && y >= 0 && y < a.height && x >= 0 && x < a.width;
          const float value = there ? activate(acc[i] + to_float(a.b1[first + h]), a.act_inner) : 0.0f;
          es[pixel * B::kE + h] = from_float<T>(value);
        }
      }
    }
    BARRIER();

    FOR_THREADS(thread) {
      for (int i = thread; i < kOutputs * B::kSlice; i += THREADS) {
        const int output = i / B::kSlice, h = i % B::kSlice;
        float sum = 0.0f;
        if (first + h < a.hidden) {
          const T* from = es + (output / kSide * STRIDE * B::kIn + output % kSide * STRIDE) * B::kE + h;
          const T* taps = a.w2 + int64_t(first + h) * 9;
          sum = to_float(a.b2[first + h]);
          UNROLL for (int r = 0; r < 3; ++r)
            UNROLL for (int s = 0; s < 3; ++s) sum += to_float(from[(r * B::kIn + s) * B::kE]) * to_float(taps[r * 3 + s]);
          sum = activate(sum, a.act_inner);
        }
        ds[output * B::kE + h] = from_float<T>(sum);
      }
    }
    BARRIER();

    FOR_THREADS(thread) {
      const int wave = thread / kWave, lane = thread % kWave;
      UNROLL for (int j = 0; j < kColumnTiles; ++j)
        multiply_add(ds + wave * kTile * B::kE, B::kE, w3s + j * kTile * B::kE, B::kE, B::kSlice, lane,
                     sums.of(thread) + j * kSums);
    }
    BARRIER();
  }

  FOR_THREADS(thread) {
    const int wave = thread / kWave, lane = thread % kWave;
    UNROLL for (int j = 0; j < kColumnTiles; ++j) {
      UNROLL for (int i = 0; i < kSums; ++i) {
        const int output = wave * kTile + row_of(lane, i), k = j * kTile + column_of(lane, i);
        const int p = p0 + output / kSide, q = q0 + output % kSide;
        if (p >= a.out_height || q >= a.out_width || k >= a.out_channels) continue;
        const int64_t at = ((int64_t(n) * a.out_height + p) * a.out_width + q) * a.out_channels + k;
        float value = sums.of(thread)[j * kSums + i];
        if (a.b3) value += to_float(a.b3[k]);
        if (a.residual) value += to_float(a.residual[at]);
        value = activate(value, a.act);
        if (a.scale) value *= to_float(a.scale[k]);
        if (a.shift) value += to_float(a.shift[k]);
        a.y[at] = from_float<T>(value);
      }
    }
  }
}

#if defined(__HIPCC__) || defined(__CUDACC__)

template <class T, int C, int K, int STRIDE>
__global__ void __launch_bounds__(THREADS, 2) inverted_residual(Arguments<T> arguments) {
  extern __shared__ __align__(16) unsigned char memory[];
  inverted_residual_block<T, C, K, STRIDE>(arguments, blockIdx.x, reinterpret_cast<T*>(memory));
}

template <class T, int C, int K, int STRIDE>
int launch(const Arguments<T>& arguments, int blocks, Stream stream) {
  constexpr int bytes = Block<C, K, STRIDE>::kShared * int(sizeof(T));
  inverted_residual<T, C, K, STRIDE><<<dim3(blocks), dim3(THREADS), bytes, stream>>>(arguments);
#if defined(__HIPCC__)
  return int(hipGetLastError());
#else
  return int(cudaGetLastError());
#endif
}

#else

// Block after block, on memory that holds NaN first: what is read before it is written shows.
template <class T, int C, int K, int STRIDE>
int launch(const Arguments<T>& arguments, int blocks, Stream) {
  const T nan = from_float<T>(std::numeric_limits<float>::quiet_NaN());
  for (int block = 0; block < blocks; ++block) {
    std::vector<T> memory(Block<C, K, STRIDE>::kShared, nan);
    inverted_residual_block<T, C, K, STRIDE>(arguments, block, memory.data());
  }
  return 0;
}

#endif

constexpr int kRefused = -1;

template <class T, int STRIDE>
int choose(const Arguments<T>& a, Stream stream) {
  const int64_t blocks = int64_t(a.batch) * ((a.out_height + kSide - 1) / kSide) * ((a.out_width + kSide - 1) / kSide);
  if (blocks > (int64_t(1) << 30)) return kRefused;
  if (blocks == 0) return 0;
  const int c = (a.channels + kTile - 1) / kTile, k = (a.out_channels + kTile - 1) / kTile;
  // What MobileNetV2's kin have; with stride 2 more than 32 channels do not fit shared memory.
  if (c <= 1 && k <= 2) return launch<T, 16, 32, STRIDE>(a, int(blocks), stream);
  if (c <= 2 && k <= 2) return launch<T, 32, 32, STRIDE>(a, int(blocks), stream);
  if (c <= 2 && k <= 4) return launch<T, 32, 64, STRIDE>(a, int(blocks), stream);
  if constexpr (STRIDE == 1)
    if (c <= 4 && k <= 4) return launch<T, 64, 64, STRIDE>(a, int(blocks), stream);
  return kRefused;
}

template <class T>
int run(const void* const* pointers, const int32_t* sizes, Stream stream) {
  Arguments<T> a;
  const T** inputs[] = {&a.x, &a.w1, &a.b1, &a.w2, &a.b2, &a.w3, &a.b3, &a.residual, &a.scale, &a.shift};
  for (int i = 0; i < 10; ++i) *inputs[i] = static_cast<const T*>(pointers[i]);
  a.y = static_cast<T*>(const_cast<void*>(pointers[10]));
  a.batch = sizes[0], a.height = sizes[1], a.width = sizes[2], a.channels = sizes[3], a.hidden = sizes[4];
  a.out_channels = sizes[5];
  const int stride = sizes[6];
  a.act_inner = sizes[7], a.act = sizes[8];
  a.out_height = (a.height - 1) / stride + 1, a.out_width = (a.width - 1) / stride + 1;
  return stride == 1 ? choose<T, 1>(a, stream) : stride == 2 ? choose<T, 2>(a, stream) : kRefused;
}

}  // namespace depthfuse

// pointers: x [N, H, W, C], w1 [hidden, C], b1 [hidden], w2 [hidden, 3, 3], b2 [hidden], w3 [K, hidden], and b3, residual
// [N, P, Q, K], scale, shift or null, and y [N, P, Q, K]. sizes: N, H, W, C, hidden, K, stride, act_inner, act, by their
// numbers above. dtype: 0 float16, 1 bfloat16, 2 float32 (without a GPU only). Returns 0, the driver's error, or -1 for
// what there is no kernel for.
extern "C" int depthfuse_inverted_residual(const void* const* pointers, const int32_t* sizes, int dtype, void* stream) {
  using namespace depthfuse;
  const Stream on = static_cast<Stream>(stream);
#if defined(__HIPCC__) || defined(__CUDACC__)
  if (dtype == 0) return run<Half>(pointers, sizes, on);
#else
  if (dtype == 2) return run<float>(pointers, sizes, on);
#endif
  return dtype == 1 ? run<Bfloat>(pointers, sizes, on) : kRefused;
}

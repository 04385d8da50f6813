// Inverted residual in one launch: expand 1x1, depthwise 3x3, project 1x1, skip. The formula is that of
// kernels/inverted_residual.py:
//
//   e[h] = act_inner(sum_c x[c] * w1[h, c] + b1[h])                    at every input pixel, 0 outside the image
//   d[h] = act_inner(sum_{r,s} e[h, shifted by r, s] * w2[h, r, s] + b2[h])
//   y[k] = scale[k] * act(sum_h d[h] * w3[k, h] + b3[k] + residual[k]) + shift[k]
//
// A block owns 8 x 8 outputs of one image (4 x 8 at stride 2) and keeps their input pixels in shared memory. For 32 hidden
// channels at a time it expands them, filters, and adds their share to the outputs' sums. Neighbouring blocks expand their
// common border twice: 1.56 times as much as there is (1.20 at stride 2), where Triton, which cannot index shared memory,
// expands 4 times as much.
//
// Weights come padded with zeros to whole tiles, so that only images have edges: all activations here map 0 to 0.
#include "matrix.h"

namespace depthfuse {

enum Activation { kNone, kRelu, kRelu6, kGelu, kGeluTanh, kSilu, kHardswish };

template <class T>
struct Arguments {
  const T *x, *w1, *b1, *w2, *b2, *w3, *b3, *residual, *scale, *shift;  // b3 to shift: or nullptr
  T* y;
  int batch, height, width, out_height, out_width, channels, hidden, out_channels, act_inner, act;
  bool wide_in, wide_out;  // whether kMove values of x, kRun values of y and residual may be moved at once
};

constexpr int kMove = 8;

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

// Sizes of a block for C channels in and K out, both padded to whole tiles. Shared memory decides: two blocks should fit
// the 64 KiB of an AMD compute unit.
template <int C, int K, int STRIDE>
struct Block {
  static constexpr int kOutH = STRIDE == 1 ? 8 : 4, kOutW = 8, kOutputs = kOutH * kOutW;
  static constexpr int kInH = (kOutH - 1) * STRIDE + 3, kInW = (kOutW - 1) * STRIDE + 3, kPixels = kInH * kInW;
  static constexpr int kRows = (kPixels + kTile - 1) / kTile * kTile;
  static constexpr int kSlice = STRIDE == 2 && C > 32 ? 16 : 32;  // hidden channels at a time
  static constexpr int kSkew = 8;  // values between rows: they start in different banks, and at multiples of 16 bytes
  static constexpr int kX = C + kSkew, kE = kSlice + kSkew;
  static constexpr int kShared = kRows * (kX + kE) + kOutputs * kE;  // values
  // The depthwise phase: 256 items, each two channels of a strip of outputs in one row.
  static constexpr int kPairs = kSlice / 2, kStrip = kOutputs * kPairs / 256;
  // The projection: each wave has one tile of outputs and every kGroups-th tile of channels.
  static constexpr int kRowTiles = kOutputs / kTile, kGroups = kWaves / kRowTiles;
  static constexpr int kColumnTiles = (K / kTile + kGroups - 1) / kGroups;
};

template <class T, int C, int K, int STRIDE>
DEVICE void inverted_residual_block(const Arguments<T>& a, int block, T* shared) {
  using B = Block<C, K, STRIDE>;
  T* xs = shared;                 // [kRows][kX]: the input pixels
  T* es = xs + B::kRows * B::kX;  // [kRows][kE]: expanded
  T* ds = es + B::kRows * B::kE;  // [kOutputs][kE]: filtered
  const int tiles_w = (a.out_width + B::kOutW - 1) / B::kOutW, tiles_h = (a.out_height + B::kOutH - 1) / B::kOutH;
  const int n = block / (tiles_w * tiles_h);
  const int p0 = block / tiles_w % tiles_h * B::kOutH, q0 = block % tiles_w * B::kOutW;
  const int top = p0 * STRIDE - 1, left = q0 * STRIDE - 1;
  Registers<B::kColumnTiles * kSums> sums;

  FOR_THREADS(thread) {
    for (int i = thread; i < B::kRows * (C / kMove); i += THREADS) {
      const int pixel = i / (C / kMove), c = i % (C / kMove) * kMove;
      const int h = top + pixel / B::kInW, w = left + pixel % B::kInW;
      const bool inside = pixel < B::kPixels && h >= 0 && h < a.height && w >= 0 && w < a.width;
      const T* from = a.x + ((int64_t(n) * a.height + h) * a.width + w) * a.channels + c;
      T* to = xs + pixel * B::kX + c;
      if (inside && a.wide_in && c < a.channels) {
        store_shared(to, load<kMove>(from));
      } else {
        UNROLL for (int j = 0; j < kMove; ++j)
          store_shared(to + j, Pack<T, 1>{{inside && c + j < a.channels ? from[j] : from_float<T>(0.0f)}});
      }
    }
    UNROLL for (int i = 0; i < B::kColumnTiles * kSums; ++i) sums.of(thread)[i] = 0.0f;
  }
  BARRIER();

  for (int first = 0; first < a.hidden; first += B::kSlice) {
    // Expand. A wave keeps the weights of 16 hidden channels in registers and walks over the pixels.
    FOR_THREADS(thread) {
      const int wave = thread / kWave, lane = thread % kWave;
      constexpr int kTiles = B::kSlice / kTile;
      const int h0 = wave % kTiles * kTile;
      Right<T> weights[C / kTile];
      UNROLL for (int i = 0; i < C / kTile; ++i)
        weights[i] = load_right(a.w1 + int64_t(first + h0) * C + i * kTile, C, lane);
      for (int row0 = wave / kTiles * kTile; row0 < B::kRows; row0 += kWaves / kTiles * kTile) {
        float acc[kSums] = {};
        UNROLL for (int i = 0; i < C / kTile; ++i)
          multiply_add(load_left(xs + row0 * B::kX + i * kTile, B::kX, lane), weights[i], acc);
        UNROLL for (int run = 0; run < kRuns; ++run) {
          const int pixel = row0 + row_of(lane, run), h = h0 + column_of(lane, run);
          const int y = top + pixel / B::kInW, x = left + pixel % B::kInW;
          const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
          const Pack<T, kRun> bias = load<kRun>(a.b1 + first + h);
          Pack<T, kRun> expanded;
          UNROLL for (int i = 0; i < kRun; ++i) {
            const float value = activate(acc[run * kRun + i] + to_float(bias.values[i]), a.act_inner);
            expanded.values[i] = from_float<T>(inside ? value : 0.0f);
          }
          store_shared(es + pixel * B::kE + h, expanded);
        }
      }
    }
    BARRIER();

    // Filter. A strip reads each expanded value once for all of its outputs in a row.
    FOR_THREADS(thread) {
      for (int item = thread; item < 256; item += THREADS) {
        const int h = item % B::kPairs * 2, strip = item / B::kPairs;
        const int p = strip / (B::kOutW / B::kStrip), q = strip % (B::kOutW / B::kStrip) * B::kStrip;
        const Pack<T, 2> bias = load<2>(a.b2 + first + h);
        float acc[B::kStrip][2];
        UNROLL for (int i = 0; i < B::kStrip; ++i)
          UNROLL for (int j = 0; j < 2; ++j) acc[i][j] = to_float(bias.values[j]);
        UNROLL for (int r = 0; r < 3; ++r) {
          Pack<T, 2> taps[3];
          UNROLL for (int s = 0; s < 3; ++s) taps[s] = load<2>(a.w2 + (r * 3 + s) * int64_t(a.hidden) + first + h);
          const T* from = es + ((p * STRIDE + r) * B::kInW + q * STRIDE) * B::kE + h;
          UNROLL for (int x = 0; x < (B::kStrip - 1) * STRIDE + 3; ++x) {
            const Pack<T, 2> value = load_shared<2>(from + x * B::kE);
            UNROLL for (int i = 0; i < B::kStrip; ++i) {
              const int s = x - i * STRIDE;
              if (s < 0 || s > 2) continue;
              UNROLL for (int j = 0; j < 2; ++j) acc[i][j] += to_float(value.values[j]) * to_float(taps[s].values[j]);
            }
          }
        }
        UNROLL for (int i = 0; i < B::kStrip; ++i) {
          Pack<T, 2> filtered;
          UNROLL for (int j = 0; j < 2; ++j) filtered.values[j] = from_float<T>(activate(acc[i][j], a.act_inner));
          store_shared(ds + (p * B::kOutW + q + i) * B::kE + h, filtered);
        }
      }
    }
    BARRIER();

    // Project. No barrier follows: the next slice writes `es`, which nobody reads now, and `ds` only after a barrier.
    FOR_THREADS(thread) {
      const int wave = thread / kWave, lane = thread % kWave;
      const T* from = ds + wave % B::kRowTiles * kTile * B::kE;
      UNROLL for (int i = 0; i < B::kSlice; i += kTile) {
        const Left<T> filtered = load_left(from + i, B::kE, lane);
        UNROLL for (int j = 0; j < B::kColumnTiles; ++j) {
          const int k0 = (wave / B::kRowTiles + j * B::kGroups) * kTile;
          if (k0 >= K) continue;  // more waves than tiles
          const Right<T> weights = load_right(a.w3 + int64_t(k0) * a.hidden + first + i, a.hidden, lane);
          multiply_add(filtered, weights, sums.of(thread) + j * kSums);
        }
      }
    }
  }

  FOR_THREADS(thread) {
    const int wave = thread / kWave, lane = thread % kWave;
    UNROLL for (int j = 0; j < B::kColumnTiles; ++j) {
      const int k0 = (wave / B::kRowTiles + j * B::kGroups) * kTile;
      UNROLL for (int run = 0; run < kRuns; ++run) {
        const int output = wave % B::kRowTiles * kTile + row_of(lane, run), k = k0 + column_of(lane, run);
        const int p = p0 + output / B::kOutW, q = q0 + output % B::kOutW;
        if (p >= a.out_height || q >= a.out_width || k >= a.out_channels) continue;
        const int64_t at = ((int64_t(n) * a.out_height + p) * a.out_width + q) * a.out_channels + k;
        const int run_length = a.out_channels - k < kRun ? a.out_channels - k : kRun;
        float values[kRun];
        UNROLL for (int i = 0; i < kRun; ++i) values[i] = sums.of(thread)[j * kSums + run * kRun + i];
        if (a.b3) {
          UNROLL for (int i = 0; i < kRun; ++i)
            if (i < run_length) values[i] += to_float(a.b3[k + i]);
        }
        if (a.residual && a.wide_out) {
          const Pack<T, kRun> skip = load<kRun>(a.residual + at);
          UNROLL for (int i = 0; i < kRun; ++i) values[i] += to_float(skip.values[i]);
        } else if (a.residual) {
          UNROLL for (int i = 0; i < kRun; ++i)
            if (i < run_length) values[i] += to_float(a.residual[at + i]);
        }
        UNROLL for (int i = 0; i < kRun; ++i) {
          values[i] = activate(values[i], a.act);
          if (a.scale && i < run_length) values[i] *= to_float(a.scale[k + i]);
          if (a.shift && i < run_length) values[i] += to_float(a.shift[k + i]);
        }
        if (a.wide_out) {
          Pack<T, kRun> result;
          UNROLL for (int i = 0; i < kRun; ++i) result.values[i] = from_float<T>(values[i]);
          store(a.y + at, result);
        } else {
          UNROLL for (int i = 0; i < kRun; ++i)
            if (i < run_length) a.y[at + i] = from_float<T>(values[i]);
        }
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
int run_blocks(const Arguments<T>& arguments, int blocks, Stream stream) {
  constexpr int bytes = Block<C, K, STRIDE>::kShared * int(sizeof(T));
  inverted_residual<T, C, K, STRIDE><<<dim3(blocks), dim3(THREADS), bytes, stream>>>(arguments);
#if defined(__HIPCC__)
  return int(hipGetLastError());
#else
  return int(cudaGetLastError());
#endif
}

#else

constexpr int kRace = -2;

// Block after block, on memory that holds NaN first: what is read before it is written shows.
template <class T, int C, int K, int STRIDE>
int run_blocks(const Arguments<T>& arguments, int blocks, Stream) {
  struct alignas(16) Chunk {
    T values[kMove];
  };
  Chunk nan;
  for (T& value : nan.values) value = from_float<T>(std::numeric_limits<float>::quiet_NaN());
  constexpr int chunks = Block<C, K, STRIDE>::kShared / kMove;
  for (int block = 0; block < blocks; ++block) {
    std::vector<Chunk> memory(chunks, nan);
    races.start(memory.data(), chunks * int(sizeof(Chunk)));
    inverted_residual_block<T, C, K, STRIDE>(arguments, block, memory.data()->values);
    if (races.found) {
      races.found = false;
      return kRace;
    }
  }
  return 0;
}

#endif

constexpr int kRefused = -1;

template <class T, int C, int K, int STRIDE>
int launch(const Arguments<T>& a, Stream stream) {
  using B = Block<C, K, STRIDE>;
  const int64_t tiles_h = (a.out_height + B::kOutH - 1) / B::kOutH, tiles_w = (a.out_width + B::kOutW - 1) / B::kOutW;
  const int64_t blocks = a.batch * tiles_h * tiles_w;
  if (blocks > (int64_t(1) << 30) || a.hidden % 32) return kRefused;
  return blocks == 0 ? 0 : run_blocks<T, C, K, STRIDE>(a, int(blocks), stream);
}

template <class T, int STRIDE>
int choose(const Arguments<T>& a, int padded_channels, int padded_outputs, Stream stream) {
  if (a.channels > padded_channels || a.out_channels > padded_outputs) return kRefused;
  if (padded_channels == 16 && padded_outputs == 32) return launch<T, 16, 32, STRIDE>(a, stream);
  if (padded_channels == 32 && padded_outputs == 32) return launch<T, 32, 32, STRIDE>(a, stream);
  if (padded_channels == 32 && padded_outputs == 64) return launch<T, 32, 64, STRIDE>(a, stream);
  if (padded_channels == 64 && padded_outputs == 64) return launch<T, 64, 64, STRIDE>(a, stream);
  return kRefused;
}

inline bool aligned(const void* pointer, uint64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class T>
int run(const void* const* pointers, const int32_t* sizes, Stream stream) {
  Arguments<T> a;
  const T** inputs[] = {&a.x, &a.w1, &a.b1, &a.w2, &a.b2, &a.w3, &a.b3, &a.residual, &a.scale, &a.shift};
  for (int i = 0; i < 10; ++i) *inputs[i] = static_cast<const T*>(pointers[i]);
  a.y = static_cast<T*>(const_cast<void*>(pointers[10]));
  a.batch = sizes[0], a.height = sizes[1], a.width = sizes[2], a.channels = sizes[3], a.hidden = sizes[4];
  a.out_channels = sizes[5];
  const int stride = sizes[6], padded_channels = sizes[9], padded_outputs = sizes[10];
  if (stride != 1 && stride != 2) return kRefused;
  a.act_inner = sizes[7], a.act = sizes[8];
  a.out_height = (a.height - 1) / stride + 1, a.out_width = (a.width - 1) / stride + 1;
  a.wide_in = a.channels % kMove == 0 && aligned(a.x, alignof(Pack<T, kMove>));
  a.wide_out = a.out_channels % kRun == 0 && aligned(a.y, alignof(Pack<T, kRun>)) &&
               aligned(a.residual, alignof(Pack<T, kRun>));
  for (int i = 1; i < 6; ++i)  // the weights
    if (!aligned(pointers[i], 16)) return kRefused;
  return stride == 1 ? choose<T, 1>(a, padded_channels, padded_outputs, stream)
                     : choose<T, 2>(a, padded_channels, padded_outputs, stream);
}

}  // namespace depthfuse

// pointers: x [N, H, W, C], w1 [hidden, padded C], b1 [hidden], w2 [3, 3, hidden], b2 [hidden], w3 [padded K, hidden], then
// b3 [K], residual [N, P, Q, K], scale [K], shift [K] or null, and y [N, P, Q, K]. hidden is a multiple of 32; the weights'
// padding is zero, and they lie at multiples of 16 bytes. sizes: N, H, W, C, hidden, K, stride, act_inner, act (by their
// numbers above), padded C, padded K. dtype: 0 float16, 1 bfloat16, 2 float32 (without a GPU only). Returns 0, the driver's
// error, -1 for what there is no kernel for, or -2 for a race (without a GPU only).
extern "C" int depthfuse_inverted_residual(const void* const* pointers, const int32_t* sizes, int dtype, void* stream) {
  using namespace depthfuse;
  const Stream on = static_cast<Stream>(stream);
  if (dtype == 0) return run<Half>(pointers, sizes, on);
  if (dtype == 1) return run<Bfloat>(pointers, sizes, on);
#if !defined(__HIPCC__) && !defined(__CUDACC__)
  if (dtype == 2) return run<float>(pointers, sizes, on);
#endif
  return kRefused;
}

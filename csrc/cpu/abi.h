// What crosses the border to Python: plain C, so that one binary serves every version of torch.
//
// A plan is a list of tensors and a list of nodes, in the order of execution. Everything in it is checked when it is
// created (plan.cc): a damaged or hostile plan is refused, and never read or written out of bounds.
#pragma once
#include <cstdint>

constexpr int32_t kAbiVersion = 8;

#define DF_API __attribute__((visibility("default")))

extern "C" {

// Where a tensor's values are: in the plan's own memory, or at a pointer that comes with each run.
enum df_place : int32_t { DF_ARENA = 0, DF_INPUT = 1, DF_OUTPUT = 2 };

// float32 [n, h, w, c], channels innermost. Tokens are [n, 1, tokens, c]. `border` pixels of zeros lie around each image
// of an arena tensor, for the convolutions that read past its edges. Inputs and outputs are dense.
struct df_tensor {
  int32_t place, index, n, h, w, c, border;
};

enum df_op : int32_t {
  DF_CONV = 0,         // in groups; 1x1 over any pixels or tokens is a linear layer
  DF_DEPTHWISE = 1,    // a filter for each channel
  DF_MAX_POOL = 2,
  DF_MEAN = 3,         // over all pixels: [n, 1, 1, c]
  DF_ADD = 4,          // y = act(x + x2), x like y, each axis of x2 as long as y's or 1
  DF_LAYER_NORM = 5,   // over c, weight and bias in `weight`, `bias`
  DF_ATTENTION = 6,    // x [n, 1, t, 3 * heads * d] -> y [n, 1, t, heads * d]
  DF_COPY = 7,         // pixels of x, counted along h and w, into y's: concatenations and parts of tokens and channels
  DF_FROM_PLANES = 8,  // an input [n, c, h, w] -> y [n, h, w, c]
  DF_TO_PLANES = 9,    // x [n, h, w, c] -> an output [n, c, h, w]
  DF_CONSTANT = 10,    // y [n, h, w, c] = [h, w, c] floats at `weight`, the same for each image
  DF_MULTIPLY = 11,    // y = act(x * x2), as DF_ADD: the gate of a channel or a pixel
  DF_MAP = 12,         // y = act(weight * x + bias), both [c] or none
  DF_AVERAGE_POOL = 13,
  DF_PAD = 14,         // y(p, q) = x(p p[2] - p[0], q p[3] - p[1]), `f` where that is outside
  DF_GROUP_NORM = 15,  // over h, w and c / p[0] of its p[0] groups, weight and bias in `weight`, `bias`
  DF_RESIZE = 16,      // p[0]: see df_resize
};

enum df_act : int32_t {
  DF_NONE = 0, DF_RELU = 1, DF_RELU6 = 2, DF_GELU = 3, DF_GELU_TANH = 4, DF_SILU = 5, DF_HARDSWISH = 6,
  // of DF_ADD, DF_MULTIPLY and DF_MAP only
  DF_SIGMOID = 7, DF_HARDSIGMOID = 8, DF_TANH = 9, DF_LEAKY_RELU = 10,
};

enum df_resize : int32_t { DF_NEAREST = 0, DF_BILINEAR = 1, DF_BILINEAR_CORNERS = 2 };

// DF_TILES: by AMX, as exact as DF_DIRECT, which runs where there are no tiles, more than one group, or weights above 3e38.
// DF_TILES_BF16: the same with factors rounded to bfloat16 first, also by AVX-512's products of bfloat16.
enum df_algorithm : int32_t { DF_DIRECT = 0, DF_WINOGRAD2 = 2, DF_WINOGRAD4 = 4, DF_TILES = 16, DF_TILES_BF16 = 17 };

// y = scale * act(op(x) + bias + residual) + shift. Offsets count floats in the plan's weights; -1: there is none.
struct df_node {
  int32_t op, x, x2, y, act, algorithm;
  int32_t p[10];   // conv, pool: kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w
                   // and then: conv: groups. average pool: 1 where padding counts as pixels. max pool: 0
                   // and then: pools: 1 where the output's size is rounded up
                   // attention: heads. pad: rows above, columns to the left, steps down and along x: 1 takes all
                   // copy: y's first pixel and channel, x's first pixel and channel, how many pixels and channels
  float f;         // norms: epsilon. attention: scale of the scores. pad: value. leaky ReLU: slope
  int64_t weight;  // conv [c_out, kernel_h, kernel_w, c_in / groups]; depthwise [kernel_h, kernel_w, c]
  int64_t bias, scale, shift;  // [c_out]
};

DF_API int32_t df_abi_version();
// "amx" (AVX-512, and tiles), "avx512_bf16", "avx512", "avx2" or "baseline": the widest that this processor and DEPTHFUSE_ISA allow.
DF_API const char* df_isa();
// nullptr where the plan is refused; `error` then says why. The weights are copied, as the kernels read them.
DF_API void* df_plan_create(const df_tensor* tensors, int32_t tensor_count, const df_node* nodes, int32_t node_count,
                     const float* weights, int64_t weight_count, char* error, int64_t error_size);
// Inputs and outputs by `index`; as many as the plan has, each of its tensor's size. One run of a plan at a time: a
// second caller waits. `milliseconds`, where it is not nullptr, is given what each node took: 0 where it ran with the next
// one that took more.
DF_API void df_plan_run(void* plan, const float* const* inputs, float* const* outputs, int32_t threads,
                        double* milliseconds);
// 1 where all values lie in (-limit, limit), which NaN does not, else 0.
DF_API int32_t df_all_within(const float* values, int64_t count, float limit);
// Numbers of 16 bits as float32, and float32 rounded to them, to even: bfloat16, or, where `half` is not 0, float16. NaN
// stays one, of which bits is not said.
DF_API void df_widen(const uint16_t* values, int64_t count, int32_t half, float* wide);
DF_API void df_narrow(const float* values, int64_t count, int32_t half, uint16_t* narrowed);
// Bytes of the plan's own memory: what lies between its nodes, and the packed weights.
DF_API int64_t df_plan_bytes(const void* plan);
DF_API void df_plan_destroy(void* plan);
}

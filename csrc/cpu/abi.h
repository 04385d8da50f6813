// What crosses the border to Python: plain C, so that one binary serves every version of torch.
//
// A plan is a list of tensors and a list of nodes, in the order of execution. Everything in it is checked when it is
// created (plan.cc): a damaged or hostile plan is refused, and never read or written out of bounds.
#pragma once
#include <cstdint>

constexpr int32_t kAbiVersion = 2;

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
  DF_CONV = 0,         // dense; 1x1 over any pixels or tokens is a linear layer
  DF_DEPTHWISE = 1,    // a filter for each channel
  DF_MAX_POOL = 2,
  DF_MEAN = 3,         // over all pixels: [n, 1, 1, c]
  DF_ADD = 4,          // y = act(x + x2), x2 like x
  DF_LAYER_NORM = 5,   // over c, weight and bias in `weight`, `bias`
  DF_ATTENTION = 6,    // x [n, 1, t, 3 * heads * d] -> y [n, 1, t, heads * d]
  DF_COPY = 7,         // x's pixels, in order, into y's from p[0] on: concatenation of tokens
  DF_FROM_PLANES = 8,  // an input [n, c, h, w] -> y [n, h, w, c]
  DF_TO_PLANES = 9,    // x [n, h, w, c] -> an output [n, c, h, w]
  DF_SELECT = 10,      // y [n, 1, 1, c] = pixel p[0] of x, counted along h and w
  DF_CONSTANT = 11,    // y [n, h, w, c] = [h, w, c] floats at `weight`, the same for each image
};

enum df_act : int32_t {
  DF_NONE = 0, DF_RELU = 1, DF_RELU6 = 2, DF_GELU = 3, DF_GELU_TANH = 4, DF_SILU = 5, DF_HARDSWISH = 6,
};

enum df_algorithm : int32_t { DF_DIRECT = 0, DF_WINOGRAD2 = 2, DF_WINOGRAD4 = 4 };

// y = scale * act(op(x) + bias + residual) + shift. Offsets count floats in the plan's weights; -1: there is none.
struct df_node {
  int32_t op, x, x2, y, act, algorithm;
  int32_t p[10];   // conv, pool: kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w
                   // attention: heads. copy, select: first pixel
  float f;         // layer norm: epsilon. attention: scale of the scores
  int64_t weight;  // conv [c_out, kernel_h, kernel_w, c_in]; depthwise [kernel_h, kernel_w, c]
  int64_t bias, scale, shift;  // [c_out]
};

DF_API int32_t df_abi_version();
// "avx512", "avx2" or "baseline": the widest that this processor and DEPTHFUSE_ISA allow.
DF_API const char* df_isa();
// nullptr where the plan is refused; `error` then says why. The weights are copied, as the kernels read them.
DF_API void* df_plan_create(const df_tensor* tensors, int32_t tensor_count, const df_node* nodes, int32_t node_count,
                     const float* weights, int64_t weight_count, char* error, int64_t error_size);
// Inputs and outputs by `index`; as many as the plan has, each of its tensor's size. One run of a plan at a time: a
// second caller waits. `milliseconds`, where it is not nullptr, is given what each node took.
DF_API void df_plan_run(void* plan, const float* const* inputs, float* const* outputs, int32_t threads,
                        double* milliseconds);
// Bytes of the plan's own memory: what lies between its nodes, and the packed weights.
DF_API int64_t df_plan_bytes(const void* plan);
DF_API void df_plan_destroy(void* plan);
}

// The loops over numbers, compiled once for each instruction set (kernels_*.cc) from one source (kernels.inc).
//
// Everything that crosses this border is plain data: code that those files share with others, such as the standard
// library's templates, could end up in the binary with instructions that the processor does not have.
#pragma once
#include <cstdint>

namespace depthfuse {

// A float32 tensor [n, h, w, c] in memory: `data` is pixel (0, 0) of image 0, strides count floats.
struct View {
  float* data;
  int n, h, w, c;
  int64_t image, row, pixel;
};

// y = scale * act(sum + bias + residual) + shift. Vectors are padded to whole panels of output channels.
struct Tail {
  const float* bias;
  const float* scale;
  const float* shift;
  View residual;  // data nullptr: none
  int act;
};

struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// A dense convolution: rows are output pixels (n, p, q) in order, columns are output channels in panels.
struct ConvTask {
  View x, y;  // x has a border as wide as the padding
  Tail tail;
  Window window;
  const float* weights;  // [panels][kernel_h][kernel_w][c_in][panel]
  const int64_t* segments;  // where each run of `length` floats of a pixel's window starts, relative to its first
  int segment_count, length;
};

// The same by Winograd's minimal filtering, F(tile x tile, 3x3): weights [panels][(tile + 2)^2][c_in][panel].
struct WinogradTask {
  View x, y;
  Tail tail;
  int tile, padding;
  int tiles_h, tiles_w;
  const float* weights;
};

struct DepthwiseTask {
  View x, y;
  Tail tail;
  Window window;
  const float* weights;  // [kernel_h][kernel_w][c]
};

// A convolution by tiles (tiles.inc): weights [panels][blocks of channels][kernel_h][kernel_w][parts][tiles].
struct TileTask {
  View x, y;
  Tail tail;
  Window window;
  const uint16_t* weights;
  int blocks;
  int parts;  // of each float32: 3, or 1 where it is rounded to bfloat16
};

struct AttentionTask {
  View x, y;  // x [n, 1, t, 3 * heads * d], y [n, 1, t, heads * d]
  int heads, d;
  float scale;
};

struct TileKernels {
  // Output pixels of pointwise convolutions, output rows of others, [first, last) of all images'; `memory` holds
  // scratch(task, last - first) floats.
  void (*conv)(const TileTask&, int first, int last, int first_panel, int last_panel, float* memory);
  int64_t (*scratch)(const TileTask&, int units);
  // weights [c_out][taps][c_in] -> as TileTask has them. Returns how many, or 0 where one of them has no parts; `packed`
  // nullptr: only counts.
  int64_t (*weights)(const float* weights, int c_out, int taps, int c_in, int parts, uint16_t* packed);
  // As those of `Kernels`; nullptr where tiles gain nothing.
  void (*attention)(const AttentionTask&, int parts, int n, int head, int first, int last, float* memory);
  int64_t (*attention_scratch)(const AttentionTask&, int parts);
};

struct Kernels {
  const char* name;
  int vector;     // floats of a vector
  int panel;      // output channels of a panel
  int tile_rows;  // output pixels that a tile of accumulators holds, at most

  // Output pixels [first, last) of panels [first_panel, last_panel).
  void (*conv)(const ConvTask&, int first, int last, int first_panel, int last_panel);
  // Tiles [first, last) of panels [first_panel, last_panel); `scratch` holds winograd_scratch(task, last - first) floats.
  void (*winograd)(const WinogradTask&, int first, int last, int first_panel, int last_panel, float* scratch);
  int64_t (*winograd_scratch)(const WinogradTask&, int tiles);
  // weights [c_out][3][3][c_in] -> as WinogradTask has them
  void (*winograd_weights)(const float* weights, int c_out, int c_in, int tile, float* packed);
  const TileKernels* tiles;  // nullptr where there are none
  // Output rows [first, last) of n * h.
  void (*depthwise)(const DepthwiseTask&, int first, int last);
  // Whether all values lie in (-limit, limit): NaN does not.
  bool (*all_within)(const float* values, int64_t count, float limit);
  // Numbers of 16 bits, bfloat16 or, where `half`, float16, as float32; and float32 rounded to them, to even.
  void (*widen)(const uint16_t* values, int64_t count, bool half, float* wide);
  void (*narrow)(const float* values, int64_t count, bool half, uint16_t* narrowed);
  // Three planes' values, pixel by pixel.
  void (*weave_planes)(const float* first, const float* second, const float* third, float* pixels, int count);
  void (*max_pool)(const View& x, const View& y, const Window&, int first, int last);
  // Divided by how many pixels lie under the window, or, where `padded`, under it and in the padding.
  void (*average_pool)(const View& x, const View& y, const Window&, bool padded, int first, int last);
  // Pixels [first, last) of all of y's. An axis of x2 that is 1 has a stride of 0; `slope` is of leaky ReLU.
  void (*add)(const View& x, const View& x2, const View& y, int act, float slope, int first, int last);
  void (*multiply)(const View& x, const View& x2, const View& y, int act, float slope, int first, int last);
  void (*map)(const View& x, const View& y, const float* weight, const float* bias, int act, float slope, int first,
              int last);
  void (*layer_norm)(const View& x, const View& y, const float* weight, const float* bias, float epsilon, int first,
                     int last);
  // Group `group` of `groups` of image n.
  void (*group_norm)(const View& x, const View& y, const float* weight, const float* bias, float epsilon, int n,
                     int group, int groups);
  // Output rows [first, last) of n * h; `mode` is of df_resize.
  void (*resize)(const View& x, const View& y, int mode, int first, int last);
  // Image n's mean over its pixels, of channels [first, last).
  void (*mean)(const View& x, const View& y, int n, int first, int last);
  // Head `head` of image n; queries [first, last); `scratch` holds attention_scratch(task) floats.
  void (*attention)(const AttentionTask&, int n, int head, int first, int last, float* scratch);
  int64_t (*attention_scratch)(const AttentionTask&);
};

extern const Kernels kBaseline, kAvx2, kAvx512;
extern const TileKernels *const kTiles, *const kPairs;  // of AMX and of AVX-512; nullptr where the compiler knows none

}  // namespace depthfuse

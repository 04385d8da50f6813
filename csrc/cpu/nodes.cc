// The operations of a plan, each checked against its tensors and made a step: a function that runs its pieces.
#include <algorithm>
#include <climits>

#include "plan.h"
#include "pool.h"

namespace depthfuse {
namespace {

constexpr int kLine = 16;      // floats of a cache line
constexpr int kTileRows = 16;  // pixels of a tile

// What a section reads of the channels of x starts here.
int first_input(const Conv& conv, int channels, int section) {
  return std::min(section * conv.in, channels - conv.in);
}

// A section of a convolution, the weights of each being `weights` floats.
ConvTask section_of(const Conv& conv, ConvTask t, int section, int64_t weights) {
  const int out = section * conv.out;
  t.x.data += first_input(conv, t.x.c, section), t.y.data += out, t.weights += section * weights;
  t.x.c = conv.in, t.y.c = std::min(conv.out, t.y.c - out);
  for (const float** vector : {&t.tail.bias, &t.tail.scale, &t.tail.shift})
    if (*vector) *vector += out;
  if (t.tail.residual.data) t.tail.residual.data += out;
  return t;
}

// An axis of 1 lies under all of a longer one.
View spread(View v) {
  if (v.n == 1) v.image = 0;
  if (v.h == 1) v.row = 0;
  if (v.w == 1) v.pixel = 0;
  return v;
}

bool is_winograd(int algorithm) { return algorithm == DF_WINOGRAD2 || algorithm == DF_WINOGRAD4; }

}  // namespace

TileTask Conv::tile_task(const View& x, const View& y, const View& residual) const {
  TileTask t{x, y, task.tail, task.window, tiles, (x.c + 31) / 32, parts};
  t.tail.residual = residual;
  return t;
}

int64_t Conv::scratch_floats(const View& x, const View& y, int units) const {
  return tiles ? kernels().tiles->scratch(tile_task(x, y, View{}), units) + kSlack : 0;
}

void Conv::compute(const View& x, const View& y, const View& residual, int first, int last, int first_panel,
                   int last_panel, float* memory) const {
  if (tiles) return kernels().tiles->conv(tile_task(x, y, residual), first, last, first_panel, last_panel, memory);
  ConvTask t = task;
  t.segments = segments.data(), t.x = x, t.y = y, t.tail.residual = residual;
  kernels().conv(t, first, last, first_panel, last_panel);
}

Window Plan::window_of(const df_node& node, const Tensor& x, const Tensor& y, bool rounds_up) const {
  const int32_t* p = node.p;
  for (int i = 0; i < 8; ++i) {
    const int least = i == 4 || i == 5 ? 0 : 1;
    if (p[i] < least || p[i] > 4096) refuse("a window's size is " + std::to_string(p[i]));
  }
  const Window w{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
  auto size = [rounds_up](int64_t n, int kernel, int stride, int padding, int dilation) {
    const int64_t room = n + 2 * padding - int64_t(dilation) * (kernel - 1) - 1;
    if (room < 0) return int64_t(0);
    if (!rounds_up) return room / stride + 1;
    const int64_t count = (room + stride - 1) / stride + 1;
    return (count - 1) * stride >= n + padding ? count - 1 : count;  // none starts beyond the image, as in PyTorch
  };
  if (y.shape.n != x.shape.n || y.shape.h != size(x.shape.h, w.kernel_h, w.stride_h, w.padding_h, w.dilation_h) ||
      y.shape.w != size(x.shape.w, w.kernel_w, w.stride_w, w.padding_w, w.dilation_w))
    refuse("an output's size does not follow from its window");
  return w;
}

Tail Plan::tail_of(const df_node& node, int channels) {
  if (node.act < DF_NONE || node.act > DF_HARDSWISH) refuse("an activation is " + std::to_string(node.act));
  const int panel = kernels().panel;
  const int64_t padded = int64_t(channels + panel - 1) / panel * panel;
  Tail tail;
  tail.bias = vector_at(node.bias, channels, padded);
  tail.scale = vector_at(node.scale, channels, padded);
  tail.shift = vector_at(node.shift, channels, padded);
  tail.residual = View{};
  tail.act = node.act;
  return tail;
}

int Plan::residual_of(const df_node& node, const Tensor& y, int index) {
  if (node.x2 == -1) return -1;
  if (node.x2 == node.y) refuse("a residual is written over");
  if (!same_shape(read(node.x2, index), y)) refuse("a residual has another shape");
  return node.x2;
}

Conv Plan::conv_of(const df_node& node, int index) {
  const Tensor &x = read(node.x, index), &y = write(node.y, index);
  Conv conv{node.x, node.y, -1};
  const Window w = conv.task.window = window_of(node, x, y);
  if (node.x == node.y) refuse("a convolution writes over what it reads");
  if (w.padding_h > x.shape.border || w.padding_w > x.shape.border) refuse("a convolution reads past a border");
  if (y.pixels() > INT_MAX / 2) refuse("a convolution has too many pixels");
  const int groups = node.p[8];
  if (groups < 1 || x.shape.c % groups || y.shape.c % groups) refuse("a convolution's groups do not fit its channels");
  const int c_in = x.shape.c / groups, c_out = y.shape.c / groups;  // of a group
  const int taps = w.kernel_h * w.kernel_w, panel = kernels().panel;
  const int joined = std::max(1, std::min(groups, kernels().vector / c_out));
  conv.sections = (groups + joined - 1) / joined, conv.in = joined * c_in, conv.out = joined * c_out;
  conv.panels = (conv.out + panel - 1) / panel;
  conv.raw = floats_at(node.weight, int64_t(y.shape.c) * taps * c_in);
  conv.task.tail = tail_of(node, y.shape.c), conv.residual = residual_of(node, y, index);
  if (node.algorithm != DF_DIRECT && !is_by_tiles(node.algorithm) && !is_winograd(node.algorithm))
    refuse("an algorithm is " + std::to_string(node.algorithm));
  if (is_winograd(node.algorithm)) return conv;
  if (is_by_tiles(node.algorithm) && kernels().tiles && groups == 1) {
    const TileKernels& k = *kernels().tiles;
    conv.parts = node.algorithm == DF_TILES ? 3 : 1;
    const int64_t count = k.weights(conv.raw, y.shape.c, taps, c_in, conv.parts, nullptr);
    uint16_t* weights = reinterpret_cast<uint16_t*>(packed((count + 1) / 2));
    if (k.weights(conv.raw, y.shape.c, taps, c_in, conv.parts, weights)) {
      conv.tiles = weights;
      return conv;
    }
  }
  const int64_t length = int64_t(taps) * conv.in;
  float* weights = packed(conv.sections * conv.panels * length * panel);
  for (int out = 0; out < y.shape.c; ++out) {
    const int section = out / conv.out, column = out % conv.out;
    const int shift = out / c_out * c_in - first_input(conv, x.shape.c, section);  // of its group in its section
    float* to = weights + (int64_t(section) * conv.panels + column / panel) * length * panel + column % panel;
    for (int tap = 0; tap < taps; ++tap)
      for (int i = 0; i < c_in; ++i)
        to[(int64_t(tap) * conv.in + shift + i) * panel] = conv.raw[(int64_t(out) * taps + tap) * c_in + i];
  }
  conv.task.weights = weights;
  // Neighbouring taps of a row are neighbours in memory.
  const View sample = x.view(nullptr);
  const bool whole_rows = w.dilation_w == 1 && conv.sections == 1;
  conv.task.length = whole_rows ? w.kernel_w * conv.in : conv.in;
  for (int r = 0; r < w.kernel_h; ++r)
    for (int s = 0; s < (whole_rows ? 1 : w.kernel_w); ++s)
      conv.segments.push_back(int64_t(r) * w.dilation_h * sample.row + int64_t(s) * w.dilation_w * sample.pixel);
  conv.task.segment_count = int(conv.segments.size());
  return conv;
}

void Plan::add_conv(const df_node& node, int index) {
  const Conv conv = conv_of(node, index);
  const Tensor &x = tensor(conv.x), &y = tensor(conv.y);
  const Window w = conv.task.window;
  const Kernels& k = kernels();
  const int panels = conv.panels, residual = conv.residual, x_index = conv.x, y_index = conv.y;
  if (is_winograd(node.algorithm)) {
    const int tile = node.algorithm, c_in = x.shape.c, c_out = y.shape.c, taps = w.kernel_h * w.kernel_w;
    const float* raw = conv.raw;
    if (node.p[8] != 1 || taps != 9 || w.kernel_h != 3 || w.stride_h != 1 || w.stride_w != 1 || w.dilation_h != 1 || w.dilation_w != 1 ||
        w.padding_h != w.padding_w)
      refuse("Winograd is for 3x3 of stride 1");
    const int64_t positions = int64_t(tile + 2) * (tile + 2);
    float* weights = packed(panels * positions * c_in * k.panel);
    k.winograd_weights(raw, c_out, c_in, tile, weights);
    WinogradTask task{};
    task.tail = conv.task.tail, task.tile = tile, task.padding = w.padding_h, task.weights = weights;
    task.tiles_h = (y.shape.h + tile - 1) / tile, task.tiles_w = (y.shape.w + tile - 1) / tile;
    const int tiles = y.shape.n * task.tiles_h * task.tiles_w;
    steps_.push_back({[=](Run& run) {
      const Kernels& k = kernels();
      WinogradTask t = task;
      t.x = run.view(x_index), t.y = run.view(y_index);
      if (residual != -1) t.tail.residual = run.view(residual);
      // As many tiles at a time as let their transforms stay in a core's cache, and are whole tiles of accumulators.
      const int64_t cached = 96000 / (positions * t.x.c);
      const int block = int(std::max<int64_t>(2 * k.tile_rows, cached / k.tile_rows * k.tile_rows));
      int blocks = std::max(1, (tiles + block - 1) / block);
      int panel_groups = 1;
      if (tiles >= 2 * k.tile_rows * run.threads)
        blocks = (blocks + run.threads - 1) / run.threads * run.threads;
      else if (blocks < 2 * run.threads)  // too few tiles: threads share the output channels, and transform the same
        panel_groups = std::min(panels, run.threads);
      parallel_for(blocks * panel_groups, run.threads, [&](int piece, int) {
        const int b = piece / panel_groups, g = piece % panel_groups;
        const int first = cut(tiles, blocks, b), last = cut(tiles, blocks, b + 1);
        float* memory = scratch(k.winograd_scratch(t, last - first) + kSlack);
        k.winograd(t, first, last, cut(panels, panel_groups, g), cut(panels, panel_groups, g + 1), memory);
      });
    }, y_index});
    return;
  }
  if (conv.tiles) return add_tiles(conv);
  const int pixels = int(y.pixels()), all_panels = conv.sections * panels;
  const int64_t section_floats = int64_t(conv.task.segment_count) * conv.task.length * k.panel * panels;
  steps_.push_back({[=](Run& run) {
    const Kernels& k = kernels();
    ConvTask t = conv.task;
    t.segments = conv.segments.data();
    t.x = run.view(x_index), t.y = run.view(y_index);
    if (residual != -1) t.tail.residual = run.view(residual);
    const double work = double(pixels) * t.segment_count * t.length * t.y.c;
    const int wanted = work < 200000 ? 1 : int(std::min<double>(4.0 * run.threads, work / 100000));
    // Pixels first: pieces of them share no weights but read each input once. Where there are few, panels too.
    const int least_pixels = int64_t(t.segment_count) * t.length * conv.out < 400000 ? k.tile_rows : 2 * k.tile_rows;
    const int pixel_pieces = even(std::min(wanted, pixels / least_pixels), run.threads);
    const int panel_pieces = std::max(1, std::min(all_panels, wanted / pixel_pieces));
    parallel_for(pixel_pieces * panel_pieces, run.threads, [&](int piece, int) {
      const int a = piece / panel_pieces, b = piece % panel_pieces;
      const int first = cut(pixels, pixel_pieces, a), last = cut(pixels, pixel_pieces, a + 1);
      const int last_panel = cut(all_panels, panel_pieces, b + 1);
      for (int panel = cut(all_panels, panel_pieces, b), stop; panel < last_panel; panel = stop) {
        const int section = panel / panels, before = section * panels;
        stop = std::min(last_panel, before + panels);
        k.conv(conv.sections == 1 ? t : section_of(conv, t, section, section_floats), first, last, panel - before,
               stop - before);
      }
    });
  }, y_index});
}

void Plan::add_tiles(const Conv& conv) {
  const Tensor& y = tensor(conv.y);
  const Window w = conv.task.window;
  const int taps = w.kernel_h * w.kernel_w, panels = conv.panels;
  const bool pointwise = taps == 1 && w.padding_h == 0 && w.padding_w == 0;
  const int in_unit = pointwise ? kTileRows : 1;  // pixels that are not cut, or rows
  const int units = pointwise ? int(y.pixels()) : y.shape.n * y.shape.h;
  const int blocks = (units + in_unit - 1) / in_unit;
  const double work = double(y.pixels()) * taps * conv.in * conv.out;
  steps_.push_back({[=](Run& run) {
    const View from = run.view(conv.x), to = run.view(conv.y);
    const View added = conv.residual == -1 ? View{} : run.view(conv.residual);
    const int wanted = work < 400000 ? 1 : int(std::min<double>(4.0 * run.threads, work / 200000));
    // As for the other products: pixels first, and panels where there are few.
    const int least = std::max(1, pointwise ? 2 : 2 * kTileRows / to.w);
    const int unit_pieces = even(std::min(wanted, blocks / least), run.threads);
    const int panel_pieces = std::max(1, std::min(panels, wanted / unit_pieces));
    parallel_for(unit_pieces * panel_pieces, run.threads, [&](int piece, int) {
      const int a = piece / panel_pieces, b = piece % panel_pieces;
      const int first = in_unit * cut(blocks, unit_pieces, a);
      const int last = std::min(units, in_unit * cut(blocks, unit_pieces, a + 1));
      conv.compute(from, to, added, first, last, cut(panels, panel_pieces, b), cut(panels, panel_pieces, b + 1),
                   scratch(conv.scratch_floats(from, to, last - first)));
    });
  }, conv.y});
}

Depthwise Plan::depthwise_of(const df_node& node, int index) {
  const Tensor &x = read(node.x, index), &y = write(node.y, index);
  const Window w = window_of(node, x, y);
  if (node.x == node.y) refuse("a convolution writes over what it reads");
  if (x.shape.c != y.shape.c) refuse("a depthwise convolution changes the number of channels");
  if (w.padding_h > x.shape.border || w.padding_w > x.shape.border) refuse("a convolution reads past a border");
  const int64_t count = int64_t(w.kernel_h) * w.kernel_w * x.shape.c;
  Depthwise depthwise{node.x, node.y, residual_of(node, y, index)};
  depthwise.task.tail = tail_of(node, y.shape.c), depthwise.task.window = w;
  depthwise.task.weights = vector_at(node.weight, count, count);
  if (!depthwise.task.weights) refuse("a convolution has no weights");
  return depthwise;
}

void Plan::add_depthwise(const df_node& node, int index) {
  const Depthwise depthwise = depthwise_of(node, index);
  const Tensor& y = tensor(depthwise.y);
  const DepthwiseTask task = depthwise.task;
  const int residual = depthwise.residual, x_index = depthwise.x, y_index = depthwise.y;
  const int rows = y.shape.n * y.shape.h;
  steps_.push_back({[=](Run& run) {
    DepthwiseTask t = task;
    t.x = run.view(x_index), t.y = run.view(y_index);
    if (residual != -1) t.tail.residual = run.view(residual);
    const int pieces = pieces_for(rows, run.threads, 1);
    parallel_for(pieces, run.threads, [&](int piece, int) {
      kernels().depthwise(t, cut(rows, pieces, piece), cut(rows, pieces, piece + 1));
    });
  }, y_index});
}

void Plan::add_pool(const df_node& node, int index) {
  const Tensor &x = read(node.x, index), &y = write(node.y, index);
  if (node.x == node.y) refuse("a node writes over what it reads");
  const bool averages = node.op == DF_AVERAGE_POOL;
  for (int flag : {node.p[8], node.p[9]})
    if (flag < 0 || flag > 1) refuse("a pool's flag is " + std::to_string(flag));
  const bool padded = node.p[8];
  const Window w = window_of(node, x, y, node.p[9]);
  if (x.shape.c != y.shape.c) refuse("a pool changes the number of channels");
  if (2 * w.padding_h > w.kernel_h || 2 * w.padding_w > w.kernel_w) refuse("a pool has a window outside the image");
  if (averages && (w.dilation_h != 1 || w.dilation_w != 1)) refuse("an average pool is dilated");
  const int rows = y.shape.n * y.shape.h, from_index = node.x, to_index = node.y;
  steps_.push_back({[=](Run& run) {
    const View from = run.view(from_index), to = run.view(to_index);
    const int pieces = pieces_for(rows, run.threads, 4);
    parallel_for(pieces, run.threads, [&](int piece, int) {
      const int first = cut(rows, pieces, piece), last = cut(rows, pieces, piece + 1);
      if (averages)
        kernels().average_pool(from, to, w, padded, first, last);
      else
        kernels().max_pool(from, to, w, first, last);
    });
  }, to_index});
}

void Plan::add_elementwise(const df_node& node, int index) {
  const Tensor &x = read(node.x, index), &y = write(node.y, index);
  const int a = node.x, b = node.x2, to_index = node.y, op = node.op, act = node.act;
  if (a == to_index || b == to_index) refuse("a node writes over what it reads");
  if (!same_shape(x, y)) refuse("an elementwise operation changes the shape");
  if (y.pixels() > INT_MAX / 2) refuse("a tensor has too many pixels");
  if (act < DF_NONE || act > DF_LEAKY_RELU) refuse("an activation is " + std::to_string(act));
  const float *weight = nullptr, *bias = nullptr;
  if (op == DF_MAP) {
    weight = vector_at(node.weight, y.shape.c, y.shape.c), bias = vector_at(node.bias, y.shape.c, y.shape.c);
  } else {
    const df_tensor &s = read(b, index).shape, &t = y.shape;
    if ((s.n != 1 && s.n != t.n) || (s.h != 1 && s.h != t.h) || (s.w != 1 && s.w != t.w) || (s.c != 1 && s.c != t.c))
      refuse("an operand has another shape");
  }
  const int pixels = int(y.pixels()), least = std::max(1, 4096 / y.shape.c);
  const float slope = node.f;
  steps_.push_back({[=](Run& run) {
    const View from = run.view(a), to = run.view(to_index);
    const View other = op == DF_MAP ? from : spread(run.view(b));
    const int pieces = pieces_for(pixels, run.threads, least);
    parallel_for(pieces, run.threads, [&](int piece, int) {
      const int first = cut(pixels, pieces, piece), last = cut(pixels, pieces, piece + 1);
      if (op == DF_MAP)
        kernels().map(from, to, weight, bias, act, slope, first, last);
      else
        (op == DF_ADD ? kernels().add : kernels().multiply)(from, other, to, act, slope, first, last);
    });
  }, to_index});
}

void Plan::add_node(const df_node& node, int index) {
  if (node.op == DF_CONV) return add_conv(node, index);
  if (node.op == DF_DEPTHWISE) return add_depthwise(node, index);
  if (node.op == DF_MAX_POOL || node.op == DF_AVERAGE_POOL) return add_pool(node, index);
  if (node.op == DF_ADD || node.op == DF_MULTIPLY || node.op == DF_MAP) return add_elementwise(node, index);
  if (node.op == DF_COPY) return add_copy(node, index);
  if (node.op == DF_PAD) return add_pad(node, index);
  if (node.op == DF_FROM_PLANES || node.op == DF_TO_PLANES) return add_planes(node, index);
  if (node.op == DF_CONSTANT) return add_constant(node, index);
  const int x = node.x, y = node.y;
  read(x, index);
  if (x == y) refuse("a node writes over what it reads");
  const Tensor& out = write(y, index);
  if (out.pixels() > INT_MAX / 2) refuse("a tensor has too many pixels");
  const int pixels = int(out.pixels());
  switch (node.op) {
    case DF_MEAN: {
      const df_tensor& s = tensor(x).shape;
      if (s.n != out.shape.n || s.c != out.shape.c || out.shape.h != 1 || out.shape.w != 1) refuse("a mean's shape");
      steps_.push_back({[=](Run& run) {
        const View from = run.view(x), to = run.view(y);
        // Lines of channels: a sum of pixels is not cut, so that it does not depend on the number of threads.
        const int lines = (from.c + kLine - 1) / kLine;
        const int pieces = from.n > 3 ? 1 : pieces_for(lines, run.threads, std::max(1, 8192 / (from.h * from.w)));
        parallel_for(from.n * pieces, run.threads, [&](int piece, int) {
          const int part = piece % pieces;
          kernels().mean(from, to, piece / pieces, kLine * cut(lines, pieces, part),
                         std::min(from.c, kLine * cut(lines, pieces, part + 1)));
        });
      }, y});
      return;
    }
    case DF_LAYER_NORM: {
      if (!same_shape(tensor(x), out)) refuse("a norm's shapes");
      const float* weight = vector_at(node.weight, out.shape.c, out.shape.c);
      const float* bias = vector_at(node.bias, out.shape.c, out.shape.c);
      const float epsilon = node.f;
      steps_.push_back({[=](Run& run) {
        const View from = run.view(x), to = run.view(y);
        const int pieces = pieces_for(pixels, run.threads, 16);
        parallel_for(pieces, run.threads, [&](int piece, int) {
          kernels().layer_norm(from, to, weight, bias, epsilon, cut(pixels, pieces, piece),
                               cut(pixels, pieces, piece + 1));
        });
      }, y});
      return;
    }
    case DF_GROUP_NORM: {
      const int groups = node.p[0];
      if (!same_shape(tensor(x), out) || groups < 1 || out.shape.c % groups) refuse("a norm's shapes");
      const float* weight = vector_at(node.weight, out.shape.c, out.shape.c);
      const float* bias = vector_at(node.bias, out.shape.c, out.shape.c);
      const float epsilon = node.f;
      steps_.push_back({[=](Run& run) {
        const View from = run.view(x), to = run.view(y);
        parallel_for(from.n * groups, run.threads, [&](int piece, int) {
          kernels().group_norm(from, to, weight, bias, epsilon, piece / groups, piece % groups, groups);
        });
      }, y});
      return;
    }
    case DF_RESIZE: {
      const df_tensor& s = tensor(x).shape;
      const int mode = node.p[0], rows = out.shape.n * out.shape.h;
      if (s.n != out.shape.n || s.c != out.shape.c) refuse("a change of size changes images or channels");
      if (mode < DF_NEAREST || mode > DF_BILINEAR_CORNERS) refuse("a change of size is " + std::to_string(mode));
      steps_.push_back({[=](Run& run) {
        const View from = run.view(x), to = run.view(y);
        const int pieces = pieces_for(rows, run.threads, 4);
        parallel_for(pieces, run.threads, [&](int piece, int) {
          kernels().resize(from, to, mode, cut(rows, pieces, piece), cut(rows, pieces, piece + 1));
        });
      }, y});
      return;
    }
    case DF_ATTENTION: {
      const df_tensor& s = tensor(x).shape;
      const int heads = node.p[0];
      if (heads < 1 || s.h != out.shape.h || s.w != out.shape.w || s.n != out.shape.n || s.border || out.shape.border ||
          int64_t(s.c) != 3 * int64_t(out.shape.c) || out.shape.c % heads || pixels > kMostSize)
        refuse("an attention's shapes");
      if (node.algorithm != DF_DIRECT && !is_by_tiles(node.algorithm))
        refuse("an attention's algorithm is " + std::to_string(node.algorithm));
      const TileKernels* tiles = is_by_tiles(node.algorithm) ? kernels().tiles : nullptr;
      if (tiles && !tiles->attention) tiles = nullptr;
      const int in_parts = node.algorithm == DF_TILES ? 3 : 1;
      AttentionTask task{};
      task.heads = heads, task.d = out.shape.c / heads, task.scale = node.f;
      steps_.push_back({[=](Run& run) {
        AttentionTask t = task;
        t.x = run.view(x), t.y = run.view(y);
        const int groups = t.x.n * t.heads, tokens = t.x.h * t.x.w;
        t.x.h = t.y.h = 1, t.x.w = t.y.w = tokens;
        const int parts = groups % run.threads == 0 && groups >= run.threads ? 1 : std::min(run.threads, tokens);
        parallel_for(groups * parts, run.threads, [&](int piece, int) {
          const int group = piece / parts, part = piece % parts;
          const int n = group / t.heads, head = group % t.heads;
          const int first = cut(tokens, parts, part), last = cut(tokens, parts, part + 1);
          if (tiles)
            tiles->attention(t, in_parts, n, head, first, last, scratch(tiles->attention_scratch(t, in_parts) + kSlack));
          else
            kernels().attention(t, n, head, first, last, scratch(kernels().attention_scratch(t) + kSlack));
        });
      }, y});
      return;
    }
    default: refuse("an operation is " + std::to_string(node.op));
  }
}

}  // namespace depthfuse

// The operations of a plan, each checked against its tensors and made a step: a function that runs its pieces.
#include <algorithm>
#include <climits>

#include "plan.h"
#include "pool.h"

namespace depthfuse {
namespace {

bool same_shape(const Tensor& a, const Tensor& b) {
  return a.shape.n == b.shape.n && a.shape.h == b.shape.h && a.shape.w == b.shape.w && a.shape.c == b.shape.c;
}

// As many pieces as keep all threads busy to the end, of `least_units` at least.
int pieces_for(int units, int threads, int least_units) {
  return even(std::min(4 * threads, units / std::max(1, least_units)), threads);
}

}  // namespace

Window Plan::window_of(const df_node& node, const Tensor& x, const Tensor& y) const {
  const int32_t* p = node.p;
  for (int i = 0; i < 8; ++i) {
    const int least = i == 4 || i == 5 ? 0 : 1;
    if (p[i] < least || p[i] > 4096) refuse("a window's size is " + std::to_string(p[i]));
  }
  const Window w{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
  auto size = [](int64_t n, int kernel, int stride, int padding, int dilation) {
    const int64_t room = n + 2 * padding - int64_t(dilation) * (kernel - 1) - 1;
    return room < 0 ? int64_t(0) : room / stride + 1;
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
  const int c_in = x.shape.c, c_out = y.shape.c, taps = w.kernel_h * w.kernel_w, panel = kernels().panel;
  conv.panels = (c_out + panel - 1) / panel;
  conv.raw = floats_at(node.weight, int64_t(c_out) * taps * c_in);
  conv.task.tail = tail_of(node, c_out), conv.residual = residual_of(node, y, index);
  if (node.algorithm != DF_DIRECT) return conv;
  float* weights = packed(int64_t(conv.panels) * taps * c_in * panel);
  for (int out = 0; out < c_out; ++out)
    for (int64_t i = 0; i < int64_t(taps) * c_in; ++i)
      weights[(int64_t(out / panel) * taps * c_in + i) * panel + out % panel] = conv.raw[int64_t(out) * taps * c_in + i];
  conv.task.weights = weights;
  // Neighbouring taps of a row are neighbours in memory.
  const View sample = x.view(nullptr);
  const bool whole_rows = w.dilation_w == 1;
  conv.task.length = whole_rows ? w.kernel_w * c_in : c_in;
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
  if (node.algorithm != DF_DIRECT) {
    const int tile = node.algorithm, c_in = x.shape.c, c_out = y.shape.c, taps = w.kernel_h * w.kernel_w;
    const float* raw = conv.raw;
    if (tile != DF_WINOGRAD2 && tile != DF_WINOGRAD4) refuse("an algorithm is " + std::to_string(tile));
    if (taps != 9 || w.kernel_h != 3 || w.stride_h != 1 || w.stride_w != 1 || w.dilation_h != 1 || w.dilation_w != 1 ||
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
  const int pixels = int(y.pixels());
  steps_.push_back({[=](Run& run) {
    const Kernels& k = kernels();
    ConvTask t = conv.task;
    t.segments = conv.segments.data();
    t.x = run.view(x_index), t.y = run.view(y_index);
    if (residual != -1) t.tail.residual = run.view(residual);
    const double work = double(pixels) * t.segment_count * t.length * t.y.c;
    const int wanted = work < 200000 ? 1 : int(std::min<double>(4.0 * run.threads, work / 100000));
    // Pixels first: pieces of them share no weights but read each input once. Where there are few, panels too.
    const int least_pixels = int64_t(t.segment_count) * t.length * t.y.c < 400000 ? k.tile_rows : 2 * k.tile_rows;
    const int pixel_pieces = even(std::min(wanted, pixels / least_pixels), run.threads);
    const int panel_pieces = std::max(1, std::min(panels, wanted / pixel_pieces));
    parallel_for(pixel_pieces * panel_pieces, run.threads, [&](int piece, int) {
      const int a = piece / panel_pieces, b = piece % panel_pieces;
      k.conv(t, cut(pixels, pixel_pieces, a), cut(pixels, pixel_pieces, a + 1), cut(panels, panel_pieces, b),
             cut(panels, panel_pieces, b + 1));
    });
  }, y_index});
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

void Plan::add_node(const df_node& node, int index) {
  if (node.op == DF_CONV) return add_conv(node, index);
  if (node.op == DF_DEPTHWISE) return add_depthwise(node, index);
  const int x = node.x, y = node.y, x2 = node.x2;
  if (node.op != DF_CONSTANT) {
    read(x, index);
    if (x == y) refuse("a node writes over what it reads");
  }
  const Tensor& out = write(y, index);
  if (out.pixels() > INT_MAX / 2) refuse("a tensor has too many pixels");
  const int pixels = int(out.pixels());
  switch (node.op) {
    case DF_MAX_POOL: {
      const Window w = window_of(node, tensor(x), out);
      if (tensor(x).shape.c != out.shape.c) refuse("a pool changes the number of channels");
      const int rows = out.shape.n * out.shape.h;
      steps_.push_back({[=](Run& run) {
        const View from = run.view(x), to = run.view(y);
        const int pieces = pieces_for(rows, run.threads, 4);
        parallel_for(pieces, run.threads, [&](int piece, int) {
          kernels().max_pool(from, to, w, cut(rows, pieces, piece), cut(rows, pieces, piece + 1));
        });
      }, y});
      return;
    }
    case DF_MEAN: {
      const df_tensor& s = tensor(x).shape;
      if (s.n != out.shape.n || s.c != out.shape.c || out.shape.h != 1 || out.shape.w != 1) refuse("a mean's shape");
      steps_.push_back({[=](Run& run) {
        const View from = run.view(x), to = run.view(y);
        parallel_for(from.n, from.n > 3 ? run.threads : 1, [&](int n, int) { kernels().mean(from, to, n); });
      }, y});
      return;
    }
    case DF_ADD: {
      if (!same_shape(tensor(x), out) || !same_shape(read(x2, index), out) || x2 == y) refuse("a sum's shapes");
      if (node.act < DF_NONE || node.act > DF_HARDSWISH) refuse("an activation is " + std::to_string(node.act));
      const int act = node.act;
      steps_.push_back({[=](Run& run) {
        const View a = run.view(x), b = run.view(x2), to = run.view(y);
        const int pieces = pieces_for(pixels, run.threads, 64);
        parallel_for(pieces, run.threads, [&](int piece, int) {
          kernels().add(a, b, to, act, cut(pixels, pieces, piece), cut(pixels, pieces, piece + 1));
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
    case DF_ATTENTION: {
      const df_tensor& s = tensor(x).shape;
      const int heads = node.p[0];
      if (heads < 1 || s.h != out.shape.h || s.w != out.shape.w || s.n != out.shape.n || s.border || out.shape.border ||
          int64_t(s.c) != 3 * int64_t(out.shape.c) || out.shape.c % heads || pixels > kMostSize)
        refuse("an attention's shapes");
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
          float* memory = scratch(kernels().attention_scratch(t) + kSlack);
          kernels().attention(t, group / t.heads, group % t.heads, cut(tokens, parts, part), cut(tokens, parts, part + 1),
                              memory);
        });
      }, y});
      return;
    }
    case DF_COPY: {
      const df_tensor& s = tensor(x).shape;
      const int64_t first = node.p[0], count = int64_t(s.h) * s.w;
      if (s.n != out.shape.n || s.c != out.shape.c || first < 0 ||
          first + count > int64_t(out.shape.h) * out.shape.w)
        refuse("a copy's shapes");
      steps_.push_back({[=](Run& run) {
        const View from = run.view(x), to = run.view(y);
        for (int n = 0; n < from.n; ++n)
          for (int64_t i = 0; i < count; ++i)
            std::memcpy(to.data + n * to.image + (first + i) / to.w * to.row + (first + i) % to.w * to.pixel,
                        from.data + n * from.image + i / from.w * from.row + i % from.w * from.pixel,
                        sizeof(float) * from.c);
      }, y});
      return;
    }
    case DF_FROM_PLANES:
    case DF_TO_PLANES: {
      const bool reading = node.op == DF_FROM_PLANES;
      if (!same_shape(tensor(x), out)) refuse("a change of layout changes the shape");
      if (tensor(reading ? x : y).shape.place != (reading ? DF_INPUT : DF_OUTPUT)) refuse("planes lie in the arena");
      const int rows = out.shape.n * out.shape.h;
      steps_.push_back({[=](Run& run) {
        const View from = run.view(x), to = run.view(y);
        const int64_t plane = int64_t(from.h) * from.w;
        const int pieces = pieces_for(rows, run.threads, 16);
        parallel_for(pieces, run.threads, [&](int piece, int) {
          for (int row = cut(rows, pieces, piece); row < cut(rows, pieces, piece + 1); ++row) {
            const int n = row / from.h, p = row % from.h;
            for (int c = 0; c < from.c; ++c) {
              const int64_t at = (int64_t(n) * from.c + c) * plane + int64_t(p) * from.w;
              if (reading)
                for (int q = 0; q < from.w; ++q)
                  to.data[n * to.image + p * to.row + q * to.pixel + c] = from.data[at + q];
              else
                for (int q = 0; q < from.w; ++q)
                  to.data[at + q] = from.data[n * from.image + p * from.row + q * from.pixel + c];
            }
          }
        });
      }, y});
      return;
    }
    case DF_SELECT: {
      const df_tensor& s = tensor(x).shape;
      const int pixel = node.p[0];
      if (s.n != out.shape.n || s.c != out.shape.c || out.shape.h != 1 || out.shape.w != 1 || pixel < 0 ||
          pixel >= int64_t(s.h) * s.w)
        refuse("a selection's shapes");
      steps_.push_back({[=](Run& run) {
        const View from = run.view(x), to = run.view(y);
        for (int n = 0; n < from.n; ++n)
          std::memcpy(to.data + n * to.image,
                      from.data + n * from.image + pixel / from.w * from.row + pixel % from.w * from.pixel,
                      sizeof(float) * from.c);
      }, y});
      return;
    }
    case DF_CONSTANT: {
      const int64_t row_floats = int64_t(out.shape.w) * out.shape.c, count = row_floats * out.shape.h;
      const float* values = vector_at(node.weight, count, count);
      if (!values) refuse("a constant has no values");
      steps_.push_back({[=](Run& run) {
        const View to = run.view(y);
        for (int n = 0; n < to.n; ++n)
          for (int p = 0; p < to.h; ++p)
            std::memcpy(to.data + n * to.image + p * to.row, values + p * row_floats, sizeof(float) * row_floats);
      }, y});
      return;
    }
    default: refuse("an operation is " + std::to_string(node.op));
  }
}

}  // namespace depthfuse

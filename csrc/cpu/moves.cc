// What moves values and computes none: concatenations, parts, padding, layouts, constants.
#include <algorithm>
#include <climits>

#include "plan.h"
#include "pool.h"

namespace depthfuse {
namespace {

// Pixel `index` of image n, counted along its rows.
float* pixel_of(const View& v, int n, int64_t index) {
  return v.data + n * v.image + index / v.w * v.row + index % v.w * v.pixel;
}

}  // namespace

void Plan::add_copy(const df_node& node, int index) {
  const Tensor &x = read(node.x, index), &y = write(node.y, index);
  if (node.x == node.y) refuse("a node writes over what it reads");
  const int64_t to_pixel = node.p[0], to_channel = node.p[1], from_pixel = node.p[2], from_channel = node.p[3];
  const int64_t count = node.p[4], channels = node.p[5];
  auto inside = [](int64_t first, int64_t size, int64_t all) { return first >= 0 && size >= 1 && first + size <= all; };
  if (x.shape.n != y.shape.n || !inside(to_pixel, count, int64_t(y.shape.h) * y.shape.w) ||
      !inside(from_pixel, count, int64_t(x.shape.h) * x.shape.w) || !inside(to_channel, channels, y.shape.c) ||
      !inside(from_channel, channels, x.shape.c))
    refuse("a copy's shapes");
  const int from_index = node.x, to_index = node.y, images = x.shape.n;
  const int64_t least = 8192 / channels;
  steps_.push_back({[=](Run& run) {
    const View from = run.view(from_index), to = run.view(to_index);
    const int pieces = pieces_for(count, run.threads, least);
    parallel_for(images * pieces, run.threads, [&](int piece, int) {
      const int n = piece / pieces, part = piece % pieces;
      for (int64_t i = count * part / pieces; i < count * (part + 1) / pieces; ++i)
        std::memcpy(pixel_of(to, n, to_pixel + i) + to_channel, pixel_of(from, n, from_pixel + i) + from_channel,
                    sizeof(float) * channels);
    });
  }, to_index});
}

void Plan::add_pad(const df_node& node, int index) {
  const Tensor &x = read(node.x, index), &y = write(node.y, index);
  if (node.x == node.y) refuse("a node writes over what it reads");
  const int above = node.p[0], before = node.p[1], down = node.p[2], along = node.p[3];
  if (x.shape.n != y.shape.n || x.shape.c != y.shape.c || std::abs(int64_t(above)) > kMostSize ||
      std::abs(int64_t(before)) > kMostSize)
    refuse("a padding's shapes");
  if (down < 1 || along < 1 || down > kMostSize || along > kMostSize) refuse("a padding's steps");
  if (y.pixels() > INT_MAX / 2) refuse("a tensor has too many pixels");
  const int rows = y.shape.n * y.shape.h, from_index = node.x, to_index = node.y;
  const float value = node.f;
  steps_.push_back({[=](Run& run) {
    const View from = run.view(from_index), to = run.view(to_index);
    const int pieces = pieces_for(rows, run.threads, 8);
    // Columns of y that x has: from the first that is not before it to the first that is beyond it.
    auto first = [&](int64_t column) { return std::clamp((column + along - 1) / along, int64_t(0), int64_t(to.w)); };
    const int left = first(before), right = std::max<int>(left, first(int64_t(before) + from.w));
    parallel_for(pieces, run.threads, [&](int piece, int) {
      for (int row = cut(rows, pieces, piece); row < cut(rows, pieces, piece + 1); ++row) {
        const int n = row / to.h, p = row % to.h;
        const int64_t source = int64_t(p) * down - above;
        float* target = to.data + n * to.image + p * to.row;
        const bool outside = source < 0 || source >= from.h;
        const int until = outside ? to.w : left, again = outside ? to.w : right;
        std::fill(target, target + int64_t(until) * to.pixel, value);
        const int run = along == 1 ? again - until : 1;  // pixels of x side by side
        for (int q = until; q < again; q += run)
          std::memcpy(target + int64_t(q) * to.pixel,
                      from.data + n * from.image + source * from.row + (int64_t(q) * along - before) * from.pixel,
                      sizeof(float) * run * to.pixel);
        std::fill(target + int64_t(again) * to.pixel, target + int64_t(to.w) * to.pixel, value);
      }
    });
  }, to_index});
}

void Plan::add_planes(const df_node& node, int index) {
  const Tensor &x = read(node.x, index), &out = write(node.y, index);
  if (node.x == node.y) refuse("a node writes over what it reads");
  const int from_index = node.x, to_index = node.y;
  const bool reading = node.op == DF_FROM_PLANES;
  if (!same_shape(x, out)) refuse("a change of layout changes the shape");
  if ((reading ? x : out).shape.place != (reading ? DF_INPUT : DF_OUTPUT)) refuse("planes lie in the arena");
  const int rows = out.shape.n * out.shape.h;
  steps_.push_back({[=](Run& run) {
    const View from = run.view(from_index), to = run.view(to_index);
    const int64_t plane = int64_t(from.h) * from.w;
    const int pieces = pieces_for(rows, run.threads, 16);
    parallel_for(pieces, run.threads, [&](int piece, int) {
      for (int row = cut(rows, pieces, piece); row < cut(rows, pieces, piece + 1); ++row) {
        const int n = row / from.h, p = row % from.h;
        if (reading && from.c == 3 && to.pixel == 3) {
          const float* image = from.data + int64_t(n) * 3 * plane + int64_t(p) * from.w;
          kernels().weave_planes(image, image + plane, image + 2 * plane, to.data + n * to.image + p * to.row, from.w);
          continue;
        }
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
  }, to_index});
}

void Plan::add_constant(const df_node& node, int index) {
  const Tensor& out = write(node.y, index);
  const int to_index = node.y;
  const int64_t row_floats = int64_t(out.shape.w) * out.shape.c, count = row_floats * out.shape.h;
  const float* values = vector_at(node.weight, count, count);
  if (!values) refuse("a constant has no values");
  steps_.push_back({[=](Run& run) {
    const View to = run.view(to_index);
    for (int n = 0; n < to.n; ++n)
      for (int p = 0; p < to.h; ++p)
        std::memcpy(to.data + n * to.image + p * to.row, values + p * row_floats, sizeof(float) * row_floats);
  }, to_index});
}

}  // namespace depthfuse

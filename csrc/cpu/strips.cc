// An inverted residual in strips: a few rows are expanded, filtered and projected before the next ones, so that the
// expanded tensor, several times as large as what goes in and comes out, stays in a core's cache. One of both ends may be
// missing, as the projection where a gate of all pixels comes before it. Likewise the two products of an MLP.
#include <cstring>

#include "plan.h"
#include "pool.h"

namespace depthfuse {
namespace {

constexpr int64_t kLeastFloats = 256 << 10;  // of the expanded tensor: what is smaller stays in the cache anyway
constexpr int64_t kStripFloats = 96 << 10;   // of a strip of it
constexpr int kLeastRows = 12;               // of a piece: rows above and below it are expanded twice
constexpr int kLeastPixels = 56;             // of an MLP's strip: a few tiles of accumulators
constexpr int64_t kMostWeights = 128 << 10;  // floats of an MLP: each strip reads all of them

bool is_pointwise(const df_node& node) {
  const int32_t* p = node.p;
  return node.op == DF_CONV && (node.algorithm == DF_DIRECT || is_by_tiles(node.algorithm)) && p[0] == 1 && p[1] == 1 && p[2] == 1 && p[3] == 1 &&
         p[4] == 0 && p[5] == 0 && p[8] == 1;
}

// Rows [first, last) of image n.
View rows_of(const View& v, int n, int first, int last) {
  View part = v;
  part.data += n * v.image + first * v.row;
  part.n = 1, part.h = last - first;
  return part;
}

// A row of zeros, or the `columns` pixels at both of its ends.
void zero_row(float* row, const View& v, int columns, bool whole) {
  const int64_t width = (v.w + 2 * columns) * v.pixel;
  if (whole) {
    std::memset(row, 0, sizeof(float) * width);
    return;
  }
  std::memset(row, 0, sizeof(float) * columns * v.pixel);
  std::memset(row + width - columns * v.pixel, 0, sizeof(float) * columns * v.pixel);
}

struct Strips {
  bool expands, projects;
  Conv expand;
  Depthwise depthwise;
  Conv project;
  View middle;  // the expanded tensor's size and strides, as if it were there
  int strip;    // output rows

  int rows_under(int rows) const {
    const Window& w = depthwise.task.window;
    return (rows - 1) * w.stride_h + w.dilation_h * (w.kernel_h - 1) + 1;
  }

  void run(const View& x, const View& y, const View& residual, int first, int last) const;
  void run_image(const View& x, const View& y, const View& residual, int n, int first, int last) const;
};

// Output rows [first, last) of all images' rows.
void Strips::run(const View& x, const View& y, const View& residual, int first, int last) const {
  for (int start = first, stop; start < last; start = stop) {
    const int n = start / y.h;
    stop = std::min(last, (n + 1) * y.h);
    run_image(x, y, residual, n, start - n * y.h, stop - n * y.h);
  }
}

void Strips::run_image(const View& x, const View& y, const View& residual, int n, int first, int last) const {
  const Window& w = depthwise.task.window;
  const int columns = expands ? w.padding_w : 0, most_rows = rows_under(strip);
  const int64_t row = (middle.w + 2 * columns) * middle.pixel;
  const int64_t expanded_floats = expands ? most_rows * row : 0;
  View filtered{};  // a strip of the depthwise convolution's output
  filtered.n = 1, filtered.w = y.w, filtered.c = middle.c, filtered.pixel = middle.c;
  filtered.row = int64_t(y.w) * middle.c;
  const View some_of_y = rows_of(y, n, 0, std::min(strip, y.h));
  View some_of_middle = middle;
  some_of_middle.n = 1, some_of_middle.h = std::min(most_rows, middle.h);
  filtered.h = some_of_y.h;
  const int64_t product_floats =
      std::max(expands ? expand.scratch_floats(x, some_of_middle, some_of_middle.h * middle.w) : 0,
               projects ? project.scratch_floats(filtered, some_of_y, filtered.h * y.w) : 0);
  const int64_t filtered_floats = projects ? strip * filtered.row : 0;
  float* for_products = scratch(product_floats + expanded_floats + filtered_floats + 2 * kSlack);
  float* expanded = for_products + product_floats;
  filtered.data = expanded + expanded_floats + kSlack;
  int have = 0, have_until = 0;  // input rows of the strip before, in `expanded` from its start on
  for (int start = first; start < last; start += strip) {
    const int stop = std::min(last, start + strip), under = rows_under(stop - start);
    const int top = start * w.stride_h - w.padding_h, bottom = top + under;
    DepthwiseTask filter = depthwise.task;
    if (expands) {
      int next = top;  // the first row that is not there yet
      if (have < have_until && top < have_until) {
        std::memmove(expanded, expanded + (top - have) * row, sizeof(float) * (have_until - top) * row);
        next = have_until;
      }
      for (int i = next; i < bottom; ++i)
        zero_row(expanded + (i - top) * row, middle, columns, i < 0 || i >= middle.h);
      const int from = std::max(0, next), to = std::min(middle.h, bottom);
      if (from < to) {
        View into = middle;
        into.n = 1, into.h = to - from, into.row = row;
        into.data = expanded + (from - top) * row + columns * middle.pixel;
        expand.compute(rows_of(x, n, from, to), into, View{}, 0, into.h * into.w, 0, expand.panels, for_products);
      }
      have = top, have_until = bottom;
      filter.x = middle;
      filter.x.n = 1, filter.x.h = under, filter.x.row = row;
      filter.x.data = expanded + w.padding_h * row + columns * middle.pixel;
    } else {
      filter.x = x;
      filter.x.data += n * x.image + int64_t(start) * w.stride_h * x.row;
    }
    if (!projects) {
      filter.y = rows_of(y, n, start, stop);
      kernels().depthwise(filter, 0, stop - start);
      continue;
    }
    filtered.h = stop - start;
    filter.y = filtered;
    kernels().depthwise(filter, 0, filtered.h);
    const View added = residual.data ? rows_of(residual, n, start, stop) : View{};
    project.compute(filtered, rows_of(y, n, start, stop), added, 0, filtered.h * filtered.w, 0, project.panels,
                    for_products);
  }
}

// Two products of each pixel, with more channels between them.
struct Pair {
  Conv expand, project;
  View middle;
  int strip;  // rows

  void run(const View& x, const View& y, const View& residual, int first, int last) const;
};

// Rows [first, last) of all images' rows.
void Pair::run(const View& x, const View& y, const View& residual, int first, int last) const {
  View between = middle;
  between.n = 1, between.h = std::min(strip, middle.h);
  between.pixel = middle.c, between.row = int64_t(middle.w) * middle.c;
  const int most = between.h * between.w;
  const int64_t product_floats = std::max(expand.scratch_floats(rows_of(x, 0, 0, between.h), between, most),
                                          project.scratch_floats(between, rows_of(y, 0, 0, between.h), most));
  float* for_products = scratch(product_floats + between.h * between.row + 2 * kSlack);
  between.data = for_products + product_floats + kSlack;
  for (int start = first, stop; start < last; start = stop) {
    const int n = start / y.h, from = start % y.h;
    stop = std::min({last, start + strip, (n + 1) * y.h});
    const int to = from + stop - start;
    between.h = stop - start;
    const int pixels = between.h * between.w;
    const View added = residual.data ? rows_of(residual, n, from, to) : View{};
    expand.compute(rows_of(x, n, from, to), between, View{}, 0, pixels, 0, expand.panels, for_products);
    project.compute(between, rows_of(y, n, from, to), added, 0, pixels, 0, project.panels, for_products);
  }
}

}  // namespace

bool Plan::only_between(const df_node& from, const df_node& to) const {
  return to.x == from.y && to.x2 != from.y && from.x2 == -1 && tensor(from.y).shape.place == DF_ARENA &&
         readers_[from.y] == 1;
}

int Plan::add_strips(const df_node* nodes, int index, int count) {
  const bool expands = is_pointwise(nodes[index]);
  const int at = index + expands;
  if (at >= count || nodes[at].op != DF_DEPTHWISE) return 0;
  const df_node& depthwise = nodes[at];
  if (depthwise.x2 != -1 || (expands && !only_between(nodes[index], depthwise))) return 0;
  const bool projects = at + 1 < count && is_pointwise(nodes[at + 1]) && only_between(depthwise, nodes[at + 1]);
  const int last = at + projects, x = expands ? nodes[index].x : depthwise.x, y = nodes[last].y;
  if ((!expands && !projects) || x == y) return 0;
  if (tensor(expands ? depthwise.x : depthwise.y).floats() < kLeastFloats) return 0;
  Strips s{expands, projects};
  if (expands) s.expand = conv_of(nodes[index], index);
  s.depthwise = depthwise_of(depthwise, at);
  if (projects) s.project = conv_of(nodes[last], last);
  s.middle = tensor(depthwise.x).view(nullptr);
  const int64_t row = s.middle.w * int64_t(s.middle.c);
  const Window& w = s.depthwise.task.window;
  const int rows = tensor(y).shape.n * tensor(y).shape.h;
  s.strip = 1;
  while (s.strip < rows && s.rows_under(s.strip + 1) * row <= std::max(kStripFloats, 2 * w.kernel_h * row)) ++s.strip;
  if (s.strip < rows) s.strip = std::max(1, s.strip & ~1);  // rows are filtered in pairs
  if (expands) forget(depthwise.x);
  if (projects) forget(depthwise.y);
  for (int i = index; i < last; ++i) steps_.push_back({nullptr, -1});  // all of them run with the last
  const int residual = projects ? s.project.residual : -1;
  last_use_[x] = std::max(last_use_[x], last);
  steps_.push_back({[=](Run& run) {
    const View from = run.view(x), to = run.view(y), added = residual == -1 ? View{} : run.view(residual);
    const int threads = run.threads;
    const int pieces =
        threads == 1 ? 1 : even(std::max(std::min(threads, rows / 2), std::min(4 * threads, rows / kLeastRows)), threads);
    parallel_for(pieces, threads, [&](int piece, int) {
      s.run(from, to, added, cut(rows, pieces, piece), cut(rows, pieces, piece + 1));
    });
  }, y});
  return last - index + 1;
}

int Plan::add_pair(const df_node* nodes, int index, int count) {
  if (index + 1 >= count || !is_pointwise(nodes[index]) || !is_pointwise(nodes[index + 1])) return 0;
  const df_node &expand = nodes[index], &project = nodes[index + 1];
  if (!only_between(expand, project) || expand.x == project.y) return 0;
  const int in = tensor(expand.x).shape.c, out = tensor(project.y).shape.c;
  const Tensor& between = tensor(expand.y);
  const int64_t c = between.shape.c, row = between.shape.w * c;
  const int strip = int(std::max<int64_t>(1, std::min<int64_t>(between.shape.h, kStripFloats / row)));
  const int rows = between.shape.n * between.shape.h;
  if (c < 2 * in || c * (in + out) > kMostWeights || between.floats() < kLeastFloats || rows < 8 * strip ||
      strip * between.shape.w < kLeastPixels)
    return 0;
  const Pair pair{conv_of(expand, index), conv_of(project, index + 1), between.view(nullptr), strip};
  forget(expand.y);
  const int x = expand.x, y = project.y, residual = pair.project.residual;
  last_use_[x] = std::max(last_use_[x], index + 1);
  steps_.push_back({nullptr, -1});  // it runs with the next one
  steps_.push_back({[=](Run& run) {
    const View from = run.view(x), to = run.view(y), added = residual == -1 ? View{} : run.view(residual);
    const int pieces = even(std::min(4 * run.threads, rows / strip), run.threads);
    parallel_for(pieces, run.threads, [&](int piece, int) {
      pair.run(from, to, added, cut(rows, pieces, piece), cut(rows, pieces, piece + 1));
    });
  }, y});
  return 2;
}

}  // namespace depthfuse

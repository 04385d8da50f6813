// A plan in memory: what plan.cc lays out and runs, and nodes.cc fills with steps.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"
#include "kernels.h"

namespace depthfuse {

constexpr int kMostSize = 1 << 24;  // of an axis
// Floats that a vector may read past the end of a tensor or of weights, and that must be there.
constexpr int64_t kSlack = 64;

[[noreturn]] inline void refuse(const std::string& why) { throw std::invalid_argument(why); }

// Of the widest instruction set that this processor has and DEPTHFUSE_ISA allows.
const Kernels& kernels();

// Memory on cache lines, zero at first. Large ones lie in huge pages where the system has them: a walk through hundreds
// of megabytes of weights would ask for the address of another small page every 4 KB.
class Floats {
 public:
  explicit Floats(int64_t count = 0) : count_(count) {
    if (!count) return;
    size_t bytes = size_t(count) * sizeof(float);
    if (bytes < kHuge) {
      bytes = (bytes + kSmall - 1) / kSmall * kSmall;
      data_ = static_cast<float*>(std::aligned_alloc(kSmall, bytes));
      if (!data_) throw std::bad_alloc();
      std::memset(data_, 0, bytes);
      return;
    }
    bytes = (bytes + kHuge - 1) / kHuge * kHuge;
    mapped_ = bytes + kHuge;  // room to align it
    map_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED) throw std::bad_alloc();
    data_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(map_) + kHuge - 1) / kHuge * kHuge);
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes, MADV_HUGEPAGE);  // it may refuse, and nothing else changes
#endif
  }
  ~Floats() {
    if (mapped_)
      munmap(map_, mapped_);
    else
      std::free(data_);
  }
  Floats(Floats&& other) noexcept { *this = std::move(other); }
  Floats& operator=(Floats&& other) noexcept {
    std::swap(data_, other.data_), std::swap(count_, other.count_);
    std::swap(map_, other.map_), std::swap(mapped_, other.mapped_);
    return *this;
  }
  float* data() const { return data_; }
  int64_t count() const { return count_; }

 private:
  static constexpr size_t kSmall = 4096, kHuge = 2 << 20;
  float* data_ = nullptr;
  int64_t count_ = 0;
  void* map_ = nullptr;
  size_t mapped_ = 0;
};

struct Tensor {
  df_tensor shape;
  int64_t offset = 0;  // in the arena
  int64_t floats() const {  // with the border
    return int64_t(shape.n) * (shape.h + 2 * shape.border) * (shape.w + 2 * shape.border) * shape.c;
  }
  int64_t pixels() const { return int64_t(shape.n) * shape.h * shape.w; }
  View view(float* base) const {
    View v;
    v.n = shape.n, v.h = shape.h, v.w = shape.w, v.c = shape.c;
    v.pixel = shape.c;
    v.row = int64_t(shape.w + 2 * shape.border) * v.pixel;
    v.image = int64_t(shape.h + 2 * shape.border) * v.row;
    v.data = base + shape.border * (v.row + v.pixel);
    return v;
  }
};

class Plan;

// What one run of a plan needs at hand.
struct Run {
  Plan& plan;
  const float* const* inputs;
  float* const* outputs;
  int threads;

  View view(int index) const;
};

// Scratch memory of this thread, of at least `floats`; not initialised. As large as a huge page, it lies in one.
inline float* scratch(int64_t floats) {
  constexpr int64_t kLeast = int64_t(512) << 10;
  static thread_local Floats memory;
  if (memory.count() < floats) memory = Floats(std::max(floats, kLeast));
  return memory.data();
}

// [first, last) of `total`, cut into `pieces` that differ by one at most.
inline int cut(int total, int pieces, int piece) { return int(int64_t(total) * piece / pieces); }

// As many pieces or fewer, the same number for each thread: with 7 pieces one of two threads would wait a seventh.
inline int even(int pieces, int threads) {
  return pieces > threads ? pieces / threads * threads : std::max(1, pieces);
}

// As many pieces as keep all threads busy to the end, of `least` units at least.
inline int pieces_for(int64_t units, int threads, int64_t least) {
  return even(int(std::min<int64_t>(4 * threads, units / std::max<int64_t>(1, least))), threads);
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.shape.n == b.shape.n && a.shape.h == b.shape.h && a.shape.w == b.shape.w && a.shape.c == b.shape.c;
}

inline bool is_by_tiles(int algorithm) { return algorithm == DF_TILES || algorithm == DF_TILES_BF16; }

// A node, checked and packed: tensors by their index, -1 for no residual; x and y of the task come with a run.
struct Conv {
  int x, y, residual;
  ConvTask task{};
  std::vector<int64_t> segments{};
  int panels = 0;  // of a section
  // Groups are computed in sections of one or, where they have less channels than a vector, several of them, with zeros
  // for what they do not read of each other. The last section starts earlier, so that it reads no other pixel's channels,
  // and writes less.
  int sections = 1, in = 0, out = 0;  // channels that a section reads and writes
  const float* raw = nullptr;  // weights as they were given, while the plan is made
  const uint16_t* tiles = nullptr;  // weights for tiles, in the place of the task's
  int parts = 0;                    // of each of them, as TileTask has it

  // The memory that compute() needs, in floats: of `units` as TileKernels counts them; 0 without tiles.
  int64_t scratch_floats(const View& x, const View& y, int units) const;
  // Output pixels of x to y, all sections being one: [first, last) of pointwise convolutions' pixels, or rows by tiles.
  void compute(const View& x, const View& y, const View& residual, int first, int last, int first_panel, int last_panel,
               float* memory) const;
  TileTask tile_task(const View& x, const View& y, const View& residual) const;
};

struct Depthwise {
  int x, y, residual;
  DepthwiseTask task{};
};

struct Step {
  std::function<void(Run&)> run;  // none: it runs with the next step that has one
  int output;  // tensor, whose border is zeroed first
};

// A plan: checked, its memory laid out, its weights packed; runs in one call.
class Plan {
 public:
  // Throws std::invalid_argument, with the reason, for a plan that would read or write where it must not.
  Plan(const df_tensor* tensors, int tensor_count, const df_node* nodes, int node_count, const float* weights,
       int64_t weight_count);
  void run(const float* const* inputs, float* const* outputs, int threads, double* milliseconds);
  int64_t bytes() const;

 private:
  friend struct Run;

  // plan.cc: what nodes may touch, and where it lies.
  void add_tensor(const df_tensor& t);
  const Tensor& tensor(int index) const;
  const Tensor& read(int index, int node);
  const Tensor& write(int index, int node);
  const float* floats_at(int64_t offset, int64_t count) const;
  float* packed(int64_t count);
  // A copy of `count` floats, zeros up to `padded`; nullptr where offset is -1.
  const float* vector_at(int64_t offset, int64_t count, int64_t padded);
  void lay_out();

  // nodes.cc: each operation, checked, as a step.
  void add_node(const df_node& node, int index);
  void add_conv(const df_node& node, int index);
  void add_tiles(const Conv& conv);
  void add_depthwise(const df_node& node, int index);
  Conv conv_of(const df_node& node, int index);
  Depthwise depthwise_of(const df_node& node, int index);
  void add_pool(const df_node& node, int index);
  void add_elementwise(const df_node& node, int index);
  Window window_of(const df_node& node, const Tensor& x, const Tensor& y, bool rounds_up = false) const;
  Tail tail_of(const df_node& node, int channels);
  // The node's residual, shaped like y; -1 where it has none.
  int residual_of(const df_node& node, const Tensor& y, int index);

  // moves.cc: what computes nothing.
  void add_copy(const df_node& node, int index);
  void add_pad(const df_node& node, int index);
  void add_planes(const df_node& node, int index);
  void add_constant(const df_node& node, int index);

  // strips.cc: expand, depthwise and project, or without one of both ends, as one step, where that pays: how many nodes it is, 0 where it is none.
  int add_strips(const df_node* nodes, int index, int count);
  // strips.cc: likewise the two products of an MLP.
  int add_pair(const df_node* nodes, int index, int count);
  // Whether what `from` writes is read by `to` alone, and by that as its input.
  bool only_between(const df_node& from, const df_node& to) const;
  void forget(int tensor);  // a tensor that needs no memory

  std::vector<Tensor> tensors_;
  std::vector<int> first_use_, last_use_;  // nodes
  std::vector<int> readers_;               // how many nodes read each tensor
  std::vector<Step> steps_;
  std::vector<Floats> packed_;
  int64_t room_ = 0, packed_floats_ = 0;  // room: in the last of `packed_`
  Floats arena_;
  std::mutex mutex_;
  const float* weights_;  // while the plan is made
  int64_t weight_count_;
};

}  // namespace depthfuse

// A plan is checked and its memory laid out once, then run in one call.
#include "plan.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>

#include "pool.h"

namespace depthfuse {
namespace {

constexpr int64_t kMostFloats = int64_t(1) << 33;  // of a tensor, 32 GiB
constexpr int64_t kAlign = 16;                      // floats: a cache line
// Weights lie side by side in large pieces of memory, of which only what is written to is there: in huge pages, which
// each layer alone might be too small for. An address sanitizer is to see where each ends.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kPiece = 0;
#else
constexpr int64_t kPiece = int64_t(8) << 20;  // floats
#endif

void zero_border(const Tensor& t, float* base) {
  const int b = t.shape.border;
  if (!b) return;
  const int64_t width = t.shape.w + 2 * b, height = t.shape.h + 2 * b, c = t.shape.c;
  for (int n = 0; n < t.shape.n; ++n) {
    float* image = base + n * height * width * c;
    std::memset(image, 0, sizeof(float) * b * width * c);
    std::memset(image + (height - b) * width * c, 0, sizeof(float) * b * width * c);
    for (int64_t row = b; row < height - b; ++row) {
      std::memset(image + row * width * c, 0, sizeof(float) * b * c);
      std::memset(image + ((row + 1) * width - b) * c, 0, sizeof(float) * b * c);
    }
  }
}

#if defined(__x86_64__)
// AVX512-BF16
bool multiplies_bfloat16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
}

// Whether this processor multiplies tiles of bfloat16, and the system lets this process have their registers.
bool may_use_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, products = d >> 22 & 1;
  if (!tiles || !products || !multiplies_bfloat16()) return false;
#if defined(__linux__)
  constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: of the process, once
  return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = [&]() -> const Kernels& {
    const char* asked = std::getenv("DEPTHFUSE_ISA");
    const std::string limit = asked ? asked : "";
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    const bool narrower = limit == "avx2" || limit == "baseline";
    if (avx512 && !narrower && limit != "avx512" && limit != "avx512_bf16" && kTiles && may_use_tiles()) {
      static Kernels with_tiles = kAvx512;
      with_tiles.name = "amx", with_tiles.tiles = kTiles;
      return with_tiles;
    }
    if (avx512 && !narrower && limit != "avx512" && kPairs && multiplies_bfloat16()) {
      static Kernels with_pairs = kAvx512;
      with_pairs.name = "avx512_bf16", with_pairs.tiles = kPairs;
      return with_pairs;
    }
    if (avx512 && !narrower) return kAvx512;
    if (avx2 && limit != "baseline") return kAvx2;
#endif
    return kBaseline;
  }();
  return chosen;
}

View Run::view(int index) const {
  const Tensor& t = plan.tensors_[index];
  switch (t.shape.place) {
    case DF_INPUT: return t.view(const_cast<float*>(inputs[t.shape.index]));
    case DF_OUTPUT: return t.view(outputs[t.shape.index]);
    default: return t.view(plan.arena_.data() + t.offset);
  }
}

Plan::Plan(const df_tensor* tensors, int tensor_count, const df_node* nodes, int node_count, const float* weights,
           int64_t weight_count)
    : weights_(weights), weight_count_(weight_count) {
  if (tensor_count < 1 || node_count < 1 || weight_count < 0) refuse("no tensors or no nodes");
  for (int i = 0; i < tensor_count; ++i) add_tensor(tensors[i]);
  last_use_.assign(tensors_.size(), -1), first_use_.assign(tensors_.size(), INT_MAX);
  readers_.assign(tensors_.size(), 0);
  for (int i = 0; i < node_count; ++i)
    for (int read : {nodes[i].x, nodes[i].x2})
      if (read >= 0 && read < tensor_count) ++readers_[read];
  for (int i = 0; i < node_count;) {
    int fused = add_strips(nodes, i, node_count);
    if (!fused) fused = add_pair(nodes, i, node_count);
    if (!fused) add_node(nodes[i], i);
    i += std::max(1, fused);
  }
  lay_out();
  weights_ = nullptr;
}

int64_t Plan::bytes() const {
  return (arena_.count() + packed_floats_) * int64_t(sizeof(float));
}

void Plan::add_tensor(const df_tensor& t) {
  for (int32_t size : {t.n, t.h, t.w, t.c})
    if (size < 1 || size > kMostSize) refuse("a tensor's size is " + std::to_string(size));
  if (t.border < 0 || t.border > 1024) refuse("a border is " + std::to_string(t.border));
  if (t.place < DF_ARENA || t.place > DF_OUTPUT) refuse("a tensor's place is " + std::to_string(t.place));
  if (t.place != DF_ARENA) {  // each has a pointer of its own at every run
    const auto before = std::count_if(tensors_.begin(), tensors_.end(),
                                      [&](const Tensor& other) { return other.shape.place == t.place; });
    if (t.border || t.index != before) refuse("inputs and outputs are not numbered in order, or have a border");
  }
  double floats = double(t.n) * (t.h + 2.0 * t.border) * (t.w + 2.0 * t.border) * t.c;
  if (floats > double(kMostFloats)) refuse("a tensor is too large");
  tensors_.push_back(Tensor{t});
}

const Tensor& Plan::tensor(int index) const {
  if (index < 0 || index >= int(tensors_.size())) refuse("a node's tensor is " + std::to_string(index));
  return tensors_[index];
}

const Tensor& Plan::read(int index, int node) {
  const Tensor& t = tensor(index);
  if (t.shape.place == DF_OUTPUT) refuse("a node reads an output");
  if (t.shape.place == DF_ARENA && first_use_[index] >= node) refuse("a node reads what no node has written");
  last_use_[index] = node;
  return t;
}

const Tensor& Plan::write(int index, int node) {
  const Tensor& t = tensor(index);
  if (t.shape.place == DF_INPUT) refuse("a node writes to an input");
  first_use_[index] = std::min(first_use_[index], node);
  last_use_[index] = std::max(last_use_[index], node);
  return t;
}

void Plan::forget(int index) { last_use_[index] = -1; }

const float* Plan::floats_at(int64_t offset, int64_t count) const {
  if (offset < 0 || count < 0 || offset > weight_count_ || count > weight_count_ - offset)
    refuse("weights lie outside the buffer");
  return weights_ + offset;
}

float* Plan::packed(int64_t count) {
  count = (count + kSlack + kAlign - 1) / kAlign * kAlign;
  if (room_ < count) {
    room_ = std::max(count, kPiece);
    packed_.emplace_back(room_);
  }
  float* start = packed_.back().data() + (packed_.back().count() - room_);
  room_ -= count, packed_floats_ += count;
  return start;
}

const float* Plan::vector_at(int64_t offset, int64_t count, int64_t padded) {
  if (offset == -1) return nullptr;
  const float* from = floats_at(offset, count);
  float* copy = packed(padded);
  std::copy(from, from + count, copy);
  return copy;
}

// Each tensor gets memory from its first to its last use, the largest first, at the lowest place that is free then.
void Plan::lay_out() {
  struct Placed {
    int64_t start, end;
    int first, last;
  };
  std::vector<int> order;
  for (int i = 0; i < int(tensors_.size()); ++i)
    if (tensors_[i].shape.place == DF_ARENA && last_use_[i] >= 0) order.push_back(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return tensors_[a].floats() > tensors_[b].floats(); });
  std::vector<Placed> placed;
  int64_t total = 0;
  for (int i : order) {
    const int64_t size = (tensors_[i].floats() + kSlack + kAlign - 1) / kAlign * kAlign;
    std::vector<Placed> busy;
    for (const Placed& other : placed)
      if (other.first <= last_use_[i] && first_use_[i] <= other.last) busy.push_back(other);
    std::sort(busy.begin(), busy.end(), [](const Placed& a, const Placed& b) { return a.start < b.start; });
    int64_t start = 0;
    for (const Placed& other : busy) {
      if (other.start - start >= size) break;
      start = std::max(start, other.end);
    }
    tensors_[i].offset = start;
    placed.push_back({start, start + size, first_use_[i], last_use_[i]});
    total = std::max(total, start + size);
  }
  if (total > kMostFloats) refuse("the plan needs too much memory");
  arena_ = Floats(total);
}

void Plan::run(const float* const* inputs, float* const* outputs, int threads, double* milliseconds) {
  std::lock_guard<std::mutex> lock(mutex_);
  Run run{*this, inputs, outputs, std::max(1, std::min(threads, most_threads()))};
  for (const Step& step : steps_) {
    const auto start = std::chrono::steady_clock::now();
    if (step.output >= 0 && tensors_[step.output].shape.place == DF_ARENA)
      zero_border(tensors_[step.output], arena_.data() + tensors_[step.output].offset);
    if (step.run) step.run(run);
    if (milliseconds) {
      const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
      *milliseconds++ = step.run ? std::max(took.count(), 1e-6) : 0.0;
    }
  }
}

}  // namespace depthfuse

extern "C" {

int32_t df_abi_version() { return kAbiVersion; }

const char* df_isa() { return depthfuse::kernels().name; }

void* df_plan_create(const df_tensor* tensors, int32_t tensor_count, const df_node* nodes, int32_t node_count,
                     const float* weights, int64_t weight_count, char* error, int64_t error_size) {
  try {
    return new depthfuse::Plan(tensors, tensor_count, nodes, node_count, weights, weight_count);
  } catch (const std::exception& problem) {
    if (error && error_size > 0) std::snprintf(error, size_t(error_size), "%s", problem.what());
    return nullptr;
  }
}

void df_plan_run(void* plan, const float* const* inputs, float* const* outputs, int32_t threads,
                 double* milliseconds) {
  static_cast<depthfuse::Plan*>(plan)->run(inputs, outputs, threads, milliseconds);
}

int32_t df_all_within(const float* values, int64_t count, float limit) {
  return depthfuse::kernels().all_within(values, count, limit);
}

void df_widen(const uint16_t* values, int64_t count, int32_t half, float* wide) {
  depthfuse::kernels().widen(values, count, half != 0, wide);
}

void df_narrow(const float* values, int64_t count, int32_t half, uint16_t* narrowed) {
  depthfuse::kernels().narrow(values, count, half != 0, narrowed);
}

int64_t df_plan_bytes(const void* plan) { return static_cast<const depthfuse::Plan*>(plan)->bytes(); }

void df_plan_destroy(void* plan) { delete static_cast<depthfuse::Plan*>(plan); }
}

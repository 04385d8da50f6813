// Finds missing barriers where there is no GPU: two threads of a block that touch one byte of shared memory between two
// barriers, one of them writing. A wave counts as one thread here, so what races within a wave is not seen.
#pragma once
#include <stdint.h>

#include <vector>

namespace depthfuse {

class Races {
 public:
  int thread = 0, epoch = 0;  // who runs, and the barriers that it has passed
  bool found = false;

  void start(const void* shared, int bytes) {
    base_ = static_cast<const char*>(shared);
    written_.assign(bytes, Touch{});
    read_.assign(bytes, Touch{});
    epoch = 0;
  }
  void read(const void* from, int bytes) {
    for (int64_t i = offset(from), end = i + bytes; i < end; ++i) {
      found |= written_[i].by_another(thread, epoch);
      read_[i].add(thread, epoch);
    }
  }
  void write(const void* to, int bytes) {
    for (int64_t i = offset(to), end = i + bytes; i < end; ++i) {
      found |= written_[i].by_another(thread, epoch) || read_[i].by_another(thread, epoch);
      written_[i].add(thread, epoch);
    }
  }

 private:
  struct Touch {
    int epoch = -1;
    unsigned threads = 0;  // bit by bit
    bool by_another(int thread, int now) const { return epoch == now && (threads & ~(1u << thread)); }
    void add(int thread, int now) {
      threads = (epoch == now ? threads : 0) | 1u << thread;
      epoch = now;
    }
  };
  int64_t offset(const void* at) const { return static_cast<const char*>(at) - base_; }

  const char* base_ = nullptr;
  std::vector<Touch> written_, read_;
};

inline thread_local Races races;

}  // namespace depthfuse

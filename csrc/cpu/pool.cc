#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace depthfuse {
namespace {

constexpr int kMostThreads = 256;
constexpr auto kSpin = std::chrono::microseconds(200);

// The pieces of one lane that nobody has taken: on a cache line of its own.
struct alignas(64) Share {
  std::atomic<int> next{0};
  int end = 0;
};

// Each lane has a share of the pieces, the same part of each job: so a core reads what it wrote in the job before, and not
// out of another core's cache, which takes longer than to compute it again. Who is done takes from others' shares.
struct Job {
  Job(const std::function<void(int, int)>& work, int pieces, int lanes)
      : work(work), pieces(pieces), lanes(lanes), shares(lanes), taken(lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      shares[lane].next = int(int64_t(pieces) * lane / lanes);
      shares[lane].end = int(int64_t(pieces) * (lane + 1) / lanes);
    }
    taken[0] = true;
  }
  bool has_pieces() const {
    return std::any_of(shares.begin(), shares.end(),
                       [](const Share& share) { return share.next.load(std::memory_order_relaxed) < share.end; });
  }

  const std::function<void(int, int)>& work;
  const int pieces, lanes;
  std::vector<Share> shares;
  std::vector<char> taken;  // lanes, guarded by the pool's mutex
  std::atomic<int> done{0};
  std::atomic<int> users{0};  // workers that hold a pointer to it
};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void take_pieces(Job& job, int lane) {
  for (int i = 0; i < job.lanes; ++i) {
    Share& share = job.shares[(lane + i) % job.lanes];
    for (int piece; (piece = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
      job.work(piece, lane);
      job.done.fetch_add(1, std::memory_order_release);
    }
  }
}

class Pool {
 public:
  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < job.lanes - 1 && workers_ < kMostThreads) {
        const int number = ++workers_;
        std::thread([this, number] { serve(number); }).detach();
      }
      jobs_.push_back(&job);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    take_pieces(job, 0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    }
    wait(job);
  }

 private:
  // The pieces that others have taken are being worked on; the job is theirs until they have let go of it.
  void wait(Job& job) {
    const auto start = std::chrono::steady_clock::now();
    auto finished = [&] {
      return job.done.load(std::memory_order_acquire) == job.pieces && job.users.load(std::memory_order_acquire) == 0;
    };
    for (int i = 0; !finished(); ++i) {
      pause();
      // Who is being waited for may need this core.
      if (i % 64 == 63 && std::chrono::steady_clock::now() - start > std::chrono::microseconds(10))
        std::this_thread::yield();
    }
  }

  // A job with pieces left and a lane to work in, that of the worker's number if it is free, held by `users`; null where
  // there is none.
  Job* find(int number, int& lane) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Job* job : jobs_) {
      if (!job->has_pieces()) continue;
      lane = number < job->lanes && !job->taken[number]
                 ? number
                 : int(std::find(job->taken.begin(), job->taken.end(), false) - job->taken.begin());
      if (lane == job->lanes) continue;
      job->taken[lane] = true;
      job->users.fetch_add(1, std::memory_order_relaxed);
      return job;
    }
    return nullptr;
  }

  void serve(int number) {
    unsigned seen = generation_.load(std::memory_order_acquire);
    for (bool first = true;; first = false) {
      if (!first) await_change(seen);
      seen = generation_.load(std::memory_order_acquire);
      int lane;
      while (Job* job = find(number, lane)) {
        take_pieces(*job, lane);
        job->users.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  void await_change(unsigned seen) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; generation_.load(std::memory_order_acquire) == seen; ++i) {
      pause();
      if (i % 64 != 63 || std::chrono::steady_clock::now() - start < kSpin) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1, std::memory_order_acq_rel);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      sleepers_.fetch_sub(1, std::memory_order_acq_rel);
      return;
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Job*> jobs_;
  int workers_ = 0;
  std::atomic<unsigned> generation_{0};
  std::atomic<int> sleepers_{0};
};

// A fork takes no threads along: the child gets a pool of its own, and the parent's, whose locks may be held for ever,
// is left alone. Never destroyed: its threads outlive everything.
Pool& pool() {
  static std::mutex mutex;
  static std::atomic<Pool*> current{nullptr};
  static std::atomic<pid_t> owner{0};
  if (owner.load(std::memory_order_acquire) != getpid()) {
    std::lock_guard<std::mutex> lock(mutex);
    if (owner.load(std::memory_order_acquire) != getpid()) {
      current.store(new Pool, std::memory_order_release);
      owner.store(getpid(), std::memory_order_release);
    }
  }
  return *current.load(std::memory_order_acquire);
}

}  // namespace

int most_threads() { return kMostThreads; }

void parallel_for(int pieces, int threads, const std::function<void(int, int)>& work) {
  const int lanes = std::max(1, std::min({threads, pieces, kMostThreads}));
  if (lanes == 1) {
    for (int piece = 0; piece < pieces; ++piece) work(piece, 0);
    return;
  }
  Job job(work, pieces, lanes);
  pool().run(job);
}

}  // namespace depthfuse

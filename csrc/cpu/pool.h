// Threads that share out pieces of work. The caller works, too; who has nothing to do spins for a moment, then sleeps.
//
// OpenMP's and oneDNN's threads spin at barriers, and where another program wants the cores, all wait for the one that
// was preempted. Here pieces are taken one by one by whoever is free, and a worker that is asleep is not waited for.
#pragma once
#include <functional>

namespace depthfuse {

// Calls work(piece, lane) for every piece in [0, pieces), on at most `threads` threads, and returns when all are done.
// lane < threads names the thread, for scratch memory. Several threads may call at once.
void parallel_for(int pieces, int threads, const std::function<void(int piece, int lane)>& work);

// As many threads as it makes sense to ask for.
int most_threads();

}  // namespace depthfuse

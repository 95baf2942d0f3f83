// Runs a kernel on the host: every CUDA thread is a fiber, one runs at a time, and control changes hands where threads
// wait for one another. Between two such places the warps of a block run in a shuffled order, and the threads of a warp
// too, so that a result that depends on the order shows.
//
// The order follows from the environment variable CUDA_ON_CPU_SEED (default 0) and the number of the launch. Others:
// CUDA_ON_CPU_REPORT, a file that is to list the launches (report.h), and CUDA_ON_CPU_SHARED, the bytes of shared
// memory of a multiprocessor, for a card with less of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "dimensions.h"

namespace cuda_on_cpu {

struct Launch {
  const void* kernel;
  dim3 grid;
  dim3 block;
  unsigned cluster = 1;  // blocks along x
  size_t dynamic_shared = 0;
  bool dependent = false;  // it may begin before the launch ahead of it has ended
};

// `thread` is what one CUDA thread does. Throws std::runtime_error, naming kernel, block and places, where the threads
// of a block or the blocks of a cluster do not meet at the same barrier.
void run(const Launch& launch, const std::function<void()>& thread);

// --- what a CUDA thread may ask for
// -------------------------------------------------------------------------------------

// A place in the source.
struct Site {
  const char* file;
  int line;
};

// How many threads of the block said `vote`.
int wait_for_block(Site site, bool vote = false);
void wait_for_cluster(Site site);

// What the lanes in `mask` hand one another once all of them are there. Each takes what lane `from` gives, all bits set
// where that is no lane in `mask`; or, from kFromAll, the lowest bit of every lane.
struct Exchange {
  const char* op;
  uint32_t mask;
  int from;
  uint64_t give;
};
constexpr int kFromAll = -1000;
uint64_t exchange(const Exchange& exchange, Site site);
int lane();

// Copies into shared memory, performed group by group: wait_for_copies(n) performs all but the last n groups.
struct Copy {
  void* to;
  const void* from;
  size_t size;
  size_t zeros;  // how many of them, at the end, are written as zero and not read
};
void copy_later(const Copy& copy, Site site);
void commit_copies();
void wait_for_copies(size_t groups);

// For the launch ahead, where this one is dependent.
void wait_for_launch();

void require_aligned(const void* address, size_t bytes, const char* op, Site site);

unsigned cluster_blocks();
unsigned cluster_rank();
// The same shared variable, of another block of the cluster.
void* map_shared(const void* variable, unsigned rank);

}  // namespace cuda_on_cpu

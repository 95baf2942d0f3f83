#include "machine.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fiber.h"
#include "kernel_facts.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr unsigned kWarp = 32;

enum class State { kReady, kInWarp, kAtBarrier, kAtClusterBarrier, kEnded };

struct Thread {
  uint3 index{};
  int lane = 0;
  State state = State::kReady;
  Site site{};          // where it waits
  Exchange exchange{};  // what it waits for, kInWarp
  uint64_t taken = 0;   // and what came of it
  struct Pending {
    Copy copy;
    size_t group;
  };
  std::vector<Pending> copies;  // asked for and not yet performed, the oldest first
  size_t groups = 0;            // of copies, committed
  bool met_launch = false;      // has waited for the launch ahead
  Fiber* fiber = nullptr;
};

struct Block {
  uint3 index{};
  unsigned rank = 0;              // in the cluster
  std::vector<Thread> threads;    // by number; a warp is 32 in a row
  std::vector<std::byte> shared;  // while another block of the cluster runs
  bool ended = false;
};

// A small generator of random numbers (splitmix64).
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  template <typename T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) {
      std::swap(items[i - 1], items[static_cast<size_t>(((next() >> 32) * i) >> 32)]);
    }
  }
};

std::vector<size_t> numbers(size_t count) {
  std::vector<size_t> items(count);
  std::iota(items.begin(), items.end(), size_t{0});
  return items;
}

std::string text_of(const Site& site) {
  const std::string_view path = site.file;
  std::ostringstream text;
  text << path.substr(path.find_last_of('/') + 1) << ":" << site.line;
  return text.str();
}

std::string text_of(const uint3& index) {
  std::ostringstream text;
  text << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return text.str();
}

bool same(const Site& a, const Site& b) { return a.line == b.line && std::string_view(a.file) == b.file; }

std::string whereabouts(const Thread& thread) {
  switch (thread.state) {
    case State::kReady:
      return "can go on";
    case State::kInWarp: {
      std::ostringstream text;
      text << "wait at " << text_of(thread.site) << " (" << thread.exchange.op << ", mask " << std::hex << std::showbase
           << thread.exchange.mask << ")";
      return text.str();
    }
    case State::kAtBarrier:
      return "wait at " + text_of(thread.site) + " (__syncthreads)";
    case State::kAtClusterBarrier:
      return "wait at " + text_of(thread.site) + " (cluster barrier)";
    case State::kEnded:
      break;
  }
  return "have ended";
}

// "480 wait at cg.cu:12 (__syncthreads), the first of them (0, 0, 0) of block (3, 0, 0); 32 have ended, …"
std::string whereabouts(std::span<const Block> blocks) {
  std::map<std::string, std::pair<int, std::string>> groups;
  for (const Block& block : blocks) {
    for (const Thread& thread : block.threads) {
      auto& [count, first] = groups[whereabouts(thread)];
      if (count++ == 0) first = text_of(thread.index) + " of block " + text_of(block.index);
    }
  }
  std::string text;
  for (const auto& [place, group] : groups) {
    text +=
        (text.empty() ? "" : "; ") + std::to_string(group.first) + " " + place + ", the first of them " + group.second;
  }
  return text;
}

class Machine {
 public:
  void run(const Launch& launch, const std::function<void()>& work) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    launch_ = &launch;
    work_ = &work;
    const char* const seed = std::getenv("CUDA_ON_CPU_SEED");
    seed_ = seed != nullptr ? std::strtoull(seed, nullptr, 10) : 0;
    random_.state = seed_ * 0x2545f4914f6cdd1du + ++launches_;
    blockDim = launch.block;
    gridDim = launch.grid;
    warps_ = numbers((threads() + kWarp - 1) / kWarp);
    SharedMemory shared(launch.dynamic_shared);
    shared_ = &shared;
    cluster_.resize(launch.cluster);
    try {
      const size_t along_x = launch.grid.x / launch.cluster;
      auto clusters = numbers(along_x * launch.grid.y * launch.grid.z);
      random_.shuffle(clusters);
      for (const size_t i : clusters) {
        const auto row = static_cast<unsigned>(i / along_x);
        run_cluster({static_cast<unsigned>(i % along_x) * launch.cluster, row % launch.grid.y, row / launch.grid.y});
      }
    } catch (...) {  // the threads that wait never go on: their fibers are lost
      complaint_.clear();
      for (Block& block : cluster_) {
        for (Thread& thread : block.threads) {
          std::erase_if(fibers_, [&](const auto& fiber) { return fiber.get() == thread.fiber; });
          thread.fiber = nullptr;
        }
      }
      throw;
    }
  }

  // --- called by the thread that runs
  // -----------------------------------------------------------------------------------

  void wait(State state, Site site) {
    Thread& here = *thread_;
    here.state = state;
    here.site = site;
    go_on(*here.fiber);
  }

  uint64_t exchange(const Exchange& exchange, Site site) {
    thread_->exchange = exchange;
    wait(State::kInWarp, site);
    return thread_->taken;
  }

  int wait_for_block(Site site, bool vote) {
    thread_->exchange.give = vote ? 1 : 0;
    wait(State::kAtBarrier, site);
    return static_cast<int>(thread_->taken);
  }

  // A thread that reads the destination too early finds it spoilt, and one that writes the source too early spoils it.
  void copy_later(const Copy& copy, Site site) {
    const auto& [to, from, size, zeros] = copy;
    const char* const op = "__pipeline_memcpy_async";
    if (size != 4 && size != 8 && size != 16) refuse(std::string(op) + " of " + std::to_string(size) + " bytes", site);
    if (zeros > size) refuse(std::string(op) + " with more zeros than bytes", site);
    require_aligned(to, size, op, site);
    require_aligned(from, size, op, site);
    if (!shared_->holds(to)) refuse(std::string(op) + " to what is not shared memory", site);
    if (zeros < size && shared_->holds(from)) refuse(std::string(op) + " from shared memory", site);
    std::memset(to, SharedMemory::kSpoilt, size);
    thread_->copies.push_back({copy, thread_->groups});
  }

  void commit_copies() { ++thread_->groups; }

  void wait_for_copies(size_t groups) {
    std::vector<Thread::Pending>& copies = thread_->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group + groups < thread_->groups; ++done) {
      const auto& [to, from, size, zeros] = copies[done].copy;
      std::memcpy(to, from, size - zeros);
      std::memset(static_cast<std::byte*>(to) + size - zeros, 0, zeros);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
  }

  void wait_for_launch() { thread_->met_launch = true; }

  void require_aligned(const void* address, size_t bytes, const char* op, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
    refuse(std::string(op) + " of " + std::to_string(bytes) + " bytes at an address that is no multiple of it", site);
  }

  int lane() const { return thread_->lane; }
  const Block& block() const { return *block_; }
  unsigned cluster_blocks() const { return launch_->cluster; }

  void* map_shared(const void* variable, unsigned rank) {
    if (rank >= cluster_.size()) refuse("map_shared_rank: no block of rank " + std::to_string(rank));
    Block& owner = cluster_[rank];
    if (owner.ended) refuse("map_shared_rank: the block of rank " + std::to_string(rank) + " has ended");
    if (&owner == block_) return const_cast<void*>(variable);
    void* const place = shared_->in(owner.shared, variable);
    if (place == nullptr) refuse("map_shared_rank: not in shared memory");
    return place;
  }

 private:
  size_t threads() const { return size_t{launch_->block.x} * launch_->block.y * launch_->block.z; }

  // What every fiber does: one CUDA thread after another, each to its end.
  [[noreturn]] static void work_through();
  void end(Fiber*& fiber) {
    if (!thread_->copies.empty()) refuse("ends with asynchronous copies that it has not waited for");
    if (launch_->dependent && !thread_->met_launch) {
      refuse("ends without cudaGridDependencySynchronize(), in a dependent launch");
    }
    thread_->state = State::kEnded;
    idle_.push_back(fiber);
    go_on(*std::exchange(fiber, nullptr));
  }

  // Leaves the fiber that runs for the next lane of the warp that can go on, or for the machine.
  void go_on(Fiber& here) {
    if (!next_lane()) {
      cuda_on_cpu_switch(&here.context, outside_);
    } else if (thread_->fiber != &here) {
      cuda_on_cpu_switch(&here.context, thread_->fiber->context);
    }
  }

  // The next lane's turn, where there is one that can go on. The lanes come in an order that an odd step makes: it
  // visits each of 32 once, wherever it starts.
  bool next_lane() {
    while (turn_ < kWarp) {
      const unsigned lane = (first_lane_ + turn_++ * step_) % kWarp;
      if (lane >= lanes_ || warp_[lane].state != State::kReady) continue;
      thread_ = &warp_[lane];
      threadIdx = thread_->index;
      if (thread_->fiber == nullptr) thread_->fiber = idle_fiber();
      return true;
    }
    return false;
  }

  Fiber* idle_fiber() {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(&Machine::work_through));
      return fibers_.back().get();
    }
    Fiber* const fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }

  void refuse(const std::string& complaint, Site site) { refuse(complaint + " (" + text_of(site) + ")"); }

  // What a thread asks for is impossible.
  void refuse(const std::string& complaint) {
    complaint_ = complaint;
    cuda_on_cpu_switch(&thread_->fiber->context, outside_);
  }

  void run_cluster(const uint3& first) {
    const bool alone = launch_->cluster == 1;
    shared_->spoil();
    for (unsigned rank = 0; rank < launch_->cluster; ++rank) {
      start(cluster_[rank], {first.x + rank, first.y, first.z}, rank);
      if (!alone) cluster_[rank].shared = shared_->copy();
    }
    auto order = numbers(launch_->cluster);
    for (;;) {
      random_.shuffle(order);
      for (const size_t rank : order) {
        Block& block = cluster_[rank];
        if (block.ended) continue;
        if (!alone) shared_->restore(block.shared);
        run_block(block);
        if (!alone) block.shared = shared_->copy();
      }
      if (std::ranges::all_of(cluster_, [](const Block& block) { return block.ended; })) return;
      meet(State::kAtClusterBarrier, cluster_);
    }
  }

  void start(Block& block, const uint3& index, unsigned rank) {
    block.index = index;
    block.rank = rank;
    block.ended = false;
    block.threads.resize(threads());
    const dim3& size = launch_->block;
    for (unsigned i = 0; i < block.threads.size(); ++i) {
      Thread& thread = block.threads[i];
      thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
      thread.lane = static_cast<int>(i % kWarp);
      thread.state = State::kReady;
      thread.copies.clear();
      thread.groups = 0;
      thread.met_launch = false;
    }
  }

  // Until all its threads have ended, or wait for the cluster.
  void run_block(Block& block) {
    block_ = &block;
    blockIdx = block.index;
    for (;;) {
      random_.shuffle(warps_);
      for (const size_t warp : warps_) run_warp(block, warp * kWarp);
      const State state = block.threads[0].state;
      const bool alike =
          std::ranges::all_of(block.threads, [&](const Thread& thread) { return thread.state == state; });
      block.ended = alike && state == State::kEnded;
      if (block.ended || (alike && state == State::kAtClusterBarrier)) return;
      meet(State::kAtBarrier, {&block, 1});
    }
  }

  // Until all its threads have ended, or wait for more than the warp.
  void run_warp(Block& block, size_t first) {
    warp_ = &block.threads[first];
    lanes_ = static_cast<unsigned>(std::min<size_t>(kWarp, block.threads.size() - first));
    do {
      const auto random = static_cast<unsigned>(random_.next() >> 32);
      first_lane_ = random % kWarp;
      step_ = random / kWarp | 1;
      turn_ = 0;
      if (next_lane()) cuda_on_cpu_switch(&outside_, thread_->fiber->context);
      if (!complaint_.empty()) {
        fail("thread " + text_of(thread_->index) + " of block " + text_of(block.index) + ": " + complaint_);
      }
    } while (exchange_within(warp_, static_cast<int>(lanes_)));
  }

  // Hands over what lanes exchange that have all arrived or ended. Whether there were any.
  bool exchange_within(Thread* warp, int lanes) {
    bool any = false;
    for (int i = 0; i < lanes; ++i) {
      if (warp[i].state != State::kInWarp) continue;
      const Exchange wanted = warp[i].exchange;
      const auto is_meant = [&](int lane) {
        return lane >= 0 && lane < lanes && (wanted.mask >> lane & 1) != 0 && warp[lane].state != State::kEnded;
      };
      bool complete = is_meant(i);
      uint64_t votes = 0;
      for (int j = 0; j < lanes && complete; ++j) {
        if (!is_meant(j)) continue;
        const Exchange& other = warp[j].exchange;
        complete = warp[j].state == State::kInWarp && other.mask == wanted.mask &&
                   (other.op == wanted.op || std::string_view(other.op) == wanted.op);
        votes |= (other.give & 1) << j;
      }
      if (!complete) continue;
      any = true;
      for (int j = 0; j < lanes; ++j) {
        if (!is_meant(j)) continue;
        const int from = warp[j].exchange.from;
        warp[j].taken = from == kFromAll ? votes : is_meant(from) ? warp[from].exchange.give : ~uint64_t{0};
      }
      for (int j = 0; j < lanes; ++j) {
        if (is_meant(j)) warp[j].state = State::kReady;
      }
    }
    return any;
  }

  // All these threads must wait at the same place; they go on.
  void meet(State state, std::span<Block> blocks) {
    const Site& site = blocks[0].threads[0].site;
    uint64_t votes = 0;
    for (const Block& block : blocks) {
      for (const Thread& thread : block.threads) {
        if (thread.state != state || !same(thread.site, site)) fail("the threads do not meet: " + whereabouts(blocks));
        votes += thread.exchange.give;
      }
    }
    for (Block& block : blocks) {
      for (Thread& thread : block.threads) {
        thread.state = State::kReady;
        thread.taken = votes;
      }
    }
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(facts_of(launch_->kernel).name + ": " + what + " (CUDA_ON_CPU_SEED=" +
                             std::to_string(seed_) + ", launch " + std::to_string(launches_) + ")");
  }

  std::mutex mutex_;
  const Launch* launch_ = nullptr;
  const std::function<void()>* work_ = nullptr;
  uint64_t seed_ = 0;
  uint64_t launches_ = 0;
  Random random_{};
  std::vector<size_t> warps_;  // in the order in which they run
  std::vector<Block> cluster_;
  SharedMemory* shared_ = nullptr;
  Block* block_ = nullptr;  // the one that runs, and so on
  Thread* warp_ = nullptr;
  Thread* thread_ = nullptr;
  unsigned lanes_ = 0, first_lane_ = 0, step_ = 1, turn_ = 0;
  Context outside_ = nullptr;  // the machine's own
  std::string complaint_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

Machine machine;

void Machine::work_through() {
  for (;;) {
    (*machine.work_)();
    machine.end(machine.thread_->fiber);
  }
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& thread) { machine.run(launch, thread); }

int wait_for_block(Site site, bool vote) { return machine.wait_for_block(site, vote); }
void wait_for_cluster(Site site) { machine.wait(State::kAtClusterBarrier, site); }
uint64_t exchange(const Exchange& exchange, Site site) { return machine.exchange(exchange, site); }
int lane() { return machine.lane(); }
void copy_later(const Copy& copy, Site site) { machine.copy_later(copy, site); }
void commit_copies() { machine.commit_copies(); }
void wait_for_copies(size_t groups) { machine.wait_for_copies(groups); }
void wait_for_launch() { machine.wait_for_launch(); }
void require_aligned(const void* address, size_t bytes, const char* op, Site site) {
  machine.require_aligned(address, bytes, op, site);
}
unsigned cluster_blocks() { return machine.cluster_blocks(); }
unsigned cluster_rank() { return machine.block().rank; }
void* map_shared(const void* variable, unsigned rank) { return machine.map_shared(variable, rank); }

}  // namespace cuda_on_cpu

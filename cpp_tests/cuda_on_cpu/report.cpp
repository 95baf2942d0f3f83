#include "report.h"

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <string>

#include "kernel_facts.h"

namespace cuda_on_cpu {
namespace {

std::atomic<uint64_t> launches{0};

class Report {
 public:
  explicit Report(const char* path) : path_(path) {}
  ~Report() {
    std::ofstream file(path_, std::ios::app);
    file << "launches\tkernel\tgrid\tblock\tcluster\tdynamic\tstatic\tblocks_per_multiprocessor\n";
    for (const auto& [shape, count] : counts_) file << count << shape << '\n';
  }

  void add(const std::string& shape) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counts_[shape];
  }

 private:
  std::string path_;
  std::mutex mutex_;
  std::map<std::string, uint64_t> counts_;
};

}  // namespace

void report(const Launch& launch, size_t static_shared, int blocks_per_multiprocessor) {
  ++launches;
  const char* const path = std::getenv("CUDA_ON_CPU_REPORT");
  if (path == nullptr || *path == '\0') return;
  static Report report(path);
  std::ostringstream shape;
  const dim3 &grid = launch.grid, &block = launch.block;
  shape << '\t' << facts_of(launch.kernel).name << '\t' << grid.x << 'x' << grid.y << 'x' << grid.z << '\t' << block.x
        << 'x' << block.y << 'x' << block.z << '\t' << launch.cluster << '\t' << launch.dynamic_shared << '\t'
        << static_shared << '\t' << blocks_per_multiprocessor;
  report.add(shape.str());
}

}  // namespace cuda_on_cpu

uint64_t cuda_on_cpu_launches() { return cuda_on_cpu::launches.exchange(0); }

// The machine that runs CUDA kernels on the host (cuda_on_cpu): kernels whose results are known, and kernels with the
// faults that it is there to find.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "common/cuda/launch.cuh"
#include "report.h"

namespace {

constexpr int kThreads = 96;

void set_seed(int seed) { setenv("CUDA_ON_CPU_SEED", std::to_string(seed).c_str(), 1); }

template <typename T>
std::vector<T> counted(size_t size) {
  std::vector<T> numbers(size);
  std::iota(numbers.begin(), numbers.end(), T(1));
  return numbers;
}

// --- reductions
// ---------------------------------------------------------------------------------------------------------

// One block's sum: lanes by shuffles, warps through shared memory.
__device__ double block_sum(double value) {
  __shared__ double warp_sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  for (const double sum : warp_sums) total += sum;
  return total;
}

__global__ void sum_kernel(const double* from, double* to) {
  imaml_ext::wait_for_launch_ahead();
  const double total = block_sum(from[blockIdx.x * kThreads + threadIdx.x]);
  to[blockIdx.x * kThreads + threadIdx.x] = total;
}

void a_block_sums() {
  constexpr int kBlocks = 5;
  const auto from = counted<double>(kBlocks * kThreads);
  for (int seed = 0; seed < 20; ++seed) {
    set_seed(seed);
    std::vector<double> to(from.size(), 0.0);
    imaml_ext::launch<sum_kernel>(nullptr, {kBlocks, kThreads}, from.data(), to.data());
    for (size_t i = 0; i < to.size(); ++i) {
      const double first = from[i / kThreads * kThreads];
      EXPECT_CLOSE(to[i], kThreads * (first + (kThreads - 1) / 2.0), 0.0);
    }
  }
}

// Each element from its neighbour across the block, by way of shared memory.
template <bool kWaits>
__global__ void reverse_kernel(const int* from, int* to) {
  imaml_ext::wait_for_launch_ahead();
  int* const shared = imaml_ext::dynamic_shared<int>();
  shared[threadIdx.x] = from[threadIdx.x];
  if (kWaits) __syncthreads();
  to[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

template <bool kWaits>
int seeds_with_a_wrong_result() {
  const auto from = counted<int>(kThreads);
  const std::vector<int> reversed(from.rbegin(), from.rend());
  int wrong = 0;
  for (int seed = 0; seed < 10; ++seed) {
    set_seed(seed);
    std::vector<int> to(from.size());
    imaml_ext::launch<reverse_kernel<kWaits>>(nullptr, {1, kThreads, kThreads * sizeof(int)}, from.data(), to.data());
    wrong += to != reversed ? 1 : 0;
  }
  return wrong;
}

void a_missing_barrier_shows() {
  EXPECT(seeds_with_a_wrong_result<true>() == 0);
  EXPECT(seeds_with_a_wrong_result<false>() == 10);  // half of the elements read what nobody has written
}

// Thread 0 reads what its neighbour of the same warp has written: __syncwarp is enough, and needed.
template <bool kWaits>
__global__ void neighbour_kernel(int* to) {
  imaml_ext::wait_for_launch_ahead();
  __shared__ int number;
  if (threadIdx.x == 1) number = 7;
  if (kWaits) __syncwarp();
  if (threadIdx.x == 0) *to = number;
}

void a_missing_wait_in_a_warp_shows() {
  int right = 0;
  for (int seed = 0; seed < 40; ++seed) {
    set_seed(seed);
    int to = 0;
    imaml_ext::launch<neighbour_kernel<true>>(nullptr, {1, 32}, &to);
    EXPECT(to == 7);
    imaml_ext::launch<neighbour_kernel<false>>(nullptr, {1, 32}, &to);
    right += to == 7 ? 1 : 0;
  }
  EXPECT(right > 0 && right < 40);
}

__global__ void unwritten_kernel(float* to, bool write) {
  imaml_ext::wait_for_launch_ahead();
  __shared__ float number;
  if (write) number = 1.0f;
  *to = number;
}

void shared_memory_begins_as_nan() {
  float to = 0.0f;
  imaml_ext::launch<unwritten_kernel>(nullptr, {1, 1}, &to, true);
  EXPECT(to == 1.0f);
  imaml_ext::launch<unwritten_kernel>(nullptr, {1, 1}, &to, false);
  EXPECT(std::isnan(to));
}

// --- barriers that are not met
// ------------------------------------------------------------------------------------------

__global__ void half_kernel() {
  imaml_ext::wait_for_launch_ahead();
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_places_kernel() {
  imaml_ext::wait_for_launch_ahead();
  if (threadIdx.y == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lane_kernel() {
  imaml_ext::wait_for_launch_ahead();
  if (threadIdx.x != 3) __shfl_sync(0xffffffffu, 1, 0);
  if (threadIdx.x == 3) __syncthreads();
}

void divergence_is_reported() {
  set_seed(3);
  EXPECT(throws_saying([] { imaml_ext::launch<half_kernel>(nullptr, {1, kThreads}); }, "half_kernel"));
  EXPECT(throws_saying(
      [] { imaml_ext::launch<half_kernel>(nullptr, {1, kThreads}); },
      "64 have ended, the first of them (32, 0, 0) of block (0, 0, 0); 32 wait at test_cuda_on_cpu.cpp:"));
  EXPECT(throws_saying([] { imaml_ext::launch<half_kernel>(nullptr, {1, kThreads}); }, "CUDA_ON_CPU_SEED=3"));
  EXPECT(
      throws_saying([] { imaml_ext::launch<two_places_kernel>(nullptr, {1, dim3(8, 2)}); }, "the threads do not meet"));
  EXPECT(throws_saying([] { imaml_ext::launch<lane_kernel>(nullptr, {1, 32}); }, "(__shfl_sync, mask 0xffffffff)"));
  a_block_sums();  // and afterwards all is well
}

// --- warps
// --------------------------------------------------------------------------------------------------------------

struct Lanes {
  int down, up, exclusive, from, down_of_8;
  unsigned odd;
  int any, all;
};

__global__ void lanes_kernel(Lanes* to) {
  imaml_ext::wait_for_launch_ahead();
  const int lane = static_cast<int>(threadIdx.x);
  Lanes& mine = to[lane];
  mine.down = __shfl_down_sync(0xffffffffu, lane, 3);
  mine.up = __shfl_up_sync(0xffffffffu, lane, 3);
  mine.exclusive = __shfl_xor_sync(0xffffffffu, lane, 5);
  mine.from = __shfl_sync(0xffffffffu, lane, 35);
  mine.down_of_8 = __shfl_down_sync(0xffffffffu, lane, 3, 8);
  mine.odd = __ballot_sync(0xffffffffu, lane % 2);
  mine.any = __any_sync(0xffffffffu, lane == 9);
  mine.all = __all_sync(0xffffffffu, lane != 9);
  // Half a warp on its own.
  if (lane < 16) mine.down += __shfl_sync(0x0000ffffu, 100, 2);
}

void lanes_exchange() {
  std::vector<Lanes> to(32);
  imaml_ext::launch<lanes_kernel>(nullptr, {1, 32}, to.data());
  for (int lane = 0; lane < 32; ++lane) {
    const Lanes& found = to[static_cast<size_t>(lane)];
    EXPECT(found.down == (lane < 29 ? lane + 3 : lane) + (lane < 16 ? 100 : 0));
    EXPECT(found.up == (lane > 2 ? lane - 3 : lane));
    EXPECT(found.exclusive == (lane ^ 5));
    EXPECT(found.from == 3);
    EXPECT(found.down_of_8 == (lane % 8 < 5 ? lane + 3 : lane));
    EXPECT(found.odd == 0xaaaaaaaau);
    EXPECT(found.any == 1 && found.all == 0);
  }
}

// --- clusters
// -----------------------------------------------------------------------------------------------------------

// Every block's number, summed over the cluster by each of its blocks.
template <bool kStays>
__global__ void cluster_kernel(int* to) {
  imaml_ext::wait_for_launch_ahead();
  __shared__ int number;
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) number = static_cast<int>(blockIdx.x);
  cluster.sync();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) sum += *cluster.map_shared_rank(&number, rank);
    to[blockIdx.x] = sum;
  }
  if (kStays) cluster.sync();
}

void clusters_sum() {
  for (int seed = 0; seed < 10; ++seed) {
    set_seed(seed);
    std::vector<int> to(12);
    imaml_ext::launch<cluster_kernel<true>>(nullptr, {12, 32, 0, 4}, to.data());
    for (int block = 0; block < 12; ++block) EXPECT(to[static_cast<size_t>(block)] == block / 4 * 16 + 6);
  }
  std::vector<int> alone(3);
  imaml_ext::launch<cluster_kernel<true>>(nullptr, {3, 32}, alone.data());
  EXPECT(alone == (std::vector<int>{0, 1, 2}));
}

void a_block_that_leaves_its_cluster_is_reported() {
  std::vector<int> to(4);
  EXPECT(throws_saying([&] { imaml_ext::launch<cluster_kernel<false>>(nullptr, {4, 32, 0, 4}, to.data()); },
                       "map_shared_rank: the block of rank"));
}

// --- asynchronous copies
// ------------------------------------------------------------------------------------------------

// A thread's elements, one after another, by way of `kStages` places in shared memory that are filled ahead. It waits
// for all but the last `kBehind` of the copies, of which kStages − 2 is right.
template <int kStages, int kBehind>
__global__ void staged_kernel(const float* from, float* to, int count) {
  imaml_ext::wait_for_launch_ahead();
  __shared__ float stages[kStages][kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int i) {
    if (i < count) __pipeline_memcpy_async(&stages[i % kStages][thread], from + i * kThreads + thread, 4);
    __pipeline_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  for (int i = 0; i < count; ++i) {
    __pipeline_wait_prior(kBehind);
    to[i * kThreads + thread] = stages[i % kStages][thread];
    fetch(i + kStages - 1);
  }
  __pipeline_wait_prior(0);
}

void a_copy_is_there_after_its_wait_and_not_before() {
  const auto from = counted<float>(5 * kThreads);
  std::vector<float> to(from.size());
  imaml_ext::launch<staged_kernel<3, 1>>(nullptr, {1, kThreads}, from.data(), to.data(), 5);
  EXPECT(to == from);
  imaml_ext::launch<staged_kernel<3, 2>>(nullptr, {1, kThreads}, from.data(), to.data(), 5);
  for (const float value : to) EXPECT(std::isnan(value));
}

__global__ void quad_copy_kernel(const float* from, float* to, int shift, int zeros, bool wait) {
  imaml_ext::wait_for_launch_ahead();
  __shared__ __align__(16) float quads[8];
  __pipeline_memcpy_async(quads + shift, from != nullptr ? from : quads, 16, static_cast<size_t>(zeros));
  __pipeline_commit();
  if (wait) __pipeline_wait_prior(0);
  for (int i = 0; i < 4; ++i) to[i] = quads[shift + i];
}

void the_faults_of_a_copy_are_reported() {
  alignas(16) const float from[5] = {1, 2, 3, 4, 5};
  std::vector<float> to(4);
  const auto run = [&](int offset, int shift, int zeros, bool wait) {
    imaml_ext::launch<quad_copy_kernel>(nullptr, {1, 1}, from + offset, to.data(), shift, zeros, wait);
  };
  run(0, 4, 8, true);
  EXPECT(to == (std::vector<float>{1, 2, 0, 0}));
  const std::string unaligned =
      "__pipeline_memcpy_async of 16 bytes at an address that is no multiple of it (test_cuda";
  EXPECT(throws_saying([&] { run(1, 0, 0, true); }, unaligned));
  EXPECT(throws_saying([&] { run(0, 1, 0, true); }, unaligned));
  EXPECT(throws_saying([&] { run(0, 0, 17, true); }, "with more zeros than bytes"));
  const auto run_from_shared = [&](int zeros) {
    imaml_ext::launch<quad_copy_kernel>(nullptr, {1, 1}, static_cast<const float*>(nullptr), to.data(), 4, zeros, true);
  };
  EXPECT(throws_saying([&] { run_from_shared(0); }, "from shared memory"));
  run_from_shared(16);  // nothing is read: the address may lie anywhere
  EXPECT(to == (std::vector<float>{0, 0, 0, 0}));
  EXPECT(throws_saying([&] { run(0, 0, 0, false); }, "asynchronous copies that it has not waited for"));
}

// --- dependent launches
// -------------------------------------------------------------------------------------------------

__global__ void dependent_kernel(int* to, unsigned threads) {
  if (threadIdx.x >= threads) return;
  cudaGridDependencySynchronize();
  to[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(cooperative_groups::this_cluster().block_rank());
  cudaTriggerProgrammaticLaunchCompletion();
}

cudaError_t launch_dependent(std::vector<int>& to, unsigned threads, bool dependent) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = dependent ? 1 : 0;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = 2;
  config.blockDim = 4;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, dependent_kernel, to.data(), threads);
}

void a_dependent_launch_waits_in_every_thread() {
  std::vector<int> to(8, -1);
  EXPECT(launch_dependent(to, 4, true) == cudaSuccess);
  EXPECT(to == (std::vector<int>{0, 0, 0, 0, 1, 1, 1, 1}));
  EXPECT(launch_dependent(to, 3, false) == cudaSuccess);
  EXPECT(throws_saying([&] { launch_dependent(to, 3, true); }, "dependent_kernel"));
  EXPECT(throws_saying([&] { launch_dependent(to, 3, true); }, "thread (3, 0, 0)"));
  EXPECT(throws_saying([&] { launch_dependent(to, 3, true); }, "ends without cudaGridDependencySynchronize()"));
}

// --- loads and stores, votes
// --------------------------------------------------------------------------------------------

__global__ void words_kernel(const float* from, float* to) {
  imaml_ext::wait_for_launch_ahead();
  const auto quad = __ldg(reinterpret_cast<const float4*>(from));
  __stcg(reinterpret_cast<float4*>(to), make_float4(quad.w, quad.z, quad.y, quad.x));
  __stcs(to + 4, __ldcg(from) + 0.5);
}

void a_word_must_be_aligned() {
  alignas(16) const float from[5] = {1, 2, 3, 4, 5};
  alignas(16) float to[9] = {};
  imaml_ext::launch<words_kernel>(nullptr, {1, 1}, from, to);
  EXPECT(std::vector<float>(to, to + 5) == (std::vector<float>{4, 3, 2, 1, 1.5f}));
  EXPECT(
      throws_saying([&] { imaml_ext::launch<words_kernel>(nullptr, {1, 1}, from + 1, to); }, "__ldg of 16 bytes at"));
  EXPECT(
      throws_saying([&] { imaml_ext::launch<words_kernel>(nullptr, {1, 1}, from, to + 2); }, "__stcg of 16 bytes at"));
}

__global__ void votes_kernel(int* to, unsigned most) {
  imaml_ext::wait_for_launch_ahead();
  to[0] = __syncthreads_count(threadIdx.x < most ? 2 : 0);
  to[1] = __syncthreads_or(threadIdx.x < most);
  to[2] = __syncthreads_and(threadIdx.x < most);
}

void a_block_votes() {
  std::vector<int> to(3);
  const auto votes = [&](unsigned most) {
    imaml_ext::launch<votes_kernel>(nullptr, {1, kThreads}, to.data(), most);
    return to;
  };
  EXPECT(votes(0) == (std::vector<int>{0, 0, 0}));
  EXPECT(votes(40) == (std::vector<int>{40, 1, 0}));
  EXPECT(votes(kThreads) == (std::vector<int>{kThreads, 1, 1}));
}

// --- launches
// -----------------------------------------------------------------------------------------------------------

__global__ void index_kernel(int* to) {
  imaml_ext::wait_for_launch_ahead();
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  atomicAdd(to + block * blockDim.x * blockDim.y * blockDim.z + thread, 1);
}

void every_thread_runs_once() {
  std::vector<int> to(2 * 3 * 5 * 7 * 4 * 2, 0);
  imaml_ext::launch<index_kernel>(nullptr, {dim3(2, 3, 5), dim3(7, 4, 2)}, to.data());
  EXPECT(to == std::vector<int>(to.size(), 1));
}

void limits_are_those_of_the_card() {
  EXPECT(throws_saying([] { imaml_ext::launch<half_kernel>(nullptr, {0, 32}); }, "invalid configuration"));
  EXPECT(throws_saying([] { imaml_ext::launch<half_kernel>(nullptr, {1, 1025}); }, "invalid configuration"));
  EXPECT(throws_saying([] { imaml_ext::launch<half_kernel>(nullptr, {dim3(1, 65536), 32}); }, "invalid configuration"));
  EXPECT(throws_saying([] { imaml_ext::launch<half_kernel>(nullptr, {6, 32, 0, 4}); }, "invalid configuration"));
  EXPECT(throws_saying([] { imaml_ext::launch<half_kernel>(nullptr, {1, 32, 228 * 1024}); }, "invalid argument"));
}

// --- what a kernel takes
// ------------------------------------------------------------------------------------------------

[[gnu::noinline]] __device__ double first_of(double value) {
  __shared__ double kept[512];  // 4 KiB
  kept[threadIdx.x] = value;
  __syncthreads();
  return kept[0];
}

template <int kFloats>
__global__ void shared_kernel(double* to) {
  imaml_ext::wait_for_launch_ahead();
  __shared__ float floats[kFloats];
  floats[threadIdx.x] = 1.0f;
  __syncthreads();
  to[threadIdx.x] = first_of(floats[blockDim.x - 1]);
}

template <typename Kernel>
size_t static_shared(Kernel* kernel) {
  cudaFuncAttributes attributes;
  EXPECT(cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess);
  return attributes.sharedSizeBytes;
}

template <typename Kernel>
int blocks(Kernel* kernel, int threads, size_t dynamic) {
  int blocks = 0;
  EXPECT(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, dynamic) == cudaSuccess);
  return blocks;
}

void static_shared_memory_is_that_of_the_kernel() {
  EXPECT(static_shared(half_kernel) == 0);
  EXPECT(static_shared(sum_kernel) == kThreads / 32 * sizeof(double));
  EXPECT(static_shared(reverse_kernel<true>) == 0);  // its own is dynamic
  EXPECT(static_shared(shared_kernel<256>) == 4096 + 1024);
  EXPECT(static_shared(shared_kernel<512>) == 4096 + 2048);
}

void blocks_fit_by_threads_and_shared_memory() {
  EXPECT(blocks(half_kernel, 32, 0) == 32);
  EXPECT(blocks(half_kernel, 513, 0) == 3);
  EXPECT(blocks(half_kernel, 512, 228 * 1024 / 2 - 1024) == 2);
  EXPECT(blocks(half_kernel, 512, 228 * 1024 / 2 - 1023) == 1);
  EXPECT(blocks(shared_kernel<256>, 512, 228 * 1024 / 2 - 6 * 1024) == 2);
  EXPECT(blocks(shared_kernel<512>, 512, 228 * 1024 / 2 - 6 * 1024) == 1);
}

void static_arrays_count_against_the_limit() {
  const auto allow = [](int bytes) {
    return cudaFuncSetAttribute(shared_kernel<256>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  EXPECT(allow(222 * 1024 + 1) == cudaErrorInvalidValue);
  EXPECT(allow(222 * 1024) == cudaSuccess);
  std::vector<double> to(32);
  cudaLaunchConfig_t config{};
  config.blockDim = 32;
  config.dynamicSmemBytes = 44 * 1024;
  EXPECT(cudaLaunchKernelEx(&config, shared_kernel<256>, to.data()) == cudaSuccess);
  EXPECT(cudaLaunchKernelEx(&config, shared_kernel<512>, to.data()) == cudaErrorInvalidValue);  // it has not asked
  EXPECT(cudaLaunchKernelEx(&config, shared_kernel<12 * 1024>, to.data()) == cudaErrorInvalidValue);
}

void launches_are_counted_and_reported() {
  const std::string path = "/tmp/cuda_on_cpu_report." + std::to_string(getpid());
  const pid_t child = fork();
  if (child == 0) {
    setenv("CUDA_ON_CPU_REPORT", path.c_str(), 1);
    cuda_on_cpu_launches();
    std::vector<double> to(kThreads);
    for (int i = 0; i < 3; ++i) imaml_ext::launch<shared_kernel<256>>(nullptr, {1, 64, 8192}, to.data());
    imaml_ext::launch<shared_kernel<256>>(nullptr, {dim3(2, 3), 64}, to.data());
    std::exit(cuda_on_cpu_launches() == 4 && cuda_on_cpu_launches() == 0 ? 0 : 1);
  }
  int status = -1;
  EXPECT(waitpid(child, &status, 0) == child && status == 0);
  std::ifstream file(path);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::remove(path.c_str());
  EXPECT(text.find("\n3\tshared_kernel<256>\t1x1x1\t64x1x1\t1\t8192\t5120\t16\n") != std::string::npos);
  EXPECT(text.find("\n1\tshared_kernel<256>\t2x3x1\t64x1x1\t1\t0\t5120\t32\n") != std::string::npos);
}

}  // namespace

int main() {
  return run_tests({
      {"a block sums", a_block_sums},
      {"a missing barrier shows", a_missing_barrier_shows},
      {"a missing wait in a warp shows", a_missing_wait_in_a_warp_shows},
      {"shared memory begins as NaN", shared_memory_begins_as_nan},
      {"divergence is reported", divergence_is_reported},
      {"lanes exchange", lanes_exchange},
      {"clusters sum", clusters_sum},
      {"a block that leaves its cluster is reported", a_block_that_leaves_its_cluster_is_reported},
      {"a copy is there after its wait and not before", a_copy_is_there_after_its_wait_and_not_before},
      {"the faults of a copy are reported", the_faults_of_a_copy_are_reported},
      {"a dependent launch waits in every thread", a_dependent_launch_waits_in_every_thread},
      {"a word must be aligned", a_word_must_be_aligned},
      {"a block votes", a_block_votes},
      {"static shared memory is that of the kernel", static_shared_memory_is_that_of_the_kernel},
      {"blocks fit by threads and shared memory", blocks_fit_by_threads_and_shared_memory},
      {"static arrays count against the limit", static_arrays_count_against_the_limit},
      {"launches are counted and reported", launches_are_counted_and_reported},
      {"every thread runs once", every_thread_runs_once},
      {"limits are those of the card", limits_are_those_of_the_card},
  });
}

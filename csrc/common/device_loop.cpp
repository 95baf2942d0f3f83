#include "common/device_loop.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>
#include <torch/library.h>
#include <torch/version.h>

#include "common/checks.h"
#include "common/next_round.h"
#include "common/on_device.h"

#if defined(IMAML_EXT_WITH_CUDA)
#include <ATen/cuda/CUDAGraph.h>  // of ATen/cuda it alone, which needs no header of cuBLAS
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>
#endif

namespace imaml_ext {
namespace {

constexpr int kFirstCuda = 12040;

std::string name_of_cuda(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

#if defined(IMAML_EXT_WITH_CUDA)

// torch 2.14 is the first.
template <typename Graph>
concept HasWhileNodes = requires(Graph& graph, const at::Tensor& flag) {
  graph.begin_capture_to_while_node(flag);
  graph.set_conditional_handle_for_current_node(flag);
  graph.end_capture_to_conditional_node();
};

// Captures `body` as that of a while node. It is torch that makes the node: until the node's end the current stream and
// the memory that is allocated are those of the body.
template <HasWhileNodes Graph>
void capture_while(Graph& graph, const at::Tensor& flag, const std::function<void()>& body) {
  graph.begin_capture_to_while_node(flag);
  try {
    body();
    graph.set_conditional_handle_for_current_node(flag);
  } catch (...) {
    try {
      graph.end_capture_to_conditional_node();
    } catch (...) {  // the first error says more
    }
    throw;
  }
  graph.end_capture_to_conditional_node();
}

bool is_captured(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return false;
  auto status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(tensor.device().index()), &status));
  return status == cudaStreamCaptureStatusActive;
}

template <typename Graph>
bool torch_captures() {
  try {
    return Graph::get_currently_capturing_graph() != nullptr;
  } catch (const c10::Error&) {
    return false;
  }
}

// A template, so that a torch without while nodes compiles it too.
template <typename Graph>
DeviceLoop loop_of_graph(c10::Device device) {
  int runtime = 0, driver = 0;
  C10_CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
  C10_CUDA_CHECK(cudaDriverGetVersion(&driver));
  const std::string why_not = why_no_while_node(HasWhileNodes<Graph>, runtime, driver);
  TORCH_CHECK_NOT_IMPLEMENTED(why_not.empty(), why_not);
  if constexpr (HasWhileNodes<Graph>) {
    const c10::cuda::CUDAGuard guard(device);
    TORCH_CHECK_NOT_IMPLEMENTED(torch_captures<Graph>(),
                                "check_every > 0 inside a captured CUDA graph needs a capture that torch.cuda.graph or "
                                "at::cuda::CUDAGraph has begun, got another; check_every=0 can be captured by any");
    return [](const at::Tensor& flag, const std::function<void()>& body) {
      const c10::cuda::CUDAGuard guard(flag.device());
      capture_while(*Graph::get_currently_capturing_graph(), flag, body);
    };
  }
  return nullptr;
}

#endif

}  // namespace

std::string why_no_while_node(bool torch_has_them, int runtime, int driver) {
  if (torch_has_them && runtime >= kFirstCuda && driver >= kFirstCuda) return "";
  return "check_every > 0 inside a captured CUDA graph needs torch 2.14 or later, CUDA 12.4 or later and a driver for "
         "it, got torch " TORCH_VERSION ", CUDA " +
         name_of_cuda(runtime) + " and a driver for CUDA " + name_of_cuda(driver) +
         "; check_every=0 can be captured without them";
}

DeviceLoop captured_loop([[maybe_unused]] const at::Tensor& tensor) {
#if defined(IMAML_EXT_WITH_CUDA)
  if (is_captured(tensor)) return loop_of_graph<at::cuda::CUDAGraph>(tensor.device());
#endif
  return nullptr;
}

namespace {

void next_round_(const at::Tensor& status, int64_t at_work, at::Tensor& left, at::Tensor& again) {
  TORCH_CHECK_VALUE(status.dim() == 1, "next_round_: status must have shape [B], got ", status.sizes());
  check_table("next_round_", "status", status, at::kInt, status.sizes(), status);
  check_table("next_round_", "left", left, at::kLong, {}, status);
  check_table("next_round_", "again", again, at::kBool, {}, status);
  NextRound arguments{status.size(0), status.const_data_ptr<int32_t>(), at_work, left.mutable_data_ptr<int64_t>(),
                      again.mutable_data_ptr<bool>()};
  on_device_of(status, arguments, [](auto device, const auto& a) { next_round(device, a); });
}

void register_ops(torch::Library& m) { m.impl("next_round_", &next_round_); }

}  // namespace

void rounds_on_device(const DeviceLoop& loop, const at::Tensor& status, int64_t at_work, int64_t rounds,
                      const std::function<void()>& body) {
  if (rounds == 0) return;
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("imaml_ext::next_round_", "").typed<decltype(next_round_)>();
  at::Tensor left = at::full({}, rounds, status.options().dtype(at::kLong));
  at::Tensor again = at::empty({}, status.options().dtype(at::kBool));
  const auto look = [&] { op.call(status, at_work, left, again); };
  look();
  loop(again, [&] {
    body();
    look();
  });
}

// What a loop on the device asks before each of its rounds: left ← left − 1, again ← left ≥ 0 and some row is at work.
TORCH_LIBRARY_FRAGMENT(imaml_ext, m) {
  m.def("next_round_(Tensor status, int at_work, Tensor(a!) left, Tensor(b!) again) -> ()");
}
IMAML_REGISTER(register_ops)

}  // namespace imaml_ext

// Loops that end by what a flag on the device says. Inside a captured CUDA graph nobody can look at the device: there
// such a loop is a while node of the graph, and its body is captured once.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>

#include "common/solver.h"

namespace imaml_ext {

// The loop for work on the device of `tensor` where its current stream is being captured, and none where it is not.
// Throws c10::NotImplementedError, with a sentence that says what is needed, where the graph can have no while node.
DeviceLoop captured_loop(const at::Tensor& tensor);

// That sentence; empty where torch, its CUDA runtime and the driver (12040 is CUDA 12.4) have all that is needed.
std::string why_no_while_node(bool torch_has_them, int runtime, int driver);

// Runs `body` as long as a status [B] int32 is at least `at_work`, at most `rounds` times. It looks before each time.
void rounds_on_device(const DeviceLoop& loop, const at::Tensor& status, int64_t at_work, int64_t rounds,
                      const std::function<void()>& body);

}  // namespace imaml_ext

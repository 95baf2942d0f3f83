// The criteria by name, an output at a time, for host and device: the mean over a task's examples of
// −log softmax(outputs)[label], or over all entries of (output − target)².
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace imaml_ext {

template <typename T>
struct CriterionRule {
  T images;   // S
  T entries;  // S · K

  // softmax, from the largest output and Σ exp(output − largest)
  IMAML_HOST_DEVICE static T probability(T output, double largest, double sum) {
    return static_cast<T>(exp(static_cast<double>(output) - largest) / sum);
  }

  // −log softmax(outputs)[label]
  IMAML_HOST_DEVICE static double cross_entropy(T labelled, double largest, double sum) {
    return log(sum) + largest - static_cast<double>(labelled);
  }
  IMAML_HOST_DEVICE static double squared_error(T output, T target) {
    const double error = static_cast<double>(output) - static_cast<double>(target);
    return error * error;
  }

  // The derivative of the loss in an output.
  IMAML_HOST_DEVICE T cross_entropy_bar(T probability, bool is_label) const {
    return (probability - T(is_label)) / images;
  }
  IMAML_HOST_DEVICE T squared_error_bar(T output, T target) const { return T(2) * (output - target) / entries; }

  // C dot, C the second derivative in the outputs: (diag p − p pᵀ) / S, or 2 / entries; `along` is pᵀ dot.
  IMAML_HOST_DEVICE T cross_entropy_curve(T probability, T dot, T along) const {
    return probability * (dot - along) / images;
  }
  IMAML_HOST_DEVICE T squared_error_curve(T dot) const { return T(2) * dot / entries; }
};

}  // namespace imaml_ext

// Of libtorch, what the ops of csrc/cpu and csrc/cuda include.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

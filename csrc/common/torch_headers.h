// Of libtorch, what the sources of the ops include: precompiled by CMakeLists.txt.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

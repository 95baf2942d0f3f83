// What marks a function that the host and the device both compile.
#pragma once

#if defined(__CUDACC__)
#define IMAML_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IMAML_HOST_DEVICE inline
#endif

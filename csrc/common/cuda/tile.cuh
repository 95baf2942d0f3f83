// How threads read and write rows: in tiles, V numbers (16 bytes) for each of the lanes that work together, side by
// side.
//
// Where every row begins at a multiple of 16 bytes a tile is "packed": lane l has its elements l V … l V + V − 1, one
// load and one store of 16 bytes. Rows of odd length, and views, begin anywhere. There lane l has the elements l,
// l + 32, l + 64, …: V words, all in flight at once, each of which the lanes read from side by side. Of a float32 tile
// (512 bytes, 17 sectors of 32) that moves 20 sectors. Words of the packed map would move 68, four times each sector;
// loads would find them in L1, but L1 hands on every store, and three of seven vectors are stored.
//
// Arithmetic on elements does not depend on who has which. Sums do, so they are always taken over packs: a tile that is
// not packed passes through shared memory first (`settled`). Hence alignment changes no bit of any result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/number.h"

namespace imaml_ext {

// Numbers of type T in 16 bytes.
template <typename T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

template <typename T, int V>
struct alignas(16) Pack {
  T v[V];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

// By words of 16 bytes, because the compiler stores the members of a structure one by one: `store_pack` to global
// memory, `keep_pack` to shared memory.
template <typename T, int V>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  uint4 words[sizeof(pack) / 16];
  std::memcpy(words, &pack, sizeof(pack));
#pragma unroll
  for (int k = 0; k < static_cast<int>(sizeof(pack) / 16); ++k) __stcg(reinterpret_cast<uint4*>(to) + k, words[k]);
}
template <typename T, int V>
__device__ __forceinline__ void keep_pack(T* to, const Pack<T, V>& pack) {
  uint4 words[sizeof(pack) / 16];
  std::memcpy(words, &pack, sizeof(pack));
#pragma unroll
  for (int k = 0; k < static_cast<int>(sizeof(pack) / 16); ++k) reinterpret_cast<uint4*>(to)[k] = words[k];
}

template <typename T, int V>
__device__ __forceinline__ Pack<compute_t<T>, V> widened(const Pack<T, V>& from) {
  Pack<compute_t<T>, V> wide;
#pragma unroll
  for (int k = 0; k < V; ++k) wide.v[k] = static_cast<compute_t<T>>(from.v[k]);
  return wide;
}

// Whether rows of `cols` elements of T that begin at these pointers (null: absent) are packed.
template <typename T, typename... Pointers>
bool can_pack(int64_t cols, const Pointers*... pointers) {
  const bool aligned = ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
  return aligned && cols % kPackSize<T> == 0;
}

// The lanes, in their warp, that work together where blockDim.x is `lanes` or a multiple of it.
__device__ __forceinline__ unsigned lanes_mask(int lanes) {
  return lanes == 32 ? 0xffffffffu : ((1u << lanes) - 1) << threadIdx.y * lanes % 32;
}

// How the threads of a block are set to tiles.
struct TilePlan {
  int lanes = 32;  // that work on a tile: a warp or a part of one
  bool packed = false;
};

template <int V>
struct Tile {
  const TilePlan& plan;
  int first;  // its first element, of the part of a row that a block has
  int count;  // of the part's elements, those of this tile and after it
  int lane;

  // Whether the row has this lane's pack.
  __device__ __forceinline__ bool has_pack() const { return lane * V < count; }
  // body(k, place in the tile) for those of this lane's numbers, where not packed, that stand before `end`.
  template <typename Body>
  __device__ __forceinline__ void for_each_word(int end, const Body& body) const {
    int at = lane;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (at < end) body(k, at);
      at += plan.lanes;
    }
  }

  // This lane's numbers of a row, given where the part begins; 0 beyond its end.
  template <typename T>
  __device__ __forceinline__ Pack<T, V> load(const T* part) const {
    Pack<T, V> pack{};
    if (plan.packed) {
      if (has_pack()) pack = load_pack<T, V>(part + (first + lane * V));
    } else {
      for_each_word(count, [&](int k, int at) { pack.v[k] = part[first + at]; });
    }
    return pack;
  }
  template <typename T>
  __device__ __forceinline__ void store(T* part, const Pack<T, V>& pack) const {
    if (plan.packed) {
      if (has_pack()) store_pack(part + (first + lane * V), pack);
    } else {
      for_each_word(count, [&](int k, int at) { part[first + at] = pack.v[k]; });
    }
  }

  // The tile's place in shared memory, as this lane's numbers; and back. Of a tile that is not packed the last pack is
  // filled up with zeros.
  template <typename C>
  __device__ __forceinline__ void keep(C* place, const Pack<C, V>& held) const {
    if (plan.packed) {
      if (has_pack()) keep_pack(place + lane * V, held);
    } else {
      for_each_word((count + V - 1) / V * V, [&](int k, int at) { place[at] = held.v[k]; });
    }
  }
  template <typename C>
  __device__ __forceinline__ Pack<C, V> kept(const C* place) const {
    Pack<C, V> held{};
    if (plan.packed) {
      if (has_pack()) held = load_pack<C, V>(place + lane * V);
    } else {
      for_each_word(count, [&](int k, int at) { held.v[k] = place[at]; });
    }
    return held;
  }

  // This lane's pack of the tile, for sums. Afterwards the tile is in `place`; null where it is packed and not kept.
  template <typename C>
  __device__ __forceinline__ Pack<C, V> settled(C* place, const Pack<C, V>& held) const {
    if (place != nullptr) keep(place, held);
    if (plan.packed) return held;
    const unsigned mask = lanes_mask(plan.lanes);
    __syncwarp(mask);
    Pack<C, V> pack{};
    if (has_pack()) pack = load_pack<C, V>(place + lane * V);
    __syncwarp(mask);  // the place may be written again
    return pack;
  }
};

}  // namespace imaml_ext

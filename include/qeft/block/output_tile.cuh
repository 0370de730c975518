// SPDX-License-Identifier: Apache-2.0
// Sums of a warpgroup, between its parts and on their way to memory.
#pragma once

#include "qeft/arch/barrier.cuh"
#include "qeft/thread/epilogue.hpp"

namespace qeft::block {

/// Sums of 64 rows and Tokens tokens, spread over a warpgroup as arch::multiply_64x16 leaves them.
template <int Tokens>
struct warpgroup_sums {
  float of[Tokens / 8][4] = {};
};

/// 64 rows of Tokens tokens in shared memory, added up by a warpgroup, then stored row by row. A
/// thread adds to places of its own, without a barrier.
template <int Tokens>
class output_tile {
  static constexpr int rows = 64;
  static constexpr int threads = 128;
  /// Floats from one token to the next: lanes that write together hit different banks.
  static constexpr int stride = rows + 4;

 public:
  struct shared_storage {
    float of[Tokens][stride];
  };

  __device__ explicit output_tile(shared_storage& shared)
      : shared_(shared), thread_(static_cast<int>(threadIdx.x) % threads) {}

  /// Adds what this thread has, or starts with it at 0.
  __device__ void add(const warpgroup_sums<Tokens>& sum, bool starts) {
    const int row = thread_ / 32 * 16 + thread_ % 32 / 4;
    const int token = thread_ % 4 * 2;
    for (int t = 0; t < Tokens / 8; ++t) {
      for (int i = 0; i < 4; ++i) {
        float& to = shared_.of[8 * t + token + i % 2][row + i / 2 * 8];
        to = (starts ? 0.0F : to) + sum.of[t][i];
      }
    }
  }

  /// y[token][destination of channel] = epilogue(sum, token, channel), for channels and tokens
  /// below their counts; then the tile may be used again. All threads of the warpgroup take part.
  /// @param barrier of sync_threads, that this warpgroup may use
  template <class Y, class Epilogue>
  __device__ void store(int barrier, int first_channel, int channels, int first_token, int tokens,
                        const Epilogue& epilogue, Y* y) const {
    arch::sync_threads(barrier, threads);
    const int channel = first_channel + thread_ % rows;
    const int last = channel < channels ? min(tokens - first_token, Tokens) : 0;
    for (int t = thread_ / rows; t < last; t += threads / rows) {
      const int token = first_token + t;
      y[index_t{token} * channels + epilogue::destination(epilogue, channel)] =
          from_float<Y>(epilogue(shared_.of[t][thread_ % rows], token, channel));
    }
    arch::sync_threads(barrier, threads);
  }

 private:
  shared_storage& shared_;
  int thread_;
};

}  // namespace qeft::block

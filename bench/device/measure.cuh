// SPDX-License-Identifier: Apache-2.0
// Times on a device: replays of a graph in which the same work is done on other operands each time,
// so that none of them is still in a cache. Medians, with the quartiles around them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "qeft/core/config.hpp"

namespace qeft_bench {

using qeft::index_t;

inline void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(code));
  std::exit(1);
}

/// Seconds of one call.
struct timing {
  double median;
  double low;   // a quarter of the replays was faster
  double high;  // a quarter was slower
};

struct measurement {
  int replays = 25;
  cudaStream_t stream = nullptr;  // not the default one, which cannot be captured

  measurement() { check(cudaStreamCreate(&stream), "cudaStreamCreate"); }
  measurement(const measurement&) = delete;
  measurement& operator=(const measurement&) = delete;
  ~measurement() { cudaStreamDestroy(stream); }

  /// @param body body(i) puts call i on the stream, 0 <= i < calls
  template <class Body>
  timing operator()(int calls, const Body& body) const {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    for (int i = 0; i < calls; ++i) body(i);
    check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    cudaEvent_t begin = nullptr;
    cudaEvent_t end = nullptr;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<double> seconds;
    for (int i = -2; i < replays; ++i) {  // two to warm up
      check(cudaEventRecord(begin, stream), "cudaEventRecord");
      check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
      check(cudaEventRecord(end, stream), "cudaEventRecord");
      check(cudaEventSynchronize(end), "cudaEventSynchronize");
      float milliseconds = 0.0F;
      check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
      if (i >= 0) seconds.push_back(static_cast<double>(milliseconds) * 1e-3 / calls);
    }
    check(cudaEventDestroy(begin), "cudaEventDestroy");
    check(cudaEventDestroy(end), "cudaEventDestroy");
    check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    std::sort(seconds.begin(), seconds.end());
    return {seconds[seconds.size() / 2], seconds[seconds.size() / 4],
            seconds[seconds.size() * 3 / 4]};
  }
};

}  // namespace qeft_bench

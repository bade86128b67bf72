#include "graph.h"

#include <cuda_runtime_api.h>

namespace fastdiff {

int cuda_launch_graph(void* exec, void* stream, int times) {
  for (int i = 0; i < times; ++i) {
    const cudaError_t code =
        cudaGraphLaunch(static_cast<cudaGraphExec_t>(exec), static_cast<cudaStream_t>(stream));
    if (code != cudaSuccess) {
      cudaGetLastError();  // reported here: the next call must not find it
      return int(code);
    }
  }
  return int(cudaSuccess);
}

}  // namespace fastdiff

// Launching a graph that somebody else has captured and instantiated.
#pragma once

namespace fastdiff {

// Enqueues the instantiated graph `exec` (a cudaGraphExec_t) on `stream`, `times` times, each after
// the one before; no synchronisation. Returns the first cudaError_t that is not 0 (success).
int cuda_launch_graph(void* exec, void* stream, int times);

}  // namespace fastdiff

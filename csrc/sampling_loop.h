// The sampling loop over a packed solver table: calls a Python model, then one fused step, per row.
//
// What it costs per step outside the model is the point of it, so tensors are handled as bare Python
// objects: the model's input objects are made once, and an output that looks like the last one
// (dtype, shape and strides) is taken by its data pointer. Anything else goes through `accept`.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "solver_step.h"

namespace fastdiff {

// The arrays of fastdiff.solvers.PackedTable, owned.
struct PackedTable {
  int rows = 0, num_registers = 0, max_updates = 0;
  std::vector<int32_t> index;  // [rows, 4 + U]: feed, draw, updates, next_feed, dest..
  std::vector<double> coef;    // [rows, 4 + U (R + 2)]

  int index_width() const { return 4 + max_updates; }
  int coef_width() const { return 4 + max_updates * (num_registers + 2); }
  // Sets the fields of `task` that row `i` decides.
  void fill(StepTask& task, int i) const;
};

// What the Python side prepares once per run.
struct LoopArguments {
  pybind11::object evaluate;   // (model input, row) -> output
  pybind11::list inputs;       // the model input tensor of each row (few distinct objects)
  pybind11::object like;       // a tensor with the dtype, shape and strides outputs should have
  pybind11::object accept;     // (output) -> an equivalent tensor like `like`, or raises
  pybind11::object draw;       // (draw) -> noise tensor in the registers' dtype, or None
  pybind11::object on_step;    // (row) -> bool, or None
  bool on_gpu = false;         // the tensors live on the current CUDA device
  void* stream = nullptr;      // the CUDA stream the model runs on
};

// Runs rows first..N-1, or until on_step returns False; returns the number of the last one run, plus
// one. `task` holds the pointers and sizes; `input` may be null when every row feeds its register as
// it is. A row whose from_output is 0 does not evaluate the model.
//
// On the GPU every row is one launch on `stream`, and nothing waits for it: outputs and noise may be
// freed on the host meanwhile when their allocator reuses memory in stream order, as PyTorch's does.
int run_loop(const PackedTable& table, StepTask task, const LoopArguments& arguments, int threads,
             int first);

}  // namespace fastdiff

#include "sampling_loop.h"

#include <stdexcept>
#include <string>

#if defined(FASTDIFF_WITH_CUDA)
#include "cuda/solver_step.h"
#endif

namespace fastdiff {
namespace py = pybind11;

void PackedTable::fill(StepTask& task, int i) const {
  const int32_t* row = index.data() + size_t(i) * index_width();
  task.feed = row[0];
  task.draw = uint32_t(row[1]);
  task.num_updates = row[2];
  task.next_feed = row[3];
  for (int u = 0; u < row[2]; ++u) task.dest[u] = row[4 + u];
  task.coef = coef.data() + size_t(i) * coef_width();
}

namespace {

// Interned once: attribute look-ups by these cost a dictionary probe.
struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* device = PyUnicode_InternFromString("device");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
};

const Names& names() {
  static const Names* const interned = new Names;  // kept for the life of the process
  return *interned;
}

py::object steal(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

bool same(const py::object& a, const py::object& b) {
  const int equal = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
  if (equal < 0) throw py::error_already_set();
  return equal == 1;
}

// The address of a tensor's data; ValueError for one without memory (a meta or fake tensor).
uintptr_t data_pointer(const py::object& tensor, const char* who) {
  const py::object value = steal(PyObject_CallMethodNoArgs(tensor.ptr(), names().data_ptr));
  const unsigned long long pointer = PyLong_AsUnsignedLongLong(value.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  if (pointer == 0)
    throw py::value_error(std::string(who) + " must return a tensor with memory, got a null pointer");
  return uintptr_t(pointer);
}

// What outputs must look like to be taken as they are.
class Layout {
 public:
  explicit Layout(const py::object& like)
      : type_(py::type::of(like)),
        dtype_(steal(PyObject_GetAttr(like.ptr(), names().dtype))),
        device_(steal(PyObject_GetAttr(like.ptr(), names().device))),
        shape_(steal(PyObject_GetAttr(like.ptr(), names().shape))),
        stride_(steal(PyObject_CallMethodNoArgs(like.ptr(), names().stride))) {}

  bool fits(const py::object& output) const {
    if (py::type::of(output).ptr() != type_.ptr()) return false;
    if (!steal(PyObject_GetAttr(output.ptr(), names().dtype)).is(dtype_)) return false;
    if (!same(steal(PyObject_GetAttr(output.ptr(), names().device)), device_)) return false;
    if (!same(steal(PyObject_GetAttr(output.ptr(), names().shape)), shape_)) return false;
    return same(steal(PyObject_CallMethodNoArgs(output.ptr(), names().stride)), stride_);
  }

 private:
  py::object type_, dtype_, device_, shape_, stride_;
};

void launch(const StepTask& task, void* stream) {
#if defined(FASTDIFF_WITH_CUDA)
  if (const int code = cuda_solver_step(task, stream))
    throw std::runtime_error(std::string("CUDA: ") + cuda_error_text(code));
#else
  (void)task, (void)stream;
  throw std::runtime_error("this build of fastdiff has no CUDA kernels");
#endif
}

}  // namespace

int run_loop(const PackedTable& table, StepTask task, const LoopArguments& arguments, int threads,
             int first) {
  const Layout layout(arguments.like);
  const bool guided = task.copies == 2;
  const int64_t half = task.images * task.per_image * dtype_size(task.output_dtype);
  // Below this releasing the interpreter lock costs more than the step.
  const bool release = task.images * task.per_image > 256 * 1024;
  for (int i = first; i < table.rows; ++i) {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    table.fill(task, i);

    py::object output;
    task.uncond = task.output = nullptr;
    if (task.coef[2] != 0.0) {
      const py::object index = steal(PyLong_FromLong(i));
      PyObject* stack[2] = {PyList_GET_ITEM(arguments.inputs.ptr(), i), index.ptr()};
      output = steal(PyObject_Vectorcall(arguments.evaluate.ptr(), stack, 2, nullptr));
      if (!layout.fits(output)) output = arguments.accept(output);
      const auto* bytes = reinterpret_cast<const char*>(data_pointer(output, "model"));
      task.uncond = guided ? bytes : nullptr;
      task.output = guided ? bytes + half : bytes;
    }

    py::object noise;
    task.noise = nullptr;
    if (int32_t(task.draw) >= 0 && !arguments.draw.is_none()) {
      noise = arguments.draw(int32_t(task.draw));
      task.noise = reinterpret_cast<const void*>(data_pointer(noise, "noise"));
    }
    if (arguments.on_gpu) {
      launch(task, arguments.stream);
    } else if (release) {
      py::gil_scoped_release released;
      FASTDIFF_DISPATCH(solver_step)(task, threads);
    } else {
      FASTDIFF_DISPATCH(solver_step)(task, threads);
    }
    if (!arguments.on_step.is_none() && !arguments.on_step(i).cast<bool>()) return i + 1;
  }
  return table.rows;
}

}  // namespace fastdiff

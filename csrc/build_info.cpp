// What was built, for `python -m eap_kernels.info` and the tests. Not a tensor operator, hence not in the library.
// Python's limited API, so one build serves every version.
#include <Python.h>

#include <exception>
#include <vector>

#include "cpu/isa.h"
#include "cuda/schedule.h"

namespace {

// What `make` gives for each number below `count`; null with Python's error where it gives null.
template <class Make> PyObject* list(size_t count, const Make& make) {
  PyObject* made = PyList_New(Py_ssize_t(count));
  for (size_t i = 0; made && i < count; ++i) {
    PyObject* item = make(i);
    if (!item || PyList_SetItem(made, Py_ssize_t(i), item) < 0) Py_CLEAR(made);
  }
  return made;
}

template <class T> PyObject* list(const std::vector<T>& numbers) {
  return list(numbers.size(), [&](size_t i) { return PyLong_FromLongLong(numbers[i]); });
}

bool read(PyObject* sequence, std::vector<int64_t>& numbers) {
  const Py_ssize_t count = PySequence_Size(sequence);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = PySequence_GetItem(sequence, i);
    numbers.push_back(item ? PyLong_AsLongLong(item) : 0);
    Py_XDECREF(item);
  }
  return !PyErr_Occurred();
}

// A schedule as lists of tuples. A piece comes with the number of each of its steps: token of the segment x blocks +
// block.
PyObject* as_lists(const eap::cuda::Schedule& s, int64_t columns, int64_t steps) {
  const auto tile = [&](size_t i) {
    const auto& x = s.tiles[i];
    PyObject* depths = list(columns / eap::cuda::kSlab, [&](size_t g) { return PyLong_FromLong(x.depth(int(g))); });
    return Py_BuildValue("(iiiN)", x.sender, x.slabs, x.column, depths);
  };
  const auto piece = [&](size_t i) {
    const auto& x = s.pieces[i];
    eap::cuda::Walk walk(x, int32_t(steps));
    PyObject* walked = list(x.count, [&](size_t) {
      walk.next();
      return PyLong_FromLongLong(walk.token * steps + walk.block);
    });
    return Py_BuildValue("(iiiiN)", x.tile, x.segment, x.token, x.slot, walked);
  };
  const auto worker = [&](size_t i) {
    return list(s.begin[i + 1] - s.begin[i], [&](size_t j) { return piece(s.begin[i] + j); });
  };
  const auto split = [&](size_t i) {
    const auto& x = s.splits[i];
    return Py_BuildValue("(iiii)", x.tile, x.segment, x.first, x.count);
  };
  return Py_BuildValue("{s:L,s:N,s:N,s:N,s:N,s:N,s:N,s:i}", "box", (long long)s.box, "receiver", list(s.receiver),
                       "reach", list(s.reach), "tiles", list(s.tiles.size(), tile), "token", list(s.token), "pieces",
                       list(s.workers(), worker), "splits", list(s.splits.size(), split), "slots", s.slots);
}

PyObject* cuda_schedule(PyObject*, PyObject* args, PyObject* named) {
  const char* names[] = {"reach",   "segments",  "tokens",  "columns", "max_slabs",
                         "gathers", "row_bytes", "workers", "steps",   nullptr};
  PyObject *reached, *segmented;
  int gathers;
  long long tokens, columns, max_slabs, row_bytes, workers, steps;
  if (!PyArg_ParseTupleAndKeywords(args, named, "OOLLLpLLL", const_cast<char**>(names), &reached, &segmented, &tokens,
                                   &columns, &max_slabs, &gathers, &row_bytes, &workers, &steps))
    return nullptr;
  std::vector<int64_t> reach, segments;
  const bool whole = segmented == Py_None;
  if (!read(reached, reach) || (!whole && !read(segmented, segments))) return nullptr;
  try {
    const eap::cuda::Kind kind{columns, max_slabs, gathers != 0, row_bytes};
    const int64_t* given = whole ? nullptr : segments.data();
    return as_lists(eap::cuda::schedule(reach.data(), int64_t(reach.size()), given, tokens, kind, workers, steps),
                    columns, steps);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(eap::isa_name(eap::isa())); }

PyObject* texts(const std::vector<const char*>& given) {
  PyObject* listed = list(given.size(), [&](size_t i) { return PyUnicode_FromString(given[i]); });
  PyObject* made = listed ? PyList_AsTuple(listed) : nullptr;
  Py_XDECREF(listed);
  return made;
}

bool add(PyObject* module, const char* name, PyObject* value) {
  const bool added = value && PyModule_AddObjectRef(module, name, value) == 0;
  Py_XDECREF(value);
  return added;
}

}  // namespace

PyMODINIT_FUNC PyInit__build_info(void) {
  static PyMethodDef methods[] = {{"instruction_set", instruction_set, METH_NOARGS,
                                   "The instruction set level that the kernels use on this machine."},
                                  {"cuda_schedule", (PyCFunction)(void (*)(void))cuda_schedule,
                                   METH_VARARGS | METH_KEYWORDS, "What each worker of edge_scores does on a GPU."},
                                  {}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_build_info",
                                   "Facts about the native build.",
                                   -1,
                                   methods,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  const char* compiler =
#ifdef __clang__
      "clang " __clang_version__;
#else
      "g++ " __VERSION__;
#endif
  std::vector<const char*> levels;
  for (eap::Isa level : eap::kLevels) levels.push_back(eap::isa_name(level));
  PyObject* module = PyModule_Create(&definition);
  if (module && add(module, "version", PyUnicode_FromString(EAP_VERSION)) &&
      add(module, "compiler", PyUnicode_FromString(compiler)) && add(module, "instruction_sets", texts(levels)) &&
      add(module, "cuda_architectures", texts({EAP_CUDA_ARCHITECTURES})) &&
      add(module, "cuda_failure", PyUnicode_FromString(EAP_CUDA_FAILURE)) &&
      add(module, "cuda_slab", PyLong_FromLong(eap::cuda::kSlab)))
    return module;
  Py_XDECREF(module);
  return nullptr;
}

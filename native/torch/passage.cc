// Gradients without compression, on their way through the two methods of a compressor: a Python
// class, as a step may have hundreds of them. hvd_gqsgd/_native/passage.py has its documentation.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <chrono>
#include <exception>
#include <new>
#include <vector>

namespace {

// Owns a reference.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* borrowed) : object_(borrowed) { Py_XINCREF(object_); }
  Ref(Ref&& other) noexcept : object_(other.release()) {}
  Ref& operator=(Ref&& other) noexcept {
    Py_XSETREF(object_, other.release());
    return *this;
  }
  ~Ref() { Py_CLEAR(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* release() {
    PyObject* released = object_;
    object_ = nullptr;
    return released;
  }
  PyObject* object_ = nullptr;
};

// A variable of a Python module or object, and its value.
struct Variable {
  Ref of, name, value;

  // -1: an exception.
  int unchanged() const {
    PyObject* now = PyDict_GetItemWithError(of.get(), name.get());
    return now == value.get() ? 1 : PyErr_Occurred() ? -1 : 0;
  }
};

struct Counts {
  long long numel, tensors, small_numel, small_tensors;

  void add(int64_t of_one, bool small) {
    (small ? small_numel : numel) += of_one;
    (small ? small_tensors : tensors) += 1;
  }
};

// In seconds; 0: there was none.
struct Times {
  double began, last_in, last_out;
};

struct State {
  Ref begin, compress, decompress, context;
  long long min_numel;
  bool timed;
  bool open = false;
  at::ScalarType dtype;
  std::vector<Variable> variables;
  int64_t free = 0;  // steps that may begin without `begin`
  Counts counts{};
  Counts of_step{};              // since a step began here
  std::vector<Times> steps{{}};  // the first one began elsewhere

  // Whether a tensor passes, and its elements; -1: an exception.
  int passes(PyObject* object, int64_t& numel) const {
    if (!open || !THPVariable_Check(object)) return 0;
    for (const Variable& variable : variables) {
      const int unchanged = variable.unchanged();
      if (unchanged != 1) return unchanged;
    }
    const at::Tensor& tensor = THPVariable_Unpack(object);
    try {
      if (tensor.layout() != at::kStrided || !tensor.is_cpu() || tensor.scalar_type() != dtype ||
          !tensor.is_contiguous() || tensor.requires_grad()) {
        return 0;
      }
      numel = tensor.numel();
      return 1;
    } catch (const std::exception&) {  // of a subclass, or of sizes that are symbols
      PyErr_Clear();
      return 0;
    }
  }

  void count(int64_t numel, bool small) {
    counts.add(numel, small);
    of_step.add(numel, small);
  }
};

struct Passage {
  PyObject_HEAD char handed_out;
  State state;
};

State& state_of(PyObject* object) { return reinterpret_cast<Passage*>(object)->state; }

// That of Python's time.perf_counter.
double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

PyObject* compress(PyObject* object, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  State& state = state_of(object);
  if (count != 1 || names != nullptr) {
    return PyObject_Vectorcall(state.compress.get(), args, count, names);
  }
  PyObject* tensor = args[0];
  int64_t numel = 0;
  const int passes = state.passes(tensor, numel);
  if (passes < 0) return nullptr;
  if (passes == 0) return PyObject_CallOneArg(state.compress.get(), tensor);
  if (numel < state.min_numel) {
    state.count(numel, true);
    return PyTuple_Pack(2, tensor, Py_None);
  }
  char& handed_out = reinterpret_cast<Passage*>(object)->handed_out;
  if (handed_out && state.free > 0) {
    --state.free;
    handed_out = 0;
    state.of_step = {};
    state.steps.push_back({now(), 0.0, 0.0});
  } else if (handed_out) {
    PyObject* began = PyObject_CallNoArgs(state.begin.get());
    if (began == nullptr) return nullptr;
    const bool goes_on = began == Py_True;
    Py_DECREF(began);
    if (!goes_on) return PyObject_CallOneArg(state.compress.get(), tensor);
  }
  state.count(numel, false);
  if (state.timed) state.steps.back().last_in = now();
  return PyTuple_Pack(2, tensor, state.context.get());
}

PyObject* decompress(PyObject* object, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  State& state = state_of(object);
  if (count != 2 || names != nullptr) {
    return PyObject_Vectorcall(state.decompress.get(), args, count, names);
  }
  if (args[1] == state.context.get()) {
    reinterpret_cast<Passage*>(object)->handed_out = 1;
    if (state.timed) state.steps.back().last_out = now();
  } else if (args[1] != Py_None) {
    return PyObject_Vectorcall(state.decompress.get(), args, 2, nullptr);
  }
  Py_INCREF(args[0]);
  return args[0];
}

PyObject* take(PyObject* object, PyObject*) {
  State& state = state_of(object);
  PyObject* steps = PyTuple_New(static_cast<Py_ssize_t>(state.steps.size()));
  for (size_t i = 0; steps != nullptr && i < state.steps.size(); ++i) {
    const Times& times = state.steps[i];
    PyObject* step = Py_BuildValue("ddd", times.began, times.last_in, times.last_out);
    if (step == nullptr)
      Py_CLEAR(steps);
    else
      PyTuple_SET_ITEM(steps, static_cast<Py_ssize_t>(i), step);
  }
  if (steps == nullptr) return nullptr;
  const Counts &all = state.counts, &last = state.of_step;
  PyObject* taken =
      Py_BuildValue("(LLLL)(LLLL)N", all.numel, all.tensors, all.small_numel, all.small_tensors,
                    last.numel, last.tensors, last.small_numel, last.small_tensors, steps);
  if (taken == nullptr) return nullptr;
  state.counts = state.of_step = {};
  state.steps.assign(1, {});
  return taken;
}

PyObject* open(PyObject* object, PyObject* args) {
  PyObject *dtype, *variables;
  Py_ssize_t free;
  if (!PyArg_ParseTuple(args, "O!nO!", &THPDtypeType, &dtype, &free, &PyTuple_Type, &variables)) {
    return nullptr;
  }
  std::vector<Variable> kept;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(variables); ++i) {
    PyObject *of, *name;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(variables, i), "O!U", &PyDict_Type, &of, &name)) {
      return nullptr;
    }
    PyObject* value = PyDict_GetItemWithError(of, name);
    if (value == nullptr) {
      return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_KeyError, "%U", name);
    }
    kept.push_back({Ref(of), Ref(name), Ref(value)});
  }
  State& state = state_of(object);
  state.variables.swap(kept);
  state.dtype = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
  state.free = free;
  state.open = true;
  Py_RETURN_NONE;
}

PyObject* close(PyObject* object, PyObject*) {
  state_of(object).open = false;
  Py_RETURN_NONE;
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static const char* accepted[] = {"begin",     "compress", "decompress", "context",
                                   "min_numel", "timed",    nullptr};
  PyObject *begin, *compress, *decompress, *context;
  long long min_numel;
  int timed;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOLp", const_cast<char**>(accepted), &begin,
                                   &compress, &decompress, &context, &min_numel, &timed)) {
    return nullptr;
  }
  PyObject* object = type->tp_alloc(type, 0);
  if (object == nullptr) return nullptr;
  reinterpret_cast<Passage*>(object)->handed_out = 1;
  auto* state = new (&state_of(object)) State{};
  state->begin = Ref(begin);
  state->compress = Ref(compress);
  state->decompress = Ref(decompress);
  state->context = Ref(context);
  state->min_numel = min_numel;
  state->timed = timed != 0;
  return object;
}

// What is called refers to its own object, which breaks the cycle: nothing is cleared here.
int traverse(PyObject* object, visitproc visit, void* arg) {
  State& state = state_of(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(state.begin.get());
  Py_VISIT(state.compress.get());
  Py_VISIT(state.decompress.get());
  Py_VISIT(state.context.get());
  for (const Variable& variable : state.variables) {
    Py_VISIT(variable.of.get());
    Py_VISIT(variable.value.get());
  }
  return 0;
}

void destroy(PyObject* object) {
  PyObject_GC_UnTrack(object);
  PyTypeObject* type = Py_TYPE(object);
  state_of(object).~State();
  type->tp_free(object);
  Py_DECREF(type);
}

template <class Function>
PyCFunction method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {
    {"compress", method(compress), METH_FASTCALL | METH_KEYWORDS,
     "compress($self, tensor)\n--\n\nSee GlobalQSGD.compress."},
    {"decompress", method(decompress), METH_FASTCALL | METH_KEYWORDS,
     "decompress($self, tensor, ctx)\n--\n\nSee GlobalQSGD.decompress."},
    {"open", open, METH_VARARGS, nullptr},
    {"close", close, METH_NOARGS, nullptr},
    {"take", take, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef members[] = {
    {"handed_out", T_BOOL, offsetof(Passage, handed_out), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, nullptr},
};

PyType_Spec spec = {"hvd_gqsgd._native._C.Passage", sizeof(Passage), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* made = PyModule_Create(&module);
  if (made == nullptr) return nullptr;
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr || PyModule_AddObject(made, "Passage", type) < 0) {
    Py_XDECREF(type);
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}

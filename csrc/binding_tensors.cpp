// Address, shape, strides, dtype and device of many tensors at once, and whether a kernel may read
// what lies there. Python has to ask for each of them; a newer torch also shows them to C, by
// DLPack's exchange API, in a twentieth of the time.

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "binding.h"

namespace hogwild {

namespace {

// What is used here of DLPack 1.x: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void* data;
  struct Device {
    int32_t type, id;
    bool operator==(const Device& other) const { return type == other.type && id == other.id; }
  } device;
  int32_t ndim;
  struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
    bool operator==(const DataType& other) const {
      return code == other.code && bits == other.bits && lanes == other.lanes;
    }
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* tensor);
  void* current_work_stream;
};

bool is_list_or_tuple(py::handle object) {
  return PyList_Check(object.ptr()) || PyTuple_Check(object.ptr());
}

int64_t address(const DLTensor& t) {
  return reinterpret_cast<int64_t>(static_cast<char*>(t.data) + t.byte_offset);
}

// Elements from the first to behind the last.
int64_t span(const DLTensor& t) {
  int64_t last = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] == 0) return 0;
    last += (t.shape[d] - 1) * t.strides[d];
  }
  return last + 1;
}

bool has_shape(const DLTensor& t, const py::tuple& shape) {
  if (py::ssize_t(t.ndim) != py::ssize_t(shape.size())) return false;
  for (int d = 0; d < t.ndim; ++d)
    if (t.shape[d] != PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d))) return false;
  return true;
}

bool is_dense_in_last(const DLTensor& t) {
  return t.ndim > 0 && (t.strides[t.ndim - 1] == 1 || t.shape[t.ndim - 1] <= 1);
}

class TensorReader {
 public:
  // `types` have memory of their own, which the first one shows.
  explicit TensorReader(const py::args& types) {
    for (const py::handle type : types) types_.push_back(py::reinterpret_borrow<py::type>(type));
    if (types_.empty()) throw py::type_error("types: expected at least one, got none");
    constexpr const char* NAME = "dlpack_exchange_api";
    const py::object capsule = py::getattr(types_[0], "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), NAME)) return;
    const auto* api =
        static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), NAME));
    if (api->major == 1) read_ = api->dltensor_from_py_object_no_sync;
  }

  // Whether it is plain memory: all of the tensor lies in its storage, as it is. `checks.is_plain`
  // asks the same of torch in words, and is asked wherever this says no.
  bool is_plain(py::handle object) const {
    DLTensor t;
    return read(object, t);
  }

  // Whether all are plain memory of these shapes, of the dtype and device of `like`, dense in the
  // last dimension.
  bool fit(py::handle like, const py::tuple& tensors, const py::tuple& shapes) const {
    DLTensor model, t;
    if (!show(like, model)) return false;
    for (py::ssize_t i = 0; i < py::ssize_t(tensors.size()); ++i) {
      const bool fits =
          read(PyTuple_GET_ITEM(tensors.ptr(), i), t) && t.dtype == model.dtype &&
          t.device == model.device && is_dense_in_last(t) &&
          has_shape(t, py::reinterpret_borrow<py::tuple>(PyTuple_GET_ITEM(shapes.ptr(), i)));
      if (!fits) return false;
    }
    return true;
  }

  using Segments = std::tuple<SegmentTable, Ints, int64_t, int64_t>;

  // (addresses and strides, lengths, kv_heads, value_dim) of segments that fit the query and each
  // other. Nothing if one does not, or cannot be read this way; only Python
  // says why.
  std::optional<Segments> segments(py::handle query, py::handle keys, py::handle values) const {
    DLTensor q, k, v;
    if (!is_list_or_tuple(keys) || !is_list_or_tuple(values) || !rows(query, 4, q)) return {};
    const py::ssize_t count = PySequence_Fast_GET_SIZE(keys.ptr());
    if (count == 0 || count != PySequence_Fast_GET_SIZE(values.ptr())) return {};

    SegmentTable table({count, py::ssize_t(6)});
    Ints lengths(count);
    int64_t* row = table.mutable_data();
    int64_t kv_heads = 0, value_dim = 0;
    for (py::ssize_t s = 0; s < count; ++s, row += 6) {
      if (!rows(PySequence_Fast_GET_ITEM(keys.ptr(), s), 3, k) ||
          !rows(PySequence_Fast_GET_ITEM(values.ptr(), s), 3, v))
        return {};
      if (s == 0) kv_heads = k.shape[1], value_dim = v.shape[2];
      const int64_t length = k.shape[0];
      const bool fits = k.dtype == q.dtype && v.dtype == q.dtype && k.device == q.device &&
                        v.device == q.device && length <= std::numeric_limits<int32_t>::max() &&
                        k.shape[1] == kv_heads && k.shape[2] == q.shape[3] &&
                        v.shape[0] == length && v.shape[1] == kv_heads && v.shape[2] == value_dim;
      if (!fits) return {};
      row[0] = address(k), row[1] = address(v);
      row[2] = k.strides[0], row[3] = k.strides[1];
      row[4] = v.strides[0], row[5] = v.strides[1];
      lengths.mutable_data()[s] = int32_t(length);
    }
    return Segments(std::move(table), std::move(lengths), kv_heads, value_dim);
  }

 private:
  // A subclass may have no memory of its own.
  bool show(py::handle object, DLTensor& t) const {
    const auto is_type = [&](const py::type& type) {
      return reinterpret_cast<PyTypeObject*>(type.ptr()) == Py_TYPE(object.ptr());
    };
    if (!read_ || std::none_of(types_.begin(), types_.end(), is_type)) return false;
    if (read_(object.ptr(), &t) == 0) return true;
    PyErr_Clear();  // sparse, wrapped by torch.func, ...
    return false;
  }

  bool read(py::handle object, DLTensor& t) const {
    constexpr uint8_t COMPLEX = 5;  // may wait to be conjugated
    if (!show(object, t) || t.dtype.code == COMPLEX) return false;
    const int64_t elements = span(t);
    if (elements == 0) return true;
    const py::object storage = ask(object, storage_), offset = ask(object, offset_);
    if (!storage || !offset || ask(object, negative_).ptr() != Py_False) return false;
    const int64_t size = t.dtype.bits / 8, begin = PyLong_AsLongLong(offset.ptr());
    const bool has_memory = address(t) != begin * size;  // no memory begins at 0
    return has_memory && (begin + elements) * size <= PyObject_Size(storage.ptr());
  }

  bool rows(py::handle object, int32_t rank, DLTensor& t) const {
    return read(object, t) && t.ndim == rank && is_dense_in_last(t);
  }

  // What a method without arguments returns; nothing if it raises.
  static py::object ask(py::handle object, const py::str& method) {
    PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), method.ptr());
    if (!result) PyErr_Clear();
    return py::reinterpret_steal<py::object>(result);
  }

  static py::str interned(const char* name) {
    return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name));
  }

  std::vector<py::type> types_;
  py::str storage_ = interned("untyped_storage"), offset_ = interned("storage_offset"),
          negative_ = interned("is_neg");
  int (*read_)(void*, DLTensor*) = nullptr;  // null: torch shows nothing
};

}  // namespace

void bind_tensors(py::module_& m) {
  py::class_<TensorReader>(m, "TensorReader")
      .def(py::init<const py::args&>())
      .def("is_plain", &TensorReader::is_plain, py::arg("tensor"))
      .def("fit", &TensorReader::fit, py::arg("like"), py::arg("tensors"), py::arg("shapes"))
      .def("segments", &TensorReader::segments, py::arg("query"), py::arg("keys"),
           py::arg("values"));
}

}  // namespace hogwild

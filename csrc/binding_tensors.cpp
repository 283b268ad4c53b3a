// Address, shape, strides, dtype and device of many tensors at once. Python has to ask for each of
// them; a newer torch also shows them to C, by DLPack's exchange API, in a twentieth of the time.

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

class TensorReader {
 public:
  explicit TensorReader(py::type tensor) : tensor_(std::move(tensor)) {
    constexpr const char* NAME = "dlpack_exchange_api";
    const py::object capsule = py::getattr(tensor_, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), NAME)) return;
    const auto* api =
        static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), NAME));
    if (api->major == 1) read_ = api->dltensor_from_py_object_no_sync;
  }

  using Segments = std::tuple<SegmentTable, Ints, int64_t, int64_t>;

  // (addresses and strides, lengths, kv_heads, value_dim) of segments that fit the query and each
  // other. Nothing if one does not, or cannot be read this way; only Python says why.
  std::optional<Segments> segments(py::handle query, py::handle keys, py::handle values) const {
    DLTensor q, k, v;
    if (!is_list_or_tuple(keys) || !is_list_or_tuple(values) || !read(query, 4, q)) return {};
    const py::ssize_t count = PySequence_Fast_GET_SIZE(keys.ptr());
    if (count == 0 || count != PySequence_Fast_GET_SIZE(values.ptr())) return {};

    SegmentTable table({count, py::ssize_t(6)});
    Ints lengths(count);
    int64_t* row = table.mutable_data();
    int64_t kv_heads = 0, value_dim = 0;
    for (py::ssize_t s = 0; s < count; ++s, row += 6) {
      if (!read(PySequence_Fast_GET_ITEM(keys.ptr(), s), 3, k) ||
          !read(PySequence_Fast_GET_ITEM(values.ptr(), s), 3, v))
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
  // Whether it is a tensor of this rank whose last dimension is dense. Subclasses are left to
  // Python: they may have no memory of their own.
  bool read(py::handle object, int32_t rank, DLTensor& t) const {
    if (!read_ || Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(tensor_.ptr()))
      return false;
    if (read_(object.ptr(), &t) != 0) {
      PyErr_Clear();
      return false;
    }
    return t.ndim == rank && (t.strides[rank - 1] == 1 || t.shape[rank - 1] <= 1);
  }

  py::type tensor_;
  int (*read_)(void*, DLTensor*) = nullptr;  // null: torch shows nothing
};

}  // namespace

void bind_tensors(py::module_& m) {
  py::class_<TensorReader>(m, "TensorReader")
      .def(py::init<py::type>(), py::arg("tensor"))
      .def("segments", &TensorReader::segments, py::arg("query"), py::arg("keys"),
           py::arg("values"));
}

}  // namespace hogwild

// Python's way to the CUDA backend: addresses of device memory and a stream, no tensors. What a
// step would do on a GPU is known without one: its tables are there in every build.

#include "binding.h"
#include "cuda/backend.h"

namespace hogwild {

namespace {

#ifdef HOGWILD_CUDA
cuda::Step step_of(Address tables, const cuda::Tables& t) {
  return {reinterpret_cast<const void*>(tables), t.num_items(), t.num_merges(), t.num_tokens(),
          t.most_rows()};
}
#endif

template <class T>
py::bytes bytes_of(const T& tables) {
  return py::bytes(tables.bytes().data(), tables.bytes().size());
}

cuda::Tables make_tables(const StepPlan& step, int kv_heads, int padded_queries,
                         const std::optional<SegmentTable>& segments) {
  const std::vector<SegmentRows> rows =
      segments ? segment_rows(*segments) : std::vector<SegmentRows>();
  return cuda::Tables(step.plan.view(), kv_heads, step.group, padded_queries,
                      segments ? rows.data() : nullptr);
}

#ifdef HOGWILD_CUDA
void append(const cuda::Tables& t, Address tables, int dtype, int kv_heads, int head_dim,
            std::array<int64_t, 3> key, std::array<int64_t, 3> value, Address key_pages,
            Address value_pages, float rope_scale, bool interleaved, Address stream) {
  const cuda::AppendArgs args{step_of(tables, t),
                              make_heads(dtype, kv_heads, 1, head_dim, head_dim),
                              {rope_scale, interleaved},
                              token_tensor({key[0], 0, key[1], key[2]}),
                              token_tensor({value[0], 0, value[1], value[2]}),
                              reinterpret_cast<void*>(key_pages),
                              reinterpret_cast<void*>(value_pages)};
  const py::gil_scoped_release release;
  cuda::append(args, reinterpret_cast<void*>(stream));
}

bool attend(const cuda::Tables& t, Address tables, int dtype, int num_heads, int kv_heads,
            int head_dim, const Strided& query, Address key_pages, Address value_pages,
            const Strided& out, Address lse, int64_t lse_worker_stride, Address workspace,
            float scale, float rope_scale, bool interleaved, double softcap, Address stream) {
  const cuda::AttendArgs args{step_of(tables, t),
                              make_heads(dtype, kv_heads, num_heads / kv_heads, head_dim, head_dim),
                              {rope_scale, interleaved},
                              make_scoring(scale, softcap),
                              reinterpret_cast<const void*>(key_pages),
                              reinterpret_cast<const void*>(value_pages),
                              token_tensor(query),
                              token_tensor(out),
                              reinterpret_cast<float*>(lse),
                              lse_worker_stride,
                              num_heads,
                              reinterpret_cast<float*>(workspace)};
  const py::gil_scoped_release release;
  return cuda::attend(args, reinterpret_cast<void*>(stream));
}
#endif

// Angles of `target_length` on the host; none: nothing is rotated.
cuda::MoveTables make_move_tables(const std::vector<Address>& key_layers,
                                  const std::vector<Address>& value_layers,
                                  const Ints& source_pages, const Ints& target_pages,
                                  int32_t target_length, const Floats& inv_freq) {
  const std::vector<void*> keys = pointers(key_layers), values = pointers(value_layers);
  const int32_t half = int32_t(inv_freq.size());
  std::vector<float> angles(size_t(2) * half);
  cpu::kernels().fill_angles(&target_length, 1, inv_freq.data(), half, angles.data());
  return cuda::MoveTables({int32_t(keys.size()), keys.data(), values.data()}, source_pages.data(),
                          source_pages.size(), target_pages.data(), target_pages.size(), half,
                          angles.data());
}

#ifdef HOGWILD_CUDA
void move(Address tables, int num_layers, int dtype, int kv_heads, int head_dim, int32_t length,
          int32_t target_length, bool interleaved, Address stream) {
  const cuda::MoveArgs args{reinterpret_cast<const void*>(tables),
                            make_heads(dtype, kv_heads, 1, head_dim, head_dim),
                            interleaved,
                            num_layers,
                            length,
                            target_length};
  const py::gil_scoped_release release;
  cuda::move(args, reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void bind_cuda(py::module_& m) {
  py::module_ c = m.def_submodule("cuda");

  py::class_<cuda::Tables>(c, "Tables")
      .def(py::init(&make_tables), py::arg("plan"), py::arg("kv_heads"),
           py::arg("padded_queries") = 0, py::arg("segments") = py::none())
      .def_property_readonly("bytes", &bytes_of<cuda::Tables>)
      .def_property_readonly("num_items", &cuda::Tables::num_items)
      .def_property_readonly("num_merges", &cuda::Tables::num_merges)
      .def_property_readonly("num_tokens", &cuda::Tables::num_tokens)
      .def_property_readonly("most_rows", &cuda::Tables::most_rows)
      .def("workspace_floats", &cuda::Tables::workspace_floats);
  py::class_<cuda::MoveTables>(c, "MoveTables")
      .def(py::init(&make_move_tables))
      .def_property_readonly("bytes", &bytes_of<cuda::MoveTables>);

  c.def("row_group",
        [](int dtype, int head_dim) { return cuda::row_group(DType(dtype), head_dim); });
  c.def("has_head_dim", &cuda::has_head_dim);
  c.def("why_not", &cuda::why_not, py::arg("runtime"), py::arg("driver"), py::arg("devices"),
        py::arg("gpu"), py::arg("built"));

#ifdef HOGWILD_CUDA
  c.def("append", &append);
  c.def("attend", &attend);
  c.def("move", &move);
  c.def("built_architectures", &cuda::built_architectures);
  c.def("device_state", [](int device) {
    const cuda::DeviceState s = cuda::device_state(device);
    return py::make_tuple(s.usable, s.why_not, s.compute_capability, s.multiprocessors, s.driver,
                          s.runtime);
  });
#endif
}

}  // namespace hogwild

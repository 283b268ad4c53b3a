// Python's way in: addresses, strides and plain numbers, packed into the structs of attention.h.
// All checks are made in Python, before anything is called here.

#include "binding.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/parallel.h"

using namespace hogwild;

namespace {

std::unique_ptr<StepPlan> make_plan(const Ints& offsets, const Ints& lengths,
                                    const Ints& query_lengths, const Floats& inv_freq, int group,
                                    int kv_heads, int64_t window,
                                    const std::optional<Ints>& key_start,
                                    const std::optional<Ints>& tile_pages,
                                    const std::optional<Ints>& slots, bool packed,
                                    int32_t row_group, int32_t shared_keys) {
  const PlanInput input{int32_t(query_lengths.size()),
                        int32_t(lengths.size()),
                        group,
                        kv_heads,
                        int32_t(inv_freq.size()),
                        window,
                        packed,
                        row_group,
                        shared_keys,
                        offsets.data(),
                        lengths.data(),
                        query_lengths.data(),
                        inv_freq.data(),
                        data_or_null(key_start),
                        data_or_null(tile_pages),
                        data_or_null(slots)};
  const py::gil_scoped_release release;
  return std::unique_ptr<StepPlan>(
      new StepPlan{Plan(input, cpu::kernels().fill_angles), group, {}});
}

void append(const StepPlan& step, int dtype, int kv_heads, int head_dim, int value_dim,
            std::array<int64_t, 3> key, std::array<int64_t, 3> value, Address key_pages,
            Address value_pages, float rope_scale, bool interleaved, int threads) {
  const cpu::AppendArgs args{&step.plan.view(),
                             make_heads(dtype, kv_heads, step.group, head_dim, value_dim),
                             {rope_scale, interleaved},
                             token_tensor({key[0], 0, key[1], key[2]}),
                             token_tensor({value[0], 0, value[1], value[2]}),
                             reinterpret_cast<void*>(key_pages),
                             reinterpret_cast<void*>(value_pages)};
  const py::gil_scoped_release release;
  cpu::append(args, threads);
}

void attend(StepPlan& step, const Heads& heads, const Strided& query, const Strided& out,
            Address lse, int64_t lse_worker_stride, const KeyValues& keys_values, float scale,
            float rope_scale, bool interleaved, double softcap, int32_t padded_queries,
            int threads) {
  const cpu::AttendArgs args{&step.plan.view(),
                             heads,
                             {rope_scale, interleaved},
                             make_scoring(scale, softcap),
                             keys_values,
                             token_tensor(query),
                             token_tensor(out),
                             reinterpret_cast<float*>(lse),
                             lse_worker_stride,
                             int64_t(heads.kv_heads) * heads.group};
  const py::gil_scoped_release release;
  cpu::attend(args, padded_queries, threads, step.workspace);
}

void attend_paged(StepPlan& step, int dtype, int num_heads, int kv_heads, int head_dim,
                  int value_dim, const Strided& query, Address key_pages, Address value_pages,
                  const Strided& out, Address lse, float scale, float rope_scale, bool interleaved,
                  double softcap, int threads) {
  const KeyValues keys_values{Layout::Pages, nullptr, reinterpret_cast<const void*>(key_pages),
                              reinterpret_cast<const void*>(value_pages)};
  attend(step, make_heads(dtype, kv_heads, num_heads / kv_heads, head_dim, value_dim), query, out,
         lse, 0, keys_values, scale, rope_scale, interleaved, softcap, 0, threads);
}

// `lse` is padded like the query, [W, Q, Hq] dense.
void attend_rows(StepPlan& step, int dtype, int num_heads, int kv_heads, int head_dim,
                 int value_dim, const Strided& query, const SegmentTable& segments,
                 const Strided& out, Address lse, int32_t padded_queries, float scale,
                 float rope_scale, bool interleaved, double softcap, int threads) {
  const std::vector<SegmentRows> rows = segment_rows(segments);
  const KeyValues keys_values{Layout::Rows, rows.data(), nullptr, nullptr};
  attend(step, make_heads(dtype, kv_heads, num_heads / kv_heads, head_dim, value_dim), query, out,
         lse, int64_t(padded_queries) * num_heads, keys_values, scale, rope_scale, interleaved,
         softcap, padded_queries, threads);
}

void commit(int dtype, int kv_heads, int head_dim, int value_dim,
            const std::vector<Address>& key_layers, const std::vector<Address>& value_layers,
            const Ints& source_pages, int32_t length, const Ints& target_pages,
            int32_t target_length, const Floats& inv_freq, bool interleaved, int threads) {
  const std::vector<void*> keys = pointers(key_layers), values = pointers(value_layers);
  const int32_t half = int32_t(inv_freq.size());
  std::vector<float> angles(size_t(2) * half);
  const LayerPages layers{int32_t(keys.size()), keys.data(), values.data()};
  const int32_t *source = source_pages.data(), *target = target_pages.data();
  const float* frequencies = inv_freq.data();
  const py::gil_scoped_release release;
  cpu::kernels().fill_angles(&target_length, 1, frequencies, half, angles.data());
  cpu::commit({make_heads(dtype, kv_heads, 1, head_dim, value_dim), layers, interleaved, half,
               angles.data(), source, target, length, target_length},
              threads);
}

void copy_pages(int dtype, int kv_heads, int head_dim, int value_dim,
                const std::vector<Address>& key_layers, const std::vector<Address>& value_layers,
                const Ints& source_pages, const Ints& target_pages, int threads) {
  const std::vector<void*> keys = pointers(key_layers), values = pointers(value_layers);
  const LayerPages layers{int32_t(keys.size()), keys.data(), values.data()};
  const int32_t *source = source_pages.data(), *target = target_pages.data();
  const int64_t count = source_pages.size();
  const py::gil_scoped_release release;
  cpu::copy_pages(make_heads(dtype, kv_heads, 1, head_dim, value_dim), layers, source, target,
                  count, threads);
}

void read_pages(int dtype, int kv_heads, int dim, Address pages, bool is_key,
                const Ints& page_table, int32_t start, int32_t length, Address out) {
  cpu::read({make_heads(dtype, kv_heads, 1, dim, dim), reinterpret_cast<const void*>(pages), is_key,
             page_table.data(), start, length, reinterpret_cast<void*>(out)});
}

uint32_t read_bandwidth_pass(Address data, int64_t bytes, int threads) {
  const py::gil_scoped_release release;
  return cpu::read_bandwidth_pass(reinterpret_cast<const void*>(data), bytes, threads);
}

int64_t fma_pass(int dtype, int64_t iterations, int threads) {
  const py::gil_scoped_release release;
  return cpu::fma_pass(DType(dtype), iterations, threads);
}

void linear(int dtype, int64_t rows, int32_t inputs, int32_t outputs, Address x, Address weight,
            Address bias, Address out, int threads) {
  const cpu::LinearArgs args{DType(dtype),
                             rows,
                             inputs,
                             outputs,
                             reinterpret_cast<const float*>(x),
                             reinterpret_cast<const void*>(weight),
                             reinterpret_cast<const void*>(bias),
                             reinterpret_cast<void*>(out)};
  const py::gil_scoped_release release;
  cpu::linear(args, threads);
}

uint64_t fingerprint(Address data, int64_t words, int64_t step, int threads) {
  const py::gil_scoped_release release;
  return cpu::fingerprint(reinterpret_cast<const void*>(data), words, step, threads);
}

// Angles [n, 2, R/2] of integer positions.
Floats fill_angles(const Ints& positions, const Floats& inv_freq) {
  Floats angles({py::ssize_t(positions.size()), py::ssize_t(2), py::ssize_t(inv_freq.size())});
  cpu::kernels().fill_angles(positions.data(), positions.size(), inv_freq.data(),
                             int32_t(inv_freq.size()), angles.mutable_data());
  return angles;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("__version__") = HOGWILD_VERSION;
  m.attr("HIDDEN") = HIDDEN;
  m.attr("PAGE_SIZE") = TILE;
  m.attr("MAX_DIM") = MAX_DIM;
  m.attr("ROW_GROUP") = ROW_GROUP;
  m.attr("SHARED_KEYS") = cpu::SHARED_KEYS;
  m.attr("FLOAT32") = int(DType::Float32);
  m.attr("FLOAT16") = int(DType::Float16);
  m.attr("BFLOAT16") = int(DType::BFloat16);
#ifdef HOGWILD_CUDA
  m.attr("backends") = std::vector<std::string>{"cpu", "cuda"};
#else
  m.attr("backends") = std::vector<std::string>{"cpu"};
#endif

  m.def("isa", [] { return cpu::kernels().name; });
  m.def("available_isas", &cpu::available_isas);
  m.def("thread_pool", &cpu::thread_pool);
  cpu::kernels();  // a bad HOGWILD_ISA shows on import

  py::class_<StepPlan>(m, "Plan")
      .def(py::init(&make_plan), py::arg("offsets"), py::arg("lengths"), py::arg("query_lengths"),
           py::arg("inv_freq"), py::arg("group"), py::arg("kv_heads"), py::arg("window") = 0,
           py::arg("key_start") = py::none(), py::arg("tile_pages") = py::none(),
           py::arg("slots") = py::none(), py::arg("packed") = false,
           py::arg("row_group") = ROW_GROUP, py::arg("shared_keys") = 0)
      .def_property_readonly(
          "chunks",
          [](const StepPlan& s) {
            const PlanView& v = s.plan.view();
            std::vector<std::array<int32_t, 3>> list;
            for (int i = 0; i < v.num_chunks; ++i)
              list.push_back({v.chunks[i].segment, v.chunks[i].begin, v.chunks[i].end});
            return list;
          })
      // One entry a row group: its visits, each (chunk, [(worker, first row, last row), ...]).
      .def_property_readonly("visits", [](const StepPlan& s) {
        const PlanView& v = s.plan.view();
        py::list groups;
        for (int g = 0; g < v.num_groups; ++g) {
          py::list visits;
          for (int i = v.groups[g].visit_begin; i < v.groups[g].visit_end; ++i) {
            py::list spans;
            for (int j = v.visits[i].span_begin; j < v.visits[i].span_end; ++j)
              spans.append(py::make_tuple(v.parts[v.spans[j].part].worker, v.spans[j].first,
                                          v.spans[j].last));
            visits.append(py::make_tuple(v.visits[i].chunk, spans));
          }
          groups.append(visits);
        }
        return groups;
      });

  m.def("append", &append);
  m.def("attend_paged", &attend_paged);
  m.def("attend_rows", &attend_rows);
  m.def("commit", &commit);
  m.def("copy_pages", &copy_pages);
  m.def("read_pages", &read_pages);
  m.def("fill_angles", &fill_angles);
  m.def("all_finite", [](const Floats& numbers) {
    return std::all_of(numbers.data(), numbers.data() + numbers.size(),
                       [](float x) { return std::isfinite(x); });
  });
  m.def("read_bandwidth_pass", &read_bandwidth_pass, py::arg("data"), py::arg("bytes"),
        py::arg("threads"));
  m.def("fma_pass", &fma_pass, py::arg("dtype"), py::arg("iterations"), py::arg("threads"));
  m.def("linear", &linear);
  m.def("fingerprint", &fingerprint);
  m.attr("LINEAR_PANEL") = cpu::LINEAR_PANEL;
  m.def("key_page_elements", [](int dtype, int kv_heads, int head_dim) {
    return cpu::key_page_elements(make_heads(dtype, kv_heads, 1, head_dim, head_dim));
  });
  m.def("value_page_elements", [](int dtype, int kv_heads, int value_dim) {
    return cpu::value_page_elements(make_heads(dtype, kv_heads, 1, value_dim, value_dim));
  });

  bind_tensors(m);
  bind_cuda(m);
}

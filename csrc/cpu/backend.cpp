#include "backend.h"

#if defined(HOGWILD_X86)
#include <cpuid.h>
#endif
#if defined(HOGWILD_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace hogwild::cpu {

// ---- instruction sets ---------------------------------------------------------------------

namespace {

#if defined(HOGWILD_X86)
bool has_half_conversion() {  // not every compiler's __builtin_cpu_supports knows f16c
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#if defined(HOGWILD_AVX512_BF16)
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

#if defined(HOGWILD_AMX)
// Linux hands out the tiles' registers to a process that asks for them.
bool has_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

bool cpu_has(const Kernels* k) {
#if defined(HOGWILD_X86)
  __builtin_cpu_init();
#if defined(HOGWILD_AMX)
  if (k == &kernels_amx) return cpu_has(&kernels_avx512_bf16) && has_amx();
#endif
#if defined(HOGWILD_AVX512_BF16)
  if (k == &kernels_avx512_bf16) return cpu_has(&kernels_avx512) && has_avx512_bf16();
#endif
  if (k == &kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (k == &kernels_avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_half_conversion();
#endif
  return k == &kernels_baseline;
}

std::vector<const Kernels*> built() {  // best first
  return {
#if defined(HOGWILD_AMX)
      &kernels_amx,
#endif
#if defined(HOGWILD_AVX512_BF16)
      &kernels_avx512_bf16,
#endif
#if defined(HOGWILD_X86)
      &kernels_avx512, &kernels_avx2,
#endif
      &kernels_baseline};
}

const Kernels& choose() {
  const char* wanted = std::getenv("HOGWILD_ISA");
  std::string names;
  for (const Kernels* k : built()) {
    if (!cpu_has(k)) continue;
    if (!wanted || !*wanted || !std::strcmp(wanted, k->name)) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::runtime_error("HOGWILD_ISA: expected one of " + names + " on this CPU, got '" +
                           wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const Kernels* k : built())
    if (cpu_has(k)) names.push_back(k->name);
  return names;
}

// ---- workspace ----------------------------------------------------------------------------

void Workspace::Free::operator()(void* p) const { std::free(p); }

namespace {

template <class Pointer>
char* reserve(Pointer& memory, int64_t& size, int64_t wanted) {
  if (wanted > size) {
    memory.reset();
    size = 0;
    void* p = nullptr;
    if (posix_memalign(&p, 64, size_t(wanted))) throw std::bad_alloc();
    memory.reset(static_cast<char*>(p));
    size = wanted;
  }
  return memory.get();
}

}  // namespace

char* Workspace::scratch(int threads, int64_t bytes_each) {
  return reserve(scratch_, scratch_size_, threads * bytes_each);
}

float* Workspace::partials(int64_t floats) {
  return reinterpret_cast<float*>(reserve(partials_, partials_size_, floats * 4));
}

// ---- who does what ------------------------------------------------------------------------

namespace {

// Work is all pairs (KV heads, row group), each a list of visits. It is cut into ranges of about
// equal cost, a few a thread, so that threads can share evenly even when one of them is held up. A
// cut close to a pair's end moves there, so that nothing needs merging.
//
//     pair 0            pair 1            pair 2
//     v v v v v v v v | v v v v v v v v | v v v v v v v v
//     --- range 0 ---><-- range 1 --><- range 2 -><- ...
struct Schedule {
  std::vector<WorkRange> ranges;
  std::vector<SplitPair> splits;
  std::vector<int64_t> partials_at;  // of each split, in floats
  int64_t partial_floats = 0;
};

// In units of one key by one row; reading a key costs about as much as eight rows' arithmetic on
// it, entering a visit as much as a short tile.
double visit_cost(const PlanView& plan, const Visit& visit) {
  double rows = 0;
  for (int i = visit.span_begin; i < visit.span_end; ++i)
    rows += plan.spans[i].last - plan.spans[i].first;
  double cost = 0;
  const int64_t worker = plan.parts[plan.spans[visit.span_begin].part].worker;
  for (int c = visit.chunk; c < visit.chunk_end; ++c) {
    const Chunk& chunk = plan.chunks[c];
    if (plan.offsets[worker * plan.num_segments + chunk.segment] == HIDDEN) continue;
    cost += (double(chunk.end) - chunk.begin + 8) * (rows + 8);
  }
  return cost;
}

constexpr double WORTH_A_RANGE = 16384;  // cost below which waking another thread does not pay
constexpr int RANGES_A_THREAD = 4;
constexpr int32_t MOST_HEADS_AT_ONCE = 8;  // whose tiles the second-level cache holds

Schedule make_schedule(const AttendArgs& args, int threads) {
  const PlanView& plan = *args.plan;
  const Heads& heads = args.heads;
  const int head_blocks = (heads.kv_heads + args.heads_at_once - 1) / args.heads_at_once;
  // before[v]: cost of the visits before v, over one pair; a visit's own cost follows.
  std::vector<double> before(plan.num_visits + 1, 0.0);
  for (int v = 0; v < plan.num_visits; ++v)
    before[v + 1] = before[v] + visit_cost(plan, plan.visits[v]) * args.heads_at_once;
  const double a_block = before[plan.num_visits], total = a_block * head_blocks;
  const int pairs = head_blocks * plan.num_groups;

  const double worth = total * heads.head_dim / 64 / WORTH_A_RANGE;
  const int wanted = threads == 1 ? 1 : int(std::min(threads * RANGES_A_THREAD + 0.0, worth + 1));
  std::vector<Cursor> cuts{{0, 0}};
  for (int t = 1; t < wanted; ++t) {
    const double goal = total * t / wanted;
    const int block = std::min(int(goal / a_block), head_blocks - 1);
    const double within = goal - block * a_block;
    int v = int(std::upper_bound(before.begin(), before.end(), within) - before.begin()) - 1;
    v = std::clamp(v, 0, plan.num_visits - 1);
    const int group =
        int(std::upper_bound(plan.groups, plan.groups + plan.num_groups, v,
                             [](int visit, const RowGroup& g) { return visit < g.visit_end; }) -
            plan.groups);
    const RowGroup& g = plan.groups[group];
    Cursor cut{block * plan.num_groups + group, v - g.visit_begin};
    const double slack = 0.1 * total / wanted;
    if (within - before[g.visit_begin] < slack)
      cut.visit = 0;
    else if (before[g.visit_end] - within < slack)
      cut = {cut.pair + 1, 0};
    const Cursor& last = cuts.back();
    if (cut.pair > last.pair || (cut.pair == last.pair && cut.visit > last.visit))
      if (cut.pair < pairs) cuts.push_back(cut);
  }
  cuts.push_back({pairs, 0});

  Schedule s;
  for (size_t i = 0; i + 1 < cuts.size(); ++i)
    s.ranges.push_back({cuts[i], cuts[i + 1], nullptr, nullptr});
  for (size_t i = 1; i + 1 < cuts.size(); ++i)
    if (cuts[i].visit > 0 && (s.splits.empty() || s.splits.back().pair != cuts[i].pair))
      s.splits.push_back({cuts[i].pair, cuts[i].visit, 0, nullptr});

  const int64_t row_floats = padded_value_dim(heads.value_dim) + 2;
  for (SplitPair& split : s.splits) {
    const RowGroup& g = plan.groups[split.pair % plan.num_groups];
    const int64_t blocks = 1 + g.visit_end - g.visit_begin - split.first_stored;
    s.partials_at.push_back(s.partial_floats);
    s.partial_floats += blocks * args.heads_at_once * (g.row_end - g.row_begin) * row_floats;
    for (WorkRange& range : s.ranges) {
      const bool head = range.begin.pair == split.pair && range.begin.visit > 0;
      const bool tail = range.end.pair == split.pair && range.end.visit > 0;
      if (head) range.head = &split;
      if (tail) range.tail = &split;
      split.remaining += head || tail;
    }
  }
  return s;
}

// Heads that lie side by side in plain tensors are read together, as far as that leaves enough to
// share out.
int32_t heads_at_once(const AttendArgs& args, int threads) {
  if (args.keys_values.layout == Layout::Pages) return 1;
  const PlanView& plan = *args.plan;
  const Heads& heads = args.heads;
  for (int32_t s = 0; s < plan.num_segments; ++s) {
    const SegmentRows& rows = args.keys_values.rows[s];
    if (rows.key_head_stride > 2 * heads.head_dim || rows.value_head_stride > 2 * heads.value_dim)
      return 1;
  }
  int32_t count = std::min(heads.kv_heads, MOST_HEADS_AT_ONCE);
  const int wanted = threads == 1 ? 1 : threads * RANGES_A_THREAD;
  while (count > 1 && heads.kv_heads / count * plan.num_visits < wanted) count /= 2;
  return count;
}

void clear_padding(const AttendArgs& args, int32_t padded_queries) {
  const int64_t bytes = args.heads.value_dim * element_size(args.heads.dtype);
  const int32_t num_heads = args.heads.kv_heads * args.heads.group;
  const TokenTensor& out = args.out;
  for (int32_t w = 0; w < args.plan->num_workers; ++w)
    for (int32_t i = args.plan->query_lengths[w]; i < padded_queries; ++i)
      for (int32_t h = 0; h < num_heads; ++h) {
        const int64_t at = w * out.worker_stride + i * out.token_stride + h * out.head_stride;
        std::memset(static_cast<char*>(out.data) + at * element_size(args.heads.dtype), 0, bytes);
        if (args.lse)
          args.lse[w * args.lse_worker_stride + i * args.lse_token_stride + h] =
              -std::numeric_limits<float>::infinity();
      }
}

}  // namespace

// ---- operations ---------------------------------------------------------------------------

void attend(AttendArgs args, int32_t padded_queries, int threads, Workspace& workspace) {
  const Kernels& k = kernels();
  clear_padding(args, padded_queries);
  if (args.plan->num_groups == 0) return;
  args.heads_at_once = heads_at_once(args, threads);
  Schedule schedule = make_schedule(args, threads);
  const int ranges = int(schedule.ranges.size());
  const int64_t scratch_bytes =
      (k.scratch_bytes + (args.heads_at_once - 1) * k.head_scratch_bytes + 63) / 64 * 64;
  char* scratch = workspace.scratch(std::min(threads, ranges), scratch_bytes);
  float* partials = workspace.partials(schedule.partial_floats);
  for (size_t i = 0; i < schedule.splits.size(); ++i)
    schedule.splits[i].partials = partials + schedule.partials_at[i];
  parallel(threads, ranges, [&](int thread, int i) {
    k.attend(args, schedule.ranges[i], scratch + thread * scratch_bytes);
  });
}

void append(const AppendArgs& args, int threads) {
  const Kernels& k = kernels();
  const int32_t tokens = args.plan->num_tokens;
  const int64_t work =
      int64_t(tokens) * args.heads.kv_heads * (args.heads.head_dim + args.heads.value_dim);
  const int pieces = work < 65536 ? 1 : std::min(threads, tokens);
  parallel(threads, pieces, [&](int, int i) {
    k.append(args, int32_t(int64_t(tokens) * i / pieces),
             int32_t(int64_t(tokens) * (i + 1) / pieces));
  });
}

void commit(const CommitArgs& args, int threads) {
  const Kernels& k = kernels();
  parallel(threads, args.layers.num_layers, [&](int, int layer) { k.commit(args, layer); });
}

void copy_pages(const Heads& heads, const LayerPages& layers, const int32_t* source_pages,
                const int32_t* target_pages, int64_t count, int threads) {
  const int64_t key_bytes = key_page_elements(heads) * element_size(heads.dtype);
  const int64_t value_bytes = value_page_elements(heads) * element_size(heads.dtype);
  parallel(threads, layers.num_layers, [&](int, int layer) {
    char* keys = static_cast<char*>(layers.key_pages[layer]);
    char* values = static_cast<char*>(layers.value_pages[layer]);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t from = source_pages[p], to = target_pages[p];
      std::memcpy(keys + to * key_bytes, keys + from * key_bytes, key_bytes);
      std::memcpy(values + to * value_bytes, values + from * value_bytes, value_bytes);
    }
  });
}

void read(const ReadArgs& args) { kernels().read(args); }

uint32_t read_bandwidth_pass(const void* data, int64_t bytes, int threads) {
  constexpr int64_t PIECE = 1 << 20;
  const int pieces = int((bytes + PIECE - 1) / PIECE);
  std::atomic<uint32_t> sum{0};
  parallel(threads, pieces, [&](int, int i) {
    const int64_t begin = i * PIECE;
    const int64_t size = std::min(PIECE, bytes - begin);
    sum += kernels().read_all(static_cast<const char*>(data) + begin, size);
  });
  return sum;
}

uint64_t fingerprint(const void* data, int64_t words, int64_t step, int threads) {
  constexpr int64_t PIECE = 1 << 17;
  constexpr uint64_t ODD = 0x9e3779b97f4a7c15u, OTHER = 0xd1b54a32d192ed03u;
  // Not as within a chain: there, a word more in one and less in another could be the same again.
  const auto mix = [](uint64_t all, uint64_t next) {
    all = (all ^ next) * OTHER;
    return all ^ all >> 32;
  };
  const auto* from = static_cast<const uint32_t*>(data);
  const int pieces = int((words + PIECE - 1) / PIECE);
  std::vector<uint64_t> sums(pieces);
  parallel(words / step < PIECE ? 1 : threads, pieces, [&](int, int i) {
    // Chains of their own, so that multiplications overlap. An odd factor loses nothing: any one
    // word that changes shows.
    uint64_t chains[8] = {};
    const int64_t end = std::min((i + 1) * PIECE, words);
    int64_t w = i * PIECE;
    for (; w + 7 * step < end; w += 8 * step)
      for (int c = 0; c < 8; ++c) chains[c] = chains[c] * ODD + from[w + c * step];
    for (; w < end; w += step) chains[0] = chains[0] * ODD + from[w];
    for (uint64_t chain : chains) sums[i] = mix(sums[i], chain);
  });
  uint64_t all = 0;
  for (uint64_t sum : sums) all = mix(all, sum);
  return all;
}

int64_t fma_pass(DType dtype, int64_t iterations, int threads) {
  const int pieces = 8 * threads;  // so that a thread that is held up does less
  std::atomic<int64_t> done{0};
  parallel(threads, pieces, [&](int, int i) {
    const int64_t share = iterations * (i + 1) / pieces - iterations * i / pieces;
    done += kernels().multiply_add(dtype, share);
  });
  return done;
}

void linear(const LinearArgs& args, int threads) {
  const Kernels& k = kernels();
  const int32_t panels = (args.outputs + LINEAR_PANEL - 1) / LINEAR_PANEL;
  const int64_t work = args.rows * args.inputs * args.outputs;
  parallel(work < 65536 ? 1 : threads, panels, [&](int, int panel) { k.linear(args, panel); });
}

int64_t key_page_elements(const Heads& heads) {
  return int64_t(heads.kv_heads) * TILE * heads.head_dim;
}

int64_t value_page_elements(const Heads& heads) {
  return int64_t(heads.kv_heads) * TILE * padded_value_dim(heads.value_dim);
}

}  // namespace hogwild::cpu

#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>

#if !defined(SANITIZED)
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#endif

namespace fuzz {

// ---- memory -------------------------------------------------------------------------------

namespace {

constexpr size_t BEFORE = 64;
constexpr unsigned char CANARY = 0xa5;

// Memory with a page behind it that nobody may touch, by its size; used again and again.
std::map<size_t, std::vector<char*>>& free_slots() {
  static std::map<size_t, std::vector<char*>> slots;
  return slots;
}

char* take_slot(size_t room) {
  std::vector<char*>& slots = free_slots()[room];
  if (!slots.empty()) {
    char* slot = slots.back();
    slots.pop_back();
    return slot;
  }
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(static_cast<char*>(memory) + room, page, PROT_NONE);
  return static_cast<char*>(memory);
}

}  // namespace

char* Arena::make(size_t bytes, bool aligned) {
#if SANITIZED
  void* start = nullptr;
  if (posix_memalign(&start, aligned ? 64 : 16, std::max<size_t>(bytes, 1))) throw std::bad_alloc();
  blocks_.push_back({static_cast<char*>(start), 0, bytes, 0, 0});
  return static_cast<char*>(start);
#else
  size_t room = size_t(sysconf(_SC_PAGESIZE));
  while (room < bytes + BEFORE + 64) room *= 2;
  char* start = take_slot(room);
  const size_t behind = aligned ? (64 - bytes % 64) % 64 : 0;
  const size_t first = room - bytes - behind;
  std::memset(start + first - BEFORE, CANARY, BEFORE);
  std::memset(start + first + bytes, CANARY, behind);
  blocks_.push_back({start, first, bytes, behind, room});
  return start + first;
#endif
}

void Arena::check() const {
  for (const Block& block : blocks_) {
    if (block.room == 0) continue;
    const char* data = block.start + block.before;
    const auto is_canary = [](char c) { return static_cast<unsigned char>(c) == CANARY; };
    require(std::all_of(data - BEFORE, data, is_canary), "something was written before a block");
    require(std::all_of(data + block.bytes, data + block.bytes + block.behind, is_canary),
            "something was written behind a block");
  }
}

Arena::~Arena() {
  for (const Block& block : blocks_) {
    if (block.room)
      free_slots()[block.room].push_back(block.start);
    else
      std::free(block.start);
  }
}

// ---- numbers ------------------------------------------------------------------------------

namespace {

uint16_t half_bits(const void* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}

}  // namespace

double widen(DType dtype, const void* element) {
  if (dtype == DType::Float32) {
    float x;
    std::memcpy(&x, element, 4);
    return x;
  }
  const uint16_t h = half_bits(element);
  if (dtype == DType::BFloat16) {
    const uint32_t u = uint32_t(h) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent > 0 && exponent < 31) {
    const uint64_t u = uint64_t(h & 0x8000) << 48 | uint64_t(exponent + 1023 - 15) << 52 |
                       uint64_t(fraction) << 42;
    double x;
    std::memcpy(&x, &u, 8);
    return x;
  }
  const double sign = h & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return fraction ? std::nan("") : sign * INFINITY;
  return sign * std::ldexp(fraction, -24);
}

void put(DType dtype, void* element, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (dtype == DType::Float32) {
    std::memcpy(element, &x, 4);
    return;
  }
  uint16_t h;
  if (dtype == DType::BFloat16) {
    h = uint16_t(u >> 16) | (x != x ? 0x40 : 0);
  } else if (x != x) {
    h = 0x7e00;
  } else {
    const int exponent = int(u >> 23 & 0xff) - 127;
    h = uint16_t(u >> 16 & 0x8000);
    if (exponent > 15)
      h |= 0x7c00;
    else if (exponent >= -14)
      h |= uint16_t((exponent + 15) << 10 | (u >> 13 & 0x3ff));
    else if (exponent >= -24)
      h |= uint16_t((0x400 | (u >> 13 & 0x3ff)) >> (-14 - exponent));
  }
  std::memcpy(element, &h, 2);
}

double epsilon(DType dtype) {
  return dtype == DType::Float32 ? 0x1p-24 : dtype == DType::Float16 ? 0x1p-11 : 0x1p-8;
}

double step(DType dtype) { return dtype == DType::Float16 ? 0x1p-24 : 1e-37; }

Data draw_data(Rng& rng) {
  return rng.pick({Data::Normal, Data::Normal, Data::Normal, Data::Normal, Data::Outliers,
                   Data::Same, Data::Small, Data::Large});
}

namespace {

constexpr uint32_t TABLE = 1 << 13;

const float* normals() {
  static const std::vector<float> table = [] {
    Rng rng(1, 2);
    std::vector<float> numbers(TABLE);
    for (float& x : numbers)
      x = float(std::sqrt(-2 * std::log(1 - rng.uniform())) *
                std::cos(6.283185307 * rng.uniform()));
    return numbers;
  }();
  return table.data();
}

}  // namespace

Numbers::Numbers(Rng& rng, Data data)
    : data_(data),
      at_(uint32_t(rng.next())),
      outlier_(int(rng.range(0, 7))),
      same_(float(rng.range(-3, 3))) {}

float Numbers::of(int d) {
  const float x = normals()[at_++ % TABLE];
  switch (data_) {
    case Data::Normal: return x;
    case Data::Outliers: return d % 32 == outlier_ ? 25.f + x : x;
    case Data::Same: return same_;
    case Data::Small: return x * 1e-4f;
    case Data::Large: return x * 12.f;
    case Data::Nan: return std::nanf("");
  }
  return x;
}

// ---- tensors ------------------------------------------------------------------------------

void Tensor::fill(Rng& rng, Data data) {
  Numbers numbers(rng, data);
  for (int64_t i = 0; i < n[0]; ++i)
    for (int64_t j = 0; j < n[1]; ++j)
      for (int64_t k = 0; k < n[2]; ++k)
        for (int d = 0; d < dim; ++d) put(dtype, at(i, j, k, d), numbers.of(d));
}

Tensor draw_tensor(Arena& arena, Rng& rng, DType dtype, int64_t n0, int64_t n1, int64_t n2, int dim,
                   bool is_output) {
  Tensor t{dtype, {n0, n1, n2}, dim};
  int order[3] = {2, 1, 0};  // from the innermost
  const bool plain = rng.chance(0.3);
  if (!plain)
    for (int i = 2; i > 0; --i) std::swap(order[i], order[rng.range(0, i)]);
  int64_t extent = dim;
  for (int axis : order) {
    if (!plain) extent += rng.pick({0, 0, 1, 3, 8, 13});
    t.stride[axis] = extent;
    if (!plain && !is_output && rng.chance(0.07))
      t.stride[axis] = 0;
    else
      extent *= std::max<int64_t>(t.n[axis], 1);
  }
  int64_t elements = 0;
  if (n0 && n1 && n2) {
    elements = dim;
    for (int axis = 0; axis < 3; ++axis) elements += (t.n[axis] - 1) * t.stride[axis];
  }
  const int64_t size = element_size(dtype);
  const int64_t shift = rng.chance(0.5) ? rng.range(1, 7) * size : 0;  // from where malloc has it
  t.bytes = elements * size;
  t.data = arena.make(size_t(t.bytes + shift)) + shift;
  t.fill_bytes(0xff);  // NaN in every type
  if (elements == 0 && rng.chance(0.5)) t.data = nullptr;
  return t;
}

}  // namespace fuzz

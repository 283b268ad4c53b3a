// See engine.h. A warp's registers are arrays of 32 lanes; an opcode is a function on them, found
// by its full name, types and modifiers included, so that a name that is not in the table is
// refused.
//
// Warps of a block run one after the other, each until a barrier. Lanes of a warp that part run the
// part with the smallest program counter first, so that they meet again where the code does.
//
// Registers of 64 bits know which buffer an address in them belongs to, as a pointer of C++ does:
// an access that leaves it is seen even if it hits another buffer.

#include "engine.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr int LANES = 32;
constexpr u32 ALL = ~0u;
constexpr int GRANULE = 2;  // bytes that are watched together
constexpr u64 MOST_INSTRUCTIONS = u64(1) << 24;  // of a block

std::string last_error;
int checks = 1;
EmuCounters counters;

// ---- programs -----------------------------------------------------------------------------

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32 mask);

struct Instruction {
  Handler run;
  int kind;  // see below
  int predicate = -1;  // offset of its register, or -1
  bool negated = false;
  int d[4], s[10];  // offsets of registers
  int num_d = 0, num_s = 0;
  s64 immediate = 0;  // of an address, or a count
  int target = -1;
  int file = 0, line = 0, ptx_line = 0;
};

enum Kind { PLAIN, BRANCH, EXIT, BARRIER };

struct Special {
  int offset;
  std::string name;
};

struct Constant {
  int offset, width;
  u64 value;
};

struct Program {
  std::string name;
  EmuKernelInfo info{};
  std::vector<int> param_bytes;
  int register_bytes = 0;
  std::vector<Constant> constants;
  std::vector<Special> specials;
  std::vector<Instruction> code;
  std::vector<std::string> files;
  std::vector<u64> line_counts;
};

std::map<std::string, std::unique_ptr<Program>>& programs() {
  static std::map<std::string, std::unique_ptr<Program>> all;
  return all;
}

// ---- findings -----------------------------------------------------------------------------

struct Found {
  std::string kind, kernel, file;
  EmuFinding public_part;
};
std::vector<std::unique_ptr<Found>> findings;
std::map<std::string, size_t> finding_places;

// ---- global memory ------------------------------------------------------------------------

// Who touched a granule last.
struct Touch {
  u32 write_launch = 0, writer = 0;  // a block
  u32 read_launch = 0, reader = 0;  // a block or SEVERAL, and perhaps NON_COHERENT
};
constexpr u32 SEVERAL = 0x7fffffff;
constexpr u32 NON_COHERENT = 0x80000000;  // through ld.global.nc

// What is known of a piece of memory, made when a kernel touches it first: a cache may be large.
constexpr u64 SHADOW = 1 << 12;  // granules
struct Shadow {
  u8 initialised[SHADOW];
  Touch touches[SHADOW] = {};
  explicit Shadow(u8 known) { std::fill_n(initialised, SHADOW, known); }
};

struct Region {
  u64 begin, end;
  u8 known;  // whether all of it was initialised at first
  std::vector<std::unique_ptr<Shadow>> shadows;

  bool has(u64 address, u64 bytes) const { return address >= begin && address + bytes <= end; }
  Shadow& shadow(u64 granule) {
    auto& s = shadows[granule / SHADOW];
    if (!s) s = std::make_unique<Shadow>(known);
    return *s;
  }
};

std::map<u64, std::unique_ptr<Region>> regions;  // by address
u32 launch_serial = 0;

// The regions in the order of their addresses; a buffer's number is its place here, and one more.
struct Placed {
  Region* region;
  u64 highest_end;  // of this one and all before it
};
std::vector<Placed> placed;
using Buffer = u16;
constexpr Buffer UNKNOWN = 0;

void place_regions() {
  placed.clear();
  for (auto& [begin, region] : regions)
    placed.push_back({region.get(), placed.empty()
                                        ? region->end
                                        : std::max(region->end, placed.back().highest_end)});
}

Region* region_of(Buffer buffer) { return buffer == UNKNOWN ? nullptr : placed[buffer - 1].region; }

// The region that has these bytes. Regions may lie within each other: the one that begins last.
Buffer find_buffer(u64 address, u64 bytes) {
  const auto after = std::upper_bound(placed.begin(), placed.end(), address,
                                      [](u64 a, const Placed& p) { return a < p.region->begin; });
  for (size_t n = after - placed.begin(); n && placed[n - 1].highest_end > address; --n)
    if (placed[n - 1].region->has(address, bytes)) return Buffer(n);
  return UNKNOWN;
}

// ---- blocks and warps ---------------------------------------------------------------------

struct SharedGranule {
  s32 write_epoch = -1, read_epoch = -1;
  u32 write_moment = 0, read_moment = 0;  // the warp's, see Warp::moment
  s16 write_warp = -1, read_warp = -1;  // -2: several
  s8 write_lane = -1, read_lane = -1;  // -2: several
  u8 initialised = 0, in_flight = 0;
};

struct Block {
  Program& program;
  const u8* params;
  u64 param_bytes;
  int id;
  u32 index[3], grid[3], size[3];
  int threads;
  std::vector<u8> shared;
  std::vector<SharedGranule> granules;
  s32 epoch = 0;
};

struct Copy {
  u32 to;
  int bytes, group;
  u8 data[16];
};

struct Warp {
  Block& block;
  int number;
  u32 alive;
  std::vector<u64> storage;
  int pc = 0;  // of all lanes that are alive, if they are together
  bool together = true;
  int pcs[LANES];
  bool waiting = false;
  u32 moment = 0;  // counts what orders memory within the warp
  int group[LANES] = {};  // of copies
  std::vector<Copy> copies[LANES];
  const Instruction* current = nullptr;

  Warp(Block& b, int n) : block(b), number(n), storage((b.program.register_bytes + 7) / 8) {
    const int first = n * LANES;
    alive = b.threads - first >= LANES ? ALL : (1u << (b.threads - first)) - 1;
  }

  template <class T>
  T* reg(int offset) {
    return reinterpret_cast<T*>(reinterpret_cast<u8*>(storage.data()) + offset);
  }
  // Of a register of 64 bits: the buffers that its addresses point into.
  Buffer* buffers(int offset) { return reg<Buffer>(offset + LANES * 8); }
  int thread(int lane) const { return number * LANES + lane; }

  void report(const char* kind, int lane, u64 address = 0, int other = -1) {
    const Instruction& i = *current;
    const std::string place =
        std::string(kind) + "|" + block.program.name + "|" + std::to_string(i.ptx_line);
    const auto found = finding_places.find(place);
    if (found != finding_places.end()) {
      ++findings[found->second]->public_part.count;
      return;
    }
    auto f = std::make_unique<Found>();
    f->kind = kind;
    f->kernel = block.program.name;
    if (i.file < int(block.program.files.size())) f->file = block.program.files[i.file];
    f->public_part = {f->kind.c_str(),
                      f->kernel.c_str(),
                      f->file.c_str(),
                      i.line,
                      i.ptx_line,
                      block.id,
                      lane < 0 ? -1 : thread(lane),
                      other,
                      address,
                      1};
    finding_places[place] = findings.size();
    findings.push_back(std::move(f));
  }
};

// ---- watching -----------------------------------------------------------------------------

// `written`: what is about to be stored; null for a read. False if the access must not be made.
bool watch_shared(Warp& w, int lane, u64 address, int bytes, const u8* written) {
  Block& b = w.block;
  if (address + bytes > b.shared.size()) {
    w.report(written ? "shared write out of bounds" : "shared read out of bounds", lane, address);
    return false;
  }
  if (address % bytes) {
    w.report("misaligned shared access", lane, address);
    return false;
  }
  if (!checks) return true;
  const auto same = [&] { return std::memcmp(&b.shared[address], written, bytes) == 0; };
  for (u64 g = address / GRANULE; g <= (address + bytes - 1) / GRANULE; ++g) {
    SharedGranule& s = b.granules[g];
    const int writer = s.write_warp * LANES + s.write_lane;
    if (s.in_flight)
      w.report(
          written ? "overwrites data of an unfinished copy" : "reads data of an unfinished copy",
          lane, address, writer);
    if (s.write_epoch == b.epoch) {
      if (s.write_warp != w.number)
        w.report(!written ? "race of a shared read with a write of another warp"
                 : same() ? "race of shared writes between warps, of the same value"
                          : "race of shared writes between warps",
                 lane, address, writer);
      else if (s.write_lane != lane && s.write_moment == w.moment)
        w.report(!written ? "race of a shared read with a write within a warp"
                 : same() ? "race of shared writes within a warp, of the same value"
                          : "race of shared writes within a warp",
                 lane, address, writer);
    }
    const bool read = s.read_epoch == b.epoch, read_here = read && s.read_warp == w.number,
               read_now = read_here && s.read_moment == w.moment;
    if (written) {
      if (read && !read_here)
        w.report("race of a shared write with a read of another warp", lane, address);
      if (read_now && s.read_lane != lane)
        w.report("race of a shared write with a read within a warp", lane, address);
      s.write_epoch = b.epoch;
      s.write_warp = s16(w.number);
      s.write_lane = s8(lane);
      s.write_moment = w.moment;
      s.initialised = 1;
    } else {
      if (!s.initialised) w.report("reads uninitialised shared memory", lane, address);
      s.read_warp = s16(read && !read_here ? -2 : w.number);
      s.read_lane = s8(read_now && s.read_lane != lane ? -2 : lane);
      s.read_epoch = b.epoch;
      s.read_moment = w.moment;
    }
  }
  return true;
}

// The same for global memory; `buffer` is what the address was made from.
bool watch_global(Warp& w, int lane, u64 address, Buffer buffer, int bytes, int alignment,
                  const u8* written, bool non_coherent = false) {
  if (address % alignment) {
    w.report("misaligned global access", lane, address);
    return false;
  }
  Region* r = region_of(buffer != UNKNOWN ? buffer : find_buffer(address, bytes));
  if (!r || !r->has(address, bytes)) {
    w.report(written ? "global write out of bounds" : "global read out of bounds", lane, address);
    return false;
  }
  if (!checks) return true;
  const u32 me = u32(w.block.id);
  const auto same = [&] {
    return std::memcmp(reinterpret_cast<const u8*>(address), written, bytes) == 0;
  };
  for (u64 g = (address - r->begin) / GRANULE; g <= (address + bytes - 1 - r->begin) / GRANULE;
       ++g) {
    Shadow& shadow = r->shadow(g);
    Touch& t = shadow.touches[g % SHADOW];
    const bool was_written = t.write_launch == launch_serial,
               was_read = t.read_launch == launch_serial;
    if (was_written && t.writer != me)
      w.report(!written ? "race of a global read with a write of another block"
               : same() ? "race of global writes between blocks, of the same value"
                        : "race of global writes between blocks",
               lane, address);
    if (written) {
      if (was_read && (t.reader & ~NON_COHERENT) != me)
        w.report("race of a global write with a read of another block", lane, address);
      if (was_read && t.reader & NON_COHERENT)
        w.report("writes what the launch reads as constant", lane, address);
      t.write_launch = launch_serial;
      t.writer = me;
      shadow.initialised[g % SHADOW] = 1;
    } else {
      if (!shadow.initialised[g % SHADOW])
        w.report("reads uninitialised global memory", lane, address);
      if (was_written && non_coherent)
        w.report("reads as constant what the launch writes", lane, address);
      const u32 readers = was_read && (t.reader & ~NON_COHERENT) != me ? SEVERAL : me;
      const u32 earlier = was_read ? t.reader & NON_COHERENT : 0;
      t.reader = readers | earlier | (non_coherent ? NON_COHERENT : 0);
      t.read_launch = launch_serial;
    }
  }
  return true;
}

// Passes that shared memory takes for accesses of `bytes` each: lanes go together as long as 128
// bytes are not exceeded, and each bank serves one word at a time.
void count_wavefronts(const u64* address, u32 mask, int bytes) {
  const int together = bytes <= 4 ? LANES : bytes == 8 ? LANES / 2 : LANES / 4;
  for (int first = 0; first < LANES; first += together) {
    u64 words[LANES][LANES];
    int count[LANES] = {}, most = 0;
    for (int l = first; l < first + together; ++l) {
      if (!(mask >> l & 1)) continue;
      for (u64 word = address[l] / 4; word <= (address[l] + bytes - 1) / 4; ++word) {
        const u64 bank = word % LANES;
        if (std::find(words[bank], words[bank] + count[bank], word) != words[bank] + count[bank])
          continue;
        words[bank][count[bank]++] = word;
        most = std::max(most, count[bank]);
      }
    }
    counters.wavefronts += most;
    counters.least_wavefronts += most > 0;
  }
}

void count_sectors(const u64* address, u32 mask, int bytes, u64& counter) {
  u64 sectors[LANES * 2];
  int n = 0;
  for (int l = 0; l < LANES; ++l)
    if (mask >> l & 1)
      for (u64 s = address[l] / 32; s <= (address[l] + bytes - 1) / 32; ++s) sectors[n++] = s;
  std::sort(sectors, sectors + n);
  counter += std::unique(sectors, sectors + n) - sectors;
}

// ---- numbers ------------------------------------------------------------------------------

float from_bf16(u16 x) { return std::bit_cast<float>(u32(x) << 16); }
u16 to_bf16(float x) {
  if (x != x) return 0x7fff;
  const u32 bits = std::bit_cast<u32>(x);
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_f16(u16 x) { return float(std::bit_cast<_Float16>(x)); }
u16 to_f16(float x) { return x != x ? u16(0x7fff) : std::bit_cast<u16>(_Float16(x)); }
float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

// ---- element by element -------------------------------------------------------------------

#define FOR_ACTIVE(l)             \
  for (int l = 0; l < LANES; ++l) \
    if (mask >> l & 1)

// Results go through an array of their own, which lets the compiler use vectors even though
// destination and source may be one register.
template <class D, class F>
void store_lanes(D* d, u32 mask, F result_of) {
  if (mask == ALL) {
    D result[LANES];
    for (int l = 0; l < LANES; ++l) result[l] = result_of(l);
    std::memcpy(d, result, sizeof result);
  } else {
    FOR_ACTIVE(l) d[l] = result_of(l);
  }
}

// The buffers of a result of 64 bits: what `buffer_of` a lane says.
template <class D, class F>
void store_buffers(Warp& w, const Instruction& i, u32 mask, F buffer_of) {
  if constexpr (sizeof(D) == 8) store_lanes(w.buffers(i.d[0]), mask, buffer_of);
}

template <class D, class S, class F>
void unary(Warp& w, const Instruction& i, u32 mask) {
  const S* a = w.reg<S>(i.s[0]);
  store_buffers<D>(w, i, mask, [&](int l) { return F::ADDRESS ? w.buffers(i.s[0])[l] : UNKNOWN; });
  store_lanes(w.reg<D>(i.d[0]), mask, [&](int l) -> D { return F()(a[l]); });
}

// Of two operands at most one is an address.
template <class D, class S, class F, class B = S>
void binary(Warp& w, const Instruction& i, u32 mask) {
  const S* a = w.reg<S>(i.s[0]);
  const B* b = w.reg<B>(i.s[1]);
  store_buffers<D>(w, i, mask, [&](int l) -> Buffer {
    if constexpr (!F::ADDRESS || sizeof(B) != 8) return UNKNOWN;
    const Buffer x = w.buffers(i.s[0])[l], y = w.buffers(i.s[1])[l];
    return x && y ? UNKNOWN : x | y;
  });
  store_lanes(w.reg<D>(i.d[0]), mask, [&](int l) -> D { return F()(a[l], b[l]); });
}

template <class D, class S, class F, class C = D>
void ternary(Warp& w, const Instruction& i, u32 mask) {
  const S *a = w.reg<S>(i.s[0]), *b = w.reg<S>(i.s[1]);
  const C* c = w.reg<C>(i.s[2]);
  store_buffers<D>(w, i, mask, [&](int l) { return w.buffers(i.s[2])[l]; });
  store_lanes(w.reg<D>(i.d[0]), mask, [&](int l) -> D { return F()(a[l], b[l], c[l]); });
}

// What the operations have in common: whether an address stays one.
struct NoAddress {
  static constexpr bool ADDRESS = false;
};
struct MayBeAddress {
  static constexpr bool ADDRESS = true;
};

// Of float32 arithmetic: a result that is not a number has no payload.
template <class F>
struct Canonical : NoAddress {
  template <class... Ts>
  float operator()(Ts... operands) const {
    const float x = F()(operands...);
    return x == x ? x : std::bit_cast<float>(0x7fffffffu);
  }
};

struct Move : MayBeAddress {
  template <class T>
  T operator()(T a) const {
    return a;
  }
};
struct Not : NoAddress {
  template <class T>
  T operator()(T a) const {
    return T(~a);
  }
};
template <class T>
using Unsigned = std::make_unsigned_t<T>;

struct Add : MayBeAddress {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return T(Unsigned<T>(a) + Unsigned<T>(b));
    else
      return a + b;
  }
};
struct Sub : MayBeAddress {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return T(Unsigned<T>(a) - Unsigned<T>(b));
    else
      return a - b;
  }
};
struct MulLow : NoAddress {
  template <class T>
  T operator()(T a, T b) const {
    return T(u64(a) * u64(b));
  }
};
struct MulHigh : NoAddress {
  template <class T>
  T operator()(T a, T b) const {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
  }
};
template <class D>
struct MulWide : NoAddress {
  template <class T>
  D operator()(T a, T b) const {
    return D(D(a) * D(b));
  }
};
struct MadLow : NoAddress {
  template <class T>
  T operator()(T a, T b, T c) const {
    return T(u64(a) * u64(b) + u64(c));
  }
};
template <class D>
struct MadWide : NoAddress {
  template <class T>
  D operator()(T a, T b, D c) const {
    return D(u64(D(a) * D(b)) + u64(c));
  }
};
struct Div : NoAddress {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return T(~T(0));
    if (std::is_signed_v<T> && b == T(-1)) return T(0 - Unsigned<T>(a));
    return T(a / b);
  }
};
struct Rem : NoAddress {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
  }
};
struct Neg : NoAddress {
  template <class T>
  T operator()(T a) const {
    if constexpr (std::is_integral_v<T>)
      return T(0 - Unsigned<T>(a));
    else
      return -a;
  }
};
struct Abs : NoAddress {
  template <class T>
  T operator()(T a) const {
    if constexpr (std::is_integral_v<T>)
      return a < 0 ? T(0 - Unsigned<T>(a)) : a;
    else
      return std::fabs(a);
  }
};
struct Min : NoAddress {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return std::min(a, b);
    else
      return a != a             ? b
             : b != b           ? a
             : a == 0 && b == 0 ? (std::signbit(a) ? a : b)
                                : std::min(a, b);
  }
};
struct Max : NoAddress {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return std::max(a, b);
    else
      return a != a             ? b
             : b != b           ? a
             : a == 0 && b == 0 ? (std::signbit(a) ? b : a)
                                : std::max(a, b);
  }
};
struct And : MayBeAddress {
  template <class T>
  T operator()(T a, T b) const {
    return T(a & b);
  }
};
struct Or : MayBeAddress {
  template <class T>
  T operator()(T a, T b) const {
    return T(a | b);
  }
};
struct Xor : NoAddress {
  template <class T>
  T operator()(T a, T b) const {
    return T(a ^ b);
  }
};
struct ShiftLeft : NoAddress {
  template <class T>
  T operator()(T a, u32 b) const {
    return b >= 8 * sizeof(T) ? T(0) : T(a << b);
  }
};
struct ShiftRight : NoAddress {
  template <class T>
  T operator()(T a, u32 b) const {
    if (b >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
    return T(a >> b);
  }
};
struct Mul : NoAddress {
  float operator()(float a, float b) const { return a * b; }
};
struct DivF : NoAddress {
  float operator()(float a, float b) const { return a / b; }
};
struct Fma : NoAddress {
  float operator()(float a, float b, float c) const { return std::fma(a, b, c); }
};
// Rounded towards minus infinity.
struct FmaDown : NoAddress {
  float operator()(float a, float b, float c) const {
    if (!std::isfinite(a) || !std::isfinite(b) || !std::isfinite(c)) return std::fma(a, b, c);
    const double product = double(a) * b, sum = product + c;  // the product is exact
    const double part = sum - product, rest = (product - (sum - part)) + (c - part);
    if (sum == 0 && rest == 0) return std::signbit(product) || std::signbit(c) ? -0.f : 0.f;
    const float near = float(sum);
    return double(near) - sum > rest ? std::nextafter(near, -HUGE_VALF) : near;
  }
};
struct AddDown : NoAddress {
  float operator()(float a, float b) const { return FmaDown()(a, 1.f, b); }
};
struct CopySign : NoAddress {
  float operator()(float a, float b) const { return std::copysign(b, a); }
};
struct Reciprocal : NoAddress {
  float operator()(float a) const { return 1.f / a; }
};
struct SquareRoot : NoAddress {
  float operator()(float a) const { return std::sqrt(a); }
};
struct ReciprocalFlushed : NoAddress {
  float operator()(float a) const { return flush(1.f / flush(a)); }
};
struct Exp2Flushed : NoAddress {
  float operator()(float a) const { return flush(float(std::exp2(double(flush(a))))); }
};
struct Log2 : NoAddress {
  float operator()(float a) const { return float(std::log2(double(a))); }
};
template <class D>
struct Convert : NoAddress {
  template <class T>
  D operator()(T a) const {
    return D(a);
  }
};
template <class D>
struct ConvertSaturating : NoAddress {  // to integers, rounding towards zero
  D operator()(float a) const {
    if (a != a) return 0;
    if (double(a) >= double(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
    if (double(a) <= double(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
    return D(a);
  }
};
struct NarrowF16 : NoAddress {
  u16 operator()(float a) const { return to_f16(a); }
};
struct NarrowBF16 : NoAddress {
  u16 operator()(float a) const { return to_bf16(a); }
};
struct WidenF16 : NoAddress {
  float operator()(u16 a) const { return from_f16(a); }
};
struct WidenBF16 : NoAddress {
  float operator()(u16 a) const { return from_bf16(a); }
};
struct PackF16 : NoAddress {
  u32 operator()(float high, float low) const { return u32(to_f16(high)) << 16 | to_f16(low); }
};
struct PackBF16 : NoAddress {
  u32 operator()(float high, float low) const { return u32(to_bf16(high)) << 16 | to_bf16(low); }
};
struct MaxPairBF16 : NoAddress {
  u32 operator()(u32 a, u32 b) const {
    auto larger = [](u16 x, u16 y) -> u32 {
      const float fx = from_bf16(x), fy = from_bf16(y);
      if (fx != fx && fy != fy) return 0x7fff;
      return to_bf16(Max()(fx, fy));
    };
    return larger(u16(a >> 16), u16(b >> 16)) << 16 | larger(u16(a), u16(b));
  }
};

// bfi: the low `length` bits of a into b at `position`.
void insert_bits(Warp& w, const Instruction& i, u32 mask) {
  u32* d = w.reg<u32>(i.d[0]);
  const u32 *a = w.reg<u32>(i.s[0]), *b = w.reg<u32>(i.s[1]), *c = w.reg<u32>(i.s[2]),
            *n = w.reg<u32>(i.s[3]);
  FOR_ACTIVE(l) {
    const u32 position = c[l] & 255, length = n[l] & 255;
    u64 field = length >= 32 ? ALL : (u64(1) << length) - 1;
    field = position >= 32 ? 0 : field << position;
    const u64 bits = position >= 32 ? 0 : u64(a[l]) << position;
    d[l] = u32((b[l] & ~field) | (bits & field));
  }
}

// ---- predicates ---------------------------------------------------------------------------

enum class Compare { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };

template <Compare C, class T>
bool compare(T a, T b) {
  const bool unordered = a != a || b != b;
  if constexpr (C == Compare::NUM) return !unordered;
  if constexpr (C == Compare::NAN_) return unordered;
  constexpr bool or_unordered = C >= Compare::EQU && C <= Compare::GEU;
  if (unordered) return or_unordered;
  constexpr int basic = int(C) - (or_unordered ? int(Compare::EQU) : 0);
  switch (basic) {
    case 0: return a == b;
    case 1: return a != b;
    case 2: return a < b;
    case 3: return a <= b;
    case 4: return a > b;
    default: return a >= b;
  }
}

template <Compare C, class T>
void set_predicate(Warp& w, const Instruction& i, u32 mask) {
  const T *a = w.reg<T>(i.s[0]), *b = w.reg<T>(i.s[1]);
  u32 result = 0;
  FOR_ACTIVE(l) result |= u32(compare<C, T>(a[l], b[l])) << l;
  u32& d = *w.reg<u32>(i.d[0]);
  d = (d & ~mask) | (result & mask);
}

template <class F>
void predicate_logic(Warp& w, const Instruction& i, u32 mask) {
  const u32 a = *w.reg<u32>(i.s[0]), b = i.num_s > 1 ? *w.reg<u32>(i.s[1]) : 0;
  u32& d = *w.reg<u32>(i.d[0]);
  d = (d & ~mask) | (F()(a, b) & mask);
}
struct PredicateMove {
  u32 operator()(u32 a, u32) const { return a; }
};
struct PredicateNot {
  u32 operator()(u32 a, u32) const { return ~a; }
};
struct PredicateAnd {
  u32 operator()(u32 a, u32 b) const { return a & b; }
};
struct PredicateOr {
  u32 operator()(u32 a, u32 b) const { return a | b; }
};
struct PredicateXor {
  u32 operator()(u32 a, u32 b) const { return a ^ b; }
};

template <class T>
void select(Warp& w, const Instruction& i, u32 mask) {
  const T *a = w.reg<T>(i.s[0]), *b = w.reg<T>(i.s[1]);
  const u32 p = *w.reg<u32>(i.s[2]);
  store_buffers<T>(w, i, mask, [&](int l) { return w.buffers(i.s[p >> l & 1 ? 0 : 1])[l]; });
  store_lanes(w.reg<T>(i.d[0]), mask, [&](int l) { return p >> l & 1 ? a[l] : b[l]; });
}

// ---- vectors in registers -----------------------------------------------------------------

template <class Whole, class Half>
void pack(Warp& w, const Instruction& i, u32 mask) {
  const Half *a = w.reg<Half>(i.s[0]), *b = w.reg<Half>(i.s[1]);
  store_buffers<Whole>(w, i, mask, [](int) { return UNKNOWN; });
  store_lanes(w.reg<Whole>(i.d[0]), mask,
              [&](int l) { return Whole(a[l]) | Whole(b[l]) << (8 * sizeof(Half)); });
}

template <class Whole, class Half>
void unpack(Warp& w, const Instruction& i, u32 mask) {
  const Whole* a = w.reg<Whole>(i.s[0]);
  Half *low = w.reg<Half>(i.d[0]), *high = w.reg<Half>(i.d[1]);
  FOR_ACTIVE(l) {
    const Whole x = a[l];
    low[l] = Half(x);
    high[l] = Half(x >> (8 * sizeof(Half)));
  }
}

// ---- memory -------------------------------------------------------------------------------
// d or s: values, N of them; the last source is the register of the address.

template <class T>
u64 address_of(Warp& w, const Instruction& i, int lane) {
  return T(w.reg<T>(i.s[i.num_s - 1])[lane] + T(i.immediate));
}

// Value `n` of a lane, from memory into its register.
template <class Register, class T>
void load_value(Warp& w, const Instruction& i, int lane, int n, const u8* from) {
  T x;
  std::memcpy(&x, from + n * sizeof(T), sizeof(T));
  w.reg<Register>(i.d[n])[lane] = Register(x);
  if constexpr (sizeof(Register) == 8)
    w.buffers(i.d[n])[lane] = sizeof(T) == 8 ? find_buffer(u64(x), 1) : UNKNOWN;
}

template <class Register, class T, int N>
void load_param(Warp& w, const Instruction& i, u32 mask) {
  FOR_ACTIVE(l) {
    const u64 at = address_of<u64>(w, i, l);
    if (at + N * sizeof(T) > w.block.param_bytes) {
      w.report("parameter out of bounds", l, at);
      continue;
    }
    for (int n = 0; n < N; ++n) load_value<Register, T>(w, i, l, n, w.block.params + at);
  }
}

template <class Register, class T, int N, bool NON_COHERENT_READ>
void load_global(Warp& w, const Instruction& i, u32 mask) {
  u64 address[LANES];
  Buffer buffer[LANES];
  constexpr int bytes = N * sizeof(T);
  FOR_ACTIVE(l) address[l] = address_of<u64>(w, i, l);
  std::memcpy(buffer, w.buffers(i.s[0]), sizeof buffer);
  if (checks) count_sectors(address, mask, bytes, counters.load_sectors);
  FOR_ACTIVE(l) {
    if (!watch_global(w, l, address[l], buffer[l], bytes, bytes, nullptr, NON_COHERENT_READ))
      continue;
    const auto* from = reinterpret_cast<const u8*>(address[l]);
    for (int n = 0; n < N; ++n) load_value<Register, T>(w, i, l, n, from);
  }
}

// The values of a lane as they stand in memory.
template <class Register, class T, int N>
void gather_values(Warp& w, const Instruction& i, int lane, T* values) {
  for (int n = 0; n < N; ++n) values[n] = T(w.reg<Register>(i.s[n])[lane]);
}

template <class Register, class T, int N>
void store_global(Warp& w, const Instruction& i, u32 mask) {
  u64 address[LANES];
  T values[N];
  FOR_ACTIVE(l) address[l] = address_of<u64>(w, i, l);
  if (checks) count_sectors(address, mask, sizeof values, counters.store_sectors);
  FOR_ACTIVE(l) {
    gather_values<Register, T, N>(w, i, l, values);
    if (watch_global(w, l, address[l], w.buffers(i.s[N])[l], sizeof values, sizeof values,
                     reinterpret_cast<const u8*>(values)))
      std::memcpy(reinterpret_cast<u8*>(address[l]), values, sizeof values);
  }
}

template <class Address, class Register, class T, int N>
void load_shared(Warp& w, const Instruction& i, u32 mask) {
  u64 address[LANES];
  constexpr int bytes = N * sizeof(T);
  FOR_ACTIVE(l) address[l] = address_of<Address>(w, i, l);
  if (checks) count_wavefronts(address, mask, bytes);
  FOR_ACTIVE(l) {
    if (!watch_shared(w, l, address[l], bytes, nullptr)) continue;
    for (int n = 0; n < N; ++n) load_value<Register, T>(w, i, l, n, &w.block.shared[address[l]]);
  }
}

template <class Address, class Register, class T, int N>
void store_shared(Warp& w, const Instruction& i, u32 mask) {
  u64 address[LANES];
  T values[N];
  FOR_ACTIVE(l) address[l] = address_of<Address>(w, i, l);
  if (checks) count_wavefronts(address, mask, sizeof values);
  FOR_ACTIVE(l) {
    gather_values<Register, T, N>(w, i, l, values);
    if (watch_shared(w, l, address[l], sizeof values, reinterpret_cast<const u8*>(values)))
      std::memcpy(&w.block.shared[address[l]], values, sizeof values);
  }
}

// cp.async: s = shared address, global address, bytes to read (the rest is zero).
template <class Address>
void copy_async(Warp& w, const Instruction& i, u32 mask) {
  constexpr u32 BYTES = 16;
  u32 reading = 0;
  u64 to[LANES], from[LANES];
  FOR_ACTIVE(l) {
    to[l] = w.reg<Address>(i.s[0])[l];
    from[l] = w.reg<u64>(i.s[1])[l];
    if (w.reg<u32>(i.s[2])[l]) reading |= 1u << l;
  }
  if (checks) {
    count_wavefronts(to, mask, BYTES);
    count_sectors(from, reading, BYTES, counters.load_sectors);
  }
  FOR_ACTIVE(l) {
    const u32 bytes = w.reg<u32>(i.s[2])[l];
    Copy c{u32(to[l]), BYTES, w.group[l], {}};
    if (bytes > BYTES) {
      w.report("copies more than there is room for", l, from[l]);
      continue;
    }
    if (bytes && from[l] % BYTES) {
      w.report("misaligned global access", l, from[l]);
      continue;
    }
    if (bytes && watch_global(w, l, from[l], w.buffers(i.s[1])[l], int(bytes), 1, nullptr))
      std::memcpy(c.data, reinterpret_cast<const void*>(from[l]), bytes);
    if (!watch_shared(w, l, to[l], BYTES, c.data)) continue;
    if (checks)
      for (u64 g = to[l] / GRANULE; g < (to[l] + BYTES) / GRANULE; ++g)
        w.block.granules[g].in_flight = 1;
    std::memset(&w.block.shared[to[l]], 0xff, BYTES);
    w.copies[l].push_back(c);
  }
}

void end_copies(Warp& w, const Instruction&, u32 mask) { FOR_ACTIVE(l)++ w.group[l]; }

void finish_copies(Warp& w, u32 mask, s64 newest) {
  FOR_ACTIVE(l) {
    auto& copies = w.copies[l];
    size_t left = 0;
    for (Copy& c : copies) {
      if (newest >= 0 && c.group >= w.group[l] - newest) {
        copies[left++] = c;
        continue;
      }
      std::memcpy(&w.block.shared[c.to], c.data, c.bytes);
      if (!checks) continue;
      for (u32 g = c.to / GRANULE; g < (c.to + c.bytes) / GRANULE; ++g) {
        SharedGranule& s = w.block.granules[g];
        s.in_flight = 0;
        s.write_epoch = w.block.epoch;  // it lands now, for this thread alone
        s.write_warp = s16(w.number);
        s.write_lane = s8(l);
        s.write_moment = w.moment;
      }
    }
    copies.resize(left);
  }
}

void wait_copies(Warp& w, const Instruction& i, u32 mask) { finish_copies(w, mask, i.immediate); }
void wait_all_copies(Warp& w, const Instruction&, u32 mask) { finish_copies(w, mask, -1); }

// ---- warps --------------------------------------------------------------------------------

bool whole_warp(Warp& w, u32 mask) {
  if (mask == ALL) return true;
  w.report("not all lanes take part", std::countr_zero(mask));
  return false;
}

template <int MATRICES, bool TRANSPOSED, class Address>
void load_matrices(Warp& w, const Instruction& i, u32 mask) {
  whole_warp(w, mask);
  u64 address[LANES];
  for (int l = 0; l < LANES; ++l) address[l] = address_of<Address>(w, i, l);
  if (checks) count_wavefronts(address, MATRICES == 4 ? ALL : (1u << 8 * MATRICES) - 1, 16);
  u32 result[MATRICES][LANES] = {};
  for (int m = 0; m < MATRICES; ++m) {
    u16 rows[8][8] = {};
    for (int r = 0; r < 8; ++r)
      if (watch_shared(w, m * 8 + r, address[m * 8 + r], 16, nullptr))
        std::memcpy(rows[r], &w.block.shared[address[m * 8 + r]], 16);
    for (int l = 0; l < LANES; ++l) {
      const int major = l / 4, minor = l % 4 * 2;
      const u16 low = TRANSPOSED ? rows[minor][major] : rows[major][minor];
      const u16 high = TRANSPOSED ? rows[minor + 1][major] : rows[major][minor + 1];
      result[m][l] = low | u32(high) << 16;
    }
  }
  for (int m = 0; m < MATRICES; ++m) std::memcpy(w.reg<u32>(i.d[m]), result[m], sizeof result[m]);
}

// d = a b + c; a 16x16 in s[0..3], b 16x8 in s[4..5], c 16x8 in s[6..9].
template <float (*WIDEN)(u16)>
void mma(Warp& w, const Instruction& i, u32 mask) {
  whole_warp(w, mask);
  ++counters.mma;
  float a[16][16], b[16][8], c[16][8];
  for (int l = 0; l < LANES; ++l) {
    const int group = l / 4, pair = l % 4 * 2;
    for (int q = 0; q < 4; ++q) {
      const u32 x = w.reg<u32>(i.s[q])[l];
      a[group + q % 2 * 8][pair + q / 2 * 8] = WIDEN(u16(x));
      a[group + q % 2 * 8][pair + q / 2 * 8 + 1] = WIDEN(u16(x >> 16));
    }
    for (int q = 0; q < 2; ++q) {
      const u32 x = w.reg<u32>(i.s[4 + q])[l];
      b[pair + q * 8][group] = WIDEN(u16(x));
      b[pair + q * 8 + 1][group] = WIDEN(u16(x >> 16));
    }
    for (int q = 0; q < 4; ++q) c[group + q / 2 * 8][pair + q % 2] = w.reg<float>(i.s[6 + q])[l];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) c[row][n] += a[row][k] * b[k][n];
  for (int l = 0; l < LANES; ++l)
    for (int q = 0; q < 4; ++q) w.reg<float>(i.d[q])[l] = c[l / 4 + q / 2 * 8][l % 4 * 2 + q % 2];
}

// Of what a warp does together: everybody named takes part, and whoever takes part is named.
void check_members(Warp& w, u32 mask, const u32* members) {
  FOR_ACTIVE(l) {
    if (!(members[l] >> l & 1)) w.report("a lane that is not named takes part", l);
    if (members[l] & w.alive & ~mask) w.report("a lane that is named does not take part", l);
  }
}

enum class Shuffle { UP, DOWN, XOR, INDEX };

template <Shuffle HOW>
void shuffle(Warp& w, const Instruction& i, u32 mask) {
  u32 from[LANES], in_range = 0;
  std::memcpy(from, w.reg<u32>(i.s[0]), sizeof from);
  u32* d = w.reg<u32>(i.d[0]);
  const u32 *b = w.reg<u32>(i.s[1]), *c = w.reg<u32>(i.s[2]);
  check_members(w, mask, w.reg<u32>(i.s[3]));
  FOR_ACTIVE(l) {
    const int clamp = c[l] & 31, segment = c[l] >> 8 & 31, distance = b[l] & 31;
    const int last = (l & segment) | (clamp & ~segment), first = l & segment;
    int source = 0;
    bool there = false;
    if constexpr (HOW == Shuffle::UP) source = l - distance, there = source >= last;
    if constexpr (HOW == Shuffle::DOWN) source = l + distance, there = source <= last;
    if constexpr (HOW == Shuffle::XOR) source = l ^ distance, there = source <= last;
    if constexpr (HOW == Shuffle::INDEX)
      source = first | (distance & ~segment), there = source <= last;
    if (!there) source = l;
    if (!(mask >> source & 1)) w.report("reads a lane that does not take part", l);
    in_range |= u32(there) << l;
    d[l] = from[source];
  }
  u32& p = *w.reg<u32>(i.d[1]);
  p = (p & ~mask) | (in_range & mask);
}

enum class Vote { ANY, ALL_, BALLOT };

template <Vote HOW>
void vote(Warp& w, const Instruction& i, u32 mask) {
  check_members(w, mask, w.reg<u32>(i.s[1]));
  const u32 ballot = *w.reg<u32>(i.s[0]) & mask;
  if constexpr (HOW == Vote::BALLOT) {
    FOR_ACTIVE(l) w.reg<u32>(i.d[0])[l] = ballot;
  } else {
    const bool result = HOW == Vote::ANY ? ballot != 0 : ballot == mask;
    u32& d = *w.reg<u32>(i.d[0]);
    d = (d & ~mask) | (result ? mask : 0);
  }
}

template <class T, class F>
void reduce(Warp& w, const Instruction& i, u32 mask) {
  check_members(w, mask, w.reg<u32>(i.s[1]));
  const T* a = w.reg<T>(i.s[0]);
  T result = a[std::countr_zero(mask)];
  FOR_ACTIVE(l) if (l != std::countr_zero(mask)) result = F()(result, a[l]);
  T* d = w.reg<T>(i.d[0]);
  FOR_ACTIVE(l) d[l] = result;
}

void sync_warp(Warp& w, const Instruction& i, u32 mask) {
  check_members(w, mask, w.reg<u32>(i.s[0]));
  // Lanes that meet without the others are not known to be ordered: rather a finding too many.
  if (mask == w.alive) ++w.moment;
}

void nothing(Warp&, const Instruction&, u32) {}

// ---- the table of opcodes -----------------------------------------------------------------

struct Opcode {
  Handler run;
  int num_d, num_s;
  Kind kind = PLAIN;
};

template <class D, class S, class F>
constexpr Opcode UNARY = {unary<D, S, F>, 1, 1};
template <class D, class S, class F, class B = S>
constexpr Opcode BINARY = {binary<D, S, F, B>, 1, 2};
template <class D, class S, class F>
constexpr Opcode TERNARY = {ternary<D, S, F>, 1, 3};
template <class T>
constexpr Opcode SELECT = {select<T>, 1, 3};
template <Compare C, class T>
constexpr Opcode COMPARE = {set_predicate<C, T>, 1, 2};

std::unordered_map<std::string, Opcode> make_table() {
  std::unordered_map<std::string, Opcode> t;
  const auto put = [&](const std::string& name, const Opcode& opcode) { t[name] = opcode; };

  // Integers
  const auto integers = [&]<class T>(T, const std::string& type) {
    put("add." + type, BINARY<T, T, Add>);
    put("sub." + type, BINARY<T, T, Sub>);
    put("mul.lo." + type, BINARY<T, T, MulLow>);
    put("mul.hi." + type, BINARY<T, T, MulHigh>);
    put("mad.lo." + type, TERNARY<T, T, MadLow>);
    put("div." + type, BINARY<T, T, Div>);
    put("rem." + type, BINARY<T, T, Rem>);
    put("min." + type, BINARY<T, T, Min>);
    put("max." + type, BINARY<T, T, Max>);
    put("shr." + type, BINARY<T, T, ShiftRight, u32>);
    if (std::is_signed_v<T>) {
      put("neg." + type, UNARY<T, T, Neg>);
      put("abs." + type, UNARY<T, T, Abs>);
    }
  };
  integers(s16(), "s16"), integers(u16(), "u16"), integers(s32(), "s32"), integers(u32(), "u32"),
      integers(s64(), "s64"), integers(u64(), "u64");
  put("mul.wide.s16", BINARY<s32, s16, MulWide<s32>>);
  put("mul.wide.u16", BINARY<u32, u16, MulWide<u32>>);
  put("mul.wide.s32", BINARY<s64, s32, MulWide<s64>>);
  put("mul.wide.u32", BINARY<u64, u32, MulWide<u64>>);
  put("mad.wide.s32", TERNARY<s64, s32, MadWide<s64>>);
  put("mad.wide.u32", TERNARY<u64, u32, MadWide<u64>>);
  put("bfi.b32", {insert_bits, 1, 4});

  const auto bits = [&]<class T>(T, const std::string& type) {
    put("and." + type, BINARY<T, T, And>);
    put("or." + type, BINARY<T, T, Or>);
    put("xor." + type, BINARY<T, T, Xor>);
    put("not." + type, UNARY<T, T, Not>);
    put("shl." + type, BINARY<T, T, ShiftLeft, u32>);
    put("mov." + type, UNARY<T, T, Move>);
    put("selp." + type, SELECT<T>);
  };
  bits(u16(), "b16"), bits(u32(), "b32"), bits(u64(), "b64");
  for (const char* type : {"u16", "s16"}) {
    put(std::string("mov.") + type, UNARY<u16, u16, Move>);
    put(std::string("selp.") + type, SELECT<u16>);
  }
  for (const char* type : {"u32", "s32", "f32"}) {
    put(std::string("mov.") + type, UNARY<u32, u32, Move>);
    put(std::string("selp.") + type, SELECT<u32>);
  }
  for (const char* type : {"u64", "s64", "f64"}) {
    put(std::string("mov.") + type, UNARY<u64, u64, Move>);
    put(std::string("selp.") + type, SELECT<u64>);
  }
  put("pack.b32", {pack<u32, u16>, 1, 2});
  put("pack.b64", {pack<u64, u32>, 1, 2});
  put("unpack.b32", {unpack<u32, u16>, 2, 1});
  put("unpack.b64", {unpack<u64, u32>, 2, 1});

  // Predicates
  put("mov.pred", {predicate_logic<PredicateMove>, 1, 1});
  put("not.pred", {predicate_logic<PredicateNot>, 1, 1});
  put("and.pred", {predicate_logic<PredicateAnd>, 1, 2});
  put("or.pred", {predicate_logic<PredicateOr>, 1, 2});
  put("xor.pred", {predicate_logic<PredicateXor>, 1, 2});
  const auto compares = [&]<class T>(T, const std::string& type) {
    const bool is_float = std::is_floating_point_v<T>, equality_only = type[0] == 'b';
    put("setp.eq." + type, COMPARE<Compare::EQ, T>);
    put("setp.ne." + type, COMPARE<Compare::NE, T>);
    if (equality_only) return;
    put("setp.lt." + type, COMPARE<Compare::LT, T>);
    put("setp.le." + type, COMPARE<Compare::LE, T>);
    put("setp.gt." + type, COMPARE<Compare::GT, T>);
    put("setp.ge." + type, COMPARE<Compare::GE, T>);
    if (!is_float) return;
    put("setp.equ." + type, COMPARE<Compare::EQU, T>);
    put("setp.neu." + type, COMPARE<Compare::NEU, T>);
    put("setp.ltu." + type, COMPARE<Compare::LTU, T>);
    put("setp.leu." + type, COMPARE<Compare::LEU, T>);
    put("setp.gtu." + type, COMPARE<Compare::GTU, T>);
    put("setp.geu." + type, COMPARE<Compare::GEU, T>);
    put("setp.num." + type, COMPARE<Compare::NUM, T>);
    put("setp.nan." + type, COMPARE<Compare::NAN_, T>);
  };
  compares(s16(), "s16"), compares(u16(), "u16"), compares(u16(), "b16");
  compares(s32(), "s32"), compares(u32(), "u32"), compares(u32(), "b32");
  compares(s64(), "s64"), compares(u64(), "u64"), compares(u64(), "b64");
  compares(float(), "f32");

  // float32
  for (const char* name : {"add.f32", "add.rn.f32"})
    put(name, BINARY<float, float, Canonical<Add>>);
  for (const char* name : {"sub.f32", "sub.rn.f32"})
    put(name, BINARY<float, float, Canonical<Sub>>);
  for (const char* name : {"mul.f32", "mul.rn.f32"})
    put(name, BINARY<float, float, Canonical<Mul>>);
  put("fma.rn.f32", TERNARY<float, float, Canonical<Fma>>);
  put("fma.rm.f32", TERNARY<float, float, Canonical<FmaDown>>);
  put("add.rm.f32", BINARY<float, float, Canonical<AddDown>>);
  put("div.rn.f32", BINARY<float, float, Canonical<DivF>>);
  put("min.f32", BINARY<float, float, Canonical<Min>>);
  put("max.f32", BINARY<float, float, Canonical<Max>>);
  put("neg.f32", UNARY<float, float, Neg>);
  put("abs.f32", UNARY<float, float, Abs>);
  put("copysign.f32", BINARY<float, float, CopySign>);
  put("rcp.rn.f32", UNARY<float, float, Canonical<Reciprocal>>);
  put("rcp.approx.ftz.f32", UNARY<float, float, Canonical<ReciprocalFlushed>>);
  put("sqrt.rn.f32", UNARY<float, float, Canonical<SquareRoot>>);
  put("ex2.approx.ftz.f32", UNARY<float, float, Canonical<Exp2Flushed>>);
  put("lg2.approx.f32", UNARY<float, float, Canonical<Log2>>);
  put("max.bf16x2", BINARY<u32, u32, MaxPairBF16>);

  // Conversions
  const auto widths = [&]<class D, class S>(D, S, const std::string& d, const std::string& s) {
    put("cvt." + d + "." + s, UNARY<D, S, Convert<D>>);
  };
  widths(s64(), s32(), "s64", "s32"), widths(u64(), u32(), "u64", "u32");
  widths(u32(), u64(), "u32", "u64"), widths(s32(), s64(), "s32", "s64");
  widths(u32(), u16(), "u32", "u16"), widths(s32(), s16(), "s32", "s16");
  widths(u16(), u32(), "u16", "u32"), widths(s16(), s32(), "s16", "s32");
  widths(u64(), u16(), "u64", "u16"), widths(s64(), s16(), "s64", "s16");
  widths(u16(), u64(), "u16", "u64");
  put("cvt.rn.f32.s32", UNARY<float, s32, Convert<float>>);
  put("cvt.rn.f32.u32", UNARY<float, u32, Convert<float>>);
  put("cvt.rzi.s32.f32", UNARY<s32, float, ConvertSaturating<s32>>);
  put("cvt.rzi.u32.f32", UNARY<u32, float, ConvertSaturating<u32>>);
  put("cvt.rn.f16.f32", UNARY<u16, float, NarrowF16>);
  put("cvt.rn.bf16.f32", UNARY<u16, float, NarrowBF16>);
  put("cvt.f32.f16", UNARY<float, u16, WidenF16>);
  put("cvt.f32.bf16", UNARY<float, u16, WidenBF16>);
  put("cvt.rn.f16x2.f32", BINARY<u32, float, PackF16>);
  put("cvt.rn.bf16x2.f32", BINARY<u32, float, PackBF16>);
  put("cvta.to.global.u64", UNARY<u64, u64, Move>);

  // Memory. After the type: how many values, and the bytes of their registers.
  const auto memory = [&]<class R, class T>(R, T, const std::string& type) {
    const std::string width = "." + std::to_string(sizeof(R));
    const auto number = [&]<int N>(std::integral_constant<int, N>) {
      const std::string name = (N > 1 ? ".v" + std::to_string(N) : "") + "." + type + width;
      put("ld.param" + name, {load_param<R, T, N>, N, 1});
      if constexpr (sizeof(T) >= GRANULE && N * sizeof(T) <= 16) {
        // Generic addresses: shared memory has no place among them here, and is out of bounds.
        put("ld" + name, {load_global<R, T, N, false>, N, 1});
        put("ld.global" + name, {load_global<R, T, N, false>, N, 1});
        put("ld.global.nc" + name, {load_global<R, T, N, true>, N, 1});
        put("st" + name, {store_global<R, T, N>, 0, N + 1});
        put("st.global" + name, {store_global<R, T, N>, 0, N + 1});
        put("ld.shared" + name + ".a4", {load_shared<u32, R, T, N>, N, 1});
        put("ld.shared" + name + ".a8", {load_shared<u64, R, T, N>, N, 1});
        put("st.shared" + name + ".a4", {store_shared<u32, R, T, N>, 0, N + 1});
        put("st.shared" + name + ".a8", {store_shared<u64, R, T, N>, 0, N + 1});
      }
    };
    number(std::integral_constant<int, 1>());
    number(std::integral_constant<int, 2>());
    number(std::integral_constant<int, 4>());
  };
  // Single bytes only as parameters: elsewhere granules would be too coarse for them.
  memory(u16(), u8(), "u8"), memory(u16(), u8(), "b8"), memory(s16(), s8(), "s8");
  memory(u32(), u8(), "u8"), memory(u32(), u8(), "b8"), memory(s32(), s8(), "s8");
  memory(u16(), u16(), "u16"), memory(u16(), u16(), "b16"), memory(s16(), s16(), "s16");
  memory(u32(), u16(), "u16"), memory(u32(), u16(), "b16"), memory(s32(), s16(), "s16");
  for (const char* type : {"u32", "b32", "s32", "f32"}) memory(u32(), u32(), type);
  for (const char* type : {"u64", "b64", "s64", "f64"}) memory(u64(), u64(), type);
  memory(s64(), s32(), "s32"), memory(u64(), u32(), "u32"), memory(u64(), u32(), "b32");
  put("cp.async.cg.shared.global.16.a4", {copy_async<u32>, 0, 3});
  put("cp.async.cg.shared.global.16.a8", {copy_async<u64>, 0, 3});
  put("cp.async.commit_group", {end_copies, 0, 0});
  put("cp.async.wait_group", {wait_copies, 0, 0});
  put("cp.async.wait_all", {wait_all_copies, 0, 0});

  // Warps
  const auto matrices = [&]<int N>(std::integral_constant<int, N>) {
    const std::string name = "ldmatrix.sync.aligned.m8n8.x" + std::to_string(N);
    put(name + ".shared.b16.a4", {load_matrices<N, false, u32>, N, 1});
    put(name + ".trans.shared.b16.a4", {load_matrices<N, true, u32>, N, 1});
  };
  matrices(std::integral_constant<int, 1>());
  matrices(std::integral_constant<int, 2>());
  matrices(std::integral_constant<int, 4>());
  put("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", {mma<from_bf16>, 4, 10});
  put("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", {mma<from_f16>, 4, 10});
  put("shfl.sync.up.b32", {shuffle<Shuffle::UP>, 2, 4});
  put("shfl.sync.down.b32", {shuffle<Shuffle::DOWN>, 2, 4});
  put("shfl.sync.bfly.b32", {shuffle<Shuffle::XOR>, 2, 4});
  put("shfl.sync.idx.b32", {shuffle<Shuffle::INDEX>, 2, 4});
  put("vote.sync.any.pred", {vote<Vote::ANY>, 1, 2});
  put("vote.sync.all.pred", {vote<Vote::ALL_>, 1, 2});
  put("vote.sync.ballot.b32", {vote<Vote::BALLOT>, 1, 2});
  put("redux.sync.min.s32", {reduce<s32, Min>, 1, 2});
  put("redux.sync.max.s32", {reduce<s32, Max>, 1, 2});
  put("redux.sync.min.u32", {reduce<u32, Min>, 1, 2});
  put("redux.sync.max.u32", {reduce<u32, Max>, 1, 2});
  put("redux.sync.add.s32", {reduce<s32, Add>, 1, 2});
  put("redux.sync.add.u32", {reduce<u32, Add>, 1, 2});
  put("bar.warp.sync", {sync_warp, 0, 1});

  // Control
  put("bra", {nothing, 0, 0, BRANCH});
  put("bra.uni", {nothing, 0, 0, BRANCH});
  put("ret", {nothing, 0, 0, EXIT});
  put("exit", {nothing, 0, 0, EXIT});
  put("bar.sync", {nothing, 0, 0, BARRIER});
  put("barrier.sync", {nothing, 0, 0, BARRIER});
  return t;
}

const std::unordered_map<std::string, Opcode>& table() {
  static const auto t = make_table();
  return t;
}

// ---- running ------------------------------------------------------------------------------

u64 budget = 0;

// Runs a warp until it waits at a barrier or ends. False if the block's budget is used up.
bool run_warp(Warp& w) {
  Program& program = w.block.program;
  const auto& code = program.code;
  while (w.alive) {
    u32 mask = w.alive;
    int pc = w.pc;
    if (!w.together) {
      pc = INT32_MAX;
      for (int l = 0; l < LANES; ++l)
        if (w.alive >> l & 1) pc = std::min(pc, w.pcs[l]);
      mask = 0;
      for (int l = 0; l < LANES; ++l)
        if (w.alive >> l & 1 && w.pcs[l] == pc) mask |= 1u << l;
      if (mask == w.alive) {
        w.together = true;
        w.pc = pc;
      }
    }
    const u32 here = mask;
    const Instruction& i = code[pc];
    w.current = &i;
    if (i.predicate >= 0) {
      const u32 p = *w.reg<u32>(i.predicate);
      mask &= i.negated ? ~p : p;
    }
    if (!budget) return false;
    --budget;
    ++counters.warp_instructions;
    counters.lane_instructions += std::popcount(mask);
    ++program.line_counts[i.ptx_line];

    const auto go = [&](u32 lanes, int to) {
      if (w.together && lanes == w.alive) {
        w.pc = to;
        return;
      }
      if (w.together) {
        w.together = false;
        for (int l = 0; l < LANES; ++l) w.pcs[l] = w.pc;
      }
      for (int l = 0; l < LANES; ++l)
        if (lanes >> l & 1) w.pcs[l] = to;
    };
    switch (i.kind) {
      case PLAIN:
        if (mask) i.run(w, i, mask);
        go(here, pc + 1);
        break;
      case BRANCH:
        if (here & ~mask) go(here & ~mask, pc + 1);
        if (mask) go(mask, i.target);
        break;
      case EXIT:
        if (here & ~mask) go(here & ~mask, pc + 1);
        for (int l = 0; l < LANES; ++l)
          if (mask >> l & 1 && !w.copies[l].empty()) w.report("ends with unfinished copies", l);
        w.alive &= ~mask;
        break;
      case BARRIER:
        go(here, pc + 1);
        if (!mask) break;
        if (mask != w.alive) w.report("a barrier that not all lanes reach", std::countr_zero(mask));
        w.waiting = true;
        return true;
    }
  }
  return true;
}

void set_specials(Warp& w) {
  const Block& b = w.block;
  for (const Special& s : b.program.specials) {
    u32* r = w.reg<u32>(s.offset);
    for (int l = 0; l < LANES; ++l) {
      const u32 t = u32(w.thread(l));
      const int axis = s.name.back() - 'x';
      if (s.name.starts_with("tid."))
        r[l] = axis == 0   ? t % b.size[0]
               : axis == 1 ? t / b.size[0] % b.size[1]
                           : t / (b.size[0] * b.size[1]);
      else if (s.name.starts_with("ntid."))
        r[l] = b.size[axis];
      else if (s.name.starts_with("ctaid."))
        r[l] = b.index[axis];
      else if (s.name.starts_with("nctaid."))
        r[l] = b.grid[axis];
      else if (s.name == "laneid")
        r[l] = u32(l);
    }
  }
}

template <class T>
void broadcast(Warp& w, const Constant& c) {
  std::fill_n(w.reg<T>(c.offset), LANES, T(c.value));
}

bool run_block(Block& b) {
  std::vector<std::unique_ptr<Warp>> warps;
  for (int n = 0; n * LANES < b.threads; ++n) {
    warps.push_back(std::make_unique<Warp>(b, n));
    Warp& w = *warps.back();
    for (const Constant& c : b.program.constants) {
      if (c.width == 8)
        broadcast<u64>(w, c);
      else if (c.width == 4)
        broadcast<u32>(w, c);
      else if (c.width == 2)
        broadcast<u16>(w, c);
      else
        *w.reg<u32>(c.offset) = c.value ? ALL : 0;  // a predicate
    }
    set_specials(w);
  }
  for (;;) {
    for (auto& w : warps)
      if (!run_warp(*w)) {
        w->report("does not come to an end", std::countr_zero(w->alive));
        return false;
      }
    int waiting = 0, ended = 0;
    for (auto& w : warps) {
      waiting += w->waiting;
      ended += !w->alive;
    }
    if (!waiting) return true;
    Warp& first = **std::find_if(warps.begin(), warps.end(), [](auto& w) { return w->waiting; });
    for (auto& w : warps)
      if (w->waiting && w->current != first.current)
        w->report("warps wait at different barriers", 0);
    if (ended) first.report("a barrier that ended warps do not reach", 0);
    ++counters.barriers;
    ++b.epoch;
    for (auto& w : warps) {
      w->waiting = false;
      ++w->moment;
    }
  }
}

bool fail(const std::string& why) {
  last_error = why;
  return false;
}

// ---- loading ------------------------------------------------------------------------------
// One item a line; see lower.py.

bool load(const std::string& text) {
  auto p = std::make_unique<Program>();
  std::istringstream lines(text);
  std::string line, what;
  int last_line = 0;
  while (std::getline(lines, line)) {
    std::istringstream in(line);
    in >> what;
    if (what == "kernel") {
      in >> p->name >> p->register_bytes >> p->info.static_shared >> p->info.max_threads;
    } else if (what == "param") {
      int bytes;
      in >> bytes;
      p->param_bytes.push_back(bytes);
    } else if (what == "file") {
      size_t number;
      in >> number;
      p->files.resize(std::max(p->files.size(), number + 1));
      std::getline(in >> std::ws, p->files[number]);
    } else if (what == "constant") {
      Constant c;
      in >> c.offset >> c.width >> c.value;
      p->constants.push_back(c);
    } else if (what == "special") {
      Special s;
      in >> s.offset >> s.name;
      p->specials.push_back(s);
    } else if (what == "do") {
      Instruction i{};
      std::string opcode;
      int negated;
      in >> opcode >> i.predicate >> negated >> i.immediate >> i.target >> i.file >> i.line >>
          i.ptx_line >> i.num_d;
      i.negated = negated;
      const std::string where = "PTX line " + std::to_string(i.ptx_line) + ": ";
      const auto found = table().find(opcode);
      if (found == table().end()) return fail(where + "unknown opcode " + opcode);
      const Opcode& known = found->second;
      const auto refuse = [&](const char* what, int count) {
        return fail(where + opcode + " with " + std::to_string(count) + " " + what);
      };
      if (i.num_d != known.num_d) return refuse("destinations", i.num_d);
      for (int n = 0; n < i.num_d; ++n) in >> i.d[n];
      in >> i.num_s;
      if (i.num_s != known.num_s) return refuse("sources", i.num_s);
      for (int n = 0; n < i.num_s; ++n) in >> i.s[n];
      i.run = known.run;
      i.kind = known.kind;
      last_line = std::max(last_line, i.ptx_line);
      p->code.push_back(i);
    } else {
      return fail("unknown item " + what);
    }
    if (in.fail()) return fail("cannot read: " + line);
  }
  if (p->code.empty()) return fail("a kernel without code");
  const Instruction& last = p->code.back();
  if ((last.kind != EXIT && last.kind != BRANCH) || last.predicate >= 0)
    return fail("PTX line " + std::to_string(last.ptx_line) + ": the code does not end here");
  for (const Instruction& i : p->code)
    if (i.target >= int(p->code.size()))
      return fail("PTX line " + std::to_string(i.ptx_line) + ": a branch to nowhere");
  p->info.num_params = int(p->param_bytes.size());
  p->info.param_bytes = p->param_bytes.data();
  p->line_counts.resize(last_line + 1);
  programs()[p->name] = std::move(p);
  return true;
}

}  // namespace

// ---- what others call ---------------------------------------------------------------------

extern "C" {

int emu_load(const char* text) { return load(text) ? 0 : -1; }

const EmuKernelInfo* emu_kernel_info(const char* kernel) {
  const auto found = programs().find(kernel);
  return found == programs().end() ? nullptr : &found->second->info;
}

int emu_launch(const char* kernel, const unsigned grid[3], const unsigned block[3],
               unsigned dynamic_shared, void** params) {
  const auto found = programs().find(kernel);
  if (found == programs().end()) return fail(std::string("no kernel ") + kernel), -1;
  Program& p = *found->second;
  std::vector<u8> param_space;
  for (int n = 0; n < p.info.num_params; ++n) {
    param_space.resize((param_space.size() + 15) / 16 * 16);
    const auto* from = static_cast<const u8*>(params[n]);
    param_space.insert(param_space.end(), from, from + p.param_bytes[n]);
  }
  ++launch_serial;
  place_regions();
  if (placed.size() > std::numeric_limits<Buffer>::max())
    return fail("more buffers than a register can tell apart"), -1;
  const u64 blocks = u64(grid[0]) * grid[1] * grid[2];
  for (u64 id = 0; id < blocks; ++id) {
    const size_t shared = p.info.static_shared + dynamic_shared;
    Block b{p,
            param_space.data(),
            param_space.size(),
            int(id),
            {u32(id % grid[0]), u32(id / grid[0] % grid[1]), u32(id / grid[0] / grid[1])},
            {grid[0], grid[1], grid[2]},
            {block[0], block[1], block[2]},
            int(block[0] * block[1] * block[2]),
            std::vector<u8>(shared, 0xff),
            std::vector<SharedGranule>(checks ? shared / GRANULE + 1 : 0)};
    ++counters.blocks;
    budget = MOST_INSTRUCTIONS;
    if (!run_block(b))
      return fail(p.name + ": block " + std::to_string(id) + " does not come to an end"), -1;
  }
  return 0;
}

const char* emu_error() { return last_error.c_str(); }

void emu_memory_register(uint64_t address, uint64_t bytes, int initialised) {
  if (!bytes) return;
  auto r = std::make_unique<Region>();
  r->begin = address;
  r->end = address + bytes;
  r->known = u8(initialised);
  r->shadows.resize((bytes + GRANULE - 1) / GRANULE / SHADOW + 1);
  regions[address] = std::move(r);
}

void emu_memory_unregister(uint64_t address) { regions.erase(address); }

void emu_memory_initialise(uint64_t address, uint64_t bytes) {
  place_regions();
  Region* r = bytes ? region_of(find_buffer(address, bytes)) : nullptr;
  if (!r) return;
  for (u64 g = (address - r->begin) / GRANULE; g <= (address + bytes - 1 - r->begin) / GRANULE; ++g)
    r->shadow(g).initialised[g % SHADOW] = 1;
}

int emu_memory_known(uint64_t address, uint64_t bytes) {
  const auto found = regions.find(address);
  return found != regions.end() && found->second->end == address + bytes;
}

void emu_set_checks(int level) { checks = level; }

int64_t emu_num_findings() { return int64_t(findings.size()); }
EmuFinding emu_finding(int64_t i) { return findings[i]->public_part; }
void emu_clear_findings() {
  findings.clear();
  finding_places.clear();
}

EmuCounters emu_counters() { return counters; }
void emu_clear_counters() { counters = {}; }

int emu_line_counts(const char* kernel, uint64_t* counts, int num_lines) {
  const auto found = programs().find(kernel);
  if (found == programs().end()) return 0;
  const auto& lines = found->second->line_counts;
  std::copy_n(lines.begin(), std::min<size_t>(lines.size(), num_lines), counts);
  return int(lines.size());
}

const char* emu_opcodes() {
  static const std::string names = [] {
    std::string all;
    for (const auto& [name, opcode] : table()) all += name + " ";
    return all;
  }();
  return names.c_str();
}

}  // extern "C"

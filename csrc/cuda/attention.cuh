// Attention on the tensor cores: rows of all workers against pages or plain tensors of keys and
// values, each tile of which is read once for all rows of a block.
//
// A block has up to 64 rows (query token x head of a KV group) and a run of passes. Four warps
// share the 64 keys of a tile, then the value dimensions:
//
//                 keys 0-15  16-31  32-47  48-63            dims 0..D/4  ..D/2  ..3D/4  ..D
//     rows  0-15 [  warp 0 | warp 1 | warp 2 | warp 3 ] ->  [  warp 0  | warp 1 | warp 2 | warp 3 ]
//     rows 16-31 [    "    |   "    |   "    |   "    ]     [    "     |   "    |   "    |   "    ]
//     rows 32-63 [  warp 4 | ...                            with 64 rows
//            scores, softmax  -> probabilities in shared memory ->  values accumulated
//
// So no key or value is loaded twice from shared memory for up to 32 rows, and a row's arithmetic
// is the same wherever it stands and however many stand beside it: each score is one sum over D in
// steps of 16, each output one sum over the tile's keys in steps of 16, each row's sum of
// probabilities four sums (one for each 16 keys) that are added at the end of the pass.
//
// Tiles travel through a ring in shared memory, keys and values alternately:
//
//     ring of 4:   K0 V0 K1 V1 | while the scores of tile t are computed, the values of t + 1 are
//     asked
//                              | for; while its values are accumulated, the keys of t + 2
//     ring of 3:   K0 V0 K1    | the keys of t + 1; the values of t + 1
//     ring of 2:   K0 V0       | the values of t; the keys of t + 1
//
// The longest ring that leaves room for a second block on the multiprocessor is a property of the
// architecture. The alternative in which each warp has rows of its own and all
// keys (flash-attention's) needs no exchange of maxima, but loads everything once for each warp,
// and leaves three of four warps idle at 16 rows.

#pragma once

#include <cfloat>

#include "item.cuh"

namespace hogwild::cuda {

template <int D, int ROW_TILES>
struct Shape {
  static constexpr int ROWS = 16 * ROW_TILES;
  static constexpr int WARP_TILES = ROW_TILES == 4 ? 2 : ROW_TILES;  // row tiles of one warp
  static constexpr int WARPS = 4 * (ROW_TILES / WARP_TILES);
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int BLOCKS = D > 128 || WARPS == 8 ? 1
                                : ROW_TILES == 1      ? 3
                                                      : 2;  // a multiprocessor
  static constexpr int STEPS = D / 16;  // of the sum over D
  static constexpr int OUT_TILES = D / 32;  // 8 dimensions each, of one warp
  // The rotated queries stay in registers where they fit.
  static constexpr bool HOLD_QUERIES = WARP_TILES * D <= 256;

  static constexpr int ROW_BYTES = 2 * D;
  static constexpr int CHUNKS = D / 8;  // 16 bytes each, of a row
  static constexpr int PERIOD = D % 64 ? 4 : 8;  // chunks that a swizzle permutes
  static constexpr int TILE_BYTES = TILE * ROW_BYTES;
  static constexpr int QUERY_BYTES = ROWS * ROW_BYTES;
  static constexpr int PROBABILITY_BYTES = ROWS * TILE * 2;

  // Shared memory: ring of tiles, queries, probabilities, then the small arrays.
  static constexpr int SMALL_BYTES =
      ROWS * (int(sizeof(QueryRow<void>)) + int(sizeof(Limits)) + (4 + 4) * int(sizeof(float)));
  static constexpr int shared_bytes(int ring) {
    return ring * TILE_BYTES + QUERY_BYTES + PROBABILITY_BYTES + SMALL_BYTES;
  }
  // For code of an architecture, 90 for sm_90: two blocks a multiprocessor, or else one.
  static constexpr int ring(int architecture) {
    const int reserved = 1024;  // by the system, of every block
    const int processor = architecture == 80                         ? 164 * 1024
                          : architecture >= 90 && architecture < 120 ? 228 * 1024
                                                                     : 100 * 1024;
    for (int blocks = 2; blocks > 0; --blocks)
      for (int ring = 4; ring >= 2; --ring)
        if (shared_bytes(ring) <= processor / blocks - reserved) return ring;
    return 0;
  }

  // Byte of chunk `chunk` of row `row`: rows that are read together lie in different banks.
  static __device__ __forceinline__ int place(int row, int chunk) {
    const int turn = PERIOD == 8 ? row & 7 : (row >> 1) & 3;
    return row * ROW_BYTES + ((chunk ^ turn) << 4);
  }
  // The same of chunk + 2 * step, from the address of chunk 0 or 1.
  static __device__ __forceinline__ uint32_t ahead(uint32_t address, int step) {
    const int bytes = 32 * step, period = 16 * PERIOD;
    return (address ^ (bytes % period)) + bytes / period * period;
  }
};

static __device__ __forceinline__ int probability_place(int row, int chunk) {
  return row * (TILE * 2) + ((chunk ^ (row & 7)) << 4);
}

template <class T, int D, int ROW_TILES>
struct Attention {
  using S = Shape<D, ROW_TILES>;
  using Element = typename T::Element;
  static constexpr int WARP_TILES = S::WARP_TILES, OUT_TILES = S::OUT_TILES;

#ifdef __CUDA_ARCH__
  static constexpr int RING = S::ring(__CUDA_ARCH__ / 10);
#else
  static constexpr int RING = 4;
#endif
  static_assert(RING >= 2, "keys and values of a tile fit into shared memory");

  const AttendParams& params;
  const Header& header;
  const Item& item;
  const int head;
  const int lane, quarter, first_row;  // of this thread's warp

  // Shared memory, and this thread's places in it
  const uint32_t ring, queries, probabilities;
  QueryRow<Element>* const rows;
  Limits* const limits;
  // [ROWS], one of each quarter of a tile's keys: maxima, rows lane / 4 and + 8 of a row tile side
  // by side; then, at the end of a pass, sums.
  float4* const quarters;
  float2* const folded;  // [2, ROWS]: (max, sum) of the passes so far, before every other pass
  const uint32_t key_place, copy_place;  // of the first tile in the ring
  uint32_t value_place[(OUT_TILES + 1) / 2];  // the same, of two tiles of dimensions each
  const uint32_t probability_store, probability_load;
  const uint32_t maximum_load, maximum_store;

  // Page 0 of this layer, this thread's first chunk, and from one page of all heads to the next.
  const char *const key_pages, *const value_pages;
  const int32_t page_bytes;
  const bool plain_rotation;  // of all dimensions, half against half, and aligned

  int segment = -1;  // that the queries are rotated for

  // Registers; [2] are rows lane / 4 and + 8 of a row tile.
  uint32_t query[S::HOLD_QUERIES ? WARP_TILES : 1][S::HOLD_QUERIES ? S::STEPS : 1][4];
  float out[WARP_TILES][OUT_TILES][4];
  float score[WARP_TILES][2][4];
  // A row's probabilities are 2^(score * scale + bias). The bias follows the row's largest score
  // only when that has grown by more than RISE: most tiles then rescale nothing.
  float bias[WARP_TILES][2];
  float highest[WARP_TILES];  // score that the bias does for, of row lane / 4 + 8 (lane % 2)
  float row_sum[WARP_TILES][2];  // this lane's share

  __device__ Attention(const AttendParams& p, const Item& item, int head, char* shared)
      : params(p),
        header(*p.header),
        item(item),
        head(head),
        lane(threadIdx.x % WARP),
        quarter(threadIdx.x / WARP % 4),
        first_row(threadIdx.x / WARP / 4 * 16 * WARP_TILES),
        ring(kept(shared_address(shared))),
        queries(ring + RING * S::TILE_BYTES),
        probabilities(queries + S::QUERY_BYTES),
        rows(reinterpret_cast<QueryRow<Element>*>(shared + RING * S::TILE_BYTES + S::QUERY_BYTES +
                                                  S::PROBABILITY_BYTES)),
        limits(reinterpret_cast<Limits*>(rows + S::ROWS)),
        quarters(reinterpret_cast<float4*>(limits + S::ROWS)),
        folded(reinterpret_cast<float2*>(quarters + S::ROWS)),
        key_place(kept(ring + S::place(quarter * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2))),
        copy_place(kept(ring + S::place(threadIdx.x / COLUMNS, threadIdx.x % COLUMNS))),
        probability_store(kept(
            probabilities + probability_place(first_row + lane / 4, quarter * 2) + lane % 4 * 4)),
        probability_load(kept(probabilities + probability_place(first_row + lane % 16, lane / 16))),
        maximum_load(kept(shared_address(quarters + first_row + lane / 4 * 2 + lane % 2))),
        maximum_store(kept(maximum_load + quarter * 4)),
        key_pages(kept(first_chunk(p.key_pages))),
        value_pages(kept(first_chunk(p.value_pages))),
        page_bytes(kept(p.kv_heads * S::TILE_BYTES)),
        plain_rotation(p.wide_query && !p.interleaved && header.half_rotary == D / 2) {
#pragma unroll
    for (int n = 0; n < OUT_TILES; n += 2)
      value_place[n / 2] = kept(
          ring + S::place(lane % 16, quarter * OUT_TILES + n + (n + 1 < OUT_TILES) * (lane / 16)));
  }

  __device__ __forceinline__ const char* first_chunk(const void* pages) const {
    return static_cast<const char*>(pages) + head * S::TILE_BYTES +
           threadIdx.x / COLUMNS * S::ROW_BYTES + threadIdx.x % COLUMNS * 16;
  }

  // ---- rows and queries ---------------------------------------------------------------------

  // The queries of rows that are not there are zero.
  __device__ void load_rows() {
    for (int r = threadIdx.x; r < S::ROWS; r += S::THREADS) folded[r] = {-INFINITE, 0.f};
    const Row* from = header.array<Row>(header.rows) + item.row_begin;
    for (int r = threadIdx.x; r < item.row_count; r += S::THREADS)
      rows[r] = query_row<Element>(params, from[r], head);
    if (item.row_count < S::ROWS)
      for (int i = threadIdx.x * 16; i < S::QUERY_BYTES; i += S::THREADS * 16)
        store_shared(queries + i, make_uint4(0, 0, 0, 0));
  }

  // Rotates the queries afresh, into the operands of the scores.
  __device__ void enter_segment(int segment) {
    if (!plain_rotation)
      rotate_one_by_one(segment);
    else if (item.worker_tokens > 1)
      rotate_four_pairs<true>(segment);
    else
      rotate_four_pairs<false>(segment);
  }

  // A thread takes dimensions j .. j + 3 and their partners D / 2 further on, of every so many
  // rows.
  template <bool SEVERAL_TOKENS>
  __device__ void rotate_four_pairs(int segment) {
    constexpr int THREADS_OF_ROW = D == 96 ? 16 : D / 8;
    constexpr int AT_ONCE = S::THREADS / THREADS_OF_ROW;
    constexpr int UNROLLED = WARP_TILES * D < 128 ? S::ROWS / AT_ONCE : 1;  // registers are few
    const int j = threadIdx.x % THREADS_OF_ROW * 4;
    if (j >= D / 2) return;
    const char* offset_angles = header.array<char>(header.offset_angles) + (segment * D + j) * 4;
    const char* token_angles = header.array<char>(header.token_angles) + j * 4;
    const int32_t worker_bytes = header.num_segments * (D * 4), row_count = item.row_count;
#pragma unroll UNROLLED
    for (int first = 0; first < S::ROWS; first += AT_ONCE) {
      const int r = first + threadIdx.x / THREADS_OF_ROW;
      if (r >= row_count) break;
      const QueryRow<Element> row = rows[r];
      const uint2 x = *reinterpret_cast<const uint2*>(row.query + j);
      const uint2 y = *reinterpret_cast<const uint2*>(row.query + j + D / 2);
      const char* angles = advance(offset_angles, row.worker, worker_bytes);
      float4 c = *reinterpret_cast<const float4*>(angles);
      float4 s = *reinterpret_cast<const float4*>(angles + D * 2);
      if constexpr (SEVERAL_TOKENS) {
        angles = advance(token_angles, row.token, D * 4);
        const float4 ci = *reinterpret_cast<const float4*>(angles);
        const float4 si = *reinterpret_cast<const float4*>(angles + D * 2);
        add(c.x, s.x, ci.x, si.x);
        add(c.y, s.y, ci.y, si.y);
        add(c.z, s.z, ci.z, si.z);
        add(c.w, s.w, ci.w, si.w);
      }
      uint2 low, high;
      rotate(x.x, y.x, c.x, s.x, c.y, s.y, low.x, high.x);
      rotate(x.y, y.y, c.z, s.z, c.w, s.w, low.y, high.y);
      store_shared(queries + S::place(r, j / 8) + j % 8 * 2, low);
      store_shared(queries + S::place(r, (j + D / 2) / 8) + j % 8 * 2, high);
    }
  }

  static __device__ __forceinline__ void add(float& c, float& s, float ci, float si) {
    const float2 sum = add_angles(c, s, ci, si);
    c = sum.x;
    s = sum.y;
  }

  // The same operations as rotated_query's, two pairs at a time.
  __device__ __forceinline__ void rotate(uint32_t x, uint32_t y, float c0, float s0, float c1,
                                         float s1, uint32_t& low, uint32_t& high) const {
    const float2 a = T::unpack(x), b = T::unpack(y);
    const float factor = params.query_factor * params.rope_scale;
    low = T::pack(__fmaf_rn(a.x, c0, __fmul_rn(b.x, -s0)) * factor,
                  __fmaf_rn(a.y, c1, __fmul_rn(b.y, -s1)) * factor);
    high = T::pack(__fmaf_rn(b.x, c0, __fmul_rn(a.x, s0)) * factor,
                   __fmaf_rn(b.y, c1, __fmul_rn(a.y, s1)) * factor);
  }

  __device__ void rotate_one_by_one(int segment) {
    for (int i = threadIdx.x; i < item.row_count * (D / 2); i += S::THREADS) {
      const int r = i / (D / 2), d = i % (D / 2) * 2;
      const QueryRow<Element> row = rows[r];
      store_shared(queries + S::place(r, d / 8) + d % 8 * 2,
                   T::pack(rotated_query<T>(params, header, row, segment, d),
                           rotated_query<T>(params, header, row, segment, d + 1)));
    }
  }

  __device__ __forceinline__ uint32_t query_address(int tile) const {
    return queries + S::place(first_row + tile * 16 + lane % 16, lane / 16);
  }

  __device__ void hold_queries() {
    if constexpr (S::HOLD_QUERIES)
#pragma unroll
      for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
        for (int step = 0; step < S::STEPS; ++step)
          load_matrices(query[tile][step], S::ahead(query_address(tile), step));
  }

  // ---- tiles --------------------------------------------------------------------------------

  // A thread copies chunk `column`, + 8 (or 4), ... of every so many rows of a tile.
  static constexpr int COLUMNS = S::PERIOD;
  static constexpr int ROWS_AT_ONCE = S::THREADS / COLUMNS;

  // The tiles of a pass, and where they lie.
  struct Source {
    const Pass* pass;
    int end;  // tiles before it are wanted
    int whole_end;  // tiles before it are wanted and whole pages
    int paged_end;  // tiles before it are wanted and pages
    const int32_t* pages;  // of the pass's tiles
    int32_t page[3];  // of tiles t + 1, t + 2, t + 3 while tile t is attended
  };

  __device__ __forceinline__ Source start(const Pass* place, const Pass& pass) const {
    Source s{place, pass.end_tile, 0, 0, nullptr, {0, 0, 0}};
    if (params.key_pages) {
      s.whole_end = min((pass.end - pass.begin) / TILE, s.end);
      s.paged_end = s.end;
      s.pages = kept(header.array<int32_t>(header.tile_pages) + pass.tile);
      // As if tile first_tile - 1 were attended.
#pragma unroll
      for (int i = 0; i < 3; ++i) s.page[i] = __ldg(s.pages + min(pass.first_tile + i, s.end - 1));
    }
    return s;
  }

  // Before the scores of tile t: the pages that are known move on by one.
  __device__ __forceinline__ void next_pages(Source& s, int t) const {
    s.page[0] = s.page[1];
    s.page[1] = s.page[2];
    if (t + 3 < s.paged_end) s.page[2] = __ldg(s.pages + t + 3);
  }

  // Asks for the keys or values of a tile, if there is one, into a place of the ring. The group of
  // copies is closed even if it is empty, so that waiting may count groups.
  template <bool VALUES>
  __device__ __forceinline__ void load_tile(const Source& s, int tile, int32_t page,
                                            uint32_t slot) const {
    const uint32_t to = copy_place + slot;
    if (tile < s.whole_end) {
      const char* pages = VALUES ? value_pages : key_pages;
      if constexpr (D > 128)  // no registers left to keep it in
        pages = first_chunk(VALUES ? params.value_pages : params.key_pages);
      const char* from = advance(pages, page, page_bytes);
#pragma unroll
      for (int r = 0; r < TILE; r += ROWS_AT_ONCE)
#pragma unroll
        for (int c = 0; c < S::CHUNKS; c += COLUMNS)
          copy_async(to + r * S::ROW_BYTES + c * 16, from + r * S::ROW_BYTES + c * 16);
    } else if (tile < s.end) {
      load_rows_of_tile(s, tile, page, VALUES, to);
    }
    end_copy_group();
  }

  // Any stride, any alignment; rows past the segment's end become zero, whatever lies there.
  __device__ __forceinline__ void load_rows_of_tile(const Source& s, int tile, int32_t page,
                                                    bool values, uint32_t to) const {
    const int row = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
    const Pass& pass = *s.pass;
    const int present = pass.end - pass.begin - tile * TILE;
    const Element* base;
    int64_t stride;
    if (params.key_pages) {
      base = static_cast<const Element*>(values ? params.value_pages : params.key_pages) +
             (int64_t(page) * params.kv_heads + head) * (TILE * D);
      stride = D;
    } else {
      const SegmentRows& segment = header.array<SegmentRows>(header.segments)[pass.segment];
      stride = values ? segment.value_token_stride : segment.key_token_stride;
      base = static_cast<const Element*>(values ? segment.values : segment.keys) +
             (pass.begin + tile * TILE) * stride +
             head * (values ? segment.value_head_stride : segment.key_head_stride);
    }
    const bool wide = ((reinterpret_cast<uintptr_t>(base) | (stride * 2)) & 15) == 0;
#pragma unroll 1
    for (int r = 0; r < TILE; r += ROWS_AT_ONCE) {
      const bool there = row + r < present;
      const Element* from = base + (there ? row + r : 0) * stride + column * 8;
#pragma unroll 1
      for (int c = 0; c < S::CHUNKS; c += COLUMNS) {
        const uint32_t place = to + r * S::ROW_BYTES + c * 16;
        if (wide) {
          copy_async(place, from + c * 8, there ? 16 : 0);
        } else {
          const uint16_t* bits = reinterpret_cast<const uint16_t*>(from + c * 8);
          uint32_t word[4] = {};
          if (there)
            for (int i = 0; i < 4; ++i) word[i] = bits[2 * i] | uint32_t(bits[2 * i + 1]) << 16;
          store_shared(place, make_uint4(word[0], word[1], word[2], word[3]));
        }
      }
    }
  }

  // Waits for the oldest tile asked for, for everybody; those behind it may still be under way.
  __device__ __forceinline__ void await_tile() const {
    wait_copies<RING - 2>();
    __syncthreads();
  }

  // ---- one tile -----------------------------------------------------------------------------

  // score = queries times this quarter's 16 keys.
  __device__ __forceinline__ void compute_scores(uint32_t slot) {
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) score[tile][n][e] = 0.f;
    const uint32_t address = key_place + slot;
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step) {
      uint32_t key[4];
      load_matrices(key, S::ahead(address, step));
#pragma unroll
      for (int tile = 0; tile < WARP_TILES; ++tile) {
        if constexpr (S::HOLD_QUERIES) {
          T::mma(score[tile][0], query[tile][step], key[0], key[1]);
          T::mma(score[tile][1], query[tile][step], key[2], key[3]);
        } else {
          uint32_t q[4];
          load_matrices(q, S::ahead(query_address(tile), step));
          T::mma(score[tile][0], q, key[0], key[1]);
          T::mma(score[tile][1], q, key[2], key[3]);
        }
      }
    }
    if (params.softcap != 0.f)
#pragma unroll
      for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) score[tile][n][e] = cap_score(params, score[tile][n][e]);
  }

  __device__ __forceinline__ int row_of(int tile, int half) const {
    return first_row + tile * 16 + half * 8 + lane / 4;
  }

  // `key`: the tile's first, counted from the segment's.
  __device__ __forceinline__ void mask_scores(int key) {
    const int column = key + quarter * 16 + lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Limits seen = limits[row_of(tile, half)];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int l = column + n * 8 + e;
            if (l < seen.low || l > seen.high) score[tile][n][2 * half + e] = -INFINITE;
          }
      }
  }

  // Of the four lanes that have a row, two keep it and two take over the other one of the tile.
  __device__ __forceinline__ void share_maxima() const {
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile) {
      float top[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        top[half] = fmaxf(fmaxf(score[tile][0][2 * half], score[tile][0][2 * half + 1]),
                          fmaxf(score[tile][1][2 * half], score[tile][1][2 * half + 1]));
      const bool second = lane % 2;
      float one = second ? top[1] : top[0];
      one = fmaxf(one, __shfl_xor_sync(~0u, second ? top[0] : top[1], 1));
      one = fmaxf(one, __shfl_xor_sync(~0u, one, 2));
      if (lane % 4 < 2) store_shared(maximum_store + tile * 16 * 16, __float_as_uint(one));
    }
  }

  // What was summed with smaller maxima shrinks; mostly nothing does.
  __device__ __forceinline__ void raise_maxima(float scale) {
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile) {
      const float4 top = load_shared(maximum_load + tile * 16 * 16);
      const float now = fmaxf(fmaxf(top.x, top.y), fmaxf(top.z, top.w));
      if (__any_sync(~0u, now > highest[tile])) shrink_results(tile, now, scale);
    }
  }

  // Each row decides for itself. Rounded down, so that probabilities keep below 2^(RISE +
  // PROBABILITY_BIAS) however large the scores are.
  __device__ __forceinline__ void shrink_results(int tile, float now, float scale) {
    const bool second = lane % 2;
    float mine = second ? bias[tile][1] : bias[tile][0];
    if (now > highest[tile]) {
      mine = __fmaf_rd(now, -scale, T::PROBABILITY_BIAS);
      highest[tile] = __fadd_rd(now, params.rise);
    }
    const float other = __shfl_xor_sync(~0u, mine, 1);
    const float fresh[2] = {second ? other : mine, second ? mine : other};
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shrink[half] = exp2_fast(fresh[half] - bias[tile][half]);
      bias[tile][half] = fresh[half];
      row_sum[tile][half] *= shrink[half];
    }
#pragma unroll
    for (int n = 0; n < OUT_TILES; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[tile][n][e] *= shrink[e / 2];
  }

  // Into shared memory and into the sums.
  __device__ __forceinline__ void compute_probabilities(float scale) {
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          p[i] =
              exp2_fast(__fmaf_rn(score[tile][i / 2][2 * half + i % 2], scale, bias[tile][half]));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t pair = T::pack(p[2 * n], p[2 * n + 1]);
          store_shared((probability_store ^ (n * 16)) + (tile * 16 + half * 8) * (TILE * 2), pair);
          if constexpr (T::SUMS_ROUNDED) {
            const float2 rounded = T::unpack(pair);
            p[2 * n] = rounded.x;
            p[2 * n + 1] = rounded.y;
          }
        }
        row_sum[tile][half] += (p[0] + p[1]) + (p[2] + p[3]);
      }
  }

  // Values [16 block, 16 block + 16) of two tiles of dimensions (or of the last one), times
  // probabilities.
  __device__ __forceinline__ void accumulate(const uint32_t (&p)[WARP_TILES][4], uint32_t slot,
                                             int block, int n) {
    const uint32_t address = value_place[n / 2] + slot + block * 16 * S::ROW_BYTES;
    if (n + 1 < OUT_TILES) {
      uint32_t v[4];
      load_matrices_transposed(v, address);
#pragma unroll
      for (int tile = 0; tile < WARP_TILES; ++tile) {
        T::mma(out[tile][n], p[tile], v[0], v[1]);
        T::mma(out[tile][n + 1], p[tile], v[2], v[3]);
      }
    } else {
      uint32_t v[2];
      load_2_matrices_transposed(v, address);
#pragma unroll
      for (int tile = 0; tile < WARP_TILES; ++tile) T::mma(out[tile][n], p[tile], v[0], v[1]);
    }
  }

  __device__ __forceinline__ void load_probabilities(uint32_t (&p)[WARP_TILES][4],
                                                     int block) const {
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
      load_matrices(p[tile], (probability_load ^ (block * 32)) + tile * 16 * (TILE * 2));
  }

  // out += probabilities times this quarter's dimensions of the values.
  __device__ __forceinline__ void accumulate(uint32_t slot) {
#pragma unroll
    for (int block = 0; block < TILE / 16; ++block) {
      uint32_t p[WARP_TILES][4];
      load_probabilities(p, block);
#pragma unroll
      for (int n = 0; n < OUT_TILES; n += 2) accumulate(p, slot, block, n);
    }
  }

  // The same for a tile that some row sees nothing of: 0 times a value that is not finite must not
  // reach it, so that its result is put back. A few dimensions at a time: registers are few.
  __device__ __forceinline__ void accumulate_for_some(uint32_t slot, int key) {
    uint32_t sees = 0;  // bit 2 tile + half
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Limits seen = limits[row_of(tile, half)];
        sees |= uint32_t(seen.low - TILE < key && seen.high >= key) << (2 * tile + half);
      }
#pragma unroll
    for (int n = 0; n < OUT_TILES; n += 2) {
      constexpr int WIDTH = OUT_TILES > 1 ? 2 : 1;
      float before[WARP_TILES][WIDTH][4];
#pragma unroll
      for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (n + i < OUT_TILES) before[tile][i][e] = out[tile][n + i][e];
#pragma unroll
      for (int block = 0; block < TILE / 16; ++block) {
        uint32_t p[WARP_TILES][4];
        load_probabilities(p, block);
        accumulate(p, slot, block, n);
      }
#pragma unroll
      for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (n + i < OUT_TILES && !(sees >> (2 * tile + e / 2) & 1))
              out[tile][n + i][e] = before[tile][i][e];
      if constexpr (D > 128) __syncwarp();  // or else ptxas mixes them all, and spills
    }
  }

  // ---- a pass -------------------------------------------------------------------------------

  __device__ __forceinline__ void start_sums() {
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile) {
      highest[tile] = -INFINITE;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Finite: a masked score is -inf, and becomes 0 and not nan. No bias is above it.
        bias[tile][half] = FLT_MAX;
        row_sum[tile][half] = 0.f;
      }
#pragma unroll
      for (int n = 0; n < OUT_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[tile][n][e] = 0.f;
    }
  }

  __device__ __forceinline__ void attend(const Pass* place) {
    const Pass pass = *place;
    const float scale = params.power_scale;
    const int first = pass.first_tile;
    __syncthreads();  // ring, queries and limits are free
    Source source = start(place, pass);
    load_tile<false>(source, first, source.page[0], 0);
    if constexpr (RING > 2) load_tile<true>(source, first, source.page[0], S::TILE_BYTES);
    if constexpr (RING > 3) load_tile<false>(source, first + 1, source.page[1], 2 * S::TILE_BYTES);
    if (first < pass.whole_begin || pass.whole_end < pass.end_tile)
      find_limits<S::ROWS>(header, rows, item.row_count, pass, limits);
    if (pass.segment != segment) {
      enter_segment(segment = pass.segment);
      __syncthreads();
      hold_queries();
    }
    start_sums();

    uint32_t slot = 0;  // of the keys
    for (int t = first; t < source.end; ++t) {
      const bool whole = t >= pass.whole_begin && t < pass.whole_end;
      const uint32_t values = after(slot);
      const int32_t page = source.page[0];
      next_pages(source, t);
      await_tile();  // the keys are here, and everybody is done with the values before them
      if constexpr (RING == 4) load_tile<true>(source, t + 1, source.page[0], before(slot));
      if constexpr (RING == 3) load_tile<false>(source, t + 1, source.page[0], before(slot));
      if constexpr (RING == 2) load_tile<true>(source, t, page, before(slot));
      compute_scores(slot);
      if (!whole) mask_scores(pass.begin + t * TILE);
      share_maxima();
      __syncthreads();
      raise_maxima(scale);
      compute_probabilities(scale);
      await_tile();  // the values and all probabilities are here
      if constexpr (RING == 4) load_tile<false>(source, t + 2, source.page[1], slot);
      if constexpr (RING == 3) load_tile<true>(source, t + 1, source.page[0], slot);
      if constexpr (RING == 2) load_tile<false>(source, t + 1, source.page[0], slot);
      if (whole)
        accumulate(values);
      else
        accumulate_for_some(values, pass.begin + t * TILE);
      slot = next(slot);
    }
    wait_copies<0>();
    share_sums(*place);
  }

  // Places in the ring, in bytes: of the values behind a tile's keys, of the keys behind those
  // values, and the one before the keys.
  static __device__ __forceinline__ uint32_t after(uint32_t keys) {
    if constexpr (RING == 3) return keys == 2 * S::TILE_BYTES ? 0 : keys + S::TILE_BYTES;
    return keys + S::TILE_BYTES;
  }
  static __device__ __forceinline__ uint32_t next(uint32_t keys) {
    if constexpr (RING == 3) return keys == 0 ? 2 * S::TILE_BYTES : keys - S::TILE_BYTES;
    return (RING - 2) * S::TILE_BYTES - keys;
  }
  static __device__ __forceinline__ uint32_t before(uint32_t keys) {
    if constexpr (RING == 3) return next(keys);
    return (RING - 1) * S::TILE_BYTES - keys;
  }

  // Leaves the rows' sums in row_sum of every thread that has the row, and 0 where nothing is seen.
  __device__ void share_sums(const Pass& pass) {
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = row_sum[tile][half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == 0) reinterpret_cast<float*>(&quarters[row_of(tile, half)])[quarter] = sum;
      }
    __syncthreads();
    const uint32_t seen_by = pass.seen_by[first_row / 32] >> lane / 4;
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(tile, half);
        const float4 part = quarters[row];
        const bool seen = seen_by & 1u << (tile * 16 + half * 8);
        row_sum[tile][half] = seen ? ((part.x + part.y) + part.z) + part.w : 0.f;
        bias[tile][half] = -bias[tile][half];  // what it stands for, in powers of two
      }
  }

  // ---- results ------------------------------------------------------------------------------

  __device__ __forceinline__ int dimension(int n) const {
    return quarter * (D / 4) + n * 8 + lane % 4 * 2;
  }

  // Stores (max, sum, out) of the rows in a slot.
  __device__ void store(int slot_row, const float (&top)[WARP_TILES][2],
                        const float (&sum)[WARP_TILES][2]) const {
    const Slots slots = slots_of<D>(params, head);
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(tile, half);
        if (row >= item.row_count) continue;
        if (quarter == 0 && lane % 4 == 0)
          slots.stats[slot_row + row] = {top[tile][half], sum[tile][half]};
        if (sum[tile][half] == 0.f) continue;
        float* to = slots.out + int64_t(slot_row + row) * D;
#pragma unroll
        for (int n = 0; n < OUT_TILES; ++n)
          *reinterpret_cast<float2*>(to + dimension(n)) = {out[tile][n][2 * half],
                                                           out[tile][n][2 * half + 1]};
      }
  }

  // Folds the result of pass i of the item into what the passes before it left in the item's slot,
  // and returns (max, sum). Outputs come from there, each to the thread that stored it.
  __device__ void fold_pass(int i, float (&top)[WARP_TILES][2], float (&sum)[WARP_TILES][2]) {
    const Slots slots = slots_of<D>(params, head);
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(tile, half);
        const float2 so_far = folded[i % 2 * S::ROWS + row];
        top[tile][half] = so_far.x;
        sum[tile][half] = so_far.y;
        const Weights w =
            fold(top[tile][half], sum[tile][half], bias[tile][half], row_sum[tile][half]);
        if (quarter == 0 && lane % 4 == 0)
          folded[(i + 1) % 2 * S::ROWS + row] = {top[tile][half], sum[tile][half]};
        if (row >= item.row_count || w.how == Fold::Replace || so_far.y == 0.f) continue;
        const float* from = slots.out + int64_t(item.slot_row + row) * D;
        const bool mix = w.how == Fold::Mix;
#pragma unroll
        for (int n = 0; n < OUT_TILES; ++n) {
          float (&x)[4] = out[tile][n];
          const float2 before = *reinterpret_cast<const float2*>(from + dimension(n));
          if (mix) {
            x[2 * half] = __fmaf_rn(before.x, w.kept, __fmul_rn(x[2 * half], w.added));
            x[2 * half + 1] = __fmaf_rn(before.y, w.kept, __fmul_rn(x[2 * half + 1], w.added));
          } else {
            x[2 * half] = before.x;
            x[2 * half + 1] = before.y;
          }
        }
      }
  }

  __device__ void write_output(const float (&top)[WARP_TILES][2],
                               const float (&sum)[WARP_TILES][2]) const {
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(tile, half);
        if (r >= item.row_count) continue;
        const Row row = header.array<Row>(header.rows)[item.row_begin + r];
        const int query_head = head * params.group + row.head;
        const float total = sum[tile][half];
        const float inverse = total == 0.f ? 0.f : 1.f / total;
        Element* to =
            static_cast<Element*>(params.out.data) + row_offset(params.out, row, query_head);
#pragma unroll
        for (int n = 0; n < OUT_TILES; ++n) {
          const float x = total == 0.f ? 0.f : out[tile][n][2 * half] * inverse;
          const float y = total == 0.f ? 0.f : out[tile][n][2 * half + 1] * inverse;
          if (params.wide_out) {
            *reinterpret_cast<uint32_t*>(to + dimension(n)) = T::pack(x, y);
          } else {
            to[dimension(n)] = T::narrow(x);
            to[dimension(n) + 1] = T::narrow(y);
          }
        }
        if (params.lse && quarter == 0 && lane % 4 == 0)
          *lse_place(params, row, query_head) = log_sum<T>(top[tile][half], total);
      }
  }

  __device__ void run() {
    load_rows();
    float top[WARP_TILES][2], sum[WARP_TILES][2];
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[tile][half] = 0.f;
    const Pass* passes = header.array<Pass>(header.passes);
    for (int i = item.pass_begin; i < item.pass_end; ++i) {
      attend(passes + i);
      if (item.what == STORES) {
        store(item.slot_row + (i - item.pass_begin) * item.row_count, bias, row_sum);
      } else {
        fold_pass(i - item.pass_begin, top, sum);
        if (item.what == FOLDS || i + 1 < item.pass_end) store(item.slot_row, top, sum);
      }
    }
    if (item.what == WRITES_OUTPUT) write_output(top, sum);
  }
};

template <class T, int D, int ROW_TILES>
__global__ void __launch_bounds__(Shape<D, ROW_TILES>::THREADS, Shape<D, ROW_TILES>::BLOCKS)
    attend_kernel(const __grid_constant__ AttendParams params) {
  extern __shared__ __align__(128) char shared[];
  const Header& header = *params.header;
  const int work = header.num_items * params.kv_heads;
  for (int i = blockIdx.x; i < work; i += gridDim.x) {
    const Item& item = header.array<Item>(header.items)[i / params.kv_heads];
    Attention<T, D, ROW_TILES>(params, item, i % params.kv_heads, shared).run();
    __syncthreads();
  }
}

}  // namespace hogwild::cuda

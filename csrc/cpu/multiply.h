// Small matrix products, the whole arithmetic of attention but for its softmax:
//
//     c [rows, columns]  (+)=  factors [rows, elements] * tile [elements, columns]
//
// Scores are rotated queries times a tile of keys, outputs are weights times a tile of values.
// Factors and c lie in scratch memory, the tile is what the cache stores: words of one element
// (float32) or of two that follow each other (half types), 16 columns side by side, see pages.h.
// Whatever the number of rows, an element of c goes through the same operations in the same order.

#pragma once

#include "vec.h"

namespace {

constexpr int COLUMN_BLOCK = 16;
constexpr int BLOCK_VECTORS = COLUMN_BLOCK / LANES;

struct Tile {
  const uint32_t* words;
  int64_t stride;  // in words, from one word of a column to its next
  int64_t block;   // in words, from one block of columns to the next
};

constexpr int WORDS_AT_ONCE = 16;  // of a factor's row, in a product in tiles

// Memory to be asked for, `rows` pieces of `row_lines` lines.
struct Lines {
  const void* first;
  int rows, row_lines;
  int64_t stride;  // in bytes, from one row to the next
};

// The tile that comes next, asked for a few lines at a time while something is computed. Keys and
// values take turns: processors run ahead of two streams of lines better than of one that is asked
// for in bursts.
class Ahead {
 public:
  // Everything will have been asked for in so many steps.
  void start(Lines keys, Lines values, int steps) {
    streams_[0] = stream(keys);
    streams_[1] = stream(values);
    const int most = streams_[0].left > streams_[1].left ? streams_[0].left : streams_[1].left;
    rate_ = (most * ONE + steps - 1) / steps;
    credit_ = 0;
    length_ = 0;
    next_run();
  }

  HOGWILD_INLINE void step() {
    credit_ += rate_;
    while (credit_ >= ONE) {
      const int due = credit_ / ONE, lines = due < run_ ? due : run_;
      for (int i = 0; i < lines; ++i) {
        __builtin_prefetch(streams_[0].at + i * LINE, 0, 2);
        __builtin_prefetch(streams_[1].at + i * LINE, 0, 2);
      }
      for (Stream& s : streams_) s.at += lines * LINE;
      credit_ -= lines * ONE;
      if ((run_ -= lines) == 0) next_run();
    }
  }

 private:
  static constexpr int LINE = 64, ONE = 256;  // bytes; units of credit for a line

  struct Stream {
    const char* at;
    int64_t skip;  // from the end of a row to the next
    int row_lines;
    int in_row, left;  // lines
  };

  static Stream stream(Lines lines) {
    return {(const char*)lines.first, lines.stride - LINE * lines.row_lines, lines.row_lines,
            lines.row_lines, lines.rows * lines.row_lines};
  }

  // A run is over: of a row, or of all of a stream, which then follows the other one.
  __attribute__((noinline)) void next_run() {
    run_ = 0;
    for (Stream& s : streams_) {
      if (s.left == 0) continue;
      s.left -= length_;
      s.in_row -= length_;
      if (s.in_row == 0) {
        s.in_row = s.row_lines;
        s.at += s.skip;
      }
      if (s.left && (run_ == 0 || s.in_row < run_)) run_ = s.in_row;
    }
    for (int i = 0; i < 2; ++i)
      if (streams_[i].left == 0) streams_[i].at = streams_[1 - i].at;
    if (run_ == 0) rate_ = credit_ = 0;
    length_ = run_;
  }

  Stream streams_[2] = {};
  int run_ = 0, length_ = 0;  // lines that are left of a run, and all of it
  int rate_ = 0, credit_ = 0;
};

// ---- in vector registers ------------------------------------------------------------------

// ROWS x BLOCKS of columns are accumulated at a time, sized for the register file. An addition's
// latency needs about eight accumulators to hide behind, and each load should serve several.
#if HOGWILD_LANES == 16
constexpr int MAX_ROWS = 6;  // of 32 registers
constexpr int most_blocks(int) { return 4; }
#elif HOGWILD_LANES == 8
constexpr int MAX_ROWS = 6;  // of 16
constexpr int most_blocks(int rows) { return rows > 2 ? 1 : 2; }
#else
constexpr int MAX_ROWS = 2;  // of 16, or NEON's 32
constexpr int most_blocks(int) { return 1; }
#endif

constexpr int WORDS_A_STEP = 4;  // that a product asks for the next tile

// acc[r] += factor r * element, for the elements of all vectors.
template <int ROWS, int VECTORS, int FACTOR_STRIDE>
HOGWILD_INLINE void add_products(vfloat (&acc)[ROWS][VECTORS], const uint32_t* factors,
                                 const vfloat (&element)[VECTORS]) {
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    const vfloat factor = splat(bits_to_float(factors[r * FACTOR_STRIDE]));
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = fma(factor, element[v], acc[r][v]);
  }
}

// Where vector v of a row of words begins.
HOGWILD_INLINE const uint32_t* vector_of(const uint32_t* words, int64_t block, int v) {
  return words + v / BLOCK_VECTORS * block + v % BLOCK_VECTORS * LANES;
}

template <class T, int ROWS, int BLOCKS, int FACTOR_STRIDE, int C_STRIDE>
__attribute__((noinline)) static void multiply_block(const uint32_t* factors, Tile tile, int words,
                                                     float* c, bool add, Ahead& ahead) {
  constexpr int VECTORS = BLOCKS * BLOCK_VECTORS;
  vfloat acc[ROWS][VECTORS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
      acc[r][v] = add ? load<vfloat>(c + r * C_STRIDE + v * LANES) : vfloat{};
  const uint32_t* at = tile.words;
  while (words > 0) {
    ahead.step();
    const uint32_t* const end = at + (words < WORDS_A_STEP ? words : WORDS_A_STEP) * tile.stride;
    words -= WORDS_A_STEP;
    do {
      if constexpr (MULTIPLIES_PAIRS<T>) {
        vuint pairs[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) pairs[v] = load<vuint>(vector_of(at, tile.block, v));
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
          const vuint factor = splat(factors[r * FACTOR_STRIDE]);
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) acc[r][v] = multiply_pairs(factor, pairs[v], acc[r][v]);
        }
      } else {
        vfloat element[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
          element[v] = T::first(load<vuint>(vector_of(at, tile.block, v)));
        add_products<ROWS, VECTORS, FACTOR_STRIDE>(acc, factors, element);
        if constexpr (PER_WORD<T> == 2) {
          ++factors;
          // Loaded again, from the innermost cache: kept, the pairs would take the registers of
          // accumulators.
          asm("" : "+r"(at));
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v)
            element[v] = T::second(load<vuint>(vector_of(at, tile.block, v)));
          add_products<ROWS, VECTORS, FACTOR_STRIDE>(acc, factors, element);
        }
      }
      ++factors;
      at += tile.stride;
    } while (at != end);
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(c + r * C_STRIDE + v * LANES, acc[r][v]);
}

typedef void (*MultiplyBlock)(const uint32_t*, Tile, int, float*, bool, Ahead&);

// By rows and blocks of columns.
template <class T, int FACTOR_STRIDE, int C_STRIDE>
struct Blocks {
  struct Table {
    MultiplyBlock block[MAX_ROWS + 1][5] = {};
  };
  template <int ROWS, int BLOCKS>
  static constexpr void fill(Table& t) {
    t.block[ROWS][BLOCKS] = multiply_block<T, ROWS, BLOCKS, FACTOR_STRIDE, C_STRIDE>;
    if constexpr (BLOCKS > 1)
      fill<ROWS, BLOCKS - 1>(t);
    else if constexpr (ROWS > 1)
      fill<ROWS - 1, most_blocks(ROWS - 1)>(t);
  }
  static constexpr Table make() {
    Table t;
    fill<MAX_ROWS, most_blocks(MAX_ROWS)>(t);
    return t;
  }
  static constexpr Table table = make();
};

// Rows and blocks of columns in pieces of about equal size. What is read of the tile serves all
// rows while it is close.
struct Pieces {
  int rows, columns;

  Pieces(int some_rows, int blocks) {
    rows = (some_rows + MAX_ROWS - 1) / MAX_ROWS;
    const int most = most_blocks((some_rows + rows - 1) / rows);
    columns = (blocks + most - 1) / most;
  }
};

template <class T, int FACTOR_STRIDE, int C_STRIDE>
static void multiply_vectors(const uint32_t* factors, int rows, Tile tile, int words, int columns,
                             float* c, bool add, Ahead& ahead) {
  const int blocks = columns / COLUMN_BLOCK;
  const Pieces pieces(rows, blocks);
  for (int j = 0; j < pieces.columns; ++j) {
    const int block = j * blocks / pieces.columns;
    const int some_blocks = (j + 1) * blocks / pieces.columns - block;
    Tile piece = tile;
    piece.words += block * tile.block;
    for (int i = 0; i < pieces.rows; ++i) {
      const int row = i * rows / pieces.rows, some_rows = (i + 1) * rows / pieces.rows - row;
      Blocks<T, FACTOR_STRIDE, C_STRIDE>::table.block[some_rows][some_blocks](
          factors + row * FACTOR_STRIDE, piece, words, c + row * C_STRIDE + block * COLUMN_BLOCK,
          add, ahead);
    }
  }
}

// ---- in AMX tiles -------------------------------------------------------------------------

#if defined(__AMX_BF16__)

constexpr int AMX_ROWS = 16;

// Up to 16 rows are one block by four of columns, so that memory is read in order. More are taken
// by two blocks and two, so that what is loaded is used twice; the last block may be a shorter one.
// Loading a configuration takes as long as many products, so both shapes of rows are in it.
//
//              tiles 6, 7, 6, 7                     tile 6   tile 7     of the keys or values
//     tile 4 | tiles 0, 1, 2, 3            tile 4 | tile 0   tile 1
//     factors                              tile 5 | tile 2   tile 3
class AmxTiles {
 public:
  ~AmxTiles() {
    if (configured_) _tile_release();
  }

  // Rows of tiles 0, 1, 4 and of tiles 2, 3, 5, and words of each row of factors.
  void configure(int first, int second, int words) {
    if (configured_ && first == first_ && second == second_ && words == words_) return;
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = uint16_t(t == 4 || t == 5 ? words * 4 : 64);
      config.rows[t] = uint8_t(t >= 6 ? words : t == 0 || t == 1 || t == 4 ? first : second);
    }
    asm volatile("" : : "m"(config));  // GCC's own says only that the first bytes are read
    _tile_loadconfig(&config);
    configured_ = true;
    first_ = first, second_ = second, words_ = words;
  }

  template <int FACTOR_STRIDE, int C_STRIDE>
  void multiply(const uint32_t* factors, int remainders, int rows, Tile tile, int words,
                int columns, float* c, bool add, Ahead& ahead) {
    asm volatile("" : : : "memory");  // GCC's tile loads do not say that they read memory
    const int whole = words / WORDS_AT_ONCE * WORDS_AT_ONCE, rest = words - whole;
    if (whole)
      some_words<FACTOR_STRIDE, C_STRIDE>(factors, remainders, rows, tile, WORDS_AT_ONCE, whole,
                                          columns, c, add, ahead);
    if (rest) {
      tile.words += whole * tile.stride;
      some_words<FACTOR_STRIDE, C_STRIDE>(factors + whole, remainders, rows, tile, rest, rest,
                                          columns, c, add || whole, ahead);
    }
  }

  // How many steps ahead a product takes.
  static int steps(int rows, int words, int columns) {
    const int blocks = (rows + AMX_ROWS - 1) / AMX_ROWS;
    const int groups = rows % AMX_ROWS == 0 ? (blocks + 1) / 2 : blocks > 1 ? blocks - 1 : 1;
    return groups * ((words + WORDS_AT_ONCE - 1) / WORDS_AT_ONCE) * (columns / 16);
  }

 private:
  // All rows; `words` is a multiple of `step`.
  template <int FACTOR_STRIDE, int C_STRIDE>
  void some_words(const uint32_t* factors, int remainders, int rows, Tile tile, int step, int words,
                  int columns, float* c, bool add, Ahead& ahead) {
    if (rows <= AMX_ROWS) {
      configure(rows, rows, step);
      for (int column = 0; column < columns; column += 64) {
        const uint32_t* of = tile.words + column / COLUMN_BLOCK * tile.block;
        float* to = c + column;
        const auto some = [&](auto right) {
          block<false, right.value, FACTOR_STRIDE, C_STRIDE>(factors, remainders, of, tile, step,
                                                             words, to, add, ahead);
        };
        switch (columns - column < 64 ? (columns - column) / 16 : 4) {
          case 1: some(Number<1>{}); break;
          case 2: some(Number<2>{}); break;
          case 3: some(Number<3>{}); break;
          case 4: some(Number<4>{}); break;
        }
      }
      return;
    }
    const int last = rows % AMX_ROWS ? rows % AMX_ROWS : AMX_ROWS;
    configure(AMX_ROWS, last, step);
    for (int row = 0; row < rows;) {
      const bool below = last == AMX_ROWS ? rows - row > AMX_ROWS : rows - row == AMX_ROWS + last;
      const uint32_t* from = factors + row * FACTOR_STRIDE;
      for (int column = 0; column < columns; column += 32) {
        const uint32_t* of = tile.words + column / COLUMN_BLOCK * tile.block;
        float* to = c + row * C_STRIDE + column;
        const auto some = [&](auto two, auto right) {
          block<two.value, right.value, FACTOR_STRIDE, C_STRIDE>(from, remainders, of, tile, step,
                                                                 words, to, add, ahead);
        };
        const bool right = columns - column > 16;
        if (below)
          right ? some(Number<1>{}, Number<2>{}) : some(Number<1>{}, Number<1>{});
        else
          right ? some(Number<0>{}, Number<2>{}) : some(Number<0>{}, Number<1>{});
      }
      row += below ? 2 * AMX_ROWS : AMX_ROWS;
    }
  }

  template <int VALUE>
  struct Number {
    static constexpr int value = VALUE;
  };

  template <bool BELOW, int RIGHT, int FACTOR_STRIDE, int C_STRIDE>
  __attribute__((noinline)) static void block(const uint32_t* factors, int remainders,
                                              const uint32_t* at, const Tile& tile, int step,
                                              int words, float* c, bool add, Ahead& ahead) {
    constexpr int64_t c_bytes = C_STRIDE * 4, factor_bytes = FACTOR_STRIDE * 4;
    constexpr int BELOW_C = AMX_ROWS * C_STRIDE;
    const int64_t tile_bytes = tile.stride * 4, across = tile.block;
    if (add) {
      _tile_loadd(0, c, c_bytes);
      if constexpr (RIGHT > 1) _tile_loadd(1, c + 16, c_bytes);
      if constexpr (RIGHT > 2) _tile_loadd(2, c + 32, c_bytes);
      if constexpr (RIGHT > 3) _tile_loadd(3, c + 48, c_bytes);
      if constexpr (BELOW) _tile_loadd(2, c + BELOW_C, c_bytes);
      if constexpr (BELOW && RIGHT > 1) _tile_loadd(3, c + BELOW_C + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int word = 0; word < words; word += step) {
      const uint32_t* from = at + word * tile.stride;
      const uint32_t* factor = factors + word;
      _tile_loadd(4, factor, factor_bytes);
      _tile_loadd(6, from, tile_bytes);
      if constexpr (RIGHT > 1) _tile_loadd(7, from + across, tile_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (RIGHT > 1) _tile_dpbf16ps(1, 4, 7);
      if constexpr (BELOW) {
        _tile_loadd(5, factor + AMX_ROWS * FACTOR_STRIDE, factor_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (RIGHT > 1) _tile_dpbf16ps(3, 5, 7);
      }
      if (remainders) {
        if constexpr (RIGHT > 2) {
          _tile_loadd(5, factor + remainders, factor_bytes);
          _tile_dpbf16ps(0, 5, 6);
          _tile_dpbf16ps(1, 5, 7);
        } else {
          _tile_loadd(4, factor + remainders, factor_bytes);
          _tile_dpbf16ps(0, 4, 6);
          if constexpr (RIGHT > 1) _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (BELOW) {
          _tile_loadd(5, factor + AMX_ROWS * FACTOR_STRIDE + remainders, factor_bytes);
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (RIGHT > 1) _tile_dpbf16ps(3, 5, 7);
        }
      }
      if constexpr (RIGHT > 2) {
        _tile_loadd(6, from + 2 * across, tile_bytes);
        if constexpr (RIGHT > 3) _tile_loadd(7, from + 3 * across, tile_bytes);
        _tile_dpbf16ps(2, 4, 6);
        if constexpr (RIGHT > 3) _tile_dpbf16ps(3, 4, 7);
        if (remainders) {
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (RIGHT > 3) _tile_dpbf16ps(3, 5, 7);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < RIGHT; ++i) ahead.step();
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (RIGHT > 1) _tile_stored(1, c + 16, c_bytes);
    if constexpr (RIGHT > 2) _tile_stored(2, c + 32, c_bytes);
    if constexpr (RIGHT > 3) _tile_stored(3, c + 48, c_bytes);
    if constexpr (BELOW) _tile_stored(2, c + BELOW_C, c_bytes);
    if constexpr (BELOW && RIGHT > 1) _tile_stored(3, c + BELOW_C + 16, c_bytes);
  }

  bool configured_ = false;
  int first_ = 0, second_ = 0, words_ = 0;  // as configured
};

#endif

// ---- whichever there is -------------------------------------------------------------------

// Whether products of T are formed in AMX tiles.
template <class T>
constexpr bool IN_TILES = false;
#if defined(__AMX_BF16__)
template <>
constexpr bool IN_TILES<BFloat16> = true;
#endif

// What a thread keeps from one product to the next.
struct Multiplier {
#if defined(__AMX_BF16__)
  AmxTiles tiles;
#endif
  Ahead ahead;

  // `words` of the tile, at least one, each times as many factors as it has elements; `columns` is
  // a multiple of 16. The remainders of rounded factors, if they have any, lie so many words behind
  // them; 0: there are none.
  template <class T, int FACTOR_STRIDE, int C_STRIDE>
  void operator()(const uint32_t* factors, int remainders, int rows, Tile tile, int words,
                  int columns, float* c, bool add) {
#if defined(__AMX_BF16__)
    if constexpr (IN_TILES<T>)
      return tiles.multiply<FACTOR_STRIDE, C_STRIDE>(factors, remainders, rows, tile, words,
                                                     columns, c, add, ahead);
#endif
    multiply_vectors<T, FACTOR_STRIDE, C_STRIDE>(factors, rows, tile, words, columns, c, add,
                                                 ahead);
    if (remainders)
      multiply_vectors<T, FACTOR_STRIDE, C_STRIDE>(factors + remainders, rows, tile, words, columns,
                                                   c, true, ahead);
  }

  // How many steps ahead such a product takes.
  template <class T>
  static int steps(bool remainders, int rows, int words, int columns) {
#if defined(__AMX_BF16__)
    if constexpr (IN_TILES<T>) return AmxTiles::steps(rows, words, columns);
#endif
    const Pieces pieces(rows, columns / COLUMN_BLOCK);
    const int steps = (words + WORDS_A_STEP - 1) / WORDS_A_STEP;
    return pieces.rows * pieces.columns * steps * (remainders ? 2 : 1);
  }
};

}  // namespace

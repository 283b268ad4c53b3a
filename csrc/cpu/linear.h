// Linear layers of few rows: out = x W^T + bias, W stored so that it is read once, in order, for
// all rows together.
//
//   weight  [panels][PANEL / 16][units][16]   16 outputs side by side; a unit is one float, or two
//                                             half-precision inputs, as in a page of keys
//
// Every (row, output) is one chain of fused multiply-adds over the inputs, whatever the block's
// shape: a row's bits do not depend on how many rows there are.

#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using hogwild::cpu::LINEAR_PANEL;
using hogwild::cpu::LinearArgs;

constexpr int OUTPUT_BLOCK = 16;                 // outputs that lie side by side
constexpr int OUTPUT_VECTORS = OUTPUT_BLOCK / LANES;
constexpr int PREFETCH_BYTES = 4096;             // ahead, in each block of outputs

// Register blocks: rows x vectors of accumulators, sized for the register file.
#if HOGWILD_LANES == 16
constexpr int LINEAR_ROWS = 12;                  // of 32 registers
constexpr int FEW_ROWS = 6;
#elif HOGWILD_LANES == 8
constexpr int LINEAR_ROWS = 6;                   // of 16
constexpr int FEW_ROWS = 2;
#else
constexpr int LINEAR_ROWS = 2;                   // of 16, or NEON's 32
constexpr int FEW_ROWS = 2;
#endif
constexpr int FEW_ROWS_VECTORS = 4, MANY_ROWS_VECTORS = 2;

// out[r][v] = <x of row r, weights of vector v>.
template <class T, int ROWS, int VECTORS>
__attribute__((noinline)) static void linear_block(const float* x, int64_t x_stride,
                                                   const uint32_t* weight, int64_t block_stride,
                                                   int units, float* out) {
  constexpr int PER_UNIT = 4 / sizeof(typename T::element);
  vfloat acc[ROWS][VECTORS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = vfloat{};
  int u = 0;
  do {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v += OUTPUT_VECTORS)
      __builtin_prefetch((const char*)(weight + v / OUTPUT_VECTORS * block_stride) +
                         PREFETCH_BYTES);
    vfloat w[PER_UNIT][VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const uint32_t* from =
          weight + v / OUTPUT_VECTORS * block_stride + v % OUTPUT_VECTORS * LANES;
      if constexpr (PER_UNIT == 2) {
        const vuint pairs = load<vuint>(from);
        w[0][v] = T::first(pairs);
        w[1][v] = T::second(pairs);
      } else {
        w[0][v] = load<vfloat>(from);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < PER_UNIT; ++i)
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        const vfloat input = splat(x[r * x_stride + i]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = fma(input, w[i][v], acc[r][v]);
      }
    weight += OUTPUT_BLOCK;
    x += PER_UNIT;
  } while (++u < units);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(out + (r * VECTORS + v) * LANES, acc[r][v]);
}

typedef void (*LinearBlock)(const float*, int64_t, const uint32_t*, int64_t, int, float*);

template <class T>
struct LinearBlocks {
  struct Table {
    LinearBlock few[FEW_ROWS + 1] = {};
    LinearBlock many[LINEAR_ROWS + 1] = {};
  };
  template <int ROWS>
  static constexpr void fill(Table& t) {
    if constexpr (ROWS <= FEW_ROWS) t.few[ROWS] = linear_block<T, ROWS, FEW_ROWS_VECTORS>;
    t.many[ROWS] = linear_block<T, ROWS, MANY_ROWS_VECTORS>;
    if constexpr (ROWS > 1) fill<ROWS - 1>(t);
  }
  static constexpr Table make() {
    Table t;
    fill<LINEAR_ROWS>(t);
    return t;
  }
  static constexpr Table table = make();
};

// All rows against the outputs of one panel.
template <class T>
static void linear(const LinearArgs& args, int32_t panel) {
  typedef typename T::element E;
  const int units = int(args.inputs * sizeof(E) / 4);
  const int64_t block_stride = int64_t(units) * OUTPUT_BLOCK;
  const uint32_t* weight =
      (const uint32_t*)args.weight + panel * (LINEAR_PANEL / OUTPUT_BLOCK) * block_stride;
  const int row_blocks = int((args.rows + LINEAR_ROWS - 1) / LINEAR_ROWS);
  const bool few = args.rows <= FEW_ROWS;
  const int width = (few ? FEW_ROWS_VECTORS : MANY_ROWS_VECTORS) * LANES;
  alignas(64) float sums[LINEAR_ROWS * 4 * LANES];
  const int first_output = panel * LINEAR_PANEL;
  for (int o = 0; o < LINEAR_PANEL && first_output + o < args.outputs; o += width)
    for (int b = 0; b < row_blocks; ++b) {
      const int64_t row = args.rows * b / row_blocks;
      const int rows = int(args.rows * (b + 1) / row_blocks - row);
      // A block of outputs may be wider than a vector, or the other way round.
      const uint32_t* from = weight + o / OUTPUT_BLOCK * block_stride + o % OUTPUT_BLOCK;
      (few ? LinearBlocks<T>::table.few : LinearBlocks<T>::table.many)[rows](
          args.x + row * args.inputs, args.inputs, from, block_stride, units, sums);
      const int begin = first_output + o;
      const int end = begin + width < args.outputs ? begin + width : args.outputs;
      for (int r = 0; r < rows; ++r) {
        const float* sum = sums + r * width - begin;
        E* to = (E*)args.out + (row + r) * args.outputs;
        if (const E* bias = (const E*)args.bias)
          for (int i = begin; i < end; ++i) to[i] = T::narrow(sum[i] + T::widen(bias[i]));
        else
          for (int i = begin; i < end; ++i) to[i] = T::narrow(sum[i]);
      }
    }
}

}  // namespace

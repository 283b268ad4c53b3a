// The CPU backend: the kernels of the instruction set chosen at run time, spread over threads.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace hogwild::cpu {

// The kernels that this process uses: the best that the CPU has, or those that the environment
// variable HOGWILD_ISA names. Throws std::runtime_error if that names none, or one that the CPU or
// the build lacks.
const Kernels& kernels();

// Instruction sets that are built and that this CPU has, best first.
std::vector<const char*> available_isas();

// Memory that attention needs beside its operands, kept between the layers of a step. One attend at
// a time may use it.
class Workspace {
 public:
  char* scratch(int threads, int64_t bytes_each);
  float* partials(int64_t floats);

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<char, Free> scratch_, partials_;
  int64_t scratch_size_ = 0, partials_size_ = 0;
};

// `args.heads_at_once` is chosen here. `padded_queries`: Q of a padded query [W, Q, H, D], whose
// tokens past query_lengths are set to out = 0, lse = -inf; 0 for packed ones.
void attend(AttendArgs args, int32_t padded_queries, int threads, Workspace& workspace);
void append(const AppendArgs& args, int threads);
void commit(const CommitArgs& args, int threads);
void copy_pages(const Heads& heads, const LayerPages& layers, const int32_t* source_pages,
                const int32_t* target_pages, int64_t count, int threads);
void read(const ReadArgs& args);
void linear(const LinearArgs& args, int threads);

// A number that tells whether any of every `step`-th of so many 32-bit words has changed.
uint64_t fingerprint(const void* data, int64_t words, int64_t step, int threads);

// Ceilings of the machine, to be timed. Reads all of `bytes`, a multiple of 4, and returns the sum
// of the 32-bit words.
uint32_t read_bandwidth_pass(const void* data, int64_t bytes, int threads);
// Multiply-adds in registers, `iterations` of a loop in all; returns how many were done.
int64_t fma_pass(DType dtype, int64_t iterations, int threads);

// Elements of a page of all heads.
int64_t key_page_elements(const Heads& heads);
int64_t value_page_elements(const Heads& heads);

}  // namespace hogwild::cpu

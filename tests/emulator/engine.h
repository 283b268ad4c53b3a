// The emulated GPU: runs kernels, given as the text that lower.py makes of PTX, one warp
// instruction at a time, and reports what a GPU would have done wrong without telling. For one
// thread at a time.

#pragma once

#include <cstdint>

struct EmuKernelInfo {
  int static_shared;  // bytes
  int max_threads;    // of a block, from __launch_bounds__; 0 = any
  int num_params;
  const int* param_bytes;  // [num_params]
};

// What a launch did; all blocks and warps together.
struct EmuCounters {
  uint64_t blocks, warp_instructions, lane_instructions;
  uint64_t load_sectors, store_sectors;  // 32 bytes each, of global memory
  uint64_t wavefronts, least_wavefronts;  // passes of shared memory, and how few would do
  uint64_t mma, barriers;
};

struct EmuFinding {
  const char* kind;
  const char* kernel;
  const char* file;  // of the source, empty if unknown
  int line, ptx_line;
  int block, thread, other_thread;  // -1 where it means nothing
  uint64_t address, count;          // how often in this place
};

#pragma GCC visibility push(default)
extern "C" {

// Adds a kernel. 0, or -1 and a reason in emu_error.
int emu_load(const char* text);
const EmuKernelInfo* emu_kernel_info(const char* kernel);  // null if it is not loaded

// Runs a kernel to its end. 0, or -1 and a reason in emu_error: it went on for too long, or there
// is no such kernel. Findings are not errors.
int emu_launch(const char* kernel, const unsigned grid[3], const unsigned block[3],
               unsigned dynamic_shared, void** params);
const char* emu_error();

// Global memory that kernels may touch; what is not registered is out of bounds. Registering a
// known address again changes its size and what is known of its content.
void emu_memory_register(uint64_t address, uint64_t bytes, int initialised);
void emu_memory_unregister(uint64_t address);
void emu_memory_initialise(uint64_t address, uint64_t bytes);
int emu_memory_known(uint64_t address, uint64_t bytes);  // exactly this range is registered

// 0: nothing is watched; 1: everything.
void emu_set_checks(int level);

int64_t emu_num_findings();
EmuFinding emu_finding(int64_t i);
void emu_clear_findings();

EmuCounters emu_counters();  // since the last clearing
void emu_clear_counters();
// Warp instructions by PTX line of a kernel, since it was loaded: [num_lines].
int emu_line_counts(const char* kernel, uint64_t* counts, int num_lines);

// All opcodes, separated by blanks.
const char* emu_opcodes();

}  // extern "C"
#pragma GCC visibility pop

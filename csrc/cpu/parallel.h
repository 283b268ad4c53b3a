// Runs a function on several threads of the OpenMP pool that torch uses.

#pragma once

#include <functional>

namespace hogwild::cpu {

// Calls work(0) ... work(n - 1), each once, from up to n threads, and returns when all are done.
// The pool is the OpenMP runtime that torch has loaded: two pools whose threads spin would fight
// over the cores. Where there is none, plain threads that sleep between calls do it. `work` must
// not throw.
void parallel(int n, const std::function<void(int)>& work);

// "OpenMP of torch" or "own threads".
const char* thread_pool();

}  // namespace hogwild::cpu

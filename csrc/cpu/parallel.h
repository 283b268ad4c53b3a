// Runs a function on several threads of the OpenMP pool that torch uses.

#pragma once

#include <functional>

namespace hogwild::cpu {

// Calls work(thread, item) for item = 0 ... items - 1, each once, and returns when all are done. Up
// to `threads` threads draw the items in order, so that a thread that is held up draws fewer;
// `thread` is from 0 to threads - 1, and different in calls that run at the same time. `work` must
// not throw.
//
// The pool is the OpenMP runtime that torch has loaded: two pools whose threads spin would fight
// over the cores. Where there is none, plain threads that sleep between calls do it.
void parallel(int threads, int items, const std::function<void(int thread, int item)>& work);

// "OpenMP of torch" or "own threads".
const char* thread_pool();

}  // namespace hogwild::cpu

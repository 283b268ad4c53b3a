// The cases: each draws one execution from a random number generator, runs it, and raises a Finding
// where something is wrong.

#pragma once

#include "memory.h"
#include "oracle.h"

namespace fuzz {

void attend_rows(Rng& rng);  // the op on plain tensors: plan, attend
void cache_life(Rng& rng);  // pages: append, attend, commit, copy, read
void linear_layer(Rng& rng);
void large_plan(Rng& rng);  // a plan alone, against a count of who sees what; angles

// ---- what they share ----------------------------------------------------------------------

DType draw_dtype(Rng& rng);
int draw_dim(Rng& rng);  // a multiple of 8 up to 256
std::vector<float> draw_frequencies(Rng& rng, int head_dim);
void draw_scoring(Rng& rng, Problem& p);
int draw_length(Rng& rng);  // of a segment
int32_t draw_offset(Rng& rng, int32_t length);

// What results of this instruction set may be off by.
Limits limits_of(DType dtype);

// The rows of worker w of `out` and, if there is one, `lse` [Q, Hq], against the oracle. `first`:
// the worker's first token in `query` and `out`, `at`: its index in their first dimension. `sound`:
// the tokens to look at, all if it is empty.
void check_worker(const Problem& p, const std::vector<Dense>& segments, int w, const Tensor& query,
                  const Tensor& out, int at, int first, const float* lse,
                  const std::vector<bool>& sound);

// Runs `body`; a Finding that it raises says what the problem was.
template <class Body>
void with_words(const Problem& p, Body body) {
  try {
    body();
  } catch (const Finding& finding) {
    throw Finding(finding.what() + ("\n  " + p.words()));
  }
}

// Raises a Finding if any row differs in a bit.
void require_same_rows(const Tensor& a, int a_at, int a_first, const Tensor& b, int b_at,
                       int b_first, int tokens, const std::string& what);

// Raises a Finding if what lies between the rows of `t` is not what it was.
void require_gaps(const Tensor& t, const std::vector<char>& before, const std::string& what);

}  // namespace fuzz

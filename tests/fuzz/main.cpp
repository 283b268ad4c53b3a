// Draws calls of the CPU backend from a seed and holds them against an oracle:
//
//     fuzz --seed 1 --count 300000      so many executions
//     fuzz --seed 1 --seconds 600       or as many as go into so many seconds
//     fuzz --seed 1 --start 300000      on from there
//     fuzz --isa avx2                   on one instruction set; else on all that the CPU has, in
//     turn
//
// Every execution has a number and is drawn from that and the seed alone. Ends in 1 with the first
// thing that is wrong and a command that repeats it. Executions run in child processes, a few
// hundred each, so that one that dies, or never ends, is a finding like others.

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "../../csrc/cpu/backend.h"
#include "cases.h"

namespace {

constexpr int64_t AT_ONCE = 500;     // executions of a child
constexpr int SECONDS_EACH = 100;    // after which an execution is taken not to end
constexpr int FOUND = 3;             // exit status of a child with a finding

struct Options {
  uint64_t seed = 1;
  int64_t start = 0, count = 0, seconds = 0, print = 0;
  std::string isa;
};

[[noreturn]] void usage(const char* name, const std::string& why) {
  std::fprintf(stderr,
               "%s\nusage: %s [--seed S] [--start K] [--count N] [--seconds T] [--isa NAME]\n",
               why.c_str(), name);
  std::exit(2);
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (++i == argc) usage(argv[0], name + ": expected a value behind it");
    if (name == "--isa") {
      o.isa = argv[i];
      continue;
    }
    char* end;
    const int64_t value = std::strtoll(argv[i], &end, 10);
    if (*end || end == argv[i] || value < 0)
      usage(argv[0], name + ": expected a number, got '" + argv[i] + "'");
    if (name == "--seed")
      o.seed = uint64_t(value);
    else if (name == "--start")
      o.start = value;
    else if (name == "--count")
      o.count = value;
    else if (name == "--seconds")
      o.seconds = value;
    else if (name == "--print")
      o.print = value;
    else
      usage(argv[0], name + ": not known");
  }
  if (!o.count && !o.seconds) o.count = 10000;
  const std::vector<const char*> isas = hogwild::cpu::available_isas();
  if (!o.isa.empty() && std::find(isas.begin(), isas.end(), o.isa) == isas.end())
    usage(argv[0], "--isa: this CPU or build has no '" + o.isa + "'");
  return o;
}

// Returns a number that all draws of the execution went into.
uint64_t execute(uint64_t seed, int64_t number) {
  fuzz::Rng rng(seed, uint64_t(number));
  const double what = rng.uniform();
  if (what < 0.5)
    fuzz::attend_rows(rng);
  else if (what < 0.75)
    fuzz::cache_life(rng);
  else if (what < 0.9)
    fuzz::linear_layer(rng);
  else
    fuzz::large_plan(rng);
  return rng.next();
}

// In a child: executions begin, begin + step, ... of `isa`. `at` says, to the parent, where it is.
void run_some(const Options& o, int64_t begin, int64_t end, int64_t step, volatile int64_t* at) {
  for (int64_t number = begin; number < end; number += step) {
    *at = number;
    alarm(SECONDS_EACH);
    try {
      const uint64_t drawn = execute(o.seed, number);
      if (o.print)
        std::fprintf(stderr, "%lld %llx\n", static_cast<long long>(number),
                     static_cast<unsigned long long>(drawn));
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      std::_Exit(FOUND);
    }
  }
  std::_Exit(0);
}

}  // namespace

int main(int argc, char** argv) {
  const Options o = parse(argc, argv);
  std::vector<std::string> isas;
  for (const char* name : hogwild::cpu::available_isas()) isas.push_back(name);
  if (!o.isa.empty()) isas = {o.isa};
  const int64_t n = int64_t(isas.size());
  volatile int64_t* at = static_cast<volatile int64_t*>(
      mmap(nullptr, sizeof(int64_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  const time_t began = time(nullptr);
  int64_t next = o.start;
  const auto goes_on = [&] {
    if (o.count && next >= o.start + o.count) return false;
    return !o.seconds || time(nullptr) - began < o.seconds;
  };
  while (goes_on()) {
    const int64_t end =
        o.count ? std::min(next + AT_ONCE * n, o.start + o.count) : next + AT_ONCE * n;
    for (int64_t i = 0; i < n; ++i) {  // numbers i, i + n, ... on the i-th instruction set
      const int64_t first = next + ((i - next) % n + n) % n;
      if (first >= end) continue;
      *at = first;
      std::fflush(nullptr);
      const pid_t child = fork();
      if (child == 0) {
        setenv("HOGWILD_ISA", isas[i].c_str(), 1);
        run_some(o, first, end, n, at);
      }
      int status = 0;
      if (child < 0 || waitpid(child, &status, 0) != child) {
        std::perror("fuzz: no child process");
        return 2;
      }
      if (status == 0) continue;
      if (WIFSIGNALED(status))
        std::fprintf(stderr, "%s\n",
                     WTERMSIG(status) == SIGALRM ? "it does not end" : strsignal(WTERMSIG(status)));
      std::printf("repeat: %s --isa %s --seed %llu --start %lld --count 1\n", argv[0],
                  isas[i].c_str(), static_cast<unsigned long long>(o.seed),
                  static_cast<long long>(*at));
      return 1;
    }
    next = end;
  }
  std::string names;
  for (const std::string& name : isas) names += " " + name;
  std::printf("seed %llu: executions %lld to %lld, 0 findings;%s\n",
              static_cast<unsigned long long>(o.seed), static_cast<long long>(o.start),
              static_cast<long long>(next - 1), names.c_str());
  return 0;
}

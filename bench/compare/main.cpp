// SPDX-License-Identifier: Apache-2.0
// Times the same jobs of two versions of the library in turns, so that what else the machine does
// meets both alike: the median of the ratios tells 3 % apart where times differ by half.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

namespace {

double now() {
  const auto t = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(t).count();
}

struct version {
  void* (*make)(const char*, long, long, int, long, int);
  void (*run)(void*);
  void (*free)(void*);

  explicit version(const char* path) {
    void* const library = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      std::fprintf(stderr, "%s\n", ::dlerror());
      std::exit(1);
    }
    make = reinterpret_cast<decltype(make)>(::dlsym(library, "qeft_make"));
    run = reinterpret_cast<decltype(run)>(::dlsym(library, "qeft_run"));
    free = reinterpret_cast<decltype(free)>(::dlsym(library, "qeft_free"));
  }
};

double quantile(std::vector<double> x, double at) {
  std::sort(x.begin(), x.end());
  return x[static_cast<std::size_t>(at * static_cast<double>(x.size() - 1))];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "compare BEFORE.so AFTER.so SECONDS <jobs\n");
    return 2;
  }
  const version versions[2] = {version(argv[1]), version(argv[2])};
  const double seconds = std::atof(argv[3]);
  std::printf(
      "| job | bits | OC x IC | tokens | threads | before, us | after, us | ratio | quartiles |\n");
  std::printf("|---|---|---|---|---|---|---|---|---|\n");
  std::string job;
  long oc = 0, ic = 0, tokens = 0;
  int bits = 0, threads = 0;
  while (std::cin >> job >> oc >> ic >> bits >> tokens >> threads) {
    void* jobs[2];
    for (int v = 0; v < 2; ++v) {
      jobs[v] = versions[v].make(job.c_str(), oc, ic, bits, tokens, threads);
    }
    double once = now();
    for (int v = 0; v < 2; ++v) versions[v].run(jobs[v]);
    once = (now() - once) / 2;
    const int repeats = std::max(1, static_cast<int>(0.002 / once));
    std::vector<double> times[2], ratios;
    const double start = now();
    for (int round = 0; now() - start < seconds || round < 9; ++round) {
      double taken[2];
      for (int turn = 0; turn < 2; ++turn) {
        const int v = (round + turn) % 2;
        versions[v].run(jobs[v]);
        const double begin = now();
        for (int i = 0; i < repeats; ++i) versions[v].run(jobs[v]);
        taken[v] = (now() - begin) / repeats;
        times[v].push_back(taken[v]);
      }
      ratios.push_back(taken[1] / taken[0]);
    }
    std::printf("| %s | %d | %ld x %ld | %ld | %d | %.1f | %.1f | %.2f | %.2f - %.2f |\n",
                job.c_str(), bits, oc, ic, tokens, threads, 1e6 * quantile(times[0], 0.5),
                1e6 * quantile(times[1], 0.5), quantile(ratios, 0.5), quantile(ratios, 0.25),
                quantile(ratios, 0.75));
    std::fflush(stdout);
    for (int v = 0; v < 2; ++v) versions[v].free(jobs[v]);
  }
  if (!std::cin.eof()) {
    std::fprintf(stderr, "compare: a line is not of the form `JOB OC IC BITS TOKENS THREADS`\n");
    return 2;
  }
}

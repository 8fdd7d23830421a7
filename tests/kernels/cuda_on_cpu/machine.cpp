// One block at a time, one thread at a time: fibers by ucontext, switched by _setjmp and _longjmp
// (which, unlike swapcontext, make no system call).
//
// The scheduler runs every runnable fiber (or, when the order is changed, those of one warp, as long
// as it has any) until it waits or returns, then looks at who waits for what: warps whose lanes are all at one shuffle go on, then, if nobody can, the block's barrier
// opens. What is left over is a divergence, and the launch fails with a sentence.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

dim3 gridDim, blockDim;
uint3 blockIdx, threadIdx;

namespace etude {
constexpr size_t kSharedLimit = 227 * 1024;  // sm_90 and sm_100
constexpr size_t kMargin = 16 * 1024;
alignas(1024) unsigned char shared_bytes[kSharedLimit + kMargin];
}  // namespace etude

// Called by the tests. Order of threads and blocks: 0 ascending, 1 descending, more: that seed's
// permutation; in all but 0 a warp runs ahead of the others up to the block's barrier. The most shared memory that a launch since the last call asked for.
extern "C" void cuda_on_cpu_order(unsigned order);
extern "C" size_t cuda_on_cpu_most_shared();

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 256 * 1024;
enum class State { kRunnable, kWarp, kBlock, kReturned };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool begun;
  State state;
  unsigned mask;
  int line, source;
  uint64_t value, result;
  std::vector<std::vector<Copy>> copies;  // committed groups, and last the open one
};

std::vector<Fiber> fibers;
char* stacks = nullptr;
int current = 0, count = 0;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
std::string message;
size_t allowed = 48 * 1024, most = 0;
unsigned order = 0;

void locate(int index) {
  current = index;
  const unsigned i = static_cast<unsigned>(index);
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
}

void enter() {
  (*body)();
  fibers[current].state = State::kReturned;
  _longjmp(scheduler, 1);
}

void resume(int index) {
  locate(index);
  Fiber& fiber = fibers[index];
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

void wait(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (!_setjmp(fiber.at)) _longjmp(scheduler, 1);
}

std::string who(int index) {
  return "thread " + std::to_string(index) + " of block " + std::to_string(blockIdx.x) + "," +
         std::to_string(blockIdx.y);
}

// Lets the lanes of complete shuffles go on. False: an error is in `message`.
bool open_warps(bool* progress) {
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (fiber.state != State::kWarp) continue;
    const int base = i / 32 * 32;
    bool complete = true;
    for (int lane = 0; lane < 32; ++lane) {
      if (!(fiber.mask >> lane & 1)) continue;
      const bool exists = base + lane < count;
      if (!exists || fibers[base + lane].state == State::kReturned) {
        message = who(i) + " shuffles at line " + std::to_string(fiber.line) + " with lane " +
                  std::to_string(lane) + ", which has returned";
        return false;
      }
      const Fiber& other = fibers[base + lane];
      complete &= other.state == State::kWarp && other.line == fiber.line &&
                  other.mask == fiber.mask;
    }
    if (!(fiber.mask >> (i - base) & 1) ||
        (fiber.source >= 0 && !(fiber.mask >> fiber.source & 1))) {
      message = who(i) + " shuffles outside its mask at line " + std::to_string(fiber.line);
      return false;
    }
    if (!complete) continue;
    const unsigned mask = fiber.mask;
    uint64_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) votes |= uint64_t{fibers[base + lane].value != 0} << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Fiber& one = fibers[base + lane];
      one.result = one.source >= 0 ? fibers[base + one.source].value : votes;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) fibers[base + lane].state = State::kRunnable;
    }
    *progress = true;
  }
  return true;
}

// Opens the block's barrier where all threads are at it. False: an error is in `message`.
bool open_block() {
  for (int i = 0; i < count; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state == State::kBlock && fiber.line == fibers[0].line) continue;
    const char* did = fiber.state == State::kReturned ? " has returned"
                      : fiber.state == State::kWarp   ? " is at a shuffle at line "
                                                      : " is at the barrier at line ";
    int at = 0;
    while (at < count && (at == i || fibers[at].state != State::kBlock)) ++at;
    message = "divergence: " + who(i) + did;
    if (fiber.state != State::kReturned) message += std::to_string(fiber.line);
    if (at < count) message += ", thread " + std::to_string(at) + " at the barrier at line " +
                               std::to_string(fibers[at].line);
    return false;
  }
  for (int i = 0; i < count; ++i) fibers[i].state = State::kRunnable;
  return true;
}

std::vector<unsigned> permutation(unsigned size, unsigned salt) {
  std::vector<unsigned> made(size);
  for (unsigned i = 0; i < size; ++i) made[i] = order == 1 ? size - 1 - i : i;
  if (order > 1) std::shuffle(made.begin(), made.end(), std::mt19937(order + salt));
  return made;
}

bool run_block(size_t shared) {
  memset(etude::shared_bytes, 0xff, shared);
  memset(etude::shared_bytes + shared, 0xa5, etude::kMargin);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + i * kStack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
    fiber.begun = false;
    fiber.state = State::kRunnable;
    fiber.copies.assign(1, {});
  }
  const std::vector<unsigned> sequence = permutation(count, blockIdx.x);
  while (true) {
    bool ran = false, left = false;
    // In order 0 warps keep step; in the others each runs as far ahead as it can.
    unsigned chosen = 32;  // more than a block has
    for (unsigned i : sequence) {
      if (fibers[i].state != State::kRunnable || (order > 0 && chosen < 32 && i / 32 != chosen)) {
        continue;
      }
      chosen = i / 32;
      resume(static_cast<int>(i));
      ran = true;
    }
    for (int i = 0; i < count; ++i) left |= fibers[i].state != State::kReturned;
    if (!left) break;
    bool progress = false;
    if (!open_warps(&progress)) return false;
    if (!progress && !ran && !open_block()) return false;
  }
  for (size_t i = 0; i < etude::kMargin; ++i) {
    if (etude::shared_bytes[shared + i] == 0xa5) continue;
    message = "block " + std::to_string(blockIdx.x) + " wrote " + std::to_string(i) +
              " bytes beyond its shared memory";
    return false;
  }
  return true;
}

}  // namespace

const char* error() { return message.c_str(); }
int lane() { return current % 32; }
void allow_shared(size_t bytes) { allowed = bytes; }

void barrier(int line) {
  fibers[current].line = line;
  wait(State::kBlock);
}

uint64_t exchange(unsigned mask, uint64_t value, int source, int line) {
  Fiber& fiber = fibers[current];
  fiber.mask = mask, fiber.value = value, fiber.source = source, fiber.line = line;
  wait(State::kWarp);
  return fibers[current].result;
}

void warp_barrier(unsigned mask, int line) { exchange(mask, 0, -1, line); }

void copy_later(void* to, const void* from, size_t bytes) {
  fibers[current].copies.back().push_back({to, from, bytes});
}

void commit_copies() { fibers[current].copies.emplace_back(); }

void wait_copies(size_t groups_left) {
  auto& groups = fibers[current].copies;
  while (groups.size() - 1 > groups_left) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const size_t shared = config.dynamicSmemBytes, limit = allowed;
  allowed = 48 * 1024;
  most = std::max(most, shared);
  gridDim = config.gridDim, blockDim = config.blockDim;
  count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  if (count < 1 || count > 1024 || gridDim.y > 65535 || gridDim.z > 65535 || gridDim.x == 0 ||
      gridDim.y == 0 || shared > limit || shared > etude::kSharedLimit) {
    message = "invalid launch: " + std::to_string(count) + " threads, " + std::to_string(shared) +
              " bytes of shared memory where " + std::to_string(limit) + " were asked for";
    return cudaErrorUnknown;
  }
  if (stacks == nullptr) {
    stacks = static_cast<char*>(mmap(nullptr, 1024 * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    fibers.resize(1024);
  }
  body = &kernel;
  const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
  for (unsigned i : permutation(blocks, 0)) {
    blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
    if (!run_block(shared)) return cudaErrorUnknown;
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

extern "C" void cuda_on_cpu_order(unsigned value) { cuda_on_cpu::order = value; }

extern "C" size_t cuda_on_cpu_most_shared() { return std::exchange(cuda_on_cpu::most, 0); }

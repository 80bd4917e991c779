// Runs kernels without a GPU. The threads of a block are fibers of one thread of the processor: each
// runs until it must wait for others, at a barrier or at an operation of a whole warp, which then
// exchanges data as the PTX manual lays it out. What a GPU would punish now and then is punished here
// every time: shared memory starts as NaN, asynchronous copies arrive at the last moment, lanes that
// part ways or never meet are errors, the order of the fibers can be varied, and accesses to memory that
// nothing orders are found in any order (emulation_races.h).
#include "../device.cuh"

#include <stdio.h>
#include <stdlib.h>

#include "races.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulation {

constexpr size_t STACK_BYTES = 128 << 10;
constexpr int THREADS_MAX = 1024;

thread_local Place place;

static const Kernel*& kernels() {
  static const Kernel* first = nullptr;
  return first;
}

Kernel::Kernel(const char* name, uint64_t argument_bytes, int threads_max, void (*run)(const void*))
    : name(name), argument_bytes(argument_bytes), threads_max(threads_max), run(run), next(kernels()) {
  kernels() = this;
}

// Switching between stacks.
#ifdef __x86_64__
struct Context {
  void* stack_pointer;
};
extern "C" void pentimento_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
pentimento_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static void switch_to(Context& from, Context& to) {
  pentimento_switch(&from.stack_pointer, to.stack_pointer);
}
static void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  // As after a call of `entry`: the stack is 8 bytes off a multiple of 16.
  void** top = reinterpret_cast<void**>(stack + STACK_BYTES - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t context;
};
static void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
static void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = STACK_BYTES;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

struct Copy {
  void* to;
  const void* from;
  int bytes;  // the rest of 16 becomes zeros
};

struct Fiber {
  Context context;
  bool done;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

struct Warp {
  const char* operation;
  void* operands[32];
  int arrived;
};

// Products of four warps that one of them has begun, see emulation_hopper.h.
struct BegunProduct {
  GroupProduct lanes[32];
  float a[16][16];
  std::vector<float> b;
};
struct BegunSums {
  float (*d[32])[4];
  std::vector<float> values;
  uint64_t last;  // commit
};
struct WarpProducts {
  std::vector<BegunProduct> products;
  std::vector<uint64_t> commits;  // of each product
  std::vector<BegunSums> sums;
  uint64_t committed, finished;
};

struct NamedBarrier {
  int arrived, threads;
  std::vector<int> waiting;
  OrderMeeting meeting;
};

struct TileCopy {
  unsigned char* to;
  const TileMap* map;
  int row, piece, batch;
};
struct PhaseBarrier {
  const CountingBarrier* at;
  int count, missing, parity;
  int64_t bytes;  // announced and not arrived yet
  std::vector<TileCopy> copies;
  std::vector<Copy> rows;
  std::vector<std::pair<unsigned char*, size_t>> undecided;  // what others write meanwhile
  std::vector<int> waiting;
  uint32_t copies_begun;
  OrderMeeting meeting;
  Order ended;  // what is known when the last phase has ended
};

struct Scheduler {
  Context home;
  unsigned char* stacks = nullptr;
  std::vector<Fiber> fibers;
  Warp warps[THREADS_MAX / 32];
  std::vector<int> ready;
  size_t next_ready;
  int at_barrier;
  WarpProducts products[THREADS_MAX / 32];
  NamedBarrier named[16];
  std::vector<PhaseBarrier> phases;
  std::vector<int> at_grid;
  int order;
  uint32_t random;
  const Kernel* kernel;
  const void* args;
  Accesses accesses;
  char error[400];
};

static thread_local Scheduler scheduler;
// Whether accesses are watched, see emulation_races.h.
static thread_local bool watches;

// Blocks that wait for others.
struct Parked {
  Scheduler scheduler;
  Place place;
  std::vector<unsigned char> shared;
};
// Arrivals of blocks, in all.
static thread_local uint64_t arrivals;
// What blocks have handed on and others do not find yet.
struct Tagged {
  uint64_t* to;
  uint64_t word;
  int64_t block;
};
static thread_local std::vector<Tagged> underway;

static void go_home() { switch_to(scheduler.fibers[place.thread].context, scheduler.home); }

void fail(const char* why) {
  snprintf(scheduler.error, sizeof scheduler.error, "kernel %s, block (%lld, %lld, %lld), thread %d: %s",
           scheduler.kernel->name, (long long)place.block[0], (long long)place.block[1],
           (long long)place.block[2], place.thread, why);
  go_home();
  abort();  // a fiber that failed is never run again
}

#include "emulation_races.h"

void together(const char* operation, void* operands, void (*exchange)(void* const* lanes)) {
  Warp& warp = scheduler.warps[place.thread / 32];
  if (warp.arrived > 0 && warp.operation != operation && strcmp(warp.operation, operation) != 0) {
    char why[160];
    snprintf(why, sizeof why, "is at %s while other lanes of its warp are at %s", operation,
             warp.operation);
    fail(why);
  }
  warp.operation = operation;
  warp.operands[place.thread % 32] = operands;
  if (++warp.arrived < 32) return go_home();
  warp.arrived = 0;
  if (exchange) exchange(warp.operands);
  const int first = place.thread / 32 * 32;
  for (int i = 0; i < 32; ++i) {
    if (first + i != place.thread) scheduler.ready.push_back(first + i);
  }
}

void wait_for_warp() { together("warp_barrier", nullptr, [](void* const*) { meet(place.thread / 32 * 32, 32); }); }

void wait_for_block() {
  if (++scheduler.at_barrier < place.threads) return go_home();
  scheduler.at_barrier = 0;
  meet(0, place.threads);
  for (int i = 0; i < place.threads; ++i) {
    if (i != place.thread) scheduler.ready.push_back(i);
  }
}

void copy_later(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (bytes && reinterpret_cast<uintptr_t>(from) % 16)) {
    fail("an asynchronous copy of 16 bytes is not aligned");
  }
  touched(to, 16, WRITES);
  touched(from, size_t(bytes), READS);
  memset(to, 0xff, 16);
  scheduler.fibers[place.thread].open.push_back({to, from, bytes});
}

void commit_copies() {
  Fiber& fiber = scheduler.fibers[place.thread];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void finish_copies(int pending) {
  auto& groups = scheduler.fibers[place.thread].groups;
  while (groups.size() > size_t(pending)) {
    for (const Copy& copy : groups.front()) {
      touched(copy.to, 16, WRITES);
      memset(copy.to, 0, 16);
      memcpy(copy.to, copy.from, size_t(copy.bytes));
    }
    groups.erase(groups.begin());
  }
}

static uint16_t element(const void* row, int column) {
  uint16_t bits;
  memcpy(&bits, static_cast<const unsigned char*>(row) + 2 * column, 2);
  return bits;
}

template <bool transposed>
static void load_any(void* const* lanes) {
  const void* rows[32];
  for (int i = 0; i < 32; ++i) {
    rows[i] = static_cast<LoadMatrices*>(lanes[i])->row;
    lane_reads(i, rows[i], 16);
    if (reinterpret_cast<uintptr_t>(rows[i]) % 16) fail("a matrix row is not aligned to 16 bytes");
  }
  // The eight rows of a matrix are read at once where they lie in different banks.
  for (int matrix = 0; matrix < 4; ++matrix) {
    int banks = 0;
    for (int i = 0; i < 8; ++i) {
      banks |= 1 << (reinterpret_cast<uintptr_t>(rows[8 * matrix + i]) / 16 % 8);
    }
    if (banks != 0xff) fail("rows of a matrix share a bank");
  }
  for (int i = 0; i < 32; ++i) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t pair = 0;
      for (int half = 0; half < 2; ++half) {
        const int row = transposed ? 2 * (i % 4) + half : i / 4;
        const int column = transposed ? i / 4 : 2 * (i % 4) + half;
        pair |= uint32_t(element(rows[8 * matrix + row], column)) << (16 * half);
      }
      static_cast<LoadMatrices*>(lanes[i])->to[matrix] = pair;
    }
  }
}

void load_matrices(void* const* lanes) { load_any<false>(lanes); }
void load_matrices_transposed(void* const* lanes) { load_any<true>(lanes); }

// Tagged numbers come as late as they may: when all blocks have gone on once more, or when their block arrives. Of the `oldest` ones
// those of a block, or of all blocks (-1).
static void deliver(size_t oldest, int64_t block) {
  std::vector<Tagged> later;
  for (size_t i = 0; i < underway.size(); ++i) {
    const Tagged& tagged = underway[i];
    if (i >= oldest || (block >= 0 && tagged.block != block)) {
      later.push_back(tagged);
    } else {
      *tagged.to = tagged.word;
    }
  }
  arrivals += underway.size() - later.size();
  underway = std::move(later);
}

void arrive_at_grid(uint64_t* count) {
  deliver(underway.size(), place.block[0]);
  if (watches) order_of_count(count).add(shown());
  ++*count;
  ++arrivals;
}

void store_tagged(uint64_t* to, uint64_t word) {
  if (reinterpret_cast<uintptr_t>(to) % 8) fail("a tagged number is not aligned to 8 bytes");
  touched(to, 8, WRITES | ATOMIC);
  underway.push_back({to, word, place.block[0]});
  ++arrivals;
}

void let_others_go_on() {
  scheduler.at_grid.push_back(place.thread);
  go_home();
}

uint64_t count_of_grid(const uint64_t* count) {
  if (watches) learn(place.thread, order_of_count(count));
  return *count;
}

void wait_for_grid(const uint64_t* count, uint64_t target) {
  while (count_of_grid(count) < target) let_others_go_on();
}

void load_tagged(uint64_t (&two)[2], const uint64_t* from) {
  touched(from, 16, ATOMIC);
  memcpy(two, from, 16);
}

void multiply_add_bytes(void* const* lanes) {
  int a[16][32], b[8][32];  // b: [column][row]
  for (int i = 0; i < 32; ++i) {
    const auto& operands = *static_cast<MultiplyAddBytes*>(lanes[i]);
    for (int at = 0; at < 4; ++at) {
      const int k = 4 * (i % 4) + at;
      for (int part = 0; part < 4; ++part) {
        const uint8_t byte = uint8_t(operands.a[part] >> (8 * at));
        a[i / 4 + 8 * (part % 2)][k + 16 * (part / 2)] = operands.is_signed ? int8_t(byte) : byte;
      }
      for (int part = 0; part < 2; ++part) b[i / 4][k + 16 * part] = int8_t(operands.b[part] >> (8 * at));
    }
  }
  for (int i = 0; i < 32; ++i) {
    auto& operands = *static_cast<MultiplyAddBytes*>(lanes[i]);
    for (int part = 0; part < 4; ++part) {
      for (int k = 0; k < 32; ++k) {
        operands.d[part] += a[i / 4 + 8 * (part / 2)][k] * b[2 * (i % 4) + part % 2][k];
      }
    }
  }
}

void multiply_add(void* const* lanes) {
  float a[16][16], b[8][16];  // b: [column][row]
  for (int i = 0; i < 32; ++i) {
    const auto& operands = *static_cast<MultiplyAdd*>(lanes[i]);
    const int group = i / 4, pair = 2 * (i % 4);
    for (int half = 0; half < 2; ++half) {
      auto value = [half](uint32_t word) { return half ? high_float(word) : low_float(word); };
      for (int part = 0; part < 4; ++part) {
        a[group + 8 * (part % 2)][pair + half + 8 * (part / 2)] = value(operands.a[part]);
      }
      for (int part = 0; part < 2; ++part) b[group][pair + half + 8 * part] = value(operands.b[part]);
    }
  }
  for (int i = 0; i < 32; ++i) {
    auto& operands = *static_cast<MultiplyAdd*>(lanes[i]);
    for (int part = 0; part < 4; ++part) {
      const float* row = a[i / 4 + 8 * (part / 2)];
      const float* column = b[2 * (i % 4) + part % 2];
      float sum = operands.d[part];
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      operands.d[part] = sum;
    }
  }
}

#include "emulation_hopper.h"

void shuffle(void* const* lanes) {
  for (int i = 0; i < 32; ++i) {
    auto& operands = *static_cast<Shuffle*>(lanes[i]);
    operands.result = static_cast<Shuffle*>(lanes[operands.from])->value;
  }
}

static void run_fiber() {
  scheduler.kernel->run(scheduler.args);
  scheduler.fibers[place.thread].done = true;
  go_home();
  abort();  // a fiber that is done is never run again
}

static int take_ready() {
  auto& ready = scheduler.ready;
  size_t at = 0;
  if (scheduler.order == 0) {  // first come, first served; the front is given back now and then
    const int thread = ready[scheduler.next_ready++];
    if (scheduler.next_ready > 4096) {
      ready.erase(ready.begin(), ready.begin() + long(scheduler.next_ready));
      scheduler.next_ready = 0;
    }
    return thread;
  }
  at = ready.size() - 1;
  if (scheduler.order > 1) {
    scheduler.random = scheduler.random * 1664525u + 1013904223u;
    at = scheduler.random % ready.size();
  }
  const int thread = ready[at];
  ready[at] = ready.back();
  ready.pop_back();
  return thread;
}

enum class BlockState { Done, Waits, Failed };

// Runs the block until it is done or waits for others.
static BlockState go_on() {
  while (scheduler.ready.size() > scheduler.next_ready) {
    place.thread = take_ready();
    switch_to(scheduler.home, scheduler.fibers[place.thread].context);
    if (scheduler.error[0]) return BlockState::Failed;
  }
  if (!scheduler.at_grid.empty()) return BlockState::Waits;
  for (int i = 0; i < place.threads; ++i) {
    if (!scheduler.fibers[i].done) {
      place.thread = i;
      snprintf(scheduler.error, sizeof scheduler.error,
               "kernel %s: thread %d waits for threads that never come", scheduler.kernel->name, i);
      return BlockState::Failed;
    }
  }
  return nothing_begun() ? BlockState::Done : BlockState::Failed;
}

static BlockState start_block() {
  if (!scheduler.stacks) {
    scheduler.stacks = static_cast<unsigned char*>(malloc(STACK_BYTES * THREADS_MAX));
    scheduler.fibers.resize(THREADS_MAX);
  }
  scheduler.at_barrier = 0;
  scheduler.ready.clear();
  scheduler.next_ready = 0;
  for (Warp& warp : scheduler.warps) warp.arrived = 0;
  for (WarpProducts& products : scheduler.products) products = {};
  for (NamedBarrier& barrier : scheduler.named) barrier = {};
  scheduler.phases.clear();
  scheduler.at_grid.clear();
  for (int i = 0; i < place.threads; ++i) {
    Fiber& fiber = scheduler.fibers[i];
    fiber.done = false;
    fiber.groups.clear();
    fiber.open.clear();
    prepare(fiber.context, scheduler.stacks + size_t(i) * STACK_BYTES, run_fiber);
    scheduler.ready.push_back(i);
  }
  return go_on();
}

// Runs blocks that wait for others in turn, until all are done.
static bool run_parked(std::vector<Parked>& parked) {
  while (!parked.empty()) {
    const uint64_t before = arrivals;
    const size_t blocks = parked.size(), tagged = underway.size();  // of the rounds before
    for (size_t i = 0; i < parked.size();) {
      std::swap(scheduler, parked[i].scheduler);
      std::swap(place, parked[i].place);
      auto& waiting = scheduler.at_grid;
      scheduler.ready.insert(scheduler.ready.end(), waiting.begin(), waiting.end());
      waiting.clear();
      const BlockState state = go_on();
      if (state == BlockState::Failed) return false;
      std::swap(scheduler, parked[i].scheduler);
      std::swap(place, parked[i].place);
      if (state == BlockState::Waits) {
        ++i;
        continue;
      }
      free(parked[i].scheduler.stacks);
      parked.erase(parked.begin() + long(i));
    }
    deliver(tagged, -1);
    if (arrivals == before && parked.size() == blocks) {
      snprintf(scheduler.error, sizeof scheduler.error, "kernel %s: blocks wait for blocks that never come",
               scheduler.kernel->name);
      return false;
    }
  }
  return true;
}

}  // namespace emulation

// The unit of the kernels, which make themselves known: a linker takes what is asked for.
extern "C" void pentimento_know_kernels();

// Runs kernel `name` on all blocks of the grid. `order` is the order of the fibers: 0 first come,
// first served; 1 last come, first served; others, seeds of random orders, in which accesses to memory are
// watched (emulation_races.h). `early`: it may begin before the kernel before it has ended. Returns null, or what
// went wrong, which stays valid until this thread's next launch.
extern "C" const char* pentimento_emulate(const char* name, const int64_t grid[3], int64_t threads,
                                          uint64_t shared_bytes, const void* args,
                                          uint64_t argument_bytes, uint32_t order, bool early) {
  using namespace emulation;
  pentimento_know_kernels();
  scheduler.error[0] = 0;
  underway.clear();
  const Kernel* kernel = kernels();
  while (kernel && strcmp(kernel->name, name) != 0) kernel = kernel->next;
  const char* fault = !kernel                                  ? "there is no such kernel"
                      : kernel->argument_bytes != argument_bytes ? "its arguments have another size"
                      : threads < 1 || threads > kernel->threads_max || threads % 32
                          ? "it does not run with so many threads"
                          : nullptr;
  if (fault) {
    snprintf(scheduler.error, sizeof scheduler.error, "kernel %s: %s", name, fault);
    return scheduler.error;
  }
  constexpr size_t ALIGNMENT = 1024;
  scheduler.kernel = kernel;
  // As aligned as the structs may ask for.
  alignas(64) unsigned char aligned[4096];
  if (argument_bytes > sizeof aligned) return "its arguments are too large";
  memcpy(aligned, args, argument_bytes);
  scheduler.args = aligned;
  scheduler.order = int(order);
  scheduler.random = order;
  watches = order > 1;
  watch_launch(aligned, argument_bytes, early);
  place.threads = int(threads);
  for (int i = 0; i < 3; ++i) place.grid[i] = grid[i];
  std::vector<Parked> parked;
  std::vector<unsigned char> shared;
  for (int64_t z = 0; z < grid[2]; ++z) {
    for (int64_t y = 0; y < grid[1]; ++y) {
      for (int64_t x = 0; x < grid[0]; ++x) {
        place.block[0] = x;
        place.block[1] = y;
        place.block[2] = z;
        shared.assign(shared_bytes + ALIGNMENT, 0xff);
        place.shared = shared.data() + (ALIGNMENT - reinterpret_cast<uintptr_t>(shared.data()) % ALIGNMENT);
        watch_block(shared_bytes);
        const BlockState state = start_block();
        if (state == BlockState::Failed) return scheduler.error;
        if (state == BlockState::Done) continue;
        parked.push_back({Scheduler{}, place, std::move(shared)});
        Scheduler& waiting = parked.back().scheduler;
        std::swap(scheduler, waiting);
        shared = {};
        scheduler.kernel = waiting.kernel;
        scheduler.args = waiting.args;
        scheduler.order = waiting.order;
        scheduler.random = waiting.random;
      }
    }
  }
  const bool done = run_parked(parked);
  deliver(underway.size(), -1);
  return done ? nullptr : scheduler.error;
}

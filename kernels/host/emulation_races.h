// Finds data races: accesses to shared and global memory that nothing orders, whatever order the fibers happened to run in. A
// part of emulation.cpp, within its namespace.
//
// kernels.cpp is compiled with the compiler's thread sanitizer, which calls a function at each access to memory that is not a
// function's own; here are these functions, and what barriers, fences and asynchronous copies of a GPU mean for them. A thread
// counts its moments, and knows of other threads up to which moment they lie behind it (a vector clock). Of each four bytes the
// last accesses are kept: of two that touch a byte, one of them writing, the later one must know of the other. Order comes
// from barriers (of a block, named, of a warp, counting), from fences with atomic counts, and from the count at which blocks
// arrive. Operations of a warp that exchange registers give none, as the PTX manual has it.
//
// A kernel that may begin early knows nothing of those before it until it waits for them.
//
// The copy engine and products of four warps are asynchronous: who lets them read what threads wrote, or write over it, must
// know that it was published (`publish_shared`).
#pragma once

static thread_local LaunchAccesses launch_accesses;

static uint32_t actor_of(int thread) { return scheduler.accesses.block * ACTORS + uint32_t(thread); }
static uint32_t actor_of_barrier(size_t number) { return actor_of(THREADS_MAX + int(number)); }
static Sight& own_sight() { return scheduler.accesses.sights[size_t(place.thread)]; }

// Who does something, and when; `of`: in whose order.
struct Actor {
  uint32_t number, moment;
  int of;
};
static Actor this_thread() { return {actor_of(place.thread), own_sight().moment, place.thread}; }

static void fail_unordered(const Cell::Entry& entry, uint32_t access, const void* at) {
  auto words = [](uint32_t access) {
    return access & ATOMIC ? "changes by an atomic operation" : access & WRITES ? "writes" : "reads";
  };
  auto by = [](uint32_t access) { return access & ASYNCHRONOUS ? ", asynchronously," : ""; };
  const int64_t from = static_cast<const unsigned char*>(at) - scheduler.accesses.shared_at;
  const bool is_shared = from >= 0 && uint64_t(from) < 4 * scheduler.accesses.shared.size();
  const uint32_t thread = entry.actor % ACTORS;
  char why[250], place[60] = "global memory";
  if (is_shared) snprintf(place, sizeof place, "byte %lld of shared memory", (long long)from);
  snprintf(why, sizeof why, "%s%s %s, which %s %u of block %u %s%s, and nothing orders the two", words(access), by(access), place,
           thread < THREADS_MAX ? "thread" : "barrier", thread % THREADS_MAX, entry.actor / ACTORS, words(entry.access()),
           by(entry.access()));
  fail(why);
}

static bool knows(const Actor& who, uint32_t access, const Cell::Entry& entry) {
  const Sight& sight = scheduler.accesses.sights[size_t(who.of)];
  const bool publishes = access & ASYNCHRONOUS && !(entry.access() & ASYNCHRONOUS) && entry.access() & WRITES;
  if (entry.actor == actor_of(who.of)) return !publishes || sight.published >= entry.moment();
  return (publishes ? sight.order.published : sight.order.plain).has(entry.actor, entry.moment());
}

static bool is_engine(uint32_t actor) { return actor % ACTORS >= uint32_t(THREADS_MAX); }

// Whether what is read is decided: boxes may hold rows that others write meanwhile, if nobody uses them.
static bool record(Cell& cell, uint32_t bytes, uint32_t access, const Actor& who, const void* at) {
  bool decided = true;
  const Cell::Entry now = {who.number, who.moment << 7 | bytes << 3 | access};
  const bool overwrites = access & WRITES && !(access & ATOMIC);
  Cell::Entry* to = nullptr;
  for (Cell::Entry& entry : cell.entries) {
    if (entry.what == 0) {
      if (!to) to = &entry;
      continue;
    }
    const bool is_same = entry.actor == now.actor && entry.access() == access;
    if (is_same && entry.what == now.what) return true;
    const bool meets = entry.bytes() & bytes && (entry.access() | access) & WRITES && !(entry.access() & access & ATOMIC);
    const bool known = meets ? knows(who, access, entry) : is_same;
    if (meets && !known) {
      const bool engine_reads = is_engine(now.actor) && access == (READS | ASYNCHRONOUS);
      const bool engine_read = is_engine(entry.actor) && entry.access() == (READS | ASYNCHRONOUS);
      if (!engine_reads && !engine_read) fail_unordered(entry, access, at);
      decided &= !engine_reads;
    }
    // What comes after the new one, too, where it comes after the old one.
    if (!known || entry.bytes() & ~bytes || !(overwrites || is_same)) continue;
    entry.what = 0;
    to = &entry;
  }
  if (!to) {  // some reader is forgotten
    static thread_local uint32_t any = 1;
    any = any * 1664525u + 1013904223u;
    to = &cell.entries[(any >> 16) % 6];
    for (int i = 0; i < 6 && to->access() & WRITES; ++i) to = &cell.entries[i];
  }
  *to = now;
  return decided;
}

static Cell& global_cell(uintptr_t at) {
  LaunchAccesses& all = launch_accesses;
  const uintptr_t number = at >> 12;
  if (!all.last || number != all.last_number) {
    auto& page = all.pages[number];
    if (!page) page = std::make_unique<Page>();
    all.last = page.get();
    all.last_number = number;
  }
  if (all.last->launch != all.launch) {
    memset(all.last->cells, 0, sizeof all.last->cells);
    all.last->launch = all.launch;
  }
  return all.last->cells[at >> 2 & 1023];
}

// `undecided` gets the offset and number of bytes that are.
template <class Undecided>
static void record(const void* from, size_t count, uint32_t access, const Actor& who, const Undecided& undecided) {
  uintptr_t at = reinterpret_cast<uintptr_t>(from);
  const uintptr_t end = at + count;
  Accesses& own = scheduler.accesses;
  while (at < end) {
    const uintptr_t next = std::min(end, (at | 3) + 1);
    const uint32_t bytes = ((1u << (next - at)) - 1) << (at & 3);
    const uintptr_t in_shared = at - reinterpret_cast<uintptr_t>(own.shared_at);
    Cell& cell = in_shared / 4 < own.shared.size() ? own.shared[in_shared / 4] : global_cell(at);
    if (!record(cell, bytes, access, who, reinterpret_cast<const void*>(at))) {
      undecided(at - reinterpret_cast<uintptr_t>(from), next - at);
    }
    at = next;
  }
}

static void record(const void* from, size_t count, uint32_t access, const Actor& who) {
  record(from, count, access, who, [](size_t, size_t) {});
}

// By an instruction of the thread that runs.
static void watch_access(const void* at, size_t count, uint32_t access) {
  auto within = [&](const void* from, size_t bytes) {
    return reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(from) < bytes;
  };
  if (within(scheduler.stacks, STACK_BYTES * THREADS_MAX) || within(&place, sizeof place)) return;
  if (within(launch_accesses.args, size_t(launch_accesses.args_end - launch_accesses.args))) return;
  record(at, count, access, this_thread());
}

static inline void touched(const void* at, size_t count, uint32_t access) {
  if (watches) watch_access(at, count, access);
}

// By an operation of the whole warp.
static void lane_reads(int lane, const void* at, size_t count) {
  if (!watches) return;
  const int thread = place.thread / 32 * 32 + lane;
  record(at, count, READS, {actor_of(thread), scheduler.accesses.sights[size_t(thread)].moment, thread});
}

// By the copy engine, for the copy that comes next at a barrier.
static Actor engine(const PhaseBarrier& barrier) {
  return {actor_of_barrier(size_t(&barrier - scheduler.phases.data())), barrier.copies_begun, place.thread};
}
static void engine_writes(const void* at, size_t count, const PhaseBarrier& barrier) {
  if (watches) record(at, count, WRITES | ASYNCHRONOUS, engine(barrier));
}
static void engine_reads(void* to, const void* from, size_t count, PhaseBarrier& barrier) {
  if (!watches) return;
  record(from, count, READS | ASYNCHRONOUS, engine(barrier), [&](size_t at, size_t bytes) {
    barrier.undecided.push_back({static_cast<unsigned char*>(to) + at, bytes});
  });
}

// `early`: it may begin before the launch before it has ended, whose blocks are not known until they are waited for.
static void watch_launch(const void* args, size_t bytes, bool early) {
  LaunchAccesses& all = launch_accesses;
  if (!watches || !early || all.blocks >= UINT32_MAX / (2 * ACTORS)) {
    ++all.launch;
    all.blocks = 0;
    if (all.pages.size() > 2048) {  // 100 MB
      all.pages.clear();
      all.last = nullptr;
    }
  }
  if (!watches) return;
  all.first_block = all.blocks;
  all.args = static_cast<const unsigned char*>(args);
  all.args_end = all.args + bytes;
  all.counts.clear();
}

static void watch_block(size_t shared_bytes) {
  if (!watches) return;
  Accesses& own = scheduler.accesses;
  own.block = launch_accesses.blocks++;
  own.shared_at = place.shared;
  own.shared.assign((shared_bytes + 3) / 4, Cell{});
  own.sights.assign(size_t(place.threads), Sight{{}, 1, 0, {}, {}});
}

// A thread comes to a meeting; what it does from now on is not known there.
static void bring(OrderMeeting& meeting, int thread) {
  if (!watches) return;
  Sight& sight = scheduler.accesses.sights[size_t(thread)];
  meeting.bring(sight, actor_of(thread));
  ++sight.moment;
}
static Order end_meeting(OrderMeeting& meeting) { return meeting.end(scheduler.accesses.block); }
static void bring_engine(PhaseBarrier& barrier) {
  if (!watches) return;
  barrier.meeting.plain.bring({}, engine(barrier).number, barrier.copies_begun);
}
static void learn(int thread, const Order& order) {
  if (watches) scheduler.accesses.sights[size_t(thread)].order.add(order);
}
// Those that waited at a meeting know what all of them know.
static void let_know(const std::vector<int>& threads, const Order& order) {
  if (!watches) return;
  for (int thread : threads) scheduler.accesses.sights[size_t(thread)].order = order;
}
static void meet(int first, int count) {
  if (!watches) return;
  OrderMeeting meeting;
  for (int i = first; i < first + count; ++i) bring(meeting, i);
  const Order order = end_meeting(meeting);
  for (int i = first; i < first + count; ++i) scheduler.accesses.sights[size_t(i)].order = order;
}

static Order shown() {
  OrderMeeting meeting;
  bring(meeting, place.thread);
  return end_meeting(meeting);
}
static Order& order_of_count(const void* at) { return launch_accesses.counts[reinterpret_cast<uintptr_t>(at)]; }

void memory_fence() {
  if (!watches) return;
  Sight& sight = own_sight();
  sight.order.add(sight.found);
  sight.found = {};
  sight.fenced = shown();
}
// Which gives an order between fences only.
static void change_atomically(const void* at) {
  if (!watches) return;
  touched(at, 4, WRITES | ATOMIC);
  Order& order = order_of_count(at);
  own_sight().found.add(order);
  order.add(own_sight().fenced);
}
uint32_t turn_atomically(uint32_t* at, uint32_t count) {
  change_atomically(at);
  const uint32_t before = *at;
  *at = before + 1 < count ? before + 1 : 0;
  return before;
}
void wait_for_last_kernel() {
  if (!watches) return;
  own_sight().order.plain.add_ended(launch_accesses.first_block);
  own_sight().order.published.add_ended(launch_accesses.first_block);
}
void publish_shared() {
  if (!watches) return;
  Sight& sight = own_sight();
  sight.order.published.add(sight.order.plain);
  sight.published = sight.moment++;
}

// What compilers call, GCC some of it and Clang all.
#define WATCHED(bytes)                                                                                     \
  extern "C" void __tsan_read##bytes(void* at) { touched(at, bytes, READS); }                              \
  extern "C" void __tsan_write##bytes(void* at) { touched(at, bytes, WRITES); }                            \
  extern "C" void __tsan_unaligned_read##bytes(void* at) { touched(at, bytes, READS); }                    \
  extern "C" void __tsan_unaligned_write##bytes(void* at) { touched(at, bytes, WRITES); }
WATCHED(1)
WATCHED(2)
WATCHED(4)
WATCHED(8)
WATCHED(16)
extern "C" void __tsan_read_range(void* at, size_t bytes) { touched(at, bytes, READS); }
extern "C" void __tsan_write_range(void* at, size_t bytes) { touched(at, bytes, WRITES); }
extern "C" void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  touched(from, bytes, READS);
  touched(to, bytes, WRITES);
  return memcpy(to, from, bytes);
}
extern "C" void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  touched(from, bytes, READS);
  touched(to, bytes, WRITES);
  return memmove(to, from, bytes);
}
extern "C" void* __tsan_memset(void* to, int byte, size_t bytes) {
  touched(to, bytes, WRITES);
  return memset(to, byte, bytes);
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

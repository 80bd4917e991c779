// Hopper's own instructions in the emulation. A part of emulation.cpp, within its namespace.
//
// Products of four warps run when they are begun, on what their operands hold then, but their sums arrive
// when they are waited for: until then these are NaN, and operands that change are an error. Tiles are
// copied when somebody waits for them, and their places hold NaN from the copy's start on.
#pragma once

// An element of an operand with rows of 128 bytes, whose 16-byte pieces are mixed by the number of the row.
static float shared_element(const unsigned char* at, long offset) {
  uintptr_t address = reinterpret_cast<uintptr_t>(at) + offset;
  address ^= (address >> 7 & 7) << 4;
  uint16_t bits;
  if (address % 16 == 0) touched(reinterpret_cast<const void*>(address), 16, READS | ASYNCHRONOUS);  // of eight elements
  memcpy(&bits, reinterpret_cast<const void*>(address), 2);
  return to_float(bf16{bits});
}

// By columns: a column's 16 numbers lie in a row of 128 bytes.
static float by_columns(const SharedOperand& b, int column, int k) {
  return shared_element(b.at, long(column / 8) * b.stride + column % 8 * 128 + 2 * k);
}

// By rows: 64 columns of one k lie in a row of 128 bytes.
static float by_rows(const SharedOperand& b, int column, int k) {
  const long row = long(k / 8) * b.stride + k % 8 * 128;
  return shared_element(b.at, row + long(column / 64) * b.leading + 2 * (column % 64));
}

// What the operands hold now: a's 16 rows of this warp, and b's columns.
static void read_operands(const GroupProduct* lanes, int warp, float (&a)[16][16], std::vector<float>& b) {
  const GroupProduct& first = lanes[0];
  for (int i = 0; i < 32 && first.a; ++i) {
    for (int part = 0; part < 4; ++part) {
      float* to = &a[i / 4 + 8 * (part % 2)][2 * (i % 4) + 8 * (part / 2)];
      to[0] = low_float(lanes[i].a[part]);
      to[1] = high_float(lanes[i].a[part]);
    }
  }
  for (int row = 0; row < 16 && !first.a; ++row) {
    for (int k = 0; k < 16; ++k) a[row][k] = by_columns(first.left, 16 * warp + row, k);
  }
  b.resize(size_t(first.columns) * 16);
  for (int column = 0; column < first.columns; ++column) {
    for (int k = 0; k < 16; ++k) {
      b[16 * column + k] = first.a ? by_rows(first.right, column, k) : by_columns(first.right, column, k);
    }
  }
}

static BegunSums& begun_sums(WarpProducts& warp, const BegunProduct& product) {
  for (BegunSums& sums : warp.sums) {
    if (sums.d[0] == product.lanes[0].d) return sums;
  }
  warp.sums.emplace_back();
  BegunSums& sums = warp.sums.back();
  const int numbers = product.lanes[0].columns / 8 * 4;
  for (int i = 0; i < 32; ++i) {
    float* d = product.lanes[i].d[0];
    sums.d[i] = product.lanes[i].d;
    sums.values.insert(sums.values.end(), d, d + numbers);
    memset(d, 0xff, sizeof(float) * size_t(numbers));
  }
  return sums;
}

void group_product(void* const* lanes) {
  WarpProducts& warp = scheduler.products[place.thread / 32];
  warp.products.emplace_back();
  warp.commits.push_back(warp.committed + 1);
  BegunProduct& product = warp.products.back();
  for (int i = 0; i < 32; ++i) product.lanes[i] = *static_cast<GroupProduct*>(lanes[i]);
  read_operands(product.lanes, place.thread / 32 % 4, product.a, product.b);
  BegunSums& sums = begun_sums(warp, product);
  sums.last = warp.committed + 1;
  float* sum = sums.values.data();
  for (int i = 0; i < 32; ++i) {
    for (int n = 0; n < product.lanes[i].columns / 8; ++n) {
      for (int part = 0; part < 4; ++part, ++sum) {
        const float* row = product.a[i / 4 + 8 * (part / 2)];
        const float* column = &product.b[16 * size_t(8 * n + 2 * (i % 4) + part % 2)];
        float added = product.lanes[i].add ? *sum : 0.0f;
        for (int k = 0; k < 16; ++k) added += row[k] * column[k];
        *sum = added;
      }
    }
  }
}

void commit_products(void* const*) { ++scheduler.products[place.thread / 32].committed; }

static bool same(const float* left, const float* right, size_t count) {
  return memcmp(left, right, count * sizeof(float)) == 0;
}

void finish_products(void* const* pending) {
  WarpProducts& warp = scheduler.products[place.thread / 32];
  const uint64_t left = uint64_t(*static_cast<int*>(pending[0]));
  if (warp.committed < left + warp.finished) return;
  warp.finished = warp.committed - left;
  size_t ended = 0;
  for (; ended < warp.products.size() && warp.commits[ended] <= warp.finished; ++ended) {
    const BegunProduct& product = warp.products[ended];
    float a[16][16];
    std::vector<float> b;
    read_operands(product.lanes, place.thread / 32 % 4, a, b);
    if (!same(a[0], product.a[0], 256) || !same(b.data(), product.b.data(), b.size())) {
      fail("operands of a product changed before it was waited for");
    }
  }
  warp.products.erase(warp.products.begin(), warp.products.begin() + long(ended));
  warp.commits.erase(warp.commits.begin(), warp.commits.begin() + long(ended));
  for (size_t at = 0; at < warp.sums.size();) {
    BegunSums& sums = warp.sums[at];
    if (sums.last > warp.finished) {
      ++at;
      continue;
    }
    const size_t numbers = sums.values.size() / 32;
    const float* value = sums.values.data();
    for (int i = 0; i < 32; ++i) {
      float* d = sums.d[i][0];
      for (size_t n = 0; n < numbers; ++n) {
        if (float_to_bits(d[n]) != 0xffffffffu) fail("sums of a product changed before it was waited for");
        d[n] = *value++;
      }
    }
    warp.sums.erase(warp.sums.begin() + long(at));
  }
  meet(place.thread / 32 * 32, 32);  // the lanes wait as one, for what one of them stands for
}

void named_barrier(int number, int threads, bool wait) {
  if (number < 1 || number > 15) fail("there is no such named barrier");
  NamedBarrier& barrier = scheduler.named[number];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    fail("a named barrier is for another number of threads");
  }
  barrier.threads = threads;
  bring(barrier.meeting, place.thread);
  if (++barrier.arrived < threads) {
    if (!wait) return;
    barrier.waiting.push_back(place.thread);
    return go_home();
  }
  barrier.arrived = 0;
  for (int thread : barrier.waiting) scheduler.ready.push_back(thread);
  if (wait) barrier.waiting.push_back(place.thread);
  let_know(barrier.waiting, end_meeting(barrier.meeting));
  barrier.waiting.clear();
}

void start_barrier(CountingBarrier* at, int count) {
  for (const PhaseBarrier& barrier : scheduler.phases) {
    if (barrier.at == at) fail("a barrier is started twice");
  }
  touched(at, sizeof *at, WRITES);
  scheduler.phases.push_back({at, count, count, 0, 0, {}, {}, {}, {}, 0, {}, {}});
}

static PhaseBarrier& barrier_at(const CountingBarrier* at) {
  for (PhaseBarrier& barrier : scheduler.phases) {
    if (barrier.at == at) return barrier;
  }
  fail("a barrier was not started");
}

// Each 16 bytes of a tile: where they come to, and where they come from, or null.
template <class Work>
static void each_of_tile(const TileCopy& copy, const Work& work) {
  const TileMap& map = *copy.map;
  for (int64_t piece = 0; piece < map.box_pieces; ++piece) {
    for (int64_t row = 0; row < map.box_rows; ++row) {
      for (int64_t chunk = 0; chunk < 8; ++chunk) {
        uintptr_t to = reinterpret_cast<uintptr_t>(copy.to) + (piece * map.box_rows + row) * 128 + chunk * 16;
        to ^= (to >> 7 & 7) << 4;
        const int64_t from_row = copy.row + row, from_piece = copy.piece + piece;
        const bool there = from_row >= 0 && from_row < map.rows && from_piece < map.pieces;
        const unsigned char* from = map.base + from_row * map.row_stride +
                                    from_piece * map.piece_stride + copy.batch * map.batch_stride +
                                    chunk * 16;
        work(reinterpret_cast<void*>(to), there ? from : nullptr);
      }
    }
  }
}

static void copy_now(const TileCopy& copy) {
  each_of_tile(copy, [](void* to, const unsigned char* from) {
    if (from) {
      memcpy(to, from, 16);
    } else {
      memset(to, 0, 16);
    }
  });
}

// Ends the phase if everything that it waits for has arrived; copies arrive when someone waits.
static void end_phase(PhaseBarrier& barrier) {
  if (barrier.missing > 0) return;
  if (barrier.bytes > 0 && barrier.waiting.empty()) return;
  for (const TileCopy& copy : barrier.copies) {
    copy_now(copy);
    barrier.bytes -= copy.map->box_rows * copy.map->box_pieces * 128;
  }
  for (const Copy& copy : barrier.rows) {
    if (copy.from) {
      memcpy(copy.to, copy.from, size_t(copy.bytes));
    } else {
      memset(copy.to, 0, size_t(copy.bytes));
    }
    barrier.bytes -= copy.bytes;
  }
  for (const auto& [at, bytes] : barrier.undecided) memset(at, 0xff, bytes);
  barrier.copies.clear();
  barrier.rows.clear();
  barrier.undecided.clear();
  if (barrier.bytes < 0) fail("more bytes arrive at a barrier than were announced");
  if (barrier.bytes > 0) return;
  barrier.parity ^= 1;
  barrier.missing = barrier.count;
  bring_engine(barrier);
  barrier.ended = end_meeting(barrier.meeting);
  for (int thread : barrier.waiting) {
    learn(thread, barrier.ended);
    scheduler.ready.push_back(thread);
  }
  barrier.waiting.clear();
}

void arrive(CountingBarrier* at, int bytes) {
  PhaseBarrier& barrier = barrier_at(at);
  if (barrier.missing == 0) fail("arrives at a barrier whose phase others have ended");
  touched(at, sizeof *at, WRITES | ATOMIC);
  bring(barrier.meeting, place.thread);
  barrier.bytes += bytes;
  --barrier.missing;
  end_phase(barrier);
}

void wait_for_phase(CountingBarrier* at, int parity) {
  PhaseBarrier& barrier = barrier_at(at);
  if (parity != 0 && parity != 1) fail("a parity is neither 0 nor 1");
  touched(at, sizeof *at, ATOMIC);
  if (barrier.parity != parity) return learn(place.thread, barrier.ended);
  barrier.waiting.push_back(place.thread);
  end_phase(barrier);
  if (barrier.parity == parity) return go_home();
  // The phase has ended, and with it this thread's wait: it goes on right away.
  for (size_t i = scheduler.ready.size(); i-- > scheduler.next_ready;) {
    if (scheduler.ready[i] != place.thread) continue;
    scheduler.ready.erase(scheduler.ready.begin() + long(i));
    return;
  }
}

bool phase_ended(CountingBarrier* at, int parity) {
  const PhaseBarrier& barrier = barrier_at(at);
  if (barrier.parity == parity) return false;
  learn(place.thread, barrier.ended);
  return true;
}

// The engine's copies at a barrier are numbered.
static void begin_copy(PhaseBarrier& barrier, void* to, size_t bytes) {
  ++barrier.copies_begun;
  engine_writes(to, bytes, barrier);
  memset(to, 0xff, bytes);
}

void copy_tile(void* to, const TileMap& map, CountingBarrier* arrived, int row, int piece, int batch) {
  if (reinterpret_cast<uintptr_t>(to) % 1024) fail("a tile's place is not aligned to 1024 bytes");
  if (batch < 0 || batch >= map.batch) fail("a tile of a batch entry that is not there");
  if (map.box_rows < 1 || map.box_rows > 256) fail("a tile has 1 to 256 rows");
  PhaseBarrier& barrier = barrier_at(arrived);
  begin_copy(barrier, to, size_t(map.box_rows * map.box_pieces * 128));
  barrier.copies.push_back({static_cast<unsigned char*>(to), &map, row, piece, batch});
  each_of_tile(barrier.copies.back(), [&](void* place, const unsigned char* from) {
    if (from) engine_reads(place, from, 16, barrier);
  });
  end_phase(barrier);
}

void copy_row(void* to, const void* from, int bytes, CountingBarrier* arrived) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) {
    fail("a copy of a row is not aligned to 16 bytes");
  }
  PhaseBarrier& barrier = barrier_at(arrived);
  begin_copy(barrier, to, size_t(bytes));
  engine_reads(to, from, size_t(bytes), barrier);
  barrier.rows.push_back({to, from, bytes});
  end_phase(barrier);
}

void copy_box(void* to, const BoxMap* map, CountingBarrier* arrived, int word, int row) {
  if (reinterpret_cast<uintptr_t>(to) % 128) fail("a box's place is not aligned to 128 bytes");
  if (reinterpret_cast<uintptr_t>(map->base) % 16 || map->row_stride % 16) {
    fail("a box's matrix is not aligned to 16 bytes");
  }
  if (map->box_rows < 1 || map->box_rows > 256 || map->box_words < 4 || map->box_words > 256 || map->box_words % 4) {
    fail("a box has 1 to 256 rows of 4 to 256 words, a multiple of four");
  }
  const int64_t bytes = 4 * map->box_words, left = 4 * (map->words - word);
  const int64_t there = word < 0 || left < 0 ? 0 : left < bytes ? left : bytes;
  PhaseBarrier& barrier = barrier_at(arrived);
  begin_copy(barrier, to, size_t(map->box_rows * bytes));
  for (int64_t i = 0; i < map->box_rows; ++i) {
    unsigned char* place = static_cast<unsigned char*>(to) + i * bytes;
    const int64_t own = row + i < 0 || row + i >= map->rows ? 0 : there;
    const unsigned char* from = map->base + (row + i) * map->row_stride + 4 * word;
    if (own > 0) {
      engine_reads(place, from, size_t(own), barrier);
      barrier.rows.push_back({place, from, int(own)});
    }
    if (own < bytes) barrier.rows.push_back({place + own, nullptr, int(bytes - own)});
  }
  end_phase(barrier);
}

// At a block's end nothing may be under way.
static bool nothing_begun() {
  const char* what = nullptr;
  for (const PhaseBarrier& barrier : scheduler.phases) {
    if (!barrier.copies.empty() || !barrier.rows.empty()) what = "a copy was never waited for";
  }
  for (const WarpProducts& warp : scheduler.products) {
    if (!warp.products.empty()) what = "a product was never waited for";
  }
  if (what) snprintf(scheduler.error, sizeof scheduler.error, "kernel %s: %s", scheduler.kernel->name, what);
  return !what;
}

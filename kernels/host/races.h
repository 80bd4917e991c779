// What is known of accesses to memory and of their order; emulation_races.h says how they are used.
#pragma once
#include <algorithm>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emulation {

// Threads of a block and, behind them, its counting barriers, for which the copy engine writes.
constexpr uint32_t ACTORS = 4096;

// Up to which moment threads are known.
class Known {
  using Moments = std::shared_ptr<const std::vector<uint32_t>>;
  std::vector<std::pair<uint32_t, Moments>> blocks;
  uint32_t ended = 0;  // blocks before this one are known to have

  // Of each thread the later of two moments. Lanes of a warp ask for the same one after the other.
  static const Moments& later(const Moments& one, const Moments& other) {
    static thread_local Moments asked, asked_other, both;
    if (one != asked || other != asked_other) {
      auto all = std::make_shared<std::vector<uint32_t>>(*one);
      all->resize(std::max(all->size(), other->size()));
      for (size_t i = 0; i < other->size(); ++i) (*all)[i] = std::max((*all)[i], (*other)[i]);
      asked = one;
      asked_other = other;
      both = std::move(all);
    }
    return both;
  }

 public:
  bool operator==(const Known& other) const { return blocks == other.blocks && ended == other.ended; }
  bool has(uint32_t actor, uint32_t moment) const {
    if (actor / ACTORS < ended) return true;
    for (const auto& [block, moments] : blocks) {
      if (block == actor / ACTORS) return actor % ACTORS < moments->size() && (*moments)[actor % ACTORS] >= moment;
    }
    return false;
  }
  void add(uint32_t block, const Moments& more) {
    for (auto& [own, moments] : blocks) {
      if (own != block) continue;
      if (moments != more) moments = later(moments, more);
      return;
    }
    blocks.push_back({block, more});
  }
  void add(const Known& other) {
    for (const auto& [block, moments] : other.blocks) add(block, moments);
    add_ended(other.ended);
  }
  void add_ended(uint32_t before) { ended = std::max(ended, before); }
};

// What several threads of a block know together.
class Meeting {
  std::vector<uint32_t> own;
  Known others, last;

 public:
  void bring(const Known& known, uint32_t actor, uint32_t moment) {
    if (!(known == last)) others.add(last = known);
    own.resize(std::max(own.size(), size_t(actor % ACTORS + 1)));
    own[actor % ACTORS] = std::max(own[actor % ACTORS], moment);
  }
  Known end(uint32_t block) {
    Known all = std::move(others);
    if (!own.empty()) all.add(block, std::make_shared<const std::vector<uint32_t>>(std::move(own)));
    *this = {};
    return all;
  }
};

// What is ordered for accesses by instructions, and for those of the copy engine and of products.
struct Order {
  Known plain, published;
  void add(const Order& other) {
    plain.add(other.plain);
    published.add(other.published);
  }
};

struct Sight {  // of a thread
  Order order;
  uint32_t moment, published;  // published: its last moment that was
  Order fenced, found;         // before its last fence; and what it found since, which counts from the next one on
};

struct OrderMeeting {
  Meeting plain, published;
  void bring(const Sight& sight, uint32_t actor) {
    plain.bring(sight.order.plain, actor, sight.moment);
    published.bring(sight.order.published, actor, sight.published);
  }
  Order end(uint32_t block) { return {plain.end(block), published.end(block)}; }
};

enum Access : uint32_t { READS = 0, WRITES = 1, ATOMIC = 2, ASYNCHRONOUS = 4 };

// The last accesses to four bytes.
struct Cell {
  struct Entry {
    uint32_t actor, what;  // what: moment, bytes, access; 0: none
    uint32_t moment() const { return what >> 7; }
    uint32_t bytes() const { return what >> 3 & 15; }
    uint32_t access() const { return what & 7; }
  };
  Entry entries[6];
};

// Of a block.
struct Accesses {
  uint32_t block = 0;
  std::vector<Sight> sights;  // of its threads
  std::vector<Cell> shared;
  const unsigned char* shared_at = nullptr;
};

// Of a launch, and of those before it that may not have ended: accesses to global memory by pages, and what counts in global
// memory hand on.
struct Page {
  uint64_t launch;
  Cell cells[1024];
};
struct LaunchAccesses {
  uint64_t launch = 0;
  uint32_t blocks = 0, first_block = 0;  // of it and those that may not have ended; the first one of its own
  const unsigned char *args = nullptr, *args_end = nullptr;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t last_number = 0;
  Page* last = nullptr;
  std::unordered_map<uintptr_t, Order> counts;
};

}  // namespace emulation

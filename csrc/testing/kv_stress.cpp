// Threads that press a KV pool as hard as they can, for the sanitizers: `kv_stress DIR`.
// Sanitizers see one process only: each thread is a client of its own, some have a helper thread.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "memory/kv_pool.h"
#include "shm/errors.h"

namespace {

using namespace aegaeon::memory;

constexpr unsigned kClients = 4;
constexpr unsigned kThreads = 4;
constexpr int kSteps = 3000;
const KvGeometry kGeometry{4096, 12, {{512, 64, 1}, {1536, 64, 1}, {1024, 128, 2}}};

void require(bool claim, const char* what) {
  if (!claim) {
    std::fprintf(stderr, "kv_stress: %s\n", what);
    std::exit(1);
  }
}

struct Letter {
  unsigned shape;
  std::vector<std::uint64_t> ids;
  KvIdentity sender;
  std::uint64_t stamp;
};

// Offers on their way; receivers may take any, twice or late.
class Mail {
 public:
  void send(Letter letter) {
    const std::lock_guard<std::mutex> guard(mutex_);
    letters_.push_back(std::move(letter));
    if (letters_.size() > 8) letters_.pop_front();
  }
  bool look(std::mt19937& random, Letter& letter) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (letters_.empty()) return false;
    letter = letters_[random() % letters_.size()];
    return true;
  }

 private:
  std::mutex mutex_;
  std::deque<Letter> letters_;
};

// Works on a pool that other threads may work on too; its blocks are its own.
class Worker {
 public:
  Worker(KvPool& pool, Mail& mail, Mail& told, unsigned seed)
      : pool_(pool), mail_(mail), told_(told), random_(seed) {}

  void run() {
    for (int step = 0; step < kSteps; ++step) {
      switch (random_() % 9) {
        case 0:
        case 1:
          allocate();
          break;
        case 2:
        case 3:
          release();
          break;
        case 4:
          offer();
          break;
        case 5:
          rest();
          break;
        case 6:
          wake();
          break;
        case 7:
          find();
          break;
        default:
          take();
      }
    }
    while (!held_.empty()) release();
  }

 private:
  void allocate() {
    Letter blocks{static_cast<unsigned>(random_() % 3),
                  std::vector<std::uint64_t>(1 + random_() % 5), 0, random_() | 1u};
    const Given given =
        pool_.allocate(blocks.shape, blocks.ids.size(), blocks.ids.data(), Effort::full);
    if (given != Given::all) {
      if (!held_.empty()) release();
      return;
    }
    for (const std::uint64_t id : blocks.ids) stamp(blocks.shape, id, blocks.stamp);
    held_.push_back(std::move(blocks));
  }

  void release() {
    if (held_.empty()) return;
    const Letter blocks = pick();
    check(blocks);
    pool_.free(blocks.shape, blocks.ids, random_() % 4 == 0, 0);
  }

  void offer() {
    if (held_.empty()) return;
    Letter letter = pick();
    const auto identity = pool_.offer(letter.shape, letter.ids);
    require(identity.has_value(), "a block of ours was not ours");
    letter.sender = *identity;
    mail_.send(letter);
    std::this_thread::yield();
    pool_.free(letter.shape, letter.ids, false, letter.sender);
  }

  void take() {
    Letter letter;
    if (mail_.look(random_, letter) &&
        pool_.take(letter.shape, letter.ids, letter.sender) == Taken::all) {
      check(letter);
      held_.push_back(letter);
    }
  }

  void rest() {
    if (held_.empty()) return;
    Letter blocks = pick();
    check(blocks);
    std::vector<KvIdentity> words = pool_.rest(blocks.shape, blocks.ids, 0);
    if (random_() % 2 == 0) {
      pool_.tell(blocks.shape, keys_of(blocks), blocks.ids, words);
      told_.send(blocks);
    }
    resting_.emplace_back(std::move(blocks), std::move(words));
  }

  static std::vector<KvKey> keys_of(const Letter& blocks) {
    std::vector<KvKey> keys;
    for (std::size_t at = 0; at < blocks.ids.size(); ++at) {
      keys.push_back({blocks.stamp, blocks.stamp * 31 + at});
    }
    return keys;
  }

  // What somebody has told of is as it was, or not to be had.
  void find() {
    Letter letter;
    if (!told_.look(random_, letter)) return;
    Letter blocks{letter.shape, {}, 0, letter.stamp};
    for (const KvFound& one : pool_.look_up(letter.shape, keys_of(letter))) {
      if (one.word != kFreeBlock && pool_.wake(letter.shape, {one.id}, {one.word}) == 1) {
        blocks.ids.push_back(one.id);
      }
    }
    check(blocks);
    if (!blocks.ids.empty()) held_.push_back(std::move(blocks));
  }

  // What is woken is as it was; the others have made room for somebody.
  void wake() {
    if (resting_.empty()) return;
    std::swap(resting_[random_() % resting_.size()], resting_.back());
    auto [blocks, words] = std::move(resting_.back());
    resting_.pop_back();
    blocks.ids.resize(pool_.wake(blocks.shape, blocks.ids, words));
    check(blocks);
    if (!blocks.ids.empty()) held_.push_back(std::move(blocks));
  }

  Letter pick() {
    std::swap(held_[random_() % held_.size()], held_.back());
    Letter blocks = std::move(held_.back());
    held_.pop_back();
    return blocks;
  }

  std::byte* at(unsigned shape, std::uint64_t id) const {
    return pool_.arena().base() + id * kGeometry.shapes[shape].page_bytes;
  }

  void stamp(unsigned shape, std::uint64_t id, std::uint64_t value) {
    for (std::size_t byte = 0; byte < kGeometry.shapes[shape].block_bytes; byte += sizeof value) {
      std::memcpy(at(shape, id) + byte, &value, sizeof value);
    }
  }

  void check(const Letter& blocks) const {
    for (const std::uint64_t id : blocks.ids) {
      for (std::size_t byte = 0; byte < kGeometry.shapes[blocks.shape].block_bytes; byte += 8) {
        std::uint64_t found = 0;
        std::memcpy(&found, at(blocks.shape, id) + byte, sizeof found);
        require(found == blocks.stamp, "somebody wrote into a block of ours");
      }
    }
  }

  KvPool& pool_;
  Mail& mail_;
  Mail& told_;
  std::mt19937 random_;
  std::vector<Letter> held_;
  std::vector<std::pair<Letter, std::vector<KvIdentity>>> resting_;
};

// A client comes, holds something and goes: its slot and its blocks are used again.
void come_and_go(const std::string& path, const std::atomic<bool>& done) {
  while (!done.load()) {
    const auto pool = KvPool::open_shared(path, kGeometry, kGeometry.arena_bytes());
    std::uint64_t id = 0;
    pool->allocate(0, 1, &id, Effort::full);
    pool->reclaim();
    require(pool->free_blocks(1) <= 24, "more is free than there is");
  }
}

// Either many clients, of a thread each, with guests; or one client of many threads. Not both: each
// client maps the memory elsewhere, and a thread sanitizer does not see that what one thread did
// before another, through a third one's mapping, was before it.
void stress(const std::string& path, unsigned clients) {
  Mail mail;
  Mail told;
  std::vector<std::unique_ptr<KvPool>> pools;
  for (unsigned client = 0; client < clients; ++client) {
    pools.push_back(KvPool::open_shared(path, kGeometry, kGeometry.arena_bytes() / 2));
  }
  std::atomic<bool> done{clients == 1};
  std::thread guest([&] { come_and_go(path, done); });
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < kThreads; ++number) {
    threads.emplace_back([&pool = *pools[number % clients], &mail, &told, number] {
      Worker(pool, mail, told, number).run();
    });
  }
  for (std::thread& thread : threads) thread.join();
  done.store(true);
  guest.join();
  for (const auto& pool : pools) {
    require(pool->used_bytes() == 0, "a client still holds a block");
    require(pool->reclaim() == 0, "a block was lost");
  }
  require(pools[0]->free_blocks(0) == 48, "not all slabs are free");
}

}  // namespace

int main(int count, char** arguments) {
  require(count == 2, "usage: kv_stress DIR");
  try {
    stress(std::string(arguments[1]) + "/pool", kClients);
    stress(std::string(arguments[1]) + "/pool-of-one", 1);
  } catch (const aegaeon::shm::Error& error) {
    require(false, error.what());
  }
  std::puts("kv_stress: ok");
  return 0;
}

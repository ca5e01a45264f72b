// Threads that press the weight cache as hard as they can, for the sanitizers: `cache_stress DIR`.
// Each plays a process with a client of its own: it loads, waits, pins, reads and evicts, in a
// cache that holds a third of the models.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "memory/cached_model.h"
#include "memory/errors.h"
#include "memory/weight_cache.h"
#include "shm/errors.h"
#include "shm/futex.h"
#include "shm/ring.h"

namespace {

using namespace aegaeon::memory;
using aegaeon::shm::kMillisecond;
using aegaeon::shm::kSecond;
using aegaeon::shm::now_ns;

constexpr std::uint32_t kModels = 9;
constexpr std::uint32_t kStages = 4;
constexpr std::uint64_t kStageBytes = 8192;
constexpr std::uint64_t kModelBytes = kStages * kStageBytes;
constexpr std::uint32_t kPlayers = 4;
constexpr std::uint32_t kRounds = 120;
constexpr std::int64_t kPatience = 40 * kSecond;

void require(bool claim, const char* what) {
  if (!claim) {
    std::fprintf(stderr, "cache_stress: %s\n", what);
    std::exit(1);
  }
}

// The file of a model holds its number in every byte.
std::string write_file(const std::string& directory, std::uint32_t model) {
  const std::string path = directory + "/model-" + std::to_string(model);
  const std::string content(kModelBytes, static_cast<char>('a' + model));
  const File file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600));
  require(write(file.get(), content.data(), content.size()) == static_cast<ssize_t>(content.size()),
          "a file could not be written");
  return path;
}

std::vector<Job> jobs_of(const std::string& path) {
  struct stat info{};
  require(stat(path.c_str(), &info) == 0, "a file is gone");
  const PlannedFile file{path, static_cast<std::uint64_t>(info.st_size),
                         info.st_mtim.tv_sec * kSecond + info.st_mtim.tv_nsec, info.st_ino};
  std::vector<Job> jobs;
  for (std::uint32_t stage = 0; stage < kStages; ++stage) {
    const Layout layout = stage % 2 == 0 ? Layout::rows : Layout::tiles;
    jobs.push_back({file, stage * kStageBytes, kStageBytes, 64, kStageBytes / 64, 2, layout,
                    stage * kStageBytes, stage, Convert::none});
  }
  return jobs;
}

void load(CachedModel& model, const std::string& path, std::uint32_t round) {
  model.start_load(jobs_of(path), 1 + static_cast<int>(round % 2));
  if (round % 7 == 0) model.cancel();
  while (!model.wait_for_load(kSecond)) {
  }
  model.finish_load();
}

// Brings one model in, whoever loads it, looks at all of it, and lets go.
void use(WeightCache& cache, const std::string& path, std::uint32_t number, std::uint32_t round) {
  const std::int64_t deadline = now_ns() + kPatience;
  std::string refusal;
  const Wanted wanted{{number, 1, 2, 3}, "model", kModelBytes, kStages};
  while (true) {
    require(now_ns() < deadline, "a player starved");
    const std::uint32_t seen = cache.room_change();
    const auto model = cache.acquire(wanted, refusal);
    if (!model) {
      cache.wait_for_room(seen, 10 * kMillisecond);
      continue;
    }
    const auto is_pinned = model->try_pin();
    if (!(is_pinned ? *is_pinned : model->pin_slowly())) continue;
    try {
      while (true) {
        const std::uint32_t change = model->change();
        if (model->has_stages(kStages)) break;
        if (model->is_loader() || model->take_over()) {
          load(*model, path, round++);
        } else {
          model->wait_for_change(change, 10 * kMillisecond);
        }
      }
    } catch (const LoadCancelled&) {
      continue;  // this one loads no more: closing drops its pin, and a new one goes on
    } catch (const WeightsEvicted&) {
      require(false, "a pinned model was evicted");
    }
    for (std::uint64_t at = 0; at < kModelBytes; ++at) {
      require(model->address()[at] == static_cast<std::byte>('a' + number), "a model is torn");
    }
    model->note_use();
    if (model->unpin()) model->free_failed();
    return;
  }
}

void play(const std::string& path, const std::vector<std::string>& files, std::uint32_t player) {
  const auto cache = std::make_shared<WeightCache>(path, 3 * kModelBytes);
  std::uint32_t random = player * 2654435761u + 1;
  for (std::uint32_t round = 0; round < kRounds; ++round) {
    random = random * 1664525u + 1013904223u;
    const std::uint32_t number = (random >> 16) % kModels;
    use(*cache, files[number], number, round);
    require(cache->used_bytes() <= cache->budget_bytes(), "the budget was broken");
    if (round % 5 == 0) cache->evict({number, 1, 2, 3});
    if (round % 9 == 0) cache->set_demand({number, 1, 2, 3}, round % 2 == 0);
    if (round % 50 == 0) {
      require(cache->status().size() <= 3, "there are more models than fit");
      require(cache->evictions().size() <= kEvictionRecords, "there are too many records");
    }
  }
  cache->close();
}

void stress_cancellation(const std::string& path, const std::string& file) {
  const auto cache = std::make_shared<WeightCache>(path, 3 * kModelBytes);
  std::string refusal;
  for (std::uint32_t round = 0; round < kRounds; ++round) {
    const auto model = cache->acquire({{99, round, 0, 0}, "gone", kModelBytes, kStages}, refusal);
    require(model && model->is_loader(), "a fresh model is not ours to load");
    std::thread closer([&model] { model->close(); });
    try {
      load(*model, file, 1);
    } catch (const LoadCancelled&) {     // closed while it ran
    } catch (const std::logic_error&) {  // closed before it began
    }
    closer.join();
    require(!model->is_loader(), "a closed model is still being loaded");
    cache->evict({99, round, 0, 0});
  }
}

}  // namespace

int main(int count, char** arguments) {
  require(count == 2, "usage: cache_stress DIR");
  const std::string directory = arguments[1];
  const std::string path = directory + "/weights";
  std::vector<std::string> files;
  for (std::uint32_t model = 0; model < kModels; ++model) {
    files.push_back(write_file(directory, model));
  }
  try {
    const auto keeper = std::make_shared<WeightCache>(path, 3 * kModelBytes);
    std::vector<std::thread> players;
    for (std::uint32_t player = 0; player < kPlayers; ++player) {
      players.emplace_back([&, player] { play(path, files, player); });
    }
    for (std::thread& player : players) player.join();
    for (const EntryStatus& status : keeper->status()) {
      require(status.pin_pids.empty(), "a pin was left behind");
    }
    stress_cancellation(path, files[0]);
  } catch (const std::exception& error) {
    require(false, error.what());
  }
  std::puts("cache_stress: ok");
  return 0;
}

// Threads that press the weight cache as hard as they can, for the sanitizers: `cache_stress DIR`.
// Each plays a process with a client of its own: it loads, waits, pins, reads and evicts, in a
// cache that holds a third of the models. With large models memory is made ready meanwhile, and is
// handed from model to model.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "memory/cached_model.h"
#include "memory/errors.h"
#include "memory/huge_pages.h"
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
constexpr std::uint64_t kLargeStageBytes = (1 << 19) + 8192;  // 4 of them: a huge page and a rest
constexpr std::uint32_t kPlayers = 4;
constexpr std::uint32_t kRounds = 120;
constexpr std::uint32_t kLargeRounds = 12;
constexpr std::int64_t kPatience = 40 * kSecond;

void require(bool claim, const char* what) {
  if (!claim) {
    std::fprintf(stderr, "cache_stress: %s\n", what);
    std::exit(1);
  }
}

// The models of one cache.
struct Scene {
  std::string path;  // of the cache
  std::uint64_t stage_bytes;
  std::vector<std::string> files;

  std::uint64_t model_bytes() const { return kStages * stage_bytes; }
  // With room for the spare where there can be one.
  std::uint64_t budget_bytes() const {
    return 3 * model_bytes() + (model_bytes() < kHugePageBytes ? 0 : 2 * kHugePageBytes);
  }
  std::shared_ptr<WeightCache> open_cache() const {
    return std::make_shared<WeightCache>(path, budget_bytes());
  }
};

// The file of a model holds its number in every byte.
std::string write_file(const std::string& path, std::uint32_t model, std::uint64_t bytes) {
  const std::string content(bytes, static_cast<char>('a' + model));
  const File file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600));
  require(write(file.get(), content.data(), content.size()) == static_cast<ssize_t>(content.size()),
          "a file could not be written");
  return path;
}

Scene make_scene(const std::string& path, std::uint64_t stage_bytes) {
  Scene scene{path, stage_bytes, {}};
  for (std::uint32_t model = 0; model < kModels; ++model) {
    const std::string file = path + "-model-" + std::to_string(model);
    scene.files.push_back(write_file(file, model, scene.model_bytes()));
  }
  return scene;
}

std::vector<Job> jobs_of(const std::string& path, std::uint64_t stage_bytes) {
  struct stat info{};
  require(stat(path.c_str(), &info) == 0, "a file is gone");
  const PlannedFile file{path, static_cast<std::uint64_t>(info.st_size),
                         info.st_mtim.tv_sec * kSecond + info.st_mtim.tv_nsec, info.st_ino};
  std::vector<Job> jobs;
  for (std::uint32_t stage = 0; stage < kStages; ++stage) {
    const Layout layout = stage % 2 == 0 ? Layout::rows : Layout::tiles;
    jobs.push_back({file, stage * stage_bytes, stage_bytes, 64, stage_bytes / 64, 2, layout,
                    stage * stage_bytes, stage, Convert::none});
  }
  return jobs;
}

void load(CachedModel& model, const std::string& path, std::uint32_t round) {
  model.start_load(jobs_of(path, model.size_bytes() / kStages), 1 + static_cast<int>(round % 2));
  if (round % 7 == 0) model.cancel();
  while (!model.wait_for_load(kSecond)) {
  }
  model.finish_load();
}

// Brings one model in, whoever loads it, looks at all of it, and lets go.
void use(WeightCache& cache, const Scene& scene, std::uint32_t number, std::uint32_t round) {
  const std::int64_t deadline = now_ns() + kPatience;
  std::string refusal;
  const Wanted wanted{{number, 1, 2, 3}, "model", scene.model_bytes(), kStages};
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
          load(*model, scene.files[number], round++);
        } else {
          model->wait_for_change(change, 10 * kMillisecond);
        }
      }
    } catch (const LoadCancelled&) {
      continue;  // this one loads no more: closing drops its pin, and a new one goes on
    } catch (const WeightsEvicted&) {
      require(false, "a pinned model was evicted");
    }
    const std::string content(scene.model_bytes(), static_cast<char>('a' + number));
    require(std::memcmp(model->address(), content.data(), content.size()) == 0, "a model is torn");
    model->note_use();
    if (model->unpin()) model->free_failed();
    return;
  }
}

void play(const Scene& scene, std::uint32_t player, std::uint32_t rounds) {
  const auto cache = scene.open_cache();
  std::uint32_t random = player * 2654435761u + 1;
  for (std::uint32_t round = 0; round < rounds; ++round) {
    random = random * 1664525u + 1013904223u;
    const std::uint32_t number = (random >> 16) % kModels;
    use(*cache, scene, number, round);
    require(cache->used_bytes() <= cache->budget_bytes(), "the budget was broken");
    if (round % 5 == 0) cache->evict({number, 1, 2, 3});
    if (round % 9 == 0) cache->set_demand({number, 1, 2, 3}, round % 2 == 0);
    if (round % 50 == 0) {
      require(cache->status().size() * scene.model_bytes() <= scene.budget_bytes(),
              "there are more models than fit");
      require(cache->evictions().size() <= kEvictionRecords, "there are too many records");
    }
  }
  cache->close();
}

void stress(const Scene& scene, std::uint32_t rounds) {
  const auto keeper = scene.open_cache();
  std::vector<std::thread> players;
  for (std::uint32_t player = 0; player < kPlayers; ++player) {
    players.emplace_back([&scene, player, rounds] { play(scene, player, rounds); });
  }
  for (std::thread& player : players) player.join();
  for (const EntryStatus& status : keeper->status()) {
    require(status.pin_pids.empty(), "a pin was left behind");
  }
}

// As above, while one has memory made ready without end.
void stress_spare(const Scene& scene) {
  const auto cache = scene.open_cache();
  std::atomic<bool> is_over{false};
  std::thread keeper([&] {
    while (!is_over.load()) cache->prepare(scene.budget_bytes());
  });
  stress(scene, kLargeRounds);
  is_over.store(true);
  keeper.join();
  require(cache->used_bytes() + cache->spare_bytes() <= scene.budget_bytes(),
          "models and spare do not fit");
  for (std::uint32_t number = 0; number < kModels; ++number) cache->evict({number, 1, 2, 3});
  require(cache->prepare(scene.budget_bytes()), "there is no memory to be made ready");
  require(cache->ready_bytes() == whole_huge_pages(scene.budget_bytes()), "not all is ready");
}

void stress_cancellation(const Scene& scene) {
  const auto cache = scene.open_cache();
  std::string refusal;
  for (std::uint32_t round = 0; round < kRounds; ++round) {
    const auto model =
        cache->acquire({{99, round, 0, 0}, "gone", scene.model_bytes(), kStages}, refusal);
    require(model && model->is_loader(), "a fresh model is not ours to load");
    std::thread closer([&model] { model->close(); });
    try {
      load(*model, scene.files[0], 1);
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
  try {
    const Scene small = make_scene(directory + "/small", kStageBytes);
    stress(small, kRounds);
    stress_cancellation(small);
    stress_spare(make_scene(directory + "/large", kLargeStageBytes));
  } catch (const std::exception& error) {
    require(false, error.what());
  }
  std::puts("cache_stress: ok");
  return 0;
}

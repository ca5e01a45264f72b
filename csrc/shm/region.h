// Named files of shared memory with a checked header; what the body holds is its kind's business.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace aegaeon::shm {

enum class RegionKind : std::uint32_t {
  ring = 1,
  table = 2,
  weights = 3,
  kv_pool = 4,
  neighbours = 5
};

using RegionParameters = std::array<std::uint64_t, 2>;

// A mapping of one region; unmaps when destroyed, never removes the file. Its file never changes
// its length: whoever truncates it (mode 0600, so only the same user can) kills with SIGBUS all who
// use it. Catching that signal would take it from the program we are a guest in.
class Region {
 public:
  // Makes `path`, which must not exist. Its memory is reserved, so that a full /dev/shm fails
  // here and not at a later write; `initialise` fills the zeroed body before the name exists, so
  // nobody ever attaches to a half-made region. Raises RegionError.
  static Region create(const std::string& path, RegionKind kind, RegionParameters parameters,
                       std::size_t body_bytes, const std::function<void(std::byte*)>& initialise);

  // Maps the region at `path`. Raises RegionError when there is none, RegionMismatch when it is
  // of another version, kind, size or pid namespace, or damaged.
  static Region attach(const std::string& path, RegionKind kind);

  Region(Region&& other) noexcept;
  Region& operator=(Region&&) = delete;
  ~Region();

  const std::string& path() const { return path_; }
  const RegionParameters& parameters() const { return parameters_; }
  std::byte* body() const;
  std::size_t body_bytes() const;

 private:
  Region(std::string path, RegionParameters parameters, void* base, std::size_t total_bytes);

  std::string path_;
  RegionParameters parameters_;  // as checked; the shared copy is not read again
  void* base_;
  std::size_t total_bytes_;
};

// True when something stands at `path`.
bool region_exists(const std::string& path);

}  // namespace aegaeon::shm

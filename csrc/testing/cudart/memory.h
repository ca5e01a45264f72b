// Memory of the stand-in: who has which addresses, and what kind they are. The device's lies in
// files without a name, so that another process may open it as on a real device.
#pragma once

#include <driver_types.h>

#include <cstddef>
#include <cstdint>
#include <map>

namespace cudart {

enum class Kind : std::uint8_t { pageable, device, pinned, registered, peer };

class Memory {
 public:
  void reset(std::size_t device_bytes);

  // Null where there is none.
  void* make(std::size_t bytes, Kind kind);
  // False, and nothing is done, where no range of this kind begins there.
  bool free(void* base, Kind kind);
  // False where part of it is somebody's already.
  bool enter(void* base, std::size_t bytes, Kind kind);
  bool forget(void* base, Kind kind);

  // False where a range begins in somebody's and ends elsewhere.
  bool look_up(const void* address, std::size_t bytes, Kind& kind) const;

  bool share(const void* address, cudaIpcMemHandle_t& handle) const;
  void* open(const cudaIpcMemHandle_t& handle);

  std::size_t total_bytes() const { return device_bytes_; }
  std::size_t free_bytes() const { return device_bytes_ - used_bytes_; }
  std::size_t count() const { return ranges_.size(); }

 private:
  struct Range {
    std::size_t bytes;
    Kind kind;
    int file;
  };
  using Ranges = std::map<std::uintptr_t, Range>;

  Ranges::const_iterator find(const void* address) const;
  void* add(int file, std::size_t bytes, Kind kind);

  std::size_t device_bytes_ = 0;
  std::size_t used_bytes_ = 0;
  Ranges ranges_;  // by where they begin
};

}  // namespace cudart

// The bytes that KV blocks lie in; who holds which of them is not known here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace aegaeon::memory {

// Memory that this processor does not write itself: a device's.
class DeviceBytes {
 public:
  virtual ~DeviceBytes() = default;
  // Before whatever the device does with it from now on.
  virtual void zero(std::byte* place, std::size_t bytes) = 0;
};

class KvArena {
 public:
  // Private memory of this process, zeroed.
  static KvArena anonymous(std::size_t bytes);
  // Memory of the caller's, zeroed, which outlives this object; with `device`, it is that one's.
  static KvArena at(void* base, std::size_t bytes, std::shared_ptr<DeviceBytes> device = nullptr);
  // Makes the sparse file `path`, in place of what may stand there. Raises RegionError.
  static KvArena create(const std::string& path, std::size_t bytes);
  // Maps that file. Raises RegionError, RegionMismatch when it is another one.
  static KvArena attach(const std::string& path, std::size_t bytes, std::uint64_t inode);

  KvArena(KvArena&& other) noexcept;
  KvArena& operator=(KvArena&&) = delete;
  ~KvArena();

  // Gets memory for a range before it is first written, so that a full file system is told here
  // and not by SIGBUS. False: there is no room.
  bool reserve(std::size_t offset, std::size_t bytes);
  // Maps every page of a range that has memory, so that no write to it has to. A kernel that does
  // not know this does it then.
  void populate(std::size_t offset, std::size_t bytes);
  void zero(std::size_t offset, std::size_t bytes);

  std::byte* base() const { return base_; }
  std::size_t bytes() const { return bytes_; }
  std::uint64_t inode() const;

 private:
  KvArena(std::byte* base, std::size_t bytes, int file, bool is_mapped,
          std::shared_ptr<DeviceBytes> device = nullptr)
      : base_(base),
        bytes_(bytes),
        file_(file),
        is_mapped_(is_mapped),
        device_(std::move(device)) {}
  static KvArena map_file(const std::string& path, std::size_t bytes, int file);

  std::byte* base_;
  std::size_t bytes_;
  int file_;  // -1 without
  bool is_mapped_;
  std::shared_ptr<DeviceBytes> device_;  // who zeroes it, where this processor does not
};

}  // namespace aegaeon::memory

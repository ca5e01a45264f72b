#include "shm/region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "shm/errors.h"
#include "shm/owner.h"

namespace aegaeon::shm {
namespace {

constexpr std::uint64_t kMagic = 0x4d48534e4f454741;  // "AGEONSHM", little endian
constexpr std::uint32_t kLayoutVersion = 1;           // of the header and of every body
constexpr std::size_t kHeaderBytes = 4096;            // the body starts on a page
constexpr std::size_t kMaxBytes = std::size_t{1} << 36;

struct Header {
  std::uint64_t magic;
  std::uint32_t version;
  RegionKind kind;
  std::uint64_t total_bytes;
  RegionParameters parameters;
  std::uint64_t host;
  std::uint64_t check;  // of all above; last
};

std::uint64_t check_of(const Header& header) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&header);
  std::uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (std::size_t at = 0; at < offsetof(Header, check); ++at) {
    hash = (hash ^ bytes[at]) * 1099511628211u;
  }
  return hash;
}

class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int get() const { return descriptor_; }

 private:
  int descriptor_;
};

std::string reason(int error) { return std::strerror(error); }

void* map(const std::string& path, int file, std::size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (base == MAP_FAILED) {
    throw RegionError("cannot map " + path + ": " + reason(errno));
  }
  return base;
}

// The file under its temporary name: removed by whoever leaves, whatever happens.
class TemporaryName {
 public:
  explicit TemporaryName(const std::string& path) {
    static std::atomic<unsigned> counter{0};
    name_ = path + ".new-" + std::to_string(getpid()) + "-" + std::to_string(counter.fetch_add(1));
  }
  ~TemporaryName() { ::unlink(name_.c_str()); }
  TemporaryName(const TemporaryName&) = delete;
  TemporaryName& operator=(const TemporaryName&) = delete;
  const char* get() const { return name_.c_str(); }

 private:
  std::string name_;
};

void reserve(const std::string& path, int file, std::size_t bytes) {
  const int error = posix_fallocate(file, 0, static_cast<off_t>(bytes));
  if (error != 0) {
    throw RegionError("cannot reserve " + std::to_string(bytes) + " bytes for " + path + ": " +
                      reason(error) + "; free memory there or make it larger (docker: --shm-size)");
  }
}

[[noreturn]] void mismatch(const std::string& path, const std::string& fact) {
  throw RegionMismatch(path + " " + fact +
                       "; stop the servers that use it, remove the file, and run one version only");
}

void check_header(const std::string& path, const Header& header, std::size_t file_bytes,
                  RegionKind kind) {
  if (header.magic != kMagic) {
    mismatch(path, "is not a shared-memory region of aegaeon");
  }
  if (header.version != kLayoutVersion) {
    mismatch(path, "has layout version " + std::to_string(header.version) + ", this process has " +
                       std::to_string(kLayoutVersion));
  }
  if (header.total_bytes != file_bytes || file_bytes > kMaxBytes) {
    mismatch(path, "is " + std::to_string(file_bytes) + " bytes long, its header says " +
                       std::to_string(header.total_bytes));
  }
  if (header.check != check_of(header)) {
    mismatch(path, "has a damaged header");
  }
  if (header.kind != kind) {
    mismatch(path, "holds kind " + std::to_string(static_cast<int>(header.kind)) +
                       " (1 ring, 2 table, 3 weights), not " +
                       std::to_string(static_cast<int>(kind)));
  }
  if (header.host != host_identity()) {
    mismatch(path,
             "was made in another pid or time namespace or before a reboot, so the lives of its "
             "processes cannot be judged (containers: share the pid namespace)");
  }
}

}  // namespace

Region::Region(std::string path, RegionParameters parameters, void* base, std::size_t total_bytes)
    : path_(std::move(path)), parameters_(parameters), base_(base), total_bytes_(total_bytes) {}

Region::Region(Region&& other) noexcept
    : path_(std::move(other.path_)),
      parameters_(other.parameters_),
      base_(std::exchange(other.base_, nullptr)),
      total_bytes_(other.total_bytes_) {}

Region::~Region() {
  if (base_ != nullptr) {
    munmap(base_, total_bytes_);
  }
}

std::byte* Region::body() const { return static_cast<std::byte*>(base_) + kHeaderBytes; }

std::size_t Region::body_bytes() const { return total_bytes_ - kHeaderBytes; }

Region Region::create(const std::string& path, RegionKind kind, RegionParameters parameters,
                      std::size_t body_bytes, const std::function<void(std::byte*)>& initialise) {
  if (body_bytes > kMaxBytes - kHeaderBytes) {
    throw RegionError(path + " would need " + std::to_string(body_bytes) + " bytes; the limit is " +
                      std::to_string(kMaxBytes));
  }
  const std::size_t total_bytes = kHeaderBytes + body_bytes;
  const TemporaryName temporary(path);
  const File file(open(temporary.get(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (file.get() < 0) {
    throw RegionError("cannot create " + path + ": " + reason(errno));
  }
  reserve(path, file.get(), total_bytes);
  Region region(path, parameters, map(path, file.get(), total_bytes), total_bytes);
  initialise(region.body());
  Header header{kMagic, kLayoutVersion, kind, total_bytes, parameters, host_identity(), 0};
  header.check = check_of(header);
  std::memcpy(region.base_, &header, sizeof header);
  if (link(temporary.get(), path.c_str()) != 0) {
    const int error = errno;
    throw RegionError(
        "cannot create " + path + ": " + reason(error) +
        (error == EEXIST ? "; another server uses it, or left it: unlink it first" : ""));
  }
  return region;
}

Region Region::attach(const std::string& path, RegionKind kind) {
  // O_NONBLOCK: a FIFO in the place of a region must not hang us.
  const File file(open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (file.get() < 0) {
    const int error = errno;
    throw RegionError("cannot open " + path + ": " + reason(error) +
                      (error == ENOENT ? "; its server has not started, or has ended" : ""));
  }
  struct stat info{};
  Header header{};
  if (fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode) ||
      static_cast<std::size_t>(info.st_size) < kHeaderBytes ||
      pread(file.get(), &header, sizeof header, 0) != static_cast<ssize_t>(sizeof header)) {
    mismatch(path, "is too short to be a shared-memory region");
  }
  const auto file_bytes = static_cast<std::size_t>(info.st_size);
  check_header(path, header, file_bytes, kind);
  return Region(path, header.parameters, map(path, file.get(), file_bytes), file_bytes);
}

bool region_exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

}  // namespace aegaeon::shm

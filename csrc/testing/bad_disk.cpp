// A disk that misbehaves, for tests: preloaded, it changes what pread finds in chosen files.
//
// The variable BAD_DISK names a file of one line, "FAULT FIRST FRAGMENT", which is looked at anew
// with every read: from the FIRST read on (counted in each process from 0, since the line was
// written) of files whose path holds FRAGMENT, they fail (eio), find the end of the file (eof),
// bring half of what they could (short), or do not return as long as the line stands (hang). An
// empty or missing file is a disk that is well.
#include <dlfcn.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

namespace {

struct Rule {
  std::string fault;
  long first = 0;
  std::string fragment;
  timespec written{};
};

Rule read_rule() {
  const char* path = std::getenv("BAD_DISK");
  std::FILE* file = path == nullptr ? nullptr : std::fopen(path, "re");
  if (file == nullptr) return {};
  char fault[16] = "", fragment[200] = "";
  Rule rule;
  struct stat info{};
  if (std::fscanf(file, "%15s %ld %199s", fault, &rule.first, fragment) == 3 &&
      fstat(fileno(file), &info) == 0) {
    rule.fault = fault;
    rule.fragment = fragment;
    rule.written = info.st_mtim;
  }
  std::fclose(file);
  return rule;
}

bool is_path_with(int descriptor, const std::string& fragment) {
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  char path[4096];
  const ssize_t length = readlink(link.c_str(), path, sizeof path);
  return length > 0 &&
         std::string(path, static_cast<std::size_t>(length)).find(fragment) != std::string::npos;
}

// The fault of this read, or nothing. Counts the reads of each rule.
std::string fault_of(int descriptor) {
  static std::mutex mutex;
  static timespec counted{};
  static long reads = 0;
  const Rule rule = read_rule();
  if (rule.fault.empty() || !is_path_with(descriptor, rule.fragment)) return "";
  const std::lock_guard<std::mutex> held(mutex);
  if (rule.written.tv_sec != counted.tv_sec || rule.written.tv_nsec != counted.tv_nsec) {
    counted = rule.written;
    reads = 0;
  }
  return reads++ >= rule.first ? rule.fault : "";
}

void hang() {
  const timespec moment{0, 20'000'000};
  while (read_rule().fault == "hang") nanosleep(&moment, nullptr);
}

template <typename Call>
Call next(const char* name) {
  return reinterpret_cast<Call>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

ssize_t pread64(int descriptor, void* to, std::size_t bytes, off64_t offset) {
  static const auto real = next<ssize_t (*)(int, void*, std::size_t, off64_t)>("pread64");
  const std::string fault = fault_of(descriptor);
  if (fault == "eof") return 0;
  if (fault == "hang") hang();
  if (fault == "short") bytes = std::max<std::size_t>(bytes / 2, 1);
  if (fault == "eio") {
    errno = EIO;
    return -1;
  }
  return real(descriptor, to, bytes, offset);
}

ssize_t pread(int descriptor, void* to, std::size_t bytes, off_t offset) {
  return pread64(descriptor, to, bytes, offset);
}

// A read into several places may always bring no more than the first.
ssize_t preadv64(int descriptor, const iovec* to, int count, off64_t offset) {
  return count < 1 ? 0 : pread64(descriptor, to->iov_base, to->iov_len, offset);
}

ssize_t preadv(int descriptor, const iovec* to, int count, off_t offset) {
  return preadv64(descriptor, to, count, offset);
}

}  // extern "C"

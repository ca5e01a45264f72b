#include "bind/process.h"

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace aegaeon {

// A parent that died before prctl sends nothing, so the signal it owes is raised here.
void die_with_parent(int signal, int parent_pid) {
  const pid_t before = getppid();
  if (prctl(PR_SET_PDEATHSIG, signal) != 0) {
    throw std::system_error(errno, std::generic_category(), "prctl(PR_SET_PDEATHSIG)");
  }
  const pid_t expected = parent_pid > 0 ? parent_pid : before;
  if (getppid() != expected) {
    raise(signal);
  }
}

}  // namespace aegaeon

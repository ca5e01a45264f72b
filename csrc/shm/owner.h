// Who owns something in shared memory: a process, named so that its pid may be used again.
#pragma once

#include <cstdint>

namespace aegaeon::shm {

// pid in the upper 22 bits, start time in clock ticks below it, bit 0 left free for the lock.
// One word, so that ownership changes by one compare-and-swap. 0 is nobody.
using Owner = std::uint64_t;

constexpr Owner kNobody = 0;

// This process. Cheap; right after fork too.
Owner self_owner();

// False once the process has ended (a zombie has) or its pid belongs to another one.
bool owner_is_alive(Owner owner);

int owner_pid(Owner owner);

// What pids and monotonic times mean here: the boot, the pid namespace, the time namespace.
// Processes that differ in it cannot judge each other's lives or leases.
std::uint64_t host_identity();

}  // namespace aegaeon::shm

// Control of this process.
#pragma once

namespace aegaeon {

// Has the kernel send `signal` to this process when its parent ends; raises it here when the
// parent, which is `parent_pid` if that is given, has ended already. Throws std::system_error.
void die_with_parent(int signal, int parent_pid);

}  // namespace aegaeon

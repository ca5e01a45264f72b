"""Control of processes (csrc/bind/process.cpp)."""

def die_with_parent(signal: int, parent_pid: int = 0) -> None:
    """Have the kernel send us `signal` when the thread that started this process ends.

    With `parent_pid`, a parent that was gone before this call counts too: the signal comes at
    once. It is the starting thread, not its process, that counts: start such children from one
    that lives as long as they may.
    """

"""Model directories on their way to a node: from other nodes, a shared file system, the hub."""

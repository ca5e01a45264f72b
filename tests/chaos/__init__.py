"""Many streams while processes are killed and paused: what each client has at the end is either
what it would have had in peace, or a well-formed error where its own proxy died."""

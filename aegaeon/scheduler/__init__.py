"""Pure policies that decide what a device does next; no clocks, no input or output, no tensors."""

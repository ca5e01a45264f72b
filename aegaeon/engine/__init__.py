"""Does what an action says: sequences, batches, sampling, over one device."""

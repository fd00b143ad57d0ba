"""One pass over the blocks: reading, recording, compressing, writing, resuming."""

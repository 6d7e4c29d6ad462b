"""What a run leaves: the journal of what is finished, the checkpoint around the shards, and its checks."""

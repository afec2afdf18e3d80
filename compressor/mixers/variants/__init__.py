"""Published layers as choices of parts, one file each. Only the spec they make travels with a checkpoint."""

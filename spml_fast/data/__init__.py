"""From a prepared data set to batches: labels, Manifest, sampler, DALI, loader."""

"""One new token and its sliding window: the cache is updated, then attended to."""

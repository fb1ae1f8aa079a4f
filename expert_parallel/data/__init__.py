"""From text to the micro-batch of one data rank: preparing, blending, sampling, sharding."""

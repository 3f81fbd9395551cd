-- Make the limits of a starting replica those of the deployment.
--
-- ARGV[1]  pairs per second
-- ARGV[2]  calls per second
-- ARGV[3]  pairs in a batch
-- Reply    the three values as they were before; nil for one that was not there
local before = redis.call('HMGET', LIMIT, 'pairs_per_second', 'calls_per_second', 'batch_pairs')
redis.call('HSET', LIMIT, 'pairs_per_second', ARGV[1], 'calls_per_second', ARGV[2], 'batch_pairs', ARGV[3])
return before

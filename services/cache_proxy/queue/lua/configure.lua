-- A replica starts: its limits become the deployment's.
-- ARGV[1]  pairs a second   ARGV[2]  calls a second   ARGV[3]  pairs in a batch
-- Returns  what they were before, each nil if it was not there
local before = redis.call('HMGET', LIMIT, 'pairs_per_second', 'calls_per_second', 'batch_pairs')
redis.call('HSET', LIMIT, 'pairs_per_second', ARGV[1], 'calls_per_second', ARGV[2], 'batch_pairs', ARGV[3])
return before

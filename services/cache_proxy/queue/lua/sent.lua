-- A batch left for the model later than its slot began: the next slot is as much later.
-- ARGV[1]  the claim's id   ARGV[2]  ms that it was late
-- Only while no other claim has counted on what this one was thought to be; said twice, it counts once.
local limit = redis.call('HMGET', LIMIT, 'last', 'pairs_tat', 'calls_tat')
local pairs_tat, calls_tat, late = number(limit[2]), number(limit[3]), math.min(tonumber(ARGV[2]), LATE_MS)
if limit[1] == ARGV[1] and pairs_tat and calls_tat then
  redis.call('HSET', LIMIT, 'pairs_tat', pairs_tat + late, 'calls_tat', calls_tat + late)
  redis.call('HDEL', LIMIT, 'last')
end
return redis.status_reply('OK')

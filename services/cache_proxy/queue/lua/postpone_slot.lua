-- A batch leaves for the model later than its slot began: the next slot is as much later.
-- ARGV[1]  the claim's id   ARGV[2]  ms that it is late; said again, the last word counts
-- Returns  1, or 0 if others count on what the claim was thought to be, or have its pairs: then it must not leave
local limit = redis.call('HMGET', LIMIT, 'last', 'pairs_after', 'calls_after')
local pairs_tat, calls_tat, late = number(limit[2]), number(limit[3]), tonumber(ARGV[2])
if limit[1] ~= ARGV[1] or not pairs_tat or not calls_tat or late > LATE_MS
  or redis.call('HEXISTS', CLAIMS, ARGV[1]) == 0 then
  return 0
end
redis.call('HSET', LIMIT, 'pairs_tat', pairs_tat + late, 'calls_tat', calls_tat + late)
return 1

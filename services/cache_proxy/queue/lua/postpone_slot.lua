-- Move the next slot: a batch is sent later than its slot began, and the calls behind it keep their distance.
--
-- ARGV[1]  id of the claim
-- ARGV[2]  milliseconds that the batch is late; if it is sent twice, the last value counts
-- Reply    1; or 0 if another claim relies on the slot already, or the claim is over. Then the batch must not
--          be sent.
local limit = redis.call('HMGET', LIMIT, 'last', 'pairs_after', 'calls_after')
local pairs_tat = to_number(limit[2])
local calls_tat = to_number(limit[3])
local late_ms = tonumber(ARGV[2])
if limit[1] ~= ARGV[1] or not pairs_tat or not calls_tat or late_ms > MAX_LATE_MS
  or redis.call('HEXISTS', CLAIMS, ARGV[1]) == 0 then
  return 0
end
redis.call('HSET', LIMIT, 'pairs_tat', pairs_tat + late_ms, 'calls_tat', calls_tat + late_ms)
return 1

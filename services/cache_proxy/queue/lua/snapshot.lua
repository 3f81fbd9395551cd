-- Return the state of the queue for the status page. It changes nothing.
--
-- ARGV[1]  how many minutes of reports to return, the current one included
-- ARGV[2]  maximum number of replicas in a minute; a minute with more has garbage in it, and is left out
-- ARGV[3]  maximum bytes of a report; a longer one is garbage, and is left out
-- Reply    msgpack list; a value that cannot be read is false:
--          1  now, ms                      2  {interactive, bulk, refresh}: pairs that wait
--          3  ms until a call is allowed   4  pairs in a batch
--          5  ms between full batches      6  pairs per second, as they are consumed; 0: no limit
--          7  calls per second, likewise   8  failed calls in a row
--          9  replicas with heartbeats    10  replicas that are silent for longer than CUT_OFF_MS
--         11  {minute, list of reports} for each minute
--         12  1 if the model has answered nothing for the retry window
local minutes = tonumber(ARGV[1])
local max_replicas = tonumber(ARGV[2])
local max_bytes = tonumber(ARGV[3])

local waiting, next_pairs = {}, 1
for at, priority in ipairs(PRIORITIES) do
  waiting[at] = 0
  for _, lane in ipairs(lanes_of(priority)) do
    waiting[at] = waiting[at] + redis.call('ZCARD', lane_key(lane))
  end
  next_pairs = next_pairs + waiting[at]
end

-- When the next call is allowed, as in enqueue.lua: by the limit, a pushback and a backoff.
local limit =
  redis.call('HMGET', LIMIT, 'pairs_per_second', 'calls_per_second', 'pairs_tat', 'calls_tat', 'not_before')
local failures, backoff_until = model.backoff()
local pairs_rate = to_rate(limit[1])
local calls_rate = to_rate(limit[2])
local batch_pairs = deployment_batch_pairs(false)
local batch_ms = slot_ms()
local function bounded_tat(tat)
  return math.min(to_number(tat) or 0, now + batch_ms + MAX_LATE_MS)
end
local calls_free_at = calls_rate and calls_rate > 0 and bounded_tat(limit[4]) or 0
local free_at = math.max(now, to_not_before(limit[5]), backoff_until, calls_free_at)
if batch_pairs and pairs_rate and pairs_rate > 0 then
  -- A batch that is not full needs only a part of the burst.
  local unused = math.max(0, batch_pairs - next_pairs)
  free_at = math.max(free_at, bounded_tat(limit[3]) - unused * 1000 / pairs_rate)
end

local reports, this_minute = {}, math.floor(now / 60000)
for minute = this_minute - minutes + 1, this_minute do
  local key, found = report_key(minute), {}
  if redis.call('TYPE', key).ok == 'hash' and redis.call('HLEN', key) <= max_replicas then
    local stored = redis.call('HGETALL', key)
    for at = 2, #stored, 2 do
      if #stored[at] <= max_bytes then
        found[#found + 1] = stored[at]
      end
    end
  end
  reports[#reports + 1] = { minute, found }
end
return cmsgpack.pack({
  now,
  waiting,
  free_at - now,
  batch_pairs,
  batch_ms,
  pairs_rate or false,
  calls_rate or false,
  failures,
  redis.call('ZCOUNT', REPLICAS, now - CUT_OFF_MS, '+inf'),
  redis.call('ZCOUNT', REPLICAS, '-inf', '(' .. (now - CUT_OFF_MS)),
  reports,
  meta_number('down'),
})

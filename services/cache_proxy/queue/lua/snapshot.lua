-- How the queue stands, for the status page: it decides nothing. What is no figure is false. Who is silent for less
-- than others would wait for it is not told yet.
-- ARGV[1]  how many minutes of reports to return, this one included
-- ARGV[2]  most replicas in a minute, [3] most bytes of a report: beyond those they are somebody else's, and left out
-- Returns  msgpack {now ms, {interactive, bulk, refresh waiting}, ms until a call is allowed, pairs in a batch,
--          ms between full batches, pairs a second, calls a second (as they are spent; 0: no limit),
--          failed calls in a row, replicas heard of lately, replicas that are silent,
--          {minute, list of reports} for each minute, 1 if the model has answered nothing for the retry window}
local minutes, most_replicas, most_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local waiting, next_pairs = {}, 1
for at, lane in ipairs(LANES) do
  waiting[at] = 0
  for _, one in ipairs(lanes_of(lane)) do
    waiting[at] = waiting[at] + redis.call('ZCARD', lane_key(one))
  end
  next_pairs = next_pairs + waiting[at]
end
local limit = redis.call('HMGET', LIMIT, 'pairs_per_second', 'calls_per_second', 'pairs_tat', 'calls_tat', 'not_before')
local failures, backoff_until = model.backoff()
local pairs_rate, calls_rate = rate_of(limit[1]), rate_of(limit[2])
local batch_pairs, batch_ms = pairs_in_batch(false), slot_ms()
local function spent_until(tat) -- as in enqueue.lua
  return math.min(number(tat) or 0, now + batch_ms + LATE_MS)
end
local free_at = math.max(now, not_before_of(limit[5]), backoff_until, calls_rate and calls_rate > 0 and spent_until(limit[4]) or 0)
if batch_pairs and pairs_rate and pairs_rate > 0 then
  local unused = math.max(0, batch_pairs - next_pairs) -- the rest of the burst is not asked for
  free_at = math.max(free_at, spent_until(limit[3]) - unused * 1000 / pairs_rate)
end

local reports, this_minute = {}, math.floor(now / 60000)
for minute = this_minute - minutes + 1, this_minute do
  local key, found = report_key(minute), {}
  if redis.call('TYPE', key).ok == 'hash' and redis.call('HLEN', key) <= most_replicas then
    local stored = redis.call('HGETALL', key)
    for at = 2, #stored, 2 do
      if #stored[at] <= most_bytes then
        found[#found + 1] = stored[at]
      end
    end
  end
  reports[#reports + 1] = { minute, found }
end
return cmsgpack.pack({ now, waiting, free_at - now, batch_pairs, batch_ms, pairs_rate or false,
  calls_rate or false, failures,
  redis.call('ZCOUNT', REPLICAS, now - CUT_OFF_MS, '+inf'),
  redis.call('ZCOUNT', REPLICAS, '-inf', '(' .. (now - CUT_OFF_MS)), reports, meta('down') })
